"""Answers as vLLM's and SGLang's sources write them, quirks and refusals included: neither program runs here.

vLLM 0.33: vllm/entrypoints/serve/disagg/protocol.py and serving.py (fields, `token_id:N`), vllm/v1/engine/logprobs.py
(the realised token first, k or k + 1 entries), clamp_prompt_logprobs (-9999 for the logarithm of 0),
docs/training/prompt_token_id_logprobs.md (rows, padding, None). SGLang 0.5.23: managers/io_struct.py,
managers/tokenizer_manager.py (entries, the first without a log-probability; orjson writes null for infinities),
managers/schedule_batch.py (finish reasons).
"""

import base64
import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qwen3.chat.chat import ChatTokenizer
from qwen3.errors import UserError
from qwen3.generation.engine import Request as Wanted
from qwen3.generation.sampling import SamplingParams
from teacher.client import TeacherClient
from teacher.dialects import DIALECTS, Asked
from teacher.serve.app import Standing, make_app
from teacher.servers import NoAnswer
from teacher.token_client import TokenClient
from teacher.wire import TargetsRequest
from tests.teacher.serving import serving_app

VLLM, SGLANG = DIALECTS["vllm"], DIALECTS["sglang"]
TOKENS = [11, 12, 13, 14]


def npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def npz(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.savez(file, array)
    return base64.b64encode(file.getvalue()).decode()


def entry(logprob: float | None, rank: int, text: str | None = None) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}


def of_vllm(**fields: Any) -> bytes:
    """vLLM's answer about TOKENS with prompt_logprobs 2."""
    answer = {
        "request_id": "generate-tokens-8d2e", "prompt_token_ids": None, "kv_transfer_params": None,
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "length", "token_ids": [3]}],
        "prompt_logprobs": [
            None,
            {"12": entry(-0.25, 1), "7": entry(-2.0, 2)},
            # The realised token is none of the likeliest.
            {"13": entry(-9999.0, 290, "the"), "5": entry(-0.5, 1, "a"), "6": entry(-1.0, 2, "b")},
            {"14": entry(-1.0, 2), "2": entry(-0.75, 1)},
        ],
        "prompt_token_id_logprobs": None,
    }  # fmt: skip
    return json.dumps(answer | fields).encode()


def test_vllms_rows_begin_with_the_second_token_and_name_the_realised_one_first():
    said = VLLM.said(of_vllm(), Asked(TOKENS, 0, 2))
    np.testing.assert_array_equal(said.top_ids, [[12, 7], [5, 6], [2, 14]])
    np.testing.assert_array_equal(said.top_logprobs, np.float32([[-0.25, -2], [-0.5, -1], [-0.75, -1]]))
    np.testing.assert_array_equal(said.following, np.float32([-0.25, -np.inf, -1]))
    # From a position on.
    np.testing.assert_array_equal(VLLM.said(of_vllm(), Asked(TOKENS, 2, 2)).top_ids, [[2, 14]])


def test_vllms_matrix_at_ids_is_read_beside_the_likeliest():
    ids = np.asarray([[3, -1], [9, 4]], np.int32)
    scores = np.float32([[-1.5, -np.inf], [-3, -4]])
    body = of_vllm(prompt_token_id_logprobs=npy(scores))
    said = VLLM.said(body, Asked(TOKENS, 1, 2, ids))
    np.testing.assert_array_equal(said.at_ids, scores)
    np.testing.assert_array_equal(said.top_ids, [[5, 6], [2, 14]])
    request = VLLM.scoring("m", Asked(TOKENS, 1, 2, ids))
    assert request == {
        "model": "m",
        "token_ids": TOKENS,
        "sampling_params": {
            "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 2, "detokenize": False,
            "prompt_logprob_token_ids": [[3, -1], [9, 4]], "prompt_logprob_start": 1,
        },
    }  # fmt: skip
    for wrong, match in [
        (of_vllm(), r"no prompt_token_id_logprobs; it takes vLLM 0\.33 with VLLM_USE_V2_MODEL_RUNNER=1"),
        (of_vllm(prompt_token_id_logprobs=npy(scores[:1])), r"are \[1, 2\] where \[2, 2\] were asked"),
        (of_vllm(prompt_token_id_logprobs="AAAA"), r"no \.npy file"),
        (of_vllm(prompt_token_id_logprobs=npz(scores)), r"no \.npy file"),
        (of_vllm(prompt_token_id_logprobs=npy(scores.astype(str))), r"are <U\d+ where floating-point numbers"),
        (of_vllm(prompt_token_id_logprobs=base64.b64encode(b"\x93NUMPY\x01\x00").decode()), r"no \.npy file"),
    ]:
        with pytest.raises(UserError, match=match):
            VLLM.said(wrong, Asked(TOKENS, 1, 2, ids))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (of_vllm(prompt_logprobs=None), r"gives no prompt_logprobs of all tokens; it takes vLLM 0\.32 or newer"),
        (of_vllm(prompt_logprobs=[None, {"12": entry(-0.1, 1)}]), r"no prompt_logprobs of all tokens"),
        (of_vllm(prompt_logprobs=[None, None, None, None]), r"of other tokens than were sent"),
        (of_vllm(prompt_logprobs=[None, *[{str(one): entry(-0.1, 1)} for one in TOKENS[1:]]]), r"names 1 tokens .* 2"),
        (
            of_vllm(prompt_logprobs=[None, *[{str(one): entry(None, 1), "1": entry(None, 2)} for one in TOKENS[1:]]]),
            r"are no numbers; check the teacher's weights",
        ),
        (b"<html>", r"something else than was documented"),
        (b'{"choices": 3}', r"something else than was documented"),
        (of_vllm(choices=[]), r"something else than was documented: Expected `array` of length >= 1"),
        (of_vllm(choices=[{"index": 0}, {"index": 1}]), r"something else than was documented"),
        (of_vllm(prompt_logprobs=[None, *[{str(2**31): entry(-0.1, 1)}] * 3]), r"something else than was documented"),
        (b'{"choices": "\xff"}', r"something else than was documented"),
    ],
)
def test_what_vllm_must_not_say_is_refused(body, match):
    with pytest.raises(UserError, match=match):
        VLLM.said(body, Asked(TOKENS, 0, 2))


def test_what_vllm_has_generated_is_read_without_its_texts():
    content = [
        {"token": f"token_id:{one}", "logprob": logprob, "bytes": None, "top_logprobs": []}
        for one, logprob in ((4, -0.5), (2, -1.5))
    ]
    choice = {"index": 0, "logprobs": {"content": content}, "finish_reason": "stop", "token_ids": [4, 2]}
    written = VLLM.written(of_vllm(choices=[choice], prompt_logprobs=None))
    assert (written.tokens, written.logprobs) == ([4, 2], [-0.5, -1.5])
    assert VLLM.written(of_vllm(choices=[choice | {"weight_versions": [3, 3]}])).weights_version == "3"
    with pytest.raises(UserError, match="log-probabilities of 0 of 2 generated tokens"):
        VLLM.written(of_vllm(choices=[choice | {"logprobs": None}]))
    with pytest.raises(NoAnswer):
        VLLM.written(of_vllm(choices=[choice | {"finish_reason": "abort", "token_ids": [4]}]))


def of_sglang(**meta: Any) -> bytes:
    """SGLang's answer about TOKENS with logprob_start_len 1 and top_logprobs_num 2."""
    whole = {
        "id": "5c0f", "finish_reason": {"type": "length", "length": 0}, "prompt_tokens": 4, "weight_version": "default",
        "num_retractions": 0, "input_token_logprobs": [[None, 12, None], [None, 13, None], [-1.0, 14, None]],
        "output_token_logprobs": [],
        "input_top_logprobs": [None, [[-0.5, 5, None], [-1.0, 6, "b"]], [[-0.75, 2, None], [None, 14, None]]],
        "output_top_logprobs": [], "completion_tokens": 0, "cached_tokens": 1, "e2e_latency": 0.1,
    }  # fmt: skip
    return json.dumps({"text": "", "output_ids": [], "meta_info": whole | meta}).encode()


def test_sglangs_rows_begin_with_none_and_infinities_are_null():
    said = SGLANG.said(of_sglang(), Asked(TOKENS, 1, 2))
    np.testing.assert_array_equal(said.top_ids, [[5, 6], [2, 14]])
    np.testing.assert_array_equal(said.top_logprobs, np.float32([[-0.5, -1], [-0.75, -np.inf]]))
    np.testing.assert_array_equal(said.following, np.float32([-np.inf, -1]))
    assert said.weights_version == "default"
    assert SGLANG.said(of_sglang(input_top_logprobs=None), Asked(TOKENS, 1)).top_ids.shape == (2, 0)
    assert SGLANG.scoring("m", Asked(TOKENS, 1, 2)) == {
        "input_ids": TOKENS,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 1,
        "top_logprobs_num": 2,
    }


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"input_token_logprobs": None}, "of other tokens than were sent"),
        ({"input_token_logprobs": [[None, 12, None], [-1.0, 14, None], [-1.0, 13, None]]}, "of other tokens"),
        ({"input_top_logprobs": None}, "input_top_logprobs are of 0 tokens, and its input_token_logprobs of 2"),
        ({"input_top_logprobs": [None, None, None]}, "names 0 tokens at a position where 2 were asked for"),
        ({"input_top_logprobs": [None, *[[[None, 1, None], [None, 2, None]]] * 2]}, "are no numbers"),
    ],
)
def test_what_sglang_must_not_say_is_refused(meta, match):
    with pytest.raises(UserError, match=match):
        SGLANG.said(of_sglang(**meta), Asked(TOKENS, 1, 2))


def test_sglang_aborts_and_meets_what_is_no_number_with_status_200():
    with pytest.raises(NoAnswer):
        SGLANG.written(of_sglang(finish_reason={"type": "abort", "message": "Aborted", "status_code": 503}))
    with pytest.raises(UserError, match="logits are no numbers"):
        SGLANG.written(of_sglang(finish_reason={"type": "stop", "matched": "NaN happened"}))


def test_sampling_params_go_over_one_by_one():
    params = SamplingParams(max_new_tokens=9, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1)
    whole = SamplingParams(max_new_tokens=9)
    assert VLLM.generating("m", TOKENS, params, 5, (2, 3), 7)["sampling_params"] == {
        "max_tokens": 5, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "seed": 7, "ignore_eos": True,
        "stop_token_ids": [2, 3], "logprobs": 0, "detokenize": False,
    }  # fmt: skip
    assert VLLM.generating("m", TOKENS, whole, 5, (), 7)["sampling_params"]["top_k"] == 0
    assert SGLANG.generating("m", TOKENS, params, 5, (2, 3), 7)["sampling_params"] == {
        "max_new_tokens": 5, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "sampling_seed": 7,
        "ignore_eos": False, "stop_token_ids": [2, 3], "skip_special_tokens": False,
    }  # fmt: skip
    sampling = SGLANG.generating("m", TOKENS, whole, 5, (), 7)["sampling_params"]
    assert (sampling["top_k"], sampling["ignore_eos"]) == (-1, True)


@dataclasses.dataclass
class Bigrams:
    """A teacher that looks at one token, behind vLLM's fields; in float64."""

    tokenizer: ChatTokenizer
    logprobs_mode: str = "raw_logprobs"
    max_logprobs: int = 20
    max_model_len: int | str = 4096
    aborts: int = 0
    """Answers that it lets go of before it gives any."""
    loads: int = 0
    """Answers of 503 before it gives any."""
    name: str = "Teacher"
    lacks: tuple[str, ...] = ()
    """Paths that are not there."""
    token: str = ""
    prepends: tuple[int, ...] = ()
    weights: int | None = None
    """What it calls its weights in an answer."""
    tokenize_status: int = 200
    splits_markers: bool = False
    """Takes `<think>` for text."""
    shifts: int = 0
    """Rows by which the matrix at ids is off; it has none where this is -1."""
    poisons: float = 0.0
    """Added to all log-probabilities of what it generates, and of what is asked for by name."""
    beyond: int = 0
    """Added to the likeliest id."""

    def __post_init__(self) -> None:
        size = self.tokenizer.vocab_size
        self.logits = np.random.default_rng(0).normal(size=(size, size)) * 4

    def logprobs(self, tokens: list[int], temperature: float = 1) -> np.ndarray:
        logits = self.logits[tokens] / temperature
        if self.logprobs_mode == "raw_logits":
            return logits
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def app(self) -> Starlette:
        async def generate(request: Request) -> Response:
            body = await request.json()
            sampling, tokens = body["sampling_params"], body["token_ids"]
            for field in ("prompt_logprobs", "logprobs"):
                if (sampling.get(field) or 0) > self.max_logprobs:
                    return self.refused(
                        f"Requested {field.replace('_', ' ')} of {sampling[field]}, which is greater than max allowed: "
                        f"{self.max_logprobs}"
                    )
            if self.loads:
                self.loads -= 1
                return Response(status_code=503)
            if self.aborts:
                self.aborts -= 1
                return Response(of_vllm(choices=[{"index": 0, "finish_reason": "abort", "token_ids": []}]))
            return JSONResponse(self.answer(tokens, sampling))

        async def card(request: Request) -> Response:
            if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
                return JSONResponse({"error": "Unauthorized"}, 401)  # as vLLM's --api-key has it
            card = {"id": self.name, "owned_by": "vllm", "root": "org/Teacher", "max_model_len": self.max_model_len}
            return JSONResponse({"object": "list", "data": [card]})

        async def version(request: Request) -> Response:
            return JSONResponse({"version": "0.33.0"})

        async def tokenize(request: Request) -> Response:
            text = (await request.json())["prompt"]
            tokens = self.tokenizer.encode(text.replace("<think>", "< think>") if self.splits_markers else text)
            return JSONResponse({"tokens": [*self.prepends, *tokens]}, self.tokenize_status)

        paths = {
            "/v1/models": card, "/version": version, "/tokenize": tokenize, "/inference/v1/generate": generate,
        }  # fmt: skip
        return Starlette(
            routes=[Route(path, one, methods=["GET", "POST"]) for path, one in paths.items() if path not in self.lacks]
        )

    def refused(self, message: str) -> Response:
        error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
        return JSONResponse({"error": error}, 400)

    def answer(self, tokens: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        rows: list[Any] = [None]
        for one, row in zip(tokens[1:], self.logprobs(tokens[:-1]), strict=True):
            best = np.argsort(-row, kind="stable")[: sampling.get("prompt_logprobs", 0)].tolist()
            named = {str(token): entry(float(row[token]), 0) for token in [one, *best]}
            if self.beyond and best:
                named[str(best[0] + self.beyond)] = entry(0.0, 1)
            rows.append(named)
        temperature = sampling["temperature"] if self.logprobs_mode == "processed_logprobs" else 1
        rng, written = np.random.default_rng(sampling.get("seed")), []
        top_k = sampling.get("top_k") or self.tokenizer.vocab_size
        for _ in range(sampling["max_tokens"]):
            logits = self.logits[[*tokens, *written][-1]] / sampling["temperature"]
            kept = np.where(logits >= np.sort(logits)[-top_k], logits, -np.inf)
            written.append(int(np.argmax(kept + rng.gumbel(size=logits.shape))))
        said = self.logprobs([*tokens, *written][len(tokens) - 1 : -1], temperature) + self.poisons
        if self.logprobs_mode == "processed_logprobs":
            # Of what top_k has left.
            said -= np.log(np.sort(np.exp(said), axis=-1)[:, -top_k:].sum(-1, keepdims=True))
        content = [
            {"token": f"token_id:{one}", "logprob": float(row[one])} for one, row in zip(written, said, strict=True)
        ]
        choice = {
            "index": 0, "finish_reason": "length", "token_ids": written, "logprobs": {"content": content},
            "weight_versions": self.weights and [self.weights],
        }  # fmt: skip
        answer = {"choices": [choice], "prompt_logprobs": rows if "prompt_logprobs" in sampling else None}
        if "prompt_logprob_token_ids" in sampling and self.shifts >= 0:
            scores = self.logprobs(tokens[sampling["prompt_logprob_start"] : -1])
            named = np.take_along_axis(scores, np.asarray(sampling["prompt_logprob_token_ids"]), axis=-1)
            answer["prompt_token_id_logprobs"] = npy(np.roll(named, self.shifts, axis=0).astype(np.float32))
        return answer


@pytest.fixture(scope="module")
def tokenizer(reciting_folder: str) -> ChatTokenizer:
    return ChatTokenizer.from_folder(reciting_folder)


@contextlib.contextmanager
def client_of(server: Bigrams) -> Iterator[TokenClient]:
    with serving_app(server.app()) as url:
        size = server.tokenizer.vocab_size
        client = TokenClient("vllm", [url], server.tokenizer, vocab_size=size, outage_seconds=5)
        with contextlib.closing(client):
            yield client


def test_targets_are_those_of_a_float64_oracle_and_what_is_let_go_of_is_asked_again(tokenizer):
    server = Bigrams(tokenizer)
    tokens = np.random.default_rng(1).integers(0, tokenizer.vocab_size, 30).astype(np.int32)
    with client_of(server) as client:
        assert client.notes == []
        server.aborts = 2
        (answer,) = client.targets(TargetsRequest(targets="top_k", sequences=[tokens], starts=[4], entries=20))
        assert server.aborts == 0
    logprobs = server.logprobs(tokens[4:-1].tolist())
    best = np.argsort(-logprobs, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(answer["ids"][:-1], best)
    likeliest = np.take_along_axis(logprobs, best, axis=-1)
    np.testing.assert_allclose(answer["logprobs"][:-1], likeliest, rtol=1e-6)
    np.testing.assert_allclose(np.exp(answer["log_tail"][:-1]), 1 - np.exp(likeliest).sum(-1), atol=1e-6)


def test_a_tail_that_is_rounding_is_no_infinity(tokenizer):
    server = Bigrams(tokenizer)
    server.logits[5, 7] = 100
    with client_of(server) as client:
        request = TargetsRequest(targets="top_k", sequences=[np.int32([5, 7, 5])], starts=[0], entries=2)
        (answer,) = client.targets(request)
    np.testing.assert_allclose(answer["log_tail"][0], np.log(2.0**-24), rtol=1e-6)
    assert np.isfinite(answer["log_tail"]).all()
    for poison in (np.nan, np.inf):
        with pytest.raises(UserError, match="they are no log-probabilities"):
            client._log_tail(np.float32([[-1, -2], [poison, -2]]))


def test_another_teacher_is_seen_though_its_connection_is_not_new_when_it_answers(tokenizer):
    request = TargetsRequest(targets="top_k", sequences=[np.int32([1, 2, 3])], starts=[0], entries=2)
    with serving_app(Bigrams(tokenizer).app()) as url:
        client = TokenClient("vllm", [url], tokenizer, vocab_size=tokenizer.vocab_size, outage_seconds=20)
        port = int(url.rpartition(":")[2])
    other = Bigrams(tokenizer, name="Other", loads=2)
    with (
        contextlib.closing(client),
        serving_app(other.app(), port=port),
        pytest.raises(UserError, match="serves another teacher than was expected: it differs in model"),
    ):
        client.targets(request)
    assert other.loads == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logprobs_mode": "processed_logprobs"}, r"than of the same tokens in a prompt .*-mode raw_logprobs"),
        ({"logprobs_mode": "raw_logits"}, r"add up to .*: they are no log-probabilities; .*-mode raw_logp"),
        ({"lacks": ("/inference/v1/generate",)}, r"has no /inference/v1/generate: it takes vLLM 0\.32 or newer"),
        ({"lacks": ("/version",)}, r"does not say of itself what vLLM does; say in teacher\.server which program"),
        ({"prepends": (0,)}, r"has other tokens for a text than the tokenizer in .*reciting"),
        ({"splits_markers": True}, r"has other tokens for a text than the tokenizer in .*reciting"),
        ({"beyond": 10**6}, r"names token 100\d{4}, but the teacher's config\.json has vocab_size \d+; name a folder"),
        ({"max_model_len": "long"}, r"does not say of itself what vLLM does; say in teacher\.server which program"),
        ({"token": "geheim"}, r"asks for a token .*; set the environment variable TEACHER_TOKEN"),
    ],
    ids=str,
)  # fmt: skip
def test_a_server_that_says_something_else_than_the_teacher_is_refused_in_one_line(tokenizer, change, match):
    with pytest.raises(UserError, match=match) as raised, client_of(Bigrams(tokenizer, **change)):
        pass
    assert "\n" not in str(raised.value)
    assert "geheim" not in str(raised.value)


def test_what_cannot_be_made_sure_of_is_noted(tokenizer, monkeypatch):
    monkeypatch.setenv("TEACHER_TOKEN", "geheim")
    with client_of(Bigrams(tokenizer, lacks=("/tokenize",), token="geheim")) as client:
        (note,) = client.notes
        assert f"has no /tokenize: its tokenizer is taken for that of {tokenizer.folder}" in note


@pytest.mark.parametrize("status", [400, 501])
def test_a_server_that_does_not_tokenise_is_noted(tokenizer, status):
    with client_of(Bigrams(tokenizer, tokenize_status=status)) as client:
        (note,) = client.notes
        assert "has no /tokenize" in note


def test_a_teacher_that_is_sure_of_everything_is_noted(tokenizer):
    server = Bigrams(tokenizer)
    server.logits *= 100
    with client_of(server) as client:
        (note,) = client.notes
    assert "too sure of what it generates to tell" in note


def test_other_weights_than_the_first_are_refused(tokenizer):
    server = Bigrams(tokenizer, weights=1)
    request = TargetsRequest(targets="top_k", sequences=[np.int32([1, 2, 3])], starts=[0], entries=2)
    with client_of(server) as client:
        client.targets(request)
        server.weights = 2
        with pytest.raises(UserError, match=r"answers with the weights 2, and the teacher was 1; serve those again"):
            client.targets(request)


def test_a_sampled_token_without_a_log_probability_is_refused(tokenizer):
    server, params = Bigrams(tokenizer), SamplingParams(max_new_tokens=3, stop_ids=())
    request = Wanted(prompt_ids=[1, 2], prompt_id="a", sample_index=0, mode="non_thinking", params=params)
    with client_of(server) as client:
        assert np.isfinite(client.rollouts([request], seed=0)[0].sampler_logprobs).all()
        server.poisons = -1e5  # as vLLM writes what is no number
        with pytest.raises(UserError, match=r"gives no log-probability of a token that it has sampled"):
            client.rollouts([request], seed=0)


def test_limits_are_tried_before_anything_is_spent(tokenizer):
    with client_of(Bigrams(tokenizer, shifts=-1)) as client:
        client.check(
            [("stages.off_policy.top_k", 20, "max_top_k"), ("prompt and response", 4_095, "max_sequence_tokens")]
        )
        with pytest.raises(
            UserError,
            match=r"stages\.off_policy\.top_k need 64 tokens a position: .* status 400: Requested prompt logprobs of "
            r"64, which is greater than max allowed: 20; start it with --max-logprobs 64, or lower the field",
        ):
            client.check([("stages.off_policy.top_k", 64, "max_top_k"), ("stages.other.top_k", 9, "max_top_k")])
        with pytest.raises(
            UserError, match=r"prompt and response needs 4096 tokens, .* scores 4095; .* --max-model-len 4097"
        ):
            client.check([("prompt and response", 4_096, "max_sequence_tokens")])
        # Its version has none.
        with pytest.raises(UserError, match=r"/inference/v1/generate: it gives no prompt_token_id_logprobs"):
            client.check([("stages.on_policy.targets.k", 17, "max_ids")])
        with pytest.raises(UserError, match=r"vLLM's server gives no targets of kind hidden; it gives at_ids, top_k"):
            client.targets(TargetsRequest(targets="hidden", sequences=[np.int32([1, 2])], starts=[0]))
        with pytest.raises(UserError, match=r"gives no output matrix; take python -m teacher\.serve"):
            _ = client.head


def test_what_is_named_is_held_against_the_prompt_and_refusals_are_blamed_on_what_they_are_about(tokenizer):
    asked = [("stages.on_policy.targets.k", 16, "max_top_k"), ("stages.on_policy.targets.k", 17, "max_ids")]
    with client_of(Bigrams(tokenizer)) as client:
        client.check(asked)
    with (
        client_of(Bigrams(tokenizer, shifts=1)) as client,
        pytest.raises(
            UserError, match=r"other log-probabilities of tokens that are asked for by name than of the same"
        ),
    ):
        client.check(asked)
    server = Bigrams(tokenizer)
    with client_of(server) as client:
        server.max_logprobs = 0
        with pytest.raises(UserError, match="has refused with status 400") as raised:
            client.check(asked)
        assert "--max-logprobs" not in str(raised.value)


def test_each_client_says_whose_server_it_has_met(tokenizer, reciting):
    with (
        serving_app(Bigrams(tokenizer).app()) as url,
        pytest.raises(UserError, match=r"say in teacher\.server which oth"),
    ):
        TeacherClient([url])
    with serving_app(make_app(Standing(reciting))) as url:
        for program in DIALECTS:
            with pytest.raises(UserError, match=r"does not say of itself what .* does; say in teacher\.server which"):
                TokenClient(program, [url], tokenizer, vocab_size=tokenizer.vocab_size)
