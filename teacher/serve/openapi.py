"""The server's own description: an OpenAPI document made of the schemas that check the requests, and a page of it."""

import dataclasses
import functools
import html
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from teacher.serve.calls import DEADLINE_HEADER
from teacher.serve.openai_schemas import ChatRequest, CompletionRequest
from teacher.serve.schemas import RolloutsRequest
from teacher.serve.sglang import SglangGenerate
from teacher.serve.vllm import VllmGenerate
from teacher.wire import CONTENT_TYPE, TEACHER_HEADER

_REFERENCE = "#/components/schemas/"
_JSON = "application/json"
_REFUSALS: Final[Mapping[int, str]] = {
    400: "a field is not as it must be, or is not served",
    401: "the server's token is missing",
    403: "a server without a token is asked by another name than this machine's own, or by a web page from elsewhere",
    404: "another model is asked for",
    408: f"the deadline has come ({DEADLINE_HEADER}, or the server's own)",
    409: f"another teacher is asked for ({TEACHER_HEADER})",
    413: "more than one of the server's limits",
    429: "too much waits; come again",
    503: "the teacher is still being loaded",
}
_STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{margin-top:2.5rem;font-size:1.1rem}code{font-size:.9em}table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0;border-bottom:1px solid #ddd}
.verb{background:#246;color:#fff;border-radius:3px;padding:.1rem .4rem;font-size:.8rem}.quiet{color:#777}"""


class Problem(msgspec.Struct, kw_only=True):
    """Why a request was not answered."""

    message: str
    type: str
    param: str | None
    code: int


class Refusal(msgspec.Struct, kw_only=True):
    """What every answer with a status from 400 on holds."""

    error: Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Endpoint:
    method: str
    path: str
    summary: str
    asked: type[msgspec.Struct] | str | None = None
    """The schema of the body, or the media type of one that is no JSON."""
    answered: tuple[str, ...] = (_JSON,)
    refused: tuple[int, ...] = (400, 401, 403, 409, 503)


_OF_BODIES = tuple(_REFUSALS)
_ENDPOINTS = (
    _Endpoint(
        method="post",
        path="/v1/chat/completions",
        summary="The assistant's next turn, as OpenAI and vLLM have it; thinking and tool calls in their own fields.",
        asked=ChatRequest,
        answered=(_JSON, "text/event-stream"),
        refused=_OF_BODIES,
    ),
    _Endpoint(
        method="post",
        path="/v1/completions",
        summary="Goes on from texts or token ids, as OpenAI and vLLM have it, with log-probabilities of prompts too.",
        asked=CompletionRequest,
        answered=(_JSON, "text/event-stream"),
        refused=_OF_BODIES,
    ),
    _Endpoint(
        method="post",
        path="/inference/v1/generate",
        summary="Token ids in and out, with log-probabilities at chosen ids and the mass of all others, as vLLM.",
        asked=VllmGenerate,
        refused=_OF_BODIES,
    ),
    _Endpoint(
        method="post",
        path="/generate",
        summary="As SGLang has it.",
        asked=SglangGenerate,
        answered=(_JSON, "text/event-stream"),
        refused=_OF_BODIES,
    ),
    _Endpoint(
        method="post",
        path="/v1/targets",
        summary="What a student learns from, of many sequences: top-k, chosen ids, sampled tokens or hidden states, "
        "in safetensors both ways.",
        asked=CONTENT_TYPE,
        answered=(CONTENT_TYPE,),
        refused=_OF_BODIES,
    ),
    _Endpoint(
        method="post",
        path="/v1/rollouts",
        summary="What the teacher generates, the same for the same seed and step, whoever else asks.",
        asked=RolloutsRequest,
        refused=_OF_BODIES,
    ),
    _Endpoint(
        method="get",
        path="/v1/head",
        summary="The output matrix with its hash, in safetensors.",
        answered=(CONTENT_TYPE,),
    ),
    _Endpoint(method="get", path="/v1/models", summary="Who is served, and the server's limits."),
    _Endpoint(
        method="get", path="/metrics", summary="What the server measures, for Prometheus.", answered=("text/plain",)
    ),
    _Endpoint(method="get", path="/health", summary="Whether the process lives.", refused=()),
    _Endpoint(method="get", path="/ready", summary="Whether requests are answered (200) or not yet (503).", refused=()),
)


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    asked = [one.asked for one in _ENDPOINTS if isinstance(one.asked, type)]
    _, schemas = msgspec.json.schema_components([*asked, Refusal], ref_template=_REFERENCE + "{name}")
    paths: dict[str, Any] = {}
    for one in _ENDPOINTS:
        paths.setdefault(one.path, {})[one.method] = _operation(one)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "teacher.serve",
            "version": "1",
            "description": "A teacher for students on other machines, and for people.",
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


def _operation(one: _Endpoint) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "200": {"description": "the answer", "content": {kind: {} for kind in one.answered}},
        **{
            str(status): {
                "description": _REFUSALS[status],
                "content": {_JSON: {"schema": {"$ref": f"{_REFERENCE}{Refusal.__name__}"}}},
            }
            for status in one.refused
        },
    }
    if one.path == "/v1/head":
        responses["304"] = {"description": "the client has it already (If-None-Match)"}
    if one.path == "/ready":
        responses["503"] = {"description": _REFUSALS[503], "content": {_JSON: {}}}
    found: dict[str, Any] = {"summary": one.summary, "responses": responses}
    if isinstance(one.asked, type):
        schema = {"$ref": f"{_REFERENCE}{one.asked.__name__}"}
        found["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    elif one.asked is not None:
        schema = {"type": "string", "format": "binary", "contentMediaType": one.asked}
        found["requestBody"] = {"required": True, "content": {one.asked: {"schema": schema}}}
    return found


@functools.cache
def page() -> str:
    """The document for people, on one page that needs nothing else."""
    whole = document()
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>teacher.serve</title><style>{_STYLE}</style>",
        "<h1>teacher.serve</h1><p>Fields that are not named here, and values that are not served, are refused by name. "
        "All log-probabilities are natural, at temperature 1. <a href=openapi.json>openapi.json</a></p>",
    ]
    for path, methods in whole["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><span class=verb>{method.upper()}</span> <code>{path}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            for content in operation.get("requestBody", {}).get("content", {}).values():
                if "$ref" in content["schema"]:
                    parts.append(f"<p>Body: {_type(content['schema'])}</p>")
    for name, schema in sorted(whole["components"]["schemas"].items()):
        parts.append(f"<h2 id={name}>{name}</h2><p>{html.escape(schema.get('description', ''))}</p><table>")
        parts += _rows(schema)
        parts.append("</table>")
    return "\n".join(parts)


def _rows(schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required", ())
    fields = schema.get("properties", {})
    fixed = [name for name, field in fields.items() if name not in required and _is_fixed(field)]
    for name, field in fields.items():
        if name in fixed:
            continue
        default = "required" if name in required else msgspec.json.encode(field.get("default")).decode()
        said = html.escape(field.get("description", ""))
        yield (f"<tr><td><code>{name}</code><td>{_type(field)}<td class=quiet>{html.escape(default)}<td>{said}")
    if fixed:
        names = ", ".join(f"<code>{name}</code>" for name in fixed)
        yield f"<tr><td colspan=4 class=quiet>Served with the value alone that changes nothing: {names}"


def _is_fixed(schema: Mapping[str, Any]) -> bool:
    """Whether a field has one value, beside null."""
    if "anyOf" in schema:
        return all(map(_is_fixed, schema["anyOf"]))
    bounds = (("minimum", "maximum"), ("none", "maxItems"), ("none", "maxProperties"))
    return (
        schema.get("type") == "null"
        or len(schema.get("enum", ())) == 1
        or any(key in schema and schema[key] == schema.get(least, 0) for least, key in bounds)
    )


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, as HTML."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_REFERENCE)
        return f"<a href=#{name}>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "enum" in schema:
        return " or ".join(html.escape(msgspec.json.encode(one).decode()) for one in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if schema.get("items") else "list"
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", "≥"), ("maximum", "≤"), ("maxLength", "length ≤"))
        if key in schema
    ]
    return html.escape(" ".join([str(schema.get("type", "anything")), *bounds]))
