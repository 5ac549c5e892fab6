"""One HTTP request on its way: read, admitted, waited for, sent back, and bounded all along."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Send

from teacher.serve.service import Service
from teacher.wire import Refused

DEADLINE_HEADER = "x-deadline-seconds"
"""In a request: how long its client will wait. What is not begun by then is not computed."""
_SENT_BYTES = 2**18
"""Of an answer at once: each waits until the client has taken most of those before."""
_COUNTED_BYTES = 2**16
"""Of a body at once, at least."""
_AT_ONCE_BYTES = 2**20
"""So many are read or written in less time than a thread takes to be woken and to wake its caller."""
_STALLED_SECONDS = 60.0
"""After which a client that takes nothing of its answer is given up."""
Result = TypeVar("Result")


@dataclasses.dataclass
class Call:
    """A request and all that is held for it until its answer has been sent."""

    service: Service
    request: Request
    held: contextlib.ExitStack
    _gone: "asyncio.Task[None] | None" = None
    _ends: float = math.inf

    def start(self) -> None:
        """From here on its deadline counts. Raises Refused for a header that is no deadline."""
        self._ends = asyncio.get_running_loop().time() + self._deadline_seconds()

    async def body(self) -> bytes:
        """All of it. Raises Refused (413, 429) as soon as it is known to be too long, for this or for all requests."""
        most = self.service.limits.max_body_bytes
        whole, counted = bytearray(), 0
        try:
            async with asyncio.timeout_at(self._ends):
                async for part in self.request.stream():
                    if len(whole) + len(part) > most:
                        raise Refused("body", f"has more than {most} bytes (max_body_bytes); send less at once", 413)
                    if len(whole) + len(part) > counted:
                        # More than has come: a body in tiny parts is not to be counted part by part.
                        more = max(len(part), min(_COUNTED_BYTES, most - counted))
                        self.held.enter_context(self.service.admission.asked(more))
                        counted += more
                    whole += part
        except TimeoutError:
            raise self._late() from None
        return bytes(whole)

    def admit(self, tokens: int) -> None:
        """Counts the request as one of so many tokens until it is answered. Raises Refused (429)."""
        self.held.enter_context(self.service.admission.admitted(tokens))

    async def answer(self, future: "concurrent.futures.Future[Result]") -> Result:
        """What a queue has been asked for. Where nobody waits any more it leaves the queue, or the batch."""
        try:
            return await self.until(asyncio.wrap_future(future))
        finally:
            future.cancel()

    async def until(self, result: Awaitable[Result]) -> Result:
        """The result, once it is there. Raises ClientDisconnect where the client has gone, and Refused (408) where the
        deadline has come."""
        if self._gone is None:
            self._gone = asyncio.ensure_future(_disconnected(self.request))
            self.held.callback(self._gone.cancel)
        waiting = asyncio.ensure_future(result)
        both: set[asyncio.Future[Any]] = {waiting, self._gone}
        left = self._ends - asyncio.get_running_loop().time()
        try:
            done, _ = await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if waiting in done:
                return waiting.result()
        finally:
            waiting.cancel()
        if self._gone in done:
            raise ClientDisconnect
        raise self._late()

    def _deadline_seconds(self) -> float:
        most, text = self.service.limits.deadline_seconds, self.request.headers.get(DEADLINE_HEADER)
        if text is None:
            return most
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise Refused(DEADLINE_HEADER, "is no number of seconds above 0")
        return min(seconds, most)

    def _late(self) -> Refused:
        seconds = self._deadline_seconds()
        return Refused("deadline", f"of {seconds:g} seconds has come before the answer; ask for less at once", 408)


async def worked_on(size: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """`work(*arguments)` on so many bytes; in a thread where others would have to wait for it."""
    return work(*arguments) if size <= _AT_ONCE_BYTES else await asyncio.to_thread(work, *arguments)


class Sending:
    """Sends an answer in parts, as fast as its client takes them; counts what has not been sent."""

    def __init__(self, send: Send, service: Service | None):
        self._send, self._service = send, service

    async def __call__(self, message: Message) -> None:
        body = message.get("body", b"")
        if len(body) <= _SENT_BYTES or self._service is None:
            await self._sent(message)
            return
        with self._service.admission.answered(len(body)):
            for part in _parts(memoryview(body)):
                more = part.nbytes > 0 or message.get("more_body", False)
                await self._sent({**message, "body": bytes(part), "more_body": more})

    async def _sent(self, message: Message) -> None:
        async with asyncio.timeout(_STALLED_SECONDS):
            await self._send(message)


def _parts(body: memoryview) -> Iterator[memoryview]:
    """Parts of `body`, and an empty one behind them: by then nearly all has gone."""
    for first in range(0, len(body) + _SENT_BYTES, _SENT_BYTES):
        yield body[first : first + _SENT_BYTES]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
