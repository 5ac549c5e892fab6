"""One decoder layer: norms, attention projections, dense feed-forward.

A weight's shape, logical axes and initialiser stand together where it is made. The axes are metadata on the
`nnx.Param`, which gradients and optimiser state inherit, so `qwen3.sharding` can place all of them from one table.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qwen3.decoder.adapter import Adapter
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.rope import Rotary, rotate_pair

Attend = Callable[[Any, Array, Array], tuple[Array, Any]]
"""(q [B,T,N,H] or DualChunkQueries, k [B,T,K,H], v [B,T,K,H]) -> (output [B,T,N,H], whatever the caller keeps, such as
a cache)."""


def weight(
    key: Array, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float, dtype: DTypeLike
) -> nnx.Param:
    """A normally distributed weight that names its logical axes."""
    # The same numbers as drawing `shape` at once, which takes XLA on CPU seconds to compile from three axes on.
    drawn = jax.random.normal(key, (shape[0], math.prod(shape[1:])), dtype).reshape(shape)
    return nnx.Param(drawn * jnp.asarray(scale, dtype), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


def rms_norm(x: Float[Array, "... D"], scale: nnx.Param, epsilon: float) -> Float[Array, "... D"]:
    """Root-mean-square norm in float32, cast back, then scaled (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * scale[...].astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention projections with optional biases and per-head norms of queries and keys."""

    def __init__(self, config: ModelConfig, key: Array, dtype: DTypeLike):
        width, heads, kv, size = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        scale = config.initializer_range
        keys = jax.random.split(key, 4)
        self.epsilon = config.rms_norm_eps
        self.q = weight(keys[0], (width, heads, size), ("embed", "heads", "head_dim"), scale, dtype)
        self.k = weight(keys[1], (width, kv, size), ("embed", "kv_heads", "head_dim"), scale, dtype)
        self.v = weight(keys[2], (width, kv, size), ("embed", "kv_heads", "head_dim"), scale, dtype)
        self.o = weight(keys[3], (heads, size, width), ("heads", "head_dim", "embed"), scale, dtype)
        has_bias, has_output_bias = config.attention_bias, config.attention_output_bias
        self.q_bias = constant(0, (heads, size), ("heads", "head_dim"), dtype) if has_bias else None
        self.k_bias = constant(0, (kv, size), ("kv_heads", "head_dim"), dtype) if has_bias else None
        self.v_bias = constant(0, (kv, size), ("kv_heads", "head_dim"), dtype) if has_bias else None
        self.o_bias = constant(0, (width,), ("norm",), dtype) if has_output_bias else None
        self.q_norm = constant(1, (size,), ("norm",), dtype) if config.qk_norm else None
        self.k_norm = constant(1, (size,), ("norm",), dtype) if config.qk_norm else None
        self.adapters: dict[str, Adapter] = nnx.data({})

    def __call__(self, x: Float[Array, "B T D"], rot: Rotary, attend: Attend) -> tuple[Float[Array, "B T D"], Any]:
        q = _project("BTD,DNH->BTNH", x, self.q, self.q_bias, self.adapters.get("q"))
        k = _project("BTD,DKH->BTKH", x, self.k, self.k_bias, self.adapters.get("k"))
        v = _project("BTD,DKH->BTKH", x, self.v, self.v_bias, self.adapters.get("v"))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.epsilon), rms_norm(k, self.k_norm, self.epsilon)
        out, kept = attend(*rotate_pair(q, k, rot), v)
        return _project("BTNH,NHD->BTD", out, self.o, self.o_bias, self.adapters.get("o")), kept


class Mlp(nnx.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, key: Array, dtype: DTypeLike):
        width, inner, scale = config.hidden_size, config.intermediate_size, config.initializer_range
        keys = jax.random.split(key, 3)
        self.gate = weight(keys[0], (width, inner), ("embed", "mlp"), scale, dtype)
        self.up = weight(keys[1], (width, inner), ("embed", "mlp"), scale, dtype)
        self.down = weight(keys[2], (inner, width), ("mlp", "embed"), scale, dtype)
        self.adapters: dict[str, Adapter] = nnx.data({})

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = _project("BTD,DF->BTF", x, self.gate, adapter=self.adapters.get("gate"))
        up = _project("BTD,DF->BTF", x, self.up, adapter=self.adapters.get("up"))
        return _project("BTF,FD->BTD", jax.nn.silu(gate) * up, self.down, adapter=self.adapters.get("down"))


def _project(
    equation: str, x: Array, kernel: nnx.Param, bias: nnx.Param | None = None, adapter: Adapter | None = None
) -> Array:
    out = _product(equation, x, kernel[...].astype(x.dtype))
    out = out if bias is None else out + bias[...].astype(x.dtype)
    return out if adapter is None else out + adapter(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: Array, kernel: Array) -> Array:
    """`jnp.einsum`, whose own derivative by `kernel` comes out transposed: on CPU that takes twice as long. Over heads
    it would also sum in another order than they lie in, for which XLA copies the kernel at every call."""
    summed = set.intersection(*map(set, equation.split("->")[0].split(",")))
    return jnp.tensordot(x, kernel, len(summed))


def _product_forward(equation: str, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(equation, x, kernel), (x, kernel)


def _product_backward(equation: str, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    operands, out = equation.split("->")
    left, right = operands.split(",")
    return (
        jnp.einsum(f"{out},{right}->{left}", cotangent, kernel),
        jnp.einsum(f"{left},{out}->{right}", x, cotangent),
    )


_product.defvjp(_product_forward, _product_backward)
