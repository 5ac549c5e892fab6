"""An experiment's Python file: loaded, and where it is wrong, in one line that says where and what would help."""

import contextlib
import dataclasses
import difflib
import importlib.util
import re
import sys
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.experiment import Experiment
from qwen3.errors import UserError

_UNKNOWN_FIELD = re.compile(r"(?:\w+\.)*(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")
_MISSING_FIELDS = re.compile(r"(?:\w+\.)*(\w+)\.__init__\(\) missing \d+ required keyword-only arguments?: (.*)")
_UNKNOWN_NAME = re.compile(r"cannot import name '(\w+)' from '([\w.]+)'")


def load_experiment(path: Path) -> Experiment:
    """The experiment that a Python file's `config()` returns.

    Raises UserError where there is none, or a field of it is unknown or has a wrong value. Other errors are of the
    file's own code, and come up as they are.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one of its experiments, which python -m distill.run {path} lists")
    if not path.is_file():
        raise UserError(f"{path} does not exist; list a folder's experiments with: python -m distill.run FOLDER")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file; an experiment is a .py file with a function config()")
    module = importlib.util.module_from_spec(spec)
    try:
        # What a file prints is no part of what a command says on its standard output.
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
            config = getattr(module, "config", None)
            experiment = config() if callable(config) else None
    except SystemExit as error:
        raise UserError(f"{_place(error, path)}: it ends the process; let config() return an Experiment") from None
    except RecursionError as error:
        raise UserError(f"{_place(error, path)}: it calls itself without an end; mend the recursion") from None
    except OSError as error:
        raise UserError(f"{_place(error, path)}: {error.filename or path}: {error.strerror or error}") from None
    except SyntaxError as error:
        file = path if error.filename is None or Path(error.filename).resolve() == path.resolve() else error.filename
        raise UserError(f"{file}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        said = _explained(error)
        if said is None:
            raise
        raise UserError(f"{_place(error, path)}: {said}") from None
    if not callable(config):
        raise UserError(f"{path} has no function config(); it must return an Experiment")
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path}: config() returned {type(experiment).__name__}, not an Experiment")
    return experiment


def listed(folder: Path) -> Iterator[tuple[Path, str]]:
    """The experiment files of a folder with their descriptions, or what is wrong with them.

    Raises UserError where there is none.
    """
    files = [file for file in sorted(folder.glob("*.py")) if "def config(" in file.read_text(errors="replace")]
    if not files:
        raise UserError(f"{folder} holds no experiment: no .py file with a function config()")
    for file in files:
        try:
            yield file, load_experiment(file).description
        except UserError as error:
            yield file, f"error: {error}"
        except Exception as error:  # noqa: BLE001 - whatever one file does, the others are still there
            yield file, f"error: {_place(error, file)}: {type(error).__name__}: {' '.join(str(error).split())}"


def _place(error: BaseException, path: Path) -> str:
    """The file, with the line of it in which the error came up."""
    own = path.resolve()
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == own
    ]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _explained(error: Exception) -> str | None:
    """What a user can mend, as a sentence; None for an error of the file's own code."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ImportError):
        return _unimportable(error)
    if unknown := _UNKNOWN_FIELD.match(str(error)):
        return _unknown_field(*unknown.groups())
    if missing := _MISSING_FIELDS.fullmatch(str(error)):
        return f"{missing[1]} lacks {missing[2].replace(chr(39), '')}; give it"
    return None


def _unimportable(error: ImportError) -> str:
    if unknown := _UNKNOWN_NAME.match(error.msg):
        name, module = unknown.groups()
        near = difflib.get_close_matches(name, dir(sys.modules.get(module)), n=1)
        return f"{module} has no {name!r}" + (f"; perhaps you meant {near[0]!r}" if near else "; mend the import")
    if isinstance(error, ModuleNotFoundError) and error.name:
        near = difflib.get_close_matches(error.name, list(sys.modules), n=1)
        remedy = f"perhaps you meant {near[0]!r}" if near else "install it, or mend the import"
        return f"there is no module {error.name!r}; {remedy}"
    return " ".join(error.msg.split())


def _unknown_field(kind: str, field: str) -> str | None:
    classes = [one for one in _configuration_classes() if one.__name__ == kind]
    if not classes:
        return None
    known = [one.name for one in dataclasses.fields(classes[0]) if one.init]
    near = difflib.get_close_matches(field, known, n=1)
    return f"{kind} has no field {field!r}; " + (
        f"perhaps you meant {near[0]!r}" if near else f"it has {', '.join(known)}"
    )


def _configuration_classes() -> set[type]:
    """Experiment and every dataclass that a field of it, or of those, may hold."""
    found: set[type] = set()
    open_hints: list[Any] = [Experiment]
    while open_hints:
        hint = open_hints.pop()
        open_hints += typing.get_args(hint)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in found:
            found.add(hint)
            open_hints += typing.get_type_hints(hint).values()
    return found
