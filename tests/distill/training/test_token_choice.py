"""Heads at a share of the positions: which ones, the same update as with the others masked, and what it saves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.training.losses import Loss
from distill.training.packing import pack_rollouts, rows_needed
from distill.training.token_choice import at_places, chosen, places_in_row, places_of, room
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, TrainStep
from kernels_pallas.topologies import compile_for
from qwen3.decoder.model import Qwen3
from qwen3.rollout import NON_THINKING, THINKING, Rollout
from qwen3.sharding import MeshShape, make_mesh, placed_shapes, shardings
from teacher.scoring import Scorer
from teacher.targets import Hidden
from tests.distill.training.test_train_step import BATCH, DESCENT, LENGTH, SUM_ORDER, arrays, assert_same, config


def rollout(prompt: int, response: int, seed: int) -> Rollout:
    random, length = np.random.default_rng(seed), prompt + response
    index = np.arange(length)
    # Some tokens are forced.
    mask = (index >= prompt - 1) & (index < length - 1) & (random.random(length) < 0.8)
    return Rollout(
        tokens=random.integers(0, 64, length).astype(np.int32),
        prompt_length=prompt,
        loss_mask=mask,
        sampler_logprobs=np.zeros(length, np.float32),
        mode=THINKING if seed % 2 else NON_THINKING,
        prompt_id=str(seed),
        sample_index=0,
        policy_step=0,
        finished=True,
        # Few values, so that some are equal.
        sampler_entropies=np.where(mask, random.integers(0, 5, length) / 4, 9).astype(np.float32),
    )


def test_the_least_sure_positions_are_chosen_and_of_equal_ones_the_first() -> None:
    one = dataclasses.replace(
        rollout(2, 7, 0),
        loss_mask=np.array([0, 1, 1, 1, 0, 1, 1, 1, 0], bool),
        sampler_entropies=np.array([9, 0.5, 0.1, 0.5, 9, 0.2, 0.5, 0, 9], np.float32),
    )
    found = {share: np.flatnonzero(chosen(one, share)).tolist() for share in (0.01, 0.3, 0.5, 0.6, 1.0)}
    assert found == {0.01: [1], 0.3: [1, 3], 0.5: [1, 3, 6], 0.6: [1, 3, 5, 6], 1.0: [1, 2, 3, 5, 6, 7]}
    with pytest.raises(ValueError, match="has no sampler_entropies"):
        chosen(dataclasses.replace(one, sampler_entropies=None), 0.5)


@pytest.mark.parametrize("share", [0.02, 0.25, 0.7])
def test_whatever_is_packed_fits_the_places_of_its_row(share: float) -> None:
    """Also with prompts of one token, which leave a row nothing to spare."""
    random, length = np.random.default_rng(7), 48
    mesh = make_mesh(MeshShape(data=1, context=2), jax.devices()[:2])
    places = places_in_row(share, length, (mesh, mesh))
    assert places % 2 == 0
    assert share * length <= places < share * length + 2
    rollouts = [rollout(int(random.integers(1, 4)), int(random.integers(2, 44)), seed) for seed in range(200)]
    masks = [chosen(one, share) for one in rollouts]
    rooms = [room(len(one.tokens), int(mask.sum()), places, length) for one, mask in zip(rollouts, masks, strict=True)]
    rows = rows_needed(rooms, length)
    packed = pack_rollouts(
        [dataclasses.replace(one, loss_mask=mask) for one, mask in zip(rollouts, masks, strict=True)],
        rows=rows, length=length, one_per_row=False, rooms=rooms,
    )  # fmt: skip
    found = places_of(packed["loss_mask"], places)
    at = at_places(packed, found)
    assert at["loss_mask"].sum() == packed["loss_mask"].sum() == sum(mask.sum() for mask in masks)
    for row, marked in enumerate(packed["loss_mask"]):
        assert found[row, at["loss_mask"][row]].tolist() == np.flatnonzero(marked).tolist()
        assert np.all(np.diff(found[row, at["loss_mask"][row]]) > 0)
    where = np.nonzero(at["loss_mask"])
    assert at["mode"][where].tolist() == packed["mode"][where[0], found[where]].tolist()


@functools.cache
def update(share: float | None, mesh_shape: MeshShape, devices: int, microbatches: int):
    """One step of plain gradient descent on a third of the positions, with and without `places` for them."""
    mesh = make_mesh(mesh_shape, jax.devices()[:devices])
    data = arrays()
    data["loss_mask"] &= np.random.default_rng(3).random((BATCH, LENGTH)) < 0.3
    teacher, student = Qwen3(config(True), jax.random.key(5)), Qwen3(config(False), jax.random.key(1))
    before = jax.device_get(student)
    state = TrainState.start(jax.device_put(student, shardings(student, mesh)), DESCENT, mesh)
    scorer = Scorer(jax.device_put(teacher, shardings(teacher, mesh)), mesh)
    step = TrainStep(transformation=DESCENT, loss=Loss(name="reverse_kl"), mesh=mesh, teacher_head=scorer.head)
    rows, batches = BATCH // microbatches, []
    for first in range(0, BATCH, rows):
        part = {name: array[first : first + rows] for name, array in data.items()}
        places = None
        if share is not None:
            places = places_of(part["loss_mask"], places_in_row(share, LENGTH, (mesh,)))
        targets = scorer.hidden(part["tokens"], part["positions"], part["segment_ids"], None, places)
        batches.append(Batch.of(part if places is None else at_places(part, places), targets))
    state, result = step(state, batches)
    after = jax.device_get(state.model)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, after), result


@pytest.mark.parametrize(
    ("mesh_shape", "devices", "microbatches"),
    [
        (MeshShape(), 1, 1),
        (MeshShape(), 1, 4),
        (MeshShape(data=2, context=2), 4, 2),
        pytest.param(MeshShape(fsdp=2, tensor=2, context=2), 8, 1, marks=pytest.mark.long),
    ],
)
def test_the_update_is_that_of_all_positions_with_the_others_masked(
    mesh_shape: MeshShape, devices: int, microbatches: int
) -> None:
    masked = update(None, MeshShape(), 1, 1)
    at = update(0.5, mesh_shape, devices, microbatches)
    assert_same(at, masked, SUM_ORDER)
    assert at[1].trained_positions == masked[1].trained_positions


def test_memory_and_flops_fall_with_the_share() -> None:
    """Of a compiled step over a vocabulary that dwarfs the layers, as in a small model; of so few tokens that they are
    one block, which is what the compiler's counts are of."""
    small = dataclasses.replace(config(False), vocab_size=4096, num_hidden_layers=1, max_position_embeddings=128)
    mesh, rows, length = make_mesh(MeshShape(), jax.devices()[:1]), 2, 128
    model = placed_shapes(jax.eval_shape(lambda: Qwen3(small, jax.random.key(0))), mesh)
    head = jax.ShapeDtypeStruct((4096, 32), jnp.float32)
    step = TrainStep(transformation=DESCENT, loss=Loss(name="reverse_kl"), mesh=mesh, teacher_head=head)
    taken = {}
    for share in (None, 0.25):
        places = length if share is None else places_in_row(share, length, (mesh,))
        whole, part = ((rows, columns) for columns in (length, places))
        batch = Batch(
            **{name: jax.ShapeDtypeStruct(whole, jnp.int32) for name in ("tokens", "positions", "segment_ids")},
            loss_mask=jax.ShapeDtypeStruct(part, jnp.bool_),
            mode=jax.ShapeDtypeStruct(part, jnp.uint8),
            targets=Hidden(hidden=jax.ShapeDtypeStruct((*part, 32), jnp.float32)),
            places=None if share is None else jax.ShapeDtypeStruct(part, jnp.int32),
        )
        function, arguments = step.programs(TrainState.shapes(model, DESCENT, mesh), batch).first_gradients
        compiled = compile_for(mesh, function, *arguments)
        memory = compiled.memory_analysis()
        assert memory is not None
        taken[share] = memory.temp_size_in_bytes, compiled.cost_analysis()["flops"]
    for at_all, at_some in zip(taken[None], taken[0.25], strict=True):
        assert 0 < at_some < 0.4 * at_all
