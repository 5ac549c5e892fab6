"""The launch files say what the launchers expect; they cannot be run here."""

import dataclasses
import math
import os
import shlex
import subprocess
import time
from pathlib import Path

import yaml

from distill.experiment import Teacher
from teacher.limits import TOKEN_VARIABLE
from teacher.serve.__main__ import parser

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"
PROBES = ("readiness", "liveness")


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


def served_teacher(run: list[str]) -> Teacher:
    """What the command line of a student's run says of its teacher."""
    at = [place for place, word in enumerate(run) if word.startswith("--teacher.")]
    given = {run[place].removeprefix("--teacher."): run[place + 1] for place in at}
    assert given.keys() <= {field.name for field in dataclasses.fields(Teacher)}
    return Teacher(path=given["path"], placement="service", urls=(given["urls"],)) if given else Teacher(path="")


def slurm(folder: Path, students: str) -> dict[str, str]:
    """The environment of a job of three nodes, whose commands say in `folder` what they are called with. The server
    stays until it is told to go; `students` are branches of a case."""
    commands = {
        "scontrol": "printf 'n1\\nn2\\nn3\\n'",
        "srun": 'echo "$JAX_LOCAL_DEVICE_IDS" "${#TEACHER_TOKEN}" "$@" >> "$CALLS"\n'
        'echo "$TEACHER_TOKEN" >> "$TOKENS"\n'
        'case "$*" in *teacher.serve*) trap "echo drained >> $CALLS; exit 0" TERM; while :; do sleep 0.1; done;;\n'
        f"{students} esac",
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n[1-3]",
        "TEACHER_OPTIONS": "--mesh.tensor 2", "CALLS": str(folder / "calls"), "TOKENS": str(folder / "tokens"),
    }  # fmt: skip


def test_slurm_tells_students_to_stop_while_their_teacher_still_answers(tmp_path: Path) -> None:
    environment = slurm(
        tmp_path, '*.py*) trap "sleep 0.3; echo saved >> $CALLS; exit 0" TERM; while :; do sleep 0.1; done;;'
    )
    calls = tmp_path / "calls"
    command = ["bash", str(LAUNCH / "slurm_teacher.sh"), "the/teacher", "one.py", "two.py"]
    with subprocess.Popen(command, env=environment) as job:
        deadline = time.monotonic() + 30
        while not calls.exists() or len(calls.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)  # they have set their traps
        job.terminate()
        assert job.wait(30) == 0
    assert calls.read_text().splitlines()[3:] == ["saved", "saved", "drained"]


def test_slurm_teacher_serves_a_student_on_every_other_node_and_ends_with_them(tmp_path: Path) -> None:
    environment = slurm(tmp_path, "*two.py*) sleep 0.5; exit 3;;")
    calls, tokens = tmp_path / "calls", tmp_path / "tokens"
    command = ["bash", str(LAUNCH / "slurm_teacher.sh"), "the/teacher", "one.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, "error: 1 experiments for 3 nodes, of which one is the teacher's; give one for each other node\n"
    )  # fmt: skip
    done = subprocess.run([*command, "two.py"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    *called, last = calls.read_text().splitlines()
    assert last == "drained"
    prefix = "0,1 64 --nodes=1 --ntasks=1 --nodelist="
    served, *students = sorted(line.removeprefix(prefix) for line in called)
    node, *serve = shlex.split(served)
    assert (node, serve[:3]) == ("n1", ["python", "-m", "teacher.serve"])
    own = parser().parse_args(serve[3:])
    assert (own.model, own.host, getattr(own, "mesh.tensor")) == ("the/teacher", "0.0.0.0", 2)
    for student, expected in zip(map(shlex.split, students), ("n2", "n3"), strict=True):
        assert student[:4] == [expected, "python", "-m", "distill.run"]
        teacher = served_teacher(student)
        assert (teacher.path, teacher.urls) == ("the/teacher", (f"http://n1:{own.port}",))
    assert len(set(tokens.read_text().split())) == 1


def test_gke_teacher_is_reached_by_its_student_with_the_same_token() -> None:
    service, deployment, job = yaml.safe_load_all((LAUNCH / "gke_teacher.yaml").read_text())
    pods = [one["spec"]["template"]["spec"] for one in (deployment, job)]
    (server,), (student,) = (pod["containers"] for pod in pods)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    assert server["command"][:3] == ["python", "-m", "teacher.serve"]
    own = parser().parse_args(server["command"][3:])
    assert own.host == "0.0.0.0"
    probes = {server[f"{one}Probe"]["httpGet"]["path"]: server[f"{one}Probe"]["httpGet"]["port"] for one in PROBES}
    assert probes == {"/ready": own.port, "/health": own.port}
    assert [port["port"] for port in service["spec"]["ports"]] == [own.port]
    assert [port["containerPort"] for port in server["ports"]] == [own.port]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == getattr(own, "mesh.tensor")
    *shell, script = student["command"]
    assert shell == ["bash", "-c"]
    teacher = served_teacher(shlex.split(script))
    assert (teacher.path, teacher.urls) == (own.model, (f"http://{service['metadata']['name']}:{own.port}",))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert server["env"] == student["env"]
    assert [one["name"] for one in server["env"]] == [TOKEN_VARIABLE]
    assert pods[1]["restartPolicy"] == "Never"
    for pod, container in zip(pods, (server, student), strict=True):
        (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
        assert mount["name"] == volume["name"]
