#!/usr/bin/env bash
# Packs what gpu.sh needs into .pack/, and what gpu_benchmarks.sh needs into .whl/ (both ignored by git); each with the
# repository is under 64 MiB. Usage: bash experiments/gpu_pack.sh DATA
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "$0")/.."
rm -rf .pack .whl && mkdir -p .pack/davis .pack/wheels
for clip in "$data"/DAVIS2016-240p/JPEGImages/240p/*/; do
  name=$(basename "$clip")
  mkdir "$PWD/.pack/davis/$name"
  ls "$clip" | awk 'NR % 4 == 1' | while read -r frame; do cp "$clip$frame" ".pack/davis/$name/"; done
done
# One file instead of thousands: a file's size is rounded up in transfer.
tar -cf .pack/tiny.tar -C "$data/TinyImageNet" train
tar -cf .pack/davis.tar -C .pack davis && rm -rf .pack/davis
tar -cf .pack/middlebury.tar -C "$data" Middlebury
# What Python 3.12 with torch, torchvision, numpy, scipy, OpenCV, tqdm, TensorBoard, timm and lightning still lacks.
download() {
  pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "$@"
}
ours=(beartype tyro docstring-parser typeguard)
download -d .pack/wheels "${ours[@]}"
download -d .whl "${ours[@]}" lightly kornia kornia-rs ptlflow jsonargparse loguru typeshed-client
du -sm .pack .whl
