"""Hugging Face checkpoints to `Qwen3` and back, without ever holding a second copy of the weights."""

import collections
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qwen3.checkpoint.hf_names import EMBEDDING_NAME, HEAD_NAME, Leaf, Tensor, leaves_of
from qwen3.checkpoint.quantisation import Quantisation
from qwen3.checkpoint.safetensors_folder import SafetensorsFolder, some_names, split_shards, write_index
from qwen3.checkpoint.streaming import OnRead, stream
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.folder import complete_folder
from qwen3.sharding import fetch, shardings

_COMPARED_ENTRIES = 2**22
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a buffer that old Llama checkpoints store and that is computed here


def load(
    folder: str | Path,
    *,
    param_dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    on_read: OnRead | None = None,
    quantisation: Quantisation | None = None,
) -> Qwen3:
    """Read a checkpoint: one file or sharded, experts one by one or fused, in bfloat16, float16 or float32.

    Host memory stays near what is kept there (on CPU the weights themselves, on accelerators nothing): beside it
    come three slabs of weights, see `qwen3.checkpoint.streaming.stream`. With `mesh` the table of `qwen3.sharding`
    places every part, and every process reads what its devices need; else the default device gets all. A head that is
    stored beside tied embeddings must be the same. With `quantisation` projections and experts are kept in eight bits,
    rounded as they come (see `qwen3.checkpoint.quantisation`); such a model is read, not trained or saved.

    Raises:
        UserError: config.json or a weight file is missing or malformed, tensors are missing, unexpected or of the
            wrong shape, a weight is not a finite number, the embeddings are tied to another head than is stored, or the
            folder holds an adapter; one line names them.
    """
    config = ModelConfig.from_folder(folder)
    files = SafetensorsFolder(folder)
    model = jax.eval_shape(
        lambda: Qwen3(config, jax.random.key(0), param_dtype=param_dtype, compute_dtype=compute_dtype)
    )
    leaves = leaves_of(model)
    _check(files, leaves, config, folder)
    for leaf, weight in zip(leaves, stream(files, leaves, mesh, on_read, quantisation), strict=True):
        setattr(leaf.owner, leaf.attribute, weight)
    return model


def check(folder: str | Path, mesh: Mesh | None = None) -> ModelConfig:
    """The architecture of a checkpoint whose files' headers fit it, and that `mesh` can share.

    No weight is read but a head that is stored beside tied embeddings. Raises UserError as `load` does.
    """
    config = ModelConfig.from_folder(folder)
    model = jax.eval_shape(lambda: Qwen3(config, jax.random.key(0)))
    _check(SafetensorsFolder(folder), leaves_of(model), config, folder)
    if mesh is not None:
        shardings(model, mesh)
    return config


def save(folder: str | Path, model: Qwen3, *, dtype: DTypeLike | None = None, max_shard_bytes: int = 5 * 10**9) -> None:
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


def _check(files: SafetensorsFolder, leaves: list[Leaf], config: ModelConfig, folder: str | Path) -> None:
    expected = dict(tensor.stored(files.shapes) for leaf in leaves for tensor in leaf.tensors)
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
    if HEAD_NAME in missing:
        faults.append("if its head is its embedding, set tie_word_embeddings to true")
    if faults:
        raise UserError(f"{folder}: weights do not fit config.json; {'; '.join(faults)}")
    if config.tie_word_embeddings and HEAD_NAME in files.shapes and not _equal(files, HEAD_NAME, EMBEDDING_NAME):
        # transformers keeps both and says that it does.
        raise UserError(
            f"{folder}: tie_word_embeddings is true in config.json, but {HEAD_NAME} is stored and differs from "
            f"{EMBEDDING_NAME}; set tie_word_embeddings to false to use that head"
        )


def _equal(files: SafetensorsFolder, one: str, other: str) -> bool:
    if files.shapes[one] != files.shapes[other]:
        return False
    size = math.prod(files.shapes[one])
    pieces = [(start, min(_COMPARED_ENTRIES, size - start)) for start in range(0, size, _COMPARED_ENTRIES)]
    return all(np.array_equal(files.read(one, *piece), files.read(other, *piece)) for piece in pieces)


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
