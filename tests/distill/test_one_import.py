"""What an experiment file names comes from one import, which costs nothing until a name is asked for."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import distill

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


def test_type_checkers_see_what_is_imported() -> None:
    tree = ast.parse((ROOT / "distill" / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == distill._HOMES


@pytest.mark.parametrize("name", distill.__all__)
def test_a_name_is_the_one_of_its_module(name: str) -> None:
    assert getattr(distill, name) is getattr(importlib.import_module(distill._HOMES[name]), name)
    assert name in dir(distill)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(ImportError, match="cannot import name 'OfPolicy' from 'distill'"):
        exec("from distill import OfPolicy")


def test_importing_is_cheap() -> None:
    script = "import sys; before = set(sys.modules); import distill; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "distill.experiment"} & set(ast.literal_eval(done.stdout))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_experiments_use_it(file: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    elsewhere = {f"{node.module}.{alias.name}" for node in imports for alias in node.names if node.module != "distill"}
    assert not {name.rpartition(".")[2] for name in elsewhere} & set(distill.__all__), elsewhere
