"""Whether a run fits, how fast it can be and what it takes, before a chip is rented: `python -m distill.plan`."""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.experiment import Experiment, teacher_field
from distill.monitor.terminal import make_console
from distill.planner.compile import compile_all, workers_here
from distill.planner.programs import architectures
from distill.planner.table import show
from distill.planner.topology_plan import Measure, Plan, cut_down, fits, plan_on
from distill.planner.whole_run import Assumptions
from distill.runner.command_line import overridden, parser_of
from distill.runner.experiment_file import load_experiment
from kernels_pallas import topologies
from kernels_pallas.chips import CHIPS
from qwen3.commands import reported, spell_out
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
_MOST_WORKERS = 1024
_ASSUMED: Mapping[str, str] = {
    "efficiency": "share of its roof that a program reaches which does not decode (measured on CPU: 0.38 to 0.74)",
    "decoding_efficiency": "share of its roof that decoding reaches (measured on CPU, with weights that its caches do "
    "not hold: 0.22 to 0.29; on an accelerator nothing was measured)",
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
    spell_out()
    return reported(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: list[str]) -> int:
    parser = _parser()
    own, fields = parser.parse_known_args(arguments)
    if own.experiment is None or own.experiment.startswith("-"):
        parser.print_help()
        return 0 if {"--help", "-h"} & {*arguments} else 2
    path = Path(own.experiment)
    experiment = overridden(load_experiment(path), fields, path, parser)
    for name, teacher in experiment.all_teachers.items():
        if teacher.placement == "service":
            field = teacher_field(name)
            raise UserError(
                f"{field}.placement is service, and a plan knows nothing of the servers' devices; to plan for teacher "
                f"and student together: --{field}.placement {'colocated' if name else 'own_mesh'} --{field}.urls"
                f"{'' if teacher.server == 'teacher.serve' else f' --{field}.server teacher.serve'}"
            )
    if not own.topology:
        raise UserError("--topology is missing; name one or more, such as v5p:4x4x4 or v6e:8x8,h100:8x8")
    values = {name: getattr(own, name) for name in _ASSUMED}
    for name, value in values.items():
        if not 0 < value <= 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must lie in 0..1, 0 excluded")
    if own.workers is not None and not 1 <= own.workers <= _MOST_WORKERS:
        raise UserError(f"--workers is {own.workers}; it must be at least 1 and at most {_MOST_WORKERS}, of 3 GB each")

    def measured(experiment: Experiment, topology: str) -> Measure | None:
        if not own.compile:
            return None
        workers = own.workers or workers_here()
        return functools.partial(compile_all, experiment, topology, workers=workers, console=make_console(stderr=True))

    console = make_console(stderr=own.json, plain_width=_WIDTH)
    # Whatever no topology would mend is said before the first is planned, which may take minutes.
    architectures(experiment)
    found = {topology: _devices(topology, compiling=own.compile) for topology in own.topology.split(",")}
    assumed, plans = Assumptions(**values), []
    for topology, devices in found.items():
        kind, _ = topologies.parsed(topology)
        plan = plan_on(experiment, devices, CHIPS[kind], topology, assumed, measured(experiment, topology))
        smallest = _smallest(experiment, plan, measured) if own.smallest else None
        plans.append(dataclasses.replace(plan, smallest=smallest))
    if own.json:
        print(json.dumps([plan.to_json() for plan in plans], indent=1))
    else:
        show(plans, console)
    return 0 if all(plan.fits for plan in plans) else 2


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("python -m distill.plan", _DESCRIPTION, _EPILOGUE, "an experiment file")
    parser.add_argument("--topology", metavar="NAME[,NAME]", help="what to plan for, such as v5p:4x4x4,h100:8x8")
    parser.add_argument("--json", action="store_true", help="numbers for machines, in bytes and seconds")
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="from shapes alone, without a compiler: no temporaries and nothing of what is sent between devices",
    )
    parser.add_argument(
        "--no-smallest",
        dest="smallest",
        action="store_false",
        help="leave out the search for the smallest topology, on which the mesh is cut down and batches stay",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="compilers side by side, of 3 GB each (default: one a core, as memory lasts)",
    )
    defaults = Assumptions()
    for name, text in _ASSUMED.items():
        default = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="X", type=float, default=default, help=f"{text} (default {default})"
        )
    return parser


def _devices(topology: str, *, compiling: bool) -> list[Any]:
    """Raises UserError for an unknown topology or a missing compiler."""
    try:
        kind, shape = topologies.parsed(topology)
        return topologies.devices(topology) if compiling else stand_ins(kind, shape)
    except (ValueError, ModuleNotFoundError) as error:
        remedy = "" if isinstance(error, ValueError) else ", or plan with --no-compile"
        raise UserError(f"{error}{remedy}") from None


def stand_ins(kind: str, shape: Sequence[int]) -> list[Any]:
    """As many devices as a topology has."""
    count = CHIPS[kind].devices_per_chip
    for size in shape:
        count *= size
    platform = "tpu" if CHIPS[kind].torus_dimensions else "gpu"
    return [StandIn(id=index, platform=platform, device_kind=CHIPS[kind].name) for index in range(count)]


def _smallest(experiment: Experiment, plan: Plan, measured: Callable[[Experiment, str], Measure | None]) -> str | None:
    """The smallest topology of the plan's kind on which everything fits, the mesh cut down where devices are too few,
    and with which options."""
    kind, shape = topologies.parsed(plan.topology)
    for other in topologies.SHAPES[kind]:
        name = f"{kind}:{other}"
        if topologies.parsed(name)[1] == shape:
            if plan.fits:
                return name
            continue
        smaller, options = cut_down(experiment, len(stand_ins(*topologies.parsed(name))))
        measure = measured(smaller, name)
        if fits(smaller, _devices(name, compiling=measure is not None), CHIPS[kind], measure):
            return f"{name} {options}".strip()
    return None


if __name__ == "__main__":
    sys.exit(main())
