"""The decoding loop that the engine compiles: from pages and the slots' state to tokens, many a dispatch."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen3.checkpoint.quantisation import QuantisedWeight
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.kernels import Kernels
from qwen3.decoder.model import Layer, Qwen3
from qwen3.generation.cache import Cache, Pages
from qwen3.generation.contiguous_cache import ContiguousCache
from qwen3.generation.paged_cache import PagedCache
from qwen3.generation.sampling import Plan, choose_tokens, entropies
from qwen3.generation.slots import Fixed, State, Written
from qwen3.sharding import WHOLE_ROWS, shardings

_SEGMENT_TOKENS = 64
_MOST_SEGMENTS = 4
Tree = TypeVar("Tree")


def most_segments(kernels: Kernels) -> int:
    """Loops of a decoding program, each over more pages than the one before: side by side, all rows cost what the
    longest has filled; in the pages, each costs its own, and one loop is enough."""
    return _MOST_SEGMENTS if kernels.paged_attention is None else 1


class _Loop(NamedTuple):
    """The decoding loop's carry."""

    step: Int[Array, ""]
    state: State
    written: Written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """What the loop's program is made of; `qwen3.generation.engine.Engine` explains the fields."""

    config: ModelConfig
    max_prompt_tokens: int
    max_new_tokens: int
    pad_id: int
    stop_thinking_ids: tuple[int, ...]
    think_end_id: int | None
    unroll: bool
    page_size: int
    tokens_per_dispatch: int
    record_entropies: bool

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def write(
        self,
        model: Qwen3,
        layers: tuple[Layer, ...],
        pages: Pages,
        fixed: Fixed,
        state: State,
        leave: Array,
        enough: Array,
        seed: Array,
        step: Array,
        *,
        plan: Plan,
        mesh: Mesh | None,
    ) -> tuple[State, Pages, Written]:
        """Write until as few as `leave` slots are active, or each has written `enough` tokens."""
        if mesh is not None:
            model, layers = _gathered((model, layers), model.compute_dtype, mesh)
        batch, most, longest = len(state.token), self.tokens_per_dispatch, self.max_new_tokens
        written = Written(
            tokens=jnp.full((most, batch), self.pad_id, jnp.int32),
            chosen=jnp.zeros((most, batch), bool),
            logprobs=jnp.zeros((most, batch), jnp.float32),
            top_ids=jnp.zeros((most, batch, plan.named), jnp.int32),
            top_logprobs=jnp.zeros((most, batch, plan.named), jnp.float32),
            entropies=jnp.zeros((most, batch), jnp.float32) if self.record_entropies else None,
        )
        keys = _row_keys(seed, step, fixed.prompt_hash, fixed.sample_index)
        # Those of all steps at once: a row that is still written has come one position further at every step.
        uniforms = _uniforms(keys, state.position + 1 + jnp.arange(most)[:, None])
        cache = self._cache(model.kernels, mesh)
        decode_token = functools.partial(self._decode_token, model, layers, fixed, uniforms, plan, cache)

        def going(end: int) -> Callable[[tuple[_Loop, Any] | tuple[_Loop, Any, Any]], Array]:
            return functools.partial(self._unfinished, leave, jnp.minimum(enough, most), end * self.page_size)

        def write(end: int, tokens: int, carry: tuple[_Loop, Pages, Array]) -> tuple[_Loop, Pages, Array]:
            """Write at most `tokens` more as long as `end` pages hold every sequence."""
            loop, pages, source = carry
            first, start, target = loop.step, loop.state.position, fixed.page_table
            opened = cache.open(pages, source[:, :end], target[:, :end], start)
            loop, opened = jax.lax.while_loop(
                lambda carry: going(end)(carry) & (carry[0].step - first < tokens),
                functools.partial(decode_token, target[:, :end]),
                (loop, opened),
            )
            pages = cache.keep(pages, opened, target[:, :end], start, tokens=tokens)
            return loop, pages, target

        segments = min(most_segments(model.kernels), -(-longest // _SEGMENT_TOKENS))
        ends = {self.pages_for(self.max_prompt_tokens + longest * (i + 1) // segments - 1) for i in range(segments)}
        carry = _Loop(jnp.int32(0), state, written), pages, fixed.source_table
        for begin, end in itertools.pairwise((0, *sorted(ends))):
            # What the longest sequence has room for: another turn is taken where it has ended and shorter ones go on.
            tokens = min(most, (end - begin) * self.page_size)
            carry = jax.lax.while_loop(going(end), functools.partial(write, end, tokens), carry)
        loop, pages, _ = carry
        return loop.state, pages, loop.written

    def _cache(self, kernels: Kernels, mesh: Mesh | None) -> Cache[Any]:
        if kernels.paged_attention is None:
            return ContiguousCache(config=self.config, mesh=mesh, unroll=self.unroll)
        return PagedCache(config=self.config, mesh=mesh, unroll=self.unroll, implementation=kernels.paged_attention)

    def _unfinished(
        self, leave: Array, enough: Array, end: int, carry: tuple[_Loop, Any] | tuple[_Loop, Any, Any]
    ) -> Array:
        loop = carry[0]
        state = loop.state
        few = jnp.sum(state.active) <= leave
        return ~few & (loop.step < enough) & (jnp.max(state.position * state.active) < end)

    def _decode_token(
        self,
        model: Qwen3,
        layers: tuple[Layer, ...],
        fixed: Fixed,
        uniforms: Float[Array, "n B 2"],
        plan: Plan,
        cache: Cache[Any],
        page_table: Int[Array, "B p"],
        carry: tuple[_Loop, Any],
    ) -> tuple[_Loop, Any]:
        loop, opened = carry
        now, state, active = loop.step, loop.state, loop.state.active
        hidden, opened = cache.step(model, layers, opened, page_table, state.token, state.position)
        logits = _logits(model, hidden)
        told = choose_tokens(logits, fixed.sampling, uniforms[now], plan)

        tokens, closed, forced = told.tokens, state.closed, state.forced
        chosen = active
        if self.stop_thinking_ids:
            text = jnp.asarray(self.stop_thinking_ids, jnp.int32)
            forcing = ~closed & (state.written >= fixed.budget)
            tokens = jnp.where(forcing, text[jnp.minimum(forced, len(text) - 1)], tokens)
            forced = forced + forcing
            closed = closed | (~forcing & (told.tokens == self.think_end_id)) | (forced == len(text))
            chosen = active & ~forcing
        finished = chosen & jnp.any(tokens[:, None] == fixed.stop_ids, axis=-1)
        count = state.written + active
        goes_on = active & ~finished & (count < fixed.max_new)
        written = Written(
            tokens=loop.written.tokens.at[now].set(jnp.where(active, tokens, self.pad_id)),
            chosen=loop.written.chosen.at[now].set(chosen),
            logprobs=loop.written.logprobs.at[now].set(jnp.where(chosen, told.logprobs, 0)),
            top_ids=loop.written.top_ids.at[now].set(told.top_ids),
            top_logprobs=loop.written.top_logprobs.at[now].set(told.top_logprobs),
            entropies=None
            if loop.written.entropies is None
            else loop.written.entropies.at[now].set(jnp.where(chosen, entropies(logits), 0)),
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
        return _Loop(now + 1, state, written), opened


def _gathered(tree: Tree, dtype: DTypeLike, mesh: Mesh) -> Tree:
    """Weights whose rows are whole on every device, in the dtype that they are multiplied in: done once, where the loop
    would do it at every token. The router alone stays as wide as it is."""

    def narrow(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Param) or "router" in leaf.get_metadata()["axes"]:
            return leaf
        # The barrier keeps XLA from gathering wide numbers and making them narrow afterwards.
        return leaf.replace(jax.lax.optimization_barrier(leaf.get_value().astype(dtype)))

    def kept(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Param | QuantisedWeight)

    narrowed = jax.tree.map(narrow, tree, is_leaf=kept)
    return jax.lax.with_sharding_constraint(narrowed, shardings(narrowed, mesh, WHOLE_ROWS))


def _logits(model: Qwen3, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    head = model.head.astype(hidden.dtype)
    by_entry = jnp.einsum("VD,BD->VB", head, hidden, preferred_element_type=jnp.float32)
    # With the vocabulary's rows first, the product of a few hidden states is up to twice as fast on CPU. The barriers
    # keep XLA from swapping the operands back, and from sampling over a transposed view.
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(by_entry).T)


def _row_keys(seed: Array, step: Array, prompt_hash: Int[Array, "B"], sample_index: Int[Array, "B"]) -> Array:
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    fold = jax.vmap(jax.random.fold_in)
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(base, prompt_hash), sample_index)


def _uniforms(keys: Array, positions: Int[Array, "n B"]) -> Float[Array, "n B 2"]:
    def draw(key: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (2,))

    return jax.vmap(jax.vmap(draw), (None, 0))(keys, positions)
