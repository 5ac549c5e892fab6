"""Values and gradients of expert dispatch against the reference that runs every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import moe_dispatch
from kernels_pallas.moe_dispatch import xla

WIDTH, INNER = 12, 10


def make_inputs(tokens, experts, per_token, *, dtype=jnp.float32, expert_ids=None):
    """x, routing weights, expert ids, gate, up, down and a cotangent."""
    rng = np.random.default_rng(0)
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
    expected = value_and_gradients("reference", *inputs)
    for mine, theirs in zip(value_and_gradients("xla", *inputs), expected, strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)


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


def test_chunks_do_not_change_the_result(monkeypatch):
    inputs = make_inputs(50, 8, 2)
    whole = value_and_gradients("xla", *inputs)
    compiled.cache_clear()
    monkeypatch.setattr(xla, "_CHUNK_BYTES", 3 * 3 * WIDTH * INNER * 4)
    chunked = value_and_gradients("xla", *inputs)
    compiled.cache_clear()
    for mine, theirs in zip(chunked, whole, strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_near_float32():
    inputs = make_inputs(50, 8, 2, dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in inputs]
    expected = value_and_gradients("reference", *wide)
    for mine, theirs, given in zip(
        value_and_gradients("xla", *inputs),
        expected,
        (inputs[0], inputs[0], inputs[1], *inputs[3:6]),
        strict=True,
    ):
        assert mine.dtype == given.dtype
        # bfloat16 keeps 8 bits: 0.4 % of the largest term that a sum rounds, a few times over.
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=0.02 * np.abs(theirs).max())


@pytest.mark.parametrize("seed", range(5))
def test_every_row_has_a_slot_of_its_own_in_a_block_of_its_expert(seed):
    rng = np.random.default_rng(seed)
    rows, experts = int(rng.integers(1, 300)), int(rng.integers(1, 12))
    expert_of_row = rng.integers(0, experts, rows) ** 2 // experts
    block = xla._block_rows(rows, experts)
    blocks = -(-rows // block) + experts
    slots, block_expert = map(np.asarray, xla._layout(jnp.asarray(expert_of_row), experts, block, blocks))
    assert len(set(slots.tolist())) == rows
    assert slots.min() >= 0
    assert slots.max() < blocks * block
    np.testing.assert_array_equal(block_expert[slots // block], expert_of_row)


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
    with pytest.raises(ValueError, match="implementation 'gpu' is unknown"):
        moe_dispatch.expert_ffn(x, weights, expert_ids, gate, up, down, implementation="gpu")
