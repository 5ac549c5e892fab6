"""The kinds of work that this project and its peers are measured at, the marks to reach, and the table of both."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence

from experiments.benchmarks.contest import Measured, Pace
from experiments.benchmarks.turns import Mode

OURS, TRL_GKD, TUNIX_LOGIT = "this project", "TRL GKD", "Tunix"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of work."""

    title: str
    size: str
    mode: Mode
    marks: Mapping[str, float]
    """Peer -> how many times as fast as it this project is to be."""
    memory_mark_mb: float | None = None
    """Most memory that this project may add to what it holds when its models are loaded."""
    batch_size: int | None = None
    """None: the size's own."""
    pace: Pace = dataclasses.field(default_factory=Pace)


_LONG = Pace(warm=2, rounds=6, seconds=90.0)
ROWS: Mapping[str, Row] = {
    "tiny-off": Row(title="tiny, off-policy", size="tiny", mode="off", marks={TRL_GKD: 1.2}),
    "vocab-off": Row(
        title="vocab, off-policy, exact KL",
        size="vocab",
        mode="off",
        marks={TUNIX_LOGIT: 2.2},
        memory_mark_mb=0.6 * 1024,
        pace=_LONG,
    ),
    "tiny-on": Row(title="tiny, on-policy", size="tiny", mode="on", marks={TRL_GKD: 2.5, TUNIX_LOGIT: 1.6}),
    "vocab-on": Row(title="vocab, on-policy", size="vocab", mode="on", marks={TRL_GKD: 4.0}, pace=_LONG),
    "sampler-8": Row(title="tiny, sampling, batch 8", size="tiny", mode="sample", marks={TUNIX_LOGIT: 2.0}),
    "sampler-64": Row(
        title="tiny, sampling, batch 64", size="tiny", mode="sample", marks={TUNIX_LOGIT: 2.0}, batch_size=64
    ),
}

_COLUMNS = (
    "work",
    "who",
    "s a step (range)",
    "steps",
    "of which sampling",
    "tokens/s",
    "peak MiB (before steps)",
    "first loss",
    "this project is",
    "mark",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A mark of one row and what was reached."""

    against: str
    """A contestant's name; this project's own for memory."""
    reached: str
    mark: str
    is_met: bool | None
    """None: too few undisturbed steps to say."""

    def __str__(self) -> str:
        return f"{self.mark}: {_WORDS[self.is_met]}"


_WORDS: Mapping[bool | None, str] = {True: "met", False: "missed", None: "not judged, disturbed"}


def verdicts(row: Row, contestants: Mapping[str, Measured]) -> Iterator[Verdict]:
    """Every mark of the row."""
    ours = contestants[OURS]
    if row.memory_mark_mb is not None:
        yield Verdict(
            against=OURS,
            reached=f"+{ours.added_rss_mb:,.0f} MiB",
            mark=f"≤ {row.memory_mark_mb:,.0f} MiB",
            is_met=ours.added_rss_mb <= row.memory_mark_mb,
        )
    for peer, mark in row.marks.items():
        ratio = contestants[peer].median_seconds / ours.median_seconds
        # Disturbance only slows down: a mark met while only this project was disturbed holds, and one missed while
        # only the peer was.
        telling = contestants[peer] if ratio >= mark else ours
        yield Verdict(
            against=peer,
            reached=f"{ratio:.2f} × as fast",
            mark=f"≥ {mark:g} ×",
            is_met=ratio >= mark if telling.is_quiet else None,
        )


def table(measured: Mapping[str, Mapping[str, Measured]]) -> str:
    """Markdown, one line for each contestant of each row that was measured."""
    lines: list[Sequence[str]] = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for name, contestants in measured.items():
        lines += _row_lines(ROWS[name], contestants)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summary(measured: Mapping[str, Mapping[str, Measured]]) -> str:
    """Every mark that was not reached or could not be judged, a Markdown list."""
    lines = [
        f"- {ROWS[name].title}, {verdict.against}: {verdict.reached}, mark {verdict}"
        for name, contestants in measured.items()
        for verdict in verdicts(ROWS[name], contestants)
        if not verdict.is_met
    ]
    return "\n".join(lines) or "All marks are met."


def _row_lines(row: Row, contestants: Mapping[str, Measured]) -> Iterator[Sequence[str]]:
    by_contestant = {verdict.against: verdict for verdict in verdicts(row, contestants)}
    for who, measured in contestants.items():
        counted, verdict = measured.counted_seconds, by_contestant.get(who)
        yield (
            row.title if who == OURS else "",
            who,
            f"{measured.median_seconds:.3f} ({min(counted):.3f}–{max(counted):.3f})",
            f"{len(counted)}" if measured.is_quiet else f"{len(counted)}, disturbed",
            f"{statistics.median(measured.sampling_seconds):.3f}" if measured.sampling_seconds else "",
            f"{measured.tokens_per_second:,.0f}",
            f"{measured.peak_rss_mb:,.0f} ({measured.peak_rss_mb_before:,.0f})",
            "" if measured.first_loss is None else f"{measured.first_loss:.4f}",
            verdict.reached if verdict else "",
            str(verdict) if verdict else "",
        )
