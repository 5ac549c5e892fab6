"""Several tasks in one experiment stay apart: in what is held out, and in who judges."""

import dataclasses
import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from distill.tasks import Arithmetic, ChainSum, Products, PromptFile
from distill.tasks.drawing import turns_by_weight
from distill.tasks.mixture import TaskMixture
from distill.tasks.problem import Problem, Task
from qwen3.errors import UserError

SMALL = Arithmetic(chain_sum=ChainSum(min_terms=2, max_terms=2), products=Products(weight=0))


def prompt_file(folder: Path, name: str, questions: list[str], *, answer: str | None = None, **fields) -> PromptFile:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "answer": answer or q[-1]}) + "\n" for q in questions))
    return PromptFile(path=str(path), **fields)


def questions(problems: list[Problem]) -> set[str]:
    return {problem.question_text for problem in problems}


def test_what_one_task_holds_out_no_task_trains_on(tmp_path: Path) -> None:
    shared = [f"Question {n} of both files?" for n in range(200)]
    more = prompt_file(tmp_path, "more", shared, held_out_fraction=0.4)
    less = prompt_file(tmp_path, "less", shared, held_out_fraction=0.1)
    alone, held_out = less.size("train"), questions(more.problems("held_out", more.size("held_out"), 0))
    assert questions(less.problems("train", alone, 0)) & held_out, "the files by themselves do not disagree"
    mixture = TaskMixture({"more": more, "less": less})
    train = mixture.problems("train", 2 * more.size("train"), seed=3)
    assert not questions(train) & held_out
    assert questions(train) == set(shared) - held_out
    with pytest.raises(UserError, match=f"task 'less': .* has {more.size('train')} train problems"):
        TaskMixture({"less": less, "more": more}).problems("train", 2 * alone, seed=3)


def test_a_generated_task_and_a_file_of_its_questions(tmp_path: Path) -> None:
    generated = [problem.prompt for split in ("train", "held_out") for problem in SMALL.problems(split, 15, 0)]
    file = prompt_file(tmp_path, "copied", generated, held_out_path=None, held_out_fraction=0.5)
    mixture: dict[str, Task] = {"arithmetic": SMALL, "copied": file}
    train = TaskMixture(mixture).problems("train", 2 * file.size("train", SMALL.holds_out), seed=0)
    for task in mixture.values():
        assert not any(task.holds_out(problem.question_text) for problem in train)
    # The file alone would train on some of what the generator holds out, and the other way round.
    assert any(SMALL.holds_out(question) for question in generated)
    assert questions(SMALL.problems("train", 150, 0)) & questions(file.problems("held_out", file.size("held_out"), 0))


def test_the_same_question_of_two_tasks_is_judged_by_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tasks = {
        "exact": prompt_file(tmp_path / "a", "same", ["How many?"], answer="1/2", held_out_fraction=0),
        "math": prompt_file(tmp_path / "b", "same", ["How many?"], answer="1/2", held_out_fraction=0, verifier="math"),
    }
    mixture = TaskMixture(tasks)
    exact, mathematical = mixture.problems("train", 2, seed=0)
    assert exact.problem_id != mathematical.problem_id
    assert [mixture.verify(problem, "0.5") for problem in (exact, mathematical)] == [False, True]
    (alone,) = TaskMixture({"exact": tasks["exact"]}).problems("train", 1, seed=0)
    assert alone.problem_id not in {exact.problem_id, mathematical.problem_id}
    assert alone == tasks["exact"].problems("train", 1, 0)[0], "a single task's problems are as they are"


def test_a_file_starts_again_in_a_new_order(tmp_path: Path) -> None:
    asked = [f"Question {n}?" for n in range(40)]
    mixture = TaskMixture({"file": prompt_file(tmp_path, "file", asked)})
    size = PromptFile(path=str(tmp_path / "file.jsonl")).size("train")
    many = mixture.problems("train", 3 * size + 5, seed=1, repeat=True)
    epochs = [[problem.prompt for problem in many[first : first + size]] for first in range(0, 3 * size, size)]
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert mixture.problems("train", size + 7, seed=1, repeat=True) == many[: size + 7], "no prefix"
    assert mixture.problems("train", size, seed=1) == many[:size], "another first epoch"
    assert not questions(many) & questions(mixture.problems("held_out", 40 - size, seed=0))
    with pytest.raises(UserError, match="ask for fewer"):
        mixture.problems("train", size + 1, seed=1)


def test_an_empty_side_is_refused_even_where_problems_may_repeat(tmp_path: Path) -> None:
    file = prompt_file(tmp_path, "file", ["Only this?"], held_out_fraction=1)
    with pytest.raises(UserError, match="has 0 train problems"):
        TaskMixture({"file": file}).problems("train", 3, seed=0, repeat=True)


def test_generated_tasks_are_spread_evenly_and_never_repeat() -> None:
    mixture = TaskMixture({"first": SMALL, "second": SMALL})
    found = mixture.problems("train", 60, seed=0, repeat=True)
    assert [problem.source for problem in found] == ["first", "second"] * 30
    assert len({problem.problem_id for problem in found}) == 60
    assert mixture.problems("train", 20, seed=0) == found[:20]


@pytest.mark.parametrize(
    "weights", [(1, 1), (1, 1, 1), (3, 1), (0.1, 0.2, 0.7), (5, 2, 2, 1), (1, 1000), (0.3, 0.3, 0.3, 0.05, 0.05), (7,)]
)
def test_every_prefix_holds_every_tasks_share(weights: tuple[float, ...]) -> None:
    named = {f"task {n}": weight for n, weight in enumerate(weights)}
    shares = {name: Fraction(repr(weight)) / sum(Fraction(repr(w)) for w in weights) for name, weight in named.items()}
    turns = turns_by_weight(named, 2500)
    taken: Counter[str] = Counter()
    for length, turn in enumerate(turns, start=1):
        taken[turn] += 1
        for name, share in shares.items():
            assert math.floor(share * length) <= taken[name] <= math.ceil(share * length)
    assert turns_by_weight(named, 777) == turns[:777]
    assert turns_by_weight({name: 10 * weight for name, weight in named.items()}, 100) == turns[:100]


def test_tasks_are_mixed_by_weight(tmp_path: Path) -> None:
    files = {
        name: prompt_file(tmp_path, name, [f"{name} {n}?" for n in range(100)], weight=weight)
        for name, weight in (("often", 3.0), ("seldom", 1.0), ("never", 0.0))
    }
    mixture = TaskMixture(files)
    for split, count in (("train", 80), ("held_out", 8)):
        found = mixture.problems(split, count, seed=1)
        assert Counter(problem.source for problem in found) == {"often": count * 3 // 4, "seldom": count // 4}
        assert mixture.problems(split, count // 2, seed=1) == found[: count // 2]
    with pytest.raises(UserError, match=r"task 'often': .*often\.jsonl: has \d\d train problems, 150 were asked for"):
        mixture.problems("train", 200, seed=1)
    # Asked again and again, in a new order each time.
    assert len(mixture.problems("train", 400, seed=1, repeat=True)) == 400


def test_a_task_of_no_weight_still_holds_out(tmp_path: Path) -> None:
    shared = [f"Question {n}?" for n in range(100)]
    tested = prompt_file(tmp_path, "tested", shared[:40], held_out_fraction=1, weight=0)
    mixture = TaskMixture({"trained": prompt_file(tmp_path, "trained", shared, held_out_fraction=0), "tested": tested})
    assert questions(mixture.problems("train", 60, seed=0)) == set(shared[40:])
    with pytest.raises(
        UserError, match=r"tasks\.tested\.weight is 0, as that of all tasks; give one a positive weight"
    ):
        TaskMixture({"tested": tested})
    for kind in (tested, SMALL):
        with pytest.raises(UserError, match=r"weight is -1; it must be 0, to leave it out, or a positive number"):
            dataclasses.replace(kind, weight=-1)


def test_what_is_left_out_is_counted_and_said_by_task(tmp_path: Path) -> None:
    asked = [f"Question {n}?" for n in range(20)]
    test = prompt_file(tmp_path, "test", asked[:3])
    train = prompt_file(tmp_path, "train", [*asked, asked[4], asked[5]], held_out_path=test.path)
    (tmp_path / "train.jsonl").open("a").write(json.dumps({"prompt": asked[6], "answer": "another"}) + "\n")
    alone = TaskMixture({"ours": train})
    assert alone.left_out() == [
        f"task 'ours': {train.path}: rows left out because an earlier one asks the same: 3, of them with another "
        "answer: 1",
        f"task 'ours': {train.path}: problems not trained on because {test.path} holds them out: 3",
    ]
    other = prompt_file(tmp_path, "other", asked[10:14], held_out_fraction=1)
    assert TaskMixture({"ours": train, "sums": SMALL, "other": other}).left_out() == [
        *alone.left_out(),
        f"task 'ours': {train.path}: problems not trained on because another task holds them out: 4",
    ]


def test_a_task_that_holds_out_all_is_only_evaluated_and_one_that_holds_out_nothing_only_trained_on(
    tmp_path: Path,
) -> None:
    names = {"both": 0.5, "evaluated": 1, "trained": 0}
    mixture = TaskMixture(
        {
            name: prompt_file(tmp_path, name, [f"{name} {i}?" for i in range(40)], held_out_fraction=fraction)
            for name, fraction in names.items()
        }
    )
    sources = {split: {p.source for p in mixture.problems(split, 10, seed=0)} for split in ("train", "held_out")}
    assert sources == {"train": {"both", "trained"}, "held_out": {"both", "evaluated"}}
