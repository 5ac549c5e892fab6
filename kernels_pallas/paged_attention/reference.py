"""The obvious paged attention, in the input's precision, never optimised: every row's pages side by side."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K s H"],
    v_pages: Float[Array, "P K s H"],
    page_table: Int[Array, "B p"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B T N H"]:
    batch, new, heads, size = q.shape

    def side_by_side(pages: Array) -> Float[Array, "B S N H"]:
        tokens = pages[page_table].swapaxes(2, 3).reshape(batch, -1, pages.shape[1], size)
        return jnp.repeat(tokens, heads // pages.shape[1], axis=2)

    scores = jnp.einsum("BTNH,BSNH->BNTS", q, side_by_side(k_pages)) / jnp.sqrt(jnp.asarray(size, q.dtype))
    position = lengths[:, None] - new + jnp.arange(new)
    visible = (jnp.arange(scores.shape[3]) <= position[:, :, None])[:, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("BNTS,BSNH->BTNH", weights / jnp.where(total == 0, 1, total), side_by_side(v_pages))
