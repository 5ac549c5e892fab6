"""Dual Chunk Attention as `config.json` states it: how long texts are cut so that positions stay within what a model
was trained on."""

import dataclasses
from typing import Any

from qwen3.errors import UserError
from qwen3.field_types import Count, Natural, check_fields
from qwen3.json_fields import JsonFields

_KEY = "dual_chunk_attention_config"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualChunk:
    """Sizes of Dual Chunk Attention (arXiv 2402.17463), named and defaulted as in vLLM, for which Qwen publishes them.

    Texts of at most chunk_size - local_size tokens are attended to as without it.
    """

    chunk_size: Count = 8192
    """Tokens that positions must stay within."""
    local_size: Natural = 1024
    """Tokens of the chunk before that are seen at their true distance from anywhere in a chunk."""
    original_max_position_embeddings: Natural = 0
    """Tokens beyond which scores are scaled up with the logarithm of the length; 0: never."""

    def __post_init__(self) -> None:
        check_fields(self, _KEY)
        if self.local_size >= self.chunk_size:
            raise UserError(f"{_KEY}.local_size is {self.local_size}; it must be below chunk_size, {self.chunk_size}")

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk, less than chunk_size by those of the chunk before that must fit beside it."""
        return self.chunk_size - self.local_size

    def to_hf(self) -> dict[str, Any]:
        """The value of `dual_chunk_attention_config`."""
        return dataclasses.asdict(self)


def read_dual_chunk(config: JsonFields) -> DualChunk | None:
    """Raises UserError where sparse attention is asked for, of which only the exact result is computed here."""
    chunks = config.object(_KEY)
    if not chunks.raw:
        return None
    sparse = chunks.flag("sparse_attention_enabled", chunks.raw.get("sparse_attention_config") is not None)
    if sparse:
        raise UserError(
            f"{_KEY}.sparse_attention_enabled is not supported; set it to false, and all keys count instead of a choice"
        )
    defaults = DualChunk()
    sizes = {
        field.name: chunks.integer(field.name, getattr(defaults, field.name)) for field in dataclasses.fields(DualChunk)
    }
    return DualChunk(**sizes)
