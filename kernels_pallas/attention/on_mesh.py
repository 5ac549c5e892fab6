"""Attention spread over a mesh: every device has some rows and heads, and of each row all tokens or a piece.

Where devices share a row, each keeps its queries and gathers the keys and values of the whole row, as Llama 3 does
(arXiv 2407.21783, section 3.3.2): grouped queries make them few, and what is gathered lives as long as one layer. A
ring would hold only two pieces at a time, at the price of as many exchanges and merges as there are pieces. A piece is
what `zigzag` makes of rows, so that kernels, which skip what is hidden, have the same work on all devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.attention.api import ATTENDED, Implementation
from kernels_pallas.attention.dual_chunk import DualChunkQueries, attention_of
from kernels_pallas.attention.zigzag import in_row_order, zigzag_index


def attention_on_mesh(
    q: Float[Array, "B T N H"] | DualChunkQueries,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    mesh: Mesh,
    row_axes: tuple[str, ...],
    head_axis: str,
    context_axis: str | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """The attention of these queries, each device at its own.

    Args:
      mesh: B is split over `row_axes`, heads N and K over `head_axis`. The sizes must divide.
      context_axis: None where every row is whole. Else one of `row_axes`, whose devices have the same rows, each the
        piece that `zigzag` gives it.
      Others as in `attention`.

    Raises ValueError as `attention` does, and for sizes that the mesh does not divide.
    """
    rows = functools.reduce(lambda size, axis: size * mesh.shape[axis], row_axes, 1)
    if k.shape[0] % rows:
        raise ValueError(f"k is {k.shape}; the mesh splits its {k.shape[0]} rows in {rows}")
    if k.shape[2] % mesh.shape[head_axis]:
        raise ValueError(f"k is {k.shape}; the mesh splits its {k.shape[2]} heads in {mesh.shape[head_axis]}")

    operation = functools.partial(attention_of(q), implementation=implementation)
    whole_rows = context_axis is None or mesh.shape[context_axis] == 1

    # What is gathered is gathered again for the backward pass: kept, it would take as much memory as without splitting.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(ATTENDED))
    def pieces(q: Array | DualChunkQueries, k: Array, v: Array, segment_ids: Array) -> Array:
        def whole(x: Array) -> Array:
            return in_row_order(jax.lax.all_gather(x, context_axis, axis=1, tiled=True), devices)

        devices = jax.lax.axis_size(context_axis)
        index = zigzag_index(k.shape[1], jax.lax.axis_index(context_axis), devices)
        return operation(
            q,
            whole(k),
            whole(v),
            whole(segment_ids),
            query_index=jnp.broadcast_to(index, segment_ids.shape),
        )

    split, tokens = PartitionSpec(row_axes, None, head_axis), PartitionSpec(row_axes)
    # Varying axes are not tracked: kernels inside lose them, and a lost one is a lost sum of gradients.
    return jax.shard_map(
        operation if whole_rows else pieces,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda x: split if x.ndim == 4 else tokens, q), split, split, tokens),
        out_specs=split,
        check_vma=False,
    )(q, k, v, segment_ids)
