"""Grouped products: XLA, and the kernels interpreted on CPU, against the float32 reference; values, every gradient.

What the interpreters cover and what not is said in `interpreters.py`. They look for races here.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import platforms
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu, preferred_alignment, tpu, xla
from tests.kernels_pallas.interpreters import interpret

KERNELS = ("tpu", "gpu")
WIDTHS = [(8, 130), (70, 20), (257, 128)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Give small operands several of them."""
    monkeypatch.setattr(tpu, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(tpu, "_SUM_ROWS", 128)
    monkeypatch.setattr(tpu, "_MATRIX_BYTES", 0)
    monkeypatch.setattr(tpu, "_SUM_BYTES", 0)


def make_inputs(rows, width, inner, groups, dtype):
    """x, gate, up, and cotangents of both operations."""
    rng = np.random.default_rng(0)
    matrices = [rng.normal(0, width**-0.5, (groups, width, inner)) for _ in range(2)]
    arrays = [rng.normal(size=(rows, width)), *matrices, *(rng.normal(size=(rows, inner)) for _ in range(2))]
    return [jnp.asarray(array, dtype) for array in arrays]


def values_and_gradients(implementation, inputs, sizes, alignment=1):
    """Of both operations: their values, and the gradients by x and both matrices."""

    def loss(x, gate, up, sizes, *cotangents):
        options = {"alignment": alignment, "implementation": implementation}
        outs = grouped_matmul(x, up, sizes, **options), grouped_swiglu(x, gate, up, sizes, **options)
        terms = (jnp.vdot(*(x.astype(jnp.float32) for x in pair)) for pair in zip(outs, cotangents, strict=True))
        return sum(terms), outs

    gradients, outs = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
        *inputs[:3], jnp.asarray(sizes, jnp.int32), *inputs[3:]
    )
    return jax.block_until_ready((*outs, *gradients))


def check(implementation, inputs, sizes, alignment=1):
    expected = values_and_gradients("reference", [array.astype(jnp.float32) for array in inputs], sizes)
    with interpret(implementation) if implementation in KERNELS else contextlib.nullcontext():
        results = values_and_gradients(implementation, inputs, sizes, alignment)
    for mine, theirs in zip(results, expected, strict=True):
        assert mine.dtype == inputs[0].dtype
        # float32 sums in another order; bfloat16 keeps 8 bits of each term, a few times over.
        share = 2e-6 if inputs[0].dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=share * max(1, np.abs(theirs).max()))
    return results


@st.composite
def cases(draw, widths, dtypes):
    """Rows cut into groups anywhere, many of them empty."""
    rows = draw(st.sampled_from([1, 7, 64, 129, 200]))
    groups = draw(st.integers(1, 6))
    cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=groups - 1, max_size=groups - 1)))
    sizes = np.diff([0, *cuts, rows])
    width, inner = draw(st.sampled_from(widths))
    return sizes, make_inputs(rows, width, inner, groups, draw(st.sampled_from(dtypes)))


@pytest.mark.long
@settings(max_examples=7, deadline=None, derandomize=True)
@given(cases(WIDTHS, [jnp.float32, jnp.bfloat16]))
def test_xla(case):
    sizes, inputs = case
    check("xla", inputs, sizes)


@pytest.mark.long
@settings(max_examples=3, deadline=None, derandomize=True)
@given(cases(WIDTHS, [jnp.float32, jnp.bfloat16]))
def test_tpu(case):
    sizes, inputs = case
    check("tpu", inputs, sizes)


@pytest.mark.long
@settings(max_examples=2, deadline=None, derandomize=True)
@given(cases([(64, 64), (128, 192)], [jnp.bfloat16]))
def test_gpu_on_random_groups(case):
    sizes, inputs = case
    check("gpu", inputs, sizes)


@pytest.mark.parametrize(
    ("sizes", "rows", "width", "inner", "alignment"),
    [
        pytest.param([0, 70, 0, 33], 200, 128, 64, 1, id="shared_blocks"),
        pytest.param([128, 0, 128], 384, 64, 192, 128, id="aligned", marks=pytest.mark.long),
    ],
)
def test_gpu(sizes, rows, width, inner, alignment):
    inputs = make_inputs(rows, width, inner, len(sizes), jnp.bfloat16)
    out, activated, to_x, *matrices = check("gpu", inputs, sizes, alignment)
    for array in (out, activated, to_x):
        assert not np.any(array[sum(sizes) :])
    for gradient in matrices:
        np.testing.assert_array_equal(np.any(gradient, axis=(1, 2)), np.asarray(sizes) > 0)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_groups_that_share_blocks_and_empty_ones_at_both_ends(implementation):
    inputs = make_inputs(200, 24, 40, 8, jnp.float32)
    _, _, _, *matrices = check(implementation, inputs, [0, 3, 0, 61, 1, 99, 36, 0])
    for gradient in matrices:
        assert not np.any(gradient[jnp.array([0, 2, 7])])
        assert np.all(np.any(gradient[jnp.array([1, 3, 4, 5, 6])], axis=(1, 2)))


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("sizes", [[70, 0, 33], [0, 0, 0]])
def test_rows_behind_the_last_group_are_zeros_and_take_part_in_nothing(implementation, sizes):
    inputs = make_inputs(200, 24, 40, 3, jnp.float32)
    behind = sum(sizes)
    inputs[0] = inputs[0].at[behind:].set(1e30)
    out, activated, to_x, *_ = check(implementation, inputs, sizes)
    for array in (out, activated, to_x):
        assert not np.any(array[behind:])


def test_the_grouped_product_that_xla_has_on_tpu(monkeypatch):
    monkeypatch.setattr(xla, "platform", lambda: "tpu")
    assert preferred_alignment(160, 5) == 1
    inputs = make_inputs(100, 24, 40, 5, jnp.float32)
    out, *_ = check("xla", inputs, [16, 0, 41, 9, 0])
    assert not np.any(out[66:])


@pytest.mark.parametrize("behind", [0, 32])
def test_aligned_rows_are_taken_as_they_lie(behind):
    alignment = preferred_alignment(160 + behind, 5)
    assert alignment == 16
    check("xla", make_inputs(160 + behind, 24, 40, 5, jnp.float32), [16, 0, 96, 48, 0], alignment)


def test_what_a_caller_can_get_wrong_is_named():
    x, gate, up, *_ = make_inputs(12, 4, 6, 3, jnp.float32)
    sizes = jnp.array([4, 0, 8])
    for wrong in ([4, 0, 7], [4, -1, 9]):
        with pytest.raises(ValueError, match=r"group_sizes sum to .* they must be 0 or more and sum to the 12 rows"):
            grouped_matmul(x, up, jnp.array(wrong))
    with pytest.raises(ValueError, match=r"group_sizes \[4, 0, 8\] are not all multiples of alignment 3"):
        grouped_matmul(x, up, sizes, alignment=3)
    with pytest.raises(ValueError, match="alignment 5 must be at least 1 and divide the 12 rows"):
        grouped_matmul(x, up, sizes, alignment=5)
    with pytest.raises(ValueError, match=r"group_sizes is int32\[2\]; it must be integers \[3\]"):
        grouped_matmul(x, up, sizes[1:])
    with pytest.raises(ValueError, match=r"x \(12, 3\) and weight \(3, 4, 6\) must be"):
        grouped_matmul(x[:, 1:], up, sizes)
    with pytest.raises(ValueError, match=r"x \(12, 4\) and up \(3, 4, 5\) must be"):
        grouped_swiglu(x, gate, up[:, :, 1:], sizes)
    with pytest.raises(ValueError, match="x has no rows"):
        grouped_matmul(x[:0], up, jnp.zeros(3, int))
    with pytest.raises(ValueError, match="'triton' of grouped_matmul is unknown; use one of xla, reference, tpu, gpu"):
        grouped_matmul(x, up, sizes, implementation="triton")
    with pytest.raises(ValueError, match="'tpu' of grouped_matmul needs TPU, this platform is cpu"):
        grouped_matmul(x, up, sizes, implementation="tpu")


def test_what_a_kernel_does_not_take_is_refused(monkeypatch):
    x, _, up, *_ = make_inputs(12, 4, 6, 3, jnp.float32)
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    narrow = x.astype(jnp.bfloat16), up.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="D 4 and F 6: implementation 'gpu' of grouped_matmul takes multiples of 64"):
        grouped_matmul(*narrow, jnp.array([4, 0, 8]), implementation="gpu")
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    with pytest.raises(ValueError, match=r"dtypes bfloat16, float32; implementation 'tpu' of grouped_matmul takes one"):
        grouped_matmul(x.astype(jnp.bfloat16), up, jnp.array([4, 0, 8]), implementation="tpu")


def test_kernels_fetch_no_matrix_for_empty_groups_and_visit_every_group_that_needs_a_sum():
    sizes = jnp.array([0, 3, 0, 61, 1, 99, 36, 0])
    visits = tpu._visits(sizes, 200, 64, visit_empty=False)
    assert visits.number[0] == 7
    np.testing.assert_array_equal(visits.group[:7], [1, 3, 4, 5, 5, 6, 6])
    np.testing.assert_array_equal(visits.block[:7], [0, 0, 1, 1, 2, 2, 3])
    # What lies behind repeats the last visit.
    np.testing.assert_array_equal(visits.group[7:], 6)
    np.testing.assert_array_equal(visits.block[7:], 3)
    visits = tpu._visits(sizes, 200, 64, visit_empty=True)
    np.testing.assert_array_equal(visits.group[: int(visits.number[0])], [0, 1, 2, 3, 4, 5, 5, 6, 6, 7])
