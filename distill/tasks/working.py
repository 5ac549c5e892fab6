"""Worked thinking for sums and products: written for the teacher to learn, checked in what the student generates.

An exact answer can follow wrong working, so the report shows both.
"""

import itertools
import random
import re
from typing import Literal, NamedTuple

CROSSED_OUT = "x"
"""A line of a working by which the line before it counts for nothing."""
# Sums of a thousand products of two numbers of 20 digits each have up to 43.
_STEP = re.compile(r"(-?[0-9]{1,43}) *([+\-*]) *([0-9]{1,43}) *= *(-?[0-9]{1,43})")


class Step(NamedTuple):
    """One line: `left operator right = result`."""

    left: int
    operator: Literal["+", "-", "*"]
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


def chain_working(expression: str) -> str:
    """Running totals of a chain of sums and differences: "4 - 1 + 7" gives "4-1=3\\n3+7=10"."""
    return "\n".join(map(str, chain_steps(expression)))


def chain_steps(expression: str) -> list[Step]:
    """The only working that follows a chain from left to right."""
    first, *rest = expression.split()
    total = int(first)
    steps = []
    for operator, term in zip(rest[::2], map(int, rest[1::2]), strict=True):
        if operator not in ("+", "-"):
            raise ValueError(f"expression is {expression!r}; a chain has only + and - between its terms")
        result = total + term if operator == "+" else total - term
        steps.append(Step(total, operator, term, result))  # type: ignore[arg-type]
        total = result
    return steps


def chain_working_is_correct(expression: str, thinking_text: str) -> bool:
    """Whether the lines are exactly the running totals of the chain."""
    return read_steps(thinking_text) == chain_steps(expression)


def product_working(multiplicand: int, multiplier: int) -> str:
    """Products of the factors' parts, then their running total: "40*6=240\\n7*6=42\\n240+42=282"."""
    return "\n".join(map(str, _product_steps(multiplicand, multiplier)))


def _product_steps(multiplicand: int, multiplier: int) -> list[Step]:
    products = [
        Step(left, "*", right, left * right)
        for left, right in itertools.product(place_values(multiplicand), place_values(multiplier))
    ]
    return [*products, *chain_steps(" + ".join(str(step.result) for step in products))]


def product_working_is_correct(multiplicand: int, multiplier: int, thinking_text: str) -> bool:
    """Whether the lines hold each product of parts once and add them all up, in whatever order."""
    missing = set(itertools.product(place_values(multiplicand), place_values(multiplier)))
    unadded: list[int] = []
    for step in read_steps(thinking_text) or []:
        left, operator, right, result = step
        if operator == "*" and (left, right) in missing and result == left * right:
            missing.remove((left, right))
        elif operator == "+" and _takes(unadded, left, right) and result == left + right:
            unadded.remove(left)
            unadded.remove(right)
        else:
            return False
        unadded.append(result)
    return not missing and unadded == [multiplicand * multiplier]


def sum_of_products_working(expression: str) -> list[Step]:
    """The working of each product, then their running total: "47 * 6 - 3 * 5" gives 40*6=240 to 240+42=282, then 3*5=15
    and 282-15=267."""
    products = re.split(r" ([+-]) ", expression)
    steps, totals = [], []
    for product in products[::2]:
        multiplicand, multiplier = map(int, product.split(" * "))
        steps += _product_steps(multiplicand, multiplier)
        totals.append(str(multiplicand * multiplier))
    chain = " ".join(itertools.chain(*itertools.zip_longest(totals, products[1::2], fillvalue=""))).strip()
    return [*steps, *chain_steps(chain)]


def sum_of_products_working_is_correct(expression: str, thinking_text: str) -> bool:
    """Whether the lines are exactly the products by parts and the running totals."""
    return read_steps(thinking_text) == sum_of_products_working(expression)


def with_mistakes(working: str, share: float, rng: random.Random) -> str:
    """A working in which that share of the lines come first with a wrong result, which the next line crosses out:
    "4-1=3\\n3+7=11\\nx\\n3+7=10"."""
    lines = []
    for line in working.split("\n"):
        if rng.random() < share:
            left, result = line.split("=")
            wrong = int(result) + rng.choice((-10, -2, -1, 1, 2, 10))
            lines += [f"{left}={wrong}", CROSSED_OUT]
        lines.append(line)
    return "\n".join(lines)


def read_steps(thinking_text: str) -> list[Step] | None:
    """The lines of a working, without those that are crossed out; None where one of them is anything else."""
    lines: list[str] = []
    for line in thinking_text.strip().split("\n"):
        if line.strip() != CROSSED_OUT:
            lines.append(line)
        elif not lines:
            return None
        else:
            lines.pop()
    steps = []
    for line in lines:
        match = _STEP.fullmatch(line.strip())
        if match is None:
            return None
        steps.append(Step(int(match[1]), match[2], int(match[3]), int(match[4])))  # type: ignore[arg-type]
    return steps


def place_values(number: int) -> list[int]:
    """The parts that a number is multiplied by: 407 gives [400, 7], 0 gives [0]."""
    digits = str(number)
    parts = [int(digit) * 10 ** (len(digits) - place) for place, digit in enumerate(digits, start=1)]
    return [part for part in parts if part] or [0]


def _takes(unadded: list[int], left: int, right: int) -> bool:
    return unadded.count(left) > (left == right) and right in unadded
