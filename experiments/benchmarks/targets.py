"""How far a divergence from coarser targets is from that over the whole vocabulary, in nats a token, and their bytes.

    python -m experiments.benchmarks.targets [--student runs/NAME/export]
    python -m experiments.benchmarks.targets --synthetic

prints a line of JSON for each text, kind of target and divergence: at the student's own ids (`StudentTopK`), at the
teacher's likeliest tokens as a server sends them, and at these as a store keeps them, in 16 bits. Texts are the
student's own answers to held-out problems of the quickstart, at the settings of its evaluation. With `--synthetic` the
vocabulary has 151,936 tokens, and both models' distributions have Zipf's heavy tail: logits are minus the logarithm of
a token's rank, plus a context's preference for some tokens, plus a difference between student and teacher, all
multiplied by `--sharpness`. `bias_nats` is what the one bucket for all tokens that are not named hides.
`gradient_cosine` compares the gradients by the student's hidden states of all positions.
"""

import dataclasses
import functools
import json
import tempfile
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
from qwen3.rollout import MODES, THINKING, Rollout
from teacher.scored_rollout import ScoredRollout
from teacher.store import TargetStore, TargetStoreWriter
from teacher.targets import Hidden, Targets, TopK, at_ids_targets, following_tokens, top_k_targets

VOCABULARY = 151_936
_POSITIONS, _WIDTH = 256, 64
_STORED_TARGETS = 20_000
_ENTRY_BYTES = 8
"""An id and a log-probability, as a server sends them."""
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
    sent: int = 64
    """The teacher's likeliest tokens that a server sends."""
    stored: int = 24
    """Those that a store keeps."""
    synthetic: bool = False
    """Take made-up distributions over 151,936 tokens instead."""
    sharpness: float = 2.0
    """What their logits are multiplied by: at 1 their entropy is 5 nats, as of a language model without a context."""


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
    pairs = (
        [(f"synthetic, sharpness {arguments.sharpness:g}", synthetic(arguments.sharpness))]
        if arguments.synthetic
        else quickstart(arguments.student, arguments.problems)
    )
    for text, pair in pairs:
        for row in measured(pair, arguments):
            print(json.dumps({"benchmark": "targets", "text": text} | row | machine()), flush=True)


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


def synthetic(sharpness: float, vocabulary: int = VOCABULARY, positions: int = _POSITIONS, width: int = _WIDTH) -> Pair:
    """Zipf's law, contexts that prefer some tokens by a few nats, and a student half a nat off."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(vocabulary, width)) / np.sqrt(width)
    zipf = -np.log1p(np.arange(vocabulary))[:, None]
    context = rng.normal(size=(1, positions, width)) * 3
    off = rng.normal(size=(1, positions, width)) * 0.7
    # A last feature of every context is 1, and multiplies the law that all contexts share.
    one = np.ones((1, positions, 1))
    head = jnp.asarray(np.concatenate((features, zipf), axis=1), jnp.float32)
    hidden, teacher_hidden = (
        jnp.asarray(sharpness * np.concatenate((states, one), axis=-1), jnp.float32)
        for states in (context + off, context)
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


def measured(pair: Pair, arguments: Arguments) -> Iterator[dict[str, Any]]:
    """Every divergence from every kind of target."""
    weights = jnp.asarray(pair.mask / pair.mask.sum(), jnp.float32)
    whole = Hidden(hidden=pair.teacher_hidden)
    width = pair.teacher_hidden.shape[-1]
    kinds = {f"student's {k}": (_at_students_ids(pair, k), _ENTRY_BYTES * (2 * k + 1) + 4.0) for k in arguments.ks}
    kinds[f"teacher's {arguments.sent}"] = (
        top_k_targets(pair.teacher_hidden, pair.teacher_head, arguments.sent),
        _ENTRY_BYTES * arguments.sent + 4.0,
    )
    kinds[f"stored {arguments.stored}"] = stored(pair, arguments.stored)
    for loss in LOSSES:
        (exact, statistics), slopes = _with_gradient(loss, pair, whole, weights, pair.teacher_head)
        yield {"targets": "hidden", "loss": loss.name, "nats": float(exact), "bytes_a_token_in_bfloat16": 2 * width}
        for kind, (targets, size) in kinds.items():
            (coarse, named), own = _with_gradient(loss, pair, targets, weights, None)
            yield {
                "targets": kind,
                "loss": loss.name,
                "positions": int(pair.mask.sum()),
                "student_entropy_nats": _mean(statistics["student_entropy"], pair.mask),
                "student_mass_outside": 1 - _mean(named["student_support_mass"], pair.mask),
                "nats": float(coarse),
                "bias_nats": float(exact - coarse),
                "gradient_cosine": float(jnp.vdot(slopes, own) / jnp.linalg.norm(slopes) / jnp.linalg.norm(own)),
                "bytes_a_token": size,
            }


def _at_students_ids(pair: Pair, k: int) -> Targets:
    likeliest = top_k_targets(pair.hidden, pair.head, k).ids
    asked = jnp.concatenate((likeliest, pair.sampled[..., None]), axis=-1)
    return at_ids_targets(pair.teacher_hidden, pair.teacher_head, asked, top_k=k)


def stored(pair: Pair, k: int) -> tuple[TopK, float]:
    """The teacher's k likeliest tokens as they come back from a store, and its bytes a position with a target."""
    top = jax.device_get(top_k_targets(pair.teacher_hidden, pair.teacher_head, k))
    records = []
    for row, mask in enumerate(pair.mask):
        length = len(mask)
        rollout = Rollout(
            tokens=np.asarray(pair.sampled[row], np.int32), prompt_length=1, loss_mask=mask,
            sampler_logprobs=np.zeros(length, np.float32), mode=THINKING, prompt_id=str(row), sample_index=0,
            policy_step=0, finished=True,
        )  # fmt: skip
        said = {"ids": top.ids[row], "logprobs": top.logprobs[row], "log_tail": top.log_tail[row]}
        records.append(ScoredRollout(rollout=rollout, **said))
    with tempfile.TemporaryDirectory() as folder:
        writer = TargetStoreWriter(folder, {"teacher": "benchmark"})
        # So many that a file's own blocks of 64 KiB do not count.
        writer.write_shard(0, records * -(-_STORED_TARGETS // int(pair.mask.sum())))
        writer.finish()
        store = TargetStore.open(folder)
        read = [store[index] for index in range(len(records))]
    arrays: dict[str, Any] = {
        name: np.stack([getattr(record, name) for record in read]) for name in ("ids", "logprobs", "log_tail")
    }
    return TopK(**arrays), store.size_bytes / store.targets


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
