"""The public door of mixture-of-experts dispatch: checks arguments and picks an implementation."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.moe_dispatch import experts, reference
from kernels_pallas.platforms import choose

Implementation = Literal["xla", "reference", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "reference", "tpu", "gpu")


def route(
    logits: Float[Array, "M E"], experts_per_token: int, *, normalise: bool
) -> tuple[Float[Array, "M X"], Int[Array, "M X"], Float[Array, "M E"]]:
    """Choose experts: float32 softmax over all experts, the X largest, renormalised to sum 1 if asked.

    Returns (weights, expert_ids, probabilities over all experts). Source: Qwen3 (arXiv 2505.09388), norm_topk_prob.
    """
    if not 1 <= experts_per_token <= logits.shape[-1]:
        raise ValueError(f"experts_per_token {experts_per_token} is not in 1..{logits.shape[-1]}")
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, expert_ids = jax.lax.top_k(probabilities, experts_per_token)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, expert_ids, probabilities


def expert_ffn(
    x: Float[Array, "M D"],
    weights: Float[Array, "M X"],
    expert_ids: Int[Array, "M X"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M D"]:
    """Σ_x weights[m, x] · SwiGLU of expert expert_ids[m, x] on token m; no token is ever dropped.

    Differentiable in everything but `expert_ids`. The weighted sum is float32, the result has the dtype of `x`.
    `implementation` is that of the grouped products. Raises ValueError where shapes disagree, the implementation is
    unknown or of another platform, or a kernel asked for by name has no such dtype or size.
    """
    check(x, weights, expert_ids, gate, up, down)
    if choose("moe_dispatch", implementation, IMPLEMENTATIONS) == "reference":
        return reference.expert_ffn(x, weights, expert_ids, gate, up, down)
    return experts.expert_ffn(x, weights, expert_ids, gate, up, down, implementation).astype(x.dtype)


def check(x: Array, weights: Array, expert_ids: Array, gate: Array, up: Array, down: Array) -> None:
    """Raises ValueError, naming the argument, where shapes disagree."""
    if gate.ndim != 3 or gate.shape != up.shape or down.shape != (gate.shape[0], gate.shape[2], gate.shape[1]):
        raise ValueError(f"gate {gate.shape}, up {up.shape}, down {down.shape} must be [E,D,F], [E,D,F], [E,F,D]")
    if x.ndim != 2 or x.shape[1] != gate.shape[1]:
        raise ValueError(f"x is {x.shape}; it must be [M, {gate.shape[1]}]")
    if weights.ndim != 2 or weights.shape != expert_ids.shape or weights.shape[0] != x.shape[0]:
        raise ValueError(f"weights {weights.shape} and expert_ids {expert_ids.shape} must both be [{x.shape[0]}, X]")
    if not jnp.issubdtype(expert_ids.dtype, jnp.integer):
        raise ValueError(f"expert_ids has dtype {expert_ids.dtype}; pass integers")
