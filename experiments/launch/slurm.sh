#!/bin/bash
# One process on each node, by Slurm:
#
#   sbatch experiments/launch/slurm.sh experiments/NAME.py [--field VALUE …]
#
# Run directory, teacher and student must lie on a file system that all nodes share; the processes find one another.
# Five minutes before its time is up the job saves and ends. Submit the same line several times with
# --dependency=singleton for a longer run: each job goes on where the one before stopped, and does nothing once all is
# done.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail

# Without it, jax gives each process of a Slurm job one GPU.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS
srun --kill-on-bad-exit=1 python -m distill.run "$@"
