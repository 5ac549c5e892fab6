"""Rollouts: equal to transformers where greedy, independent of company, budgets and masks exact, compiled once."""

import os

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from qwen3.checkpoint import hf
from qwen3.decoder.config import DualChunk, ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.generation.engine import Engine, Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import NON_THINKING, THINKING
from qwen3.sharding import MeshShape, make_mesh, shardings

VOCABULARY = 160
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    # Far above the usual 0.02, so that distributions are peaked and greedy paths do not run into a loop at once.
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": (1,)}
CONFIGS = {
    "dense": ModelConfig(model_type="qwen3", **SIZES),
    "moe": ModelConfig(model_type="qwen3_moe", **SIZES, **EXPERTS),
    # Prompts are read across a chunk's end, and what is written spans a dozen.
    "chunks": ModelConfig(
        model_type="qwen3",
        **SIZES,
        dual_chunk=DualChunk(chunk_size=8, local_size=2, original_max_position_embeddings=16),
    ),
}
PROMPTS = tuple(tuple(range(1 + 9 * n, 1 + 9 * n + length)) for n, length in enumerate((1, 9, 5, 7, 3)))
STOP, PAD, STOP_TEXT, THINK_END = 150, 0, (151, 152, 153), 152


def make_engine(config=CONFIGS["dense"], **fields):
    sizes = {"batch_size": 4, "max_prompt_tokens": 9, "max_new_tokens": 32}
    tokens = {"stop_ids": (STOP,), "pad_id": PAD, "stop_thinking_ids": STOP_TEXT, "think_end_id": THINK_END}
    return Engine(config, **(sizes | tokens | fields))


def make_request(prompt, sample_index=0, mode=THINKING, **params):
    return Request(
        prompt_ids=prompt,
        prompt_id=f"prompt {prompt[0]}",
        sample_index=sample_index,
        mode=mode,
        params=SamplingParams(**({"max_new_tokens": 32} | params)),
    )


@pytest.fixture(scope="module")
def models():
    return {name: jax.jit(Qwen3, static_argnums=0)(config, jax.random.key(0)) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@jax.jit
def read_whole(model, tokens, segment_ids):
    return jax.nn.log_softmax(model.logits(tokens, jnp.arange(tokens.shape[1])[None], segment_ids)[0])


def whole_logprobs(model, tokens):
    """Log-probabilities [T, V] of one sequence in a single forward pass, as a trainer sees it."""
    padding = 96 - len(tokens)  # one shape, one compilation
    return read_whole(model, np.pad(tokens, (0, padding))[None], np.pad(np.ones(len(tokens), int), (0, padding))[None])[
        : len(tokens)
    ]


def test_entropies_are_those_of_the_distributions_that_were_drawn_from(models):
    """In float64 from a single forward pass; whatever cuts a distribution does not enter, nor does forced text."""
    model = models["dense"]
    requests = [
        make_request(prompt, top_k=3 * (n % 2), temperature=0.7, thinking_budget=4) for n, prompt in enumerate(PROMPTS)
    ]
    plain = make_engine().generate(model, requests, seed=3, policy_step=0)
    for rollout, other in zip(
        make_engine(record_entropies=True).generate(model, requests, seed=3, policy_step=0), plain, strict=True
    ):
        assert rollout.tokens.tolist() == other.tokens.tolist()
        assert other.sampler_entropies is None
        logprobs = np.asarray(whole_logprobs(model, rollout.tokens), np.float64)
        expected = -np.sum(np.exp(logprobs) * logprobs, -1) * rollout.loss_mask
        assert (expected > 0.1).sum() > 4
        # float32 sums over the vocabulary
        np.testing.assert_allclose(rollout.sampler_entropies, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_greedy_equals_transformers(family, tmp_path):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        family, **SIZES, **(EXPERTS | {"mlp_only_layers": [1], "norm_topk_prob": True} if "moe" in family else {})
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    model = hf.load(tmp_path)
    rollouts = make_engine(model.config, stop_ids=()).generate(
        model, [make_request(prompt, temperature=0) for prompt in PROMPTS], seed=0, policy_step=0
    )
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=32,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert len(set(rollout.response.tolist())) > 3  # a constant sequence would prove little
        np.testing.assert_array_equal(rollout.tokens, wanted[0].numpy())


@pytest.mark.parametrize(
    ("name", "unroll_layers"),
    [("dense", 12), ("moe", 0), pytest.param("chunks", 12, marks=pytest.mark.long), ("chunks", 0)],
)
def test_logprobs_and_masks_agree_with_one_forward_pass(models, name, unroll_layers):
    model = models[name]
    engine = make_engine(model.config, max_new_tokens=80, unroll_layers=unroll_layers)  # two segments of the cache
    requests = [
        make_request(PROMPTS[0], max_new_tokens=80, temperature=0),
        make_request(PROMPTS[1], max_new_tokens=80, temperature=0.7, top_k=5),
        make_request(PROMPTS[2], max_new_tokens=60),
        make_request(PROMPTS[3], max_new_tokens=80, thinking_budget=4),
    ]
    rollouts = engine.generate(model, requests, seed=3, policy_step=7)
    for request, rollout in zip(requests, rollouts, strict=True):
        prompt, total = len(request.prompt_ids), len(rollout.tokens)
        assert rollout.policy_step == 7
        assert rollout.tokens[:prompt].tolist() == list(request.prompt_ids)
        assert rollout.finished == (rollout.tokens[-1] == STOP)
        assert rollout.finished or len(rollout.response) == request.params.max_new_tokens
        by_policy = np.zeros(total, bool)
        by_policy[prompt - 1 : total - 1] = True
        if request.params.thinking_budget is not None:
            assert rollout.response[4:7].tolist() == list(STOP_TEXT)
            by_policy[prompt + 3 : prompt + 6] = False
        np.testing.assert_array_equal(rollout.loss_mask, by_policy)
        wanted = np.asarray(whole_logprobs(model, rollout.tokens))
        following = np.append(rollout.tokens[1:], 0)
        at_next = np.where(by_policy, wanted[np.arange(total), following], 0)
        # Cached and whole attention sum the same float32 products in another order, 80 tokens deep.
        np.testing.assert_allclose(rollout.sampler_logprobs, at_next, atol=1e-4)
        if request.params.temperature == 0:
            np.testing.assert_array_equal(rollout.response, wanted.argmax(-1)[prompt - 1 : -1])


def mixed_requests():
    params = [
        {},
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        {"thinking_budget": 3},
        {"top_p": 0.8},
        {"temperature": 0.6, "top_k": 7, "min_p": 0.1},
    ]
    return [
        make_request(prompt, sample_index, **fields)
        for prompt, fields in zip(PROMPTS, params, strict=True)
        for sample_index in range(2)
    ]


def test_a_rollout_does_not_depend_on_its_company(models, engine):
    requests = mixed_requests()
    together = engine.generate(models["dense"], requests, seed=0, policy_step=5)
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = engine.generate(models["dense"], [requests[i] for i in order], seed=0, policy_step=5)
    alone = [engine.generate(models["dense"], [request], seed=0, policy_step=5)[0] for request in requests]
    for i, request in enumerate(requests):
        for other in (shuffled[order.tolist().index(i)], alone[i]):
            assert (other.prompt_id, other.sample_index) == (request.prompt_id, request.sample_index)
            np.testing.assert_array_equal(other.tokens, together[i].tokens)
            np.testing.assert_array_equal(other.loss_mask, together[i].loss_mask)
            # The same row of a product may be summed by another vector kernel.
            np.testing.assert_allclose(other.sampler_logprobs, together[i].sampler_logprobs, atol=1e-5)


def test_rollouts_are_the_same_from_few_small_pages_in_short_dispatches(models, engine):
    requests = mixed_requests()
    # The longest sequence takes ten pages of four: hardly two of them are written at once, and slots are refilled.
    frugal = make_engine(page_size=4, pages=13, tokens_per_dispatch=5)
    written = frugal.generate(models["dense"], requests, seed=0, policy_step=5)
    for rollout, wanted in zip(written, engine.generate(models["dense"], requests, seed=0, policy_step=5), strict=True):
        np.testing.assert_array_equal(rollout.tokens, wanted.tokens)
        np.testing.assert_array_equal(rollout.loss_mask, wanted.loss_mask)
        np.testing.assert_allclose(rollout.sampler_logprobs, wanted.sampler_logprobs, atol=1e-5)


def test_a_short_sequence_goes_on_where_a_long_one_has_ended(models):
    engine = make_engine(max_prompt_tokens=64, max_new_tokens=256, stop_ids=(), batch_size=2)
    # The first ends at position 194, where attention sees 256 tokens; the second is at 150 then and goes beyond them.
    prompts = tuple(range(1, 65)), tuple(range(80, 100))
    requests = [make_request(prompts[0], max_new_tokens=131), make_request(prompts[1], max_new_tokens=256)]
    together = engine.generate(models["dense"], requests, seed=0, policy_step=0)[1]
    alone = engine.generate(models["dense"], requests[1:], seed=0, policy_step=0)[0]
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    np.testing.assert_allclose(together.sampler_logprobs, alone.sampler_logprobs, atol=1e-5)


def test_groups_of_slots_write_what_one_group_writes(models, engine, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    requests = mixed_requests()
    told = []
    written = make_engine(batch_size=8).generate(
        models["dense"], requests, seed=0, policy_step=5, on_progress=lambda count, _: told.append(count)
    )
    assert sum(told) == len(requests)
    for rollout, wanted in zip(written, engine.generate(models["dense"], requests, seed=0, policy_step=5), strict=True):
        np.testing.assert_array_equal(rollout.tokens, wanted.tokens)
        np.testing.assert_array_equal(rollout.loss_mask, wanted.loss_mask)
        np.testing.assert_allclose(rollout.sampler_logprobs, wanted.sampler_logprobs, atol=1e-5)


def test_a_mixture_of_experts_does_not_mix_rows(models):
    engine = make_engine(CONFIGS["moe"])
    requests = [make_request(prompt, sample_index) for prompt in PROMPTS[:3] for sample_index in range(2)]
    together = engine.generate(models["moe"], requests, seed=0, policy_step=5)
    for request, wanted in zip(requests[::-1], together[::-1], strict=True):
        alone = engine.generate(models["moe"], [request], seed=0, policy_step=5)[0]
        np.testing.assert_array_equal(alone.tokens, wanted.tokens)


def test_randomness_comes_from_seed_step_prompt_and_sample(models, engine):
    def generated(seed=0, policy_step=0, step=None, sample_index=0, prompt_id="a"):
        request = Request(
            prompt_ids=(1, 2),
            prompt_id=prompt_id,
            sample_index=sample_index,
            mode=NON_THINKING,
            params=SamplingParams(max_new_tokens=32),
        )
        return engine.generate(models["dense"], [request], seed=seed, policy_step=policy_step, step=step)[0]

    first = generated()
    again = generated()
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.sampler_logprobs, again.sampler_logprobs)
    for change in ({"seed": 1}, {"policy_step": 1}, {"step": 1}, {"sample_index": 1}, {"prompt_id": "b"}):
        assert generated(**change).tokens.tolist() != first.tokens.tolist()
    # The step that they are for decides, not which of the weights' steps they come from.
    older = generated(policy_step=3, step=0)
    assert older.tokens.tolist() == first.tokens.tolist()
    assert older.policy_step == 3


def test_tokens_follow_the_models_distribution(models):
    engine = make_engine(batch_size=512, max_new_tokens=1, stop_ids=())
    requests = [make_request(PROMPTS[1], sample_index, max_new_tokens=1) for sample_index in range(4096)]
    rollouts = engine.generate(models["dense"], requests, seed=0, policy_step=0)
    wanted = np.exp(whole_logprobs(models["dense"], PROMPTS[1])[-1])
    frequency = np.bincount([rollout.response[0] for rollout in rollouts], minlength=VOCABULARY) / len(rollouts)
    # Five standard deviations of a binomial share, and room for one draw where the share is tiny.
    assert np.all(np.abs(frequency - wanted) <= 5 * np.sqrt(wanted / len(rollouts)) + 1 / len(rollouts))


def first_appearance(tokens, at_least):
    """An index from `at_least` on whose token did not occur before."""
    return next(i for i in range(at_least, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.fixture(scope="module")
def greedy_path(models, engine):
    """What the model generates by itself: any token of it can be declared the end of thinking, or a stop."""
    request = make_request(PROMPTS[2], temperature=0, stop_ids=())
    return engine.generate(models["dense"], [request], seed=0, policy_step=0)[0].response.tolist()


@pytest.fixture(scope="module")
def ending(greedy_path):
    """Where the greedy path ends its thinking, and an engine that takes that token for the end."""
    end = first_appearance(greedy_path, 6)
    text = (151, greedy_path[end], 153)
    return end, make_engine(stop_ids=(), stop_thinking_ids=text, think_end_id=greedy_path[end])


@pytest.mark.parametrize("distance", [-1, 0, 1, 5])
def test_budget_around_the_end_of_thinking(models, greedy_path, ending, distance):
    """The end stands at index `end`, so thinking took end + 1 tokens: that budget is just enough."""
    end, engine = ending
    budget, text = end + 1 + distance, engine.stop_thinking_ids
    request = make_request(PROMPTS[2], temperature=0, thinking_budget=budget)
    rollout = engine.generate(models["dense"], [request], seed=0, policy_step=0)[0]
    response, mask = rollout.response.tolist(), rollout.loss_mask[len(PROMPTS[2]) - 1 : -1]
    if distance >= 0:
        assert response == greedy_path
        assert mask.all()
    else:
        assert response[:budget] == greedy_path[:budget]
        assert response[budget : budget + 3] == list(text)
        assert np.flatnonzero(~mask).tolist() == [budget, budget + 1, budget + 2]
        assert rollout.sampler_logprobs[len(PROMPTS[2]) - 1 : -1][~mask].tolist() == [0, 0, 0]
        answer = whole_logprobs(models["dense"], rollout.tokens).argmax(-1)[len(PROMPTS[2]) - 1 : -1]
        assert response[budget + 3 :] == answer[budget + 3 :].tolist()


def test_budgets_in_special_places(models, engine, greedy_path):
    def write(mode=THINKING, **params):
        request = make_request(PROMPTS[2], mode=mode, temperature=0, **params)
        return engine.generate(models["dense"], [request], seed=0, policy_step=0)[0]

    at_once = write(thinking_budget=0)
    assert at_once.response[:3].tolist() == list(STOP_TEXT)
    assert not at_once.loss_mask[: len(PROMPTS[2]) + 2].any()
    assert at_once.loss_mask[len(PROMPTS[2]) + 2]

    cut = write(thinking_budget=4, max_new_tokens=6)
    assert cut.response.tolist() == [*greedy_path[:4], *STOP_TEXT[:2]]
    assert not cut.finished

    assert write(mode=NON_THINKING, thinking_budget=4).response.tolist() == greedy_path
    stop = first_appearance(greedy_path, 3)
    stopped = write(thinking_budget=stop + 1, stop_ids=(greedy_path[stop],))
    assert stopped.response.tolist() == greedy_path[: stop + 1]
    assert stopped.finished


def test_stop_tokens_and_lengths_are_those_of_each_sequence(models, engine, greedy_path):
    stop = first_appearance(greedy_path, 3)
    later = first_appearance(greedy_path, stop + 1)
    stops = ((greedy_path[stop],), (greedy_path[later],), (), None)
    requests = [make_request(PROMPTS[2], i, temperature=0, stop_ids=ids) for i, ids in enumerate(stops)]
    requests.append(make_request(PROMPTS[2], temperature=0, max_new_tokens=2))
    rollouts = engine.generate(models["dense"], requests, seed=0, policy_step=0)
    assert [len(rollout.response) for rollout in rollouts] == [stop + 1, later + 1, 32, 32, 2]
    assert [rollout.finished for rollout in rollouts] == [True, True, False, False, False]
    ended = rollouts[0]
    assert ended.loss_mask[-2]  # the stop token was the policy's choice
    assert not ended.loss_mask[-1]


def test_other_requests_and_weights_compile_nothing(models):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    engine = make_engine(max_new_tokens=16)
    engine.generate(models["dense"], [make_request(PROMPTS[0], max_new_tokens=3)], seed=0, policy_step=0)
    assert compiled
    other = jax.tree.map(lambda x: x * 2, models["dense"])
    compiled.clear()
    for step in range(3):
        requests = [make_request(prompt, step, max_new_tokens=10 + step, thinking_budget=step) for prompt in PROMPTS]
        engine.generate(other, requests, seed=step, policy_step=step)
    assert compiled == []


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dense", {"fsdp": 2, "tensor": 2, "context": 2}),
        ("moe", {"expert": 2, "tensor": 2, "context": 2}),
        pytest.param("chunks", {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.long),
    ],
)
def test_sharded_weights_write_the_same(models, name, shape):
    model = models[name]
    engine, mesh = make_engine(model.config), make_mesh(MeshShape(**shape))
    placed = jax.device_put(model, shardings(model, mesh))
    requests = mixed_requests() + [make_request(prompt, sample_index=2, temperature=0) for prompt in PROMPTS]
    for wanted, rollout in zip(
        engine.generate(model, requests, seed=0, policy_step=0),
        engine.generate(placed, requests, seed=0, policy_step=0),
        strict=True,
    ):
        np.testing.assert_array_equal(rollout.tokens, wanted.tokens)
        # Devices add up their parts of float32 products, in another order.
        np.testing.assert_allclose(rollout.sampler_logprobs, wanted.sampler_logprobs, atol=1e-4)


def test_progress_counts_what_was_written(models, engine):
    told = []
    rollouts = engine.generate(
        models["dense"],
        mixed_requests(),
        seed=0,
        policy_step=0,
        on_progress=lambda count, tokens: told.append((count, tokens)),
    )
    assert [count for count, _ in told] == [4, 4, 2]
    assert sum(tokens for _, tokens in told) == sum(len(rollout.response) for rollout in rollouts)
    assert engine.generate(models["dense"], [], seed=0, policy_step=0) == []


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"prompt": tuple(range(1, 11))}, "prompt 'prompt 1' has 10 tokens, but max_prompt_tokens is 9"),
        ({"prompt": (1,), "max_new_tokens": 33}, "prompt 'prompt 1' asks for 33 new tokens, but max_new_tokens is 32"),
    ],
)
def test_requests_that_do_not_fit_are_refused_by_name(models, engine, request_fields, message):
    with pytest.raises(UserError, match=message):
        engine.generate(models["dense"], [make_request(**request_fields)], seed=0, policy_step=0)


def test_a_budget_needs_a_text(models):
    engine = make_engine(stop_thinking_ids=(), think_end_id=None)
    with pytest.raises(UserError, match="'prompt 1' has a thinking budget, but the engine has no stop_thinking_ids"):
        engine.generate(models["dense"], [make_request((1,), thinking_budget=3)], seed=0, policy_step=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"page_size": 8, "pages": 4}, "pages is 4, but the longest sequence needs 5 of 8 tokens; use at least 5"),
        ({"stop_ids": (VOCABULARY,)}, f"stop_ids holds {VOCABULARY}, outside the vocabulary of {VOCABULARY}"),
        ({"stop_thinking_ids": (151, 153)}, f"stop_thinking_ids lack think_end_id {THINK_END}"),
    ],
)
def test_engines_that_cannot_work_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        make_engine(**fields)


def test_a_model_of_another_architecture_is_refused(models, engine):
    with pytest.raises(ValueError, match=r"model\.config differs"):
        engine.generate(models["moe"], [make_request((1,))], seed=0, policy_step=0)


@pytest.mark.parametrize("field", ["seed", "policy_step", "step"])
@pytest.mark.parametrize("value", [-1, 2**32])
def test_seeds_that_would_wrap_around_are_refused(models, engine, field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be in 0..4294967295"):
        engine.generate(models["dense"], [], **({"seed": 0, "policy_step": 0} | {field: value}))
