"""Two updates of a student by a teacher with devices of its own, the same in one process and in several."""

import jax
import numpy as np
import optax

from distill.training.losses import Loss
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, TrainStep
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import random_model
from qwen3.sharding import MeshShape
from teacher.placement import own_mesh
from teacher.scoring import Scorer
from tests.distill.miniature import DENSE, MOE

# Rows are cut in two for the teacher, whose experts lie in different processes.
TEACHER_MESH = MeshShape(data=1, expert=2, tensor=2)
STUDENT_MESHES = {"rows": MeshShape(fsdp=2), "pieces of rows": MeshShape(context=4)}
"""By what each of four devices has of the student's batch."""
ROWS, LENGTH, WORDS = 4, 12, 40


def losses(share: str) -> list[dict[str, float]]:
    """What the two updates measure; `share` is one of STUDENT_MESHES."""
    of_teacher, of_student = own_mesh(TEACHER_MESH, STUDENT_MESHES[share])
    small = {"num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": WORDS}
    configs = [ModelConfig.from_hf(architecture | small) for architecture in (MOE, DENSE)]
    teacher, student = (
        random_model(config, jax.random.key(seed), mesh)
        for seed, (config, mesh) in enumerate(zip(configs, (of_teacher, of_student), strict=True))
    )
    scorer, transformation = Scorer(teacher, of_teacher, wanted_on=of_student), optax.adam(1e-2)
    state = TrainState.start(student, transformation, of_student)
    train = TrainStep(
        transformation=transformation,
        loss=Loss(name="reverse_kl"),
        mesh=of_student,
        teacher_head=scorer.head,
    )
    rng, measured = np.random.default_rng(0), []
    for _ in range(2):
        tokens = rng.integers(0, WORDS, (ROWS, LENGTH)).astype(np.int32)
        rows = {
            "tokens": tokens,
            "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
            "segment_ids": np.ones_like(tokens),
            "loss_mask": np.ones(tokens.shape, bool),
            "mode": np.ones(tokens.shape, np.uint8),
        }
        targets = scorer.hidden(rows["tokens"], rows["positions"], rows["segment_ids"])
        state, result = train(state, [Batch.of(rows, targets)])
        measured.append(dict(result.metrics))
    return measured
