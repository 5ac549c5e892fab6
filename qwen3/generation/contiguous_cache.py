"""Decoding over a copy of each row's pages, side by side: what XLA's own products are fastest with.

With pages gathered at every token, as `kernels_pallas.paged_attention` does for XLA, a token takes CPU about twice as
long. Each layer has a cache of its own where layers are unrolled, else each stack.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import DualChunkQueries
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Layer, Qwen3
from qwen3.decoder.rope import rotation
from qwen3.generation.cache import PAGES, Pages, first_pages, paged, per_share, units
from qwen3.sharding import BATCH

_MASKED = -1e30


class KeyValue(NamedTuple):
    """One layer's cache; with a leading L, that of a stack of layers.

    Slots are minor in the keys and second in the values, so that both products of a step are plain batched matrix
    products of rows: on CPU four times as fast as over [B, S, K, H].
    """

    k: Float[Array, "B K H S"]
    v: Float[Array, "B K S H"]


Opened = tuple[KeyValue, ...]
"""One entry a layer where layers are unrolled, else one a stack."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContiguousCache:
    """A `qwen3.generation.cache.Cache`."""

    config: ModelConfig
    mesh: Mesh | None
    unroll: bool

    def open(
        self, pages: Pages, source: Int[Array, "B p"], target: Int[Array, "B p"], positions: Int[Array, "B"]
    ) -> Opened:
        """A copy of each row's pages side by side, S = p·s."""
        del target, positions

        def gather(pages: Pages, table: Array) -> Opened:
            caches = []
            for layers in units(self.config, self.unroll):
                ids = self._page_ids(pages, layers, table)
                k, v = (x.at[ids].get(mode="promise_in_bounds") for x in pages)  # [..., B, p, K, s, H]
                k, v = jnp.moveaxis(k, (-4, -2), (-2, -1)), jnp.moveaxis(v, -4, -3)
                caches.append(KeyValue(k.reshape(*k.shape[:-2], -1), v.reshape(*v.shape[:-3], -1, v.shape[-1])))
            return tuple(caches)

        return per_share(gather, self.mesh, (PAGES, BATCH), self._specs)(pages, source)

    def step(
        self,
        model: Qwen3,
        layers: tuple[Layer, ...],
        opened: Opened,
        target: Int[Array, "B p"],
        tokens: Int[Array, "B"],
        positions: Int[Array, "B"],
    ) -> tuple[Float[Array, "B D"], Opened]:
        """Reads a token a row, written to slot `positions`."""
        del target
        rot = rotation(model.config, positions[:, None])
        rows = jnp.arange(tokens.shape[0])
        real = jnp.ones((tokens.shape[0], 1), bool)

        def run(x: Array, layer: Layer, kv: KeyValue, place: tuple[Array, ...]) -> tuple[Array, KeyValue]:
            """One layer, whose cache stands at index `place` of `kv`."""

            def attend_cache(q: Array | DualChunkQueries, k: Array, v: Array) -> tuple[Array, KeyValue]:
                longer = KeyValue(
                    kv.k.at[*place, rows, :, :, positions].set(k[:, 0], mode="promise_in_bounds"),
                    kv.v.at[*place, rows, :, positions].set(v[:, 0], mode="promise_in_bounds"),
                )
                return _attend_cache(q, KeyValue(longer.k[place], longer.v[place]), positions), longer

            x, longer, _ = layer(x, rot, real, attend_cache, self.mesh, model.kernels)
            return x, longer

        def scanned(carry: tuple[Array, KeyValue], unit: tuple[Layer, Array]) -> tuple[tuple[Array, KeyValue], None]:
            # The stack's cache is carried, not scanned over: scanning would rewrite all of it for one token.
            (x, kv), (layer, index) = carry, unit
            return run(x, layer, kv, (index,)), None

        x = model.embed_tokens(tokens[:, None])
        caches: list[KeyValue] = []
        for layer, kv in zip(layers, opened, strict=True):
            if self.unroll:
                x, longer = run(x, layer, kv, ())
            else:
                (x, longer), _ = jax.lax.scan(scanned, (x, kv), (layer, jnp.arange(kv.k.shape[0])))
            caches.append(longer)
        return model.final(x)[:, 0], tuple(caches)

    def keep(
        self, pages: Pages, opened: Opened, target: Int[Array, "B p"], positions: Int[Array, "B"], *, tokens: int
    ) -> Pages:
        """Puts back the pages in which a row's cache may have changed."""

        def put(pages: Pages, opened: Opened, table: Array, positions: Array) -> Pages:
            places = pages.v.shape[2]
            touched = positions[:, None] // places + jnp.arange((tokens - 2) // places + 2)
            # Behind the last page the last one is written again.
            touched = jnp.minimum(touched, table.shape[1] - 1)
            table = jnp.take_along_axis(table, touched, axis=1)
            for layers, kv in zip(units(self.config, self.unroll), opened, strict=True):
                ids = self._page_ids(pages, layers, table)
                k, v = paged(kv.k, places, -1), paged(kv.v, places, -2)
                k, v = jnp.moveaxis(k, (-2, -1), (-4, -2)), jnp.moveaxis(v, -3, -4)
                index = touched.reshape(*(1,) * (k.ndim - 5), *touched.shape, 1, 1, 1)
                changed = [jnp.take_along_axis(x, index, axis=-4) for x in (k, v)]
                pages = Pages(
                    *(x.at[ids].set(y, mode="promise_in_bounds") for x, y in zip(pages, changed, strict=True))
                )
            return pages

        specs = (PAGES, self._specs, BATCH, BATCH)
        return per_share(put, self.mesh, specs, PAGES)(pages, opened, target, positions)

    def _page_ids(self, pages: Pages, layers: int | range, table: Array) -> Array:
        """Where the pages of a table stand for one layer, or for each layer of a stack in front."""
        firsts = first_pages(self.config, pages, None)
        if isinstance(layers, int):
            return table + firsts[layers]
        return table + firsts[layers.start : layers.stop, None, None]

    @property
    def _specs(self) -> Opened:
        spec = PartitionSpec(*BATCH, "tensor") if self.unroll else PartitionSpec(None, *BATCH, "tensor")
        return tuple(KeyValue(spec, spec) for _ in units(self.config, self.unroll))  # type: ignore[arg-type]


def _attend_cache(
    q: Float[Array, "B 1 N H"] | DualChunkQueries, kv: KeyValue, positions: Int[Array, "B"]
) -> Float[Array, "B 1 N H"]:
    """Each row's query over its slots up to `positions`. The division by the softmax's sum waits until S is summed
    out."""
    slots, index = jnp.arange(kv.k.shape[-1]), positions[:, None]
    older: tuple[Any, ...] = ()
    if isinstance(q, DualChunkQueries):
        older = q.kinds(index)[1:] if len(slots) > q.chunk_tokens else ()
        q = q.same
    batch, _, heads, size = q.shape

    def scores_of(q: Array) -> Array:
        grouped = q.reshape(batch, kv.k.shape[1], -1, size)
        return jnp.einsum("BKGH,BKHS->BKGS", grouped, kv.k, preferred_element_type=jnp.float32)

    scores = scores_of(q)
    for queries, (first, end) in older:
        theirs = (first <= slots) & (slots < end)
        scores = jnp.where(theirs[:, None, None], scores_of(queries), scores)
    scores = jnp.where((slots <= index)[:, None, None], scores * size**-0.5, _MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    out = jnp.einsum("BKGS,BKSH->BKGH", weights.astype(kv.v.dtype), kv.v, preferred_element_type=jnp.float32)
    out = out / jnp.sum(weights, axis=-1, keepdims=True)
    return out.astype(q.dtype).reshape(batch, 1, heads, size)
