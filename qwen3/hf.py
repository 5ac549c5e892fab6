"""Hugging Face checkpoints to `Qwen3` and back, without ever holding a second copy of the weights."""

import collections
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qwen3.config import ModelConfig
from qwen3.errors import UserError
from qwen3.folder import complete_folder
from qwen3.hf_names import HEAD_NAME, Leaf, Tensor, leaves_of
from qwen3.model import Qwen3
from qwen3.safetensors_folder import SafetensorsFolder, some_names, split_shards, write_index
from qwen3.sharding import fetch, shardings

_Bounds = tuple[tuple[int, int], ...]
_PIECE_ENTRIES = 2 * 2**20  # of a tensor read at once: enough for the disk, too little to show in memory
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a buffer that old Llama checkpoints store and that is computed here


def load(
    folder: str | Path,
    *,
    param_dtype: Any = jnp.float32,
    compute_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Qwen3:
    """Read a checkpoint: one file or sharded, experts one by one or fused, in bfloat16, float16 or float32.

    Host memory stays near what is kept there: on CPU the weights themselves, on accelerators one parameter at a time
    as far as this host's devices hold it. With `mesh` the table of `qwen3.sharding` places every part, else the
    default device gets all. A head that is stored beside tied embeddings is ignored.

    Raises:
        UserError: config.json or a weight file is missing or malformed, or tensors are missing, unexpected or of the
            wrong shape; one line names them.
    """
    config = ModelConfig.from_folder(folder)
    files = SafetensorsFolder(folder)
    model = jax.eval_shape(
        lambda: Qwen3(config, jax.random.key(0), param_dtype=param_dtype, compute_dtype=compute_dtype)
    )
    leaves = leaves_of(model)
    _check(files, leaves, config, folder)
    for leaf in leaves:
        setattr(leaf.owner, leaf.attribute, leaf.param.replace(_place(files, leaf, mesh)))
    return model


def check(folder: str | Path) -> ModelConfig:
    """The architecture of a checkpoint whose weight files' headers fit it; no weight is read.

    Raises UserError as `load` does.
    """
    config = ModelConfig.from_folder(folder)
    model = jax.eval_shape(lambda: Qwen3(config, jax.random.key(0)))
    _check(SafetensorsFolder(folder), leaves_of(model), config, folder)
    return config


def save(folder: str | Path, model: Qwen3, *, dtype: Any = None, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write weights, config.json and generation_config.json as transformers, vLLM and llama.cpp read them.

    Adapters are merged into the weights that they stand beside.

    Experts are stored one by one; weights of more than `max_shard_bytes` go into shards with an index, and one shard
    is in host memory at a time. The folder appears under its name once it is complete. `dtype` None keeps the dtype.
    Of several processes that share the model all call this, and the first one writes.

    Raises:
        UserError: The folder cannot be written.
    """
    dtype = np.dtype(model.embed[...].dtype if dtype is None else dtype)
    order = sorted(
        ((leaf, tensor) for leaf in leaves_of(model) for tensor in leaf.tensors), key=lambda pair: pair[1].layer
    )
    shapes = {tensor.name: tensor.shape for _, tensor in order}
    shards = split_shards(shapes, dtype.itemsize, max_shard_bytes)
    tensors = _host_tensors(order, dtype)
    if jax.process_index() != 0:
        collections.deque(tensors, maxlen=0)  # takes part in fetching what lies on this host's devices
        return
    with complete_folder(folder) as partial:
        for file, names in shards.items():
            shard = dict(itertools.islice(tensors, len(names)))
            try:
                save_file(shard, partial / file, {"format": "pt"})
            except SafetensorError as error:
                raise UserError(f"{folder} cannot be written ({error}); free space or name another folder") from None
            del shard
        if len(shards) > 1:
            write_index(partial, shards, shapes, dtype.itemsize)
        raw = model.config.to_hf()
        _write_json(partial / "config.json", raw | {"torch_dtype": dtype.name})
        ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(partial / "generation_config.json", {key: end for key, end in ends.items() if end is not None})


def _stored(files: SafetensorsFolder, tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """Name and shape of what the files hold for a weight: the weight by itself unless only the fused one is there."""
    if tensor.fused is not None and tensor.name not in files.shapes and tensor.fused.name in files.shapes:
        return tensor.fused.name, tensor.fused.shape
    return tensor.name, tensor.shape


def _check(files: SafetensorsFolder, leaves: list[Leaf], config: ModelConfig, folder: str | Path) -> None:
    expected = dict(_stored(files, tensor) for leaf in leaves for tensor in leaf.tensors)
    unexpected = [
        name
        for name in files.shapes
        if name not in expected
        and not name.endswith(_IGNORED_SUFFIX)
        and not (config.tie_word_embeddings and name == HEAD_NAME)
    ]
    missing = [name for name in expected if name not in files.shapes]
    misshapen = [
        f"{name} {list(files.shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if files.shapes.get(name, shape) != shape
    ]
    faults = [
        f"{kind}: {some_names(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if faults:
        raise UserError(f"{folder}: weights do not fit config.json; {'; '.join(faults)}")


def _place(files: SafetensorsFolder, leaf: Leaf, mesh: Mesh | None) -> jax.Array:
    """Read a parameter, each part that some device needs once, and put it there."""
    param = leaf.param
    shape, dtype = param.get_value().shape, param.get_value().dtype
    if mesh is None:
        return jax.device_put(_read(files, leaf, [tuple((0, size) for size in shape)], dtype)[0])
    sharding = shardings(param, mesh).get_value()
    devices_of: dict[_Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    parts = _read(files, leaf, list(devices_of), dtype)
    placed = [
        jax.device_put(part, device) for part, to in zip(parts, devices_of.values(), strict=True) for device in to
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _read(files: SafetensorsFolder, leaf: Leaf, parts: list[_Bounds], dtype: Any) -> list[np.ndarray]:
    """The parts of a parameter within `parts` (start, stop of every axis); what is stored is read once for all."""
    outs = [_aligned_empty([stop - start for start, stop in bounds], dtype) for bounds in parts]
    for tensor in leaf.tensors:
        targets = [
            _target(leaf, tensor, bounds, out)
            for bounds, out in zip(parts, outs, strict=True)
            if all(start <= at < stop for at, (start, stop) in zip(tensor.lead, bounds, strict=False))
        ]
        name, stored_shape = _stored(files, tensor)
        before = 0
        if tensor.fused is not None and name == tensor.fused.name:
            before = tensor.lead[-1] * stored_shape[1] + tensor.fused.row
        width = math.prod(tensor.shape[1:])
        step = max(1, _PIECE_ENTRIES // width)
        for start in range(0, tensor.shape[0], step):
            stop = min(start + step, tensor.shape[0])
            wanted = [target for target in targets if target.rows.start < stop and start < target.rows.stop]
            if not wanted:
                continue
            values = files.read(name, (before + start) * width, (stop - start) * width)
            values = values.reshape(stop - start, *tensor.shape[1:])
            for rows, columns, view in wanted:
                first, last = max(start, rows.start), min(stop, rows.stop)
                view[first - rows.start : last - rows.start] = values[(slice(first - start, last - start), *columns)]
    return outs


class _Target(NamedTuple):
    """Where rows and columns of a stored tensor go: a view, in the stored orientation, of the part that gets them."""

    rows: slice
    columns: tuple[slice, ...]
    view: np.ndarray


def _target(leaf: Leaf, tensor: Tensor, bounds: _Bounds, out: np.ndarray) -> _Target:
    depth = len(tensor.lead)
    shape = leaf.param.get_value().shape[depth:]
    view = out[tuple(at - start for at, (start, _) in zip(tensor.lead, bounds, strict=False))]
    rows, *columns = _torch_index(shape, bounds[depth:], tensor.inputs)
    if tensor.inputs is not None:
        view = view.reshape(*(part.stop - part.start for part in columns), rows.stop - rows.start).T
    return _Target(rows, tuple(columns), view)


def _torch_index(shape: tuple[int, ...], bounds: _Bounds, inputs: int | None) -> tuple[slice, ...]:
    """What `bounds` within a weight of ours selects in PyTorch's shape of it."""
    if inputs is None:
        return tuple(slice(*bound) for bound in bounds)
    outputs = _flat(shape[inputs:], bounds[inputs:])
    return (outputs, _flat(shape[:inputs], bounds[:inputs])) if inputs else (outputs,)


def _flat(shape: tuple[int, ...], bounds: _Bounds) -> slice:
    """One slice of the flattened axes; only the first of them is ever split (heads are, within a head nothing is)."""
    inner = math.prod(shape[1:])
    assert all(bound == (0, size) for bound, size in zip(bounds[1:], shape[1:], strict=True))
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)


def _aligned_empty(shape: list[int], dtype: Any) -> np.ndarray:
    """Memory that begins at a multiple of 64 bytes, which the CPU backend takes over instead of copying."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _host_tensors(order: list[tuple[Leaf, Tensor]], dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values in PyTorch's shape; from the devices comes one layer of one parameter at a time."""
    for (leaf, _), group in itertools.groupby(order, key=lambda pair: (pair[0], pair[1].layer)):
        tensors = [tensor for _, tensor in group]
        block = _host_block(leaf.param.get_value(), tensors[0].lead[:1])
        if leaf.adapter is not None:
            a, b = (_host_block(part.get_value(), tensors[0].lead[:1]) for part in (leaf.adapter.a, leaf.adapter.b))
            block = block.astype(np.float32) + leaf.adapter.scale * np.tensordot(a, b, 1)
        for tensor in tensors:
            weight = block[tensor.lead[1:]]
            if tensor.inputs is not None:
                weight = weight.reshape(tensor.shape[::-1]).T
            yield tensor.name, np.array(weight, dtype, order="C")


def _host_block(value: jax.Array, layer: tuple[int, ...]) -> np.ndarray:
    """A parameter, or one layer of it, on the host; where it lies in host memory in one piece, a view of that."""
    if len(value.devices()) == 1 and next(iter(value.devices())).platform == "cpu":
        return np.asarray(value)[layer]
    return fetch(jax.lax.dynamic_index_in_dim(value, layer[0], keepdims=False) if layer else value)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
