"""What a chat template can express, found by rendering with it: its modes, and how an assistant's turn begins and ends.

A template is never asked by name or by its text: whoever wrote it, what it renders is what the model reads.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

from qwen3.chat.template import Message
from qwen3.errors import UserError
from qwen3.rollout import MODES, NON_THINKING, THINKING, Mode

THINK_START: Final = "<think>"
THINK_END: Final = "</think>"
# Digits come through whatever a template does to texts, and no template has these of its own.
_QUESTION: Final = "4815162342"
_ANSWER: Final = "2718281828"


class Render(Protocol):
    """How a conversation becomes text; see `qwen3.chat.chat.ChatTokenizer.render`."""

    def __call__(
        self, messages: Sequence[Message], *, enable_thinking: bool = True, add_generation_prompt: bool = False
    ) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
    """An assistant's turns as one template writes them."""

    modes: tuple[Mode, ...]
    """The modes that the template can tell a model."""
    started_in_thinking: frozenset[Mode]
    """Those whose prompt ends inside an open think block."""
    openings: Mapping[Mode, str]
    """The end of every prompt of a mode, from the end of its question on."""
    lead: str
    """White space between a prompt and an answer without thinking; Llama 2 has a blank."""
    end: str | None
    """What follows an answer, up to and with the token that ends the turn; None where there is no such token."""
    end_token: str | None
    """That token."""

    @classmethod
    def of(cls, render: Render, tokens: Collection[str], origin: str) -> "Turns":
        """Of a template from `origin`; `tokens` are those that may end a turn.

        Raises UserError where it cannot render a user's question, or does not show it.
        """
        question = {"role": "user", "content": _QUESTION}
        prompts = {
            mode: render([question], enable_thinking=mode == THINKING, add_generation_prompt=True) for mode in MODES
        }
        if not all(_QUESTION in prompt for prompt in prompts.values()):
            raise UserError(
                f"{origin}: the chat template does not show the text of a user's turn; take one for texts from the "
                "original model"
            )
        openings = {mode: prompt.rpartition(_QUESTION)[2] for mode, prompt in prompts.items()}
        whole = render([question, {"role": "assistant", "content": _ANSWER}])
        before, answer, after = whole.rpartition(_ANSWER)
        lead = before.removeprefix(prompts[NON_THINKING])
        any_token = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        ending = re.match(rf"\s*({any_token})", after) if answer and any_token else None
        return cls(
            modes=_modes(prompts, openings),
            started_in_thinking=frozenset(mode for mode in MODES if _block(openings[mode]) == "open"),
            openings=openings,
            lead=lead if lead.isspace() else "",
            end=ending[0] if ending else None,
            end_token=ending[1] if ending else None,
        )


def _modes(prompts: Mapping[Mode, str], openings: Mapping[Mode, str]) -> tuple[Mode, ...]:
    """Both where their prompts differ, less what one contradicts; else the one that the only prompt stands for.

    A prompt without a think block is an answer's: Qwen's Instruct checkpoints of July 2025 have Qwen3's template but
    for the switch, and never think.
    """
    if prompts[THINKING] == prompts[NON_THINKING]:
        return (THINKING,) if _block(openings[THINKING]) == "open" else (NON_THINKING,)
    contradicted = {THINKING: "closed", NON_THINKING: "open"}
    return tuple(mode for mode in MODES if _block(openings[mode]) != contradicted[mode])


def _block(opening: str) -> str:
    """Whether a prompt ends in an open think block, after a closed one, or without any."""
    start, end = opening.rfind(THINK_START), opening.rfind(THINK_END)
    return "none" if start == end else "open" if start > end else "closed"
