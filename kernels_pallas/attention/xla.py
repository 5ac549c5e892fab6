"""Attention for XLA, the default on CPU: batched matrix products over repeated heads, queries in blocks.

Repeating keys and values beats a five-dimensional einsum over groups by 1.6 on CPU, where the latter is not lowered
to one batched product. Only the log-sum-exp of each query is kept for the backward pass, which rebuilds the scores
block by block (FlashAttention-2, arXiv 2307.08691). Up to `_UNROLLED` queries that stand beside their keys are unrolled
into small blocks that stop at the diagonal, and so skip most masked scores. Others loop over blocks so large that the
scores of all keys take `_SCORE_BYTES`: else a piece of a long row with all heads of a model would need more memory for
them than for all of its layers. Each block sees as many quarters of the keys as reach to the last that it counts.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention.visible import Visible

_UNROLLED = 1024
_SMALL_BLOCK = 64
_LARGE_BLOCK = 512
_SCORE_BYTES = 512 * 2**20
_REACHES = 4  # each is compiled; twice as many would save a tenth of what is left
_MASKED = -1e30  # finite, so that a fully masked row stays free of NaN


class _Heads(NamedTuple):
    """Operands with heads in front and keys and values repeated for every query head."""

    queries: Float[Array, "B N T H"]
    keys: Float[Array, "B N S H"]
    values: Float[Array, "B N S H"]


class _View(NamedTuple):
    """What `Visible` says, ready to be cut into blocks."""

    segments: Int[Array, "B T"]
    bounds: tuple[Int[Array, "B T"], ...]
    """First key, left out where it is 0 for all, and end of keys."""
    key_segments: Int[Array, "B S"]


def forward(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Visible
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention and the log-sum-exp of each query's visible scores."""
    given, aligned = q.shape[1], visible.query_index is None
    looped = _looped_block(q.shape, k.shape[1], aligned=aligned)
    (q,), (k, v), view = _padded((q,), (k, v), visible, looped)
    heads = _heads(q, k, v)

    def block(start: int | Array, size: int, seen: int) -> tuple[Array, Array]:
        queries = jax.lax.dynamic_slice_in_dim(heads.queries, start, size, axis=2)
        scores = jnp.einsum("BNTH,BNSH->BNTS", queries, heads.keys[:, :, :seen], preferred_element_type=jnp.float32)
        seeing = _mask(view, start, size, seen)
        scores = jnp.where(seeing, scores * q.shape[3] ** -0.5, _MASKED)
        # Of no keys there is no maximum; an initial one for all would take another copy of the scores.
        top = jnp.max(scores, axis=-1, keepdims=True) if seen else jnp.full((*scores.shape[:3], 1), _MASKED)
        exponentials = jnp.where(seeing, jnp.exp(scores - top), 0)
        total = jnp.maximum(jnp.sum(exponentials, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        weighted = jnp.matmul(
            exponentials.astype(v.dtype), heads.values[:, :, :seen], preferred_element_type=jnp.float32
        )
        return weighted / total, top + jnp.log(total)

    out, log_sum_exp = _by_blocks(block, view, looped, aligned=aligned)
    return out.transpose(0, 2, 1, 3).astype(q.dtype)[:, :given], log_sum_exp[:, :, :given, 0]


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Visible,
    log_sum_exp: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    cotangent: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of q, k and v; `delta` is Σ_H out·cotangent less the log-sum-exp's own cotangent."""
    given, given_keys, aligned = q.shape[1], k.shape[1], visible.query_index is None
    looped = _looped_block(q.shape, given_keys, aligned=aligned)
    (q, cotangent), (k, v), view = _padded((q, cotangent), (k, v), visible, looped)
    heads = _heads(q, k, v)
    length, key_length, scale = q.shape[1], k.shape[1], q.shape[3] ** -0.5
    incoming = cotangent.transpose(0, 2, 1, 3)
    log_sum_exp, delta = (jnp.pad(x, ((0, 0), (0, 0), (0, length - given)))[..., None] for x in (log_sum_exp, delta))

    def block(start: int | Array, size: int, seen: int) -> tuple[Array, Array, Array]:
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=2)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        queries, arriving = part(heads.queries), part(incoming)
        keys, values = heads.keys[:, :, :seen], heads.values[:, :, :seen]
        # Keys are the rows here: two of the three products below then read their operands as they lie, and a product
        # with a transposed first operand takes three times as long on CPU.
        seeing = _mask(view, start, size, seen).swapaxes(2, 3)
        scores = product("BNSH,BNTH->BNST", keys, queries) * scale
        weights = jnp.where(seeing, jnp.exp(scores - part(log_sum_exp).swapaxes(2, 3)), 0)
        wanted = product("BNSH,BNTH->BNST", values, arriving)
        change = (weights * (wanted - part(delta).swapaxes(2, 3)) * scale).astype(q.dtype)
        to_keys = product("BNST,BNTH->BNSH", change, queries)
        to_values = product("BNST,BNTH->BNSH", weights.astype(q.dtype), arriving)
        unseen = ((0, 0), (0, 0), (0, key_length - seen), (0, 0))
        return (
            product("BNST,BNSH->BNTH", change, keys),
            jnp.pad(to_keys, unseen),
            jnp.pad(to_values, unseen),
        )

    to_queries, to_keys, to_values = _by_blocks(block, view, looped, aligned=aligned, summed=2)

    def regrouped(gradient: Array) -> Array:
        grouped = gradient.reshape(k.shape[0], k.shape[2], -1, key_length, k.shape[3])
        return jnp.sum(grouped, axis=2).transpose(0, 2, 1, 3).astype(k.dtype)[:, :given_keys]

    return to_queries.transpose(0, 2, 1, 3).astype(q.dtype)[:, :given], regrouped(to_keys), regrouped(to_values)


def pairs(ends: Int[np.ndarray, "T"], keys: int, *, rows: int, heads: int, aligned: bool) -> int:
    """Of queries and keys that are multiplied out for each row and head, in blocks of them all together, where in every
    row the queries count no keys from `ends` on. `aligned`: they stand beside their keys."""
    looped = _looped_block((rows, len(ends), heads), keys, aligned=aligned)
    if looped is None:
        return sum(size * seen for _, size, seen in _unrolled(len(ends), keys, aligned=aligned))
    padding = -len(ends) % looped
    reaches = _reaches(keys + padding if aligned else keys, aligned=aligned)
    needed = np.pad(ends, (0, padding)).reshape(-1, looped).max(axis=1)
    return looped * int(np.sum(np.asarray(reaches)[_which(needed, reaches)]))


def _unrolled(queries: int, keys: int, *, aligned: bool) -> Iterator[tuple[int, int, int]]:
    """Start and size of each block, and how many keys it sees."""
    for start in range(0, queries, _SMALL_BLOCK):
        end = min(start + _SMALL_BLOCK, queries)
        yield start, end - start, end if aligned else keys


def _reaches(keys: int, *, aligned: bool) -> list[int]:
    """How many keys a looped block may see: the first, or the first two, three or all quarters; none only where it does
    not stand beside them."""
    share = -(-keys // (_REACHES * _SMALL_BLOCK)) * _SMALL_BLOCK
    return [*range(share if aligned else 0, keys, share), keys]


def _which(needed: Any, reaches: list[int]) -> Any:
    """Of the reaches, the first that holds the keys that are needed, of each block in an array of any shape."""
    return (needed[..., None] > np.asarray(reaches[:-1], np.int32)).sum(axis=-1)


def _looped_block(q: tuple[int, ...], keys: int, *, aligned: bool) -> int | None:
    """Queries of a block where blocks of q [B, T, N, ...] are looped over, None where they are unrolled: where they
    skip nothing, that would only keep the scores of several of them."""
    batch, length, heads = q[:3]
    if length <= (_UNROLLED if aligned else _SMALL_BLOCK):
        return None
    fitting = max(_SMALL_BLOCK, _SCORE_BYTES // (4 * batch * heads * keys))
    return min(_LARGE_BLOCK, 2 ** (fitting.bit_length() - 1), -(-length // _SMALL_BLOCK) * _SMALL_BLOCK)


def _padded(
    queries: tuple[Array, ...], keys: tuple[Array, ...], visible: Visible, looped: int | None
) -> tuple[tuple[Array, ...], tuple[Array, ...], _View]:
    """Queries that are looped over reach whole blocks, and so do keys that stand beside them."""
    length = queries[0].shape[1]
    padding = (0, 0 if looped is None else -length % looped)
    key_padding = padding if visible.query_index is None else (0, 0)
    first, end = visible.bounds()
    bounds = (end,) if visible.span is None else (first, end)
    view = _View(
        segments=jnp.pad(visible.query_segments, ((0, 0), padding)),
        bounds=tuple(jnp.pad(bound, ((0, 0), padding)) for bound in bounds),
        key_segments=jnp.pad(visible.segment_ids, ((0, 0), key_padding)),
    )

    if looped is not None:
        # A mask that hangs on no activation would be made before a scan of layers, for all blocks and heads at once.
        queries, view = jax.lax.optimization_barrier((queries, view))

    def pad(arrays: tuple[Array, ...], padding: tuple[int, int]) -> tuple[Array, ...]:
        return tuple(jnp.pad(x, ((0, 0), padding, (0, 0), (0, 0))) for x in arrays)

    return pad(queries, padding), pad(keys, key_padding), view


def _heads(q: Array, k: Array, v: Array) -> _Heads:
    group = q.shape[2] // k.shape[2]
    return _Heads(*(x.transpose(0, 2, 1, 3) for x in (q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2))))


def _mask(view: _View, start: int | Array, size: int, seen: int) -> Bool[Array, "B 1 T S"]:
    """Which of the first `seen` keys count for the queries start..start+size."""
    part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
    *first, end = (part(bound)[:, :, None] for bound in view.bounds)
    keys = jnp.arange(seen)
    seeing = (keys < end) & (part(view.segments)[:, :, None] == view.key_segments[:, None, :seen])
    if first:
        seeing &= first[0] <= keys
    return seeing[:, None]


def _by_blocks(
    block: Callable[..., tuple[Array, ...]], view: _View, looped: int | None, *, aligned: bool, summed: int = 0
) -> tuple[Array, ...]:
    """Run `block(start, size, seen)` over all queries, which count none but the first `seen` keys: its last `summed`
    results add up, the others are joined."""
    length, keys = view.segments.shape[1], view.key_segments.shape[1]
    if looped is None:
        parts = [block(*one) for one in _unrolled(length, keys, aligned=aligned)]
        columns = list(zip(*parts, strict=True))
        joined = [jnp.concatenate(column, axis=2) for column in columns[: len(columns) - summed]]
        return *joined, *(sum(column[1:], column[0]) for column in columns[len(columns) - summed :])

    reaches = _reaches(keys, aligned=aligned)
    branches = [functools.partial(block, size=looped, seen=seen) for seen in reaches]

    def step(sums: Any, start: Array) -> tuple[Any, Any]:
        needed = jnp.max(jax.lax.dynamic_slice_in_dim(view.bounds[-1], start, looped, axis=1))
        results = jax.lax.switch(_which(needed, reaches), branches, start)
        kept = len(results) - summed
        return tuple(a + b for a, b in zip(sums, results[kept:], strict=True)), tuple(results[:kept])

    shapes = jax.eval_shape(lambda: block(0, looped, keys))
    zeros = tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes[len(shapes) - summed :])
    sums, stacked = jax.lax.scan(step, zeros, jnp.arange(0, length, looped))

    def whole(part: Array) -> Array:
        return jnp.moveaxis(part, 0, 2).reshape(*part.shape[1:3], length, part.shape[4])

    return *(whole(part) for part in stacked), *sums
