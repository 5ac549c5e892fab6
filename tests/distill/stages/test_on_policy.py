"""What an on-policy stage asks its student, step by step."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from distill.stages.context import make_engine
from distill.stages.on_policy import OnPolicy
from distill.stages.own_rollouts import OwnRollouts
from distill.stages.rollout_schedule import RolloutSchedule
from distill.tasks import PromptFile
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import ModeMix
from qwen3.chat.chat import ChatTokenizer
from qwen3.decoder.model import Qwen3
from student.init import FromScratch
from tests.distill import miniature


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return miniature.make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def stage(teacher: str) -> OnPolicy:
    stage = miniature.experiment(teacher).stages["ahead"]
    assert isinstance(stage, OnPolicy)
    return dataclasses.replace(stage, prompts_per_step=2, max_staleness=1)


@pytest.fixture
def two_prompts(tmp_path: Path) -> TaskMixture:
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n} + {n}?", "answer": 2 * n}) + "\n" for n in (1, 2)))
    return TaskMixture({"ours": PromptFile(path=str(path), held_out_fraction=0)})


def rollouts_of(stage: OnPolicy, teacher: str, model: Qwen3, tasks: TaskMixture) -> OwnRollouts:
    tokenizer = ChatTokenizer.from_folder(teacher)
    context = SimpleNamespace(
        stage_seed=lambda name: 3,
        tasks=tasks,
        tokenizer=tokenizer,
        mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]),
        engine=lambda model, sizes: make_engine(model.config, tokenizer, sizes),
        load_teacher=lambda name: SimpleNamespace(model=model),
        teachers=("",),
        named_teachers=(),
    )
    return OwnRollouts(stage, "ahead", model, context, stage.asked(tasks, 3))  # type: ignore[arg-type]


def test_steps_of_the_same_weights_do_not_repeat_their_rollouts(
    stage: OnPolicy, teacher: str, two_prompts: TaskMixture
) -> None:
    model = FromScratch(architecture=miniature.DENSE, tokenizer=teacher).build(jax.random.key(0))
    # In one mode, so that the prompts are the same ones too.
    stage = dataclasses.replace(stage, modes=ModeMix(thinking_fraction=1))
    data = rollouts_of(stage, teacher, model, two_prompts)
    by_step = [data._write(step, 0, model).rollouts for step in (0, 1, 0)]
    data.close()
    first, second, again = ([rollout.tokens.tolist() for rollout in rollouts] for rollouts in by_step)
    prompts = [sorted(rollout.prompt_id for rollout in rollouts) for rollouts in by_step]
    assert prompts[0] == prompts[1], "both prompts of the file at either step"
    assert [rollout.policy_step for rollout in by_step[1]] == [0, 0]
    assert first == again
    assert not {tuple(tokens) for tokens in first} & {tuple(tokens) for tokens in second}


def test_a_prefix_is_what_the_whole_rollout_begins_with(
    stage: OnPolicy, teacher: str, two_prompts: TaskMixture
) -> None:
    """In both modes, and through the text that ends thinking: 8 tokens of thinking, 24 of that text, then an answer."""
    model = FromScratch(architecture=miniature.DENSE, tokenizer=teacher).build(jax.random.key(0))
    schedule = RolloutSchedule(first=4, full_share=0.3)
    cut = dataclasses.replace(stage, rollout_tokens=schedule)
    of_both = []
    for one in (stage, cut):
        data = rollouts_of(one, teacher, model, two_prompts)
        written = [data._write(step, 0, model) for step in range(5)]
        of_both.append([of_step.rollouts for of_step in written])
        samples = [data._samples(step, of_step, slice(None)) for step, of_step in enumerate(written)]
        may_end = [[data._may_end(step, sample) for sample in of_step] for step, of_step in enumerate(samples)]
        data.close()
    kinds = set()
    for step, (wholes, prefixes) in enumerate(zip(*of_both, strict=True)):
        limit = [4, 7, 12, 21, 36][step]
        for whole, prefix, in_full in zip(wholes, prefixes, may_end[step], strict=True):
            most = len(whole.response) if in_full else min(limit, len(whole.response))
            kinds.add((whole.mode, in_full, most < len(whole.response)))
            length = whole.prompt_length + most
            assert prefix.tokens.tolist() == whole.tokens[:length].tolist()
            # The last position, which nothing follows, is not trained.
            assert prefix.loss_mask.tolist() == [*whole.loss_mask[: length - 1], False]
            assert prefix.sampler_logprobs[:-1].tolist() == whole.sampler_logprobs[: length - 1].tolist()
            assert prefix.finished == (whole.finished and most == len(whole.response))
            drawn = schedule.runs_in_full(3, step, whole.prompt_id, whole.sample_index)
            assert in_full == (drawn or limit >= (36 if whole.mode == "thinking" else 8))
    assert {(mode, cut, cut) for mode in ("thinking", "non_thinking") for cut in (True, False)} <= {
        (mode, not in_full, shorter) for mode, in_full, shorter in kinds
    }


@pytest.mark.parametrize("prompts_per_step", [1, 2, 3])
def test_modes_are_counted_over_the_stage_and_not_anew_at_each_step(
    stage: OnPolicy, two_prompts: TaskMixture, prompts_per_step: int
) -> None:
    steps = 60 // prompts_per_step
    training = dataclasses.replace(stage.training, steps=steps)
    asked = dataclasses.replace(
        stage, prompts_per_step=prompts_per_step, modes=ModeMix(thinking_fraction=0.9), training=training
    ).asked(two_prompts, seed=1)
    assert Counter(mode for _, mode in asked) == {"thinking": 54, "non_thinking": 6}
    assert len({(problem.problem_id, mode) for problem, mode in asked}) == 4
