"""Decoding from the pages where they lie: a token's keys and values go to their place, attention follows the table.

Nothing is held beside the pages, and a row costs what it has read itself, not what the longest one has.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas.paged_attention import paged_attention
from kernels_pallas.paged_attention.api import Implementation
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Layer, Qwen3
from qwen3.generation.cache import HEADS, PAGES, Pages, first_pages, over_pages, per_share
from qwen3.sharding import BATCH


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache:
    """A `qwen3.generation.cache.Cache`, which carries the pages themselves."""

    config: ModelConfig
    mesh: Mesh | None
    unroll: bool
    implementation: Implementation

    def open(
        self, pages: Pages, source: Int[Array, "B p"], target: Int[Array, "B p"], positions: Int[Array, "B"]
    ) -> Pages:
        """The pages, in which each row's next place is its own: until now that page may have been another row's."""

        def copy(pages: Pages, source: Array, target: Array, positions: Array) -> Pages:
            next_page = positions[:, None] // pages.k.shape[2]
            taken, given = (jnp.take_along_axis(table, next_page, axis=1)[:, 0] for table in (source, target))
            firsts = first_pages(self.config, pages, None)

            def copy_layer(layer: Array, pages: Pages) -> Pages:
                first = firsts[layer]
                return Pages(*(x.at[first + given].set(x[first + taken], mode="promise_in_bounds") for x in pages))

            # Layer by layer: what is copied is held beside the pages meanwhile.
            return jax.lax.fori_loop(0, self.config.num_hidden_layers, copy_layer, pages)

        return per_share(copy, self.mesh, (PAGES, BATCH, BATCH, BATCH), PAGES)(pages, source, target, positions)

    def step(
        self,
        model: Qwen3,
        layers: tuple[Layer, ...],
        opened: Pages,
        target: Int[Array, "B p"],
        tokens: Int[Array, "B"],
        positions: Int[Array, "B"],
    ) -> tuple[Float[Array, "B D"], Pages]:
        """Reads a token a row, written to its place in the pages `target`."""
        attend = per_share(self._attend, self.mesh, (HEADS, HEADS, HEADS, PAGES, BATCH, BATCH), (HEADS, PAGES))

        def read(q: Array, k: Array, v: Array, pages: Pages, first: Array) -> tuple[Array, Pages]:
            return attend(q, k, v, pages, target + first, positions)

        real = jnp.ones((len(tokens), 1), bool)
        x, pages = over_pages(
            model, layers, tokens[:, None], positions[:, None], real, opened, read, mesh=self.mesh, unroll=self.unroll
        )
        return model.final(x)[:, 0], pages

    def keep(
        self, pages: Pages, opened: Pages, target: Int[Array, "B p"], positions: Int[Array, "B"], *, tokens: int
    ) -> Pages:
        """All stands where it belongs."""
        del pages, target, positions, tokens
        return opened

    def _attend(
        self, q: Array, k: Array, v: Array, pages: Pages, table: Int[Array, "B p"], positions: Int[Array, "B"]
    ) -> tuple[Float[Array, "B 1 N H"], Pages]:
        """Write one layer's keys and values [B, 1, K, H], and attend to all up to them."""
        _, heads, places, size = pages.k.shape
        page = jnp.take_along_axis(table, positions[:, None] // places, axis=1)
        # Through the pages as rows of one head's token, or XLA on TPU would lay them out anew for every token.
        rows = (page * heads + jnp.arange(heads)) * places + positions[:, None] % places

        def write(pages: Array, new: Array) -> Array:
            return pages.reshape(-1, size).at[rows].set(new[:, 0], mode="promise_in_bounds").reshape(pages.shape)

        k_pages, v_pages = write(pages.k, k), write(pages.v, v)
        out = paged_attention(q, k_pages, v_pages, table, positions + 1, implementation=self.implementation)
        return out, Pages(k_pages, v_pages)
