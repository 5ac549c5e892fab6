"""Rewards as they can be wrong: each in one line that names the reward and the problem."""

import dataclasses
import math
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from distill.experiment import _plain
from distill.monitor.metrics import RolloutSample
from distill.rewards.reward import Reward, RewardFailed, Rewards, reward_source
from distill.stages import Grpo
from distill.stages.ahead import Closed, Written
from distill.stages.grpo import _FromRewards
from distill.stages.loop import Training
from distill.tasks import Problem
from qwen3.errors import UserError
from qwen3.field_types import misfit
from qwen3.rollout import THINKING, Rollout
from tests.distill.training.test_train_step import config

PROBLEM = Problem(prompt="What is 1 + 1?", answer="2", family="sums")


def rollout(tokens: int, finished: bool = True) -> Rollout:
    length = 2 + tokens
    return Rollout(
        tokens=np.arange(length, dtype=np.int32),
        prompt_length=2,
        loss_mask=np.arange(length) >= 1,
        sampler_logprobs=np.zeros(length, np.float32),
        mode=THINKING,
        prompt_id=PROBLEM.problem_id,
        sample_index=3,
        policy_step=0,
        finished=finished,
    )


def rewards(reward: Reward | None = None, verify: Any = lambda problem, answer: True, **fields: Any) -> Rewards:
    tasks: Any = SimpleNamespace(verify=verify, working_is_correct=lambda *_: None)
    tokenizer: Any = SimpleNamespace(split_response_ids=lambda ids, mode: ("so", "2"))
    usual = {"penalty_tokens": 0, "timeout_seconds": 60.0}
    return Rewards(tasks=tasks, tokenizer=tokenizer, reward=reward, **{**usual, **fields})


def from_rewards(reward: Reward | None, **fields: Any) -> _FromRewards:
    """Of groups of two."""
    usual = {"samples_per_prompt": 2, "training": Training(steps=1, row_length=32_768)}
    context: Any = SimpleNamespace(tasks=None, tokenizer=None)
    student: Any = SimpleNamespace(config=config(moe=False), stacks=[])
    found = _FromRewards(Grpo(**{**usual, **fields}, reward=reward), student, context, [(PROBLEM, THINKING)] * 2)
    found._rewards = rewards(reward, timeout_seconds=fields.get("reward_timeout_seconds", 60.0))
    return found


def test_the_verifier_rewards_what_ended_by_itself() -> None:
    assert rewards().of(rollout(4), PROBLEM, 8)[1] == 1
    assert rewards().of(rollout(8, finished=False), PROBLEM, 8)[1] == 0
    assert rewards(verify=lambda problem, answer: False).of(rollout(4), PROBLEM, 8)[1] == 0


def test_a_reward_sees_problem_and_decoded_response() -> None:
    def exact(problem: Problem, sample: RolloutSample) -> float:
        assert (problem, sample.thinking, sample.correct) == (PROBLEM, "so", True)
        return float(sample.answer == problem.answer) - 3

    assert rewards(exact).of(rollout(4), PROBLEM, 8) == ((True, None), -2)


@pytest.mark.parametrize(("tokens", "expected"), [(6, 1.0), (7, 0.75), (9, 0.25), (10, 0.0), (12, 0.0)])
def test_the_last_tokens_of_the_budget_cost_up_to_one(tokens: int, expected: float) -> None:
    assert rewards(penalty_tokens=4).of(rollout(tokens), PROBLEM, 10)[1] == pytest.approx(expected)


def hanging(problem: Problem, sample: RolloutSample) -> float:
    time.sleep(30)
    return 0.0


def dying(problem: Problem, sample: RolloutSample) -> float:
    raise KeyError("no\nsuch unit")


def leaving(problem: Problem, sample: RolloutSample) -> float:
    sys.exit(3)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (hanging, "reward hanging, asked about sample 3 of problem .* has not come to an end after 0.1 s"),
        (dying, "reward dying, asked .* raised KeyError: .*such unit.*; mend it"),
        (lambda problem, sample: math.nan, "gave nan; a reward must be a finite number"),
        (lambda problem, sample: -math.inf, "gave -inf; a reward must be"),
        (lambda problem, sample: 10**400, "gave a whole number that no float holds; a reward must be"),
        (leaving, "reward leaving, asked .* raised SystemExit: 3; mend it"),
        (lambda problem, sample: None, "gave None; a reward must be"),
    ],
)
def test_a_reward_that_says_nothing_is_refused_in_one_line(reward: Reward, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=message) as refused:
        rewards(reward, timeout_seconds=0.1).of(rollout(4), PROBLEM, 8)
    assert "\n" not in str(refused.value)
    if isinstance(refused.value, RewardFailed):
        assert refused.value.verdict.correct, "the verifier has not failed"
        assert refused.value.timed_out == (reward is hanging)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("late", "fields", "message"),
    [
        ((3,), {"most_failed": 0.3}, None),
        ((2, 3, 4), {"most_failed": 0.5}, r"\(3 of 4 responses failed, and most_failed is 0.5\)"),
        ((2, 3), {"most_timeouts": 1}, r"\(2 of 4 responses failed, 2 of them for want of time, and most_timeouts is"),
    ],
)
def test_failures_count_against_all_that_were_generated_for_a_batch(
    late: tuple[int, ...], fields: dict[str, Any], message: str | None
) -> None:
    """Two responses, and two of another prompt in their place, which are no better."""
    asked: list[int] = []

    def fails_now_and_then(problem: Problem, sample: RolloutSample) -> float:
        asked.append(len(asked))
        return hanging(problem, sample) if len(asked) in late else 0.0

    lesson = from_rewards(
        fails_now_and_then,
        prompts_per_step=1,
        resample_factor=2.0,
        reward_timeout_seconds=0.1,
        **{"most_failed": 1.0, **fields},
    )
    made = Written(rollouts=[rollout(4), rollout(5)], seconds=1.0)
    nothing = cast(Any, None)

    def complete() -> Written:
        return lesson.complete(made, [(PROBLEM, THINKING)], nothing, 0, lambda more: [*made.rollouts], lambda: None)

    if message is None:
        written = complete()
        assert (written.failed, [one.failed for one in written.replaced]) == ([False, False], [True, False])
        assert [one.correct for one in written.replaced] == [True, True], "the verifier has not failed"
    else:
        with pytest.raises(UserError, match=message):
            complete()
        assert len(asked) == late[-1]


def test_the_control_learns_from_failed_responses_and_needs_no_answers() -> None:
    made, nothing = Written(rollouts=[rollout(4), rollout(5)], seconds=1.0), cast(Any, None)
    control = from_rewards(dying, unlikely_below=0.5, most_failed=1.0)
    written = control.complete(made, [(PROBLEM, THINKING)], nothing, 0, nothing, lambda: None)
    assert written.failed == [True, True]
    assert all(arrays["weights"].any() for arrays in control.per_token(written, slice(0, 2)))
    assert not any(arrays["weights"].any() for arrays in from_rewards(dying).per_token(written, slice(0, 2)))
    control, unanswered = from_rewards(None, unlikely_below=0.5), dataclasses.replace(PROBLEM, answer=None)
    written = control.complete(made, [(unanswered, THINKING)], nothing, 0, nothing, lambda: None)
    assert control.told(written, slice(0, 2)) == {"reward_failures": 0}


def test_nobody_is_asked_once_nobody_waits() -> None:
    def closed() -> None:
        raise Closed

    made, nothing = Written(rollouts=[rollout(4), rollout(5)], seconds=1.0), cast(Any, None)
    with pytest.raises(Closed):
        from_rewards(hanging).complete(made, [(PROBLEM, THINKING)], nothing, 0, nothing, closed)


def test_a_verifier_that_dies_is_named_as_one() -> None:
    def verify(problem: Problem, answer: str) -> bool:
        raise ZeroDivisionError(answer)

    failed = r"the task.s verifier, asked about sample 3 .* raised ZeroDivisionError: 2"
    with pytest.raises(RewardFailed, match=failed) as refused:
        rewards(verify=verify).of(rollout(4), PROBLEM, 8)
    assert refused.value.verdict == (False, None)


@dataclasses.dataclass(frozen=True)
class Weighed:
    weight: float = 1.0

    def __call__(self, problem: Problem, sample: RolloutSample, /) -> float:
        return self.weight


def test_a_reward_is_known_by_its_name_its_source_and_its_fields() -> None:
    def one(weight: float) -> Reward:
        def reward(problem: Problem, sample: RolloutSample) -> float:
            return 1.0

        return reward

    def other() -> Reward:
        def reward(problem: Problem, sample: RolloutSample) -> float:
            return 2.0

        return reward

    assert reward_source(one(1)) == reward_source(one(2)) != reward_source(other())
    assert _plain(Weighed(2.0)) == {"kind": "Weighed", "source": reward_source(Weighed()), "weight": 2.0}
    assert _plain(hanging) == {"kind": "hanging", "source": reward_source(hanging)}
    built_in: Any = eval("lambda problem, sample: 0.0")
    with pytest.raises(UserError, match="has no source that a resumed run could be compared with"):
        reward_source(built_in)


def test_what_cannot_be_called_is_no_reward() -> None:
    assert misfit(hanging, Reward | None) is None
    assert misfit(Weighed(), Reward | None) is None
    assert misfit(1.0, Reward | None, "reward") == "reward is 1.0; it must be Reward or None"
