"""What --help says of an experiment: the fields that people change first, on three screens; --help-all has them all."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from distill.evaluation.evaluate import Evaluation
from distill.experiment import Experiment, Teacher
from distill.stages import Grpo, OffPolicy, OnPolicy, Sft
from distill.stages.loop import Training
from distill.stages.rollout_schedule import RolloutSchedule
from distill.stages.student_top_k import StudentTopK
from distill.tasks import PromptFile
from distill.training.losses import Loss
from distill.training.optimizer import Optimizer
from distill.training.policy import PolicyLoss
from qwen3.generation.sampling import SamplingParams
from qwen3.sharding import MESH_AXES, MeshShape
from student.init import FromCheckpoint, FromScratch
from student.lora import Lora

_WIDTH = 100
_FIRST: Mapping[type, tuple[str, ...]] = {
    Experiment: ("name", "seed", "export_stage", "compute_dtype"),
    FromCheckpoint: ("path",),
    FromScratch: ("tokenizer",),
    Lora: ("rank",),
    Teacher: ("path", "dtype"),
    PromptFile: ("path", "verifier"),
    MeshShape: MESH_AXES,
    Evaluation: ("problems", "samples_per_problem", "modes"),
    Sft: ("problems",),
    OffPolicy: ("prompts", "top_k", "batch_size"),
    OnPolicy: ("prompts_per_step", "samples_per_prompt"),
    RolloutSchedule: ("first", "full_share"),
    StudentTopK: ("k",),
    Grpo: ("prompts_per_step", "samples_per_prompt", "policy_weight", "teacher_kl"),
    PolicyLoss: ("ratio", "total"),
    SamplingParams: ("max_new_tokens",),
    Loss: ("name",),
    Training: ("steps", "rows", "row_length"),
    Optimizer: ("learning_rate",),
}
_OWN_SECTION = ("stages", "tasks", "teachers")
"""Mappings each value of which has a section to itself."""


def first_fields(experiment: Experiment) -> str:
    """Sections of options, each below what their names begin with; with the experiment's values, a line each.

    A stage shows its first field, and of the others those that differ from the first stage of its kind.
    """
    sections: dict[str, list[tuple[str, str]]] = {}
    shown: dict[tuple[str, ...], Any] = {}
    for path, value, text in _walked(experiment, ()):
        depth = min(len(path) - 1, 2 if path[0] in _OWN_SECTION else 1)
        begin, end = (".".join(part).replace("_", "-") for part in (path[:depth], path[depth:]))
        lines = sections.setdefault(f"--{begin}.…" if begin else "--…", [])
        if path[0] == "stages":
            field = (experiment.stages[path[1]].kind, *path[2:])
            if lines and field in shown and shown[field] == value:
                continue
            shown.setdefault(field, value)
        lines.append((f"{end} {_written(value)}", text))
    return "\n\n".join(_section(name, lines) for name, lines in sections.items())


def _walked(owner: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Path, value and explanation of every field that comes first, in and under a dataclass."""
    texts = _explanations(type(owner))
    for name in _FIRST.get(type(owner), ()):
        yield (*path, name), getattr(owner, name), texts[name]
    for field in dataclasses.fields(owner):
        held = getattr(owner, field.name)
        if isinstance(owner, Teacher) and field.name == "mesh" and owner.placement != "own_mesh":
            continue
        if dataclasses.is_dataclass(held):
            yield from _walked(held, (*path, field.name))
        elif isinstance(held, Mapping):
            for key, one in held.items():
                if dataclasses.is_dataclass(one):
                    yield from _walked(one, (*path, field.name, key))


def _explanations(kind: type) -> dict[str, str]:
    """The first sentence below each field of a dataclass, empty where there is none."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            constant = following.value if isinstance(following, ast.Expr) else None
            text = str(constant.value) if isinstance(constant, ast.Constant) else ""
            found[statement.target.id] = " ".join(text.split()).partition(". ")[0].rstrip(".")
    return found


def _section(name: str, lines: list[tuple[str, str]]) -> str:
    width = max(len(option) for option, _ in lines)
    rows = (f"  {option:{width}}  {text}" for option, text in lines)
    return "\n".join([name, *(row if len(row) <= _WIDTH else f"{row[: _WIDTH - 1]}…" for row in rows)])


def _written(value: Any) -> str:
    """As it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
