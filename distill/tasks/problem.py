"""What a task hands out and what it must be able to do, so that stages and evaluation know no task by name."""

import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from qwen3.chat.chat import MODE_FLAGS, last_flag, without_flags
from qwen3.errors import UserError
from qwen3.rollout import MODES, Mode

Split = Literal["train", "held_out"]
Excluded = Callable[[str], bool]
"""Of a problem's `user_words`: whether it is left out."""
_INVISIBLE: Final = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_MARKS_AT_THE_END: Final = " .?!…。？！"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One question, with its exact answer where that is known."""

    prompt: str
    """The question; for a conversation of several turns, its last one."""
    answer: str | None
    """The reference answer; empty where the task's verifier decides without one, None where nothing can be graded."""
    solution: str | None = None
    """Worked thinking that leads to the answer, where the task has it."""
    family: str
    source: str = ""
    """The task that it came from, by name; empty where an experiment has only one."""
    mode: Mode | None = None
    """The mode that the data asks for, by a field of its own or by a /think or /no_think in the conversation; None
    leaves the choice to the stage."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The whole conversation up to the answer, where it is more than one user turn."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """JSON schemas of the functions that the chat template tells the policy of."""
    teacher: str = ""
    """Which of several teachers is asked about it, by name; empty where an experiment has only one."""
    teacher_prompt: str | tuple[Mapping[str, Any], ...] | None = None
    """What only the teacher reads in place of the user's last turn, or in place of the whole conversation: a hint, a
    worked solution, a system turn. A think block at its end is the teacher's own thinking before a non-thinking answer.
    None: the teacher reads what the student reads."""
    details: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)
    """What the task's own verifier needs besides the answer."""
    problem_id: str = dataclasses.field(init=False)
    """Hash of source, family, question and whatever else of the prompt the data decides: the same in every run, file
    order and process, and for one question in both modes not the same."""

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; use one of {', '.join(MODES)}, or None")
        flagged = flagged_mode(self.conversation)
        if flagged is not None and self.mode not in (None, flagged):
            raise ValueError(f"mode is {self.mode!r}, but the prompt says /{MODE_FLAGS[flagged]}; give one of them")
        parts = [*([self.source] if self.source else []), self.family, self.question_text]
        if self.tools is not None:
            parts.append(json.dumps(self.tools, ensure_ascii=False))
        if self.mode is not None and flagged is None:
            parts.append(self.mode)
        object.__setattr__(self, "mode", self.mode or flagged)
        object.__setattr__(self, "problem_id", digest(composed("\n".join(parts))).hex())

    @property
    def known_answer(self) -> str:
        """The answer, for what cannot do without one. Raises UserError where there is none."""
        if self.answer is None:
            raise UserError(
                f"problem {self.problem_id} of family {self.family!r} has no answer; give the data an answer column, "
                "or use only what learns from the teacher's responses or the student's own (OffPolicy, OnPolicy)"
            )
        return self.answer

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The turns that a chat template renders before the answer."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt}]
        return [dict(message) for message in self.messages]

    @property
    def teacher_conversation(self) -> list[dict[str, Any]]:
        """`conversation` as the teacher reads it."""
        if self.teacher_prompt is None:
            return self.conversation
        if not isinstance(self.teacher_prompt, str):
            return [dict(message) for message in self.teacher_prompt]
        messages = self.conversation
        last = max(place for place, message in enumerate(messages) if message["role"] == "user" or place == 0)
        messages[last]["content"] = self.teacher_prompt
        return messages

    @property
    def question_text(self) -> str:
        """The conversation as one string; what uniqueness goes by."""
        return self.prompt if self.messages is None else json.dumps(self.conversation, ensure_ascii=False)

    @functools.cached_property
    def user_words(self) -> str:
        """What the user's turns ask, as it is compared with others: what the split goes by.

        System turns, replies and tools' results take no part, so that a question with a system turn is the question
        without one. A conversation in which no user speaks is compared as a whole.
        """
        turns = [message["content"] for message in self.conversation if message["role"] == "user"]
        return plain_words("\n".join(turns) or self.question_text)


class Task(Protocol):
    """A source of problems with its verifier. Implementations are frozen configuration dataclasses."""

    @property
    def weight(self) -> float:
        """Its share of an experiment's problems, relative to the other tasks'; 0 takes none."""

    def problems(self, split: Split, count: int, seed: int, without: Excluded | None = None) -> list[Problem]:
        """`count` different problems of one side of the split, none whose words `without` is true of.

        A smaller count gives a prefix of a larger one. The side a question falls on depends on the user's words alone,
        so training and held-out problems never meet, whatever the seeds.

        Raises:
            UserError: the task has fewer such problems; the message says how many.
        """

    def size(self, split: Split, without: Excluded | None = None) -> int | None:
        """How many problems there are to ask for; None where the task makes them up as they are asked for."""

    def holds_out(self, question_text: str) -> bool:
        """Whether this task may ask the question of held-out problems, so that no other task trains on it."""

    def left_out(self, without: Excluded | None = None) -> list[str]:
        """What of the task's data is not used, how often and why, in a line for each part of it; empty where all is."""

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether the text after the thinking is exactly the answer, of a problem whose answer is not None."""

    def working_is_correct(self, problem: Problem, thinking_text: str) -> bool | None:
        """Whether every step of the thinking is right and leads to the answer; None where that cannot be told."""


def split_of(question_text: str, held_out_fraction: float) -> Split:
    """The side of the split that a question falls on: a threshold on a hash of its `plain_words`.

    The family takes no part: two families that ask the same question must not put it on both sides.
    """
    position = int.from_bytes(digest(plain_words(question_text))) / 2**64
    return "held_out" if position < held_out_fraction else "train"


def plain_words(question_text: str) -> str:
    """The question as it is compared with others: composed (NFC), without soft switches and characters that nobody
    sees, white space and the marks at its end aside. Case and everything else count."""
    visible = question_text if question_text.isascii() else _INVISIBLE.sub("", composed(question_text))
    if "/" in visible:
        visible = without_flags(visible)
    bare = " ".join(visible.split()).rstrip(_MARKS_AT_THE_END)
    # One mark stands for all and for none. Which one is kept leaves generated questions on the side they always had.
    return bare if bare.endswith("=") else f"{bare}."


def flagged_mode(conversation: Sequence[Mapping[str, Any]]) -> Mode | None:
    """The mode that a conversation asks for by a soft switch of its own; None where it has none."""
    flag = last_flag(conversation)
    return next((mode for mode, its_flag in MODE_FLAGS.items() if its_flag == flag), None)


def composed(text: str) -> str:
    """The text in NFC, in which an accent is part of its letter, so that equal texts are equal strings."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def digest(text: str) -> bytes:
    """8 bytes that decide by chance, the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
