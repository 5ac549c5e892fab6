"""Rollouts as people read them: where there is no answer, nothing is called right or wrong."""

from pathlib import Path

import numpy as np
import pytest

from distill.tasks import Problem
from distill.tasks.mixture import TaskMixture
from distill.tasks.samples import judge
from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.tokenizer import train_byte_level_bpe
from qwen3.rollout import THINKING, Rollout
from tests.distill import miniature


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(["1 + 2 = 3"], 290, folder)
    return ChatTokenizer.from_folder(folder)


def rollout(response: list[int], finished: bool) -> Rollout:
    length = len(response) + 1
    return Rollout(
        tokens=np.asarray([0, *response], np.int32),
        prompt_length=1,
        loss_mask=np.ones(length, bool),
        sampler_logprobs=np.zeros(length, np.float32),
        mode=THINKING,
        prompt_id="p",
        sample_index=0,
        policy_step=0,
        finished=finished,
    )


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("thinking", ["1 + 2 = 3", ""])
def test_a_response_without_a_reference_answer_is_neither_right_nor_wrong(
    tokenizer: ChatTokenizer, thinking: str, finished: bool
) -> None:
    (problem,) = miniature.task().problems("train", 1, seed=0)
    unanswered = Problem(prompt=problem.prompt, answer=None, family=problem.family)
    tasks, response = TaskMixture({"arithmetic": miniature.task()}), tokenizer.response_ids(thinking, "3", THINKING)
    sample = judge(rollout(response, finished), unanswered, tokenizer, tasks)
    assert (sample.correct, sample.working_correct, sample.expected) == (None, None, None)
    assert (sample.answer, sample.thinking, sample.verdict) == ("3", thinking, "not graded")
    graded = judge(rollout(response, finished), problem, tokenizer, tasks)
    assert (graded.correct, graded.verdict) == (False, "wrong")
    right = judge(rollout(tokenizer.response_ids("", problem.known_answer, THINKING), True), problem, tokenizer, tasks)
    assert (right.correct, right.working_correct) == (True, None)
