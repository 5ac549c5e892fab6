"""A user's own prompts and answers, from JSONL or Parquet, checked row by row before anything is trained on them."""

import dataclasses
import decimal
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from distill.tasks.conversations import checked_messages, checked_text, checked_tools
from distill.tasks.drawing import Weight
from distill.tasks.problem import Excluded, Problem, Split, flagged_mode, gives, plain_words, split_of
from distill.tasks.rows import read_rows
from distill.tasks.verifiers import VERIFIERS, Verifier, unusable_references
from qwen3.chat.chat import MODE_FLAGS, split_response
from qwen3.errors import UserError
from qwen3.field_types import Share, check_fields
from qwen3.rollout import MODES, NON_THINKING, Mode

_SHOWN: Final = 4
_SHOWN_CHARACTERS: Final = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """What a file holds: its different problems, and how many rows were left out for them."""

    problems: Sequence[Problem]
    repeated: int
    """Rows whose question an earlier row asks."""
    contradicting: int
    """Those of them whose answer, or whose teacher, is another one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Problems from a JSONL (`.jsonl`, `.ndjson`) or Parquet (`.parquet`) file, one a row.

    A column inside of another is named with a dot: `reward_model.ground_truth`. Of rows that ask the same question in
    the same mode the first counts. A prompt that holds /think or /no_think is asked in that mode.
    """

    path: str
    """The file."""
    held_out_path: str | None = None
    """A file of the same columns, of which solutions may be missing, whose problems are all held out. Its questions are
    then left out of `path`, and `held_out_fraction` is not used."""
    held_out_fraction: Share = 0.1
    """Share of the questions in `path` that is kept from training; 1 keeps them all for evaluation, 0 none."""
    prompt_column: str = "prompt"
    """Column of the questions, one user turn each."""
    messages_column: str | None = None
    """Column of conversations, `[{"role": "user", "content": "…"}, …]`, used in place of `prompt_column`."""
    tools_column: str | None = None
    """Column of the functions that the policy may call, a list of JSON schemas or its JSON text; null for none."""
    answer_column: str | None = "answer"
    """Column of the right answers, which the verifier compares with; texts or numbers, null in rows that have none. A
    think block before an answer is worked thinking, and an empty one says `non_thinking`. None: no row has an answer.
    Prompts without one are trained on and evaluated, but not graded."""
    solution_column: str | None = None
    """Column of worked thinking, with or without <think> around it; null leaves it to the answer's think block."""
    family_column: str | None = None
    """Column that names the family of each row; without it, the file's name does."""
    mode_column: str | None = None
    """Column that says `thinking` or `non_thinking`, in which alone a row is then asked; null leaves the choice to
    stage and evaluation. A question in both modes has two rows."""
    teacher_column: str | None = None
    """Of several teachers, column that names the one who is asked about a row; null, or no column, leaves it to the one
    that has the task's name."""
    teacher_prompt_column: str | None = None
    """Column of what only the teacher reads in place of the question, a text or a conversation; null for what the
    student reads. The student's response is scored behind it. A think block at its end is the teacher's own thinking
    before a non-thinking answer."""
    verifier: Verifier = "exact"
    """`exact`: the same text but for white space; `integer`: one whole number; `math`: the same mathematical object,
    see `distill.tasks.verifiers.equal_mathematics`. An answer that no text can equal is refused with its row."""
    weight: Weight = 1.0
    """Share of this file's problems, relative to the other tasks'; 0 leaves it out."""

    def __post_init__(self) -> None:
        check_fields(self)

    def problems(self, split: Split, count: int, seed: int, without: Excluded | None = None) -> list[Problem]:
        """See `Task.problems`; the seed orders the rows."""
        if count < 0:
            raise ValueError(f"count is {count}; ask for 0 or more problems")
        found = self._side(split, without)
        if count > len(found):
            path = self.held_out_path if split == "held_out" and self.held_out_path else self.path
            raise UserError(f"{path}: has {len(found)} {split} problems, {count} were asked for; ask for fewer")
        return sorted(found, key=lambda problem: _place(problem, seed))[:count]

    def size(self, split: Split, without: Excluded | None = None) -> int:
        """See `Task.size`: the different questions of one side."""
        return len(self._side(split, without))

    def holds_out(self, question_text: str) -> bool:
        """See `Task.holds_out`: whether the file holds the question out."""
        return plain_words(question_text) in self._held_out_words

    def gives(self, split: Split) -> bool:
        """See `Task.gives`."""
        return self.held_out_path is not None or gives(split, self.held_out_fraction)

    def left_out(self, without: Excluded | None = None) -> list[str]:
        """See `Task.left_out`: rows that repeat a question, and questions that are held out elsewhere."""
        lines = []
        deciding = "answer" if self.teacher_column is None else "answer or teacher"
        for path, rows in self._files.items():
            if rows.repeated:
                lines.append(
                    f"{path}: rows left out because an earlier one asks the same: {rows.repeated}, of them with "
                    f"another {deciding}: {rows.contradicting}"
                )
        train = self._sides["train"]
        held_out = {
            str(self.held_out_path): len(self._files[self.path].problems) - len(train) if self.held_out_path else 0,
            "another task": len(train) - len(self._side("train", without)),
        }
        lines += [
            f"{self.path}: problems not trained on because {who} holds them out: {count}"
            for who, count in held_out.items()
            if count
        ]
        return lines

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether the text is the answer, as `verifier` compares them."""
        return VERIFIERS[self.verifier](answer_text, problem.known_answer)

    def working_is_correct(self, problem: Problem, thinking_text: str) -> None:
        """None: a file says what is right, not which ways lead there."""

    def _side(self, split: Split, without: Excluded | None) -> list[Problem]:
        found = self._sides[split]
        return found if without is None else [problem for problem in found if not without(problem.user_words)]

    @functools.cached_property
    def _held_out_words(self) -> frozenset[str]:
        return frozenset(problem.user_words for problem in self._sides["held_out"])

    @functools.cached_property
    def _sides(self) -> dict[Split, list[Problem]]:
        sides: dict[Split, list[Problem]] = {"train": [], "held_out": []}
        if self.held_out_path is not None:
            sides["held_out"] = list(self._files[self.held_out_path].problems)
            held_out = {problem.user_words for problem in sides["held_out"]}
            sides["train"] = [
                problem for problem in self._files[self.path].problems if problem.user_words not in held_out
            ]
            return sides
        for problem in self._files[self.path].problems:
            sides[split_of(problem.user_words, self.held_out_fraction)].append(problem)
        return sides

    @functools.cached_property
    def _files(self) -> dict[str, _Rows]:
        return {path: self._read(path) for path in (self.held_out_path, self.path) if path is not None}

    def _read(self, path: str) -> _Rows:
        found: dict[str, Problem] = {}
        places: dict[str, str] = {}
        repeated = contradicting = 0
        stem = Path(path).stem
        columns = self._columns(held_out=path == self.held_out_path)
        for where, row in read_rows(Path(path), columns):
            problem = self._problem(where, row, family=stem)
            first = found.setdefault(problem.problem_id, problem)
            places.setdefault(problem.problem_id, where)
            repeated += first is not problem
            contradicting += (first.answer, first.teacher) != (problem.answer, problem.teacher)
        if not found:
            raise UserError(f"{path}: has no rows; give a file with at least one problem")
        answered = {places[name]: one.answer for name, one in found.items() if one.answer is not None}
        self._check_answers(list(answered), list(answered.values()))
        return _Rows(problems=list(found.values()), repeated=repeated, contradicting=contradicting)

    def _check_answers(self, places: list[str], answers: list[str]) -> None:
        unusable = unusable_references(self.verifier, answers)
        if not unusable:
            return
        first, *others = [f"{places[i]}: {self.answer_column} is {answers[i][:_SHOWN_CHARACTERS]!r}" for i in unusable]
        more = f" (nor {'; '.join(others[:_SHOWN])}; {len(unusable)} in all)" if others else ""
        raise UserError(
            f"{first}, which verifier {self.verifier!r} cannot compare{more}; "
            f"use another verifier ({', '.join(VERIFIERS)}), or mend the {'rows' if others else 'row'}"
        )

    def _problem(self, where: str, row: Mapping[str, Any], *, family: str) -> Problem:
        messages = None
        if self.messages_column is not None:
            messages = checked_messages(where, self.messages_column, row[self.messages_column])
            prompt = messages[-1]["content"]
            if len(messages) == 1 and messages[0]["role"] == "user":
                messages = None
        else:
            prompt = checked_text(where, self.prompt_column, row[self.prompt_column])
        thinking, answer = _answer(where, self.answer_column, row)
        mode = _mode(where, self.mode_column, row, flagged_mode(messages or [{"role": "user", "content": prompt}]))
        if mode is None and thinking is not None and not thinking.strip():
            mode = NON_THINKING
        return Problem(
            prompt=prompt,
            answer=answer,
            solution=_solution(where, self.solution_column, row) or (thinking or "").strip() or None,
            family=_name(where, self.family_column, row) or family,
            teacher=_name(where, self.teacher_column, row) or "",
            teacher_prompt=_teacher_prompt(where, self.teacher_prompt_column, row),
            mode=mode,
            messages=messages,
            tools=checked_tools(where, self.tools_column, row[self.tools_column]) if self.tools_column else None,
        )

    def _columns(self, *, held_out: bool) -> Mapping[str, str | None]:
        """The columns that are read, and of each what else can be done where a row lacks it."""
        question = self.prompt_column if self.messages_column is None else self.messages_column
        others = (
            self.tools_column, self.family_column, self.mode_column, self.teacher_column, self.teacher_prompt_column,
        )  # fmt: skip
        remedies: dict[str | None, str | None] = dict.fromkeys((question, *others), "")
        # Nobody trains on what is held out: its solutions are for a teacher that reads them, if there is one.
        remedies[self.solution_column] = None if held_out else ""
        remedies[self.answer_column] = "; give null in a row without an answer, or set answer_column to None for all"
        return {column: remedy for column, remedy in remedies.items() if column is not None}


def _answer(where: str, column: str | None, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The thinking in front of an answer, None where no block holds any, and the answer, None where there is none."""
    if column is None or row[column] is None:
        return None, None
    if isinstance(row[column], str) and not row[column].strip():
        raise UserError(f"{where}: {column} is an empty text; give a text, or null where there is no answer")
    thinking, answer = split_response(_as_text(where, column, row[column]))
    if not answer.strip():
        raise UserError(f"{where}: {column} holds thinking and nothing after it; add the answer behind </think>")
    return thinking, answer


def _solution(where: str, column: str | None, row: Mapping[str, Any]) -> str | None:
    """Worked thinking without the block around it. What comes after a block is the answer's place."""
    if column is None or row.get(column) is None:
        return None
    thinking, text = split_response(checked_text(where, column, row[column]))
    return text if thinking is None else thinking


def _teacher_prompt(
    where: str, column: str | None, row: Mapping[str, Any]
) -> str | tuple[Mapping[str, Any], ...] | None:
    if column is None or row[column] is None:
        return None
    value = row[column]
    return checked_text(where, column, value) if isinstance(value, str) else checked_messages(where, column, value)


def _name(where: str, column: str | None, row: Mapping[str, Any]) -> str | None:
    return None if column is None or row[column] is None else _as_text(where, column, row[column])


def _mode(where: str, column: str | None, row: Mapping[str, Any], flagged: Mode | None) -> Mode | None:
    """The mode that a row asks for: by its column or by its prompt's own flag, which must not say the other."""
    named = None if column is None else row[column]
    if named is not None and named not in MODES:
        raise UserError(f"{where}: {column} is {named!r}; use one of {', '.join(MODES)}, or null")
    if named is not None and flagged is not None and named != flagged:
        raise UserError(f"{where}: {column} is {named!r}, but the prompt says /{MODE_FLAGS[flagged]}; mend the row")
    return flagged if named is None else named


def _as_text(where: str, column: str, value: object) -> str:
    """A text, or a number in digits alone, as few as tell it from all others."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(decimal.Decimal(repr(value)), "f")
    return checked_text(where, column, value)


def _place(problem: Problem, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{problem.problem_id}".encode(), digest_size=16).digest()
