"""Servers of vLLM and SGLang as teachers: what a scorer and an engine here would say, or one line that says why not."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from qwen3.checkpoint import hf
from qwen3.errors import UserError
from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import MODES, Rollout
from qwen3.sharding import MeshShape, make_mesh
from teacher.dialects import Program
from teacher.identity import StatedIdentity
from teacher.scoring import Scorer
from teacher.serve.app import Standing, make_app
from teacher.serve.service import Service
from teacher.served import ServedModel, ServedScorer
from teacher.token_client import TokenClient
from teacher.wire import TargetsRequest
from tests.teacher.dressed import MOST_TOKENS, Dress, as_sglang, as_vllm
from tests.teacher.serving import serving_app

DRESSES: dict[Program, Dress] = {"vllm": as_vllm, "sglang": as_sglang}
PROGRAMS = list(DRESSES)


@pytest.fixture(scope="module")
def clients(reciting: Service) -> Iterator[dict[Program, TokenClient]]:
    with contextlib.ExitStack() as opened:
        found = {}
        for program, dress in DRESSES.items():
            url = opened.enter_context(serving_app(dress(make_app(Standing(reciting)), reciting)))
            client = TokenClient(program, [url], reciting.tokenizer, vocab_size=reciting.vocab_size, outage_seconds=5)
            found[program] = opened.enter_context(contextlib.closing(client))
        yield found


@pytest.fixture(scope="module")
def rollouts(reciting: Service) -> list[Rollout]:
    """Of random tokens; the last of them has no position that carries a target."""
    rng, found = np.random.default_rng(0), []
    for number, (prompt, response) in enumerate([(2, 30), (40, 1), (1, 1), (17, 60), (5, 0)]):
        length = prompt + response
        mask = (np.arange(length) >= prompt - 1) & (np.arange(length) < length - 1)
        found.append(
            Rollout(
                tokens=rng.integers(0, reciting.vocab_size, length).astype(np.int32), prompt_length=prompt,
                loss_mask=mask, sampler_logprobs=np.zeros(length, np.float32), mode=MODES[number % 2],
                prompt_id=str(number), sample_index=0, policy_step=0, finished=True,
            )
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def scorer(reciting_folder: str) -> Scorer:
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    return Scorer(hf.load(reciting_folder, mesh=mesh), mesh)


def served(client: TokenClient, scorer: Scorer) -> ServedScorer:
    return ServedScorer(ServedModel(client=client, config=scorer._model.config), scorer._mesh)


def assert_same_tails(found: np.ndarray, expected: np.ndarray) -> None:
    """As masses, which float32 logits of 20 leave to 2e-6; never nothing."""
    np.testing.assert_allclose(np.exp(found), np.exp(expected), atol=3e-6)
    assert (found >= np.float32(np.log(2.0**-24))).all()


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_likeliest_tokens_and_the_tail_are_those_of_a_scorer_here(program, clients, scorer, rollouts):
    shape = {"rows": 4, "length": 128, "pad_id": 0}
    expected = scorer.score_rollouts(rollouts, k=5, **shape)
    for one, other in zip(
        served(clients[program], scorer).score_rollouts(rollouts, k=5, **shape), expected, strict=True
    ):
        kept = one.rollout.loss_mask
        assert one.rollout is other.rollout
        np.testing.assert_array_equal(one.ids[kept], other.ids[kept])
        # float32 sums in another order.
        np.testing.assert_allclose(one.logprobs[kept], other.logprobs[kept], atol=2e-5)
        assert_same_tails(one.log_tail[kept], other.log_tail[kept])
        # What is not known is a proper distribution, for the sake of gradients.
        mass = np.exp(one.logprobs[-1].astype(np.float64)).sum() + np.exp(one.log_tail[-1].astype(np.float64))
        assert mass == pytest.approx(1)


def test_vllm_says_what_a_scorer_says_at_the_students_ids(clients, scorer):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, scorer._model.config.vocab_size, (2, 40)).astype(np.int32)
    segments = np.zeros((2, 40), np.int32)
    segments[0, :25], segments[0, 25:38], segments[1, :33] = 1, 2, 1
    positions = np.concatenate([np.r_[0:25, 0:13, 0:2][None], np.r_[0:33, 0:7][None]]).astype(np.int32)
    # No token follows the last position of a document.
    wanted = (segments > 0) & (np.roll(segments, -1, axis=1) == segments) & (positions >= 4)
    ids = rng.integers(0, scorer._model.config.vocab_size, (2, 40, 6)).astype(np.int32)
    ids[:, :, 3] = ids[:, :, 1]
    ids[:, ::5, 2] = -1
    expected = scorer.at_ids(tokens, positions, segments, ids, wanted, top_k=4)
    found = served(clients["vllm"], scorer).at_ids(tokens, positions, segments, ids, wanted, top_k=4)
    ours, theirs = (
        {name: np.asarray(getattr(one, name))[wanted] for name in ("ids", "logprobs", "log_tail")}
        for one in (found, expected)
    )
    np.testing.assert_array_equal(ours["ids"], theirs["ids"])
    np.testing.assert_allclose(ours["logprobs"], theirs["logprobs"], atol=2e-5)
    assert_same_tails(ours["log_tail"], theirs["log_tail"])
    # Elsewhere nothing is named, and all mass is in the tail.
    assert (np.asarray(found.ids)[~wanted] == -1).all()
    assert (np.asarray(found.log_tail)[~wanted] == 0).all()


def asked(service: Service, **params: Any) -> list[Request]:
    return [
        Request(
            prompt_ids=service.tokenizer.prompt_ids([{"role": "user", "content": text}], mode),
            prompt_id=text,
            sample_index=0,
            mode=mode,
            params=SamplingParams(**params),
        )
        for mode in MODES
        for text in ("H", "two and three")
    ]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("params", "forced"),
    [
        ({"max_new_tokens": 40}, False),
        ({"max_new_tokens": 60, "thinking_budget": 2}, True),
        ({"max_new_tokens": 60, "thinking_budget": 0}, True),
        # The forced text does not fit.
        ({"max_new_tokens": 5, "thinking_budget": 1}, True),
        # Thinking ends before its budget does.
        ({"max_new_tokens": 60, "thinking_budget": 30}, False),
        ({"max_new_tokens": 60, "thinking_budget": 5}, False),
        ({"max_new_tokens": 12, "stop_ids": ()}, False),
    ],
    ids=str,
)
def test_what_it_generates_ends_and_is_masked_as_what_an_engine_generates(program, clients, reciting, params, forced):
    requests = asked(reciting, temperature=0, **params)
    expected = reciting.generation.submit(requests, seed=0).result(120)
    for found, one in zip(clients[program].rollouts(requests, seed=0), expected, strict=True):
        np.testing.assert_array_equal(found.tokens, one.tokens)
        np.testing.assert_array_equal(found.loss_mask, one.loss_mask)
        np.testing.assert_allclose(found.sampler_logprobs, one.sampler_logprobs, atol=1e-4)
        for field in ("prompt_length", "mode", "prompt_id", "sample_index", "finished"):
            assert getattr(found, field) == getattr(one, field), field
    assert forced == any(not one.loss_mask[one.prompt_length - 1 : -1].all() for one in expected)


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_end_token_of_the_servers_own_does_not_end_what_it_must_not(program, clients, reciting):
    """SGLang stops at its own end tokens wherever others are named; then it is asked to go on."""
    ends = reciting.tokenizer.encode("z")
    requests = asked(reciting, temperature=0, max_new_tokens=50, stop_ids=tuple(ends))
    expected = reciting.generation.submit(requests, seed=0).result(120)
    eos = set(reciting.tokenizer.eos_ids)
    assert any(eos & set(one.response.tolist()) for one in expected)
    for found, one in zip(clients[program].rollouts(requests, seed=0), expected, strict=True):
        np.testing.assert_array_equal(found.tokens, one.tokens)
        assert found.finished == one.finished


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_sampled_depends_on_seed_step_prompt_and_sample(program, clients, reciting):
    client, told = clients[program], []
    (request, *_) = asked(reciting, temperature=2.0, top_p=0.9, top_k=50, min_p=0.001, max_new_tokens=20, stop_ids=())
    again = dataclasses.replace(request, sample_index=1)

    def sampled(*requests: Request, seed: int = 3, step: int = 0) -> list[list[int]]:
        found = client.rollouts(requests, seed=seed, step=step, on_progress=lambda *one: told.append(one))
        return [one.response.tolist() for one in found]

    first, second = sampled(request, again)
    assert told == [(1, 20), (1, 20)]
    assert sampled(again, request) == [second, first]
    assert len({tuple(one) for one in (first, second, *sampled(request, seed=4), *sampled(request, step=1))}) == 4


@pytest.mark.parametrize("program", PROGRAMS)
def test_temperatures_leave_log_probabilities_alone(program, clients, reciting, scorer):
    (request, *_) = asked(reciting, temperature=2.0, max_new_tokens=20, stop_ids=())
    (rollout,) = clients[program].rollouts([request], seed=1)
    (expected,) = scorer.rollout_logprobs([rollout], rows=1, length=128, pad_id=0)
    np.testing.assert_allclose(rollout.sampler_logprobs[rollout.loss_mask], expected[rollout.loss_mask], atol=1e-4)


def test_what_the_servers_say_of_themselves_is_who_they_are(clients, reciting):
    known = clients["vllm"].identity
    assert known.weights == "Teacher (org/Teacher) of vllm 0.33.0"
    assert (known.tokenizer, known.template) == (reciting.identity.tokenizer, reciting.identity.template)
    assert StatedIdentity.from_json(json.loads(json.dumps(dataclasses.asdict(known)))) == known
    assert clients["sglang"].identity.weights == "org/Teacher (org/Teacher default) of sglang 0.5.23"
    assert clients["vllm"].longest_tokens == MOST_TOKENS - 1
    assert clients["sglang"].longest_tokens == MOST_TOKENS
    longest = TargetsRequest(targets="top_k", sequences=[np.zeros(MOST_TOKENS, np.int32)], starts=[0], entries=1)
    assert clients["sglang"].targets(longest)[0]["ids"].shape == (MOST_TOKENS, 1)
    with pytest.raises(UserError, match=r"scores 128; .* --context-length 136, and with memory .*--mem-fraction-stat"):
        clients["sglang"].check([("prompt and response", MOST_TOKENS + 1, "max_sequence_tokens")])


@pytest.mark.parametrize("program", PROGRAMS)
def test_another_teacher_behind_the_same_address_is_refused_at_its_first_answer(program, reciting):
    app, dress = make_app(Standing(reciting)), DRESSES[program]
    request = TargetsRequest(targets="top_k", sequences=[np.arange(9, dtype=np.int32)], starts=[2], entries=3)
    with serving_app(dress(app, reciting)) as url:
        client = TokenClient(program, [url], reciting.tokenizer, vocab_size=reciting.vocab_size)
        (first,) = client.targets(request)
    port = int(url.rpartition(":")[2])
    with contextlib.closing(client):
        # The same one, over a new connection.
        with serving_app(dress(app, reciting), port=port):
            (again,) = client.targets(request)
            np.testing.assert_allclose(again["logprobs"], first["logprobs"], atol=2e-5)
        with (
            serving_app(dress(app, reciting, name="Other"), port=port),
            pytest.raises(UserError, match=r"serves another teacher than was expected: it differs in model, root"),
        ):
            client.targets(request)
    with serving_app(dress(app, reciting)) as one, serving_app(dress(app, reciting, version="0.1")) as other:
        with pytest.raises(UserError, match=r"differs in version; serve the same one there"):
            TokenClient(program, [one, other], reciting.tokenizer, vocab_size=reciting.vocab_size)
        expected = dataclasses.replace(client.identity, weights_version="others")
        with pytest.raises(UserError, match=r"differs in weights_version"):
            TokenClient(program, [one], reciting.tokenizer, vocab_size=reciting.vocab_size, expected=expected)
