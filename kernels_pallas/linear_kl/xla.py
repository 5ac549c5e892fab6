"""The divergence by blocks of tokens and of vocabulary in plain XLA, so that [tokens, V] never exists.

The CPU's default. Tokens are taken in blocks along T, so a batch that is sharded over B stays where it is. For a
block of tokens each logit is multiplied out once and kept until the block is done. The vocabulary is then walked in
blocks small enough for the cache: to find the log-sum-exp, to add up the slopes where the divergence needs that, and
to add up the divergence and form the gradients, which can be done here and now because the loss is a weighted sum.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from kernels_pallas.linear_kl.divergence import Divergence, contribution_and_slope
from kernels_pallas.linear_kl.mass import Mass, Survey, finite
from kernels_pallas.linear_kl.sure import Sure, gradient_over_buckets, relative_slopes

Stats = dict[str, Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """Derivatives of the weighted sum: by the student's hidden states, and by its head."""

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V D"]


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

    def tokens(self, array: Shaped[Array, "B T ..."], index: Int[Array, ""] | int) -> Shaped[Array, "M ..."]:
        """The block's tokens as one axis, which elementwise work on CPU likes better than two short ones."""
        part = self.slice(array, index, 1)
        return part.reshape(-1, *part.shape[2:])

    def entries(self, logits: Float[Array, "V M"], index: Int[Array, ""] | int) -> Float[Array, "block M"]:
        """A block of logits, each entry in one block only."""
        return self.counted(self.slice(logits, index, 0), index)

    def counted(self, block: Float[Array, "block M"], index: Int[Array, ""] | int) -> Float[Array, "block M"]:
        """-inf at the entries of a block that an earlier block has already counted."""
        return block if self.size % self.block == 0 else jnp.where(self.fresh(index)[:, None], block, -jnp.inf)

    def add(self, array: Array, update: Array, index: Int[Array, ""] | int, axis: int) -> Array:
        if self.count == 1:
            return array + update.astype(array.dtype)
        total = self.slice(array, index, axis) + update.astype(array.dtype)
        return lax.dynamic_update_slice_in_dim(array, total, self.start(index), axis)

    def scan(self, body: Callable, carry, blocks=None):
        """`lax.scan` over (index, blocks), without a loop where one block is all there is."""
        if self.count > 1:
            return lax.scan(body, carry, (jnp.arange(self.count), blocks))
        carry, out = body(carry, (0, jax.tree.map(lambda block: block[0], blocks)))
        return carry, jax.tree.map(lambda block: block[None], out)


def full(
    hidden, head, teacher_hidden, teacher_head, weights, *, divergence, positions: Blocks, vocab: Blocks, vocab_axis,
    with_gradients,
) -> tuple[Array, Stats, Gradients | None]:  # fmt: skip
    """Every entry is a bucket. Arguments and results as in `api.linear_kl_full`, and the gradients if asked for."""

    def block(index, live, weight, by_head):
        h = jnp.where(live[:, None], positions.tokens(hidden, index), 0)
        th = jnp.where(live[:, None], positions.tokens(teacher_hidden, index), 0)

        # One product each, over all entries: for products of their own, blocks of a head would have to be copied.
        logits = logits_of(h, head), logits_of(th, teacher_head)

        def survey(found, step):
            return found.with_block(*(vocab.entries(z, step[0]) for z in logits)), None

        found = Survey.nothing(live.shape, accumulator(hidden))
        found = vocab.scan(survey, found)[0].over(vocab_axis)
        sure = Sure.of(divergence, found)

        def logprobs(index):
            zs, zt = (vocab.entries(z, index) for z in logits)
            return found.teacher.logprobs(zt), found.student.logprobs(zs)

        def add_slopes(slope_sum, step):
            lp, lq = logprobs(step[0])
            slope = contribution_and_slope(divergence, lp, lq)[1]
            return slope_sum + relative_slopes(slope, lq, sure.cut, sure.centre).sum(0), None

        slope_sum = jnp.zeros_like(sure.centre)
        if with_gradients and not divergence.slopes_cancel:
            slope_sum = summed(vocab.scan(add_slopes, slope_sum)[0], vocab_axis)

        def finish(carry, step):
            value_sum, gradients = carry
            i, _ = step
            lp, lq = logprobs(i)
            value, slope = contribution_and_slope(divergence, lp, lq)
            if with_gradients:
                relative = relative_slopes(slope, lq, sure.cut, sure.centre)
                dz = weight * (relative - jnp.exp(lq) * slope_sum)
                gradients = add_products(gradients, dz, h, head, vocab, i)
            return (value_sum + value.sum(0), gradients), None

        start = (jnp.zeros_like(slope_sum), _products_start(h, by_head))
        (value, gradients), _ = vocab.scan(finish, start)
        stats = {
            "divergence": summed(value, vocab_axis),
            "student_entropy": found.student.entropy(),
            "teacher_entropy": found.teacher.entropy(),
            "top1_agreement": found.agreement,
        }
        return stats, gradients

    return _over_positions(block, hidden, head, weights, positions, with_gradients)


def at_ids(
    hidden, head, ids, teacher_logprobs, teacher_log_tail, weights, *, divergence, positions: Blocks, vocab: Blocks,
    vocab_axis, with_gradients,
) -> tuple[Array, Stats, Gradients | None]:  # fmt: skip
    """The named entries and everything else are J + 1 buckets. Arguments and results as in `api.linear_kl_at_ids`, and
    the gradients if asked for."""

    def block(index, live, weight, by_head):
        dtype = accumulator(hidden)
        h = jnp.where(live[:, None], positions.tokens(hidden, index), 0)
        named = jnp.where(live[:, None], positions.tokens(ids, index), -1)
        lp = jnp.where(named < 0, -jnp.inf, positions.tokens(teacher_logprobs, index).astype(dtype))
        lp_tail = jnp.where(live, positions.tokens(teacher_log_tail, index).astype(dtype), 0)
        lp = jnp.concatenate([lp, lp_tail[..., None]], -1)
        own = own_ids(named, len(head), vocab_axis)

        def survey(carry, step):
            chosen, rest_mass = carry
            logits = vocab.counted(logits_of(h, vocab.slice(head, step[0], 0)), step[0]).T
            here, rest = split_at_ids(logits, local_ids(own, vocab, step[0]))
            return (jnp.maximum(chosen, here), rest_mass.merge(Mass.of(rest, -1))), rest

        nothing = (jnp.full(named.shape, -jnp.inf, dtype), Mass.nothing(live.shape, dtype))
        (chosen, rest_mass), rest_logits = vocab.scan(survey, nothing)
        chosen, rest_mass = largest(chosen, vocab_axis), rest_mass.over(vocab_axis)
        gradient, stats = over_buckets(divergence, named, lp, chosen, rest_mass, weight)
        rest_lse = rest_mass.log()

        def finish(gradients, step):
            i, rest = step
            # Unnamed entries share the tail's gradient by their part of the tail. Dividing by the tail's own mass,
            # not by the whole vocabulary's, stays exact where that mass underflows.
            dz = gradient[..., -1:] * jnp.exp(rest - finite(rest_lse)[..., None])
            dz = _put(dz, local_ids(own, vocab, i), gradient[..., :-1])
            return add_products(gradients, dz.T, h, head, vocab, i), None

        gradients = _products_start(h, by_head)
        if with_gradients:
            gradients, _ = vocab.scan(finish, gradients, rest_logits)
        return stats, gradients

    return _over_positions(block, hidden, head, weights, positions, with_gradients)


def over_buckets(
    divergence: Divergence,
    ids: Int[Array, "M J"],
    teacher_logprobs: Float[Array, "M J+1"],
    chosen: Float[Array, "M J"],
    rest: Mass,
    weight: Float[Array, " M"],
) -> tuple[Float[Array, "M J+1"], dict[str, Float[Array, " M"]]]:
    """The derivative by the student's log-masses of J entries and of the rest, times `weight`; and the statistics.

    `chosen` are the student's logits at `ids`, `rest` what its others add up to; the teacher's last entry is its tail.
    """
    student_mass, dtype = rest.merge(Mass.of(chosen, -1)), chosen.dtype
    lp, lq = teacher_logprobs, student_mass.logprobs(jnp.concatenate([chosen.T, rest.log()[None]])).T
    value, slope = contribution_and_slope(divergence, lp, lq)
    gradient = weight[..., None] * gradient_over_buckets(slope, lq)
    first = (lp[..., :-1] == lp[..., :-1].max(-1, keepdims=True)) & (ids >= 0)
    return gradient, {
        "divergence": value.sum(-1),
        "student_entropy": student_mass.entropy(),
        "teacher_entropy": Mass.of(lp, -1).entropy(),
        "top1_agreement": (jnp.where(first, chosen, -jnp.inf).max(-1) >= student_mass.top).astype(dtype),
        "teacher_tail_mass": jnp.exp(lp[..., -1]),
        "student_support_mass": jnp.exp(lq[..., :-1]).sum(-1),
    }


def split_at_ids(
    logits: Float[Array, "*batch V"], ids: Int[Array, "*batch J"]
) -> tuple[Float[Array, "*batch J"], Float[Array, "*batch V"]]:
    """The logits at `ids` (-inf where an id is -1), and the logits with those ids set to -inf."""
    take = jnp.vectorize(lambda row, at: row.at[at].get(mode="fill", fill_value=-jnp.inf), signature="(v),(j)->(j)")
    chosen = take(logits, _drop_negative(ids, logits.shape[-1]))
    return chosen, _put(logits, ids, jnp.full(ids.shape, -jnp.inf, logits.dtype))


def _put(array: Array, ids: Array, values: Array) -> Array:
    put = jnp.vectorize(lambda row, at, value: row.at[at].set(value, mode="drop"), signature="(v),(j),(j)->(v)")
    return put(array, _drop_negative(ids, array.shape[-1]), values)


def _drop_negative(ids: Array, size: int) -> Array:
    """jnp reads -1 as the last element; an index past the end is what it drops and fills."""
    return jnp.where(ids < 0, size, ids)


def local_ids(ids: Int[Array, "*batch J"], vocab: Blocks, index) -> Int[Array, "*batch J"]:
    """Ids counted from the start of a vocabulary block, -1 where the block does not own them."""
    if vocab.count == 1:
        return ids
    return jnp.where(ids // vocab.block == index, ids - vocab.start(index), -1)


def own_ids(ids: Int[Array, "*batch J"], entries: int, vocab_axis: str | None) -> Int[Array, "*batch J"]:
    """Ids counted from the first of this device's `entries`, -1 where another device of the axis has the entry."""
    if vocab_axis is None:
        return ids
    device = lax.axis_index(vocab_axis)
    return jnp.where(ids // entries == device, ids - device * entries, -1)


def summed(x: Array, vocab_axis: str | None) -> Array:
    return x if vocab_axis is None else lax.psum(x, vocab_axis)


def largest(x: Array, vocab_axis: str | None) -> Array:
    return x if vocab_axis is None else lax.pmax(x, vocab_axis)


def _over_positions(block, hidden, head, weights, positions: Blocks, with_gradients: bool):
    """Run `block(index, live, weight, by_head) -> (stats, (by_hidden, by_head))` over T and put it together."""
    dtype = accumulator(hidden)

    def run(index, by_head):
        weight = jnp.where(positions.fresh(index), positions.slice(weights, index, 1), 0).astype(dtype)
        tokens = weight.reshape(-1)
        stats, gradients = block(index, tokens != 0, tokens, by_head)
        stats = {name: jnp.where(tokens == 0, 0, value).reshape(weight.shape) for name, value in stats.items()}
        if gradients is not None:
            gradients = gradients[0].reshape(*weight.shape, -1), gradients[1]
        return stats, gradients

    def body(carry, step):
        index, _ = step
        stats, by_hidden, by_head = carry
        found, gradients = run(index, by_head)
        stats = {name: positions.add(stats[name], value, index, 1) for name, value in found.items()}
        if gradients is not None:
            by_hidden, by_head = positions.add(by_hidden, gradients[0], index, 1), gradients[1]
        return (stats, by_hidden, by_head), None

    by_hidden, by_head = (jnp.zeros_like(hidden), jnp.zeros(head.shape, dtype)) if with_gradients else (None, None)
    names = jax.eval_shape(lambda: run(0, by_head)[0])
    start = ({name: jnp.zeros(weights.shape, dtype) for name in names}, by_hidden, by_head)
    (stats, by_hidden, by_head), _ = positions.scan(body, start)
    loss = (weights.astype(dtype) * stats["divergence"]).sum()
    return loss, stats, Gradients(hidden=by_hidden, head=by_head.astype(head.dtype)) if with_gradients else None


def _products_start(hidden: Array, by_head: Array | None):
    return None if by_head is None else (jnp.zeros(hidden.shape, accumulator(hidden)), by_head)


def add_products(gradients, dz: Array, hidden: Array, head: Array, vocab: Blocks, index):
    """Add one vocabulary block's share to the gradients by hidden states and head.

    Both products take their operands in the model's own dtype, as matrix units want them, and sum in float32.
    """
    by_hidden, by_head = gradients
    dz, dtype = dz.astype(hidden.dtype), accumulator(hidden)
    by_hidden += jnp.einsum("VM,VD->MD", dz, vocab.slice(head, index, 0), preferred_element_type=dtype)
    update = jnp.einsum("VM,MD->VD", dz, hidden, preferred_element_type=dtype)
    return by_hidden, vocab.add(by_head, update, index, 0)


def logits_of(hidden: Array, head: Array) -> Float[Array, "V M"]:
    """Entries come first because few tokens meet many entries: on CPU the products with the head are then up to half as
    fast again, and its gradient needs no transposed copy."""
    return jnp.einsum("VD,MD->VM", head, hidden, preferred_element_type=accumulator(hidden))


def accumulator(x: Array):
    return jnp.promote_types(x.dtype, jnp.float32)
