"""The openai client itself against a live server: chats, streams, tools, log-probabilities.

The teacher recites (`tests.teacher.reciting`), so that what it says is known to the letter."""

import concurrent.futures
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import jax
import numpy as np
import openai
import pytest

from qwen3.chat.template import ChatTemplate
from qwen3.checkpoint import hf
from qwen3.decoder.model import Qwen3
from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams
from teacher.serve.chats import _plain
from teacher.serve.openai_schemas import CalledFunction, ChatMessage, ToolCall
from tests.teacher.reciting import ANSWER, CALL, SAID, THINKING

# float32 sums in another order.
TOLERANCE = {"atol": 1e-4}
MODEL = "reciting"
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
QUESTION = [{"role": "user", "content": "2+3?"}]


@pytest.fixture(scope="module")
def client(reciting_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{reciting_url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def logprobs(reciting_folder: str):
    """Log-probabilities [T, V] of a sequence, by the model's own whole pass."""
    model, whole = hf.load(reciting_folder), jax.jit(Qwen3.logits)

    def of(ids: list[int]) -> np.ndarray:
        tokens, segments = np.zeros((1, 128), np.int32), np.zeros((1, 128), np.int32)
        tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        logits = whole(model, tokens, np.arange(128, dtype=np.int32)[None], segments)
        return np.asarray(jax.nn.log_softmax(logits))[0, : len(ids)]

    return of


def test_the_readmes_example_answers(reciting_url, capsys):
    readme = Path(__file__).parents[2] / "teacher" / "README.md"
    _, example = re.findall(r"```py\n(.*?)```", readme.read_text(), re.DOTALL)
    names: dict = {}
    exec(example.replace("http://127.0.0.1:8470", reciting_url).replace("Qwen3-32B", MODEL), names)
    assert len(names["answer"].choices[0].logprobs.content[0].top_logprobs) == 5
    assert capsys.readouterr().out
    names["client"].close()


def test_a_chat_thinks_speaks_and_calls_in_fields_of_their_own(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[ADD], temperature=0, seed=1)
    (choice,) = answer.choices
    message = choice.message
    assert message.reasoning == THINKING.strip("\n")
    assert message.reasoning_content == message.reasoning
    assert message.content == SAID.strip("\n")
    (call,) = message.tool_calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments) == json.loads(CALL)["arguments"]
    assert "ü" in call.function.arguments
    assert choice.finish_reason == "tool_calls"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    # The next turn takes it up again.
    turns = [
        *QUESTION,
        message.model_dump(exclude_none=True),
        {"role": "tool", "content": "5", "tool_call_id": call.id},
    ]
    again = client.chat.completions.create(model=MODEL, messages=turns, tools=[ADD], max_tokens=2, temperature=0)
    assert again.choices[0].finish_reason == "length"
    # Without tools, or where none is to be called, what it writes is text.
    for how in ({}, {"tools": [ADD], "tool_choice": "none"}):
        answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, **how)
        assert answer.choices[0].message.content == f"{SAID}<tool_call>{CALL}</tool_call>".lstrip("\n")
        assert answer.choices[0].finish_reason == "stop"


def test_a_turn_that_only_calls_has_an_empty_text_for_templates():
    """Qwen3's original template adds its content to a text."""
    call = ToolCall(function=CalledFunction(name="add", arguments="{}"))
    turn = _plain(0, ChatMessage(role="assistant", content=None, tool_calls=[call]))
    template = ChatTemplate("{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}", "here")
    assert template.render([turn]) == "assistant:"


def told(events) -> tuple[dict[str, str], list, str]:
    """What a stream of one choice has told: texts by field, calls, and how it ended."""
    texts = {"reasoning": "", "content": ""}
    calls, finish = [], None
    for event in events:
        for choice in event.choices:
            for field in texts:
                texts[field] += getattr(choice.delta, field, None) or ""
            calls += choice.delta.tool_calls or []
            finish = choice.finish_reason or finish
    return texts, calls, finish


def test_a_streamed_chat_is_the_whole_one_in_pieces(client):
    how = {"model": MODEL, "messages": QUESTION, "tools": [ADD], "temperature": 0}
    whole = client.chat.completions.create(**how)
    events = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    texts, (call,), finish = told(events)
    message = whole.choices[0].message
    assert texts == {"reasoning": message.reasoning, "content": message.content}
    assert (call.index, call.function) == (0, type(call.function)(**message.tool_calls[0].function.model_dump()))
    assert finish == "tool_calls"
    assert events[-1].usage == whole.usage
    assert events[-1].choices == []
    assert len({event.id for event in events}) == 1


def test_modes_and_budgets(client, reciting):
    def answer(**how):
        body = {"max_completion_tokens": 80, **how}
        return client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, extra_body=body).choices[0]

    silent = answer(chat_template_kwargs={"enable_thinking": False})
    assert (silent.message.reasoning, silent.message.content, silent.finish_reason) == (None, ANSWER, "stop")
    forced = answer(thinking_token_budget=1, return_token_ids=True)
    stop_text = list(reciting.tokenizer.stop_thinking_ids)
    assert forced.token_ids[1 : 1 + len(stop_text)] == stop_text
    assert forced.message.reasoning.startswith("Considering the limited time by the user")
    assert forced.message.content == ANSWER
    at_once = answer(thinking_token_budget=0).message
    assert (at_once.reasoning, at_once.content) == (forced.message.reasoning, ANSWER)
    assert answer(include_reasoning=False).message.reasoning is None


def test_a_streamed_text_is_the_whole_one_with_no_half_character(client, reciting):
    how = {"model": MODEL, "prompt": "H", "max_tokens": 40, "temperature": 0, "extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**how).choices[0]
    assert whole.text == ANSWER[1:]
    assert whole.finish_reason == "stop"
    assert whole.token_ids[-1] == reciting.tokenizer.eos_ids[0]
    events = list(client.completions.create(**how, stream=True))
    pieces = [event.choices[0] for event in events]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [one for piece in pieces for one in piece.token_ids] == whole.token_ids
    assert pieces[0].prompt_token_ids == reciting.tokenizer.encode("H")
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    assert sum(piece.text != "" for piece in pieces) > 1
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)


def test_stop_strings_and_tokens_cut_the_text_and_end_the_work(client, reciting):
    def answer(stream: bool = False, **how):
        made = client.completions.create(model=MODEL, prompt="H", max_tokens=40, temperature=0, stream=stream, **how)
        if not stream:
            return made.choices[0].text, made.choices[0].finish_reason, made.choices[0].stop_reason, made.usage
        pieces = [event.choices[0] for event in made]
        return "".join(piece.text for piece in pieces), pieces[-1].finish_reason, pieces[-1].stop_reason, None

    cut = ANSWER[1 : ANSWER.index("xy")]
    for stream in (False, True):
        assert answer(stream, stop=["zzz", "xy"])[:3] == (cut, "stop", "xy")
        assert answer(stream, stop="yz!")[:3] == (ANSWER[1:], "stop", None)
        kept = answer(stream, stop="xy", extra_body={"include_stop_str_in_output": True})
        assert kept[:3] == (f"{cut}xy", "stop", "xy")
        (w,) = reciting.tokenizer.encode("w")
        assert answer(stream, extra_body={"stop_token_ids": [w]})[:3] == (cut.removesuffix("w"), "stop", w)
    # The answer up to the y, and no token behind it.
    assert answer(stop="xy")[3].completion_tokens == len(reciting.tokenizer.encode(f"{cut}xy"))
    going_on = answer(extra_body={"ignore_eos": True})
    assert (going_on[1], going_on[3].completion_tokens) == ("length", 40)


def test_samples_are_the_engines_and_repeat_for_a_seed(client, reciting):
    how = {
        "model": MODEL,
        "prompt": [[5, 6, 7], [8, 9]],
        "n": 2,
        "max_tokens": 7,
        "extra_body": {"return_token_ids": True},
    }
    first, again, other = (client.completions.create(**how, seed=seed).choices for seed in (3, 3, 4))
    assert [choice.index for choice in first] == [0, 1, 2, 3]
    assert [choice.token_ids for choice in first] == [choice.token_ids for choice in again]
    assert [choice.token_ids for choice in first] != [choice.token_ids for choice in other]
    assert [choice.prompt_token_ids for choice in first] == [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9]]
    streamed: dict[int, list[int]] = {}
    for event in client.completions.create(**how, seed=3, stream=True):
        for choice in event.choices:
            streamed.setdefault(choice.index, []).extend(choice.token_ids)
    assert [streamed[index] for index in range(4)] == [choice.token_ids for choice in first]


def test_logprobs_of_completions_are_the_models_own(client, reciting, logprobs):
    prompt = reciting.tokenizer.encode("so ü")
    how = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": 6,
        "logprobs": 2,
        "seed": 1,
        "temperature": 0.9,
        "top_p": 0.9,
    }
    more = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    choice = client.completions.create(**how, extra_body=more).choices[0]
    whole = logprobs([*prompt, *choice.token_ids])[len(prompt) - 1 : -1]
    said = choice.logprobs
    assert said.tokens == [f"token_id:{one}" for one in choice.token_ids]
    np.testing.assert_allclose(said.token_logprobs, whole[np.arange(6), choice.token_ids], **TOLERANCE)
    for row, one, top in zip(whole, choice.token_ids, said.top_logprobs, strict=True):
        best = np.argsort(-row)[:2].tolist()
        assert top.keys() == {f"token_id:{token}" for token in (one, *best)}
        np.testing.assert_allclose([top[f"token_id:{token}"] for token in best], row[best], **TOLERANCE)
    streamed = [event.choices[0] for event in client.completions.create(**how, extra_body=more, stream=True)]
    parts = [piece.logprobs for piece in streamed if piece.logprobs is not None]
    assert [one for part in parts for one in part.tokens] == said.tokens
    assert [one for part in parts for one in part.top_logprobs] == said.top_logprobs
    assert [one for part in parts for one in part.text_offset] == said.text_offset


def test_echo_and_prompt_logprobs_are_the_scorers(client, reciting, logprobs):
    text = "so ü is"
    prompt = reciting.tokenizer.encode(text)
    whole = logprobs(prompt)
    how = {"model": MODEL, "prompt": text, "temperature": 0, "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = client.completions.create(**how, extra_body={"prompt_logprobs": 2}).choices[0]
    assert choice.text == text
    assert choice.finish_reason == "length"
    assert "".join(choice.logprobs.tokens).startswith("so ")
    assert (choice.logprobs.token_logprobs[0], choice.logprobs.top_logprobs[0]) == (None, None)
    own = whole[np.arange(len(prompt) - 1), prompt[1:]]
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], own, **TOLERANCE)
    assert choice.prompt_logprobs[0] is None
    for row, one, entries in zip(whole, prompt[1:], choice.prompt_logprobs[1:], strict=False):
        assert entries.keys() == {str(one), *map(str, np.argsort(-row)[:2])}
        assert entries[str(one)]["rank"] == int((row >= row[one]).sum())
        assert entries[str(one)]["decoded_token"] == reciting.tokenizer.decode([one])
        for token, entry in entries.items():
            assert entry["logprob"] == pytest.approx(row[int(token)], abs=1e-4)
    # As evaluation harnesses ask, with a token that they throw away.
    beyond = client.completions.create(**(how | {"max_tokens": 1})).choices[0]
    assert beyond.text.startswith(text)
    assert len(beyond.logprobs.tokens) == len(prompt) + 1
    np.testing.assert_allclose(beyond.logprobs.token_logprobs[1:-1], own, **TOLERANCE)
    streamed = [event.choices[0] for event in client.completions.create(**(how | {"max_tokens": 1}), stream=True)]
    assert "".join(piece.text for piece in streamed) == beyond.text
    assert [one for piece in streamed for one in piece.logprobs.tokens] == beyond.logprobs.tokens
    assert [one for piece in streamed for one in piece.logprobs.text_offset] == beyond.logprobs.text_offset


def test_logprobs_of_chats_are_the_models_own(client, reciting, logprobs):
    more = {"return_token_ids": True, "chat_template_kwargs": {"enable_thinking": False}, "prompt_logprobs": 1}
    how = {
        "model": MODEL,
        "messages": QUESTION,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**how, extra_body=more)
    choice = answer.choices[0]
    whole = logprobs([*answer.prompt_token_ids, *choice.token_ids])
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    rows = whole[len(answer.prompt_token_ids) - 1 : -1]
    for row, token, entry in zip(rows, choice.token_ids, choice.logprobs.content, strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert entry.token == reciting.tokenizer.decode([token])
        assert entry.bytes == (None if "\N{REPLACEMENT CHARACTER}" in entry.token else list(entry.token.encode()))
        np.testing.assert_allclose([one.logprob for one in entry.top_logprobs], np.sort(row)[::-1][:2], **TOLERANCE)
    more.pop("prompt_logprobs")
    streamed = client.chat.completions.create(**how, extra_body=more, stream=True)
    parts = [event.choices[0].logprobs for event in streamed if event.choices[0].logprobs is not None]
    assert [entry for part in parts for entry in part.content] == choice.logprobs.content


@pytest.mark.parametrize(
    ("path", "change", "status", "field"),
    [
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": ""}, 400, "prompt"),
        ("completions", {"prompt": [1, "a"]}, 400, "prompt"),
        ("completions", {"prompt": [True]}, 400, "prompt"),
        ("completions", {"prompt": [[1], [9_999]]}, 400, "prompt"),
        ("completions", {"prompt": [1] * 481}, 413, "prompt"),
        ("completions", {"prompt": [[1]] * 9}, 413, "prompt"),
        ("completions", {"n": 5, "prompt": [[1] * 400] * 4}, 413, "prompt"),
        ("completions", {"max_tokens": 81}, 413, "max_tokens"),
        ("completions", {"logprobs": 9}, 413, "logprobs"),
        ("completions", {"prompt_logprobs": 9}, 413, "prompt_logprobs"),
        ("completions", {"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
        ("completions", {"prompt_logprobs": 1, "temperature": 0.5}, 400, "temperature"),
        ("completions", {"prompt_logprobs": 1, "temperature": 0.5, "max_tokens": 0}, 400, "temperature"),
        ("completions", {"prompt": [-1], "echo": True}, 400, "prompt"),
        ("completions", {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ("completions", {"stop": ""}, 400, "stop"),
        ("completions", {"stop_token_ids": list(range(8))}, 400, "stop_token_ids"),
        ("completions", {"top_p": 0}, 400, "top_p"),
        ("completions", {"temperature": 1e-30}, 400, "temperature"),
        ("completions", {"suffix": "x"}, 400, "suffix"),
        ("completions", {"best_of": 2}, 400, "best_of"),
        ("completions", {"guided_json": {}}, 400, "body"),
        ("completions", {"model": "another"}, 404, "model"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "oracle", "content": "x"}]}, 400, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0]."),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("chat/completions", {"tool_choice": "required"}, 400, "tool_choice"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ("chat/completions", {"logit_bias": {"1": 2}}, 400, "logit_bias"),
        ("chat/completions", {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ("chat/completions", {"min_tokens": 2}, 400, "min_tokens"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs"),
        ("chat/completions", {"chat_template_kwargs": {"custom": 1}}, 400, "chat_template_kwargs"),
        ("chat/completions", {"chat_template": "{{ 1 }}"}, 400, "chat_template"),
        (
            "chat/completions",
            {"thinking_token_budget": 1, "chat_template_kwargs": {"enable_thinking": False}},
            400,
            "thinking_token_budget",
        ),
        ("chat/completions", {"reasoning_effort": "high"}, 400, "reasoning_effort"),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "["}}]}]},
            400,
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(reciting_url, path, change, status, field):
    body = {"prompt": "H"} if path == "completions" else {"messages": QUESTION}
    response = httpx2.post(f"{reciting_url}/v1/{path}", json=body | change)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, status), error
    assert error["param"].startswith(field), error
    # What has no effect is taken.
    assert (
        "max_tokens" not in change
        or httpx2.post(f"{reciting_url}/v1/{path}", json=body | {"user": "me"}).status_code == 200
    )


def test_a_text_that_no_prompt_can_be_is_refused_before_it_is_tokenised(reciting_url, reciting, monkeypatch):
    monkeypatch.setattr(reciting.tokenizer, "encode", None)
    text = "a" * (reciting.tokenizer.longest_token * 480 + 1)
    for path, field, body in (
        ("v1/completions", "prompt", {"prompt": text}),
        ("v1/chat/completions", "messages", {"messages": [{"role": "user", "content": text}]}),
        ("generate", "text", {"text": text}),
    ):
        error = httpx2.post(f"{reciting_url}/{path}", json=body).json()["error"]
        assert (error["code"], error["param"]) == (413, field), error
        assert "characters" in error["message"]


def test_what_fails_in_a_stream_is_told_in_it(client, reciting, monkeypatch):
    def failing(requests, **how):
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_exception(RuntimeError("out of luck"))
        return future

    monkeypatch.setattr(reciting.generation, "submit", failing)
    with pytest.raises(openai.APIError, match="the server has failed; its log says why"):
        list(client.completions.create(model=MODEL, prompt="H", stream=True))


def test_a_reader_that_goes_frees_its_place_in_the_batch(reciting_url, reciting):
    """While its tokens are still being written, and without a word to the others."""
    body = {"prompt": "a", "max_tokens": 40, "ignore_eos": True, "stream": True, "temperature": 0}
    written = threading.Event()
    follow = reciting.generation._engine.follow
    left: list[int] = []

    def watched(model, live, **how):
        ended = live.ended
        live.ended = lambda index, rollout: (left.append(len(rollout.response)), ended(index, rollout))
        wrote = live.written

        def slowly(index, part):
            wrote(index, part)
            # As long as the reader is there, no more than a first part is written.
            if not written.is_set():
                written.set()
                gone.wait(30)

        live.written = slowly
        return follow(model, live, **how)

    gone = threading.Event()
    reciting.generation._engine.follow = watched
    try:
        with httpx2.Client() as reader, reader.stream("POST", f"{reciting_url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            assert written.wait(60)
        for _ in range(300):
            if reciting.admission._requests == 0:
                break
            gone.wait(0.1)
        gone.set()
        request = Request(
            prompt_ids=[5], prompt_id="", sample_index=0, mode="non_thinking", params=SamplingParams(max_new_tokens=3)
        )
        reciting.generation.submit([request], seed=0).result(60)
    finally:
        reciting.generation._engine.follow = follow
    assert min(left) < 40
