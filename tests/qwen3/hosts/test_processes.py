"""Processes find one another, and none outlives another by long."""

import queue
import signal
import socket
import threading
import time
from typing import Any

import pytest

from qwen3.errors import UserError
from qwen3.hosts.lifelines import FAREWELL, Lifelines
from qwen3.hosts.processes import Cluster
from tests.qwen3.hosts.two_processes import run_two

DYING = """
import os, signal, sys
from qwen3.hosts import processes


def work(lifelines):
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


class Tied:
    """Three processes' lifelines, each tied in a thread, and the deaths that they tell of: (who noticed, whose)."""

    def __init__(self) -> None:
        self.lines = [Lifelines(process, 3) for process in range(3)]
        self.deaths: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        port, secret = self.lines[0].listen()
        # Whoever does not know the secret takes nobody's place, whether it speaks or not.
        self.strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        self.strangers[0].sendall(bytes(16) + (1).to_bytes(4, "big"))
        self.strangers[1].close()
        arguments = ("127.0.0.1", port, secret, lambda line, which: self.deaths.put((self.lines.index(line), which)))
        threads = [threading.Thread(target=line.tie, args=arguments) for line in self.lines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)


def test_lifelines_tell_of_a_death_but_not_of_a_farewell() -> None:
    tied = Tied()
    assert tied.strangers[0].recv(1) == b""
    tied.lines[2].unwatch()
    tied.lines[1].hang_up()
    assert tied.deaths.get(timeout=10) == (0, 1)
    tied.lines[0].hang_up()
    time.sleep(0.2)
    # Process 2 has said that it is done with watching, and hears nothing of process 0.
    assert tied.deaths.empty()


def test_what_the_first_says_all_others_hear_in_its_order_until_it_leaves() -> None:
    tied = Tied()
    first, *others = tied.lines
    said = [b"one", bytes(5_000_000), b"three"]
    for message in said:
        first.say(message)
    others[1].say(b"to the first")
    assert first.received.get(timeout=10) == b"to the first"
    first.hang_up(in_order=True)
    for line in others:
        assert [line.received.get(timeout=10) for _ in range(4)] == [*said, FAREWELL]
        assert line.is_ending
    time.sleep(0.2)
    assert tied.deaths.empty()
