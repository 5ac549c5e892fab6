"""Arrays from the devices of one mesh to those of another, while both go on with what they do.

`jax.device_put` does that only where both meshes cut an array alike; else it waits for the array and takes it through
the host's memory, and between meshes that several processes share it refuses. Here the rows that a device of the other
mesh wants are put together on one of the first mesh, in the same process, and sent from there: nobody waits, and no
process hears of it. Nothing is computed on the devices that receive: a device takes its programs one after the other,
and one that waits for rows which are still to come would hold up those behind it.
"""

import collections
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from qwen3.sharding import TOKENS, batch_shares, laid_out


def moved(tree: PyTree, onto: NamedSharding) -> Any:
    """Every leaf [B, …], which lies on some other mesh, on `onto`.

    Each process needs devices of both meshes. Rows that its devices of the first mesh do not hold are gathered there
    before: each of them then holds the whole leaf for a moment.
    """
    return jax.tree.map(lambda leaf: _moved(leaf, onto), tree)


def _moved(x: jax.Array, onto: NamedSharding) -> jax.Array:
    x = _by_rows(x, onto)
    holders: Mapping[tuple[int, int], list[jax.Array]] = collections.defaultdict(list)
    for shard in x.addressable_shards:
        holders[_bounds(shard.index[0], x.shape[0])].append(shard.data)
    parts = []
    for number, (device, index) in enumerate(onto.addressable_devices_indices_map(x.shape).items()):
        assert index is not None
        start, stop = _bounds(index[0], x.shape[0])
        pieces: list[jax.Array] = []
        for (first, last), replicas in sorted(holders.items()):
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                # Those who want the same rows ask different devices for them.
                piece = _cut(replicas[number % len(replicas)], 0, begin - first, end - begin)
                for axis, part in enumerate(index[1:], start=1):
                    left, right = _bounds(part, x.shape[axis])
                    piece = _cut(piece, axis, left, right - left)
                pieces.append(piece if not pieces else jax.device_put(piece, pieces[0].sharding))
        parts.append(jax.device_put(pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces), device))
    return jax.make_array_from_single_device_arrays(x.shape, onto, parts)


def _by_rows(x: jax.Array, onto: NamedSharding) -> jax.Array:
    """`x` on its own mesh, split by rows alone, or whole on every device where some process would lack rows."""
    assert isinstance(x.sharding, NamedSharding)
    mesh = x.sharding.mesh
    assert isinstance(mesh, Mesh)
    by_rows, whole = NamedSharding(mesh, PartitionSpec(TOKENS[0])), NamedSharding(mesh, PartitionSpec())
    splits = x.shape[0] % batch_shares(mesh) == 0 and _each_process_has_its_rows(by_rows, onto, x.shape)
    wanted = by_rows if splits else whole
    return x if x.sharding.is_equivalent_to(wanted, x.ndim) else laid_out(wanted)(x)


@functools.cache
def _each_process_has_its_rows(source: NamedSharding, onto: NamedSharding, shape: tuple[int, ...]) -> bool:
    def rows_by_process(sharding: NamedSharding) -> Mapping[int, set[int]]:
        rows: dict[int, set[int]] = collections.defaultdict(set)
        places: Mapping[Any, Any] = sharding.devices_indices_map(shape)
        for device, index in places.items():
            rows[device.process_index].update(range(*_bounds(index[0], shape[0])))
        return rows

    held, needed = rows_by_process(source), rows_by_process(onto)
    return all(needed[process] <= held[process] for process in needed)


def _cut(x: jax.Array, axis: int, start: int, size: int) -> jax.Array:
    return x if size == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _bounds(part: slice, size: int) -> tuple[int, int]:
    start, stop, _ = part.indices(size)
    return start, stop
