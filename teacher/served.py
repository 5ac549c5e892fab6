"""A teacher behind servers, in the places of one whose weights are here: of a model, an engine and a scorer."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from qwen3.decoder.config import ModelConfig
from qwen3.generation.engine import OnProgress, Request
from qwen3.rollout import Rollout
from qwen3.sharding import batch_sharding, place
from teacher.client import TeacherClient
from teacher.scored_rollout import ScoredRollout
from teacher.scoring import head_sharding
from teacher.targets import AtIds, Hidden
from teacher.token_client import TokenClient
from teacher.wire import TargetsRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Stands for the weights."""

    client: TeacherClient | TokenClient
    config: ModelConfig
    """Of the folder that is here without its weights, or with them."""


class ServedEngine:
    """Generates as `qwen3.generation.engine.Engine` does, at the servers."""

    def generate(
        self,
        model: ServedModel,
        requests: Sequence[Request],
        *,
        seed: int,
        policy_step: int,
        step: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Rollout]:
        """The same rollouts as an engine with the teacher's weights gives, but for float sums in another order. Servers
        of other programs sample others, by seeds of their own."""
        step = policy_step if step is None else step
        rollouts = model.client.rollouts(requests, seed=seed, step=step, on_progress=on_progress)
        return [dataclasses.replace(rollout, policy_step=policy_step) for rollout in rollouts]


class ServedScorer:
    """Scores as `teacher.scoring.Scorer` does, at the servers; targets come to `mesh`."""

    def __init__(self, model: ServedModel, mesh: Mesh):
        self._client, self._mesh = model.client, mesh

    @functools.cached_property
    def head(self) -> Float[Array, "V D"]:
        """The teacher's output matrix, fetched once."""
        head = self._client.head
        return place(head, head_sharding(head, self._mesh))

    def hidden(
        self,
        tokens: Int[np.ndarray, "B T"],
        positions: Int[np.ndarray, "B T"],
        segment_ids: Int[np.ndarray, "B T"],
        wanted: Bool[np.ndarray, "B T"] | None = None,
        places: Int[np.ndarray, "B K"] | None = None,
    ) -> Hidden:
        """Final hidden states of the packed documents, each from its first `wanted` position on; 0 elsewhere. With
        `places` as `Scorer.hidden`.

        That is where a position carries a target: prompts, which carry none, are not sent back."""
        del positions  # 0, 1, … in each document, as servers count them too
        documents = _documents(segment_ids, wanted)
        if documents:
            answers = self._client.targets(
                TargetsRequest(
                    targets="hidden",
                    sequences=[tokens[one.where] for one in documents],
                    starts=[one.start for one in documents],
                )
            )
            first = answers[0]["hidden"]
            hidden = np.zeros((*tokens.shape, first.shape[1]), first.dtype)
            for one, answer in zip(documents, answers, strict=True):
                hidden[one.asked] = answer["hidden"]
        else:
            hidden = np.zeros((*tokens.shape, self.head.shape[1]), self.head.dtype)
        if places is not None:
            hidden = np.take_along_axis(np.pad(hidden, ((0, 0), (0, 1), (0, 0))), places[:, :, None], axis=1)
        return Hidden(hidden=place(hidden, batch_sharding(self._mesh)))

    def at_ids(
        self,
        tokens: Int[np.ndarray, "B T"],
        positions: Int[np.ndarray, "B T"],
        segment_ids: Int[np.ndarray, "B T"],
        ids: Int[np.ndarray, "B K J"],
        wanted: Bool[np.ndarray, "B T"] | None = None,
        places: Int[np.ndarray, "B K"] | None = None,
        *,
        top_k: int = 0,
    ) -> AtIds:
        """Log-probabilities at `ids` and at the teacher's `top_k` likeliest, of the positions that `hidden` asks for;
        all mass in the tail elsewhere. With `places` as `Scorer.at_ids`."""
        del positions
        documents = _documents(segment_ids, wanted)
        # A last position for places that are left.
        rows, length = len(tokens), tokens.shape[1] + 1
        if places is not None:
            there, ids = ids, np.full((rows, length, ids.shape[2]), -1, np.int32)
            np.put_along_axis(ids, places[:, :, None], there, axis=1)
        said = {
            "ids": np.full((rows, length, ids.shape[2] + top_k), -1, np.int32),
            "logprobs": np.full((rows, length, ids.shape[2] + top_k), -np.inf, np.float32),
            "log_tail": np.zeros((rows, length), np.float32),
        }
        if documents:
            answers = self._client.targets(
                TargetsRequest(
                    targets="at_ids",
                    sequences=[tokens[one.where] for one in documents],
                    starts=[one.start for one in documents],
                    entries=ids.shape[2],
                    ids=[ids[one.asked] for one in documents],
                    top_k=top_k,
                )
            )
            for one, answer in zip(documents, answers, strict=True):
                for name, array in said.items():
                    array[one.asked] = answer[name]
        at = np.arange(length - 1)[None] if places is None else places
        said = {
            name: np.take_along_axis(array, at.reshape(*at.shape, *(1,) * (array.ndim - 2)), axis=1)
            for name, array in said.items()
        }
        return AtIds(**place(said, batch_sharding(self._mesh)))

    def score_rollouts(
        self, rollouts: list[Rollout], *, k: int, rows: int, length: int, pad_id: int
    ) -> list[ScoredRollout]:
        """The k most likely tokens at every position from the first that carries a target on; before it, what
        `empty_targets` gives, which no store keeps."""
        del rows, length, pad_id  # the servers have shapes of their own
        starts, sequences = _starts(rollouts), [rollout.tokens for rollout in rollouts]
        answers = self._client.targets(TargetsRequest(targets="top_k", sequences=sequences, starts=starts, entries=k))
        return [
            ScoredRollout(
                rollout=rollout,
                ids=_filled(answer["ids"], start, 0),
                logprobs=_filled(answer["logprobs"], start, -np.inf),
                log_tail=_filled(answer["log_tail"], start, 0),
            )
            for rollout, start, answer in zip(rollouts, starts, answers, strict=True)
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
        """`sampled_tokens` tokens sampled from the teacher at every position from the first that carries a target on.

        What is sampled depends on `seed`, on `number` and on the place in the batch, and is not what a scorer samples
        here.
        """
        del rows, length, pad_id
        starts = _starts(rollouts)
        seeds = np.random.SeedSequence([seed, number]).generate_state(len(rollouts)).tolist()
        answers = self._client.targets(
            TargetsRequest(
                targets="sampled",
                sequences=[rollout.tokens for rollout in rollouts],
                starts=starts,
                entries=sampled_tokens,
                seeds=seeds,
            )
        )
        return [
            ScoredRollout(
                rollout=rollout,
                ids=_filled(answer["ids"], start, -1),
                logprobs=_filled(answer["log_shares"], start, -np.inf),
                log_tail=np.full(len(rollout.tokens), -np.inf, np.float32),
                entropy=_filled(answer["entropy"], start, 0),
            )
            for rollout, start, answer in zip(rollouts, starts, answers, strict=True)
        ]


class _Document(NamedTuple):
    """A document in packed rows, asked about from `start` on."""

    row: int
    span: slice
    start: int

    @property
    def where(self) -> tuple[int, slice]:
        return self.row, self.span

    @property
    def asked(self) -> tuple[int, slice]:
        return self.row, slice(self.span.start + self.start, self.span.stop)


def _documents(segment_ids: Int[np.ndarray, "B T"], wanted: Bool[np.ndarray, "B T"] | None) -> list[_Document]:
    """Those with a position that is wanted, from the first such position on."""
    found = []
    for row, segments in enumerate(segment_ids):
        for segment in range(1, int(segments.max(initial=0)) + 1):
            (where,) = np.nonzero(segments == segment)
            used = where if wanted is None else where[wanted[row, where]]
            if len(used):
                found.append(_Document(row, slice(int(where[0]), int(where[-1]) + 1), int(used[0] - where[0])))
    return found


def _starts(rollouts: Sequence[Rollout]) -> list[int]:
    """Of each rollout the first position that carries a target; its last position where none does."""
    return [int(np.argmax(one.loss_mask)) if one.loss_mask.any() else len(one.tokens) - 1 for one in rollouts]


def _filled(array: np.ndarray, start: int, fill: float) -> np.ndarray:
    """`array`, which begins at position `start`, from position 0 on."""
    return np.concatenate((np.full((start, *array.shape[1:]), fill, array.dtype), array))
