"""Compiles cases for accelerators that are not here, in processes of their own: a compiler that aborts ends one."""

import functools
import importlib.metadata
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from experiments.benchmarks.kernel_cases import Case, cases
from kernels_pallas import topologies
from qwen3.errors import UserError

DIED = "the compiling process died; what it said last stands above"
Result = TypeVar("Result")
_COMPILERS = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


class Outcome(NamedTuple):
    """What became of one case for one target."""

    implementation: str
    seconds: float = 0
    temp_bytes: int = 0
    error: str | None = None


def compile_all(chosen: Sequence[Case], targets: Sequence[str], workers: int) -> int:
    """Print a Markdown table row by row, progress on a terminal's standard error, failures there at the end.

    Returns the exit status: 1 where something did not compile. Raises UserError for a target that is unknown or whose
    compiler is not installed.
    """
    require_targets(targets)
    begin, total, failures = time.monotonic(), len(chosen) * len(targets), []
    print(f"{versions()}; processor seconds to compile, MiB of temporary memory\n")
    print(f"| operation | at | {' | '.join(targets)} |\n|---|---|{'---|' * len(targets)}", flush=True)
    with _pool(workers) as pool:
        rows = [[pool.submit(compile_case, case.name, target) for target in targets] for case in chosen]
        for number, (case, row) in enumerate(zip(chosen, rows, strict=True)):
            outcomes: list[Outcome] = []
            for target, job in zip(targets, row, strict=True):
                progress(f"{number * len(targets) + len(outcomes) + 1}/{total} {case.name}, {target}")
                outcomes.append(result(job, _pool, Outcome("", error=DIED), compile_case, case.name, target))
            progress("")
            print(f"| {case.operation} | {case.shape} | {' | '.join(map(_cell, outcomes))} |", flush=True)
            failures += [
                f"{case.name}, {target}: {outcome.error}"
                for target, outcome in zip(targets, outcomes, strict=True)
                if outcome.error is not None
            ]
    print(f"\n{total - len(failures)} of {total} compiled in {time.monotonic() - begin:.0f} s, {workers} at a time")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def require_targets(targets: Sequence[str]) -> None:
    """Raises UserError for a target that is unknown or whose compiler is not installed."""
    try:
        for target in targets:
            topologies.devices(target)
    except (ValueError, ModuleNotFoundError) as error:
        raise UserError(str(error)) from None


def compile_case(name: str, target: str) -> Outcome:
    """Compile the case of that name for one device of the target."""
    (case,) = (case for case in cases() if case.name == name)
    mesh = _mesh(target)
    platform = mesh.devices.item().platform
    implementation = platform if platform in case.kernels else "xla"
    function = jax.jit(case.program(implementation))
    begin = processor_seconds()
    try:
        compiled = topologies.compile_for(mesh, function, *case.arguments())
    except Exception as error:  # noqa: BLE001 - whatever a compiler says is a result
        return Outcome(implementation, error=one_line(error))
    seconds = processor_seconds() - begin
    memory = compiled.memory_analysis()
    assert memory is not None
    return Outcome(implementation, seconds, memory.temp_size_in_bytes, topologies.shortage(compiled, target))


def processor_seconds() -> float:
    """Of this process and of those that it has waited for, such as NVIDIA's assembler: others may be busy beside it."""
    return sum(os.times()[:4])


@functools.cache
def _mesh(target: str) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(topologies.devices(target)[:1]), ("device",))


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def result(job: Future[Result], pool: Callable[[int], ProcessPoolExecutor], died: Result, *again: Any) -> Result:
    """Of `job`, which is `again`: a function and its arguments.

    A compiler that aborts breaks the pool for all jobs that are left: each is done anew in a process of its own, and is
    `died` where that dies too.
    """
    try:
        return job.result()
    except BrokenProcessPool:
        with pool(1) as alone:
            try:
                return alone.submit(*again).result()
            except BrokenProcessPool:
                return died


def _cell(outcome: Outcome) -> str:
    if outcome.error is not None:
        return "**failed**"
    by = " XLA" if outcome.implementation == "xla" else ""
    return f"{outcome.seconds:.1f} s, {outcome.temp_bytes / 2**20:,.0f}{by}"


def one_line(error: Exception) -> str:
    """The beginning of what an error says."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def progress(line: str) -> None:
    """Shows a line in the place of the last one, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def versions() -> str:
    """Of the compilers that are installed."""

    def version(package: str) -> str:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"no {package}"

    return ", ".join(map(version, _COMPILERS))
