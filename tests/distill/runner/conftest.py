"""One run in miniature, which the tests of a process share: from the command line, in a process of its own."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distill import faults, miniature


@pytest.fixture(scope="session")
def experiment_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_experiment(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="session")
def finished(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one uninterrupted run of the command itself."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    command, environment = miniature.launch_command(experiment_file, runs, devices=1)
    done = subprocess.run(
        command, cwd=experiment_file.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "self-test  KL of the student to itself" in done.stdout
    assert "report" in done.stdout
    return runs / "miniature"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to damage."""
    return shutil.copytree(finished, tmp_path / "miniature")
