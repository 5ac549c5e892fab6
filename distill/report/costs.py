"""What a run cost, by stage: the table, and bars of device time that share one scale."""

from collections.abc import Sequence
from typing import Any

from distill.monitor.progress import duration
from distill.report.lineage import stage_flops
from distill.report.results import StageCost

_LEAST_REST = 0.005


def cost_table(stages: Sequence[StageCost]) -> dict[str, Any] | None:
    """What the template shows of the stages' costs; None where there is no stage."""
    if not stages:
        return None
    all_flops = sum(map(stage_flops, stages))
    all_seconds = sum(stage.device_seconds for stage in stages)
    longest = max(stage.device_seconds for stage in stages)
    rows = []
    for stage in stages:
        flops = stage_flops(stage)
        rows.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "steps": f"{stage.steps:,}",
                "trained": engineering(stage.tokens_trained),
                "sampled": engineering(stage.tokens_sampled),
                "flops": [
                    engineering(value)
                    for value in (stage.student_train_flops, stage.student_sample_flops, stage.teacher_flops, flops)
                ],
                "flops_share": _share(flops, all_flops),
                "seconds": duration(stage.device_seconds),
                "seconds_share": _share(stage.device_seconds, all_seconds),
                "parts": _second_parts(stage),
                "length": f"{100 * stage.device_seconds / longest:.1f}" if longest else "0",
            }
        )
    timed = any(row["parts"] for row in rows)
    return {"rows": rows, "timed": timed, "flops": engineering(all_flops), "seconds": duration(all_seconds)}


def engineering(value: float) -> str:
    """`1.23 T`, `45.6 G`, `1,024`; a dash for nothing."""
    if not value:
        return "–"
    for size, unit in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


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
    if rest > _LEAST_REST * stage.device_seconds:
        parts.append(("rest", "grid", rest))
    whole = sum(seconds for _, _, seconds in parts)
    return [
        {"name": name, "colour": colour, "percent": f"{100 * seconds / whole:.1f}", "seconds": duration(seconds)}
        for name, colour, seconds in parts
    ]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"
