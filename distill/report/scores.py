"""How good the models of a run are: over compute, in a table, by task and family, and how long their responses are."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import markupsafe

from distill.report import charts
from distill.report.drawing import COLOURS, VARIABLES
from distill.report.lineage import exported, in_order, is_comparison, starts, total_flops
from distill.report.results import (
    PASS_AT_1,
    STUDENT_INITIAL,
    TEACHER,
    EvaluationRow,
    Figure,
    Report,
    Score,
    headline_figure,
    mode_name,
    model_name,
    percent,
    with_error,
)
from qwen3.rollout import MODES

_MOST_GROUPS = 40


def over_compute(report: Report) -> list[charts.Chart]:
    """A chart a mode: what each model reached over the FLOPs that led to it, teacher included."""
    figure = headline_figure(report)
    if figure is None or not report.stages:
        return []
    drawn = []
    for mode in MODES:
        rows = {row.model: row for row in report.rows if row.mode == mode and figure.of(row) is not None}
        if not any(stage.name in rows for stage in report.stages):
            continue
        title = f"{figure.name} against compute, {mode_name(mode)}"
        svg = _flops_chart(report, rows, figure, colour=mode, label=title)
        drawn.append(charts.Chart(title=title, svg=markupsafe.Markup(svg)))
    return drawn


def _flops_chart(report: Report, rows: Mapping[str, EvaluationRow], figure: Figure, *, colour: str, label: str) -> str:
    totals, start = total_flops(report), starts(report)
    reached: dict[str, charts.Reached] = {}
    for model in [STUDENT_INITIAL, *start]:
        if model in rows:
            aside = is_comparison(model, report)
            reached[model] = charts.Reached(
                name=model_name(model),
                flops=totals[model],
                start=reached.get(start.get(model, "")),
                colour="quiet" if aside else colour,
                dashed=aside,
                **_level(rows[model], figure),
            )
    references = (
        [charts.Reached(name=TEACHER, flops=0, start=None, colour=TEACHER, **_level(rows[TEACHER], figure))]
        if TEACHER in rows
        else []
    )
    unit = f"{figure.name}, {figure.unit or '%'}"
    highest = None if figure.unit else 100.0
    return charts.flops_chart(list(reached.values()), references, label=label, unit=unit, highest=highest)


def _level(row: EvaluationRow, figure: Figure) -> dict[str, Any]:
    scale = 1 if figure.unit else 100
    value, error = figure.of(row), row.pass_at_1_stderr if figure is PASS_AT_1 else None
    assert value is not None
    return {"value": scale * value, "error": None if error is None else scale * error}


def bars(report: Report) -> markupsafe.Markup | None:
    """pass@1 by model and mode; None where nothing was graded."""
    order = in_order(report)
    drawn = [
        charts.Bar(group=model_name(row.model), colour=row.mode, share=row.pass_at_1, stderr=row.pass_at_1_stderr)
        for row in sorted(report.rows, key=lambda row: order.index(row.model))
        if row.pass_at_1 is not None
    ]
    return markupsafe.Markup(charts.bar_chart(drawn, label="pass@1 by model and mode")) if drawn else None


def score_table(report: Report) -> dict[str, Any]:
    """The measured rows, the comparisons last."""
    order = in_order(report)
    rows = sorted(report.rows, key=lambda row: order.index(row.model))
    ks = sorted({k for row in rows for k in row.pass_at_k})
    optional = [column for column in _OPTIONAL if any(column.of(row) is not None for row in rows)]
    return {
        "headings": [*(f"pass@{k}" for k in ks), *(column.heading for column in optional)],
        "notes": [column.note for column in optional if column.note],
        "graded": any(row.pass_at_1 is not None for row in rows),
        "rows": [
            {
                "model": model_name(row.model) if index == 0 or rows[index - 1].model != row.model else "",
                "is_exported": row.model == exported(report),
                "is_comparison": is_comparison(row.model, report),
                "mode_name": mode_name(row.mode),
                "pass_at_1": "–" if row.pass_at_1 is None else f"{100 * row.pass_at_1:.1f}",
                "stderr": None if row.pass_at_1_stderr is None else f"{100 * row.pass_at_1_stderr:.1f}",
                "cells": [
                    *(_or_dash(row.pass_at_k.get(k), percent) for k in ks),
                    *(_or_dash(column.of(row), column.text) for column in optional),
                ],
                "tokens": f"{row.mean_response_tokens:,.1f}",
                "answers": f"{row.problems:,} × {row.samples_per_problem}{row.graded_note}",
            }
            for index, row in enumerate(rows)
        ],
    }


def score_parts(report: Report) -> list[dict[str, Any]]:
    """pass@1 by task, family and teacher, where there are several: tables with a line a part and mode, a column a
    model."""
    tables: list[dict[str, Any]] = []
    kinds: tuple[tuple[str, Callable[[EvaluationRow], Mapping[str, Score]]], ...] = (
        ("task", lambda row: row.by_task),
        ("family", lambda row: row.by_family),
        ("teacher", lambda row: row.by_teacher),
    )
    for title, of in kinds:
        parts = {name: score.problems for row in report.rows for name, score in of(row).items()}
        shown = sorted(parts, key=lambda name: (-parts[name], name))[:_MOST_GROUPS]
        models = [model for model in in_order(report) if any(row.model == model and of(row) for row in report.rows)]
        if not models:
            continue
        scores: dict[tuple[str, str, str], Score] = {
            (row.model, row.mode, name): score for row in report.rows for name, score in of(row).items()
        }
        tables.append(
            {
                "title": title,
                "models": [(model_name(model), model == exported(report)) for model in models],
                "left_out": len(parts) - len(shown),
                "rows": [
                    {
                        "part": name if mode == modes[0] else "",
                        "problems": f"{parts[name]:,}",
                        "mode_name": mode_name(mode),
                        "cells": [_part(scores.get((model, mode, name))) for model in models],
                    }
                    for name in shown
                    for modes in [[mode for mode in MODES if any((m, mode, name) in scores for m in models)]]
                    for mode in modes
                ],
            }
        )
    return tables


def lengths(report: Report) -> list[charts.Chart]:
    """A histogram a mode of how long the responses are: of the first student, the exported one, and the teacher."""
    last = exported(report) or (report.stages[-1].name if report.stages else None)
    drawn = []
    for mode in MODES:
        rows = {row.model: row for row in report.rows if row.mode == mode and row.length_histogram is not None}
        outlines, legend = [], []
        for model, colour in ((STUDENT_INITIAL, "quiet"), (TEACHER, TEACHER), (last, "student")):
            row = rows.get(model) if model else None
            if row is not None and row.length_histogram is not None and row.length_histogram.counts:
                histogram = row.length_histogram
                outlines.append(charts.Outline(colour=colour, bin_tokens=histogram.bin_tokens, counts=histogram.counts))
                cut_off = "" if not row.finished or row.finished == 1 else f", {percent(1 - row.finished)} cut off"
                cut_off = ", all cut off" if row.finished == 0 else cut_off
                variable = "--quiet" if colour == "quiet" else VARIABLES[COLOURS[colour]]
                legend.append((f"{model_name(row.model)}{cut_off}", variable))
        if outlines:
            title = f"Length of responses, {mode_name(mode)}"
            drawn.append(
                charts.Chart(title=title, legend=legend, svg=markupsafe.Markup(charts.histogram(outlines, label=title)))
            )
    return drawn


def _part(score: Score | None) -> str:
    return "–" if score is None else with_error(score.pass_at_1, score.pass_at_1_stderr)


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Column:
    heading: str
    of: Callable[[EvaluationRow], float | None]
    text: Callable[[float], str] = percent
    note: str = ""


_OPTIONAL = (
    _Column(
        heading="Working right",
        of=lambda row: row.working_correct,
        note="Working right: the worked steps are right as well as the answer.",
    ),
    _Column(
        heading="Cut off",
        of=lambda row: None if row.finished is None else 1 - row.finished,
        note="Cut off: the length limit ended the response, which then counts as wrong.",
    ),
    _Column(
        heading="KL, nats a token",
        of=lambda row: row.forward_kl,
        text="{:.3g}".format,
        note="KL: of the student to the teacher, on the teacher's responses.",
    ),
    _Column(heading="Perplexity", of=lambda row: row.perplexity, text="{:.4g}".format),
    _Column(heading="Top-1 agreement", of=lambda row: row.top_1_agreement),
)
