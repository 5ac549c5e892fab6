"""Any family of reasoning-gym under its own verifier, made reproducible, unique and split like every other task."""

import dataclasses
import difflib
import functools
import random
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Final

from distill.tasks.drawing import Weight, check_searchable, mix, stream_seed, unique_problems
from distill.tasks.problem import Excluded, Problem, Split, gives, split_of
from qwen3.errors import UserError
from qwen3.field_types import Share, check_fields, shown

_CHUNK_PROBLEMS: Final = 500
_ENTRY: Final = "reasoning_gym_entry"

# reasoning-gym hands these families' answers to Python's eval, directly or through sympy's parse_expr, and a model's
# text must not run. An answer reaches the verifier only if it consists of what right answers consist of.
_CAPITALS_AND_LISTS: Final = re.compile(r"[A-Z0-9_\s,\[\]]*")
_SUMS_AND_PRODUCTS: Final = re.compile(r"(?!.*\*\*)[0-9+\-*/(). ]{0,300}")
# No names of two letters; powers only of a letter and to at most 99, lest one answer keep the machine busy.
_POLYNOMIAL: Final = re.compile(
    r"(?!.*[A-Za-z]{2})(?!.*[^A-Za-z]\*\*)(?!.*\*\*(?![0-9]{1,2}(?![0-9])))[A-Za-z0-9+\-*() ]{0,1000}"
)
_HARMLESS_ANSWERS: Final[Mapping[str, re.Pattern[str]]] = {
    "binary_matrix": _CAPITALS_AND_LISTS,
    "n_queens": _CAPITALS_AND_LISTS,
    "spiral_matrix": _CAPITALS_AND_LISTS,
    "string_insertion": _CAPITALS_AND_LISTS,
    "countdown": _SUMS_AND_PRODUCTS,
    "puzzle24": _SUMS_AND_PRODUCTS,
    "polynomial_multiplication": _POLYNOMIAL,
}
_REFUSED: Final[Mapping[str, str]] = {
    "codeio": "it runs code that draws unseeded random numbers, so its questions differ from run to run",
    "intermediate_integration": "its verifier runs the answer as Python code",
    "simple_integration": "its verifier runs the answer as Python code",
    "game_of_life_halting": "its verifier passes every answer",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GymFamily:
    """How often and with what options a reasoning-gym data set is asked."""

    weight: Weight = 1.0
    """Share of this family, relative to the others'."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword options of the data set, other than seed and size."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """Families of reasoning-gym by name, e.g. `{"countdown": GymFamily(options={"min_numbers": 3})}`.

    An answer passes only where the family's own verifier gives the full score.
    """

    families: dict[str, GymFamily]
    """What is asked, by the names that reasoning-gym gives its data sets."""
    held_out_fraction: Share = 0.1
    """Share of all questions that is kept from training; 1 keeps them all for evaluation, 0 none."""
    weight: Weight = 1.0
    """Share of this task's problems, relative to the other tasks'; 0 leaves it out."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_searchable(self.held_out_fraction)
        if not any(family.weight for family in self.families.values()):
            raise UserError("families has no family with a positive weight; name at least one reasoning-gym data set")
        for name, family in self.families.items():
            _check_family(name, family.options)

    def problems(self, split: Split, count: int, seed: int, without: Excluded | None = None) -> list[Problem]:
        """See `Task.problems`."""
        return mix(
            {
                name: (
                    family.weight,
                    unique_problems(_candidates(name, family.options, seed), split, self.held_out_fraction, without),
                )
                for name, family in self.families.items()
            },
            count=count,
            seed=seed,
            split=split,
        )

    def size(self, split: Split, without: Excluded | None = None) -> None:
        """None: there are as many as the options of the families allow."""

    def holds_out(self, question_text: str) -> bool:
        """See `Task.holds_out`; since what a generator may ask is not known, the held-out share of all questions."""
        return split_of(question_text, self.held_out_fraction) == "held_out"

    def gives(self, split: Split) -> bool:
        """See `Task.gives`."""
        return gives(split, self.held_out_fraction)

    def left_out(self, without: Excluded | None = None) -> list[str]:
        """Empty: what a generator does not ask is no data that anybody gave."""
        return []

    def verify(self, problem: Problem, answer_text: str) -> bool:
        """Whether the family's verifier gives the text, white space around it aside, the full score of 1."""
        if problem.family not in self.families or problem.details is None:
            raise ValueError(f"problem is of family {problem.family!r}; ask the task that made it")
        answer = answer_text.strip()
        harmless = _HARMLESS_ANSWERS.get(problem.family)
        if harmless is not None and harmless.fullmatch(answer) is None:
            return False
        try:
            return self._scorers[problem.family](answer, problem.details[_ENTRY]) >= 1.0
        except Exception:  # noqa: BLE001 - verifiers parse answers unguarded; what they cannot parse is no exact answer
            return False

    def working_is_correct(self, problem: Problem, thinking_text: str) -> None:
        """None: reasoning-gym knows answers, not the way to them."""

    @functools.cached_property
    def _scorers(self) -> dict[str, Any]:
        return {name: _dataset(name, family.options, 0).score_answer for name, family in self.families.items()}


def _candidates(name: str, options: Mapping[str, Any], seed: int) -> Iterator[Problem]:
    chunk = 0
    while True:
        chunk_seed = stream_seed(name, seed, chunk)
        dataset = _dataset(name, options, chunk_seed)
        for index in range(_CHUNK_PROBLEMS):
            item = _item(name, dataset, index, chunk_seed)
            # Some families have many right answers and give none.
            answer = "" if item["answer"] is None else str(item["answer"])
            yield Problem(prompt=item["question"], answer=answer, family=name, details={_ENTRY: item})
        chunk += 1


def _item(name: str, dataset: Any, index: int, chunk_seed: int) -> dict[str, Any]:
    # A few generators draw from Python's global random state as well as from their seed.
    state = random.getstate()
    random.seed(chunk_seed + index)
    try:
        return dataset[index]
    except Exception as error:  # Its options are somebody's, and a generator checks few of them.
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"families.{name}.options: reasoning-gym cannot make a problem with them ({said}); change them"
        ) from error
    finally:
        random.setstate(state)


def _dataset(name: str, options: Mapping[str, Any], seed: int) -> Any:
    return _factory().create_dataset(name, seed=seed, size=_CHUNK_PROBLEMS, **options)


def _check_family(name: str, options: Mapping[str, Any]) -> None:
    known_families = _factory().DATASETS
    if name not in known_families:
        raise UserError(
            f"families has {name!r}, which reasoning-gym does not have{_nearest(name, list(known_families))}"
        )
    if name in _REFUSED:
        raise UserError(f"families has {name!r}, but {_REFUSED[name]}; use another family")
    known = [field.name for field in dataclasses.fields(known_families[name][1]) if field.name not in ("seed", "size")]
    for option in options:
        if option not in known:
            raise UserError(f"families.{name}.options has {option!r}, which it does not know{_nearest(option, known)}")
    try:
        _dataset(name, options, 0)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"families.{name}.options {shown(options)} are refused by reasoning-gym: {said}") from error


def _factory() -> ModuleType:
    # Imported here: the package is optional, and loads a hundred generators that a listing need not wait for.
    try:
        from reasoning_gym import factory
    except ModuleNotFoundError as error:
        raise UserError(
            f"ReasoningGym needs the package reasoning-gym ({error}); pip install 'distill-jax[tasks]'"
        ) from error
    return factory


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; perhaps you meant {close[0]!r}" if close else f"; known are {', '.join(sorted(known))}"
