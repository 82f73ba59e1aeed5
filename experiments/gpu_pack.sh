#!/usr/bin/env bash
# Packs the Python packages that a GPU machine without a network may lack into .whl/ (git ignores it), for gpu.sh.
# Usage, on a machine with a network: bash experiments/gpu_pack.sh
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf .whl
# What an image with Python 3.12, torch, torchvision, numpy, OpenCV, tqdm, TensorBoard and safetensors lacks.
pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp -d .whl \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  beartype tyro docstring-parser typeguard lightly lightly-utils kornia kornia-rs ptlflow jsonargparse loguru \
  typeshed-client
du -sm .whl
