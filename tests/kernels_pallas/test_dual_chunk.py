"""Dual Chunk Attention against its definition, one query and key at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import (
    DualChunkQueries,
    attention,
    attention_behind_prefix,
    attention_part,
    dual_chunk_attention,
    dual_chunk_positions,
    merge_parts,
)

CHUNK, LOCAL = 12, 4
DOCUMENTS = [5, 40, 19]  # shorter than a chunk of 8, of whole chunks, and not
SIZE, HEADS, KV_HEADS = 8, 4, 2


def rotate(x, positions):
    """Rotary embedding [B, T, N, H] at positions [B, T], base 100."""
    angle = np.asarray(positions)[:, :, None, None] * 100.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
    a, b = np.split(np.asarray(x), 2, axis=-1)
    rotated = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate(rotated, axis=-1).astype(np.float32)


@pytest.fixture
def row():
    """q, k, v of one packed row, its segments and the position of every token in its document."""
    rng = np.random.default_rng(0)
    length = sum(DOCUMENTS) + 3
    q, k, v = (jnp.asarray(rng.normal(0, 1.5, (1, length, n, SIZE)), jnp.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    segments, positions = np.zeros((2, 1, length), np.int32)
    for number, count in enumerate(DOCUMENTS):
        start = sum(DOCUMENTS[:number])
        segments[0, start : start + count] = number + 1
        positions[0, start : start + count] = np.arange(count)
    return q, k, v, jnp.asarray(segments), jnp.asarray(positions)


def by_definition(q, k, v, segments, positions):
    """The paper's cases, one query at one key after another."""
    q, k, v, segments, positions = map(np.asarray, (q, k, v, segments, positions))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    stride = CHUNK - LOCAL
    out = np.zeros_like(q)
    for i in np.flatnonzero(segments[0]):
        keys = [j for j in range(i + 1) if segments[0, j] == segments[0, i]]
        scores = []
        for j in keys:
            position = positions[0, i] % stride
            distance = positions[0, i] // stride - positions[0, j] // stride
            query_at = [position, min(position + stride, CHUNK), min(2 * stride - 1, CHUNK)][min(distance, 2)]
            query = rotate(q[:, i : i + 1], np.full((1, 1), query_at))
            key = rotate(k[:, j : j + 1], positions[:, j : j + 1] % stride)
            scores.append(np.sum(query * key, axis=-1)[0, 0] * SIZE**-0.5)
        weights = np.exp(np.stack(scores) - np.max(scores, axis=0))
        out[0, i] = np.einsum("SN,SNH->NH", weights / weights.sum(axis=0), v[0, keys])
    return out


def queries(q, at, chunk_tokens=CHUNK - LOCAL):
    same, previous, older = (jnp.asarray(rotate(q, x)) for x in (at.same, at.previous, at.older))
    return DualChunkQueries(same=same, previous=previous, older=older, within=at.keys, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_it_is_what_the_paper_defines(row, implementation):
    q, k, v, segments, positions = row
    at = dual_chunk_positions(positions, chunk_size=CHUNK, local_size=LOCAL)
    out = dual_chunk_attention(queries(q, at), rotate(k, at.keys), v, segments, implementation=implementation)
    # float32 sums in another order.
    np.testing.assert_allclose(out, by_definition(q, k, v, segments, positions), atol=1e-5)


def test_queries_may_be_a_piece_of_the_row(row):
    q, k, v, segments, positions = row
    at = dual_chunk_positions(positions, chunk_size=CHUNK, local_size=LOCAL)
    whole, k = queries(q, at), rotate(k, at.keys)
    index = jnp.arange(30, 60)[None]
    piece = jax.tree.map(lambda x: x[:, 30:60], whole)
    expected = dual_chunk_attention(whole, k, v, segments)[:, 30:60]
    # float32 sums in another order.
    np.testing.assert_allclose(dual_chunk_attention(piece, k, v, segments, query_index=index), expected, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [60, 67])
def test_within_a_chunk_it_is_attention(row, chunk_tokens):
    """Whether the row is as short as a chunk, or its documents alone."""
    q, k, v, segments, positions = row
    at = dual_chunk_positions(positions, chunk_size=chunk_tokens + 4, local_size=4)
    made = queries(q, at, chunk_tokens)
    out = dual_chunk_attention(made, rotate(k, at.keys), v, segments)
    np.testing.assert_array_equal(out, attention(made.same, rotate(k, at.keys), v, segments))


def test_merged_parts_have_the_values_and_gradients_of_the_whole(row):
    q, k, v, segments, _ = row
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    spans = [(0 * index, index // 3), (index // 3, index // 2), (index // 2, index + 1)]

    def merged(q, k, v):
        return merge_parts([attention_part(q, k, v, segments, span) for span in spans])

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(operation, q, k, v):
        def loss(*x):
            out = operation(*x)
            return jnp.sum(jnp.sin(out)), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    found, gradients = value_and_gradients(merged, q, k, v)
    whole, expected = value_and_gradients(lambda *x: attention(*x, segments, implementation="reference"), q, k, v)
    # float32 sums in another order.
    np.testing.assert_allclose(found, whole, atol=1e-5)
    for mine, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_wrong_arguments_are_named(row):
    q, k, v, segments, positions = row
    with pytest.raises(ValueError, match=r"local_size 12 must be .* below chunk_size 12"):
        dual_chunk_positions(positions, chunk_size=12, local_size=12)
    with pytest.raises(ValueError, match="a bound of span is"):
        attention_part(q, k, v, segments, (segments, segments[:, 1:]))


def in_pages(x):
    """The first of 24 tokens [1, 24, K, H] in page 3, the others in 1 and 2; page 0 holds nothing of them."""
    pages = jnp.asarray(x).reshape(3, 8, *x.shape[2:]).swapaxes(1, 2)
    return jnp.stack([jnp.full_like(pages[0], 1e4), pages[1], pages[2], pages[0]])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_behind_a_prefix_documents_are_attended_to_as_whole_ones(row, implementation, monkeypatch):
    """One row's documents go on from 21 and from 13 tokens of the same one, and a third stands beside them whole."""
    monkeypatch.setattr("kernels_pallas.attention.prefix._BLOCK_TOKENS", 16)
    q, k, v, segments, positions = row
    at = dual_chunk_positions(positions, chunk_size=CHUNK, local_size=LOCAL)
    rotated = queries(q, at), rotate(k, at.keys)
    plain = q, k
    begin, end = DOCUMENTS[0], sum(DOCUMENTS[:2])
    picked = np.r_[begin + 21 : end, begin + 13 : begin + 30, end : end + DOCUMENTS[2], [0] * 4]
    behind = np.repeat([21, 13, 0, 0], [19, 17, DOCUMENTS[2], 4])[None]
    own = np.repeat([1, 2, 3, 0], [19, 17, DOCUMENTS[2], 4])[None]
    for (queried, keys), whole in ((rotated, dual_chunk_attention), (plain, attention)):
        wanted = whole(queried, keys, v, segments, implementation="reference")[:, picked[:-4]]
        out = attention_behind_prefix(
            jax.tree.map(lambda x: x[:, picked], queried),
            jnp.asarray(keys)[:, picked],
            v[:, picked],
            jnp.asarray(own),
            *(in_pages(x[:, begin : begin + 24]) for x in (keys, v)),
            jnp.asarray([[3, 1, 2]]),
            jnp.asarray(behind),
            positions[:, picked],
            implementation=implementation,
        )
        # float32 sums in another order, merged.
        np.testing.assert_allclose(out[:, :-4], wanted, atol=1e-5)
        np.testing.assert_array_equal(out[:, -4:], 0)
