#!/usr/bin/env bash
# Packs data for gpu.sh into .pack/, and Python packages that a GPU machine without a network may lack into .whl/ (git
# ignores both). Usage, on a machine with a network: bash experiments/gpu_pack.sh DATA
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "$0")/.."
rm -rf .pack .whl && mkdir -p .pack/davis
for clip in "$data"/DAVIS2016-240p/JPEGImages/240p/*/; do  # every fourth frame
  name=$(basename "$clip")
  mkdir ".pack/davis/$name"
  ls "$clip" | awk 'NR % 4 == 1' | while read -r frame; do cp "$clip$frame" ".pack/davis/$name/"; done
done
tar -cf .pack/davis.tar -C .pack davis && rm -r .pack/davis
tar -cf .pack/tiny.tar -C "$data/TinyImageNet" train
tar -cf .pack/middlebury.tar -C "$data" Middlebury
# What an image with Python 3.12, torch, torchvision, numpy, scipy, OpenCV, tqdm, TensorBoard, timm and lightning lacks.
pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp -d .whl \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  beartype tyro docstring-parser typeguard lightly kornia kornia-rs ptlflow jsonargparse loguru typeshed-client
du -sm .pack .whl
