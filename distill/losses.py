"""The losses by name, over every kind of target: the one place where a target's type decides anything."""

import dataclasses

from jaxtyping import Array, Float

from kernels_pallas.linear_kl import Divergence, DivergenceName, linear_kl_at_ids, linear_kl_full
from qwen3.errors import UserError
from teacher.targets import AtIds, Hidden, Targets, TopK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Which divergence from the teacher's distribution p to the student's q a stage minimises."""

    # reverse_kl over `TopK` targets sees only the teacher's words: what the student puts outside them is penalised as
    # one lump (the tail), not word by word, as it is over `Hidden` or `AtIds` targets.
    name: DivergenceName = "forward_kl"
    """forward_kl = KL(p‖q): cover all that the teacher would say. reverse_kl = KL(q‖p): say nothing that it would not.
    jsd = weight·KL(p‖m) + (1-weight)·KL(q‖m) with m = weight·p + (1-weight)·q. skew_kl = KL(p‖m): a forward KL with a
    bounded gradient."""
    weight: float | None = None
    """Strictly between 0 and 1 for jsd and skew_kl, None for the others."""

    def __post_init__(self) -> None:
        try:
            Divergence(self.name, self.weight)
        except ValueError as error:
            raise UserError(f"loss: {error}") from error

    @property
    def divergence(self) -> Divergence:
        return Divergence(self.name, self.weight)


def distillation_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Targets,
    weights: Float[Array, "B T"],
    loss: Loss,
    *,
    teacher_head: Float[Array, "V Dt"] | None = None,
    block_tokens: int | None = None,
    block_vocab: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B T"]]]:
    """Σ weights · loss over positions, and per-position statistics without gradient.

    Args:
      hidden, head: the student's final hidden states and output matrix; the gradient goes to both.
      targets: what the teacher says at each position, stored at the predicting position.
      weights: loss mask / global number of trained positions; 0 excludes a position altogether.
      teacher_head: the teacher's output matrix, for `Hidden` targets only.
      block_tokens, block_vocab: memory against speed, see `linear_kl_full`.

    Returns:
      The loss sum in nats, and the statistics of `linear_kl_full` (`Hidden`) or `linear_kl_at_ids` (others). A
      statistic that the targets cannot give is absent.

    Raises:
      ValueError: `Hidden` targets without a teacher head or a head without them, or shapes that do not fit.
    """
    if isinstance(targets, Hidden):
        if teacher_head is None:
            raise ValueError("teacher_head is None; Hidden targets need the teacher's output matrix [V, D]")
        return linear_kl_full(
            hidden,
            head,
            targets.hidden,
            teacher_head,
            weights,
            divergence=loss.divergence,
            block_tokens=block_tokens,
            block_vocab=block_vocab,
        )
    if not isinstance(targets, TopK | AtIds):
        raise ValueError(f"targets is a {type(targets).__name__}; pass TopK, AtIds or Hidden")
    if teacher_head is not None:
        raise ValueError(f"teacher_head is given with {type(targets).__name__} targets, which do not use it; remove it")
    return linear_kl_at_ids(
        hidden,
        head,
        targets.ids,
        targets.logprobs,
        targets.log_tail,
        weights,
        divergence=loss.divergence,
        block_tokens=block_tokens,
        block_vocab=block_vocab,
    )
