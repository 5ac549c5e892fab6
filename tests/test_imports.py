"""Imports point one way, so that a change in one room cannot reach back into the rooms it is built on."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "kernels_pallas": set(),
    "qwen3": {"kernels_pallas"},
    "teacher": {"kernels_pallas", "qwen3"},
    "student": {"kernels_pallas", "qwen3"},
    "distill": {"kernels_pallas", "qwen3", "teacher", "student"},
    "experiments": {"kernels_pallas", "qwen3", "teacher", "student", "distill"},
}
# Rooms of a package from top to bottom: each may import those of the lines below it, and none beside or above it.
FLOORS: dict[str, tuple[set[str], ...]] = {
    "distill": (
        {"run", "plan"},
        {"runner"},
        {"planner"},
        {"experiment"},
        {"evaluation"},
        {"stages"},
        {"rewards"},
        {"tasks", "report"},
        {"training", "monitor"},
    ),
    "qwen3": (
        {"generation"},
        {"checkpoint"},
        {"decoder", "chat"},
        {"sharding", "folder"},
        {"json_fields", "rollout", "cores", "commands", "hosts"},
        {"field_types"},
        {"errors"},
    ),
}
# What users import from; it imports when it is asked, and nothing below it may ask.
FACADE = "distill"
# Only the suite's environment has these.
TEST_ONLY = {"accelerate", "hypothesis", "peft", "pytest", "torch", "transformers"}


def module_files(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module in the packages under `root`; a folder without __init__.py is data."""
    files = {}
    for init in sorted(root.glob("*/__init__.py")):
        for file in sorted(init.parent.rglob("*.py")):
            if not (file.parent / "__init__.py").exists():
                continue
            parts = file.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imported_names(module: str, file: Path) -> Iterator[str]:
    """Dotted names that a module imports, at any depth; `from a import b` gives `a.b`, module or not."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_graph(root: Path, *, with_packages: bool = True) -> dict[str, set[str]]:
    """Module -> what importing it imports: modules under `root` and the packages around them, and other names.

    Without `with_packages`, what its own lines name alone.
    """
    files = module_files(root)
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        graph[module] = set()
        for name in imported_names(module, file):
            own = name if name in files else name.rpartition(".")[0]
            if own not in files:
                graph[module].add(name)
                continue
            parts = own.split(".")
            around = {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
            graph[module] |= around & files.keys() if with_packages else {own}
    return graph


def violations(root: Path) -> list[str]:
    graph = import_graph(root)
    named = import_graph(root, with_packages=False)
    return [
        *(complaint for module in graph for complaint in _wrong_packages(module, graph[module])),
        *(complaint for module in graph for complaint in _private_kernels(module, graph)),
        *(complaint for module in named for complaint in _wrong_rooms(module, named[module])),
        *_circles(named),
    ]


def _wrong_packages(module: str, imported: set[str]) -> Iterator[str]:
    room = module.split(".")[0]
    if room not in MAY_IMPORT:
        yield f"{module}: the package {room} has no place in the import order"
        return
    for name in sorted(imported):
        target = name.split(".")[0]
        if target in TEST_ONLY:
            yield f"{module} imports {name}, which only the tests have"
        elif target in MAY_IMPORT and target != room and target not in MAY_IMPORT[room]:
            yield f"{module} imports {name}; {room} may not import {target}"


def _private_kernels(module: str, graph: dict[str, set[str]]) -> Iterator[str]:
    for name in sorted(graph[module] & graph.keys()):
        parts = name.split(".")
        outside = module.split(".")[:2] != parts[:2]
        if parts[0] == "kernels_pallas" and len(parts) > 2 and parts[2] != "api" and outside:
            yield f"{module} imports {name}; only {'.'.join(parts[:2])}.api is public"


def _wrong_rooms(module: str, named: set[str]) -> Iterator[str]:
    package, _, inside = module.partition(".")
    if FACADE in named and package != "experiments":
        yield f"{module} imports from {FACADE}, which is for experiment files; name the module"
    if package not in FLOORS or not inside:
        return
    levels = {room: level for level, rooms in enumerate(FLOORS[package]) for room in rooms}
    room = inside.split(".")[0]
    if room not in levels:
        yield f"{module}: the room {room} has no place among those of {package}"
        return
    for name in sorted(named):
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1 and parts[1] != room and levels.get(parts[1], -1) <= levels[room]:
            yield f"{module} imports {name}; {package}.{room} may not import {package}.{parts[1]}"


def _circles(graph: dict[str, set[str]]) -> Iterator[str]:
    finished: set[str] = set()

    def walk(module: str, path: list[str]) -> Iterator[str]:
        if module in path:
            yield f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        elif module not in finished:
            for name in sorted(graph[module] & graph.keys()):
                yield from walk(name, [*path, module])
            finished.add(module)

    for module in graph:
        if module != FACADE:
            yield from walk(module, [])


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


def test_every_room_is_walked() -> None:
    graph = import_graph(ROOT)
    assert {module.split(".")[0] for module in graph} == MAY_IMPORT.keys()
    assert "qwen3.decoder.config" in graph["qwen3.decoder.model"]
    for package, floors in FLOORS.items():
        rooms = {module.split(".")[1] for module in graph if module.startswith(f"{package}.")}
        assert rooms == set().union(*floors), f"rooms of {package}"


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"qwen3/a": "import teacher.store"}, "qwen3.a imports teacher.store; qwen3 may not import teacher"),
        ({"teacher/a": "from student import init"}, "teacher may not import student"),
        ({"student/a": "def f():\n    import teacher"}, "student may not import teacher"),
        ({"kernels_pallas/k/api": "from qwen3.decoder.rope import rotate"}, "kernels_pallas may not import qwen3"),
        ({"distill/a": "import experiments.quickstart"}, "distill may not import experiments"),
        ({"distill/a": "import torch.nn"}, "distill.a imports torch.nn, which only the tests have"),
        ({"serving/a": ""}, "the package serving has no place"),
        ({"kernels_pallas/k/xla": "", "qwen3/a": "from kernels_pallas.k import xla"}, "only kernels_pallas.k.api"),
        ({"kernels_pallas/k/xla": "", "qwen3/a": "from kernels_pallas.k.xla import f"}, "only kernels_pallas.k.api"),
        ({"kernels_pallas/k/xla": "", "kernels_pallas/j/api": "from ..k import xla"}, "only kernels_pallas.k.api"),
        ({"distill/a": ""}, "distill.a: the room a has no place among those of distill"),
        ({"qwen3/a": ""}, "qwen3.a: the room a has no place among those of qwen3"),
        (
            {"distill/tasks/a": "import distill.stages.b", "distill/stages/b": ""},
            "distill.tasks may not import distill",
        ),
        (
            {"distill/monitor/a": "from ..training import b", "distill/training/b": ""},
            "monitor may not import distill.training",
        ),
        ({"distill/tasks/a": "def f():\n    import distill.run", "distill/run": ""}, "may not import distill.run"),
        ({"qwen3/decoder/a": "from qwen3.chat import b", "qwen3/chat/b": ""}, "decoder may not import qwen3.chat"),
        ({"qwen3/errors": "import qwen3.sharding", "qwen3/sharding": ""}, "errors may not import qwen3.sharding"),
        ({"distill/tasks/a": "from distill import Loss"}, "distill.tasks.a imports from distill, which is for"),
        (
            {"distill/tasks/a": "from . import b", "distill/tasks/b": "import distill.tasks.a"},
            "circle: distill.tasks.a -> distill.tasks.b -> distill.tasks.a",
        ),
        (
            {"teacher/a": "from teacher.b import f", "teacher/b": "def f():\n    import teacher.a"},
            "circle: teacher.a -> teacher.b -> teacher.a",
        ),
    ],
)
def test_a_violation_is_named(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    _write_tree(tmp_path, files)
    assert any(complaint in line for line in violations(tmp_path)), violations(tmp_path)


def test_allowed_imports_pass(tmp_path: Path) -> None:
    _write_tree(
        tmp_path,
        {
            "kernels_pallas/k/api": "from kernels_pallas.k import xla\nfrom . import xla",
            "kernels_pallas/k/xla": "import jax",
            "qwen3/decoder/a": "from kernels_pallas.k import f\nfrom kernels_pallas.k.api import f",
            "teacher/a": "import qwen3.decoder.a",
            "distill/run": "from distill import experiment\nimport distill.training.losses",
            "distill/experiment": "from distill.stages import sft",
            "distill/stages/sft": "from ..training.losses import f",
            "distill/training/train_step": "import distill.training.losses\nfrom teacher.a import f",
            "distill/training/losses": "",
            "experiments/b": "from distill import Experiment",
            "experiments/a": "from distill.run import main",
        },
    )
    assert violations(tmp_path) == []


def _write_tree(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        file = root / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        for folder in list(file.parents)[: len(name.split("/")) - 1]:
            (folder / "__init__.py").touch()


# jax refuses to change this setting once a backend is up: the public way to learn that none is.
_IMPORT_EVERYTHING = """
import importlib, json, os, sys
# What libraries set is not ours to judge.
import jax, flax.nnx, grain, optax, orbax.checkpoint
import jax.experimental.pallas.mosaic_gpu, jax.experimental.pallas.tpu
def state():
    return {**{f"jax.{k}": repr(v) for k, v in jax.config.values.items()}, **os.environ}
before, changed = state(), {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    after = state()
    changed.update({key: name for key in before.keys() | after.keys() if before.get(key) != after.get(key)})
    before = after
try:
    jax.config.update("jax_num_cpu_devices", 3)
except RuntimeError as error:
    changed["devices"] = str(error)
print(json.dumps(changed))
"""


def _changes_made_by_importing(modules: list[str], root: Path) -> dict[str, str]:
    """Settings that changed -> the module whose import changed them."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_IMPORT_EVERYTHING), json.dumps(modules)],
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_changes_no_setting_and_starts_no_device() -> None:
    assert _changes_made_by_importing(list(module_files(ROOT)), ROOT) == {}


def test_a_side_effect_of_importing_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "flag.py").write_text("import jax\njax.config.update('jax_enable_x64', True)\n")
    (tmp_path / "variable.py").write_text("import os\nos.environ['A_NEW_ONE'] = '1'\n")
    (tmp_path / "eager.py").write_text("import jax.numpy\nTABLE = jax.numpy.zeros(3)\n")
    changes = _changes_made_by_importing(["flag", "variable", "eager"], tmp_path)
    assert changes.keys() == {"jax.jax_enable_x64", "A_NEW_ONE", "devices"}
    assert (changes["jax.jax_enable_x64"], changes["A_NEW_ONE"]) == ("flag", "variable")
