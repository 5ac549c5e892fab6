"""Connections between processes by which each notices at once that another has died.

The operating system closes a dead process's connections, however it died. Without this, processes that wait for the
dead one in a collective operation would wait for jax's heartbeats to fail, and then abort with a stack trace.
"""

import selectors
import socket
import threading
from collections.abc import Callable

from qwen3.errors import UserError

_SECONDS_TO_CONNECT = 60


class Lifelines:
    """A star: the first process holds a connection to every other one. Nothing is sent but who is calling."""

    def __init__(self, process: int, processes: int):
        self._process, self._processes = process, processes
        self._links: dict[int, socket.socket] = {}
        self._server: socket.socket | None = None
        self._unwatched = threading.Event()

    def listen(self) -> int:
        """In the first process: waits for calls; returns the port."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._server = socket.create_server(
            ("", 0), family=family, backlog=self._processes, dualstack_ipv6=family == socket.AF_INET6
        )
        self._server.settimeout(_SECONDS_TO_CONNECT)
        return int(self._server.getsockname()[1])

    def tie(self, host: str, port: int, on_death: Callable[["Lifelines", int], None]) -> None:
        """Connects with the first process, `host` and the port that it listens at, and begins to watch.

        `on_death` is called with the number of a process that has ended, from a thread. Raises UserError where a
        process cannot be reached.
        """
        try:
            if self._server is None:
                link = socket.create_connection((host.strip("[]"), port), timeout=_SECONDS_TO_CONNECT)
                link.sendall(self._process.to_bytes(4, "big"))
                self._links[0] = link
            else:
                while len(self._links) < self._processes - 1:
                    link, _ = self._server.accept()
                    self._links[int.from_bytes(link.recv(4, socket.MSG_WAITALL), "big")] = link
                self._server.close()
        except OSError as error:
            raise UserError(
                f"process {self._process} has no connection to the others by port {port} of {host} ({error}); open "
                "the ports between the hosts of this run"
            ) from None
        selector = selectors.DefaultSelector()
        for process, link in self._links.items():
            selector.register(link, selectors.EVENT_READ, process)
        threading.Thread(target=self._watch, args=(selector, on_death), daemon=True).start()

    def unwatch(self) -> None:
        """From now on the others may end."""
        self._unwatched.set()

    def hang_up(self) -> None:
        """Lets the others know that this process ends, those that still watch."""
        for link in self._links.values():
            link.close()

    def _watch(self, selector: selectors.BaseSelector, on_death: Callable[["Lifelines", int], None]) -> None:
        # Nobody sends anything, so a link can be read from only when it is closed.
        [(key, _), *_rest] = selector.select()
        if not self._unwatched.is_set():
            on_death(self, key.data)
