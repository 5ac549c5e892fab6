"""Students that are trained through low-rank adapters (LoRA, arXiv 2106.09685) while their base stays as it was."""

import dataclasses
import json
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qwen3.checkpoint.hf_names import Leaf, leaves_of
from qwen3.decoder.adapter import Adapter
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.field_types import Count, Positive, check_fields
from qwen3.sharding import fetch, make_placed

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_TARGETS: tuple[Target, ...] = get_args(Target)
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of rank R beside projections of every layer; nothing else is trained, saved or given moments."""

    rank: Count = 16
    """R: an adapter of a projection [in, out] has R · (in + out) weights."""
    alpha: Positive = 32.0
    """What an adapter computes is scaled by alpha / rank."""
    targets: tuple[Target, ...] = _TARGETS
    """Projections that get adapters, by their names in Hugging Face models. Experts' own get none."""
    base_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the frozen weights are kept in; nothing is lost where the folder holds bfloat16, as released ones do."""

    def __post_init__(self) -> None:
        check_fields(self, "lora")
        if not self.targets:
            raise UserError(f"lora.targets is empty; name some of {', '.join(_TARGETS)}")
        if len(set(self.targets)) < len(self.targets):
            raise UserError(f"lora.targets is {self.targets}; name every projection once")

    def check(self, config: ModelConfig) -> None:
        """Raises UserError where the architecture lacks a target or has no use for the rank."""
        if self.rank > config.hidden_size:
            raise UserError(
                f"lora.rank is {self.rank}, but no projection of this model has a rank above its hidden_size, "
                f"{config.hidden_size}; lower it"
            )
        absent = [target for target in self.targets if target in _FEED_FORWARD]
        if absent and any(moe for moe, _ in config.layer_runs()):
            raise UserError(
                f"lora.targets has {', '.join(absent)}, which are experts in this mixture-of-experts model, and "
                f"experts get no adapters; use {', '.join(t for t in _TARGETS if t not in _FEED_FORWARD)}"
            )

    def attach(self, model: Qwen3, key: Array, mesh: Mesh | None = None, dtype: DTypeLike = jnp.float32) -> None:
        """Give `model` adapters of weights of `dtype`, drawn from `key`, the same on any mesh up to rounding."""
        # A bias belongs to the same module; it has no inputs.
        leaves = [(leaf, n) for leaf in leaves_of(model) if leaf.module_name in self.targets and (n := leaf.inputs)]

        def make(key: Array) -> list[Adapter]:
            return [
                Adapter(key, leaf.param, inputs, rank=self.rank, alpha=self.alpha, dtype=dtype)
                for key, (leaf, inputs) in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
            ]

        for (leaf, _), adapter in zip(leaves, make_placed(make, key, mesh), strict=True):
            leaf.owner.adapters[leaf.attribute] = adapter


def save_adapters(folder: Path, model: Qwen3, base: str | Path, dtype: DTypeLike | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a folder, as PEFT and vLLM read them.

    `dtype` is what they are stored as; None keeps the adapters' own.
    `base` is the folder of the frozen weights, to which the configuration points by its absolute path. Of several
    processes that share the model all call this, and the first one writes.
    Raises UserError where the folder cannot be written, ValueError where the model has no adapters.
    """
    adapters = {leaf: leaf.adapter for leaf in leaves_of(model) if leaf.adapter is not None}
    if not adapters:
        raise ValueError("the model has no adapters; save the model itself")
    tensors: dict[str, np.ndarray] = {}
    for leaf, adapter in adapters.items():
        own = adapter.a.get_value().dtype
        tensors |= _peft_tensors(leaf, adapter, np.dtype(own if dtype is None else dtype))
    if jax.process_index() != 0:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).absolute()),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({leaf.module_name for leaf in adapters}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    try:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be written ({error}); free space or name another folder") from None


def _peft_tensors(leaf: Leaf, adapter: Adapter, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The factors of one parameter's adapters, layer by layer, as PyTorch stores them: [R, in] and [out, R]."""
    a, b = (fetch(weight.get_value()) for weight in (adapter.a, adapter.b))
    tensors = {}
    for tensor in leaf.tensors:
        stem = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = np.array(a[tensor.lead].reshape(-1, adapter.rank).T, dtype, order="C")
        tensors[f"{stem}.lora_B.weight"] = np.array(b[tensor.lead].reshape(adapter.rank, -1).T, dtype, order="C")
    return tensors
