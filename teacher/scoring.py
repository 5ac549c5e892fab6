"""The teacher reads rows and says what it would have said: the online source of targets."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from qwen3.model import Qwen3
from qwen3.rollout import Rollout
from qwen3.sharding import batch_sharding, fetch, place
from teacher.scored_rollout import ScoredRollout
from teacher.targets import Hidden, Sampled, TopK, sampled_targets, top_k_targets


class Scorer:
    """Scores with one teacher on one mesh; scorers of one architecture share their compiled programs."""

    def __init__(self, model: Qwen3, mesh: Mesh):
        self._model = model
        self._mesh = mesh
        self._placement = batch_sharding(mesh)

    @property
    def head(self) -> Float[Array, "V D"]:
        return self._model.head

    def hidden(
        self, tokens: Int[np.ndarray, "B T"], positions: Int[np.ndarray, "B T"], segment_ids: Int[np.ndarray, "B T"]
    ) -> Hidden:
        """Final hidden states: with `head` they are the exact distribution at every position."""
        return _hidden(self._model, *place((tokens, positions, segment_ids), self._placement), self._mesh)

    def score_rollouts(
        self, rollouts: list[Rollout], *, k: int, rows: int, length: int, pad_id: int
    ) -> list[ScoredRollout]:
        """The k most likely words at every position of each rollout, one rollout a row of `length`.

        Raises ValueError for more than `rows` rollouts or one longer than `length`.
        """
        targets = fetch(_top_k(self._model, *self._rows(rollouts, rows, length, pad_id), k, self._mesh))
        return _records(rollouts, targets.ids, targets.logprobs, targets.log_tail)

    def sample_rollouts(
        self, rollouts: list[Rollout], *, draws: int, seed: int, number: int, rows: int, length: int, pad_id: int
    ) -> list[ScoredRollout]:
        """`draws` words drawn from the teacher at every position, for small stores; else as `score_rollouts`.

        What is drawn depends on `seed`, on `number`, of which each batch has its own, and on the place in the batch.
        """
        placed = self._rows(rollouts, rows, length, pad_id)
        targets = fetch(_sampled(self._model, *placed, np.uint32(seed), np.uint32(number), draws, self._mesh))
        log_tail = np.full_like(targets.entropy, -np.inf)
        return _records(rollouts, targets.ids, targets.log_shares, log_tail, targets.entropy)

    def _rows(self, rollouts: list[Rollout], rows: int, length: int, pad_id: int) -> tuple[Array, Array, Array]:
        """Tokens, positions and segment ids [rows, length]."""
        longest = max(len(rollout.tokens) for rollout in rollouts)
        if len(rollouts) > rows or longest > length:
            raise ValueError(f"{len(rollouts)} rollouts of up to {longest} tokens do not fit {rows} rows of {length}")
        tokens = np.full((rows, length), pad_id, np.int32)
        segment_ids = np.zeros((rows, length), np.int32)
        for row, rollout in enumerate(rollouts):
            tokens[row, : len(rollout.tokens)] = rollout.tokens
            segment_ids[row, : len(rollout.tokens)] = 1
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        return place((tokens, positions, segment_ids), self._placement)


def _records(
    rollouts: list[Rollout],
    ids: np.ndarray,
    logprobs: np.ndarray,
    log_tail: np.ndarray,
    entropy: np.ndarray | None = None,
) -> list[ScoredRollout]:
    """Each rollout with its own row of the arrays, without the padding."""
    records = []
    for row, rollout in enumerate(rollouts):
        kept = row, slice(len(rollout.tokens))
        records.append(
            ScoredRollout(
                rollout=rollout,
                ids=ids[kept],
                logprobs=logprobs[kept],
                log_tail=log_tail[kept],
                entropy=None if entropy is None else entropy[kept],
            )
        )
    return records


@functools.partial(jax.jit, static_argnums=4)
def _hidden(model: Qwen3, tokens: Array, positions: Array, segment_ids: Array, mesh: Mesh) -> Hidden:
    return Hidden(hidden=model.hidden(tokens, positions, segment_ids, mesh))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _top_k(model: Qwen3, tokens: Array, positions: Array, segment_ids: Array, k: int, mesh: Mesh) -> TopK:
    return top_k_targets(model.hidden(tokens, positions, segment_ids, mesh), model.head, k)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _sampled(
    model: Qwen3,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    seed: Array,
    number: Array,
    draws: int,
    mesh: Mesh,
) -> Sampled:
    key = jax.random.fold_in(jax.random.key(seed), number)
    return sampled_targets(model.hidden(tokens, positions, segment_ids, mesh), model.head, draws, key)
