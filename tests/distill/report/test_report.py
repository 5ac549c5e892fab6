import dataclasses
import io
import json
import math
import re

import pytest
from rich.console import Console

from distill.monitor.metrics import MetricsWriter, RolloutSample
from distill.report import report as reports
from distill.report.costs import cost_table
from distill.report.curves import panels
from distill.report.reading import read_rollouts
from distill.report.results import LengthHistogram, Score, headline
from distill.report.samples import side_by_side, training_groups
from qwen3.errors import UserError
from tests.distill.reported import OFF_POLICY, ON_POLICY, REPORT, SAMPLE, Page, row


def page(run_dir, report=REPORT):
    return Page(reports.write_report(run_dir, report).read_text(encoding="utf-8"))


def test_json_has_exactly_the_promised_keys(tmp_path):
    reports.write_report(tmp_path, dataclasses.replace(REPORT, rows=[row("teacher", 0.5)], stages=[ON_POLICY]))
    data = json.loads((tmp_path / "report.json").read_text())
    assert {"experiment", "rows", "stages"} <= data.keys()
    assert data["rows"] == [
        {
            "model": "teacher",
            "mode": "thinking",
            "pass_at_1": 0.5,
            "pass_at_k": {"8": 0.6},
            "problems": 256,
            "samples_per_problem": 8,
            "mean_response_tokens": 31.4,
        }
    ]
    assert data["stages"] == [
        {
            "name": "on_policy",
            "kind": "OnPolicy",
            "steps": 150,
            "tokens_trained": 1_228_800,
            "tokens_sampled": 24_576,
            "student_train_flops": 9.6e11,
            "student_sample_flops": 0,
            "teacher_flops": 3.6e11,
            "device_seconds": 48.0,
        }
    ]


def test_optional_figures_are_absent_or_present_never_zero(tmp_path):
    data = REPORT.to_json()
    assert data["rows"][1]["pass_at_1_stderr"] == 0.031
    assert "pass_at_1_stderr" not in data["rows"][0]
    assert data["stages"][0]["teacher_generate_seconds"] == 12.0
    assert "teacher_score_seconds" not in data["stages"][0]
    assert "wall_seconds" not in data
    assert "provenance" not in data


@pytest.mark.parametrize(
    "field",
    [{"pass_at_1": 96.2}, {"pass_at_1": math.nan}, {"pass_at_k": {8: -0.1}}, {"finished": 75}, {"top_1_agreement": 2}],
)
def test_share_out_of_range_is_refused(field):
    with pytest.raises(ValueError, match="not a share"):
        row("on_policy", **{"pass_at_1": 0.5} | field)


def test_headline_is_computed_from_the_rows():
    assert headline(REPORT) == (
        "0.13M student: 49.1 % after off_policy → 96.2 % after on_policy (0.72M teacher: 99.5 %)."
    )
    one_stage = dataclasses.replace(REPORT, rows=[REPORT.rows[0], REPORT.rows[3]], student_parameters=8_200_000_000)
    assert headline(one_stage) == "8.2B student: 3.1 % before training → 96.2 % after on_policy."
    only_teacher = dataclasses.replace(REPORT, rows=[row("teacher", 0.85, mode="non_thinking")])
    assert headline(only_teacher) == "0.72M teacher: 85.0 %."
    unknown_sizes = dataclasses.replace(REPORT, student_parameters=None, teacher_parameters=None)
    assert headline(unknown_sizes).startswith("Student: 49.1 %")
    assert headline(dataclasses.replace(REPORT, rows=[])) == "Nothing was evaluated."


def compared(model, forward_kl, mode="thinking", **fields):
    """A row of a run whose prompts have no answers."""
    return reports.EvaluationRow(
        model=model, mode=mode, forward_kl=forward_kl, problems=20, samples_per_problem=1, graded_problems=0,
        mean_response_tokens=31.4, finished=0.75, **fields,
    )  # fmt: skip


WITHOUT_ANSWERS = dataclasses.replace(
    REPORT,
    rows=[
        compared("student_initial", 0.8213, perplexity=3.4561, top_1_agreement=0.5),
        compared("off_policy", 0.41, perplexity=2.5, top_1_agreement=0.6),
        compared("on_policy", 0.000112, perplexity=1.7, top_1_agreement=0.95),
        compared("teacher", None, perplexity=1.65),
    ],
)


def test_headline_without_answers_is_the_kl_and_without_a_teacher_the_share_that_ends():
    assert headline(WITHOUT_ANSWERS) == (
        "0.13M student: KL to the teacher 0.41 nats a token after off_policy → 0.000112 after on_policy."
    )
    rows = [compared("student_initial", None), compared("sft", None)]
    supervised = reports.Report(experiment="sft", rows=rows, stages=[])
    assert headline(supervised) == "Student: finished responses 75.0 % before training → 75.0 % after sft."
    only_teacher = dataclasses.replace(WITHOUT_ANSWERS, rows=WITHOUT_ANSWERS.rows[3:])
    assert headline(only_teacher) == "0.72M teacher: finished responses 75.0 %."


def test_no_row_without_an_answer_speaks_of_accuracy(tmp_path):
    data = WITHOUT_ANSWERS.to_json()
    assert not [name for row in data["rows"] for name in row if name.startswith(("pass", "working"))]
    assert "forward_kl" not in data["rows"][3]
    shown = page(tmp_path, WITHOUT_ANSWERS)
    texts = " ".join(shown.texts)
    assert "KL to the teacher in thinking mode on 20 held-out problems." in texts
    assert {"0.821", "0.000112"} <= set(shown.texts)
    assert "0.0" not in shown.texts


def test_a_stage_beside_the_exported_students_line_stands_apart_as_a_comparison(tmp_path):
    told = dataclasses.replace(REPORT, rows=[*REPORT.rows, row("more_of_the_same", 0.6)])
    shown = page(tmp_path, dataclasses.replace(told, lineage=["off_policy", "on_policy"])).texts
    assert {"after off_policy", "after on_policy", "more_of_the_same"} <= set(shown)
    ladder = shown[: shown.index("What it cost")]
    # In the ladder and in the table: after the teacher, below a heading of their own; one student is exported.
    for begin, end in ((0, ladder.index("Model")), (ladder.index("Model"), len(ladder))):
        part = ladder[begin:end]
        assert part.index("teacher") < part.index("Comparisons, not exported") < part.index("more_of_the_same")
        assert part[part.index("exported") - 1].endswith("on_policy")
        assert part.count("exported") == 1
    alone = page(tmp_path, told).texts
    assert "after more_of_the_same" in alone, "without a line nothing is known to be beside it"
    assert not {"exported", "Comparisons, not exported"} & set(alone)


def test_page_stands_alone(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.scalars(step, {"loss": 1 / step, "kl/thinking": 0.1, "kl/non_thinking": 0.2}, stage="off_policy")
    shown = page(tmp_path)
    assert "script" not in shown.tags
    assert "link" not in shown.tags
    assert all(address.startswith("#") for address in shown.addresses)
    # pass@1 over FLOPs in two modes, one bar chart, and a panel each for loss and KL.
    assert shown.tags.count("svg") == 5
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"url\((?!#)|@import", text) is None
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_page_shows_the_measured_figures(tmp_path):
    texts = " ".join(page(tmp_path).texts)
    for figure in (
        "49.1",
        "± 3.1",
        "45.0 %",
        "256 × 8",
        "1.32 T",
        "48 s",
        "student trains 36 s",
        "teacher generates 12 s",
    ):
        assert figure in texts


def test_what_models_and_users_wrote_is_inert(tmp_path):
    attack = "<script>alert(1)</script>"
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {f"{attack}/{attack}": 1.0, "loss": 1.0}, stage="off_policy")
        writer.samples(
            1,
            [
                RolloutSample(
                    mode="thinking",
                    prompt=attack,
                    thinking=f"</pre>{attack}",
                    answer="</details>",
                    expected=attack,
                    correct=False,
                    response_tokens=3,
                    finished=True,
                    prompt_id="a",
                )
            ],
            stage="off_policy",
        )
        writer.evaluation(
            attack, {}, [dataclasses.replace(SAMPLE, prompt=attack, answer=attack, expected=attack)], step=1
        )
    (tmp_path / "config.json").write_text(json.dumps({"name": attack}))
    stages = [OFF_POLICY, dataclasses.replace(OFF_POLICY, name=f"{attack} $x_{{")]
    scored = row(attack, 0.5, by_family={attack: Score(pass_at_1=0.5, problems=2)})
    report = dataclasses.replace(
        REPORT,
        experiment=attack,
        rows=[scored, row(stages[1].name, 0.4)],
        stages=stages,
        lineage=(attack,),
        provenance={"command": attack, "commit": attack},
    )
    shown = page(tmp_path, report)
    assert "script" not in shown.tags
    assert shown.texts.count(attack) >= 8
    assert f"</pre>{attack}" in shown.texts


def test_page_from_an_empty_run(tmp_path):
    shown = page(tmp_path, reports.Report(experiment="nothing", rows=[], stages=[]))
    assert "Nothing was evaluated." in shown.texts
    assert "svg" not in shown.tags


def test_curves_take_gaps_one_point_and_steps_written_twice(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(3, {"gradient_norm": 1e308, "learning_rate": -1e308}, stage="off_policy")
        writer.scalars(4, {"gradient_norm": 1.0, "learning_rate": 1.0}, stage="off_policy")
        writer.scalars(5, {"loss": float("nan"), "pass_at_1/thinking": 0.2}, stage="off_policy")
        writer.scalars(5, {"pass_at_1/thinking": 0.4}, stage="off_policy")
        writer.scalars(0, {"unheard_of": 0.0}, stage="evaluation")
    shown = page(tmp_path)
    assert "Unheard of" in shown.texts
    # The loss has no value at all, and no panel.
    assert "Loss" not in shown.texts
    assert shown.tags.count("svg") == 7


def test_metrics_of_one_group_share_a_panel():
    scalars = {"divergence": 0.2, "divergence/thinking": 0.1, "student_entropy": 1.0, "teacher_entropy": 0.9, "new": 1}
    metrics = [{"stage": stage, "step": 4, "scalars": scalars} for stage in ("on_policy", "off_policy")]
    shown = panels(metrics, ["off_policy", "on_policy"])
    assert [panel.title for panel in shown] == ["Divergence by mode", "Entropy", "New"]
    assert shown[0].legend == [("all", "--student"), ("thinking", "--thinking")]
    assert shown[1].legend == [("student", "--student"), ("teacher", "--teacher")]
    assert shown[2].legend == []
    # The stages follow the report's order, each with a point where it ends.
    assert shown[2].svg.index(">off_policy<") < shown[2].svg.index(">on_policy<")


def test_a_panel_shows_only_the_stages_that_have_its_values():
    metrics = [
        {"stage": "off_policy", "step": 4, "scalars": {"loss": 1.0, "accuracy/thinking": None}},
        {"stage": "on_policy", "step": 2, "scalars": {"loss": 1.0, "accuracy/thinking": 0.5}},
    ]
    loss, accuracy = panels(metrics, ["off_policy", "on_policy"])
    assert (">off_policy<" in loss.svg, ">on_policy<" in loss.svg) == (True, True)
    assert (">off_policy<" in accuracy.svg, ">on_policy<" in accuracy.svg) == (False, True)
    assert ">nats a token<" in loss.svg
    assert ">optimiser steps<" in loss.svg


def test_the_responses_of_all_models_to_one_problem_stand_side_by_side(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for model, correct in (("teacher", True), ("student_initial", False), ("on_policy", True)):
            writer.evaluation(model, {}, [dataclasses.replace(SAMPLE, correct=correct)], step=0)
        writer.samples(3, [dataclasses.replace(SAMPLE, prompt_id="trained on")], stage="on_policy")
    problems = side_by_side(read_rollouts(tmp_path), REPORT)
    assert [problem["prompt"] for problem in problems] == [SAMPLE.prompt]
    columns = [(response["caption"], response["verdict"][0]) for response in problems[0]["responses"]]
    assert columns == [("student before", "wrong"), ("after on_policy", "right"), ("teacher", "right")]
    (group,) = training_groups(read_rollouts(tmp_path), ["off_policy", "on_policy"])
    assert [member["rollout"].prompt_id for member in group["rollouts"]] == ["trained on"]


def test_cost_bars_share_one_scale():
    half = dataclasses.replace(OFF_POLICY, name="half", device_seconds=24.0)
    costs = cost_table([OFF_POLICY, half])
    assert [stage["length"] for stage in costs["rows"]] == ["100.0", "50.0"]


def test_what_is_known_of_parts_lengths_and_ends_is_shown_and_nothing_else(tmp_path):
    headings = {"pass@1 by family, %", "How long the responses are", "Cut off", "pass@1 by task, %"}
    assert not headings & set(page(tmp_path).texts)
    told = row(
        "on_policy",
        0.962,
        finished=0.975,
        length_histogram=LengthHistogram.of([3, 4, 4], 72),
        by_family={
            "sums": Score(pass_at_1=0.9, problems=90, pass_at_1_stderr=0.02),
            "products": Score(pass_at_1=0.1, problems=10),
        },
    )
    texts = page(tmp_path, dataclasses.replace(REPORT, rows=[*REPORT.rows[:3], told])).texts
    assert headings - set(texts) == {"pass@1 by task, %"}
    assert {"90.0 ± 2.0", "10.0", "2.5 %", "on_policy, 2.5 % cut off"} <= set(texts)
    assert texts.index("sums") < texts.index("products"), "the family with more problems comes first"


def test_the_command_that_repeats_the_run_is_there_with_its_commit(tmp_path):
    def said(**provenance):
        return " ".join(page(tmp_path, dataclasses.replace(REPORT, provenance=provenance)).texts)

    command = "python -m distill.run experiments/quickstart.py --seed 1"
    assert f"git checkout 0123456789ab\n{command}" in said(command=command, commit="0123456789ab")
    changed = said(command=command, commit="0123456789ab+changes")
    assert f"git checkout 0123456789ab\n{command}" in changed
    assert "changes that are in no commit" in changed
    assert "The same again" not in page(tmp_path, dataclasses.replace(REPORT, provenance={})).texts


def test_page_is_reproducible(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 100):
            writer.scalars(step, {"loss": 1 / step}, stage="off_policy")
    first = reports.write_report(tmp_path, REPORT).read_bytes()
    assert reports.write_report(tmp_path, REPORT).read_bytes() == first


def test_damaged_metrics_are_named_and_the_report_json_stays(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("oops\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        reports.write_report(tmp_path, REPORT)
    assert json.loads((tmp_path / "report.json").read_text())["experiment"] == "quickstart"


def test_terminal_table_fits_eighty_columns():
    output = io.StringIO()
    Console(file=output, width=80).print(reports.terminal_table(REPORT))
    lines = output.getvalue().splitlines()
    assert "…" not in output.getvalue()
    (line,) = [line for line in lines if "off_policy" in line and "thinking" in line]
    assert line.split() == ["off_policy", "thinking", "49.1", "±", "3.1", "58.9", "%", "45.0", "%", "31.4"]
    assert "256 problems × 8 samples" in output.getvalue()


def test_terminal_table_shows_what_was_measured_and_nothing_else():
    def shown(report):
        output = io.StringIO()
        Console(file=output, width=80).print(reports.terminal_table(report))
        assert "…" not in output.getvalue()
        return [line.split() for line in output.getvalue().splitlines()]

    lines = shown(WITHOUT_ANSWERS)
    assert ["model", "mode", "KL", "perplexity", "top-1", "ended", "tokens"] in lines
    assert ["student", "before", "thinking", "0.821", "3.456", "50.0", "%", "75.0", "%", "31.4"] in lines
    assert ["teacher", "thinking", "1.65", "75.0", "%", "31.4"] in lines
    widest = row("student_initial", 1.0, "non_thinking", pass_at_1_stderr=0.012, working_correct=1.0, forward_kl=0.123)
    (line,) = [line for line in shown(dataclasses.replace(REPORT, rows=[widest])) if "non-thinking" in line]
    assert line[2:] == ["non-thinking", "100.0", "±", "1.2", "100.0", "%", "100.0", "%", "0.123", "31.4"]
