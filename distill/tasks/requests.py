"""From problems to what a policy is asked: the mix of modes and flags, prompts, and worked examples as documents."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from distill.tasks import Problem
from qwen3.chat.chat import ChatTokenizer, with_flag
from qwen3.errors import UserError
from qwen3.rollout import NON_THINKING, THINKING, Mode, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModeMix:
    """How prompts are divided between thinking and non-thinking, and how many say so in the text.

    The forms are those of Qwen3's training data (arXiv 2505.09388, table 9): a flag `/think` or `/no_think` at the
    end of the question, or none, where the chat template alone tells the mode.
    """

    thinking_fraction: float = 0.5
    """Share of prompts in thinking mode."""
    flag_fraction: float = 0.25
    """Share of prompts whose question carries the flag of its mode."""

    def __post_init__(self) -> None:
        for name in ("thinking_fraction", "flag_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"modes.{name} is {getattr(self, name)}; it must lie in 0..1")

    def assign(self, problems: Sequence[Problem]) -> Iterator[tuple[Problem, Mode]]:
        """Each problem with its mode: the one its data asks for, else spread evenly in the order given."""
        for index, problem in enumerate(problems):
            turn = int((index + 1) * self.thinking_fraction) > int(index * self.thinking_fraction)
            yield problem, problem.mode or (THINKING if turn else NON_THINKING)


def prompt_ids(problem: Problem, mode: Mode, tokenizer: ChatTokenizer, *, flag_fraction: float = 0.0) -> list[int]:
    """What the policy reads. Whether the question carries a flag depends on the problem alone."""
    messages = problem.conversation
    if not _flagged(problem, flag_fraction):
        return tokenizer.prompt_ids(messages, mode)
    messages[-1]["content"] = with_flag(messages[-1]["content"], "think" if mode == THINKING else "no_think")
    # A flag alone must do: the template is rendered in its default mode, so /no_think has nothing prefilled to help.
    return tokenizer.prompt_ids(messages, THINKING)


def worked_document(problem: Problem, mode: Mode, tokenizer: ChatTokenizer, *, flag_fraction: float = 0.0) -> Rollout:
    """The ideal response to `problem` in `mode` as a rollout whose response is trained.

    Raises UserError where the problem has no worked solution to think with.
    """
    prompt = prompt_ids(problem, mode, tokenizer, flag_fraction=flag_fraction)
    if mode == THINKING:
        response = tokenizer.response_ids(_solution(problem), problem.answer, THINKING)
    elif _flagged(problem, flag_fraction):
        response = tokenizer.response_ids("", problem.answer, THINKING)
    else:
        response = tokenizer.response_ids(None, problem.answer, NON_THINKING)
    return _document(problem, mode, prompt, response)


def raw_document(problem: Problem, tokenizer: ChatTokenizer) -> Rollout:
    """Question, working and answer as running text without any chat format, as a base model would meet them."""
    text = f"{problem.question_text}\n{_solution(problem)}\n{problem.answer}"
    ids = tokenizer.encode(text)
    return _document(problem, THINKING, ids[:1], [*ids[1:], tokenizer.pad_id])


def _document(problem: Problem, mode: Mode, prompt: Sequence[int], response: Sequence[int]) -> Rollout:
    tokens = np.asarray([*prompt, *response], np.int32)
    mask = np.zeros(len(tokens), bool)
    mask[len(prompt) - 1 : -1] = True
    return Rollout(
        tokens=tokens,
        prompt_length=len(prompt),
        loss_mask=mask,
        sampler_logprobs=np.zeros(len(tokens), np.float32),
        mode=mode,
        prompt_id=problem.problem_id,
        sample_index=0,
        policy_step=0,
        finished=True,
    )


def _solution(problem: Problem) -> str:
    if problem.solution is None:
        raise UserError(
            f"problem {problem.problem_id} of family {problem.family!r} has no worked solution; "
            "give the data a solution column or train on non-thinking mode only (modes.thinking_fraction 0)"
        )
    return problem.solution


def _flagged(problem: Problem, fraction: float) -> bool:
    digest = hashlib.blake2b(f"flag {problem.problem_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 < fraction
