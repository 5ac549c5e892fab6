"""How the models of a run descend from one another, and what led to each of them."""

from collections.abc import Mapping

from distill.report.results import STUDENT_INITIAL, TEACHER, Report, StageCost, model_name, when


def stage_flops(stage: StageCost) -> float:
    """All that a stage cost, its teacher included."""
    return stage.student_train_flops + stage.student_sample_flops + stage.teacher_flops


def starts(report: Report) -> dict[str, str]:
    """By stage, the model that it started from; where the report does not say, the stage before."""
    names = [STUDENT_INITIAL, *(stage.name for stage in report.stages)]
    return {stage.name: stage.start_from or before for stage, before in zip(report.stages, names[:-1], strict=True)}


def total_flops(report: Report) -> Mapping[str, float]:
    """By model, the FLOPs of its stage and of all stages that led there; the initial student has cost none."""
    totals, start = {STUDENT_INITIAL: 0.0}, starts(report)
    for stage in report.stages:
        totals[stage.name] = totals.get(start[stage.name], 0.0) + stage_flops(stage)
    return totals


def exported(report: Report) -> str | None:
    """The stage whose student was exported; None where the report does not say."""
    return report.lineage[-1] if report.lineage else None


def is_comparison(model: str, report: Report) -> bool:
    """Whether `model` is a stage that the exported student did not go through."""
    return bool(report.lineage) and model not in (STUDENT_INITIAL, TEACHER, *report.lineage)


def in_order(report: Report) -> list[str]:
    """The evaluated models: the exported student's line and the teacher, then the comparisons."""
    models = list(dict.fromkeys(row.model for row in report.rows))
    return sorted(models, key=lambda model: is_comparison(model, report))


def caption(model: str, report: Report) -> str:
    """A model as the heading of what it did; a comparison stands under a heading of its own."""
    told = model in (STUDENT_INITIAL, TEACHER) or is_comparison(model, report)
    return model_name(model) if told else when(model)
