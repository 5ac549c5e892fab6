"""What a run measured: the rows and costs that make up `report.json`, and the sentence that sums them up."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3.rollout import MODES, Mode

STUDENT_INITIAL = "student_initial"
TEACHER = "teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One model in one mode on the held-out problems. Optional figures that were not measured stay None."""

    model: str
    """`student_initial`, the name of a stage (the student after it), or `teacher`."""
    mode: Mode
    pass_at_1: float
    """Mean over problems and samples, in [0, 1]."""
    pass_at_k: Mapping[int, float]
    """Unbiased estimates by k; empty if there was one sample a problem."""
    problems: int
    samples_per_problem: int
    mean_response_tokens: float
    pass_at_1_stderr: float | None = None
    """Standard error over problems."""
    working_correct: float | None = None
    """Share of all responses whose worked steps are right as well as the answer."""

    def __post_init__(self) -> None:
        shares = {"pass_at_1": self.pass_at_1, **{f"pass_at_k[{k}]": v for k, v in self.pass_at_k.items()}}
        if self.working_correct is not None:
            shares["working_correct"] = self.working_correct
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{self.model}, {self.mode}: {name}={value} is not a share; pass a value in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage cost. Seconds are summed over devices; optional parts of them that were not timed stay None."""

    name: str
    kind: str
    """The class of the stage: `Sft`, `OffPolicy`, `OnPolicy`."""
    steps: int
    tokens_trained: int
    tokens_sampled: int
    """Tokens that the teacher (off-policy) or the student (on-policy) generated."""
    student_train_flops: float
    student_sample_flops: float
    teacher_flops: float
    device_seconds: float
    student_train_seconds: float | None = None
    student_sample_seconds: float | None = None
    teacher_generate_seconds: float | None = None
    teacher_score_seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that a finished run says about itself; the keys that the JSON must have come first."""

    experiment: str
    rows: Sequence[EvaluationRow]
    stages: Sequence[StageCost]
    description: str | None = None
    lineage: Sequence[str] = ()
    """Stages that the exported student went through; the others are comparisons. Empty: all of them."""
    student_parameters: int | None = None
    """Of the student as it is exported: merged adapters add none."""
    adapter_parameters: int | None = None
    """What was trained where the student has adapters; None: all of it."""
    teacher_parameters: int | None = None
    wall_seconds: float | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Plain JSON data: where things come from (seed, teacher folder, command, commit)."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; what was not measured is absent."""
        known = {name: value for name, value in vars(self).items() if value is not None and value not in ({}, ())}
        return known | {
            "rows": [record_json(row) for row in self.rows],
            "stages": [record_json(stage) for stage in self.stages],
        }


def headline(report: Report) -> str:
    """One sentence with pass@1 before and after the last stage, in `headline_mode`."""
    mode = headline_mode(report)
    if mode is None:
        return "Nothing was evaluated."
    told = {STUDENT_INITIAL, TEACHER, *(report.lineage or (stage.name for stage in report.stages))}
    rows = [row for row in report.rows if row.mode == mode and (row.model in told or not report.stages)]
    after = [row for row in rows if row.model not in (STUDENT_INITIAL, TEACHER)]
    teacher = next((row for row in rows if row.model == TEACHER), None)
    points = [f"{percent(row.pass_at_1)} {when(row.model)}" for row in rows if row.model != TEACHER]
    points = points[-2:] if len(after) >= 2 else points
    student = f"{parameters(report.student_parameters)} student".strip()
    sentence = f"{student[0].upper()}{student[1:]}: {' → '.join(points)}" if points else ""
    if teacher is not None:
        size = f"{parameters(report.teacher_parameters)} teacher".strip()
        reference = f"{size}: {percent(teacher.pass_at_1)}"
        sentence = f"{sentence} ({reference})" if sentence else f"{reference[0].upper()}{reference[1:]}"
    return f"{sentence}."


def headline_mode(report: Report) -> Mode | None:
    """Thinking where it was evaluated, else the other mode; None if nothing was evaluated."""
    return next((mode for mode in MODES if any(row.mode == mode for row in report.rows)), None)


def when(model: str) -> str:
    """`before training`, or `after` a stage."""
    return "before training" if model == STUDENT_INITIAL else f"after {model}"


def model_name(model: str) -> str:
    """A row's model as people read it."""
    return "student before" if model == STUDENT_INITIAL else model


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def mode_name(mode: str) -> str:
    return mode.replace("_", "-")


def parameters(count: int | None) -> str:
    """`0.13M`, `8.2B`; empty if unknown."""
    if count is None:
        return ""
    if count < 1_000_000_000:
        return f"{count / 1e6:.2f}M" if count < 10_000_000 else f"{count / 1e6:.0f}M"
    return f"{count / 1e9:.1f}B" if count < 100_000_000_000 else f"{count / 1e9:.0f}B"


def record_json(record: EvaluationRow | StageCost) -> dict[str, Any]:
    """One row or cost as plain JSON data; what was not measured is absent."""
    known = {name: value for name, value in vars(record).items() if value is not None}
    if "pass_at_k" in known:
        known["pass_at_k"] = {str(k): value for k, value in sorted(known["pass_at_k"].items())}
    return known
