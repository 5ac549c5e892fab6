"""Processes find one another, and none outlives another by long."""

import signal
import threading
import time
from typing import Any

import pytest

from qwen3.errors import UserError
from qwen3.hosts.lifelines import Lifelines
from qwen3.hosts.processes import Cluster
from tests.qwen3.hosts.two_processes import run_two

DYING = """
import os, signal, sys
from qwen3.hosts import processes


def work():
    processes.any_process(False)
    if sys.argv[2] == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.any_process(False)
    return 0


sys.exit(processes.Cluster.named(sys.argv[1], 2, int(sys.argv[2])).run(work))
"""


@pytest.mark.parametrize("dying", [0, 1])
def test_whichever_dies_the_other_says_so_and_ends(dying: int) -> None:
    ended = run_two(DYING, str(dying))
    assert ended[dying][0] == -signal.SIGKILL
    status, errors = ended[1 - dying]
    assert status == 1, errors
    said = f"error (process {1 - dying} of 2): process {dying} has ended, and the run with it"
    aborted = "JAX distributed service detected fatal errors" in errors
    # With the first process goes jax's coordination service, and jax may be the first to notice.
    assert [line for line in errors.splitlines() if line.startswith(said)] or (dying == 0 and aborted), errors
    assert dying == 0 or not aborted


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # in sbatch, outside srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "slice-0-0.distill,slice-0-1.distill"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_launchers_are_recognised(environment: dict[str, str], several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Cluster.named(None, None, None) == (Cluster() if several else None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, 2, 0), "need --coordinator"),
        (("host:8000", None, 0), "needs --processes N and --process I"),
        (("host", 2, 0), "must be HOST:PORT"),
        (("host:8000", 2, 2), "must lie in 0..1"),
    ],
)
def test_cluster_options_that_do_not_make_sense(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cluster.named(*options)


def test_options_of_a_single_process_join_nothing() -> None:
    assert Cluster.named("host:8000", 1, 0) is None


def test_lifelines_tell_of_a_death_but_not_of_a_farewell() -> None:
    lines = [Lifelines(process, 3) for process in range(3)]
    port = lines[0].listen()
    deaths: list[tuple[int, int]] = []
    told = threading.Event()

    def on_death(watcher: Lifelines, which: int) -> None:
        deaths.append((lines.index(watcher), which))
        told.set()

    threads = [threading.Thread(target=line.tie, args=("127.0.0.1", port, on_death)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    lines[2].unwatch()
    lines[1].hang_up()
    assert told.wait(timeout=10)
    lines[0].hang_up()
    time.sleep(0.2)
    # Process 2 has said that it is done with watching, and hears nothing of process 0.
    assert (0, 1) in deaths
    assert 2 not in [watcher for watcher, _ in deaths]
