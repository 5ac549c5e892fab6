"""Qwen3-235B-A22B teaches a mixture of experts, Qwen3-30B-A3B-Base: 30.5B weights, of which 3.3B work on a token.

    python -m distill.plan experiments/qwen3_30b_a3b_student.py --topology v5p:4x4x4
    python -m distill.run experiments/qwen3_30b_a3b_student.py

Data, lengths, modes, learning rates with their source, and what to download: experiments/qwen3_strong_to_weak.py.

Devices: 64, as in qwen3_235b_to_8b.py; the student's weights, those it began with, moments and two sums of
gradients take 11 GiB of each.
Both models' experts are spread alike, and no token is dropped in either; the student's router is kept balanced by the
loss that its config.json asks for (router_aux_loss_coef).

Hours by the plan: v5p:4x4x4 43 h, 2,742 chip-hours; v6e:8x8 72 h, 4,634 chip-hours; h100:8x8 35 h, 2,222 chip-hours;
h200:8x8 24 h, 1,567 chip-hours. Well over half of them the teacher generates.
"""

from distill import Experiment
from experiments.qwen3_strong_to_weak import strong_to_weak


def config() -> Experiment:
    return strong_to_weak(
        name="qwen3_30b_a3b_student",
        description="Qwen3-235B-A22B teaches Qwen3-30B-A3B-Base, a mixture of experts, on 64 devices.",
        teacher="Qwen3-235B-A22B",
        student="Qwen3-30B-A3B-Base",
    )
