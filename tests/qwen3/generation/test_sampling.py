"""Draws against the distribution that transformers' own filters leave, and the edges where rounding could slip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qwen3.errors import UserError
from qwen3.generation.sampling import (
    Plan,
    RowParams,
    SamplingParams,
    choose_tokens,
    non_thinking_params,
    thinking_params,
)

VOCABULARY = 300  # three blocks, the last one partly empty
DRAWS = 8192
FILTERS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 20},
    "top_k_all": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "top_p_tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "qwen3_thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "everything": {"temperature": 0.8, "top_p": 0.6, "top_k": 40, "min_p": 0.05},
    "no_top_k": {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02},
}
choose = jax.jit(choose_tokens, static_argnames="plan")


def make_logits(rows=1, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCABULARY)).astype(np.float32)


def make_params(**fields):
    return SamplingParams(max_new_tokens=1, **fields)


def wanted_probabilities(logits, params):
    """What transformers would sample from."""
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    scores = torch.tensor(logits)
    for warper in warpers:
        scores = warper(None, scores)
    return torch.softmax(scores, -1).numpy()


def draw(logits, params, uniforms, plan=None):
    plan = plan or Plan.of([params], VOCABULARY)
    rows = RowParams.of([params] * len(uniforms))
    tokens, logprobs, *_ = choose(np.broadcast_to(logits, (len(uniforms), VOCABULARY)), rows, uniforms, plan=plan)
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_filtered_distribution(name):
    logits, params = make_logits(), make_params(**FILTERS[name])
    uniforms = np.random.default_rng(1).random((DRAWS, 2), np.float32)
    tokens, logprobs = draw(logits, params, uniforms)
    wanted = wanted_probabilities(logits, params)[0]
    assert set(tokens.tolist()) <= set(np.flatnonzero(wanted).tolist())
    frequency = np.bincount(tokens, minlength=VOCABULARY) / DRAWS
    # Five standard deviations of a binomial share, and room for one draw where the share is tiny.
    assert np.all(np.abs(frequency - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / DRAWS) + 1 / DRAWS)
    untruncated = torch.log_softmax(torch.tensor(logits), -1).numpy()[0]
    # Both sum 300 float32 exponentials.
    np.testing.assert_allclose(logprobs, untruncated[tokens], atol=2e-6)


@pytest.mark.parametrize("name", FILTERS)
def test_extreme_uniforms_draw_kept_tokens_only(name):
    params = make_params(**FILTERS[name])
    corners = np.array([[a, b] for a in (0, 1 - 2**-24) for b in (0, 1 - 2**-24)], np.float32)
    for seed in range(20):
        logits = make_logits(seed=seed)
        tokens, _ = draw(logits, params, corners)
        assert np.all(wanted_probabilities(logits, params)[0][tokens] > 0)


def test_a_wider_plan_changes_no_row():
    logits = make_logits(len(FILTERS) + 1, seed=3)
    params = [make_params(**fields) for fields in FILTERS.values()] + [make_params(temperature=0)]
    uniforms = np.random.default_rng(2).random((len(params), 2), np.float32)
    together, *_ = choose(logits, RowParams.of(params), uniforms, plan=Plan.of(params, VOCABULARY))
    for row, single in enumerate(params):
        alone, _ = draw(logits[row], single, uniforms[row : row + 1])
        assert alone[0] == together[row]


def test_plans_ask_for_no_more_than_needed():
    off = Plan(candidates=0, whole=True, nucleus=False, tempered=False, cut=False)
    short = dataclasses.replace(off, candidates=32, whole=False, tempered=True)
    assert Plan.of([make_params()], VOCABULARY) == off
    assert Plan.of([make_params(), make_params(temperature=0)], VOCABULARY) == dataclasses.replace(off, cut=True)
    assert Plan.of([make_params(min_p=0.1)], VOCABULARY) == dataclasses.replace(off, cut=True)
    assert Plan.of([thinking_params(8)], VOCABULARY) == short
    assert Plan.of([make_params(top_k=33), make_params(top_p=0.5)], VOCABULARY) == dataclasses.replace(
        off, candidates=64, nucleus=True
    )
    greedy = make_params(temperature=0, top_k=5, top_p=0.5)
    assert Plan.of([greedy], VOCABULARY) == dataclasses.replace(off, cut=True)


@pytest.mark.parametrize("uniform", [0.0, 0.999])
def test_temperature_zero_takes_the_first_best_token_whatever_the_filters(uniform):
    logits = np.zeros((1, VOCABULARY), np.float32)
    logits[0, [7, 150, 299]] = 3
    params = make_params(temperature=0, top_k=5, top_p=0.1)
    tokens, logprobs = draw(logits, params, np.full((1, 2), uniform, np.float32))
    assert tokens[0] == 7
    # One float32 rounding of each of 300 terms.
    np.testing.assert_allclose(logprobs[0], 3 - np.log(3 * np.exp(3) + 297), rtol=1e-6)


def test_a_token_that_holds_all_mass_is_drawn_and_has_logprob_zero():
    logits = np.full((1, VOCABULARY), -1e4, np.float32)
    logits[0, 129] = 1e4
    for fields in FILTERS.values():
        tokens, logprobs = draw(logits, make_params(**fields), np.full((1, 2), 0.5, np.float32))
        assert (tokens[0], logprobs[0]) == (129, 0)


def test_a_vocabulary_smaller_than_a_block_or_than_the_candidates():
    logits = jnp.log(jnp.asarray([[0.5, 0.2, 0.3]]))
    for params, wanted in ((make_params(top_k=2), 2), (make_params(), 2), (make_params(top_p=0.6), 2)):
        tokens, *_ = choose(logits, RowParams.of([params]), jnp.full((1, 2), 0.99), plan=Plan.of([params], 3))
        assert int(tokens[0]) == wanted


def test_presets_are_those_of_the_report():
    thinking, other = thinking_params(100, thinking_budget=50), non_thinking_params(100)
    assert (thinking.temperature, thinking.top_p, thinking.top_k, thinking.min_p) == (0.6, 0.95, 20, 0)
    assert (other.temperature, other.top_p, other.top_k, other.min_p) == (0.7, 0.8, 20, 0)
    assert (thinking.thinking_budget, other.thinking_budget) == (50, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("max_new_tokens", 0),
        ("thinking_budget", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"sampling\.{field} is {value}; it must "):
        SamplingParams(**({"max_new_tokens": 1} | {field: value}))
