"""Whether the kernels compile for accelerators that are not here, and how fast they are on the one that is.

    python -m experiments.benchmarks.kernels --compile v5e,v5p,v6e,tpu7x,h100
    python -m experiments.benchmarks.kernels --run

The first prints a row for each case of `kernel_cases` and ends with status 1 if one of them did not compile; it needs
the packages of the extra `compile`. The second needs an accelerator: it checks numbers against float32 and times each
case beside XLA and the rivals of `kernel_rivals` (cuDNN, jax's own kernels and, where it is installed, tokamax), as
shares of the card's own roofs. Both end with status 2 where they can't start.
"""

import dataclasses
import sys
from collections.abc import Sequence

import tyro

from experiments.benchmarks import kernel_compile, kernel_run
from experiments.benchmarks.kernel_cases import cases
from qwen3.cores import usable_cores
from qwen3.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compile the kernels for other machines, or run them on this one."""

    compile: str = ""
    """Targets, with commas between: v5e, v5p, v6e, tpu7x, h100, h200."""
    run: bool = False
    """Check numbers and measure speed on the accelerator of this machine."""
    only: str = ""
    """Cases whose name contains this."""
    subset: bool = False
    """Those that `make test-compile` compiles, and no others."""
    workers: int = dataclasses.field(default_factory=usable_cores)
    """Compiling processes, each of 1 to 2 GB."""


def arguments(options: Sequence[str] | None = None) -> Arguments:
    """From a command line, this process's own if None."""
    return tyro.cli(Arguments, args=options, prog="python -m experiments.benchmarks.kernels", description=__doc__)


def main(asked: Arguments) -> int:
    """The exit status. Raises UserError for what cannot start."""
    chosen = [case for case in cases() if asked.only in case.name and (case.subset or not asked.subset)]
    if bool(asked.compile) == asked.run:
        raise UserError("give either --compile with targets, such as v6e,h100, or --run")
    if not chosen:
        raise UserError(f"no case has {asked.only!r} in its name; without --only there are {len(list(cases()))}")
    if asked.run:
        return kernel_run.run(chosen)
    return kernel_compile.compile_all(chosen, asked.compile.split(","), asked.workers)


if __name__ == "__main__":
    try:
        sys.exit(main(arguments()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
