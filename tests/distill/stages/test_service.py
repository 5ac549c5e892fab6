"""A teacher behind HTTP teaches what one on the student's devices teaches, also where its server is away meanwhile."""

import contextlib
import copy
import dataclasses
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from distill.experiment import Experiment, Teacher
from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages.stopping import StopRequest
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, StepResult, TrainStep
from qwen3.checkpoint import hf
from qwen3.errors import UserError
from qwen3.sharding import MeshShape
from student.init import FromScratch
from teacher.serve.app import Standing
from teacher.serve.service import Service
from tests.distill.faults import scalars
from tests.distill.miniature import DENSE, make_teacher
from tests.distill.miniature import experiment as miniature
from tests.teacher.serving import LIMITS, load, serving

pytestmark = pytest.mark.usefixtures("charts_are_left_out")

ONE_LAYER = DENSE | {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def colocated(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two steps from a store and two on-policy, on one device; models of a layer."""
    teacher = make_teacher(tmp_path_factory.mktemp("teacher"), ONE_LAYER)
    whole = miniature(teacher)
    off_policy, on_policy = whole.stages["off_policy"], whole.stages["on_policy"]
    training = dataclasses.replace(on_policy.training, steps=2, rows=2, row_length=120)
    return dataclasses.replace(
        whole,
        student=FromScratch(architecture=ONE_LAYER, tokenizer=teacher),
        stages={
            "off_policy": dataclasses.replace(off_policy, prompts=8, training=training),
            "on_policy": dataclasses.replace(on_policy, prompts_per_step=4, training=training),
        },
        export_stage=None,
        evaluation=dataclasses.replace(whole.evaluation, problems=2, modes=("non_thinking",)),
    )


@pytest.fixture(scope="module")
def service(colocated: Experiment) -> Service:
    assert colocated.teacher is not None
    return load(colocated.teacher.path, LIMITS)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    one = jax.devices()[:1]
    meshes = Experiment.meshes
    monkeypatch.setattr(Experiment, "meshes", lambda self, devices=None: meshes(self, devices or one))


def run(experiment: Experiment, directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    with StopRequest().listening() as stop:
        execute(experiment, directory, Progress(Console(file=io.StringIO())), stop)
    return scalars(directory)


def served_by(colocated: Experiment, url: str) -> Experiment:
    assert colocated.teacher is not None
    teacher = dataclasses.replace(colocated.teacher, placement="service", urls=(url,), outage_seconds=60)
    return dataclasses.replace(colocated, teacher=teacher)


class Restarting:
    """A server that is away for a second after the first step, and then comes back where it was."""

    def __init__(self, service: Service):
        self._service = service
        self._server = contextlib.ExitStack()
        self.url = self._server.enter_context(serving(Standing(service)))
        self.restarts = 0

    def restart(self) -> None:
        self._server.close()
        threading.Timer(1.0, self._start).start()
        self.restarts += 1

    def _start(self) -> None:
        port = int(self.url.rpartition(":")[2])
        self._server.enter_context(serving(Standing(self._service), port=port))

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def server(service: Service) -> Iterator[Restarting]:
    server = Restarting(service)
    yield server
    server.close()


def test_metrics_weights_and_store_equal_those_of_a_colocated_teacher(
    colocated: Experiment, service: Service, server: Restarting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(colocated, tmp_path / "colocated")
    train = TrainStep.__call__

    def trained(self: TrainStep, state: TrainState, batches: list[Batch]) -> tuple[TrainState, StepResult]:
        result = train(self, state, batches)
        # Before the second on-policy step asks: the third of four steps has just been taken.
        steps.append(len(steps))
        if len(steps) == 3:
            server.restart()
        return result

    steps: list[int] = []
    monkeypatch.setattr(TrainStep, "__call__", trained)
    served = served_by(colocated, server.url)
    found = run(served, tmp_path / "service")
    assert (server.restarts, len(steps)) == (1, 4)
    assert found.keys() == expected.keys() == {(name, step) for name in colocated.stages for step in (1, 2)}
    for step, values in expected.items():
        # float32 sums in another order.
        assert found[step] == pytest.approx(values, rel=1e-4, abs=1e-6), step
    weights = [hf.load(tmp_path / name / "export") for name in ("colocated", "service")]
    for one, other in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    identities = [
        json.loads((tmp_path / name / "targets/off_policy/index.json").read_text())["identity"]
        for name in ("colocated", "service")
    ]
    assert identities[0] == identities[1]
    rows = [json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("colocated", "service")]
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"forward_kl", "reverse_kl", "perplexity"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)

    # The run goes on elsewhere with the same teacher, and with no other.
    with serving(Standing(service)) as moved:
        assert run(served_by(colocated, moved), tmp_path / "service") == found
    other = copy.copy(service)
    other.identity = dataclasses.replace(service.identity, weights="others")
    with (
        serving(Standing(other)) as another,
        pytest.raises(UserError, match=r"serves another teacher than was expected: it differs in weights"),
    ):
        run(served_by(colocated, another), tmp_path / "service")


def test_what_the_server_does_not_take_is_said_before_anything_is_spent(
    colocated: Experiment, server: Restarting, tmp_path: Path
) -> None:
    served = served_by(colocated, server.url)
    stages = dict(served.stages)
    stages["off_policy"] = dataclasses.replace(stages["off_policy"], top_k=9)
    with pytest.raises(UserError, match=r"stages\.off_policy\.top_k needs 9, .* takes 8; start it with --max-top-k 9"):
        run(dataclasses.replace(served, stages=stages), tmp_path / "run")
    assert not (tmp_path / "run" / "targets").exists()


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match=r"teacher\.urls names 0 servers"):
        Teacher(path="teacher", placement="service")
    with pytest.raises(UserError, match=r"teacher\.placement is colocated, but teacher\.urls names 1 servers"):
        Teacher(path="teacher", urls=("http://127.0.0.1:8470",))
    with pytest.raises(UserError, match=r"teacher\.quantisation is int8, but teacher\.placement is service"):
        Teacher(path="teacher", placement="service", urls=("http://127.0.0.1:8470",), quantisation="int8")
    with pytest.raises(UserError, match=r"teacher\.mesh is set, but teacher\.placement is service"):
        Teacher(path="teacher", placement="service", urls=("http://127.0.0.1:8470",), mesh=MeshShape(expert=2))
