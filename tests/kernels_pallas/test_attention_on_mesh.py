"""Rows that devices share: in zig-zag order they have equal work, and nothing changes but that."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas import platforms
from kernels_pallas.attention import DualChunkQueries, attention, attention_of, attention_on_mesh, gpu, tpu
from kernels_pallas.attention.visible import Visible
from kernels_pallas.attention.zigzag import from_zigzag, in_row_order, to_zigzag, zigzag_index
from tests.kernels_pallas.interpreters import interpret
from tests.kernels_pallas.test_attention_kernels import make_inputs, make_segments


def mesh_of(devices, heads=1):
    grid = np.asarray(jax.devices()[: devices * heads]).reshape(1, devices, heads)
    return Mesh(grid, ("data", "context", "tensor"))


@pytest.mark.parametrize(("devices", "tokens"), [(1, 4), (2, 1), (3, 5), (8, 4)])
def test_zigzag_order_and_the_way_back(devices, tokens):
    row = jnp.arange(devices * tokens)
    along = functools.partial(
        jax.shard_map,
        mesh=mesh_of(devices),
        in_specs=PartitionSpec(None, "context"),
        out_specs=PartitionSpec(None, "context"),
    )
    pieces = along(lambda x: to_zigzag(x, "context"))(row[None])
    expected = [zigzag_index(tokens, i, devices) for i in range(devices)]
    np.testing.assert_array_equal(pieces[0], jnp.concatenate(expected))
    np.testing.assert_array_equal(in_row_order(pieces, devices)[0], row)
    np.testing.assert_array_equal(along(lambda x: from_zigzag(x, "context"))(pieces)[0], row)
    for i, piece in enumerate(expected):
        assert np.all(np.diff(piece) > 0)
        # Each is of half-pieces i and 2c - 1 - i, which meet in the last device; of odd pieces either may be longer.
        assert abs(np.sum(piece) - (len(row) - 1) * tokens / 2) <= len(row) * (tokens % 2), i


def rows_on_mesh(operation, mesh, *arrays):
    """Run it on rows that become pieces as a model makes them."""
    whole, piece = PartitionSpec("data", "context"), PartitionSpec(("data", "context"))
    moved = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    def to(tree):
        return jax.tree.map(lambda x: to_zigzag(x, "context"), tree)

    pieces = moved(to, in_specs=whole, out_specs=piece)(arrays)
    return moved(lambda x: from_zigzag(x, "context"), in_specs=piece, out_specs=whole)(operation(*pieces))


@contextlib.contextmanager
def tpu_kernels_as_xla():
    """The TPU kernels as plain XLA, which knows no races: `interpret` has effects, which `jax.checkpoint` refuses."""
    call = functools.partial(tpu.pl.pallas_call, interpret=True)
    with mock.patch.object(tpu.pl, "pallas_call", call), mock.patch.object(platforms, "platform", return_value="tpu"):
        yield


CASES = [
    # implementation, devices, length, head devices, chunked
    ("xla", 2, 70, 2, False),
    ("xla", 4, 260, 1, True),
    pytest.param("tpu", 2, 512, 2, False, marks=pytest.mark.long),
    ("tpu", 4, 516, 1, False),
    pytest.param("tpu", 2, 330, 1, True, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("implementation", "devices", "length", "head_devices", "chunked"), CASES)
def test_value_and_every_gradient_equal_unsharded(implementation, devices, length, head_devices, chunked, monkeypatch):
    monkeypatch.setattr(tpu, "_BLOCK", 128)
    q, k, v, cotangent = make_inputs(length, 4, 2, 64, jnp.float32, batch=1)
    segments = jnp.sort(make_segments(length, batch=1), axis=1) if chunked else make_segments(length, batch=1)
    if chunked:
        starts = jax.lax.cummax(jnp.where(jnp.diff(segments, prepend=-1) != 0, jnp.arange(length), 0), axis=1)
        within = (jnp.arange(length) - starts) % 15
        q = DualChunkQueries(same=q, previous=q[:, ::-1], older=2 * q, within=within, chunk_tokens=15)
    mesh = mesh_of(devices, head_devices)

    def on_mesh(q, k, v):
        operation = functools.partial(
            attention_on_mesh,
            mesh=mesh,
            row_axes=("data", "context"),
            head_axis="tensor",
            context_axis="context",
            implementation=implementation,
        )
        return rows_on_mesh(operation, mesh, q, k, v, segments)

    def unsharded(q, k, v):
        return attention_of(q)(q, k, v, segments, implementation="reference")

    def loss(operation, q, k, v):
        return jnp.sum(operation(q, k, v).astype(jnp.float32) * cotangent)

    def value_and_gradients(operation, q, k, v):
        gradients = jax.jit(jax.grad(functools.partial(loss, operation), argnums=(0, 1, 2), allow_int=True))(q, k, v)
        leaves = [x for x in jax.tree.leaves(gradients) if x.ndim == 4]
        return jax.block_until_ready([jax.jit(operation)(q, k, v), *leaves])

    expected = value_and_gradients(unsharded, q, k, v)
    with tpu_kernels_as_xla() if implementation == "tpu" else contextlib.nullcontext():
        found = value_and_gradients(on_mesh, q, k, v)
    assert len(found) == len(expected) == (6 if chunked else 4)
    for mine, theirs in zip(found, expected, strict=True):
        assert np.any(theirs)
        # float32 sums of up to 516 terms in another order.
        np.testing.assert_allclose(mine, theirs, atol=5e-6 * np.abs(theirs).max())


@pytest.mark.long
def test_gpu_kernels_on_the_pieces_of_each_device():
    """One after the other: the interpreter of GPU kernels waits for ever where several devices run them."""
    devices, length = 2, 262
    q, k, v, cotangent = make_inputs(length, 2, 1, 64, jnp.bfloat16, batch=1)
    segments = make_segments(length, batch=1)

    def value_and_gradients(implementation, index, q, k, v, cotangent):
        def operation(q, k, v):
            return attention(q, k, v, segments, query_index=index, implementation=implementation)

        out, gradient = jax.vjp(operation, q, k, v)
        return jax.block_until_ready((out, *gradient(cotangent)))

    exact = [x.astype(jnp.float32) for x in (q, k, v, cotangent)]
    out, to_q, to_k, to_v = value_and_gradients("reference", jnp.arange(length)[None], *exact)
    sums = [0, 0]
    for i in range(devices):
        index = zigzag_index(length // devices, i, devices)
        with interpret("gpu"):
            mine = value_and_gradients("gpu", index[None], q[:, index], k, v, cotangent[:, index])
        sums = [a + b.astype(jnp.float32) for a, b in zip(sums, mine[2:], strict=True)]
        for found, expected in zip(mine[:2], (out[:, index], to_q[:, index]), strict=True):
            # bfloat16 keeps 8 bits of each term, a few times over.
            np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.01 * np.abs(expected).max())
    for found, expected in zip(sums, (to_k, to_v), strict=True):
        np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize(("devices", "unbalanced"), [(2, 2.8), (4, 6.1)])
def test_kernels_visit_as_many_blocks_on_every_device(devices, unbalanced, monkeypatch):
    """Of consecutive pieces the last has 2c - 1 times the pairs of the first, in whole blocks a little less."""
    monkeypatch.setattr(tpu, "_BLOCK", 128)
    length = 4096
    tokens = length // devices
    q, k, v, _ = make_inputs(length, 2, 1, 64, jnp.bfloat16, batch=1)

    def visited(index):
        """Blocks that each kernel works on: TPU by queries and by keys, then GPU."""
        visible = Visible(jnp.ones((1, length), jnp.int32), query_index=index[None])
        on_tpu, on_gpu = tpu._prepare(q[:, :tokens], k, v, visible), gpu._prepare(q[:, :tokens], k, v, visible)
        counts = [int(np.sum(tpu._pairs(on_tpu, by_keys).kinds != tpu._HIDDEN)) for by_keys in (False, True)]
        for by_keys in (False, True):
            ranges = gpu._ranges(on_gpu, 128, by_keys=by_keys)
            counts.append(int(np.sum(ranges[..., 1] - ranges[..., 0])))
        return counts

    consecutive = np.array([visited(i * tokens + jnp.arange(tokens)) for i in range(devices)])
    zigzag = np.array([visited(zigzag_index(tokens, i, devices)) for i in range(devices)])
    assert np.all(consecutive[-1] > unbalanced * consecutive[0])
    assert np.all(np.ptp(zigzag, axis=0) <= 1)
    np.testing.assert_array_equal(np.sum(zigzag, axis=0), np.sum(consecutive, axis=0))


def test_gathered_keys_are_not_kept_for_the_backward_pass():
    """It gathers them again, and does not attend again."""
    devices, length = 4, 64
    q, k, v, _ = make_inputs(length // devices, 4, 2, 16, jnp.float32, batch=devices)
    segments = jnp.ones((devices, length // devices), jnp.int32)

    def loss(q, k, v):
        axes = {"row_axes": ("data", "context"), "head_axis": "tensor", "context_axis": "context"}
        return jnp.sum(attention_on_mesh(q, k, v, segments, mesh=mesh_of(devices), implementation="xla", **axes))

    kept = jax.tree.leaves(jax.vjp(loss, q, k, v)[1])
    # Operands as they were given, the result, its log-sum-exp.
    assert sum(x.size for x in kept) <= 2 * q.size + 2 * k.size + 2 * segments.size * q.shape[2]
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v))
    # Keys, values and segments each way; two products forward and five backward.
    assert (program.count("all_gather["), program.count("dot_general[")) == (6, 7)
