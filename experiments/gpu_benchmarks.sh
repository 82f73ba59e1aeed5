#!/usr/bin/env bash
# Every benchmark on one GPU, in parts that each fit into ten minutes; needs .pack/wheels (gpu_pack.sh).
# Usage: bash experiments/gpu_benchmarks.sh OUT [NAMES of benchmarks/run.py]
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 && shift
if ls .pack/wheels/*.whl > /dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site .pack/wheels/*.whl
  export PYTHONPATH=/tmp/site
fi
export PYTHONUNBUFFERED=1
mkdir -p "$out"
python3 benchmarks/run.py --output "$out/benchmarks.json" ${1:+--only "$@"} 2>&1 | tee "$out/benchmarks.txt"
