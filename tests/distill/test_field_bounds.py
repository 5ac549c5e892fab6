"""Whatever somebody writes into a field of an experiment, it is refused by name or it can be run and written down."""

import dataclasses
import json
import math
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distill.evaluation.evaluate import Evaluation
from distill.experiment import _plain
from distill.runner.experiment_file import _configuration_classes
from distill.stages import Grpo, OffPolicy, OnPolicy, Sft
from distill.stages.loop import Training
from distill.stages.rollout_schedule import RolloutSchedule
from distill.stages.student_top_k import StudentTopK
from distill.tasks import GymFamily, PromptFile, ReasoningGym
from distill.training.losses import Loss
from distill.training.optimizer import Optimizer
from distill.training.policy import PolicyLoss
from qwen3.errors import UserError
from qwen3.field_types import misfit
from qwen3.generation.sampling import SamplingParams
from student.init import FromCheckpoint
from student.lora import Lora
from tests.distill import miniature

ODD: tuple[Any, ...] = (
    *(0, -1, 1, 2, 2**31, 2**63, -(2**63), 10**30, 10**5000, True, None, "8", "", b"8", np.int64(3), object()),
    *(1.5, math.nan, math.inf, -math.inf, 1e-320, 1e308, np.float32(0.5)),
    *((), [], {}, {"a": 1}, {1: 2}, (1,), (2**63,), ("a", "a"), {"a": math.nan}),
)


def instances() -> dict[type, Any]:
    """One of every class that an experiment may consist of."""
    others = (Loss(), Lora(), PromptFile(path="p"), FromCheckpoint(path="p"), GymFamily(), Grpo(), PolicyLoss())
    found: dict[type, Any] = {type(one): one for one in (*others, RolloutSchedule(), StudentTopK())}
    found[ReasoningGym] = ReasoningGym(families={"chain_sum": GymFamily()})
    whole = miniature.experiment("somewhere")
    held: list[Any] = [whole, *whole.stages.values(), *whole.tasks.values()]
    while held:
        one = held.pop()
        if dataclasses.is_dataclass(one):
            found[type(one)] = one
            held += [getattr(one, field.name) for field in dataclasses.fields(one)]
    return found


def test_every_field_of_every_class_takes_what_can_be_or_says_what_is_wrong() -> None:
    assert instances().keys() == _configuration_classes()
    taken = 0
    for kind, whole in instances().items():
        for field in dataclasses.fields(whole):
            for value in ODD:
                where = f"{kind.__name__}.{field.name} = {value if isinstance(value, float) else type(value)}"
                refusal = None
                try:
                    changed = dataclasses.replace(whole, **{field.name: value})
                except UserError as error:
                    refusal = str(error)
                if refusal is not None:
                    assert "\n" not in refusal, where
                    assert len(refusal) < 600, where
                    continue
                taken += 1
                hint = typing.get_type_hints(kind, include_extras=True)[field.name]
                assert misfit(getattr(changed, field.name), hint) is None, where
                json.dumps(_plain(changed), allow_nan=False)
    # Else the test would pass where everything is refused.
    assert taken > 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Training(rows=2**16, row_length=2**16), r"rows 65536 × training\.row_length 65536 is 4294967296; it"),
        (
            lambda: Sft(microbatches_per_step=2**20),
            r"step 1048576 × .*, for the tokens of a step are counted",
        ),
        (lambda: OffPolicy(batch_size=10**6), r"batch_size 1000000 × tokens of a prompt and its response 32768 is"),
        (lambda: OnPolicy(prompts_per_step=10**5), r"prompts_per_step 100000 × training\.steps 200 is 20000000; it"),
        (lambda: OnPolicy(samples_per_prompt=2**20), r"prompts_per_step × samples_per_prompt 67108864 × tokens of"),
        (lambda: Grpo(updates_per_batch=2**15), r"× samples_per_prompt 16777216 × tokens of a prompt and its response"),
        (lambda: Grpo(resample_factor=64.0, prompts_per_step=10**3), r"prompts_per_step 64000 × training"),
        (lambda: Evaluation(problems=10**7), r"evaluation\.problems 10000000 × samples_per_problem 8 is 80000000; it"),
        (lambda: Evaluation(problems=10**8), r"at most 10000000, for all responses are kept in memory"),
        (lambda: Evaluation(shown=-1), r"evaluation\.shown is -1; it must be at least 0"),
        (lambda: Evaluation(modes=()), r"evaluation\.modes is empty; name one or both of thinking and non_thinking"),
        (lambda: Evaluation(modes=("thinking", "thinking")), r"evaluation\.modes holds 'thinking' twice; leave one"),
        (lambda: Evaluation(pass_at=(8, 8)), r"evaluation\.pass_at holds 8 twice"),
        (lambda: Optimizer(b2=1 - 1e-12), r"optimizer\.b2 is 0\.999999999999; it must lie in 0\.\.1, 1 excluded"),
        (lambda: Optimizer(epsilon=1e-50), r"optimizer\.epsilon is 1e-50; it must be a number above 0 that float32"),
        (lambda: SamplingParams(max_new_tokens=1, temperature=1e-9), r"temperature is 1e-09; it must be 0 \(greedy\)"),
    ],
)
def test_what_no_machine_holds_is_refused_with_the_reason(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
