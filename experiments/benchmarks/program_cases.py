"""The programs of the experiments with published checkpoints, and what each is compiled for."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill.planner.program import Program
from distill.planner.programs import programs
from distill.runner.experiment_file import load_experiment
from experiments.qwen3_strong_to_weak import SHARDED_TEACHER
from kernels_pallas.moe_dispatch import Exchange
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.kernels import Kernels
from qwen3.decoder.model import Qwen3
from qwen3.generation.engine import Engine
from qwen3.generation.sampling import SamplingParams
from qwen3.sharding import MeshShape, make_mesh, placed_shapes
from teacher.scoring import top_k_program

EXPERIMENTS = Path(__file__).parents[1]
SCORED_ROWS, SCORED_TOKENS, SCORED_ENTRIES = 8, 4_096, 64
SCORING_TARGETS = ("v5e:8x8", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x4x4", "h100:8x8")
"""64 devices of each kind; what runs beside the scoring needs more memory than v5e has, and is compiled for three."""
RAGGED_TARGETS = ("v5p:4x4x4", "v6e:8x8", "tpu7x:2x4x4", "h100:8x8")
"""XLA has a ragged exchange for at most 16 chips of v5e."""
WRITTEN_ROWS, PROMPT_TOKENS, NEW_TOKENS = 256, 256, 2_048
WRITING_TARGETS = ("v5e:2x4", "v5p:1x1x1", "v6e:2x4", "h100:1x1", "h200:1x1")
"""Where the pages of so many sequences fit: 63 GiB in all."""
TARGETS = {
    "qwen3_235b_to_8b": ("v5p:4x4x4", "v6e:8x8", "h100:8x8"),
    "qwen3_235b_to_8b_cheap": ("v5p:4x4x4", "v6e:8x8", "h100:8x8"),
    "qwen3_235b_to_0_6b": ("v5p:4x4x4", "v6e:8x8", "h100:8x8"),
    "qwen3_235b_to_14b": ("v5p:4x4x4", "v6e:8x8", "h100:8x8"),
    "qwen3_30b_a3b_student": ("v5p:4x4x4", "v6e:8x8", "h100:8x8"),
    "qwen3_32b_to_1_7b": ("v5p:2x2x2", "h100:1x8"),
}
STUDENT_PROGRAMS = (
    "off_policy: student trains",
    "on_policy: student prefills",
    "on_policy: student generates",
    "on_policy: student trains",
    "on_policy: student updates",
)
TEACHER_PROGRAMS = (
    "off_policy: teacher prefills",
    "off_policy: teacher generates",
    "off_policy: teacher scores",
    "on_policy: teacher scores",
)
WITH_TEACHER = ("qwen3_235b_to_8b", "qwen3_32b_to_1_7b")
"""Experiments whose teacher's programs are compiled; the others' are the same."""
SHARED_VOCABULARY = "qwen3_32b_to_1_7b"
"""An experiment in which four devices share the vocabulary of the loss."""
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
    """The 235B teacher's scoring and a 0.6B student's generation by themselves, then the experiments' programs."""
    scored = f"{SCORED_ROWS} × {SCORED_TOKENS:,}, top {SCORED_ENTRIES}"
    yield ProgramCase(
        operation="235B-A22B scores",
        shape=f"{scored}, experts by kernels",
        targets=SCORING_TARGETS,
        program=functools.partial(scoring, named=("grouped_matmul",)),
        most_bytes=10 * 2**30,
        subset=("v6e:8x8",),
    )
    yield ProgramCase(
        operation="235B-A22B scores",
        shape=f"{scored}, experts by XLA",
        targets=SCORING_TARGETS,
        program=scoring,
    )
    yield ProgramCase(
        operation="235B-A22B scores",
        shape=f"{scored}, attention and experts by kernels, tokens exchanged to their experts alone",
        targets=RAGGED_TARGETS,
        program=functools.partial(scoring, named=("attention", "grouped_matmul"), exchange="ragged"),
        most_bytes=10 * 2**30,
    )
    written = f"{WRITTEN_ROWS} × {PROMPT_TOKENS + NEW_TOKENS:,}"
    yield ProgramCase(
        operation="0.6B writes",
        shape=f"{written}, pages in place by kernels",
        targets=WRITING_TARGETS,
        program=functools.partial(writing, kernels=True),
        most_bytes=65 * 2**30,
        subset=("v5e:2x4", "h100:1x1"),
    )
    yield ProgramCase(
        operation="0.6B writes",
        shape=f"{written}, pages gathered by XLA",
        targets=("h200:1x1",),
        program=functools.partial(writing, kernels=False),
    )
    yield ProgramCase(
        operation=SHARED_VOCABULARY,
        shape="off_policy: student trains, attention and loss by kernels",
        targets=TARGETS[SHARED_VOCABULARY],
        program=functools.partial(
            of_experiment, SHARED_VOCABULARY, "off_policy: student trains", named=("attention", "linear_kl")
        ),
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


def scoring(devices: list[jax.Device], *, named: tuple[str, ...] = (), exchange: Exchange = "all_gather") -> Program:
    """The teacher of 235B, top-k targets of a batch, sharded as in the experiments; the `named` operations by the
    platform's own kernels."""
    mesh = make_mesh(SHARDED_TEACHER, devices)
    by_name: Any = dict.fromkeys(named, _kernel(devices))
    model = _model("Qwen3-235B-A22B", mesh, Kernels(**by_name, exchange=exchange))
    program = top_k_program(model, mesh, rows=SCORED_ROWS, length=SCORED_TOKENS, k=SCORED_ENTRIES)
    return Program(
        stage="scoring",
        purpose="teacher_scores",
        model=model.config,
        function=program.function,
        arguments=program.arguments,
        mesh=mesh,
        rows=SCORED_ROWS,
        length=SCORED_TOKENS,
    )


def writing(devices: list[jax.Device], *, kernels: bool) -> Program:
    """A student of 0.6B writes many sequences at once, spread over all devices."""
    mesh = make_mesh(MeshShape(), devices)
    model = _model("Qwen3-0.6B-Base", mesh, Kernels(paged_attention=_kernel(devices)) if kernels else Kernels())
    engine = Engine(
        model.config,
        batch_size=WRITTEN_ROWS,
        max_prompt_tokens=PROMPT_TOKENS,
        max_new_tokens=NEW_TOKENS,
        stop_ids=(0,),
        pad_id=0,
    )
    programs = engine.programs(model, [SamplingParams(max_new_tokens=NEW_TOKENS)])
    return Program(
        stage="writing",
        purpose="student_generates",
        model=model.config,
        function=programs.decode,
        arguments=programs.decode_arguments,
        options=programs.decode_options,
        mesh=mesh,
        rows=WRITTEN_ROWS,
        length=PROMPT_TOKENS + NEW_TOKENS,
    )


def _model(name: str, mesh: Mesh, kernels: Kernels) -> Qwen3:
    """A published model of bfloat16 on a mesh, without numbers."""
    config = ModelConfig.from_folder(EXPERIMENTS / "qwen3_configs" / name)
    dtypes = {"param_dtype": jnp.bfloat16, "compute_dtype": jnp.bfloat16}
    model = jax.eval_shape(lambda: Qwen3(config, jax.random.key(0), **dtypes))
    model.kernels = kernels
    return placed_shapes(model, mesh)


def _kernel(devices: list[jax.Device]) -> Literal["tpu", "gpu"]:
    return "gpu" if devices[0].platform == "gpu" else "tpu"


def of_experiment(experiment: str, name: str, devices: list[jax.Device], *, named: tuple[str, ...] = ()) -> Program:
    """The program of that name of an experiment in `experiments/`; the `named` operations by the platform's kernels."""
    loaded = load_experiment(EXPERIMENTS / f"{experiment}.py")
    by_name: Any = dict.fromkeys(named, _kernel(devices))
    made = programs(dataclasses.replace(loaded, kernels=Kernels(**by_name)) if named else loaded, devices)
    return next(program for program in made if program.name == name)
