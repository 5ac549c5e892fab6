"""Writes rollouts: one compiled prefill and one compiled decoding loop for teacher and student alike.

Continuous batching over a paged cache: `batch_size` slots write at once, each with pages of its own, and a slot whose
sequence ends takes the next request. Several tokens are written in one dispatch, after which the host looks once.
Shapes are fixed by the engine, so a loop of training and sampling never compiles again. A rollout depends only on
the weights and on (seed, policy step, prompt, sample index): every token has a random key of its own.

What is held beside the weights: the pages, and during a dispatch a copy of the slots' own ones side by side, as long
as the longest sequence by then. A pool smaller than its default therefore saves at most half.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qwen3.cache import Cache, Pages, gather_cache, keep_pages, layers_of, make_pages, prefill, step
from qwen3.config import ModelConfig
from qwen3.errors import UserError
from qwen3.model import UNROLL_LAYERS, Layer, Qwen3
from qwen3.pages import PagePool
from qwen3.rollout import THINKING, Rollout
from qwen3.sampling import Plan, choose_tokens
from qwen3.sharding import BATCH, check_rows, fetch, place, row_shares
from qwen3.slots import Fixed, Prompts, Request, Slots, State, Written

__all__ = ["Engine", "OnProgress", "Request"]

_SEGMENT_TOKENS = 64
_MOST_SEGMENTS = 4
_PREFILL_TOKENS = 256
_STOP_WIDTH = 8
_NEVER = np.iinfo(np.int32).max
OnProgress = Callable[[int, int], None]
"""Called with the rollouts that ended and the tokens in them since the last call."""


class _Loop(NamedTuple):
    """The decoding loop's carry."""

    step: Int[Array, ""]
    state: State
    written: Written


class Engine:
    """Samples from any weights of one architecture.

    Args:
        config: Architecture of the models that `generate` will be given.
        batch_size: Slots, the sequences written at once; requests beyond it wait for one.
        max_prompt_tokens: Longest prompt.
        max_new_tokens: Most tokens after the prompt.
        stop_ids: Tokens that end a sequence, unless its own `SamplingParams.stop_ids` say otherwise.
        pad_id: Fills unused places; never seen by the model's attention.
        stop_thinking_ids: The text forced where a thinking budget ends; it must hold `think_end_id`.
        think_end_id: The token that closes thinking, None where the vocabulary has none.
        unroll_layers: Deepest model whose layers are unrolled in the decoding loop; see `qwen3.cache`.
        page_size: Tokens a page.
        pages: Pages in the pool; None for what `batch_size` sequences of the longest kind need. With fewer, a request
            waits until its prompt and all its `max_new_tokens` fit, less the pages that it shares: none is cut short.
        tokens_per_dispatch: Most tokens that each slot writes before the host looks again. It looks earlier where
            requests wait and an eighth of the slots have ended.

    Raises:
        UserError: A size below 1, a token outside the vocabulary, a stop-thinking text that does not stop thinking,
            pages that the longest sequence does not fit.
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
        page_size: int = 32,
        pages: int | None = None,
        tokens_per_dispatch: int = 256,
    ):
        sizes = {
            "batch_size": batch_size,
            "max_prompt_tokens": max_prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "page_size": page_size,
            "tokens_per_dispatch": tokens_per_dispatch,
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
        self.page_size = page_size
        # The last token that is written is never read.
        self._table_pages = self._pages_for(max_prompt_tokens + max_new_tokens - 1)
        self.pages = batch_size * self._table_pages if pages is None else pages
        self.tokens_per_dispatch = tokens_per_dispatch
        self._check_pages(1)
        self._read = jax.jit(self._read_prompts, static_argnames="mesh", donate_argnames="pages")
        self._decode = jax.jit(self._decode_loop, static_argnames=("plan", "mesh"), donate_argnames="pages")

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
            on_progress: Called whenever rollouts have ended.

        Raises:
            UserError: A request that the engine's sizes cannot hold, naming its prompt; sharded weights over whose
                mesh `batch_size` or `pages` cannot be spread.
            ValueError: A model of another architecture, or a seed or step that is no unsigned 32-bit number.
        """
        if model.config != self.config:
            raise ValueError("model.config differs from the engine's; make an engine for each architecture")
        for field, value in (("seed", seed), ("policy_step", policy_step)):
            if not 0 <= value < 2**32:
                raise ValueError(f"{field} is {value}; it must be in 0..{2**32 - 1}")
        for request in requests:
            self._check(request)
        mesh = _mesh(model)
        if mesh is not None:
            check_rows("batch_size", self.batch_size, mesh)
        shares = row_shares(mesh)
        self._check_pages(shares)
        if not requests:
            return []
        plan = Plan.of([request.params for request in requests], self.config.vocab_size)
        slots = self._slots(requests, shares)
        pages = make_pages(
            self.config,
            model.compute_dtype,
            pages=shares * (self.pages // shares + 1),
            page_size=self.page_size,
            mesh=mesh,
        )
        numbers = np.uint32(seed), np.uint32(policy_step)
        rollouts: dict[int, Rollout] = {}
        while len(rollouts) < len(requests):
            if (admitted := slots.admit()) is not None:
                prompts, chunks = admitted
                placed = _place(prompts, PartitionSpec(None, *BATCH), mesh)
                pages = self._read(model, pages, placed, np.int32(chunks), mesh=mesh)
            # Where none waits, nothing is gained by ending a dispatch before its last slot has ended.
            leave = max(0, slots.writing - -(-self.batch_size // 8)) if slots.waiting else 0
            fixed, state = _place((slots.fixed, slots.state), BATCH, mesh)
            state, pages, written = self._decode(
                model, pages, fixed, state, np.int32(leave), *numbers, plan=plan, mesh=mesh
            )
            state, written = fetch((state, written))
            done = slots.collect(state, written, policy_step)
            rollouts.update(done)
            if done and on_progress is not None:
                on_progress(len(done), sum(len(rollout.response) for _, rollout in done))
        return [rollouts[index] for index in range(len(requests))]

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _check_pages(self, shares: int) -> None:
        if self.pages // shares < self._table_pages:
            raise UserError(
                f"pages is {self.pages}"
                + (f", spread over {shares} devices" if shares > 1 else "")
                + f", but the longest sequence needs {self._table_pages} of {self.page_size} tokens; "
                f"use at least {shares * self._table_pages}"
            )

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

    def _slots(self, requests: Sequence[Request], shares: int) -> Slots:
        stop_ids = [self._stop_ids(request) for request in requests]
        own_rows = min(self.batch_size // shares, max(1, _PREFILL_TOKENS // self.max_prompt_tokens))
        return Slots(
            requests,
            stop_ids,
            [self._budget(request) for request in requests],
            batch_size=self.batch_size,
            pools=[PagePool(self.pages // shares, self.page_size) for _ in range(shares)],
            prefill_rows=shares * own_rows,
            prompt_tokens=self.max_prompt_tokens,
            prompt_pages=self._pages_for(self.max_prompt_tokens),
            table_pages=self._table_pages,
            stop_width=-(-max(map(len, stop_ids)) // _STOP_WIDTH) * _STOP_WIDTH,
            pad_id=self.pad_id,
        )

    def _read_prompts(self, model: Qwen3, pages: Pages, prompts: Prompts, chunks: Array, *, mesh: Mesh | None) -> Pages:
        def read(chunk: Array, pages: Pages) -> Pages:
            part = Prompts(*(x[chunk] for x in prompts))
            return prefill(model, pages, part.tokens, part.lengths, part.page_table, mesh=mesh)

        return jax.lax.fori_loop(0, chunks, read, pages)

    def _decode_loop(
        self,
        model: Qwen3,
        pages: Pages,
        fixed: Fixed,
        state: State,
        leave: Array,
        seed: Array,
        policy_step: Array,
        *,
        plan: Plan,
        mesh: Mesh | None,
    ) -> tuple[State, Pages, Written]:
        """Write until as few as `leave` slots are active. A few loops see more and more pages: attention costs what
        the longest sequence has filled."""
        batch, longest = self.batch_size, self.max_new_tokens
        most = min(self.tokens_per_dispatch, longest)
        written = Written(
            tokens=jnp.full((most, batch), self.pad_id, jnp.int32),
            chosen=jnp.zeros((most, batch), bool),
            logprobs=jnp.zeros((most, batch), jnp.float32),
        )
        layers = layers_of(model, unroll=self.unroll)
        keys = _row_keys(seed, policy_step, fixed.prompt_hash, fixed.sample_index)
        # Those of all steps at once: a row that is still written has come one position further at every step.
        uniforms = _uniforms(keys, state.position + 1 + jnp.arange(most)[:, None])
        write_token = functools.partial(self._write_token, model, layers, fixed, uniforms, plan)
        how: Any = {"mesh": mesh, "unroll": self.unroll}

        def going(end: int) -> Callable[[tuple[_Loop, Any] | tuple[_Loop, Any, Any]], Array]:
            return functools.partial(self._unfinished, leave, end * self.page_size)

        def write(end: int, tokens: int, carry: tuple[_Loop, Pages, Array]) -> tuple[_Loop, Pages, Array]:
            """Write at most `tokens` more as long as `end` pages hold every sequence."""
            loop, pages, source = carry
            first, start, target = loop.step, loop.state.position, fixed.page_table
            cache = gather_cache(self.config, pages, source[:, :end], **how)
            loop, cache = jax.lax.while_loop(
                lambda carry: going(end)(carry) & (carry[0].step - first < tokens), write_token, (loop, cache)
            )
            pages = keep_pages(self.config, pages, cache, target[:, :end], start, tokens=tokens, **how)
            return loop, pages, target

        segments = min(_MOST_SEGMENTS, -(-longest // _SEGMENT_TOKENS))
        ends = {self._pages_for(self.max_prompt_tokens + longest * (i + 1) // segments - 1) for i in range(segments)}
        carry = _Loop(jnp.int32(0), state, written), pages, fixed.source_table
        for begin, end in itertools.pairwise((0, *sorted(ends))):
            # What the longest sequence has room for: another turn is taken where it has ended and shorter ones go on.
            tokens = min(most, (end - begin) * self.page_size)
            carry = jax.lax.while_loop(going(end), functools.partial(write, end, tokens), carry)
        loop, pages, _ = carry
        return loop.state, pages, loop.written

    def _unfinished(self, leave: Array, end: int, carry: tuple[_Loop, Any] | tuple[_Loop, Any, Any]) -> Array:
        loop = carry[0]
        state = loop.state
        enough = jnp.sum(state.active) <= leave
        return ~enough & (loop.step < len(loop.written.tokens)) & (jnp.max(state.position * state.active) < end)

    def _write_token(
        self,
        model: Qwen3,
        layers: tuple[Layer, ...],
        fixed: Fixed,
        uniforms: Float[Array, "n B 2"],
        plan: Plan,
        carry: tuple[_Loop, Cache],
    ) -> tuple[_Loop, Cache]:
        loop, cache = carry
        now, state, active = loop.step, loop.state, loop.state.active
        hidden, cache = step(model, layers, cache, state.token, state.position, unroll=self.unroll)
        sampled, logprobs = choose_tokens(_logits(model, hidden), fixed.sampling, uniforms[now], plan)

        tokens, closed, forced = sampled, state.closed, state.forced
        chosen = active
        if self.stop_thinking_ids:
            text = jnp.asarray(self.stop_thinking_ids, jnp.int32)
            forcing = ~closed & (state.written >= fixed.budget)
            tokens = jnp.where(forcing, text[jnp.minimum(forced, len(text) - 1)], sampled)
            forced = forced + forcing
            closed = closed | (~forcing & (sampled == self.think_end_id)) | (forced == len(text))
            chosen = active & ~forcing
        finished = chosen & jnp.any(tokens[:, None] == fixed.stop_ids, axis=-1)
        count = state.written + active
        goes_on = active & ~finished & (count < fixed.max_new)
        written = Written(
            tokens=loop.written.tokens.at[now].set(jnp.where(active, tokens, self.pad_id)),
            chosen=loop.written.chosen.at[now].set(chosen),
            logprobs=loop.written.logprobs.at[now].set(jnp.where(chosen, logprobs, 0)),
        )
        state = State(
            # A slot that has ended reads its last token again and again: its pages last no further.
            token=jnp.where(goes_on, tokens, state.token),
            position=state.position + goes_on,
            written=count,
            forced=forced,
            closed=closed,
            active=goes_on,
            finished=state.finished | finished,
        )
        return _Loop(now + 1, state, written), cache


def _logits(model: Qwen3, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    head = model.head.astype(hidden.dtype)
    by_word = jnp.einsum("VD,BD->VB", head, hidden, preferred_element_type=jnp.float32)
    # With the vocabulary's rows first, the product of a few hidden states is up to twice as fast on CPU. The barriers
    # keep XLA from swapping the operands back, and from sampling over a transposed view.
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(by_word).T)


def _row_keys(seed: Array, policy_step: Array, prompt_hash: Int[Array, "B"], sample_index: Int[Array, "B"]) -> Array:
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), policy_step)
    fold = jax.vmap(jax.random.fold_in)
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(base, prompt_hash), sample_index)


def _uniforms(keys: Array, positions: Int[Array, "n B"]) -> Float[Array, "n B 2"]:
    def draw(key: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (2,))

    return jax.vmap(jax.vmap(draw), (None, 0))(keys, positions)


def _mesh(model: Qwen3) -> Mesh | None:
    """The mesh of several devices that holds the weights, if one does."""
    sharding = model.embed[...].sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh) or sharding.mesh.size == 1:
        return None
    return sharding.mesh


def _place(tree: Any, spec: PartitionSpec, mesh: Mesh | None) -> Any:
    """Host arrays spread as `spec` says. Without a mesh the compiled program takes them as they are."""
    return tree if mesh is None else place(tree, NamedSharding(mesh, spec))
