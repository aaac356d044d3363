#!/usr/bin/env bash
# Fills gpu-wheels/ with what `suanli` imports and a GPU machine that has torch, triton, numpy,
# scikit-learn, safetensors, psutil, typer, rich and pytest may lack; for Python 3.12 on Linux
# x86-64. Some 10 MB; benchmarks/gpu_check.sh installs from there without a network.
#
#   benchmarks/gpu_wheels.sh            the versions of constraints.txt
#   PY=3.11 benchmarks/gpu_wheels.sh    for another Python
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
PY="${PY:-3.12}"
rm -rf gpu-wheels && mkdir gpu-wheels
options=(--only-binary=:all: --implementation cp --python-version "$PY" --dest gpu-wheels)
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  options+=(--platform "${tag}_x86_64")
done
# with all that they need themselves
"$PYTHON" -m pip download -q "${options[@]}" -c constraints.txt pydantic cryptography
# the published kernels that ours are raced against; they need torch and triton, which are there
"$PYTHON" -m pip download -q "${options[@]}" --no-deps liger-kernel
ls -l gpu-wheels
