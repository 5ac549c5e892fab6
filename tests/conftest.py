"""Eight fake CPU devices for every test, set before jax is imported anywhere, and a bound on what a worker keeps."""

import atexit
import ctypes
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Nearly all of the suite's time is compiling programs that run once: the compiler need not try hard, nor cut each of
# them into parts for cores that the other worker has.
_QUICK_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if metadata.version("jaxlib") < "0.11":
    # Two thirds of what is left; later compilers have no other emitters.
    _QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
_COMPILED = "JAX_COMPILATION_CACHE_DIR"
if _COMPILED not in os.environ:
    # Of this run of the suite: its workers, and the processes that tests start, find there what any has compiled.
    os.environ[_COMPILED] = tempfile.mkdtemp(prefix="compiled-for-tests-")
    atexit.register(shutil.rmtree, os.environ[_COMPILED], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {_QUICK_COMPILE}"

# A tenth of what is left, and more the longer a worker lives: jax makes many objects and few cycles, which go where
# programs do.
gc.set_threshold(100_000, 50, 100)

_LONGEST = ("tests/test_style.py", "tests/test_readme.py")
_KEPT_BYTES = 1_500_000_000
"""What a worker may keep between tests; compiled programs, of which jax never lets one go, would reach four times as
much."""
_LEAST_GROWTH_BYTES = 200_000_000
_left_bytes = 0
"""What a worker still held when it last let its programs go."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first, lest one worker waits for the other at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


@pytest.fixture(autouse=True)
def compiled_programs_are_let_go() -> Iterator[None]:
    """What has been compiled goes once it is much; tests that share programs find them on disk."""
    global _left_bytes
    yield
    if _resident_bytes() > max(_KEPT_BYTES, _left_bytes + _LEAST_GROWTH_BYTES):
        import jax

        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        _left_bytes = _resident_bytes()


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0  # No /proc: as the suite was before, without a bound.
    return pages * os.sysconf("SC_PAGE_SIZE")
