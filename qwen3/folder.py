"""Model folders: one that appears under its name complete or not at all, and one that is no model of its own."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from qwen3.errors import UserError

# What model folders consist of. Anything else in the way is somebody's work and is not replaced.
_SUFFIXES = {".json", ".safetensors", ".jinja", ".txt", ".md", ".model"}
_FOLDERS = {"additional_chat_templates"}
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@contextlib.contextmanager
def complete_folder(folder: str | Path, own: Collection[str] | None = None) -> Iterator[Path]:
    """Yields an empty folder to write into, and gives it the name `folder` when the block ends without an error.

    A model folder of that name is replaced; after an error it is as it was. Where `own` names the files in it that
    the caller has written, by their paths inside of it, they alone are replaced: everything else stays as it is.

    Raises:
        UserError: `folder` cannot be written, or without `own` holds something that is no part of a model.
    """
    target = Path(os.path.abspath(folder))
    partial, previous = target.with_name(f".{target.name}.partial"), _previous(target)
    try:
        restore_folder(target)
        _check_replaceable(target, any_content=own is not None)
        for leftover in (partial, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if target.exists():
                if own is not None:
                    _carry_over(target, partial, own)
                target.rename(previous)
            partial.rename(target)
        finally:
            restore_folder(target)
            for leftover in (partial, previous):
                shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}); name another folder") from None


def _is_part_of_model(path: Path) -> bool:
    """Whether a file is, by its name, one that model folders consist of."""
    return path.suffix in _SUFFIXES


def restore_folder(target: Path) -> None:
    """Gives a folder its name back where `complete_folder` was killed between its two renames."""
    previous = _previous(target)
    if previous.exists() and not target.exists():
        previous.rename(target)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _check_replaceable(target: Path, *, any_content: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; name a folder to write the model to")
    foreign = sorted(
        path.name
        for path in target.iterdir()
        if not (path.name in _FOLDERS if path.is_dir() else _is_part_of_model(path))
    )
    if foreign and not any_content:
        raise UserError(f"{target} holds {foreign[0]}, which is no part of a model; name an empty or a new folder")


def check_whole_model(folder: str | Path) -> None:
    """Refuses a folder that holds an adapter (PEFT), alone or beside weights.

    transformers loads the base that an adapter names, or the weights beside it, and adds the adapter. Here whole
    weights are read, so it would be left out.

    Raises:
        UserError: Names the adapter's files and its base, and what to do.
    """
    folder = Path(folder)
    found = [name for name in _ADAPTER_FILES if (folder / name).exists()]
    if not found:
        return
    merge = "(in PEFT: merge_and_unload, then save_pretrained)"
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds an adapter ({', '.join(found)}) beside the weights, and weights alone are read; merge it "
            f"into them {merge}, or move its files elsewhere"
        )
    raise UserError(
        f"{folder} holds an adapter of {_base_of(folder)} ({', '.join(found)}) and no model; merge it into that base "
        f"{merge} and name the folder of the whole"
    )


def _base_of(folder: Path) -> str:
    try:
        base = json.loads((folder / _ADAPTER_FILES[0]).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = None
    return repr(base) if isinstance(base, str) and base else "a base that it does not name"


def _carry_over(target: Path, partial: Path, own: Collection[str]) -> None:
    """Gives `partial` what `target` holds besides its `own` files, in place of what has the same name there."""
    for place, folders, files in os.walk(target):
        there = partial / Path(place).relative_to(target)
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in {*folders} - {*links}:
            (there / name).mkdir(exist_ok=True)
        for name in (*files, *links):
            if Path(place, name).relative_to(target).as_posix() in own:
                continue
            (there / name).unlink(missing_ok=True)
            try:
                # Both folders have it until the old one goes: a kill in between loses nothing, and large files cost
                # nothing.
                os.link(Path(place, name), there / name, follow_symlinks=False)
            except OSError:
                shutil.copy2(Path(place, name), there / name, follow_symlinks=False)
