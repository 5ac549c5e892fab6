"""The programs of the experiments with published checkpoints, and what each is compiled for."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distill.experiment_file import load_experiment
from distill.programs import Program, programs
from experiments.qwen3_strong_to_weak import SHARDED_TEACHER
from qwen3.config import ModelConfig
from qwen3.kernels import Kernels
from qwen3.model import Qwen3
from qwen3.sharding import make_mesh, placed_shapes
from teacher.scoring import top_k_program

EXPERIMENTS = Path(__file__).parents[1]
SCORED_ROWS, SCORED_TOKENS, SCORED_ENTRIES = 8, 4_096, 64
SCORING_TARGETS = ("v5e:8x8", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x4x4", "h100:8x8")
"""64 devices of each kind; what runs beside the scoring needs more memory than v5e has, and is compiled for three."""
TARGETS = {
    "qwen3_235b_to_8b": ("v5p:4x4x4", "v6e:8x8", "h100:8x8"),
    "qwen3_235b_to_0_6b": ("v5p:4x4x4", "v6e:8x8", "h100:8x8"),
    "qwen3_235b_to_14b": ("v5p:4x4x4", "v6e:8x8", "h100:8x8"),
    "qwen3_30b_a3b_student": ("v5p:4x4x4", "v6e:8x8", "h100:8x8"),
    "qwen3_32b_to_1_7b": ("v5p:2x2x2", "h100:1x8"),
}
STUDENT_PROGRAMS = (
    "off_policy: student trains",
    "on_policy: student reads",
    "on_policy: student writes",
    "on_policy: student trains",
    "on_policy: student updates",
)
TEACHER_PROGRAMS = (
    "off_policy: teacher reads",
    "off_policy: teacher writes",
    "off_policy: teacher scores",
    "on_policy: teacher scores",
)
WITH_TEACHER = ("qwen3_235b_to_8b", "qwen3_32b_to_1_7b")
"""Experiments whose teacher's programs are compiled; the others' are the same."""
SUBSET = {("qwen3_235b_to_8b", "on_policy: student trains"): ("h100:8x8",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCase:
    """One program and the targets that it is for."""

    operation: str
    shape: str
    """For people; with the operation it names the case."""
    targets: tuple[str, ...]
    program: Callable[[list[Any]], Program]
    """For the devices of a target."""
    most_bytes: int | None = None
    """What the program may take of each device's memory."""
    subset: tuple[str, ...] = ()
    """Targets for which `make test-compile` compiles it."""

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.shape}"


def cases() -> Iterator[ProgramCase]:
    """The 235B teacher's scoring by itself, then the experiments' programs."""
    scored = f"{SCORED_ROWS} × {SCORED_TOKENS:,}, top {SCORED_ENTRIES}"
    yield ProgramCase(
        operation="235B-A22B scores",
        shape=f"{scored}, experts by kernels",
        targets=SCORING_TARGETS,
        program=functools.partial(scoring, kernels=True),
        most_bytes=10 * 2**30,
        subset=("v6e:8x8",),
    )
    yield ProgramCase(
        operation="235B-A22B scores",
        shape=f"{scored}, experts by XLA",
        targets=SCORING_TARGETS,
        program=functools.partial(scoring, kernels=False),
    )
    for experiment, targets in TARGETS.items():
        teacher = TEACHER_PROGRAMS if experiment in WITH_TEACHER else ()
        for name in (*teacher, *STUDENT_PROGRAMS):
            yield ProgramCase(
                operation=experiment,
                shape=name,
                targets=targets,
                program=functools.partial(of_experiment, experiment, name),
                subset=SUBSET.get((experiment, name), ()),
            )


def scoring(devices: list[Any], *, kernels: bool) -> Program:
    """The teacher of 235B, top-k targets of a batch, sharded as in the experiments."""
    config = ModelConfig.from_folder(EXPERIMENTS / "qwen3_configs" / "Qwen3-235B-A22B")
    mesh = make_mesh(SHARDED_TEACHER, devices)
    dtypes = {"param_dtype": jnp.bfloat16, "compute_dtype": jnp.bfloat16}
    model = jax.eval_shape(lambda: Qwen3(config, jax.random.key(0), **dtypes))
    if kernels:
        model.kernels = Kernels(grouped_matmul="gpu" if devices[0].platform == "gpu" else "tpu")
    program = top_k_program(placed_shapes(model, mesh), mesh, rows=SCORED_ROWS, length=SCORED_TOKENS, k=SCORED_ENTRIES)
    return Program(
        stage="scoring",
        purpose="teacher_scores",
        model=config,
        function=program.function,
        arguments=program.arguments,
        mesh=mesh,
        rows=SCORED_ROWS,
        length=SCORED_TOKENS,
    )


def of_experiment(experiment: str, name: str, devices: list[Any]) -> Program:
    """The program of that name of an experiment in `experiments/`."""
    made = programs(load_experiment(EXPERIMENTS / f"{experiment}.py"), devices)
    return next(program for program in made if program.name == name)
