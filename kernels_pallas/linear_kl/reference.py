"""The divergence written as its definition over whole [B, T, V] arrays, to hold the blocked implementation against.

Deliberately shares nothing with it: plain log-softmax and textbook formulas in the input's own dtype, so that float64
inputs give a float64 answer. Never optimised.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from kernels_pallas.linear_kl.divergence import Divergence


def full(hidden, head, teacher_hidden, teacher_head, weights, *, divergence: Divergence):
    """As `api.linear_kl_full`."""
    live = weights != 0
    student = _softmax(jnp.where(live[..., None], hidden, 0), head)
    teacher = _softmax(jnp.where(live[..., None], teacher_hidden, 0), teacher_head)
    divergences = _divergence(divergence, teacher, student)
    stats = {
        "divergence": divergences,
        "student_entropy": -xlogy(student, student).sum(-1),
        "teacher_entropy": -xlogy(teacher, teacher).sum(-1),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).astype(hidden.dtype),
    }
    return (weights * divergences).sum(), {name: jnp.where(live, value, 0) for name, value in stats.items()}


def at_ids(hidden, head, ids, teacher_logprobs, teacher_log_tail, weights, *, divergence: Divergence):
    """As `api.linear_kl_at_ids`."""
    live = weights != 0
    ids = jnp.where(live[..., None], ids, -1)
    entries = _softmax(jnp.where(live[..., None], hidden, 0), head)
    named = jax.nn.one_hot(ids, head.shape[0], dtype=entries.dtype)  # all zeros for -1
    student = jnp.concatenate(
        [jnp.einsum("BTJV,BTV->BTJ", named, entries), (entries * (1 - named.sum(-2))).sum(-1, keepdims=True)], -1
    )
    teacher_named = jnp.where(ids < 0, 0, jnp.exp(teacher_logprobs))
    teacher_tail = jnp.where(live, jnp.exp(teacher_log_tail), 1)
    teacher = jnp.concatenate([teacher_named, teacher_tail[..., None]], -1)
    divergences = _divergence(divergence, teacher, student)
    teacher_top = jnp.take_along_axis(ids, teacher_named.argmax(-1)[..., None], -1)[..., 0]
    stats = {
        "divergence": divergences,
        "student_entropy": -xlogy(entries, entries).sum(-1),
        "teacher_entropy": -xlogy(teacher, teacher).sum(-1),
        "top1_agreement": (entries.argmax(-1) == teacher_top).astype(hidden.dtype),
        "teacher_tail_mass": teacher_tail,
        "student_support_mass": student[..., :-1].sum(-1),
    }
    return (weights * divergences).sum(), {name: jnp.where(live, value, 0) for name, value in stats.items()}


def logprobs(hidden, head, ids):
    """As `api.linear_logprobs`."""
    live = ids >= 0
    entries = _softmax(jnp.where(live[..., None], hidden, 0), head)
    chosen = jnp.take_along_axis(entries, jnp.where(live, ids, 0)[..., None], -1)[..., 0]
    entropy = -xlogy(entries, entries).sum(-1)
    return jnp.where(live, jnp.log(chosen), 0), jnp.where(live, entropy, 0)


def _softmax(hidden: Float[Array, "B T D"], head: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    return jax.nn.softmax(jnp.einsum("BTD,VD->BTV", hidden, head), axis=-1)


def _divergence(divergence: Divergence, p: Float[Array, "B T V"], q: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    w = divergence.weight
    if divergence.name == "forward_kl":
        return _kl(p, q)
    if divergence.name == "reverse_kl":
        return _kl(q, p)
    assert w is not None
    mixture = w * p + (1 - w) * q
    if divergence.name == "skew_kl":
        return _kl(p, mixture)
    return w * _kl(p, mixture) + (1 - w) * _kl(q, mixture)


def _kl(a: Float[Array, "B T V"], b: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    """Σ a·log(a/b) with 0·log 0 = 0, and a derivative there too (that of xlogy is not finite)."""
    held = a > 0
    return jnp.where(held, a * (jnp.log(jnp.where(held, a, 1)) - jnp.log(jnp.where(held, b, 1))), 0).sum(-1)
