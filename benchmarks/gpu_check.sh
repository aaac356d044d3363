#!/usr/bin/env bash
# What to run when a GPU is at hand: see benchmarks/gpu_check.py for its parts and options.
#
#   benchmarks/gpu_wheels.sh      once, where there is a network: fills gpu-wheels/
#   benchmarks/gpu_check.sh       where the GPU is; downloads nothing and ends within ten minutes
#
# Needs Python with torch >= 2.11 and pytest. What else `suanli` imports and that machine lacks is
# installed from gpu-wheels/ into a folder that goes when this ends.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
WHEELS="${WHEELS:-gpu-wheels}"
export PYTHONUNBUFFERED=1
if ls "$WHEELS"/*.whl > /dev/null 2>&1; then
  SITE="$(mktemp -d)"
  trap 'rm -rf "$SITE"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$SITE" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
"$PYTHON" -m benchmarks.gpu_check "$@"
