"""Causal grouped-query attention over packed rows."""

from kernels_pallas.attention.api import attention, attention_part, merge_parts

__all__ = ["attention", "attention_part", "merge_parts"]
