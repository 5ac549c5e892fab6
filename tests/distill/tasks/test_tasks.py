import dataclasses
import itertools
import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_gym import create_dataset

from distill.tasks import Arithmetic, ChainSum, Problem, Products, SumOfProducts, split_of
from distill.tasks.arithmetic import _CHAIN_EXPRESSION
from distill.tasks.drawing import mix, unique_problems
from distill.tasks.problem import plain_words
from distill.tasks.working import (
    chain_steps,
    chain_working,
    chain_working_is_correct,
    place_values,
    product_working,
    product_working_is_correct,
    read_steps,
    sum_of_products_working,
    sum_of_products_working_is_correct,
)
from qwen3.errors import UserError

SMALL = Arithmetic(chain_sum=ChainSum(min_terms=2, max_terms=3), products=Products(max_digits=2))


def test_train_and_held_out_never_meet_whatever_the_seeds() -> None:
    train = {p.prompt for seed in range(4) for p in SMALL.problems("train", 600, seed)}
    held_out = {p.prompt for seed in range(4) for p in SMALL.problems("held_out", 80, seed)}
    assert train.isdisjoint(held_out)
    # The space is small enough that seeds do repeat each other's problems, so the sets had every chance to meet.
    assert len(train) < 4 * 600
    assert len(held_out) < 4 * 80


def test_one_question_in_two_families_falls_on_one_side() -> None:
    assert split_of("What is 2 + 2?", 0.5) == split_of("  What is\n2 + 2? ", 0.5)
    first = Problem(prompt="What is 2 + 2?", answer="4", family="a")
    second = Problem(prompt="What is 2 + 2?", answer="4", family="b")
    assert first.problem_id != second.problem_id
    assert first.question_text == second.question_text


def of_turns(*turns: tuple[str, str], **fields: Any) -> Problem:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Problem(prompt=turns[-1][1], answer="4", family="a", messages=messages, **fields)


@pytest.mark.parametrize(
    "other",
    [
        Problem(prompt="What is\n2 + 2?", answer="4", family="a"),
        Problem(prompt="\ufeffWhat is 2\u00a0+ 2", answer="4", family="a"),
        Problem(prompt="What is 2 + 2 ? …", answer="4", family="a"),
        Problem(prompt="What is 2 + 2? /think", answer="4", family="a"),
        of_turns(("user", "What is\n\n2 + 2?")),
        of_turns(("system", "Be brief."), ("user", "What is 2 + 2?")),
        of_turns(("system", ""), ("user", "What is 2 + 2? /no_think")),
        of_turns(("user", "What is 2 + 2?"), ("assistant", ""), ("tool", "4")),
        of_turns(("user", "What is 2 + 2?"), tools=({"name": "add"},)),
        Problem(prompt="What is 2 + 2?", answer="4", family="a", mode="thinking"),
    ],
    ids=lambda other: repr(other.question_text),
)
def test_the_users_words_alone_decide_what_is_held_out(other: Problem) -> None:
    assert other.user_words == Problem(prompt="What is 2 + 2?", answer="4", family="a").user_words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who is Bill?", "Who is bill?"),
        ("What is 2 + 2?", "What is 2 - 2?"),
        ("Is it a/think/b?", "Is it a/b?"),
        ("What is x²?", "What is x2?"),
        ("Why not?", "Why? Not"),
        ("What is 1.5 =", "What is 15 ="),
    ],
)
def test_other_words_are_another_question(one: str, other: str) -> None:
    assert plain_words(one) != plain_words(other)
    assert plain_words(plain_words(one)) == plain_words(one)


def test_the_user_asks_another_question_where_a_turn_differs() -> None:
    first = of_turns(("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2?"))
    assert first.user_words == of_turns(("user", "Hi"), ("assistant", "Yes?"), ("user", "2 + 2?")).user_words
    assert first.user_words != of_turns(("user", "2 + 2?")).user_words
    nobody = [of_turns(("system", "Go on."), ("tool", result)) for result in "12"]
    assert nobody[0].user_words != nobody[1].user_words


def test_decomposed_letters_are_the_letters() -> None:
    one, other = (Problem(prompt=prompt, answer="x", family="é") for prompt in ("Où est-ce ?", "Ou\u0300 est-ce ?"))
    assert one.prompt != other.prompt
    assert one.problem_id == other.problem_id
    assert one.user_words == other.user_words


def test_one_question_is_another_problem_in_another_mode_or_with_tools() -> None:
    def asked(**fields: Any) -> str:
        return Problem(prompt="What is 2 + 2?", answer="4", family="a", **fields).problem_id

    ids = [asked(), asked(mode="thinking"), asked(mode="non_thinking"), asked(tools=({"name": "add"},))]
    assert len(set(ids)) == 4
    # What it was before problems had modes of their own.
    assert ids[0] == "bee0d2a29cc32fdc"


@pytest.mark.parametrize(("flag", "mode"), [("/think", "thinking"), ("/no_think", "non_thinking")])
def test_a_prompts_own_flag_is_its_mode(flag: str, mode: str) -> None:
    other = {"thinking": "non_thinking", "non_thinking": "thinking"}[mode]
    for problem in (
        Problem(prompt=f"What is 2 + 2? {flag}", answer="4", family="a"),
        of_turns(("system", f"Be brief. {flag}"), ("user", "What is 2 + 2?")),
        of_turns(("user", "Hi /think /no_think"), ("assistant", "/think"), ("user", f"{flag} 2 + 2?"), ("tool", "4")),
    ):
        assert problem.mode == mode
        assert dataclasses.replace(problem, source="b").mode == mode
        with pytest.raises(ValueError, match=re.escape(f"mode is '{other}', but the prompt says {flag}")):
            dataclasses.replace(problem, mode=other)  # type: ignore[arg-type]
    assert of_turns(("user", "2 + 2?"), ("tool", f"4 {flag}")).mode is None


def test_the_split_has_the_asked_for_share() -> None:
    sides = [split_of(f"question {i}", 0.2) for i in range(20_000)]
    # Binomial: standard deviation 0.0028, so five of them.
    assert sides.count("held_out") / 20_000 == pytest.approx(0.2, abs=0.015)
    assert {split_of(f"question {i}", 0.0) for i in range(100)} == {"train"}
    assert {split_of(f"question {i}", 1.0) for i in range(100)} == {"held_out"}


def test_ids_do_not_change_between_versions_of_this_project() -> None:
    problem = Problem(prompt="Solve the following multiplication: 47 * 6.", answer="282", family="products")
    assert problem.problem_id == "492253df7f24aa7a"
    assert split_of(problem.question_text, 0.1) == "train"


def test_a_smaller_count_is_a_prefix_and_problems_are_unique() -> None:
    many = SMALL.problems("train", 500, 3)
    assert SMALL.problems("train", 120, 3) == many[:120]
    assert len({p.problem_id for p in many}) == 500
    assert SMALL.problems("train", 120, 4) != many[:120]


def test_neighbouring_seeds_are_different_streams() -> None:
    task = Arithmetic(chain_sum=ChainSum(min_terms=6, max_digits=2), products=Products(weight=0))
    first, second = ({p.prompt for p in task.problems("train", 200, seed)} for seed in (0, 1))
    assert not first & second


def test_questions_are_worded_as_reasoning_gym_words_them() -> None:
    theirs = {name: create_dataset(name, size=1, seed=1)[0]["question"] for name in ("chain_sum", "products")}
    for problem in SMALL.problems("train", 50, 0):
        numbers_removed = re.sub(r"\d+( [-+*] \d+)+", "", problem.prompt)
        assert numbers_removed == re.sub(r"\d+( [-+*] \d+)+", "", theirs[problem.family])


@pytest.mark.parametrize(
    "options",
    [
        {"min_terms": 4, "max_terms": 8, "min_digits": 1, "max_digits": 1},
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 3},
    ],
)
def test_chains_are_those_of_reasoning_gyms_generator(options) -> None:
    theirs = create_dataset("chain_sum", size=500, seed=1, **options)
    ours = Arithmetic(chain_sum=ChainSum(**options), products=Products(weight=0)).problems("train", 500, 0)
    shapes, their_shapes = set(), set()
    for item, problem in zip(theirs, ours, strict=True):
        expression = _CHAIN_EXPRESSION.fullmatch(item["question"])[1]
        assert expression == item["metadata"]["expression"]
        assert str(chain_steps(expression)[-1].result) == item["answer"]
        their_shapes.add(_shape(expression))
        shapes.add(_shape(_CHAIN_EXPRESSION.fullmatch(problem.prompt)[1]))
    # The rarest shape, a ninth of the sampled_tokens, is missing among 500 with probability e**-59.
    assert shapes == their_shapes


def _shape(expression: str) -> tuple[int, int]:
    terms = re.findall(r"\d+", expression)
    return len(terms), max(map(len, terms))


def test_arithmetic_is_asked_where_reasoning_gym_is_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert {p.family for p in SMALL.problems("train", 50, 0)} == {"chain_sum", "products"}


def test_answers_pass_reasoning_gyms_own_scorer_and_ours() -> None:
    scorers = {name: create_dataset(name, size=1, seed=1).score_answer for name in ("chain_sum", "products")}
    for problem in SMALL.problems("train", 300, 0):
        expression = re.search(r"\d+( [-+*] \d+)+", problem.prompt)[0]
        assert int(problem.answer) == eval(expression)
        assert scorers[problem.family](problem.answer, {"answer": problem.answer}) == 1.0
        assert SMALL.verify(problem, f" {problem.answer}\n")
        assert not SMALL.verify(problem, f"{int(problem.answer) + 1}")
        assert SMALL.working_is_correct(problem, problem.solution)
        assert problem.solution.split("=")[-1] == problem.answer


def test_options_bound_what_is_drawn() -> None:
    task = Arithmetic(
        chain_sum=ChainSum(min_terms=3, max_terms=5, min_digits=2, max_digits=2, min_total=0, max_total=150),
        products=Products(min_digits=3, max_digits=3, min_multiplier_digits=2, max_multiplier_digits=2, weight=2.0),
    )
    problems = task.problems("train", 600, 0)
    chains = [p for p in problems if p.family == "chain_sum"]
    # One in three: binomial with standard deviation 12, so five of them.
    assert abs(len(chains) - 200) < 60
    for problem in chains:
        assert 2 <= problem.solution.count("\n") + 1 <= 4
        assert all(0 <= int(line.split("=")[1]) <= 150 for line in problem.solution.split("\n"))
    for problem in problems:
        if problem.family == "products":
            assert re.search(r": \d{3} \* \d{2}\.", problem.prompt)


def test_a_product_and_its_mirror_image_are_one_problem() -> None:
    task = Arithmetic(chain_sum=ChainSum(weight=0), products=Products(min_digits=1, max_digits=1))
    pairs = [tuple(map(int, re.findall(r"\d+", p.prompt))) for p in task.problems("train", 40, 0)]
    assert all(left >= right for left, right in pairs)


def test_an_exhausted_family_says_how_many_there_are() -> None:
    task = Arithmetic(chain_sum=ChainSum(weight=0), products=Products(min_digits=1, max_digits=1))
    space = {(a, b) for a, b in itertools.product(range(10), repeat=2) if a >= b}
    counts = {}
    for split in ("train", "held_out"):
        with pytest.raises(UserError, match=r"products: only \d+ different") as caught:
            task.problems(split, 100, 0)
        counts[split] = int(re.search(r"only (\d+)", str(caught.value))[1])
    assert counts["train"] + counts["held_out"] == len(space)


def test_a_side_without_problems_ends_instead_of_searching_for_ever() -> None:
    same = itertools.repeat(Problem(prompt="only one =", answer="1", family="a"))
    assert len(list(unique_problems(same, "train", 0.1))) == 1
    assert list(unique_problems(same, "held_out", 0.1)) == []
    assert list(unique_problems(same, "held_out", 0.0)) == []


def test_totals_that_hardly_any_chain_keeps_end_the_search() -> None:
    chains = ChainSum(min_terms=400, max_terms=400, min_total=0, max_total=9)
    task = Arithmetic(chain_sum=chains, products=Products(weight=0))
    with pytest.raises(UserError, match="hardly any chain of 400 to 400 terms has totals from 0 to 9; widen"):
        task.problems("train", 1, 0)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        mix({}, count=-1, seed=0, split="train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChainSum(min_terms=1), "chain_sum.min_terms is 1; it must be at least 2"),
        (lambda: ChainSum(min_terms=9), "chain_sum has terms from 9 to 8"),
        (lambda: ChainSum(weight=-1.0), "chain_sum.weight is -1.0"),
        (lambda: ChainSum(max_digits=2, max_total=50), "use min_total <= 0 and max_total >= 99"),
        (lambda: ChainSum(min_total=5), "min_total <= 0"),
        (lambda: Products(min_digits=0), "products.min_digits is 0; it must be at least 1"),
        (lambda: Products(min_multiplier_digits=2), "products has multiplier_digits from 2 to 1"),
        (lambda: Products(weight=float("nan")), "products.weight is nan"),
        (lambda: Arithmetic(held_out_fraction=1.5), "held_out_fraction is 1.5"),
        (lambda: Arithmetic(held_out_fraction=1e-9), "one side of the split would be searched for very long"),
        (lambda: Arithmetic(held_out_fraction=1 - 1e-9), "use 0, 1, or a share from 0.001 to 0.999"),
        (lambda: ChainSum(max_terms=1001), "must be at most 1000, for the working of more fills more than a context"),
        (lambda: Products(max_digits=21), "must be at most 20, for working with longer numbers cannot be checked"),
        (lambda: ChainSum(weight=1e300), "chain_sum.weight is 1e+300"),
        (lambda: Arithmetic(chain_sum=ChainSum(weight=0), products=Products(weight=0)), "all 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make()


def test_workings_are_written_one_short_step_a_line() -> None:
    assert chain_working("4 - 1 + 7") == "4-1=3\n3+7=10"
    assert chain_working("3 - 5 - 0") == "3-5=-2\n-2-0=-2"
    assert product_working(47, 6) == "40*6=240\n7*6=42\n240+42=282"
    assert product_working(40, 6) == "40*6=240"
    assert product_working(7, 0) == "7*0=0"
    assert product_working(20, 13) == "20*10=200\n20*3=60\n200+60=260"


@pytest.mark.parametrize(
    "thinking",
    [
        "",
        "4-1=3",
        "4-1=3\n3+7=11",
        "4-1=4\n4+7=10",
        "4-1=3\n3+7=10\n10+0=10",
        "4-1=3\n\n3+7=10",
        "so 4-1=3\n3+7=10",
        "4+7=11\n11-1=10",
        "4-1=3\n3+7=1 0",
    ],
)
def test_wrong_or_unrelated_chain_working_is_found(thinking) -> None:
    assert not chain_working_is_correct("4 - 1 + 7", thinking)


def test_spaces_do_not_make_working_wrong() -> None:
    assert chain_working_is_correct("4 - 1 + 7", "\n4 - 1 = 3 \n3+7= 10\n")


@pytest.mark.parametrize(
    ("thinking", "correct"),
    [
        ("40*6=240\n7*6=42\n240+42=282", True),
        ("7*6=42\n40*6=240\n42+240=282", True),
        ("40*6=240\n7*6=42\n240+42=272", False),
        ("40*6=230\n7*6=52\n230+52=282", False),
        ("40*6=240\n7*6=42", False),
        ("40*6=240\n240+42=282", False),
        ("40*6=240\n40*6=240\n7*6=42\n240+42=282", False),
        ("47*6=282", False),
        ("", False),
    ],
)
def test_product_working_must_hold_each_part_once_and_add_it_once(thinking, correct) -> None:
    assert product_working_is_correct(47, 6, thinking) is correct


def test_equal_partial_results_are_two_numbers_to_add() -> None:
    # 22 * 11: the parts 20*1 and 2*10 are both 20.
    assert product_working_is_correct(22, 11, "20*10=200\n20*1=20\n2*10=20\n2*1=2\n20+20=40\n200+40=240\n240+2=242")
    assert not product_working_is_correct(22, 11, "20*10=200\n20*1=20\n20+20=40")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99_999), st.integers(0, 999))
def test_every_written_product_working_is_correct_and_any_changed_digit_is_not(left: int, right: int) -> None:
    working = product_working(left, right)
    assert sum(place_values(left)) == left
    assert product_working_is_correct(left, right, working)
    for position in {0, len(working) // 2, len(working) - 1}:
        if working[position].isdigit():
            changed = working[:position] + str((int(working[position]) + 1) % 10) + working[position + 1 :]
            assert not product_working_is_correct(left, right, changed)


def test_a_problem_from_elsewhere_has_no_working_to_check() -> None:
    with pytest.raises(ValueError, match="ask the task that made the problem"):
        SMALL.working_is_correct(Problem(prompt="Why?", answer="1", family="chain_sum"), "1+1=2")


def test_sums_of_products_are_worked_out_as_both_of_their_parts_are() -> None:
    steps = sum_of_products_working("47 * 6 - 3 * 5")
    assert "\n".join(map(str, steps)) == "40*6=240\n7*6=42\n240+42=282\n3*5=15\n282-15=267"
    sums = SumOfProducts(weight=1, max_products=4, max_digits=3, multiplier_digits=2)
    task = Arithmetic(chain_sum=ChainSum(weight=0), products=Products(weight=0), sum_of_products=sums)
    problems = task.problems("train", 200, 0)
    assert {problem.prompt.count("*") for problem in problems} == {2, 3, 4}
    longest = dataclasses.replace(
        sums, min_products=40, max_products=40, min_digits=20, max_digits=20, multiplier_digits=20
    )
    problems += dataclasses.replace(task, sum_of_products=longest).problems("train", 3, 0)
    assert max(len(str(problem.answer)) for problem in problems) > 40
    for problem in problems:
        expression = problem.prompt.removeprefix("Calculate ").removesuffix(".")
        assert str(eval(expression)) == problem.answer
        assert problem.solution is not None
        assert task.working_is_correct(problem, problem.solution)
        assert not sum_of_products_working_is_correct(expression, problem.solution.rsplit("\n", 1)[0])
        assert not sum_of_products_working_is_correct(expression, problem.solution.replace("=", "=1", 1))


def test_a_family_that_is_not_asked_holds_nothing_out() -> None:
    chain = SMALL.problems("train", 1, 0)[0]
    sums = SumOfProducts(weight=1)
    elsewhere = Arithmetic(
        chain_sum=ChainSum(weight=0), products=Products(weight=0), sum_of_products=sums, held_out_fraction=1
    )
    assert not elsewhere.holds_out(chain.prompt)
    assert elsewhere.holds_out(elsewhere.problems("held_out", 1, 0)[0].prompt)


def test_mistakes_are_crossed_out_and_what_is_crossed_out_is_not_judged() -> None:
    task = dataclasses.replace(SMALL, mistakes=0.5)
    plain = SMALL.problems("train", 200, 3)
    problems = task.problems("train", 200, 3)
    assert [problem.problem_id for problem in problems] == [problem.problem_id for problem in plain]
    assert problems[:50] == task.problems("train", 50, 3)
    assert all(task.working_is_correct(problem, str(problem.solution)) for problem in problems)
    lines = [str(problem.solution).split("\n") for problem in problems]
    crossed = sum(of_one.count("x") for of_one in lines)
    steps = sum(len(str(problem.solution).split("\n")) for problem in plain)
    # Binomial: five standard deviations of some 600 lines are 0.1.
    assert crossed / steps == pytest.approx(0.5, abs=0.11)
    without = ["\n".join(line for line in of_one if line != "x") for of_one in lines]
    assert not any(
        task.working_is_correct(p, text) for p, text in zip(problems, without, strict=True) if "x" in p.solution
    )
    assert read_steps("x\n1+1=2") is None
    assert read_steps("1+1=3\nx\nx\n1+1=2") is None
    assert read_steps("what?\nx\n1+1=2") == read_steps("1+1=2")
