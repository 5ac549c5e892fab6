"""Paged attention in Mosaic TPU: one step of the grid a row, its pages streamed from slow to fast memory.

Two buffers take turns: while one block of pages is worked on, the next one arrives, across the end of a row too, so
that the memory never rests. Decoding is bound by that stream; the arithmetic (a few dozen query rows against a block)
hides behind it. Pages behind a row's end are not fetched.

The table of all rows may not fit scalar memory (of 1 MiB: 256 rows of 32,768 tokens in pages of 32 do not): a step has
its own row's part and, to fetch ahead, the next row's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

DTYPES = ("bfloat16", "float32")
HEAD_SIZES = (128,)  # of 64, XLA lays pages out in another way than the kernel reads them, and would copy them all
PAGE_SIZES = (16, 32, 64, 128, 256, 512)  # whole registers of bfloat16: pages join into one matrix without moving
LARGEST_GROUP = 256  # query rows of one head of keys
_BLOCK_TOKENS = 512
_SUBLANES = 16  # of a register of bfloat16
_BUFFER_BYTES = 2**21  # of one of four buffers
# A hidden score lies below what the running maximum starts from: its exponential is 0 even where all are hidden.
_MASKED = -1e30
_LOWEST = -1e29


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
    places = k_pages.shape[2]
    token_bytes = kv_heads * size * k_pages.dtype.itemsize
    pages = max(1, min(_BLOCK_TOKENS, _BUFFER_BYTES // token_bytes, page_table.shape[1] * places) // places)
    padded = -(-rows // _SUBLANES) * _SUBLANES
    queries = pl.BlockSpec((1, kv_heads, padded, size), lambda b, *_: (b, 0, 0, 0))
    table = page_table.astype(jnp.int32)[:, None]
    own, next_own = (
        pl.BlockSpec(
            (1, *table.shape[1:]),
            lambda b, *_, ahead=ahead: (jnp.minimum(b + ahead, batch - 1), 0, 0),
            memory_space=pltpu.SMEM,
        )
        for ahead in (0, 1)
    )
    buffer = pltpu.VMEM((2, pages, kv_heads, places, size), k_pages.dtype)
    out = pl.pallas_call(
        functools.partial(_kernel, new=new, group=rows // new),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[own, next_own, queries, pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=queries,
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((kv_heads, padded, size), jnp.float32),
                pltpu.VMEM((kv_heads, padded, 1), jnp.float32),
                pltpu.VMEM((kv_heads, padded, 1), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, padded, size), q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    )(
        lengths.astype(jnp.int32),
        table,
        table,
        jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, 0))),
        k_pages,
        v_pages,
    )
    return out[:, :, :rows]


def _kernel(
    lengths, own, next_own, q, k_pages, v_pages, out, k_buffer, v_buffer, arrived, turn, acc, top, total, *, new, group
):
    row, (_, pages, kv_heads, places, size) = pl.program_id(0), k_buffer.shape
    block_tokens = pages * places

    def each_page(table: Any, row: Any, block: Any, slot: Any, act: Any) -> None:
        """Start or await the copies of a block, both by the same condition."""
        for i in range(pages):
            page = block * pages + i

            @pl.when(page * places < lengths[row])
            def copy(i=i, page=page):
                for side, (source, buffer) in enumerate(((k_pages, k_buffer), (v_pages, v_buffer))):
                    target, semaphore = buffer.at[slot, i], arrived.at[side, slot]
                    act(pltpu.make_async_copy(source.at[table[0, 0, page]], target, semaphore))

    @pl.when(row == 0)
    def first_fetch():
        # Weights of 0 for what was not fetched must meet numbers.
        v_buffer[...] = jnp.zeros_like(v_buffer)
        turn[0] = 0
        each_page(own, 0, 0, 0, lambda copy: copy.start())

    acc[...] = jnp.zeros_like(acc)
    top[...] = jnp.full_like(top, _LOWEST)
    total[...] = jnp.zeros_like(total)
    # A row of length 0 takes a turn with nothing fetched, so that its neighbours need not know.
    count = jnp.maximum(pl.cdiv(lengths[row], block_tokens), 1)

    @pl.loop(0, count)
    def work(block):
        slot = turn[0] % 2

        @pl.when(block + 1 < count)
        def fetch_ahead():
            each_page(own, row, block + 1, 1 - slot, lambda copy: copy.start())

        @pl.when((block + 1 == count) & (row + 1 < pl.num_programs(0)))
        def fetch_next_row():
            each_page(next_own, row + 1, 0, 1 - slot, lambda copy: copy.start())

        each_page(own, row, block, slot, lambda copy: copy.wait())
        index = jax.lax.broadcasted_iota(jnp.int32, (q.shape[2], block_tokens), 0)
        token = jax.lax.broadcasted_iota(jnp.int32, (q.shape[2], block_tokens), 1) + block * block_tokens
        position = lengths[row] - new + sum((index >= t * group).astype(jnp.int32) for t in range(1, new))
        visible = token <= position
        for head in range(kv_heads):
            keys, values = (x[slot, :, head].reshape(block_tokens, size) for x in (k_buffer, v_buffer))
            scores = jnp.where(visible, _dot(q[0, head], keys, 1) * size**-0.5, _MASKED)
            highest = jnp.maximum(top[head], jnp.max(scores, axis=1, keepdims=True))
            weights, shrink = jnp.exp(scores - highest), jnp.exp(top[head] - highest)
            top[head] = highest
            total[head] = total[head] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            acc[head] = acc[head] * shrink + _dot(weights.astype(values.dtype), values, 0)
        turn[0] += 1

    out[0] = (acc[...] / jnp.maximum(total[...], jnp.finfo(jnp.float32).tiny)).astype(out.dtype)


def _dot(a: Array, b: Array, contract: int) -> Array:
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (contract,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
