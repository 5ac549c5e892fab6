"""Every implementation of paged attention against the float32 reference over the same tokens laid side by side.

What the kernels' interpreters cover and what not is said in `interpreters.py`. Both look for races here.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import attention, platforms
from kernels_pallas.paged_attention import gpu, paged_attention, tpu, xla
from tests.kernels_pallas.interpreters import interpret

PAGES, TABLE = 40, 5


def make_inputs(lengths, new, heads, kv_heads, size, dtype, *, places=16, seed=0):
    """Rows with pages of their own in random order; entries behind a row's last page point nowhere."""
    rng = np.random.default_rng(seed)
    order = iter(rng.permutation(PAGES))
    table = np.full((len(lengths), TABLE), 10**6, np.int32)
    for row, length in zip(table, lengths, strict=True):
        row[: -(-length // places)] = [next(order) for _ in range(-(-length // places))]
    pages = [jnp.asarray(rng.normal(0, 1.5, (PAGES, kv_heads, places, size)), dtype) for _ in range(2)]
    q = jnp.asarray(rng.normal(0, 1.5, (len(lengths), new, heads, size)), dtype)
    return q, *pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)


def run(implementation, inputs):
    with interpret(implementation) if implementation in ("tpu", "gpu") else contextlib.nullcontext():
        operation = jax.jit(lambda *inputs: paged_attention(*inputs, implementation=implementation))
        return jax.block_until_ready(operation(*inputs))


CASES = [
    # implementations, lengths, new, heads, kv_heads, size, dtype
    ("xla tpu", [1, 0, 80, 33], 1, 4, 2, 128, jnp.float32),
    ("xla tpu", [0, 17, 48], 3, 2, 2, 128, jnp.float32),
    ("xla tpu gpu", [2, 80, 0, 0], 4, 8, 1, 128, jnp.bfloat16),
    ("gpu", [80, 33, 5], 1, 2, 2, 64, jnp.bfloat16),
    ("gpu", [0, 80], 9, 8, 1, 64, jnp.bfloat16),
]
CASES = [(name, *case) for names, *case in CASES for name in names.split()]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two pages a block: rows of several blocks, and blocks that end before their last page."""
    for module in (xla, tpu, gpu):
        monkeypatch.setattr(module, "_BLOCK_TOKENS", 32)


@pytest.mark.parametrize(("implementation", "lengths", "new", "heads", "kv_heads", "size", "dtype"), CASES)
def test_every_row_and_query(implementation, lengths, new, heads, kv_heads, size, dtype):
    check(implementation, lengths, new, heads, kv_heads, size, dtype)


def check(implementation, lengths, new, heads, kv_heads, size, dtype, seed=0):
    inputs = make_inputs(lengths, new, heads, kv_heads, size, dtype, seed=seed)
    exact = [x.astype(jnp.float32) for x in inputs[:3]]
    expected = run("reference", (*exact, *inputs[3:]))
    # Two thread blocks share a row.
    with mock.patch.object(gpu, "_THREAD_BLOCKS", 2 * len(lengths) * kv_heads):
        out = run(implementation, inputs)
    assert out.dtype == dtype
    # float32 sums in another order; bfloat16 keeps 8 bits of each weight and of the result.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=1e-5 if dtype == jnp.float32 else 0.03)
    for row, length in enumerate(lengths):
        unseeing = max(0, new - length)
        assert not np.any(out[row, :unseeing])
        assert np.all(np.any(out[row, unseeing:] != 0, axis=-1))


@st.composite
def drawn(draw, dtypes, sizes):
    """All that `check` takes but the implementation."""
    kv_heads = draw(st.integers(1, 2))
    return {
        "lengths": draw(st.lists(st.integers(0, 16 * TABLE), min_size=1, max_size=4)),
        "new": draw(st.integers(1, 5)),
        "heads": kv_heads * draw(st.integers(1, 4)),
        "kv_heads": kv_heads,
        "size": draw(st.sampled_from(sizes)),
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@pytest.mark.long
@settings(max_examples=10, deadline=None, derandomize=True)
@given(drawn([jnp.float32, jnp.bfloat16], [8, 128]))
def test_xla(case):
    check("xla", **case)


@pytest.mark.long
@settings(max_examples=3, deadline=None, derandomize=True)
@given(drawn([jnp.float32, jnp.bfloat16], [128]))
def test_tpu(case):
    check("tpu", **case)


@pytest.mark.long
@settings(max_examples=3, deadline=None, derandomize=True)
@given(drawn([jnp.bfloat16], [64, 128]))
def test_gpu(case):
    check("gpu", **case)


def test_the_reference_is_attention_over_the_same_tokens():
    """New tokens one after another in causal order, held against the operation that trains."""
    length, new = 48, 3
    q, k_pages, v_pages, table, lengths = make_inputs([length], new, 4, 2, 8, jnp.float32)
    k, v = (x[table[:, : length // 16]].swapaxes(2, 3).reshape(1, length, 2, 8) for x in (k_pages, v_pages))
    before = jnp.zeros((1, length - new, 4, 8))
    whole = attention.attention(jnp.concatenate([before, q], axis=1), k, v, jnp.ones((1, length), jnp.int32))
    out = paged_attention(q, k_pages, v_pages, table, lengths, implementation="reference")
    # float32 sums in another order.
    np.testing.assert_allclose(out, whole[:, -new:], atol=1e-5)


def test_a_row_reads_only_its_own_tokens():
    q, k_pages, v_pages, table, lengths = make_inputs([20, 33], 2, 4, 2, 8, jnp.float32)
    mine = np.zeros((PAGES, 16), bool)
    for row, length in zip(np.asarray(table), np.asarray(lengths), strict=True):
        mine[row[: length // 16]] = True
        mine[row[length // 16], : length % 16] = True
    others = ~mine[:, None, :, None]
    out = paged_attention(q, k_pages, v_pages, table, lengths)
    np.testing.assert_array_equal(paged_attention(q, k_pages + others, v_pages + others, table, lengths), out)
    assert np.any(paged_attention(q, k_pages, v_pages + ~others, table, lengths) != out)


def test_wrong_arguments_are_named(monkeypatch):
    q, k_pages, v_pages, table, lengths = make_inputs([20, 33], 2, 4, 2, 8, jnp.float32)
    with pytest.raises(ValueError, match=r"must be .*P,K,s,H"):
        paged_attention(q, k_pages, v_pages[:, :1], table, lengths)
    with pytest.raises(ValueError, match="q has 3 heads"):
        paged_attention(q[:, :, :3], k_pages, v_pages, table, lengths)
    with pytest.raises(ValueError, match="page_table"):
        paged_attention(q, k_pages, v_pages, table, lengths[:1])
    with pytest.raises(ValueError, match="lengths has dtype float32; pass integers"):
        paged_attention(q, k_pages, v_pages, table, lengths.astype(jnp.float32))
    with pytest.raises(ValueError, match="needs TPU, this platform is cpu"):
        paged_attention(q, k_pages, v_pages, table, lengths, implementation="tpu")
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    with pytest.raises(ValueError, match=r"head size 8.*'tpu' of paged_attention takes 128; use 'xla'"):
        paged_attention(q, k_pages, v_pages, table, lengths, implementation="tpu")
    inputs = make_inputs([20], 1, 4, 2, 128, jnp.float32, places=24)
    with pytest.raises(ValueError, match=r"page size 24.*one of 16, 32, .*512; use"):
        paged_attention(*inputs, implementation="tpu")
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    inputs = make_inputs([20], 1, 4, 2, 128, jnp.bfloat16, places=128)
    with pytest.raises(ValueError, match=r"page size 128.*one of 16, 32, 64; use"):
        paged_attention(*inputs, implementation="gpu")
    inputs = make_inputs([20], 9, 16, 1, 128, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"9 new tokens of 16 heads .*'gpu' of paged_attention takes up to 128"):
        paged_attention(*inputs, implementation="gpu")
