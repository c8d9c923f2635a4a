#!/usr/bin/env bash
# A Cloud TPU pod: copy this checkout to every host, install the TPU lock, train on all chips. The
# hosts find each other. The run directory is one that all of them mount.
#
#   launch/tpu_pod.sh NAME ZONE quickstart/nrt mesh.fsdp=-1 mesh.data=1 run_dir=/mnt/shared/runs/nrt
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 zone=$2
shift 2
git archive --prefix=nrt_jax/ --output=/tmp/nrt_jax.tar HEAD
gcloud compute tpus tpu-vm scp /tmp/nrt_jax.tar "$name:" --zone="$zone" --worker=all
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  set -e
  tar -xf nrt_jax.tar
  cd nrt_jax
  make venv REQUIREMENTS=requirements-tpu.txt
  exec .venv/bin/nrt-jax train $(printf '%q ' "$@")"
