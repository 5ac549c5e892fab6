import decimal
import re
import unicodedata

import pytest

from distill.tasks import PromptFile
from qwen3.errors import UserError
from tests.distill.tasks.files import only, write


@pytest.fixture
def rows():
    return [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(200)]


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


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_held_out_problems_need_no_solutions_and_may_have_them(tmp_path, rows, ending) -> None:
    worked = write(tmp_path / f"train.{ending}", [row | {"working": "1+1"} for row in rows])
    for name, held_out, known in (("plain", rows[:5], None), ("worked", [rows[0] | {"working": "0+0"}], "0+0")):
        path = write(tmp_path / f"{name}.{ending}", held_out)
        task = PromptFile(path=worked, held_out_path=path, solution_column="working")
        assert {problem.solution for problem in task.problems("train", 195, 0)} == {"1+1"}
        assert {problem.solution for problem in task.problems("held_out", len(held_out), 0)} == {known}


def test_repeated_questions_count_once(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Why?", "answer": str(i)} for i in range(3)])
    task = PromptFile(path=path, held_out_fraction=0.0)
    assert [p.answer for p in task.problems("train", 1, 0)] == ["0"]
    with pytest.raises(UserError, match=r"has 1 train problems"):
        task.problems("train", 2, 0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("verifier", ["exact", "integer", "math"])
def test_prompts_need_no_answers(tmp_path, name, verifier) -> None:
    path = write(tmp_path / name, [{"prompt": "Why?", "answer": "1", "x": 1}, {"prompt": "How?", "answer": None}])
    some = PromptFile(path=path, held_out_fraction=0.0, verifier=verifier)
    answers = {p.prompt: p.answer for p in some.problems("train", 2, 0)}
    assert answers == {"Why?": "1", "How?": None}
    none = PromptFile(path=path, held_out_fraction=0.0, verifier=verifier, answer_column=None)
    assert [p.answer for p in none.problems("train", 2, 0)] == [None, None]
    assert {p.problem_id for p in none.problems("train", 2, 0)} == {p.problem_id for p in some.problems("train", 2, 0)}
    (unanswered,) = none.problems("train", 1, 0)
    with pytest.raises(UserError, match=rf"problem {unanswered.problem_id} of family 'a' has no answer; give the data"):
        none.verify(unanswered, "1")


def test_mathematical_answers_go_to_math_verify(tmp_path) -> None:
    task = PromptFile(
        path=write(tmp_path / "a.jsonl", [{"prompt": "Half?", "answer": "\\frac{1}{2}"}]), verifier="math"
    )
    problem = task.problems("train", 1, 0)[0]
    assert task.verify(problem, "It is \\boxed{0.5}.")
    assert not task.verify(problem, "It is \\boxed{0.6}.")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "chat is a list; give a list of messages"),
        ("hello", "chat is a text; give a list of messages"),
        ([{"role": "human", "content": "a"}], "message 1 has no role of system, user, assistant, tool"),
        ([{"role": "user", "content": 3}], "chat message 1 content is the number 3"),
        ([{"role": "user", "content": ""}], "chat message 1 content is an empty text"),
        ([{"role": "system", "content": 3}, {"role": "user", "content": "a"}], "message 1 content is the number 3"),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "text"}], "tool_calls": [{}]},
                {"role": "tool", "content": "b"},
            ],
            "chat message 2 content is a list; give a text",
        ),
        ("[" * 600 + "]" * 600, "chat begins like a list, but is not JSON (maximum recursion depth"),
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
    (tmp_path / "listed").mkdir()
    listed = write(tmp_path / "listed" / "a.jsonl", [{"prompt": "a", "answer": "b", "mode": ["thinking"]}])
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b", "mode": "fast"}])
    with pytest.raises(UserError, match=r"a.jsonl:1: mode is 'fast'; use one of thinking, non_thinking, or null"):
        PromptFile(path=path, mode_column="mode").problems("train", 1, 0)
    with pytest.raises(UserError, match=r"a.jsonl:1: mode is \['thinking'\]; use one of"):
        PromptFile(path=listed, mode_column="mode").problems("train", 1, 0)
    with pytest.raises(UserError, match=r"a.jsonl:1: answer is 'b', which verifier 'integer' cannot compare"):
        PromptFile(path=path, verifier="integer").problems("train", 1, 0)


def test_references_that_equal_nothing_are_named_with_their_rows(tmp_path) -> None:
    answers = ["5", "\\frac{1}{", "x+1", "x^", *["3+"] * 5, "\\frac{1}{0}"]
    path = write(tmp_path / "a.jsonl", [{"prompt": f"{n}?", "answer": answer} for n, answer in enumerate(answers)])
    with pytest.raises(UserError) as caught:
        PromptFile(path=path, verifier="math").problems("train", 1, 0)
    first = f"{path}:2: answer is '\\\\frac{{1}}{{', which verifier 'math' cannot compare"
    assert str(caught.value).startswith(f"{first} (nor {path}:4: answer is 'x^'; {path}:5: answer is '3+'; ")
    assert str(caught.value).endswith("8 in all); use another verifier (exact, integer, math), or mend the rows")


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


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("add", "a.jsonl:1: tools is a text; give a list of JSON schemas"),
        ("[add]", "a.jsonl:1: tools begins like a list, but is not JSON (Expecting value"),
        ({"name": "add"}, "a.jsonl:1: tools is a dict; give a list of JSON schemas"),
        (["add"], "a.jsonl:1: tools is a list; give a list of JSON schemas"),
        (0, "a.jsonl:1: tools is the number 0; give a list of JSON schemas"),
        ('[{"name": "\\ud800"}]', "a.jsonl:1: tools has half of a surrogate pair"),
    ],
)
def test_bad_tools_are_named(tmp_path, tools, message) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b", "tools": tools}])
    with pytest.raises(UserError, match=re.escape(message)):
        only(path, tools_column="tools")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (72.0, "72"), (-0.0, "0"), (0.1, "0.1"), (1e-07, "0.0000001"), (2.5e20, "250000000000000000000"), (7, "7"),
        (decimal.Decimal("72.00"), "72"), (decimal.Decimal("1.50"), "1.5"), ("72.0", "72.0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_numbers_are_answers(tmp_path, name, value, answer) -> None:
    if isinstance(value, decimal.Decimal) and name == "a.jsonl":
        value = float(value)
    assert only(write(tmp_path / name, [{"prompt": "a", "answer": value}]))[0].answer == answer


def test_think_blocks_of_the_data_are_taken_apart(tmp_path) -> None:
    block = "<think>\nTwo and two.\n</think>\n\n"
    rows = [
        {"answer": f"{block}4", "cot": None},
        {"answer": "4", "cot": f"\n{block}"},
        {"answer": "4", "cot": f"{block}The answer is 4."},
        {"answer": "4", "cot": "Two and two.\n</think>\n\nSo 4."},
        {"answer": "<think>\nElse.\n</think>\n\n4", "cot": "Two and two."},
        {"answer": "<think>\n\n</think>\n\n4", "cot": None},
        {"answer": "4", "cot": None},
    ]
    path = write(tmp_path / "a.jsonl", [{"prompt": f"{n}?", **row} for n, row in enumerate(rows)])
    found = only(path, solution_column="cot")
    assert [one.answer for one in found] == ["4"] * 7
    assert [one.solution for one in found] == ["Two and two."] * 5 + [None] * 2
    assert [one.mode for one in found] == [None] * 5 + ["non_thinking", None]


def test_one_question_in_both_modes_is_two_rows(tmp_path) -> None:
    rows = [
        {"prompt": "Why?", "answer": str(mode), "mode": mode} for mode in ("thinking", "non_thinking", None, "thinking")
    ]
    found = only(write(tmp_path / "a.jsonl", rows), mode_column="mode")
    assert [one.mode for one in found] == ["thinking", "non_thinking", None]
    assert len({one.user_words for one in found}) == 1
    assert len({one.problem_id for one in found}) == 3


@pytest.mark.parametrize("flag", ["/think", "/no_think"])
def test_a_flag_and_a_mode_must_say_the_same(tmp_path, flag) -> None:
    mode = {"/think": "thinking", "/no_think": "non_thinking"}[flag]
    path = write(
        tmp_path / "a.jsonl",
        [
            {"prompt": f"Why? {flag}", "answer": "b", "mode": None},
            {"prompt": f"How? {flag}", "answer": "b", "mode": mode},
        ],
    )
    assert [one.mode for one in only(path, mode_column="mode")] == [mode] * 2
    other = {"/think": "non_thinking", "/no_think": "thinking"}[flag]
    path = write(tmp_path / "b.jsonl", [{"prompt": f"Why? {flag}", "answer": "b", "mode": other}])
    with pytest.raises(UserError, match=f"b.jsonl:1: mode is '{other}', but the prompt says {flag}; mend the row"):
        only(path, mode_column="mode")


def test_decomposed_letters_are_held_out_counted_and_verified_as_composed(tmp_path) -> None:
    composed = [{"prompt": f"Où est le n\u00ba {n} ?", "answer": "Là, près du café"} for n in range(20)]
    decomposed = [{key: unicodedata.normalize("NFD", text) for key, text in row.items()} for row in composed]
    assert composed != decomposed
    both = only(write(tmp_path / "a.jsonl", [*composed, *decomposed]))
    assert len(both) == 20
    task = PromptFile(path=write(tmp_path / "b.jsonl", decomposed), held_out_path=str(tmp_path / "c.jsonl"))
    write(tmp_path / "c.jsonl", composed[:5])
    assert task.size("train") == 15
    assert all(task.holds_out(row["prompt"]) for row in composed[:5])
    for problem in task.problems("train", 15, 0):
        assert task.verify(problem, composed[0]["answer"])
        assert task.verify(problem, decomposed[0]["answer"])


def test_a_question_is_on_one_side_with_a_system_turn_or_without(tmp_path) -> None:
    def turns(n: int, *before: str) -> list[dict[str, str]]:
        spoken = f"What is\n{n} + {n}?" if n % 2 else f"What is {n} + {n}"
        return [*({"role": "system", "content": text} for text in before), {"role": "user", "content": spoken}]

    asked = [turns(n, *before) for n in range(60) for before in ((), ("Be brief.",), ("",))]
    asked += [[{"role": "user", "content": f"What is {n} + {n}? /no_think"}] for n in range(60)]
    task = PromptFile(
        path=write(tmp_path / "a.jsonl", [{"chat": chat, "answer": "b"} for chat in asked]),
        messages_column="chat",
        held_out_fraction=0.5,
    )
    sides = [{problem.user_words for problem in task._sides[split]} for split in ("train", "held_out")]
    assert len(task._files[task.path].problems) == 240
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 60
    plain = PromptFile(
        path=write(tmp_path / "b.jsonl", [{"prompt": f"What is {n} + {n}?", "answer": "b"} for n in range(60)])
    )
    assert {problem.user_words for problem in plain._side("train", task.holds_out)} == sides[0] - {
        problem.user_words for problem in plain._sides["held_out"]
    }
