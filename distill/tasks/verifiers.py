"""Exact verdicts on an answer: no partial credit and no answer that merely occurs somewhere in the text."""

import functools
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,1000}")
_START_TIMEOUT_SECONDS: Final = 120.0
_VERDICT_TIMEOUT_SECONDS: Final = 15.0


def equal_integers(answer_text: str, reference: str) -> bool:
    """Whether the text, white space around it aside, is one integer with the reference's value."""
    answer = answer_text.strip()
    return _INTEGER.fullmatch(answer) is not None and int(answer) == int(reference)


def equal_texts(answer_text: str, reference: str) -> bool:
    """Whether both are the same words in the same order; any run of white space counts as one space."""
    return answer_text.split() == reference.split()


def equal_mathematics(answer_text: str, reference: str) -> bool:
    """Whether both are the same text, or the same mathematical object to math-verify.

    math-verify finds the answer in the text: the last \\boxed{} or else the last expression. An answer that it cannot
    judge within seconds is wrong. Callable from any thread.
    """
    return equal_texts(answer_text, reference) or _math_process().verdict(reference, answer_text)


class MathProcess:
    """A process that judges one pair at a time, replaced when an expression is too much for it."""

    def __init__(self, verdict_timeout_seconds: float = _VERDICT_TIMEOUT_SECONDS) -> None:
        self.verdict_timeout_seconds = verdict_timeout_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def verdict(self, reference: str, answer: str) -> bool:
        """math-verify's verdict; False where it takes too long or ends the process."""
        request = json.dumps({"reference": reference, "answer": answer}).encode() + b"\n"
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.flush()
            line = _read_line(process, self.verdict_timeout_seconds)
            if line is None:
                self._end()
                return False
            return bool(json.loads(line))

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
            if _read_line(self._process, _START_TIMEOUT_SECONDS) != b"ready\n":
                self._end()
                raise RuntimeError("the math-verify process did not start; its error is printed above")
        return self._process

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()
        self._process = None


@functools.cache
def _math_process() -> MathProcess:
    return MathProcess()


def _read_line(process: subprocess.Popen[bytes], timeout_seconds: float) -> bytes | None:
    """One line of the process's output; None where it ends or the time is up first."""
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
                return None
            line += received
    return line
