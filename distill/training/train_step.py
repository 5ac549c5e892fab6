"""One update, the same for every stage: gradients of microbatches are summed, then applied once.

Every microbatch divides by the same global denominator, the number of trained positions in the whole step, which is
known before the first one runs. So the update is the same however a step is cut into microbatches or spread over
devices. What a mixture of experts balances, its load, is that of the whole step, too: where a step has several
microbatches, a forward pass over all of them finds it first. It costs a third of what the training FLOPs are without
it; what balances no experts, or has one microbatch a step, does without.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from distill.training.host_memory import Growth
from distill.training.losses import Loss, distillation_loss
from distill.training.policy import Policy, PolicyData, policy_loss, token_logprobs
from distill.training.train_state import TrainState
from kernels_pallas.linear_kl import LogprobsImplementation
from qwen3.decoder.adapter import joined
from qwen3.decoder.model import Qwen3
from qwen3.decoder.moe import RouterStats, balances_load, load_balancing_loss
from qwen3.rollout import NON_THINKING, THINKING
from qwen3.sharding import TOKENS, at_places, batch_sharding, place, placed_shapes, row_shapes, shardings, to_pieces
from teacher.targets import following_tokens

MODE_CODES = {THINKING: 1, NON_THINKING: 0}
TeacherHeads = Float[Array, "V D"] | Mapping[str, Float[Array, "V D"]] | None
"""A teacher's output matrix, of several teachers by name, or none."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows and what the teacher says about them, at the predicting positions: at all of them, K = T, or at the
    `places` that were chosen."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    loss_mask: Bool[Array, "B K"]
    mode: UInt8[Array, "B K"]
    targets: Any
    """None where only rewards are learned from."""
    policy: PolicyData | None = None
    """What the rewards say; None where none are learned from, and where places were chosen."""
    places: Int[Array, "B K"] | None = None
    """The positions of each row that heads are multiplied out at, T in places that are left; None: all."""
    teacher: UInt8[Array, "B K"] | None = None
    """Of several teachers, the number of the one whose targets these are; of hidden states the same in all rows."""

    @classmethod
    def of(cls, arrays: Mapping[str, Any], targets: Any, policy: PolicyData | None = None) -> "Batch":
        """From the arrays that packing makes; other entries are left where they are."""
        names = ("tokens", "positions", "segment_ids", "loss_mask", "mode")
        known = {name: arrays[name] for name in names} | {name: arrays.get(name) for name in ("places", "teacher")}
        return cls(**known, targets=targets, policy=policy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one update measured."""

    metrics: Mapping[str, float]
    """Means over the trained positions; what could not be measured is absent."""
    trained_positions: int
    tokens: int
    """Tokens that went through the student, padding not counted."""
    padding_fraction: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sums:
    """Running sums over the microbatches of one step."""

    gradients: Any
    metrics: Mapping[str, Float[Array, ""]]


class TrainStep:
    """Compiled gradient and update programs for one loss, one optimiser and one batch shape."""

    def __init__(
        self,
        *,
        transformation: optax.GradientTransformation,
        loss: Loss,
        mesh: Mesh,
        rematerialise: bool = False,
        teacher_head: TeacherHeads = None,
        policy: Policy | None = None,
        teachers: tuple[str, ...] = (),
    ):
        """`teacher_head` is needed where targets are the teacher's hidden states. With a `policy` rewards are learned
        from, and `loss` weighs what that says; without, `loss` is all there is. Several `teachers` are measured apart,
        and each has a head of its own."""
        self._mesh = mesh
        self._teacher_head, self._teachers = teacher_head, teachers
        self._accumulate = _gradient_program(loss, mesh, rematerialise, policy, teachers)
        self._add_load = _load_program(mesh)
        self._apply = _update_program(transformation, mesh)
        self._growth = Growth()

    def __call__(self, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, StepResult]:
        """Update `state` on `batches`, all of one shape; all its buffers but those of frozen weights are given away.

        Whether `loss` and `gradient_norm` are finite is for the caller to judge. Raises ValueError where nothing
        is trained.
        """
        trained = int(sum(np.sum(batch.loss_mask) for batch in batches))
        if not trained:
            raise ValueError("no position of the step is trained: loss_mask is False everywhere")
        real = int(sum(np.sum(batch.segment_ids != 0) for batch in batches))
        places = sum(batch.tokens.size for batch in batches)
        denominator = np.float32(trained)
        sums, load = None, None
        trained_state, frozen = state.split()
        if len(batches) > 1 and balances_load(state.model.config):
            for batch in batches:
                load = self._add_load(trained_state.model, frozen, load, place(_rows(batch), self._sharding))
        for batch in batches:
            placed = place(batch, self._sharding)
            head = self._head_of(batch)
            sums = self._accumulate(trained_state.model, frozen, sums, placed, denominator, head, load)
        trained_state, measured = self._apply(trained_state, sums)
        metrics = _means({name: float(value) for name, value in jax.device_get(measured).items()})
        self._growth.give_back()
        return trained_state.joined(frozen), StepResult(
            metrics=metrics, trained_positions=trained, tokens=real, padding_fraction=1 - real / places
        )

    def programs(self, state: TrainState, batch: Batch) -> "TrainPrograms":
        """What a step runs, for an abstract state and an abstract microbatch on this step's mesh."""
        trained, frozen = state.split()
        placed = row_shapes(batch, self._mesh, TOKENS)
        denominator = jax.ShapeDtypeStruct((), np.float32)
        first = trained.model, frozen, None, placed, denominator, self._teacher_head, None
        load, add_load = None, None
        with jax.set_mesh(self._mesh):
            sums = jax.eval_shape(self._accumulate, *first)
            if balances_load(state.model.config):
                load = jax.eval_shape(self._add_load, trained.model, frozen, None, _rows(placed))
                load = row_shapes(load, self._mesh, PartitionSpec())
                add_load = self._add_load, (trained.model, frozen, load, _rows(placed))
        sums = placed_shapes(sums, self._mesh)
        more = trained.model, frozen, sums, placed, denominator, self._teacher_head, load
        return TrainPrograms(
            add_load=add_load,
            first_gradients=(self._accumulate, first),
            more_gradients=(self._accumulate, more),
            update=(self._apply, (trained, sums)),
        )

    def _head_of(self, batch: Batch) -> Float[Array, "V D"] | None:
        if not isinstance(self._teacher_head, Mapping):
            return self._teacher_head
        assert batch.teacher is not None
        # Padding counts as the first teacher's.
        return self._teacher_head[self._teachers[int(np.max(batch.teacher))]]

    @property
    def _sharding(self) -> NamedSharding:
        return batch_sharding(self._mesh)


class TrainPrograms(NamedTuple):
    """The programs of a step, each with its arguments."""

    add_load: tuple[Any, tuple[Any, ...]] | None
    """Counts what goes to each expert, in every microbatch before the gradients of any, if there are several. None
    where no load is balanced."""
    first_gradients: tuple[Any, tuple[Any, ...]]
    """Of a step's only microbatch, or its first one where no load is balanced."""
    more_gradients: tuple[Any, tuple[Any, ...]]
    """Of every other one, added to those before; with the load of the whole step."""
    update: tuple[Any, tuple[Any, ...]]


@functools.cache
def _gradient_program(
    loss: Loss, mesh: Mesh, rematerialise: bool, policy: Policy | None, teachers: tuple[str, ...]
) -> Callable[..., _Sums]:
    """Adds one microbatch's gradients and metrics to the sums; shared by all stages with this loss."""
    # A divergence of weight 1 is not multiplied, so that it is the same program with rewards as without.
    divergence_weight = 1.0 if policy is None else policy.teacher_kl

    def divergence(model: Qwen3, hidden: Array, batch: Batch, denominator: Array, head: Array | None) -> Any:
        weights = batch.loss_mask.astype(jnp.float32) / denominator
        return distillation_loss(
            hidden, model.head, batch.targets, weights, loss, teacher_head=head, implementation=model.kernels.linear_kl,
            mesh=mesh,
        )  # fmt: skip

    def gradient_of_rewards(model: Qwen3, hidden: Array, batch: Batch, numbers: tuple[Array, Array]) -> Any:
        assert policy is not None
        assert batch.policy is not None
        following, sequences = numbers
        ids = jnp.where(batch.loss_mask, following, -1)
        slow: LogprobsImplementation | None = "reference" if model.kernels.linear_kl == "reference" else None
        logprobs, entropy = token_logprobs(hidden, model.head, ids, implementation=slow, mesh=mesh)
        rows, length = batch.tokens.shape
        total, stats = policy_loss(
            logprobs, entropy, batch.policy, batch.loss_mask, sequences, policy.loss,
            most_sequences=rows * (length + 1),
        )  # fmt: skip
        return total, {**stats, "student_entropy": jax.lax.stop_gradient(entropy)}

    def objective(
        trained: Qwen3,
        frozen: Qwen3,
        batch: Batch,
        denominator: Array,
        head: Array | None,
        load: RouterStats | None,
    ) -> tuple[Array, dict[str, Array]]:
        model = joined(trained, frozen)
        out = model(*_rows(batch), rematerialise=rematerialise, mesh=mesh)
        numbers = None if policy is None else (following_tokens(batch.tokens), _sequences(batch))
        hidden = out.hidden if batch.places is None else at_places(out.hidden, batch.places, mesh)
        hidden, batch, numbers = to_pieces((hidden, batch, numbers), mesh)
        total, stats, parts = jnp.zeros(()), {}, {}
        if divergence_weight:
            total, stats = divergence(model, hidden, batch, denominator, head)
            if divergence_weight != 1:
                total = divergence_weight * total
        if numbers is not None:
            rewarded, found = gradient_of_rewards(model, hidden, batch, numbers)
            total, stats, parts = total + rewarded, {**found, **stats}, {"policy_loss": rewarded}
        metrics = _by_part(stats, batch, teachers) | parts | {"loss": total}
        if out.router is not None and balances_load(model.config):
            balance = load_balancing_loss(out.router, out.router if load is None else load)
            metrics["load_balance"] = balance
            total = total + model.config.router_aux_loss_coef * balance
        return total, metrics

    def accumulate(
        trained: Qwen3,
        frozen: Qwen3,
        sums: _Sums | None,
        batch: Batch,
        denominator: Array,
        head: Array | None,
        load: RouterStats | None,
    ) -> _Sums:
        """`load` is that of all microbatches, None where this is the only one."""
        gradient = jax.value_and_grad(objective, has_aux=True)
        (_, metrics), gradients = gradient(trained, frozen, batch, denominator, head, load)
        gradients = jax.lax.with_sharding_constraint(gradients, shardings(gradients, mesh))
        new = _Sums(gradients=gradients, metrics=metrics)
        return new if sums is None else jax.tree.map(jnp.add, sums, new)

    return jax.jit(accumulate, donate_argnums=2)


@functools.cache
def _load_program(mesh: Mesh) -> Callable[..., RouterStats]:
    """Adds what one microbatch's router does to the sums."""

    def add_load(
        trained: Qwen3, frozen: Qwen3, load: RouterStats | None, rows: tuple[Array, Array, Array]
    ) -> RouterStats:
        found = joined(trained, frozen)(*rows, mesh=mesh).router
        new = found if load is None else jax.tree.map(jnp.add, load, found)
        return jax.lax.with_sharding_constraint(new, NamedSharding(mesh, PartitionSpec()))

    return jax.jit(add_load, donate_argnums=2)


@functools.lru_cache(maxsize=4)
def _update_program(transformation: optax.GradientTransformation, mesh: Mesh) -> Callable[..., Any]:
    """Applies the summed gradients once."""

    def apply(state: TrainState, sums: _Sums) -> tuple[TrainState, dict[str, Array]]:
        updates, optimizer = transformation.update(sums.gradients, state.optimizer, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics = dict(sums.metrics) | {"gradient_norm": optax.global_norm(sums.gradients)}
        new = TrainState(step=state.step + 1, model=model, optimizer=optimizer)
        return jax.lax.with_sharding_constraint(new, shardings(new, mesh)), metrics

    return jax.jit(apply, donate_argnums=0)


def _rows(batch: Batch) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]]:
    """What the model takes of a batch."""
    return batch.tokens, batch.positions, batch.segment_ids


def _sequences(batch: Batch) -> Int[Array, "B T"]:
    """A number for each document of a batch, below B·(T + 1)."""
    rows, length = batch.tokens.shape
    return jnp.arange(rows)[:, None] * (length + 1) + batch.segment_ids


def _by_part(stats: Mapping[str, Float[Array, "B T"]], batch: Batch, teachers: tuple[str, ...]) -> dict[str, Array]:
    """Sums of every statistic over trained positions, whole, by mode and by teacher, with the counts to divide by."""
    sums: dict[str, Array] = {}
    masks = {"all": batch.loss_mask} | {
        mode: batch.loss_mask & (batch.mode == code) for mode, code in MODE_CODES.items()
    }
    if batch.teacher is not None:
        masks |= {name: batch.loss_mask & (batch.teacher == number) for number, name in enumerate(teachers)}
    for part, mask in masks.items():
        sums[f"count/{part}"] = jnp.sum(mask)
        for name, values in stats.items():
            sums[f"{name}/{part}"] = jnp.sum(jnp.where(mask, values, 0))
    return sums


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Divide each sum by the count of its part; a mode or teacher that did not occur has no metrics."""
    counts = {name.removeprefix("count/"): value for name, value in sums.items() if name.startswith("count/")}
    means = {name: value for name, value in sums.items() if "/" not in name}
    for name, value in sums.items():
        statistic, _, part = name.partition("/")
        if part and statistic != "count" and counts[part]:
            means[statistic if part == "all" else name] = value / counts[part]
    return means
