"""What makes rollouts cheaper, in runs: several passes over them, a share of their tokens, and going on amid it all."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.monitor.progress import Progress
from distill.report.curves import _TEXTS, _place
from distill.runner.execute import execute
from distill.stages import OnPolicy
from distill.stages.rollout_schedule import RolloutSchedule
from distill.stages.stopping import Interrupted
from distill.stages.student_top_k import StudentTopK
from distill.training.checkpoint import Checkpointer
from distill.training.losses import Loss
from distill.training.train_state import TrainState, abstract_state
from qwen3.checkpoint import hf
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import rollouts_from_json
from qwen3.sharding import MeshShape, make_mesh
from student.init import FromScratch
from tests.distill import miniature
from tests.distill.stages.test_grpo import StopAfter, run, weights, with_stage

STEPS = 6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return miniature.make_teacher(tmp_path_factory.mktemp("teacher"), miniature.MOE | {"num_hidden_layers": 1})


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs for one device compile several times as fast as for eight."""
    monkeypatch.setattr("distill.experiment.make_mesh", lambda shape, _: make_mesh(shape, jax.devices()[:1]))


def on_policy(**fields: Any) -> OnPolicy:
    training = dataclasses.replace(miniature._training(STEPS), checkpoint_every_steps=1)
    usual = {
        "prompts_per_step": 4,
        "thinking": SamplingParams(max_new_tokens=36, thinking_budget=8),
        "non_thinking": SamplingParams(max_new_tokens=8),
        "max_prompt_tokens": 80,
        "loss": Loss(name="reverse_kl"),
        "training": training,
    }
    return OnPolicy(**{**usual, **fields})


def saved(run: Path, teacher: str, step: int) -> tuple[Qwen3, dict[str, Any]]:
    """The student after a step, and what its checkpoint says besides."""
    blank = FromScratch(architecture=miniature.DENSE | {"num_hidden_layers": 1}, tokenizer=teacher).build(
        jax.random.key(0)
    )
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    transformation = on_policy().training.optimizer.transformation(1)
    with Checkpointer(run / "checkpoints" / "rl") as checkpoints:
        state, metadata = checkpoints.restore(abstract_state(TrainState.start(blank, transformation, mesh)), step)
    return state.model, metadata


def cost(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())["stages"][0]


@pytest.mark.long
def test_later_passes_are_free_but_for_training_and_see_the_current_student(teacher: str, tmp_path: Path) -> None:
    found, costs = {}, {}
    for passes in (1, 2):
        # As many prompts, for which twice as many updates are made.
        training = dataclasses.replace(on_policy().training, steps=STEPS // 2 * passes)
        experiment = with_stage(teacher, on_policy(passes=passes, training=training), needs_teacher=True)
        found[passes] = run(experiment, tmp_path / str(passes))
        costs[passes] = cost(tmp_path / str(passes))
    plain, twice = ([metrics for _, metrics in sorted(found[passes].items())] for passes in (1, 2))
    assert plain[0].keys() < twice[0].keys()
    assert all(plain[0][name] == twice[0][name] for name in plain[0].keys() - {"learning_rate"})
    assert [metrics["staleness"] for metrics in twice] == [0, 1] * 3
    assert all("staleness" not in metrics for metrics in plain)
    # What is said of the rollouts is said once.
    assert ["response_tokens/thinking" in metrics for metrics in twice] == [True, False] * 3
    assert {_place(name)[0] for metrics in twice for name in metrics} <= _TEXTS.keys()

    # The last batch's second pass, by the student that its first pass has left.
    model = hf.load(teacher, param_dtype=jnp.float32, compute_dtype=jnp.float32)
    current, metadata = saved(tmp_path / "2", teacher, STEPS - 1)
    rollouts = rollouts_from_json(metadata["data"]["batch"])
    assert {rollout.policy_step for rollout in rollouts} == {STEPS - 2}
    longest = max(len(rollout.tokens) for rollout in rollouts)
    tokens, mask = (
        np.stack([np.pad(getattr(one, name), (0, longest - len(one.tokens))) for one in rollouts])
        for name in ("tokens", "loss_mask")
    )
    seen = tokens, np.broadcast_to(np.arange(longest), tokens.shape), np.ones_like(tokens)
    own, said = (jax.nn.log_softmax(one.logits(*seen)) for one in (current, model))
    reverse_kl = float(jnp.sum(jnp.sum(jnp.exp(own) * (own - said), -1) * mask) / mask.sum())
    # Two orders of summation in float32; by the weights that generated it is that of the first pass.
    assert reverse_kl == pytest.approx(twice[-1]["loss"], rel=1e-4)
    assert reverse_kl != pytest.approx(twice[-2]["loss"], rel=1e-3)

    assert (costs[1]["steps"], costs[2]["steps"]) == (STEPS // 2, STEPS)
    # Students that have learned more often write other responses.
    for name in ("tokens_sampled", "teacher_flops", "student_sample_flops"):
        assert 0.8 < costs[2][name] / costs[1][name] < 1.25, name
    for name in ("tokens_trained", "student_train_flops"):
        assert 1.6 < costs[2][name] / costs[1][name] < 2.5, name


def test_all_of_it_goes_on_bit_for_bit_where_it_stopped(teacher: str, tmp_path: Path) -> None:
    """Growing prefixes, a share of their tokens, the student's likeliest, two parts a batch, two passes, batches ahead:
    stopped in either pass and between batches."""
    stage = on_policy(
        rollout_tokens=RolloutSchedule(first=6, full_share=0.3),
        prompts_per_step=2,
        updates_per_batch=2,
        passes=2,
        max_staleness=2,
        token_share=0.4,
        targets=StudentTopK(k=2),
        training=dataclasses.replace(on_policy().training, steps=12),
    )
    experiment = with_stage(teacher, stage, needs_teacher=True)
    whole = run(experiment, tmp_path / "whole")
    for stop_after in (1, 2, 1, 3):
        with Progress() as progress, pytest.raises(Interrupted):
            execute(experiment, tmp_path / "parts", progress, StopAfter(stop_after))
    parts = run(experiment, tmp_path / "parts")
    assert [metrics["staleness"] for metrics in whole.values()] == [*range(12)]
    assert whole == parts
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert cost(tmp_path / "parts")["teacher_flops"] == cost(tmp_path / "whole")["teacher_flops"]
    in_full = [metrics["rollouts_in_full"] for metrics in whole.values() if "rollouts_in_full" in metrics]
    assert len(in_full) == 6, "said in the first pass"
    assert min(in_full) < 1
    assert in_full[-2:] == [1, 1]
    for metrics in whole.values():
        if metrics.get("rollouts_in_full"):
            assert 0 <= metrics["never_stopped"] <= 1


@pytest.mark.long
def test_tokens_are_chosen_whatever_rows_they_are_packed_in(teacher: str, tmp_path: Path) -> None:
    found, costs = {}, {}
    for share, rows in ((1.0, 4), (0.3, 4), (0.3, 1)):
        training = dataclasses.replace(on_policy().training, steps=1, rows=rows)
        stage = on_policy(token_share=share, training=training)
        directory = tmp_path / f"{share}-{rows}"
        found[share, rows] = run(with_stage(teacher, stage, needs_teacher=True), directory)["rl", 1]
        costs[share, rows] = cost(directory)
    whole, wide, narrow = found.values()
    assert "chosen_tokens" not in whole
    assert 0.3 <= wide["chosen_tokens"] < 0.45, "a share of each response, rounded up"
    for name in ("loss", "chosen_tokens", "student_entropy", "gradient_norm", "divergence/thinking"):
        # float32 sums in another order
        assert narrow[name] == pytest.approx(wide[name], rel=1e-4), name
    assert wide["student_entropy"] > whole["student_entropy"]
    assert {_place(name)[0] for name in wide} <= _TEXTS.keys()
    first, second = costs[1.0, 4], costs[0.3, 4]
    assert second["tokens_trained"] == round(wide["chosen_tokens"] * first["tokens_trained"])
    for name in ("teacher_flops", "student_train_flops"):
        assert second[name] < first[name], name
    assert second["student_sample_flops"] == first["student_sample_flops"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"passes": 4}, "training.steps is 6, which passes, 4, does not divide"),
        ({"passes": 2, "updates_per_batch": 2}, "which updates_per_batch × passes, 2 × 2, does not divide"),
        ({"token_share": 0.0}, "token_share is 0.0; it must lie in 0.001..1"),
        ({"passes": 0}, "passes is 0; it must be at least 1"),
    ],
)
def test_batches_that_do_not_come_out_even_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        on_policy(**fields)
    assert "\n" not in str(refused.value)
