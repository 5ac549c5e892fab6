"""Qwen3-235B-A22B teaches Qwen3-14B-Base, the largest dense student.

    python -m distill.plan experiments/qwen3_235b_to_14b.py --topology v5p:4x4x4
    python -m distill.run experiments/qwen3_235b_to_14b.py

Data, lengths, modes, learning rates with their source, and what to download: experiments/qwen3_strong_to_weak.py.

Devices: 64, as in qwen3_235b_to_8b.py; the student's weights, those it began with, moments and two sums of
gradients take 5.2 GiB of each.

Hours by the plan: v5p:4x4x4 61 h, 3,925 chip-hours; v6e:8x8 103 h, 6,604 chip-hours; h100:8x8 50 h, 3,184 chip-hours;
h200:8x8 35 h, 2,244 chip-hours. The student generates longer than the teacher does.
"""

from distill import Experiment
from experiments.qwen3_strong_to_weak import strong_to_weak


def config() -> Experiment:
    return strong_to_weak(
        name="qwen3_235b_to_14b",
        description="Qwen3-235B-A22B teaches Qwen3-14B-Base, 32K of thinking, on 64 devices.",
        teacher="Qwen3-235B-A22B",
        student="Qwen3-14B-Base",
    )
