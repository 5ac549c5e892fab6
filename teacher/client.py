"""Asks servers of one teacher (`python -m teacher.serve`): balanced, retried, and of one identity throughout.

Every request is a pure function of its content, so that it may be sent again to any server. Each says which teacher it
wants, so that a server which has come back with another refuses it.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx2
import numpy as np

from qwen3.errors import UserError
from qwen3.generation.engine import OnProgress, Request
from qwen3.rollout import Rollout, rollouts_from_json
from teacher.identity import TeacherIdentity
from teacher.limits import TOKEN_VARIABLE, Limits, token_of_environment
from teacher.wire import CONTENT_TYPE, TEACHER_HEADER, Answer, TargetsRequest, decode, encode_request

_CONNECT_SECONDS, _SEND_SECONDS, _FIRST_ANSWER_SECONDS = 5.0, 60.0, 60.0
_AFTER_DEADLINE_SECONDS = 60.0
"""A server has given up on a request by its deadline; one that is silent beyond it is not there."""
_PART_TOKENS = 8_192
"""Tokens of one request, so that several servers share what is asked at once."""
_PARTS_AT_ONCE = 4
"""Requests under way, of each server, at least."""
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.05, 5.0
_FAILURES = 3
"""Answers of status 500 to one request after which it is the server's fault and not a moment's."""


@dataclasses.dataclass
class _Server:
    url: str
    under_way: int = 0
    rest_seconds: float = 0.0
    """Doubled whenever it does not answer, 0 once it does."""
    rests_until: float = 0.0
    """On the monotonic clock; until then others come first."""


class TeacherClient:
    """One teacher, behind one server or several alike.

    Attributes:
        identity: Who the teacher is.
        limits: What each of its servers takes, the least of them.
        vocab_size: Rows of its head.
    """

    def __init__(self, urls: Sequence[str], *, outage_seconds: float = 600.0, expected: TeacherIdentity | None = None):
        """Asks every server who it is, waiting for those that are still loading.

        Args:
            urls: http://HOST:PORT of each.
            outage_seconds: How long a request is tried again while no server answers.
            expected: Who the teacher must be; None for whoever is served.

        The token of servers beyond this machine is the environment variable TEACHER_TOKEN.
        Raises UserError where a server is not there, serves another teacher, or is no such server.
        """
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._outage_seconds = outage_seconds
        self._lock = threading.Lock()
        self._closed = threading.Event()
        token = token_of_environment()
        self._read_seconds = _FIRST_ANSWER_SECONDS
        self._http = httpx2.Client(
            headers={"authorization": f"Bearer {token}"} if token else {},
            limits=httpx2.Limits(max_connections=None),
        )
        self._wanted: dict[str, str] = {}
        models = {}
        for server in self._servers:
            raw = _json(self._answered("GET", "/v1/models", only=server), server.url)
            try:
                models[server.url] = raw["data"][0]
                identity = TeacherIdentity.from_json(models[server.url]["identity"])
            except (KeyError, IndexError, TypeError):
                raise UserError(
                    f"{server.url} is no teacher.serve: it says nothing of its identity; start one there with "
                    "python -m teacher.serve --model DIR"
                ) from None
            expected = expected or identity
            _check_same(expected, identity, server.url)
        assert expected is not None
        self.identity = expected
        self._wanted = {TEACHER_HEADER: expected.digest}
        self.vocab_size = int(models[self._servers[0].url]["vocab_size"])
        all_limits = [dataclasses.asdict(Limits.from_json(model["limits"])) for model in models.values()]
        self.limits = Limits(**{name: min(one[name] for one in all_limits) for name in all_limits[0]})
        longest = max(one["deadline_seconds"] for one in all_limits)
        self._read_seconds = longest + _AFTER_DEADLINE_SECONDS
        # As many as fill a server's slots, where a part holds few of the longest sequences.
        generated = self.limits.max_request_tokens // (self.limits.max_prompt_tokens + self.limits.max_new_tokens)
        at_once = max(_PARTS_AT_ONCE, -(-self.limits.generation_batch_size // generated))
        self._threads = concurrent.futures.ThreadPoolExecutor(at_once * len(urls), "ask-teacher")

    def targets(self, request: TargetsRequest) -> list[Answer]:
        """What the teacher says about each sequence, as `teacher.wire` lists it; split over servers as need be."""
        most = min(_PART_TOKENS, self.limits.max_request_tokens)
        parts = _parts([len(sequence) for sequence in request.sequences], most, self.limits.max_request_sequences)
        found = self._threads.map(lambda part: self._scored(_part_of(request, part)), parts)
        return [answer for answers in found for answer in answers]

    @functools.cached_property
    def head(self) -> np.ndarray:
        """The output matrix [V, D], in the dtype that the teacher computes in; fetched once."""
        response = self._answered("GET", "/v1/head")
        arrays, metadata = _decoded(response)
        head = arrays["head"]
        digest = hashlib.blake2b(np.ascontiguousarray(head).view(np.uint8).data, digest_size=16).hexdigest()
        if digest != metadata.get("blake2b"):
            raise UserError(f"{response.url} has sent a head that does not match its hash; ask again")
        return head

    def rollouts(
        self, requests: Sequence[Request], *, seed: int, step: int = 0, on_progress: OnProgress | None = None
    ) -> list[Rollout]:
        """What the teacher generates, the same as `Engine.generate` with its weights, seed and step.

        `on_progress` is told the rollouts and tokens of each part, in order; what it raises ends the call."""
        most = min(self.limits.max_request_sequences, self.limits.generation_batch_size)
        tokens = [len(request.prompt_ids) + request.params.max_new_tokens for request in requests]
        parts = _parts(tokens, self.limits.max_request_tokens, most)
        found: list[Rollout] = []
        for rollouts in self._threads.map(
            lambda part: self._generated(requests[part.start : part.stop], seed, step), parts
        ):
            found += rollouts
            if on_progress is not None:
                on_progress(len(rollouts), sum(len(rollout.response) for rollout in rollouts))
        return found

    def close(self) -> None:
        """Ends what waits for a server, and waits for what one is answering."""
        self._closed.set()
        self._threads.shutdown(cancel_futures=True)
        self._http.close()

    def _scored(self, request: TargetsRequest) -> list[Answer]:
        arrays, _ = _decoded(self._answered("POST", "/v1/targets", encode_request(request), CONTENT_TYPE))
        ends = np.cumsum(request.rows)[:-1]
        split = {name: np.split(array, ends) for name, array in arrays.items()}
        return [{name: parts[index] for name, parts in split.items()} for index in range(len(request.sequences))]

    def _generated(self, requests: Sequence[Request], seed: int, step: int) -> list[Rollout]:
        body = {"seed": seed, "step": step, "requests": [_as_json(request) for request in requests]}
        response = self._answered("POST", "/v1/rollouts", json.dumps(body).encode(), "application/json")
        return rollouts_from_json(_json(response, str(response.url)))

    def _answered(
        self, method: str, path: str, content: bytes | None = None, kind: str | None = None, only: _Server | None = None
    ) -> httpx2.Response:
        """The answer of whichever server gives one first, or of `only` this; all that may pass is tried again.

        The outage begins when no server is reached, and ends with any answer; one that is too busy is there."""
        headers = self._wanted | ({} if kind is None else {"content-type": kind})
        timeout = httpx2.Timeout(self._read_seconds, connect=_CONNECT_SECONDS, write=_SEND_SECONDS, pool=None)
        outage_ends: float | None = None
        failures = 0
        while True:
            server = self._chosen(only)
            try:
                response = self._http.request(
                    method, server.url + path, content=content, headers=headers, timeout=timeout
                )
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
                raise UserError(f"{server.url!r} is no server's address ({error}); write http://HOST:PORT") from None
            except httpx2.TransportError as error:
                away, reason = True, f"{type(error).__name__} {error}".strip()
            else:
                if response.status_code < 400:
                    server.rest_seconds = 0.0
                    return response
                reason = _reason(response)
                failures += response.status_code == 500
                if response.status_code not in (429, 500, 502, 503, 504) or failures == _FAILURES:
                    raise UserError(self._refusal(server, response, reason))
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
                    f"no teacher has answered at {', '.join(one.url for one in self._servers)} for "
                    f"{self._outage_seconds:g} seconds ({reason}); start it again: a run goes on from what it has saved"
                )
            self._rest(server)

    def _rest(self, server: _Server) -> None:
        """Waits before a request is tried again, longer each time that the server has not answered."""
        server.rest_seconds = min(max(_FIRST_DELAY_SECONDS, 2 * server.rest_seconds), _LONGEST_DELAY_SECONDS)
        server.rests_until = time.monotonic() + server.rest_seconds
        # Clients that were cut off together do not come back together.
        if self._closed.wait(server.rest_seconds * random.uniform(0.5, 1.0)):
            raise UserError("the teacher's servers were still being asked when the run ended")

    def _chosen(self, only: _Server | None) -> _Server:
        """The server with the least to do, of those that have answered lately; else the one that is next to be tried.
        It counts as asked."""
        with self._lock:
            now = time.monotonic()
            chosen = only or min(self._servers, key=lambda one: (max(0.0, one.rests_until - now), one.under_way))
            chosen.under_way += 1
            return chosen

    def _refusal(self, server: _Server, response: httpx2.Response, reason: str) -> str:
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


def _check_same(expected: TeacherIdentity, found: TeacherIdentity, url: str) -> None:
    if differing := expected.differing(found):
        raise UserError(
            f"{url} serves another teacher than was expected: it differs in {', '.join(differing)}; serve the same one "
            "there, or begin a new run"
        )


def _parts(tokens: Sequence[int], most_tokens: int, most_sequences: int) -> list[range]:
    """Consecutive sequences of so many tokens, as many as a request may hold and few enough to keep all servers
    busy."""
    parts, first, held = [], 0, 0
    for index, one in enumerate(tokens):
        if index > first and (held + one > most_tokens or index - first == most_sequences):
            parts.append(range(first, index))
            first, held = index, 0
        held += one
    return [*parts, range(first, len(tokens))] if tokens else []


def _part_of(request: TargetsRequest, part: range) -> TargetsRequest:
    chosen = slice(part.start, part.stop)
    return dataclasses.replace(
        request,
        sequences=request.sequences[chosen],
        starts=request.starts[chosen],
        ids=None if request.ids is None else request.ids[chosen],
        seeds=None if request.seeds is None else request.seeds[chosen],
    )


def _as_json(request: Request) -> dict[str, Any]:
    return {
        "prompt_ids": [int(one) for one in request.prompt_ids],
        "prompt_id": request.prompt_id,
        "sample_index": request.sample_index,
        "mode": request.mode,
        "params": dataclasses.asdict(request.params),
    }


def _reason(response: httpx2.Response) -> str:
    """What a server says, on one line."""
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = response.text[:200]
    return " ".join(said.split()) or response.reason_phrase


def _json(response: httpx2.Response, url: str) -> Any:
    try:
        return response.json()
    except ValueError:
        raise UserError(f"{url} answers with something else than JSON; it is no teacher.serve") from None


def _decoded(response: httpx2.Response) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        return decode(response.content)
    except ValueError as error:
        raise UserError(f"{response.url} has answered with no safetensors ({error}); it is no teacher.serve") from None
