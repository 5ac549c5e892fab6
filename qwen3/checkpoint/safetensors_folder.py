"""The safetensors files of one checkpoint folder as a single mapping, read a piece at a time.

`safetensors` checks every file and its header; values are then read from the offsets in the header. Its own readers
either map the file, whose pages would count as this process's memory, or read a whole tensor for every slice of it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from qwen3.errors import UserError
from qwen3.json_fields import read_object

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
# The bits of each dtype's exponent, all set in infinities and NaN.
_EXPONENTS: dict[np.dtype, tuple[type[np.unsignedinteger], int]] = {
    _DTYPES["F32"]: (np.uint32, 0x7F800000),
    _DTYPES["BF16"]: (np.uint16, 0x7F80),
    _DTYPES["F16"]: (np.uint16, 0x7C00),
}
_CHECKED_ENTRIES = 2**16
# Beside a file that aria2 has given its full size but not all its bytes; what other programs leave is too short.
_UNFINISHED_SUFFIX = ".aria2"


class _Location(NamedTuple):
    path: Path
    offset_bytes: int
    dtype: np.dtype


class SafetensorsFolder:
    """Names, shapes and values of the tensors in `model.safetensors`, or in the shards that an index names.

    Like transformers, prefers the single file where a folder has both. Opening reads every file's header, which
    finds truncated files before anything is loaded.

    Attributes:
        shapes: The shape of every tensor by name, as stored.

    Raises:
        UserError: A file is missing, truncated or malformed, the index contradicts the shards, or a tensor is not
            bfloat16, float16 or float32.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._locations: dict[str, _Location] = {}
        if (self._folder / SINGLE_NAME).exists():
            self._read_header(self._folder / SINGLE_NAME, None)
        elif (self._folder / INDEX_NAME).exists():
            for name, tensors in self._read_index().items():
                self._read_header(self._folder / name, tensors)
        else:
            raise UserError(
                f"{self._folder} has neither {SINGLE_NAME} nor {INDEX_NAME}; "
                "download the checkpoint's safetensors files (other formats are not read)"
            )

    def itemsize(self, name: str) -> int:
        """Bytes of one stored entry of a tensor."""
        return self._locations[name].dtype.itemsize

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        """`count` entries of a tensor from entry `start` on, flattened in its stored (row-major) order and dtype.

        May be called from several threads. Raises UserError where the file fails or an entry is no finite number,
        which no header tells.
        """
        path, offset, dtype = self._locations[name]
        values = np.empty(count, dtype)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset + start * dtype.itemsize)
                left = values.view(np.uint8).data
                while left and (got := file.readinto(left)):
                    left = left[got:]
        except OSError as error:
            raise UserError(f"{path}: {name} cannot be read ({error.strerror}); download the file again") from None
        if left:
            raise UserError(f"{path}: {name} ends early; the file was changed while it was read")
        if not _all_finite(values):
            raise UserError(f"{path}: {name} holds values that are no finite numbers; download the file again")
        return values

    def _read_header(self, path: Path, tensors: list[str] | None) -> None:
        """Take up the tensors of one file: those that the index puts there, or all of them."""
        header, begin = _checked_header(path)
        if tensors is not None and (absent := sorted(set(tensors) - header.keys())):
            raise UserError(
                f"{self._folder / INDEX_NAME} places {some_names(absent)} in {path.name}, which does not hold them; "
                "download both files again"
            )
        for name in header if tensors is None else tensors:
            stored = header[name]
            if stored["dtype"] not in _DTYPES:
                raise UserError(
                    f"{path}: {name} is {stored['dtype']}; only {', '.join(_DTYPES)} are read, "
                    "so take the unquantised checkpoint"
                )
            self.shapes[name] = tuple(stored["shape"])
            self._locations[name] = _Location(path, begin + stored["data_offsets"][0], _DTYPES[stored["dtype"]])

    def _read_index(self) -> dict[str, list[str]]:
        path = self._folder / INDEX_NAME
        try:
            weight_map = read_object(path, "download it again")["weight_map"]
            by_file: dict[str, list[str]] = {}
            for tensor, file in weight_map.items():
                by_file.setdefault(str(file), []).append(tensor)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no safetensors index with a weight_map ({error!r})") from None
        if odd := sorted(file for file in by_file if Path(file).name != file):
            raise UserError(f"{path} names {some_names(odd)}; shards must lie in the same folder")
        if absent := sorted(file for file in by_file if not (self._folder / file).exists()):
            raise UserError(f"{path} names {some_names(absent)}, absent from the folder; download them")
        return by_file


def _checked_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a file that safetensors finds sound, and the offset in bytes where values begin."""
    unfinished = path.with_name(path.name + _UNFINISHED_SUFFIX)
    if unfinished.exists():
        raise UserError(f"{path} is not downloaded to its end ({unfinished.name} lies beside it); finish the download")
    try:
        with safe_open(path, framework="np"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; download the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); download it again") from None
    header.pop("__metadata__", None)
    return header, 8 + size


def _all_finite(values: np.ndarray) -> bool:
    """Whether no exponent is all ones; as integers that is several times as fast as `isfinite`."""
    kind, exponent = _EXPONENTS[values.dtype]
    bits = values.view(kind)
    # A little at a time, so that what is masked stays in the cache.
    blocks = (bits[first : first + _CHECKED_ENTRIES] for first in range(0, len(bits), _CHECKED_ENTRIES))
    return all(int(np.max(block & kind(exponent))) < exponent for block in blocks)


def some_names(names: list[str], limit: int = 4) -> str:
    """At most `limit` of the names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def split_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> dict[str, list[str]]:
    """File names, as transformers writes them, and the tensors of each in the given order.

    A file has at most `max_bytes` of tensors, or a single tensor that is larger.
    """
    shards: list[list[str]] = []
    size = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * itemsize
        if not shards or size + tensor_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def write_index(
    folder: Path, shards: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]], itemsize: int
) -> None:
    """Write the index of a sharded checkpoint; `total_size` counts bytes of tensors, not of headers."""
    total = sum(math.prod(shape) for shape in shapes.values()) * itemsize
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
