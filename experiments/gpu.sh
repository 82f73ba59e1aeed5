#!/usr/bin/env bash
# The smoke run (gpu_smoke.py) on one GPU of a machine without a network; wheels that it may lack come from .whl/
# (gpu_pack.sh). BENCHMARKS="step parts" runs these of benchmarks/run.py too. To try it without a GPU: DEVICE=cpu.
# Usage: bash experiments/gpu.sh OUT [PARTS]
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 && shift
mkdir -p "$out" runs/site
if ls .whl/*.whl > /dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --upgrade --target runs/site .whl/*.whl
  export PYTHONPATH=$PWD/runs/site
fi
export PYTHONUNBUFFERED=1
trap 'cp runs/smoke/smoke.jsonl "$out/"' EXIT
python3 experiments/gpu_smoke.py runs/smoke ${DEVICE:+--device "$DEVICE"} ${1:+--only "$@"} 2> "$out/errors.txt"
if [ -n "${BENCHMARKS:-}" ]; then
  python3 benchmarks/run.py --device "${DEVICE:-cuda}" --output "$out/benchmarks.json" --only $BENCHMARKS
fi
