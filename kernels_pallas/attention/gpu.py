"""Attention in Mosaic GPU for Hopper: FlashAttention-2 (arXiv 2307.08691) by warpgroups with a job each.

Every thread block has two warpgroups that compute, 64 rows each, and a third that only fetches what both of them read:
keys and values for queries, queries and their gradients for keys. The two work on two heads of a group at the same
positions wherever the group is even, so that all they read is shared.

Of each block of rows a table says which blocks of the other side it sees, as a range, and within that range which it
sees wholly. What is outside is not fetched, and no mask is made for what is whole.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas import warpgroup
from kernels_pallas.attention.visible import Visible

DTYPES = ("bfloat16",)
HEAD_SIZES = (64, 128)
_WORKERS = 2
_STAGES = 2  # blocks that are in shared memory at a time
_FORWARD_KEYS = 128
_BACKWARD_KEYS = 64  # two matrices of scores at once take as many registers as one of 128 keys
# A hidden score lies below what the running maximum starts from: its exponential is 0 even where all are hidden.
_MASKED = -1e30
_LOWEST = -1e29
_LOG2E = math.log2(math.e)


class _Call(NamedTuple):
    """Operands with T and S multiples of all blocks."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    query_view: Int[Array, "B 3 T"]  # segment, first key, end of keys
    key_segments: Int[Array, "B S"]


def forward(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Visible
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention and the log-sum-exp of each query's visible scores."""
    call = _prepare(q, k, v, visible)
    batch, length, heads, size = call.q.shape
    ranges = _ranges(call, _FORWARD_KEYS, by_keys=False)
    out, log_sum_exp = _launch(
        _forward_kernel,
        grid=(k.shape[2], length * heads // k.shape[2] // (warpgroup.ROWS * _WORKERS), batch),
        results=(call.q, jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)),
        scratch={
            "q_own": warpgroup.tiles(_WORKERS, warpgroup.ROWS, size),
            "log_sum_exp_own": plgpu.SMEM((_WORKERS, warpgroup.ROWS), jnp.float32),
            "k_tiles": warpgroup.tiles(_STAGES, _FORWARD_KEYS, size),
            "v_tiles": warpgroup.tiles(_STAGES, _FORWARD_KEYS, size),
            "own_ready": plgpu.Barrier(num_barriers=_WORKERS),
            "k_ready": plgpu.Barrier(num_barriers=_STAGES),
            "v_ready": plgpu.Barrier(num_barriers=_STAGES),
            "k_free": plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_STAGES),
            "v_free": plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_STAGES),
        },
    )(*call, ranges)
    return out[:, : q.shape[1]], log_sum_exp[:, :, : q.shape[1]]


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
    batch, length, heads, size = call.q.shape
    padding = (0, length - q.shape[1])
    log_sum_exp, delta = (jnp.pad(x, ((0, 0), (0, 0), padding)) for x in (log_sum_exp * _LOG2E, delta))
    operands = (*call, jnp.pad(cotangent, ((0, 0), padding, (0, 0), (0, 0))), log_sum_exp, delta)
    (to_queries,) = _launch(
        _query_gradient_kernel,
        grid=(k.shape[2], length * heads // k.shape[2] // (warpgroup.ROWS * _WORKERS), batch),
        results=(call.q,),
        scratch={
            "q_own": warpgroup.tiles(_WORKERS, warpgroup.ROWS, size),
            "arriving_own": warpgroup.tiles(_WORKERS, warpgroup.ROWS, size),
            "k_tiles": warpgroup.tiles(_STAGES, _BACKWARD_KEYS, size),
            "v_tiles": warpgroup.tiles(_STAGES, _BACKWARD_KEYS, size),
            "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=_WORKERS),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            "free": plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_STAGES),
        },
    )(*operands, _ranges(call, _BACKWARD_KEYS, by_keys=False))
    to_keys, to_values = _launch(
        _key_gradient_kernel,
        grid=(k.shape[2], call.k.shape[1] // (warpgroup.ROWS * _WORKERS), batch),
        results=(call.k, call.v),
        scratch={
            "k_own": warpgroup.tiles(_WORKERS, warpgroup.ROWS, size),
            "v_own": warpgroup.tiles(_WORKERS, warpgroup.ROWS, size),
            "q_tiles": warpgroup.tiles(_STAGES, warpgroup.ROWS, size),
            "arriving_tiles": warpgroup.tiles(_STAGES, warpgroup.ROWS, size),
            "log_sum_exp_tiles": plgpu.SMEM((_STAGES, warpgroup.ROWS), jnp.float32),
            "delta_tiles": plgpu.SMEM((_STAGES, warpgroup.ROWS), jnp.float32),
            "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=_WORKERS),
            "ready": plgpu.Barrier(num_arrivals=4, num_barriers=_STAGES),
            "free": plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_STAGES),
        },
    )(*operands, _ranges(call, warpgroup.ROWS * _WORKERS, by_keys=True))
    return to_queries[:, : q.shape[1]], to_keys[:, : k.shape[1]], to_values[:, : k.shape[1]]


def _forward_kernel(
    q, k, v, view, segments, ranges, out, log_sum_exp, *, q_own, log_sum_exp_own, k_tiles, v_tiles, own_ready,
    k_ready, v_ready, k_free, v_free,
):  # fmt: skip
    at, scale = _QueryTiles(q, k, ranges), q.shape[3] ** -0.5

    @pl.when(at.worker < _WORKERS)
    def compute():
        plgpu.set_max_registers(232, action="increase")
        own, rows, head = q_own.at[at.worker], at.rows, at.query_head
        plgpu.copy_gmem_to_smem(q.at[at.batch, rows, head], own, own_ready.at[at.worker])
        plgpu.barrier_wait(own_ready.at[at.worker])

        def step(block, slot, carry, masked):
            acc, top, total = carry
            plgpu.barrier_wait(k_ready.at[slot])
            scores = warpgroup.product_transposed(own, k_tiles.at[slot]) * (scale * _LOG2E)
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                scores = _hide(scores, view, segments, at.batch, rows, block, key_axis=1)
            highest = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - warpgroup.spread(highest, scores.shape, 0))
            shrink = jnp.exp2(top - highest)
            total = total * shrink + jnp.sum(weights, axis=1)
            acc = acc * warpgroup.spread(shrink, acc.shape, 0)
            plgpu.barrier_wait(v_ready.at[slot])
            acc = warpgroup.add_product(acc, weights.astype(v.dtype), v_tiles.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, highest, total

        start = (
            warpgroup.full(0, (warpgroup.ROWS, q.shape[3])),
            warpgroup.full(_LOWEST, (warpgroup.ROWS,)),
            warpgroup.full(0, (warpgroup.ROWS,)),
        )
        acc, top, total = at.loop(step, start)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        own[...] = (acc / warpgroup.spread(total, acc.shape, 0)).astype(out.dtype)
        log_sum_exp_own[at.worker] = top * (1 / _LOG2E) + jnp.log(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, out.at[at.batch, rows, head])
        plgpu.copy_smem_to_gmem(log_sum_exp_own.at[at.worker], log_sum_exp.at[at.batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(at.worker == _WORKERS)
    def fetch():
        plgpu.set_max_registers(40, action="decrease")

        @at.each_block(k_free, v_free)
        def _(block, slot, refill):
            tokens = pl.ds(block * k_tiles.shape[1], k_tiles.shape[1])
            for source, tiles, ready, free in ((k, k_tiles, k_ready, k_free), (v, v_tiles, v_ready, v_free)):
                pl.when(refill)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                plgpu.copy_gmem_to_smem(source.at[at.batch, tokens, at.key_head], tiles.at[slot], ready.at[slot])


def _query_gradient_kernel(
    q, k, v, view, segments, arriving, log_sum_exp, delta, ranges, out, *, q_own, arriving_own, k_tiles, v_tiles,
    own_ready, ready, free,
):  # fmt: skip
    at, scale = _QueryTiles(q, k, ranges), q.shape[3] ** -0.5

    @pl.when(at.worker < _WORKERS)
    def compute():
        plgpu.set_max_registers(232, action="increase")
        own, own_arriving, rows, head = q_own.at[at.worker], arriving_own.at[at.worker], at.rows, at.query_head
        plgpu.copy_gmem_to_smem(q.at[at.batch, rows, head], own, own_ready.at[at.worker])
        plgpu.copy_gmem_to_smem(arriving.at[at.batch, rows, head], own_arriving, own_ready.at[at.worker])
        statistics, differences = (warpgroup.load(x, (at.batch, head, rows), 0) for x in (log_sum_exp, delta))
        plgpu.barrier_wait(own_ready.at[at.worker])

        def step(block, slot, acc, masked):
            plgpu.barrier_wait(ready.at[slot])
            scores = warpgroup.product_transposed(own, k_tiles.at[slot]) * (scale * _LOG2E)
            if masked:
                scores = _hide(scores, view, segments, at.batch, rows, block, key_axis=1)
            weights = jnp.exp2(scores - warpgroup.spread(statistics, scores.shape, 0))
            wanted = warpgroup.product_transposed(own_arriving, v_tiles.at[slot])
            change = weights * (wanted - warpgroup.spread(differences, scores.shape, 0))
            acc = warpgroup.add_product(acc, change.astype(k.dtype), k_tiles.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            return acc

        acc = at.loop(step, warpgroup.full(0, (warpgroup.ROWS, q.shape[3])))
        own[...] = (acc * scale).astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, out.at[at.batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(at.worker == _WORKERS)
    def fetch():
        plgpu.set_max_registers(40, action="decrease")

        @at.each_block(free)
        def _(block, slot, refill):
            tokens = pl.ds(block * k_tiles.shape[1], k_tiles.shape[1])
            pl.when(refill)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            for source, tiles in ((k, k_tiles), (v, v_tiles)):
                plgpu.copy_gmem_to_smem(source.at[at.batch, tokens, at.key_head], tiles.at[slot], ready.at[slot])


def _key_gradient_kernel(
    q, k, v, view, segments, arriving, log_sum_exp, delta, ranges, to_keys, to_values, *, k_own, v_own, q_tiles,
    arriving_tiles, log_sum_exp_tiles, delta_tiles, own_ready, ready, free,
):  # fmt: skip
    at, scale = _KeyTiles(q, k, ranges), q.shape[3] ** -0.5

    @pl.when(at.worker < _WORKERS)
    def compute():
        plgpu.set_max_registers(232, action="increase")
        keys, values = k_own.at[at.worker], v_own.at[at.worker]
        for source, own in ((k, keys), (v, values)):
            plgpu.copy_gmem_to_smem(source.at[at.batch, at.tokens, at.key_head], own, own_ready.at[at.worker])
        plgpu.barrier_wait(own_ready.at[at.worker])

        def step(block, slot, carry, masked):
            acc_keys, acc_values = carry
            rows = pl.ds(at.query_block(block) * warpgroup.ROWS, warpgroup.ROWS)
            plgpu.barrier_wait(ready.at[slot])
            scores = warpgroup.product_transposed(keys, q_tiles.at[slot]) * (scale * _LOG2E)
            if masked:
                scores = _hide(scores, view, segments, at.batch, rows, at.key_block, key_axis=0)
            weights = jnp.exp2(
                scores - warpgroup.spread(warpgroup.load(log_sum_exp_tiles, (slot,), 1), scores.shape, 1)
            )
            acc_values = warpgroup.add_product(acc_values, weights.astype(q.dtype), arriving_tiles.at[slot])
            wanted = warpgroup.product_transposed(values, arriving_tiles.at[slot])
            change = weights * (wanted - warpgroup.spread(warpgroup.load(delta_tiles, (slot,), 1), scores.shape, 1))
            acc_keys = warpgroup.add_product(acc_keys, change.astype(q.dtype), q_tiles.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            return acc_keys, acc_values

        start = warpgroup.full(0, (warpgroup.ROWS, k.shape[3]))
        acc_keys, acc_values = at.loop(step, (start, start))
        keys[...] = (acc_keys * scale).astype(to_keys.dtype)
        values[...] = acc_values.astype(to_values.dtype)
        plgpu.commit_smem()
        for own, target in ((keys, to_keys), (values, to_values)):
            plgpu.copy_smem_to_gmem(own, target.at[at.batch, at.tokens, at.key_head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(at.worker == _WORKERS)
    def fetch():
        plgpu.set_max_registers(40, action="decrease")

        @at.each_block(free)
        def _(block, slot, refill):
            rows, head = pl.ds(at.query_block(block) * warpgroup.ROWS, warpgroup.ROWS), at.query_head(block)
            pl.when(refill)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            for source, tiles in ((q, q_tiles), (arriving, arriving_tiles)):
                plgpu.copy_gmem_to_smem(source.at[at.batch, rows, head], tiles.at[slot], ready.at[slot])
            for source, tiles in ((log_sum_exp, log_sum_exp_tiles), (delta, delta_tiles)):
                plgpu.copy_gmem_to_smem(source.at[at.batch, head, rows], tiles.at[slot], ready.at[slot])


class _Tiles:
    """Where a warpgroup stands, and the blocks [begin, end) of the other side that its thread block goes through.

    Of these it sees [whole_begin, whole_end) without a mask; both warpgroups go through all of them, in step.
    """

    begin: Any
    end: Any
    whole_begin: Any
    whole_end: Any

    def __init__(self) -> None:
        self.key_head, self.batch = jax.lax.axis_index("head"), jax.lax.axis_index("batch")
        self.worker = jax.lax.axis_index("worker")

    def loop(self, step: Callable[..., Any], carry: Any) -> Any:
        """Run step(block, slot, carry, masked) over all blocks."""

        def body(block: Any, carry: Any, masked: bool) -> Any:
            return step(block, jax.lax.rem(block - self.begin, _STAGES), carry, masked)

        masked, unmasked = functools.partial(body, masked=True), functools.partial(body, masked=False)
        carry = jax.lax.fori_loop(self.begin, self.whole_begin, masked, carry)
        carry = jax.lax.fori_loop(self.whole_begin, self.whole_end, unmasked, carry)
        return jax.lax.fori_loop(self.whole_end, self.end, masked, carry)

    def each_block(self, *free: Any) -> Callable[[Callable[..., None]], None]:
        """Run fetch(block, slot, refill) over all blocks, `refill` saying that the slot was in use before.

        Every completion of the barriers `free` is waited for: here the last ones, in `fetch` those of refills.
        """

        def run(fetch: Callable[..., None]) -> None:
            @pl.loop(self.begin, self.end)
            def _(block: Any) -> None:
                done = block - self.begin
                fetch(block, jax.lax.rem(done, _STAGES), done >= _STAGES)

            for slot, barrier in itertools.product(range(_STAGES), free):
                pl.when(self.end - self.begin > slot)(functools.partial(plgpu.barrier_wait, barrier.at[slot]))

        return run


class _QueryTiles(_Tiles):
    """Tiles of 64 queries of one head, heads of a group first; blocks are of keys."""

    def __init__(self, q: Any, k: Any, ranges: Any):
        super().__init__()
        group = q.shape[2] // k.shape[2]
        # The longest rows of a causal triangle start first.
        pair = q.shape[1] * group // (warpgroup.ROWS * _WORKERS) - 1 - jax.lax.axis_index("tile")
        first, last = (jax.lax.div(pair * _WORKERS + i, group) for i in (0, _WORKERS - 1))
        mine = pair * _WORKERS + jnp.minimum(self.worker, _WORKERS - 1)
        tile = jax.lax.div(mine, group)
        self.rows = pl.ds(tile * warpgroup.ROWS, warpgroup.ROWS)
        self.query_head = self.key_head * group + jax.lax.rem(mine, group)
        self.begin = jnp.minimum(ranges[self.batch, first, 0], ranges[self.batch, last, 0])
        self.end = jnp.maximum(ranges[self.batch, first, 1], ranges[self.batch, last, 1])
        self.whole_begin, self.whole_end = ranges[self.batch, tile, 2], ranges[self.batch, tile, 3]


class _KeyTiles(_Tiles):
    """Tiles of 64 keys; blocks are of 64 queries of one head, all heads of a group for one block after another."""

    def __init__(self, q: Any, k: Any, ranges: Any):
        super().__init__()
        self._group = q.shape[2] // k.shape[2]
        pair = jax.lax.axis_index("tile")
        self.key_block = pair * _WORKERS + jnp.minimum(self.worker, _WORKERS - 1)
        self.tokens = pl.ds(self.key_block * warpgroup.ROWS, warpgroup.ROWS)
        self.begin, self.end, self.whole_begin, self.whole_end = (
            ranges[self.batch, pair, i] * self._group for i in range(4)
        )

    def query_block(self, block: Any) -> Any:
        return jax.lax.div(block, self._group)

    def query_head(self, block: Any) -> Any:
        return self.key_head * self._group + jax.lax.rem(block, self._group)


def _hide(scores: Array, view: Any, segments: Any, batch: Any, rows: Any, key_block: Any, *, key_axis: int) -> Array:
    """Put what the queries `rows` do not see of a block of keys below every other score."""
    keys = scores.shape[key_axis]
    index = warpgroup.index_along(scores.shape, key_axis) + key_block * keys
    segment, first, end = (
        warpgroup.spread(warpgroup.load(view, (batch, i, rows), 1 - key_axis), scores.shape, 1 - key_axis)
        for i in range(3)
    )
    key_segment = warpgroup.load(segments, (batch, pl.ds(key_block * keys, keys)), key_axis)
    visible = (warpgroup.spread(key_segment, scores.shape, key_axis) == segment) & (index >= first) & (index < end)
    return jnp.where(visible, scores, _MASKED)


def _launch(
    kernel: Callable[..., None], *, grid: tuple[int, ...], results: tuple[Any, ...], scratch: dict[str, Any]
) -> Callable[..., Any]:
    return plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results),
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=_WORKERS + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _prepare(q: Array, k: Array, v: Array, visible: Visible) -> _Call:
    block = max(_FORWARD_KEYS, warpgroup.ROWS * _WORKERS)

    def whole(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))

    view = (whole(x).astype(jnp.int32) for x in (visible.query_segments, *visible.bounds()))
    segments = whole(visible.segment_ids).astype(jnp.int32)
    return _Call(whole(q), whole(k), whole(v), jnp.stack([*view], axis=1), segments)


def _ranges(call: _Call, keys: int, *, by_keys: bool) -> Int[Array, "B blocks 4"]:
    """Begin and end of what a block sees of the other side's blocks, then of a run that it sees wholly."""
    segments, first, end = (call.query_view[:, i] for i in range(3))
    key_segments, bound = call.key_segments, jnp.iinfo(jnp.int32)

    def real(segments: Array, otherwise: int, value: Array | None = None) -> Array:
        return jnp.where(segments == 0, otherwise, segments if value is None else value)

    def queries(reduce: Callable[..., Array], x: Array) -> Array:
        return reduce(x.reshape(x.shape[0], -1, warpgroup.ROWS), axis=2)[:, :, None]

    def blocks(reduce: Callable[..., Array], x: Array) -> Array:
        return reduce(x.reshape(x.shape[0], -1, keys), axis=2)[:, None, :]

    start = jnp.arange(0, key_segments.shape[1], keys)
    stop = start + keys
    one, other = queries(jnp.min, real(segments, bound.max)), queries(jnp.max, real(segments, bound.min))
    some = (blocks(jnp.max, real(key_segments, bound.min)) >= one) & (
        blocks(jnp.min, real(key_segments, bound.max)) <= other
    )
    some &= (queries(jnp.max, end) > start) & (queries(jnp.min, real(segments, bound.max, first)) < stop)
    # Padded queries end at 0 and fail here; padded keys do not equal the others.
    every = (queries(jnp.min, end) >= stop) & (queries(jnp.max, first) <= start) & (other == one)
    every &= (blocks(jnp.min, key_segments) == one) & (blocks(jnp.max, key_segments) == one)
    if by_keys:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    index = jnp.arange(some.shape[2])
    begin = jnp.argmax(some, axis=2)
    behind = jnp.max(jnp.where(some, index + 1, 0), axis=2)
    begin = jnp.minimum(begin, behind)
    # Where nothing is whole the run is empty and stands at the end.
    whole = jnp.where(jnp.any(every, axis=2), jnp.argmax(every, axis=2), behind)
    broken = ~every & (index >= whole[:, :, None])
    whole_end = jnp.where(jnp.any(broken, axis=2), jnp.argmax(broken, axis=2), some.shape[2])
    return jnp.stack([begin, behind, whole, jnp.clip(whole_end, whole, behind)], axis=2).astype(jnp.int32)
