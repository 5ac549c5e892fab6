"""How fast a student generates: random weights, no stop tokens, a fixed number of new tokens at temperature 1.

    python -m experiments.benchmarks.sampler --size tiny --batch 64

prints one line of JSON.
"""

import dataclasses
import json
import time
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jaxtyping import Int

from distill.training.host_memory import keep_freed_memory
from experiments.benchmarks.machine import machine
from experiments.benchmarks.sizes import SIZES, Size
from experiments.benchmarks.turns import peak_rss_mb
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.generation.engine import Engine, Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import NON_THINKING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    size: Literal["tiny", "vocab"] = "tiny"
    batch: int | None = None
    """Sequences generated at once; the size's own batch if not given."""
    model: Literal["student", "teacher"] = "student"
    steps: int = 8
    """Measured calls, after one that compiles."""


class Sampling:
    """A model that writes `new_tokens` after every prompt, at temperature 1, whatever they are."""

    def __init__(self, config: ModelConfig, *, rows: int, prompt_tokens: int, new_tokens: int):
        self._prompt_tokens = prompt_tokens
        self._params = SamplingParams(max_new_tokens=new_tokens)
        self._engine = Engine(
            config, batch_size=rows, max_prompt_tokens=prompt_tokens, max_new_tokens=new_tokens, stop_ids=(), pad_id=0
        )

    def write(self, model: Qwen3, tokens: Int[np.ndarray, "B T"], step: int) -> Int[np.ndarray, "B T"]:
        """The prompts at the beginning of `tokens`, and what the model goes on with; `step` seeds it."""
        requests = [
            Request(
                prompt_ids=row[: self._prompt_tokens].tolist(),
                prompt_id=str(index),
                sample_index=0,
                mode=NON_THINKING,
                params=self._params,
            )
            for index, row in enumerate(tokens)
        ]
        return np.stack(
            [rollout.tokens for rollout in self._engine.generate(model, requests, seed=0, policy_step=step)]
        )


def main(arguments: Arguments) -> None:
    print(json.dumps(measure(SIZES[arguments.size], arguments)))


def measure(size: Size, arguments: Arguments) -> dict[str, Any]:
    """One result: what was measured, and on what."""
    config = size.student if arguments.model == "student" else size.teacher
    batch = arguments.batch or size.batch_size
    model = Qwen3(config, jax.random.key(0))
    sampling = Sampling(config, rows=batch, prompt_tokens=size.prompt_tokens, new_tokens=size.new_tokens)
    prompts = np.random.default_rng(0).integers(16, config.vocab_size, (batch, size.prompt_tokens))
    before = peak_rss_mb()
    seconds = []
    for step in range(arguments.steps + 1):
        started = time.perf_counter()
        written = sampling.write(model, prompts, step)
        seconds.append(time.perf_counter() - started)
        assert written.shape == (batch, size.sequence_tokens)
    median = float(np.median(seconds[1:]))
    return {
        "benchmark": "sampler",
        "size": arguments.size,
        "model": arguments.model,
        "batch": batch,
        "step_seconds": round(median, 4),
        "fastest_step_seconds": round(min(seconds[1:]), 4),
        "first_step_seconds": round(seconds[0], 2),
        "steps": arguments.steps,
        "tokens_per_second": round(batch * size.new_tokens / median, 1),
        "peak_rss_mb_before": round(before, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        **machine(),
    }


if __name__ == "__main__":
    keep_freed_memory()
    main(tyro.cli(Arguments, description=__doc__))
