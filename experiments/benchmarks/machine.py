"""What a benchmark's result depends on besides the code: the machine, the versions, the commit, the peak of memory."""

import os
import resource
import sys
from typing import Any

from distill.environment import environment


def machine() -> dict[str, Any]:
    """The fields that every result carries."""
    where = environment()
    fields = ("processor", "cpu_cores", "devices", "python", "packages", "commit")
    return {name: where[name] for name in fields} | {"load_1min": round(os.getloadavg()[0], 2)}


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
