"""The arguments of the scoring programs beside model and pages, on the host: pieces of sequences in rows of a shape."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from qwen3.decoder.kernels import PAGE_SIZE
from qwen3.generation.prefixes import Prefixes, Rows, Writes
from teacher.serve.batches import Piece, Room, Shape
from teacher.wire import Kind


@dataclasses.dataclass(frozen=True)
class Packed:
    """Pieces in rows of a shape.

    Attributes:
        pieces: Either all to be read or all to be recalled.
        places: The row of each and where it stands there.
        shares: Into which the rows are split.
    """

    pieces: Sequence[Piece]
    shape: Shape
    places: Sequence[tuple[int, slice]]
    shares: int

    @classmethod
    def smallest(cls, pieces: Sequence[Piece], shapes: Sequence[Shape], shares: int) -> "Packed":
        """In the first of these shapes that holds all; the last one must."""
        tried = ((shape, Room(shape, shares).take_all(pieces)) for shape in shapes)
        shape, places = next((shape, places) for shape, places in tried if places is not None)
        return cls(pieces, shape, places, shares)

    def rows(self) -> Rows:
        """What is read, a segment a piece."""
        rows: Any = Rows(*(self._filled(np.int32) for _ in range(3)))
        for number, (piece, where) in enumerate(zip(self.pieces, self.places, strict=True), start=1):
            positions = piece.positions
            rows.tokens[where] = piece.unit.tokens[positions.start : positions.stop]
            rows.positions[where], rows.segment_ids[where] = positions, number
        return rows

    def writes(self) -> Writes:
        """The pages that are written with what is read."""
        own_rows = self.shape.rows // self.shares
        own_pages = own_rows * (self.shape.length // PAGE_SIZE)
        pages: Any = np.zeros(self.shares * own_pages, np.int32)
        writes: Any = Writes(pages, np.zeros_like(pages))
        used = [share * own_pages for share in range(self.shares)]
        for piece, (row, where) in zip(self.pieces, self.places, strict=True):
            for page, begin in piece.written:
                place = used[piece.share]
                writes.pages[place] = page
                writes.sources[place] = row % own_rows * self.shape.length + where.start + begin
                used[piece.share] += 1
        return writes

    def prefixes(self, table_pages: int) -> Prefixes:
        """Behind what the pieces are read, in tables of so many pages."""
        table: Any = np.zeros((self.shape.rows, table_pages), np.int32)
        prefixes = Prefixes(table, self._filled(np.int32))
        for piece, (row, where) in zip(self.pieces, self.places, strict=True):
            prefixes.table[row, : len(piece.prefix)] = piece.prefix
            prefixes.tokens[row, where] = len(piece.prefix) * PAGE_SIZE
        return prefixes

    def recalled(self) -> Int32[np.ndarray, "B T"]:
        """Where the hidden states of what is recalled stand: page · page size + token."""
        recalled = self._filled(np.int32)
        for piece, where in zip(self.pieces, self.places, strict=True):
            positions = np.asarray(piece.positions)
            recalled[where] = np.asarray(piece.pages)[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        return recalled

    def asked(self, kind: Kind, entries: int) -> tuple[Int32[np.ndarray, "..."] | Float32[np.ndarray, "..."], ...]:
        """What is asked about each place: the tokens that follow, ids [B, T, entries] or numbers in [0, 1), -1 for
        none; nothing for hidden states."""
        if kind == "hidden":
            return ()
        if kind == "top_k":
            asked = self._filled(np.int32, -1)
        else:
            asked = self._filled(np.float32 if kind == "sampled" else np.int32, -1, entries)
        for piece, (row, where) in zip(self.pieces, self.places, strict=True):
            unit, positions = piece.unit, piece.positions
            first = max(unit.start, positions.start)
            span = slice(where.start + first - positions.start, where.stop)
            if kind == "top_k":
                following = unit.tokens[first + 1 : positions.stop + 1]
                asked[row, span.start : span.start + len(following)] = following
            elif kind == "at_ids":
                assert unit.request.ids is not None
                ids = unit.request.ids[unit.index][first - unit.start : positions.stop - unit.start]
                asked[row, span, : ids.shape[1]] = ids
            elif kind == "sampled":
                assert unit.request.seeds is not None
                # Drawn from the first position on, whatever the start: a position's numbers are its own.
                generator = np.random.Generator(np.random.Philox(unit.request.seeds[unit.index]))
                uniform = generator.random((positions.stop, unit.request.entries), np.float32)
                asked[row, span, : unit.request.entries] = uniform[first:]
        return (asked,)

    def _filled(self, dtype: type[np.generic], value: int = 0, *more: int) -> Any:
        """An array [B, T, ...] that becomes one of a device when a program takes it."""
        return np.full((self.shape.rows, self.shape.length, *more), value, dtype)
