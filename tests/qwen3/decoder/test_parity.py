"""Logits of every supported architecture against transformers, in float32, with weights that hide nothing."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from qwen3.checkpoint import hf
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.rope_scaling import RopeScaling
from qwen3.generation.engine import Engine, Request
from qwen3.generation.sampling import SamplingParams

SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far above the usual 0.02, so that logits spread over units and a tolerance of 1e-4 means something.
    "initializer_range": 0.3,
    "pad_token_id": None,
}
HEADS = {"head_dim": 10}  # not hidden_size / num_attention_heads
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
VARIANTS = {
    "qwen3": ("qwen3", HEADS),
    "qwen3_tied_theta": ("qwen3", HEADS | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e6}}),
    "qwen3_bias": ("qwen3", HEADS | {"attention_bias": True}),
    "qwen3_yarn": ("qwen3", HEADS | {"rope_parameters": YARN}),
    "moe_normalised": ("qwen3_moe", HEADS | EXPERTS | {"norm_topk_prob": True}),
    "moe_sparse_step": (
        "qwen3_moe",
        HEADS | EXPERTS | {"norm_topk_prob": False, "decoder_sparse_step": 2, "num_hidden_layers": 4},
    ),
    "moe_mlp_only": (
        "qwen3_moe",
        HEADS | EXPERTS | {"mlp_only_layers": [1], "num_hidden_layers": 4, "attention_bias": True},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", HEADS | {"rope_parameters": LLAMA3, "attention_bias": True}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
}
LENGTHS = (23, 17)
# What is theirs alone lies in the forward pass; from that decoding differs by its cache, as with the others.
_GENERATED_FOR_LONG = ("qwen3_tied_theta", "moe_sparse_step", "moe_mlp_only", "llama3", "llama_linear")
GENERATED = [pytest.param(name, marks=pytest.mark.long) if name in _GENERATED_FOR_LONG else name for name in VARIANTS]


def make_torch(variant):
    family, values = VARIANTS[variant]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SIZES | copy.deepcopy(values)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_(0, 0.5)
    return model


def torch_logits(model, tokens, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return model(torch.tensor(tokens), attention_mask=mask).logits.numpy()


def padded_batch():
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return tokens, np.broadcast_to(np.arange(max(LENGTHS)), tokens.shape), mask.astype(np.int32)


@pytest.fixture(params=VARIANTS)
def pair(request, tmp_path):
    """A transformers model and the folder that it was saved to."""
    model = make_torch(request.param)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path


def test_logits_and_round_trip(pair):
    theirs, folder = pair
    tokens, positions, mask = padded_batch()
    expected = torch_logits(theirs, tokens, mask)
    ours = hf.load(folder / "theirs")

    logits = np.asarray(jax.jit(lambda model: model.logits(tokens, positions, mask))(ours))
    assert expected[mask == 1].std() > 0.3
    # float32 sums in another order.
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=1e-4, rtol=0)

    hf.save(folder / "ours", ours)
    before, after = (load_file(folder / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes(), name
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager")
    np.testing.assert_array_equal(torch_logits(exported, tokens, mask), expected)


@pytest.mark.parametrize("pair", GENERATED, indirect=True)
def test_export_generates_what_our_sampler_writes(pair):
    _, folder = pair
    ours = hf.load(folder / "theirs")
    hf.save(folder / "ours", ours)
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager")
    tokens, _, _ = padded_batch()
    prompts = [row[:length].tolist() for row, length in zip(tokens, (11, 7), strict=True)]
    engine = Engine(ours.config, batch_size=2, max_prompt_tokens=11, max_new_tokens=32, stop_ids=(), pad_id=0)
    greedy = SamplingParams(max_new_tokens=32, temperature=0)
    requests = [
        Request(prompt_ids=prompt, prompt_id=str(i), sample_index=0, mode="thinking", params=greedy)
        for i, prompt in enumerate(prompts)
    ]
    written = engine.generate(ours, requests, seed=0, policy_step=0)
    for prompt, rollout in zip(prompts, written, strict=True):
        ids = torch.tensor([prompt])
        wanted = exported.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=32,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
        assert len(set(wanted[len(prompt) :])) > 3  # a constant sequence would prove little
        assert rollout.tokens.tolist() == wanted


def test_packed_documents_equal_separate_ones(pair):
    theirs, folder = pair
    ours = hf.load(folder / "theirs")
    tokens, _, _ = padded_batch()
    documents = [tokens[0, :9], tokens[0, 9:10], tokens[1, :8]]
    padding = 3
    packed = np.concatenate([*documents, np.zeros(padding, int)])[None]
    positions = np.concatenate([np.arange(len(document)) for document in [*documents, range(padding)]])[None]
    segments = np.repeat([1, 2, 3, 0], [*map(len, documents), padding])[None]

    logits = np.asarray(ours.logits(packed, positions, segments))[0]
    start = 0
    for document in documents:
        expected = torch_logits(theirs, document[None])[0]
        # float32 sums in another order.
        np.testing.assert_allclose(logits[start : start + len(document)], expected, atol=1e-4, rtol=0)
        start += len(document)


def test_fused_experts_load_like_single_ones(tmp_path):
    theirs = make_torch("moe_sparse_step")
    theirs.save_pretrained(tmp_path / "single")
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "fused" / "model.safetensors"))
    single, fused = (jax.tree.leaves(hf.load(tmp_path / name)) for name in ("single", "fused"))
    for one, other in zip(single, fused, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_head_that_is_stored_beside_tied_embeddings_is_the_embedding(tmp_path):
    theirs = make_torch("qwen3_tied_theta")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, file)
    tokens, positions, mask = padded_batch()
    logits = np.asarray(hf.load(tmp_path).logits(tokens, positions, mask))
    # float32 sums in another order.
    np.testing.assert_allclose(logits[mask == 1], torch_logits(theirs, tokens, mask)[mask == 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_spellings_of_config_mean_the_same(variant):
    """transformers 5 writes num_local_experts and rope_parameters, our exports num_experts and rope_theta."""
    family, values = VARIANTS[variant]
    theirs = transformers.AutoConfig.for_model(family, **(SIZES | copy.deepcopy(values))).to_dict()
    theirs["architectures"] = None
    config = ModelConfig.from_hf(theirs)
    written = config.to_hf()
    assert not {"rope_parameters", "num_local_experts"} & written.keys()
    assert ModelConfig.from_hf(json.loads(json.dumps(written))) == config
    if scaling := written["rope_scaling"]:
        assert isinstance(config.rope_scaling, RopeScaling)
        older = written | {"rope_scaling": {"type": scaling["rope_type"]} | scaling}
        del older["rope_scaling"]["rope_type"]
        assert ModelConfig.from_hf(older) == config
