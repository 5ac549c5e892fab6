"""`POST /v1/completions`, as OpenAI and vLLM 0.33 have it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from teacher.serve import openai
from teacher.serve.answering import Answering, Choice, Piece
from teacher.serve.calls import Call
from teacher.serve.logprobs import Spell, completion_logprobs, prompt_logprobs, prompt_tokens, token_speller
from teacher.serve.openai_schemas import CompletionRequest
from teacher.serve.schemas import read
from teacher.serve.service import Service
from teacher.serve.wanted import Wanted, check_sequences, check_text
from teacher.wire import Answer, Refused


async def completions(call: Call) -> Response:
    """Answers a call."""
    asked = await asyncio.to_thread(read, await call.body(), CompletionRequest)
    wanted, sent = await asyncio.to_thread(_wanted, asked, call.service)
    answering = await Answering.begin(call, wanted)
    texts = await asyncio.to_thread(_echoed, asked, wanted, sent)
    answer = _Completions(asked, call.service, wanted, texts, answering)
    answer.scores = await answering.scores()
    if asked.stream:
        return openai.stream(answer.events())
    await answering.finish()
    return await asyncio.to_thread(lambda: openai.json_response(answer.whole()))


def _wanted(asked: CompletionRequest, service: Service) -> tuple[list[Wanted], list[str | None]]:
    """What is wanted of every prompt, and its text where that is what was sent."""
    openai.check_model(asked.model, service)
    openai.check_stream(asked)
    new_tokens = 16 if asked.max_tokens is None else asked.max_tokens
    params = openai.sampled(asked, new_tokens, "max_tokens", service)
    spelling = openai.spelled(asked, service)
    logprobs = _logprobs(asked)
    of_echo = logprobs if asked.echo else None
    both = [count for count in (asked.prompt_logprobs, of_echo) if count is not None]
    wanted, sent = [], []
    for prompt, text in _prompts(asked, service):
        sent.append(text)
        wanted.append(
            Wanted(
                prompt=prompt,
                spelling=spelling,
                params=params,
                count=asked.n or 1,
                seed=asked.seed,
                temperature=openai.temperature(asked),
                logprobs=logprobs if new_tokens else None,
                prompt_logprobs=max(both, default=None),
                name_prompt_logprobs="logprobs" if asked.prompt_logprobs is None else "prompt_logprobs",
            )
        )
    return wanted, sent


def _echoed(asked: CompletionRequest, wanted: list[Wanted], sent: list[str | None]) -> list[str]:
    """The text of every prompt where `echo` wants it, made of ids where those were sent."""
    if not asked.echo:
        return [""] * len(wanted)
    both = zip(wanted, sent, strict=True)
    return [one.spelling.decode(one.prompt) if text is None else text for one, text in both]


def _prompts(asked: CompletionRequest, service: Service) -> list[tuple[list[int], str | None]]:
    """Ids of every prompt, and its text where that is what was sent."""
    prompt: Any = asked.prompt
    if isinstance(prompt, str) or all(type(one) is int for one in prompt):
        prompt = [prompt]
    check_sequences("prompt", len(prompt), service.limits)
    if all(isinstance(one, str) for one in prompt):
        special = asked.add_special_tokens
        for text in prompt:
            check_text("prompt", text, service.tokenizer.longest_token, service.limits)
        return [(service.tokenizer.encode(text, add_special_tokens=special), text) for text in prompt]
    if all(isinstance(one, list) and all(type(token) is int for token in one) for one in prompt):
        return [(ids, None) for ids in prompt]
    raise Refused("prompt", "must be a text, a list of texts, token ids, or a list of lists of token ids")


def _logprobs(asked: CompletionRequest) -> int | None:
    """As a number, of which vLLM takes true for 1."""
    return None if asked.logprobs is None else int(asked.logprobs)


class _Completions:
    """The answer, whole or in events."""

    def __init__(
        self,
        asked: CompletionRequest,
        service: Service,
        wanted: list[Wanted],
        texts: list[str],
        answering: Answering,
    ):
        self._asked, self._wanted, self._texts, self._answering = asked, wanted, texts, answering
        self._logprobs = _logprobs(asked)
        self._frame = openai.frame("text_completion", "cmpl", asked, service)
        decode = service.tokenizer.decode
        self._by_text: Spell = token_speller(decode, by_id=False)
        self._spell: Spell = token_speller(decode, by_id=bool(asked.return_tokens_as_token_ids))
        self.scores: list[tuple[Answer | None, Answer | None]] = []

    def whole(self) -> dict[str, Any]:
        """The answer of a call without stream."""
        choices = [self._choice(choice) for choice in self._answering.choices]
        return {**self._frame, "choices": choices, "usage": openai.usage(self._wanted, self._answering.choices)}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Its stream."""
        offsets = []
        for choice in self._answering.choices:
            echoed = self._echo(choice)
            offsets.append(sum(map(len, (echoed["logprobs"] or {}).get("tokens", ()))))
            if self._asked.return_token_ids:
                echoed |= {"prompt_token_ids": choice.wanted.prompt, "token_ids": []}
            if self._asked.echo or self._asked.return_token_ids or choice.finish_reason is not None:
                yield self._event(choice.place, echoed | {"finish_reason": choice.finish_reason, "stop_reason": None})
        async for piece in self._answering.pieces():
            told = self._piece(piece, offsets[piece.choice])
            offsets[piece.choice] += sum(map(len, (told["logprobs"] or {}).get("tokens", ())))
            if piece.text or piece.finish_reason or self._asked.return_token_ids or self._logprobs is not None:
                yield self._event(piece.choice, told)
        options = self._asked.stream_options
        if options is not None and options.include_usage:
            yield {**self._frame, "choices": [], "usage": openai.usage(self._wanted, self._answering.choices)}

    def _event(self, index: int, told: dict[str, Any]) -> dict[str, Any]:
        return {**self._frame, "choices": [{"index": index, **told}]}

    def _piece(self, piece: Piece, offset: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        k = self._logprobs
        if k is not None:
            found["logprobs"] = completion_logprobs((), piece.tokens, self._spell, offset=offset, k=k)
        if self._asked.return_token_ids:
            found["token_ids"] = [token.id for token in piece.tokens]
        return found

    def _echo(self, choice: Choice) -> dict[str, Any]:
        """The prompt, where it is wanted once more, in the place of generated text."""
        if not self._asked.echo:
            return {"text": "", "logprobs": None}
        k, logprobs = self._logprobs, None
        if k is not None:
            ids, tokens = choice.wanted.prompt, self._prompt_tokens(choice, k)
            logprobs = completion_logprobs(ids[:1], tokens, self._spell, offset=0, k=k)
        return {"text": self._texts[self._owner(choice)], "logprobs": logprobs}

    def _prompt_tokens(self, choice: Choice, k: int) -> list[Any]:
        top, _ = self.scores[self._owner(choice)]
        assert top is not None
        return prompt_tokens(choice.wanted.prompt, top, k)

    def _owner(self, choice: Choice) -> int:
        return choice.place // (self._asked.n or 1)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        asked, ids = self._asked, choice.wanted.prompt
        found: dict[str, Any] = {
            "index": choice.place,
            "text": self._echo(choice)["text"] + choice.text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "prompt_logprobs": None,
        }
        if self._logprobs is not None:
            k = self._logprobs
            before = self._prompt_tokens(choice, k) if asked.echo else []
            first = ids[:1] if asked.echo else ()
            found["logprobs"] = completion_logprobs(first, [*before, *choice.tokens], self._spell, offset=0, k=k)
        if asked.prompt_logprobs is not None:
            top, _ = self.scores[self._owner(choice)]
            assert top is not None
            found["prompt_logprobs"] = prompt_logprobs(ids, top, asked.prompt_logprobs, self._by_text)
        if asked.return_token_ids:
            found |= {"prompt_token_ids": ids, "token_ids": [token.id for token in choice.tokens]}
        return found
