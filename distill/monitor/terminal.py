"""What is written to terminals, logs and pipes: as it is, whole, and in characters that the other side has."""

import codecs
import io
import os
import sys

from rich.console import Console

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


def spell_out() -> None:
    """From here on a character that standard output or error cannot encode is spelled in others, or `?`."""
    codecs.register_error(_SPELLED_OUT, _spelled_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_SPELLED_OUT)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process here, without a word."""
        raise BrokenPipeError


def make_console(*, quiet: bool = False, stderr: bool = False, plain_width: int | None = None) -> Console:
    """A console that takes text for text: square brackets and colons in names and paths are no markup.

    A file or a pipe has no width, and rich would cut tables to 80 columns: there they have `plain_width`.
    """
    forced = False if quiet else None
    console = _Console(markup=False, emoji=False, highlight=False, quiet=quiet, force_terminal=forced, stderr=stderr)
    if plain_width is not None and not console.is_terminal:
        console.width = plain_width
    return console


def give_up_output() -> None:
    """Nobody reads standard output any more; what is still on its way there goes nowhere, without a complaint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SPELLED.get(character, "?") for character in error.object[error.start : error.end]), error.end
