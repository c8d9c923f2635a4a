#!/usr/bin/env bash
# One Cloud TPU VM: install the TPU lock once, then train on all chips of the host.
#
#   launch/tpu_vm.sh quickstart/nrt mesh.fsdp=-1 mesh.data=1
set -euo pipefail
cd "$(dirname "$0")/.."
make venv REQUIREMENTS=requirements-tpu.txt
exec .venv/bin/nrt-jax train "$@"
