"""What is asked of the compilers for accelerators that are not here, without having the compilers."""

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import topologies
from kernels_pallas.platforms import platform


@pytest.mark.parametrize(
    "target",
    ["v9", "v5e:4x4x4", "v5p:8x8", "h100:8", "tpu7x:0x2x1", "h100 ", "v5e:", "v5e:" + "9" * 5000 + "x1", "v5e:²x1"],
)
def test_an_unknown_target_is_refused_with_those_there_are(target: str) -> None:
    with pytest.raises(ValueError, match=f"target '{target}' is unknown; use one of v4, v5e, v5p, v6e, tpu7x, h100"):
        topologies.devices(target)


@pytest.mark.parametrize("target", ["v5p:9999x9999x9999", "h100:99999x99999", "v5e:999x999"])
def test_more_chips_than_there_are_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=rf"target '{target}' has \d+ chips; at most 65536 can be planned for"):
        topologies.parsed(target)


@pytest.mark.parametrize(("target", "package"), [("v6e:2x2", "libtpu"), ("h100", "jax_cuda13_plugin")])
def test_a_missing_compiler_is_named(target: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"for {target[:3]}.* needs the package {package}.*\[compile\]"):
        topologies.devices(target)


def test_the_mesh_is_set_while_its_program_is_lowered() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("device",))
    seen = []

    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        seen.append((jax.sharding.get_abstract_mesh().abstract_device, platform()))
        return 2 * x

    compiled = topologies.compile_for(mesh, double, jax.ShapeDtypeStruct((3,), jnp.float32))
    ((device, name),) = seen
    assert device is not None
    assert name == "cpu"
    np.testing.assert_array_equal(compiled(jnp.arange(3.0)), [0, 2, 4])


@pytest.mark.parametrize(
    ("target", "gib", "said"),
    [("h100", 79, None), ("h100", 82, "needs 82.0 GiB, NVIDIA H100"), ("h200:1x8", 82, None), ("v5e", 99, None)],
)
def test_what_a_gpu_lacks_is_said_in_its_compilers_place(target: str, gib: int, said: str | None) -> None:
    memory = SimpleNamespace(
        argument_size_in_bytes=(gib - 2) * 2**30,
        output_size_in_bytes=2 * 2**30,
        temp_size_in_bytes=2**30,
        alias_size_in_bytes=2**30,
    )
    short = topologies.shortage(SimpleNamespace(memory_analysis=lambda: memory), target)
    assert (short is None) if said is None else short.startswith(said)
