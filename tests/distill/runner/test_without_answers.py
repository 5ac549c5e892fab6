"""Prompts alone are enough: whole runs on prompts of which some or all have no answer, or that evaluate nothing."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.report.report import Report, terminal_table
from distill.report.results import headline
from distill.runner.execute import execute
from distill.stages import Sft
from distill.stages.loop import Training
from distill.stages.stopping import StopRequest
from distill.tasks import PromptFile
from distill.tasks.requests import ModeMix
from distill.training.checkpoint import Checkpointer
from distill.training.train_state import TrainState, abstract_state
from qwen3.checkpoint import hf
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import rollouts_from_json
from qwen3.sharding import MeshShape, make_mesh
from student.init import FromScratch
from tests.distill import miniature
from tests.distill.evaluation.test_comparison import written_out

pytestmark = pytest.mark.usefixtures("charts_are_left_out")

_ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two steps off-policy and two on-policy, on a file of prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    teacher = miniature.make_teacher(folder, miniature.MOE | _ONE_LAYER)
    prompts = [problem.prompt for problem in miniature.task().problems("train", 120, seed=3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    whole = miniature.experiment(teacher)
    short = dataclasses.replace(whole.stages["on_policy"].training, steps=2)
    # One mode and one way to sample, so that stages and evaluations share their programs, which are compiled for long.
    alike = {"thinking": SamplingParams(max_new_tokens=8), "non_thinking": SamplingParams(max_new_tokens=8)}
    stages = {
        name: dataclasses.replace(whole.stages[name], training=short, modes=ModeMix(thinking_fraction=0), **alike)
        for name in ("off_policy", "on_policy")
    }
    return dataclasses.replace(
        whole,
        student=FromScratch(architecture=miniature.DENSE | _ONE_LAYER, tokenizer=teacher),
        tasks={"prompts": PromptFile(path=str(folder / "prompts.jsonl"), answer_column=None, held_out_fraction=0.3)},
        stages=stages,
        export_stage=None,
        evaluation=dataclasses.replace(whole.evaluation, modes=("non_thinking",), **alike),
    )


def run(experiment: Experiment, directory: Path) -> tuple[Report, list[str]]:
    """On one device; the report, and the titles of what was done."""
    titles: list[str] = []
    task = Progress.task

    def noted(self: Progress, name: str, *rest: Any, **fields: Any) -> Any:
        titles.append(name)
        return task(self, name, *rest, **fields)

    with pytest.MonkeyPatch.context() as patched, Progress(Console(file=io.StringIO())) as progress:
        patched.setattr("distill.experiment.make_mesh", lambda shape, _: make_mesh(shape, jax.devices()[:1]))
        patched.setattr(Progress, "task", noted)
        return execute(experiment, directory, progress, StopRequest()), titles


@pytest.fixture(scope="module")
def finished(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, list[str]]:
    directory = tmp_path_factory.mktemp("runs") / "miniature"
    return directory, *run(experiment, directory)


def json_rows(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "report.json").read_text())["rows"]


def test_without_answers_the_report_speaks_of_the_teacher_and_never_of_accuracy(
    finished: tuple[Path, Report, list[str]],
) -> None:
    directory, report, _ = finished
    rows = json_rows(directory)
    assert [row["model"] for row in rows] == ["student_initial", "off_policy", "on_policy", "teacher"]
    common = {"model", "mode", "problems", "samples_per_problem", "graded_problems", "mean_response_tokens", "finished"}
    common |= {"length_histogram"}
    compared = {"forward_kl", "reverse_kl", "reverse_kl_own", "top_1_agreement"}
    for row in rows:
        expected = common | {"perplexity", "compared_tokens"} | (compared if row["model"] != "teacher" else set())
        assert row.keys() - {"pass_at_k"} == expected
        assert not row.get("pass_at_k")
        assert row["graded_problems"] == 0
    assert "student: KL to the teacher" in headline(report)
    shown = io.StringIO()
    Console(file=shown, width=80).print(terminal_table(report))
    assert "perplexity" in shown.getvalue()
    assert "pass@" not in shown.getvalue()
    assert "KL to the teacher in non-thinking mode" in (directory / "report.html").read_text()


def test_without_answers_nothing_is_called_wrong(finished: tuple[Path, Report, list[str]]) -> None:
    directory, *_ = finished
    samples = [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
    assert {sample["stage"] for sample in samples} >= {"on_policy"}
    assert {(sample["correct"], sample["working_correct"], sample["expected"]) for sample in samples} == {
        (None, None, None)
    }
    records = [json.loads(line)["scalars"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert not [name for scalars in records for name in scalars if name.startswith("accuracy")]
    assert any("finished/non_thinking" in scalars for scalars in records)


def test_the_figures_are_of_the_saved_student_on_the_kept_responses(
    experiment: Experiment, finished: tuple[Path, Report, list[str]]
) -> None:
    directory, *_ = finished
    assert experiment.teacher is not None
    teacher = hf.load(experiment.teacher.path, param_dtype=jnp.float32, compute_dtype=jnp.float32)
    blank = experiment.student.build(jax.random.key(0), make_mesh(MeshShape(), jax.devices()[:1]))
    optimizer = experiment.stages["on_policy"].training.optimizer
    like = TrainState.start(blank, optimizer.transformation(1), make_mesh(MeshShape(), jax.devices()[:1]))
    with Checkpointer(directory / "checkpoints" / "on_policy") as checkpoints:
        student = checkpoints.restore(abstract_state(like))[0].model
    kept = rollouts_from_json(json.loads((directory / "evaluations" / "teacher.responses.json").read_text()))
    assert len({one.prompt_id for one in kept}) == len(kept) == experiment.evaluation.problems
    rows = {row["model"]: row for row in json_rows(directory)}
    expected = written_out(student, teacher, kept)
    # float32 logits of other shapes; the divergences are small differences of them.
    assert {name: rows["on_policy"][name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    own = written_out(teacher, teacher, kept)["perplexity"]
    assert rows["teacher"]["perplexity"] == pytest.approx(own, rel=1e-4)


def test_the_teacher_is_evaluated_first_and_once(
    experiment: Experiment, finished: tuple[Path, Report, list[str]], tmp_path: Path
) -> None:
    directory, _, titles = finished
    evaluated = [title for title in titles if title.startswith(("evaluating", "scoring"))]
    assert evaluated[:3] == [
        "evaluating teacher, non-thinking",
        "evaluating student_initial, non-thinking",
        "scoring student_initial, non-thinking",
    ]
    assert sum("teacher" in title for title in evaluated) == 1
    resumed = shutil.copytree(directory, tmp_path / "resumed")
    for name in ("evaluations/on_policy.json", "report.json"):
        (resumed / name).unlink()
    _, titles = run(experiment, resumed)
    assert not [title for title in titles if "teacher" in title]
    assert "scoring on_policy, non-thinking" in titles
    # To the last bit: the same responses of the teacher, the same of the student, the same sums.
    assert json_rows(resumed) == json_rows(directory)
    # What a kill between the responses and the rows of the teacher leaves.
    for name in ("evaluations/teacher.json", "report.json"):
        (resumed / name).unlink()
    _, titles = run(experiment, resumed)
    assert [title for title in titles if title.startswith(("evaluating", "scoring"))] == evaluated[:1]
    assert json_rows(resumed) == json_rows(directory)


def test_only_problems_with_answers_are_graded(experiment: Experiment, tmp_path: Path) -> None:
    (of_prompts,) = experiment.tasks.values()
    mixed = dataclasses.replace(
        experiment,
        tasks={"arithmetic": miniature.task(), "prompts": of_prompts},
        stages={"on_policy": experiment.stages["on_policy"]},
    )
    run(mixed, tmp_path / "miniature")
    rows = json_rows(tmp_path / "miniature")
    assert {row["graded_problems"] for row in rows} == {3}
    assert {row["problems"] for row in rows} == {6}
    assert all(row["pass_at_k"].keys() == {"2"} and 0 <= row["pass_at_1"] <= 1 for row in rows)
    assert all("forward_kl" in row for row in rows if row["model"] != "teacher")
    samples = [json.loads(line) for line in (tmp_path / "miniature/rollouts.jsonl").read_text().splitlines()]
    assert {sample["correct"] is None for sample in samples} == {sample["expected"] is None for sample in samples}
    records = [json.loads(line)["scalars"] for line in (tmp_path / "miniature/metrics.jsonl").read_text().splitlines()]
    assert any(name.startswith("accuracy/") for scalars in records for name in scalars)


def test_evaluation_can_be_turned_off(experiment: Experiment, tmp_path: Path) -> None:
    off = dataclasses.replace(
        experiment,
        stages={"off_policy": experiment.stages["off_policy"]},
        evaluation=dataclasses.replace(experiment.evaluation, problems=0),
    )
    report, titles = run(off, tmp_path / "miniature")
    assert not [title for title in titles if title.startswith(("evaluating", "scoring"))]
    assert not (tmp_path / "miniature" / "evaluations").exists()
    assert json_rows(tmp_path / "miniature") == []
    assert headline(report) == "Nothing was evaluated."
    assert "Nothing was evaluated." in (tmp_path / "miniature" / "report.html").read_text()
    assert (tmp_path / "miniature" / "export" / "model.safetensors").exists()


def test_supervised_fine_tuning_without_answers_is_refused_before_anything_is_spent(
    experiment: Experiment, tmp_path: Path
) -> None:
    supervised = {"sft": Sft(problems=8, form="raw", training=Training(steps=1, rows=4, row_length=128))}
    with pytest.raises(UserError, match=r"of family 'prompts' has no .*; give the data .* column"):
        run(dataclasses.replace(experiment, stages=supervised), tmp_path / "miniature")
    assert not (tmp_path / "miniature").exists()
