"""`POST /generate`, as SGLang 0.5.23 has it and slime and miles ask it."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct, field
from starlette.responses import Response

from qwen3.field_types import MOST
from teacher.serve import openai
from teacher.serve.answering import Answering, Choice
from teacher.serve.calls import Call
from teacher.serve.logprobs import finite, prompt_tokens
from teacher.serve.openai_schemas import ID_LISTS, Ids, Nothing
from teacher.serve.schemas import (
    Choices,
    MinP,
    Name,
    Natural,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    read,
    sampling_params,
)
from teacher.serve.service import Service
from teacher.serve.text import Spelling
from teacher.serve.wanted import Wanted, check_sequences, check_text
from teacher.wire import Answer, Refused, TargetsRequest

_NEW_TOKENS = 128
Entry = tuple[float | None, int, str | None]
"""SGLang's: log-probability, id, text; the first token of a prompt has no log-probability."""


class SglangSampling(Struct, forbid_unknown_fields=True, kw_only=True):
    """`sampling_params` of SGLang."""

    max_new_tokens: Annotated[
        Natural | None, Meta(description="0 for the prompt's scores alone; default 128, or the most that is served.")
    ] = None
    n: Choices = 1
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[TopK, Meta(description="-1 for all tokens.")] = -1
    min_p: MinP = 0.0
    stop: Stop | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: Annotated[bool, Meta(description="Keep in the text what has ended it.")] = False
    sampling_seed: Annotated[Seed | None, Meta(description="With the prompt it decides what is sampled.")] = None
    # What follows is not served; these are the values that say so.
    spaces_between_special_tokens: Literal[True] = True
    min_new_tokens: Literal[0] = 0
    repetition_penalty: Annotated[float, Meta(ge=1, le=1)] = 1.0
    frequency_penalty: Annotated[float, Meta(ge=0, le=0)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=0, le=0)] = 0.0
    json_schema: None = None
    regex: None = None
    ebnf: None = None
    structural_tag: None = None
    stop_regex: None = None
    logit_bias: Nothing | None = None
    custom_params: None = None


class SglangGenerate(Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /generate` of SGLang: goes on from texts or token ids, and scores them."""

    text: Annotated[str | Annotated[list[str], Meta(min_length=1)] | None, Meta(description="One prompt or many.")] = (
        None
    )
    input_ids: Annotated[
        Annotated[list[Any], Meta(min_length=1, extra_json_schema=ID_LISTS)] | None,
        Meta(description="Token ids of one prompt, or of many."),
    ] = None
    sampling_params: SglangSampling = field(default_factory=SglangSampling)
    return_logprob: Annotated[bool | None, Meta(description="Log-probabilities of prompt and answer.")] = False
    logprob_start_len: Annotated[
        Annotated[int, Meta(ge=-1, le=MOST)] | None,
        Meta(description="The prompt's token with which they begin; -1 for its last."),
    ] = -1
    top_logprobs_num: Annotated[Natural | None, Meta(description="Likeliest tokens beside each.")] = 0
    token_ids_logprob: Annotated[Ids | None, Meta(description="Ids whose log-probabilities stand beside each.")] = None
    return_text_in_logprobs: bool = False
    rid: Annotated[Name | None, Meta(description="The answer's id.")] = None
    stream: Annotated[
        bool | None, Meta(description="Server-sent events, each with all of a choice that there is by then.")
    ] = False
    # What follows is not served; these are the values that say so.
    input_embeds: None = None
    image_data: None = None
    video_data: None = None
    audio_data: None = None
    lora_path: None = None
    return_hidden_states: Literal[False] | None = False
    return_routed_experts: Literal[False] | None = False
    return_flat_raw_top_logprobs: Literal[False] | None = False
    return_flat_raw_top_logprobs_b64: Literal[False] | None = False
    custom_logit_processor: None = None
    session_params: None = None


async def generate(call: Call) -> Response:
    """Answers a call."""
    started = time.monotonic()
    asked = await asyncio.to_thread(read, await call.body(), SglangGenerate)
    wanted, many = await asyncio.to_thread(_wanted, asked, call.service)
    answering = await Answering.begin(call, wanted)
    many = many or asked.sampling_params.n > 1
    scores = await answering.scores()

    def told(choice: Choice, at_named: Answer | None = None) -> dict[str, Any]:
        top, before = scores[choice.place // choice.wanted.count]
        meta = _meta(asked, call.service, choice, top, before, at_named)
        if choice.ended:
            meta["e2e_latency"] = time.monotonic() - started
        return {"text": choice.text, "output_ids": [token.id for token in choice.tokens], "meta_info": meta}

    async def events() -> AsyncIterator[dict[str, Any]]:
        """Of each choice, whenever there is more of it, all that there is: SGLang's events are not the differences."""

        def event(choice: Choice) -> dict[str, Any]:
            return told(choice) | ({"index": choice.place} if many else {})

        for choice in answering.choices:
            if choice.ended:
                yield event(choice)
        async for pieces in answering.batches():
            for place in dict.fromkeys(piece.choice for piece in pieces):
                yield await asyncio.to_thread(event, answering.choices[place])

    if asked.stream:
        return openai.stream(events())
    await answering.finish()
    named = [await answering.scored(_named_behind(choice)) for choice in answering.choices]

    def answer() -> Response:
        made = [told(choice, at_named) for choice, at_named in zip(answering.choices, named, strict=True)]
        return openai.json_response(made if many else made[0])

    return await asyncio.to_thread(answer)


def _wanted(asked: SglangGenerate, service: Service) -> tuple[list[Wanted], bool]:
    """What is wanted of every prompt, and whether a list was sent."""
    prompts, many, name_prompt = _prompts(asked, service)
    sampling = asked.sampling_params
    new_tokens = sampling.max_new_tokens
    if new_tokens is None:
        new_tokens = min(_NEW_TOKENS, service.limits.max_new_tokens)
    scored = bool(asked.return_logprob)
    if scored and sampling.temperature not in (0, 1):
        raise Refused(
            "sampling_params.temperature",
            f"is {sampling.temperature}, by which SGLang would divide before it takes log-probabilities; here they are "
            "the teacher's own, at temperature 1: ask with 1 (or 0, the likeliest token)",
        )
    for name in ("top_logprobs_num", "token_ids_logprob"):
        if getattr(asked, name) and not scored:
            raise Refused(name, "are beside the token's own; ask with return_logprob")
    if asked.stream and asked.token_ids_logprob:
        raise Refused("token_ids_logprob", "are not in streams; ask without stream")
    values = {
        "max_new_tokens": max(1, new_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(0, sampling.top_k),
        "min_p": sampling.min_p,
        "stop_ids": openai.all_stop_ids(sampling.ignore_eos, sampling.stop_token_ids or (), service),
    }
    names = {"stop_ids": "stop_token_ids"}
    params = sampling_params("sampling_params.", values, service.limits, service.vocab_size, **names)
    spelling = Spelling(
        tokenizer=service.tokenizer,
        stop=[sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or [],
        keep_stop=sampling.no_stop_trim,
        skip_special_tokens=sampling.skip_special_tokens,
    )
    ids, top = asked.token_ids_logprob or [], asked.top_logprobs_num or 0
    wanted = []
    for prompt in prompts:
        start = _start(asked, prompt)
        rows = len(prompt) - 1 - start
        wanted.append(
            Wanted(
                prompt=prompt,
                spelling=spelling,
                params=params if new_tokens else None,
                count=sampling.n,
                seed=sampling.sampling_seed,
                logprobs=top if scored and new_tokens else None,
                prompt_logprobs=top if scored and rows > 0 else None,
                prompt_start=max(0, start),
                named=[ids] * rows if scored and ids and rows > 0 else None,
                named_start=max(0, start),
                named_behind=ids if scored and new_tokens else (),
                temperature=sampling.temperature,
                name_prompt=name_prompt,
                name_prompt_logprobs="top_logprobs_num",
                name_logprobs="top_logprobs_num",
                name_temperature="sampling_params.temperature",
                name_named="token_ids_logprob",
            )
        )
    return wanted, many


def _prompts(asked: SglangGenerate, service: Service) -> tuple[list[list[int]], bool, str]:
    if (asked.text is None) == (asked.input_ids is None):
        raise Refused("input_ids", "or text: send one of the two")
    if asked.text is not None:
        texts = [asked.text] if isinstance(asked.text, str) else asked.text
        check_sequences("text", len(texts), service.limits)
        for text in texts:
            check_text("text", text, service.tokenizer.longest_token, service.limits)
        ids = [service.tokenizer.encode(text, add_special_tokens=True) for text in texts]
        return ids, isinstance(asked.text, list), "text"
    found: Any = asked.input_ids
    many = not all(type(one) is int for one in found)
    prompts = found if many else [found]
    if not all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in prompts):
        raise Refused("input_ids", "must be token ids, or a list of lists of them")
    return prompts, many, "input_ids"


def _start(asked: SglangGenerate, prompt: Sequence[int]) -> int:
    """The prompt's token with which its log-probabilities begin."""
    start = -1 if asked.logprob_start_len is None else asked.logprob_start_len
    if start >= len(prompt):
        raise Refused(
            "logprob_start_len", f"is {start}, but the prompt has {len(prompt)} tokens; it must be below that"
        )
    return len(prompt) - 1 if start < 0 else start


def _named_behind(choice: Choice) -> TargetsRequest | None:
    """What gives the log-probabilities of `token_ids_logprob` in the places of a choice's tokens."""
    ids, prompt = choice.wanted.named_behind, choice.wanted.prompt
    if not ids or not choice.tokens:
        return None
    # The last token decides no row.
    tokens = np.asarray([*prompt, *(token.id for token in choice.tokens[:-1])], np.int32)
    rows = np.tile(np.asarray(ids, np.int32), (len(choice.tokens), 1))
    return TargetsRequest(targets="at_ids", sequences=[tokens], starts=[len(prompt) - 1], entries=len(ids), ids=[rows])


def _meta(
    asked: SglangGenerate,
    service: Service,
    choice: Choice,
    top: Answer | None,
    before: Answer | None,
    behind: Answer | None,
) -> dict[str, Any]:
    """`meta_info`. `before` and `behind` are about `token_ids_logprob` in the prompt and in the answer."""
    prompt, tokens = choice.wanted.prompt, choice.tokens
    meta: dict[str, Any] = {
        "id": asked.rid or uuid.uuid4().hex,
        "finish_reason": _finish_reason(choice),
        "prompt_tokens": len(prompt),
        "completion_tokens": len(tokens),
        "cached_tokens": 0,
        "weight_version": service.identity.digest,
    }
    if not asked.return_logprob:
        return meta

    def entry(logprob: float | None, one: int) -> Entry:
        text = service.tokenizer.decode([one]) if asked.return_text_in_logprobs else None
        return (None if logprob is None else finite(logprob), one, text)

    start, k = _start(asked, prompt), asked.top_logprobs_num or 0
    own = [] if top is None else prompt_tokens(prompt[start:], top, k)
    meta["input_token_logprobs"] = [entry(None, prompt[start]), *(entry(one.logprob, one.id) for one in own)]
    meta["output_token_logprobs"] = [entry(one.logprob, one.id) for one in tokens]
    if k:
        named = [[entry(logprob, one) for one, logprob in token.top] for token in (*own, *tokens)]
        meta["input_top_logprobs"] = [None, *named[: len(own)]]
        meta["output_top_logprobs"] = named[len(own) :]
    if ids := asked.token_ids_logprob:
        meta["input_token_ids_logprobs"] = [None, *_at_ids(ids, before, entry)]
        meta["output_token_ids_logprobs"] = _at_ids(ids, behind, entry)
    return meta


def _at_ids(ids: Sequence[int], answer: Answer | None, entry: Any) -> list[list[Entry]]:
    """At repetitions of an id too, which the answer has once."""
    if answer is None:
        return []
    first = [ids.index(one) for one in ids]
    return [
        [entry(row[column], one) for column, one in zip(first, ids, strict=True)] for row in answer["logprobs"].tolist()
    ]


def _finish_reason(choice: Choice) -> dict[str, Any] | None:
    if not choice.ended:
        return None
    if choice.finish_reason == "length":
        return {"type": "length", "length": len(choice.tokens)}
    matched = choice.stop_reason if choice.stop_reason is not None else choice.tokens[-1].id
    return {"type": "stop", "matched": matched}
