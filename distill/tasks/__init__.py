"""Where problems come from and how answers are judged: generated tasks and prompt files behind one interface."""

from distill.tasks.arithmetic import Arithmetic, ChainSum, Products, SumOfProducts
from distill.tasks.gym import GymFamily, ReasoningGym
from distill.tasks.problem import Problem, Split, Task, split_of
from distill.tasks.prompt_files import PromptFile

__all__ = [
    "Arithmetic",
    "ChainSum",
    "GymFamily",
    "Problem",
    "Products",
    "PromptFile",
    "ReasoningGym",
    "Split",
    "SumOfProducts",
    "Task",
    "split_of",
]
