"""Which run a directory belongs to: a random id, by which a run tells its directory from a later one of that name.

A directory can be deleted, and made anew by the next run, under a process that goes on writing there by name. What
that process saved would be the next run's checkpoint.
"""

import secrets
from pathlib import Path

from distill.monitor.records import write_atomically
from qwen3.errors import UserError

_FILE = "run_id"


def claim_id(directory: Path) -> str:
    """The id of the run in `directory`; a directory without one gets it."""
    file = directory / _FILE
    if not file.exists():
        write_atomically(file, secrets.token_hex(8))
    return file.read_text()


def require_id(directory: Path, run_id: str) -> None:
    """Raises UserError where `directory` is no longer that of run `run_id`; ask before every write that outlives it."""
    file = directory / _FILE
    if not file.exists() or file.read_text() != run_id:
        raise UserError(
            f"{directory} was deleted or replaced while this run was writing to it, and the run has stopped; start "
            "the command again, once no other process runs there"
        )
