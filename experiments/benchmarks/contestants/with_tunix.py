"""Tunix's side of `against_peers`: DistillationTrainer with LogitStrategy, and its Sampler.

Tunix 0.1.7 has no on-policy distillation. Its Sampler and its trainer are composed here: the data of every step are
what the current student generates, and the loss stays its forward KL.
"""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation.distillation_trainer import DistillationTrainer, TrainingConfig, TrainingInput
from tunix.distillation.strategies.logit import LogitStrategy
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig
from tunix.models.qwen3.params import create_model_from_safe_tensors

from experiments.benchmarks.turns import LEARNING_RATE, Turns, Work

_MOST_STEPS = 1000
work, turns = Work.from_argument(), Turns("google-tunix", "jax", "flax", "optax")


def config(folder: str) -> ModelConfig:
    fields = json.loads((Path(folder) / "config.json").read_text())
    experts = fields.get("num_experts")
    return ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["moe_intermediate_size" if experts else "intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=int((fields.get("rope_parameters") or fields)["rope_theta"]),
        norm_eps=fields["rms_norm_eps"],
        use_tied_embedding=fields["tie_word_embeddings"],
        num_experts=experts,
        num_experts_per_tok=fields.get("num_experts_per_tok"),
    )


student_config = config(work.student)
student = create_model_from_safe_tensors(work.student, student_config)


class Numbers:
    """In place of a tokenizer: the sampler takes strings, and "7" is the prompt of row 7."""

    prompts: np.ndarray

    def encode(self, text: str, **kwargs) -> list[int]:
        return self.prompts[int(text)][1:].tolist()  # the sampler puts bos_id in front

    def decode(self, tokens, **kwargs) -> str:
        return ""

    def bos_id(self) -> int:
        return 3

    def eos_id(self) -> int:
        return 1 << 30  # never drawn: every continuation has its full length

    def pad_id(self) -> int:
        return 0


numbers = Numbers()
sampler = Sampler(
    student,
    numbers,
    CacheConfig(
        cache_size=work.sequence_tokens,
        num_layers=student_config.num_layers,
        num_kv_heads=student_config.num_kv_heads,
        head_dim=student_config.head_dim,
    ),
)


def write(tokens: np.ndarray, step: int) -> np.ndarray:
    """Rows of prompts and what the current student goes on with."""
    numbers.prompts = tokens[:, : work.prompt_tokens]
    sampler.transformer_state = nnx.variables(student, nnx.Param)
    output = sampler(
        [str(row) for row in range(work.rows)],
        max_generation_steps=work.new_tokens,
        max_prompt_length=work.prompt_tokens,
        temperature=1.0,
        top_p=1.0,
        seed=step,
    )
    written = np.stack([np.asarray(row) for row in output.tokens])
    assert written.shape == (work.rows, work.new_tokens), written.shape
    return np.concatenate([numbers.prompts, written], axis=1).astype(np.int32)


if work.mode == "sample":
    for step in itertools.count():
        tokens = work.tokens(step)
        turns.begin()
        write(tokens, step)
        turns.end()

teacher = create_model_from_safe_tensors(work.teacher, config(work.teacher))
positions = jnp.broadcast_to(jnp.arange(work.sequence_tokens), (work.rows, work.sequence_tokens))
causal = jnp.tril(jnp.ones((work.rows, work.sequence_tokens, work.sequence_tokens), bool))
sampling_seconds: list[float | None] = []


def forward(model, input_tokens, input_mask):
    return model(input_tokens, positions, None, causal)[0]


def labels(input_tokens, input_mask):
    return jax.nn.one_hot(jnp.roll(input_tokens, -1, 1), student_config.vocab_size)


class Trainer(DistillationTrainer):
    """DistillationTrainer whose steps end when their results are there."""

    def _post_process_train_step(self, aux):
        jax.block_until_ready((aux, nnx.state(self.model)))
        turns.end(loss=float(aux["distill/soft_loss"]), sampling_seconds=sampling_seconds[-1])


def batches() -> Iterator[TrainingInput]:
    for step in range(_MOST_STEPS):
        tokens = work.tokens(step)
        turns.begin()
        started = time.perf_counter()
        if work.mode == "on":
            tokens = write(tokens, step)
        sampling_seconds.append(time.perf_counter() - started if work.mode == "on" else None)
        yield TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))


trainer = Trainer(
    student,
    teacher,
    LogitStrategy(forward, forward, labels, temperature=1.0, alpha=1.0),
    optax.adamw(LEARNING_RATE, b1=0.9, b2=0.999, weight_decay=0.0),
    TrainingConfig(eval_every_n_steps=10 * _MOST_STEPS, max_steps=_MOST_STEPS),
)
trainer.train(batches())
