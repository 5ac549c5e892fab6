"""A run in miniature, killed at random moments: every attempt in a process of its own, cheap enough to make many.

    python -m tests.distill.faults --kills 20 --seed 0

prints a line for every kill and fails where a run that was killed differs from the one that was not. Processes are
forked from a server that has imported everything and started no device, and share their compiled programs.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from distill.monitor.progress import Progress
from distill.run import main
from tests.distill import miniature

OF_THE_MACHINE = ("tokens_per_second_per_device/", "memory_gib/", "mfu")
"""What metrics begin with that say something of the machine at that moment, and differ between two equal runs."""
START = "start"
"""The phase before the first progress bar: claiming the directory, building models, self-tests."""
_LONGEST_DELAY_SECONDS = 1.5
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["distill.run", "distill.report.page", "orbax.checkpoint", "tests.distill.miniature"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL, or another signal, so many seconds after a phase has begun."""

    phase: str
    delay_seconds: float = 0.0
    number: int = signal.SIGKILL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended."""

    status: int
    """Its exit status; -9 after SIGKILL."""
    output: str
    phases: list[str]
    """Titles of the progress bars that it began, after START."""


def launch(
    file: Path, runs: Path, *more: str, kill: Kill | None = None, before: Callable[[], None] | None = None
) -> Ended:
    """Run `file`'s experiment on one device; `before`, a module's function, is called in the process first."""
    with tempfile.TemporaryDirectory() as folder:
        process = _PROCESSES.Process(
            target=_work,
            args=(Path(folder), [str(file), "--runs", str(runs), *more], kill, before),
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return Ended(
            status=process.exitcode,
            output=(Path(folder) / "output").read_text(),
            phases=(Path(folder) / "phases").read_text().splitlines(),
        )


def launch_in_terminal(
    file: Path, runs: Path, *more: str, keys: Sequence[tuple[bytes, bytes | None]], variables: Mapping[str, str] = {}
) -> tuple[int, str]:
    """Run `file`'s experiment in a terminal of 80 columns, and return its exit status and what the terminal showed.

    `keys` are texts to wait for, one after the other, and what is typed then; None closes the terminal.
    """
    command, environment = miniature.launch_command(file, runs, *more, devices=1)
    terminal, inside = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        ["setsid", "--ctty", *command],
        env={**environment, "TERM": "xterm", **variables},
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    shown, begin, open_keys = b"", 0, list(keys)
    with contextlib.suppress(OSError):  # Linux's end of a terminal
        while received := os.read(terminal, 65536):
            shown += received
            while open_keys and open_keys[0][0] in shown[begin:]:
                begin = len(shown)
                if (typed := open_keys.pop(0)[1]) is None:
                    break
                os.write(terminal, typed)
            else:
                continue
            break
    os.close(terminal)
    return process.wait(), shown.decode()


def _work(folder: Path, arguments: list[str], kill: Kill | None, before: Callable[[], None] | None) -> None:
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    phases = os.open(folder / "phases", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def begin(phase: str) -> None:
        os.write(phases, f"{phase}\n".encode())
        if kill is not None and phase == kill.phase:
            timer = threading.Timer(kill.delay_seconds, os.kill, (os.getpid(), kill.number))
            timer.daemon = True
            timer.start()

    task = Progress.task

    def noted(self: Progress, name: str, *rest: Any, **fields: Any) -> Any:
        begin(name)
        return task(self, name, *rest, **fields)

    Progress.task = noted  # type: ignore[method-assign]
    begin(START)
    if before is not None:
        before()
    sys.exit(main(arguments))


def make_experiment(folder: Path) -> Path:
    """An experiment file with every kind of stage, and its teacher beside it."""
    file = folder / "my_experiment.py"
    teacher = miniature.make_teacher(folder)
    file.write_text(
        f"from tests.distill import miniature\n\n\ndef config():\n    return miniature.experiment({teacher!r})\n"
    )
    return file


def scalars(directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What a run has recorded by stage and step, clock readings left out; no step may be there twice."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rows = {
        (record["stage"], record["step"]): {
            name: value
            for name, value in record["scalars"].items()
            if not (name.endswith("_seconds") or name.startswith(OF_THE_MACHINE))
        }
        for record in records
    }
    assert len(rows) == len(records), "a step was recorded twice"
    return rows


def require_same_end(ours: Path, theirs: Path) -> None:
    """Bit for bit: every recorded loss, every stage's last weights and optimiser state, the export, the evaluations."""
    assert scalars(ours) == scalars(theirs)
    stages = sorted(path.name for path in (theirs / "checkpoints").iterdir())
    assert sorted(path.name for path in (ours / "checkpoints").iterdir()) == stages
    for stage in stages:
        assert _bit_sums(ours / "checkpoints" / stage) == _bit_sums(theirs / "checkpoints" / stage), stage
    exports = [load_file(folder / "export" / "model.safetensors") for folder in (ours, theirs)]
    assert exports[0].keys() == exports[1].keys()
    for name, tensor in exports[0].items():
        assert np.array_equal(tensor, exports[1][name]), name
    rows = [json.loads((folder / "report.json").read_text())["rows"] for folder in (ours, theirs)]
    assert rows[0] == rows[1]


def _bit_sums(checkpoints: Path) -> tuple[int, Any]:
    latest = max(int(path.name) for path in checkpoints.iterdir())
    record = json.loads((checkpoints / str(latest) / "record" / "metadata").read_text())
    return latest, record["arrays"]


def kills_in_order(random_state: random.Random, phases: list[str], count: int) -> list[Kill]:
    """`count` random moments of one run in its order, one of every five in an evaluation."""
    evaluations = [phase for phase in phases if phase.startswith("evaluating")]
    others = [phase for phase in phases if phase not in evaluations]
    chosen = random_state.sample(others, count - count // 5) + random_state.sample(evaluations, count // 5)
    return [
        Kill(phase=phase, delay_seconds=random_state.uniform(0, _LONGEST_DELAY_SECONDS))
        for phase in sorted(chosen, key=phases.index)
    ]


def killed_run(file: Path, runs: Path, kills: list[Kill]) -> Iterator[tuple[Kill, str]]:
    """Start the command again after each kill until it ends by itself; gives each kill and the phase that it met."""
    for kill in kills:
        ended = launch(file, runs, kill=kill)
        if ended.status == 0:
            return
        assert ended.status == -signal.SIGKILL, ended.output
        yield kill, ended.phases[-1]
    ended = launch(file, runs)
    assert ended.status == 0, ended.output


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--each-run", type=int, default=5, help="kills of one run directory")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random_state, done, started = random.Random(arguments.seed), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = make_experiment(Path(folder))
        reference = launch(file, Path(folder) / "reference")
        assert reference.status == 0, reference.output
        print("| kill | phase begun | seconds later | met in | run |\n|---|---|---|---|---|\n", end="", flush=True)
        run = 0
        while done < arguments.kills:
            run += 1
            runs = Path(folder) / f"run{run}"
            count = min(arguments.each_run, arguments.kills - done)
            for kill, met in killed_run(file, runs, kills_in_order(random_state, reference.phases, count)):
                done += 1
                print(f"| {done} | {kill.phase} | {kill.delay_seconds:.2f} | {met} | {run} |", flush=True)
            require_same_end(runs / "miniature", Path(folder) / "reference" / "miniature")
    print(f"\n{done} kills, {run} runs, all equal to the uninterrupted one; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    _main()
