"""The work that benchmarks share: two sizes of teacher and student, and the lengths of what they read and write."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from qwen3.decoder.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """One row of models and the batch that a training step takes."""

    teacher: ModelConfig
    student: ModelConfig
    batch_size: int
    sequence_tokens: int = 256
    prompt_tokens: int = 64
    """Where the student generates, it goes on after so many tokens."""

    @property
    def new_tokens(self) -> int:
        return self.sequence_tokens - self.prompt_tokens


def _size(vocab_size: int, batch_size: int) -> Size:
    teacher = ModelConfig(
        model_type="qwen3_moe",
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
    )
    student = ModelConfig(
        model_type="qwen3",
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return Size(teacher=teacher, student=student, batch_size=batch_size)


SIZES: Mapping[str, Size] = MappingProxyType({"tiny": _size(4096, 8), "vocab": _size(151_936, 4)})
