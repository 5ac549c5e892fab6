"""How often a model is right, from n samples a problem: pass@1, unbiased pass@k, and how sure the mean is."""

import math
from collections.abc import Sequence


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, section 2.1).

    Args:
        samples: n, taken of one problem.
        correct: c of them were right.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"correct is {correct} of {samples} samples; give 0 to {samples}")
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k} for {samples} samples; give 1 to {samples}, or take more samples")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at_k(correct_counts: Sequence[int], samples: int, k: int) -> float:
    """pass@k averaged over problems; k = 1 is the mean share of correct samples.

    Args:
        correct_counts: correct samples of each problem.
        samples: taken of every problem.
    """
    if not correct_counts:
        raise ValueError("correct_counts is empty; evaluate at least one problem")
    return math.fsum(pass_at_k(samples, correct, k) for correct in correct_counts) / len(correct_counts)


def pass_at_1_standard_error(correct_counts: Sequence[int], samples: int) -> float | None:
    """Standard error of the mean pass@1 over problems drawn from a larger population.

    Sample standard deviation of the problems' pass rates over the square root of their number: it holds the spread
    between problems and within them. None for a single problem, which says nothing about spread.
    """
    problems = len(correct_counts)
    if problems < 2:
        return None
    mean = mean_pass_at_k(correct_counts, samples, 1)
    squares = math.fsum((correct / samples - mean) ** 2 for correct in correct_counts)
    return math.sqrt(squares / (problems - 1) / problems)
