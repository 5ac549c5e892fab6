"""How commands end: one line, and a status for programs."""

import pytest

from qwen3.commands import ENDED_BY_CTRL_C, OneLineParser, reported
from qwen3.errors import UserError


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("k is 0; give at least 1"), 2, "error in a test: k is 0; give at least 1\n"),
        (
            FileNotFoundError(2, "No such file", "there"),
            2,
            "error in a test: there: No such file\n",
        ),
        (OSError(28, "No space left on device"), 2, "error in a test: disk: No space left on device\n"),
        (MemoryError("9 GB"), 2, "error in a test: out of memory (9 GB); take less\n"),
        (KeyboardInterrupt(), ENDED_BY_CTRL_C, "ended by Ctrl-C\n"),
    ],
)
def test_what_ends_a_command_is_one_line_and_a_status(error, status, line, capsys):
    def work() -> int:
        raise error

    assert reported(work, where=lambda: " in a test", smaller="take less") == status
    assert capsys.readouterr().err == line


def test_what_is_a_fault_here_is_no_line():
    def faulty() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reported(faulty)
    assert reported(lambda: 0) == 0


def test_wrong_options_are_one_line(capsys):
    parser = OneLineParser(prog="ask")
    parser.add_argument("--k", type=int)

    def work() -> int:
        parser.parse_args(["--k", "many"])
        return 0

    assert reported(work) == 2
    assert capsys.readouterr().err == "error: argument --k: invalid int value: 'many'; see ask --help\n"
