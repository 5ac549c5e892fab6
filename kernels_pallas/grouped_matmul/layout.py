"""Rows in blocks of one group each: what makes ragged groups into equal products."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Layout(NamedTuple):
    """Where rows stand among n blocks of b rows, of which the first `used` belong to groups."""

    group: Int[Array, "n"]
    used: Int[Array, ""]
    row: Int[Array, "n b"] | None
    """The row at each place, M where there is none. None where rows come in blocks."""
    place: Int[Array, "M"] | None
    """The place of each row, n·b where its group is none."""

    @classmethod
    def of(cls, rows: int, sizes: Int[Array, "E"], block: int, *, aligned: bool) -> "Layout":
        """`aligned` rows come in blocks already: `block` divides their number and every size."""
        groups = sizes.shape[0]
        count = rows // block if aligned else -(-rows // block) + groups
        blocks_of_group = -(-sizes // block)
        last_block = jnp.cumsum(blocks_of_group)
        index, used = jnp.arange(count), last_block[-1]
        group = jnp.minimum(jnp.searchsorted(last_block, index, side="right"), groups - 1)
        if aligned:
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

    def out_of_blocks(self, x: Float[Array, "... _"]) -> Float[Array, "M _"]:
        x = x.reshape(-1, x.shape[-1])
        return x if self.place is None else x.at[self.place].get(mode="fill", fill_value=0)
