"""A whole run in miniature: a tokenizer, a teacher and a student small enough that every stage takes seconds."""

import dataclasses
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distill.evaluation.evaluate import Evaluation
from distill.experiment import Experiment, Teacher
from distill.stages import OffPolicy, OnPolicy, Sft
from distill.stages.loop import Training
from distill.tasks import Arithmetic, ChainSum, Products
from distill.training.losses import Loss
from distill.training.optimizer import Optimizer
from qwen3.chat.chat import STOP_THINKING_TEXT, ChatTokenizer
from qwen3.chat.tokenizer import train_byte_level_bpe
from qwen3.generation.sampling import SamplingParams
from student.export import export
from student.init import FromScratch

ROOT = Path(__file__).parents[2]
# Signals its own process right after the given number of train steps; SIGKILL comes without warning.
KILLED = """
import os, sys
from distill.training.train_step import TrainStep
from distill.run import main

left, number, call = int(sys.argv[1]), int(sys.argv[2]), TrainStep.__call__


def counted(self, state, batches):
    global left
    result = call(self, state, batches)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), number)
    return result


TrainStep.__call__ = counted
sys.exit(main(sys.argv[3:]))
"""
_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}
DENSE = {"architectures": ["Qwen3ForCausalLM"], **_SHAPE}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    **_SHAPE,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def task() -> Arithmetic:
    return Arithmetic(
        chain_sum=ChainSum(min_terms=2, max_terms=3), products=Products(min_digits=2, max_digits=3, weight=0.5)
    )


def make_teacher(folder: Path, architecture: Mapping[str, Any] = MOE) -> str:
    """An untrained teacher with a tokenizer of the task's texts, as a Hugging Face folder."""
    problems = task().problems("train", 300, seed=0)
    tokenizer = folder / "tokenizer"
    texts = [f"{p.prompt}\n{p.solution}\n{p.answer}" for p in problems]
    # A tokenizer that has met it says the text that ends thinking in 24 tokens.
    train_byte_level_bpe([*texts, *[STOP_THINKING_TEXT] * len(texts)], 384, tokenizer)
    model = FromScratch(architecture=architecture, tokenizer=str(tokenizer)).build(jax.random.key(7))
    export(folder / "teacher", model, ChatTokenizer.from_folder(tokenizer), dtype=jnp.float32)
    return str(folder / "teacher")


def _training(steps: int | None, row_length: int = 128) -> Training:
    return Training(
        steps=steps,
        rows=4,
        row_length=row_length,
        optimizer=Optimizer(learning_rate=1e-3),
        rematerialise=False,
        checkpoint_every_steps=2,
    )


def experiment(teacher: str) -> Experiment:
    """All three stages, a comparison, and on-policy with rollouts generated ahead, over a student from scratch."""
    sampling = {
        "thinking": SamplingParams(max_new_tokens=36, thinking_budget=8),
        "non_thinking": SamplingParams(max_new_tokens=8),
        "max_prompt_tokens": 80,
    }
    off_policy = OffPolicy(prompts=20, top_k=8, batch_size=8, training=_training(4), **sampling)
    on_policy = OnPolicy(
        prompts_per_step=8, samples_every_steps=2, loss=Loss(name="reverse_kl"), training=_training(5), **sampling
    )
    return Experiment(
        name="miniature",
        description="A run in miniature.",
        student=FromScratch(architecture=DENSE, tokenizer=teacher),
        teacher=Teacher(path=teacher, dtype="float32"),
        tasks={"arithmetic": task()},
        stages={
            "pretraining": Sft(problems=40, form="raw", training=_training(3)),
            "off_policy": off_policy,
            "on_policy": on_policy,
            "same_outputs": dataclasses.replace(
                off_policy,
                training=_training(None),
                start_from="off_policy",
                targets_of="off_policy",
                flops_of="on_policy",
            ),
            "ahead": dataclasses.replace(on_policy, max_staleness=2, start_from="off_policy"),
        },
        export_stage="on_policy",
        evaluation=Evaluation(
            problems=6,
            samples_per_problem=2,
            pass_at=(2,),
            batch_size=8,
            max_prompt_tokens=80,
            thinking=SamplingParams(
                max_new_tokens=36, thinking_budget=8, temperature=0.9, top_p=0.95, top_k=30, min_p=0.01
            ),
            non_thinking=SamplingParams(max_new_tokens=8),
        ),
        compute_dtype="float32",
        export_dtype="float32",
    )


def launch_command(
    file: Path, runs: Path, *more: str, devices: int, kill_after: int | None = None, number: int = signal.SIGKILL
) -> tuple[list[str], dict[str, str]]:
    """The command that runs `file`'s experiment in a process of its own, and its environment.

    With `kill_after` the process sends itself signal `number` after so
    many train steps.
    """
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    start = ["-m", "distill.run"] if kill_after is None else ["-c", KILLED, str(kill_after), str(int(number))]
    command = [sys.executable, *start, str(file), "--runs", str(runs), *more]
    return command, {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
