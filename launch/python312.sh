#!/usr/bin/env bash
# Print the path of a Python 3.12, which the locks for accelerators need. Where there is none, as on Ubuntu
# 22.04, uv installs it.
set -euo pipefail
if python3.12 -m ensurepip --version >/dev/null 2>&1; then
  command -v python3.12
  exit
fi
uv=$(command -v uv) || {
  curl -fsSL https://astral.sh/uv/install.sh | sh >&2
  uv=$HOME/.local/bin/uv
}
"$uv" python install 3.12 >&2
"$uv" python find 3.12
