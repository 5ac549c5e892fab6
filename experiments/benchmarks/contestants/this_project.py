"""This project's side of `against_peers`: the train step and engine that experiments run."""

import itertools

from distill.training.host_memory import keep_freed_memory
from experiments.benchmarks.distill_step import Distillation
from experiments.benchmarks.sampler import Sampling
from experiments.benchmarks.turns import Turns, Work
from qwen3.checkpoint.hf import load

work, turns = Work.from_argument(), Turns("jax", "flax", "optax")
keep_freed_memory()
if work.mode == "sample":
    model = load(work.student)
    sampling = Sampling(model.config, rows=work.rows, prompt_tokens=work.prompt_tokens, new_tokens=work.new_tokens)
    for step in itertools.count():
        tokens = work.tokens(step)
        turns.begin()
        sampling.write(model, tokens, step)
        turns.end()
distillation = Distillation(
    load(work.teacher),
    load(work.student),
    rows=work.rows,
    sequence_tokens=work.sequence_tokens,
    prompt_tokens=work.prompt_tokens if work.mode == "on" else None,
)
for step in itertools.count():
    tokens = work.tokens(step)
    turns.begin()
    done = distillation.step(tokens)
    turns.end(loss=done.loss, sampling_seconds=done.sampling_seconds)
