"""Analytic FLOPs of the model: what stages cost, independent of how fast this machine is today.

A multiply-add counts as two. Embedding look-ups, norms and the softmax are left out, recomputation is not counted.
"""

import dataclasses
from collections.abc import Iterable

from qwen3.decoder.config import ModelConfig
from qwen3.decoder.moe import balances_load


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of going over tokens once: a constant per token, and one that grows with the tokens attended to."""

    per_token: float
    """Projections, feed-forward (active experts and router) and the head."""
    per_attended_token: float
    """Scores and weighted values: per pair of a query and a key that it sees."""
    head: float = 0.0
    """The head's part of `per_token`."""

    def of(self, lengths: Iterable[int], heads: float | None = None) -> float:
        """One pass over causal documents of these lengths, at `heads` of their tokens through the head, None: at all;
        decoding them token by token costs the same."""
        known = [*lengths]
        whole = sum(self.executed(n, n * (n + 1) / 2) for n in known)
        return whole if heads is None else whole - self.head * (sum(known) - heads)

    def executed(self, tokens: float, pairs: float, heads: float | None = None) -> float:
        """Where so many pairs of a query and a key are multiplied out, be they seen or not."""
        whole = self.per_token * tokens + self.per_attended_token * pairs
        return whole if heads is None else whole - self.head * (tokens - heads)


def forward_flops(config: ModelConfig, adapter_parameters: int = 0) -> Flops:
    """One forward pass of a model, with adapters of that many parameters."""
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
    head = 2 * width * config.vocab_size
    return Flops(
        per_token=config.num_hidden_layers * attention + feed_forward + head + 2 * adapter_parameters,
        per_attended_token=config.num_hidden_layers * 4 * heads * size,
        head=head,
    )


def training_flops(config: ModelConfig, adapter_parameters: int = 0, *, microbatches: int = 1) -> Flops:
    """One forward and one backward pass, and the forward pass before them in which several microbatches of a step find
    the load that a mixture of experts balances.

    Backward, a product costs twice its forward pass, once for each operand's gradient; a frozen weight's is not
    needed. With adapters all weights but theirs are frozen; without (0), none is.
    """
    whole = forward_flops(config, adapter_parameters)
    spared = forward_flops(config).per_token if adapter_parameters else 0
    per_token, per_attended_token = 3 * whole.per_token - spared, 3 * whole.per_attended_token
    if microbatches > 1 and balances_load(config):
        per_token += whole.per_token - whole.head
        per_attended_token += whole.per_attended_token
    head = (2 if adapter_parameters else 3) * whole.head
    return Flops(per_token=per_token, per_attended_token=per_attended_token, head=head)


def executed_training_flops(
    config: ModelConfig,
    *,
    rematerialise: bool,
    teacher_width: int | None = None,
    adapter_parameters: int = 0,
    attention_backward_products: int = 5,
) -> Flops:
    """What a training program does, where `training_flops` says what training costs: with all that is computed again.

    Rematerialised layers run forward twice, but for what their gradients do not need: a dense layer's last product.
    Attention's backward pass has `attention_backward_products`, for two of the forward pass: it computes the scores
    again. The head's gradients are formed where its logits are. `teacher_width` is that of a teacher's hidden states,
    whose logits are multiplied out, too; None where targets are entries of a store.
    """
    once = training_flops(config, adapter_parameters)
    forward = forward_flops(config, adapter_parameters)
    teachers_head = 2 * (teacher_width or 0) * config.vocab_size
    dense_layers = sum(count for moe, count in config.layer_runs() if not moe)
    spared = 2 * dense_layers * config.hidden_size * config.intermediate_size
    again = forward.per_token - forward.head - spared if rematerialise else 0
    return Flops(
        per_token=once.per_token + again + teachers_head,
        per_attended_token=forward.per_attended_token * (1 + rematerialise + attention_backward_products / 2),
        head=once.head + teachers_head,
    )
