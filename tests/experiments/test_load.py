"""A checkpoint larger than a host may hold twice: 2.1 GB of a mixture of experts, as the loading benchmark makes it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from experiments.benchmarks.load import CONFIG
from qwen3.checkpoint import streaming

MIB = 2**20


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured through Linux's /proc")
def test_two_gigabytes_of_experts_take_three_slabs_beside_what_is_kept(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "experiments.benchmarks.load", *arguments]
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout

    # pytest would keep what is in tmp_path.
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        run("make", folder + "/moe")
        assert len(list(Path(folder).glob("moe/*.safetensors"))) > 10
        measured = json.loads(run("read", folder + "/moe", "--expert", "8"))
    assert measured["read_gb"] > 2
    assert measured["kept_mb"] * MIB > 2e9
    assert CONFIG.num_experts is not None
    # All eight devices are this host's: it reads whole layers.
    layer = 2 * CONFIG.num_experts * CONFIG.hidden_size * CONFIG.moe_intermediate_size
    promised = 3 * max(layer, streaming.SLAB_BYTES) + streaming.READERS * streaming.PIECE_BYTES
    slack = 20 * MIB  # code and buffers of the first calls
    assert measured["beside_kept_mb"] * MIB < promised + slack
    # A loader with a whole parameter on the host would need eight layers.
    assert promised + slack < 8 * layer
