"""Keys and values of what sequences have read so far, in pages, and what is common to the two ways of decoding.

Pages keep what sequences have read, laid out as `kernels_pallas.paged_attention` reads them. While a dispatch writes
its tokens, a `Cache` says where keys and values stand: `qwen3.generation.contiguous_cache` lays those of each row side
by side, `qwen3.generation.paged_cache` leaves them in the pages.

Layers of a shallow model are taken out of their stacks and unrolled: a scan over stacked layers copies every layer's
weights at every token, which makes small batches on CPU almost half as fast. Deep models are scanned: taking their
layers out would hold their weights twice, and unrolling them would compile for minutes. Either way the decoding loop
updates pages and caches in place.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qwen3.decoder.attend import attend
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Layer, Qwen3
from qwen3.decoder.rope import rotation
from qwen3.sharding import BATCH, row_shapes, row_shares

Opened = TypeVar("Opened")

PAGES = PartitionSpec(*BATCH, "tensor")
"""Where `Pages` lie: of each share of the rows, every head where the weights that make it are."""
HEADS = PartitionSpec(*BATCH, None, "tensor")
"""Where queries, keys and values [B, T, N, H] of these rows lie."""


class Pages(NamedTuple):
    """The pages of all layers, s tokens each: page p of layer l stands at l·P + p. Page 0 takes what nobody reads.

    On a mesh every share of the rows has P pages of its own, and page numbers count within the share.
    """

    k: Float[Array, "L*P K s H"]
    v: Float[Array, "L*P K s H"]


class Cache(Protocol[Opened]):
    """One way of decoding: what the loop carries from token to token beside its own state, and how it is used.

    `source` and `target` are tables of pages: where a row's tokens stand when a dispatch begins, and where they are to
    stand when it ends. They differ at most in the page of the row's next position.
    """

    def open(
        self, pages: Pages, source: Int[Array, "B p"], target: Int[Array, "B p"], positions: Int[Array, "B"]
    ) -> Opened:
        """What rows have read that next read a token at `positions`."""

    def step(
        self,
        model: Qwen3,
        layers: tuple[Layer, ...],
        opened: Opened,
        target: Int[Array, "B p"],
        tokens: Int[Array, "B"],
        positions: Int[Array, "B"],
    ) -> tuple[Float[Array, "B D"], Opened]:
        """Read one token a row, at `positions`. Returns final hidden states and what has been read by then."""

    def keep(
        self, pages: Pages, opened: Opened, target: Int[Array, "B p"], positions: Int[Array, "B"], *, tokens: int
    ) -> Pages:
        """The pages with what has been read, at most `tokens` a row from `positions` on."""


def make_pages(config: ModelConfig, dtype: DTypeLike, *, pages: int, page_size: int, mesh: Mesh | None) -> Pages:
    """Empty pages, `pages` a layer in all shares together."""
    shapes = page_shapes(config, dtype, pages=pages, page_size=page_size, mesh=mesh)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)


def page_shapes(config: ModelConfig, dtype: DTypeLike, *, pages: int, page_size: int, mesh: Mesh | None) -> Pages:
    """Shapes, dtypes and shardings of what `make_pages` makes."""
    count, heads, size = config.num_hidden_layers * pages, config.num_key_value_heads, config.head_dim
    page: Any = jax.ShapeDtypeStruct((count, heads, page_size, size), dtype)
    return row_shapes(Pages(page, page), mesh, PAGES)


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
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    write = per_share(_write_prompts, mesh, (PAGES, HEADS, HEADS, BATCH), PAGES)

    def read(q: Array, k: Array, v: Array, pages: Pages, first: Array) -> tuple[Array, Pages]:
        out = attend(q, k, v, segments, mesh=mesh, implementation=model.kernels.attention)
        return out, write(pages, k, v, page_table + first)

    stacks, real = tuple(model.stacks), segments != 0
    return over_pages(model, stacks, tokens, positions, real, pages, read, mesh=mesh, unroll=False)[1]


def over_pages(
    model: Qwen3,
    layers: tuple[Layer, ...],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    pages: Pages,
    read: Callable[[Array, Array, Array, Pages, Array], tuple[Array, Pages]],
    *,
    mesh: Mesh | None,
    unroll: bool,
) -> tuple[Float[Array, "B T D"], Pages]:
    """Tokens through all layers, each of which attends by `read(q, k, v, pages, first of its pages)`. Returns the
    residual stream and the pages."""
    rot = rotation(model.config, positions)

    def run(carry: tuple[Array, Pages], unit: tuple[Layer, Array]) -> tuple[tuple[Array, Pages], None]:
        (x, pages), (layer, first) = carry, unit
        x, pages, _ = layer(x, rot, real, lambda q, k, v: read(q, k, v, pages, first), mesh, model.kernels)
        return (x, pages), None

    carry, firsts = (model.embed_tokens(tokens), pages), first_pages(model.config, pages, mesh)
    for layer, numbers in zip(layers, units(model.config, unroll), strict=True):
        if isinstance(numbers, int):
            carry, _ = run(carry, (layer, firsts[numbers]))
        else:
            # Pages are carried, not scanned over: scanning would rewrite all of them for a few tokens.
            carry, _ = jax.lax.scan(run, carry, (layer, firsts[numbers.start : numbers.stop]))
    return carry


def units(config: ModelConfig, unroll: bool) -> Iterator[int | range]:
    """The layers of each unit of the decoding loop: one, or those of a stack."""
    first = 0
    for _, count in config.layer_runs():
        yield from range(first, first + count) if unroll else [range(first, first + count)]
        first += count


def first_pages(config: ModelConfig, pages: Pages, mesh: Mesh | None) -> Int[Array, "L"]:
    """Where each layer's pages start within a share; without a mesh, as inside `per_share`, in all of `pages`."""
    per_layer = pages.k.shape[0] // row_shares(mesh) // config.num_hidden_layers
    return jnp.arange(config.num_hidden_layers, dtype=jnp.int32) * per_layer


def per_share(function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Run on every share's rows and pages alone: no share reads another's."""
    if mesh is None:
        return function
    # Varying axes are not tracked: kernels inside lose them, and nothing here has gradients.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def paged(x: Array, places: int, axis: int) -> Array:
    """Split the axis of tokens, counted from behind, into pages and places."""
    before, after = x.shape[:axis], x.shape[axis:][1:]
    return x.reshape(*before, -1, places, *after)


def _write_prompts(pages: Pages, k: Array, v: Array, table: Int[Array, "B p"]) -> Pages:
    """Put the keys and values [B, T, K, H] of one layer into whole pages."""
    places = pages.v.shape[2]
    padding = ((0, 0), (0, table.shape[1] * places - k.shape[1]), (0, 0), (0, 0))
    k, v = (paged(jnp.pad(x, padding), places, -3).swapaxes(2, 3) for x in (k, v))  # [B, p, K, s, H]
    return Pages(*(x.at[table].set(y, mode="promise_in_bounds") for x, y in zip(pages, (k, v), strict=True)))
