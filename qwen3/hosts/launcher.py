"""One order in which programs begin, for all threads of all processes that share devices.

Of programs that several devices run together one order must hold on all of them, or they wait for each other for ever.
In a run every process comes to the same order by itself. Behind a server only the first process knows what comes: it
says so to the others before it begins, and they do the same with what they have on their own devices. An idle server
asks nothing of its devices.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import msgspec
import numpy as np

from qwen3.hosts.lifelines import Lifelines
from qwen3.hosts.processes import give_up

Host = np.ndarray | np.generic
Work = Callable[..., Any]
"""Called with arrays of the host and options that are JSON data, it begins programs, the same in every process: what it
uses beside is on the devices of its own. Returns arrays that every process has whole, or nothing."""


class Launcher:
    """Begins programs one after the other, whichever thread asks."""

    def __init__(self, followers: Lifelines | None = None):
        """`followers` are the processes that `follow` this one."""
        self._lock, self._followers = threading.Lock(), followers

    def launch(self, name: str, work: Work, arrays: Sequence[Host] = (), **options: Any) -> Any:
        """What `work` returns; the devices need not have finished by then. By `name` followers know what to do."""
        with self._lock:
            if self._followers is None:
                return work(arrays, **options)
            self._followers.say(_encode(name, arrays, options))
            return self._or_end(lambda: work(arrays, **options))

    def results(self, launched: Any) -> Any:
        """What has been launched, on the host, once the devices have finished."""
        return self._or_end(lambda: jax.device_get(launched))

    def _or_end(self, work: Callable[[], Any]) -> Any:
        if self._followers is None:
            return work()
        try:
            return work()
        except BaseException:  # noqa: BLE001
            # The others have begun it, and would wait in it for ever.
            give_up(self._followers)


def follow(messages: "queue.SimpleQueue[bytes]", works: Mapping[str, Work], lines: Lifelines) -> NoReturn:
    """In a process that follows the first of `lines`: does what that one launches, for as long as this process lives.

    `messages` are what the first has said, `works` what it may name. A failure ends this process.
    """
    begun: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def wait() -> None:
        try:
            while True:
                jax.block_until_ready(begun.get())
        except BaseException:  # noqa: BLE001
            give_up(lines)

    # What fails on the devices of this process alone is missed by no other.
    threading.Thread(target=wait, daemon=True).start()
    while True:
        message = msgspec.msgpack.decode(messages.get(), type=_Message)
        arrays = [np.frombuffer(one.content, one.dtype).reshape(one.shape) for one in message.arrays]
        begun.put(works[message.name](arrays, **message.options))


class _Array(msgspec.Struct, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    content: bytes


class _Message(msgspec.Struct, array_like=True):
    name: str
    options: dict[str, Any]
    arrays: list[_Array]


def _encode(name: str, arrays: Sequence[Host], options: Mapping[str, Any]) -> bytes:
    told = [_Array(array.dtype.str, array.shape, array.tobytes()) for array in map(np.asarray, arrays)]
    return msgspec.msgpack.encode(_Message(name, dict(options), told))
