"""Exact verdicts on an answer: no partial credit and no answer that merely occurs somewhere in the text."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from distill.tasks.final_answer import final_answer, reference_answer
from distill.tasks.math_answers import Comparison, MathAnswer, compare, read_answer
from distill.tasks.plain_latex import is_well_formed
from distill.tasks.problem import composed

Verifier = Literal["exact", "integer", "math"]
_INTEGER: Final = re.compile(r"[+-]?(?:\d{1,1000}|\d{1,3}(?:,\d{3}){1,300})")
_START_TIMEOUT_SECONDS: Final = 120.0
_VERDICT_TIMEOUT_SECONDS: Final = 15.0
_ATTEMPTS: Final = 2
_LONGEST_ANSWER: Final = 2000
"""In characters."""
_DIVIDES_BY_ZERO: Final = re.compile(r"(?:/|\\frac\s*\{[^{}]*\}\s*\{)[^{}/]*?(?<![\d.])0+(?:\.0*)?(?![\d.])")


def equal_integers(answer_text: str, reference: str) -> bool:
    """Whether the text, white space around it aside, is one integer with the reference's value.

    Commas may part groups of three digits, the minus may be U+2212, and digits may be of any script.
    """
    answer, expected = _integer(answer_text), _integer(reference)
    return answer is not None and answer == expected


def _integer(text: str) -> int | None:
    plain = text.strip().replace("\u2212", "-")
    return int(plain.replace(",", "")) if _INTEGER.fullmatch(plain) else None


def equal_texts(answer_text: str, reference: str) -> bool:
    """Whether both are the same words in the same order; any run of white space counts as one space.

    A letter with its accent is the same as one character or as two (Unicode's NFC).
    """
    return _words(answer_text) == _words(reference)


def _words(text: str) -> list[str]:
    return composed(text).split()


def equal_mathematics(answer_text: str, reference: str) -> bool:
    """Whether the text's final answer and the reference are the same mathematical object, exactly.

    The answer is the last `\\boxed{}`, or else what follows "the answer is", or else the last value in the text.
    Decided here is what data sets and their graders (MATH's, Qwen2.5-Math's, lm-eval's, math-verify) leave open:

    - A number is exact: 3/7 is not 0.428571 and 1e-7 is not 4e-7. `1/3 ≈ 0.333` counts as 1/3 and as 0.333.
    - A unit, a currency or the base of a number may be missing on one side: `5 cm` is 5. On both sides they must
      agree: 180 cm is 1.8 m, not 180 m, and `52_8` is not `52_7`. Other words after a number (5 apples) do not count.
    - 36% is 0.36; it is also 36, as an answer to "what percentage", unless it is less than 1%.
    - Words and runs of letters are names, compared in order and whatever their case: BCA is not ABC. A date is a day,
      not a year or a difference.
    - `x = 5` is 5, but not `y = 5`. A list in any order is a set; `(1, 2)` is an open interval or a pair, whichever
      the other is, and a bare `1, 2` too, but not `\\{1, 2\\}` or `[1, 2]`. `1 < x < 2` is an interval.
    - A comma between digits parts thousands, if they are groups of three, and never decimals.

    An answer that cannot be judged within seconds is wrong. Callable from any thread.
    """
    if equal_texts(answer_text, reference):
        return True
    answer = final_answer(answer_text)
    if not answer or len(answer) > _LONGEST_ANSWER:
        return False
    found = compare(_read_reference(reference), read_answer(answer))
    if isinstance(found, bool):
        return found
    return any(_math_process().verdict(comparison) is True for comparison in found)


@functools.lru_cache(maxsize=4096)
def _read_reference(reference: str) -> MathAnswer:
    return read_answer(reference_answer(reference))


VERIFIERS: Final[Mapping[Verifier, Callable[[str, str], bool]]] = {
    "exact": equal_texts,
    "integer": equal_integers,
    "math": equal_mathematics,
}


def unusable_references(verifier: Verifier, references: Sequence[str]) -> list[int]:
    """Places of the references that no answer can equal, not even their own text; ascending.

    With `math`, those are empty or broken LaTeX (`\\frac{1}{`) and what has no value (`\\frac{1}{0}`). math-verify,
    which takes about 0.1 s a formula, is asked only where a formula may divide by zero.
    """
    usable = _usable_in_mathematics if verifier == "math" else lambda text: VERIFIERS[verifier](text, text)
    verdicts = {text: usable(text) for text in dict.fromkeys(references)}
    return [place for place, text in enumerate(references) if not verdicts[text]]


def _usable_in_mathematics(reference: str) -> bool:
    answer = read_answer(reference_answer(reference))
    if answer.name is not None or answer.number is not None:
        return True
    if not is_well_formed(answer.latex):
        return False
    if _DIVIDES_BY_ZERO.search(answer.latex) is None:
        return True
    return _math_process().verdict(Comparison(answer.latex, answer.latex)) is not False


class MathProcess:
    """A process that judges one pair at a time, replaced when an expression is too much for it."""

    def __init__(self, verdict_timeout_seconds: float = _VERDICT_TIMEOUT_SECONDS) -> None:
        self.verdict_timeout_seconds = verdict_timeout_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def verdict(self, comparison: Comparison) -> bool | None:
        """Whether the two are equal; False where that takes too long or ends the process, None if one is unreadable."""
        request = json.dumps(dataclasses.asdict(comparison)).encode() + b"\n"
        with self._lock:
            # A process may end between two verdicts, by another's hand: whoever is short of memory ends large ones.
            for _ in range(_ATTEMPTS):
                try:
                    line = self._answer(request)
                except EOFError:
                    self._end()
                    continue
                if line is None:
                    self._end()
                    return False
                verdict = json.loads(line)
                assert verdict is None or isinstance(verdict, bool)
                return verdict
            return False

    def _answer(self, request: bytes) -> bytes | None:
        """The line that answers, None where the time is up before. Raises EOFError where the process ends."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            raise EOFError from None
        return _read_line(process, self.verdict_timeout_seconds)

    def close(self) -> None:
        """Ends the process; the next verdict starts another."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            # -P: the script's own folder stays off the import path. A session of its own: Ctrl-C is the parent's.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            with contextlib.suppress(EOFError):
                if _read_line(self._process, _START_TIMEOUT_SECONDS) == b"ready\n":
                    return self._process
            self._end()
            raise RuntimeError("the math-verify process did not start; its error is printed above")
        return self._process

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._process = None


@functools.cache
def _math_process() -> MathProcess:
    return MathProcess()


def _read_line(process: subprocess.Popen[bytes], timeout_seconds: float) -> bytes | None:
    """One line of the process's output; None where the time is up first. Raises EOFError where it ends before."""
    deadline = time.monotonic() + timeout_seconds
    line = b""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            # Not through the buffered reader, which would hide bytes from the selector.
            received = os.read(process.stdout.fileno(), 4096)
            if not received:
                raise EOFError
            line += received
    return line
