"""Rotary position embeddings with the scalings that checkpoints ask for."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen3.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, float32, attention factor included."""

    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]


def rotation(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotation:
    """Angles of `positions` (RoFormer, arXiv 2104.09864), scaled as `config.rope_scaling` says."""
    frequencies, factor = inverse_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: Float[Array, "B T N H"], rot: Rotation) -> Float[Array, "B T N H"]:
    """Rotate half against half (entries i and i + H/2 are a pair), in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rot.cos[:, :, None, :], rot.sin[:, :, None, :]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H/2] in radians per position, and the factor on cos and sin."""
    base = config.rope_theta ** (np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    plain = 1.0 / base
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, scaling, config)


def _yarn(plain: np.ndarray, scaling: RopeScaling, config: ModelConfig) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, blend linearly between."""

    def dimension(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return config.head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(config.head_dim // 2) - low) / width, 0, 1)
    frequencies = plain / scaling.factor * ramp + plain * (1 - ramp)
    default = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies, default if scaling.attention_factor is None else scaling.attention_factor


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: wavelengths beyond the original context are divided by the factor, with a smooth passage."""
    wavelength = 2 * math.pi / plain
    length = scaling.original_max_position_embeddings
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = np.clip((length / wavelength - scaling.low_freq_factor) / span, 0, 1)
    return (1 - smooth) * plain / scaling.factor + smooth * plain
