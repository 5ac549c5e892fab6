"""What can be known to fail before a run spends anything: from fields, file headers and prompts, without a weight.

Otherwise it would fail once a stage comes to it, after hours of the teacher's time.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeVar

from jax.sharding import Mesh

from distill.evaluation.evaluate import Evaluation
from distill.experiment import Experiment, asks_for_hidden
from distill.monitor.progress import Progress
from distill.monitor.progress import Task as Bar
from distill.runner.chat_format import check_chat_format
from distill.stages import Grpo, OffPolicy, OnPolicy, Sft, Stage
from distill.stages.asking import fresh_steps
from distill.stages.context import stage_seed
from distill.tasks import Problem
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import asked_in, prompt_ids, raw_document, teacher_prompt_ids, worked_document
from qwen3.chat.chat import ChatTokenizer
from qwen3.checkpoint import hf
from qwen3.decoder.config import ModelConfig
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import Mode
from qwen3.sharding import partition_spec
from student.init import FromCheckpoint
from teacher.dialects import kinds_of

_SHOWN_CHARACTERS = 60
_PROMPTS_AT_ONCE = 256
_Drawn = TypeVar("_Drawn")


def preflight(
    experiment: Experiment,
    mesh: Mesh,
    teacher_mesh: Mesh,
    tokenizer: ChatTokenizer,
    tasks: TaskMixture,
    progress: Progress,
    finished: Collection[str] = (),
) -> None:
    """Refuses, naming field, value and remedy, what the stages that are not `finished` or an evaluation would refuse.

    Says what of the tasks' data is left out, and why.
    Takes about a quarter of a second for a thousand prompts, nearly all of it for their tokens. Raises UserError.
    """
    stages = {name: stage for name, stage in experiment.stages.items() if name not in finished}
    experiment.check_meshes(mesh, teacher_mesh)
    models = _checked_models(experiment, teacher_mesh)
    experiment.kernels.check(
        models["student"], experiment.compute_dtype, mesh, tokens_per_target=experiment.tokens_per_target
    )
    on_policy = any(asks_for_hidden(stage) for stage in stages.values())
    for name, teacher in experiment.all_teachers.items():
        config = models[_role(name)]
        if teacher.placement != "service":
            experiment.kernels.check(config, teacher.dtype, teacher_mesh)
        if on_policy or experiment.compares:
            # On-policy and in evaluation, the teacher's head goes to the student's devices.
            partition_spec(("embed",), (config.hidden_size,), mesh)
    check_chat_format(experiment, stages, tokenizer)
    if experiment.evaluation.problems:
        _check_evaluation_lengths(experiment.evaluation, models)
    for name, stage in stages.items():
        _check_stage_lengths(f"stages.{name}", stage, models)
    asked = [_of_evaluation(experiment.evaluation, tasks)] if experiment.evaluation.problems else []
    for name, stage in stages.items():
        of_stage = _of_stage(f"stages.{name}", stage, stage_seed(experiment.seed, name), tasks)
        asked += [of_stage] if of_stage else []
    with progress.task("checking prompts", sum(len(one.prompts) for one in asked), unit="prompts") as bar:
        for one in asked:
            _check_asked(one, tokenizer, models, bar)
    unasked = next((one.unasked for one in asked if one.unasked), 0)
    if unasked:
        progress.print(
            f"data       evaluation leaves out {unasked} of its {experiment.evaluation.problems} problems, which ask "
            "for a mode that is not in evaluation.modes"
        )
    if experiment.evaluates_teacher and not experiment.compares:
        servers = sorted(
            {teacher.server for teacher in experiment.all_teachers.values() if "hidden" not in kinds_of(teacher.server)}
        )
        progress.print(
            f"evaluation grades students and does not compare them with the teacher: {' and '.join(servers)} gives no "
            "hidden states"
        )
    for line in tasks.left_out():
        progress.print(f"data       {line}")


def _checked_models(experiment: Experiment, teacher_mesh: Mesh) -> dict[str, ModelConfig]:
    """The architectures by role, after a look at the headers of all weight files."""
    models = {"student": experiment.student.model_config()}
    if isinstance(experiment.student, FromCheckpoint):
        hf.check(experiment.student.path)
    for name, teacher in experiment.all_teachers.items():
        # Of a served teacher the weights are elsewhere.
        served, path = teacher.placement == "service", teacher.path
        models[_role(name)] = ModelConfig.from_folder(path) if served else hf.check(path, teacher_mesh)
    return models


def _role(teacher: str) -> str:
    """What messages call the teacher of this name, which is empty for an only one."""
    return f"teacher {teacher}" if teacher else "teacher"


def _check_evaluation_lengths(evaluation: Evaluation, models: Mapping[str, ModelConfig]) -> None:
    sampling = [evaluation.sampling(mode) for mode in evaluation.modes]
    _check_positions("evaluation", evaluation.max_prompt_tokens, sampling, models)


def _check_stage_lengths(field: str, stage: Stage, models: Mapping[str, ModelConfig]) -> None:
    if isinstance(stage, Sft) or (isinstance(stage, OffPolicy) and not stage.writes):
        return
    _check_positions(field, stage.max_prompt_tokens, [stage.thinking, stage.non_thinking], models)
    smallest = min(config.vocab_size for config in models.values())
    if isinstance(stage, OffPolicy) and stage.sampled_tokens is None and stage.top_k > smallest:
        raise UserError(
            f"{field}.top_k is {stage.top_k}, but the teacher's vocabulary has {smallest} entries; lower it"
        )
    if isinstance(stage, OnPolicy | Grpo) and stage.targets is not None and stage.targets.k > smallest:
        raise UserError(f"{field}.targets.k is {stage.targets.k}, but the vocabulary has {smallest} entries; lower it")


def _check_positions(
    field: str, max_prompt_tokens: int, sampling: Sequence[SamplingParams], models: Mapping[str, ModelConfig]
) -> None:
    longest = max_prompt_tokens + max(params.max_new_tokens for params in sampling)
    largest = max((one for params in sampling for one in params.stop_ids or ()), default=0)
    for role, config in models.items():
        if largest >= config.vocab_size:
            raise UserError(
                f"{field}: stop_ids holds {largest}, but the {role}'s vocabulary has {config.vocab_size} entries; "
                "name ids below that"
            )
        if longest > config.longest_context:
            raise UserError(
                f"{field}: prompt and response may have {longest} tokens, but the {role}'s positions end at "
                f"{config.longest_context} (max_position_embeddings); lower max_prompt_tokens or max_new_tokens"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """Prompts, or for supervised stages whole documents, that must fit a limit."""

    field: str
    limit: str
    """The field of the limit."""
    limit_tokens: int
    prompts: Sequence[tuple[Problem, Mode]]
    flag_fraction: float = 0.0
    documents: Literal["chat", "raw"] | None = None
    """Their form; None where only the prompts are there yet."""
    unasked: int = 0
    """Problems beside them that are asked in no mode."""

    def tokens(self, problem: Problem, mode: Mode, tokenizer: ChatTokenizer) -> int:
        if self.documents == "raw":
            return len(raw_document(problem, tokenizer).tokens)
        if self.documents == "chat":
            return len(worked_document(problem, mode, tokenizer, flag_fraction=self.flag_fraction).tokens)
        return max(
            len(ids(problem, mode, tokenizer, flag_fraction=self.flag_fraction))
            for ids in (prompt_ids, teacher_prompt_ids)[: 1 + (problem.teacher_prompt is not None)]
        )


def _of_evaluation(evaluation: Evaluation, tasks: TaskMixture) -> _Asked:
    count = evaluation.problems
    problems = _drawn("evaluation.problems", count, lambda: tasks.problems("held_out", count, seed=0))
    for mode in evaluation.modes:
        if not asked_in(mode, problems):
            raise UserError(
                f"evaluation.modes has {mode!r}, but the data asks for all of its {count} problems in the other mode; "
                "leave that mode out"
            )
    return _Asked(
        field="evaluation",
        limit="max_prompt_tokens",
        limit_tokens=evaluation.max_prompt_tokens,
        prompts=[(problem, mode) for mode in evaluation.modes for problem in asked_in(mode, problems)],
        unasked=sum(problem.mode not in (None, *evaluation.modes) for problem in problems),
    )


def _of_stage(field: str, stage: Stage, seed: int, tasks: TaskMixture) -> _Asked | None:
    """What a stage will ask its policy, or train on; None where it reads targets that are there."""
    if isinstance(stage, OffPolicy) and not stage.writes:
        return None
    if isinstance(stage, Sft):
        return _Asked(
            field=field,
            limit="training.row_length",
            limit_tokens=stage.training.row_length,
            prompts=_drawn(f"{field}.problems", stage.problems, lambda: stage.asked(tasks, seed)),
            flag_fraction=stage.modes.flag_fraction,
            documents=stage.form,
        )
    if isinstance(stage, OnPolicy | Grpo):
        count = stage.prompts_per_step * fresh_steps(stage)
        asked = _drawn(f"{field}.prompts_per_step × steps", count, lambda: stage.asked(tasks, seed))
    else:
        asked = _drawn(f"{field}.prompts", stage.prompts, lambda: stage.asked(tasks, seed))
    return _Asked(
        field=field,
        limit="max_prompt_tokens",
        limit_tokens=stage.max_prompt_tokens,
        # Those of a file come again at another step.
        prompts=list({(problem.problem_id, mode): (problem, mode) for problem, mode in asked}.values()),
        flag_fraction=stage.modes.flag_fraction,
    )


def _drawn(field: str, count: int, draw: Callable[[], list[_Drawn]]) -> list[_Drawn]:
    try:
        return draw()
    except UserError as error:
        raise UserError(f"{field} is {count}, but {error}") from None


def _check_asked(asked: _Asked, tokenizer: ChatTokenizer, models: Mapping[str, ModelConfig], bar: Bar) -> None:
    most, longest = 0, ""
    for number, (problem, mode) in enumerate(asked.prompts, start=1):
        if asked.documents != "raw" and mode not in tokenizer.modes:
            # The stage's own fields ask for no such mode: `check_chat_format`.
            raise UserError(
                f"{asked.field}: the data asks for {mode} mode, as in {_shown(problem.prompt)}, and the chat format of "
                f"{tokenizer.folder} has {', '.join(tokenizer.modes)} only; take that mode out of the data"
            )
        tokens = asked.tokens(problem, mode, tokenizer)
        if tokens > most:
            most, longest = tokens, problem.prompt
        if number % _PROMPTS_AT_ONCE == 0:
            bar.advance(_PROMPTS_AT_ONCE)
    bar.advance(len(asked.prompts) % _PROMPTS_AT_ONCE)
    what = "prompt" if asked.documents is None else "document"
    shown = _shown(longest)
    if most > asked.limit_tokens:
        raise UserError(
            f"{asked.field}.{asked.limit} is {asked.limit_tokens}, but the longest {what}, of {shown}, has {most} "
            "tokens; raise it, or leave that problem out"
        )
    if asked.documents is not None and most > models["student"].longest_context:
        raise UserError(
            f"{asked.field}: the longest {what}, of {shown}, has {most} tokens, but the student's positions end at "
            f"{models['student'].longest_context} (max_position_embeddings); leave that problem out"
        )


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= _SHOWN_CHARACTERS else f"{prompt[:_SHOWN_CHARACTERS]}…")
