"""The public door of paged attention: checks arguments and picks an implementation. Decoding needs no derivative."""

import importlib
from types import ModuleType
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.paged_attention import reference
from kernels_pallas.platforms import choose

Implementation = Literal["xla", "reference", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "reference", "tpu", "gpu")


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K s H"],
    v_pages: Float[Array, "P K s H"],
    page_table: Int[Array, "B p"],
    lengths: Int[Array, "B"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax(q·k / √H)·v of the last T tokens of each row over all its tokens up to each of them.

    Args:
      q: the queries of T new tokens a row: 1 when decoding, more when drafts are verified.
      k_pages, v_pages: pages of s tokens; within a page the tokens of one head lie together. Every number must be
        finite, also where no row has written yet.
      page_table: row b's token i stands in page page_table[b, i // s] at place i % s. Entries behind a row's last
        page are not read; row b reads each of its pages once for all queries and heads.
      lengths: tokens of each row, its T new ones included, which are the last: query t sees the tokens
        0 … lengths - T + t. Queries that see none, as all of a row of length 0, give zeros. At most p·s.

    Softmax and accumulation are float32, the result has the dtype of `q`. Raises ValueError where shapes disagree, the
    implementation is unknown or of another platform, or a kernel asked for by name has no such dtype, head size,
    page size or number of new tokens.
    """
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or q.ndim != 4 or q.shape[3] != k_pages.shape[3]:
        raise ValueError(
            f"q {q.shape}, k_pages {k_pages.shape}, v_pages {v_pages.shape} must be [B,T,N,H], [P,K,s,H], [P,K,s,H]"
        )
    if q.shape[2] % k_pages.shape[1]:
        raise ValueError(f"q has {q.shape[2]} heads, no multiple of the {k_pages.shape[1]} heads of the pages")
    if page_table.ndim != 2 or page_table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"page_table {page_table.shape} and lengths {lengths.shape} must be [{q.shape[0]}, p] and [{q.shape[0]}]"
        )
    for name, array in (("page_table", page_table), ("lengths", lengths)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {array.dtype}; pass integers")
    name = choose("paged_attention", implementation, IMPLEMENTATIONS)
    if name == "reference":
        return reference.paged_attention(q, k_pages, v_pages, page_table, lengths)
    # Kernels are imported when they are wanted: each brings its platform's compiler front end.
    backend = importlib.import_module(f"kernels_pallas.paged_attention.{name}")
    if name != "xla":
        _check_kernel(backend, name, q, k_pages, v_pages)
    kv_heads, new = k_pages.shape[1], q.shape[1]
    out = backend.paged_attention(_grouped(q, kv_heads), k_pages, v_pages, page_table, lengths, new)
    return _ungrouped(out, new)


def _grouped(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K T*G H"]:
    """What reads the same keys becomes rows of one matrix, tokens before heads."""
    batch, new, heads, size = q.shape
    q = q.reshape(batch, new, kv_heads, heads // kv_heads, size)
    return q.swapaxes(1, 2).reshape(batch, kv_heads, -1, size)


def _ungrouped(x: Float[Array, "B K T*G H"], new: int) -> Float[Array, "B T N H"]:
    batch, kv_heads, _, size = x.shape
    return x.reshape(batch, kv_heads, new, -1, size).swapaxes(1, 2).reshape(batch, new, -1, size)


def _check_kernel(backend: ModuleType, name: str, q: Array, k_pages: Array, v_pages: Array) -> None:
    of = f"implementation {name!r} of paged_attention takes"
    if q.dtype not in backend.DTYPES or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        raise ValueError(
            f"q, k_pages, v_pages have dtypes {q.dtype}, {k_pages.dtype}, {v_pages.dtype}; {of} one of "
            f"{', '.join(backend.DTYPES)} for all three; cast them, or use 'xla'"
        )
    if q.shape[3] not in backend.HEAD_SIZES:
        raise ValueError(f"head size {q.shape[3]}: {of} {' or '.join(map(str, backend.HEAD_SIZES))}; use 'xla'")
    if k_pages.shape[2] not in backend.PAGE_SIZES:
        raise ValueError(
            f"page size {k_pages.shape[2]}: {of} one of {', '.join(map(str, backend.PAGE_SIZES))}; use 'xla'"
        )
    new, group = q.shape[1], q.shape[2] // k_pages.shape[1]
    if new * group > backend.LARGEST_GROUP:
        raise ValueError(
            f"{new} new tokens of {group} heads that share keys: {of} up to {backend.LARGEST_GROUP} together; use 'xla'"
        )
