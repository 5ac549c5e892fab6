"""What a model does with held-out problems, by mode, from several samples a problem: how often it is right where there
are answers, and how far it is from its teacher where there is one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from distill.evaluation import parts
from distill.evaluation.comparison import Comparison, Figures, perplexity
from distill.evaluation.pass_at_k import mean_pass_at_k, pass_at_1_standard_error
from distill.monitor.metrics import RolloutSample
from distill.report.results import EvaluationRow, LengthHistogram, scalars_of, with_error
from distill.stages.context import EngineSizes, RunContext
from distill.stages.stopping import Interrupted
from distill.tasks.problem import Problem
from distill.tasks.requests import asked_in, prompt_ids, teacher_prompt_ids
from distill.tasks.samples import judge, judged_by
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.field_types import MOST_PROBLEMS, Count, Natural, check_fields, check_product
from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams, non_thinking_params, thinking_params
from qwen3.hosts.processes import require_same
from qwen3.rollout import MODES, NON_THINKING, THINKING, Mode, Rollout, with_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured before training and after every stage.

    Problems with an answer are graded. Where there is a teacher, it answers every problem once, before all students,
    and students are compared with it, whether or not there are answers.
    """

    problems: Natural = 200
    """Held-out problems, the same for every model and seed; one whose data names a mode is asked in that mode only. 0
    evaluates nothing."""
    samples_per_problem: Count = 8
    """Responses to each problem in each mode; pass@1 is the mean over those that can be graded."""
    pass_at: tuple[Count, ...] = (8,)
    """k of the pass@k that are reported beside pass@1; each at most samples_per_problem."""
    modes: tuple[Mode, ...] = MODES
    """The modes that are measured."""
    thinking: SamplingParams = dataclasses.field(default_factory=lambda: thinking_params(30_720))
    """How every model samples in thinking mode."""
    non_thinking: SamplingParams = dataclasses.field(default_factory=lambda: non_thinking_params(8_192))
    """How every model samples in non-thinking mode."""
    max_prompt_tokens: Count = 2_048
    """Most tokens of a prompt, the chat template's own included; a longer one is refused, not cut."""
    batch_size: Count = 128
    """Sequences generated at once."""
    shown: Natural = 4
    """Problems whose first response by each model and in each mode is kept for people to read side by side."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        for name in ("pass_at", "modes"):
            entries = getattr(self, name)
            if twice := [entry for entry in entries if entries.count(entry) > 1]:
                raise UserError(f"evaluation.{name} holds {twice[0]!r} twice; leave one")
        if not self.modes:
            raise UserError(f"evaluation.modes is empty; name one or both of {' and '.join(MODES)}")
        asked = {"evaluation.problems": self.problems, "samples_per_problem": self.samples_per_problem}
        check_product(asked, "for all responses are kept in memory", MOST_PROBLEMS)
        self.generation.check("evaluation.batch_size")
        if bad := [k for k in self.pass_at if k > self.samples_per_problem]:
            raise UserError(
                f"evaluation.pass_at holds {bad[0]}, but samples_per_problem is {self.samples_per_problem}; "
                "pass@k needs at least k samples"
            )

    @property
    def generation(self) -> EngineSizes:
        """Of the engine with which every model generates."""
        return EngineSizes(
            batch_size=self.batch_size,
            max_prompt_tokens=self.max_prompt_tokens,
            sampling=tuple(self.sampling(mode) for mode in self.modes),
        )

    def sampling(self, mode: Mode) -> SamplingParams:
        return {THINKING: self.thinking, NON_THINKING: self.non_thinking}[mode]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation has found out about a model."""

    rows: list[EvaluationRow]
    """One for each mode."""
    responses: list[Rollout]
    """The first response to each problem, of every mode."""


class Evaluator:
    """Evaluates models of one architecture; the programs are compiled once and serve every stage."""

    def __init__(
        self,
        evaluation: Evaluation,
        context: RunContext,
        teacher_responses: Callable[[], Sequence[Rollout]] | None = None,
    ):
        """With `teacher_responses`, which are asked for when the first of them is needed, models are compared with the
        teacher."""
        self._evaluation, self._context, self._teacher_responses = evaluation, context, teacher_responses
        # The problems do not depend on the run's seed, so that runs of several seeds can be compared.
        self._problems = context.tasks.problems("held_out", evaluation.problems, seed=0)

    @functools.cached_property
    def _comparison(self) -> Comparison | None:
        if self._teacher_responses is None:
            return None
        return Comparison(self._evaluation.generation, self._context, self._teacher_responses(), self._problems)

    def evaluate(self, name: str, model: Qwen3 | None) -> Evaluated:
        """Of a student, or where `model` is None of the teacher, of several each on the problems it is asked about.

        Raises Interrupted between batches where the run was asked to stop."""
        # The teacher comes before the first student that is compared with it.
        comparison = self._comparison
        rows: list[EvaluationRow] = []
        responses: list[Rollout] = []
        shown: list[RolloutSample] = []
        for mode in self._evaluation.modes:
            problems = asked_in(mode, self._problems)
            rollouts, samples = self._sampled(name, model, mode, problems)
            own = rollouts[:: self._evaluation.samples_per_problem]
            if comparison is not None and model is not None:
                figures = comparison.figures(name, model, mode, own)
            else:
                figures = _of_teacher(own) if model is None else Figures()
            rows.append(self._row(name, mode, problems, samples, figures))
            responses += own
            firsts = samples[:: self._evaluation.samples_per_problem]
            shown += [firsts[place] for place in parts.of_each_family(problems, self._evaluation.shown)]
        self._context.metrics.evaluation(
            name,
            scalars_of(rows),
            shown,
            step=self._context.costs[name].steps if name in self._context.costs else 0,
            followers=[stage for stage, start in self._context.starts.items() if start == name],
        )
        return Evaluated(rows=rows, responses=responses)

    def _sampled(
        self, name: str, model: Qwen3 | None, mode: Mode, problems: Sequence[Problem]
    ) -> tuple[list[Rollout], list[RolloutSample]]:
        """`samples_per_problem` to each problem in turn, and what they are judged to be."""
        evaluation, context = self._evaluation, self._context
        requests = [
            Request(
                prompt_ids=(teacher_prompt_ids if model is None else prompt_ids)(problem, mode, context.tokenizer),
                prompt_id=problem.problem_id,
                sample_index=sample,
                mode=mode,
                params=evaluation.sampling(mode),
            )
            for problem in problems
            for sample in range(evaluation.samples_per_problem)
        ]
        require_same(f"the requests that evaluate {name}", lambda: repr(requests).encode())
        with context.progress.task(evaluation_title(name, mode), len(requests), unit="responses") as bar:

            def on_progress(rollouts: int, tokens: int) -> None:
                bar.advance(rollouts, tokens=tokens)
                if context.stop.agreed():
                    raise Interrupted(f"evaluation of {name}: it starts again with the next run")

            asked = [problem for problem in problems for _ in range(evaluation.samples_per_problem)]
            found: dict[int, Rollout] = {}
            for teacher in context.teachers if model is None else ("",):
                own = [place for place, one in enumerate(asked) if model is not None or one.teacher == teacher]
                if own:
                    answering = context.load_teacher(teacher).model if model is None else model
                    found |= zip(
                        own,
                        context.engine(answering, evaluation.generation).generate(
                            answering,
                            [requests[place] for place in own],
                            seed=context.stage_seed("evaluation"),
                            policy_step=0,
                            on_progress=on_progress,
                        ),
                        strict=True,
                    )
            rollouts = judged_by([found[place] for place in range(len(requests))], asked)
            if model is None:
                # Students are compared on the responses after the prompts that they read.
                rollouts = [
                    with_prompt(rollout, prompt_ids(problem, mode, context.tokenizer))
                    if problem.teacher_prompt
                    else rollout
                    for rollout, problem in zip(rollouts, asked, strict=True)
                ]
            samples = self._judged(problems, rollouts)
            bar.result = self._result(samples)
        return rollouts, samples

    def _judged(self, problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> list[RolloutSample]:
        by_id, context = {problem.problem_id: problem for problem in problems}, self._context
        return [judge(rollout, by_id[rollout.prompt_id], context.tokenizer, context.tasks) for rollout in rollouts]

    def _graded(self, samples: Sequence[RolloutSample]) -> tuple[list[int], list[int]]:
        """The places of the problems that have an answer, and how many responses to each of them are right."""
        count = self._evaluation.samples_per_problem
        by_problem = [samples[first : first + count] for first in range(0, len(samples), count)]
        graded = [place for place, of_problem in enumerate(by_problem) if of_problem[0].correct is not None]
        return graded, [sum(bool(sample.correct) for sample in by_problem[place]) for place in graded]

    def _result(self, samples: Sequence[RolloutSample]) -> str:
        """What the progress bar ends in: pass@1 with its error, or without answers the share that ended."""
        _, correct = self._graded(samples)
        count = self._evaluation.samples_per_problem
        if not correct:
            return f"{100 * sum(sample.finished for sample in samples) / len(samples):.1f} % ended"
        return f"{with_error(mean_pass_at_k(correct, count, 1), pass_at_1_standard_error(correct, count))} %"

    def _row(
        self,
        name: str,
        mode: Mode,
        problems: Sequence[Problem],
        samples: Sequence[RolloutSample],
        figures: Figures,
    ) -> EvaluationRow:
        evaluation, count = self._evaluation, self._evaluation.samples_per_problem
        graded, correct = self._graded(samples)
        with_answer = [problems[place] for place in graded]
        lengths = [sample.response_tokens for sample in samples]
        return EvaluationRow(
            model=name,
            mode=mode,
            problems=len(problems),
            samples_per_problem=count,
            mean_response_tokens=sum(lengths) / len(samples),
            finished=sum(sample.finished for sample in samples) / len(samples),
            pass_at_1=mean_pass_at_k(correct, count, 1) if graded else None,
            pass_at_1_stderr=pass_at_1_standard_error(correct, count) if graded else None,
            pass_at_k={k: mean_pass_at_k(correct, count, k) for k in evaluation.pass_at} if graded else {},
            graded_problems=len(graded),
            working_correct=parts.working_correct(problems, samples) if mode == THINKING else None,
            length_histogram=LengthHistogram.of(lengths, evaluation.sampling(mode).max_new_tokens),
            by_task=parts.scores(with_answer, parts.task, correct, count),
            by_family=parts.scores(with_answer, parts.family, correct, count),
            by_teacher=parts.scores(with_answer, parts.teacher, correct, count),
            **figures,
        )


def _of_teacher(responses: Sequence[Rollout]) -> Figures:
    """The teacher's perplexity on its own responses, from what it said of each token as it generated it."""
    surprises = np.concatenate([-rollout.sampler_logprobs[rollout.loss_mask] for rollout in responses])
    if not len(surprises):
        return Figures()
    return Figures(perplexity=perplexity(float(np.mean(surprises, dtype=np.float64))), compared_tokens=len(surprises))


def evaluation_title(name: str, mode: Mode) -> str:
    """What the progress bar of one model's evaluation in one mode is called."""
    return f"evaluating {name}, {mode.replace('_', '-')}"
