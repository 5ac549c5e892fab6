"""What is packed, counted, measured and shown of rollouts that are given: no model is run."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.monitor.metrics import RolloutSample
from distill.stages import OnPolicy
from distill.stages.ahead import Outcome, Written
from distill.stages.loop import Spent, Training
from distill.stages.own_rollouts import OwnRollouts
from distill.tasks import Problem
from distill.tasks.samples import Verdict
from distill.training.flops import forward_flops
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import THINKING, Rollout
from qwen3.sharding import MeshShape, make_mesh
from teacher.targets import Hidden
from tests.distill.training.test_train_step import config

PROBLEMS = [
    Problem(prompt=f"What is {n} + {n}?", answer=str(2 * n), family="sums", teacher="ab"[n % 2]) for n in range(4)
]
TEACHERS = {"a": config(moe=False), "b": dataclasses.replace(config(moe=False), vocab_size=640)}


class Scores:
    """Of a teacher that says nothing."""

    def hidden(self, tokens: Any, positions: Any, segment_ids: Any, wanted: Any, places: Any) -> Hidden:
        return Hidden(hidden=jnp.zeros((*np.shape(places), 32)))


def rollout(problem: Problem, prompt: int, response: int) -> Rollout:
    length = prompt + response
    mask = (np.arange(length) >= prompt - 1) & (np.arange(length) < length - 1)
    return Rollout(
        tokens=np.arange(length, dtype=np.int32),
        prompt_length=prompt,
        loss_mask=mask,
        sampler_logprobs=np.zeros(length, np.float32),
        sampler_entropies=np.where(mask, 1, 0).astype(np.float32),
        mode=THINKING,
        prompt_id=problem.problem_id,
        sample_index=0,
        policy_step=0,
        finished=True,
        teacher=problem.teacher,
    )


def written(**fields: Any) -> Written:
    """Two parts of two rollouts, one of each teacher: a short response to a long prompt, and the other way round."""
    rollouts = [rollout(one, *((20, 4) if one.teacher == "a" else (4, 20))) for one in PROBLEMS]
    return Written(rollouts=rollouts, seconds=1.0, **fields)


def own_rollouts(shown: list[int] | None = None, *, scorers: Any, **fields: Any) -> OwnRollouts:
    """Whose first batch is `written`; steps whose samples are recorded go to `shown`."""
    sampling = SamplingParams(max_new_tokens=20)
    usual = {"prompts_per_step": 2, "thinking": sampling, "non_thinking": sampling, "max_prompt_tokens": 20}
    stage = OnPolicy(**{**usual, "training": Training(steps=12, rows=1, row_length=64), **fields})
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    teachers = {name: SimpleNamespace(model=SimpleNamespace(config=each), mesh=mesh) for name, each in TEACHERS.items()}

    def samples(step: int, samples: list[RolloutSample], *, stage: str) -> None:
        assert samples
        assert shown is not None
        shown.append(step - 1)

    context: Any = SimpleNamespace(
        mesh=mesh,
        tasks=None,
        tokenizer=SimpleNamespace(split_response_ids=lambda ids, mode: ("", "2"), pad_id=0),
        teachers=("a", "b"),
        named_teachers=("a", "b"),
        load_teacher=teachers.__getitem__,
        stage_seed=lambda name: 0,
        engine=lambda model, sizes: None,
        metrics=SimpleNamespace(samples=samples),
    )
    student: Any = SimpleNamespace(config=config(moe=False), stacks=[])
    asked = [(problem, THINKING) for problem in PROBLEMS]
    return OwnRollouts(stage, "rl", student, context, asked, scorers=scorers)


@pytest.mark.parametrize("scorers", [{}, {"a": Scores(), "b": Scores()}], ids=["none", "both"])
def test_rows_are_shared_and_heads_counted_by_the_teacher_that_is_asked(scorers: Any) -> None:
    share = 0.3
    data, spent = own_rollouts(scorers=scorers, updates_per_batch=2, token_share=share), Spent()
    verdicts = [Verdict(True, None)] * 4
    data.restore({"batch": written(rewards=[0.0] * 4, verdicts=verdicts).to_json()})
    student: Any = SimpleNamespace(config=config(moe=False))
    made = data.step_data(1, student, spent)
    if not scorers:
        assert [batch.teacher for batch in made.batches] == [None], "both responses fit one row"
        assert spent.teacher_flops == 0
        return
    assert [np.unique(np.asarray(batch.teacher)[batch.loss_mask]).tolist() for batch in made.batches] == [[0], [1]]
    expected = [
        forward_flops(each).of([24], math.ceil(share * int(rollout(problem, *lengths).loss_mask.sum())))
        for each, problem, lengths in zip(TEACHERS.values(), PROBLEMS, ((20, 4), (4, 20)), strict=False)
    ]
    assert spent.teacher_flops == pytest.approx(sum(expected), rel=1e-12)


def test_accuracies_by_mode_and_by_teacher_are_of_the_same_responses() -> None:
    shown: list[int] = []
    data = own_rollouts(shown, scorers={}, passes=3, samples_every_steps=4)
    dropped = Outcome(
        part=0, mode=THINKING, tokens=24, response_tokens=20, finished=True, correct=False, reward=0.0, failed=False,
        known=True, teacher="b",
    )  # fmt: skip
    kept = written(verdicts=[Verdict(True, True)] * 4, replaced=[dropped, dataclasses.replace(dropped, part=1)])
    for step in range(0, 15, 3):
        metrics = data._judged(step, 0, kept, slice(0, 2))
        assert metrics["accuracy/thinking"] == pytest.approx(2 / 3)
        assert (metrics["accuracy/a"], metrics["accuracy/b"]) == (1.0, 0.5)
    # First passes come every three steps: the first of them at 0, 4, 8 and 12, or after.
    assert shown == [0, 6, 9, 12]
