"""Servers that go away, hang, abort or become others while they are asked: by real connections, and no teacher."""

import asyncio
import concurrent.futures
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qwen3.errors import UserError
from teacher import servers as servers_
from teacher.servers import NoAnswer, Server, Servers
from tests.teacher.serving import serving_app

DEAD = "http://127.0.0.1:1"


class Answers:
    """/ask is answered by its name once `let` is set; /who by a status."""

    def __init__(self, name: str, who: int = 200, ask: int = 200):
        self.name, self.who, self.ask = name, who, ask
        self.asked = threading.Semaphore(0)
        self.let = threading.Event()
        self.let.set()

    def app(self) -> Starlette:
        async def ask(request: Request) -> Response:
            self.asked.release()
            while not self.let.is_set():
                await asyncio.sleep(0.01)
            return JSONResponse(self.name, self.ask)

        async def who(request: Request) -> Response:
            return JSONResponse({"error": {"message": "draining"}}, self.who)

        return Starlette(routes=[Route("/ask", ask), Route("/who", who)])


@contextlib.contextmanager
def servers_of(*answers: Answers, outage_seconds: float = 20) -> Iterator[Servers]:
    with contextlib.ExitStack() as opened:
        urls = [opened.enter_context(serving_app(one.app())) for one in answers]
        yield opened.enter_context(contextlib.closing(Servers(urls, outage_seconds=outage_seconds)))
        for one in answers:
            one.let.set()


def name_of(response: httpx2.Response) -> Any:
    return response.json()


def test_a_server_that_cannot_say_who_it_is_leaves_the_request_to_another():
    """It has given an answer and is stopping: nothing is known of who gave that."""
    with servers_of(Answers("first", who=503), Answers("second")) as servers:

        def find_out(server: Server) -> None:
            servers.answered("GET", "/who", only=server, once=True)

        servers.on_connection = find_out
        began = time.monotonic()
        assert [servers.read(name_of, "GET", "/ask") for _ in range(3)] == ["second"] * 3
        assert time.monotonic() - began < 10


def test_only_servers_that_were_asked_are_said_to_be_away():
    servers = Servers([DEAD, "http://127.0.0.1:2"], outage_seconds=0.1)
    with contextlib.closing(servers):
        with pytest.raises(UserError, match=r"no teacher has answered at http://127\.0\.0\.1:1 for 0\.1 seconds"):
            servers.answered("GET", "/ask", only=servers.each[0])
        with pytest.raises(UserError, match=r"answered at http://127\.0\.0\.1:2, http://127\.0\.0\.1:1 for"):
            servers.answered("GET", "/ask")


def test_closing_ends_what_is_under_way_and_what_would_come_next():
    hanging = Answers("hangs")
    hanging.let.clear()
    with servers_of(hanging) as servers:
        servers.start(1)
        asking = servers.map(lambda number: servers.read(name_of, "GET", "/ask"), range(3))
        assert hanging.asked.acquire(timeout=10)
        began = time.monotonic()
        servers.close()
        assert time.monotonic() - began < 5
        with pytest.raises(UserError, match="were still being asked when the run ended") as raised:
            next(asking)
        assert "\n" not in str(raised.value)
        with pytest.raises(UserError, match="were still being asked when the run ended"):
            servers.answered("GET", "/ask")
        assert not hanging.asked.acquire(blocking=False)


def test_a_server_that_is_there_and_aborts_is_no_outage(monkeypatch):
    monkeypatch.setattr(servers_, "_LONGEST_DELAY_SECONDS", 0.01)
    tried = []

    def aborted(response: httpx2.Response) -> None:
        tried.append(response)
        raise NoAnswer("it has aborted the request")

    with (
        servers_of(Answers("aborts")) as servers,
        pytest.raises(UserError, match=r"can be reached, but it has aborted the request 8 times in a row; see what it"),
    ):
        servers.read(aborted, "GET", "/ask")
    assert len(tried) == 8


def test_what_a_status_means_is_the_programs_own():
    with servers_of(Answers("slow", ask=408)) as servers:
        with pytest.raises(UserError, match="has refused with status 408"):
            servers.answered("GET", "/ask")
        servers.refusals = {408: "has given up ({reason}); ask for less"}
        with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+ has given up \(.*\); ask for less"):
            servers.answered("GET", "/ask")


def test_a_server_is_asked_once_who_it_is_for_all_connections_that_were_open_by_then():
    answers, asked = Answers("one"), list[Server]()
    answers.let.clear()

    def find_out(server: Server) -> None:
        asked.append(server)
        time.sleep(0.2)

    with servers_of(answers) as servers, concurrent.futures.ThreadPoolExecutor(4) as threads:
        servers.on_connection = find_out
        found = [threads.submit(servers.read, name_of, "GET", "/ask") for _ in range(4)]
        for _ in found:
            assert answers.asked.acquire(timeout=10)
        answers.let.set()
        assert [one.result(20) for one in found] == ["one"] * 4
    assert len(asked) == 1


def test_a_machine_that_vanishes_is_noticed_within_a_minute():
    with servers_of(Answers("one")) as servers:
        servers.answered("GET", "/ask")
        (connection,) = servers._sockets
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, apart, tries = (
            connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        )
        assert idle + apart * tries <= 60
