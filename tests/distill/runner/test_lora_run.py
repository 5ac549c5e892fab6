"""A student with adapters through a whole run: on-policy, resumed, evaluated, exported."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages.stopping import StopRequest
from qwen3.chat.chat import ChatTokenizer
from qwen3.errors import UserError
from qwen3.sharding import make_mesh
from student.export import export
from student.init import FromCheckpoint, FromScratch
from student.lora import Lora
from tests.distill import miniature
from tests.distill.faults import scalars

pytestmark = pytest.mark.usefixtures("charts_are_left_out")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("adapted")
    teacher = miniature.make_teacher(folder)
    base = FromScratch(architecture=miniature.DENSE, tokenizer=teacher).build(jax.random.key(3))
    export(folder / "base", base, ChatTokenizer.from_folder(teacher))
    whole = miniature.experiment(teacher)
    on_policy = whole.stages["on_policy"]
    training = dataclasses.replace(on_policy.training, steps=2, checkpoint_every_steps=1)
    return dataclasses.replace(
        whole,
        student=FromCheckpoint(path=str(folder / "base"), lora=Lora(rank=2, base_dtype="float32")),
        stages={"on_policy": dataclasses.replace(on_policy, training=training)},
        evaluation=dataclasses.replace(whole.evaluation, problems=4, modes=("non_thinking",)),
        export_stage=None,
        export_adapter=True,
    )


@pytest.fixture(scope="module")
def finished(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one uninterrupted run."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    run(experiment, directory)
    return directory


def run(experiment: Experiment, directory: Path) -> None:
    """On one device: programs for eight take several times as long to compile."""
    with pytest.MonkeyPatch.context() as patched, Progress() as progress:
        patched.setattr("distill.experiment.make_mesh", lambda shape, _: make_mesh(shape, jax.devices()[:1]))
        execute(experiment, directory, progress, StopRequest())


def test_resumed_after_its_first_step_it_ends_in_the_same_adapters(
    experiment: Experiment, finished: Path, tmp_path: Path
) -> None:
    """What a process that was killed in its second step leaves behind, and the same command again."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "on_policy" / "2")
    shutil.rmtree(tmp_path / "export")
    for kind in ("stages", "evaluations"):
        (tmp_path / kind / "on_policy.json").unlink()
    run(experiment, tmp_path)
    assert scalars(tmp_path) == scalars(finished)
    ours, theirs = (load_file(folder / "export" / "adapter_model.safetensors") for folder in (tmp_path, finished))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
        assert np.any(tensor), f"{name} was never trained"
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path, finished)]
    assert reports[0]["rows"] == reports[1]["rows"]
    assert reports[0]["adapter_parameters"] == sum(tensor.size for tensor in ours.values())


def test_another_base_is_refused(experiment: Experiment, finished: Path) -> None:
    assert isinstance(experiment.student, FromCheckpoint)
    file = Path(experiment.student.path) / "model.safetensors"
    before = file.read_bytes()
    weights = load_file(file)
    save_file({name: weight + 1 for name, weight in weights.items()}, file)
    with pytest.raises(UserError, match=r"model\.safetensors \(student\.path\) has changed since this run began"):
        run(experiment, finished)
    file.write_bytes(before)
