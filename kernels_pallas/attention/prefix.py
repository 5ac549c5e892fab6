"""Attention of packed rows whose documents go on from a prefix that was read before: its keys stand apart, in pages.

The queries attend to the keys of their row and, some pages at a time, to those of the prefix, and all are merged by
their log-sum-exps (FlashAttention-2, arXiv 2307.08691). Nothing is done for pages that no query of any row counts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.attention.api import Implementation, attention_part, merge_parts_with_log_sum_exp
from kernels_pallas.attention.dual_chunk import DualChunkQueries

_BLOCK_TOKENS = 512


def attention_behind_prefix(
    q: Float[Array, "B T N H"] | DualChunkQueries,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    k_pages: Float[Array, "P K s H"],
    v_pages: Float[Array, "P K s H"],
    page_table: Int[Array, "B p"],
    prefix_tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """The attention of these queries over the first `prefix_tokens` tokens of their row's pages and over the keys at or
    before them in their own segment.

    Args:
      k_pages, v_pages: pages of s tokens. Every number must be finite.
      page_table: pages of what those documents of a row begin with that have a prefix, some with less of it than
        others; token i stands in page page_table[b, i // s] at place i % s. At least one column.
      prefix_tokens: of each query, 0 … p·s; 0 for padding.
      positions: of each query in its document, which begins with its prefix.
      Others as in `attention` and `dual_chunk_attention`, and so are errors. Not differentiable.
    """
    index = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), segment_ids.shape)
    if isinstance(q, DualChunkQueries):
        own, before = q.kinds(index), q.kinds(positions)
    else:
        nothing = jnp.zeros_like(index)
        own, before = ((q, (nothing, index + 1)),), ((q, (nothing, positions + 1)),)
    start = merge_parts_with_log_sum_exp(
        [attention_part(queries, k, v, segment_ids, span, implementation=implementation) for queries, span in own]
    )
    places = k_pages.shape[2]
    pages = min(max(1, _BLOCK_TOKENS // places), page_table.shape[1])
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
    segments = jnp.ones((len(table), pages * places), jnp.int32)
    # All of the prefix is before a row.
    behind = jnp.full_like(index, pages * places - 1)

    def block(number: Array, merged: tuple[Array, Array]) -> tuple[Array, Array]:
        ids, first = jax.lax.dynamic_slice_in_dim(table, number * pages, pages, axis=1), number * pages * places
        keys, values = (_side_by_side(x, ids) for x in (k_pages, v_pages))
        parts = [
            attention_part(
                queries,
                keys,
                values,
                segments,
                (begin - first, jnp.minimum(end, prefix_tokens) - first),
                query_index=behind,
                implementation=implementation,
            )
            for queries, (begin, end) in before
        ]
        return merge_parts_with_log_sum_exp([merged, *parts])

    blocks = -(-jnp.max(prefix_tokens) // (pages * places))
    return jax.lax.fori_loop(0, blocks, block, start)[0].astype(v.dtype)


def _side_by_side(pages: Float[Array, "P K s H"], table: Int[Array, "B p"]) -> Float[Array, "B S K H"]:
    """Each row's pages, S = p·s."""
    found = pages.at[table].get(mode="promise_in_bounds")  # [B, p, K, s, H]
    return found.swapaxes(2, 3).reshape(len(table), -1, pages.shape[1], pages.shape[3])
