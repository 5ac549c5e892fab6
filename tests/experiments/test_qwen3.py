"""The experiments with published checkpoints build, and their programs fit together, without a weight."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.plan import stand_ins
from distill.planner.topology_plan import plan_on
from distill.planner.whole_run import Assumptions
from distill.runner.experiment_file import load_experiment
from experiments.benchmarks.program_cases import TARGETS
from kernels_pallas import topologies
from kernels_pallas.chips import CHIPS

ROOT = Path(__file__).parents[2]
# 64 devices need a process of their own. Of every program the shapes are checked by tracing it.
TRACED = """
import json, sys
from pathlib import Path
import jax
from distill.runner.experiment_file import load_experiment
from distill.planner.program import device_bytes
from distill.planner.programs import programs

found = {}
for file, count in json.loads(sys.argv[1]).items():
    made = programs(load_experiment(Path(file)), jax.devices()[:count])
    for program in made:
        if program.purpose in ("teacher_scores", "student_routes", "student_trains", "student_scores"):
            with jax.set_mesh(program.mesh):
                program.function.trace(*program.arguments, **program.options)
    first = {program.purpose: program.arguments[0] for program in reversed(made)}
    models = {"teacher": first["teacher_scores"], "student": first["student_trains"]}
    found[Path(file).stem] = {
        role: {"weights": sum(x.size for x in jax.tree.leaves(model)), "device_bytes": device_bytes(model)}
        for role, model in models.items()
    } | {"programs": [program.name for program in made]}
print(json.dumps(found))
"""
# Counted from the published configurations: hidden sizes, layers, heads, experts (arXiv 2505.09388, tables 1 and 2).
WEIGHTS = {
    "qwen3_235b_to_8b": (235_093_634_560, 8_190_735_360),
    "qwen3_235b_to_8b_cheap": (235_093_634_560, 8_190_735_360),
    "qwen3_235b_to_0_6b": (235_093_634_560, 596_049_920),
    "qwen3_235b_to_14b": (235_093_634_560, 14_768_307_200),
    "qwen3_30b_a3b_student": (235_093_634_560, 30_532_122_624),
    "qwen3_32b_to_1_7b": (32_762_123_264, 1_720_574_976),
}
DEVICES = dict.fromkeys(WEIGHTS, 64) | {"qwen3_32b_to_1_7b": 8}


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    counts = {str(ROOT / "experiments" / f"{name}.py"): count for name, count in DEVICES.items()}
    flags = "--xla_force_host_platform_device_count=64"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRACED, json.dumps(counts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", WEIGHTS)
def test_models_are_the_published_ones_in_equal_parts(found: dict[str, dict], name: str) -> None:
    for (role, itemsize), weights in zip({"teacher": 2, "student": 4}.items(), WEIGHTS[name], strict=True):
        assert found[name][role]["weights"] == weights
        part = weights * itemsize / DEVICES[name]
        # Norms are on every device.
        assert part <= found[name][role]["device_bytes"] < 1.02 * part


def test_both_stages_and_the_evaluation_are_there(found: dict[str, dict]) -> None:
    prefills_and_generates = ["prefills", "generates"]
    assert found["qwen3_235b_to_8b"]["programs"] == [
        *(f"off_policy: teacher {does}" for does in (*prefills_and_generates, "scores")),
        *(f"off_policy: student {does}" for does in ("trains", "updates")),
        *(f"on_policy: student {does}" for does in prefills_and_generates),
        "on_policy: teacher scores",
        *(f"on_policy: student {does}" for does in ("trains", "updates")),
        *(f"evaluation: {role} {does}" for role in ("student", "teacher") for does in prefills_and_generates),
        *(f"evaluation: {role} scores" for role in ("teacher", "student")),
    ]


def test_a_student_with_experts_counts_their_load_before_it_trains_on_several_microbatches(
    found: dict[str, dict],
) -> None:
    trains = found["qwen3_30b_a3b_student"]["programs"].index("on_policy: student trains")
    assert found["qwen3_30b_a3b_student"]["programs"][trains - 1] == "on_policy: student routes"


@pytest.mark.long
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_hours_that_a_file_names_are_those_of_its_plan(name: str) -> None:
    file = ROOT / "experiments" / f"{name}.py"
    said = ast.get_docstring(ast.parse(file.read_text()))
    assert said is not None
    hours = {
        topology: tuple(float(number.replace(",", "")) for number in numbers)
        for topology, *numbers in re.findall(r"(\w+:[\dx]+) ([\d,]+) h, ([\d,]+) chip-hours", said)
    }
    # What is compiled for H100 runs on H200 as it is.
    targets = TARGETS[name.removesuffix("_cheap")]
    assert hours.keys() == {*targets, *(topology.replace("h100", "h200") for topology in targets)}
    experiment = load_experiment(file)
    for topology, numbers in hours.items():
        kind, shape = topologies.parsed(topology)
        plan = plan_on(experiment, stand_ins(kind, shape), CHIPS[kind], topology, Assumptions())
        assert plan.fits
        # Hours are given without decimals: half an hour is what rounding takes.
        assert numbers == (
            pytest.approx(plan.seconds / 3600, rel=0.02, abs=0.5),
            pytest.approx(plan.chip_hours, rel=0.01),
        )
