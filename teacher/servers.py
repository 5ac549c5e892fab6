"""HTTP servers that answer alike: asked in turn, tried again, waited for while they are away."""

import concurrent.futures
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import httpx2

from qwen3.errors import UserError
from teacher.limits import TOKEN_VARIABLE, token_of_environment

_CONNECT_SECONDS, _SEND_SECONDS, _FIRST_ANSWER_SECONDS = 5.0, 60.0, 60.0
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.05, 5.0
_FAILURES = 3
"""Answers of status 500 to one request after which it is the server's fault and not a moment's."""
_PASSING = (429, 500, 502, 503, 504)
"""Statuses after which a request is tried again."""
_CONNECTED = "connection.connect_tcp.complete"
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


class Servers:
    """Asks whichever has the least to do. Every request must be a pure function of its content: it may be sent again,
    to any of them.

    Attributes:
        each: The servers.
        headers: Go with every request.
        read_seconds: How long one may be silent.
        on_connection: Called with a server before an answer is taken, where a connection has been opened since it was
            last called: the server may have become another. What it raises ends the request.
    """

    def __init__(self, urls: Sequence[str], *, outage_seconds: float):
        """`urls` are http://HOST:PORT of each; for `outage_seconds` a request is tried again while none answers.

        The token of servers beyond this machine is the environment variable TEACHER_TOKEN.
        """
        self.each = [Server(url.rstrip("/")) for url in urls]
        self.headers: dict[str, str] = {}
        self.read_seconds = _FIRST_ANSWER_SECONDS
        self.on_connection: Callable[[Server], None] | None = None
        self._outage_seconds = outage_seconds
        self._lock = threading.Lock()
        self._closed = threading.Event()
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
        """Ends what waits for a server, and waits for what one is answering."""
        self._closed.set()
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
        checked: bool = True,
    ) -> httpx2.Response:
        """The answer of whichever server gives one first, or of `only` this; all that may pass is tried again.

        The outage begins when no server is reached, and ends with any answer; one that is too busy is there. Without
        `checked` nobody is called about new connections.
        Raises ServerRefusal where a server refuses, UserError where none answers.
        """
        return self.read(lambda response: response, method, path, content, kind, only, checked=checked)

    def read(
        self,
        made: Callable[[httpx2.Response], Found],
        method: str,
        path: str,
        content: bytes | None = None,
        kind: str | None = None,
        only: Server | None = None,
        *,
        checked: bool = True,
    ) -> Found:
        """What `made` makes of the answer, as `answered`. Where it raises NoAnswer, the server is taken to be away."""
        headers = self.headers | ({} if kind is None else {"content-type": kind})
        timeout = httpx2.Timeout(self.read_seconds, connect=_CONNECT_SECONDS, write=_SEND_SECONDS, pool=None)
        outage_ends: float | None = None
        failures = 0
        while True:
            server = self._chosen(only)

            def traced(event: str, _: Any, server: Server = server) -> None:
                if event == _CONNECTED:
                    server.opened_at = time.monotonic()

            try:
                response = self._http.request(
                    method,
                    server.url + path,
                    content=content,
                    headers=headers,
                    timeout=timeout,
                    extensions={"trace": traced},
                )
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
                raise UserError(f"{server.url!r} is no server's address ({error}); write http://HOST:PORT") from None
            except httpx2.TransportError as error:
                away, reason = True, f"{type(error).__name__} {error}".strip()
            else:
                if checked and response.status_code not in _PASSING:
                    self._find_out(server)
                if response.status_code < 400:
                    try:
                        found = made(response)
                    except NoAnswer as error:
                        away, reason = True, str(error)
                    else:
                        server.rest_seconds = 0.0
                        return found
                else:
                    reason = _reason(response)
                    failures += response.status_code == 500
                    if response.status_code not in _PASSING or failures == _FAILURES:
                        raise ServerRefusal(_refusal(server, response, reason), response.status_code)
                    away = response.status_code in (502, 503, 504)
            finally:
                with self._lock:
                    server.under_way -= 1
            if not away:
                outage_ends = None
            elif outage_ends is None:
                outage_ends = time.monotonic() + self._outage_seconds
            elif time.monotonic() > outage_ends:
                raise UserError(
                    f"no teacher has answered at {', '.join(one.url for one in self.each)} for "
                    f"{self._outage_seconds:g} seconds ({reason}); start it again: a run goes on from what it has saved"
                )
            self._rest(server)

    def _find_out(self, server: Server) -> None:
        """Lets `on_connection` see who answers, unless it has since the last connection was opened."""
        if self.on_connection is not None and server.known_at < server.opened_at:
            began = time.monotonic()
            self.on_connection(server)
            server.known_at = began

    def _rest(self, server: Server) -> None:
        """Waits before a request is tried again, longer each time that the server has not answered."""
        server.rest_seconds = min(max(_FIRST_DELAY_SECONDS, 2 * server.rest_seconds), _LONGEST_DELAY_SECONDS)
        server.rests_until = time.monotonic() + server.rest_seconds
        # Clients that were cut off together do not come back together.
        if self._closed.wait(server.rest_seconds * random.uniform(0.5, 1.0)):
            raise UserError("the teacher's servers were still being asked when the run ended")

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


def _refusal(server: Server, response: httpx2.Response, reason: str) -> str:
    if response.status_code == 409:
        return (
            f"{server.url} serves another teacher than the one that was asked before ({reason}); serve that one "
            "again, or begin a new run"
        )
    if response.status_code == 408:
        return f"{server.url} has given up ({reason}); start it with a larger --deadline-seconds, or ask for less"
    if response.status_code == 401:
        return f"{server.url} asks for a token ({reason}); set the environment variable {TOKEN_VARIABLE} to its own"
    return f"{server.url} has refused with status {response.status_code}: {reason}"


def _reason(response: httpx2.Response) -> str:
    """What a server says, on one line."""
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = response.text[:200]
    return " ".join(said.split()) or response.reason_phrase
