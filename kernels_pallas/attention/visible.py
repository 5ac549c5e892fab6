"""Which keys a query counts: one description for all implementations of attention."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Visible(NamedTuple):
    """The query at index i of its row counts the keys j of its own segment with j <= i and, where a span is given,
    first <= j < end.

    Segment 0 is padding: it counts nothing and nothing counts it.
    """

    segment_ids: Int[Array, "B S"]
    """Of the keys."""
    span: tuple[Int[Array, "B T"], Int[Array, "B T"]] | None = None
    query_index: Int[Array, "B T"] | None = None
    """Where each query stands among the keys. None: T is S, and query i stands at i."""

    @property
    def query_segments(self) -> Int[Array, "B T"]:
        if self.query_index is None:
            return self.segment_ids
        return jnp.take_along_axis(self.segment_ids, self.query_index, axis=1)

    def mask(self) -> Bool[Array, "B T S"]:
        """The description written out, for those who can afford T·S booleans."""
        keys = jnp.arange(self.segment_ids.shape[1])
        first, end = self.bounds()
        inside = (first[:, :, None] <= keys) & (keys < end[:, :, None])
        return inside & (self.query_segments[:, :, None] == self.segment_ids[:, None, :])

    def bounds(self) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The span with all but the segments folded in: causal order, and nothing for padding."""
        index = jnp.arange(self.segment_ids.shape[1]) if self.query_index is None else self.query_index
        behind = jnp.broadcast_to(index + 1, self.query_segments.shape)
        first, end = (jnp.zeros_like(behind), behind) if self.span is None else self.span
        return first, jnp.where(self.query_segments == 0, 0, jnp.minimum(end, behind))
