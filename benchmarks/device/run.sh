#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, on a machine that may have no network: builds the extension in place, runs the tests
# marked cuda, and writes layer times, kernels by layer, overheads, a calibration with its errors, and the environment.
#
#     benchmarks/device/run.sh OUTPUT_FOLDER
#
# Needs g++ and a python3 that has PyTorch for CUDA, torchvision, NumPy, SciPy, scikit-learn, zstandard, pytest and hypothesis. PYTHON names another.
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 OUTPUT_FOLDER" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

echo "[1/5] environment"
{
  uname -a
  "$python" -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda, torch.cuda.is_available())'
  nvidia-smi || echo "nvidia-smi fails"
  "$python" -m pip list 2>/dev/null | grep -iE '^(torch|numpy|scipy|nvidia-cuda-cupti)' || true
} 2>&1 | tee "$out/environment.txt"

echo "[2/5] build"
TORCHSURGEON_BUILD_EXT=1 "$python" setup.py -q build_ext --inplace

echo "[3/5] tests marked cuda"
mapfile -t files < <(grep -rlE "mark\.cuda" tests --include="test_*.py")
status=0
"$python" -m pytest -m cuda -v "${files[@]}" 2>&1 | tee "$out/tests.txt" || status=$?

echo "[4/5] measurements"
"$python" benchmarks/device/measure.py --device cuda --out "$out" 2>&1 | tee "$out/measure.txt" || status=$?

echo "[5/5] calibration, and predictions against it"
"$python" benchmarks/prediction.py --device cuda --budget 240 --turns 2 --keep "$out/calibration.json" \
  --out "$out/prediction.json" --models alexnet vgg16 resnet18 resnet50 mobilenet_v2 mobilenet_v3_large \
  efficientnet_b0 densenet121 googlenet squeezenet1_1 vit_b_16 swin_t 2>&1 | tee "$out/prediction.txt" || status=$?

exit "$status"
