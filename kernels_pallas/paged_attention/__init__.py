"""Attention of new tokens over keys and values in pages."""

from kernels_pallas.paged_attention.api import paged_attention

__all__ = ["paged_attention"]
