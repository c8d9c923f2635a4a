#!/usr/bin/env bash
# SLURM, hosts with NVIDIA GPUs: one task per GPU, which find each other.
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh quickstart/nrt run_dir=/shared/runs/nrt
#
# --gpus-per-task would show each task one GPU, by the number 0, and jax takes the one with the
# task's number on its host (https://github.com/jax-ml/jax/issues/23452).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
make venv REQUIREMENTS=requirements-cuda.txt
# When one task fails, srun ends the others; SIGTERM of a preemption makes all save.
exec srun --kill-on-bad-exit=1 .venv/bin/nrt-jax train "$@"
