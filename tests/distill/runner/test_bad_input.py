"""What a user can get wrong: one line on stderr, exit status 2, and nothing left behind."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from distill.run import _parser, _reported, main
from distill.runner.command_line import overridden
from distill.runner.experiment_file import load_experiment
from distill.runner.run_directory import RunDirectory
from qwen3.errors import UserError
from tests.distill import faults, miniature

ROOT = Path(__file__).parents[3]
WITHOUT_PROMPT_FILE = """
from pathlib import Path
from tests.distill import miniature

def config():
    return miniature.experiment(str(Path(__file__).parent / "teacher"))
"""
WITH_PROMPT_FILE = """
import dataclasses
from pathlib import Path
from distill.tasks import PromptFile
from tests.distill import miniature

def config():
    here = Path(__file__).parent
    whole = miniature.experiment(str(here / "teacher"))
    return dataclasses.replace(whole, tasks={"ours": PromptFile(path=str(here / "prompts.jsonl"))})
"""


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_experiment(tmp_path_factory.mktemp("miniature"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error that ends with status 2."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("where", ["host", "device"])
def test_more_than_the_memory_is_said_in_one_line(capsys: pytest.CaptureFixture[str], where: str) -> None:
    def allocate() -> int:
        if where == "host":
            return int(np.zeros((2**26, 2**26))[0, 0])
        return int(jnp.zeros((2**28, 2**28))[0, 0])

    assert _reported(allocate) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (")
    assert "lower rows, row_length, batch_size or the model's sizes, or see what fits" in line


def test_missing_file_and_folder_without_experiments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "nowhere.py does not exist" in refused(capsys, "nowhere.py")
    assert "holds no experiment" in refused(capsys, str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "has no function config()"),
        ("config = 3\n", "has no function config()"),
        ("def config():\n    pass\n", "config() returned NoneType, not an Experiment"),
        ("from distill import Experiment\ndef config():\n    return Experiment\n", "config() returned type, not an"),
        ("import sys\n\ndef config():\n    sys.exit(0)\n", "bad.py, line 4: it ends the process; let config() return"),
        ("raise SystemExit\n", "bad.py, line 1: it ends the process"),
        ("def config():\n    return config()\n", "bad.py, line 2: it calls itself without an end; mend the recursion"),
        ("def config():\n    return open('/nowhere/at.all')\n", "line 2: /nowhere/at.all: No such file or directory"),
        ("x = 1\0\n", "bad.py"),
        ("# \udcff\n", "bad.py"),
        (
            "from distill import Optimizer\ndef config():\n    return Optimizer(learning_rate=float('nan'))\n",
            "bad.py, line 3: optimizer.learning_rate is nan; it must be a finite number",
        ),
        (
            "from distill import FromScratch\ndef config():\n"
            "    return FromScratch(tokenizer='t', architecture={'rope_theta': float('inf')})\n",
            "bad.py, line 3: architecture.rope_theta is inf; it must be a finite number",
        ),
        ("def config(:\n", "bad.py, line 1: "),
        ("def config():\n    return 3\n", "returned int, not an Experiment"),
        (
            "from distill.stages import Sft\ndef config():\n    return Sft(problms=3)\n",
            "bad.py, line 3: Sft has no field 'problms'; perhaps you meant 'problems'",
        ),
        (
            "from distill import stages\ndef config():\n    return stages.Sft(zzz=3)\n",
            "bad.py, line 3: Sft has no field 'zzz'; it has problems, form, modes",
        ),
        (
            "from distill.experiment import Teacher\ndef config():\n    return Teacher()\n",
            "bad.py, line 3: Teacher lacks path; give it",
        ),
        (
            "from distill.training.optimizer import Optimizer\ndef config():\n    return Optimizer(b1=2)\n",
            "bad.py, line 3: optimizer.b1 is 2",
        ),
        (
            "from distill.stages.loop import Training\n\nTRAINING = Training(steps=-1)\ndef config():\n    pass\n",
            "bad.py, line 3: training.steps is -1; it must be at least 1",
        ),
        (
            "from distill.stages import OnPolicy\ndef config():\n    return OnPolicy(prompts_per_step='8')\n",
            "bad.py, line 3: prompts_per_step is '8'; it must be a whole number",
        ),
        (
            "from distill.stages import OnPolicy\ndef config():\n    return OnPolicy(training={'steps': 3})\n",
            "bad.py, line 3: training is {'steps': 3}; it must be Training",
        ),
        (
            "from distill.stages import OnPolcy\n",
            "bad.py, line 1: distill.stages has no 'OnPolcy'; perhaps you meant 'OnPolicy'",
        ),
        (
            "\nimport distil.stages\n",
            "bad.py, line 2: there is no module 'distil'; perhaps you meant 'distill'",
        ),
        (
            "import dataclasses\nfrom tests.distill import miniature\ndef config():\n"
            "    whole = miniature.experiment('somewhere')\n"
            "    return dataclasses.replace(whole, evaluation=dataclasses.replace(whole.evaluation, shown='4'))\n",
            "bad.py, line 5: evaluation.shown is '4'; it must be a whole number",
        ),
    ],
)
def test_unusable_experiment_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: str, message: str
) -> None:
    file = tmp_path / "bad.py"
    file.write_bytes(source.encode(errors="surrogateescape"))
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
            "error: stages.on-policy.training.steps is 0; it must be at least 1;",
        ),
        (
            ("--stages.on-policy.training.steps", "abc"),
            "error: --stages.on-policy.training.steps is 'abc'; it must be a whole number or None;",
        ),
        (
            ("--stages.on-policy.training.optimizer.b1", "2"),
            "error: stages.on-policy.training.optimizer.b1 is 2.0; it must lie in 0..1, 1 excluded;",
        ),
        (
            ("--stages.on-policy.training.optimizer.epsilon", "x"),
            "error: --stages.on-policy.training.optimizer.epsilon is 'x'; it must be a number;",
        ),
        (("--stages.on-policy.prompts-per-step", "0"), "error: stages.on-policy.prompts_per_step is 0;"),
        (("--stages.off-policy.flops-of", "x"), "error: stages.off-policy: give either training.steps or flops_of"),
        (("--evaluation.pass-at", "a"), "error: --evaluation.pass-at is 'a'; it must be whole numbers;"),
        (("--mesh.data", "0"), "error: mesh.data is 0; it must be at least 1 or -1;"),
        (("--kernels.attention", "triton"), "error: --kernels.attention is 'triton'; "),
        (("--kernels.exchange", "all"), "error: --kernels.exchange is 'all'; use one of all_gather, ragged;"),
        (("--seed", "x"), "error: --seed is 'x'; it must be a whole number;"),
        (("--seed", "-1"), "error: seed is -1; it must lie in 0..2147483647;"),
        (
            ("--stages.on-policy.loss.name", "kl"),
            "error: --stages.on-policy.loss.name is 'kl'; use one of forward_kl, reverse_kl, jsd, skew_kl;",
        ),
        (
            ("--export-stage", "ahead", "--stages.ahead.start-from", "of_policy"),
            "error: stages.ahead.start_from is 'of_policy', which is no earlier stage; perhaps you meant 'off_policy'",
        ),
        (("--mesh.nonsense.rank", "4"), "error: Unrecognized options: --mesh.nonsense.rank, 4;"),
    ],
)
def test_bad_field_on_the_command_line(
    capsys: pytest.CaptureFixture[str], experiment_file: Path, arguments: tuple[str, ...], message: str
) -> None:
    line = refused(capsys, str(experiment_file), *arguments)
    assert message in line
    assert f"{experiment_file} --help" in line


NUMBERS = ("nan", "inf", "-inf", "1e999", "0", "-1", "1.5", "1e-320", "9" * 30, "9" * 5000, "True", "", "None", "0x8")
WHOLE, REAL = ("0", "-1", "9" * 30), ("nan", "inf", "-inf", "0", "-1", "1.5", "1e-320", "9" * 30)
"""Those that can be read as such: what cannot is refused by type, whatever the field."""


@pytest.mark.parametrize(
    ("option", "values"),
    [
        *((option, NUMBERS) for option in ("--seed", "--stages.ahead.training.steps", "--evaluation.pass-at")),
        *((option, NUMBERS) for option in ("--stages.ahead.training.optimizer.b2", "--evaluation.modes")),
        *((option, WHOLE) for option in ("--mesh.fsdp", "--evaluation.shown", "--stages.off-policy.top-k")),
        *((option, WHOLE) for option in ("--stages.ahead.max-staleness", "--tasks.arithmetic.chain-sum.max-digits")),
        ("--evaluation.thinking.temperature", REAL),
        ("--stages.off-policy.modes.thinking-fraction", REAL),
        ("--tasks.arithmetic.held-out-fraction", REAL),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_whatever_number_is_given_it_is_taken_or_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], option: str, values: tuple[str, ...]
) -> None:
    whole, parser = miniature.experiment("somewhere"), _parser()
    # For every line that it reads tyro makes a parser of every field.
    stages = {name: whole.stages[name] for name in ("off_policy", "ahead")}
    experiment = dataclasses.replace(whole, stages=stages, export_stage="ahead")
    for value in values:
        refusal = None
        try:
            overridden(experiment, [option, value], Path("a.py"), parser)
        except UserError as error:
            refusal = str(error)
        assert value != "nan" or refusal is not None
        assert refusal is None or ("\n" not in refusal and len(refusal) < 500 and refusal.endswith("a.py --help-all"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_bad_field_is_one_line_on_any_terminal(
    capsys: pytest.CaptureFixture[str], experiment_file: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "steps is 'abc'; it must be" in refused(
        capsys, str(experiment_file), "--stages.on-policy.training.steps", "abc"
    )


def test_a_field_inside_of_what_the_file_leaves_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plain.py"
    file.write_text(
        "import dataclasses\nfrom student.init import FromCheckpoint\nfrom tests.distill import miniature\n"
        "def config():\n"
        "    return dataclasses.replace(miniature.experiment('there'), student=FromCheckpoint(path='here'))\n"
    )
    line = refused(capsys, str(file), "--student.lora.rank", "4")
    assert f"--student.lora.rank needs student.lora, which is None in {file}; set student.lora there first;" in line


def test_what_a_file_prints_is_not_what_the_command_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "chatty.py"
    file.write_text(
        "from tests.distill import miniature\nprint('one')\ndef config():\n    print('two')\n"
        "    return miniature.experiment('there')\n"
    )
    load_experiment(file)
    assert capsys.readouterr() == ("", "one\ntwo\n")


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_what_is_no_python_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("def config(): pass\n")
    assert "is no Python file; an experiment is a .py file with" in refused(capsys, str(tmp_path / name))
    with pytest.raises(UserError, match=r"is a folder; name one of its experiments, which python -m distill\.run"):
        load_experiment(tmp_path)


def test_a_files_own_errors_keep_their_traceback(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def config():\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        main([str(tmp_path / "own.py")])


def test_a_broken_file_does_not_hide_the_others(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def config():\n    return 1 / 0\n")
    (tmp_path / "b.py").write_text("import distil\ndef config():\n    pass\n")
    (tmp_path / "d.py").write_text("def config():\n    raise SystemExit\n")
    (tmp_path / "c.py").write_text(
        "from tests.distill import miniature\ndef config():\n    return miniature.experiment('somewhere')\n"
    )
    assert main([str(tmp_path)]) == 0
    a, b, c, d = capsys.readouterr().out.splitlines()
    assert "a.py, line 2: ZeroDivisionError: division by zero" in a
    assert "b.py, line 1: there is no module 'distil'; perhaps you meant 'distill'" in b
    assert "A run in miniature." in c
    assert "d.py, line 2: it ends the process" in d


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


def test_missing_teacher_and_then_the_right_one(
    capsys: pytest.CaptureFixture[str], experiment_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    line = refused(capsys, str(experiment_file), "--runs", str(runs), "--teacher.path", str(tmp_path / "no"))
    assert str(tmp_path / "no") in line
    assert list(runs.iterdir()) == []
    experiment = load_experiment(experiment_file)
    with RunDirectory.claim(runs / "miniature", experiment) as run:
        run.begin(None)
        assert (runs / "miniature" / "config.json").exists()
    # Nothing was done yet, so another configuration may have the directory; once there is work, it may not.
    other = dataclasses.replace(experiment, seed=1)
    with RunDirectory.claim(runs / "miniature", other) as run:
        run.begin(None)
        (runs / "miniature" / "targets").mkdir()
    with RunDirectory.claim(runs / "miniature", other):
        pass
    with (
        pytest.raises(UserError, match="holds a run of another configuration"),
        RunDirectory.claim(runs / "miniature", experiment),
    ):
        pass
    assert json.loads((runs / "miniature" / "config.json").read_text())["seed"] == 1


def test_a_directory_in_use_is_left_alone(experiment_file: Path, tmp_path: Path) -> None:
    experiment = load_experiment(experiment_file)
    with RunDirectory.claim(tmp_path / "run", experiment):
        with (
            pytest.raises(UserError, match="another process is running"),
            RunDirectory.claim(tmp_path / "run", experiment),
        ):
            pass
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


def _truncated_weights(folder: Path) -> str:
    file = folder / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "model.safetensors is truncated or no safetensors file"


def _index_of_an_absent_file(folder: Path) -> str:
    teacher = folder / "teacher"
    (teacher / "model.safetensors").rename(teacher / "model-00001-of-00002.safetensors")
    names = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return "names model-00002-of-00002.safetensors, absent from the folder; download them"


def _vocabulary_too_small(folder: Path) -> str:
    file = folder / "teacher" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 383}))
    return "the model's vocab_size is 383; take tokenizer and weights from the same checkpoint"


def _malformed_prompts(folder: Path) -> str:
    rows = [json.dumps({"prompt": f"What is {n} + 1?", "answer": n + 1}) for n in range(100)]
    (folder / "prompts.jsonl").write_text("\n".join([*rows[:41], '{"prompt": ', *rows[41:]]))
    return "prompts.jsonl:42: not JSON"


@pytest.mark.parametrize(
    "spoil", [_truncated_weights, _index_of_an_absent_file, _vocabulary_too_small, _malformed_prompts]
)
def test_bad_files_are_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], experiment_file: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    shutil.copytree(experiment_file.parent / "teacher", tmp_path / "teacher")
    message = spoil(tmp_path)
    file = tmp_path / "my_experiment.py"
    file.write_text(WITH_PROMPT_FILE if (tmp_path / "prompts.jsonl").exists() else WITHOUT_PROMPT_FILE)
    mesh = ["--mesh.data", "8", "--stages.ahead.max-staleness", "0"]
    for stage in ("pretraining", "off-policy", "on-policy", "same-outputs", "ahead"):
        mesh += [f"--stages.{stage}.training.rows", "8"]
    assert message in refused(capsys, str(file), "--runs", str(tmp_path / "runs"), *mesh)
    assert list((tmp_path / "runs").iterdir()) == []


def test_run_directory_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], experiment_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused(capsys, str(experiment_file), "--runs", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_folder_lists_its_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "experiments")]) == 0
    out = capsys.readouterr().out
    assert "quickstart.py" in out
    assert "benchmarks" not in out


@pytest.mark.parametrize("name", [file.name for file in sorted((ROOT / "experiments").glob("*.py"))])
def test_help_fits_three_screens_and_every_line_of_it_can_be_given(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = ROOT / "experiments" / name
    if "def config(" not in file.read_text():
        return
    assert main([str(file), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 120
    arguments, begin = [], None
    for line in lines:
        if line.startswith("--"):
            begin = line.removesuffix("…")
        elif begin is not None and line:
            assert len(line) <= 100
            option, *values = line.strip().partition("  ")[0].split(" ")
            arguments += [f"{begin}{option}", *values]
    assert "--stages" in " ".join(arguments)
    experiment = load_experiment(file)
    assert overridden(experiment, arguments, file, _parser()) == experiment


def test_help_names_the_fields(capsys: pytest.CaptureFixture[str], experiment_file: Path) -> None:
    assert main(["--help"]) == 0
    assert "same command again" in capsys.readouterr().out
    assert main([str(experiment_file), "--help-all"]) == 0
    out = capsys.readouterr().out
    assert "--stages.on-policy.training.optimizer.learning-rate" in out
    assert all(option in out for option in ("--runs FOLDER", "--coordinator HOST:PORT", "--processes N", "--process I"))
    assert "Raises" not in out
