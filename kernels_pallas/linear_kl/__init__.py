"""Divergence between a teacher and a student straight from hidden states and heads, and the log-probability and entropy
of one of them; the logits never exist whole."""

from kernels_pallas.linear_kl.api import (
    Implementation,
    LogprobsImplementation,
    linear_kl_at_ids,
    linear_kl_full,
    linear_logprobs,
    split_at_ids,
)
from kernels_pallas.linear_kl.divergence import Divergence, DivergenceName

__all__ = [
    "Divergence",
    "DivergenceName",
    "Implementation",
    "LogprobsImplementation",
    "linear_kl_at_ids",
    "linear_kl_full",
    "linear_logprobs",
    "split_at_ids",
]
