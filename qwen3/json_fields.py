"""Typed access to a JSON object from outside, so that every complaint names the key and its value."""

from collections.abc import Mapping
from typing import Any, TypeVar

from qwen3.errors import UserError

Default = TypeVar("Default")
_REQUIRED: Any = object()


class JsonFields:
    """The keys of a JSON object, each read as one type. A key that is null counts as absent.

    Raises:
        UserError: From every method, where a value has another type or is absent without a default.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str = ""):
        self.raw = raw
        self._prefix = prefix

    def integer(self, key: str, default: Default = _REQUIRED) -> int | Default:
        return self._typed(key, default, int, "a whole number")

    def number(self, key: str, default: Default = _REQUIRED) -> float | Default:
        value = self._typed(key, default, (int, float), "a number")
        return float(value) if isinstance(value, int) else value

    def flag(self, key: str, default: Default = _REQUIRED) -> bool | Default:
        return self._typed(key, default, bool, "true or false")

    def integers(self, key: str) -> tuple[int, ...]:
        """The list of whole numbers under `key`, empty where there is none."""
        value = self._typed(key, [], list, "a list of whole numbers")
        if not all(type(entry) is int for entry in value):
            raise UserError(f"{self._prefix}{key} is {value!r}; it must be a list of whole numbers")
        return tuple(value)

    def object(self, key: str) -> "JsonFields":
        """The object under `key`, empty where there is none."""
        return JsonFields(self._typed(key, {}, dict, "an object"), f"{self._prefix}{key}.")

    def _typed(self, key: str, default: Any, kind: Any, description: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self._prefix}{key} is missing")
            return default
        # JSON's true is Python's True, which passes for a number.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self._prefix}{key} is {value!r}; it must be {description}")
        return value
