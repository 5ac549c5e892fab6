"""How long rollouts get, by hand."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from distill.stages import OnPolicy
from distill.stages.rollout_schedule import RolloutSchedule
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams

BATCHES, BUDGET = 9, 4096


def limits(**fields: Any) -> list[int]:
    return [RolloutSchedule(first=16, **fields).limit(batch, BATCHES, BUDGET) for batch in range(BATCHES)]


def test_limits_grow_from_the_first_to_the_last() -> None:
    assert limits() == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert limits(growth="linear") == [16 + 510 * batch for batch in range(BATCHES)]
    assert limits(last=16) == [16] * BATCHES
    assert limits(last=256, growth="linear")[-1] == 256
    # A third of nine batches grow, and the others have it all.
    assert limits(grown_share=1 / 3) == [16, 256, *[4096] * 7]
    assert RolloutSchedule(first=16).limit(0, 1, BUDGET) == 16


def test_a_share_of_all_rollouts_runs_in_full_and_which_ones_is_their_own_matter() -> None:
    def drawn(schedule: RolloutSchedule, seed: int = 3) -> np.ndarray:
        return np.array(
            [
                [schedule.runs_in_full(seed, batch, f"problem {number // 4}", number % 4) for number in range(400)]
                for batch in range(12)
            ]
        )

    usual = drawn(RolloutSchedule(full_share=0.2))
    # Of 4,800 draws a share of 0.2 is off by 0.006 at one standard deviation.
    assert usual.mean() == pytest.approx(0.2, abs=0.025)
    np.testing.assert_array_equal(usual, drawn(RolloutSchedule(full_share=0.2, first=7)))
    for different in (drawn(RolloutSchedule(full_share=0.2), seed=4), np.roll(usual, 1, 0), np.roll(usual, 4, 1)):
        assert 0.25 < (usual != different).mean() < 0.4, "as apart as two draws of their own, 2 · 0.2 · 0.8"
    at_once = drawn(RolloutSchedule(full_share=0.2, full_every_batches=4))
    by_batch = at_once.mean(1)
    assert np.all(by_batch[[0, 4, 8]] > 0.7)
    assert np.all(np.delete(by_batch, [0, 4, 8]) == 0)
    assert at_once.mean() == pytest.approx(0.2, abs=0.025)
    assert not drawn(RolloutSchedule(full_share=0.0)).any()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"first": 8, "last": 4}, "rollout_tokens.last is 4, below first 8; rollouts grow"),
        ({"full_share": 1.0}, "rollout_tokens.full_share is 1: no rollout would be cut"),
        ({"full_share": 0.3, "full_every_batches": 4}, "full_share × full_every_batches is 0.3 × 4: a batch has"),
        ({"full_share": 0.001, "full_every_batches": 300}, "is 300, and the stage generates 200 batches: far more"),
        ({"first": 64}, r"rollout_tokens.first is 64, and no max_new_tokens is above it \(64\)"),
        ({"last": 65}, "rollout_tokens.last is 65, above max_new_tokens 64"),
    ],
)
def test_a_schedule_that_cuts_nothing_or_does_not_fit_is_refused(schedule: dict[str, Any], message: str) -> None:
    sizes = {"thinking": SamplingParams(max_new_tokens=64), "non_thinking": SamplingParams(max_new_tokens=8)}
    with pytest.raises(UserError, match=message) as refused:
        OnPolicy(rollout_tokens=RolloutSchedule(**{"first": 4, **schedule}), **sizes)
    assert "\n" not in str(refused.value)


def test_prefixes_of_forced_text_alone_are_refused() -> None:
    thinking = SamplingParams(max_new_tokens=64, thinking_budget=0)
    with pytest.raises(UserError, match="thinking_budget is 0: a prefix may hold nothing but the text"):
        dataclasses.replace(OnPolicy(rollout_tokens=RolloutSchedule()), thinking=thinking)
