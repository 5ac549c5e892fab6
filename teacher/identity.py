"""Who a teacher is: what every answer of a server says, so that nobody learns from two teachers taken for one."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from qwen3.chat.tokenizer import TokenizerFiles, read_tokenizer
from qwen3.checkpoint.quantisation import Quantisation
from qwen3.errors import UserError
from teacher.fingerprint import fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a teacher is, field by field."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`. Raises UserError for another document."""
        fields = [field.name for field in dataclasses.fields(cls)]
        values = {name: raw.get(name) for name in fields}
        if missing := [name for name, value in values.items() if not isinstance(value, str)]:
            raise UserError(f"a teacher's identity lacks {', '.join(missing)}; it comes from another version")
        return cls(**values)

    @property
    def digest(self) -> str:
        """One hash for all of it, 32 hexadecimal digits."""
        return _digest(json.dumps(dataclasses.asdict(self), sort_keys=True))

    def differing(self, other: Self) -> list[str]:
        """The fields in which two teachers differ."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [name for name, value in mine.items() if theirs[name] != value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherIdentity(Identity):
    """Hashes of all that decides a teacher's targets."""

    weights: str
    """`teacher.fingerprint` of its folder, and its quantisation."""
    dtype: str
    """What it computes in."""
    tokenizer: str
    """Hash of tokenizer.json and of the special tokens' roles."""
    template: str
    """Hash of the chat templates."""

    @classmethod
    def of(cls, folder: str | Path, *, dtype: str, quantisation: Quantisation | None) -> "TeacherIdentity":
        """Reads a Hugging Face folder; of weight files what `weights_digest` does.

        Raises UserError where a file is missing."""
        tokenizer, template = tokenizer_hashes(folder)
        return cls(weights=known_as(folder, quantisation), dtype=dtype, tokenizer=tokenizer, template=template)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatedIdentity(Identity):
    """What a server of another program says of its teacher: names, and no hash of weights. Another teacher of the same
    name is taken for the same."""

    server: str
    """Which program."""
    version: str
    """Of the program."""
    model: str
    """The name by which it is asked for."""
    root: str
    """Where the server has it from: a folder, or a name on the Hub."""
    weights_version: str
    """What the server calls these weights; empty where it has no name for them."""
    max_model_len: str
    """Tokens of the longest sequence."""
    tokenizer: str
    """Hash of the tokenizer that is here."""
    template: str
    """Hash of the chat templates that are here."""

    @property
    def weights(self) -> str:
        """How they are known to a target store."""
        version = f" {self.weights_version}" if self.weights_version else ""
        return f"{self.model} ({self.root}{version}) of {self.server} {self.version}"


def check_same(expected: Identity, found: Identity, url: str) -> None:
    """Raises UserError where the teacher at `url` is not the one that was expected."""
    if differing := expected.differing(found):
        raise UserError(
            f"{url} serves another teacher than was expected: it differs in {', '.join(differing)}; serve the same one "
            "there, or begin a new run"
        )


def known_as(folder: str | Path, quantisation: Quantisation | None) -> str:
    """The weights' fingerprint and what they are rounded to, as target stores keep it."""
    return fingerprint(folder) + ("" if quantisation is None else f" {quantisation}")


def tokenizer_hashes(folder: str | Path) -> tuple[str, str]:
    """Hashes of a folder's tokenizer and of its chat templates. Raises UserError where a file is missing."""
    files: TokenizerFiles = read_tokenizer(folder)
    roles = json.dumps(dict(files.special_tokens), sort_keys=True).encode()
    templates = json.dumps(dict(files.templates), sort_keys=True)
    return _digest(files.contents["tokenizer.json"] + roles), _digest(templates)


def _digest(content: str | bytes) -> str:
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=16).hexdigest()
