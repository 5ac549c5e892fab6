"""How every command speaks and ends: in characters that the other side has, with one line for what the user can mend,
and an exit status for programs."""

import argparse
import codecs
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jax

from qwen3.errors import UserError

ENDED_BY_CTRL_C = 130
"""The exit status of a process that Ctrl-C has ended, as shells have it."""
_SHOWN_CHARACTERS = 160
_SPELLED = {
    "→": "->",
    "±": "+-",
    "×": "x",
    "…": "...",
    "–": "-",
    "—": "-",
    "·": "-",
    "≤": "<=",
    "≥": ">=",
    "‖": "||",
    "µ": "u",
    "\u00a0": " ",
}
_SPELLED_OUT = "distill.spelled_out"


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong, as the rest of a command does: for use inside `reported`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def reported(
    work: Callable[[], int],
    *,
    where: Callable[[], str] = lambda: "",
    smaller: str = "ask for less at once, or take a machine with more memory",
) -> int:
    """The status of `work`; 2 for what the user can mend, which is said in one line with `where()` it happened.
    `smaller` is the remedy where memory is short."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        # `… --help | head`: whoever read has enough.
        give_up_output()
        return 0
    except KeyboardInterrupt:
        print("ended by Ctrl-C", file=sys.stderr)
        return ENDED_BY_CTRL_C
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        message = f"{error.filename or 'disk'}: {error.strerror}"
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        said = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in said:
            raise
        message = f"out of memory ({said[:_SHOWN_CHARACTERS] or 'of this host'}); {smaller}"
    print(f"error{where()}: {message}", file=sys.stderr)
    return 2


def spell_out() -> None:
    """From here on a character that standard output or error cannot encode is spelled in others, or `?`."""
    codecs.register_error(_SPELLED_OUT, _spelled_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_SPELLED_OUT)


def give_up_output() -> None:
    """Nobody reads standard output any more; what is still on its way there goes nowhere, without a complaint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SPELLED.get(character, "?") for character in error.object[error.start : error.end]), error.end
