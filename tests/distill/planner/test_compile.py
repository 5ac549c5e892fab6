"""Compilers in processes of their own: equal programs are compiled once, and one that dies is a finding."""

import collections
import os
from typing import Any

import jax
import pytest
from rich.console import Console

from distill.experiment import Experiment
from distill.planner import compile as plan_compile
from distill.planner.compile import compile_all, workers_here
from distill.planner.program_memory import Compiled
from distill.planner.programs import programs
from tests.distill import miniature


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return miniature.experiment(miniature.make_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.mark.long
def test_equal_programs_are_compiled_once(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = programs(experiment, jax.devices()[:1])
    asked: list[int] = []

    def alone(experiment: Experiment, topology: str, number: int) -> tuple[Compiled, float]:
        asked.append(number)
        return Compiled(temporary_bytes=number), 65.0

    monkeypatch.setattr(plan_compile, "_alone", alone)
    found = dict(compile_all(experiment, "v5e:1x1", made, workers=2, console=Console(width=120)))
    assert sorted(found) == list(range(len(made)))
    assert len(asked) < len(made)
    texts = [p.function.trace(*p.arguments, **p.options).lower().as_text() for p in made]
    compiled_as = collections.defaultdict(set)
    for number, one in found.items():
        compiled_as[one.temporary_bytes].add(texts[number])
    assert compiled_as.keys() == set(asked)
    assert all(len(same) == 1 for same in compiled_as.values())
    said = capsys.readouterr().out
    assert f"compiling, 2 at a time  {len(asked)}/{len(asked)} programs" in said
    assert said.count("1 min 05 s") == len(asked)
    assert said.count("is the same program as") == len(made) - len(asked)
    assert "evaluation: teacher prefills is the same program as off_policy: teacher prefills" in said


def _aborts(*asked: Any) -> Compiled:
    os.abort()


def test_a_compiler_that_aborts_is_a_finding(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_compile, "_compile", _aborts)
    made = programs(experiment, jax.devices()[:1])[:1]
    ((number, found),) = compile_all(experiment, "v5e:1x1", made, workers=1, console=Console(quiet=True))
    assert number == 0
    assert found.error is not None
    assert found.error.startswith("the compiler ended its process; what it said stands above")
    assert found.error.endswith("take fewer --workers")


def test_as_many_compilers_as_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_compile, "usable_cores", lambda: 2**20)
    few = workers_here()
    assert 1 <= few < 2**20
    monkeypatch.setattr(plan_compile, "_PROCESS_BYTES", 2**60)
    assert workers_here() == 1
