"""The command line: `python -m distill.run experiments/NAME.py [--field.path VALUE …]`."""

import argparse
import contextlib
import importlib.util
import io
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.text import Text

from distill.execute import execute
from distill.experiment import Experiment
from distill.host_memory import keep_freed_memory
from distill.processes import Cluster, is_first, where
from distill.progress import Progress, duration
from distill.report import terminal_table
from distill.results import headline
from distill.stages.context import Interrupted, StopRequest
from qwen3.errors import UserError

_DESCRIPTION = """\
Run a distillation experiment, or go on with one that was stopped.

  python -m distill.run experiments                      list the experiments of a folder
  python -m distill.run experiments/NAME.py              run one; the same command again continues it
  python -m distill.run experiments/NAME.py --help       all its fields with their values
  python -m distill.run experiments/NAME.py --seed 1 --name NAME-1 --stages.on-policy.training.steps 300

On several hosts, start the same command once on each, over a file system that all of them share. Under srun and on
GKE's TPU slices the processes find one another; elsewhere say who they are (--coordinator, --processes, --process).
"""
_EPILOGUE = """\
Everything goes into RUNS/NAME: config.json, tensorboard/ (tensorboard --logdir RUNS), checkpoints/, targets/,
rollouts.jsonl, report.html, report.json, and export/, the student as a Hugging Face folder.
Exit status: 0 done, or stopped by SIGTERM or Ctrl-C with all saved; 2 something for you to mend, said in one line;
1 one of several processes has died, and the others have ended with it.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return _reported(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _reported(work: Callable[[], int]) -> int:
    """The status of `work`; what the user can mend is said in one line, and the status is 2."""
    try:
        return work()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        message = f"{error.filename or 'disk'}: {error.strerror}"
    print(f"error{where()}: {message}", file=sys.stderr)
    return 2


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.run",
        description=_DESCRIPTION,
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", nargs="?", help="an experiment file, or a folder of them to list")
    parser.add_argument("--runs", default="runs", help="folder that holds the run directories (default: runs)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, or auto: jax finds it")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes run the experiment together")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this one is, 0 to N-1")
    own, fields = parser.parse_known_args(arguments)
    if own.experiment is None or own.experiment.startswith("-"):
        parser.print_help()
        return 0 if not arguments or "--help" in arguments or "-h" in arguments else 2
    path = Path(own.experiment)
    if path.is_dir():
        _list(path, Console())
        return 0
    experiment = _override(load_experiment(path), fields, path)
    cluster = Cluster.named(own.coordinator, own.processes, own.process)
    if cluster is None:
        return _run(experiment, own.runs)
    return cluster.run(lambda: _reported(lambda: _run(experiment, own.runs)))


def _run(experiment: Experiment, runs: str) -> int:
    console = Console() if is_first() else Console(quiet=True, force_terminal=False)
    directory = Path(runs) / experiment.name
    console.print(f"[bold]{experiment.name}[/bold]  {experiment.description}", highlight=False)
    _keep_compiled(Path(runs))
    console.print(f"run directory {directory}   tensorboard --logdir {runs}", highlight=False, style="dim")
    try:
        with StopRequest().listening() as stop, Progress(console) as progress:
            report = execute(experiment, directory, progress, stop)
    except Interrupted as stopped:
        console.print(f"stopped. {stopped}. The same command goes on from there.", highlight=False)
        return 0
    console.print()
    console.print(terminal_table(report))
    console.print(headline(report), highlight=False)
    took = "" if report.wall_seconds is None else f"   {duration(report.wall_seconds)}"
    console.print(f"report {directory / 'report.html'}   student {directory / 'export'}{took}", highlight=False)
    return 0


def _keep_compiled(runs: Path) -> None:
    """Programs that took a second or more to compile are read back by the next start; jax's own setting comes first.

    What is read back are the same instructions, so the numbers are the same. Half an entry that a kill left behind is
    passed over with a warning.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(runs.absolute() / ".compiled"))


def load_experiment(path: Path) -> Experiment:
    """The experiment that a Python file's `config()` returns. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; list a folder's experiments with: python -m distill.run FOLDER")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file; an experiment is a .py file with a function config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    config = getattr(module, "config", None)
    if not callable(config):
        raise UserError(f"{path} has no function config(); it must return an Experiment")
    try:
        experiment = config()
    except TypeError as error:
        # A misspelt field of a dataclass; other TypeErrors are bugs of the file and deserve their traceback.
        if "unexpected keyword argument" not in str(error) and "missing" not in str(error):
            raise
        raise UserError(f"{path}: {error}") from None
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path}: config() returned {type(experiment).__name__}, not an Experiment")
    return experiment


def _override(experiment: Experiment, fields: Sequence[str], path: Path) -> Experiment:
    prog = f"python -m distill.run {path}"
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return tyro.cli(
                Experiment,
                default=experiment,
                args=fields,
                prog=prog,
                description=experiment.description,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_in_one_line(refusal.getvalue())}; all fields: {prog} --help") from None


def _in_one_line(box: str) -> str:
    """What tyro's box of several lines says: its first part, and the nearest option where it suggests some.

    On a UTF-8 terminal the box has a frame with the title in it, else only rules below the title and between parts.
    """
    _, *rows = (row.strip("│ ") for row in Text.from_ansi(box).plain.strip().splitlines())
    parts = [list(part) for is_rule, part in itertools.groupby(rows, lambda row: not row.strip("─-╰╯")) if not is_rule]
    said = " ".join(parts[0]).removeprefix("Error parsing ").rstrip(".")
    near = next((row for before, row in itertools.pairwise(rows) if before == "Perhaps you meant:"), None)
    return said if near is None else f"{said}; perhaps you meant {near.split()[0]}"


def _list(folder: Path, console: Console) -> None:
    files = [file for file in sorted(folder.glob("*.py")) if "def config(" in file.read_text()]
    if not files:
        raise UserError(f"{folder} holds no experiment: no .py file with a function config()")
    width = max(len(str(file)) for file in files)
    for file in files:
        console.print(f"{file!s:{width}}  {load_experiment(file).description}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
