"""The public door of causal grouped-query attention: checks arguments, picks an implementation, owns the derivative."""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import reference
from kernels_pallas.attention.visible import Visible
from kernels_pallas.platforms import choose

Implementation = Literal["xla", "reference", "tpu", "gpu"]
ATTENDED = "attended"
"""The name (`jax.ad_checkpoint`) of the results that a backward pass begins with: whoever saves them and rematerialises
their operands does not attend twice."""
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "reference", "tpu", "gpu")


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B S"],
    *,
    query_index: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax(q·k / √H)·v, each query over the keys at or before it in its own segment.

    `query_index` says where in their row, 0 … S - 1, the queries stand where they are not all of it; without it T is S.
    Segment 0 is padding: its rows come back as zeros. Softmax and accumulation are float32, the result has the
    dtype of `q`. Differentiable. Raises ValueError where shapes disagree, the implementation is unknown or of another
    platform, or a kernel asked for by name has no such dtype or head size.
    """
    _check(q, k, v, segment_ids, query_index)
    return _run(q, k, v, Visible(segment_ids, query_index=query_index), implementation)[0]


def attention_part(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B S"],
    span: tuple[Int[Array, "B T"], Int[Array, "B T"]],
    *,
    query_index: Int[Array, "B T"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`attention` over some of the keys, with the log-sum-exp that `merge_parts` needs, in float32.

    Query i counts, of the keys that `attention` counts, those of index span[0][i] <= j < span[1][i]. Where that leaves
    none the result is 0 and its log-sum-exp below -1e28. Both results are differentiable. Raises ValueError as
    `attention` does.
    """
    _check(q, k, v, segment_ids, query_index)
    for bound in span:
        if bound.shape != q.shape[:2]:
            raise ValueError(f"a bound of span is {bound.shape}; it must be {q.shape[:2]}")
    return _run(q, k, v, Visible(segment_ids, span, query_index), implementation)


def merge_parts(parts: Sequence[tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]]) -> Float[Array, "B T N H"]:
    """Attention over all keys from `attention_part` over disjoint spans, each with queries of its own choice."""
    return merge_parts_with_log_sum_exp(parts)[0].astype(parts[0][0].dtype)


def merge_parts_with_log_sum_exp(
    parts: Sequence[tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`merge_parts` in float32 and the log-sum-exp of all, to be merged with more."""
    outs, log_sum_exps = zip(*parts, strict=True)
    stacked = jnp.stack(log_sum_exps)
    shares = jax.nn.softmax(stacked, axis=0).swapaxes(2, 3)[..., None]
    return jnp.sum(shares * jnp.stack(outs).astype(jnp.float32), axis=0), jax.nn.logsumexp(stacked, axis=0)


def _check(q: Array, k: Array, v: Array, segment_ids: Array, query_index: Array | None) -> None:
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape
    if not fits or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} must be [B,T,N,H], [B,S,K,H], [B,S,K,H]")
    if query_index is None and q.shape[1] != k.shape[1]:
        raise ValueError(f"q {q.shape} and k {k.shape} differ in length; say by query_index where the queries stand")
    if query_index is not None and query_index.shape != q.shape[:2]:
        raise ValueError(f"query_index is {query_index.shape}; it must be {q.shape[:2]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, no multiple of the {k.shape[2]} heads of k and v")
    if segment_ids.shape != k.shape[:2]:
        raise ValueError(f"segment_ids is {segment_ids.shape}; it must be {k.shape[:2]}")


def _run(q: Array, k: Array, v: Array, visible: Visible, implementation: str | None) -> tuple[Array, Array]:
    name = choose("attention", implementation, IMPLEMENTATIONS)
    if name == "reference":
        return reference.attention(q, k, v, visible)
    # Kernels are imported when they are wanted: each brings its platform's compiler front end.
    backend = importlib.import_module(f"kernels_pallas.attention.{name}")
    if name != "xla":
        _check_kernel(backend, name, q, k, v)
    return _differentiable(backend, q, k, v, visible)


def _check_kernel(backend: ModuleType, name: str, q: Array, k: Array, v: Array) -> None:
    if q.dtype not in backend.DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; implementation {name!r} of attention takes one of "
            f"{', '.join(backend.DTYPES)} for all three; cast them, or use 'xla'"
        )
    if q.shape[3] not in backend.HEAD_SIZES:
        raise ValueError(
            f"head size {q.shape[3]}: implementation {name!r} of attention takes "
            f"{' or '.join(map(str, backend.HEAD_SIZES))}; use 'xla'"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(backend: ModuleType, q: Array, k: Array, v: Array, visible: Visible) -> tuple[Array, Array]:
    return backend.forward(q, k, v, visible)


def _forward(backend: ModuleType, q: Array, k: Array, v: Array, visible: Visible):
    out, log_sum_exp = (checkpoint_name(x, ATTENDED) for x in backend.forward(q, k, v, visible))
    return (out, log_sum_exp), (q, k, v, visible, out, log_sum_exp)


def _backward(backend: ModuleType, residuals, cotangents):
    """d score = weight · (d weight - delta), and the log-sum-exp's own derivative by a score is the weight."""
    q, k, v, visible, out, log_sum_exp = residuals
    cotangent, to_log_sum_exp = cotangents
    delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    delta = delta.swapaxes(1, 2) - to_log_sum_exp
    return *backend.backward(q, k, v, visible, log_sum_exp, delta, cotangent), None


_differentiable.defvjp(_forward, _backward)
