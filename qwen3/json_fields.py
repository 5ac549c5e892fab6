"""JSON objects from outside, read strictly and accessed by type, so that a complaint names the key and its value."""

import collections
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qwen3.errors import UserError
from qwen3.field_types import MOST, shown

Default = TypeVar("Default")
_REQUIRED: Any = object()

_DEEPEST = 100
_LARGEST = 3e38


def read_object(path: Path, missing: str, *, damaged: str = "fetch the file again") -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises UserError as `parse_object`, or where the file cannot be read; `missing` is the remedy where there is none,
    `damaged` where it is no JSON.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {missing}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read ({reason}); make it a readable file") from None
    return parse_object(path, content, damaged)


def parse_object(path: Path, content: bytes, damaged: str = "fetch the file again") -> dict[str, Any]:
    """The object that the content of file `path` holds.

    Raises UserError, naming the file, for anything else than UTF-8 with JSON in it; for NaN, an infinity, and a number
    too large for one; for a key that an object has twice, of which other programs take the one or the other; and for
    what is nested more than 100 deep, which others cannot walk through.
    """
    try:
        value = json.loads(
            content.decode("utf-8-sig"),
            parse_constant=_no_number,
            parse_float=_finite_number,
            object_pairs_hook=_distinct_keys,
        )
        if _nested_too_deep(value):
            raise RecursionError
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start + 1}); {damaged}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {damaged}") from None
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except ValueError:
        raise UserError(f"{path} holds a number of thousands of digits; {damaged}") from None
    except RecursionError:
        raise UserError(f"{path} nests lists and objects more than {_DEEPEST} deep; {damaged}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object; {damaged}")
    return value


def _nested_too_deep(value: Any) -> bool:
    """Whether JSON data has lists and objects inside of each other more than 100 times."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        holders = [one for one in level if isinstance(one, dict | list)]
        level = [item for one in holders for item in (one.values() if isinstance(one, dict) else one)]
    return any(isinstance(one, dict | list) for one in level)


def _no_number(text: str) -> float:
    raise UserError(f"holds {text}, which is no number; correct it")


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise UserError(f"holds {text[:40]}, which is too large for a number; correct it")
    return number


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"has the key {shown(key)} twice in one object; leave one")
    return found


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
        if isinstance(value, int | float) and not abs(value) < _LARGEST:
            raise UserError(f"{self._prefix}{key} is {shown(value)}; it must be a number that float32 holds")
        return float(value) if isinstance(value, int) else value

    def flag(self, key: str, default: Default = _REQUIRED) -> bool | Default:
        return self._typed(key, default, bool, "true or false")

    def integers(self, key: str) -> tuple[int, ...]:
        """The list of whole numbers under `key`, empty where there is none."""
        value = self._typed(key, [], list, "a list of whole numbers")
        if not all(type(entry) is int and 0 <= entry <= MOST for entry in value):
            raise UserError(f"{self._prefix}{key} is {shown(value)}; it must be a list of whole numbers in 0..{MOST}")
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
            raise UserError(f"{self._prefix}{key} is {shown(value)}; it must be {description}")
        return value
