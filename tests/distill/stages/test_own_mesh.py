"""A teacher on devices of its own teaches what one on the student's devices teaches: losses and metrics are equal.

So they are where the student's devices share the tokens of its rows.
"""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from distill.experiment import Experiment, Teacher
from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages.stopping import StopRequest
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, StepResult, TrainStep
from qwen3.errors import UserError
from qwen3.generation.engine import Engine
from qwen3.sharding import MeshShape
from student.init import FromScratch
from teacher.scoring import Scorer
from tests.distill.faults import scalars
from tests.distill.miniature import DENSE, MOE, make_teacher
from tests.distill.miniature import experiment as miniature

pytestmark = pytest.mark.usefixtures("charts_are_left_out")


@pytest.fixture(scope="module")
def colocated(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two steps from a store and two on-policy of two microbatches each; models of a layer, rows for eight devices."""
    teacher = make_teacher(tmp_path_factory.mktemp("teacher"), MOE | {"num_hidden_layers": 1})
    whole = miniature(teacher)
    off_policy, on_policy = whole.stages["off_policy"], whole.stages["on_policy"]
    training = dataclasses.replace(on_policy.training, steps=2, rows=8, row_length=120)
    return dataclasses.replace(
        whole,
        student=FromScratch(architecture=DENSE | {"num_hidden_layers": 1}, tokenizer=teacher),
        stages={
            "off_policy": dataclasses.replace(off_policy, prompts=16, training=training),
            "on_policy": dataclasses.replace(on_policy, prompts_per_step=16, training=training),
        },
        export_stage=None,
        evaluation=dataclasses.replace(whole.evaluation, problems=4, modes=("thinking",)),
        mesh=MeshShape(fsdp=2),
    )


def evaluated(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "report.json").read_text())["rows"]


def run(experiment: Experiment, directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Runs it on the eight devices of this process; what it has recorded by stage and step."""
    with StopRequest().listening() as stop:
        execute(experiment, directory, Progress(Console(file=io.StringIO())), stop)
    return scalars(directory)


@pytest.mark.long
def test_losses_and_metrics_equal_those_of_a_colocated_teacher(
    colocated: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert colocated.teacher is not None
    expected = run(colocated, tmp_path / "colocated")
    own = dataclasses.replace(colocated.teacher, placement="own_mesh", mesh=MeshShape(data=1, expert=4))
    trained_on = []

    def noted(self: TrainStep, state: TrainState, batches: list[Batch]) -> tuple[TrainState, StepResult]:
        trained_on.append(batches)
        return train(self, state, batches)

    train = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", noted)
    elsewhere = dataclasses.replace(colocated, teacher=own, mesh=MeshShape(fsdp=2, context=2))
    found = run(elsewhere, tmp_path / "own_mesh")
    assert found.keys() == expected.keys() == {(name, step) for name in colocated.stages for step in (1, 2)}
    for step, values in expected.items():
        # float32 sums of other parts in another order.
        assert found[step] == pytest.approx(values, rel=1e-4, abs=1e-6), step
    for ours, theirs in zip(*map(evaluated, (tmp_path / "own_mesh", tmp_path / "colocated")), strict=True):
        assert ours.keys() == theirs.keys()
        assert ("forward_kl" in ours) == (ours["model"] != "teacher")
        for name in {"forward_kl", "reverse_kl", "perplexity"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    on_policy = trained_on[2:]
    assert [len(batches) for batches in on_policy] == [2, 2]
    student_devices = set(jax.devices()[:4])
    for batches in on_policy:
        for batch in batches:
            assert batch.targets.hidden.sharding.device_set == student_devices


def test_a_student_on_several_devices_trains_on_what_older_weights_wrote(
    colocated: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert colocated.teacher is not None
    own = dataclasses.replace(colocated.teacher, placement="own_mesh", mesh=MeshShape(data=4))
    stage = dataclasses.replace(colocated.stages["on_policy"], max_staleness=1)
    happened: list[str] = []

    def note(owner: type, name: str, what: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: happened.append(what) or original(*args, **kwargs))

    note(Engine, "generate", "write")
    note(Scorer, "hidden", "score")
    note(TrainStep, "__call__", "train")
    nothing = dataclasses.replace(colocated.evaluation, problems=0)
    experiment = dataclasses.replace(colocated, teacher=own, stages={"on_policy": stage}, evaluation=nothing)
    metrics = run(experiment, tmp_path / "ahead")
    # Two microbatches a step. The second step is scored before the first one is trained.
    first = happened.index("score")
    assert happened[first - 1 : first + 7] == ["write", "score", "score", "write", "score", "score", "train", "train"]
    assert [metrics["on_policy", step]["staleness"] for step in (1, 2)] == [0, 1]


def test_what_the_teachers_devices_cannot_share_is_refused_before_anything_is_spent(
    colocated: Experiment, tmp_path: Path
) -> None:
    assert colocated.teacher is not None

    def refused(mesh: MeshShape, message: str) -> None:
        teacher = dataclasses.replace(colocated.teacher, placement="own_mesh", mesh=mesh)
        experiment = dataclasses.replace(colocated, teacher=teacher)
        with pytest.raises(UserError, match=message):
            run(experiment, tmp_path / "run")
        assert not (tmp_path / "run" / "targets").exists()

    refused(MeshShape(data=4, tensor=1, expert=2), r"mesh would get 0, of 8 \+ 0")
    refused(MeshShape(data=2, tensor=2), r"kv_heads has 1 entries, which mesh\.tensor = 2 does not divide")
    refused(MeshShape(data=3, expert=2), r"evaluation\.batch_size is 8, but rows are spread over 6 devices")


def test_a_mesh_for_a_colocated_teacher_is_refused() -> None:
    with pytest.raises(UserError, match=r"teacher\.mesh is set, but teacher\.placement is colocated"):
        Teacher(path="teacher", mesh=MeshShape(expert=2))
