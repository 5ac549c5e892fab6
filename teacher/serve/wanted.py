"""What is wanted of a prompt, whichever endpoint it came through: checked, and said in the words of the two queues."""

import dataclasses
import hashlib
import secrets
from collections.abc import Sequence

import numpy as np

from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import NON_THINKING, Mode
from teacher.limits import Limits
from teacher.serve.schemas import check_ids, check_length
from teacher.serve.text import Spelling
from teacher.wire import Refused, TargetsRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """One prompt. Fields that begin with `name_` say how the client calls what may be wrong with it."""

    prompt: list[int]
    spelling: Spelling
    params: SamplingParams | None = None
    """How to go on from it; None where nothing is generated."""
    count: int = 1
    """Choices."""
    seed: int | None = None
    """With the prompt and the choice it decides what is sampled; None for chance."""
    mode: Mode = NON_THINKING
    logprobs: int | None = None
    """Likeliest tokens at every generated position; None where not even the token's own log-probability is wanted."""
    prompt_logprobs: int | None = None
    """The same at every position of the prompt."""
    prompt_start: int = 0
    """The position of the prompt at which `prompt_logprobs` begin, with the token after it."""
    named: Sequence[Sequence[int]] | None = None
    """Ids at every position of the prompt from `named_start` on but for its last, -1 for none."""
    named_start: int = 0
    named_behind: Sequence[int] = ()
    """Ids in the place of every generated token, which are scored once they are there."""
    temperature: float = 1.0
    """Of `params`, and where nothing is generated all the same: a prompt's scores know no other than 1."""
    name_prompt: str = "prompt"
    name_prompt_logprobs: str = "prompt_logprobs"
    name_logprobs: str = "logprobs"
    name_temperature: str = "temperature"
    name_named: str = "prompt_logprob_token_ids"

    @property
    def new_tokens(self) -> int:
        """Most of each choice."""
        return 0 if self.params is None else self.params.max_new_tokens

    @property
    def tokens(self) -> int:
        """Most that it takes through the model."""
        return self.count * (len(self.prompt) + self.new_tokens)

    @property
    def is_scored(self) -> bool:
        return self.prompt_logprobs is not None or self.named is not None

    @property
    def samples_where_it_scores(self) -> bool:
        """Whether one token is generated only since the client's servers know no fewer, beside a prompt's scores: such
        prompts may be longer than those that are generated from, and the token comes from the scoring program."""
        params = self.params
        if params is None or not self.is_scored:
            return False
        whole = params.temperature == 1 and params.top_p == 1 and not params.top_k and not params.min_p
        known = params.greedy or (whole and self.logprobs is None)
        return known and params.max_new_tokens == self.count == 1

    def check(self, limits: Limits, vocab_size: int) -> None:
        """Refuses, in the client's own words, what this server does not do; what is cheap to see comes first."""
        generated = self.params is not None and not self.samples_where_it_scores
        check_length(self.name_prompt, self.prompt, limits.max_prompt_tokens if generated else None)
        # The last token decides no row.
        behind = len(self.prompt) + self.new_tokens - 1 if self.named_behind else 0
        scored = max(len(self.prompt) if self.is_scored else 0, behind)
        if scored > limits.max_sequence_tokens:
            follows = " with what may follow" if scored == behind else ""
            raise Refused(
                self.name_prompt,
                f"has {scored} tokens{follows}; this server scores at most {limits.max_sequence_tokens} "
                "(max_sequence_tokens)",
                413,
            )
        if self.is_scored and self.temperature not in (0, 1):
            raise Refused(
                self.name_temperature,
                f"is {self.temperature}, but log-probabilities of a prompt are the teacher's own, at temperature 1; "
                "ask with 1 (or 0, the likeliest token) and divide what you compare them with by no other",
            )
        most = min(limits.max_top_k, vocab_size)
        for field, wanted in (
            (self.name_prompt_logprobs, self.prompt_logprobs),
            (self.name_logprobs, self.logprobs),
        ):
            if (wanted or 0) > most:
                raise Refused(field, f"is {wanted}; this server gives at most {most} (max_top_k)", 413)
        rows = [*(self.named or ()), self.named_behind]
        for row in rows:
            if len(row) > limits.max_ids:
                raise Refused(
                    self.name_named,
                    f"has {len(row)} ids in a row; this server takes at most {limits.max_ids} (max_ids)",
                    413,
                )
        check_ids(self.name_prompt, self.prompt, vocab_size)
        for row in rows:
            check_ids(self.name_named, row, vocab_size, least=-1)

    def requests(self) -> list[Request]:
        """What the engine is asked; its own seed is one for all."""
        if self.params is None or self.samples_where_it_scores:
            return []
        name = self.sampling_name
        return [
            Request(prompt_ids=self.prompt, prompt_id=name, sample_index=index, mode=self.mode, params=self.params)
            for index in range(self.count)
        ]

    @property
    def sampling_name(self) -> str:
        """What decides what is sampled: prompt and seed, or chance without one."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return hashlib.blake2b(repr((seed, self.prompt)).encode(), digest_size=16).hexdigest()

    def one_token(self) -> TargetsRequest | None:
        """What gives the one token of `samples_where_it_scores`."""
        if self.params is None or not self.samples_where_it_scores:
            return None
        ids = np.asarray(self.prompt, np.int32)
        starts = [len(ids) - 1]
        if self.params.greedy:
            return TargetsRequest(targets="top_k", sequences=[ids], starts=starts, entries=max(1, self.logprobs or 0))
        seeds = [int(self.sampling_name[:8], 16)]
        return TargetsRequest(targets="sampled", sequences=[ids], starts=starts, entries=1, seeds=seeds)

    def top(self, vocab_size: int) -> TargetsRequest | None:
        """What gives `prompt_logprobs`: a row for every position from `prompt_start` on."""
        if self.prompt_logprobs is None:
            return None
        ids = np.asarray(self.prompt, np.int32)
        entries = min(max(1, self.prompt_logprobs), vocab_size)
        return TargetsRequest(targets="top_k", sequences=[ids], starts=[self.prompt_start], entries=entries)

    def at_named(self) -> TargetsRequest | None:
        """What gives the log-probabilities of `named`; short rows are filled up with -1."""
        if not self.named:
            return None
        width = max(1, *map(len, self.named))
        ids = np.full((len(self.named), width), -1, np.int32)
        for row, found in zip(ids, self.named, strict=True):
            row[: len(found)] = found
        # The last token is what its predecessor's row is about; no row is about what follows it.
        tokens = np.asarray(self.prompt[:-1], np.int32)
        return TargetsRequest(targets="at_ids", sequences=[tokens], starts=[self.named_start], entries=width, ids=[ids])


def check_together(wanted: Sequence[Wanted], limits: Limits, vocab_size: int) -> None:
    """Refuses a request of these prompts where one of them, or all of them together, are not served."""
    check_sequences(wanted[0].name_prompt, sum(one.count for one in wanted), limits)
    check_tokens(wanted[0].name_prompt, sum(one.tokens for one in wanted), limits)
    for one in wanted:
        one.check(limits, vocab_size)


def check_sequences(field: str, sequences: int, limits: Limits) -> None:
    """Refuses more sequences, prompts and choices of each, than one request may have."""
    if sequences > limits.max_request_sequences:
        raise Refused(
            field,
            f"and n ask for {sequences} sequences; this server takes at most {limits.max_request_sequences} "
            "(max_request_sequences)",
            413,
        )


def check_text(field: str, text: str, longest_token: int, limits: Limits) -> None:
    """Refuses a text that has too many tokens however long they are, before it is tokenised."""
    most = longest_token * max(limits.max_sequence_tokens, limits.max_prompt_tokens)
    if len(text) > most:
        raise Refused(
            field,
            f"has {len(text)} characters; what this server takes has at most {most} (max_sequence_tokens, "
            "max_prompt_tokens)",
            413,
        )


def check_tokens(field: str, tokens: int, limits: Limits) -> None:
    """Refuses more tokens, prompts and what may follow them, than one request may have."""
    if tokens > limits.max_request_tokens:
        raise Refused(
            field,
            f"and what follows may have {tokens} tokens; this server takes at most {limits.max_request_tokens} in one "
            "request (max_request_tokens)",
            413,
        )
