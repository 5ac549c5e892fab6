"""The passes of the linear KL in Mosaic GPU for Hopper: tiles of tokens by entries, as warpgroups with a job each.

Two warpgroups compute the logits of 64 tokens each with a block of entries that they share, and reduce them in their
registers; a third fetches ahead. A thread block goes through one of several parts of the vocabulary, so that few
tokens fill a card too, and thread blocks that run beside each other share tokens.

The named entries of a token are found in rounds: of each token the largest id that is left in the block, compared with
the entries' indices. A table says how many rounds a tile needs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas import warpgroup
from kernels_pallas.linear_kl.divergence import Divergence, contribution_and_slope
from kernels_pallas.linear_kl.mass import Mass, Survey
from kernels_pallas.linear_kl.passes import rounds
from kernels_pallas.linear_kl.sure import relative_slopes

DTYPES = ("bfloat16",)
MULTIPLE = 64  # of D: what a product sums at a time
MOST_NAMED = 128  # what registers hold beside the logits
_WORKERS = 2
_STAGES = 4  # steps that are in shared memory at a time
_BLOCK_VOCAB = 128
_THREAD_BLOCKS = 4 * 132  # to share the work of a pass out to
_NAMED = 32  # what a tile of float32 is a multiple of
# What must not count lies below what the running maximum starts from: its exponential is 0 even where nothing counts.
_MASKED = -1e30
_LOWEST = -1e29


def survey_at_ids(
    hidden: Float[Array, "M D"], head: Float[Array, "V D"], ids: Int[Array, "M J"]
) -> tuple[Float[Array, "M J"], Mass]:
    """As `tpu.survey_at_ids`."""
    count, ids = ids.shape[1], _named(ids, -1)
    chosen, sums = _launch(
        functools.partial(_survey_at_ids_kernel, vocab=len(head)),
        pairs=((hidden, head),),
        extra=(ids.astype(jnp.float32), rounds(ids, warpgroup.ROWS, _BLOCK_VOCAB, len(head))),
        by_part=[((len(hidden), ids.shape[1]), jnp.float32), ((3, len(hidden)), jnp.float32)],
        scratch={
            "chosen_own": warpgroup.tiles(_WORKERS, warpgroup.ROWS, ids.shape[1], jnp.float32),
            "sums_own": plgpu.SMEM((_WORKERS, 3, warpgroup.ROWS), jnp.float32),
        },
    )
    return chosen.max(0)[:, :count], _merge(_mass(sums))


def slopes_at_ids(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "M J"],
    gradient: Float[Array, "M J+1"],
    rest_lse: Float[Array, " M"],
    fresh: Int[Array, ""] | int,
) -> Float[Array, "V M"]:
    """As `tpu.slopes_at_ids`."""
    vocab, head = len(head), _whole_blocks(head)
    (slopes,) = _launch(
        _slopes_at_ids_kernel,
        pairs=((hidden, head),),
        extra=(
            _named(ids, -1).astype(jnp.float32),
            rounds(ids, warpgroup.ROWS, _BLOCK_VOCAB, len(head)),
            _named(gradient[:, :-1], 0),
            jnp.stack([rest_lse, gradient[:, -1]]),
            jnp.asarray(fresh, jnp.int32).reshape(1),
        ),
        whole=[((len(hidden), len(head)), hidden.dtype)],
        scratch={"slopes_own": warpgroup.tiles(_WORKERS, warpgroup.ROWS, _BLOCK_VOCAB)},
    )
    return slopes.T[:vocab]


def survey_full(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "M Dt"],
    teacher_head: Float[Array, "V Dt"],
) -> Survey:
    """As `tpu.survey_full`."""
    (sums,) = _launch(
        functools.partial(_survey_full_kernel, vocab=len(head)),
        pairs=((hidden, head), (teacher_hidden, teacher_head)),
        extra=(),
        by_part=[((7, len(hidden)), jnp.float32)],
        scratch={"sums_own": plgpu.SMEM((_WORKERS, 7, warpgroup.ROWS), jnp.float32)},
    )
    parts = Survey(student=_mass(sums[:, :3]), teacher=_mass(sums[:, 3:6]), teacher_at_top=sums[:, 6])
    return parts.together(_merge(parts.student), _merge(parts.teacher), functools.partial(jnp.max, axis=0))


def slopes_full(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "M Dt"],
    teacher_head: Float[Array, "V Dt"],
    rows: Float[Array, "8 M"],
    fresh: Int[Array, ""] | int,
    *,
    divergence: Divergence,
    with_slopes: bool,
) -> tuple[Float[Array, " M"], Float[Array, " M"], Float[Array, "V M"] | None]:
    """As `tpu.slopes_full`."""
    vocab = len(head)
    if with_slopes:
        head, teacher_head = _whole_blocks(head), _whole_blocks(teacher_head)
    sums, *slopes = _launch(
        functools.partial(_slopes_full_kernel, vocab=vocab, divergence=divergence),
        pairs=((hidden, head), (teacher_hidden, teacher_head)),
        extra=(rows, jnp.asarray(fresh, jnp.int32).reshape(1)),
        by_part=[((2, len(hidden)), jnp.float32)],
        whole=[((len(hidden), len(head)), hidden.dtype)] if with_slopes else [],
        scratch={
            "sums_own": plgpu.SMEM((_WORKERS, 2, warpgroup.ROWS), jnp.float32),
            "slopes_own": warpgroup.tiles(_WORKERS, warpgroup.ROWS, _BLOCK_VOCAB),
        },
    )
    return *sums.sum(0), slopes[0].T[:vocab] if slopes else None


def _survey_at_ids_kernel(at, ids, rounds, chosen, sums, *, chosen_own, sums_own, vocab):
    def step(block, carry, logits):
        found, *mass = carry
        logits = jnp.where(_counts(block, logits.shape, vocab), logits, _MASKED)

        def look(hit, own, carry):
            logits, found = carry
            here = warpgroup.spread(jnp.max(jnp.where(hit, logits, _MASKED), axis=1), found.shape, 0)
            return jnp.where(hit, _MASKED, logits), jnp.where(own, jnp.maximum(found, here), found)

        logits, found = _each_round(at, block, ids, rounds, look, (logits, found))
        return found, *_add_mass(mass, logits)

    found, *mass = at.each_block(step, (warpgroup.full(_MASKED, chosen_own.shape[1:]), *_nothing()))
    chosen_own[at.worker] = found
    for i, part in enumerate(mass):
        sums_own[at.worker, i] = part
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(chosen_own.at[at.worker], chosen.at[at.part, at.rows])
    at.store_rows(sums_own, sums)


def _slopes_at_ids_kernel(at, ids, rounds, gradient, rows, fresh, out, *, slopes_own):
    rest_lse, tail = (warpgroup.load(rows, (i, at.rows), 0) for i in range(2))

    def step(block, carry, logits):
        shape = logits.shape
        slopes = warpgroup.spread(tail, shape, 0) * jnp.exp(logits - warpgroup.spread(rest_lse, shape, 0))

        def look(hit, own, slopes):
            here = jnp.sum(jnp.where(own, warpgroup.load_matrix(gradient, (at.rows,)), 0), axis=1)
            return jnp.where(hit, warpgroup.spread(here, shape, 0), slopes)

        slopes = _each_round(at, block, ids, rounds, look, slopes)
        at.store_tile(block, jnp.where(block.index(shape) >= fresh[0], slopes, 0), slopes_own, out)
        return carry

    at.each_block(step, ())


def _survey_full_kernel(at, sums, *, sums_own, vocab):
    def step(block, carry, zs, zt):
        student, teacher, at_top = carry[:3], carry[3:6], carry[6]
        counts = _counts(block, zs.shape, vocab)
        zs, zt = jnp.where(counts, zs, _MASKED), jnp.where(counts, zt, _MASKED)
        here = jnp.max(zs, axis=1)
        first = jnp.max(jnp.where(zs == warpgroup.spread(here, zs.shape, 0), zt, _MASKED), axis=1)
        before = student[0]
        at_top = jnp.maximum(jnp.where(before >= here, at_top, _MASKED), jnp.where(here >= before, first, _MASKED))
        return *_add_mass(student, zs), *_add_mass(teacher, zt), at_top

    results = at.each_block(step, (*_nothing(), *_nothing(), warpgroup.full(_MASKED, (warpgroup.ROWS,))))
    for i, result in enumerate(results):
        sums_own[at.worker, i] = result
    plgpu.commit_smem()
    at.store_rows(sums_own, sums)


def _slopes_full_kernel(at, rows, fresh, sums, *out, sums_own, slopes_own, vocab, divergence):
    by_row = [warpgroup.load(rows, (i, at.rows), 0) for i in range(8)]

    def step(block, carry, zs, zt):
        value, slope_sum = carry
        student_top, student_log, teacher_top, teacher_log, weight, cut, centre, whole_slope = (
            warpgroup.spread(x, zs.shape, 0) for x in by_row
        )
        lp, lq = (zt - teacher_top) - teacher_log, (zs - student_top) - student_log
        counts = _counts(block, lq.shape, vocab) & (block.index(lq.shape) >= fresh[0])
        share, slope = contribution_and_slope(divergence, lp, lq)
        share, slope = (jnp.where(counts, x, 0) for x in (share, relative_slopes(slope, lq, cut, centre)))
        if out:
            slopes = jnp.where(counts, weight * (slope - jnp.exp(lq) * whole_slope), 0)
            at.store_tile(block, slopes, slopes_own, out[0])
        return value + jnp.sum(share, axis=1), slope_sum + jnp.sum(slope, axis=1)

    zero = warpgroup.full(0, (warpgroup.ROWS,))
    for i, result in enumerate(at.each_block(step, (zero, zero))):
        sums_own[at.worker, i] = result
    plgpu.commit_smem()
    at.store_rows(sums_own, sums)


class _Block:
    """A block of entries. The last one is moved back to end with the head; the entries that it shares with the one
    before are not its own."""

    def __init__(self, number: Any, entries: int):
        self.begin = number * _BLOCK_VOCAB
        self.first = jnp.minimum(self.begin, entries - _BLOCK_VOCAB)
        self.number = number

    def index(self, shape: tuple[int, ...]) -> Array:
        """The entry of each logit."""
        return warpgroup.index_along(shape, 1) + self.first


class _Place:
    """Where a warpgroup stands: 64 tokens, and the part of the vocabulary that its thread block goes through."""

    def __init__(self, hidden: Sequence[Any], heads: Sequence[Any], tiles: dict[str, Any], parts: int):
        self._hidden, self._heads = hidden, heads
        self._row_tiles, self._vocab_tiles, self._ready, self._free = (
            tiles.pop(name) for name in ("row_tiles", "vocab_tiles", "ready", "free")
        )
        self.part, self._tile = jax.lax.axis_index("part"), jax.lax.axis_index("tile")
        self.worker = jax.lax.axis_index("worker")
        self.row_tile = self._tile * _WORKERS + jnp.minimum(self.worker, _WORKERS - 1)
        self.rows = pl.ds(self.row_tile * warpgroup.ROWS, warpgroup.ROWS)
        blocks = pl.cdiv(heads[0].shape[0], _BLOCK_VOCAB)
        self._begin = self.part * pl.cdiv(blocks, parts)
        self._end = jnp.minimum(self._begin + pl.cdiv(blocks, parts), blocks)
        self._steps = [x.shape[1] // MULTIPLE for x in hidden]

    def each_block(self, step: Callable[..., Any], carry: Any) -> Any:
        """Run step(block, carry, *logits) over all blocks, with logits by each pair of hidden states and head."""

        def body(number: Any, carry: Any) -> Any:
            done, logits = (number - self._begin) * sum(self._steps), []
            for steps in self._steps:

                def multiply(i: Any, total: Array, done: Any = done) -> Array:
                    slot = jax.lax.rem(done + i, _STAGES)
                    plgpu.barrier_wait(self._ready.at[slot])
                    own, entries = self._row_tiles.at[slot * _WORKERS + self.worker], self._vocab_tiles.at[slot]
                    total = warpgroup.add_product_of_tiles(total, own, entries, transpose_b=True)
                    plgpu.barrier_arrive(self._free.at[slot])
                    return total

                zero = warpgroup.full(0, (warpgroup.ROWS, _BLOCK_VOCAB))
                logits.append(jax.lax.fori_loop(0, steps, multiply, zero))
                done += steps
            return step(_Block(number, self._heads[0].shape[0]), carry, *logits)

        return jax.lax.fori_loop(self._begin, self._end, body, carry)

    def fetch(self) -> None:
        """Fill each slot when its last use has ended; at the end all uses have."""

        @pl.loop(self._begin, self._end)
        def _(number: Any) -> None:
            entries = pl.ds(_Block(number, self._heads[0].shape[0]).first, _BLOCK_VOCAB)
            done = (number - self._begin) * sum(self._steps)
            for hidden, head, steps in zip(self._hidden, self._heads, self._steps, strict=True):

                @pl.loop(0, steps)
                def _(i: Any, hidden: Any = hidden, head: Any = head, done: Any = done) -> None:
                    slot, inner = jax.lax.rem(done + i, _STAGES), pl.ds(i * MULTIPLE, MULTIPLE)
                    pl.when(done + i >= _STAGES)(functools.partial(plgpu.barrier_wait, self._free.at[slot]))
                    for worker in range(_WORKERS):
                        rows = pl.ds((self._tile * _WORKERS + worker) * warpgroup.ROWS, warpgroup.ROWS)
                        own = self._row_tiles.at[slot * _WORKERS + worker]
                        plgpu.copy_gmem_to_smem(hidden.at[rows, inner], own, self._ready.at[slot])
                    plgpu.copy_gmem_to_smem(head.at[entries, inner], self._vocab_tiles.at[slot], self._ready.at[slot])

                done += steps

        total = (self._end - self._begin) * sum(self._steps)
        for slot in range(_STAGES):
            pl.when(total > slot)(functools.partial(plgpu.barrier_wait, self._free.at[slot]))

    def store_rows(self, own: Any, target: Any) -> None:
        """One row after another of what this warpgroup has in `own`, committed before."""
        for i in range(own.shape[1]):
            plgpu.copy_smem_to_gmem(own.at[self.worker, i], target.at[self.part, i, self.rows])
        plgpu.wait_smem_to_gmem(0)

    def store_tile(self, block: _Block, values: Array, own: Any, target: Any) -> None:
        own[self.worker] = values.astype(own.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own.at[self.worker], target.at[self.rows, pl.ds(block.first, _BLOCK_VOCAB)])
        # The next block takes the same tile.
        plgpu.wait_smem_to_gmem(0)


def _counts(block: _Block, shape: tuple[int, ...], vocab: int) -> Array:
    """Which entries are a block's own, and any at all."""
    index = block.index(shape)
    return (index >= block.begin) & (index < vocab)


def _each_round(at: _Place, block: _Block, ids: Any, rounds: Any, look: Callable[..., Any], carry: Any) -> Any:
    """Run look(hit, own, carry) for each round: `hit` [tokens, entries] and `own` [tokens, J] say where an id is.

    Entries without an id in this block are in `own` too, once a token has none left; `hit` is then false everywhere.
    """
    begin = block.begin.astype(jnp.float32)
    named = warpgroup.load_matrix(ids, (at.rows,))
    left = jnp.where((named >= begin) & (named < begin + _BLOCK_VOCAB), named, -1)

    def body(_: Any, carry: Any) -> Any:
        left, inner = carry
        current = jnp.max(left, axis=1)
        own = left == warpgroup.spread(current, left.shape, 0)
        shape = (warpgroup.ROWS, _BLOCK_VOCAB)
        hit = block.index(shape).astype(jnp.float32) == warpgroup.spread(current, shape, 0)
        return jnp.where(own, -1, left), look(hit, own, inner)

    return jax.lax.fori_loop(0, rounds[at.row_tile, block.number], body, (left, carry))[1]


def _nothing() -> tuple[Array, ...]:
    """The largest logit of none, and the sums of none."""
    rows = (warpgroup.ROWS,)
    return warpgroup.full(_LOWEST, rows), warpgroup.full(0, rows), warpgroup.full(0, rows)


def _add_mass(mass: Any, logits: Array) -> tuple[Array, Array, Array]:
    """`Mass.merge` of one block's logits into (top, total, moment)."""
    before, total, moment = mass
    top = jnp.maximum(before, jnp.max(logits, axis=1))
    fall = before - top
    shrink = jnp.exp(fall)
    below = logits - warpgroup.spread(top, logits.shape, 0)
    own = jnp.exp(below)
    moment = shrink * (moment + fall * total) + jnp.sum(own * below, axis=1)
    return top, shrink * total + jnp.sum(own, axis=1), moment


def _mass(sums: Float[Array, "parts 3 M"]) -> Mass:
    return Mass(top=sums[:, 0], total=sums[:, 1], moment=sums[:, 2])


def _merge(parts: Mass) -> Mass:
    return parts.together(parts.top.max(0), functools.partial(jnp.sum, axis=0))


def _launch(
    kernel: Callable[..., None],
    *,
    pairs: tuple[tuple[Array, Array], ...],
    extra: tuple[Array, ...],
    scratch: dict[str, Any],
    by_part: Any = (),
    whole: Any = (),
) -> list[Array]:
    """Call kernel(place, *extra, *results, **scratch) for all tokens and parts of the vocabulary.

    Results are given as shape and dtype; of those in `by_part` each part of the vocabulary has one of its own.
    """
    hidden, heads = zip(*((hidden, _at_least_a_block(head)) for hidden, head in pairs), strict=True)
    tiles, blocks = len(hidden[0]) // (_WORKERS * warpgroup.ROWS), pl.cdiv(len(heads[0]), _BLOCK_VOCAB)
    parts = pl.cdiv(blocks, pl.cdiv(blocks, min(blocks, max(1, _THREAD_BLOCKS // tiles))))

    def body(*refs: Any, **tiles: Any) -> None:
        count = len(pairs)
        place = _Place(refs[:count], refs[count : 2 * count], tiles, parts)

        @pl.when(place.worker < _WORKERS)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            kernel(place, *refs[2 * count :], **tiles)

        @pl.when(place.worker == _WORKERS)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            place.fetch()

    shapes = [((parts, *shape), dtype) for shape, dtype in by_part] + list(whole)
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes],
        scratch_types=scratch
        | {
            "row_tiles": warpgroup.tiles(_STAGES * _WORKERS, warpgroup.ROWS, MULTIPLE),
            "vocab_tiles": warpgroup.tiles(_STAGES, _BLOCK_VOCAB, MULTIPLE),
            "ready": plgpu.Barrier(num_arrivals=_WORKERS + 1, num_barriers=_STAGES),
            "free": plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_STAGES),
        },
        grid=(parts, tiles),
        grid_names=("part", "tile"),
        num_threads=_WORKERS + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*hidden, *heads, *extra)


def _at_least_a_block(head: Float[Array, "V D"]) -> Float[Array, "_ D"]:
    return jnp.pad(head, ((0, max(0, _BLOCK_VOCAB - len(head))), (0, 0)))


def _whole_blocks(head: Float[Array, "V D"]) -> Float[Array, "_ D"]:
    """Nothing is copied of a part of a large vocabulary, which has them."""
    return jnp.pad(head, ((0, -len(head) % _BLOCK_VOCAB), (0, 0)))


def _named(array: Array, filling: int) -> Array:
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % _NAMED)), constant_values=filling)
