"""What every weight is called in a Hugging Face checkpoint: the one table that loading and saving both follow.

PyTorch stores a linear layer as [out, in], this project as [in..., out...] with heads as an axis of their own.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx

from qwen3.decoder.adapter import Adapter
from qwen3.decoder.model import Qwen3

# Attribute -> (name, how many leading axes are inputs: PyTorch has them last and flattened; 0 is a vector, None a
# table that both sides store alike).
_Names = dict[str, tuple[str, int | None]]
HEAD_NAME = "lm_head.weight"
EMBEDDING_NAME = "model.embed_tokens.weight"
_MODEL: _Names = {
    "embed": (EMBEDDING_NAME, None),
    "final_norm": ("model.norm.weight", 0),
    "untied_head": (HEAD_NAME, None),
}
_LAYER: _Names = {
    "attention_norm": ("input_layernorm.weight", 0),
    "attention.q": ("self_attn.q_proj.weight", 1),
    "attention.k": ("self_attn.k_proj.weight", 1),
    "attention.v": ("self_attn.v_proj.weight", 1),
    "attention.o": ("self_attn.o_proj.weight", 2),
    "attention.q_bias": ("self_attn.q_proj.bias", 0),
    "attention.k_bias": ("self_attn.k_proj.bias", 0),
    "attention.v_bias": ("self_attn.v_proj.bias", 0),
    "attention.o_bias": ("self_attn.o_proj.bias", 0),
    "attention.q_norm": ("self_attn.q_norm.weight", 0),
    "attention.k_norm": ("self_attn.k_norm.weight", 0),
    "ffn_norm": ("post_attention_layernorm.weight", 0),
}
_DENSE: _Names = {
    "ffn.gate": ("mlp.gate_proj.weight", 1),
    "ffn.up": ("mlp.up_proj.weight", 1),
    "ffn.down": ("mlp.down_proj.weight", 1),
}
_MOE: _Names = {
    "ffn.router": ("mlp.gate.weight", 1),
    "ffn.gate": ("mlp.experts.{expert}.gate_proj.weight", 1),
    "ffn.up": ("mlp.experts.{expert}.up_proj.weight", 1),
    "ffn.down": ("mlp.experts.{expert}.down_proj.weight", 1),
}
# transformers 5 may store all experts in one tensor: its name, and which of how many parts of its rows is the weight.
_FUSED_NAMES = {
    "ffn.gate": ("mlp.experts.gate_up_proj", 0, 2),
    "ffn.up": ("mlp.experts.gate_up_proj", 1, 2),
    "ffn.down": ("mlp.experts.down_proj", 0, 1),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One stored tensor, in PyTorch's shape, and where it belongs: `leaf[lead]`, a weight of layer `layer`."""

    name: str
    shape: tuple[int, ...]
    lead: tuple[int, ...]
    layer: int
    inputs: int | None
    fused: "Fused | None" = None

    def stored(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
        """Name and shape of what files with `shapes` hold for it: itself unless only the fused tensor is there."""
        if self.fused is not None and self.name not in shapes and self.fused.name in shapes:
            return self.fused.name, self.fused.shape
        return self.name, self.shape


class Fused(NamedTuple):
    """The same weight inside a tensor [E, rows, columns] of all experts: its rows there begin at `row`."""

    name: str
    shape: tuple[int, ...]
    row: int


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter of the model and the tensors that make it up."""

    owner: Any
    attribute: str
    tensors: tuple[Tensor, ...]

    @property
    def param(self) -> nnx.Param:
        return getattr(self.owner, self.attribute)

    @property
    def adapter(self) -> Adapter | None:
        """What is added to a projection (see `qwen3.decoder.adapter`), stacked over layers as the parameter is."""
        return getattr(self.owner, "adapters", {}).get(self.attribute)

    @property
    def inputs(self) -> int | None:
        """How many of its axes, those of layers and experts apart, are inputs; 0 for a vector, None for a table."""
        return self.tensors[0].inputs

    @property
    def summed_axes(self) -> range:
        """The axes that a projection's or the experts' products sum over; none for a vector, a table or the router."""
        first = len(self.tensors[0].lead)
        return range(first, first + (0 if self.attribute == "router" else self.inputs or 0))

    @property
    def module_name(self) -> str:
        """The last part of the module's name, such as q_proj."""
        return self.tensors[0].name.split(".")[-2]


def leaves_of(model: Qwen3) -> list[Leaf]:
    """Every parameter of the model, which may be abstract, with the tensors that make it up."""
    config = model.config
    leaves: list[Leaf] = []

    def add(root: Any, path: str, name: str, inputs: int | None, layers: range | None) -> None:
        *parents, attribute = path.split(".")
        owner = functools.reduce(getattr, parents, root)
        param = getattr(owner, attribute, None)
        if param is None:
            return
        shape = param.get_value().shape
        tensors: list[Tensor] = []
        if layers is None:
            layer = -1 if attribute == "embed" else config.num_hidden_layers
            tensors.append(Tensor(name, _torch_shape(shape, inputs), (), layer, inputs))
        for i, layer in enumerate(layers or ()):
            prefix = f"model.layers.{layer}."
            if "{expert}" not in name:
                tensors.append(Tensor(prefix + name, _torch_shape(shape[1:], inputs), (i,), layer, inputs))
                continue
            rows, columns = _torch_shape(shape[2:], inputs)
            fused_name, part, parts = _FUSED_NAMES[path]
            fused = Fused(prefix + fused_name, (shape[1], parts * rows, columns), part * rows)
            tensors += [
                Tensor(prefix + name.format(expert=e), (rows, columns), (i, e), layer, inputs, fused)
                for e in range(shape[1])
            ]
        leaves.append(Leaf(owner, attribute, tuple(tensors)))

    for path, (name, inputs) in _MODEL.items():
        add(model, path, name, inputs, None)
    first = 0
    for stack, (moe, count) in zip(model.stacks, config.layer_runs(), strict=True):
        for path, (name, inputs) in (_LAYER | (_MOE if moe else _DENSE)).items():
            add(stack, path, name, inputs, range(first, first + count))
        first += count
    return leaves


def _torch_shape(shape: tuple[int, ...], inputs: int | None) -> tuple[int, ...]:
    if inputs is None:
        return shape
    outputs = math.prod(shape[inputs:])
    return (outputs, math.prod(shape[:inputs])) if inputs else (outputs,)
