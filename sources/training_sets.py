"""The paper's training sets: where the files of each video set lie, their mix with repeats, and ImageNet.

The paper (Section 4) trains flow on KITTI, Sintel, FlyingChairs, FlyingThings3D and HD1K, and content on ImageNet.
Each set lies one folder below the data root, as its archive unpacks; only frames are needed, no true flow.

    python -m sources.training_sets DATA  # what DATA holds, the mix, and where to download what is missing
"""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision.datasets import ImageFolder

from data import Clip, FramePairs, Transform, is_image, load_image
from sources import MissingSet, read_table, set_folders, split_number, visible_glob

VIDEO_SETS = {row["name"]: row for row in read_table("video_sets.csv")}
"""The sets of the paper's flow task by name: `title`, `url`, and the pattern of their `frames` in the set's own folder.
KITTI's with `is_multiview` have frames from 00 on, and those that are measured stay out of training."""


@dataclass(frozen=True)
class RepeatsConfig:
    """How often a pass repeats each set. KITTI's 100 and 1 are second-hand, the others ours, to balance the sizes."""

    kitti_raw: int = 1
    kitti2012: int = 100
    kitti2015: int = 100
    sintel_clean: int = 100
    sintel_final: int = 100
    sintel_raw: int = 10
    chairs: int = 5
    things_clean: int = 2
    things_final: int = 2
    hd1k: int = 100


def find_video_set(name: str, root: Path) -> tuple[list[Clip], list[str]]:
    """The clips of one of VIDEO_SETS in `root` or a folder in it, and a note for each gap in the numbers of its frames.

    No clips if the set is not there; ValueError if it is there twice, or damaged. The numbers in a clip are
    consecutive; what stands before them in the names of its frames is alike.
    """
    title, pattern, is_multiview = (VIDEO_SETS[name][column] for column in ("title", "frames", "is_multiview"))
    sign = pattern.replace("*_*", "*_00.*") if is_multiview else pattern
    folders = [folder for folder in set_folders(Path(root)) if visible_glob(folder, sign)]
    if not folders:
        return [], []
    if len(folders) > 1:
        raise ValueError(f"{root}: {name} lies in {' and '.join(map(str, folders))}; keep one of them")
    frames_of_clip: dict[tuple[Path, str], dict[int, Path]] = {}
    for path in filter(is_image, visible_glob(folders[0], pattern)):
        prefix, digits = split_number(path)
        frames_of_clip.setdefault((path.parent, prefix), {})[int(digits)] = path
    measured = range(9, 13) if is_multiview else ()  # true flow leads from frame 10 to 11 of each scene (field)
    clips, notes = [], []
    for (folder, _), frames in frames_of_clip.items():
        numbers = sorted(frames)
        if len(numbers) == 1:
            raise ValueError(f"{frames[numbers[0]]}: the only frame of its clip; unpack the archive again")
        for before, after in pairwise(numbers):
            if after > before + 1:
                notes.append(f"{frames[before]}: the next frame is {frames[after].name}; no pair spans this gap")
        kept = np.array([number for number in numbers if number not in measured])
        for run in np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1):
            if len(run) > 1:
                clips.append(Clip(folder, [frames[number] for number in run]))
    if not clips:
        raise ValueError(f"{folders[0]}: no two frames of {title} are consecutive; unpack the archive again")
    return clips, notes


class Mix(ConcatDataset):
    """Several sets of pairs as one, each repeated a number of times in a pass."""

    def __init__(self, parts: dict[str, Dataset], repeats: dict[str, int], gaps: Sequence[str] = ()):
        super().__init__([part for name, part in parts.items() for _ in range(repeats[name])])
        self.parts, self.repeats, self.gaps = parts, repeats, gaps
        self.file_count = sum(part.file_count for part in parts.values())

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """A shuffled pass: each set comes at an even rate, and all of it before any of it comes again."""
        times = []
        for name, part in self.parts.items():
            places = np.concatenate([k * len(part) + rng.permutation(len(part)) for k in range(self.repeats[name])])
            times.append((places + rng.random(len(places))) / len(places))
        return np.argsort(np.concatenate(times))

    @property
    def note(self) -> str:
        """A table of the sets in the mix, and a note on the gaps in their numbering."""
        lines = [f"{'set':13} {'clips':>7} {'pairs':>9} {'repeats':>8} {'share':>7}  path"]
        for name, part in self.parts.items():
            repeats, path = self.repeats[name], os.path.commonpath([clip.path for clip in part.clips])
            share = f"{len(part) * repeats / len(self):7.2%}"
            lines.append(f"{name:13} {len(part.clips):7,} {len(part):9,} {repeats:8} {share}  {path}")
        lines += [f"note: {len(self.gaps)} gap(s) in the numbers of frames; {gap}" for gap in self.gaps[:1]]
        return "\n".join(lines)


def open_mix(data_root: Path, sets: tuple[str, ...], repeats: RepeatsConfig, transform: Transform | None) -> Mix:
    """The video sets in `data_root` as one. `sets` are names of VIDEO_SETS, or what names begin with; all if empty.

    MissingSet if none of the sets is there, or one that is named in full is not; ValueError if no set has such a name,
    or a set is damaged.
    """
    for wanted in sets:
        if not any(name.startswith(wanted) for name in VIDEO_SETS):
            raise ValueError(f"--sets {wanted}: no such data set; choose from {', '.join(VIDEO_SETS)}")
    parts, gaps, chosen = {}, [], [name for name in VIDEO_SETS if not sets or name.startswith(tuple(sets))]
    for name in chosen:
        clips, notes = find_video_set(name, data_root)
        if clips:
            parts[name] = FramePairs(clips, transform=transform)
            gaps += notes
        elif name in sets:
            raise MissingSet(f"{data_root}: does not hold {how_to_get(name)}")
    if not parts:
        command = f"python -m sources.training_sets {data_root}"
        raise MissingSet(f"{data_root}: holds none of {', '.join(chosen)}; `{command}` says where to download them")
    return Mix(parts, asdict(repeats), gaps)


def how_to_get(name: str) -> str:
    """Where to download a video set, and its layout."""
    layout = "{name} ({title}): download it from {url}, unpack it to ANY_FOLDER/{frames}"
    return layout.format_map(VIDEO_SETS[name])


class ImageNet(ImageFolder):
    """The training images of ImageNet-1k (or any part of it in the same layout), as uint8 (3, h, w) RGB.

    In `root`, or in a folder of it whose name begins with ImageNet or ILSVRC, the classes (n01440764, ...) lie in
    train/, in (ILSVRC/)Data/CLS-LOC/train/ as Kaggle's archive unpacks, or directly.
    """

    def __init__(self, root: str | Path):
        places = [
            folder / below
            for folder in set_folders(Path(root))
            if folder == Path(root) or re.match("imagenet|ilsvrc", folder.name, re.IGNORECASE)
            for below in ("train", "Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/train", "")
        ]
        place = next((place for place in places if place.is_dir() and self.find_classes(place)[0]), None)
        if place is None:
            expected = "expected ImageNet/train/n01440764/*.JPEG (image-net.org/download)"
            raise MissingSet(f"{root}: no ImageNet in it; {expected}; or use --image-dir, or --task mjepa")
        try:
            super().__init__(place, loader=load_image, is_valid_file=is_image)
        except FileNotFoundError as error:  # a class without images
            raise FileNotFoundError(f"{place}: {error}; unpack these classes, or remove their folders") from error
        self.file_count = len(self.samples)
        self.note = f"{place}: {self.file_count:,} images in {len(self.classes):,} classes"

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The folders named like a class, whatever lies beside them."""
        names = sorted(entry.name for entry in os.scandir(directory) if re.fullmatch(r"n\d{8}", entry.name))
        return names, {name: number for number, name in enumerate(names)}

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return super().__getitem__(index)[0]


def main(data_root: Path) -> None:
    """Prints what a folder holds: a line for each set in the mix, for the images, and for what is missing."""
    missing = list(VIDEO_SETS)
    with suppress(MissingSet):  # each set is listed as missing below
        mix = open_mix(data_root, (), RepeatsConfig(), None)
        missing = [name for name in VIDEO_SETS if name not in mix.parts]
        print(mix.note)
    try:
        print(ImageNet(data_root).note)
    except MissingSet as error:
        print(f"missing: {error}")
    for name in missing:
        print(f"missing: {how_to_get(name)}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sources.training_sets DATA")
    try:
        main(Path(sys.argv[1]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
