"""What a program of a run is before it is compiled, for devices that need not be there: a function and its shapes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from kernels_pallas import topologies
from qwen3.decoder.adapter import adapter_parameters
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3

Purpose = Literal[
    "teacher_prefills", "teacher_generates", "teacher_scores",
    "student_prefills", "student_generates", "student_routes", "student_trains", "student_updates", "student_scores",
]  # fmt: skip
"""Prompts into the cache, tokens out of it, targets of rows, the load of experts in a microbatch, its gradients, the
optimiser's update, and what the student says of given tokens: in evaluations, and of older rollouts."""
Role = Literal["student", "teacher"]
EVALUATION = "evaluation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program of a run, before it is compiled."""

    stage: str
    """The stage's name, or "evaluation"."""
    purpose: Purpose
    model: ModelConfig
    """Of the model that it runs."""
    function: Any
    """What `jax.jit` made of a function."""
    arguments: tuple[Any, ...]
    """Shapes and dtypes with their shardings, and static arguments, by position."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Static arguments by name."""
    mesh: Mesh
    rows: int
    """Rows that go through the model together, on all of the mesh."""
    groups: int = 1
    """That these rows are written in side by side, as on CPU: each reads the weights for itself."""
    length: int
    """Tokens of a row: of the longest prompt where prompts are prefilled, of the longest sequence where it is
    generated."""
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What lies on the same devices meanwhile without being an argument, by name: weights, optimiser state."""

    @property
    def name(self) -> str:
        return f"{self.stage}: {self.purpose.replace('_', ' ')}"

    @property
    def signature(self) -> Any:
        """Equal for programs that compile to the same: a function with its abstract arguments and static options."""
        leaves, structure = jax.tree.flatten(self.arguments)
        return self.function, structure, tuple(leaves), tuple(sorted(self.options.items()))

    @property
    def models(self) -> list[Qwen3]:
        """Among its arguments; of one that is trained beside frozen weights both parts, each without the other."""
        found = (one if isinstance(one, Qwen3) else getattr(one, "model", None) for one in self.arguments)
        return [one for one in found if one is not None]

    @property
    def adapter_parameters(self) -> int:
        """How many numbers are trained in the place of all weights; 0 where the model has no adapters."""
        return adapter_parameters(self.models)

    def compile(self) -> jax.stages.Compiled:
        """For the devices of `mesh`. Raises what the compiler raises."""
        return topologies.compile_for(self.mesh, self.function, *self.arguments, **self.options)


def trained_places(program: Program) -> int:
    """Positions of a row at which a training program multiplies heads out."""
    return next(int(one.loss_mask.shape[1]) for one in program.arguments if hasattr(one, "loss_mask"))


def device_bytes(tree: PyTree) -> int:
    """What an abstract, placed tree takes on each device."""
    return sum(
        math.prod(leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
