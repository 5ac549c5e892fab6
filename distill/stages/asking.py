"""What a stage asks its student, and which of its sizes fit together."""

import math
from collections.abc import Sequence
from typing import Protocol

from jax.sharding import Mesh

from distill.stages.context import EngineSizes
from distill.stages.loop import Training
from distill.stages.rollout_schedule import RolloutSchedule
from distill.stages.student_top_k import StudentTopK
from distill.tasks import Problem
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import ModeMix
from distill.training.token_choice import places_in_row
from qwen3.errors import UserError
from qwen3.field_types import MOST_PROBLEMS, check_product
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import Mode

Asked = Sequence[tuple[Problem, Mode]]


class Asking(Protocol):
    """What a stage says of the responses that its student generates."""

    @property
    def prompts_per_step(self) -> int: ...
    @property
    def samples_per_prompt(self) -> int: ...
    @property
    def modes(self) -> ModeMix: ...
    @property
    def thinking(self) -> SamplingParams: ...
    @property
    def non_thinking(self) -> SamplingParams: ...
    @property
    def max_prompt_tokens(self) -> int: ...
    @property
    def training(self) -> Training: ...
    @property
    def max_staleness(self) -> int: ...
    @property
    def samples_every_steps(self) -> int: ...
    @property
    def rollout_tokens(self) -> RolloutSchedule | None: ...
    @property
    def token_share(self) -> float: ...
    @property
    def targets(self) -> StudentTopK | None: ...
    @property
    def updates_per_batch(self) -> int: ...
    @property
    def passes(self) -> int: ...
    @property
    def generation(self) -> EngineSizes: ...


def fresh_steps(stage: Asking) -> int:
    """The steps that have prompts of their own; those of later passes have theirs again."""
    assert stage.training.steps is not None
    return stage.training.steps // stage.passes


def asked_of(stage: Asking, tasks: TaskMixture, seed: int, *, beside: int = 0) -> list[tuple[Problem, Mode]]:
    """The prompts of all fresh steps, one step's after the other's, each with its mode; then `beside` more for a step,
    likewise. Raises UserError where there are none."""
    steps = fresh_steps(stage)
    usual = steps * stage.prompts_per_step
    problems = tasks.problems("train", usual + steps * beside, seed, repeat=True)
    asked = stage.modes.assign(problems[:usual], seed, prompts_per_step=stage.prompts_per_step)
    more = problems[usual:]
    return asked + (stage.modes.assign(more, seed + 1, prompts_per_step=beside) if more else [])


def places_of_stage(stage: Asking, mesh: Mesh, teacher_mesh: Mesh) -> int | None:
    """How many positions of each row heads are multiplied out at; None: all."""
    if stage.token_share == 1:
        return None
    return places_in_row(stage.token_share, stage.training.row_length, (mesh, teacher_mesh))


def check_asking(stage: Asking, what: str, *, beside: int = 0) -> None:
    """Refuses sizes of a stage, called `what`, that do not fit together. Raises UserError."""
    if stage.training.steps is None:
        raise UserError(f"training.steps is None; {what} needs a number of steps")
    steps = "training.steps" if stage.passes == 1 else "training.steps / passes"
    drawn = {"prompts_per_step": stage.prompts_per_step + beside, steps: fresh_steps(stage)}
    check_product(drawn, "for the problems of all steps are kept in memory", MOST_PROBLEMS)
    stage.generation.check("prompts_per_step × samples_per_prompt")
    updates = {"updates_per_batch": stage.updates_per_batch, "passes": stage.passes}
    batches, left = divmod(stage.training.steps, math.prod(updates.values()))
    if left:
        several = {name: count for name, count in updates.items() if count > 1}
        raise UserError(
            f"training.steps is {stage.training.steps}, which {' × '.join(several)}, "
            f"{' × '.join(map(str, several.values()))}, does not divide: the last rollouts would be for nothing; make "
            "it a multiple"
        )
    if stage.rollout_tokens is not None:
        stage.rollout_tokens.check(stage.thinking, stage.non_thinking, batches)
    longest = stage.generation.longest_tokens
    if longest > stage.training.row_length:
        raise UserError(
            f"prompt and response may have {longest} tokens, training.row_length is {stage.training.row_length}; "
            "raise it, or lower max_prompt_tokens or max_new_tokens"
        )


def check_ahead(stage: Asking, name: str, mesh: Mesh, teacher_mesh: Mesh | None) -> None:
    """Refuses, by the name of the stage, to generate ahead where nothing would be gained by it; `teacher_mesh` is that
    of a teacher that scores, None without one."""
    if not stage.max_staleness or mesh.size == 1 or teacher_mesh not in (None, mesh):
        return
    reason = (
        f"but the student shares {mesh.size} devices with its teacher, which then wait for each other however old "
        "rollouts are; set it to 0, or set teacher.placement to own_mesh"
        if teacher_mesh is not None
        else f"but without a teacher on devices of its own nothing runs beside the student's {mesh.size}; set it to 0"
    )
    raise UserError(f"stages.{name}.max_staleness is {stage.max_staleness}, {reason}")
