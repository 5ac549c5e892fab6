"""What a benchmark's result depends on besides the code: the machine, the versions and the commit."""

import os
from pathlib import Path
from typing import Any

from distill.monitor.environment import environment


def machine() -> dict[str, Any]:
    """The fields that every result carries."""
    where = environment()
    fields = ("processor", "cpu_cores", "devices", "python", "packages", "commit")
    return {name: where[name] for name in fields} | {"load_1min": round(os.getloadavg()[0], 2)}


def memory_bytes(field: str) -> int:
    """Of this process by Linux: VmRSS is what it holds, VmHWM the most that it ever held. (`ru_maxrss` begins at what
    its parent held.)"""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field))
    return int(line.split()[1]) * 1024
