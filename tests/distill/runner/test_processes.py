"""Two processes with two devices each do what one process with four does, stop together and die together."""

import json
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from teacher.store import TargetStore
from tests.distill import miniature
from tests.distill.faults import OF_THE_MACHINE
from tests.distill.taught import losses
from tests.qwen3.hosts.two_processes import free_address, run_two

# The mesh puts halves of every matrix into different processes, and experts on different devices of one. One layer is
# enough for that: nearly all of the time is compiling, three times over.
EXPERIMENT = """
import dataclasses

from qwen3.sharding import MeshShape
from student.init import FromScratch
from tests.distill import miniature


def shorter(stage, steps):
    return dataclasses.replace(stage, training=dataclasses.replace(stage.training, steps=steps))


def config():
    teacher = {teacher!r}
    whole = miniature.experiment(teacher)
    return dataclasses.replace(
        whole,
        student=FromScratch(architecture=miniature.DENSE | {{"num_hidden_layers": 1}}, tokenizer=teacher),
        stages={{
            "off_policy": shorter(whole.stages["off_policy"], 3),
            "on_policy": shorter(whole.stages["on_policy"], 2),
        }},
        evaluation=dataclasses.replace(whole.evaluation, modes=("thinking",), problems=4),
        mesh=MeshShape(fsdp=2, expert=2),
    )
"""


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    file = folder / "my_experiment.py"
    file.write_text(EXPERIMENT.format(teacher=miniature.make_teacher(folder, miniature.MOE | {"num_hidden_layers": 1})))
    return file


def launch_two(file: Path, runs: Path, **signalled: Any) -> list[tuple[int, str, str]]:
    """Status, output and errors of processes 0 and 1; `signalled` says what happens to process 1."""
    address, launched = free_address(), []
    for process, how in enumerate(({}, signalled)):
        cluster = ("--coordinator", address, "--processes", "2", "--process", str(process))
        command, environment = miniature.launch_command(file, runs, *cluster, devices=2, **how)
        launched.append(
            subprocess.Popen(
                command, cwd=file.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    outputs: dict[int, tuple[str, str]] = {}
    readers = [
        threading.Thread(target=lambda i=i, p=p: outputs.update({i: p.communicate()})) for i, p in enumerate(launched)
    ]
    for reader in readers:
        reader.start()
    try:
        while len([process for process in launched if process.poll() is None]) == 2:
            time.sleep(0.1)
        # Whatever ended the first of them, the other must not be left waiting.
        for reader in readers:
            reader.join(timeout=30)
        assert all(process.poll() is not None for process in launched), "one process outlived the other by 30 s"
    finally:
        for process in launched:
            process.kill()
    return [(process.returncode, *outputs[i]) for i, process in enumerate(launched)]


def scalars(directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {
        (record["stage"], record["step"]): {
            name: value for name, value in record["scalars"].items() if not name.startswith(OF_THE_MACHINE)
        }
        for record in records
    }


@pytest.mark.long
def test_two_processes_killed_and_started_again_match_one_process(experiment_file: Path, tmp_path: Path) -> None:
    command, environment = miniature.launch_command(experiment_file, tmp_path / "one", devices=4)
    alone = subprocess.run(
        command, cwd=experiment_file.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stderr
    two = tmp_path / "two"

    # One dies without a word; the other ends too, and says so in one line.
    (status, _, errors), (killed, _, _) = launch_two(experiment_file, two, kill_after=3)
    assert killed == -signal.SIGKILL
    assert status == 1, errors
    # XLA's own warnings about the mesh may come before it, an abort's stack trace must not come after.
    assert re.match(r"error \(process 0 of 2\): process 1 has ended", errors.splitlines()[-1])
    assert "JAX distributed service detected fatal errors" not in errors

    for status, _, errors in launch_two(experiment_file, two):
        assert status == 0, errors
    one, resumed = tmp_path / "one" / "miniature", two / "miniature"

    stores = [TargetStore.open(folder / "targets" / "off_policy") for folder in (one, resumed)]
    assert all(np.array_equal(a.rollout.tokens, b.rollout.tokens) for a, b in zip(*stores, strict=True))
    assert (one / "rollouts.jsonl").read_bytes() == (resumed / "rollouts.jsonl").read_bytes()
    ours, theirs = scalars(resumed), scalars(one)
    assert ours.keys() == theirs.keys()
    for step, values in theirs.items():
        # Between processes sums are added in another order; divergences near 0 are differences of such sums.
        assert ours[step] == pytest.approx(values, rel=1e-5, abs=1e-6), step
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (one, resumed)]
    for name, tensor in weights[0].items():
        # Adam divides by the gradient's size, so an update of 1e-3 may feel the last bits of a tiny gradient.
        np.testing.assert_allclose(weights[1][name], tensor, atol=1e-4, err_msg=name)
    rows = [json.loads((folder / "report.json").read_text())["rows"] for folder in (one, resumed)]
    summed = {"forward_kl", "reverse_kl", "reverse_kl_own", "perplexity", "top_1_agreement"}
    for ours, theirs in zip(*rows, strict=True):
        # Responses are the same; what is summed over them is not to the last bit.
        assert {name: ours[name] for name in ours.keys() - summed} == {
            name: theirs[name] for name in theirs.keys() - summed
        }
        assert ours.keys() == theirs.keys()
        for name in summed & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    assert json.loads((resumed / "environment.json").read_text())["processes"] == 2
    assert (resumed / "report.html").is_file()


TAUGHT = """
import json, sys
from qwen3.hosts import processes
from tests.distill.taught import losses
from tests.qwen3.hosts.two_processes import free_address, run_two


def work(lifelines):
    print(json.dumps(losses(sys.argv[3])), file=sys.stderr)
    return 0


sys.exit(processes.Cluster.named(sys.argv[1], 2, int(sys.argv[2])).run(work))
"""


@pytest.mark.parametrize("share", ["rows", pytest.param("pieces of rows", marks=pytest.mark.long)])
def test_a_teacher_with_devices_of_both_processes_teaches_as_in_one_process(share: str) -> None:
    expected = losses(share)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    for status, errors in run_two(TAUGHT, share, devices=4):
        assert status == 0, errors
        said = next(json.loads(line) for line in errors.splitlines() if line.startswith("[{"))
        for ours, theirs in zip(said, expected, strict=True):
            # Between processes sums are added in another order.
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


MOVING = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from qwen3.hosts import processes
from qwen3.errors import UserError
from qwen3.sharding import MeshShape, batch_sharding, place
from teacher.placement import own_mesh
from teacher.transfer import moved

EXPECTED = np.arange(12 * 8, dtype=np.float32).reshape(12, 8)


def require_moved(x, onto):
    for shard in moved(x, onto).addressable_shards:
        np.testing.assert_array_equal(shard.data, EXPECTED[shard.index])


def work(lifelines):
    for teacher, student in (
        ({"data": 3, "expert": 2}, {"fsdp": 2}),  # other cuts, but each process has its rows
        ({"data": 4}, {"data": 1, "tensor": 4}),  # each process wants rows of the other
        ({"data": 1, "tensor": 4}, {"data": 2, "fsdp": 2}),
    ):
        of_teacher, of_student = own_mesh(MeshShape(**teacher), MeshShape(**student))
        for mesh in (of_teacher, of_student):
            assert len({device.process_index for device in mesh.devices.flat}) == 2
        require_moved(place(EXPECTED, batch_sharding(of_teacher)), batch_sharding(of_student))
        both_ways = PartitionSpec("tensor", "fsdp")
        require_moved(place(EXPECTED, NamedSharding(of_teacher, both_ways)), NamedSharding(of_student, both_ways))
    try:
        own_mesh(MeshShape(data=5), MeshShape(data=3))
    except UserError as error:
        assert "2 processes with 4, 4 devices cannot give equally many to teacher.mesh, which has 5" in str(error)
    else:
        raise AssertionError("5 + 3 devices of two processes were accepted")
    return 0


sys.exit(processes.Cluster.named(sys.argv[1], 2, int(sys.argv[2])).run(work))
"""


def test_processes_move_arrays_between_meshes_that_they_share() -> None:
    for status, errors in run_two(MOVING, devices=4):
        assert status == 0, errors


PRIMITIVES = """
import os, signal, sys
from qwen3.hosts import processes
from distill.stages.stopping import StopRequest
from qwen3.errors import UserError
from tests.distill.rewards.test_reward import PROBLEM, from_rewards, rollout
from distill.stages.ahead import Written


def refused(work):
    try:
        work()
    except UserError as error:
        return str(error)


def work(lifelines):
    me = "first" if processes.is_first() else "second"
    assert processes.first_says(lambda: {"who": me, "long": "x" * 5000}) == {"who": "first", "long": "x" * 5000}

    def disk_full():
        raise UserError(f"{me}: the disk is full")

    assert refused(lambda: processes.first_says(disk_full)) == "first: the disk is full"
    processes.require_same("prompts", b"the same".title)
    assert "prompts in process 1 differ" in refused(lambda: processes.require_same("prompts", me.encode))

    def fails_in_second(problem, sample):
        assert me == "first"
        return 2.0

    written = from_rewards(fails_in_second).complete(
        Written(rollouts=[rollout(4)] * 2, seconds=1.0), [(PROBLEM, "thinking")], None, 0, None, lambda: None
    )
    assert (written.rewards, written.failed) == ([2.0, 2.0], [False, False])
    with StopRequest().listening() as stop:
        assert not stop.agreed()
        if not processes.is_first():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
    return 0


sys.exit(processes.Cluster.named(sys.argv[1], 2, int(sys.argv[2])).run(work))
"""


def test_processes_agree() -> None:
    for status, errors in run_two(PRIMITIVES):
        assert status == 0, errors
