"""Signals are requests that are heard at once, even while the main thread computes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from distill.stages.stopping import StopRequest
from tests.distill.miniature import ROOT

# Computes for minutes without ever coming back to Python's interpreter, as a large step does.
BUSY = """
import hashlib, sys
from distill.stages.stopping import StopRequest

with StopRequest(lambda line: print(line, flush=True)).listening():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def said_soon(lines: list[str]) -> list[str]:
    deadline = time.monotonic() + 10
    while not lines and time.monotonic() < deadline:
        time.sleep(0.01)
    return lines


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGINT, "stopping after this step; press Ctrl-C again to end now"),
        (signal.SIGTERM, "stopping after this step; SIGTERM asks for it"),
        (signal.SIGHUP, "stopping after this step; SIGHUP asks for it"),
    ],
)
def test_a_signal_is_a_request_and_says_so(number: signal.Signals, line: str) -> None:
    lines: list[str] = []
    before = signal.getsignal(number)
    with StopRequest(lines.append).listening() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert said_soon(lines) == [line]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    assert lines == [line]
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_a_step_of_minutes_at_once_in_one_line() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "stopping after this step; press Ctrl-C again to end now\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert errors == "ended by a second Ctrl-C; the same command goes on from what was saved last\n"


def test_ctrl_c_after_another_signal_is_the_first_one() -> None:
    lines: list[str] = []
    with StopRequest(lines.append).listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(said_soon(lines)) == 1
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    assert lines == ["stopping after this step; SIGTERM asks for it"]


def test_where_nobody_reads_the_request_stands() -> None:
    def gone(line: str) -> None:
        raise BrokenPipeError(line)

    with StopRequest(gone).listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert stop.agreed()
        assert any(thread.name == "signals" for thread in threading.enumerate()), "a second signal is heard, too"
