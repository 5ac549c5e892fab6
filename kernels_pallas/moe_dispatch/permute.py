"""Rows in the order of their experts, and back again as weighted sums.

Both directions and both their derivatives are gathers, because each knows where its rows stand in the other order; what
autodiff would make of a gather is a scatter, which is slow on every platform and adds in the rows' own precision.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Placement(NamedTuple):
    """S places for the M·X rows of tokens, sorted by expert; no expert's rows begin at other than a multiple of a."""

    place: Int[Array, "M X"]
    """Where each token stands for each of its experts, S where that expert is none of these."""
    row: Int[Array, "S"]
    """The row m·X + x at each place, M·X at one that only aligns."""
    group_sizes: Int[Array, "E"]
    """Places of each expert, the aligning ones included."""


def placement(expert_ids: Int[Array, "M X"], experts: int, alignment: int) -> Placement:
    """Places for the tokens whose expert is one of 0 … experts - 1; any others get none."""
    tokens, per_token = expert_ids.shape
    rows = tokens * per_token
    places = rows if alignment == 1 else (-(-rows // alignment) + experts) * alignment
    chosen = jax.nn.one_hot(expert_ids.reshape(-1), experts, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(chosen, axis=0) - chosen) * chosen, axis=1)
    group_sizes = -(-jnp.sum(chosen, axis=0) // alignment) * alignment
    first = jnp.cumsum(group_sizes) - group_sizes
    place = jnp.where(jnp.any(chosen > 0, axis=1), jnp.sum(first * chosen, axis=1) + rank, places)
    row = jnp.full((places,), rows, jnp.int32).at[place].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    return Placement(place.reshape(tokens, per_token), row, group_sizes)


@jax.custom_vjp
def permute(x: Float[Array, "M D"], where: Placement) -> Float[Array, "S D"]:
    """Each place's token; zeros where there is none."""
    return _take(x, where.row // where.place.shape[1])


def _permute_forward(x: Array, where: Placement) -> tuple[Array, Placement]:
    return permute(x, where), where


def _permute_backward(where: Placement, cotangent: Array) -> tuple[Array, None]:
    return jnp.sum(_take(cotangent, where.place), axis=1, dtype=jnp.float32).astype(cotangent.dtype), None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def combine(rows: Float[Array, "S D"], weights: Float[Array, "M X"], where: Placement) -> Float[Array, "M D"]:
    """Σ_x weights[m, x] · rows[place of (m, x)], in float32."""
    return jnp.einsum("MXD,MX->MD", _take(rows, where.place), weights, preferred_element_type=jnp.float32)


def _combine_forward(rows: Array, weights: Array, where: Placement) -> tuple[Array, Any]:
    return combine(rows, weights, where), (rows, weights, where)


def _combine_backward(residuals: Any, cotangent: Array) -> tuple[Array, Array, None]:
    rows, weights, where = residuals
    share = _take(weights.reshape(-1), where.row)[:, None]
    to_rows = share * _take(cotangent, where.row // weights.shape[1])
    to_weights = jnp.einsum("MXD,MD->MX", _take(rows, where.place).astype(jnp.float32), cotangent)
    return to_rows.astype(rows.dtype), to_weights.astype(weights.dtype), None


combine.defvjp(_combine_forward, _combine_backward)


def _take(x: Array, index: Array) -> Array:
    """x at an index; zeros at one behind the end."""
    return x.at[index].get(mode="fill", fill_value=0)
