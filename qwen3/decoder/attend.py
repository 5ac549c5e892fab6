"""Attention of packed rows wherever they lie: on a mesh every device attends its own rows and heads.

A kernel is a program of one device, which XLA cannot divide. All implementations are divided in the same way, so that
what is tested of one on a mesh holds for the others.
"""

from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import DualChunkQueries, attention_of, attention_on_mesh
from kernels_pallas.attention.api import Implementation
from qwen3.sharding import BATCH


def attend(
    q: Float[Array, "B T N H"] | DualChunkQueries,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    mesh: Mesh | None,
    implementation: Implementation | None,
    pieces: bool = False,
) -> Float[Array, "B T N H"]:
    """The attention of these queries on a mesh, whose sizes must divide rows and heads; equal to it on one device.

    Rows are whole sequences spread over BATCH, or with `pieces` what `qwen3.sharding.to_pieces` makes of them with its
    `zigzag`.
    """
    if mesh is None or mesh.size == 1:
        return attention_of(q)(q, k, v, segment_ids, implementation=implementation)
    return attention_on_mesh(
        q,
        k,
        v,
        segment_ids,
        mesh=mesh,
        row_axes=BATCH[0],
        head_axis="tensor",
        context_axis="context" if pieces else None,
        implementation=implementation,
    )
