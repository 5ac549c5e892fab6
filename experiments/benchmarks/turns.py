"""The work that contestants of `against_peers` do, and how they take turns.

A contestant is a process in an environment of its own. It prepares, and then does one step for every line on its
standard input and answers with one line of JSON, so that contestants alternate and what else the machine does meets
all of them alike. Peers' environments import this file: it needs numpy and nothing of this project.
"""

import dataclasses
import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Mode = Literal["off", "on", "sample"]
LEARNING_RATE = 1e-4
# Ids below are special in some tokenizers.
_FIRST_ID = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one step is; the models are Hugging Face folders that all contestants read."""

    mode: Mode
    """off: forward KL on given rows. on: the student generates, then reverse KL on that. sample: it only generates."""
    teacher: str
    student: str
    tokenizer: str
    vocab_size: int
    rows: int
    sequence_tokens: int
    prompt_tokens: int
    cores: int

    @classmethod
    def from_argument(cls) -> "Work":
        return cls(**json.loads(sys.argv[1]))

    @property
    def new_tokens(self) -> int:
        return self.sequence_tokens - self.prompt_tokens

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on, or writes."""
        return self.rows * (self.sequence_tokens if self.mode == "off" else self.new_tokens)

    def tokens(self, step: int) -> NDArray[np.int32]:
        """Rows of uniform tokens [rows, sequence_tokens], of which only the prompts count where the student
        generates."""
        shape = (self.rows, self.sequence_tokens)
        return np.random.default_rng(step).integers(_FIRST_ID, self.vocab_size, shape, dtype=np.int32)

    def to_argument(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class Turns:
    """This process's side of the exchange: `begin` before every step, `end` after it."""

    def __init__(self, *packages: str):
        """`packages` are those whose versions matter. Call it first: what libraries print then goes to stderr."""
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._packages = packages
        self._is_ready = False
        self._begun = _clocks()

    def begin(self) -> None:
        """Wait for one's turn; ends the process where no more will come. The first call says that all is prepared."""
        if not self._is_ready:
            self._is_ready = True
            versions = {name: importlib.metadata.version(name) for name in self._packages}
            self._answer({"packages": versions, "peak_rss_mb": peak_rss_mb()})
        if not sys.stdin.readline():
            raise SystemExit
        self._begun = _clocks()

    def end(self, *, loss: float | None = None, sampling_seconds: float | None = None) -> None:
        """Say what the step took; all of its work must be done."""
        seconds, own, machine = (now - then for now, then in zip(_clocks(), self._begun, strict=True))
        self._answer(
            {
                "seconds": seconds,
                "cpu_seconds": own,
                "others_cores": (machine - own) / seconds,
                "loss": loss,
                "sampling_seconds": sampling_seconds,
                "peak_rss_mb": peak_rss_mb(),
            }
        )

    def _answer(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def _clocks() -> tuple[float, float, float]:
    """Wall clock, processor time of this process, processor time of the whole machine, in seconds."""
    return time.perf_counter(), time.process_time(), machine_cpu_seconds()


def machine_cpu_seconds() -> float:
    """Processor time that all processes of this Linux machine have taken, in seconds."""
    user, nice, system, idle, io_wait, *others = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    del idle, io_wait
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
