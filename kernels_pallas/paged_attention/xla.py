"""Paged attention for XLA, the default on CPU: a sequence's pages are laid side by side, then two batched products.

Beside the pages it holds one call's keys and values once more, B·p·s of them. Heads come before pages and, in the
keys, places after components: that way gathered pages are the operands of plain products of rows, [K·B] of them. On
CPU that costs about a tenth more than products over keys that lie side by side already, and a third less than
products by page, or over keys whose components are minor.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = -1e30
_KEYS = jax.lax.GatherDimensionNumbers(offset_dims=(0, 2, 4), collapsed_slice_dims=(1,), start_index_map=(1,))
_VALUES = jax.lax.GatherDimensionNumbers(offset_dims=(0, 3, 4), collapsed_slice_dims=(1,), start_index_map=(1,))


def paged_attention(
    q: Float[Array, "B N H"],
    k_pages: Float[Array, "K P H s"],
    v_pages: Float[Array, "K P s H"],
    page_table: Int[Array, "B p"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B N H"]:
    batch, _, size = q.shape
    heads, seen = k_pages.shape[0], page_table.shape[1] * k_pages.shape[3]
    keys = _gather(k_pages, page_table, _KEYS).reshape(heads, batch, size, seen)
    values = _gather(v_pages, page_table, _VALUES).reshape(heads, batch, seen, size)
    queries = q.reshape(batch, heads, -1, size).transpose(1, 0, 2, 3)
    scores = jnp.einsum("KBGH,KBHS->KBGS", queries, keys, preferred_element_type=jnp.float32)
    visible = jnp.arange(seen) < lengths[:, None]
    scores = jnp.where(visible[:, None], scores * size**-0.5, _MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    out = jnp.einsum("KBGS,KBSH->KBGH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    # The division waits until the keys are summed out.
    out = out / jnp.sum(weights, axis=-1, keepdims=True)
    return out.transpose(1, 0, 2, 3).reshape(q.shape).astype(q.dtype)


def _gather(pages: Array, page_table: Int[Array, "B p"], numbers: jax.lax.GatherDimensionNumbers) -> Array:
    """Pages by sequence: keys [K, B, H, p, s], values [K, B, p, s, H]."""
    one_page = (pages.shape[0], 1, *pages.shape[2:])
    return jax.lax.gather(pages, page_table[..., None], numbers, one_page, mode="promise_in_bounds")
