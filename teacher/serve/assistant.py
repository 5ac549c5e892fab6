"""An assistant's text as it comes, taken apart: thinking, answer, tool calls."""

import dataclasses
import json
import uuid
from collections.abc import Iterator
from typing import Final, Literal

from qwen3.chat.turns import THINK_END, THINK_START
from teacher.serve.text import begun

CALL_START: Final = "<tool_call>"
CALL_END: Final = "</tool_call>"


@dataclasses.dataclass(frozen=True)
class Said:
    """Some text of one kind."""

    kind: Literal["reasoning", "content"]
    text: str


@dataclasses.dataclass(frozen=True)
class Called:
    """A whole tool call."""

    id: str
    name: str
    arguments: str
    """JSON."""


class Assistant:
    """What `add` and `end` give, one after the other, is the same however the text was cut.

    A think block that opens the text, or that the prompt has opened, is reasoning, without the blank lines at its
    borders; one that never closes is all of it. With `tools`, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`
    (Hermes' format, Qwen3's) is a call, and what is in such a block and is none stays content.
    """

    def __init__(self, *, thinking: bool, in_thinking: bool, tools: bool):
        """`thinking`: whether the text may open a think block; `in_thinking`: whether the prompt has opened it."""
        self._state: Literal["begins", "reasoning", "content", "call"] = (
            "reasoning" if in_thinking else "begins" if thinking else "content"
        )
        self._tools = tools
        self._text = ""
        self._bare = self._state != "content"
        """Whether blank lines are dropped that come now: at the beginning of reasoning, and of an answer behind it."""

    def add(self, text: str) -> list[Said | Called]:
        """What is known now that this has come."""
        self._text += text
        return [one for one in self._parsed(last=False) if isinstance(one, Called) or one.text]

    def end(self) -> list[Said | Called]:
        """What was held back."""
        return [one for one in self._parsed(last=True) if isinstance(one, Called) or one.text]

    def _parsed(self, *, last: bool) -> Iterator[Said | Called]:
        while True:
            before = self._state, len(self._text)
            if self._state == "begins":
                self._begin(last)
            elif self._state == "reasoning":
                yield self._reasoning(last)
            elif self._state == "content":
                yield self._content(last)
            else:
                yield from self._call(last)
            if (self._state, len(self._text)) == before or (last and not self._text):
                return

    def _begin(self, last: bool) -> None:
        text = self._text.lstrip()
        if text.startswith(THINK_START):
            self._state, self._text = "reasoning", text.removeprefix(THINK_START)
        elif last or not THINK_START.startswith(text):
            self._state, self._bare = "content", False

    def _reasoning(self, last: bool) -> Said:
        if self._bare:
            self._text = self._text.lstrip("\n")
        inside, end, after = self._text.partition(THINK_END)
        if end:
            self._state, self._text, self._bare = "content", after, True
            return Said("reasoning", inside.rstrip("\n"))
        # Blank lines at the end, and what may be the beginning of the end, wait for what follows.
        whole = inside.rstrip("\n") if last else inside[: len(inside) - begun(inside, THINK_END)].rstrip("\n")
        self._text = "" if last else self._text[len(whole) :]
        self._bare = self._bare and not whole
        return Said("reasoning", whole)

    def _content(self, last: bool) -> Said:
        if self._bare:
            self._text = self._text.lstrip("\n")
        at = self._text.find(CALL_START) if self._tools else -1
        if at >= 0:
            # The white space before it is content where it is no call.
            said, self._state = self._text[:at].rstrip(), "call"
            self._text = self._text[len(said) :]
        elif last or not self._tools:
            said, self._text = self._text, ""
        else:
            said = self._text[: len(self._text) - begun(self._text, CALL_START)].rstrip()
            self._text = self._text[len(said) :]
        self._bare = self._bare and not said
        return Said("content", said)

    def _call(self, last: bool) -> Iterator[Said | Called]:
        end = self._text.find(CALL_END)
        if end < 0 and not last:
            return
        whole = len(self._text) if end < 0 else end + len(CALL_END)
        block, self._text, self._state = self._text[:whole], self._text[whole:], "content"
        called = _called(block.lstrip().removeprefix(CALL_START).removesuffix(CALL_END))
        # What follows a call is content once more, without the line between.
        self._bare = called is not None
        yield Said("content", block) if called is None else called


def _called(text: str) -> Called | None:
    """The call that a block holds; None for anything else, half a surrogate pair and NaN among it."""
    try:
        raw = json.loads(text, parse_constant=int)
        name, arguments = raw["name"], json.dumps(raw.get("arguments", {}), ensure_ascii=False)
        (name + arguments).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Called(f"chatcmpl-tool-{uuid.uuid4().hex}", name, arguments) if arguments.startswith("{") else None
