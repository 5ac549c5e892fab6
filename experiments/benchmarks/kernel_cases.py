"""What the kernels are compiled for and timed at: each operation at the shapes of four Qwen3 models.

An operation is one function here, from a model to its cases, and one line in `OPERATIONS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.attention import DualChunkQueries, attention, attention_part, dual_chunk_attention
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels_pallas.linear_kl import Divergence, Implementation, linear_kl_at_ids, linear_kl_full
from kernels_pallas.moe_dispatch import expert_ffn, route
from kernels_pallas.paged_attention import paged_attention

VOCABULARY = 151_936


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of one model's layer (arXiv 2505.09388, tables 1 and 2); head size 128 in all of them."""

    name: str
    width: int
    heads: int
    kv_heads: int
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    head_size: int = 128


MODELS = (
    Model(name="0.6B", width=1024, heads=16, kv_heads=8),
    Model(name="8B", width=4096, heads=32, kv_heads=8),
    Model(name="30B-A3B", width=2048, heads=32, kv_heads=4, experts=128, experts_per_token=8, expert_width=768),
    Model(name="235B-A22B", width=4096, heads=64, kv_heads=4, experts=128, experts_per_token=8, expert_width=1536),
)
LARGEST = MODELS[-1].name
_GRADIENT = " gradient"
WIDEST_STUDENT = Model(name="14B", width=5120, heads=40, kv_heads=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program on one device."""

    operation: str
    shape: str
    """For people; with the operation it names the case."""
    function: Callable[..., Any]
    """The forward pass: takes the arguments, and `implementation` by name."""
    sample: Callable[[Array], tuple[Any, ...]]
    """Arguments from a random key."""
    kernels: tuple[str, ...] = ("tpu", "gpu")
    """Platforms on which the operation has a kernel; it is XLA's on others."""
    gradients: int = 0
    """How many of the first arguments the program gives gradients of; 0 where it is the forward pass alone."""
    subset: bool = False
    """Whether it is one of the few that `make test-compile` compiles."""
    flops: float = 0
    """Of the matrix products that the result needs, recomputation not counted."""
    bytes: float = 0
    """That must at least be read and written."""

    @property
    def name(self) -> str:
        return f"{self.operation} {self.shape}"

    @property
    def forward_operation(self) -> str:
        return self.operation.removesuffix(_GRADIENT)

    def gradient(self, count: int, flops: float | None = None) -> "Case":
        """This forward pass and its gradients by the first `count` arguments; three times the products, if no other
        number is given."""
        return dataclasses.replace(
            self,
            operation=self.operation + _GRADIENT,
            gradients=count,
            flops=3 * self.flops if flops is None else flops,
        )

    def program(self, implementation: str) -> Callable[..., Any]:
        """Of the arguments alone."""
        return self.program_of(functools.partial(self.function, implementation=implementation))

    def program_of(self, forward: Callable[..., Array]) -> Callable[..., Any]:
        """What this case asks of any forward pass: itself, or its gradients."""
        return _gradients(forward, self.gradients) if self.gradients else forward

    def arguments(self) -> tuple[Any, ...]:
        """Shapes and dtypes alone."""
        return jax.eval_shape(self.sample, jax.random.key(0))


def cases() -> Iterator[Case]:
    for operation in OPERATIONS.values():
        for model in MODELS:
            yield from operation(model)


def _attention(model: Model) -> Iterator[Case]:
    """The teacher scores and students train on rows of 4,096 and of 32,768 tokens; one length fits no block."""
    lengths = [4096, 32_768, *([1000] if model.name == "0.6B" else [])]
    for length in lengths:
        q, kv = (1, length, model.heads, model.head_size), (1, length, model.kv_heads, model.head_size)

        def sample(key: Array, q: tuple[int, ...] = q, kv: tuple[int, ...] = kv) -> tuple[Array, ...]:
            return *_normal(key, q, kv, kv), jnp.ones(q[:2], jnp.int32)

        size = f"{model.name}, {length:,} tokens, {model.heads}/{model.kv_heads} heads"
        # Two products, over half of all pairs.
        flops = 2 * length**2 * model.heads * model.head_size
        subset = model.name == LARGEST and length == 4096
        case = Case(operation="attention", shape=size, function=attention, sample=sample, flops=flops, subset=subset)
        yield case
        yield case.gradient(3, flops=3.5 * flops)  # seven products


def _attention_part(model: Model) -> Iterator[Case]:
    """Alone, and as Dual Chunk Attention calls it."""
    length, chunk = 4096, 1024

    def part(q: Array, k: Array, v: Array, segments: Array, first: Array, end: Array, *, implementation: Any) -> Array:
        out, log_sum_exp = attention_part(q, k, v, segments, (first, end), implementation=implementation)
        return out + log_sum_exp.swapaxes(1, 2)[..., None].astype(out.dtype)

    def sample(key: Array) -> tuple[Array, ...]:
        q, kv = (1, length, model.heads, model.head_size), (1, length, model.kv_heads, model.head_size)
        index = jnp.arange(length)[None]
        return *_normal(key, q, kv, kv), jnp.ones((1, length), jnp.int32), index // chunk * chunk, index + 1

    def chunked(
        q: Array, previous: Array, older: Array, k: Array, v: Array, *where: Array, implementation: Any
    ) -> Array:
        segments, within = where
        queries = DualChunkQueries(same=q, previous=previous, older=older, within=within, chunk_tokens=chunk)
        return dual_chunk_attention(queries, k, v, segments, implementation=implementation)

    def sample_chunked(key: Array) -> tuple[Array, ...]:
        q, kv = (1, length, model.heads, model.head_size), (1, length, model.kv_heads, model.head_size)
        return *_normal(key, q, q, q, kv, kv), jnp.ones((1, length), jnp.int32), jnp.arange(length)[None] % chunk

    size = f"{model.name}, {length:,} tokens, {model.heads}/{model.kv_heads} heads, chunks of {chunk:,}"
    for operation, function, arguments, count in (
        ("attention_part", part, sample, 3),
        ("dual_chunk_attention", chunked, sample_chunked, 5),
    ):
        case = Case(operation=operation, shape=size, function=function, sample=arguments)
        yield case
        yield case.gradient(count)


def _paged_attention(model: Model) -> Iterator[Case]:
    """Rows that have reached 4,096 tokens, one new token each, or four when drafts are verified; a table of many rows
    that may become long is larger than a TPU's scalar memory."""
    for batch, longest, page in ((64, 8192, 64), (256, 32_768, 32)):
        for new in (1, 4):
            yield _paged_attention_of(model, batch, longest, page, new)


def _paged_attention_of(model: Model, batch: int, longest: int, page: int, new: int) -> Case:
    reached = 4096
    pages = batch * reached // page

    def sample(key: Array) -> tuple[Array, ...]:
        kv = (pages, model.kv_heads, page, model.head_size)
        q, k, v = _normal(key, (batch, new, model.heads, model.head_size), kv, kv)
        own = jax.random.permutation(key, pages).reshape(batch, -1)
        table = jnp.pad(own, ((0, 0), (0, (longest - reached) // page)))
        return q, k, v, table, jnp.full((batch,), reached)

    return Case(
        operation="paged_attention",
        shape=f"{model.name}, {batch} rows of {longest:,}, {new} new, {model.heads}/{model.kv_heads} heads",
        function=paged_attention,
        sample=sample,
        bytes=2 * 2 * batch * reached * model.kv_heads * model.head_size,
        subset=model.name == LARGEST,
    )


def _grouped_matmul(model: Model) -> Iterator[Case]:
    """The products of one layer's experts on 4,096 tokens, spread evenly: gate and up in one pass, then down."""
    if not model.experts:
        return
    rows = 4096 * model.experts_per_token
    even = (rows // model.experts,) * model.experts
    wide = (model.experts, model.width, model.expert_width)

    def sample_swiglu(key: Array) -> tuple[Array, ...]:
        x, gate, up = _normal(key, (rows, model.width), wide, wide)
        return x, gate * 0.02, up * 0.02, jnp.array(even)

    def sample_down(key: Array) -> tuple[Array, ...]:
        x, down = _normal(key, (rows, model.expert_width), (wide[0], wide[2], wide[1]))
        return x, down * 0.02, jnp.array(even)

    size = f"{model.name}, {rows:,} rows, {model.experts} × {model.width:,} × {model.expert_width:,}"
    product = 2 * rows * model.width * model.expert_width
    for operation, function, sample, count, flops in (
        ("grouped_swiglu", grouped_swiglu, sample_swiglu, 3, 2 * product),
        ("grouped_matmul", grouped_matmul, sample_down, 2, product),
    ):
        subset = model.name == LARGEST
        case = Case(
            operation=operation,
            shape=size,
            function=function,
            sample=sample,
            flops=flops,
            subset=subset,
        )
        yield case
        yield case.gradient(count)


def _experts(model: Model) -> Iterator[Case]:
    """One layer's experts on 4,096 tokens, routing included."""
    if not model.experts:
        return
    tokens = 4096

    def layer(x: Array, logits: Array, gate: Array, up: Array, down: Array, *, implementation: Any) -> Array:
        weights, ids, _ = route(logits, model.experts_per_token, normalise=True)
        return expert_ffn(x, weights, ids, gate, up, down, implementation=implementation)

    def sample(key: Array) -> tuple[Array, ...]:
        wide = (model.experts, model.width, model.expert_width)
        shapes = ((tokens, model.width), (tokens, model.experts), wide, wide, (wide[0], wide[2], wide[1]))
        x, logits, *weights = _normal(key, *shapes)
        return x, logits.astype(jnp.float32), *(weight * 0.02 for weight in weights)

    size = f"{model.name}, {tokens:,} tokens, {model.experts_per_token} of {model.experts} × {model.expert_width:,}"
    flops = 6 * tokens * model.experts_per_token * model.width * model.expert_width
    case = Case(operation="moe_dispatch", shape=size, function=layer, sample=sample, kernels=(), flops=flops)
    yield case
    yield case.gradient(5)


def _linear_kl(model: Model) -> Iterator[Case]:
    """Over the whole vocabulary, and over the part of one device where four of a mesh share them. The largest is as
    wide as 8B."""
    if model.name == LARGEST:
        yield from _linear_kl_over(WIDEST_STUDENT, VOCABULARY)
        return
    yield from _linear_kl_over(model, VOCABULARY)
    yield from _linear_kl_over(model, VOCABULARY // 4)


def _linear_kl_over(model: Model, vocabulary: int) -> Iterator[Case]:
    """8,192 tokens of a student against the hidden states of 235B-A22B, or against its 64 likeliest tokens."""
    tokens, top_k, teacher_width, forward = 8192, 64, MODELS[-1].width, Divergence("forward_kl")

    def full(hidden: Array, head: Array, *constants: Array, implementation: Implementation) -> Array:
        return linear_kl_full(hidden, head, *constants, divergence=forward, implementation=implementation)[0]

    def at_ids(hidden: Array, head: Array, *constants: Array, implementation: Implementation) -> Array:
        return linear_kl_at_ids(hidden, head, *constants, divergence=forward, implementation=implementation)[0]

    def sample_full(key: Array) -> tuple[Array, ...]:
        shapes = [(tokens, model.width), (vocabulary, model.width)]
        shapes += [(tokens, teacher_width), (vocabulary, teacher_width)]
        hidden, head, teacher_hidden, teacher_head = _normal(key, *shapes)
        weights = jnp.full((1, tokens), 1 / tokens, jnp.float32)
        return hidden[None], head * 0.02, teacher_hidden[None], teacher_head * 0.02, weights

    def sample_at_ids(key: Array) -> tuple[Array, ...]:
        hidden, head = _normal(key, (tokens, model.width), (vocabulary, model.width))
        ids = jnp.broadcast_to(jnp.arange(top_k) * (vocabulary // 76), (1, tokens, top_k))
        logprobs = jnp.full((1, tokens, top_k), jnp.log(0.9 / top_k))
        weights = jnp.full((1, tokens), 1 / tokens, jnp.float32)
        return hidden[None], head * 0.02, ids, logprobs, jnp.full((1, tokens), jnp.log(0.1)), weights

    product = 2 * tokens * vocabulary
    own, teachers = product * model.width, product * teacher_width
    for operation, function, sample, extra in (
        ("linear_kl hidden states", full, sample_full, teachers),
        ("linear_kl top 64", at_ids, sample_at_ids, 0),
    ):
        shape = f"{model.name}, {tokens:,} × {vocabulary:,}"
        subset = model.name == "8B" and function is at_ids and vocabulary == VOCABULARY
        case = Case(
            operation=operation, shape=shape, function=function, sample=sample, flops=own + extra, subset=subset
        )
        yield case
        yield case.gradient(2, flops=3 * own + extra)


OPERATIONS: Mapping[str, Callable[[Model], Iterator[Case]]] = MappingProxyType(
    {
        "attention": _attention,
        "attention_part": _attention_part,
        "paged_attention": _paged_attention,
        "grouped_matmul": _grouped_matmul,
        "moe_dispatch": _experts,
        "linear_kl": _linear_kl,
    }
)


def _gradients(function: Callable[..., Array], count: int) -> Callable[..., Any]:
    """Those of Σ function·cos(0, 1, 2, …) by its first `count` arguments."""

    def loss(*arguments: Array) -> Array:
        out = function(*arguments)
        arriving = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * arriving)

    return jax.grad(loss, argnums=tuple(range(count)))


def _normal(key: Array, *shapes: tuple[int, ...]) -> list[Array]:
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)]
