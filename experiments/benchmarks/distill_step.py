"""How fast a student learns from a live teacher: teacher forward, exact divergence over the whole vocabulary, AdamW.

    python -m experiments.benchmarks.distill_step --size vocab --mode off

prints one line of JSON. `off`: rows of random tokens, forward KL, every position trained. `on`: the student first
writes the continuations of random prompts at temperature 1, then reverse KL on what it wrote.
"""

import dataclasses
import json
import time
from typing import Literal

import jax
import numpy as np
import optax
import tyro

from distill.host_memory import retain_freed_memory
from distill.losses import Loss
from distill.train_state import TrainState
from distill.train_step import Batch, TrainStep
from experiments.benchmarks.machine import machine, peak_rss_mb
from experiments.benchmarks.sizes import NEW_TOKENS, PROMPT_TOKENS, SEQUENCE_TOKENS, SIZES
from qwen3.engine import Engine, Request
from qwen3.model import Qwen3
from qwen3.rollout import NON_THINKING
from qwen3.sampling import SamplingParams
from qwen3.sharding import MeshShape, make_mesh
from teacher.scoring import Scorer

LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    size: Literal["tiny", "vocab"] = "tiny"
    mode: Literal["off", "on"] = "off"
    steps: int = 12
    """Steps in all."""
    warm: int = 3
    """Steps at the beginning that are not counted; the first one compiles."""


def main(arguments: Arguments) -> None:
    size, on_policy = SIZES[arguments.size], arguments.mode == "on"
    rows = size.batch_size
    mesh = make_mesh(MeshShape(data=1), jax.devices()[:1])
    scorer = Scorer(Qwen3(size.teacher, jax.random.key(0)), mesh)
    transformation = optax.adamw(LEARNING_RATE, b1=0.9, b2=0.999, weight_decay=0.0)
    train_step = TrainStep(
        transformation=transformation,
        loss=Loss(name="reverse_kl" if on_policy else "forward_kl"),
        mesh=mesh,
        teacher_head=scorer.head,
    )
    engine = Engine(
        size.student,
        batch_size=rows,
        max_prompt_tokens=PROMPT_TOKENS,
        max_new_tokens=NEW_TOKENS,
        stop_ids=(),
        pad_id=0,
    )
    student = Qwen3(size.student, jax.random.key(1))
    data = np.random.default_rng(0).integers(16, size.student.vocab_size, (arguments.steps, rows, SEQUENCE_TOKENS))
    before = peak_rss_mb()
    state = TrainState.start(student, transformation, mesh)
    del student
    seconds, sampling_seconds, losses = [], [], []
    for step in range(arguments.steps):
        started = time.perf_counter()
        tokens = data[step].astype(np.int32)
        if on_policy:
            tokens = _written(engine, state.model, tokens, step)
            sampling_seconds.append(time.perf_counter() - started)
        state, result = train_step(state, [_batch(tokens, scorer, on_policy)])
        losses.append(result.metrics["loss"])
        seconds.append(time.perf_counter() - started)
    counted = seconds[arguments.warm :]
    median = float(np.median(counted))
    trained = rows * (NEW_TOKENS if on_policy else SEQUENCE_TOKENS)
    row = {
        "benchmark": "distill_step",
        "size": arguments.size,
        "mode": arguments.mode,
        "step_seconds": round(median, 4),
        "fastest_step_seconds": round(min(counted), 4),
        "slowest_step_seconds": round(max(counted), 4),
        "first_step_seconds": round(seconds[0], 2),
        "sampling_seconds": round(float(np.median(sampling_seconds[arguments.warm :])), 4) if on_policy else None,
        "steps": len(counted),
        "tokens_per_second": round(trained / median, 1),
        "peak_rss_mb_before": round(before, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **machine(),
    }
    print(json.dumps({name: value for name, value in row.items() if value is not None}))


def _written(engine: Engine, model: Qwen3, tokens: np.ndarray, step: int) -> np.ndarray:
    requests = [
        Request(
            prompt_ids=row[:PROMPT_TOKENS].tolist(),
            prompt_id=str(index),
            sample_index=0,
            mode=NON_THINKING,
            params=SamplingParams(max_new_tokens=NEW_TOKENS),
        )
        for index, row in enumerate(tokens)
    ]
    return np.stack([rollout.tokens for rollout in engine.generate(model, requests, seed=0, policy_step=step)])


def _batch(tokens: np.ndarray, scorer: Scorer, on_policy: bool) -> Batch:
    """Every position with a next token is trained; on-policy those whose next token the student wrote."""
    length = tokens.shape[1]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    first = PROMPT_TOKENS - 1 if on_policy else 0
    arrays = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": np.ones_like(tokens),
        "loss_mask": (positions >= first) & (positions < length - 1),
        "mode": np.zeros(tokens.shape, np.uint8),
    }
    return Batch.of(arrays, scorer.hidden(tokens, positions, arrays["segment_ids"]))


if __name__ == "__main__":
    retain_freed_memory()
    main(tyro.cli(Arguments, description=__doc__))
