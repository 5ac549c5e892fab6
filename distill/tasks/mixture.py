"""Several tasks as one source of problems, each judged by the task that it came from."""

import dataclasses
import itertools
from collections.abc import Mapping

from distill.tasks.drawing import stream_seed
from distill.tasks.problem import Excluded, Problem, Split, Task
from qwen3.errors import UserError


class TaskMixture:
    """Problems spread evenly over tasks; what one task holds out, none of them trains on.

    Where there are several tasks, each problem names its own as `source`: the same question of two tasks is two
    problems with two verifiers.
    """

    def __init__(self, tasks: Mapping[str, Task]):
        if not tasks:
            raise UserError("tasks is empty; an experiment needs at least one task to take problems from")
        self._tasks = dict(tasks)

    def problems(self, split: Split, count: int, seed: int, *, repeat: bool = False) -> list[Problem]:
        """`count` problems, as many of each task; a smaller count gives a prefix.

        With `repeat`, a task that has a fixed number of problems starts again, in a new order, when all were given.

        Raises UserError where a task runs out, naming it.
        """
        share = -(-count // len(self._tasks))
        columns = [self._of_task(name, split, share, seed, repeat) for name in self._tasks]
        return [problem for row in zip(*columns, strict=True) for problem in row][:count]

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is exactly right, as the problem's own task judges."""
        return self._task_of(problem).verify(problem, answer)

    def working_is_correct(self, problem: Problem, thinking: str) -> bool | None:
        """See `Task.working_is_correct`."""
        return self._task_of(problem).working_is_correct(problem, thinking)

    def _of_task(self, name: str, split: Split, count: int, seed: int, repeat: bool) -> list[Problem]:
        task, without = self._tasks[name], self._held_out_by_others(name) if split == "train" else None
        found: list[Problem] = []
        try:
            size = task.size(split, without) if repeat else None
            for epoch in itertools.count():
                wanted = min(count - len(found), size or count)
                epoch_seed = stream_seed("epoch", seed, epoch) if epoch else seed
                found += task.problems(split, wanted, epoch_seed, without)
                if len(found) == count:
                    break
        except UserError as error:
            raise UserError(f"task {name!r}: {error}") from None
        return found if len(self._tasks) == 1 else [dataclasses.replace(problem, source=name) for problem in found]

    def _held_out_by_others(self, name: str) -> Excluded | None:
        others = [task for other, task in self._tasks.items() if other != name]
        return (lambda question: any(task.holds_out(question) for task in others)) if others else None

    def _task_of(self, problem: Problem) -> Task:
        return self._tasks[problem.source] if problem.source else next(iter(self._tasks.values()))
