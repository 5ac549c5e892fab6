"""Whether a run fits, how fast it can be and what it takes, before a chip is rented: `python -m distill.plan`."""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.command_line import overridden
from distill.experiment import Experiment
from distill.experiment_file import load_experiment
from distill.plan_table import show
from distill.planning import Measure, Plan, plan_on, resident_problem
from distill.program_memory import Compiled, compiled
from distill.programs import programs
from distill.whole_run import Assumptions
from kernels_pallas import topologies
from kernels_pallas.chips import CHIPS
from qwen3.errors import UserError

_DESCRIPTION = """\
Plan a distillation run on accelerators that need not be here: memory a device, roofline times, hours and chip-hours.

  python -m distill.plan experiments/NAME.py --topology v5p:4x4x4
  python -m distill.plan experiments/NAME.py --topology v6e:8x8,h100:8x8 --json
  python -m distill.plan experiments/NAME.py --topology h200:1x8 --mesh.expert 2 --stages.on-policy.training.rows 2
"""
_EPILOGUE = """\
Every program of the run is compiled for the topology; no weight is read and nothing runs. Topologies: a TPU's torus of
chips (v5e:8x8, v5p:4x4x4, v6e:8x8, tpu7x:2x4x4), or hosts × cards (h100:8x8, h200:1x8); several with commas between.
Exit status: 0 the run fits all of them; 2 it does not, and what to change is said, or something else is for you to
mend, said in one line.
"""
_WIDTH = 120
_ASSUMED: Mapping[str, str] = {
    "efficiency": "share of each program's roof that is reached (measured runs say; 0.5 is a good kernel's)",
    "response_share": "mean response, as a share of max_new_tokens",
    "prompt_share": "mean prompt, as a share of max_prompt_tokens",
    "filled_share": "tokens in a packed row, as a share of row_length",
}


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device of a topology whose compiler is not asked: enough of one for shapes and shardings."""

    id: int
    platform: str
    device_kind: str
    process_index: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        return _main(sys.argv[1:] if arguments is None else list(arguments))
    except (UserError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(arguments: list[str]) -> int:
    parser = _parser()
    own, fields = parser.parse_known_args(arguments)
    if own.experiment is None or own.experiment.startswith("-"):
        parser.print_help()
        return 0 if {"--help", "-h"} & {*arguments} else 2
    path = Path(own.experiment)
    options = {
        f"{action.option_strings[0]} {action.metavar or ''}".strip(): str(action.help)
        for action in parser._actions
        if action.option_strings
    }
    experiment = overridden(load_experiment(path), fields, path, options, "python -m distill.plan")
    if not own.topology:
        raise UserError("--topology is missing; name one or more, such as v5p:4x4x4 or v6e:8x8,h100:8x8")
    values = {name: getattr(own, name) for name in _ASSUMED}
    for name, value in values.items():
        if not 0 < value <= 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must lie in 0..1, 0 excluded")
    console = Console(stderr=own.json)
    if not console.is_terminal:
        # A file or a pipe has no width, and rich would cut the tables to 80 columns.
        console.width = _WIDTH
    plans = []
    for topology in own.topology.split(","):
        how = functools.partial(_planned, experiment, assumed=Assumptions(**values), compiling=own.compile)
        plan = how(topology, console=console)
        smallest = _smallest(experiment, plan, how, console) if own.smallest else None
        plans.append(dataclasses.replace(plan, smallest=smallest))
    if own.json:
        print(json.dumps([plan.to_json() for plan in plans], indent=1))
    else:
        show(plans, console)
    return 0 if all(plan.fits for plan in plans) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.plan",
        description=_DESCRIPTION,
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", nargs="?", help="an experiment file")
    parser.add_argument("--topology", metavar="NAME[,NAME]", help="what to plan for, such as v5p:4x4x4,h100:8x8")
    parser.add_argument("--json", action="store_true", help="numbers for machines, in bytes and seconds")
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="from shapes alone, without a compiler: no temporaries and nothing of what is sent between devices",
    )
    parser.add_argument(
        "--no-smallest", dest="smallest", action="store_false", help="leave out the search for the smallest topology"
    )
    defaults = Assumptions()
    for name, words in _ASSUMED.items():
        default = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="X", type=float, default=default, help=f"{words} (default {default})"
        )
    return parser


def _planned(experiment: Experiment, topology: str, *, assumed: Assumptions, compiling: bool, console: Console) -> Plan:
    """Raises UserError for an unknown topology or a missing compiler."""
    try:
        kind, shape = topologies.parsed(topology)
        devices = topologies.devices(topology) if compiling else stand_ins(kind, shape)
    except (ValueError, ModuleNotFoundError) as error:
        remedy = "" if isinstance(error, ValueError) else ", or plan with --no-compile"
        raise UserError(f"{error}{remedy}") from None
    if not compiling:
        return plan_on(experiment, devices, CHIPS[kind], topology, assumed)
    with _Compilers(experiment, topology, console) as measure:
        return plan_on(experiment, devices, CHIPS[kind], topology, assumed, measure)


def stand_ins(kind: str, shape: Sequence[int]) -> list[Any]:
    """As many devices as a topology has."""
    count = CHIPS[kind].devices_per_chip
    for size in shape:
        count *= size
    platform = "tpu" if CHIPS[kind].torus_dimensions else "gpu"
    return [StandIn(id=index, platform=platform, device_kind=CHIPS[kind].name) for index in range(count)]


def _smallest(experiment: Experiment, plan: Plan, planned: Callable[..., Plan], console: Console) -> str | None:
    """The smallest topology of the plan's kind on which the experiment's meshes can be laid and everything fits."""
    kind = plan.topology.partition(":")[0]
    for shape in topologies.SHAPES[kind]:
        name = f"{kind}:{shape}"
        if name == plan.topology or (plan.topology == kind and set(shape) <= {"1", "x"}):
            if plan.fits:
                return plan.topology
            continue
        if resident_problem(experiment, stand_ins(*topologies.parsed(name)), CHIPS[kind]) is None and (
            planned(name, console=console).fits
        ):
            return name
    return None


class _Compilers:
    """Compiles each program in a process of its own, so that memory is given back and a compiler that aborts is a
    finding, not the end of the plan."""

    def __init__(self, experiment: Experiment, topology: str, console: Console):
        self._experiment, self._topology, self._console = experiment, topology, console

    def __enter__(self) -> Measure:
        self._pool = _new_pool()
        return self._measure

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def _measure(self, name: str, number: int, count: int) -> Compiled:
        started = time.monotonic()
        with self._console.status(f"{self._topology}: compiling {name} ({number + 1} of {count})"):
            try:
                found = self._pool.submit(_compile, self._experiment, self._topology, number).result()
            except BrokenProcessPool:
                self._pool = _new_pool()
                found = Compiled(error="the compiler ended its process; what it said stands above")
        if not self._console.is_terminal:
            seconds = time.monotonic() - started
            print(f"{self._topology}: {name} compiled in {seconds:.0f} s ({number + 1}/{count})", file=sys.stderr)
        return found


def _new_pool() -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )


def _compile(experiment: Experiment, topology: str, number: int) -> Compiled:
    kind, _ = topologies.parsed(topology)
    return compiled(programs(experiment, topologies.devices(topology))[number], CHIPS[kind])


if __name__ == "__main__":
    sys.exit(main())
