import itertools
import math
import random
import statistics

import pytest

from distill.evaluation.pass_at_k import mean_pass_at_k, pass_at_1_standard_error, pass_at_k


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_equals_counting_every_subset(samples: int) -> None:
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        outcomes = [True] * correct + [False] * (samples - correct)
        subsets = [any(subset) for subset in itertools.combinations(outcomes, k)]
        # Two roundings at most: a division on either side and a subtraction from 1.
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(subsets) / len(subsets), abs=2e-16)


def test_pass_at_k_is_unbiased() -> None:
    # Over every outcome of 6 tries at rate 0.3, the estimate averages to the true 1 - 0.7**k.
    for k in range(1, 7):
        expected = sum(math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) * pass_at_k(6, c, k) for c in range(7))
        # Seven terms of order one, each rounded.
        assert expected == pytest.approx(1 - 0.7**k, abs=1e-14)


def test_many_samples_do_not_overflow() -> None:
    assert pass_at_k(5000, 1, 2500) == 0.5
    assert pass_at_k(5000, 0, 2500) == 0.0
    assert pass_at_k(5000, 5000, 1) == 1.0


def test_the_mean_is_over_problems() -> None:
    assert mean_pass_at_k([0, 2, 4], 4, 1) == 0.5
    assert mean_pass_at_k([0, 2, 4], 4, 2) == pytest.approx((0 + 5 / 6 + 1) / 3, abs=1e-15)


def test_the_standard_error_is_the_spread_of_repeated_evaluations() -> None:
    assert pass_at_1_standard_error([0, 2, 4], 4) == pytest.approx(statistics.stdev([0, 0.5, 1]) / math.sqrt(3))
    assert pass_at_1_standard_error([3], 4) is None
    rng = random.Random(0)

    def evaluate() -> list[int]:
        rates = [rng.random() for _ in range(50)]
        return [sum(rng.random() < rate for _ in range(4)) for rate in rates]

    runs = [evaluate() for _ in range(400)]
    spread = statistics.stdev(mean_pass_at_k(run, 4, 1) for run in runs)
    claimed = statistics.fmean(pass_at_1_standard_error(run, 4) for run in runs)
    # A standard deviation from 400 runs is itself known to 3.5 %; four of those.
    assert claimed == pytest.approx(spread, rel=0.14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 5, 1), "correct is 5 of 4"), ((4, -1, 1), "correct is -1"), ((4, 2, 5), "k is 5"), ((4, 2, 0), "k is 0")],
)
def test_impossible_counts_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


def test_no_problems_have_no_mean() -> None:
    with pytest.raises(ValueError, match="correct_counts is empty"):
        mean_pass_at_k([], 4, 1)
