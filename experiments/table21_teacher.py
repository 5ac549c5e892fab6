"""How Table 21's teacher was made: the quickstart's Qwen3-MoE learns a third family from worked solutions.

    python -m distill.run experiments/table21_teacher.py
    cp runs/table21_teacher/export/* experiments/table21_teacher/

It also reads mistakes that are crossed out, from which it learns to check what stands before it: what came of shorter
training stands in experiments/benchmarks/results/table21_tried_2026-11-27_cpu.md.
"""

from pathlib import Path

from distill import Experiment, FromCheckpoint, ModeMix, Optimizer, Sft, Training
from experiments.table21_task import evaluation, trained, transfer

MISTAKES = 0.15


def config() -> Experiment:
    return Experiment(
        name="table21_teacher",
        description="A Qwen3-MoE of 0.8M parameters learns three families of arithmetic, with and without thinking.",
        student=FromCheckpoint(path=str(Path(__file__).parent / "quickstart_teacher")),
        tasks={"trained": trained(MISTAKES), "transfer": transfer(0.1, MISTAKES)},
        stages={
            "sft": Sft(
                problems=30_000,
                modes=ModeMix(thinking_fraction=0.6, flag_fraction=0.25),
                training=Training(
                    steps=3000,
                    rows=16,
                    row_length=256,
                    optimizer=Optimizer(learning_rate=2e-3, b2=0.98, warmup_fraction=0.05, final_fraction=0.02),
                    rematerialise=False,
                ),
            ),
        },
        evaluation=evaluation(150),
        compute_dtype="float32",
        export_dtype="float32",
    )
