"""The gradient where the student is sure of one bucket, in a form that does not cancel.

By the logit of bucket i the derivative of a loss is slope_i - q_i·Σ slope, the slopes being those by log-probabilities
(`divergence`). Taking c·q off all slopes changes nothing. Where q of one bucket is nearly 1, its slope is nearly the
whole sum, and what is left of it as small as the mass of all others: so c is chosen to make this slope exactly 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.linear_kl.divergence import Divergence, contribution_and_slope
from kernels_pallas.linear_kl.mass import Survey

_SURE = 0.75  # of a student's mass: all others are less likely by a factor of 3 and more
_NEAREST = 0.5  # nats below it, between it and the next


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sure:
    """The entry of each token that the student is sure of, if there is one.

    There is none for a divergence whose slopes cancel: q - p is all of the derivative then.
    """

    cut: Float[Array, " M"]
    """Log-probability above which it is, and nothing else."""
    centre: Float[Array, " M"]
    """Its slope divided by its mass; 0 where there is none."""

    @classmethod
    def of(cls, divergence: Divergence, found: Survey) -> "Sure":
        lp, lq = found.teacher.logprobs(found.teacher_at_top), found.student.logprobs(found.student.top)
        sure = (lq > jnp.log(_SURE)) & (not divergence.slopes_cancel)
        slope = contribution_and_slope(divergence, lp, lq)[1]
        return cls(cut=jnp.where(sure, lq - _NEAREST, 1), centre=jnp.where(sure, slope / jnp.exp(lq), 0))


def relative_slopes(slope: Array, logprob: Array, cut: Array, centre: Array) -> Array:
    """The slopes less `centre` times the mass: 0 at the bucket that the student is sure of."""
    return jnp.where(logprob > cut, 0, slope - jnp.exp(logprob) * centre)


def gradient_over_buckets(slope: Float[Array, "M J"], logprob: Float[Array, "M J"]) -> Float[Array, "M J"]:
    """The derivatives by the logits of all buckets, from the slopes by the student's log-probabilities."""
    mass, cut = jnp.exp(logprob), jnp.log(_SURE)
    centre = jnp.where(logprob > cut, slope / mass, 0).sum(-1, keepdims=True)
    relative = relative_slopes(slope, logprob, cut, centre)
    return relative - mass * relative.sum(-1, keepdims=True)
