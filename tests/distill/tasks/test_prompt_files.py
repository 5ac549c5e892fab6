import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from distill.tasks import PromptFile
from qwen3.errors import UserError


@pytest.fixture
def rows():
    return [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(200)]


def write(path, rows) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["sums.jsonl", "sums.parquet"])
def test_rows_become_problems_of_two_sides(tmp_path, rows, name) -> None:
    task = PromptFile(path=write(tmp_path / name, rows), held_out_fraction=0.25)
    train, held_out = (len(task._sides[split]) for split in ("train", "held_out"))
    assert train + held_out == 200
    first, second = task.problems("train", train, 0), task.problems("held_out", held_out, 1)
    assert {p.prompt for p in first}.isdisjoint(p.prompt for p in second)
    assert {(p.prompt, p.answer) for p in first + second} == {(row["prompt"], row["answer"]) for row in rows}
    assert {p.family for p in first} == {"sums"}


def test_both_formats_give_the_same_problems_in_the_same_order(tmp_path, rows) -> None:
    jsonl = PromptFile(path=write(tmp_path / "sums.jsonl", rows))
    columnar = PromptFile(path=write(tmp_path / "sums.parquet", rows[::-1]))
    assert jsonl.problems("train", 100, 5) == columnar.problems("train", 100, 5)
    assert jsonl.problems("train", 30, 5) == jsonl.problems("train", 100, 5)[:30]
    assert jsonl.problems("train", 30, 6) != jsonl.problems("train", 30, 5)


def test_optional_columns_and_other_names(tmp_path) -> None:
    row = {"q": "Why?", "gold": 42, "cot": "6*7=42", "kind": "deep", "think": "non_thinking", "unused": [1]}
    path = write(tmp_path / "a.jsonl", [row, {**row, "q": "How?", "cot": None, "kind": None, "think": None}])
    task = PromptFile(
        path=path,
        held_out_fraction=0.0,
        prompt_column="q",
        answer_column="gold",
        solution_column="cot",
        family_column="kind",
        mode_column="think",
        verifier="integer",
    )
    problems = {p.prompt: p for p in task.problems("train", 2, 0)}
    why, how = problems["Why?"], problems["How?"]
    assert (why.answer, why.solution, why.family, why.mode) == ("42", "6*7=42", "deep", "non_thinking")
    assert (how.solution, how.family, how.mode) == (None, "a", None)
    assert task.verify(why, "42")
    assert not task.verify(why, "it is 42")


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.parquet"])
def test_conversations_are_kept_whole(tmp_path, name) -> None:
    long = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "A greeting."},
        {"role": "user", "content": "1+1?"},
    ]
    short = [{"role": "user", "content": "2+2?"}]
    path = write(tmp_path / name, [{"chat": long, "answer": "2"}, {"chat": short, "answer": "4"}])
    task = PromptFile(path=path, messages_column="chat", held_out_fraction=0.0)
    problems = {p.prompt: p for p in task.problems("train", 2, 0)}
    assert problems["1+1?"].conversation == long
    assert problems["2+2?"].messages is None
    assert problems["2+2?"].conversation == short


def test_a_question_of_the_held_out_file_never_trains(tmp_path, rows) -> None:
    path = write(tmp_path / "train.jsonl", [*rows, {"prompt": "What  is 3 + 3?", "answer": "6"}])
    held_out_path = write(tmp_path / "test.jsonl", rows[:20])
    task = PromptFile(path=path, held_out_path=held_out_path)
    train = task.problems("train", 180, 0)
    held_out = task.problems("held_out", 20, 0)
    assert {" ".join(p.prompt.split()) for p in train}.isdisjoint(p.prompt for p in held_out)
    with pytest.raises(UserError, match=r"train.jsonl: has 180 train problems, 181 were asked for"):
        task.problems("train", 181, 0)
    with pytest.raises(UserError, match=r"test.jsonl: has 20 held_out problems"):
        task.problems("held_out", 21, 0)


def test_repeated_questions_count_once(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Why?", "answer": str(i)} for i in range(3)])
    task = PromptFile(path=path, held_out_fraction=0.0)
    assert [p.answer for p in task.problems("train", 1, 0)] == ["0"]
    with pytest.raises(UserError, match=r"has 1 train problems"):
        task.problems("train", 2, 0)


def test_mathematical_answers_go_to_math_verify(tmp_path) -> None:
    task = PromptFile(
        path=write(tmp_path / "a.jsonl", [{"prompt": "Half?", "answer": "\\frac{1}{2}"}]), verifier="math"
    )
    problem = task.problems("train", 1, 0)[0]
    assert task.verify(problem, "It is \\boxed{0.5}.")
    assert not task.verify(problem, "It is \\boxed{0.6}.")


GOOD = '{"prompt": "a", "answer": "b"}\n'


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
        ('{"prompt": "a", "answer": 0.5}', "a.jsonl:1: answer is the number 0.5; give a text"),
        ('{"prompt": "a", "answer": true}', "a.jsonl:1: answer is the truth value True"),
        ('{"prompt": "a", "answer": null}', "a.jsonl:1: answer is null"),
        ('{"prompt": " ", "answer": "b"}', "a.jsonl:1: prompt is an empty text"),
        ('{"prompt": {}, "answer": "b"}', "a.jsonl:1: prompt is a dict"),
        ('{"prompt": "\\ud800", "answer": "b"}', "a.jsonl:1: prompt has half of a surrogate pair"),
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


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "chat is a list; give a list of messages"),
        ("hello", "chat is a text; give a list of messages"),
        ([{"role": "human", "content": "a"}], "message 1 has no role of system, user, assistant, tool"),
        ([{"role": "user", "content": 3}], "chat message 1 content is the number 3"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "ends with a message of the assistant",
        ),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, messages, message) -> None:
    path = write(tmp_path / "a.jsonl", [{"chat": messages, "answer": "b"}])
    with pytest.raises(UserError, match=re.escape(message)):
        PromptFile(path=path, messages_column="chat").problems("train", 1, 0)


def test_bad_values_of_optional_columns_are_named(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b", "mode": "fast"}])
    with pytest.raises(UserError, match=r"a.jsonl:1: mode is 'fast'; use one of thinking, non_thinking, or null"):
        PromptFile(path=path, mode_column="mode").problems("train", 1, 0)
    with pytest.raises(UserError, match=r"a.jsonl:1: answer is 'b', which verifier 'integer' cannot compare"):
        PromptFile(path=path, verifier="integer").problems("train", 1, 0)


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
    empty = tmp_path / "empty.parquet"
    parquet.write_table(
        pyarrow.table({"prompt": pyarrow.array([], "string"), "answer": pyarrow.array([], "string")}), empty
    )
    with pytest.raises(UserError, match=r"empty.parquet: has no rows"):
        PromptFile(path=str(empty)).problems("train", 1, 0)


def test_bad_paths_and_fields_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"absent.jsonl: no such file"):
        PromptFile(path=str(tmp_path / "absent.jsonl")).problems("train", 1, 0)
    (tmp_path / "a.csv").write_text("prompt,answer")
    with pytest.raises(UserError, match=r"a.csv: ends in '.csv'; give a .jsonl, .ndjson or .parquet"):
        PromptFile(path=str(tmp_path / "a.csv")).problems("train", 1, 0)
    with pytest.raises(UserError, match=r"verifier is 'maths'"):
        PromptFile(path="a.jsonl", verifier="maths")
    with pytest.raises(UserError, match=r"held_out_fraction is -0.1"):
        PromptFile(path="a.jsonl", held_out_fraction=-0.1)
    with pytest.raises(ValueError, match=r"count is -1"):
        PromptFile(path="a.jsonl").problems("train", -1, 0)
