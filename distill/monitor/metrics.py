"""What a run measures while it goes: TensorBoard for watching, `metrics.jsonl` for the report, both exact over resumes.

`metrics.jsonl` is the source of the report's curves: one record a step and stage,
`{"stage", "step", "unix_seconds", "scalars": {name: value}}`. A metric that is not available is absent; a value that
is not finite is null. `rollouts.jsonl` holds some rollouts for people, those of evaluations marked as `held_out`.
TensorBoard gets one run a stage, a folder of its own, with tags that do not name the stage: so that stages overlay,
and because it purges a resumed run by folder and step, and steps start anew with every stage.

Names: `group/series` (`divergence/thinking`, `divergence/non_thinking`) are lines of one panel of the report, beside a
bare `divergence`, which is the line over all.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, SupportsFloat

from distill.monitor import tensorboard_events
from distill.monitor.records import Record, RecordLog, read_records
from distill.monitor.tensorboard_events import EventLog
from qwen3.errors import UserError
from qwen3.rollout import Mode

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSample:
    """One rollout as people read it: decoded, thinking apart from the answer, with the verifier's verdict."""

    mode: Mode
    prompt: str
    thinking: str
    """What stood between the thinking tags; empty if nothing did."""
    answer: str
    expected: str | None = None
    correct: bool | None = None
    """The verdict; None where no verifier applies."""
    working_correct: bool | None = None
    """Whether the worked steps are right as well; an exact answer can follow wrong working."""
    response_tokens: int
    finished: bool
    """Whether a stop token ended it (otherwise the length limit did)."""
    prompt_id: str
    sample_index: int = 0

    @property
    def verdict(self) -> str:
        if self.correct is None:
            return "not graded"
        if not self.correct:
            return "wrong"
        return "right answer, wrong working" if self.working_correct is False else "right"

    def to_markdown(self) -> str:
        """For TensorBoard's text page. Everything that a model generated is fenced: it may hold tags and markup."""
        length = f"{self.response_tokens} tokens" + ("" if self.finished else ", cut off by the length limit")
        expected = "" if self.expected is None else f" · expected `{self.expected}`"
        parts = [
            f"**{self.verdict}** · {self.mode.replace('_', '-')} · {length}{expected}",
            "Prompt",
            _fenced(self.prompt),
        ]
        if self.thinking:
            parts += ["Thinking", _fenced(self.thinking)]
        return "\n\n".join([*parts, "Answer", _fenced(self.answer)])


class MetricsWriter:
    """Writes the measurements of one run directory; one process of a job does this.

    Call `resume_at` once before the first row of each stage, then `scalars` with steps that never fall. Everything
    is with the operating system when a call returns, so that a killed process loses nothing it reported.
    """

    def __init__(self, run_dir: str | os.PathLike[str]):
        self._run_dir = pathlib.Path(run_dir)
        self._metrics = RecordLog(self._run_dir / METRICS_FILE)
        self._rollouts = RecordLog(self._run_dir / ROLLOUTS_FILE)
        self._last_step: dict[str, int] = {}
        for record in read_metrics(self._run_dir):
            self._last_step[record["stage"]] = record["step"]
        self._events: dict[str, EventLog] = {}

    def last_step(self, stage: str) -> int:
        """The last step of `stage` that is recorded; 0 where none is."""
        return self._last_step.get(stage, 0)

    def resume_at(self, stage: str, step: int) -> None:
        """Forgets what `stage` recorded past `step`, the step of the restored checkpoint (0: from the beginning)."""

        def survives(record: Record) -> bool:
            return record["stage"] != stage or record["step"] <= step

        self._metrics.keep(survives)
        self._rollouts.keep(survives)
        if stage in self._last_step:
            self._last_step[stage] = min(step, self._last_step[stage])
        self._event_log(stage).forget_after(step)

    def scalars(self, step: int, values: Mapping[str, SupportsFloat], *, stage: str) -> None:
        """Records `values` (anything that `float` takes; leave out what is not available) at `step` of `stage`.

        Raises:
          ValueError: if `step` lies before one already recorded: the curves would run backwards.
        """
        last = self._last_step.get(stage)
        if last is not None and step < last:
            raise ValueError(
                f"stage {stage}: step={step} lies before the recorded step {last}; call resume_at first, or pass "
                f"a step of at least {last}"
            )
        self._last_step[stage] = step
        now = time.time()
        floats = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in floats.items()}
        self._metrics.append({"stage": stage, "step": step, "unix_seconds": round(now, 3), "scalars": finite})
        self._draw(stage, step, floats, now)

    def evaluation(
        self,
        model: str,
        values: Mapping[str, SupportsFloat],
        samples: Sequence[RolloutSample],
        *,
        step: int,
        followers: Sequence[str] = (),
    ) -> None:
        """Shows what was measured of `model`, and some of its responses; once more, it takes the place of the first.

        TensorBoard has the values in the run of that name at `step`, where its stage ended, and at step 0 of the
        stages that start from it, `followers`; for programs they are in the run's evaluations.
        """
        floats = {name: float(value) for name, value in values.items()}
        self._draw(model, step, floats)
        for stage in followers:
            self._draw(stage, 0, floats)
        self._rollouts.keep(lambda record: record["stage"] != model or not record.get("held_out"))
        self._show(model, step, samples, held_out=True)

    def text(self, tag: str, step: int, markdown: str, *, stage: str) -> None:
        """Shows `markdown` on TensorBoard's text page under `tag`, in the run of the stage."""
        self._event_log(stage).write(step, tensorboard_events.text(tag, markdown))

    def samples(self, step: int, samples: Sequence[RolloutSample], *, stage: str) -> None:
        """Shows rollouts to people: lines of `rollouts.jsonl`, and one text a mode on TensorBoard's text page."""
        self._show(stage, step, samples, held_out=False)

    def config(self, config: Mapping[str, Any]) -> None:
        """Shows the resolved experiment on TensorBoard's text page; `config` must be plain JSON data."""
        markdown = _fenced(json.dumps(config, indent=2, ensure_ascii=False), language="json")
        # The tag's directory is TensorBoard's root: no stage, and forgotten first so that a resumed run shows it once.
        events = self._event_log("")
        events.forget_after(-1)
        events.write(0, tensorboard_events.text("config", markdown))

    def close(self) -> None:
        for events in self._events.values():
            events.close()
        self._events.clear()
        self._metrics.close()
        self._rollouts.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _draw(self, stage: str, step: int, values: Mapping[str, float], unix_seconds: float | None = None) -> None:
        self._event_log(stage).write(step, tensorboard_events.scalars(values), unix_seconds)

    def _show(self, stage: str, step: int, samples: Sequence[RolloutSample], *, held_out: bool) -> None:
        for sample in samples:
            where = {"stage": stage, "step": step, "held_out": held_out}
            self._rollouts.append(where | dataclasses.asdict(sample))
        # One text holds them all: of several at one step and tag TensorBoard would keep the last.
        for mode in dict.fromkeys(sample.mode for sample in samples):
            texts = [sample.to_markdown() for sample in samples if sample.mode == mode]
            tag = f"{'held_out' if held_out else 'rollouts'}/{mode}"
            self.text(tag, step, "\n\n---\n\n".join(texts), stage=stage)

    def _event_log(self, stage: str) -> EventLog:
        if stage not in self._events:
            self._events[stage] = EventLog(self._run_dir / "tensorboard" / stage)
        return self._events[stage]


class NoMetrics(MetricsWriter):
    """Writes nothing: for the processes of a job beside the one that writes."""

    def __init__(self) -> None:
        self._last_step = {}

    def resume_at(self, stage: str, step: int) -> None: ...

    def scalars(self, step: int, values: Mapping[str, SupportsFloat], *, stage: str) -> None: ...

    def evaluation(
        self,
        model: str,
        values: Mapping[str, SupportsFloat],
        samples: Sequence[RolloutSample],
        *,
        step: int,
        followers: Sequence[str] = (),
    ) -> None: ...

    def text(self, tag: str, step: int, markdown: str, *, stage: str) -> None: ...

    def samples(self, step: int, samples: Sequence[RolloutSample], *, stage: str) -> None: ...

    def config(self, config: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def require_finite(step: int, values: Mapping[str, SupportsFloat], *, stage: str) -> None:
    """Stops a run whose loss or gradient has become useless.

    Raises:
      UserError: naming the stage, the step and the first of `values` that is NaN or infinite.
    """
    for name, value in values.items():
        if not math.isfinite(float(value)):
            raise UserError(
                f"stage {stage}, step {step}: {name} is {float(value)}; lower the learning rate or the clipping norm "
                f"({METRICS_FILE} shows the steps before), and start again in a new run directory"
            )


def read_metrics(run_dir: pathlib.Path) -> list[Record]:
    """The rows of `metrics.jsonl`, oldest first. Raises UserError where that file or `rollouts.jsonl` is damaged."""
    read_records(run_dir / ROLLOUTS_FILE, _is_sample)
    return read_records(run_dir / METRICS_FILE, _is_row)


def _is_row(record: Record) -> bool:
    """Whether `scalars` can have written it."""
    scalars = record.get("scalars")
    return (
        _has_place(record)
        and isinstance(scalars, dict)
        and all(value is None or type(value) in (int, float) for value in scalars.values())
    )


def _is_sample(record: Record) -> bool:
    """Whether `samples` can have written it."""
    needed = {field.name for field in dataclasses.fields(RolloutSample) if field.default is dataclasses.MISSING}
    return _has_place(record) and needed <= record.keys()


def _has_place(record: Record) -> bool:
    return isinstance(record.get("stage"), str) and type(record.get("step")) is int


def _fenced(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
