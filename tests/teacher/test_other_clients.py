"""What trainers send, as their sources have it, and what any program may send: answered in their shapes, or refused.

TRL 1.16: trl/experimental/async_distillation/async_rollout_worker.py. prime-rl: src/prime_rl/utils/client.py.
SkyRL 0.4: skyrl/tinker/extra/external_inference.py. slime, miles: examples/on_policy_distillation, and their rollouts.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams
from qwen3.generation.slots import Written
from teacher.serve import openapi
from teacher.serve.app import Standing, make_app
from teacher.serve.text import Spelling
from teacher.serve.wanted import Wanted
from teacher.wire import Answer, TargetsRequest

SEQUENCE = [5, 9, 200, 31, 7, 7, 150, 12]


@pytest.fixture(scope="module")
def client(reciting_url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=reciting_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def following(reciting) -> Answer:
    """What the scorer says at every position of `SEQUENCE`; that is held against the model in test_serve."""
    asked = TargetsRequest(
        targets="top_k", sequences=[np.asarray(SEQUENCE, np.int32)], starts=[0], entries=reciting.limits.max_top_k
    )
    return reciting.scoring.submit(asked).result(60)


def test_trl_scores_a_sequence_with_its_likeliest_tokens(client, following):
    name = client.get("/v1/models").json()["data"][0]["id"]
    body = {"model": name, "prompt": SEQUENCE, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 4}
    rows = client.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    assert rows[0] is None
    assert len(rows) == len(SEQUENCE)
    for position, row in enumerate(rows[1:]):
        # As TRL reads it: by rank, the realised token beside the k likeliest.
        ranked = sorted(((entry["rank"], int(token), entry["logprob"]) for token, entry in row.items()))
        likeliest = [(token, logprob) for rank, token, logprob in ranked if rank <= 4][:4]
        assert [token for token, _ in likeliest] == following["ids"][position, :4].tolist()
        np.testing.assert_allclose([one for _, one in likeliest], following["logprobs"][position, :4], atol=2e-5)
        own = row[str(SEQUENCE[position + 1])]["logprob"]
        assert own == pytest.approx(following["following_logprobs"][position], abs=2e-5)
    # Its teacher_temperature: a server that leaves prompts at 1 must not be taken for one that does not.
    refused = client.post("/v1/completions", json=body | {"temperature": 0.7}).json()["error"]
    assert (refused["code"], refused["param"]) == (400, "temperature")
    assert "at temperature 1" in refused["message"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sequence_that_is_longer_than_prompts_may_be_is_scored_all_the_same(client, reciting, temperature):
    limits = reciting.limits
    ids = np.random.default_rng(0).integers(0, reciting.vocab_size, limits.max_sequence_tokens).tolist()
    body = {"prompt": ids, "max_tokens": 1, "temperature": temperature, "prompt_logprobs": 1}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert len(choice["prompt_logprobs"]) == len(ids)
    more = client.post("/v1/completions", json=body | {"prompt": [*ids, 1]})
    assert (more.status_code, more.json()["error"]["param"]) == (413, "prompt")


def test_prime_rl_scores_a_sequence(client, following):
    sampling = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1}
    body = {"model": "reciting", "token_ids": SEQUENCE, "sampling_params": sampling}
    rows = client.post("/inference/v1/generate", json=body).json()["prompt_logprobs"]
    read = [0.0 if row is None else next(iter(row.values()))["logprob"] for row in rows]
    np.testing.assert_allclose(read[1:], following["following_logprobs"][:-1], atol=2e-5)


def test_skyrl_samples_with_log_probabilities(client, reciting):
    body = {
        "model": "reciting",
        "prompt": SEQUENCE,
        "n": 2,
        "seed": 11,
        "max_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "logprobs": True,
        "stream": False,
        "return_token_ids": True,
    }
    for choice in client.post("/v1/completions", json=body).json()["choices"]:
        assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) <= 6
        assert choice["finish_reason"] in ("stop", "length")


def test_slime_scores_a_sequence_with_its_teacher(client, reciting, following):
    body = {
        "input_ids": SEQUENCE,
        "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    meta = client.post("/generate", json=body).json()["meta_info"]
    triplets = meta["input_token_logprobs"]
    assert len(triplets) == len(SEQUENCE)
    assert triplets[0] == [None, SEQUENCE[0], None]
    assert [one for _, one, _ in triplets] == SEQUENCE
    np.testing.assert_allclose([one for one, *_ in triplets[1:]], following["following_logprobs"][:-1], atol=2e-5)
    assert meta["output_token_logprobs"] == []
    more = {
        "logprob_start_len": 5,
        "top_logprobs_num": 2,
        "token_ids_logprob": [3, 9, 3],
        "return_text_in_logprobs": True,
    }
    meta = client.post("/generate", json=body | more).json()["meta_info"]
    assert [one for _, one, _ in meta["input_token_logprobs"]] == SEQUENCE[5:]
    assert meta["input_token_logprobs"][1][2] == reciting.tokenizer.decode(SEQUENCE[6:7])
    assert meta["input_top_logprobs"][0] is None
    assert [one for _, one, _ in meta["input_top_logprobs"][1]] == following["ids"][5, :2].tolist()
    assert [one for _, one, _ in meta["input_token_ids_logprobs"][1]] == [3, 9, 3]
    assert meta["input_token_ids_logprobs"][1][0] == meta["input_token_ids_logprobs"][1][2]


def test_slime_samples_with_log_probabilities(client, reciting):
    body = {
        "input_ids": SEQUENCE,
        "sampling_params": {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "max_new_tokens": 5,
            "stop": None,
            "stop_token_ids": None,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "spaces_between_special_tokens": True,
            "ignore_eos": True,
            "sampling_seed": 4,
        },
        "return_logprob": True,
        "top_logprobs_num": 2,
        "token_ids_logprob": [3, 9],
    }
    answer = client.post("/generate", json=body).json()
    meta = answer["meta_info"]
    ids = [one for _, one, _ in meta["output_token_logprobs"]]
    assert ids == answer["output_ids"]
    assert (meta["finish_reason"], meta["completion_tokens"]) == ({"type": "length", "length": 5}, 5)
    # The scorer says the same of what the engine has written.
    whole = [*SEQUENCE, *ids]
    again = body | {"input_ids": whole, "logprob_start_len": len(SEQUENCE) - 1}
    again["sampling_params"] = {"max_new_tokens": 0}
    scored = client.post("/generate", json=again).json()["meta_info"]
    for kind in ("token", "top", "token_ids"):
        theirs, ours = scored[f"input_{kind}_logprobs"][1:], meta[f"output_{kind}_logprobs"]
        flat = [[entry for row in rows for entry in (row if kind != "token" else [row])] for rows in (ours, theirs)]
        assert [entry[1] for entry in flat[0]] == [entry[1] for entry in flat[1]]
        np.testing.assert_allclose([one[0] for one in flat[0]], [one[0] for one in flat[1]], atol=1e-4)
    many = client.post("/generate", json={"text": ["H", "H"], "sampling_params": {"temperature": 0}}).json()
    assert [one["text"] for one in many] == ["i ü🙂wxyz"] * 2
    assert many[0]["meta_info"]["finish_reason"] == {"type": "stop", "matched": reciting.tokenizer.eos_ids[0]}


def streamed(client: httpx2.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events, as SGLang's own client reads them (python/sglang/lang/backend/runtime_endpoint.py)."""
    with client.stream("POST", "/generate", json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_each_event_of_a_stream_holds_the_whole_answer_so_far(client):
    body = {
        "input_ids": SEQUENCE,
        "sampling_params": {"max_new_tokens": 30, "sampling_seed": 4, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 3,
        "top_logprobs_num": 2,
    }
    whole = client.post("/generate", json=body).json()
    events = streamed(client, body)
    assert len(events) > 1
    for before, after in itertools.pairwise(events):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert len(after["output_ids"]) > len(before["output_ids"])
        assert before["meta_info"]["finish_reason"] is None
        assert before["meta_info"]["completion_tokens"] == len(before["output_ids"])
        assert len(before["meta_info"]["output_top_logprobs"]) == len(before["output_ids"])
        assert before["meta_info"]["input_token_logprobs"] == after["meta_info"]["input_token_logprobs"]
    last = events[-1]
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
    assert last["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"] == {"type": "length", "length": 30}
    assert "e2e_latency" in last["meta_info"]
    assert "index" not in last
    # Of several, each event says of which; a prompt that is only scored has one.
    many = streamed(client, {"text": ["H", "H"], "sampling_params": {"temperature": 0}})
    assert {event["index"]: event["text"] for event in many} == {0: "i ü🙂wxyz", 1: "i ü🙂wxyz"}
    (scored,) = streamed(client, body | {"sampling_params": {"max_new_tokens": 0}})
    assert scored["meta_info"]["input_top_logprobs"] == whole["meta_info"]["input_top_logprobs"]
    # What goes wrong before it begins is no stream.
    refused = client.post("/generate", json=body | {"stream": True, "top_logprobs_num": 99})
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "top_logprobs_num")


def test_parts_that_have_come_together_are_one_event(client, reciting, monkeypatch):
    submit = reciting.generation.submit

    def submit_holding_back(requests: Sequence[Request], *, on_written: Callable[..., bool], **rest: Any) -> Any:
        held = []

        def hold(index: int, part: Written) -> bool:
            held.append((index, part))
            if sum(len(one.tokens) for _, one in held) == 30:
                for one in held:
                    on_written(*one)
            return True

        return submit(requests, on_written=hold, **rest)

    monkeypatch.setattr(reciting.generation, "submit", submit_holding_back)
    sampling = {"max_new_tokens": 30, "sampling_seed": 4, "ignore_eos": True}
    events = streamed(client, {"input_ids": SEQUENCE, "sampling_params": sampling})
    lengths = [len(event["output_ids"]) for event in events]
    assert lengths == sorted(set(lengths))
    assert [event["meta_info"]["finish_reason"] is None for event in events] == [True] * (len(events) - 1) + [False]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"return_logprob": True, "token_ids_logprob": [99_999]}, "token_ids_logprob"),
        ({"return_logprob": True, "token_ids_logprob": [1] * 7}, "token_ids_logprob"),
        ({"return_logprob": True, "token_ids_logprob": [1], "input_ids": [1] * 120}, "input_ids"),
        ({"text": "a"}, "input_ids"),
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": [[1], []]}, "input_ids"),
        ({"logprob_start_len": 8}, "logprob_start_len"),
        ({"sampling_params": {"temperature": 0.7}, "return_logprob": True}, "sampling_params.temperature"),
        ({"top_logprobs_num": 2}, "top_logprobs_num"),
        ({"stream": True, "return_logprob": True, "token_ids_logprob": [1]}, "token_ids_logprob"),
        ({"return_hidden_states": True}, "return_hidden_states"),
        ({"sampling_params": {"regex": "a"}}, "sampling_params.regex"),
        ({"sampling_params": {"frequency_penalty": 1}}, "sampling_params.frequency_penalty"),
        ({"lora_path": "x"}, "lora_path"),
    ],
)
def test_what_sglang_has_and_this_server_not_is_refused_by_name(client, change, field):
    response = client.post("/generate", json={"input_ids": SEQUENCE} | change)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (error["code"], field), error
    assert response.status_code == (413 if "this server" in error["message"] else 400)


SOUND: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [[1, 2], [3]], "max_tokens": 2, "logprobs": 1, "stop": ["a"], "seed": 1, "n": 1},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "chat_template_kwargs": {"enable_thinking": True},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "stream_options": None,
    },
    "/generate": {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1, "top_p": 1.0}, "return_logprob": True},
    "/inference/v1/generate": {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 1, "prompt_logprobs": 1}},
}
WRONG = (None, True, -1, 10**30, 0.5, -1e308, "", "\x00", "a" * 5_000, [], [[]], [None], {}, {"a": {}}, [10**12])


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def with_change(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = with_change(value[path[0]], path[1:], new)
    return copied


def test_two_hundred_mutated_requests_get_a_reason_each_and_never_a_failure(client):
    rng = random.Random(0)
    refused = 0
    while refused < 200:
        path = rng.choice(list(SOUND))
        body = SOUND[path]
        where = rng.choice(list(places(body)))
        changed = with_change(body, where, rng.choice(WRONG))
        if isinstance(changed, dict) and rng.random() < 0.2:
            changed[rng.choice(("__class__", "promt", "$ref", ""))] = 1
        content = json.dumps(changed).encode()
        if rng.random() < 0.2:
            content = content[: rng.randrange(len(content))] + rng.choice((b"", b"\xff", b"\\ud800", b"[" * 900))
        response = client.post(path, content=content)
        if response.status_code == 200:
            continue
        assert 400 <= response.status_code < 500, (path, content[:300], response.text)
        assert response.json()["error"]["message"], content[:300]
        refused += 1
    assert client.post("/v1/completions", json=SOUND["/v1/completions"]).status_code == 200


def test_the_description_is_that_of_the_schemas_and_the_page_needs_nothing_else(client):
    document = client.get("/openapi.json").json()
    assert document == json.loads(json.dumps(openapi.document()))
    paths = {route.path for route in make_app(Standing()).routes}
    assert set(document["paths"]) == paths - {"/openapi.json", "/docs"}
    body = document["components"]["schemas"]["ChatRequest"]
    assert body["required"] == ["messages"]
    assert body["additionalProperties"] is False
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "thinking_token_budget" in page.text
    assert "http" not in page.text.replace("HTTP", "")


@pytest.fixture(scope="module")
def described(reciting_url: str) -> Any:
    return schemathesis.openapi.from_url(f"{reciting_url}/openapi.json")


# Targets are no JSON, and have mutations of their own.
OPERATIONS = [
    (method, path, mode)
    for path, methods in openapi.document()["paths"].items()
    for method, operation in methods.items()
    for mode in (GenerationMode if "requestBody" in operation else [GenerationMode.POSITIVE])
    if path != "/v1/targets"
]


@pytest.mark.long
@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS)
def test_no_request_gives_an_answer_that_is_not_described(described, method, path, mode):
    """Made of the schemas, to fit them and not to."""
    tried: list[int] = []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=described[path][method.upper()].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        checks = [not_a_server_error, status_code_conformance, content_type_conformance]
        tried.append(case.call_and_validate(checks=checks).status_code)

    check()
    assert tried
    if mode == GenerationMode.NEGATIVE:
        assert all(400 <= status < 500 for status in tried)


def test_what_a_seed_samples_is_what_the_engine_samples(client, reciting):
    """By way of the token endpoint: parts, stop tokens and streams change nothing of what is sampled."""
    body = {"token_ids": SEQUENCE, "sampling_params": {"max_tokens": 9, "seed": 2, "ignore_eos": True}}
    ids = client.post("/inference/v1/generate", json=body).json()["choices"][0]["token_ids"]
    params = SamplingParams(max_new_tokens=9, stop_ids=())
    wanted = Wanted(prompt=SEQUENCE, spelling=Spelling(tokenizer=reciting.tokenizer), params=params, seed=2)
    engine = reciting.generation._engine
    (rollout,) = engine.generate(reciting._model, wanted.requests(), seed=0, policy_step=0)
    assert rollout.response.tolist() == ids
