"""A server that is killed and comes back costs its clients nothing but time, and one that goes on gains no memory."""

import contextlib
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.teacher.crowd import Crowd
from tests.teacher.serving import ServerProcess, make_folder

CLIENTS, REQUESTS, KILLED_AFTER, BEFORE_RETURN = 32, 5_000, 1_000, 4_000
MOST_BYTES_A_REQUEST = 2_048
"""Of growth: a leak of one answer's arrays would be more."""


@pytest.mark.long
def test_five_thousand_requests_of_32_clients_outlive_a_server(tmp_path: Path) -> None:
    """Every target arrives once and is the model's own; prints what was measured."""
    folder = make_folder(tmp_path)
    first, second = (ServerProcess(folder, tmp_path / f"log_{number}") for number in range(2))
    measured: list[tuple[int, int]] = []
    ended = threading.Event()

    def measure() -> None:
        while not ended.wait(0.5):
            measured.append((first.answered(), first.resident_bytes))

    def restart() -> None:
        second.kill()
        second.start()

    with contextlib.ExitStack() as opened:
        for server in (first, second):
            server.start()
            opened.callback(server.kill)
        for server in (first, second):
            server.wait()
        urls = [first.url, second.url]
        crowd = opened.enter_context(contextlib.closing(Crowd(folder, urls, clients=CLIENTS, requests=REQUESTS)))
        measuring = threading.Thread(target=measure)
        measuring.start()
        opened.callback(ended.set)
        started = time.monotonic()
        restarting = threading.Thread(target=restart)
        crowd.ask(BEFORE_RETURN, lambda count: restarting.start() if count == KILLED_AFTER else None)
        restarting.join()
        second.wait()
        crowd.ask(REQUESTS)
        seconds = time.monotonic() - started
        ended.set()
        measuring.join()
        crowd.check()
        answered = {"first": first.answered(), "second_since_restart": second.answered()}
    assert min(answered.values()) > 0
    # Allocator and caches settle over the first quarter.
    counts, sizes = np.array([one for one in measured if one[0] > measured[-1][0] / 4], float).T
    slope = float(np.polyfit(counts, sizes, 1)[0])
    figures = {
        "requests": REQUESTS, "clients": CLIENTS, "seconds": round(seconds, 1), **answered,
        "first_mib": [round(one / 2**20, 1) for one in (measured[0][1], sizes[0], sizes[-1])],
        "slope_bytes_a_request": round(slope, 1),
    }  # fmt: skip
    print(json.dumps(figures))
    assert slope < MOST_BYTES_A_REQUEST, figures
