"""`report.html`: one file without scripts or network, made from what lies in the run directory.

The templates decide how things look; these modules decide what is shown and format it. Everything that a model or a
user wrote passes through the templates' autoescaping.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from distill.monitor.metrics import read_metrics
from distill.monitor.time_left import duration
from distill.report.costs import cost_table, engineering
from distill.report.curves import panels
from distill.report.lineage import caption, exported, in_order, is_comparison, stage_flops
from distill.report.reading import read_rollouts
from distill.report.results import (
    PASS_AT_1,
    TEACHER,
    EvaluationRow,
    Figure,
    Report,
    headline,
    headline_figure,
    headline_mode,
    mode_name,
    parameters,
    with_error,
)
from distill.report.samples import side_by_side, training_groups
from distill.report.scores import bars, lengths, over_compute, score_parts, score_table
from qwen3.json_fields import read_object
from qwen3.rollout import MODES

_CHANGED = "+changes"


def render_page(run_dir: pathlib.Path, report: Report) -> str:
    """The page as HTML text.

    Raises:
      UserError: for a damaged `metrics.jsonl` or `rollouts.jsonl`.
    """
    rollouts = read_rollouts(run_dir)
    rungs, stages = _ladder(report), [stage.name for stage in report.stages]
    return template("template.html.jinja").render(
        report=report,
        headline=headline(report).replace(" %", "\N{NO-BREAK SPACE}%"),
        headline_basis=_headline_basis(report),
        ladders=[
            (title, inside)
            for title, aside in (("", False), ("Comparisons, not exported", True))
            if (inside := [rung for rung in rungs if rung["is_comparison"] == aside])
        ],
        facts=_facts(report),
        over_compute=over_compute(report),
        bars=bars(report),
        table=score_table(report),
        parts=score_parts(report),
        lengths=lengths(report),
        problems=side_by_side(rollouts, report),
        costs=cost_table(report.stages),
        panels=panels(read_metrics(run_dir), stages),
        rollout_groups=training_groups(rollouts, stages),
        again=_again(report),
        documents=[
            (title, text)
            for title, name in (("Configuration", "config.json"), ("Environment", "environment.json"))
            if (text := _pretty_json(run_dir / name)) is not None
        ]
        + ([("Provenance", json.dumps(report.provenance, indent=2, ensure_ascii=False))] if report.provenance else []),
    )


def template(name: str) -> jinja2.Template:
    """A template of this folder, whose values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _headline_basis(report: Report) -> str:
    mode, figure = headline_mode(report), headline_figure(report)
    if figure is None or mode is None:
        return ""
    rows = [row for row in report.rows if row.mode == mode]
    problems = max(row.graded_problems or row.problems if figure is PASS_AT_1 else row.problems for row in rows)
    return f"{figure.name} in {mode_name(mode)} mode on {problems:,} held-out problems."


def _ladder(report: Report) -> list[dict[str, Any]]:
    """The headline's figure, large: one rung a model that has it, thinking first."""
    figure = headline_figure(report)
    rungs = []
    for model in in_order(report) if figure is not None else []:
        assert figure is not None
        rows = sorted((row for row in report.rows if row.model == model), key=lambda row: MODES.index(row.mode))
        measured = [row for row in rows if figure.of(row) is not None]
        if not measured:
            continue
        number, _, rest = _figure_text(measured[0], figure).partition(" ")
        rungs.append(
            {
                "caption": caption(model, report),
                "figure": number,
                "unit": rest,
                "details": [
                    mode_name(measured[0].mode),
                    *(f"{_figure_text(row, figure)} {mode_name(row.mode)}" for row in measured[1:]),
                ],
                "kind": "teacher" if model == TEACHER else "student",
                "is_exported": model == exported(report),
                "is_comparison": is_comparison(model, report),
            }
        )
    return rungs


def _figure_text(row: EvaluationRow, figure: Figure) -> str:
    """The row's figure with its unit, and with its error where it has one."""
    value = figure.of(row)
    assert value is not None
    if figure is PASS_AT_1:
        return f"{with_error(value, row.pass_at_1_stderr)} %"
    return f"{figure.text(value)} {figure.unit}".strip()


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = []
    if report.student_parameters is not None:
        facts.append(("Student", f"{parameters(report.student_parameters)} parameters"))
    if report.adapter_parameters is not None:
        facts.append(("Trained", f"{parameters(report.adapter_parameters)} parameters, in adapters"))
    if report.teacher_parameters is not None:
        facts.append(("Teacher", f"{parameters(report.teacher_parameters)} parameters"))
    if report.stages:
        facts.append(("Compute", f"{engineering(sum(map(stage_flops, report.stages)))}FLOP"))
    if report.wall_seconds is not None:
        facts.append(("Wall time", duration(report.wall_seconds)))
    return facts


def _again(report: Report) -> tuple[Sequence[str], str] | None:
    """The lines of a shell that repeat the run, and what to know about them; None where the command is not known."""
    command, commit = report.provenance.get("command"), report.provenance.get("commit")
    if not isinstance(command, str):
        return None
    if not isinstance(commit, str):
        return [command], "Which commit of the code ran is not known."
    checkout = f"git checkout {commit.removesuffix(_CHANGED)}"
    note = "The code had changes that are in no commit. " if commit.endswith(_CHANGED) else ""
    return [checkout, command], note


def _pretty_json(path: pathlib.Path) -> str | None:
    if not path.exists():
        return None
    return json.dumps(
        read_object(path, "run the command again", damaged="run the command again"), indent=2, ensure_ascii=False
    )
