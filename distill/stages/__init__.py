"""The phases of an experiment: each takes a student and gives back a better one."""

from distill.stages.grpo import Grpo
from distill.stages.off_policy import OffPolicy
from distill.stages.on_policy import OnPolicy
from distill.stages.sft import Sft

Stage = Sft | OffPolicy | OnPolicy | Grpo

__all__ = ["Grpo", "OffPolicy", "OnPolicy", "Sft", "Stage"]
