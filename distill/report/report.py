"""The result of a run: `report.json` for programs, `report.html` and a terminal table for people.

Everything shown is computed from the measured rows; nothing here knows what a good result would be.
"""

import json
import os
import pathlib

from rich import box
from rich.table import Table

from distill.monitor.records import write_atomically
from distill.report.page import render_page
from distill.report.results import TEACHER, EvaluationRow, Report, StageCost, headline, mode_name, model_name, percent

__all__ = ["EvaluationRow", "Report", "StageCost", "terminal_table", "write_report"]


def write_report(run_dir: str | os.PathLike[str], report: Report) -> pathlib.Path:
    """Writes `report.json` and, from it and what else lies in `run_dir`, `report.html`; returns the page's path.

    Raises:
      UserError: if the directory is not writable.
    """
    directory = pathlib.Path(run_dir)
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / "report.json", text + "\n")
    page = directory / "report.html"
    write_atomically(page, render_page(directory, report))
    return page


def terminal_table(report: Report) -> Table:
    """The measured rows, for the end of a run; fits 80 columns, so of pass@k only the largest k."""
    ks = sorted({k for row in report.rows for k in row.pass_at_k})[-1:]
    with_working = any(row.working_correct is not None for row in report.rows)
    answers = {f"{row.problems:,} problems × {row.samples_per_problem} samples" for row in report.rows}
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{report.experiment}: {headline(report)}",
        title_justify="left",
        title_style="bold",
        caption=" or ".join(sorted(answers)),
        caption_justify="left",
        header_style="dim",
    )
    table.add_column("model", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    for heading in ["pass@1, %", *(f"pass@{k}" for k in ks), *(["working"] if with_working else []), "tokens"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(report.rows):
        first = index == 0 or report.rows[index - 1].model != row.model
        if first and index:
            table.add_section()
        stderr = "" if row.pass_at_1_stderr is None else f" ± {100 * row.pass_at_1_stderr:.1f}"
        table.add_row(
            model_name(row.model) if first else "",
            mode_name(row.mode),
            f"{100 * row.pass_at_1:.1f}{stderr}",
            *(percent(row.pass_at_k[k]) if k in row.pass_at_k else "" for k in ks),
            *([_optional_percent(row.working_correct)] if with_working else []),
            f"{row.mean_response_tokens:.1f}",
            style="dim" if row.model == TEACHER else None,
        )
    return table


def _optional_percent(share: float | None) -> str:
    return "" if share is None else percent(share)
