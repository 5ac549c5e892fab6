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
from kernels_pallas.attention.pairs import attended_pairs, backward_products
from kernels_pallas.attention.prefix import attention_behind_prefix
from kernels_pallas.attention.zigzag import from_zigzag, to_zigzag

__all__ = [
    "DualChunkPositions",
    "DualChunkQueries",
    "attended_pairs",
    "attention",
    "attention_behind_prefix",
    "attention_of",
    "attention_on_mesh",
    "attention_part",
    "backward_products",
    "dual_chunk_attention",
    "dual_chunk_positions",
    "from_zigzag",
    "merge_parts",
    "to_zigzag",
]
