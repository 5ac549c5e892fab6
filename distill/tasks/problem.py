"""What a task hands out and what it must be able to do, so that stages and evaluation know no task by name."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from qwen3.rollout import MODES, Mode

Split = Literal["train", "held_out"]
Excluded = Callable[[str], bool]
"""Of a question's text: whether it is left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its exact answer."""

    prompt: str
    """The question; for a conversation of several turns, its last one."""
    answer: str
    """The reference answer; empty where the task's verifier decides without one."""
    solution: str | None = None
    """Worked thinking that leads to the answer, where the task has it."""
    family: str
    source: str = ""
    """The task that it came from, by name; empty where an experiment has only one."""
    mode: Mode | None = None
    """The mode that the data asks for; None leaves the choice to the stage."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The whole conversation up to the answer, where it is more than one user turn."""
    details: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)
    """What the task's own verifier needs besides the answer."""
    problem_id: str = dataclasses.field(init=False)
    """Hash of source, family and question: the same in every run, file order and process."""

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; use one of {', '.join(MODES)}, or None")
        source = f"{self.source}\n" if self.source else ""
        object.__setattr__(self, "problem_id", _digest(f"{source}{self.family}\n{self.question_text}").hex())

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The turns that a chat template renders before the answer."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt}]
        return [dict(message) for message in self.messages]

    @property
    def question_text(self) -> str:
        """All that the model is shown, as one string; what uniqueness and the split go by."""
        return self.prompt if self.messages is None else json.dumps(self.conversation, ensure_ascii=False)


class Task(Protocol):
    """A source of problems with its verifier. Implementations are frozen configuration dataclasses."""

    def problems(self, split: Split, count: int, seed: int, without: Excluded | None = None) -> list[Problem]:
        """`count` different problems of one side of the split, none whose question `without` is true of.

        A smaller count gives a prefix of a larger one. The side a question falls on depends on its text alone, so
        training and held-out problems never meet, whatever the seeds.

        Raises:
            UserError: the task has fewer such problems; the message says how many.
        """

    def size(self, split: Split, without: Excluded | None = None) -> int | None:
        """How many problems there are to ask for; None where the task makes them up as they are asked for."""

    def holds_out(self, question_text: str) -> bool:
        """Whether this task may ask the question of held-out problems, so that no other task trains on it."""

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether the text after the thinking is exactly the answer."""

    def working_is_correct(self, problem: Problem, thinking_text: str) -> bool | None:
        """Whether every step of the thinking is right and leads to the answer; None where that cannot be told."""


def split_of(question_text: str, held_out_fraction: float) -> Split:
    """The side of the split that a question falls on: a threshold on a hash of its text, white space aside.

    The family takes no part: two families that ask the same question must not put it on both sides.
    """
    position = int.from_bytes(_digest(plain_words(question_text))) / 2**64
    return "held_out" if position < held_out_fraction else "train"


def plain_words(question_text: str) -> str:
    """The question as it is compared with others: white space aside."""
    return " ".join(question_text.split())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
