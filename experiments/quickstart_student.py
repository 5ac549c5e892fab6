"""How the quickstart's student came to be: a small dense model reads worked problems as plain text.

    python -m distill.run experiments/quickstart_student.py
    cp runs/quickstart_student/export/* experiments/quickstart_student/

It stands in for a base checkpoint: it can do some arithmetic and knows no chat format. The result stands in
experiments/quickstart_student/README.md.
"""

from pathlib import Path

from distill import Experiment, FromScratch, Optimizer, Sft, Training
from experiments.quickstart_task import arithmetic, evaluation

ARCHITECTURE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}


def config() -> Experiment:
    return Experiment(
        name="quickstart_student",
        description="A dense model of 0.2M parameters reads worked sums and products, as a base for the quickstart.",
        student=FromScratch(architecture=ARCHITECTURE, tokenizer=str(Path(__file__).parent / "quickstart_tokenizer")),
        tasks={"arithmetic": arithmetic()},
        stages={
            "pretraining": Sft(
                problems=10_000,
                form="raw",
                training=Training(
                    steps=1800,
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
