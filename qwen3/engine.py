"""Writes rollouts: one compiled prefill and one compiled decoding loop for teacher and student alike.

Shapes are fixed by the engine, so a loop of training and sampling never compiles again. A rollout depends only on
the weights and on (seed, policy step, prompt, sample index): every token has a random key of its own.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from qwen3.cache import UNROLL_LAYERS, Cache, grow, layers_of, prefill, step
from qwen3.config import ModelConfig
from qwen3.errors import UserError
from qwen3.model import Layer, Qwen3
from qwen3.rollout import THINKING, Mode, Rollout
from qwen3.sampling import Plan, RowParams, SamplingParams, choose_tokens
from qwen3.sharding import BATCH, batch_sharding, fetch, place

_SEGMENT_TOKENS = 64
_MOST_SEGMENTS = 4
_STOP_WIDTH = 8
_NEVER = np.iinfo(np.int32).max
OnProgress = Callable[[int, int], None]
"""Called with the rollouts and the tokens that were written since the last call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to be written. `prompt_id` and `sample_index` name it and seed its randomness."""

    prompt_ids: Sequence[int]
    prompt_id: str
    sample_index: int
    mode: Mode
    params: SamplingParams


class _Rows(NamedTuple):
    """A batch of requests as arrays; rows without a request have `max_new` 0."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    max_new: Int[Array, "B"]
    budget: Int[Array, "B"]
    stop_ids: Int[Array, "B s"]
    prompt_hash: Int[Array, "B"]
    sample_index: Int[Array, "B"]
    sampling: RowParams


class _Written(NamedTuple):
    """What the loop hands back, step-major so that a step writes one row."""

    tokens: Int[Array, "R B"]
    chosen: Bool[Array, "R B"]
    logprobs: Float[Array, "R B"]
    lengths: Int[Array, "B"]
    finished: Bool[Array, "B"]


class _State(NamedTuple):
    """The decoding loop's carry: `hidden` is of the last token read, and the next one is drawn from it."""

    step: Int[Array, ""]
    hidden: Float[Array, "B D"]
    cache: Cache
    closed: Bool[Array, "B"]
    forced: Int[Array, "B"]
    active: Bool[Array, "B"]
    written: _Written


class Engine:
    """Samples from any weights of one architecture.

    Args:
        config: Architecture of the models that `generate` will be given.
        batch_size: Rows written at once; requests beyond it form further batches.
        max_prompt_tokens: Longest prompt.
        max_new_tokens: Most tokens after the prompt.
        stop_ids: Tokens that end a sequence, unless its own `SamplingParams.stop_ids` say otherwise.
        pad_id: Fills unused places; never seen by the model's attention.
        stop_thinking_ids: The text forced where a thinking budget ends; it must hold `think_end_id`.
        think_end_id: The token that closes thinking, None where the vocabulary has none.
        unroll_layers: Deepest model whose layers are unrolled in the decoding loop; see `qwen3.cache`.

    Raises:
        UserError: A size below 1, a token outside the vocabulary, a stop-thinking text that does not stop thinking.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        pad_id: int,
        stop_thinking_ids: Sequence[int] = (),
        think_end_id: int | None = None,
        unroll_layers: int = UNROLL_LAYERS,
    ):
        sizes = {
            "batch_size": batch_size,
            "max_prompt_tokens": max_prompt_tokens,
            "max_new_tokens": max_new_tokens,
        }
        for field, value in sizes.items():
            if value < 1:
                raise UserError(f"{field} is {value}; it must be at least 1")
        ids = {
            "stop_ids": stop_ids,
            "pad_id": [pad_id],
            "stop_thinking_ids": stop_thinking_ids,
            "think_end_id": [] if think_end_id is None else [think_end_id],
        }
        for field, values in ids.items():
            if bad := [i for i in values if not 0 <= i < config.vocab_size]:
                raise UserError(
                    f"{field} holds {bad[0]}, outside the vocabulary of {config.vocab_size}; use its tokenizer"
                )
        if stop_thinking_ids and think_end_id not in stop_thinking_ids:
            raise UserError(f"stop_thinking_ids lack think_end_id {think_end_id}; thinking would never end")
        self.config = config
        self.batch_size = batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.stop_ids = tuple(stop_ids)
        self.pad_id = pad_id
        self.stop_thinking_ids = tuple(stop_thinking_ids)
        self.think_end_id = think_end_id
        self.unroll = config.num_hidden_layers <= unroll_layers
        self._prefill = jax.jit(prefill, static_argnames="unroll")
        self._decode = jax.jit(self._decode_loop, static_argnames="plan")

    def generate(
        self,
        model: Qwen3,
        requests: Sequence[Request],
        *,
        seed: int,
        policy_step: int,
        on_progress: OnProgress | None = None,
    ) -> list[Rollout]:
        """Write one rollout a request, in their order.

        Args:
            model: Weights, used where they lie; sharded weights spread the rows over the data axes of their mesh.
            requests: Any number of any modes and parameters.
            seed: Seed of the run.
            policy_step: Optimiser step of `model`, part of every random key.
            on_progress: Called after every batch.

        Raises:
            UserError: A request that the engine's sizes cannot hold, naming its prompt.
            ValueError: A model of another architecture, or a seed or step that is no unsigned 32-bit number.
        """
        if model.config != self.config:
            raise ValueError("model.config differs from the engine's; make an engine for each architecture")
        for field, value in (("seed", seed), ("policy_step", policy_step)):
            if not 0 <= value < 2**32:
                raise ValueError(f"{field} is {value}; it must be in 0..{2**32 - 1}")
        for request in requests:
            self._check(request)
        plan = Plan.of([request.params for request in requests], self.config.vocab_size)
        most_stop_ids = max((len(self._stop_ids(request)) for request in requests), default=0)
        stop_width = -(-most_stop_ids // _STOP_WIDTH) * _STOP_WIDTH
        rollouts: list[Rollout] = []
        for first in range(0, len(requests), self.batch_size):
            batch = requests[first : first + self.batch_size]
            rows = _place(self._rows(batch, stop_width), model)
            hidden, cache = self._prefill(model, rows.tokens, rows.lengths, unroll=self.unroll)
            written = self._decode(model, hidden, cache, rows, np.uint32(seed), np.uint32(policy_step), plan=plan)
            done = self._rollouts(batch, fetch(written), policy_step)
            rollouts += done
            if on_progress is not None:
                on_progress(len(done), sum(len(rollout.response) for rollout in done))
        return rollouts

    def _check(self, request: Request) -> None:
        where = f"prompt {request.prompt_id!r}"
        length, new = len(request.prompt_ids), request.params.max_new_tokens
        if not 1 <= length <= self.max_prompt_tokens:
            raise UserError(
                f"{where} has {length} tokens, but max_prompt_tokens is {self.max_prompt_tokens}; "
                "raise that or leave the prompt out"
            )
        if new > self.max_new_tokens:
            raise UserError(
                f"{where} asks for {new} new tokens, but max_new_tokens is {self.max_new_tokens}; raise that"
            )
        if self._budget(request) != _NEVER and not self.stop_thinking_ids:
            raise UserError(
                f"{where} has a thinking budget, but the engine has no stop_thinking_ids; "
                "use a tokenizer with thinking tokens or set thinking_budget to None"
            )

    def _stop_ids(self, request: Request) -> tuple[int, ...]:
        return self.stop_ids if request.params.stop_ids is None else request.params.stop_ids

    def _budget(self, request: Request) -> int:
        budget = request.params.thinking_budget
        return _NEVER if budget is None or request.mode != THINKING else budget

    def _rows(self, requests: Sequence[Request], stop_width: int) -> _Rows:
        batch = self.batch_size
        # Rows without a request draw as the last one does, so that they need nothing of the compiled program.
        params = [request.params for request in requests] + [requests[-1].params] * (batch - len(requests))
        rows: Any = _Rows(
            tokens=_filled((batch, self.max_prompt_tokens), self.pad_id),
            lengths=_filled((batch,), 1),
            max_new=_filled((batch,), 0),
            budget=_filled((batch,), _NEVER),
            stop_ids=_filled((batch, stop_width), -1),
            prompt_hash=_filled((batch,), 0, np.uint32),
            sample_index=_filled((batch,), 0, np.uint32),
            sampling=RowParams.of(params),
        )
        for row, request in enumerate(requests):
            rows.tokens[row, : len(request.prompt_ids)] = request.prompt_ids
            rows.lengths[row] = len(request.prompt_ids)
            rows.max_new[row] = request.params.max_new_tokens
            rows.budget[row] = self._budget(request)
            rows.stop_ids[row, : len(self._stop_ids(request))] = self._stop_ids(request)
            rows.prompt_hash[row] = _hash32(request.prompt_id)
            rows.sample_index[row] = request.sample_index
        return rows

    def _decode_loop(
        self, model: Qwen3, hidden: Array, cache: Cache, rows: _Rows, seed: Array, policy_step: Array, *, plan: Plan
    ) -> _Written:
        """Write until every row is done. The cache grows in a few segments: attention costs what is filled."""
        batch, longest = self.batch_size, self.max_new_tokens
        layers = layers_of(model, unroll=self.unroll)
        keys = _row_keys(seed, policy_step, rows.prompt_hash, rows.sample_index)
        state = _State(
            step=jnp.int32(0),
            hidden=hidden,
            cache=cache,
            closed=rows.budget == _NEVER,
            forced=jnp.zeros(batch, jnp.int32),
            active=rows.max_new > 0,
            written=_Written(
                tokens=jnp.full((longest, batch), self.pad_id, jnp.int32),
                chosen=jnp.zeros((longest, batch), bool),
                logprobs=jnp.zeros((longest, batch), jnp.float32),
                lengths=jnp.zeros(batch, jnp.int32),
                finished=jnp.zeros(batch, bool),
            ),
        )
        write_token = functools.partial(self._write_token, model, layers, rows, keys, plan)
        segments = min(_MOST_SEGMENTS, -(-longest // _SEGMENT_TOKENS))
        for segment in range(segments):
            end = longest * (segment + 1) // segments
            state = state._replace(cache=grow(state.cache, self.max_prompt_tokens + end))
            state = jax.lax.while_loop(functools.partial(_unfinished, end=end), write_token, state)
        return state.written

    def _write_token(
        self, model: Qwen3, layers: tuple[Layer, ...], rows: _Rows, keys: Array, plan: Plan, state: _State
    ) -> _State:
        now, active = state.step, state.active
        positions = rows.lengths + now
        logits = _logits(model, state.hidden)
        sampled, logprobs = choose_tokens(logits, rows.sampling, _uniforms(keys, positions), plan)

        tokens, closed, forced = sampled, state.closed, state.forced
        chosen = active
        if self.stop_thinking_ids:
            text = jnp.asarray(self.stop_thinking_ids, jnp.int32)
            forcing = ~closed & (now >= rows.budget)
            tokens = jnp.where(forcing, text[jnp.minimum(forced, len(text) - 1)], sampled)
            forced = forced + forcing
            closed = closed | (~forcing & (sampled == self.think_end_id)) | (forced == len(text))
            chosen = active & ~forcing
        finished = chosen & jnp.any(tokens[:, None] == rows.stop_ids, axis=-1)
        written = _Written(
            tokens=state.written.tokens.at[now].set(jnp.where(active, tokens, self.pad_id)),
            chosen=state.written.chosen.at[now].set(chosen),
            logprobs=state.written.logprobs.at[now].set(jnp.where(chosen, logprobs, 0)),
            lengths=state.written.lengths + active,
            finished=state.written.finished | finished,
        )
        hidden, cache = step(model, layers, state.cache, tokens, positions, unroll=self.unroll)
        active = active & ~finished & (now + 1 < rows.max_new)
        return _State(now + 1, hidden, cache, closed, forced, active, written)

    def _rollouts(self, requests: Sequence[Request], written: _Written, policy_step: int) -> list[Rollout]:
        rollouts = []
        for row, request in enumerate(requests):
            prompt, count = len(request.prompt_ids), int(written.lengths[row])
            # What is known about the token at index t + 1 is stored at t, the position that predicts it.
            predicting = slice(prompt - 1, prompt + count - 1)
            tokens = np.concatenate((np.asarray(request.prompt_ids, np.int32), written.tokens[:count, row]))
            loss_mask, logprobs = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.float32)
            loss_mask[predicting] = written.chosen[:count, row]
            logprobs[predicting] = written.logprobs[:count, row]
            rollouts.append(
                Rollout(
                    tokens=tokens,
                    prompt_length=prompt,
                    loss_mask=loss_mask,
                    sampler_logprobs=logprobs,
                    mode=request.mode,
                    prompt_id=request.prompt_id,
                    sample_index=request.sample_index,
                    policy_step=policy_step,
                    finished=bool(written.finished[row]),
                )
            )
        return rollouts


def _unfinished(state: _State, *, end: int) -> Bool[Array, ""]:
    return jnp.any(state.active) & (state.step < end)


def _logits(model: Qwen3, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    head = model.head.astype(hidden.dtype)
    by_word = jnp.einsum("VD,BD->VB", head, hidden, preferred_element_type=jnp.float32)
    # With the vocabulary's rows first, the product of a few hidden states is up to twice as fast on CPU. The barriers
    # keep XLA from swapping the operands back, and from sampling over a transposed view.
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(by_word).T)


def _filled(shape: tuple[int, ...], value: int, dtype: Any = np.int32) -> Any:
    """A host array that is to become a device array when the compiled program takes it."""
    return np.full(shape, value, dtype)


def _hash32(prompt_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=4).digest(), "little")


def _row_keys(seed: Array, policy_step: Array, prompt_hash: Int[Array, "B"], sample_index: Int[Array, "B"]) -> Array:
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), policy_step)
    fold = jax.vmap(jax.random.fold_in)
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(base, prompt_hash), sample_index)


def _uniforms(keys: Array, positions: Int[Array, "B"]) -> Float[Array, "B 2"]:
    return jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position), (2,)))(keys, positions)


def _place(rows: _Rows, model: Qwen3) -> _Rows:
    """Spread rows over the data axes of the mesh that holds the weights, where they divide the batch."""
    sharding = model.embed[...].sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh) or sharding.mesh.size == 1:
        return rows
    spread = batch_sharding(sharding.mesh)
    parts = math.prod(sharding.mesh.shape[axis] for axis in BATCH[0])
    return place(rows, spread) if rows.lengths.shape[0] % parts == 0 else rows
