"""Arrays come to another mesh's devices as they were, cut as asked, and before they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen3.sharding import MeshShape, batch_sharding, make_mesh
from teacher.transfer import moved


@pytest.mark.parametrize(
    ("source", "onto"),
    [
        ({"expert": 4}, {"fsdp": 4}),
        ({"expert": 4}, {"data": 2, "tensor": 2}),
        ({"data": 1, "tensor": 2}, {"data": 2, "fsdp": 3}),
        ({"data": 2, "expert": 3}, {"data": 1, "tensor": 2}),
        ({"fsdp": 3, "tensor": 2}, {"fsdp": 2}),
        ({"data": 7}, {"data": 1}),
        ({"fsdp": 2, "context": 2}, {"data": 2, "context": 2}),
        ({"data": 2, "context": 3}, {"data": 1, "tensor": 2}),
        ({"fsdp": 2}, {"data": 2, "context": 3}),
    ],
)
def test_rows_are_the_same_on_any_other_mesh(source, onto):
    devices = jax.devices()
    split = int(np.prod([*source.values()]))
    of_source, of_target = (
        make_mesh(MeshShape(**source), devices[:split]),
        make_mesh(MeshShape(**onto), devices[split:]),
    )
    rng = np.random.default_rng(0)
    tree = {"wide": rng.normal(size=(84, 6, 4)).astype(np.float32), "flat": rng.integers(0, 9, (84, 6))}
    placed = jax.device_put(tree, batch_sharding(of_source))
    wanted = batch_sharding(of_target)
    for name, leaf in moved(placed, wanted).items():
        np.testing.assert_array_equal(leaf, tree[name])
        assert leaf.sharding == wanted
        assert leaf.dtype == placed[name].dtype


def test_a_matrix_split_both_ways_comes_split_another_way():
    source, onto = (
        make_mesh(MeshShape(fsdp=2, tensor=3), jax.devices()[:6]),
        make_mesh(MeshShape(fsdp=2), jax.devices()[6:]),
    )
    matrix = np.arange(12 * 8, dtype=np.float32).reshape(12, 8)
    placed = jax.device_put(matrix, NamedSharding(source, PartitionSpec("tensor", "fsdp")))
    wanted = NamedSharding(onto, PartitionSpec(None, "fsdp"))
    found = moved(placed, wanted)
    np.testing.assert_array_equal(found, matrix)
    assert found.sharding == wanted
    # Rows that the first mesh cannot split evenly are gathered there.
    odd = jax.device_put(matrix[:7], NamedSharding(source, PartitionSpec(None, "fsdp")))
    np.testing.assert_array_equal(moved(odd, wanted), matrix[:7])


@pytest.mark.parametrize("onto", [{"fsdp": 4}, {"tensor": 2}, {"tensor": 4}])
def test_nobody_waits_for_what_is_still_computed(onto):
    source, onto = make_mesh(MeshShape(), jax.devices()[:4]), make_mesh(MeshShape(**onto), jax.devices()[4:])

    @jax.jit
    def slow(x, rounds):
        return jax.lax.fori_loop(0, rounds, lambda _, y: jnp.tanh(y @ y), x)

    x = jax.device_put(np.full((4, 128, 128), 1e-3, np.float32), batch_sharding(source))
    jax.block_until_ready(moved(slow(x, 2), batch_sharding(onto)))
    computed = slow(x, 4_000)
    arriving = moved(computed, batch_sharding(onto))
    assert not computed.is_ready()
    np.testing.assert_array_equal(arriving, computed)
