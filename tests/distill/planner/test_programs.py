"""What is planned is what runs: the same functions, with arguments of the same shapes, dtypes and places."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from rich.console import Console

from distill.evaluation import comparison
from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.planner.collectives import collectives
from distill.planner.program import Program, device_bytes
from distill.planner.program_memory import one_token
from distill.planner.programs import architectures, programs
from distill.planner.roofline import work_of
from distill.planner.whole_run import Assumptions, stage_plans
from distill.runner.execute import execute
from distill.stages import Grpo, context
from distill.stages.stopping import StopRequest
from distill.training.policy import PolicyLoss
from distill.training.train_step import TrainStep
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.kernels import Kernels
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.generation import engine as generation
from qwen3.generation.decoding import most_segments
from qwen3.generation.engine import Engine
from qwen3.generation.sampling import SamplingParams
from qwen3.sharding import MeshShape, make_mesh, placed_shapes, shardings
from student.init import FromCheckpoint
from student.lora import Lora
from teacher import scoring
from tests.distill import miniature
from tests.qwen3.generation.test_engine import make_engine


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return miniature.make_teacher(tmp_path_factory.mktemp("teacher"))


def one_device(teacher: str) -> Experiment:
    experiment = miniature.experiment(teacher)
    stages = {name: experiment.stages[name] for name in ("off_policy", "on_policy")}
    return dataclasses.replace(experiment, stages=stages)


def sharded(teacher: str) -> Experiment:
    """On-policy and off-policy training over four devices."""
    return dataclasses.replace(one_device(teacher), mesh=MeshShape(data=1, fsdp=2, context=2))


def described(arguments: Any) -> list[Any]:
    """Of every array its shape and dtype, and on several devices that of a part; anything else as it is."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
            return value
        sharding = getattr(value, "sharding", None)
        spread = sharding is not None and len(sharding.device_set) > 1
        return value.shape, str(value.dtype), sharding.shard_shape(value.shape) if spread else None

    return [leaf(value) for value in jax.tree.leaves(arguments)]


def ones(shapes: Any, mesh: Mesh) -> Any:
    """Stands in for what a program would have computed, where the table of placements puts it."""
    return jax.device_put(jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes), shardings(shapes, mesh))


@pytest.mark.long
def test_a_run_calls_what_was_planned(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are recorded instead of compiled."""
    devices = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda *backend: devices)
    # Engines that earlier tests have made are not recorded, and later ones must not find recorded ones.
    monkeypatch.setattr(context, "_engine", functools.cache(context._engine.__wrapped__))
    experiment = sharded(teacher)
    # Responses that end at once still fill several microbatches.
    on_policy = dataclasses.replace(experiment.stages["on_policy"], prompts_per_step=24)
    sizes = {name: getattr(on_policy, name) for name in ("thinking", "non_thinking", "max_prompt_tokens", "training")}
    rewarded = Grpo(prompts_per_step=12, samples_per_prompt=2, **sizes)
    rewarded = dataclasses.replace(rewarded, training=dataclasses.replace(rewarded.training, steps=2))
    beside = dataclasses.replace(
        rewarded,
        teacher_kl=0.5,
        updates_per_batch=2,
        entropy_floor=1.0,
        policy=PolicyLoss(correction="truncate", reference_kl=0.1),
    )
    stages = {**experiment.stages, "on_policy": on_policy, "rewarded": rewarded, "beside_a_teacher": beside}
    experiment = dataclasses.replace(experiment, stages=stages)
    mesh = experiment.meshes()[0]
    called: list[list[Any]] = []

    def recorded(function: Any, keep: Callable[[Any, Any], Any] = lambda out, arguments: out) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            called.append(described((arguments, options)))
            return keep(ones(function.eval_shape(*arguments, **options), mesh), arguments)

        return call

    for name in ("_hidden", "_top_k", "_following"):
        monkeypatch.setattr(scoring, name, recorded(getattr(scoring, name)))
    monkeypatch.setattr(comparison, "_sums", recorded(comparison._sums))
    make_engine, make_step = Engine.__init__, TrainStep.__init__

    def written(out: Any, arguments: Any) -> Any:
        state = out[0]._replace(active=jnp.zeros_like(out[0].active))
        return state, arguments[2], out[2]

    def engine(self: Any, *arguments: Any, **options: Any) -> None:
        make_engine(self, *arguments, **options)
        self._decode = recorded(self._decode, written)

    def step(self: Any, **options: Any) -> None:
        make_step(self, **options)
        self._accumulate, self._apply = recorded(self._accumulate), recorded(self._apply)

    with monkeypatch.context() as recording:
        prefill = recorded(generation._prefill, lambda out, arguments: arguments[1])
        recording.setattr(generation, "_prefill", prefill)
        recording.setattr(Engine, "__init__", engine)
        recording.setattr(TrainStep, "__init__", step)
        execute(experiment, tmp_path / "run", Progress(Console(quiet=True)), StopRequest())
    ran = list(called)
    planned = programs(experiment, devices)
    for program in planned:
        assert described((program.arguments, program.options)) in ran, program.name
    assert [program.name for program in planned if program.stage == "on_policy"] == [
        "on_policy: student prefills",
        "on_policy: student generates",
        "on_policy: teacher scores",
        "on_policy: student trains",
        "on_policy: student updates",
    ]
    purposes = {name: [p.purpose for p in planned if p.stage == name] for name in ("rewarded", "beside_a_teacher")}
    assert not {"teacher_scores", "student_scores"} & {*purposes["rewarded"]}
    assert {"teacher_scores", "student_scores"} < {*purposes["beside_a_teacher"]}
    for plan in stage_plans(experiment, planned, Assumptions()):
        assert all(count > 0 for count in plan.calls.values())
        assert set(plan.calls) == {program.purpose for program in planned if program.stage == plan.stage}
    # Two passes over a batch: by the weights that generated it, and by those that the stage began with.
    (plan,) = (one for one in stage_plans(experiment, planned, Assumptions()) if one.stage == "beside_a_teacher")
    assert plan.calls["student_scores"] % 2 == 0
    work = {p.purpose: work_of(p, experiment) for p in planned if p.stage == "beside_a_teacher"}
    assert 0 < work["student_scores"].flops < work["student_trains"].flops


def test_what_lies_beside_a_program(teacher: str) -> None:
    weights = {role: sum(x.size for x in jax.tree.leaves(_shapes(teacher, role))) for role in ("student", "teacher")}
    (training,) = (p for p in programs(one_device(teacher), jax.devices()[:1]) if p.name == "on_policy: student trains")
    held = {name: device_bytes(tree) for name, tree in training.beside.items()}
    step_and_counts = held.pop("optimizer") - 2 * 4 * weights["student"]
    assert held == {"teacher": 4 * weights["teacher"], "student at the stage's start": 4 * weights["student"]}
    assert 0 < step_and_counts < 100


def test_teachers_that_read_different_prompts_are_one_model(teacher: str) -> None:
    alone = one_device(teacher)
    assert alone.teacher is not None
    several = {
        name: dataclasses.replace(alone.teacher, prompt=prompt)
        for name, prompt in (("plain", None), ("hinted", "{prompt} {answer}"))
    }

    experiment = dataclasses.replace(alone, teacher=None, teachers=several)
    (training,) = (p for p in programs(experiment, jax.devices()[:1]) if p.name == "on_policy: student trains")
    assert "teacher" in training.beside
    assert "other teachers" not in training.beside


def test_adapters_are_trained_alone(teacher: str) -> None:
    def planned(lora: Lora | None) -> tuple[Experiment, dict[str, Program]]:
        student = FromCheckpoint(path=teacher, lora=lora)
        experiment = dataclasses.replace(one_device(teacher), student=student)
        return experiment, {p.name: p for p in programs(experiment, jax.devices()[:1])}

    experiment, adapted = planned(Lora(rank=2, targets=("q_proj",)))
    trained, frozen = adapted["off_policy: student trains"].arguments[:2]
    assert 0 < device_bytes(trained) < device_bytes(frozen) / 10
    adapters = sum(leaf.size for leaf in jax.tree.leaves(trained))
    whole = planned(None)[1]
    for name, share in {"student trains": 0.8, "student updates": 0.1}.items():
        less, all_of_it = (work_of(made[f"off_policy: {name}"], experiment) for made in (adapted, whole))
        assert 0 < less.flops < share * all_of_it.flops
        assert 0 < less.device_bytes < all_of_it.device_bytes
    assert {program.adapter_parameters for program in adapted.values()} == {0, adapters}


def test_weights_are_gathered_before_the_loop_that_writes_tokens(teacher: str) -> None:
    (writes,) = (p for p in programs(sharded(teacher), jax.devices()[:4]) if p.name == "on_policy: student generates")
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(writes.arguments[1]))
    gathered = [one for one in collectives(writes.compile().as_text()) if one.kind == "all-gather"]
    # Nearly all of them: norms are on every device anyway, and XLA moves a few in other ways.
    assert sum(one.whole_bytes for one in gathered if not one.open_loops) > 0.75 * whole
    assert 0 < max(one.whole_bytes for one in gathered if one.open_loops) < 0.05 * whole


def test_what_a_token_sends_is_counted_once() -> None:
    """Four loops that follow each other, or one, of 250 tokens: what is counted is one token."""
    engine, mesh = make_engine(max_new_tokens=250), make_mesh(MeshShape(data=1, tensor=2, fsdp=2), jax.devices()[:4])
    sent = []
    for kernels in (Kernels(), Kernels(paged_attention="xla")):
        model = jax.eval_shape(lambda: Qwen3(engine.config, jax.random.key(0)))
        model.kernels = kernels
        programs = engine.programs(placed_shapes(model, mesh), [SamplingParams(max_new_tokens=250)])
        text = programs.decode.lower(*programs.decode_arguments, **programs.decode_options).compile().as_text()
        token = one_token(collectives(text), most_segments(kernels))
        sent.append(sum(one.whole_bytes * times for one, times in token))
    # Less in place: XLA gathers the new keys and values of all rows before it writes them side by side.
    assert sent[0] / 2 < sent[1] <= sent[0]


def test_a_plan_goes_by_the_checkpoint_and_before_that_by_what_is_declared(teacher: str, tmp_path: Path) -> None:
    experiment = one_device(teacher)

    def taught(path: str, planned_as: str | None) -> Experiment:
        assert experiment.teacher is not None
        changed = dataclasses.replace(experiment.teacher, path=path, planned_as=planned_as)
        return dataclasses.replace(experiment, teacher=changed)

    absent = str(tmp_path / "absent")
    assert architectures(taught(absent, teacher))["teacher"] == (ModelConfig.from_folder(teacher), teacher)
    assert architectures(taught(teacher, absent))["teacher"][1] == teacher
    with pytest.raises(UserError, match=r"absent.config\.json does not exist"):
        architectures(taught(absent, None))


def test_rows_that_devices_cannot_share_are_refused(teacher: str) -> None:
    with pytest.raises(UserError, match=r"stages\.off_policy\.training\.rows is 4, but rows are spread over 8 devices"):
        programs(dataclasses.replace(sharded(teacher), mesh=MeshShape()), jax.devices())


def _shapes(teacher: str, role: str) -> Qwen3:
    config = architectures(one_device(teacher))[role][0]
    return jax.eval_shape(lambda: Qwen3(config, jax.random.key(0)))
