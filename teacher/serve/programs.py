"""The programs of a server that scores: a few fixed shapes of every kind of target, compiled before the first request.

What runs under load are these executables and nothing else, so that nothing compiles then and the memory that
scoring takes is known from the compiler before a request is accepted.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int32

from qwen3.decoder.model import Qwen3
from qwen3.hosts.launcher import Launcher, Work
from qwen3.sharding import batch_sharding, batch_shares, place
from teacher.limits import Limits
from teacher.scoring import (
    ScoringProgram,
    at_ids_program,
    by_uniform_program,
    hidden_program,
    top_k_and_following_program,
    with_results_everywhere,
)
from teacher.wire import KINDS, Answer, Kind, Refused, TargetsRequest

_LEAST_LENGTH = 128
_STEP = 4
"""From one shape to the next the tokens grow by this, so that at most three quarters of a batch are padding where
there is little to do."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows that go through the model together, and their length."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclasses.dataclass(frozen=True)
class Unit:
    """One sequence of a request: what a batch is made of."""

    request: TargetsRequest
    index: int

    @property
    def tokens(self) -> Int32[np.ndarray, "T"]:
        return self.request.sequences[self.index]

    @property
    def start(self) -> int:
        return self.request.starts[self.index]


def shapes_of(limits: Limits, mesh: Mesh) -> list[Shape]:
    """The shapes of a server, the smallest first: `batch_tokens` in rows of the longest sequence, and fewer tokens in
    fewer and shorter rows. A row of the longest kind is always among them."""
    shares, pieces = batch_shares(mesh), mesh.shape["context"]

    def divided(length: int) -> int:
        return -(-length // pieces) * pieces

    longest = divided(limits.max_sequence_tokens)
    most = Shape(shares * max(1, limits.batch_tokens // (longest * shares)), longest)
    shapes = [most]
    while shapes[0].rows > shares:
        shapes.insert(0, Shape(shares * max(1, shapes[0].rows // (_STEP * shares)), longest))
    while (length := divided(shapes[0].length // _STEP)) >= _LEAST_LENGTH:
        shapes.insert(0, Shape(shares, length))
    return shapes


class Room:
    """Sequences in the rows of a shape, each in the first row that has room for it."""

    def __init__(self, shape: Shape):
        self._shape = shape
        self._used: list[int] = []

    def take(self, tokens: int) -> tuple[int, slice] | None:
        """Where a sequence of so many tokens goes; None where it no longer fits."""
        row = next((row for row, used in enumerate(self._used) if used + tokens <= self._shape.length), None)
        if row is None:
            if tokens > self._shape.length or len(self._used) == self._shape.rows:
                return None
            row = len(self._used)
            self._used.append(0)
        start = self._used[row]
        self._used[row] += tokens
        return row, slice(start, start + tokens)

    def take_all(self, lengths: Sequence[int]) -> list[tuple[int, slice]] | None:
        """Where each of these goes; None where not all of them fit."""
        places = [self.take(length) for length in lengths]
        found = [place for place in places if place is not None]
        return found if len(found) == len(places) else None


class Programs:
    """Scores batches of sequences with one teacher on one mesh.

    Attributes:
        shapes: What batches are padded to, the smallest first.
        temporary_bytes: The most that one program takes on a device beside the weights, results included; None where
            the compiler does not say.
    """

    def __init__(
        self,
        model: Qwen3,
        mesh: Mesh,
        limits: Limits,
        on_compiled: Callable[[], None] | None = None,
        launcher: Launcher | None = None,
    ):
        """Compiles everything; `on_compiled` is called after each of `len(KINDS) * len(shapes_of(limits, mesh))`.

        `launcher` is that of `qwen3.generation.engine.Engine`."""
        self._model, self._placement = model, batch_sharding(mesh)
        self._launcher = Launcher() if launcher is None else launcher
        self.shapes = shapes_of(limits, mesh)
        self._entries: dict[Kind, int] = {
            "top_k": min(limits.max_top_k, model.config.vocab_size),
            "at_ids": limits.max_ids,
            "sampled": limits.max_sampled_tokens,
            "hidden": 0,
        }
        self._compiled: dict[tuple[Kind, Shape], Any] = {}
        taken: list[int] = []
        for kind in KINDS:
            for shape in self.shapes:
                program = _program(kind, model, mesh, shape, self._entries)
                compiled = program.function.lower(*program.arguments).compile()
                self._compiled[kind, shape] = compiled
                if (memory := compiled.memory_analysis()) is not None:
                    taken.append(memory.temp_size_in_bytes + memory.output_size_in_bytes)
                if on_compiled is not None:
                    on_compiled()
        self.temporary_bytes = max(taken, default=None)

    def check(self, request: TargetsRequest) -> None:
        """Refuses what fits none of the shapes, or asks for more entries than they are compiled for."""
        longest, most = max(map(len, request.sequences)), self.shapes[-1].length
        entries, own = self._entries[request.targets], self._entries["top_k"]
        if longest > most or request.entries > entries or request.top_k > own:
            raise Refused(
                request.targets,
                f"are asked of {longest} tokens with {request.entries + request.top_k} entries each; this server "
                f"scores at most {most} tokens, with {entries} entries",
                413,
            )

    def launch(self, kind: Kind, units: Sequence[Unit]) -> "Launched":
        """Begins to score sequences that a `Room` of the largest shape has taken; the devices need not have finished
        when this returns."""
        lengths = [len(unit.tokens) for unit in units]
        tried = ((shape, Room(shape).take_all(lengths)) for shape in self.shapes)
        shape, places = next((shape, places) for shape, places in tried if places is not None)
        arrays = _Rows(kind, shape, self._entries[kind])
        for number, (unit, where) in enumerate(zip(units, places, strict=True), start=1):
            arrays.put(unit, where, number)
        options = {"kind": kind, "rows": shape.rows, "length": shape.length}
        results = self._launcher.launch("score", self._launch, arrays.all, **options)
        return Launched(
            kind=kind,
            units=units,
            places=places,
            shape=shape,
            most=self._entries,
            results=functools.partial(self._launcher.results, results),
        )

    def works(self) -> dict[str, Work]:
        """What is launched, by name, for a process that follows one that scores."""
        return {"score": self._launch}

    def _launch(self, arrays: Sequence[np.ndarray], kind: Kind, rows: int, length: int) -> Any:
        return self._compiled[kind, Shape(rows, length)](self._model, *place(tuple(arrays), self._placement))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launched:
    """A batch on its way."""

    kind: Kind
    units: Sequence[Unit]
    places: Sequence[tuple[int, slice]]
    shape: Shape
    most: Mapping[Kind, int]
    """Entries a position for which the programs are compiled."""
    results: Callable[[], Any]
    """On the host, once the devices have finished."""

    def answers(self) -> list[Answer]:
        """What is said about each sequence, on the host, once the devices have finished."""
        results = self.results()
        return [
            _answer(self.kind, unit, self.most, results, (row, slice(span.start + unit.start, span.stop)))
            for unit, (row, span) in zip(self.units, self.places, strict=True)
        ]


class _Rows:
    """The arguments of a program beside the model, on the host."""

    def __init__(self, kind: Kind, shape: Shape, entries: int):
        self._kind = kind
        size = shape.rows, shape.length
        self.tokens, self.positions, self.segment_ids = (np.zeros(size, np.int32) for _ in range(3))
        self.all: tuple[np.ndarray, ...] = (self.tokens, self.positions, self.segment_ids)
        if kind != "hidden":
            shaped = size if kind == "top_k" else (*size, entries)
            self.all += (np.full(shaped, -1, np.float32 if kind == "sampled" else np.int32),)

    def put(self, unit: Unit, where: tuple[int, slice], number: int) -> None:
        """The tokens of a sequence, as segment `number`, and what is asked about them."""
        tokens = unit.tokens
        self.tokens[where], self.positions[where], self.segment_ids[where] = tokens, np.arange(len(tokens)), number
        row, span = where
        if self._kind == "top_k":
            self.all[-1][row, span.start : span.stop - 1] = tokens[1:]
        elif self._kind == "at_ids":
            assert unit.request.ids is not None
            ids = unit.request.ids[unit.index]
            self.all[-1][row, span.start + unit.start : span.stop, : ids.shape[1]] = ids
        elif self._kind == "sampled":
            assert unit.request.seeds is not None
            # Drawn from the first position on, whatever the start: a position's numbers are its own.
            generator = np.random.Generator(np.random.Philox(unit.request.seeds[unit.index]))
            uniform = generator.random((len(tokens), unit.request.entries), np.float32)
            self.all[-1][row, span, : unit.request.entries] = uniform


def _program(kind: Kind, model: Qwen3, mesh: Mesh, shape: Shape, most: Mapping[Kind, int]) -> ScoringProgram:
    rows, length, entries = shape.rows, shape.length, most[kind]
    if kind == "top_k":
        program = top_k_and_following_program(model, mesh, rows=rows, length=length, k=entries)
    elif kind == "at_ids":
        program = at_ids_program(model, mesh, rows=rows, length=length, entries=entries, top_k=most["top_k"])
    elif kind == "sampled":
        program = by_uniform_program(model, mesh, rows=rows, length=length, sampled_tokens=entries)
    else:
        program = hidden_program(model, mesh, rows=rows, length=length)
    return with_results_everywhere(program, mesh)


def _answer(kind: Kind, unit: Unit, most: Mapping[Kind, int], results: Any, where: tuple[int, slice]) -> Answer:
    entries = unit.request.entries
    if kind == "hidden":
        return {"hidden": results.hidden[where]}
    if kind == "at_ids":
        # The teacher's own come after as many ids as a request may hold.
        own = most["at_ids"] + unit.request.top_k
        chosen = [*range(entries), *range(most["at_ids"], own)]
        logprobs = results.logprobs[where]
        return {
            "ids": results.ids[where][:, chosen],
            "logprobs": logprobs[:, chosen],
            "log_tail": _tail(logprobs[:, own:], results.log_tail[where]),
        }
    if kind == "sampled":
        return {
            "ids": results.ids[where][:, :entries],
            "log_shares": results.log_shares[where][:, :entries],
            "entropy": results.entropy[where],
        }
    top, following = results
    logprobs = top.logprobs[where]
    return {
        "ids": top.ids[where][:, :entries],
        "logprobs": logprobs[:, :entries],
        "log_tail": _tail(logprobs[:, entries:], top.log_tail[where]),
        "following_logprobs": following.logprobs[where],
        "following_ranks": following.ranks[where],
    }


def _tail(beyond: Float32[np.ndarray, "R J"], log_tail: Float32[np.ndarray, "R"]) -> Float32[np.ndarray, "R"]:
    """With what a program has found beyond the k that are asked for."""
    return np.logaddexp.reduce(np.concatenate((beyond, log_tail[:, None]), axis=1), axis=1)
