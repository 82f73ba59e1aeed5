#!/usr/bin/env bash
# The full-size model on one GPU within ten minutes, five of them training; needs .pack/ (gpu_pack.sh). What is done by
# then lies in OUT. Usage: bash experiments/gpu.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"
python3 -m pip install -q --no-index --no-deps --target /tmp/site .pack/wheels/*.whl
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1
mkdir -p /tmp/data && for part in .pack/*.tar; do tar -xf "$part" -C /tmp/data; done
# A checkpoint has 2 GB: one at the end of an epoch is enough.
common=(paper --workers 12 --checkpoint-every 100000 --keep-checkpoints 1 --epochs 10 --flow-start-epoch 0
  --warmup-epochs 0.5 --mask-warmup-epochs 3 --crop 192 256
  --video-batch 16 --image-batch 256 --image-size 128 --estimator-learning-rate 3e-4
  --loss.flow-balance 4 --loss.smoothness 2.5 --loss.regression 0.05 --loss.cycle 0.02
  --loss.variance 0.02 0.02 0.02 0.02 0.02 0.02 --loss.covariance 0.001 0.001 0.001 0.001 0.001 0.001)
keep() { tar --exclude="*.pt" -czf "$out/$1.tar.gz" -C /tmp "$1"; }

# A run that is stopped leaves the checkpoint of its last step (timeout then returns 124).
timeout 170 python3 train.py "${common[@]}" --steps-per-epoch 100 --output-dir /tmp/shapes || [ $? -eq 124 ]
keep shapes
timeout 150 python3 train.py "${common[@]}" --steps-per-epoch 60 --init /tmp/shapes/checkpoint.pt \
  --video-dir /tmp/data/davis --image-dir /tmp/data/train --output-dir /tmp/real || [ $? -eq 124 ]
keep real
for measure in "flow --data-root /tmp/data/Middlebury" "table1 --workers 8"; do
  for run in real shapes; do
    # shellcheck disable=SC2086
    python3 evaluate.py $measure --model /tmp/$run/checkpoint.pt --output-dir "/tmp/$run/${measure%% *}" || echo "failed: $measure of $run"
    keep $run
  done
done
