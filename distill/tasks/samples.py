"""A rollout as people read it: decoded, split into thinking and answer, and judged."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from distill.monitor.metrics import RolloutSample
from distill.tasks import Problem
from distill.tasks.mixture import TaskMixture
from qwen3.chat.chat import ChatTokenizer
from qwen3.rollout import Rollout


class Verdict(NamedTuple):
    """What a problem's task says of a response."""

    correct: bool | None
    """None where there is no answer to compare with."""
    working_correct: bool | None
    """None where the task does not check the working, or there is none."""


def judged_by(rollouts: Sequence[Rollout], problems: Sequence[Problem]) -> list[Rollout]:
    """The rollouts with the teacher that each one's problem names."""
    return [
        dataclasses.replace(rollout, teacher=problem.teacher) if problem.teacher else rollout
        for rollout, problem in zip(rollouts, problems, strict=True)
    ]


def judge(
    rollout: Rollout, problem: Problem, tokenizer: ChatTokenizer, tasks: TaskMixture, verdict: Verdict | None = None
) -> RolloutSample:
    """Decode `rollout` and let the problem's task say whether answer and working are right, if there is an answer.
    With a `verdict`, given before, nobody is asked."""
    thinking, answer = tokenizer.split_response_ids(rollout.response.tolist(), rollout.mode)
    if verdict is None:
        verdict = _verdict(rollout, problem, tasks, thinking, answer)
    return RolloutSample(
        mode=rollout.mode,
        prompt=problem.prompt,
        thinking=thinking or "",
        answer=answer,
        expected=problem.answer or None,
        correct=verdict.correct,
        working_correct=verdict.working_correct,
        response_tokens=len(rollout.response),
        finished=rollout.finished,
        prompt_id=rollout.prompt_id,
        sample_index=rollout.sample_index,
    )


def _verdict(rollout: Rollout, problem: Problem, tasks: TaskMixture, thinking: str | None, answer: str) -> Verdict:
    if problem.answer is None:
        return Verdict(correct=None, working_correct=None)
    correct = rollout.finished and tasks.verify(problem, answer)
    working = tasks.working_is_correct(problem, thinking) if thinking else None
    return Verdict(correct=correct, working_correct=working and correct)
