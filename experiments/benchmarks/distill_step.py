"""How fast a student learns from a live teacher: teacher forward, exact divergence over the whole vocabulary, AdamW.

    python -m experiments.benchmarks.distill_step --size vocab --mode off

prints one line of JSON. `off`: rows of random tokens, forward KL, every position trained. `on`: the student first
generates the continuations of random prompts at temperature 1, then reverse KL on what it generated.
"""

import dataclasses
import json
import time
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from jaxtyping import Int

from distill.training.host_memory import keep_freed_memory
from distill.training.losses import Loss
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, TrainStep
from experiments.benchmarks.machine import machine
from experiments.benchmarks.sampler import Sampling
from experiments.benchmarks.sizes import SIZES, Size
from experiments.benchmarks.turns import LEARNING_RATE, peak_rss_mb
from qwen3.decoder.model import Qwen3
from qwen3.sharding import MeshShape, make_mesh
from teacher.scoring import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    size: Literal["tiny", "vocab"] = "tiny"
    mode: Literal["off", "on"] = "off"
    steps: int = 12
    """Steps in all."""
    warm: int = 3
    """Steps at the beginning that are not counted; the first one compiles."""


class Distillation:
    """A student that learns from a live teacher, step by step."""

    def __init__(self, teacher: Qwen3, student: Qwen3, *, rows: int, sequence_tokens: int, prompt_tokens: int | None):
        """Off-policy where `prompt_tokens` is None; else the student generates all that follows so many tokens."""
        self._prompt_tokens = prompt_tokens
        mesh = make_mesh(MeshShape(data=1), jax.devices()[:1])
        self._scorer = Scorer(teacher, mesh)
        transformation = optax.adamw(LEARNING_RATE, b1=0.9, b2=0.999, weight_decay=0.0)
        self._train_step = TrainStep(
            transformation=transformation,
            loss=Loss(name="forward_kl" if prompt_tokens is None else "reverse_kl"),
            mesh=mesh,
            teacher_head=self._scorer.head,
        )
        self._sampling = (
            None
            if prompt_tokens is None
            else Sampling(
                student.config, rows=rows, prompt_tokens=prompt_tokens, new_tokens=sequence_tokens - prompt_tokens
            )
        )
        self._state = TrainState.start(student, transformation, mesh)
        self._steps = 0

    def step(self, tokens: Int[np.ndarray, "B T"]) -> "Done":
        """Learn from the teacher on `tokens`, of which only the prompts count on-policy."""
        sampling_seconds = None
        if self._sampling is not None:
            started = time.perf_counter()
            tokens = self._sampling.write(self._state.model, tokens, self._steps)
            sampling_seconds = time.perf_counter() - started
        self._state, result = self._train_step(self._state, [self._batch(tokens)])
        self._steps += 1
        return Done(loss=result.metrics["loss"], sampling_seconds=sampling_seconds)

    def _batch(self, tokens: Int[np.ndarray, "B T"]) -> Batch:
        """Every position with a next token is trained; on-policy those whose next token the student generated."""
        length = tokens.shape[1]
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        first = 0 if self._prompt_tokens is None else self._prompt_tokens - 1
        arrays = {
            "tokens": tokens,
            "positions": positions,
            "segment_ids": np.ones_like(tokens),
            "loss_mask": (positions >= first) & (positions < length - 1),
            "mode": np.zeros(tokens.shape, np.uint8),
        }
        return Batch.of(arrays, self._scorer.hidden(tokens, positions, arrays["segment_ids"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """What one step measured."""

    loss: float
    sampling_seconds: float | None


def main(arguments: Arguments) -> None:
    print(json.dumps(measure(SIZES[arguments.size], arguments)))


def measure(size: Size, arguments: Arguments) -> dict[str, Any]:
    """One result: what was measured, and on what."""
    on_policy = arguments.mode == "on"
    distillation = Distillation(
        Qwen3(size.teacher, jax.random.key(0)),
        Qwen3(size.student, jax.random.key(1)),
        rows=size.batch_size,
        sequence_tokens=size.sequence_tokens,
        prompt_tokens=size.prompt_tokens if on_policy else None,
    )
    before = peak_rss_mb()
    random = np.random.default_rng(0)
    seconds, done = [], []
    for _ in range(arguments.steps):
        tokens = random.integers(16, size.student.vocab_size, (size.batch_size, size.sequence_tokens), dtype=np.int32)
        started = time.perf_counter()
        done.append(distillation.step(tokens))
        seconds.append(time.perf_counter() - started)
    counted = seconds[arguments.warm :]
    median = float(np.median(counted))
    sampling = [one.sampling_seconds for one in done[arguments.warm :] if one.sampling_seconds is not None]
    trained = size.batch_size * (size.new_tokens if on_policy else size.sequence_tokens)
    row = {
        "benchmark": "distill_step",
        "size": arguments.size,
        "mode": arguments.mode,
        "step_seconds": round(median, 4),
        "fastest_step_seconds": round(min(counted), 4),
        "slowest_step_seconds": round(max(counted), 4),
        "first_step_seconds": round(seconds[0], 2),
        "sampling_seconds": round(float(np.median(sampling)), 4) if sampling else None,
        "steps": len(counted),
        "tokens_per_second": round(trained / median, 1),
        "peak_rss_mb_before": round(before, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "first_loss": done[0].loss,
        "last_loss": done[-1].loss,
        **machine(),
    }
    return {name: value for name, value in row.items() if value is not None}


if __name__ == "__main__":
    keep_freed_memory()
    main(tyro.cli(Arguments, description=__doc__))
