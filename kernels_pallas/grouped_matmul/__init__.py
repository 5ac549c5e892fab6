"""Products of rows sorted into groups with one matrix for each group, and the fused SwiGLU form."""

from kernels_pallas.grouped_matmul.api import grouped_matmul, grouped_swiglu, preferred_alignment

__all__ = ["grouped_matmul", "grouped_swiglu", "preferred_alignment"]
