"""The benchmark of the kernels: its cases are whole, and what fails is seen in its exit status."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import kernel_compile, kernel_run, kernels
from experiments.benchmarks.kernel_cases import LARGEST, Case, cases
from qwen3.errors import UserError

ROOT = Path(__file__).parents[2]


def _case(name: str, function: Callable[..., Any]) -> Case:
    def sample(key: jax.Array) -> tuple[jax.Array, ...]:
        return (jax.random.normal(key, (64, 64), jnp.bfloat16),)

    return Case(operation=name, shape="64", function=function, sample=sample, flops=2 * 64**3)


def _square(x: jax.Array, *, implementation: str) -> jax.Array:
    assert implementation == "xla"
    return x @ x


def _refused(x: jax.Array, *, implementation: str) -> jax.Array:
    raise ValueError("no such\nlayout")


def _rough(x: jax.Array, *, implementation: str) -> jax.Array:
    return x @ x * (1.1 if x.dtype == jnp.bfloat16 else 1)


def _no_number(x: jax.Array, *, implementation: str) -> jax.Array:
    return x @ x * (jnp.nan if x.dtype == jnp.bfloat16 else 1)


@pytest.mark.parametrize("case", {case.operation: case for case in cases()}.values(), ids=lambda case: case.name)
def test_a_case_can_be_traced(case: Case) -> None:
    assert jax.tree.leaves(jax.eval_shape(case.program("xla"), *case.arguments()))


def test_every_kernel_that_there_is_gets_compiled() -> None:
    for operation in ("attention", "paged_attention", "grouped_matmul", "linear_kl"):
        there = {file.stem for file in (ROOT / "kernels_pallas" / operation).glob("?pu.py")} - {"cpu"}
        assert there == {"tpu", "gpu"}
        mine = [case for case in cases() if case.operation.startswith(operation)]
        assert mine
        assert all(set(case.kernels) == there for case in mine)


def test_cases_are_told_apart_and_the_subset_is_a_part_of_them() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    subset = [case for case in cases() if case.subset]
    assert 0 < len(subset) < len(names)
    assert any(LARGEST in case.name for case in subset)


@pytest.fixture
def compiling_here(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Cases compiled for this CPU, in this process."""
    mine = [_case("good", _square), _case("bad", _refused)]
    monkeypatch.setattr(kernel_compile.topologies, "devices", lambda target: jax.devices())
    monkeypatch.setattr(kernel_compile, "cases", lambda: mine)
    monkeypatch.setattr(kernel_compile, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    return mine


def test_a_failed_compilation_shows_in_the_table_and_the_status(
    compiling_here: list[Case], capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernel_compile.compile_all(compiling_here[:1], ["v5e", "h100"], workers=1) == 0
    assert "2 of 2 compiled" in capsys.readouterr().out
    assert kernel_compile.compile_all(compiling_here, ["v5e"], workers=1) == 1
    said = capsys.readouterr()
    assert "| bad | 64 | **failed** |" in said.out
    assert "1 of 2 compiled" in said.out
    assert said.err == "failed: bad 64, v5e: no such layout\n"


def test_a_compiler_that_aborts_fails_its_own_case_only(
    compiling_here: list[Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(ThreadPoolExecutor):
        """Dies of the first case in it that is bad, with all that come after."""

        dead = False

        def submit(self, function: Any, name: str, target: str) -> Future:  # type: ignore[override]
            self.dead |= name.startswith("bad")
            if not self.dead:
                return super().submit(function, name, target)
            future: Future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(kernel_compile, "ProcessPoolExecutor", lambda count, mp_context: Broken(count))
    compiling_here.append(_case("after", _square))
    assert kernel_compile.compile_all(compiling_here, ["v5e"], workers=1) == 1
    said = capsys.readouterr()
    assert "2 of 3 compiled" in said.out
    assert said.err == "failed: bad 64, v5e: the compiling process died; what it said last stands above\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compile", "v5e,v9"], "target 'v9' is unknown"),
        (["--run"], "--run needs a TPU or an NVIDIA GPU"),
        (["--run", "--only", "no such case"], "no case has 'no such case' in its name"),
        ([], "give either --compile with targets"),
    ],
)
def test_what_cannot_start_is_said_in_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_compile.topologies, "_require", lambda kind, *packages: None)
    monkeypatch.setattr(kernel_compile.topologies, "_topology", lambda name, **options: jax.devices())
    for variable in kernel_compile.topologies._LIBTPU:
        monkeypatch.setenv(variable, "set back by the test")
    with pytest.raises(UserError, match=said):
        kernels.main(kernels.arguments(arguments))


def test_a_missing_compiler_ends_with_status_2() -> None:
    command = [sys.executable, "-m", "experiments.benchmarks.kernels", "--compile", "h100,v5e"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: compiling for h100 needs the package jax_cuda13_plugin")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("function", "right"), [(_square, True), (_rough, False), (_no_number, False), (_refused, False)]
)
def test_numbers_that_are_off_are_seen(
    function: Callable[..., Any], right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_run, "_ROUND_SECONDS", 1e-3)
    roofs = kernel_run.Roofs(1e12, 1e11)
    assert kernel_run.print_rows(_case("case", function), "cpu", roofs) == right
