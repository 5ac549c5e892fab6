"""Which implementation of each operation the models of a run use: one choice, which travels with a model's weights."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from kernels_pallas import platforms
from kernels_pallas.attention import attention
from kernels_pallas.attention.api import Implementation as Attention
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels_pallas.grouped_matmul.api import IMPLEMENTATIONS as GROUPED_MATMULS
from kernels_pallas.grouped_matmul.api import Implementation as GroupedMatmul
from kernels_pallas.linear_kl import Divergence, linear_kl_at_ids, linear_kl_full
from kernels_pallas.linear_kl import Implementation as LinearKl
from kernels_pallas.moe_dispatch import Exchange, check_exchange
from kernels_pallas.paged_attention import paged_attention
from kernels_pallas.paged_attention.api import Implementation as PagedAttention
from qwen3.decoder.config import ModelConfig
from qwen3.errors import UserError
from qwen3.field_types import check_fields

PAGE_SIZE = 32
"""Tokens a page of the cache where nobody says otherwise: every kernel takes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Implementations by operation: xla (everywhere), tpu (Mosaic TPU), gpu (Mosaic GPU, on Hopper) or reference
    (everywhere, slow and obvious). None is what is best on the platform as far as that was measured. What is asked for
    by name is refused before anything starts where the platform or the model's sizes do not allow it."""

    attention: Attention | None = None
    """Of training, of scoring and of reading prompts."""
    paged_attention: PagedAttention | None = None
    """Of decoding, from the pages of the cache where they lie. None: XLA's products over a copy of each sequence's
    pages side by side, which is faster on CPU and takes as much memory again as the pages that are filled."""
    grouped_matmul: GroupedMatmul | None = None
    """The products of a mixture's experts."""
    linear_kl: LinearKl | None = None
    """The student's head and the loss over it, of the teacher's head too where targets are hidden states. What rewards
    need of the head is XLA's, or the reference's."""
    exchange: Exchange = "all_gather"
    """How tokens reach experts on other devices. all_gather: every token goes to every device of mesh.expert, on all
    platforms. ragged: to those of its experts alone, not on CPU and on at most 16 chips of TPU v5e."""

    def __post_init__(self) -> None:
        check_fields(self, "kernels")

    def check(self, config: ModelConfig, dtype: DTypeLike, mesh: Mesh, *, tokens_per_target: int = 0) -> None:
        """Refuses what this platform, the mesh, or a model's sizes or dtype of computing do not allow.

        `tokens_per_target` are the most that targets name at a position.
        Traces each operation that was asked for by name; compiles and runs nothing. Raises UserError, which begins
        with the field.
        """
        self.check_pages(config)
        for field, probe in self._probes(config, dtype, mesh, tokens_per_target):
            try:
                probe()
            except ValueError as error:
                raise UserError(f"kernels.{field}: {error}") from None

    def check_pages(self, config: ModelConfig) -> None:
        """Refuses reading pages in place, whatever the platform, of a model whose keys are read by chunks."""
        if self.paged_attention is not None and config.dual_chunk is not None:
            raise UserError(
                f"kernels.paged_attention: {self.paged_attention!r} does not read keys by chunks, which the model's "
                "dual_chunk_attention_config asks for; leave it None"
            )

    def _probes(
        self, config: ModelConfig, dtype: DTypeLike, mesh: Mesh, tokens_per_target: int
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        def shaped(*shape: int, of: Any = dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, of)

        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if self.attention is not None:
            run: Any = functools.partial(attention, implementation=self.attention)
            q, kv = shaped(1, 128, heads, size), shaped(1, 128, kv_heads, size)
            yield "attention", lambda: jax.eval_shape(run, q, kv, kv, shaped(1, 128, of=jnp.int32))
        if self.paged_attention is not None:
            step: Any = functools.partial(paged_attention, implementation=self.paged_attention)
            one, pages = shaped(1, 1, heads, size), shaped(1, kv_heads, PAGE_SIZE, size)
            table, lengths = shaped(1, 1, of=jnp.int32), shaped(1, of=jnp.int32)
            yield "paged_attention", lambda: jax.eval_shape(step, one, pages, pages, table, lengths)
        if self.grouped_matmul is not None:
            # Also where there are no experts: a name is of this platform or it is not.
            name = self.grouped_matmul
            yield "grouped_matmul", lambda: platforms.choose("grouped_matmul", name, GROUPED_MATMULS)
        if self.grouped_matmul is not None and config.num_experts:
            experts, width = config.num_experts // mesh.shape["expert"], config.hidden_size
            inner = config.moe_intermediate_size // mesh.shape["tensor"]
            wide, sizes = shaped(experts, width, inner), shaped(experts, of=jnp.int32)
            lift = functools.partial(grouped_swiglu, implementation=self.grouped_matmul)
            lower = functools.partial(grouped_matmul, implementation=self.grouped_matmul)
            yield "grouped_matmul", lambda: jax.eval_shape(lift, shaped(128, width), wide, wide, sizes)
            narrow = shaped(experts, inner, width)
            yield "grouped_matmul", lambda: jax.eval_shape(lower, shaped(128, inner), narrow, sizes)
        if self.linear_kl is not None:
            own_tokens = config.vocab_size // mesh.shape["tensor"]
            hidden, head = shaped(1, 128, config.hidden_size), shaped(own_tokens, config.hidden_size)
            weights, whole = shaped(1, 128, of=jnp.float32), PartitionSpec()

            def loss(operation: Callable[..., Any], *arguments: Any) -> Any:
                run = functools.partial(operation, divergence=Divergence("forward_kl"), implementation=self.linear_kl)
                on_mesh = jax.shard_map(run, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
                return jax.eval_shape(on_mesh, hidden, head, *arguments, weights)

            yield "linear_kl", lambda: loss(linear_kl_full, hidden, head)
            if tokens_per_target:
                ids, logprobs = (shaped(1, 128, tokens_per_target, of=of) for of in (jnp.int32, jnp.float32))
                yield "linear_kl", lambda: loss(linear_kl_at_ids, ids, logprobs, weights)
        yield "exchange", lambda: check_exchange(self.exchange, mesh)
