"""Measure a trained model: optical flow against ground truth (Section 4 of MC-JEPA, the flow columns of its Table 1).

    python evaluate.py flow --model runs/pocket/checkpoint.pt                          # MovingShapes never trained on
    python evaluate.py flow --model runs/pocket/checkpoint.pt --data-root DATA --benchmark sintel
    python evaluate.py flow --model runs/pocket/checkpoint.pt --images a.png b.png     # pictures of the flow a to b
    python evaluate.py flow --model runs/pocket/checkpoint.pt --video clip.mp4         # a video of its flow
    python evaluate.py flow --model CHECKPOINT --data-root DATA --benchmark kitti2015 --split testing --export TO_SUBMIT

Zero flow and OpenCV's DIS stand beside the model in every table; `--model` may also name a baseline: zero, dis,
farneback, random. Numbers go to the screen and to flow.json in `--output-dir`, pictures beside it. `--data-root` is the
folder of a benchmark in its native layout, or one that holds it up to two folders deeper; see `data.BENCHMARKS`. Pairs
of one's own lie together as NAME_img1.EXT, NAME_img2.EXT and NAME_flow.flo or NAME_flow.png (KITTI's format).
"""

import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import tyro
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.utils import flow_to_image, make_grid
from tqdm import tqdm

from data import FlowFiles, MovingShapes, VideoPairs, find_benchmark, known_flow, load_image, read_flow
from flow import resize_flow, warp
from mcjepa import MCJEPA, load_model

UNSEEN_SEED = 1_618_033_988
"""Seed of the MovingShapes that are measured on. Training draws from its own `--seed`: never give it this one."""
Mask = Bool[Tensor, "b 1 h w"] | Bool[Tensor, "b h w"]
FlowMethod = Callable[[Tensor, Tensor], Tensor]
"""Two images (1, 3, h, w) in [0, 1] to the flow (1, 2, h, w) from the first to the second, in pixels."""


# ---------------------------------------------------------------------------------------------------- metrics


def _errors_and_lengths(
    flow: Float[Tensor, "b 2 h w"], truth: Float[Tensor, "b 2 h w"], valid: Mask | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """End-point error and length of the true flow, in pixels, at the n pixels that count."""
    counts = known_flow(truth)[:, 0]
    if valid is not None:
        counts = counts & valid.reshape(counts.shape)
    if not counts.any():
        raise ValueError("no pixel with known flow: the error is not defined")
    error = (flow.float() - truth.float()).norm(dim=1)[counts]
    return error, truth.float().norm(dim=1)[counts]


def end_point_error(
    flow: Float[Tensor, "b 2 h w"], truth: Float[Tensor, "b 2 h w"], valid: Mask | None = None
) -> Float[Tensor, ""]:
    """Mean distance in pixels between the ends of the estimated and of the true flow vectors (EPE).

    Args:
        flow, truth: in pixels, channel 0 = x, channel 1 = y. Unknown truth (NaN, or beyond 1e9) never counts.
        valid: `(b, 1, h, w)` or `(b, h, w)`; only its True pixels count. All do by default.

    Raises:
        ValueError: no pixel counts.
    """
    return _errors_and_lengths(flow, truth, valid)[0].mean()


def f1_all(
    flow: Float[Tensor, "b 2 h w"], truth: Float[Tensor, "b 2 h w"], valid: Mask | None = None
) -> Float[Tensor, ""]:
    """Share of outliers in [0, 1] (KITTI 2015): error above 3 px and above 5% of the true length. NaN flow is one.

    Arguments and errors as `end_point_error`. Tables print it in percent.
    """
    error, length = _errors_and_lengths(flow, truth, valid)
    return (~((error <= 3.0) | (error <= 0.05 * length))).float().mean()


# ------------------------------------------------------------------- segmentation, of images and of video objects


def mean_iou(confusion: Int64[Tensor, "c c"]) -> float:
    """The mean over classes of intersection over union, in [0, 1].

    Args:
        confusion: pixels by true class (rows) and predicted class (columns); void pixels must not be in it. A class
            that neither occurs nor is predicted is left out of the mean.

    Raises:
        ValueError: no pixel at all.
    """
    hits, union = confusion.diag(), confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diag()
    if not union.any():
        raise ValueError("no pixel in the confusion matrix: the mean IoU is not defined")
    return (hits[union > 0] / union[union > 0]).mean().item()


def region_similarity(annotation: Bool[Tensor, "h w"], prediction: Bool[Tensor, "h w"]) -> float:
    """J of DAVIS (Perazzi et al. 2016): the intersection of two masks over their union; 1 where both are empty."""
    union = (annotation | prediction).sum().item()
    return (annotation & prediction).sum().item() / union if union else 1.0


def contour_accuracy(annotation: Bool[Tensor, "h w"], prediction: Bool[Tensor, "h w"]) -> float:
    """F of DAVIS: the harmonic mean of precision and recall of the masks' contours.

    A contour pixel is right if the other contour passes within 0.8% of the image's diagonal, rounded up. 1 where both
    masks have no contour, 0 where one has none.
    """
    contours = [_contour(mask.cpu().numpy()) for mask in (annotation, prediction)]
    radius = math.ceil(0.008 * math.hypot(*annotation.shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc = (x**2 + y**2 <= radius**2).astype(np.uint8)
    truth, guess = contours
    near_truth, near_guess = (cv2.dilate(contour, disc) for contour in contours)
    if not truth.any() or not guess.any():
        return float(not truth.any() and not guess.any())
    precision, recall = (guess & near_truth).sum() / guess.sum(), (truth & near_guess).sum() / truth.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower, or lower right neighbour, as DAVIS finds contours; uint8 (h, w)."""
    right, below, corner = (
        np.pad(mask, ((0, dy), (0, dx)), mode="edge")[dy:, dx:] for dy, dx in ((0, 1), (1, 0), (1, 1))
    )
    return ((mask != right) | (mask != below) | (mask != corner)).astype(np.uint8)


def propagate_labels(
    target: Float[Tensor, "d h w"],
    context: Float[Tensor, "n d h w"],
    labels: Float[Tensor, "n c h w"],
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Float[Tensor, "c h w"]:
    """The labels of a frame from those of others, by the likeness of features (Jabri et al. 2020; numbers of DINO).

    Each pixel of the target takes the labels of the `topk` pixels that are most like it, among those of all context
    frames that are at most `radius` rows and columns away, weighted by exp(cosine / temperature). (DAVIS: frames of
    480p at stride 8, radius 12, the first frame and the 7 last.)

    Works on tiles: each is compared with what its radius reaches and nothing else, so that time and memory grow with
    the pixels times the window, not with the pixels squared.

    Args:
        target: features of the frame, of any length: they are normalised here.
        context: of the frames with known labels.
        labels: theirs, soft or hard, at the size of the features.

    Returns:
        Soft labels: means of those given, so that they stay in their range and, where theirs do, sum to 1.
    """
    (h, w), tile = target.shape[1:], max(radius, 4)
    target, context = F.normalize(target, dim=0), F.normalize(context, dim=1)
    result = labels.new_empty(labels.shape[1], h, w)
    for top in range(0, h, tile):
        rows, near_rows = range(top, min(top + tile, h)), range(max(top - radius, 0), min(top + tile + radius, h))
        for left in range(0, w, tile):
            columns = range(left, min(left + tile, w))
            near_columns = range(max(left - radius, 0), min(left + tile + radius, w))
            here = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
            near = (..., slice(near_rows.start, near_rows.stop), slice(near_columns.start, near_columns.stop))
            cosine = target[(..., *here)].flatten(1).T @ context[near].transpose(0, 1).flatten(1)
            far_rows, far_columns = (
                (torch.tensor(own)[:, None] - torch.tensor(other)[None]).abs() > radius
                for own, other in ((rows, near_rows), (columns, near_columns))
            )
            far = far_rows[:, None, :, None] | far_columns[None, :, None, :]
            cosine = cosine.view(far[..., 0, 0].numel(), len(context), -1)
            cosine = cosine.masked_fill(far.flatten(0, 1).flatten(1)[:, None].to(cosine.device), -torch.inf).flatten(1)
            best, places = cosine.topk(min(topk, cosine.shape[1]))
            weights = (best / temperature).softmax(dim=1)
            their_labels = labels[near].transpose(0, 1).flatten(1)[:, places]
            result[(..., *here)] = (their_labels * weights).sum(dim=-1).view(-1, len(rows), len(columns))
    return result


# ---------------------------------------------------------------------------------------------------- methods


def zero_flow(image_1: Float[Tensor, "1 3 h w"], image_2: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 2 h w"]:
    """The baseline "nothing moves": its end-point error is the mean length of the true flow."""
    return torch.zeros_like(image_1[:, :2])


def dis_flow(image_1: Float[Tensor, "1 3 h w"], image_2: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 2 h w"]:
    """The baseline DIS (Kroeger et al. 2016): OpenCV's, preset "medium", on 8-bit grey images. It learns nothing.

    The preset matters: on four Middlebury scenes "medium" errs by 0.39 px, "fast", OpenCV's default, by 0.60.
    """
    if max(image_1.shape[-2:]) < 12:
        raise ValueError(f"images of {_size(image_1)} are too small for DIS: one side needs 12 pixels")
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*_grey(image_1, image_2), None)
    return torch.from_numpy(flow).permute(2, 0, 1)[None]


def farneback_flow(image_1: Float[Tensor, "1 3 h w"], image_2: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 2 h w"]:
    """The baseline of Farneback (2003): OpenCV's, with the parameters of its tutorial, on 8-bit grey images."""
    options = {
        "pyr_scale": 0.5,
        "levels": 3,
        "winsize": 15,
        "iterations": 3,
        "poly_n": 5,
        "poly_sigma": 1.2,
        "flags": 0,
    }
    return torch.from_numpy(cv2.calcOpticalFlowFarneback(*_grey(image_1, image_2), None, **options)).permute(2, 0, 1)[
        None
    ]


def _grey(*images: Float[Tensor, "1 3 h w"]) -> list[np.ndarray]:
    return [cv2.cvtColor(_to_numpy(to_uint8(image[0])), cv2.COLOR_RGB2GRAY) for image in images]


BASELINES: dict[str, FlowMethod] = {"zero": zero_flow, "dis": dis_flow, "farneback": farneback_flow}
BESIDE = ("zero", "dis")
"""The baselines that stand beside every model."""


def flow_method(name: str) -> FlowMethod:
    """A baseline, "random" (the default network as it is before training, seed 0), or the model of a checkpoint."""
    if name in BASELINES:
        return BASELINES[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "random":
        torch.manual_seed(0)
        return model_flow(MCJEPA(task="mjepa").eval().to(device))
    try:
        return model_flow(load_model(name, device))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, nor a baseline ({', '.join(BASELINES)}, random)") from error


def model_flow(model: MCJEPA) -> FlowMethod:
    """The model as a method: takes and gives tensors on the CPU, wherever its parameters live."""
    device = next(model.parameters()).device
    return lambda image_1, image_2: model.estimate_flow(image_1.to(device), image_2.to(device)).float().cpu()


def at_size(method: FlowMethod, resize: str) -> FlowMethod:
    """Estimates on images of another size, and brings the flow back to the size and the pixels of the originals.

    Args:
        resize: "pad": as they are, and a model pads them by itself; "multiple": stretched to the nearest multiples of
            64; "384x832": to that height and width; "0.5": by that factor.

    Raises:
        ValueError: none of these.
    """
    if resize == "pad":
        return method
    exact = re.fullmatch(r"(\d+)x(\d+)", resize)
    factor = float(resize) if re.fullmatch(r"\d*\.?\d+", resize) else 0.0
    if resize != "multiple" and not factor and not (exact and int(exact[1]) and int(exact[2])):
        raise ValueError(
            f"--resize {resize}: choose pad, multiple, HEIGHTxWIDTH such as 384x832, or a factor such as 0.5"
        )

    def new_size(length: int, axis: int) -> int:
        if exact:
            return int(exact[1 + axis])
        return max(round(length * factor), 1) if factor else max(round(length / 64), 1) * 64

    def estimate(image_1: Float[Tensor, "1 3 h w"], image_2: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 2 h w"]:
        size = image_1.shape[-2:]
        inner = [new_size(length, axis) for axis, length in enumerate(size)]
        if max(inner) > 8192:
            raise ValueError(f"--resize {resize}: {inner[1]}x{inner[0]} px are too many; 8192 are allowed in a row")
        resized = [F.interpolate(image, inner, mode="bilinear", antialias=True) for image in (image_1, image_2)]
        return resize_flow(method(*resized), size)

    return estimate


# ---------------------------------------------------------------------------------------------------- reading


REGIONS = ("all", "matched", "unmatched", "0-10", "10-40", "40+", "noc", "bg", "fg")
"""The parts of an image that are measured apart, in the order of the tables; see `read_pair`."""


class Pair(NamedTuple):
    """Two images `(1, 3, h, w)` in [0, 1], the true flow `(1, 2, h, w)` from 1 to 2, and the parts of the image that
    are measured apart, each `(1, 1, h, w)`; the first, "all", is where the flow is known."""

    name: str
    group: str
    image_1: Tensor
    image_2: Tensor
    flow: Tensor
    regions: dict[str, Tensor]


def read_pair(files: FlowFiles) -> Pair:
    """Reads one pair, its true flow and its masks; raises ValueError where they differ in size.

    The regions of Sintel: matched, unmatched (occluded), and by the length of the true flow in pixels; pixels that it
    calls invalid are unknown. Of KITTI: noc (not occluded), and bg and fg where its obj_map lies there.
    """
    frames = read_frames(files.image_1, files.image_2)
    truth, known = read_flow(files.flow)
    if truth.shape[-2:] != frames[0].shape[-2:]:
        raise ValueError(f"{files.flow}: flow of {_size(truth)}, but its frames are {_size(frames[0])}")
    masks = {name: read_mask(path, truth) for name, path in files.masks.items()}
    if "invalid" in masks:
        known = known & ~masks["invalid"]
        if not known.any():
            raise ValueError(f"{files.masks['invalid']}: no known flow is left: every pixel is invalid")
        truth = torch.where(known, truth, torch.nan)
    regions = {"all": known}
    if "occlusions" in masks:
        length = truth.norm(dim=1, keepdim=True)
        regions |= {"matched": known & ~masks["occlusions"], "unmatched": known & masks["occlusions"]}
        regions |= {"0-10": known & (length < 10), "10-40": known & (length >= 10) & (length < 40)}
        regions["40+"] = known & (length >= 40)
    if "flow_noc" in masks:
        regions["noc"] = known & masks["flow_noc"]
    if "obj_map" in masks:
        regions |= {"bg": known & ~masks["obj_map"], "fg": known & masks["obj_map"]}
    return Pair(files.name, files.group, *frames, truth, regions)


def read_mask(path: Path, like: Float[Tensor, "1 2 h w"]) -> Bool[Tensor, "1 1 h w"]:
    """Where an image is not black; of a file of flow (in flow_noc): where it is known."""
    mask = (
        read_flow(path)[1] if path.parent.name == "flow_noc" else (load_image(path)[None] > 0).any(dim=1, keepdim=True)
    )
    if mask.shape[-2:] != like.shape[-2:]:
        raise ValueError(f"{path}: a mask of {_size(mask)}, but the flow is {_size(like)}")
    return mask


def read_frames(path_1: Path, path_2: Path) -> tuple[Float[Tensor, "1 3 h w"], Float[Tensor, "1 3 h w"]]:
    """Two images; raises ValueError where they differ in size."""
    for path in (path_1, path_2):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image")
    image_1, image_2 = (load_image(path)[None].float() / 255 for path in (path_1, path_2))
    if image_1.shape != image_2.shape:
        raise ValueError(f"{path_2}: {_size(image_2)}, but {path_1} is {_size(image_1)}; flow needs one size")
    return image_1, image_2


def shapes_pairs(count: int, size: tuple[int, int], seed: int = UNSEEN_SEED) -> Iterator[Pair]:
    """MovingShapes as pairs; their flow is known everywhere, also where the second frame hides the point."""
    shapes = MovingShapes(length=count, size=size, frames=2, seed=seed)
    for index in range(count):
        item = shapes[index]
        truth = item["flow_forward"]
        yield Pair(f"shapes_{index:04d}", "", item["images"][:1], item["images"][1:], truth, {"all": known_flow(truth)})


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]} px"


# --------------------------------------------------------------------------------------------------- pictures


def to_uint8(image: Float[Tensor, "3 h w"]) -> UInt8[Tensor, "3 h w"]:
    """An image in [0, 1] as bytes."""
    return (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def colour_scale(flow: Float[Tensor, "2 h w"]) -> float:
    """The length in pixels that gets the full colour: the 99th percentile (no outlier pales the rest), 1 at least."""
    lengths = flow.norm(dim=0)[known_flow(flow[None])[0, 0]].detach().cpu().numpy()
    return max(1.0, float(np.quantile(lengths, 0.99))) if lengths.size else 1.0


def flow_colours(flow: Float[Tensor, "2 h w"], scale: float) -> UInt8[Tensor, "3 h w"]:
    """Flow in the usual colour wheel, full colour from `scale` pixels on; black where it is unknown."""
    flow = flow.detach().float().cpu()
    known = known_flow(flow[None])[0]
    unit = torch.where(known, flow, 0.0) / scale
    unit = unit / unit.norm(dim=0).clamp(min=1)
    # flow_to_image divides by the largest length in the picture: one more column of length 1 holds the scale fixed.
    return flow_to_image(F.pad(unit, (0, 1), value=0.5**0.5))[..., :-1] * known


def colour_wheel(height: int, width: int) -> UInt8[Tensor, "3 h w"]:
    """The colours of all flows up to full colour, as a disc on white."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    disc = torch.stack((x, y)) / (min(height, width) / 2)
    return torch.where(disc.norm(dim=0) <= 1, flow_colours(disc, 1.0), 255).to(torch.uint8)


def flow_figure(
    image_1: Float[Tensor, "3 h w"],
    image_2: Float[Tensor, "3 h w"],
    flow: Float[Tensor, "2 h w"],
    truth: Float[Tensor, "2 h w"] | None = None,
) -> UInt8[Tensor, "3 H W"]:
    """One picture to judge a flow by eye: both frames, the flow, frame 2 warped to frame 1 by it, and the absolute
    difference between that and frame 1, which is black for a perfect flow. With the truth: its colours, on the same
    scale, and the end-point error. The last panel is the colour wheel of that scale: the colour at a point is that of
    the flow from the wheel's middle to it, and the rim is as long as the titles of the flows tell.

    Args:
        image_1, image_2: RGB in [0, 1].
        flow, truth: from image 1 to image 2, in pixels; black where the truth is unknown.
    """
    scale = colour_scale(flow if truth is None else truth)
    warped = warp(image_2[None], flow[None])[0]
    panels = [("frame 1", to_uint8(image_1)), ("frame 2", to_uint8(image_2))]
    if truth is not None:
        panels.append((f"truth ({scale:.1f} px)", flow_colours(truth, scale)))
    panels.append((f"flow ({scale:.1f} px)", flow_colours(flow, scale)))
    panels.append(("2 warped to 1", to_uint8(warped)))
    panels.append(("difference", to_uint8((image_1 - warped).abs())))
    if truth is not None:
        error = torch.where(known_flow(truth[None])[0], flow - truth, 0.0)
        brightest = colour_scale(error)
        panels.append((f"error ({brightest:.1f} px)", to_uint8((error.norm(dim=0) / brightest).expand(3, -1, -1))))
    panels.append((f"wheel ({scale:.1f} px)", colour_wheel(*image_1.shape[1:])))
    return _grid(panels, columns=3 if truth is None else 4)


def _grid(panels: list[tuple[str, UInt8[Tensor, "3 h w"]]], columns: int) -> UInt8[Tensor, "3 H W"]:
    """Panels under their titles, on white."""
    titled = []
    for title, panel in panels:
        strip = np.full((14, panel.shape[-1], 3), 255, np.uint8)
        cv2.putText(strip, title, (2, 11), cv2.FONT_HERSHEY_PLAIN, 0.75, (0, 0, 0), 1, cv2.LINE_AA)
        titled.append(torch.cat([torch.from_numpy(strip).permute(2, 0, 1), panel], dim=1))
    return make_grid(torch.stack(titled), nrow=columns, padding=2, pad_value=255)


def _to_numpy(image: UInt8[Tensor, "3 h w"]) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place once it is whole, and vanishes where writing fails."""
    temporary = path.with_name(f".partial-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # else the new name could reach the disk before the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_picture(path: Path, image: UInt8[Tensor, "3 h w"]) -> None:
    """Writes a picture whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(_to_numpy(image)).save(temporary)


# ------------------------------------------------------------------------------------------------ measurement


def measure(pair: Pair, method: FlowMethod) -> tuple[Float[Tensor, "1 2 h w"], dict]:
    """Runs a method on a pair: its flow, its `epe` in pixels and `f1` in [0, 1] in each region, and its `seconds`."""
    start = time.perf_counter()
    flow = method(pair.image_1, pair.image_2)
    seconds = time.perf_counter() - start
    regions = {name: region for name, region in pair.regions.items() if region.any()}
    epe = {name: end_point_error(flow, pair.flow, region).item() for name, region in regions.items()}
    return flow, {
        "epe": epe,
        "f1": {name: f1_all(flow, pair.flow, region).item() for name, region in regions.items()},
        "seconds": seconds,
    }


def summarise(scenes: list[dict], method: str) -> dict:
    """A method over many pairs: `epe` and `f1` of each region, as the mean over images (`per_image`; each counts alike)
    and over pixels (`per_pixel`; as the development kits of KITTI and Sintel count), and the median of the seconds."""
    names = [name for name in REGIONS if any(name in scene["pixels"] for scene in scenes)]
    means = {"per_image": {"epe": {}, "f1": {}}, "per_pixel": {"epe": {}, "f1": {}}}
    for name in names:
        pixels = [scene["pixels"][name] for scene in scenes if name in scene["pixels"]]
        for metric in ("epe", "f1"):
            values = [scene[method][metric][name] for scene in scenes if name in scene["pixels"]]
            means["per_image"][metric][name] = float(np.mean(values))
            means["per_pixel"][metric][name] = float(np.average(values, weights=pixels))
    return means | {"seconds": float(np.median([scene[method]["seconds"] for scene in scenes]))}


def count_pixels(pair: Pair) -> dict[str, int]:
    """Of each region that is not empty."""
    return {name: int(region.sum()) for name, region in pair.regions.items() if region.any()}


def evaluate_flow_on_shapes(
    model: MCJEPA, count: int, size: tuple[int, int], seed: int = UNSEEN_SEED
) -> dict[str, float]:
    """A model's `epe` and `f1` (in [0, 1]) on `count` unseen MovingShapes, and zero flow's `epe_zero`, for train.py.

    The model is in eval mode meanwhile, and then in the mode that it came in.
    """
    methods = {"ours": model_flow(model), "zero": zero_flow}
    training = model.training
    model.eval()
    scenes = [
        {"pixels": count_pixels(pair)} | {name: measure(pair, method)[1] for name, method in methods.items()}
        for pair in shapes_pairs(count, size, seed)
    ]
    model.train(training)
    ours, zero = (summarise(scenes, name)["per_image"] for name in methods)
    return {"epe": ours["epe"]["all"], "epe_zero": zero["epe"]["all"], "f1": ours["f1"]["all"]}


# ---------------------------------------------------------------------------------------------------- command


@dataclass
class FlowConfig:
    """Optical flow against ground truth, or its pictures where there is none."""

    model: str
    """A checkpoint of train.py, or a baseline: zero, dis, farneback, random."""
    data_root: Path | None = None
    """A folder with ground truth. Without it: MovingShapes."""
    benchmark: Literal["sintel", "kitti2012", "kitti2015", "middlebury", "chairs", "things", "hd1k"] | None = None
    """Which of those in --data-root; may be left out where there is only one."""
    split: Literal["training", "testing"] = "training"
    """testing: the part whose truth is kept secret, of sintel and kitti; only for --export."""
    export: Path | None = None
    """A folder for the flow of every pair, in the tree and the format that the benchmark's server takes."""
    images: tuple[Path, Path] | None = None
    """Two images instead: writes the flow from the first to the second, and its pictures."""
    video: Path | None = None
    """A video file instead: writes a video of frames beside their flow, and pictures."""
    output_dir: Path = Path("runs/flow")
    """Where flow.json, pictures and video go; files of the same name are replaced."""
    shapes_count: int = 200
    """The number of MovingShapes pairs."""
    shapes_size: int = 192
    """Their height and width in pixels (192: the crop of the pocket preset)."""
    resize: str = "pad"
    """What the method sees. pad: the images as they are, padded by the model as it needs; multiple: stretched to the
    nearest multiples of 64; HEIGHTxWIDTH; or a factor. Errors are in pixels of the originals all the same."""
    pictures: int = 8
    """At most so many pairs get a picture."""
    max_frames: int | None = None
    """Only the first frames of the video."""


def run_flow(config: tyro.conf.OmitArgPrefixes[FlowConfig]) -> None:
    """Optical flow: end-point error and F1-all on ground truth, or pictures of two images or a video."""
    if sum(source is not None for source in (config.data_root, config.images, config.video)) > 1:
        raise ValueError("--data-root, --images and --video exclude each other: give one of them")
    if min(config.shapes_count, config.shapes_size) < 1:
        raise ValueError("--shapes-count and --shapes-size must be positive")
    if config.max_frames is not None and config.max_frames < 2:
        raise ValueError("--max-frames must be at least 2: flow needs two frames")
    if config.data_root is None and (config.benchmark or config.export or config.split == "testing"):
        raise ValueError("--benchmark, --split and --export are about --data-root: give that too")
    if config.split == "testing" and config.export is None:
        raise ValueError(
            "--split testing has no truth to measure against: give --export FOLDER, to submit what is there"
        )
    method = at_size(flow_method(config.model), config.resize)
    if config.images:
        flow_of_images(method, *config.images, config.output_dir)
    elif config.video:
        flow_of_video(method, config)
    elif config.split == "testing":
        flow_to_submit(method, config)
    else:
        flow_against_truth(method, config)


def flow_against_truth(method: FlowMethod, config: FlowConfig) -> None:
    """Measures the method beside zero flow and DIS: tables on the screen, flow.json, pictures, and files to submit."""
    benchmark = "shapes"
    if config.data_root is None:
        source, count = f"MovingShapes, {config.shapes_size} px, unseen seed", config.shapes_count
        pairs, notes = shapes_pairs(config.shapes_count, (config.shapes_size, config.shapes_size)), []
    else:
        benchmark, files, notes = find_benchmark(config.data_root, config.benchmark)
        source, count = f"{benchmark} in {config.data_root}", len(files)
        pairs = (read_pair(each) for each in files)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    # A baseline that is run at another size gets a row of its own beside the usual one.
    label = config.model if config.model in (*BASELINES, "random") else "ours"
    label += "" if config.resize == "pad" else f" {config.resize}"
    methods = {name: BASELINES[name] for name in BESIDE} | {label: method}
    scenes = []
    for pair in tqdm(pairs, total=count, desc="flow", unit="pair", disable=None):
        flows_and_numbers = {name: measure(pair, each) for name, each in methods.items()}
        flow = flows_and_numbers[label][0]
        if len(scenes) < config.pictures:
            figure = flow_figure(pair.image_1[0], pair.image_2[0], flow[0], pair.flow[0])
            write_picture(config.output_dir / f"{picture_name(pair)}.png", figure)
        if config.export:
            write_flow(config.export / submission_name(benchmark, pair), flow)
        numbers = {name: numbers for name, (_, numbers) in flows_and_numbers.items()}
        scenes.append({"name": pair.name, "group": pair.group, "pixels": count_pixels(pair)} | numbers)

    groups = {}
    for group in dict.fromkeys(scene["group"] for scene in scenes):
        members = [scene for scene in scenes if scene["group"] == group]
        groups[group or "all"] = {name: summarise(members, name) for name in methods}
        title = f"{source}, {group}" if group else source
        print(f"Flow on {title}: {len(members)} {'pair' if len(members) == 1 else 'pairs'}\n")
        print(table(groups[group or "all"], by_object=benchmark.startswith("kitti")) + "\n")
    if config.data_root is not None and len(scenes) <= 20:
        print(f"{'EPE [px], all':24}" + "".join(f"{name:>12}" for name in methods))
        for scene in scenes:
            name = f"{scene['group']} {scene['name']}".strip()
            print(f"{name:24}" + "".join(f"{scene[method]['epe']['all']:12.2f}" for method in methods))
    for note in notes:
        print(f"note: {note}")
    if config.export:
        print(f"flow of {len(scenes)} pairs: {config.export}")
    report = {
        "data": source,
        "groups": groups,
        "notes": notes,
        "scenes": scenes,
        "settings": asdict(config) | {"unseen_seed": UNSEEN_SEED},
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"torchvision": torchvision.__version__, "opencv": cv2.__version__},
    }
    with replacing(config.output_dir / "flow.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"\nnumbers and pictures: {config.output_dir}")


def table(rows: dict[str, dict], by_object: bool) -> str:
    """The summaries of several methods: errors of each region and outliers, first over pixels, then over images.

    by_object: outliers of each region, as KITTI counts; else of all pixels only.
    """
    regions = list(next(iter(rows.values()))["per_pixel"]["epe"])
    outliers = regions if by_object else ["all"]
    lines = [f"{'':18}{'EPE [px]':>10}{'':{10 * (len(regions) - 1)}}{'[%]':>10}"]
    for mean, title in (("per_pixel", "mean over pixels"), ("per_image", "mean over images")):
        lines.append(
            f"{title:18}"
            + "".join(f"{name:>10}" for name in (*regions, *(f"F1-{name}" for name in outliers), "s a pair"))
        )
        for name, row in rows.items():
            numbers = [row[mean]["epe"][region] for region in regions]
            numbers += [100 * row[mean]["f1"][region] for region in outliers]
            lines.append(f"{name:18}" + "".join(f"{number:10.2f}" for number in numbers) + f"{row['seconds']:10.3f}")
    return "\n".join(lines)


def flow_to_submit(method: FlowMethod, config: FlowConfig) -> None:
    """Writes the flow of the testing split, and pictures of some of it."""
    benchmark, files, notes = find_benchmark(config.data_root, config.benchmark, "testing")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    for place, each in enumerate(tqdm(files, desc="flow", unit="pair", disable=None)):
        image_1, image_2 = read_frames(each.image_1, each.image_2)
        flow = method(image_1, image_2)
        write_flow(config.export / submission_name(benchmark, each), flow)
        if place < config.pictures:
            figure = flow_figure(image_1[0], image_2[0], flow[0])
            write_picture(config.output_dir / f"{picture_name(each)}.png", figure)
    for note in notes:
        print(f"note: {note}")
    print(f"flow of {len(files)} pairs: {config.export}")


def picture_name(pair: Pair | FlowFiles) -> str:
    """The name of a pair's figure, with its group, without folders."""
    return "_".join(filter(None, (pair.group, pair.name))).replace("/", "_")


def submission_name(benchmark: str, pair: Pair | FlowFiles) -> str:
    """Where a pair's flow lies in a submission: clean/SCENE/frame_0001.flo (Sintel), flow/000000_10.png (KITTI 2015),
    000000_10.png (KITTI 2012); of benchmarks without a server: a .flo file."""
    if benchmark.startswith("kitti"):
        return f"{'flow/' if benchmark == 'kitti2015' else ''}{pair.name}.png"
    return "/".join(filter(None, (pair.group, f"{pair.name}.flo")))


def write_flow(path: Path, flow: Float[Tensor, "1 2 h w"]) -> None:
    """Writes a flow, whole or not at all: .flo, or KITTI's .png, which holds 64ths of a pixel up to 511 px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.ascontiguousarray(flow[0].permute(1, 2, 0).numpy())
    with replacing(path) as temporary:
        if path.suffix == ".flo":
            written = cv2.writeOpticalFlow(str(temporary), values)
        else:
            stored = np.clip(np.round(values * 64 + 2**15), 0, 2**16 - 1).astype(np.uint16)
            known = np.ones_like(stored[..., 0])
            written = cv2.imwrite(str(temporary), np.dstack((known, stored[..., 1], stored[..., 0])))
        if not written:
            raise OSError(f"{path}: cannot be written; is the disk full?")


def flow_of_images(method: FlowMethod, path_1: Path, path_2: Path, folder: Path) -> None:
    """Writes flow.flo, flow.png (colours), warped.png (the second image at the place of the first) and figure.png."""
    image_1, image_2 = read_frames(path_1, path_2)
    flow = method(image_1, image_2)
    folder.mkdir(parents=True, exist_ok=True)
    write_flow(folder / "flow.flo", flow)
    write_picture(folder / "flow.png", flow_colours(flow[0], colour_scale(flow[0])))
    write_picture(folder / "warped.png", to_uint8(warp(image_2, flow)[0]))
    write_picture(folder / "figure.png", flow_figure(image_1[0], image_2[0], flow[0]))
    length = flow.norm(dim=1)
    print(f"flow of {length.mean():.2f} px in the mean, {length.max():.2f} px at most: {folder}/figure.png")


def flow_of_video(method: FlowMethod, config: FlowConfig) -> None:
    """Writes NAME_flow.mp4, each frame beside its flow to the next, and figures spread evenly over the video."""
    path, folder = config.video, config.output_dir
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video")
    pairs = VideoPairs(path, transform=lambda *frames: tuple(frame.float() / 255 for frame in frames))
    count = min(len(pairs), (config.max_frames or sys.maxsize) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    rate = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) or 25.0
    pictured = set(np.linspace(0, count - 1, min(config.pictures, count)).round().astype(int))
    scale, frame, writer = 1.0, pairs[0][0], cv2.VideoWriter()
    height, width = frame.shape[-2] // 2 * 2, frame.shape[-1] // 2 * 2  # the codec takes even sizes only
    with replacing(folder / f"{path.stem}_flow.mp4") as temporary:
        if not writer.open(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, (2 * width, height)):
            raise ValueError(f"{folder}: OpenCV cannot write an mp4 video here")
        for index in tqdm(range(count), desc="flow", unit="frame", disable=None):
            frame, following = pairs[index]
            flow = method(frame[None], following[None])[0]
            # Colours may not flicker: the scale grows at once and fades slowly.
            scale = max(colour_scale(flow), 0.95 * scale)
            sides = [panel[:, :height, :width] for panel in (to_uint8(frame), flow_colours(flow, scale))]
            writer.write(cv2.cvtColor(_to_numpy(torch.cat(sides, dim=2)), cv2.COLOR_RGB2BGR))
            if index in pictured:
                write_picture(folder / f"{path.stem}_{index:05d}.png", flow_figure(frame, following, flow))
        writer.release()
    print(f"flow of {count} frames: {folder / f'{path.stem}_flow.mp4'}")


def main() -> None:
    """The command line: a subcommand for each evaluation. A user's mistake ends in one line and exit code 1."""
    # Broken files are told in our words, not in OpenCV's.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    commands = {"flow": run_flow}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__.splitlines()[0])
    except KeyboardInterrupt:
        sys.exit("stopped; what was written is whole")
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
