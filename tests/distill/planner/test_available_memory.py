"""Free memory as made-up machines and containers state it."""

from pathlib import Path

import pytest

from distill.planner.available_memory import available_bytes

GIB = 2**30


def _machine(root: Path, groups: str | None, files: dict[str, dict[str, int | str]]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 67108864 kB\nMemFree: 1024 kB\nMemAvailable: 33554432 kB\n")
    if groups is not None:
        (root / "proc/self/cgroup").write_text(groups)
    for folder, contents in files.items():
        place = root / "sys/fs/cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, value in contents.items():
            (place / name).write_text(f"{value}\n")
    return root


def _second(limit: int | str, used: int, dropped: int = 0) -> dict[str, int | str]:
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 7\ninactive_file {dropped}"}


def _first(limit: int, used: int, dropped: int = 0) -> dict[str, int | str]:
    stat = f"inactive_file 7\ntotal_inactive_file {dropped}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


@pytest.mark.parametrize(
    ("groups", "files", "available"),
    [
        (None, {}, 32 * GIB),
        ("0::/\n", {}, 32 * GIB),
        # A container: its own group is the mount's root. What was read from files and can be dropped is not lost.
        ("0::/\n", {".": _second(8 * GIB, 5 * GIB, dropped=GIB)}, 4 * GIB),
        ("0::/\n", {".": _second("max", 5 * GIB)}, 32 * GIB),
        # A job of a service: the group around it may be the tighter one.
        ("0::/jobs/one\n", {"jobs/one": _second("max", GIB), "jobs": _second(6 * GIB, 4 * GIB)}, 2 * GIB),
        ("0::/one\n", {"one": _second(GIB, 2 * GIB)}, 0),
        ("4:memory:/one\n1:cpu:/\n0::/\n", {"memory/one": _first(3 * GIB, 2 * GIB, dropped=GIB)}, 2 * GIB),
        # The path is the host's, and the container sees its own group alone.
        ("4:memory:/docker/abc\n", {"memory": _first(3 * GIB, 2 * GIB)}, GIB),
        ("4:memory:/\n", {"memory": _first(2**63 - 4096, 2 * GIB)}, 32 * GIB),
        ("2:cpu,cpuacct:/one\n", {"cpu,cpuacct/one": _first(GIB, GIB)}, 32 * GIB),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, groups: str | None, files: dict[str, dict[str, int | str]], available: int
) -> None:
    assert available_bytes(_machine(tmp_path, groups, files)) == available
