"""One spelling for what answers write in many: Unicode, Markdown and LaTeX's variants become plain LaTeX.

It does only what math-verify's own normalisation does not: that knows no ½, √2, 1e3, `\\varnothing` or `1\\,000`.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Final

_SYMBOLS: Final = str.maketrans(
    {
        "−": "-", "–": "-", "‐": "-", "‑": "-", "×": "\\times ", "⋅": "\\cdot ", "·": "\\cdot ", "∙": "\\cdot ",
        "÷": "/", "∞": "\\infty ", "∅": "\\emptyset ", "≤": "\\leq ", "⩽": "\\leq ", "≥": "\\geq ", "⩾": "\\geq ",
        "≠": "\\neq ", "≈": "\\approx ", "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
        "∖": "\\setminus ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}",
        "ℂ": "\\mathbb{C}", "⟨": "(", "⟩": ")", "∣": "\\mid ", "→": "\\to ", "∘": "°", "º": "°", "’": "'",
        "∠": "\\angle ", "△": "\\triangle ", "∛": "\\cbrt ", "µ": "μ",
    }
)  # fmt: skip
_GREEK: Final = re.compile("[α-ωΑ-Ω]")
_SUPERSCRIPTS: Final = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPTS: Final = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR: Final = re.compile("[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉]")
_ROOT_ARGUMENT: Final = r"\s*(\d+(?:\.\d+)?|[A-Za-z]|\{[^{}]*\}|\([^()]*\))"
_FUNCTIONS: Final = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|pi|infty"
_GROUPS: Final = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,| )\d{3})+(?![\d]|,\d)")

_Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _rules(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


def _inner(match: re.Match[str]) -> str:
    return match[1].strip("{}()")


_LATEX: Final = _rules(
    # Around the formula.
    (r"\*\*", ""),
    (r"^\s*(?:\$\$?|\\\(|\\\[)\s*((?:[^$]|\\\$)*?)\s*(?:\$\$?|\\\)|\\\])\s*([.,;]?)\s*$", r"\1\2"),
    (r"\$\$([^$]+)\$\$", r" \1 "),
    (r"(?<![\\\w])\$(?!\s)([^$]+?)(?<!\s)\$(?!\d)", r" \1 "),
    (r"\\[()]|\\\[|\\\](?!\d)", " "),
    (r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
    # Blanks.
    (r"(?<!\\)\\!\s*", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|\\thinspace|~|\\\\(?=\s*$)", " "),
    (r"\{,\}", ","),
    # Commands with two names.
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:varnothing|O(?![A-Za-z]))", r"\\emptyset"),
    (r"\\(leq|geq)slant", r"\\\1"),
    (r"\\(le|ge|ne)(?![A-Za-z])", r"\\\1q"),
    (r"\\langle|\\lparen", "("),
    (r"\\rangle|\\rparen", ")"),
    (r"\\lbrace", r"\\{"),
    (r"\\rbrace", r"\\}"),
    (r"\\(?:bf|rm|it)\s+", ""),
    (r"\\(?:mathrm|mathit)\s*\{\s*([ei])\s*\}", r"\1"),
    (r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|mathrm|hbox)\s*\{", r"\\text{"),
    (r"\\text\{\s*([^{}]*?)\s*\}", r"\\text{\1}"),
    (r"\\text\{\}", ""),
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:underline|bold)(?![A-Za-z])", ""),
    (r"^\s*\{([^{}]*)\}\s*$", r"\1"),
    (r"\\degree(?![A-Za-z])|\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\\%", "%"),
    (r"[(\[]\s*\\begin\{array\}\{[^}]*\}(.*?)\\end\{array\}\s*[)\]]", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    # \frac12, \frac 59, \frac{270}7
    (
        r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|\{[^{}]*\})",
        lambda match: f"\\frac{{{match[1].strip('{}')}}}{{{match[2].strip('{}')}}}",
    ),
)
_PLAIN: Final = _rules(
    (rf"√{_ROOT_ARGUMENT}", lambda match: f"\\sqrt{{{_inner(match)}}}"),
    (rf"\\cbrt{_ROOT_ARGUMENT}", lambda match: f"\\sqrt[3]{{{_inner(match)}}}"),
    (rf"(?<![\\A-Za-z])sqrt{_ROOT_ARGUMENT}", lambda match: f"\\sqrt{{{_inner(match)}}}"),
    (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty"),
    (r"<=", r"\\leq "),
    (r">=", r"\\geq "),
    (r"!=", r"\\neq "),
    (r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?!\w)", r"\1\\times 10^{\2}"),
    (r"(?<![\w./])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])", r"\1\\frac{\2}{\3}"),
    (r"(\d)(?:st|nd|rd|th|\^\{?\\text\{(?:st|nd|rd|th)\}\}?)(?![A-Za-z])", r"\1"),
    (r"^\s*(?:(?:=|:|\\approx|\\therefore|\\implies|approximately|about|roughly|exactly)\s*)+", ""),
    # {x | 1 < x < 2} is 1 < x < 2.
    (r"^\s*\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\||\\mid|:)\s*(.*\1.*)\\\}\s*$", r"\2"),
    (r"\s+", " "),
)
_END: Final = re.compile(r"(?:[\s,;:]|(?<![ap]\.m)(?<!\\)\.)+$")


def plain_latex(text: str) -> str:
    """The same formula, number or words in plain LaTeX, without delimiters."""
    plain = text.translate(_SYMBOLS)
    plain = _VULGAR.sub(_vulgar_fraction, plain)
    plain = _SUPERSCRIPTS.sub(lambda match: f"^{{{_ascii(match[0])}}}", plain)
    plain = _SUBSCRIPTS.sub(lambda match: f"_{{{_ascii(match[0])}}}", plain)
    plain = _GREEK.sub(_greek_command, plain)
    plain = unicodedata.normalize("NFKC", plain)
    # First, since rules that look for blanks on both sides of something would try all ways to divide many.
    plain = re.sub(r"\s+", " ", plain)
    for pattern, replacement in _LATEX:
        plain = pattern.sub(replacement, plain)
    plain = _END.sub("", plain)
    # Between brackets a comma without a blank parts entries, unless others have one: (10,000, 20,000).
    if not re.match(r"\s*(?:\\\{|[\[({])", plain) or re.search(r",\s", plain):
        plain = _GROUPS.sub(lambda match: re.sub(r"[ ,]", "", match[0]), plain)
    for pattern, replacement in _PLAIN:
        plain = pattern.sub(replacement, plain)
    return plain.strip()


def is_well_formed(latex: str) -> bool:
    """Whether braces, brackets and environments are closed and no operator waits for what it applies to."""
    unescaped = re.sub(r"\\[{}\\]", "", latex)
    return (
        unescaped.count("{") == unescaped.count("}")
        and len(re.findall(r"[(\[]", latex)) == len(re.findall(r"[)\]]", latex))
        and (latex.count("\\{") == latex.count("\\}") or "\\begin{" in latex)
        and latex.count("\\begin{") == latex.count("\\end{")
        and re.search(r"[\w∅]|\\[A-Za-z]", latex) is not None
        and re.search(
            r"^\s*[*/^_]|[-+*/^_=<>\\]\s*$|[\^_]\s*[\^_+*/]|\\(?:frac|sqrt|text|boxed)\s*(?:$|\{\s*\})", latex
        )
        is None
        and re.search(r"\\frac\s*\{[^{}]*\}\s*(?:$|\{\s*\})", latex) is None
    )


def _vulgar_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _greek_command(match: re.Match[str]) -> str:
    # GREEK SMALL LETTER ALPHA; the final sigma has a word more.
    words = unicodedata.name(match[0]).replace("FINAL ", "").replace("LAMDA", "LAMBDA").lower().split()
    return f"\\{words[3] if words[1] == 'small' else words[3].capitalize()} "


def _ascii(marks: str) -> str:
    return unicodedata.normalize("NFKC", marks).replace("−", "-")
