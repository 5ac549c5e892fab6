"""Asks servers of vLLM or SGLang by token ids: one sequence a request, which such servers batch by themselves.

They give log-probabilities and no tail, which is what is left of 1; no hash of weights, so that names stand for them;
and no hidden states.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import httpx2
import numpy as np
from jaxtyping import Float32, Int32

from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.tokenizer import TURN_END, TURN_START
from qwen3.chat.turns import THINK_END, THINK_START
from qwen3.errors import UserError
from qwen3.generation.engine import OnProgress, Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import THINKING, Rollout
from teacher.dialects import DIALECTS, About, Asked, Program, Said, Written
from teacher.identity import StatedIdentity, check_same, tokenizer_hashes
from teacher.scored_rollout import empty_targets
from teacher.servers import Server, ServerRefusal, Servers, json_of
from teacher.wire import Answer, TargetsRequest

_AT_ONCE = 64
"""Requests under way, of each server."""
_LONGEST_ANSWER_SECONDS = 3_600.0
"""After which a server that is silent is not there: it says nothing before a sequence is whole."""
_LEAST_TAIL = 2.0**-24
"""Of mass; what float32 tells from nothing beside 1. A tail of nothing would make a reverse divergence infinite."""
_MOST_MASS = 1.001
"""Of tokens that are named; float32 sums of a vocabulary leave less above 1."""
_PROBE_TEXT = "What is 17 + 25?\n\ndef f(x): return x ** 2  # 漢字, naïve"
_PROBE_TOKENS, _PROBE_TEMPERATURE, _PROBE_TOP_K = 32, 2.0, 2
_LEAST_NATS = 0.1
"""Between log-probabilities at two temperatures; less is no more than two programs' rounding."""
_AT_IDS_NATS = 0.05
"""Between two ways of one server to say the same."""
_NO_TOKENIZE = (400, 404, 405, 501)
"""What servers say that have no /tokenize, or none for this teacher."""
_JSON = "application/json"
Answered = TypeVar("Answered", Said, Written)


class TokenClient:
    """One teacher, behind one server or several alike, with what `teacher.client.TeacherClient` has.

    Attributes:
        identity: What the servers say of the teacher.
        vocab_size: Of the teacher; answers name no other tokens.
        longest_tokens: Tokens of the longest sequence that all of them score.
        notes: What could not be made sure of, a line each.
    """

    def __init__(
        self,
        server: Program,
        urls: Sequence[str],
        tokenizer: ChatTokenizer,
        *,
        vocab_size: int,
        outage_seconds: float = 600.0,
        expected: StatedIdentity | None = None,
    ):
        """Asks every server who it is, waiting for those that are still loading, and whether its log-probabilities are
        the teacher's own.

        Args:
            server: The program that serves there.
            urls: http://HOST:PORT of each.
            tokenizer: The teacher's; its folder's hashes are part of who the teacher is.
            vocab_size: Rows of the teacher's head.
            outage_seconds: How long a request is tried again while no server answers.
            expected: Who the teacher must be; None for whoever is served.

        The servers' --api-key is the environment variable TEACHER_TOKEN.
        Raises UserError where a server is not there, serves another teacher, is no such server, or gives other
        log-probabilities than those at temperature 1.
        """
        self._dialect = DIALECTS[server]
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._hashes = tokenizer_hashes(tokenizer.folder)
        self._servers = Servers(urls, outage_seconds=outage_seconds)
        self.notes: list[str] = []
        self.longest_tokens = 2**31
        for one in self._servers.each:
            about = self._about(one)
            identity = self._identity(about)
            expected = expected or identity
            check_same(expected, identity, one.url)
            self.longest_tokens = min(self.longest_tokens, about.longest_tokens)
        assert expected is not None
        self.identity = expected
        self._weights_version = expected.weights_version
        self._servers.on_connection = lambda one: check_same(
            self.identity, self._identity(self._about(one, once=True)), one.url
        )
        self._servers.start(_AT_ONCE)
        self._probe_ids = tokenizer.encode(_PROBE_TEXT, add_special_tokens=True)
        for one in self._servers.each:
            self._check_tokenizer(one)
        # From here on what is asked for takes time.
        self._servers.read_seconds = _LONGEST_ANSWER_SECONDS
        for one in self._servers.each:
            self._check_logprobs(one)

    @property
    def head(self) -> np.ndarray:
        """Raises UserError: there is none."""
        raise UserError(f"{self._dialect.program}'s server gives no output matrix; take python -m teacher.serve")

    def check(self, asked: Iterable[tuple[str, int, str]]) -> None:
        """Refuses what the servers would refuse once a stage comes to it: field, how much it needs, and of which of
        `teacher.limits.Limits`. What they do not say of themselves is tried."""
        dialect, most = self._dialect, {"max_top_k": 0, "max_ids": 0}
        fields: dict[str, str] = {}
        for field, needed, limit in asked:
            if limit == "max_sequence_tokens" and needed > self.longest_tokens:
                raise UserError(
                    f"{field} needs {needed} tokens, but {dialect.program}'s server scores {self.longest_tokens}; "
                    f"start it with {dialect.longer(needed)}, or lower the field"
                )
            if needed > most.get(limit, needed):
                most[limit], fields[limit] = needed, field
        if not fields or dialect.entries_option is None:
            return
        for one in self._servers.each:
            try:
                self._try_entries(most["max_top_k"], most["max_ids"], one)
            except ServerRefusal as refusal:
                if refusal.status != 400 or not self._takes_fewer(most["max_top_k"], most["max_ids"], one):
                    raise
                raise UserError(
                    f"{' and '.join(fields.values())} need {max(most.values())} tokens a position: {refusal}; start it "
                    f"with {dialect.entries_option} {max(most.values())}, or lower the field"
                ) from None

    def _try_entries(self, top_k: int, count: int, server: Server) -> None:
        """Asks for so many likeliest tokens, and for so many ids by name at each position, of which the first is the
        token that follows: the server must say the same of it in both ways."""
        tokens, start = self._probe_ids, 1
        following = np.asarray(tokens[start + 1 :], np.int32)
        ids = (following[:, None] + np.arange(count, dtype=np.int32)) % self.vocab_size if count else None
        said = self._said(Asked(tokens, start, top_k, ids), server)
        if said.at_ids is not None and not np.allclose(said.at_ids[:, 0], said.following, rtol=0, atol=_AT_IDS_NATS):
            raise UserError(
                f"{server.url} gives other log-probabilities of tokens that are asked for by name than of the same "
                f"tokens in a prompt; take another version of {self._dialect.program}"
            )

    def _takes_fewer(self, top_k: int, count: int, server: Server) -> bool:
        """Whether the server takes all else of what it has refused."""
        try:
            self._try_entries(min(1, top_k), min(1, count), server)
        except ServerRefusal:
            return False
        return True

    def targets(self, request: TargetsRequest) -> list[Answer]:
        """What the teacher says about each sequence, as `teacher.wire` lists it, but for the token that follows. The
        last position, which no token follows, is as if nothing were known of it. Raises UserError for other targets
        than `Dialect.kinds`."""
        if request.targets not in self._dialect.kinds:
            raise UserError(
                f"{self._dialect.program}'s server gives no targets of kind {request.targets}; it gives "
                f"{', '.join(sorted(self._dialect.kinds))}"
            )
        return list(self._servers.map(lambda index: self._answer(request, index), range(len(request.sequences))))

    def rollouts(
        self, requests: Sequence[Request], *, seed: int, step: int = 0, on_progress: OnProgress | None = None
    ) -> list[Rollout]:
        """What the teacher generates, with stop tokens, thinking budgets and masks as of `Engine.generate`. What is
        sampled depends on seed, step, prompt and sample, as far as the servers keep to a seed.

        `on_progress` is told the tokens of each rollout, in order; what it raises ends the call."""
        found = []
        for rollout in self._servers.map(lambda request: self._rollout(request, seed, step), requests):
            found.append(rollout)
            if on_progress is not None:
                on_progress(1, len(rollout.response))
        return found

    def close(self) -> None:
        """Ends what is asked, answered or not."""
        self._servers.close()

    def _answer(self, request: TargetsRequest, index: int) -> Answer:
        tokens, start = request.sequences[index].tolist(), request.starts[index]
        if request.ids is None:
            said = self._said(Asked(tokens, start, request.entries))
            ids, logprobs = said.top_ids, said.top_logprobs
            last: tuple[Any, ...] = empty_targets(request.entries)
        else:
            wanted = request.ids[index][:-1]
            said = self._said(Asked(tokens, start, request.top_k, wanted))
            assert said.at_ids is not None
            ids = _without_repetitions(np.concatenate((wanted, said.top_ids), axis=1))
            logprobs = np.where(ids < 0, np.float32(-np.inf), np.concatenate((said.at_ids, said.top_logprobs), axis=1))
            last = np.full(ids.shape[1], -1, np.int32), np.full(ids.shape[1], -np.inf, np.float32), np.float32(0)
        rows = ids, logprobs, self._log_tail(logprobs)
        both = zip(("ids", "logprobs", "log_tail"), rows, last, strict=True)
        return {name: np.concatenate((array, np.asarray(end)[None])) for name, array, end in both}

    def _said(self, asked: Asked, only: Server | None = None) -> Said:
        if asked.rows == 0:
            ids = None if asked.ids is None else np.zeros(asked.ids.shape, np.float32)
            top = np.zeros((0, asked.top_k), np.int32)
            return Said(np.zeros(0, np.float32), top, top.astype(np.float32), ids)
        body = self._dialect.scoring(self.identity.model, asked)
        return self._asked(body, lambda content: self._dialect.said(content, asked), only)

    def _log_tail(self, logprobs: Float32[np.ndarray, "R J"]) -> Float32[np.ndarray, "R"]:
        """Logarithm of what is left of 1, in float64. Log-probabilities in float32 leave a rounding, on either side of
        0, of which a floor makes a mass that is too small to matter and a divergence that stays finite."""
        mass = np.exp(logprobs.astype(np.float64)).sum(axis=-1)
        if not (mass <= _MOST_MASS).all():
            raise UserError(
                f"the probabilities that {self._dialect.program}'s server gives at a position add up to "
                f"{mass.max():.4g}: they are no log-probabilities; {self._dialect.raw}"
            )
        return np.log(np.maximum(1 - mass, _LEAST_TAIL)).astype(np.float32)

    def _rollout(self, request: Request, seed: int, step: int) -> Rollout:
        params, tokenizer = request.params, self._tokenizer
        prompt = [int(one) for one in request.prompt_ids]
        stop_ids = tokenizer.eos_ids if params.stop_ids is None else params.stop_ids
        most = params.max_new_tokens
        budget = params.thinking_budget if request.mode == THINKING else None
        open_until = most if budget is None else min(budget, most)
        written = _Growing()
        # A budget ends in text of ours; and there are end tokens that a server does not pass over.
        while len(written.tokens) < most and not written.ends_in(stop_ids):
            if len(written.tokens) >= open_until and not written.chose(tokenizer.think_end_id) and not written.forced:
                written.force(tokenizer.stop_thinking_ids[: most - len(written.tokens)])
                continue
            until = most if len(written.tokens) >= open_until else open_until
            name = f"{seed} {step} {request.prompt_id} {request.sample_index} {len(written.tokens)}"
            written.add(
                self._written([*prompt, *written.tokens], params, until - len(written.tokens), stop_ids, _seed(name))
            )
        tokens = np.asarray([*prompt, *written.tokens], np.int32)
        predicting = slice(len(prompt) - 1, len(tokens) - 1)
        loss_mask, logprobs = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.float32)
        loss_mask[predicting] = written.chosen
        if written.logprobs is None:
            logprobs[predicting] = self._said(Asked(tokens.tolist(), len(prompt) - 1)).following
        else:
            logprobs[predicting] = written.logprobs
        if not np.isfinite(logprobs[loss_mask]).all():
            raise UserError(
                f"{self._dialect.program}'s server gives no log-probability of a token that it has sampled; check the "
                "teacher's weights"
            )
        return Rollout(
            tokens=tokens,
            prompt_length=len(prompt),
            loss_mask=loss_mask,
            sampler_logprobs=np.where(loss_mask, logprobs, np.float32(0)),
            mode=request.mode,
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            policy_step=0,
            finished=written.ends_in(stop_ids),
        )

    def _written(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        most: int,
        stop_ids: Sequence[int],
        seed: int,
        only: Server | None = None,
    ) -> Written:
        body = self._dialect.generating(self.identity.model, prompt, params, most, stop_ids, seed)
        written = self._asked(body, self._dialect.written, only)
        if not 1 <= len(written.tokens) <= most:
            raise UserError(
                f"{self._dialect.program}'s server has generated {len(written.tokens)} tokens behind {len(prompt)} "
                f"where up to {most} were asked for; start it with {self._dialect.longer(len(prompt) + most)}"
            )
        return written

    def _asked(self, body: Mapping[str, Any], read: Callable[[bytes], Answered], only: Server | None) -> Answered:
        """What `read` makes of the answer to `body`."""

        def made(response: httpx2.Response) -> Answered:
            try:
                found = read(response.content)
            except UserError as error:
                raise UserError(f"{response.url}: {error}") from None
            self._check_answer(found, str(response.url))
            return found

        return self._servers.read(made, "POST", self._dialect.path, json.dumps(body).encode(), _JSON, only)

    def _check_answer(self, found: Said | Written, url: str) -> None:
        """Refuses what is not the teacher's: other weights than the first that a server has named, or tokens beyond the
        vocabulary."""
        known = self._weights_version = self._weights_version or found.weights_version
        if found.weights_version not in ("", known):
            raise UserError(
                f"{url} answers with the weights {found.weights_version}, and the teacher was {known}; serve those "
                "again, or begin a new run"
            )
        ids = found.top_ids if isinstance(found, Said) else np.asarray(found.tokens, np.int32)
        if (ids >= self.vocab_size).any():
            raise UserError(
                f"{url} names token {ids.max()}, but the teacher's config.json has vocab_size {self.vocab_size}; name "
                "a folder with the served teacher's config.json and tokenizer"
            )

    def _about(self, server: Server, *, once: bool = False) -> About:
        """What a server says of itself; with `once` NoAnswer is raised where it is away."""

        def get(path: str, *others: str) -> Mapping[str, Any]:
            try:
                response = self._servers.answered("GET", path, only=server, once=once)
            except ServerRefusal as refusal:
                if refusal.status == 404 and others:
                    return get(*others)
                raise
            return json_of(response, self._dialect.program)

        try:
            return self._dialect.about(get)
        except (ServerRefusal, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, ServerRefusal) and error.status != 404:
                raise
            raise UserError(
                f"{server.url} does not say of itself what {self._dialect.program} does; say in teacher.server which "
                "program serves there"
            ) from None

    def _identity(self, about: About) -> StatedIdentity:
        tokenizer, template = self._hashes
        return StatedIdentity(
            server=self._dialect.name,
            version=about.version,
            model=about.model,
            root=about.root,
            weights_version=about.weights_version,
            max_model_len=str(about.max_model_len),
            tokenizer=tokenizer,
            template=template,
        )

    def _check_tokenizer(self, server: Server) -> None:
        """Refuses a server that has other ids for a text."""
        text = _PROBE_TEXT + "".join(_markers(self._tokenizer))
        body = json.dumps({"model": self.identity.model, "prompt": text}).encode()
        try:
            response = self._servers.answered("POST", "/tokenize", body, _JSON, server)
        except ServerRefusal as refusal:
            if refusal.status not in _NO_TOKENIZE:
                raise
            self.notes.append(
                f"{server.url} has no /tokenize: its tokenizer is taken for that of {self._tokenizer.folder}"
            )
            return
        found = json_of(response, self._dialect.program)
        ids = self._tokenizer.encode(text, add_special_tokens=True)
        if not isinstance(found, dict) or found.get("tokens") != ids:
            raise UserError(
                f"{server.url} has other tokens for a text than the tokenizer in {self._tokenizer.folder}; name a "
                "folder with the served teacher's tokenizer"
            )

    def _check_logprobs(self, server: Server) -> None:
        """Refuses a server whose log-probabilities of what it generates are those of what it samples from.

        It samples from the few likeliest tokens at another temperature than 1, of which both kinds are known from what
        it says of the same tokens in a prompt."""
        dialect, probe = self._dialect, self._probe_ids
        params = SamplingParams(max_new_tokens=_PROBE_TOKENS, temperature=_PROBE_TEMPERATURE, top_k=_PROBE_TOP_K)
        try:
            written = self._written(probe, params, _PROBE_TOKENS, (), 0, server)
        except ServerRefusal as refusal:
            if refusal.status == 404:
                raise UserError(f"{server.url} has no {dialect.path}: {dialect.missing}") from None
            raise
        said = self._said(Asked([*probe, *written.tokens], len(probe) - 1, _PROBE_TOP_K), server)
        self._log_tail(said.top_logprobs)
        if written.logprobs is None:
            return
        sampled = said.following / _PROBE_TEMPERATURE
        sampled -= np.log(np.exp(said.top_logprobs / _PROBE_TEMPERATURE).sum(axis=-1))
        between = float(np.mean(np.abs(sampled - said.following)))
        apart = float(np.mean(np.abs(np.asarray(written.logprobs) - said.following)))
        if between < _LEAST_NATS and apart < _LEAST_NATS:
            self.notes.append(
                f"{server.url} is too sure of what it generates to tell whether its log-probabilities are those at "
                f"temperature 1; {dialect.raw}"
            )
        elif not apart < between / 2:
            raise UserError(
                f"{server.url} gives other log-probabilities of what it generates than of the same tokens in a prompt "
                f"(by {apart:.2g} nats at temperature {_PROBE_TEMPERATURE:g}); {dialect.raw}"
            )


def _markers(tokenizer: ChatTokenizer) -> Iterable[str]:
    """Of thinking, turns and ends, those that a tokenizer has."""
    known = set(tokenizer.tokens_by_id().values())
    ends = [tokenizer.decode([one]) for one in tokenizer.eos_ids]
    return [one for one in dict.fromkeys((THINK_START, THINK_END, TURN_START, TURN_END, *ends)) if one in known]


class _Growing:
    """A response as far as it has come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.chosen: list[bool] = []
        self.logprobs: list[float] | None = []
        self.forced = False

    def add(self, written: Written) -> None:
        self.tokens += written.tokens
        self.chosen += [True] * len(written.tokens)
        self.logprobs = (
            None if self.logprobs is None or written.logprobs is None else [*self.logprobs, *written.logprobs]
        )

    def force(self, tokens: Sequence[int]) -> None:
        """Goes on with text that the teacher has not chosen."""
        self.tokens += tokens
        self.chosen += [False] * len(tokens)
        self.logprobs = None if self.logprobs is None else [*self.logprobs, *[0.0] * len(tokens)]
        self.forced = True

    def chose(self, token: int | None) -> bool:
        return any(chosen and one == token for one, chosen in zip(self.tokens, self.chosen, strict=True))

    def ends_in(self, ids: Sequence[int]) -> bool:
        """Whether the teacher has ended it."""
        return bool(self.tokens) and self.chosen[-1] and self.tokens[-1] in ids


def _seed(name: str) -> int:
    """31 bits, which every server takes."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") >> 1


def _without_repetitions(ids: Int32[np.ndarray, "R J"]) -> Int32[np.ndarray, "R J"]:
    """-1 in the place of every repetition of an earlier entry, as `teacher.targets.unique_ids`."""
    order = np.argsort(ids, axis=-1, stable=True)
    ordered = np.take_along_axis(ids, order, axis=-1)
    repeats = np.zeros(ids.shape, bool)
    np.put_along_axis(repeats, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=-1)
    return np.where(repeats, np.int32(-1), ids)
