"""The Qwen3 decoder, dense or mixture of experts by configuration, as a plain pytree of parameters.

One alphabet names dimensions throughout the project: B batch, T query, S key, D model, N query heads,
K key/value heads, G = N/K, H head, F feed-forward, E experts, X experts per token, V vocabulary, L layers,
M tokens (B·T), J teacher entries per token, R rank of an adapter.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen3.decoder.attend import attend
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.kernels import Kernels
from qwen3.decoder.layers import Attend, Attention, Mlp, constant, rms_norm, weight
from qwen3.decoder.moe import Moe, RouterStats
from qwen3.decoder.rope import Rotary, rotation
from qwen3.sharding import placing, to_pieces, to_rows

UNROLL_LAYERS = 12
"""Deepest model whose layers are unrolled: in the decoding loop (see `qwen3.generation.cache`), and on CPU in every
forward pass, where a scan copies what each layer keeps for the backward pass into and out of stacked buffers and
fills those with zeros first. Deeper models would take minutes to compile."""


class Output(NamedTuple):
    hidden: Float[Array, "B T D"]
    """Hidden states after the final norm: multiply by the head for logits."""
    router: RouterStats | None
    """Load of every mixture-of-experts layer, None for a dense model."""


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, moe: bool, key: Array, dtype: DTypeLike):
        attention_key, ffn_key = jax.random.split(key)
        self.epsilon = config.rms_norm_eps
        self.attention_norm = constant(1, (config.hidden_size,), ("norm",), dtype)
        self.attention = Attention(config, attention_key, dtype)
        self.ffn_norm = constant(1, (config.hidden_size,), ("norm",), dtype)
        self.ffn = Moe(config, ffn_key, dtype) if moe else Mlp(config, ffn_key, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rot: Rotary,
        real: Array,
        attend: Attend,
        mesh: Mesh | None,
        kernels: Kernels,
    ) -> tuple[Float[Array, "B T D"], Any, RouterStats | None]:
        """Returns the residual stream, what `attend` keeps (a cache), and the router's load."""
        out, kept = self.attention(rms_norm(x, self.attention_norm, self.epsilon), rot, attend)
        x = x + out
        normed = rms_norm(x, self.ffn_norm, self.epsilon)
        if isinstance(self.ffn, Moe):
            out, stats = self.ffn(normed, real, mesh, kernels)
            return x + out, kept, stats
        return x + self.ffn(normed), kept, None


class Qwen3(nnx.Module):
    """Embedding, stacks of like layers (each run by one scan), final norm and head."""

    def __init__(
        self,
        config: ModelConfig,
        key: Array,
        *,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
    ):
        embed_key, head_key, layer_key = jax.random.split(key, 3)
        shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        self.config = config
        self.compute_dtype = compute_dtype
        # As static as the configuration: programs are compiled for one choice. Whoever loads a model may replace it.
        self.kernels = Kernels()
        self.embed = weight(embed_key, shape, axes, config.initializer_range, param_dtype)
        self.final_norm = constant(1, (config.hidden_size,), ("norm",), param_dtype)
        self.untied_head = (
            None if config.tie_word_embeddings else weight(head_key, shape, axes, config.initializer_range, param_dtype)
        )
        keys = jax.random.split(layer_key, config.num_hidden_layers)
        stacks, first = [], 0
        for moe, count in config.layer_runs():
            stacks.append(
                jax.vmap(lambda key, moe=moe: Layer(config, moe, key, param_dtype))(keys[first : first + count])
            )
            first += count
        self.stacks = nnx.List(stacks)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output projection: the embedding itself where the two are tied."""
        return self.embed[...] if self.untied_head is None else self.untied_head[...]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        *,
        rematerialise: bool = False,
        mesh: Mesh | None = None,
    ) -> Output:
        """Hidden states of packed rows; segment 0 is padding, every other id a document of its own.

        `rematerialise` keeps only the residual stream of each layer for the backward pass and recomputes the rest.
        `mesh` is where the weights and rows lie as `qwen3.sharding` says; without it XLA spreads the work as it sees
        fit, which it cannot do with kernels. All but attention is done on the pieces of rows that devices have.
        """
        tokens, positions, segment_ids = to_pieces((tokens, positions, segment_ids), mesh, zigzag=True)
        rot = rotation(self.config, positions)
        real = segment_ids != 0

        def attend_pieces(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return attend(q, k, v, segment_ids, pieces=True, mesh=mesh, implementation=self.kernels.attention), None

        def body(x: Array, layer: Layer) -> tuple[Array, RouterStats | None]:
            x, _, stats = layer(x, rot, real, attend_pieces, mesh, self.kernels)
            return x, stats

        x = self.embed_tokens(tokens)
        loads = []
        for stack in self.stacks:
            x, stats = jax.lax.scan(jax.checkpoint(body) if rematerialise else body, x, stack, unroll=self._unrolled)
            loads += [] if stats is None else [stats]
        router = jax.tree.map(lambda *parts: jnp.concatenate(parts), *loads) if loads else None
        return Output(to_rows(self.final(x), mesh, zigzag=True), router)

    @property
    def _unrolled(self) -> bool:
        return jax.default_backend() == "cpu" and self.config.num_hidden_layers <= UNROLL_LAYERS

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jnp.take(self.embed[...], tokens, axis=0).astype(self.compute_dtype)

    def final(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps)

    def hidden(
        self, tokens: Array, positions: Array, segment_ids: Array, mesh: Mesh | None = None
    ) -> Float[Array, "B T D"]:
        return self(tokens, positions, segment_ids, mesh=mesh).hidden

    def logits(self, tokens: Array, positions: Array, segment_ids: Array) -> Float[Array, "B T V"]:
        """All logits in float32, for tests and small inputs: training and scoring never hold them."""
        hidden = self.hidden(tokens, positions, segment_ids)
        return jnp.einsum("BTD,VD->BTV", hidden, self.head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def random_model(
    config: ModelConfig,
    key: Array,
    mesh: Mesh | None = None,
    *,
    param_dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike = jnp.float32,
) -> Qwen3:
    """Weights drawn from `key`, the same on any mesh up to rounding, each made where it belongs; on the default device
    without a mesh. Raises UserError where a size does not divide its part of the mesh."""
    return _drawing(config, mesh, jnp.dtype(param_dtype), jnp.dtype(compute_dtype))(key)


@functools.lru_cache(maxsize=4)
def _drawing(
    config: ModelConfig, mesh: Mesh | None, param_dtype: jnp.dtype, compute_dtype: jnp.dtype
) -> Callable[[Array], Qwen3]:
    """Models of one architecture share the program that draws them."""

    def draw(key: Array) -> Qwen3:
        return Qwen3(config, key, param_dtype=param_dtype, compute_dtype=compute_dtype)

    return placing(draw, mesh)
