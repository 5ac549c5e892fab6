"""How far a plan is from what programs take: memory, FLOPs and time of every program that a step runs, on this machine.

    python -m experiments.benchmarks.plan_error --size vocab
    python -m experiments.benchmarks.plan_error --size 0.6b --only "on_policy: student generates"

prints a Markdown table. The machine's two roofs are measured first: a product of large matrices, and a copy. Each
program runs in a process of its own. Memory is what the process grows by while the program runs, beside its
arguments; it is compared with the compiler's temporaries and results, which is what a plan adds to what follows from
shapes. Times, those of the roofs too, are the fastest of several turns: what else the machine does only adds to them.
They are given by the clock and in processor seconds over the number of cores, which other processes hardly change but
in which cores that have nothing to do are free.

A token is written by the engine as in a run: seconds a token of every sequence, without those that reading prompts
takes, beside the roof of a program that writes. The plan has every token look back on as many as the longest sequence
has in the end; here it is on average at five eighths of that.
"""

import ctypes
import dataclasses
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from distill.experiment import Experiment, Teacher
from distill.planner.program import Program
from distill.planner.program_memory import Compiled, compiled, known_memory
from distill.planner.programs import programs
from distill.planner.roofline import roof, work_of
from distill.stages import OffPolicy, OnPolicy
from distill.stages.loop import Training
from distill.tasks import Arithmetic
from experiments.benchmarks.machine import machine, memory_bytes
from experiments.benchmarks.sampler import Sampling
from experiments.benchmarks.sizes import SIZES, Size
from kernels_pallas.chips import Chip
from qwen3.cores import usable_cores
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.generation.sampling import SamplingParams
from student.init import FromScratch

_TOKENIZER = str(Path(__file__).parents[1] / "quickstart_tokenizer")
# A model in real proportions, that takes seconds a token: of a run on CPU its student's generation can be measured.
_SMALLEST_QWEN3 = ModelConfig.from_folder(Path(__file__).parents[1] / "qwen3_configs" / "Qwen3-0.6B-Base")
_SIZES = {
    **SIZES,
    "0.6b": Size(
        teacher=_SMALLEST_QWEN3, student=_SMALLEST_QWEN3, batch_size=8, sequence_tokens=256, prompt_tokens=224
    ),
}
_MATRIX, _COPIED_BYTES, _TURNS = 3072, 2**28, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    size: Literal["tiny", "vocab", "0.6b"] = "tiny"
    only: str = ""
    """Part of the names of those programs that are measured."""


class Taken(NamedTuple):
    """Seconds of the fastest turn."""

    clock: float
    processor: float
    """Processor seconds of this process, over the number of cores."""


class Measured(NamedTuple):
    """Of one program: what was predicted and what it took."""

    name: str
    argument_bytes: int
    predicted_bytes: int
    grown_bytes: int | None
    bound: str
    predicted: Taken
    took: Taken


class Machine(NamedTuple):
    """This one's roofs."""

    clock: Chip
    processor: Chip


def main(arguments: Arguments) -> None:
    here = this_machine()
    for chip in here:
        print(f"{chip.name}: {chip.flops_per_s / 1e9:.0f} GFLOP/s, {chip.bytes_per_s / 1e9:.1f} GB/s")
    print(f"\n{machine()}\n")
    print(
        "| program | arguments, MiB | temporaries, MiB | grown by, MiB | bound | roof, ms | took, ms | of the roof | "
        "processor: roof, ms | took, ms | of the roof |"
    )
    print(f"|{'---|' * 11}")
    with tempfile.TemporaryDirectory() as folder:
        names = [program.name for program in _programs(arguments.size, folder)]
        for name in names:
            if name.startswith("evaluation") or arguments.only not in name:
                continue
            # The program alone would end at once, where no sequence is under way.
            how = measure_generation if name.endswith("generates") else measure
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                print(_row(alone.submit(how, arguments.size, folder, name, here).result()), flush=True)


def _row(one: Measured) -> str:
    sizes = one.argument_bytes, one.predicted_bytes, one.grown_bytes
    cells = [one.name, *("" if size is None else f"{size / 2**20:,.0f}" for size in sizes), one.bound]
    for predicted, took in zip(one.predicted, one.took, strict=True):
        cells += [f"{predicted * 1e3:,.2f}", f"{took * 1e3:,.2f}", f"{predicted / took:.0%}"]
    return f"| {' | '.join(cells)} |"


def this_machine() -> Machine:
    """Its roofs, as the fastest of a few turns of each."""
    a, kept = jnp.eye(_MATRIX, dtype=jnp.float32), [jnp.ones(_COPIED_BYTES // 4, jnp.float32)]
    multiply = jax.jit(lambda a: a @ a)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copied() -> None:
        # An array that is given away is written in place: fresh pages would be measured, too.
        kept.append(jax.block_until_ready(copy(kept.pop())))

    product, copying = _fastest(lambda: jax.block_until_ready(multiply(a))), _fastest(copied)
    return Machine(
        *(
            Chip(
                name=name,
                flops_per_s=2 * _MATRIX**3 / product[place],
                memory_bytes=2**62,
                # Read and written.
                bytes_per_s=2 * _COPIED_BYTES / copying[place],
                link_bytes_per_s=1.0,
            )
            for place, name in enumerate(("by the clock", "by processor seconds"))
        )
    )


def measure(size: str, folder: str, name: str, here: Machine) -> Measured:
    """Run one program with arguments of no meaning, in a process that has run nothing else."""
    program = next(one for one in _programs(size, folder) if one.name == name)
    found = compiled(program, here.clock)
    assert found.error is None, found.error
    run = program.compile()
    dynamic = _filled(program)
    before = _start_of_peak()
    kept = jax.block_until_ready(run(*dynamic))
    grown = memory_bytes("VmHWM") - before
    del kept
    took = _fastest(lambda dynamic: jax.block_until_ready(run(*dynamic)), lambda: (_filled(program),))
    return _measured(program, _experiment(size, folder), here, found, grown, took)


def measure_generation(size: str, folder: str, name: str, here: Machine) -> Measured:
    """Have the engine generate as many tokens as the size has, and one; the difference is what all others take."""
    program = next(one for one in _programs(size, folder) if one.name == name)
    work, model = _SIZES[size], Qwen3(program.model, jax.random.key(0))
    prompts = np.ones((program.rows, work.prompt_tokens), np.int32)

    def written(new_tokens: int) -> Taken:
        sampling = Sampling(program.model, rows=program.rows, prompt_tokens=work.prompt_tokens, new_tokens=new_tokens)
        return _fastest(lambda: sampling.write(model, prompts, 0))

    many, one = written(work.new_tokens), written(1)
    took = Taken(*((of_many - of_one) / (work.new_tokens - 1) for of_many, of_one in zip(many, one, strict=True)))
    return _measured(program, _experiment(size, folder), here, compiled(program, here.clock), None, took)


def _measured(
    program: Program, experiment: Experiment, here: Machine, found: Compiled, grown: int | None, took: Taken
) -> Measured:
    work = work_of(program, experiment)
    predicted = [roof(work, 1, chip, found.sent) for chip in here]
    return Measured(
        name=program.name,
        argument_bytes=known_memory(dataclasses.replace(program, beside={})).total,
        predicted_bytes=found.temporary_bytes,
        grown_bytes=grown,
        bound=predicted[0].bound,
        predicted=Taken(*(one.seconds for one in predicted)),
        took=took,
    )


def _start_of_peak() -> int:
    """Bytes that the process holds, after giving back what it does not use; its peak counts from here (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_bytes("VmRSS")


def _fastest(run: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]] = tuple) -> Taken:
    """After one turn that is not counted."""
    clock, processor = [], []
    for _ in range(_TURNS + 1):
        given = arguments()
        started = time.perf_counter(), time.process_time()
        run(*given)
        clock.append(time.perf_counter() - started[0])
        processor.append((time.process_time() - started[1]) / usable_cores())
    return Taken(min(clock[1:]), min(processor[1:]))


def _filled(program: Program) -> list[Any]:
    """The program's arguments as arrays that exist; static ones are not passed on to a compiled program."""
    draw = np.random.default_rng(0)

    def fill(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(draw.standard_normal(leaf.shape, np.float32) * 0.02, leaf.dtype)
        return jnp.ones(leaf.shape, leaf.dtype)

    abstract = [one for one in program.arguments if not isinstance(one, int | jax.sharding.Mesh)]
    return jax.block_until_ready(jax.tree.map(fill, abstract))


def _programs(size: str, folder: str) -> list[Program]:
    return programs(_experiment(size, folder), jax.devices()[:1])


def _experiment(size: str, folder: str) -> Experiment:
    """The benchmarks' models and batch as an experiment, with only the teacher's config.json on disk."""
    work = _SIZES[size]
    (Path(folder) / "config.json").write_text(json.dumps(_raw(work.teacher)))
    writes: Any = {
        "thinking": SamplingParams(max_new_tokens=work.new_tokens),
        "non_thinking": SamplingParams(max_new_tokens=work.new_tokens),
        "max_prompt_tokens": work.prompt_tokens,
        "training": Training(steps=10, rows=work.batch_size, row_length=work.sequence_tokens, rematerialise=False),
    }
    return Experiment(
        name="plan_error",
        description="The benchmarks' step.",
        student=FromScratch(architecture=_raw(work.student), tokenizer=_TOKENIZER),
        teacher=Teacher(path=folder, dtype="float32"),
        tasks={"arithmetic": Arithmetic()},
        stages={
            "off_policy": OffPolicy(prompts=64, batch_size=work.batch_size, top_k=64, **writes),
            "on_policy": OnPolicy(prompts_per_step=work.batch_size, **writes),
        },
        compute_dtype="float32",
    )


def _raw(config: ModelConfig) -> dict[str, Any]:
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value is not None and name not in ("qk_norm", "attention_bias", "attention_output_bias", "mlp_only_layers")
    }
    return fields | {"eos_token_id": 0, "pad_token_id": 0}


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
