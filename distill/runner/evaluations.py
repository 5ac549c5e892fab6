"""The evaluations of a run: of every model once, kept in the run directory, the teacher's before any student's."""

import functools

from distill.evaluation.evaluate import Evaluator
from distill.experiment import Experiment
from distill.report.results import TEACHER, EvaluationRow, record_json
from distill.runner.run_directory import RunDirectory
from distill.stages.context import RunContext
from qwen3.decoder.model import Qwen3
from qwen3.rollout import Rollout


class Evaluations:
    """Evaluates what no earlier process has; nothing at all where the experiment evaluates no problems."""

    def __init__(self, experiment: Experiment, context: RunContext, run: RunDirectory):
        self._experiment, self._context, self._run = experiment, context, run
        compared = self._teacher_responses if experiment.compares else None
        self._evaluator = Evaluator(experiment.evaluation, context, compared)

    def of_student(self, name: str, model: Qwen3) -> list[EvaluationRow]:
        """Of the student after stage `name`, or before all of them."""
        if not self._experiment.evaluation.problems:
            return []
        known = self._run.evaluation(name)
        if known is not None:
            return known
        rows = self._evaluator.evaluate(name, model).rows
        self._run.keep_evaluation(name, [record_json(row) for row in rows])
        return rows

    def of_teacher(self) -> list[EvaluationRow]:
        """Of the teacher, if there is one."""
        if not self._experiment.evaluates_teacher:
            return []
        return self._run.evaluation(TEACHER) or self._evaluated_teacher[0]

    def _teacher_responses(self) -> list[Rollout]:
        known = self._run.teacher_responses()
        return self._evaluated_teacher[1] if known is None else known

    @functools.cached_property
    def _evaluated_teacher(self) -> tuple[list[EvaluationRow], list[Rollout]]:
        evaluated = Evaluator(self._experiment.evaluation, self._context).evaluate(TEACHER, None)
        # The rows last: once they are there, so are the responses.
        self._run.keep_teacher_responses(evaluated.responses)
        self._run.keep_evaluation(TEACHER, [record_json(row) for row in evaluated.rows])
        return evaluated.rows, evaluated.responses
