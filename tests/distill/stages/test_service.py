"""A teacher behind HTTP teaches what one on the student's devices teaches, also where its server is away meanwhile."""

import contextlib
import copy
import dataclasses
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from distill.experiment import Experiment, Teacher
from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages.stopping import StopRequest
from distill.training.losses import Loss
from distill.training.packing import pack_rollouts, rollout_example, scored_example
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, StepResult, TrainStep
from qwen3.chat.chat import ChatTokenizer
from qwen3.checkpoint import hf
from qwen3.errors import UserError
from qwen3.rollout import MODES, Rollout
from qwen3.sharding import MeshShape, make_mesh
from student.init import FromScratch
from teacher.client import TeacherClient
from teacher.scoring import Scorer
from teacher.serve.app import Standing
from teacher.serve.service import Service
from teacher.served import ServedModel, ServedScorer
from teacher.store import TargetStore, TargetStoreWriter
from teacher.targets import TopK
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


@pytest.mark.long
def test_every_placement_says_and_teaches_the_same(colocated: Experiment, service: Service, tmp_path: Path) -> None:
    """Colocated, on devices of its own, behind a server and from a store: the same targets of the same rollouts, and
    after 20 steps the same weights."""
    assert colocated.teacher is not None
    folder = colocated.teacher.path
    here, there = (make_mesh(MeshShape(), jax.devices()[place : place + 1]) for place in (0, 1))
    teacher = hf.load(folder, mesh=here)
    tokenizer, rng = ChatTokenizer.from_folder(folder), np.random.default_rng(0)
    rollouts = []
    for number, (prompt, response) in enumerate(rng.integers(2, 40, (8, 2))):
        length = int(prompt + response)
        mask = (np.arange(length) >= prompt - 1) & (np.arange(length) < length - 1)
        rollouts.append(
            Rollout(
                tokens=rng.integers(0, tokenizer.vocab_size, length).astype(np.int32), prompt_length=int(prompt),
                loss_mask=mask, sampler_logprobs=np.zeros(length, np.float32), mode=MODES[number % 2],
                prompt_id=str(number), sample_index=0, policy_step=0, finished=True,
            )
        )  # fmt: skip
    with serving(Standing(service)) as url, contextlib.closing(TeacherClient([url])) as client:
        scorers = {
            "colocated": Scorer(teacher, here),
            "own_mesh": Scorer(hf.load(folder, mesh=there), there, wanted_on=here),
            "service": ServedScorer(ServedModel(client=client, config=teacher.config), here),
        }
        shape = {"rows": 4, "length": 120, "pad_id": tokenizer.pad_id}
        scored = {name: scorer.score_rollouts(rollouts, k=8, **shape) for name, scorer in scorers.items()}
        packed = pack_rollouts(rollouts, rows=8, length=120, to_example=rollout_example)
        rows, mask = (packed["tokens"], packed["positions"], packed["segment_ids"]), packed["loss_mask"]
        ids = rng.integers(0, tokenizer.vocab_size, (8, 120, 5)).astype(np.int32)
        hidden = {name: scorer.hidden(*rows, mask) for name, scorer in scorers.items()}
        at_ids = {name: scorer.at_ids(*rows, ids, mask, top_k=4) for name, scorer in scorers.items()}
        heads = {name: scorer.head for name, scorer in scorers.items()}
    writer = TargetStoreWriter(tmp_path / "store", {"teacher": "one"})
    writer.write_shard(0, scored["colocated"])
    writer.finish()
    store = TargetStore.open(tmp_path / "store")
    scored["store"] = [store[index] for index in range(len(store))]
    for name, records in scored.items():
        for one, other in zip(records, scored["colocated"], strict=True):
            kept = one.rollout.loss_mask
            np.testing.assert_array_equal(one.ids[kept], other.ids[kept])
            # float32 sums in another order; a store keeps 16 bits, and their sum.
            tolerance = {"rtol": 2**-11, "atol": 2**-11} if name == "store" else {"atol": 2e-5}
            np.testing.assert_allclose(one.logprobs[kept], other.logprobs[kept], **tolerance)
            np.testing.assert_allclose(one.log_tail[kept], other.log_tail[kept], atol=2e-5)
    for name in scorers:
        np.testing.assert_allclose(
            np.asarray(hidden[name].hidden)[mask], np.asarray(hidden["colocated"].hidden)[mask], atol=2e-5
        )
        np.testing.assert_array_equal(np.asarray(at_ids[name].ids)[mask], np.asarray(at_ids["colocated"].ids)[mask])
        np.testing.assert_allclose(
            np.asarray(at_ids[name].logprobs)[mask], np.asarray(at_ids["colocated"].logprobs)[mask], atol=2e-5
        )

    def taught(targets: Any, head: jax.Array | None, loss: str) -> np.ndarray:
        """How far the weights have come, all in one."""
        student = FromScratch(architecture=ONE_LAYER, tokenizer=folder).build(jax.random.key(1), here)
        transformation = optax.adam(1e-3)
        train = TrainStep(transformation=transformation, loss=Loss(name=loss), mesh=here, teacher_head=head)
        state = TrainState.start(student, transformation, here)
        start = [np.array(leaf) for leaf in jax.tree.leaves(state.model)]
        for _ in range(20):
            state, _ = train(state, [Batch.of(packed, targets)])
        end = [np.asarray(leaf) for leaf in jax.tree.leaves(state.model)]
        return np.concatenate([(after - before).ravel() for before, after in zip(start, end, strict=True)])

    weights = {("hidden", name): taught(hidden[name], heads[name], "reverse_kl") for name in scorers}
    weights |= {("ids", name): taught(at_ids[name], None, "reverse_kl") for name in scorers}
    for name, records in scored.items():
        arrays = pack_rollouts(records, rows=8, length=120, to_example=scored_example)
        top = TopK(ids=arrays["target_ids"], logprobs=arrays["target_logprobs"], log_tail=arrays["target_log_tail"])
        weights["top_k", name] = taught(top, None, "forward_kl")
    for (kind, name), way in weights.items():
        expected = weights[kind, "colocated"]
        assert np.linalg.norm(expected) > 0.1
        apart = np.linalg.norm(way - expected) / np.linalg.norm(expected)
        # Adam makes whole steps of rounding where gradients are near nothing; a store's 16 bits are coarser.
        assert apart < (0.05 if name == "store" else 0.005), (kind, name, apart)


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
