"""Several tasks as one source of problems, each judged by the task that it came from."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping
from string import Formatter
from types import MappingProxyType

from distill.tasks.drawing import stream_seed, turns_by_weight
from distill.tasks.problem import Excluded, Problem, Split, Task
from qwen3.errors import UserError


class TaskMixture:
    """Problems of several tasks by their weights; what one task holds out, none of them trains on.

    A task of weight 0 gives no problems, in training or evaluation, but still keeps others from what it holds out. One
    that holds out everything is evaluated only, one that holds out nothing trained on only.
    Where there are several tasks, each problem names its own as `source`: the same question of two tasks is two
    problems with two verifiers.
    """

    def __init__(self, tasks: Mapping[str, Task], teachers: Mapping[str, str | None] = MappingProxyType({})):
        """`teachers` are by name, an only one by the empty name, with the prompt that they read, see `Teacher.prompt`.
        Of several, each problem names the one that its data names, or that of its task's name."""
        if not tasks:
            raise UserError("tasks is empty; an experiment needs at least one task to take problems from")
        if not any(task.weight for task in tasks.values()):
            raise UserError(f"tasks.{next(iter(tasks))}.weight is 0, as that of all tasks; give one a positive weight")
        self._tasks, self._teachers = dict(tasks), dict(teachers)

    def problems(self, split: Split, count: int, seed: int, *, repeat: bool = False) -> list[Problem]:
        """`count` problems, of each task its share by weight, rounded down or up, in this as in every smaller count,
        which gives a prefix.

        With `repeat`, a task that has a fixed number of problems starts again, in a new order, when all were given.

        Raises UserError where a task runs out, naming it.
        """
        # Where no task gives any, each is asked all the same, and says so.
        giving = {name: task for name, task in self._tasks.items() if task.weight and task.gives(split)} or self._tasks
        turns = turns_by_weight({name: task.weight for name, task in giving.items()}, count)
        found = {name: iter(self._of_task(name, split, own, seed, repeat)) for name, own in Counter(turns).items()}
        return [next(found[name]) for name in turns]

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` is exactly right, as the problem's own task judges."""
        return self._task_of(problem).verify(problem, answer)

    def working_is_correct(self, problem: Problem, thinking: str) -> bool | None:
        """See `Task.working_is_correct`."""
        return self._task_of(problem).working_is_correct(problem, thinking)

    def left_out(self) -> list[str]:
        """See `Task.left_out`: of every task that gives problems, by its name."""
        return [
            f"task {name!r}: {line}"
            for name, task in self._tasks.items()
            if task.weight
            for line in task.left_out(self._held_out_by_others(name))
        ]

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
        if len(self._tasks) > 1:
            found = [dataclasses.replace(problem, source=name) for problem in found]
        return [self._for_teacher(name, problem) for problem in found]

    def _for_teacher(self, name: str, problem: Problem) -> Problem:
        """A problem of task `name` with whom it is asked, and what that one reads."""
        teacher = self._teacher_of(name, problem)
        prompt, template = problem.teacher_prompt, self._teachers.get(teacher)
        if prompt is None and template is not None:
            known = {"prompt": problem.prompt, "solution": problem.solution, "answer": problem.answer}
            if missing := [field for _, field, _, _ in Formatter().parse(template) if field and not known[field]]:
                raise UserError(
                    f"task {name!r}: problem {problem.problem_id} of family {problem.family!r} has no {missing[0]}, "
                    "which the teacher's prompt names; give the data one, or take it out of the prompt"
                )
            prompt = template.format(**known)
        if (teacher, prompt) == (problem.teacher, problem.teacher_prompt):
            return problem
        return dataclasses.replace(problem, teacher=teacher, teacher_prompt=prompt)

    def _teacher_of(self, name: str, problem: Problem) -> str:
        """The teacher that is asked about a problem of task `name`. Raises UserError where there is none."""
        named = [one for one in self._teachers if one]
        if not named:
            if problem.teacher:
                raise UserError(
                    f"task {name!r}: its data asks for teacher {problem.teacher!r}, but the experiment has one teacher "
                    "without a name; give it teachers, or leave out teacher_column"
                )
            return ""
        teacher = problem.teacher or name
        if teacher not in named:
            asked = f"its data asks for teacher {teacher!r}, which" if problem.teacher else "its name"
            raise UserError(
                f"task {name!r}: {asked} is none of teachers ({', '.join(named)}); name a teacher after the "
                "task, or let teacher_column of a PromptFile name one for each row"
            )
        return teacher

    def _held_out_by_others(self, name: str) -> Excluded | None:
        others = [task for other, task in self._tasks.items() if other != name]
        return (lambda question: any(task.holds_out(question) for task in others)) if others else None

    def _task_of(self, problem: Problem) -> Task:
        return self._tasks[problem.source] if problem.source else next(iter(self._tasks.values()))
