"""What a field may hold is said by its annotation; anything else is named in one line."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest

from qwen3.errors import UserError
from qwen3.field_types import Count, Natural, Share, check_fields, check_product, misfit


@dataclasses.dataclass(frozen=True)
class Inner:
    size: Count = 1
    share: Share | None = None

    def __post_init__(self) -> None:
        check_fields(self, "inner")


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("8", int, "it is '8'; it must be a whole number"),
        (True, int, "it is True; it must be a whole number"),
        (np.int64(3), int, None),
        (1, float, None),
        (None, int | None, None),
        (1.5, int | None, "it is 1.5; it must be a whole number or None"),
        ((1, "2"), tuple[int, ...], "it[1] is '2'; it must be a whole number"),
        ([1], tuple[int, ...], "it is [1]; it must be a tuple, each entry a whole number"),
        ({"a": 1, "b": "c"}, Mapping[str, int], "it.b is 'c'; it must be a whole number"),
        ({1: 2}, Mapping[str, int], "a name in it is 1; it must be a text"),
        ((), int, "it is (); it must be a whole number"),
        ("kl", Literal["jsd", "skew_kl"], "it is 'kl'; it must be 'jsd' or 'skew_kl'"),
        (["kl"], Literal["jsd", "skew_kl"], "it is ['kl']; it must be 'jsd' or 'skew_kl'"),
        ("jds", Literal["jsd", "skew_kl"], "it is 'jds'; perhaps you meant 'jsd'"),
        ({}, Inner, "it is {}; it must be Inner"),
        ({"x": {}}, Mapping[str, Inner | None], "it.x is {}; it must be Inner or None"),
        (0, Count | None, "it is 0; it must be at least 1"),
        (2**31, Count | None, "it is 2147483648; it must be at most 2147483647, which is what 32 bits hold"),
        ("0", Count | None, "it is '0'; it must be a whole number or None"),
        ((1, -1), tuple[Natural, ...] | None, "it[1] is -1; it must be at least 0"),
        (math.nan, float, "it is nan; it must be a finite number"),
        (-math.inf, float | None, "it is -inf; it must be a finite number"),
        (math.nan, Share, "it is nan; it must be a finite number"),
        ({"a": [1, {"b": math.nan}]}, dict[str, Any], "it.a[1].b is nan; it must be a finite number"),
        ({"a": [1, {"b": "nan"}]}, dict[str, Any], None),
        (np.zeros((2, 2)), int, "it is array([[0., 0.], [0., 0.]]); it must be a whole number"),
    ],
)
def test_a_value_that_cannot_be_is_named(value: Any, hint: Any, message: str | None) -> None:
    assert misfit(value, hint) == message


def test_values_that_do_not_fit_a_line_are_cut() -> None:
    assert len(misfit([1] * 10**6, int) or "") < 200
    assert misfit(10**5000, Count) == (
        "it is a number of thousands of digits; it must be at most 2147483647, which is what 32 bits hold"
    )


def test_a_dataclass_checks_its_own_fields() -> None:
    assert Inner(size=2**31 - 1, share=0.5).share == 0.5
    with pytest.raises(UserError, match=r"^inner\.share is 2; it must lie in 0\.\.1$"):
        Inner(share=2)


def test_sizes_are_bounded_together() -> None:
    check_product({"rows": 2**16, "length": 2**15 - 1}, "for so it is")
    with pytest.raises(UserError, match=r"^rows 65536 × length 32768 is 2147483648; it must be at most 2147483647, "):
        check_product({"rows": np.int32(2**16), "length": np.int32(2**15)}, "for so it is")
