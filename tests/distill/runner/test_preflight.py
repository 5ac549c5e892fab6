"""What would fail hours into a run is refused before its first second of computing."""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.runner.preflight import preflight
from distill.stages.on_policy import OnPolicy
from distill.stages.own_rollouts import OwnRollouts
from distill.tasks import Problem, PromptFile
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import ModeMix
from qwen3.chat.chat import ChatTokenizer
from qwen3.decoder.kernels import Kernels
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from qwen3.sharding import MeshShape, make_mesh
from student.init import FromScratch
from tests.distill import miniature


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return miniature.make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def experiment(teacher: str) -> Experiment:
    return miniature.experiment(teacher)


@pytest.fixture
def short_file(tmp_path: Path) -> PromptFile:
    """Eighteen problems to train on, of which the tenth is the longest."""
    path = tmp_path / "short.jsonl"
    rows = [{"prompt": f"What is {n} + 1?", "answer": n + 1, "working": f"{n}+1={n + 1}"} for n in range(18)]
    rows[9]["prompt"] = "State the final answer to the following arithmetic problem: 9 + 1 = ? (0123456789)"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row | {"prompt": f"Is it {row['answer']}?"}) + "\n" for row in rows[:7]))
    return PromptFile(path=str(path), held_out_path=str(held_out), solution_column="working")


def check(experiment: Experiment, finished: tuple[str, ...] = (), devices: int = 1) -> None:
    assert experiment.teacher is not None
    mesh = make_mesh(MeshShape(), jax.devices()[:devices])
    tokenizer = ChatTokenizer.from_folder(experiment.teacher.path)
    preflight(experiment, mesh, mesh, tokenizer, TaskMixture(experiment.tasks), Progress(), finished)


def changed(experiment: Experiment, stage: str, **fields: Any) -> Experiment:
    return dataclasses.replace(
        experiment, stages=dict(experiment.stages) | {stage: dataclasses.replace(experiment.stages[stage], **fields)}
    )


def _longer_responses(experiment: Experiment) -> Experiment:
    stages = dict(experiment.stages)
    for name in ("off_policy", "same_outputs"):
        training = dataclasses.replace(stages[name].training, row_length=300)
        stages[name] = dataclasses.replace(stages[name], thinking=SamplingParams(max_new_tokens=200), training=training)
    return dataclasses.replace(experiment, stages=stages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda whole: changed(whole, "off_policy", top_k=512),
            r"stages\.off_policy\.top_k is 512, but the teacher's vocabulary has 3\d\d entries; lower it",
        ),
        (
            _longer_responses,
            r"stages\.off_policy: prompt and response may have 280 tokens, but the student's positions end at 256 ",
        ),
        (
            lambda whole: dataclasses.replace(
                whole, evaluation=dataclasses.replace(whole.evaluation, max_prompt_tokens=240)
            ),
            r"evaluation: prompt and response may have 276 tokens, but the student's positions end at 256 ",
        ),
        (
            lambda whole: changed(whole, "on_policy", thinking=SamplingParams(max_new_tokens=24, stop_ids=(3, 9999))),
            r"stages\.on_policy: stop_ids holds 9999, but the student's vocabulary has 3\d\d entries; name ids",
        ),
        (
            lambda whole: changed(whole, "on_policy", max_prompt_tokens=20),
            r"stages\.on_policy\.max_prompt_tokens is 20, but the longest prompt, of '\w.*', has \d\d tokens; raise it",
        ),
        (
            lambda whole: dataclasses.replace(
                whole, evaluation=dataclasses.replace(whole.evaluation, max_prompt_tokens=20)
            ),
            r"evaluation\.max_prompt_tokens is 20, but the longest prompt",
        ),
        (
            lambda whole: changed(
                whole, "pretraining",
                training=dataclasses.replace(whole.stages["pretraining"].training, row_length=24),
            ),
            r"stages\.pretraining\.training\.row_length is 24, but the longest document, of",
        ),
        (
            lambda whole: dataclasses.replace(whole, kernels=Kernels(attention="tpu")),
            r"kernels\.attention: implementation 'tpu' of attention needs TPU, this platform is cpu; use 'xla'",
        ),
        (
            lambda whole: changed(whole, "pretraining", problems=10**4),
            r"stages\.pretraining\.problems is 10000, but task 'arithmetic': \w+: only \d+ different train problems",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(
    experiment: Experiment, change: Callable[[Experiment], Experiment], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(change(experiment))


def test_the_miniature_passes(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    check(experiment)
    assert "checking prompts" in capsys.readouterr().out


def test_a_file_has_enough_prompts_or_is_refused(experiment: Experiment, short_file: PromptFile) -> None:
    whole = dataclasses.replace(experiment, tasks={"ours": short_file})
    whole = changed(whole, "pretraining", problems=18)
    with pytest.raises(UserError, match=r"off_policy\.prompts is 20, but task 'ours': .* has 18 train problems"):
        check(whole)
    # Forty on-policy prompts: those of the file come again.
    check(changed(whole, "off_policy", prompts=18))
    evaluation = dataclasses.replace(whole.evaluation, problems=8)
    with pytest.raises(UserError, match=r"evaluation\.problems is 8, but task 'ours': .* has 7 held_out problems"):
        check(dataclasses.replace(whole, evaluation=evaluation))


def test_data_that_asks_for_a_mode_that_the_template_has_not_is_named(
    experiment: Experiment, teacher: str, tmp_path: Path
) -> None:
    folder = tmp_path / "answers only"
    folder.mkdir()
    for file in Path(teacher).iterdir():
        (folder / file.name).symlink_to(file)
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    rows = [{"prompt": f"What is {n}?", "answer": n, "mode": "thinking" if n == 9 else None} for n in range(12)]
    file = tmp_path / "modes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row | {"prompt": f"{row['answer']}?", "mode": None}) + "\n" for row in rows))
    off_policy = dataclasses.replace(
        experiment.stages["off_policy"], prompts=12, modes=ModeMix(thinking_fraction=0), start_from=None
    )
    assert experiment.teacher is not None
    whole = dataclasses.replace(
        experiment,
        teacher=dataclasses.replace(experiment.teacher, path=str(folder)),
        student=FromScratch(architecture=miniature.DENSE, tokenizer=str(folder)),
        tasks={"ours": PromptFile(path=str(file), held_out_path=str(held_out), mode_column="mode")},
        stages={"off_policy": off_policy},
        evaluation=dataclasses.replace(experiment.evaluation, modes=("non_thinking",)),
        export_stage=None,
    )
    message = (
        r"stages\.off_policy: the data asks for thinking mode, as in 'What is 9\?', .* has non_thinking only; take"
    )
    with pytest.raises(UserError, match=message):
        check(whole)
    file.write_text(file.read_text().replace('"thinking"', "null"))
    task = PromptFile(path=str(file), held_out_path=str(held_out), mode_column="mode")
    check(dataclasses.replace(whole, tasks={"ours": task}))


def test_the_longest_prompt_is_the_one_that_is_named(experiment: Experiment, short_file: PromptFile) -> None:
    whole = changed(dataclasses.replace(experiment, tasks={"ours": short_file}), "pretraining", problems=18)
    whole = changed(whole, "off_policy", prompts=18, max_prompt_tokens=30)
    with pytest.raises(UserError, match=r"of 'State the final answer to the following arithmetic problem: …', has"):
        check(whole)


def test_what_of_the_data_is_left_out_is_said(
    experiment: Experiment, short_file: PromptFile, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path(short_file.path).open("a") as lines:
        lines.write(json.dumps({"prompt": "Is it 3?", "answer": "3", "working": "3=3"}) + "\n")
        lines.write(json.dumps({"prompt": "What is 0 + 1?", "answer": "2", "working": "2=2"}) + "\n")
    whole = changed(dataclasses.replace(experiment, tasks={"ours": short_file}), "pretraining", problems=18)
    check(changed(whole, "off_policy", prompts=18))
    said = " ".join(capsys.readouterr().out.split())
    assert "an earlier one asks the same: 1, of them with another answer: 1" in said
    assert f"not trained on because {short_file.held_out_path} holds them out: 1" in said.replace("- ", "-")


def test_an_evaluation_in_a_mode_that_no_problem_is_for_is_refused(
    experiment: Experiment, short_file: PromptFile
) -> None:
    held_out = Path(short_file.path).parent / "flagged.jsonl"
    held_out.write_text(
        "".join(json.dumps({"prompt": f"Is it {n}? /no_think", "answer": "1"}) + "\n" for n in range(6))
    )
    flagged = PromptFile(path=short_file.path, held_out_path=str(held_out))
    whole = dataclasses.replace(
        experiment, tasks={"ours": flagged}, stages={"on_policy": experiment.stages["on_policy"]}
    )
    whole = dataclasses.replace(whole, export_stage=None)
    with pytest.raises(
        UserError, match=r"evaluation\.modes has 'thinking', but .* all of its 6 problems in the other mode"
    ):
        check(whole)
    check(dataclasses.replace(whole, evaluation=dataclasses.replace(whole.evaluation, modes=("non_thinking",))))


def test_problems_that_no_evaluated_mode_asks_are_counted(
    experiment: Experiment, short_file: PromptFile, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = Path(short_file.path).parent / "some_flagged.jsonl"
    flags = ("", "", " /no_think", "", " /no_think", "")
    lines = (json.dumps({"prompt": f"Is it {n}?{flag}", "answer": "1"}) for n, flag in enumerate(flags))
    held_out.write_text("\n".join(lines))
    task = PromptFile(path=short_file.path, held_out_path=str(held_out))
    whole = dataclasses.replace(
        experiment,
        tasks={"ours": task},
        stages={"on_policy": experiment.stages["on_policy"]},
        export_stage=None,
        evaluation=dataclasses.replace(experiment.evaluation, modes=("thinking",)),
    )
    check(whole)
    said = " ".join(capsys.readouterr().out.split())
    assert "evaluation leaves out 2 of its 6 problems, which ask for a mode that is not in evaluation.modes" in said


def test_kernels_of_the_loss_are_asked_what_stages_need(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Kernels, "check", lambda self, *_, tokens_per_target=0: asked.append(tokens_per_target))
    check(changed(experiment, "off_policy", top_k=9))
    assert asked == [9, 0]


def test_writing_ahead_needs_devices_that_need_not_wait_for_each_other(experiment: Experiment) -> None:
    message = r"stages\.ahead\.max_staleness is 2, but the student shares 2 devices .* set it to 0, or set"
    with pytest.raises(UserError, match=message):
        check(experiment, devices=2)


def test_stages_that_have_finished_are_not_asked_again(experiment: Experiment) -> None:
    check(changed(experiment, "off_policy", top_k=512), finished=("off_policy",))


def test_a_teacher_that_lacks_a_tensor_is_found(experiment: Experiment, teacher: str, tmp_path: Path) -> None:
    config = json.loads((Path(teacher) / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in Path(teacher).iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    assert experiment.teacher is not None
    with pytest.raises(UserError, match=r"weights do not fit config\.json; missing: model\.layers\.2"):
        check(dataclasses.replace(experiment, teacher=dataclasses.replace(experiment.teacher, path=str(tmp_path))))


def test_a_prompt_twice_in_one_step_is_sampled_anew(teacher: str) -> None:
    stage = OnPolicy(samples_per_prompt=2)
    one, two = (Problem(prompt=f"What is {n}?", answer=str(n), family="f") for n in (1, 2))
    context = SimpleNamespace(tokenizer=ChatTokenizer.from_folder(teacher))
    asked = [(problem, "thinking") for problem in (one, two, one)]
    own: Any = SimpleNamespace(_stage=stage, _context=context)
    own._params = functools.partial(OwnRollouts._params, own)
    requests = OwnRollouts._requests(own, asked, collections.defaultdict(itertools.count), 0)
    drawn = [(request.prompt_id, request.sample_index) for request in requests]
    first, second = one.problem_id, two.problem_id
    assert drawn == [(first, 0), (first, 1), (second, 0), (second, 1), (first, 2), (first, 3)]
