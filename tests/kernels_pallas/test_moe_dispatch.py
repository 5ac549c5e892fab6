"""Values and gradients of expert dispatch, on one device and on a mesh, against every expert run on every token."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import moe_dispatch
from kernels_pallas.moe_dispatch import chunks, exchange, permute
from tests.kernels_pallas.interpreters import interpret

WIDTH, INNER = 12, 10


def make_inputs(tokens, experts, per_token, *, dtype=jnp.float32, expert_ids=None, seed=0):
    """x, routing weights, expert ids, gate, up, down and a cotangent."""
    rng = np.random.default_rng(seed)
    if expert_ids is None:
        expert_ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :per_token]
    shapes = [(experts, WIDTH, INNER), (experts, WIDTH, INNER), (experts, INNER, WIDTH)]
    matrices = [jnp.asarray(rng.normal(0, 0.5, shape), dtype) for shape in shapes]
    x, cotangent = (jnp.asarray(rng.normal(size=(tokens, WIDTH)), dtype) for _ in range(2))
    weights = jnp.asarray(rng.random((tokens, per_token)), jnp.float32)
    return x, weights, jnp.asarray(expert_ids, jnp.int32), *matrices, cotangent


@functools.cache
def compiled(implementation):
    def loss(x, weights, expert_ids, gate, up, down, cotangent):
        out = moe_dispatch.expert_ffn(x, weights, expert_ids, gate, up, down, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 3, 4, 5), has_aux=True))


def value_and_gradients(implementation, *inputs):
    gradients, out = compiled(implementation)(*inputs)
    return out, *gradients


def check(inputs):
    x, weights, _, *matrices, _ = inputs
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in inputs]
    expected = value_and_gradients("reference", *wide)
    operands = (x, x, weights, *matrices)
    for mine, theirs, operand in zip(value_and_gradients("xla", *inputs), expected, operands, strict=True):
        assert mine.dtype == operand.dtype
        # float32 sums in another order; bfloat16 keeps 8 bits: 0.4 % of the largest term that a sum rounds, a few
        # times over.
        rounding = (1e-4, 1e-4) if x.dtype == jnp.float32 else (0, 0.02 * np.abs(theirs).max())
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, *rounding)


@pytest.mark.parametrize(
    ("tokens", "experts", "per_token"),
    [(1, 4, 2), (3, 4, 4), (7, 1, 1), (50, 8, 2), (400, 3, 1)],
)
def test_value_and_every_gradient(tokens, experts, per_token):
    check(make_inputs(tokens, experts, per_token))


@pytest.mark.parametrize(
    "expert_ids",
    [
        np.tile([[2, 5]], (50, 1)),
        np.tile([[7, 0]], (50, 1)),
        np.concatenate([np.tile([[1, 2]], (49, 1)), [[6, 3]]]),
    ],
    ids=["all_to_two", "first_and_last", "one_stray"],
)
def test_unbalanced_routing_and_empty_experts(expert_ids):
    inputs = make_inputs(50, 8, 2, expert_ids=expert_ids)
    check(inputs)
    _, _, _, *matrices = value_and_gradients("xla", *inputs)
    unused = sorted(set(range(8)) - set(expert_ids.ravel()))
    assert all(not np.any(gradient[jnp.array(unused)]) for gradient in matrices)


def test_on_a_kernel():
    inputs = make_inputs(50, 8, 2)
    with interpret("tpu"):
        results = jax.block_until_ready(value_and_gradients("tpu", *inputs))
    for mine, theirs in zip(results, value_and_gradients("reference", *inputs), strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)


@st.composite
def drawn(draw):
    """Inputs, with any number of experts that no token has."""
    experts = draw(st.integers(1, 9))
    per_token, tokens, seed = draw(st.integers(1, experts)), draw(st.integers(1, 150)), draw(st.integers(0, 2**32 - 1))
    chosen = np.argsort(np.random.default_rng(seed).random((tokens, experts)), axis=1)[:, :per_token]
    unused, dtype = draw(st.integers(0, 5)), draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    return make_inputs(tokens, experts + unused, per_token, dtype=dtype, expert_ids=chosen, seed=seed)


@pytest.mark.long
@settings(max_examples=10, deadline=None, derandomize=True)
@given(drawn())
def test_random_shapes(inputs):
    check(inputs)


def test_bfloat16_stays_near_float32():
    check(make_inputs(50, 8, 2, dtype=jnp.bfloat16))


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_has_a_place_of_its_own_among_those_of_its_expert(seed, alignment):
    rng = np.random.default_rng(seed)
    tokens, per_token, experts = int(rng.integers(1, 100)), 3, int(rng.integers(1, 12))
    expert_ids = rng.integers(-1, experts + 1, (tokens, per_token))
    where = permute.placement(jnp.asarray(expert_ids), experts, alignment)
    here = (expert_ids >= 0) & (expert_ids < experts)
    sizes, places = np.asarray(where.group_sizes), np.asarray(where.place)
    assert np.all(sizes % alignment == 0)
    assert np.all(sizes - np.bincount(expert_ids[here], minlength=experts) < alignment)
    np.testing.assert_array_equal(np.repeat(np.arange(experts), sizes)[places[here]], expert_ids[here])
    np.testing.assert_array_equal(where.row[places[here]], np.flatnonzero(here))
    assert np.sum(np.asarray(where.row) < expert_ids.size) == np.sum(here)
    assert np.all(places[~here] == len(where.row))


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is documented to do, which CPU has not: everyone sees everything, takes some."""
    here = jax.lax.axis_index(axis_name)
    everything = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    index = jnp.arange(output.shape[0])
    for sender, (rows, begins, sizes, targets) in enumerate(zip(*everything, strict=True)):
        offset = index - targets[here]
        got = rows.at[begins[here] + offset].get(mode="fill", fill_value=0)
        inside = (offset >= 0) & (offset < sizes[here])
        output = jnp.where(inside[:, None], got, output)
        # What a device expects is what is sent to it.
        output = jnp.where(sizes[here] == recv_sizes[sender], output, jnp.nan)
    return output


@contextlib.contextmanager
def emulated():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
        patch.setattr(exchange, "platform", lambda: "tpu")
        yield


def on_mesh(x, weights, expert_ids, gate, up, down, cotangent, **options):
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    axes = {"token_axes": ("data", "expert"), "expert_axis": "expert", "inner_axis": "tensor", "mesh": mesh}
    options = axes | options

    def loss(x, weights, gate, up, down):
        out = moe_dispatch.expert_ffn_on_mesh(x, weights, expert_ids, gate, up, down, **options)
        return jnp.sum(out * cotangent), out

    with emulated():
        gradients, out = jax.jit(jax.grad(loss, argnums=range(5), has_aux=True))(x, weights, gate, up, down)
    return out, *gradients


@pytest.mark.parametrize("way", ["all_gather", "ragged"])
@pytest.mark.parametrize("expert_ids", [None, np.tile([[6, 5]], (24, 1))], ids=["spread", "all_to_one_device"])
def test_value_and_every_gradient_on_a_mesh(way, expert_ids):
    inputs = make_inputs(24, 8, 2, expert_ids=expert_ids)
    expected = value_and_gradients("reference", *inputs)
    for mine, theirs in zip(on_mesh(*inputs, exchange=way), expected, strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["all_gather", "ragged"])
@pytest.mark.parametrize("rows_at_once", [8, 65_536])
def test_bfloat16_is_sent_as_such_and_stays_near_float32(way, rows_at_once):
    inputs = make_inputs(24, 8, 2, dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in inputs]
    found = on_mesh(*inputs, exchange=way, rows_at_once=rows_at_once)
    for mine, theirs in zip(found, value_and_gradients("reference", *wide), strict=True):
        # bfloat16 keeps 8 bits: 0.4 % of the largest term that a sum rounds, a few times over.
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=0.02 * np.abs(theirs).max())
    program = str(jax.make_jaxpr(functools.partial(on_mesh, exchange=way, rows_at_once=rows_at_once))(*inputs))
    sums = re.findall(r":(\w+)\[[\d,]*,12\] = (?:psum|reduce_scatter)\w*\[", program)
    assert set(sums) == {"bf16"}


def test_several_axes_of_experts_are_taken_as_one():
    inputs = make_inputs(24, 8, 2)
    expected = value_and_gradients("reference", *inputs)
    for mine, theirs in zip(on_mesh(*inputs, expert_axis=("data", "expert")), expected, strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["all_gather", "ragged"])
@pytest.mark.parametrize("rows_at_once", [1, 8])
def test_chunks_change_nothing(way, rows_at_once):
    """Each device has 6 tokens for 2 experts each; two devices exchange 1 or 2 of them at a time."""
    inputs = make_inputs(24, 8, 2)
    expected = value_and_gradients("reference", *inputs)
    for mine, theirs in zip(on_mesh(*inputs, exchange=way, rows_at_once=rows_at_once), expected, strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)


def test_gradients_of_many_chunks_are_summed_in_float32():
    inputs = make_inputs(800, 2, 1, dtype=jnp.bfloat16)
    whole, chunked = on_mesh(*inputs), on_mesh(*inputs, rows_at_once=2)
    for mine, theirs in zip(chunked[3:], whole[3:], strict=True):
        # Each of 200 chunks' gradients is rounded to 8 bits; a sum in bfloat16 is off by several times as much.
        np.testing.assert_allclose(
            mine.astype(jnp.float32), theirs.astype(jnp.float32), atol=0.01 * np.abs(theirs).max()
        )


def test_chunks_bound_the_memory_of_forward_and_backward_pass():
    mesh = jax.make_mesh((4, 2), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shapes = [(1024, 64), (1024, 4), (1024, 4), (8, 64, 32), (8, 64, 32), (8, 32, 64)]
    operands = [jax.ShapeDtypeStruct(shape, jnp.int32 if i == 2 else jnp.float32) for i, shape in enumerate(shapes)]

    def temporary_bytes(rows_at_once):
        def loss(x, weights, expert_ids, *matrices):
            axes = {"token_axes": ("expert",), "expert_axis": "expert", "inner_axis": "tensor", "mesh": mesh}
            options = axes | {"rows_at_once": rows_at_once}
            return jnp.sum(moe_dispatch.expert_ffn_on_mesh(x, weights, expert_ids, *matrices, **options))

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 3, 4, 5)))
        return run.lower(*operands).compile().memory_analysis().temp_size_in_bytes

    # Of what 1,024 tokens take, an eighth and what does not depend on their number.
    assert temporary_bytes(512) < temporary_bytes(4096) / 3


def test_the_fewest_chunks_that_fit():
    assert [chunks.chunk_count(12, most) for most in (12, 11, 6, 5, 1, 0)] == [1, 2, 2, 3, 12, 12]
    assert chunks.chunk_count(7, 6) == 7


def test_receiving_more_than_there_is_room_for_is_seen_by_all():
    inputs = make_inputs(24, 8, 2, expert_ids=np.tile([[6, 5]], (24, 1)))
    # Two devices send 6 tokens each, for two experts.
    exact, *_ = on_mesh(*inputs, exchange="ragged", receive_rows=24)
    np.testing.assert_allclose(exact, value_and_gradients("reference", *inputs)[0], atol=1e-4, rtol=1e-4)
    assert np.all(np.isnan(on_mesh(*inputs, exchange="ragged", receive_rows=23)[0]))


def test_route_takes_the_largest_of_a_float32_softmax():
    logits = np.random.default_rng(0).normal(0, 2, (20, 6))
    exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-exact, axis=1)[:, :3]
    weights, expert_ids, probabilities = moe_dispatch.route(jnp.asarray(logits, jnp.float32), 3, normalise=False)
    np.testing.assert_array_equal(expert_ids, order)
    # float32 against float64.
    np.testing.assert_allclose(probabilities, exact, rtol=1e-5)
    np.testing.assert_allclose(weights, np.take_along_axis(exact, order, axis=1), rtol=1e-5)
    normalised, _, _ = moe_dispatch.route(jnp.asarray(logits, jnp.float32), 3, normalise=True)
    np.testing.assert_allclose(np.sum(normalised, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(normalised[:, 0] / normalised[:, 2], weights[:, 0] / weights[:, 2], rtol=1e-5)
    assert moe_dispatch.route(jnp.asarray(logits, jnp.bfloat16), 3, normalise=True)[0].dtype == jnp.float32


def test_wrong_arguments_are_named():
    x, weights, expert_ids, gate, up, down, _ = make_inputs(5, 4, 2)
    with pytest.raises(ValueError, match=r"experts_per_token 5 is not in 1\.\.4"):
        moe_dispatch.route(jnp.zeros((3, 4)), 5, normalise=True)
    with pytest.raises(ValueError, match="must be"):
        moe_dispatch.expert_ffn(x, weights, expert_ids, gate, up, up)
    with pytest.raises(ValueError, match="x is"):
        moe_dispatch.expert_ffn(x[:, 1:], weights, expert_ids, gate, up, down)
    with pytest.raises(ValueError, match="weights"):
        moe_dispatch.expert_ffn(x, weights[:, :1], expert_ids, gate, up, down)
    with pytest.raises(ValueError, match=r"gate \(12, 10\), up \(12, 10\), down \(10, 12\) must be \[E,D,F\]"):
        moe_dispatch.expert_ffn(x, weights, expert_ids, gate[0], up[0], down[0])
    with pytest.raises(ValueError, match=r"weights \(5,\) and expert_ids \(5,\) must both be \[5, X\]"):
        moe_dispatch.expert_ffn(x, weights[:, 0], expert_ids[:, 0], gate, up, down)
    with pytest.raises(ValueError, match="expert_ids has dtype float32; pass integers"):
        moe_dispatch.expert_ffn(x, weights, weights, gate, up, down)
    with pytest.raises(ValueError, match="'triton' of moe_dispatch is unknown"):
        moe_dispatch.expert_ffn(x, weights, expert_ids, gate, up, down, implementation="triton")


def test_what_does_not_fit_a_mesh_is_named():
    inputs = make_inputs(24, 8, 2)
    for wrong, options, message in (
        (make_inputs(22, 8, 2), {}, r"x is \(22, 12\); the mesh splits its 22 rows in 4"),
        (make_inputs(24, 7, 2), {}, r"gate is \(7, 12, 10\); the mesh splits its 7 rows in 2"),
        (inputs, {"exchange": "all_to_all"}, "exchange 'all_to_all' is unknown"),
        (inputs, {"receive_rows": 9}, "receive_rows 9 with exchange 'all_gather': it is for 'ragged'"),
        (inputs, {"exchange": "ragged", "receive_rows": 0}, "receive_rows 0 .* at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            on_mesh(*wrong, **options)
    mesh = jax.make_mesh((2, 4), ("expert", "tensor"))
    axes = {"mesh": mesh, "expert_axis": "expert", "inner_axis": "tensor"}
    with pytest.raises(ValueError, match=r"token_axes \('tensor',\) must contain the expert axis 'expert'"):
        moe_dispatch.expert_ffn_on_mesh(*inputs[:6], token_axes=("tensor",), **axes)
    with pytest.raises(ValueError, match=r"gate is \(8, 12, 10\); the mesh splits its columns in 4"):
        moe_dispatch.expert_ffn_on_mesh(*inputs[:6], token_axes=("expert",), **axes)
    with pytest.raises(ValueError, match="exchange 'ragged' does not run on cpu; use 'all_gather'"):
        moe_dispatch.expert_ffn_on_mesh(
            *inputs[:6],
            token_axes=("data",),
            expert_axis="data",
            inner_axis="tensor",
            exchange="ragged",
            mesh=jax.make_mesh((2, 2), ("data", "tensor")),
        )
