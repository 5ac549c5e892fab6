"""Learning rates and weight decay are what their names say."""

import math

import jax
import numpy as np
import optax
import pytest

from distill.training.optimizer import Optimizer
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from student.lora import Lora


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("steps", "warmup_fraction", "warmup"), [(2, 0.0, 0), (3, 0.0, 0), (3, 0.4, 1), (100, 0.0, 0), (100, 0.1, 10)]
)
def test_the_first_step_after_warmup_has_the_peak_and_the_last_the_final_fraction(
    schedule: str, steps: int, warmup_fraction: float, warmup: int
) -> None:
    optimizer = Optimizer(learning_rate=1e-3, schedule=schedule, warmup_fraction=warmup_fraction, final_fraction=0.2)
    rates = [float(optimizer.learning_rates(steps)(step)) for step in range(steps)]
    assert rates[0] == pytest.approx(1e-3 / (warmup + 1))
    assert rates[warmup] == max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 if schedule == "constant" else 2e-4)
    assert np.all(np.diff(rates[: warmup + 1]) > 0)
    if schedule != "constant":
        assert np.all(np.diff(rates[warmup:]) < 0)


@pytest.mark.parametrize(
    ("steps", "warmup_fraction", "expected"),
    [(1, 0.0, [1.0]), (2, 0.5, [0.5, 0.2]), (3, 0.7, [1 / 3, 2 / 3, 0.2]), (2, 1.0, [1 / 3, 2 / 3])],
)
def test_stages_too_short_for_a_fall(steps: int, warmup_fraction: float, expected: list[float]) -> None:
    optimizer = Optimizer(learning_rate=1.0, warmup_fraction=warmup_fraction, final_fraction=0.2)
    assert [float(optimizer.learning_rates(steps)(step)) for step in range(steps)] == pytest.approx(expected)


def test_decay_spares_norms_and_biases_but_not_adapters() -> None:
    config = ModelConfig(
        model_type="qwen2", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=32, qk_norm=False,
        attention_bias=True,
    )  # fmt: skip
    model = jax.jit(Qwen3, static_argnums=0)(config, jax.random.key(0))
    Lora(rank=2, targets=("q_proj",)).attach(model, jax.random.key(1))
    transformation = Optimizer(learning_rate=1.0, weight_decay=0.5, warmup_fraction=0).transformation(1)

    @jax.jit
    def updated(model: Qwen3) -> optax.Updates:
        model = jax.tree.map(lambda leaf: leaf + 1, model)
        zeros = jax.tree.map(lambda leaf: leaf * 0, model)
        return transformation.update(zeros, transformation.init(model), model)[0]

    updates = updated(model)
    decayed = {
        jax.tree_util.keystr(path): bool(np.any(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert {name for name, hit in decayed.items() if not hit} == {
        name for name in decayed if "norm" in name or "bias" in name
    }
    assert any(decayed.values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("warmup_fraction", 1.5),
        ("final_fraction", math.nan),
        ("b1", math.nan),
        ("b2", 1.0),
        ("epsilon", -1),
        ("epsilon", math.nan),
        ("clip_norm", 0),
        ("clip_norm", math.nan),
        ("weight_decay", -1),
        ("weight_decay", math.nan),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"optimizer\.{field} is {value}"):
        Optimizer(**{field: value})
