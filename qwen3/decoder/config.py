"""The architecture of one decoder, as a Hugging Face `config.json` states it and nothing else."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from qwen3.decoder.dual_chunk import DualChunk, read_dual_chunk
from qwen3.decoder.rope_scaling import RopeScaling, read_rope
from qwen3.errors import UserError
from qwen3.field_types import Bounds, Count, Natural, NotNegative, Positive, check_fields, check_product, shown
from qwen3.folder import check_whole_model
from qwen3.json_fields import JsonFields, read_object

__all__ = ["DualChunk", "ModelConfig", "RopeScaling"]

Family = Literal["qwen3", "qwen3_moe", "qwen2", "llama"]
_ARCHITECTURES: dict[Family, str] = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# What transformers takes where a config.json lacks the key; None: the number of query heads.
_KEY_VALUE_HEADS: dict[Family, int | None] = {"qwen3": 32, "qwen3_moe": 4, "qwen2": 32, "llama": None}
_MAX_POSITIONS: dict[Family, int] = {"qwen3": 32768, "qwen3_moe": 32768, "qwen2": 32768, "llama": 2048}
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dense or mixture-of-experts decoder of the Qwen3 family, or of its Llama and Qwen2 relatives.

    Field names are those of `config.json`, but for `dual_chunk`, which is its `dual_chunk_attention_config`; `qk_norm`,
    `attention_bias` (query, key, value) and `attention_output_bias` are what tells the families apart.
    """

    model_type: Family
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Bounds(1, _MOST_LAYERS, why="for each has tensors of its own name")]
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    max_position_embeddings: Count
    rms_norm_eps: Positive = 1e-6
    rope_theta: Annotated[float, Bounds(1 + 2**-20, 1e38, "be above 1")] = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    dual_chunk: DualChunk | None = None
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    initializer_range: NotNegative = 0.02
    num_experts: Natural = 0
    num_experts_per_tok: Natural = 0
    moe_intermediate_size: Natural = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[Natural, ...] = ()
    router_aux_loss_coef: NotNegative = 0.001
    eos_token_id: Natural | tuple[Natural, ...] | None = None
    bos_token_id: Natural | None = None
    pad_token_id: Natural | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("eos_token_id", "bos_token_id", "pad_token_id"):
            ids = getattr(self, field)
            if beyond := [one for one in (ids if isinstance(ids, tuple) else [ids]) if (one or 0) >= self.vocab_size]:
                raise UserError(
                    f"{field} is {beyond[0]}, but vocab_size is {self.vocab_size}; it must be below, or null"
                )
        experts = {"num_hidden_layers": self.num_hidden_layers, "num_experts": self.num_experts}
        check_product(experts, "for each expert of a layer has tensors of its own name", _MOST_EXPERTS)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; each key/value head serves a whole group of queries"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")
        if self.num_experts and self.model_type != "qwen3_moe":
            raise UserError(f"model_type {self.model_type} has no experts; set num_experts to 0 or use qwen3_moe")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(f"num_experts_per_tok {self.num_experts_per_tok} is not in 1..{self.num_experts}")
        if self.num_experts and self.moe_intermediate_size < 1:
            raise UserError(f"moe_intermediate_size is {self.moe_intermediate_size}; it must be at least 1")
        yarn = self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn"
        if yarn and self.dual_chunk is not None and self.dual_chunk.original_max_position_embeddings:
            raise UserError(
                "rope_scaling yarn and original_max_position_embeddings of dual_chunk_attention_config scale attention "
                "for the same length twice; leave out rope_scaling, or set the latter to 0"
            )
        switches = (self.qk_norm, self.attention_bias, self.attention_output_bias)
        if switches not in _switches(self.model_type):
            raise UserError(
                f"qk_norm, attention_bias, attention_output_bias {switches} do not exist in model_type "
                f"{self.model_type}; it has {' or '.join(map(str, _switches(self.model_type)))}"
            )

    def is_moe(self, layer: int) -> bool:
        """Whether layer number `layer` routes to experts (`decoder_sparse_step`, `mlp_only_layers`)."""
        return bool(
            self.num_experts and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    def layer_runs(self) -> tuple[tuple[bool, int], ...]:
        """Consecutive layers of one kind, as (is_moe, count): what can be stacked and scanned together."""
        runs: list[tuple[bool, int]] = []
        for layer in range(self.num_hidden_layers):
            moe = self.is_moe(layer)
            if runs and runs[-1][0] == moe:
                runs[-1] = (moe, runs[-1][1] + 1)
            else:
                runs.append((moe, 1))
        return tuple(runs)

    @property
    def longest_context(self) -> int:
        """Tokens of the longest text that the positions are made for.

        Usually max_position_embeddings, which includes an extension by rope_scaling; Qwen's instructions for YaRN add
        only rope_scaling, whose factor then tells how far the original length reaches.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type == "linear":
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(scaling.factor * scaling.original_max_position_embeddings))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json` of a Hugging Face folder. Raises UserError naming the file and what is wrong."""
        path = Path(folder) / "config.json"
        check_whole_model(folder)
        raw = read_object(path, "name a folder in Hugging Face format")
        try:
            return cls.from_hf(raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Translate the keys of a `config.json`, in the spelling of transformers 4 or 5.

        Keys that would change the computation in a way this decoder does not implement are refused by name.
        """
        fields = JsonFields(raw)
        family = _family(raw)
        _refuse_unsupported(fields)
        moe = family == "qwen3_moe"
        heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        # An explicit null means one key/value head a query head, in every family.
        kv_heads = heads if "num_key_value_heads" in raw else _KEY_VALUE_HEADS[family] or heads
        maximum = fields.integer("max_position_embeddings", _MAX_POSITIONS[family])
        theta, scaling = read_rope(fields, maximum)
        bias = fields.flag("attention_bias", False)
        llama = family == "llama"
        return cls(
            model_type=family,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("num_key_value_heads", kv_heads),
            head_dim=fields.integer("head_dim", 128 if family == "qwen3" else hidden_size // max(heads, 1)),
            max_position_embeddings=maximum,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            dual_chunk=read_dual_chunk(fields),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            qk_norm=family.startswith("qwen3"),
            attention_bias=family == "qwen2" or bias,
            attention_output_bias=family != "qwen2" and bias,
            initializer_range=fields.number("initializer_range", 0.02),
            num_experts=_num_experts(fields) if moe else 0,
            num_experts_per_tok=fields.integer("num_experts_per_tok", 8) if moe else 0,
            moe_intermediate_size=fields.integer("moe_intermediate_size", 768) if moe else 0,
            norm_topk_prob=fields.flag("norm_topk_prob", False) if moe else True,
            decoder_sparse_step=fields.integer("decoder_sparse_step", 1) if moe else 1,
            mlp_only_layers=fields.integers("mlp_only_layers") if moe else (),
            router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
            eos_token_id=_eos_token_id(fields, 2 if llama else None),
            bos_token_id=fields.integer("bos_token_id", 1 if llama and "bos_token_id" not in raw else None),
            pad_token_id=fields.integer("pad_token_id", None),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers, vLLM and llama.cpp read, with every key written out."""
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        raw: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_hf(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "use_cache": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
        }
        if self.dual_chunk is not None:
            raw["dual_chunk_attention_config"] = self.dual_chunk.to_hf()
        if self.model_type != "qwen2":
            raw["attention_bias"] = self.attention_bias
        if self.model_type != "llama":
            raw |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": self.num_hidden_layers}
        if self.model_type == "qwen3_moe":
            raw |= {
                "num_experts": self.num_experts,
                "num_experts_per_tok": self.num_experts_per_tok,
                "moe_intermediate_size": self.moe_intermediate_size,
                "norm_topk_prob": self.norm_topk_prob,
                "decoder_sparse_step": self.decoder_sparse_step,
                "mlp_only_layers": list(self.mlp_only_layers),
                "router_aux_loss_coef": self.router_aux_loss_coef,
                "output_router_logits": False,
            }
        return raw


def _switches(family: Family) -> tuple[tuple[bool, bool, bool], ...]:
    """The possible values of (qk_norm, attention_bias, attention_output_bias)."""
    if family == "qwen2":
        return ((False, True, False),)
    norm = family != "llama"
    return ((norm, False, False), (norm, True, True))


def _family(raw: Mapping[str, Any]) -> Family:
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    named = architectures[0] if isinstance(architectures, list) and architectures else architectures or model_type
    for family, architecture in _ARCHITECTURES.items():
        if named == (architecture if architectures else family) and isinstance(architectures, list | None):
            return family
    raise UserError(f"architecture {shown(named)} is not supported; supported are {', '.join(_ARCHITECTURES.values())}")


def _refuse_unsupported(fields: JsonFields) -> None:
    """Refuse what would silently compute something else."""
    accepted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1, None),
    }
    for key, values in accepted.items():
        value = fields.raw.get(key)
        if value not in values:
            found = "present" if isinstance(value, dict) else shown(value)
            raise UserError(f"{key} {found} is not supported; it must be {json.dumps(values[0])}")
    layer_types = fields.raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise UserError(f"layer_types is {shown(layer_types)}; it must be a list, one text a layer")
    if other := sorted({str(kind) for kind in layer_types} - {"full_attention"}):
        raise UserError(f"layer_types {', '.join(other)} is not supported; every layer must be full_attention")


def _num_experts(fields: JsonFields) -> int:
    """`num_experts` in files of transformers 4, `num_local_experts` in those of transformers 5."""
    given = [fields.integer(key) for key in ("num_experts", "num_local_experts") if key in fields.raw]
    if len(set(given)) > 1:
        raise UserError(f"num_experts {given[0]} and num_local_experts {given[1]} contradict each other; keep one")
    return given[0] if given else 128


def _eos_token_id(fields: JsonFields, default: int | None) -> int | tuple[int, ...] | None:
    if isinstance(fields.raw.get("eos_token_id"), list):
        return fields.integers("eos_token_id")
    return fields.integer("eos_token_id", None if "eos_token_id" in fields.raw else default)
