"""A model's kernels: the same numbers on a mesh as on one device, and what a platform lacks is refused beforehand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import platforms
from kernels_pallas.attention import attention
from kernels_pallas.moe_dispatch import exchange
from qwen3.decoder.attend import attend
from qwen3.decoder.config import DualChunk, ModelConfig
from qwen3.decoder.kernels import Kernels
from qwen3.errors import UserError
from qwen3.sharding import MeshShape, make_mesh
from tests.kernels_pallas.interpreters import interpret

DENSE = ModelConfig(
    model_type="qwen3",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=32,
)
MOE = dataclasses.replace(DENSE, model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96)


def test_a_kernel_on_a_mesh_attends_every_row_and_head():
    rng = np.random.default_rng(0)
    shapes = {"q": (4, 40, 4, 64), "k": (4, 40, 2, 64), "v": (4, 40, 2, 64)}
    qkv = [jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in shapes.values()]
    arriving = jnp.asarray(rng.normal(0, 1, shapes["q"]), jnp.float32)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (4, 40)), axis=1)[:, ::-1], jnp.int32)

    def value_and_gradients(run):
        def loss(q, k, v):
            out = run(q, k, v, segments)
            return jnp.sum(out * arriving), out

        gradients, out = jax.jit(jax.grad(loss, argnums=range(3), has_aux=True))(*qkv)
        return jax.block_until_ready((out, *gradients))

    mesh = make_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4])
    expected = value_and_gradients(functools.partial(attention, implementation="reference"))
    with interpret("tpu"):
        found = value_and_gradients(functools.partial(attend, mesh=mesh, implementation="tpu"))
    for mine, theirs in zip(found, expected, strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)
    assert found[0].sharding.spec[2] == "tensor"


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        (
            {"attention": "tpu"},
            r"kernels\.attention: implementation 'tpu' of attention needs TPU, this platform is cpu",
        ),
        ({"grouped_matmul": "gpu"}, r"kernels\.grouped_matmul: implementation 'gpu' of grouped_matmul needs an NVIDIA"),
        (
            {"linear_kl": "gpu"},
            r"kernels\.linear_kl: implementation 'gpu' of linear_kl needs an NVIDIA",
        ),
        (
            {"attention": "triton"},
            r"kernels\.attention is 'triton'; it must be 'xla' or 'reference' or 'tpu' or 'gpu' or None",
        ),
        (
            {"paged_attention": "tpu"},
            r"kernels\.paged_attention: implementation 'tpu' of paged_attention needs TPU, this platform is cpu",
        ),
        ({"exchange": "ragged"}, r"kernels\.exchange: exchange 'ragged' does not run on cpu; use 'all_gather'"),
    ],
)
def test_what_the_platform_lacks_is_refused(kernels, message):
    with pytest.raises(UserError, match=message):
        Kernels(**kernels).check(DENSE, "bfloat16", make_mesh(MeshShape()))


@pytest.mark.parametrize(
    ("kernels", "config", "dtype", "message"),
    [
        (
            {"attention": "gpu"},
            DENSE,
            "float32",
            r"kernels\.attention: .* implementation 'gpu' of attention takes one ",
        ),
        (
            {"attention": "gpu"},
            dataclasses.replace(DENSE, head_dim=96),
            "bfloat16",
            r"kernels\.attention: head size 96",
        ),
        (
            {"paged_attention": "gpu"},
            DENSE,
            "float32",
            r"kernels\.paged_attention: .* dtypes float32, .* implementation 'gpu' of paged_attention takes one ",
        ),
        (
            {"paged_attention": "gpu"},
            dataclasses.replace(DENSE, head_dim=96),
            "bfloat16",
            r"kernels\.paged_attention: head size 96",
        ),
        (
            {"paged_attention": "gpu"},
            dataclasses.replace(DENSE, num_attention_heads=512, num_key_value_heads=2),
            "bfloat16",
            r"kernels\.paged_attention: 1 new tokens of 256 heads that share keys: .* takes up to 128 together",
        ),
        (
            {"linear_kl": "gpu"},
            DENSE,
            "bfloat16",
            r"kernels\.linear_kl: hidden and head are 16 wide; ",
        ),
        ({"grouped_matmul": "gpu"}, MOE, "bfloat16", r"kernels\.grouped_matmul: D 16 and F 48: "),
        (
            {"paged_attention": "xla"},
            dataclasses.replace(DENSE, dual_chunk=DualChunk()),
            "bfloat16",
            r"kernels\.paged_attention: 'xla' does not read keys by chunks, .*; leave it None",
        ),
    ],
)
def test_what_a_kernel_cannot_take_is_refused(kernels, config, dtype, message, monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    with pytest.raises(UserError, match=message):
        Kernels(**kernels).check(config, dtype, make_mesh(MeshShape(tensor=2)))


def test_more_words_than_a_kernel_takes_are_refused_before_the_teacher_names_them(monkeypatch):
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    config = dataclasses.replace(DENSE, hidden_size=128)
    mesh, kernels = make_mesh(MeshShape(tensor=2)), Kernels(linear_kl="tpu")
    kernels.check(config, "float32", mesh, tokens_per_target=256)
    with pytest.raises(UserError, match=r"kernels\.linear_kl: ids names 257 entries; .* takes at most 256; use 'xla'"):
        kernels.check(config, "float32", mesh, tokens_per_target=257)


def test_a_ragged_exchange_has_room_on_few_chips_of_v5e(monkeypatch):
    monkeypatch.setattr(exchange, "platform", lambda: "tpu")
    mesh, ragged = make_mesh(MeshShape()), Kernels(exchange="ragged")
    ragged.check(MOE, "bfloat16", mesh)
    monkeypatch.setattr(exchange, "_V5E", mesh.devices.flat[0].device_kind)
    ragged.check(MOE, "bfloat16", mesh)
    monkeypatch.setattr(exchange, "_V5E_CHIPS", 4)
    with pytest.raises(UserError, match=r"kernels\.exchange: exchange 'ragged' runs on at most 4 chips of TPU v5e, "):
        ragged.check(MOE, "bfloat16", mesh)
