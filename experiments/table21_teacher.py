"""How Table 21's teacher was made: a small Qwen3-MoE from scratch, by supervised fine-tuning on worked solutions.

    python -m distill.run experiments/table21_teacher.py
    cp runs/table21_teacher/export/* experiments/table21_teacher/

The result stands in experiments/table21_teacher/README.md.
"""

from pathlib import Path

from distill import Experiment, FromScratch, ModeMix, Optimizer, Sft, Training
from experiments.quickstart_teacher import ARCHITECTURE
from experiments.table21_task import evaluation, trained, transfer


def config() -> Experiment:
    return Experiment(
        name="table21_teacher",
        description="A Qwen3-MoE of 0.8M parameters learns three families of arithmetic, with and without thinking.",
        student=FromScratch(architecture=ARCHITECTURE, tokenizer=str(Path(__file__).parent / "quickstart_tokenizer")),
        tasks={"trained": trained(), "transfer": transfer(0.1)},
        stages={
            "sft": Sft(
                problems=40_000,
                modes=ModeMix(thinking_fraction=0.7, flag_fraction=0.25),
                training=Training(
                    steps=2400,
                    rows=32,
                    row_length=256,
                    optimizer=Optimizer(learning_rate=3e-3, b2=0.98, warmup_fraction=0.05, final_fraction=0.02),
                    rematerialise=False,
                ),
            ),
        },
        evaluation=evaluation(150),
        compute_dtype="float32",
        export_dtype="float32",
    )
