"""The programs of a server that scores: a few fixed shapes of every kind of target, compiled before the first request.

What runs under load are these executables and nothing else, so that nothing compiles then and the memory that
scoring takes is known from the compiler before a request is accepted. One program takes rows through the layers,
behind prefixes where they have some. Another makes targets of their hidden states, or of those that pages have kept.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float32

from qwen3.decoder.kernels import PAGE_SIZE
from qwen3.decoder.model import Qwen3
from qwen3.generation.pages import PagePool
from qwen3.generation.prefixes import Prefixes, Rows, Writes, prefix_page_shapes, read_rows, recall
from qwen3.hosts.launcher import Launcher, Work
from qwen3.sharding import BATCH, batch_sharding, batch_shares, bytes_on_device, place
from teacher.limits import Limits
from teacher.scoring import (
    ScoringProgram,
    at_ids_of_hidden_program,
    by_uniform_program,
    hidden_alone_program,
    hidden_program,
    top_k_and_following_program,
    with_results_everywhere,
)
from teacher.serve.batches import Batch, Shape, Unit
from teacher.serve.packing import Packed
from teacher.wire import KINDS, Answer, Kind, Refused, TargetsRequest

Name = Literal["read", "recall"] | Kind
"""Of a program: rows through the layers; hidden states out of pages; targets of them."""
_LEAST_LENGTH = 128
_STEP = 2
"""From one shape to the next the tokens grow by this, so that at most half of a batch is padding where there is little
to do."""


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


def filled_shape(shapes: Sequence[Shape], lengths: Sequence[int]) -> Shape:
    """The largest of `shapes` that sequences of these lengths fill more than half; at least one that holds the first.

    What is left over goes into a smaller one: that takes less time than computing more padding than tokens."""
    holding = [shape for shape in shapes if shape.length >= lengths[0]]
    filled = (shape for shape in holding if 2 * sum(one for one in lengths if one <= shape.length) > shape.tokens)
    return max(filled, key=lambda shape: shape.tokens, default=holding[0])


def names_of(limits: Limits) -> list[Name]:
    """The programs that a server has of every shape."""
    return [*(("read", "recall") if _prefix_pages(limits) else ("read",)), *KINDS]


def _prefix_pages(limits: Limits) -> int:
    """Of each share of the rows."""
    return limits.prefix_cache_tokens // PAGE_SIZE


_GIVEN: Mapping[str, Any] = {
    "read": jax.tree.structure(tuple(kind(*kind._fields) for kind in (Rows, Writes, Prefixes))),
    "recall": jax.tree.structure(""),
}
_GIVEN_ALONE: Any = jax.tree.structure(tuple(Rows._fields))
"""What `_Step.given` is made of by name, and of rows that have no prefixes."""


class _Step(NamedTuple):
    """Rows and what is asked about them, on the host."""

    name: Name
    shape: Shape
    given: Any
    """What the program of this name takes beside model and pages."""
    asked: tuple[np.ndarray, ...]


class Programs:
    """Scores batches of sequences with one teacher on one mesh; one thread forms and begins them.

    Attributes:
        shapes: What batches are padded to, the smallest first.
        at_once: Batches that may be begun before their results are there. While devices compute one, the next waits
            in their own queue; a CPU would compute both at a time, each getting in the other's way.
        temporary_bytes: The most that one batch takes on a device beside weights and prefixes, results included; None
            where the compiler does not say.
        prefix_bytes: What the prefixes take on a device.
    """

    def __init__(
        self,
        model: Qwen3,
        mesh: Mesh,
        limits: Limits,
        on_compiled: Callable[[], None] | None = None,
        launcher: Launcher | None = None,
    ):
        """Compiles everything; `on_compiled` is called after each of `names_of(limits)` for each of the shapes.

        `launcher` is that of `qwen3.generation.engine.Engine`."""
        self._launcher = Launcher() if launcher is None else launcher
        self._model, self._mesh, self._shares = model, mesh, batch_shares(mesh)
        # With prefixes rows are whole, and what there is of them is spread as they are.
        self._placement = NamedSharding(mesh, BATCH) if _prefix_pages(limits) else batch_sharding(mesh)
        self.shapes = shapes_of(limits, mesh)
        self.at_once = 1 if mesh.devices.flat[0].platform == "cpu" else 2
        self._entries: dict[Kind, int] = {
            "top_k": min(limits.max_top_k, model.config.vocab_size),
            "at_ids": limits.max_ids,
            "sampled": limits.max_sampled_tokens,
            "hidden": 0,
        }
        self._pages = _prefix_pages(limits)
        self._page_shapes: Any = None
        if self._pages:
            pages = self._shares * (self._pages + 1)
            self._page_shapes = prefix_page_shapes(
                model.config, model.compute_dtype, pages=pages, page_size=PAGE_SIZE, mesh=mesh
            )
        self.prefix_bytes = bytes_on_device(self._page_shapes)
        self._compiled: dict[tuple[Name, Shape], Any] = {}
        for name, shape in itertools.product(names_of(limits), self.shapes):
            program = self._program(name, shape)
            if name in KINDS:
                program = with_results_everywhere(program, mesh)
            self._compiled[name, shape] = program.function.lower(*program.arguments).compile()
            if on_compiled is not None:
                on_compiled()
        self.temporary_bytes = self._most_bytes()
        self._pools: list[PagePool] = []
        self._cached: Any = None
        """`PrefixPages`, from the first batch on."""
        self._lost = self._renew = True
        self._turns = itertools.cycle(range(self._shares))

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

    def batch(self, shape: Shape | None = None) -> Batch:
        """An empty one of this shape, or the largest, to be launched before the next is asked for, or never."""
        if self._lost:
            self._pools = [PagePool(self._pages, PAGE_SIZE) for _ in range(self._shares)]
            self._lost, self._renew = False, True
        return Batch(shape or self.shapes[-1], self._pools, next(self._turns))

    def forget(self) -> None:
        """Take no prefix for known from the next batch on: a program has failed that may have had to write some."""
        self._lost = True

    def launch(self, batch: Batch) -> "Launched":
        """Begins to score what a batch has taken; the devices need not have finished when this returns."""
        kind = batch.units[0].kind
        try:
            packed = [
                Packed.smallest(pieces, self.shapes, self._shares) for pieces in (batch.read, batch.recalled) if pieces
            ]
            steps = [self._step(kind, one, recalls=one.pieces is batch.recalled) for one in packed]
            arrays = jax.tree.leaves([(step.given, step.asked) for step in steps])
            named = [(step.name, step.shape.rows, step.shape.length) for step in steps]
            results = self._launcher.launch("score", self._begin, arrays, kind=kind, steps=named, renew=self._renew)
            self._renew = False
        except Exception:
            self.forget()
            raise
        finally:
            batch.close()
        return Launched(
            kind=kind,
            units=batch.units,
            steps=packed,
            most=self._entries,
            results=functools.partial(self._launcher.results, results),
        )

    def works(self) -> dict[str, Work]:
        """What is launched, by name, for a process that follows one that scores."""
        return {"score": self._begin}

    def _step(self, kind: Kind, packed: Packed, *, recalls: bool) -> "_Step":
        asked = packed.asked(kind, self._entries[kind])
        if recalls:
            return _Step("recall", packed.shape, packed.recalled(), asked)
        if not self._pages:
            return _Step("read", packed.shape, tuple(packed.rows()), asked)
        given = packed.rows(), packed.writes(), packed.prefixes(self._table_pages)
        return _Step("read", packed.shape, given, asked)

    def _begin(
        self, arrays: Sequence[np.ndarray], kind: Kind, steps: Sequence[tuple[Name, int, int]], renew: bool
    ) -> list[Any]:
        """Begins the programs of these steps, of a name and a shape each, one after the other, with new pages if so it
        is to be; `arrays` are the leaves of what is given and asked in each. Returns what is said about the rows of
        each."""
        if renew and self._pages:
            self._cached = None  # lest there are two
            self._cached = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), self._page_shapes
            )
        said, left, asks = [], iter(arrays), 0 if kind == "hidden" else 1
        for name, *size in steps:
            shape, structure = Shape(*size), _GIVEN[name] if self._pages else _GIVEN_ALONE
            given = jax.tree.unflatten(structure, itertools.islice(left, structure.num_leaves))
            program, given = self._compiled[name, shape], place(given, self._placement)
            if name == "recall":
                hidden = program(self._cached.hidden, given)
            elif self._pages:
                hidden, self._cached = program(self._model, self._cached, *given)
            else:
                hidden = program(self._model, *given).hidden
            asked = place(tuple(itertools.islice(left, asks)), self._placement)
            said.append(self._compiled[kind, shape](self._model, hidden, *asked))
        return said

    @property
    def _table_pages(self) -> int:
        return max(1, self.shapes[-1].length // PAGE_SIZE)

    def _program(self, name: Name, shape: Shape) -> ScoringProgram:
        model, mesh, rows, length = self._model, self._mesh, shape.rows, shape.length
        if name == "top_k":
            return top_k_and_following_program(model, mesh, rows=rows, length=length, k=self._entries[name])
        if name == "at_ids":
            entries, top_k = self._entries[name], self._entries["top_k"]
            return at_ids_of_hidden_program(model, mesh, rows=rows, length=length, entries=entries, top_k=top_k)
        if name == "sampled":
            sampled = self._entries[name]
            return by_uniform_program(model, mesh, rows=rows, length=length, sampled_tokens=sampled)
        if name == "hidden":
            return hidden_alone_program(model, mesh, rows=rows, length=length)
        if not self._pages:
            return hidden_program(model, mesh, rows=rows, length=length)

        def shaped(*sizes: int) -> Any:
            return jax.ShapeDtypeStruct(sizes, np.int32, sharding=self._placement)

        if name == "recall":
            function = jax.jit(functools.partial(recall, mesh=mesh), out_shardings=self._placement)
            return ScoringProgram(function, (self._page_shapes.hidden, shaped(rows, length)))
        writes = shaped(rows * (length // PAGE_SIZE))
        prefixes = Prefixes(shaped(rows, self._table_pages), shaped(rows, length))
        function = jax.jit(
            functools.partial(read_rows, mesh=mesh),
            donate_argnums=1,
            out_shardings=(self._placement, jax.tree.map(lambda leaf: leaf.sharding, self._page_shapes)),
        )
        given = Rows(*(shaped(rows, length),) * 3), Writes(writes, writes), prefixes
        return ScoringProgram(function, (model, self._page_shapes, *given))

    def _most_bytes(self) -> int | None:
        """Of a batch, of which one step reads and another one recalls."""
        most = collections.Counter[Name]()
        for (name, _), program in self._compiled.items():
            memory = program.memory_analysis()
            if memory is None:
                return None
            taken = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            most[name] = max(most[name], taken)
        targets = max(most[kind] for kind in KINDS)
        return most["read"] + most["recall"] + (2 if self._pages else 1) * targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launched:
    """A batch on its way."""

    kind: Kind
    units: Sequence[Unit]
    steps: Sequence[Packed]
    """What goes through the layers, and what is recalled; either may be missing."""
    most: Mapping[Kind, int]
    """Entries a position for which the programs are compiled."""
    results: Callable[[], Sequence[Any]]
    """Of each step, on the host, once the devices have finished."""

    @property
    def read_tokens(self) -> int:
        """Tokens that go through the layers."""
        return sum(len(piece.positions) for step in self.steps for piece in step.pieces if not piece.pages)

    def answers(self) -> list[Answer]:
        """What is said about each unit, on the host, once the devices have finished."""
        parts: dict[Unit, list[tuple[int, Answer]]] = {unit: [] for unit in self.units}
        for step, results in zip(self.steps, self.results(), strict=True):
            for piece, (row, where) in zip(step.pieces, step.places, strict=True):
                first = max(piece.unit.start, piece.positions.start)
                span = slice(where.start + first - piece.positions.start, where.stop)
                parts[piece.unit].append((first, _answer(self.kind, piece.unit, self.most, results, (row, span))))
        return [_joined([answer for _, answer in sorted(found, key=lambda one: one[0])]) for found in parts.values()]


def _joined(parts: Sequence[Answer]) -> Answer:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
