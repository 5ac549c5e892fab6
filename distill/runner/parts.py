"""The parts that a run is seen to have: what its progress bars will be, in order, and where in the run they stand."""

from collections.abc import Collection, Iterator

from distill.evaluation.evaluate import evaluation_title
from distill.experiment import Experiment
from distill.monitor.time_left import Part
from distill.report.results import STUDENT_INITIAL, TEACHER
from distill.stages import OffPolicy
from distill.stages.off_policy import generating_title


def parts_of(experiment: Experiment, evaluated: Collection[str], finished: Collection[str]) -> list[Part]:
    """Those that are still to come where these models have been `evaluated` and these stages have `finished`."""
    count = len(experiment.stages)
    before = f"before stage 1 of {count}"
    # Students are compared with what the teacher generates.
    parts = [*(_evaluation(experiment, TEACHER, before) if experiment.compares else ())]
    parts += _evaluation(experiment, STUDENT_INITIAL, before)
    for number, (name, stage) in enumerate(experiment.stages.items(), start=1):
        place = f"stage {number} of {count}"
        if name not in finished:
            generates = isinstance(stage, OffPolicy) and stage.writes
            for title in (*([generating_title(name)] if generates else []), name):
                parts.append(Part(title=title, kind="stage", whose=name, place=place))
        parts += _evaluation(experiment, name, place)
    if experiment.evaluates_teacher and not experiment.compares:
        parts += _evaluation(experiment, TEACHER, f"stage {count} of {count}")
    return [part for part in parts if part.kind == "stage" or part.whose not in evaluated]


def _evaluation(experiment: Experiment, model: str, place: str) -> Iterator[Part]:
    for mode in experiment.evaluation.modes if experiment.evaluation.problems else ():
        # Every student is of one size; the teacher is evaluated once.
        pace = None if model == TEACHER else mode
        yield Part(title=evaluation_title(model, mode), kind="evaluation", whose=model, place=place, pace=pace)
