"""The public door of paged attention: checks arguments and picks an implementation."""

from typing import Literal

from jaxtyping import Array, Float, Int

from kernels_pallas.paged_attention import reference, xla

Implementation = Literal["xla", "reference"]


def paged_attention(
    q: Float[Array, "B N H"],
    k_pages: Float[Array, "K P H s"],
    v_pages: Float[Array, "K P s H"],
    page_table: Int[Array, "B p"],
    lengths: Int[Array, "B"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B N H"]:
    """Softmax(q·k / √H)·v of one query a sequence over its first `lengths` keys (PagedAttention, arXiv 2309.06180).

    Key t of sequence b lies in page `page_table[b, t // s]` at place `t % s`. Entries behind a sequence's last page
    may name any page that exists; what lies there must be finite. Softmax and accumulation are float32, the result
    has the dtype of `q`. Lengths are 1 to p·s. Raises ValueError where shapes disagree or the implementation is
    unknown.
    """
    heads, pages, size, places = k_pages.shape
    if v_pages.shape != (heads, pages, places, size):
        raise ValueError(f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must be [K,P,H,s] and [K,P,s,H]")
    if q.ndim != 3 or q.shape[2] != size or q.shape[1] % heads:
        raise ValueError(f"q is {q.shape}; it must be [B, a multiple of {heads}, {size}]")
    if page_table.ndim != 2 or page_table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ValueError(f"page_table {page_table.shape} and lengths {lengths.shape} must be [{q.shape[0]}, p] and [B]")
    match implementation or "xla":
        case "xla":
            return xla.paged_attention(q, k_pages, v_pages, page_table, lengths)
        case "reference":
            return reference.paged_attention(q, k_pages, v_pages, page_table, lengths)
        case other:
            raise ValueError(f"implementation {other!r} is unknown; use 'xla', 'reference' or None")
