"""Plans against sums done by hand, what the CPU's compiler says, and what a user sees."""

import dataclasses
import importlib.util
import json
from collections.abc import Generator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from distill import plan as command
from distill.experiment import Experiment
from distill.plan import stand_ins
from distill.planner.collectives import Traffic
from distill.planner.program import Program
from distill.planner.program_memory import Compiled, compiled, known_memory
from distill.planner.programs import programs
from distill.planner.roofline import Work, decoded_pairs, parameters, roof, work_of
from distill.planner.topology_plan import cut_down, fits, plan_on
from distill.planner.whole_run import Assumptions
from distill.runner.experiment_file import load_experiment
from distill.training.flops import executed_training_flops, forward_flops
from distill.training.losses import Loss
from distill.training.optimizer import Optimizer
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, TrainStep
from kernels_pallas.attention import attended_pairs
from kernels_pallas.chips import CHIPS
from qwen3.decoder.adapter import adapter_parameters
from qwen3.decoder.config import DualChunk, ModelConfig
from qwen3.decoder.kernels import Kernels
from qwen3.decoder.model import Qwen3
from qwen3.generation import engine
from qwen3.generation.cache import layers_of
from qwen3.generation.contiguous_cache import ContiguousCache, KeyValue
from qwen3.sharding import MeshShape, make_mesh, placed_shapes
from student.lora import Lora
from teacher.scoring import top_k_program
from teacher.targets import Hidden, TopK

QUICKSTART = Path(__file__).parents[3] / "experiments" / "quickstart.py"
TOKENS, TEACHER_WIDTH, ENTRIES = 64, 320, 8
# One layer in a real model's proportions: what the analytic count leaves out (norms, softmax) is then below 1 %.
DENSE = ModelConfig(
    model_type="qwen3", vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=1,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
)  # fmt: skip
# One, since the compiler counts a loop over the blocks of several once.
ONE_EXPERT = dataclasses.replace(
    DENSE, model_type="qwen3_moe", num_experts=1, num_experts_per_tok=1, moe_intermediate_size=768
)
CHUNK_TOKENS = 24
CHUNKED = dataclasses.replace(DENSE, dual_chunk=DualChunk(chunk_size=32, local_size=32 - CHUNK_TOKENS))


@pytest.fixture(scope="module")
def quickstart() -> Experiment:
    return load_experiment(QUICKSTART)


def _cpu_mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshShape(data=1), jax.devices()[:1])


def _pairs(config: ModelConfig, tokens: int) -> int:
    chunk_tokens = None if config.dual_chunk is None else CHUNK_TOKENS
    return attended_pairs(tokens, rows=1, heads=config.num_attention_heads, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("rematerialise", "on_policy", "config"), [(False, True, DENSE), (True, False, DENSE), (True, False, CHUNKED)]
)
def test_training_flops_agree_with_the_compiler(
    rematerialise: bool, on_policy: bool, config: ModelConfig, adapted: bool
) -> None:
    mesh = _cpu_mesh()

    def make() -> Qwen3:
        model = Qwen3(config, jax.random.key(0))
        if adapted:
            Lora(rank=16).attach(model, jax.random.key(0))
        return model

    model = placed_shapes(jax.eval_shape(make), mesh)
    transformation = Optimizer().transformation(1)
    head = jax.ShapeDtypeStruct((DENSE.vocab_size, TEACHER_WIDTH), jnp.float32) if on_policy else None

    def rows(dtype: type, *last: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, TOKENS, *last), dtype)

    entries = TopK(ids=rows(jnp.int32, ENTRIES), logprobs=rows(jnp.float32, ENTRIES), log_tail=rows(jnp.float32))
    batch = Batch(
        tokens=rows(jnp.int32), positions=rows(jnp.int32), segment_ids=rows(jnp.int32), loss_mask=rows(jnp.bool_),
        mode=rows(jnp.uint8), targets=Hidden(hidden=rows(jnp.float32, TEACHER_WIDTH)) if on_policy else entries,
    )  # fmt: skip
    step = TrainStep(
        transformation=transformation, loss=Loss(), mesh=mesh, rematerialise=rematerialise, teacher_head=head
    )
    function, arguments = step.programs(TrainState.shapes(model, transformation, mesh), batch).first_gradients
    counted = function.trace(*arguments).lower().compile().cost_analysis()["flops"]
    flops = executed_training_flops(
        config,
        rematerialise=rematerialise,
        teacher_width=TEACHER_WIDTH if on_policy else None,
        adapter_parameters=adapter_parameters(model),
    )
    expected = flops.executed(TOKENS, _pairs(config, TOKENS))
    if adapted:
        # Nothing before the only layer learns: the gradient of what queries, keys and values are made of is not needed.
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        expected -= TOKENS * 2 * config.hidden_size * heads * config.head_dim
    assert counted == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("config", "tokens"), [(DENSE, TOKENS), (DENSE, 120), (CHUNKED, CHUNK_TOKENS), (CHUNKED, 120), (ONE_EXPERT, 8)]
)
def test_scoring_flops_agree_with_the_compiler(config: ModelConfig, tokens: int) -> None:
    mesh = _cpu_mesh()
    model = placed_shapes(jax.eval_shape(lambda: Qwen3(config, jax.random.key(0))), mesh)
    program = top_k_program(model, mesh, rows=1, length=tokens, k=ENTRIES)
    counted = program.function.trace(*program.arguments).lower().compile().cost_analysis()["flops"]
    assert counted == pytest.approx(forward_flops(config).executed(tokens, _pairs(config, tokens)), rel=0.02)


@pytest.mark.parametrize("config", [DENSE, CHUNKED])
def test_decoding_flops_agree_with_the_compiler(config: ModelConfig) -> None:
    rows, slots = 4, 256
    model = jax.eval_shape(lambda: Qwen3(config, jax.random.key(0)))
    heads, size = config.num_key_value_heads, config.head_dim
    kept = [jax.ShapeDtypeStruct((rows, heads, *last), jnp.float32) for last in ((size, slots), (slots, size))]
    cache, now = ContiguousCache(config=config, mesh=None, unroll=True), jax.ShapeDtypeStruct((rows,), jnp.int32)
    step = jax.jit(lambda model, kept, now: cache.step(model, layers_of(model), (KeyValue(*kept),), None, now, now))
    counted = step.lower(model, kept, now).compile().cost_analysis()["flops"]
    flops, head = forward_flops(config), 2 * config.hidden_size * config.vocab_size
    assert counted == pytest.approx(rows * (flops.executed(1, decoded_pairs(config, slots)) - head), rel=0.02)


def test_long_rows_are_attended_to_as_the_implementation_does(quickstart: Experiment) -> None:
    """Kernels skip what is hidden, XLA reads whole quarters of the keys."""
    quarter = 1024

    def flops_and_square(
        name: str, kernels: Kernels, chunk_tokens: int | None = None, platform: str = "cpu"
    ) -> tuple[float, float]:
        """Of the program, and of its forward products of a quarter of the queries and one of the keys."""
        made = programs(quickstart, stand_ins("v5e", (1,)) if platform == "tpu" else jax.devices()[:1])
        program = next(one for one in made if one.name == name)
        for model in program.models:
            model.kernels = kernels
        chunks = None if chunk_tokens is None else DualChunk(chunk_size=chunk_tokens + 512, local_size=512)
        config = dataclasses.replace(program.model, dual_chunk=chunks)
        heads = config.num_attention_heads * config.head_dim
        square = program.rows * config.num_hidden_layers * 4 * heads * quarter**2
        return work_of(dataclasses.replace(program, model=config, length=4 * quarter), quickstart).flops, square

    name, kernel = "off_policy: teacher scores", Kernels(attention="tpu")
    plain, square = flops_and_square(name, Kernels())
    assert flops_and_square(name, Kernels(), 4 * quarter) == (plain, square)
    by_kernel = flops_and_square(name, kernel, platform="tpu")
    assert flops_and_square(name, kernel, quarter, "tpu") == by_kernel
    # The kernel multiplies 16 / 2 squares and half of the diagonal, XLA 1 + 2 + 3 + 4.
    assert plain - by_kernel[0] == pytest.approx((10 - 8) * square, rel=0.002)
    # XLA again, for a quarter's own chunk, for the chunk before, which ends where it begins, and for all older ones.
    chunked, _ = flops_and_square(name, Kernels(), quarter)
    assert chunked - plain == pytest.approx((1 + 1 + 2 + 3 + 1 + 1 + 1 + 2) * square)
    # After two products forward a kernel has seven backward, XLA five.
    name = "off_policy: student trains"
    assert not quickstart.stages["off_policy"].training.rematerialise
    plain, square = flops_and_square(name, Kernels())
    by_kernel = flops_and_square(name, kernel, platform="tpu")
    assert by_kernel[0] - plain == pytest.approx((8 * 9 / 2 - 10 * 7 / 2) * square, rel=0.01)


def test_memory_of_a_program_is_split_by_what_it_is_for(quickstart: Experiment) -> None:
    made = {program.name: program for program in programs(quickstart, jax.devices()[:1])}
    student, teacher = made["on_policy: student trains"].model, made["off_policy: teacher scores"].model
    writes = known_memory(made["off_policy: teacher generates"])
    config = made["off_policy: teacher generates"]
    # float32, and norms, which `parameters` leaves out.
    assert known_memory(made["off_policy: teacher scores"]).weights == pytest.approx(
        4 * (parameters(teacher) + parameters(student)), rel=0.01
    )
    trains = known_memory(made["on_policy: student trains"])
    # Two moments, and the student with which the stage began beside the one that it trains.
    assert trains.optimizer == pytest.approx(8 * parameters(student), rel=0.01)
    assert trains.weights == pytest.approx(4 * (parameters(teacher) + 2 * parameters(student)), rel=0.02)
    assert writes.cache >= 2 * 4 * config.rows * config.length * teacher.num_key_value_heads * teacher.head_dim
    assert writes.temporaries is None
    assert writes.total == writes.weights + writes.optimizer + writes.cache + writes.other


def test_a_compiled_program_says_its_temporaries(quickstart: Experiment) -> None:
    made = {program.name: program for program in programs(quickstart, jax.devices()[:1])}
    found = compiled(made["on_policy: student updates"], CHIPS["v5e"])
    assert found.error is None
    assert found.temporary_bytes > 0
    assert found.sent == Traffic()


def test_the_roof_is_the_slowest_of_three() -> None:
    chip = CHIPS["v5p"]
    work = Work(flops=64 * 459e12, device_bytes=2765e9 / 2, tokens=64)
    assert roof(work, 64, chip, None).seconds == 1
    assert roof(work, 64, chip, None).bound == "compute"
    assert roof(work, 256, chip, None).bound == "memory"
    assert roof(work, 64, chip, Traffic(seconds=3.0)).bound == "network"


def test_a_decoded_token_reads_weights_and_cache(quickstart: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "usable_cores", lambda: 6)
    made = {program.name: program for program in programs(quickstart, jax.devices()[:1])}
    program = made["on_policy: student generates"]
    config, work = program.model, work_of(program, quickstart)
    assert config.tie_word_embeddings
    slots = program.rows * program.length * config.num_hidden_layers
    cache = 2 * config.num_key_value_heads * config.head_dim * slots
    # Logits and scores are written, and read for the largest and for the sum.
    softmax = 3 * (config.num_attention_heads * slots + program.rows * config.vocab_size)
    # Groups are as many as cores, or as fewer make equal parts.
    assert (program.rows, program.groups) == (80, 5)
    assert work.device_bytes == pytest.approx(4 * (program.groups * parameters(config) + cache + softmax))
    assert work.tokens == program.rows
    assert work.flops == program.rows * forward_flops(config).executed(1, program.length)
    (model,) = {id(one): one for one in program.models}.values()
    model.kernels = Kernels(paged_attention="xla")
    in_place = work_of(program, quickstart).device_bytes
    assert work.device_bytes - in_place == pytest.approx(12 * config.num_attention_heads * slots)
    untied = dataclasses.replace(program, model=dataclasses.replace(config, tie_word_embeddings=False))
    # What is only looked up is not read through.
    assert work_of(untied, quickstart).device_bytes == in_place


def test_a_mesh_gathers_weights_once_for_many_written_tokens(quickstart: Experiment) -> None:
    """Each token then reads them as they are multiplied, and no other copy."""
    experiment = dataclasses.replace(quickstart, mesh=MeshShape(data=1, fsdp=4), compute_dtype="bfloat16")
    made = programs(experiment, stand_ins("v5e", (2, 2)))
    program = next(one for one in made if one.name == "on_policy: student generates")
    weights_alone = work_of(dataclasses.replace(program, rows=0), experiment)
    assert weights_alone.device_bytes == 2 * parameters(program.model)


def test_what_compares_makes_logits_of_both_models(quickstart: Experiment) -> None:
    made = {program.name: program for program in programs(quickstart, jax.devices()[:1])}
    scores, teacher = made["evaluation: student scores"], made["evaluation: teacher scores"]
    assert (scores.rows, scores.length) == (teacher.rows, teacher.length)

    def flops_of_logits(program: Program) -> float:
        """What a vocabulary of twice the size adds."""
        wider = dataclasses.replace(program.model, vocab_size=2 * program.model.vocab_size)
        twice = work_of(dataclasses.replace(program, model=wider), quickstart)
        return twice.flops - work_of(program, quickstart).flops

    # The student's logits for both divergences and the cross-entropy, the teacher's for both divergences.
    widths = 3 * scores.model.hidden_size + 2 * teacher.model.hidden_size
    assert flops_of_logits(scores) == pytest.approx(2 * scores.rows * scores.length * scores.model.vocab_size * widths)
    assert flops_of_logits(teacher) == 0, "the teacher hands out hidden states"


def test_what_does_not_fit_is_said_with_a_remedy(quickstart: Experiment) -> None:
    devices, assumed = jax.devices()[:1], Assumptions()

    def measure(made: Sequence[Program]) -> Generator[tuple[int, Compiled]]:
        for number, program in enumerate(made):
            yield number, Compiled(temporary_bytes=2**30 if program.name == "on_policy: student trains" else 0)

    roomy = plan_on(quickstart, devices, CHIPS["v5e"], "v5e:1x1", assumed, measure)
    assert roomy.fits
    small = dataclasses.replace(CHIPS["v5e"], memory_bytes=2**30)
    tight = plan_on(quickstart, devices, small, "v5e:1x1", assumed, measure)
    assert not tight.fits
    (problem,) = tight.problems
    assert problem.startswith("on_policy: student trains: needs 1.")
    assert "which has 1.0; lower training.rows" in problem
    tiny = plan_on(quickstart, devices, dataclasses.replace(small, memory_bytes=2**20), "v5e:1x1", assumed)
    assert any("spread the weights" in problem for problem in tiny.problems)
    assert any("fewer or shorter sequences" in problem for problem in tiny.problems)


def test_a_program_that_does_not_compile_is_named(quickstart: Experiment) -> None:
    def measure(made: Sequence[Program]) -> Generator[tuple[int, Compiled]]:
        for number in reversed(range(len(made))):
            yield number, Compiled(error="Mosaic failed" if number == 0 else None)

    plan = plan_on(quickstart, jax.devices()[:1], CHIPS["v5e"], "v5e:1x1", Assumptions(), measure)
    assert plan.problems == ["off_policy: teacher prefills: does not compile: Mosaic failed"]


def test_the_search_ends_at_the_first_program_that_does_not_fit(quickstart: Experiment) -> None:
    devices, asked = jax.devices()[:1], []

    def measure(made: Sequence[Program]) -> Generator[tuple[int, Compiled]]:
        for number in range(len(made)):
            asked.append(number)
            yield number, Compiled(temporary_bytes=2**40 if number == 1 else 0)

    assert not fits(quickstart, devices, CHIPS["v5e"], measure)
    assert asked == [0, 1]
    # What cannot fit is not compiled at all.
    assert not fits(quickstart, devices, dataclasses.replace(CHIPS["v5e"], memory_bytes=2**20), measure)
    assert asked == [0, 1]
    assert fits(quickstart, devices, CHIPS["v5e"], None)


@pytest.mark.parametrize(
    ("devices", "data", "options"),
    [
        (64, -1, ""),
        (128, -1, ""),
        (64, 2, "--mesh.data -1"),
        (32, -1, "--mesh.context 1"),
        (8, -1, "--mesh.context 1 --mesh.expert 2"),
        (2, 2, "--mesh.data -1 --mesh.context 1 --mesh.expert 1 --mesh.tensor 2"),
    ],
)
def test_a_mesh_is_cut_down_to_fewer_devices(quickstart: Experiment, devices: int, data: int, options: str) -> None:
    mesh = MeshShape(data=data, expert=8, tensor=4, context=2)
    smaller, said = cut_down(dataclasses.replace(quickstart, mesh=mesh), devices)
    assert said == options
    sizes = dataclasses.asdict(smaller.mesh)
    assert devices % (sizes["expert"] * sizes["tensor"] * sizes["context"]) == 0
    assert sizes["data"] == -1


def test_the_command_prints_topologies_side_by_side(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert command.main([str(QUICKSTART), "--topology", "v5e:2x2,h100", "--no-compile"]) == 0
    printed = capsys.readouterr().out
    smallest = "smallest v5e that fits, batches as they are: v5e:1x1"
    for text in ("on_policy: student trains", "bound by", "chip-hours", "Not compiled", smallest):
        assert text in printed


def test_json_holds_what_the_table_shows(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--topology", "v6e:1x1", "--no-compile", "--json", "--no-smallest"]
    options += ["--efficiency", "0.25", "--decoding-efficiency", "0.125"]
    assert command.main([str(QUICKSTART), *options, "--stages.on-policy.training.steps", "7"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["devices"] == plan["chips"] == 1
    assert plan["chip_hours"] == pytest.approx(plan["seconds"] / 3600)
    trains = next(one for one in plan["programs"] if one["name"] == "on_policy: student trains")
    stage = next(one for one in plan["stages"] if one["name"] == "on_policy")
    calls = stage["seconds"]["student_trains"] * 0.25 / trains["roof"]["seconds"]
    assert calls % 7 == pytest.approx(0, abs=1e-6)
    writes = next(one for one in plan["programs"] if one["name"] == "on_policy: student generates")
    calls = stage["seconds"]["student_generates"] * 0.125 / writes["roof"]["seconds"]
    assert calls % 7 == pytest.approx(0, abs=1e-6)
    assert plan["assumed"]["decoding_efficiency"] == 0.125
    assert trains["sent"] is None
    assert trains["memory"]["temporaries"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--topology is missing"),
        (["--topology", "v9:2x2"], "target 'v9:2x2' is unknown"),
        (["--topology", "v5e:1x1", "--teacher.path", "nowhere"], "nowhere/config.json does not exist"),
        (["--topology", "v5e:1x1", "--efficiency", "0"], "--efficiency is 0.0; it must lie in 0..1"),
        (["--topology", "v5e:1x1", "--decoding-efficiency", "2"], "--decoding-efficiency is 2.0; it must lie in 0..1"),
        (["--topology", "v5e:1x1", "--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--topology", "v5e:1x1", "--workers", "9" * 12], "it must be at least 1 and at most 1024, of 3 GB each"),
        (["--topology", "v5e:1x1", "--efficiency", "nan"], "--efficiency is nan; it must lie in 0..1"),
        (["--topology", "v5e:1x1", "--efficiency", "x"], "argument --efficiency: invalid float value: 'x'; see"),
        (["--topology", "v5p:9999x9999x9999"], "has 999700029999 chips; at most 65536 can be planned for"),
        (["--topology", "v5e:1x1", "--stages.nothing", "1"], "--stages.nothing"),
    ],
)
def test_mistakes_are_said_in_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(QUICKSTART), "--no-compile", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_all_topologies_are_known_before_the_first_is_planned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "plan_on", None)
    assert command.main([str(QUICKSTART), "--topology", "v5e:1x1,v9:2x2", "--no-compile"]) == 2
    assert "target 'v9:2x2' is unknown" in capsys.readouterr().err


def test_a_run_that_does_not_fit_ends_with_status_2_and_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    """235B weights on 16 devices of 15.75 GiB."""
    large = str(QUICKSTART.with_name("qwen3_235b_to_8b.py"))
    options = ["--topology", "v5e:4x4", "--no-compile"]
    assert command.main([large, *options, "--no-smallest", "--mesh.expert", "2"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "does not fit off_policy: teacher scores: needs 29." in said
    assert "of each device, which has 15.8; spread the weights over more devices: more mesh.fsdp" in said
    assert command.main([large, *options]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "does not fit mesh data 1 × fsdp 1 × expert 8 × tensor 4 × context 2 = 64 devices, but there are 16" in said
    assert said.endswith("smallest v5e that fits, batches as they are: v5e:8x8")


def test_a_mesh_that_the_devices_do_not_make_up_is_no_crash(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--topology", "v5e:2x2", "--no-compile", "--no-smallest", "--mesh.tensor", "3"]
    assert command.main([str(QUICKSTART), *options]) == 2
    assert "there are 4" in " ".join(capsys.readouterr().out.split())


def test_a_missing_compiler_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name, *rest)
    )
    assert command.main([str(QUICKSTART), "--topology", "v5e:2x2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs the package libtpu" in line
    assert line.endswith("or plan with --no-compile")
