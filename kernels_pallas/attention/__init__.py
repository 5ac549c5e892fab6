"""Causal grouped-query attention over packed rows."""

from kernels_pallas.attention.api import attention, attention_part, merge_parts
from kernels_pallas.attention.dual_chunk import DualChunkPositions, dual_chunk_attention, dual_chunk_positions

__all__ = [
    "DualChunkPositions",
    "attention",
    "attention_part",
    "dual_chunk_attention",
    "dual_chunk_positions",
    "merge_parts",
]
