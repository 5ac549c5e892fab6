"""What attention costs: the pairs of a query and a key that are multiplied out, those that a mask hides included."""

import numpy as np

from kernels_pallas.attention import xla
from kernels_pallas.attention.api import IMPLEMENTATIONS, Implementation
from kernels_pallas.attention.dual_chunk import span_ends
from kernels_pallas.attention.zigzag import zigzag_index
from kernels_pallas.platforms import choose


def attended_pairs(
    tokens: int,
    *,
    rows: int,
    heads: int,
    chunk_tokens: int | None = None,
    devices: int = 1,
    implementation: Implementation | None = None,
) -> int:
    """Of a row that is one document, for each head, in all of the devices that have pieces of the row together.

    Kernels skip what is hidden, but for the rest of a block, which is left out here. In Dual Chunk Attention their
    parts are together what causal order shows; of XLA it is all that its blocks multiply, each part's for themselves.

    Args:
      rows, heads: that one device attends to together, heads of queries: XLA has smaller blocks where they are many.
      chunk_tokens: of Dual Chunk Attention, as in `DualChunkQueries`; None without it.
      devices: that share a row, as with `context_axis` of `attention_on_mesh`. Their number divides `tokens`.

    Raises ValueError for an implementation that is unknown or of another platform.
    """
    name = choose("attention", implementation, IMPLEMENTATIONS)
    if name in ("tpu", "gpu"):
        return tokens * (tokens + 1) // 2
    pairs = 0
    for device in range(devices):
        index = np.asarray(zigzag_index(tokens // devices, device, devices))
        parts: tuple[np.ndarray, ...] = (index + 1,)
        if chunk_tokens is not None and chunk_tokens < tokens:
            parts = span_ends(index, index % chunk_tokens, chunk_tokens)
        for ends in parts:
            if name == "xla":
                pairs += xla.pairs(ends, tokens, rows=rows, heads=heads, aligned=devices == 1)
            else:
                pairs += len(ends) * tokens
    return pairs


def backward_products(implementation: Implementation | None = None) -> int:
    """For every such pair in a backward pass, where a forward pass has two: the scores again, and the gradients of
    weights, values, queries and keys. Kernels form queries' gradients apart from those of keys and values, and so the
    scores and the weights' gradients twice.

    Raises ValueError as `attended_pairs` does.
    """
    return 7 if choose("attention", implementation, IMPLEMENTATIONS) in ("tpu", "gpu") else 5
