"""vLLM's token endpoint, `POST /inference/v1/generate`, as prime-rl and others ask it: ids in, ids out.

Fields and their places are those of vLLM 0.33. What a server gives beside them: `prompt_token_id_log_tail`, the
logarithm of the mass of all tokens that `prompt_logprob_token_ids` did not name, and `teacher`, who has answered.
"""

import asyncio
import base64
import io
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct
from starlette.responses import Response

from qwen3.field_types import MOST
from teacher.serve import openai
from teacher.serve.answering import Answering, Choice
from teacher.serve.calls import Call
from teacher.serve.logprobs import finite, prompt_logprobs, token_speller
from teacher.serve.openai_schemas import Ids
from teacher.serve.schemas import Choices, MinP, Name, Natural, Seed, Temperature, TopK, TopP, read, sampling_params
from teacher.serve.service import Service
from teacher.serve.text import Spelling
from teacher.serve.wanted import Wanted
from teacher.wire import Answer, Refused


class VllmSampling(Struct, forbid_unknown_fields=True, kw_only=True):
    """`sampling_params` of vLLM's token endpoint."""

    max_tokens: Annotated[Natural, Meta(description="New tokens; 0 for the prompt's scores alone.")] = 16
    n: Choices = 1
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[TopK, Meta(description="0 or -1 for all tokens.")] = 0
    min_p: MinP = 0.0
    seed: Annotated[Seed | None, Meta(description="With the prompt it decides what is sampled; else chance.")] = None
    stop_token_ids: Annotated[Ids | None, Meta(description="Tokens that end a choice too.")] = None
    ignore_eos: bool = False
    logprobs: Annotated[Natural | None, Meta(description="Likeliest tokens at every generated position.")] = None
    prompt_logprobs: Annotated[Natural | None, Meta(description="The same at every position of the prompt.")] = None
    prompt_logprob_token_ids: Annotated[
        list[list[Annotated[int, Meta(ge=-1, le=MOST)]]] | None,
        Meta(description="Ids at every position from prompt_logprob_start on, -1 for none."),
    ] = None
    prompt_logprob_start: Annotated[Natural, Meta(description="Position of the first row of these ids.")] = 0
    detokenize: Annotated[bool, Meta(description="Texts of tokens in prompt_logprobs.")] = False
    skip_special_tokens: Annotated[bool, Meta(description="Without effect: no text is given.")] = True
    # What follows is not served; these are the values that say so.
    stop: Annotated[list[str], Meta(max_length=0)] | None = None
    bad_words: Annotated[list[str], Meta(max_length=0)] | None = None
    include_stop_str_in_output: Literal[False] = False
    spaces_between_special_tokens: Literal[True] = True
    logit_bias: None = None
    allowed_token_ids: None = None
    structured_outputs: None = None
    extra_args: None = None
    min_tokens: Literal[0] = 0
    repetition_penalty: Annotated[float, Meta(ge=1, le=1)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=0, le=0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=0, le=0)] = 0.0


class VllmGenerate(Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /inference/v1/generate` of vLLM: token ids in, token ids out."""

    token_ids: Annotated[list[Natural], Meta(min_length=1)]
    sampling_params: VllmSampling
    model: Name | None = None
    request_id: Name | None = None
    cache_salt: Annotated[Name | None, Meta(description="Without effect: requests share no text.")] = None
    output_mode: Literal["tokens"] = "tokens"
    return_token_ids: Literal[True] | None = True
    stream: Literal[False] | None = False
    stream_options: None = None
    priority: Literal[0] | None = 0
    features: None = None
    kv_transfer_params: None = None


async def generate(call: Call) -> Response:
    """Answers a call."""
    asked = await asyncio.to_thread(read, await call.body(), VllmGenerate)
    wanted = await asyncio.to_thread(_wanted, asked, call.service)
    answering = await Answering.begin(call, [wanted])
    ((top, named),) = await answering.scores()
    await answering.finish()
    return await asyncio.to_thread(
        lambda: openai.json_response(_answer(asked, call.service, answering.choices, top, named))
    )


def _wanted(asked: VllmGenerate, service: Service) -> Wanted:
    openai.check_model(asked.model, service)
    sampling, prompt = asked.sampling_params, asked.token_ids
    _check_named(sampling, len(prompt))
    values = {
        "max_new_tokens": max(1, sampling.max_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(0, sampling.top_k),
        "min_p": sampling.min_p,
        "stop_ids": openai.all_stop_ids(sampling.ignore_eos, sampling.stop_token_ids or (), service),
    }
    names = {"stop_ids": "stop_token_ids", "max_new_tokens": "max_tokens"}
    params = sampling_params("sampling_params.", values, service.limits, service.vocab_size, **names)
    return Wanted(
        prompt=prompt,
        spelling=Spelling(tokenizer=service.tokenizer),
        params=params if sampling.max_tokens else None,
        count=sampling.n,
        seed=sampling.seed,
        temperature=sampling.temperature,
        logprobs=sampling.logprobs if sampling.max_tokens else None,
        prompt_logprobs=sampling.prompt_logprobs,
        named=sampling.prompt_logprob_token_ids,
        named_start=sampling.prompt_logprob_start,
        name_prompt="token_ids",
        name_prompt_logprobs="sampling_params.prompt_logprobs",
        name_logprobs="sampling_params.logprobs",
        name_temperature="sampling_params.temperature",
        name_named="sampling_params.prompt_logprob_token_ids",
    )


def _check_named(sampling: VllmSampling, length: int) -> None:
    field, named, start = "prompt_logprob_token_ids", sampling.prompt_logprob_token_ids, sampling.prompt_logprob_start
    if named is None:
        if start:
            raise Refused("sampling_params.prompt_logprob_start", f"is of {field}; leave it out, or send them")
        return
    if not start < length - 1:
        raise Refused(
            "sampling_params.prompt_logprob_start",
            f"is {start}, but of {length} tokens none follows position {length - 1}; it must be below that",
        )
    field = f"sampling_params.{field}"
    if len(named) != length - 1 - start:
        raise Refused(field, f"has {len(named)} rows; {length} tokens from {start} on take {length - 1 - start}")
    if not any(named):
        raise Refused(field, "names no token; leave it out")


def _answer(
    asked: VllmGenerate, service: Service, choices: Sequence[Choice], top: Answer | None, named: Answer | None
) -> dict[str, Any]:
    sampling = asked.sampling_params
    found: dict[str, Any] = {
        "request_id": asked.request_id or uuid.uuid4().hex,
        "choices": [_choice(choice, sampling.logprobs) for choice in choices],
        "prompt_logprobs": None,
        "teacher": service.identity.digest,
    }
    if top is not None and sampling.prompt_logprobs is not None:
        spell = token_speller(service.tokenizer.decode, by_id=False) if sampling.detokenize else None
        found["prompt_logprobs"] = prompt_logprobs(asked.token_ids, top, sampling.prompt_logprobs, spell)
    if named is not None:
        found["prompt_token_id_logprobs"] = _npy(_in_their_places(asked, named))
        found["prompt_token_id_log_tail"] = _npy(named["log_tail"])
    return found


def _choice(choice: Choice, logprobs: int | None) -> dict[str, Any]:
    content = [
        {
            "token_id": token.id,
            "logprob": finite(token.logprob),
            "top_logprobs": [{"token_id": one, "logprob": finite(logprob)} for one, logprob in token.top],
        }
        for token in choice.tokens
    ]
    return {
        "index": choice.place,
        "token_ids": [token.id for token in choice.tokens],
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "logprobs": None if logprobs is None else {"content": content},
    }


def _in_their_places(asked: VllmGenerate, named: Answer) -> np.ndarray:
    """The log-probabilities, at repetitions of an id too, which the targets have once."""
    rows = asked.sampling_params.prompt_logprob_token_ids
    assert rows is not None
    found = np.array(named["logprobs"], np.float32)
    for row, ids in enumerate(rows):
        first: dict[int, int] = {}
        for column, one in enumerate(ids):
            if one >= 0:
                found[row, column] = found[row, first.setdefault(one, column)]
    return found


def _npy(array: np.ndarray) -> str:
    """A float32 array as a base64 .npy file."""
    file = io.BytesIO()
    np.save(file, np.asarray(array, np.float32), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
