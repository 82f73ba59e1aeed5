"""Images for training: from files to frames, from frames to pairs and views, their augmentation, and the loader.

The paper trains on video pairs (optical flow) and on image views (VICReg) at once. `VideoPairs` reads pairs of frames
from video files and folders of frames, `ImageFiles` reads images; `FlowAugmentation` and `TwoViews` augment them.
`make_loader` batches them: sharded over processes, endless, and the same whatever the number of workers or the first
step. The data sets of the paper, and the embedded moving shapes, are in sources/.

    loader = make_loader(VideoPairs("clips"), FlowAugmentation((128, 128)), batch_size=8)
    image_1, image_2 = next(iter(loader))  # each (8, 3, 128, 128) float32 in [0, 1]
"""

import io
import math
import os
import random
import re
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # ffmpeg, inside OpenCV, leaves the messages to us
VIDEO_EXTENSIONS = (".mp4", ".avi", ".webm", ".mov", ".mkv", ".m4v")

# --------------------------------------------------------------------------------------------------- files to frames


class MissingSet(FileNotFoundError):
    """A data set that is not in the folder at all, unlike one of which a part is missing."""


class BadFile(ValueError):
    """A file that cannot be used, by its name and the reason. `make_loader` can skip a few of them."""


def natural_key(path: Path | str) -> list[list[str | int]]:
    """Sort key that puts frame2 before frame10, folder by folder."""
    return [[int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", part)] for part in Path(path).parts]


def is_hidden(name: str) -> bool:
    """Whether a system leaves such a file beside those of a data set: .DS_Store, ._frame_0001.png, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(path: str | Path) -> bool:
    """Whether the name is that of an image, and not hidden."""
    return is_image_file(str(path)) and not is_hidden(Path(path).name)


def find_files(root: str | Path, extensions: Sequence[str]) -> list[Path]:
    """Every visible file below `root` with one of the extensions, in natural order; links are followed."""
    root, found = Path(root), []
    if root.is_file():
        return [root] if root.suffix.lower() in extensions else []
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; check the path")

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        above = {path.resolve() for path in (Path(folder), *Path(folder).parents)}  # a link to these would never end
        folders[:] = [name for name in folders if not is_hidden(name) and Path(folder, name).resolve() not in above]
        found += [Path(folder, n) for n in names if n.lower().endswith(tuple(extensions)) and not is_hidden(n)]
    return sorted(found, key=lambda path: (natural_key(path), path))


def size_text(image: Shaped[Tensor, "*batch h w"]) -> str:
    """Width and height, for messages."""
    return f"{image.shape[-1]}x{image.shape[-2]} px"


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image file, opened by Pillow. BadFile if it is damaged, or too small for the size that its header claims."""
    try:
        content = Path(path).read_bytes()  # from an open file, Pillow allocates what the length of a chunk claims
        with Image.open(io.BytesIO(content)) as image:
            # Deflate packs at most 1032 bytes into one, and a byte holds at most 8 pixels. For WebP and AVIF, which
            # may pack better, Pillow's own limit is left (179 million pixels).
            most = len(content) * 1032 * (8 if image.mode in ("1", "L", "P") else 1)
            if image.width * image.height > most and image.format not in ("WEBP", "AVIF"):
                raise ValueError(f"{image.width}x{image.height} pixels cannot lie in it")
            yield image
    except Exception as error:  # Pillow raises a dozen kinds for a damaged file
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise BadFile(f"{path}: not a readable image{reason}; replace or remove it") from error


def load_image(path: str | Path) -> UInt8[Tensor, "3 h w"]:
    """An image file as RGB, upright by its EXIF orientation, 16 bits reduced to 8, without transparency."""
    with open_image(path) as image:
        with suppress(struct.error):  # a damaged note in the EXIF is no reason to lose the picture
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise ValueError("pixels of 32 bits, whose range is not known")
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if "transparency" in image.info:  # straight to RGB, Pillow warns
            image = image.convert("RGBA")
        return F.pil_to_tensor(image.convert("RGB"))


@lru_cache(maxsize=2)
def _open_video(path: Path, process: int) -> cv2.VideoCapture:
    """A decoder; `process` keeps a forked worker from sharing its parent's file position."""
    return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])


@lru_cache(maxsize=4)  # a frame is in two pairs or more
def _video_frame(path: Path, index: int) -> UInt8[Tensor, "3 h w"]:
    video = _open_video(path, os.getpid())
    ahead = index - int(video.get(cv2.CAP_PROP_POS_FRAMES))
    if not 0 <= ahead < 10:  # seeking is slower than reading on: it starts at the last key frame
        video.set(cv2.CAP_PROP_POS_FRAMES, index)
        ahead = 0
    for _ in range(ahead):
        video.grab()
    readable, frame = video.read()
    if not readable:
        raise BadFile(f"{path}: frame {index} cannot be decoded; convert the video, or use its frames as a folder")
    return torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()


def _count_video_frames(path: Path) -> int:
    """The number of frames that can be decoded; 0 if the file is not a video."""
    video = _open_video(path, os.getpid())
    claimed = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    if claimed > 0:  # containers guess: believe it only if that frame is there and is the last
        video.set(cv2.CAP_PROP_POS_FRAMES, claimed - 1)
        if video.grab() and not video.grab():
            return claimed
    video.set(cv2.CAP_PROP_POS_FRAMES, 0)
    return sum(1 for _ in iter(video.grab, False))


class ImageFiles(Dataset):
    """Every image below a folder, in natural order, as uint8 (3, h, w) RGB. BadFile on reading a damaged one."""

    def __init__(self, root: str | Path):
        self.paths = find_files(root, IMG_EXTENSIONS)
        if not self.paths:
            raise FileNotFoundError(f"{root}: no images found; expected {' '.join(IMG_EXTENSIONS)} in it or below")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return load_image(self.paths[index])

    @property
    def file_count(self) -> int:
        return len(self.paths)


# --------------------------------------------------------------------------------------------------- frames to pairs


class Clip(NamedTuple):
    """Consecutive frames: of a folder their files, of a video file their numbers."""

    path: Path
    frames: list[Path] | range


class FramePairs(Dataset):
    """Pairs of frames (i, i + stride) of clips, each uint8 (3, h, w) RGB, or what `transform` makes of the two.

    ValueError for a clip too short for a stride. BadFile on reading a damaged image or frames of different sizes, and
    where the transform raises ValueError.
    """

    def __init__(
        self, clips: Sequence[Clip], strides: Sequence[int] = (1,), transform: Callable[..., Any] | None = None
    ):
        if min(strides) < 1:
            raise ValueError(f"a stride of {min(strides)} frames; strides are 1 or more")
        for path, frames in clips:
            if len(frames) <= max(strides):
                # A single image may lie in a folder beside videos: name the image, not the folder.
                path = frames[0] if len(frames) == 1 and isinstance(frames, list) else path
                raise ValueError(
                    f"{path}: a clip of {len(frames)} frame(s), too short for a stride of {max(strides)}; remove it"
                )
        self.clips, self.transform = clips, transform
        self.pairs = [
            (number, i, i + stride)
            for number, clip in enumerate(clips)
            for stride in strides
            for i in range(len(clip.frames) - stride)
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def file_count(self) -> int:
        """The number of frames, also of those in a video file."""
        return sum(len(clip.frames) for clip in self.clips)

    def __getitem__(self, index: int) -> Any:
        number, *places = self.pairs[index]
        clip = self.clips[number]
        frames = [clip.frames[place] for place in places]
        if isinstance(clip.frames, range):
            image_1, image_2 = (_video_frame(clip.path, frame).clone() for frame in frames)
        else:
            image_1, image_2 = map(load_image, frames)
        if image_1.shape != image_2.shape:
            raise BadFile(
                f"{frames[1]}: {size_text(image_2)}, but {frames[0].name} of the same clip is {size_text(image_1)}; "
                "frames of a clip need one size, put others into a folder of their own"
            )
        try:
            return self.transform(image_1, image_2) if self.transform else (image_1, image_2)
        except ValueError as error:  # the transform does not know which frames it gets
            first, second = (frame.name if isinstance(frame, Path) else frame for frame in frames)
            raise BadFile(f"{clip.path}, frames {first} and {second}: {error}") from error


class VideoPairs(FramePairs):
    """Pairs of frames of every clip below `root`: a folder that directly contains images, or a video file.

    `root` may also be one video file. Seeking in a video decodes from its last key frame: extract its frames before a
    long training. ValueError for a video that cannot be decoded.
    """

    def __init__(self, root: str | Path, strides: Sequence[int] = (1,), transform: Callable[..., Any] | None = None):
        folders: dict[Path, list[Path]] = {}
        for path in find_files(root, IMG_EXTENSIONS):
            folders.setdefault(path.parent, []).append(path)
        clips = [Clip(folder, frames) for folder, frames in folders.items()]
        for path in find_files(root, VIDEO_EXTENSIONS):
            clips.append(Clip(path, range(_count_video_frames(path))))
            if not clips[-1].frames:
                raise ValueError(f"{path}: no frame can be decoded; convert the video or remove it")
        if not clips:
            endings = " ".join(IMG_EXTENSIONS + VIDEO_EXTENSIONS)
            raise FileNotFoundError(f"{root}: no frames found; expected folders of images or video files ({endings})")
        super().__init__(clips, strides, transform)


# ---------------------------------------------------------------------------------------------- labels of every pixel

VOID = 255
"""The class of pixels that do not count."""
PALETTE = np.array(
    [[sum((n >> (3 * k + channel) & 1) << (7 - k) for k in range(8)) for channel in range(3)] for n in range(256)],
    np.uint8,
)
"""The colour of each number in Pascal VOC and DAVIS, (256, 3): its bits, three at a time."""


def read_ids(path: Path, coloured: bool = True) -> UInt8[Tensor, "h w"]:
    """The numbers in an image of labels or masks: palette, grey, or black and white (0 and 1).

    With `coloured`, an image in the colours of PALETTE, or white (255) on black, is converted back into numbers.
    ValueError for other colours, numbers beyond 255, or a damaged image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image of labels")
    with open_image(path) as image:
        mode, values = image.mode, np.array(image.convert("RGB") if image.mode == "RGBA" else image)
    if mode in ("RGB", "RGBA"):
        packed, colours = (x.astype(np.int64) @ (1 << 16, 1 << 8, 1) for x in (values, PALETTE))
        if set(np.unique(packed)) <= {0, 0xFFFFFF}:
            colours[255] = 0xFFFFFF
        order = np.argsort(colours)
        values = order[np.searchsorted(colours[order], packed).clip(max=255)]
        if not coloured or (colours[values] != packed).any():
            raise ValueError(f"{path}: colours where numbers belong; save the numbers as a palette or grey png")
    elif mode not in ("P", "L", "1") and (
        values.ndim != 2 or values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255
    ):
        raise ValueError(f"{path}: an image of mode {mode}; labels are a png of one channel with numbers up to 255")
    return torch.from_numpy(values.astype(np.uint8))


@dataclass(eq=False)
class LabelledImages(Dataset):
    """Images with a class for each pixel: (uint8 (3, h, w) RGB, int64 (h, w)), VOID where a pixel does not count.

    `files` are images and their labels. `tables` give, by the ending of the labels' names, the class of each number
    that may be stored there. `colours`, uint8 (classes, 3), are those of pictures; `notes` are for the report.
    ValueError on reading a damaged file, labels of another size than the image, or a number that is no class.
    """

    files: Sequence[tuple[Path, Path]]
    tables: dict[str, dict[int, int]]
    classes: Sequence[str]
    colours: np.ndarray
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Int64[Tensor, "h w"]]:
        path, labels_path = self.files[index]
        image = load_image(path)
        ids = read_ids(labels_path, coloured=np.array_equal(self.colours, PALETTE[: len(self.colours)]))
        if ids.shape != image.shape[1:]:
            raise ValueError(f"{labels_path}: labels of {size_text(ids)}, but {path} is {size_text(image)}")
        numbers = next(table for ending, table in self.tables.items() if labels_path.name.endswith(ending))
        table = torch.full((256,), -1)
        table[list(numbers)] = torch.tensor(list(numbers.values()))
        labels = table[ids.long()]
        if (labels < 0).any():
            raise ValueError(f"{labels_path}: holds {int(ids[labels < 0][0])}, which is no class of this data set")
        return image, labels


# ------------------------------------------------------------------------------------------------------- augmentation

# OpenCV changes colour and sharpness in a fifth to a tenth of torchvision's time on a CPU, where torchvision would take
# several times as long as decoding the image.


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)  # truncated, not rounded, as in torchvision and Pillow


class _GaussianBlur(v2.GaussianBlur):
    """torchvision's, with a kernel cut at 4 sigma, where its weights no longer change a byte."""

    def transform(self, inpt: UInt8[Tensor, "3 h w"], params: dict[str, Any]) -> UInt8[Tensor, "3 h w"]:
        sigma = params["sigma"][0]
        size = min(self.kernel_size[0], 2 * math.ceil(4 * sigma) + 1)
        image = cv2.GaussianBlur(np.ascontiguousarray(inpt.permute(1, 2, 0).numpy()), (size, size), sigma)
        return torch.from_numpy(image).permute(2, 0, 1)


class ColorJitter(v2.ColorJitter):
    """torchvision's, rounded to bytes after each change as in Pillow, which the official code of VICReg uses."""

    def transform(self, inpt: UInt8[Tensor, "*b 3 h w"], params: dict[str, Any]) -> UInt8[Tensor, "*b 3 h w"]:
        """Changes an image, or each of a batch, by the same factors."""
        if inpt.ndim > 3:
            return torch.stack([self.transform(image, params) for image in inpt])
        image, values = np.ascontiguousarray(inpt.permute(1, 2, 0).numpy()), np.arange(256)
        for number in params["fn_idx"]:
            name = ("brightness", "contrast", "saturation", "hue")[int(number)]
            factor = params[f"{name}_factor"]
            if factor is None:
                continue
            if name == "brightness":
                image = cv2.LUT(image, _to_bytes(factor * values))
            elif name == "contrast":
                mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
                image = cv2.LUT(image, _to_bytes(factor * values + (1 - factor) * mean))
            elif name == "saturation":
                matrix = factor * np.eye(3) + (1 - factor) * np.tile([0.299, 0.587, 0.114], (3, 1))
                image = cv2.transform(image, np.hstack((matrix, np.full((3, 1), -0.499))))  # OpenCV rounds
            else:
                turned = _to_bytes((values + round(256 * factor)) % 256)
                hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
                image = cv2.cvtColor(cv2.merge((cv2.LUT(hue, turned), saturation, value)), cv2.COLOR_HSV2RGB_FULL)
        return torch.from_numpy(image).permute(2, 0, 1)


class TwoViews:
    """VICReg's two random views of a uint8 (3, h, w) RGB image: float32 (3, size, size) in [0, 1].

    The probabilities are those of the official code (its augmentations.py); the model normalises.
    """

    def __init__(self, size: int = 224):
        self.view_1 = self._view(size, blur=1.0, solarize=0.0)
        self.view_2 = self._view(size, blur=0.1, solarize=0.2)

    @staticmethod
    def _view(size: int, blur: float, solarize: float) -> v2.Compose:
        kernel = max(size // 10 | 1, 3)  # 23 at 224
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomApply([ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([_GaussianBlur(kernel, sigma=(0.1, 2.0))], p=blur),
                v2.RandomSolarize(threshold=128, p=solarize),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __call__(self, image: UInt8[Tensor, "3 h w"]) -> tuple[Float[Tensor, "3 s s"], Float[Tensor, "3 s s"]]:
        return self.view_1(image), self.view_2(image)


class FlowAugmentation:
    """The joint augmentation of a pair: one random crop, flips, colour change for both images, and their order swapped.

    Called with two uint8 (3, h, w) RGB images it returns two float32 (3, *crop) images in [0, 1]. A frame smaller than
    the crop is an error, or with `enlarge` enlarged. Brightness, contrast and saturation change by a factor of up to
    1 +- `colour`, hue by a fifth of it.
    """

    def __init__(self, crop: tuple[int, int], enlarge: bool = False, colour: float = 0.2):
        self.crop, self.enlarge = tuple(crop), enlarge
        self.change = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomVerticalFlip(0.5),
                v2.RandomApply([ColorJitter(colour, colour, colour, colour / 5)], p=0.5),
                v2.RandomApply([v2.RandomChannelPermutation()], p=0.1),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __call__(
        self, image_1: UInt8[Tensor, "3 h w"], image_2: UInt8[Tensor, "3 h w"]
    ) -> tuple[Float[Tensor, "3 ch cw"], Float[Tensor, "3 ch cw"]]:
        (h, w), (crop_h, crop_w) = image_1.shape[-2:], self.crop
        factor = max(1.0, crop_h / h, crop_w / w)
        if factor > 1 and not self.enlarge:
            raise ValueError(f"{size_text(image_1)}, smaller than the crop of {crop_w}x{crop_h}; use a smaller --crop")
        # The largest window of the crop's shape, at random, from both.
        window_h, window_w = (max(min(round(n / factor), most), 1) for n, most in ((crop_h, h), (crop_w, w)))
        top, left = (int(torch.randint(0, n + 1, ())) for n in (h - window_h, w - window_w))
        cut = [F.crop(image, top, left, window_h, window_w) for image in (image_1, image_2)]
        # One tensor, since transforms draw once per call: both images change alike. Its memory has the channels last,
        # as decoders leave it, which makes resizing three times as fast.
        pair = torch.stack([image.permute(1, 2, 0) for image in cut]).permute(0, 3, 1, 2)
        pair = F.resize(pair, list(self.crop), antialias=True)
        if torch.rand(()) < 0.5:
            pair = pair.flip(0)
        return tuple(self.change(pair))


# ------------------------------------------------------------------------------------------------------------- loader


class Stream(NamedTuple):
    """Which part of the endless stream of batches a process loads; the seed determines order and augmentation."""

    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start_step: int = 0


class ShardedStream(Sampler):
    """One process's part of an endless, shuffled walk through `length` items, as (position, index).

    `position` counts the samples of all processes, `batch_size` those of one process in a step. Each pass over the data
    is another permutation, given by the seed: every item comes once per pass, whatever the number of processes, and a
    run can start at any step. `order` draws a permutation of `length` items from a generator (see `Mix.order`).
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        stream: Stream = Stream(),
        order: Callable[[np.random.Generator], np.ndarray] | None = None,
    ):
        self.length, self.batch_size, self.stream = length, batch_size, stream
        order = order or (lambda rng: rng.permutation(length))
        self.order_of_pass = lru_cache(maxsize=1)(lambda number: order(np.random.default_rng((stream.seed, number))))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in count(self.stream.start_step):
            yield from self.step(step)

    def step(self, number: int) -> Iterator[tuple[int, int]]:
        """What this process loads in that step."""
        first = (number * self.stream.world_size + self.stream.rank) * self.batch_size
        for position in range(first, first + self.batch_size):
            yield position, int(self.order_of_pass(position // self.length)[position % self.length])


class Seeded(Dataset):
    """Reads `dataset[index]` and transforms it, with random numbers that depend on (seed, position) alone.

    So an item depends neither on the worker nor on the process that reads it, and the caller's generators (of Python,
    NumPy and torch on the CPU) keep their states. The transform takes an image, or the two images of a pair.
    """

    def __init__(self, dataset: Dataset, transform: Callable[..., Any] | None = None, seed: int = 0):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        states = random.getstate(), np.random.get_state()
        number = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            random.seed(number)
            np.random.seed(number)
            torch.default_generator.manual_seed(number)
            try:
                item = self.dataset[index]
                if self.transform is None:
                    return item
                return self.transform(*item) if isinstance(item, tuple) else self.transform(item)
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])


class SkipBadFiles(Seeded):
    """`Seeded`, with the next item in place of one that cannot be read. An item is (item, sentences about the faults).

    ValueError if more than `allowed` items in a row cannot be read.
    """

    def __init__(self, dataset: Dataset, transform: Callable[..., Any] | None, seed: int, allowed: int):
        super().__init__(dataset, transform, seed)
        self.allowed = allowed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[str]]:
        (position, index), faults = key, []
        while True:
            try:
                return super().__getitem__((position, index)), faults
            except BadFile as error:
                faults.append(str(error))
                if len(set(faults)) > self.allowed or len(faults) == len(self.dataset):  # or none is good
                    counts = f"{len(faults)} of {self.dataset.file_count} files cannot be used"
                    raise ValueError(f"{counts}, and --bad-files allows {self.allowed}: {faults[0]}") from error
                index = (index + 1) % len(self.dataset)


def _collate(items: list[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
    return default_collate([item for item, _ in items]), [fault for _, faults in items for fault in faults]


def _start_worker(worker: int) -> None:
    """Schedulers and Ctrl-C signal every process of a job, but a worker ends only when its parent signals SIGTERM."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_on_parents_signal, daemon=True).start()


def _end_on_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def make_loader(
    dataset: Dataset,
    transform: Callable[..., Any] | None,
    batch_size: int,
    stream: Stream = Stream(),
    workers: int = 0,
    allowed_bad_files: int | None = None,
) -> DataLoader:
    """An endless loader of this process's batches of `batch_size`, from the stream's start step on.

    The same seed gives the same batches whatever the number of workers; the caller's random states stay untouched.
    With `allowed_bad_files`, the next item takes the place of an unreadable one, and a batch becomes (batch, sentences
    about the faults).
    """
    items, collate = Seeded(dataset, transform, stream.seed), None
    if allowed_bad_files is not None:
        items, collate = SkipBadFiles(dataset, transform, stream.seed, allowed_bad_files), _collate
    return DataLoader(
        items,
        batch_size=batch_size,
        collate_fn=collate,
        sampler=ShardedStream(len(dataset), batch_size, stream, getattr(dataset, "order", None)),  # a Mix has its own
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(stream.seed),
    )
