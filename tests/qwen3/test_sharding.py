"""Placement on eight devices changes neither the loss nor any gradient, and impossible placements are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from qwen3.decoder.config import DualChunk, ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.decoder.moe import load_balancing_loss
from qwen3.errors import UserError
from qwen3.sharding import (
    MeshShape,
    batch_sharding,
    check_batch,
    check_rows,
    make_mesh,
    partition_spec,
    shardings,
    to_pieces,
)

DENSE = ModelConfig(
    model_type="qwen3",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    initializer_range=0.3,
)
MOE = dataclasses.replace(
    DENSE,
    model_type="qwen3_moe",
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    attention_bias=True,
    attention_output_bias=True,
    tie_word_embeddings=True,
)
CHUNKS = dataclasses.replace(DENSE, dual_chunk=DualChunk(chunk_size=3, local_size=1))
ROWS, LENGTH = 8, 12


def make_model(config):
    shapes = jax.eval_shape(lambda: Qwen3(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


def make_batch():
    """Packed rows: documents of different lengths, and padding that differs by row."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, DENSE.vocab_size, (ROWS, LENGTH))
    segments = np.where(np.arange(LENGTH) < 5, 1, 2) * (np.arange(LENGTH) < 7 + np.arange(ROWS)[:, None] % 5)
    positions = np.where(np.arange(LENGTH) < 5, np.arange(LENGTH), np.arange(LENGTH) - 5)
    return {"tokens": tokens, "segments": segments, "positions": np.broadcast_to(positions, tokens.shape)}


@functools.partial(jax.jit, static_argnames="mesh")
def loss_and_gradients(model, batch, mesh=None):
    """Mean cross-entropy of the next token, one denominator for all rows, plus the load-balancing loss."""

    def loss(model):
        output = model(
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            rematerialise=not model.config.num_experts,
            mesh=mesh,
        )
        logprobs = jax.nn.log_softmax(output.hidden @ model.head.T)[:, :-1]
        following = batch["tokens"][:, 1:, None]
        mask = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] != 0)
        total = -jnp.sum(jnp.take_along_axis(logprobs, following, axis=2)[..., 0] * mask) / jnp.sum(mask)
        return total if output.router is None else total + load_balancing_loss(output.router, output.router)

    return jax.value_and_grad(loss)(model)


@functools.cache
def unsharded(config):
    model = make_model(config)
    return model, loss_and_gradients(model, make_batch())


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (DENSE, {"data": 2, "fsdp": 2, "tensor": 2}),
        (MOE, {"data": 2, "fsdp": 2, "tensor": 2}),
        (MOE, {"fsdp": 2, "expert": 2, "tensor": 2}),
        (DENSE, {"fsdp": 2, "context": 2, "tensor": 2}),
        pytest.param(MOE, {"expert": 2, "context": 4}, marks=pytest.mark.long),
        pytest.param(DENSE, {"fsdp": 2, "expert": 4}, marks=pytest.mark.long),
        pytest.param(DENSE, {"fsdp": 8}, marks=pytest.mark.long),
        pytest.param(MOE, {"expert": 8}, marks=pytest.mark.long),
        (CHUNKS, {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param(CHUNKS, {"fsdp": 2, "context": 2, "tensor": 2}, marks=pytest.mark.long),
    ],
    ids=[
        "dense",
        "moe",
        "moe_by_expert",
        "dense_by_context",
        "moe_by_context",
        "dense_by_expert",
        "dense_by_one_axis",
        "moe_by_one_axis",
        "chunks",
        "chunks_by_context",
    ],
)
def test_loss_and_every_gradient_equal_unsharded(config, shape):
    model, (expected_loss, expected) = unsharded(config)
    mesh = make_mesh(MeshShape(**shape))
    placed = jax.device_put(model, shardings(model, mesh))
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    loss, gradients = loss_and_gradients(placed, batch, mesh)
    # float32 sums in another order.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, theirs), mine in zip(paths, jax.tree.leaves(gradients), strict=True):
        name = jax.tree_util.keystr(path)
        assert np.any(theirs), name
        # float32 sums in another order.
        np.testing.assert_allclose(mine, theirs, atol=2e-5, rtol=1e-4, err_msg=name)


def test_every_parameter_and_what_mirrors_it_is_placed():
    mesh = make_mesh(MeshShape(fsdp=2, expert=2, tensor=2))
    shapes = jax.eval_shape(lambda: Qwen3(MOE, jax.random.key(0)))
    placed = shardings({"model": shapes, "moments": jax.tree.map(lambda leaf: leaf, shapes), "step": 3}, mesh)
    specs = [leaf.spec for leaf in jax.tree.leaves(placed["model"])]
    assert specs == [leaf.spec for leaf in jax.tree.leaves(placed["moments"])]
    assert placed["step"].spec == PartitionSpec()
    assert placed["model"].embed.get_value().spec == PartitionSpec("tensor", ("fsdp", "expert"))
    moe = placed["model"].stacks[0].ffn
    assert moe.gate.get_value().spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert moe.down.get_value().spec == PartitionSpec(None, "expert", "tensor", "fsdp")
    split = [spec for spec, leaf in zip(specs, jax.tree.leaves(shapes), strict=True) if any(spec) and leaf.size > 64]
    large = [leaf for leaf in jax.tree.leaves(shapes) if leaf.size > 64]
    assert len(split) == len(large)


def test_axes_of_size_one_are_left_out():
    mesh = make_mesh(MeshShape(tensor=8))
    assert partition_spec(("embed", "mlp"), (3, 16), mesh) == PartitionSpec(None, "tensor")


def test_collisions_and_sizes_that_do_not_divide_are_refused_with_the_numbers():
    mesh = make_mesh(MeshShape(fsdp=2, tensor=4))
    with pytest.raises(UserError, match="put two dimensions of one weight on mesh axis 'tensor'"):
        partition_spec(("vocab", "mlp"), (8, 8), mesh)
    with pytest.raises(UserError, match=r"kv_heads has 2 entries, which mesh\.tensor = 4 does not divide"):
        shardings(jax.eval_shape(lambda: Qwen3(DENSE, jax.random.key(0))), mesh)
    with pytest.raises(UserError, match=r"experts has 6 entries, which mesh\.expert = 4"):
        partition_spec(("experts",), (6,), make_mesh(MeshShape(expert=4)))
    with pytest.raises(UserError, match=r"embed has 12 entries, which mesh\.fsdp × mesh\.context = 8 does not divide"):
        partition_spec(("embed",), (12,), make_mesh(MeshShape(fsdp=4, context=2)))


def test_mesh_sizes():
    assert dict(make_mesh(MeshShape(tensor=2)).shape) == {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2, "context": 1}
    assert make_mesh(MeshShape(data=1), jax.devices()[:1]).size == 1
    with pytest.raises(
        UserError, match=r"data 1 × fsdp 3 × expert 1 × tensor 1 × context 1 = 3 devices, but there are 8"
    ):
        make_mesh(MeshShape(data=1, fsdp=3))
    with pytest.raises(UserError, match="fsdp 3"):
        make_mesh(MeshShape(fsdp=3))
    with pytest.raises(UserError, match="tensor 16"):
        make_mesh(MeshShape(tensor=16))
    with pytest.raises(UserError, match=r"mesh\.fsdp is 0; it must be at least 1$"):
        MeshShape(fsdp=0)
    with pytest.raises(UserError, match=r"mesh\.data is -2; it must be at least 1 or -1"):
        MeshShape(data=-2)


def test_batches_that_the_devices_cannot_share_are_refused_with_the_numbers():
    mesh = make_mesh(MeshShape(data=2, context=4))
    check_batch("training", 6, 128, mesh)
    with pytest.raises(
        UserError, match=r"training\.rows is 5, but rows are spread over 2 devices; use a multiple of 2"
    ):
        check_batch("training", 5, 128, mesh)
    with pytest.raises(
        UserError, match=r"training\.row_length is 126, but each row's tokens are spread over 4 devices"
    ):
        check_batch("training", 6, 126, mesh)
    with pytest.raises(UserError, match="batch_size is 6, but rows are spread over 8 devices"):
        check_rows("batch_size", 6, mesh)
    with pytest.raises(ValueError, match=r"an array is \(2, 6\); the mesh splits its rows in 2, each in 4"):
        to_pieces(jnp.zeros((2, 6)), mesh)


def test_parameters_keep_their_axes_through_optimiser_like_maps():
    model = make_model(DENSE)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
    assert isinstance(doubled.embed, nnx.Param)
    assert doubled.embed.get_metadata()["axes"] == ("vocab", "embed")
