"""What one process launches another does, in the same order with the same arrays; whoever fails ends."""

import queue
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3.hosts import launcher
from qwen3.hosts.launcher import Launcher, follow


class Said:
    """In the place of `Lifelines`: keeps what is said."""

    def __init__(self):
        self.received = queue.SimpleQueue()

    def say(self, message):
        self.received.put(message)


class GivenUp(Exception):
    pass


@pytest.fixture(autouse=True)
def given_up(monkeypatch):
    """Raised in the place of the end of the process."""

    def give_up(lines):
        raise GivenUp

    monkeypatch.setattr(launcher, "give_up", give_up)


def test_followers_do_what_is_launched_from_any_thread_in_one_order():
    lines, own, theirs = Said(), [], []

    def launch(number):
        leader.launch(
            "add",
            lambda arrays, **options: own.append((arrays, options)),
            [np.full((2, 3), number, np.int32), np.float32(0.5), np.array([True, False]), np.zeros((0, 4), np.uint32)],
            plan={"whole": True, "named": number},
        )

    leader = Launcher(lines)
    threads = [threading.Thread(target=launch, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def work(arrays, **options):
        theirs.append((arrays, options))
        if len(theirs) == len(own):
            raise StopIteration

    with pytest.raises(StopIteration):
        follow(lines.received, {"add": work}, lines)
    for (arrays, options), (wanted, wanted_options) in zip(theirs, own, strict=True):
        assert options == wanted_options
        for one, other in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
            assert (one.dtype, one.shape) == (other.dtype, other.shape)


def test_what_fails_is_raised_where_nobody_follows_and_ends_all_where_somebody_does():
    def fails(arrays):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Launcher().launch("work", fails)
    with pytest.raises(GivenUp):
        Launcher(Said()).launch("work", fails)


def test_results_are_those_of_the_devices():
    leader = Launcher()
    launched = leader.launch("double", lambda arrays: 2 * jnp.asarray(arrays[0]), [np.arange(3)])
    np.testing.assert_array_equal(leader.results(launched), [0, 2, 4])
