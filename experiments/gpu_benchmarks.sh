#!/usr/bin/env bash
# The benchmarks on one GPU, all or those named; needs .whl/ (gpu_pack.sh) where packages are missing.
# Usage: bash experiments/gpu_benchmarks.sh OUT [NAMES of benchmarks/run.py]
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 && shift
if ls .whl/*.whl > /dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site .whl/*.whl
  export PYTHONPATH=/tmp/site
fi
export PYTHONUNBUFFERED=1
mkdir -p "$out"
python3 benchmarks/run.py --output "$out/benchmarks.json" ${1:+--only "$@"} 2>&1 | tee "$out/benchmarks.txt"
