"""`report.html`: one file without scripts or network, made from what lies in the run directory.

The template decides how things look; this module decides what is shown and formats it. Everything that a model or a
user wrote passes through the template's autoescaping.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

from distill.monitor.metrics import METRICS_FILE, ROLLOUTS_FILE
from distill.monitor.progress import duration
from distill.monitor.records import Record, read_records
from distill.report import charts
from distill.report.curves import panels
from distill.report.results import (
    STUDENT_INITIAL,
    TEACHER,
    EvaluationRow,
    Report,
    StageCost,
    headline,
    headline_figure,
    headline_mode,
    mode_name,
    model_name,
    parameters,
    percent,
)
from qwen3.rollout import MODES

_MOST_ROLLOUTS_A_GROUP = 6


def render_page(run_dir: pathlib.Path, report: Report) -> str:
    """The page as HTML text.

    Raises:
      UserError: for a damaged `metrics.jsonl` or `rollouts.jsonl`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.jinja").render(
        report=report,
        headline=headline(report).replace(" %", "\N{NO-BREAK SPACE}%"),
        headline_basis=_headline_basis(report),
        ladder=_ladder(report),
        facts=_facts(report),
        bars=_bars(report.rows),
        table=_table(report.rows),
        costs=_costs(report.stages),
        panels=panels(read_records(run_dir / METRICS_FILE), [stage.name for stage in report.stages]),
        rollout_groups=_rollout_groups(read_records(run_dir / ROLLOUTS_FILE)),
        documents=[
            (title, text)
            for title, name in (("Configuration", "config.json"), ("Environment", "environment.json"))
            if (text := _pretty_json(run_dir / name)) is not None
        ]
        + ([("Provenance", json.dumps(report.provenance, indent=2, ensure_ascii=False))] if report.provenance else []),
    )


def _headline_basis(report: Report) -> str:
    mode, figure = headline_mode(report), headline_figure(report)
    if figure is None or mode is None:
        return ""
    problems = max(row.problems for row in report.rows if row.mode == mode)
    return f"{figure.name} in {mode_name(mode)} mode on {problems:,} held-out problems."


def _ladder(report: Report) -> list[dict[str, Any]]:
    """The headline's figure, large: one rung a model that has it, thinking first."""
    rungs: list[dict[str, Any]] = []
    figure = headline_figure(report)
    if figure is None:
        return rungs
    for model in dict.fromkeys(row.model for row in report.rows):
        rows = sorted((row for row in report.rows if row.model == model), key=lambda row: MODES.index(row.mode))
        measured = [(mode_name(row.mode), figure.text(v)) for row in rows if (v := figure.of(row)) is not None]
        if not measured:
            continue
        (first_mode, first), *others = measured
        number, _, sign = first.partition(" ")
        rungs.append(
            {
                "caption": _caption(model, report),
                "figure": number,
                "unit": sign or figure.unit,
                "details": [first_mode] + [f"{text} {mode}" for mode, text in others],
                "kind": "teacher" if model == TEACHER else "student",
            }
        )
    return rungs


def _caption(model: str, report: Report) -> str:
    """A stage that the exported student never went through stands there to be compared with."""
    if model in (STUDENT_INITIAL, TEACHER):
        return model_name(model)
    return f"comparison: {model}" if report.lineage and model not in report.lineage else f"after {model}"


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = []
    if report.student_parameters is not None:
        facts.append(("Student", f"{parameters(report.student_parameters)} parameters"))
    if report.adapter_parameters is not None:
        facts.append(("Trained", f"{parameters(report.adapter_parameters)} parameters, in adapters"))
    if report.teacher_parameters is not None:
        facts.append(("Teacher", f"{parameters(report.teacher_parameters)} parameters"))
    if report.stages:
        facts.append(("Compute", f"{_engineering(sum(map(_stage_flops, report.stages)))}FLOP"))
    if report.wall_seconds is not None:
        facts.append(("Wall time", duration(report.wall_seconds)))
    return facts


def _bars(rows: Sequence[EvaluationRow]) -> markupsafe.Markup | None:
    bars = [
        charts.Bar(group=model_name(r.model), colour=r.mode, share=r.pass_at_1, stderr=r.pass_at_1_stderr)
        for r in rows
        if r.pass_at_1 is not None
    ]
    if not bars:
        return None
    return markupsafe.Markup(charts.bar_chart(bars, label="pass@1 by model and mode"))


def _table(rows: Sequence[EvaluationRow]) -> dict[str, Any]:
    ks = sorted({k for row in rows for k in row.pass_at_k})
    return {
        "ks": ks,
        "with_working": any(row.working_correct is not None for row in rows),
        "rows": [
            {
                "model": model_name(row.model) if index == 0 or rows[index - 1].model != row.model else "",
                "mode": row.mode,
                "mode_name": mode_name(row.mode),
                "pass_at_1": "–" if row.pass_at_1 is None else f"{100 * row.pass_at_1:.1f}",
                "stderr": None if row.pass_at_1_stderr is None else f"{100 * row.pass_at_1_stderr:.1f}",
                "pass_at_k": [percent(row.pass_at_k[k]) if k in row.pass_at_k else "–" for k in ks],
                "working": "–" if row.working_correct is None else percent(row.working_correct),
                "tokens": f"{row.mean_response_tokens:,.1f}",
                "answers": f"{row.problems:,} × {row.samples_per_problem}",
            }
            for index, row in enumerate(rows)
        ],
    }


def _costs(stages: Sequence[StageCost]) -> dict[str, Any] | None:
    if not stages:
        return None
    all_flops = sum(map(_stage_flops, stages))
    all_seconds = sum(stage.device_seconds for stage in stages)
    rows = []
    for stage in stages:
        flops = _stage_flops(stage)
        rows.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "steps": f"{stage.steps:,}",
                "trained": _engineering(stage.tokens_trained),
                "sampled": _engineering(stage.tokens_sampled),
                "flops": [
                    _engineering(value)
                    for value in (stage.student_train_flops, stage.student_sample_flops, stage.teacher_flops, flops)
                ],
                "flops_share": _share(flops, all_flops),
                "seconds": duration(stage.device_seconds),
                "seconds_share": _share(stage.device_seconds, all_seconds),
                "parts": _second_parts(stage),
            }
        )
    timed = any(row["parts"] for row in rows)
    return {"rows": rows, "timed": timed, "flops": _engineering(all_flops), "seconds": duration(all_seconds)}


def _second_parts(stage: StageCost) -> list[dict[str, Any]]:
    """How the device seconds divide, for the bar; empty if nothing was timed."""
    timed = [
        ("student trains", "student", stage.student_train_seconds),
        ("student generates", "student-light", stage.student_sample_seconds),
        ("teacher generates", "teacher-light", stage.teacher_generate_seconds),
        ("teacher scores", "teacher", stage.teacher_score_seconds),
    ]
    parts = [(name, colour, seconds) for name, colour, seconds in timed if seconds]
    if not parts or stage.device_seconds <= 0:
        return []
    rest = stage.device_seconds - sum(seconds for _, _, seconds in parts)
    if rest > 0.005 * stage.device_seconds:
        parts.append(("rest", "grid", rest))
    whole = sum(seconds for _, _, seconds in parts)
    return [
        {"name": name, "colour": colour, "percent": f"{100 * seconds / whole:.1f}", "seconds": duration(seconds)}
        for name, colour, seconds in parts
    ]


def _rollout_groups(rollouts: Sequence[Record]) -> list[dict[str, Any]]:
    """The latest rollouts of each stage and mode."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for rollout in rollouts:
        groups.setdefault((rollout["stage"], rollout["mode"]), []).append(rollout)
    return [
        {"stage": stage, "mode": mode, "mode_name": mode_name(mode), "rollouts": members[-_MOST_ROLLOUTS_A_GROUP:]}
        for (stage, mode), members in groups.items()
    ]


def _pretty_json(path: pathlib.Path) -> str | None:
    if not path.exists():
        return None
    return json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2, ensure_ascii=False)


def _stage_flops(stage: StageCost) -> float:
    return stage.student_train_flops + stage.student_sample_flops + stage.teacher_flops


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def _engineering(value: float) -> str:
    """`1.23 T`, `45.6 G`, `1,024`; a dash for nothing."""
    if not value:
        return "–"
    for size, unit in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"
