"""Reinforcement learning from the command's point of view: runs in miniature, on models of one layer."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from distill.experiment import Experiment
from distill.monitor.metrics import RolloutSample
from distill.monitor.progress import Progress
from distill.report.curves import _TEXTS, _place
from distill.runner.execute import execute
from distill.stages import Grpo, OnPolicy
from distill.stages.grpo import _FromRewards
from distill.stages.loop import Training
from distill.stages.stopping import Interrupted, StopRequest
from distill.tasks import Problem, PromptFile
from distill.tasks.mixture import TaskMixture
from distill.training.policy import PolicyLoss
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from qwen3.sharding import make_mesh
from student.init import FromScratch
from tests.distill import miniature
from tests.distill.faults import scalars

pytestmark = pytest.mark.usefixtures("charts_are_left_out")


def short(problem: Problem, sample: RolloutSample) -> float:
    """Tells the responses of an untrained student apart."""
    del problem
    return -len(sample.thinking + sample.answer) / 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return miniature.make_teacher(tmp_path_factory.mktemp("teacher"), miniature.MOE | {"num_hidden_layers": 1})


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs for one device compile several times as fast as for eight."""
    monkeypatch.setattr("distill.experiment.make_mesh", lambda shape, _: make_mesh(shape, jax.devices()[:1]))


def with_stage(teacher: str, stage: Grpo | OnPolicy, *, needs_teacher: bool = False) -> Experiment:
    whole = miniature.experiment(teacher)
    return dataclasses.replace(
        whole,
        student=FromScratch(architecture=miniature.DENSE | {"num_hidden_layers": 1}, tokenizer=teacher),
        teacher=whole.teacher if needs_teacher else None,
        stages={"rl": stage},
        evaluation=dataclasses.replace(whole.evaluation, problems=0),
        export_stage=None,
    )


def grpo(**fields: Any) -> Grpo:
    training = dataclasses.replace(miniature._training(2), checkpoint_every_steps=1)
    usual = {
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "thinking": SamplingParams(max_new_tokens=36, thinking_budget=8),
        "non_thinking": SamplingParams(max_new_tokens=8),
        "max_prompt_tokens": 80,
        "reward": short,
        "training": training,
    }
    return Grpo(**{**usual, **fields})


def run(experiment: Experiment, directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    with Progress() as progress:
        execute(experiment, directory, progress, StopRequest())
    return scalars(directory)


class StopAfter(StopRequest):
    """Asked to stop once so many steps are done."""

    def __init__(self, steps: int):
        super().__init__()
        self._left = steps

    def agreed(self) -> bool:
        self._left -= 1
        return self._left == 0


def weights(directory: Path) -> bytes:
    return (directory / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps that need no teacher, strictly on-policy."""
    directory = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.experiment.make_mesh", lambda shape, _: make_mesh(shape, jax.devices()[:1]))
        run(with_stage(teacher, grpo()), directory)
    return directory


def test_what_a_step_measures(plain: Path) -> None:
    found = scalars(plain)
    assert found.keys() == {("rl", 1), ("rl", 2)}
    for metrics in found.values():
        # Engine and trainer are one code base: float32 sums in another order.
        assert 0 <= metrics["sampler_mismatch"] < 5e-6
        assert metrics["policy_ratio"] == 1
        assert metrics["clipped_low"] == metrics["clipped_high"] == 0
        assert sum(metrics[f"group_outcomes/{which}"] for which in ("mixed", "all_right", "all_wrong")) == 1
        assert metrics["group_outcomes/mixed"] > 0
        assert metrics["reward"] < 0
        assert metrics["gradient_norm"] > 0
        assert 4 < metrics["student_entropy"] < np.log(384)
        assert not {"staleness", "reference_kl", "corrected", "divergence", "entropy_coefficient"} & metrics.keys()
    assert {_place(name)[0] for metrics in found.values() for name in metrics} <= _TEXTS.keys()
    cost = json.loads((plain / "report.json").read_text())["stages"][0]
    assert (cost["kind"], cost["teacher_flops"]) == ("Grpo", 0)
    assert cost["student_sample_flops"] > 0


def test_without_weight_a_teacher_changes_nothing(teacher: str, plain: Path, tmp_path: Path) -> None:
    found = run(with_stage(teacher, grpo(), needs_teacher=True), tmp_path / "run")
    assert found == scalars(plain)
    assert weights(tmp_path / "run") == weights(plain)


def test_a_teacher_alone_is_on_policy_distillation(teacher: str, tmp_path: Path) -> None:
    rewarded = grpo(teacher_kl=1.0, policy_weight=0.0)
    fields = {field.name: getattr(rewarded, field.name) for field in dataclasses.fields(OnPolicy)}
    of_both = {}
    for name, stage in {"grpo": rewarded, "on_policy": OnPolicy(**fields)}.items():
        found = run(with_stage(teacher, stage, needs_teacher=True), tmp_path / name)
        of_both[name] = weights(tmp_path / name), found
    assert of_both["grpo"][0] == of_both["on_policy"][0]
    for step, metrics in of_both["on_policy"][1].items():
        assert metrics.items() <= of_both["grpo"][1][step].items()
        assert of_both["grpo"][1][step].keys() - metrics.keys() == {
            name
            for name in of_both["grpo"][1][step]
            if name.partition("/")[0] in ("reward", "reward_failures", "group_outcomes")
        }


def fails_now_and_then(problem: Problem, sample: RolloutSample) -> float:
    if sample.sample_index % 4 == 2:
        raise ValueError("no such judge")
    return short(problem, sample) * (problem.problem_id[-1] in "01234567")


def test_all_of_it_goes_on_bit_for_bit_where_it_stopped(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several updates a batch, batches ahead, log-probabilities of weights that are gone, an entropy bonus that has
    adapted, failed rewards, groups in the place of others: stopped amid a batch and between two."""
    verified: list[str] = []
    verify = TaskMixture.verify

    def noted(self: TaskMixture, problem: Problem, answer: str) -> bool:
        verified.append(problem.problem_id)
        return verify(self, problem, answer)

    monkeypatch.setattr(TaskMixture, "verify", noted)
    training = dataclasses.replace(grpo().training, steps=6)
    policy = PolicyLoss(correction="truncate", reference_kl=0.1)
    stage = grpo(
        policy=policy,
        updates_per_batch=2,
        max_staleness=1,
        entropy_floor=9.0,
        training=training,
        reward=fails_now_and_then,
        most_failed=0.25,
        resample_factor=2.0,
    )
    experiment = with_stage(teacher, stage)
    whole = run(experiment, tmp_path / "whole")
    asked = len(verified)
    for stop_after in (1, 3, 1):
        with Progress() as progress, pytest.raises(Interrupted):
            execute(experiment, tmp_path / "parts", progress, StopAfter(stop_after))
    parts = run(experiment, tmp_path / "parts")
    assert len(verified) == 2 * asked > 0, "nothing is verified again"
    assert {metrics["reward_failures"] for metrics in whole.values()} == {0.25}
    assert min(metrics["kept_tokens"] for metrics in whole.values()) < 1
    assert [metrics["entropy_coefficient"] for metrics in whole.values()] == pytest.approx(
        [0.005 * n for n in range(6)]
    )
    assert [metrics["staleness"] for metrics in whole.values()] == [0, 1, 2, 3, 2, 3]
    for step, metrics in whole.items():
        assert parts[step] == metrics, step
        # The trainer's log-probabilities by the very weights that generated.
        assert 0 <= metrics["sampler_mismatch"] < 5e-6
        assert metrics["reference_kl"] >= 0
    assert [whole["rl", step]["policy_ratio"] == pytest.approx(1, abs=1e-5) for step in (1, 2)] == [True, False]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_groups_without_signal_are_replaced_paid_for_and_told_of(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, bool, float]] = []
    kept: list[tuple[int, Sequence[float]]] = []

    def of_some(problem: Problem, sample: RolloutSample) -> float:
        value = -len(sample.thinking + sample.answer) * (problem.problem_id[-1] in "01234567")
        given.append((sample.mode, sample.finished, value))
        return value

    def complete(self: Any, *arguments: Any) -> Any:
        written = whole(self, *arguments)
        kept.append((len(given), written.rewards))
        return written

    whole = _FromRewards.complete
    monkeypatch.setattr(_FromRewards, "complete", complete)
    found = {}
    for factor in (1.0, 4.0):
        given.clear()
        kept.clear()
        stage = grpo(reward=of_some, resample_factor=factor, prompts_per_step=3)
        found[factor] = run(with_stage(teacher, stage), tmp_path / str(factor))
    assert min(metrics["group_outcomes/mixed"] for metrics in found[1.0].values()) < 1
    assert all(np.ptp(np.reshape(rewards, (3, 4)), axis=1).min() > 0 for _, rewards in kept), (
        "nine more prompts a step, half of which have a signal"
    )
    # What is told is told of all that was generated, though only the groups with a signal are learned from.
    first = 0
    for (end, _), metrics in zip(kept, found[4.0].values(), strict=True):
        modes, finished, rewards = zip(*given[first:end], strict=True)
        thinking = [mode == "thinking" for mode in modes]
        assert metrics["reward"] == pytest.approx(np.mean(rewards))
        assert metrics["reward/thinking"] == pytest.approx(np.mean(np.array(rewards)[thinking]))
        assert metrics["finished/thinking"] == pytest.approx(np.mean(np.array(finished)[thinking]))
        assert metrics["group_outcomes/mixed"] == np.mean(np.ptp(np.reshape(rewards, (-1, 4)), axis=1) > 0)
        first = end
    assert first == len(given) > 2 * 3 * 4
    assert all("kept_tokens" not in metrics for metrics in found[1.0].values())
    kept = [metrics["kept_tokens"] for metrics in found[4.0].values()]
    assert min(kept) < 1
    spent = {factor: json.loads((tmp_path / str(factor) / "report.json").read_text())["stages"][0] for factor in found}
    assert spent[4.0]["tokens_sampled"] > spent[1.0]["tokens_sampled"]
    assert spent[4.0]["student_sample_flops"] > spent[1.0]["student_sample_flops"]


def test_a_reward_that_has_changed_is_another_experiment(teacher: str, plain: Path) -> None:
    def short(problem: Problem, sample: RolloutSample) -> float:
        return -len(sample.thinking + sample.answer) / 9

    with pytest.raises(UserError, match=r"stages\.rl\.reward\.source: ") as refused:
        run(with_stage(teacher, grpo(reward=short)), plain)
    assert "\n" not in str(refused.value)


def test_a_reward_that_fails_ends_the_run_in_one_line(teacher: str, tmp_path: Path) -> None:
    def fails(problem: Problem, sample: RolloutSample) -> float:
        raise ValueError("no such judge")

    failed = (
        r"reward .*fails, asked about sample 0 .* raised ValueError: no such judge.*\(1 of 8 responses failed, and "
    )
    with pytest.raises(UserError, match=failed + "most_failed is 0.1"):
        run(with_stage(teacher, grpo(reward=fails)), tmp_path / "run")


@pytest.mark.parametrize("failed", ["left_out", "wrong"])
def test_a_reward_that_fails_now_and_then_is_counted(failed: Any, teacher: str, tmp_path: Path) -> None:
    values: list[float] = []

    def fails(problem: Problem, sample: RolloutSample) -> float:
        if sample.sample_index % 4 == 2:
            raise ValueError("no such judge")
        values.append(short(problem, sample))
        return values[-1]

    experiment = with_stage(teacher, grpo(reward=fails, most_failed=0.25, failed=failed, updates_per_batch=2))
    learned: list[np.ndarray] = []
    per_token = _FromRewards.per_token

    def told(self: Any, written: Any, part: slice) -> Any:
        found = per_token(self, written, part)
        learned.extend(arrays["weights"] for arrays in found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_FromRewards, "per_token", told)
        found = run(experiment, tmp_path / "run")
    assert [metrics["reward_failures"] for metrics in found.values()] == [0.25, 0.25]
    weighed = np.array([array.any() for array in learned]).reshape(2, 2, 4)
    assert weighed[:, :, [0, 1, 3]].all()
    assert weighed[:, :, 2].all() == (failed == "wrong")
    # What could not be had counts for nothing, or for 0.
    mean = np.mean(values) * (0.75 if failed == "wrong" else 1)
    assert np.mean([metrics["reward"] for metrics in found.values()]) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt is 1: an advantage is over the others of a group"),
        ({"unlikely_below": 0.1, "resample_factor": 2.0}, "unlikely_below is 0.1, by which no group lacks a signal"),
        ({"unlikely_below": 1.5}, "unlikely_below is 1.5"),
        ({"unlikely_below": 0.1, "teacher_kl": 1.0}, "with which no teacher is listened to: leave teacher_kl at 0"),
        ({"policy_weight": 0.0}, "policy_weight and teacher_kl are 0"),
        ({"updates_per_batch": 3}, "training.steps is 2, which updates_per_batch, 3, does not divide"),
        ({"penalty_tokens": 9}, "penalty_tokens is 9, above max_new_tokens 8"),
        ({"resample_factor": 1.1}, "resample_factor is 1.1, which adds no prompt to 2 prompts_per_step"),
        ({"thinking": SamplingParams(max_new_tokens=36, temperature=0)}, "thinking.temperature is 0: all responses"),
        ({"policy_weight": 0.0, "teacher_kl": 1.0, "policy": PolicyLoss(reference_kl=0.1)}, "policy_weight is 0, by"),
        ({"reward": functools.partial(print, 2)}, "give a function, or an instance of a frozen dataclass"),
        ({"reward_timeout_seconds": 1e10}, "reward_timeout_seconds is 10000000000.0; it must lie in 0.001..1e6"),
        ({"training": Training()}, "training.steps is None; reinforcement learning needs"),
        ({"most_failed": 1.5}, "most_failed is 1.5; it must lie in 0..1"),
        ({"reward": "short"}, "reward is 'short'; it must be Reward or None"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grpo(**fields)


def test_a_divergence_needs_a_teacher_and_a_verifier_an_answer(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.rl\.teacher_kl is 0\.5 and needs a teacher"):
        with_stage(teacher, grpo(teacher_kl=0.5))
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "What is 1 + 1?"}\n')
    tasks = TaskMixture({"ours": PromptFile(path=str(path), held_out_fraction=0, answer_column=None)})
    with pytest.raises(UserError, match="has no answer, which its reward goes by; give the data an answer column"):
        grpo(reward=None).asked(tasks, 0)
    assert len(grpo().asked(tasks, 0)) == len(grpo(reward=None, unlikely_below=0.1).asked(tasks, 0)) == 4
