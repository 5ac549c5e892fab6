"""The built wheel is whole: it runs where the repository is not, on what a user brings."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

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


def _run(command: list[str | Path], cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed, in an environment that does not lead back to the repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout
