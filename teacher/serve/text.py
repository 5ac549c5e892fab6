"""Text of tokens as they come: whole characters, nothing that a stop string might still take back."""

import dataclasses
from collections.abc import Sequence

from qwen3.chat.chat import ChatTokenizer

_HALF = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spelling:
    """How tokens become text, and where it ends."""

    tokenizer: ChatTokenizer
    stop: Sequence[str] = ()
    """Texts at which it ends."""
    keep_stop: bool = False
    """Whether it ends with what has ended it, text or token."""
    skip_special_tokens: bool = True

    def decode(self, ids: Sequence[int]) -> str:
        """All of them at once."""
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens)


class GrowingText:
    """Text that grows by tokens. What `add` and `end` have given, one after the other, is the text of all of them.

    Characters whose bytes are spread over several tokens come with the last of them; the few tokens around a border
    are decoded together, since some tokenizers write a token otherwise at the beginning (as vLLM's detokeniser).

    Attributes:
        stopped: The stop string that has ended it, if one has.
        characters: How many there are so far, those that are held back included.
    """

    def __init__(self, spelling: Spelling):
        self._spelling = spelling
        self._before: list[int] = []
        self._before_text = ""
        self._pending: list[int] = []
        self._held = ""
        self.stopped: str | None = None
        self.characters = 0

    def add(self, token: int) -> str:
        """What is final with this token. Behind a stop string nothing is."""
        self._pending.append(token)
        whole = self._spelling.decode(self._before + self._pending)
        if whole.endswith(_HALF) or len(whole) <= len(self._before_text):
            return ""
        return self._grown(whole)

    def end(self) -> str:
        """What was held back until now."""
        if self.stopped is not None:
            return ""
        final = self._grown(self._spelling.decode(self._before + self._pending)) if self._pending else ""
        if self.stopped is None:
            final, self._held = final + self._held, ""
        return final

    def _grown(self, whole: str) -> str:
        new = whole[len(self._before_text) :]
        self._before, self._pending = self._pending, []
        self._before_text = self._spelling.decode(self._before)
        self.characters += len(new)
        self._held += new
        found = min(((at, stop) for stop in self._spelling.stop if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            at, self.stopped = found
            return self._held[: at + len(self.stopped) if self._spelling.keep_stop else at]
        kept = max((begun(self._held, stop) for stop in self._spelling.stop), default=0)
        final = self._held[: len(self._held) - kept]
        self._held = self._held[len(final) :]
        return final


def begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
