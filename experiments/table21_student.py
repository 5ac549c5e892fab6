"""How Table 21's student came to be: a small dense model reads worked problems as plain text.

    python -m distill.run experiments/table21_student.py
    cp runs/table21_student/export/* experiments/table21_student/

It stands in for a base checkpoint: it can do some arithmetic and knows no chat format.
"""

from pathlib import Path

from distill import Experiment, FromScratch, Optimizer, Sft, Training
from experiments.quickstart_student import ARCHITECTURE as WIDER
from experiments.table21_task import evaluation, trained, transfer

ARCHITECTURE = {**WIDER, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 120}


def config() -> Experiment:
    return Experiment(
        name="table21_student",
        description="A dense model of 0.06M parameters reads worked arithmetic, as a base for Table 21.",
        student=FromScratch(architecture=ARCHITECTURE, tokenizer=str(Path(__file__).parent / "quickstart_tokenizer")),
        tasks={"trained": trained(), "transfer": transfer(0.1)},
        stages={
            "pretraining": Sft(
                problems=10_000,
                form="raw",
                training=Training(
                    steps=1000,
                    rows=32,
                    row_length=144,
                    optimizer=Optimizer(learning_rate=3e-3, b2=0.98, warmup_fraction=0.05, final_fraction=0.05),
                    rematerialise=False,
                ),
            ),
        },
        evaluation=evaluation(),
        compute_dtype="float32",
        export_dtype="float32",
    )
