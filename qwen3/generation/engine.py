"""Writes rollouts: one compiled prefill and one compiled decoding loop for teacher and student alike.

Continuous batching over a paged cache: `batch_size` slots write at once, each with pages of its own, and a slot whose
sequence ends takes the next request. Several tokens are written in one dispatch, after which the host looks once.
Shapes are fixed by the engine, so a loop of training and sampling never compiles again. A rollout depends only on
the weights and on (seed, step, prompt, sample index): every token has a random key of its own.

On CPU the slots are divided into one group a core, each with requests, pages and a thread of its own: XLA computes
the small products of a decoding step on one core alone, but several programs side by side.

What is held beside the weights: the pages, and during a dispatch a copy of the slots' own ones side by side, as long
as the longest sequence by then. A pool smaller than its default therefore saves at most half. There is no such copy
where `qwen3.decoder.kernels.Kernels.paged_attention` reads pages in place.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from kernels_pallas.platforms import platform
from qwen3.cores import usable_cores
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.kernels import PAGE_SIZE
from qwen3.decoder.model import UNROLL_LAYERS, Layer, Qwen3
from qwen3.errors import UserError
from qwen3.generation.cache import Pages, layers_of, make_pages, page_shapes, prefill
from qwen3.generation.decoding import Decoder
from qwen3.generation.live import Live, OnProgress, Whole
from qwen3.generation.pages import PagePool
from qwen3.generation.sampling import Plan, RowParams, SamplingParams
from qwen3.generation.slots import Asked, Fixed, Prompts, Request, Slots, State, Written
from qwen3.hosts.launcher import Launcher, Work
from qwen3.rollout import THINKING, Rollout
from qwen3.sharding import (
    BATCH,
    bytes_on_device,
    check_rows,
    everywhere,
    place,
    placed_shapes,
    row_shapes,
    row_shares,
)

__all__ = ["STOP_IDS", "Engine", "OnProgress", "Request"]

STOP_IDS = 8
"""Stop tokens of a sequence up to which all share a program; more take another."""
_PREFILL_TOKENS = 256
_GROUP_ROWS = 4
_NEVER = np.iinfo(np.int32).max
_ROWS = jax.tree.structure(
    (Fixed(*Fixed._fields[:-1], sampling=RowParams(*RowParams._fields)), State(*State._fields))  # type: ignore[arg-type]
)
"""Of `Slots.fixed` and `Slots.state` together."""


@dataclasses.dataclass(eq=False)
class _OnDevices:
    """What a group generates with."""

    model: Qwen3
    layers: tuple[Layer, ...] = ()
    """As the decoding loop takes them."""
    pages: Any = None
    """`Pages`, once they are made."""


@dataclasses.dataclass(eq=False)
class _Group:
    """Slots that are written together, in one dispatch after the other."""

    slots: Slots
    held: _OnDevices
    coming: list[Asked] = dataclasses.field(default_factory=list)
    """Have joined since its last dispatch began: as long as one is under way, `slots` are its thread's."""

    @property
    def requests(self) -> int:
        """Under way or waiting."""
        return self.slots.writing + self.slots.waiting + len(self.coming)


class EnginePrograms(NamedTuple):
    """The two programs of an engine with what they are compiled for: abstract arguments and static options."""

    prefill: Any
    """Prompts into pages."""
    prefill_arguments: tuple[Any, ...]
    prefill_options: Mapping[str, Any]
    decode: Any
    """Tokens out of pages, one dispatch."""
    decode_arguments: tuple[Any, ...]
    decode_options: Mapping[str, Any]


class Engine:
    """Samples from any weights of one architecture.

    Args:
        config: Architecture of the models that `generate` will be given.
        batch_size: Slots, the sequences generated at once; requests beyond it wait for one.
        max_prompt_tokens: Longest prompt.
        max_new_tokens: Most tokens after the prompt.
        stop_ids: Tokens that end a sequence, unless its own `SamplingParams.stop_ids` say otherwise.
        pad_id: Fills unused places; never seen by the model's attention.
        stop_thinking_ids: The text forced where a thinking budget ends; it must hold `think_end_id`.
        think_end_id: The token that closes thinking, None where the vocabulary has none.
        unroll_layers: Deepest model whose layers are unrolled in the decoding loop; see `qwen3.generation.cache`.
        page_size: Tokens a page.
        pages: Pages in the pool; None for what `batch_size` sequences of the longest kind need. With fewer, a request
            waits until its prompt and all its `max_new_tokens` fit, less the pages that it shares: none is cut short.
            Groups have equal parts of it.
        tokens_per_dispatch: Most tokens that each slot writes before the host looks again. It looks earlier where
            requests wait and an eighth of the slots have ended.
        record_entropies: Whether rollouts come with the entropy of each distribution that a token was drawn from.
        launcher: Begins the programs; None for one of its own. Whoever begins programs on the same several devices
            from another thread, or behind a server in another process, must use the same one.

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
        page_size: int = PAGE_SIZE,
        pages: int | None = None,
        tokens_per_dispatch: int = 256,
        record_entropies: bool = False,
        launcher: Launcher | None = None,
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
        self.stop_thinking_ids = tuple(stop_thinking_ids)
        self.pad_id = pad_id
        self.page_size = page_size
        self.unroll = config.num_hidden_layers <= unroll_layers
        self._decoder = Decoder(
            config=config,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            pad_id=pad_id,
            stop_thinking_ids=self.stop_thinking_ids,
            think_end_id=think_end_id,
            unroll=self.unroll,
            page_size=page_size,
            tokens_per_dispatch=min(tokens_per_dispatch, max_new_tokens),
            record_entropies=record_entropies,
        )
        # The last token that is written is never read.
        self._table_pages = self._decoder.pages_for(max_prompt_tokens + max_new_tokens - 1)
        self.pages = batch_size * self._table_pages if pages is None else pages
        self._check_pages(1)
        # Groups run the same programs: one compiles them, the others wait for it.
        self._launcher = Launcher() if launcher is None else launcher
        self._decode = _decoding(self._decoder)

    def generate(
        self,
        model: Qwen3,
        requests: Sequence[Request],
        *,
        seed: int,
        policy_step: int,
        step: int | None = None,
        plan: Plan | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Rollout]:
        """Write one rollout a request, in their order.

        Args:
            model: Weights, used where they lie; sharded weights spread the rows over the data axes of their mesh.
            requests: Any number of any modes and parameters.
            seed: Seed of the run.
            policy_step: Optimiser step of `model`, which the rollouts name.
            step: The training step that the rollouts are for, part of every random key; None where it is `policy_step`.
                The same weights may generate for several steps, and must not repeat themselves.
            plan: What the compiled sampler can do, at least what these requests need; None for just that. Calls of one
                plan share a program, whatever their requests ask for.
            on_progress: Called whenever rollouts have ended.

        Raises:
            UserError: A request that the engine's sizes cannot hold, naming its prompt; sharded weights over whose
                mesh `batch_size` or `pages` cannot be spread; a model with Dual Chunk Attention whose
                `kernels.paged_attention` is named.
            ValueError: A model of another architecture, or a seed or step that is no unsigned 32-bit number.
        """
        for request in requests:
            self.check(request)
        if not requests:
            self._numbers(seed, policy_step, step)
            return []
        plan = plan or Plan.of([request.params for request in requests], self.config.vocab_size)
        whole = Whole(requests, plan, self._decoder.tokens_per_dispatch, on_progress)
        stop_ids = max(len(self._stop_ids(request)) for request in requests)
        self.follow(model, whole, seed=seed, policy_step=policy_step, step=step, stop_ids=stop_ids)
        return [whole.rollouts[index] for index in range(len(requests))]

    def follow(
        self,
        model: Qwen3,
        live: Live,
        *,
        seed: int,
        policy_step: int,
        step: int | None = None,
        stop_ids: int = STOP_IDS,
    ) -> None:
        """Write what `live` asks for, until nothing that it has asked for is left.

        A rollout is that of `generate`, whatever joins or leaves beside it. Arguments are those of `generate`, and:

        Args:
            live: Asked and told between dispatches. What it raises ends the call.
            stop_ids: Most stop tokens of a request.

        Raises:
            UserError, ValueError: As `generate`, but for requests, which are `check`ed before they join.
        """
        mesh, shares = self._placement(model)
        numbers = self._numbers(seed, policy_step, step)
        layers = self._launcher.launch("layers", lambda _: self._own_layers(model))
        groups: list[_Group] = []
        joined = 0
        with ThreadPoolExecutor(self._most_groups) as threads:
            writing: dict[Future[tuple[State, Written]], _Group] = {}
            while True:
                joining = [
                    Asked(number, request, self._stop_ids(request), self._budget(request))
                    for number, request in enumerate(live.joining(), start=joined)
                ]
                joined += len(joining)
                most = min(1 if mesh is not None else self._most_groups, len(joining) + sum(g.requests for g in groups))
                while len(groups) < most:
                    params = joining[0].request.params
                    pages = self._launcher.launch("pages", lambda _: self._pages(model))
                    held = _OnDevices(model, layers, pages)
                    groups.append(_Group(self._slots(params, stop_ids, shares, mesh), held))
                _spread(joining, groups)
                dispatch = live.next_dispatch()
                for group in groups:
                    if group in writing.values():
                        continue
                    for asked in group.coming:
                        group.slots.add(asked)
                    group.coming.clear()
                    for index, rollout in group.slots.leave(live.wanted, policy_step):
                        live.ended(index, rollout)
                    if group.requests:
                        future = threads.submit(self._write, group, numbers, dispatch)
                        writing[future] = group
                if not writing:
                    return
                for future in wait(writing, return_when=FIRST_COMPLETED).done:
                    for index, part, ended in writing.pop(future).slots.collect(*future.result(), policy_step):
                        live.written(index, part)
                        if ended is not None:
                            live.ended(index, ended)

    def _own_layers(self, model: Qwen3) -> tuple[Layer, ...]:
        return _layers(model) if self.unroll else tuple(model.stacks)

    def _numbers(self, seed: int, policy_step: int, step: int | None) -> tuple[np.uint32, np.uint32]:
        step = policy_step if step is None else step
        for field, value in (("seed", seed), ("policy_step", policy_step), ("step", step)):
            if not 0 <= value < 2**32:
                raise ValueError(f"{field} is {value}; it must be in 0..{2**32 - 1}")
        return np.uint32(seed), np.uint32(step)

    def programs(self, model: Qwen3, sampling: Sequence[SamplingParams]) -> "EnginePrograms":
        """What `generate` runs, in every group alike, for requests that are sampled in these ways.

        `model` may be abstract (`qwen3.sharding.placed_shapes`); where its mesh's devices are, the programs are for.
        """
        prompt = [self.pad_id] * self.max_prompt_tokens
        request = Request(prompt_ids=prompt, prompt_id="", sample_index=0, mode=THINKING, params=sampling[0])
        stop_ids = max(len(self.stop_ids if params.stop_ids is None else params.stop_ids) for params in sampling)
        mesh, shares = self._placement(model)
        devices = getattr(model.embed.get_value().sharding, "mesh", None)
        layers = jax.eval_shape(layers_of, model) if self.unroll else tuple(model.stacks)
        if self.unroll and devices is not None:
            layers = placed_shapes(layers, devices)
        with contextlib.nullcontext() if devices is None else jax.set_mesh(devices):
            slots, pages = self._slots(request.params, stop_ids, shares, mesh), self._pages(model, page_shapes)
        slots.add(Asked(0, request, (), _NEVER))
        admitted = slots.admit()
        assert admitted is not None
        prompts = row_shapes(admitted[0], mesh, PartitionSpec(None, *BATCH))
        fixed, state = row_shapes((slots.fixed, slots.state), mesh)
        number, count = jax.ShapeDtypeStruct((), np.uint32), jax.ShapeDtypeStruct((), np.int32)
        return EnginePrograms(
            prefill=_prefill,
            prefill_arguments=(model, pages, prompts, count),
            prefill_options={"mesh": mesh},
            decode=self._decode,
            decode_arguments=(model, layers, pages, fixed, state, count, count, number, number),
            decode_options={"plan": Plan.of(sampling, self.config.vocab_size), "mesh": mesh},
        )

    def device_bytes(self, model: Qwen3, plans: Sequence[Plan]) -> int | None:
        """The most that generating with these plans takes on a device beside the weights: the layers that are taken
        out of their stacks, pages, and what the programs hold while they run. None where the compiler does not say."""
        programs = self.programs(model, [SamplingParams(max_new_tokens=1)])
        # With the layers as `follow` has them: what is compiled here is what it runs.
        layers = self._launcher.launch("layers", lambda _: self._own_layers(model))
        decode_arguments = (model, layers, *programs.decode_arguments[2:])
        run = [(programs.prefill, programs.prefill_arguments, programs.prefill_options)]
        run += [(programs.decode, decode_arguments, {**programs.decode_options, "plan": plan}) for plan in plans]
        taken = []
        for program, arguments, options in run:
            memory = program.lower(*arguments, **options).compile().memory_analysis()
            if memory is None:
                return None
            taken.append(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)
        mesh, _ = self._placement(model)
        groups = self._most_groups if mesh is None else 1
        copied = bytes_on_device(layers) if self.unroll else 0
        return copied + groups * (bytes_on_device(programs.decode_arguments[2]) + max(taken))

    def works(self, model: Qwen3) -> dict[str, Work]:
        """What the engine launches, by name, for a process that follows one that generates with these weights."""
        held = _OnDevices(model)

        def take_layers(arrays: Sequence[np.ndarray]) -> None:
            held.layers = ()  # lest there are two copies
            held.layers = self._own_layers(model)

        def make(arrays: Sequence[np.ndarray]) -> None:
            held.pages = None
            held.pages = self._pages(model)

        return {
            "layers": take_layers,
            "pages": make,
            "prefill": functools.partial(self._launch_prefill, held),
            "decode": functools.partial(self._launch_decode, held),
        }

    def _write(
        self, group: _Group, numbers: tuple[np.uint32, np.uint32], dispatch: tuple[Plan, int]
    ) -> tuple[State, Written]:
        """Fill the free slots of a group and write in all of them until enough have ended."""
        slots, (plan, tokens), launch = group.slots, dispatch, self._launcher.launch
        if (admitted := slots.admit()) is not None:
            prompts, chunks = admitted
            read = functools.partial(self._launch_prefill, group.held)
            launch("prefill", read, jax.tree.leaves((prompts, np.int32(chunks))))
        # Where none waits, nothing is gained by ending a dispatch before its last slot has ended.
        leave = max(0, slots.writing - -(-slots.size // 8)) if slots.waiting else 0
        arrays = jax.tree.leaves((slots.fixed, slots.state, np.int32(leave), np.int32(tokens), numbers))
        write = functools.partial(self._launch_decode, group.held)
        return self._launcher.results(launch("decode", write, arrays, plan=dataclasses.asdict(plan)))

    def _launch_prefill(self, held: _OnDevices, arrays: Sequence[Any]) -> None:
        *prompts, chunks = arrays
        mesh = _mesh(held.model)
        placed = _place(Prompts(*prompts), PartitionSpec(None, *BATCH), mesh)
        held.pages = _prefill(held.model, held.pages, placed, chunks, mesh=mesh)

    def _launch_decode(self, held: _OnDevices, arrays: Sequence[Any], plan: Mapping[str, Any]) -> tuple[State, Written]:
        *rows, leave, tokens, seed, step = arrays
        mesh = _mesh(held.model)
        fixed, state = _place(jax.tree.unflatten(_ROWS, rows), BATCH, mesh)
        state, held.pages, written = self._decode(
            held.model,
            held.layers,
            held.pages,
            fixed,
            state,
            leave,
            tokens,
            seed,
            step,
            plan=Plan(**plan),
            mesh=mesh,
        )
        return everywhere((state, written))

    def _placement(self, model: Qwen3) -> tuple[Mesh | None, int]:
        """The mesh of several devices that holds the weights, if one does, and its shares of the rows."""
        if model.config != self.config:
            raise ValueError("model.config differs from the engine's; make an engine for each architecture")
        model.kernels.check_pages(self.config)
        mesh = _mesh(model)
        if mesh is not None:
            check_rows("batch_size", self.batch_size, mesh)
        shares = row_shares(mesh)
        self._check_pages(shares)
        return mesh, shares

    def _check_pages(self, shares: int) -> None:
        if self.pages // shares < self._table_pages:
            raise UserError(
                f"pages is {self.pages}"
                + (f", spread over {shares} devices" if shares > 1 else "")
                + f", but the longest sequence needs {self._table_pages} of {self.page_size} tokens; "
                f"use at least {shares * self._table_pages}"
            )

    def check(self, request: Request) -> None:
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

    def _slots(self, params: SamplingParams, stop_ids: int, shares: int, mesh: Mesh | None) -> Slots:
        """Those of a group."""
        count = self._most_groups if mesh is None else 1
        rows, pages = self.batch_size // count, self.pages // count
        prefill_rows = min(rows // shares, max(1, _PREFILL_TOKENS // self.max_prompt_tokens))
        return Slots(
            params,
            batch_size=rows,
            pools=[PagePool(pages // shares, self.page_size) for _ in range(shares)],
            prefill_rows=shares * prefill_rows,
            prompt_tokens=self.max_prompt_tokens,
            prompt_pages=self._decoder.pages_for(self.max_prompt_tokens),
            table_pages=self._table_pages,
            # Also where none stops: the shape, and with it the program, is that of others.
            stop_width=-(-max(1, stop_ids) // STOP_IDS) * STOP_IDS,
            pad_id=self.pad_id,
        )

    def _pages(self, model: Qwen3, make: Callable[..., Pages] = make_pages) -> Pages:
        """Those of a group."""
        mesh, shares = self._placement(model)
        count = self._most_groups if mesh is None else 1
        size = shares * (self.pages // count // shares + 1)
        return make(self.config, model.compute_dtype, pages=size, page_size=self.page_size, mesh=mesh)

    @property
    def _most_groups(self) -> int:
        """One a core on CPU, else one in all; each has at least `_GROUP_ROWS` slots and pages for one sequence."""
        if platform() != "cpu":
            return 1
        most = min(usable_cores(), self.batch_size // _GROUP_ROWS, self.pages // self._table_pages)
        return max((n for n in range(1, most + 1) if self.batch_size % n == 0), default=1)


_layers = jax.jit(layers_of)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="pages")
def _prefill(model: Qwen3, pages: Pages, prompts: Prompts, chunks: Array, *, mesh: Mesh | None) -> Pages:
    """So many chunks of prompts into pages."""

    def read(chunk: Array, pages: Pages) -> Pages:
        part = Prompts(*(x[chunk] for x in prompts))
        return prefill(model, pages, part.tokens, part.lengths, part.page_table, mesh=mesh)

    return jax.lax.fori_loop(0, chunks, read, pages)


@functools.lru_cache(maxsize=4)
def _decoding(decoder: Decoder) -> Any:
    """The program of a decoder: engines of the same sizes, such as those of a run's stages, share it."""
    return jax.jit(decoder.write, static_argnames=("plan", "mesh"), donate_argnames="pages")


def _spread(joining: Sequence[Asked], groups: Sequence[_Group]) -> None:
    """Consecutive requests, which often share a prompt, go to one group; the group with the least to do comes first."""
    idlest = sorted(groups, key=lambda group: group.requests)
    for group, part in zip(idlest, np.array_split(np.arange(len(joining)), max(1, len(groups))), strict=False):
        for index in part:
            group.coming.append(joining[index])


def _mesh(model: Qwen3) -> Mesh | None:
    """The mesh of several devices that holds the weights, if one does."""
    sharding = model.embed.get_value().sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh) or sharding.mesh.size == 1:
        return None
    return sharding.mesh


def _place(tree: PyTree, spec: PartitionSpec, mesh: Mesh | None) -> Any:
    """Host arrays spread as `spec` says. Without a mesh the compiled program takes them as they are."""
    return tree if mesh is None else place(tree, NamedSharding(mesh, spec))
