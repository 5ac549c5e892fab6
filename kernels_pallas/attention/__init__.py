"""Causal grouped-query attention over packed rows."""

from kernels_pallas.attention.api import attention

__all__ = ["attention"]
