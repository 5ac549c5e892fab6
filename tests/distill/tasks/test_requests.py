"""Modes, flags and worked examples: who is asked what, and what of it is trained."""

from pathlib import Path

import pytest

from distill.tasks import Problem
from distill.tasks.requests import ModeMix, prompt_ids, raw_document, worked_document
from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.tokenizer import train_byte_level_bpe
from qwen3.errors import UserError
from tests.distill import miniature


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe([f"{p.prompt}\n{p.solution}\n{p.answer}" for p in PROBLEMS], 300, folder)
    return ChatTokenizer.from_folder(folder)


PROBLEMS = miniature.task().problems("train", 60, seed=1)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.7, 1.0])
def test_modes_are_spread_evenly(fraction: float) -> None:
    modes = [mode for _, mode in ModeMix(thinking_fraction=fraction).assign(PROBLEMS)]
    for count in range(1, len(modes) + 1):
        assert abs(sum(mode == "thinking" for mode in modes[:count]) - fraction * count) <= 1


def test_a_problems_own_mode_wins() -> None:
    asked = Problem(prompt="?", answer="!", family="f", mode="non_thinking")
    assert [mode for _, mode in ModeMix(thinking_fraction=1).assign([asked])] == ["non_thinking"]


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


def test_raw_documents_train_all_but_the_first_token(tokenizer: ChatTokenizer) -> None:
    document = raw_document(PROBLEMS[0], tokenizer)
    assert document.loss_mask.tolist() == [True] * (len(document.tokens) - 1) + [False]
    assert tokenizer.decode(document.tokens).endswith("<|endoftext|>")
    assert "<|im_start|>" not in tokenizer.decode(document.tokens)


def test_thinking_without_a_solution_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UserError, match="no worked solution"):
        worked_document(Problem(prompt="?", answer="!", family="f"), "thinking", tokenizer)
