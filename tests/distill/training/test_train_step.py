"""One update is the same however it is cut and spread."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill.training.losses import Loss
from distill.training.optimizer import Optimizer
from distill.training.packing import pack_rollouts, rows_needed
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, TrainStep
from kernels_pallas.attention import xla
from kernels_pallas.topologies import compile_for
from qwen3.decoder.adapter import adapter_parameters, trained_and_frozen
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.decoder.moe import RouterStats, load_balancing_loss
from qwen3.rollout import THINKING, Rollout
from qwen3.sharding import MeshShape, make_mesh, placed_shapes, shardings
from student.lora import Lora
from teacher.targets import Hidden, one_hot, top_k_targets

BATCH, LENGTH = 8, 16
# A step so long that the change of a weight is its gradient, not the rounding of the weight.
DESCENT = optax.sgd(1e4)
made, read = jax.jit(Qwen3, static_argnums=0), jax.jit(Qwen3.hidden)


def config(moe: bool) -> ModelConfig:
    # A balance so heavy that it is seen in every gradient.
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 1.0}
    return ModelConfig(
        model_type="qwen3_moe" if moe else "qwen3",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=not moe,
        **(experts if moe else {}),
    )


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, LENGTH + 1, BATCH)
    index = np.arange(LENGTH)
    real = index < lengths[:, None]
    first = np.minimum(lengths // 2, 5)[:, None]
    segments = np.where(real, np.where(index < first, 1, 2), 0)
    positions = np.where(index < first, index, index - first)
    return {
        "tokens": rng.integers(0, 64, (BATCH, LENGTH)).astype(np.int32),
        "positions": np.where(real, positions, 0).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "loss_mask": real & (rng.random((BATCH, LENGTH)) < 0.6),
        "mode": (rng.random((BATCH, LENGTH)) < 0.5).astype(np.uint8),
    }


def targets(kind: str, model: Qwen3, data: dict[str, np.ndarray]) -> tuple[object, jax.Array | None]:
    if kind == "one_hot":
        return jax.device_get(one_hot(data["tokens"])), None
    hidden = read(model, data["tokens"], data["positions"], data["segment_ids"])
    if kind == "top_k":
        return jax.device_get(top_k_targets(hidden, model.head, 5)), None
    return jax.device_get(Hidden(hidden=hidden)), model.head


def with_adapters(model: Qwen3) -> Qwen3:
    """The model with adapters on all its projections, their B not 0, so that A has a gradient too."""
    Lora(rank=4).attach(model, jax.random.key(2))
    for adapter in (*model.stacks[0].attention.adapters.values(), *model.stacks[0].ffn.adapters.values()):
        adapter.b[...] = 0.02 * jax.random.normal(jax.random.key(3), adapter.b.shape)
    return model


@functools.cache
def step(
    mesh_shape: MeshShape,
    devices: int,
    kind: str,
    moe: bool,
    microbatches: int,
    rematerialise: bool = False,
    lora: bool = False,
):
    """The trained weights' change and the metrics of one step of plain gradient descent, which shows every gradient."""
    mesh = make_mesh(mesh_shape, jax.devices()[:devices])
    data = arrays()
    teacher = made(config(True), jax.random.key(5))
    what, head = targets(kind, teacher, data)
    model = made(config(moe), jax.random.key(1))
    model = with_adapters(model) if lora else model
    before = jax.device_get(model)
    state = TrainState.start(jax.device_put(model, shardings(model, mesh)), DESCENT, mesh)
    train_step = TrainStep(
        transformation=DESCENT,
        loss=Loss(name="reverse_kl" if kind == "hidden" else "forward_kl"),
        mesh=mesh,
        rematerialise=rematerialise,
        teacher_head=head,
    )
    rows = BATCH // microbatches
    batches = [
        Batch.of(
            {name: array[first : first + rows] for name, array in data.items()},
            jax.tree.map(lambda leaf, first=first: leaf[first : first + rows], what),
        )
        for first in range(0, BATCH, rows)
    ]
    state, result = train_step(state, batches)
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, jax.device_get(state.model))
    trained, frozen = trained_and_frozen(change)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    return trained, result


def assert_same(left, right, tolerance: float) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left[0]), jax.tree.leaves(right[0]), strict=True):
        scale = np.abs(b).max()
        assert scale > 0, f"{jax.tree_util.keystr(path)} has no gradient: nothing is compared"
        np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))
    assert left[1].metrics.keys() == right[1].metrics.keys()
    for name, value in right[1].metrics.items():
        assert left[1].metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# float32 sums in another order: a few units in the last place of sums over some hundred terms.
SUM_ORDER = 2e-5


@pytest.mark.parametrize(
    ("kind", "moe", "lora", "by_context"),
    [
        ("top_k", False, False, MeshShape(fsdp=2, tensor=2, context=2)),
        ("hidden", True, False, MeshShape(expert=2, context=4)),
        pytest.param("hidden", False, True, MeshShape(tensor=2, context=4), marks=pytest.mark.long),
    ],
    ids=["top_k-dense", "hidden-moe", "hidden-adapters"],
)
def test_sharded_equals_unsharded_for_loss_and_every_gradient(
    kind: str, moe: bool, lora: bool, by_context: MeshShape
) -> None:
    alone = step(MeshShape(), 1, kind, moe, 1, lora=lora)
    for mesh_shape in (MeshShape(data=2, fsdp=2, tensor=2), by_context):
        spread = step(mesh_shape, 8, kind, moe, 1, lora=lora)
        assert_same(spread, alone, SUM_ORDER)


@pytest.mark.parametrize("kind", ["one_hot", pytest.param("hidden", marks=pytest.mark.long)])
def test_gradient_accumulation_has_one_global_denominator(kind: str) -> None:
    whole = step(MeshShape(), 1, kind, False, 1)
    cut = step(MeshShape(), 1, kind, False, 4)
    assert_same(cut, whole, SUM_ORDER)


@pytest.mark.parametrize(
    ("microbatches", "mesh_shape", "devices"),
    [pytest.param(4, MeshShape(), 1, marks=pytest.mark.long), (2, MeshShape(data=2, expert=2), 4)],
    ids=["4", "2-sharded"],
)
def test_the_load_of_experts_is_balanced_over_the_whole_step(
    microbatches: int, mesh_shape: MeshShape, devices: int
) -> None:
    whole = step(MeshShape(), 1, "one_hot", True, 1)
    cut = step(mesh_shape, devices, "one_hot", True, microbatches)
    assert_same(cut, whole, SUM_ORDER)


def test_the_balance_is_that_of_the_paper() -> None:
    """E · Σ f_i p_i of each layer, by hand, over the tokens of both microbatches."""
    counts, probability = (np.random.default_rng(0).random((2, 3, 4)) for _ in range(2))
    parts = [RouterStats(jnp.asarray(c), jnp.asarray(p)) for c, p in zip(counts, probability, strict=True)]
    whole = jax.tree.map(jnp.add, *parts)
    f, p = (x.sum(0) / x.sum(0).sum(-1, keepdims=True) for x in (counts, probability))
    expected = np.mean(4 * (f * p).sum(-1))
    # float32
    assert sum(load_balancing_loss(part, whole) for part in parts) == pytest.approx(expected, rel=1e-6)


def test_packed_rows_have_the_loss_and_gradients_of_one_document_a_row() -> None:
    random = np.random.default_rng(0)
    lengths = [3, 9, 16, 5, 11, 7, 8, 4]
    documents = [
        Rollout(
            tokens=random.integers(0, 64, length).astype(np.int32),
            prompt_length=1,
            loss_mask=np.arange(length) < length - 1,
            sampler_logprobs=np.zeros(length, np.float32),
            mode=THINKING,
            prompt_id=str(index),
            sample_index=0,
            policy_step=0,
            finished=True,
        )
        for index, length in enumerate(lengths)
    ]
    teacher, mesh = made(config(True), jax.random.key(5)), make_mesh(MeshShape(), jax.devices()[:1])
    train_step = TrainStep(transformation=DESCENT, loss=Loss(name="reverse_kl"), mesh=mesh, teacher_head=teacher.head)
    ended = []
    for rows, one_per_row in ((len(documents), True), (rows_needed(lengths, LENGTH), False)):
        packed = pack_rollouts(documents, rows=rows, length=LENGTH, one_per_row=one_per_row)
        hidden = read(teacher, packed["tokens"], packed["positions"], packed["segment_ids"])
        state = TrainState.start(made(config(False), jax.random.key(1)), DESCENT, mesh)
        before = jax.device_get(state.model)
        state, result = train_step(state, [Batch.of(packed, Hidden(hidden=hidden))])
        ended.append((jax.tree.map(np.subtract, jax.device_get(state.model), before), result))
    (apart, alone), (together, packed_result) = ended
    assert alone.padding_fraction == 1 - sum(lengths) / (len(lengths) * LENGTH)
    assert packed_result.padding_fraction < 0.05
    assert packed_result.trained_positions == alone.trained_positions
    assert_same((together, packed_result), (apart, alone), SUM_ORDER)


def test_rematerialisation_changes_nothing() -> None:
    assert_same(step(MeshShape(), 1, "one_hot", True, 1, True), step(MeshShape(), 1, "one_hot", True, 1), SUM_ORDER)


def test_metrics_are_split_by_mode_and_absent_where_a_mode_is() -> None:
    _, both = step(MeshShape(), 1, "top_k", False, 1)
    assert {"divergence", "divergence/thinking", "divergence/non_thinking", "teacher_tail_mass"} <= both.metrics.keys()
    data = arrays()
    data["mode"] = np.ones_like(data["mode"])
    model, mesh = made(config(False), jax.random.key(1)), make_mesh(MeshShape(), jax.devices()[:1])
    train_step = TrainStep(transformation=optax.sgd(1.0), loss=Loss(), mesh=mesh)
    batch = Batch.of(data, jax.device_get(one_hot(data["tokens"])))
    _, result = train_step(TrainState.start(model, optax.sgd(1.0), mesh), [batch])
    assert "divergence/non_thinking" not in result.metrics
    assert result.metrics["divergence/thinking"] == pytest.approx(result.metrics["divergence"])
    assert result.trained_positions == data["loss_mask"].sum()
    assert result.padding_fraction == pytest.approx(np.mean(data["segment_ids"] == 0))


def test_a_step_that_trains_nothing_is_refused() -> None:
    data = arrays()
    data["loss_mask"][:] = False
    model, mesh = made(config(False), jax.random.key(1)), make_mesh(MeshShape(), jax.devices()[:1])
    train_step = TrainStep(transformation=optax.sgd(1.0), loss=Loss(), mesh=mesh)
    with pytest.raises(ValueError, match="no position of the step is trained"):
        train_step(TrainState.start(model, optax.sgd(1.0), mesh), [Batch.of(data, one_hot(data["tokens"]))])


def test_start_does_not_give_away_the_callers_weights() -> None:
    model, mesh = made(config(False), jax.random.key(1)), make_mesh(MeshShape(), jax.devices()[:1])
    data = arrays()
    train_step = TrainStep(transformation=optax.sgd(1.0), loss=Loss(), mesh=mesh)
    train_step(TrainState.start(model, optax.sgd(1.0), mesh), [Batch.of(data, one_hot(data["tokens"]))])
    assert jnp.isfinite(model.head).all()


def test_frozen_weights_have_no_moments_and_keep_their_buffers() -> None:
    model, mesh = with_adapters(made(config(False), jax.random.key(1))), make_mesh(MeshShape(), jax.devices()[:1])
    adapters = adapter_parameters(model)
    decaying = Optimizer(learning_rate=1e-2, weight_decay=0.1).transformation(10)
    start = TrainState.start(jax.device_put(model, shardings(model, mesh)), decaying, mesh)
    assert sum(leaf.size for leaf in jax.tree.leaves(start.optimizer) if leaf.ndim) == 2 * adapters
    assert sum(leaf.size for leaf in jax.tree.leaves(start.split()[0].model)) == adapters
    embed = start.model.embed.get_value()
    data = arrays()
    train_step = TrainStep(transformation=decaying, loss=Loss(), mesh=mesh)
    after, _ = train_step(start, [Batch.of(data, one_hot(data["tokens"]))])
    assert after.model.embed.get_value() is embed
    for before, now in zip(*(jax.tree.leaves(trained_and_frozen(m)[1]) for m in (model, after.model)), strict=True):
        np.testing.assert_array_equal(now, before)


def test_optimizer_state_is_placed_like_the_weights() -> None:
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    model = made(config(False), jax.random.key(1))
    state = TrainState.start(model, Optimizer().transformation(10), mesh)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (64, 32)]
    assert len(moments) == 2
    assert all(leaf.sharding == state.model.embed.get_value().sharding for leaf in moments)
    assert not state.model.embed.get_value().sharding.is_fully_replicated


@pytest.mark.long
def test_the_context_axis_divides_the_memory_of_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of 4,096 tokens: what a training call takes beside arguments and results, on 1, 2 and 4 devices."""
    # As little beside a model of this size as `_SCORE_BYTES` is beside one that needs several devices.
    monkeypatch.setattr(xla, "_SCORE_BYTES", 2**20)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 2, "head_dim": 32}
    long = dataclasses.replace(config(False), **sizes, num_hidden_layers=4, max_position_embeddings=4096)
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    batch = Batch(
        tokens=tokens,
        positions=tokens,
        segment_ids=tokens,
        loss_mask=jax.ShapeDtypeStruct(tokens.shape, jnp.bool_),
        mode=jax.ShapeDtypeStruct(tokens.shape, jnp.uint8),
        targets=jax.eval_shape(one_hot, tokens),
    )
    taken = {}
    for devices in (1, 2, 4):
        mesh = make_mesh(MeshShape(context=devices), jax.devices()[:devices])
        model = placed_shapes(jax.eval_shape(lambda: Qwen3(long, jax.random.key(0))), mesh)
        step = TrainStep(transformation=DESCENT, loss=Loss(), mesh=mesh, rematerialise=True)
        function, arguments = step.programs(TrainState.shapes(model, DESCENT, mesh), batch).first_gradients
        memory = compile_for(mesh, function, *arguments).memory_analysis()
        assert memory is not None
        taken[devices] = memory.temp_size_in_bytes
    # Keys and values of a layer are there whole.
    assert 4 * taken[4] < 1.1 * taken[1]
    assert 2 * taken[2] < 1.1 * taken[1]
