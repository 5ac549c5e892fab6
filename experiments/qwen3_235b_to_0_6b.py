"""Qwen3-235B-A22B teaches the smallest student, Qwen3-0.6B-Base: nearly all of the cost is the teacher's.

    python -m distill.plan experiments/qwen3_235b_to_0_6b.py --topology v6e:8x8
    python -m distill.run experiments/qwen3_235b_to_0_6b.py

Data, lengths, modes, learning rates with their source, and what to download: experiments/qwen3_strong_to_weak.py.

Devices: 64, as in qwen3_235b_to_8b.py. A student this small follows a 32B teacher as well as it can follow any: compare
with qwen3_32b_to_1_7b.py before renting 64 devices.

Hours by the plan: v5p:4x4x4 37 h, 2,390 chip-hours; v6e:8x8 64 h, 4,071 chip-hours; h100:8x8 31 h, 1,952 chip-hours;
h200:8x8 21 h, 1,370 chip-hours. Two thirds of them the teacher generates.
"""

from distill import Experiment
from experiments.qwen3_strong_to_weak import strong_to_weak


def config() -> Experiment:
    return strong_to_weak(
        name="qwen3_235b_to_0_6b",
        description="Qwen3-235B-A22B teaches Qwen3-0.6B-Base, 32K of thinking, on 64 devices.",
        teacher="Qwen3-235B-A22B",
        student="Qwen3-0.6B-Base",
    )
