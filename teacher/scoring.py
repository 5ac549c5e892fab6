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
from teacher.targets import Hidden, TopK, top_k_targets


class Scorer:
    """Scores with one teacher on one mesh; scorers of one architecture share their compiled programs."""

    def __init__(self, model: Qwen3, mesh: Mesh):
        self._model = model
        self._placement = batch_sharding(mesh)

    @property
    def head(self) -> Float[Array, "V D"]:
        return self._model.head

    def hidden(
        self, tokens: Int[np.ndarray, "B T"], positions: Int[np.ndarray, "B T"], segment_ids: Int[np.ndarray, "B T"]
    ) -> Hidden:
        """Final hidden states: with `head` they are the exact distribution at every position."""
        return _hidden(self._model, *place((tokens, positions, segment_ids), self._placement))

    def score_rollouts(
        self, rollouts: list[Rollout], *, k: int, rows: int, length: int, pad_id: int
    ) -> list[ScoredRollout]:
        """The k most likely words at every position of each rollout, one rollout a row of `length`.

        Raises ValueError for more than `rows` rollouts or one longer than `length`.
        """
        longest = max(len(rollout.tokens) for rollout in rollouts)
        if len(rollouts) > rows or longest > length:
            raise ValueError(f"{len(rollouts)} rollouts of up to {longest} tokens do not fit {rows} rows of {length}")
        tokens = np.full((rows, length), pad_id, np.int32)
        segment_ids = np.zeros((rows, length), np.int32)
        for row, rollout in enumerate(rollouts):
            tokens[row, : len(rollout.tokens)] = rollout.tokens
            segment_ids[row, : len(rollout.tokens)] = 1
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        placed = place((tokens, positions, segment_ids), self._placement)
        targets = fetch(_top_k(self._model, *placed, k))
        return [
            ScoredRollout(
                rollout=rollout,
                ids=targets.ids[row, : len(rollout.tokens)],
                logprobs=targets.logprobs[row, : len(rollout.tokens)],
                log_tail=targets.log_tail[row, : len(rollout.tokens)],
            )
            for row, rollout in enumerate(rollouts)
        ]


@jax.jit
def _hidden(model: Qwen3, tokens: Array, positions: Array, segment_ids: Array) -> Hidden:
    return Hidden(hidden=model.hidden(tokens, positions, segment_ids))


@functools.partial(jax.jit, static_argnums=4)
def _top_k(model: Qwen3, tokens: Array, positions: Array, segment_ids: Array, k: int) -> TopK:
    return top_k_targets(model.hidden(tokens, positions, segment_ids), model.head, k)
