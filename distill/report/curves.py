"""From `metrics.jsonl` to the report's panels: which metrics share a chart, what it is called, in what order.

A metric `group/series` is a line of the panel `group`; a bare `group` beside it is the line "all". Metrics that this
module has not heard of get a panel by their name, after the known ones.
"""

import dataclasses
import math
from collections.abc import Sequence

import markupsafe

from distill.monitor.records import Record
from distill.report import charts
from distill.report.results import mode_name

_OVERALL = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart with its texts; `legend` pairs each line's name with its CSS colour variable."""

    title: str
    note: str
    legend: Sequence[tuple[str, str]]
    svg: markupsafe.Markup


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Texts:
    title: str
    note: str = ""


_TEXTS = {
    "loss": _Texts(title="Loss", note="Nats a token; stages may minimise different divergences."),
    "divergence": _Texts(title="Divergence by mode", note="What the stage minimises, nats a token."),
    "pass_at_1": _Texts(title="pass@1 while training", note="Share of held-out problems."),
    "entropy": _Texts(title="Entropy", note="Nats a token; with stored top-k, the teacher's is a lower bound."),
    "student_entropy": _Texts(title="Student entropy by mode", note="Nats a token."),
    "teacher_entropy": _Texts(title="Teacher entropy by mode", note="Nats a token."),
    "top1_agreement": _Texts(
        title="Top-1 agreement", note="Share of tokens where student and teacher rank the same first."
    ),
    "teacher_tail_mass": _Texts(title="Teacher tail mass", note="Probability outside the stored top-k tokens."),
    "student_support_mass": _Texts(
        title="Student mass on the teacher's support", note="Probability that the loss sees token by token."
    ),
    "accuracy": _Texts(title="Accuracy of the training rollouts", note="Share of right answers."),
    "response_tokens": _Texts(title="Response length", note="Tokens."),
    "finished": _Texts(title="Finished responses", note="Share that ended in a stop token."),
    "load_balance": _Texts(title="Expert load balance"),
    "gradient_norm": _Texts(title="Gradient norm", note="Before clipping."),
    "learning_rate": _Texts(title="Learning rate"),
    "tokens_per_second": _Texts(title="Speed", note="Tokens a second."),
}


def panels(metrics: Sequence[Record], stage_order: Sequence[str]) -> list[Panel]:
    """One chart a group of metrics, the stages one after the other along the steps of the whole run."""
    stages = list(dict.fromkeys([*stage_order, *(record["stage"] for record in metrics)]))
    spans = _spans(metrics, stages)
    begins = dict.fromkeys(stages, 0.0) | {span.name: span.begin for span in spans}
    # By step, so that a row written twice (an evaluation repeated after a resume) counts once.
    values: dict[str, dict[str, dict[str, dict[float, float]]]] = {}
    for record in metrics:
        for name, value in record["scalars"].items():
            group, line = _place(name)
            piece = values.setdefault(group, {}).setdefault(line, {}).setdefault(record["stage"], {})
            piece[begins[record["stage"]] + record["step"]] = math.nan if value is None else value
    order = list(_TEXTS)
    known = sorted((group for group in values if group in _TEXTS), key=order.index)
    return [_panel(group, values[group], spans) for group in [*known, *sorted(values.keys() - set(known))]]


def _panel(group: str, lines: dict[str, dict[str, dict[float, float]]], spans: Sequence[charts.Span]) -> Panel:
    texts = _TEXTS.get(group, _Texts(title=group.replace("_", " ")))
    if set(lines) == {_OVERALL}:
        # Alone it is the metric itself: the name tells whose it is, and with it the colour.
        lines = {group: lines[_OVERALL]}
    series = [
        charts.Series(name=name, pieces=[(list(piece), list(piece.values())) for piece in pieces.values()])
        for name, pieces in lines.items()
    ]
    colours = [charts.colour_of(line.name, index) for index, line in enumerate(series)]
    legend = [(mode_name(line.name), colour) for line, colour in zip(series, colours, strict=True)]
    return Panel(
        title=texts.title,
        note=texts.note,
        legend=legend if len(series) > 1 else [],
        svg=markupsafe.Markup(charts.line_chart(series, spans, label=texts.title)),
    )


def _spans(metrics: Sequence[Record], stages: Sequence[str]) -> list[charts.Span]:
    spans: list[charts.Span] = []
    for stage in stages:
        steps = max((record["step"] for record in metrics if record["stage"] == stage), default=0)
        if steps:
            begin = spans[-1].end if spans else 0
            spans.append(charts.Span(name=stage, begin=begin, end=begin + steps))
    return spans


def _place(metric: str) -> tuple[str, str]:
    """Panel and line of a metric; the two entropies belong side by side."""
    if metric in ("student_entropy", "teacher_entropy"):
        return "entropy", metric.removesuffix("_entropy")
    group, _, line = metric.partition("/")
    return group, line or _OVERALL
