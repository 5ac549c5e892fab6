"""Analytic FLOPs against the compiler's count of a one-layer program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from distill.training.flops import forward_flops, training_flops
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3


def test_dense_forward_agrees_with_the_compiler() -> None:
    config = ModelConfig(
        model_type="qwen3", vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    model = jax.eval_shape(lambda: Qwen3(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    compiled = (
        jax.jit(lambda model, t: model.logits(t, t, t))
        .lower(
            model,
            tokens,
        )
        .compile()
    )
    analytic = forward_flops(config)
    # One block of attention computes the whole square of scores, the analytic count only what is seen.
    square = analytic.per_token * 64 + analytic.per_attended_token * 64 * 64
    # Norms, rotary embedding, softmax and SwiGLU's elementwise work, which the analytic count leaves out.
    assert compiled.cost_analysis()["flops"] == pytest.approx(square, rel=0.02)


def test_published_active_parameters() -> None:
    """Two FLOPs per active parameter and token, embedding look-up apart (30B-A3B: 3.35B active with it)."""
    moe = ModelConfig(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, max_position_embeddings=40960, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768,
    )  # fmt: skip
    active = 3.35e9 - 151936 * 2048
    assert forward_flops(moe).per_token == pytest.approx(2 * active, rel=0.005)


def test_documents_cost_their_causal_triangle() -> None:
    config = ModelConfig(
        model_type="qwen3", vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=4, max_position_embeddings=8,
    )  # fmt: skip
    flops = forward_flops(config)
    assert flops.of([3]) == 3 * flops.per_token + 6 * flops.per_attended_token
    assert flops.of([2, 1]) < flops.of([3])


def test_frozen_weights_have_no_gradient_to_pay_for() -> None:
    config = ModelConfig(
        model_type="qwen3", vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=4, max_position_embeddings=8,
    )  # fmt: skip
    base, adapters = forward_flops(config), 10
    assert training_flops(config).of([3]) == 3 * base.of([3])
    assert forward_flops(config, adapters).of([3]) == base.of([3]) + 2 * adapters * 3
    attended = training_flops(config, adapters).per_attended_token
    assert attended == 3 * base.per_attended_token
    assert training_flops(config, adapters).per_token == 2 * base.per_token + 3 * 2 * adapters


def test_several_microbatches_find_the_load_of_experts_first() -> None:
    dense = ModelConfig(
        model_type="qwen3", vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=4, max_position_embeddings=8,
    )  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4}
    moe = dataclasses.replace(dense, model_type="qwen3_moe", **experts)
    once, head = forward_flops(moe).of([3]), 3 * 2 * 4 * 8
    assert training_flops(moe, microbatches=2).of([3]) == 4 * once - head
    unbalanced = dataclasses.replace(moe, router_aux_loss_coef=0.0)
    for config in (dense, unbalanced):
        assert training_flops(config, microbatches=2) == training_flops(config)
