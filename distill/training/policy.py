"""The policy gradient: what a response is worth, times how likely the student makes it now, for every variant in use.

The loss of a token is -min(r·A, clip(r)·A): A is its response's advantage, r how much likelier the current weights make
it than those that generated it. By r the variants differ: each token its own (GRPO, arXiv 2402.03300; with a higher
upper bound DAPO's, 2503.14476), or one for all tokens of a response, the geometric mean of theirs (GSPO, 2507.18071).

What a token weighs in the sum is in the batch and was known before the step began, so that the update is the same
however the step is cut into microbatches or spread over devices.
"""

import dataclasses
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from distill.training.head_rows import VOCAB_AXIS, with_whole_rows
from kernels_pallas.linear_kl import LogprobsImplementation, linear_logprobs
from qwen3.errors import UserError
from qwen3.field_types import Bounds, NotNegative, Positive, check_fields
from qwen3.sharding import BATCH, partition_spec

_CLIPS = {"token": (0.2, 0.28), "sequence": (3e-4, 4e-4)}
"""DAPO's and GSPO's: a ratio of means over a whole response moves by far less than a token's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """How rewards become a loss, once each response has its advantage."""

    ratio: Literal["token", "sequence"] = "token"
    """Whose probability under the current weights is set against that under the generating ones, and clipped. token:
    each token's own (GRPO, DAPO). sequence: the response's, to the power of 1 / its tokens (GSPO), which mixtures of
    experts need."""
    clip_low: Annotated[float, Bounds(2**-24, 1 - 2**-24, "lie between 0 and 1")] | None = None
    """How far below 1 the ratio still counts; None: 0.2 with token, 0.0003 with sequence."""
    clip_high: Positive | None = None
    """How far above 1; None: 0.28 with token, 0.0004 with sequence. A higher bound keeps unlikely tokens alive."""
    total: Literal["tokens", "sequence", "constant"] = "tokens"
    """What the sum over a step's tokens is divided by. tokens: their number, so that all weigh the same (DAPO).
    sequence: the tokens of their own response and the number of responses (GRPO). constant: the responses' number and
    the most tokens that they may have (Dr. GRPO, arXiv 2503.20783), so that long wrong answers are not spared."""
    correction: Literal["none", "truncate", "leave_out"] = "none"
    """What is done where engine and trainer disagree on the probability of what the same weights generated. They
    are one code base here, and `sampler_mismatch` shows by how little they do. none: nothing; where several updates are
    made of a batch, a token's ratio is to the engine's probability (a sequence's, whose clip is narrower than rounding,
    to the trainer's). truncate: each token weighs min(trainer's / engine's, correction_limit). leave_out: responses
    whose quotient is not within 1 / correction_limit..correction_limit are not learned from. Both take another forward
    pass over what older weights generated."""
    correction_limit: Annotated[float, Bounds(1, 2**20, "lie in 1..2^20")] = 2.0
    """See `correction`."""
    reference_kl: NotNegative = 0.0
    """Weight of the divergence from the student at the stage's start, estimated from each token by exp(d) - d - 1 with
    d = log start - log student (arXiv 2402.03300, equation 4). Its value is KL(student‖start) on average, and its
    gradient, strictly on-policy, that of KL(start‖student). 0 costs nothing; else each batch of rollouts takes another
    forward pass."""

    def __post_init__(self) -> None:
        check_fields(self, "policy")
        low, high = self.clips
        if high < low:
            raise UserError(
                f"policy.clip_high is {high:g}, below clip_low {low:g}: the ratio would be held closer above 1 than "
                "below, and the entropy driven to 0; give clip_high at least clip_low"
            )

    @property
    def clips(self) -> tuple[float, float]:
        """How far the ratio may be below and above 1."""
        low, high = _CLIPS[self.ratio]
        return low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """The objective of an update that learns from rewards."""

    loss: PolicyLoss
    teacher_kl: float = 0.0
    """Weight of the divergence from the teacher that is added; 0 needs no targets."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyData:
    """What a policy gradient needs to know of each position besides the tokens; 0 where nothing is trained."""

    advantages: Float[Array, "B T"]
    """Of the response that the position belongs to."""
    weights: Float[Array, "B T"]
    """What the position's loss is multiplied by in the sum over the whole step; 0 leaves it out."""
    sampler_logprobs: Float[Array, "B T"]
    """Of the next token, as the engine recorded it."""
    old_logprobs: Float[Array, "B T"] | None = None
    """The same under the weights that generated, as the ratio takes it; None where those are the current ones."""
    reference_logprobs: Float[Array, "B T"] | None = None
    """The same under the student at the stage's start; None where nothing holds the student to it."""
    entropy_weights: Float[Array, "B T"] | None = None
    """What each position's entropy is multiplied by in what is taken off the loss; None where it is left alone."""


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "B T"],
    *,
    implementation: LogprobsImplementation | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`linear_logprobs` of a model whose weights lie on a mesh, as `distillation_loss` has its divergences there.

    `ids` are those that follow, -1 where a position does not count.
    """
    if implementation == "reference":
        return linear_logprobs(hidden, head, ids, implementation=implementation)
    if mesh is None or mesh.size == 1:
        return linear_logprobs(hidden, head.astype(hidden.dtype), ids)

    def on_share(hidden: Array, head: Array, ids: Array) -> tuple[Array, Array]:
        hidden, head = with_whole_rows(hidden, head, head.dtype)
        return linear_logprobs(hidden, head, ids, vocab_axis=VOCAB_AXIS)

    place: PartitionSpec = partition_spec(("vocab", "embed"), head.shape, mesh)
    # Varying axes are not tracked, as in `distillation_loss`.
    return jax.shard_map(
        on_share, mesh=mesh, in_specs=(BATCH, place, BATCH), out_specs=(BATCH, BATCH), check_vma=False
    )(hidden, head, ids)


def policy_loss(
    logprobs: Float[Array, "B T"],
    entropy: Float[Array, "B T"],
    data: PolicyData,
    mask: Bool[Array, "B T"],
    sequences: Int[Array, "B T"],
    loss: PolicyLoss,
    *,
    most_sequences: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B T"]]]:
    """Σ weights · loss over positions, and per-position statistics without gradient.

    Args:
      logprobs, entropy: of the student as it is now, at each position; the gradient goes through both.
      mask: which positions the policy itself has chosen a token at.
      sequences: a number for each response of the batch, below `most_sequences`, the same at all its positions.

    Returns:
      The sum, and at each position `policy_ratio`, `clipped_low`, `clipped_high` (1 where the clip holds the gradient
      back), `sampler_mismatch` (|trainer's - engine's| log-probability, in nats, of what the same weights generated;
      absent where the trainer's was not computed), `corrected` (1 where the correction changed a weight) and
      `reference_kl` where they apply.
    """

    def over_sequence(values: Array) -> Array:
        """The sum over each response, at all its positions."""
        sums = jax.ops.segment_sum(jnp.where(mask, values, 0).reshape(-1), sequences.reshape(-1), most_sequences)
        return sums[sequences]

    fixed = jax.lax.stop_gradient
    old = fixed(logprobs) if data.old_logprobs is None else data.old_logprobs
    log_ratio = jnp.where(mask, logprobs - old, 0)
    if loss.ratio == "sequence":
        log_ratio = over_sequence(log_ratio) / jnp.maximum(over_sequence(mask.astype(log_ratio.dtype)), 1)
    ratio = jnp.exp(log_ratio)
    low, high = loss.clips
    clipped_low = (ratio < 1 - low) & (data.advantages < 0)
    clipped_high = (ratio > 1 + high) & (data.advantages > 0)
    kept = jnp.where(clipped_low, 1 - low, jnp.where(clipped_high, 1 + high, ratio))
    stats: dict[str, Array] = {
        "policy_ratio": ratio,
        "clipped_low": clipped_low.astype(ratio.dtype),
        "clipped_high": clipped_high.astype(ratio.dtype),
    }
    weights, apart = data.weights, jnp.where(mask, fixed(old) - data.sampler_logprobs, 0)
    if data.old_logprobs is None or loss.correction != "none":
        stats["sampler_mismatch"] = jnp.abs(apart)
    if loss.correction == "truncate":
        weights = weights * jnp.exp(jnp.minimum(apart, math.log(loss.correction_limit)))
        stats["corrected"] = (apart > math.log(loss.correction_limit)).astype(ratio.dtype)
    elif loss.correction == "leave_out":
        left_out = jnp.abs(over_sequence(apart)) > math.log(loss.correction_limit)
        weights = jnp.where(left_out, 0, weights)
        stats["corrected"] = left_out.astype(ratio.dtype)
    total = -jnp.sum(weights * kept * data.advantages)
    if data.reference_logprobs is not None:
        behind = jnp.where(mask, data.reference_logprobs - logprobs, 0)
        apart_from_start = jnp.exp(behind) - behind - 1
        stats["reference_kl"] = apart_from_start
        total = total + loss.reference_kl * jnp.sum(data.weights * apart_from_start)
    if data.entropy_weights is not None:
        total = total - jnp.sum(data.entropy_weights * entropy)
    return total, fixed(stats)
