"""How fast a sharded MoE checkpoint goes to the devices, and how much host memory that takes beside what is kept.

    python -m experiments.benchmarks.load make /tmp/moe
    python -m experiments.benchmarks.load read /tmp/moe --dtype bfloat16
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.benchmarks.load read /tmp/moe --expert 8

`make` writes 2.1 GB of bfloat16: random weights, 64 experts a layer in 16 shards. `read` prints one line of JSON; the
second run of it measures what the system's file cache gives, `--cold` drops the folder from the cache before.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro

from experiments.benchmarks.machine import machine, memory_bytes
from qwen3.checkpoint import hf, streaming
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import random_model
from qwen3.sharding import MeshShape, make_mesh

CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=32_768,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=608,
)
_MAX_SHARD_BYTES = 140 * 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Make:
    """Write the checkpoint."""

    folder: tyro.conf.Positional[Path]

    def run(self) -> None:
        model = random_model(CONFIG, jax.random.key(0), param_dtype=jnp.bfloat16)
        hf.save(self.folder, model, max_shard_bytes=_MAX_SHARD_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """Load it once and measure."""

    folder: tyro.conf.Positional[Path]
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the weights are kept in."""
    expert: int = 1
    fsdp: int = 1
    tensor: int = 1
    cold: bool = False
    """Read from the disk, not from the system's file cache."""

    def run(self) -> None:
        if self.cold:
            _forget(self.folder)
        mesh = make_mesh(MeshShape(expert=self.expert, fsdp=self.fsdp, tensor=self.tensor))
        jax.block_until_ready(jnp.zeros(3) + 1)
        read_bytes = 0

        def on_read(done: int, total: int) -> None:
            nonlocal read_bytes
            assert done <= total
            read_bytes = done

        before = memory_bytes("VmHWM") / 2**20
        started = time.perf_counter()
        model = hf.load(self.folder, param_dtype=jnp.dtype(self.dtype), mesh=mesh, on_read=on_read)
        jax.block_until_ready(model)
        seconds = time.perf_counter() - started
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 2**20
        peak = memory_bytes("VmHWM") / 2**20
        row = {
            "benchmark": "load",
            "dtype": self.dtype,
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
            "cold": self.cold,
            "read_gb": round(read_bytes / 1e9, 3),
            "seconds": round(seconds, 2),
            "gb_per_second": round(read_bytes / 1e9 / seconds, 3),
            "kept_mb": round(kept, 1),
            "peak_rss_mb_before": round(before, 1),
            "peak_rss_mb": round(peak, 1),
            "beside_kept_mb": round(peak - before - kept, 1),
            "slab_mb": streaming.SLAB_BYTES / 2**20,
            "readers": streaming.READERS,
            **machine(),
        }
        print(json.dumps(row))


def _forget(folder: Path) -> None:
    """Drop a folder's files from the system's cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


Command = Annotated[Make, tyro.conf.subcommand("make")] | Annotated[Read, tyro.conf.subcommand("read")]

if __name__ == "__main__":
    tyro.cli(Command, description=__doc__).run()
