"""The public door of causal grouped-query attention: checks arguments and picks an implementation."""

from typing import Literal

from jaxtyping import Array, Float, Int

from kernels_pallas.attention import reference, xla

Implementation = Literal["xla", "reference"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax(q·k / √H)·v, each query over the keys at or before it in its own segment.

    Segment 0 is padding: its rows come back as zeros. Softmax and accumulation are float32, the result has the
    dtype of `q`. Differentiable. Raises ValueError where shapes disagree or the implementation is unknown.
    """
    if q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} must be [B,T,N,H], [B,T,K,H], [B,T,K,H]")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, no multiple of the {k.shape[2]} heads of k and v")
    if segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids is {segment_ids.shape}; it must be {q.shape[:2]}")
    match implementation or "xla":
        case "xla":
            return xla.attention(q, k, v, segment_ids)
        case "reference":
            return reference.attention(q, k, v, segment_ids)
        case other:
            raise ValueError(f"implementation {other!r} is unknown; use 'xla', 'reference' or None")
