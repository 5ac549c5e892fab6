"""The task of the small experiments: families that reasoning-gym asks, with worked thinking that it does not have.

They are drawn here in its wording, because it cannot be installed without a C compiler.
"""

import dataclasses
import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Annotated

from distill.tasks.drawing import Weight, check_searchable, mix, stream_seed, unique_problems
from distill.tasks.problem import Excluded, Problem, Split, gives, plain_words, split_of
from distill.tasks.verifiers import equal_integers
from distill.tasks.working import (
    chain_steps,
    chain_working,
    chain_working_is_correct,
    product_working,
    product_working_is_correct,
    sum_of_products_working,
    sum_of_products_working_is_correct,
    with_mistakes,
)
from qwen3.errors import UserError
from qwen3.field_types import Bounds, Share, check_fields

CHAIN_SUM = "chain_sum"
PRODUCTS = "products"
SUM_OF_PRODUCTS = "basic_arithmetic"
_CHAIN_QUESTION = "State the final answer to the following arithmetic problem: {} ="
_CHAIN_EXPRESSION = re.compile(re.escape(_CHAIN_QUESTION).replace(r"\{\}", "([0-9]+(?: [-+] [0-9]+)+)"))
# reasoning-gym's own generator gives all factors of a problem equally many digits.
_PRODUCT_QUESTION = "Solve the following multiplication: {} * {}. Give only the result as your final answer."
_PRODUCT_FACTORS = re.compile(re.escape(_PRODUCT_QUESTION).replace(r"\{\}", "([0-9]+)"))
_SUM_QUESTION = "Calculate {}."
_SUM_EXPRESSION = re.compile(
    re.escape(_SUM_QUESTION).replace(r"\{\}", r"([0-9]+ \* [0-9]+(?: [-+] [0-9]+ \* [0-9]+)+)")
)

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
class SumOfProducts:
    """Sums and differences of products, as reasoning-gym's `basic_arithmetic` words them, e.g. `47 * 6 - 3 * 5`."""

    weight: Weight = 0.0
    """Share of this family, relative to the others'."""
    min_products: _Terms = 2
    """Fewest products in a sum."""
    max_products: _Terms = 2
    """Most products in a sum."""
    min_digits: _Digits = 1
    """Fewest digits of a product's first factor."""
    max_digits: _Digits = 2
    """Most digits of a product's first factor."""
    multiplier_digits: _Digits = 1
    """Digits of its second factor."""

    def __post_init__(self) -> None:
        check_fields(self, "sum_of_products")
        _check_range("sum_of_products", "products", self.min_products, self.max_products)
        _check_range("sum_of_products", "digits", self.min_digits, self.max_digits)

    def candidates(self, seed: int) -> Iterator[Problem]:
        """Endless problems, with repeats."""
        rng = random.Random(stream_seed(SUM_OF_PRODUCTS, seed))
        while True:
            parts = [self._product(rng)]
            for _ in range(rng.randint(self.min_products, self.max_products) - 1):
                parts += [rng.choice("+-"), self._product(rng)]
            expression = " ".join(parts)
            steps = sum_of_products_working(expression)
            yield Problem(
                prompt=_SUM_QUESTION.format(expression),
                answer=str(steps[-1].result),
                solution="\n".join(map(str, steps)),
                family=SUM_OF_PRODUCTS,
            )

    def _product(self, rng: random.Random) -> str:
        digits = rng.randint(self.min_digits, self.max_digits)
        return f"{_number(rng, digits)} * {_number(rng, self.multiplier_digits)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Chains of sums, products by parts and sums of products, with worked thinking and exact verifiers."""

    chain_sum: ChainSum = dataclasses.field(default_factory=ChainSum)
    products: Products = dataclasses.field(default_factory=Products)
    sum_of_products: SumOfProducts = dataclasses.field(default_factory=SumOfProducts)
    mistakes: Share = 0.0
    """Share of the lines of worked thinking that come with a wrong result first and are crossed out: what a teacher
    that hardly errs must have read to know what a student that errs should say next. Such lines are not judged."""
    held_out_fraction: Share = 0.1
    """Share of all questions that is kept from training; 1 keeps them all for evaluation, 0 none."""
    weight: Weight = 1.0
    """Share of this task's problems, relative to the other tasks'; 0 leaves it out."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_searchable(self.held_out_fraction)
        if self.chain_sum.weight + self.products.weight + self.sum_of_products.weight == 0:
            raise UserError("the weights of chain_sum, products and sum_of_products are all 0; give one a positive one")

    def problems(self, split: Split, count: int, seed: int, without: Excluded | None = None) -> list[Problem]:
        """See `Task.problems`."""
        problems = mix(
            {
                name: (
                    family.weight,
                    unique_problems(family.candidates(seed), split, self.held_out_fraction, without),
                )
                for name, family in self._families.items()
            },
            count=count,
            seed=seed,
            split=split,
        )
        if not self.mistakes:
            return problems
        return [dataclasses.replace(problem, solution=self._with_mistakes(problem, seed)) for problem in problems]

    def _with_mistakes(self, problem: Problem, seed: int) -> str:
        assert problem.solution is not None
        rng = random.Random(stream_seed("mistakes", seed, problem.prompt))
        return with_mistakes(problem.solution, self.mistakes, rng)

    @property
    def _families(self) -> dict[str, ChainSum | Products | SumOfProducts]:
        return {CHAIN_SUM: self.chain_sum, PRODUCTS: self.products, SUM_OF_PRODUCTS: self.sum_of_products}

    def size(self, split: Split, without: Excluded | None = None) -> None:
        """None: there are as many as the options of the families allow."""

    def holds_out(self, question_text: str) -> bool:
        """See `Task.holds_out`; of questions in the wording of the families that it asks, the held-out share."""
        question = plain_words(question_text)
        own = any(_WORDINGS[name].fullmatch(question) for name, family in self._families.items() if family.weight)
        return own and split_of(question, self.held_out_fraction) == "held_out"

    def gives(self, split: Split) -> bool:
        """See `Task.gives`."""
        return gives(split, self.held_out_fraction)

    def left_out(self, without: Excluded | None = None) -> list[str]:
        """Empty: what a generator does not ask is no data that anybody gave."""
        return []

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether the text is the number and nothing else."""
        return equal_integers(answer_text, problem.known_answer)

    def working_is_correct(self, problem: Problem, thinking_text: str) -> bool:
        """Whether every line of the working is right, follows from the question and leads to its result."""
        for name, wording in _WORDINGS.items():
            if match := wording.fullmatch(problem.prompt):
                return _CHECKS[name](*match.groups(), thinking_text)
        raise ValueError(f"prompt is {problem.prompt!r}; ask the task that made the problem")


def _product_is_correct(multiplicand: str, multiplier: str, thinking_text: str) -> bool:
    return product_working_is_correct(int(multiplicand), int(multiplier), thinking_text)


_WORDINGS = {CHAIN_SUM: _CHAIN_EXPRESSION, PRODUCTS: _PRODUCT_FACTORS, SUM_OF_PRODUCTS: _SUM_EXPRESSION}
_CHECKS: dict[str, Callable[..., bool]] = {
    CHAIN_SUM: chain_working_is_correct,
    PRODUCTS: _product_is_correct,
    SUM_OF_PRODUCTS: sum_of_products_working_is_correct,
}
"""Whether working is right: of the groups of the family's wording and the text."""


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _check_range(family: str, unit: str, low: int, high: int) -> None:
    if low > high:
        raise UserError(f"{family} has {unit} from {low} to {high}; use min_{unit} <= max_{unit}")
