"""Targets at the student's own ids: a true divergence on their support, its exact gradient, and no collapse."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rich.console import Console

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.planner.programs import programs
from distill.planner.whole_run import Assumptions, stage_plans
from distill.runner.execute import execute
from distill.stages import OnPolicy
from distill.stages.ahead import Written
from distill.stages.stopping import StopRequest
from distill.stages.student_top_k import StudentTopK, with_sampled
from distill.training.losses import Loss, distillation_loss
from experiments import quickstart
from qwen3.errors import UserError
from qwen3.rollout import THINKING, Rollout
from teacher.targets import at_ids_targets, top_k_targets
from tests.distill.faults import scalars

B, T, D, V, K = 2, 7, 8, 41, 3
LOSSES = [
    Loss(name="forward_kl"),
    Loss(name="reverse_kl"),
    Loss(name="jsd", weight=0.3),
    Loss(name="skew_kl", weight=0.1),
]


def rollout(tokens: np.ndarray) -> Rollout:
    return Rollout(
        tokens=tokens.astype(np.int32),
        prompt_length=2,
        loss_mask=np.arange(len(tokens)) > 0,
        sampler_logprobs=np.zeros(len(tokens), np.float32),
        mode=THINKING,
        prompt_id="one",
        sample_index=0,
        policy_step=0,
        finished=True,
    )


def coarse_divergence(loss: Loss, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The textbook formulas over buckets, in float64."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    if loss.name == "forward_kl":
        return kl(p, q)
    if loss.name == "reverse_kl":
        return kl(q, p)
    assert loss.weight is not None
    mixture = loss.weight * p + (1 - loss.weight) * q
    return (
        kl(p, mixture) if loss.name == "skew_kl" else loss.weight * kl(p, mixture) + (1 - loss.weight) * kl(q, mixture)
    )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_loss_and_gradient_are_those_of_the_buckets_in_float64(loss: Loss) -> None:
    rng = np.random.default_rng(0)
    hidden, teacher_hidden = rng.normal(size=(2, B, T, D)).astype(np.float32)
    head, teacher_head = rng.normal(size=(2, V, D)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T))
    # What older weights found likeliest: any support gives a true divergence.
    older = top_k_targets(jnp.asarray(hidden + 0.3), jnp.asarray(head), K).ids
    asked = np.stack([with_sampled(rollout(row), np.asarray(ids)) for row, ids in zip(tokens, older, strict=True)])
    targets = at_ids_targets(jnp.asarray(teacher_hidden), jnp.asarray(teacher_head), jnp.asarray(asked), top_k=K)
    weights = np.full((B, T), 1 / (B * T), np.float32)

    def measured(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return distillation_loss(hidden, head, targets, jnp.asarray(weights), loss)

    (found, stats), gradients = jax.jit(jax.value_and_grad(measured, (0, 1), has_aux=True))(hidden, head)

    at_student, at_head = (torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in (hidden, head))
    student = torch.softmax(at_student @ at_head.T, -1)
    teacher = torch.softmax(torch.tensor(teacher_hidden).double() @ torch.tensor(teacher_head).double().T, -1)
    per_position = []
    for row in range(B):
        for place in range(T):
            own = np.argsort(-teacher[row, place].numpy())[:K]
            named = sorted({*asked[row, place].tolist(), *own.tolist()} - {-1})
            rest = torch.ones(V, dtype=torch.bool)
            rest[named] = False
            p, q = (
                torch.cat((one[row, place][named], one[row, place][rest].sum()[None])) for one in (teacher, student)
            )
            per_position.append(coarse_divergence(loss, p, q))
    divergence = torch.stack(per_position)
    divergence.mean().backward()
    # float32 sums of logits of size ten.
    np.testing.assert_allclose(found, divergence.mean().item(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(stats["divergence"]).ravel(), divergence.detach(), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(gradients, (at_student.grad, at_head.grad), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
    whole = coarse_divergence(loss, teacher, student).detach().ravel()
    assert np.all(np.asarray(stats["divergence"]).ravel() >= 0)
    # The data-processing inequality.
    assert np.all(np.asarray(stats["divergence"]).ravel() <= whole.numpy() + 1e-6)


def test_ids_are_kept_with_the_rollouts_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    rollouts = [rollout(rng.integers(0, V, length)) for length in (4, 7)]
    ids = [rng.integers(0, V, (len(one.tokens), K)).astype(np.int32) for one in rollouts]
    kept = json.loads(json.dumps(Written(rollouts=rollouts, seconds=1.0, student_ids=ids).to_json()))
    for before, after in zip(ids, Written.from_json(kept).student_ids, strict=True):
        np.testing.assert_array_equal(before, after)
    asked = with_sampled(rollouts[0], ids[0])
    np.testing.assert_array_equal(asked[:, -1], [*rollouts[0].tokens[1:], -1])


def test_more_ids_than_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"targets\.k is 0"):
        StudentTopK(k=0)


def test_a_plan_knows_the_pass_that_finds_the_ids_and_what_is_sent() -> None:
    base = quickstart.config()
    stage = base.stages["on_policy"]
    assert isinstance(stage, OnPolicy)
    assert base.teacher is not None
    experiment = dataclasses.replace(
        base,
        teacher=None,
        teachers={"arithmetic": base.teacher, "other": dataclasses.replace(base.teacher, dtype="bfloat16")},
        stages={"on_policy": dataclasses.replace(stage, targets=StudentTopK(k=16))},
        evaluation=dataclasses.replace(base.evaluation, problems=0),
    )
    planned = programs(experiment, jax.devices()[:1])
    purposes = {one.purpose: one for one in planned}
    assert {"student_scores", "teacher_scores", "student_trains"} <= purposes.keys()
    assert len(purposes["student_trains"].beside["other teachers"]) == 1
    (plan,) = stage_plans(experiment, planned, Assumptions())
    microbatches = plan.calls["student_trains"]
    assert plan.calls["teacher_scores"] == microbatches
    assert plan.calls["student_scores"] > 0
    assert plan.bytes_moved == microbatches * stage.training.rows * stage.training.row_length * 33 * 8


@pytest.mark.long
def test_reverse_kl_does_not_collapse(tmp_path: Path) -> None:
    """Two hundred steps of the quickstart's base student by four ids and by the whole vocabulary: entropy stays with
    the teacher's, and the student comes as near to its teacher on held-out problems."""
    entropy, rows = {}, {}
    for name, targets in (("whole", None), ("ids", StudentTopK(k=4))):
        base = quickstart.config()
        stage = base.stages["on_policy"]
        assert isinstance(stage, OnPolicy)
        training = dataclasses.replace(stage.training, steps=200, rows=16)
        experiment: Experiment = dataclasses.replace(
            base,
            stages={"on_policy": dataclasses.replace(stage, prompts_per_step=16, training=training, targets=targets)},
            evaluation=dataclasses.replace(base.evaluation, problems=40, samples_per_problem=1, pass_at=()),
        )
        with StopRequest().listening() as stop:
            execute(experiment, tmp_path / name, Progress(Console(file=io.StringIO())), stop)
        metrics = scalars(tmp_path / name)
        last = [metrics["on_policy", step] for step in range(181, 201)]
        entropy[name] = np.mean([one["student_entropy"] for one in last])
        rows[name] = json.loads((tmp_path / name / "report.json").read_text())["rows"]
    print(entropy, rows)
    assert entropy["ids"] == pytest.approx(entropy["whole"], rel=0.2, abs=0.02)
    for ids, whole in zip(rows["ids"], rows["whole"], strict=True):
        if ids["model"] == "on_policy":
            for kl in ("forward_kl", "reverse_kl", "reverse_kl_own"):
                assert ids[kl] <= 1.2 * whole[kl] + 0.02, (ids["mode"], kl)
