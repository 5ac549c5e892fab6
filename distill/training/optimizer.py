"""AdamW with warm-up, decay and clipping: the one optimiser of every stage."""

import dataclasses
import math
from typing import Any, Literal

import jax
import optax
from flax import nnx

from qwen3.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) under a learning-rate schedule and a global-norm clip."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    warmup_fraction: float = 0.03
    """Share of the steps that the learning rate takes to rise from 0."""
    final_fraction: float = 0.1
    """Learning rate at the last step, relative to the peak."""
    b1: float = 0.9
    """Share of the running mean of the gradient that each step keeps."""
    b2: float = 0.95
    """Share of the running mean of the squared gradient that each step keeps."""
    epsilon: float = 1e-8
    """Added to the root of the mean square, by which updates are divided."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; norms and biases are not decayed."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self) -> None:
        # Written so that NaN, which compares as false with everything, fails them too.
        for name in ("learning_rate", "epsilon", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be a number above 0")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must lie in 0..1")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must lie in 0..1, 1 excluded")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"optimizer.weight_decay is {self.weight_decay}; it must be 0 (off) or a number above it")

    def learning_rates(self, steps: int) -> optax.Schedule:
        """Learning rate by step for a stage of `steps` steps."""
        warmup = round(self.warmup_fraction * steps)
        rest = max(1, steps - warmup)
        final = self.learning_rate * self.final_fraction
        decay = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest, self.final_fraction),
            "linear": optax.linear_schedule(self.learning_rate, final, rest),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        # The first step of the rise is not 0: a step that changes nothing would be a step wasted.
        rise = optax.linear_schedule(self.learning_rate / (warmup + 1), self.learning_rate, max(1, warmup))
        return optax.join_schedules([rise, decay], [warmup])

    def transformation(self, steps: int) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.learning_rates(steps),
                b1=self.b1,
                b2=self.b2,
                eps=self.epsilon,
                weight_decay=self.weight_decay,
                mask=_decayed,
            ),
        )


def _decayed(model: Any) -> Any:
    """True for matrices: whatever names two or more logical axes and is no bias."""

    def decays(leaf: nnx.Param) -> Any:
        axes = leaf.get_metadata()["axes"]
        return leaf.replace(len(axes) > 1 and not {"embed", "expert_embed", "rank"}.isdisjoint(axes))

    return jax.tree.map(decays, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
