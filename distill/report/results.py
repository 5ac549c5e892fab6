"""What a run measured: the rows and costs that make up `report.json`, and the sentence that sums them up."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from qwen3.rollout import MODES, Mode

STUDENT_INITIAL = "student_initial"
TEACHER = "teacher"

_MOST_BINS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """pass@1 on a part of the held-out problems."""

    pass_at_1: float
    problems: int
    pass_at_1_stderr: float | None = None
    """Standard error over problems."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthHistogram:
    """How many responses have how many tokens."""

    bin_tokens: int
    """Width of a bin; the first one begins at 0."""
    counts: tuple[int, ...]
    """Responses by bin, up to the last bin that has any."""

    def __post_init__(self) -> None:
        if self.bin_tokens < 1 or any(count < 0 for count in self.counts):
            raise ValueError(
                f"a histogram of lengths has bins of {self.bin_tokens} tokens and the counts {self.counts}; give a "
                "width of at least 1 and counts that are not negative"
            )

    @classmethod
    def of(cls, lengths: Iterable[int], most_tokens: int) -> "LengthHistogram":
        """Of these lengths; `most_tokens`, the most that a response may have, alone decides the width of a bin."""
        width = 1 << max(0, (-(-(most_tokens + 1) // _MOST_BINS) - 1).bit_length())
        bins = [length // width for length in lengths]
        return cls(bin_tokens=width, counts=tuple(bins.count(index) for index in range(max(bins, default=-1) + 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One model in one mode on the held-out problems. Figures that were not measured stay None.

    The teacher answers every problem once; of every student the first response to each problem counts as its own. All
    divergences are exact over the whole vocabulary, means over the tokens that the policy chose.
    """

    model: str
    """`student_initial`, the name of a stage (the student after it), or `teacher`."""
    mode: Mode
    problems: int
    samples_per_problem: int
    mean_response_tokens: float
    finished: float | None = None
    """Share of responses that ended by themselves; the others met the length limit."""
    pass_at_1: float | None = None
    """Mean over the samples of all problems that have an answer, in [0, 1]; None where none has."""
    pass_at_k: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Unbiased estimates by k; empty if nothing was graded."""
    pass_at_1_stderr: float | None = None
    """Standard error over problems."""
    graded_problems: int | None = None
    """Problems that have an answer, over which pass@1 and pass@k are taken."""
    working_correct: float | None = None
    """Share of responses whose worked steps are right as well as the answer, over the tasks that can tell."""
    length_histogram: LengthHistogram | None = None
    """Of all responses, by their tokens."""
    by_task: Mapping[str, Score] = dataclasses.field(default_factory=dict)
    """By the name of the task; empty where there is one only."""
    by_family: Mapping[str, Score] = dataclasses.field(default_factory=dict)
    """By family, or `task/family` where there are several tasks; empty where there is one only."""
    by_teacher: Mapping[str, Score] = dataclasses.field(default_factory=dict)
    """By the teacher that is asked about a problem; empty where there is one only."""
    forward_kl_by_teacher: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """`forward_kl` on each one's responses; empty where there is one only."""
    forward_kl: float | None = None
    """KL(teacher‖student) on the teacher's responses, in nats a token."""
    reverse_kl: float | None = None
    """KL(student‖teacher) on the teacher's responses, in nats a token."""
    reverse_kl_own: float | None = None
    """KL(student‖teacher) on the student's own responses, in nats a token."""
    perplexity: float | None = None
    """On the teacher's responses; the teacher's own is what a student that had become its teacher would reach."""
    top_1_agreement: float | None = None
    """Share of the teacher's tokens before which both models think the same token likeliest."""
    compared_tokens: int | None = None
    """Tokens of the teacher's responses over which these are means."""

    @property
    def graded_note(self) -> str:
        """` (40 graded)` where only some of the problems have an answer, else nothing."""
        some = self.graded_problems and self.graded_problems < self.problems
        return f" ({self.graded_problems:,} graded)" if some else ""

    def __post_init__(self) -> None:
        shares = {"pass_at_1": self.pass_at_1, **{f"pass_at_k[{k}]": v for k, v in self.pass_at_k.items()}}
        shares |= {f"by_task[{name}]": score.pass_at_1 for name, score in self.by_task.items()}
        shares |= {f"by_family[{name}]": score.pass_at_1 for name, score in self.by_family.items()}
        shares |= {f"by_teacher[{name}]": score.pass_at_1 for name, score in self.by_teacher.items()}
        shares |= {name: getattr(self, name) for name in ("working_correct", "finished", "top_1_agreement")}
        for name, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{self.model}, {self.mode}: {name}={value} is not a share; pass a value in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage cost. Seconds are summed over devices; optional parts of them that were not timed stay None."""

    name: str
    kind: str
    """The class of the stage: `Sft`, `OffPolicy`, `OnPolicy`, `Grpo`."""
    steps: int
    tokens_trained: int
    tokens_sampled: int
    """Tokens that the teacher (off-policy) or the student (on-policy) generated."""
    student_train_flops: float
    student_sample_flops: float
    teacher_flops: float
    device_seconds: float
    start_from: str | None = None
    """Whose weights it started from: `student_initial` or a stage; None where that is not known: the stage before."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of every row, such as a report may lead with."""

    name: str
    unit: str
    of: Callable[[EvaluationRow], float | None]
    text: Callable[[float], str]


PASS_AT_1: Final = Figure(name="pass@1", unit="", of=lambda row: row.pass_at_1, text=lambda share: percent(share))
FORWARD_KL: Final = Figure(
    name="KL to the teacher", unit="nats a token", of=lambda row: row.forward_kl, text=lambda kl: f"{kl:.3g}"
)
FINISHED: Final = Figure(
    name="finished responses", unit="", of=lambda row: row.finished, text=lambda share: percent(share)
)


def headline_figure(report: Report) -> Figure | None:
    """What was measured of the rows in `headline_mode`: pass@1 before the KL to the teacher, and that before the share
    of responses that ended by themselves; None if nothing was evaluated."""
    rows = [row for row in report.rows if row.mode == headline_mode(report)]
    figures = (PASS_AT_1, FORWARD_KL, FINISHED)
    return next((figure for figure in figures if any(figure.of(row) is not None for row in rows)), None)


def headline(report: Report) -> str:
    """One sentence with the `headline_figure` before and after the last stage, in `headline_mode`."""
    figure, mode = headline_figure(report), headline_mode(report)
    if figure is None:
        return "Nothing was evaluated."
    told = {STUDENT_INITIAL, TEACHER, *(report.lineage or (stage.name for stage in report.stages))}
    rows = [row for row in report.rows if row.mode == mode and (row.model in told or not report.stages)]
    measured = {row.model: figure.text(value) for row in rows if (value := figure.of(row)) is not None}
    teacher = measured.pop(TEACHER, None)
    # Shares of right answers speak for themselves; every other figure is named, and its unit once.
    name = "" if figure is PASS_AT_1 else f"{figure.name} "
    first, last = f"{figure.unit} " if figure.unit else "", list(measured.items())[-2:]
    points = [f"{text} {'' if index else first}{when(model)}" for index, (model, text) in enumerate(last)]
    student = f"{parameters(report.student_parameters)} student".strip()
    sentence = f"{student[0].upper()}{student[1:]}: {name}{' → '.join(points)}" if points else ""
    if teacher is not None:
        reference = f"{parameters(report.teacher_parameters)} teacher: ".lstrip()
        sentence = (
            f"{sentence} ({reference}{teacher})" if points else f"{reference[0].upper()}{reference[1:]}{name}{teacher}"
        )
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


def with_error(share: float, error: float | None) -> str:
    """`95.2 ± 1.3`, in percent; without the error where it is not known."""
    return f"{100 * share:.1f}" if error is None else f"{100 * share:.1f} ± {100 * error:.1f}"


def mode_name(mode: str) -> str:
    return mode.replace("_", "-")


def parameters(count: int | None) -> str:
    """`0.13M`, `8.2B`; empty if unknown."""
    if count is None:
        return ""
    if count < 1_000_000_000:
        return f"{count / 1e6:.2f}M" if count < 10_000_000 else f"{count / 1e6:.0f}M"
    return f"{count / 1e9:.1f}B" if count < 100_000_000_000 else f"{count / 1e9:.0f}B"


def scalars_of(rows: Sequence[EvaluationRow]) -> dict[str, float]:
    """What was measured of one model as curves, by mode; what was not measured is absent."""
    scalars: dict[str, float | None] = {}
    for row in rows:
        scalars |= {
            f"pass_at_1/{row.mode}": row.pass_at_1,
            f"pass_at_1_stderr/{row.mode}": row.pass_at_1_stderr,
            **{f"pass_at_{k}/{row.mode}": share for k, share in row.pass_at_k.items()},
            f"held_out_response_tokens/{row.mode}": row.mean_response_tokens,
            f"held_out_finished/{row.mode}": row.finished,
            f"held_out_forward_kl/{row.mode}": row.forward_kl,
            **{f"held_out_forward_kl_{name}/{row.mode}": kl for name, kl in row.forward_kl_by_teacher.items()},
            f"held_out_reverse_kl/{row.mode}": row.reverse_kl,
            f"held_out_reverse_kl_own/{row.mode}": row.reverse_kl_own,
            f"held_out_perplexity/{row.mode}": row.perplexity,
            f"held_out_top_1_agreement/{row.mode}": row.top_1_agreement,
        }
    return {name: value for name, value in scalars.items() if value is not None}


def record_json(record: EvaluationRow | StageCost) -> dict[str, Any]:
    """One row or cost as plain JSON data; what was not measured is absent."""
    known = _plain(record)
    assert isinstance(known, dict)
    return known


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {name: one for name, one in fields.items() if one is not None and one != {}}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in sorted(value.items())}
    return list(value) if isinstance(value, tuple) else value
