"""One run in miniature, which the tests of all workers share: from the command line, in a process of its own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from tests.distill import faults, miniature


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment file and its finished run, made by the worker that needs it first. Read only."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "miniature"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            try:
                _run(faults.make_experiment(folder), folder / "runs")
            except BaseException:
                shutil.rmtree(folder)
                raise
    return folder


def _run(file: Path, runs: Path) -> None:
    """One uninterrupted run of the command itself."""
    command, environment = miniature.launch_command(file, runs, devices=1)
    done = subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "self-test  KL of the student to itself" in done.stdout
    assert "report" in done.stdout


@pytest.fixture(scope="session")
def experiment_file(shared: Path) -> Path:
    return shared / "my_experiment.py"


@pytest.fixture(scope="session")
def finished(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's own copy of the run directory, which tests leave as they found it."""
    return shutil.copytree(shared / "runs" / "miniature", tmp_path_factory.mktemp("uninterrupted") / "miniature")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to damage."""
    return shutil.copytree(finished, tmp_path / "miniature")
