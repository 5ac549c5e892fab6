"""A user's own prompts and answers, from JSONL or Parquet, checked row by row before anything is trained on them."""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from distill.tasks.drawing import check_fraction
from distill.tasks.problem import Excluded, Problem, Split, plain_words, split_of
from distill.tasks.verifiers import equal_integers, equal_mathematics, equal_texts
from qwen3.errors import UserError
from qwen3.rollout import MODES

Verifier = Literal["exact", "integer", "math"]
_VERIFIERS: Final[Mapping[Verifier, Callable[[str, str], bool]]] = {
    "exact": equal_texts,
    "integer": equal_integers,
    "math": equal_mathematics,
}
_ROLES: Final = ("system", "user", "assistant", "tool")
_JSONL_SUFFIXES: Final = (".jsonl", ".ndjson")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Problems from a JSONL (`.jsonl`, `.ndjson`) or Parquet (`.parquet`) file, one a row.

    Of rows that ask the same question the first counts.
    """

    path: str
    """The file."""
    held_out_path: str | None = None
    """A file of the same columns whose problems are all held out. Its questions are then left out of `path`, and
    `held_out_fraction` is not used."""
    held_out_fraction: float = 0.1
    """Share of the questions in `path` that is kept from training."""
    prompt_column: str = "prompt"
    """Column of the questions, one user turn each."""
    messages_column: str | None = None
    """Column of conversations, `[{"role": "user", "content": "…"}, …]`, used in place of `prompt_column`."""
    answer_column: str = "answer"
    """Column of the right answers, which the verifier compares with; texts or whole numbers."""
    solution_column: str | None = None
    """Column of worked thinking; may be null in some rows."""
    family_column: str | None = None
    """Column that names the family of each row; without it, the file's name does."""
    mode_column: str | None = None
    """Column that says `thinking` or `non_thinking`; null leaves the choice to the stage."""
    verifier: Verifier = "exact"
    """`exact`: the same text but for white space; `integer`: one whole number; `math`: math-verify."""

    def __post_init__(self) -> None:
        check_fraction(self.held_out_fraction)
        if self.verifier not in _VERIFIERS:
            raise UserError(f"verifier is {self.verifier!r}; use one of {', '.join(_VERIFIERS)}")

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

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether the text is the answer, as `verifier` compares them."""
        return _VERIFIERS[self.verifier](answer_text, problem.answer)

    def working_is_correct(self, problem: Problem, thinking_text: str) -> None:
        """None: a file says what is right, not which ways lead there."""

    def _side(self, split: Split, without: Excluded | None) -> list[Problem]:
        found = self._sides[split]
        return found if without is None else [problem for problem in found if not without(problem.question_text)]

    @functools.cached_property
    def _held_out_words(self) -> frozenset[str]:
        return frozenset(plain_words(problem.question_text) for problem in self._sides["held_out"])

    @functools.cached_property
    def _sides(self) -> dict[Split, list[Problem]]:
        sides: dict[Split, list[Problem]] = {"train": [], "held_out": []}
        if self.held_out_path is not None:
            sides["held_out"] = list(self._read(self.held_out_path).values())
            held_out = {plain_words(problem.question_text) for problem in sides["held_out"]}
            sides["train"] = [
                problem
                for problem in self._read(self.path).values()
                if plain_words(problem.question_text) not in held_out
            ]
            return sides
        for problem in self._read(self.path).values():
            sides[split_of(problem.question_text, self.held_out_fraction)].append(problem)
        return sides

    def _read(self, path: str) -> dict[str, Problem]:
        found: dict[str, Problem] = {}
        for where, row in _rows(Path(path), self._columns):
            problem = self._problem(where, row, family=Path(path).stem)
            found.setdefault(problem.problem_id, problem)
        if not found:
            raise UserError(f"{path}: has no rows; give a file with at least one problem")
        return found

    def _problem(self, where: str, row: Mapping[str, Any], *, family: str) -> Problem:
        messages = None
        if self.messages_column is not None:
            messages = _messages(where, self.messages_column, row[self.messages_column])
            prompt = messages[-1]["content"]
            if len(messages) == 1 and messages[0]["role"] == "user":
                messages = None
        else:
            prompt = _text(where, self.prompt_column, row[self.prompt_column])
        answer = _answer(where, self.answer_column, row[self.answer_column])
        if self.verifier == "integer" and not equal_integers(answer, answer):
            raise UserError(
                f"{where}: {self.answer_column} is {answer!r}, which verifier 'integer' cannot compare; "
                "use verifier 'exact' or 'math', or mend the row"
            )
        mode = _optional_text(where, self.mode_column, row)
        if mode is not None and mode not in MODES:
            raise UserError(f"{where}: {self.mode_column} is {mode!r}; use one of {', '.join(MODES)}, or null")
        return Problem(
            prompt=prompt,
            answer=answer,
            solution=_optional_text(where, self.solution_column, row),
            family=_optional_text(where, self.family_column, row) or family,
            mode=mode,
            messages=messages,
        )

    @property
    def _columns(self) -> list[str]:
        question = self.prompt_column if self.messages_column is None else self.messages_column
        optional = [self.solution_column, self.family_column, self.mode_column]
        return [question, self.answer_column, *(column for column in optional if column is not None)]


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a JSONL or Parquet file")
    try:
        if path.suffix in _JSONL_SUFFIXES:
            yield from _jsonl_rows(path, columns)
        elif path.suffix == ".parquet":
            yield from _parquet_rows(path, columns)
        else:
            raise UserError(f"{path}: ends in {path.suffix!r}; give a {', '.join(_JSONL_SUFFIXES)} or .parquet file")
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}); check the file or copy it again") from error


def _jsonl_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
            except json.JSONDecodeError as error:
                reason = f"{error.msg}, column {error.colno}"
                raise UserError(f"{where}: not JSON ({reason}); write one JSON object a line") from error
            except (ValueError, RecursionError) as error:
                # A number of thousands of digits, or brackets nested as deep.
                raise UserError(f"{where}: not JSON that can be read ({error}); mend the line") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: holds {_kind(row)}; write one JSON object a line")
            _check_columns(where, columns, list(row))
            yield where, row


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(str(path), columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({first_line}); write or copy it again") from error


def _check_columns(where: str, wanted: list[str], present: list[str]) -> None:
    for column in wanted:
        if column not in present:
            close = difflib.get_close_matches(column, present, n=1)
            remedy = f"perhaps you meant {close[0]!r}" if close else f"it has {', '.join(sorted(present)) or 'none'}"
            raise UserError(f"{where}: has no column {column!r}; {remedy}")


def _text(where: str, column: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {column} is {_kind(value)}; give a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {column} has half of a surrogate pair; write the whole character") from error
    return value


def _answer(where: str, column: str, value: object) -> str:
    # Whole numbers have one spelling; other numbers do not, so those must come as texts.
    return str(value) if type(value) is int else _text(where, column, value)


def _optional_text(where: str, column: str | None, row: Mapping[str, Any]) -> str | None:
    return None if column is None or row[column] is None else _text(where, column, row[column])


def _messages(where: str, column: str, value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {column} is {_kind(value)}; give a list of messages with role and content")
    for position, message in enumerate(value, start=1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise UserError(f"{where}: {column} message {position} has no role of {', '.join(_ROLES)}; mend the row")
        if message["role"] != "assistant" or not message.get("tool_calls"):
            _text(where, f"{column} message {position} content", message.get("content"))
    if value[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{where}: {column} ends with a message of the {value[-1]['role']}; "
            "end it with the user's and put the reply into the answer column"
        )
    # Parquet gives every message all the keys that any message has.
    return tuple({key: entry for key, entry in message.items() if entry is not None} for message in value)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a text" if value.strip() else "an empty text"
    if isinstance(value, bool):
        return f"the truth value {value}"
    if isinstance(value, int | float):
        return f"the number {value}"
    return f"a {type(value).__name__}"


def _place(problem: Problem, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{problem.problem_id}".encode(), digest_size=16).digest()
