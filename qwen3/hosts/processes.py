"""Several JAX processes that work together, one on each host.

In a run every process runs the same program, makes the same global batches and has the same results; the first alone
writes to the run directory, which lies on a file system that all of them share. What only one of them can know, such
as which files there are or that SIGTERM came, they tell one another here, at the same place of the program. Behind a
server the others follow the first: `qwen3.hosts.launcher`.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from qwen3.errors import UserError
from qwen3.hosts.lifelines import Lifelines

_SECONDS_TO_JOIN = 300
# A host that is gone without closing its connections (power, network) is given up after this long.
_SECONDS_WITHOUT_HEARTBEAT = 60
_SECONDS_FOR_OTHERS = 1.0
_SMALLEST_MESSAGE_BYTES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes to run with. Fields that are None are found by `jax.distributed`."""

    coordinator: str | None = None
    """HOST:PORT at which the first process listens."""
    processes: int | None = None
    process: int | None = None

    @classmethod
    def named(cls, coordinator: str | None, processes: int | None, process: int | None) -> "Cluster | None":
        """The cluster of these options, else the one whose launcher started this process, else None: one process."""
        if coordinator is None:
            if processes is not None or process is not None:
                raise UserError("--processes and --process need --coordinator HOST:PORT, the address of process 0")
            return cls() if _started_by_launcher(os.environ) else None
        if coordinator == "auto":
            return cls(processes=processes, process=process)
        if processes is None or process is None:
            raise UserError("--coordinator HOST:PORT needs --processes N and --process I as well, or is 'auto'")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator is {coordinator!r}; it must be HOST:PORT, an address of process 0, or auto")
        if not 0 <= process < processes:
            raise UserError(f"--process is {process}; of {processes} processes it must lie in 0..{processes - 1}")
        return cls(coordinator=coordinator, processes=processes, process=process) if processes > 1 else None

    def run(
        self,
        work: Callable[[Lifelines], int],
        *,
        what: str = "run",
        remedy: str = "The same command on every host goes on from the last checkpoint",
    ) -> int:
        """Join the others, do `work`, and return its exit status once all of them have returned 0.

        Where `work` fails here or another process ends early, this process ends at once, with a line that says why and
        what to do: leaving in order would wait for the others, who wait for this one. `what` is what ends with it.
        """
        # Its handler of SIGTERM would take the place of ours, which lets a run save before it stops.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                self.coordinator,
                self.processes,
                self.process,
                initialization_timeout=_SECONDS_TO_JOIN,
                heartbeat_timeout_seconds=_SECONDS_WITHOUT_HEARTBEAT,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the processes of this {what} did not come together: {' '.join(str(error).split())}; start the same "
                "command on every host, or name them with --coordinator HOST:PORT --processes N --process I"
            ) from None

        def on_death(lifelines: Lifelines, which: int) -> None:
            print(
                f"error{where()}: process {which} has ended, and the {what} with it; what that process wrote last says "
                f"why. {remedy}",
                file=sys.stderr,
            )
            _end(lifelines, 1)

        lifelines = Lifelines(jax.process_index(), jax.process_count())
        port, secret = first_says(lifelines.listen)
        try:
            # jax says nowhere else which host it has found to be that of the first process.
            address = distributed.global_state.coordinator_address
            assert address is not None
            lifelines.tie(address.rpartition(":")[0], port, secret, on_death)
            status = work(lifelines)
            if not status:
                any_process(False)  # still watched: from here on the others may go
        except BaseException:  # noqa: BLE001
            give_up(lifelines)
        if status:
            leave(lifelines, status)
        lifelines.unwatch()
        jax.distributed.shutdown()
        lifelines.hang_up()
        return status


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Those of `Cluster.named`: coordinator, processes, process."""
    add = parser.add_argument_group("several hosts").add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens, or auto: jax finds it")
    add("--processes", metavar="N", type=int, help="how many processes work together")
    add("--process", metavar="I", type=int, help="which of them this one is, 0 to N-1")


def _started_by_launcher(environment: Mapping[str, str]) -> bool:
    """Whether srun, or GKE for a TPU slice of several hosts, started this process together with others."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    counts = environment.get("SLURM_STEP_NUM_TASKS", "1"), environment.get("MEGASCALE_NUM_SLICES", "1")
    return "," in hosts or any(int(count) > 1 for count in counts)


def leave(lifelines: Lifelines, status: int) -> NoReturn:
    """End this process, whatever its threads do; with status 0 in order, so that nobody misses it."""
    if status:
        # Others that found the same error may say so themselves before this process is missed.
        lifelines.unwatch()
        time.sleep(_SECONDS_FOR_OTHERS)
    _end(lifelines, status)


def give_up(lifelines: Lifelines) -> NoReturn:
    """End this process, and all others with it, for the exception that is being handled."""
    time.sleep(_SECONDS_FOR_OTHERS)
    if lifelines.is_ending:
        # Another process has died, and this error only follows from it: the thread that watches says so.
        threading.Event().wait()
    traceback.print_exc()
    leave(lifelines, 1)


def _end(lifelines: Lifelines, status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    lifelines.hang_up(in_order=not status)
    # With the first process ends jax's coordination service, upon which jax aborts the others with a stack trace.
    time.sleep(_SECONDS_FOR_OTHERS if is_first() else 0)
    os._exit(status)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def where() -> str:
    """` (process 1 of 4)` for messages of one among several processes, else nothing."""
    return f" (process {jax.process_index()} of {jax.process_count()})" if jax.distributed.is_initialized() else ""


def first_says(work: Callable[[], Any]) -> Any:
    """In every process what `work`, called in the first, returns there (JSON data) or raises as UserError."""
    if jax.process_count() == 1:
        return work()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"value": work()}
        except UserError as error:
            said = {"error": str(error)}
    said = json.loads(_broadcast(json.dumps(said).encode()))
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def require_same(what: str, data: Callable[[], bytes]) -> None:
    """Refuses to go on where `data()` differs between processes: results would be wrong without any sign of it."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(data(), digest_size=16).digest(), np.uint32)
    digests = multihost_utils.process_allgather(digest)
    if different := [process for process, other in enumerate(digests) if not np.array_equal(other, digests[0])]:
        raise UserError(
            f"{what} in process {different[0]} differ from those in process 0; start every process with the same code, "
            "packages, files and options"
        )


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _broadcast(message: bytes) -> bytes:
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    # In sizes of few kinds, since each is a program to compile.
    buffer = np.zeros(max(_SMALLEST_MESSAGE_BYTES, 1 << length.bit_length()), np.uint8)
    if is_first():
        buffer[:length] = np.frombuffer(message, np.uint8)
    return multihost_utils.broadcast_one_to_all(buffer)[:length].tobytes()
