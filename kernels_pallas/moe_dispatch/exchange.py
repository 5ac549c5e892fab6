"""Experts spread over a mesh: tokens go to their experts and come back, none dropped.

Every device holds some tokens, some experts whole or a slice of their inner columns, and sorts only what it holds.
"all_gather" shows every token to every device of the expert axis, each adds up what its own experts say, and a
reduce-scatter brings the sums home; it is what every platform can run. "ragged" sends a token once for each of its X
experts and back, where the other form moves it to and from every device of the axis, on platforms that have
`jax.lax.ragged_all_to_all`.

A device adds up in float32 and sends its sums in the dtype of x. bfloat16 is half the bytes, and moves targets about as
far from float32's as one device's computing in bfloat16 does.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.api import Implementation
from kernels_pallas.moe_dispatch import experts
from kernels_pallas.moe_dispatch.api import check
from kernels_pallas.moe_dispatch.chunks import chunk_count, in_chunks
from kernels_pallas.moe_dispatch.permute import combine, permute, placement
from kernels_pallas.platforms import platform

Exchange = Literal["all_gather", "ragged"]
ROWS_AT_ONCE = 65_536
_V5E, _V5E_CHIPS = "TPU v5 lite", 16


def expert_ffn_on_mesh(
    x: Float[Array, "M D"],
    weights: Float[Array, "M X"],
    expert_ids: Int[Array, "M X"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    mesh: Mesh,
    token_axes: tuple[str, ...],
    expert_axis: str | tuple[str, ...],
    inner_axis: str,
    exchange: Exchange = "all_gather",
    receive_rows: int | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
    implementation: Implementation | None = None,
) -> Float[Array, "M D"]:
    """`expert_ffn` on a mesh: equal to it but for the order of sums, and their rounding to the dtype of x on the way.

    Args:
      mesh: x, weights and expert_ids are split by rows over `token_axes`, `expert_axis` among them; experts over
        `expert_axis`, which may be several axes taken as one, their inner columns F over `inner_axis`. The sizes must
        divide.
      exchange: how tokens reach their experts, see above.
      receive_rows: for "ragged", the rows that a device can receive. None makes room for the worst case, every token
        of the axis with as many experts here as can be. Where a smaller one would overflow on any device, nothing is
        sent and the result is NaN on all of them.
      rows_at_once: bounds memory: each device exchanges so few of its tokens at a time that the devices along the axis
        have at most so many rows, X a token, between them; the backward pass computes them again. Fewer rows are
        slower: a chunk reads all experts.
      Others as in `expert_ffn`.

    Raises ValueError as `expert_ffn` does, and for sizes that the mesh does not divide, token axes without the expert
    axis, an exchange that `check_exchange` refuses, or receive_rows that does not apply.
    """
    check(x, weights, expert_ids, gate, up, down)
    expert_axes = (expert_axis,) if isinstance(expert_axis, str) else expert_axis
    shards = math.prod(mesh.shape[axis] for axis in expert_axes)
    if absent := [axis for axis in expert_axes if axis not in token_axes]:
        raise ValueError(f"token_axes {token_axes} must contain the expert axis {absent[0]!r}")
    parts = {"x": functools.reduce(lambda size, axis: size * mesh.shape[axis], token_axes, 1), "gate": shards}
    for name, array in (("x", x), ("gate", gate)):
        if array.shape[0] % parts[name]:
            raise ValueError(f"{name} is {array.shape}; the mesh splits its {array.shape[0]} rows in {parts[name]}")
    if gate.shape[2] % mesh.shape[inner_axis]:
        raise ValueError(f"gate is {gate.shape}; the mesh splits its columns in {mesh.shape[inner_axis]}")
    if receive_rows is not None and (exchange != "ragged" or receive_rows < 1):
        raise ValueError(f"receive_rows {receive_rows} with exchange {exchange!r}: it is for 'ragged', and at least 1")
    check_exchange(exchange, mesh)
    on_shard: Callable[..., Array] = _all_gather
    if exchange == "ragged":
        on_shard = functools.partial(_ragged, receive_rows=receive_rows)

    def run(*operands: Array) -> Array:
        exchanged = functools.partial(on_shard, axis=expert_axes, implementation=implementation)
        count = chunk_count(operands[0].shape[0], rows_at_once // (shards * expert_ids.shape[1]))
        summed = in_chunks(exchanged, count, *operands) if count > 1 else exchanged(*operands)
        return jax.lax.psum(summed, inner_axis)

    tokens = PartitionSpec(token_axes)
    columns, rows = PartitionSpec(expert_axis, None, inner_axis), PartitionSpec(expert_axis, inner_axis)
    # Varying axes are not tracked: sorts and kernels inside lose them, and a lost one is a lost sum of gradients.
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, columns, columns, rows),
        out_specs=tokens,
        check_vma=False,
    )(x, weights, expert_ids, gate, up, down)


def check_exchange(exchange: Exchange, mesh: Mesh) -> None:
    """Raises ValueError for an exchange that is unknown, or that the platform of the mesh does not have."""
    if exchange not in get_args(Exchange):
        raise ValueError(f"exchange {exchange!r} is unknown; use 'all_gather' or 'ragged'")
    if exchange == "ragged" and platform() == "cpu":
        raise ValueError("exchange 'ragged' does not run on cpu; use 'all_gather'")
    # libtpu 0.0.42 from v5e:4x8 on: not supported "in limited ICI routing settings".
    chips = max(mesh.size, jax.device_count())
    if exchange == "ragged" and mesh.devices.flat[0].device_kind == _V5E and chips > _V5E_CHIPS:
        raise ValueError(
            f"exchange 'ragged' runs on at most {_V5E_CHIPS} chips of TPU v5e, these are {chips}; use 'all_gather'"
        )


def _all_gather(
    x: Array,
    weights: Array,
    expert_ids: Array,
    gate: Array,
    up: Array,
    down: Array,
    *,
    axis: tuple[str, ...],
    implementation: Implementation | None,
) -> Float[Array, "M D"]:
    first = jax.lax.axis_index(axis) * gate.shape[0]
    x, weights, expert_ids = (jax.lax.all_gather(array, axis, tiled=True) for array in (x, weights, expert_ids))
    out = experts.expert_ffn(x, weights, expert_ids - first, gate, up, down, implementation)
    return jax.lax.psum_scatter(out.astype(x.dtype), axis, scatter_dimension=0, tiled=True)


def _ragged(
    x: Array,
    weights: Array,
    expert_ids: Array,
    gate: Array,
    up: Array,
    down: Array,
    *,
    axis: tuple[str, ...],
    receive_rows: int | None,
    implementation: Implementation | None,
) -> Float[Array, "M D"]:
    shards, here, own = jax.lax.axis_size(axis), jax.lax.axis_index(axis), gate.shape[0]
    tokens, per_token = expert_ids.shape
    if receive_rows is None:
        receive_rows = shards * tokens * min(per_token, own)
    # Sorted by expert is sorted by device. sent[i, j, e]: rows from device i for expert e of device j.
    where = placement(expert_ids, shards * own, alignment=1)
    sent = jax.lax.all_gather(where.group_sizes.reshape(shards, own), axis)
    overflow = jnp.any(jnp.sum(sent, axis=(0, 2)) > receive_rows)
    sent = jnp.where(overflow, 0, sent)
    blocks = jnp.sum(sent, axis=2)
    begin_at_sender = jnp.cumsum(blocks, axis=1) - blocks
    begin_at_receiver = jnp.cumsum(blocks, axis=0) - blocks

    received = jax.lax.ragged_all_to_all(
        permute(x, where),
        jnp.zeros((receive_rows, x.shape[1]), x.dtype),
        begin_at_sender[here],
        blocks[here],
        begin_at_receiver[here],
        blocks[:, here],
        axis_name=axis,
    )
    # What comes from one device is sorted by expert.
    ends = jnp.cumsum(sent[:, here].reshape(-1))
    run = jnp.searchsorted(ends, jnp.arange(receive_rows), side="right")
    expert = jnp.where(run < len(ends), run % own, own)[:, None]
    out = experts.expert_ffn(received, jnp.ones((receive_rows, 1)), expert, gate, up, down, implementation)
    returned = jax.lax.ragged_all_to_all(
        out.astype(x.dtype),
        jnp.zeros((tokens * per_token, x.shape[1]), x.dtype),
        begin_at_receiver[:, here],
        blocks[:, here],
        begin_at_sender[:, here],
        blocks[here],
        axis_name=axis,
    )
    return jnp.where(overflow, jnp.nan, combine(returned, weights, where)).astype(x.dtype)
