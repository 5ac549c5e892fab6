"""Who a teacher is, cheaply: a hash that differs for other weights without reading hundreds of gigabytes."""

import hashlib
from pathlib import Path

from qwen3.errors import UserError

_FIRST_BYTES = 2**20
"""The names and shapes of the tensors, and more."""
_PLACES, _PLACE_BYTES = 64, 2**16


def fingerprint(folder: str | Path) -> str:
    """Hash of config.json and of every weight file, see `weights_digest`.

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
    """Hash of size, first megabyte and 64 places, evenly spaced, of a weight file: what one training step changes is
    seen, a single tensor that was changed by hand need not be."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as stream:
        digest.update(stream.read(_FIRST_BYTES))
        for place in range(_PLACES):
            stream.seek(max(0, size - _PLACE_BYTES) * place // (_PLACES - 1))
            digest.update(stream.read(_PLACE_BYTES))
    return digest.hexdigest()
