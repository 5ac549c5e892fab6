"""Chat templates as checkpoints ship them: untrusted jinja, rendered in a sandbox to the text transformers would give.

A template is part of a checkpoint, so it is run, never rewritten; and it is somebody else's program, so it sees
plain JSON values only and whatever goes wrong inside it is the checkpoint's or the conversation's fault.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from qwen3.chat.sandbox import SECONDS, OutOfTime, Sandbox
from qwen3.errors import UserError

Message = Mapping[str, Any]
"""One turn: "role" and "content"; assistant turns may hold "reasoning_content" and "tool_calls"."""

# transformers accepts all three names for the same thing and shows templates the first (gpt-oss templates the second).
_THINKING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One compiled template.

    Args:
        source: The jinja text.
        origin: Where it came from, for error messages.
        now: The moment that a template which tells the date is told.

    Raises:
        UserError: The text is not a valid template.
    """

    def __init__(self, source: str, origin: str, now: datetime | None = None):
        self.origin = origin
        self._sandbox = Sandbox(now or datetime.now())
        try:
            self._template = self._sandbox.template(source)
        except Exception as error:
            # jinja's own for what it cannot parse; Python's for what it cannot compile, such as 20 nested loops.
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UserError(
                f"{origin}: chat template{line}: {_one_line(error)}; take the original model's template"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text.

        As in transformers, keys whose value is None count as absent, and "thinking" or "reasoning" serve as
        "reasoning_content".

        Args:
            messages: At least one turn.
            tools: JSON schemas of callable functions.
            add_generation_prompt: Whether to open the assistant's next turn.
            variables: Whatever else the template reads, such as eos_token or enable_thinking.

        Raises:
            UserError: No messages, a value that JSON does not know, the template raised, or it takes too long; names
                the message.
        """
        if not messages:
            raise UserError(f"{self.origin}: cannot render a conversation without messages; give at least one")
        variables = {"tools": _plain(tools, "tools"), "documents": None, **(variables or {})}
        plain = [_as_template_reads(message, number) for number, message in enumerate(messages, 1)]
        self._sandbox.start_clock()
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **variables)
        except OutOfTime as error:
            raise UserError(
                f"{self.origin}: the chat template does not end within {SECONDS:.0f} seconds on a conversation of "
                f"{len(plain)} messages; take the original model's template, or shorten the conversation"
            ) from error
        except Exception as error:
            number = self._first_unrenderable(plain, variables)
            raise UserError(
                f"{self.origin}: the chat template cannot render message {number} of {len(plain)} "
                f"(role {plain[number - 1].get('role')!r}): {_one_line(error)}; correct that message"
            ) from error

    def _first_unrenderable(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> int:
        """The last where the search itself runs out of time."""
        self._sandbox.start_clock()
        for number in range(1, len(messages)):
            try:
                self._template.render(messages=messages[:number], add_generation_prompt=False, **variables)
            except OutOfTime:
                break
            except Exception:  # noqa: BLE001 - the template's own code; the caller reports the error of the whole
                return number
        return len(messages)


def _as_template_reads(message: Message, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f'message {number}: expected {{"role": …, "content": …}}, got {type(message).__name__}')
    present = {key: value for key, value in message.items() if value is not None}
    thinking = next((present[field] for field in _THINKING_FIELDS if field in present), None)
    if thinking is not None:
        present = {"thinking": thinking, **present, "reasoning_content": thinking}
    return _plain(present, f"message {number}")


def _plain(value: Any, what: str) -> Any:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{what}: lists and objects are nested too deeply; nest them less") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: has half of a surrogate pair; write the whole character") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}; use text, numbers, lists and objects only") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
