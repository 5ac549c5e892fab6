"""Which files from outside decide what a run does, and whether they are still what they were when it began.

A run that goes on with other prompts, another template or other weights than it began with ends in numbers that no
run could give again. The configuration names these files; what they hold is kept here as a hash of each, of weights
in 64 places.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from distill.experiment import Experiment, teacher_field
from distill.stages import OffPolicy
from distill.tasks import PromptFile, ReasoningGym
from qwen3.chat.tokenizer import tokenizer_paths
from qwen3.errors import UserError
from student.init import FromCheckpoint
from teacher.fingerprint import weights_digest
from teacher.store import INDEX_NAME

FileState = dict[str, int | str]
"""`bytes`, `changed_ns` and `blake2b` of a file, or the `version` of a package. A file whose first two are as they were
is not read again: nothing but the operating system sets the time of a file's last change."""
Inputs = dict[str, dict[str, FileState]]
"""The state of every file by the field that names it or its folder, and by its path."""

GENERATION_CONFIG = "generation_config.json"
"""Names the tokens that end a response."""
_BLOCK_BYTES = 2**20
_GYM = "reasoning-gym"
"""Another version may make other problems."""


def found_inputs(experiment: Experiment, known: Mapping[str, Mapping[str, FileState]]) -> Inputs:
    """The files of `experiment` as they are; one that is `known` and has not been touched keeps its hash.

    A file that does not exist is left out: whoever needs it says so best.
    """
    files = {
        field: {str(path): file_state(path, known.get(field, {}).get(str(path))) for path in paths if path.is_file()}
        for field, paths in _input_paths(experiment).items()
    }
    return files | {
        f"tasks.{name}.families": {_GYM: {"version": importlib.metadata.version(_GYM)}}
        for name, task in experiment.tasks.items()
        if isinstance(task, ReasoningGym)
    }


def check_unchanged(known: Mapping[str, Mapping[str, FileState]], found: Inputs) -> None:
    """Raises UserError for the first file that is not what it was."""
    for field in {**found, **known}:
        before, now = known.get(field, {}), found.get(field, {})
        for path in {**before, **now}:
            if path not in now:
                what = "is gone, which was there when this run began"
            elif path not in before:
                what = "was not there when this run began"
            elif any(before[path].get(kind) != now[path].get(kind) for kind in ("blake2b", "version")):
                what = "has changed since this run began"
            else:
                continue
            raise UserError(f"{path} ({field}) {what}; put back what was there, or give this run another --name")


def file_state(path: Path, known: FileState | None = None) -> FileState:
    """The present state of a file, whose hash is taken from `known` where it has not been touched since."""
    status = path.stat()
    state: FileState = {"bytes": status.st_size, "changed_ns": status.st_ctime_ns}
    if known is not None and state.items() <= known.items():
        return dict(known)
    return state | {"blake2b": weights_digest(path) if path.suffix == ".safetensors" else _digest(path)}


def inputs_from_json(raw: object) -> Inputs:
    """`raw` as it was written; another document raises AssertionError or KeyError."""
    assert isinstance(raw, dict), "no object"
    return {field: states_from_json(states) for field, states in raw.items()}


def states_from_json(raw: object) -> dict[str, FileState]:
    """`raw` as the states of files by path; another document raises AssertionError or KeyError."""
    assert isinstance(raw, dict), "no object"
    for state in raw.values():
        assert isinstance(state, dict), "no state of a file"
        if isinstance(state.get("version"), str):
            continue
        assert type(state["bytes"]) is type(state["changed_ns"]) is int, "no state of a file"
        assert isinstance(state["blake2b"], str), "no state of a file"
    return raw


def _input_paths(experiment: Experiment) -> dict[str, list[Path]]:
    student = experiment.student
    paths = {
        f"{teacher_field(name)}.path": _model_paths(teacher.path) for name, teacher in experiment.all_teachers.items()
    }
    if isinstance(student, FromCheckpoint):
        paths["student.path"] = _model_paths(student.path)
    else:
        paths["student.tokenizer"] = [*tokenizer_paths(student.tokenizer), Path(student.tokenizer, GENERATION_CONFIG)]
        if isinstance(student.architecture, str):
            paths["student.architecture"] = [Path(student.architecture)]
    for name, stage in experiment.stages.items():
        if isinstance(stage, OffPolicy) and stage.store is not None:
            # It has the hashes of all others.
            paths[f"stages.{name}.store"] = [Path(stage.store, INDEX_NAME)]
    for name, task in experiment.tasks.items():
        if isinstance(task, PromptFile):
            paths[f"tasks.{name}.path"] = [Path(task.path)]
            if task.held_out_path is not None:
                paths[f"tasks.{name}.held_out_path"] = [Path(task.held_out_path)]
    return paths


def _model_paths(folder: str) -> list[Path]:
    weights = sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("*.safetensors.index.json"))
    return [Path(folder, "config.json"), Path(folder, GENERATION_CONFIG), *tokenizer_paths(folder), *weights]


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
