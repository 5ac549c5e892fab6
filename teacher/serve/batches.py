"""What goes through the model together: sequences in the rows of a shape, each behind the prefix that is known of it.

Pages of a pool a share keep what has been read (`qwen3.generation.prefixes`). A sequence is read from the end of its
longest known prefix on, and what it begins with is known to all behind it, in the same batch, too.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from qwen3.decoder.kernels import PAGE_SIZE
from qwen3.generation.pages import PagePool, page_digests
from teacher.wire import Kind, TargetsRequest


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows that go through the model together, and their length."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}"


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """One sequence of a request: what is scored as a whole."""

    request: TargetsRequest
    index: int

    @property
    def kind(self) -> Kind:
        return self.request.targets

    @property
    def tokens(self) -> Int32[np.ndarray, "T"]:
        return self.request.sequences[self.index]

    @property
    def start(self) -> int:
        return self.request.starts[self.index]

    @functools.cached_property
    def digests(self) -> list[bytes]:
        """Of the pages that it fills."""
        return page_digests(self.tokens, PAGE_SIZE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive positions of a sequence, on one share of the rows."""

    unit: Unit
    share: int
    positions: range
    prefix: tuple[int, ...] = ()
    """Where it is read, the pages of all before it."""
    written: Sequence[tuple[int, int]] = ()
    """Where it is read, pages that are written with it, and the place in the piece at which each begins."""
    pages: Sequence[int] = ()
    """Where it is recalled, the sequence's pages from its first token on."""


class Room:
    """Pieces in the rows of a shape, each in the first row of its share that has room for it."""

    def __init__(self, shape: Shape, shares: int):
        self._length, self._own_rows = shape.length, shape.rows // shares
        self._used = [0] * shape.rows
        self._prefixes: list[tuple[int, ...]] = [()] * shape.rows

    def used(self, share: int) -> int:
        """Tokens in the rows of a share."""
        return sum(self._used[share * self._own_rows : (share + 1) * self._own_rows])

    def find(self, share: int, tokens: int, prefix: tuple[int, ...] = ()) -> int | None:
        """A row for so many tokens behind these pages; None where none is left. All that is behind pages in one row
        begins alike."""
        for row in range(share * self._own_rows, (share + 1) * self._own_rows):
            common = min(len(prefix), len(self._prefixes[row]))
            if self._used[row] + tokens <= self._length and prefix[:common] == self._prefixes[row][:common]:
                return row
        return None

    def take(self, share: int, tokens: int, prefix: tuple[int, ...] = ()) -> tuple[int, slice] | None:
        """Where in which row they stand from now on."""
        row = self.find(share, tokens, prefix)
        if row is None:
            return None
        self._prefixes[row] = max(prefix, self._prefixes[row], key=len)
        self._used[row] += tokens
        return row, slice(self._used[row] - tokens, self._used[row])

    def take_all(self, pieces: Sequence[Piece]) -> list[tuple[int, slice]] | None:
        """Where each of these goes; None where not all of them fit."""
        places = [self.take(piece.share, len(piece.positions), piece.prefix) for piece in pieces]
        found = [place for place in places if place is not None]
        return found if len(found) == len(places) else None


class Batch:
    """Takes what waits as far as it fits.

    Attributes:
        units: What the batch answers, all of one kind.
        read, recalled: What goes through the layers, and what is asked about positions that did so before.
    """

    def __init__(self, shape: Shape, pools: Sequence[PagePool], first: int):
        """
        Args:
            shape: The largest.
            pools: One a share. What the batch needs of them is held until `close`.
            first: Of shares that are alike the first to be filled.
        """
        self.units: list[Unit] = []
        self.read: list[Piece] = []
        self.recalled: list[Piece] = []
        self._room, self._recalled_room = Room(shape, len(pools)), Room(shape, len(pools))
        self._pools, self._first = pools, first
        self._held: list[tuple[PagePool, list[int]]] = []

    def take(self, unit: Unit) -> bool:
        """Whether the unit is in the batch now: of all shares that have room, in the one that knows most of it."""
        if self.units and self.units[0].kind != unit.kind:
            return False
        known = [tuple(pool.known(unit.digests)) for pool in self._pools]
        shares = sorted(
            range(len(self._pools)),
            key=lambda share: (-len(known[share]), self._room.used(share), (share - self._first) % len(self._pools)),
        )
        return any(self._take(unit, share, known[share]) for share in shares)

    def close(self) -> None:
        """Lets go of its pages. Programs run in the order in which they begin: what comes later may write to them."""
        for pool, pages in self._held:
            pool.let_go(pages)
        self._held.clear()

    def _take(self, unit: Unit, share: int, known: tuple[int, ...]) -> bool:
        end = len(known) * PAGE_SIZE
        new, old = range(end, len(unit.tokens)), range(unit.start, end)
        if old and self._recalled_room.find(share, len(old)) is None:
            return False
        if new and self._room.take(share, len(new), known) is None:
            return False
        if old:
            self._recalled_room.take(share, len(old))
            self.recalled.append(Piece(unit=unit, share=share, positions=old, pages=known))
        pool, pages, written = self._pools[share], list(known), list[tuple[int, int]]()
        pool.hold(known)
        for digest in unit.digests[len(known) :]:
            if (held := pool.hold_or_take(digest)) is None:
                break
            page, is_new = held
            if is_new:
                written.append((page, len(pages) * PAGE_SIZE - end))
            pages.append(page)
        self._held.append((pool, pages))
        if new:
            self.read.append(Piece(unit=unit, share=share, positions=new, prefix=known, written=written))
        self.units.append(unit)
        return True
