"""Every implementation of paged attention against the float32 reference over the same tokens laid side by side.

The TPU kernel is interpreted on CPU with races looked for; the interpreter knows neither register tiling nor the size
of fast memory.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the races have no public door
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import attention, platforms
from kernels_pallas.paged_attention import paged_attention, tpu, xla

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


@contextlib.contextmanager
def interpreted_tpu(monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


def run(implementation, inputs, monkeypatch):
    with interpreted_tpu(monkeypatch) if implementation == "tpu" else contextlib.nullcontext():
        return jax.jit(lambda *inputs: paged_attention(*inputs, implementation=implementation))(*inputs)


CASES = [
    # lengths, new, heads, kv_heads, size, dtype
    ([1, 0, 80, 33], 1, 4, 2, 64, jnp.float32),
    ([0, 17, 48], 3, 2, 2, 128, jnp.float32),
    ([2, 80, 0, 0], 4, 8, 1, 128, jnp.bfloat16),
]


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize(("lengths", "new", "heads", "kv_heads", "size", "dtype"), CASES)
def test_every_row_and_query(implementation, lengths, new, heads, kv_heads, size, dtype, monkeypatch):
    # Two pages a block: rows of several blocks, and blocks that end before their last page.
    monkeypatch.setattr({"xla": xla, "tpu": tpu}[implementation], "_BLOCK_TOKENS", 32)
    inputs = make_inputs(lengths, new, heads, kv_heads, size, dtype)
    exact = [x.astype(jnp.float32) for x in inputs[:3]]
    expected = paged_attention(*exact, *inputs[3:], implementation="reference")
    out = run(implementation, inputs, monkeypatch)
    assert out.dtype == dtype
    # float32 sums in another order; bfloat16 keeps 8 bits of each weight and of the result.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=1e-5 if dtype == jnp.float32 else 0.03)
    for row, length in enumerate(lengths):
        unseeing = max(0, new - length)
        assert not np.any(out[row, :unseeing])
        assert np.all(np.any(out[row, unseeing:] != 0, axis=-1))
    if implementation == "tpu":
        assert not interpret_pallas_call.races.races_found


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
    with pytest.raises(ValueError, match="needs TPU, this platform is cpu"):
        paged_attention(q, k_pages, v_pages, table, lengths, implementation="tpu")
    with interpreted_tpu(monkeypatch):
        with pytest.raises(ValueError, match=r"head size 8.*64 or 128"):
            paged_attention(q, k_pages, v_pages, table, lengths, implementation="tpu")
        inputs = make_inputs([20], 1, 4, 2, 64, jnp.float32, places=24)
        with pytest.raises(ValueError, match=r"page size 24.*multiples of 16"):
            paged_attention(*inputs, implementation="tpu")
