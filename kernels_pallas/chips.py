"""Public figures of the accelerators that can be compiled for: what bounds a program that runs on them.

Sources: Google's pages on each TPU (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x) and NVIDIA's data sheets of the
H100 and H200 SXM and of the DGX that holds eight of them. Peaks are dense and in bfloat16. What a TPU program may use
of its memory is what libtpu's compiler says when a program is too large: a little less than the chip has.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as jax counts them: a TPU chip (of v4 and tpu7x half a chip), a GPU, or all cores of a CPU."""

    name: str
    flops_per_s: float
    """Peak of its matrix units, a multiply-add counted as two."""
    memory_bytes: int
    """What programs may use of its memory."""
    bytes_per_s: float
    """Between memory and chip."""
    link_bytes_per_s: float
    """One way over one link of a TPU's torus; over all of a GPU's NVLink."""
    network_bytes_per_s: float | None = None
    """One way between hosts, for each device; None where devices of all hosts are on one torus."""
    torus_dimensions: int = 0
    """0: every device reaches every other of its host at the full speed of its links."""
    ring_from: int = 0
    """Chips along a dimension of the torus from which on its ends are linked, too."""
    devices_per_chip: int = 1


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        # A chip has 275 TFLOP/s, 1,200 GB/s and 2,400 Gbit/s over six links, and is two devices to this compiler.
        "v4": Chip(
            name="TPU v4",
            flops_per_s=275 * _TERA / 2,
            memory_bytes=int(15.25 * _GIB),
            bytes_per_s=1200 * _GIGA / 2,
            link_bytes_per_s=50 * _GIGA / 2,
            torus_dimensions=3,
            ring_from=4,
            devices_per_chip=2,
        ),
        # 1,600 Gbit/s over four links; the ends are linked in a whole pod alone.
        "v5e": Chip(
            name="TPU v5e",
            flops_per_s=197 * _TERA,
            memory_bytes=int(15.75 * _GIB),
            bytes_per_s=800 * _GIGA,
            link_bytes_per_s=50 * _GIGA,
            torus_dimensions=2,
            ring_from=16,
        ),
        # 4,800 Gbit/s over six links.
        "v5p": Chip(
            name="TPU v5p",
            flops_per_s=459 * _TERA,
            memory_bytes=int(95.74 * _GIB),
            bytes_per_s=2765 * _GIGA,
            link_bytes_per_s=100 * _GIGA,
            torus_dimensions=3,
            ring_from=4,
        ),
        # 3,200 Gbit/s over four links.
        "v6e": Chip(
            name="TPU v6e",
            flops_per_s=918 * _TERA,
            memory_bytes=int(31.25 * _GIB),
            bytes_per_s=1600 * _GIGA,
            link_bytes_per_s=100 * _GIGA,
            torus_dimensions=2,
            ring_from=16,
        ),
        # A chip has 2,307 TFLOP/s, 7,380 GB/s and 1,200 GB/s both ways over six links, and is two devices.
        "tpu7x": Chip(
            name="TPU7x",
            flops_per_s=2307 * _TERA / 2,
            memory_bytes=int(94.75 * _GIB),
            bytes_per_s=7380 * _GIGA / 2,
            link_bytes_per_s=100 * _GIGA / 2,
            torus_dimensions=3,
            ring_from=4,
            devices_per_chip=2,
        ),
        # 900 GB/s of NVLink both ways, a 400 Gbit/s adapter a card; memory as NVIDIA's driver reports it.
        "h100": Chip(
            name="NVIDIA H100 80GB HBM3",
            flops_per_s=989.4 * _TERA,
            memory_bytes=81_559 * 2**20,
            bytes_per_s=3350 * _GIGA,
            link_bytes_per_s=450 * _GIGA,
            network_bytes_per_s=50 * _GIGA,
        ),
        "h200": Chip(
            name="NVIDIA H200",
            flops_per_s=989.4 * _TERA,
            memory_bytes=143_771 * 2**20,
            bytes_per_s=4800 * _GIGA,
            link_bytes_per_s=450 * _GIGA,
            network_bytes_per_s=50 * _GIGA,
        ),
    }
)

_SPELT: Mapping[str, str] = MappingProxyType({"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"})
"""Kinds of devices that jax does not call by a chip's name."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device whose `device_kind` in jax is this; None where its figures are not known here."""
    named = next((chip for chip in CHIPS.values() if chip.name == device_kind), None)
    return named or CHIPS.get(_SPELT.get(device_kind, ""))
