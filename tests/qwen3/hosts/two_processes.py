"""Two processes of one program on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def run_two(program: str, *arguments: str, devices: int = 1) -> list[tuple[int, str]]:
    """Status and errors of two processes of `program`, given an address, their number and `arguments`."""
    address = free_address()
    launched = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(process), *arguments],
            env=environment(devices),
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in launched]
    return [(process.returncode, error) for process, error in zip(launched, errors, strict=True)]
