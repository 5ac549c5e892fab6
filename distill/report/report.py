"""The result of a run: `report.json` for programs, `report.html` and a terminal table for people.

Everything shown is computed from the measured rows; nothing here knows what a good result would be.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable

from rich import box
from rich.table import Table

from distill.monitor.records import write_atomically
from distill.report.reading import REPORT_FILE
from distill.report.results import (
    FORWARD_KL,
    TEACHER,
    EvaluationRow,
    Report,
    StageCost,
    headline,
    mode_name,
    model_name,
    percent,
)

PAGE_FILE = "report.html"

__all__ = [
    "PAGE_FILE",
    "EvaluationRow",
    "Report",
    "StageCost",
    "terminal_table",
    "write_report",
]


def write_report(run_dir: str | os.PathLike[str], report: Report) -> pathlib.Path:
    """Writes `report.json` and, from it and what else lies in `run_dir`, `report.html`; returns the page's path.

    Raises:
      UserError: if the directory is not writable.
    """
    # matplotlib takes a second to import, which no command pays that draws nothing.
    from distill.report.page import render_page

    directory = pathlib.Path(run_dir)
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / REPORT_FILE, text + "\n")
    page = directory / PAGE_FILE
    write_atomically(page, render_page(directory, report))
    return page


def terminal_table(report: Report) -> Table:
    """The measured rows, for the end of a run; fits 80 columns, so of pass@k only the largest k."""
    columns = [column for column in _columns(report) if any(column.cell(row) for row in report.rows)]
    answers = {f"{row.problems:,} problems{row.graded_note} × {row.samples_per_problem} samples" for row in report.rows}
    nats = ["KL: teacher‖student, nats a token"] if any(row.forward_kl is not None for row in report.rows) else []
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{report.experiment}: {headline(report)}",
        title_justify="left",
        title_style="bold",
        caption="; ".join([" or ".join(sorted(answers)), *nats]),
        caption_justify="left",
        header_style="dim",
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for index, row in enumerate(report.rows):
        first = index == 0 or report.rows[index - 1].model != row.model
        if first and index:
            table.add_section()
        table.add_row(
            model_name(row.model) if first else "",
            mode_name(row.mode),
            *(column.cell(row) for column in columns),
            style="dim" if row.model == TEACHER else None,
        )
    return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Column:
    heading: str
    cell: Callable[[EvaluationRow], str]
    """Empty where the row has no such figure; a column of empty cells is left out."""


def _columns(report: Report) -> list[_Column]:
    """Where there are answers they come first; where there are none, there is room for more about the teacher."""
    kl = _Column(heading="KL", cell=lambda row: _text(row.forward_kl, FORWARD_KL.text))
    tokens = _Column(heading="tokens", cell=lambda row: f"{row.mean_response_tokens:.1f}")
    if all(row.pass_at_1 is None for row in report.rows):
        return [
            kl,
            _Column(heading="perplexity", cell=lambda row: _text(row.perplexity, "{:.4g}".format)),
            _Column(heading="top-1", cell=lambda row: _text(row.top_1_agreement, percent)),
            _Column(heading="ended", cell=lambda row: _text(row.finished, percent)),
            tokens,
        ]
    ks = sorted({k for row in report.rows for k in row.pass_at_k})[-1:]
    return [
        _Column(heading="pass@1, %", cell=_pass_at_1),
        *(_Column(heading=f"pass@{k}", cell=functools.partial(_pass_at_k, k)) for k in ks),
        _Column(heading="working", cell=lambda row: _text(row.working_correct, percent)),
        kl,
        tokens,
    ]


def _pass_at_1(row: EvaluationRow) -> str:
    if row.pass_at_1 is None:
        return ""
    stderr = "" if row.pass_at_1_stderr is None else f" ± {100 * row.pass_at_1_stderr:.1f}"
    return f"{100 * row.pass_at_1:.1f}{stderr}"


def _pass_at_k(k: int, row: EvaluationRow) -> str:
    return _text(row.pass_at_k.get(k), percent)


def _text(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)
