"""Contestants measured in turns: one step of each, round after round, on a machine that should be otherwise idle."""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from experiments.benchmarks.turns import Work, machine_cpu_seconds
from qwen3.errors import UserError

QUIET_CORES = 0.15
"""A step counts where all other processes together took less than this."""
FEWEST_STEPS = 5
"""Undisturbed steps that are enough to judge by, and the fewest that are measured."""
_LOSS_TOLERANCE = 0.01
_SCRIPTS = Path(__file__).parent / "contestants"
_ROOT = Path(__file__).parents[2]
_QUIET_SECONDS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """Who measures: a script of `contestants/` and the Python of its environment."""

    name: str
    script: str
    python: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one contestant needed for one kind of work; one entry a step that counts."""

    packages: Mapping[str, str]
    tokens_per_step: int
    seconds: tuple[float, ...]
    others_cores: tuple[float, ...]
    """What other processes took meanwhile."""
    sampling_seconds: tuple[float, ...]
    """Of each step, where its student generates and trains."""
    first_loss: float | None
    """Equal models on equal rows must agree about it."""
    peak_rss_mb_before: float
    """When the models were loaded and no step done."""
    peak_rss_mb: float

    @property
    def is_quiet(self) -> bool:
        """Whether enough steps were undisturbed to judge by; if not, all of them are in the figures."""
        return sum(cores < QUIET_CORES for cores in self.others_cores) >= FEWEST_STEPS

    @property
    def counted_seconds(self) -> list[float]:
        steps = zip(self.seconds, self.others_cores, strict=True)
        return [seconds for seconds, cores in steps if cores < QUIET_CORES or not self.is_quiet]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.counted_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.median_seconds

    @property
    def added_rss_mb(self) -> float:
        return self.peak_rss_mb - self.peak_rss_mb_before

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Measured":
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in data.items()}
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How long to measure."""

    warm: int = 3
    """Steps of each contestant before the first round; the first ones compile."""
    rounds: int = 12
    """Undisturbed steps that count wanted of each contestant; each follows another step, which does not."""
    seconds: float = 100.0
    """Measuring ends after this long whatever was reached, but for `FEWEST_STEPS` rounds."""
    patience_seconds: float = 20.0
    """Longest wait for other processes to be quiet before the first round; afterwards every step tells by itself."""


def contest(
    contestants: Sequence[Contestant], work: Work, pace: Pace, logs: Path, say: Callable[[str], None]
) -> dict[str, Measured]:
    """Measure all contestants at the same work, by name.

    Raises UserError where one of them stops, naming the file with what it printed, and where their losses on the same
    rows differ: then they did not do the same work.
    """
    runners = [_Runner(contestant, work, logs) for contestant in contestants]
    try:
        # One after the other: compiling side by side would only take longer.
        for runner in runners:
            say(f"{runner.name}: loading")
            runner.prepare()
            say(f"{runner.name}: {pace.warm} steps to warm up")
            for _ in range(pace.warm):
                runner.step(counts=False)
        _wait_until_quiet(pace.patience_seconds, say)
        end, done, quiet = time.monotonic() + pace.seconds, 0, 0
        while done < FEWEST_STEPS or (time.monotonic() < end and quiet < pace.rounds):
            say(f"{quiet} of {pace.rounds} undisturbed rounds")
            for runner in runners:
                # Training does not pause between steps: the first after others' turns finds caches full of their data.
                runner.step(counts=False)
                runner.step(counts=True)
            done, quiet = done + 1, min(runner.quiet_steps for runner in runners)
        measured = {runner.name: runner.measured() for runner in runners}
        if work.mode == "off":
            _require_same_losses(measured)
        return measured
    finally:
        for runner in runners:
            runner.close()


def _require_same_losses(measured: Mapping[str, Measured]) -> None:
    losses = {name: one.first_loss for name, one in measured.items() if one.first_loss is not None}
    if losses and max(losses.values()) > (1 + _LOSS_TOLERANCE) * min(losses.values()):
        said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        raise UserError(f"first losses on the same rows differ ({said}): not the same work, so nothing to compare")


class _Runner:
    """A contestant's process, and what it has answered."""

    def __init__(self, contestant: Contestant, work: Work, logs: Path):
        self.name = contestant.name
        self._losses: list[float] = []
        self._counted: list[dict[str, Any]] = []
        self._work = work
        self._contestant = contestant
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{Path(contestant.script).stem}.log"
        self._process: subprocess.Popen[str] | None = None
        self._ready: dict[str, Any] = {}

    def prepare(self) -> None:
        variables = {
            "PYTHONPATH": str(_ROOT),
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(self._work.cores),
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(self._contestant.python), str(_SCRIPTS / self._contestant.script), self._work.to_argument()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | variables,
            )
        self._ready = self._answer()

    def step(self, *, counts: bool) -> None:
        to_it, _ = self._pipes()
        # Where it has stopped, the answer that does not come says so.
        with contextlib.suppress(BrokenPipeError):
            to_it.write("\n")
            to_it.flush()
        answer = self._answer()
        if answer["loss"] is not None:
            self._losses.append(answer["loss"])
        if counts:
            self._counted.append(answer)

    @property
    def quiet_steps(self) -> int:
        return sum(step["others_cores"] < QUIET_CORES for step in self._counted)

    def measured(self) -> Measured:
        counted = self._counted
        return Measured(
            packages=self._ready["packages"],
            tokens_per_step=self._work.tokens_per_step,
            seconds=tuple(step["seconds"] for step in counted),
            others_cores=tuple(step["others_cores"] for step in counted),
            sampling_seconds=tuple(step["sampling_seconds"] for step in counted if step["sampling_seconds"]),
            first_loss=self._losses[0] if self._losses else None,
            peak_rss_mb_before=self._ready["peak_rss_mb"],
            peak_rss_mb=counted[-1]["peak_rss_mb"],
        )

    def close(self) -> None:
        if self._process is not None:
            # It waits for its turn, or hangs; nothing of it is worth waiting for.
            self._process.kill()
            self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        _, from_it = self._pipes()
        line = from_it.readline()
        if not line:
            said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            raise UserError(f"{self.name} stopped: {said[-1].strip() if said else 'no word'} (all of it: {self._log})")
        return json.loads(line)

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


def _wait_until_quiet(limit_seconds: float, say: Callable[[str], None]) -> None:
    say("waiting until other processes are quiet")
    end, quiet = time.monotonic() + limit_seconds, 0
    while quiet < _QUIET_SECONDS and time.monotonic() < end:
        before = machine_cpu_seconds()
        time.sleep(1)
        quiet = quiet + 1 if machine_cpu_seconds() - before < QUIET_CORES else 0
