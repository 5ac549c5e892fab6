"""What a program and what lies beside it take of each device's memory, by what it is for."""

import dataclasses
import re
from collections.abc import Sequence

import jax
from jaxtyping import PyTree

from distill.planner.collectives import Collective, Traffic, collectives, traffic
from distill.planner.program import Program, device_bytes
from distill.training.train_state import TrainState
from kernels_pallas.chips import Chip
from qwen3.decoder.model import Layer, Qwen3
from qwen3.generation.cache import Pages
from qwen3.generation.decoding import most_segments

_REFUSED = re.compile(r"(?:total memory required for .*?\(|Used )(\d+(?:\.\d+)?)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of each device; those of a compiled program are the compiler's, all others follow from shapes."""

    weights: int
    """Of all models that are there, the program's own and those beside it."""
    optimizer: int
    cache: int
    """Pages of keys and values."""
    other: int
    """Rows, targets, sums of gradients."""
    temporaries: int | None
    """Activations, gathered weights and results that are no arguments; None where the program was not compiled."""

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.cache + self.other + (self.temporaries or 0)


def known_memory(program: Program) -> Memory:
    """From shapes alone, without temporaries."""
    kinds = {"weights": 0, "optimizer": 0, "cache": 0, "other": 0}
    seen: set[int] = set()

    def add(kind: str, tree: PyTree) -> None:
        # The layers of a deep model are given to a decoding loop a second time: the same arrays, held once.
        leaves = [leaf for leaf in jax.tree.leaves(tree) if id(leaf) not in seen and hasattr(leaf, "dtype")]
        seen.update(map(id, leaves))
        kinds[kind] += device_bytes(leaves)

    for argument in program.arguments:
        if isinstance(argument, TrainState):
            add("weights", argument.model)
            add("optimizer", argument.optimizer)
        elif isinstance(argument, Qwen3) or (isinstance(argument, tuple) and isinstance(argument[0], Layer)):
            add("weights", argument)
        else:
            add("cache" if isinstance(argument, Pages) else "other", argument)
    for name, held in program.beside.items():
        kinds["optimizer" if name == "optimizer" else "weights"] += device_bytes(held)
    return Memory(**kinds, temporaries=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a program, in plain numbers that go from one process to another."""

    temporary_bytes: int = 0
    sent: Traffic = dataclasses.field(default_factory=Traffic)
    error: str | None = None
    """Why it did not compile, in one line; the numbers are then 0, or what it would have needed."""


def compiled(program: Program, chip: Chip) -> Compiled:
    """Compile a program for the devices of its mesh and read what it takes and sends."""
    try:
        made = program.compile()
    except Exception as error:  # noqa: BLE001 - whatever a compiler says is a result
        said = " ".join(str(error).split())[:300] or type(error).__name__
        needed = _REFUSED.search(said)
        return Compiled(temporary_bytes=int(float(needed[1]) * _UNITS[needed[2]]) if needed else 0, error=said)
    analysis, text = made.memory_analysis(), made.as_text()
    assert analysis is not None
    assert text is not None
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    found = collectives(text)
    devices = list(program.mesh.devices.flat)
    sent = traffic(found, devices, chip)
    if program.purpose.endswith("generates"):
        sent = Traffic()
        for one, times in one_token(found, most_segments(program.arguments[0].kernels)):
            sent += traffic([dataclasses.replace(one, times=1)], devices, chip) * times
    return Compiled(temporary_bytes=analysis.temp_size_in_bytes + max(0, results), sent=sent)


def one_token(found: Sequence[Collective], loops: int) -> list[tuple[Collective, float]]:
    """Of a decoding program the collectives of one token, and how often each happens: those inside the innermost of
    its open loops, of which it has so many that follow each other."""
    deepest = max((one.open_loops for one in found), default=0)
    return [(one, one.times / loops) for one in found if one.open_loops == deepest > 0]
