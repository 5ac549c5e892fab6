"""The divergence by a platform's kernels: passes over the vocabulary, and between them what is done once a token.

A kernel multiplies out logits a tile at a time and keeps only what it reduces them to. The first pass finds the
log-sum-exp. The second makes the logits again, and writes what the loss changes with them for one part of the
vocabulary and all tokens, in the model's dtype, which is how the products that follow want it. Those two products are
plain: with the tokens they complete the gradient of that part of the head, with the head they add to the tokens' own.

Two kernels that each kept a gradient's sum, as in attention, would multiply once more (five products of tokens, entries
and width instead of four), and a sum as wide as a model does not fit into a GPU's registers. Going over tokens instead
would need a float32 sum as large as the head.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_kl.mass import finite
from kernels_pallas.linear_kl.sure import Sure
from kernels_pallas.linear_kl.xla import (
    Blocks,
    Gradients,
    accumulator,
    largest,
    local_ids,
    over_buckets,
    own_ids,
    summed,
)

TOKENS = 128  # what a kernel's tokens are a multiple of
_PART_BYTES = 256 * 2**20  # of the derivatives by the logits of one part of the vocabulary, and of its rows of heads
_PART = 512  # what the entries of a part are a multiple of, unless it is the whole vocabulary


def full(kernels, hidden, head, teacher_hidden, teacher_head, weights, *, divergence, vocab_axis, with_gradients):
    """As `xla.full`, by the kernels of a backend."""
    weight = _tokens(weights, 0).astype(jnp.float32)
    live = weight != 0
    h, th = (jnp.where(live[:, None], _tokens(x, 0), 0) for x in (hidden, teacher_hidden))
    found = kernels.survey_full(h, head, th, teacher_head).over(vocab_axis)
    sure = Sure.of(divergence, found)
    ours, theirs = ((mass.top, jnp.log(mass.total)) for mass in (found.student, found.teacher))
    rows = jnp.stack([*ours, *theirs, weight, sure.cut, sure.centre, jnp.zeros_like(weight)])
    gradients = None
    if not with_gradients or not divergence.slopes_cancel:
        value, slope_sum, _ = kernels.slopes_full(
            h, head, th, teacher_head, rows, 0, divergence=divergence, with_slopes=False
        )
        rows = rows.at[7].set(summed(slope_sum, vocab_axis))
    if with_gradients:

        def part(entries: Blocks, index, value):
            own, teachers = (entries.slice(x, index, 0) for x in (head, teacher_head))
            more, _, slopes = kernels.slopes_full(
                h, own, th, teachers, rows, _fresh(entries, index), divergence=divergence, with_slopes=True
            )
            return slopes, value + more

        gradients, value = _gradients(part, h, (head, teacher_head), jnp.zeros_like(weight), hidden.shape)
    stats = {
        "divergence": summed(value, vocab_axis),
        "student_entropy": found.student.entropy(),
        "teacher_entropy": found.teacher.entropy(),
        "top1_agreement": found.agreement,
    }
    return _sum(stats, weights, gradients)


def at_ids(
    kernels, hidden, head, ids, teacher_logprobs, teacher_log_tail, weights, *, divergence, vocab_axis, with_gradients
):
    """As `xla.at_ids`, by the kernels of a backend."""
    weight = _tokens(weights, 0).astype(jnp.float32)
    live = weight != 0
    h = jnp.where(live[:, None], _tokens(hidden, 0), 0)
    named = jnp.where(live[:, None], _tokens(ids, -1), -1).astype(jnp.int32)
    lp = jnp.where(named < 0, -jnp.inf, _tokens(teacher_logprobs, 0).astype(jnp.float32))
    lp_tail = jnp.where(live, _tokens(teacher_log_tail, 0).astype(jnp.float32), 0)
    own = own_ids(named, len(head), vocab_axis)
    chosen, rest = kernels.survey_at_ids(h, head, own)
    chosen, rest = largest(jnp.where(own < 0, -jnp.inf, chosen), vocab_axis), rest.over(vocab_axis)
    lp = jnp.concatenate([lp, lp_tail[:, None]], -1)
    gradient, stats = over_buckets(divergence, named, lp, chosen, rest, weight)
    gradients = None
    if with_gradients:
        rest_lse = finite(rest.log())

        def part(entries: Blocks, index, nothing):
            part_ids = local_ids(own, entries, index)
            slopes = kernels.slopes_at_ids(
                h, entries.slice(head, index, 0), part_ids, gradient, rest_lse, _fresh(entries, index)
            )
            return slopes, nothing

        gradients, _ = _gradients(part, h, (head,), None, hidden.shape)
    return _sum(stats, weights, gradients)


def rounds(
    ids: Int[Array, "M J"], block_tokens: int, block_vocab: int, vocab: int
) -> Int[Array, "token_blocks vocab_blocks"]:
    """The most ids that one token of a block of tokens has in a block of the vocabulary.

    A kernel looks for them one round after another, one id of every token at a time: a handful of rounds on average,
    where comparing each logit with all J ids would take as long as multiplying it out.
    """
    ids = jnp.pad(ids, ((0, -len(ids) % block_tokens), (0, 0)), constant_values=-1)
    block = jnp.where(ids < 0, -1, ids // block_vocab)
    own = (block[:, :, None] == jnp.arange(-(-vocab // block_vocab))).astype(jnp.int32).sum(1)
    return own.reshape(-1, block_tokens, own.shape[1]).max(1)


def _gradients(part, hidden: Float[Array, "M D"], heads: tuple[Float[Array, "V _"], ...], carry, shape):
    """Gradients from `part(entries, index, carry) -> (slopes [entries, M], carry)`, one part of the vocabulary each.

    The gradient by a head is by the first; `shape` is that of the hidden states before they were put in one axis.
    """
    head = heads[0]
    entry_bytes = len(hidden) * hidden.dtype.itemsize + sum(x.shape[1] * x.dtype.itemsize for x in heads)
    most = max(1, _PART_BYTES // (entry_bytes * _PART))
    parts = -(-len(head) // (most * _PART))
    entries = Blocks(size=len(head), block=min(len(head), -(-len(head) // (parts * _PART)) * _PART))
    dtype, precision = accumulator(hidden), lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None

    def body(state, step):
        index, _ = step
        by_hidden, by_head, carry = state
        slopes, carry = part(entries, index, carry)
        product = {"preferred_element_type": dtype, "precision": precision}
        by_hidden += jnp.einsum("VM,VD->MD", slopes, entries.slice(head, index, 0), **product)
        # Entries that an earlier part had are 0 here; nothing is rounded twice.
        by_head = entries.add(by_head, jnp.einsum("VM,MD->VD", slopes, hidden, **product), index, 0)
        return (by_hidden, by_head, carry), None

    start = (jnp.zeros(hidden.shape, dtype), jnp.zeros_like(head), carry)
    (by_hidden, by_head, carry), _ = entries.scan(body, start)
    by_hidden = by_hidden[: shape[0] * shape[1]].reshape(shape).astype(hidden.dtype)
    return Gradients(hidden=by_hidden, head=by_head), carry


def _fresh(entries: Blocks, index: Int[Array, ""] | int) -> Int[Array, ""] | int:
    """The first of a part's entries that no earlier part had."""
    return index * entries.block - entries.start(index)


def _tokens(array: Array, filling: int) -> Array:
    """B and T as one axis, filled up to a multiple of `TOKENS`."""
    array = array.reshape(-1, *array.shape[2:])
    padding = [(0, -len(array) % TOKENS)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding, constant_values=filling)


def _sum(stats: dict[str, Array], weights: Array, gradients: Gradients | None):
    stats = {name: value[: weights.size].reshape(weights.shape) for name, value in stats.items()}
    stats = {name: jnp.where(weights == 0, 0, value) for name, value in stats.items()}
    return (weights.astype(jnp.float32) * stats["divergence"]).sum(), stats, gradients
