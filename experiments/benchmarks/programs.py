"""Whether whole programs at full size compile for accelerators that are not here, and the memory that they need there.

    python -m experiments.benchmarks.programs
    python -m experiments.benchmarks.programs --targets v6e:8x8 --only "235B-A22B scores"

Needs the packages of the extra `compile`. A cell of the table is processor seconds to trace, lower and compile; GiB of
each device, arguments, results and temporaries together (what else a run keeps there is the planner's to add); and GiB
of this machine's memory at most. Ends with status 1 if a program did not compile or takes more than it may, 2 if it
can't start.
"""

import dataclasses
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import tyro

from experiments.benchmarks.kernel_compile import (
    DIED,
    one_line,
    processor_seconds,
    progress,
    require_targets,
    result,
    versions,
)
from experiments.benchmarks.program_cases import ProgramCase, cases
from kernels_pallas import topologies
from qwen3.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compile the experiments' programs for other machines."""

    targets: str = ""
    """Targets with their topologies, with commas between, such as v6e:8x8,h100:8x8; all that there are if empty."""
    only: str = ""
    """Programs whose name contains this."""
    subset: bool = False
    """Those that `make test-compile` compiles, and no others."""
    workers: int = 1
    """Compiling processes, each of up to 3 GB."""


class Outcome(NamedTuple):
    """What became of one program for one target."""

    seconds: float = 0
    device_bytes: int = 0
    host_bytes: int = 0
    error: str | None = None


def main(asked: Arguments) -> int:
    """Print a Markdown table row by row; the exit status. Raises UserError for what cannot start."""
    wanted = set(asked.targets.split(",")) if asked.targets else None
    chosen = [
        (case, [target for target in (case.subset if asked.subset else case.targets) if not wanted or target in wanted])
        for case in cases()
        if asked.only in case.name
    ]
    chosen = [(case, targets) for case, targets in chosen if targets]
    columns = sorted({target for _, targets in chosen for target in targets})
    if not chosen:
        raise UserError(f"nothing is compiled for {asked.targets or 'any target'} with {asked.only!r} in its name")
    require_targets(columns)
    begin, failures, done = time.monotonic(), [], 0
    total = sum(len(targets) for _, targets in chosen)
    print(f"{versions()}; processor seconds to compile, GiB a device, GiB of this machine\n")
    print(f"| program | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}", flush=True)
    with _pool(asked.workers) as pool:
        rows = [
            {target: pool.submit(compile_case, case.name, target) for target in targets} for case, targets in chosen
        ]
        for (case, _), row in zip(chosen, rows, strict=True):
            outcomes = {}
            for target, job in row.items():
                done += 1
                progress(f"{done}/{total} {case.name}, {target}")
                outcomes[target] = outcome = result(job, _pool, Outcome(error=DIED), compile_case, case.name, target)
                failures += [f"{case.name}, {target}: {outcome.error}"] if outcome.error is not None else []
            progress("")
            print(f"| {case.name} | {' | '.join(_cell(outcomes.get(target)) for target in columns)} |", flush=True)
    print(
        f"\n{total - len(failures)} of {total} compiled in {time.monotonic() - begin:.0f} s, {asked.workers} at a time"
    )
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def compile_case(name: str, target: str) -> Outcome:
    """Compile the program of that name, in a process that has compiled nothing else."""
    (case,) = (case for case in cases() if case.name == name)
    program = case.program(topologies.devices(target))
    begin = processor_seconds()
    try:
        compiled = program.compile()
    except Exception as error:  # noqa: BLE001 - whatever a compiler says is a result
        return Outcome(error=one_line(error))
    seconds = processor_seconds() - begin
    needed = topologies.needed_bytes(compiled)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Outcome(seconds, needed, host, topologies.shortage(compiled, target) or _excess(case, needed))


def _excess(case: ProgramCase, needed: int) -> str | None:
    if case.most_bytes is None or needed <= case.most_bytes:
        return None
    return f"takes {needed / 2**30:.2f} GiB of each device, which may be {case.most_bytes / 2**30:.0f}"


def _pool(workers: int) -> ProcessPoolExecutor:
    # A process for each program: the most memory that it had is then that program's.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.error is not None and not outcome.device_bytes:
        return "**failed**"
    cell = f"{outcome.seconds:.0f} s, {outcome.device_bytes / 2**30:.2f}, {outcome.host_bytes / 2**30:.1f}"
    return cell if outcome.error is None else f"**{cell}**"


def arguments(options: Sequence[str] | None = None) -> Arguments:
    """From a command line, this process's own if None."""
    return tyro.cli(Arguments, args=options, prog="python -m experiments.benchmarks.programs", description=__doc__)


if __name__ == "__main__":
    try:
        sys.exit(main(arguments()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
