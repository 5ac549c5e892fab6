"""Analytic FLOPs of the model: what stages cost, independent of how fast this machine is today.

A multiply-add counts as two. Embedding look-ups, norms and the softmax are left out, recomputation is not counted,
and a backward pass costs twice its forward pass.
"""

import dataclasses
from collections.abc import Iterable

from qwen3.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass: a constant per token, and one that grows with the tokens attended to."""

    per_token: float
    """Projections, feed-forward (active experts and router) and the head."""
    per_attended_token: float
    """Scores and weighted values: per pair of a query and a key that it sees."""

    def of(self, lengths: Iterable[int]) -> float:
        """One pass over causal documents of these lengths; decoding them token by token costs the same."""
        return sum(self.per_token * n + self.per_attended_token * n * (n + 1) / 2 for n in lengths)


def forward_flops(config: ModelConfig) -> ForwardFlops:
    width, heads, kv, size = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    attention = 2 * width * size * (2 * heads + 2 * kv)
    feed_forward = 0
    for moe, count in config.layer_runs():
        if moe:
            expert = 3 * config.num_experts_per_tok * config.moe_intermediate_size
            feed_forward += count * 2 * width * (expert + config.num_experts)
        else:
            feed_forward += count * 2 * width * 3 * config.intermediate_size
    return ForwardFlops(
        per_token=config.num_hidden_layers * attention + feed_forward + 2 * width * config.vocab_size,
        per_attended_token=config.num_hidden_layers * 4 * heads * size,
    )


BACKWARD = 2
"""Cost of a backward pass in forward passes."""
