"""The passes of the linear KL in Mosaic TPU: tiles of entries by tokens, with the whole width in one product.

Logits stand as [entries, tokens]: what is reduced to one number a token runs over sublanes, and takes one lane of it.
A block of tokens stays in fast memory while the vocabulary goes by.

The named entries of a token are found in rounds: of each token the largest id that is left in the block, compared with
the entries' indices. A table in scalar memory says how many rounds a tile needs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_kl.divergence import Divergence, contribution_and_slope
from kernels_pallas.linear_kl.mass import Mass, Survey
from kernels_pallas.linear_kl.passes import rounds
from kernels_pallas.linear_kl.sure import relative_slopes

DTYPES = ("bfloat16", "float32")
MULTIPLE = 1  # of D
MOST_NAMED = 256  # what fast memory holds beside the blocks
_LANES = 128
_BLOCK_TOKENS = 1024
_BLOCK_VOCAB = 512
_TOKEN_BYTES = 8 * 2**20  # of a block of hidden states, the student's and the teacher's together
_VOCAB_BLOCK_BYTES = 4 * 2**20  # of a block of rows of both heads; of both blocks another is fetched ahead
_VMEM_BYTES = 48 * 2**20
# What must not count lies below what the running maximum starts from: its exponential is 0 even where nothing counts.
_MASKED = -1e30
_LOWEST = -1e29


def survey_at_ids(
    hidden: Float[Array, "M D"], head: Float[Array, "V D"], ids: Int[Array, "M J"]
) -> tuple[Float[Array, "M J"], Mass]:
    """The logits at `ids` (anything where an id is -1), and what those of all other entries add up to."""
    sizes = _sizes((hidden, head))
    chosen, *rest = _run(
        functools.partial(_survey_at_ids_kernel, entries=len(head)),
        tables=(rounds(ids, *sizes, len(head)),),
        tokens=(hidden,),
        entries=(head,),
        rows=(ids.T,),
        results=(("rows", ids.shape[1]), *[("rows", 1)] * 3),
        scratch=(((sizes[1], sizes[0]), jnp.float32), ((ids.shape[1], sizes[0]), jnp.int32)),
    )
    return chosen.T, _mass(rest)


def slopes_at_ids(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "M J"],
    gradient: Float[Array, "M J+1"],
    rest_lse: Float[Array, " M"],
    fresh: Int[Array, ""] | int,
) -> Float[Array, "V M"]:
    """The derivatives by the logits: `gradient` at `ids`, its last entry shared out among all other entries.

    Entries before `fresh` get 0.
    """
    sizes = _sizes((hidden, head))
    (out,) = _run(
        _slopes_at_ids_kernel,
        tables=(rounds(ids, *sizes, len(head)), jnp.asarray(fresh, jnp.int32).reshape(1)),
        tokens=(hidden,),
        entries=(head,),
        rows=(ids.T, gradient[:, :-1].T, jnp.stack([rest_lse, gradient[:, -1]])),
        results=(("logits", hidden.dtype),),
        scratch=(((sizes[1], sizes[0]), jnp.float32), ((ids.shape[1], sizes[0]), jnp.int32)),
    )
    return out


def survey_full(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "M Dt"],
    teacher_head: Float[Array, "V Dt"],
) -> Survey:
    """What the student's logits add up to, the teacher's, and the teacher's logit at the student's first entry."""
    results = _run(
        functools.partial(_survey_full_kernel, entries=len(head)),
        tables=(),
        tokens=(hidden, teacher_hidden),
        entries=(head, teacher_head),
        rows=(),
        results=[("rows", 1)] * 7,
        scratch=(),
    )
    return Survey(student=_mass(results[:3]), teacher=_mass(results[3:6]), teacher_at_top=results[6][0])


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
    """The divergence's sum over these entries, that of `sure.relative_slopes`, and the derivatives by the logits if
    asked for.

    `rows` are the top and the log of the total of the student's `Mass` and of the teacher's, the weight, `Sure.cut`,
    `Sure.centre`, and the sum of relative slopes over the whole vocabulary. Entries before `fresh` count nothing.
    """
    value, slope_sum, *slopes = _run(
        functools.partial(_slopes_full_kernel, entries=len(head), divergence=divergence),
        tables=(jnp.asarray(fresh, jnp.int32).reshape(1),),
        tokens=(hidden, teacher_hidden),
        entries=(head, teacher_head),
        rows=(rows,),
        results=(("rows", 1), ("rows", 1), *([("logits", hidden.dtype)] if with_slopes else [])),
        scratch=(),
    )
    return value[0], slope_sum[0], slopes[0] if slopes else None


def _survey_at_ids_kernel(rounds, h, w, ids, chosen, top, total, moment, logits, left, *, entries):
    @pl.when(pl.program_id(1) == 0)
    def _():
        chosen[...] = jnp.full_like(chosen, _MASKED)

    index = _index(logits.shape)
    logits[...] = jnp.where(index < entries - _first(w), _product(w, h), _MASKED)

    @_each_round(rounds, ids, left, w)
    def _(hit, own):
        found = jnp.max(jnp.where(hit, logits[...], _MASKED), axis=0, keepdims=True)
        chosen[...] = jnp.where(own, jnp.maximum(found, chosen[...]), chosen[...])
        logits[...] = jnp.where(hit, _MASKED, logits[...])

    _add_mass(logits[...], top, total, moment)


def _slopes_at_ids_kernel(rounds, fresh, h, w, ids, gradient, rows, out, slopes, left):
    slopes[...] = rows[1:2] * jnp.exp(_product(w, h) - rows[0:1])

    @_each_round(rounds, ids, left, w)
    def _(hit, own):
        here = jnp.sum(jnp.where(own, gradient[...], 0), axis=0, keepdims=True)
        slopes[...] = jnp.where(hit, here, slopes[...])

    out[...] = jnp.where(_index(out.shape) >= fresh[0] - _first(w), slopes[...], 0).astype(out.dtype)


def _survey_full_kernel(h, th, w, tw, *results, entries):
    student, teacher, teacher_at_top = results[:3], results[3:6], results[6]

    @pl.when(pl.program_id(1) == 0)
    def _():
        teacher_at_top[...] = jnp.full_like(teacher_at_top, _MASKED)
        student[0][...] = jnp.full_like(student[0], _LOWEST)

    zs, zt = _product(w, h), _product(tw, th)
    real = _index(zs.shape) < entries - _first(w)
    zs, zt = jnp.where(real, zs, _MASKED), jnp.where(real, zt, _MASKED)
    before, here = student[0][...], jnp.max(zs, axis=0, keepdims=True)
    at_top = jnp.max(jnp.where(zs == here, zt, _MASKED), axis=0, keepdims=True)
    teacher_at_top[...] = jnp.maximum(
        jnp.where(before >= here, teacher_at_top[...], _MASKED), jnp.where(here >= before, at_top, _MASKED)
    )
    _add_mass(zs, *student)
    _add_mass(zt, *teacher)


def _slopes_full_kernel(fresh, h, th, w, tw, rows, value, slope_sum, *slopes, entries, divergence):
    @pl.when(pl.program_id(1) == 0)
    def _():
        value[...] = jnp.zeros_like(value)
        slope_sum[...] = jnp.zeros_like(slope_sum)

    student_top, student_log, teacher_top, teacher_log, weight, cut, centre, whole_slope = (
        rows[i : i + 1] for i in range(8)
    )
    lp, lq = (_product(tw, th) - teacher_top) - teacher_log, (_product(w, h) - student_top) - student_log
    index = _index(lq.shape)
    counts = (index < entries - _first(w)) & (index >= fresh[0] - _first(w))
    share, slope = contribution_and_slope(divergence, lp, lq)
    share, slope = (jnp.where(counts, x, 0) for x in (share, relative_slopes(slope, lq, cut, centre)))
    value[...] += jnp.sum(share, axis=0, keepdims=True)
    slope_sum[...] += jnp.sum(slope, axis=0, keepdims=True)
    for out in slopes:
        out[...] = jnp.where(counts, weight * (slope - jnp.exp(lq) * whole_slope), 0).astype(out.dtype)


def _add_mass(logits: Array, top: Any, total: Any, moment: Any) -> None:
    """`Mass.merge` into refs, of which the first block of entries finds anything."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, _LOWEST)
        total[...] = jnp.zeros_like(total)
        moment[...] = jnp.zeros_like(moment)

    before = top[...]
    highest = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
    fall = before - highest
    shrink = jnp.exp(fall)
    below = logits - highest
    mass = jnp.exp(below)
    top[...] = highest
    moment[...] = shrink * (moment[...] + fall * total[...]) + jnp.sum(mass * below, axis=0, keepdims=True)
    total[...] = shrink * total[...] + jnp.sum(mass, axis=0, keepdims=True)


def _mass(rows: list[Array]) -> Mass:
    return Mass(top=rows[0][0], total=rows[1][0], moment=rows[2][0])


def _each_round(rounds: Any, ids: Any, left: Any, w: Any) -> Callable[[Callable[[Array, Array], None]], None]:
    """Run body(hit, own) for each round: `hit` [entries, tokens] and `own` [J, tokens] say where a token's id is.

    Entries without an id in this block are in `own` too, once a token has none left; `hit` is then false everywhere.
    """

    def run(body: Callable[[Array, Array], None]) -> None:
        tokens, block = pl.program_id(0), pl.program_id(1)
        local = ids[...] - _first(w)
        left[...] = jnp.where((local >= 0) & (local < w.shape[0]), local, -1)

        @pl.loop(0, rounds[tokens, block])
        def _(_: Any) -> None:
            current = jnp.max(left[...], axis=0, keepdims=True)
            own = left[...] == current
            body(_index((w.shape[0], ids.shape[1])) == current, own)
            left[...] = jnp.where(own, -1, left[...])

    return run


def _index(shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def _first(w: Any) -> Any:
    """The first entry of this block."""
    return pl.program_id(1) * w.shape[0]


def _product(w: Any, h: Any) -> Float[Array, "entries tokens"]:
    return jax.lax.dot_general(
        w[...],
        h[...],
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _run(
    kernel: Callable[..., None],
    *,
    tables: tuple[Array, ...],
    tokens: tuple[Array, ...],
    entries: tuple[Array, ...],
    rows: tuple[Array, ...],
    results: Any,
    scratch: tuple[Any, ...],
) -> list[Array]:
    """Call a kernel on every tile; `rows` have tokens along lanes, `tables` are in scalar memory.

    `results` are of the kind "rows", with a number of rows, or "logits", with a dtype.
    """
    block_tokens, block_vocab = _sizes((*tokens, *entries))
    count, vocab = tokens[0].shape[0], entries[0].shape[0]

    def rows_spec(height: int) -> pl.BlockSpec:
        return pl.BlockSpec((height, block_tokens), lambda m, v, *_: (0, m))

    kinds = {
        "rows": lambda height: (rows_spec(height), jax.ShapeDtypeStruct((height, count), jnp.float32)),
        "logits": lambda dtype: (
            pl.BlockSpec((block_vocab, block_tokens), lambda m, v, *_: (v, m)),
            jax.ShapeDtypeStruct((vocab, count), dtype),
        ),
    }
    out_specs, out_shape = zip(*(kinds[kind](detail) for kind, detail in results), strict=True)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(pl.cdiv(count, block_tokens), pl.cdiv(vocab, block_vocab)),
            in_specs=[
                *(pl.BlockSpec((block_tokens, x.shape[1]), lambda m, v, *_: (m, 0)) for x in tokens),
                *(pl.BlockSpec((block_vocab, x.shape[1]), lambda m, v, *_: (v, 0)) for x in entries),
                *(rows_spec(x.shape[0]) for x in rows),
            ],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        name=getattr(kernel, "func", kernel).__name__.strip("_"),
    )(*tables, *tokens, *entries, *rows)


def _sizes(operands: tuple[Array, ...]) -> tuple[int, int]:
    """Tokens and entries of a tile: multiples of the lanes that share the vocabulary and the tokens out evenly."""
    tokens, entries = (operands[i * len(operands) // 2].shape[0] for i in (0, 1))
    # Of float32 a product makes bfloat16 pieces, which take as much again.
    row_bytes = sum(x.shape[1] * (8 if x.dtype == jnp.float32 else 2) for x in operands[: len(operands) // 2])
    return (
        _even_block(tokens, min(_BLOCK_TOKENS, _TOKEN_BYTES // row_bytes)),
        _even_block(entries, min(_BLOCK_VOCAB, _VOCAB_BLOCK_BYTES // row_bytes)),
    )


def _even_block(size: int, most: int) -> int:
    """A multiple of the lanes, at most `most` if that is one, which cuts `size` evenly."""
    most = max(_LANES, most // _LANES * _LANES)
    return pl.cdiv(pl.cdiv(size, pl.cdiv(size, most)), _LANES) * _LANES
