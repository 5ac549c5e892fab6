"""What a teacher says about the next token at each position: the one schema between teachers, stores and losses.

Every target is stored at the predicting position t and is about the token at t + 1. Log-probabilities are the
teacher's own over its whole vocabulary, never renormalised over what was kept, so the mass that was left out is known
and counts as one more bucket.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_kl import split_at_ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """The teacher's J most likely tokens, most likely first."""

    ids: Int[Array, "*batch J"]
    logprobs: Float[Array, "*batch J"]
    log_tail: Float[Array, "*batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AtIds:
    """Log-probabilities at tokens that somebody asked for, without duplicates; id -1, log-probability -inf: absent."""

    ids: Int[Array, "*batch J"]
    logprobs: Float[Array, "*batch J"]
    log_tail: Float[Array, "*batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hidden:
    """The teacher's final hidden states, exact over the whole vocabulary together with its head [V, D]."""

    hidden: Float[Array, "*batch D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """Tokens sampled from the teacher, for small stores: unlike `TopK`, right on average about its whole vocabulary.

    Of N samples from p, the share of each sampled token stands for its probability. That is a distribution p̂ with
    E[p̂] = p, so the gradient of the forward KL from it, q - p̂, is on average that from p; the k most likely tokens
    alone, however their tail is counted, leave the student nothing to learn the tail from. Random sampling knowledge
    distillation (arXiv 2503.16870), at proposal temperature 1, where all importance weights are 1."""

    ids: Int[Array, "*batch N"]
    """The sampled tokens, without duplicates; id -1, share -inf: absent."""
    log_shares: Float[Array, "*batch N"]
    entropy: Float[Array, "*batch"]
    """The teacher's own, over its whole vocabulary, in nats: with it the divergence too is right on average."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Following:
    """What the teacher says about the token that did follow, where there is one."""

    logprobs: Float[Array, "*batch"]
    """-inf where none follows."""
    ranks: Int[Array, "*batch"]
    """Tokens at least as likely as it, itself included: 1 for the likeliest; 0 where none follows."""


Targets = TopK | AtIds | Hidden | Sampled

BLOCK_TOKENS = 128
"""Tokens whose logits [tokens, V] are held at a time while targets are made; on a mesh, of every share of them."""


def following_tokens(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """At each position the token that follows; -1 at the last one, which nothing follows."""
    return jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], -1)], axis=1).astype(jnp.int32)


def one_hot(tokens: Int[Array, "B T"]) -> AtIds:
    """The data itself as a teacher, certain of the token that follows; the forward KL to it is the cross-entropy.

    The last position, which nothing follows, has no entry and all its mass in the tail: mask it.
    """
    following = following_tokens(tokens)
    known = following >= 0
    return AtIds(
        ids=following[..., None],
        logprobs=jnp.where(known, 0.0, -jnp.inf).astype(jnp.float32)[..., None],
        log_tail=jnp.where(known, -jnp.inf, 0.0).astype(jnp.float32),
    )


def top_k_targets(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], k: int, *, block_tokens: int = BLOCK_TOKENS
) -> TopK:
    """The k most likely tokens of softmax(hidden · headᵀ) and the exact log-mass of all others.

    Memory: about 2 · block_tokens · V · 4 bytes beside the result. Raises ValueError for k outside [1, V].
    """
    if not 1 <= k <= head.shape[0]:
        raise ValueError(f"k {k} must lie between 1 and the vocabulary's {head.shape[0]} tokens")

    def block(logits, start):
        del start
        ids = lax.top_k(logits, k)[1].astype(jnp.int32)
        return ids, *_logprobs_at(logits, ids)

    ids, logprobs, log_tail = _by_token_blocks(hidden, head, block, block_tokens)
    return TopK(ids=ids, logprobs=logprobs, log_tail=log_tail)


def top_k_and_following(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    k: int,
    following: Int[Array, "B T"],
    *,
    block_tokens: int = BLOCK_TOKENS,
) -> tuple[TopK, Following]:
    """`top_k_targets`, and what is said about the tokens `following`, -1 where none follows, from the same logits."""

    def block(logits, start):
        ids = lax.top_k(logits, k)[1].astype(jnp.int32)
        logprobs, log_tail = _logprobs_at(logits, ids)
        chosen = lax.dynamic_slice_in_dim(following, start, logits.shape[1], 1)[..., None]
        at_chosen = jnp.take_along_axis(logits, jnp.maximum(chosen, 0), -1)
        ranks = jnp.sum(logits >= at_chosen, axis=-1, dtype=jnp.int32)
        known = chosen[..., 0] >= 0
        # The likeliest token's logit and log-probability give the normaliser.
        lse = jnp.max(logits, axis=-1) - logprobs[..., 0]
        of_chosen = jnp.where(known, at_chosen[..., 0] - lse, -jnp.inf)
        return ids, logprobs, log_tail, of_chosen, jnp.where(known, ranks, 0)

    ids, logprobs, log_tail, of_chosen, ranks = _by_token_blocks(hidden, head, block, block_tokens)
    return TopK(ids=ids, logprobs=logprobs, log_tail=log_tail), Following(logprobs=of_chosen, ranks=ranks)


def at_ids_targets(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "B T J"],
    *,
    top_k: int = 0,
    block_tokens: int = BLOCK_TOKENS,
) -> AtIds:
    """The teacher's log-probabilities at `ids` and at its own `top_k` likeliest tokens, which come after them, and the
    exact log-mass of all other tokens.

    Repeated ids and ids below 0 become absent entries. Memory as `top_k_targets`.
    """

    def block(logits, start):
        named = lax.dynamic_slice_in_dim(ids, start, logits.shape[1], 1).astype(jnp.int32)
        if top_k:
            named = jnp.concatenate((named, lax.top_k(logits, top_k)[1].astype(jnp.int32)), axis=-1)
        named = unique_ids(named)
        return named, *_logprobs_at(logits, named)

    named, logprobs, log_tail = _by_token_blocks(hidden, head, block, block_tokens)
    return AtIds(ids=named, logprobs=logprobs, log_tail=log_tail)


def sampled_targets(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    sampled_tokens: int,
    key: Array,
    *,
    block_tokens: int = BLOCK_TOKENS,
) -> Sampled:
    """`sampled_tokens` tokens of softmax(hidden · headᵀ) at every position, with replacement, and its exact entropy.

    Memory as `top_k_targets`. Raises ValueError for sampled_tokens below 1.
    """
    if sampled_tokens < 1:
        raise ValueError(f"sampled_tokens {sampled_tokens} must be at least 1")
    uniform = jax.random.uniform(key, (*hidden.shape[:2], sampled_tokens))
    return sampled_by_uniform(hidden, head, uniform, block_tokens=block_tokens)


def sampled_by_uniform(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    uniform: Float[Array, "B T N"],
    *,
    block_tokens: int = BLOCK_TOKENS,
) -> Sampled:
    """`sampled_targets` of as many tokens as a position has numbers in [0, 1), each of which decides one; a negative
    number stands for none."""
    wanted = uniform >= 0
    sampled_tokens = jnp.maximum(jnp.sum(wanted, axis=-1, keepdims=True), 1)

    def block(logits, start):
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=logits.shape[1], axis=1)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        probabilities = jnp.exp(logprobs)
        reached = jnp.cumsum(probabilities, axis=-1)
        # A token of no mass has nothing between what is reached before it and at it, so none is ever sampled.
        points = part(uniform) * reached[..., -1:]
        search = jnp.vectorize(functools.partial(jnp.searchsorted, side="right"), signature="(v),(n)->(n)")
        drawn = jnp.where(part(wanted), jnp.minimum(search(reached, points), logits.shape[-1] - 1), -1)
        ids = unique_ids(drawn)
        times = jnp.sum(ids[..., :, None] == drawn[..., None, :], axis=-1)
        log_shares = jnp.where(ids < 0, -jnp.inf, jnp.log(jnp.maximum(times, 1) / part(sampled_tokens)))
        return ids, log_shares, -jnp.sum(probabilities * jnp.where(probabilities > 0, logprobs, 0), axis=-1)

    ids, log_shares, entropy = _by_token_blocks(hidden, head, block, block_tokens)
    return Sampled(ids=ids, log_shares=log_shares, entropy=entropy)


def unique_ids(ids: Int[Array, "*batch J"]) -> Int[Array, "*batch J"]:
    """`ids` as int32 with every repetition of an earlier entry, and every negative id, set to -1."""
    ids = jnp.maximum(ids, -1).astype(jnp.int32)
    order = jnp.argsort(ids, axis=-1, stable=True)
    ordered = jnp.take_along_axis(ids, order, -1)
    repeats = jnp.concatenate([jnp.zeros_like(ordered[..., :1], bool), ordered[..., 1:] == ordered[..., :-1]], axis=-1)
    return jnp.where(jnp.take_along_axis(repeats, jnp.argsort(order, axis=-1), -1), -1, ids)


def _logprobs_at(logits: Float[Array, "B T V"], ids: Int[Array, "B T J"]) -> tuple[Array, Array]:
    chosen, rest = split_at_ids(logits, ids)
    rest_lse = jax.nn.logsumexp(rest, axis=-1)
    lse = jnp.logaddexp(rest_lse, jax.nn.logsumexp(chosen, axis=-1))
    return chosen - lse[..., None], rest_lse - lse


def _by_token_blocks(hidden: Array, head: Array, block: Callable, block_tokens: int) -> tuple[Array, ...]:
    """Run `block(logits, start)` along T, so that B keeps its sharding; the last block overlaps its predecessor."""
    batch, length = hidden.shape[:2]
    size = max(1, min(length, block_tokens // batch))

    def run(start):
        part = lax.dynamic_slice_in_dim(hidden, start, size, 1)
        return block(jnp.einsum("BTD,VD->BTV", part, head, preferred_element_type=jnp.float32), start)

    def body(index, found):
        start = jnp.minimum(index * size, length - size)
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, 1)
            for whole, part in zip(found, run(start), strict=True)
        )

    found = tuple(
        jnp.zeros((batch, length, *part.shape[2:]), part.dtype)
        for part in jax.eval_shape(run, jnp.zeros((), jnp.int32))
    )
    return lax.fori_loop(0, -(-length // size), body, found)
