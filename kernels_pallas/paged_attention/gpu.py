"""Paged attention in Mosaic GPU for Hopper: thread blocks that stream pages, a share of a row each.

Decoding is bound by that stream, and rows times heads are too few thread blocks to fill a card, so each row's pages are
shared out further and the shares merged by their log-sum-exps (Flash-Decoding). In a thread block one warpgroup fetches
and one or two compute, 64 query rows each: all heads of a group and all new tokens read a page from shared memory once
it has come.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas import warpgroup

DTYPES = ("bfloat16",)
HEAD_SIZES = (64, 128)
PAGE_SIZES = (16, 32, 64)
LARGEST_GROUP = 128  # query rows of one head of keys: two warpgroups
_BLOCK_TOKENS = 64  # what a product with swizzled tiles sums at a time
_STAGES = 3
_THREAD_BLOCKS = 264  # two for each multiprocessor of an H100
# A hidden score lies below what the running maximum starts from: its exponential is 0 even where all are hidden.
_MASKED = -1e30
_LOWEST = -1e29
_LOG2E = math.log2(math.e)


def paged_attention(
    q: Float[Array, "B K R H"],
    k_pages: Float[Array, "P K s H"],
    v_pages: Float[Array, "P K s H"],
    page_table: Int[Array, "B p"],
    lengths: Int[Array, "B"],
    new: int,
) -> Float[Array, "B K R H"]:
    """The rows R are T·G: `new` tokens, all heads of a group beside each other."""
    batch, kv_heads, rows, size = q.shape
    workers = -(-rows // warpgroup.ROWS)
    padding = (0, workers * warpgroup.ROWS - rows)
    pages = max(1, _BLOCK_TOKENS // k_pages.shape[2])
    tokens = pages * k_pages.shape[2]
    shares = min(-(-_THREAD_BLOCKS // (batch * kv_heads)), -(-page_table.shape[1] // pages))
    position = jnp.repeat(lengths[:, None] - new + jnp.arange(new), rows // new, axis=1)
    parts = (batch, shares, kv_heads, workers * warpgroup.ROWS)
    out, log_sum_exp = plgpu.kernel(
        functools.partial(_kernel, new=new, pages=pages),
        out_type=(
            jax.ShapeDtypeStruct((*parts, size), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ),
        scratch_types={
            "q_own": warpgroup.tiles(workers, warpgroup.ROWS, size),
            "out_own": warpgroup.tiles(workers, warpgroup.ROWS, size, jnp.float32),
            "log_sum_exp_own": plgpu.SMEM((workers, warpgroup.ROWS), jnp.float32),
            "k_tiles": warpgroup.tiles(_STAGES, tokens, size),
            "v_tiles": warpgroup.tiles(_STAGES, tokens, size),
            "own_ready": plgpu.Barrier(num_barriers=workers),
            "ready": plgpu.Barrier(num_arrivals=2 * pages, num_barriers=_STAGES),
            "free": plgpu.Barrier(num_arrivals=workers, num_barriers=_STAGES),
        },
        grid=(shares, kv_heads, batch),
        grid_names=("share", "head", "batch"),
        num_threads=workers + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(
        jnp.pad(q, ((0, 0), (0, 0), padding, (0, 0))),
        k_pages,
        v_pages,
        page_table.astype(jnp.int32),
        lengths.astype(jnp.int32),
        jnp.pad(position, ((0, 0), padding), constant_values=-1).astype(jnp.int32),
    )
    weights = jax.nn.softmax(log_sum_exp, axis=1)[..., None]
    return jnp.sum(weights * out, axis=1)[:, :, :rows].astype(q.dtype)


def _kernel(
    q, k_pages, v_pages, table, lengths, positions, out, log_sum_exp, *, q_own, out_own, log_sum_exp_own, k_tiles,
    v_tiles, own_ready, ready, free, new, pages,
):  # fmt: skip
    share, head, batch = (jax.lax.axis_index(name) for name in ("share", "head", "batch"))
    worker, workers = jax.lax.axis_index("worker"), q_own.shape[0]
    length, tokens, size, places = lengths[batch], k_tiles.shape[1], q.shape[3], k_pages.shape[2]
    blocks = pl.cdiv(length, tokens)
    share_blocks = pl.cdiv(blocks, out.shape[1])
    begin = jnp.minimum(share * share_blocks, blocks)
    end = jnp.minimum(begin + share_blocks, blocks)
    # What the first of the new tokens sees, all see.
    whole = jnp.clip(jax.lax.div(jnp.maximum(length - new + 1, 0), tokens), begin, end)

    @pl.when(worker < workers)
    def compute():
        own = q_own.at[worker]
        rows = pl.ds(worker * warpgroup.ROWS, warpgroup.ROWS)
        plgpu.copy_gmem_to_smem(q.at[batch, head, rows], own, own_ready.at[worker])
        position = warpgroup.load(positions, (batch, rows), 0)
        plgpu.barrier_wait(own_ready.at[worker])

        def step(block, carry, masked):
            acc, top, total = carry
            slot = jax.lax.rem(block - begin, _STAGES)
            plgpu.barrier_wait(ready.at[slot])
            scores = warpgroup.product_transposed(own, k_tiles.at[slot]) * (size**-0.5 * _LOG2E)
            if masked:
                token = warpgroup.index_along(scores.shape, 1) + block * tokens
                scores = jnp.where(token <= warpgroup.spread(position, scores.shape, 0), scores, _MASKED)
            highest = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - warpgroup.spread(highest, scores.shape, 0))
            shrink = jnp.exp2(top - highest)
            total = total * shrink + jnp.sum(weights, axis=1)
            acc = acc * warpgroup.spread(shrink, acc.shape, 0)
            acc = warpgroup.add_product(acc, weights.astype(q.dtype), v_tiles.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            return acc, highest, total

        column = (warpgroup.ROWS,)
        carry = warpgroup.full(0, (*column, size)), warpgroup.full(_LOWEST, column), warpgroup.full(0, column)
        carry = jax.lax.fori_loop(begin, whole, functools.partial(step, masked=False), carry)
        acc, top, total = jax.lax.fori_loop(whole, end, functools.partial(step, masked=True), carry)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        out_own[worker] = acc / warpgroup.spread(total, acc.shape, 0)
        log_sum_exp_own[worker] = top * (1 / _LOG2E) + jnp.log(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_own.at[worker], out.at[batch, share, head, rows])
        plgpu.copy_smem_to_gmem(log_sum_exp_own.at[worker], log_sum_exp.at[batch, share, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(worker == workers)
    def fetch():
        last = jax.lax.div(length - 1, places)

        @pl.loop(begin, end)
        def _(block):
            slot = jax.lax.rem(block - begin, _STAGES)
            pl.when(block - begin >= _STAGES)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            for i in range(pages):
                # Behind the row's end its last page comes again, so that each block is of as many copies.
                page = table[batch, jnp.minimum(block * pages + i, last)]
                part = pl.ds(i * places, places)
                for source, tiles in ((k_pages, k_tiles), (v_pages, v_tiles)):
                    plgpu.copy_gmem_to_smem(source.at[page, head], tiles.at[slot, part], ready.at[slot])

        # Every completion of a barrier is waited for: these are the last ones.
        for slot in range(_STAGES):
            pl.when(end - begin > slot)(functools.partial(plgpu.barrier_wait, free.at[slot]))
