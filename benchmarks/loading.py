"""How fast one worker loads, beside the time of merely decoding the same files.

    python benchmarks/loading.py --data-root DATA [--output loading.json]

For each video set in DATA, and for ImageNet: items per second of the loader of train.py (one worker, which here is this
process, on one thread), with the augmentation and without, and of Pillow decoding the same files to RGB. The three take
turns, ten times over the same items; the table has the medians.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import torch
from PIL import Image
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from timing import Way, quartiles, take_turns  # noqa: E402

from data import FlowAugmentation, FramePairs, TwoViews, make_loader  # noqa: E402
from engine.faults import run_command  # noqa: E402
from sources.training_sets import VIDEO_SETS, ImageNet, find_video_set  # noqa: E402


def one_number(*images: torch.Tensor) -> torch.Tensor:
    """In place of an augmentation; frames themselves could not be stacked, as their sizes may differ."""
    return sum(image.flatten()[0] for image in images)


def decode_images(paths: list[Path]) -> None:
    for path in paths:
        with Image.open(path) as image:
            image.convert("RGB")


def every_nth(items: list, count: int) -> list:
    """About `count` of the items, a multiple of 8, spread over all of them: every round reads each of them once."""
    count = min(count, len(items)) // 8 * 8 or len(items)
    return items[:: len(items) // count][:count]


def measure(decode: Way, dataset: Dataset, augmentation: Callable, repeats: int) -> dict[str, float]:
    """The median milliseconds per item of decoding, loading, and loading with the augmentation."""
    batch = min(len(dataset), 8)

    def load(transform: Callable) -> Way:
        loader = make_loader(dataset, transform, batch)
        return lambda: list(islice(loader, len(dataset) // batch))

    ways = {"decode": decode, "load": load(one_number), "load and augment": load(augmentation)}
    seconds = take_turns(ways, repeats, torch.device("cpu"), warmup=1)
    return {name: 1e3 * quartiles(values).median / len(dataset) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--crop", type=int, nargs=2, default=(384, 832))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--items", type=int, default=24, help="pairs of a set per round; of images four times as many")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, help="the numbers as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)

    rows = {}
    for name in VIDEO_SETS:
        clips, _ = find_video_set(name, arguments.data_root)
        if clips:
            pairs = FramePairs(clips)
            pairs.pairs = every_nth(pairs.pairs, arguments.items)
            frames = [pairs.clips[number].frames[place] for number, *places in pairs.pairs for place in places]
            augmentation = FlowAugmentation(arguments.crop, enlarge=True)
            rows[name] = measure(partial(decode_images, frames), pairs, augmentation, arguments.repeats) | {
                "unit": "pair"
            }
    try:
        images = ImageNet(arguments.data_root)
    except FileNotFoundError as error:
        print(error)
    else:
        images.samples = every_nth(images.samples, 4 * arguments.items)
        decode = partial(decode_images, [path for path, _ in images.samples])
        rows["imagenet"] = measure(decode, images, TwoViews(arguments.image_size), arguments.repeats) | {
            "unit": "image"
        }

    columns = f"{'decode':>9}{'load':>9}{'ratio':>7}{'load + augment':>16}{'ratio':>7}{'per second':>13}"
    print(f"{'ms for one item':16}{columns}")
    for name, row in rows.items():
        decode, load, augment, unit = row.values()
        ratios = f"{load:9.2f}{load / decode:7.2f}{augment:16.2f}{augment / decode:7.2f}"
        print(f"{name:16}{decode:9.2f}{ratios}{1e3 / augment:8.1f} {unit}s")
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
