"""The blocked divergence against its definition, and the properties that a trainer relies on."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.linear_kl import Divergence, linear_kl_at_ids, linear_kl_full
from kernels_pallas.linear_kl.divergence import contribution_and_slope

B, T, D, DT, V, J = 2, 7, 8, 12, 37, 5
DIVERGENCES = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd", 0.3),
    Divergence("skew_kl", 0.4),
]
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)
each_kind = pytest.mark.parametrize("kind", ["full", "at_ids"])
# The blocks of most tests divide neither T (7) nor V (37).
BLOCKS = {"block_tokens": 6, "block_vocab": 8}


def make_inputs(seed=0, dtype=np.float64, scale=1.0, batch=B):
    """Arguments of `loss_of` as a dict; logits have a standard deviation of `scale`."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(batch, T, D)), rng.normal(size=(V, D)) * scale / math.sqrt(D)
    teacher_hidden, teacher_head = rng.normal(size=(batch, T, DT)), rng.normal(size=(V, DT)) * scale / math.sqrt(DT)
    weights = rng.random((batch, T)) * (rng.random((batch, T)) > 0.3)
    ids = np.stack([rng.permutation(V)[:J] for _ in range(batch * T)]).reshape(batch, T, J).astype(np.int32)
    ids[:, ::2, 1] = -1
    floats = {
        "hidden": hidden,
        "head": head,
        "teacher_hidden": teacher_hidden,
        "teacher_head": teacher_head,
        "weights": weights,
    }
    return {name: array.astype(dtype) for name, array in floats.items()} | {"ids": ids}


def loss_of(inputs, kind, divergence, hidden=None, head=None, **options):
    hidden = inputs["hidden"] if hidden is None else hidden
    head = inputs["head"] if head is None else head
    if kind == "full":
        teacher = inputs["teacher_hidden"], inputs["teacher_head"]
        return linear_kl_full(hidden, head, *teacher, inputs["weights"], divergence=divergence, **options)
    logits = jnp.einsum("BTD,VD->BTV", inputs["teacher_hidden"], inputs["teacher_head"])
    ids = inputs["ids"]
    words = jax.nn.log_softmax(logits)
    logprobs = jnp.where(ids < 0, -jnp.inf, jnp.take_along_axis(words, jnp.maximum(ids, 0), -1))
    rest = jnp.where((ids[..., None] == jnp.arange(V)).any(-2), -jnp.inf, words)
    tail = jax.nn.logsumexp(rest, -1)
    return linear_kl_at_ids(hidden, head, ids, logprobs, tail, inputs["weights"], divergence=divergence, **options)


def loss_and_gradients(inputs, kind, divergence, **options):
    def loss(hidden, head):
        return loss_of(inputs, kind, divergence, hidden, head, **options)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(inputs["hidden"], inputs["head"])


def assert_close(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


@each_divergence
@each_kind
def test_loss_statistics_and_gradients_equal_the_reference_in_float64(divergence, kind):
    with jax.enable_x64(True):
        inputs = make_inputs()
        whole = loss_and_gradients(inputs, kind, divergence, implementation="reference")
        blockings = [BLOCKS]
        if divergence.name == "reverse_kl":  # which walks the vocabulary most often
            blockings += [{"block_tokens": 100, "block_vocab": 100}, {"block_tokens": 1, "block_vocab": 37}]
        for blocks in blockings:
            blocked = loss_and_gradients(inputs, kind, divergence, **blocks)
            assert blocked[0][0].dtype == jnp.float64
            # Float64 rounding of sums over 37 words.
            assert_close(blocked, whole, rtol=1e-11, atol=1e-13)


def test_the_loss_alone_and_a_frozen_head_cost_less():
    inputs = make_inputs(dtype=np.float32)

    def loss(hidden, head):  # one block of everything, because XLA counts the work of one turn of a loop
        return loss_of(inputs, "full", Divergence("jsd", 0.3), hidden, head, block_vocab=V, block_tokens=100)

    flops, losses = {}, {}
    for name, function in {
        "loss": loss,
        "hidden": jax.value_and_grad(loss, 0, has_aux=True),
        "both": jax.value_and_grad(loss, (0, 1), has_aux=True),
    }.items():
        compiled = jax.jit(function).lower(inputs["hidden"], inputs["head"]).compile()
        flops[name] = compiled.cost_analysis()["flops"]
        losses[name] = jax.tree.leaves(compiled(inputs["hidden"], inputs["head"]))[0]
    product = 2 * B * T * D * V
    assert flops["loss"] + product <= flops["hidden"]
    assert flops["hidden"] + product <= flops["both"]
    # The same float32 operations, which XLA may fuse in another order.
    np.testing.assert_allclose(losses["loss"], losses["both"], rtol=1e-5)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (Divergence("forward_kl"), 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)),
        (Divergence("reverse_kl"), 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)),
        (Divergence("skew_kl", 0.2), 0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7)),
        (
            Divergence("jsd", 0.2),
            0.2 * (0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7))
            + 0.8 * (0.25 * math.log(0.25 / 0.3) + 0.75 * math.log(0.75 / 0.7)),
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_directions_and_weights_by_hand(divergence, expected, implementation):
    """Teacher (1/2, 1/2), student (1/4, 3/4); a mixture of weight 0.2 is (0.3, 0.7)."""
    one = jnp.ones((1, 1, 1))
    teacher, student = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.25], [0.75]]))
    loss, _ = linear_kl_full(
        one, student, one, teacher, one[..., 0], divergence=divergence, implementation=implementation
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # float32


@each_divergence
def test_a_bucket_without_mass_has_finite_value_and_slope(divergence):
    empty, half = jnp.float32(-jnp.inf), jnp.log(jnp.float32(0.5))
    value, slope = contribution_and_slope(divergence, empty, empty)
    assert value == 0
    assert slope == 0
    if divergence.name != "reverse_kl":  # which is infinite, truly, where the teacher has no mass at all
        assert all(jnp.isfinite(x) for x in contribution_and_slope(divergence, empty, half))
    if divergence.name != "forward_kl":  # which is infinite, truly, where the student has no mass at all
        assert all(jnp.isfinite(x) for x in contribution_and_slope(divergence, half, empty))


@each_divergence
def test_slopes_are_the_derivatives(divergence):
    with jax.enable_x64(True):
        teacher, student = -np.random.default_rng(0).exponential(5, (2, 200))
        _, slope = contribution_and_slope(divergence, teacher, student)
        derivative = jax.vmap(jax.grad(lambda s, t: contribution_and_slope(divergence, t, s)[0]))(student, teacher)
        np.testing.assert_allclose(slope, derivative, rtol=1e-9, atol=1e-15)  # float64, terms that cancel


@functools.cache
def jitted_gradients(kind, divergence):
    """Inputs to loss, statistics and gradients, in blocks, compiled once for all tests."""

    def run(inputs):
        def loss(hidden, head):
            return loss_of(inputs, kind, divergence, hidden, head, **BLOCKS)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(inputs["hidden"], inputs["head"])

    return jax.jit(run)


@functools.cache
def compiled_pair(divergence):
    """Full and at-ids divergences per position, jitted once for all drawn examples."""

    def both(inputs):
        whole = loss_of(inputs, "full", divergence, **BLOCKS)[1]["divergence"]
        coarse = loss_of(inputs, "at_ids", divergence, **BLOCKS)[1]["divergence"]
        return whole, coarse

    return jax.jit(both)


@each_divergence
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 0.1, 1.0, 5.0, 30.0]))
def test_never_negative_and_never_more_over_coarser_buckets(divergence, seed, scale):
    inputs = make_inputs(seed, np.float32, scale)
    whole, coarse = compiled_pair(divergence)(inputs)
    # Every bucket's share is non-negative, so only rounding of log-probabilities up to 40·scale remains.
    rounding = 1e-6 + 1e-7 * 40 * scale
    assert np.all(whole >= -rounding)
    assert np.all(coarse >= -rounding)
    # Data-processing inequality of every f-divergence; relative rounding of the larger number.
    assert np.all(coarse <= whole * (1 + 1e-5) + rounding)


def with_student_as_teacher(inputs):
    """The student's arrays, as wide as any other teacher here but with nothing in the surplus."""
    equal = {
        side: np.pad(inputs[side], [(0, 0)] * (inputs[side].ndim - 1) + [(0, DT - D)]) for side in ("hidden", "head")
    }
    return inputs | {f"teacher_{side}": array for side, array in equal.items()}


@each_divergence
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_zero_where_student_and_teacher_are_equal(divergence, seed, scale):
    inputs = with_student_as_teacher(make_inputs(seed, np.float32, scale))
    for values in compiled_pair(divergence)(inputs):
        # The two log-probabilities differ by rounding only, which enters a divergence to the second order.
        assert np.all(np.abs(values) < 2e-6)


@each_kind
def test_an_equal_student_is_left_alone(kind):
    inputs = with_student_as_teacher(make_inputs(dtype=np.float32))
    (_, stats), gradients = jitted_gradients(kind, Divergence("reverse_kl"))(inputs)
    assert all(np.abs(gradient).max() < 1e-5 for gradient in gradients)  # float32 rounding of 14 positions
    np.testing.assert_allclose(stats["student_entropy"], entropy(inputs), rtol=1e-4, atol=1e-6)
    if kind == "full":
        np.testing.assert_allclose(stats["teacher_entropy"], stats["student_entropy"], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(stats["top1_agreement"], inputs["weights"] != 0)


def entropy(inputs):
    words = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", inputs["hidden"], inputs["head"]))
    return jnp.where(inputs["weights"] != 0, -(jnp.exp(words) * words).sum(-1), 0)


@each_kind
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_positions_of_weight_zero_add_exactly_nothing(kind, garbage):
    clean = make_inputs(dtype=np.float32)
    dead = clean["weights"] == 0
    assert dead.any()
    dirty = {name: array.copy() for name, array in clean.items()}
    dirty["hidden"][dead] = garbage
    dirty["teacher_hidden"][dead] = garbage  # and with it the log-probabilities of the at-ids targets
    run = jitted_gradients(kind, Divergence("reverse_kl"))
    clean_result, dirty_result = run(clean), run(dirty)
    assert_close(dirty_result, clean_result, rtol=0, atol=0)
    (_, stats), (by_hidden, _) = dirty_result
    assert np.all(np.asarray(by_hidden)[dead] == 0)
    assert all(np.all(np.asarray(value)[dead] == 0) for value in stats.values())


@each_kind
def test_padding_and_splitting_a_batch_change_nothing(kind):
    divergence = Divergence("reverse_kl")
    inputs = make_inputs(dtype=np.float32, batch=2 * B)
    (loss, _), (by_hidden, by_head) = jitted_gradients(kind, divergence)(inputs)

    per_row = ("hidden", "teacher_hidden", "weights", "ids")
    halves = [
        jitted_gradients(kind, divergence)({n: a[rows] if n in per_row else a for n, a in inputs.items()})
        for rows in (slice(0, B), slice(B, 2 * B))
    ]
    # The same float32 terms added in another order.
    np.testing.assert_allclose(sum(half[0][0] for half in halves), loss, rtol=1e-5)
    np.testing.assert_allclose(sum(half[1][1] for half in halves), by_head, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([half[1][0] for half in halves]), by_hidden, rtol=1e-4, atol=1e-6)

    pad = {name: [(0, 0), (0, 4)] + [(0, 0)] * (inputs[name].ndim - 2) for name in per_row}
    padded = {n: np.pad(a, pad[n]) if n in pad else a for n, a in inputs.items()}
    (padded_loss, _), (padded_hidden, padded_head) = jitted_gradients(kind, divergence)(padded)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(padded_hidden[:, :T], by_hidden, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(padded_hidden[:, T:], 0)
    np.testing.assert_allclose(padded_head, by_head, rtol=1e-4, atol=1e-6)


@each_kind
def test_the_students_tail_is_exact_where_its_mass_underflows(kind):
    """Word 0 leads by 200 nats: 1 - Σ exp would be 0 and its logarithm -inf. Both tails are uniform, so the divergence
    over words is that over the two buckets."""
    one, tail_mass = jnp.ones((1, 1, 1)), 0.25
    head = jnp.zeros((V, 1)).at[0].set(200.0)
    teacher = jnp.log(jnp.full((V, 1), tail_mass / (V - 1)).at[0].set(1 - tail_mass))

    def loss(hidden, head):
        options = {"divergence": Divergence("forward_kl"), "block_vocab": 8}
        if kind == "full":
            return linear_kl_full(hidden, head, one, teacher, one[..., 0], **options)[0]
        logprobs, tail = jnp.log1p(-tail_mass * one), jnp.log(tail_mass * one[..., 0])
        return linear_kl_at_ids(hidden, head, jnp.zeros((1, 1, 1), int), logprobs, tail, one[..., 0], **options)[0]

    value, (by_hidden, by_head) = jax.jit(jax.value_and_grad(loss, (0, 1)))(one, head)
    student_log_tail = math.log(V - 1) - 200
    expected = tail_mass * (math.log(tail_mass) - student_log_tail) + (1 - tail_mass) * math.log(1 - tail_mass)
    np.testing.assert_allclose(value, expected, rtol=1e-5)  # float32
    np.testing.assert_allclose(by_hidden, 200 * tail_mass, rtol=1e-5)
    # Each unnamed word is pulled up by its part of the missing mass.
    np.testing.assert_allclose(by_head[1:, 0], -tail_mass / (V - 1), rtol=1e-5)


def largest_array(jaxpr) -> int:
    """The most elements of any array that a jaxpr or one of its loops makes."""
    found = [0]
    for equation in jaxpr.eqns:
        found += [math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars]
        found += [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
    return max(found)


@pytest.mark.parametrize(("vocab", "block"), [(3000, 500), (3001, 512), (20000, 999)])
@each_kind
def test_memory_is_that_of_the_formula_and_no_array_of_tokens_times_vocabulary_exists(kind, vocab, block):
    batch, length, width, named, tokens = 2, 128, 4, 8, 16
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (batch, length, width)), jax.random.normal(keys[1], (vocab, width))
    weights = jnp.ones((batch, length))
    # The divergence that walks the vocabulary most often.
    options = {"divergence": Divergence("jsd", 0.3), "block_tokens": tokens, "block_vocab": block}

    def loss(hidden, head):
        if kind == "full":
            return linear_kl_full(hidden, head, hidden + 1, head, weights, **options)
        ids = jnp.tile(jnp.arange(named), (batch, length, 1))
        logprobs = jnp.full(ids.shape, math.log(0.5 / named))
        return linear_kl_at_ids(hidden, head, ids, logprobs, weights * math.log(0.5), weights, **options)

    function = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    traced = function.trace(hidden, head)
    assert largest_array(traced.jaxpr.jaxpr) < batch * length * vocab / 8 + 1
    whole = -(-vocab // block) * block
    formula = {
        "full": 4 * tokens * (2 * vocab + 8 * block) + 4 * block * width,
        "at_ids": 4 * tokens * (whole + 4 * block) + 4 * block * width,
    }[kind]
    used = traced.lower().compile().memory_analysis().temp_size_in_bytes
    # XLA may share a block's arrays better than the formula allows, or keep some small ones beside.
    assert formula / 1.5 < used < formula * 1.05 < 4 * batch * length * vocab


@each_kind
def test_bfloat16_inputs_accumulate_in_float32(kind):
    divergence = Divergence("forward_kl")
    exact = make_inputs(dtype=jnp.bfloat16)
    wide = {name: array.astype(np.float32) if name != "ids" else array for name, array in exact.items()}
    exact["weights"] = wide["weights"]
    (loss, stats), gradients = loss_and_gradients(exact, kind, divergence)
    (wide_loss, _), wide_gradients = loss_and_gradients(wide, kind, divergence)
    assert loss.dtype == stats["divergence"].dtype == jnp.float32
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)
    if kind == "full":  # the at-ids targets of this test are themselves computed in bfloat16
        np.testing.assert_allclose(loss, wide_loss, rtol=1e-5)
    # Eight bits of mantissa in the logit gradient, the operands and the result.
    assert_close(
        jax.tree.map(lambda g: g.astype(jnp.float32), gradients),
        wide_gradients,
        rtol=0.05,
        atol=0.02 * max(float(jnp.abs(g).max()) for g in wide_gradients),
    )


@each_kind
@pytest.mark.parametrize(
    ("axes", "block_vocab"), [({"data": 4, "tensor": 2}, 40), ({"data": 2, "fsdp": 2, "tensor": 2}, 16)]
)
def test_sharded_equals_unsharded(kind, axes, block_vocab):
    inputs = make_inputs(dtype=np.float32, batch=8)
    for head in ("head", "teacher_head"):  # 40 words, so that two shards divide them
        inputs[head] = np.concatenate([inputs[head], inputs[head][: 40 - V]])
    inputs["ids"] = np.arange(J, dtype=np.int32) + np.zeros((8, T, 1), np.int32)
    divergence = Divergence("jsd", 0.3)
    whole = jitted_gradients_at(kind, divergence, block_vocab)(inputs)

    mesh = Mesh(np.array(jax.devices()[: math.prod(axes.values())]).reshape(tuple(axes.values())), tuple(axes))
    rows = tuple(axis for axis in axes if axis != "tensor")
    vocab = PartitionSpec("tensor" if "tensor" in axes else None, "fsdp" if "fsdp" in axes else None)
    specs = {name: vocab if "head" in name else PartitionSpec(rows) for name in inputs}
    placed = {name: jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in inputs.items()}
    compiled = jitted_gradients_at(kind, divergence, block_vocab).lower(placed).compile()
    # The same float32 terms added in another order.
    assert_close(compiled(placed), whole, rtol=1e-4, atol=1e-6)
    if block_vocab == len(inputs["head"]) and "fsdp" not in axes:
        assert "all-gather" not in compiled.as_text(), "some device holds another's batch or vocabulary"


def jitted_gradients_at(kind, divergence, block_vocab):
    def run(inputs):
        def loss(hidden, head):
            if kind == "full":
                teacher = inputs["teacher_hidden"], inputs["teacher_head"]
                return linear_kl_full(hidden, head, *teacher, inputs["weights"], **options)
            logprobs = jnp.full(inputs["ids"].shape, math.log(0.1))
            tail = jnp.full(inputs["weights"].shape, math.log(0.5))
            return linear_kl_at_ids(hidden, head, inputs["ids"], logprobs, tail, inputs["weights"], **options)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(inputs["hidden"], inputs["head"])

    options = {"divergence": divergence, "block_tokens": 16, "block_vocab": block_vocab}
    return jax.jit(run)


def test_the_backward_pass_scales_and_the_teacher_is_constant():
    inputs = make_inputs(dtype=np.float32)
    forward_kl = DIVERGENCES[0]

    def scaled(arrays, factor):
        return factor * loss_of(arrays, "full", forward_kl)[0]

    floats = {name: array for name, array in inputs.items() if name != "ids"}
    gradient = jax.jit(jax.grad(scaled))
    once, twice = gradient(floats, 1.0), gradient(floats, 2.0)
    assert_close(twice, jax.tree.map(lambda g: 2 * g, once), rtol=1e-6)
    assert all(not once[name].any() for name in ("teacher_hidden", "teacher_head", "weights"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": np.zeros((V, D + 1), np.float32)}, r"head has shape \(37, 9\)"),
        ({"weights": np.zeros((B, T + 1), np.float32)}, r"weights has shape \(2, 8\)"),
        ({"teacher_head": np.zeros((V + 1, DT), np.float32)}, r"teacher_head has shape \(38, 12\)"),
        ({"hidden": np.zeros((B * T, D), np.float32)}, r"hidden has shape \(14, 8\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        loss_of(make_inputs(dtype=np.float32) | change, "full", DIVERGENCES[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "mosaic"}, "mosaic.* use one of xla, reference"),
        ({"block_tokens": 0}, "block_tokens 0 must be at least 1"),
        ({"block_vocab": -1}, "block_vocab -1 must be at least 1"),
        ({"vocab_axis": "x", "implementation": "reference"}, "vocab_axis 'x' is not of implementation 'reference'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(make_inputs(dtype=np.float32), "full", DIVERGENCES[0], **options)


@pytest.mark.parametrize("arguments", [("forward",), ("jsd",), ("skew_kl", 1.0), ("jsd", 0.0), ("reverse_kl", 0.5)])
def test_divergences_that_mean_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match=r"use one of|must lie strictly between|has no meaning"):
        Divergence(*arguments)
