"""A server's answers are what the model's own logits say, and what it does not serve it refuses by name."""

import asyncio
import base64
import concurrent.futures
import dataclasses
import io
import json
import threading
import time
import types
from collections.abc import Iterator

import httpx2
import jax
import numpy as np
import pytest

from qwen3.checkpoint import hf
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import rollouts_from_json
from qwen3.sharding import MeshShape, make_mesh
from teacher import wire
from teacher.serve import calls, queues
from teacher.serve.app import Standing
from teacher.serve.metrics import Metrics
from teacher.serve.service import Service, checked_memory
from teacher.wire import Refused, TargetsRequest
from tests.teacher.serving import LIMITS, load, make_folder, serving

# float32 sums in another order.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
LIMITS_OF_ONE = dataclasses.replace(LIMITS, max_queue_requests=1)
LENGTHS, STARTS = (40, 1, 128, 17), (3, 0, 100, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def service(folder: str) -> Service:
    return load(folder)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx2.Client]:
    with serving(Standing(service)) as url, httpx2.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def sequences(service: Service) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, service.vocab_size, length).astype(np.int32) for length in LENGTHS]


@pytest.fixture(scope="module")
def logprobs(folder: str, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Of each sequence in a row of its own, from its start on."""
    tokens, segments = np.zeros((4, 128), np.int32), np.zeros((4, 128), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
    positions = np.broadcast_to(np.arange(128, dtype=np.int32), tokens.shape)
    logits = jax.jit(Qwen3.logits)(hf.load(folder), tokens, positions, segments)
    whole = np.asarray(jax.nn.log_softmax(logits))
    return [row[start:length] for row, start, length in zip(whole, STARTS, LENGTHS, strict=True)]


def asked(client: httpx2.Client, request: TargetsRequest) -> dict[str, np.ndarray]:
    response = client.post("/v1/targets", content=wire.encode_request(request))
    assert response.status_code == 200, response.text
    arrays, _ = wire.decode(response.content)
    return arrays


def test_top_k_and_the_token_that_follows(client, sequences, logprobs):
    whole = np.concatenate(logprobs)
    for k in (8, 3):
        found = asked(client, TargetsRequest(targets="top_k", sequences=sequences, starts=STARTS, entries=k))
        best = np.argsort(-whole, axis=-1)[:, :k]
        np.testing.assert_array_equal(found["ids"], best)
        np.testing.assert_allclose(found["logprobs"], np.take_along_axis(whole, best, -1), **TOLERANCE)
        np.testing.assert_allclose(np.exp(found["log_tail"]) + np.exp(found["logprobs"]).sum(-1), 1, **TOLERANCE)
    following = np.concatenate(
        [np.append(tokens[start + 1 :], -1) for tokens, start in zip(sequences, STARTS, strict=True)]
    )
    known = following >= 0
    own = np.take_along_axis(whole[known], following[known][:, None], -1)
    np.testing.assert_allclose(found["following_logprobs"][known], own[:, 0], **TOLERANCE)
    np.testing.assert_array_equal(found["following_ranks"][known], (whole[known] >= own - 1e-7).sum(-1))
    assert np.all(np.isneginf(found["following_logprobs"][~known]))
    assert np.all(found["following_ranks"][~known] == 0)


def test_chosen_ids(client, service, sequences, logprobs):
    rng = np.random.default_rng(1)
    ids = [rng.integers(-1, service.vocab_size, (len(part), 4)).astype(np.int32) for part in logprobs]
    ids[0][0] = (5, 5, -1, 7)
    request = TargetsRequest(targets="at_ids", sequences=sequences, starts=STARTS, entries=4, ids=ids)
    found = asked(client, request)
    assert found["ids"][0].tolist() == [5, -1, -1, 7]
    with_own = asked(client, dataclasses.replace(request, top_k=2))
    np.testing.assert_array_equal(with_own["ids"][:, :4], found["ids"])
    likeliest = np.argsort(-np.concatenate(logprobs), -1)[:, :2]
    repeated = (likeliest[:, :, None] == found["ids"][:, None, :]).any(-1)
    np.testing.assert_array_equal(with_own["ids"][:, 4:], np.where(repeated, -1, likeliest))
    for said in (found, with_own):
        known = said["ids"] >= 0
        whole = np.take_along_axis(np.concatenate(logprobs), np.maximum(said["ids"], 0), -1)
        np.testing.assert_allclose(said["logprobs"][known], whole[known], **TOLERANCE)
        assert np.all(np.isneginf(said["logprobs"][~known]))
        np.testing.assert_allclose(np.exp(said["log_tail"]) + np.exp(said["logprobs"]).sum(-1), 1, **TOLERANCE)


def test_sampled_tokens_depend_on_seed_and_position_alone(client, sequences, logprobs):
    def sampled(places: list[int], count: int = 5) -> list[dict[str, np.ndarray]]:
        request = TargetsRequest(
            targets="sampled",
            sequences=[sequences[place] for place in places],
            starts=[STARTS[place] for place in places],
            entries=count,
            seeds=[7 + place for place in places],
        )
        found = asked(client, request)
        ends = np.cumsum(request.rows)[:-1]
        parts = {name: np.split(array, ends) for name, array in found.items()}
        return [{name: part[index] for name, part in parts.items()} for index in range(len(places))]

    together, alone = sampled([0, 1, 2, 3]), sampled([2])
    np.testing.assert_array_equal(together[2]["ids"], alone[0]["ids"])
    for said, whole in zip(together, logprobs, strict=True):
        np.testing.assert_allclose(np.exp(said["log_shares"]).sum(-1), 1, **TOLERANCE)
        np.testing.assert_allclose(said["entropy"], -np.sum(np.exp(whole) * whole, -1), **TOLERANCE)
    (three,) = sampled([2], count=3)
    assert three["ids"].shape == (28, 3)
    np.testing.assert_allclose(np.exp(three["log_shares"]).sum(-1), 1, **TOLERANCE)


def test_hidden_states_with_the_head_are_exact(client, sequences, logprobs):
    hidden = asked(client, TargetsRequest(targets="hidden", sequences=sequences, starts=STARTS))["hidden"]
    response = client.get("/v1/head")
    arrays, metadata = wire.decode(response.content)
    assert response.headers["etag"] == f'"{metadata["blake2b"]}"'
    told = jax.nn.log_softmax(hidden @ arrays["head"].T)
    np.testing.assert_allclose(told, np.concatenate(logprobs), **TOLERANCE)
    assert client.get("/v1/head", headers={"if-none-match": response.headers["etag"]}).status_code == 304


def vllm_request(tokens: np.ndarray, **sampling: object) -> dict[str, object]:
    return {"token_ids": tokens.tolist(), "sampling_params": {"max_tokens": 1, "temperature": 1.0, **sampling}}


def test_prompt_logprobs_as_vllm_gives_them(client, sequences, logprobs):
    """prime-rl's request, and the shape that it reads."""
    tokens = sequences[2]
    answer = client.post(
        "/inference/v1/generate", json=vllm_request(tokens, top_p=1.0, prompt_logprobs=1, detokenize=False)
    ).json()
    assert len(answer["choices"][0]["token_ids"]) == 1
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == len(tokens)
    for offset, row in enumerate(logprobs[2][:-1]):
        position = STARTS[2] + offset
        entries = answer["prompt_logprobs"][position + 1]
        own, best = int(tokens[position + 1]), int(np.argmax(row))
        assert entries.keys() == {str(own), str(best)}
        assert entries[str(own)]["logprob"] == pytest.approx(row[own], abs=1e-4)
        assert entries[str(own)]["rank"] == int((row >= row[own]).sum())
        assert entries[str(best)]["rank"] == 1


def test_named_prompt_ids_as_vllm_gives_them(client, sequences, logprobs):
    tokens, start = sequences[2], STARTS[2]
    named = [[3, -1, 9] if position % 2 else [4, 4] for position in range(len(tokens) - 1 - start)]
    answer = client.post(
        "/inference/v1/generate",
        json=vllm_request(tokens, prompt_logprob_token_ids=named, prompt_logprob_start=start),
    ).json()
    found = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])))
    tail = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_log_tail"])))
    assert found.dtype == np.float32
    for row, ids in enumerate(named):
        expected = [logprobs[2][row, one] if one >= 0 else -np.inf for one in ids]
        np.testing.assert_allclose(found[row, : len(ids)], expected, **TOLERANCE)
        rest = np.log1p(-np.exp(logprobs[2][row, sorted({one for one in ids if one >= 0})]).sum())
        np.testing.assert_allclose(tail[row], rest, **TOLERANCE)


def test_generated_tokens_come_with_their_likeliest_and_repeat_for_a_seed(client, service, sequences):
    body = vllm_request(sequences[0], max_tokens=6, n=2, seed=3, logprobs=2, ignore_eos=True)
    first, again = (client.post("/inference/v1/generate", json=body).json()["choices"] for _ in range(2))
    assert first == again
    assert first[0]["token_ids"] != first[1]["token_ids"]
    for choice in first:
        content = choice["logprobs"]["content"]
        assert [entry["token_id"] for entry in content] == choice["token_ids"]
        for entry in content:
            listed = {one["token_id"]: one["logprob"] for one in entry["top_logprobs"]}
            assert len(listed) == 2
            assert entry["logprob"] <= max(listed.values()) + 1e-4
            if entry["token_id"] in listed:
                assert entry["logprob"] == pytest.approx(listed[entry["token_id"]], abs=1e-4)


def test_rollouts_are_the_engines_own_whoever_else_asks(client, service, sequences):
    params = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 20}
    prompts = [sequences[0].tolist(), sequences[3].tolist(), sequences[1].tolist()]

    def body(step: int) -> dict[str, object]:
        requests = [
            {"prompt_ids": ids, "prompt_id": str(n), "sample_index": 0, "mode": "non_thinking", "params": params}
            for n, ids in enumerate(prompts)
        ]
        return {"seed": 5, "step": step, "requests": requests}

    answers: dict[int, list] = {}

    def ask(step: int) -> None:
        answers[step] = rollouts_from_json(client.post("/v1/rollouts", json=body(step)).json())

    threads = [threading.Thread(target=ask, args=(step,)) for step in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine = service.generation._engine
    requests = [
        Request(
            prompt_ids=ids,
            prompt_id=str(number),
            sample_index=0,
            mode="non_thinking",
            params=SamplingParams(max_new_tokens=12, temperature=0.8, top_k=20),
        )
        for number, ids in enumerate(prompts)
    ]
    for step in (0, 1, 2):
        expected = engine.generate(service._model, requests, seed=5, policy_step=0, step=step)
        for found, rollout in zip(answers[step], expected, strict=True):
            np.testing.assert_array_equal(found.tokens, rollout.tokens)
            np.testing.assert_allclose(found.sampler_logprobs, rollout.sampler_logprobs, **TOLERANCE)


def test_scoring_and_generating_on_several_devices_do_not_wait_for_each_other_for_ever(folder, service, sequences):
    """Programs that devices run together must begin in one order on all of them."""
    spread = load(folder, devices=2)
    request = Request(
        prompt_ids=sequences[0].tolist(),
        prompt_id="0",
        sample_index=0,
        mode="non_thinking",
        params=SamplingParams(max_new_tokens=12),
    )
    targets = TargetsRequest(targets="top_k", sequences=sequences, starts=[0] * len(sequences), entries=3)
    asked = [
        one for step in range(6)
        for one in (spread.generation.submit([request], seed=1, step=step), spread.scoring.submit(targets))
    ]  # fmt: skip
    assert not concurrent.futures.wait(asked, timeout=120).not_done
    alone = service.generation.submit([request], seed=1, step=0).result()
    np.testing.assert_array_equal(asked[0].result()[0].tokens, alone[0].tokens)
    spread.close()


def test_weights_that_score_no_numbers_are_never_served(folder, service):
    model = hf.load(folder)
    model.final_norm[...] = np.nan * model.final_norm[...]
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    with pytest.raises(UserError, match="teacher broken: its log-probabilities are no finite numbers; check"):
        Service(model, mesh, service.tokenizer, service.identity, LIMITS, name="broken")


def test_what_the_engine_refuses_is_refused_before_others_are_asked_with_it(service):
    request = Request(
        prompt_ids=[1] * 81, prompt_id="0", sample_index=0, mode="non_thinking", params=SamplingParams(max_new_tokens=1)
    )
    with pytest.raises(Refused, match=r"requests\[0\] cannot be generated from: prompt '0' has 81 tokens"):
        service.generation.submit([request], seed=0)
    long = TargetsRequest(targets="hidden", sequences=[np.zeros(129, np.int32)], starts=[0])
    with pytest.raises(Refused, match=r"129 tokens .* this server scores at most 128"):
        service.scoring.submit(long)
    with pytest.raises(Refused, match="with 9 entries each"):
        service.scoring.submit(dataclasses.replace(long, targets="top_k", sequences=[np.arange(2)], entries=9))


def test_what_keeps_an_engine_from_beginning_is_told_to_who_waits(service, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(service.generation._engine, "follow", failing)
    request = Request(
        prompt_ids=[1], prompt_id="0", sample_index=0, mode="non_thinking", params=SamplingParams(max_new_tokens=1)
    )
    with pytest.raises(RuntimeError, match="out of luck"):
        service.generation.submit([request], seed=0).result(30)


def test_without_a_seed_every_request_samples_anew(client, sequences):
    def tokens(**more: int) -> list[int]:
        body = vllm_request(sequences[0], max_tokens=12, temperature=1.0, ignore_eos=True, **more)
        return client.post("/inference/v1/generate", json=body).json()["choices"][0]["token_ids"]

    assert tokens() != tokens()
    assert tokens(seed=3) == tokens(seed=3)


def test_sixteen_clients_get_what_each_asked_for_and_nothing_compiles(client, service, sequences, logprobs):
    """Requests of every kind at once: batches are full, and the only programs that run were compiled at the start."""
    wrong: list[str] = []

    def ask(number: int) -> None:
        rng = np.random.default_rng(number)
        with httpx2.Client(base_url=client.base_url, timeout=60) as own:
            for turn in range(6):
                place = int(rng.integers(0, 4))
                start = int(rng.integers(STARTS[place], LENGTHS[place]))
                whole = logprobs[place][start - STARTS[place] :]
                tokens = [sequences[place]]
                if (number + turn) % 2:
                    said = asked(own, TargetsRequest(targets="top_k", sequences=tokens, starts=[start], entries=4))
                    expected = -np.sort(-whole, -1)[:, :4]
                else:
                    ids = rng.permuted(np.tile(np.arange(service.vocab_size), (len(whole), 1)), axis=1)[:, :4]
                    ids = ids.astype(np.int32)
                    said = asked(
                        own, TargetsRequest(targets="at_ids", sequences=tokens, starts=[start], entries=4, ids=[ids])
                    )
                    expected = np.take_along_axis(whole, ids, -1)
                if not np.allclose(said["logprobs"], expected, **TOLERANCE):
                    wrong.append(f"client {number}, request {turn}")

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **more: compiled.append(event) if "compile" in event else None
    )
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert compiled == []
    metrics = client.get("/metrics").text
    assert 'teacher_requests_total{endpoint="/v1/targets",status="200"}' in metrics
    assert "teacher_queue_requests 0.0" in metrics


def test_who_answers_is_said_and_another_teacher_is_not_taken_for_it(client, service):
    model = client.get("/v1/models").json()["data"][0]
    assert model["id"] == "teacher"
    assert set(model["identity"]) == {"weights", "dtype", "tokenizer", "template"}
    assert model["limits"]["max_top_k"] == 8
    response = client.get("/v1/models", headers={wire.TEACHER_HEADER: "0" * 32})
    assert response.status_code == 409
    assert response.headers[wire.TEACHER_HEADER] == service.identity.digest


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("host", "example.org:8470", 403),
        ("host", "localhost:8470", 200),
        ("host", "[::1]:8470", 200),
        ("origin", "https://example.org", 403),
        ("origin", "null", 403),
        ("origin", "http://[", 403),
        ("origin", "http://127.0.0.1:3000", 200),
    ],
)
def test_web_pages_from_elsewhere_do_not_ask_a_server_without_a_token(client, header, value, status):
    assert client.get("/v1/models", headers={header: value}).status_code == status


def test_a_token_is_asked_of_all_but_the_probes(service):
    with serving(Standing(service), token="a secret") as url:
        response = httpx2.get(f"{url}/v1/models")
        assert (response.status_code, wire.TEACHER_HEADER in response.headers) == (401, False)
    with serving(Standing(), token="a secret") as url, httpx2.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer another"}).status_code == 401
        loading = client.get("/v1/models", headers={"authorization": "Bearer a secret"})
        assert (loading.status_code, loading.headers["retry-after"]) == (503, "1")
        assert client.post("/health").status_code == 404


def test_a_full_queue_says_when_to_come_again_and_a_deadline_is_kept(client, service, sequences, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    launch = service.scoring._programs.launch

    def held(batch):
        begun.set()
        go_on.wait(30)
        return launch(batch)

    monkeypatch.setattr(service.scoring._programs, "launch", held)
    body = wire.encode_request(TargetsRequest(targets="hidden", sequences=sequences, starts=STARTS))
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(client.post("/v1/targets", content=body).status_code))
    thread.start()
    begun.wait(30)
    late = client.post("/v1/targets", content=body, headers={"x-deadline-seconds": "0.05"})
    assert late.status_code == 408
    assert "deadline" in late.json()["error"]["message"]
    # Its client has gone, and it with it: what waits is the first one alone.
    with service.scoring._changed:
        assert all(job.future.cancelled() for job, _ in service.scoring._waiting)
    monkeypatch.setattr(service.admission, "_limits", LIMITS_OF_ONE)
    full = client.post("/v1/targets", content=body)
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    go_on.set()
    thread.join()
    assert statuses == [200]


def test_a_client_that_goes_leaves_the_queue(client, service, sequences, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    launch = service.scoring._programs.launch
    launched: list[int] = []

    def held(batch):
        begun.set()
        go_on.wait(30)
        launched.append(len(batch.units))
        return launch(batch)

    monkeypatch.setattr(service.scoring._programs, "launch", held)
    body = wire.encode_request(TargetsRequest(targets="hidden", sequences=sequences[:1], starts=STARTS[:1]))
    thread = threading.Thread(target=lambda: client.post("/v1/targets", content=body))
    thread.start()
    begun.wait(30)
    with httpx2.Client(base_url=client.base_url) as other, pytest.raises(httpx2.ReadTimeout):
        other.post("/v1/targets", content=body, timeout=0.3)
    deadline = time.monotonic() + 10
    while not all(job.future.done() for job, _ in service.scoring._waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    go_on.set()
    thread.join()
    assert launched == [1]


def test_a_failure_is_told_to_those_whom_it_concerns(client, service, sequences, monkeypatch):
    def failing(batch):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(service.scoring._programs, "launch", failing)
    body = wire.encode_request(TargetsRequest(targets="hidden", sequences=sequences, starts=STARTS))
    response = client.post("/v1/targets", content=body)
    assert response.status_code == 500
    assert "out of luck" not in response.text
    monkeypatch.undo()
    assert client.post("/v1/targets", content=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "change", "status", "field"),
    [
        ("", {"token_ids": []}, 400, "token_ids"),
        ("", {"token_ids": [99_999]}, 400, "token_ids"),
        ("", {"token_ids": [1] * 300}, 413, "token_ids"),
        ("", {"token_ids": "1 2"}, 400, "token_ids"),
        ("", {"model": "../../etc/passwd"}, 404, "model"),
        ("", {"unknown": 1}, 400, "body"),
        ("sampling", {"temperature": 0.7, "prompt_logprobs": 1}, 400, "sampling_params.temperature"),
        ("sampling", {"temperature": 0.7, "prompt_logprobs": 1, "max_tokens": 0}, 400, "sampling_params.temperature"),
        ("sampling", {"prompt_logprobs": 9}, 413, "sampling_params.prompt_logprobs"),
        ("sampling", {"prompt_logprob_token_ids": [[1]]}, 400, "sampling_params.prompt_logprob_token_ids"),
        ("sampling", {"prompt_logprob_token_ids": [[1]] * 4, "prompt_logprob_start": 4}, 400, "sampling_params.prompt"),
        ("sampling", {"max_tokens": 41}, 413, "sampling_params"),
        ("sampling", {"top_p": -1}, 400, "sampling_params"),
        ("sampling", {"repetition_penalty": 1.2}, 400, "sampling_params.repetition_penalty"),
        ("sampling", {"stop_token_ids": list(range(9))}, 400, "sampling_params"),
    ],
)
def test_a_bad_generate_request_is_refused_by_name(client, path, change, status, field):
    body = vllm_request(np.arange(5))
    (body["sampling_params"] if path else body).update(change)  # type: ignore[attr-defined]
    response = client.post("/inference/v1/generate", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, status), error
    assert error["param"].startswith(field), error


def test_mutated_requests_get_a_reason_and_never_a_failure(client, service, sequences):
    """Bytes of a sound request, changed, cut and repeated: each is answered, or refused with its reason."""
    ids = [np.zeros((length - start, 2), np.int32) for start, length in zip(STARTS, LENGTHS, strict=True)]
    sound = wire.encode_request(
        TargetsRequest(targets="at_ids", sequences=sequences, starts=STARTS, entries=2, ids=ids)
    )
    arrays, metadata = wire.decode(sound)
    vllm = json.dumps(vllm_request(sequences[3], prompt_logprobs=1)).encode()
    rng = np.random.default_rng(0)

    def mutations() -> Iterator[tuple[str, bytes]]:
        for original, path in ((sound, "/v1/targets"), (vllm, "/inference/v1/generate"), (vllm, "/v1/rollouts")):
            for _ in range(40):
                changed = bytearray(original)
                for place in rng.integers(0, min(len(changed), 400), rng.integers(1, 4)):
                    changed[place] = rng.integers(0, 256)
                yield path, bytes(changed[: rng.integers(0, len(changed))] if rng.random() < 0.3 else changed)
        extremes = {
            "lengths": (np.array([-1, 1, 2, 3]), np.array([2**31 - 1] * 4), np.zeros(0)),
            "starts": (np.array([-1, 0, 0, 0]), np.array([0, 1, 0, 0]), np.zeros((2, 2))),
            "tokens": (np.full(186, -1), np.full(186, service.vocab_size), np.zeros(0)),
            "ids": (np.full((1, 2), 0), np.full((186, 2), 2**31 - 1), np.zeros((66, 0))),
        }
        for field, values in extremes.items():
            for value in values:
                yield "/v1/targets", wire.encode({**arrays, field: value.astype(np.int32)}, metadata)
            yield "/v1/targets", wire.encode({**arrays, field: arrays[field].astype(np.float32)}, metadata)
            yield "/v1/targets", wire.encode({k: v for k, v in arrays.items() if k != field}, metadata)
        for kind in ("top_k", "sampled", "hidden", "", "__import__('os')", "../.."):
            yield "/v1/targets", wire.encode(arrays, {"targets": kind})
        for k in ("0", "-1", "9" * 5_000, "٣", "1e3", "9"):
            some = {name: arrays[name] for name in ("tokens", "lengths", "starts")}
            yield "/v1/targets", wire.encode(some, {"targets": "top_k", "k": k})
        for body in (b"[" * 50_000, b"{" * 200, b"null", b"\xff" * 9, b"9" * 20_000, b"0" * 40_001):
            yield from ((path, body) for path in ("/v1/targets", "/v1/rollouts", "/inference/v1/generate"))

    tried = refused = 0
    for path, body in mutations():
        response = client.post(path, content=body)
        tried += 1
        if response.status_code != 200:
            assert 400 <= response.status_code < 500, (path, body[:400], response.text)
            assert response.json()["error"]["message"]
            refused += 1
    assert tried >= 170
    assert refused > 100
    assert client.post("/v1/targets", content=sound).status_code == 200


def test_what_is_admitted_is_counted_until_its_answer_is_sent():
    admission = queues.Admission(dataclasses.replace(LIMITS_OF_ONE, max_held_bytes=40_000), Metrics())
    with (
        admission.admitted(10),
        pytest.raises(wire.Refused, match=r"queue is full \(max_queue_requests 1\)"),
        admission.admitted(10),
    ):
        pass
    with (
        admission.admitted(10),
        admission.asked(30_000),
        pytest.raises(wire.Refused, match=r"queue holds too many bytes \(max_held_bytes 40000\)"),
        admission.asked(10_001),
    ):
        pass
    # An answer is there, however large; while it is, nothing more is read.
    with admission.answered(50_000), pytest.raises(wire.Refused, match="max_held_bytes"), admission.asked(1):
        pass
    with admission.asked(40_000):
        pass


def test_an_answer_is_sent_in_parts_and_a_reader_that_stalls_is_given_up(service, monkeypatch):
    monkeypatch.setattr(calls, "_STALLED_SECONDS", 0.1)
    sent: list[dict] = []
    held: list[int] = []

    async def send(message):
        sent.append(message)
        held.append(service.admission._bytes)
        if len(sent) > 4:
            await asyncio.sleep(5)

    body = bytes(range(256)) * 3_000
    asyncio.run(calls.Sending(send, service)({"type": "http.response.body", "body": body}))
    assert b"".join(message["body"] for message in sent) == body
    assert [message["more_body"] for message in sent] == [True, True, True, False]
    assert held == [len(body)] * 4
    with pytest.raises(TimeoutError):
        asyncio.run(calls.Sending(send, service)({"type": "http.response.body", "body": body}))
    assert service.admission._bytes == 0


def test_a_request_for_too_many_tokens_is_refused_before_it_runs(client):
    params = {"max_new_tokens": 40}
    one = {"prompt_ids": [1] * 80, "prompt_id": "0", "sample_index": 0, "mode": "non_thinking", "params": params}
    response = client.post("/v1/rollouts", json={"seed": 0, "requests": [one] * 5})
    assert response.status_code == 413
    assert "600 tokens; this server takes at most 512 in one request (max_request_tokens)" in response.text
    body = vllm_request(np.arange(80), max_tokens=40, n=5)
    assert client.post("/inference/v1/generate", json=body).json()["error"]["code"] == 413


def test_what_generates_is_part_of_the_memory_that_is_checked(service, monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 5 * 2**30, "bytes_in_use": 2**30}

    class Devices:
        local_devices = (Device(),)

    assert checked_memory(2**30, 2**30, Devices(), prefixes=2**30) == 4 * 2**30
    with pytest.raises(UserError, match=r"up to 2\.0 GiB .* prefixes 1\.0 and generating 1\.5, of 4\.0 that are left"):
        checked_memory(2**30, 3 * 2**29, Devices(), prefixes=2**30)
    pages = 8 * 120 * 2 * 16 * 4  # slots, tokens of each, keys and values, their size
    assert service.device_bytes > pages

    class Program:
        def lower(self, *_, **__):
            return self

        compile = lower

        def memory_analysis(self):
            return types.SimpleNamespace(temp_size_in_bytes=3, output_size_in_bytes=5, alias_size_in_bytes=1)

    # The layers beside the stacks that they are copies of, and a program and pages for each group.
    engine = service.generation._engine
    monkeypatch.setattr("qwen3.generation.engine._prefill", Program())
    monkeypatch.setattr(engine, "_decode", Program())
    held = service.generation.device_bytes() - sum(leaf.nbytes for leaf in jax.tree.leaves(service._model.stacks))
    a_group = engine.programs(service._model, [SamplingParams(max_new_tokens=1)]).decode_arguments[2]
    assert held == engine._most_groups * (7 + sum(leaf.size * leaf.dtype.itemsize for leaf in a_group))
