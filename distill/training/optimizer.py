"""AdamW with warm-up, decay and clipping: the one optimiser of every stage."""

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
import optax
from flax import nnx

from qwen3.field_types import Bounds, NotNegative, Positive, Share, check_fields

# To a device, which has float32, what is nearer to 1 is 1.
_Kept = Annotated[float, Bounds(0, 1 - 2**-24, "lie in 0..1, 1 excluded")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) under a learning-rate schedule and a global-norm clip."""

    learning_rate: Positive = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    warmup_fraction: Share = 0.03
    """Share of the steps that the learning rate takes to rise from 0."""
    final_fraction: Share = 0.1
    """Learning rate at the last step, relative to the peak."""
    b1: _Kept = 0.9
    """Share of the running mean of the gradient that each step keeps."""
    b2: _Kept = 0.95
    """Share of the running mean of the squared gradient that each step keeps."""
    epsilon: Positive = 1e-8
    """Added to the root of the mean square, by which updates are divided."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay of matrices; norms and biases are not decayed."""
    clip_norm: Positive = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")

    def learning_rates(self, steps: int) -> optax.Schedule:
        """Learning rate by step, counted from 0, for a stage of `steps` steps.

        The first step of the rise is not 0, since a step that changes nothing would be wasted. The first step after it
        has the peak and the last one `final_fraction` of that. A stage of one step has the peak.
        """
        warmup = round(self.warmup_fraction * steps)
        final = self.learning_rate if self.schedule == "constant" else self.learning_rate * self.final_fraction
        falls = steps - warmup - 1
        if falls < 1:
            # Nothing of a fall but its end, where there was a rise before it.
            decay = optax.constant_schedule(final if warmup else self.learning_rate)
        elif self.schedule == "cosine":
            decay = optax.cosine_decay_schedule(self.learning_rate, falls, self.final_fraction)
        else:
            decay = optax.linear_schedule(self.learning_rate, final, falls)
        rise = optax.linear_schedule(self.learning_rate / (warmup + 1), self.learning_rate, max(1, warmup))
        return optax.join_schedules([rise, decay], [warmup])

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a few small frozen ones are kept
    def transformation(self, steps: int) -> optax.GradientTransformation:
        """What updates weights, the same object for equal settings, whose compiled program is therefore shared."""
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
