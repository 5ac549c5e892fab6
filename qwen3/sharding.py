"""Which mesh axis holds which logical axis of a weight: one table for teacher and student, dense and MoE."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from qwen3.errors import UserError

Tree = TypeVar("Tree")
MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

RULES: Mapping[str, str | None] = MappingProxyType(
    {
        "layers": None,
        "vocab": "tensor",
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "head_dim": None,
        "mlp": "tensor",
        "experts": "expert",
        "expert_mlp": "tensor",
        "router": None,
        "rank": None,
        "norm": None,
    }
)
BATCH = PartitionSpec(("data", "fsdp", "expert"))
"""Rows of a batch are spread over every axis along which the computation is data-parallel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each axis of the mesh; the sizes multiply to the number of devices."""

    data: int = -1
    """Devices that share the rows of a batch; -1 takes what the others leave."""
    fsdp: int = 1
    """Devices that share rows, and each weight by its rows."""
    expert: int = 1
    """Devices that share rows, and the experts of a layer."""
    tensor: int = 1
    """Devices that share heads, feed-forward columns and the vocabulary."""
    context: int = 1
    """Devices that would share a sequence; 1."""

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if size < 1 and not (axis == "data" and size == -1):
                raise UserError(f"mesh.{axis} is {size}; it must be at least 1" + (" or -1" if axis == "data" else ""))
        if self.context != 1:
            raise UserError(f"mesh.context is {self.context}; sequences are not split over devices, set it to 1")


def make_mesh(shape: MeshShape, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, all by default. Raises UserError where the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(shape)
    others = int(np.prod([sizes[axis] for axis in MESH_AXES[1:]]))
    if shape.data == -1:
        sizes["data"] = max(1, len(devices) // others)
    if sizes["data"] * others != len(devices):
        text = " × ".join(f"{axis} {sizes[axis]}" for axis in MESH_AXES)
        raise UserError(
            f"mesh {text} = {sizes['data'] * others} devices, but there are {len(devices)}; choose sizes whose product "
            f"is {len(devices)}, or let mesh.data be -1, which takes what the others leave"
        )
    grid = np.asarray(devices).reshape([sizes[axis] for axis in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Look every logical axis up in the table; mesh axes of size 1 are left out.

    Raises UserError where two axes of one weight claim the same mesh axis or a size does not divide.
    """
    names: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        name = None if axis is None else RULES[axis]
        if name is None or mesh.shape[name] == 1:
            names.append(None)
            continue
        if name in names:
            raise UserError(f"axes {axes} put two dimensions of one weight on mesh axis {name!r}")
        if size % mesh.shape[name]:
            raise UserError(
                f"{axis} has {size} entries, which mesh.{name} = {mesh.shape[name]} does not divide; "
                f"choose a divisor of {size}"
            )
        names.append(name)
    return PartitionSpec(*names)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf: parameters (and whatever mirrors them, such as Adam's moments) by their
    logical axes, a leading stacked axis included; anything else replicated. `tree` may be abstract."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Param):
            return NamedSharding(mesh, PartitionSpec())
        axes, shape = leaf.get_metadata()["axes"], leaf.get_value().shape
        stacked = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
        return leaf.replace(NamedSharding(mesh, partition_spec(stacked, shape, mesh)))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def make_placed(make: Callable[[Array], Tree], key: Array, mesh: Mesh | None) -> Tree:
    """What `make` draws from `key`, every part made where the table puts it; on the default device without a mesh."""
    if mesh is None:
        return jax.jit(make)(key)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key), mesh))(key)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data-parallel axes."""
    return NamedSharding(mesh, BATCH)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Every leaf on `sharding`. Where several processes share the mesh, each gives the same host arrays and puts its
    own parts on its own devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def fetch(tree: Any) -> Any:
    """Every leaf as a NumPy array, whole in every process; parts that lie on other hosts pass through the devices."""

    def get(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return leaf

    return jax.device_get(jax.tree.map(get, tree))


def row_shares(mesh: Mesh | None) -> int:
    """Equal parts into which the data-parallel devices split rows."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH[0])


def check_rows(field: str, rows: int, mesh: Mesh) -> None:
    """Refuses a number of rows that the data-parallel devices cannot share equally, naming `field`."""
    shares = row_shares(mesh)
    if rows % shares:
        raise UserError(f"{field} is {rows}, but rows are spread over {shares} devices; use a multiple of {shares}")
