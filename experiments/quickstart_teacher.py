"""How the quickstart's teacher was made: a small Qwen3-MoE from scratch, by supervised fine-tuning on worked solutions.

    python -m experiments.quickstart_tokenizer experiments/quickstart_tokenizer
    python -m distill.run experiments/quickstart_teacher.py
    cp runs/quickstart_teacher/export/* experiments/quickstart_teacher/

The result stands in experiments/quickstart_teacher/README.md.
"""

from pathlib import Path

from distill import Experiment, FromScratch, ModeMix, Optimizer, Sft, Training
from experiments.quickstart_task import arithmetic, evaluation

ARCHITECTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}


def config() -> Experiment:
    return Experiment(
        name="quickstart_teacher",
        description="A Qwen3-MoE of 0.8M parameters learns sums and products step by step, with and without thinking.",
        student=FromScratch(architecture=ARCHITECTURE, tokenizer=str(Path(__file__).parent / "quickstart_tokenizer")),
        tasks={"arithmetic": arithmetic()},
        stages={
            "sft": Sft(
                problems=12_000,
                modes=ModeMix(thinking_fraction=0.6, flag_fraction=0.25),
                training=Training(
                    steps=1200,
                    rows=32,
                    row_length=256,
                    optimizer=Optimizer(learning_rate=3e-3, b2=0.98, warmup_fraction=0.05, final_fraction=0.02),
                    rematerialise=False,
                ),
            ),
        },
        evaluation=evaluation(250),
        compute_dtype="float32",
        export_dtype="float32",
    )
