"""Off-policy on tokens sampled from the teacher: stored, packed and learned from like any other targets."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages.stopping import StopRequest
from qwen3.sharding import make_mesh
from teacher.store import TargetStore
from tests.distill import miniature


@pytest.mark.long
def test_a_stage_keeps_drawn_words_and_learns_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = miniature.experiment(miniature.make_teacher(tmp_path))
    stage = whole.stages["off_policy"]
    training = dataclasses.replace(stage.training, steps=3)
    experiment = dataclasses.replace(
        whole,
        stages={"off_policy": dataclasses.replace(stage, sampled_tokens=3, training=training)},
        evaluation=dataclasses.replace(whole.evaluation, problems=4, modes=("non_thinking",)),
        export_stage=None,
    )
    # Programs for one device compile several times as fast as for eight.
    monkeypatch.setattr("distill.experiment.make_mesh", lambda shape, _: make_mesh(shape, jax.devices()[:1]))
    with Progress() as progress:
        execute(experiment, tmp_path / "run", progress, StopRequest())
    store = TargetStore.open(tmp_path / "run" / "targets" / "off_policy")
    assert store.entries == 3
    for index in range(len(store)):
        record = store[index]
        kept = record.rollout.loss_mask
        np.testing.assert_allclose(np.exp(record.logprobs[kept]).sum(-1), 1, rtol=1e-6)  # float32
        assert record.entropy is not None
        assert np.all(record.entropy[kept] > 0)
    drawn = np.concatenate([store[index].ids[store[index].rollout.loss_mask] for index in range(len(store))])
    assert len(np.unique(drawn, axis=0)) > len(drawn) / 2
    records = [json.loads(line)["scalars"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for scalars in records:
        assert np.isfinite(scalars["loss"])
        # Differences of entropies of about 5 nats in float32.
        assert scalars["loss"] == pytest.approx(scalars["divergence"], abs=1e-5)
        assert "teacher_tail_mass" not in scalars
