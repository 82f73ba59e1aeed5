#!/usr/bin/env bash
# The full-size model on one GPU, eight minutes of training; needs .pack/ (gpu_pack.sh). Usage: bash experiments/gpu.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"
python3 -m pip install -q --no-index --no-deps --target /tmp/site .pack/wheels/*.whl
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1
mkdir -p /tmp/data && for part in .pack/*.tar; do tar -xf "$part" -C /tmp/data; done
common=(paper --workers 12 --checkpoint-every 25 --keep-checkpoints 1 --epochs 10 --flow-start-epoch 0 --warmup-epochs 0.5 --mask-warmup-epochs 3
  --video-batch 16 --image-batch 256 --image-size 128 --estimator-learning-rate 3e-4
  --loss.flow-balance 4 --loss.smoothness 2.5 --loss.regression 0.05 --loss.cycle 0.02
  --loss.variance 0.02 0.02 0.02 0.02 0.02 0.02 --loss.covariance 0.001 0.001 0.001 0.001 0.001 0.001)
# A run that is stopped leaves the checkpoint of its last step (timeout then returns 124).
timeout 280 python3 train.py "${common[@]}" --steps-per-epoch 100 --crop 192 256 --output-dir /tmp/shapes || [ $? -eq 124 ]
timeout 240 python3 train.py "${common[@]}" --steps-per-epoch 60 --crop 192 256 --init /tmp/shapes/checkpoint.pt \
  --video-dir /tmp/data/davis --image-dir /tmp/data/train --output-dir /tmp/real || [ $? -eq 124 ]
for run in shapes real; do
  python3 evaluate.py flow --model /tmp/$run/checkpoint.pt --data-root /tmp/data/Middlebury --output-dir /tmp/$run/middlebury
  python3 evaluate.py table1 --model /tmp/$run/checkpoint.pt --workers 8 --output-dir /tmp/$run/table1
  tar --exclude="*.pt" -czf "$out/$run.tar.gz" -C /tmp "$run"
done
