"""The losses by name, over every kind of target: the one place where a target's type decides anything."""

import dataclasses
import functools
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from distill.training.head_rows import VOCAB_AXIS, whole_rows, with_whole_rows
from kernels_pallas.linear_kl import Divergence, DivergenceName, Implementation, linear_kl_at_ids, linear_kl_full
from qwen3.errors import UserError
from qwen3.field_types import check_fields
from qwen3.sharding import BATCH, partition_spec
from teacher.targets import AtIds, Hidden, Sampled, Targets, TopK


class Options(TypedDict):
    """What every loss passes on to `linear_kl`."""

    block_tokens: int | None
    block_vocab: int | None
    vocab_axis: str | None
    implementation: Implementation | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Which divergence from the teacher's distribution p to the student's q a stage minimises."""

    # reverse_kl over `TopK` targets sees only the teacher's tokens: what the student puts outside them is penalised as
    # one lump (the tail), not token by token, as it is over `Hidden` or `AtIds` targets.
    name: DivergenceName = "forward_kl"
    """forward_kl = KL(p‖q): cover all that the teacher would say. reverse_kl = KL(q‖p): say nothing that it would not.
    jsd = weight·KL(p‖m) + (1-weight)·KL(q‖m) with m = weight·p + (1-weight)·q. skew_kl = KL(p‖m): a forward KL with a
    bounded gradient."""
    weight: float | None = None
    """Strictly between 0 and 1 for jsd and skew_kl, None for the others."""

    def __post_init__(self) -> None:
        check_fields(self, "loss")
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
    implementation: Implementation | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B T"]]]:
    """Σ weights · loss over positions, and per-position statistics without gradient.

    Args:
      hidden, head: the student's final hidden states and output matrix; the gradient goes to both.
      targets: what the teacher says at each position, stored at the predicting position.
      weights: loss mask / global number of trained positions; 0 excludes a position altogether.
      teacher_head: the teacher's output matrix, for `Hidden` targets only.
      block_tokens, block_vocab: memory against speed, see `linear_kl_full`; on a mesh, of each device.
      implementation: which `linear_kl` to use, see there; None picks.
      mesh: on it heads lie as weights do. Devices along the tensor axis share the vocabulary; each gathers its own
      tokens
        of both heads once, in the dtype of computing, and works on its rows, and the gradient of the head is added up
        once, in the head's own dtype. So beside what `linear_kl_full` takes a device holds its tokens of both heads and
        of a float32 gradient: for t devices along the tensor axis and a bfloat16 model, V/t · (6·D + 2·Dt) bytes. The
        work of the reference XLA divides as the arrays lie.

    Returns:
      The loss sum in nats, and the statistics of `linear_kl_full` (`Hidden`) or `linear_kl_at_ids` (others). A
      statistic that the targets cannot give is absent.

    Raises:
      ValueError: `Hidden` targets without a teacher head or a head without them, `Sampled` targets with another loss
        than forward_kl, shapes that do not fit, or an implementation that cannot do this.
      UserError: heads that the mesh does not divide.
    """
    mesh = None if mesh is None or mesh.size == 1 or implementation == "reference" else mesh
    options: Options = {
        "block_tokens": block_tokens,
        "block_vocab": block_vocab,
        "vocab_axis": None if mesh is None else VOCAB_AXIS,
        "implementation": implementation,
    }
    run = functools.partial(_loss, loss=loss, options=options)
    if mesh is None:
        if implementation != "reference":
            # In the dtype of computing, in which the engine generates too: float32 products are slow on accelerators.
            head = head.astype(hidden.dtype)
            if teacher_head is not None and isinstance(targets, Hidden):
                teacher_head = teacher_head.astype(targets.hidden.dtype)
        return run(hidden, head, targets, weights, teacher_head)

    def on_share(
        hidden: Array, head: Array, targets: Targets, weights: Array, teacher_head: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        hidden, head = with_whole_rows(hidden, head, head.dtype)
        if teacher_head is not None and isinstance(targets, Hidden):
            teacher_head = whole_rows(teacher_head, targets.hidden.dtype)
        total, stats = run(hidden, head, targets, weights, teacher_head)
        return jax.lax.psum(total, BATCH[0]), stats

    student_place, teacher_place = (
        None if one is None else partition_spec(("vocab", "embed"), one.shape, mesh) for one in (head, teacher_head)
    )
    # Varying axes are not tracked: kernels inside lose them.
    return jax.shard_map(
        on_share,
        mesh=mesh,
        in_specs=(BATCH, student_place, BATCH, BATCH, teacher_place),
        out_specs=(PartitionSpec(), BATCH),
        check_vma=False,
    )(hidden, head, targets, weights, teacher_head)


def _loss(
    hidden: Array,
    head: Array,
    targets: Targets,
    weights: Array,
    teacher_head: Array | None,
    loss: Loss,
    options: Options,
) -> tuple[Array, dict[str, Array]]:
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
            **options,
        )
    if not isinstance(targets, TopK | AtIds | Sampled):
        raise ValueError(f"targets is a {type(targets).__name__}; pass TopK, AtIds, Hidden or Sampled")
    if teacher_head is not None:
        raise ValueError(f"teacher_head is given with {type(targets).__name__} targets, which do not use it; remove it")
    if isinstance(targets, Sampled):
        return _sampled_loss(hidden, head, targets, weights, loss, options)
    return linear_kl_at_ids(
        hidden,
        head,
        targets.ids,
        targets.logprobs,
        targets.log_tail,
        weights,
        divergence=loss.divergence,
        **options,
    )


def _sampled_loss(
    hidden: Array, head: Array, targets: Sampled, weights: Array, loss: Loss, options: Options
) -> tuple[Array, dict[str, Array]]:
    """The cross-entropy to the sampled tokens less the teacher's own entropy: on average KL(teacher‖student).

    A single estimate can be negative. Statistics that would be of the samples and not of the teacher are absent.
    """
    if loss.name != "forward_kl":
        raise ValueError(f"loss {loss.name} over Sampled targets is not right on average; only forward_kl is")
    total, stats = linear_kl_at_ids(
        hidden,
        head,
        targets.ids,
        targets.log_shares,
        jnp.full_like(targets.entropy, -jnp.inf),
        weights,
        divergence=loss.divergence,
        **options,
    )
    # The op's teacher is the sampled distribution; what its entropy is off by does not depend on the student.
    excess = jnp.where(weights == 0, 0, stats["teacher_entropy"] - targets.entropy)
    return total + jnp.sum(weights * excess), {
        "divergence": stats["divergence"] + excess,
        "student_entropy": stats["student_entropy"],
        "teacher_entropy": jnp.where(weights == 0, 0, targets.entropy),
    }
