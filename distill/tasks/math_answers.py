"""What a mathematical answer says, with its spelling made plain and its unit taken off. No algebra here.

Most answers of most data sets are numbers, names or dates, which are compared here exactly and at once. Formulas go
to math-verify, in a process of its own: see `verifiers`.
"""

import dataclasses
import re
from fractions import Fraction
from typing import Final

from distill.tasks.final_answer import DATE, MONTHS
from distill.tasks.plain_latex import plain_latex
from distill.tasks.units import Unit, parse_unit

_MAX_FORMULA_CHARACTERS: Final = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathAnswer:
    """An answer, read as far as it can be without algebra."""

    latex: str
    """The value as plain LaTeX, without its unit."""
    whole: str
    """What counts where the other answer has no unit: the value, or `5m` whole if its m may be a variable."""
    number: Fraction | None = None
    """The value, if it is a plain rational number."""
    unit: Unit | None = None
    name: str | None = None
    """A word, a name or a date, spelt in one way: no mathematics."""
    rounded: "MathAnswer | None" = None
    """Of `1/3 ≈ 0.333`, the right side."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two formulas that must be equal."""

    reference: str
    answer: str
    exact: str | None = None
    """What `answer` is said to round, if anything; then it must."""


def read_answer(text: str) -> MathAnswer:
    """An answer as it is compared."""
    date = _date(text.strip().strip("$").rstrip(".").strip())
    if date is not None:
        return MathAnswer(latex="", whole="", name=date)
    exact, *rounded = re.split(r"\\approx|\\simeq|\\doteq", plain_latex(text))
    if not rounded or not rounded[-1].strip():
        return _read(exact.strip())
    if re.fullmatch(r"\s*(?:[A-Za-z]\s*=?\s*)?", exact):
        # x ≈ 11 says no other value.
        return _read(rounded[-1].strip())
    return dataclasses.replace(_read(exact.strip()), rounded=_read(rounded[-1].strip()))


def compare(reference: MathAnswer, answer: MathAnswer) -> bool | list[Comparison]:
    """Whether the two are equal, or the comparisons of formulas of which one must hold."""
    choice = _CHOICE_WITH_TEXT.match(answer.whole)
    if choice is not None and re.fullmatch("[A-Z]", reference.whole):
        return choice[1] == reference.whole
    found: list[Comparison] = []
    for expected in filter(None, (reference, reference.rounded)):
        exactly = _compare(expected, answer)
        if exactly is True:
            return True
        found += exactly or []
        if answer.rounded is not None:
            # A rounded value counts only if it is one: "3 ≈ 4" is not two answers.
            roughly = _compare(expected, answer.rounded)
            pairs = [Comparison(answer.rounded.latex, answer.rounded.latex)] if roughly is True else roughly or []
            found += [dataclasses.replace(pair, exact=answer.latex) for pair in pairs]
    return found or False


def _compare(reference: MathAnswer, answer: MathAnswer) -> bool | list[Comparison]:
    if reference.name is not None or answer.name is not None:
        return _letters(reference) == _letters(answer)
    if (reference.unit is None) != (answer.unit is None):
        reference, answer = _as_whole(reference), _as_whole(answer)
    comparisons = []
    for reference_factor, answer_factor in _factors(reference, answer):
        if reference.number is not None and answer.number is not None:
            if reference.number * reference_factor == answer.number * answer_factor:
                return True
        elif reference_factor == answer_factor and _bare(reference.latex) == _bare(answer.latex):
            return True
        elif _comparable(reference.latex, answer.latex):
            comparisons.append(
                Comparison(_times(reference.latex, reference_factor), _times(answer.latex, answer_factor))
            )
    return comparisons


def _letters(answer: MathAnswer) -> str:
    return answer.name if answer.name is not None else _bare(answer.latex).casefold()


def _as_whole(answer: MathAnswer) -> MathAnswer:
    if answer.whole == answer.latex:
        return answer
    return MathAnswer(latex=answer.whole, whole=answer.whole)


def _factors(reference: MathAnswer, answer: MathAnswer) -> list[tuple[Fraction, Fraction]]:
    """What to multiply the two values by so that they are in one unit; none where the units cannot be compared."""
    if reference.unit is not None and answer.unit is not None:
        if reference.unit.dimension != answer.unit.dimension:
            return []
        return [(reference.unit.factor, answer.unit.factor)]
    one = Fraction(1)
    factors = [(one, one)]
    for side in (reference, answer):
        if side.unit is not None and side.unit.dimension == "share":
            # 36% is 0.36; as the answer to "what percentage", it is 36. Below 1 that would be a guess.
            if side.number is not None and abs(side.number) < 1:
                factors = []
            factors.append((side.unit.factor, one) if side is reference else (one, side.unit.factor))
    return factors


def _times(latex: str, factor: Fraction) -> str:
    if factor == 1:
        return latex
    value = latex.rpartition("=")[2]
    return f"({value}) \\cdot \\frac{{{factor.numerator}}}{{{factor.denominator}}}"


def _bare(latex: str) -> str:
    return re.sub(r"\s", "", latex)


def _comparable(reference: str, answer: str) -> bool:
    if not reference or not answer or max(len(reference), len(answer)) > _MAX_FORMULA_CHARACTERS:
        return False
    if all(re.fullmatch(r"[a-z]{3,}", latex) for latex in (reference, answer)):
        # Three letters may be an order of three things.
        return False
    return len({_brackets(reference), _brackets(answer)} - {""}) < 2


def _brackets(latex: str) -> str:
    """`{` where braces enclose the whole, `(` where round or square brackets do, empty for others."""
    opening = re.match(r"\\\{|[(\[]", latex)
    if opening is None or "," not in latex:
        return ""
    depth = 0
    for bracket in re.finditer(r"\\[{}]|[()\[\]]", latex):
        depth += 1 if bracket[0][-1] in "{([" else -1
        if depth == 0:
            return "" if bracket.end() < len(latex) else "{" if opening[0] == "\\{" else "("
    return ""


# From here on: reading.

_DECIMAL: Final = r"(?:\d{1,1000}(?:\.\d{0,1000})?|\.\d{1,1000})"
_NUMBER: Final = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<integer>\d{{1,1000}})?\s*\\frac\{{\s*(?P<top>[-+]?{_DECIMAL})\s*\}}"
    rf"\{{\s*(?P<bottom>[-+]?{_DECIMAL})\s*\}}|(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*(?P<power>[-+]?\d{{1,4}})\s*\}}"
    r"|(?P<digit>\d)(?!\d)))?)"
)


def _number(latex: str) -> Fraction | None:
    """The value of an integer, decimal, fraction, mixed number or power of ten."""
    match = _NUMBER.fullmatch(re.sub(r"^\((.*)\)$|^\{(.*)\}$", r"\1\2", latex).strip())
    if match is None:
        return None
    if match["decimal"] is not None:
        value = Fraction(match["decimal"]) * Fraction(10) ** int(match["power"] or match["digit"] or 0)
    else:
        value = Fraction(match["top"] or match["over"])
        divisor = Fraction(match["bottom"] or match["under"])
        if not divisor:
            return None
        value /= divisor
        if match["integer"] is not None:
            # 1 1/2 is a mixed number; 2 3/2 is not.
            if not 0 <= value < 1:
                return None
            value += int(match["integer"])
    return -value if match["sign"] == "-" else value


_SCALES: Final = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MONEY_BEFORE: Final = re.compile(r"([-+]?)\s*(?:US)?(?:\\?(\$)|([€£¥₹])|(USD|EUR|GBP|Rs)\.?\s)\s*(?=[-+\d.\\])")
_BASE: Final = re.compile(r"(\d+)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))")
_IN_TEXT: Final = re.compile(r"(?P<tail>(?:\s*(?:(?:/|-|\\cdot)\s*)?\\text\{[^{}]*\}(?:\s*\^\s*\{?-?\d\}?)?)+)\s*$")
_BARE_WORDS: Final = re.compile(
    r"(?<=[\d}).])(?P<tail>\s*-?[A-Za-z][A-Za-z./ -]*(?:\^\{?[23]\}?)?(?:\s?/\s?[A-Za-z]+(?:\^\{?[23]\}?)?)?)$"
    r"|(?<=\\pi)(?P<after_pi>\s+[A-Za-z][A-Za-z./ ]*(?:\^\{?[23]\}?)?)$"
)
_SIGN_TAIL: Final = re.compile(r"(?P<tail>\s*(?:%|°(?:\s*(?:\\text\{)?[CF]\}?)?|¢|€|£|\\?\$))$")
_CONNECTIVES: Final = frozenset(("and", "or", "to", "if", "where", "when", "for", "with", "mod", "times", "than"))


def _read(latex: str) -> MathAnswer:
    name = _name(latex)
    if name is not None:
        return MathAnswer(latex=latex, whole=latex, name=name)
    choice = _CHOICE.fullmatch(latex)
    if choice is not None:
        return MathAnswer(latex=choice[1], whole=choice[1])
    based = _BASE.fullmatch(latex)
    if based is not None:
        base = Unit(f"digits in base {based[2] or based[3]}", Fraction(1))
        return MathAnswer(latex=based[1], whole=based[1], number=_number(based[1]), unit=base)
    value, unit, certain = _without_unit(latex)
    scale = re.fullmatch(rf"(.*\S)\s*(?:\\text\{{\s*)?({'|'.join(_SCALES)})s?\s*\}}?", value)
    number = _number(value)
    if scale is not None:
        number = _number(scale[1])
        value = _times(scale[1], Fraction(_SCALES[scale[2]]))
        number = None if number is None else number * _SCALES[scale[2]]
    value = value.replace("°", "^\\circ ")
    return MathAnswer(latex=value, whole=value if certain else latex, number=number, unit=unit)


def _without_unit(latex: str) -> tuple[str, Unit | None, bool]:
    """The value, the unit before or after it, and whether that cannot be a variable."""
    money = _MONEY_BEFORE.match(latex)
    if money is not None:
        value = latex
        while (mark := _MONEY_BEFORE.match(value)) is not None:
            value = mark[1] + value[mark.end() :]
        value, _, _ = _without_unit(value)
        return value, parse_unit(money[2] or money[3] or money[4]), True
    for pattern in (_IN_TEXT, _SIGN_TAIL, _BARE_WORDS):
        match = pattern.search(latex)
        if match is None or re.search(r"(?:^|[-+*/=^_<>,(]|\\cdot|\\times)\s*$", latex[: match.start()]):
            continue
        tail, value = match[match.lastgroup or 0], latex[: match.start()].strip()
        words = re.sub(r"\\text\{([^{}]*)\}", r"\1", tail).strip(" -")
        if words.split(" ")[0] in _SCALES:
            # 2 million dollars: the scale stays with the value.
            scale, _, words = words.partition(" ")
            value = f"{value} {scale}"
            if not words:
                return value, None, True
        unit = parse_unit(words.replace("\\$", "$"))
        if pattern is _BARE_WORDS:
            if re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|^\s*[A-Za-z]\s*=", "", latex[: match.start()])):
                continue
            if unit is not None:
                return value, unit, len(words) > 1 or tail.startswith(" ")
            if not _is_noun(words) or not tail.startswith((" ", "-")):
                continue
        elif not words or words.split()[0].lower() in _CONNECTIVES:
            continue
        return value, unit, True
    return latex, None, True


def _is_noun(words: str) -> bool:
    """Whether words after a number only say what was counted, such as 5 apples: no unit, no formula."""
    return all(len(word) > 2 and not _is_product(word) for word in words.split()) and not _CONNECTIVES & set(
        words.split()
    )


_LETTERS: Final = re.compile(r"[^\W\d_]+(?:[ .,'’&()-]+[^\W\d_]+)*[.)]?")
_AROUND_NAMES: Final = re.compile(
    r"\\(?:text|overline|overrightarrow|widehat)\{([^{}]*)\}|\\(?:triangle|angle)(?![A-Za-z])"
)
_CHOICE: Final = re.compile(r"(?:\\text\{)?\s*\(?\s*([A-Z])\s*[).:]?\s*\}?")

# (C) 12: the letter of a choice, with what it stands for.
_CHOICE_WITH_TEXT: Final = re.compile(r"(?:\\text\{)?\(?\s*([A-Z])\s*(?:\)\}?|\.)\s*\S")


def _name(latex: str) -> str | None:
    """The words that the answer is, in lower case; None for mathematics.

    A run of letters is a name in its order: BCA is not ABC. Two or three small letters without e, i, o or u are a
    product of variables, as xy is; one letter is a variable or a choice, which math-verify compares.
    """
    text = " ".join(_AROUND_NAMES.sub(r" \1 ", latex).split())
    if _LETTERS.fullmatch(text.strip("()")) is None:
        return None
    words = re.findall(r"[^\W\d_]+", text)
    if all(len(word) == 1 or word in ("and", "or") for word in words) or (
        text == latex and len(words) == 1 and _is_product(text)
    ):
        return None
    return " ".join(words).casefold()


def _is_product(letters: str) -> bool:
    return re.fullmatch(r"[a-z]{1,3}", letters) is not None and len(set(letters) - set("eiou")) == len(letters)


def _date(text: str) -> str | None:
    """The day that a text names, as year, month and day; None for other texts."""
    match = DATE.fullmatch(text)
    if match is None:
        return None
    year = re.search(r"\d{4}", text)
    rest = [int(number) for number in re.findall(r"\d+", text.replace(year[0], "", 1) if year else text)]
    month = match["month"] or match["month_after_day"]
    if month is not None:
        rest.insert(0, MONTHS.index(month[:3].lower()) + 1)
    return f"{year[0] if year else 'any year'}-{rest[0]:02}-{rest[1]:02}"
