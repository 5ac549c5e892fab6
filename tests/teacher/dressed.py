"""This project's server dressed as vLLM's or SGLang's, neither of which runs here: it answers by the fields that their
sources have (named in `teacher.dialects`), and by no other."""

import json
from collections.abc import Callable
from typing import Any

import httpx2
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from teacher.serve.service import Service

MOST_TOKENS = 128
Dress = Callable[[ASGIApp, Service], ASGIApp]


def as_vllm(app: ASGIApp, service: Service, *, name: str = "Teacher", version: str = "0.33.0") -> ASGIApp:
    """vLLM 0.33: `vllm serve org/Teacher --served-model-name Teacher`."""
    card = {"id": name, "object": "model", "owned_by": "vllm", "root": f"org/{name}", "parent": None}

    def asked(body: dict[str, Any]) -> None:
        if body.pop("model") != name:
            raise HTTPException(404, "The model does not exist.")

    def answered(answer: dict[str, Any]) -> None:
        del answer["teacher"]
        answer.pop("prompt_token_id_log_tail", None)
        # The order of entries is not promised.
        answer["prompt_logprobs"] = answer["prompt_logprobs"] and [
            row and dict(reversed(row.items())) for row in answer["prompt_logprobs"]
        ]
        for choice in answer["choices"]:
            for token in (choice["logprobs"] or {}).get("content", ()):
                token["token"] = f"token_id:{token.pop('token_id')}"
                token["top_logprobs"] = []

    return _dressed(
        {
            "/v1/models": {"object": "list", "data": [card | {"max_model_len": MOST_TOKENS}]},
            "/version": {"version": version},
        },
        service,
        _through(app, "/inference/v1/generate", asked, answered),
    )


def as_sglang(app: ASGIApp, service: Service, *, name: str = "Teacher", version: str = "0.5.23") -> ASGIApp:
    """SGLang 0.5.23: `python -m sglang.launch_server --model-path org/Teacher`, with deterministic inference."""
    path, weights = f"org/{name}", "default"
    most_input = MOST_TOKENS + 1  # its max_req_input_len, below which it wants them
    card = {"id": path, "object": "model", "owned_by": "sglang", "root": path, "max_model_len": most_input + 6}

    def asked(body: dict[str, Any]) -> None:
        # As in its managers/utils.py, validate_input_length.
        if len(body["input_ids"]) >= most_input:
            raise HTTPException(400, "Input length exceeds the maximum allowed length.")
        sampling = body["sampling_params"]
        # As in its schedule_batch.py.
        assert not (sampling.get("ignore_eos") and sampling.get("stop_token_ids"))
        # Its log-probabilities of what it generates are those at its temperature.
        assert not body.get("return_logprob") or sampling["max_new_tokens"] == 0

    def answered(answer: dict[str, Any]) -> None:
        answer["meta_info"]["weight_version"] = weights

    return _dressed(
        {
            "/v1/models": {"object": "list", "data": [card]},
            "/model_info": {"model_path": path, "tokenizer_path": path, "weight_version": weights},
            "/server_info": {"version": version, "max_req_input_len": most_input},
        },
        service,
        _through(app, "/generate", asked, answered),
    )


def _dressed(said: dict[str, Any], service: Service, generate: Route) -> ASGIApp:
    async def tokenize(request: Request) -> Response:
        tokens = service.tokenizer.encode((await request.json())["prompt"], add_special_tokens=True)
        return JSONResponse({"count": len(tokens), "max_model_len": MOST_TOKENS, "tokens": tokens})

    def saying(answer: Any) -> Callable[[Request], Any]:
        async def say(request: Request) -> Response:
            return JSONResponse(answer)

        return say

    asked = [Route(path, saying(answer)) for path, answer in said.items()]
    return Starlette(routes=[*asked, Route("/tokenize", tokenize, methods=["POST"]), generate])


def _through(
    app: ASGIApp, path: str, asked: Callable[[dict[str, Any]], None], answered: Callable[[dict[str, Any]], None]
) -> Route:
    """To the server's own endpoint, with what is asked and what is answered changed in place."""
    inner = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1", timeout=None)

    async def forward(request: Request) -> Response:
        body = await request.json()
        asked(body)
        response = await inner.post(path, content=json.dumps(body).encode())
        answer = response.json()
        if response.status_code == 200:
            answered(answer)
        return Response(msgspec.json.encode(answer), response.status_code, media_type="application/json")

    return Route(path, forward, methods=["POST"])
