"""Table 21 of the Qwen3 report, small and honest: from one off-policy student, on-policy distillation against
reinforcement learning and against more off-policy distillation, at stated FLOPs.

    python -m distill.run experiments/table21.py --name table21_0 --seed 0      # one seed; the same for others
    python -m distill.report runs/table21_*                                     # all of them as one table

| stage | starts from | is to cost |
|---|---|---|
| `off_policy` | a base student | until it gains no more |
| `on_policy` | `off_policy` | 1 |
| `same_outputs`, `fresh_outputs` | `off_policy` | 1, in FLOPs, teacher included |
| `rl`, `rl_10` | `off_policy`; `rl` | 1; 9 more |
| `on_policy_rl`, `rl_teacher` | `on_policy`; `off_policy`, with the teacher's divergence beside the reward | 1 |
| `unlikely` | `off_policy`, neither teacher nor reward: a negative advantage on unlikely tokens | 1 |

Being settled: no stage of reinforcement learning has been run, and no number of steps been fitted to these costs. Make
teacher and student first (experiments/table21_teacher.py, experiments/table21_student.py). A third family of problems
is only evaluated. No seed has been reported; what was tried stands in
experiments/benchmarks/results/table21_tried_2026-11-27_cpu.md.
"""

from pathlib import Path
from typing import Any

from distill import Experiment, FromCheckpoint, Grpo, Loss, OffPolicy, OnPolicy, Optimizer, Teacher, Training
from experiments.table21_task import (
    MAX_PROMPT_TOKENS,
    evaluation,
    policy_non_thinking,
    policy_thinking,
    qwen3_non_thinking,
    qwen3_thinking,
    trained,
    transfer,
)

TEACHER = str(Path(__file__).parent / "table21_teacher")
STUDENT = str(Path(__file__).parent / "table21_student")

OFF_POLICY_STEPS = 1200
ON_POLICY_STEPS = 180
PROMPTS_PER_STEP = 80
GROUPS_PER_STEP, GROUP = 32, 8
RL_STEPS = 180


def config() -> Experiment:
    return Experiment(
        name="table21",
        description="On-policy distillation, reinforcement learning and off-policy distillation from one student.",
        student=FromCheckpoint(path=STUDENT),
        teacher=Teacher(path=TEACHER, dtype="float32"),
        tasks={"trained": trained(), "transfer": transfer(1.0)},
        stages={
            "off_policy": OffPolicy(
                prompts=8_192, **_teacher_generates(), training=_training(steps=OFF_POLICY_STEPS, learning_rate=3e-3)
            ),
            "on_policy": OnPolicy(
                prompts_per_step=PROMPTS_PER_STEP,
                **_student_generates(),
                loss=Loss(name="reverse_kl"),
                training=_training(steps=ON_POLICY_STEPS, learning_rate=1e-3),
            ),
            "same_outputs": OffPolicy(
                **_teacher_generates(),
                training=_training(steps=None, learning_rate=2e-3),
                start_from="off_policy",
                targets_of="off_policy",
                flops_of="on_policy",
            ),
            "fresh_outputs": OffPolicy(
                prompts=5_000,
                **_teacher_generates(),
                training=_training(steps=None, learning_rate=2e-3),
                start_from="off_policy",
                flops_of="on_policy",
            ),
            "rl": _rl(steps=RL_STEPS, start_from="off_policy"),
            "rl_10": _rl(steps=9 * RL_STEPS, start_from="rl"),
            "on_policy_rl": _rl(steps=RL_STEPS, start_from="on_policy"),
            "rl_teacher": _rl(steps=RL_STEPS // 2, start_from="off_policy", teacher_kl=1.0),
            "unlikely": _rl(steps=RL_STEPS, start_from="off_policy", unlikely_below=0.05),
        },
        export_stage="on_policy",
        evaluation=evaluation(problems=150, samples=64),
        compute_dtype="float32",
        export_dtype="float32",
    )


def _teacher_generates() -> dict[str, Any]:
    return {
        "top_k": 16,
        "thinking": qwen3_thinking(),
        "non_thinking": qwen3_non_thinking(),
        "max_prompt_tokens": MAX_PROMPT_TOKENS,
        "batch_size": 256,
    }


def _student_generates() -> dict[str, Any]:
    return {
        "thinking": policy_thinking(),
        "non_thinking": policy_non_thinking(),
        "max_prompt_tokens": MAX_PROMPT_TOKENS,
    }


def _rl(*, steps: int, start_from: str, **fields: Any) -> Grpo:
    """One setting; which of several is best has yet to be tried, on other seeds than the table's."""
    return Grpo(
        prompts_per_step=GROUPS_PER_STEP,
        samples_per_prompt=GROUP,
        **_student_generates(),
        start_from=start_from,
        training=_training(steps=steps, learning_rate=3e-4, schedule="constant"),
        **fields,
    )


def _training(*, steps: int | None, learning_rate: float, schedule: Any = "cosine") -> Training:
    return Training(
        steps=steps,
        rows=48,
        row_length=176,
        optimizer=Optimizer(
            learning_rate=learning_rate, schedule=schedule, b2=0.98, warmup_fraction=0.05, final_fraction=0.05
        ),
        rematerialise=False,
        checkpoint_every_steps=50,
    )
