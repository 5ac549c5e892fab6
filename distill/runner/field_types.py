"""Whether the values in a configuration dataclass are of the types that its fields name.

Python does not check; without this a text in the place of a number is a traceback at best, and hours into a run.
"""

import dataclasses
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", types.NoneType: "None"}


def misfit(value: Any, hint: Any, field: str = "") -> str | None:
    """What is wrong with `value` as a `hint`, or with something inside of it: field, value and remedy; else None.

    Args:
        hint: A type as dataclasses spell it: classes, unions, literals, tuples and mappings of such.
        field: The dotted name of what holds the value; empty for a dataclass whose own fields are meant.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or _fits_plainly(value, hint):
        return None
    if origin in (Union, types.UnionType):
        return _misfit_of_all(value, hint, parts, field)
    if origin is tuple and isinstance(value, tuple):
        return _first(misfit(item, parts[0], f"{field}[{index}]") for index, item in enumerate(value))
    if origin is not None and issubclass(origin if isinstance(origin, type) else object, Mapping):
        if isinstance(value, Mapping):
            return _first(misfit(item, parts[1], f"{field}.{key}") for key, item in value.items())
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, hint):
        hints = typing.get_type_hints(type(value))
        prefix = f"{field}." if field else ""
        names = [one.name for one in dataclasses.fields(value) if hasattr(value, one.name)]
        return _first(misfit(getattr(value, name), hints[name], prefix + name) for name in names)
    return f"{field or 'it'} is {value!r}; it must be {described(hint)}"


def described(hint: Any) -> str:
    """A type in plain English."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"a tuple, each entry {described(parts[0])}"
    if origin is not None:
        return f"a dictionary, each value {described(parts[1])}"
    return _WORDS.get(hint) or str(getattr(hint, "__name__", hint))


def _fits_plainly(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        # Python's True is a number to Python only.
        return isinstance(value, kind) and not isinstance(value, bool)
    return hint in _WORDS and isinstance(value, hint)


def _misfit_of_all(value: Any, hint: Any, parts: tuple[Any, ...], field: str) -> str | None:
    found = [misfit(value, part, field) for part in parts]
    if None in found:
        return None
    # Of the class that the value has, what is wrong inside is worth more than that it is none of the others.
    inside = (one for one, part in zip(found, parts, strict=True) if isinstance(part, type) and isinstance(value, part))
    return next(inside, f"{field or 'it'} is {value!r}; it must be {described(hint)}")


def _first(found: typing.Iterable[str | None]) -> str | None:
    return next((one for one in found if one is not None), None)
