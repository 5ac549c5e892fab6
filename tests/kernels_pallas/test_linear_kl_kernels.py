"""The linear KL's kernels, interpreted on CPU, against the float64 reference: loss, statistics, both gradients; of
random shapes XLA's too.

What the interpreters cover and what not is said in `interpreters.py`. They look for races here.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import platforms
from kernels_pallas.linear_kl import Divergence, linear_kl_at_ids, linear_kl_full, passes, tpu
from tests.kernels_pallas.interpreters import interpret
from tests.kernels_pallas.test_linear_kl import DIVERGENCES, largest_array

FORWARD, REVERSE, JSD, SKEW = DIVERGENCES


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several of them for small operands, and parts of the vocabulary that no block divides."""
    monkeypatch.setattr(tpu, "_BLOCK_TOKENS", 128)
    monkeypatch.setattr(tpu, "_BLOCK_VOCAB", 128)
    monkeypatch.setattr(passes, "_PART", 192)
    monkeypatch.setattr(passes, "_PART_BYTES", 1)


def make_inputs(kind, tokens, widths, vocab, named, live, dtype, seed=0):
    """Arguments of the loss: a teacher that is like its student, its first words or any others named, some absent."""
    rng = np.random.default_rng(seed)
    shape, (width, teacher_width) = (1 + tokens % 2, -(-tokens // (1 + tokens % 2))), widths
    pairs = []
    for outer in (shape, (vocab,)):
        student, teacher = (rng.normal(size=(*outer, size)) for size in widths)
        same = min(widths)
        teacher[..., :same] = student[..., :same] + 0.3 * teacher[..., :same]
        pairs.append((student, teacher))
    (hidden, teacher_hidden), (head, teacher_head) = pairs
    heads = head * 1.5 * width**-0.5, teacher_head * 1.5 * teacher_width**-0.5
    hidden, head, teacher_hidden, teacher_head = (
        jnp.asarray(x, dtype) for x in (hidden, heads[0], teacher_hidden, heads[1])
    )
    weights = jnp.asarray(rng.random(shape) * (rng.random(shape) < live), jnp.float32)
    if kind == "full":
        return hidden, head, teacher_hidden, teacher_head, weights
    logits = np.einsum("BTD,VD->BTV", *(np.asarray(x, np.float64) for x in (teacher_hidden, teacher_head)))
    words = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-words)[..., :named]
    ids[:, ::3] = rng.permuted(np.broadcast_to(np.arange(vocab), (*ids[:, ::3].shape[:2], vocab)), axis=-1)[..., :named]
    ids[:, ::2, 1:2] = -1
    logprobs = np.where(ids < 0, -np.inf, np.take_along_axis(words, np.maximum(ids, 0), -1))
    with np.errstate(divide="ignore"):  # of an empty tail
        tail = np.log(np.maximum(0, 1 - np.exp(logprobs).sum(-1)))
    return hidden, head, jnp.asarray(ids, jnp.int32), *(jnp.asarray(x, jnp.float32) for x in (logprobs, tail)), weights


def loss_and_gradients(kind, inputs, divergence, implementation):
    function = linear_kl_full if kind == "full" else linear_kl_at_ids

    def loss(hidden, head, *constants):
        return function(hidden, head, *constants, divergence=divergence, implementation=implementation)

    return jax.block_until_ready(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*inputs))


def check(implementation, kind, inputs, divergence):
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in inputs]
        expected = jax.tree.map(np.asarray, loss_and_gradients(kind, wide, divergence, "reference"))
    with interpret(implementation) if implementation in ("tpu", "gpu") else contextlib.nullcontext():
        results = loss_and_gradients(kind, inputs, divergence, implementation)
    # Float32 rounding of logits, then of sums.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), results[0], expected[0])
    for mine, theirs in zip(results[1], expected[1], strict=True):
        assert mine.dtype == inputs[0].dtype
        # Bfloat16 keeps 8 bits of the derivative by a logit and of the sum.
        share = 1e-5 if mine.dtype == jnp.float32 else 0.01
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=share * max(1e-3, np.abs(theirs).max()))
    return results


CASES = [
    # platform, kind, tokens, widths, vocabulary, named, share of live tokens, dtype, divergence
    pytest.param("tpu", "at_ids", 200, (40, 64), 300, 17, 0.7, jnp.bfloat16, FORWARD, marks=pytest.mark.long),
    ("tpu", "at_ids", 1, (8, 8), 130, 1, 1, jnp.float32, REVERSE),
    ("tpu", "at_ids", 5, (8, 8), 7, 7, 1, jnp.float32, SKEW),
    ("tpu", "full", 200, (40, 64), 300, 0, 0.7, jnp.bfloat16, JSD),
    pytest.param("tpu", "full", 131, (64, 40), 130, 0, 0.7, jnp.float32, FORWARD, marks=pytest.mark.long),
    ("gpu", "at_ids", 200, (64, 40), 300, 17, 0.7, jnp.bfloat16, FORWARD),
    pytest.param("gpu", "at_ids", 1, (64, 8), 70, 70, 1, jnp.bfloat16, SKEW, marks=pytest.mark.long),
    ("gpu", "full", 131, (64, 128), 300, 0, 0.7, jnp.bfloat16, REVERSE),
]


@pytest.mark.parametrize(
    ("platform", "kind", "tokens", "widths", "vocab", "named", "live", "dtype", "divergence"), CASES
)
def test_loss_statistics_and_both_gradients(platform, kind, tokens, widths, vocab, named, live, dtype, divergence):
    inputs = make_inputs(kind, tokens, widths, vocab, named, live, dtype)
    (_, stats), _ = check(platform, kind, inputs, divergence)
    if tokens >= 128:
        assert 0 < np.mean(stats["top1_agreement"]) < live


@st.composite
def drawn(draw, width, dtype):
    """A kind, its inputs and a divergence."""
    kind = draw(st.sampled_from(["at_ids", "full"]))
    inputs = make_inputs(
        kind,
        tokens=draw(st.integers(1, 300)),
        widths=(draw(width), draw(width)),
        vocab=draw(st.integers(20, 600)),
        named=draw(st.integers(1, 20)),
        live=draw(st.sampled_from([0.5, 1])),
        dtype=draw(dtype),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return kind, inputs, draw(st.sampled_from(DIVERGENCES))


@pytest.mark.long
@settings(max_examples=6, deadline=None, derandomize=True)
@given(drawn(st.integers(1, 80), st.sampled_from([jnp.float32, jnp.bfloat16])))
def test_xla(case):
    check("xla", *case)


@pytest.mark.long
@settings(max_examples=3, deadline=None, derandomize=True)
@given(drawn(st.integers(1, 80), st.sampled_from([jnp.float32, jnp.bfloat16])))
def test_tpu(case):
    check("tpu", *case)


@pytest.mark.long
@settings(max_examples=2, deadline=None, derandomize=True)
@given(drawn(st.sampled_from([64, 128]), st.just(jnp.bfloat16)))
def test_gpu(case):
    check("gpu", *case)


@pytest.mark.parametrize("kind", ["at_ids", "full"])
def test_positions_of_weight_zero_add_exactly_nothing(kind):
    hidden, head, *constants = make_inputs(kind, 6, (8, 8), 40, 3, 0, jnp.float32)
    with interpret("tpu"):
        inputs = (jnp.full_like(hidden, jnp.nan), head, *constants)
        (loss, stats), gradients = loss_and_gradients(kind, inputs, REVERSE, "tpu")
    assert all(not np.any(array) for array in (loss, *stats.values(), *gradients))


@pytest.mark.parametrize("kind", ["at_ids", "full"])
def test_no_array_of_tokens_times_vocabulary_exists(kind, monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    inputs = make_inputs(kind, 512, (8, 8), 3000, 3, 1, jnp.bfloat16)
    function = linear_kl_full if kind == "full" else linear_kl_at_ids

    def loss(hidden, head):
        return function(hidden, head, *inputs[2:], divergence=JSD, implementation="tpu")[0]

    largest = largest_array(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*inputs[:2]).jaxpr)
    # The derivatives by the logits of one part, or the tables of a kernel's grid where they are made.
    assert 192 * 512 <= largest <= 512 * 3000 / 8


def test_rounds_are_the_most_ids_of_a_token_in_a_block():
    ids = jnp.asarray([[0, 3, 4, -1], [9, 8, 7, 0], [4, 5, 6, 7]], jnp.int32)
    np.testing.assert_array_equal(passes.rounds(ids, 2, 4, 10), [[2, 1, 2], [0, 4, 0]])


def test_what_a_kernel_does_not_take_is_refused(monkeypatch):
    inputs = make_inputs("full", 6, (8, 8), 40, 0, 1, jnp.float32)
    options = {"divergence": Divergence("forward_kl"), "implementation": "tpu"}
    with pytest.raises(ValueError, match="'tpu' of linear_kl needs TPU, this platform is cpu"):
        linear_kl_full(*inputs, **options)
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    mixed = (*inputs[:2], inputs[2].astype(jnp.bfloat16), *inputs[3:])
    with pytest.raises(ValueError, match=r"teacher_hidden and teacher_head have dtypes bfloat16, float32; .*'tpu'"):
        linear_kl_full(*mixed, **options)
    with pytest.raises(ValueError, match="ids names 300 entries; implementation 'tpu' of linear_kl takes at most 256"):
        linear_kl_at_ids(*make_inputs("at_ids", 2, (8, 8), 700, 300, 1, jnp.float32), **options)
    with (
        jax.set_mesh(jax.make_mesh((2, 4), ("data", "tensor"))),
        pytest.raises(ValueError, match=r"works on one device's arrays, the mesh has 8 devices; .*shard_map"),
    ):
        linear_kl_full(*inputs, **options)
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    options["implementation"] = "gpu"
    with pytest.raises(ValueError, match=r"hidden and head have dtypes float32; .*'gpu' .* takes one of bfloat16"):
        linear_kl_full(*inputs, **options)
    with pytest.raises(ValueError, match=r"hidden and head are 8 wide; .*'gpu' of linear_kl takes multiples of 64"):
        linear_kl_full(*(x.astype(jnp.bfloat16) for x in inputs), **options)
