"""The one door to the linear KL: checks the arrays, picks the implementation, and owns the derivative.

The divergences return a weighted sum over positions, so that the caller divides by one global count and gets the same
loss under any data sharding or gradient accumulation. Because it is a sum, the derivatives by the student's hidden
states and head are formed during the forward pass, block by block, and only scaled in the backward pass; without
differentiation they are not computed. The teacher, the ids and the weights are constants.

`linear_logprobs` returns what a loss of the caller's own is made of, at each position. How the loss changes with it is
known in the backward pass only, which therefore multiplies the logits out once more.
"""

import dataclasses
import functools
import importlib
import math
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_kl import logprobs, passes, reference, xla
from kernels_pallas.linear_kl.divergence import Divergence
from kernels_pallas.linear_kl.xla import split_at_ids
from kernels_pallas.platforms import choose, platform

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "LogprobsImplementation",
    "linear_kl_at_ids",
    "linear_kl_full",
    "linear_logprobs",
    "split_at_ids",
]

Implementation = Literal["xla", "reference", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "reference", "tpu", "gpu")
LogprobsImplementation = Literal["xla", "reference"]
_LOGPROBS_IMPLEMENTATIONS: tuple[LogprobsImplementation, ...] = ("xla", "reference")
# Default blocks. Logits of one block of tokens are held whole; a CPU wants few of them at a time and walks the
# vocabulary in pieces that fit its cache, an accelerator's matrix units want large ones.
_LOGIT_BYTES_CPU = 56 * 2**20
_LOGIT_BYTES_ACCELERATOR = 512 * 2**20
_CPU_BLOCK_TOKENS = 256
_CPU_BLOCK_VOCAB = 4096


def linear_kl_full(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "B T Dt"],
    teacher_head: Float[Array, "V Dt"],
    weights: Float[Array, "B T"],
    *,
    divergence: Divergence,
    block_tokens: int | None = None,
    block_vocab: int | None = None,
    vocab_axis: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B T"]]]:
    """Σ weights · divergence(teacher ‖ student) over the whole vocabulary, exact.

    Args:
      hidden, head: the student's final hidden states and output matrix, float32 or bfloat16.
      teacher_hidden, teacher_head: the teacher's, of any width, over the same vocabulary of V tokens.
      weights: mask / denominator. A position of weight 0 adds exactly nothing to the loss or to any gradient, even
        where its hidden states are NaN.
      divergence: which loss.
      block_tokens: about how many of the B·T tokens to work on at a time; blocks are taken along T and are counted
        over the whole batch, so give (tokens per device) · (data shards) where B is sharded. Of "xla" alone.
      block_vocab: how many entries of the vocabulary at a time. None takes what suits a CPU's cache, and V whole
      elsewhere. Leave it
        whole (V) where the head is sharded over the vocabulary, or every block is gathered. Of "xla" alone.
      vocab_axis: inside `shard_map`, the mesh axis whose devices have the same positions and share the entries: of V
        entries in all, each has the heads' rows of its own, in order, and the ids count through all of them. Per token
        they exchange a few numbers. Each returns the whole sum and all statistics; of the derivatives by the head
        those of its own entries, by the hidden states what its entries add, which `shard_map` sums. Not of "reference".
      implementation: None (picks "xla"), "xla", "reference" (materialises [B, T, V]; for tests), or the kernels "tpu"
        and "gpu", which work on one device's arrays (inside `shard_map` if there are several) and take blocks of
        their own. They know every divergence.

    Peak temporary memory of "xla", in bytes beside arguments and results, with M tokens in a block: at most
    4·M·(2·V + 8·block_vocab) + 4·block_vocab·D. These are the student's and the teacher's logits, what is made of one
    block of them, and one block of the student's head. Of the kernels: 256 MiB of derivatives by the logits of a part
    of the vocabulary and of its rows of heads, 4·B·T·D of a gradient's sum, and copies of the hidden states.
    Accumulation is in float32 ("xla": float64 for float64 inputs, which doubles the memory).

    Returns:
      The loss sum, in nats, and per-position statistics without gradient, 0 where the weight is 0: `divergence`,
      `student_entropy`, `teacher_entropy` (nats), `top1_agreement` (1 where the student ranks the teacher's first
      entry first).

    Raises:
      ValueError: shapes that do not fit together, a block size below 1, an implementation that is unknown or of
        another platform, or a kernel asked for by name that does not take this dtype, width or number of devices.
    """
    _require_student(hidden, head, weights)
    _require("teacher_hidden", teacher_hidden, (*hidden.shape[:2], None))
    _require("teacher_head", teacher_head, (head.shape[0], teacher_hidden.shape[2]))
    plan = _plan(hidden, head, divergence, block_tokens, block_vocab, vocab_axis, implementation)
    _require_kernel(plan, hidden=hidden, head=head)
    _require_kernel(plan, teacher_hidden=teacher_hidden, teacher_head=teacher_head)
    return _full(hidden, head, (teacher_hidden, teacher_head, weights), plan)


def linear_kl_at_ids(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "B T J"],
    teacher_logprobs: Float[Array, "B T J"],
    teacher_log_tail: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    divergence: Divergence,
    block_tokens: int | None = None,
    block_vocab: int | None = None,
    vocab_axis: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B T"]]]:
    """Σ weights · divergence between distributions over J named tokens of the vocabulary and one bucket for all the
    others.

    By the data-processing inequality this never exceeds the divergence over the whole vocabulary, and it is never
    negative. With J = 1, log-probability 0 and an empty tail it is the cross-entropy (forward KL against a one-hot).
    The student's tail is the log-sum-exp over its unnamed entries, never 1 - Σ exp.

    Args:
      ids: the named entries of each position, without duplicates; -1 marks an absent entry.
      teacher_logprobs: the teacher's log-probabilities of them over the whole vocabulary (not renormalised).
      teacher_log_tail: the logarithm of its mass on all other entries; -inf where there is none.
      Others as in `linear_kl_full`.

    Peak temporary memory of "xla", counted as there, with the vocabulary rounded up to W entries in whole blocks:
    4·M·(W + 4·block_vocab) + 4·block_vocab·D bytes. The logits are the student's alone.

    Returns:
      As `linear_kl_full`, with `student_entropy` exact over the vocabulary, `teacher_entropy` that of the J + 1
      buckets (a lower bound of its exact entropy), `top1_agreement` against the teacher's first among the named
      entries, and also `teacher_tail_mass` and `student_support_mass` (the student's mass on the named entries).

    Raises:
      ValueError: as `linear_kl_full`, or more entries than the kernel asked for takes.
    """
    _require_student(hidden, head, weights)
    _require("ids", ids, (*hidden.shape[:2], None))
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids has dtype {ids.dtype}; pass integer token ids")
    _require("teacher_logprobs", teacher_logprobs, ids.shape)
    _require("teacher_log_tail", teacher_log_tail, ids.shape[:2])
    plan = _plan(hidden, head, divergence, block_tokens, block_vocab, vocab_axis, implementation)
    _require_kernel(plan, hidden=hidden, head=head)
    if plan.kernels and ids.shape[2] > plan.kernels.MOST_NAMED:
        raise ValueError(
            f"ids names {ids.shape[2]} entries; implementation {plan.implementation!r} of linear_kl takes at most "
            f"{plan.kernels.MOST_NAMED}; use 'xla'"
        )
    return _at_ids(hidden, head, (ids, teacher_logprobs, teacher_log_tail, weights), plan)


def linear_logprobs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "B T"],
    *,
    block_tokens: int | None = None,
    block_vocab: int | None = None,
    vocab_axis: str | None = None,
    implementation: LogprobsImplementation | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The log-probability of one token and the entropy of the whole distribution, at every position.

    With p = softmax(head · hidden), z its logits and H its entropy: ∂ log p(id) / ∂z = onehot(id) - p, and
    ∂H / ∂z = -p · (log p + H).

    Args:
      hidden, head: as in `linear_kl_full`; the gradients of both results go to both.
      ids: the token of each position; -1 marks a position that does not count: both its results are 0, and it adds
        exactly nothing to any gradient, even where its hidden states are NaN.
      block_tokens, block_vocab: as in `linear_kl_full`.
      vocab_axis: as in `linear_kl_full`; ids count through the entries of all devices, and each device returns the
        results over all of them.
      implementation: None or "xla", or "reference" (materialises [B, T, V]; for tests).

    Peak temporary memory of "xla", forward as backward, with M tokens in a block: about 4·M·4·block_vocab bytes, and
    backward the gradient of the head in float32.

    Returns:
      Log-probabilities and entropies in nats, float32 ("xla": float64 for float64 inputs).

    Raises:
      ValueError: shapes that do not fit together, ids that are no integers, a block size below 1, or an implementation
        that is unknown.
    """
    _require("hidden", hidden, (None, None, None))
    _require("head", head, (None, hidden.shape[2]))
    _require("ids", ids, hidden.shape[:2])
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids has dtype {ids.dtype}; pass integer token ids")
    if hidden.size == 0:
        raise ValueError(f"hidden has shape {hidden.shape}; pass at least one position")
    if implementation not in (None, *_LOGPROBS_IMPLEMENTATIONS):
        raise ValueError(
            f"implementation {implementation!r} of linear_logprobs; use one of {', '.join(_LOGPROBS_IMPLEMENTATIONS)}"
        )
    positions, vocab = _blocks(hidden, head, block_tokens, block_vocab, vocab_axis, implementation or "xla")
    if implementation == "reference":
        return reference.logprobs(hidden, head, ids)
    return _logprobs(hidden, head, ids, positions, vocab, vocab_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _logprobs(hidden, head, ids, positions, vocab, vocab_axis):
    logprob, entropy, _ = logprobs.forward(hidden, head, ids, positions=positions, vocab=vocab, vocab_axis=vocab_axis)
    return logprob, entropy


def _logprobs_forward(hidden, head, ids, positions, vocab, vocab_axis):
    logprob, entropy, mass = logprobs.forward(
        hidden, head, ids, positions=positions, vocab=vocab, vocab_axis=vocab_axis
    )
    return (logprob, entropy), (hidden, head, ids, entropy, mass)


def _logprobs_backward(positions, vocab, vocab_axis, residuals, cotangents):
    # What one device changes, it changes in the results that each of the axis returns.
    cotangents = tuple(xla.summed(cotangent, vocab_axis) for cotangent in cotangents)
    gradients = logprobs.backward(*residuals, *cotangents, positions=positions, vocab=vocab, vocab_axis=vocab_axis)
    return gradients.hidden, gradients.head, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that is decided before tracing; hashable, so it can be a static argument of the custom derivative."""

    divergence: Divergence
    positions: xla.Blocks
    vocab: xla.Blocks
    vocab_axis: str | None
    implementation: str

    @property
    def kernels(self) -> ModuleType | None:
        """The backend, if it is one. Imported when it is wanted: each brings its platform's compiler front end."""
        if self.implementation in ("xla", "reference"):
            return None
        return importlib.import_module(f"kernels_pallas.linear_kl.{self.implementation}")


def _with_derivative(xla_loss, kernel_loss, reference_loss):
    """A function of (hidden, head, constants, plan) whose derivatives are made in its forward pass."""

    def run(hidden, head, constants, plan, with_gradients):
        options = {"divergence": plan.divergence, "vocab_axis": plan.vocab_axis, "with_gradients": with_gradients}
        if plan.kernels:
            return kernel_loss(plan.kernels, hidden, head, *constants, **options)
        return xla_loss(hidden, head, *constants, positions=plan.positions, vocab=plan.vocab, **options)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def blocked(hidden, head, constants, plan):
        loss, stats, _ = run(hidden, head, constants, plan, with_gradients=False)
        return loss, stats

    def forward(hidden, head, constants, plan):
        loss, stats, gradients = run(hidden, head, constants, plan, with_gradients=True)
        return (loss, stats), (gradients.hidden, gradients.head)

    def backward(plan, gradients, cotangents):
        # What one device changes, it changes in the sum that each of the axis returns.
        loss_cotangent = xla.summed(cotangents[0], plan.vocab_axis)
        return *(loss_cotangent.astype(gradient.dtype) * gradient for gradient in gradients), None

    blocked.defvjp(forward, backward)

    def loss(hidden, head, constants, plan):
        if plan.implementation != "reference":
            return blocked(hidden, head, constants, plan)
        constants = jax.lax.stop_gradient(constants)
        loss, stats = reference_loss(hidden, head, *constants, divergence=plan.divergence)
        return loss, jax.lax.stop_gradient(stats)

    return loss


_full = _with_derivative(xla.full, passes.full, reference.full)
_at_ids = _with_derivative(xla.at_ids, passes.at_ids, reference.at_ids)


def _plan(hidden, head, divergence, block_tokens, block_vocab, vocab_axis, implementation) -> _Plan:
    implementation = choose("linear_kl", implementation, IMPLEMENTATIONS)
    positions, entries = _blocks(hidden, head, block_tokens, block_vocab, vocab_axis, implementation)
    return _Plan(
        divergence=divergence,
        positions=positions,
        vocab=entries,
        vocab_axis=vocab_axis,
        implementation=implementation,
    )


def _blocks(hidden, head, block_tokens, block_vocab, vocab_axis, implementation) -> tuple[xla.Blocks, xla.Blocks]:
    """Of T and of the vocabulary."""
    for name, value in (("block_tokens", block_tokens), ("block_vocab", block_vocab)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1, or None for the default")
    if vocab_axis is not None and implementation == "reference":
        raise ValueError(f"vocab_axis {vocab_axis!r} is not of implementation 'reference'; use 'xla'")
    batch, length = hidden.shape[:2]
    vocab = head.shape[0]
    on_cpu = platform() == "cpu"
    if block_vocab is None:
        block_vocab = _cache_block(vocab) if on_cpu else vocab
    if block_tokens is None:
        # As many as for all entries on one device: the fewer, the oftener the gradient of its entries is read and
        # written.
        entries = vocab if vocab_axis is None else vocab * jax.lax.axis_size(vocab_axis)
        block_tokens = (_LOGIT_BYTES_CPU if on_cpu else _LOGIT_BYTES_ACCELERATOR) // (4 * entries)
        block_tokens = min(block_tokens, _CPU_BLOCK_TOKENS) if on_cpu else block_tokens
    blocks = -(-length // max(1, block_tokens // batch))
    positions = xla.Blocks(size=length, block=-(-length // blocks))
    return positions, xla.Blocks(size=vocab, block=min(block_vocab, vocab))


def _cache_block(vocab: int) -> int:
    """Nearly equal blocks of whole cache lines."""
    if vocab <= _CPU_BLOCK_VOCAB:
        return vocab
    return -(-vocab // -(-vocab // _CPU_BLOCK_VOCAB) // 16) * 16


def _require_student(hidden: Array, head: Array, weights: Array) -> None:
    _require("hidden", hidden, (None, None, None))
    _require("head", head, (None, hidden.shape[2]))
    _require("weights", weights, hidden.shape[:2])
    if hidden.size == 0:
        raise ValueError(f"hidden has shape {hidden.shape}; pass at least one position")


def _require_kernel(plan: _Plan, **pair: Array) -> None:
    """That a kernel, if it is one, takes these hidden states and this head."""
    name, kernels = plan.implementation, plan.kernels
    if kernels is None:
        return
    names, dtypes = " and ".join(pair), {str(array.dtype) for array in pair.values()}
    if len(dtypes) > 1 or not dtypes <= {*kernels.DTYPES}:
        raise ValueError(
            f"{names} have dtypes {', '.join(sorted(dtypes))}; implementation {name!r} of linear_kl takes one of "
            f"{', '.join(kernels.DTYPES)} for both; cast them, or use 'xla'"
        )
    width = next(iter(pair.values())).shape[-1]
    if width % kernels.MULTIPLE:
        raise ValueError(
            f"{names} are {width} wide; implementation {name!r} of linear_kl takes multiples of {kernels.MULTIPLE}; "
            "use 'xla'"
        )
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    if devices > 1:
        raise ValueError(
            f"implementation {name!r} of linear_kl works on one device's arrays, the mesh has {devices} devices; call "
            "it inside jax.shard_map, or use 'xla'"
        )


def _require(name: str, array: Array, shape: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {array.shape}; it must be ({wanted}) to fit the other arrays")
