#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, on a machine that may have no network: builds the extension in place, then measures
# and tests in steps, the most telling first. Each step has a time limit and leaves its own files, so that whatever has
# run is worth having when the machine has to be given back.
#
#     benchmarks/device/run.sh OUTPUT_FOLDER [STEP …]
#
# Steps: kernels clocks overhead tests serving split layers calibration; all of them by default, in a quarter of an hour or so.
# DEVICE=cpu rehearses them on a machine without a GPU. PYTHON names another interpreter than python3.
# Needs g++ and a Python that has PyTorch, torchvision, NumPy, SciPy, scikit-learn, requests, pytest and hypothesis;
# the tests of a server, serving and split need zstandard, starlette, uvicorn and httptools, too. LITSERVE names a Python
# that has LitServe, for serving.
set -uo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: $0 OUTPUT_FOLDER [STEP …]" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
steps=("$@")
[[ ${#steps[@]} -gt 0 ]] || steps=(kernels clocks overhead tests serving split layers calibration)
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

run() { # run NAME SECONDS COMMAND…: one step, its output in NAME.txt
  local name=$1 limit_s=$2 begin_s=$SECONDS status=0
  shift 2
  echo "== $name (at most $limit_s s)"
  timeout --kill-after=10 "$limit_s" "$@" 2>&1 | tee "$out/$name.txt" || status=$?
  [[ $status -eq 0 ]] || failed+=("$name")
  echo "$name: exit status $status after $((SECONDS - begin_s)) s" | tee -a "$out/steps.txt"
  return "$status"
}

environment() {
  uname -a
  "$python" -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda, torch.cuda.is_available())'
  nvidia-smi || echo "nvidia-smi fails"
  "$python" -m pip list 2>/dev/null | grep -iE '^(torch|numpy|scipy|nvidia-cuda-cupti)'
  return 0
}

: >"$out/steps.txt"
environment 2>&1 | tee "$out/environment.txt"
run build 120 env TORCHSURGEON_BUILD_EXT=1 "$python" setup.py -q build_ext --inplace || exit 1
measure=("$python" -m benchmarks.device.measure --device "$device" --out "$out")
# A CPU takes a hundred times as long as a GPU for these models, and a rehearsal needs no steady figures.
[[ $device == cuda ]] || measure+=(--rounds 5)
for step in "${steps[@]}"; do
  case $step in
    kernels | clocks | overhead) run "$step" 75 "${measure[@]}" --step "$step" ;;
    layers) run "$step" 240 "${measure[@]}" --step "$step" ;; # joules take long: a GPU's power is read every 100 ms
    tests)
      mapfile -t files < <(grep -rlE 'mark\.cuda' tests --include='test_*.py')
      run tests 120 "$python" -m pytest -p no:cacheprovider -m cuda -v "${files[@]}"
      ;;
    serving)
      run serving 240 "$python" -m benchmarks.server_rivals --device "$device" --rounds 3 --seconds 1 \
        ${LITSERVE:+--litserve "$LITSERVE"} --out "$out/serving.json"
      ;;
    split) run split 300 "$python" -m benchmarks.device.split --device "$device" --rounds 3 --out "$out/split.json" ;;
    calibration)
      run calibration 150 "$python" -m benchmarks.prediction --device "$device" --budget 60 --turns 1 \
        --keep "$out/calibration.json" --out "$out/prediction.json" --models alexnet resnet18 mobilenet_v3_large vit_b_16
      ;;
    *)
      echo "there is no step $step" >&2
      exit 2
      ;;
  esac
done
[[ ${#failed[@]} -eq 0 ]] || { echo "failed: ${failed[*]}" && exit 1; }
