"""The feed-forward of the experts at hand: rows sorted by expert between two grouped products."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.api import Implementation, grouped_matmul, grouped_swiglu, preferred_alignment
from kernels_pallas.moe_dispatch.permute import combine, permute, placement


# Compiled even where the caller is not: places that only align rows make group sizes that do not sum.
@functools.partial(jax.jit, static_argnames="implementation")
def expert_ffn(
    x: Float[Array, "M D"],
    weights: Float[Array, "M X"],
    expert_ids: Int[Array, "M X"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    implementation: Implementation | None,
) -> Float[Array, "M D"]:
    """The experts' weighted sum in float32; ids outside of 0 … E - 1 are experts elsewhere and add nothing."""
    options: Any = {
        "alignment": preferred_alignment(expert_ids.size, gate.shape[0], implementation),
        "implementation": implementation,
    }
    where = placement(expert_ids, gate.shape[0], options["alignment"])
    hidden = grouped_swiglu(permute(x, where), gate, up, where.group_sizes, **options)
    out = grouped_matmul(hidden, down, where.group_sizes, **options)
    return combine(out, weights, where)
