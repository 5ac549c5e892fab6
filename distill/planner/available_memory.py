"""How much memory this process may still take: less than the machine has free where a container limits it (Linux)."""

import math
from pathlib import Path, PurePosixPath

_LIMITS = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By version of control groups: files with the limit and with what is used, and what memory.stat calls the files that
were read and can be dropped."""


def available_bytes(root: Path = Path("/")) -> int:
    """What the machine has available, or the least that any control group around this process leaves of its limit."""
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    machine = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    return max(0, int(min([machine, *_left_by_groups(root)])))


def _left_by_groups(root: Path) -> list[float]:
    listed = root / "proc/self/cgroup"
    left = []
    for line in listed.read_text().splitlines() if listed.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        mount = root / "sys/fs/cgroup" / controllers
        # In a container the path may be the host's, of which only the mount's root is to be seen.
        inside = PurePosixPath(path.lstrip("/"))
        left += [_left(mount / group, version) for group in (inside, *inside.parents)]
    return left


def _left(group: Path, version: int) -> float:
    """Infinite where the group, or a limit of it, does not exist."""
    limit, used, droppable = _LIMITS[version]
    if not (group / limit).exists() or (said := (group / limit).read_text().strip()) == "max":
        return math.inf
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(said) - int((group / used).read_text()) + int(stat[droppable])
