"""How long a run has taken, over all of its processes: one that was killed counts up to its last save."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from distill.monitor.records import read_json, write_atomically

_FILE = "wall_seconds.json"


class WallClock:
    """The seconds of this process, from when this was made, and of those before it.

    A process that keeps nothing, as when the command of a finished run is repeated, adds nothing.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic):
        """Goes on with what `directory` holds. Raises UserError where that is damaged."""
        self._file, self._clock = directory / _FILE, clock
        self._started = clock()
        self.seconds = 0.0
        """As they were kept last."""
        if self._file.exists():
            self.seconds = read_json(self._file, _seconds, "delete it: only the time that the report states is lost")
        self._before = self.seconds

    def keep(self) -> None:
        """Call this when work is saved."""
        self.seconds = self._before + self._clock() - self._started
        write_atomically(self._file, json.dumps({"seconds": self.seconds}))

    def forget_before(self) -> None:
        """The work of the processes before is gone, and with it their time."""
        self._file.unlink(missing_ok=True)
        self.seconds = self._before = 0.0

    def total(self) -> float:
        """The seconds up to now, where this process has kept any work; else those that were kept before."""
        if self.seconds > self._before:
            self.keep()
        return self.seconds


def _seconds(raw: object) -> float:
    # In an object, half of which is no document: half a number would be another number.
    assert isinstance(raw, dict), "no object"
    seconds = raw["seconds"]
    assert type(seconds) in (int, float), "no number of seconds"
    assert 0 <= seconds < math.inf, "no number of seconds"
    return float(seconds)
