"""Dual Chunk Attention in the decoder, against the paper's matrix of relative positions and against plain attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3.decoder.attend import attend
from qwen3.decoder.config import DualChunk, ModelConfig, RopeScaling
from qwen3.decoder.model import Qwen3
from qwen3.decoder.rope import inverse_frequencies, rotate_pair, rotation
from qwen3.errors import UserError

PLAIN = ModelConfig(
    model_type="qwen3",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rope_theta=100.0,
    initializer_range=0.3,
)
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=12)
DOCUMENTS = (5, 47, 20)  # within a chunk of 8, of six, and of three
PADDING = 3
RAW = {"model_type": "qwen3", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
RAW |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}


def with_chunks(base=PLAIN, *, chunk_size=12, local_size=4, original=0):
    chunks = DualChunk(chunk_size=chunk_size, local_size=local_size, original_max_position_embeddings=original)
    return dataclasses.replace(base, dual_chunk=chunks)


def packed_row():
    """Segments and positions [1, T] of documents side by side, and padding."""
    segments = np.repeat(np.arange(1, len(DOCUMENTS) + 1), DOCUMENTS)
    positions = np.concatenate([np.arange(count) for count in DOCUMENTS])
    return (np.pad(x, (0, PADDING))[None].astype(np.int32) for x in (segments, positions))


def relative_positions(config, positions):
    """The paper's matrix M [T, T] (equations 2 to 8): how far each query takes each key to be away."""
    chunks = config.dual_chunk
    size = chunks.chunk_size - chunks.local_size
    at = positions % size
    gap = positions[:, None] // size - positions[None] // size
    successive = np.minimum(at + size, chunks.chunk_size)
    query = np.select([gap <= 0, gap == 1], [at[:, None], successive[:, None]], min(2 * size - 1, chunks.chunk_size))
    return query - at[None]


def dense(config, q, k, v, segments, positions):
    """Attention by the matrix of relative positions, in the precision of q; one row."""
    frequencies, factor = inverse_frequencies(config)
    distance = relative_positions(config, positions[0])
    half, group = config.head_dim // 2, q.shape[2] // k.shape[2]
    q, k = (x[0, ..., :half] + 1j * x[0, ..., half:] for x in (q, jnp.repeat(k, group, axis=2)))
    turned = jnp.exp(1j * distance[:, :, None] * frequencies)
    scores = jnp.einsum("TNf,SNf,TSf->NTS", q, jnp.conj(k), turned).real * factor**2 / config.head_dim**0.5
    if original := config.dual_chunk.original_max_position_embeddings:
        length = positions[0] + 1
        scores *= (np.maximum(0.1 * np.log(length / original) + 1, 1) ** 2)[:, None]
    causal = np.tri(len(distance), dtype=bool) & (segments[0][:, None] == segments[0]) & (segments[0] != 0)
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1) * causal
    return jnp.einsum("NTS,SNH->TNH", weights, jnp.repeat(v, group, axis=2)[0])[None]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "config",
    [with_chunks(), with_chunks(dataclasses.replace(PLAIN, rope_scaling=YARN)), with_chunks(original=12)],
    ids=["positions alone", "yarn", "sharper with length"],
)
def test_values_and_gradients_equal_the_matrix_of_relative_positions(config, implementation):
    segments, positions = packed_row()
    rng = np.random.default_rng(0)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    inputs = tuple(rng.normal(0, 1.5, (1, segments.shape[1], n, config.head_dim)).astype(np.float32) for n in heads)
    weights = rng.normal(size=inputs[0].shape).astype(np.float32)

    def chunked(q, k, v):
        turned = rotate_pair(q, k, rotation(config, jnp.asarray(positions)))
        return attend(*turned, v, jnp.asarray(segments), mesh=None, implementation=implementation)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, *pull(jnp.asarray(weights, out.dtype))

    mine = with_gradients(chunked, *map(jnp.asarray, inputs))
    with jax.enable_x64(True):
        wide = (jnp.asarray(x, jnp.float64) for x in inputs)
        theirs = with_gradients(lambda q, k, v: dense(config, q, k, v, segments, positions), *wide)
    for name, ours, exact in zip(("output", "q", "k", "v"), mine, theirs, strict=True):
        assert exact.dtype == np.float64
        # float32 against float64.
        np.testing.assert_allclose(ours, exact, atol=3e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("chunk_tokens", "rounding"), [(75, 0), (47, 1e-5)], ids=["row", "longest document"])
def test_what_fits_a_chunk_is_read_as_without(chunk_tokens, rounding):
    """Exactly where all of the row fits; else XLA adds float32 numbers in another order."""
    segments, positions = packed_row()
    config = with_chunks(chunk_size=chunk_tokens + 4, original=47)
    tokens = np.arange(segments.shape[1])[None] % config.vocab_size

    def read(config):
        return jax.jit(Qwen3, static_argnums=0)(config, jax.random.key(0)).hidden(tokens, positions, segments)

    expected = read(PLAIN)
    np.testing.assert_allclose(read(config), expected, atol=rounding, rtol=0)
    assert not np.allclose(read(with_chunks()), expected, atol=1e-2)


def test_a_published_file_is_read_and_written():
    """Qwen2.5-7B-Instruct-1M's."""
    sizes = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    config = ModelConfig.from_hf(RAW | {"dual_chunk_attention_config": sizes})
    assert config.dual_chunk == DualChunk(**sizes)
    assert config.to_hf()["dual_chunk_attention_config"] == sizes
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert "dual_chunk_attention_config" not in PLAIN.to_hf()
    assert ModelConfig.from_hf(RAW | {"dual_chunk_attention_config": {"chunk_size": 4096}}).dual_chunk == DualChunk(
        chunk_size=4096
    )


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ({"chunk_size": 8, "local_size": 8}, r"\.local_size is 8; it must be below chunk_size, 8$"),
        ({"local_size": -1}, r"\.local_size is -1; it must be at least 0"),
        ({"chunk_size": "8"}, r"dual_chunk_attention_config\.chunk_size is '8'; it must be a whole number"),
        ({"original_max_position_embeddings": -1}, r"\.original_max_position_embeddings is -1; it must be at least 0"),
        ({"sparse_attention_enabled": True}, "sparse_attention_enabled is not supported; set it to false"),
        ({"sparse_attention_config": [{}]}, "sparse_attention_enabled is not supported; set it to false"),
    ],
)
def test_what_cannot_be_is_refused_by_name(chunks, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(RAW | {"dual_chunk_attention_config": chunks})


def test_attention_is_not_scaled_twice_for_one_length():
    with pytest.raises(UserError, match="leave out rope_scaling, or set the latter to 0"):
        with_chunks(dataclasses.replace(PLAIN, rope_scaling=YARN), original=12)
