"""Freed memory serves again without a page fault, in a process of its own since the setting lasts."""

import ctypes
import subprocess
import sys

import pytest

_FAULTS_OF_A_SECOND_ALLOCATION = """
import resource
from distill.host_memory import retain_freed_memory

retain_freed_memory()
bytearray(2**26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept():
    run = subprocess.run([sys.executable, "-c", _FAULTS_OF_A_SECOND_ALLOCATION], capture_output=True, text=True)
    # 2**26 bytes are 16,384 pages; the interpreter itself may need a few.
    assert int(run.stdout) < 100, run.stderr
