"""Values and gradients of every attention implementation against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import attention, xla
from tests.kernels_pallas.test_linear_kl import largest_array

HEADS, KV_HEADS, SIZE = 4, 2, 6


def make_inputs(length, *, batch=2, dtype=jnp.float32, seed=0):
    """q, k, v and a cotangent; keys are large enough that softmax is far from uniform."""
    rng = np.random.default_rng(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [jnp.asarray(rng.normal(0, 1.5, (batch, length, n, SIZE)), dtype) for n in heads]


def make_segments(length, *, batch=2):
    """Rows of one, and of several documents with padding between and behind them."""
    rows = [np.ones(length, np.int32)]
    for seed in range(1, batch):
        row = np.sort(np.random.default_rng(seed).integers(1, 4, length))
        row[length // 2 : length // 2 + length // 8] = 0
        row[length - length // 6 :] = 0
        rows.append(row)
    return jnp.asarray(np.stack(rows), jnp.int32)


@functools.cache
def compiled(implementation):
    def loss(q, k, v, cotangent, segments):
        out = attention(q, k, v, segments, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def value_and_gradients(implementation, *inputs):
    gradients, out = compiled(implementation)(*inputs)
    return out, *gradients


@pytest.mark.parametrize("length", [1, 37, 130, 600, 1100])
def test_value_and_every_gradient(length):
    q, k, v, cotangent = make_inputs(length)
    segments = make_segments(length)
    expected = value_and_gradients("reference", q, k, v, cotangent, segments)
    for mine, theirs in zip(value_and_gradients("xla", q, k, v, cotangent, segments), expected, strict=True):
        # float32 sums of up to 1100 terms in another order.
        np.testing.assert_allclose(mine, theirs, atol=3e-5, rtol=1e-4)


@pytest.fixture
def fresh_programs():
    """Programs compiled with other block sizes must not serve other tests."""
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@pytest.mark.parametrize("length", [24, 27])
@pytest.mark.usefixtures("fresh_programs")
def test_looped_blocks_agree_with_the_reference(length, monkeypatch):
    q, k, v, cotangent = make_inputs(length)
    segments = make_segments(length)
    expected = value_and_gradients("reference", q, k, v, cotangent, segments)
    monkeypatch.setattr(xla, "_UNROLLED", 8)
    monkeypatch.setattr(xla, "_LARGE_BLOCK", 8)
    for mine, theirs in zip(value_and_gradients("xla", q, k, v, cotangent, segments), expected, strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pieces", [np.r_[:2048], np.r_[:512, 1536:2048]], ids=["row", "pieces"])
def test_looped_blocks_read_no_keys_beyond_the_quarter_that_they_reach(pieces):
    """A value that is no number spoils whatever product it takes part in, however small its weight."""
    q, k, v, _ = make_inputs(2048)
    v = v.at[:, 1536:].set(jnp.nan)
    index = None if len(pieces) == 2048 else jnp.broadcast_to(pieces, (2, len(pieces)))
    segments = jnp.ones((2, 2048), jnp.int32)
    out = attention(q[:, pieces], k, v, segments, query_index=index, implementation="xla")
    assert np.all(np.isfinite(out[:, :-512]))
    assert np.all(np.isnan(out[:, -512:]))


def test_scores_of_a_long_row_are_held_to_their_limit():
    """All 32 heads of a piece of a row of 32,768, of which keys and values alone have as many numbers."""
    q, kv = (jax.ShapeDtypeStruct((1, length, 32, 128), jnp.bfloat16) for length in (8192, 32768))
    index, segments = (jax.ShapeDtypeStruct((1, length), jnp.int32) for length in (8192, 32768))

    def loss(q, k, v, segments, index):
        return attention(q, k, v, segments, query_index=index, implementation="xla").astype(jnp.float32).sum()

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, kv, kv, segments, index)
    assert largest_array(traced.jaxpr) <= xla._SCORE_BYTES // 4


def test_a_scan_of_layers_makes_no_mask_of_all_its_blocks_at_once():
    """8,192 queries and keys and 8 heads: such a mask has half a billion entries."""
    x, segments = jax.ShapeDtypeStruct((1, 8192, 8, 16), jnp.float32), jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def loss(x, segments):
        layer = jax.checkpoint(lambda x, _: (attention(x, x, x, segments, implementation="xla"), None))
        return jax.lax.scan(layer, x, length=2)[0].sum()

    assert largest_array(jax.make_jaxpr(jax.grad(loss))(x, segments).jaxpr) <= xla._SCORE_BYTES // 4


@pytest.mark.parametrize(("implementation", "length"), [("reference", 130), ("xla", 130), ("xla", 1700)])
def test_some_queries_of_a_row_are_answered_as_in_the_whole_row(implementation, length):
    """Two pieces of each row, the later one first; 1,700 leaves more than are unrolled."""
    q, k, v, cotangent = make_inputs(length)
    segments = make_segments(length)
    pieces = np.r_[length - length // 4 : length, length // 8 : length // 2]
    index = jnp.broadcast_to(pieces, (2, len(pieces)))
    others = jnp.ones(length, bool).at[pieces].set(False)[:, None, None]
    expected = value_and_gradients("xla", q, k, v, jnp.where(others, 0, cotangent), segments)

    @jax.jit
    def some(q, k, v, cotangent):
        out, gradient = jax.vjp(
            lambda *x: attention(*x, segments, query_index=index, implementation=implementation), q, k, v
        )
        return out, *gradient(cotangent)

    found = some(q[:, pieces], k, v, cotangent[:, pieces])
    expected = [x[:, pieces] if of_queries else x for x, of_queries in zip(expected, (1, 1, 0, 0), strict=True)]
    for mine, theirs in zip(found, expected, strict=True):
        # float32 sums of up to 1700 terms in another order.
        np.testing.assert_allclose(mine, theirs, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("length", [37, 1100])
def test_padding_gives_zeros_and_takes_part_in_nothing(implementation, length):
    q, k, v, cotangent = make_inputs(length)
    segments = jnp.stack([jnp.zeros(length, jnp.int32), jnp.arange(length) < 4]).astype(jnp.int32)
    out, *gradients = value_and_gradients(implementation, q, k, v, cotangent, segments)
    for array in (out, *gradients):
        assert not np.any(array[0])
        assert not np.any(array[1, 4:])
        assert np.all(np.isfinite(array))
    assert np.any(gradients[1][1, :4])
    extreme = jnp.where(segments[:, :, None, None] == 0, 1e4, 1)
    changed = attention(q * extreme, k * extreme, v * extreme, segments, implementation=implementation)
    # Compiled as one program above and step by step here.
    np.testing.assert_allclose(changed, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_nothing_flows_from_the_future_or_from_other_documents(implementation):
    q, k, v, _ = make_inputs(12, batch=1)
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    out = attention(q, k, v, segments, implementation=implementation)
    later = attention(q, k.at[:, 8:].add(1), v.at[:, 8:].add(1), segments, implementation=implementation)
    np.testing.assert_array_equal(later[:, :8], out[:, :8])
    assert np.all(np.any(later[:, 8:] != out[:, 8:], axis=-1))
    other = attention(q, k.at[:, :5].add(1), v.at[:, :5].add(1), segments, implementation=implementation)
    np.testing.assert_array_equal(other[:, 5:], out[:, 5:])


def test_large_scores_do_not_overflow():
    q, k, v, cotangent = make_inputs(37)
    segments = make_segments(37)
    expected = value_and_gradients("reference", q * 100, k, v, cotangent, segments)
    for mine, theirs in zip(value_and_gradients("xla", q * 100, k, v, cotangent, segments), expected, strict=True):
        # Scores of hundreds carry errors of 1e-5 into the exponent.
        np.testing.assert_allclose(mine, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=1e-4)


@pytest.mark.parametrize("length", [37, 1100])
def test_bfloat16_stays_near_float32(length):
    low = make_inputs(length, dtype=jnp.bfloat16)
    segments = make_segments(length)
    expected = value_and_gradients("reference", *(x.astype(jnp.float32) for x in low), segments)
    for mine, theirs in zip(value_and_gradients("xla", *low, segments), expected, strict=True):
        assert mine.dtype == jnp.bfloat16
        # bfloat16 keeps 8 bits: 0.4 % of the largest term that a sum rounds, a few times over.
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=0.02 * np.abs(theirs).max())


def test_wrong_arguments_are_named():
    q, k, v, _ = make_inputs(4)
    segments = make_segments(4)
    with pytest.raises(ValueError, match="must be"):
        attention(q, k, v[:, :3], segments)
    with pytest.raises(ValueError, match=r"q \(4, 4, 6\), k \(2, 4, 2, 6\), .* must be \[B,T,N,H\]"):
        attention(q[0], k, v, segments)
    with pytest.raises(ValueError, match="segment_ids is"):
        attention(q, k, v, segments[:, :3])
    with pytest.raises(ValueError, match="differ in length; say by query_index"):
        attention(q[:, :3], k, v, segments)
    with pytest.raises(ValueError, match=r"query_index is \(2, 4\); it must be \(2, 3\)"):
        attention(q[:, :3], k, v, segments, query_index=segments)
    with pytest.raises(ValueError, match="q has 3 heads"):
        attention(q[:, :, :3], k, v, segments)
    with pytest.raises(ValueError, match="implementation 'triton' of attention is unknown"):
        attention(q, k, v, segments, implementation="triton")
    with pytest.raises(ValueError, match="implementation 'tpu' of attention needs TPU, this platform is cpu"):
        attention(q, k, v, segments, implementation="tpu")
