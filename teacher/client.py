"""Asks servers of one teacher (`python -m teacher.serve`): balanced, retried, and of one identity throughout.

Every request is a pure function of its content, so that it may be sent again to any server. Each says which teacher it
wants, so that a server which has come back with another refuses it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import httpx2
import numpy as np

from qwen3.errors import UserError
from qwen3.generation.engine import OnProgress, Request
from qwen3.rollout import Rollout, rollouts_from_json
from teacher.identity import TeacherIdentity, check_same
from teacher.limits import Limits
from teacher.servers import Servers, json_of
from teacher.wire import CONTENT_TYPE, TEACHER_HEADER, Answer, TargetsRequest, decode, encode_request

_AFTER_DEADLINE_SECONDS = 60.0
"""A server has given up on a request by its deadline; one that is silent beyond it is not there."""
_PART_TOKENS = 8_192
"""Tokens of one request, so that several servers share what is asked at once."""
_PARTS_AT_ONCE = 4
"""Requests under way, of each server, at least."""
_PROGRAM = "teacher.serve"
_REFUSALS = {
    408: "has given up ({reason}); start it with a larger --deadline-seconds, or ask for less",
    409: "serves another teacher than the one that was asked before ({reason}); serve that one again, or begin a new "
    "run",
}


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
        self._servers = Servers(urls, outage_seconds=outage_seconds)
        self._servers.refusals = _REFUSALS
        models = {}
        for server in self._servers.each:
            raw = json_of(self._servers.answered("GET", "/v1/models", only=server), _PROGRAM)
            try:
                models[server.url] = raw["data"][0]
                identity = TeacherIdentity.from_json(models[server.url]["identity"])
            except (KeyError, IndexError, TypeError):
                raise UserError(
                    f"{server.url} is no teacher.serve: it says nothing of its identity; start one there with "
                    "python -m teacher.serve --model DIR, or say in teacher.server which other program serves there"
                ) from None
            expected = expected or identity
            check_same(expected, identity, server.url)
        assert expected is not None
        self.identity = expected
        self._servers.headers = {TEACHER_HEADER: expected.digest}
        self.vocab_size = int(next(iter(models.values()))["vocab_size"])
        all_limits = [dataclasses.asdict(Limits.from_json(model["limits"])) for model in models.values()]
        self.limits = Limits(**{name: min(one[name] for one in all_limits) for name in all_limits[0]})
        longest = max(one["deadline_seconds"] for one in all_limits)
        self._servers.read_seconds = longest + _AFTER_DEADLINE_SECONDS
        # As many as fill a server's slots, where a part holds few of the longest sequences.
        generated = self.limits.max_request_tokens // (self.limits.max_prompt_tokens + self.limits.max_new_tokens)
        self._servers.start(max(_PARTS_AT_ONCE, -(-self.limits.generation_batch_size // generated)))

    def check(self, asked: Iterable[tuple[str, int, str]]) -> None:
        """Refuses, naming the server's option, what the servers would refuse once a stage comes to it: field, how much
        it needs, and of which limit."""
        for field, needed, limit in asked:
            most = getattr(self.limits, limit)
            if needed > most:
                option = f"--{limit.replace('_', '-')}"
                raise UserError(
                    f"{field} needs {needed}, but the teacher's server takes {most}; start it with {option} {needed}, "
                    "or lower the field"
                )

    def targets(self, request: TargetsRequest) -> list[Answer]:
        """What the teacher says about each sequence, as `teacher.wire` lists it; split over servers as need be."""
        most = min(_PART_TOKENS, self.limits.max_request_tokens)
        parts = _parts([len(sequence) for sequence in request.sequences], most, self.limits.max_request_sequences)
        if len(parts) == 1:
            return self._scored(request)
        found = self._servers.map(lambda part: self._scored(_part_of(request, part)), parts)
        return [answer for answers in found for answer in answers]

    @functools.cached_property
    def head(self) -> np.ndarray:
        """The output matrix [V, D], in the dtype that the teacher computes in; fetched once."""
        response = self._servers.answered("GET", "/v1/head")
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
        for rollouts in self._servers.map(
            lambda part: self._generated(requests[part.start : part.stop], seed, step), parts
        ):
            found += rollouts
            if on_progress is not None:
                on_progress(len(rollouts), sum(len(rollout.response) for rollout in rollouts))
        return found

    def close(self) -> None:
        """Ends what is asked, answered or not."""
        self._servers.close()

    def _scored(self, request: TargetsRequest) -> list[Answer]:
        arrays, _ = _decoded(self._servers.answered("POST", "/v1/targets", encode_request(request), CONTENT_TYPE))
        ends = np.cumsum(request.rows)[:-1]
        split = {name: np.split(array, ends) for name, array in arrays.items()}
        return [{name: parts[index] for name, parts in split.items()} for index in range(len(request.sequences))]

    def _generated(self, requests: Sequence[Request], seed: int, step: int) -> list[Rollout]:
        body = {"seed": seed, "step": step, "requests": [_as_json(request) for request in requests]}
        response = self._servers.answered("POST", "/v1/rollouts", json.dumps(body).encode(), "application/json")
        return rollouts_from_json(json_of(response, _PROGRAM))


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


def _decoded(response: httpx2.Response) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        return decode(response.content)
    except ValueError as error:
        raise UserError(f"{response.url} has answered with no safetensors ({error}); it is no teacher.serve") from None
