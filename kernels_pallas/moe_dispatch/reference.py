"""Every expert on every token, weighted by the routing: wasteful, obvious, never optimised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def expert_ffn(
    x: Float[Array, "M D"],
    weights: Float[Array, "M X"],
    expert_ids: Int[Array, "M X"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "M D"]:
    chosen = jax.nn.one_hot(expert_ids, gate.shape[0], dtype=x.dtype)
    routing = jnp.einsum("MX,MXE->ME", weights.astype(x.dtype), chosen)
    hidden = jax.nn.silu(jnp.einsum("MD,EDF->MEF", x, gate)) * jnp.einsum("MD,EDF->MEF", x, up)
    return jnp.einsum("MEF,EFD,ME->MD", hidden, down, routing)
