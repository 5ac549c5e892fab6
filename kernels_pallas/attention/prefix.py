"""Attention of packed rows whose documents go on from a prefix that was read before: its keys stand apart.

The queries attend to the keys of their row and to those of the prefix, and both are merged by their log-sum-exps
(FlashAttention-2, arXiv 2307.08691): keys are neither copied beside each other nor given segments of their own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.attention.api import Implementation, attention_part, merge_parts
from kernels_pallas.attention.dual_chunk import DualChunkQueries


def attention_behind_prefix(
    q: Float[Array, "B T N H"] | DualChunkQueries,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    prefix_k: Float[Array, "B S K H"],
    prefix_v: Float[Array, "B S K H"],
    prefix_tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """The attention of these queries over the first `prefix_tokens` keys of their row's prefix and over those at or
    before them in their own segment.

    Args:
      prefix_k, prefix_v: what all documents of a row that have a prefix begin with, some with less of it than others.
      prefix_tokens: of each query, 0 … S; 0 for padding.
      positions: of each query in its document, which begins with its prefix.
      Others as in `attention` and `dual_chunk_attention`, and so are errors.
    """
    index = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), segment_ids.shape)
    nothing = jnp.zeros_like(index)
    if isinstance(q, DualChunkQueries):
        own, before = q.kinds(index), q.kinds(positions)
    else:
        own, before = ((q, (nothing, index + 1)),), ((q, (nothing, positions + 1)),)
    prefix_segments = jnp.ones(prefix_k.shape[:2], jnp.int32)
    # All of the prefix is before a row.
    behind = jnp.full_like(index, prefix_k.shape[1] - 1)
    return merge_parts(
        [
            *(attention_part(queries, k, v, segment_ids, span, implementation=implementation) for queries, span in own),
            *(
                attention_part(
                    queries,
                    prefix_k,
                    prefix_v,
                    prefix_segments,
                    (first, jnp.minimum(end, prefix_tokens)),
                    query_index=behind,
                    implementation=implementation,
                )
                for queries, (first, end) in before
            ),
        ]
    )
