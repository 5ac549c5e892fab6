"""The TPU attention kernels, interpreted on CPU, against the float32 reference: values, statistics, every gradient.

The interpreter runs the grid, the block transfers and the arithmetic, and here also looks for races. It knows neither
the tiling of registers nor the size of fast memory: what Mosaic accepts is seen by compiling for the chips.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the races have no public door
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import platforms
from kernels_pallas.attention import attention, attention_part, tpu


@pytest.fixture(autouse=True)
def interpreted_tpu(monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    # Small blocks give short rows several of them.
    monkeypatch.setattr(tpu, "_BLOCK", 128)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


def make_inputs(length, heads, kv_heads, size, dtype, *, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    counts = (heads, kv_heads, kv_heads, heads)
    return [jnp.asarray(rng.normal(0, 1.5, (batch, length, n, size)), dtype) for n in counts]


def make_segments(length, *, batch=2, seed=0):
    """One row of padding, documents, padding and a document again, after rows of several documents."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.integers(1, 4, length)) for _ in range(batch)]
    rows[-1][: length // 8] = 0
    rows[-1][length // 2 : length // 2 + length // 3] = 0
    return jnp.asarray(np.stack(rows), jnp.int32)


def value_and_gradients(operation, q, k, v, cotangent):
    def loss(q, k, v):
        out, log_sum_exp = operation(q, k, v)
        weights = jnp.cos(jnp.arange(log_sum_exp.size)).reshape(log_sum_exp.shape)
        seen = jnp.where(log_sum_exp > -1e28, log_sum_exp, 0)
        return jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32)) + jnp.sum(weights * seen), (out, seen)

    gradients, results = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return *results, *gradients


def whole(segments):
    """A span that hides nothing."""
    return jnp.zeros_like(segments), jnp.full_like(segments, segments.shape[1])


def window(segments):
    """The 50 keys before each query; every 7th query counts none."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    return index - 50, jnp.where(index % 7 == 0, 0, index)


CASES = [
    # length, heads, kv_heads, size, dtype, span
    (1, 2, 1, 64, jnp.float32, whole),
    (128, 2, 2, 128, jnp.float32, whole),
    (300, 4, 2, 64, jnp.float32, window),
    (401, 4, 1, 128, jnp.bfloat16, whole),
]


@pytest.mark.parametrize(("length", "heads", "kv_heads", "size", "dtype", "span"), CASES)
def test_value_and_every_gradient(length, heads, kv_heads, size, dtype, span):
    inputs = make_inputs(length, heads, kv_heads, size, dtype)
    segments = make_segments(length)

    def run(implementation, *inputs):
        return value_and_gradients(
            lambda q, k, v: attention_part(q, k, v, segments, span(segments), implementation=implementation), *inputs
        )

    expected = run("reference", *(x.astype(jnp.float32) for x in inputs))
    for mine, theirs in zip(run("tpu", *inputs), expected, strict=True):
        assert np.all(np.isfinite(mine.astype(jnp.float32)))
        # float32 sums in another order; bfloat16 keeps 8 bits of each term, a few times over.
        share = 2e-6 if dtype == jnp.float32 else 0.01
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=share * max(1, np.abs(theirs).max()))
    assert not interpret_pallas_call.races.races_found


def test_padding_gives_zeros_and_takes_part_in_nothing():
    q, k, v, cotangent = make_inputs(200, 2, 1, 64, jnp.float32)
    segments = jnp.stack([jnp.zeros(200, jnp.int32), jnp.arange(200) < 4]).astype(jnp.int32)
    operation = functools.partial(attention_part, segment_ids=segments, span=whole(segments), implementation="tpu")
    out, _, *gradients = value_and_gradients(operation, q, k, v, cotangent)
    for array in (out, *gradients):
        assert not np.any(array[0])
        assert not np.any(array[1, 4:])
        assert np.all(np.isfinite(array))
    assert np.any(gradients[1][1, :4])


def test_blocks_that_nobody_sees_are_neither_worked_on_nor_fetched():
    """Of 4 x 4 blocks in a row of two documents, causal order leaves 10, and the documents 6 of those."""
    q, k, v, _ = make_inputs(512, 2, 1, 64, jnp.float32, batch=1)
    segments = jnp.asarray([[1] * 256 + [2] * 256])
    call = tpu._prepare(q, k, v, tpu.Visible(segments))
    for by_keys, fetched in ((False, [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]), (True, [0, 1, 1, 1, 1, 1, 1, 2, 3, 3])):
        pairs = tpu._pairs(call, by_keys)
        assert pairs.kinds.shape == (1, 10)
        assert np.sum(pairs.kinds == tpu._HIDDEN) == 4
        assert np.sum(pairs.kinds == tpu._WHOLLY) == 2
        np.testing.assert_array_equal(pairs.inner[0], fetched)


def test_what_the_kernel_cannot_do_is_refused():
    q, k, v, _ = make_inputs(8, 2, 1, 64, jnp.float16)
    segments = make_segments(8)
    with pytest.raises(ValueError, match=r"dtypes float16.*takes one of bfloat16, float32"):
        attention(q, k, v, segments, implementation="tpu")
    q, k, v, _ = make_inputs(8, 2, 1, 96, jnp.float32)
    with pytest.raises(ValueError, match=r"head size 96.*takes 64 or 128"):
        attention(q, k, v, segments, implementation="tpu")
