"""What the READMEs tell people to type works as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

from distill.monitor.progress import Progress
from distill.runner.experiment_file import load_experiment
from distill.runner.preflight import preflight
from qwen3.chat.chat import ChatTokenizer

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted(
    file
    for file in ROOT.rglob("README.md")
    if not any(part.startswith(".") or part in ("runs", "build") for part in file.relative_to(ROOT).parts)
)
_NAMED = re.compile(r"`(?P<name>[\w.]+\.(?:py|jsonl))`[^`\n]*:\n\n```\w+\n(?P<text>.*?)```\n", re.DOTALL)
_PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def named_blocks(file: Path) -> dict[str, str]:
    """File name -> text, of the blocks that a README introduces as files."""
    return {match["name"]: match["text"] for match in _NAMED.finditer(file.read_text())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader types: the blocks as files, beside the repository's experiments."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    for readme in (ROOT / "README.md", ROOT / "distill" / "README.md"):
        for name, text in named_blocks(readme).items():
            (folder / name).write_text(text)
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def first_run(folder: Path) -> str:
    return run(folder, "-m", "distill.run", "my_run.py")


def test_the_first_run(first_run: str, folder: Path) -> None:
    assert "student before" in first_run
    assert (folder / "runs/my_run/export/model.safetensors").exists()
    assert (folder / "runs/my_run/report.html").exists()


def examples() -> list[str]:
    names = named_blocks(ROOT / "distill" / "README.md")
    return sorted(Path(name).stem for name in names if name.endswith(".py") and name != "use.py")


@pytest.mark.parametrize("name", examples())
def test_an_example_would_begin(name: str, folder: Path, first_run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fields, its data, its lengths and the headers of its models are what a run asks for before it begins."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    experiment = load_experiment(Path(f"{name}.py"))
    mesh, teacher_mesh = experiment.meshes(jax.devices()[: 2 if name == "own_mesh" else 1])
    teachers = [teacher.path for teacher in experiment.all_teachers.values()]
    tokenizer = ChatTokenizer.from_folder((*teachers, experiment.student.tokenizer_folder)[0])
    tasks = experiment.mixture()
    preflight(experiment, mesh, teacher_mesh, tokenizer, tasks, Progress(Console(quiet=True)))


def test_supervised_fine_tuning(folder: Path, first_run: str) -> None:
    run(folder, "-m", "distill.run", "sft.py", "--stages.sft.training.steps", "2", "--evaluation.problems", "0")
    assert (folder / "runs" / "sft" / "report.json").exists()


def test_the_export_in_transformers(folder: Path, first_run: str) -> None:
    assert "<|im_start|>assistant" in run(folder, "use.py")


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_python_blocks_are_of_this_version(file: Path) -> None:
    for block in _PYTHON.findall(file.read_text()):
        code = compile(block, str(file), "exec")
        if "my_run" not in block and "transformers" not in block:
            exec(code, {})


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    for link in _LINK.findall(file.read_text()):
        assert (file.parent / link).exists(), link


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9_000
