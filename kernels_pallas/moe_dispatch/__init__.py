"""Routing to experts and the experts' feed-forward, without dropping a token."""

from kernels_pallas.moe_dispatch.api import expert_ffn, route

__all__ = ["expert_ffn", "route"]
