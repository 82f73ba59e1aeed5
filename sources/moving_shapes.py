"""MovingShapes: textured shapes that move over a moving background, with exact flow. Video that needs no files.

It is not from the paper: it lets everything run, learn and be measured without a download.

    item = MovingShapes(size=(128, 128), frames=2)[0]  # images, flow both ways, instances
    image_1, image_2 = ShapePairs()[0]  # uint8 frames for training
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from sources.label_sets import PALETTE

SHAPE_CLASSES = ("background", "ellipse", "rectangle", "triangle", "star", "ring", "cross", "crescent", "blob")
TEXTURE_SIZE, SILHOUETTE_SIZE, TEXTURES = 256, 128, 24


def _noise(rng: np.random.Generator, slope: float, channels: int = 1) -> np.ndarray:
    """Noise (256, 256, channels) of deviation 1 whose amplitude is 1 / frequency^slope; natural images have about 1."""
    frequency = np.hypot(np.fft.fftfreq(TEXTURE_SIZE)[:, None], np.fft.rfftfreq(TEXTURE_SIZE)[None]).astype(np.float32)
    frequency[0, 0] = np.inf
    white = rng.standard_normal((channels, TEXTURE_SIZE, TEXTURE_SIZE), dtype=np.float32)
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency**slope)
    return (noise / noise.std(axis=(1, 2), keepdims=True)).transpose(1, 2, 0)


def _dead_leaves(rng: np.random.Generator) -> np.ndarray:
    """Overlapping discs and polygons with radii of density 1 / r^3: edges as in natural images."""
    canvas = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE, 3), np.float32)
    radii = 3 / np.sqrt(rng.uniform(3**2 / 70**2, 1, 500))
    centres = rng.uniform(-20, TEXTURE_SIZE + 20, (500, 2))
    colours = rng.standard_normal((500, 1)) + 0.5 * rng.standard_normal((500, 3))
    for radius, centre, colour in zip(radii, centres, colours, strict=True):
        corners = int(rng.choice((3, 4, 5, 24)))
        angles = 2 * np.pi * (np.arange(corners) + rng.random()) / corners
        points = centre + radius * np.stack((np.cos(angles), np.sin(angles)), axis=1)
        cv2.fillPoly(canvas, [np.round(points * 16).astype(np.int32)], colour.tolist(), shift=4)
    return canvas


def _cells(rng: np.random.Generator) -> np.ndarray:
    """Patches of one colour around random points, darker towards their rims."""
    count = int(rng.integers(60, 500))
    others = np.ones((TEXTURE_SIZE, TEXTURE_SIZE), np.uint8)
    others[tuple(rng.integers(0, TEXTURE_SIZE, (2, count)))] = 0
    distance, label = cv2.distanceTransformWithLabels(others, cv2.DIST_L2, 5)
    colours = rng.standard_normal((count + 1, 1)) + 0.4 * rng.standard_normal((count + 1, 3))
    return colours[label] - rng.uniform(0, 0.15) * distance[..., None]


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
def _textures() -> list[np.ndarray]:
    """The textures of layers: uint8 (256, 256, 3), mean about 128, standard deviation about 50."""
    rng, bank = np.random.default_rng(0), []
    for i in range(48):
        if i % 4 == 0:
            colour = _noise(rng, rng.uniform(0.8, 1.5), 3)
            texture = colour + 2 * colour.mean(axis=2, keepdims=True)
        else:
            texture = (_dead_leaves, _dead_leaves, (_two_tones, _cells)[i // 4 % 2])[i % 4 - 1](rng)
        texture = texture + rng.uniform(0.1, 0.35) * texture.std() * _noise(rng, rng.uniform(0.0, 1.0))
        texture = cv2.GaussianBlur(texture, (0, 0), 0.4)  # an edge spans a pixel, as a camera's does
        bank.append(np.clip(128 + 50 * (texture - texture.mean()) / texture.std(), 0, 255).astype(np.uint8))
    return bank


@lru_cache(maxsize=1)
def _grey_textures() -> list[np.ndarray]:
    """Other textures, without colour: six kinds, each in four sizes.

    Their values all have one distribution (normal, mean 128, deviation 50): what tells them apart is their order alone.
    """
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE] * 2 * np.pi
    values = np.sort(rng.normal(128, 50, TEXTURE_SIZE**2)).clip(0, 255).astype(np.uint8)
    bank = []
    for period in (5, 8, 13, 21):
        others = np.ones((TEXTURE_SIZE, TEXTURE_SIZE), np.uint8)
        others[tuple(rng.integers(0, TEXTURE_SIZE, (2, (TEXTURE_SIZE // period) ** 2)))] = 0
        domes, cell = cv2.distanceTransformWithLabels(others, cv2.DIST_L2, 5)
        stripes, chequers = np.sin(x / period), np.sin(x / period) * np.sin(y / period)
        waves = np.sin(x / period + 3 * _noise(rng, 1.8)[..., 0])
        spots = cv2.GaussianBlur(_noise(rng, 0.0), (0, 0), period / 4)
        for grey in (stripes, chequers, waves, spots, rng.random(cell.max() + 1)[cell], -domes):
            grey = grey / grey.std() + 0.2 * rng.standard_normal(grey.shape)
            texture = np.empty(grey.size, np.uint8)
            texture[grey.argsort(axis=None)] = values
            bank.append(np.repeat(texture.reshape(*grey.shape, 1), 3, axis=2))
    return bank


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """The signed distance to the outline of a (n, n) mask that covers [-1, 1]^2, at the silhouettes' size."""
    inside, outside = (cv2.distanceTransform(m.astype(np.uint8), cv2.DIST_L2, 5) for m in (mask, ~mask))
    distance = (inside - outside) * 2 / len(mask)
    return cv2.resize(distance, (SILHOUETTE_SIZE, SILHOUETTE_SIZE), interpolation=cv2.INTER_AREA)


@lru_cache(maxsize=1)
def _silhouettes() -> list[list[np.ndarray]]:
    """The variants of each of SHAPE_CLASSES but the first: signed distance to the outline, positive inside, float32
    (128, 128) over [-1, 1]^2, in units of the shape's radius; the shape stays within the unit circle."""
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


class _Scene(NamedTuple):
    """The n layers of an item (the background first, then from far to near) over t frames."""

    textures: list[np.ndarray]
    texture_maps: np.ndarray  # (n, 3, 3) layer coordinates -> texture pixel
    numbers: np.ndarray  # (n,) of the textures in their bank
    colours: np.ndarray  # (t, n, 3, 4) affine colour change of the texture
    classes: np.ndarray  # (n,)
    silhouettes: list[np.ndarray | None]
    silhouette_maps: np.ndarray  # (n, 3, 3) layer coordinates -> silhouette pixel
    to_pixel: np.ndarray  # (n, t, 3, 3) layer coordinates -> image pixel
    reach: np.ndarray  # (n, t) radius of the layer in image pixels, infinite for the background
    gains: np.ndarray  # (t, 2) brightness factor and offset of each frame


_Window = tuple[slice, slice]  # rows and columns of an image


def _window(centre: np.ndarray, reach: float, size: tuple[int, int]) -> _Window | None:
    """The part of an image that a disc can touch, None if there is none."""
    reach = min(reach, 1e6) + 1  # one pixel for the soft edge
    window = []
    for middle, length in zip(centre[::-1], size, strict=True):
        start, stop = max(int(middle - reach), 0), min(int(middle + reach) + 2, length)
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


def affine(centre: np.ndarray, scale: np.ndarray, angle: np.ndarray | float = 0.0) -> np.ndarray:
    """(..., 3, 3) matrices that scale (x and y apart: (..., 2)), turn, and shift by `centre` (..., 2)."""
    matrix = np.zeros((*scale.shape[:-1], 3, 3))
    matrix[..., 0, 0], matrix[..., 0, 1] = np.cos(angle) * scale[..., 0], -np.sin(angle) * scale[..., 1]
    matrix[..., 1, 0], matrix[..., 1, 1] = np.sin(angle) * scale[..., 0], np.cos(angle) * scale[..., 1]
    matrix[..., :2, 2] = centre
    matrix[..., 2, 2] = 1
    return matrix


def _random_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Affine colour changes (count, 3, 4): of hue (about the grey axis), saturation, contrast, and mean."""
    hue, saturation, contrast = (rng.uniform(a, b, (count, 1, 1)) for a, b in ((0, 2 * np.pi), (0.2, 1.5), (0.35, 1.2)))
    grey = np.full((3, 3), 1 / 3)
    quarter_turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    matrix = contrast * (grey + saturation * (np.cos(hue) * (np.eye(3) - grey) + np.sin(hue) * quarter_turn))
    mean = rng.uniform(60, 200, (count, 1)) + 25 * rng.standard_normal((count, 3))
    return np.concatenate((matrix, (mean - 128 * matrix.sum(axis=2))[..., None]), axis=2)


@dataclass(eq=False)
class MovingShapes(Dataset):
    """Textured shapes that move over a moving textured background, with exact flow: video that needs no files.

    Each layer has its own, slightly decreasing speed; nearer shapes hide farther ones, and shapes leave the frame. A
    layer shifts by 0.3 px to `motion[0]` times the shorter side per frame; `motion[1]` is the power of the uniform
    number that draws how far: at 1, 20 to 40 px are as frequent as 2 to 4 px, below 1 more frequent. Rotation and
    growth add up to 0.2 of that bound each at its rim. A sixth of the backgrounds are nearly still. In a third of the
    scenes brightness differs from frame to frame, by a factor of 1 +- `brightness`. A shape's `radius` lies between
    these shares of the shorter side.

    With `colouring` "own" each layer has its own colours, in all frames. Otherwise textures are grey, and none stands
    out by the distribution of its values: "anew" draws the colours of each layer in each frame, so that they identify
    nothing; "alike" gives all layers the same ones, which drift from frame to frame.

    An item depends on (seed, index) alone:
        images            float32 (t, 3, h, w) in [0, 1]
        flow_forward      float32 (t-1, 2, h, w) in pixels, the motion from frame t to t+1 on the grid of frame t
        flow_backward     float32 (t-1, 2, h, w) in pixels, the motion from frame t+1 to t on the grid of frame t+1
        instances         int64 (t, h, w), 0 = background, k = the k-th shape, from far to near
    """

    length: int = 10_000
    size: tuple[int, int] = (128, 128)
    frames: int = 2
    seed: int = 0
    min_shapes: int = 1
    max_shapes: int = 2
    radius: tuple[float, float] = (0.2, 0.6)
    motion: tuple[float, float] = (0.08, 0.35)
    brightness: float = 0.1
    colouring: Literal["own", "anew", "alike"] = "own"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = self._scene(index)
        images, labels = (np.stack(x) for x in zip(*(self._render(scene, t) for t in range(self.frames)), strict=True))
        flow = np.empty((2, self.frames - 1, 2, *self.size), np.float32)
        for t in range(self.frames - 1):
            flow[0, t] = self._motion(scene, labels[t], t, t + 1)
            flow[1, t] = self._motion(scene, labels[t + 1], t + 1, t)
        forward, backward = torch.from_numpy(flow)
        images, instances = torch.from_numpy(images).float().div_(255), torch.from_numpy(labels).long()
        return {"images": images, "flow_forward": forward, "flow_backward": backward, "instances": instances}

    def _scene(self, index: int) -> _Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside of the {self.length} scenes")
        rng = np.random.default_rng((self.seed, index))
        h, w = self.size
        n = 1 + int(rng.integers(self.min_shapes, self.max_shapes + 1))
        centre = rng.uniform(-0.05, 1.05, (n, 2)) * (w, h)
        radius = min(h, w) * np.exp(rng.uniform(*np.log(self.radius), n))
        centre[0], radius[0] = ((w - 1) / 2, (h - 1) / 2), np.hypot(h, w) / 2
        to_pixel, zoom = self._trajectories(rng, centre, radius)

        classes = rng.integers(1, len(SHAPE_CLASSES), n)
        classes[0] = 0
        variants = [_silhouettes()[c - 1] for c in classes[1:]]
        radii = radius[:, None] * np.stack((np.ones(n), rng.uniform(0.5, 1, n)), axis=1)
        gains = np.tile((1.0, 0.0), (self.frames, 1))
        if rng.random() < 1 / 3:
            gains += self.brightness * rng.uniform(-1, 1, (self.frames, 2)) * (1, 50)
        bank = _textures() if self.colouring == "own" else _grey_textures()
        numbers = rng.integers(0, len(bank), n)
        zooms = (0.5, 1.9) if self.colouring == "own" else (0.85, 1.18)  # less than from one size to the next
        origins = rng.uniform(0, TEXTURE_SIZE, (n, 2))
        return _Scene(
            textures=[bank[i] for i in numbers],
            texture_maps=affine(origins, rng.uniform(*zooms, (n, 1)) * [1, 1], rng.uniform(0, 2 * np.pi, n)),
            numbers=numbers,
            colours=self._frame_colours(rng, n),
            classes=classes,
            silhouettes=[None] + [v[int(rng.integers(len(v)))] for v in variants],
            silhouette_maps=affine(np.full(2, (SILHOUETTE_SIZE - 1) / 2), SILHOUETTE_SIZE / 2 / radii),
            to_pixel=to_pixel,
            reach=np.where(classes[:, None] == 0, np.inf, radius[:, None] * zoom),
            gains=gains,
        )

    def _frame_colours(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """The colour changes (t, n, 3, 4) of n layers in each frame."""
        if self.colouring == "anew":
            return _random_colours(rng, self.frames * n).reshape(self.frames, n, 3, 4)
        colours = np.tile(_random_colours(rng, n if self.colouring == "own" else 1), (self.frames, 1, 1, 1))
        if self.colouring == "alike":
            colours *= np.exp(rng.normal(0, 0.03, (self.frames, 1, 1, 1)).cumsum(axis=0))  # gain
            colours[..., 3] += rng.normal(0, 5, (self.frames, 1, 3)).cumsum(axis=0)  # and hue
        return np.broadcast_to(colours, (self.frames, n, 3, 4))

    def _trajectories(
        self, rng: np.random.Generator, centre: np.ndarray, radius: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Layer-to-pixel maps (n, t, 3, 3) and zooms (n, t); layers are at `centre` in the middle of the clip."""
        n, t = len(radius), self.frames
        longest = max(self.motion[0] * min(self.size), 1e-6)
        shortest = min(0.3, longest)
        shift = shortest * (longest / shortest) ** (rng.random(n) ** self.motion[1])
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
        return affine(centre[:, None] + velocity[:, None] * time[..., None], zoom[..., None] * [1, 1], angle), zoom

    def _render(self, scene: _Scene, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame t: the image uint8 (3, h, w) and the layer that owns each pixel, uint8 (h, w)."""
        canvas = np.empty((*self.size, 3), np.uint8)
        labels = np.zeros(self.size, np.uint8)
        for layer, silhouette in enumerate(scene.silhouettes):
            to_pixel, reach = scene.to_pixel[layer, t], float(scene.reach[layer, t])
            window, from_pixel = _window(to_pixel[:2, 2], reach, self.size), np.linalg.inv(to_pixel)
            if window is None:
                continue
            texture = _cut(scene.textures[layer], scene.texture_maps[layer] @ from_pixel, window, cv2.BORDER_REFLECT)
            texture = cv2.transform(texture, scene.colours[t, layer])
            if silhouette is None:
                canvas[window] = texture
            else:
                distance = _cut(silhouette, scene.silhouette_maps[layer] @ from_pixel, window)
                alpha = np.clip(0.5 + distance * reach, 0, 1)
                canvas[window] = cv2.blendLinear(texture, canvas[window], alpha, 1 - alpha)
                labels[window][alpha >= 0.5] = layer
        gain, offset = scene.gains[t]
        canvas = cv2.convertScaleAbs(canvas, alpha=gain, beta=offset)
        return canvas.transpose(2, 0, 1), labels

    def _motion(self, scene: _Scene, labels: np.ndarray, source: int, target: int) -> np.ndarray:
        """The flow (2, h, w) from frame to frame: each pixel moves as the layer that owns it."""
        y, x = np.ogrid[: self.size[0], : self.size[1]]
        moves = scene.to_pixel[:, target] @ np.linalg.inv(scene.to_pixel[:, source])
        a, b, c = (moves[:, :2] - np.eye(2, 3)).astype(np.float32)[labels].transpose(3, 2, 0, 1)
        return a * x.astype(np.float32) + c + b * y.astype(np.float32)


class ShapePairs(MovingShapes):
    """The first two frames of each MovingShapes scene, for the flow task."""

    note = "generated videos: MovingShapes"

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], UInt8[Tensor, "3 h w"]]:
        scene = self._scene(index)
        return tuple(torch.from_numpy(self._render(scene, t)[0]) for t in (0, 1))


class ShapeImages(MovingShapes):
    """The first frame of each MovingShapes scene, for the content task."""

    note = "generated images: frames of MovingShapes"

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return torch.from_numpy(self._render(self._scene(index), 0)[0])


class ShapeLabels(MovingShapes):
    """The first frame of each MovingShapes scene with the textures of its pixels, as `LabelledImages` gives them.

    Colours are drawn for each of up to 8 shapes and for the ground, and identify no class. (Nor could a linear head
    read the classes of shapes, which only a whole outline identifies.)
    """

    classes, colours, notes = [f"texture {number}" for number in range(TEXTURES)], PALETTE[:TEXTURES], ()

    def __init__(self, length: int, size: tuple[int, int], seed: int):
        super().__init__(length, size, frames=1, seed=seed, max_shapes=8, colouring="anew")

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Int64[Tensor, "h w"]]:
        scene = self._scene(index)
        image, layers = self._render(scene, 0)
        return torch.from_numpy(image.copy()), torch.from_numpy(scene.numbers[layers])


class Objects(NamedTuple):
    """n shapes, each in the first and in the last frame of a clip of its own."""

    images: UInt8[Tensor, "2 n 3 s s"]
    masks: Bool[Tensor, "2 n s s"]  # without the rim
    textures: Int64[Tensor, " n"]  # numbers from 0 to TEXTURES - 1
    classes: Int64[Tensor, " n"]  # index into SHAPE_CLASSES


@lru_cache(maxsize=1)
def recoloured_objects(count: int, seed: int, size: int = 96, frames: int = 12) -> Objects:
    """Shapes that are found again by their texture and their outline alone, as large as a tenth of the image.

    In the last frame they have other colours, and another ground behind them; both frames have their own gain, and
    noise of deviation 4.
    """
    options = {"max_shapes": 1, "radius": (0.3, 0.5), "motion": (0.05, 0.35), "colouring": "anew"}
    clips = MovingShapes(100 * count, (size, size), frames, seed, **options)
    rng, found = np.random.default_rng(seed), []
    for scene in map(clips._scene, range(len(clips))):
        last = scene._replace(textures=[_grey_textures()[rng.integers(TEXTURES)], scene.textures[1]])
        images, layers = zip(clips._render(scene, 0), clips._render(last, frames - 1), strict=True)
        masks = [cv2.erode(layer, np.ones((5, 5))) for layer in layers]
        if min(mask.sum() for mask in masks) >= size**2 / 10:
            noisy = np.stack(images) * rng.uniform(0.8, 1.2, (2, 1, 1, 1)) + rng.normal(0, 4, (2, 3, size, size))
            image = noisy.clip(0, 255).astype(np.uint8)
            found.append((image, np.stack(masks) > 0, scene.numbers[1], scene.classes[1]))
        if len(found) == count:
            break
    images, masks, textures, classes = (torch.from_numpy(np.stack(each)) for each in zip(*found, strict=True))
    return Objects(images.transpose(0, 1), masks.transpose(0, 1), textures, classes)
