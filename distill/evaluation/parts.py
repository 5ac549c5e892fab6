"""Held-out problems by the task and the family that they belong to: what is scored apart, and what people are shown."""

import collections
from collections.abc import Callable, Sequence

from distill.evaluation.pass_at_k import mean_pass_at_k, pass_at_1_standard_error
from distill.monitor.metrics import RolloutSample
from distill.report.results import Score
from distill.tasks.problem import Problem


def family(problem: Problem) -> str:
    """Its family; with the task's name before it where there are several tasks."""
    return f"{problem.source}/{problem.family}" if problem.source else problem.family


def task(problem: Problem) -> str:
    """Its task; empty where there is one only."""
    return problem.source


def teacher(problem: Problem) -> str:
    """The teacher that is asked about it; empty where there is one only."""
    return problem.teacher


def scores(
    problems: Sequence[Problem], part_of: Callable[[Problem], str], correct: Sequence[int], samples: int
) -> dict[str, Score]:
    """pass@1 of each part, from how many of the samples to each problem are right; empty where there is one part."""
    members = collections.defaultdict[str, list[int]](list)
    for problem, right in zip(problems, correct, strict=True):
        members[part_of(problem)].append(right)
    if len(members) == 1:
        return {}
    return {
        part: Score(
            pass_at_1=mean_pass_at_k(right, samples, 1),
            pass_at_1_stderr=pass_at_1_standard_error(right, samples),
            problems=len(right),
        )
        for part, right in sorted(members.items())
    }


def of_each_family(problems: Sequence[Problem], count: int) -> list[int]:
    """The places of `count` problems, in order: the first of each family, then the second of each, and so on."""
    seen: collections.Counter[str] = collections.Counter()
    turns = []
    for place, problem in enumerate(problems):
        turns.append((seen[family(problem)], place))
        seen[family(problem)] += 1
    return sorted(place for _, place in sorted(turns)[:count])


def working_correct(problems: Sequence[Problem], samples: Sequence[RolloutSample]) -> float | None:
    """The share of graded samples with right answer and right working, over the tasks that can tell; None where none
    can. The same number of samples belongs to each problem, one problem's after the other's."""
    count = len(samples) // len(problems)
    sources = [problem.source for problem in problems for _ in range(count)]
    told = list(zip(sources, samples, strict=True))
    telling = {source for source, sample in told if sample.working_correct is not None}
    graded = [sample for source, sample in told if source in telling and sample.correct is not None]
    return sum(bool(sample.working_correct) for sample in graded) / len(graded) if graded else None
