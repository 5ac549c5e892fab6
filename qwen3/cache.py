"""Keys and values of what sequences have read so far, in pages, and the two ways a decoder uses them: prefill of whole
prompts and one-token steps.

Pages keep what sequences have read. While a dispatch writes its tokens, the pages of each row lie side by side in a
`Cache`: gathering them at every token, as `kernels_pallas` would for XLA, takes CPU up to half as long again as the
token itself.

Layers of a shallow model are taken out of their stacks and unrolled, each with a cache of its own: a scan over stacked
layers copies every layer's weights at every token, which makes small batches on CPU almost half as fast. Deep models
are scanned: taking their layers out would hold their weights twice, and unrolling them would compile for minutes.
Either way the decoding loop updates caches in place.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qwen3.attend import attend
from qwen3.config import ModelConfig
from qwen3.model import Layer, Qwen3
from qwen3.rope import rotation
from qwen3.sharding import BATCH, row_shapes, row_shares

_MASKED = -1e30


class Pages(NamedTuple):
    """The pages of all layers, s tokens each: page p of layer l stands at l·P + p. Page 0 takes what nobody reads.

    On a mesh every share of the rows has P pages of its own, and page numbers count within the share.
    """

    k: Float[Array, "L*P K H s"]
    v: Float[Array, "L*P K s H"]


class KeyValue(NamedTuple):
    """One layer's cache; with a leading L, that of a stack of layers.

    Slots are minor in the keys and second in the values, so that both products of a step are plain batched matrix
    products of rows: on CPU four times as fast as over [B, S, K, H].
    """

    k: Float[Array, "B K H S"]
    v: Float[Array, "B K S H"]


Cache = tuple[KeyValue, ...]
"""One entry a layer where layers are unrolled, else one a stack."""


_PAGES = PartitionSpec(*BATCH, "tensor")
_ROWS = BATCH
_ROWS_OF_HEADS = PartitionSpec(*BATCH, None, "tensor")


def make_pages(config: ModelConfig, dtype: Any, *, pages: int, page_size: int, mesh: Mesh | None) -> Pages:
    """Empty pages, `pages` a layer in all shares together."""
    shapes = page_shapes(config, dtype, pages=pages, page_size=page_size, mesh=mesh)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)


def page_shapes(config: ModelConfig, dtype: Any, *, pages: int, page_size: int, mesh: Mesh | None) -> Pages:
    """Shapes, dtypes and shardings of what `make_pages` makes."""
    count, heads, size = config.num_hidden_layers * pages, config.num_key_value_heads, config.head_dim
    k: Any = jax.ShapeDtypeStruct((count, heads, size, page_size), dtype)
    v: Any = jax.ShapeDtypeStruct((count, heads, page_size, size), dtype)
    return row_shapes(Pages(k, v), mesh, _PAGES)


def layers_of(model: Qwen3) -> tuple[Layer, ...]:
    """The layers of all stacks, one by one."""
    runs = zip(model.stacks, model.config.layer_runs(), strict=True)
    return tuple(jax.tree.map(lambda x, i=i: x[i], stack) for stack, (_, count) in runs for i in range(count))


def prefill(
    model: Qwen3,
    pages: Pages,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    page_table: Int[Array, "B p"],
    *,
    mesh: Mesh | None,
) -> Pages:
    """Read right-padded rows into the pages that `page_table` names for them: p·s is T or more, whole pages are
    written, and entries behind a row's last page are 0."""
    index = jnp.arange(tokens.shape[1])
    segments = (index[None] < lengths[:, None]).astype(jnp.int32)
    rot = rotation(model.config, jnp.broadcast_to(index, tokens.shape))
    write = _per_share(_write_prompts, mesh, (_PAGES, _ROWS_OF_HEADS, _ROWS_OF_HEADS, _ROWS), _PAGES)

    def body(carry: tuple[Array, Pages], unit: tuple[Layer, Array]) -> tuple[tuple[Array, Pages], None]:
        (x, pages), (layer, first) = carry, unit

        def attend_prompts(q: Array, k: Array, v: Array) -> tuple[Array, Pages]:
            out = attend(q, k, v, segments, mesh=mesh, implementation=model.kernels.attention)
            return out, write(pages, k, v, page_table + first)

        x, pages, _ = layer(x, rot, segments != 0, attend_prompts, mesh, model.kernels)
        return (x, pages), None

    carry, firsts = (model.embed_tokens(tokens), pages), _first_pages(model.config, pages, mesh)
    for stack, (_, count) in zip(model.stacks, model.config.layer_runs(), strict=True):
        carry, _ = jax.lax.scan(body, carry, (stack, firsts[:count]))
        firsts = firsts[count:]
    return carry[1]


def gather_cache(
    config: ModelConfig, pages: Pages, page_table: Int[Array, "B p"], *, mesh: Mesh | None, unroll: bool
) -> Cache:
    """A copy of each row's pages side by side, S = p·s."""

    def gather(pages: Pages, table: Array) -> Cache:
        caches = []
        for layers in _units(config, unroll):
            ids = _page_ids(config, pages, layers, table)
            k, v = (x.at[ids].get(mode="promise_in_bounds") for x in pages)  # [..., B, p, K, H, s] and [..., s, H]
            k, v = jnp.moveaxis(k, -4, -2), jnp.moveaxis(v, -4, -3)
            caches.append(KeyValue(k.reshape(*k.shape[:-2], -1), v.reshape(*v.shape[:-3], -1, v.shape[-1])))
        return tuple(caches)

    return _per_share(gather, mesh, (_PAGES, _ROWS), _cache_specs(config, unroll))(pages, page_table)


def keep_pages(
    config: ModelConfig,
    pages: Pages,
    cache: Cache,
    page_table: Int[Array, "B p"],
    positions: Int[Array, "B"],
    *,
    tokens: int,
    mesh: Mesh | None,
    unroll: bool,
) -> Pages:
    """Put back the pages in which a row's cache may have changed: those of the next `tokens` from `positions` on."""

    def keep(pages: Pages, cache: Cache, table: Array, positions: Array) -> Pages:
        places = pages.v.shape[2]
        touched = positions[:, None] // places + jnp.arange((tokens - 2) // places + 2)
        # Behind the last page the last one is written again.
        touched = jnp.minimum(touched, table.shape[1] - 1)
        table = jnp.take_along_axis(table, touched, axis=1)
        for layers, kv in zip(_units(config, unroll), cache, strict=True):
            ids = _page_ids(config, pages, layers, table)
            k, v = jnp.moveaxis(_paged(kv.k, places, -1), -2, -4), jnp.moveaxis(_paged(kv.v, places, -2), -3, -4)
            index = touched.reshape(*(1,) * (k.ndim - 5), *touched.shape, 1, 1, 1)
            changed = [jnp.take_along_axis(x, index, axis=-4) for x in (k, v)]
            pages = Pages(*(x.at[ids].set(y, mode="promise_in_bounds") for x, y in zip(pages, changed, strict=True)))
        return pages

    specs = (_PAGES, _cache_specs(config, unroll), _ROWS, _ROWS)
    return _per_share(keep, mesh, specs, _PAGES)(pages, cache, page_table, positions)


def step(
    model: Qwen3,
    layers: tuple[Layer, ...],
    cache: Cache,
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    *,
    mesh: Mesh | None,
    unroll: bool,
) -> tuple[Float[Array, "B D"], Cache]:
    """Read one token a row, written to slot `positions`. Returns final hidden states and the longer cache."""
    rot = rotation(model.config, positions[:, None])
    rows = jnp.arange(tokens.shape[0])
    visible = (jnp.arange(cache[0].k.shape[-1]) <= positions[:, None])[:, None, None]
    real = jnp.ones((tokens.shape[0], 1), bool)

    def run(x: Array, layer: Layer, kv: KeyValue, place: tuple[Array, ...]) -> tuple[Array, KeyValue]:
        """One layer, whose cache stands at index `place` of `kv`."""

        def attend_cache(q: Array, k: Array, v: Array) -> tuple[Array, KeyValue]:
            longer = KeyValue(
                kv.k.at[*place, rows, :, :, positions].set(k[:, 0], mode="promise_in_bounds"),
                kv.v.at[*place, rows, :, positions].set(v[:, 0], mode="promise_in_bounds"),
            )
            return _attend_cache(q, KeyValue(longer.k[place], longer.v[place]), visible), longer

        x, longer, _ = layer(x, rot, real, attend_cache, mesh, model.kernels)
        return x, longer

    def scanned(carry: tuple[Array, KeyValue], unit: tuple[Layer, Array]) -> tuple[tuple[Array, KeyValue], None]:
        # The stack's cache is carried, not scanned over: scanning would rewrite all of it for one token.
        (x, kv), (layer, index) = carry, unit
        return run(x, layer, kv, (index,)), None

    x = model.embed_tokens(tokens[:, None])
    caches: list[KeyValue] = []
    for layer, kv in zip(layers, cache, strict=True):
        if unroll:
            x, longer = run(x, layer, kv, ())
        else:
            (x, longer), _ = jax.lax.scan(scanned, (x, kv), (layer, jnp.arange(kv.k.shape[0])))
        caches.append(longer)
    return model.final(x)[:, 0], tuple(caches)


def _attend_cache(q: Float[Array, "B 1 N H"], kv: KeyValue, visible: Bool[Array, "B 1 1 S"]) -> Float[Array, "B 1 N H"]:
    """Each row's query over its visible slots. The division by the softmax's sum waits until S is summed out."""
    batch, _, heads, size = q.shape
    grouped = q.reshape(batch, kv.k.shape[1], -1, size)
    scores = jnp.einsum("BKGH,BKHS->BKGS", grouped, kv.k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * size**-0.5, _MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    out = jnp.einsum("BKGS,BKSH->BKGH", weights.astype(kv.v.dtype), kv.v, preferred_element_type=jnp.float32)
    out = out / jnp.sum(weights, axis=-1, keepdims=True)
    return out.astype(q.dtype).reshape(batch, 1, heads, size)


def _units(config: ModelConfig, unroll: bool) -> Iterator[int | range]:
    """The layers of each unit of the decoding loop: one, or those of a stack."""
    first = 0
    for _, count in config.layer_runs():
        yield from range(first, first + count) if unroll else [range(first, first + count)]
        first += count


def _page_ids(config: ModelConfig, pages: Pages, layers: int | range, table: Array) -> Array:
    """Where the pages of a table stand for one layer, or for each layer of a stack in front."""
    per_layer = pages.k.shape[0] // config.num_hidden_layers
    if isinstance(layers, int):
        return table + layers * per_layer
    return table + jnp.asarray(layers)[:, None, None] * per_layer


def _paged(x: Array, places: int, axis: int) -> Array:
    """Split the axis of tokens, counted from behind, into pages and places."""
    before, after = x.shape[:axis], x.shape[axis:][1:]
    return x.reshape(*before, -1, places, *after)


def _cache_specs(config: ModelConfig, unroll: bool) -> Cache:
    spec = PartitionSpec(*BATCH, "tensor") if unroll else PartitionSpec(None, *BATCH, "tensor")
    return tuple(KeyValue(spec, spec) for _ in _units(config, unroll))  # type: ignore[arg-type]


def _first_pages(config: ModelConfig, pages: Pages, mesh: Mesh | None) -> Int[Array, "L"]:
    """Where each layer's pages start within a share."""
    per_layer = pages.k.shape[0] // row_shares(mesh) // config.num_hidden_layers
    return jnp.arange(config.num_hidden_layers, dtype=jnp.int32) * per_layer


def _per_share(function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Run on every share's rows and pages alone: no share reads another's."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def _write_prompts(pages: Pages, k: Array, v: Array, table: Int[Array, "B p"]) -> Pages:
    """Put the keys and values [B, T, K, H] of one layer into whole pages."""
    places = pages.v.shape[2]
    padding = ((0, 0), (0, table.shape[1] * places - k.shape[1]), (0, 0), (0, 0))
    k, v = (_paged(jnp.pad(x, padding), places, -3) for x in (k, v))  # [B, p, s, K, H]
    return Pages(
        pages.k.at[table].set(k.transpose(0, 1, 3, 4, 2), mode="promise_in_bounds"),
        pages.v.at[table].set(v.transpose(0, 1, 3, 2, 4), mode="promise_in_bounds"),
    )
