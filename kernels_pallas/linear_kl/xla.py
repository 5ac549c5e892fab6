"""The divergence by blocks of tokens and of vocabulary in plain XLA, so that [tokens, V] never exists.

The CPU's default and every platform's fallback by name. Tokens are taken in blocks along T, so a batch that is sharded
over B stays where it is. Inside a block of tokens the vocabulary is read up to three times: for the log-sum-exp, for
the sums over words, and for the gradients, which are formed here and now because the loss is a weighted sum. A block
of vocabulary that covers V is multiplied out once and kept for all three; smaller ones are multiplied out again.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.linear_kl.divergence import Divergence, contribution_and_slope

Stats = dict[str, Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """Derivatives of the weighted sum: by the student's hidden states, and by its head."""

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mass:
    """What exponentials of logits add up to, scaled by the largest so that nothing overflows; parts can be merged.

    `total` is Σ exp(z - top) and `moment` Σ exp(z - top)·(z - top), which is all that the entropy needs.
    """

    top: Float[Array, "B T"]
    total: Float[Array, "B T"]
    moment: Float[Array, "B T"]

    @classmethod
    def of(cls, logits: Float[Array, "B T V"]) -> "Mass":
        top = logits.max(-1)
        below = jnp.maximum(logits - _finite(top)[..., None], jnp.finfo(logits.dtype).min)
        total, moment = _sums(jnp.exp(below), jnp.exp(below) * below)
        return cls(top=top, total=total, moment=moment)

    @classmethod
    def nothing(cls, shape: tuple[int, ...], dtype) -> "Mass":
        zero = jnp.zeros(shape, dtype)
        return cls(top=jnp.full(shape, -jnp.inf, dtype), total=zero, moment=zero)

    def merge(self, other: "Mass") -> "Mass":
        top = jnp.maximum(self.top, other.top)
        ours, theirs = (jnp.maximum(part - _finite(top), jnp.finfo(top.dtype).min) for part in (self.top, other.top))
        return Mass(
            top=top,
            total=jnp.exp(ours) * self.total + jnp.exp(theirs) * other.total,
            moment=jnp.exp(ours) * (self.moment + ours * self.total)
            + jnp.exp(theirs) * (other.moment + theirs * other.total),
        )

    def log(self) -> Float[Array, "B T"]:
        return jnp.log(self.total) + _finite(self.top)

    def entropy(self) -> Float[Array, "B T"]:
        """In nats, of the distribution that the logits stand for."""
        return jnp.log(self.total) - self.moment / self.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Equal blocks of an axis. The last one is moved back to end with the axis, so nothing is padded or copied;
    what it shares with its predecessor is not `fresh` and must not be counted again."""

    size: int
    block: int

    @property
    def count(self) -> int:
        return -(-self.size // self.block)

    def start(self, index: Int[Array, ""] | int) -> Int[Array, ""] | int:
        return (
            index * self.block
            if self.size % self.block == 0
            else jnp.minimum(index * self.block, self.size - self.block)
        )

    def fresh(self, index: Int[Array, ""] | int) -> Bool[Array, " block"]:
        return self.start(index) + jnp.arange(self.block) >= index * self.block

    def slice(self, array: Array, index: Int[Array, ""] | int, axis: int) -> Array:
        return array if self.count == 1 else lax.dynamic_slice_in_dim(array, self.start(index), self.block, axis)

    def add(self, array: Array, update: Array, index: Int[Array, ""] | int, axis: int) -> Array:
        if self.count == 1:
            return array + update.astype(array.dtype)
        total = self.slice(array, index, axis) + update.astype(array.dtype)
        return lax.dynamic_update_slice_in_dim(array, total, self.start(index), axis)

    def loop(self, body: Callable, carry):
        return body(0, carry) if self.count == 1 else lax.fori_loop(0, self.count, body, carry)


def full(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "B T Dt"],
    teacher_head: Float[Array, "V Dt"],
    weights: Float[Array, "B T"],
    *,
    divergence: Divergence,
    positions: Blocks,
    vocab: Blocks,
    with_gradients: bool,
) -> tuple[Float[Array, ""], Stats, Gradients | None]:
    """Every word is a bucket. Arguments and results as in `api.linear_kl_full`."""

    def block(index, live, weight):
        h = jnp.where(live[..., None], positions.slice(hidden, index, 1), 0)
        th = jnp.where(live[..., None], positions.slice(teacher_hidden, index, 1), 0)
        student, teacher = _logits(h, head, vocab), _logits(th, teacher_head, vocab)
        dtype = _accumulator(hidden)

        def survey(i, carry):
            student_mass, teacher_mass, student_at_top = carry
            zs, zt = student(i), teacher(i)
            top = zt.max(-1)
            at_top = jnp.where(zt == top[..., None], zs, -jnp.inf).max(-1)
            at_top = jnp.maximum(
                jnp.where(teacher_mass.top >= top, student_at_top, -jnp.inf),
                jnp.where(top >= teacher_mass.top, at_top, -jnp.inf),
            )
            return student_mass.merge(Mass.of(zs)), teacher_mass.merge(Mass.of(zt)), at_top

        nothing = Mass.nothing(live.shape, dtype)
        student_mass, teacher_mass, student_at_top = vocab.loop(survey, (nothing, nothing, nothing.top))
        student_lse, teacher_lse = student_mass.log(), teacher_mass.log()

        def logprobs(i):
            return teacher(i) - teacher_lse[..., None], student(i) - student_lse[..., None]

        def add_up(i, carry):
            parts = _sums(*contribution_and_slope(divergence, *logprobs(i)))
            return tuple(a + b for a, b in zip(carry, parts, strict=True))

        value, slope_sum = vocab.loop(add_up, (jnp.zeros(live.shape, dtype),) * 2)
        stats = {
            "divergence": value,
            "student_entropy": student_mass.entropy(),
            "teacher_entropy": teacher_mass.entropy(),
            "top1_agreement": (student_at_top >= student_mass.top).astype(dtype),
        }

        def logit_gradient(i):
            lp, lq = logprobs(i)
            slope = contribution_and_slope(divergence, lp, lq)[1]
            return weight[..., None] * (slope - jnp.exp(lq) * slope_sum[..., None])

        return h, stats, logit_gradient

    return _over_positions(block, hidden, head, weights, positions, vocab, with_gradients)


def at_ids(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "B T J"],
    teacher_logprobs: Float[Array, "B T J"],
    teacher_log_tail: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    divergence: Divergence,
    positions: Blocks,
    vocab: Blocks,
    with_gradients: bool,
) -> tuple[Float[Array, ""], Stats, Gradients | None]:
    """The named words and everything else are J + 1 buckets. Arguments and results as in `api.linear_kl_at_ids`."""

    def block(index, live, weight):
        dtype = _accumulator(hidden)
        h = jnp.where(live[..., None], positions.slice(hidden, index, 1), 0)
        named = jnp.where(live[..., None], positions.slice(ids, index, 1), -1)
        present = named >= 0
        lp = jnp.where(present, positions.slice(teacher_logprobs, index, 1).astype(dtype), -jnp.inf)
        lp_tail = jnp.where(live, positions.slice(teacher_log_tail, index, 1).astype(dtype), 0)
        logits = _logits(h, head, vocab)

        def split(i):
            return split_at_ids(logits(i), _local(named, vocab, i))

        def survey(i, carry):
            chosen, rest_mass = carry
            here, rest = split(i)
            return jnp.maximum(chosen, here), rest_mass.merge(Mass.of(rest))

        nothing = Mass.nothing(live.shape, dtype)
        chosen, rest_mass = vocab.loop(survey, (jnp.full(named.shape, -jnp.inf, dtype), nothing))
        student_mass = rest_mass.merge(Mass.of(chosen))
        lse, rest_lse = student_mass.log(), rest_mass.log()
        lq, lq_tail = chosen - lse[..., None], rest_lse - lse

        values, slopes = contribution_and_slope(
            divergence, jnp.concatenate([lp, lp_tail[..., None]], -1), jnp.concatenate([lq, lq_tail[..., None]], -1)
        )
        slope_sum = slopes.sum(-1)
        teacher_top = lp.max(-1, keepdims=True)
        student_at_top = jnp.where(present & (lp == teacher_top), chosen, -jnp.inf).max(-1)
        stats = {
            "divergence": values.sum(-1),
            "student_entropy": student_mass.entropy(),
            "teacher_entropy": Mass.of(jnp.concatenate([lp, lp_tail[..., None]], -1)).entropy(),
            "top1_agreement": (student_at_top >= student_mass.top).astype(dtype),
            "teacher_tail_mass": jnp.exp(lp_tail),
            "student_support_mass": jnp.exp(lq).sum(-1),
        }
        # Inside the tail the student's words share its gradient in proportion to their mass, so the tail's own
        # share is taken with the log-sum-exp of the rest, which stays exact when the tail's mass underflows.
        tail_gradient = weight * (slopes[..., -1] - jnp.exp(lq_tail) * slope_sum)
        named_gradient = weight[..., None] * (slopes[..., :-1] - jnp.exp(lq) * slope_sum[..., None])

        def logit_gradient(i):
            rest = split(i)[1]
            spread = tail_gradient[..., None] * jnp.exp(rest - _finite(rest_lse)[..., None])
            return _put(spread, _local(named, vocab, i), named_gradient)

        return h, stats, logit_gradient

    return _over_positions(block, hidden, head, weights, positions, vocab, with_gradients)


def split_at_ids(
    logits: Float[Array, "B T V"], ids: Int[Array, "B T J"]
) -> tuple[Float[Array, "B T J"], Float[Array, "B T V"]]:
    """The logits at `ids` (-inf where an id is -1), and the logits with those ids set to -inf."""
    chosen = jax.vmap(jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=-jnp.inf)))(
        logits, _drop_negative(ids, logits.shape[-1])
    )
    return chosen, _put(logits, ids, jnp.full(ids.shape, -jnp.inf, logits.dtype))


def _put(array: Array, ids: Array, values: Array) -> Array:
    at = _drop_negative(ids, array.shape[-1])
    return jax.vmap(jax.vmap(lambda row, i, value: row.at[i].set(value, mode="drop")))(array, at, values)


def _drop_negative(ids: Array, size: int) -> Array:
    """jnp reads -1 as the last element; an index past the end is what it drops and fills."""
    return jnp.where(ids < 0, size, ids)


def _local(ids: Array, vocab: Blocks, index) -> Array:
    """Ids counted from the start of a vocabulary block, -1 where the block does not own them."""
    if vocab.count == 1:
        return ids
    return jnp.where(ids // vocab.block == index, ids - vocab.start(index), -1)


def _over_positions(block, hidden, head, weights, positions: Blocks, vocab: Blocks, with_gradients: bool):
    """Run `block(index, live, weight) -> (hidden, stats, logit_gradient(i))` over T and add up what it finds."""
    dtype = _accumulator(hidden)

    def run(index, gradients):
        weight = jnp.where(positions.fresh(index), positions.slice(weights, index, 1), 0).astype(dtype)
        live = weight != 0
        h, stats, logit_gradient = block(index, live, weight)
        if with_gradients:
            gradients = _add_gradients(gradients, h, head, logit_gradient, index, positions, vocab)
        return {name: jnp.where(live, value, 0) for name, value in stats.items()}, gradients

    def body(index, carry):
        stats, gradients = carry
        found, gradients = run(index, gradients)
        return {name: positions.add(stats[name], value, index, 1) for name, value in found.items()}, gradients

    gradients = (jnp.zeros_like(hidden), jnp.zeros(head.shape, dtype)) if with_gradients else None
    names = jax.eval_shape(lambda: run(0, gradients)[0])
    stats, gradients = positions.loop(body, ({name: jnp.zeros(weights.shape, dtype) for name in names}, gradients))
    # A weight of 0 is a position without a divergence, and the stats hold 0 there.
    loss = (weights.astype(dtype) * stats["divergence"]).sum()
    if gradients is None:
        return loss, stats, None
    return loss, stats, Gradients(hidden=gradients[0], head=gradients[1].astype(head.dtype))


def _add_gradients(gradients, h, head, logit_gradient, index, positions: Blocks, vocab: Blocks):
    dtype = _accumulator(h)

    def body(i, carry):
        by_hidden, by_head = carry
        # The operands of both products in the model's own dtype, as matrix units want them; sums in float32.
        dz = logit_gradient(i).astype(h.dtype)
        rows = vocab.slice(head, i, 0)
        by_hidden += jnp.einsum("BTV,VD->BTD", dz, rows, preferred_element_type=dtype)
        by_head = vocab.add(by_head, jnp.einsum("BTV,BTD->VD", dz, h, preferred_element_type=dtype), i, 0)
        return by_hidden, by_head

    by_hidden, by_head = vocab.loop(body, (jnp.zeros(h.shape, dtype), gradients[1]))
    return positions.add(gradients[0], by_hidden, index, 1), by_head


def _logits(hidden: Array, head: Array, vocab: Blocks) -> Callable[[Int[Array, ""] | int], Float[Array, "B T V"]]:
    """A reader of one vocabulary block of logits; -inf at words that an earlier block has already counted."""

    def multiply(i):
        z = jnp.einsum("BTD,VD->BTV", hidden, vocab.slice(head, i, 0), preferred_element_type=_accumulator(hidden))
        return z if vocab.size % vocab.block == 0 else jnp.where(vocab.fresh(i), z, -jnp.inf)

    if vocab.count > 1:
        return multiply
    whole = multiply(0)
    return lambda i: whole


def _sums(*terms: Array) -> tuple[Array, ...]:
    """Sums over the last axis in a single pass: one reduction reads its operands once, where XLA's CPU compiler
    would otherwise compute the exponentials again for each."""
    zero = jnp.zeros((), terms[0].dtype)

    def combine(a, b):
        return tuple(x + y for x, y in zip(a, b, strict=True))

    return tuple(lax.reduce(terms, (zero,) * len(terms), combine, dimensions=(terms[0].ndim - 1,)))


def _finite(x: Array) -> Array:
    """-inf as 0, so that exp(-inf - x) is 0 instead of NaN where nothing has any mass."""
    return jnp.where(x == -jnp.inf, 0, x)


def _accumulator(x: Array):
    return jnp.promote_types(x.dtype, jnp.float32)
