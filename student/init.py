"""Where a student comes from: a checkpoint, or fresh weights of a stated architecture."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.vocabulary import check_vocabulary
from qwen3.checkpoint import hf
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3, random_model
from qwen3.errors import UserError
from qwen3.field_types import check_fields
from qwen3.json_fields import JsonFields, read_object
from student.lora import Lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromCheckpoint:
    """A student that starts from the weights and the tokenizer of a Hugging Face folder."""

    path: str
    """The folder."""
    planned_as: str | None = None
    """A folder whose config.json a plan goes by as long as there is none in `path`; a run needs `path`."""
    lora: Lora | None = None
    """Train adapters beside these weights instead of the weights; None trains the weights."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.path:
            raise UserError("path is empty; name a folder in Hugging Face format")

    @property
    def tokenizer_folder(self) -> str:
        """Where the student's tokenizer is read from."""
        return self.path

    def model_config(self) -> ModelConfig:
        """The architecture. Raises UserError where the folder has no usable config.json."""
        return ModelConfig.from_folder(self.path)

    def build(
        self,
        key: Array,
        mesh: Mesh | None = None,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
    ) -> Qwen3:
        """The loaded student; only adapters need `key`, and they alone have `param_dtype` where there are any.

        Raises UserError as `qwen3.checkpoint.hf.load` does, or where the tokenizer has more entries than the model or
        the model lacks what `lora` names.
        """
        config = self.model_config()
        check_vocabulary(ChatTokenizer.from_folder(self.path), config.vocab_size)
        if self.lora is None:
            return hf.load(self.path, param_dtype=param_dtype, compute_dtype=compute_dtype, mesh=mesh)
        self.lora.check(config)
        base_dtype = jnp.dtype(self.lora.base_dtype)
        model = hf.load(self.path, param_dtype=base_dtype, compute_dtype=compute_dtype, mesh=mesh)
        self.lora.attach(model, key, mesh, param_dtype)
        return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromScratch:
    """A student with random weights."""

    architecture: Mapping[str, Any] | str
    """Keys and values of a config.json, or the path of one. The tokenizer supplies vocab_size, eos_token_id and
    pad_token_id where they are absent."""
    tokenizer: str
    """The folder with the tokenizer, usually the teacher's: both must mean the same by a token."""

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("architecture", "tokenizer"):
            if not getattr(self, field):
                raise UserError(f"{field} is empty; it must name what the student is made from")

    @property
    def tokenizer_folder(self) -> str:
        """Where the student's tokenizer is read from."""
        return self.tokenizer

    def model_config(self) -> ModelConfig:
        """The architecture, completed from the tokenizer. Raises UserError where either does not make sense."""
        tokenizer = ChatTokenizer.from_folder(self.tokenizer)
        raw = self._raw()
        check_vocabulary(tokenizer, JsonFields(raw).integer("vocab_size", tokenizer.vocab_size))
        supplied = {
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_ids[0],
            "pad_token_id": tokenizer.pad_id,
        }
        return ModelConfig.from_hf(raw | {key: value for key, value in supplied.items() if raw.get(key) is None})

    def build(
        self,
        key: Array,
        mesh: Mesh | None = None,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
    ) -> Qwen3:
        """Random weights from `key`, the same on any mesh up to rounding, made where they belong. Raises UserError."""
        return random_model(self.model_config(), key, mesh, param_dtype=param_dtype, compute_dtype=compute_dtype)

    def _raw(self) -> dict[str, Any]:
        if not isinstance(self.architecture, str):
            return dict(self.architecture)
        return read_object(Path(self.architecture), "name a config.json")
