"""What completions and chats have in common: how a request is understood, and how an answer is framed."""

import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from qwen3.generation.sampling import SamplingParams
from teacher.serve.answering import Choice
from teacher.serve.openai_schemas import TextRequest
from teacher.serve.refusals import error_of
from teacher.serve.schemas import sampling_params
from teacher.serve.service import Service
from teacher.serve.text import Spelling
from teacher.serve.wanted import Wanted
from teacher.wire import Refused

_LOG = logging.getLogger("teacher.serve")
_DONE = b"data: [DONE]\n\n"


def check_model(model: str | None, service: Service) -> None:
    """Refuses (404) the name of another model."""
    if model not in (None, service.name):
        raise Refused("model", f"is not served here; this is {service.name}", status=404)


def check_stream(asked: TextRequest) -> None:
    """Refuses what a stream does not hold, and what only a stream holds."""
    if asked.stream and asked.prompt_logprobs is not None:
        raise Refused("prompt_logprobs", "are not in streams; ask without stream")
    if asked.stream_options is not None and not asked.stream:
        raise Refused("stream_options", "is of streams alone; leave it out or ask with stream")


def sampled(
    asked: TextRequest, new_tokens: int, name: str, service: Service, thinking_budget: int | None = None
) -> SamplingParams | None:
    """How a choice is sampled; None where nothing is to be generated. What is not given is vLLM's own default, whatever
    the checkpoint's generation_config.json recommends. `name` is the field that says how many tokens."""
    stop_ids = tuple(asked.stop_token_ids or ())
    values = {
        "max_new_tokens": max(1, new_tokens),
        "temperature": temperature(asked),
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "top_k": max(0, asked.top_k or 0),
        "min_p": asked.min_p or 0.0,
        "thinking_budget": thinking_budget,
        "stop_ids": all_stop_ids(asked.ignore_eos, stop_ids, service),
    }
    names = {"max_new_tokens": name, "thinking_budget": "thinking_token_budget", "stop_ids": "stop_token_ids"}
    params = sampling_params("", values, service.limits, service.vocab_size, **names)
    return params if new_tokens else None


def temperature(asked: TextRequest) -> float:
    """Of what is sampled."""
    return 1.0 if asked.temperature is None else asked.temperature


def all_stop_ids(ignore_eos: bool, stop_ids: Sequence[int], service: Service) -> tuple[int, ...]:
    """Stop tokens as vLLM and SGLang have them: the client's beside the model's own."""
    return tuple(dict.fromkeys([*(() if ignore_eos else service.tokenizer.eos_ids), *stop_ids]))


def spelled(asked: TextRequest, service: Service) -> Spelling:
    """How the answer becomes text."""
    return Spelling(
        tokenizer=service.tokenizer,
        stop=[asked.stop] if isinstance(asked.stop, str) else asked.stop or [],
        keep_stop=asked.include_stop_str_in_output,
        skip_special_tokens=asked.skip_special_tokens,
    )


def frame(kind: str, prefix: str, asked: TextRequest, service: Service) -> dict[str, Any]:
    """The fields of every answer and of every event of a stream."""
    return {
        "id": f"{prefix}-{asked.request_id or uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
        "system_fingerprint": service.identity.digest,
    }


def usage(wanted: Iterable[Wanted], choices: Iterable[Choice]) -> dict[str, int]:
    """Tokens that were read and written."""
    prompt, completion = sum(len(one.prompt) for one in wanted), sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def stream(made: AsyncIterator[dict[str, Any]]) -> Response:
    """Server-sent events of JSON objects, ended by [DONE]. What goes wrong on the way is an event too."""

    async def events() -> AsyncIterator[bytes]:
        try:
            async for one in made:
                yield _event(one)
        except ClientDisconnect:
            return
        except Refused as refused:
            yield _event(error_of(refused.status, str(refused), refused.field))
        except Exception:  # noqa: BLE001 - a bug; its reason is for the log, and other requests go on
            _LOG.exception("a stream has failed")
            yield _event(error_of(500, "the server has failed; its log says why", None))
        yield _DONE

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def json_response(answer: Any) -> Response:
    """An answer that is whole."""
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
