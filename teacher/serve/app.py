"""The HTTP endpoints of a teacher: who may ask, and what is said where that is refused."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qwen3.rollout import rollouts_to_json
from teacher.identity import TeacherIdentity
from teacher.limits import TOKEN_VARIABLE
from teacher.serve import chats, completions, openapi, sglang, vllm
from teacher.serve.calls import Call, Sending, worked_on
from teacher.serve.openai import json_response
from teacher.serve.refusals import failure, refusal
from teacher.serve.schemas import RolloutsRequest, engine_requests, read
from teacher.serve.service import Service
from teacher.serve.wanted import check_tokens
from teacher.wire import CONTENT_TYPE, TEACHER_HEADER, Refused, decode_request, encode

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Names of this machine to itself."""
_LOG = logging.getLogger("teacher.serve")
_HEAD_ROWS = 4_096
_CLIENT_CLOSED, _NO_TOKEN = 499, 401
Handler = Callable[[Call], Awaitable[Response]]


@dataclasses.dataclass
class Standing:
    """What stands behind the endpoints: nothing while the teacher is being loaded."""

    service: Service | None = None


def make_app(standing: Standing, *, token: str | None = None) -> Starlette:
    """The application. With `token` every request must bear it, but for /health, /ready and the documentation;
    without one all others must be for this machine by name, and of no web page from elsewhere."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> Response:
        is_ready = standing.service is not None
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def described(request: Request) -> Response:
        return JSONResponse(openapi.document())

    async def page(request: Request) -> Response:
        return HTMLResponse(openapi.page())

    async def unknown(request: Request, error: Exception) -> Response:
        return refusal(Refused("path", f"{request.url.path} with {request.method} is not served", status=404))

    def served(path: str, handler: Handler, method: str = "POST") -> Route:
        return Route(path, _Endpoint(handler, standing, token), methods=[method])

    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/openapi.json", described),
        Route("/docs", page),
        served("/metrics", _metrics, "GET"),
        served("/v1/models", _models, "GET"),
        served("/v1/head", _head, "GET"),
        served("/v1/targets", _targets),
        served("/v1/rollouts", _rollouts),
        served("/v1/completions", completions.completions),
        served("/v1/chat/completions", chats.chats),
        served("/inference/v1/generate", vllm.generate),
        served("/generate", sglang.generate),
    ]
    return Starlette(routes=routes, exception_handlers={404: unknown, 405: unknown})


class _Endpoint:
    """One endpoint as an ASGI application: what it holds is let go when its answer has been sent."""

    def __init__(self, handler: Handler, standing: Standing, token: str | None):
        self._handler, self._standing, self._token = handler, standing, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, started = Request(scope, receive), time.monotonic()
        with contextlib.ExitStack() as held:
            response = await self._response(request, held)
            service = self._standing.service
            if service is not None:
                if response.status_code != _NO_TOKEN:
                    response.headers[TEACHER_HEADER] = _known_by(service.identity)["teacher"]
                path = request.url.path
                service.metrics.requests.labels(path, str(response.status_code)).inc()
                service.metrics.seconds.labels(path).observe(time.monotonic() - started)
            await response(scope, receive, Sending(send, service))

    async def _response(self, request: Request, held: contextlib.ExitStack) -> Response:
        try:
            if self._token is None:
                _check_own(request)
            else:
                _check_token(request, self._token)
            service = self._standing.service
            if service is None:
                raise Refused("teacher", "is being loaded; come again", status=503)
            _check_teacher(request, service)
            call = Call(service, request, held)
            call.start()
            return await self._handler(call)
        except Refused as refused:
            return refusal(refused)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED)
        except Exception:  # noqa: BLE001 - a bug; its reason is for the log, and other requests go on
            _LOG.exception("%s has failed", request.url.path)
            return failure(500, "the server has failed; its log says why", None)


async def _metrics(call: Call) -> Response:
    return Response(call.service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _models(call: Call) -> Response:
    service = call.service
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {
                    "id": service.name,
                    "object": "model",
                    "created": 0,
                    "owned_by": "teacher.serve",
                    "max_model_len": service.limits.max_prompt_tokens + service.limits.max_new_tokens,
                    "vocab_size": service.vocab_size,
                    "identity": dataclasses.asdict(service.identity),
                    "limits": dataclasses.asdict(service.limits),
                }
            ],
        }
    )


async def _head(call: Call) -> Response:
    service = call.service
    digest = await asyncio.to_thread(lambda: service.head_digest)
    tag = {"etag": f'"{digest}"'}
    if call.request.headers.get("if-none-match") == tag["etag"]:
        return Response(status_code=304, headers=tag)
    head = service.head
    # The header alone, then the rows: no second copy of what may be a gigabyte.
    empty = encode({"head": head[:0]}, {"blake2b": digest})
    header = _with_rows(empty, head)

    def body() -> Any:
        yield header
        for first in range(0, len(head), _HEAD_ROWS):
            yield head[first : first + _HEAD_ROWS].tobytes()

    return StreamingResponse(body(), media_type=CONTENT_TYPE, headers=tag)


def _with_rows(empty: bytes, head: np.ndarray) -> bytes:
    """The safetensors header of the whole head, made of that of no rows of it."""
    raw = msgspec.json.decode(empty[8:])
    raw["head"] |= {"shape": list(head.shape), "data_offsets": [0, head.nbytes]}
    text = msgspec.json.encode(raw)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


async def _targets(call: Call) -> Response:
    service, body = call.service, await call.body()
    asked = await worked_on(len(body), decode_request, body, service.limits, service.vocab_size)
    call.admit(asked.tokens)
    answer = await call.answer(service.scoring.submit(asked))
    size = sum(array.nbytes for array in answer.values())
    content = await worked_on(size, encode, answer, _known_by(service.identity))
    return Response(content, media_type=CONTENT_TYPE)


async def _rollouts(call: Call) -> Response:
    service = call.service
    asked = await asyncio.to_thread(read, await call.body(), RolloutsRequest)
    made = await asyncio.to_thread(engine_requests, asked, service.limits, service.vocab_size)
    tokens = sum(len(one.prompt_ids) + one.params.max_new_tokens for one in made)
    check_tokens("requests", tokens, service.limits)
    call.admit(tokens)
    rollouts = await call.answer(service.generation.submit(made, seed=asked.seed, step=asked.step))
    return await asyncio.to_thread(lambda: json_response(rollouts_to_json(rollouts)))


@functools.lru_cache(maxsize=1)
def _known_by(identity: TeacherIdentity) -> Mapping[str, str]:
    """What an answer says of its teacher: the hashes, and the digest of them all as `teacher`."""
    return {**dataclasses.asdict(identity), "teacher": identity.digest}


def _check_own(request: Request) -> None:
    """Without a token programs of this machine may ask, and no web page that a browser has from elsewhere."""
    for header in ("host", "origin"):
        given = request.headers.get(header)
        try:
            name = None if given is None else urlsplit(given if "//" in given else f"//{given}").hostname
        except ValueError:
            name = None
        if given is not None and name not in LOOPBACK:
            raise Refused(
                header,
                f"is none of {', '.join(LOOPBACK)}, by which a server without a token is asked; start it with "
                f"{TOKEN_VARIABLE}",
                status=403,
            )


def _check_token(request: Request, token: str) -> None:
    given = request.headers.get("authorization", "").encode()
    if not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Refused("authorization", "is not 'Bearer TOKEN' with the token of this server", status=_NO_TOKEN)


def _check_teacher(request: Request, service: Service) -> None:
    wanted = request.headers.get(TEACHER_HEADER)
    if wanted is not None and wanted != _known_by(service.identity)["teacher"]:
        raise Refused(TEACHER_HEADER, "names another teacher than the one that is served here", status=409)
