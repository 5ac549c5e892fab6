"""Runs cases on the accelerator of this machine: numbers against float32, time against other implementations.

Time is given as a share of the roof: what the card, measured here, would need for the case's matrix products at the
rate of one large one, or for its reads and writes at the rate of one large copy, whichever is longer.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.benchmarks.kernel_cases import Case
from experiments.benchmarks.kernel_rivals import Rival, missing, rivals
from kernels_pallas.platforms import platform
from qwen3.errors import UserError

# Largest difference from float32, as a share of the largest number: bfloat16 rounds operands by 2^-9 of theirs, and
# the weights of a sum once more.
LARGEST_ERROR = 0.02
_MATMUL_SIZE = 8192
_COPY_ELEMENTS = 2**30
_ROUND_SECONDS = 0.2


class Roofs(NamedTuple):
    """What the card was measured to do."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, case: Case) -> float:
        return max(case.flops / self.flops_per_s, case.bytes / self.bytes_per_s)


def run(chosen: Sequence[Case]) -> int:
    """Print a Markdown table row by row. Returns the exit status: 1 where a kernel failed or its numbers are off.

    Raises UserError on a machine without an accelerator that has kernels.
    """
    try:
        here = platform()
    except ValueError as error:
        raise UserError(str(error)) from None
    if here == "cpu":
        raise UserError("--run needs a TPU or an NVIDIA GPU, and jax sees only the CPU here; --compile needs neither")
    if (left_out := missing()) is not None:
        print(left_out, file=sys.stderr)
    roofs = measure_roofs()
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}; roofs measured: {roofs.flops_per_s / 1e12:.0f} TFLOP/s of bfloat16", end="")
    print(f" products, {roofs.bytes_per_s / 1e9:.0f} GB/s copied; milliseconds and share of the roof\n")
    print("| operation | at | implementation | error | ms | of the roof |\n|---|---|---|---|---|---|", flush=True)
    wrong = [case.name for case in chosen if not print_rows(case, here, roofs)]
    for name in wrong:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if wrong else 0


def print_rows(case: Case, here: str, roofs: Roofs) -> bool:
    """A row for each implementation of the case; whether the kernel, or XLA where there is none, is right."""
    own = here if here in case.kernels else "xla"
    ours = [
        Rival(name=name, configurations=(functools.partial(case.function, implementation=name),))
        for name in dict.fromkeys((own, "xla"))
    ]
    try:
        arguments = jax.jit(case.sample)(jax.random.key(0))
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(case.program("xla"))(*_in_float32(arguments))
    except Exception as failure:  # noqa: BLE001 - whatever an implementation says is a result
        print(f"| {case.operation} | {case.shape} | float32 reference | failed: {_one_line(failure)} | | |", flush=True)
        return False
    right = True
    for contestant in [*ours, *rivals(case, here)]:
        at = f"| {case.operation} | {case.shape} | {contestant.name} |"
        try:
            error, seconds = _fastest(contestant, case, arguments, exact)
        except Exception as failure:  # noqa: BLE001 - as above
            print(f"{at} failed: {_one_line(failure)} | | |", flush=True)
            right &= contestant.name != own
            continue
        share = f"{roofs.seconds(case) / seconds:.0%}" if roofs.seconds(case) else ""
        if not _is_right(error):
            share = "wrong numbers"
        print(f"{at} {error:.1e} | {seconds * 1e3:.3f} | {share} |", flush=True)
        right &= contestant.name != own or _is_right(error)
    return right


def _fastest(contestant: Rival, case: Case, arguments: tuple[Any, ...], exact: Any) -> tuple[float, float]:
    """Error and seconds of the fastest of the configurations that are right, or of all where none is.

    Raises what the first one did where all fail.
    """
    arguments = contestant.prepare(*arguments)
    found, failures = [], []
    for program in contestant.programs(case):
        try:
            compiled = jax.jit(program).lower(*arguments).compile()
            found.append((time_call(compiled, arguments), relative_error(compiled(*arguments), exact)))
        except Exception as failure:  # noqa: BLE001 - another configuration may do
            failures.append(failure)
    if not found:
        raise failures[0]
    seconds, error = min([one for one in found if _is_right(one[1])] or found)
    return error, seconds


def _is_right(error: float) -> bool:
    """No number that is off and none that is not a number."""
    return error <= LARGEST_ERROR


def _one_line(failure: Exception) -> str:
    return " ".join(str(failure).split())[:120]


def measure_roofs() -> Roofs:
    square = jnp.ones((_MATMUL_SIZE, _MATMUL_SIZE), jnp.bfloat16)
    long = jnp.ones((_COPY_ELEMENTS,), jnp.bfloat16)
    product = time_call(jax.jit(jnp.matmul).lower(square, square).compile(), (square, square))
    copy = time_call(jax.jit(lambda x: -x).lower(long).compile(), (long,))
    return Roofs(2 * _MATMUL_SIZE**3 / product, 2 * long.nbytes / copy)


def time_call(compiled: Callable[..., Any], arguments: Sequence[Any]) -> float:
    """Seconds a call: the median of five rounds of calls, enough of them that starting one does not count."""
    jax.block_until_ready(compiled(*arguments))
    once = _seconds_of(compiled, arguments, 3)
    calls = max(3, min(1000, round(_ROUND_SECONDS / once)))
    return statistics.median(_seconds_of(compiled, arguments, calls) for _ in range(5))


def _seconds_of(compiled: Callable[..., Any], arguments: Sequence[Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        result = compiled(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls


def relative_error(results: Any, exact: Any) -> float:
    """The largest difference of any array, as a share of the largest number in what it should be.

    Infinite where a result is not finite.
    """

    def largest(have: Array, want: Array) -> Array:
        difference = jnp.max(jnp.abs(have.astype(jnp.float32) - want)) / jnp.max(jnp.abs(want))
        return jnp.where(jnp.all(jnp.isfinite(have)), difference, jnp.inf)

    return float(jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(largest, results, exact)))))


def _in_float32(arguments: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
