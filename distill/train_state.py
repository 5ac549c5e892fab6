"""What training carries from step to step: weights, optimiser state, step number. Nothing else is trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from qwen3.model import Qwen3
from qwen3.sharding import shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    step: Int[Array, ""]
    model: Qwen3
    optimizer: optax.OptState

    @classmethod
    def start(cls, model: Qwen3, transformation: optax.GradientTransformation, mesh: Mesh) -> "TrainState":
        """Step 0 of a stage that begins with `model`; the optimiser's moments are placed like the weights.

        The weights are copied, since train steps give away the buffers of the state that they are called with.
        """

        def begin(model: Qwen3) -> TrainState:
            return cls(step=jnp.zeros((), jnp.int32), model=model, optimizer=transformation.init(model))

        placed = jax.jit(begin, out_shardings=shardings(jax.eval_shape(begin, model), mesh))
        return placed(jax.tree.map(jnp.copy, model))


def abstract_state(state: TrainState) -> Any:
    """Shapes, dtypes and shardings of `state`, for restoring a checkpoint into."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
