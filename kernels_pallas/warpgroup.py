"""What a Hopper warpgroup does in Mosaic GPU: products of tiles in shared memory, and arrays in its registers.

All that depends on register layouts and on the matrix unit is here, so that kernels read as arithmetic, and so that
tests can put plain arithmetic in its place where an interpreter has neither.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

ROWS = 64  # of a product


def tiles(count: int, rows: int, columns: int, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """Shared memory for matrices that products or wide copies read."""
    across = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, across)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, columns), dtype, transforms=transforms)


def product_transposed(a: Any, b: Any) -> Array:
    """a·bᵀ of two tiles, in float32."""

    def multiply(acc: Any) -> Array:
        plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def add_product(acc: Array, a: Array, b: Any) -> Array:
    """acc + a·b of an array in registers and a tile."""

    def multiply(ref: Any) -> None:
        plgpu.wgmma(ref, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def add_product_of_tiles(acc: Array, a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False) -> Array:
    """acc + a·b of two tiles, either of them transposed."""

    def multiply(ref: Any) -> None:
        left = plgpu.transpose_ref(a, (1, 0)) if transpose_a else a
        plgpu.wgmma(ref, left, plgpu.transpose_ref(b, (1, 0)) if transpose_b else b)

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def full(value: float, shape: tuple[int, ...]) -> Array:
    """A constant like a product, or like one number for each of its rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def load(source: Any, index: tuple[Any, ...], axis: int) -> Array:
    """A vector from any memory with one number for each row (axis 0) or column (1) of a product."""
    return plgpu.load(source, index, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def load_matrix(source: Any, index: tuple[Any, ...]) -> Array:
    """A matrix from any memory, like a product."""
    return plgpu.load(source, index, layout=plgpu.Layout.WGMMA, optimized=False)


def index_along(shape: tuple[int, ...], axis: int) -> Array:
    """The row or column of each number of a product."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def spread(vector: Array, shape: tuple[int, ...], axis: int) -> Array:
    """One number for each row (axis 0) or column (1), repeated along the other axis."""
    return jax.lax.broadcast_in_dim(vector, shape, [axis])
