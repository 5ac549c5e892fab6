"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the projections of a layer, and the split that trains them alone.

Own code rather than qwix's provider: that one traces a model's call to find its projections and makes the adapters
as it goes, which a stack made by `vmap` and run by a `scan` over its weights does not survive, and they would come
without the logical axes that `qwen3.sharding` places weights by.
"""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Model = TypeVar("Model")


class AdapterWeight(nnx.Param):
    """One factor of an adapter. A model that has any trains these and nothing else."""


class Adapter(nnx.Module):
    """x ↦ alpha / R · x A B, added to what a frozen kernel [in..., out...] makes of x.

    A [in..., R] is drawn as PEFT draws it, uniformly with variance 1 / (3 · inputs), so that learning rates carry
    over; B [R, out...] is 0, so that the model starts as its base. Both are stacked over layers as the kernel is.
    """

    def __init__(self, key: Array, kernel: nnx.Param, inputs: int, *, rank: int, alpha: float, dtype: DTypeLike):
        """`inputs` is how many of the kernel's axes, stacked layers apart, are inputs."""
        axes, shape = kernel.get_metadata()["axes"], kernel.get_value().shape
        stacked = len(shape) - len(axes)
        a_shape = (*shape[: stacked + inputs], rank)
        b_shape = (*shape[:stacked], rank, *shape[stacked + inputs :])
        bound = 1 / math.sqrt(math.prod(a_shape[stacked:-1]))
        # Drawn as a matrix, which XLA on CPU compiles in a fraction of the time.
        drawn = jax.random.uniform(key, (math.prod(a_shape[:-1]), rank), dtype, -bound, bound)
        self.alpha = alpha
        self.a = AdapterWeight(drawn.reshape(a_shape), axes=(*axes[:inputs], "rank"))
        self.b = AdapterWeight(jnp.zeros(b_shape, dtype), axes=("rank", *axes[inputs:]))

    @property
    def rank(self) -> int:
        return self.a[...].shape[-1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`x` is [..., in...]; the result [..., out...] is in its dtype."""
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        return jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1) * self.scale


def trained_and_frozen(model: Model) -> tuple[Model, Model]:
    """The weights that training changes and those that it does not, each with None in the place of the others.

    Where there are adapters they alone are trained, else everything is.
    """
    adapted = adapter_parameters(model) > 0

    def part(trained: bool) -> Model:
        return jax.tree.map(
            lambda weight: weight if (not adapted or isinstance(weight, AdapterWeight)) == trained else None,
            model,
            is_leaf=_is_param,
        )

    return part(True), part(False)


def joined(trained: Model, frozen: Model) -> Model:
    """The model that `trained_and_frozen` has split."""
    return jax.tree.map(
        lambda one, other: other if one is None else one,
        trained,
        frozen,
        is_leaf=lambda leaf: leaf is None or _is_param(leaf),
    )


def adapter_parameters(model: Any) -> int:
    """How many numbers the adapters of a model hold, which may be abstract; 0 where it has none."""
    weights = jax.tree.leaves(model, is_leaf=_is_param)
    return sum(weight.get_value().size for weight in weights if isinstance(weight, AdapterWeight))


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)
