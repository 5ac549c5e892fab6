"""On-policy distillation: the student generates in both modes, the teacher judges every token, the KL is minimised.

The loss of a position is a sum over every next token under the student as it is now and the teacher's hidden states.
Which token was sampled next, and how likely it was, does not enter. So stale rollouts (`max_staleness`) change which
prefixes are trained and nothing else, for reverse_kl and jsd as for forward_kl: a batch has no place for anything
that the older weights computed, and targets other than `Hidden` are refused.

There is no importance weight min(π/π_old, C). A weight for the next token would correct an estimate from the
sampled token, where here the sum over the vocabulary is exact, and would favour the positions at which the student has
become surer. What is stale is how often a prefix occurs; the weight for that is the product over all tokens of the
prefix, whose variance grows with every token, and which would be clipped away. The lag is kept small instead."""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from distill.stages.ahead import Written, WrittenAhead
from distill.stages.context import EngineSizes, RunContext
from distill.stages.loop import Spent, StepData, Training, train
from distill.tasks import Problem
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import ModeMix, prompt_ids
from distill.tasks.samples import judge
from distill.training.flops import forward_flops, training_flops
from distill.training.losses import Loss
from distill.training.packing import pack_rollouts, rollout_example, rows_needed
from distill.training.train_step import Batch
from qwen3.decoder.adapter import adapter_parameters
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.field_types import MOST_PROBLEMS, Count, Natural, Problems, check_fields, check_product
from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import MODES, THINKING, Mode, Rollout
from teacher.scoring import Scorer
from teacher.targets import Hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """The student minimises an exact divergence from the teacher, over the whole vocabulary, on its own responses."""

    kind: ClassVar[str] = "OnPolicy"

    prompts_per_step: Problems = 64
    """Training prompts of every step. Those of a file come again, in a new order, when all of them were asked: at
    another step the student generates anew."""
    samples_per_prompt: Count = 1
    """Responses that the student generates to each prompt of a step."""
    modes: ModeMix = dataclasses.field(default_factory=ModeMix)
    thinking: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(max_new_tokens=30_720))
    """How the student samples in thinking mode; temperature 1 without truncation is the policy itself."""
    non_thinking: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(max_new_tokens=8_192))
    """How the student samples in non-thinking mode."""
    max_prompt_tokens: Count = 2_048
    """Most tokens of a prompt, the chat template's own included; a longer one is refused, not cut."""
    loss: Loss = dataclasses.field(default_factory=lambda: Loss(name="reverse_kl"))
    training: Training = dataclasses.field(default_factory=lambda: Training(steps=200, row_length=32_768))
    """How it learns; a step has as many microbatches as its packed rollouts fill."""
    max_staleness: Natural = 0
    """Updates by which the weights that generate a step's rollouts lag behind those that learn from them: step n learns
    from what the weights after max(0, n - max_staleness) updates have written. 0 is strictly on-policy; above it,
    a student on one device trains while the next rollouts are written and scored, and a teacher on devices of its own
    scores while the student generates and trains."""
    samples_every_steps: Count = 25
    """Steps between rollouts that are kept for people to read."""
    start_from: str | None = None
    """Stage whose student this one starts from; None for the stage before."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.training.steps is None:
            raise UserError("training.steps is None; on-policy distillation needs a number of steps")
        drawn = {"prompts_per_step": self.prompts_per_step, "training.steps": self.training.steps}
        check_product(drawn, "for the problems of all steps are kept in memory", MOST_PROBLEMS)
        self.generation.check("prompts_per_step × samples_per_prompt")
        longest = self.max_prompt_tokens + max(self.thinking.max_new_tokens, self.non_thinking.max_new_tokens)
        if longest > self.training.row_length:
            raise UserError(
                f"prompt and response may have {longest} tokens, training.row_length is {self.training.row_length}; "
                "raise it, or lower max_prompt_tokens or max_new_tokens"
            )

    @property
    def generation(self) -> EngineSizes:
        """Of the engine with which the student generates."""
        return EngineSizes(
            batch_size=self.prompts_per_step * self.samples_per_prompt,
            max_prompt_tokens=self.max_prompt_tokens,
            sampling=(self.thinking, self.non_thinking),
        )

    def check_meshes(self, name: str, mesh: Mesh, teacher_mesh: Mesh) -> None:
        """Refuses, by the name of the stage, to generate ahead where nothing would be gained by it."""
        if self.max_staleness and mesh.size > 1 and teacher_mesh == mesh:
            raise UserError(
                f"stages.{name}.max_staleness is {self.max_staleness}, but the student shares {mesh.size} devices with "
                "its teacher, which then wait for each other however old rollouts are; set it to 0, or set "
                "teacher.placement to own_mesh"
            )

    def asked(self, tasks: TaskMixture, seed: int) -> list[tuple[Problem, Mode]]:
        """The prompts of all steps, one step's after the other's, each with its mode. Raises UserError where there are
        none."""
        assert self.training.steps is not None
        problems = tasks.problems("train", self.training.steps * self.prompts_per_step, seed, repeat=True)
        return self.modes.assign(problems, seed, prompts_per_step=self.prompts_per_step)

    def run(self, name: str, model: Qwen3, context: RunContext) -> tuple[Qwen3, Spent]:
        assert self.training.steps is not None
        teacher = context.load_teacher()
        self.check_meshes(name, context.mesh, teacher.mesh)
        scorer = Scorer(teacher.model, teacher.mesh, wanted_on=context.mesh)
        with contextlib.closing(_OwnRollouts(self, name, model, scorer, context)) as data:
            return train(
                name, model, self.training, self.loss, data, context, steps=self.training.steps,
                teacher_head=scorer.head,
            )  # fmt: skip


class _OwnRollouts:
    """Every step: sample from the student, as it is or was `max_staleness` steps ago, score with the teacher, pack."""

    def __init__(self, stage: OnPolicy, name: str, model: Qwen3, scorer: Scorer, context: RunContext):
        assert stage.training.steps is not None
        self._stage, self._name, self._context, self._scorer = stage, name, context, scorer
        self._seed = context.stage_seed(name)
        self._asked = stage.asked(context.tasks, self._seed)
        self._engine = context.engine(model, stage.generation)
        self._adapter_parameters = adapter_parameters(model)
        self._sample_flops = forward_flops(model.config, self._adapter_parameters)
        self._teacher_flops = forward_flops(context.load_teacher().model.config)
        threads = context.mesh.size == 1
        self._ahead = (
            WrittenAhead(stage.max_staleness, stage.training.steps, self._write, self._score, threads=threads)
            if stage.max_staleness
            else None
        )

    def step_data(self, step: int, model: Qwen3, spent: Spent) -> StepData:
        # Where rollouts are generated ahead, these are the seconds that training waits: all else costs it nothing.
        started = time.monotonic()
        written = self._ahead.rollouts(step, model) if self._ahead else self._write(step, step, model)
        sampled = time.monotonic()
        batches = self._ahead.batches() if self._ahead else self._score(written)
        scored = time.monotonic()

        rollouts = written.rollouts
        lengths = [len(rollout.tokens) for rollout in rollouts]
        spent.tokens_sampled += written.tokens
        spent.student_sample_flops += self._sample_flops.of(lengths)
        spent.teacher_flops += self._teacher_flops.of(lengths)
        spent.student_sample_seconds += sampled - started
        spent.teacher_score_seconds += scored - sampled
        generated = written.tokens / written.seconds / self._context.mesh.size
        metrics = self._judged(step, rollouts) | {"tokens_per_second_per_device/generation": generated}
        if self._ahead:
            metrics |= {"staleness": step - rollouts[0].policy_step, "rollout_wait_seconds": scored - started}
        flops = training_flops(model.config, self._adapter_parameters, microbatches=len(batches))
        return StepData(batches=batches, train_flops=flops.of(lengths), metrics=metrics)

    def _asked_at(self, step: int) -> Sequence[tuple[Problem, Mode]]:
        first = step * self._stage.prompts_per_step
        return self._asked[first : first + self._stage.prompts_per_step]

    def _write(self, step: int, policy_step: int, model: Qwen3) -> Written:
        """What `model`, the student after `policy_step` updates, generates for step `step`."""
        started = time.monotonic()
        rollouts = self._engine.generate(
            model,
            self._requests(self._asked_at(step)),
            seed=self._seed,
            policy_step=policy_step,
            step=step,
            on_progress=self._ahead.require_open if self._ahead else None,
        )
        return Written(rollouts=rollouts, seconds=time.monotonic() - started)

    def _requests(self, asked: Sequence[tuple[Problem, Mode]]) -> list[Request]:
        stage = self._stage
        # A small file may give a prompt twice in one step, which are then further samples of it.
        numbers: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)
        return [
            Request(
                prompt_ids=prompt_ids(problem, mode, self._context.tokenizer, flag_fraction=stage.modes.flag_fraction),
                prompt_id=problem.problem_id,
                sample_index=next(numbers[problem.problem_id]),
                mode=mode,
                params=stage.thinking if mode == THINKING else stage.non_thinking,
            )
            for problem, mode in asked
            for _ in range(stage.samples_per_prompt)
        ]

    def _score(self, written: Written) -> list[Batch]:
        """Packed rows with the teacher's hidden states: computed, or where the teacher has devices of its own, being
        computed there while the student trains on the rows before them."""
        rollouts = written.rollouts
        rows, length = self._stage.training.rows, self._stage.training.row_length
        needed = -(-rows_needed([len(rollout.tokens) for rollout in rollouts], length) // rows) * rows
        packed = pack_rollouts(rollouts, rows=needed, length=length, one_per_row=False, to_example=rollout_example)
        batches = []
        for first in range(0, needed, rows):
            part = {name: array[first : first + rows] for name, array in packed.items()}
            targets = self._scorer.hidden(part["tokens"], part["positions"], part["segment_ids"])
            if not isinstance(targets, Hidden):
                raise ValueError(
                    f"targets are {type(targets).__name__}; an on-policy divergence is computed under the current "
                    "student from Hidden targets, whoever generated the rollouts"
                )
            batches.append(Batch.of(part, targets))
        if self._context.load_teacher().mesh == self._context.mesh:
            # Without waiting, the teacher's time would be counted as the student's.
            jax.block_until_ready([batch.targets for batch in batches])
        return batches

    def _judged(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """By mode: accuracy where there are answers, length and share of finished responses. Every now and then a
        rollout for people."""
        by_id = {problem.problem_id: problem for problem, _ in self._asked_at(step)}
        context = self._context
        samples = [judge(rollout, by_id[rollout.prompt_id], context.tokenizer, context.tasks) for rollout in rollouts]
        metrics: dict[str, float] = {}
        shown = []
        for mode in MODES:
            of_mode = [sample for sample in samples if sample.mode == mode]
            if of_mode:
                graded = [sample.correct for sample in of_mode if sample.correct is not None]
                if graded:
                    metrics[f"accuracy/{mode}"] = _mean(graded)
                metrics[f"response_tokens/{mode}"] = _mean(sample.response_tokens for sample in of_mode)
                metrics[f"finished/{mode}"] = _mean(sample.finished for sample in of_mode)
                shown.append(of_mode[0])
        if step % self._stage.samples_every_steps == 0:
            context.metrics.samples(step + 1, shown, stage=self._name)
        return metrics

    def state(self) -> Mapping[str, Any]:
        # Rollouts depend on weights, seed and step alone: only those of weights that are gone must be kept.
        return self._ahead.state() if self._ahead else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        if self._ahead:
            self._ahead.restore(state)

    def close(self) -> None:
        if self._ahead:
            self._ahead.close()


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
