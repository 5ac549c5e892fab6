"""Decoding from pages in place: the rollouts of the gathered cache, and no second pool beside the first."""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3.decoder.kernels import Kernels
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.generation import engine as engine_module
from qwen3.generation.engine import Engine
from qwen3.rollout import Rollout
from qwen3.sharding import MeshShape, make_mesh, placed_shapes, shardings
from tests.kernels_pallas.interpreters import interpret
from tests.qwen3.generation.test_engine import CONFIGS, PROMPTS, make_engine, make_request, mixed_requests

# The longest sequence takes ten pages of four tokens. Three are written at once, the others wait for them; the two
# samples of a prompt share its pages, and one begins with a copy of the page in which the other one goes on.
FRUGAL = {"page_size": 4, "pages": 30, "tokens_per_dispatch": 5}


@pytest.fixture(scope="module")
def models() -> dict[str, Qwen3]:
    return {name: jax.jit(Qwen3, static_argnums=0)(config, jax.random.key(0)) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def gathered(models: dict[str, Qwen3]) -> dict[str, list[Rollout]]:
    """What each model generates over its gathered pages."""
    return {name: written(make_engine(CONFIGS[name]), model) for name, model in models.items()}


def written(engine: Engine, model: Qwen3) -> list[Rollout]:
    return engine.generate(model, mixed_requests(), seed=0, policy_step=5)


def reading(model: Qwen3, implementation: str) -> Qwen3:
    """The same weights, whose pages are read by that implementation."""
    model = jax.tree.map(lambda leaf: leaf, model)
    model.kernels = Kernels(paged_attention=implementation)  # type: ignore[arg-type]
    return model


def check_same(rollouts: list[Rollout], wanted: list[Rollout], rounding: float = 1e-4) -> None:
    for mine, theirs in zip(rollouts, wanted, strict=True):
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_array_equal(mine.loss_mask, theirs.loss_mask)
        # By default: the same float32 products are summed in another order.
        np.testing.assert_allclose(mine.sampler_logprobs, theirs.sampler_logprobs, atol=rounding)


@pytest.mark.parametrize(
    ("implementation", "name", "unroll_layers"),
    [
        pytest.param("reference", "dense", 12, marks=pytest.mark.long),
        ("xla", "dense", 0),
        ("xla", "moe", 12),
        ("reference", "moe", 0),
    ],
)
def test_pages_in_place_give_what_gathered_pages_give(models, gathered, implementation, name, unroll_layers):
    engine = make_engine(CONFIGS[name], unroll_layers=unroll_layers, **FRUGAL)
    check_same(written(engine, reading(models[name], implementation)), gathered[name])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("dense", {"fsdp": 2, "tensor": 2, "context": 2}), ("moe", {"expert": 2, "tensor": 2, "context": 2})],
)
def test_every_share_of_a_mesh_has_pages_of_its_own(models, gathered, name, shape):
    mesh = make_mesh(MeshShape(**shape))
    model = reading(jax.device_put(models[name], shardings(models[name], mesh)), "xla")
    # Four shares, each of two rows and 20 pages.
    engine = make_engine(CONFIGS[name], **(FRUGAL | {"batch_size": 8, "pages": 80}))
    check_same(written(engine, model), gathered[name])


@pytest.mark.parametrize(
    ("devices", "unroll_layers"),
    [(1, 0), (2, 12), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 12), (2, 0)))],
)
def test_nothing_is_copied_of_a_large_pool(models, devices, unroll_layers):
    mesh = make_mesh(MeshShape(data=devices), jax.devices()[:devices])
    model = placed_shapes(reading(models["dense"], "xla"), mesh)
    programs = make_engine(unroll_layers=unroll_layers, pages=20_000).programs(model, [mixed_requests()[0].params])
    memory = programs.decode.lower(*programs.decode_arguments, **programs.decode_options).compile().memory_analysis()
    pool = sum(leaf.size * leaf.dtype.itemsize for leaf in programs.decode_arguments[2]) // devices
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool / 100


def test_keys_by_chunks_are_refused_as_before_a_run(models):
    engine, model = make_engine(CONFIGS["chunks"]), reading(models["chunks"], "xla")
    refused = r"^kernels\.paged_attention: 'xla' does not read keys by chunks, .*; leave it None$"
    with pytest.raises(UserError, match=refused):
        engine.generate(model, mixed_requests(), seed=0, policy_step=0)
    with pytest.raises(UserError, match=refused):
        engine.programs(model, [mixed_requests()[0].params])


class _SameThread(ThreadPoolExecutor):
    """Where the interpreter is: other threads know nothing of it."""

    def submit(self, function, /, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


@pytest.mark.parametrize(
    ("implementation", "head_dim", "dtype", "temperature", "rounding"),
    # Bfloat16 keeps 8 bits of each weight and of the result, in two layers.
    [("tpu", 128, jnp.float32, 1, 1e-4), pytest.param("gpu", 64, jnp.bfloat16, 0, 0.03, marks=pytest.mark.long)],
)
def test_a_kernel_reads_the_pages_of_an_engine(implementation, head_dim, dtype, temperature, rounding, monkeypatch):
    monkeypatch.setattr(engine_module, "ThreadPoolExecutor", _SameThread)
    config = dataclasses.replace(CONFIGS["dense"], head_dim=head_dim)
    model = jax.jit(Qwen3, static_argnums=0, static_argnames="compute_dtype")(
        config, jax.random.key(0), compute_dtype=dtype
    )
    requests = [make_request(PROMPTS[3], index, max_new_tokens=12, temperature=temperature) for index in range(2)]
    # The second sequence begins with a copy of the first page, and both go on into a second one.
    engine = make_engine(config, batch_size=2, max_new_tokens=12, page_size=16)
    wanted = engine.generate(model, requests, seed=0, policy_step=0)
    with interpret(implementation):
        written = engine.generate(reading(model, implementation), requests, seed=0, policy_step=0)
    check_same(written, wanted, rounding)
