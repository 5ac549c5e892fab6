"""Compiles the programs of a plan: each in a process of its own, several side by side, equal ones once.

A process of its own gives its memory back, and a compiler that aborts is a finding, not the end of the plan.
"""

import concurrent.futures
import multiprocessing
import time
from collections.abc import Generator, Sequence
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.monitor.time_left import duration
from distill.planner.available_memory import available_bytes
from distill.planner.program import Program
from distill.planner.program_memory import Compiled, compiled
from distill.planner.programs import programs
from kernels_pallas import topologies
from kernels_pallas.chips import CHIPS
from qwen3.cores import usable_cores

_PROCESS_BYTES = 3 * 2**30
"""That a compiler takes of this machine: up to 2.8 GiB were measured, with a 30B student that trains on v6e."""

_ENDED = "the compiler ended its process; what it said stands above, and if nothing, take fewer --workers"


def workers_here() -> int:
    """As many compilers as there are cores, and as memory lasts for (Linux, where the compilers are)."""
    return max(1, min(usable_cores(), available_bytes() // _PROCESS_BYTES))


def compile_all(
    experiment: Experiment, topology: str, made: Sequence[Program], *, workers: int, console: Console
) -> Generator[tuple[int, Compiled]]:
    """Every program's number in `made`, the programs of the experiment there, and what its compiler says, in the order
    in which they get done; on `console` what is done and how long it took. Closed, no further one is begun."""
    equal: dict[object, list[int]] = {}
    for number, program in enumerate(made):
        equal.setdefault(program.signature, []).append(number)
    with Progress(console, line_interval_seconds=float("inf")) as progress:
        for first, *others in equal.values():
            for number in others:
                progress.print(f"{topology}: {made[number].name} is the same program as {made[first].name}")
        threads = concurrent.futures.ThreadPoolExecutor(workers)
        try:
            title = f"{topology}: compiling, {workers} at a time"
            with progress.task(title, len(equal), unit="programs") as bar:
                jobs = {threads.submit(_alone, experiment, topology, same[0]): same for same in equal.values()}
                for job in concurrent.futures.as_completed(jobs):
                    found, seconds = job.result()
                    bar.advance()
                    progress.print(f"{topology}: {made[jobs[job][0]].name}  {duration(seconds)}  {bar.count}")
                    for number in jobs[job]:
                        yield number, found
        finally:
            threads.shutdown(cancel_futures=True)


def _alone(experiment: Experiment, topology: str, number: int) -> tuple[Compiled, float]:
    """What the compiler says, and the seconds that it took."""
    started = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            found = process.submit(_compile, experiment, topology, number).result()
        except BrokenProcessPool:
            found = Compiled(error=_ENDED)
    return found, time.monotonic() - started


def _compile(experiment: Experiment, topology: str, number: int) -> Compiled:
    kind, _ = topologies.parsed(topology)
    return compiled(programs(experiment, topologies.devices(topology))[number], CHIPS[kind])
