"""Others' kernels for the same operations, to be timed beside ours on the same card: cuDNN, jax's own, tokamax.

A rival is a function of a case's arguments. It gets its numbers checked as ours do, and may leave out what the case
does not ask of it: every row here is one document. Where a kernel has no heuristics of its own it comes in several
configurations, of which the fastest counts. Its backward pass is its own where it has one.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.benchmarks.kernel_cases import Case

TOKAMAX = "tokamax 0.0.12"
"""The newest release that has kernels: 0.1.0 on the index is empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """One implementation that is not ours."""

    name: str
    configurations: tuple[Callable[..., Any], ...]
    prepare: Callable[..., tuple[Any, ...]] = lambda *arguments: arguments
    """Turns the case's arguments into its own, layouts included, before the clock starts."""
    backward: bool = True
    """Whether it can be differentiated as the cases ask."""

    def programs(self, case: Case) -> list[Callable[..., Any]]:
        return [case.program_of(function) for function in self.configurations]


def rivals(case: Case, platform: str) -> list[Rival]:
    """Of the operation that `case` is of, or its gradient."""
    known = _KNOWN.get(platform, {}).get(case.forward_operation)
    return [rival for rival in known(case) if rival.backward or not case.gradients] if known else []


def missing() -> str | None:
    """What to install for all of them, None where it is there."""
    if importlib.util.find_spec("tokamax") is not None:
        return None
    return f"{TOKAMAX} is not installed and is left out: pip install {TOKAMAX.replace(' ', '==')}"


def _gpu_attention(case: Case) -> list[Rival]:
    return [
        Rival(name="cuDNN", configurations=(functools.partial(_causal, jax.nn.dot_product_attention, "cudnn"),)),
        Rival(
            name="jax Mosaic, float16",  # it knows no other dtype
            configurations=tuple(functools.partial(_jax_gpu_attention, block_kv=size) for size in (64, 128, 256)),
            prepare=_scaled_float16,
            backward=False,  # not where causal
        ),
        *_tokamax_attention(case),
    ]


def _tpu_attention(case: Case) -> list[Rival]:
    splash = functools.partial(_splash, block=1024), functools.partial(_splash, block=512)
    return [Rival(name="jax splash", configurations=splash), *_tokamax_attention(case)]


def _tokamax_attention(case: Case) -> list[Rival]:
    if missing():
        return []
    import tokamax

    return [Rival(name=TOKAMAX, configurations=(functools.partial(_causal, tokamax.dot_product_attention, "mosaic"),))]


def _gpu_products(case: Case) -> list[Rival]:
    tiles = [(m, n, steps, grid) for m in (64, 128) for n in (128, 192) for steps in (2, 4) for grid in (1, 8)]
    return [
        Rival(
            name="jax Mosaic",
            configurations=tuple(_products(case, functools.partial(_jax_gpu_product, tile=tile)) for tile in tiles),
            backward=False,
        ),
        *_tokamax_products(case),
    ]


def _tpu_products(case: Case) -> list[Rival]:
    tiles = (512, 1024, 1024), (256, 1024, 1536), (512, 512, 512)
    return [
        Rival(
            name="jax megablox",
            configurations=tuple(_products(case, functools.partial(_megablox, tile=tile)) for tile in tiles),
        ),
        *_tokamax_products(case),
    ]


def _tokamax_products(case: Case) -> list[Rival]:
    if missing():
        return []
    import tokamax

    product = functools.partial(tokamax.ragged_dot, implementation="mosaic")
    return [Rival(name=TOKAMAX, configurations=(_products(case, product),))]


def _tpu_paged_attention(case: Case) -> list[Rival]:
    """One new token a row; its pages lie heads first."""
    if case.arguments()[0].shape[1] > 1:
        return []

    def prepare(q: Array, k: Array, v: Array, table: Array, lengths: Array) -> tuple[Array, ...]:
        return q[:, 0], k.swapaxes(0, 1), v.swapaxes(0, 1), table, lengths

    sizes = (4, 8, 16)
    configurations = tuple(functools.partial(_jax_tpu_paged_attention, pages_per_block=size) for size in sizes)
    return [Rival(name="jax paged attention", configurations=configurations, prepare=prepare)]


_KNOWN: Mapping[str, Mapping[str, Callable[[Case], list[Rival]]]] = {
    "gpu": {"attention": _gpu_attention, "grouped_matmul": _gpu_products, "grouped_swiglu": _gpu_products},
    "tpu": {
        "attention": _tpu_attention,
        "grouped_matmul": _tpu_products,
        "grouped_swiglu": _tpu_products,
        "paged_attention": _tpu_paged_attention,
    },
}


def _causal(
    function: Callable[..., Array], implementation: Literal["cudnn", "mosaic"], q: Array, k: Array, v: Array, _: Array
) -> Array:
    """Of one segment a row; a mask would cost more than it gains."""
    return function(q, k, v, is_causal=True, implementation=implementation)


def _scaled_float16(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, ...]:
    return *(x.astype(jnp.float16) for x in (q * q.shape[-1] ** -0.5, k, v)), segments


def _jax_gpu_attention(q: Array, k: Array, v: Array, _: Array, *, block_kv: int) -> Array:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    blocks = attention_mgpu.TuningConfig(block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=True)
    return attention_mgpu.attention(q, k, v, blocks)


def _splash(q: Array, k: Array, v: Array, _: Array, *, block: int) -> Array:
    """It wants heads in front: a model has to turn them as is done here."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, size = q.shape[1:]
    if length % block:
        raise ValueError(f"{length} tokens are no multiple of its block of {block}")
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=min(block, 512),
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=min(block, 512),
            block_q_dq=block,
            block_kv_dq=block,
        ),
    )
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * size**-0.5, k, v))
    return jax.vmap(kernel)(q, k, v).transpose(0, 2, 1, 3)


def _products(case: Case, product: Callable[[Array, Array, Array], Array]) -> Callable[..., Array]:
    """The case's operation from grouped products: itself one, or SwiGLU with two."""
    if case.forward_operation == "grouped_matmul":
        return product

    def swiglu(x: Array, gate: Array, up: Array, sizes: Array) -> Array:
        return jax.nn.silu(product(x, gate, sizes)) * product(x, up, sizes)

    return swiglu


def _jax_gpu_product(x: Array, weights: Array, sizes: Array, *, tile: tuple[int, int, int, int]) -> Array:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    block_m, block_n, steps, grid_block_n = tile
    if weights.shape[2] % (block_n * grid_block_n):
        raise ValueError(f"{weights.shape[2]} columns are no multiple of {grid_block_n} blocks of {block_n}")
    return ragged_dot_mgpu.ragged_dot(
        x,
        weights,
        group_sizes=sizes,
        block_m=block_m,
        block_n=block_n,
        block_k=64,
        max_concurrent_steps=steps,
        grid_block_n=grid_block_n,
    )


def _megablox(x: Array, weights: Array, sizes: Array, *, tile: tuple[int, int, int]) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    return gmm(x, weights, sizes, x.dtype, tile)


def _jax_tpu_paged_attention(
    q: Array, k: Array, v: Array, table: Array, lengths: Array, *, pages_per_block: int
) -> Array:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    out = paged_attention(q * q.shape[-1] ** -0.5, k, v, lengths, table, pages_per_compute_block=pages_per_block)
    return out[:, None]
