#!/bin/bash
# One teacher that serves several students, each on a node of its own, by Slurm:
#
#   sbatch --nodes=3 experiments/launch/slurm_teacher.sh checkpoints/Qwen3-32B one.py two.py
#
# The first node serves, each further one runs an experiment, whose only teacher this is. Options of the server are in
# the variable TEACHER_OPTIONS, such as "--mesh.tensor 8 --max-sequence-tokens 8192". Teacher, students and run
# directories must lie on a file system that all nodes share. Five minutes before its time is up the students save and
# end, and the server with them. Submit the same line several times with --dependency=singleton for longer runs.
#SBATCH --job-name=teach
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail

model=$1
shift
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if (($# != ${#nodes[@]} - 1)); then
  echo "error: $# experiments for ${#nodes[@]} nodes, of which one is the teacher's; give one for each other node" >&2
  exit 2
fi
# Without it, jax gives each process of a Slurm job one GPU.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
# A secret of this job: others may reach the port. Nothing of it is on a command line.
TEACHER_TOKEN=${TEACHER_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export JAX_LOCAL_DEVICE_IDS TEACHER_TOKEN

# shellcheck disable=SC2086 # options are words
srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
  python -m teacher.serve --model "$model" --host 0.0.0.0 ${TEACHER_OPTIONS:-} &
server=$!
# A student waits for its teacher, for `outage_seconds`.
students=()
for place in $(seq $#); do
  srun --nodes=1 --ntasks=1 --nodelist="${nodes[$place]}" \
    python -m distill.run "${!place}" --teacher.placement service --teacher.path "$model" \
    --teacher.urls "http://${nodes[0]}:8470" &
  students+=($!)
done
# The signal comes to this script alone: students whose server ended with them could not finish their step.
signalled=
trap 'signalled=1; kill -TERM "${students[@]}" 2>/dev/null || true' TERM
status=0
for student in "${students[@]}"; do
  until wait "$student"; do
    code=$?
    # Interrupted by the signal, and not yet told how the student ended.
    if [[ $signalled ]]; then
      signalled=
      continue
    fi
    status=$code
    break
  done
done
# Where the server has ended before them, its own status is the reason.
if kill "$server" 2>/dev/null; then
  wait "$server" || true
else
  wait "$server" || status=$?
fi
exit "$status"
