"""The teacher scores rows and says what it would have said: the online source of targets.

Rows go through the model and become hidden states; only from a few positions at a time are logits made of them, so
[tokens, V] exists for no kind of target.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qwen3.decoder.model import Qwen3
from qwen3.rollout import Rollout, first_fit_rows
from qwen3.sharding import (
    TOKENS,
    at_places,
    batch_sharding,
    batch_shares,
    fetch,
    partition_spec,
    place,
    row_shapes,
    row_shares,
    to_pieces,
    to_rows,
)
from teacher.scored_rollout import ScoredRollout
from teacher.targets import (
    BLOCK_TOKENS,
    AtIds,
    Following,
    Hidden,
    Sampled,
    TopK,
    at_ids_targets,
    following_tokens,
    sampled_by_uniform,
    sampled_targets,
    top_k_and_following,
    top_k_targets,
)
from teacher.transfer import moved

AnyTargets = TypeVar("AnyTargets", TopK, AtIds, Hidden, Sampled)

TOKENS_AT_ONCE = 16_384
"""Tokens of every share of the batch that go through the model together where rollouts are scored; at least a row."""


class Scorer:
    """Scores with one teacher on one mesh; scorers of one architecture share their compiled programs.

    Tokens, positions and segments come as rows from the host. Targets on the same mesh are not waited for: they are
    handed out while the devices compute them.
    """

    def __init__(self, model: Qwen3, mesh: Mesh, *, wanted_on: Mesh | None = None):
        """`wanted_on` is the mesh on which targets and head are used, if that is another one (see
        `teacher.placement`): they are moved there as soon as they are computed, without anybody waiting."""
        self._model, self._mesh = model, mesh
        self._placement = batch_sharding(mesh)
        self._wanted_on = mesh if wanted_on is None else wanted_on

    @functools.cached_property
    def head(self) -> Float[Array, "V D"]:
        """The teacher's output matrix, where targets are wanted."""
        head = self._model.head
        return head if self._wanted_on == self._mesh else moved(head, head_sharding(head, self._wanted_on))

    def hidden(
        self,
        tokens: Int[np.ndarray, "B T"],
        positions: Int[np.ndarray, "B T"],
        segment_ids: Int[np.ndarray, "B T"],
        wanted: Bool[np.ndarray, "B T"] | None = None,
        places: Int[np.ndarray, "B K"] | None = None,
    ) -> Hidden:
        """Final hidden states: with `head` they are the exact distribution at every position.

        `wanted` are the positions that will be looked at, None for all; a teacher that must send them sends no
        others, this one computes all of them alike. With `places` only what is there is handed out, [B, K, D], zeros
        where a place is T.
        """
        del wanted
        placed = self._placed(tokens, positions, segment_ids)
        at = () if places is None else self._placed(places)
        return self._moved(_hidden(self._model, *placed, self._mesh, *at))

    def top_k(
        self,
        tokens: Int[np.ndarray, "B T"],
        positions: Int[np.ndarray, "B T"],
        segment_ids: Int[np.ndarray, "B T"],
        k: int,
    ) -> TopK:
        """The k most likely tokens at every position and the mass of all others."""
        return self._moved(_top_k(self._model, *self._placed(tokens, positions, segment_ids), k, self._mesh))

    def at_ids(
        self,
        tokens: Int[np.ndarray, "B T"],
        positions: Int[np.ndarray, "B T"],
        segment_ids: Int[np.ndarray, "B T"],
        ids: Int[np.ndarray | Array, "B K J"],
        wanted: Bool[np.ndarray, "B T"] | None = None,
        places: Int[np.ndarray, "B K"] | None = None,
        *,
        top_k: int = 0,
    ) -> AtIds:
        """Log-probabilities at the tokens that the student asks for, such as its own most likely ones, and after them
        at the teacher's `top_k` likeliest. `wanted` and `places` as in `hidden`; without places K is T."""
        del wanted
        placed = self._placed(tokens, positions, segment_ids, ids)
        at = () if places is None else self._placed(places)
        return self._moved(_at_ids(self._model, *placed, top_k, self._mesh, *at))

    def score_rollouts(
        self, rollouts: list[Rollout], *, k: int, rows: int, length: int, pad_id: int
    ) -> list[ScoredRollout]:
        """The k most likely tokens at every position of each rollout, on the host.

        Rollouts are packed into rows of `length` tokens, of which at most `rows`, and about `TOKENS_AT_ONCE` of every
        share of the rows, go through the model together: one shape for any rollouts. Raises ValueError for a rollout
        longer than `length`.
        """

        def choose(placed: tuple[Array, ...], first_row: int) -> TopK:
            return _top_k(self._model, *placed, k, self._mesh)

        scored = self._packed(rollouts, rows, length, pad_id, choose)
        return [
            ScoredRollout(rollout=rollout, ids=said.ids, logprobs=said.logprobs, log_tail=said.log_tail)
            for rollout, said in zip(rollouts, scored, strict=True)
        ]

    def sample_rollouts(
        self,
        rollouts: list[Rollout],
        *,
        sampled_tokens: int,
        seed: int,
        number: int,
        rows: int,
        length: int,
        pad_id: int,
    ) -> list[ScoredRollout]:
        """`sampled_tokens` tokens sampled from the teacher at every position, for small stores; else as
        `score_rollouts`.

        What is sampled depends on `seed`, on `number`, of which each batch has its own, on the place in the batch, and
        on how the mesh splits rows and how many it scores at once.
        """

        def draw(placed: tuple[Array, ...], first_row: int) -> Sampled:
            key = np.uint32(seed), np.uint32(number), np.uint32(first_row)
            return _sampled(self._model, *placed, *key, sampled_tokens, self._mesh)

        return [
            ScoredRollout(
                rollout=rollout,
                ids=said.ids,
                logprobs=said.log_shares,
                log_tail=np.full_like(said.entropy, -np.inf),
                entropy=said.entropy,
            )
            for rollout, said in zip(rollouts, self._packed(rollouts, rows, length, pad_id, draw), strict=True)
        ]

    def rollout_logprobs(self, rollouts: list[Rollout], *, rows: int, length: int, pad_id: int) -> list[np.ndarray]:
        """The log-probability of each token of the rollouts, at the position before it [T], on the host; 0 at the last.

        Rows, length and errors as in `score_rollouts`.
        """

        def say(placed: tuple[Array, ...], first_row: int) -> AtIds:
            del first_row
            return _following(self._model, *placed, self._mesh)

        found = []
        for rollout, said in zip(rollouts, self._packed(rollouts, rows, length, pad_id, say), strict=True):
            logprobs = np.array(said.logprobs[:, 0], np.float32)
            logprobs[len(rollout.tokens) - 1] = 0
            found.append(logprobs)
        return found

    def _packed(
        self,
        rollouts: list[Rollout],
        rows: int,
        length: int,
        pad_id: int,
        score: Callable[[tuple[Array, ...], int], TopK | Sampled | AtIds],
    ) -> list[Any]:
        """What `score(tokens, positions and segments, first row)` says about each rollout, on the host."""
        lengths = [len(rollout.tokens) for rollout in rollouts]
        if max(lengths) > length:
            raise ValueError(f"a rollout of {max(lengths)} tokens does not fit rows of {length}")
        at_once, length = packed_shape(self._mesh, rows, length)
        row_of = first_fit_rows(lengths, length)
        scored: dict[int, Any] = {}
        for first in range(0, max(row_of) + 1, at_once):
            tokens = np.full((at_once, length), pad_id, np.int32)
            positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
            used = np.zeros(at_once, int)
            places: dict[int, tuple[int, slice]] = {}
            for index, row in enumerate(row_of):
                if first <= row < first + at_once:
                    begin, count = int(used[row - first]), lengths[index]
                    where: tuple[int, slice] = row - first, slice(begin, begin + count)
                    tokens[where], positions[where] = rollouts[index].tokens, np.arange(count)
                    segment_ids[where] = index + 1
                    used[row - first] += count
                    places[index] = where
            targets = fetch(score(self._placed(tokens, positions, segment_ids), first))
            for index, where in places.items():
                scored[index] = jax.tree.map(lambda leaf, where=where: leaf[where], targets)
        return [scored[index] for index in range(len(rollouts))]

    def _placed(self, *arrays: np.ndarray | Array) -> tuple[Array, ...]:
        return place(arrays, self._placement)

    def _moved(self, targets: AnyTargets) -> AnyTargets:
        return targets if self._wanted_on == self._mesh else moved(targets, batch_sharding(self._wanted_on))


def head_sharding(head: Any, mesh: Mesh) -> NamedSharding:
    """Where a teacher's output matrix [V, D], which may be abstract, lies on the mesh on which it is wanted."""
    return NamedSharding(mesh, partition_spec(("vocab", "embed"), head.shape, mesh))


def packed_shape(mesh: Mesh, rows: int, length: int) -> tuple[int, int]:
    """Rows that go through the model together, and their length, where rollouts of at most `length` tokens are scored
    in at most `rows`."""
    shares, pieces = batch_shares(mesh), mesh.shape["context"]
    length = math.ceil(length / pieces) * pieces
    return shares * min(max(1, TOKENS_AT_ONCE * pieces // length), math.ceil(rows / shares)), length


class ScoringProgram(NamedTuple):
    """A program of `Scorer` and what it is compiled for."""

    function: Any
    arguments: tuple[Any, ...]


def with_results_everywhere(program: ScoringProgram, mesh: Mesh) -> ScoringProgram:
    """The same with results that every process has whole, as `qwen3.sharding.everywhere` would make them afterwards."""
    place = NamedSharding(mesh, PartitionSpec())
    if place.is_fully_addressable:
        return program
    static = [number for number, argument in enumerate(program.arguments) if isinstance(argument, int | Mesh)]
    return ScoringProgram(jax.jit(program.function, static_argnums=static, out_shardings=place), program.arguments)


def hidden_program(model: Qwen3, mesh: Mesh, *, rows: int, length: int, places: int | None = None) -> ScoringProgram:
    """What `Scorer.hidden` runs on rows of this shape, and so many places of each; `model` may be abstract."""
    at = () if places is None else (row_shapes(jax.ShapeDtypeStruct((rows, places), np.int32), mesh, TOKENS),)
    return ScoringProgram(_hidden, (model, *_row_shapes(mesh, rows, length), mesh, *at))


def top_k_program(model: Qwen3, mesh: Mesh, *, rows: int, length: int, k: int) -> ScoringProgram:
    """What `Scorer.top_k` runs on rows of this shape, and `Scorer.score_rollouts` on rows of a `packed_shape`."""
    return ScoringProgram(_top_k, (model, *_row_shapes(mesh, rows, length), k, mesh))


def sampled_program(model: Qwen3, mesh: Mesh, *, rows: int, length: int, sampled_tokens: int) -> ScoringProgram:
    """What `Scorer.sample_rollouts` runs on rows of a `packed_shape`."""
    number = jax.ShapeDtypeStruct((), np.uint32)
    return ScoringProgram(
        _sampled, (model, *_row_shapes(mesh, rows, length), number, number, number, sampled_tokens, mesh)
    )


def following_program(model: Qwen3, mesh: Mesh, *, rows: int, length: int) -> ScoringProgram:
    """What `Scorer.rollout_logprobs` runs on rows of a `packed_shape`."""
    return ScoringProgram(_following, (model, *_row_shapes(mesh, rows, length), mesh))


def top_k_and_following_program(model: Qwen3, mesh: Mesh, *, rows: int, length: int, k: int) -> ScoringProgram:
    """The k most likely tokens at every position and what is said about the token that follows: `TopK, Following` of
    the model, hidden states [rows, length, D] and the following tokens, -1 for none."""
    following = row_shapes(jax.ShapeDtypeStruct((rows, length), np.int32), mesh, TOKENS)
    return ScoringProgram(_top_k_and_following, (model, hidden_shape(model, mesh, rows, length), following, k, mesh))


def at_ids_program(
    model: Qwen3, mesh: Mesh, *, rows: int, length: int, entries: int, top_k: int = 0, places: int | None = None
) -> ScoringProgram:
    """What `Scorer.at_ids` runs on rows of this shape for `entries` ids at a position and the `top_k` likeliest."""
    ids = row_shapes(jax.ShapeDtypeStruct((rows, places or length, entries), np.int32), mesh, TOKENS)
    at = () if places is None else (row_shapes(jax.ShapeDtypeStruct((rows, places), np.int32), mesh, TOKENS),)
    return ScoringProgram(_at_ids, (model, *_row_shapes(mesh, rows, length), ids, top_k, mesh, *at))


def at_ids_of_hidden_program(
    model: Qwen3, mesh: Mesh, *, rows: int, length: int, entries: int, top_k: int = 0
) -> ScoringProgram:
    """`at_ids_program` of the model, hidden states [rows, length, D] and ids [rows, length, entries]."""
    ids = row_shapes(jax.ShapeDtypeStruct((rows, length, entries), np.int32), mesh, TOKENS)
    return ScoringProgram(_at_ids_of_hidden, (model, hidden_shape(model, mesh, rows, length), ids, top_k, mesh))


def by_uniform_program(model: Qwen3, mesh: Mesh, *, rows: int, length: int, sampled_tokens: int) -> ScoringProgram:
    """Tokens sampled at every position, each decided by its own number in [0, 1): `Sampled` of the model, hidden states
    [rows, length, D] and the numbers [rows, length, sampled_tokens]."""
    uniform = row_shapes(jax.ShapeDtypeStruct((rows, length, sampled_tokens), np.float32), mesh, TOKENS)
    return ScoringProgram(_by_uniform, (model, hidden_shape(model, mesh, rows, length), uniform, mesh))


def hidden_alone_program(model: Qwen3, mesh: Mesh, *, rows: int, length: int) -> ScoringProgram:
    """`Hidden` of the model and hidden states [rows, length, D], which are handed on as they are."""
    return ScoringProgram(_hidden_alone, (model, hidden_shape(model, mesh, rows, length)))


def hidden_shape(model: Qwen3, mesh: Mesh, rows: int, length: int) -> jax.ShapeDtypeStruct:
    """Final hidden states of rows of this shape."""
    shape = rows, length, model.config.hidden_size
    return row_shapes(jax.ShapeDtypeStruct(shape, model.compute_dtype), mesh, TOKENS)


def _row_shapes(mesh: Mesh, rows: int, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of tokens, positions and segments."""
    return row_shapes((jax.ShapeDtypeStruct((rows, length), np.int32),) * 3, mesh, TOKENS)


def _head(model: Qwen3, mesh: Mesh) -> Float[Array, "V D"]:
    """The head, split by the vocabulary alone: gathered once, where otherwise each block of tokens would gather it
    again."""
    place = NamedSharding(mesh, partition_spec(("vocab", None), model.head.shape, mesh))
    return jax.lax.with_sharding_constraint(model.head, place)


def _block_tokens(mesh: Mesh) -> int:
    """Tokens of a block, of which every share of them has as many as a device alone would take."""
    return BLOCK_TOKENS * row_shares(mesh)


@functools.partial(jax.jit, static_argnums=4)
def _hidden(
    model: Qwen3, tokens: Array, positions: Array, segment_ids: Array, mesh: Mesh, places: Array | None = None
) -> Hidden:
    hidden = model.hidden(tokens, positions, segment_ids, mesh)
    return Hidden(hidden=hidden if places is None else at_places(hidden, places, mesh))


@jax.jit
def _hidden_alone(model: Qwen3, hidden: Array) -> Hidden:
    del model
    return Hidden(hidden=hidden)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _top_k(model: Qwen3, tokens: Array, positions: Array, segment_ids: Array, k: int, mesh: Mesh) -> TopK:
    hidden = to_pieces(model.hidden(tokens, positions, segment_ids, mesh), mesh)
    return to_rows(top_k_targets(hidden, _head(model, mesh), k, block_tokens=_block_tokens(mesh)), mesh)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _top_k_and_following(model: Qwen3, hidden: Array, following: Array, k: int, mesh: Mesh) -> tuple[TopK, Following]:
    hidden, following = to_pieces((hidden, following), mesh)
    found = top_k_and_following(hidden, _head(model, mesh), k, following, block_tokens=_block_tokens(mesh))
    return to_rows(found, mesh)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _at_ids(
    model: Qwen3,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    ids: Array,
    top_k: int,
    mesh: Mesh,
    places: Array | None = None,
) -> AtIds:
    hidden = model.hidden(tokens, positions, segment_ids, mesh)
    return _at_ids_of_hidden(model, hidden if places is None else at_places(hidden, places, mesh), ids, top_k, mesh)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _at_ids_of_hidden(model: Qwen3, hidden: Array, ids: Array, top_k: int, mesh: Mesh) -> AtIds:
    hidden, ids = to_pieces((hidden, ids), mesh)
    found = at_ids_targets(hidden, _head(model, mesh), ids, top_k=top_k, block_tokens=_block_tokens(mesh))
    return to_rows(found, mesh)


@functools.partial(jax.jit, static_argnums=4)
def _following(model: Qwen3, tokens: Array, positions: Array, segment_ids: Array, mesh: Mesh) -> AtIds:
    return _at_ids(model, tokens, positions, segment_ids, following_tokens(tokens)[..., None], 0, mesh)


@functools.partial(jax.jit, static_argnums=(7, 8))
def _sampled(
    model: Qwen3,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    seed: Array,
    number: Array,
    first_row: Array,
    sampled_tokens: int,
    mesh: Mesh,
) -> Sampled:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), first_row)
    hidden = to_pieces(model.hidden(tokens, positions, segment_ids, mesh), mesh)
    targets = sampled_targets(hidden, _head(model, mesh), sampled_tokens, key, block_tokens=_block_tokens(mesh))
    return to_rows(targets, mesh)


@functools.partial(jax.jit, static_argnums=3)
def _by_uniform(model: Qwen3, hidden: Array, uniform: Array, mesh: Mesh) -> Sampled:
    hidden, uniform = to_pieces((hidden, uniform), mesh)
    return to_rows(sampled_by_uniform(hidden, _head(model, mesh), uniform, block_tokens=_block_tokens(mesh)), mesh)
