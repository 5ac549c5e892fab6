"""Scoring: every kind of target, packed rows, chunks and meshes say what the model's own logits say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.planner.collectives import collectives
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.rollout import THINKING, Rollout
from qwen3.sharding import MeshShape, batch_sharding, make_mesh, placed_shapes, shardings
from teacher import scoring
from teacher.scoring import Scorer
from teacher.targets import BLOCK_TOKENS

CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    initializer_range=0.3,
)
ROWS, LENGTH, K = 4, 12, 6
# float32 sums in another order.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Qwen3(CONFIG, jax.random.key(0)))()


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens)


@pytest.fixture(scope="module")
def logprobs(model, rows):
    return np.asarray(jax.nn.log_softmax(jax.jit(Qwen3.logits)(model, *rows)))


def scorers(model):
    """On one device, on eight, on eight that share sequences too, and on four of them with targets that are wanted on
    the other four, which share sequences."""
    one, eight = make_mesh(MeshShape(), jax.devices()[:1]), make_mesh(MeshShape(expert=4, tensor=2))
    pieces = make_mesh(MeshShape(expert=2, tensor=2, context=2))
    last, first = make_mesh(MeshShape(expert=4), jax.devices()[4:]), make_mesh(MeshShape(context=4), jax.devices()[:4])
    yield Scorer(jax.device_put(model, shardings(model, one)), one), one
    yield Scorer(jax.device_put(model, shardings(model, eight)), eight), eight
    yield Scorer(jax.device_put(model, shardings(model, pieces)), pieces), pieces
    yield Scorer(jax.device_put(model, shardings(model, last)), last, wanted_on=first), first


def test_every_kind_of_target_says_what_the_logits_say(model, rows, logprobs):
    asked = np.random.default_rng(1).integers(-1, CONFIG.vocab_size, (ROWS, LENGTH, 5))
    best = np.argsort(-logprobs, axis=-1)[..., :K]
    for scorer, wanted_on in scorers(model):
        top = scorer.top_k(*rows, K)
        np.testing.assert_array_equal(top.ids, best)
        np.testing.assert_allclose(top.logprobs, np.take_along_axis(logprobs, best, -1), **TOLERANCE)
        at = scorer.at_ids(*rows, asked)
        known = np.asarray(at.ids) >= 0
        assert set(np.unique(np.asarray(at.ids)[~known])) == {-1}
        np.testing.assert_allclose(
            np.asarray(at.logprobs)[known], np.take_along_axis(logprobs, asked, -1)[known], **TOLERANCE
        )
        np.testing.assert_allclose(np.sum(np.exp(at.logprobs), -1) + np.exp(at.log_tail), 1, **TOLERANCE)
        hidden = scorer.hidden(*rows)
        told = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", np.asarray(hidden.hidden), np.asarray(scorer.head)))
        np.testing.assert_allclose(told, logprobs, **TOLERANCE)
        for leaf in jax.tree.leaves((top, at, hidden)):
            assert leaf.sharding.is_equivalent_to(batch_sharding(wanted_on), leaf.ndim)
        assert scorer.head.sharding.device_set == set(wanted_on.devices.flat)


def make_rollout(number, length):
    rng = np.random.default_rng(number)
    mask = np.arange(length) >= 2
    mask[-1] = False
    return Rollout(
        tokens=rng.integers(0, CONFIG.vocab_size, length).astype(np.int32),
        prompt_length=3,
        loss_mask=mask,
        sampler_logprobs=np.zeros(length, np.float32),
        mode=THINKING,
        prompt_id=str(number),
        sample_index=0,
        policy_step=0,
        finished=True,
    )


LENGTHS = (4, 16, 7, 5, 11, 4, 9)


@pytest.fixture(scope="module")
def rollouts():
    return [make_rollout(number, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def alone(model, rollouts):
    """The log-probabilities of each rollout in a row of its own, padded."""
    tokens, segment_ids = np.zeros((len(rollouts), 16), np.int32), np.zeros((len(rollouts), 16), np.int32)
    for row, rollout in enumerate(rollouts):
        tokens[row, : len(rollout.tokens)], segment_ids[row, : len(rollout.tokens)] = rollout.tokens, 1
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    return np.asarray(jax.nn.log_softmax(jax.jit(Qwen3.logits)(model, tokens, positions, segment_ids)))


@pytest.mark.parametrize(
    ("which", "tokens_at_once", "length"), [(0, 40, 16), (1, 40, 16), (2, 20, 17), (0, 10_000, 16)]
)
def test_packed_rollouts_are_scored_as_each_alone(model, rollouts, alone, monkeypatch, which, tokens_at_once, length):
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", tokens_at_once)
    scorer, _ = list(scorers(model))[which]
    records = scorer.score_rollouts(rollouts, k=K, rows=7, length=length, pad_id=0)
    assert [record.rollout for record in records] == rollouts
    for record, expected in zip(records, alone, strict=True):
        expected = expected[: len(record.rollout.tokens)]
        np.testing.assert_allclose(record.logprobs, -np.sort(-expected, -1)[:, :K], **TOLERANCE)
        np.testing.assert_allclose(np.take_along_axis(expected, record.ids, -1), record.logprobs, **TOLERANCE)
        left = 1 - np.sum(np.exp(record.logprobs), -1)
        np.testing.assert_allclose(np.exp(record.log_tail), left, **TOLERANCE)


def test_rows_are_filled_and_few_go_through_the_model_at_once(model, rollouts, monkeypatch):
    """Seven rollouts of 56 tokens fit four rows of 16; a limit of 40 tokens lets two rows through at a time."""
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 40)
    shapes = []

    def counted(model, tokens, *rest, top_k=scoring._top_k):
        shapes.append(tokens.shape)
        return top_k(model, tokens, *rest)

    monkeypatch.setattr(scoring, "_top_k", counted)
    scorer, _ = next(scorers(model))
    scorer.score_rollouts(rollouts, k=K, rows=7, length=16, pad_id=0)
    assert shapes == [(2, 16), (2, 16)]


def test_a_rollout_longer_than_a_row_is_refused(model):
    scorer, _ = next(scorers(model))
    with pytest.raises(ValueError, match="a rollout of 9 tokens does not fit rows of 8"):
        scorer.score_rollouts([make_rollout(0, 9)], k=K, rows=1, length=8, pad_id=0)


def test_logits_of_all_tokens_never_exist(model, rows):
    """The compiled program's temporaries stay below one [tokens, V] in float32, for any kind of target."""
    config = dataclasses.replace(CONFIG, vocab_size=8192, num_hidden_layers=1)
    large = jax.eval_shape(lambda: Qwen3(config, jax.random.key(0)))
    shape = jax.ShapeDtypeStruct((8, 512), np.int32)
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    logits_bytes = 8 * 512 * config.vocab_size * 4
    for program, more in (
        (scoring._top_k, (K,)),
        (scoring._at_ids, (jax.ShapeDtypeStruct((8, 512, K), np.int32), K)),
        (scoring._hidden, ()),
    ):
        compiled = program.lower(large, shape, shape, shape, *more, mesh).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes / 4


def test_a_mesh_takes_no_more_blocks_of_tokens_than_one_device_and_gathers_the_head_once():
    config = dataclasses.replace(CONFIG, vocab_size=4096)
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2))
    model = placed_shapes(jax.eval_shape(lambda: Qwen3(config, jax.random.key(0))), mesh)
    function, arguments = scoring.top_k_program(model, mesh, rows=4, length=4 * BLOCK_TOKENS, k=K)
    found = collectives(function.lower(*arguments).compile().as_text())
    # Each of the two devices that share the words of the head gathers its half; all else is done once a block.
    half_bytes = config.vocab_size * config.hidden_size * 4 / 2
    assert [one.times for one in found if one.kind == "all-gather" and one.whole_bytes == half_bytes] == [1]
    assert max(one.times for one in found) == 4


def test_drawn_words_are_each_rollouts_own_and_repeat(model, rollouts, alone, monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 40)
    scorer, _ = next(scorers(model))
    shape = {"rows": 7, "length": 16, "pad_id": 0}
    first, again = (scorer.sample_rollouts(rollouts, sampled_tokens=12, seed=3, number=1, **shape) for _ in range(2))
    for record, repeated, expected in zip(first, again, alone, strict=True):
        expected = expected[: len(record.rollout.tokens)]
        np.testing.assert_array_equal(record.ids, repeated.ids)
        np.testing.assert_allclose(record.entropy, -np.sum(np.exp(expected) * expected, -1), **TOLERANCE)
        np.testing.assert_allclose(np.sum(np.exp(record.logprobs), -1), 1, **TOLERANCE)
    other = scorer.sample_rollouts(rollouts, sampled_tokens=12, seed=3, number=2, **shape)
    assert any(np.any(one.ids != two.ids) for one, two in zip(first, other, strict=True))
