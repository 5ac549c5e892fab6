"""The attention kernels, interpreted on CPU, against the float32 reference: values, statistics, every gradient; of
random shapes XLA's too.

What the interpreters cover and what not is said in `interpreters.py`. Both look for races here.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import platforms
from kernels_pallas.attention import attention, attention_part, gpu, tpu, xla
from tests.kernels_pallas.interpreters import interpret


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Give short rows several of them."""
    monkeypatch.setattr(tpu, "_BLOCK", 128)


def make_inputs(length, heads, kv_heads, size, dtype, *, batch, seed=0):
    rng = np.random.default_rng(seed)
    counts = (heads, kv_heads, kv_heads, heads)
    return [jnp.asarray(rng.normal(0, 1.5, (batch, length, n, size)), dtype) for n in counts]


def make_segments(length, *, batch, seed=0):
    """Rows of several documents, in the last of them padding before and between; of more than two one is padding."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.integers(1, 4, length)) for _ in range(batch)]
    rows[-1][: length // 8] = 0
    rows[-1][length // 2 : length // 2 + length // 3] = 0
    if batch > 2:
        rows[0][:] = 0
    return jnp.asarray(np.stack(rows), jnp.int32)


def value_and_gradients(operation, q, k, v, cotangent):
    def loss(q, k, v):
        out, log_sum_exp = operation(q, k, v)
        seen = jnp.where(log_sum_exp > -1e28, log_sum_exp, 0)
        weights = jnp.cos(jnp.arange(seen.size)).reshape(seen.shape)
        return jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32)) + jnp.sum(weights * seen), (out, seen)

    gradients, results = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return jax.block_until_ready((*results, *gradients))


def whole(segments):
    """A span that hides nothing."""
    return jnp.zeros_like(segments), jnp.full_like(segments, segments.shape[1])


def window(segments):
    """The 50 keys before each query; every 7th query counts none."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    return index - 50, jnp.where(index % 7 == 0, 0, index)


CASES = [
    # platform, batch, length, heads, kv_heads, size, dtype, span
    ("tpu", 2, 1, 2, 1, 64, jnp.float32, whole),
    pytest.param("tpu", 1, 128, 2, 2, 128, jnp.float32, whole, marks=pytest.mark.long),
    ("tpu", 1, 300, 4, 2, 64, jnp.float32, window),
    pytest.param("tpu", 2, 401, 4, 1, 128, jnp.bfloat16, whole, marks=pytest.mark.long),
    ("gpu", 1, 1, 2, 1, 64, jnp.bfloat16, whole),
    ("gpu", 1, 200, 2, 1, 64, jnp.bfloat16, window),
    pytest.param("gpu", 1, 257, 3, 1, 128, jnp.bfloat16, whole, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("platform", "batch", "length", "heads", "kv_heads", "size", "dtype", "span"), CASES)
def test_value_and_every_gradient(platform, batch, length, heads, kv_heads, size, dtype, span):
    check(platform, batch, length, heads, kv_heads, size, dtype, span)


def check(platform, batch, length, heads, kv_heads, size, dtype, span, seed=0, pieces=None):
    """`pieces`: of a row, where its queries stand if they are not all of it."""
    q, k, v, cotangent = make_inputs(length, heads, kv_heads, size, dtype, batch=batch, seed=seed)
    segments = make_segments(length, batch=batch, seed=seed)
    bounds, index = span(segments), None
    if pieces is not None:
        q, cotangent, *bounds = (x[:, pieces] for x in (q, cotangent, *bounds))
        index = jnp.broadcast_to(pieces, (batch, len(pieces)))
    inputs = q, k, v, cotangent

    def run(implementation, *inputs):
        return value_and_gradients(
            lambda q, k, v: attention_part(
                q, k, v, segments, tuple(bounds), query_index=index, implementation=implementation
            ),
            *inputs,
        )

    expected = run("reference", *(x.astype(jnp.float32) for x in inputs))
    with interpret(platform) if platform in ("tpu", "gpu") else contextlib.nullcontext():
        results = run(platform, *inputs)
    for mine, theirs in zip(results, expected, strict=True):
        assert np.all(np.isfinite(mine.astype(jnp.float32)))
        # float32 sums in another order; bfloat16 keeps 8 bits of each term, a few times over.
        share = 2e-6 if dtype == jnp.float32 else 0.01
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=share * max(1, np.abs(theirs).max()))


@st.composite
def drawn(draw, longest, dtypes, shortest=1):
    """All that `check` takes but the platform."""
    kv_heads = draw(st.integers(1, 2))
    return {
        "batch": draw(st.integers(1, 3)),
        "length": draw(st.integers(shortest, longest)),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "size": draw(st.sampled_from([64, 128])),
        "dtype": draw(st.sampled_from(dtypes)),
        "span": draw(st.sampled_from([whole, window])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@pytest.mark.long
@settings(max_examples=8, deadline=None, derandomize=True)
@given(drawn(300, [jnp.float32, jnp.bfloat16]))
def test_xla(case):
    check("xla", **case)


_FEW_UNROLLED = 32


@st.composite
def looped(draw):
    """So many queries that XLA loops over their blocks, of a whole row or of two pieces of it, the later one first."""
    case = draw(drawn(300, [jnp.float32, jnp.bfloat16], shortest=_FEW_UNROLLED + 1))
    if draw(st.booleans()):
        begin = draw(st.integers(1, case["length"] - 1))
        case["pieces"] = np.r_[begin : case["length"], : begin // 2]
    return case


@pytest.mark.long
@settings(max_examples=8, deadline=None, derandomize=True)
@given(looped())
def test_xla_in_a_loop(case):
    """Over blocks of 16 to 64 queries, which reach to any of the quarters of the keys."""
    small = {"_UNROLLED": _FEW_UNROLLED, "_SMALL_BLOCK": 16, "_LARGE_BLOCK": 64, "_SCORE_BYTES": 2**16}
    with mock.patch.multiple(xla, **small):
        check("xla", **case)


# The first of them is the smallest that there is: one token.
@pytest.mark.long
@settings(max_examples=3, deadline=None, derandomize=True)
@given(drawn(300, [jnp.float32, jnp.bfloat16]))
def test_tpu(case):
    check("tpu", **case)


@pytest.mark.long
@settings(max_examples=3, deadline=None, derandomize=True)
@given(drawn(200, [jnp.bfloat16]))
def test_gpu(case):
    check("gpu", **case)


@pytest.mark.parametrize(("platform", "dtype"), [("tpu", jnp.float32), ("gpu", jnp.bfloat16)])
def test_some_queries_of_a_row(platform, dtype):
    """Two pieces of a row of several documents, the later one first, over all of its keys."""

    def span(segments):
        index = jnp.broadcast_to(jnp.arange(260), segments.shape)
        return index - 90, index + 1

    check(platform, 1, 260, 2, 1, 64, dtype, span, pieces=np.r_[190:260, 40:110])


@pytest.mark.parametrize(
    ("platform", "dtype"),
    [("tpu", jnp.float32), pytest.param("gpu", jnp.bfloat16, marks=pytest.mark.long)],
)
def test_padding_gives_zeros_and_takes_part_in_nothing(platform, dtype):
    q, k, v, cotangent = make_inputs(200, 2, 1, 64, dtype, batch=2)
    segments = jnp.stack([jnp.zeros(200, jnp.int32), jnp.arange(200) < 4]).astype(jnp.int32)
    operation = functools.partial(attention_part, segment_ids=segments, span=whole(segments), implementation=platform)
    with interpret(platform):
        out, _, *gradients = value_and_gradients(operation, q, k, v, cotangent)
    for array in (out, *gradients):
        assert not np.any(array[0])
        assert not np.any(array[1, 4:])
        assert np.all(np.isfinite(array))
    assert np.any(gradients[1][1, :4])


def test_blocks_that_nobody_sees_are_neither_worked_on_nor_fetched():
    """Of 4 x 4 blocks in a row of two documents, causal order leaves 10, and the documents 6 of those."""
    q, k, v, _ = make_inputs(512, 2, 1, 64, jnp.float32, batch=1)
    visible = tpu.Visible(jnp.asarray([[1] * 256 + [2] * 256]))
    call = tpu._prepare(q, k, v, visible)
    for by_keys, fetched in ((False, [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]), (True, [0, 1, 1, 1, 1, 1, 1, 2, 3, 3])):
        pairs = tpu._pairs(call, by_keys)
        assert pairs.kinds.shape == (1, 10)
        assert np.sum(pairs.kinds == tpu._HIDDEN) == 4
        assert np.sum(pairs.kinds == tpu._WHOLLY) == 2
        np.testing.assert_array_equal(pairs.inner[0], fetched)
    ranges = gpu._ranges(gpu._prepare(q, k, v, visible), 128, by_keys=False)
    # Blocks of 64 queries: begin, end, and the run without a mask.
    np.testing.assert_array_equal(ranges[0, :4], [[0, 1, 1, 1], [0, 1, 1, 1], [0, 2, 0, 1], [0, 2, 0, 1]])
    np.testing.assert_array_equal(ranges[0, 4:], ranges[0, :4] + 2)
    ranges = gpu._ranges(gpu._prepare(q, k, v, visible), 128, by_keys=True)
    np.testing.assert_array_equal(ranges[0], [[0, 4, 2, 4], [2, 4, 4, 4], [4, 8, 6, 8], [6, 8, 8, 8]])


def test_what_a_kernel_cannot_do_is_refused(monkeypatch):
    q, k, v, _ = make_inputs(8, 2, 1, 64, jnp.float32, batch=1)
    segments = make_segments(8, batch=1)
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    with pytest.raises(ValueError, match=r"dtypes float32.*'gpu' of attention takes one of bfloat16"):
        attention(q, k, v, segments, implementation="gpu")
    q, k, v, _ = make_inputs(8, 2, 1, 96, jnp.float32, batch=1)
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    with pytest.raises(ValueError, match=r"head size 96.*'tpu' of attention takes 64 or 128"):
        attention(q, k, v, segments, implementation="tpu")
