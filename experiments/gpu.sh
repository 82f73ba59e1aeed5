#!/usr/bin/env bash
# Trains the full-size model on one GPU of a machine without a network, 1,000 steps on MovingShapes, 600 on real video,
# then measures it. Needs .pack/ and .whl/ (gpu_pack.sh). The runs are in runs/gpu; OUT gets all but the checkpoints.
# Usage: bash experiments/gpu.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 runs=runs/gpu
mkdir -p "$out" $runs/data $runs/site
trap 'tar --exclude="*.pt" --exclude=data --exclude=site -cf - -C $runs . | tar -xf - -C "$out"' EXIT
python3 -m pip install -q --no-index --no-deps --upgrade --target $runs/site .whl/*.whl
export PYTHONPATH=$PWD/$runs/site PYTHONUNBUFFERED=1
for part in .pack/*.tar; do tar -xf "$part" -C $runs/data; done
# A checkpoint has 2 GB: the one at the end of each epoch is enough.
common=(paper --workers 12 --checkpoint-every 100000 --epochs 10 --flow-start-epoch 0
  --warmup-epochs 0.5 --mask-warmup-epochs 3 --crop 192 256
  --video-batch 16 --image-batch 256 --image-size 128 --estimator-learning-rate 3e-4
  --loss.flow-balance 4 --loss.smoothness 2.5 --loss.regression 0.05 --loss.cycle 0.02
  --loss.variance 0.02 0.02 0.02 0.02 0.02 0.02 --loss.covariance 0.001 0.001 0.001 0.001 0.001 0.001)

python3 train.py "${common[@]}" --steps-per-epoch 100 --output-dir $runs/shapes
python3 train.py "${common[@]}" --steps-per-epoch 60 --init $runs/shapes/checkpoint.pt \
  --video-dir $runs/data/davis --image-dir $runs/data/train --output-dir $runs/real
for run in shapes real; do
  python3 evaluate.py flow --model $runs/$run/checkpoint.pt --data-root $runs/data/Middlebury \
    --output-dir $runs/$run/flow
  python3 evaluate.py table1 --model $runs/$run/checkpoint.pt --output-dir $runs/$run/table1
done
