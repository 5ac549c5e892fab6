"""Routing to experts and the experts' feed-forward, without dropping a token, on one device or across a mesh."""

from kernels_pallas.moe_dispatch.api import expert_ffn, route
from kernels_pallas.moe_dispatch.exchange import Exchange, check_exchange, expert_ffn_on_mesh

__all__ = ["Exchange", "check_exchange", "expert_ffn", "expert_ffn_on_mesh", "route"]
