"""How far a divergence at the student's own ids is from that over the whole vocabulary, in nats a token.

    python -m experiments.benchmarks.student_top_k [--student runs/NAME/export]
    python -m experiments.benchmarks.student_top_k --synthetic

prints a line of JSON for each text, divergence and k. Texts are the student's own answers to held-out problems of the
quickstart, as on-policy distillation samples them. With `--synthetic` the vocabulary has 151,936 tokens, and both
models' distributions have Zipf's heavy tail: logits are minus the logarithm of a token's rank, plus a context's
preference for some tokens, plus a difference between student and teacher. `bias_nats` is what the one bucket for all
tokens that are not named hides; it is never negative. `gradient_cosine` compares the gradients by the student's hidden
states of all positions.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int

from distill.training.host_memory import keep_freed_memory
from distill.training.losses import Loss, distillation_loss
from experiments.benchmarks.machine import machine
from experiments.benchmarks.quantised_teacher import Solving, padded
from experiments.quickstart import STUDENT, TEACHER
from qwen3.checkpoint import hf
from qwen3.rollout import MODES
from teacher.targets import Hidden, Targets, at_ids_targets, following_tokens, top_k_targets

VOCABULARY = 151_936
_POSITIONS, _WIDTH = 256, 64
LOSSES = (Loss(name="forward_kl"), Loss(name="reverse_kl"), Loss(name="jsd", weight=0.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    student: str = STUDENT
    """Folder of the student in Hugging Face format."""
    problems: int = 100
    """Held-out problems, each asked in both modes."""
    ks: tuple[int, ...] = (1, 4, 16, 64)
    """Likeliest tokens of student and teacher."""
    synthetic: bool = False
    """Take made-up distributions over 151,936 tokens instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Final hidden states and output matrices of student and teacher at some positions, and what was sampled there."""

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V D"]
    teacher_hidden: Float[Array, "B T Dt"]
    teacher_head: Float[Array, "V Dt"]
    sampled: Int[Array, "B T"]
    mask: Bool[np.ndarray, "B T"]


def main(arguments: Arguments) -> None:
    pairs = [("synthetic", synthetic())] if arguments.synthetic else quickstart(arguments.student, arguments.problems)
    for text, pair in pairs:
        for row in measured(pair, arguments.ks):
            print(json.dumps({"benchmark": "student_top_k", "text": text} | row | machine()), flush=True)


def quickstart(folder: str, problems: int) -> Iterator[tuple[str, Pair]]:
    """By mode, on what the student samples at the evaluation's settings."""
    student, teacher = hf.load(folder), hf.load(TEACHER)
    solving = Solving(student.config, problems)
    for mode in MODES:
        tokens, mask = padded(solving.write(student, mode))
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        rows = tokens, positions, np.ones_like(tokens)
        hidden, teacher_hidden = (jax.jit(type(one).hidden)(one, *rows) for one in (student, teacher))
        yield (
            mode,
            Pair(
                hidden=hidden,
                head=student.head,
                teacher_hidden=teacher_hidden,
                teacher_head=teacher.head,
                sampled=following_tokens(jnp.asarray(tokens)),
                mask=mask,
            ),
        )


def synthetic(vocabulary: int = VOCABULARY, positions: int = _POSITIONS, width: int = _WIDTH) -> Pair:
    """Zipf's law with exponent 1, contexts that prefer some tokens by a few nats, and a student half a nat off."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(vocabulary, width)) / np.sqrt(width)
    zipf = -np.log1p(np.arange(vocabulary))[:, None]
    context = rng.normal(size=(1, positions, width)) * 3
    off = rng.normal(size=(1, positions, width)) * 0.7
    # A last feature of every context is 1, and multiplies the law that all contexts share.
    one = np.ones((1, positions, 1))
    head = jnp.asarray(np.concatenate((features, zipf), axis=1), jnp.float32)
    hidden, teacher_hidden = (
        jnp.asarray(np.concatenate((states, one), axis=-1), jnp.float32) for states in (context + off, context)
    )
    logits = np.einsum("TD,VD->TV", np.asarray(hidden[0], np.float64), np.asarray(head, np.float64))
    gumbel = rng.gumbel(size=logits.shape)
    return Pair(
        hidden=hidden,
        head=head,
        teacher_hidden=teacher_hidden,
        teacher_head=head,
        sampled=jnp.asarray(np.argmax(logits + gumbel, axis=-1)[None], jnp.int32),
        mask=np.ones((1, positions), bool),
    )


def measured(pair: Pair, ks: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Every divergence by the whole vocabulary and by each k."""
    weights = jnp.asarray(pair.mask / pair.mask.sum(), jnp.float32)
    whole = Hidden(hidden=pair.teacher_hidden)
    supports = {k: _support(pair, k) for k in ks}
    for loss in LOSSES:
        (exact, statistics), slopes = _with_gradient(loss, pair, whole, weights, pair.teacher_head)
        for k, targets in supports.items():
            (coarse, named), own = _with_gradient(loss, pair, targets, weights, None)
            yield {
                "loss": loss.name,
                "k": k,
                "positions": int(pair.mask.sum()),
                "student_entropy_nats": _mean(statistics["student_entropy"], pair.mask),
                "student_support_mass": _mean(named["student_support_mass"], pair.mask),
                "whole_nats": float(exact),
                "ids_nats": float(coarse),
                "bias_nats": float(exact - coarse),
                "gradient_cosine": float(jnp.vdot(slopes, own) / jnp.linalg.norm(slopes) / jnp.linalg.norm(own)),
            }


def _support(pair: Pair, k: int) -> Targets:
    likeliest = top_k_targets(pair.hidden, pair.head, k).ids
    asked = jnp.concatenate((likeliest, pair.sampled[..., None]), axis=-1)
    return at_ids_targets(pair.teacher_hidden, pair.teacher_head, asked, top_k=k)


def _with_gradient(loss: Loss, pair: Pair, targets: Targets, weights: Array, teacher_head: Array | None) -> Any:
    """Value, statistics and the gradient by the student's hidden states."""
    return _gradient(loss)(pair.hidden, pair.head, targets, weights, teacher_head)


@functools.cache
def _gradient(loss: Loss) -> Any:
    def value(hidden: Array, head: Array, targets: Targets, weights: Array, teacher_head: Array | None) -> Any:
        return distillation_loss(hidden, head, targets, weights, loss, teacher_head=teacher_head)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def _mean(values: Float[Array, "B T"], mask: Bool[np.ndarray, "B T"]) -> float:
    return float(np.mean(np.asarray(values)[mask]))


if __name__ == "__main__":
    keep_freed_memory()
    main(tyro.cli(Arguments, description=__doc__))
