"""Whatever decides a run's data is what it was when the run began, or the run is refused by the file's name."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.experiment import Experiment
from distill.runner import inputs
from distill.runner.run_directory import RunDirectory
from distill.tasks import GymFamily, PromptFile, ReasoningGym
from qwen3.errors import UserError
from student.init import FromCheckpoint, FromScratch
from tests.distill import miniature


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, an architecture and two prompt files."""
    folder = tmp_path_factory.mktemp("inputs")
    miniature.make_teacher(folder)
    (folder / "architecture.json").write_text(json.dumps(miniature.DENSE))
    for name in ("prompts.jsonl", "held_out.jsonl"):
        (folder / name).write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    (folder / "teacher" / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def experiment(folders: Path, tmp_path: Path) -> Experiment:
    """All kinds of files, in a folder of the test's own."""
    own = shutil.copytree(folders, tmp_path / "files")
    shutil.copytree(own / "teacher", own / "base")
    return dataclasses.replace(
        miniature.experiment(str(own / "teacher")),
        student=FromCheckpoint(path=str(own / "base")),
        tasks={"mine": PromptFile(path=str(own / "prompts.jsonl"), held_out_path=str(own / "held_out.jsonl"))},
    )


def begun(experiment: Experiment, directory: Path) -> None:
    """A run that has begun and has work to lose."""
    with RunDirectory.claim(directory, experiment) as run:
        run.begin(None)
    (directory / "checkpoints").mkdir(exist_ok=True)


def again(experiment: Experiment, directory: Path) -> None:
    with RunDirectory.claim(directory, experiment):
        pass


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


@pytest.mark.parametrize("change", [append, Path.unlink])
@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("prompts.jsonl", "tasks.mine.path"),
        ("held_out.jsonl", "tasks.mine.held_out_path"),
        ("teacher/tokenizer.json", "teacher.path"),
        ("teacher/tokenizer_config.json", "teacher.path"),
        ("teacher/chat_template.jinja", "teacher.path"),
        ("teacher/generation_config.json", "teacher.path"),
        ("teacher/config.json", "teacher.path"),
        ("teacher/model.safetensors", "teacher.path"),
        ("base/model.safetensors", "student.path"),
        ("base/tokenizer.json", "student.path"),
    ],
)
def test_a_file_that_changed_is_named_with_its_field(
    experiment: Experiment, tmp_path: Path, file: str, field: str, change: Callable[[Path], object]
) -> None:
    begun(experiment, tmp_path / "run")
    again(experiment, tmp_path / "run")
    change(tmp_path / "files" / file)
    what = "is gone" if change is Path.unlink else "has changed"
    with pytest.raises(UserError, match=rf"{file} \({field}\) {what}.*give this run another --name"):
        again(experiment, tmp_path / "run")


def test_a_file_that_came_later_is_named(experiment: Experiment, tmp_path: Path) -> None:
    begun(experiment, tmp_path / "run")
    (tmp_path / "files" / "base" / "added_tokens.json").write_text("{}")
    with pytest.raises(UserError, match=r"added_tokens\.json \(student\.path\) was not there"):
        again(experiment, tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "field"), [("architecture.json", "architecture"), ("base/tokenizer.json", "tokenizer")]
)
def test_what_a_student_from_scratch_is_made_from_is_held_too(
    experiment: Experiment, tmp_path: Path, file: str, field: str
) -> None:
    own = tmp_path / "files"
    scratch = FromScratch(architecture=str(own / "architecture.json"), tokenizer=str(own / "base"))
    experiment = dataclasses.replace(experiment, student=scratch)
    begun(experiment, tmp_path / "run")
    append(own / file)
    with pytest.raises(UserError, match=rf"{file} \(student\.{field}\) has changed"):
        again(experiment, tmp_path / "run")


def test_another_file_in_a_model_folder_and_a_touched_one_change_nothing(
    experiment: Experiment, tmp_path: Path
) -> None:
    begun(experiment, tmp_path / "run")
    (tmp_path / "files" / "teacher" / "README.md").write_text("About this model.")
    os.utime(tmp_path / "files" / "prompts.jsonl")
    again(experiment, tmp_path / "run")


def test_before_there_is_work_files_may_change(experiment: Experiment, tmp_path: Path) -> None:
    with RunDirectory.claim(tmp_path / "run", experiment) as run:
        run.begin(None)
    append(tmp_path / "files" / "prompts.jsonl")
    begun(experiment, tmp_path / "run")
    again(experiment, tmp_path / "run")


def test_a_file_that_was_not_touched_is_not_read_again(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(experiment, tmp_path / "run")
    read: list[Path] = []
    digest = inputs._digest
    monkeypatch.setattr(inputs, "_digest", lambda path: read.append(path) or digest(path))
    again(experiment, tmp_path / "run")
    assert not read
    os.utime(tmp_path / "files" / "prompts.jsonl", ns=(0, 0))
    again(experiment, tmp_path / "run")
    assert [path.name for path in read] == ["prompts.jsonl"]


def test_another_reasoning_gym_may_make_other_problems(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gym = dataclasses.replace(experiment, tasks={"gym": ReasoningGym(families={"chain_sum": GymFamily()})})
    begun(gym, tmp_path / "run")
    again(gym, tmp_path / "run")
    monkeypatch.setattr(inputs.importlib.metadata, "version", lambda name: "99.0")
    with pytest.raises(UserError, match=r"reasoning-gym \(tasks\.gym\.families\) has changed since this run began"):
        again(gym, tmp_path / "run")


def test_a_run_whose_directory_is_gone_is_told_so(experiment: Experiment, tmp_path: Path) -> None:
    def deleted_while_it_runs() -> None:
        with RunDirectory.claim(tmp_path / "run", experiment) as run:
            run.begin(None)
            shutil.rmtree(tmp_path / "run")
            run.keep_cost("off_policy", {})

    with pytest.raises(UserError, match="was deleted or replaced while this run was writing to it"):
        deleted_while_it_runs()
