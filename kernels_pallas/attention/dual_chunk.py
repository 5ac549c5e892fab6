"""Dual Chunk Attention (arXiv 2402.17463): exact attention at positions that never leave the trained range.

A document is cut into chunks of s = chunk_size - local_size tokens. Keys stand at their position in their chunk. A
query stands at another position for each of three kinds of keys: of its own chunk, of the one before, and of all older
ones. Three attentions over these disjoint spans of keys, with queries rotated to three positions, are merged by their
log-sum-exps. YaRN needs nothing here: it changes the rotation, which is the caller's.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.attention.api import Implementation, attention, attention_part, merge_parts

Indices = TypeVar("Indices", Array, np.ndarray)


class DualChunkPositions(NamedTuple):
    """What to rotate keys by, and queries by for each kind of keys; all [B, T]."""

    keys: Int[Array, "B T"]
    same: Int[Array, "B T"]
    previous: Int[Array, "B T"]
    older: Int[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DualChunkQueries:
    """One set of queries, rotated by each of the positions that are theirs."""

    same: Float[Array, "B T N H"]
    previous: Float[Array, "B T N H"]
    older: Float[Array, "B T N H"]
    within: Int[Array, "B T"]
    """The position of each query in its chunk."""
    chunk_tokens: int = dataclasses.field(metadata={"static": True})
    """s, the tokens of a chunk."""

    def kinds(self, index: Int[Array, "B T"]) -> tuple[tuple[Array, tuple[Array, Array]], ...]:
        """Queries that stand at `index` of their row, each with its keys: from the first up to the one before the end.

        Documents must lie in the row without gaps. A span may reach back before its document.
        """
        end, own, before = span_ends(index, self.within, self.chunk_tokens)
        return (
            (self.same, (own, end)),
            (self.previous, (before, own)),
            (self.older, (jnp.zeros_like(own), before)),
        )


def span_ends(index: Indices, within: Indices, chunk_tokens: int) -> tuple[Indices, Indices, Indices]:
    """For queries at `index` of their row and `within` their chunk: where the keys of their own chunk end, those of the
    chunk before, and all older ones. Each kind begins where the next ends, the last at 0."""
    own = index - within
    return index + 1, own, own - chunk_tokens


def dual_chunk_positions(positions: Int[Array, "B T"], *, chunk_size: int, local_size: int) -> DualChunkPositions:
    """The four maps of positions, each counted from the start of its own document.

    Raises ValueError for local_size outside 0 … chunk_size - 1.
    """
    if not 0 <= local_size < chunk_size:
        raise ValueError(f"local_size {local_size} must be at least 0 and below chunk_size {chunk_size}")
    chunk = chunk_size - local_size
    within = positions % chunk
    return DualChunkPositions(
        keys=within,
        same=within,
        previous=jnp.minimum(within + chunk, chunk_size),
        older=jnp.full_like(within, min(2 * chunk - 1, chunk_size)),
    )


def dual_chunk_attention(
    q: DualChunkQueries,
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B S"],
    *,
    query_index: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of one set of queries over keys that are rotated once, by `DualChunkPositions.keys`.

    Rows of at most a chunk are left to `attention`. Documents must lie in the row without gaps. Segments, query_index,
    dtypes, differentiation and errors as in `attention`.
    """
    if segment_ids.shape[1] <= q.chunk_tokens:
        return attention(q.same, k, v, segment_ids, query_index=query_index, implementation=implementation)
    index = query_index
    if index is None:
        index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    # Segments keep a span that reaches back before its document from seeing another one.
    return merge_parts(
        [
            attention_part(queries, k, v, segment_ids, span, query_index=query_index, implementation=implementation)
            for queries, span in q.kinds(index)
        ]
    )


def attention_of(q: Float[Array, "B T N H"] | DualChunkQueries) -> Callable[..., Float[Array, "B T N H"]]:
    """The attention that such queries are made for."""
    return dual_chunk_attention if isinstance(q, DualChunkQueries) else attention
