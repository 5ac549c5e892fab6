import inspect
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distill.tasks import GymFamily, ReasoningGym
from distill.tasks.gym import _HARMLESS_ANSWERS, _REFUSED
from distill.tasks.math_answers import Comparison
from distill.tasks.verifiers import (
    MathProcess,
    equal_integers,
    equal_mathematics,
    equal_texts,
    unusable_references,
)
from qwen3.errors import UserError

# Pairs of a reference and an answer: 300 from data sets with the answers of a model or in other spellings, right and
# wrong, and 250 of the kinds that graders are known to get wrong. MATH, GSM8K and CHAMP are under the MIT licence.
PAIRS = [json.loads(line) for line in Path(__file__).with_name("math_pairs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("answer", ["-12", " -12\n", "-012", "−12", "-١٢", "-１２"])
def test_an_integer_passes_by_value(answer) -> None:
    assert equal_integers(answer, "-12")


@pytest.mark.parametrize(
    "answer", ["", "12", "-12.", "-12.0", "- 12", "-1 2", "-1_2", "so -12", "-12 or 5", "9" * 5000]
)
def test_anything_but_the_integer_fails(answer) -> None:
    assert not equal_integers(answer, "-12")


def test_commas_part_thousands_and_nothing_else() -> None:
    assert equal_integers("1,234,567", "1234567")
    assert equal_integers("1234567", "1,234,567")
    for answer in ("1,2,3,4,5,6,7", "1234,567", "1,234,56", "1,234,567.0"):
        assert not equal_integers(answer, "1234567")


def test_an_accent_of_its_own_is_the_same_text() -> None:
    assert equal_texts("Cafe\u0301 Zu\u0308rich", "Café Zürich")
    assert not equal_texts("Cafe Zurich", "Café Zürich")


def test_texts_differ_in_more_than_white_space_or_are_equal() -> None:
    assert equal_texts(" a  b\nc ", "a b c")
    assert not equal_texts("ab c", "a b c")
    assert not equal_texts("A b c", "a b c")
    assert not equal_texts("the answer is a b c", "a b c")


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("\\boxed{\\frac12}", "0.5", True),
        ("0.5", "\\frac{1}{2}", True),
        ("so it is $\\boxed{(1,2)}$", "(1, 2)", True),
        ("$2\\sqrt{3}$", "\\sqrt{12}", True),
        ("\\boxed{\\text{Evelyn}}", "Evelyn", True),
        ("1,000", "1000", True),
        ("3", "4", False),
        ("12 or 13", "12", False),
        ("", "5", False),
    ],
)
def test_mathematics_is_compared_by_meaning(answer, reference, equal) -> None:
    assert equal_mathematics(answer, reference) is equal


def test_known_pairs_are_judged_as_known() -> None:
    assert len(PAIRS) > 500
    assert [pair for pair in PAIRS if equal_mathematics(pair["answer"], pair["reference"]) is not pair["equal"]] == []


@pytest.mark.parametrize(
    "answer",
    [
        "\\boxed{" * 14_000,
        "\\boxed{" * 7_000 + "}" * 7_000,
        "\\boxed{" + "(" * 3_000 + "5" + ")" * 3_000 + "}",
        "\\boxed{" + "5 cm " * 20_000 + "}",
        "$" * 100_001,
        "\\[" * 50_000,
        "answer " * 15_000,
        "{" * 100_000,
        "4 " * 50_000,
        "\\boxed{10^{10}!}",
        "\\boxed{5 " + "\\text{a} " * 40 + "+ 1}",
        "\\boxed{\\[" + " " * 1_900 + "6}",
        "\\boxed{\\text{" + " " * 1_900 + "{}}}",
        "\\boxed{" + "\\$" * 900 + "6}",
        "9 2" + "^2" * 6_000,
        "Thus: " * 2_000 + "3",
    ],
)
def test_a_hopeless_answer_is_wrong_within_seconds(answer) -> None:
    started = time.monotonic()
    assert not equal_mathematics(answer, "5")
    assert time.monotonic() - started < 20


def test_mathematics_is_judged_in_threads_and_hopeless_expressions_are_wrong() -> None:
    verdicts = {}

    def judge(name: str, answer: str) -> None:
        verdicts[name] = equal_mathematics(answer, "\\frac{3}{4}")

    threads = [
        threading.Thread(target=judge, args=pair)
        for pair in [("right", "0.75"), ("hopeless", "$9^{9^{9}}$"), ("right too", "$\\frac{6}{8}$")]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {"right": True, "hopeless": False, "right too": True}


HALF = Comparison("\\frac{1}{2}", "0.5")


def test_a_process_that_is_too_slow_is_replaced() -> None:
    process = MathProcess()
    assert process.verdict(HALF) is True
    process.verdict_timeout_seconds = 0.5
    started = time.monotonic()
    assert process.verdict(Comparison("5", "9^{9^{9}}")) is False
    # math-verify itself would have gone on for 5 seconds.
    assert time.monotonic() - started < 2.5
    process.verdict_timeout_seconds = 30.0
    assert process.verdict(HALF) is True
    process._process.kill()
    process._process.wait()
    assert process.verdict(HALF) is True
    # Stopped, it takes the question and is then ended: it is asked again.
    process._process.send_signal(signal.SIGSTOP)
    threading.Timer(0.3, process._process.kill).start()
    assert process.verdict(HALF) is True
    process.close()


def test_a_process_that_takes_nothing_more_is_replaced() -> None:
    deaf = "import os, time; os.close(0); print('deaf', flush=True); time.sleep(60)"
    process = MathProcess()
    process._process = subprocess.Popen(
        [sys.executable, "-c", deaf], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process._process.stdout.readline() == b"deaf\n"
    assert process.verdict(HALF) is True
    # What math-verify cannot read is neither right nor wrong.
    assert process.verdict(Comparison("\\frac{", "\\frac{")) is None
    process.close()


def test_references_that_equal_nothing_are_found() -> None:
    broken = [
        *("\\frac{1}{0}", "\\frac{", "\\frac{1}{}", "x^", "a_", "", "$$", "5+", "(1,2", "1/0", "?", "\\sqrt", "{", "="),
        *("\\boxed{}", "\\boxed{5", "\\begin{pmatrix}1", "..."),
    ]
    whole = [
        *(
            "5",
            "\\frac{1}{10}",
            "x/0.5",
            "1/(x-0)",
            "\\emptyset",
            "∅",
            "Yes",
            "2024-05-03",
            "[0,1)",
            "|x|",
            "5!",
            "f'(x)",
        ),
        *(
            "\\{x \\mid x > 2\\}",
            "\\infty",
            "90^\\circ",
            "\\$5",
            "B",
            "\\text{a regular hexagon}",
            "\\boxed{5}",
            "#### 5",
        ),
        *(
            "\\left\\{\\begin{array}{l}x\\\\y\\end{array}\\right.",
            "12:00",
            "C(n,2)",
            "√2",
            "½",
            "i^{2}=-1",
            "0.1+0.2=0.3",
        ),
    ]
    assert unusable_references("math", [*whole, *broken]) == list(range(len(whole), len(whole) + len(broken)))
    assert unusable_references("integer", ["5", "x", "1,000", "1,00"]) == [1, 3]
    assert unusable_references("exact", ["5", "x"]) == []


def test_few_of_many_references_need_math_verify(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(MathProcess, "verdict", lambda self, comparison: asked.append(comparison) or True)
    references = [f"{pair['reference']} + {n}" for n in range(1, 20) for pair in PAIRS]
    started = time.process_time()
    unusable_references("math", references)
    # 10,000 formulas at 0.1 s each would take a quarter of an hour.
    assert len(asked) < 300
    assert time.process_time() - started < 20


def test_tasks_load_neither_math_verify_nor_reasoning_gym() -> None:
    check = "import sys, distill.tasks; print({'math_verify', 'reasoning_gym', 'sympy', 'pyarrow'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "set()"


FAMILIES = ReasoningGym(
    families={
        "basic_arithmetic": GymFamily(),
        "countdown": GymFamily(weight=2.0, options={"min_numbers": 3, "max_numbers": 3}),
        "graph_color": GymFamily(weight=0.5),
        "list_functions": GymFamily(),
    }
)


@pytest.fixture(scope="module")
def gym_problems():
    return FAMILIES.problems("train", 60, 0)


def test_gym_problems_are_reproducible_and_split(gym_problems) -> None:
    assert FAMILIES.problems("train", 25, 0) == gym_problems[:25]
    assert {p.family for p in gym_problems} == set(FAMILIES.families)
    held_out = {p.prompt for seed in range(3) for p in FAMILIES.problems("held_out", 10, seed)}
    assert held_out.isdisjoint(p.prompt for p in gym_problems)


def test_gym_answers_pass_only_at_the_full_score(gym_problems) -> None:
    for problem in gym_problems:
        if problem.answer:
            assert FAMILIES.verify(problem, f" {problem.answer}\n")
        assert not FAMILIES.verify(problem, "no such answer")
        assert FAMILIES.working_is_correct(problem, "1+1=2") is None
    arithmetic = next(p for p in gym_problems if p.family == "basic_arithmetic")
    # reasoning-gym gives partial credit where the answer occurs in the text.
    assert not FAMILIES.verify(arithmetic, f"the answer is {arithmetic.answer}")


def test_another_right_answer_passes_where_the_family_has_many(gym_problems) -> None:
    countdown = next(p for p in gym_problems if p.family == "countdown")
    assert FAMILIES.verify(countdown, f"({countdown.answer})")


def test_every_verifier_that_runs_answers_as_code_is_guarded() -> None:
    from reasoning_gym.factory import DATASETS

    runs_answers = {
        name
        for name, (dataset, _) in DATASETS.items()
        if re.search(
            r"\b(eval|exec|parse_expr|sympify)\((?!entry\b|metadata\b)", inspect.getsource(dataset.score_answer)
        )
    }
    assert runs_answers <= set(_HARMLESS_ANSWERS) | set(_REFUSED)
    assert set(_HARMLESS_ANSWERS) <= runs_answers


@pytest.mark.parametrize("name", sorted(_HARMLESS_ANSWERS))
def test_guarded_families_pass_their_answers_and_nothing_that_runs(name, tmp_path) -> None:
    task = ReasoningGym(families={name: GymFamily()})
    marker = tmp_path / "ran"
    for problem in task.problems("train", 3, 0):
        assert task.verify(problem, problem.answer)
        for attack in (
            f"open({str(marker)!r}, 'w')",
            f"__import__('pathlib').Path({str(marker)!r}).touch()",
            f"[open({str(marker)!r}, 'w')]",
            "9**9**9**9",
            "(9**99)**99",
            "x**9**9",
        ):
            assert not task.verify(problem, attack)
            assert _HARMLESS_ANSWERS[name].fullmatch(attack) is None
    assert not marker.exists()


def test_a_missing_reasoning_gym_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=re.escape("needs the package reasoning-gym")) as caught:
        ReasoningGym(families={"countdown": GymFamily()})
    assert str(caught.value).endswith("pip install 'distill-jax[tasks]'")


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({"chain_sums": GymFamily()}, "perhaps you meant 'chain_sum'"),
        (
            {"chain_sum": GymFamily(options={"min_term": 3})},
            "has 'min_term', which it does not know; perhaps you meant",
        ),
        ({"chain_sum": GymFamily(options={"min_terms": 9})}, "max_terms must be >= min_terms"),
        ({"chain_sum": GymFamily(options={"min_terms": "3"})}, "families.chain_sum.options"),
        ({"game_of_life_halting": GymFamily()}, "passes every answer"),
        ({"simple_integration": GymFamily()}, "runs the answer as Python code"),
        ({}, "name at least one"),
        ({"chain_sum": GymFamily(weight=0.0)}, "positive weight"),
    ],
)
def test_families_that_cannot_be_asked_are_refused_by_name(families, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ReasoningGym(families=families)


def test_options_with_which_no_problem_can_be_made_are_named() -> None:
    task = ReasoningGym(families={"simple_geometry": GymFamily(options={"min_angle": 100, "max_angle": 120})})
    with pytest.raises(UserError, match=r"families\.simple_geometry\.options: reasoning-gym cannot make a problem"):
        task.problems("train", 20, 0)
