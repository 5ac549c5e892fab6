"""The HTTP endpoints of a teacher: who may ask, how much, how long, and what is said where that is refused."""

import asyncio
import concurrent.futures
import dataclasses
import hmac
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qwen3.rollout import rollouts_to_json
from teacher.serve import vllm
from teacher.serve.schemas import RolloutsRequest, VllmGenerate, engine_requests, read
from teacher.serve.service import Service
from teacher.wire import CONTENT_TYPE, TEACHER_HEADER, Answer, Refused, TargetsRequest, decode_request, encode

DEADLINE_HEADER = "x-deadline-seconds"
"""In a request: how long its client will wait. What is not begun by then is not computed."""
_LOG = logging.getLogger("teacher.serve")
_HEAD_ROWS = 4_096
_CLIENT_CLOSED = 499
Result = TypeVar("Result")
Handler = Callable[[Service, Request], Awaitable[Response]]


@dataclasses.dataclass
class Standing:
    """What stands behind the endpoints: nothing while the teacher is being loaded."""

    service: Service | None = None


def make_app(standing: Standing, *, token: str | None = None) -> Starlette:
    """The application. With `token` every request but /health and /ready must bear it."""

    def served(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            started = time.monotonic()
            try:
                if token is not None:
                    _check_token(request, token)
                service = standing.service
                if service is None:
                    raise Refused("teacher", "is being loaded; come again", status=503)
                _check_teacher(request, service)
                response = await handler(service, request)
            except Refused as refused:
                response = _refusal(refused)
            except ClientDisconnect:
                response = Response(status_code=_CLIENT_CLOSED)
            except Exception:  # noqa: BLE001 - a bug; its reason is for the log, and other requests go on
                _LOG.exception("%s has failed", request.url.path)
                response = _json_error(500, "the server has failed; its log says why", None)
            if standing.service is not None:
                response.headers[TEACHER_HEADER] = standing.service.identity.digest
                metrics, path = standing.service.metrics, request.url.path
                metrics.requests.labels(path, str(response.status_code)).inc()
                metrics.seconds.labels(path).observe(time.monotonic() - started)
            return response

        return endpoint

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> Response:
        is_ready = standing.service is not None
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def unknown(request: Request, error: Exception) -> Response:
        return _refusal(Refused("path", f"{request.url.path} with {request.method} is not served", status=404))

    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", served(_metrics)),
        Route("/v1/models", served(_models)),
        Route("/v1/head", served(_head)),
        Route("/v1/targets", served(_targets), methods=["POST"]),
        Route("/v1/rollouts", served(_rollouts), methods=["POST"]),
        Route("/inference/v1/generate", served(_generate), methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={404: unknown, 405: unknown})


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _models(service: Service, request: Request) -> Response:
    longest = service.limits.max_prompt_tokens + service.limits.max_new_tokens
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {
                    "id": service.name,
                    "object": "model",
                    "created": 0,
                    "owned_by": "teacher.serve",
                    "max_model_len": longest,
                    "vocab_size": service.vocab_size,
                    "identity": dataclasses.asdict(service.identity),
                    "limits": dataclasses.asdict(service.limits),
                }
            ],
        }
    )


async def _head(service: Service, request: Request) -> Response:
    digest = await asyncio.to_thread(lambda: service.head_digest)
    tag = {"etag": f'"{digest}"'}
    if request.headers.get("if-none-match") == tag["etag"]:
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


async def _targets(service: Service, request: Request) -> Response:
    body = await _body(request, service)
    asked = decode_request(body, service.limits, service.vocab_size)
    answer = await _answered(service, request, asked.tokens, lambda: service.scoring.submit(asked))
    identity = {name: str(value) for name, value in dataclasses.asdict(service.identity).items()}
    return Response(encode(answer, identity | {"teacher": service.identity.digest}), media_type=CONTENT_TYPE)


async def _rollouts(service: Service, request: Request) -> Response:
    asked = read(await _body(request, service), RolloutsRequest)
    made = engine_requests(asked, service.limits, service.vocab_size)
    tokens = sum(len(one.prompt_ids) + one.params.max_new_tokens for one in made)
    rollouts = await _answered(
        service, request, tokens, lambda: service.generation.submit(made, seed=asked.seed, step=asked.step)
    )
    return Response(msgspec.json.encode(rollouts_to_json(rollouts)), media_type="application/json")


async def _generate(service: Service, request: Request) -> Response:
    asked = read(await _body(request, service), VllmGenerate)
    if asked.model not in (None, service.name):
        raise Refused("model", f"is not served here; this is {service.name}", status=404)
    vllm.check(asked, service.limits, service.vocab_size)
    made = vllm.requests(asked, service.limits, service.vocab_size)
    rollouts = []
    if made:
        tokens = sum(len(one.prompt_ids) + one.params.max_new_tokens for one in made)
        rollouts = await _answered(service, request, tokens, lambda: service.generation.submit(made, seed=0))

    async def scored(wanted: TargetsRequest) -> Answer:
        return await _answered(service, request, wanted.tokens, lambda: service.scoring.submit(wanted))

    if (one := vllm.one_token_targets(asked)) is not None:
        rollouts = [vllm.one_token_rollout(asked, await scored(one), service.tokenizer.eos_ids)]
    top, named = vllm.top_targets(asked, rollouts, service.vocab_size), vllm.named_targets(asked)
    answer = vllm.response(
        asked,
        rollouts,
        None if top is None else (top, await scored(top)),
        None if named is None else await scored(named),
        request_id=asked.request_id or uuid.uuid4().hex,
        teacher=service.identity.digest,
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _body(request: Request, service: Service) -> bytes:
    """All of it. Raises Refused (413) as soon as it is known to be too long."""
    most = service.limits.max_body_bytes
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise Refused("body", f"has more than {most} bytes (max_body_bytes); send less at once", status=413)
        parts.append(part)
    return b"".join(parts)


async def _answered(
    service: Service, request: Request, tokens: int, submit: Callable[[], "concurrent.futures.Future[Result]"]
) -> Result:
    """What is submitted, once it is there, if there is room for it. Where the client has gone or the deadline has come
    it is given up, and leaves the batch if that has not begun."""
    seconds = _deadline(request, service.limits.deadline_seconds)
    future = service.admission.admitted(tokens, submit)
    waiting = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_disconnected(request))
    both: set[asyncio.Future[Any]] = {waiting, gone}
    try:
        done, _ = await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting in done:
            return waiting.result()
    finally:
        gone.cancel()
        future.cancel()
    if gone in done:
        raise ClientDisconnect
    raise Refused("deadline", f"of {seconds:g} seconds has come before the answer; ask for less at once", status=408)


def _deadline(request: Request, most: float) -> float:
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return most
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise Refused(DEADLINE_HEADER, "is no number of seconds above 0")
    return min(seconds, most)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_token(request: Request, token: str) -> None:
    given = request.headers.get("authorization", "").encode()
    if not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Refused("authorization", "is not 'Bearer TOKEN' with the token of this server", status=401)


def _check_teacher(request: Request, service: Service) -> None:
    wanted = request.headers.get(TEACHER_HEADER)
    if wanted is not None and wanted != service.identity.digest:
        raise Refused(TEACHER_HEADER, "names another teacher than the one that is served here", status=409)


def _refusal(refused: Refused) -> Response:
    response = _json_error(refused.status, str(refused), refused.field)
    if refused.status in (429, 503):
        response.headers["retry-after"] = "1"
    if refused.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def _json_error(status: int, message: str, field: str | None) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": field, "code": status}}, status)
