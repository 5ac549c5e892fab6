"""The four losses as elementwise functions of two log-probabilities: what a bucket adds, and its slope.

A distribution over buckets is a vector of log-probabilities. A bucket is a word (full vocabulary) or, where the
teacher names only some words, one of those words or all the remaining ones together. Every loss here is a sum over
buckets.
"""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Which divergence between the teacher's p and the student's q; `m` is the mixture `weight·p + (1-weight)·q`.

    - `forward_kl`: KL(p‖q), `reverse_kl`: KL(q‖p); neither takes a weight.
    - `jsd`: weight·KL(p‖m) + (1-weight)·KL(q‖m), the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649).
      At weight 0.5 it is symmetric and at most ln 2.
    - `skew_kl`: KL(p‖m), the skew KL of DistiLLM (arXiv 2402.03898); weight 0 is `forward_kl`.

    Raises ValueError for an unknown name, or a weight that is missing, superfluous or outside its range.
    """

    name: DivergenceName
    weight: float | None = None

    def __post_init__(self) -> None:
        names = get_args(DivergenceName)
        if self.name not in names:
            raise ValueError(f"name {self.name!r} is not a divergence; use one of {', '.join(names)}")
        if self.name in ("forward_kl", "reverse_kl"):
            if self.weight is not None:
                raise ValueError(
                    f"weight {self.weight!r} has no meaning for {self.name}; remove it, or use jsd or skew_kl"
                )
        elif self.weight is None or not 0 < self.weight < 1:
            raise ValueError(f"weight {self.weight!r} of {self.name} must lie strictly between 0 and 1, such as 0.5")

    @property
    def slopes_cancel(self) -> bool:
        """Whether the slopes of `contribution` sum to zero by construction: those of forward_kl are q - p."""
        return self.name == "forward_kl"


def contribution(
    divergence: Divergence, teacher_logprob: Float[Array, "..."], student_logprob: Float[Array, "..."]
) -> Float[Array, "..."]:
    """What one bucket adds to the divergence, in nats; -inf is a probability of 0, also for the derivative.

    Written as an f-divergence (with the terms ±p ±q, which sum to zero over all buckets), so that every bucket's
    contribution is non-negative by itself and an error in either log-sum-exp cancels to first order: a student equal
    to its teacher scores 0 to rounding of the second order, and nothing ever needs a clamp.
    """
    p, q = jnp.exp(teacher_logprob), jnp.exp(student_logprob)
    if divergence.name == "forward_kl":
        return _weighted_log_ratio(p, teacher_logprob, student_logprob) - p + q
    if divergence.name == "reverse_kl":
        return _weighted_log_ratio(q, student_logprob, teacher_logprob) - q + p
    w = divergence.weight
    assert w is not None
    m = w * p + (1 - w) * q
    log_m = jnp.log(jnp.where(m > 0, m, 1))
    if divergence.name == "skew_kl":
        return _weighted_log_ratio(p, teacher_logprob, log_m) - p + m
    return w * _weighted_log_ratio(p, teacher_logprob, log_m) + (1 - w) * _weighted_log_ratio(q, student_logprob, log_m)


def contribution_and_slope(
    divergence: Divergence, teacher_logprob: Float[Array, "..."], student_logprob: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`contribution` and its derivative by `student_logprob`, elementwise.

    The derivatives are written out, since kernels have no differentiation and most terms cancel.
    """
    value = contribution(divergence, teacher_logprob, student_logprob)
    p, q = jnp.exp(teacher_logprob), jnp.exp(student_logprob)
    if divergence.name == "forward_kl":
        return value, q - p
    if divergence.name == "reverse_kl":
        return value, _weighted_log_ratio(q, student_logprob, teacher_logprob)
    w = divergence.weight
    assert w is not None
    m = w * p + (1 - w) * q
    m = jnp.where(m > 0, m, 1)
    if divergence.name == "skew_kl":
        return value, (1 - w) ** 2 * q * (q - p) / m
    return value, (1 - w) * _weighted_log_ratio(q, student_logprob, jnp.log(m))


def _weighted_log_ratio(mass: Array, log_mass: Array, log_other: Array) -> Array:
    """mass·(log_mass - log_other), 0 where mass is 0 (0·log 0 = 0), without NaN in value or derivative."""
    empty = mass == 0
    return jnp.where(empty, 0, mass * (jnp.where(empty, 0, log_mass) - jnp.where(empty, 0, log_other)))
