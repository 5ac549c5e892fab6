"""Packed rows whose sequences may go on from pages that were read before: the device's side of a prefix cache.

Pages keep final hidden states beside keys and values. What is asked about positions of a prefix is then answered from
its pages, too, and nothing of it goes through the layers again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import DualChunkQueries, attention_behind_prefix
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.generation.cache import HEADS, PAGES, Pages, over_pages, page_shapes, per_share
from qwen3.sharding import BATCH, row_shapes


class PrefixPages(NamedTuple):
    """P pages of s tokens, in equal parts those of each share of the rows; its page 0 takes what nobody reads."""

    layers: Pages
    hidden: Float[Array, "P s D"]
    """After the final norm."""


class Rows(NamedTuple):
    """Sequences packed into rows; segment 0 is padding."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    """In the sequence, which begins with its prefix."""
    segment_ids: Int[Array, "B T"]


class Writes(NamedTuple):
    """Pages to be written with what rows have read, both counted within the share; page 0 for none."""

    pages: Int[Array, "W"]
    sources: Int[Array, "W"]
    """Where the first of a page's s tokens stands: row · T + place."""


class Prefixes(NamedTuple):
    """What the sequences of a row go on from: some of them, or none, from less than others."""

    table: Int[Array, "B p"]
    """Pages, counted within the share, in the order of their tokens."""
    tokens: Int[Array, "B T"]
    """Of each place how many tokens its sequence goes on from, at most p·s."""


def prefix_page_shapes(config: ModelConfig, dtype: DTypeLike, *, pages: int, page_size: int, mesh: Mesh) -> PrefixPages:
    """Shapes, dtypes and shardings of `pages` pages in all shares together."""
    hidden: Any = jax.ShapeDtypeStruct((pages, page_size, config.hidden_size), dtype)
    layers = page_shapes(config, dtype, pages=pages, page_size=page_size, mesh=mesh)
    return PrefixPages(layers, row_shapes(hidden, mesh))


def read_rows(
    model: Qwen3, cached: PrefixPages, rows: Rows, writes: Writes, prefixes: Prefixes, *, mesh: Mesh
) -> tuple[Float[Array, "B T D"], PrefixPages]:
    """Final hidden states of rows, each sequence behind its prefix if it has one, and the pages with what is written.

    A prefix may be what other rows write: every layer's keys and values are in their pages before any are read. Rows
    are whole: the mesh's context axis must be 1.
    """
    spread = None if mesh.size == 1 else mesh

    def read(q: Array | DualChunkQueries, k: Array, v: Array, pages: Pages, first: Array) -> tuple[Array, Pages]:
        def of_share(
            q: Array | DualChunkQueries,
            k: Array,
            v: Array,
            pages: Pages,
            rows: Rows,
            writes: Writes,
            prefixes: Prefixes,
        ) -> tuple[Array, Pages]:
            new = (_of_pages(x, writes, pages.k.shape[2]).swapaxes(1, 2) for x in (k, v))
            at = writes.pages + first
            pages = Pages(*(x.at[at].set(y, mode="promise_in_bounds") for x, y in zip(pages, new, strict=True)))
            out = attention_behind_prefix(
                q,
                k,
                v,
                rows.segment_ids,
                *pages,
                prefixes.table + first,
                prefixes.tokens,
                rows.positions,
                implementation=model.kernels.attention,
            )
            return out, pages

        heads = jax.tree.map(lambda x: HEADS if x.ndim == 4 else BATCH, q)
        specs = (heads, HEADS, HEADS, PAGES, BATCH, BATCH, BATCH)
        return per_share(of_share, spread, specs, (HEADS, PAGES))(q, k, v, pages, rows, writes, prefixes)

    real = rows.segment_ids != 0
    x, layers = over_pages(
        model,
        tuple(model.stacks),
        rows.tokens,
        rows.positions,
        real,
        cached.layers,
        read,
        mesh=mesh,
        unroll=False,
    )
    hidden = model.final(x)

    def keep(kept: Array, hidden: Array, writes: Writes) -> Array:
        return kept.at[writes.pages].set(_of_pages(hidden, writes, kept.shape[1]), mode="promise_in_bounds")

    return hidden, PrefixPages(layers, per_share(keep, spread, BATCH, BATCH)(cached.hidden, hidden, writes))


def recall(hidden: Float[Array, "P s D"], places: Int[Array, "B T"], *, mesh: Mesh) -> Float[Array, "B T D"]:
    """What `PrefixPages.hidden` keeps at places page · s + token, counted within the share."""

    def of_share(kept: Array, places: Array) -> Array:
        return kept.reshape(-1, kept.shape[2]).at[places].get(mode="promise_in_bounds")

    return per_share(of_share, None if mesh.size == 1 else mesh, BATCH, BATCH)(hidden, places)


def _of_pages(x: Float[Array, "B T ..."], writes: Writes, page_size: int) -> Float[Array, "W s ..."]:
    """What is to be written into each page."""
    places = writes.sources[:, None] + jnp.arange(page_size)
    return x.reshape(-1, *x.shape[2:]).at[places].get(mode="promise_in_bounds")
