"""Where an operation will run, and which of its implementations that means: one rule for all operations."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import jax

Platform = Literal["cpu", "tpu", "gpu"]

_NAMES: Mapping[str, Platform] = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
_KERNELS = {"tpu": "TPU", "gpu": "an NVIDIA GPU of the Hopper generation"}
_HOPPER = "9.0"
"""The compute capability whose warpgroup products the GPU kernels use; later generations have others."""

logger = logging.getLogger(__name__)


def platform() -> Platform:
    """The platform of the mesh that is set, as when compiling for devices that are not there; else the default one.

    Raises ValueError for a platform that this project has no implementations for.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    if name not in _NAMES:
        raise ValueError(f"platform {name!r} is not supported; use cpu, tpu or an NVIDIA gpu")
    return _NAMES[name]


def choose(
    operation: str, requested: str | None, available: Sequence[str], defaults: Mapping[Platform, str] | None = None
) -> str:
    """The name of the implementation of `operation` to run.

    Args:
        operation: For messages.
        requested: What the caller asked for by name; None for the platform's default.
        available: All implementations that the operation has, "xla" among them. "tpu" and "gpu" are kernels that run
            on that platform alone, the others run everywhere.
        defaults: Platforms on which another implementation than "xla" was measured to be better.

    Raises ValueError for a name that is not available, or a kernel of another platform: what was asked for by name is
    never replaced by something else.
    """
    here = platform()
    if requested is None:
        name = (defaults or {}).get(here, "xla")
        _say_once(operation, name, here)
        return name
    if requested not in available:
        raise ValueError(
            f"implementation {requested!r} of {operation} is unknown; use one of {', '.join(available)}, or None"
        )
    if requested in _KERNELS and requested != here:
        raise ValueError(
            f"implementation {requested!r} of {operation} needs {_KERNELS[requested]}, this platform is {here}; "
            "use 'xla', or None"
        )
    if requested == "gpu" and (capability := _compute_capability(_kind())) not in (None, _HOPPER):
        raise ValueError(
            f"implementation 'gpu' of {operation} needs {_KERNELS['gpu']}, compute capability {_HOPPER}; the one here "
            f"has {capability}; use 'xla', or None"
        )
    return requested


def _kind() -> str | None:
    """The kind of the devices of the mesh that is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.device_kind


@functools.cache
def _compute_capability(kind: str | None) -> str | None:
    """Of the GPUs of this kind here, of any kind without one; None where there are none, as when compiling for some
    that are elsewhere."""
    try:
        here = jax.devices("gpu")[0]
    except RuntimeError:
        return None
    return here.compute_capability if kind in (None, here.device_kind) else None


@functools.cache
def _say_once(operation: str, name: str, here: Platform) -> None:
    logger.info("%s on %s: %s", operation, here, name)
