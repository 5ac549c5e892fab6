"""Divergence between a teacher and a student straight from hidden states and heads; the logits never exist whole."""

from kernels_pallas.linear_kl.api import Implementation, linear_kl_at_ids, linear_kl_full, split_at_ids
from kernels_pallas.linear_kl.divergence import Divergence, DivergenceName

__all__ = ["Divergence", "DivergenceName", "Implementation", "linear_kl_at_ids", "linear_kl_full", "split_at_ids"]
