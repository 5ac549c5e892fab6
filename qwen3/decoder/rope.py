"""Rotary position embeddings with the scalings that checkpoints ask for."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import DualChunkQueries, dual_chunk_positions
from qwen3.decoder.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, float32, attention factor included."""

    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]


class DualChunkRotation(NamedTuple):
    """Of keys, and of queries for each kind of keys, as `kernels_pallas.attention.dual_chunk` explains them."""

    keys: Rotation
    same: Rotation
    previous: Rotation
    older: Rotation
    within: Int[Array, "B T"]
    """The position of each token in its chunk."""
    chunk_tokens: int


Rotary = Rotation | DualChunkRotation


def rotation(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotary:
    """Angles of `positions` (RoFormer, arXiv 2104.09864), scaled as `config.rope_scaling` says, by chunks where
    `config.dual_chunk` asks for them."""
    frequencies, factor = inverse_frequencies(config)

    def turn(positions: Int[Array, "B T"], factor: float | Array) -> Rotation:
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)

    chunks = config.dual_chunk
    if chunks is None:
        return turn(positions, factor)
    at = dual_chunk_positions(positions, chunk_size=chunks.chunk_size, local_size=chunks.local_size)
    sharper = _sharpening(chunks.original_max_position_embeddings, positions)[..., None] * factor
    return DualChunkRotation(
        keys=turn(at.keys, factor),
        same=turn(at.same, sharper),
        previous=turn(at.previous, sharper),
        older=turn(at.older, sharper),
        within=at.keys,
        chunk_tokens=chunks.chunk_tokens,
    )


def rotate_pair(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], rot: Rotary
) -> tuple[Float[Array, "B T N H"] | DualChunkQueries, Float[Array, "B T K H"]]:
    """Queries and keys as attention takes them."""
    if isinstance(rot, Rotation):
        return rotate(q, rot), rotate(k, rot)
    queries = DualChunkQueries(
        same=rotate(q, rot.same),
        previous=rotate(q, rot.previous),
        older=rotate(q, rot.older),
        within=rot.within,
        chunk_tokens=rot.chunk_tokens,
    )
    return queries, rotate(k, rot.keys)


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


def _sharpening(original: int, positions: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """What Qwen2.5-1M multiplies scores by beyond the `original` length: (0.1·ln(n / original) + 1)², YaRN's attention
    factor for queries times that for keys (arXiv 2501.15383), for a query that is the n-th token.

    vLLM's implementation, which is Qwen's, scales all queries and keys of a prompt by the prompt's whole length. Here
    both factors are the query's own, so that no token depends on what follows it and text is scored as it was written;
    the last query's scores are the same.
    """
    if not original:
        return jnp.ones(positions.shape, jnp.float32)
    beyond = jnp.maximum((positions + 1).astype(jnp.float32) / original, 1)
    return jnp.square(0.1 * jnp.log(beyond) + 1)


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
