"""Paged attention for XLA: some pages of every row at a time, up to the longest row, under a running softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK_TOKENS = 512
# A hidden score lies below what the running maximum starts from: its exponential is 0 even where all are hidden.
_MASKED = -1e30
_LOWEST = -1e29


def paged_attention(
    q: Float[Array, "B K R H"],
    k_pages: Float[Array, "P K s H"],
    v_pages: Float[Array, "P K s H"],
    page_table: Int[Array, "B p"],
    lengths: Int[Array, "B"],
    new: int,
) -> Float[Array, "B K R H"]:
    """The rows R are T·G: `new` tokens, all heads of a group beside each other."""
    batch, kv_heads, rows, size = q.shape
    places = k_pages.shape[2]
    pages = min(max(1, _BLOCK_TOKENS // places), page_table.shape[1])
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
    position = lengths[:, None] - new + jnp.arange(new)
    position = jnp.repeat(position, rows // new, axis=1)[:, None, :, None]

    def gather(source: Array, ids: Array) -> Float[Array, "B K S H"]:
        return source[ids].swapaxes(1, 2).reshape(batch, kv_heads, pages * places, size)

    def block(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, top, total = carry
        ids = jax.lax.dynamic_slice_in_dim(table, index * pages, pages, axis=1)
        scores = jnp.einsum("BKRH,BKSH->BKRS", q, gather(k_pages, ids), preferred_element_type=jnp.float32)
        token = index * pages * places + jnp.arange(pages * places)
        scores = jnp.where(token <= position, scores * size**-0.5, _MASKED)
        highest = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - highest), jnp.exp(top - highest)
        added = jnp.matmul(weights.astype(v_pages.dtype), gather(v_pages, ids), preferred_element_type=jnp.float32)
        return acc * shrink + added, highest, total * shrink + jnp.sum(weights, axis=-1, keepdims=True)

    column = jnp.zeros((batch, kv_heads, rows, 1), jnp.float32)
    start = (jnp.zeros(q.shape, jnp.float32), column + _LOWEST, column)
    acc, _, total = jax.lax.fori_loop(0, -(-jnp.max(lengths) // (pages * places)), block, start)
    return (acc / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(q.dtype)
