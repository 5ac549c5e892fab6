"""Grouped products for XLA, the default on CPU: blocks of rows of one group each, one matrix product after another.

Each group's rows are padded to a multiple of the block, so that a block has one matrix and shapes are static: at most
ceil(M / block) + E blocks, whatever the sizes. That keeps the work near M rows, where a dense expansion does M·E. Rows
that come aligned are taken as they lie. Matrices are read where they are; one batched product over the blocks would
copy one for each, which on CPU takes up to nine times as long.

On TPU XLA has a grouped product of its own, `jax.lax.ragged_dot`, which does the work of M rows. Its sums over rows do
that of M·E (jax 0.10, counted by the compiler), as all of it does on GPU: there the blocks remain.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.layout import Layout
from kernels_pallas.platforms import platform


def products(
    rows: tuple[Float[Array, "M _"], ...],
    weights: tuple[Float[Array, "E D F"], ...],
    sizes: Int[Array, "E"],
    combine: Callable[..., tuple[Array, ...]],
    *,
    transposed: bool,
    alignment: int,
) -> tuple[Float[Array, "M _"], ...]:
    """combine(rows·weight for every weight), in the dtype of the rows; a single array of rows meets all weights."""
    if platform() == "tpu":
        return _products_by_xla(rows, weights, sizes, combine, transposed)
    layout = _layout(rows[0].shape[0], sizes, alignment)
    blocks = [layout.into_blocks(x) for x in rows]

    def block(index: Array | int) -> tuple[Array, ...]:
        group = layout.group[index]
        inputs = [x[index] for x in blocks] * (len(weights) // len(rows))
        accumulated = (
            _dot(x, weight[group], (1, 1) if transposed else (1, 0)) for x, weight in zip(inputs, weights, strict=True)
        )
        return tuple(out.astype(rows[0].dtype) for out in combine(*accumulated))

    def step(index: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(out.at[index].set(part) for out, part in zip(outs, block(index), strict=True))

    empty = tuple(jnp.zeros((len(layout.group), *out.shape), out.dtype) for out in jax.eval_shape(block, 0))
    return tuple(layout.out_of_blocks(out) for out in jax.lax.fori_loop(0, layout.used, step, empty))


def _products_by_xla(
    rows: tuple[Array, ...],
    weights: tuple[Array, ...],
    sizes: Array,
    combine: Callable[..., tuple[Array, ...]],
    transposed: bool,
) -> tuple[Array, ...]:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    accumulated = (
        jax.lax.ragged_dot_general(x, weight, sizes, numbers, preferred_element_type=jnp.float32)
        for x, weight in zip(rows * (len(weights) // len(rows)), weights, strict=True)
    )
    # What XLA writes behind the last group is not said.
    real = (jnp.arange(rows[0].shape[0]) < jnp.sum(sizes))[:, None]
    return tuple(jnp.where(real, out, 0).astype(rows[0].dtype) for out in combine(*accumulated))


def outer_products(
    x: Float[Array, "M D"], cotangents: tuple[Float[Array, "M F"], ...], sizes: Int[Array, "E"], *, alignment: int
) -> tuple[Float[Array, "E D F"], ...]:
    """Σ x ⊗ cotangent over the rows of each group, for every array of cotangents, in float32."""
    layout = _layout(x.shape[0], sizes, alignment)
    left, *right = (layout.into_blocks(array) for array in (x, *cotangents))

    def step(index: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        group = layout.group[index]
        return tuple(
            total.at[group].add(_dot(left[index], arriving[index], (0, 0)))
            for total, arriving in zip(sums, right, strict=True)
        )

    shape = (sizes.shape[0], x.shape[1], cotangents[0].shape[1])
    empty = tuple(jnp.zeros(shape, jnp.promote_types(x.dtype, jnp.float32)) for _ in cotangents)
    return jax.lax.fori_loop(0, layout.used, step, empty)


def preferred_alignment(rows: int, groups: int) -> int:
    """Blocks, where `products` takes them."""
    return 1 if platform() == "tpu" else block_rows(rows, groups)


def block_rows(rows: int, groups: int) -> int:
    """A power of two near half a group's fair share: little padding, yet rows enough for a matrix product."""
    share = max(1, rows // (2 * groups))
    return min(128, max(8, 1 << (share.bit_length() - 1)))


def _layout(rows: int, sizes: Int[Array, "E"], alignment: int) -> Layout:
    if alignment > 1:
        return Layout.of(rows, sizes, alignment, aligned=True)
    return Layout.of(rows, sizes, block_rows(rows, sizes.shape[0]), aligned=False)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulator)
