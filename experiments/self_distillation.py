"""Self-distillation: a frozen copy of the student, which reads the worked solution, teaches it to answer without one.

    python -m distill.run experiments/self_distillation.py

The student is the quickstart's teacher, which solves sums and products where it may think and hardly any where it must
answer at once. Its copy has the worked solution before it as thinking of its own, and judges every token of the answers
that the student gives without; only the student's answers are trained.
"""

import dataclasses
from typing import Any

from distill import Experiment, FromCheckpoint, ModeMix, OnPolicy, Teacher
from experiments import quickstart
from experiments.quickstart_task import policy_non_thinking

HINTED_PROMPT_TOKENS = 128


def config() -> Experiment:
    base = quickstart.config()
    on_policy = base.stages["on_policy"]
    assert isinstance(on_policy, OnPolicy)
    limits: dict[str, Any] = {"thinking": policy_non_thinking(), "max_prompt_tokens": HINTED_PROMPT_TOKENS}
    stage = dataclasses.replace(on_policy, modes=ModeMix(thinking_fraction=0, flag_fraction=0), **limits)
    return dataclasses.replace(
        base,
        name="self_distillation",
        description="A model learns to answer at once from its own copy that reads the worked solution.",
        student=FromCheckpoint(path=quickstart.TEACHER),
        teacher=Teacher(path=quickstart.TEACHER, dtype="float32", prompt="{prompt}<think>{solution}</think>"),
        stages={"on_policy": stage},
        evaluation=dataclasses.replace(base.evaluation, modes=("non_thinking",), **limits),
    )
