"""Qwen3-32B teaches Qwen3-1.7B-Base on one host: the cheapest of the runs with published checkpoints.

    python -m distill.plan experiments/qwen3_32b_to_1_7b.py --topology h100:1x8
    python -m distill.run experiments/qwen3_32b_to_1_7b.py

Data, lengths, modes, learning rates with their source, and what to download: experiments/qwen3_strong_to_weak.py.

Devices: 8 of one host (h100:1x8, h200:1x8, v5p:2x2x2), teacher and student on the same ones in turns; heads
over 4, each row's tokens over 2. With `--teacher.placement own_mesh --teacher.mesh.tensor 4 --teacher.mesh.data 1
--mesh.tensor 4 --mesh.context 1` each has four of its own, and the teacher scores while the student trains.

Hours by the plan: v5p:2x2x2 181 h, 1,452 chip-hours; h100:1x8 147 h, 1,180 chip-hours; h200:1x8 104 h, 831 chip-hours.
Four fifths of them the teacher generates, 16 sequences at a time.
"""

from distill import Experiment, MeshShape
from experiments.qwen3_strong_to_weak import strong_to_weak


def config() -> Experiment:
    return strong_to_weak(
        name="qwen3_32b_to_1_7b",
        description="Qwen3-32B teaches Qwen3-1.7B-Base, 32K of thinking, on the eight devices of one host.",
        teacher="Qwen3-32B",
        student="Qwen3-1.7B-Base",
        mesh=MeshShape(tensor=4, context=2),
        rows=1,
        microbatches_per_step=32,
        sequences=16,
    )
