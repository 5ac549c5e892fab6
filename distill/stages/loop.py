"""The training loop of every stage: batches in, updates, metrics, checkpoints, and going on where it stopped."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from distill.monitor.metrics import require_finite
from distill.monitor.utilisation import memory_gib, model_flops_utilisation
from distill.stages.context import RunContext
from distill.stages.stopping import Interrupted
from distill.training.checkpoint import Checkpointer
from distill.training.losses import Loss
from distill.training.optimizer import Optimizer
from distill.training.policy import Policy
from distill.training.train_state import TrainState, abstract_state
from distill.training.train_step import Batch, TeacherHeads, TrainStep
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.field_types import Count, check_fields, check_product
from qwen3.hosts.processes import require_same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What every stage decides about its updates."""

    steps: Count | None = None
    """Optimiser steps; None where the stage takes as many as another stage's FLOPs pay for."""
    rows: Count = 8
    """Rows of a microbatch, spread over the data-parallel devices."""
    row_length: Count = 4096
    """Tokens of a row; documents are packed into rows whole."""
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    rematerialise: bool = True
    """Keep only the residual stream between layers and recompute the rest in the backward pass."""
    checkpoint_every_steps: Count = 100
    """Steps between checkpoints, which are what a killed run goes back to."""

    def __post_init__(self) -> None:
        check_fields(self, "training")
        self.check_tokens({})

    def check_tokens(self, more: Mapping[str, int]) -> None:
        """Refuses steps of more tokens than can be counted; `more` are the sizes of a step beside its rows."""
        sizes = {**more, "training.rows": self.rows, "training.row_length": self.row_length}
        check_product(sizes, "for the tokens of a step are counted in 32 bits")


@dataclasses.dataclass
class Spent:
    """What a stage has used up so far, kept in its checkpoints.

    Seconds are those of training's clock: of rollouts and scores that are made ahead, what training has waited for. A
    teacher on devices of its own scores the on-policy rows within the seconds of training on them.
    """

    steps: int = 0
    tokens_trained: int = 0
    tokens_sampled: int = 0
    student_train_flops: float = 0.0
    student_sample_flops: float = 0.0
    teacher_flops: float = 0.0
    student_train_seconds: float = 0.0
    student_sample_seconds: float = 0.0
    teacher_generate_seconds: float = 0.0
    teacher_score_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return (
            self.student_train_seconds
            + self.student_sample_seconds
            + self.teacher_generate_seconds
            + self.teacher_score_seconds
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepData:
    """The microbatches of one step, their cost in training FLOPs, and what making them measured."""

    batches: Sequence[Batch]
    train_flops: float
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    learned: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    """Told what the update measured; what it says is recorded as well."""


class DataSource(Protocol):
    """Where a stage's batches come from; the only thing in which stages differ while they train."""

    def step_data(self, step: int, model: Qwen3, spent: Spent) -> StepData:
        """The data of step number `step` (from 0), adding what it cost besides training to `spent`."""

    def state(self) -> Mapping[str, Any]:
        """JSON data from which `restore` goes on with the next step."""

    def restore(self, state: Mapping[str, Any]) -> None: ...


def train(
    name: str,
    model: Qwen3,
    training: Training,
    loss: Loss,
    data: DataSource,
    context: RunContext,
    *,
    steps: int,
    before: Spent | None = None,
    teacher_head: TeacherHeads = None,
    policy: Policy | None = None,
) -> tuple[Qwen3, Spent]:
    """Train `model` for `steps` steps, or what is left of them, and return it with what the stage has spent.

    `loss`, `teacher_head` and `policy` as in `TrainStep`. `before` is what the stage had spent when training began
    (writing targets). Raises Interrupted after saving where the run was asked to stop, UserError where loss or gradient
    are no longer finite.
    """
    transformation = training.optimizer.transformation(steps)
    learning_rates = training.optimizer.learning_rates(steps)
    state = TrainState.start(model, transformation, context.mesh)
    spent = before or Spent()
    with Checkpointer(context.directory / "checkpoints" / name) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            state, metadata = _restored(checkpoints, state, context)
            spent = Spent(**metadata["spent"])
            if done < steps:
                data.restore(metadata["data"])
        context.metrics.resume_at(name, done)
        train_step = TrainStep(
            transformation=transformation,
            loss=loss,
            mesh=context.mesh,
            rematerialise=training.rematerialise,
            teacher_head=teacher_head,
            policy=policy,
            teachers=context.named_teachers,
        )
        if done == steps:
            return state.model, spent
        with context.progress.task(name, steps, completed_steps=done) as bar:
            for step in range(done, steps):
                produced = data.step_data(step, state.model, spent)
                require_same(
                    f"the data of stage {name}, step {step + 1},", functools.partial(_host_bytes, produced.batches)
                )
                started = time.monotonic()
                state, result = train_step(state, produced.batches)
                seconds = time.monotonic() - started
                require_finite(step + 1, {key: result.metrics[key] for key in ("loss", "gradient_norm")}, stage=name)
                spent.steps += 1
                spent.student_train_seconds += seconds
                spent.student_train_flops += produced.train_flops
                spent.tokens_trained += result.trained_positions
                learned = produced.learned(result.metrics) if produced.learned else {}
                context.metrics.scalars(
                    step + 1,
                    dict(produced.metrics)
                    | dict(result.metrics)
                    | dict(learned)
                    | {
                        "learning_rate": float(learning_rates(step)),
                        "padding_fraction": result.padding_fraction,
                        "tokens_per_second_per_device/training": result.tokens / seconds / context.mesh.size,
                    }
                    | model_flops_utilisation(produced.train_flops, seconds, context.mesh.devices.flatten().tolist())
                    | memory_gib(jax.local_devices()),
                    stage=name,
                )
                bar.advance(tokens=result.tokens, values={"loss": result.metrics["loss"]})
                # What it has on the devices is not needed while the next step's is made.
                del produced
                last, stop = step + 1 == steps, context.stop.agreed()
                if last or stop or (step + 1) % training.checkpoint_every_steps == 0:
                    metadata = {"run": context.run_id, "spent": dataclasses.asdict(spent), "data": data.state()}
                    context.require_directory()
                    checkpoints.save(step + 1, state.split()[0], metadata)
                    context.keep_time()
                if stop:
                    checkpoints.wait()
                    raise Interrupted(f"stage {name}: saved after step {step + 1} of {steps}")
    return state.model, spent


def _host_bytes(batches: Sequence[Batch]) -> bytes:
    """What this process has made of the batches; what is on the devices already is one for all."""
    leaves = jax.tree.leaves(list(batches))
    return b"".join(np.asarray(leaf).tobytes() for leaf in leaves if not isinstance(leaf, jax.Array))


def trained_model(name: str, start: Qwen3, training: Training, context: RunContext, steps: int) -> Qwen3 | None:
    """The student of a stage that has finished after `steps`, from its last checkpoint; None where that is gone."""
    # The schedule is no part of the state, so any number of steps gives the right structure.
    state = TrainState.start(start, training.optimizer.transformation(1), context.mesh)
    with Checkpointer(context.directory / "checkpoints" / name) as checkpoints:
        if checkpoints.latest_step() != steps:
            return None
        return _restored(checkpoints, state, context)[0].model


def _restored(checkpoints: Checkpointer, state: TrainState, context: RunContext) -> tuple[TrainState, dict[str, Any]]:
    """The latest checkpoint, placed and completed with frozen weights as `state` is, and its metadata.

    Raises UserError where another run has written it: one whose directory was deleted while it was running.
    """
    saved, frozen = state.split()
    trained, metadata = checkpoints.restore(abstract_state(saved))
    if metadata.get("run") != context.run_id:
        raise UserError(
            f"the latest checkpoint in {checkpoints.directory} is another run's; delete {context.directory} and start "
            "again, or choose another --name"
        )
    return trained.joined(frozen), metadata
