"""Several teachers, each asked about its own problems: one loss, measured by teacher."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages.stopping import StopRequest
from distill.tasks import PromptFile
from distill.tasks.mixture import TaskMixture
from qwen3.chat.chat import ChatTokenizer
from qwen3.checkpoint import hf
from qwen3.errors import UserError
from qwen3.sharding import MeshShape, make_mesh
from student.init import FromScratch
from teacher.scoring import Scorer
from teacher.store import TargetStore
from tests.distill.faults import scalars
from tests.distill.miniature import DENSE, make_teacher, task
from tests.distill.miniature import experiment as miniature

ONE_LAYER = DENSE | {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Teachers of another width than each other, with one tokenizer."""
    folder = tmp_path_factory.mktemp("teachers")
    return make_teacher(folder / "narrow", ONE_LAYER), make_teacher(folder / "wide", ONE_LAYER | {"hidden_size": 48})


@pytest.fixture(scope="module")
def alone(folders: tuple[str, str]) -> Experiment:
    """One teacher of two tasks: two steps from a store and two on-policy, on one device."""
    whole = miniature(folders[0])
    off_policy, on_policy = whole.stages["off_policy"], whole.stages["on_policy"]
    training = dataclasses.replace(on_policy.training, steps=2, rows=2, row_length=120)
    return dataclasses.replace(
        whole,
        student=FromScratch(architecture=ONE_LAYER, tokenizer=folders[0]),
        tasks={"sums": task(), "more": dataclasses.replace(task(), weight=2.0)},
        stages={
            "off_policy": dataclasses.replace(off_policy, prompts=9, training=training),
            "on_policy": dataclasses.replace(on_policy, prompts_per_step=6, training=training),
        },
        export_stage=None,
        evaluation=dataclasses.replace(whole.evaluation, problems=6, modes=("non_thinking",)),
    )


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    one = jax.devices()[:1]
    meshes = Experiment.meshes
    monkeypatch.setattr(Experiment, "meshes", lambda self, devices=None: meshes(self, devices or one))


def with_teachers(experiment: Experiment, **paths: str) -> Experiment:
    assert experiment.teacher is not None
    teachers = {name: dataclasses.replace(experiment.teacher, path=path) for name, path in paths.items()}
    return dataclasses.replace(experiment, teacher=None, teachers=teachers)


def run(experiment: Experiment, directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    with StopRequest().listening() as stop:
        execute(experiment, directory, Progress(Console(file=io.StringIO())), stop)
    return scalars(directory)


def evaluated(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in json.loads((directory / "report.json").read_text())["rows"]}


@pytest.mark.long
def test_equal_ones_teach_what_one_teaches(
    alone: Experiment, folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = hf.load
    monkeypatch.setattr(hf, "load", lambda path, **options: loaded.append(str(path)) or load(path, **options))
    expected = run(alone, tmp_path / "alone")
    same = run(with_teachers(alone, sums=folders[0], more=folders[0]), tmp_path / "same")
    assert loaded.count(folders[0]) == 2, "once a run"
    for step, values in expected.items():
        # Rows hold other documents together, which changes the order of float32 sums.
        for name in ("loss", "divergence", "gradient_norm", "student_entropy", "teacher_entropy"):
            assert same[step][name] == pytest.approx(values[name], rel=1e-4), (step, name)
        assert min(same[step]["divergence/sums"], same[step]["divergence/more"]) <= same[step]["divergence"]
        assert same[step]["divergence"] <= max(same[step]["divergence/sums"], same[step]["divergence/more"])
    one, other = evaluated(tmp_path / "alone"), evaluated(tmp_path / "same")
    for model in ("student_initial", "off_policy", "on_policy"):
        assert other[model]["forward_kl"] == pytest.approx(one[model]["forward_kl"], rel=1e-4)


def test_each_is_asked_about_its_own_problems(alone: Experiment, folders: tuple[str, str], tmp_path: Path) -> None:
    different = run(with_teachers(alone, sums=folders[0], more=folders[1]), tmp_path / "different")
    assert all({"accuracy/sums", "accuracy/more"} <= different["on_policy", step].keys() for step in (1, 2))
    rows = evaluated(tmp_path / "different")
    assert rows["on_policy"]["forward_kl_by_teacher"].keys() == rows["teacher"]["by_teacher"].keys() == {"sums", "more"}
    store = TargetStore.open(tmp_path / "different" / "targets" / "off_policy")
    assert sorted(store.identity["teacher"]) == ["more", "sums"]
    tokenizer, mesh = ChatTokenizer.from_folder(folders[0]), make_mesh(MeshShape(), jax.devices()[:1])
    for name, path in (("sums", folders[0]), ("more", folders[1])):
        records = [store[index] for index in range(len(store)) if store[index].rollout.teacher == name]
        assert len(records) == {"sums": 3, "more": 6}[name]
        rollouts = [record.rollout for record in records]
        scored = Scorer(hf.load(path, mesh=mesh), mesh).score_rollouts(
            rollouts, k=8, rows=4, length=120, pad_id=tokenizer.pad_id
        )
        for ours, theirs in zip(records, scored, strict=True):
            kept = ours.rollout.loss_mask
            np.testing.assert_array_equal(ours.ids[kept], theirs.ids[kept])
            # A store keeps 16 bits.
            np.testing.assert_allclose(ours.logprobs[kept], theirs.logprobs[kept], rtol=2**-11)


def test_rows_name_their_teacher_in_a_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"What is {n} + {n}?", "answer": 2 * n, "whose": whose} for n, whose in enumerate(("a", "b", None))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = PromptFile(path=str(path), held_out_fraction=0, teacher_column="whose")
    problems = TaskMixture({"a": file}, {"a": None, "b": None}).problems("train", 3, seed=0)
    assert sorted((problem.prompt, problem.teacher) for problem in problems) == [
        ("What is 0 + 0?", "a"),
        ("What is 1 + 1?", "b"),
        ("What is 2 + 2?", "a"),
    ]
    with pytest.raises(UserError, match=r"task 'a': its data asks for teacher 'b', which is none of teachers \(a, c\)"):
        TaskMixture({"a": file}, {"a": None, "c": None}).problems("train", 3, seed=0)
    with pytest.raises(UserError, match=r"task 'sums': its name is none of teachers \(a, b\); name a teacher after"):
        TaskMixture({"sums": file}, {"a": None, "b": None}).problems("train", 3, seed=0)
    with pytest.raises(UserError, match=r"asks for teacher '[ab]', but the experiment has one teacher without a name"):
        TaskMixture({"a": file}).problems("train", 3, seed=0)


def test_what_does_not_go_together_is_refused(alone: Experiment, folders: tuple[str, str], tmp_path: Path) -> None:
    several = with_teachers(alone, sums=folders[0], more=folders[1])
    with pytest.raises(UserError, match="teacher and teachers are both given"):
        dataclasses.replace(several, teacher=alone.teacher)
    own = {name: dataclasses.replace(one, placement="own_mesh") for name, one in several.teachers.items()}
    with pytest.raises(UserError, match=r"teachers\.sums\.placement is own_mesh, which one teacher alone can have"):
        dataclasses.replace(several, teachers=own)
    with pytest.raises(UserError, match="teachers has 'thinking'; use letters"):
        with_teachers(alone, thinking=folders[0])
    other = shutil.copytree(folders[1], tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": config["chat_template"] + " "}))
    with pytest.raises(
        UserError, match=r"the chat template of teachers\.more, .*, is another than that of teachers\.sums"
    ):
        run(with_teachers(alone, sums=folders[0], more=str(other)), tmp_path / "run")
