"""Grouped products for XLA, the default on CPU: blocks of rows of one group each, one matrix product after another.

Each group's rows are padded to a multiple of the block, so that a block has one matrix and shapes are static: at most
ceil(M / block) + E blocks, whatever the sizes. That keeps the work near M rows, where a dense expansion does M·E. Rows
that come aligned are taken as they lie. Matrices are read where they are; one batched product over the blocks would
copy one for each, which on CPU takes up to nine times as long.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    layout = _Layout.of(rows[0].shape[0], sizes, alignment)
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


def outer_products(
    x: Float[Array, "M D"], cotangents: tuple[Float[Array, "M F"], ...], sizes: Int[Array, "E"], *, alignment: int
) -> tuple[Float[Array, "E D F"], ...]:
    """Σ x ⊗ cotangent over the rows of each group, for every array of cotangents, in float32."""
    layout = _Layout.of(x.shape[0], sizes, alignment)
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


def block_rows(rows: int, groups: int) -> int:
    """A power of two near half a group's fair share: little padding, yet rows enough for a matrix product."""
    share = max(1, rows // (2 * groups))
    return min(128, max(8, 1 << (share.bit_length() - 1)))


class _Layout(NamedTuple):
    """Where rows stand among n blocks of b rows, of which the first `used` belong to groups."""

    group: Int[Array, "n"]
    used: Int[Array, ""]
    row: Int[Array, "n b"] | None
    """The row at each place, M where there is none. None where rows come in blocks."""
    place: Int[Array, "M"] | None
    """The place of each row, n·b where its group is none."""

    @classmethod
    def of(cls, rows: int, sizes: Int[Array, "E"], alignment: int) -> "_Layout":
        groups = sizes.shape[0]
        block = alignment if alignment > 1 else block_rows(rows, groups)
        count = rows // block if alignment > 1 else -(-rows // block) + groups
        blocks_of_group = -(-sizes // block)
        last_block = jnp.cumsum(blocks_of_group)
        index, used = jnp.arange(count), last_block[-1]
        group = jnp.minimum(jnp.searchsorted(last_block, index, side="right"), groups - 1)
        if alignment > 1:
            return cls(group, used, None, None)
        first_block, ends = last_block - blocks_of_group, jnp.cumsum(sizes)
        begins = ends - sizes
        rank = ((index - first_block[group]) * block)[:, None] + jnp.arange(block)
        row = jnp.where(rank < sizes[group][:, None], begins[group][:, None] + rank, rows)
        index = jnp.arange(rows)
        of_row = jnp.minimum(jnp.searchsorted(ends, index, side="right"), groups - 1)
        place = jnp.where(index < ends[-1], first_block[of_row] * block + index - begins[of_row], count * block)
        return cls(group, used, row, place)

    def into_blocks(self, x: Float[Array, "M _"]) -> Float[Array, "n b _"]:
        if self.row is None:
            return x.reshape(len(self.group), -1, x.shape[1])
        return x.at[self.row].get(mode="fill", fill_value=0)

    def out_of_blocks(self, x: Float[Array, "n b _"]) -> Float[Array, "M _"]:
        x = x.reshape(-1, x.shape[2])
        return x if self.place is None else x.at[self.place].get(mode="fill", fill_value=0)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulator)
