"""How fast one worker loads, beside the time that merely decoding the same files takes.

    python benchmarks/loading.py --data-root DATA [--output loading.json]

For each data set of video in DATA, and for ImageNet: items per second of the loader that train.py uses (one worker: all
in this process, on one thread), with the augmentation and without, and of Pillow decoding the same files to RGB and
nothing else. The three take turns, ten times over the same items; the median is told. A film is decoded by OpenCV, the
frames of one pair after the other, over all of it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import cv2
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import FlowAugmentation, FramePairs, TwoViews, make_loader  # noqa: E402
from sources.training_sets import VIDEO_SETS, ImageNet, find_video_set  # noqa: E402


def first_of_two(image_1: torch.Tensor, image_2: torch.Tensor) -> torch.Tensor:
    """No augmentation; one number instead of the frames, whose sizes may differ."""
    return image_1.flatten()[0] + image_2.flatten()[0]


def first(image: torch.Tensor) -> torch.Tensor:
    return image.flatten()[0]


def decode_images(paths: list[Path]) -> None:
    for path in paths:
        with Image.open(path) as image:
            image.convert("RGB")


def decode_video(path: Path, frames: list[int]) -> None:
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    for frame in frames:
        if video.get(cv2.CAP_PROP_POS_FRAMES) != frame:
            video.set(cv2.CAP_PROP_POS_FRAMES, frame)
        video.read()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each, taken in turns; the first round warms up."""
    rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(each[name] for each in rounds) for name in works}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--crop", type=int, nargs=2, default=(384, 832))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--items", type=int, default=24, help="pairs of a set in a round; of images four times as many")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, help="the numbers as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)

    rows = {}

    def add(name: str, unit: str, decode: Callable[[], object], dataset, plain, augmentation, count: int) -> None:
        def load(transform) -> Callable[[], object]:
            batch = min(count, 8)
            loader = make_loader(dataset, transform, batch)
            return lambda: list(islice(loader, count // batch))

        works = {"decode": decode, "load": load(plain), "load and augment": load(augmentation)}
        times = {key: 1e3 * value / count for key, value in compare(works, arguments.repeats).items()}
        rows[name] = {"unit": unit, "milliseconds": times, "per_second": 1e3 / times["load and augment"]}

    for name in VIDEO_SETS:
        found = find_video_set(name, arguments.data_root)
        if not found:
            continue
        pairs = FramePairs(found.clips)
        count = min(arguments.items, len(pairs)) // 8 * 8 or len(pairs)
        pairs.pairs = pairs.pairs[:: len(pairs) // count][:count]  # every round reads the same files, each pair once
        clips = [(pairs.clips[number], places) for number, *places in pairs.pairs]
        if isinstance(clips[0][0].frames, range):
            path, frames = clips[0][0].path, [clip.frames[place] for clip, places in clips for place in places]
            decode = lambda path=path, frames=frames: decode_video(path, frames)  # noqa: E731
        else:
            paths = [clip.frames[place] for clip, places in clips for place in places]
            decode = lambda paths=paths: decode_images(paths)  # noqa: E731
        add(name, "pair", decode, pairs, first_of_two, FlowAugmentation(arguments.crop, enlarge=True), count)
    try:
        images = ImageNet(arguments.data_root)
    except FileNotFoundError as error:
        print(error)
    else:
        count = min(4 * arguments.items, len(images)) // 8 * 8 or len(images)
        images.samples = images.samples[:: len(images) // count][:count]
        paths = [Path(path) for path, _ in images.samples]
        add("imagenet", "image", lambda: decode_images(paths), images, first, TwoViews(arguments.image_size), count)

    titles = f"{'decode':>9}{'load':>9}{'ratio':>7}{'load + augment':>16}{'ratio':>7}{'per second':>13}"
    print(f"{'ms for one item':16}{titles}")
    for name, row in rows.items():
        decode, load, augment = row["milliseconds"].values()
        print(
            f"{name:16}{decode:9.2f}{load:9.2f}{load / decode:7.2f}{augment:16.2f}{augment / decode:7.2f}"
            f"{row['per_second']:8.1f} {row['unit']}s"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
