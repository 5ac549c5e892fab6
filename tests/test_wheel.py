"""The built wheel is whole: it runs where the repository is not, on what a user brings."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.distill import miniature

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels_pallas", "qwen3", "teacher", "student", "distill", "experiments")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build in place would pick up, and leave behind, stale files in build/."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    _run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def user_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel and this environment's libraries, but not the repository."""
    home = tmp_path_factory.mktemp("user_environment")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    packages = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    _run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", packages, wheel])
    # A folder named in a .pth file is searched, but its own .pth files, such as an editable install's, are not read.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licence = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    here = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == here
    assert len(licence) == 1


def test_packages_come_from_the_wheel(user_python: Path, tmp_path: Path) -> None:
    listing = f"import importlib\nfor n in {PACKAGES}: print(importlib.import_module(n).__file__)"
    files = [Path(line) for line in _run([user_python, "-c", listing], cwd=tmp_path).split()]
    assert len(files) == len(PACKAGES)
    assert all(file.is_relative_to(user_python.parents[1]) for file in files), files


USERS_EXPERIMENT = """
from distill.evaluation.evaluate import Evaluation
from distill.experiment import Experiment, Teacher
from distill.training.losses import Loss
from distill.stages import OffPolicy, OnPolicy
from distill.stages.loop import Training
from distill.tasks import PromptFile
from qwen3.generation.sampling import SamplingParams
from student.init import FromCheckpoint

SHORT = dict(thinking=SamplingParams(max_new_tokens=16), non_thinking=SamplingParams(max_new_tokens=8),
             max_prompt_tokens=80)
TRAINING = Training(steps=2, rows=8, row_length=96)


def config():
    return Experiment(
        name="mine",
        description="A user's own.",
        student=FromCheckpoint(path="models/teacher"),
        teacher=Teacher(path="models/teacher", dtype="float32"),
        tasks={"mine": PromptFile(path="prompts.jsonl", verifier="integer", held_out_fraction=0.2)},
        stages={
            "off_policy": OffPolicy(prompts=8, top_k=4, batch_size=8, training=TRAINING, **SHORT),
            "on_policy": OnPolicy(prompts_per_step=8, loss=Loss(name="jsd", weight=0.5), training=TRAINING, **SHORT),
        },
        evaluation=Evaluation(problems=4, samples_per_problem=2, pass_at=(2,), batch_size=8, **SHORT),
    )
"""


@pytest.mark.long
def test_a_users_own_experiment_models_and_prompts_run_outside_the_repository(
    user_python: Path, tmp_path: Path
) -> None:
    miniature.make_teacher(tmp_path / "models")
    problems = miniature.task().problems("train", 60, seed=0)
    lines = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in problems]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "my_experiment.py").write_text(USERS_EXPERIMENT)
    out = _run([user_python, "-m", "distill.run", "my_experiment.py"], cwd=tmp_path)
    assert "report runs/mine/report.html" in out
    report = json.loads((tmp_path / "runs" / "mine" / "report.json").read_text())
    assert {row["model"] for row in report["rows"]} == {"student_initial", "off_policy", "on_policy", "teacher"}
    assert (tmp_path / "runs" / "mine" / "export" / "model.safetensors").exists()


def _run(command: list[str | Path], cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed, in an environment that does not lead back to the repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout
