"""The rows of the decoding loop, on the host: which request each one writes, with what parameters, how far it is."""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qwen3.generation.pages import Lease, PagePool
from qwen3.generation.sampling import RowParams, SamplingParams
from qwen3.rollout import Mode, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to be written. `prompt_id` and `sample_index` name it and seed its randomness."""

    prompt_ids: Sequence[int]
    prompt_id: str
    sample_index: int
    mode: Mode
    params: SamplingParams


class Fixed(NamedTuple):
    """What a slot keeps as long as it generates one request."""

    page_table: Int[Array, "B p"]
    source_table: Int[Array, "B p"]
    """Where the pages lie when a dispatch begins: a page that becomes a copy still lies in another slot's."""
    max_new: Int[Array, "B"]
    budget: Int[Array, "B"]
    stop_ids: Int[Array, "B w"]
    prompt_hash: Int[Array, "B"]
    sample_index: Int[Array, "B"]
    sampling: RowParams


class State(NamedTuple):
    """What changes with every token. `token` stands at `position` and is the next to be read."""

    token: Int[Array, "B"]
    position: Int[Array, "B"]
    written: Int[Array, "B"]
    """Tokens after the prompt so far."""
    forced: Int[Array, "B"]
    """Tokens of the stop-thinking text among them."""
    closed: Bool[Array, "B"]
    """Thinking has ended, by itself or by force."""
    active: Bool[Array, "B"]
    finished: Bool[Array, "B"]
    """A stop token has ended it."""


class Written(NamedTuple):
    """What one dispatch hands back, step-major so that a step writes one row."""

    tokens: Int[Array, "n B"]
    chosen: Bool[Array, "n B"]
    """By the policy itself; False for forced tokens."""
    logprobs: Float[Array, "n B"]
    top_ids: Int[Array, "n B J"]
    """The likeliest tokens where `qwen3.generation.sampling.Plan.named` asks for them."""
    top_logprobs: Float[Array, "n B J"]
    entropies: Float[Array, "n B"] | None = None
    """Of the distributions that tokens were drawn from; None where the engine does not record them."""


class _Kept(NamedTuple):
    """What of a request's `Written` is kept until it has ended; what is told as it is written is not."""

    tokens: np.ndarray
    chosen: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray | None


_NOTHING = _Kept(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32), None)


class Prompts(NamedTuple):
    """Prompts to be read, in chunks of C rows; rows and chunks that are not needed have length 0 and pages 0."""

    tokens: Int[Array, "M C T"]
    lengths: Int[Array, "M C"]
    page_table: Int[Array, "M C p"]


class Asked(NamedTuple):
    """A request as the engine understands it."""

    number: int
    """By which the caller knows it."""
    request: Request
    stop_ids: Sequence[int]
    budget: int


@dataclasses.dataclass
class _Open:
    """A request that is being written."""

    asked: Asked
    lease: Lease
    parts: list["_Kept"]
    """Of every dispatch."""


class Slots:
    """B slots in equal shares, each share with a pool of its own.

    Args:
        params: What slots without a request draw as: that of one of the requests, so that they need nothing of the
            compiled program.
        batch_size: B.
        pools: One a share.
        prefill_rows: C, a multiple of the shares.
        prompt_tokens, prompt_pages: T and p of `Prompts`.
        table_pages: p of `Fixed`.
        stop_width: w.
        pad_id: Fills unused places.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        batch_size: int,
        pools: Sequence[PagePool],
        prefill_rows: int,
        prompt_tokens: int,
        prompt_pages: int,
        table_pages: int,
        stop_width: int,
        pad_id: int,
    ):
        self._pools, self._prefill_rows = pools, prefill_rows
        self._prompt_tokens, self._prompt_pages, self._pad_id = prompt_tokens, prompt_pages, pad_id
        self._waiting: deque[Asked] = deque()
        self._open: list[_Open | None] = [None] * batch_size
        self.fixed: Any = Fixed(
            page_table=_filled((batch_size, table_pages)),
            source_table=_filled((batch_size, table_pages)),
            max_new=_filled((batch_size,)),
            budget=_filled((batch_size,)),
            stop_ids=_filled((batch_size, stop_width), -1),
            prompt_hash=_filled((batch_size,), dtype=np.uint32),
            sample_index=_filled((batch_size,), dtype=np.uint32),
            sampling=RowParams.of([params] * batch_size),
        )
        self.state: Any = State(
            token=_filled((batch_size,)),
            position=_filled((batch_size,)),
            written=_filled((batch_size,)),
            forced=_filled((batch_size,)),
            closed=_filled((batch_size,), dtype=bool),
            active=_filled((batch_size,), dtype=bool),
            finished=_filled((batch_size,), dtype=bool),
        )

    @property
    def size(self) -> int:
        """B."""
        return len(self._open)

    @property
    def writing(self) -> int:
        """Slots that write."""
        return sum(slot is not None for slot in self._open)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def add(self, asked: Asked) -> None:
        """Behind all that wait already."""
        self._waiting.append(asked)

    def admit(self) -> tuple[Prompts, int] | None:
        """Give free slots the next requests as long as their pages last.

        Returns prompts that must be read before the next dispatch, and the number of chunks that hold them; None
        where no request moved in.
        """
        moved_in = False
        shares = len(self._pools)
        fresh: list[list[Lease]] = [[] for _ in self._pools]
        for slot in (slot for slot, taken in enumerate(self._open) if taken is None):
            if not self._waiting:
                break
            share, request = slot * shares // len(self._open), self._waiting[0].request
            # The last token that is written is never read.
            most = len(request.prompt_ids) + request.params.max_new_tokens - 1
            lease = self._pools[share].lease(request.prompt_ids, most)
            if lease is None:
                continue
            self._occupy(slot, self._waiting.popleft(), lease)
            moved_in = True
            if lease.fresh and len(lease.prompt) > 1:
                fresh[share].append(lease)
        return self._prompts(fresh) if moved_in else None

    def _occupy(self, slot: int, asked: Asked, lease: Lease) -> None:
        request, fixed, state = asked.request, self.fixed, self.state
        self._open[slot] = _Open(asked, lease, [])
        fixed.page_table[slot] = 0
        fixed.page_table[slot, : len(lease.pages)] = lease.pages
        fixed.source_table[slot] = fixed.page_table[slot]
        if lease.copied_from is not None:
            fixed.source_table[slot, lease.shared] = lease.copied_from
        fixed.max_new[slot] = request.params.max_new_tokens
        fixed.budget[slot] = asked.budget
        fixed.stop_ids[slot] = -1
        fixed.stop_ids[slot, : len(asked.stop_ids)] = asked.stop_ids
        fixed.prompt_hash[slot] = _hash32(request.prompt_id)
        fixed.sample_index[slot] = request.sample_index
        for column, value in zip(fixed.sampling, RowParams.of([request.params]), strict=True):
            column[slot] = value[0]
        for column in state:
            column[slot] = 0
        state.token[slot] = request.prompt_ids[-1]
        state.position[slot] = len(request.prompt_ids) - 1
        state.active[slot] = True

    def _prompts(self, fresh: list[list[Lease]]) -> tuple[Any, int]:
        """Spread the leases whose prompts must be read over chunks, each share in its own rows."""
        shares, rows = len(fresh), self._prefill_rows
        own = rows // shares
        most = -(-len(self._open) // rows)
        prompts: Any = Prompts(
            tokens=_filled((most, rows, self._prompt_tokens), self._pad_id),
            lengths=_filled((most, rows)),
            page_table=_filled((most, rows, self._prompt_pages)),
        )
        for share, leases in enumerate(fresh):
            for number, lease in enumerate(leases):
                place = number // own, share * own + number % own
                length = len(lease.prompt) - 1
                pages = lease.pages[: self._prompt_pages][: length // self._pools[share].page_size + 1]
                prompts.tokens[place][:length] = lease.prompt[:-1]
                prompts.lengths[place] = length
                prompts.page_table[place][: len(pages)] = pages
        return prompts, max(-(-len(leases) // own) for leases in fresh)

    def collect(self, state: State, written: Written, policy_step: int) -> list[tuple[int, Written, Rollout | None]]:
        """Take what a dispatch wrote, and free the slots that ended.

        Returns of every request that had a slot its index, its part, and the rollout where it has ended.
        """
        counts = state.written - self.state.written
        self.state = jax.tree.map(np.array, state)
        found = []
        for slot, taken in enumerate(self._open):
            if taken is None:
                continue
            # Copies: a view would keep all that the dispatch has handed back.
            part: Written = jax.tree.map(lambda part, slot=slot: np.array(part[: counts[slot], slot]), written)
            columns: Any = (part.tokens, part.chosen, part.logprobs, part.entropies)
            taken.parts.append(_Kept(*columns))
            rollout = None
            if not state.active[slot]:
                rollout = _rollout(taken.asked.request, taken.parts, bool(state.finished[slot]), policy_step)
                self._free(slot, taken)
            found.append((taken.asked.number, part, rollout))
        self.fixed.source_table[:] = self.fixed.page_table
        return found

    def leave(self, wanted: Callable[[int], bool], policy_step: int) -> list[tuple[int, Rollout]]:
        """Let requests go that are not wanted any more, whether they have a slot or not.

        Returns them by index, unfinished, with what they have written.
        """
        left = []
        for slot, taken in enumerate(self._open):
            if taken is not None and not wanted(taken.asked.number):
                left.append((taken.asked.number, _rollout(taken.asked.request, taken.parts, False, policy_step)))
                self._free(slot, taken)
        for asked in [asked for asked in self._waiting if not wanted(asked.number)]:
            left.append((asked.number, _rollout(asked.request, [], False, policy_step)))
            self._waiting.remove(asked)
        self.fixed.source_table[:] = self.fixed.page_table
        return left

    def _free(self, slot: int, taken: _Open) -> None:
        self._pools[slot * len(self._pools) // len(self._open)].release(taken.lease)
        self._open[slot] = None
        self.state.active[slot] = False
        # It goes on reading a token a step until a request moves in: to the page that nobody reads.
        self.fixed.page_table[slot] = 0
        self.state.position[slot] = 0


def _rollout(request: Request, parts: Sequence[_Kept], finished: bool, policy_step: int) -> Rollout:
    prompt = len(request.prompt_ids)
    written: _Kept = jax.tree.map(lambda *columns: np.concatenate(columns), *parts) if parts else _NOTHING
    tokens = np.concatenate((np.asarray(request.prompt_ids, np.int32), written.tokens))
    # What is known about the token at index t + 1 is stored at t, the position that predicts it.
    predicting = slice(prompt - 1, len(tokens) - 1)
    loss_mask, logprobs = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.float32)
    loss_mask[predicting], logprobs[predicting] = written.chosen, written.logprobs
    entropies = None
    if written.entropies is not None:
        entropies = np.zeros(len(tokens), np.float32)
        entropies[predicting] = written.entropies
    return Rollout(
        tokens=tokens,
        prompt_length=prompt,
        loss_mask=loss_mask,
        sampler_logprobs=logprobs,
        mode=request.mode,
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        policy_step=policy_step,
        finished=finished,
        sampler_entropies=entropies,
    )


def _filled(shape: tuple[int, ...], value: int = 0, dtype: DTypeLike = np.int32) -> Any:
    """A host array that is to become a device array when a compiled program takes it."""
    return np.full(shape, value, dtype)


def _hash32(prompt_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=4).digest(), "little")
