"""Several tasks as one source of problems, each judged by the task that it came from."""

from collections.abc import Mapping

from distill.tasks.problem import Problem, Split, Task
from qwen3.errors import UserError


class TaskMixture:
    """Problems spread evenly over tasks; remembers where each came from."""

    def __init__(self, tasks: Mapping[str, Task]):
        if not tasks:
            raise UserError("tasks is empty; an experiment needs at least one task to take problems from")
        self._tasks = dict(tasks)
        self._origin: dict[str, Task] = {}

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """`count` problems, as many of each task; a smaller count gives a prefix.

        Raises UserError where a task runs out, naming it.
        """
        share = -(-count // len(self._tasks))
        columns = []
        for name, task in self._tasks.items():
            try:
                columns.append(task.problems(split, share, seed))
            except UserError as error:
                raise UserError(f"task {name!r}: {error}") from None
            self._origin.update(dict.fromkeys((problem.problem_id for problem in columns[-1]), task))
        return [problem for row in zip(*columns, strict=True) for problem in row][:count]

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is exactly right, as the problem's own task judges."""
        return self._origin[problem.problem_id].verify(problem, answer)

    def working_is_correct(self, problem: Problem, thinking: str) -> bool | None:
        """See `Task.working_is_correct`."""
        return self._origin[problem.problem_id].working_is_correct(problem, thinking)
