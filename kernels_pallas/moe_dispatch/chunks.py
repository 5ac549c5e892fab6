"""Tokens in chunks, one after the other, where all at once would take too much memory in between."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Chunk = Callable[..., Array]
"""(x [m, D], weights [m, X], expert_ids [m, X], gate, up, down) -> [m, D], each row from its own token alone."""


def chunk_count(tokens: int, most: int) -> int:
    """The fewest equal chunks of at most `most` of the tokens, or of one where that is fewer still."""
    return next(count for count in range(1, tokens + 1) if tokens % count == 0 and tokens // count <= max(1, most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_chunks(
    run: Chunk,
    count: int,
    x: Float[Array, "M D"],
    weights: Float[Array, "M X"],
    expert_ids: Int[Array, "M X"],
    *matrices: Float[Array, "E A B"],
) -> Float[Array, "M D"]:
    """`run` on `count` equal chunks of the tokens.

    Nothing of a chunk but its operands is kept for the backward pass, which computes the rest again. The gradients of
    the matrices are summed over chunks in float32.
    """
    out = jax.lax.map(lambda chunk: run(*chunk, *matrices), _split(count, (x, weights, expert_ids)))
    return out.reshape(x.shape[0], -1)


def _forward(run: Chunk, count: int, *operands: Array) -> tuple[Array, tuple[Array, ...]]:
    return in_chunks(run, count, *operands), operands


def _backward(run: Chunk, count: int, operands: tuple[Array, ...], cotangent: Array) -> tuple[Any, ...]:
    x, weights, expert_ids, *matrices = operands

    def chunk(sums: list[Array], part: tuple[Array, ...]) -> tuple[list[Array], tuple[Array, Array]]:
        x, weights, expert_ids, cotangent = part
        _, pull = jax.vjp(lambda x, weights, *matrices: run(x, weights, expert_ids, *matrices), x, weights, *matrices)
        to_x, to_weights, *to_matrices = pull(cotangent)
        return [total + to for total, to in zip(sums, to_matrices, strict=True)], (to_x, to_weights)

    sums = [jnp.zeros(matrix.shape, jnp.promote_types(matrix.dtype, jnp.float32)) for matrix in matrices]
    sums, (to_x, to_weights) = jax.lax.scan(chunk, sums, _split(count, (x, weights, expert_ids, cotangent)))
    to_matrices = (total.astype(matrix.dtype) for total, matrix in zip(sums, matrices, strict=True))
    return to_x.reshape(x.shape), to_weights.reshape(weights.shape), None, *to_matrices


in_chunks.defvjp(_forward, _backward)


def _split(count: int, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(array.reshape(count, -1, *array.shape[1:]) for array in arrays)
