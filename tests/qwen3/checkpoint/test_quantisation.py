"""Weights in eight bits: how they are rounded, where they lie, what they take, and that models compute with them."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3.checkpoint import hf, streaming
from qwen3.checkpoint.quantisation import QuantisedWeight, quantised, saved_bytes
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.generation.engine import Engine, Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import NON_THINKING
from qwen3.sharding import MeshShape, make_mesh, shardings

CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=48,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    mlp_only_layers=(1,),
    initializer_range=0.2,
    attention_bias=True,
    attention_output_bias=True,
)
KERNELS = tuple(f"attention.{name}" for name in "qkvo") + tuple(f"ffn.{name}" for name in ("gate", "up", "down"))
INPUTS = {"attention.o": (1, 2)}
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 6)).astype(np.int32)
ROWS = (TOKENS, np.broadcast_to(np.arange(6, dtype=np.int32), TOKENS.shape), np.ones_like(TOKENS))
KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "model"
    hf.save(path, jax.jit(lambda: Qwen3(CONFIG, jax.random.key(0)))(), dtype="bfloat16")
    return path


@pytest.fixture(scope="module")
def stored(folder):
    return hf.load(folder, param_dtype=jnp.bfloat16)


def widened(model):
    """The same model with whole float32 arrays in the place of quantised weights."""

    def widen(node):
        if not isinstance(node, QuantisedWeight):
            return node
        return nnx.Param(node[...], axes=node.values.get_metadata()["axes"])

    return jax.tree.map(widen, model, is_leaf=lambda node: isinstance(node, QuantisedWeight))


def assert_same_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


read = jax.jit(Qwen3.logits)


@KINDS
def test_projections_and_experts_are_rounded_and_nothing_else_is(folder, stored, kind):
    loaded = hf.load(folder, param_dtype=jnp.bfloat16, quantisation=kind)
    for index, (ours, theirs) in enumerate(zip(loaded.stacks, stored.stacks, strict=True)):
        moe = index != 1
        for name in KERNELS:
            weight, exact = operator.attrgetter(name)(ours), operator.attrgetter(name)(theirs)
            exact = np.asarray(exact[...], np.float32)
            inputs = (2,) if moe and "ffn" in name else INPUTS.get(name, (1,))
            largest = np.abs(exact).max(inputs, keepdims=True)
            assert weight.values[...].dtype == {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[kind]
            assert weight.scale[...].dtype == jnp.float32
            assert weight.scale[...].shape == largest.shape
            if kind == "int8":
                # Half a step of 255, and what float32 adds.
                most = largest / 255 * (1 + 1e-4)
            else:
                # Half of the last of three bits of fraction; near zero half of 2^-9 of the range, which ends at 448.
                most = np.maximum(np.abs(exact) / 16, largest * 2.0**-10 / 448) * (1 + 1e-4)
            error = np.abs(np.asarray(weight[...]) - exact)
            assert np.all(error <= most)
            assert error.max() > 0
            owner, attribute = name.split(".")
            setattr(getattr(ours, owner), attribute, operator.attrgetter(name)(theirs))
    assert_same_bits(loaded, stored)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("fp8", None), ("int8", {"fsdp": 2, "expert": 2, "tensor": 2}), ("fp8", {"data": 2, "expert": 4})],
)
def test_slabs_and_meshes_make_the_same_bits(folder, monkeypatch, kind, shape):
    once = hf.load(folder, quantisation=kind)
    monkeypatch.setattr(streaming, "SLAB_BYTES", 1)
    monkeypatch.setattr(streaming, "PIECE_BYTES", 1000)
    mesh = None if shape is None else make_mesh(MeshShape(**shape))
    placed = hf.load(folder, quantisation=kind, mesh=mesh)
    assert_same_bits(placed, once)
    assert_same_bits(quantised(hf.load(folder), kind), once)
    if mesh is None:
        return
    for leaf, where in zip(jax.tree.leaves(placed), jax.tree.leaves(shardings(placed, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    logits = jax.jit(lambda model: model(*ROWS, mesh=mesh).hidden @ model.head.T)
    # float32 sums in another order.
    np.testing.assert_allclose(logits(placed), read(widened(once), *ROWS), atol=2e-4, rtol=1e-4)


def test_each_device_holds_half_of_what_bfloat16_takes(tmp_path):
    wide = dataclasses.replace(CONFIG, hidden_size=512, intermediate_size=512, moe_intermediate_size=512, vocab_size=8)
    hf.save(tmp_path / "model", jax.jit(lambda: Qwen3(wide, jax.random.key(0)))(), dtype="bfloat16")
    mesh = make_mesh(MeshShape(fsdp=2, expert=2, tensor=2))

    def bytes_of(device, model):
        shards = (shard for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    exact = hf.load(tmp_path / "model", param_dtype=jnp.bfloat16, mesh=mesh)
    loaded = hf.load(tmp_path / "model", param_dtype=jnp.bfloat16, mesh=mesh, quantisation="fp8")
    for device in mesh.devices.flat:
        # Beside half of the kernels there are scales, and norms and routers as they were.
        assert 0.5 < bytes_of(device, loaded) / bytes_of(device, exact) < 0.53
    whole = [sum(leaf.nbytes for leaf in jax.tree.leaves(model)) for model in (exact, loaded)]
    assert saved_bytes(loaded, jnp.bfloat16) == whole[0] - whole[1]
    assert saved_bytes(exact, jnp.bfloat16) == 0


def test_no_more_than_a_layer_is_wide_at_once():
    """Of 16 scanned layers the compiled program never holds two whole."""
    sizes = {"num_hidden_layers": 16, "hidden_size": 256, "moe_intermediate_size": 256, "mlp_only_layers": ()}
    deep = dataclasses.replace(CONFIG, **sizes)

    model = jax.eval_shape(lambda: quantised(Qwen3(deep, jax.random.key(0)), "int8"))
    rows = jax.ShapeDtypeStruct((1, 8), np.int32)
    compiled = jax.jit(Qwen3.hidden).lower(model, rows, rows, rows).compile()
    layer = sum(leaf.size for leaf in jax.tree.leaves(model.stacks)) * 4 // 16
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * layer


def test_a_decoder_writes_with_quantised_weights_what_wide_ones_find_likeliest(folder):
    loaded = hf.load(folder, quantisation="int8")
    engine = Engine(CONFIG, batch_size=1, max_prompt_tokens=3, max_new_tokens=3, stop_ids=(1,), pad_id=0)
    params = SamplingParams(max_new_tokens=3, temperature=0)
    asked = Request(prompt_ids=(9, 36, 7), prompt_id="9", sample_index=0, mode=NON_THINKING, params=params)
    (written,) = engine.generate(loaded, [asked], seed=0, policy_step=0)
    tokens = np.zeros_like(TOKENS)
    tokens[0, : len(written.tokens)] = written.tokens
    logits = read(widened(loaded), tokens, *ROWS[1:])[0]
    np.testing.assert_array_equal(written.response, np.argmax(logits[2 : len(written.tokens) - 1], axis=-1))
    assert len(set(written.response.tolist())) > 1
