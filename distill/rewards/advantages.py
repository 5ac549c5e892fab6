"""How much better a response is than the others to the same prompt."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Advantages = Literal["grpo", "dr_grpo", "rloo"]
_SPREAD_FLOOR = 1e-6
"""Added to the standard deviation, as its users do; far below that of any two rewards that differ."""


def advantages(
    rewards: Float[np.ndarray, "P G"], known: Bool[np.ndarray, "P G"], kind: Advantages
) -> Float[np.ndarray, "P G"]:
    """Of G responses to each of P prompts, in float64; 0 where `known` is False and in groups
    of fewer than two known.

    With the mean and the standard deviation of a group's known rewards:

    - grpo: (reward - mean) / standard deviation (arXiv 2402.03300, section 4.1.2)
    - dr_grpo: reward - mean, so that hard and easy prompts are not weighed up (arXiv 2503.20783)
    - rloo: reward - the mean of the others', an unbiased baseline (arXiv 2402.14740)
    """
    rewards, known = np.asarray(rewards, np.float64), np.asarray(known, bool)
    count = known.sum(1, keepdims=True)
    others = np.maximum(count - 1, 1)
    mean = np.where(known, rewards, 0).sum(1, keepdims=True) / np.maximum(count, 1)
    apart = np.where(known & (count > 1), rewards - mean, 0)
    # Equal rewards are no signal, also where their mean is rounded.
    apart = np.where(_spread(rewards, known) > 0, apart, 0)
    if kind == "dr_grpo":
        return apart
    if kind == "rloo":
        return apart * count / others
    deviation = np.sqrt((apart**2).sum(1, keepdims=True) / np.maximum(count, 1))
    return apart / (deviation + _SPREAD_FLOOR)


def have_signal(rewards: Float[np.ndarray, "P G"], known: Bool[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """Whether the known rewards of a group differ: without that, no advantage does."""
    return _spread(np.asarray(rewards, np.float64), np.asarray(known, bool))[:, 0] > 0


def _spread(rewards: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The largest known reward of each group less its smallest [P, 1]; 0 where none is known."""
    largest = np.where(known, rewards, -np.inf).max(1, keepdims=True)
    smallest = np.where(known, rewards, np.inf).min(1, keepdims=True)
    return np.maximum(largest - smallest, 0)
