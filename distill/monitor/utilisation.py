"""How well a run uses its machine: memory, and the share of the chips' peak that training reaches.

What a device does not tell, or what is not known of it, is absent.
"""

import resource
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from kernels_pallas.chips import chip_of


def memory_gib(devices: Iterable[jax.Device], statm: Path = Path("/proc/self/statm")) -> dict[str, float]:
    """`memory_gib/device_peak`, the most that any of these devices of this process has held so far.

    Where devices count no memory, as CPUs do, `memory_gib/process`: what this process has in memory now (Linux).
    """
    counted = [stats for device in devices if (stats := device.memory_stats())]
    if peaks := [stats["peak_bytes_in_use"] for stats in counted if "peak_bytes_in_use" in stats]:
        return {"memory_gib/device_peak": max(peaks) / 2**30}
    if counted or not statm.exists():
        return {}
    resident_pages = int(statm.read_text().split()[1])
    return {"memory_gib/process": resident_pages * resource.getpagesize() / 2**30}


def model_flops_utilisation(flops: float, seconds: float, devices: Sequence[jax.Device]) -> dict[str, float]:
    """`mfu`: FLOPs that a model needs over what the devices' matrix units could do in bfloat16 in these seconds.

    Recomputation is not counted (PaLM, arXiv 2204.02311, appendix B). Absent where a chip's peak is not known.
    """
    chips = [chip_of(device.device_kind) for device in devices]
    # Two halves of a chip may be one device, which then has two cores.
    peaks = [
        chip.flops_per_s * (getattr(device, "num_cores", 1) if chip.devices_per_chip > 1 else 1)
        for chip, device in zip(chips, devices, strict=True)
        if chip is not None
    ]
    return {"mfu": flops / seconds / sum(peaks)} if len(peaks) == len(devices) and seconds > 0 else {}
