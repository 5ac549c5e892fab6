"""The door for rewards: any function of a problem and of a response as people read it, asked so that it neither stalls
a run, as long as it lets go of Python's interpreter, nor poisons it. Without one, the problem's own verifier says 1 or
0."""

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
from distill.tasks.samples import Verdict, judge
from qwen3.chat.chat import ChatTokenizer
from qwen3.errors import UserError
from qwen3.rollout import Rollout

Truncated = Literal["wrong", "masked"]
Failed = Literal["wrong", "left_out"]
_Answer = TypeVar("_Answer")


class RewardFailed(UserError):
    """A verifier or a reward that raised, or did not come to an end in time, over one response."""

    def __init__(self, message: str, verdict: Verdict, *, timed_out: bool):
        """`verdict` is the verifier's; where that has failed, the answer, if it should have been compared with one, is
        wrong."""
        super().__init__(message)
        self.verdict, self.timed_out = verdict, timed_out


@runtime_checkable
class Reward(Protocol):
    """What a response is worth: a function, or a frozen dataclass that can be called.

    It is called from several threads, one at a time, but for calls that have not come to an end in time, and of several
    processes in the first alone. It must give the same number for the same response. `sample` has the decoded thinking
    and answer, the verifier's verdict (`correct`, False where the length limit cut the answer off) and whether it
    `finished`.
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

    def of(self, rollout: Rollout, problem: Problem, max_new_tokens: int) -> tuple[Verdict, float]:
        """What the problem's task says of the response, and its reward.

        Raises, naming reward and problem, RewardFailed where a verifier or the reward raises or does not come to an end
        in time, and another UserError where it gives no finite number.
        """
        about = f"asked about sample {rollout.sample_index} of problem {problem.problem_id},"
        sample = _within(
            self.timeout_seconds,
            lambda: judge(rollout, problem, self.tokenizer, self.tasks),
            f"the task's verifier, {about}",
            Verdict(correct=None if problem.answer is None else False, working_correct=None),
        )
        verdict = Verdict(sample.correct, sample.working_correct)
        reward, what = self.reward, ""
        value: object = verified(problem, sample)
        if reward is not None:
            what = f"reward {reward_name(reward)}, {about}"
            value = _within(self.timeout_seconds, lambda: reward(problem, sample), what, verdict)
        if not isinstance(value, numbers.Real) or not _is_finite(value):
            said = "a whole number that no float holds" if isinstance(value, int) else repr(value)
            raise UserError(f"{what} gave {said}; a reward must be a finite number")
        over = len(rollout.response) - (max_new_tokens - self.penalty_tokens)
        penalty = min(1.0, max(0, over) / self.penalty_tokens) if self.penalty_tokens else 0.0
        return verdict, float(value) - penalty


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def check_reward(reward: object) -> None:
    """Refuses a reward whose changes a resumed run would not see. Raises UserError."""
    instance = dataclasses.is_dataclass(reward) and not isinstance(reward, type)
    if reward is not None and not inspect.isfunction(reward) and not instance:
        raise UserError(
            f"reward is {reward!r}; give a function, or an instance of a frozen dataclass with __call__, whose fields "
            "are its settings"
        )


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


def _within(seconds: float, call: Callable[[], _Answer], what: str, verdict: Verdict) -> _Answer:
    """What `call` returns, if it does so in time, else RewardFailed with `verdict`. A thread that hangs is left behind
    and ends with the process."""
    answers: queue.SimpleQueue[Callable[[], _Answer]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer = call()
        except BaseException as error:  # noqa: BLE001 - whatever a verifier raises, the one who asked hears of it
            answers.put(functools.partial(_fail, error, what, verdict))
        else:
            answers.put(lambda: answer)

    threading.Thread(target=run, name="reward", daemon=True).start()
    try:
        return answers.get(timeout=seconds)()
    except queue.Empty:
        raise RewardFailed(
            f"{what} has not come to an end after {seconds:g} s; mend it, leave the problem out, or raise "
            "reward_timeout_seconds, and start again under another --name",
            verdict,
            timed_out=True,
        ) from None


def _fail(error: BaseException, what: str, verdict: Verdict) -> Any:
    if isinstance(error, UserError):
        raise error
    said = " ".join(str(error).split())
    raise RewardFailed(
        f"{what} raised {type(error).__name__}: {said}; mend it, or leave the problem out, and start again under "
        "another --name",
        verdict,
        timed_out=False,
    ) from error
