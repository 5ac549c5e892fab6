"""Causal grouped-query attention over packed rows."""

from kernels_pallas.attention.api import attention, attention_part, merge_parts
from kernels_pallas.attention.dual_chunk import (
    DualChunkPositions,
    DualChunkQueries,
    attention_of,
    dual_chunk_attention,
    dual_chunk_positions,
)
from kernels_pallas.attention.on_mesh import attention_on_mesh

__all__ = [
    "DualChunkPositions",
    "DualChunkQueries",
    "attention",
    "attention_of",
    "attention_on_mesh",
    "attention_part",
    "dual_chunk_attention",
    "dual_chunk_positions",
    "merge_parts",
]
