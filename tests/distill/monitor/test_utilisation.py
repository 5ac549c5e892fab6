"""Memory and utilisation: measured where devices tell, absent where they do not, never 0."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from distill.monitor.utilisation import memory_gib, model_flops_utilisation
from kernels_pallas.chips import CHIPS, chip_of


def _device(kind: str, stats: Mapping[str, int] | None = None, **fields: int) -> Any:
    return SimpleNamespace(device_kind=kind, memory_stats=lambda: stats, **fields)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
        ("TPU7x", "tpu7x"),
        ("cpu", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_a_chip_is_known_by_what_jax_calls_it(kind: str, chip: str | None) -> None:
    assert chip_of(kind) == (CHIPS[chip] if chip else None)


def test_utilisation_is_of_all_devices_peaks() -> None:
    peak = CHIPS["h100"].flops_per_s
    cards = [_device("NVIDIA H100 80GB HBM3")] * 4
    assert model_flops_utilisation(4 * 0.4 * peak * 2.0, 2.0, cards) == pytest.approx({"mfu": 0.4})


def test_a_device_that_is_both_halves_of_a_chip_has_the_peak_of_both() -> None:
    half = CHIPS["v4"].flops_per_s
    assert model_flops_utilisation(half, 1.0, [_device("TPU v4", num_cores=2)]) == pytest.approx({"mfu": 0.5})
    # A chip of v5p is one device, whatever it is made of.
    whole = CHIPS["v5p"].flops_per_s
    assert model_flops_utilisation(whole, 1.0, [_device("TPU v5", num_cores=2)]) == pytest.approx({"mfu": 1.0})


def test_where_a_peak_is_not_known_there_is_no_utilisation() -> None:
    assert model_flops_utilisation(1e12, 1.0, jax.devices()) == {}
    assert model_flops_utilisation(1e12, 1.0, [_device("NVIDIA H200"), _device("NVIDIA A100")]) == {}


def test_the_peak_is_that_of_the_fullest_device() -> None:
    devices = [_device("TPU v5e", {"bytes_in_use": 1, "peak_bytes_in_use": peak}) for peak in (2**30, 3 * 2**30)]
    assert memory_gib(devices) == {"memory_gib/device_peak": 3.0}


def test_where_devices_count_no_memory_it_is_that_of_the_process(tmp_path: Path) -> None:
    measured = memory_gib(jax.devices())
    assert measured.keys() == {"memory_gib/process"}
    assert 0.05 < measured["memory_gib/process"] < 100
    assert memory_gib(jax.devices(), tmp_path / "nothing") == {}


def test_a_device_that_counts_but_tells_no_peak_is_not_mistaken_for_the_process() -> None:
    assert memory_gib([_device("TPU v5e", {"bytes_in_use": 1})]) == {}
