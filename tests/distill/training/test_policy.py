"""The policy gradient of every variant against the papers' formulas in float64 PyTorch, and on toys whose optimum is
known."""

import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.rewards.advantages import advantages
from distill.stages.ahead import Written
from distill.stages.grpo import Grpo, _FromRewards
from distill.training.losses import Loss
from distill.training.packing import pack_rollouts, rollout_example
from distill.training.policy import Policy, PolicyData, PolicyLoss, policy_loss, token_logprobs
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, TrainStep
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import THINKING, Rollout
from qwen3.sharding import MeshShape, make_mesh, shardings
from teacher.targets import Hidden, following_tokens
from tests.distill.training.test_train_step import (
    BATCH,
    DESCENT,
    LENGTH,
    SUM_ORDER,
    arrays,
    assert_same,
    config,
    made,
    read,
)  # fmt: skip

torch = pytest.importorskip("torch")

PROMPTS, GROUP, D, V, ROW = 2, 3, 6, 11, 24
MOST_TOKENS = 9


def stage(**fields: Any) -> Grpo:
    params = SamplingParams(max_new_tokens=MOST_TOKENS)
    usual = {"prompts_per_step": PROMPTS, "samples_per_prompt": GROUP, "max_prompt_tokens": 4, "thinking": params}
    return Grpo(**{**usual, "non_thinking": params, **fields})


def written(random: np.random.Generator) -> Written:
    """Two groups: rewards of one differ, of the other are equal but for the response that was cut off."""
    rollouts = []
    for index in range(PROMPTS * GROUP):
        length = 4 + index
        mask = np.arange(length) >= 1
        mask[-1] = False
        mask[2] = index % 2 == 0  # some tokens are forced
        rollouts.append(
            Rollout(
                tokens=random.integers(0, V, length).astype(np.int32),
                prompt_length=2,
                loss_mask=mask,
                sampler_logprobs=np.where(mask, random.normal(-2, 0.7, length), 0).astype(np.float32),
                mode=THINKING,
                prompt_id=str(index // GROUP),
                sample_index=index % GROUP,
                policy_step=0,
                finished=index != 1,
            )
        )
    near = [np.where(r.loss_mask, r.sampler_logprobs + random.normal(0, 0.3, len(r.tokens)), 0) for r in rollouts]
    far = [np.where(r.loss_mask, random.normal(-2, 0.7, len(r.tokens)), 0) for r in rollouts]
    return Written(
        rollouts=rollouts,
        seconds=1.0,
        rewards=[1.0, 0.0, 0.25, 2.0, 2.0, 2.0],
        old_logprobs=[one.astype(np.float32) for one in near],
        reference_logprobs=[one.astype(np.float32) for one in far],
    )


def from_rewards(of_stage: Grpo) -> _FromRewards:
    nothing: Any = SimpleNamespace(config=config(moe=False), stacks=[], tasks=None, tokenizer=None)
    return _FromRewards(of_stage, nothing, nothing, [])


def formula(of_stage: Grpo, made: Written, hidden: Any, head: Any, packed: dict[str, np.ndarray], bonus: float) -> Any:
    """The loss as the papers write it, response by response."""
    loss, total, entropies = of_stage.policy, 0.0, 0.0
    low, high = loss.clips
    masked = [of_stage.truncated == "masked" and not rollout.finished for rollout in made.rollouts]
    counted = [index for index, left_out in enumerate(masked) if not left_out]
    tokens = sum(int(made.rollouts[index].loss_mask.sum()) for index in counted)
    logps = torch.log_softmax(hidden @ head.T, -1)
    trained = sum(int(rollout.loss_mask.sum()) for rollout in made.rollouts)
    for index, rollout in enumerate(made.rollouts):
        places = np.argwhere((packed["number"] == index + 1) & packed["loss_mask"])
        rows, columns = torch.tensor(places[:, 0]), torch.tensor(places[:, 1])
        following = torch.tensor(packed["tokens"].astype(np.int64))[rows, columns + 1]
        here = logps[rows, columns]
        entropies = entropies - (here.exp() * here).sum()
        if index not in counted:
            continue
        group = [other for other in counted if other // GROUP == index // GROUP]
        rewards = np.array([made.rewards[other] for other in group])
        mine = made.rewards[index]
        if of_stage.advantages == "rloo":
            others = [made.rewards[other] for other in group if other != index]
            advantage = mine - np.mean(others)
        else:
            advantage = mine - rewards.mean()
            if of_stage.advantages == "grpo" and rewards.std() > 0:
                advantage = advantage / (rewards.std() + 1e-6)
        lp = here.gather(1, following[:, None])[:, 0]
        mask = rollout.loss_mask
        if of_stage.unlikely_below is not None:
            advantage = torch.tensor(-1.0 * (np.exp(rollout.sampler_logprobs[mask]) < of_stage.unlikely_below))
        sampler = torch.tensor(rollout.sampler_logprobs[mask].astype(np.float64))
        by_trainer = loss.correction != "none" or loss.ratio == "sequence"
        old = torch.tensor(made.old_logprobs[index][mask].astype(np.float64)) if by_trainer else sampler
        ratio = (lp - old).exp() if loss.ratio == "token" else (lp - old).mean().exp().expand(len(lp))
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        if loss.correction == "truncate":
            gain = gain * (old - sampler).exp().clamp(max=loss.correction_limit)
        elif loss.correction == "leave_out":
            gain = gain * float(abs((old - sampler).sum()) <= math.log(loss.correction_limit))
        behind = torch.tensor(made.reference_logprobs[index][mask].astype(np.float64)) - lp
        terms = -gain + loss.reference_kl * (behind.exp() - behind - 1)
        total = (
            total
            + {
                "tokens": terms.sum() / tokens,
                "sequence": terms.mean() / len(counted),
                "constant": terms.sum() / (len(counted) * MOST_TOKENS),
            }[loss.total]
        )
    return of_stage.policy_weight * total - bonus * entropies / trained


VARIANTS = [
    stage(updates_per_batch=2),
    stage(advantages="dr_grpo", policy=PolicyLoss(total="constant"), updates_per_batch=2),
    stage(advantages="rloo", policy=PolicyLoss(total="sequence", clip_low=0.1, clip_high=0.1), updates_per_batch=2),
    stage(policy=PolicyLoss(ratio="sequence", total="sequence", clip_low=0.05, clip_high=0.06), updates_per_batch=2),
    stage(policy=PolicyLoss(ratio="sequence", correction="truncate", correction_limit=1.2), updates_per_batch=2),
    stage(policy=PolicyLoss(correction="leave_out", correction_limit=1.5), truncated="masked", updates_per_batch=2),
    stage(policy=PolicyLoss(reference_kl=0.3), policy_weight=0.7, updates_per_batch=2, advantages="rloo"),
    stage(
        policy=PolicyLoss(
            ratio="sequence", total="constant", correction="truncate", correction_limit=1.3, reference_kl=0.1
        ),
        truncated="masked",
        entropy_floor=1.0,
        updates_per_batch=2,
    ),
    stage(unlikely_below=0.15, updates_per_batch=2),
]


@pytest.mark.parametrize(
    "of_stage",
    VARIANTS,
    ids=lambda one: f"{one.unlikely_below or one.advantages}-{one.policy.ratio}-{one.policy.total}",
)
def test_loss_and_gradients_equal_the_formulas_in_float64(of_stage: Grpo) -> None:
    random = np.random.default_rng(0)
    made = written(random)
    if not of_stage.keeps_reference_logprobs:
        made = dataclasses.replace(made, reference_logprobs=[np.zeros(len(r.tokens)) for r in made.rollouts])
    kept = dataclasses.replace(
        made,
        old_logprobs=made.old_logprobs if of_stage.keeps_old_logprobs else (),
        reference_logprobs=made.reference_logprobs if of_stage.keeps_reference_logprobs else (),
    )
    per_token = from_rewards(of_stage).per_token(kept, slice(0, PROMPTS * GROUP))
    numbered = [
        {**arrays, "number": np.full(len(r.tokens), index, np.int32)}
        for index, (r, arrays) in enumerate(zip(made.rollouts, per_token, strict=True), start=1)
    ]
    packed = pack_rollouts(
        [*zip(made.rollouts, numbered, strict=True)],
        rows=2,
        length=ROW,
        one_per_row=False,
        to_example=lambda record: rollout_example(record[0], **record[1]),
    )
    assert packed["segment_ids"].max() > 1, "several responses share a row"
    bonus = 0.3 if of_stage.entropy_floor else 0.0
    hidden, head = random.normal(size=(2, ROW, D)), random.normal(size=(V, D))

    with jax.enable_x64(True):
        data = {name: jnp.asarray(packed[name], jnp.float64) for name in of_stage.policy_arrays}
        if bonus:
            data["entropy_weights"] = bonus * data["entropy_weights"]

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def ours(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            ids = jnp.where(packed["loss_mask"], following_tokens(jnp.asarray(packed["tokens"])), -1)
            sequences = jnp.arange(2)[:, None] * (ROW + 1) + packed["segment_ids"]
            return policy_loss(
                *token_logprobs(hidden, head, ids), PolicyData(**data), packed["loss_mask"], sequences,
                of_stage.policy, most_sequences=2 * (ROW + 1),
            )  # fmt: skip

        (loss, stats), gradients = ours(jnp.asarray(hidden), jnp.asarray(head))
    theirs = [torch.tensor(one, requires_grad=True) for one in (hidden, head)]
    expected = formula(of_stage, made, *theirs, packed, bonus)
    expected.backward()
    # Weights and advantages, which are made in float64, travel in float32.
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6, atol=1e-7)
    for ours_, theirs_ in zip(gradients, theirs, strict=True):
        largest = float(theirs_.grad.abs().max())
        np.testing.assert_allclose(ours_, theirs_.grad.numpy(), rtol=1e-5, atol=1e-6 * largest)
    clipped = np.asarray(stats["clipped_low"] + stats["clipped_high"])
    assert 0 < clipped.sum() < packed["loss_mask"].sum(), "the clip is tried on both sides of it"
    if of_stage.policy.correction != "none":
        assert 0 < np.asarray(stats["corrected"]).sum() < packed["loss_mask"].sum()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_without_signal_has_exactly_no_advantage(kind: Any) -> None:
    rewards = np.array([[0.1, 0.1, 0.1], [0.1, 0.3, 0.1], [5.0, 1.0, 2.0]])
    known = np.array([[True, True, True], [True, False, True], [False, True, False]])
    assert not advantages(rewards, known, kind).any()
    np.testing.assert_allclose(advantages(rewards, known | True, kind).sum(1), 0, atol=1e-12)


def learned(of_stage: Grpo, start: float, steps: int = 200) -> float:
    """The probability of the better of two arms after so many batches of two updates each, averaged over the last
    third; it begins as sigmoid(start)."""
    random = np.random.default_rng(0)
    prompts, group = 16, of_stage.samples_per_prompt
    hidden, mask = jnp.ones((prompts * group, 1, 1)), jnp.ones((prompts * group, 1), bool)
    sequences = jnp.arange(prompts * group)[:, None]

    @jax.jit
    def update(head: jax.Array, arms: jax.Array, data: PolicyData) -> jax.Array:
        def loss(head: jax.Array) -> jax.Array:
            said = token_logprobs(hidden, head, arms)
            return policy_loss(*said, data, mask, sequences, of_stage.policy, most_sequences=prompts * group)[0]

        return head - 1.0 * jax.grad(loss)(head)

    head, seen = np.array([[start], [0.0]], np.float32), []
    reference = np.asarray(jax.nn.log_softmax(head[:, 0]))
    for _ in range(steps):
        said = np.asarray(jax.nn.log_softmax(head[:, 0]))
        arms = (random.random((prompts, group)) > math.exp(said[0])).astype(np.int32)
        better = advantages(arms == 0, np.ones_like(arms, bool), of_stage.advantages).reshape(-1, 1)
        arms = arms.reshape(-1, 1)
        data = PolicyData(
            advantages=better.astype(np.float32),
            weights=np.full(arms.shape, 1 / arms.size, np.float32),
            sampler_logprobs=said[arms],
            old_logprobs=said[arms],
            reference_logprobs=reference[arms] if of_stage.policy.reference_kl else None,
        )
        for _ in range(2):
            head = np.asarray(update(head, arms, data))
        seen.append(float(jax.nn.sigmoid(head[0, 0] - head[1, 0])))
    return float(np.mean(seen[-len(seen) // 3 :]))


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        (kind, PolicyLoss(ratio=ratio, clip_low=0.2, clip_high=0.28, correction=correction))
        for (kind, ratio), correction in zip(
            itertools.product(("grpo", "dr_grpo", "rloo"), ("token", "sequence")),
            itertools.cycle(("none", "truncate", "leave_out")),
        )
    ],
)
def test_every_variant_finds_the_better_of_two_arms(kind: Any, policy: PolicyLoss) -> None:
    assert learned(stage(advantages=kind, policy=policy, samples_per_prompt=4), start=-1.5) > 0.95


def test_held_to_its_start_a_policy_ends_where_reward_and_divergence_balance() -> None:
    """With rewards 1 and 0, the start at even odds and a weight w of the divergence, p(1 - p) = w·(p - 1/2): the
    estimate's gradient is that of KL(start‖student)."""
    weight = 0.5
    expected = (1 - weight + math.sqrt((1 - weight) ** 2 + 2 * weight)) / 2
    policy = PolicyLoss(reference_kl=weight, clip_low=0.9, clip_high=9.0)
    found = learned(stage(advantages="rloo", policy=policy, samples_per_prompt=8), start=0.0)
    # Noise of 128 pulls a batch, averaged over some seventy.
    assert found == pytest.approx(expected, abs=0.03)


def train_once(mesh_shape: MeshShape, devices: int, microbatches: int, policy: Policy, moe: bool = False) -> Any:
    """The trained weights' change and the metrics of one step of plain gradient descent on rewards."""
    mesh = make_mesh(mesh_shape, jax.devices()[:devices])
    data, random = arrays(), np.random.default_rng(1)
    # A token that is trained is followed by one of its own document.
    segments = data["segment_ids"]
    data["loss_mask"][:, :-1] &= segments[:, 1:] == segments[:, :-1]
    data["loss_mask"][:, -1] = False
    mask = data["loss_mask"]
    logprobs = np.where(mask, random.normal(-4, 0.2, (3, BATCH, LENGTH)), 0).astype(np.float32)
    sequences = np.arange(BATCH)[:, None] * 3 + segments
    better = random.normal(size=BATCH * 3 + 3)[sequences]
    rewarded = PolicyData(
        advantages=np.float32(better * mask),
        weights=np.float32(mask / mask.sum()),
        sampler_logprobs=logprobs[0],
        old_logprobs=logprobs[1],
        reference_logprobs=logprobs[2],
        entropy_weights=np.float32(0.01 * mask / mask.sum()),
    )
    teacher = made(config(False), jax.random.key(5))
    targets = Hidden(hidden=read(teacher, data["tokens"], data["positions"], segments)) if policy.teacher_kl else None
    model = made(config(moe), jax.random.key(1))
    before = jax.device_get(model)
    state = TrainState.start(jax.device_put(model, shardings(model, mesh)), DESCENT, mesh)
    step = TrainStep(
        transformation=DESCENT,
        loss=Loss(name="reverse_kl"),
        mesh=mesh,
        teacher_head=teacher.head if policy.teacher_kl else None,
        policy=policy,
    )
    whole = Batch.of(data, jax.device_get(targets), rewarded)
    rows = BATCH // microbatches
    parts = [jax.tree.map(lambda leaf, at=at: leaf[at : at + rows], whole) for at in range(0, BATCH, rows)]
    state, result = step(state, parts)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, jax.device_get(state.model)), result


def test_an_update_is_the_same_however_it_is_cut_and_spread() -> None:
    loss = PolicyLoss(ratio="sequence", clip_low=0.05, clip_high=0.05, correction="leave_out", reference_kl=0.1)
    policy = Policy(loss=loss, teacher_kl=0.5)
    whole = train_once(MeshShape(), 1, 1, policy)
    assert 0 < whole[1].metrics["corrected"] < 1
    assert 0 < whole[1].metrics["clipped_high"] < 1
    assert_same(train_once(MeshShape(), 1, 4, policy), whole, SUM_ORDER)
    assert_same(train_once(MeshShape(data=1, fsdp=2, tensor=2, context=2), 8, 2, policy), whole, SUM_ORDER)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_low": 0.2, "clip_high": 0.1}, "clip_high is 0.1, below clip_low 0.2"),
        ({"clip_low": 0.5}, "clip_high is 0.28, below clip_low 0.5"),
        ({"clip_low": 1.5}, "clip_low is 1.5; it must lie between 0 and 1"),
        ({"ratio": "tokens"}, "perhaps you meant 'token'"),
        ({"correction_limit": 0.5}, "correction_limit is 0.5; it must lie in 1"),
    ],
)
def test_bounds_out_of_order_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PolicyLoss(**fields)
