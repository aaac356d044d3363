#!/usr/bin/env bash
# What to run when a GPU is at hand. Nothing is downloaded; each part has a limit, and a part that
# fails stops no other. How long each took stands in parts.tsv.
#
#   benchmarks/gpu_check.sh [OUT]             all of it, about 35 minutes; default benchmarks/results/gpu
#   PARTS="tests kernels" benchmarks/gpu_check.sh
#   WHEELS=folder benchmarks/gpu_check.sh     installs what is missing from wheels in a folder
#
# Parts: tests (6 min), doctor (2), examples (3), kernels (KERNELS_S seconds, 1200), optimize (10).
# Needs torch >= 2.11 and what `suanli` itself needs; no OpenVINO.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${1:-${OUT:-benchmarks/results/gpu}}"
PYTHON="${PYTHON:-python3}"
PARTS="${PARTS:-tests doctor examples kernels optimize}"
KERNELS_S="${KERNELS_S:-1200}"
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ -n "${WHEELS:-}" ]; then
  SITE="$(mktemp -d)"
  trap 'rm -rf "$SITE"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH="$SITE:$PYTHONPATH"
fi
"$PYTHON" - <<'PROBE' | tee "$OUT/environment.txt" || exit 2
import importlib.util, platform, sys
required = ("torch", "numpy", "safetensors", "psutil", "cryptography", "sklearn", "typer", "rich", "pydantic", "pytest")
missing = [name for name in required if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing: {', '.join(missing)} (give WHEELS=folder, or pip install them)")
import torch
print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here")
for name in ("triton", "liger_kernel", "onnxruntime", "tensorrt", "torchao", "pytest_timeout"):
    print(f"{name}: {'present' if importlib.util.find_spec(name) else 'absent'}")
PROBE
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$OUT/environment.txt"

# part NAME SECONDS FILE COMMAND...: runs it under a limit and appends what it prints to FILE
part() {
  local name="$1" limit="$2" file="$3" begin=$SECONDS code=0
  shift 3
  timeout -k 10 "$limit" "$@" 2>> "$OUT/errors.txt" | tee -a "$OUT/$file" || code=$?
  printf '%s\t%s\t%d s\n' "$name" "$([ "$code" = 0 ] && echo done || echo "exit $code")" \
    "$((SECONDS - begin))" | tee -a "$OUT/parts.tsv"
}
wanted() { case " $PARTS " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

if wanted tests; then
  # each file by itself: one that cannot be imported here must not keep the others from running
  for file in $(grep -lE "mark\.gpu" tests/test_*.py); do
    part "$file" 180 tests.txt "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "$file"
  done
fi
if wanted doctor; then
  part doctor 120 doctor.json "$PYTHON" -m suanli.cli doctor --json --refresh
fi
if wanted examples; then
  for example in vector_add reduction transpose.py:padded matmul tensor_core_matmul convolution \
    softmax histogram stencil scan; do
    case "$example" in *:*) ref="examples/kernels/$example" ;; *) ref="examples/kernels/$example.py" ;; esac
    part "check $example" 60 examples.txt "$PYTHON" -m suanli.cli kernel check "$ref" --device cuda:0
  done
  part "tune matmul" 180 examples.txt "$PYTHON" -m suanli.cli kernel tune examples/kernels/matmul.py
fi
if wanted kernels; then
  part kernels "$((KERNELS_S + 60))" kernels.txt "$PYTHON" -m benchmarks.kernels --append \
    --most 12 --shapes 1 --budget "$KERNELS_S" --out "$OUT"
fi
if wanted optimize; then
  for case in "resnet50 latency 1" "resnet50 throughput 64" "bert-base latency 1" \
    "gpt2-small latency 1"; do
    read -r model goal batch <<< "$case"
    part "optimize $case" 150 "optimize-$model-b$batch.json" "$PYTHON" -m suanli.cli optimize \
      "$model" --for "$goal" --batch "$batch" --budget 90 --json
  done
fi
cat "$OUT/parts.tsv"
