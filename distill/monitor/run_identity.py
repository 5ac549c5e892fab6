"""Which run a directory belongs to: when it began, and a random id, by which it tells its directory from a later one.

A directory can be deleted, and made anew by the next run, under a process that goes on writing there by name. What
that process saved would be the next run's checkpoint.
"""

import re
import secrets
from datetime import datetime
from pathlib import Path

from distill.monitor.records import gone, write_atomically
from qwen3.errors import UserError

_FILE = "run_id"
_BEGAN = "began"


def claim_id(directory: Path) -> str:
    """The id of the run in `directory`; a directory without checkpoints, which carry it, gets one where it has none.

    Raises UserError where checkpoints are there and the id is not.
    """
    known = known_id(directory)
    if known is None:
        known = secrets.token_hex(8)
        write_atomically(directory / _FILE, known)
    return known


def known_id(directory: Path) -> str | None:
    """The id of the run in `directory`, None where it has none yet. Raises UserError as `claim_id` does."""
    known = _content(directory / _FILE)
    if re.fullmatch(rb"[0-9a-f]{16}", known):
        return known.decode()
    if any((directory / "checkpoints").glob("*/*/record")):
        raise UserError(
            f'{directory / _FILE} is damaged; write the 16 digits into it that stand after "run" in '
            f"{directory / 'checkpoints'}/STAGE/STEP/record/metadata, or give this run another --name"
        )
    return None


def require_id(directory: Path, run_id: str) -> None:
    """Raises UserError where `directory` is no longer that of run `run_id`; ask before every write that outlives it."""
    if _content(directory / _FILE) != run_id.encode():
        raise gone(directory)


def began_at(directory: Path) -> datetime:
    """When the run in `directory` began, in the time of the place; now, to the second, where none has.

    Chat templates that tell the date tell this one, so that a run that goes on another day asks what it has asked.
    Raises UserError where the file that says it is damaged.
    """
    file = directory / _BEGAN
    if not file.exists():
        return datetime.now().replace(microsecond=0)
    try:
        return datetime.fromisoformat(file.read_text())
    except ValueError:
        raise UserError(
            f"{file} is damaged; write into it when the run began, as in 2026-01-31T12:00:00: prompts may tell the day"
        ) from None


def keep_began(directory: Path, began: datetime) -> None:
    """Write down when the run in `directory` began."""
    write_atomically(directory / _BEGAN, began.isoformat())


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""
