import dataclasses

import pytest

from distill.report.lineage import in_order, is_comparison, starts, total_flops
from distill.report.results import Report
from tests.distill.reported import OFF_POLICY, REPORT, row

ONE = 1.32e12  # what each of these stages costs


def stage(name: str, start: str | None):
    return dataclasses.replace(OFF_POLICY, name=name, start_from=start)


def test_flops_add_up_along_each_line_and_branches_part_where_they_start() -> None:
    stages = [stage("a", "student_initial"), stage("b", "a"), stage("c", "a"), stage("d", "student_initial")]
    report = dataclasses.replace(REPORT, stages=stages, lineage=("a", "b"))
    totals = total_flops(report)
    assert totals == pytest.approx({"student_initial": 0, "a": ONE, "b": 2 * ONE, "c": 2 * ONE, "d": ONE})
    assert [name for name in totals if is_comparison(name, report)] == ["c", "d"]


def test_without_a_start_a_stage_follows_the_one_before() -> None:
    report = Report(experiment="x", rows=[], stages=[stage("a", None), stage("b", None)])
    assert starts(report) == {"a": "student_initial", "b": "a"}


def test_comparisons_come_last() -> None:
    rows = [row(model, 0.5) for model in ("student_initial", "aside", "b", "teacher")]
    assert in_order(Report(experiment="x", rows=rows, stages=[], lineage=("b",))) == [
        "student_initial",
        "b",
        "teacher",
        "aside",
    ]
