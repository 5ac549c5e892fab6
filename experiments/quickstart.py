"""The whole of strong-to-weak distillation in a few minutes on two CPU cores, on real problems, nothing prepared.

    make quickstart            or: python -m distill.run experiments/quickstart.py

A Qwen3-MoE teacher that the repository carries solves sums, differences and products step by step. A dense student,
several times smaller and so far only a base model (experiments/quickstart_student.py), first learns from what the
teacher generated (off-policy), then from its own attempts, judged by the teacher token by token (on-policy).

Two comparisons start from the same off-policy student and may spend what the on-policy stage has cost in FLOPs,
teacher included: `same_outputs` trains on with the outputs that it has, `fresh_outputs` on new teacher outputs for as
many prompts as the on-policy stage saw. What to expect stands in the README.
"""

from pathlib import Path
from typing import Any

from distill import Experiment, FromCheckpoint, Loss, OffPolicy, OnPolicy, Optimizer, Teacher, Training
from experiments.quickstart_task import (
    MAX_PROMPT_TOKENS,
    arithmetic,
    evaluation,
    policy_non_thinking,
    policy_thinking,
    qwen3_non_thinking,
    qwen3_thinking,
)

TEACHER = str(Path(__file__).parent / "quickstart_teacher")
STUDENT = str(Path(__file__).parent / "quickstart_student")

PROMPTS_PER_STEP = 80
ON_POLICY_STEPS = 180


def config() -> Experiment:
    return Experiment(
        name="quickstart",
        description="A small Qwen3-MoE makes a dense student good at sums and products, in minutes on a CPU.",
        student=FromCheckpoint(path=STUDENT),
        teacher=Teacher(path=TEACHER, dtype="float32"),
        tasks={"arithmetic": arithmetic()},
        stages={
            "off_policy": OffPolicy(
                prompts=512,
                top_k=16,
                **_teacher_generates(),
                training=_training(steps=100, learning_rate=2e-3),
            ),
            "on_policy": OnPolicy(
                prompts_per_step=PROMPTS_PER_STEP,
                thinking=policy_thinking(),
                non_thinking=policy_non_thinking(),
                max_prompt_tokens=MAX_PROMPT_TOKENS,
                loss=Loss(name="reverse_kl"),
                training=_training(steps=ON_POLICY_STEPS, learning_rate=1e-3),
            ),
            "same_outputs": OffPolicy(
                top_k=16,
                **_teacher_generates(),
                training=_training(steps=None, learning_rate=2e-3),
                start_from="off_policy",
                targets_of="off_policy",
                flops_of="on_policy",
            ),
            "fresh_outputs": OffPolicy(
                prompts=PROMPTS_PER_STEP * ON_POLICY_STEPS,
                top_k=16,
                **_teacher_generates(),
                training=_training(steps=None, learning_rate=2e-3),
                start_from="off_policy",
                flops_of="on_policy",
            ),
        },
        export_stage="on_policy",
        evaluation=evaluation(),
        compute_dtype="float32",
        export_dtype="float32",
    )


def _teacher_generates() -> dict[str, Any]:
    return {
        "thinking": qwen3_thinking(),
        "non_thinking": qwen3_non_thinking(),
        "max_prompt_tokens": MAX_PROMPT_TOKENS,
        "batch_size": 256,
    }


def _training(*, steps: int | None, learning_rate: float) -> Training:
    return Training(
        steps=steps,
        rows=48,
        row_length=144,
        optimizer=Optimizer(learning_rate=learning_rate, b2=0.98, warmup_fraction=0.05, final_fraction=0.05),
        rematerialise=False,
        checkpoint_every_steps=50,
    )
