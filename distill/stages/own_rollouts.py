"""The student's own rollouts as a stage's data: asked, generated now or ahead, scored, judged, resumed.

Stages that train on them differ in what they take from them: what a teacher says of each token, what a reward says of
the whole response, or both. All else is here.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np

from distill.monitor.metrics import RolloutSample
from distill.stages.ahead import Outcome, Scored, Written, WrittenAhead
from distill.stages.asking import Asked, Asking, places_of_stage
from distill.stages.context import RunContext
from distill.stages.loop import Spent, StepData
from distill.stages.scored_rows import ScoredRows
from distill.tasks import Problem
from distill.tasks.requests import prompt_ids
from distill.tasks.samples import Verdict, judge, judged_by
from distill.training.flops import forward_flops, training_flops
from distill.training.train_step import Batch
from qwen3.decoder.adapter import adapter_parameters
from qwen3.decoder.model import Qwen3
from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import MODES, THINKING, Mode, Rollout
from teacher.scoring import Scorer
from teacher.served import ServedScorer


class Lesson(Protocol):
    """What a stage takes from rollouts beside what a teacher says of them."""

    learns: bool
    """Whether it adds to the loss, and not only to the metrics."""

    def complete(
        self,
        written: Written,
        asked: Asked,
        model: Qwen3,
        batch: int,
        generate: Callable[[Asked], list[Rollout]],
        require_open: Callable[[], None],
    ) -> Written:
        """The rollouts of a batch, in the order of `asked`, with what is to be known of them while `model`, the weights
        that generated them, is at hand; and others from `generate` in the place of some, maybe. `require_open` is
        called now and then and raises where nobody waits any more."""

    def more_problems(self, batch: int) -> Sequence[Problem]:
        """That `complete` may have asked beside those that it was given."""

    def per_token(self, written: Written, part: slice) -> list[dict[str, np.ndarray]]:
        """Of each rollout of a part, those of an update, arrays [T] by the names of `PolicyData`."""

    def told(self, written: Written, part: slice) -> dict[str, float]:
        """Metrics of the part."""

    def before(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The microbatches of an update that is about to be made."""

    def after(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Told what the update measured; more metrics of it."""

    def flops(self, written: Written) -> float:
        """What `complete` has cost beside generating."""

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class OwnRollouts:
    """Every `updates_per_batch` × `passes` steps: sample a batch from the student, as it is or was `max_staleness`
    batches ago. At every step: take the next part of it, in the first pass scored by the teacher, if there is one, and
    packed; later passes have the same rows and targets again."""

    def __init__(
        self,
        stage: Asking,
        name: str,
        model: Qwen3,
        context: RunContext,
        asked: Asked,
        *,
        scorers: Mapping[str, Scorer | ServedScorer] = MappingProxyType({}),
        lesson: Lesson | None = None,
    ):
        """`asked` are the prompts of all steps, of which the model generates; what comes after those is the lesson's.
        `lesson` may add rewards to what the `scorers`, of every teacher by name, say."""
        assert stage.training.steps is not None
        self._stage, self._name, self._context, self._lesson = stage, name, context, lesson
        self._seed = context.stage_seed(name)
        self._asked = asked
        self._engine = context.engine(model, stage.generation)
        self._adapter_parameters = adapter_parameters(model)
        self._sample_flops = forward_flops(model.config, self._adapter_parameters)
        teachers = {one: context.load_teacher(one) for one in scorers}
        self._teacher_flops = {one: forward_flops(teacher.model.config) for one, teacher in teachers.items()}
        self._teacher_mesh = next((teacher.mesh for teacher in teachers.values()), None)
        self._parts = stage.updates_per_batch
        self._updates = self._parts * stage.passes
        self._places = places_of_stage(stage, context.mesh, self._teacher_mesh) if self._teacher_mesh else None
        self._rows = ScoredRows(stage, context, asked, scorers, self._places)
        threads = context.mesh.size == 1
        self._batches = stage.training.steps // self._updates
        self._ahead = (
            WrittenAhead(stage.max_staleness, self._batches, self._write, self._score_all, threads=threads)
            if stage.max_staleness
            else None
        )
        self._written: Written | None = None
        self._scored: Callable[[int], Sequence[Batch]] = self._nothing_scored
        """The packed rows of a part of the present batch."""
        self._next = 0
        """The update of the present batch that comes next; 0 where the next batch does."""

    def step_data(self, step: int, model: Qwen3, spent: Spent) -> StepData:
        # Where rollouts are generated ahead, these are the seconds that training waits: all else costs it nothing.
        started = time.monotonic()
        batch, update = divmod(step, self._updates)
        if update == 0:
            self._take(batch, model)
        written = self._written
        assert written is not None
        sampled = time.monotonic()
        batches = self._scored(update % self._parts)
        scored = time.monotonic()

        part, first_pass = self._part(update % self._parts), update < self._parts
        rollouts = written.rollouts[part]
        lengths = [len(rollout.tokens) for rollout in rollouts]
        heads = None if self._places is None else float(sum(np.sum(batch.loss_mask) for batch in batches))
        metrics = self._judged(step, batch, written, part) if first_pass else {}
        if update == 0:
            generated = [len(rollout.tokens) for rollout in written.rollouts]
            generated += [one.tokens for one in written.replaced]
            spent.tokens_sampled += written.tokens
            spent.student_sample_flops += self._sample_flops.of(generated)
            spent.student_sample_flops += self._lesson.flops(written) if self._lesson else 0.0
            if written.student_ids:
                spent.student_sample_flops += self._sample_flops.of(len(one.tokens) for one in written.rollouts)
            speed = written.tokens / written.seconds / self._context.mesh.size
            metrics["tokens_per_second_per_device/generation"] = speed
        read = (self._rows.as_read(rollouts) if self._teacher_flops and first_pass else None) or rollouts
        for teacher, flops in self._teacher_flops.items() if first_pass else ():
            own = [len(one.tokens) for one in read if one.teacher == teacher]
            own_heads = heads
            if heads is not None and teacher:
                masks = (batch.loss_mask & (batch.teacher == self._rows.number(teacher)) for batch in batches)
                own_heads = float(sum(np.sum(mask) for mask in masks))
            spent.teacher_flops += flops.of(own, own_heads)
        spent.student_sample_seconds += sampled - started
        spent.teacher_score_seconds += scored - sampled
        if self._ahead or self._updates > 1:
            metrics["staleness"] = step - rollouts[0].policy_step
        if heads is not None:
            metrics["chosen_tokens"] = heads / sum(rollout.loss_mask.sum() for rollout in rollouts)
        if self._ahead:
            metrics["rollout_wait_seconds"] = scored - started
        training = training_flops(model.config, self._adapter_parameters, microbatches=len(batches))
        self._next = (update + 1) % self._updates
        return StepData(
            batches=self._lesson.before(batches) if self._lesson else batches,
            train_flops=training.of(lengths, heads),
            metrics=metrics,
            learned=self._lesson.after if self._lesson else None,
        )

    def _take(self, batch: int, model: Qwen3) -> None:
        """The rollouts of a batch, which begins with `model`."""
        # What the batch before has left on the devices is not needed while this one is generated.
        self._scored = self._nothing_scored
        if self._ahead:
            self._written = self._ahead.rollouts(batch, model)
            ahead = self._ahead
            self._scored = lambda part: ahead.batches()[part]
        else:
            self._written = self._write(batch, batch, model)
            self._scored = self._scoring(self._written)

    def _scoring(self, written: Written) -> Callable[[int], Sequence[Batch]]:
        """Scores a part when it is first asked for; where there are further passes, it is kept for them."""
        score = functools.partial(self._score, written)
        return functools.cache(score) if self._stage.passes > 1 else score

    def _nothing_scored(self, part: int) -> Sequence[Batch]:
        raise AssertionError(f"part {part} before any rollouts")

    def _part(self, number: int) -> slice:
        """Of a batch's rollouts, those that one update learns from."""
        count = self._stage.prompts_per_step * self._stage.samples_per_prompt
        return slice(number * count, (number + 1) * count)

    def _asked_in(self, batch: int) -> Asked:
        count = self._parts * self._stage.prompts_per_step
        return self._asked[batch * count : (batch + 1) * count]

    def _write(self, batch: int, policy_batch: int, model: Qwen3) -> Written:
        """What `model`, the student after so many batches' updates, generates for a batch."""
        # A small file may give a prompt twice in one batch, which are then further samples of it.
        numbers: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)

        def generate(asked: Asked) -> list[Rollout]:
            rollouts = self._engine.generate(
                model,
                self._requests(asked, numbers, batch),
                seed=self._seed,
                policy_step=policy_batch * self._updates,
                step=batch,
                on_progress=self._ahead.require_open if self._ahead else None,
            )
            problems = [problem for problem, _ in asked for _ in range(self._stage.samples_per_prompt)]
            return judged_by(rollouts, problems)

        started, asked = time.monotonic(), self._asked_in(batch)
        rollouts = generate(asked)
        written = Written(rollouts=rollouts, seconds=time.monotonic() - started)
        if self._lesson:
            require_open = self._ahead.require_open if self._ahead else lambda: None
            written = self._lesson.complete(written, asked, model, batch, generate, require_open)
        if self._stage.targets is None:
            return written
        rows, length = self._stage.training.rows, self._stage.training.row_length
        ids = self._stage.targets.likeliest(
            model, written.rollouts, self._context.mesh, rows=rows, length=length, pad_id=self._context.tokenizer.pad_id
        )
        return dataclasses.replace(written, student_ids=ids)

    def _requests(self, asked: Asked, numbers: Mapping[str, Iterator[int]], batch: int) -> list[Request]:
        stage = self._stage
        return [
            Request(
                prompt_ids=prompt_ids(problem, mode, self._context.tokenizer, flag_fraction=stage.modes.flag_fraction),
                prompt_id=problem.problem_id,
                sample_index=(number := next(numbers[problem.problem_id])),
                mode=mode,
                params=self._params(batch, problem.problem_id, number, mode),
            )
            for problem, mode in asked
            for _ in range(stage.samples_per_prompt)
        ]

    def _params(self, batch: int, prompt_id: str, sample_index: int, mode: Mode) -> SamplingParams:
        stage = self._stage
        whole = stage.thinking if mode == THINKING else stage.non_thinking
        schedule, budget = stage.rollout_tokens, max(stage.thinking.max_new_tokens, stage.non_thinking.max_new_tokens)
        if schedule is None or schedule.runs_in_full(self._seed, batch, prompt_id, sample_index):
            return whole
        return schedule.cut(whole, batch, self._batches, budget)

    def _may_end(self, batch: int, one: RolloutSample) -> bool:
        """Whether a rollout of the batch had its mode's whole budget, and was no prefix."""
        whole = self._stage.thinking if one.mode == THINKING else self._stage.non_thinking
        return self._params(batch, one.prompt_id, one.sample_index, one.mode) == whole

    def _score_all(self, written: Written) -> Scored:
        return [self._score(written, number) for number in range(self._parts)]

    def _score(self, written: Written, number: int) -> Sequence[Batch]:
        """A part's packed rows, with what the teacher says of them: computed, or where the teacher has devices of its
        own, being computed there while the student trains on the rows before them."""
        part = self._part(number)
        rollouts = written.rollouts[part]
        more = self._lesson.per_token(written, part) if self._lesson and self._lesson.learns else [{}] * len(rollouts)
        batches = self._rows.batches(rollouts, more, written.student_ids[part])
        if self._teacher_mesh == self._context.mesh:
            # Without waiting, the teacher's time would be counted as the student's.
            jax.block_until_ready([batch.targets for batch in batches])
        return batches

    def _judged(self, step: int, batch: int, written: Written, part: slice) -> dict[str, float]:
        """Of all that was generated for a part, by mode: length, and of those that were no prefixes accuracy where
        there are answers and share of finished responses; and what rewards say. Every now and then a rollout for
        people."""
        samples = self._samples(batch, written, part)
        number = part.start // (part.stop - part.start)
        replaced = [one for one in written.replaced if one.part == number]
        whole = [sample for sample in samples if self._may_end(batch, sample)]
        generated: list[RolloutSample | Outcome] = [*samples, *replaced]
        could_end: list[RolloutSample | Outcome] = [*whole, *replaced]
        metrics: dict[str, float] = {}
        shown = []
        for mode in MODES:
            of_mode = [one for one in generated if one.mode == mode]
            ended = [one for one in could_end if one.mode == mode]
            if of_mode:
                graded = [sample.correct for sample in ended if sample.correct is not None]
                if graded:
                    metrics[f"accuracy/{mode}"] = _mean(graded)
                metrics[f"response_tokens/{mode}"] = _mean(sample.response_tokens for sample in of_mode)
                if ended:
                    metrics[f"finished/{mode}"] = _mean(sample.finished for sample in ended)
            shown += [one for one in (*whole, *samples) if one.mode == mode][:1]
        if self._stage.rollout_tokens is not None:
            metrics["rollouts_in_full"] = len(whole) / len(samples)
            if whole:
                metrics["never_stopped"] = _mean(not sample.finished for sample in whole)
        by_teacher = collections.defaultdict[str, list[bool]](list)
        judged: list[tuple[str, RolloutSample | Outcome]] = [(one.teacher, one) for one in replaced]
        for rollout, sample in zip(written.rollouts[part], samples, strict=True):
            judged += [(rollout.teacher, sample)] if self._may_end(batch, sample) else []
        for teacher, one in judged:
            if teacher and one.correct is not None:
                by_teacher[teacher].append(one.correct)
        metrics |= {f"accuracy/{teacher}": _mean(correct) for teacher, correct in by_teacher.items()}
        # Of the steps that a multiple stands for, later passes of the batch before have none to show.
        later_passes = self._updates - self._parts if step % self._updates == 0 else 0
        if step % self._stage.samples_every_steps <= later_passes:
            self._context.metrics.samples(step + 1, shown, stage=self._name)
        return metrics | (self._lesson.told(written, part) if self._lesson else {})

    def _samples(self, batch: int, written: Written, part: slice) -> list[RolloutSample]:
        problems = [problem for problem, _ in self._asked_in(batch)]
        problems += self._lesson.more_problems(batch) if self._lesson else ()
        by_id = {problem.problem_id: problem for problem in problems}
        context, rollouts = self._context, written.rollouts[part]
        verdicts: Sequence[Verdict | None] = written.verdicts[part] or [None] * len(rollouts)
        return [
            judge(rollout, by_id[rollout.prompt_id], context.tokenizer, context.tasks, verdict)
            for rollout, verdict in zip(rollouts, verdicts, strict=True)
        ]

    def state(self) -> Mapping[str, Any]:
        # Rollouts depend on weights, seed and step alone: only those of weights that are gone must be kept.
        state: dict[str, Any] = dict(self._ahead.state()) if self._ahead else {}
        if self._next:
            assert self._written is not None
            state["batch"] = self._written.to_json()
        if self._lesson and (own := self._lesson.state()):
            state["lesson"] = dict(own)
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        if self._ahead:
            self._ahead.restore(state)
        if "batch" in state:
            self._written = Written.from_json(state["batch"])
            self._scored = self._scoring(self._written)
        if self._lesson and "lesson" in state:
            self._lesson.restore(state["lesson"])

    def close(self) -> None:
        if self._ahead:
            self._ahead.close()


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
