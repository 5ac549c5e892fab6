"""Who a teacher is: what every answer of a server says, so that nobody learns from two teachers taken for one."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3.chat.tokenizer import TokenizerFiles, read_tokenizer
from qwen3.checkpoint.quantisation import Quantisation
from qwen3.errors import UserError
from teacher.fingerprint import fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
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

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "TeacherIdentity":
        """The inverse of `dataclasses.asdict`. Raises UserError for another document."""
        fields = [field.name for field in dataclasses.fields(cls)]
        values = {name: raw.get(name) for name in fields}
        if missing := [name for name, value in values.items() if not isinstance(value, str)]:
            raise UserError(f"a teacher's identity lacks {', '.join(missing)}; it comes from another version")
        return cls(**{name: str(value) for name, value in values.items()})

    @property
    def digest(self) -> str:
        """One hash for all of it, 32 hexadecimal digits."""
        return _digest(json.dumps(dataclasses.asdict(self), sort_keys=True))

    def differing(self, other: "TeacherIdentity") -> list[str]:
        """The fields in which two teachers differ."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [name for name, value in mine.items() if theirs[name] != value]


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
