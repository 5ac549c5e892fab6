"""Value and gradient where the student is sure of one token and the teacher of the same or another, against float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas.linear_kl import Divergence, linear_kl_at_ids, linear_kl_full
from tests.kernels_pallas.interpreters import interpret

VOCAB, NAMED = 128, 8
DIVERGENCES = [
    Divergence("reverse_kl"),
    Divergence("jsd", 0.01),
    Divergence("jsd", 0.99),
    Divergence("skew_kl", 0.1),
    Divergence("skew_kl", 0.9),
]
# By how much the likeliest token leads the next: of the student, and of the teacher, whose is the same or another.
CELLS = list(itertools.product((5, 9, 14, 25, 60), (5, 14, 25, 60), (3, 10)))


def logits(dtype=np.float32):
    """A student's and a teacher's, [cells, VOCAB], such as a model has: around 30, not around 0."""
    rng = np.random.default_rng(0)
    student = rng.normal(size=(len(CELLS), VOCAB))
    teacher = student + 0.5 * rng.normal(size=student.shape)
    for row, (lead, teachers_lead, token) in enumerate(CELLS):
        student[row, 3] = np.delete(student[row], 3).max() + lead
        teacher[row, token] = np.delete(teacher[row], token).max() + teachers_lead
    return np.asarray(student + 30, dtype), np.asarray(teacher + 20, dtype)


def logsumexp(x):
    top = x.max(-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))


def expected(divergence, student, teacher, ids=None):
    """Divergence and derivatives by the student's logits, in float64, without anything that cancels."""
    words, lp = (x.astype(np.float64) - logsumexp(x.astype(np.float64)) for x in (student, teacher))
    lq = words
    if ids is not None:
        lq, lp = (buckets(x, ids) for x in (lq, lp))
    p, q, w = np.exp(lp), np.exp(lq), divergence.weight
    if divergence.name == "forward_kl":
        value, by_mass = p * (lp - lq), -p / q
    elif divergence.name == "reverse_kl":
        value, by_mass = q * (lq - lp), lq - lp
    else:
        lm = np.logaddexp(np.log(w) + lp, np.log1p(-w) + lq)
        if divergence.name == "skew_kl":
            value, by_mass = p * (lp - lm), -(1 - w) * np.exp(lp - lm)
        else:
            value, by_mass = w * p * (lp - lm) + (1 - w) * q * (lq - lm), (1 - w) * (lq - lm)
    slopes = q * (by_mass - (q * by_mass).sum(-1, keepdims=True))
    top = q.argmax(-1)[:, None]
    np.put_along_axis(slopes, top, 0, -1)
    np.put_along_axis(slopes, top, -slopes.sum(-1, keepdims=True), -1)
    if ids is not None:
        rest = slopes[:, -1:] * np.exp(words - lq[:, -1:])
        np.put_along_axis(rest, ids, slopes[:, :-1], -1)
        slopes = rest
    return value.sum(-1), slopes


def buckets(logprobs, ids):
    rest = logprobs.copy()
    np.put_along_axis(rest, ids, -np.inf, -1)
    return np.concatenate([np.take_along_axis(logprobs, ids, -1), logsumexp(rest)], -1)


def found(divergence, student, teacher, ids=None, *, devices=1, **options):
    """The same by `linear_kl`: each token's hidden state picks its own column of the heads."""
    tokens = len(student)
    width = -(-tokens // 64) * 64
    hidden = jnp.eye(tokens, width, dtype=student.dtype)[None]
    heads = [np.pad(x.T, ((0, 0), (0, width - tokens))) for x in (student, teacher)]
    weights = jnp.ones((1, tokens))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("words",))
    options |= {"divergence": divergence, "vocab_axis": "words" if devices > 1 else None}

    def share(hidden, head, teacher_head):
        if ids is None:
            return linear_kl_full(hidden, head, hidden, teacher_head, weights, **options)
        lp = buckets(teacher.astype(np.float64) - logsumexp(teacher.astype(np.float64)), ids).astype(np.float32)
        return linear_kl_at_ids(
            hidden, head, jnp.asarray(ids, jnp.int32)[None], lp[None, :, :-1], lp[None, :, -1], weights, **options
        )

    by_words, same = PartitionSpec("words"), PartitionSpec()
    run = jax.shard_map(share, mesh=mesh, in_specs=(same, by_words, by_words), out_specs=same, check_vma=False)
    gradient = jax.jit(jax.value_and_grad(run if devices > 1 else share, 1, has_aux=True))
    (_, stats), by_head = gradient(hidden, *heads)
    return np.asarray(stats["divergence"])[0], np.asarray(by_head, np.float64).T[:tokens]


def check(divergence, student, teacher, ids=None, *, share=1e-4, **options):
    value, slopes = expected(divergence, student, teacher, ids)
    ours, our_slopes = found(divergence, student, teacher, ids, **options)
    # Float32 rounding of log-probabilities down to -90, which are summed.
    np.testing.assert_allclose(ours, value, rtol=3e-6, atol=3e-6)
    # The same of each token by itself: where both models say nearly the same, that rounding is what tells them apart.
    error = np.abs(our_slopes - slopes).max(-1) / np.abs(slopes).max(-1)
    assert error.max() < share, f"{error.max():.1e} of the largest derivative at {CELLS[error.argmax()]}"


def named(teacher):
    return np.argsort(-teacher)[:, :NAMED]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.name}-{d.weight}")
def test_full(divergence):
    check(divergence, *logits(), block_vocab=48)


@pytest.mark.parametrize("divergence", [Divergence("forward_kl"), *DIVERGENCES], ids=lambda d: f"{d.name}-{d.weight}")
def test_at_ids(divergence):
    student, teacher = logits()
    check(divergence, student, teacher, named(teacher))


def test_shared_words():
    student, teacher = logits()
    check(Divergence("jsd", 0.5), student, teacher, devices=2)
    check(Divergence("skew_kl", 0.5), student, teacher, named(teacher), devices=2)


@pytest.mark.parametrize(
    # The GPU's takes bfloat16, and gives the derivative by a head in it: 8 bits.
    ("platform", "dtype", "share"),
    [("tpu", np.float32, 1e-4), ("gpu", jnp.bfloat16, 0.01)],
)
def test_kernels(platform, dtype, share):
    with interpret(platform):
        check(Divergence("jsd", 0.9), *logits(dtype), share=share, implementation=platform)
