"""What a config.json means: defaults as transformers resolves them, and refusals that name the key."""

import json
import math

import numpy as np
import pytest
import transformers

from qwen3.decoder.config import ModelConfig, RopeScaling
from qwen3.decoder.rope import inverse_frequencies
from qwen3.errors import UserError

REQUIRED = {
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **REQUIRED}
MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **REQUIRED}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **REQUIRED}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2", "llama"])
def test_absent_keys_resolve_as_in_transformers(family):
    ours = ModelConfig.from_hf({"model_type": family, **REQUIRED})
    theirs = transformers.AutoConfig.for_model(family, **REQUIRED)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    keys = [
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ]
    if family == "qwen3_moe":
        keys += [
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
            "decoder_sparse_step",
            "router_aux_loss_coef",
        ]
        assert list(ours.mlp_only_layers) == theirs.mlp_only_layers
    assert {key: getattr(ours, key) for key in keys} == {key: getattr(theirs, key) for key in keys}


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_null_key_value_heads_mean_one_a_query_head(family):
    assert (
        ModelConfig.from_hf({"model_type": family, **REQUIRED, "num_key_value_heads": None}).num_key_value_heads == 32
    )


def test_published_checkpoint_is_read_exactly():
    """The 235B's file, as published."""
    raw = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 94,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    config = ModelConfig.from_hf(raw)
    assert config.layer_runs() == ((True, 94),)
    assert config.eos_token_id == 151645
    written = config.to_hf()
    assert {key: written[key] for key in raw if key in written} == {key: raw[key] for key in raw if key in written}
    assert raw.keys() - written.keys() == {"torch_dtype", "transformers_version"}


def test_layer_runs_follow_sparse_step_and_mlp_only_layers():
    config = ModelConfig.from_hf({**MOE, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [config.is_moe(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert config.layer_runs() == ((False, 1), (True, 1), (False, 3), (True, 1))


def test_a_model_without_experts_stays_without_them():
    config = ModelConfig.from_hf({**MOE, "num_experts": 0})
    assert config.layer_runs() == ((False, 4),)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_rope_spellings():
    plain = ModelConfig.from_hf({**QWEN3, "rope_theta": 5e6, "rope_scaling": None})
    assert (plain.rope_theta, plain.rope_scaling) == (5e6, None)
    assert ModelConfig.from_hf({**QWEN3, "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}) == plain
    assert ModelConfig.from_hf({**QWEN3, "rope_theta": 5e6, "rope_parameters": {"rope_type": "default"}}) == plain
    yarn = {"type": "yarn", "factor": 4.0}
    scaled = ModelConfig.from_hf({**QWEN3, "rope_scaling": yarn})
    assert scaled.rope_scaling == RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)
    top = ModelConfig.from_hf({**QWEN3, "rope_scaling": yarn, "original_max_position_embeddings": 4096})
    assert top.rope_scaling is not None
    assert top.rope_scaling.original_max_position_embeddings == 4096
    assert ModelConfig.from_hf({**QWEN3, "rope_scaling": yarn, "rope_parameters": {"rope_type": "yarn", "factor": 4}})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**QWEN3, "architectures": ["MistralForCausalLM"]}, "architecture 'MistralForCausalLM' is not supported"),
        ({**QWEN3, "architectures": ["Qwen3Model"]}, "architecture 'Qwen3Model'"),
        ({**QWEN3, "architectures": "Qwen3ForCausalLM"}, "architecture 'Qwen3ForCausalLM'"),
        ({**REQUIRED, "model_type": "mixtral"}, "architecture 'mixtral'"),
        (REQUIRED, "architecture None"),
        ({**QWEN3, "hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; it must be \"silu\""),
        ({**QWEN3, "use_sliding_window": True}, "use_sliding_window True .* must be false"),
        ({**QWEN3, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        ({**QWEN3, "quantization_config": {"bits": 4}}, "quantization_config present .* must be null"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias True"),
        ({**QWEN3, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({**QWEN3, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({**QWEN3, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({**QWEN3, "rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({**QWEN3, "rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
        ({**QWEN3, "rope_scaling": {"rope_type": "yarn", "factor": 4, "mscale": 0.7}}, "mscale in rope_scaling"),
        ({**QWEN3, "rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope_scaling.factor is 0.5"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor is missing"),
        ({**QWEN3, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters by kind of layer"),
        (
            {**QWEN3, "rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_parameters and rope_scaling contradict",
        ),
        ({**MOE, "num_experts": 8, "num_local_experts": 4}, "num_experts 8 and num_local_experts 4 contradict"),
        ({**MOE, "num_experts": 4, "num_experts_per_tok": 8}, "num_experts_per_tok 8 is not in 1..4"),
        ({**MOE, "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({**MOE, "mlp_only_layers": ["1"]}, "mlp_only_layers is"),
        ({**QWEN3, "num_key_value_heads": 5}, "no multiple of num_key_value_heads 5"),
        ({**QWEN3, "head_dim": 15}, "head_dim is 15"),
        ({**QWEN3, "hidden_size": "256"}, "hidden_size is '256'; it must be a whole number"),
        ({**QWEN3, "tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({**QWEN3, "rms_norm_eps": True}, "rms_norm_eps is True; it must be a number"),
        ({**QWEN3, "rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({**QWEN3, "vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({**QWEN3, "eos_token_id": [1, "2"]}, "eos_token_id is"),
        ({key: value for key, value in QWEN3.items() if key != "hidden_size"}, "hidden_size is missing"),
    ],
)
def test_refused_by_name(raw, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(raw)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CHUNKS = {"chunk_size": 128, "local_size": 16, "original_max_position_embeddings": 64}
ODD = (
    *(0, -1, 1, 3, 2**31, 2**63, 10**12, 10**30, 10**400, True, False, None, "8", "", 1.5, 32.0, -0.5, 1e-320, 1e308),
    *(math.nan, math.inf, -math.inf, [], [1], ["a"], [[1]], [2**63], {}, {"a": 1}, {"rope_theta": []}, [None]),
)


@pytest.mark.parametrize(
    "whole",
    [
        ModelConfig.from_hf({**MOE, "rope_scaling": YARN}).to_hf(),
        {**LLAMA, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16", "dtype": "float16"},
        {**QWEN3, "dual_chunk_attention_config": CHUNKS, "layer_types": ["full_attention"] * 4},
    ],
)
def test_whatever_a_key_holds_is_a_model_or_is_named(whole):
    """The frequencies are computed too: a scaling that is accepted must give numbers."""
    nested = [("rope_scaling", key) for key in whole.get("rope_scaling") or {}]
    nested += [("dual_chunk_attention_config", key) for key in whole.get("dual_chunk_attention_config", {})]
    for keys in [*((key,) for key in whole), *nested, ("rope_parameters",), ("unknown",)]:
        for value in ODD:
            raw = json.loads(json.dumps(whole))
            (raw if len(keys) == 1 else raw[keys[0]])[keys[-1]] = value
            refusal = None
            try:
                config = ModelConfig.from_hf(raw)
            except UserError as error:
                refusal = str(error)
            if refusal is not None:
                assert "\n" not in refusal
                assert len(refusal) < 400
                continue
            assert config.layer_runs()
            if config.head_dim < 1000:
                frequencies, factor = inverse_frequencies(config)
                assert np.isfinite([*frequencies, factor]).all(), (keys, value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": 100}, "eos_token_id is 100, but vocab_size is 100; it must be below, or null"),
        ({"eos_token_id": [1, 100]}, "eos_token_id is 100, but vocab_size is 100"),
        ({"pad_token_id": -1}, "pad_token_id is -1; it must be at least 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; it must be at most 10000, for each has"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000; it must be at most 2147483647, which is what 32 bits"),
        ({"hidden_size": 256.0}, "hidden_size is 256.0; it must be a whole number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; it must be a number that float32 holds"),
        ({"architectures": {"Qwen3ForCausalLM": 1}}, "is not supported; supported are Qwen3ForCausalLM"),
        ({"layer_types": 4}, "layer_types is 4; it must be a list, one text a layer"),
    ],
)
def test_values_that_no_model_has(fields, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf({**QWEN3, **fields})


def test_too_many_experts_to_name():
    with pytest.raises(
        UserError, match="num_hidden_layers 1000 × num_experts 10000 is 10000000; it must be at most 10"
    ):
        ModelConfig.from_hf({**MOE, "num_hidden_layers": 1000, "num_experts": 10000})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rms_norm_eps": NaN}', "holds NaN, which is no number"),
        ('{"a": [-Infinity]}', "holds -Infinity, which is no number"),
        ('{"rope_theta": 1e999}', "holds 1e999, which is too large for a number"),
        (
            '{"rope_theta": -1' + "0" * 400 + ".0}",
            "holds -10000.*, which is too large",
        ),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "has the key 'c' twice in one object"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nests lists and objects more than 100 deep"),
        ('{"a": ' * 150 + "1" + "}" * 150, "nests lists and objects more than 100 deep"),
        ('{"a": ' + "9" * 5000 + "}", "holds a number of thousands of digits"),
    ],
)
def test_json_that_only_python_reads_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"config\.json {message}"):
        ModelConfig.from_folder(tmp_path)


def test_switches_that_no_family_has_are_refused():
    values = ModelConfig.from_hf(LLAMA).__dict__
    with pytest.raises(UserError, match="do not exist in model_type llama"):
        ModelConfig(**values | {"qk_norm": True})
    with pytest.raises(UserError, match="model_type llama has no experts"):
        ModelConfig(**values | {"num_experts": 4, "num_experts_per_tok": 2})


def test_folder_errors_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=f"{path} does not exist"):
        ModelConfig.from_folder(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match=f"{path} is not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match=f"{path} holds list"):
        ModelConfig.from_folder(tmp_path)
    path.write_text(json.dumps({**QWEN3, "hidden_act": "gelu"}))
    with pytest.raises(UserError, match=f"{path}: hidden_act"):
        ModelConfig.from_folder(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=f"{path} is not UTF-8"):
        ModelConfig.from_folder(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"{path} cannot be read"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("positions", "scaling", "longest"),
    [
        (40960, None, 40960),
        # As Qwen's model cards have it: only rope_scaling is added.
        (40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (16384, {"rope_type": "linear", "factor": 4.0}, 16384),
    ],
)
def test_the_longest_context_counts_an_extension_once(positions, scaling, longest):
    raw = {"max_position_embeddings": positions, "rope_scaling": scaling}
    assert ModelConfig.from_hf(QWEN3 | raw).longest_context == longest
