"""Weights kept in eight bits, int8 or float8, and made wide again where a layer multiplies by them.

The projections and the experts, nearly all of a model, are kept so. What stays as it is: the head, whose products are
the teacher's targets themselves, and the embedding, which may be the same matrix; norms and biases, which are vectors;
the router, where rounding would change who answers instead of how well, and which is a thousandth of its layer.

The numbers are qwix's. Of qwix this takes what works on arrays; its providers find the weights of a model by tracing a
call and intercepting its products, which neither a stack made by `vmap` and run by a `scan` over its weights nor a
grouped product survives, they quantise parameters that are whole, and without the logical axes by which
`qwen3.sharding` places them.
"""

from collections.abc import Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qwen3.checkpoint.hf_names import leaves_of
from qwen3.decoder.model import Qwen3

Quantisation = Literal["int8", "fp8"]
_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


class QuantisedWeight(nnx.Module):
    """Stands in the place of the `nnx.Param` that it was made of: `weight[...]` is the array, values times scale.

    Both parts carry logical axes and are stacked over layers as the parameter was, so a scan over layers hands over
    one layer of both, and what is wide is that layer at most.
    """

    def __init__(self, values: nnx.Param, scale: nnx.Param):
        self.values = values
        """One byte for each weight."""
        self.scale = scale
        """float32, of size 1 along the axes that share a scale."""

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        return qwix.dequantize(qwix.QArray(self.values[...], self.scale[...]))[index]


def quantise(weight: nnx.Variable, kind: Quantisation, inputs: Collection[int]) -> QuantisedWeight:
    """Rounds to the nearest of 256 values between the extremes of each output channel.

    `inputs` are the axes, stacked ones counted, that products sum over: along them the scale is one. fp8 is e4m3, with
    three bits of fraction.
    """
    array = weight.get_value()
    channels = [axis for axis in range(array.ndim) if axis not in inputs]
    # In float32: a quotient in bfloat16 would itself be rounded to about 256 values.
    rounded = qwix.quantize(array.astype(jnp.float32), _DTYPES[kind], channelwise_axes=channels)
    axes = weight.get_metadata()["axes"]
    stacked = array.ndim - len(axes)
    scale_axes = tuple(None if stacked + i in inputs else axis for i, axis in enumerate(axes))
    return QuantisedWeight(nnx.Param(rounded.qvalue, axes=axes), nnx.Param(rounded.scale, axes=scale_axes))


def quantised(model: Qwen3, kind: Quantisation) -> Qwen3:
    """The model, which may be abstract, with its projections and experts in eight bits; changed in place.

    `qwen3.checkpoint.hf.load` does the same without ever having the model whole.
    """
    for leaf in leaves_of(model):
        if leaf.summed_axes:
            setattr(leaf.owner, leaf.attribute, quantise(leaf.param, kind, leaf.summed_axes))
    return model


def saved_bytes(model: Any, dtype: DTypeLike) -> int:
    """By how much a model's quantised weights are smaller than they would be in `dtype`; 0 where it has none."""
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, QuantisedWeight))
    weights = [node for node in nodes if isinstance(node, QuantisedWeight)]
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    return sum(weight.values[...].size for weight in weights) * jnp.dtype(dtype).itemsize - kept
