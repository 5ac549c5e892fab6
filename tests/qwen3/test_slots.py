"""The queue from which groups of slots take requests: prompts stay together, nobody idles, nothing is lost."""

from qwen3.engine import Request
from qwen3.rollout import THINKING
from qwen3.sampling import SamplingParams
from qwen3.slots import Waiting


def requests_of(*prompts):
    params = SamplingParams(max_new_tokens=4)
    return [
        Request(prompt_ids=(prompt,), prompt_id=str(prompt), sample_index=0, mode=THINKING, params=params)
        for prompt in prompts
    ]


def test_requests_of_one_prompt_go_to_one_taker():
    waiting = Waiting(requests_of(5, 6, 5, 6, 5))
    assert [waiting.take("a"), waiting.take("b"), waiting.take("a"), waiting.take("a"), waiting.take("b")] == [
        0, 1, 2, 4, 3,
    ]  # fmt: skip
    assert not waiting


def test_a_taker_without_a_prompt_of_its_own_helps_with_the_longest_queue():
    waiting = Waiting(requests_of(5, 6, 6, 6))
    assert [waiting.take("a"), waiting.take("b")] == [0, 1]
    assert waiting.next("a") == 2
    assert len(waiting) == 2
    assert [waiting.take("a"), waiting.take("b")] == [2, 3]
    assert not waiting
