"""Lets a run on CPU keep the memory that one compiled program frees for the next one.

XLA takes the scratch memory of every program from malloc when it starts and frees it when it ends. glibc gives blocks
of that size back to the kernel each time, which then has to clear them anew: a seventh of the processor time of a
small training step. From one arena that is never trimmed, a step has no page faults after the first ones, by when there
are gaps enough for its blocks.

What was once used would stay with the process: the compiler's hundreds of MiB scattered between arrays, then, step by
step until there are gaps enough, the gaps that were too small. So after a long compilation and after a step in which
the process grew, when new pages are needed anyway, all that is free goes back.
"""

import ctypes
import importlib.metadata
import importlib.util
import platform
import resource
from typing import Any

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_LARGEST_INT = 2**31 - 1
_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG_COMPILATION_SECONDS = 1.0
_GROWTH_KIB = 32 * 2**10


def keep_freed_memory() -> None:
    """Takes effect where glibc allocates and JAX has no platform but the CPU. Call it before JAX computes."""
    if (libc := _glibc()) is None:
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT)):
        libc.mallopt(option, value)

    def give_back(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED and duration_secs >= _LONG_COMPILATION_SECONDS:
            libc.malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(give_back)


class Growth:
    """Gives free memory back where the process holds more than ever; a loop that has settled does not meet it."""

    def __init__(self) -> None:
        self._libc = _glibc()
        self._largest_kib = 0

    def give_back(self) -> None:
        """To be called after every step."""
        if self._libc is None:
            return
        largest_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if largest_kib >= self._largest_kib + _GROWTH_KIB:
            self._largest_kib = largest_kib
            self._libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The allocator of JAX's arrays, where it is glibc's and they lie in the host's memory."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    accelerators = bool(plugins) or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    return None if platform.libc_ver()[0] != "glibc" or accelerators else ctypes.CDLL(None)
