"""How much of a whole run is left, as far as its own pace says: what has no pace yet is named, not guessed."""

import dataclasses
from collections.abc import Sequence
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A task of the run, shown as a bar of its own."""

    title: str
    """Of the bar."""
    kind: Literal["stage", "evaluation"]
    whose: str
    """The stage, or the model that is evaluated."""
    place: str
    """Where in the run this is, such as `stage 2 of 4`."""
    pace: str | None = None
    """Parts of one pace take equally long; None for one that is like no other."""


class TimeLeft:
    """The parts of a run that are still to come, and how long those have taken that are done."""

    def __init__(self, parts: Sequence[Part] = ()):
        self._parts = len(parts)
        self._coming = list(parts)
        self._current: Part | None = None
        self._seconds_of_pace: dict[str | None, float] = {}

    def begin(self, title: str) -> None:
        """The part of this title begins; those before it are done. A title that is no part's changes nothing."""
        titles = [part.title for part in self._coming]
        if title in titles:
            self._current = self._coming[titles.index(title)]
            self._coming = self._coming[titles.index(title) + 1 :]

    def end(self, title: str, seconds: float) -> None:
        """The part of this title has taken so long, all of it."""
        if self._current is not None and self._current.title == title and self._current.pace is not None:
            self._seconds_of_pace[self._current.pace] = seconds

    @property
    def done(self) -> tuple[int, int]:
        """How many parts are done, of how many."""
        return max(0, self._parts - len(self._coming) - 1), self._parts

    @property
    def place(self) -> str:
        return "" if self._current is None else self._current.place

    def describe(self, of_current_seconds: float | None) -> str:
        """`~ 5 min and 2 stages left`, where the present part takes `of_current_seconds` more; empty if unknown."""
        paces = self._seconds_of_pace
        if of_current_seconds is None and self._current is not None:
            of_current_seconds = paces.get(self._current.pace)
        known = [paces[part.pace] for part in self._coming if part.pace in paces]
        # A stage is one, however many bars it has.
        unknown = {(part.kind, part.whose) for part in self._coming if part.pace not in paces}
        if of_current_seconds is None and self._current is not None:
            unknown.add((self._current.kind, self._current.whose))
        seconds = sum(known) + (of_current_seconds or 0.0)
        parts = [f"~{duration(seconds)}"] if known or of_current_seconds is not None else []
        for kind in ("stage", "evaluation"):
            count = sum(1 for other, _ in unknown if other == kind)
            parts += [f"{count} {kind}{'s' if count > 1 else ''}"] if count else []
        return f"{' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[1:] else parts)} left" if parts else ""


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `5 min 08 s`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
