#!/usr/bin/env bash
# The benchmarks on one GPU, all or those named; with .whl/ (gpu_pack.sh) where packages are missing. Where a call may
# take ten minutes, name a few, each time with another OUT. To try it without a GPU: DEVICE=cpu.
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
python3 benchmarks/run.py --device "${DEVICE:-cuda}" --output "$out/benchmarks.json" ${1:+--only "$@"} 2>&1 | tee "$out/benchmarks.txt"
