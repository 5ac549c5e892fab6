"""The benchmark of quantised teachers measures a divergence: none from a model to itself, some from what is rounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import quantised_teacher
from qwen3.decoder.model import Qwen3

SMALL = dataclasses.replace(
    quantised_teacher.RANDOM,
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    initializer_range=0.3,
)


@pytest.mark.long
def test_what_is_rounded_more_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_teacher, "RANDOM", SMALL)
    rows = {row["weights"]: row for row in quantised_teacher.random()}
    assert rows.keys() == {"float32", "int8", "fp8"}
    assert 0 < rows["int8"]["kl_mean_nats"] < rows["fp8"]["kl_mean_nats"] < 0.1
    assert rows["fp8"]["kl_median_nats"] < rows["fp8"]["kl_99th_percentile_nats"] < rows["fp8"]["kl_largest_nats"]
    assert rows["int8"]["weights_mb"] == rows["fp8"]["weights_mb"] < 0.6 * rows["float32"]["weights_mb"]


def test_only_masked_positions_count() -> None:
    exact, other = (jax.jit(lambda key: Qwen3(SMALL, key))(jax.random.key(seed)) for seed in (0, 1))
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 6))
    mask = np.zeros(tokens.shape, bool)
    mask[1, 2:4] = True
    same = quantised_teacher.differences(exact, exact, tokens, mask)
    assert (same["positions"], same["top1_agreement"]) == (2, 1)
    assert same["kl_largest_nats"] == 0
    said = quantised_teacher.differences(exact, other, tokens, mask)
    positions = np.broadcast_to(np.arange(6), tokens.shape)
    p, q = (
        jax.nn.log_softmax(jax.jit(Qwen3.logits)(m, tokens, positions, np.ones_like(tokens))) for m in (exact, other)
    )
    expected = np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1))[mask]
    assert said["kl_mean_nats"] == pytest.approx(expected.mean(), rel=1e-4)
    assert said["kl_largest_nats"] == pytest.approx(expected.max(), rel=1e-4)
