"""Keys and values of what a batch has read so far, and the two ways a decoder uses them: prefill and one-token steps.

Layers of a shallow model are taken out of their stacks once per call and unrolled, each with a cache of its own that
the loop updates in place. A scan over stacked layers inside a decoding loop would copy weights and caches at every
token; it is used for deep models only, where taking the layers out would copy gigabytes of weights and unrolling
would compile for minutes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import attention
from qwen3.model import Layer, Qwen3
from qwen3.rope import rotation

UNROLL_LAYERS = 12
"""Deepest model whose layers are unrolled in the decoding loop."""
_MASKED = -1e30


class KeyValue(NamedTuple):
    """One layer's cache; with a leading L, that of a stack of layers."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


Cache = tuple[KeyValue, ...]
"""One entry a layer where layers are unrolled, else one a stack."""


def layers_of(model: Qwen3, *, unroll: bool) -> tuple[Layer, ...]:
    """The units of the decoding loop: single layers if unrolled, else whole stacks."""
    if not unroll:
        return tuple(model.stacks)
    runs = zip(model.stacks, model.config.layer_runs(), strict=True)
    return tuple(jax.tree.map(lambda x, i=i: x[i], stack) for stack, (_, count) in runs for i in range(count))


def prefill(
    model: Qwen3, tokens: Int[Array, "B P"], lengths: Int[Array, "B"], *, unroll: bool
) -> tuple[Float[Array, "B D"], Cache]:
    """Read right-padded prompts. Returns the final hidden state of each row's last token, and a cache with S = P."""
    index = jnp.arange(tokens.shape[1])
    segments = (index[None] < lengths[:, None]).astype(jnp.int32)
    rot = rotation(model.config, jnp.broadcast_to(index, tokens.shape))

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, KeyValue]:
        return attention(q, k, v, segments), KeyValue(k, v)

    def body(x: Array, layer: Layer) -> tuple[Array, KeyValue]:
        x, kept, _ = layer(x, rot, segments != 0, attend)
        return x, kept

    x = model.embed_tokens(tokens)
    caches: list[KeyValue] = []
    for stack, (_, count) in zip(model.stacks, model.config.layer_runs(), strict=True):
        x, kept = jax.lax.scan(body, x, stack)
        caches += [KeyValue(kept.k[i], kept.v[i]) for i in range(count)] if unroll else [kept]
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return model.final(last)[:, 0], tuple(caches)


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with S = `slots`."""

    def pad(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[-3] = (0, slots - x.shape[-3])
        return jnp.pad(x, widths)

    return jax.tree.map(pad, cache)


def step(
    model: Qwen3,
    layers: tuple[Layer, ...],
    cache: Cache,
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    *,
    unroll: bool,
) -> tuple[Float[Array, "B D"], Cache]:
    """Read one token a row, written to slot `positions`. Returns final hidden states and the longer cache."""
    rot = rotation(model.config, positions[:, None])
    rows = jnp.arange(tokens.shape[0])
    real = jnp.ones((tokens.shape[0], 1), bool)

    def run(x: Array, layer: Layer, kv: KeyValue) -> tuple[Array, KeyValue]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, KeyValue]:
            longer = KeyValue(kv.k.at[rows, positions].set(k[:, 0]), kv.v.at[rows, positions].set(v[:, 0]))
            return _attend_cache(q, longer, positions), longer

        x, kept, _ = layer(x, rot, real, attend)
        return x, kept

    x = model.embed_tokens(tokens[:, None])
    longer: list[KeyValue] = []
    for layer, kv in zip(layers, cache, strict=True):
        if unroll:
            x, kept = run(x, layer, kv)
        else:
            x, kept = jax.lax.scan(lambda x, unit: run(x, *unit), x, (layer, kv))
        longer.append(kept)
    return model.final(x)[:, 0], tuple(longer)


def _attend_cache(q: Float[Array, "B 1 N H"], kv: KeyValue, positions: Int[Array, "B"]) -> Float[Array, "B 1 N H"]:
    """Each row's query over its slots up to `positions`."""
    batch, _, heads, size = q.shape
    grouped = q.reshape(batch, kv.k.shape[2], -1, size)
    scores = jnp.einsum("BKGH,BSKH->BKGS", grouped, kv.k, preferred_element_type=jnp.float32) * size**-0.5
    visible = jnp.arange(kv.k.shape[1]) <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _MASKED), axis=-1).astype(kv.v.dtype)
    out = jnp.einsum("BKGS,BSKH->BKGH", weights, kv.v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, 1, heads, size)
