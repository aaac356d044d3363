#!/usr/bin/env bash
# What to run when a GPU is at hand: the gpu-marked tests, the ceilings, one search per model, and the kernels that ship.
#   benchmarks/gpu_check.sh [OUT]        (about 9 minutes, and 15 for the kernels; results under OUT, default results/gpu)
# Works with torch >= 2.11 and without OpenVINO; nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${1:-${OUT:-benchmarks/results/gpu}}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.txt"
"$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests 2>&1 | tee "$OUT/tests.txt"
"$PYTHON" -m suanli.cli doctor --json --refresh > "$OUT/doctor.json"
for case in "resnet50 latency 1" "resnet50 throughput 64" "bert-base latency 1" "gpt2-small latency 1"; do
  read -r model goal batch <<< "$case"
  timeout 150 "$PYTHON" -m suanli.cli optimize "$model" --for "$goal" --batch "$batch" \
    --budget 90 --json > "$OUT/optimize-$model-b$batch.json" 2> "$OUT/optimize-$model-b$batch.log" \
    || tail -n 3 "$OUT/optimize-$model-b$batch.log"
done
timeout 900 "$PYTHON" -m benchmarks.kernels --most 24 --shapes 1 --out "$OUT" 2> "$OUT/kernels.log" \
  | tee "$OUT/kernels.txt" || tail -n 3 "$OUT/kernels.log"
