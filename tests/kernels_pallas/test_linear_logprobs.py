"""Log-probability and entropy in blocks, and their gradients, against the definition over whole arrays."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas.linear_kl import linear_logprobs

B, T, D, V = 2, 7, 8, 37
# The blocks of most tests divide neither T (7) nor V (37).
BLOCKS = {"block_tokens": 6, "block_vocab": 8}


def make_inputs(dtype=np.float64, scale=1.0, batch=B, vocab=V):
    """Hidden states, head, ids with every third one absent, and what a loss changes by with either result."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(batch, T, D)), rng.normal(size=(vocab, D)) * scale / math.sqrt(D)
    ids = rng.integers(0, vocab, (batch, T)).astype(np.int32)
    ids[:, ::3] = -1
    up, spread = rng.normal(size=(2, batch, T))
    return *(array.astype(dtype) for array in (hidden, head)), ids, *(a.astype(dtype) for a in (up, spread))


@functools.partial(jax.jit, static_argnames=("block_tokens", "block_vocab", "implementation", "vocab_axis"))
def results(hidden, head, ids, up, spread, **options):
    """Both results, and the gradients of their sum with the weights `up` and `spread`."""

    def loss(hidden, head):
        found = linear_logprobs(hidden, head, ids, **options)
        return (up * found[0] + spread * found[1]).sum(), found

    (_, found), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    return found, gradients


def assert_close(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


@pytest.mark.parametrize(
    "blocks", [BLOCKS, {"block_tokens": 100, "block_vocab": 100}, {"block_tokens": 1, "block_vocab": 36}, {}]
)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_results_and_gradients_equal_the_reference_in_float64(blocks, scale):
    with jax.enable_x64(True):
        inputs = make_inputs(scale=scale)
        ours, whole = results(*inputs, **blocks), results(*inputs, implementation="reference")
        assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float64)}
        # Float64 rounding of sums over 37 tokens; at scale 30 of logits up to 100.
        assert_close(ours, whole, rtol=1e-9, atol=1e-12)


def test_a_position_without_a_token_adds_exactly_nothing():
    hidden, head, ids, up, spread = make_inputs(np.float32)
    dead = ids < 0
    dirty = np.where(dead[..., None], np.nan, hidden)
    clean_result, dirty_result = (results(h, head, ids, up, spread, **BLOCKS) for h in (hidden, dirty))
    assert_close(dirty_result, clean_result, rtol=0, atol=0)
    (logprob, entropy), (by_hidden, _) = dirty_result
    for array in (logprob, entropy, by_hidden):
        assert np.all(np.asarray(array)[dead] == 0)
        assert np.all(np.asarray(array)[~dead] != 0)


def test_padding_changes_nothing():
    hidden, head, ids, up, spread = make_inputs(np.float32)
    (logprob, entropy), (by_hidden, by_head) = results(hidden, head, ids, up, spread, **BLOCKS)
    padded = (np.pad(array, [(0, 0), (0, 5)] + [(0, 0)] * (array.ndim - 2)) for array in (hidden, up, spread))
    longer_hidden, longer_up, longer_spread = padded
    longer_ids = np.pad(ids, [(0, 0), (0, 5)], constant_values=-1)
    found, gradients = results(longer_hidden, head, longer_ids, longer_up, longer_spread, **BLOCKS)
    # The same float32 terms added in another order.
    assert_close([one[:, :T] for one in (*found, gradients[0])], [logprob, entropy, by_hidden], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[1], by_head, rtol=1e-4, atol=1e-6)
    assert all(not np.any(one[:, T:]) for one in (*found, gradients[0]))


def test_logits_far_apart_leave_numbers():
    """Entries whose probability is 0 in float32 neither add to the entropy nor to a gradient."""
    head = np.zeros((V, 1), np.float32)
    head[0] = 300.0
    one = np.ones((1, 1, 1), np.float32)
    ids = np.array([[3]], np.int32)
    (logprob, entropy), (_, by_head) = results(one, head, ids, one[..., 0], 10 * one[..., 0], block_vocab=8)
    np.testing.assert_allclose(logprob, -300, rtol=1e-6)
    np.testing.assert_allclose(entropy, 0, atol=1e-6)
    expected = np.zeros(V)
    expected[[0, 3]] = -1, 1
    np.testing.assert_allclose(np.asarray(by_head)[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("block_vocab", [20, 8])
def test_devices_that_share_the_vocabulary_find_the_same(block_vocab):
    batch, vocab = 4, 40
    inputs = make_inputs(np.float32, batch=batch, vocab=vocab)
    whole = results(*inputs, block_tokens=6, block_vocab=8)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))

    def sharded(hidden, head, ids, up, spread):
        def run(hidden, head, ids):
            return linear_logprobs(hidden, head, ids, vocab_axis="tensor", block_tokens=6, block_vocab=block_vocab)

        rows, entries = PartitionSpec("data"), PartitionSpec("tensor")
        on_mesh = jax.shard_map(run, mesh=mesh, in_specs=(rows, entries, rows), out_specs=(rows, rows), check_vma=False)

        def loss(hidden, head):
            found = on_mesh(hidden, head, ids)
            return (up * found[0] + spread * found[1]).sum(), found

        (_, found), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
        return found, gradients

    # The same float32 terms added in another order.
    assert_close(jax.jit(sharded)(*inputs), whole, rtol=1e-4, atol=1e-6)


def largest_array(jaxpr) -> int:
    """The most elements of any array that a jaxpr or one of its loops makes."""
    found = [0]
    for equation in jaxpr.eqns:
        found += [math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars]
        found += [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
    return max(found)


def test_no_array_of_tokens_times_vocabulary_exists_and_memory_is_that_of_the_formula():
    batch, length, width, vocab, tokens, block = 2, 128, 4, 3001, 16, 512
    hidden, head = jnp.ones((batch, length, width)), jnp.ones((vocab, width))
    ids = jnp.zeros((batch, length), jnp.int32)
    traced = results.trace(
        hidden, head, ids, ids.astype(jnp.float32), ids.astype(jnp.float32), block_tokens=tokens, block_vocab=block
    )
    assert largest_array(traced.jaxpr.jaxpr) < batch * length * vocab / 8
    used = traced.lower().compile().memory_analysis().temp_size_in_bytes
    small = 4 * (2 * vocab * width + 8 * batch * length * width)  # the gradients' own sums, and what is [B, T]
    assert used < 4 * tokens * 4 * block + small


def test_bfloat16_inputs_accumulate_in_float32():
    exact = [jnp.asarray(array, jnp.bfloat16 if index < 2 else None) for index, array in enumerate(make_inputs())]
    exact[3:] = [array.astype(jnp.float32) for array in exact[3:]]
    wide = [array.astype(jnp.float32) if index < 2 else array for index, array in enumerate(exact)]
    (found, gradients), (wide_found, wide_gradients) = results(*exact, **BLOCKS), results(*wide, **BLOCKS)
    assert {one.dtype for one in found} == {jnp.dtype(jnp.float32)}
    assert {one.dtype for one in gradients} == {jnp.dtype(jnp.bfloat16)}
    assert_close(found, wide_found, rtol=1e-5)
    # Eight bits of mantissa in the logit gradient, the operands and the result.
    largest = max(float(jnp.abs(g).max()) for g in wide_gradients)
    assert_close([g.astype(jnp.float32) for g in gradients], list(wide_gradients), rtol=0.05, atol=0.02 * largest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": np.zeros((V, D + 1), np.float32)}, r"head has shape \(37, 9\)"),
        ({"ids": np.zeros((B, T + 1), np.int32)}, r"ids has shape \(2, 8\)"),
        ({"ids": np.zeros((B, T), np.float32)}, "ids has dtype float32; pass integer"),
        ({"implementation": "tpu"}, "implementation 'tpu' of linear_logprobs; use one of xla, reference"),
        ({"block_vocab": 0}, "block_vocab 0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    hidden, head, ids, _, _ = make_inputs(np.float32)
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{"hidden": hidden, "head": head, "ids": ids} | change)
