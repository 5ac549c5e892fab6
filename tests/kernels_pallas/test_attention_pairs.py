"""The count of multiplied pairs against the blocks that run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.attention import DualChunkQueries, attended_pairs, attention_on_mesh, xla
from tests.kernels_pallas.test_attention_on_mesh import mesh_of, rows_on_mesh

ROWS, HEADS = 2, 3


@pytest.fixture
def ran(monkeypatch):
    """Queries and keys of each block that runs, on whatever device. Blocks have 16 queries up to 64 keys, 8 up to 128,
    else 4."""
    sizes, by_blocks = [], xla._by_blocks

    def recorded(block, *arguments, **options):
        def run(start, size, seen):
            jax.debug.callback(lambda: sizes.append((size, seen)))
            return block(start, size, seen)

        return by_blocks(run, *arguments, **options)

    monkeypatch.setattr(xla, "_by_blocks", recorded)
    monkeypatch.setattr(xla, "_SMALL_BLOCK", 4)
    monkeypatch.setattr(xla, "_LARGE_BLOCK", 16)
    monkeypatch.setattr(xla, "_UNROLLED", 16)
    monkeypatch.setattr(xla, "_SCORE_BYTES", 4 * ROWS * HEADS * 16 * 64)
    return sizes


CASES = [
    # tokens, devices, chunk_tokens, queries of a block
    (14, 1, None, {4, 2}),
    (14, 1, 5, {4, 2}),
    (49, 1, None, {16}),
    (49, 1, 49, {16}),
    (100, 1, 10, {8}),
    (150, 1, None, {4}),
    (6, 2, None, {3}),
    (62, 2, None, {16}),
    (66, 2, 24, {8}),
    (140, 4, 33, {4}),
]
# Not of shared rows: what records a block would keep it where `jax.checkpoint` replays what is gathered.
BACKWARD = [(*case, True) for case in CASES[:4]]


@pytest.mark.parametrize(
    ("tokens", "devices", "chunk_tokens", "sizes", "backward"), [*((*case, False) for case in CASES), *BACKWARD]
)
def test_as_many_pairs_are_counted_as_blocks_multiply(tokens, devices, chunk_tokens, sizes, backward, ran):
    x, segments = jnp.ones((ROWS, tokens, HEADS, 2)), jnp.ones((ROWS, tokens), jnp.int32)
    operation = functools.partial(
        attention_on_mesh,
        mesh=mesh_of(devices),
        row_axes=("data", "context"),
        head_axis="tensor",
        context_axis="context",
        implementation="xla",
    )

    def attend(x):
        q = x
        if chunk_tokens is not None:
            within = jnp.broadcast_to(jnp.arange(tokens) % chunk_tokens, segments.shape)
            q = DualChunkQueries(same=x, previous=x, older=x, within=within, chunk_tokens=chunk_tokens)
        return rows_on_mesh(operation, mesh_of(devices), q, x, x, segments).sum()

    jax.block_until_ready(jax.jit(jax.grad(attend) if backward else attend)(x))
    jax.effects_barrier()
    assert {size for size, _ in ran} == sizes
    counted = attended_pairs(
        tokens, rows=ROWS, heads=HEADS, chunk_tokens=chunk_tokens, devices=devices, implementation="xla"
    )
    assert sum(size * seen for size, seen in ran) == counted * (1 + backward)
