"""The command in a terminal and in pipes, in processes of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill.run import main
from tests.distill.faults import launch_in_terminal
from tests.distill.miniature import ROOT

ENDLESS = ("--name", "endless", "--stages.pretraining.training.steps", "100000", "--evaluation.problems", "2")
MARKUP = "a [red]x[/] [/] :smile: run"
FIRST = "stopping after this step; press Ctrl-C again to end now"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the endless run goes on from test to test."""
    return tmp_path_factory.mktemp("endless")


def test_ctrl_c_says_at_once_what_happens_and_a_second_ends_with_130(experiment_file: Path, runs: Path) -> None:
    status, shown = launch_in_terminal(
        experiment_file, runs, *ENDLESS, "--description", MARKUP,
        keys=[(b"loss", b"\x03"), (FIRST.encode(), b"\x03")],
    )  # fmt: skip
    assert MARKUP in shown
    # Whether the step under way ends before the second press is a matter of timing.
    assert status in (0, 130)
    assert "Traceback" not in shown
    cursor_shown = "\x1b[?25h"
    last = "ended by a second Ctrl-C; the same command goes on from what was saved last" if status else "stopped. stage"
    assert shown.rpartition(cursor_shown)[2].startswith(last)


@pytest.mark.long
def test_one_ctrl_c_saves_in_a_terminal_of_few_means_too(experiment_file: Path, runs: Path) -> None:
    more, variables = (
        (*ENDLESS, "--description", MARKUP),
        {"TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "ascii"},
    )
    status, shown = launch_in_terminal(experiment_file, runs, *more, keys=[(b"loss", b"\x03")], variables=variables)
    assert status == 0, shown
    assert FIRST in shown
    assert "The same command goes on from there." in shown
    assert list((runs / "endless" / "checkpoints" / "pretraining").iterdir())


def test_a_terminal_that_is_closed_stops_the_run_with_all_saved(experiment_file: Path, runs: Path) -> None:
    folder = runs / "endless" / "checkpoints" / "pretraining"

    def latest() -> int:
        # What a second Ctrl-C has cut off, in a test before, is no checkpoint.
        return max((int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()), default=0)

    before = latest()
    more = (*ENDLESS, "--description", MARKUP)
    status, _ = launch_in_terminal(experiment_file, runs, *more, keys=[(b"loss", None)])
    assert status == 0
    assert latest() > before


def test_help_into_a_pipe_that_closes_is_no_error(experiment_file: Path) -> None:
    command = f"{sys.executable} -m distill.run {experiment_file} --help | head -1"
    ended = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert len(ended.stdout.splitlines()) == 1


def test_paths_are_whole_in_a_pipe(experiment_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / ("long-" * 30) / "[red]x"
    # Refused once it has said where it would run: eight devices cannot share four rows.
    assert main([str(experiment_file), "--runs", str(runs), "--description", MARKUP]) == 2
    shown = capsys.readouterr()
    assert f"miniature  {MARKUP}" in shown.out.splitlines()
    assert f"run directory {runs}/miniature   tensorboard --logdir {runs}" in shown.out.splitlines()
