"""How many processor cores this process may use: fewer than the machine has where it is pinned or in a container."""

import os


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
