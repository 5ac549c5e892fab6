"""What an experiment asks of the chat format, before anything is spent: modes that the template has, and thinking
budgets that leave room for an answer. Both rest on the tokenizer, which no field can know."""

from collections.abc import Iterator, Mapping

from distill.experiment import Experiment
from distill.stages import OffPolicy, Sft, Stage
from qwen3.chat.chat import ChatTokenizer
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import MODES, THINKING

_ANSWER_TOKENS = 2
"""One token of an answer, and the one that ends it."""


def check_chat_format(experiment: Experiment, stages: Mapping[str, Stage], tokenizer: ChatTokenizer) -> None:
    """Refuses what evaluation and `stages`, those still to be run, cannot have of this tokenizer. Raises UserError."""
    _check_modes(experiment, stages, tokenizer)
    if THINKING not in tokenizer.modes:
        return
    for field, params in _thinking(experiment, stages):
        _check_budget(field, params, tokenizer)


def _check_modes(experiment: Experiment, stages: Mapping[str, Stage], tokenizer: ChatTokenizer) -> None:
    if not tokenizer.modes:
        tokenizer.check_mode(THINKING)
    if len(tokenizer.modes) == len(MODES):
        return
    (only,) = tokenizer.modes
    fraction = float(only == THINKING)
    remedies = []
    if any(mode != only for mode in experiment.evaluation.modes):
        remedies.append(f"evaluation.modes to ({only!r},)")
    remedies += [
        f"stages.{name}.modes.thinking_fraction to {fraction:g}"
        for name, stage in stages.items()
        if _asks(stage) and stage.modes.thinking_fraction != fraction
    ]
    if remedies:
        raise UserError(f"{tokenizer.folder}: its chat format has {only} mode only; set {', '.join(remedies)}")


def _asks(stage: Stage) -> bool:
    """Whether a stage has prompts in a mode: running text has none, and stored targets had theirs."""
    return stage.form == "chat" if isinstance(stage, Sft) else not _reads_targets(stage)


def _reads_targets(stage: Stage) -> bool:
    return isinstance(stage, OffPolicy) and not stage.writes


def _thinking(experiment: Experiment, stages: Mapping[str, Stage]) -> Iterator[tuple[str, SamplingParams]]:
    """How evaluation and stages sample in thinking mode, by field."""
    if THINKING in experiment.evaluation.modes:
        yield "evaluation.thinking", experiment.evaluation.thinking
    for name, stage in stages.items():
        if not isinstance(stage, Sft) and not _reads_targets(stage):
            yield f"stages.{name}.thinking", stage.thinking


def _check_budget(field: str, params: SamplingParams, tokenizer: ChatTokenizer) -> None:
    budget, most = params.thinking_budget, params.max_new_tokens
    if budget is None:
        return
    text = len(tokenizer.stop_thinking_ids)
    if budget + text + _ANSWER_TOKENS > most:
        room = max(0, most - budget - text)
        raise UserError(
            f"{field}: a thinking_budget of {budget} and the {text} tokens of the text that ends thinking leave {room} "
            f"of {most} max_new_tokens for an answer and its end; raise max_new_tokens to "
            f"{budget + text + _ANSWER_TOKENS} or more, or lower thinking_budget"
        )
