"""Targets against the whole log-softmax in float64, with their tails, blocks, repetitions and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from teacher.targets import (
    AtIds,
    Hidden,
    TopK,
    at_ids_targets,
    one_hot,
    sampled_targets,
    top_k_targets,
    unique_ids,
)

B, T, D, V, J = 8, 5, 6, 23, 4


@pytest.fixture(scope="module")
def teacher():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    logits = np.einsum("BTD,VD->BTV", hidden.astype(np.float64), head)
    words = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return jnp.asarray(hidden), jnp.asarray(head), words


def log_tail(words, ids):
    named = (ids[..., None] == np.arange(V)).any(-2)
    return np.log(np.where(named, 0, np.exp(words)).sum(-1))


@pytest.mark.parametrize("block_tokens", [1, 16, 24, 1000])  # blocks of 1, 2, 3 and all 5 positions
def test_top_k_is_the_log_softmax_never_renormalised(teacher, block_tokens):
    hidden, head, words = teacher
    targets = jax.jit(top_k_targets, static_argnames=("k", "block_tokens"))(hidden, head, J, block_tokens=block_tokens)
    order = np.argsort(-words, -1)[..., :J]
    np.testing.assert_array_equal(targets.ids, order)
    # float32 logits of size ten
    np.testing.assert_allclose(targets.logprobs, np.take_along_axis(words, order, -1), atol=1e-5)
    np.testing.assert_allclose(targets.log_tail, log_tail(words, order), atol=1e-5)
    assert targets.ids.dtype == jnp.int32
    assert targets.logprobs.dtype == targets.log_tail.dtype == jnp.float32


def test_every_word_leaves_an_empty_tail(teacher):
    hidden, head, _ = teacher
    targets = top_k_targets(hidden, head, V)
    assert np.all(targets.log_tail == -np.inf)
    np.testing.assert_allclose(np.exp(targets.logprobs).sum(-1), 1, rtol=1e-5)  # float32


def test_the_tail_is_exact_where_one_minus_the_sum_is_zero():
    hidden, head = jnp.ones((1, 1, 1)), jnp.zeros((V, 1)).at[3].set(100.0)
    targets = top_k_targets(hidden, head, 1)
    assert targets.ids.tolist() == [[[3]]]
    np.testing.assert_allclose(targets.log_tail, np.log(V - 1) - 100, rtol=1e-6)  # float32


@pytest.mark.parametrize("block_tokens", [16, 1000])
def test_at_ids_answers_each_question_once(teacher, block_tokens):
    hidden, head, words = teacher
    ids = np.random.default_rng(1).integers(-1, V, size=(B, T, J + 2)).astype(np.int32)
    ids[..., -1] = ids[..., 0]
    targets = jax.jit(at_ids_targets, static_argnames="block_tokens")(hidden, head, ids, block_tokens=block_tokens)
    np.testing.assert_array_equal(targets.ids, unique_ids(ids))
    absent = np.asarray(targets.ids) < 0
    assert absent[..., -1].all()
    assert np.all(np.asarray(targets.logprobs)[absent] == -np.inf)
    expected = np.take_along_axis(words, np.maximum(ids, 0), -1)
    # float32 logits of size ten
    np.testing.assert_allclose(np.asarray(targets.logprobs)[~absent], expected[~absent], atol=1e-5)
    np.testing.assert_allclose(targets.log_tail, log_tail(words, np.asarray(targets.ids)), atol=1e-5)
    more = jax.jit(at_ids_targets, static_argnames=("top_k", "block_tokens"))(
        hidden, head, ids, top_k=J, block_tokens=block_tokens
    )
    np.testing.assert_array_equal(more.ids[..., : J + 2], targets.ids)
    named = np.concatenate((ids, np.argsort(-words, -1)[..., :J]), axis=-1)
    np.testing.assert_array_equal(more.ids, unique_ids(named))
    np.testing.assert_allclose(more.log_tail, log_tail(words, named), atol=1e-5)


def test_top_k_and_at_ids_agree(teacher):
    hidden, head, _ = teacher
    top = top_k_targets(hidden, head, J)
    at = at_ids_targets(hidden, head, top.ids[..., ::-1])
    # The same float32 logits, multiplied out again.
    np.testing.assert_allclose(at.logprobs[..., ::-1], top.logprobs, atol=1e-6)
    np.testing.assert_allclose(at.log_tail, top.log_tail, atol=1e-6)


def test_unique_ids_keeps_the_first_of_each():
    ids = jnp.array([[5, 2, 5, -1, 2, 0, -7], [1, 1, 1, 1, 1, 1, 1]])
    assert unique_ids(ids).tolist() == [[5, 2, -1, -1, -1, 0, -1], [1, -1, -1, -1, -1, -1, -1]]


def test_one_hot_is_the_next_word_at_the_predicting_position():
    targets = one_hot(jnp.array([[7, 8, 9]]))
    assert targets.ids.tolist() == [[[8], [9], [-1]]]
    assert targets.logprobs.tolist() == [[[0.0], [0.0], [-np.inf]]]
    assert targets.log_tail.tolist() == [[-np.inf, -np.inf, 0.0]]


def test_sharded_over_the_batch_equals_unsharded(teacher):
    hidden, head, _ = teacher
    whole = top_k_targets(hidden, head, J, block_tokens=16)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    placed = jax.device_put(hidden, NamedSharding(mesh, PartitionSpec("data")))
    compute = jax.jit(top_k_targets, static_argnames=("k", "block_tokens"))
    sharded = compute(placed, head, J, block_tokens=16)
    np.testing.assert_array_equal(sharded.ids, whole.ids)
    np.testing.assert_allclose(sharded.logprobs, whole.logprobs, atol=1e-6)  # float32, fused otherwise


@pytest.mark.parametrize(
    "targets",
    [
        TopK(ids=jnp.zeros((2, 3)), logprobs=jnp.zeros((2, 3)), log_tail=jnp.zeros(2)),
        AtIds(ids=jnp.zeros((2, 3)), logprobs=jnp.zeros((2, 3)), log_tail=jnp.zeros(2)),
        Hidden(hidden=jnp.zeros((2, 3))),
    ],
    ids=lambda targets: type(targets).__name__,
)
def test_targets_travel_as_pytrees(targets):
    halves = jax.jit(lambda t: jax.tree.map(lambda leaf: leaf[:1], t))(targets)
    assert type(halves) is type(targets)
    assert all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(halves))


@pytest.mark.parametrize("k", [0, V + 1])
def test_an_impossible_k_is_refused(teacher, k):
    with pytest.raises(ValueError, match=f"k {k} must lie between 1 and the vocabulary's {V} tokens"):
        top_k_targets(*teacher[:2], k)


def test_sampled_tokens_stand_for_the_teacher_on_average(teacher):
    hidden, head, words = teacher
    sampled_tokens, rounds = 3, 2000
    keys = jax.random.split(jax.random.key(0), rounds)

    @jax.jit
    def mean_shares(keys):
        def add(total, key):
            drawn = sampled_targets(hidden, head, sampled_tokens, key)
            return total + jnp.sum(jnp.exp(drawn.log_shares)[..., None] * jax.nn.one_hot(drawn.ids, V), axis=-2), None

        return jax.lax.scan(add, jnp.zeros((B, T, V)), keys)[0] / rounds

    p = np.exp(words)
    # Five standard deviations of a mean of rounds · draws indicators, and five draws for words of hardly any mass.
    noise = np.sqrt(p * (1 - p) / (rounds * sampled_tokens))
    np.testing.assert_array_less(np.abs(mean_shares(keys) - p), 5 * noise + 5 / (rounds * sampled_tokens))


@pytest.mark.parametrize("block_tokens", [16, 24, 1000])  # blocks of 2, 3 and all 5 positions
def test_draws_are_shares_without_duplicates_beside_the_exact_entropy(teacher, block_tokens):
    hidden, head, words = teacher
    key = jax.random.key(1)
    targets = sampled_targets(hidden, head, 6, key, block_tokens=block_tokens)
    np.testing.assert_allclose(np.exp(targets.log_shares).sum(-1), 1, rtol=1e-6)  # float32
    np.testing.assert_array_equal(targets.ids, unique_ids(targets.ids))
    np.testing.assert_array_equal(targets.ids < 0, np.isneginf(targets.log_shares))
    np.testing.assert_allclose(targets.entropy, -(np.exp(words) * words).sum(-1), rtol=1e-5, atol=1e-6)  # float32
    np.testing.assert_array_equal(targets.ids, sampled_targets(hidden, head, 6, key).ids)


def test_a_word_without_mass_is_never_drawn():
    hidden, head = jnp.ones((1, 1, 1)), jnp.full((V, 1), -200.0).at[jnp.array([3, 7])].set(0.0)
    targets = sampled_targets(hidden, head, 64, jax.random.key(0))
    assert set(np.unique(targets.ids)) == {-1, 3, 7}
    np.testing.assert_allclose(targets.entropy, np.log(2), rtol=1e-6)  # float32


def test_at_least_one_word_is_drawn(teacher):
    hidden, head, _ = teacher
    with pytest.raises(ValueError, match="sampled_tokens 0 must be at least 1"):
        sampled_targets(hidden, head, 0, jax.random.key(0))
