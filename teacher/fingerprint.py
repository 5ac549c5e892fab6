"""Who a teacher is, cheaply: a hash that differs for other weights without reading hundreds of gigabytes."""

import hashlib
from pathlib import Path

from qwen3.errors import UserError

_SAMPLE_BYTES = 2**20


def fingerprint(folder: str | Path) -> str:
    """Hash of config.json, and of size, first and last megabyte of every weight file.

    Raises UserError where a file cannot be read.
    """
    folder = Path(folder)
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(f"{file.name} {weights_digest(file)}\n".encode())
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); name a folder in Hugging Face format"
        ) from None
    return digest.hexdigest()


def weights_digest(file: Path) -> str:
    """Hash of size, first and last megabyte of a weight file."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
