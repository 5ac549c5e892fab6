"""The obvious attention, in the input's precision, never optimised: what other implementations are held against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.attention.visible import Visible

_LOWEST = -1e29


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Visible
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention and the log-sum-exp of each query's visible scores, below -1e28 where none is visible."""
    group = q.shape[2] // k.shape[2]
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, group, axis=2)) / jnp.sqrt(jnp.asarray(q.shape[3], q.dtype))
    scores = jnp.where(visible.mask()[:, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # Masked before exp: a large score of a hidden key would overflow there, and its gradient be 0 times infinity.
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    log_sum_exp = jnp.where(some, jnp.log(jnp.where(some, total, 1)) + top, _LOWEST)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights / jnp.where(some, total, 1), jnp.repeat(v, group, axis=2))
    return out, log_sum_exp[..., 0].astype(jnp.float32)
