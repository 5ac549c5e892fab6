"""Every file of a run directory, damaged: named in one line with a remedy, or mended, or not needed."""

import contextlib
import fnmatch
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill.experiment import Experiment
from distill.run import main
from distill.runner.experiment_file import load_experiment
from distill.runner.export_folder import check_export_record
from distill.runner.run_directory import RunDirectory
from distill.stages.context import Stopwatch
from qwen3.errors import UserError
from tests.distill.faults import launch

REFUSED = (
    "config.json",
    "environment.json",
    "inputs.json",
    "run_id",
    "began",
    "wall_seconds.json",
    "export.json",
    "evaluations/student_initial.json",
    "evaluations/on_policy.json",
    "evaluations/teacher.json",
    "stages/pretraining.json",
    "stages/ahead.json",
)
LOGS = ("metrics.jsonl", "rollouts.jsonl")
NOT_NEEDED = (".lock", "report.json", "report.html", "tensorboard/*", "export/*", "targets/*")
"""By a run that is finished: written anew, looked after by people, or only read where a stage goes on."""
ELSEWHERE = ("evaluations/*", "stages/*", "checkpoints/*")
"""Like one of those above, or in tests/distill/training/test_checkpoint.py; for targets see tests/teacher too."""


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    del content
    return b""


def scrambled(content: bytes) -> bytes:
    return random.Random(0).randbytes(max(64, len(content)))


def another_document(content: bytes) -> bytes:
    return b'{"a": [1]}' if content.lstrip().startswith(b"[") else b'[1, {"a": null}]'


def deep(content: bytes) -> bytes:
    del content
    return b"[" * 100_000


DAMAGES = (half, emptied, scrambled, another_document, deep)


@contextlib.contextmanager
def holding(file: Path, content: bytes) -> Iterator[None]:
    """The run with this content of a file; a run that is refused writes nothing, so that it need not be copied."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


@pytest.fixture(scope="module")
def experiment(experiment_file: Path) -> Experiment:
    return load_experiment(experiment_file)


def refused(experiment: Experiment, run: Path, file: Path, content: bytes) -> str:
    """The one line with which the run is refused while `file` has this content: before anything is loaded."""
    with holding(file, content), pytest.raises(UserError) as raised, RunDirectory.claim(run, experiment):
        check_export_record(run)
    line = str(raised.value)
    assert re.fullmatch(r"[^\n]+; [^\n]+", line), line
    return line


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_file_is_named_before_anything_is_loaded(
    experiment: Experiment, finished: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    file = finished / name
    assert f"{file} is damaged" in refused(experiment, finished, file, damage(file.read_bytes()))


def test_the_command_ends_with_that_line_and_2(
    experiment_file: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished / "stages" / "ahead.json"
    with holding(file, b"{"):
        assert main([str(experiment_file), "--runs", str(finished.parent)]) == 2
    assert re.fullmatch(rf"error: {file} is damaged [^\n]+; delete it, and [^\n]+\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "row",
    [
        {"mean_response_tokens": "many"},
        {"pass_at_1": 2},
        {"pass_at_k": {"two": 0.5}},
        {"model": "teacher"},
        {"mode": "dreaming"},
        {"problems": "six"},
    ],
)
def test_rows_of_an_evaluation_are_checked_value_by_value(
    experiment: Experiment, finished: Path, row: dict[str, object]
) -> None:
    file = finished / "evaluations" / "on_policy.json"
    rows = json.loads(file.read_text())
    content = json.dumps([rows[0] | row, *rows[1:]]).encode()
    assert f"{file} is damaged" in refused(experiment, finished, file, content)


@pytest.mark.parametrize("rows", ["none", "first", "doubled"])
def test_an_evaluation_has_every_mode_once(experiment: Experiment, finished: Path, rows: str) -> None:
    file = finished / "evaluations" / "on_policy.json"
    kept = json.loads(file.read_text())
    content = json.dumps({"none": [], "first": kept[:1], "doubled": kept + kept}[rows]).encode()
    assert f"{file} is damaged" in refused(experiment, finished, file, content)


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("line", [b"\xff\xfe", b"[]", b"{}", b'{"stage": 3, "step": "x"}', b"[" * 100_000])
def test_a_damaged_line_of_a_log_is_named_with_its_number(
    experiment: Experiment, finished: Path, name: str, line: bytes
) -> None:
    file = finished / name
    first, rest = file.read_bytes().split(b"\n", 1)
    assert f"{file}:2: " in refused(experiment, finished, file, first + b"\n" + line + b"\n" + rest)


@pytest.mark.parametrize("content", ["", "[]", "[1", '{"write": "long"}', '{"write": true}', "\xff"])
def test_times_of_the_teacher_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "seconds.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"seconds\.json is damaged .*; delete it"):
        Stopwatch(tmp_path / "seconds.json")


def test_what_a_finished_run_does_not_need_is_written_anew_or_named(experiment_file: Path, copied: Path) -> None:
    exported = sorted(path for path in (copied / "export").rglob("*") if path.is_file())
    for file in copied.rglob("*"):
        if file.is_file() and any(fnmatch.fnmatch(str(file.relative_to(copied)), pattern) for pattern in NOT_NEEDED):
            file.write_bytes(scrambled(file.read_bytes()))
    for name in LOGS:
        (copied / name).write_bytes(half((copied / name).read_bytes()))
    ended = launch(experiment_file, copied.parent)
    assert ended.status == 0, ended.output
    assert "Traceback" not in ended.output
    for file in exported:
        assert f"{file} is not as this run wrote it" in ended.output
    assert f"{copied / 'metrics.jsonl'} has lost what stage ahead recorded after step 0 of 5" in ended.output
    assert json.loads((copied / "report.json").read_text())


def test_every_file_of_a_run_is_looked_at_here(finished: Path) -> None:
    names = [str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()]
    known = (*REFUSED, *LOGS, *NOT_NEEDED, *ELSEWHERE)
    assert not [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in known)]
    assert all(any(fnmatch.fnmatch(name, pattern) for name in names) for pattern in known)


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "run_id", ".lock", "export", "checkpoints", "evaluations/teacher.json", "metrics.jsonl",
        "teacher.math.json",
    ],
)  # fmt: skip
def test_a_link_to_elsewhere_is_not_written_through(experiment: Experiment, tmp_path: Path, name: str) -> None:
    run, elsewhere = tmp_path / "runs" / "miniature", tmp_path / "elsewhere"
    (run / name).parent.mkdir(parents=True)
    elsewhere.write_text("mine")
    (run / name).symlink_to(elsewhere)
    with (
        pytest.raises(UserError, match=rf"{name} is a symbolic link, and a run writes nothing outside [^\n]+"),
        RunDirectory.claim(run, experiment) as claimed,
    ):
        claimed.begin(None)
    assert elsewhere.read_text() == "mine"


def test_the_whole_directory_may_be_a_link_and_hold_links_of_others(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "disk" / "export").mkdir(parents=True)
    for name in ("notes.txt", "export/README.md"):
        (tmp_path / "disk" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "miniature").symlink_to(tmp_path / "disk")
    with RunDirectory.claim(tmp_path / "miniature", experiment) as claimed:
        claimed.begin(None)
    assert (tmp_path / "disk" / "run_id").exists()
