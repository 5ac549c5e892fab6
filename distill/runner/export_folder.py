"""The run's export/: written once, and again only where a file of it is gone. What others put there stays."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp

from distill.experiment import Experiment
from distill.monitor.records import read_json, write_atomically
from distill.runner.inputs import GENERATION_CONFIG, FileState, file_state, states_from_json
from distill.runner.run_directory import EXPORT_RECORD
from distill.stages.context import RunContext
from qwen3.chat.tokenizer import tokenizer_paths
from qwen3.decoder.model import Qwen3
from qwen3.folder import restore_folder
from qwen3.hosts.processes import first_says, is_first
from student.export import export

_FOLDER = "export"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Written:
    """What this run has written into export/."""

    of: str = ""
    """Hash of the record of the checkpoint that was exported."""
    files: dict[str, FileState] = dataclasses.field(default_factory=dict)


def check_export_record(directory: Path) -> None:
    """Raises UserError where the record of what `export_student` has written is damaged."""
    _recorded(directory / EXPORT_RECORD)


def export_student(experiment: Experiment, model: Qwen3, context: RunContext) -> None:
    """Write `model` as a Hugging Face folder, or leave alone the one that this run has written.

    A file that somebody has changed since, and what else lies in the folder, stays as it is. Raises UserError where
    the folder cannot be written.
    """
    folder, record = context.directory / _FOLDER, context.directory / EXPORT_RECORD
    checkpoints = context.directory / "checkpoints" / experiment.lineage()[-1]
    known, of, changed, own, complete = first_says(lambda: _found(folder, record, checkpoints))
    for name in changed:
        context.progress.print(
            f"{folder / name} is not as this run wrote it, and stays so; delete it to have it written again"
        )
    if complete:
        return
    names = export(
        folder,
        model,
        context.tokenizer,
        _generation_defaults(experiment),
        dtype=jnp.dtype(experiment.export_dtype),
        adapters_of=experiment.adapted_base if experiment.export_adapter else None,
        own=own,
    )
    if is_first():
        files = {name: known[name] if name in changed else file_state(folder / name) for name in names}
        write_atomically(record, json.dumps({"of": of, "files": files}, indent=2) + "\n")


def _found(
    folder: Path, record: Path, checkpoints: Path
) -> tuple[dict[str, FileState], str, list[str], list[str], bool]:
    """Files that this run has written as it wrote them, of which checkpoint it is to write now, which files have
    changed since, which may be replaced, and whether there is nothing to write."""
    restore_folder(folder)
    latest = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    of = str(file_state(checkpoints / str(latest) / "record" / "metadata")["blake2b"])
    written = _recorded(record)
    if written is None:
        return {}, of, [], _present(folder), False
    present = [name for name in written.files if (folder / name).is_file()]
    changed = [name for name in present if _has_changed(folder / name, written.files[name])]
    complete = written.of == of and len(present) == len(written.files)
    return written.files, of, changed, sorted(written.files.keys() - set(changed)), complete


def _recorded(record: Path) -> _Written | None:
    remedy = "delete it, and export/ is written again"
    return read_json(record, _written_from_json, remedy) if record.exists() else None


def _written_from_json(raw: object) -> _Written:
    assert isinstance(raw, dict), "no object"
    assert isinstance(raw["of"], str), "of is no text"
    assert raw["files"], "no files"
    return _Written(of=raw["of"], files=states_from_json(raw["files"]))


def _has_changed(file: Path, written: FileState) -> bool:
    return file_state(file, written)["blake2b"] != written["blake2b"]


def _present(folder: Path) -> list[str]:
    """The model that lies in `folder` though no record says who wrote it: what models consist of, by its name."""
    files = {*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"), *tokenizer_paths(folder)}
    files |= {folder / name for name in ("config.json", GENERATION_CONFIG, "adapter_config.json")}
    return sorted(path.relative_to(folder).as_posix() for path in files if path.is_file())


def _generation_defaults(experiment: Experiment) -> dict[str, bool | float | int]:
    """Those of the first mode that is evaluated."""
    sampling = experiment.evaluation.sampling(experiment.evaluation.modes[0])
    # What says nothing is left out: transformers warns of filters beside greedy decoding.
    if sampling.greedy:
        return {"do_sample": False}
    defaults = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    return defaults | {"top_k": sampling.top_k} | ({"min_p": sampling.min_p} if sampling.min_p else {})
