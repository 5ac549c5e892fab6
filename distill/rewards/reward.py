"""The door for rewards: any function of a problem and of a response as people read it, asked so that it can't stall a
run or poison it. Without one, the problem's own verifier says 1 or 0."""

import dataclasses
import functools
import hashlib
import inspect
import math
import numbers
import queue
import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from distill.monitor.metrics import RolloutSample
from distill.tasks.mixture import TaskMixture
from distill.tasks.problem import Problem
from distill.tasks.samples import judge
from qwen3.chat.chat import ChatTokenizer
from qwen3.errors import UserError
from qwen3.rollout import Rollout

Truncated = Literal["wrong", "masked"]
_Answer = TypeVar("_Answer")


@runtime_checkable
class Reward(Protocol):
    """What a response is worth: a function, or a frozen dataclass that can be called.

    It is called from several threads, one at a time, and must give the same number for the same response. `sample` has
    the decoded thinking and answer, the verifier's verdict (`correct`, False where the length limit cut the answer off)
    and whether it `finished`.
    """

    def __call__(self, problem: Problem, sample: RolloutSample, /) -> float: ...


def verified(problem: Problem, sample: RolloutSample, /) -> float:
    """1 for an answer that the problem's task verifies and that ended by itself, else 0."""
    del problem
    return float(bool(sample.correct))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """Judges a run's responses."""

    tasks: TaskMixture
    tokenizer: ChatTokenizer
    reward: Reward | None
    """None: `verified`."""
    penalty_tokens: int
    """Last tokens of the budget over which a reward falls by 1, linearly: DAPO's soft overlong punishment, arXiv
    2503.14476, equation 13."""
    timeout_seconds: float

    def of(self, rollout: Rollout, problem: Problem, max_new_tokens: int) -> tuple[RolloutSample, float]:
        """The response as people read it, and its reward.

        Raises UserError, naming reward and problem, where a verifier or the reward fails, does not come to an end in
        time, or gives no finite number.
        """
        reward = verified if self.reward is None else self.reward
        name = "the task's verifier" if self.reward is None else f"reward {reward_name(self.reward)}"
        what = f"{name}, asked about sample {rollout.sample_index} of problem {problem.problem_id},"

        def ask() -> tuple[RolloutSample, Any]:
            sample = judge(rollout, problem, self.tokenizer, self.tasks)
            return sample, reward(problem, sample)

        sample, value = _within(self.timeout_seconds, ask, what)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"{what} gave {value!r}; a reward must be a finite number")
        over = len(rollout.response) - (max_new_tokens - self.penalty_tokens)
        penalty = min(1.0, max(0, over) / self.penalty_tokens) if self.penalty_tokens else 0.0
        return sample, float(value) - penalty


def reward_name(reward: Reward) -> str:
    """As a message and the configuration call it."""
    return getattr(reward, "__qualname__", type(reward).__name__)


def reward_source(reward: Reward) -> str:
    """A hash of the reward's own lines, so that a resumed run notices that they have changed.

    Not of what they call, and not of values that they find outside of themselves.
    """
    owner: Any = reward if inspect.isroutine(reward) else type(reward)
    try:
        text = inspect.getsource(owner)
    except (OSError, TypeError):
        raise UserError(
            f"reward {reward_name(reward)} has no source that a resumed run could be compared with; write it as a "
            "function, or a dataclass with __call__, in a file"
        ) from None
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _within(seconds: float, call: Callable[[], _Answer], what: str) -> _Answer:
    """What `call` returns, if it does so in time. A thread that hangs is left behind and ends with the process."""
    answers: queue.SimpleQueue[Callable[[], _Answer]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer = call()
        except Exception as error:  # noqa: BLE001 - whatever a verifier raises, the one who asked hears of it
            answers.put(functools.partial(_fail, error, what))
        else:
            answers.put(lambda: answer)

    threading.Thread(target=run, name="reward", daemon=True).start()
    try:
        return answers.get(timeout=seconds)()
    except queue.Empty:
        raise UserError(
            f"{what} has not come to an end after {seconds:g} s; mend it, leave the problem out, or raise "
            "reward_timeout_seconds"
        ) from None


def _fail(error: Exception, what: str) -> Any:
    if isinstance(error, UserError):
        raise error
    said = " ".join(str(error).split())
    raise UserError(f"{what} raised {type(error).__name__}: {said}; mend it, or leave the problem out") from error
