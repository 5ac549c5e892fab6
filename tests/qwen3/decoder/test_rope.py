"""Rotary embeddings against transformers' formulas and against what rotation means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen3.decoder.config import ModelConfig
from qwen3.decoder.rope import inverse_frequencies, rotate, rotation

SIZES = {
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_all_keys": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.5,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def make_config(scaling=None, theta=1e6, **sizes):
    return ModelConfig.from_hf({"model_type": "qwen3", **SIZES, **sizes, "rope_theta": theta, "rope_scaling": scaling})


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_equal_transformers(name, theta):
    parameters = SCALINGS[name] | {"rope_theta": theta}
    theirs = transformers.Qwen3Config(**SIZES, rope_parameters=dict(parameters))
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu")
    frequencies, factor = inverse_frequencies(make_config(SCALINGS[name], theta))
    # transformers computes in float32, this project in float64.
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=3e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_yarn_of_qwen3_keeps_23_dimensions_and_slows_those_from_40():
    plain, _ = inverse_frequencies(make_config())
    scaled, factor = inverse_frequencies(make_config(SCALINGS["yarn"]))
    ratio = plain / scaled
    assert factor == pytest.approx(1.138629, abs=1e-6)
    # Equal up to rounding in float64.
    np.testing.assert_allclose(ratio[:24], 1, rtol=1e-12)
    np.testing.assert_allclose(ratio[40:], 4, rtol=1e-12)
    assert np.all(np.diff(ratio[23:41]) > 0)


def test_rotation_pairs_halves_and_keeps_relative_position():
    config = make_config(head_dim=8, theta=100.0)
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def turned(x, position):
        return np.asarray(rotate(jnp.asarray(x), rotation(config, jnp.array([[position]]))))

    frequencies, _ = inverse_frequencies(config)
    as_complex = (q[..., :4] + 1j * q[..., 4:]) * np.exp(5j * frequencies)
    expected = np.concatenate((as_complex.real, as_complex.imag), axis=-1)
    # Rounding of float32 sines.
    np.testing.assert_allclose(turned(q, 5), expected, atol=1e-6)
    near = np.sum(turned(q, 5) * turned(k, 2))
    far = np.sum(turned(q, 45) * turned(k, 42))
    assert near == pytest.approx(far, abs=1e-5)
    assert np.array_equal(turned(q, 0), q)


def test_rotation_is_computed_in_float32_whatever_the_input():
    config = make_config(head_dim=8)
    rot = rotation(config, jnp.array([[1000]]))
    assert rot.cos.dtype == rot.sin.dtype == jnp.float32
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8), jnp.bfloat16)
    out = rotate(x, rot)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, rotate(x.astype(jnp.float32), rot).astype(jnp.bfloat16))
