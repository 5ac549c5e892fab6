"""Zig-zag order: pieces of a row that are equal work for causal attention (Llama 3, arXiv 2407.21783, section 3.3.2).

Later tokens attend to more. So a row over c devices is cut into 2c half-pieces, and device i has the i-th of them
from the front and the i-th from the back, in this order: what the first sees less, the second sees more. That balance
is lost where a kernel's block is longer than a half-piece, and so reaches as far as the second for tokens of the first.
Where a piece is of an odd number of tokens, every other half-piece is one longer, and each device has one of either
kind.

All functions are called inside `shard_map`, for arrays [B, T/c, ...] of the devices of one mesh axis, but for
`zigzag_index` of a device that is a plain number.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def to_zigzag(piece: Array, axis: str) -> Array:
    """The device's half-pieces of rows whose i-th consecutive piece the i-th device has."""
    devices, longer = jax.lax.axis_size(axis), _half_tokens(piece.shape[1], 0)
    even, odd = (
        jax.lax.ppermute(half, axis, [(i, _device(2 * i + parity, devices)) for i in range(devices)])
        for parity, half in enumerate(jnp.split(piece, [longer], axis=1))
    )
    return jnp.where(_starts_even(axis), jnp.concatenate([even, odd], axis=1), jnp.concatenate([odd, even], axis=1))


def from_zigzag(piece: Array, axis: str) -> Array:
    """The device's consecutive piece of rows that are in zig-zag order."""
    devices, (longer, shorter) = jax.lax.axis_size(axis), (_half_tokens(piece.shape[1], h) for h in range(2))
    even = jnp.where(_starts_even(axis), piece[:, :longer], piece[:, shorter:])
    odd = jnp.where(_starts_even(axis), piece[:, longer:], piece[:, :shorter])
    home = [
        jax.lax.ppermute(half, axis, [(_device(2 * i + parity, devices), i) for i in range(devices)])
        for parity, half in enumerate((even, odd))
    ]
    return jnp.concatenate(home, axis=1)


def in_row_order(pieces: Array, devices: int) -> Array:
    """Rows [B, T, ...] from the pieces of all devices, one behind the other."""
    tokens = pieces.shape[1] // devices
    sizes = [_half_tokens(tokens, half) for i in range(devices) for half in (i, 2 * devices - 1 - i)]
    halves = jax.lax.split(pieces, sizes, axis=1)
    return jnp.concatenate([*halves[::2], *halves[::-2]], axis=1)


def zigzag_index(tokens: int, device: Int[Array, ""] | int, devices: int) -> Int[Array | np.ndarray, "T"]:
    """Where in their row the T `tokens` of a device's piece stand, by numpy where the device is a plain number."""
    numpy: Any = np if isinstance(device, int) else jnp
    local, first, second = numpy.arange(tokens), device, 2 * devices - 1 - device
    first_tokens = _half_tokens(tokens, first)

    def start(half: Any) -> Any:
        return half // 2 * tokens + half % 2 * _half_tokens(tokens, 0)

    return numpy.where(local < first_tokens, start(first) + local, start(second) + local - first_tokens)


def _device(half: int, devices: int) -> int:
    return min(half, 2 * devices - 1 - half)


def _half_tokens(piece_tokens: int, half: Any) -> Any:
    return (piece_tokens + 1 - half % 2) // 2


def _starts_even(axis: str) -> Array:
    """Whether the first of this device's half-pieces is one of the even ones, and the second of the odd ones."""
    return jax.lax.axis_index(axis) % 2 == 0
