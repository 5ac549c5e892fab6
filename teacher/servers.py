"""HTTP servers that answer alike: asked in turn, tried again, waited for while they are away."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import httpx2

from qwen3.errors import UserError
from teacher.limits import TOKEN_VARIABLE, token_of_environment

_CONNECT_SECONDS, _SEND_SECONDS = 5.0, 60.0
_SHORT_ANSWER_SECONDS = 30.0
"""After which a server that is asked who it is, or for little more, is not there."""
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.05, 5.0
_FAILURES = 3
"""Answers of status 500 to one request after which it is the server's fault and not a moment's."""
_ABORTS = 8
"""Times in a row that a server lets go of one request, being there all the while, after which it is no moment's."""
_PASSING = (429, 500, 502, 503, 504)
"""Statuses after which a request is tried again."""
_CONNECTED, _ENCRYPTED = "connection.connect_tcp.complete", "connection.start_tls.complete"
_NOTICED_WHEN_GONE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (
            ("TCP_KEEPIDLE", 30),  # seconds
            ("TCP_KEEPINTVL", 10),  # seconds
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 60_000),  # milliseconds
        )
        if hasattr(socket, name)
    ),
]
"""Options of a connection by which a machine that has vanished is noticed within a minute, however long an answer may
take."""
_ENDED = "the teacher's servers were still being asked when the run ended"
Part = TypeVar("Part")
Found = TypeVar("Found")


class ServerRefusal(UserError):
    """A server does not answer a request, and would not if it were asked again; `status` is HTTP's."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class NoAnswer(Exception):
    """A server has let go of a request that it had begun, as one does that is stopped."""


@dataclasses.dataclass
class Server:
    """One of several."""

    url: str
    under_way: int = 0
    rest_seconds: float = 0.0
    """Doubled whenever it does not answer, 0 once it does."""
    rests_until: float = 0.0
    """On the monotonic clock; until then others come first."""
    opened_at: float = 0.0
    """On the monotonic clock, when the last connection to it was opened."""
    known_at: float = 0.0
    """On the monotonic clock, when it was last asked who it is."""
    asking: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Held while it is asked that."""


class Servers:
    """Asks whichever has the least to do. Every request must be a pure function of its content: it may be sent again,
    to any of them.

    Attributes:
        each: The servers.
        headers: Go with every request.
        read_seconds: How long one may be silent.
        refusals: What a status means to this program's servers, of which `{reason}` is a part: what follows a URL.
        on_connection: Called with a server before an answer is taken, where a connection has been opened since it was
            last called: the server may have become another. What it raises ends the request, but for NoAnswer, by which
            the server is away and its answer counts for nothing.
    """

    def __init__(self, urls: Sequence[str], *, outage_seconds: float):
        """`urls` are http://HOST:PORT of each; for `outage_seconds` a request is tried again while none answers.

        The token of servers beyond this machine is the environment variable TEACHER_TOKEN.
        """
        self.each = [Server(url.rstrip("/")) for url in urls]
        self.headers: dict[str, str] = {}
        self.read_seconds = _SHORT_ANSWER_SECONDS
        self.refusals: Mapping[int, str] = {}
        self.on_connection: Callable[[Server], None] | None = None
        self._outage_seconds = outage_seconds
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        token = token_of_environment()
        self._http = httpx2.Client(
            headers={"authorization": f"Bearer {token}"} if token else {},
            limits=httpx2.Limits(max_connections=None),
        )

    def start(self, at_once: int) -> None:
        """Lets `map` keep so many requests under way, of each server."""
        self._threads = concurrent.futures.ThreadPoolExecutor(at_once * len(self.each), "ask-teacher")

    def map(self, ask: Callable[[Part], Found], parts: Iterable[Part]) -> Iterator[Found]:
        """What `ask` finds for each of the parts, in their order; several are asked for at once."""
        assert self._threads is not None
        return self._threads.map(ask, parts)

    def close(self) -> None:
        """Ends what is asked, answered or not: whoever waits for it gets a UserError."""
        with self._lock:
            self._closed.set()
            opened = list(self._sockets)
        for one in opened:
            _shut(one)
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._http.close()

    def answered(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        kind: str | None = None,
        only: Server | None = None,
        *,
        once: bool = False,
    ) -> httpx2.Response:
        """The answer of whichever server gives one first, or of `only` this; all that may pass is tried again.

        The outage begins when no server is reached, and ends with any answer; one that is too busy is there. With
        `once` nothing is tried again, and nobody is called about new connections: what may pass raises NoAnswer.
        Raises ServerRefusal where a server refuses, UserError where none answers.
        """
        return self.read(lambda response: response, method, path, content, kind, only, once=once)

    def read(
        self,
        made: Callable[[httpx2.Response], Found],
        method: str,
        path: str,
        content: bytes | None = None,
        kind: str | None = None,
        only: Server | None = None,
        *,
        once: bool = False,
    ) -> Found:
        """What `made` makes of the answer, as `answered`. Where it raises NoAnswer, the request is tried again; a
        server that does not get beyond that ends it."""
        headers = self.headers | ({} if kind is None else {"content-type": kind})
        seconds = _SHORT_ANSWER_SECONDS if once else self.read_seconds
        timeout = httpx2.Timeout(seconds, connect=_CONNECT_SECONDS, write=_SEND_SECONDS, pool=None)
        outage_ends: float | None = None
        failures, aborts, away = 0, 0, list[str]()
        while not self._closed.is_set():
            server = self._chosen(only)
            try:
                response = self._http.request(
                    method,
                    server.url + path,
                    content=content,
                    headers=headers,
                    timeout=timeout,
                    extensions={"trace": functools.partial(self._traced, server)},
                )
                if response.status_code in _PASSING:
                    if once:
                        raise NoAnswer(_reason(response))
                elif not once:
                    self._find_out(server)
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
                raise UserError(f"{server.url!r} is no server's address ({error}); write http://HOST:PORT") from None
            except (httpx2.RequestError, NoAnswer) as error:
                reached = False
                reason = str(error) if isinstance(error, NoAnswer) else f"{type(error).__name__} {error}".strip()
                if once:
                    raise NoAnswer(reason) from None
            else:
                reached = response.status_code not in (502, 503, 504)
                if response.status_code < 400:
                    try:
                        found = made(response)
                    except NoAnswer as error:
                        reason = str(error)
                        aborts += 1
                    else:
                        server.rest_seconds = 0.0
                        return found
                else:
                    reason = _reason(response)
                    failures += response.status_code == 500
                    if response.status_code not in _PASSING or failures == _FAILURES:
                        raise ServerRefusal(self._refusal(server, response, reason), response.status_code)
            finally:
                with self._lock:
                    server.under_way -= 1
            if reached:
                outage_ends = None
                away.clear()
                if aborts == _ABORTS:
                    raise UserError(
                        f"{server.url} can be reached, but {reason} {aborts} times in a row; see what it logs, or ask "
                        "for less"
                    )
            else:
                aborts = 0
                away.append(server.url)
                if outage_ends is None:
                    outage_ends = time.monotonic() + self._outage_seconds
                elif time.monotonic() > outage_ends:
                    raise UserError(
                        f"no teacher has answered at {', '.join(dict.fromkeys(away))} for {self._outage_seconds:g} "
                        f"seconds ({reason}); start it again: a run goes on from what it has saved"
                    )
            self._rest(server)
        raise UserError(_ENDED)

    def _traced(self, server: Server, event: str, told: Mapping[str, Any]) -> None:
        """Hears how a request comes by its connection."""
        if event not in (_CONNECTED, _ENCRYPTED):
            return
        server.opened_at = time.monotonic()
        connection = told["return_value"].get_extra_info("socket")
        if event == _CONNECTED:
            for option in _NOTICED_WHEN_GONE:
                connection.setsockopt(*option)
        with self._lock:
            self._sockets.add(connection)
            closed = self._closed.is_set()
        if closed:
            _shut(connection)

    def _find_out(self, server: Server) -> None:
        """Lets `on_connection` see who answers, unless it has since the last connection was opened."""
        if self.on_connection is None:
            return
        with server.asking:
            if server.known_at < server.opened_at:
                began = time.monotonic()
                self.on_connection(server)
                server.known_at = began

    def _refusal(self, server: Server, response: httpx2.Response, reason: str) -> str:
        if (known := self.refusals.get(response.status_code)) is not None:
            return f"{server.url} {known.format(reason=reason)}"
        if response.status_code == 401:
            return f"{server.url} asks for a token ({reason}); set the environment variable {TOKEN_VARIABLE} to its own"
        return f"{server.url} has refused with status {response.status_code}: {reason}"

    def _rest(self, server: Server) -> None:
        """Waits before a request is tried again, longer each time that the server has not answered."""
        server.rest_seconds = min(max(_FIRST_DELAY_SECONDS, 2 * server.rest_seconds), _LONGEST_DELAY_SECONDS)
        server.rests_until = time.monotonic() + server.rest_seconds
        # Clients that were cut off together do not come back together.
        if self._closed.wait(server.rest_seconds * random.uniform(0.5, 1.0)):
            raise UserError(_ENDED)

    def _chosen(self, only: Server | None) -> Server:
        """The server with the least to do, of those that have answered lately; else the one that is next to be tried.
        It counts as asked."""
        with self._lock:
            now = time.monotonic()
            # Clients that ask for one thing at a time, and know nothing of one another, would all choose the first.
            chosen = only or min(
                self.each, key=lambda one: (max(0.0, one.rests_until - now), one.under_way, random.random())
            )
            chosen.under_way += 1
            return chosen


def json_of(response: httpx2.Response, program: str) -> Any:
    """What an answer holds. Raises UserError, saying that it comes from no `program`, where that is no JSON."""
    try:
        return response.json()
    except ValueError:
        raise UserError(f"{response.url} answers with something else than JSON; it is no {program}") from None


def _shut(connection: socket.socket) -> None:
    """Ends a connection for whoever reads from it or writes to it, which closing it does not."""
    with contextlib.suppress(OSError):  # it is at its end
        connection.shutdown(socket.SHUT_RDWR)


def _reason(response: httpx2.Response) -> str:
    """What a server says, on one line."""
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = response.text[:200]
    return " ".join(said.split()) or response.reason_phrase
