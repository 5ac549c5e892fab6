"""How often a run calls each of its programs, against sums done by hand."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

from distill.experiment import Experiment, Teacher
from distill.planner.programs import programs
from distill.planner.topology_plan import plan_on
from distill.planner.whole_run import Assumptions, Pipeline, StagePlan, stage_plans
from distill.runner.experiment_file import load_experiment
from distill.stages import Grpo
from distill.stages.rollout_schedule import RolloutSchedule
from kernels_pallas.chips import CHIPS
from qwen3.sharding import MeshShape

QUICKSTART = Path(__file__).parents[3] / "experiments" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart() -> Experiment:
    return load_experiment(QUICKSTART)


def test_calls_of_a_run_by_hand(quickstart: Experiment) -> None:
    assumed = Assumptions(response_share=0.5, prompt_share=0.5, filled_share=1.0)
    made = programs(quickstart, jax.devices()[:1])
    by_name = {plan.stage: plan for plan in stage_plans(quickstart, made, assumed)}
    stage = quickstart.stages["off_policy"]
    share = stage.modes.thinking_fraction
    response = 0.5 * (share * stage.thinking.max_new_tokens + (1 - share) * stage.non_thinking.max_new_tokens)
    calls = by_name["off_policy"].calls
    assert calls["teacher_generates"] == stage.prompts * response / stage.batch_size
    assert calls["student_trains"] == calls["student_updates"] == stage.training.steps
    assert by_name["off_policy"].bytes_moved == stage.prompts * response * (8 * stage.top_k + 4)
    on_policy = quickstart.stages["on_policy"]
    # All start at once and wait for the longest.
    longest = max(on_policy.thinking.max_new_tokens, on_policy.non_thinking.max_new_tokens)
    assert by_name["on_policy"].calls["student_generates"] == on_policy.training.steps * longest
    # What the comparison may spend is what the on-policy stage has cost.
    assert by_name["same_outputs"].calls["student_trains"] > on_policy.training.steps
    assert by_name["evaluation"].calls.keys() == {
        "student_prefills",
        "student_generates",
        "teacher_prefills",
        "teacher_generates",
        "teacher_scores",
        "student_scores",
    }
    asked, students = quickstart.evaluation, 1 + len(quickstart.stages)
    one_text = sum(
        0.5 * (asked.max_prompt_tokens + asked.sampling(mode).max_new_tokens) * asked.problems for mode in asked.modes
    )
    scores = next(one for one in made if one.name == "evaluation: student scores")
    for purpose in ("teacher_scores", "student_scores"):
        # Of every problem the teacher's response and the student's.
        expected = students * 2 * one_text / (scores.rows * scores.length)
        assert by_name["evaluation"].calls[purpose] == pytest.approx(expected)


def test_a_comparison_of_larger_rows_takes_fewer_steps_for_the_same_flops(quickstart: Experiment) -> None:
    def steps(rows: int) -> float:
        same = quickstart.stages["same_outputs"]
        training = dataclasses.replace(same.training, rows=rows)
        stages = {**quickstart.stages, "same_outputs": dataclasses.replace(same, training=training)}
        experiment = dataclasses.replace(quickstart, stages=stages)
        plans = stage_plans(experiment, programs(experiment, jax.devices()[:1]), Assumptions())
        return next(plan for plan in plans if plan.stage == "same_outputs").calls["student_updates"]

    rows = quickstart.stages["same_outputs"].training.rows
    assert steps(2 * rows) == pytest.approx(steps(rows) / 2, abs=1)


def on_policy_calls(quickstart: Experiment, assumed: Assumptions, **fields: Any) -> Mapping[str, float]:
    stage = dataclasses.replace(quickstart.stages["on_policy"], **fields)
    alone = dataclasses.replace(
        quickstart, stages={"on_policy": dataclasses.replace(stage, start_from=None)}, export_stage=None
    )
    (plan, _) = stage_plans(alone, programs(alone, jax.devices()[:1]), assumed)
    return plan.calls


def test_a_schedule_saves_generating_scoring_and_training(quickstart: Experiment) -> None:
    assumed = Assumptions(response_share=1.0, prompt_share=0.5, filled_share=1.0)
    stage = quickstart.stages["on_policy"]
    schedule = RolloutSchedule(first=4, last=4, full_share=0.1, full_every_batches=4)
    training = dataclasses.replace(stage.training, rows=1)
    plain, cut = (
        on_policy_calls(quickstart, assumed, rollout_tokens=one, training=training) for one in (None, schedule)
    )
    longest = max(stage.thinking.max_new_tokens, stage.non_thinking.max_new_tokens)
    full = -(-stage.training.steps // 4)
    # A step with rollouts in full, 0.4 of them, takes as long as these; the others end after four tokens.
    assert cut["student_generates"] == full * longest + (stage.training.steps - full) * 4
    share, responses = stage.modes.thinking_fraction, stage.prompts_per_step * stage.samples_per_prompt
    whole = share * stage.thinking.max_new_tokens + (1 - share) * stage.non_thinking.max_new_tokens
    rows = stage.training.row_length
    microbatches = [
        math.ceil(responses * (0.5 * stage.max_prompt_tokens + response) / rows)
        for response in (0.4 * whole + 0.6 * 4, 4)
    ]
    trained = full * microbatches[0] + (stage.training.steps - full) * microbatches[1]
    assert cut["student_trains"] == cut["teacher_scores"] == trained < plain["student_trains"]
    assert cut["student_updates"] == plain["student_updates"] == stage.training.steps
    assert cut["student_prefills"] == plain["student_prefills"]


def test_further_passes_cost_training_alone(quickstart: Experiment) -> None:
    plain, thrice = (on_policy_calls(quickstart, Assumptions(), passes=passes) for passes in (1, 3))
    for purpose in ("student_trains", "student_updates"):
        assert thrice[purpose] == plain[purpose]
    for purpose in ("student_prefills", "student_generates", "teacher_scores"):
        assert thrice[purpose] == plain[purpose] / 3
    # Several updates' prompts at once take as many steps of the loop as one's, and are prefilled one after the other.
    together = on_policy_calls(quickstart, Assumptions(), updates_per_batch=3)
    assert together["student_generates"] == plain["student_generates"] / 3
    for purpose in ("student_trains", "student_updates", "teacher_scores"):
        assert together[purpose] == plain[purpose]
    # Each of several teachers has a microbatch of its own, where one had room for all.
    assert quickstart.teacher is not None
    several = dict.fromkeys(("one", "other", "third"), quickstart.teacher)
    thrice = on_policy_calls(dataclasses.replace(quickstart, teacher=None, teachers=several), Assumptions())
    assert plain["student_trains"] == plain["student_updates"] == thrice["student_updates"]
    assert thrice["student_trains"] == thrice["teacher_scores"] == 3 * plain["student_trains"]


def test_groups_that_are_replaced_and_rewards_without_a_teacher_cost_what_they_generate(quickstart: Experiment) -> None:
    on_policy = quickstart.stages["on_policy"]
    sizes = {name: getattr(on_policy, name) for name in ("thinking", "non_thinking", "max_prompt_tokens", "training")}

    def plans(factor: float) -> dict[str, StagePlan]:
        rewarded = Grpo(prompts_per_step=10, samples_per_prompt=8, resample_factor=factor, **sizes)
        stages = {**quickstart.stages, "on_policy": dataclasses.replace(rewarded, start_from="off_policy")}
        experiment = dataclasses.replace(quickstart, stages=stages)
        return {plan.stage: plan for plan in stage_plans(experiment, programs(experiment, jax.devices()[:1]), assumed)}

    assumed = Assumptions(response_share=0.5, prompt_share=0.5, filled_share=1.0)
    once, thrice = plans(1.0), plans(2.5)
    steps = on_policy.training.steps
    share = on_policy.modes.thinking_fraction
    mean = share * on_policy.thinking.max_new_tokens + (1 - share) * on_policy.non_thinking.max_new_tokens
    tokens = steps * 80 * (0.5 * on_policy.max_prompt_tokens + 0.5 * mean)
    assert once["on_policy"].student_tokens == pytest.approx(tokens)
    assert thrice["on_policy"].student_tokens == pytest.approx(2.5 * tokens)
    # 15 prompts in the place of others, ten of them at once.
    calls = [one["on_policy"].calls for one in (once, thrice)]
    assert calls[1]["student_generates"] == 3 * calls[0]["student_generates"]
    assert calls[1]["student_trains"] == calls[0]["student_trains"]
    # A comparison of as many FLOPs may spend that, too.
    affordable = [one["same_outputs"].calls["student_updates"] for one in (once, thrice)]
    assert affordable[1] > 1.2 * affordable[0] > 0


def test_a_run_that_evaluates_nothing_has_no_evaluation_in_its_plan(quickstart: Experiment) -> None:
    off = dataclasses.replace(quickstart, evaluation=dataclasses.replace(quickstart.evaluation, problems=0))
    made = programs(off, jax.devices()[:1])
    assert {program.stage for program in made} == quickstart.stages.keys()
    assert [plan.stage for plan in stage_plans(off, made, Assumptions())] == list(quickstart.stages)


def test_scoring_on_devices_of_its_own_overlaps_with_the_student(quickstart: Experiment) -> None:
    seconds = {"teacher_scores": 120.0, "student_prefills": 10.0, "student_generates": 90.0, "student_trains": 60.0}
    taken = {**seconds, "student_updates": 20.0}

    def elapsed(pipeline: Pipeline | None) -> float:
        return StagePlan(stage="one", calls={}, pipeline=pipeline).elapsed_seconds(taken)

    within = Pipeline(steps=10, batches=10, passes=1, microbatches=4, ahead=False)
    assert elapsed(None) == 300
    # Of each step's four microbatches the teacher scores all, 12 s, and the student trains on the last one after it.
    assert elapsed(within) == 10 * (1 + 9 + 12 + 6 / 4 + 2)
    # Writing and training, 18 s a step, are longer than scoring; where they are not, the first step's rollouts are
    # written before and the last one's training ends after it.
    ahead = dataclasses.replace(within, ahead=True)
    assert elapsed(ahead) == 180
    taken["teacher_scores"] = 400
    assert elapsed(ahead) == 400 + 10 + 6 / 4 + 2
    # Twice from each batch: its rollouts, 20 s, come first, and the second pass, 30 s, has nothing to wait for.
    twice = dataclasses.replace(within, batches=5, passes=2)
    assert elapsed(dataclasses.replace(twice, ahead=True)) == 400 + 20 + 6 / 4 + 2
    assert elapsed(twice) == 580 - 30 * 3 / 4

    def pipeline(teacher: Teacher, staleness: int) -> Pipeline | None:
        stage = dataclasses.replace(quickstart.stages["on_policy"], max_staleness=staleness)
        experiment = dataclasses.replace(
            quickstart, teacher=teacher, mesh=MeshShape(data=1), stages={**quickstart.stages, "on_policy": stage}
        )
        devices = jax.devices()[: 1 + (teacher.placement == "own_mesh")]
        planned = plan_on(experiment, devices, CHIPS["v5e"], "v5e:1x1", Assumptions())
        (found,) = (one for one in planned.stages if one.name == "on_policy")
        # A step of this size is one microbatch, which leaves nothing to overlap within it.
        overlaps = found.pipeline is not None and found.pipeline.ahead
        assert (found.elapsed_seconds < sum(found.seconds.values())) == overlaps
        return found.pipeline

    colocated = quickstart.teacher
    own = dataclasses.replace(colocated, placement="own_mesh", mesh=MeshShape(data=1))
    assert pipeline(colocated, 1) is None
    steps = quickstart.stages["on_policy"].training.steps
    for staleness in (0, 1):
        found = pipeline(own, staleness)
        assert found is not None
        assert found == Pipeline(steps=steps, batches=steps, passes=1, microbatches=1, ahead=staleness > 0)
