"""The obvious attention, in the input's precision, never optimised: what other implementations are held against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    group = q.shape[2] // k.shape[2]
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, group, axis=2)) / jnp.sqrt(jnp.asarray(q.shape[3], q.dtype))
    index = jnp.arange(q.shape[1])
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (index[:, None] >= index[None, :])
    visible = (visible & (segment_ids[:, :, None] != 0))[:, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # Masked before exp: a large score of a hidden key would overflow there, and its gradient be 0 times infinity.
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(v, group, axis=2))
