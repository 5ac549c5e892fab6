"""The mixture-of-experts feed-forward: a float32 router in front of `kernels_pallas.moe_dispatch`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from kernels_pallas import moe_dispatch
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.kernels import Kernels
from qwen3.decoder.layers import weight
from qwen3.sharding import BATCH


class RouterStats(NamedTuple):
    """What load balancing needs of each layer, summed over the tokens that are not padding."""

    tokens_per_expert: Float[Array, "L E"]
    probability: Float[Array, "L E"]


class Moe(nnx.Module):
    """Top-k routed SwiGLU experts; every token reaches all its experts."""

    def __init__(self, config: ModelConfig, key: Array, dtype: DTypeLike):
        experts, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        scale = config.initializer_range
        keys = jax.random.split(key, 4)
        self.experts_per_token = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.router = weight(keys[0], (width, experts), ("embed", "router"), scale, dtype)
        self.gate = weight(keys[1], (experts, width, inner), ("experts", "expert_embed", "expert_mlp"), scale, dtype)
        self.up = weight(keys[2], (experts, width, inner), ("experts", "expert_embed", "expert_mlp"), scale, dtype)
        self.down = weight(keys[3], (experts, inner, width), ("experts", "expert_mlp", "expert_embed"), scale, dtype)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], mesh: Mesh | None, kernels: Kernels
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """On `mesh` every device sorts its own tokens, and they are exchanged over the expert axis. Experts that the
        context axis divides are gathered over it; of one-token steps, the few tokens go there instead (all_gather)."""
        flat = x.reshape(-1, x.shape[-1])
        logits = flat.astype(jnp.float32) @ self.router[...].astype(jnp.float32)
        weights, expert_ids, probabilities = moe_dispatch.route(
            logits, self.experts_per_token, normalise=self.normalise
        )
        few = x.shape[1] == 1 and kernels.exchange == "all_gather"
        operands = flat, weights, expert_ids, *(w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        if mesh is None or mesh.size == 1:
            out = moe_dispatch.expert_ffn(*operands, implementation=kernels.grouped_matmul)
        else:
            out = moe_dispatch.expert_ffn_on_mesh(
                *operands,
                mesh=mesh,
                token_axes=BATCH[0],
                expert_axis=("expert", "context") if few else "expert",
                inner_axis="tensor",
                exchange=kernels.exchange,
                implementation=kernels.grouped_matmul,
            )
        mask = real.reshape(-1, 1).astype(jnp.float32)
        chosen = jnp.sum(jax.nn.one_hot(expert_ids, logits.shape[-1], dtype=jnp.float32), axis=1)
        return out.reshape(x.shape), RouterStats(jnp.sum(chosen * mask, axis=0), jnp.sum(probabilities * mask, axis=0))


def balances_load(config: ModelConfig) -> bool:
    """Whether training adds a loss that spreads tokens over the experts evenly."""
    return any(moe for moe, _ in config.layer_runs()) and config.router_aux_loss_coef > 0


def load_balancing_loss(part: RouterStats, whole: RouterStats) -> Float[Array, ""]:
    """E · Σ_i f_i p_i, averaged over layers: 1 when balanced (arXiv 2501.11873; 2505.09388 over a global batch).

    f_i is the share of routed token slots that went to expert i, p_i the mean router probability of expert i, both over
    the tokens in `whole`. Of these, `part` has some: its share of p_i, through which alone a gradient goes. The losses
    of parts add up to that of the whole.
    """
    counts, probability = jax.lax.stop_gradient((whole.tokens_per_expert, whole.probability))
    share = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)
    mean = part.probability / jnp.maximum(jnp.sum(probability, axis=-1, keepdims=True), 1e-9)
    return counts.shape[-1] * jnp.mean(jnp.sum(share * mean, axis=-1))
