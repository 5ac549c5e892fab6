"""What lies in the directory of a finished run, read back and checked: `report.json` and its rows and costs."""

import collections.abc
import dataclasses
import math
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union

from distill.monitor.metrics import ROLLOUTS_FILE, RolloutSample
from distill.monitor.records import read_records
from distill.report.results import Report
from qwen3.errors import UserError
from qwen3.field_types import described, misfit
from qwen3.json_fields import read_object

REPORT_FILE = "report.json"
_RESTORE = "restore it, or run the command again"

Kind = TypeVar("Kind")


def read_report(run_dir: pathlib.Path) -> Report:
    """The report of a run that has finished.

    Raises:
      UserError: where `run_dir` is no directory of a finished run, or its report is damaged.
    """
    file = run_dir / REPORT_FILE
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder; name the directory of a finished run, such as runs/NAME")
    if not file.exists():
        if (run_dir / "config.json").exists():
            raise UserError(
                f"{run_dir} has no {REPORT_FILE}: its run has not finished; the same command goes on with it"
            )
        inside = sorted(str(found.parent) for found in run_dir.glob(f"*/{REPORT_FILE}"))
        hint = f"perhaps you meant {' '.join(inside[:4])}" if inside else "name a folder that distill.run has made"
        raise UserError(f"{run_dir} has no {REPORT_FILE} and is no run directory; {hint}")
    return from_json(Report, read_object(file, _RESTORE, damaged=_RESTORE), str(file))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownRollout(RolloutSample):
    """A line of `rollouts.jsonl`."""

    stage: str
    """The stage that it was trained on in; of a held-out problem's, the model that gave it."""
    step: int
    held_out: bool = False
    """Whether an evaluation kept it."""


def read_rollouts(run_dir: pathlib.Path) -> list[ShownRollout]:
    """What `rollouts.jsonl` holds; UserError for a line that is no rollout."""
    file = run_dir / ROLLOUTS_FILE
    return [from_json(ShownRollout, record, f"{file}:{n}") for n, record in enumerate(read_records(file), start=1)]


def from_json(kind: type[Kind], raw: Any, where: str) -> Kind:
    """The `kind`, a dataclass, that was written as this JSON data; keys that it does not know are passed over.

    Raises:
      UserError: naming the value by `where` and its key, if it is missing or of another type.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: {raw!r} is not an object of {kind.__name__}'s fields")
    assert dataclasses.is_dataclass(kind)
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        if field.name in raw:
            values[field.name] = _value(raw[field.name], hints[field.name], f"{where}: {field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {field.name} is missing")
    try:
        return typing.cast(Kind, kind(**values))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _value(raw: Any, hint: Any, where: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (part for part in parts if part is not types.NoneType)
        return None if raw is None else _value(raw, inner, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, raw, where)
    if origin is collections.abc.Mapping and isinstance(raw, dict):
        keys, values = parts
        try:
            return {keys(key): _value(value, values, f"{where}.{key}") for key, value in raw.items()}
        except ValueError:
            raise UserError(f"{where} has the keys {', '.join(raw)}; each must be {described(keys)}") from None
    if origin in (collections.abc.Sequence, tuple) and isinstance(raw, list):
        return tuple(_value(value, parts[0], f"{where}[{index}]") for index, value in enumerate(raw))
    if origin in (collections.abc.Mapping, collections.abc.Sequence, tuple):
        raise UserError(
            f"{where} is {raw!r}; it must be {'an object' if origin is collections.abc.Mapping else 'a list'}"
        )
    if isinstance(raw, float) and not math.isfinite(raw):
        raise UserError(f"{where} is {raw}; it must be a finite number")
    if problem := misfit(raw, hint, where):
        raise UserError(problem)
    return raw
