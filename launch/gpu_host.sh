#!/usr/bin/env bash
# One host with NVIDIA GPUs: install the CUDA lock once, then train on all GPUs of the host.
#
#   launch/gpu_host.sh quickstart/nrt mesh.data=-1
set -euo pipefail
cd "$(dirname "$0")/.."
make venv REQUIREMENTS=requirements-cuda.txt
exec .venv/bin/nrt-jax train "$@"
