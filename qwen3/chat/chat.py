"""How Qwen3 is talked to: chat text and token ids, thinking and non-thinking mode, thinking apart from the answer.

Everything that knows a chat marker or a mode's prefix is here, so that the engine, the data pipelines and the graders
never spell one out.
"""

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from qwen3.chat.template import ChatTemplate, Message
from qwen3.chat.tokenizer import TokenizerFiles, read_tokenizer, stop_ids_of_generation
from qwen3.chat.turns import THINK_END, THINK_START, Turns
from qwen3.errors import UserError
from qwen3.rollout import MODES, NON_THINKING, THINKING, Mode

Flag = Literal["think", "no_think"]
MODE_FLAGS: Final[Mapping[Mode, Flag]] = {THINKING: "think", NON_THINKING: "no_think"}

STOP_THINKING_TEXT: Final = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)
"""Inserted where a thinking budget is spent; Qwen's documentation, exact to the line ends."""

# A flag stands alone or before punctuation: paths such as a/think/b, words such as /thinking and tags are not flags.
_FLAG = re.compile(r"(?<![\w/<])/(no_think|think)(?![\w/-])")
# Before one of these a text has the tokens that it has behind any text with which it does not merge.
_ANCHORS = ("\n", "a")


class ChatTokenizer:
    """A checkpoint's tokenizer with its chat template and stop tokens.

    Attributes:
        folder: Where it was read from.
        vocab_size: Rows that an embedding needs: the highest id plus one.
        eos_ids: Tokens that end a response; the tokenizer's own end token first.
        pad_id: Fills up batches. The end token where the checkpoint names none: padding is masked everywhere.
        think_start_id: `<think>` as one token, or None where the vocabulary has none.
        think_end_id: `</think>` likewise.
    """

    def __init__(self, files: TokenizerFiles, stop_ids: Sequence[int] = (), now: datetime | None = None):
        self._files = files
        self.folder = files.folder
        self._tokenizer = files.tokenizer
        self._prefixes: dict[str, list[int]] = {}  # what stands before responses: a few texts
        now = now or datetime.now()
        self._templates = {
            name: ChatTemplate(source, str(files.folder), now) for name, source in sorted(files.templates.items())
        }
        self.vocab_size = max(self.tokens_by_id()) + 1
        eos_id = self._special_id("eos_token")
        self.eos_ids = tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *stop_ids]))
        if not self.eos_ids:
            raise UserError(f"{files.folder}: no end token; name eos_token in tokenizer_config.json")
        if beyond := [one for one in self.eos_ids if one >= self.vocab_size]:
            raise UserError(
                f"{files.folder}: eos_token_id {beyond[0]} in generation_config.json is beyond the vocabulary's "
                f"{self.vocab_size} tokens; take it from the same checkpoint"
            )
        pad_id = self._special_id("pad_token")
        self.pad_id = self.eos_ids[0] if pad_id is None else pad_id
        self.think_start_id = self._tokenizer.token_to_id(THINK_START)
        self.think_end_id = self._tokenizer.token_to_id(THINK_END)

    @classmethod
    def from_folder(cls, folder: str | Path, *, now: datetime | None = None) -> "ChatTokenizer":
        """Reads a Hugging Face folder: tokenizer, template, and the stop tokens of generation_config.json.

        Args:
            folder: The folder.
            now: What templates that tell the date are told; None for this moment. A run that goes on another day says
                when it began, so that its prompts stay the same.

        Raises:
            UserError: A file is missing or malformed, or no end token is named.
        """
        return cls(read_tokenizer(folder), stop_ids_of_generation(folder), now)

    def stopping_at_turns(self) -> "ChatTokenizer":
        """The same, with the token that ends a turn of its template among `eos_ids`.

        A base checkpoint's own end token ends documents. One that is trained on turns never generates it again.
        """
        stopping = copy.copy(self)
        if "default" in self._templates and self._turns.end_token is not None:
            stopping.eos_ids = tuple(dict.fromkeys([*self.eos_ids, self.turn_end_id]))
        return stopping

    def save(self, folder: str | Path) -> None:
        """Writes the files that this was read from, byte for byte (not generation_config.json).

        Raises:
            UserError: The folder cannot be written.
        """
        self._files.save(folder)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text` as it stands; markers such as `<think>` become their own tokens. With `add_special_tokens` it
        begins and ends as the tokenizer's texts do, which with Qwen's is the same."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`. Think and tool markers are content and stay; ids beyond the vocabulary have no text."""
        return self._tokenizer.decode([int(one) for one in ids], skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters that no token has more of."""
        return max(map(len, self.tokens_by_id().values()))

    def tokens_by_id(self) -> dict[int, str]:
        """The whole vocabulary, added tokens included, in the tokenizer's own byte spelling."""
        return {token_id: token for token, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = True,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as the checkpoint's template writes it; the text equals transformers' apply_chat_template.

        Qwen3's template drops the thinking of every assistant turn before the last user question. A whole multi-turn
        conversation rendered at once therefore supervises the thinking of its last turn only: to train on earlier
        thinking, render one prefix a turn.

        Raises:
            UserError: The checkpoint has no template, or the template cannot render a message.
        """
        return self._template(tools).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables={**self._files.special_tokens, "enable_thinking": enable_thinking},
        )

    def prompt_ids(
        self, messages: Sequence[Message], mode: Mode, *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Ids of the conversation up to where the assistant starts to write in `mode`.

        In Qwen3's non-thinking mode that includes an empty think block.

        Raises:
            UserError: The checkpoint cannot do the mode (`check_mode`), or as in `render`.
        """
        return self.encode(self.prompt_text(messages, mode, tools=tools))

    def prompt_text(
        self, messages: Sequence[Message], mode: Mode, *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The text of `prompt_ids`, which raises as that does."""
        self.check_mode(mode)
        return self.render(messages, tools=tools, enable_thinking=mode == THINKING, add_generation_prompt=True)

    def response_ids(self, thinking: str | None, answer: str, mode: Mode) -> list[int]:
        """Ids that continue `prompt_ids` as an ideal response, end of turn included.

        Args:
            thinking: The worked thinking in thinking mode ("" for an empty block, the answer to /no_think); None in
                non-thinking mode, whose prompt holds the block.
            answer: The text after the thinking.
            mode: The prompt's mode.

        Raises:
            ValueError: Thinking is given in non-thinking mode, or missing in thinking mode.
            UserError: The template does not end a turn with one special token.
        """
        if (thinking is None) != (mode == NON_THINKING):
            raise ValueError(
                f"thinking: {thinking!r} in {mode} mode; pass text, possibly empty, in thinking mode and None otherwise"
            )
        text = self._turns.lead + answer if thinking is None else self._opened(join_response(thinking, answer), mode)
        if self._turns.end is None:
            raise self._endless()
        return self._behind(f"?{self._turns.openings[mode]}", text + self._turns.end)

    def thinking_ids(self, thinking: str) -> list[int]:
        """Ids that continue `prompt_ids` of thinking mode as worked thinking, up to where the answer begins."""
        return self._behind(f"?{self._turns.openings[THINKING]}", self._opened(join_response(thinking, ""), THINKING))

    def _opened(self, response: str, mode: Mode) -> str:
        """A response with thinking, without the mark that the prompt has opened its block with, if it has."""
        if not self.starts_in_thinking(mode):
            return response
        line_end = "\n" if self._turns.openings[mode].endswith("\n") else ""
        return response.removeprefix(THINK_START + line_end)

    def split_response_ids(self, ids: Sequence[int], mode: Mode) -> tuple[str | None, str]:
        """`split_response` for sampled ids: stop and other special tokens are dropped first."""
        return split_response(
            self.decode(ids, skip_special_tokens=True), started_in_thinking=self.starts_in_thinking(mode)
        )

    @property
    def turn_end_id(self) -> int:
        """The token that the template writes after an assistant's answer.

        Not always the end token: Qwen3's base checkpoints stop at `<|endoftext|>` and chat with `<|im_end|>`.

        Raises:
            UserError: The template does not end a turn with one special token.
        """
        end = self._turns.end_token
        if end is None:
            raise self._endless()
        return self._added_ids[end]

    @functools.cached_property
    def stop_thinking_ids(self) -> tuple[int, ...]:
        """Ids of `STOP_THINKING_TEXT`.

        Raises:
            UserError: The vocabulary has no thinking tokens.
        """
        self._require_think_tokens("a thinking budget")
        return tuple(self._behind("a", STOP_THINKING_TEXT))

    def starts_in_thinking(self, mode: Mode) -> bool:
        """Whether the prompt of `mode` ends inside an open think block, as in thinking-only checkpoints."""
        return mode in self._turns.started_in_thinking

    @functools.cached_property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that template and vocabulary can express; none without a template."""
        if "default" not in self._templates:
            return ()
        thinks = self.think_start_id is not None and self.think_end_id is not None
        return tuple(mode for mode in self._turns.modes if thinks or mode != THINKING)

    def check_mode(self, mode: Mode) -> None:
        """Refuses a mode that is not among `modes`.

        Raises:
            UserError: No template; thinking without `<think>` and `</think>` tokens, or with a template that has no
                think block; non-thinking with a template that always opens one.
        """
        if mode in self.modes:
            return
        if mode not in MODES:
            raise UserError(f"mode {mode!r}: unknown; use {THINKING!r} or {NON_THINKING!r}")
        self._template(None)
        if mode == THINKING:
            self._require_think_tokens("thinking mode")
            reason, other = "has no thinking mode", NON_THINKING
        else:
            reason, other = "always opens a think block, so non_thinking mode is not possible", THINKING
        raise UserError(
            f"{self.folder}: the chat template {reason}; ask in {other} mode only, or use a checkpoint with both"
        )

    @functools.cached_property
    def _turns(self) -> Turns:
        return Turns.of(self.render, self._added_ids, str(self.folder))

    @functools.cached_property
    def _added_ids(self) -> dict[str, int]:
        return {token.content: token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items()}

    def _endless(self) -> UserError:
        return UserError(f"{self.folder}: the chat template ends no turn with a special token; use another")

    def _behind(self, before: str, text: str) -> list[int]:
        """Ids of `text` behind `before`, which sentencepiece-style tokenizers give other ids than a text on its own.

        Where both merge across their border, a model that has read `before` still writes `text` in tokens of its own:
        those that it has behind a character with which it does not merge.
        """
        for start in (before, *_ANCHORS):
            if start not in self._prefixes:
                self._prefixes[start] = self.encode(start)
            prefix = self._prefixes[start]
            whole = self._tokenizer.encode(start + text, add_special_tokens=False)
            # By their places too: a token for all that is unknown stays the same when it takes more in.
            apart = not prefix or whole.offsets[len(prefix) - 1][1] <= len(start)
            if apart and whole.ids[: len(prefix)] == prefix:
                return whole.ids[len(prefix) :]
        raise UserError(
            f"{self.folder}: the tokenizer merges {text[:20]!r} with whatever stands before it, so that a response has "
            "no tokens of its own; use another tokenizer"
        )

    def _require_think_tokens(self, purpose: str) -> None:
        if self.think_start_id is None or self.think_end_id is None:
            raise UserError(
                f"{self.folder}: {purpose} needs {THINK_START} and {THINK_END} as tokens and the vocabulary "
                "lacks them; use a Qwen3 tokenizer or non_thinking mode only"
            )

    def _special_id(self, role: str) -> int | None:
        text = self._files.special_tokens.get(role)
        token_id = None if text is None else self._tokenizer.token_to_id(text)
        if text is not None and token_id is None:
            raise UserError(
                f"{self.folder}: {role} {text!r} is not in tokenizer.json; take both files from one checkpoint"
            )
        return token_id

    def _template(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            named = f" but {', '.join(self._templates)}" if self._templates else ""
            raise UserError(
                f"{self.folder}: no chat template{named}; add chat_template.jinja or the chat_template entry of "
                "tokenizer_config.json from the instruction-tuned checkpoint"
            )
        return self._templates[name]


def split_response(text: str, *, started_in_thinking: bool = False) -> tuple[str | None, str]:
    """Thinking and answer of a response.

    Thinking is None where there is no think block and "" where it is empty. A block that never closes is all thinking
    and the answer "". With several `</think>` the last one counts, so that the answer holds none.

    Args:
        text: What the assistant wrote, without the stop token.
        started_in_thinking: Whether the prompt had already opened the block.
    """
    before, end, after = text.rpartition(THINK_END)
    if end:
        return before.lstrip().removeprefix(THINK_START).strip("\n"), after.lstrip("\n")
    if started_in_thinking or text.lstrip().startswith(THINK_START):
        return text.lstrip().removeprefix(THINK_START).strip("\n"), ""
    return None, text


def join_response(thinking: str | None, answer: str) -> str:
    """What an assistant writes for `thinking` and `answer`: the inverse of `split_response`, in Qwen3's layout."""
    if thinking is None:
        return answer
    return f"{THINK_START}\n{thinking}\n{THINK_END}\n\n{answer}"


def with_flag(query: str, flag: Flag) -> str:
    """The query with a soft switch, in the form of Qwen3's training data. Where there are several the last one wins."""
    return f"{query} /{flag}"


def last_flag(messages: Sequence[Message]) -> Flag | None:
    """The soft switch in force: the last /think or /no_think in a user or system turn, None where there is none."""
    for message in reversed(messages):
        content = message.get("content")
        # Looking for a character is much faster, and most texts have none.
        if message.get("role") in ("user", "system") and isinstance(content, str) and "/" in content:
            flags = _FLAG.findall(content)
            if flags:
                return flags[-1]
    return None


def without_flags(text: str) -> str:
    """The text without its soft switches: what is asked, whichever mode it is asked in."""
    return _FLAG.sub("", text)
