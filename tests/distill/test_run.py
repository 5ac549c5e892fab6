"""The whole of it in miniature: from the command line to the report, killed in every stage, and refused bad input."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from distill.run import main
from tests.distill import miniature

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
from tests.distill import miniature


def config():
    return miniature.experiment({teacher!r})
"""


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    file = folder / "my_experiment.py"
    file.write_text(EXPERIMENT.format(teacher=miniature.make_teacher(folder)))
    return file


def launch(
    file: Path, runs: Path, *more: str, kill_after: int | None = None, number: int = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own on one device; compiled programs are shared between launches."""
    command, environment = miniature.launch_command(file, runs, *more, devices=1, kill_after=kill_after, number=number)
    return subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one uninterrupted run."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    done = launch(experiment_file, runs)
    assert done.returncode == 0, done.stderr
    assert "self-test  KL of the student to itself" in done.stdout
    assert "report" in done.stdout
    return runs / "miniature"


def scalars(directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    timed = {"train_tokens_per_second", "sample_tokens_per_second"}
    rows = {
        (record["stage"], record["step"]): {k: v for k, v in record["scalars"].items() if k not in timed}
        for record in records
    }
    assert len(rows) == len(records), "a step was recorded twice"
    return rows


def test_report_has_a_row_for_every_model_and_mode(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    models = ["student_initial", "pretraining", "off_policy", "on_policy", "same_outputs", "teacher"]
    assert [(row["model"], row["mode"]) for row in report["rows"]] == [
        (model, mode) for model in models for mode in ("thinking", "non_thinking")
    ]
    assert all(
        {"pass_at_1", "mean_response_tokens"} <= row.keys() and "2" in row["pass_at_k"] for row in report["rows"]
    )
    costs = {stage["name"]: stage for stage in report["stages"]}
    assert costs["pretraining"]["teacher_flops"] == 0
    assert costs["off_policy"]["tokens_sampled"] > 0
    assert costs["on_policy"]["student_sample_flops"] > 0
    total = [
        sum(costs[name][field] for field in ("student_train_flops", "student_sample_flops", "teacher_flops"))
        for name in ("on_policy", "same_outputs")
    ]
    # The comparison may spend what the on-policy stage has spent, to within its last step.
    assert total[0] * 0.5 < total[1] <= total[0] * 1.25


def test_run_directory_holds_what_people_look_for(finished: Path) -> None:
    for name in ("config.json", "environment.json", "report.html", "rollouts.jsonl", "export/model.safetensors"):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").rglob("events.*"))
    assert (finished / "targets" / "off_policy" / "index.json").exists()
    assert "<script" not in (finished / "report.html").read_text()


def test_export_loads_in_transformers_and_holds_the_students_last_weights(finished: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "export")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.top_k == 0 or model.generation_config.top_k is not None
    assert len(load_file(finished / "export" / "model.safetensors")) > 10


@pytest.mark.parametrize("kills", [(2, 4, 5, 2)], ids=["pretraining, off_policy, on_policy twice"])
def test_killed_in_every_stage_it_ends_in_the_same_losses_and_weights(
    kills: tuple[int, ...], experiment_file: Path, finished: Path, tmp_path: Path
) -> None:
    for steps in kills:
        killed = launch(experiment_file, tmp_path, kill_after=steps)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = launch(experiment_file, tmp_path)
    assert done.returncode == 0, done.stderr
    resumed = tmp_path / "miniature"
    assert scalars(resumed) == scalars(finished)
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (resumed, finished))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert np.array_equal(tensor, theirs[name]), name
    rows = [json.loads((folder / "report.json").read_text())["rows"] for folder in (resumed, finished)]
    assert rows[0] == rows[1]


def test_sigterm_saves_and_exits_with_0(experiment_file: Path, finished: Path, tmp_path: Path) -> None:
    stopped = launch(experiment_file, tmp_path, kill_after=1, number=signal.SIGTERM)
    assert stopped.returncode == 0, stopped.stderr
    assert "saved after step 1 of 3" in " ".join(stopped.stdout.split())
    # Checkpoints come every second step; this one is there because of the signal.
    assert (tmp_path / "miniature" / "checkpoints" / "pretraining" / "1").is_dir()


def test_the_same_command_again_changes_nothing(experiment_file: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    again = launch(experiment_file, finished.parent)
    assert again.returncode == 0, again.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_with_the_fields_that_differ(experiment_file: Path, finished: Path) -> None:
    other = launch(experiment_file, finished.parent, "--stages.on-policy.training.steps", "7", "--seed", "3")
    assert other.returncode == 2
    assert "stages.on_policy.training.steps: 5 → 7" in other.stderr
    assert "seed: 0 → 3" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error that ends with status 2."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_missing_file_and_folder_without_experiments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "nowhere.py does not exist" in refused(capsys, "nowhere.py")
    assert "holds no experiment" in refused(capsys, str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "has no function config()"),
        ("def config(:\n", "line 1"),
        ("def config():\n    return 3\n", "returned int, not an Experiment"),
        ("from distill.stages import Sft\ndef config():\n    return Sft(problms=3)\n", "problms"),
        ("from distill.optimizer import Optimizer\ndef config():\n    return Optimizer(b1=2)\n", "optimizer.b1 is 2"),
    ],
)
def test_unusable_experiment_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: str, message: str
) -> None:
    file = tmp_path / "bad.py"
    file.write_text(source)
    assert message in refused(capsys, str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--stages.on-policy.training.stepz", "3"),
            "Unrecognized options: --stages.on-policy.training.stepz, 3; "
            "perhaps you meant --stages.on-policy.training.steps;",
        ),
        (
            ("--stages.on-policy.training.steps", "0"),
            "stages.on-policy.training: training.steps is 0; it must be at least 1;",
        ),
        (("--seed", "x"), "--seed: invalid literal for int() with base 10: 'x';"),
        (("--seed", "-1"), "seed is -1; it must lie in 0..2147483647;"),
        (("--stages.on-policy.loss.name", "kl"), "invalid choice 'kl' for argument '--stages.on-policy.loss.name'"),
    ],
)
def test_bad_field_on_the_command_line(
    capsys: pytest.CaptureFixture[str], experiment_file: Path, arguments: tuple[str, ...], message: str
) -> None:
    line = refused(capsys, str(experiment_file), *arguments)
    assert message in line
    assert f"{experiment_file} --help" in line


def test_rows_that_the_devices_cannot_share(
    capsys: pytest.CaptureFixture[str], experiment_file: Path, tmp_path: Path
) -> None:
    line = refused(
        capsys, str(experiment_file), "--runs", str(tmp_path), "--evaluation.problems", "1", "--mesh.data", "8",
        "--evaluation.samples-per-problem", "2", "--stages.pretraining.training.rows", "5",
    )  # fmt: skip
    assert "stages.pretraining.training.rows is 5, but rows are spread over 8 devices; use a multiple of 8" in line
    line = refused(
        capsys, str(experiment_file), "--runs", str(tmp_path), "--mesh.data", "8",
        "--name", "second", "--stages.on-policy.prompts-per-step", "3", "--stages.pretraining.training.rows", "8",
        "--stages.off-policy.batch-size", "8", "--stages.off-policy.training.rows", "8",
    )  # fmt: skip
    assert "stages.on_policy.prompts_per_step × samples_per_prompt is 3, but rows are spread over 8 devices" in line


def test_missing_teacher_leaves_nothing_half_written(
    capsys: pytest.CaptureFixture[str], experiment_file: Path, tmp_path: Path
) -> None:
    line = refused(capsys, str(experiment_file), "--runs", str(tmp_path), "--teacher.path", str(tmp_path / "no"))
    assert str(tmp_path / "no") in line
    assert not (tmp_path / "miniature" / "checkpoints").exists()


def test_run_directory_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], experiment_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused(capsys, str(experiment_file), "--runs", str(tmp_path / "file"))


def test_folder_lists_its_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "experiments")]) == 0
    out = capsys.readouterr().out
    assert "quickstart.py" in out
    assert "benchmarks" not in out


def test_help_names_the_fields(capsys: pytest.CaptureFixture[str], experiment_file: Path) -> None:
    assert main(["--help"]) == 0
    assert "same command again" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_status:
        main([str(experiment_file), "--help"])
    assert exit_status.value.code == 0
    assert "--stages.on-policy.training.optimizer.learning-rate" in capsys.readouterr().out
