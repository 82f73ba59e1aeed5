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
from sources.moving_shapes import ShapePairs, affine  # noqa: E402

SIZE, MOTION = (256, 384), (0.2, 0.6)  # height and width; see `MovingShapes`
MIDDLE = np.array(SIZE[::-1]) / 2
LEFT_OUT = {"car-detection": range(184, 244)}  # frames of the original film: those of the clip in assets/, to look at


def about_middle(centre: np.ndarray, scale: float, angle: float) -> np.ndarray:
    """A 3 x 3 map that scales and turns a crop about its middle, and takes its middle to `centre` (x, y)."""
    return affine(centre, np.full(2, scale), angle) @ affine(-MIDDLE, np.ones(2))


def draw_crop(rng: np.random.Generator, frame: tuple[int, int]) -> np.ndarray:
    """A 3 x 3 map from the pixels of a crop to those of a frame (height, width)."""
    h, w = frame
    unit = h / 432  # for frames of 768 x 432
    zoom = np.exp(rng.uniform(np.log(0.6 * unit), np.log(min(1.3 * unit, h / SIZE[0], w / SIZE[1]))))
    angle = rng.uniform(-0.2, 0.2)
    reach = np.abs(about_middle(np.zeros(2), zoom, angle)[:2, :2]) @ MIDDLE
    room = np.maximum(np.array([w, h]) / 2 - reach, 0)
    return about_middle(np.array([w, h]) / 2 + rng.uniform(-1, 1, 2) * room, zoom, angle)


def draw_motion(rng: np.random.Generator) -> np.ndarray:
    """A 3 x 3 map from the pixels of a crop to those of the crop before: a shift, a turn and a growth."""
    longest = MOTION[0] * min(SIZE)
    shift = 0.3 * (longest / 0.3) ** (rng.random() ** MOTION[1])
    direction = rng.uniform(0, 2 * np.pi)
    turn, growth = 0.2 * longest * rng.random(2) ** 2 * rng.choice((-1, 1), 2) / np.hypot(*MIDDLE)
    return about_middle(MIDDLE + shift * np.array([np.cos(direction), np.sin(direction)]), np.exp(growth), turn)


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
