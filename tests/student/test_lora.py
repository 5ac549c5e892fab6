"""Adapters: a student that starts as its base, samples as it computes, and leaves as PEFT and transformers read it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.tokenizer import train_byte_level_bpe
from qwen3.decoder.adapter import adapter_parameters, joined, trained_and_frozen
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.generation.engine import Engine, Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import NON_THINKING
from student.export import export
from student.init import FromCheckpoint, FromScratch
from student.lora import Lora

DENSE = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA = Lora(rank=4, alpha=6, base_dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12))
POSITIONS, SEGMENTS = np.broadcast_to(np.arange(12), TOKENS.shape), np.ones_like(TOKENS)
_read = jax.jit(Qwen3.logits)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense and a mixture-of-experts base, as Hugging Face folders."""
    folder = tmp_path_factory.mktemp("bases")
    train_byte_level_bpe(["one and two and three"] * 20, 300, folder / "tokenizer")
    tokenizer = ChatTokenizer.from_folder(folder / "tokenizer")
    for name, architecture in (("dense", DENSE), ("moe", DENSE | EXPERTS)):
        recipe = FromScratch(architecture=architecture, tokenizer=str(folder / "tokenizer"))
        export(folder / name, recipe.build(jax.random.key(0)), tokenizer)
    return {"dense": folder / "dense", "moe": folder / "moe"}


def adapted(folder: Path, lora: Lora) -> Qwen3:
    """A student whose adapters have been somewhere: B is no longer 0."""
    model = FromCheckpoint(path=str(folder), lora=lora).build(jax.random.key(1))
    trained, frozen = trained_and_frozen(model)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), trained)
    return joined(moved, frozen)


def our_logits(model: Qwen3) -> np.ndarray:
    return np.asarray(_read(model, TOKENS, POSITIONS, SEGMENTS))


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_the_student_starts_as_its_base(folders: dict[str, Path]) -> None:
    base = FromCheckpoint(path=str(folders["dense"])).build(jax.random.key(1))
    recipe = FromCheckpoint(path=str(folders["dense"]), lora=dataclasses.replace(LORA, targets=("q_proj", "down_proj")))
    student = recipe.build(jax.random.key(1))
    np.testing.assert_array_equal(our_logits(student), our_logits(base))
    layers = student.stacks[0]
    assert layers.attention.adapters.keys() == {"q"}
    assert layers.ffn.adapters.keys() == {"down"}
    a, b = layers.attention.adapters["q"].a[...], layers.attention.adapters["q"].b[...]
    assert (a.shape, b.shape) == ((2, 16, 4), (2, 4, 4, 8))
    assert 0.9 / 4 < np.abs(a).max() <= 1 / 4
    assert not np.array_equal(a[0], a[1])
    assert not np.any(b)
    assert adapter_parameters(student) == 2 * 4 * (16 + 4 * 8) + 2 * 4 * (24 + 16)
    other = recipe.build(jax.random.key(2))
    assert not np.array_equal(other.stacks[0].attention.adapters["q"].a[...], a)


def test_the_base_is_kept_in_its_own_dtype(folders: dict[str, Path]) -> None:
    student = FromCheckpoint(path=str(folders["dense"]), lora=Lora()).build(jax.random.key(1))
    trained, frozen = trained_and_frozen(student)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}


def test_without_adapters_everything_is_trained(folders: dict[str, Path]) -> None:
    model = FromCheckpoint(path=str(folders["dense"])).build(jax.random.key(1))
    trained, frozen = trained_and_frozen(model)
    assert jax.tree.leaves(frozen) == []
    assert jax.tree.structure(trained) == jax.tree.structure(model)


@pytest.mark.parametrize(
    ("base", "lora"),
    [("dense", LORA), ("moe", dataclasses.replace(LORA, targets=ATTENTION))],
    ids=["dense", "moe"],
)
def test_peft_and_transformers_compute_the_same(
    base: str, lora: Lora, folders: dict[str, Path], tmp_path: Path
) -> None:
    student = adapted(folders[base], lora)
    tokenizer = ChatTokenizer.from_folder(folders[base])
    export(tmp_path / "merged", student, tokenizer, dtype=jnp.float32)
    export(tmp_path / "adapter", student, tokenizer, dtype=jnp.float32, adapters_of=folders[base])
    ours = our_logits(student)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(their_logits(merged), ours, atol=1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[base])
    assert np.abs(their_logits(theirs) - ours).max() > 0.1, "adapters that change nothing compare nothing"
    with_adapters = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    np.testing.assert_allclose(their_logits(with_adapters), ours, atol=1e-4)
    config = with_adapters.peft_config["default"]
    assert (config.base_model_name_or_path, config.r, config.lora_alpha) == (str(folders[base]), 4, 6)
    assert set(config.target_modules) == set(lora.targets)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"tokenizer.json", "generation_config.json"}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def test_adapters_keep_their_dtype_where_none_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    student = adapted(folders["dense"], LORA)
    export(tmp_path / "own", student, ChatTokenizer.from_folder(folders["dense"]), adapters_of=folders["dense"])
    stored = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(np.float32)}


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(folders: dict[str, Path], tmp_path: Path) -> None:
    student = adapted(folders["dense"], dataclasses.replace(LORA, base_dtype="bfloat16"))
    tokenizer = ChatTokenizer.from_folder(folders["dense"])
    for name, dtype in (("exact", jnp.float32), ("rounded", jnp.bfloat16)):
        export(tmp_path / name, student, tokenizer, dtype=dtype)
    exact, rounded = (load_torch(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    assert all(torch.equal(weight.to(torch.bfloat16), rounded[name]) for name, weight in exact.items())
    ours = our_logits(student)
    apart = {
        name: np.abs(
            their_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)) - ours
        ).max()
        / ours.std()
        for name in ("exact", "rounded")
    }
    assert apart["exact"] < 1e-4
    # What bfloat16's 8 bits take from the merged weights, as they do from any exported ones.
    assert 1e-3 < apart["rounded"] < 0.05, apart


def test_rollouts_are_drawn_from_the_adapted_student(folders: dict[str, Path]) -> None:
    student = adapted(folders["dense"], LORA)
    engine = Engine(student.config, batch_size=2, max_prompt_tokens=4, max_new_tokens=8, stop_ids=(), pad_id=0)
    requests = [
        Request(prompt_ids=row[:4].tolist(), prompt_id=str(i), sample_index=0, mode=NON_THINKING,
                params=SamplingParams(max_new_tokens=8))
        for i, row in enumerate(TOKENS)
    ]  # fmt: skip
    rollouts = engine.generate(student, requests, seed=0, policy_step=0)
    tokens = np.stack([rollout.tokens for rollout in rollouts])
    logprobs = np.asarray(jax.nn.log_softmax(_read(student, tokens, POSITIONS, SEGMENTS)))[:, 3:-1]
    chosen = np.take_along_axis(logprobs, tokens[:, 4:, None], axis=2)[..., 0]
    drawn = np.stack([rollout.sampler_logprobs for rollout in rollouts])[:, 3:-1]
    # float32, with attention summed in another order.
    np.testing.assert_allclose(drawn, chosen, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"lora\.rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, r"lora\.alpha is 0\.0; it must be a number above 0"),
        ({"alpha": float("nan")}, r"lora\.alpha is nan; it must be a finite number"),
        ({"targets": ("q_proj", "q_proj")}, r"lora\.targets is \('q_proj', 'q_proj'\); name every projection once"),
        ({"targets": ()}, r"lora\.targets is empty; name some of q_proj, k_proj"),
        ({"targets": ("q_proj", "gate_porj")}, r"lora\.targets\[1\] is 'gate_porj'; perhaps you meant 'gate_proj'"),
        ({"targets": ("everything",)}, r"lora\.targets\[0\] is 'everything'; it must be 'q_proj' or"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lora(**fields)


def test_experts_get_no_adapters(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"has up_proj, which are experts .* use q_proj, k_proj, v_proj, o_proj"):
        FromCheckpoint(path=str(folders["moe"]), lora=Lora(targets=("q_proj", "up_proj"))).build(jax.random.key(0))
