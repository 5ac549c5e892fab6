"""Grouped products in Mosaic GPU for Hopper: tiles of rows of one group each, as warpgroups with a job each.

Rows stand in blocks of one group, padded with zeros, so that a tile needs no mask and a thread block is that of a dense
product with a matrix of its own. Two warpgroups compute, 64 rows each, on what a third fetches ahead.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas import warpgroup
from kernels_pallas.grouped_matmul.layout import Layout

DTYPES = ("bfloat16",)
MULTIPLE = 64  # of D and F: what a product sums at a time
_WORKERS = 2
_BLOCK_ROWS = _WORKERS * warpgroup.ROWS
_STAGES = 3  # steps that are in shared memory at a time


def products(
    rows: tuple[Float[Array, "M _"], ...],
    weights: tuple[Float[Array, "E D F"], ...],
    sizes: Int[Array, "E"],
    combine: Callable[..., tuple[Array, ...]],
    *,
    transposed: bool,
    alignment: int,
) -> tuple[Float[Array, "M _"], ...]:
    """As `xla.products`."""
    layout = Layout.of(rows[0].shape[0], sizes, _BLOCK_ROWS, aligned=alignment % _BLOCK_ROWS == 0)
    blocks = [layout.into_blocks(x).reshape(-1, x.shape[1]) for x in rows]
    columns = weights[0].shape[1 if transposed else 2]
    wide = _tile_columns(columns)
    number, results = (
        len(weights),
        len(jax.eval_shape(combine, *[jax.ShapeDtypeStruct((), jnp.float32)] * len(weights))),
    )
    matrix = (wide, MULTIPLE) if transposed else (MULTIPLE, wide)
    outs = plgpu.kernel(
        functools.partial(_products_kernel, arrays=len(rows), combine=combine, transposed=transposed),
        out_type=[jax.ShapeDtypeStruct((blocks[0].shape[0], columns), rows[0].dtype)] * results,
        scratch_types={
            "row_tiles": warpgroup.tiles(_STAGES * _WORKERS * len(rows), warpgroup.ROWS, MULTIPLE),
            "matrix_tiles": warpgroup.tiles(_STAGES * number, *matrix),
            "out_tiles": warpgroup.tiles(_WORKERS, warpgroup.ROWS, wide),
            "ready": plgpu.Barrier(num_arrivals=_WORKERS * len(rows) + number, num_barriers=_STAGES),
            "free": plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_STAGES),
        },
        grid=(columns // wide, len(layout.group)),
        grid_names=("column", "block"),
        num_threads=_WORKERS + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layout.group.astype(jnp.int32), layout.used[None].astype(jnp.int32), *blocks, *weights)
    return tuple(layout.out_of_blocks(out) for out in outs)


def outer_products(
    x: Float[Array, "M D"], cotangents: tuple[Float[Array, "M F"], ...], sizes: Int[Array, "E"], *, alignment: int
) -> tuple[Float[Array, "E D F"], ...]:
    """As `xla.outer_products`, but in the dtype of x."""
    layout = Layout.of(x.shape[0], sizes, _BLOCK_ROWS, aligned=alignment % _BLOCK_ROWS == 0)
    left, *right = (layout.into_blocks(array).reshape(-1, array.shape[1]) for array in (x, *cotangents))
    height, width, number = x.shape[1], cotangents[0].shape[1], len(cotangents)
    wide, tall = _tile_columns(width), _WORKERS * warpgroup.ROWS if height % (_WORKERS * warpgroup.ROWS) == 0 else 64
    steps = -(-sizes // _BLOCK_ROWS) * (_BLOCK_ROWS // MULTIPLE)
    ends = jnp.cumsum(steps)
    workers = tall // warpgroup.ROWS
    outs = plgpu.kernel(
        functools.partial(_outer_products_kernel, workers=workers),
        out_type=[jax.ShapeDtypeStruct((sizes.shape[0], height, width), x.dtype)] * number,
        scratch_types={
            "left_tiles": warpgroup.tiles(_STAGES * workers, MULTIPLE, warpgroup.ROWS),
            "right_tiles": warpgroup.tiles(_STAGES * number, MULTIPLE, wide),
            "out_tiles": warpgroup.tiles(workers, warpgroup.ROWS, wide),
            "ready": plgpu.Barrier(num_arrivals=workers + number, num_barriers=_STAGES),
            "free": plgpu.Barrier(num_arrivals=workers, num_barriers=_STAGES),
        },
        grid=(width // wide, height // tall, sizes.shape[0]),
        grid_names=("column", "row", "group"),
        num_threads=workers + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )((ends - steps).astype(jnp.int32), ends.astype(jnp.int32), left, *right)
    return tuple(outs)


def preferred_alignment(rows: int, groups: int) -> int:
    del rows, groups
    return _BLOCK_ROWS


def _products_kernel(
    group, used, *refs, row_tiles, matrix_tiles, out_tiles, ready, free, arrays, combine, transposed
):  # fmt: skip
    number = matrix_tiles.shape[0] // _STAGES
    rows, matrices, outs = refs[:arrays], refs[arrays : arrays + number], refs[arrays + number :]
    column, block, worker = (jax.lax.axis_index(name) for name in ("column", "block", "worker"))
    wide = out_tiles.shape[2]
    # What is behind the last group sums nothing and stores zeros.
    steps = jnp.where(block < used[0], rows[0].shape[1] // MULTIPLE, 0)
    columns = pl.ds(column * wide, wide)

    @pl.when(worker < _WORKERS)
    def compute():
        plgpu.set_max_registers(232, action="increase")

        def step(index, sums):
            slot = jax.lax.rem(index, _STAGES)
            plgpu.barrier_wait(ready.at[slot])
            for i in range(number):
                own = row_tiles.at[(slot * arrays + i % arrays) * _WORKERS + worker]
                matrix = matrix_tiles.at[slot * number + i]
                total = warpgroup.add_product_of_tiles(sums[i], own, matrix, transpose_b=transposed)
                sums = (*sums[:i], total, *sums[i + 1 :])
            plgpu.barrier_arrive(free.at[slot])
            return sums

        zero = warpgroup.full(0, (warpgroup.ROWS, wide))
        results = combine(*jax.lax.fori_loop(0, steps, step, (zero,) * number))
        target = pl.ds(block * _BLOCK_ROWS + worker * warpgroup.ROWS, warpgroup.ROWS)
        for out, result in zip(outs, results, strict=True):
            _store(result, out_tiles.at[worker], out.at[target, columns])

    @pl.when(worker == _WORKERS)
    def fetch():
        plgpu.set_max_registers(40, action="decrease")
        matrix = group[block]

        @_each_step(steps, free)
        def _(index, slot):
            inner = pl.ds(index * MULTIPLE, MULTIPLE)
            for i, (array, half) in enumerate((a, w) for a in rows for w in range(_WORKERS)):
                source = array.at[pl.ds(block * _BLOCK_ROWS + half * warpgroup.ROWS, warpgroup.ROWS), inner]
                plgpu.copy_gmem_to_smem(source, row_tiles.at[slot * arrays * _WORKERS + i], ready.at[slot])
            for i, weight in enumerate(matrices):
                source = weight.at[matrix, columns, inner] if transposed else weight.at[matrix, inner, columns]
                plgpu.copy_gmem_to_smem(source, matrix_tiles.at[slot * number + i], ready.at[slot])


def _outer_products_kernel(
    begins, ends, left, *refs, left_tiles, right_tiles, out_tiles, ready, free, workers
):  # fmt: skip
    number = len(refs) // 2
    right, outs = refs[:number], refs[number:]
    column, row, group, worker = (jax.lax.axis_index(name) for name in ("column", "row", "group", "worker"))
    wide = out_tiles.shape[2]
    first, steps = begins[group], ends[group] - begins[group]
    columns = pl.ds(column * wide, wide)

    def own_columns(which: Any) -> Any:
        return pl.ds((row * workers + which) * warpgroup.ROWS, warpgroup.ROWS)

    @pl.when(worker < workers)
    def compute():
        plgpu.set_max_registers(232, action="increase")

        def step(index, sums):
            slot = jax.lax.rem(index, _STAGES)
            plgpu.barrier_wait(ready.at[slot])
            own = left_tiles.at[slot * workers + worker]
            sums = tuple(
                warpgroup.add_product_of_tiles(total, own, right_tiles.at[slot * number + i], transpose_a=True)
                for i, total in enumerate(sums)
            )
            plgpu.barrier_arrive(free.at[slot])
            return sums

        zero = warpgroup.full(0, (warpgroup.ROWS, wide))
        for out, total in zip(outs, jax.lax.fori_loop(0, steps, step, (zero,) * number), strict=True):
            _store(total, out_tiles.at[worker], out.at[group, own_columns(worker), columns])

    @pl.when(worker == workers)
    def fetch():
        plgpu.set_max_registers(40, action="decrease")

        @_each_step(steps, free)
        def _(index, slot):
            inner = pl.ds((first + index) * MULTIPLE, MULTIPLE)
            for i in range(workers):
                tile = left_tiles.at[slot * workers + i]
                plgpu.copy_gmem_to_smem(left.at[inner, own_columns(i)], tile, ready.at[slot])
            for i, array in enumerate(right):
                plgpu.copy_gmem_to_smem(array.at[inner, columns], right_tiles.at[slot * number + i], ready.at[slot])


def _store(result: Array, tile: Any, target: Any) -> None:
    tile[...] = result.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)
    # The next result takes the same tile.
    plgpu.wait_smem_to_gmem(0)


def _each_step(steps: Any, free: Any) -> Callable[[Callable[[Any, Any], None]], None]:
    """Run fetch(index, slot) over all steps, each slot when its last use has ended; at the end all uses have."""

    def run(fetch: Callable[[Any, Any], None]) -> None:
        @pl.loop(0, steps)
        def _(index: Any) -> None:
            slot = jax.lax.rem(index, _STAGES)
            pl.when(index >= _STAGES)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            fetch(index, slot)

        for slot in range(_STAGES):
            pl.when(steps > slot)(functools.partial(plgpu.barrier_wait, free.at[slot]))

    return run


def _tile_columns(columns: int) -> int:
    return 128 if columns % 128 == 0 else MULTIPLE
