"""The four losses as elementwise functions of two log-probabilities: what a bucket adds, and its slope.

A distribution over buckets is a vector of log-probabilities. A bucket is an entry (full vocabulary) or, where the
teacher names only some entries, one of those entries or all the remaining ones together. Every loss here is a sum over
buckets.
"""

import dataclasses
import math
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
        """Whether the slopes of the contributions sum to zero by construction: those of forward_kl are q - p."""
        return self.name == "forward_kl"


def contribution_and_slope(
    divergence: Divergence, teacher_logprob: Float[Array, "..."], student_logprob: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """What one bucket adds to the divergence, in nats, and its derivative by `student_logprob`, elementwise; -inf is a
    probability of 0.

    Contributions are written as an f-divergence (with the terms ±p ±q, which sum to zero over all buckets), so that
    every bucket's is non-negative by itself and an error in either log-sum-exp cancels to first order: a student equal
    to its teacher scores 0 to rounding of the second order, and nothing ever needs a clamp. The derivatives are
    written out, since kernels have no differentiation and most terms cancel.
    """
    lp, lq, w = teacher_logprob, student_logprob, divergence.weight
    p, q = jnp.exp(lp), jnp.exp(lq)
    if divergence.name == "forward_kl":
        return _weighted_log_ratio(p, lp, lq) - p + q, q - p
    if divergence.name == "reverse_kl":
        log_ratio = _weighted_log_ratio(q, lq, lp)
        return log_ratio - q + p, log_ratio
    assert w is not None
    if divergence.name == "skew_kl":
        m = w * p + (1 - w) * q
        m = jnp.where(m > 0, m, 1)
        return _weighted_log_ratio(p, lp, jnp.log(m)) + (1 - w) * (q - p), (1 - w) ** 2 * q * ((q - p) / m)
    # Of log q - log m little would be left where p and q, or the weight, leave m near q: so from the smaller's share.
    least = float(jnp.finfo(q.dtype).tiny)
    smaller_to_larger = jnp.minimum(p, q) / jnp.maximum(jnp.maximum(p, q), least)
    log_m_to_larger = _log1p(jnp.where(q < p, 1 - w, w) * (smaller_to_larger - 1))
    log_p_to_q = jnp.maximum(lp, math.log(least)) - jnp.maximum(lq, math.log(least))
    slope = -(1 - w) * q * (log_m_to_larger + jnp.maximum(log_p_to_q, 0))
    return slope - w * p * (log_m_to_larger + jnp.maximum(-log_p_to_q, 0)), slope


def _log1p(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 + x); Mosaic GPU has none. What rounding 1 + x loses is put back to first order."""
    y = 1 + x
    return jnp.log(y) + (x - (y - 1)) / y


def _weighted_log_ratio(mass: Array, log_mass: Array, log_other: Array) -> Array:
    """mass·(log_mass - log_other), 0 where mass is 0 (0·log 0 = 0), without NaN in value or derivative."""
    empty = mass == 0
    return jnp.where(empty, 0, mass * (jnp.where(empty, 0, log_mass) - jnp.where(empty, 0, log_other)))
