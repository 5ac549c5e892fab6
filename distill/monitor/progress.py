"""Progress: bars in a terminal, plain lines in a log.

A stage and what happens inside it (sampling, evaluation) are nested tasks. In a terminal the rows of nested tasks stay
in place between visits, so that a loop of sampling and training does not flicker, and the first row says how far the
whole run is. Anywhere else (CI, `nohup`, a pipe) no control code is written: a line when enough time has passed. A task
that ends leaves a line in both.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from distill.monitor.terminal import make_console
from distill.monitor.time_left import Part, TimeLeft, duration

_SPEED_WINDOW_SECONDS = 30.0
_SHOWN_BYTES = 10**8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured over the last half minute; None until there are two points to measure between."""

    steps_per_second: float | None
    tokens_per_second: float | None


class Task:
    """One thing that advances in steps towards a total; made by `Progress.task`."""

    def __init__(self, owner: "Progress", name: str, *, total_steps: int, completed_steps: int, unit: str, depth: int):
        self.name = name
        self.unit = unit
        self.depth = depth
        self.total_steps = total_steps
        self.completed_steps = completed_steps
        self.tokens = 0
        self.values: dict[str, float] = {}
        self.result = ""
        """What came of it, for the line that it leaves in place of figures that no longer matter."""
        self.started_at = owner.clock()
        self.told_at = self.started_at
        self._owner = owner
        self._history: collections.deque[tuple[float, int, int]] = collections.deque()

    def advance(self, steps: int = 1, *, tokens: int = 0, values: Mapping[str, float] | None = None) -> None:
        """Notes `steps` more done, `tokens` processed in them, and what to show beside (`{"loss": 0.31}`)."""
        self.completed_steps += steps
        self.tokens += tokens
        self.values.update({name: float(value) for name, value in (values or {}).items()})
        now = self._owner.clock()
        # The first point comes after the first step, not at the start: compiling is no speed.
        self._history.append((now, self.completed_steps, self.tokens))
        while len(self._history) > 2 and self._history[1][0] < now - _SPEED_WINDOW_SECONDS:
            self._history.popleft()
        self._owner.changed(self)

    @property
    def count(self) -> str:
        return f"{self.completed_steps:,}/{self.total_steps:,} {self.unit}"

    @property
    def speed(self) -> Speed:
        if len(self._history) < 2 or self._history[-1][0] <= self._history[0][0]:
            return Speed(steps_per_second=None, tokens_per_second=None)
        (begin, first_steps, first_tokens), (end, last_steps, last_tokens) = self._history[0], self._history[-1]
        tokens = last_tokens - first_tokens
        return Speed(
            steps_per_second=(last_steps - first_steps) / (end - begin),
            tokens_per_second=tokens / (end - begin) if tokens else None,
        )

    @property
    def seconds_left(self) -> float | None:
        steps_per_second = self.speed.steps_per_second
        if not steps_per_second:
            return None
        return max(0, self.total_steps - self.completed_steps) / steps_per_second

    def describe(self) -> str:
        """The figures beside the bar: values, speed and time left, as far as they are known."""
        parts = [f"{name} {_compact(value)}" for name, value in self.values.items()]
        tokens_per_second = self.speed.tokens_per_second
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
        left = self.seconds_left
        if left is not None and self.completed_steps < self.total_steps:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)


class Progress:
    """Shows tasks on `console` while the `with` block lasts.

    Attributes:
      clock: seconds, monotonic; replaced in tests.
      line_interval_seconds: least time between two lines of one task where the console is not a terminal.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        line_interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console = console or make_console()
        self.clock = clock
        self.line_interval_seconds = line_interval_seconds
        self._depth = 0
        self._left = TimeLeft()
        self._rows: dict[tuple[int, str], TaskID] = {}
        self._whole_run: TaskID | None = None
        self._bars: RichProgress | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            # Only the bar gives way on a narrow terminal; a row that wraps would jump.
            self._bars = RichProgress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(None, complete_style="cyan", table_column=Column(ratio=1, min_width=6, max_width=32)),
                TextColumn("{task.fields[count]}", markup=False, table_column=Column(no_wrap=True, justify="right")),
                TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True)),
                console=self.console,
                refresh_per_second=5,
                expand=True,
            )

    def __enter__(self) -> "Progress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as a prompt needs it."""
        if self._bars is not None:
            if self._whole_run is not None:
                self._bars.remove_task(self._whole_run)
                self._whole_run = None
            self._bars.stop()

    def plan(self, parts: Sequence[Part]) -> None:
        """The outermost tasks that are to come, in their order, from which follows how much of the run is left."""
        self._left = TimeLeft(parts)

    def print(self, line: str) -> None:
        """A line above the bars, or in the log; `line` is shown as it is, without markup."""
        self.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, name: str, total_steps: int, *, completed_steps: int = 0, unit: str = "steps") -> Iterator[Task]:
        """A task of `total_steps`, of which a resumed run has `completed_steps` behind it; may be nested."""
        task = Task(self, name, total_steps=total_steps, completed_steps=completed_steps, unit=unit, depth=self._depth)
        self._depth += 1
        self._begin(task)
        try:
            yield task
        finally:
            self._depth -= 1
            self._end(task)

    @contextmanager
    def reading(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """What a loader tells how far it is, in bytes done and in all; shown with GB/s where it takes a while."""
        with contextlib.ExitStack() as opened:
            task: Task | None = None

            def on_read(done_bytes: int, total_bytes: int) -> None:
                nonlocal task
                if total_bytes < _SHOWN_BYTES:
                    return
                if task is None:
                    task = opened.enter_context(self.task(name, round(total_bytes / 1e6), unit="MB"))
                megabytes = round(done_bytes / 1e6) - task.completed_steps
                if megabytes:
                    per_second = task.speed.steps_per_second
                    task.advance(megabytes, values={"GB/s": per_second / 1e3} if per_second else None)

            yield on_read

    def changed(self, task: Task) -> None:
        """Shows the new state of `task`; called by the task itself."""
        if self._bars is not None:
            row = self._rows[task.depth, task.name]
            self._bars.update(row, completed=task.completed_steps, count=task.count, figures=task.describe())
            if task.depth == 0:
                self._show_whole_run(self._bars, task)
        elif self.clock() - task.told_at >= self.line_interval_seconds and task.completed_steps < task.total_steps:
            self._tell(task, task.describe())

    def _begin(self, task: Task) -> None:
        if task.depth == 0:
            self._left.begin(task.name)
        if self._bars is None:
            if task.depth == 0:
                resumed = f", continuing after {task.completed_steps:,}" if task.completed_steps else ""
                place = f"  ({', '.join(self._whole_run_figures(task))})" if self._left.place else ""
                self.print(f"{task.name}: {task.total_steps:,} {task.unit}{resumed}{place}")
            return
        if task.depth == 0:
            self._show_whole_run(self._bars, task)
        key = task.depth, task.name
        if key not in self._rows:
            self._rows[key] = self._bars.add_task("", count="", figures="")
        self._bars.reset(
            self._rows[key],
            total=task.total_steps,
            completed=task.completed_steps,
            description="  " * task.depth + task.name,
            count=task.count,
            figures="",
        )

    def _end(self, task: Task) -> None:
        took = self.clock() - task.started_at
        figures = f"{task.result or task.describe()}  took {duration(took)}".strip()
        if task.depth == 0 and task.completed_steps == task.total_steps:
            self._left.end(task.name, took)
        if self._bars is not None and task.depth > 0:
            self._bars.update(self._rows[task.depth, task.name], figures=figures)
        elif task.depth == 0 or took >= self.line_interval_seconds:
            self._tell(task, figures)
        if self._bars is not None and task.depth == 0:
            for row in self._rows.values():
                self._bars.remove_task(row)
            self._rows.clear()

    def _tell(self, task: Task, figures: str) -> None:
        task.told_at = self.clock()
        share = f" ({task.completed_steps / task.total_steps:.0%})" if task.total_steps else ""
        self.print(f"{'  ' * task.depth}{task.name}  {task.count}{share}  {figures}".rstrip())

    def _show_whole_run(self, bars: RichProgress, task: Task) -> None:
        if not self._left.place:
            return
        place, *left = self._whole_run_figures(task)
        if self._whole_run is None:
            self._whole_run = bars.add_task("whole run", count="", figures="")
        done, parts = self._left.done
        bars.update(self._whole_run, total=parts, completed=done, count=place, figures=" ".join(left))

    def _whole_run_figures(self, task: Task) -> list[str]:
        """Where the run is, and what is left of it where something is known."""
        left = self._left.describe(task.seconds_left)
        return [self._left.place, *([left] if left else [])]


def _compact(value: float) -> str:
    return f"{value:#.3g}" if abs(value) < 1000 else f"{value:,.0f}"
