"""Rows of files as people have them: JSONL and Parquet, whole or damaged."""

import datetime
import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from distill.tasks import PromptFile
from qwen3.errors import UserError
from tests.distill.tasks.files import only, write

GOOD = '{"prompt": "a", "answer": "b"}\n'
CALLS = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Weather in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome", "days": 1, "unit": None}}}],
    },
    {"role": "tool", "content": ""},
]
OTHER_CALLS = [
    {"role": "user", "content": "Wind?", "name": "Ada"},
    {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "wind", "arguments": {"city": "Bonn", "height": 2.5}}, "id": "1"}],
    },
    {"role": "tool", "content": "calm"},
]
TOOLS = [
    {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": None}}}},
    {"name": "wind", "parameters": {"type": "object", "properties": {"height": {"type": "number", "minimum": 0}}}},
]


@pytest.fixture
def rows():
    return [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(200)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '{"prompt": "a", \n', "a.jsonl:2: not JSON (Expecting property name enclosed in double quotes"),
        (GOOD + "\n\n[1]\n", "a.jsonl:4: holds a list; write one JSON object a line"),
        (GOOD + '{"promt": "a", "answer": "b"}', "a.jsonl:2: has no column 'prompt'; perhaps you meant 'promt'"),
        ('{"x": 1}', "a.jsonl:1: has no column 'prompt'; it has x"),
        ("", "a.jsonl: has no rows"),
        ("\n \n", "a.jsonl: has no rows"),
        ('{"prompt": 3, "answer": "b"}', "a.jsonl:1: prompt is the number 3; give a text"),
        ('{"prompt": "a", "answer": Infinity}', "a.jsonl:1: answer holds the number inf; store it as text"),
        ('{"prompt": "a", "answer": "<think>b"}', "a.jsonl:1: answer holds thinking and nothing after it; add the ans"),
        ('{"prompt": {"a": ' + "[" * 600 + "]" * 600 + "}}", "a.jsonl:1: nested too deeply"),
        ('{"prompt": "a", "answer": true}', "a.jsonl:1: answer is the truth value True"),
        ('{"prompt": "a", "answer": ""}', "a.jsonl:1: answer is an empty text; give a text, or null where there is no"),
        ('{"prompt": "a", "answer": ["b"]}', "a.jsonl:1: answer is a list; give a text"),
        (
            '{"prompt": "a"}',
            "a.jsonl:1: has no column 'answer'; it has prompt; give null in a row without an answer, or set "
            "answer_column to None for all",
        ),
        ('{"prompt": " ", "answer": "b"}', "a.jsonl:1: prompt is an empty text"),
        ('{"prompt": {}, "answer": "b"}', "a.jsonl:1: prompt is a dict"),
        ('{"prompt": "\\ud800", "answer": "b"}', "a.jsonl:1: prompt has half of a surrogate pair"),
        ('{"prompt": {"\\ud800": 1}, "answer": "b"}', "a.jsonl:1: prompt has half of a surrogate pair"),
        (GOOD + "9" * 5000, "a.jsonl:2: not JSON that can be read"),
        (GOOD + "[" * 100_000, "a.jsonl:2: not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        PromptFile(path=str(path)).problems("train", 1, 0)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named_and_a_byte_order_mark_is_not_text(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"a.jsonl:2: not UTF-8 \(byte 13\)"):
        PromptFile(path=str(path)).problems("train", 1, 0)
    path.write_text(GOOD, encoding="utf-8-sig")
    assert PromptFile(path=str(path), held_out_fraction=0.0).problems("train", 1, 0)[0].prompt == "a"


def test_bad_parquet_is_named(tmp_path, rows) -> None:
    whole = tmp_path / "whole.parquet"
    write(whole, [*rows, {"prompt": None, "answer": "1"}])
    with pytest.raises(UserError, match=r"whole.parquet row 201: prompt is null"):
        PromptFile(path=str(whole)).problems("train", 1, 0)
    with pytest.raises(UserError, match=r"whole.parquet: has no column 'answers'; perhaps you meant 'answer'"):
        PromptFile(path=str(whole), answer_column="answers").problems("train", 1, 0)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"broken.parquet: not a readable Parquet file") as caught:
        PromptFile(path=str(broken)).problems("train", 1, 0)
    assert "\n" not in str(caught.value)
    offsets, no_text = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
    strange = {
        "bytes": pyarrow.StringArray.from_buffers(1, offsets, no_text),
        "far": pyarrow.array([2**52], pyarrow.timestamp("s")),
    }
    for name, values in strange.items():
        parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": values}), tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=rf"{name}.parquet: a value after row 0 cannot be read"):
            PromptFile(path=str(tmp_path / f"{name}.parquet")).problems("train", 1, 0)
    empty = tmp_path / "empty.parquet"
    parquet.write_table(
        pyarrow.table({"prompt": pyarrow.array([], "string"), "answer": pyarrow.array([], "string")}), empty
    )
    with pytest.raises(UserError, match=r"empty.parquet: has no rows"):
        PromptFile(path=str(empty)).problems("train", 1, 0)


def test_parquet_gives_the_prompts_of_jsonl(tmp_path) -> None:
    rows = [
        {"chat": CALLS, "answer": "Sunny.", "tools": TOOLS},
        {"chat": OTHER_CALLS, "answer": "None.", "tools": TOOLS[1:]},
        {"chat": OTHER_CALLS[:1], "answer": "None.", "tools": None},
    ]
    # As pandas would have them, which knows no missing whole number.
    floats = [
        {**row, "tools": row["tools"] and json.loads(json.dumps(row["tools"]).replace(" 0", " 0.0"))} for row in rows
    ]
    found = [
        only(write(tmp_path / name, of), messages_column="chat", tools_column="tools")
        for name, of in (("a.jsonl", rows), ("a.parquet", rows), ("b.parquet", floats))
    ]
    assert [(one.conversation, one.tools, one.problem_id) for one in found[0]] == [
        (one.conversation, one.tools, one.problem_id) for one in found[1]
    ]
    assert [json.dumps((one.conversation, one.tools)) for one in found[1]] == [
        json.dumps((one.conversation, one.tools)) for one in found[2]
    ]
    called = found[0][0].conversation
    assert called[0] == {"role": "system", "content": ""}
    assert called[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "days": 1}
    assert called[3] == {"role": "tool", "content": ""}
    assert found[0][0].tools[0]["parameters"]["properties"] == {"city": {"type": "string"}}
    assert found[0][2].tools is None
    as_text = [{**row, "chat": json.dumps(row["chat"]), "tools": json.dumps(row["tools"])} for row in rows[:2]]
    as_text.append({**rows[2], "tools": ""})
    written = only(write(tmp_path / "c.jsonl", as_text), messages_column="chat", tools_column="tools")
    assert [(one.conversation, one.tools) for one in written] == [(one.conversation, one.tools) for one in found[0]]


def test_maps_of_parquet_are_objects(tmp_path) -> None:
    kind = pyarrow.list_(pyarrow.struct([("name", pyarrow.string()), ("about", pyarrow.map_("string", "string"))]))
    tools = pyarrow.array([[{"name": "add", "about": [("a", "first"), ("b", None)]}]], kind)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": ["b"], "tools": tools}), path)
    assert only(str(path), tools_column="tools")[0].tools == ({"name": "add", "about": {"a": "first"}},)


@pytest.mark.parametrize("name", ["verl.jsonl", "verl.parquet"])
def test_dots_name_fields_inside_of_columns(tmp_path, name) -> None:
    row = {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": {"name": "easy"}, "mode": "thinking", "tools": None, "cot": "Two and two."},
    }
    null = {**row, "prompt": [{"role": "user", "content": "3?"}], "extra_info": None}
    fields = {
        "messages_column": "prompt",
        "answer_column": "reward_model.ground_truth",
        "family_column": "extra_info.split.name",
        "mode_column": "extra_info.mode",
        "solution_column": "extra_info.cot",
        "tools_column": "extra_info.tools",
    }
    first, second = only(write(tmp_path / name, [row, null]), **fields)
    assert (first.prompt, first.answer, first.family, first.mode) == ("2 + 2?", "4", "easy", "thinking")
    assert (first.solution, first.tools) == ("Two and two.", None)
    assert (second.answer, second.family, second.mode, second.solution) == ("4", "verl", None, None)
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=r"no column 'reward_model.ground_truths'; perhaps you meant 'reward_model.gr"):
        only(path, messages_column="prompt", answer_column="reward_model.ground_truths")
    with pytest.raises(UserError, match=r"no column 'reward_model.ground_truth.x'"):
        only(path, messages_column="prompt", answer_column="reward_model.ground_truth.x")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_column_of_the_very_name_counts(tmp_path, name) -> None:
    row = {"prompt": "a", "to": {"do": "inside"}, "to.do": "itself", "not": {"to.be": "both"}}
    path = write(tmp_path / name, [row])
    assert only(path, answer_column="to.do")[0].answer == "itself"
    assert only(path, answer_column="not.to.be")[0].answer == "both"


def test_whole_numbers_beside_a_missing_one_stay_whole(tmp_path) -> None:
    path = write(tmp_path / "a.parquet", [{"prompt": "a", "answer": 7, "level": 3.0}, {"prompt": "b", "answer": 8}])
    first, second = only(path, family_column="level", verifier="integer")
    assert (first.answer, first.family, second.family) == ("7", "3", "a")


def test_what_json_does_not_know_is_named(tmp_path) -> None:
    path = write(tmp_path / "a.parquet", [{"prompt": "a", "answer": datetime.date(2026, 1, 1)}])
    with pytest.raises(UserError, match=r"a.parquet row 1: answer holds a date; store it as text"):
        only(path)
    assert only(path, answer_column="prompt")[0].answer == "a", "a column that nobody asked for"
