"""Runs math-verify in a process of its own; started as a script by `verifiers`, never imported.

math-verify stops hopeless expressions with SIGALRM, which only a main thread may use and which cannot interrupt one
huge power. Here the main thread does nothing else, and the parent can end the process.

One JSON line {"reference", "answer", "exact"} of plain LaTeX on standard input gives one line on standard output:
`true` or `false`, or `null` where math-verify cannot read one of the two.
"""

import json
import logging
import re
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sympy import Basic, MatrixBase

STEP_TIMEOUT_SECONDS = 5
MEMORY_LIMIT_BYTES = 4 << 30
# Digits to which irrational numbers are compared. Rational ones are exact.
PRECISION_DIGITS = 60


def main() -> None:
    """Answers until standard input ends, which it also does when the parent dies."""
    # The first formula takes a second or more: not out of the time for a verdict.
    judge("\\sum_{k=1}^{n} \\frac{x_{k}^{2}}{3}", "\\sqrt{2}, (1, 2]", None)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, resource.RLIM_INFINITY))
    # Every stopped expression would print a warning into the progress display.
    logging.disable(logging.WARNING)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verdict = judge(request["reference"], request["answer"], request["exact"])
        except (
            ArithmeticError,
            AttributeError,
            MemoryError,
            RecursionError,
            NotImplementedError,
            TypeError,
            ValueError,
        ):
            # What sympy raises where an operation has no meaning for an object.
            verdict = False
        print(json.dumps(verdict), flush=True)


def judge(reference: str, answer: str, exact: str | None) -> bool | None:
    """Whether the two are equal, and the answer is a rounding of `exact` if that is given."""
    from math_verify import verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    expected, given = parse(reference), parse(answer)
    if expected is None or given is None:
        return None
    equal = verify(
        expected,
        given,
        float_rounding=PRECISION_DIGITS,
        numeric_precision=PRECISION_DIGITS,
        allow_set_relation_comp=True,
        timeout_seconds=STEP_TIMEOUT_SECONDS,
    )
    if not equal:
        return False

    @timeout(timeout_seconds=STEP_TIMEOUT_SECONDS)
    def confirmed() -> bool:
        return not are_apart(expected, given) and (exact is None or rounds(given, answer, parse(exact)))

    try:
        return bool(confirmed())
    except TimeoutException:
        return False


def parse(latex: str) -> "Basic | MatrixBase | None":
    """The formula with decimals as the fractions that they are; None where math-verify cannot read it."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import FiniteSet, MatrixBase, Or
    from sympy.core.relational import Relational

    found = parse(
        f"${latex}$",
        extraction_config=[
            LatexExtractionConfig(
                # Units are compared by the parent: math-verify would take the h of \\pi r^2 h for hours.
                normalization_config=NormalizationConfig(
                    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
                )
            )
        ],
        fallback_mode="no_fallback",
        parsing_timeout=STEP_TIMEOUT_SECONDS,
    )
    if not found:
        return None
    [expression] = found
    if isinstance(expression, MatrixBase):
        return expression.applyfunc(exactly)
    if isinstance(expression, FiniteSet) and re.search(r"\bor\b", latex):
        parts = expression.args
        if all(isinstance(part, Relational) for part in parts) and len(expression.free_symbols) == 1:
            return Or(*map(exactly, parts)).as_set()
    return exactly(expression)


def exactly(expression: "Basic") -> "Basic":
    """The expression with no binary fractions in it, and i as the imaginary unit."""
    from latex2sympy2_extended.logic import And
    from latex2sympy2_extended.sets import FiniteSet
    from sympy import Float, I, Rational, Symbol
    from sympy.core.relational import Relational

    exact: dict[Basic, Basic] = {number: Rational(str(number)) for number in expression.atoms(Float)}
    exact |= {symbol: I for symbol in expression.atoms(Symbol) if symbol.name == "i"}
    if not exact:
        return expression
    if isinstance(expression, Relational):
        # Unevaluated, as math-verify has it: i^2 = -1 must not become "true".
        return expression.func(exactly(expression.lhs), exactly(expression.rhs), evaluate=False)
    if isinstance(expression, And):
        parts = [exactly(part) for part in expression._unsorted_args]
        return And(*parts, evaluate=False) if len(set(parts)) > 1 else parts[0]
    if isinstance(expression, FiniteSet):
        return FiniteSet(*map(exactly, expression._unsorted_args))
    return expression.xreplace(exact)


def are_apart(expected: "Basic | MatrixBase", given: "Basic | MatrixBase") -> bool:
    """Whether both are numbers and differ, however small they are: math-verify takes 1/2004! for 1/2006!."""
    from sympy import Expr

    if not (isinstance(expected, Expr) and isinstance(given, Expr) and expected.is_number and given.is_number):
        return False
    quotient = (expected / given).evalf(PRECISION_DIGITS)
    return bool(quotient.is_comparable) and bool(abs(quotient - 1) > 10 ** (-PRECISION_DIGITS // 2))


def rounds(rounded: "Basic | MatrixBase", latex: str, exact: "Basic | MatrixBase | None") -> bool:
    """Whether a decimal number is the exact one to as many places as it has."""
    from sympy import Expr, Rational

    if not isinstance(exact, Expr) or not isinstance(rounded, Rational):
        return False
    places = len(latex.strip().partition(".")[2])
    difference = (exact - rounded).evalf(PRECISION_DIGITS)
    return bool(difference.is_comparable) and bool(abs(difference) < Rational(1, 10**places))


if __name__ == "__main__":
    main()
