"""Images for training: from files to frames, from frames to pairs and views, their augmentation, and the loader.

`VideoPairs` reads pairs of frames from video files and folders of frames, for optical flow; `ImageFiles` reads images,
for VICReg. `FlowAugmentation` and `TwoViews` augment them. `make_loader` batches them: sharded over processes, endless,
the same whatever the number of workers or the first step. The paper's data sets and MovingShapes are in sources/.

    loader = make_loader(VideoPairs("clips", transform=FlowAugmentation((128, 128))), None, batch_size=8)
    (image_1, image_2), _ = next(iter(loader))  # each uint8 (8, 3, 128, 128); floats are made where they are needed
"""

import io
import math
import os
import re
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from functools import lru_cache
from itertools import count, islice
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

VIDEO_ENDINGS = """264 265 3g2 3gp asf avi divx dv f4v flv h264 h265 hevc insv ivf lrv m1v m2t m2ts m2v m4v mjpeg mjpg
    mkv mov mp4 mpe mpeg mpg mts mxf nut ogm ogv qt rm rmvb ts vob webm wmv wtv y4m""".split()  # noqa: SIM905
Transform = Callable[..., Any]  # of an image, or of the two images of a pair
Order = Callable[[np.random.Generator], np.ndarray]  # draws a permutation of the items

# --------------------------------------------------------------------------------------------------- files to frames


class BadFile(ValueError):
    """A file that cannot be used, by its name and the reason. `make_loader` can skip a few of them."""


def is_hidden(name: str) -> bool:
    """Whether a file is hidden or left behind by a system: .DS_Store, ._frame_0001.png, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(path: str | Path) -> bool:
    """Whether the name is that of an image, and not hidden."""
    return is_image_file(str(path)) and not is_hidden(Path(path).name)


def find_files(root: Path) -> list[Path]:
    """Every visible file below `root`, in natural order (frame2 before frame10); links are followed."""

    def fail(error: OSError) -> None:
        raise FileNotFoundError(f"{error.filename}: no such folder or file, or closed; check the path") from error

    def natural(path: Path) -> tuple:
        return [[int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", part)] for part in path.parts], path

    found = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        above = {path.resolve() for path in (Path(folder), *Path(folder).parents)}  # a link to these would never end
        folders[:] = [name for name in folders if not is_hidden(name) and Path(folder, name).resolve() not in above]
        found += [Path(folder, name) for name in names if not is_hidden(name)]
    return sorted(found, key=natural)


def counted(kinds: Sequence[str]) -> str:
    """How often each kind occurs, for notes: ".mov 3, .mp4 12"."""
    return ", ".join(f"{kind} {number:,}" for kind, number in sorted(Counter(kinds).items())) or "nothing"


def size_text(image: Shaped[Tensor, "*batch h w"]) -> str:
    """Width and height, for messages."""
    return f"{image.shape[-1]}x{image.shape[-2]} px"


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image file, opened by Pillow. BadFile, with the reason, if it cannot be read."""
    try:
        content = Path(path).read_bytes()  # from an open file, Pillow allocates what the length of a chunk claims
        with Image.open(io.BytesIO(content)) as image:
            yield image
    except Exception as error:  # Pillow raises a dozen kinds for a damaged file
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = f"{'HEIC' if content[4:8] == b'ftyp' else content[:12]} is no format that Pillow reads"
        raise BadFile(f"{path}: not a readable image ({reason}); convert, replace or remove it") from error


def load_image(path: str | Path, upright: bool = True, beside: Sequence[Path] = ()) -> UInt8[Tensor, "3 h w"]:
    """An image file as RGB without transparency, upright by its EXIF orientation, or as it is stored.

    16 bits become 8 by the same shift for all images whose names differ in digits alone, as the frames of a clip, and
    for those `beside` it, as the other frame of a pair.
    """
    with open_image(path) as image:
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError("pixels of 32 bits, whose range is not known")
        if image.mode.startswith("I") or ";16" in str(image.tile):  # Pillow keeps only the upper 8 bits of colours
            alike = {(each.parent, re.sub(r"\d", "", each.name)) for each in (Path(path), *beside)}
            values = _values_of_16_bits(path, upright) >> max(_shift(*each) for each in alike)
            return torch.from_numpy(values.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
        if upright:
            with suppress(struct.error):  # a damaged note in the EXIF is no reason to lose the picture
                ImageOps.exif_transpose(image, in_place=True)
        elif image.format == "TIFF":  # which Pillow would turn by itself
            image.getexif().pop(0x0112, None)
        if "transparency" in image.info:  # straight to RGB, Pillow warns
            image = image.convert("RGBA")
        return F.pil_to_tensor(image.convert("RGB"))


def _values_of_16_bits(path: str | Path, upright: bool = True) -> np.ndarray:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    return cv2.imdecode(np.fromfile(path, np.uint8), flags)[..., ::-1]


@lru_cache(maxsize=256)
def _shift(folder: Path, name: str) -> int:
    """How many bits to drop so that 16-bit images fit into 8, by at most 20 that have this name without digits."""
    paths = sorted(path for path in folder.iterdir() if re.sub(r"\d", "", path.name) == name)
    most = 0
    for path in paths[:: len(paths) // 20 + 1]:
        with suppress(Exception):  # a damaged one
            most = max(most, _values_of_16_bits(path).max())
    return next(bits for bits in (0, 2, 4, 6, 8) if most >> bits < 256)


def _open_video(path: Path) -> tuple[Any, Any]:
    """FFmpeg's container of a video file, and the video in it. BadFile, with the reason, if there is none."""
    import av  # here, so that all else runs without it

    try:
        # PyAV 19 replaces what is no UTF-8 in the file's texts by itself. "file:": a colon in the name is no protocol.
        options = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        container = av.open(f"file:{path}", **options)
    except av.error.FFmpegError as error:
        raise BadFile(f"{path}: not a readable video ({error.strerror}); convert or remove it") from error
    for stream in container.streams.video:
        if stream.codec_context and not stream.disposition & stream.disposition.attached_pic:  # the cover of an album
            stream.codec_context.thread_count = 1  # loaders are processes of their own
            return container, stream
    raise BadFile(f"{path}: no video in it that FFmpeg decodes; convert or remove it")


class VideoFile:
    """The frames of a video file in the order in which they are shown, found by their time stamps.

    The stamps are those of its packets, which are read once. Where they are irregular, or differ from those of the
    first decoded frames, frames are counted from the beginning instead. BadFile if there is no frame.
    """

    def __init__(self, path: Path):
        container, stream = _open_video(path)
        self.path, self.stamps, packets = path, (), []
        rate = stream.average_rate  # frames per second; since PyAV 19 no Fraction, false if the file has none
        self.rate = Fraction(rate.numerator, rate.denominator) if rate else None
        by_ffmpeg = container.format.flags & 0x80  # AVFMT_NOTIMESTAMPS: the file has none, FFmpeg counts up
        with container, suppress(Exception):  # where the file is damaged beyond repair, it ends
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard and not packet.is_corrupt:
                    packets.append((packet.pts, packet.is_keyframe, packet.dts))
        reordered = stream.codec_context.has_b_frames
        decoded = (frame.pts for _, frame in self.decode())
        first = list(islice(decoded, 10))
        if not first:
            raise BadFile(f"{path}: no frame can be decoded; convert or remove it")
        stamps, coding = [pts for pts, _, _ in packets], [dts for _, _, dts in packets if dts is not None]
        regular = None not in (*stamps, *first) and len({*stamps}) == len(stamps) and coding == sorted(coding)
        # Where the codec reorders frames, stamps in the order of the packets are the times of coding.
        guessed = by_ffmpeg or (regular and reordered and stamps == sorted(stamps))
        frames = sorted((pts, key) for pts, key, _ in packets if pts >= first[0]) if regular and not guessed else []
        if [pts for pts, _ in frames[:10]] == first:
            self.stamps, keys = zip(*frames, strict=True)
            self.keys = np.maximum.accumulate(np.arange(len(keys)) * keys).tolist()  # where to decode a frame from
        else:
            self.keys = [0] * (len(first) + sum(1 for _ in decoded))

    def __len__(self) -> int:
        return len(self.keys)

    def decode(self, opened: tuple[Any, Any] | None = None, key: int = 0) -> Iterator[tuple[int, Any]]:
        """Yields (time stamp, FFmpeg's frame) from a key frame of the `opened` file on, or from the beginning.

        Where the file has no time stamps, the number of the frame takes their place.
        """
        (container, stream), start, numbers = opened or _open_video(self.path), None, count()
        if opened:
            # Seeks to the key frame before it: some containers compare with coding times, or guess the first stamps.
            start, before = self.stamps[key], self.stamps[self.keys[max(key - 1, 0)]]
            with suppress(Exception):  # where FFmpeg cannot seek, decoding goes on from here
                container.seek(before, stream=stream)
        with nullcontext() if opened else container, suppress(Exception):
            for packet in container.demux(stream):
                if start is None or (packet.is_keyframe and packet.pts == start):
                    start = None
                    with suppress(Exception):  # the packet is damaged: the next may be good
                        for frame in packet.decode():
                            mark = frame.pts if self.stamps else next(numbers)
                            if mark is not None:
                                yield mark, frame


class _Decoder:
    """Decodes a video file forwards. `process` keeps a forked worker from sharing its parent's file position."""

    def __init__(self, video: VideoFile, process: int):
        self.video, self.marks, self.opened = video, video.stamps or range(len(video)), _open_video(video.path)
        self.at, self.frames = math.inf, iter(())

    def read(self, place: int) -> Any:
        """FFmpeg's frame. BadFile if it cannot be decoded."""
        key, mark = self.video.keys[place], self.marks[place]
        if not self.marks[max(key - 10, 0)] <= self.at < mark:  # else it is faster to decode on
            self.frames = self.video.decode(self.opened if self.video.stamps else None, key)
        # From the beginning if FFmpeg went elsewhere, or its decoder needs more than that key frame.
        for frames in (self.frames, self.video.decode()):
            self.frames = frames
            for self.at, frame in frames:
                if self.at == mark:
                    return frame
                if self.at > mark:
                    break
        path = self.video.path
        raise BadFile(f"{path}: frame {place} cannot be decoded; convert the video, or extract its frames")


_decoder = lru_cache(maxsize=2)(_Decoder)


@lru_cache(maxsize=4)  # a frame is in two pairs or more
def _video_frame(video: VideoFile, place: int) -> UInt8[Tensor, "3 h w"]:
    frame = _decoder(video, os.getpid()).read(place)
    image, matrix = frame.to_ndarray(format="rgb24", threads=1), frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:  # how the camera was held: x' = a x + c y, y' = b x + d y
        a, b, _, c, d = np.sign(np.frombuffer(matrix, np.int32)[:5]).tolist()
        image, a, d = (image.transpose(1, 0, 2), c, b) if b else (image, a, d)
        image = np.ascontiguousarray(image[:: d or 1, :: a or 1])
    return torch.from_numpy(image).permute(2, 0, 1)


class ImageFiles(Dataset):
    """Every image below a folder, in natural order, as uint8 (3, h, w) RGB. BadFile on reading a damaged one.

    `note` counts them, and what is left out by its ending.
    """

    def __init__(self, root: str | Path):
        files = find_files(Path(root))
        self.paths = list(filter(is_image, files))
        self.file_count = len(self.paths)
        left_out = counted([path.suffix.lower() or "no ending" for path in files if not is_image(path)])
        self.note = f"{root}: {self.file_count:,} images; left out: {left_out}"
        if not self.paths:
            endings = " ".join(IMG_EXTENSIONS)
            raise FileNotFoundError(f"{root}: no images found; expected {endings} in it or below; left out: {left_out}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return load_image(self.paths[index])


# --------------------------------------------------------------------------------------------------- frames to pairs


class Clip(NamedTuple):
    """Consecutive frames: the files of a folder, or those of a video file; `fault` says why they cannot be used."""

    path: Path
    frames: Sequence[Path] | VideoFile
    fault: str = ""


class FramePairs(Dataset):
    """Pairs of frames (i, i + stride) of clips, each uint8 (3, h, w) RGB, or what `transform` makes of the two.

    Strides are 1 or more. Reading a pair raises BadFile if an image is damaged, the sizes differ, or the transform
    raises ValueError. A clip that has a fault or is too short counts as one pair, which raises BadFile too; if all
    clips are so, ValueError.
    """

    def __init__(self, clips: Sequence[Clip], strides: Sequence[int] = (1,), transform: Transform | None = None):
        self.clips, self.pairs, self.transform = [], [], transform
        for number, clip in enumerate(clips):
            length = len(clip.frames)
            pairs = [(number, i, i + stride) for stride in strides for i in range(length - stride)]
            if not pairs and not clip.fault:
                # A single image may lie in a folder beside videos: name the image, not the folder.
                path = clip.frames[0] if length == 1 and isinstance(clip.frames, list) else clip.path
                fault = f"{path}: a clip of {length} frame(s), too short for a stride of {min(strides)}; remove it"
                clip = clip._replace(fault=fault)
            self.clips.append(clip)
            self.pairs += pairs or [(number, 0, 0)]
        self.file_count = sum(max(len(clip.frames), 1) for clip in clips)  # a video file counts by its frames
        if all(clip.fault for clip in self.clips):
            raise ValueError(self.clips[0].fault)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        number, *places = self.pairs[index]
        path, frames, fault = self.clips[number]
        if fault:
            raise BadFile(fault)
        if isinstance(frames, VideoFile):
            names, images = places, [_video_frame(frames, place).clone() for place in places]
        else:
            paths = [frames[place] for place in places]
            names, images = [path.name for path in paths], [load_image(path, beside=paths) for path in paths]
        try:
            if images[0].shape != images[1].shape:
                sizes = " and ".join(map(size_text, images))
                raise ValueError(f"{sizes}; frames of a clip need one size, put others into a folder of their own")
            return self.transform(*images) if self.transform else tuple(images)
        except ValueError as error:  # the transform does not know which frames it gets
            raise BadFile(f"{path}, frames {names[0]} and {names[1]}: {error}") from error


class VideoPairs(FramePairs):
    """Pairs of frames of every clip below `root`: a folder that directly contains images, or a video file.

    `root` may also be one video file, whatever its ending. Masks, in folders whose names begin with Annotations, are no
    clips. `note` counts what is there and what is left out. Seeking in a video decodes from its last key frame: extract
    its frames before a long training.
    """

    def __init__(self, root: str | Path, strides: Sequence[int] = (1,), transform: Transform | None = None):
        root, folders, videos, left_out = Path(root), {}, [], []
        for path in [root] if root.is_file() else find_files(root):
            ending = path.suffix.lower() or "no ending"
            if path == root or ending[1:] in VIDEO_ENDINGS:
                videos.append(path)
            elif not is_image(path):
                left_out.append(ending)
            elif any(name.lower().startswith("annotations") for name in path.relative_to(root).parts[:-1]):
                left_out.append("masks")
            else:
                folders.setdefault(path.parent, []).append(path)
        clips = [Clip(folder, frames) for folder, frames in folders.items()]
        for path in videos:
            try:
                clips.append(Clip(path, VideoFile(path)))
            except BadFile as error:
                clips.append(Clip(path, [], str(error)))
        if not clips:
            expected = f"folders of images ({' '.join(IMG_EXTENSIONS)}) or videos ({' '.join(VIDEO_ENDINGS)})"
            raise FileNotFoundError(f"{root}: no frames found; expected {expected}; left out: {counted(left_out)}")
        super().__init__(clips, strides, transform)
        bad = [clip.path.name for clip in self.clips if clip.fault]
        kinds = counted(["folder" if clip.path in folders else clip.path.suffix.lower() for clip in clips])
        self.note = f"{root}: {len(clips):,} clips ({kinds}), {len(self.pairs) - len(bad):,} pairs"
        self.note += f"; left out: {counted(left_out)}; cannot be used: {', '.join(bad) or 'none'}"


# ------------------------------------------------------------------------------------------------------- augmentation


class _GaussianBlur(v2.GaussianBlur):
    """torchvision's, with a kernel cut at 4 sigma, where its weights no longer change a byte."""

    def transform(self, inpt: UInt8[Tensor, "3 h w"], params: dict[str, Any]) -> UInt8[Tensor, "3 h w"]:
        sigma = params["sigma"][0]
        size = min(self.kernel_size[0], 2 * math.ceil(4 * sigma) + 1)
        image = cv2.GaussianBlur(np.ascontiguousarray(inpt.permute(1, 2, 0).numpy()), (size, size), sigma)
        return torch.from_numpy(image).permute(2, 0, 1)


class ColorJitter(v2.ColorJitter):
    """torchvision's, 5 to 10 times as fast: its own takes several times as long as decoding the image.

    The image returns to bytes after each change, as in Pillow, which the official code of VICReg uses.
    """

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
            if name in ("brightness", "contrast"):  # truncated, not rounded, as in torchvision and Pillow
                mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] if name == "contrast" else 0
                image = cv2.LUT(image, np.clip(factor * values + (1 - factor) * mean, 0, 255).astype(np.uint8))
            elif name == "saturation":
                matrix = factor * np.eye(3) + (1 - factor) * np.tile([0.299, 0.587, 0.114], (3, 1))
                image = cv2.transform(image, np.hstack((matrix, np.full((3, 1), -0.499))))  # OpenCV rounds
            else:
                turned = ((values + round(256 * factor)) % 256).astype(np.uint8)
                hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
                image = cv2.cvtColor(cv2.merge((cv2.LUT(hue, turned), saturation, value)), cv2.COLOR_HSV2RGB_FULL)
        return torch.from_numpy(image).permute(2, 0, 1)


class TwoViews:
    """VICReg's two random views of a uint8 (3, h, w) RGB image, uint8 (3, size, size).

    The probabilities are those of the official code (its augmentations.py). Crops have `smallest_crop` to all of the
    image's area. Views below 96 px are not blurred: it would take the texture with it.
    """

    def __init__(self, size: int = 224, smallest_crop: float = 0.08):
        bicubic = v2.InterpolationMode.BICUBIC
        shared = [
            v2.RandomResizedCrop(size, (smallest_crop, 1.0), interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
        ]
        blur = [_GaussianBlur(size // 10 | 1, sigma=(0.1, 2.0))] if size >= 96 else [nn.Identity()]  # 23 at 224
        self.view_1 = v2.Compose([*shared, v2.RandomApply(blur, p=1.0), v2.RandomSolarize(threshold=128, p=0.0)])
        self.view_2 = v2.Compose([*shared, v2.RandomApply(blur, p=0.1), v2.RandomSolarize(threshold=128, p=0.2)])

    def __call__(self, image: UInt8[Tensor, "3 h w"]) -> tuple[UInt8[Tensor, "3 s s"], UInt8[Tensor, "3 s s"]]:
        return self.view_1(image), self.view_2(image)


class FlowAugmentation:
    """The joint augmentation of a pair: one crop, a horizontal flip, other colours for both, and their order swapped.

    Called with two uint8 (3, h, w) RGB images it returns two uint8 (3, *crop). A frame smaller than the crop is an
    error, or with `enlarge` enlarged. Brightness, contrast and saturation change by a factor of up to 1 +- `colour`,
    hue by a fifth of it. (Field: ARFlow has the crop, the flip and the order; colours, as UFlow's, with our numbers.)
    """

    def __init__(self, crop: tuple[int, int], enlarge: bool = False, colour: float = 0.2):
        self.crop, self.enlarge = tuple(crop), enlarge
        jitter = v2.RandomApply([ColorJitter(colour, colour, colour, colour / 5)], p=0.5)
        permute = v2.RandomApply([v2.RandomChannelPermutation()], p=0.1)
        self.change = v2.Compose([v2.RandomHorizontalFlip(0.5), jitter, permute])

    def __call__(
        self, image_1: UInt8[Tensor, "3 h w"], image_2: UInt8[Tensor, "3 h w"]
    ) -> tuple[UInt8[Tensor, "3 ch cw"], UInt8[Tensor, "3 ch cw"]]:
        (h, w), (crop_h, crop_w) = image_1.shape[-2:], self.crop
        factor = max(1.0, crop_h / h, crop_w / w)
        if factor > 1 and not self.enlarge:
            raise ValueError(f"height {h} and width {w}, smaller than --crop {crop_h} {crop_w}; use a smaller --crop")
        # A window of the crop's size, or the largest of its shape that fits, at one random place in both frames.
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
    run can start at any step. `order` replaces the plain permutation (see `Mix.order` in sources/training_sets.py).
    """

    def __init__(self, length: int, batch_size: int, stream: Stream = Stream(), order: Order | None = None):
        self.length, self.batch_size, self.stream = length, batch_size, stream
        order = order or (lambda rng: rng.permutation(length))
        self.order_of_pass = lru_cache(maxsize=1)(lambda number: order(np.random.default_rng((stream.seed, number))))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in count(self.stream.start_step):
            first = (step * self.stream.world_size + self.stream.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                yield position, int(self.order_of_pass(position // self.length)[position % self.length])


class SkipBadFiles(Dataset):
    """Reads `dataset[index]` and transforms it: the key (position, index) gives (item, sentences about bad files).

    The next item replaces one that cannot be read. More than `allowed` bad ones raise ValueError, and so do items that
    are all bad. torch's random numbers depend on (seed, position) alone, neither on the worker nor on the process, and
    its generator on the CPU keeps its state. The transform takes an image, or the two images of a pair.
    """

    def __init__(self, dataset: Dataset, transform: Transform | None, seed: int, allowed: int = 0):
        self.dataset, self.transform, self.seed, self.allowed = dataset, transform, seed, allowed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[str]]:
        (position, index), faults = key, []
        number = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        while True:
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(number)
                    item = self.dataset[index]
                    if self.transform:
                        item = self.transform(*item) if isinstance(item, tuple) else self.transform(item)
                return item, faults
            except BadFile as error:
                faults.append(str(error))
                if len(faults) == len(self.dataset):
                    raise ValueError(f"none of {self.dataset.file_count} files can be used: {faults[0]}") from error
                if len(set(faults)) > self.allowed:
                    counts = f"{len(set(faults))} of {self.dataset.file_count} files cannot be used"
                    raise ValueError(f"{counts}, and --bad-files allows {self.allowed}: {faults[0]}") from error
                index = (index + 1) % len(self.dataset)


def _collate(items: list[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
    return default_collate([item for item, _ in items]), [fault for _, faults in items for fault in faults]


def _start_worker(worker: int) -> None:
    """Schedulers and Ctrl-C signal every process of a job, but a worker ends only when its parent signals SIGTERM."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for name in ("SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_on_parents_signal, daemon=True).start()


def _end_on_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent_process().pid:  # with a fork server, not os.getppid()
        pass
    os._exit(0)


def make_loader(
    dataset: Dataset,
    transform: Transform | None,
    batch_size: int,
    stream: Stream = Stream(),
    workers: int = 0,
    allowed_bad_files: int = 0,
) -> DataLoader:
    """An endless loader of this process's batches of `batch_size`, from the stream's start step on.

    It gives (batch, sentences about bad files), the same for a seed whatever the number of workers. The next item takes
    the place of an unreadable one; more than `allowed_bad_files` raise ValueError.
    """
    return DataLoader(
        SkipBadFiles(dataset, transform, stream.seed, allowed_bad_files),
        batch_size,
        sampler=ShardedStream(len(dataset), batch_size, stream, getattr(dataset, "order", None)),  # a Mix has its own
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(stream.seed),
    )
