"""Strong-to-weak distillation. What an experiment file names comes from here: `from distill import Experiment, …`.

A name is imported when it is first asked for, so `import distill` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.evaluation.evaluate import Evaluation as Evaluation
    from distill.experiment import Experiment as Experiment
    from distill.experiment import Teacher as Teacher
    from distill.rewards.reward import Reward as Reward
    from distill.stages import Grpo as Grpo
    from distill.stages import OffPolicy as OffPolicy
    from distill.stages import OnPolicy as OnPolicy
    from distill.stages import Sft as Sft
    from distill.stages.loop import Training as Training
    from distill.stages.rollout_schedule import RolloutSchedule as RolloutSchedule
    from distill.stages.student_top_k import StudentTopK as StudentTopK
    from distill.tasks import Arithmetic as Arithmetic
    from distill.tasks import ChainSum as ChainSum
    from distill.tasks import GymFamily as GymFamily
    from distill.tasks import Products as Products
    from distill.tasks import PromptFile as PromptFile
    from distill.tasks import ReasoningGym as ReasoningGym
    from distill.tasks.requests import ModeMix as ModeMix
    from distill.training.losses import Loss as Loss
    from distill.training.optimizer import Optimizer as Optimizer
    from distill.training.policy import PolicyLoss as PolicyLoss
    from qwen3.checkpoint.quantisation import Quantisation as Quantisation
    from qwen3.decoder.kernels import Kernels as Kernels
    from qwen3.generation.sampling import SamplingParams as SamplingParams
    from qwen3.generation.sampling import non_thinking_params as non_thinking_params
    from qwen3.generation.sampling import thinking_params as thinking_params
    from qwen3.sharding import MeshShape as MeshShape
    from student.init import FromCheckpoint as FromCheckpoint
    from student.init import FromScratch as FromScratch
    from student.lora import Lora as Lora

_HOMES = {
    "Arithmetic": "distill.tasks",
    "ChainSum": "distill.tasks",
    "Evaluation": "distill.evaluation.evaluate",
    "Experiment": "distill.experiment",
    "FromCheckpoint": "student.init",
    "FromScratch": "student.init",
    "Grpo": "distill.stages",
    "GymFamily": "distill.tasks",
    "Kernels": "qwen3.decoder.kernels",
    "Lora": "student.lora",
    "Loss": "distill.training.losses",
    "MeshShape": "qwen3.sharding",
    "ModeMix": "distill.tasks.requests",
    "OffPolicy": "distill.stages",
    "OnPolicy": "distill.stages",
    "Optimizer": "distill.training.optimizer",
    "PolicyLoss": "distill.training.policy",
    "Products": "distill.tasks",
    "PromptFile": "distill.tasks",
    "Quantisation": "qwen3.checkpoint.quantisation",
    "ReasoningGym": "distill.tasks",
    "Reward": "distill.rewards.reward",
    "RolloutSchedule": "distill.stages.rollout_schedule",
    "SamplingParams": "qwen3.generation.sampling",
    "Sft": "distill.stages",
    "StudentTopK": "distill.stages.student_top_k",
    "Teacher": "distill.experiment",
    "Training": "distill.stages.loop",
    "non_thinking_params": "qwen3.generation.sampling",
    "thinking_params": "qwen3.generation.sampling",
}
"""Where each name is defined; the imports above say the same to type checkers."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
