"""The command line: `python -m distill.run experiments/NAME.py [--field.path VALUE …]`."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.text import Text

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.monitor.terminal import make_console
from distill.monitor.time_left import duration
from distill.report.report import terminal_table
from distill.report.results import headline
from distill.runner.command_line import overridden, parser_of
from distill.runner.execute import execute
from distill.runner.experiment_file import listed, load_experiment
from distill.stages.stopping import Interrupted, StopRequest
from distill.training.host_memory import keep_freed_memory
from qwen3.commands import give_up_output, reported, spell_out
from qwen3.errors import UserError
from qwen3.hosts.processes import Cluster, add_cluster_options, is_first, where

_DESCRIPTION = """\
Run a distillation experiment, or go on with one that was stopped.

  python -m distill.run experiments                      list the experiments of a folder
  python -m distill.run experiments/NAME.py              run one; the same command again continues it
  python -m distill.run experiments/NAME.py --help       the fields that people change first; --help-all for all
  python -m distill.run experiments/NAME.py --seed 1 --name NAME-1 --stages.on-policy.training.steps 300

On several hosts, start the same command once on each, over a file system that all of them share. Under srun and on
GKE's TPU slices the processes find one another; elsewhere say who they are (--coordinator, --processes, --process).
"""
_EPILOGUE = """\
Everything goes into RUNS/NAME: config.json, tensorboard/ (tensorboard --logdir RUNS), checkpoints/, targets/,
rollouts.jsonl, report.html, report.json, and export/, the student as a Hugging Face folder.
python -m distill.report RUNS/NAME … makes the page of a run anew, and joins several runs into one.
Exit status: 0 done, or stopped by SIGTERM, SIGHUP or Ctrl-C with all saved; 130 ended by a second Ctrl-C; 2 something
for you to mend, said in one line; 1 one of several processes has died, and the others have ended with it.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    spell_out()
    return _reported(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _reported(work: Callable[[], int]) -> int:
    smaller = "lower rows, row_length, batch_size or the model's sizes, or see what fits with python -m distill.plan"
    return reported(work, where=where, smaller=smaller)


def _main(arguments: list[str]) -> int:
    parser = _parser()
    own, fields = parser.parse_known_args(arguments)
    if own.experiment is None or own.experiment.startswith("-"):
        parser.print_help()
        return 0 if not arguments or "--help" in arguments or "-h" in arguments else 2
    path = Path(own.experiment)
    if path.is_dir():
        _list(path, make_console())
        return 0
    try:
        experiment = overridden(load_experiment(path), fields, path, parser)
    except SystemExit as told:  # of --help, which has been said
        return int(told.code or 0)
    cluster = Cluster.named(own.coordinator, own.processes, own.process)
    if cluster is None:
        return _run(experiment, own.runs, arguments)
    return cluster.run(lambda _lifelines: _reported(lambda: _run(experiment, own.runs, arguments)))


def _parser() -> argparse.ArgumentParser:
    """With what is said about the run and not about the experiment."""
    parser = parser_of(
        "python -m distill.run", _DESCRIPTION, _EPILOGUE, "an experiment file, or a folder of them to list"
    )
    parser.add_argument(
        "--runs", metavar="FOLDER", default="runs", help="folder that holds the run directories (default: runs)"
    )
    add_cluster_options(parser)
    return parser


def _run(experiment: Experiment, runs: str, arguments: Sequence[str]) -> int:
    console = make_console(quiet=not is_first())
    directory = Path(runs) / experiment.name
    console.print(Text(experiment.name, "bold"), f" {experiment.description}", soft_wrap=True)
    _keep_compiled(Path(runs))
    console.print(f"run directory {directory}   tensorboard --logdir {runs}", style="dim", soft_wrap=True)
    try:
        with Progress(console) as progress, StopRequest(progress.print, progress.close).listening() as stop:
            command = shlex.join(["python", "-m", "distill.run", *arguments])
            report = execute(experiment, directory, progress, stop, command)
    except Interrupted as stopped:
        console.print(f"stopped. {stopped}. The same command goes on from there.", soft_wrap=True)
        return 0
    except BrokenPipeError:
        give_up_output()
        raise UserError(
            "the run has stopped, since nobody reads its output any more; the same command goes on from what was "
            "saved last: send its output to a file"
        ) from None
    console.print()
    if report.rows:
        console.print(terminal_table(report))
    console.print(headline(report), soft_wrap=True)
    took = "" if report.wall_seconds is None else f"   {duration(report.wall_seconds)}"
    console.print(f"report {directory / 'report.html'}   student {directory / 'export'}{took}", soft_wrap=True)
    return 0


def _keep_compiled(runs: Path) -> None:
    """Programs that took a second or more to compile are read back by the next start; jax's own setting comes first.

    What is read back are the same instructions, so the numbers are the same. Half an entry that a kill left behind is
    passed over with a warning.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(runs.absolute() / ".compiled"))


def _list(folder: Path, console: Console) -> None:
    lines = list(listed(folder))
    width = max(len(str(file)) for file, _ in lines)
    for file, line in lines:
        console.print(f"{file!s:{width}}  {line}", soft_wrap=True)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
