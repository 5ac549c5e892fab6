"""From `metrics.jsonl` to the report's panels: which metrics share a chart, what it is called, in what order.

A metric `group/series` is a line of the panel `group`; a bare `group` beside it is the line "all". Metrics that this
module has not heard of get a panel by their name, after the known ones.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import markupsafe

from distill.monitor.records import Record
from distill.report import charts
from distill.report.results import mode_name

_OVERALL = "all"
_LARGEST = 1e300
"""Whatever is larger has no range that could be drawn."""
Lines = dict[str, dict[str, dict[int, float]]]
"""Values by line, stage and step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Texts:
    title: str
    unit: str = ""
    note: str = ""


_NATS, _SHARE, _TOKENS = "nats a token", "share", "tokens"
_TEXTS = {
    "loss": _Texts(title="Loss", unit=_NATS, note="Stages may minimise different divergences."),
    "divergence": _Texts(title="Divergence by mode", unit=_NATS, note="What the stage minimises."),
    "entropy": _Texts(title="Entropy", unit=_NATS, note="With stored top-k, the teacher's is a lower bound."),
    "student_entropy": _Texts(title="Student entropy by mode", unit=_NATS),
    "teacher_entropy": _Texts(title="Teacher entropy by mode", unit=_NATS),
    "top1_agreement": _Texts(
        title="Top-1 agreement", unit=_SHARE, note="Of tokens where student and teacher rank the same first."
    ),
    "teacher_tail_mass": _Texts(
        title="Teacher tail mass", unit="probability", note="Of all tokens but the stored top-k."
    ),
    "student_support_mass": _Texts(
        title="Student mass on the teacher's support",
        unit="probability",
        note="Of the tokens that the loss sees one by one.",
    ),
    "reward": _Texts(title="Reward of the training rollouts", note="Before it is set against its group's."),
    "reward_failures": _Texts(
        title="Rewards that could not be had", unit=_SHARE, note="Verifier or reward raised, or did not come to an end."
    ),
    "group_outcomes": _Texts(
        title="Outcomes of groups",
        unit=_SHARE,
        note="Equal rewards for all responses to a prompt teach nothing. Groups that were replaced count as well.",
    ),
    "kept_tokens": _Texts(
        title="Generated tokens that are learned from", unit=_SHARE, note="The others' groups had no signal."
    ),
    "policy_loss": _Texts(title="Policy loss", note="Its gradient matters, not its value."),
    "policy_ratio": _Texts(title="Probability ratio", note="Current weights to those that generated."),
    "clipped": _Texts(title="Clipped tokens", unit=_SHARE, note="That the ratio's bounds hold back."),
    "clipped_low": _Texts(title="Tokens clipped below, by mode", unit=_SHARE),
    "clipped_high": _Texts(title="Tokens clipped above, by mode", unit=_SHARE),
    "sampler_mismatch": _Texts(
        title="Engine against trainer", unit=_NATS, note="|difference| of log-probabilities by the same weights."
    ),
    "corrected": _Texts(title="Corrected tokens", unit=_SHARE, note="By engine against trainer."),
    "reference_kl": _Texts(title="KL to the stage's start", unit=_NATS),
    "entropy_coefficient": _Texts(title="Weight of the entropy bonus"),
    "accuracy": _Texts(title="Accuracy of the training rollouts", unit=_SHARE, note="Of right answers."),
    "response_tokens": _Texts(title="Length of the training rollouts", unit=_TOKENS),
    "finished": _Texts(title="Finished training rollouts", unit=_SHARE, note="The length limit cut the others off."),
    "chosen_tokens": _Texts(
        title="Tokens that are learned from", unit=_SHARE, note="Those at which the student was least sure."
    ),
    "rollouts_in_full": _Texts(
        title="Rollouts that run in full", unit=_SHARE, note="The others are prefixes, which grow step by step."
    ),
    "never_stopped": _Texts(
        title="Rollouts that never stop", unit=_SHARE, note="Of those that run in full, cut off by the budget."
    ),
    "staleness": _Texts(
        title="Lag of the rollouts", unit="updates", note="By which the weights that generated them are older."
    ),
    "load_balance": _Texts(title="Expert load balance", note="1 where all experts are used alike."),
    "gradient_norm": _Texts(title="Gradient norm", note="Before clipping."),
    "learning_rate": _Texts(title="Learning rate"),
    "tokens_per_second_per_device": _Texts(title="Speed", unit="tokens/s a device"),
    "mfu": _Texts(
        title="Model FLOPs utilisation", unit=_SHARE, note="Of the chips' bfloat16 peak, while the student trains."
    ),
    "memory_gib": _Texts(title="Memory", unit="GiB", note="The most that a device has held, or the process on a CPU."),
    "padding_fraction": _Texts(title="Padding", unit=_SHARE, note="Of the places in a batch."),
    "rollout_wait_seconds": _Texts(title="Wait for rollouts", unit="seconds", note="That training has waited."),
}


def panels(metrics: Sequence[Record], stage_order: Sequence[str]) -> list[charts.Chart]:
    """One chart a group of metrics that has any value, the stages that have some one after the other."""
    stages = list(dict.fromkeys([*stage_order, *(record["stage"] for record in metrics)]))
    last = {stage: max((r["step"] for r in metrics if r["stage"] == stage), default=0) for stage in stages}
    # By step, so that a row written twice counts once.
    values: dict[str, Lines] = {}
    for record in metrics:
        for name, value in record["scalars"].items():
            group, line = _place(name)
            piece = values.setdefault(group, {}).setdefault(line, {}).setdefault(record["stage"], {})
            piece[record["step"]] = math.nan if value is None or abs(value) > _LARGEST else value
    order = list(_TEXTS)
    known = sorted((group for group in values if group in _TEXTS), key=order.index)
    return [
        _panel(group, values[group], {stage: last[stage] for stage in stages if _has_value(values[group], stage)})
        for group in [*known, *sorted(values.keys() - set(known))]
        if any(_has_value(values[group], stage) for stage in stages)
    ]


def _has_value(lines: Lines, stage: str) -> bool:
    return any(math.isfinite(value) for pieces in lines.values() for value in pieces.get(stage, {}).values())


def _panel(group: str, lines: Lines, steps: Mapping[str, int]) -> charts.Chart:
    """The chart of a group in the stages that have values of it, which took so many steps."""
    texts = _TEXTS.get(group) or _Texts(title=group.replace("_", " ").capitalize())
    if set(lines) == {_OVERALL}:
        # Alone it is the metric itself: the name tells whose it is, and with it the colour.
        lines = {group: lines[_OVERALL]}
    begins = dict(zip(steps, itertools.accumulate(steps.values(), initial=0), strict=False))
    series = [
        charts.Series(
            name=name,
            pieces=[
                ([begins[stage] + step for step in pieces[stage]], list(pieces[stage].values()))
                for stage in steps
                if stage in pieces
            ],
        )
        for name, pieces in lines.items()
    ]
    spans = [
        charts.Span(name=stage, begin=begins[stage], end=begins[stage] + count)
        for stage, count in steps.items()
        if count
    ]
    colours = [charts.colour_of(line.name, index) for index, line in enumerate(series)]
    legend = [(mode_name(line.name), colour) for line, colour in zip(series, colours, strict=True)]
    return charts.Chart(
        title=texts.title,
        note=texts.note,
        legend=legend if len(series) > 1 else [],
        svg=markupsafe.Markup(charts.line_chart(series, spans, label=texts.title, unit=texts.unit)),
    )


def _place(metric: str) -> tuple[str, str]:
    """Panel and line of a metric; both entropies belong side by side, and both ends of a clip."""
    if metric in ("student_entropy", "teacher_entropy"):
        return "entropy", metric.removesuffix("_entropy")
    if metric in ("clipped_low", "clipped_high"):
        return "clipped", metric.removeprefix("clipped_")
    group, _, line = metric.partition("/")
    return group, line or _OVERALL
