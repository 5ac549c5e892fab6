"""What programs send, against sums done by hand."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill.planner.collectives import Collective, collectives, traffic
from kernels_pallas.chips import CHIPS

LAYERS, WIDTH = 7, 64


def test_a_scans_gathers_are_counted_once_a_layer() -> None:
    """Seven layers whose weights are gathered over four of eight devices, then one number summed over all eight."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))

    def spread(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    @jax.jit
    def program(x: jax.Array, weights: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            gathered = jax.lax.with_sharding_constraint(weight, spread())
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ gathered), spread(("data", "fsdp"))), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    x = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32, sharding=spread(("data", "fsdp")))
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=spread(None, "fsdp"))
    found = {one.kind: one for one in collectives(program.lower(x, weights).compile().as_text())}
    assert found.keys() == {"all-gather", "all-reduce"}
    assert found["all-gather"] == Collective(
        kind="all-gather", whole_bytes=WIDTH * WIDTH * 4, group=(0, 1, 2, 3), times=LAYERS, open_loops=0
    )
    assert found["all-reduce"] == Collective(
        kind="all-reduce", whole_bytes=4, group=tuple(range(8)), times=1, open_loops=0
    )


def _module(operation: str) -> str:
    return f"""HloModule m

%step (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  {operation}
}}

%going (p: (s32[], f32[4,8])) -> pred[] {{
  %constant.1 = s32[]{{:T(128)}} constant(94)
  %p = (s32[], f32[4,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt.3 = pred[]{{:T(512)}} compare(%i, %constant.1), direction=LT
}}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {{
  %while.1 = (s32[], f32[4,8]{{1,0:T(8,128)}}) while(%t), condition=%going, body=%step
}}
"""


@pytest.mark.parametrize(
    ("operation", "whole_bytes", "group"),
    [
        # As CPU and TPU write a group: the second axis of a transposed grid of devices.
        (
            "%a = bf16[1,16,8]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%x), "
            "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}",
            256,
            (0, 1, 2, 3),
        ),
        (
            "%a = f32[2,8]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, to_apply=%add",
            128,
            (0, 4),
        ),
        # A start holds its operands, too.
        (
            "%a = (bf16[8,16]{1,0}, bf16[16,16]{1,0}) all-gather-start(%x), replica_groups={{0,3},{1,2}}",
            512,
            (0, 3),
        ),
        ("%a = (f32[4]{0}, f32[8]{0}) all-reduce-start(%x, %y), replica_groups={{0,1}}, to_apply=%add", 48, (0, 1)),
        ("%a = f8e4m3fn[8]{0} collective-permute(%x), source_target_pairs={{2,2},{0,3},{3,0}}", 8, (0, 3)),
        # Half of an axis.
        ("%a = s32[6]{0} all-to-all(%x), replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}, dimensions={0}", 24, (0, 2)),
    ],
)
def test_collectives_as_compilers_write_them(operation: str, whole_bytes: int, group: tuple[int, ...]) -> None:
    (one,) = collectives(_module(operation))
    assert (one.whole_bytes, one.group, one.times, one.open_loops) == (whole_bytes, group, 94, 0)


def test_a_loop_that_data_ends_is_open() -> None:
    text = _module("%a = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add")
    text = text.replace("ROOT %lt.3", "%lt.3 = pred[] compare(%i, %k)\n  ROOT %and = pred[] and(%lt.3, %other)\n  %x")
    (one,) = collectives(text)
    assert (one.times, one.open_loops) == (1, 1)


def test_a_tpus_reduce_scatter_is_one() -> None:
    """libtpu writes it as an all-reduce and a slice within one fusion, whose emitter says what it is."""
    fusion = (
        "%f = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%scatter, "
        'backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion"}}'
    )
    scatter = """
%scatter (x: bf16[16,8]) -> bf16[4,8] {
  %all = bf16[16,8]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = bf16[4,8]{1,0} dynamic-slice(%all, %i, %zero), dynamic_slice_sizes={4,8}
}
"""
    expected = Collective(kind="reduce-scatter", whole_bytes=256, group=(0, 1, 2, 3), times=94, open_loops=0)
    assert collectives(_module(fusion) + scatter) == [expected]
    (other,) = collectives(_module(fusion.replace("AllReduceScatter", "Other")) + scatter)
    assert other.kind == "all-reduce"


def test_a_group_of_one_sends_nothing() -> None:
    assert not collectives(_module("%a = f32[4]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add"))


def test_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule nothing")


def _torus(*sizes: int) -> list[Any]:
    return [SimpleNamespace(coords=tuple(int(x) for x in coords)) for coords in np.ndindex(*sizes)]


def _gather(group: tuple[int, ...], kind: str = "all-gather", times: int = 1) -> Collective:
    return Collective(kind=kind, whole_bytes=1600.0, group=group, times=times, open_loops=0)


def test_traffic_on_a_torus() -> None:
    devices, chip = _torus(4, 4, 4), CHIPS["v5p"]
    # Four chips in a ring: three quarters of the whole, half of it each way round.
    assert traffic([_gather((0, 1, 2, 3))], devices, chip).link_bytes == 600
    # Two neighbours have one link between them, whatever ring they are on.
    assert traffic([_gather((0, 1))], devices, chip).link_bytes == 800
    # Sixteen in a plane of two rings; twice as much for an all-reduce; three times in three calls.
    assert traffic([_gather(tuple(range(16)), times=3)], devices, chip).link_bytes == 3 * 375
    both = traffic([_gather(tuple(range(16)), "all-reduce")], devices, chip)
    assert (both.sent_bytes, both.link_bytes, both.network_bytes) == (3000, 750, 0)
    assert both.seconds == 750 / 100e9
    # Two by two by two chips have no rings: every link is on a line.
    assert traffic([_gather(tuple(range(8)))], _torus(2, 2, 2), chip).link_bytes == pytest.approx(1400 / 3)
    # Half of what four chips in a ring exchange among each other passes through the middle, in two directions.
    assert traffic([_gather((0, 1, 2, 3), "all-to-all")], devices, chip).link_bytes == 800


def test_traffic_between_hosts_of_gpus() -> None:
    devices, chip = [SimpleNamespace(process_index=index // 8) for index in range(16)], CHIPS["h100"]
    inside = traffic([_gather(tuple(range(8)))], devices, chip)
    assert (inside.link_bytes, inside.network_bytes) == (1400, 0)
    # Eight cards of each host bring in the other host's half, an eighth each, and pass it on.
    both = traffic([_gather(tuple(range(16)))], devices, chip)
    assert both.network_bytes == pytest.approx(800 / 8)
    assert both.sent_bytes == both.link_bytes + both.network_bytes == 1500
    assert both.seconds == pytest.approx(both.link_bytes / 450e9 + both.network_bytes / 50e9)
    # Of sixteen cards' parts, eight are for another host.
    assert traffic([_gather(tuple(range(16)), "all-to-all")], devices, chip).network_bytes == pytest.approx(800)
    # A card of either host alone: all goes over the network.
    assert traffic([_gather((0, 8))], devices, chip).network_bytes == 800
