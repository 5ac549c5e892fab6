"""A teacher behind HTTP teaches what one on the student's devices teaches, also where its server is away meanwhile."""

import contextlib
import copy
import dataclasses
import io
import json
import threading
import time
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
from distill.stages.student_top_k import StudentTopK
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
from teacher.dialects import Program
from teacher.scoring import Scorer
from teacher.serve.app import Standing, make_app
from teacher.serve.service import Service
from teacher.served import ServedModel, ServedScorer
from teacher.store import TargetStore, TargetStoreWriter
from teacher.targets import TopK
from tests.distill.faults import scalars
from tests.distill.miniature import DENSE, make_teacher
from tests.distill.miniature import experiment as miniature
from tests.teacher.dressed import as_vllm
from tests.teacher.serving import LIMITS, ServerProcess, load, serving, serving_app

pytestmark = pytest.mark.usefixtures("charts_are_left_out")

OUTAGE_SECONDS = 60.0
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
    # Where it stands for another program's, a prompt goes on with what has been generated.
    return load(colocated.teacher.path, dataclasses.replace(LIMITS, max_prompt_tokens=120))


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    one = jax.devices()[:1]
    meshes = Experiment.meshes
    monkeypatch.setattr(Experiment, "meshes", lambda self, devices=None: meshes(self, devices or one))


def run(
    experiment: Experiment, directory: Path, said: io.StringIO | None = None
) -> dict[tuple[str, int], dict[str, float]]:
    with StopRequest().listening() as stop:
        execute(experiment, directory, Progress(Console(file=said or io.StringIO(), width=200)), stop)
    return scalars(directory)


def served_by(colocated: Experiment, url: str, *, server: Program = "teacher.serve") -> Experiment:
    assert colocated.teacher is not None
    place: dict[str, Any] = {"placement": "service", "server": server, "urls": (url,), "outage_seconds": 60}
    return dataclasses.replace(colocated, teacher=dataclasses.replace(colocated.teacher, **place))


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


@pytest.fixture(scope="module")
def for_vllm(colocated: Experiment) -> Experiment:
    """Off-policy by the teacher's likeliest tokens, on-policy at the student's. What such servers sample, seeds of
    their own decide: the teacher takes the likeliest."""
    off_policy, on_policy = colocated.stages["off_policy"], colocated.stages["on_policy"]
    greedy = {mode: dataclasses.replace(getattr(off_policy, mode), temperature=0) for mode in MODES}
    return dataclasses.replace(
        colocated,
        stages={
            "off_policy": dataclasses.replace(off_policy, top_k=6, **greedy),
            "on_policy": dataclasses.replace(on_policy, targets=StudentTopK(k=4)),
        },
        evaluation=dataclasses.replace(colocated.evaluation, problems=0),
    )


def test_a_teacher_behind_vllms_endpoint_teaches(
    colocated: Experiment, for_vllm: Experiment, service: Service, tmp_path: Path
) -> None:
    assert colocated.teacher is not None
    with serving_app(as_vllm(make_app(Standing(service)), service)) as url:
        there = served_by(for_vllm, url, server="vllm")
        found = run(there, tmp_path)
    assert found.keys() == {(name, step) for name in for_vllm.stages for step in (1, 2)}
    store = TargetStore.open(tmp_path / "targets/off_policy")
    assert store.identity["teacher"] == "Teacher (org/Teacher) of vllm 0.33.0"
    records = [store[index] for index in range(len(store))]
    rollouts = [record.rollout for record in records]
    assert {rollout.mode for rollout in rollouts} == set(MODES)
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    scorer = Scorer(hf.load(colocated.teacher.path, mesh=mesh), mesh)
    for one, other in zip(records, scorer.score_rollouts(rollouts, k=6, rows=2, length=120, pad_id=0), strict=True):
        kept = one.rollout.loss_mask
        np.testing.assert_array_equal(one.ids[kept], other.ids[kept])
        # The 16 bits of a store.
        np.testing.assert_allclose(one.logprobs[kept], other.logprobs[kept], rtol=2**-11, atol=2**-11)
        np.testing.assert_allclose(one.log_tail[kept], other.log_tail[kept], atol=2e-5)
    known = json.loads((tmp_path / "teacher.json").read_text())
    assert [known[name] for name in ("server", "version", "root")] == ["vllm", "0.33.0", "org/Teacher"]
    # The run goes on with no other teacher.
    with (
        serving_app(as_vllm(make_app(Standing(service)), service, name="Other")) as another,
        pytest.raises(UserError, match=r"serves another teacher than was expected: it differs in model, root"),
    ):
        run(served_by(there, another, server="vllm"), tmp_path)


@pytest.mark.long
def test_it_teaches_what_a_colocated_teacher_teaches(
    colocated: Experiment, for_vllm: Experiment, service: Service, tmp_path: Path
) -> None:
    expected = run(for_vllm, tmp_path / "colocated")
    with serving_app(as_vllm(make_app(Standing(service)), service)) as url:
        there = served_by(dataclasses.replace(for_vllm, evaluation=colocated.evaluation), url, server="vllm")
        said = io.StringIO()
        found = run(there, tmp_path / "vllm", said)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        # float32 sums in another order, and tails of what they leave.
        assert found[step] == pytest.approx(values, rel=1e-4, abs=1e-5), step
    assert "does not compare them with the teacher: vllm gives no hidden states" in said.getvalue()
    rows = json.loads((tmp_path / "vllm" / "report.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"student_initial", *for_vllm.stages, "teacher"}
    assert not any("forward_kl" in row for row in rows)


@pytest.mark.long
def test_a_minute_without_a_teacher_changes_no_bit_of_what_is_learned(
    colocated: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's process is killed in the middle of training, and another one comes a minute later."""
    assert colocated.teacher is not None
    server = ServerProcess(colocated.teacher.path, tmp_path / "log")
    # What fits one request is scored in one batch, whose sums have one order.
    stages = dict(colocated.stages)
    stages["off_policy"] = dataclasses.replace(stages["off_policy"], prompts=4)
    evaluation = dataclasses.replace(colocated.evaluation, problems=0)
    served = served_by(dataclasses.replace(colocated, stages=stages, evaluation=evaluation), server.url)
    assert served.teacher is not None
    served = dataclasses.replace(served, teacher=dataclasses.replace(served.teacher, outage_seconds=600))
    with contextlib.ExitStack() as opened:
        server.start()
        opened.callback(lambda: server.kill())
        server.wait()
        expected = run(served, tmp_path / "without")
        train, ended = TrainStep.__call__, list[float]()

        def trained(self: TrainStep, state: TrainState, batches: list[Batch]) -> tuple[TrainState, StepResult]:
            result = train(self, state, batches)
            ended.append(time.monotonic())
            if len(ended) == 3:
                server.kill()
                threading.Timer(OUTAGE_SECONDS, server.start).start()
            return result

        monkeypatch.setattr(TrainStep, "__call__", trained)
        assert run(served, tmp_path / "with") == expected
    assert len(expected) == len(ended) == 4
    assert ended[3] - ended[2] > OUTAGE_SECONDS
    weights = [hf.load(tmp_path / name / "export") for name in ("without", "with")]
    for one, other in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_array_equal(one, other)


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
    with pytest.raises(
        UserError, match=r"teacher\.server is vllm, but teacher\.placement is colocated; leave it, or set"
    ):
        Teacher(path="teacher", server="vllm")
    with pytest.raises(UserError, match=r"teacher\.server is 'tgi'"):
        Teacher(path="teacher", placement="service", server="tgi", urls=("http://127.0.0.1:8470",))  # type: ignore[arg-type]


def test_what_a_server_cannot_give_is_said_of_all_stages_at_once(colocated: Experiment) -> None:
    stages = dict(colocated.stages)
    stages["sampled"] = dataclasses.replace(stages["off_policy"], sampled_tokens=4)
    stages["at_ids"] = dataclasses.replace(stages["on_policy"], targets=StudentTopK(k=4))
    whole = dataclasses.replace(colocated, stages=stages)
    url = "http://127.0.0.1:1"
    hidden = (
        "stages.on_policy.targets is None: hidden states, which teacher.server {} does not give; set it to "
        "StudentTopK()"
    )
    asks = (
        "stages.{} asks about other tokens at every position, of which teacher.server sglang says nothing; take vllm "
        "with targets=StudentTopK(), or python -m teacher.serve"
    )
    sampled = (
        "stages.sampled.sampled_tokens is 4, but teacher.server {} samples no targets; leave it, which keeps top_k"
    )
    for server, complaints in {
        "vllm": [hidden.format("vllm"), sampled.format("vllm")],
        "sglang": [asks.format("on_policy"), sampled.format("sglang"), asks.format("at_ids")],
    }.items():
        with pytest.raises(UserError) as raised:
            served_by(whole, url, server=server)  # type: ignore[arg-type]
        assert str(raised.value).split("; and ") == complaints
    assert served_by(whole, url).compares
    del stages["sampled"], stages["on_policy"]
    vllm = served_by(dataclasses.replace(colocated, stages=stages), url, server="vllm")
    assert (vllm.evaluates_teacher, vllm.compares) == (True, False)
