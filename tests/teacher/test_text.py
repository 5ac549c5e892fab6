"""Text that grows by tokens and an assistant's turns taken apart: the same however they are cut."""

import itertools
import json

import numpy as np
import pytest

from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.tokenizer import MIN_VOCABULARY, train_byte_level_bpe
from teacher.serve.assistant import Assistant, Called, Said
from teacher.serve.text import GrowingText, Spelling

CALL = '<tool_call>\n{"name": "add", "arguments": {"terms": [2, 3]}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(["the thing is that this is the end"] * 9, MIN_VOCABULARY + 12, folder)
    return ChatTokenizer.from_folder(folder)


def grown(ids: list[int], spelling: Spelling) -> tuple[list[str], str | None]:
    text = GrowingText(spelling)
    parts = []
    for token in ids:
        parts.append(text.add(token))
        if text.stopped is not None:
            break
    return [*parts, text.end()], text.stopped


def test_parts_add_up_to_the_whole_and_no_character_comes_in_halves(tokenizer):
    text = "thé end 🙂 of 漢字 — “this”\n\n<think>ü</think>"
    parts, _ = grown(tokenizer.encode(text), Spelling(tokenizer=tokenizer))
    assert "".join(parts) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert sum(part != "" for part in parts) > 20


def test_any_tokens_give_what_decoding_them_at_once_gives(tokenizer):
    """Most of what these spell is no UTF-8."""
    rng = np.random.default_rng(0)
    for skip in (True, False):
        for _ in range(200):
            ids = rng.integers(0, tokenizer.vocab_size, rng.integers(1, 40)).tolist()
            spelling = Spelling(tokenizer=tokenizer, skip_special_tokens=skip)
            parts, _ = grown(ids, spelling)
            assert "".join(parts) == spelling.decode(ids)


@pytest.mark.parametrize("keep", [False, True])
def test_text_ends_before_the_first_stop_string_wherever_tokens_cut_it(tokenizer, keep):
    rng = np.random.default_rng(1)
    for _ in range(200):
        text = "".join(rng.choice(list("abcü"), 30))
        stop = ["".join(rng.choice(list("abcü"), rng.integers(1, 5))) for _ in range(3)]
        parts, stopped = grown(tokenizer.encode(text), Spelling(tokenizer=tokenizer, stop=stop, keep_stop=keep))
        # The first that is complete when characters come one by one.
        ends = [(text.find(one) + len(one), text.find(one), one) for one in stop if one in text]
        if not ends:
            assert ("".join(parts), stopped) == (text, None)
            continue
        first = min(end for end, _, _ in ends)
        at, expected = min((at, one) for end, at, one in ends if end == first)
        assert stopped == expected
        assert "".join(parts) == text[: at + len(expected) * keep]


def cuts(text: str) -> list[list[str]]:
    rng = np.random.default_rng(2)
    found = [[text], list(text)]
    for _ in range(20):
        places = [0, *sorted(rng.integers(0, len(text) + 1, 5)), len(text)]
        found.append([text[start:end] for start, end in itertools.pairwise(places)])
    return found


def taken_apart(parts: list[str], **how: bool) -> tuple[str, str, list[tuple[str, dict]]]:
    assistant = Assistant(**({"thinking": True, "in_thinking": False, "tools": True} | how))
    told = [one for part in parts for one in assistant.add(part)] + assistant.end()
    texts = {
        kind: "".join(one.text for one in told if isinstance(one, Said) and one.kind == kind)
        for kind in ("reasoning", "content")
    }
    calls = [(one.name, json.loads(one.arguments)) for one in told if isinstance(one, Called)]
    return texts["reasoning"], texts["content"], calls


ADD = ("add", {"terms": [2, 3]})


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        ("<think>\nso\n\nthen\n</think>\n\nFive.\n", {}, ("so\n\nthen", "Five.\n", [])),
        ("\n<think>\n\n</think>\n\nFive", {}, ("", "Five", [])),
        ("<think>\nendless </thi", {}, ("endless </thi", "", [])),
        ("so\n</think>\n\nFive", {"in_thinking": True}, ("so", "Five", [])),
        ("<thin", {}, ("", "<thin", [])),
        ("\n\nFive <think>", {}, ("", "\n\nFive <think>", [])),
        ("<think>\nx</think>", {"thinking": False}, ("", "<think>\nx</think>", [])),
        (f"<think>\n\n</think>\n\n{CALL}", {}, ("", "", [ADD])),
        (f"I add.\n{CALL}\n{CALL}\n", {}, ("", "I add.", [ADD, ADD])),
        (f"{CALL}\nand more", {}, ("", "and more", [ADD])),
        (CALL.removesuffix("</tool_call>"), {}, ("", "", [ADD])),
        ("a <tool_call>none</tool_call> b", {}, ("", "a <tool_call>none</tool_call> b", [])),
        ('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', {}, None),
        ('<tool_call>{"name": "x", "arguments": {"a": NaN}}</tool_call>', {}, None),
        ('<tool_call>{"name": "x", "arguments": [1]}</tool_call>', {}, None),
        ("<tool_call>[" + "[" * 50 + "</tool_call>", {}, None),
        ("a <tool_", {}, ("", "a <tool_", [])),
        (CALL, {"tools": False}, ("", CALL, [])),
    ],
)
def test_a_turn_is_taken_apart_the_same_however_it_is_cut(text, how, expected):
    expected = ("", text, []) if expected is None else expected
    for parts in cuts(text):
        assert taken_apart(parts, **how) == expected, parts
