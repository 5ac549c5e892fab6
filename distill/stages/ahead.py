"""Rollouts that are generated ahead of the weights that learn from them, so that devices need not wait for each other.

On one device, threads write and score while the student trains. Where several devices share a program, two threads
that start programs could each get some of them, and wait for ever: there one thread starts everything, in an order
that is the same in all processes, and what overlaps is the teacher's scoring on devices of its own.

How far the writer lags is a fixed function of the step, never what happens to be ready: two runs take the same
rollouts, and so does a run that was killed, because a checkpoint keeps what the weights of that time have generated.
"""

import base64
import concurrent.futures
import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.tasks.samples import Verdict
from distill.training.train_step import Batch
from qwen3.decoder.adapter import joined, trained_and_frozen
from qwen3.decoder.model import Qwen3
from qwen3.rollout import Mode, Rollout, rollouts_from_json, rollouts_to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a rollout that nothing is learned from, for one of another group has taken its place."""

    part: int
    """Of its batch, the part that it was generated for."""
    mode: Mode
    tokens: int
    """Prompt included."""
    response_tokens: int
    finished: bool
    correct: bool | None
    reward: float
    failed: bool
    known: bool
    """Whether its reward was compared with others."""
    teacher: str = ""
    """See `Rollout.teacher`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """The rollouts of one step, the seconds that writing them took, and what could not be found out later."""

    rollouts: Sequence[Rollout]
    seconds: float
    rewards: Sequence[float] = ()
    """Of each rollout; none where nobody rewards."""
    old_logprobs: Sequence[np.ndarray] = ()
    """Of each rollout's tokens [T] under the weights that generated them, as a trainer computes them; else none."""
    reference_logprobs: Sequence[np.ndarray] = ()
    """The same under the student at the stage's start."""
    failed: Sequence[bool] = ()
    """Of each rollout whether its verifier or reward has failed; none where none has, or nobody rewards."""
    replaced: Sequence[Outcome] = ()
    """Of rollouts that were generated for the step and are not among `rollouts`, group by group."""
    student_ids: Sequence[np.ndarray] = ()
    """Of each rollout's positions, the likeliest tokens [T, k] of the weights that generated them (`StudentTopK`)."""
    verdicts: Sequence[Verdict] = ()
    """Of each rollout what its task says of it; none where nobody rewards, and tasks are asked for metrics alone."""

    @property
    def tokens(self) -> int:
        """Tokens of all responses that were generated."""
        return sum(len(rollout.response) for rollout in self.rollouts) + self.replaced_tokens

    @property
    def replaced_tokens(self) -> int:
        """Tokens of responses that nothing is learned from."""
        return sum(one.response_tokens for one in self.replaced)

    def to_json(self) -> dict[str, Any]:
        """JSON data from which `from_json` makes the same, bit for bit."""
        kept = rollouts_to_json(self.rollouts) | {"seconds": self.seconds}
        if self.rewards:
            kept |= {"rewards": list(self.rewards), "verdicts": list(self.verdicts)}
        for name, dtype in _PER_TOKEN.items():
            if arrays := getattr(self, name):
                joined_up = np.concatenate(arrays).astype(dtype).tobytes()
                kept |= {name: base64.b64encode(joined_up).decode()}
        if any(self.failed):
            kept |= {"failed": list(self.failed)}
        if self.replaced:
            kept |= {"replaced": [dataclasses.asdict(one) for one in self.replaced]}
        return kept

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "Written":
        rollouts = rollouts_from_json(kept)
        ends = np.cumsum([len(rollout.tokens) for rollout in rollouts])[:-1]

        def per_token(name: str) -> Sequence[np.ndarray]:
            if name not in kept:
                return ()
            array = np.frombuffer(base64.b64decode(kept[name]), _PER_TOKEN[name])
            tokens = sum(len(rollout.tokens) for rollout in rollouts)
            return np.split(array.reshape(tokens, -1) if name == "student_ids" else array, ends)

        return cls(
            rollouts=rollouts,
            seconds=kept["seconds"],
            rewards=kept.get("rewards", ()),
            verdicts=[Verdict(*one) for one in kept.get("verdicts", ())],
            failed=kept.get("failed", ()),
            replaced=[Outcome(**one) for one in kept.get("replaced", ())],
            old_logprobs=per_token("old_logprobs"),
            reference_logprobs=per_token("reference_logprobs"),
            student_ids=per_token("student_ids"),
        )


_PER_TOKEN: Mapping[str, Any] = {"old_logprobs": np.float32, "reference_logprobs": np.float32, "student_ids": np.int32}


Scored = Sequence[Sequence[Batch]]
"""Packed rows in microbatches, by the part of the batch that an update learns from."""


class Closed(Exception):
    """Ends the writing of rollouts that nobody will train on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """What is, or will be, there for one step."""

    written: concurrent.futures.Future[Written]
    scored: concurrent.futures.Future[Scored]


class _AtOnce(concurrent.futures.Executor):
    """Does in the calling thread, before it goes on, what others do in threads of their own."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


class WrittenAhead:
    """Step n is written by the weights after max(0, n - staleness) updates.

    Held meanwhile: with threads, copies of the trained weights of at most `staleness` steps; and for as many steps the
    rollouts with the teacher's hidden states of their rows.
    """

    def __init__(
        self,
        staleness: int,
        steps: int,
        write: Callable[[int, int, Qwen3], Written],
        score: Callable[[Written], Scored],
        *,
        threads: bool,
    ):
        """`write(step, policy_step, model)` and `score` run in `threads` of their own until `close`, or else in
        `rollouts`, between two updates."""
        self._staleness, self._steps, self._write, self._score = staleness, steps, write, score
        self._threads = threads
        self._writer, self._scorer = (
            concurrent.futures.ThreadPoolExecutor(1, f"{what}-rollouts") if threads else _AtOnce()
            for what in ("write", "score")
        )
        self._queue: deque[_Step] = deque()
        """The steps that `rollouts` will ask for next, in their order."""
        self._taken: _Step | None = None
        self._closed = False

    def rollouts(self, step: int, model: Qwen3) -> Written:
        """The rollouts of step `step` once they are generated; `model`, the weights that it updates, generates later
        ones.

        Steps must be asked for one after the other. What failed in the background is raised here.
        """
        if step == 0:
            self._submit(self._writer.submit(self._write, 0, 0, model))
        self._taken = self._queue.popleft()
        # Before the next copy is made: the one that wrote these is no longer needed.
        written = self._taken.written.result()
        upcoming = range(step + len(self._queue) + 1, min(step + self._staleness, self._steps - 1) + 1)
        if upcoming:
            # What is written at once is written before the next update.
            writer = _copy(model) if self._threads else model
            for later in upcoming:
                self._submit(self._writer.submit(self._write, later, step, writer))
        return written

    def batches(self) -> Scored:
        """The packed rows of the rollouts that were asked for last, once they are scored."""
        assert self._taken is not None
        return self._taken.scored.result()

    def state(self) -> Mapping[str, Any]:
        """JSON data of the rollouts of coming steps; waits until all of them are written."""
        return {"ahead": [step.written.result().to_json() for step in self._queue]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on with the rollouts of `state`, which are scored again."""
        for kept in state["ahead"]:
            written: concurrent.futures.Future[Written] = concurrent.futures.Future()
            written.set_result(Written.from_json(kept))
            self._submit(written)

    def require_open(self, *progress: int) -> None:
        """Raises Closed in the writing thread where nobody waits for it any more: an engine's `on_progress`."""
        del progress
        if self._closed:
            raise Closed

    def close(self) -> None:
        """Ends both threads: at once, but for what the devices have begun."""
        self._closed = True
        self._writer.shutdown(cancel_futures=True)
        self._scorer.shutdown(cancel_futures=True)

    def _submit(self, written: concurrent.futures.Future[Written]) -> None:
        scored = self._scorer.submit(lambda: self._score(written.result()))
        self._queue.append(_Step(written=written, scored=scored))


def _copy(model: Qwen3) -> Qwen3:
    """The model with buffers of its own for the trained weights, whose present ones the next update gives away."""
    trained, frozen = trained_and_frozen(model)
    return joined(jax.tree.map(jnp.copy, trained), frozen)
