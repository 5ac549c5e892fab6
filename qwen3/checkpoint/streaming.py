"""Weights from files to devices: every byte that this host's devices need is read once, in parallel, in bounded memory.

A parameter is a stack of layers, and whole stacks are too large for a host: the experts' matrices of a 235B teacher
have 151 GB each. So a stack is filled on the devices, a slab of some layers at a time, and a host holds up to three
slabs: one that is being read, one on its way to the devices, and one that has arrived and is about to be given up.
Where weights are kept in eight bits, a device rounds its part of a slab as it comes; no more than that is ever wide.
"""

import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from qwen3.checkpoint.hf_names import Leaf, Tensor
from qwen3.checkpoint.quantisation import Quantisation, QuantisedWeight, quantise
from qwen3.checkpoint.safetensors_folder import SafetensorsFolder
from qwen3.cores import usable_cores
from qwen3.sharding import shardings

SLAB_BYTES = 64 * 2**20
"""Of a parameter, what a host reads before it goes to the devices; more where one layer has more."""
READERS = min(16, 2 * usable_cores())
"""Threads that read, each a piece of `PIECE_BYTES` at a time."""
PIECE_BYTES = 4 * 2**20
# Rows transposed at a time: what they and their columns take fits a core's cache (2.1 GB/s; 0.14 GB/s at once).
_TILE_ROWS = 16

OnRead = Callable[[int, int], None]
"""Called in the loading thread with the bytes read so far and the bytes that this host reads in all."""
Weight = nnx.Variable | QuantisedWeight
"""A parameter, as it is or in eight bits."""
_Bounds = tuple[tuple[int, int], ...]


def stream(
    files: SafetensorsFolder,
    leaves: Sequence[Leaf],
    mesh: Mesh | None,
    on_read: OnRead | None = None,
    quantisation: Quantisation | None = None,
) -> Iterator[Weight]:
    """The parameters in the order of `leaves`, placed by `qwen3.sharding`; without `mesh` on the default device.

    With `quantisation` the leaves that are kept in eight bits (see `qwen3.checkpoint.quantisation`) come so.

    Host memory beside what is kept there: three slabs, each of at most `SLAB_BYTES` or of one layer of one parameter
    (or of the embedding) as far as this host's devices hold it, and READERS · PIECE_BYTES. A weight that is split along
    PyTorch's columns is read with its neighbours, which share its pages of storage, and dropped down to its part.
    """
    layouts = [_Layout(files, leaf, mesh, quantisation) for leaf in leaves]
    total = sum(piece.bytes for layout in layouts for piece in layout.pieces(layout.parts))
    done = 0
    previous: Weight | None = None
    with concurrent.futures.ThreadPoolExecutor(READERS, "read-weights") as readers:
        for layout in layouts:
            for slab in layout.slabs():
                outs = [_aligned_empty([stop - start for start, stop in bounds], layout.dtype) for bounds in slab]
                jobs = [readers.submit(layout.fill, piece, slab, outs) for piece in layout.pieces(slab)]
                try:
                    for job in concurrent.futures.as_completed(jobs):
                        done += job.result()
                        if on_read is not None:
                            on_read(done, total)
                except BaseException:
                    readers.shutdown(cancel_futures=True)
                    raise
                # Alive are the slab just read and the one before it, until it has arrived; jax's runtime may hold the
                # one before that a little longer.
                jax.block_until_ready(previous)
                previous = layout.put(slab, outs)
                del outs, jobs
            yield layout.finish()


class _Piece(NamedTuple):
    """Rows of a stored tensor that are read together."""

    tensor: Tensor
    stored_name: str
    first_entry: int
    start: int
    stop: int
    bytes: int


class _Layout:
    """Where the parts of one parameter go, and the parameter that they make up."""

    def __init__(
        self, files: SafetensorsFolder, leaf: Leaf, mesh: Mesh | None, quantisation: Quantisation | None = None
    ):
        self._files, self._leaf = files, leaf
        value = leaf.param.get_value()
        self._shape, self.dtype = value.shape, value.dtype
        self._sharding: Sharding | None = None if mesh is None else shardings(leaf.param, mesh).get_value()
        self._devices: dict[_Bounds, list[jax.Device | None]] = {}
        """The devices that need each part; None is the default one."""
        if self._sharding is None:
            self._devices[tuple((0, size) for size in self._shape)] = [None]
        else:
            for device, index in self._sharding.addressable_devices_indices_map(self._shape).items():
                bounds = tuple(part.indices(size)[:2] for part, size in zip(index, self._shape, strict=True))
                self._devices.setdefault(bounds, []).append(device)
        self.parts = list(self._devices)
        self._keep: Callable[[nnx.Variable], Weight] = lambda slab: slab
        """Makes of a slab what is kept of it."""
        if quantisation is not None and leaf.summed_axes:
            self._keep = _rounding(quantisation, leaf.summed_axes, mesh)
        self._weight: Weight | None = None

    def slabs(self) -> Iterator[list[_Bounds]]:
        """The parts, cut into as few equal runs of layers as keep within SLAB_BYTES on this host."""
        if not self._leaf.tensors[0].lead:
            yield self.parts
            return
        layers = self._shape[0]
        entries = sum(math.prod(stop - start for start, stop in bounds) for bounds in self.parts)
        bytes_per_layer = entries * self.dtype.itemsize // layers
        at_once = max(
            n for n in range(1, layers + 1) if layers % n == 0 and (n == 1 or n * bytes_per_layer <= SLAB_BYTES)
        )
        for first in range(0, layers, at_once):
            yield [((first, first + at_once), *bounds[1:]) for bounds in self.parts]

    def pieces(self, parts: Sequence[_Bounds]) -> Iterator[_Piece]:
        """What is read for `parts`."""
        for tensor in self._leaf.tensors:
            rows = [
                rows for bounds in parts if _holds(bounds, tensor) for rows in [_index(self._leaf, tensor, bounds)[0]]
            ]
            if not rows:
                continue
            name, stored_shape = tensor.stored(self._files.shapes)
            before = 0
            if tensor.fused is not None and name == tensor.fused.name:
                before = tensor.lead[-1] * stored_shape[1] + tensor.fused.row
            width = math.prod(tensor.shape[1:])
            row_bytes = width * self._files.itemsize(name)
            step = max(1, PIECE_BYTES // row_bytes)
            for start in range(0, tensor.shape[0], step):
                stop = min(start + step, tensor.shape[0])
                if any(part.start < stop and start < part.stop for part in rows):
                    yield _Piece(tensor, name, (before + start) * width, start, stop, (stop - start) * row_bytes)

    def fill(self, piece: _Piece, parts: Sequence[_Bounds], outs: Sequence[np.ndarray]) -> int:
        """Reads a piece into the parts that hold some of it; returns its bytes."""
        tensor, start, stop = piece.tensor, piece.start, piece.stop
        count = (stop - start) * math.prod(tensor.shape[1:])
        values = self._files.read(piece.stored_name, piece.first_entry, count)
        values = values.reshape(stop - start, *tensor.shape[1:])
        for bounds, out in zip(parts, outs, strict=True):
            if not _holds(bounds, tensor):
                continue
            rows, *columns = _index(self._leaf, tensor, bounds)
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                view = _as_stored(tensor, bounds, out, rows, columns)
                _copy(
                    view[first - rows.start : last - rows.start], values[(slice(first - start, last - start), *columns)]
                )
        return piece.bytes

    def put(self, parts: Sequence[_Bounds], outs: Sequence[np.ndarray]) -> Weight:
        """Sends a slab to the devices; returns the weight as far as it is filled, which may not have arrived yet."""
        placed = [
            jax.device_put(out, device)
            for part, out in zip(self.parts, outs, strict=True)
            for device in self._devices[part]
        ]
        layers = parts[0][0] if self._leaf.tensors[0].lead else None
        shape = self._shape if layers is None else (layers[1] - layers[0], *self._shape[1:])
        slab = placed[0]
        if self._sharding is not None:
            slab = jax.make_array_from_single_device_arrays(shape, self._sharding, placed)
        part = self._keep(self._leaf.param.replace(slab))
        if shape == self._shape:
            self._weight = part
            return part
        assert layers is not None
        first, count = layers[0], self._shape[0]
        if self._weight is None:
            self._weight = jax.tree.map(lambda x: _zeros((count, *x.shape[1:]), x.dtype, x.sharding)(), part)
        self._weight = jax.tree.map(lambda whole, x: _written(x.sharding)(whole, x, first), self._weight, part)
        return self._weight

    def finish(self) -> Weight:
        weight, self._weight = self._weight, None
        assert weight is not None
        return weight


@functools.cache
def _rounding(kind: Quantisation, summed_axes: range, mesh: Mesh | None) -> Callable[[nnx.Variable], Weight]:
    """Makes eight bits of a slab of a parameter, each device of its own part."""

    def rounded(slab: nnx.Variable) -> QuantisedWeight:
        weight = quantise(slab, kind, summed_axes)
        return weight if mesh is None else jax.lax.with_sharding_constraint(weight, shardings(weight, mesh))

    return jax.jit(rounded)


def _holds(bounds: _Bounds, tensor: Tensor) -> bool:
    """Whether a part has anything of the layer and expert that `tensor` is."""
    return all(start <= at < stop for at, (start, stop) in zip(tensor.lead, bounds, strict=False))


def _index(leaf: Leaf, tensor: Tensor, bounds: _Bounds) -> tuple[slice, ...]:
    """What a part of the parameter selects of the tensor in PyTorch's shape, rows first."""
    shape, bounds = leaf.param.get_value().shape[len(tensor.lead) :], bounds[len(tensor.lead) :]
    if tensor.inputs is None:
        return tuple(slice(*bound) for bound in bounds)
    outputs = _flat(shape[tensor.inputs :], bounds[tensor.inputs :])
    return (outputs, _flat(shape[: tensor.inputs], bounds[: tensor.inputs])) if tensor.inputs else (outputs,)


def _flat(shape: tuple[int, ...], bounds: _Bounds) -> slice:
    """One slice of the flattened axes; only the first of them is ever split (heads are, within a head nothing is)."""
    inner = math.prod(shape[1:])
    assert all(bound == (0, size) for bound, size in zip(bounds[1:], shape[1:], strict=True))
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)


def _as_stored(tensor: Tensor, bounds: _Bounds, out: np.ndarray, rows: slice, columns: Sequence[slice]) -> np.ndarray:
    """The tensor's place in a part, as a view in PyTorch's orientation."""
    view = out[tuple(at - start for at, (start, _) in zip(tensor.lead, bounds, strict=False))]
    if tensor.inputs is None:
        return view
    return view.reshape(*(part.stop - part.start for part in columns), rows.stop - rows.start).T


def _copy(target: np.ndarray, values: np.ndarray) -> None:
    """Assigns what was read, converted to the target's dtype and, a few rows at a time, transposed.

    bfloat16 goes as integers, which NumPy copies several times as fast and without holding the interpreter's lock.
    """
    widened = False
    if values.dtype == jnp.bfloat16 and target.dtype in (jnp.bfloat16, np.float32):
        widened = target.dtype == np.float32
        values, target = values.view(np.uint16), target.view(np.uint32 if widened else np.uint16)
    step = _TILE_ROWS if values.ndim > 1 else len(values)
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        if widened:
            np.left_shift(values[rows], 16, out=target[rows], dtype=np.uint32)
        else:
            target[rows] = values[rows]


def _aligned_empty(shape: list[int], dtype: DTypeLike) -> np.ndarray:
    """Memory that begins at a multiple of 64 bytes, which the CPU backend takes over instead of copying."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _written(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Writes a slab into its layers of the whole, in place: layers are never split, so nothing is communicated."""

    def write(whole: jax.Array, slab: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, slab, first, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
