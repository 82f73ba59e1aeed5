"""Pairs of frames for `train.py --video-dir`: half of MovingShapes, half of films, most of these as by a moving camera.

    python experiments/film_pairs.py FILM.mp4 ... --output-dir PAIRS

The model `small` that comes with the code has learned from such pairs (assets/README.md). A film of a fixed
camera shows real textures, and hardly any motion: so each pair is a crop, zoomed and turned, and in 60% of the pairs
the crop of the second frame is shifted, turned and enlarged like the ground of MovingShapes.
"""

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.faults import run_command  # noqa: E402
from sources.moving_shapes import ShapePairs  # noqa: E402

SIZE, MOTION = (256, 384), (0.2, 0.6)  # height and width; see `MovingShapes`
LEFT_OUT = {"car-detection": range(184, 244)}  # frames of the original film: those of the clip in assets/, to look at


def affine(linear: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The 3 x 3 matrix that multiplies (x, y) by `linear` (2, 2) and adds `offset` (2,)."""
    return np.vstack([np.concatenate([linear, offset[:, None]], axis=1), [0, 0, 1]])


def draw_crop(rng: np.random.Generator, frame: tuple[int, int]) -> np.ndarray:
    """A 3 x 3 map from the pixels of a crop to those of a frame."""
    (h, w), (crop_h, crop_w) = frame, SIZE
    unit = h / 432  # for frames of 768 x 432
    zoom = np.exp(rng.uniform(np.log(0.6 * unit), np.log(min(1.3 * unit, h / crop_h, w / crop_w))))
    angle = rng.uniform(-0.2, 0.2)
    linear = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array([crop_w, crop_h]) / 2
    room = np.array([w, h]) / 2 - np.abs(linear) @ middle
    centre = np.array([w, h]) / 2 + rng.uniform(-1, 1, 2) * np.maximum(room, 0)
    return affine(linear, centre - linear @ middle)


def draw_motion(rng: np.random.Generator) -> np.ndarray:
    """A 3 x 3 map from the pixels of a crop to those of the crop before: a shift, a turn and a growth."""
    (crop_h, crop_w), longest = SIZE, MOTION[0] * min(SIZE)
    shift = 0.3 * (longest / 0.3) ** (rng.random() ** MOTION[1])
    direction, radius = rng.uniform(0, 2 * np.pi), np.hypot(crop_h, crop_w) / 2
    turn, growth = 0.2 * longest * rng.random(2) ** 2 * rng.choice((-1, 1), 2) / radius
    linear = np.exp(growth) * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle = np.array([crop_w, crop_h]) / 2
    return affine(linear, middle + shift * np.array([np.cos(direction), np.sin(direction)]) - linear @ middle)


def cut(frame: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """The crop of a frame, mirrored where it reaches beyond."""
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(frame, crop[:2], SIZE[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT_101)


def write_pair(folder: Path, *frames: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{number}.png"), frame)


def pairs_of_film(film: Path, count: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """About so many pairs, evenly spread over a film, of frames that are one to four apart."""
    video, memory, owed = cv2.VideoCapture(str(film)), deque(maxlen=5), 0.0
    frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    if frames < 5:
        raise ValueError(f"{film}: no film of at least 5 frames; check the path")
    for number in range(frames):
        good, frame = video.read()
        if not good:  # the number of frames is what the file says
            break
        memory.append(frame)
        if number in LEFT_OUT.get(film.stem, ()):
            memory.clear()
        owed += (count / frames) * (len(memory) == 5)
        while owed >= 1:
            owed -= 1
            earlier, crop = memory[-1 - int(rng.integers(1, 5))], draw_crop(rng, memory[-1].shape[:2])
            moved = crop @ draw_motion(rng) if rng.random() < 0.6 else crop
            yield cut(earlier, crop), cut(memory[-1], moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("films", nargs="+", type=Path)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=6000, help="of all pairs")
    arguments = parser.parse_args()
    rng, shapes = np.random.default_rng(0), ShapePairs(arguments.count, SIZE, seed=7, motion=MOTION)
    for index in range(arguments.count // 2):
        frames = [frame.permute(1, 2, 0).numpy()[..., ::-1] for frame in shapes[index]]
        write_pair(arguments.output_dir / f"shapes_{index:05d}", *frames)
    for film in arguments.films:
        count = arguments.count // 2 // len(arguments.films)
        for index, pair in enumerate(pairs_of_film(film, count, rng)):
            write_pair(arguments.output_dir / f"{film.stem}_{index:05d}", *pair)


if __name__ == "__main__":
    run_command(main)
