"""Requests of many clients become batches: those that wait go together, as far as they fit, while a batch is computed.

One thread forms batches and starts them on the devices, another waits for results: a full batch is prepared while the
devices work on the one before. One that would be padded waits for them: meanwhile more may come that goes with it. What
is given up by its client before its batch starts leaves the queue.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from teacher.limits import Limits
from teacher.serve.batches import Batch, Unit
from teacher.serve.metrics import Metrics
from teacher.serve.programs import Launched, Programs, filled_shape
from teacher.wire import Answer, Refused, TargetsRequest

_MOST_LEFT = 64
"""Sequences that find no room in a batch before those behind them are no longer tried: others wait meanwhile."""


class Admission:
    """How much is waiting, being worked on or on its way back, over all connections; what would be too much is
    refused."""

    def __init__(self, limits: Limits, metrics: Metrics):
        self._limits = limits
        self._lock = threading.Lock()
        self._requests = self._tokens = self._bytes = 0
        # Read when they are asked for: they change a dozen times a request.
        metrics.queue_requests.set_function(lambda: self._requests)
        metrics.queue_tokens.set_function(lambda: self._tokens)
        metrics.held_bytes.set_function(lambda: self._bytes)

    @contextlib.contextmanager
    def admitted(self, tokens: int) -> Iterator[None]:
        """Counts a request of so many tokens. Raises Refused (429) where too much is there already."""
        with self._lock:
            for field, held, most in (
                ("max_queue_requests", self._requests + 1, self._limits.max_queue_requests),
                ("max_queue_tokens", self._tokens + tokens, self._limits.max_queue_tokens),
            ):
                # A queue that is empty takes whatever a request may hold.
                if held > most and self._requests:
                    raise Refused("queue", f"is full ({field} {most}); come again", status=429)
            self._count(1, tokens, 0)
        try:
            yield
        finally:
            with self._lock:
                self._count(-1, -tokens, 0)

    @contextlib.contextmanager
    def asked(self, size: int) -> Iterator[None]:
        """Counts bytes that are read. Raises Refused (429) where too many are held already."""
        most = self._limits.max_held_bytes
        with self._lock:
            if self._bytes + size > most:
                raise Refused("queue", f"holds too many bytes (max_held_bytes {most}); come again", status=429)
        with self.answered(size):
            yield

    @contextlib.contextmanager
    def answered(self, size: int) -> Iterator[None]:
        """Counts bytes that go back, as long as they are not sent: meanwhile others are not read."""
        with self._lock:
            self._count(0, 0, size)
        try:
            yield
        finally:
            with self._lock:
                self._count(0, 0, -size)

    def _count(self, requests: int, tokens: int, size: int) -> None:
        self._requests += requests
        self._tokens += tokens
        self._bytes += size


@dataclasses.dataclass(eq=False)
class _Job:
    """A request and what is known of its answer."""

    request: TargetsRequest
    future: "concurrent.futures.Future[Answer]"
    answers: list[Answer | None]

    def resolve(self, index: int, answer: Answer) -> None:
        self.answers[index] = answer
        if any(one is None for one in self.answers):
            return
        whole = [one for one in self.answers if one is not None]
        joined = {name: np.concatenate([one[name] for one in whole]) for name in whole[0]}
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # given up meanwhile
            self.future.set_result(joined)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_exception(error)


class ScoringQueue:
    """Scores what is submitted, several requests at once, in the order in which they came."""

    def __init__(self, programs: Programs, metrics: Metrics):
        self._programs, self._metrics = programs, metrics
        self._waiting: collections.deque[tuple[_Job, Unit]] = collections.deque()
        self._changed = threading.Condition()
        self._launcher = concurrent.futures.ThreadPoolExecutor(1, "launch-scoring")
        self._collector = concurrent.futures.ThreadPoolExecutor(1, "collect-scores")
        self._under_way = 0
        """Batches that devices or collector hold: one that is computed, and at most a full one that follows it."""

    def submit(self, request: TargetsRequest) -> "concurrent.futures.Future[Answer]":
        """The answer, when it is there; cancelling it before its batch starts saves the work.

        Raises Refused (413) for what no program holds: in a batch it would fail others."""
        self._programs.check(request)
        job = _Job(request, concurrent.futures.Future(), [None] * len(request.sequences))
        with self._changed:
            self._waiting.extend((job, Unit(request, index)) for index in range(len(request.sequences)))
            self._changed.notify_all()
        self._launcher.submit(self._launch)
        return job.future

    def close(self) -> None:
        """Finishes what waits and ends both threads."""
        self._launcher.shutdown()
        self._collector.shutdown()

    def _launch(self) -> None:
        """Starts batches until nothing waits."""
        while True:
            try:
                next_ = self._next_batch()
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                self._programs.forget()
                with self._changed:
                    jobs = [job for job, _ in self._waiting]
                    self._waiting.clear()
                _fail(jobs, error)
                return
            if next_ is None:
                return
            batch, jobs = next_
            try:
                launched = self._programs.launch(batch)
            except Exception as error:  # noqa: BLE001 - whatever it is, its clients must hear of it
                self._end()
                _fail(jobs, error)
            else:
                self._collector.submit(self._collect, jobs, launched)

    def _next_batch(self) -> tuple[Batch, list[_Job]] | None:
        """Those that came first, of one kind of target, as far as they fit, and the job of each, once the devices shall
        have them. None where nothing waits."""
        with self._changed:
            self._changed.wait_for(self._may_begin)
            live = [one for one in self._waiting if not one[0].future.done()]
            if not live:
                self._waiting.clear()
                return None
            alike = [len(unit.tokens) for _, unit in live if unit.kind == live[0][1].kind]
            batch = self._programs.batch(filled_shape(self._programs.shapes, alike))
            jobs: list[_Job] = []
            left: list[tuple[_Job, Unit]] = []
            for place, (job, unit) in enumerate(live):
                if len(left) == _MOST_LEFT:
                    left += live[place:]
                    break
                if batch.take(unit):
                    jobs.append(job)
                else:
                    left.append((job, unit))
            self._waiting = collections.deque(left)
            self._under_way += 1
        return batch, jobs

    def _may_begin(self) -> bool:
        live = [unit for job, unit in self._waiting if not job.future.done()]
        waiting = sum(len(unit.tokens) for unit in live if unit.kind == live[0].kind)
        is_full = waiting >= self._programs.shapes[-1].tokens
        return self._under_way < (self._programs.at_once if is_full else 1)

    def _end(self) -> None:
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def _collect(self, jobs: Sequence[_Job], launched: Launched) -> None:
        try:
            answers = launched.answers()
        except Exception as error:  # noqa: BLE001 - whatever it is, its clients must hear of it
            self._programs.forget()
            _fail(jobs, error)
            return
        finally:
            self._end()
        metrics, units = self._metrics, launched.units
        scored = sum(len(unit.tokens) for unit in units)
        metrics.scored_tokens.inc(scored)
        metrics.prefix_lookup_tokens.labels("scoring").inc(scored)
        metrics.prefix_hit_tokens.labels("scoring").inc(scored - launched.read_tokens)
        for step in launched.steps:
            metrics.padding_tokens.inc(step.shape.tokens - sum(len(piece.positions) for piece in step.pieces))
            metrics.batches.labels(launched.kind, str(step.shape)).inc()
        for job, unit, answer in zip(jobs, units, answers, strict=True):
            job.resolve(unit.index, answer)


def _fail(jobs: Sequence[_Job], error: Exception) -> None:
    for job in jobs:
        job.fail(error)
