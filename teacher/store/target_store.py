"""Off-policy targets on disk: written once by a slow teacher, read at random many times, resumable and checkable.

A store is a directory with one `index.json` and numbered ArrayRecord shards. A record is one rollout with the
teacher's top entries at the positions that its loss mask keeps; other positions cost nothing.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, SupportsIndex

import numpy as np
import safetensors
from array_record.python import array_record_data_source, array_record_module

from qwen3.errors import UserError
from teacher.scored_rollout import ScoredRollout, decode, encode

FORMAT: Final = 2
_READ_FORMATS: Final = (1, FORMAT)
"""Records say themselves how they are laid out; a store may have been begun in an earlier format."""
INDEX_NAME: Final = "index.json"
# zstd:1 takes a third off the ids at a few percent of the time a teacher needs; higher levels gain nothing.
# Groups of one record are what makes a random read touch one record.
_WRITER_OPTIONS: Final = "group_size:1,zstd:1"
_SHARD_FIELDS: Final = frozenset({"records", "tokens", "targets", "longest_tokens", "size_bytes", "sha256"})


class TargetStoreWriter:
    """Writes a store shard by shard; after a crash, one made with the same arguments goes on at the next shard.

    A shard appears under its name only when all of it is on disk, and counts only once the index names it. One
    process writes a store.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, Any]):
        """Creates or continues the store in `directory`.

        `identity` says what the targets depend on (teacher fingerprint, J, tokenizer hash, sampling, …) as JSON
        values. Raises UserError if the directory holds a store of another identity or cannot be written.
        """
        self.directory = Path(directory)
        identity = json.loads(json.dumps(identity))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if (self.directory / INDEX_NAME).exists():
                self._index = _read_index(self.directory)
                _check_identity(self.directory, self._index["identity"], identity)
            else:
                self._write_index({"identity": identity, "finished": False, "entries": None, "shards": {}})
        except OSError as error:
            raise UserError(f"target store {self.directory} cannot be written: {error.strerror or error}") from error

    @property
    def finished(self) -> bool:
        """Whether `finish` was called, now or by an earlier process."""
        return bool(self._index["finished"])

    def completed_shards(self) -> frozenset[int]:
        """Numbers of the shards that are whole on disk."""
        return frozenset(int(number) for number in self._index["shards"])

    def write_shard(self, number: int, records: Sequence[ScoredRollout]) -> None:
        """Writes `records` as shard `number` (0, 1, …), all or nothing.

        Raises ValueError for a shard that is already there, an empty one, or records whose J differs from the
        store's; UserError when the disk refuses.
        """
        if self.finished or number in self.completed_shards():
            raise ValueError(f"shard {number} of {self.directory} is already written; ask completed_shards() first")
        if not records:
            raise ValueError(f"shard {number} of {self.directory} has no records; give it at least one")
        entries = self._index["entries"] or records[0].ids.shape[1]
        for record in records:
            if record.ids.shape[1] != entries:
                raise ValueError(
                    f"rollout {record.rollout.prompt_id!r} has J = {record.ids.shape[1]} entries per token, the store "
                    f"{self.directory} has {entries}; score every rollout with one J"
                )
        path = _shard_path(self.directory, number)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            writer = array_record_module.ArrayRecordWriter(os.fspath(unfinished), _WRITER_OPTIONS)
            for record in records:
                writer.write(encode(record))
            writer.close()
            digest = _durable_digest(unfinished)
            size_bytes = unfinished.stat().st_size
            unfinished.rename(path)
            shard = {
                "records": len(records),
                "tokens": sum(len(record.rollout.tokens) for record in records),
                "targets": sum(int(record.rollout.loss_mask.sum()) for record in records),
                "longest_tokens": max(len(record.rollout.tokens) for record in records),
                "size_bytes": size_bytes,
                "sha256": digest,
            }
            shards = {**self._index["shards"], str(number): shard}
            self._write_index({**self._index, "entries": entries, "shards": shards})
        # array_record reports every disk error as RuntimeError.
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise UserError(f"shard {number} of target store {self.directory} cannot be written: {error}") from error

    def copy_shard(self, number: int, source: "TargetStore", shard: int) -> None:
        """Shard `shard` of another store as shard `number`, byte for byte, all or nothing.

        Raises UserError where it does not match its hash, or where the disk refuses."""
        entry, path = source.shards[shard], _shard_path(self.directory, number)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            shutil.copyfile(_shard_path(source.directory, shard), unfinished)
            if _durable_digest(unfinished) != entry["sha256"]:
                raise UserError(
                    f"target store shard {_shard_path(source.directory, shard)} does not match its SHA-256 in the "
                    f"index; it was changed: restore it or delete {source.directory} and rewrite"
                )
            unfinished.rename(path)
            shards = {**self._index["shards"], str(number): dict(entry)}
            self._write_index({**self._index, "entries": source.entries, "shards": shards})
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise UserError(f"shard {number} of target store {self.directory} cannot be written: {error}") from error

    def finish(self) -> None:
        """Declares the store complete; raises ValueError when it is empty or a shard number is left out."""
        numbers = self.completed_shards()
        missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
        if missing:
            raise ValueError(f"target store {self.directory} lacks shards {missing}; write them before finish()")
        try:
            self._write_index({**self._index, "finished": True})
        except OSError as error:
            raise UserError(f"the index of target store {self.directory} cannot be written: {error}") from error

    def _write_index(self, index: dict[str, Any]) -> None:
        # A store that goes on is of this format, whatever it was begun in.
        index = {**index, "format": FORMAT}
        unfinished = self.directory / f".{INDEX_NAME}.unfinished"
        unfinished.write_text(json.dumps(index, indent=1, sort_keys=True))
        _durable_digest(unfinished)
        unfinished.rename(self.directory / INDEX_NAME)
        _sync_directory(self.directory)
        self._index = index


class TargetStore:
    """A finished store: a sequence of ScoredRollout with random access, as grain's data sources are."""

    def __init__(self, directory: Path, index: Mapping[str, Any]):
        """Use `TargetStore.open`, which checks what it finds."""
        self.directory = directory
        self.identity: Mapping[str, Any] = index["identity"]
        self.entries: int = index["entries"]
        """J, the teacher entries per token."""
        shards = [index["shards"][str(number)] for number in range(len(index["shards"]))]
        self.shards: Sequence[Mapping[str, Any]] = shards
        """What the index says of each."""
        self.tokens = sum(shard["tokens"] for shard in shards)
        self.targets = sum(shard["targets"] for shard in shards)
        """Positions that carry a target."""
        self.longest_tokens = max(shard["longest_tokens"] for shard in shards)
        self.size_bytes = sum(shard["size_bytes"] for shard in shards)
        self._source = array_record_data_source.ArrayRecordDataSource(
            [
                _WholeShard(os.fspath(_shard_path(directory, number)), 0, shard["records"], shard["records"])
                for number, shard in enumerate(shards)
            ]
        )
        self._shard_ends = np.cumsum([shard["records"] for shard in shards])

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        identity: Mapping[str, Any] | None = None,
        *,
        verify_digests: bool = False,
    ) -> "TargetStore":
        """Opens the store in `directory`, checking that every shard is there and has its full size.

        With `identity`, the store must have been written under the same one. `verify_digests` also reads every byte
        and compares SHA-256. Raises UserError naming the file or the fields at fault.
        """
        directory = Path(directory)
        index = _read_index(directory)
        if not index["finished"]:
            raise UserError(
                f"target store {directory} is unfinished ({len(index['shards'])} shards so far); run the stage that "
                "writes it again to complete it"
            )
        if identity is not None:
            _check_identity(directory, index["identity"], json.loads(json.dumps(identity)))
        for number, shard in index["shards"].items():
            path = _shard_path(directory, int(number))
            if not path.is_file():
                raise UserError(f"target store shard {path} is missing; restore it or delete {directory} and rewrite")
            size_bytes = path.stat().st_size
            if size_bytes != shard["size_bytes"]:
                raise UserError(
                    f"target store shard {path} has {size_bytes} bytes, the index says {shard['size_bytes']}; it was "
                    f"cut or changed: restore it or delete {directory} and rewrite"
                )
            if verify_digests and _digest(path) != shard["sha256"]:
                raise UserError(
                    f"target store shard {path} does not match its SHA-256 in the index; it was changed: restore it or "
                    f"delete {directory} and rewrite"
                )
        return cls(directory, index)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, record_key: SupportsIndex) -> ScoredRollout:
        number = record_key.__index__()
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of a target store of {len(self)}")
        try:
            return decode(self._source[number])
        # array_record and safetensors report damage in their own ways; all of them mean the same to a user.
        except (RuntimeError, safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
            shard = int(np.searchsorted(self._shard_ends, number, side="right"))
            raise UserError(
                f"target store shard {_shard_path(self.directory, shard)} is damaged at record {number}: {error}; "
                f"restore it or delete {self.directory} and rewrite"
            ) from error

    def __repr__(self) -> str:
        return f"TargetStore({os.fspath(self.directory)!r}, records={len(self)})"


_SAME_TO_MERGE: Final = ("teacher", "tokenizer", "template", "vocab_size", "top_k", "sampled_tokens")


def merged(stores: Sequence[TargetStore], directory: str | os.PathLike[str]) -> TargetStore:
    """All records of several finished stores as one new store in `directory`; a merge that was cut off goes on.

    Its identity has what all of them share, and `merged`, the identity of each that was written and not merged. Raises
    UserError naming the stores and what differs where they are of another teacher, tokenizer or kind of targets, or
    where two hold the same.
    """
    first, *others = stores
    for place, other in enumerate(others, start=1):
        differing = [name for name in _SAME_TO_MERGE if first.identity.get(name) != other.identity.get(name)]
        if differing or first.entries != other.entries:
            what = "; ".join(
                f"{name}: {_shown(first.identity.get(name))} and {_shown(other.identity.get(name))}"
                for name in differing
            )
            raise UserError(
                f"target stores {first.directory} and {other.directory} differ in "
                f"{what or f'entries per token: {first.entries} and {other.entries}'}; merge only stores of one "
                "teacher, tokenizer and kind of targets"
            )
        if same := next((one for one in stores[:place] if any(part in _parts(one) for part in _parts(other))), None):
            raise UserError(
                f"target stores {same.directory} and {other.directory} hold the same prompts by the same seed; merge "
                "each once"
            )
    shared = {name: first.identity[name] for name in _SAME_TO_MERGE if name in first.identity}
    writer = TargetStoreWriter(directory, shared | {"merged": [part for store in stores for part in _parts(store)]})
    if not writer.finished:
        places = [(store, shard) for store in stores for shard in range(len(store.shards))]
        for number, (store, shard) in enumerate(places):
            if number not in writer.completed_shards():
                writer.copy_shard(number, store, shard)
        writer.finish()
    return TargetStore.open(directory)


def _parts(store: TargetStore) -> list[dict[str, Any]]:
    """The identities of the stores that it was merged from; of one that was written its own."""
    return list(store.identity.get("merged", [dict(store.identity)]))


def _shown(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


class _WholeShard(NamedTuple):
    """array_record's FileInstruction: with the count known, opening a store need not open every shard."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"targets-{number:05d}.arrayrecord"


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX_NAME
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {directory} is not a target store, or its writer never started") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"target store index {path} cannot be read: {error}; restore it or delete {directory} and rewrite"
        ) from error
    if not isinstance(index, dict) or index.get("format") not in _READ_FORMATS:
        raise UserError(f"target store index {path} is not of format {FORMAT}; rewrite the store with this version")
    if wrong := _wrong_in(index):
        raise UserError(f"target store index {path} is damaged: {wrong}; restore it or delete {directory} and rewrite")
    return index


def _wrong_in(index: Mapping[str, Any]) -> str | None:
    """What the index holds in another way than the writer puts it there, else None."""
    shards = index.get("shards")
    if not isinstance(index.get("identity"), dict) or not isinstance(index.get("finished"), bool):
        return "it lacks identity or finished"
    if not isinstance(shards, dict) or not all(isinstance(shard, dict) for shard in shards.values()):
        return "shards are no objects"
    if absent := {field for shard in shards.values() for field in _SHARD_FIELDS - shard.keys()}:
        return f"a shard lacks {', '.join(sorted(absent))}"
    counts = [shard[field] for shard in shards.values() for field in _SHARD_FIELDS - {"sha256"}]
    if shards or index["finished"]:
        counts.append(index.get("entries"))
    if not all(type(count) is int and count >= 0 for count in counts):
        return "a count is no whole number"
    if not all(number.isdecimal() for number in shards):
        return "a shard has no number"
    if index["finished"] and shards.keys() != {str(number) for number in range(max(1, len(shards)))}:
        return "it is finished, yet lacks shards"
    return None


def _check_identity(directory: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if differing:
        fields = "; ".join(f"{name}: stored {stored.get(name)!r}, wanted {wanted.get(name)!r}" for name in differing)
        raise UserError(
            f"target store {directory} was written under another identity ({fields}); "
            "use another directory or delete this one"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _durable_digest(path: Path) -> str:
    """SHA-256 of a file that is on disk, not only in the page cache, when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(directory: Path) -> None:
    """Makes renames inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
