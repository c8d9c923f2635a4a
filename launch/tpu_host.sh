#!/usr/bin/env bash
# On a host of a TPU slice: mount a bucket, install the TPU lock, and run run.sh of the checkout as a
# service. systemd starts it again after a failure and after a boot, and a training goes on from its
# newest checkpoint.
#
#   launch/tpu_host.sh BUCKET MOUNT
set -euo pipefail
cd "$(dirname "$0")/.."
bucket=$1 mount=$2

if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -q
  sudo apt-get install -qy gcsfuse make python3-venv
fi
make venv PYTHON="$(launch/python312.sh)" REQUIREMENTS=requirements-tpu.txt

sudo tee /etc/systemd/system/nrt-jax.service >/dev/null <<UNIT
[Unit]
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=$(id -un)
WorkingDirectory=$PWD
# The plus sign: as root.
ExecStartPre=+/bin/mkdir -p $mount
ExecStartPre=+/bin/chown $(id -un) $mount
ExecStartPre=/bin/bash -c 'mountpoint -q $mount || gcsfuse --implicit-dirs $bucket $mount'
ExecStart=/bin/bash run.sh
# After SIGTERM the step is finished and saved.
KillMode=mixed
TimeoutStopSec=900
# Status 2 is a mistake in the input, which another start would meet again.
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=30

[Install]
WantedBy=multi-user.target
UNIT
sudo systemctl daemon-reload
sudo systemctl enable nrt-jax
sudo systemctl restart nrt-jax
