"""Consoles for terminals, logs and pipes: what is written there is text, whole, and no markup."""

from rich.console import Console


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
