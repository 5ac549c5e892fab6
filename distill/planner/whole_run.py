"""How often a run calls each of its programs, and what it moves from teacher to student, under stated assumptions."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from distill.experiment import Experiment, asks_teacher, scoring_passes
from distill.planner.program import EVALUATION, Program, Purpose, trained_places
from distill.stages import Grpo, OffPolicy, OnPolicy, Sft
from distill.tasks.requests import ModeMix
from distill.training.flops import forward_flops, training_flops
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import THINKING

_COMPARING: tuple[Purpose, ...] = ("teacher_scores", "student_scores")
_STORED_BYTES = 8
"""Of an entry in a store: an id and a log-probability, before compression."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan cannot know, as shares of what is known."""

    efficiency: float = 0.5
    """Share of a program's roof that is reached, by programs that do not decode."""
    decoding_efficiency: float = 0.25
    """Share of the roof that is reached by programs that decode, a token of every sequence at a time."""
    response_share: float = 0.25
    """Mean response, as a share of the stage's max_new_tokens."""
    prompt_share: float = 0.25
    """Mean prompt, as a share of max_prompt_tokens."""
    filled_share: float = 0.9
    """Tokens in a packed row, as a share of its length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A teacher that scores on devices of its own while the student works."""

    steps: float
    batches: float
    """Of rollouts, each of which serves one or several steps."""
    passes: int
    """Over each batch; what the teacher says in the first serves them all."""
    microbatches: float
    """Of a step; the student trains on one while the teacher scores those after it."""
    ahead: bool
    """Rollouts are generated ahead (max_staleness), and scored while the student generates and trains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage's calls of each program, by purpose."""

    stage: str
    calls: Mapping[Purpose, float]
    tokens_moved: float = 0.0
    """That the student learns from and the teacher has scored."""
    student_tokens: float = 0.0
    """That went through the student, prompts included, while it generated and, of older rollouts, scored."""
    bytes_moved: float = 0.0
    """Of the targets, from teacher to student."""
    pipeline: Pipeline | None = None
    """None where one program follows the other."""

    def elapsed_seconds(self, seconds: Mapping[Purpose, float]) -> float:
        """Of the whole stage, from what its programs take by purpose.

        Within a step of the first pass, all of the slower one's microbatches and one of the other's, before the first
        or after the last. Generated ahead, what the student does in all, or the teacher with the first batch's rollouts
        before and the last microbatch and update after it.
        """
        total, pipeline = sum(seconds.values()), self.pipeline
        if pipeline is None:
            return total
        scores, trains = seconds["teacher_scores"], seconds["student_trains"]
        if not pipeline.ahead:
            return total - min(scores, trains / pipeline.passes) * (1 - 1 / pipeline.microbatches)
        first = (seconds["student_prefills"] + seconds["student_generates"]) / pipeline.batches
        last = (trains / pipeline.microbatches + seconds["student_updates"]) / pipeline.steps
        return max(total - scores, first + scores + last)


def stage_plans(experiment: Experiment, programs: Sequence[Program], assumed: Assumptions) -> list[StagePlan]:
    """Every stage, then all evaluations together, if there are any."""
    run = _Run(experiment, programs, assumed)
    evaluations = [run.evaluation()] if experiment.evaluation.problems else []
    return [run.stage(name) for name in experiment.stages] + evaluations


class _Run:
    def __init__(self, experiment: Experiment, programs: Sequence[Program], assumed: Assumptions):
        self._experiment, self._assumed = experiment, assumed
        self._programs = {(program.stage, program.purpose): program for program in programs}

    def stage(self, name: str) -> StagePlan:
        stage = self._experiment.stages[name]
        if isinstance(stage, Sft):
            return StagePlan(
                stage=name, calls=self._updates(name, stage.training.steps or 0, stage.microbatches_per_step)
            )
        if isinstance(stage, OnPolicy | Grpo):
            return self._on_policy(name, stage)
        calls: dict[Purpose, float] = {}
        moved = 0.0
        if stage.writes:
            response = self._response(stage.modes, stage.thinking, stage.non_thinking)
            prompt = self._assumed.prompt_share * stage.max_prompt_tokens
            calls |= self._generation(name, "teacher", stage.prompts, response)
            calls["teacher_scores"] = stage.prompts * (prompt + response) / self._row_tokens(name, "teacher_scores")
            moved = stage.prompts * response
        steps = stage.training.steps or self._affordable(name, stage, moved)
        entries = stage.sampled_tokens or stage.top_k
        return StagePlan(
            stage=name,
            calls=calls | self._updates(name, steps, stage.microbatches_per_step),
            tokens_moved=moved,
            bytes_moved=moved * (_STORED_BYTES * entries + 4),
        )

    def _on_policy(self, name: str, stage: OnPolicy | Grpo) -> StagePlan:
        assert stage.training.steps is not None
        steps, sequences = stage.training.steps, stage.generation.batch_size
        updates, prompt = stage.updates_per_batch * stage.passes, self._assumed.prompt_share * stage.max_prompt_tokens
        batches = steps // updates
        # All that may be asked in the place of groups without signal, so many at a time as there are.
        asked = 1 + stage.prompts_beside / stage.prompts_per_step if isinstance(stage, Grpo) else 1.0
        passes = scoring_passes(stage)
        # What several teachers are asked about is packed apart.
        teachers = len(self._experiment.all_teachers) if asks_teacher(stage) else 1
        calls: dict[Purpose, float] = {}
        tokens = 0.0
        for batch in range(batches):
            response, longest = self._own_responses(stage, batch, batches)
            written = sequences * (prompt + response)
            of_update = written / stage.updates_per_batch
            microbatches = max(teachers, math.ceil(of_update / self._row_tokens(name, "student_trains")))
            tokens += written
            in_turns = math.ceil(asked) * longest
            _add(calls, self._generation(name, "student", asked * sequences, response, longest=in_turns))
            if passes:
                packed = math.ceil(written / self._row_tokens(name, "student_scores"))
                _add(calls, {"student_scores": float(passes * packed)})
            _add(calls, self._updates(name, updates, microbatches))
            if asks_teacher(stage):
                _add(calls, {"teacher_scores": float(stage.updates_per_batch * microbatches)})
        student_tokens = (asked + passes) * tokens
        if not asks_teacher(stage):
            return StagePlan(stage=name, calls=calls, student_tokens=student_tokens)
        scores, trains = self._programs[name, "teacher_scores"], self._programs[name, "student_trains"]
        positions = calls["teacher_scores"] * stage.training.rows * trained_places(trains)
        dtypes = {teacher.dtype for teacher in self._experiment.all_teachers.values()}
        width = 4 if "float32" in dtypes else 2
        hidden, named = scores.model.hidden_size * width, stage.targets.entries * _STORED_BYTES if stage.targets else 0
        return StagePlan(
            stage=name,
            calls=calls,
            tokens_moved=tokens,
            student_tokens=student_tokens,
            bytes_moved=float(positions * (named or hidden)),
            pipeline=None
            if scores.mesh == trains.mesh
            else Pipeline(
                steps=steps,
                batches=batches,
                passes=stage.passes,
                microbatches=calls["student_trains"] / steps,
                ahead=stage.max_staleness > 0,
            ),
        )

    def _own_responses(self, stage: OnPolicy | Grpo, batch: int, batches: int) -> tuple[float, float]:
        """The mean response of a batch of a student's own rollouts, and the longest: prefixes are as long as the mean
        of whole responses, or as their limit where that is less."""
        whole = self._response(stage.modes, stage.thinking, stage.non_thinking)
        budget = max(stage.thinking.max_new_tokens, stage.non_thinking.max_new_tokens)
        schedule = stage.rollout_tokens
        if schedule is None:
            return whole, budget
        in_full, share, assumed = schedule.share_in_full(batch), stage.modes.thinking_fraction, self._assumed
        limit = schedule.limit(batch, batches, budget)
        prefix = sum(
            part * min(assumed.response_share * params.max_new_tokens, limit)
            for part, params in ((share, stage.thinking), (1 - share, stage.non_thinking))
        )
        return in_full * whole + (1 - in_full) * prefix, budget if in_full else min(limit, budget)

    def evaluation(self) -> StagePlan:
        asked = self._experiment.evaluation
        students = 1 + len(self._experiment.stages)
        calls: dict[Purpose, float] = {}
        for mode in asked.modes:
            params = asked.thinking if mode == THINKING else asked.non_thinking
            response = self._assumed.response_share * params.max_new_tokens
            count = asked.problems * asked.samples_per_problem
            for role, times in (("student", students), ("teacher", 1)):
                if role == "teacher" and not self._experiment.all_teachers:
                    continue
                _add(calls, self._generation(EVALUATION, role, count, response), times)
            if self._experiment.compares:
                # Of every problem the teacher's response and the student's first one, by both models.
                tokens = 2 * asked.problems * (self._assumed.prompt_share * asked.max_prompt_tokens + response)
                _add(calls, {one: tokens / self._row_tokens(EVALUATION, one) for one in _COMPARING}, students)
        return StagePlan(stage=EVALUATION, calls=calls)

    def _generation(
        self, stage: str, role: str, sequences: float, response: float, *, longest: float | None = None
    ) -> dict[Purpose, float]:
        """Calls that generate so many sequences: slots that are refilled stay full; others, which all begin at once,
        wait for the longest response."""
        prefills: Purpose = "teacher_prefills" if role == "teacher" else "student_prefills"
        generates: Purpose = "teacher_generates" if role == "teacher" else "student_generates"
        reader, writer = self._programs[stage, prefills], self._programs[stage, generates]
        tokens = max(sequences * response / writer.rows, response) if longest is None else longest
        return {prefills: math.ceil(sequences / reader.rows), generates: tokens}

    def _updates(self, name: str, steps: float, microbatches: float) -> dict[Purpose, float]:
        calls: dict[Purpose, float] = {"student_trains": float(steps * microbatches), "student_updates": float(steps)}
        if (name, "student_routes") in self._programs and microbatches > 1:
            calls["student_routes"] = calls["student_trains"]
        return calls

    def _row_tokens(self, stage: str, purpose: Purpose) -> float:
        program = self._programs[stage, purpose]
        return program.rows * program.length * self._assumed.filled_share

    def _response(self, modes: ModeMix, thinking: SamplingParams, non_thinking: SamplingParams) -> float:
        share = modes.thinking_fraction
        mean = share * thinking.max_new_tokens + (1 - share) * non_thinking.max_new_tokens
        return self._assumed.response_share * mean

    def _affordable(self, name: str, stage: OffPolicy, generated_tokens: float) -> float:
        """Steps that the FLOPs of the stage `flops_of` pay for, teacher included."""
        assert stage.flops_of is not None
        other = self.stage(stage.flops_of)
        student = self._programs[name, "student_trains"]
        microbatches = other.calls["student_trains"] / other.calls["student_updates"]
        trained = other.calls["student_trains"] * self._microbatch_flops(stage.flops_of, microbatches)
        teacher = next((p.model for p in self._programs.values() if p.purpose.startswith("teacher")), student.model)
        by_student, by_teacher = forward_flops(student.model, student.adapter_parameters), forward_flops(teacher)
        budget = trained + other.student_tokens * by_student.per_token
        # What a teacher has generated it scores, too.
        read = other.tokens_moved * (2 if isinstance(self._experiment.stages[stage.flops_of], OffPolicy) else 1)
        budget += by_teacher.executed(read, 0, read * self._head_share(stage.flops_of))
        budget -= 2 * generated_tokens * by_teacher.per_token
        step = stage.microbatches_per_step * self._microbatch_flops(name, stage.microbatches_per_step)
        return max(1.0, budget // step)

    def _microbatch_flops(self, name: str, microbatches: float) -> float:
        """Training FLOPs of one of a stage's microbatches, of which a step has so many."""
        student = self._programs[name, "student_trains"]
        flops = training_flops(student.model, student.adapter_parameters, microbatches=math.ceil(microbatches))
        tokens = self._row_tokens(name, "student_trains")
        return flops.executed(tokens, 0, tokens * self._head_share(name))

    def _head_share(self, name: str) -> float:
        """Of the positions of a stage's rows, at which heads are multiplied out."""
        student = self._programs[name, "student_trains"]
        return trained_places(student) / student.length


def _add(calls: dict[Purpose, float], more: Mapping[Purpose, float], times: float = 1) -> None:
    for purpose, count in more.items():
        calls[purpose] = calls.get(purpose, 0.0) + times * count
