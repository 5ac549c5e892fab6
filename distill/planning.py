"""One topology's plan: every program's memory and roof, the run's hours, and what to change where it does not fit."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.collectives import Traffic
from distill.experiment import Experiment
from distill.program_memory import Compiled, Memory, known_memory
from distill.programs import Program, programs
from distill.roofline import Roof, Work, roof, work_of
from distill.whole_run import Assumptions, StagePlan, stage_plans
from kernels_pallas.chips import Chip
from qwen3.errors import UserError

Measure = Callable[[str, int, int], Compiled]
"""Compiles the program of that name and number, of so many."""
_GIB = 2**30


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
    """The smallest topology of this kind on which it fits; None where none does, or none was looked for."""

    @property
    def fits(self) -> bool:
        return self.refusal is None and all(program.problem is None for program in self.programs)

    @property
    def seconds(self) -> float:
        return sum(sum(stage.seconds.values()) for stage in self.stages)

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
    devices: list[Any],
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
    planned = []
    for number, program in enumerate(made):
        found = None if measure is None else measure(program.name, number, len(made))
        planned.append(_program(program, experiment, chip, found))
    by_name = {(program.stage, program.purpose): one for program, one in zip(made, planned, strict=True)}
    stages = [
        _stage(stage, {purpose: by_name[stage.stage, purpose].roof.seconds for purpose in stage.calls}, assumed)
        for stage in stage_plans(experiment, made, assumed)
    ]
    return dataclasses.replace(plan, programs=planned, stages=stages)


def resident_problem(experiment: Experiment, devices: list[Any], chip: Chip) -> str | None:
    """Why the experiment cannot fit these devices whatever its programs' temporaries are; None where it may."""
    try:
        made = programs(experiment, devices)
    except UserError as error:
        return str(error)
    return next((problem for one in made if (problem := _problem(one, known_memory(one), chip, None))), None)


def _stage(stage: StagePlan, seconds_of: Mapping[Any, float], assumed: Assumptions) -> PlannedStage:
    return PlannedStage(
        name=stage.stage,
        seconds={
            str(purpose): count * seconds_of[purpose] / assumed.efficiency for purpose, count in stage.calls.items()
        },
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
        "cache": memory.cache + (memory.temporaries or 0 if program.purpose.endswith("writes") else 0),
        "rows": memory.other + (0 if program.purpose.endswith("writes") else memory.temporaries or 0),
    }
    most = max(sizes, key=lambda name: sizes[name])
    if most in ("weights", "optimizer"):
        return "spread the weights over more devices: more mesh.fsdp, mesh.expert or mesh.tensor, or teacher.mesh"
    if most == "cache":
        return "write fewer or shorter sequences at once: a smaller batch_size or prompts_per_step, or max_new_tokens"
    if program.purpose == "student_trains":
        return "lower training.rows or training.row_length, set training.rematerialise, or raise mesh.context"
    return "score fewer or shorter rows at once, or raise mesh.context"
