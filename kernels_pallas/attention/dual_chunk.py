"""Dual Chunk Attention (arXiv 2402.17463): exact attention at positions that never leave the trained range.

A row is cut into chunks of s = chunk_size - local_size tokens. Keys stand at their position in their chunk. A query
stands at another position for each of three kinds of keys: of its own chunk, of the one before, and of all older ones.
Three attentions over these disjoint spans of keys, with queries rotated to three positions, are merged by their
log-sum-exps. YaRN needs nothing here: it changes the rotation, which is the caller's.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.attention.api import Implementation, attention_part, merge_parts


class DualChunkPositions(NamedTuple):
    """What to rotate keys by, and queries by for each kind of keys; all [B, T]."""

    keys: Int[Array, "B T"]
    same: Int[Array, "B T"]
    previous: Int[Array, "B T"]
    older: Int[Array, "B T"]


def dual_chunk_positions(positions: Int[Array, "B T"], *, chunk_size: int, local_size: int) -> DualChunkPositions:
    """The four maps of positions, each counted from the start of its own document."""
    stride = _stride(chunk_size, local_size)
    within = positions % stride
    return DualChunkPositions(
        keys=within,
        same=within,
        previous=jnp.minimum(within + stride, chunk_size),
        older=jnp.full_like(within, min(2 * stride - 1, chunk_size)),
    )


def dual_chunk_attention(
    q_same: Float[Array, "B T N H"],
    q_previous: Float[Array, "B T N H"],
    q_older: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    chunk_size: int,
    local_size: int,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of one set of queries, rotated three times by `dual_chunk_positions`, over keys rotated once.

    Documents must lie in the row without gaps: token i of a row at position p of its document has its document's start
    at i - p. Segments, dtypes, differentiation and errors as in `attention`; ValueError too for local_size outside
    0 … chunk_size - 1.
    """
    stride = _stride(chunk_size, local_size)
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    own = index - positions % stride
    before = own - stride
    # Segments keep a span that reaches back before its document from seeing another one.
    parts = (
        (q_same, (own, index + 1)),
        (q_previous, (before, own)),
        (q_older, (jnp.zeros_like(own), before)),
    )
    return merge_parts([attention_part(q, k, v, segment_ids, span, implementation=implementation) for q, span in parts])


def _stride(chunk_size: int, local_size: int) -> int:
    if not 0 <= local_size < chunk_size:
        raise ValueError(f"local_size {local_size} must be at least 0 and below chunk_size {chunk_size}")
    return chunk_size - local_size
