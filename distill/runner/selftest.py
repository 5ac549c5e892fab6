"""What is checked before a run spends anything: the agreements between teacher, student, tokenizer and template on
which every target rests. Peers' users lose days to each of these."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from distill.training.losses import Loss, distillation_loss
from distill.training.policy import token_logprobs
from kernels_pallas.linear_kl import DivergenceName, LogprobsImplementation
from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.vocabulary import check_same_vocabulary, check_vocabulary
from qwen3.checkpoint.hf_names import leaves_of
from qwen3.checkpoint.quantisation import saved_bytes
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.rollout import Mode
from qwen3.sharding import fetch, row_shares
from teacher.scoring import Scorer
from teacher.targets import Hidden, Targets, following_tokens, one_hot, top_k_targets

_PROBE = "What is 17 + 25?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """One thing that was found to hold, or was made to hold."""

    check: str
    finding: str


def check_tokenizers(
    student: ChatTokenizer,
    student_config: ModelConfig,
    teacher: ChatTokenizer,
    teacher_config: ModelConfig,
) -> list[Agreement]:
    """Vocabulary, template and end tokens. Raises UserError where they cannot be reconciled.

    A student with another template or other end tokens than the teacher's is asked, stopped and exported the
    teacher's way: what it learns from is written that way.
    """
    check_vocabulary(student, student_config.vocab_size)
    check_vocabulary(teacher, teacher_config.vocab_size)
    check_same_vocabulary(teacher, student)
    found = [Agreement(check="vocabulary", finding=f"{teacher.vocab_size:,} entries, the same for both")]
    if student_config.vocab_size != teacher_config.vocab_size:
        raise UserError(
            f"the student's vocab_size is {student_config.vocab_size}, the teacher's {teacher_config.vocab_size}: a "
            "divergence needs one vocabulary; pad the smaller embedding to the larger size"
        )
    messages = [{"role": "user", "content": _PROBE}]
    same = teacher.modes == student.modes and all(
        teacher.prompt_ids(messages, mode) == student.prompt_ids(messages, mode) for mode in teacher.modes
    )
    finding = "the same for both" if same else "the student's differs; both are asked in the teacher's"
    found.append(Agreement(check="chat template", finding=finding))
    finding = f"{list(teacher.eos_ids)}, the same for both"
    if set(student.eos_ids) != set(teacher.eos_ids):
        finding = f"the student's are {list(student.eos_ids)}; it is stopped at the teacher's {list(teacher.eos_ids)}"
    if teacher.turn_end_id not in teacher.eos_ids:
        raise UserError(
            f"the teacher's template ends a turn with token {teacher.turn_end_id}, which is none of its end tokens "
            f"{list(teacher.eos_ids)}: responses would never stop; add it to eos_token_id in generation_config.json"
        )
    found.append(Agreement(check="end tokens", finding=finding))
    return found


def check_scores(model: Qwen3, folder: str, tokenizer: ChatTokenizer, mode: Mode, mesh: Mesh) -> None:
    """Refuses a teacher whose log-probabilities on a short prompt are no numbers, as all its targets would be.

    Raises UserError with the tensor that holds the largest weight, which is what computes infinities.
    """
    probe = _probe(tokenizer, mode, mesh)
    said = fetch(Scorer(model, mesh).top_k(probe.tokens, probe.positions, probe.segment_ids, 1))
    if not np.isfinite(said.logprobs[probe.segment_ids > 0]).all():
        what = f"its weights in {folder} {_no_numbers(model)}"
        raise UserError(f"self-test: the teacher's log-probabilities are NaN: {what}")


def check_numerics(
    model: Qwen3, tokenizer: ChatTokenizer, mode: Mode, mesh: Mesh, *, rewards: bool = False
) -> list[Agreement]:
    """A model on its mesh against itself, by the kernels that it trains with: KL 0 over every kind of target, and
    targets at the predicting position; where `rewards` are learned from, log-probabilities at it, too.

    Raises UserError where either does not hold, which would be an error of this program on this platform.
    """
    probe = _probe(tokenizer, mode, mesh)
    measured = _measured(model, probe.tokens, probe.positions, probe.segment_ids, mesh=mesh, rewards=rewards)
    full, top, shift, *apart = (float(value) for value in measured)
    if math.isnan(full):
        raise UserError(f"self-test: the student's log-probabilities are NaN: its weights {_no_numbers(model)}")
    # float32 sums over a vocabulary of 151,936 leave about 1e-5 nats; bfloat16 hidden states are the same on both
    # sides and leave no more. A target one position off is wrong by whole nats.
    for what, value in (("full vocabulary", full), ("top-8 and tail", top)):
        if not abs(value) < 1e-3:
            raise UserError(f"self-test: KL of the student to itself over {what} is {value:.3g} nats, not 0")
    if not abs(shift) < 1e-2:
        raise UserError(f"self-test: targets are not at the predicting position (off by {shift:.3g} nats)")
    if apart and not apart[0] < 1e-2:
        raise UserError(f"self-test: a policy gradient's log-probabilities are off by up to {apart[0]:.3g} nats")
    learned = [
        Agreement(check="log-probabilities of rewarded tokens", finding=f"within {one:.1e} nats") for one in apart
    ]
    return [
        Agreement(check="KL of the student to itself", finding=f"{full:.1e} nats (full), {top:.1e} (top-8 and tail)"),
        Agreement(check="target shift", finding="targets are stored at the predicting position"),
        *learned,
    ]


@functools.partial(jax.jit, static_argnames=("mesh", "rewards"))
def _measured(
    model: Qwen3,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    mesh: Mesh,
    rewards: bool,
) -> tuple[Float[Array, ""], ...]:
    """KL of the model to itself over the whole vocabulary and over top-8 and tail, and how far targets are from the
    predicting position; with `rewards` how far their log-probabilities are, too. All in nats."""
    real = segment_ids > 0
    hidden = model.hidden(tokens, positions, segment_ids, mesh)
    weights = (real / jnp.sum(real)).astype(jnp.float32)

    def divergence(
        targets: Targets, weights: Array, name: DivergenceName, teacher_head: Array | None = None
    ) -> Float[Array, ""]:
        return distillation_loss(
            hidden, model.head, targets, weights, Loss(name=name), teacher_head=teacher_head,
            implementation=model.kernels.linear_kl, mesh=mesh,
        )[0]  # fmt: skip

    full = divergence(Hidden(hidden=hidden), weights, "reverse_kl", teacher_head=model.head)
    head = model.head.astype(hidden.dtype)
    targets = top_k_targets(hidden, head, min(8, model.config.vocab_size))
    top = divergence(targets, weights, "forward_kl")
    # Cross-entropy by the loss against the log-probability of the next token, written out without it. Rows are alike.
    inner = weights.at[:, jnp.sum(real[0]) - 1].set(0)
    entropy = divergence(one_hot(tokens), inner, "forward_kl")
    logits = jnp.einsum("BTD,VD->BTV", hidden, head, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    measured = full, top, entropy + jnp.sum(inner[:, :-1] * chosen)
    if not rewards:
        return measured
    ids = jnp.where(inner > 0, following_tokens(tokens), -1)
    slow: LogprobsImplementation | None = "reference" if model.kernels.linear_kl == "reference" else None
    said = token_logprobs(hidden, model.head, ids, implementation=slow, mesh=mesh)[0]
    return *measured, jnp.max(jnp.where(inner[:, :-1] > 0, jnp.abs(said[:, :-1] - chosen), 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Probe:
    """A short prompt, in as many rows as devices share."""

    tokens: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]


def _probe(tokenizer: ChatTokenizer, mode: Mode, mesh: Mesh) -> _Probe:
    ids = np.asarray(tokenizer.prompt_ids([{"role": "user", "content": _PROBE}], mode), np.int32)
    pieces = math.lcm(16, mesh.shape["context"])
    length = math.ceil(len(ids) / pieces) * pieces
    row = np.pad(ids, (0, length - len(ids))), np.arange(length, dtype=np.int32), np.arange(length) < len(ids)
    tokens, positions, real = (np.tile(one, (row_shares(mesh), 1)) for one in row)
    return _Probe(tokens=tokens, positions=positions, segment_ids=real.astype(np.int32))


def _no_numbers(model: Qwen3) -> str:
    """What is wrong with weights that compute none, with the tensor, as the checkpoint calls it, that goes furthest."""
    where = ""
    # Of quantised weights the tensors are not told apart.
    if not saved_bytes(model, jnp.float32):
        furthest: tuple[float, str] = -1.0, ""
        for leaf in leaves_of(model):
            weights = jnp.abs(leaf.param.get_value().astype(jnp.float32))
            lead = len(leaf.tensors[0].lead)
            by_tensor = fetch(jnp.max(weights, axis=tuple(range(lead, weights.ndim)))).reshape(-1)
            by_tensor = np.where(np.isnan(by_tensor), np.inf, by_tensor)
            furthest = max(furthest, (float(np.max(by_tensor)), leaf.tensors[int(np.argmax(by_tensor))].name))
        where = f" ({furthest[1]} goes up to {furthest[0]:.3g})"
    return f"compute no numbers in {jnp.dtype(model.compute_dtype).name}{where}; take another checkpoint or dtype"
