"""How fast a student writes: random weights, no stop tokens, a fixed number of new tokens at temperature 1.

    python -m experiments.benchmarks.sampler --size tiny --batch 64

prints one line of JSON.
"""

import dataclasses
import json
import time
from typing import Literal

import jax
import numpy as np
import tyro

from distill.host_memory import retain_freed_memory
from experiments.benchmarks.machine import machine, peak_rss_mb
from experiments.benchmarks.sizes import NEW_TOKENS, PROMPT_TOKENS, SIZES
from qwen3.engine import Engine, Request
from qwen3.model import Qwen3
from qwen3.rollout import NON_THINKING
from qwen3.sampling import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    size: Literal["tiny", "vocab"] = "tiny"
    batch: int | None = None
    """Sequences written at once; the size's own batch if not given."""
    model: Literal["student", "teacher"] = "student"
    steps: int = 8
    """Measured calls, after one that compiles."""


def main(arguments: Arguments) -> None:
    size = SIZES[arguments.size]
    config = size.student if arguments.model == "student" else size.teacher
    batch = arguments.batch or size.batch_size
    model = Qwen3(config, jax.random.key(0))
    engine = Engine(
        config,
        batch_size=batch,
        max_prompt_tokens=PROMPT_TOKENS,
        max_new_tokens=NEW_TOKENS,
        stop_ids=(),
        pad_id=0,
    )
    prompts = np.random.default_rng(0).integers(16, config.vocab_size, (batch, PROMPT_TOKENS))
    requests = [
        Request(
            prompt_ids=prompt.tolist(),
            prompt_id=str(index),
            sample_index=0,
            mode=NON_THINKING,
            params=SamplingParams(max_new_tokens=NEW_TOKENS),
        )
        for index, prompt in enumerate(prompts)
    ]
    before = peak_rss_mb()
    seconds = []
    for step in range(arguments.steps + 1):
        started = time.perf_counter()
        rollouts = engine.generate(model, requests, seed=0, policy_step=step)
        seconds.append(time.perf_counter() - started)
    assert all(len(rollout.response) == NEW_TOKENS for rollout in rollouts)
    median = float(np.median(seconds[1:]))
    row = {
        "benchmark": "sampler",
        "size": arguments.size,
        "model": arguments.model,
        "batch": batch,
        "step_seconds": round(median, 4),
        "fastest_step_seconds": round(min(seconds[1:]), 4),
        "first_step_seconds": round(seconds[0], 2),
        "steps": arguments.steps,
        "tokens_per_second": round(batch * NEW_TOKENS / median, 1),
        "peak_rss_mb_before": round(before, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        **machine(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    retain_freed_memory()
    main(tyro.cli(Arguments, description=__doc__))
