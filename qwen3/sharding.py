"""Which mesh axes hold which logical axis of a weight: one table for teacher and student, dense and MoE."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from kernels_pallas.attention import from_zigzag, to_zigzag
from qwen3.errors import UserError
from qwen3.field_types import MOST, Bounds, Count, check_fields

Tree = TypeVar("Tree")
MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = MappingProxyType(
    {
        "layers": (),
        "vocab": ("tensor",),
        # Devices that share rows share the weights, too: where they are needed, they are gathered.
        "embed": ("fsdp", "expert", "context"),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "mlp": ("tensor",),
        # Gathered over context as whole experts: XLA would transpose all layers at once to gather rows of them.
        "experts": ("expert", "context"),
        "expert_embed": ("fsdp",),
        "expert_mlp": ("tensor",),
        "router": (),
        "rank": (),
        "norm": (),
    }
)
WHOLE_ROWS = MappingProxyType({**RULES, "embed": (), "expert_embed": ()})
"""Where the weights lie for many steps of few tokens each, before each of which their rows would be gathered."""
BATCH = PartitionSpec(("data", "fsdp", "expert", "context"))
"""Rows are spread over every axis along which the computation is data-parallel: whole sequences while sampling, which
has none to split, and the pieces of `to_pieces`."""
TOKENS = PartitionSpec(("data", "fsdp", "expert"), "context")
"""[B, T, ...] for training and scoring: rows as above, and each row's tokens over the context axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each axis of the mesh; the sizes multiply to the number of devices."""

    data: Annotated[int, Bounds(-1, MOST, "be at least 1 or -1")] = -1
    """Devices that share the rows of a batch; -1 takes what the others leave."""
    fsdp: Count = 1
    """Devices that share rows, and each weight by its rows."""
    expert: Count = 1
    """Devices that share rows, the experts of a layer, and every other weight by its rows."""
    tensor: Count = 1
    """Devices that share heads, feed-forward columns and the vocabulary."""
    context: Count = 1
    """Devices that share the tokens of each row where it is trained or scored, and rows where they are sampled; and
    each weight by its rows."""

    def __post_init__(self) -> None:
        check_fields(self, "mesh")
        if self.data == 0:
            raise UserError("mesh.data is 0; it must be at least 1 or -1")


def make_mesh(shape: MeshShape, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, all by default. Raises UserError where the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(shape)
    others = math.prod(sizes[axis] for axis in MESH_AXES[1:])
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


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES
) -> PartitionSpec:
    """Look every logical axis up in the table; mesh axes of size 1 are left out.

    Raises UserError where two axes of one weight claim the same mesh axis or a size does not divide.
    """
    parts: list[tuple[str, ...]] = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in (() if axis is None else rules[axis]) if mesh.shape[name] > 1)
        for name in names:
            if any(name in part for part in parts):
                raise UserError(f"axes {axes} put two dimensions of one weight on mesh axis {name!r}")
        count = math.prod(mesh.shape[name] for name in names)
        if size % count:
            product = " × ".join(f"mesh.{name}" for name in names)
            raise UserError(
                f"{axis} has {size} entries, which {product} = {count} does not divide; choose a divisor of {size}"
            )
        parts.append(names)
    return PartitionSpec(*((part[0] if len(part) == 1 else part) or None for part in parts))


def shardings(tree: PyTree, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The NamedSharding of every leaf: parameters (and whatever mirrors them, such as Adam's moments) by their
    logical axes, a leading stacked axis included; anything else replicated. `tree` may be abstract."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Param):
            return NamedSharding(mesh, PartitionSpec())
        axes, shape = leaf.get_metadata()["axes"], leaf.get_value().shape
        stacked = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
        return leaf.replace(NamedSharding(mesh, partition_spec(stacked, shape, mesh, rules)))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def make_placed(make: Callable[[Array], Tree], key: Array, mesh: Mesh | None) -> Tree:
    """What `make` draws from `key`, every part made where the table puts it; on the default device without a mesh."""
    return placing(make, mesh)(key)


def placing(make: Callable[[Array], Tree], mesh: Mesh | None) -> Callable[[Array], Tree]:
    """The program that `make_placed` runs once."""
    if mesh is None:
        return jax.jit(make)
    key = jax.eval_shape(jax.random.key, 0)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key), mesh))


def placed_shapes(tree: Tree, mesh: Mesh) -> Tree:
    """Shapes and dtypes of `tree`, which may be abstract, where the table puts them: what programs are compiled for."""
    return jax.tree.map(_placed_shape, tree, shardings(tree, mesh))


def row_shapes(tree: Tree, mesh: Mesh | None, spec: PartitionSpec = BATCH) -> Tree:
    """Shapes and dtypes of `tree`, all leaves spread as `spec` says; without a mesh, on whatever device it is."""
    place = None if mesh is None else NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: _placed_shape(leaf, place), tree)


def _placed_shape(leaf: Any, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of [B, T, ...]: rows over the data-parallel axes, tokens over the context axis."""
    return NamedSharding(mesh, TOKENS)


def to_pieces(tree: Tree, mesh: Mesh | None, *, zigzag: bool = False) -> Tree:
    """Arrays [B, T, ...] on `batch_sharding` with each device's piece of a row as a row of its own, [B·c, T/c, ...] on
    BATCH for c devices along the context axis. Where c is 1 nothing changes.

    Whatever treats tokens alike does so on pieces as on rows, in blocks along T that no device has to wait for. Pieces
    are consecutive and nothing moves; with `zigzag` they are those that attention wants.
    Raises ValueError where B or T does not divide.
    """
    if mesh is None or mesh.shape["context"] == 1:
        return tree
    for leaf in jax.tree.leaves(tree):
        shares = batch_shares(mesh), mesh.shape["context"]
        if leaf.shape[0] % shares[0] or leaf.shape[1] % shares[1]:
            raise ValueError(f"an array is {leaf.shape}; the mesh splits its rows in {shares[0]}, each in {shares[1]}")
    return _on_context(to_zigzag if zigzag else None, tree, mesh, TOKENS, BATCH)


def to_rows(tree: Tree, mesh: Mesh | None, *, zigzag: bool = False) -> Tree:
    """The rows whose pieces `to_pieces` has made."""
    if mesh is None or mesh.shape["context"] == 1:
        return tree
    return _on_context(from_zigzag if zigzag else None, tree, mesh, BATCH, TOKENS)


def _on_context(
    move: Callable[[Array, str], Array] | None, tree: Tree, mesh: Mesh, before: PartitionSpec, after: PartitionSpec
) -> Tree:
    def local(tree: Tree) -> Tree:
        return tree if move is None else jax.tree.map(lambda leaf: move(leaf, "context"), tree)

    return jax.shard_map(local, mesh=mesh, in_specs=before, out_specs=after)(tree)


def at_places(array: Float[Array, "B T D"], places: Int[Array, "B K"], mesh: Mesh | None) -> Float[Array, "B K D"]:
    """What an array on `batch_sharding` has at some places of each row, laid out likewise; zeros where a place is T.

    Devices that share a row each take what their piece of it has, and hand it to the one that is to have it. Raises
    ValueError where they do not divide K.
    """
    pieces = 1 if mesh is None else mesh.shape["context"]
    if places.shape[1] % pieces:
        raise ValueError(f"places are {places.shape}; the mesh splits each row's in {pieces}")

    def local(piece: Array, places: Array) -> Array:
        own = places
        if pieces > 1:
            own = places - jax.lax.axis_index("context") * piece.shape[1]
        # What is before the piece would count from its end.
        own = jnp.where(own < 0, piece.shape[1], own)
        found = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(piece, own)
        if pieces == 1:
            return found
        return jax.lax.psum_scatter(found, "context", scatter_dimension=1, tiled=True)

    if mesh is None or mesh.size == 1:
        return local(array, places)
    return jax.shard_map(local, mesh=mesh, in_specs=(TOKENS, PartitionSpec(TOKENS[0])), out_specs=TOKENS)(array, places)


def place(tree: PyTree, sharding: NamedSharding) -> Any:
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


def everywhere(tree: Tree) -> Tree:
    """Every leaf such that this process has all of it: where parts lie on devices of others, on every device. The
    devices need not have finished when this returns, and must do the same in every process."""

    def spread(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        assert isinstance(leaf.sharding, NamedSharding)
        return laid_out(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)

    return jax.tree.map(spread, tree)


def fetch(tree: PyTree) -> Any:
    """Every leaf as a NumPy array, whole in every process; parts that lie on other hosts pass through the devices."""
    return jax.device_get(everywhere(tree))


@functools.cache
def laid_out(sharding: NamedSharding) -> Callable[[Array], Array]:
    """The program that lays an array out anew over the devices that it is on."""
    return jax.jit(lambda x: x, out_shardings=sharding)


def bytes_on_device(arrays: PyTree) -> int:
    """What a device holds of arrays, which may be abstract."""
    held = 0
    for leaf in jax.tree.leaves(arrays):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        held += math.prod(shape) * leaf.dtype.itemsize
    return held


def row_shares(mesh: Mesh | None) -> int:
    """Equal parts into which the devices split rows of whole sequences, as sampling has them."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH[0])


def batch_shares(mesh: Mesh) -> int:
    """Equal parts into which the devices split the rows of a batch, whose tokens the context axis splits."""
    return math.prod(mesh.shape[axis] for axis in TOKENS[0])


def check_rows(field: str, rows: int, mesh: Mesh) -> None:
    """Refuses a number of sequences that the devices cannot share equally, naming `field`."""
    _check_multiple(field, rows, "rows are spread", row_shares(mesh))


def check_batch(field: str, rows: int, row_length: int, mesh: Mesh) -> None:
    """Refuses batches that the devices cannot share equally, naming `field`.rows or `field`.row_length."""
    _check_multiple(f"{field}.rows", rows, "rows are spread", batch_shares(mesh))
    _check_multiple(f"{field}.row_length", row_length, "each row's tokens are spread", mesh.shape["context"])


def _check_multiple(field: str, size: int, what: str, shares: int) -> None:
    if size % shares:
        raise UserError(f"{field} is {size}, but {what} over {shares} devices; use a multiple of {shares}")
