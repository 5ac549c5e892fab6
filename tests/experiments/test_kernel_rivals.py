"""Rivals do what the cases ask: a wrong scale or layout would only be seen on a card that is paid for."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments.benchmarks import kernel_run
from experiments.benchmarks.kernel_cases import Case, cases
from experiments.benchmarks.kernel_rivals import rivals


def _normal(key: jax.Array, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [
        jax.random.normal(part, shape, jnp.bfloat16)
        for part, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def _attention(key: jax.Array, tokens: int) -> tuple[jax.Array, ...]:
    kv = (1, tokens, 2, 128)
    return *_normal(key, (1, tokens, 4, 128), kv, kv), jnp.ones((1, tokens), jnp.int32)


def _products(key: jax.Array, weights: int) -> tuple[jax.Array, ...]:
    x, *stacks = _normal(key, (512, 1024), *[(4, 1024, 1024)] * weights)
    return x, *(stack * 0.02 for stack in stacks), jnp.array([100, 0, 300, 112])


def _pages(key: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v = _normal(key, (2, 1, 4, 128), (32, 2, 64, 128), (32, 2, 64, 128))
    return q, k, v, jax.random.permutation(key, 32).reshape(2, 16), jnp.array([700, 1024])


_SAMPLES: dict[str, Callable[[jax.Array], tuple[Any, ...]]] = {
    "attention": functools.partial(_attention, tokens=1024),  # the largest block's
    "attention gradient": functools.partial(_attention, tokens=512),
    "grouped_matmul": functools.partial(_products, weights=1),
    "grouped_swiglu": functools.partial(_products, weights=2),
    "paged_attention": _pages,
}


def _with_rivals(platform: str) -> dict[str, Case]:
    """The first case of each operation, at sizes for an interpreter."""
    return {
        case.operation: dataclasses.replace(case, sample=_SAMPLES.get(case.operation, _SAMPLES[case.forward_operation]))
        for case in reversed(list(cases()))
        if case.forward_operation in _SAMPLES and rivals(case, platform)
    }


@pytest.mark.long
@pytest.mark.parametrize("case", _with_rivals("tpu").values(), ids=lambda case: case.operation)
def test_rivals_on_a_tpu_give_what_the_operation_gives(case: Case) -> None:
    arguments = case.sample(jax.random.key(0))
    exact = jax.block_until_ready(jax.jit(case.program("xla"))(*arguments))
    for rival in rivals(case, "tpu"):
        programs = rival.programs(case)
        for program in programs[-1:] if case.gradients else programs:  # a backward pass takes an interpreter long
            theirs = jax.block_until_ready(rival.prepare(*arguments))
            # One program at a time: the interpreter computes in callbacks, for which others leave no thread.
            with pltpu.force_tpu_interpret_mode():
                got = jax.block_until_ready(jax.jit(program)(*theirs))
            assert kernel_run.relative_error(got, exact) < kernel_run.LARGEST_ERROR, rival.name


def test_every_operation_with_a_rival_is_covered() -> None:
    assert set(_with_rivals("tpu")) == {
        "attention", "attention gradient", "paged_attention",
        "grouped_matmul", "grouped_matmul gradient", "grouped_swiglu", "grouped_swiglu gradient",
    }  # fmt: skip
    # cuDNN's and jax's attention for GPUs cannot be traced without CUDA.
    assert {"attention", "attention gradient", "grouped_matmul", "grouped_swiglu"} <= set(_with_rivals("gpu"))


@pytest.mark.parametrize("operation", ["grouped_matmul", "grouped_swiglu"])
def test_jaxs_products_for_gpus_take_the_arguments(operation: str) -> None:
    case = next(case for case in cases() if case.operation == operation)
    (rival,) = (rival for rival in rivals(case, "gpu") if rival.name == "jax Mosaic")
    traced, refusals = 0, []
    for program in rival.programs(case):
        try:
            got = jax.eval_shape(program, *case.arguments())
        except ValueError as error:
            refusals.append(str(error))
            continue
        assert got == jax.eval_shape(case.program("xla"), *case.arguments())
        traced += 1
    assert traced > 1
    assert all("columns are no multiple" in refusal for refusal in refusals)


def _square(x: jax.Array, *, implementation: str = "theirs") -> jax.Array:
    return x @ x


def _random(key: jax.Array) -> tuple[jax.Array, ...]:
    return (jax.random.normal(key, (64, 64), jnp.bfloat16),)


_SQUARE = Case(operation="square", shape="64", function=_square, sample=_random, flops=1e9)


def test_the_fastest_configuration_counts_and_one_that_fails_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(x: jax.Array) -> jax.Array:
        raise ValueError("no such tile")

    rival = kernel_run.Rival(name="theirs", configurations=(refused, _square))
    broken = kernel_run.Rival(name="broken", configurations=(refused,))
    monkeypatch.setattr(kernel_run, "rivals", lambda case, platform: [rival, broken])
    monkeypatch.setattr(kernel_run, "_ROUND_SECONDS", 1e-3)
    assert kernel_run.print_rows(_SQUARE, "cpu", kernel_run.Roofs(1e12, 1e11))
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[3].strip() for row in rows] == ["xla", "theirs", "broken"]
    assert "failed" not in rows[1]
    assert "failed: no such tile" in rows[2]


def test_a_configuration_with_wrong_numbers_wins_only_where_none_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(x: jax.Array) -> jax.Array:
        return 1.1 * _square(x)

    def no_number(x: jax.Array) -> jax.Array:
        return x / 0

    careful = kernel_run.Rival(name="careful", configurations=(no_number, off, _square, _square))
    careless = kernel_run.Rival(name="careless", configurations=(off, no_number))
    monkeypatch.setattr(kernel_run, "rivals", lambda case, platform: [careful, careless])
    seconds = iter([0.009, 0.001, 0.002, 0.004, 0.003, 0.006, 0.005])
    monkeypatch.setattr(kernel_run, "time_call", lambda compiled, arguments: next(seconds))
    assert kernel_run.print_rows(_SQUARE, "cpu", kernel_run.Roofs(1e12, 1e11))
    _, theirs, wrong = ([cell.strip() for cell in row.split("|")] for row in capsys.readouterr().out.splitlines())
    assert theirs[3:7] == ["careful", theirs[4], "3.000", "33%"]
    assert float(theirs[4]) <= kernel_run.LARGEST_ERROR
    assert wrong[3:7] == ["careless", "inf", "5.000", "wrong numbers"]
