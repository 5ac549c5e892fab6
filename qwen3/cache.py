"""Keys and values of what a batch has read so far, and the two ways a decoder uses them: prefill and one-token steps.

Layers of a shallow model are taken out of their stacks once per call and unrolled, each with a cache of its own: a
scan over stacked layers copies every layer's weights at every token, which makes small batches on CPU almost half as
fast. Deep models are scanned: taking their layers out would hold their weights twice, and unrolling them would compile
for minutes. Either way the decoding loop updates caches in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention import attention
from qwen3.model import Layer, Qwen3
from qwen3.rope import rotation

UNROLL_LAYERS = 12
"""Deepest model whose layers are unrolled in the decoding loop."""
_MASKED = -1e30


class KeyValue(NamedTuple):
    """One layer's cache; with a leading L, that of a stack of layers.

    Slots are minor in the keys and second in the values, so that both products of a step are plain batched matrix
    products of rows: on CPU four times as fast as over [B, S, K, H].
    """

    k: Float[Array, "B K H S"]
    v: Float[Array, "B K S H"]


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
        return attention(q, k, v, segments), KeyValue(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))

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

    def pad(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, slots - x.shape[axis])
        return jnp.pad(x, widths)

    return tuple(KeyValue(pad(kv.k, -1), pad(kv.v, -2)) for kv in cache)


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
    visible = (jnp.arange(cache[0].k.shape[-1]) <= positions[:, None])[:, None, None]
    real = jnp.ones((tokens.shape[0], 1), bool)

    def run(x: Array, layer: Layer, kv: KeyValue, place: tuple[Array, ...]) -> tuple[Array, KeyValue]:
        """One layer, whose cache stands at index `place` of `kv`."""

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, KeyValue]:
            longer = KeyValue(
                kv.k.at[*place, rows, :, :, positions].set(k[:, 0], mode="promise_in_bounds"),
                kv.v.at[*place, rows, :, positions].set(v[:, 0], mode="promise_in_bounds"),
            )
            return _attend_cache(q, KeyValue(longer.k[place], longer.v[place]), visible), longer

        x, longer, _ = layer(x, rot, real, attend)
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
