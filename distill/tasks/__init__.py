"""Where problems come from and how answers are judged: generated tasks and prompt files behind one interface."""

from distill.tasks.arithmetic import Arithmetic, ChainSum, Products
from distill.tasks.problem import Problem, Split, Task, split_of

__all__ = ["Arithmetic", "ChainSum", "Problem", "Products", "Split", "Task", "split_of"]
