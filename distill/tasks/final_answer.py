"""Where in a text its answer stands: the last box, or what follows "the answer is", or the last value named."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Final

from distill.tasks.units import parse_unit

MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH: Final = f"(?:{'|'.join(month.capitalize() for month in MONTHS)})[a-z]*"
DATE: Final = re.compile(
    rf"(?<![\w-])(?:\d{{4}}[-/]\d{{1,2}}[-/]\d{{1,2}}"
    rf"|(?P<month>{_MONTH})\.?\s+\d{{1,2}}(?:st|nd|rd|th)?(?:,?\s+\d{{4}})?"
    rf"|\d{{1,2}}(?:st|nd|rd|th)?\s+(?P<month_after_day>{_MONTH})\.?,?(?:\s+\d{{4}})?)(?![\w-])"
)
"""A day: 2024-05-03, May 3, 2024 or 3 May 2024."""

_MATH: Final = (
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)"
    # As pandoc reads it: no blank inside the dollars and no digit after them, which would be two prices.
    r"|(?<![\\\w$])\$(?:(?!\s)(?P<d>(?:[^$\n\\]|\\.)+?)(?<!\s)|(?P<e>\s(?=[^$\n]*[\\=^_])[^$\n]+\s))\$(?!\d)"
)
_FORMULA: Final = re.compile(_MATH, re.DOTALL)
_NUMBER: Final = (
    r"(?<![\w.])(?:[-+−]\s?)?(?:US\$|\\?\$|[€£¥₹])?\s?[-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"(?:\s+\d+\s?/\s?\d+|\s?[/:]\s?\d+|[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])?(?:st|nd|rd|th)?(?:\s?\\?%|\s?°\s?[CF]?)?"
)
_VALUE: Final = re.compile(rf"{_MATH}|(?P<date>{DATE.pattern})|(?P<number>{_NUMBER}|[-−]?[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", re.DOTALL)
_UNIT_WORDS: Final = re.compile(r"\s?-?[A-Za-z²³^0-9/.]{1,40}(?:\s[A-Za-z²³^0-9/.]{1,40}){0,3}")

_BOX: Final = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?")
_UNBRACED: Final = re.compile(r"[-+]?(?:\d|\\[A-Za-z])[^\s$]*|")
_BRACE: Final = re.compile(r"\\.|[{}]", re.DOTALL)
_LAST_BOXES: Final = 50
_BETWEEN_BOXES: Final = re.compile(r"(?:[\s,;.$]|\\[,;()\[\]]|\\q?quad|and|or|\\text\s*\{\s*(?:and|or)\s*\}){1,40}|")
_BETWEEN_FORMULAS: Final = re.compile(r"\s*(?:,|,?\s*(?:and|or))\s*")
_PLACEHOLDER: Final = re.compile(r"[\s.…]*|\\[lc]?dots|(?:\\text\s*\{)?\s*(?:(?:your|the|final)\s+)*answer\s*\}?", re.I)
_CUE: Final = re.compile(
    r"(?:####|\b(?:answer|correct option|correct choice)\b(?:[^.\n$\\]{0,60}?(?:\bis\b|[:=])|))[\s:*=]*", re.I
)
_SENTENCE_END: Final = re.compile(r"\.\s+(?=[A-Z*])|\n")
_WORD: Final = re.compile(r"[A-Za-z]{2,}")
_COMMAND: Final = re.compile(r"\\[A-Za-z]+\s*(?:\{[^{}]*\})?")
_PROSE: Final = re.compile(
    r"\b(?:is|are|was|were|so|thus|therefore|hence|it|its|the|total|equals|we|get|gets|got|has|have|because|since|answer"
    r"|result|not|but|which)\b",
    re.I,
)
_SHORT: Final = 3
_SEARCHED_CHARACTERS: Final = 4000


def final_answer(text: str) -> str:
    """What a response gives as its answer; empty where it gives none, such as a last box that is never closed.

    Boxes that only a comma or `and` parts are one list. A box that holds nothing or a placeholder is the problem's
    words, not an answer. Without a box, what follows the last "answer is", `answer:` or `####` counts, or else the
    last formula, date or number with its unit.
    """
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    whole = text.strip().strip("*").strip()
    cue = _last(_CUE.finditer(whole))
    if cue is not None and whole[cue.end() :].strip():
        return _after_cue(whole[cue.end() :].lstrip())
    if not _is_prose(whole):
        return whole
    return _last_value(whole[-_SEARCHED_CHARACTERS:])


def reference_answer(reference: str) -> str:
    """The answer in a reference: the whole of it, unless a box or `####` marks a part."""
    boxed = _boxed(reference)
    if boxed is not None:
        return boxed
    return reference.rpartition("####")[2].strip()


def _boxed(text: str) -> str | None:
    found: list[str] = []
    end = len(text)
    for box in reversed(list(_BOX.finditer(text))[-_LAST_BOXES:]):
        content, close = _content(text, box)
        if found and not _BETWEEN_BOXES.fullmatch(text, close, max(end, close)):
            break
        if content is None:
            # Cut off inside the last box.
            return ", ".join(found)
        if _PLACEHOLDER.fullmatch(content):
            if found:
                break
            continue
        # An outer box around the one already found adds nothing.
        if close <= end:
            found.insert(0, content)
            end = box.start()
    return ", ".join(found) if found else None


def _content(text: str, box: re.Match[str]) -> tuple[str | None, int]:
    """What a box holds, and where it ends; None where its brace is never closed."""
    if box["brace"] is None:
        # TeX needs no brace for \\boxed5; a word after it is the problem's: "use \\boxed for the answer".
        match = _UNBRACED.match(text, box.end())
        assert match is not None
        return match[0].rstrip(".,;"), match.end()
    depth = 1
    for brace in _BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[box.end() : brace.start()].strip(), brace.end()
    return None, len(text)


def _after_cue(rest: str) -> str:
    formula = _FORMULA.match(rest)
    if formula is not None:
        after = _SENTENCE_END.split(rest[formula.end() :], maxsplit=1)[0]
        # A unit or another formula may follow: $5$ cm, $1$ and $2$.
        return formula[0] if _is_prose(after) else formula[0] + after.rstrip(" .*")
    sentence = _SENTENCE_END.split(rest, maxsplit=1)[0].strip().strip("*").strip()
    if not _is_prose(sentence):
        return sentence
    first = next(_values(sentence[:_SEARCHED_CHARACTERS]), None)
    return first.text if first is not None and first.start == 0 else _last_value(sentence[:_SEARCHED_CHARACTERS])


@dataclasses.dataclass(frozen=True)
class _Value:
    text: str
    start: int
    is_formula: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def _last_value(text: str) -> str:
    """The last formula, date or number; formulas that only a comma or `and` parts are one list."""
    values = list(_values(text))
    if not values:
        return text
    first = last = values.pop()
    while values and first.is_formula and values[-1].is_formula:
        if not _BETWEEN_FORMULAS.fullmatch(text, values[-1].end, first.start):
            break
        first = values.pop()
    return text[first.start : last.end]


def _values(text: str) -> Iterator[_Value]:
    """Formulas, dates and numbers with the units after them, in their order."""
    for match in _VALUE.finditer(text):
        if match["number"] is None or match["date"] is not None:
            yield _Value(match[0], match.start(), is_formula=match["date"] is None)
            continue
        number = match["number"].rstrip(", ")
        start = match.end() - len(match["number"])
        following = _UNIT_WORDS.match(text, start + len(number))
        words = re.split(r"(?<=\S)(?=\s)", following[0]) if following is not None else []
        for count in range(len(words), 0, -1):
            unit = "".join(words[:count]).rstrip(".")
            if parse_unit(unit.strip().replace("²", "^2").replace("³", "^3")) is not None:
                number += unit
                break
        yield _Value(number, start)


def _is_prose(text: str) -> bool:
    if len(text) > _SEARCHED_CHARACTERS:
        return True
    if "\n" in text.strip():
        return re.search(r"\\begin\{", text) is None
    outside = _COMMAND.sub(" ", _FORMULA.sub(" ", text))
    formula = _FORMULA.search(text)
    introduced = formula is not None and len(_WORD.findall(text[: formula.start()])) > 1
    return introduced or len(_WORD.findall(outside)) > _SHORT or _PROSE.search(outside) is not None


def _last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    last = None
    for last in matches:  # noqa: B007 - only the last one counts
        pass
    return last
