"""Every source of images: the embedded moving shapes, folders of frames or images, video files; and how they are fed.

The paper trains on video pairs (optical flow) and on image views (VICReg) at once. Here are the sources of both
(`MovingShapes`, `VideoPairs`, `ImageFiles`; the paper's data sets by name, their `Mix`, and `ImageNet`), true flow and
the benchmarks that have it (`read_flow`, `find_benchmark`), the augmentations (`FlowAugmentation`, `TwoViews`) and the
loader that feeds them (`make_loader`): sharded over processes, endless, the same whatever the number of workers or the
first step. `MovingShapes` needs no files and knows its exact flow; the commands use it where no folder is named.

    loader = make_loader(ShapePairs(size=(128, 128)), FlowAugmentation((128, 128)), batch_size=8)
    image_1, image_2 = next(iter(loader))  # each (8, 3, 128, 128) float32 in [0, 1]
"""

import io
import math
import os
import random
import re
import signal
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# ffmpeg, inside OpenCV, reads this once: a broken video is told in our words, not in its own.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

VIDEO_EXTENSIONS = (".mp4", ".avi", ".webm", ".mov", ".mkv", ".m4v")


# --------------------------------------------------------------------------------------------------- files on the disk


def natural_key(path: Path | str) -> list[list[str | int]]:
    """Sort key that puts frame2 before frame10, folder by folder."""
    return [[int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", part)] for part in Path(path).parts]


def is_hidden(name: str) -> bool:
    """What systems leave beside the files of a data set: .DS_Store, ._frame_0001.png, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(path: str | Path) -> bool:
    return str(path).lower().endswith(IMG_EXTENSIONS) and not is_hidden(Path(path).name)


def visible_glob(root: Path, pattern: str) -> list[Path]:
    """What lies below `root` and fits the pattern, sorted, without hidden files."""
    return sorted(path for path in root.glob(pattern) if not any(map(is_hidden, path.relative_to(root).parts)))


def find_files(root: str | Path, extensions: Sequence[str]) -> list[Path]:
    """Every file below `root` with one of the extensions, in natural order. Hidden files and __MACOSX are left out.

    FileNotFoundError if root does not exist; OSError for a folder that may not be read.
    """
    root = Path(root)
    if root.is_file():
        return [root] if root.suffix.lower() in extensions else []
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; check the path")

    def leads_back(path: Path) -> bool:
        """Whether it is a link to a folder that it lies in: a walk would never end."""
        return path.is_symlink() and path.resolve() in {parent.resolve() for parent in path.parents}

    def fail(error: OSError) -> None:
        raise OSError(f"{error.filename}: this folder cannot be read ({error.strerror}); mend it or move it away")

    found = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if not is_hidden(name) and not leads_back(Path(folder, name))]
        found += [Path(folder, n) for n in names if n.lower().endswith(tuple(extensions)) and not is_hidden(n)]
    return sorted(found, key=lambda path: (natural_key(path), path))


class BadFile(ValueError):
    """A file that cannot be used, by its name and the reason. `make_loader` can go on without a few of them."""


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image file, opened by Pillow and safe to decode.

    BadFile if it is no image, is cut short, or tells a size that so small a file cannot hold.
    """
    try:
        # Not from the file itself: there Pillow takes as much memory as a chunk of it claims to be long.
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            # Deflate packs 1032 bytes into one at the best, and a byte holds 8 pixels at the most. WebP and AVIF may
            # pack better: they have Pillow's own limit (179 million pixels), as all formats have.
            most = len(content) * 1032 * (8 if image.mode in ("1", "L", "P") else 1)
            if image.width * image.height > most and image.format not in ("WEBP", "AVIF"):
                raise ValueError(f"{image.width}x{image.height} pixels cannot lie in it")
            yield image
    except Exception as error:  # Pillow raises a dozen kinds for a damaged file
        told = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise BadFile(f"{path}: not a readable image{told}; replace or remove it") from error


def load_image(path: str | Path) -> UInt8[Tensor, "3 h w"]:
    """An image file as RGB, upright (by its EXIF orientation), 16 bits brought to 8, transparency left out.

    BadFile if it cannot be read.
    """
    with open_image(path) as image:
        with suppress(struct.error):  # a damaged note in the EXIF is no reason to lose the picture
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise ValueError("pixels of 32 bits, whose range is not known")
        if image.mode.startswith("I"):  # 16 bits of grey: Pillow would cut off what is beyond 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if "transparency" in image.info:  # straight to RGB, Pillow warns
            image = image.convert("RGBA")
        return F.pil_to_tensor(image.convert("RGB"))


class ImageFiles(Dataset):
    """Every image below a folder, in natural order, as uint8 (3, h, w) RGB.

    FileNotFoundError if the folder is missing or holds no image; BadFile on reading a broken one.
    """

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

    def name(self, index: int) -> str:
        return str(self.paths[index])


@lru_cache(maxsize=2)
def _open_video(path: Path, process: int) -> cv2.VideoCapture:
    """A decoder; `process` keeps a forked worker from sharing its parent's file position."""
    return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])


@lru_cache(maxsize=4)  # a frame is in two pairs or more
def _video_frame(path: Path, index: int) -> Tensor:
    """A frame of a video file, uint8 (3, h, w) RGB. BadFile if it cannot be decoded."""
    video = _open_video(path, os.getpid())
    ahead = index - int(video.get(cv2.CAP_PROP_POS_FRAMES))
    if not 0 <= ahead < 10:  # seeking costs more than reading on: it starts at the last key frame
        video.set(cv2.CAP_PROP_POS_FRAMES, index)
        ahead = 0
    for _ in range(ahead):
        video.grab()
    readable, frame = video.read()
    if not readable:
        raise BadFile(f"{path}: frame {index} cannot be decoded; convert the video, or use its frames as a folder")
    return torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()


def _count_video_frames(path: Path) -> int:
    """Number of decodable frames; 0 if the file is not a video."""
    video = _open_video(path, os.getpid())
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    if count > 0:  # containers guess: believe it only if that frame is there and is the last
        video.set(cv2.CAP_PROP_POS_FRAMES, count - 1)
        if video.grab() and not video.grab():
            return count
    video.set(cv2.CAP_PROP_POS_FRAMES, 0)
    count = 0
    while video.grab():
        count += 1
    return count


class Clip(NamedTuple):
    """Frames that follow each other."""

    path: Path
    """The folder of the frames, or the video file."""
    frames: list[Path] | range
    """Image files, or the numbers of frames in the video file."""


class FramePairs(Dataset):
    """Pairs of frames (i, i + stride) of clips, each uint8 (3, h, w) RGB.

    `transform` takes the two images and returns the item. ValueError for a clip too short for a stride; BadFile on
    reading a broken image or frames of different sizes, and for what the transform has to say of two frames.
    """

    def __init__(
        self, clips: Sequence[Clip], strides: Sequence[int] = (1,), transform: Callable[..., Any] | None = None
    ):
        if min(strides) < 1:
            raise ValueError(f"a stride of {min(strides)} frames; strides are 1 or more")
        for clip in clips:
            count = len(clip.frames)
            if count <= max(strides):
                size = "one frame" if count == 1 else f"{count} frames"
                # A single image may lie in a folder beside videos: then it is to go, not the folder.
                path = clip.frames[0] if count == 1 and isinstance(clip.frames, list) else clip.path
                raise ValueError(f"{path}: a clip of {size}, too short for a stride of {max(strides)}; remove it")
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
        """Of frames, also of those in a video file."""
        return sum(len(clip.frames) for clip in self.clips)

    def name(self, index: int) -> str:
        """The clip and its two frames."""
        number, *places = self.pairs[index]
        clip = self.clips[number]
        first, second = (
            frame.name if isinstance(frame, Path) else frame for frame in map(clip.frames.__getitem__, places)
        )
        return f"{clip.path}, frames {first} and {second}"

    def __getitem__(self, index: int) -> Any:
        """(image_1, image_2), or what the transform makes of them."""
        number, *places = self.pairs[index]
        clip = self.clips[number]
        frames = [clip.frames[i] for i in places]
        if isinstance(clip.frames, range):
            images = [_video_frame(clip.path, frame).clone() for frame in frames]
        else:
            images = [load_image(frame) for frame in frames]
        if images[0].shape != images[1].shape:
            (h1, w1), (h2, w2) = (image.shape[1:] for image in images)
            raise BadFile(
                f"{frames[1]}: {w2}x{h2} pixels, but {frames[0].name} of the same clip has {w1}x{h1}; "
                "frames of a clip need one size, put others into a folder of their own"
            )
        if self.transform is None:
            return tuple(images)
        try:
            return self.transform(*images)
        except ValueError as error:  # it does not know which frames it has before it
            raise BadFile(f"{self.name(index)}: {error}") from error


class VideoPairs(FramePairs):
    """Pairs of frames of every clip below `root`; see `FramePairs`.

    A clip is a folder that directly contains images, in natural order of their names, or a video file; `root` may also
    be one video file. Seeking in a video decodes from its last key frame: extract its frames before a long training.

    FileNotFoundError if root is missing or holds no frames; ValueError for a video that cannot be decoded.
    """

    def __init__(self, root: str | Path, strides: Sequence[int] = (1,), transform: Callable[..., Any] | None = None):
        folders: dict[Path, list[Path]] = {}
        for path in find_files(root, IMG_EXTENSIONS):
            folders.setdefault(path.parent, []).append(path)
        clips = [Clip(folder, frames) for folder, frames in folders.items()]
        for path in find_files(root, VIDEO_EXTENSIONS):
            count = _count_video_frames(path)
            if count == 0:
                raise ValueError(f"{path}: no frame can be decoded; convert the video or remove it")
            clips.append(Clip(path, range(count)))
        if not clips:
            endings = " ".join(IMG_EXTENSIONS + VIDEO_EXTENSIONS)
            raise FileNotFoundError(f"{root}: no frames found; expected folders of images or video files ({endings})")
        super().__init__(clips, strides, transform)


IMAGENET_CLASS = re.compile(r"n\d{8}")


def set_folders(root: Path) -> list[Path]:
    """Where a data set may lie: the root itself and its direct subfolders. FileNotFoundError if root is no folder."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; check the path")
    return [root, *_subfolders(root)]


def _subfolders(parent: Path) -> list[Path]:
    """Sorted, but for hidden ones and the thousand classes of ImageNet: none of those holds a data set."""
    try:
        with os.scandir(parent) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except PermissionError:  # lost+found of a data disk
        return []
    return [parent / name for name in sorted(names) if not is_hidden(name) and not IMAGENET_CLASS.fullmatch(name)]


class MissingSet(FileNotFoundError):
    """A data set that is not in the folder, unlike one of which a part is missing."""


# --------------------------------------------------------------------------------------------- labels of every pixel

VOID = 255
"""The class of pixels that count nowhere."""


def _bit_colours() -> np.ndarray:
    """The palette of Pascal VOC and DAVIS, uint8 (256, 3): a number's bits, three at a time."""
    numbers = np.arange(256)
    return np.stack(
        [sum((numbers >> (3 * k + channel) & 1) << (7 - k) for k in range(8)) for channel in range(3)], axis=1
    ).astype(np.uint8)


PALETTE = _bit_colours()
"""Of Pascal VOC and DAVIS: the colour of each number, uint8 (256, 3)."""


def read_ids(path: Path, coloured: bool = True) -> UInt8[Tensor, "h w"]:
    """The numbers in an image of labels or masks: palette, grey, or black and white (0 and 1).

    Args:
        coloured: an image that was saved in the colours of PALETTE instead, or in white (255) on black, is turned back
            into numbers; else it is an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, other colours, or numbers beyond 255.
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
            known = ", and not those of VOC or DAVIS" if coloured else ""
            raise ValueError(f"{path}: colours where numbers belong{known}; save the numbers as a palette or grey png")
    elif mode not in ("P", "L", "1") and (
        values.ndim != 2 or values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255
    ):
        raise ValueError(f"{path}: an image of mode {mode}; labels are a png of one channel with numbers up to 255")
    return torch.from_numpy(values.astype(np.uint8))


class LabelledImages(Dataset):
    """Images with a class for each pixel: (uint8 (3, h, w) RGB, int64 (h, w)), VOID where a pixel counts nowhere.

    ValueError on reading a broken file, labels of another size than the image, or a number that is no class.

    Args:
        files: of each image and of its labels.
        tables: by the end of the labels' name: the class of each number that may be stored there.
        classes, colours: the names, and the colours of their pictures, uint8 (classes, 3).
        notes: lines to be told with the results.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Path]],
        tables: dict[str, dict[int, int]],
        classes: Sequence[str],
        colours: np.ndarray,
        notes: Sequence[str] = (),
    ):
        self.files, self.classes, self.colours, self.notes = files, tuple(classes), colours, tuple(notes)
        self.coloured = np.array_equal(colours, PALETTE[: len(colours)])
        self.tables = {}
        for ending, table in tables.items():
            self.tables[ending] = torch.full((256,), -1)
            self.tables[ending][list(table)] = torch.tensor(list(table.values()))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Int64[Tensor, "h w"]]:
        path, path_of_labels = self.files[index]
        image = load_image(path)
        ids = _read_mat(path_of_labels) if path_of_labels.suffix == ".mat" else read_ids(path_of_labels, self.coloured)
        if ids.shape != image.shape[1:]:
            (h, w), (image_h, image_w) = ids.shape, image.shape[1:]
            raise ValueError(f"{path_of_labels}: labels of {w}x{h} pixels, but {path} has {image_w}x{image_h}")
        table = next(table for ending, table in self.tables.items() if path_of_labels.name.endswith(ending))
        labels = table[ids.long()]
        if (labels < 0).any():
            wrong = int(ids[labels < 0][0])
            known = [number for number, c in enumerate(table.tolist()) if c >= 0]
            raise ValueError(
                f"{path_of_labels}: holds {wrong}, which is no class; known are {known[0]} to "
                f"{known[-2] if known[-1] == VOID else known[-1]}, and {VOID} for void"
            )
        return image, labels


def _read_mat(path: Path) -> UInt8[Tensor, "h w"]:
    """The labels of Hariharan et al. (2011), who annotated the rest of Pascal VOC's images."""
    from scipy.io import loadmat  # here, for nothing else needs SciPy

    try:
        return torch.from_numpy(loadmat(path)["GTcls"][0]["Segmentation"][0])
    except Exception as error:  # SciPy raises half a dozen kinds for a file that is not one of its own
        raise ValueError(f"{path}: not a file of labels of the augmented VOC set; unpack it again") from error


# ------------------------------------------------------------------------------------------------------ augmentations


# Changes of colour and sharpness that OpenCV computes in a fifth to a tenth of torchvision's time on a CPU, where they
# would take several times as long as to decode the image.


def _to_opencv(image: UInt8[Tensor, "3 h w"]) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _from_opencv(image: np.ndarray) -> UInt8[Tensor, "3 h w"]:
    return torch.from_numpy(image).permute(2, 0, 1)


class _GaussianBlur(v2.GaussianBlur):
    """torchvision's, with a kernel cut at 4 sigma, where its weights no longer change a byte."""

    def transform(self, inpt: UInt8[Tensor, "3 h w"], params: dict[str, Any]) -> UInt8[Tensor, "3 h w"]:
        sigma = params["sigma"][0]
        size = min(self.kernel_size[0], 2 * math.ceil(4 * sigma) + 1)
        return _from_opencv(cv2.GaussianBlur(_to_opencv(inpt), (size, size), sigma))


class ColorJitter(v2.ColorJitter):
    """torchvision's; as in Pillow, which the official code uses, values are bytes again after each of the changes."""

    def transform(self, inpt: UInt8[Tensor, "*b 3 h w"], params: dict[str, Any]) -> UInt8[Tensor, "*b 3 h w"]:
        if inpt.ndim > 3:
            return torch.stack([self.transform(image, params) for image in inpt])
        return _from_opencv(self._change(_to_opencv(inpt), params))

    @staticmethod
    def _change(image: np.ndarray, params: dict[str, Any]) -> np.ndarray:
        values = np.arange(256)
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
                grey = np.tile([0.299, 0.587, 0.114], (3, 1))
                matrix = factor * np.eye(3) + (1 - factor) * grey
                image = cv2.transform(image, np.hstack((matrix, np.full((3, 1), -0.499))))  # OpenCV rounds
            else:
                turned = _to_bytes((values + round(256 * factor)) % 256)
                hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
                image = cv2.cvtColor(cv2.merge((cv2.LUT(hue, turned), saturation, value)), cv2.COLOR_HSV2RGB_FULL)
        return image


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)  # cut off, not rounded, as torchvision and Pillow do


class _Solarize(v2.RandomSolarize):
    """torchvision's: values from the threshold on are turned round."""

    def transform(self, inpt: UInt8[Tensor, "3 h w"], params: dict[str, Any]) -> UInt8[Tensor, "3 h w"]:
        values = np.arange(256)
        table = _to_bytes(np.where(values >= self.threshold, 255 - values, values))
        return torch.from_numpy(cv2.LUT(inpt.reshape(3, -1).numpy(), table)).reshape(inpt.shape)


class TwoViews:
    """VICReg's two random views of an image, with the probabilities of the official code (its augmentations.py).

    Called with a uint8 (3, h, w) RGB image it gives two float32 (3, size, size) views in [0, 1]; the model normalises.
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
                _Solarize(threshold=128, p=solarize),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __call__(self, image: UInt8[Tensor, "3 h w"]) -> tuple[Float[Tensor, "3 s s"], Float[Tensor, "3 s s"]]:
        return self.view_1(image), self.view_2(image)


class FlowAugmentation:
    """The joint augmentation of a pair: one random crop, flips, colour change for both images, and their order swapped.

    Called with two uint8 (3, h, w) RGB images it returns two float32 (3, *crop) images in [0, 1].

    Args:
        crop: height and width of the results.
        enlarge: take the largest window of that shape from a smaller frame, and enlarge it. Otherwise such a frame is a
            ValueError.
        colour: the largest relative change of brightness, contrast and saturation; hue changes by a fifth of it.
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
            raise ValueError(
                f"an image of {w}x{h} pixels is smaller than the crop of {crop_w}x{crop_h}; use a smaller --crop"
            )
        window_h, window_w = (max(min(round(n / factor), most), 1) for n, most in ((crop_h, h), (crop_w, w)))
        top, left = (int(torch.randint(0, n + 1, ())) for n in (h - window_h, w - window_w))
        cut = [F.crop(image, top, left, window_h, window_w) for image in (image_1, image_2)]
        # One tensor, for transforms draw once per call: the same change for both. Its memory has the channels last, as
        # decoders leave it: resizing takes a third of the time.
        pair = torch.stack([image.permute(1, 2, 0) for image in cut]).permute(0, 3, 1, 2)
        pair = F.resize(pair, list(self.crop), antialias=True)
        if torch.rand(()) < 0.5:
            pair = pair.flip(0)
        return tuple(self.change(pair))


# ------------------------------------------------------------------------------------------------------------ loading


class Stream(NamedTuple):
    """Which part of the endless stream of batches a process loads."""

    seed: int = 0
    """Seed of the order of the data and of the augmentation."""
    rank: int = 0
    world_size: int = 1
    start_step: int = 0


ONE_PROCESS = Stream()
"""The whole stream from its beginning, with seed 0."""


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
        stream: Stream = ONE_PROCESS,
        order: Callable[[np.random.Generator], np.ndarray] | None = None,
    ):
        self.length, self.batch_size, self.stream = length, batch_size, stream
        self.order = order or (lambda rng: rng.permutation(length))
        seed = stream.seed
        self.order_of_pass = lru_cache(maxsize=1)(lambda number: self.order(np.random.default_rng((seed, number))))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        step = self.stream.start_step
        while True:
            yield from self.step(step)
            step += 1

    def step(self, number: int) -> Iterator[tuple[int, int]]:
        """What this process takes in that step."""
        first = (number * self.stream.world_size + self.stream.rank) * self.batch_size
        for position in range(first, first + self.batch_size):
            yield position, int(self.order_of_pass(position // self.length)[position % self.length])


@contextmanager
def _random_state(seed: int, position: int) -> Iterator[None]:
    """Python's, NumPy's and torch's (CPU) generators seeded by the two numbers; the caller's states come back after."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        number = int(np.random.SeedSequence((seed, position)).generate_state(1)[0])
        random.seed(number)
        np.random.seed(number)
        torch.default_generator.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class Seeded(Dataset):
    """Reads `dataset[index]` and transforms it, with random numbers that depend on (seed, position) alone.

    So an item depends neither on the worker nor on the process that reads it. Indexed by ShardedStream's tuples.
    The transform takes an image, or the two images of a pair.
    """

    def __init__(self, dataset: Dataset, transform: Callable[..., Any] | None = None, seed: int = 0):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        with _random_state(self.seed, position):
            item = self.dataset[index]
            if self.transform is None:
                return item
            return self.transform(*item) if isinstance(item, tuple) else self.transform(item)


class SkipBadFiles(Seeded):
    """`Seeded`, but that the next item takes the place of one that cannot be read; gives (item, what was wrong).

    Raises:
        ValueError: more items in a row than `allowed` cannot be read.
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
                if len(set(faults)) > self.allowed or len(faults) == len(self):  # or all there are
                    raise ValueError(too_many_bad_files(faults, self.allowed, self.dataset.file_count)) from error
                index = (index + 1) % len(self)


def too_many_bad_files(faults: Collection[str], allowed: int, files: int) -> str:
    """The sentence that ends a run."""
    return (
        f"{len(faults)} of {files} files cannot be used, and --bad-files allows {allowed}; mend them, or allow "
        f"more. One of them: {next(iter(faults))}"
    )


def _collate(items: list[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
    return default_collate([item for item, _ in items]), [fault for _, faults in items for fault in faults]


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Schedulers and Ctrl-C signal every process of a job. The training process decides; its workers end with it, which
    # is why SIGTERM still counts if it comes from there.
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_when_parent_says_so, daemon=True).start()


def _end_when_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def make_loader(
    dataset: Dataset,
    transform: Callable[..., Any] | None,
    batch_size: int,
    stream: Stream = ONE_PROCESS,
    workers: int = 0,
    allowed_bad_files: int | None = None,
) -> DataLoader:
    """An endless loader of this process's batches of `batch_size`, from the stream's start step on.

    The same seed gives the same batches whatever the number of workers; the caller's random states stay untouched.

    Args:
        allowed_bad_files: how many files may be unreadable. The next item takes the place of one, and a batch becomes
            (batch, sentences about the faults). None: a bad file is an error.
    """
    order = getattr(dataset, "order", None)  # a Mix has its own
    if allowed_bad_files is None:
        items, collate = Seeded(dataset, transform, stream.seed), None
    else:
        items, collate = SkipBadFiles(dataset, transform, stream.seed, allowed_bad_files), _collate
    return DataLoader(
        items,
        batch_size=batch_size,
        collate_fn=collate,
        sampler=ShardedStream(len(dataset), batch_size, stream, order),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(stream.seed),
    )
