"""What attention costs: the pairs of a query and a key that are multiplied out, those that a mask hides included."""

from kernels_pallas.attention import xla
from kernels_pallas.attention.api import IMPLEMENTATIONS, Implementation
from kernels_pallas.platforms import choose

_DUAL_CHUNK_PARTS = 3


def attended_pairs(
    tokens: int,
    *,
    chunk_tokens: int | None = None,
    whole_rows: bool = True,
    implementation: Implementation | None = None,
) -> int:
    """Of a row that is one document, for each head, in all of the devices that have pieces of the row together.

    Kernels skip what is hidden, but for the rest of a block, which is left out here. In Dual Chunk Attention their
    parts are together what causal order shows; XLA goes through the same quarters of the keys for each part.

    Args:
      chunk_tokens: of Dual Chunk Attention, as in `DualChunkQueries`; None without it.
      whole_rows: False where devices share a row, as with `context_axis` of `attention_on_mesh`.

    Raises ValueError for an implementation that is unknown or of another platform.
    """
    name = choose("attention", implementation, IMPLEMENTATIONS)
    if name in ("tpu", "gpu"):
        return tokens * (tokens + 1) // 2
    parts = 1 if chunk_tokens is None or tokens <= chunk_tokens else _DUAL_CHUNK_PARTS
    return parts * (xla.pairs(tokens, aligned=whole_rows) if name == "xla" else tokens * tokens)


def backward_products(implementation: Implementation | None = None) -> int:
    """For every such pair in a backward pass, where a forward pass has two: the scores again, and the gradients of
    weights, values, queries and keys. Kernels form queries' gradients apart from those of keys and values, and so the
    scores and the weights' gradients twice.

    Raises ValueError as `attended_pairs` does.
    """
    return 7 if choose("attention", implementation, IMPLEMENTATIONS) in ("tpu", "gpu") else 5
