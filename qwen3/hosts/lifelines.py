"""Connections between processes by which each notices at once that another has died, and hears what another says.

The operating system closes a dead process's connections, however it died. Without this, processes that wait for the
dead one in a collective operation would wait for jax's heartbeats to fail, and then abort with a stack trace. What is
said needs no device, so a process may wait for it for days.
"""

import contextlib
import hmac
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable

from qwen3.errors import UserError

FAREWELL = b""
_SECONDS_TO_CONNECT = 60
_SECONDS_TO_SAY_WHO = 5
_SECRET_BYTES, _NUMBER_BYTES, _LENGTH_BYTES = 16, 4, 8


class Lifelines:
    """A star: the first process holds a connection to every other one.

    Attributes:
        received: What the first has said, or in the first what any other has, in its order; `FAREWELL` at its end.
    """

    def __init__(self, process: int, processes: int):
        self._process, self._processes = process, processes
        self._links: dict[int, socket.socket] = {}
        self._server: socket.socket | None = None
        self._secret = b""
        self._saying, self._dying, self._unwatched = threading.Lock(), threading.Lock(), threading.Event()
        self.received: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen(self) -> tuple[int, str]:
        """In the first process: waits for calls; returns the port, and the secret by which it knows who may call."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._server = socket.create_server(
            ("", 0), family=family, backlog=self._processes, dualstack_ipv6=family == socket.AF_INET6
        )
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        return int(self._server.getsockname()[1]), self._secret.hex()

    def tie(self, host: str, port: int, secret: str, on_death: Callable[["Lifelines", int], None]) -> None:
        """Connects with the first process, `host` and the port and secret that `listen` has given, and begins to watch.

        `on_death` is called with the number of the first process that has ended, from a thread. Raises UserError where
        a process cannot be reached.
        """
        try:
            if self._server is None:
                link = socket.create_connection((host.strip("[]"), port), timeout=_SECONDS_TO_CONNECT)
                link.sendall(bytes.fromhex(secret) + self._process.to_bytes(_NUMBER_BYTES, "big"))
                self._links[0] = link
            else:
                self._accept(self._server)
        except OSError as error:
            raise UserError(
                f"process {self._process} has no connection to the others by port {port} of {host} ({error}); open "
                "the ports between the hosts"
            ) from None
        for process, link in self._links.items():
            link.settimeout(None)
            # Lest whatever stands between two hosts forgets a connection by which nothing has been said for hours.
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._hear, args=(process, link, on_death), daemon=True).start()

    def say(self, message: bytes) -> None:
        """To all that this process is connected with. One that has died is left to those who watch."""
        framed = len(message).to_bytes(_LENGTH_BYTES, "big") + message
        with self._saying:
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    link.sendall(framed)

    @property
    def is_ending(self) -> bool:
        """Whether another process has ended, or may."""
        return self._unwatched.is_set()

    def unwatch(self) -> None:
        """From now on the others may end."""
        self._unwatched.set()

    def hang_up(self, *, in_order: bool = False) -> None:
        """Lets the others know that this process ends; `in_order`, those that it is connected with watch no more."""
        self.unwatch()
        if in_order:
            self.say(FAREWELL)
        for link in self._links.values():
            with contextlib.suppress(OSError):
                # Closing alone would wait for the thread that reads from it.
                link.shutdown(socket.SHUT_RDWR)
            link.close()

    def _accept(self, server: socket.socket) -> None:
        """Waits until all others have called; whoever else does is turned away."""
        ends = time.monotonic() + _SECONDS_TO_CONNECT
        with server:
            while len(self._links) < self._processes - 1:
                server.settimeout(max(0.0, ends - time.monotonic()))
                link, _ = server.accept()
                link.settimeout(_SECONDS_TO_SAY_WHO)
                try:
                    said = _read(link, _SECRET_BYTES + _NUMBER_BYTES)
                except OSError:
                    said = b""
                if hmac.compare_digest(said[:_SECRET_BYTES], self._secret):
                    self._links[int.from_bytes(said[_SECRET_BYTES:], "big")] = link
                else:
                    link.close()

    def _hear(self, process: int, link: socket.socket, on_death: Callable[["Lifelines", int], None]) -> None:
        with contextlib.suppress(OSError):
            while True:
                message = _read(link, int.from_bytes(_read(link, _LENGTH_BYTES), "big"))
                if message == FAREWELL:
                    self.unwatch()
                self.received.put(message)
        with self._dying:
            is_first_death = not self._unwatched.is_set()
            self._unwatched.set()
        if is_first_death:
            on_death(self, process)


def _read(link: socket.socket, length: int) -> bytes:
    """Raises OSError where the connection ends before."""
    read, view = 0, memoryview(whole := bytearray(length))
    while read < length:
        if not (more := link.recv_into(view[read:])):
            raise ConnectionError("closed")
        read += more
    return bytes(whole)
