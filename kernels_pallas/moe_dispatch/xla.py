"""Experts for XLA, the default on CPU: rows sorted by expert into blocks, one batched product over blocks.

Each expert's rows are padded to a multiple of the block, so that a block has one expert and shapes are static:
at most ceil(R / block) + E blocks for R = M·X rows, whatever the routing. That keeps the work near R rows, where a
dense expansion does R·E / X. Blocks are taken in chunks so that the gathered weights stay below `_CHUNK_BYTES`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_CHUNK_BYTES = 64 * 2**20


def expert_ffn(
    x: Float[Array, "M D"],
    weights: Float[Array, "M X"],
    expert_ids: Int[Array, "M X"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "M D"]:
    tokens, per_token = expert_ids.shape
    experts, width, inner = gate.shape
    rows = tokens * per_token
    block = _block_rows(rows, experts)
    blocks = -(-rows // block) + experts

    slots, block_expert = _layout(expert_ids.reshape(-1), experts, block, blocks)
    # A slot's token; slots that pad a block read the zero row behind the last token.
    source = (
        jnp.full((blocks * block,), tokens, jnp.int32).at[slots].set(jnp.arange(rows, dtype=jnp.int32) // per_token)
    )
    padded = jnp.concatenate((x, jnp.zeros((1, width), x.dtype)))
    grouped = padded[source].reshape(blocks, block, width)

    def run(chunk: tuple[Array, Array]) -> Array:
        inputs, expert = chunk
        hidden = jax.nn.silu(jnp.matmul(inputs, gate[expert])) * jnp.matmul(inputs, up[expert])
        return jnp.matmul(hidden, down[expert])

    chunk = max(1, min(blocks, _CHUNK_BYTES // (3 * width * inner * gate.dtype.itemsize)))
    if chunk == blocks:
        out = run((grouped, block_expert))
    else:
        out = jax.lax.map(jax.checkpoint(run), (grouped, block_expert), batch_size=chunk)
    gathered = out.reshape(blocks * block, width)[slots].reshape(tokens, per_token, width)
    combined = jnp.einsum("MXD,MX->MD", gathered, weights, preferred_element_type=jnp.float32)
    return combined.astype(x.dtype)


def _block_rows(rows: int, experts: int) -> int:
    """A power of two near half an expert's fair share: little padding, yet rows enough for a matrix product."""
    share = max(1, rows // (2 * experts))
    return min(128, max(8, 1 << (share.bit_length() - 1)))


def _layout(
    expert_of_row: Int[Array, "R"], experts: int, block: int, blocks: int
) -> tuple[Int[Array, "R"], Int[Array, "blocks"]]:
    """The slot of every row among blocks × block, grouped by expert; and the expert of every block."""
    chosen = jax.nn.one_hot(expert_of_row, experts, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(chosen, axis=0) - chosen) * chosen, axis=1)
    blocks_of_expert = -(-jnp.sum(chosen, axis=0) // block)
    first_block = jnp.cumsum(blocks_of_expert) - blocks_of_expert
    slots = first_block[expert_of_row] * block + rank
    # Blocks behind the last used one multiply zeros by any expert.
    block_expert = jnp.searchsorted(jnp.cumsum(blocks_of_expert), jnp.arange(blocks), side="right")
    return slots, jnp.minimum(block_expert, experts - 1)
