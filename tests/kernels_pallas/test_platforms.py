"""Which implementation is picked, and what is refused."""

import logging
import types

import jax
import pytest

from kernels_pallas import platforms
from kernels_pallas.platforms import choose

AVAILABLE = ("xla", "reference", "tpu", "gpu")


def test_none_picks_what_the_platform_does_best() -> None:
    assert choose("attention", None, AVAILABLE) == "xla"
    assert choose("attention", None, AVAILABLE, {"tpu": "tpu"}) == "xla"
    assert choose("attention", None, AVAILABLE, {"cpu": "reference"}) == "reference"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    platforms._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=platforms.logger.name):
        for _ in range(2):
            choose("attention", None, AVAILABLE)
    assert caplog.messages == ["attention on cpu: xla"]


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_what_runs_everywhere_is_given_by_name(name: str) -> None:
    assert choose("attention", name, AVAILABLE) == name


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_kernel_of_another_platform_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' of attention needs .* this platform is cpu; use 'xla'"):
        choose("attention", name, AVAILABLE)


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_a_gpu_of_another_generation_is_refused(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    card = types.SimpleNamespace(compute_capability=capability, device_kind="NVIDIA card")
    monkeypatch.setattr(jax, "devices", lambda backend: [card])
    platforms._compute_capability.cache_clear()
    assert choose("attention", "xla", AVAILABLE) == "xla"
    with pytest.raises(ValueError, match=f"needs .* Hopper .* 9.0; the one here has {capability}; use 'xla'"):
        choose("attention", "gpu", AVAILABLE)
    # A plan for cards that are not here does not ask which are.
    monkeypatch.setattr(platforms, "_kind", lambda: "NVIDIA H100")
    assert choose("attention", "gpu", AVAILABLE) == "gpu"
    platforms._compute_capability.cache_clear()


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'triton' of attention is unknown; use one of xla, reference, tpu, gpu"):
        choose("attention", "triton", AVAILABLE)
