"""The page and the terminal tables of several runs: means and spreads by variant, and what they cost."""

from collections.abc import Callable, Sequence
from typing import Any

import markupsafe
from rich import box
from rich.table import Table

from distill.monitor.progress import duration
from distill.report import charts
from distill.report.costs import engineering
from distill.report.drawing import COLOURS, VARIABLES
from distill.report.joined import Spread, Variant, differences, evaluated
from distill.report.lineage import exported, is_comparison, stage_flops, starts, total_flops
from distill.report.page import template
from distill.report.results import (
    STUDENT_INITIAL,
    TEACHER,
    EvaluationRow,
    Figure,
    Report,
    StageCost,
    headline_figure,
    headline_mode,
    mode_name,
    model_name,
    when,
)
from qwen3.rollout import MODES, Mode

_Of = Callable[[EvaluationRow], float | None]
_SHARES: Sequence[tuple[str, _Of, float, int]] = (
    ("pass@1, %", lambda row: row.pass_at_1, 100, 1),
    ("working right, %", lambda row: row.working_correct, 100, 1),
    ("cut off, %", lambda row: None if row.finished is None else 1 - row.finished, 100, 1),
    ("KL, nats a token", lambda row: row.forward_kl, 1, 4),
    ("tokens", lambda row: row.mean_response_tokens, 1, 1),
)
"""Heading, figure, scale and digits of the columns."""


_TEXTS = ("model", "mode", "variant", "stage")


def render_joined(variants: Sequence[Variant]) -> str:
    """The page as HTML text."""
    first = variants[0].runs[0].report
    headings, rows = _score_rows(variants)
    cost_headings, cost_rows = _cost_rows(variants)
    return template("joined.html.jinja").render(
        title=", ".join(variant.name for variant in variants),
        headline=_headline(variants),
        rungs=_rungs(variants),
        charts=_over_compute(variants, first),
        headings=headings,
        rows=rows,
        cost_headings=cost_headings,
        cost_rows=cost_rows,
        variants=[variant.name for variant in variants],
        differences=differences(variants),
        runs=[
            (variant.name, run.config.get("seed", "?"), str(run.directory))
            for variant in variants
            for run in variant.runs
        ],
    )


def tables(variants: Sequence[Variant], *, plain: bool) -> list[Table]:
    """What the page's tables say, for a terminal; `plain` as Markdown, to be kept in a file."""
    shown = []
    for title, (headings, rows) in (
        (_headline(variants), _score_rows(variants)),
        ("Cost, mean of the runs", _cost_rows(variants)),
    ):
        table = Table(
            box=box.MARKDOWN if plain else box.SIMPLE_HEAD,
            title=title,
            title_justify="left",
            title_style="bold",
            header_style="dim",
        )
        for heading in headings:
            table.add_column(heading, justify="left" if heading in _TEXTS else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    return shown


def _headline(variants: Sequence[Variant]) -> str:
    count = sum(len(variant.runs) for variant in variants)
    kinds = f"{len(variants)} variants, " if len(variants) > 1 else ""
    spread = "mean ± standard deviation over seeds" if any(len(v.runs) > 1 for v in variants) else "one run each"
    return f"{count} run{'s' * (count > 1)}, {kinds}{spread}"


def _rungs(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The exported student of each variant, in the mode and by the figure that its report leads with."""
    rungs = []
    for index, variant in enumerate(variants):
        report = variant.runs[0].report
        figure, mode, model = headline_figure(report), headline_mode(report), _last(report)
        spread = variant.spread(model, mode, figure.of) if figure and mode else None
        if figure and mode and spread:
            number, _, rest = _text(spread, figure).partition(" ")
            rungs.append(
                {
                    "caption": variant.name,
                    "colour": _variable(index),
                    "figure": number,
                    "unit": f"{rest} {figure.unit or '%'}".strip(),
                    "details": [f"{figure.name} {when(model)}, {mode_name(mode)}", variant.seeds],
                }
            )
    return rungs


def _over_compute(variants: Sequence[Variant], first: Report) -> list[charts.Chart]:
    """A chart a mode: the mean of each model over the mean FLOPs that led to it, a colour a variant."""
    figure = headline_figure(first)
    drawn = []
    for mode in MODES if figure else ():
        assert figure is not None
        reached = [
            one
            for index, variant in enumerate(variants)
            for one in _reached(variant, mode, figure, index, len(variants))
        ]
        if not any(one.start for one in reached):
            continue
        spread = variants[0].spread(TEACHER, mode, figure.of)
        references = [_point(TEACHER, 0.0, spread, figure, None, TEACHER)] if spread else []
        title = f"{figure.name} against compute, {mode_name(mode)}"
        svg = charts.flops_chart(
            reached,
            references,
            label=title,
            unit=f"{figure.name}, {figure.unit or '%'}",
            highest=None if figure.unit else 100.0,
        )
        legend = [(variant.name, _variable(index)) for index, variant in enumerate(variants)]
        drawn.append(charts.Chart(title=title, legend=legend if len(variants) > 1 else (), svg=markupsafe.Markup(svg)))
    return drawn


def _reached(variant: Variant, mode: Mode, figure: Figure, index: int, of_many: int) -> list[charts.Reached]:
    reports = [run.report for run in variant.runs]
    start = starts(reports[0])
    points: dict[str, charts.Reached] = {}
    for model in [STUDENT_INITIAL, *start]:
        spread = variant.spread(model, mode, figure.of)
        flops = Spread.of(total_flops(report).get(model) for report in reports)
        aside = is_comparison(model, reports[0])
        # Beside other variants, whose comparisons would be too many lines, the exported student's alone is drawn.
        if spread is None or flops is None or (aside and of_many > 1):
            continue
        name = variant.name if of_many > 1 and model == _last(reports[0]) else model_name(model) if of_many == 1 else ""
        colour = "quiet" if aside else list(COLOURS)[index % len(COLOURS)] if of_many > 1 else mode
        points[model] = _point(name, flops.mean, spread, figure, points.get(start.get(model, "")), colour, dashed=aside)
    return list(points.values())


def _point(
    name: str,
    flops: float,
    spread: Spread,
    figure: Figure,
    start: charts.Reached | None,
    colour: str,
    *,
    dashed: bool = False,
) -> charts.Reached:
    scale = 1 if figure.unit else 100
    return charts.Reached(
        name=name,
        flops=flops,
        value=scale * spread.mean,
        error=None if spread.deviation is None else scale * spread.deviation,
        start=start,
        colour=colour,
        dashed=dashed,
    )


def _score_rows(variants: Sequence[Variant]) -> tuple[list[str], list[list[str]]]:
    """Model, mode and variant, then every figure that any run has; pass@1 also run by run."""
    several = len(variants) > 1
    spreads = [
        (model, mode, variant, [variant.spread(model, mode, of) for _, of, _, _ in _SHARES])
        for model, mode in evaluated(variants)
        for variant in variants
        if variant.spread(model, mode, lambda row: row.mean_response_tokens)
    ]
    used = [i for i in range(len(_SHARES)) if any(found[i] for _, _, _, found in spreads)]
    by_run = any(len(variant.runs) > 1 for variant in variants) and 0 in used
    headings = ["model", "mode", *(["variant"] if several else []), *(_SHARES[i][0] for i in used)]
    rows = []
    for model, mode, variant, found in spreads:
        cells = [_cell(found[i], *_SHARES[i][2:]) for i in used]
        row = [model_name(model), mode_name(mode), *([variant.name] if several else []), *cells]
        rows.append([*row, _each(found[0])] if by_run else row)
    return ([*headings, "pass@1 by run"] if by_run else headings), rows


def _cost_rows(variants: Sequence[Variant]) -> tuple[list[str], list[list[str]]]:
    headings = ["stage", "variant", "steps", "FLOPs", "device time", "teacher generates", "teacher scores"]
    several = len(variants) > 1
    names = dict.fromkeys(stage.name for v in variants for run in v.runs for stage in run.report.stages)
    rows = []
    for name in names:
        for variant in variants:
            stages = [stage for run in variant.runs for stage in run.report.stages if stage.name == name]
            if stages:
                rows.append([name, *([variant.name] if several else []), *_stage_cells(stages)])
    for variant in variants:
        flops = [sum(map(stage_flops, run.report.stages)) for run in variant.runs]
        wall = Spread.of(run.report.wall_seconds for run in variant.runs)
        whole = f"{duration(wall.mean)} from command to report" if wall else ""
        total = [engineering(sum(flops) / len(flops)), whole, "", ""]
        rows.append(["together", *([variant.name] if several else []), "", *total])
    return [heading for heading in headings if several or heading != "variant"], rows


def _stage_cells(stages: Sequence[StageCost]) -> list[str]:
    def mean(of: Callable[[StageCost], float | None]) -> float | None:
        spread = Spread.of(of(stage) for stage in stages)
        return None if spread is None else spread.mean

    seconds = (
        mean(lambda stage: stage.device_seconds),
        mean(lambda stage: stage.teacher_generate_seconds),
        mean(lambda stage: stage.teacher_score_seconds),
    )
    return [
        f"{mean(lambda stage: stage.steps) or 0:,.0f}",
        engineering(mean(stage_flops) or 0),
        *("" if one is None else duration(one) for one in seconds),
    ]


def _last(report: Report) -> str:
    return exported(report) or (report.stages[-1].name if report.stages else STUDENT_INITIAL)


def _text(spread: Spread, figure: Figure) -> str:
    return spread.text(1, 4) if figure.unit else spread.text(100)


def _cell(spread: Spread | None, scale: float, digits: int) -> str:
    return "" if spread is None else spread.text(scale, digits)


def _each(spread: Spread | None) -> str:
    return "" if spread is None else ", ".join(f"{100 * value:.1f}" for value in spread.values)


def _variable(index: int) -> str:
    return VARIABLES[list(COLOURS.values())[index % len(COLOURS)]]
