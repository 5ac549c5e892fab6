"""What evaluation and stages ask of the chat format and cannot have is named in one line, with every field."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.experiment import Experiment
from distill.runner.chat_format import check_chat_format
from distill.stages import Sft
from distill.tasks.requests import ModeMix
from qwen3.chat.chat import ChatTokenizer
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from tests.distill import miniature

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
ANSWERS, THINKS = CHATML + "{% endif %}", CHATML + "{{ '<think>\n' }}{% endif %}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(miniature.make_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture
def with_template(teacher: Path, tmp_path: Path) -> Callable[[str | None], ChatTokenizer]:
    def change(template: str | None) -> ChatTokenizer:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file).write_bytes((teacher / file).read_bytes())
        config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return ChatTokenizer.from_folder(tmp_path)

    return change


def in_modes(experiment: Experiment, fraction: float, *modes: str) -> Experiment:
    mix = ModeMix(thinking_fraction=fraction)
    return dataclasses.replace(
        experiment,
        stages={name: dataclasses.replace(stage, modes=mix) for name, stage in experiment.stages.items()},
        evaluation=dataclasses.replace(experiment.evaluation, modes=modes),
    )


@pytest.mark.parametrize(
    ("template", "only", "fraction"), [(ANSWERS, "non_thinking", 0), (THINKS, "thinking", 1)], ids=["answers", "thinks"]
)
def test_a_checkpoint_of_one_mode_is_asked_in_no_other(
    teacher: Path,
    with_template: Callable[[str | None], ChatTokenizer],
    template: str,
    only: str,
    fraction: float,
) -> None:
    tokenizer, experiment = with_template(template), miniature.experiment(str(teacher))
    stages = experiment.stages | {"sft": Sft(modes=ModeMix(thinking_fraction=0.2))}
    # Running text is in no mode, and stored targets had theirs.
    asking = ("off_policy", "on_policy", "ahead", "sft")
    fields = [f"stages.{name}.modes.thinking_fraction to {fraction}" for name in asking]
    message = f"its chat format has {only} mode only; set evaluation.modes to ({only!r},), {', '.join(fields)}"
    with pytest.raises(UserError, match=f"{re.escape(message)}$"):
        check_chat_format(experiment, stages, tokenizer)
    alone = in_modes(experiment, fraction, only)
    check_chat_format(alone, alone.stages, tokenizer)
    with pytest.raises(UserError, match=r"mode only; set stages\.on_policy\.modes\.thinking_fraction to [01]$"):
        check_chat_format(alone, {"on_policy": experiment.stages["on_policy"]}, tokenizer)


def test_a_checkpoint_of_both_modes_may_be_asked_in_one(teacher: Path) -> None:
    experiment, tokenizer = miniature.experiment(str(teacher)), ChatTokenizer.from_folder(teacher)
    for fraction, mode in ((0.0, "non_thinking"), (1.0, "thinking"), (0.3, "thinking")):
        alone = in_modes(experiment, fraction, mode)
        check_chat_format(alone, alone.stages, tokenizer)


def test_without_a_template_nothing_can_be_asked(
    teacher: Path, with_template: Callable[[str | None], ChatTokenizer]
) -> None:
    experiment = miniature.experiment(str(teacher))
    with pytest.raises(UserError, match="no chat template; add"):
        check_chat_format(experiment, experiment.stages, with_template(None))


@pytest.mark.parametrize(
    ("budget", "most", "least"), [(8, 33, 34), (0, 1, 26), (0, 25, 26), (8, 8, 34), (100, 24, 126), (5, 6, 31)]
)
@pytest.mark.parametrize("field", ["evaluation", "stages.off_policy", "stages.on_policy"])
def test_a_thinking_budget_leaves_room_for_an_answer(
    teacher: Path, field: str, budget: int, most: int, least: int
) -> None:
    experiment, tokenizer = miniature.experiment(str(teacher)), ChatTokenizer.from_folder(teacher)
    assert len(tokenizer.stop_thinking_ids) == 24

    def check(most: int, budget: int | None) -> None:
        params = SamplingParams(max_new_tokens=most, thinking_budget=budget)
        stages, evaluation = dict(experiment.stages), experiment.evaluation
        if field == "evaluation":
            evaluation = dataclasses.replace(evaluation, thinking=params)
        else:
            name = field.partition(".")[2]
            training = dataclasses.replace(stages[name].training, row_length=256)
            stages[name] = dataclasses.replace(stages[name], thinking=params, training=training)
        check_chat_format(dataclasses.replace(experiment, evaluation=evaluation), stages, tokenizer)

    message = rf"^{field}\.thinking: a thinking_budget of {budget} .* raise max_new_tokens to {least} or more"
    with pytest.raises(UserError, match=message):
        check(most, budget)
    check(least, budget)
    check(most, None)


def test_a_budget_that_nobody_uses_is_not_judged(teacher: Path) -> None:
    experiment, tokenizer = miniature.experiment(str(teacher)), ChatTokenizer.from_folder(teacher)
    short = SamplingParams(max_new_tokens=8, thinking_budget=8)
    evaluation = dataclasses.replace(experiment.evaluation, thinking=short, modes=("non_thinking",))
    stages = {"same_outputs": dataclasses.replace(experiment.stages["same_outputs"], thinking=short)}
    check_chat_format(dataclasses.replace(experiment, evaluation=evaluation), stages, tokenizer)
