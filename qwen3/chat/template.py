"""Chat templates as checkpoints ship them: untrusted jinja, rendered in a sandbox to the text transformers would give.

A template is part of a checkpoint, so it is run, never rewritten; and it is somebody else's program, so it sees
plain JSON values only and whatever goes wrong inside it is the checkpoint's or the conversation's fault.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3.errors import UserError

Message = Mapping[str, Any]
"""One turn: "role" and "content"; assistant turns may hold "reasoning_content" and "tool_calls"."""

# transformers accepts all three names for the same thing and shows templates the first (gpt-oss templates the second).
_THINKING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what an assistant wrote: here a scope and nothing more."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes <, > and & for HTML, which would put other tokens into tool definitions.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template.

    Args:
        source: The jinja text.
        origin: Where it came from, for error messages.

    Raises:
        UserError: The text is not a valid template.
    """

    def __init__(self, source: str, origin: str):
        self.source = source
        self.origin = origin
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{origin}: chat template, line {error.lineno}: {error.message}; take the original model's template"
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
            UserError: No messages, a value that JSON does not know, or the template raised; names the message.
        """
        if not messages:
            raise UserError(f"{self.origin}: cannot render a conversation without messages; give at least one")
        variables = {"tools": _plain(tools, "tools"), "documents": None, **(variables or {})}
        plain = [_as_template_reads(message, number) for number, message in enumerate(messages, 1)]
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as error:
            number = self._first_unrenderable(plain, variables)
            raise UserError(
                f"{self.origin}: the chat template cannot render message {number} of {len(plain)} "
                f"(role {plain[number - 1].get('role')!r}): {error}; correct that message"
            ) from error

    def _first_unrenderable(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> int:
        for number in range(1, len(messages)):
            try:
                self._template.render(messages=messages[:number], add_generation_prompt=False, **variables)
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
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}; use text, numbers, lists and objects only") from error
