"""The architecture of one decoder, as a Hugging Face `config.json` states it and nothing else."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qwen3.errors import UserError

_FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings, named as in `config.json`."""

    rope_type: Literal["linear", "yarn", "llama3"]
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dense or mixture-of-experts decoder of the Qwen3 family, or of its Llama and Qwen2 relatives.

    Field names are those of `config.json`; `qk_norm`, `attention_bias` (query, key, value) and
    `attention_output_bias` are what tells the families apart.
    """

    model_type: Literal["qwen3", "qwen3_moe", "qwen2", "llama"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    initializer_range: float = 0.02
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    eos_token_id: int | tuple[int, ...] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; each key/value head serves a whole group of queries"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(f"num_experts_per_tok {self.num_experts_per_tok} is not in 1..{self.num_experts}")

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
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json` of a Hugging Face folder. Raises UserError naming the file and what is wrong."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; name a folder in Hugging Face format") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON ({error})") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path} holds {type(raw).__name__}, not a JSON object")
        try:
            return cls.from_hf(raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Translate the keys of a `config.json`, in the spelling of transformers 4 or 5.

        Keys that would change the computation in a way this decoder does not implement are refused by name.
        """
        family = _family(raw)
        _refuse_unsupported(raw)
        qwen3 = family.startswith("qwen3")
        moe = family == "qwen3_moe"
        try:
            heads = int(raw["num_attention_heads"])
            hidden_size = int(raw["hidden_size"])
            experts = int(raw.get("num_experts", raw.get("num_local_experts", 128))) if moe else 0
            maximum = int(raw.get("max_position_embeddings", 32768))
            # Class defaults of transformers are wrong for the published checkpoints where they matter, so what a
            # file leaves out takes the architecture's own default as transformers would resolve it on loading.
            theta, scaling = _rope(raw, maximum)
            bias = bool(raw.get("attention_bias", False))
            return cls(
                model_type=family,
                vocab_size=int(raw["vocab_size"]),
                hidden_size=hidden_size,
                intermediate_size=int(raw["intermediate_size"]),
                num_hidden_layers=int(raw["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or (128 if family == "qwen3" else hidden_size // heads)),
                max_position_embeddings=maximum,
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope_theta=theta,
                rope_scaling=scaling,
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                qk_norm=qwen3,
                attention_bias=True if family == "qwen2" else bias,
                attention_output_bias=False if family == "qwen2" else bias,
                initializer_range=float(raw.get("initializer_range", 0.02)),
                num_experts=experts,
                num_experts_per_tok=int(raw.get("num_experts_per_tok", 8)) if moe else 0,
                moe_intermediate_size=int(raw.get("moe_intermediate_size", 768)) if moe else 0,
                norm_topk_prob=bool(raw.get("norm_topk_prob", False)) if moe else True,
                decoder_sparse_step=int(raw.get("decoder_sparse_step", 1)),
                mlp_only_layers=tuple(raw.get("mlp_only_layers") or ()),
                router_aux_loss_coef=float(raw.get("router_aux_loss_coef", 0.001)),
                eos_token_id=tuple(eos) if isinstance(eos := raw.get("eos_token_id"), list) else eos,
                bos_token_id=raw.get("bos_token_id"),
                pad_token_id=raw.get("pad_token_id"),
            )
        except KeyError as error:
            raise UserError(f"{error.args[0]} is missing") from None
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"a value has the wrong type ({error})") from None

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers, vLLM and llama.cpp read, with every key written out."""
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        raw: dict[str, Any] = {
            "architectures": [_FAMILIES[self.model_type]],
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
            "rope_scaling": _scaling_to_hf(self.rope_scaling),
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "use_cache": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
        }
        if self.model_type != "qwen2":
            raw["attention_bias"] = self.attention_bias
        if self.model_type != "llama":
            raw |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": self.num_hidden_layers}
        if self.num_experts:
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


def _family(raw: Mapping[str, Any]) -> Literal["qwen3", "qwen3_moe", "qwen2", "llama"]:
    named = (raw.get("architectures") or [_FAMILIES.get(raw.get("model_type", ""), raw.get("model_type"))])[0]
    for family, architecture in _FAMILIES.items():
        if named == architecture:
            return family  # type: ignore[return-value]
    raise UserError(f"architecture {named!r} is not supported; supported are {', '.join(_FAMILIES.values())}")


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Refuse what would silently compute something else."""
    accepted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1, 1.0, None),
    }
    for key, values in accepted.items():
        if raw.get(key) not in values:
            raise UserError(f"{key} {raw[key]!r} is not supported; it must be {values[0]!r}")
    if other := set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"layer_types {sorted(other)} is not supported; every layer must be full_attention")


def _rope(raw: Mapping[str, Any], maximum: int) -> tuple[float, RopeScaling | None]:
    parameters = dict(raw.get("rope_parameters") or {})
    scaling = parameters or dict(raw.get("rope_scaling") or {})
    theta = float(parameters.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "yarn", "llama3"):
        raise UserError(f"rope_type {kind!r} is not supported; supported are default, linear, yarn, llama3")
    if any(scaling.get(key) for key in ("mscale", "mscale_all_dim")):
        raise UserError("mscale in rope_scaling is not supported; leave it out")
    known = {field.name for field in dataclasses.fields(RopeScaling)} - {"rope_type"}
    given = {key: value for key, value in scaling.items() if key in known and value is not None}
    given.setdefault("original_max_position_embeddings", maximum)
    return theta, RopeScaling(rope_type=kind, **given)


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    keys = {
        "linear": ("factor",),
        "yarn": (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
        ),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    }[scaling.rope_type]
    values = {key: getattr(scaling, key) for key in keys}
    return {"rope_type": scaling.rope_type} | {key: value for key, value in values.items() if value is not None}
