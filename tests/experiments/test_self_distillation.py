"""The hint is what teaches: by a copy of itself that reads the solution a student is far from right, and learns."""

import dataclasses
import io
from pathlib import Path

import jax
import pytest
from rich.console import Console

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages.stopping import StopRequest
from experiments import self_distillation
from tests.distill.faults import scalars


@pytest.mark.long
def test_two_steps_learn_from_what_the_copy_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = self_distillation.config()
    stage = whole.stages["on_policy"]
    training = dataclasses.replace(stage.training, steps=2, rows=4)
    experiment = dataclasses.replace(
        whole,
        stages={"on_policy": dataclasses.replace(stage, prompts_per_step=16, training=training)},
        evaluation=dataclasses.replace(whole.evaluation, problems=0),
    )
    one, meshes = jax.devices()[:1], Experiment.meshes
    monkeypatch.setattr(Experiment, "meshes", lambda self, devices=None: meshes(self, devices or one))
    with StopRequest().listening() as stop:
        execute(experiment, tmp_path / "run", Progress(Console(file=io.StringIO())), stop)
    first, second = (scalars(tmp_path / "run")["on_policy", step] for step in (1, 2))
    # Without the hint it would be its own teacher, whose divergence is 0; with it, it is sure of the answer.
    assert first["divergence"] > 0.5
    assert first["teacher_entropy"] < first["student_entropy"]
    assert second["divergence"] != first["divergence"]
