"""The launch files say what the launchers expect; they cannot be run here."""

import math
import os
import subprocess
from pathlib import Path

import yaml

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"


def test_slurm_script_starts_one_process_a_node_with_all_its_gpus(tmp_path: Path) -> None:
    script = LAUNCH / "slurm.sh"
    assert "#SBATCH --ntasks-per-node=1\n" in script.read_text()
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\necho "$JAX_LOCAL_DEVICE_IDS" "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "4"}
    arguments = ["experiments/quickstart.py", "--name", "a run"]
    done = subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == [
        "0,1,2,3",
        "--kill-on-bad-exit=1 python -m distill.run experiments/quickstart.py --name a run\n",
    ]


def test_jobset_has_a_process_for_every_host_of_the_slice() -> None:
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    # One pod that ends must end the job, and the set start again: the others cannot go on without it.
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount["name"] == volume["name"]
    *shell, script = container["command"]
    assert shell == ["bash", "-c"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert f"--runs {mount['mountPath']}/runs" in script
