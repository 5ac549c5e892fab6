"""Accelerators that are not here: XLA's compilers come as Python packages and need no hardware to compile for it.

A compiler proves that a kernel is accepted and fits: registers, fast memory, and on TPU the device's memory too. It
runs nothing: not whether the numbers are right, nor how fast they come.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from kernels_pallas.chips import CHIPS

_GPUS = ("h100", "h200")
# What libtpu reads when it is loaded: no lock against a second process, nothing asked of a cloud's metadata server, and
# no complaint about a TPU host that this is not (the type named is not what it compiles for).
_LIBTPU: Mapping[str, str] = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
KINDS = tuple(CHIPS)
MOST_CHIPS = 2**16
"""Several times the largest system of these chips."""
SHAPES: Mapping[str, tuple[str, ...]] = {
    "v4": ("1x1x1", "2x2x1", "4x4x4"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "8x8", "16x16"),
    "v5p": ("1x1x1", "2x2x1", "2x2x2", "4x4x4", "8x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "8x8", "16x16"),
    "tpu7x": ("1x1x1", "2x2x1", "2x2x2", "2x4x4"),
    "h100": ("1x1", "1x2", "1x4", "1x8", "2x8", "4x8", "8x8", "16x8", "32x8"),
    "h200": ("1x1", "1x2", "1x4", "1x8", "2x8", "4x8", "8x8", "16x8", "32x8"),
}
"""Shapes that the compilers take, smallest first; a TPU's are not all that can be rented."""

# XLA's GpuTargetConfigProto for a Hopper card; the limits are those of compute capability 9.0 (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability"), the counts those of the SXM card.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{name}"
"""


def devices(target: str) -> list[Any]:
    """The devices of a target, to compile for and not to run on.

    Args:
      target: A kind of `KINDS`, for one device of it; or with its topology: a TPU's torus of chips (`v6e:8x8`,
        `v5p:4x4x4`; a chip of tpu7x is two devices), or a GPU's hosts × cards (`h100:8x8`).

    For a process that runs nothing on accelerators: sets its jax_platforms to cpu, or a plugin would look for its card
    first, and variables of its environment that libtpu reads when it is loaded.

    Raises ValueError for a target that there is not, ModuleNotFoundError where its compiler is not installed.
    """
    kind, shape = parsed(target)
    jax.config.update("jax_platforms", "cpu")
    if kind in _GPUS:
        _require(kind, "jax_cuda13_plugin", "jax_cuda12_plugin")
        card = CHIPS[kind]
        config = _HOPPER.format(name=card.name, memory=card.memory_bytes, bandwidth=int(card.bytes_per_s))
        return _topology(kind, platform="cuda", topology=f"1x{'x'.join(map(str, shape))}", target_config=config)
    _require(kind, "libtpu")
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    name = f"{kind}:{'x'.join(map(str, shape))}"
    if math.prod(shape) == 1:
        chip = _topology(name, platform="tpu", chips_per_host_bounds=(1, 1, 1))
        return chip if ":" in target else chip[:1]
    return _topology(name, platform="tpu")


def parsed(target: str) -> tuple[str, tuple[int, ...]]:
    """Kind and shape of a target; that of a single chip where it gives none. Raises ValueError as `devices`."""
    kind, colon, shape = target.partition(":")
    dimensions = 2 if kind not in CHIPS or kind in _GPUS else CHIPS[kind].torus_dimensions
    # ASCII digits, and few enough of them to be multiplied.
    size = "[1-9][0-9]{0,5}"
    if kind not in CHIPS or (colon and not re.fullmatch(f"{size}(x{size}){{{dimensions - 1}}}", shape)):
        raise ValueError(
            f"target {target!r} is unknown; use one of {', '.join(KINDS)}, or one with its topology such as v5e:4x4, "
            "v5p:4x4x4 or h100:8x8"
        )
    sizes = tuple(map(int, shape.split("x"))) if colon else (1,) * dimensions
    if math.prod(sizes) > MOST_CHIPS:
        raise ValueError(f"target {target!r} has {math.prod(sizes)} chips; at most {MOST_CHIPS} can be planned for")
    return kind, sizes


def _require(kind: str, *packages: str) -> None:
    if not any(importlib.util.find_spec(package) for package in packages):
        raise ModuleNotFoundError(
            f"compiling for {kind} needs the package {packages[0]}, which is not installed; "
            "pip install 'distill-jax[compile]' (Linux on x86-64)"
        )


def _topology(name: str, **options: Any) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"target {name!r} is refused by its compiler: {error}") from None


def compile_for(mesh: jax.sharding.Mesh, function: Any, /, *arguments: Any, **options: Any) -> jax.stages.Compiled:
    """Compile what `jax.jit` made of a function, for a mesh of `devices`, abstract arguments and static options.

    Raises what the compiler raises; of a TPU that includes too little memory, of a GPU see `shortage`.
    """
    platform = mesh.devices.flat[0].platform
    platforms = ("cuda" if platform == "gpu" else platform,)
    # The mesh stays set while kernels are lowered: they ask which TPU they are for.
    with jax.set_mesh(mesh):
        return function.trace(*arguments, **options).lower(lowering_platforms=platforms).compile()


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program takes of each device's memory: arguments, results that are no arguments, and temporaries."""
    memory = compiled.memory_analysis()
    assert memory is not None
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return needed - memory.alias_size_in_bytes


def shortage(compiled: jax.stages.Compiled, target: str) -> str | None:
    """What a GPU program needs more than the card has, which its compiler does not say; None where it fits."""
    kind = target.partition(":")[0]
    if kind not in _GPUS:
        return None
    needed, card = needed_bytes(compiled), CHIPS[kind]
    if needed <= card.memory_bytes:
        return None
    return f"needs {needed / 2**30:.1f} GiB, {card.name} has {card.memory_bytes / 2**30:.1f} GiB"
