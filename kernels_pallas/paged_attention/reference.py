"""The obvious paged attention: look every key up, repeat heads, softmax. Never optimised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def paged_attention(
    q: Float[Array, "B N H"],
    k_pages: Float[Array, "K P H s"],
    v_pages: Float[Array, "K P s H"],
    page_table: Int[Array, "B p"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B N H"]:
    group, places = q.shape[1] // k_pages.shape[0], k_pages.shape[3]
    index = jnp.arange(page_table.shape[1] * places)

    def one(query: Array, table: Array, length: Array) -> Array:
        keys = jnp.repeat(k_pages.swapaxes(2, 3)[:, table[index // places], index % places], group, axis=0)
        values = jnp.repeat(v_pages[:, table[index // places], index % places], group, axis=0)
        scores = jnp.einsum("NH,NSH->NS", query, keys).astype(jnp.float32) / jnp.sqrt(query.shape[1])
        weights = jax.nn.softmax(jnp.where(index < length, scores, -jnp.inf), axis=-1)
        return jnp.einsum("NS,NSH->NH", weights, values.astype(jnp.float32)).astype(q.dtype)

    return jax.vmap(one)(q, page_table, lengths)
