#!/usr/bin/env bash
# The benchmarks on one GPU, all or those named. Packages that a machine without a network lacks come from .whl/
# (gpu_pack.sh). To try it without a GPU: DEVICE=cpu. Usage: bash experiments/gpu_benchmarks.sh OUT [NAMES]
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 && shift
mkdir -p "$out" runs/site
if ls .whl/*.whl > /dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --upgrade --target runs/site .whl/*.whl
  export PYTHONPATH=$PWD/runs/site
fi
export PYTHONUNBUFFERED=1
python3 benchmarks/run.py --device "${DEVICE:-cuda}" --output "$out/benchmarks.json" ${1:+--only "$@"} 2>&1 \
  | tee "$out/benchmarks.txt"
