"""Attention of packed rows wherever they lie: on a mesh every device attends its own rows and heads.

A kernel is a program of one device, which XLA cannot divide. All implementations are divided in the same way, so that
what is tested of one on a mesh holds for the others.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import attention
from kernels_pallas.attention.api import Implementation
from qwen3.sharding import BATCH

HEADS = PartitionSpec(*BATCH, None, "tensor")
"""Of [B, T, heads, H]: rows as everywhere, heads as the weights that make them."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    mesh: Mesh | None,
    implementation: Implementation | None,
) -> Float[Array, "B T N H"]:
    """`kernels_pallas.attention` on a mesh, whose sizes must divide rows and heads; equal to it on one device."""
    run: Callable[..., Array] = functools.partial(attention, implementation=implementation)
    if mesh is not None and mesh.size > 1:
        # Varying axes are not tracked: kernels inside lose them. All operands that have gradients are divided alike.
        run = jax.shard_map(run, mesh=mesh, in_specs=(HEADS, HEADS, HEADS, BATCH), out_specs=HEADS, check_vma=False)
    return run(q, k, v, segment_ids)
