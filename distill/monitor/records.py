"""The JSON that a run keeps: whole documents, and append-only JSONL files that survive SIGKILL.

A process can die in the middle of a write, so the last line of such a file may be torn. Readers skip it, writers cut
it off before they append. Any other unreadable line is damage from outside and is reported with its number.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from qwen3.errors import UserError

Record = dict[str, Any]
Kept = TypeVar("Kept")


def read_json(path: pathlib.Path, made: Callable[[Any], Kept], remedy: str) -> Kept:
    """What `made` makes of the JSON document in `path`.

    Raises:
      UserError: with `remedy`, where the file is not JSON or `made` finds in it what it cannot use.
    """
    try:
        return made(json.loads(path.read_bytes()))
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
    # What comes of values of other types than were written.
    except (TypeError, KeyError, AttributeError, AssertionError, IndexError) as error:
        reason = f"it holds something else than was written there: {' '.join(str(error).split())}".rstrip(": ")
    raise UserError(f"{path} is damaged ({reason}); {remedy}")


def read_records(path: pathlib.Path, fits: Callable[[Record], bool] = lambda record: True) -> list[Record]:
    """The records of `path`, oldest first; empty if there is no such file.

    Raises:
      UserError: for a line other than a torn last one that is not a JSON object, or one that does not fit.
    """
    if not path.exists():
        return []
    complete, _, _torn = path.read_bytes().rpartition(b"\n")
    if not complete:
        return []
    records = []
    for number, line in enumerate(complete.split(b"\n"), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object; delete that line or restore the file")
        if not fits(record):
            raise UserError(f"{path}:{number}: not a record of a run; delete that line or restore the file")
        records.append(record)
    return records


class RecordLog:
    """One JSONL file open for appending; every record is with the operating system when `append` returns."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            _cut_torn_line(path)
        except OSError as error:
            raise unwritable(path, error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line. Non-finite floats are refused (`ValueError`): they are not JSON."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise unwritable(self.path, error) from error

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Drops every record that is not `wanted`; the file is either the old one or the new one, never between."""
        records = read_records(self.path)
        kept = [record for record in records if wanted(record)]
        if len(kept) == len(records):
            return
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomically(self.path, text)
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8) in one step.

    Raises:
      UserError: if the disk is full or the place not writable; the old file is then still there, whole.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise unwritable(path, error) from error


def _cut_torn_line(path: pathlib.Path) -> None:
    with open(path, "rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        block_bytes = 65_536
        while end > 0:
            start = max(0, end - block_bytes)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        # A whole file keeps its time: nothing was written.
        if end < size:
            file.truncate(end)


def unwritable(path: pathlib.Path, error: OSError) -> UserError:
    """The one line for a full disk, a forbidden place, or a folder that is there no more."""
    if isinstance(error, FileNotFoundError):
        return gone(path.parent)
    return UserError(f"cannot write {path}: {error.strerror}; free space there or choose another run directory")


def gone(directory: pathlib.Path) -> UserError:
    """The one line for a run directory that somebody took away."""
    return UserError(
        f"{directory} was deleted or replaced while this run was writing to it, and the run has stopped; start the "
        "command again, once no other process runs there"
    )
