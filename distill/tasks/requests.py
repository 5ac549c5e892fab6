"""From problems to what a policy is asked: the mix of modes and flags, prompts, and worked examples as documents."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from distill.tasks import Problem
from distill.tasks.drawing import exact_decimal
from distill.tasks.problem import digest, flagged_mode
from qwen3.chat.chat import MODE_FLAGS, THINK_END, THINK_START, ChatTokenizer, last_flag, with_flag
from qwen3.errors import UserError
from qwen3.field_types import Share, check_fields
from qwen3.rollout import MODES, NON_THINKING, THINKING, Mode, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModeMix:
    """How prompts are divided between thinking and non-thinking, and how many say so in the text.

    The forms are those of Qwen3's training data (arXiv 2505.09388, table 9): a flag `/think` or `/no_think` at the
    end of the question, or none, where the chat template alone tells the mode. A checkpoint of one mode gets no flags.
    """

    thinking_fraction: Share = 0.5
    """Share of prompts in thinking mode, of those whose data does not name a mode."""
    flag_fraction: Share = 0.25
    """Share of prompts whose question carries the flag of its mode, beside those that come with one."""

    def __post_init__(self) -> None:
        check_fields(self, "modes")

    def assign(
        self, problems: Sequence[Problem], seed: int, *, prompts_per_step: int | None = None
    ) -> list[tuple[Problem, Mode]]:
        """Each of a stage's problems with its mode: the one that its data names, else one that this mix chooses.

        Of the latter, `thinking_fraction` think, rounded to the nearest whole number over the stage, and rounded down
        or up within every task and within every step's problems of one task, however many there are of each. Which
        ones is a function of seed, problem and step, not of the order of a step's problems; a problem that comes again
        at another step may have another mode.

        How: the problems are put in an order, by task, step and a hash, of which every n-th thinks. Every other task
        goes through the steps backwards, lest in small steps all tasks think at once.

        Args:
            problems: All of the stage, in the order of its steps.
            seed: The stage's.
            prompts_per_step: Problems of a step; None where the stage asks all of them at once.
        """
        tasks = {name: number for number, name in enumerate(sorted({problem.source for problem in problems}))}

        def turn(place: int) -> tuple[int, int, bytes]:
            problem, step = problems[place], place // (prompts_per_step or len(problems))
            number = tasks[problem.source]
            chance = digest(f"mode {seed} {step} {problem.problem_id}")
            return number, -step if number % 2 else step, chance

        free = [place for place, problem in enumerate(problems) if problem.mode is None]
        share, parts = exact_decimal(self.thinking_fraction).as_integer_ratio()
        # Of the first n problems, n times the fraction and a half think, rounded down.
        thinking = {
            place
            for number, place in enumerate(sorted(free, key=turn))
            if (2 * number * share + parts) // (2 * parts) < (2 * (number + 1) * share + parts) // (2 * parts)
        }
        return [
            (problem, problem.mode or (THINKING if place in thinking else NON_THINKING))
            for place, problem in enumerate(problems)
        ]


def asked_in(mode: Mode, problems: Iterable[Problem]) -> list[Problem]:
    """The problems that are evaluated in `mode`: all but those whose data names the other."""
    return [problem for problem in problems if problem.mode in (None, mode)]


def prompt_ids(problem: Problem, mode: Mode, tokenizer: ChatTokenizer, *, flag_fraction: float = 0.0) -> list[int]:
    """What the policy is asked. Whether we add a flag depends on the problem alone, and so does a flag of its own.

    A flag is added to the user's last turn: a tool's result after it is nobody's wish. Raises UserError where a turn
    holds a token that ends turns, as prompts do to which a chat template was applied already, or where the template
    leaves the problem's tools out.
    """
    return _prompt_ids(problem, problem.conversation, mode, tokenizer, flag_fraction)


def teacher_prompt_ids(
    problem: Problem, mode: Mode, tokenizer: ChatTokenizer, *, flag_fraction: float = 0.0
) -> list[int]:
    """What the teacher reads before the response: `prompt_ids`, unless the problem has a prompt of its own for it.

    Thinking of the teacher's own ends its prompt; a think block elsewhere is what the prompt speaks of. Raises
    UserError as `prompt_ids`, where such thinking would stand before a response that begins with a think block itself,
    and where the prompt asks for the other mode or has no user's turn to ask for it as the student's does.
    """
    messages = problem.teacher_conversation
    if problem.teacher_prompt is None:
        return _prompt_ids(problem, messages, mode, tokenizer, flag_fraction)
    whose, flagged = f"problem {problem.problem_id} of family {problem.family!r}", flagged_mode(messages)
    if flagged not in (None, mode):
        raise UserError(
            f"{whose}: its teacher_prompt says /{MODE_FLAGS[flagged]}, but the student is asked in {mode} mode; "
            "take it out"
        )
    if _flagged(problem, flag_fraction, tokenizer) and not any(message["role"] == "user" for message in messages):
        raise UserError(
            f"{whose}: its teacher_prompt has no user's turn, which could say /{MODE_FLAGS[mode]} as the student's "
            "prompt does; give it one, or take the flags away (modes.flag_fraction 0)"
        )
    turn = messages[-1]
    text = str(turn.get("content", "")).rstrip()
    before, start, thinking = text.removesuffix(THINK_END).rpartition(THINK_START)
    if not start or not text.endswith(THINK_END):
        return _prompt_ids(problem, messages, mode, tokenizer, flag_fraction)
    if mode == THINKING or _flagged(problem, flag_fraction, tokenizer):
        raise UserError(
            f"{whose}: its teacher_prompt ends with a think block, which takes the place of the empty one before a "
            "non-thinking answer; ask in non_thinking mode without flags: modes.thinking_fraction 0, "
            "modes.flag_fraction 0, evaluation.modes ('non_thinking',)"
        )
    _require_none_of((THINK_END,), problem, "teacher_prompt's thinking", thinking)
    turn["content"] = before.rstrip()
    return _prompt_ids(problem, messages, THINKING, tokenizer, 0) + tokenizer.thinking_ids(thinking.strip("\n"))


def _prompt_ids(
    problem: Problem, messages: list[dict[str, Any]], mode: Mode, tokenizer: ChatTokenizer, flag_fraction: float
) -> list[int]:
    for message in messages:
        _require_none_of(_ends(tokenizer), problem, f"{message['role']} turn", str(message.get("content", "")))
    # Without any, but by the same one of several templates.
    if problem.tools and tokenizer.render(messages, tools=problem.tools) == tokenizer.render(messages, tools=()):
        raise UserError(
            f"problem {problem.problem_id} of family {problem.family!r} has tools, of which the chat template says "
            "nothing; use a checkpoint whose template does, or leave out the tools"
        )
    if not _flagged(problem, flag_fraction, tokenizer):
        return tokenizer.prompt_ids(messages, mode, tools=problem.tools)
    if last_flag(messages) is None:
        turn = next(message for message in reversed(messages) if message["role"] == "user")
        turn["content"] = with_flag(turn["content"], MODE_FLAGS[mode])
    # A flag alone must do: the template is rendered in its default mode, so /no_think has nothing prefilled to help.
    return tokenizer.prompt_ids(messages, THINKING, tools=problem.tools)


def worked_document(problem: Problem, mode: Mode, tokenizer: ChatTokenizer, *, flag_fraction: float = 0.0) -> Rollout:
    """The ideal response to `problem` in `mode` as a rollout whose response is trained.

    Raises UserError where the problem has no answer, or no worked solution to think with, or where a text that is to be
    trained holds marks that are added here.
    """
    prompt = prompt_ids(problem, mode, tokenizer, flag_fraction=flag_fraction)
    if mode == THINKING:
        solution = _solution(problem, tokenizer, "train on non-thinking mode only (modes.thinking_fraction 0)")
        response = tokenizer.response_ids(solution, _answer(problem, tokenizer), THINKING)
    elif _flagged(problem, flag_fraction, tokenizer):
        response = tokenizer.response_ids("", _answer(problem, tokenizer), THINKING)
    else:
        response = tokenizer.response_ids(None, _answer(problem, tokenizer), NON_THINKING)
    return _document(problem, mode, prompt, response)


def raw_document(problem: Problem, tokenizer: ChatTokenizer) -> Rollout:
    """Question, working and answer as running text without any chat format, as a base model would meet them."""
    turns = [message["content"] for message in problem.conversation if message.get("content")]
    solution = _solution(problem, tokenizer, 'set form to "chat"')
    text = "\n".join([*turns, solution, _answer(problem, tokenizer)])
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


def _solution(problem: Problem, tokenizer: ChatTokenizer, remedy: str) -> str:
    """Raises UserError where there is none; `remedy` says what else would do."""
    if problem.solution is None:
        raise UserError(
            f"problem {problem.problem_id} of family {problem.family!r} has no worked solution; "
            f"give the data a solution column, or {remedy}"
        )
    _require_none_of((THINK_START, THINK_END, *_ends(tokenizer)), problem, "solution", problem.solution)
    return problem.solution


def _answer(problem: Problem, tokenizer: ChatTokenizer) -> str:
    if not problem.known_answer.strip():
        raise UserError(
            f"problem {problem.problem_id} of family {problem.family!r} has many right answers and gives none to "
            "imitate; leave that family out, or let the teacher answer it"
        )
    _require_none_of((THINK_START, THINK_END, *_ends(tokenizer)), problem, "answer", problem.known_answer)
    return problem.known_answer


def _ends(tokenizer: ChatTokenizer) -> list[str]:
    return [tokenizer.decode([one]) for one in tokenizer.eos_ids]


def _require_none_of(marks: Iterable[str], problem: Problem, what: str, text: str) -> None:
    """Refuses a text with marks of a chat format inside: its own would stand beside them."""
    if found := [mark for mark in marks if mark in text]:
        raise UserError(
            f"problem {problem.problem_id} of family {problem.family!r}: its {what} has {found[0]} inside, a mark of "
            "the chat format, which is added to plain texts; take it out of the data"
        )


def _flagged(problem: Problem, fraction: float, tokenizer: ChatTokenizer) -> bool:
    """Whether a flag tells the mode: the prompt's own, or one that we add where there is a user's turn to hold it.

    None does where a checkpoint has but one mode.
    """
    if len(tokenizer.modes) < len(MODES):
        return False
    if last_flag(problem.conversation) is not None:
        return True
    drawn = int.from_bytes(digest(f"flag {problem.problem_id}")) / 2**64 < fraction
    return drawn and any(message["role"] == "user" for message in problem.conversation)
