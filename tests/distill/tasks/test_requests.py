"""Modes, flags and worked examples: who is asked what, and what of it is trained."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest

from distill.tasks import Problem
from distill.tasks.drawing import turns_by_weight
from distill.tasks.requests import ModeMix, asked_in, prompt_ids, raw_document, worked_document
from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.tokenizer import train_byte_level_bpe
from qwen3.errors import UserError
from qwen3.rollout import MODES, Mode
from tests.distill import miniature


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe([f"{p.prompt}\n{p.solution}\n{p.answer}" for p in PROBLEMS], 300, folder)
    return ChatTokenizer.from_folder(folder)


PROBLEMS = miniature.task().problems("train", 60, seed=1)


FRACTIONS = (0.0, 0.07, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1.0)


def of_tasks(count: int, tasks: int) -> list[Problem]:
    """So many problems of tasks whose weights are 1, 2, 3, …"""
    turns = turns_by_weight({f"task {n}": n + 1 for n in range(tasks)}, count)
    return [Problem(prompt=f"{n}?", answer="", family="f", source=turn) for n, turn in enumerate(turns)]


def thinking(asked: list[tuple[Problem, Mode]], **wanted: str) -> tuple[int, int]:
    """How many of the problems with such fields think, and how many there are."""
    modes = [mode for problem, mode in asked if all(getattr(problem, k) == v for k, v in wanted.items())]
    return modes.count("thinking"), len(modes)


@pytest.mark.parametrize("prompts_per_step", [None, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_the_fraction_holds_over_the_stage_and_in_each_task_and_step(
    fraction: float, tasks: int, prompts_per_step: int | None
) -> None:
    for count in (1, 2, 3, 80, 157):
        problems = of_tasks(count, tasks)
        asked = ModeMix(thinking_fraction=fraction).assign(problems, seed=3, prompts_per_step=prompts_per_step)
        assert [problem for problem, _ in asked] == problems
        exact = Fraction(repr(fraction)) * count
        assert abs(thinking(asked)[0] - exact) <= Fraction(1, 2)
        steps = [
            asked[first : first + (prompts_per_step or count)] for first in range(0, count, prompts_per_step or count)
        ]
        for source in {problem.source for problem in problems}:
            for part in [asked, *steps]:
                found, of = thinking(part, source=source)
                exact = Fraction(repr(fraction)) * of
                assert math.floor(exact) <= found <= math.ceil(exact)


def test_no_mode_without_a_problem() -> None:
    assert ModeMix().assign([], seed=0) == []


def test_problems_choose_and_their_order_within_a_step_does_not() -> None:
    problems, mix = of_tasks(120, 2), ModeMix(thinking_fraction=0.3)
    modes = dict(mix.assign(problems, seed=1, prompts_per_step=30))
    turned = [problem for first in range(0, 120, 30) for problem in problems[first : first + 30][::-1]]
    assert dict(mix.assign(turned, seed=1, prompts_per_step=30)) == modes
    assert dict(mix.assign(problems[::-1], seed=1)) == dict(mix.assign(problems, seed=1))
    other = dict(mix.assign(problems, seed=2, prompts_per_step=30))
    assert 10 < sum(other[problem] != mode for problem, mode in modes.items()) < 90


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_problem_that_comes_again_may_have_another_mode(count: int) -> None:
    problems = of_tasks(count, 1)
    asked = ModeMix().assign(problems * 40, seed=0, prompts_per_step=count)
    for problem in problems:
        # Of 40 draws of a half: five standard deviations.
        assert 4 <= thinking(asked, problem_id=problem.problem_id)[0] <= 36


def test_in_small_steps_two_tasks_do_not_think_at_once() -> None:
    for steps in (10, 11):
        pairs = [(f"task {n}", step) for step in range(steps) for n in range(2)]
        problems = [Problem(prompt=f"{step}?", answer="", family="f", source=source) for source, step in pairs]
        asked = ModeMix().assign(problems, seed=0, prompts_per_step=2)
        assert [thinking(asked[first : first + 2])[0] for first in range(0, 2 * steps, 2)] == [1] * steps


def test_a_mode_that_the_data_names_stays_and_takes_no_part_in_the_fraction() -> None:
    named = [Problem(prompt=f"{n} /no_think", answer="", family="f", source="task 0") for n in range(30)]
    named += [Problem(prompt=f"{n}", answer="", family="f", mode="thinking") for n in range(10)]
    free = of_tasks(40, 1)
    asked = ModeMix(thinking_fraction=0.25).assign([*named, *free], seed=0)
    assert thinking(asked[:30]) == (0, 30)
    assert thinking(asked[30:40]) == (10, 10)
    assert thinking(asked[40:]) == (10, 40)
    assert asked_in("thinking", [*named, *free]) == [*named[30:], *free]
    assert asked_in("non_thinking", [*named, *free]) == [*named[:30], *free]


def conversation(*turns: tuple[str, str]) -> Problem:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Problem(prompt=turns[-1][1], answer="4", family="f", solution="Two and two.", messages=messages)


@pytest.mark.parametrize("mode", ["thinking", "non_thinking"])
def test_a_flag_goes_to_the_user_or_nowhere(tokenizer: ChatTokenizer, mode: Mode) -> None:
    flag = {"thinking": "/think", "non_thinking": "/no_think"}[mode]
    turns = [("user", "Hi"), ("assistant", "Yes?"), ("user", "2 + 2?"), ("assistant", "add(2, 2)"), ("tool", "4")]
    for asked in (conversation(*turns), conversation(*turns[:3])):
        text = tokenizer.decode(prompt_ids(asked, mode, tokenizer, flag_fraction=1.0))
        assert text.count(f"2 + 2? {flag}") == 1
        assert text.count("think>") == 0
    nobody = conversation(("system", "Go on."), ("assistant", "add(2, 2)"), ("tool", "4"))
    plain = prompt_ids(nobody, mode, tokenizer)
    assert prompt_ids(nobody, mode, tokenizer, flag_fraction=1.0) == plain
    assert flag not in tokenizer.decode(plain)


def test_a_flag_of_the_datas_own_is_a_flag_and_stays_alone(tokenizer: ChatTokenizer) -> None:
    for prompt, mode, other in (("4? /no_think", "non_thinking", " /think"), ("4? /think", "thinking", "/no_think")):
        problem = Problem(prompt=prompt, answer="4", family="f", solution="Four.")
        for fraction in (0.0, 1.0):
            document = worked_document(problem, problem.mode, tokenizer, flag_fraction=fraction)  # type: ignore[arg-type]
            text = tokenizer.decode(document.tokens)
            assert problem.mode == mode
            assert other not in text
            assert text.count(prompt) == 1
            # The response itself opens the block and, where the flag says so, leaves it empty.
            block = "<think>\nFour.\n</think>" if mode == "thinking" else "<think>\n\n</think>"
            assert tokenizer.decode(document.response).startswith(block)


def test_tools_are_told_in_prompts_and_worked_documents(tokenizer: ChatTokenizer) -> None:
    schema = {"type": "function", "function": {"name": "add_two_numbers", "parameters": {"type": "object"}}}
    problem = Problem(prompt="2 + 2?", answer="4", family="f", solution="Two and two.", tools=(schema,))
    told = json.dumps(schema)
    for mode in MODES:
        prompt = prompt_ids(problem, mode, tokenizer)
        assert told in tokenizer.decode(prompt)
        assert worked_document(problem, mode, tokenizer).tokens[: len(prompt)].tolist() == prompt
        assert told in tokenizer.decode(prompt_ids(problem, mode, tokenizer, flag_fraction=1.0))


def test_tools_that_a_template_leaves_out_are_refused(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    toolless = ChatTokenizer.from_folder(tmp_path)
    with_tools = Problem(prompt="2 + 2?", answer="4", family="f", tools=({"name": "add"},))
    with pytest.raises(UserError, match="has tools, of which the chat template says nothing"):
        prompt_ids(with_tools, "non_thinking", toolless)
    prompt_ids(Problem(prompt="2 + 2?", answer="4", family="f"), "non_thinking", toolless)


def test_a_template_for_tools_is_not_the_one_for_texts(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tokenizer.folder / file).read_bytes())

    def loop(content: str) -> str:
        return "{% for m in messages %}<|im_start|>{{ m.role }}: {{ " + content + " }}<|im_end|>\n{% endfor %}"

    # The one for texts cannot render a turn that only calls tools.
    named = [
        {"name": "default", "template": loop("'' + m.content")},
        {"name": "tool_use", "template": "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + loop("m.content")},
        {"name": "mute", "template": loop("m.content")},
    ]
    turns: list[dict[str, object]] = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]},
        {"role": "tool", "content": "4"},
    ]
    problem = Problem(prompt="2 + 2?", answer="4", family="f", messages=tuple(turns), tools=({"name": "add"},))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named[:2]}))
    with_tools = ChatTokenizer.from_folder(tmp_path)
    assert '{"name": "add"}' in with_tools.decode(prompt_ids(problem, "non_thinking", with_tools))
    named[1] = named[2] | {"name": "tool_use"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named[:2]}))
    with pytest.raises(UserError, match="has tools, of which the chat template says nothing"):
        prompt_ids(problem, "non_thinking", ChatTokenizer.from_folder(tmp_path))


@pytest.mark.parametrize("text", ["<think>4</think>", "As <think> says: 4", "4</think>", "4<|im_end|>"])
def test_marks_of_a_think_block_are_not_trained_beside_our_own(tokenizer: ChatTokenizer, text: str) -> None:
    inside = r"its solution has <.*> inside, a mark of the chat format"
    with pytest.raises(UserError, match=inside):
        worked_document(Problem(prompt="?", answer="4", solution=text, family="f"), "thinking", tokenizer)
    with pytest.raises(UserError, match=inside):
        raw_document(Problem(prompt="?", answer="4", solution=text, family="f"), tokenizer)
    with pytest.raises(UserError, match=inside.replace("solution", "answer")):
        worked_document(Problem(prompt="?", answer=text, family="f"), "non_thinking", tokenizer)


def test_flags_depend_on_the_problem_alone_and_name_its_mode(tokenizer: ChatTokenizer) -> None:
    flagged = 0
    for problem in PROBLEMS:
        text = tokenizer.decode(prompt_ids(problem, "thinking", tokenizer, flag_fraction=0.5))
        plain = tokenizer.decode(prompt_ids(problem, "non_thinking", tokenizer, flag_fraction=0.5))
        assert ("/think" in text) == ("/no_think" in plain)
        # Without a flag the template tells the mode; with one, the flag alone must do.
        assert plain.endswith("</think>\n\n") == ("/no_think" not in plain)
        flagged += "/think" in text
    assert 15 < flagged < 45


@pytest.mark.parametrize("flag_fraction", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["thinking", "non_thinking"])
def test_worked_documents_train_the_response_and_nothing_else(
    tokenizer: ChatTokenizer, mode: str, flag_fraction: float
) -> None:
    problem = PROBLEMS[0]
    document = worked_document(problem, mode, tokenizer, flag_fraction=flag_fraction)  # type: ignore[arg-type]
    trained = [int(token) for token, hit in zip(document.tokens[1:], document.loss_mask[:-1], strict=True) if hit]
    assert trained == document.response.tolist()
    assert not document.loss_mask[-1]
    text = tokenizer.decode(document.tokens)
    assert text.endswith(f"{problem.answer}<|im_end|>")
    assert (problem.solution in text) == (mode == "thinking")
    assert text.count("<think>") == 1


def test_a_prompt_that_a_chat_template_has_made_already_is_refused(tokenizer: ChatTokenizer) -> None:
    rendered = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    for problem in (
        Problem(prompt=rendered, answer="4", family="f"),
        conversation(("system", rendered), ("user", "2 + 2?")),
    ):
        with pytest.raises(UserError, match=r"its \w+ turn has <\|im_end\|> inside, a mark of the chat format"):
            prompt_ids(problem, "thinking", tokenizer)


def test_raw_documents_of_conversations_are_their_texts(tokenizer: ChatTokenizer) -> None:
    text = tokenizer.decode(raw_document(conversation(("system", ""), ("user", "2 + 2?")), tokenizer).tokens)
    assert text == "2 + 2?\nTwo and two.\n4<|endoftext|>"


def test_a_checkpoint_of_one_mode_gets_no_flags(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tokenizer.folder / file).read_bytes())
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    for template, mode, thinks in ((source, "non_thinking", ""), (source + "<think>", "thinking", "<think>\n")):
        (tmp_path / "chat_template.jinja").write_text(template)
        of_one_mode = ChatTokenizer.from_folder(tmp_path)
        problem = PROBLEMS[0]
        text = of_one_mode.decode(worked_document(problem, mode, of_one_mode, flag_fraction=1).tokens)  # type: ignore[arg-type]
        assert text.startswith(f"user: {problem.prompt}<|im_end|>{thinks}")
        assert text.endswith(f"{problem.answer}<|im_end|>")
        assert "/" not in text.removeprefix(f"user: {problem.prompt}").replace("</think>", "")


def test_raw_documents_train_all_but_the_first_token(tokenizer: ChatTokenizer) -> None:
    document = raw_document(PROBLEMS[0], tokenizer)
    assert document.loss_mask.tolist() == [True] * (len(document.tokens) - 1) + [False]
    assert tokenizer.decode(document.tokens).endswith("<|endoftext|>")
    assert "<|im_start|>" not in tokenizer.decode(document.tokens)


def test_thinking_without_a_solution_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UserError, match="no worked solution"):
        worked_document(Problem(prompt="?", answer="!", family="f"), "thinking", tokenizer)


def test_a_worked_document_needs_an_answer(tokenizer: ChatTokenizer) -> None:
    unanswered = Problem(prompt="?", answer=None, solution="Hm.", family="f")
    for make in (raw_document, lambda *asked: worked_document(asked[0], "non_thinking", asked[1])):
        with pytest.raises(UserError, match="of family 'f' has no answer; give the data an answer column, or use only"):
            make(unanswered, tokenizer)


def test_an_empty_answer_is_nothing_to_imitate(tokenizer: ChatTokenizer) -> None:
    free = Problem(prompt="Colour it.", answer="", family="graph_color")
    with pytest.raises(UserError, match="'graph_color' has many right answers and gives none to imitate"):
        worked_document(free, "non_thinking", tokenizer)


def test_each_form_says_what_would_do_without_a_solution(tokenizer: ChatTokenizer) -> None:
    plain = Problem(prompt="?", answer="!", family="f")
    with pytest.raises(UserError, match=r"no worked solution; give the data a solution column, or set form to .chat.$"):
        raw_document(plain, tokenizer)
    with pytest.raises(UserError, match=r"or train on non-thinking mode only \(modes\.thinking_fraction 0\)$"):
        worked_document(plain, "thinking", tokenizer)
