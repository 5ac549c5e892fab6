"""Where a benchmark ran: without this a number cannot be compared with another."""

import importlib.metadata
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import jax


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB of 1024 KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if platform.system() == "Linux" else peak / 2**20


def machine() -> dict[str, Any]:
    """Hardware, load, versions and commit (None outside a git checkout)."""
    return {
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
