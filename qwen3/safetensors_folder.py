"""The safetensors files of one checkpoint folder as a single mapping, read a piece at a time.

Files are read with `pread`, not mapped: pages of a mapped checkpoint would count as this process's memory, and a
teacher's would be all of it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qwen3.errors import UserError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")


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
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
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

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or the part of it that `index` selects with one slice for each axis, in its stored dtype."""
        file = self._handle(self._file_of[name])
        try:
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self._file_of[name]}: {name} cannot be read ({error}); download the file again"
            ) from None

    def _handle(self, path: Path) -> Any:
        """Keeps one file open: weights are read file by file as long as layers are."""
        if self._open is None or self._open[0] != path:
            try:
                self._open = (path, safe_open(path, framework="np", backend="pread"))
            except FileNotFoundError:
                raise UserError(f"{path} does not exist; download the checkpoint again") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is truncated or no safetensors file ({error}); download it again") from None
        return self._open[1]

    def _read_header(self, path: Path, tensors: list[str] | None) -> None:
        """Take up the tensors of one file: those that the index puts there, or all of them."""
        file = self._handle(path)
        stored = set(file.keys())
        if tensors is not None and (absent := sorted(set(tensors) - stored)):
            raise UserError(
                f"{self._folder / INDEX_NAME} places {some_names(absent)} in {path.name}, which does not hold them; "
                "download both files again"
            )
        for name in sorted(stored) if tensors is None else tensors:
            header = file.get_slice(name)
            if header.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{path}: {name} is {header.get_dtype()}; only {', '.join(_DTYPES)} are read, "
                    "so take the unquantised checkpoint"
                )
            self.shapes[name] = tuple(header.get_shape())
            self._file_of[name] = path

    def _read_index(self) -> dict[str, list[str]]:
        path = self._folder / INDEX_NAME
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            by_file: dict[str, list[str]] = {}
            for tensor, file in weight_map.items():
                by_file.setdefault(file, []).append(tensor)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no safetensors index with a weight_map ({error!r})") from None
        if odd := sorted(file for file in by_file if Path(file).name != file):
            raise UserError(f"{path} names {some_names(odd)}; shards must lie in the same folder")
        if absent := sorted(file for file in by_file if not (self._folder / file).exists()):
            raise UserError(f"{path} names {some_names(absent)}, absent from the folder; download them")
        return by_file


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
