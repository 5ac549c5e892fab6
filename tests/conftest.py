"""Eight fake CPU devices for every test, set before jax is imported anywhere, and a bound on what a worker keeps."""

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Nearly all of the suite's time is compiling programs that run once: the compiler need not try hard.
_QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {_QUICK_COMPILE}"

_KEPT_BYTES = 1_400_000_000
"""What a worker may keep between tests; compiled programs, of which jax never lets one go, would reach four times as
much."""


@pytest.fixture(autouse=True)
def compiled_programs_are_let_go() -> Iterator[None]:
    """Tests share few programs, so what has been compiled goes once it is much."""
    yield
    if _resident_bytes() > _KEPT_BYTES:
        import jax

        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0  # No /proc: as the suite was before, without a bound.
    return pages * os.sysconf("SC_PAGE_SIZE")
