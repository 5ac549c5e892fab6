"""Parts of the held-out problems, scored apart."""

import dataclasses
import math

import pytest

from distill.evaluation import parts
from distill.monitor.metrics import RolloutSample
from distill.report.results import LengthHistogram
from distill.tasks import Problem
from tests.distill.reported import SAMPLE

PROBLEMS = [
    Problem(prompt=str(number), answer="1", family=family, source=source)
    for number, (source, family) in enumerate(
        [("a", "sums"), ("a", "sums"), ("b", "sums"), ("a", "products"), ("a", "sums")]
    )
]


def test_each_part_has_the_pass_rate_of_its_own_problems() -> None:
    scores = parts.scores(PROBLEMS, parts.family, [4, 2, 0, 1, 3], 4)
    assert {name: (score.pass_at_1, score.problems) for name, score in scores.items()} == {
        "a/products": (0.25, 1),
        "a/sums": (0.75, 3),
        "b/sums": (0.0, 1),
    }
    # The standard deviation of 1, 0.5 and 0.75 over the root of three; one problem says nothing about spread.
    assert scores["a/sums"].pass_at_1_stderr == pytest.approx(0.25 / math.sqrt(3))
    assert scores["b/sums"].pass_at_1_stderr is None
    assert parts.scores(PROBLEMS, parts.task, [4, 2, 0, 1, 3], 4)["a"].pass_at_1 == 10 / 16


def test_one_part_is_no_part() -> None:
    assert parts.scores(PROBLEMS[:2], parts.family, [1, 1], 4) == {}
    assert parts.scores([], parts.task, [], 4) == {}


def test_people_are_shown_every_family_before_any_a_second_time() -> None:
    assert parts.of_each_family(PROBLEMS, 3) == [0, 2, 3]
    assert parts.of_each_family(PROBLEMS, 4) == [0, 1, 2, 3]
    assert parts.of_each_family(PROBLEMS, 99) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("most_tokens", "width"), [(1, 1), (72, 1), (127, 1), (128, 2), (8_192, 128), (30_720, 256), (32_767, 256)]
)
def test_lengths_are_counted_in_at_most_128_bins_whatever_was_generated(most_tokens: int, width: int) -> None:
    assert LengthHistogram.of([0, most_tokens], most_tokens).bin_tokens == width
    whole = LengthHistogram.of([0, 0, most_tokens], most_tokens)
    assert (whole.counts[0], whole.counts[-1], sum(whole.counts)) == (2, 1, 3)
    assert len(whole.counts) <= 128
    assert LengthHistogram.of([], most_tokens).counts == ()


def test_working_counts_where_a_task_can_tell() -> None:
    def sample(*, correct: bool | None, working: bool | None) -> RolloutSample:
        return dataclasses.replace(SAMPLE, correct=correct, working_correct=working)

    problems = [Problem(prompt=name, answer="1", family="sums", source=name) for name in ("a", "b")]
    verdicts = (True, True), (True, False), (False, None)
    sums = [sample(correct=correct, working=working) for correct, working in verdicts]
    # A task that cannot tell takes no part; a wrong answer without working, of one that can, is not right.
    words = [sample(correct=True, working=None)] * 3
    assert parts.working_correct(problems, sums + words) == pytest.approx(1 / 3)
    assert parts.working_correct(problems[1:], words) is None
    ungraded = [sample(correct=None, working=None)] * 3
    assert parts.working_correct([*problems[:1], problems[0]], sums + ungraded) == pytest.approx(1 / 3)
