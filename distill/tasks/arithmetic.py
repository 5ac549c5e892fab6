"""The task of the quickstart: two families that reasoning-gym asks, with worked thinking that it does not have.

Both are drawn here in its wording, because it cannot be installed without a C compiler.
"""

import dataclasses
import math
import random
import re
from collections.abc import Iterator
from typing import Annotated

from distill.tasks.drawing import Weight, check_searchable, mix, stream_seed, unique_problems
from distill.tasks.problem import Excluded, Problem, Split, plain_words, split_of
from distill.tasks.verifiers import equal_integers
from distill.tasks.working import (
    chain_steps,
    chain_working,
    chain_working_is_correct,
    product_working,
    product_working_is_correct,
)
from qwen3.errors import UserError
from qwen3.field_types import Bounds, Share, check_fields

CHAIN_SUM = "chain_sum"
PRODUCTS = "products"
_CHAIN_QUESTION = "State the final answer to the following arithmetic problem: {} ="
_CHAIN_EXPRESSION = re.compile(re.escape(_CHAIN_QUESTION).replace(r"\{\}", "([0-9]+(?: [-+] [0-9]+)+)"))
# reasoning-gym's own generator gives all factors of a problem equally many digits.
_PRODUCT_QUESTION = "Solve the following multiplication: {} * {}. Give only the result as your final answer."
_PRODUCT_FACTORS = re.compile(re.escape(_PRODUCT_QUESTION).replace(r"\{\}", "([0-9]+)"))

_Terms = Annotated[int, Bounds(2, 1_000, why="for the working of more fills more than a context")]
_Digits = Annotated[int, Bounds(1, 20, why="for working with longer numbers cannot be checked")]
_Total = Annotated[int, Bounds(-(10**23), 10**23, why="beyond which no chain comes")]
_MOST_DROPPED_TERMS = 10**6
"""Terms of chains in a row with totals out of range, after which no further chain is looked for: a second or two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainSum:
    """Sums and differences as reasoning-gym's `chain_sum` draws them, e.g. `4 - 1 + 7`."""

    weight: Weight = 1.0
    """Share of this family, relative to the other's."""
    min_terms: _Terms = 4
    """Fewest numbers in a chain."""
    max_terms: _Terms = 8
    """Most numbers in a chain."""
    min_digits: _Digits = 1
    """Fewest digits of each term; all terms of a problem have equally many."""
    max_digits: _Digits = 1
    """Most digits of each term."""
    min_total: _Total | None = None
    """Keep only chains whose running totals are all at least this (0: never negative)."""
    max_total: _Total | None = None
    """Keep only chains whose running totals are all at most this."""

    def __post_init__(self) -> None:
        check_fields(self, "chain_sum")
        _check_range("chain_sum", "terms", self.min_terms, self.max_terms)
        _check_range("chain_sum", "digits", self.min_digits, self.max_digits)
        low, high = self.min_total, self.max_total
        # The first term is a total too: bounds that leave no room for one would search for ever.
        if (low is not None and low > 0) or (high is not None and high < 10**self.max_digits - 1):
            raise UserError(
                f"chain_sum totals from {low} to {high} leave out single terms; "
                f"use min_total <= 0 and max_total >= {10**self.max_digits - 1}"
            )

    def candidates(self, seed: int) -> Iterator[Problem]:
        """Endless problems, with repeats. Raises UserError where hardly any chain stays within the totals."""
        rng = random.Random(stream_seed(CHAIN_SUM, seed))
        dropped_terms = 0
        low = -math.inf if self.min_total is None else self.min_total
        high = math.inf if self.max_total is None else self.max_total
        while True:
            expression = self._expression(rng)
            steps = chain_steps(expression)
            dropped_terms += len(steps) + 1
            if dropped_terms > _MOST_DROPPED_TERMS:
                raise UserError(
                    f"hardly any chain of {self.min_terms} to {self.max_terms} terms has totals from {self.min_total} "
                    f"to {self.max_total}; widen chain_sum's totals or lower its max_terms"
                )
            if all(low <= step.result <= high for step in steps):
                dropped_terms = 0
                yield Problem(
                    prompt=_CHAIN_QUESTION.format(expression),
                    answer=str(steps[-1].result),
                    solution=chain_working(expression),
                    family=CHAIN_SUM,
                )

    def _expression(self, rng: random.Random) -> str:
        terms = rng.randint(self.min_terms, self.max_terms)
        digits = rng.randint(self.min_digits, self.max_digits)
        chain = [str(_number(rng, digits))]
        for _ in range(terms - 1):
            chain += [rng.choice("+-"), str(_number(rng, digits))]
        return " ".join(chain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Products:
    """Products of two numbers in the wording of reasoning-gym's `products`, e.g. `47 * 6`.

    The larger factor comes first: a product and its mirror image are one problem, never one on each side of the split.
    """

    weight: Weight = 1.0
    """Share of this family, relative to the other's."""
    min_digits: _Digits = 2
    """Fewest digits of the first factor."""
    max_digits: _Digits = 3
    """Most digits of the first factor."""
    min_multiplier_digits: _Digits = 1
    """Fewest digits of the second factor."""
    max_multiplier_digits: _Digits = 1
    """Most digits of the second factor."""

    def __post_init__(self) -> None:
        check_fields(self, "products")
        _check_range("products", "digits", self.min_digits, self.max_digits)
        _check_range("products", "multiplier_digits", self.min_multiplier_digits, self.max_multiplier_digits)

    def candidates(self, seed: int) -> Iterator[Problem]:
        """Endless problems, with repeats."""
        rng = random.Random(stream_seed(PRODUCTS, seed))
        while True:
            factors = (
                _number(rng, rng.randint(self.min_digits, self.max_digits)),
                _number(rng, rng.randint(self.min_multiplier_digits, self.max_multiplier_digits)),
            )
            larger, smaller = max(factors), min(factors)
            yield Problem(
                prompt=_PRODUCT_QUESTION.format(larger, smaller),
                answer=str(larger * smaller),
                solution=product_working(larger, smaller),
                family=PRODUCTS,
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Chains of sums and products by parts, with worked thinking and exact verifiers."""

    chain_sum: ChainSum = dataclasses.field(default_factory=ChainSum)
    products: Products = dataclasses.field(default_factory=Products)
    held_out_fraction: Share = 0.1
    """Share of all questions that is kept from training."""
    weight: Weight = 1.0
    """Share of this task's problems, relative to the other tasks'; 0 leaves it out."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_searchable(self.held_out_fraction)
        if self.chain_sum.weight + self.products.weight == 0:
            raise UserError("chain_sum.weight and products.weight are both 0; give one of them a positive weight")

    def problems(self, split: Split, count: int, seed: int, without: Excluded | None = None) -> list[Problem]:
        """See `Task.problems`."""
        streams = {
            CHAIN_SUM: (self.chain_sum.weight, self.chain_sum.candidates(seed)),
            PRODUCTS: (self.products.weight, self.products.candidates(seed)),
        }
        return mix(
            {
                name: (weight, unique_problems(candidates, split, self.held_out_fraction, without))
                for name, (weight, candidates) in streams.items()
            },
            count=count,
            seed=seed,
            split=split,
        )

    def size(self, split: Split, without: Excluded | None = None) -> None:
        """None: there are as many as the options of the families allow."""

    def holds_out(self, question_text: str) -> bool:
        """See `Task.holds_out`; of questions in the wording of its families, the held-out share."""
        question = plain_words(question_text)
        own = _CHAIN_EXPRESSION.fullmatch(question) or _PRODUCT_FACTORS.fullmatch(question)
        return own is not None and split_of(question, self.held_out_fraction) == "held_out"

    def left_out(self, without: Excluded | None = None) -> list[str]:
        """Empty: what a generator does not ask is no data that anybody gave."""
        return []

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether the text is the number and nothing else."""
        return equal_integers(answer_text, problem.known_answer)

    def working_is_correct(self, problem: Problem, thinking_text: str) -> bool:
        """Whether every line of the working is right, follows from the question and leads to its result."""
        if match := _CHAIN_EXPRESSION.fullmatch(problem.prompt):
            return chain_working_is_correct(match[1], thinking_text)
        if match := _PRODUCT_FACTORS.fullmatch(problem.prompt):
            return product_working_is_correct(int(match[1]), int(match[2]), thinking_text)
        raise ValueError(f"prompt is {problem.prompt!r}; ask the task that made the problem")


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _check_range(family: str, unit: str, low: int, high: int) -> None:
    if low > high:
        raise UserError(f"{family} has {unit} from {low} to {high}; use min_{unit} <= max_{unit}")
