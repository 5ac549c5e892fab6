"""What the fields of configuration dataclasses may hold: types and bounds, said once, in the fields' annotations.

Python does not check them; without this a text in the place of a number, or a number that no machine holds, is a
traceback at best, and hours into a run.
"""

import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union

from qwen3.errors import UserError

MOST = 2**31 - 1
"""The largest size, count or index: they have 32 bits on the devices."""
MOST_PROBLEMS = 10**7
"""Problems that one list holds: some ten gigabytes."""
_IN_32_BITS = "which is what 32 bits hold"
# The positive numbers that float32 holds with all their digits; smaller ones are 0 to a device.
_LEAST_FLOAT, _LARGEST_FLOAT = 2.0**-126, 2.0**127
_SHOWN_CHARACTERS = 120
_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", types.NoneType: "None"}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Of a number, as an annotation beside its type."""

    low: float
    high: float
    words: str | None = None
    """What a number is told to do that is not within; None names the bound that it breaks."""
    why: str = _IN_32_BITS
    """What the upper bound comes from."""

    def broken_by(self, value: float) -> str | None:
        """What `value` must do that it does not; None where it is within."""
        if self.low <= value <= self.high:
            return None
        return self.words or (f"be at least {self.low}" if value < self.low else f"be at most {self.high}, {self.why}")


Count = Annotated[int, Bounds(1, MOST)]
"""One or more."""
Natural = Annotated[int, Bounds(0, MOST)]
"""None or more."""
Problems = Annotated[int, Bounds(1, MOST_PROBLEMS, why="for all of them are kept in memory")]
"""One or more problems, drawn before anything is done with the first of them."""
Share = Annotated[float, Bounds(0, 1, "lie in 0..1")]
"""A part of a whole."""
Positive = Annotated[float, Bounds(_LEAST_FLOAT, _LARGEST_FLOAT, "be a number above 0 that float32 holds")]
"""More than nothing, also on a device."""
NotNegative = Annotated[float, Bounds(0, _LARGEST_FLOAT, "be 0 or a number above it that float32 holds")]
"""Nothing or more."""


def check_fields(owner: object, prefix: str = "") -> None:
    """Refuses a dataclass with a value of another type than its field names, or out of the field's bounds.

    To be called first in `__post_init__`, so that later checks meet only what they can compare. `prefix` is what a user
    calls the owner. Raises UserError with the field, its value and what it must be.
    """
    kind: Any = type(owner)
    for name, hint in _hints(kind).items():
        wrong = misfit(getattr(owner, name), hint, f"{prefix}.{name}" if prefix else name)
        if wrong is not None:
            raise UserError(wrong)


def check_product(sizes: Mapping[str, int], why: str, most: int = MOST) -> None:
    """Refuses sizes, given by their names, that are each within bounds and together are not."""
    product = math.prod(int(size) for size in sizes.values())
    if product > most:
        text = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"{text} is {product}; it must be at most {most}, {why}")


def misfit(value: Any, hint: Any, field: str = "it") -> str | None:
    """What is wrong with `value` as a `hint`: field, value and remedy; else None.

    Args:
        hint: A type as dataclasses spell it: classes, unions, literals, tuples and mappings of such, with `Bounds`.
            Of a dataclass only the class counts: it has checked its own fields. In what may be anything, numbers must
            be finite.
        field: The dotted name of what holds the value.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return misfit(value, parts[0], field) or _out_of_bounds(value, parts[1:], field)
    if hint is Any:
        return _not_finite(value, field)
    if origin in (Union, types.UnionType):
        found = [misfit(value, part, field) for part in parts]
        # Of the type that the value has, what is wrong inside is worth more than that it is none of the others.
        inside = (one for one, part in zip(found, parts, strict=True) if _fits_outside(value, part))
        return None if None in found else next(inside, None) or _mismatch(value, hint, field)
    if not _fits_outside(value, hint):
        return _mismatch(value, hint, field)
    if origin is tuple:
        return _first(misfit(item, parts[0], f"{field}[{index}]") for index, item in enumerate(value))
    if isinstance(value, Mapping) and parts:
        return _first(misfit(key, parts[0], f"a name in {field}") for key in value) or _first(
            misfit(item, parts[1], f"{field}.{key}") for key, item in value.items()
        )
    return _not_finite(value, field)


def described(hint: Any) -> str:
    """A type in plain English."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return described(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"a tuple, each entry {described(parts[0])}"
    if origin is not None:
        return f"a dictionary, each value {described(parts[1])}"
    return _WORDS.get(hint) or str(getattr(hint, "__name__", hint))


def shown(value: Any) -> str:
    """A value as Python writes it, on one line and not too long to be read."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits_outside(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, whatever it has inside and whatever its bounds."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _fits_outside(value, typing.get_args(hint)[0])
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        # Python's True is a number to Python only.
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _out_of_bounds(value: Any, annotations: tuple[Any, ...], field: str) -> str | None:
    bounds = next(one for one in annotations if isinstance(one, Bounds))
    broken = bounds.broken_by(value)
    return None if broken is None else f"{field} is {shown(value)}; it must {broken}"


def _not_finite(value: Any, field: str) -> str | None:
    """A complaint about NaN or an infinity in plain data."""
    if isinstance(value, Mapping):
        return _first(_not_finite(item, f"{field}.{key}") for key, item in value.items())
    if isinstance(value, list | tuple):
        return _first(_not_finite(item, f"{field}[{index}]") for index, item in enumerate(value))
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and not math.isfinite(value):
        return f"{field} is {value}; it must be a finite number"
    return None


def _mismatch(value: Any, hint: Any, field: str) -> str:
    named = isinstance(value, str) and typing.get_origin(hint) is Literal
    near = difflib.get_close_matches(value, typing.get_args(hint), n=1) if named else []
    remedy = f"perhaps you meant {near[0]!r}" if near else f"it must be {described(hint)}"
    return f"{field} is {shown(value)}; {remedy}"


def _first(found: Iterable[str | None]) -> str | None:
    return next((one for one in found if one is not None), None)
