"""Rollouts as microbatches: packed, with what a teacher says of every token, or of those that are chosen."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill.stages.asking import Asked, Asking
from distill.stages.context import RunContext
from distill.stages.student_top_k import with_sampled
from distill.tasks.requests import teacher_prompt_ids
from distill.training.packing import Example, pack_rollouts, places_read, read_at, rollout_example, rows_needed
from distill.training.policy import PolicyData
from distill.training.token_choice import at_places, chosen, places_of, room, taken_at
from distill.training.train_step import Batch
from qwen3.rollout import Rollout, with_prompt
from teacher.scoring import Scorer
from teacher.served import ServedScorer
from teacher.targets import AtIds, Hidden

_ASKED = "asked_ids"
"""The packed array of the ids that the teacher is asked for."""


class ScoredRows:
    """Packs rollouts as a stage trains on them, and asks every teacher about its own."""

    def __init__(
        self,
        stage: Asking,
        context: RunContext,
        asked: Asked,
        scorers: Mapping[str, Scorer | ServedScorer],
        places: int | None,
    ):
        """`asked` are the prompts of all steps; `places` as `places_of_stage` gives them."""
        self._stage, self._context, self._scorers, self._places = stage, context, scorers, places
        self._hinted = {problem.problem_id: problem for problem, _ in asked if problem.teacher_prompt is not None}
        """Problems of which the teacher reads more than the student."""

    def batches(
        self,
        rollouts: Sequence[Rollout],
        per_token: Sequence[Mapping[str, np.ndarray]],
        student_ids: Sequence[np.ndarray],
    ) -> list[Batch]:
        """Microbatches of an update, with what teachers say of them: computed, or where a teacher has devices of its
        own, being computed there.

        Args:
            per_token: Of each rollout arrays [T] by the names of `PolicyData`.
            student_ids: Of each rollout [T, k], see `StudentTopK`; none where targets are others.
        """
        ids: list[np.ndarray | None] = [*student_ids] or [None] * len(rollouts)
        records = [_Record(*record) for record in zip(rollouts, per_token, ids, strict=True)]
        if not self._scorers:
            return [*self._packed(records, None, {})]
        batches: list[Batch] = []
        # What several teachers say comes in rows of their own.
        for teacher, scorer in self._scorers.items():
            if own := [record for record in records if record.rollout.teacher == teacher]:
                batches += self._packed(own, scorer, {"teacher": self.number(teacher)} if teacher else {})
        return batches

    def number(self, teacher: str) -> int:
        """As rows of several teachers have it."""
        return self._context.named_teachers.index(teacher)

    def _packed(
        self, records: Sequence["_Record"], scorer: Scorer | ServedScorer | None, whose: Mapping[str, int]
    ) -> Iterator[Batch]:
        """Microbatches of what one teacher, if there is any, is asked about; of several, `whose` has its number."""
        rows, length = self._stage.training.rows, self._stage.training.row_length
        rooms = [len(record.rollout.tokens) for record in records]
        if self._places is not None:
            masks = [chosen(record.rollout, self._stage.token_share) for record in records]
            rooms = [room(own, int(mask.sum()), self._places, length) for own, mask in zip(rooms, masks, strict=True)]
            records = [
                record._replace(rollout=dataclasses.replace(record.rollout, loss_mask=mask))
                for record, mask in zip(records, masks, strict=True)
            ]
        views = self.as_read([record.rollout for record in records]) if scorer is not None else None
        if views is not None:
            records = [record._replace(read=view) for record, view in zip(records, views, strict=True)]
            rooms = [max(own, len(view.tokens)) for own, view in zip(rooms, views, strict=True)]
        needed = -(-rows_needed(rooms, length) // rows) * rows

        def rows_of(documents: Sequence[Any], to_example: Callable[[Any], Example]) -> Mapping[str, np.ndarray]:
            return pack_rollouts(
                documents, rows=needed, length=length, one_per_row=False, to_example=to_example, rooms=rooms
            )

        packed = rows_of(records, lambda record: record.example(whose))
        read = None if views is None else rows_of(views, rollout_example)
        for first in range(0, needed, rows):
            arrays = {name: array[first : first + rows] for name, array in packed.items()}
            places = None if self._places is None else places_of(arrays["loss_mask"], self._places)
            as_read = None if read is None else {name: array[first : first + rows] for name, array in read.items()}
            targets = self._targets(arrays, as_read, places, scorer)
            policy = {name: arrays[name] for name in records[0].per_token}
            yield Batch.of(
                arrays if places is None else at_places(arrays, places),
                targets,
                _policy_data(policy) if policy else None,
            )

    def as_read(self, rollouts: Sequence[Rollout]) -> list[Rollout] | None:
        """The rollouts after the prompts that the teacher reads; None where it reads the student's."""
        if not self._hinted:
            return None
        fraction, views = self._stage.modes.flag_fraction, [*rollouts]
        for place, rollout in enumerate(views):
            if problem := self._hinted.get(rollout.prompt_id):
                ids = teacher_prompt_ids(problem, rollout.mode, self._context.tokenizer, flag_fraction=fraction)
                views[place] = with_prompt(rollout, ids)
        return views

    def _targets(
        self,
        arrays: Mapping[str, np.ndarray],
        read: Mapping[str, np.ndarray] | None,
        places: np.ndarray | None,
        scorer: Scorer | ServedScorer | None,
    ) -> Hidden | AtIds | None:
        """What a divergence under the current student is computed from, whoever generated the rollouts; `read` are the
        rows as the teacher reads them, where they are others."""
        if scorer is None:
            return None
        ids = None if self._stage.targets is None else arrays[_ASKED]
        if ids is not None and places is not None:
            ids = taken_at(ids, places)
        if read is not None:
            there = places_read(arrays, read)
            places = (
                there if places is None else np.where(places < there.shape[1], taken_at(there, places), there.shape[1])
            )
        seen = arrays if read is None else read
        rows, wanted = (seen["tokens"], seen["positions"], seen["segment_ids"]), seen["loss_mask"]
        if self._stage.targets is None:
            return scorer.hidden(*rows, wanted, places)
        assert ids is not None
        return scorer.at_ids(*rows, ids, wanted, places, top_k=self._stage.targets.k)


class _Record(NamedTuple):
    """A rollout as it is packed."""

    rollout: Rollout
    per_token: Mapping[str, np.ndarray]
    """Arrays [T] by the names of `PolicyData`."""
    student_ids: np.ndarray | None
    """[T, k], see `StudentTopK`."""
    read: Rollout | None = None
    """The rollout after the prompt that the teacher reads; None where that is the student's."""

    def example(self, whose: Mapping[str, int]) -> Example:
        arrays = dict(self.per_token)
        arrays |= {name: np.full(len(self.rollout.tokens), value, np.uint8) for name, value in whose.items()}
        if self.student_ids is not None:
            arrays[_ASKED] = with_sampled(self.rollout, self.student_ids)
        if self.read is not None:
            arrays["read_at"] = read_at(self.rollout, self.read)
        return rollout_example(self.rollout, **arrays)


def _policy_data(arrays: Mapping[str, Any]) -> PolicyData:
    return PolicyData(**arrays)
