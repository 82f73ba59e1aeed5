"""The training sets of the paper, where their files lie, and their mix: video for flow, ImageNet for content."""

import json
import os
import re
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from data import IMAGENET_CLASS, VIDEO_EXTENSIONS, Clip, _glob, _is_image, _places, find_files, load_image


class VideoSet(NamedTuple):
    """A data set of video as its archives unpack. Only frames are needed, no true flow."""

    title: str
    url: str
    """Where to get it."""
    example: str
    """How a frame lies below the folder of the set, to be shown."""
    frames: str = ""
    """The same as a pattern; the names of the frames end in their numbers."""
    mark: str = ""
    """A file that tells it from another data set of the same layout; by default any of its frames."""
    left_out: range = range(0)
    """Numbers of frames that stay out of training."""


_FREIBURG = "https://lmb.informatik.uni-freiburg.de/resources/datasets"


_SINTEL = "http://sintel.is.tue.mpg.de/downloads"


_KITTI = "https://www.cvlibs.net/datasets/kitti"


VIDEO_SETS = {
    "kitti_raw": VideoSet(
        "KITTI raw",
        f"{_KITTI}/raw_data.php",
        "2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000000.png",
        "2011_*/*_sync/image_02/data/*",
    ),
    # True flow is known from frame 10 to 11 of each scene: 9 to 12 stay out of training (field).
    "kitti2012": VideoSet(
        "KITTI 2012's multiview extension",
        f"{_KITTI}/eval_stereo_flow.php",
        "training/colored_0/000000_00.png to 000000_20.png",
        "*ing/colored_0/*_*",
        mark="training/colored_0/*_00.*",
        left_out=range(9, 13),
    ),
    "kitti2015": VideoSet(
        "KITTI 2015's multiview extension",
        f"{_KITTI}/eval_scene_flow.php",
        "training/image_2/000000_00.png to 000000_20.png",
        "*ing/image_2/*_*",
        mark="training/image_2/*_00.*",
        left_out=range(9, 13),
    ),
    "sintel_clean": VideoSet("Sintel", _SINTEL, "training/clean/alley_1/frame_0001.png", "t*/clean/*/frame_*"),
    "sintel_final": VideoSet("Sintel", _SINTEL, "training/final/alley_1/frame_0001.png", "t*/final/*/frame_*"),
    "sintel_raw": VideoSet(
        "the film", "https://durian.blender.org/download", "sintel.mp4; or frames as sintel_raw/SCENE/frame_0001.png"
    ),
    "chairs": VideoSet(
        "FlyingChairs",
        f"{_FREIBURG}/FlyingChairs.en.html",
        "data/00001_img1.ppm and data/00001_img2.ppm",
        "data/*_img?.*",
    ),
    "things_clean": VideoSet(
        "FlyingThings3D",
        f"{_FREIBURG}/SceneFlowDatasets.en.html",
        "frames_cleanpass/TRAIN/A/0000/left/0006.png",
        "frames_cleanpass/TRAIN/*/*/*/*",
    ),
    "things_final": VideoSet(
        "FlyingThings3D",
        f"{_FREIBURG}/SceneFlowDatasets.en.html",
        "frames_finalpass/TRAIN/A/0000/left/0006.png",
        "frames_finalpass/TRAIN/*/*/*/*",
    ),
    "hd1k": VideoSet(
        "HD1K",
        "http://hci-benchmark.iwr.uni-heidelberg.de",
        "hd1k_input/image_2/000000_0000.png",
        "hd1k_input/image_2/*_*",
    ),
}
"""The sets of the paper's flow task by name."""


class Found(NamedTuple):
    """A data set that was found."""

    path: Path
    """Its folder, the first if there are several; or the film."""
    clips: list[Clip]
    notes: list[str]
    """A line for each gap in the numbers of its frames, and where it lies in several folders."""


def find_video_set(name: str, root: Path) -> Found | None:
    """One of VIDEO_SETS below `root`, in it or up to two folders deeper; None if it is not there.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a frame without a number, twice, or alone in its clip; a film that cannot be decoded.
    """
    wanted = VIDEO_SETS[name]
    places = _places(Path(root))
    if name == "sintel_raw":
        found = _find_film(places)
    else:
        folders = [place for place in places if _glob(place, wanted.mark or wanted.frames)]
        frames = [path for folder in folders for path in _glob(folder, wanted.frames) if _is_image(path)]
        found = Found(folders[0], *_sequences(frames, wanted.left_out)) if folders else None
        if len(folders) > 1:
            found.notes.append(f"{name} lies in several folders, all are taken: {', '.join(map(str, folders))}")
    if found and not found.clips:
        raise ValueError(f"{found.path}: no two frames of {wanted.title} follow each other; unpack the archive again")
    return found


def _sequences(paths: list[Path], left_out: range = range(0)) -> tuple[list[Clip], list[str]]:
    """Clips of frames whose numbers follow each other without a gap, and a line for each gap.

    The number is the digits at the end of a file's name; what stands before them tells the clip. `paths` are sorted.
    """
    sequences: dict[tuple[Path, str], dict[int, Path]] = {}
    for path in paths:
        prefix, digits = re.fullmatch(r"(.*?)(\d*)", path.stem).groups()
        if not digits:
            raise ValueError(f"{path}: its name does not end in the number of the frame; rename or remove it")
        frames = sequences.setdefault((path.parent, prefix), {})
        if int(digits) in frames:
            raise ValueError(f"{path}: this frame is there twice, see {frames[int(digits)].name}; remove one of them")
        frames[int(digits)] = path
    clips, notes = [], []
    for (folder, _), frames in sequences.items():
        numbers = sorted(frames)
        if len(numbers) == 1:
            path = frames[numbers[0]]
            raise ValueError(f"{path}: the only frame of its clip, a pair needs two; unpack the archive again")
        for one, following in pairwise(numbers):
            if following > one + 1:
                lost = following - one - 1
                notes.append(
                    f"{frames[one]}: {lost} frame{'s are' if lost > 1 else ' is'} missing between it and "
                    f"{frames[following].name}, no pair is made across; unpack the archive again"
                )
        kept = [number for number in numbers if number not in left_out]
        for _, run in groupby(enumerate(kept), key=lambda place_and_number: place_and_number[1] - place_and_number[0]):
            run = [frames[number] for _, number in run]
            if len(run) > 1:
                clips.append(Clip(folder, run))
    return clips, notes


def _find_film(places: list[Path]) -> Found | None:
    """Sintel as a film: a file whose name holds "sintel", or folders of frames in "sintel_raw" (or movie, or film)."""
    for place in places:
        if re.search(r"sintel.*(raw|movie|film)", place.name, re.IGNORECASE):
            frames = find_files(place, IMG_EXTENSIONS)
            if frames:
                return Found(place, *_sequences(frames))
        for path in _glob(place, "*"):
            if path.suffix.lower() in VIDEO_EXTENSIONS and "sintel" in path.name.lower():
                return Found(path, [Clip(path, shot) for shot in shots(path) if len(shot) > 1], [])
    return None


def shots(path: Path) -> list[range]:
    """The numbers of the frames of each shot of a film: no pair may lie across a cut.

    They are found once (some minutes for a film), by PySceneDetect, and kept beside the film in NAME.shots.json.
    ValueError if the film cannot be decoded.
    """
    from scenedetect import ContentDetector, SceneManager  # here: nobody else needs the 0.2 s that this takes
    from scenedetect.backends.opencv import VideoCaptureAdapter

    kept, size = path.with_name(path.name + ".shots.json"), path.stat().st_size
    try:
        known = json.loads(kept.read_text())
        if known["size"] == size:
            return [range(*shot) for shot in known["shots"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not ours: made anew
    manager = SceneManager()
    manager.add_detector(ContentDetector())
    unreadable = f"{path}: cannot be decoded; convert the film, or use its frames as a folder"
    try:
        # Through an adapter, which counts frames; PySceneDetect's own reader derives their numbers from their times.
        manager.detect_scenes(VideoCaptureAdapter(cv2.VideoCapture(str(path))), show_progress=True)
    except (ValueError, OSError) as error:
        raise ValueError(unreadable) from error
    found = manager.get_scene_list(start_in_scene=True)
    if not found:
        raise ValueError(unreadable)
    cut = [(start.frame_num, end.frame_num) for start, end in found]
    with suppress(OSError):  # a folder that cannot be written to: found again the next time
        temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps({"size": size, "shots": cut}) + "\n")
            os.replace(temporary, kept)
        finally:
            temporary.unlink(missing_ok=True)
    return [range(*shot) for shot in cut]


class Mix(Dataset):
    """Several sets of pairs as one, each with its number of repeats in a pass.

    Args:
        parts: the sets by name.
        repeats: how often a pass goes through each, 1 or more.
    """

    def __init__(self, parts: dict[str, Dataset], repeats: dict[str, int]):
        self.parts, self.repeats = parts, {name: repeats[name] for name in parts}
        self.lengths = {name: len(part) * repeats[name] for name, part in parts.items()}

    def __len__(self) -> int:
        """Of a pass, with its repeats."""
        return sum(self.lengths.values())

    def _find(self, index: int) -> tuple[Dataset, int]:
        """The set that an item is of, and its place there."""
        for name, part in self.parts.items():
            if index < self.lengths[name]:
                return part, index % len(part)
            index -= self.lengths[name]
        raise IndexError("beyond the end of the mix")

    def __getitem__(self, index: int) -> Any:
        part, place = self._find(index)
        return part[place]

    @property
    def file_count(self) -> int:
        return sum(part.file_count for part in self.parts.values())

    def name(self, index: int) -> str:
        part, place = self._find(index)
        return part.name(place)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The indices of a pass, shuffled: each set comes at an even rate, and wholly before any of it comes again."""
        times = []
        for name, part in self.parts.items():
            places = np.concatenate([k * len(part) + rng.permutation(len(part)) for k in range(self.repeats[name])])
            times.append((places + rng.random(len(places))) / len(places))
        return np.argsort(np.concatenate(times))


class ImageNet(ImageFolder):
    """The training images of ImageNet-1k (or any part of it in the same layout), as uint8 (3, h, w) RGB.

    Looks for folders of classes (n01440764, ...) below `root`: in a folder whose name begins with ImageNet or ILSVRC,
    there in train/ (as torchvision unpacks it), Data/CLS-LOC/train/ (the archive of Kaggle) or directly; or so in
    `root` itself, whatever its name.

    FileNotFoundError if there is none, or a class is empty; BadFile on reading a broken image.
    """

    def __init__(self, root: str | Path):
        root = Path(root)
        places = [
            place / below
            for place in _places(root)
            if place == root or re.match("imagenet|ilsvrc", place.name, re.IGNORECASE)
            for below in ("train", "Data/CLS-LOC/train", "")
        ]
        folder = next((place for place in places if place.is_dir() and self.find_classes(place)[0]), None)
        if folder is None:
            raise FileNotFoundError(
                f"{root}: no ImageNet in it; expected ImageNet/train/n01440764/*.JPEG (https://image-net.org/download)"
            )
        try:
            super().__init__(folder, loader=load_image, is_valid_file=_is_image)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder}: {error}; unpack these classes, or remove their folders") from error

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The folders named like a class, whatever lies beside them."""
        names = sorted(entry.name for entry in os.scandir(directory) if IMAGENET_CLASS.fullmatch(entry.name))
        return names, {name: number for number, name in enumerate(names)}

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return super().__getitem__(index)[0]

    @property
    def file_count(self) -> int:
        return len(self)

    def name(self, index: int) -> str:
        return self.samples[index][0]
