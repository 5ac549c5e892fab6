"""The benchmark of whole programs: its cases are there, and what fails or takes too much is seen in its exit status."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from distill.planner.program import Program
from distill.runner.experiment_file import listed
from experiments.benchmarks import program_cases, programs
from experiments.benchmarks.program_cases import ProgramCase, cases
from qwen3.decoder.config import ModelConfig
from qwen3.errors import UserError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_cases_are_told_apart_and_the_subset_is_a_part_of_them() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    assert all(set(case.subset) <= set(case.targets) for case in cases())
    compiled = {case.operation for case in cases() if case.subset}
    assert compiled == {"235B-A22B scores", "0.6B writes", "qwen3_235b_to_8b"}


def test_every_experiment_with_published_checkpoints_is_compiled() -> None:
    there = {file.stem for file, _ in listed(EXPERIMENTS) if file.stem.startswith("qwen3_")}
    assert set(program_cases.TARGETS) == there
    assert set(program_cases.WITH_TEACHER) < there


def _squared(devices: list[Any], *, fails: bool = False) -> Program:
    def square(x: jax.Array) -> jax.Array:
        if fails:
            raise ValueError("no such\nlayout")
        return x @ x

    return Program(
        stage="one",
        purpose="teacher_scores",
        model=ModelConfig.from_folder(EXPERIMENTS / "qwen3_configs" / "Qwen3-0.6B-Base"),
        function=jax.jit(square),
        arguments=(jax.ShapeDtypeStruct((64, 64), jnp.float32),),
        mesh=jax.sharding.Mesh([devices[0]], ("device",)),
        rows=64,
        length=64,
    )


@pytest.fixture
def compiling_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases compiled for this CPU, in this process. The product takes two arrays of 16 KiB."""
    common: dict[str, Any] = {"shape": "64", "targets": ("v5e:2x2", "h100:1x8")}
    mine = [
        ProgramCase(operation="good", program=_squared, most_bytes=2**15, subset=("v5e:2x2",), **common),
        ProgramCase(operation="large", program=_squared, most_bytes=2**15 - 1, **common),
        ProgramCase(operation="bad", program=functools.partial(_squared, fails=True), **common),
    ]
    monkeypatch.setattr(programs.topologies, "devices", lambda target: jax.devices())
    monkeypatch.setattr(programs, "cases", lambda: mine)
    monkeypatch.setattr(programs, "_pool", ThreadPoolExecutor)


@pytest.mark.usefixtures("compiling_here")
def test_what_fails_or_takes_too_much_shows_in_the_table_and_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.main(programs.arguments(["--subset"])) == 0
    said = capsys.readouterr().out
    assert "| program | v5e:2x2 |" in said
    assert "1 of 1 compiled" in said
    assert programs.main(programs.arguments(["--targets", "h100:1x8"])) == 1
    said, failures = capsys.readouterr()
    (good, large, bad) = said.splitlines()[4:7]
    assert good.startswith("| good, 64 | ")
    assert "**" not in good
    assert large.startswith("| large, 64 | **")
    assert bad == "| bad, 64 | **failed** |"
    assert "1 of 3 compiled" in said
    assert "large, 64, h100:1x8: takes 0.00 GiB of each device, which may be 0\n" in failures
    assert failures.endswith("failed: bad, 64, h100:1x8: no such layout\n")
    assert programs.main(programs.arguments(["--only", "good"])) == 0
    assert "2 of 2 compiled" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--only", "nobody"], ["--targets", "v5e:4x4"]])
def test_nothing_to_compile_is_said(options: list[str]) -> None:
    with pytest.raises(UserError, match="nothing is compiled for"):
        programs.main(programs.arguments(options))
