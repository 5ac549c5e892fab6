"""Several finished runs as one result: runs that differ in their seed alone are one variant, with means and spreads."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distill.report.lineage import in_order
from distill.report.reading import read_report
from distill.report.results import EvaluationRow, Report
from qwen3.errors import UserError
from qwen3.json_fields import read_object
from qwen3.rollout import MODES, Mode

_NO_VARIANT = ("name", "seed", "description")
"""What runs of one variant may differ in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run."""

    directory: pathlib.Path
    report: Report
    config: Mapping[str, Any]
    """Its resolved experiment, plain JSON data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Runs of one configuration, which differ in their seed."""

    name: str
    runs: Sequence[Run]

    @property
    def seeds(self) -> str:
        """`seeds 0, 1, 2`; a seed that is there twice is named twice."""
        seeds = [str(run.config.get("seed", "?")) for run in self.runs]
        return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"

    def spread(self, model: str, mode: Mode, of: Callable[[EvaluationRow], float | None]) -> "Spread | None":
        """Of one figure of a model in a mode over the runs that have it; None where none has."""
        rows = [row for run in self.runs for row in run.report.rows if (row.model, row.mode) == (model, mode)]
        return Spread.of(of(row) for row in rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """The values of one figure over runs."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterator[float | None]) -> "Spread | None":
        known = tuple(value for value in values if value is not None)
        return cls(values=known) if known else None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the runs around their mean, over n - 1; None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """`94.4 ± 1.3`."""
        deviation = "" if self.deviation is None else f" ± {scale * self.deviation:,.{digits}f}"
        return f"{scale * self.mean:,.{digits}f}{deviation}"


def read_runs(directories: Sequence[pathlib.Path]) -> list[Run]:
    """The finished runs in these directories.

    Raises:
      UserError: where one is no directory of a finished run, is damaged, or is named twice.
    """
    places = collections.Counter(os.path.realpath(directory) for directory in directories)
    for directory in directories:
        if places[os.path.realpath(directory)] > 1:
            raise UserError(f"{directory} is named twice; a run counts once")
    return [
        Run(
            directory=directory,
            report=read_report(directory),
            config=read_object(directory / "config.json", "restore it", damaged="restore it"),
        )
        for directory in directories
    ]


def variants_of(runs: Sequence[Run]) -> list[Variant]:
    """The runs by configuration, in the order in which the first run of each was named."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        what = {key: value for key, value in run.config.items() if key not in _NO_VARIANT}
        groups.setdefault(json.dumps(what, sort_keys=True), []).append(run)
    names = [_common_name([run.report.experiment for run in group]) for group in groups.values()]
    return [
        Variant(name=name if names.count(name) == 1 else f"{name} ({number})", runs=group)
        for number, (name, group) in enumerate(zip(names, groups.values(), strict=True), start=1)
    ]


def evaluated(variants: Sequence[Variant]) -> list[tuple[str, Mode]]:
    """The models and modes that any run has evaluated, in the order of the runs' own pages."""
    reports = [run.report for variant in variants for run in variant.runs]
    models = dict.fromkeys(model for report in reports for model in in_order(report))
    found = {(row.model, row.mode) for report in reports for row in report.rows}
    return [(model, mode) for model in models for mode in MODES if (model, mode) in found]


def differences(variants: Sequence[Variant]) -> list[tuple[str, list[str]]]:
    """The fields in which variants differ, with the value that each has; absent where it has no such field."""
    flat = [dict(_flattened(variant.runs[0].config)) for variant in variants]
    fields = dict.fromkeys(field for one in flat for field in one if field.split(".")[0] not in _NO_VARIANT)
    rows = [(field, [one.get(field, "absent") for one in flat]) for field in fields]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def _flattened(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flattened(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _common_name(names: Sequence[str]) -> str:
    """What the names begin with, up to where they are joined from parts."""
    columns = zip(*names, strict=False)
    begin = "".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    if len(set(names)) == 1:
        return names[0]
    # Of run-10 and run-11 the common part is run-1, which is another run.
    joint = max(begin.rfind(mark) for mark in "-_.")
    goes_on = any(name[len(begin) :][:1].isalnum() for name in names) and begin[-1:].isalnum()
    return (begin[:joint] if goes_on and joint > 0 else begin).rstrip("-_.") or names[0]
