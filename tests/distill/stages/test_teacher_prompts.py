"""A prompt that only the teacher reads: what it says of the response goes to the response, and no prompt is trained."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from distill.experiment import Experiment, Teacher
from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages.context import stage_seed
from distill.stages.stopping import StopRequest
from distill.stages.student_top_k import StudentTopK
from distill.tasks import PromptFile
from distill.tasks.mixture import TaskMixture
from distill.tasks.problem import Problem
from distill.tasks.requests import ModeMix, prompt_ids, teacher_prompt_ids
from distill.training.flops import forward_flops
from distill.training.packing import pack_rollouts, places_read, read_at, rollout_example
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, StepResult, TrainStep
from qwen3.chat.chat import ChatTokenizer
from qwen3.checkpoint import hf
from qwen3.errors import UserError
from qwen3.rollout import THINKING, Rollout, with_prompt
from qwen3.sharding import MeshShape, make_mesh
from student.init import FromScratch
from teacher.scored_rollout import ScoredRollout, after_prompt
from teacher.scoring import Scorer
from teacher.store import TargetStore
from teacher.targets import AtIds, Hidden
from tests.distill.miniature import DENSE, make_teacher, task
from tests.distill.miniature import experiment as miniature

ONE_LAYER = DENSE | {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_teacher(tmp_path_factory.mktemp("teacher"), ONE_LAYER)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    one = jax.devices()[:1]
    meshes = Experiment.meshes
    monkeypatch.setattr(Experiment, "meshes", lambda self, devices=None: meshes(self, devices or one))


def rollout(prompt: list[int], response: list[int]) -> Rollout:
    length = len(prompt) + len(response)
    mask = (np.arange(length) >= len(prompt) - 1) & (np.arange(length) < length - 1)
    return Rollout(
        tokens=np.asarray([*prompt, *response], np.int32),
        prompt_length=len(prompt),
        loss_mask=mask,
        sampler_logprobs=np.where(mask, -np.arange(length), 0).astype(np.float32),
        mode=THINKING,
        prompt_id=f"{prompt}",
        sample_index=0,
        policy_step=0,
        finished=True,
    )


def test_the_response_keeps_its_targets_behind_another_prompt() -> None:
    before = rollout([1, 2, 3], [7, 8, 9])
    for prompt in ([5], [4, 5, 6, 5, 4]):
        after = with_prompt(before, prompt)
        assert after.tokens.tolist() == [*prompt, 7, 8, 9]
        np.testing.assert_array_equal(after.response, before.response)
        assert after.tokens[1:][after.loss_mask[:-1]].tolist() == before.tokens[1:][before.loss_mask[:-1]].tolist()
        np.testing.assert_array_equal(
            after.sampler_logprobs[after.loss_mask], before.sampler_logprobs[before.loss_mask]
        )
        assert after.loss_mask.sum() == before.loss_mask.sum() == 3
        scored = ScoredRollout(
            rollout=before,
            ids=np.arange(12, dtype=np.int32).reshape(6, 2),
            logprobs=-np.ones((6, 2), np.float32),
            log_tail=np.arange(6, dtype=np.float32),
        )
        moved = after_prompt(scored, prompt)
        np.testing.assert_array_equal(moved.ids[moved.rollout.loss_mask], scored.ids[before.loss_mask])
        np.testing.assert_array_equal(moved.log_tail[moved.rollout.loss_mask], scored.log_tail[before.loss_mask])


def test_places_of_packed_rows_are_those_of_the_same_tokens() -> None:
    rng = np.random.default_rng(0)
    own, read = [], []
    for _ in range(12):
        response = rng.integers(100, 200, rng.integers(1, 6)).tolist()
        own.append(rollout(rng.integers(0, 100, rng.integers(1, 5)).tolist(), response))
        read.append(with_prompt(own[-1], rng.integers(0, 100, rng.integers(1, 9)).tolist()))
    rooms = [max(len(one.tokens), len(other.tokens)) for one, other in zip(own, read, strict=True)]
    layout = {"rows": 12, "length": 24, "one_per_row": False, "rooms": rooms}
    packed = pack_rollouts(
        [*zip(own, read, strict=True)],
        to_example=lambda pair: rollout_example(pair[0], read_at=read_at(*pair)),
        **layout,
    )
    as_read = pack_rollouts(read, to_example=rollout_example, **layout)
    places = places_read(packed, as_read)
    assert np.all((places < 24) == packed["loss_mask"])
    for row, column in zip(*np.nonzero(packed["loss_mask"]), strict=True):
        there = places[row, column]
        assert as_read["loss_mask"][row, there]
        assert as_read["tokens"][row, there + 1] == packed["tokens"][row, column + 1]
        assert as_read["segment_ids"][row, there] == packed["segment_ids"][row, column]


@pytest.mark.parametrize(
    "targets", [pytest.param(None, id="hidden", marks=pytest.mark.long), pytest.param(StudentTopK(k=3), id="ids")]
)
def test_a_run_learns_what_the_teacher_says_behind_its_own_prompt(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: StudentTopK | None
) -> None:
    hint = "{prompt} It is {answer}."
    whole = miniature(folder)
    off_policy, on_policy = whole.stages["off_policy"], whole.stages["on_policy"]
    training = dataclasses.replace(on_policy.training, steps=1, rows=8, row_length=128)
    on_policy = dataclasses.replace(
        on_policy, prompts_per_step=5, training=training, targets=targets, max_prompt_tokens=92
    )
    off_policy = dataclasses.replace(off_policy, prompts=5, training=training, max_prompt_tokens=92)
    stages = {"on_policy": on_policy} if targets else {"off_policy": off_policy, "on_policy": on_policy}
    experiment = dataclasses.replace(
        whole,
        student=FromScratch(architecture=ONE_LAYER, tokenizer=folder),
        teacher=Teacher(path=folder, dtype="float32", prompt=hint),
        stages=stages,
        export_stage=None,
        evaluation=dataclasses.replace(
            whole.evaluation, problems=0 if targets else 3, modes=("non_thinking",), max_prompt_tokens=92
        ),
    )
    seen: list[Batch] = []
    train = TrainStep.__call__

    def noted(self: TrainStep, state: TrainState, batches: list[Batch]) -> tuple[TrainState, StepResult]:
        seen.extend(batches)
        return train(self, state, batches)

    monkeypatch.setattr(TrainStep, "__call__", noted)
    with StopRequest().listening() as stop:
        execute(experiment, tmp_path / "run", Progress(Console(file=io.StringIO())), stop)

    mesh, tokenizer = make_mesh(MeshShape(), jax.devices()[:1]), ChatTokenizer.from_folder(folder)
    teacher = hf.load(folder, mesh=mesh)
    scorer = Scorer(teacher, mesh)
    batch = seen[-1]
    tokens, segments, mask = (np.asarray(one) for one in (batch.tokens, batch.segment_ids, batch.loss_mask))
    tasks = TaskMixture({"arithmetic": task()})
    asked = {
        tuple(prompt_ids(problem, mode, tokenizer, flag_fraction=on_policy.modes.flag_fraction)): problem
        for problem, mode in on_policy.asked(tasks, stage_seed(experiment.seed, "on_policy"))
    }
    read = []
    for row in range(len(tokens)):
        for segment in range(1, segments[row].max() + 1):
            (where,) = np.nonzero(segments[row] == segment)
            (trained,) = np.nonzero((segments[row] == segment) & mask[row])
            prompt, response = np.split(tokens[row, where], [trained[0] + 1 - where[0]])
            problem = asked[tuple(prompt.tolist())]
            text = tokenizer.decode(prompt.tolist())
            behind = tokenizer.encode(text.replace(problem.prompt, f"{problem.prompt} It is {problem.answer}."))
            alone = np.asarray([*behind, *response], np.int32)[None]
            said = scorer.hidden(alone, np.arange(alone.shape[1], dtype=np.int32)[None], np.ones_like(alone))
            own = np.asarray(said.hidden)[0, len(behind) - 1 + trained - trained[0]]
            if isinstance(batch.targets, Hidden):
                # float32 sums in another order.
                np.testing.assert_allclose(np.asarray(batch.targets.hidden)[row, trained], own, atol=2e-5)
            else:
                assert isinstance(batch.targets, AtIds)
                logprobs = jax.nn.log_softmax(own @ np.asarray(teacher.head).T, axis=-1)
                ids = np.asarray(batch.targets.ids)[row, trained]
                known = ids >= 0
                expected = np.take_along_axis(np.asarray(logprobs), np.maximum(ids, 0), -1)
                np.testing.assert_allclose(
                    np.asarray(batch.targets.logprobs)[row, trained][known], expected[known], atol=5e-5
                )
            read.append(alone.shape[1])
    assert len(read) == 5
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    costs = {cost["name"]: cost["teacher_flops"] for cost in report["stages"]}
    flops = forward_flops(teacher.config)
    assert costs["on_policy"] == pytest.approx(flops.of(read)), "what the teacher read"
    if targets is None:
        store = TargetStore.open(tmp_path / "run" / "targets" / "off_policy")
        asked = off_policy.asked(experiment.mixture(), stage_seed(experiment.seed, "off_policy"))
        read = []
        for index, (problem, mode) in enumerate(asked):
            rollout = store[index].rollout
            prompt = tokenizer.decode(rollout.tokens[: rollout.prompt_length].tolist())
            assert "It is" not in prompt, "the student reads no hint"
            fraction = off_policy.modes.flag_fraction
            own = teacher_prompt_ids(problem, mode, tokenizer, flag_fraction=fraction)
            read.append(len(own) + len(rollout.response))
        assert costs["off_policy"] == pytest.approx(2 * flops.of(read)), "generated and scored"
        assert all(np.isfinite(row["forward_kl"]) for row in report["rows"] if row["model"] != "teacher")


def test_thinking_of_the_teachers_own_stands_where_the_students_block_is_empty(folder: str) -> None:
    tokenizer = ChatTokenizer.from_folder(folder)
    problem = Problem(
        prompt="What is 2 + 3?",
        answer="5",
        solution="2+3=5",
        family="sums",
        teacher_prompt="What is 2 + 3?<think>2+3=5</think>",
    )
    own, read = (ids(problem, "non_thinking", tokenizer) for ids in (prompt_ids, teacher_prompt_ids))
    texts = [tokenizer.decode(ids) for ids in (own, read)]
    assert texts[0].endswith("<think>\n\n</think>\n\n")
    assert texts[1] == texts[0].replace("<think>\n\n</think>\n\n", "<think>\n2+3=5\n</think>\n\n")
    with pytest.raises(UserError, match="ends with a think block, which takes the place of the empty one"):
        teacher_prompt_ids(problem, THINKING, tokenizer)
    with pytest.raises(UserError, match="ends with a think block"):
        teacher_prompt_ids(problem, "non_thinking", tokenizer, flag_fraction=1)
    for mention in ("What is <think>?", "What are <think> and </think> for?"):
        for thinking in ("", "<think>2+3=5</think>"):
            asked = dataclasses.replace(problem, prompt=mention, teacher_prompt=f"{mention}{thinking}")
            read = tokenizer.decode(teacher_prompt_ids(asked, "non_thinking", tokenizer))
            block = "<think>\n2+3=5\n</think>" if thinking else "<think>\n\n</think>"
            assert mention in read
            assert read.endswith(f"{block}\n\n")
    twice = dataclasses.replace(problem, teacher_prompt="What?<think>2+3</think></think>")
    with pytest.raises(UserError, match="its teacher_prompt's thinking has </think> inside"):
        teacher_prompt_ids(twice, "non_thinking", tokenizer)
    with pytest.raises(
        UserError, match=r"teacher\.prompt has a think block that does not end it; put it last and close"
    ):
        Teacher(path=folder, prompt="{prompt}<think>{solution}")


def test_a_teachers_prompt_asks_for_the_students_mode(folder: str) -> None:
    tokenizer = ChatTokenizer.from_folder(folder)
    problem = Problem(prompt="What is 2 + 3?", answer="5", family="sums", teacher_prompt="What is it? /no_think")
    assert "/no_think" in tokenizer.decode(teacher_prompt_ids(problem, "non_thinking", tokenizer, flag_fraction=1))
    with pytest.raises(UserError, match="says /no_think, but the student is asked in thinking mode; take it out"):
        teacher_prompt_ids(problem, THINKING, tokenizer)
    system = dataclasses.replace(problem, teacher_prompt=({"role": "system", "content": "It is five."},))
    assert "five" in tokenizer.decode(teacher_prompt_ids(system, THINKING, tokenizer))
    with pytest.raises(UserError, match="has no user's turn, which could say /think as the student's prompt does"):
        teacher_prompt_ids(system, THINKING, tokenizer, flag_fraction=1)


def test_a_row_has_a_text_or_a_conversation_for_the_teacher(folder: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "What is 1 + 1?", "answer": 2, "hint": "What is 1 + 1? Two."},
        {
            "prompt": "What is 2 + 2?",
            "answer": 4,
            "hint": [{"role": "system", "content": "Four."}, {"role": "user", "content": "What is 2 + 2?"}],
        },
        {"prompt": "What is 3 + 3?", "answer": 6, "hint": None},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = PromptFile(path=str(path), held_out_fraction=0, teacher_prompt_column="hint")
    problems = {one.prompt: one for one in TaskMixture({"a": file}, {"": "{prompt} Hm."}).problems("train", 3, seed=0)}
    read = {prompt: [turn["content"] for turn in one.teacher_conversation] for prompt, one in problems.items()}
    assert read == {
        "What is 1 + 1?": ["What is 1 + 1? Two."],
        "What is 2 + 2?": ["Four.", "What is 2 + 2?"],
        "What is 3 + 3?": ["What is 3 + 3? Hm."],
    }
    with pytest.raises(UserError, match="has no solution, which the teacher's prompt names"):
        TaskMixture({"a": file}, {"": "{prompt} {solution}"}).problems("train", 3, seed=0)
    with pytest.raises(UserError, match="has no answer, which the teacher's prompt names"):
        TaskMixture({"a": file}, {"": "{answer}"})._for_teacher("a", Problem(prompt="Draw!", answer="", family="f"))
    with pytest.raises(UserError, match=r"teacher\.prompt names \{working\}; use \{prompt\}"):
        Teacher(path=folder, prompt="{working}")
    assert ModeMix(thinking_fraction=0, flag_fraction=0).thinking_fraction == 0
