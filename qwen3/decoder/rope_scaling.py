"""Scaling of rotary embeddings as `config.json` states it, in the spelling of transformers 4 or 5."""

import dataclasses
from typing import Annotated, Any, Literal, get_args

from qwen3.errors import UserError
from qwen3.field_types import Bounds, Count, Positive, check_fields, shown
from qwen3.json_fields import JsonFields

Kind = Literal["linear", "yarn", "llama3"]
_WRITTEN_KEYS: dict[Kind, tuple[str, ...]] = {
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
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings, named as in `config.json`."""

    rope_type: Kind
    factor: Annotated[float, Bounds(1, 1e6, "be at least 1, and at most a million")]
    original_max_position_embeddings: Count
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        if self.beta_fast < self.beta_slow:
            raise UserError(f"rope_scaling.beta_fast {self.beta_fast} must be at least beta_slow {self.beta_slow}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )

    def to_hf(self) -> dict[str, Any]:
        """The value of `rope_scaling`, without keys that the type does not use."""
        values = {key: getattr(self, key) for key in _WRITTEN_KEYS[self.rope_type]}
        return {"rope_type": self.rope_type} | {key: value for key, value in values.items() if value is not None}


def read_rope(config: JsonFields, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and the scaling out of `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

    What is absent is resolved as transformers resolves it: theta 10,000, the original context from the top level,
    else `max_position_embeddings`.

    Raises:
        UserError: The two spellings contradict each other, or a type or key is not supported.
    """
    read = {key: _read_one(config, key, max_position_embeddings) for key in ("rope_parameters", "rope_scaling")}
    given = [value for key, value in read.items() if config.object(key).raw]
    if len(given) == 2 and given[0] != given[1]:
        raise UserError("rope_parameters and rope_scaling contradict each other; keep one of them")
    return given[0] if given else read["rope_scaling"]


def _read_one(config: JsonFields, key: str, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    rope = config.object(key)
    if nested := [name for name, value in rope.raw.items() if isinstance(value, dict)]:
        raise UserError(f"{key} by kind of layer ({', '.join(nested)}) is not supported; all layers must rotate alike")
    for name in ("mscale", "mscale_all_dim"):
        if rope.raw.get(name):
            raise UserError(f"{name} in {key} is not supported; leave it out")
    if rope.raw.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"partial_rotary_factor {rope.raw['partial_rotary_factor']} in {key} is not supported; only 1")
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in get_args(Kind):
        raise UserError(f"rope_type {shown(kind)} is not supported; supported are default, {', '.join(get_args(Kind))}")
    original = config.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position_embeddings)
    )
    llama3 = kind == "llama3"
    return theta, RopeScaling(
        rope_type=kind,
        factor=rope.number("factor"),
        original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor", None),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        low_freq_factor=rope.number("low_freq_factor") if llama3 else 1.0,
        high_freq_factor=rope.number("high_freq_factor") if llama3 else 4.0,
    )
