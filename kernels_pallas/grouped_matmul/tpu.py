"""Grouped products in Mosaic TPU: visits of row blocks by groups, after megablox (jax.experimental.pallas.ops.tpu).

Rows are cut into blocks without regard to groups, and a group visits every block that it has rows in. A block that
several groups share is visited by one after another and stays in fast memory in between; each keeps what is not its
own. A table in scalar memory lists the visits, at most one for each block and one more for each group.

The whole contraction is in one block: a group's matrix comes into fast memory once for each of its column blocks,
whatever the number of rows, and nothing is accumulated over the grid. Only sums over rows are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

DTYPES = ("bfloat16", "float32")
MULTIPLE = 1  # of D and F
_LANES = 128
_BLOCK_ROWS = 256
_MATRIX_BYTES = 8 * 2**20  # of the blocks of matrices that are multiplied at a time; twice that is fetched ahead
_SUM_BYTES = 6 * 2**20  # of the float32 sums over rows
_SUM_ROWS = 1024
_VMEM_BYTES = 48 * 2**20


class _Visits(NamedTuple):
    """The tables that the grid's inner axis walks along: v visits, of which the first `number` are real."""

    group: Int[Array, "v"]
    block: Int[Array, "v"]
    begin: Int[Array, "E+1"]  # first row of each group
    end: Int[Array, "E+1"]
    number: Int[Array, "1"]


def products(
    rows: tuple[Float[Array, "M _"], ...],
    weights: tuple[Float[Array, "E D F"], ...],
    sizes: Int[Array, "E"],
    combine: Callable[..., tuple[Array, ...]],
    *,
    transposed: bool,
    alignment: int,
) -> tuple[Float[Array, "M _"], ...]:
    """As `xla.products`; `alignment` changes nothing here."""
    del alignment
    (count, inner), groups = rows[0].shape, sizes.shape[0]
    columns = weights[0].shape[1 if transposed else 2]
    block_rows = _block_rows(rows[0])
    block_columns = _even_block(columns, _MATRIX_BYTES // (len(weights) * inner * weights[0].dtype.itemsize))
    # Rows behind the last group are those of one more, which has no matrix.
    visits = _visits(jnp.append(sizes, count - jnp.sum(sizes)), count, block_rows, visit_empty=False)

    def matrix(n: Any, v: Any, visits: _Visits) -> tuple[Any, ...]:
        group = jnp.minimum(visits.group[v], groups - 1)
        return (group, n, 0) if transposed else (group, 0, n)

    rows_spec = pl.BlockSpec((block_rows, inner), lambda n, v, visits: (visits.block[v], 0))
    matrix_spec = pl.BlockSpec((None, block_columns, inner) if transposed else (None, inner, block_columns), matrix)
    out_spec = pl.BlockSpec((block_rows, block_columns), lambda n, v, visits: (visits.block[v], n))
    tile = jax.ShapeDtypeStruct((block_rows, block_columns), jnp.float32)
    results = len(jax.eval_shape(combine, *[tile] * len(weights)))
    (outs,) = pl.pallas_call(
        functools.partial(_products_kernel, groups=groups, combine=combine, transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(columns, block_columns), len(visits.group)),
            in_specs=[[rows_spec] * len(rows), [matrix_spec] * len(weights)],
            out_specs=[[out_spec] * results],
        ),
        out_shape=[[jax.ShapeDtypeStruct((count, columns), rows[0].dtype)] * results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        name="grouped_products",
    )(visits, list(rows), list(weights))
    return tuple(outs)


def outer_products(
    x: Float[Array, "M D"], cotangents: tuple[Float[Array, "M F"], ...], sizes: Int[Array, "E"], *, alignment: int
) -> tuple[Float[Array, "E D F"], ...]:
    """As `xla.outer_products`, but in the dtype of x; `alignment` changes nothing here."""
    del alignment
    (count, height), width, number = x.shape, cotangents[0].shape[1], len(cotangents)
    block_rows = _block_rows(x)
    block_height = _even_block(height, _SUM_ROWS)
    block_width = _even_block(width, _SUM_BYTES // (number * block_height * 4))
    visits = _visits(sizes, count, block_rows, visit_empty=True)
    left_spec = pl.BlockSpec((block_rows, block_height), lambda d, f, v, visits: (visits.block[v], d))
    right_spec = pl.BlockSpec((block_rows, block_width), lambda d, f, v, visits: (visits.block[v], f))
    out_spec = pl.BlockSpec((None, block_height, block_width), lambda d, f, v, visits: (visits.group[v], d, f))
    (outs,) = pl.pallas_call(
        _outer_products_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(height, block_height), pl.cdiv(width, block_width), len(visits.group)),
            in_specs=[left_spec, [right_spec] * number],
            out_specs=[[out_spec] * number],
            scratch_shapes=[[pltpu.VMEM((block_height, block_width), jnp.float32)] * number],
        ),
        out_shape=[[jax.ShapeDtypeStruct((sizes.shape[0], height, width), x.dtype)] * number],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        name="grouped_outer_products",
    )(visits, x, list(cotangents))
    return tuple(outs)


def preferred_alignment(rows: int, groups: int) -> int:
    del rows, groups
    return 1


def _products_kernel(visits, rows, weights, outs, *, groups, combine, transposed):
    v = pl.program_id(1)
    group = visits.group[v]
    happens = v < visits.number[0]
    opens = (v == 0) | (visits.block[v] != visits.block[jnp.maximum(v - 1, 0)])

    @pl.when(happens & (group < groups))
    def multiply():
        contract = (1, 1) if transposed else (1, 0)
        accumulated = (
            _dot(x[...], weight[...], contract)
            for x, weight in zip(rows * (len(weights) // len(rows)), weights, strict=True)
        )
        for out, result in zip(outs, combine(*accumulated), strict=True):
            own = _own_rows(visits, v, out.shape)
            # Until a block's first visit ends, it holds anything.
            others = jnp.where(opens, 0, out[...].astype(jnp.float32))
            out[...] = jnp.where(own, result, others).astype(out.dtype)

    @pl.when(happens & (group == groups) & opens)
    def clear():
        for out in outs:
            out[...] = jnp.zeros_like(out)


def _outer_products_kernel(visits, x, cotangents, outs, sums):
    v = pl.program_id(2)
    group = visits.group[v]
    first = visits.block[v] * x.shape[0]
    begin, end = visits.begin[group], visits.end[group]
    happens = (v < visits.number[0]) & (begin < end)
    whole = (begin <= first) & (first + x.shape[0] <= end)

    @pl.when((v == 0) | (visits.group[jnp.maximum(v - 1, 0)] != group))
    def clear():
        for total in sums:
            total[...] = jnp.zeros_like(total)

    def add(load: Callable[[Any], Array]) -> None:
        left = load(x)
        for total, cotangent in zip(sums, cotangents, strict=True):
            total[...] += _dot(left, load(cotangent), (0, 0))

    def load_own(ref: Any) -> Array:
        # Both operands: 0 times what lies behind the array's end may be NaN.
        return jnp.where(_own_rows(visits, v, ref.shape), ref[...].astype(jnp.float32), 0).astype(ref.dtype)

    pl.when(happens & whole)(lambda: add(lambda ref: ref[...]))
    pl.when(happens & ~whole)(lambda: add(load_own))

    last = pl.num_programs(2) - 1

    @pl.when((v == last) | (visits.group[jnp.minimum(v + 1, last)] != group))
    def store():
        for out, total in zip(outs, sums, strict=True):
            out[...] = total[...].astype(out.dtype)


def _own_rows(visits: _Visits, v: Any, shape: tuple[int, ...]) -> Array:
    """Which rows of a block belong to the visiting group."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + visits.block[v] * shape[0]
    return (row >= visits.begin[visits.group[v]]) & (row < visits.end[visits.group[v]])


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _visits(sizes: Int[Array, "E"], rows: int, block: int, *, visit_empty: bool) -> _Visits:
    """List the visits; those behind the last repeat it, so that nothing is fetched for them."""
    blocks, groups = pl.cdiv(rows, block), sizes.shape[0]
    end = jnp.cumsum(sizes).astype(jnp.int32)
    begin = end - sizes.astype(jnp.int32)
    first = jnp.minimum(begin // block, blocks - 1)
    number = jnp.where(sizes > 0, (end - 1) // block - first + 1, int(visit_empty))
    done = jnp.cumsum(number)
    index = jnp.minimum(jnp.arange(blocks + groups - 1, dtype=jnp.int32), done[-1] - 1)
    group = jnp.searchsorted(done, index, side="right").astype(jnp.int32)
    return _Visits(group, first[group] + index - (done - number)[group], begin, end, done[-1:])


def _block_rows(x: Float[Array, "M _"]) -> int:
    sublanes = 32 // x.dtype.itemsize
    return min(_BLOCK_ROWS, pl.cdiv(x.shape[0], sublanes) * sublanes)


def _even_block(size: int, most: int) -> int:
    """A multiple of the lanes, near `most` or below, that cuts `size` evenly; all of it if that is no more."""
    most = max(_LANES, most)
    return size if size <= most else pl.cdiv(pl.cdiv(size, pl.cdiv(size, most)), _LANES) * _LANES
