"""Which token a sequence takes next: temperature, top-k, top-p and min-p of every row, without sorting a vocabulary.

A draw inverts the cumulative distribution in two levels, a block of the vocabulary and then a token in it, so it
costs two uniform numbers a row where Gumbel noise costs one for every token of the vocabulary. Rows with top-k only
look at the call's largest k; top-p without top-k finds its threshold by bisection on the bits of the logits."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qwen3.errors import UserError
from qwen3.field_types import Bounds, Count, Natural, NotNegative, Share, check_fields

_BLOCK = 128
_SMALLEST_CANDIDATES = 32
# Logits are divided by the temperature in float32.
_LEAST_TEMPERATURE = 1e-6
_LEAST_SHARE = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one sequence is sampled. Filters apply in the order of transformers: temperature, top-k, top-p, min-p."""

    max_new_tokens: Count
    """Most tokens after the prompt, thinking, forced text, answer and stop token together."""
    temperature: NotNegative = 1.0
    """0 takes the most probable token, whatever the other fields say."""
    top_p: Annotated[float, Bounds(_LEAST_SHARE, 1, "be above 0 and at most 1 (off)")] = 1.0
    """Least probable tokens are dropped as long as the others hold this much probability; 1 keeps all."""
    top_k: Natural = 0
    """Tokens kept, ties going to the smaller id; 0 keeps all."""
    min_p: Share = 0.0
    """Tokens below this share of the most probable one are dropped; 0 keeps all."""
    thinking_budget: Natural | None = None
    """Most tokens of thinking before the stop-thinking text is forced; None for no limit. Thinking mode only."""
    stop_ids: tuple[Natural, ...] | None = None
    """Tokens that end the sequence; None takes those of the engine."""

    def __post_init__(self) -> None:
        check_fields(self, "sampling")
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            raise UserError(
                f"sampling.temperature is {self.temperature}; it must be 0 (greedy) or at least {_LEAST_TEMPERATURE}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def thinking_params(max_new_tokens: int, thinking_budget: int | None = None) -> SamplingParams:
    """What Qwen3's authors recommend for thinking mode (arXiv 2505.09388, section 4.6)."""
    return SamplingParams(
        temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=max_new_tokens, thinking_budget=thinking_budget
    )


def non_thinking_params(max_new_tokens: int) -> SamplingParams:
    """What Qwen3's authors recommend for non-thinking mode (arXiv 2505.09388, section 4.6)."""
    return SamplingParams(temperature=0.7, top_p=0.8, top_k=20, max_new_tokens=max_new_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a compiled sampler must be able to do for the rows of one call; the less, the faster."""

    candidates: int
    """Bound on top-k where a row has one, a power of two; 0 where none has."""
    whole: bool
    """Some row draws from the whole vocabulary."""
    nucleus: bool
    """Some row has top-p without top-k."""
    tempered: bool
    """Some row has another temperature than 1."""
    cut: bool
    """Some row that draws from the whole vocabulary is greedy or has min-p."""
    named: int = 0
    """Likeliest tokens that are told of every position; 0 for none."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> "Plan":
        top_k = max((p.top_k for p in params if not p.greedy), default=0)
        bound = max(_SMALLEST_CANDIDATES, 1 << (top_k - 1).bit_length()) if top_k else 0
        open_rows = [p for p in params if p.greedy or not p.top_k]
        return cls(
            candidates=min(bound, vocab_size),
            whole=bool(open_rows) or not top_k,
            nucleus=any(p.top_p < 1 for p in open_rows if not p.greedy),
            tempered=any(p.temperature not in (0, 1) for p in params),
            cut=any(p.greedy or p.min_p > 0 for p in open_rows),
        )

    @classmethod
    def of_all(cls, top_k: int, vocab_size: int, named: int = 0) -> "Plan":
        """What covers every way to sample whose top_k is at most this, and tells as many likeliest tokens."""
        widest = cls.of([SamplingParams(max_new_tokens=1, top_k=top_k)], vocab_size)
        whole = {"whole": True, "nucleus": True, "tempered": True, "cut": True}
        return cls(candidates=widest.candidates, named=min(named, vocab_size), **whole)

    def covers(self, other: "Plan") -> bool:
        """Whether this can do all that `other` can."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return all(one >= another for one, another in zip(mine, theirs, strict=True))


class RowParams(NamedTuple):
    """`SamplingParams` of a batch as arrays."""

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    top_k: Int[Array, "B"]
    log_min_p: Float[Array, "B"]
    greedy: Bool[Array, "B"]

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> "RowParams":
        """Host arrays. A greedy row keeps what is as probable as the best and then takes the first of it."""

        def column(values: Iterable[float], dtype: DTypeLike) -> Any:
            return np.fromiter(values, dtype)

        return cls(
            temperature=column((1 if p.greedy else p.temperature for p in params), np.float32),
            top_p=column((1 if p.greedy else p.top_p for p in params), np.float32),
            top_k=column((0 if p.greedy else p.top_k for p in params), np.int32),
            log_min_p=column((0 if p.greedy else _log(p.min_p) for p in params), np.float32),
            greedy=column((p.greedy for p in params), bool),
        )


class Chosen(NamedTuple):
    """A token a row, and what the model says about it: log-probabilities in nats, at temperature 1 and untruncated."""

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    top_ids: Int[Array, "B J"]
    """The `Plan.named` likeliest tokens, the likeliest first."""
    top_logprobs: Float[Array, "B J"]


def choose_tokens(logits: Float[Array, "B V"], rows: RowParams, uniforms: Float[Array, "B 2"], plan: Plan) -> Chosen:
    """Draw one token a row from its truncated distribution, given two uniform numbers in [0, 1).

    A token that a filter dropped is never drawn. `plan` must cover `rows` (`Plan.of` over a superset of them).
    """
    uniforms = jnp.where(rows.greedy[:, None], 0, uniforms)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - peak
    # By blocks, as they are drawn: one pass over the vocabulary serves both where nothing is dropped.
    log_total = jnp.log(jnp.sum(jnp.sum(_blocks(jnp.exp(shifted)), axis=-1), axis=-1))
    tokens = _from_whole(shifted, rows, uniforms, plan) if plan.whole else None
    likeliest = max(plan.candidates, plan.named)
    none = shifted[:, :0], jnp.zeros((len(shifted), 0), jnp.int32)
    values, ids = jax.lax.top_k(shifted, likeliest) if likeliest else none
    if plan.candidates:
        short = _from_candidates(values[:, : plan.candidates], ids[:, : plan.candidates], rows, uniforms[:, 1])
        tokens = short if tokens is None else jnp.where(rows.top_k > 0, short, tokens)
    assert tokens is not None
    return Chosen(
        tokens=tokens,
        logprobs=jnp.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0] - log_total,
        top_ids=ids[:, : plan.named],
        top_logprobs=values[:, : plan.named] - log_total[:, None],
    )


def entropies(logits: Float[Array, "B V"]) -> Float[Array, "B"]:
    """Of the distributions under temperature 1 and without truncation, in nats."""
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    return jnp.log(total) - jnp.sum(weights * shifted, axis=-1) / total


def _from_whole(
    shifted: Float[Array, "B V"], rows: RowParams, uniforms: Float[Array, "B 2"], plan: Plan
) -> Int[Array, "B"]:
    """Draw by block, then within the block, among the tokens above every threshold."""
    scaled = shifted / rows.temperature[:, None] if plan.tempered else shifted
    weights = jnp.exp(scaled)
    if plan.cut:
        weights = jnp.where(scaled >= rows.log_min_p[:, None], weights, 0)
    if plan.nucleus:
        weights = jnp.where(_nucleus(scaled, rows.top_p), weights, 0)
    blocks = _blocks(weights)
    block = _draw(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    inner = _draw(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return block * _BLOCK + inner


def _blocks(weights: Float[Array, "B V"]) -> Float[Array, "B b w"]:
    weights = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % _BLOCK)))
    return weights.reshape(weights.shape[0], -1, _BLOCK)


def _from_candidates(
    values: Float[Array, "B c"], ids: Int[Array, "B c"], rows: RowParams, uniform: Float[Array, "B"]
) -> Int[Array, "B"]:
    """Draw among the most probable tokens, which hold every row's top-k."""
    scaled = values / rows.temperature[:, None]
    weights = jnp.where(jnp.arange(values.shape[1]) < rows.top_k[:, None], jnp.exp(scaled), 0)
    mass_above = jnp.cumsum(weights, axis=-1) - weights
    kept = mass_above < rows.top_p[:, None] * jnp.sum(weights, axis=-1, keepdims=True)
    kept &= scaled >= rows.log_min_p[:, None]
    index = _draw(jnp.where(kept, weights, 0), uniform)
    return jnp.take_along_axis(ids, index[:, None], axis=-1)[:, 0]


def _nucleus(scaled: Float[Array, "B V"], top_p: Float[Array, "B"]) -> Bool[Array, "B V"]:
    """The tokens above which less than `top_p` of the mass lies. `scaled` is at most 0, its maximum 0.

    Distances below the maximum are non-negative floats, whose bits order as integers: 31 halvings find the threshold
    exactly.
    """
    weights = jnp.exp(scaled)
    wanted = top_p * jnp.sum(weights, axis=-1)
    distance = jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)

    def halve(i: Int[Array, ""], bound: Int[Array, "B"]) -> Int[Array, "B"]:
        trial = bound | (jnp.int32(1) << (30 - i))
        mass_above = jnp.sum(jnp.where(distance < trial[:, None], weights, 0), axis=-1)
        return jnp.where(mass_above < wanted, trial, bound)

    bound = jax.lax.fori_loop(0, 31, halve, jnp.zeros(scaled.shape[0], jnp.int32))
    return (distance <= bound[:, None]) | (top_p >= 1)[:, None]


def _draw(weights: Float[Array, "B W"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first index whose cumulative weight exceeds `uniform` of the total; never one of weight 0."""
    cumulative = jnp.cumsum(weights, axis=-1)
    index = jnp.arange(weights.shape[-1])
    positive = weights > 0
    reached = positive & (cumulative > uniform[:, None] * cumulative[:, -1:])
    # Rounding in a parallel sum may put every cumulative weight at or below the mark.
    last = jnp.max(jnp.where(positive, index, 0), axis=-1)
    return jnp.minimum(jnp.min(jnp.where(reached, index, weights.shape[-1]), axis=-1), last)


def _log(share: float) -> float:
    return math.log(share) if share else -math.inf
