"""The losses by name: what each kind of target gives, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill.planner.collectives import collectives
from distill.training.losses import Loss, distillation_loss
from qwen3.errors import UserError
from qwen3.sharding import BATCH, MeshShape, make_mesh
from teacher.targets import Hidden, Sampled, at_ids_targets, one_hot, sampled_targets, top_k_targets
from tests.kernels_pallas.interpreters import interpret

B, T, D, V = 2, 6, 8, 31
LOSSES = [
    Loss(name="forward_kl"),
    Loss(name="reverse_kl"),
    Loss(name="jsd", weight=0.5),
    Loss(name="skew_kl", weight=0.1),
]


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, teacher_hidden = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (B, T, D))
    head, teacher_head = jax.random.normal(keys[2], (V, D)), jax.random.normal(keys[3], (V, D))
    mask = jnp.ones((B, T)).at[:, -1].set(0)
    return hidden, head, teacher_hidden, teacher_head, mask / mask.sum()


@pytest.mark.parametrize("loss", LOSSES[1:3], ids=lambda loss: loss.name)
def test_every_kind_of_target_gives_the_same_answer_where_it_names_every_word(arrays, loss):
    hidden, head, teacher_hidden, teacher_head, weights = arrays
    every_word = jnp.broadcast_to(jnp.arange(V), (B, T, V))
    answers = [
        jax.jit(
            jax.value_and_grad(
                lambda hidden, head, targets=targets, options=options: distillation_loss(
                    hidden, head, targets, weights, loss, **options
                ),
                (0, 1),
                has_aux=True,
            )
        )(hidden, head)
        for targets, options in [
            (Hidden(hidden=teacher_hidden), {"teacher_head": teacher_head}),
            (top_k_targets(teacher_hidden, teacher_head, V), {}),
            (at_ids_targets(teacher_hidden, teacher_head, every_word), {}),
        ]
    ]
    for (value, stats), gradients in answers[1:]:
        # The same sums in float32 by two routes.
        np.testing.assert_allclose(value, answers[0][0][0], rtol=1e-5)
        for name in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement"):
            np.testing.assert_allclose(stats[name], answers[0][0][1][name], rtol=1e-4, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, answers[0][1])


def on_meshes(arrays, kind, loss, mesh_shape, **options):
    """Value, statistics and gradients without and with a mesh, which divides 30 words; 1 of 6 positions is out."""
    _, _, teacher_hidden, teacher_head, _ = arrays
    hidden, head, weights = (jnp.concatenate([x] * 2) if x.shape[0] == B else x[:30] for x in arrays[:2] + arrays[4:])
    teacher_hidden, teacher_head = jnp.concatenate([teacher_hidden] * 2), teacher_head[:30]
    # Of some positions the words lie all on one device, of others on both.
    straddling = jnp.broadcast_to(jnp.arange(5) + 4 * jnp.arange(T)[:, None], (2 * B, T, 5))
    targets = {
        "hidden": lambda: Hidden(hidden=teacher_hidden),
        "top_k": lambda: top_k_targets(teacher_hidden, teacher_head, 5),
        "at_ids": lambda: at_ids_targets(teacher_hidden, teacher_head, straddling),
        "sampled": lambda: sampled_targets(teacher_hidden, teacher_head, 5, jax.random.key(3)),
    }[kind]()
    teacher = {"teacher_head": teacher_head} if kind == "hidden" else {}

    def run(**more):
        gradient = jax.value_and_grad(
            lambda hidden, head: distillation_loss(hidden, head, targets, weights, loss, **teacher, **more),
            (0, 1),
            has_aux=True,
        )
        return jax.block_until_ready(jax.jit(gradient)(hidden, head))

    return run(), run(mesh=make_mesh(mesh_shape, jax.devices()[:4]), **options)


@pytest.mark.parametrize(
    ("kind", "loss", "mesh_shape"),
    [
        ("hidden", LOSSES[1], MeshShape(data=2, tensor=2)),
        ("hidden", LOSSES[2], MeshShape(fsdp=2, tensor=2)),
        ("hidden", LOSSES[0], MeshShape(expert=2, context=2)),
        ("top_k", LOSSES[0], MeshShape(context=2, tensor=2)),
        ("top_k", LOSSES[3], MeshShape(data=2, fsdp=2)),
        ("at_ids", LOSSES[1], MeshShape(expert=2, tensor=2)),
        ("sampled", LOSSES[0], MeshShape(data=2, tensor=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mesh_gives_the_same(arrays, kind, loss, mesh_shape):
    # Blocks divide neither the rows nor the words of a device.
    expected, found = on_meshes(arrays, kind, loss, mesh_shape, block_tokens=4, block_vocab=4)
    # The same float32 terms added in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_kernel_on_a_mesh_gives_the_same(arrays, kind):
    with interpret("tpu"):
        expected, found = on_meshes(arrays, kind, LOSSES[1], MeshShape(data=2, tensor=2), implementation="tpu")
    # The same float32 terms added in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


@pytest.mark.parametrize("trained", [(0, 1), (0,)], ids=["trained", "frozen"])
def test_a_head_is_gathered_once_and_its_gradient_reduced_once(arrays, trained):
    """However many the blocks: here of 30 words, 15 on each of two devices along the tensor axis, D numbers wide. That
    of a frozen head is not made."""
    hidden, _, teacher_hidden, _, weights = arrays
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2), jax.devices()[:4])
    targets = Hidden(hidden=teacher_hidden)

    def loss(hidden, head, teacher_head):
        options = {"block_tokens": 1, "block_vocab": 4, "mesh": mesh, "teacher_head": teacher_head}
        return distillation_loss(hidden, head, targets, weights, LOSSES[1], **options)[0]

    lie = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    heads = (jax.ShapeDtypeStruct((30, D), jnp.float32, sharding=lie) for _ in range(2))
    rows = jax.ShapeDtypeStruct(hidden.shape, jnp.float32, sharding=NamedSharding(mesh, BATCH))
    text = jax.jit(jax.grad(loss, trained), out_shardings=(None, lie)[: len(trained)]).lower(rows, *heads)
    text = text.compile().as_text()
    head_bytes = 15 * D * 4
    large = [(one.kind, one.whole_bytes, one.times) for one in collectives(text) if one.whole_bytes >= head_bytes]
    reduced = [("reduce-scatter", head_bytes, 1)] if 1 in trained else []
    assert sorted(large) == [("all-gather", head_bytes, 2), *reduced]


def test_forward_kl_to_the_data_is_the_cross_entropy(arrays):
    hidden, head, _, _, weights = arrays
    tokens = jax.random.randint(jax.random.key(9), (B, T), 0, V)

    def ours(hidden, head):
        return distillation_loss(hidden, head, one_hot(tokens), weights, Loss(name="forward_kl"))

    def textbook(hidden, head):
        logprobs = jax.nn.log_softmax(hidden[:, :-1] @ head.T)
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1).mean()

    (value, stats), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    expected, expected_gradients = jax.jit(jax.value_and_grad(textbook, (0, 1)))(hidden, head)
    # float32 sums of another order
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected_gradients)
    right = (hidden @ head.T).argmax(-1)[:, :-1] == tokens[:, 1:]
    np.testing.assert_array_equal(stats["top1_agreement"][:, :-1], right)


def test_one_drawn_word_is_on_average_the_whole_divergence_with_its_gradient(arrays):
    hidden, head, teacher_hidden, teacher_head, weights = arrays
    p = jax.nn.softmax(teacher_hidden @ teacher_head.T)
    entropy = -jnp.sum(p * jnp.log(p), -1)

    def mean(hidden, head):
        def add(total, word):
            drawn = Sampled(ids=jnp.full((B, T, 1), word), log_shares=jnp.zeros((B, T, 1)), entropy=entropy)
            loss, stats = distillation_loss(hidden, head, drawn, weights * p[..., word], LOSSES[0])
            return total + loss, stats

        return jax.lax.scan(add, 0.0, jnp.arange(V))

    def whole(hidden, head):
        targets = Hidden(hidden=teacher_hidden)
        return distillation_loss(hidden, head, targets, weights, LOSSES[0], teacher_head=teacher_head)

    (value, stats), gradients = jax.jit(jax.value_and_grad(mean, (0, 1), has_aux=True))(hidden, head)
    (expected, expected_stats), expected_gradients = jax.jit(jax.value_and_grad(whole, (0, 1), has_aux=True))(
        hidden, head
    )
    # float32 sums over all words by two routes
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected_gradients)
    divergence = jnp.sum(stats["divergence"] * jnp.moveaxis(p, -1, 0), 0)
    np.testing.assert_allclose(divergence, expected_stats["divergence"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["teacher_entropy"][0], expected_stats["teacher_entropy"], rtol=1e-5)


def test_drawn_words_give_their_cross_entropy_less_the_teachers_entropy(arrays):
    hidden, head, teacher_hidden, teacher_head, weights = arrays
    targets = sampled_targets(teacher_hidden, teacher_head, 5, jax.random.key(3))
    (value, stats), (by_hidden, by_head) = jax.jit(
        jax.value_and_grad(lambda *a: distillation_loss(*a, targets, weights, LOSSES[0]), (0, 1), has_aux=True)
    )(hidden, head)
    h, heads, w = (np.asarray(array, np.float64) for array in (hidden, head, weights))
    logits = h @ heads.T
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    shares = (np.exp(targets.log_shares)[..., None] * (np.asarray(targets.ids)[..., None] == np.arange(V))).sum(-2)
    divergence = -(shares * logprobs).sum(-1) - targets.entropy
    slope = w[..., None] * (np.exp(logprobs) - shares)
    # float32 against float64
    np.testing.assert_allclose(value, (w * divergence).sum(), rtol=1e-5)
    np.testing.assert_allclose(stats["divergence"], np.where(w == 0, 0, divergence), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_hidden, slope @ heads, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_head, np.einsum("BTV,BTD->VD", slope, h), rtol=1e-4, atol=1e-6)
    assert set(stats) == {"divergence", "student_entropy", "teacher_entropy"}


@pytest.mark.parametrize("loss", LOSSES[1:], ids=lambda loss: loss.name)
def test_only_the_forward_kl_is_right_on_average_over_drawn_words(arrays, loss):
    hidden, head, teacher_hidden, teacher_head, weights = arrays
    targets = sampled_targets(teacher_hidden, teacher_head, 5, jax.random.key(3))
    with pytest.raises(ValueError, match=f"loss {loss.name} over Sampled targets is not right on average"):
        distillation_loss(hidden, head, targets, weights, loss)


@pytest.mark.parametrize("loss", LOSSES[:2], ids=lambda loss: loss.name)
def test_top_k_with_its_tail_never_exceeds_the_whole_divergence(arrays, loss):
    @jax.jit
    def divergences(hidden, head, teacher_hidden, teacher_head, weights):
        targets = Hidden(hidden=teacher_hidden)
        whole, _ = distillation_loss(hidden, head, targets, weights, loss, teacher_head=teacher_head)
        few, more = (
            distillation_loss(hidden, head, top_k_targets(teacher_hidden, teacher_head, k), weights, loss)[0]
            for k in (1, 16)
        )
        return few, more, whole

    few, more, whole = divergences(*arrays)
    assert 0 <= few <= more <= whole


def test_a_statistic_that_targets_cannot_give_is_absent(arrays):
    @jax.jit
    def measured(hidden, head, teacher_hidden, teacher_head, weights):
        targets, top = Hidden(hidden=teacher_hidden), top_k_targets(teacher_hidden, teacher_head, 4)
        _, whole = distillation_loss(hidden, head, targets, weights, LOSSES[0], teacher_head=teacher_head)
        return whole, top, distillation_loss(hidden, head, top, weights, LOSSES[0])[1]

    hidden, head, _, _, weights = arrays
    whole, top, coarse = measured(*arrays)
    assert set(coarse) - set(whole) == {"teacher_tail_mass", "student_support_mass"}
    live = np.asarray(weights) > 0
    # float32
    np.testing.assert_allclose(coarse["teacher_tail_mass"][live], np.exp(top.log_tail)[live], rtol=1e-5)
    student = jnp.take_along_axis(jax.nn.softmax(hidden @ head.T), top.ids, -1).sum(-1)
    np.testing.assert_allclose(coarse["student_support_mass"][live], student[live], rtol=1e-5)
    np.testing.assert_allclose(coarse["student_entropy"], whole["student_entropy"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "kl"}, "name is 'kl'; it must be 'forward_kl' or 'reverse_kl' or 'jsd' or 'skew_kl'"),
        ({"name": "jsd"}, "weight None of jsd must lie strictly between 0 and 1"),
        ({"name": "skew_kl", "weight": 1.0}, "weight 1.0 of skew_kl must lie strictly between 0 and 1"),
        ({"name": "reverse_kl", "weight": 0.5}, "weight 0.5 has no meaning for reverse_kl"),
    ],
)
def test_a_loss_that_means_nothing_is_a_users_error(fields, message):
    with pytest.raises(UserError, match=message):
        Loss(**fields)


def test_targets_and_teacher_head_must_go_together(arrays):
    hidden, head, teacher_hidden, teacher_head, weights = arrays
    with pytest.raises(ValueError, match="teacher_head is None; Hidden targets need"):
        distillation_loss(hidden, head, Hidden(hidden=teacher_hidden), weights, LOSSES[0])
    top = top_k_targets(teacher_hidden, teacher_head, 4)
    with pytest.raises(ValueError, match="teacher_head is given with TopK targets"):
        distillation_loss(hidden, head, top, weights, LOSSES[0], teacher_head=teacher_head)
    with pytest.raises(ValueError, match="targets is a dict"):
        distillation_loss(hidden, head, {}, weights, LOSSES[0])


@pytest.mark.parametrize("mesh", [None, MeshShape(data=1, fsdp=1)], ids=["", "of one device"])
def test_heads_are_multiplied_in_the_dtype_of_computing(arrays, mesh):
    hidden, head, teacher_hidden, teacher_head, weights = arrays
    targets, place = Hidden(hidden=teacher_hidden.astype(jnp.bfloat16)), mesh and make_mesh(mesh, jax.devices()[:1])

    def loss(head, teacher_head):
        return distillation_loss(
            hidden.astype(jnp.bfloat16), head, targets, weights, LOSSES[1], teacher_head=teacher_head, mesh=place
        )[0]

    rounded = loss(head.astype(jnp.bfloat16), teacher_head.astype(jnp.bfloat16))
    assert loss(head, teacher_head) == rounded
    gradient = jax.grad(loss)(head, teacher_head)
    assert gradient.dtype == head.dtype
