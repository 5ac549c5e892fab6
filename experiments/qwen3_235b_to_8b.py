"""Qwen3-235B-A22B teaches Qwen3-8B-Base to think and to answer at once: the setting of Qwen3's own table 21.

    python -m distill.plan experiments/qwen3_235b_to_8b.py --topology v5p:4x4x4     does it fit, how long, on a laptop
    python -m distill.run experiments/qwen3_235b_to_8b.py                           the same command on every host

Data, lengths, modes, learning rates with their source, and what to download: experiments/qwen3_strong_to_weak.py.

Devices: 64 (v5p:4x4x4, v6e:8x8, tpu7x:2x4x4, h100:8x8, h200:8x8), teacher and student on the same ones in turns:
experts over 8, heads over 4, each row's tokens over 2. On one host of eight H200, where no program needs more than 96
of 140 GiB:

    python -m distill.run experiments/qwen3_235b_to_8b.py --mesh.expert 2 --mesh.context 1 --evaluation.batch-size 16 \\
        --stages.off-policy.training.rows 2 --stages.off-policy.microbatches-per-step 16 \\
        --stages.off-policy.batch-size 16 --stages.on-policy.training.rows 2 --stages.on-policy.prompts-per-step 16

Hours by the plan: v5p:4x4x4 51 h, 3,237 chip-hours; v6e:8x8 85 h, 5,469 chip-hours; h100:8x8 41 h, 2,632 chip-hours;
h200:8x8 29 h, 1,852 chip-hours. Half of them the teacher generates, nearly all others the student.

To expect, from table 21 of arXiv 2505.09388 (theirs, thinking mode, after a better off-policy stage than this data
gives): AIME'24 55.0 after the off-policy stage, 74.4 after the on-policy one, 1,800 GPU hours for the latter.
"""

from distill import Experiment
from experiments.qwen3_strong_to_weak import strong_to_weak


def config() -> Experiment:
    return strong_to_weak(
        name="qwen3_235b_to_8b",
        description="Qwen3-235B-A22B teaches Qwen3-8B-Base, 32K of thinking, on 64 devices.",
        teacher="Qwen3-235B-A22B",
        student="Qwen3-8B-Base",
    )
