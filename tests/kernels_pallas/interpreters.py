"""Runs the kernels of a platform on CPU.

The TPU interpreter runs the grid, the transfers and the arithmetic. It knows neither the tiling of registers nor the
size of fast memory.

The GPU interpreter of jax 0.10 runs warpgroups as threads: the grid, the copies into shared memory, the barriers and
the loops. It has no products with an operand in registers, no `run_state`, no `plgpu.load` and no register layouts, so
the functions of `kernels_pallas/warpgroup.py` that use them are replaced here: what is checked of them is where they
stand, not what they compile to, nor that products and stores have ended when their barriers say so.

Both can look for races. What Mosaic accepts and whether it fits the chip is seen by compiling.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter  # races have no public door
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as gpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import params as gpu_params
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import platforms, warpgroup


@contextlib.contextmanager
def interpret(platform: str) -> Iterator[None]:
    """A context in which the kernels of "tpu" or "gpu" run here; at its end no race must have been seen."""
    with mock.patch.object(platforms, "platform", return_value=platform):
        yield from {"tpu": _interpret_tpu, "gpu": _interpret_gpu}[platform]()


def _interpret_tpu():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert not tpu_interpreter.races.races_found


def _interpret_gpu():
    def product(a, b):
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    def tile(ref):
        # A product reads shared memory as a copy would, not as a warpgroup does: what is copied there next need not be
        # fenced against it.
        values = ref[...]
        plgpu.commit_smem()
        return values

    def product_of_tiles(acc, a, b, *, transpose_a=False, transpose_b=False):
        a, b = tile(a), tile(b)
        return acc + product(a.T if transpose_a else a, b.T if transpose_b else b)

    plain = {
        "product_transposed": lambda a, b: product(tile(a), tile(b).T),
        "add_product": lambda acc, a, b: acc + product(a, tile(b)),
        "add_product_of_tiles": product_of_tiles,
        "full": lambda value, shape: jnp.full(shape, value, jnp.float32),
        "load": lambda source, index, axis: source[index],
        "load_matrix": lambda source, index: source[index],
        "index_along": functools.partial(jax.lax.broadcasted_iota, jnp.int32),
    }
    try:
        with (
            mock.patch.multiple(warpgroup, **plain),
            mock.patch.object(thread_map, "_run_jaxpr", _ProgramsOnce()),
            gpu_params.force_gpu_interpret_mode(gpu_params.InterpretGPUParams(detect_races=True)),
        ):
            yield
        assert not gpu_interpreter.get_races().races_found
    finally:
        gpu_interpreter.reset_gpu_interpret_mode_state()


class _ProgramsOnce:
    """Runs the GPU interpreter's threads with one compilation a kernel; it would compile for every thread and block."""

    def __init__(self):
        self._lock, self._programs = threading.Lock(), {}

    def __call__(self, jaxpr, consts, *args):
        with self._lock:
            if id(jaxpr) not in self._programs:

                def run(consts, *args):
                    jax.core.eval_jaxpr(jaxpr, consts, *args)

                # The jaxpr is kept too, or another one might get its id.
                self._programs[id(jaxpr)] = jaxpr, jax.jit(run).lower(consts, *args).compile()
        self._programs[id(jaxpr)][1](consts, *args)
