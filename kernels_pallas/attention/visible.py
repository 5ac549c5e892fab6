"""Which keys a query counts: one description for all implementations of attention."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Visible(NamedTuple):
    """Query i counts the keys j of its own segment with j <= i and, where a span is given, first <= j < end.

    Segment 0 is padding: it counts nothing and nothing counts it.
    """

    segment_ids: Int[Array, "B T"]
    span: tuple[Int[Array, "B T"], Int[Array, "B T"]] | None = None

    def mask(self) -> Bool[Array, "B T S"]:
        """The description written out, for those who can afford T·T booleans."""
        segments, keys = self.segment_ids, jnp.arange(self.segment_ids.shape[1])
        first, end = self.bounds()
        inside = (first[:, :, None] <= keys) & (keys < end[:, :, None])
        return inside & (segments[:, :, None] == segments[:, None, :])

    def bounds(self) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The span with all but the segments folded in: causal order, and nothing for padding."""
        segments = self.segment_ids
        behind = jnp.broadcast_to(jnp.arange(1, segments.shape[1] + 1), segments.shape)
        first, end = (jnp.zeros_like(behind), behind) if self.span is None else self.span
        return first, jnp.where(segments == 0, 0, jnp.minimum(end, behind))
