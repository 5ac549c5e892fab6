"""A rollout as people read it: decoded, split into thinking and answer, and judged."""

import dataclasses
from collections.abc import Sequence

from distill.monitor.metrics import RolloutSample
from distill.tasks import Problem
from distill.tasks.mixture import TaskMixture
from qwen3.chat.chat import ChatTokenizer
from qwen3.rollout import Rollout


def judged_by(rollouts: Sequence[Rollout], problems: Sequence[Problem]) -> list[Rollout]:
    """The rollouts with the teacher that each one's problem names."""
    return [
        dataclasses.replace(rollout, teacher=problem.teacher) if problem.teacher else rollout
        for rollout, problem in zip(rollouts, problems, strict=True)
    ]


def judge(
    rollout: Rollout, problem: Problem, tokenizer: ChatTokenizer, tasks: TaskMixture, *, verify: bool = True
) -> RolloutSample:
    """Decode `rollout` and let the problem's task say whether answer and working are right, if there is an answer;
    without `verify` nobody is asked, and an answer is wrong."""
    thinking, answer = tokenizer.split_response_ids(rollout.response.tolist(), rollout.mode)
    graded = problem.answer is not None
    correct = verify and rollout.finished and tasks.verify(problem, answer) if graded else None
    working = tasks.working_is_correct(problem, thinking) if verify and graded and thinking else None
    return RolloutSample(
        mode=rollout.mode,
        prompt=problem.prompt,
        thinking=thinking or "",
        answer=answer,
        expected=problem.answer or None,
        correct=correct,
        working_correct=working and correct,
        response_tokens=len(rollout.response),
        finished=rollout.finished,
        prompt_id=rollout.prompt_id,
        sample_index=rollout.sample_index,
    )
