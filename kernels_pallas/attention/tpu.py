"""Attention in Mosaic TPU: FlashAttention-2 (arXiv 2307.08691) over pairs of blocks of queries and keys.

Scores stand as [keys, queries]. Maximum and sum then run over sublanes, the statistics of a query take one lane
instead of a register row, and both products of the key and value gradients read their operands as they lie.

The grid lists the pairs on or below the diagonal and no others, or all pairs where queries do not stand beside their
keys. A table in scalar memory says of each pair whether its
mask hides everything (no work, and no fetch: the index of the last block that was needed is repeated), something, or
nothing (no mask is made). All query heads of a group are worked on beside one block of keys and values.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.attention.visible import Visible

DTYPES = ("bfloat16", "float32")
HEAD_SIZES = (64, 128)
_LANES = 128
_BLOCK = 512
_GROUP_BYTES = 2**20  # of one block of queries with all heads of its group; fast memory holds about a dozen of these
# A hidden score lies below what the running maximum starts from: its exponential is 0 even where all are hidden.
_MASKED = -1e30
_LOWEST = -1e29
_FIRST, _LAST = 1, 2  # whether a pair opens or closes its block of outputs
_HIDDEN, _PARTLY, _WHOLLY = 0, 1, 2


class _Pairs(NamedTuple):
    """The grid's tables, p pairs sorted by the block of outputs that they add to."""

    outer: Int[Array, "p"]
    edges: Int[Array, "p"]
    inner: Int[Array, "B p"]
    kinds: Int[Array, "B p"]


class _Call(NamedTuple):
    """Operands as the kernels see them, heads in front, T and S multiples of their blocks."""

    q: Float[Array, "B K G T H"]
    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    query_view: Int[Array, "B 3 T"]  # segment, first key, end of keys
    key_segments: Int[Array, "B 1 S"]
    block_q: int
    block_k: int
    aligned: bool  # query i stands at key i


def forward(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Visible
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention and the log-sum-exp of each query's visible scores."""
    call = _prepare(q, k, v, visible)
    kv_heads, group, length, size = call.q.shape[1:]
    out, log_sum_exp = _run(
        _forward_kernel,
        call,
        extra=(),
        by_keys=False,
        results=[("heads", q.dtype), ("rows", jnp.float32)],
        scratch=[
            pltpu.VMEM((group, size, call.block_q), jnp.float32),
            pltpu.VMEM((group, call.block_q), jnp.float32),
            pltpu.VMEM((group, call.block_q), jnp.float32),
        ],
    )
    log_sum_exp = log_sum_exp.reshape(q.shape[0], kv_heads * group, length)
    return _heads_last(out, q.shape), log_sum_exp[:, :, : q.shape[1]]


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
    call = _prepare(q, k, v, visible)
    group, length, size = call.q.shape[2:]
    # On v5p libtpu 0.0.42 aborts where it fuses the difference with a sum over H that the log-sum-exp's cotangent is.
    delta = jax.lax.optimization_barrier(delta)

    def rows(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]))).reshape(call.q.shape[:4])

    extra = (_grouped(cotangent, k.shape[2], length), rows(log_sum_exp), rows(delta))
    (to_queries,) = _run(
        _query_gradient_kernel,
        call,
        extra=extra,
        by_keys=False,
        results=[("heads", q.dtype)],
        scratch=[pltpu.VMEM((group, size, call.block_q), jnp.float32)],
    )
    to_keys, to_values = _run(
        _key_gradient_kernel,
        call,
        extra=extra,
        by_keys=True,
        results=[("keys", k.dtype), ("keys", v.dtype)],
        scratch=[pltpu.VMEM((call.block_k, size), jnp.float32)] * 2,
    )
    to_keys, to_values = (x.swapaxes(1, 2)[:, : k.shape[1]] for x in (to_keys, to_values))
    return _heads_last(to_queries, q.shape), to_keys, to_values


def _forward_kernel(pairs, q, k, v, view, segments, out, log_sum_exp, acc, top, total):
    scale = q.shape[4] ** -0.5

    @pl.when(pairs.opens)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, _LOWEST)
        total[...] = jnp.zeros_like(total)

    @pairs.each_kind(view, segments)
    def _(hide):
        keys, values = k[0, 0], v[0, 0]
        for g in range(q.shape[2]):
            row = slice(g, g + 1)
            scores = hide(_dot(keys, q[0, 0, g], (1, 1)) * scale)
            highest = jnp.maximum(top[row], jnp.max(scores, axis=0, keepdims=True))
            weights = jnp.exp(scores - highest)
            shrink = jnp.exp(top[row] - highest)
            top[row] = highest
            total[row] = total[row] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            acc[g] = acc[g] * shrink + _dot(values, weights.astype(values.dtype), (0, 0))

    @pl.when(pairs.closes)
    def _():
        divisor = jnp.maximum(total[...], jnp.finfo(jnp.float32).tiny)
        log_sum_exp[0, 0] = top[...] + jnp.log(divisor)
        for g in range(q.shape[2]):
            out[0, 0, g] = (acc[g] / divisor[g : g + 1]).T.astype(out.dtype)


def _query_gradient_kernel(pairs, q, k, v, view, segments, arriving, log_sum_exp, delta, out, acc):
    scale = q.shape[4] ** -0.5

    @pl.when(pairs.opens)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pairs.each_kind(view, segments)
    def _(hide):
        keys, values = k[0, 0], v[0, 0]
        for g in range(q.shape[2]):
            row = slice(g, g + 1)
            weights = jnp.exp(hide(_dot(keys, q[0, 0, g], (1, 1)) * scale) - log_sum_exp[0, 0, row])
            change = weights * (_dot(values, arriving[0, 0, g], (1, 1)) - delta[0, 0, row])
            acc[g] += _dot(keys, change.astype(keys.dtype), (0, 0))

    @pl.when(pairs.closes)
    def _():
        for g in range(q.shape[2]):
            out[0, 0, g] = (acc[g] * scale).T.astype(out.dtype)


def _key_gradient_kernel(
    pairs, q, k, v, view, segments, arriving, log_sum_exp, delta, to_keys, to_values, acc_keys, acc_values
):
    scale = q.shape[4] ** -0.5

    @pl.when(pairs.opens)
    def _():
        acc_keys[...] = jnp.zeros_like(acc_keys)
        acc_values[...] = jnp.zeros_like(acc_values)

    @pairs.each_kind(view, segments)
    def _(hide):
        keys, values = k[0, 0], v[0, 0]
        for g in range(q.shape[2]):
            row = slice(g, g + 1)
            queries, incoming = q[0, 0, g], arriving[0, 0, g]
            weights = jnp.exp(hide(_dot(keys, queries, (1, 1)) * scale) - log_sum_exp[0, 0, row])
            change = weights * (_dot(values, incoming, (1, 1)) - delta[0, 0, row])
            acc_values[...] += _dot(weights.astype(incoming.dtype), incoming, (1, 0))
            acc_keys[...] += _dot(change.astype(queries.dtype), queries, (1, 0))

    @pl.when(pairs.closes)
    def _():
        to_keys[0, 0] = (acc_keys[...] * scale).astype(to_keys.dtype)
        to_values[0, 0] = acc_values[...].astype(to_values.dtype)


class _Step:
    """Where a kernel stands in the grid's tables."""

    def __init__(self, tables: _Pairs, by_keys: bool):
        row, pair = pl.program_id(0), pl.program_id(2)
        outer, inner = tables.outer[pair], tables.inner[row, pair]
        self.opens = tables.edges[pair] & _FIRST != 0
        self.closes = tables.edges[pair] & _LAST != 0
        self._kind = tables.kinds[row, pair]
        self._key_block = outer if by_keys else inner

    def each_kind(self, view: Any, segments: Any) -> Callable[[Callable[[Callable[[Array], Array]], None]], None]:
        """Run a body with `hide`, which masks scores, if any are visible; `hide` does nothing where all are."""

        def run(body: Callable[[Callable[[Array], Array]], None]) -> None:
            pl.when(self._kind == _WHOLLY)(lambda: body(lambda scores: scores))

            @pl.when(self._kind == _PARTLY)
            def _() -> None:
                size = segments.shape[2]
                # Segments come along lanes; the mask wants them along sublanes.
                column = jnp.broadcast_to(segments[0], (_LANES, size)).T[:, :1]
                index = jax.lax.broadcasted_iota(jnp.int32, (size, view.shape[2]), 0) + self._key_block * size
                segment, first, end = (view[0, i : i + 1] for i in range(3))
                visible = (column == segment) & (index >= first) & (index < end)
                body(lambda scores: jnp.where(visible, scores, _MASKED))

        return run


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _run(
    kernel: Callable[..., None],
    call: _Call,
    *,
    extra: tuple[Array, ...],
    by_keys: bool,
    results: list[tuple[str, Any]],
    scratch: list[Any],
) -> list[Array]:
    """Call a kernel on every pair. `extra` are operands like q, then statistics of queries."""
    batch, kv_heads, group, _, size = call.q.shape
    tables = _pairs(call, by_keys)

    def query_block(b: Any, p: Any, tables: _Pairs) -> Any:
        return tables.inner[b, p] if by_keys else tables.outer[p]

    def key_block(b: Any, p: Any, tables: _Pairs) -> Any:
        return tables.outer[p] if by_keys else tables.inner[b, p]

    heads = pl.BlockSpec(
        (1, 1, group, call.block_q, size), lambda b, h, p, *t: (b, h, 0, query_block(b, p, _Pairs(*t)), 0)
    )
    rows = pl.BlockSpec((1, 1, group, call.block_q), lambda b, h, p, *t: (b, h, 0, query_block(b, p, _Pairs(*t))))
    keys = pl.BlockSpec((1, 1, call.block_k, size), lambda b, h, p, *t: (b, h, key_block(b, p, _Pairs(*t)), 0))
    view = pl.BlockSpec((1, 3, call.block_q), lambda b, h, p, *t: (b, 0, query_block(b, p, _Pairs(*t))))
    segments = pl.BlockSpec((1, 1, call.block_k), lambda b, h, p, *t: (b, 0, key_block(b, p, _Pairs(*t))))
    kinds = {
        "heads": (heads, call.q.shape),
        "rows": (rows, call.q.shape[:4]),
        "keys": (keys, call.k.shape),
    }

    def body(*refs: Any) -> None:
        count = len(tables)
        kernel(_Step(_Pairs(*refs[:count]), by_keys), *refs[count:])

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(batch, kv_heads, tables.outer.shape[0]),
            in_specs=[heads, keys, keys, view, segments, heads, rows, rows][: 5 + len(extra)],
            out_specs=[kinds[kind][0] for kind, _ in results],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(kinds[kind][1], dtype) for kind, dtype in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=kernel.__name__.strip("_"),
    )(*tables, *call[:5], *extra)


def _prepare(q: Array, k: Array, v: Array, visible: Visible) -> _Call:
    heads, size = q.shape[2:]
    kv_heads = k.shape[2]

    def blocks(length: int, most: int) -> tuple[int, int]:
        """A block, a power of two in lanes, and the length in whole blocks."""
        lanes = -(-length // _LANES) * _LANES
        block = _LANES * 2 ** int(np.log2(max(1, min(most, lanes) // _LANES)))
        return block, -(-length // block) * block

    block_q, padded_q = blocks(q.shape[1], min(_BLOCK, _GROUP_BYTES // (heads // kv_heads * size * q.dtype.itemsize)))
    block_k, padded_k = blocks(k.shape[1], _BLOCK)

    def along(x: Array, padded: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, padded - x.shape[1]))).astype(jnp.int32)

    view = (visible.query_segments, *visible.bounds())
    return _Call(
        q=_grouped(q, kv_heads, padded_q),
        k=_grouped(k, kv_heads, padded_k)[:, :, 0],
        v=_grouped(v, kv_heads, padded_k)[:, :, 0],
        query_view=jnp.stack([along(x, padded_q) for x in view], axis=1),
        key_segments=along(visible.segment_ids, padded_k)[:, None],
        block_q=block_q,
        block_k=block_k,
        aligned=visible.query_index is None,
    )


def _grouped(x: Float[Array, "B T N H"], kv_heads: int, length: int) -> Float[Array, "B K G T H"]:
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _heads_last(x: Float[Array, "B K G T H"], shape: tuple[int, ...]) -> Array:
    return x.reshape(x.shape[0], -1, *x.shape[3:]).swapaxes(1, 2)[:, : shape[1]]


def _pairs(call: _Call, by_keys: bool) -> _Pairs:
    """List the pairs that causal order can leave, and find what the segments and spans leave of each."""
    rows, columns = np.meshgrid(
        np.arange(call.q.shape[3] // call.block_q, dtype=np.int32),
        np.arange(call.k.shape[2] // call.block_k, dtype=np.int32),
        indexing="xy" if by_keys else "ij",
    )
    possible = (columns * call.block_k < (rows + 1) * call.block_q) | (not call.aligned)
    rows, columns = rows[possible], columns[possible]
    outer, inner = (columns, rows) if by_keys else (rows, columns)
    change = np.flatnonzero(np.diff(outer))
    edges = np.zeros(len(outer), np.int32)
    edges[[0, *(change + 1)]] |= _FIRST
    edges[[*change, -1]] |= _LAST

    segments, first, end = (call.query_view[:, i] for i in range(3))
    key_segments, bound = call.key_segments[:, 0], jnp.iinfo(jnp.int32)

    def real(segments: Array, otherwise: int, value: Array | None = None) -> Array:
        return jnp.where(segments == 0, otherwise, segments if value is None else value)

    def over(reduce: Callable[..., Array], x: Array, block: int, blocks: np.ndarray) -> Array:
        return reduce(x.reshape(x.shape[0], -1, block), axis=2)[:, blocks]

    queries = functools.partial(over, block=call.block_q, blocks=rows)
    keys = functools.partial(over, block=call.block_k, blocks=columns)
    start, stop = columns * call.block_k, (columns + 1) * call.block_k
    query_least, query_most = queries(jnp.min, real(segments, bound.max)), queries(jnp.max, real(segments, bound.min))
    key_least, key_most = keys(jnp.min, real(key_segments, bound.max)), keys(jnp.max, real(key_segments, bound.min))
    some = (key_most >= query_least) & (key_least <= query_most)
    some &= (queries(jnp.max, end) > start) & (queries(jnp.min, real(segments, bound.max, first)) < stop)
    # Padded queries end at 0 and fail here; padded keys do not equal the others.
    every = (queries(jnp.min, end) >= stop) & (queries(jnp.max, first) <= start) & (query_least == query_most)
    every &= (keys(jnp.min, key_segments) == query_least) & (keys(jnp.max, key_segments) == query_least)
    kinds = jnp.where(every, _WHOLLY, jnp.where(some, _PARTLY, _HIDDEN)).astype(jnp.int32)
    latest = jax.lax.cummax(jnp.where(kinds == _HIDDEN, 0, jnp.arange(len(outer), dtype=jnp.int32)), axis=1)
    return _Pairs(jnp.asarray(outer), jnp.asarray(edges), jnp.asarray(inner)[latest], kinds)
