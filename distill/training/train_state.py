"""What training carries from step to step: weights, optimiser state, step number. Nothing else is trained.

Where the model has adapters, its other weights are frozen: they have no optimiser state, no step copies or gives away
their buffers, and checkpoints leave them out, since the base's folder holds them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from qwen3.decoder.adapter import joined, trained_and_frozen
from qwen3.decoder.model import Qwen3
from qwen3.sharding import placed_shapes, shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    step: Int[Array, ""]
    model: Qwen3
    optimizer: optax.OptState

    @classmethod
    def start(cls, model: Qwen3, transformation: optax.GradientTransformation, mesh: Mesh) -> "TrainState":
        """Step 0 of a stage that begins with `model`; the optimiser's moments are placed like the weights.

        The trained weights are copied, since train steps give away their buffers.
        """
        trained, frozen = trained_and_frozen(model)
        begin = functools.partial(cls._begin, transformation)
        placed = jax.jit(begin, out_shardings=shardings(jax.eval_shape(begin, trained), mesh))
        return placed(jax.tree.map(jnp.copy, trained)).joined(jax.device_put(frozen, shardings(frozen, mesh)))

    @classmethod
    def shapes(cls, model: Qwen3, transformation: optax.GradientTransformation, mesh: Mesh) -> "TrainState":
        """What `start` makes of an abstract model: shapes, dtypes and shardings."""
        trained, frozen = trained_and_frozen(model)
        begun = jax.eval_shape(functools.partial(cls._begin, transformation), trained)
        return placed_shapes(begun, mesh).joined(placed_shapes(frozen, mesh))

    @classmethod
    def _begin(cls, transformation: optax.GradientTransformation, trained: Qwen3) -> "TrainState":
        return cls(step=jnp.zeros((), jnp.int32), model=trained, optimizer=transformation.init(trained))

    def split(self) -> tuple["TrainState", Qwen3]:
        """The state with None in the place of frozen weights, and the frozen weights."""
        trained, frozen = trained_and_frozen(self.model)
        return dataclasses.replace(self, model=trained), frozen

    def joined(self, frozen: Qwen3) -> "TrainState":
        """The state that `split` has split."""
        return dataclasses.replace(self, model=joined(self.model, frozen))


def abstract_state(state: TrainState) -> Any:
    """Shapes, dtypes and shardings of `state`, for restoring a checkpoint into."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
