"""Keys and values of what sequences have read so far, in pages, and the two ways a decoder uses them: prefill of whole
prompts and one-token steps.

Layers of a shallow model are taken out of their stacks once per call and unrolled: a scan over stacked layers copies
every layer's weights at every token, which makes small batches on CPU almost half as fast. Deep models are scanned:
taking their layers out would hold their weights twice, and unrolling them would compile for minutes. Either way pages
are updated in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import attention
from kernels_pallas.paged_attention import paged_attention
from qwen3.config import ModelConfig
from qwen3.model import Layer, Qwen3
from qwen3.rope import rotation
from qwen3.sharding import BATCH, row_shares

UNROLL_LAYERS = 12
"""Deepest model whose layers are unrolled in the decoding loop."""


class Pages(NamedTuple):
    """The pages of all layers, s tokens each: page p of layer l stands at l·P + p. Page 0 takes what nobody reads.

    On a mesh every share of the rows has P pages of its own, and page numbers count within the share.
    """

    k: Float[Array, "K L*P H s"]
    v: Float[Array, "K L*P s H"]


_PAGES = Pages(*(PartitionSpec("tensor", *BATCH),) * 2)
_ROWS = PartitionSpec(*BATCH)
_ROWS_OF_HEADS = PartitionSpec(*BATCH, None, "tensor")


def make_pages(config: ModelConfig, dtype: Any, *, pages: int, page_size: int, mesh: Mesh | None) -> Pages:
    """Empty pages, `pages` a layer in all shares together."""
    heads, size, count = config.num_key_value_heads, config.head_dim, config.num_hidden_layers * pages
    place = None if mesh is None else NamedSharding(mesh, _PAGES.k)
    return Pages(
        jnp.zeros((heads, count, size, page_size), dtype, device=place),
        jnp.zeros((heads, count, page_size, size), dtype, device=place),
    )


def layers_of(model: Qwen3, *, unroll: bool) -> tuple[Layer, ...]:
    """The units of the decoding loop: single layers if unrolled, else whole stacks."""
    if not unroll:
        return tuple(model.stacks)
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

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Pages]:
            return attention(q, k, v, segments), write(pages, k, v, page_table + first)

        x, pages, _ = layer(x, rot, segments != 0, attend)
        return (x, pages), None

    carry, firsts = (model.embed_tokens(tokens), pages), _first_pages(model, pages, mesh)
    for stack, (_, count) in zip(model.stacks, model.config.layer_runs(), strict=True):
        carry, _ = jax.lax.scan(body, carry, (stack, firsts[:count]))
        firsts = firsts[count:]
    return carry[1]


def step(
    model: Qwen3,
    layers: tuple[Layer, ...],
    pages: Pages,
    page_table: Int[Array, "B p"],
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    *,
    mesh: Mesh | None,
    unroll: bool,
) -> tuple[Float[Array, "B D"], Pages]:
    """Read one token a row, which stands at `positions` below p·s. Returns final hidden states and the pages."""
    rot = rotation(model.config, positions[:, None])
    real = jnp.ones((tokens.shape[0], 1), bool)
    read = _per_share(
        _read_token,
        mesh,
        (_PAGES, _ROWS_OF_HEADS, _ROWS_OF_HEADS, _ROWS_OF_HEADS, _ROWS, _ROWS),
        (_ROWS_OF_HEADS, _PAGES),
    )

    def body(carry: tuple[Array, Pages], unit: tuple[Layer, Array]) -> tuple[tuple[Array, Pages], None]:
        (x, pages), (layer, first) = carry, unit
        x, pages, _ = layer(x, rot, real, lambda q, k, v: read(pages, q, k, v, page_table + first, positions))
        return (x, pages), None

    carry, firsts = (model.embed_tokens(tokens[:, None]), pages), _first_pages(model, pages, mesh)
    if unroll:
        for layer, first in zip(layers, firsts, strict=True):
            carry, _ = body(carry, (layer, first))
    else:
        for stack, (_, count) in zip(layers, model.config.layer_runs(), strict=True):
            carry, _ = jax.lax.scan(body, carry, (stack, firsts[:count]))
            firsts = firsts[count:]
    x, pages = carry
    return model.final(x)[:, 0], pages


def copy_pages(
    config: ModelConfig, pages: Pages, source: Int[Array, "B"], target: Int[Array, "B"], *, mesh: Mesh | None
) -> Pages:
    """Copy whole pages in every layer; rows without one copy page 0 onto itself."""

    def copy(pages: Pages, source: Array, target: Array) -> Pages:
        starts = jnp.arange(config.num_hidden_layers)[:, None] * (pages.k.shape[1] // config.num_hidden_layers)
        source, target = ((starts + x).reshape(-1) for x in (source, target))
        return Pages(*(x.at[:, target].set(x[:, source], mode="promise_in_bounds") for x in pages))

    return _per_share(copy, mesh, (_PAGES, _ROWS, _ROWS), _PAGES)(pages, source, target)


def _first_pages(model: Qwen3, pages: Pages, mesh: Mesh | None) -> Int[Array, "L"]:
    """Where each layer's pages start within a share."""
    count = model.config.num_hidden_layers
    return jnp.arange(count, dtype=jnp.int32) * (pages.k.shape[1] // row_shares(mesh) // count)


def _per_share(function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Run on every share's rows and pages alone: no share reads another's."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def _write_prompts(pages: Pages, k: Array, v: Array, table: Int[Array, "B p"]) -> Pages:
    """Put the keys and values [B, T, K, H] of one layer into whole pages."""
    batch, length, heads, size = k.shape
    places, ids = pages.v.shape[2], table.reshape(-1)

    def paged(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, table.shape[1] * places - length), (0, 0), (0, 0)))
        return padded.reshape(batch * table.shape[1], places, heads, size)

    return Pages(
        pages.k.at[:, ids].set(paged(k).transpose(2, 0, 3, 1), mode="promise_in_bounds"),
        pages.v.at[:, ids].set(paged(v).transpose(2, 0, 1, 3), mode="promise_in_bounds"),
    )


def _read_token(
    pages: Pages, q: Array, k: Array, v: Array, table: Int[Array, "B p"], positions: Int[Array, "B"]
) -> tuple[Array, Pages]:
    """Add one token's key and value [B, 1, K, H] to a layer's pages, and attend to all up to it."""
    places = pages.v.shape[2]
    page, place = jnp.take_along_axis(table, positions[:, None] // places, axis=1)[:, 0], positions % places
    pages = Pages(
        pages.k.at[:, page, :, place].set(k[:, 0], mode="promise_in_bounds"),
        pages.v.at[:, page, place].set(v[:, 0].swapaxes(0, 1), mode="promise_in_bounds"),
    )
    return paged_attention(q[:, 0], pages.k, pages.v, table, positions + 1)[:, None], pages
