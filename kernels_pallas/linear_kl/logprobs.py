"""Log-probability of one token and entropy at each position, by blocks of tokens and of vocabulary in plain XLA.

Tokens are taken in blocks along T, as in `xla`. Forward, the logits of a block of tokens are surveyed piece by piece
for their mass and for the logit of the token. Backward they are multiplied out once more and turned, piece by piece,
into derivatives by the logits: the mass says what their exponentials add up to, so one walk is enough.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_kl.mass import Mass
from kernels_pallas.linear_kl.xla import (
    Blocks,
    Gradients,
    accumulator,
    add_products,
    largest,
    local_ids,
    logits_of,
    own_ids,
)


def forward(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "B T"],
    *,
    positions: Blocks,
    vocab: Blocks,
    vocab_axis: str | None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Mass]:
    """Log-probability and entropy, 0 where the id is -1, and the mass [B, T] of all logits at each position."""
    dtype = accumulator(hidden)

    def body(carry, step):
        index, _ = step
        h, named, own = _tokens(hidden, head, ids, positions, vocab_axis, index)

        def survey(found, step):
            mass, chosen = found
            logits = vocab.counted(logits_of(h, vocab.slice(head, step[0], 0)), step[0])
            here = _chosen(logits, local_ids(own, vocab, step[0]))
            return (mass.merge(Mass.of(logits, 0)), jnp.maximum(chosen, here)), None

        nothing = Mass.nothing(named.shape, dtype), jnp.full(named.shape, -jnp.inf, dtype)
        (mass, chosen), _ = vocab.scan(survey, nothing)
        mass, chosen = mass.over(vocab_axis), largest(chosen, vocab_axis)
        live = named >= 0
        results = (
            jnp.where(live, mass.logprobs(jnp.where(live, chosen, 0)), 0),
            jnp.where(live, mass.entropy(), 0),
            mass,
        )
        fresh = jnp.broadcast_to(positions.fresh(index), (hidden.shape[0], positions.block))

        def add(array, value):
            return positions.add(array, jnp.where(fresh, value.reshape(fresh.shape), 0), index, 1)

        return jax.tree.map(add, carry, results), None

    zeros = jnp.zeros(ids.shape, dtype)
    start = zeros, zeros, Mass(top=zeros, total=zeros, moment=zeros)
    return positions.scan(body, start)[0]


def backward(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "B T"],
    entropy: Float[Array, "B T"],
    mass: Mass,
    by_logprob: Float[Array, "B T"],
    by_entropy: Float[Array, "B T"],
    *,
    positions: Blocks,
    vocab: Blocks,
    vocab_axis: str | None,
) -> Gradients:
    """Derivatives of whatever changes by `by_logprob` and `by_entropy` with the two results; over a vocabulary axis,
    what this device's entries add."""
    dtype = accumulator(hidden)

    def body(carry, step):
        index, _ = step
        by_hidden, by_head = carry
        h, named, own = _tokens(hidden, head, ids, positions, vocab_axis, index)
        live = (named >= 0) & jnp.tile(positions.fresh(index), hidden.shape[0])
        up, spread = (
            jnp.where(live, positions.tokens(array, index), 0).astype(dtype) for array in (by_logprob, by_entropy)
        )
        found, held = jax.tree.map(lambda array: positions.tokens(array, index), (mass, entropy))

        def finish(gradients, step):
            i, _ = step
            lp = found.logprobs(vocab.counted(logits_of(h, vocab.slice(head, i, 0)), i))
            p = jnp.exp(lp)
            # An entry that has no probability, or was counted in the block before, changes nothing.
            dz = -p * (up + spread * (jnp.where(p > 0, lp, 0) + held))
            dz = dz + jnp.where(_is(local_ids(own, vocab, i), vocab.block), up, 0)
            return add_products(gradients, dz, h, head, vocab, i), None

        (of_block, by_head), _ = vocab.scan(finish, (jnp.zeros(h.shape, dtype), by_head))
        by_hidden = positions.add(by_hidden, of_block.reshape(hidden.shape[0], -1, h.shape[1]), index, 1)
        return (by_hidden, by_head), None

    start = jnp.zeros_like(hidden), jnp.zeros(head.shape, dtype)
    (by_hidden, by_head), _ = positions.scan(body, start)
    return Gradients(hidden=by_hidden, head=by_head.astype(head.dtype))


def _tokens(hidden, head, ids, positions: Blocks, vocab_axis: str | None, index):
    """A block's hidden states, ids, and ids counted from this device's first entry; -1 where it has none of them."""
    named = positions.tokens(ids, index)
    h = jnp.where((named >= 0)[:, None], positions.tokens(hidden, index), 0)
    return h, named, own_ids(named, len(head), vocab_axis)


def _is(ids: Int[Array, " M"], entries: int) -> Array:
    """[entries, M]: which entry of a block each id is; none where it is -1."""
    return jnp.arange(entries)[:, None] == ids


def _chosen(logits: Float[Array, "V M"], ids: Int[Array, " M"]) -> Float[Array, " M"]:
    """The logit at each id, -inf where it is -1."""
    return jnp.where(_is(ids, len(logits)), logits, -jnp.inf).max(0)
