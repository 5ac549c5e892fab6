"""A device's tokens of an output matrix, gathered for the losses over it: once in an update, not once a block."""

import functools
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qwen3.sharding import RULES

(VOCAB_AXIS,) = RULES["vocab"]


def whole_rows(head: Float[Array, "V part"], dtype: DTypeLike) -> Float[Array, "V D"]:
    """A device's tokens of a head, gathered in `dtype` from the devices that have parts of each."""
    return jax.lax.all_gather(head.astype(dtype), RULES["embed"], axis=1, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def with_whole_rows(hidden: Array, head: Array, own: Any) -> tuple[Array, Array]:
    """The hidden states, and `whole_rows` of a head of dtype `own`, in which its derivatives are added up."""
    del own
    return hidden, whole_rows(head, hidden.dtype)


def _with_whole_rows_forward(hidden: Array, head: Array, own: Any) -> tuple[tuple[Array, Array], None]:
    return with_whole_rows(hidden, head, own), None


def _with_whole_rows_backward(own: Any, residual: None, cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
    del residual
    by_hidden, by_rows = cotangents
    by_head = jax.lax.psum_scatter(by_rows.astype(own), RULES["embed"], scatter_dimension=1, tiled=True)
    # Before the layers' backward pass, through which XLA would else keep the derivatives by whole rows.
    return jax.lax.optimization_barrier((by_hidden, by_head))


with_whole_rows.defvjp(_with_whole_rows_forward, _with_whole_rows_backward)
