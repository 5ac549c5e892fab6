"""One topology's plan: every program's memory and roof, the run's hours, and what to change where it does not fit."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax

from distill.experiment import Experiment
from distill.planner.collectives import Traffic
from distill.planner.program import Program, Purpose
from distill.planner.program_memory import Compiled, Memory, known_memory
from distill.planner.programs import programs
from distill.planner.roofline import Roof, Work, roof, work_of
from distill.planner.whole_run import Assumptions, Pipeline, StagePlan, stage_plans
from kernels_pallas.chips import Chip
from qwen3.errors import UserError

Measure = Callable[[Sequence[Program]], Generator[tuple[int, Compiled]]]
"""Compiles programs, in any order; gives each one's number with what its compiler says."""
_GIB = 2**30
_CUT = ("context", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedProgram:
    """One program on one topology."""

    name: str
    memory: Memory
    work: Work
    roof: Roof
    sent: Traffic | None
    """In one call; None where it was not compiled."""
    devices: int
    problem: str | None
    """Why it cannot run there and what would help; None where it fits."""

    @property
    def tokens_per_s(self) -> float:
        """At the roof."""
        return self.work.tokens / self.roof.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """What a stage takes in all."""

    name: str
    seconds: Mapping[str, float]
    """By the purpose of its programs, at the share of the roof that is assumed."""
    elapsed_seconds: float
    """Less than their sum where the teacher scores on devices of its own while the student works."""
    pipeline: Pipeline | None
    tokens_moved: float
    bytes_moved: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on one topology."""

    experiment: str
    topology: str
    chip: Chip
    devices: int
    assumed: Assumptions
    programs: Sequence[PlannedProgram] = ()
    stages: Sequence[PlannedStage] = ()
    refusal: str | None = None
    """Why the experiment's meshes cannot be laid over the devices at all."""
    smallest: str | None = None
    """The smallest topology of this kind on which it fits, with the options that cut its mesh down for it; None where
    none does, or none was looked for."""

    @property
    def fits(self) -> bool:
        return self.refusal is None and all(program.problem is None for program in self.programs)

    @property
    def seconds(self) -> float:
        return sum(stage.elapsed_seconds for stage in self.stages)

    @property
    def chips(self) -> float:
        return self.devices / self.chip.devices_per_chip

    @property
    def chip_hours(self) -> float:
        return self.chips * self.seconds / 3600

    @property
    def problems(self) -> list[str]:
        if self.refusal is not None:
            return [self.refusal]
        return [f"{one.name}: {one.problem}" for one in self.programs if one.problem is not None]

    def to_json(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        for raw, program in zip(plain["programs"], self.programs, strict=True):
            raw["memory"]["total"] = program.memory.total
            raw["roof"] |= {"seconds": program.roof.seconds, "bound": program.roof.bound}
            raw["tokens_per_s"] = program.tokens_per_s
        return plain | {
            "fits": self.fits, "seconds": self.seconds, "chips": self.chips, "chip_hours": self.chip_hours,
        }  # fmt: skip


def plan_on(
    experiment: Experiment,
    devices: list[jax.Device],
    chip: Chip,
    topology: str,
    assumed: Assumptions,
    measure: Measure | None = None,
) -> Plan:
    """The plan for `devices`; with `measure`, temporaries and traffic are those of the compiled programs."""
    plan = Plan(experiment=experiment.name, topology=topology, chip=chip, devices=len(devices), assumed=assumed)
    try:
        made = programs(experiment, devices)
    except UserError as error:
        return dataclasses.replace(plan, refusal=str(error))
    found = {} if measure is None else dict(measure(made))
    planned = [_program(program, experiment, chip, found.get(number)) for number, program in enumerate(made)]
    by_name = {(program.stage, program.purpose): one for program, one in zip(made, planned, strict=True)}
    stages = [
        _stage(stage, {purpose: by_name[stage.stage, purpose].roof.seconds for purpose in stage.calls}, assumed)
        for stage in stage_plans(experiment, made, assumed)
    ]
    return dataclasses.replace(plan, programs=planned, stages=stages)


def fits(experiment: Experiment, devices: list[jax.Device], chip: Chip, measure: Measure | None) -> bool:
    """Whether all programs fit; the first that does not ends it, and those that cannot, whatever their temporaries are,
    are not compiled."""
    try:
        made = programs(experiment, devices)
    except UserError:
        return False
    if any(_problem(one, known_memory(one), chip, None) for one in made):
        return False
    if measure is None:
        return True
    with contextlib.closing(measure(made)) as compiling:
        return all(_program(made[number], experiment, chip, found).problem is None for number, found in compiling)


def cut_down(experiment: Experiment, devices: int) -> tuple[Experiment, str]:
    """The experiment on fewer devices than its mesh asks for, and the options that say so on a command line.

    Where they are too few, sizes of the mesh are divided by what they share with the excess, context first, then fsdp,
    expert and tensor; data takes what is left. Batches and rows stay as they are, and so do two meshes side by side.
    """
    mesh = experiment.mesh
    asked = math.prod(getattr(mesh, axis) for axis in _CUT)
    excess = asked // math.gcd(asked, devices)
    if experiment.teacher is not None and experiment.teacher.placement == "own_mesh":
        return experiment, ""
    sizes = {} if mesh.data == -1 else {"data": -1}
    for axis in _CUT:
        common = math.gcd(getattr(mesh, axis), excess)
        excess //= common
        if common > 1:
            sizes[axis] = getattr(mesh, axis) // common
    changed = dataclasses.replace(experiment, mesh=dataclasses.replace(mesh, **sizes))
    return changed, " ".join(f"--mesh.{axis} {size}" for axis, size in sizes.items())


def _stage(stage: StagePlan, seconds_of: Mapping[Purpose, float], assumed: Assumptions) -> PlannedStage:
    seconds = {
        purpose: count
        * seconds_of[purpose]
        / (assumed.decoding_efficiency if purpose.endswith("generates") else assumed.efficiency)
        for purpose, count in stage.calls.items()
    }
    return PlannedStage(
        name=stage.stage,
        seconds={str(purpose): taken for purpose, taken in seconds.items()},
        elapsed_seconds=stage.elapsed_seconds(seconds),
        pipeline=stage.pipeline,
        tokens_moved=stage.tokens_moved,
        bytes_moved=stage.bytes_moved,
    )


def _program(program: Program, experiment: Experiment, chip: Chip, found: Compiled | None) -> PlannedProgram:
    memory, work = known_memory(program), work_of(program, experiment)
    sent = None
    if found is not None:
        sent = found.sent
        memory = dataclasses.replace(memory, temporaries=found.temporary_bytes)
    return PlannedProgram(
        name=program.name,
        memory=memory,
        work=work,
        roof=roof(work, program.mesh.size, chip, sent),
        sent=sent,
        devices=program.mesh.size,
        problem=_problem(program, memory, chip, None if found is None else found.error),
    )


def _problem(program: Program, memory: Memory, chip: Chip, error: str | None) -> str | None:
    if error is not None and "out of memory" not in error.lower():
        return f"does not compile: {error}"
    if error is None and memory.total <= chip.memory_bytes:
        return None
    needs = f"needs {memory.total / _GIB:.1f} GiB of each device, which has {chip.memory_bytes / _GIB:.1f}"
    return f"{needs}; {_remedy(program, memory)}"


def _remedy(program: Program, memory: Memory) -> str:
    """By what takes most."""
    sizes = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "cache": memory.cache + (memory.temporaries or 0 if program.purpose.endswith("generates") else 0),
        "rows": memory.other + (0 if program.purpose.endswith("generates") else memory.temporaries or 0),
    }
    most = max(sizes, key=lambda name: sizes[name])
    if most in ("weights", "optimizer"):
        return "spread the weights over more devices: more mesh.fsdp, mesh.expert or mesh.tensor, or teacher.mesh"
    if most == "cache":
        return "write fewer or shorter sequences at once: a smaller batch_size or prompts_per_step, or max_new_tokens"
    if program.purpose in ("student_routes", "student_trains"):
        return "lower training.rows or training.row_length, set training.rematerialise, or raise mesh.context"
    return "score fewer or shorter rows at once, or raise mesh.context"
