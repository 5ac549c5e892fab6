"""The public door of grouped matrix products: checks arguments, picks an implementation, owns the derivatives.

A backend has two functions. `products` multiplies rows by their group's matrices, several matrices in one pass over
the rows, and gives a function of the float32 results; with the matrices transposed it is the derivative by the rows.
`outer_products` sums over the rows of each group; it is the derivative by the matrices.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import reference
from kernels_pallas.platforms import choose

Implementation = Literal["xla", "reference", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "reference", "tpu", "gpu")


def grouped_matmul(
    x: Float[Array, "M D"],
    weight: Float[Array, "E D F"],
    group_sizes: Int[Array, "E"],
    *,
    alignment: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "M F"]:
    """x[m] · weight[e] for each row m of group e, rows being sorted by group.

    Args:
      x: at least one row.
      group_sizes: rows of each group, 0 for an empty one. They must sum to M. That can be checked only outside of
        `jax.jit`; inside, rows behind the last group come back as zeros, take next to no time, and give no
        gradient.
      alignment: a number that divides M and every group size, which a caller that lays out rows can choose
        (`preferred_alignment`) so that "xla" need not lay them out again. Also checked only outside of `jax.jit`.

    Accumulation is float32, the result has the dtype of `x`. Differentiable in `x` and `weight`. Raises ValueError
    where shapes disagree, group sizes are negative, do not sum to M or are not aligned, the implementation is unknown
    or of another platform, or a kernel asked for by name has no such dtype or size.
    """
    name = _check(x, {"weight": weight}, group_sizes, alignment, implementation)
    if name == "reference":
        return reference.grouped_matmul(x, weight, group_sizes).astype(x.dtype)
    return _matmul(_backend(name), alignment, x, weight, group_sizes)


def grouped_swiglu(
    x: Float[Array, "M D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    group_sizes: Int[Array, "E"],
    *,
    alignment: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "M F"]:
    """silu(x[m] · gate[e]) · (x[m] · up[e]), both products in one pass over the rows (arXiv 2002.05202).

    Arguments, accumulation and errors as in `grouped_matmul`; the activation is float32. Differentiable in `x`, `gate`
    and `up`; the backward pass keeps both products in the dtype of `x`.
    """
    name = _check(x, {"gate": gate, "up": up}, group_sizes, alignment, implementation)
    if name == "reference":
        return reference.grouped_swiglu(x, gate, up, group_sizes).astype(x.dtype)
    return _swiglu(_backend(name), alignment, x, gate, up, group_sizes)


def preferred_alignment(rows: int, groups: int, implementation: Implementation | None = None) -> int:
    """The `alignment` with which an implementation is fastest: padding rows beat laying rows out again, or do not."""
    name = choose("grouped_matmul", implementation, IMPLEMENTATIONS)
    return 1 if name == "reference" else _backend(name).preferred_alignment(rows, groups)


def _check(x: Array, weights: dict[str, Array], sizes: Array, alignment: int, implementation: str | None) -> str:
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, shape in shapes.items():
        if len(shape) != 3 or shape != next(iter(shapes.values())) or x.ndim != 2 or x.shape[1] != shape[1]:
            raise ValueError(f"x {x.shape} and {name} {shape} must be [M,D] and [E,D,F]")
        if sizes.shape != shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
            raise ValueError(f"group_sizes is {sizes.dtype}{list(sizes.shape)}; it must be integers [{shape[0]}]")
    if not x.shape[0]:
        raise ValueError("x has no rows; give at least one")
    if alignment < 1 or x.shape[0] % alignment:
        raise ValueError(f"alignment {alignment} must be at least 1 and divide the {x.shape[0]} rows of x")
    if not isinstance(sizes, jax.core.Tracer):
        known = np.asarray(sizes)
        if known.min() < 0 or known.sum() != x.shape[0]:
            raise ValueError(
                f"group_sizes sum to {known.sum()}, the least being {known.min()}; they must be 0 or more and sum to "
                f"the {x.shape[0]} rows of x"
            )
        if np.any(known % alignment):
            raise ValueError(f"group_sizes {known.tolist()} are not all multiples of alignment {alignment}")
    name = choose("grouped_matmul", implementation, IMPLEMENTATIONS)
    if name not in ("xla", "reference"):
        dtypes = {str(array.dtype) for array in (x, *weights.values())}
        if len(dtypes) > 1 or not dtypes <= {*_backend(name).DTYPES}:
            raise ValueError(
                f"x, {', '.join(weights)} have dtypes {', '.join(sorted(dtypes))}; implementation {name!r} of "
                f"grouped_matmul takes one of {', '.join(_backend(name).DTYPES)} for all; cast them, or use 'xla'"
            )
        multiple = _backend(name).MULTIPLE
        width, inner = next(iter(shapes.values()))[1:]
        if width % multiple or inner % multiple:
            raise ValueError(
                f"D {width} and F {inner}: implementation {name!r} of grouped_matmul takes multiples of {multiple}; "
                "use 'xla'"
            )
    return name


def _backend(name: str) -> ModuleType:
    # Kernels are imported when they are wanted: each brings its platform's compiler front end.
    return importlib.import_module(f"kernels_pallas.grouped_matmul.{name}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(backend: ModuleType, alignment: int, x: Array, weight: Array, sizes: Array) -> Array:
    return _products(backend, alignment, (x,), (weight,), sizes, _identity)[0]


def _matmul_forward(backend: ModuleType, alignment: int, x: Array, weight: Array, sizes: Array) -> Any:
    return _matmul(backend, alignment, x, weight, sizes), (x, weight, sizes)


def _matmul_backward(backend: ModuleType, alignment: int, residuals: Any, cotangent: Array) -> Any:
    x, weight, sizes = residuals
    return *_derivatives(backend, alignment, x, (weight,), (cotangent,), sizes), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu(backend: ModuleType, alignment: int, x: Array, gate: Array, up: Array, sizes: Array) -> Array:
    return _products(backend, alignment, (x,), (gate, up), sizes, _activate)[0]


def _swiglu_forward(backend: ModuleType, alignment: int, x: Array, gate: Array, up: Array, sizes: Array) -> Any:
    out, gated, lifted = _products(backend, alignment, (x,), (gate, up), sizes, _activate_and_keep)
    return out, (x, gate, up, sizes, gated, lifted)


def _swiglu_backward(backend: ModuleType, alignment: int, residuals: Any, cotangent: Array) -> Any:
    x, gate, up, sizes, *kept = residuals
    arriving, gated, lifted = (array.astype(jnp.float32) for array in (cotangent, *kept))
    share = jax.lax.logistic(gated)
    to_gated = arriving * lifted * share * (1 + gated * (1 - share))
    to_lifted = arriving * gated * share
    cotangents = (to_gated.astype(x.dtype), to_lifted.astype(x.dtype))
    return *_derivatives(backend, alignment, x, (gate, up), cotangents, sizes), None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _identity(product: Array) -> tuple[Array, ...]:
    return (product,)


def _add(*products: Array) -> tuple[Array, ...]:
    return (sum(products[1:], products[0]),)


def _activate(gated: Array, lifted: Array) -> tuple[Array, ...]:
    return (gated * jax.lax.logistic(gated) * lifted,)


def _activate_and_keep(gated: Array, lifted: Array) -> tuple[Array, ...]:
    return *_activate(gated, lifted), gated, lifted


def _products(
    backend: ModuleType,
    alignment: int,
    rows: tuple[Array, ...],
    weights: tuple[Array, ...],
    sizes: Array,
    combine: Callable[..., tuple[Array, ...]],
) -> tuple[Array, ...]:
    return backend.products(rows, weights, sizes, combine, transposed=False, alignment=alignment)


def _derivatives(
    backend: ModuleType,
    alignment: int,
    x: Array,
    weights: tuple[Array, ...],
    cotangents: tuple[Array, ...],
    sizes: Array,
) -> tuple[Array, ...]:
    (to_x,) = backend.products(cotangents, weights, sizes, _add, transposed=True, alignment=alignment)
    to_weights = backend.outer_products(x, cotangents, sizes, alignment=alignment)
    return to_x, *(to.astype(weight.dtype) for to, weight in zip(to_weights, weights, strict=True))
