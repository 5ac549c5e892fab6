"""Conversations and tools as a data set gives them, checked before a chat template is given them."""

import json
from collections.abc import Mapping
from typing import Any, Final

from distill.tasks.rows import kind, plain
from qwen3.errors import UserError

_ROLES: Final = ("system", "user", "assistant", "tool")


def checked_messages(where: str, column: str, value: object) -> tuple[Mapping[str, Any], ...]:
    """The turns of a conversation that waits for an answer, from a list or its JSON text.

    A system turn and a tool's result may be empty, and a turn of the assistant that calls tools. Raises UserError.
    """
    value = _parsed(where, column, value)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {column} is {kind(value)}; give a list of messages with role and content")
    messages = []
    for position, message in enumerate(value, start=1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise UserError(f"{where}: {column} message {position} has no role of {', '.join(_ROLES)}; mend the row")
        if message["role"] in ("system", "tool") and message.get("content") in (None, ""):
            message = message | {"content": ""}
        elif message["role"] != "assistant" or not message.get("tool_calls") or message.get("content"):
            checked_text(where, f"{column} message {position} content", message.get("content"))
        messages.append(message)
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{where}: {column} ends with a message of the {messages[-1]['role']}; "
            "end it with the user's and put the reply into the answer column"
        )
    return tuple(messages)


def checked_tools(where: str, column: str, value: object) -> tuple[Mapping[str, Any], ...] | None:
    """JSON schemas of functions, as a list or as its JSON text; None where there are none. Raises UserError."""
    value = _parsed(where, column, value)
    if value is None or value in ("", []):
        return None
    if not isinstance(value, list) or not all(isinstance(schema, dict) for schema in value):
        raise UserError(f"{where}: {column} is {kind(value)}; give a list of JSON schemas, one a function")
    return tuple(value)


def checked_text(where: str, column: str, value: object) -> str:
    """The value, if it is a text that says anything. Raises UserError."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {column} is {kind(value)}; give a text")
    return value


def _parsed(where: str, column: str, value: object) -> object:
    """The value, or the list whose JSON text it is: some data sets keep lists so, to fit any column."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return plain(f"{where}: {column}", json.loads(value))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {column} begins like a list, but is not JSON ({error}); mend the row") from error
