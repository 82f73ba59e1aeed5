"""Measure a trained model: optical flow, segmentation, video object segmentation (Section 4 of MC-JEPA, its Table 1).

    python evaluate.py flow --model runs/pocket/checkpoint.pt                          # MovingShapes never trained on
    python evaluate.py flow --model runs/pocket/checkpoint.pt --data-root DATA --benchmark sintel
    python evaluate.py flow --model runs/pocket/checkpoint.pt --images a.png b.png     # pictures of the flow a to b
    python evaluate.py flow --model runs/pocket/checkpoint.pt --video clip.mp4         # a video of its flow
    python evaluate.py flow --model CHECKPOINT --data-root DATA --benchmark kitti2015 --split testing --export TO_SUBMIT
    python evaluate.py segmentation --model CHECKPOINT --data-root DATA --benchmark voc [--finetune]
    python evaluate.py video --model CHECKPOINT --data-root DAVIS --export TO_SUBMIT
    python evaluate.py table1 --model CHECKPOINT --data-root DATA                      # all of it in one row

Without `--data-root` each measures on MovingShapes. `--model` is a checkpoint of train.py or a baseline: of flow zero,
dis, farneback, random (zero flow and OpenCV's DIS stand beside every model); of segmentation a file of torchvision's
backbone, random; of video colour too. Numbers go to the screen and into a JSON file in `--output-dir`, beside pictures.

`--data-root` is the folder of a benchmark in its native layout, or one that holds it up to two folders deeper; see
`data.BENCHMARKS` and `data.LABEL_SETS`. Pairs of flow of one's own lie together as NAME_img1.EXT, NAME_img2.EXT and
NAME_flow.flo or NAME_flow.png (KITTI's format).
"""

import hashlib
import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import draw_segmentation_masks, flow_to_image, make_grid
from tqdm import tqdm

from data import PALETTE, VOID, LabelledImages, MissingSet, Stream, VideoPairs, make_loader
from engine.checkpoint import as_json, replacing, save_checkpoint, write_report
from engine.faults import one_line
from engine.log import Log, _to_numpy, environment, versions, write_picture
from engine.processes import own_device
from flow import resize_flow, warp
from mcjepa import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    MCJEPA,
    ModelConfig,
    load_checkpoint,
    load_model,
    load_weights,
    pad_to_multiple,
)
from sources.flow_benchmarks import (
    REGIONS,
    FlowPair,
    _size,
    find_benchmark,
    known_flow,
    picture_name,
    read_frames,
    read_pair,
    submission_name,
)
from sources.label_sets import LabelAugmentation, ObjectVideo, find_labels, find_masked_videos
from sources.moving_shapes import MovingShapes, ShapeLabels

UNSEEN_SEED = 1_618_033_988
"""Seed of the MovingShapes that are measured on. Training draws from its own `--seed`: never give it this one."""
LARGEST = 8192
"""The largest height or width in pixels that images are brought to; more is a slip of the hand."""
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


def random_model(encoder: str = "convnext_tiny", seed: int = 0) -> MCJEPA:
    """A network as it is before training."""
    torch.manual_seed(seed)
    return MCJEPA(ModelConfig(encoder=encoder), task="mjepa").eval().to(own_device())


def feature_model(name: str, encoder: str = "convnext_tiny", seed: int = 0) -> MCJEPA:
    """A model for its features, in eval mode.

    Args:
        name: a checkpoint of train.py, a state dict of torchvision's convnext_tiny or resnet50, or "random".
        encoder, seed: of "random".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind.
    """
    if name == "random":
        return random_model(encoder, seed)
    try:
        weights = load_weights(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, nor a baseline (random; of videos colour too)") from error
    if "model" in weights:
        return load_model(name, own_device())
    kinds = {"features.1.0.block.0.weight": "convnext_tiny", "layer1.0.conv1.weight": "resnet50"}
    kind = next((kind for key, kind in kinds.items() if key in weights), None)
    if kind is None:
        raise ValueError(f"{name}: neither a checkpoint of train.py nor a state dict of {' or '.join(kinds.values())}")
    torch.manual_seed(0)  # ConvNeXt's stem has no weights in the file
    # For content, without an estimator: there is none in the file.
    config = ModelConfig(encoder=kind, expander=(1,))
    return MCJEPA(config, task="vicreg", backbone_weights=name).eval().to(own_device())


def fingerprint(name: str) -> dict[str, str]:
    """What tells a file of weights from another, wherever it lies; nothing of a baseline."""
    path = Path(name)
    return {"weights": hashlib.sha256(path.read_bytes()).hexdigest()[:16]} if path.is_file() else {}


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


def flow_method(name: str, encoder: str = "convnext_tiny") -> FlowMethod:
    """A baseline, "random" (a network with that encoder as it is before training), or the model of a checkpoint."""
    if name in BASELINES:
        return BASELINES[name]
    if name == "random":
        return model_flow(random_model(encoder))
    try:
        return model_flow(load_model(name, own_device()))
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
        if max(inner) > LARGEST:
            raise ValueError(
                f"--resize {resize}: {inner[1]}x{inner[0]} px are too many; {LARGEST} are allowed in a row"
            )
        resized = [F.interpolate(image, inner, mode="bilinear", antialias=True) for image in (image_1, image_2)]
        return resize_flow(method(*resized), size)

    return estimate


def shapes_pairs(count: int, size: tuple[int, int], seed: int = UNSEEN_SEED) -> Iterator[FlowPair]:
    """MovingShapes as pairs; their flow is known everywhere, also where the second frame hides the point."""
    shapes = MovingShapes(length=count, size=size, frames=2, seed=seed)
    for index in range(count):
        item = shapes[index]
        truth = item["flow_forward"]
        images = item["images"]
        yield FlowPair(f"shapes_{index:04d}", "", images[:1], images[1:], truth, {"all": known_flow(truth)})


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


@contextmanager
def writing_video(path: Path, rate: float) -> Iterator[Callable[[UInt8[Tensor, "3 h w"]], None]]:
    """A function that adds a frame to an mp4 video, which takes its place once it is whole."""
    writer, count = cv2.VideoWriter(), 0
    with replacing(path) as temporary:

        def write(frame: UInt8[Tensor, "3 h w"]) -> None:
            nonlocal count
            count += 1
            height, width = frame.shape[1] // 2 * 2, frame.shape[2] // 2 * 2  # the codec takes even sizes only
            code = cv2.VideoWriter_fourcc(*"mp4v")
            if not writer.isOpened() and not writer.open(str(temporary), code, rate, (width, height)):
                raise ValueError(f"{path.parent}: OpenCV cannot write an mp4 video here")
            writer.write(cv2.cvtColor(_to_numpy(frame[:, :height, :width]), cv2.COLOR_RGB2BGR))

        yield write
        writer.release()
        # The encoder says nothing where the disk is full.
        if int(cv2.VideoCapture(str(temporary)).get(cv2.CAP_PROP_FRAME_COUNT)) != count:
            raise OSError(f"{path}: the video cannot be written; is the disk full?")


# ------------------------------------------------------------------------------------------------ measurement


def measure(pair: FlowPair, method: FlowMethod) -> tuple[Float[Tensor, "1 2 h w"], dict]:
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


def count_pixels(pair: FlowPair) -> dict[str, int]:
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
    encoder: Literal["convnext_tiny", "resnet50", "pwc"] = "convnext_tiny"
    """The network of --model random."""


def run_flow(config: tyro.conf.OmitArgPrefixes[FlowConfig]) -> dict:
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
    method = at_size(flow_method(config.model, config.encoder), config.resize)
    if config.images:
        flow_of_images(method, *config.images, config.output_dir)
    elif config.video:
        flow_of_video(method, config)
    elif config.split == "testing":
        flow_to_submit(method, config)
    else:
        return flow_against_truth(method, config)
    return {}


def flow_against_truth(method: FlowMethod, config: FlowConfig) -> dict:
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
        "label": label,
        "settings": as_json(config) | {"unseen_seed": UNSEEN_SEED},
        "versions": versions(),
    }
    write_report(config.output_dir / "flow.json", report)
    print(f"\nnumbers and pictures: {config.output_dir}")
    return report


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
        raise FileNotFoundError(f"{path}: {'a folder, not a video file' if path.is_dir() else 'no such video'}")
    pairs = VideoPairs(path, transform=lambda *frames: tuple(frame.float() / 255 for frame in frames))
    count = min(len(pairs), (config.max_frames or sys.maxsize) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    rate = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) or 25.0
    pictured = set(np.linspace(0, count - 1, min(config.pictures, count)).round().astype(int))
    scale = 1.0
    with writing_video(folder / f"{path.stem}_flow.mp4", rate) as write:
        for index in tqdm(range(count), desc="flow", unit="frame", disable=None):
            frame, following = pairs[index]
            flow = method(frame[None], following[None])[0]
            # Colours may not flicker: the scale grows at once and fades slowly.
            scale = max(colour_scale(flow), 0.95 * scale)
            write(torch.cat((to_uint8(frame), flow_colours(flow, scale)), dim=2))
            if index in pictured:
                write_picture(folder / f"{path.stem}_{index:05d}.png", flow_figure(frame, following, flow))
    print(f"flow of {count} frames: {folder / f'{path.stem}_flow.mp4'}")


# ------------------------------------------------------------------------------------------------------ segmentation


class LinearHead(nn.Module):
    """A linear classifier of pixels: batch norm and a 1x1 convolution over all levels of a pyramid, at stride 4.

    Each level goes through its own part of the convolution before the sizes are brought together, for both are linear:
    the sum is that of the convolution over the levels side by side, for a fraction of its memory. (Only the batch
    norm's statistics differ a little: they are those of a level before it is enlarged.)

    Args:
        channels, strides: of the pyramid's levels.
        classes: how many there are.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], classes: int) -> None:
        super().__init__()
        self.finest = strides.index(4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        # One bias is enough for the sum.
        self.classifiers = nn.ModuleList(nn.Conv2d(c, classes, 1, bias=i == 0) for i, c in enumerate(channels))
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(self.classifiers[0].bias)

    def forward(self, pyramid: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b c h w"]:
        """Features, coarsest first, to a score for each class at stride 4."""
        size = pyramid[self.finest].shape[2:]
        total = 0.0
        for level, (features, norm, classifier) in enumerate(zip(pyramid, self.norms, self.classifiers, strict=True)):
            scores = classifier(norm(features))
            if level > self.finest:
                scores = F.adaptive_avg_pool2d(scores, size)
            elif level < self.finest:
                scores = F.interpolate(scores, size, mode="bilinear")
            total = total + scores
        return total


class Segmenter(nn.Module):
    """The encoder of a model and a linear head over its features.

    Args:
        finetune: the encoder learns too; else it stays as it is, its normalisation layers in eval mode.
    """

    def __init__(self, model: MCJEPA, classes: int, finetune: bool = False) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.freeze_encoder(not finetune)
        torch.manual_seed(0)
        self.head = LinearHead(model.encoder.channels, model.encoder.strides, classes)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Images in [0, 1], of any size, to a score for each class of each pixel."""
        (h, w), stride = images.shape[2:], max(self.model.encoder.strides)
        scores = self.head(self.model.encode(pad_to_multiple(images, stride)))
        size = [-(-length // stride) * stride for length in (h, w)]
        return F.interpolate(scores, size, mode="bilinear")[..., :h, :w]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover `length` pixels: every `stride`, and the last at the border; 0 if one suffices."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


@torch.no_grad()
def sliding_scores(
    segment: Callable[[Tensor], Tensor], image: Float[Tensor, "1 3 h w"], window: int = 512, stride: int = 341
) -> Float[Tensor, "1 c h w"]:
    """The scores of an image from square windows that slide over it, the mean where they overlap.

    Args:
        segment: images to scores at their size.
        image: of any size; smaller than the window, it is taken whole.
        window, stride: in pixels.
    """
    h, w = image.shape[2:]
    total, times = None, image.new_zeros(1, 1, h, w)
    for top in window_starts(h, window, stride):
        for left in window_starts(w, window, stride):
            here = (..., slice(top, top + window), slice(left, left + window))
            scores = segment(image[here])
            if total is None:
                total = scores.new_zeros(1, scores.shape[1], h, w)
            total[here] += scores
            times[here] += 1
    return total / times


def count_confusion(
    truth: Int64[Tensor, "h w"], prediction: Int64[Tensor, "h w"], classes: int
) -> Int64[Tensor, "c c"]:
    """Pixels by true class (rows) and predicted class (columns); where the truth is VOID they do not count."""
    counts = truth != VOID
    pairs = truth[counts] * classes + prediction[counts]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


class Recipe(NamedTuple):
    """How a linear head is trained on a data set, and the head and the encoder together."""

    steps: int
    warmup: int
    batch: int
    crop: int
    size: int
    """The shorter side of the images."""
    learning_rate: float
    encoder_learning_rate: float


_PROTOCOL = Recipe(40_000, 1_500, 16, 512, 512, 1e-4, 1e-4)
"""The protocol of VICRegL and iBOT (AdamW, weight decay 0.05, poly of power 1)."""
RECIPES = {
    "voc": _PROTOCOL,
    "ade20k": _PROTOCOL._replace(steps=160_000),
    "cityscapes": _PROTOCOL._replace(size=1024),
    # Small data, minutes on two CPU cores (ours).
    "camvid": Recipe(400, 40, 8, 352, 360, 5e-3, 2e-4),
    "shapes": Recipe(300, 30, 8, 192, 192, 1e-2, 2e-4),
}


@dataclass
class SegmentationConfig:
    """Semantic segmentation by a linear head over the features: mean intersection over union (mIoU)."""

    model: str
    """A checkpoint of train.py, a file with torchvision's convnext_tiny or resnet50 (state dict), or random."""
    data_root: Path | None = None
    """A folder with the data set. Without it: MovingShapes."""
    benchmark: Literal["voc", "cityscapes", "ade20k", "camvid"] | None = None
    """Which of those in --data-root; may be left out where there is only one."""
    output_dir: Path = Path("runs/segmentation")
    """Where checkpoint, numbers and pictures go."""
    finetune: bool = False
    """The encoder learns with the head; by default it is frozen."""
    resume: bool = False
    """Go on from the checkpoint in --output-dir; after its last step: only measure."""
    encoder: Literal["convnext_tiny", "resnet50", "pwc"] = "convnext_tiny"
    """The network of --model random."""
    steps: int | None = None
    """Of training (voc, cityscapes 40,000; ade20k 160,000; camvid 400; MovingShapes 300)."""
    warmup: int | None = None
    """Steps until the learning rate is full (1,500; camvid 40; MovingShapes 30; of fewer --steps a tenth at most)."""
    batch: int | None = None
    """Images in a step (16; camvid and MovingShapes 8)."""
    crop: int | None = None
    """Height and width that are trained on, and of the sliding window (512; camvid 352; MovingShapes 192)."""
    window_stride: int | None = None
    """From window to window (two thirds of --crop)."""
    size: int | None = None
    """The images' shorter side is brought to it (512; cityscapes 1024; camvid 360; MovingShapes 192)."""
    learning_rate: float | None = None
    """Of the head (1e-4; for fewer steps more: camvid 5e-3, MovingShapes 1e-2)."""
    encoder_learning_rate: float | None = None
    """Of the encoder with --finetune (1e-4; camvid and MovingShapes 2e-4)."""
    weight_decay: float = 0.05
    """Of AdamW."""
    seed: int = 0
    """Of the order of the images, of their augmentation, and of --model random."""
    shapes_count: int = 200
    """How many MovingShapes are measured."""
    workers: int = 0
    """Processes that load data; any number gives the same run."""
    checkpoint_every: int = 100
    """Steps."""
    pictures: int = 8
    """At most so many images get a picture."""


def read_recipe(config: SegmentationConfig, name: str) -> Recipe:
    """The recipe of a data set with what the flags change. ValueError, in one line, for what cannot work."""
    recipe = RECIPES[name]
    flags = {field: getattr(config, field) for field in recipe._fields}
    recipe = recipe._replace(**{field: value for field, value in flags.items() if value is not None})
    if config.warmup is None:  # a short look would end before the learning rate is full
        recipe = recipe._replace(warmup=min(recipe.warmup, recipe.steps // 10))
    positive = recipe._asdict() | {k: getattr(config, k) for k in ("shapes_count", "checkpoint_every")}
    for field, value in positive.items():
        if value <= 0 and field != "warmup":
            raise ValueError(f"--{field.replace('_', '-')} must be positive")
    if min(recipe.warmup, config.workers, config.pictures, config.weight_decay) < 0:
        raise ValueError("--warmup, --workers, --pictures and --weight-decay must be at least 0")
    if max(recipe.crop, recipe.size) > LARGEST:
        raise ValueError(f"--crop and --size can be {LARGEST} px at most")
    if recipe.batch == 1 and recipe.crop <= 64:
        raise ValueError(f"--batch 1 with --crop {recipe.crop}: batch norm needs more than one cell; enlarge either")
    if config.window_stride is not None and not 0 < config.window_stride <= recipe.crop:
        raise ValueError(f"--window-stride {config.window_stride}: choose 1 to {recipe.crop}, or windows leave gaps")
    return recipe


def run_segmentation(config: tyro.conf.OmitArgPrefixes[SegmentationConfig]) -> dict:
    """Semantic segmentation with frozen or fine-tuned features: trains a linear head, measures mIoU, draws pictures."""
    if config.benchmark and config.data_root is None:
        raise ValueError("--benchmark is about --data-root: give that too")
    name = "shapes"
    if config.data_root is not None:
        name, training = find_labels(config.data_root, config.benchmark, "train")
        _, validation = find_labels(config.data_root, name, "val")
    recipe = read_recipe(config, name)
    if config.data_root is None:
        size = (recipe.size, recipe.size)
        training = ShapeLabels(1_000_000, size, seed=config.seed)
        validation = ShapeLabels(config.shapes_count, size, seed=UNSEEN_SEED)
    checkpoint = config.output_dir / "checkpoint.pt"
    if checkpoint.exists() and not config.resume:
        raise ValueError(f"{config.output_dir} already holds a run: go on with --resume, or give another --output-dir")
    if config.resume and not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint; leave --resume out to begin")
    model = feature_model(config.model, config.encoder, config.seed)
    segmenter = Segmenter(model, len(training.classes), config.finetune).to(own_device())
    settings = as_json(config) | recipe._asdict() | {"data": name, "training_images": len(training)}
    settings |= fingerprint(config.model)
    train_segmenter(segmenter, training, recipe, config, settings)
    return measure_segmentation(segmenter.eval(), validation, recipe, config, settings, training.notes)


def train_segmenter(
    segmenter: Segmenter,
    training: LabelledImages | ShapeLabels,
    recipe: Recipe,
    config: SegmentationConfig,
    settings: dict,
) -> None:
    """Trains the head, and the encoder with --finetune, from the checkpoint or from the beginning; writes checkpoints.

    Raises:
        ValueError: the checkpoint belongs to other settings, or the loss is not finite.
    """
    groups = [{"params": [*segmenter.head.parameters()], "initial_lr": recipe.learning_rate}]
    if config.finetune:
        groups.append({"params": [*segmenter.model.encoder.parameters()], "initial_lr": recipe.encoder_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    # What does not learn is not written: it comes from --model.
    learns = nn.ModuleDict({"head": segmenter.head} | ({"encoder": segmenter.model.encoder} if config.finetune else {}))
    path, start = config.output_dir / "checkpoint.pt", 0
    if config.resume:
        state = load_checkpoint(path)
        # "data" says which data set; its folder may have moved.
        harmless = ("output_dir", "resume", "workers", "checkpoint_every", "pictures", "shapes_count")
        harmless += ("data_root", "benchmark", "window_stride", "model")
        harmless += ("encoder",) if "weights" in settings else ()  # a file tells its own
        old = state["config"]
        if not isinstance(old, dict) or isinstance(old.get("model"), dict):
            raise ValueError(f"{path}: a checkpoint of train.py; give another --output-dir")
        differing = [k for k in sorted(old.keys() | settings) if k not in harmless and old.get(k) != settings.get(k)]
        if differing:
            told = "; ".join(f"{k}: {old.get(k)} there, {settings.get(k)} here" for k in differing)
            raise ValueError(f"{path}: another configuration ({told}); give another --output-dir")
        try:
            learns.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: not of this data set and encoder; give another --output-dir") from error
        start = state["step"]
    if start >= recipe.steps:
        return
    transform = LabelAugmentation(recipe.crop, recipe.size)
    loader = make_loader(training, transform, recipe.batch, Stream(config.seed, start_step=start), config.workers)
    device = own_device()
    segmenter.train()
    with closing(Log(config.output_dir, start, recipe.steps)) as log:
        log.record("config", settings)
        log.record("environment", environment(device))
        for step, (images, labels) in zip(range(start, recipe.steps), loader, strict=False):
            factor = min((step + 1) / max(recipe.warmup, 1), 1.0) * (1 - step / recipe.steps)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            images, labels = images.to(device), labels.to(device)
            # The mean over the pixels that count; 0 if there are none.
            loss = F.cross_entropy(segmenter(images), labels, ignore_index=VOID, reduction="sum")
            loss = loss / (labels != VOID).sum().clamp(min=1)
            if not math.isfinite(loss.item()):
                raise ValueError(f"step {step}: the loss is not finite; lower --learning-rate, or mend the features")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done = step + 1
            log.advance(text=f"loss {loss.item():.3f}")
            if done % 10 == 0 or done == recipe.steps:
                log.write(done, {"loss": loss.item(), "learning_rate": optimizer.param_groups[0]["lr"]})
            if done % config.checkpoint_every == 0 or done == recipe.steps:
                state = {"model": learns.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(path, state | {"step": done, "config": settings})


def measure_segmentation(
    segmenter: Segmenter,
    validation: LabelledImages | ShapeLabels,
    recipe: Recipe,
    config: SegmentationConfig,
    settings: dict,
    notes: Sequence[str],
) -> dict:
    """Measures at the images' own size: a table on the screen, segmentation.json, and pictures."""
    device, classes = own_device(), validation.classes
    (config.output_dir / "pictures").mkdir(parents=True, exist_ok=True)
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for index in tqdm(range(len(validation)), desc="segmentation", unit="image", disable=None):
        image, truth = validation[index]
        shown = image[None].to(device).float() / 255
        (h, w), factor = truth.shape, recipe.size / min(truth.shape)
        if factor != 1:
            size = [max(round(length * factor), 1) for length in (h, w)]
            shown = F.interpolate(shown, size, mode="bilinear", antialias=True)
        stride = config.window_stride or max(recipe.crop * 2 // 3, 1)
        scores = sliding_scores(segmenter, shown, recipe.crop, stride)
        if not scores.isfinite().all():
            raise ValueError(f"image {index}: the scores are not finite; are the weights of --model, or of the head?")
        prediction = F.interpolate(scores, (h, w), mode="bilinear").argmax(dim=1)[0].cpu()
        confusion += count_confusion(truth, prediction, len(classes))
        if index < config.pictures:
            figure = labels_figure(image, truth, prediction, classes, validation.colours)
            write_picture(config.output_dir / "pictures" / f"image_{index:04d}.png", figure)
    hits, union = confusion.diag(), confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diag()
    iou = [(hit / total).item() if total else None for hit, total in zip(hits, union, strict=True)]
    report = {
        "data": settings["data"],
        "images": len(validation),
        "miou": mean_iou(confusion),
        "pixel_accuracy": (hits.sum() / confusion.sum()).item(),
        "iou": dict(zip(classes, iou, strict=True)),
        "confusion": confusion.tolist(),
        "notes": list(notes),
        "settings": settings,
        "versions": versions(),
    }
    write_report(config.output_dir / "segmentation.json", report)
    print_segmentation(report)
    print(f"numbers and pictures: {config.output_dir}")
    return report


def print_segmentation(report: dict) -> None:
    """IoU of each class beside its share of the pixels; long lists in three columns."""
    pixels = [sum(row) for row in report["confusion"]]
    cells = [
        f"{name:22}{'-' if iou is None else f'{100 * iou:.1f}':>6}{100 * count / sum(pixels):7.1f}"
        for (name, iou), count in zip(report["iou"].items(), pixels, strict=True)
    ]
    columns = 1 if len(cells) <= 25 else 3
    settings = report["settings"]
    kind = "fine-tuned" if settings["finetune"] else "frozen"
    print(
        f"\nSegmentation of {report['data']}, {kind} features, {settings['steps']} steps: {report['images']} images\n"
    )
    print("   ".join([f"{'IoU and share of pixels':22}{'[%]':>5}{'[%]':>7}"] * columns))
    rows = -(-len(cells) // columns)
    for row in range(rows):
        print("   ".join(cells[row::rows]))
    print(f"\nmIoU {100 * report['miou']:.2f}%, pixel accuracy {100 * report['pixel_accuracy']:.2f}%")
    for note in report["notes"]:
        print(f"note: {note}")


def labels_figure(
    image: UInt8[Tensor, "3 h w"],
    truth: Int64[Tensor, "h w"],
    prediction: Int64[Tensor, "h w"],
    classes: Sequence[str],
    colours: np.ndarray,
) -> UInt8[Tensor, "3 H W"]:
    """An image, its true and its predicted labels in the colours of the data set, and their names."""
    table = torch.zeros(256, 3, dtype=torch.uint8)
    table[: len(colours)] = torch.from_numpy(colours.copy())
    # Black, but where that is a class (the background of VOC): there as in VOC.
    table[VOID] = torch.from_numpy(PALETTE[VOID] if (colours == 0).all(axis=1).any() else PALETTE[0])
    panels = [table[labels].permute(2, 0, 1) for labels in (truth, prediction)]
    legend = np.full((*truth.shape, 3), 255, np.uint8)
    present = torch.cat((truth, prediction)).unique().tolist()
    for row, label in enumerate(label for label in present if label != VOID):
        corner = (4, 4 + 14 * row)
        cv2.rectangle(legend, corner, (corner[0] + 16, corner[1] + 10), table[label].tolist(), cv2.FILLED)
        place = (corner[0] + 22, corner[1] + 10)
        cv2.putText(legend, classes[label], place, cv2.FONT_HERSHEY_PLAIN, 0.75, (0, 0, 0), 1, cv2.LINE_AA)
    panels.append(torch.from_numpy(legend).permute(2, 0, 1))
    return _grid(list(zip(("image", "truth", "prediction", "classes"), (image, *panels), strict=True)), columns=4)


# --------------------------------------------------------------------------------------- segmentation of video objects


FeatureMethod = Callable[[Float[Tensor, "1 3 h w"]], Float[Tensor, "d _ _"]]
"""An image in [0, 1] to features at a fixed stride."""


def feature_method(name: str, stride: int, encoder: str = "convnext_tiny", seed: int = 0) -> FeatureMethod:
    """The features of a model (see `feature_model`) at one stride, or "colour": the mean colour of each cell.

    Raises:
        ValueError: the model has no level of that stride.
    """
    if name == "colour":
        mean, deviation = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        return lambda image: F.avg_pool2d((image - mean) / deviation, stride)[0]
    model = feature_model(name, encoder, seed)
    strides = model.encoder.strides
    if stride not in strides:
        raise ValueError(f"--stride {stride}: the features have strides {', '.join(map(str, strides))}")

    @torch.no_grad()
    def features(image: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "d _ _"]:
        return model.encode(image.to(own_device()))[strides.index(stride)][0]

    return features


@dataclass
class VideoConfig:
    """Video object segmentation: the masks of the first frame, carried on by the likeness of features (J and F)."""

    model: str
    """A checkpoint of train.py, a file with torchvision's convnext_tiny or resnet50, or a baseline: random, colour."""
    data_root: Path | None = None
    """A folder with DAVIS. Without it: MovingShapes."""
    benchmark: Literal["davis2016", "davis2017"] | None = None
    """davis2016: all objects are one, and the sequences those of its list. By default as the files lie."""
    split: str = "val"
    """Which list of sequences (train, val, test-dev)."""
    sequences: tuple[str, ...] = ()
    """Only these of them."""
    resolution: str | None = None
    """The folder below JPEGImages (480p, or the only one)."""
    output_dir: Path = Path("runs/video")
    """Where video.json, pictures and videos go; files of the same name are replaced."""
    export: Path | None = None
    """A folder for the masks, SEQUENCE/00000.png, as the benchmark's server takes them."""
    encoder: Literal["convnext_tiny", "resnet50", "pwc"] = "convnext_tiny"
    """The network of --model random."""
    seed: int = 0
    """Of --model random."""
    stride: int = 8
    """The level of the features."""
    size: int | None = None
    """The frames' shorter side is brought to it (480; MovingShapes: as they are)."""
    standardise: bool = False
    """Give the channels the mean 0 and the deviation 1 over the first frame (DINO's features come from a layer norm)"""
    context: int = 7
    """So many last frames give labels, besides the first (as in DINO)."""
    radius: int = 12
    """In cells of the features: no label comes from farther (as in DINO)."""
    topk: int = 5
    """So many cells give their label (as in DINO)."""
    temperature: float = 0.1
    """Their weight is exp(cosine / temperature) (as in DINO)."""
    shapes_count: int = 20
    """The number of MovingShapes videos."""
    shapes_frames: int = 20
    """Their length."""
    shapes_size: int = 192
    """Their height and width in pixels."""
    pictures: int = 8
    """At most so many sequences get a picture and a video."""


def shapes_videos(count: int, frames: int, size: int) -> Iterator[ObjectVideo]:
    """MovingShapes as videos, from the unseen seed; those without a shape in the first frame are left out."""
    shapes = MovingShapes(length=10 * count, size=(size, size), frames=frames, seed=UNSEEN_SEED)
    names = [f"{t:05d}" for t in range(frames)]

    def videos() -> Iterator[ObjectVideo]:
        for index in range(len(shapes)):
            item = shapes[index]
            frames, masks = [to_uint8(image) for image in item["images"]], item["instances"].to(torch.uint8)
            objects = [number for number in masks[0].unique().tolist() if number]
            if objects:
                yield ObjectVideo(f"shapes_{index:04d}", objects, frames.__getitem__, masks.__getitem__, names)

    return islice(videos(), count)


def follow_objects(video: ObjectVideo, features: FeatureMethod, config: VideoConfig) -> Iterator[UInt8[Tensor, "h w"]]:
    """The predicted mask of each frame, the first being the true one (DINO's protocol).

    Labels are carried on at the size of the features; the soft labels of the first frame and of the last few are kept.
    For the mask they are enlarged, each object's are stretched to [0, 1], and the largest wins.
    """
    first = video.masks(0)
    (h, w), numbers = first.shape, torch.tensor([0, *video.objects], dtype=torch.uint8)
    factor = 1.0 if config.size is None else config.size / min(h, w)
    cells = [max(round(length * factor / config.stride), 1) for length in (h, w)]
    memory: deque = deque(maxlen=config.context)
    for index in range(video.length):
        frame = video.frames(index)[None].float() / 255
        size = [cell * config.stride for cell in cells]
        now = features(F.interpolate(frame, size, mode="bilinear", antialias=True))
        if index == 0 and config.standardise:
            deviation, mean = torch.std_mean(now, dim=(1, 2), keepdim=True, correction=0)
            # A channel that is all but dead in the first frame would outshout the others where it wakes.
            deviation = deviation.clamp(min=max(0.01 * deviation.median().item(), 1e-6))
        if config.standardise:
            now = (now - mean) / deviation
        if index == 0:
            one_hot = (first[None] == numbers[:, None, None]).float()
            one_hot[0] = 1 - one_hot[1:].sum(dim=0)  # void is background here
            labels = F.interpolate(one_hot[None], cells, mode="nearest-exact")[0].to(now.device)
            beginning = (now, labels)
            yield torch.where(one_hot[0] > 0, 0, first).to(torch.uint8)
            continue
        known, their_labels = (torch.stack(x) for x in zip(beginning, *memory, strict=True))
        labels = propagate_labels(now, known, their_labels, config.radius, config.topk, config.temperature)
        if not labels.isfinite().all():
            raise ValueError(f"{video.name}: the features are not finite (or --temperature is too small)")
        memory.append((now, labels))
        soft = F.interpolate(labels[None].cpu(), (h, w), mode="bilinear")[0]
        least, most = (soft.flatten(1).amin(dim=1), soft.flatten(1).amax(dim=1))
        least, span = least[:, None, None], (most - least)[:, None, None]
        # An object that is everywhere, or nowhere, has nothing to stretch.
        soft = torch.where(span > 1e-6, (soft - least) / span, soft)
        yield numbers[soft.argmax(dim=0)]


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Of J or F over the frames of an object, as DAVIS counts: the mean, the recall (share above 0.5) and the decay
    (mean of the first quarter less that of the last; the quarters share their border frames)."""
    borders = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    quarters = [values[start : stop + 1] for start, stop in pairwise(borders)]
    return {
        "mean": float(np.mean(values)),
        "recall": float(np.mean([value > 0.5 for value in values])),
        "decay": float(np.mean(quarters[0]) - np.mean(quarters[-1])),
    }


def run_video(config: tyro.conf.OmitArgPrefixes[VideoConfig]) -> dict:
    """Video object segmentation by label propagation on DAVIS or MovingShapes: J, F, masks, pictures and videos."""
    if config.data_root is None and (config.benchmark or config.sequences or config.resolution):
        raise ValueError("--benchmark, --sequences and --resolution are about --data-root: give that too")
    sizes = (config.stride, config.topk, config.shapes_count, config.shapes_size, config.temperature)
    if (
        not min(sizes) > 0
        or math.isnan(config.temperature)
        or (config.size is not None and config.size < config.stride)
    ):
        raise ValueError(
            "--stride, --topk, --temperature, --shapes-count, --shapes-size must be positive, --size at least --stride"
        )
    if max(config.size or 0, config.shapes_size) > LARGEST:
        raise ValueError(f"--size and --shapes-size can be {LARGEST} px at most")
    if min(config.context, config.radius, config.pictures) < 0 or config.shapes_frames < 3:
        raise ValueError("--context, --radius and --pictures are at least 0, --shapes-frames 3: the ends do not count")
    notes: list[str] = []
    if config.data_root is None:
        source, count = f"MovingShapes, {config.shapes_size} px, unseen seed", config.shapes_count
        videos = shapes_videos(count, config.shapes_frames, config.shapes_size)
    else:
        year = config.benchmark.removeprefix("davis") if config.benchmark else None
        videos, notes = find_masked_videos(config.data_root, config.split, year)
        source, count = f"{config.benchmark or 'DAVIS'} in {config.data_root}", len(videos)
        config = replace(config, size=config.size or 480)
    features = feature_method(config.model, config.stride, config.encoder, config.seed)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    sequences, failure = {}, None
    try:
        with tqdm(total=count, desc="video", unit="sequence", disable=None) as bar:
            for place, video in enumerate(videos):
                start = time.perf_counter()
                predictions = [mask.cpu() for mask in follow_objects(video, features, config)]
                seconds = (time.perf_counter() - start) / video.length
                sequences[video.name] = measure_objects(video, predictions) | {"seconds": seconds}
                write_masks(video, predictions, config, pictured=place < config.pictures)
                bar.update()
                bar.set_postfix_str(video.name)
    except (ValueError, OSError) as error:
        if not sequences:
            raise
        failure = error  # what was measured until then is not lost
        notes = [*notes, f"stopped before the end: {one_line(error)}"]
    report = summarise_objects(sequences) | {
        "data": source,
        "notes": notes + [f"{name}: {each['note']}" for name, each in sequences.items() if each["note"]],
        "sequences": sequences,
        "settings": as_json(config),
        "versions": versions(),
    }
    write_report(config.output_dir / "video.json", report)
    print_objects(report)
    if config.export:
        print(f"masks of {len(sequences)} sequences: {config.export}")
    print(f"numbers, pictures and videos: {config.output_dir}")
    if failure:
        raise failure
    if not report["mean"] and not config.export:
        raise ValueError(f"{source}: nothing to measure, see the notes; --export writes masks all the same")
    return report


def write_masks(
    video: ObjectVideo, predictions: list[UInt8[Tensor, "h w"]], config: VideoConfig, pictured: bool
) -> None:
    """The masks of a video for the benchmark's server, if --export is given; a figure and a video, if `pictured`."""
    if config.export:
        for name, mask in zip(video.frame_names, predictions, strict=True):
            write_mask(config.export / video.name / f"{name}.png", mask)
    if pictured:
        write_picture(config.output_dir / f"{video.name}.png", objects_figure(video, predictions))
        with writing_video(config.output_dir / f"{video.name}.mp4", 24.0) as write:
            for index, mask in enumerate(predictions):
                write(overlay(video.frames(index), mask))


def measure_objects(video: ObjectVideo, predictions: list[UInt8[Tensor, "h w"]]) -> dict:
    """J and F of each object in each frame but the first and the last, whose statistics are those of DAVIS.

    Frames without a mask are left out, and so are void pixels and objects that the first mask does not have.
    """
    values = {number: {"J": [], "F": []} for number in video.objects}
    missing, empty, strangers = 0, 0, set()
    for index in range(1, video.length - 1):
        truth = video.masks(index)
        if truth is None:
            missing += 1
            continue
        counts = truth != VOID
        if not counts.any():
            empty += 1
            continue
        strangers |= set(truth.unique().tolist()) - {0, VOID, *video.objects}
        for number, each in values.items():
            annotation, prediction = ((mask == number) & counts for mask in (truth, predictions[index]))
            each["J"].append(region_similarity(annotation, prediction))
            each["F"].append(contour_accuracy(annotation, prediction))
    notes = [f"frames without a mask: {missing}"] * bool(missing)
    notes += [f"frames that are void everywhere: {empty}"] * bool(empty)
    notes += [f"objects {', '.join(map(str, sorted(strangers)))} not in the first mask"] * bool(strangers)
    objects = {}
    if values[video.objects[0]]["J"]:
        objects = {
            number: {name: statistics(each[name]) | {"frames": each[name]} for name in ("J", "F")}
            for number, each in values.items()
        }
    else:
        notes.append("nothing to measure")
    return {"objects": objects, "frames": video.length, "note": "; ".join(notes)}


def summarise_objects(sequences: dict[str, dict]) -> dict:
    """The means over all objects, each counted alike, as DAVIS does; empty where nothing was measured."""
    objects = [each for sequence in sequences.values() for each in sequence["objects"].values()]
    if not objects:
        return {"mean": {}}
    means = {
        f"{name}_{kind}": float(np.mean([each[name][kind] for each in objects]))
        for name in ("J", "F")
        for kind in ("mean", "recall", "decay")
    }
    seconds = float(np.median([sequence["seconds"] for sequence in sequences.values()]))
    return {"mean": {"J&F": (means["J_mean"] + means["F_mean"]) / 2} | means | {"seconds": seconds}}


def print_objects(report: dict) -> None:
    """A row for each sequence, and the means over all objects."""
    names = ("J&F", "J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay")
    print(f"\nVideo object segmentation on {report['data']}\n")
    print(
        f"{'[%]':24}{'objects':>8}" + "".join(f"{name.replace('_', '-'):>10}" for name in names) + f"{'s a frame':>11}"
    )
    for name, sequence in report["sequences"].items():
        means = summarise_objects({name: sequence})["mean"]
        if means:
            row = "".join(f"{100 * means[each]:10.2f}" for each in names)
            print(f"{name:24}{len(sequence['objects']):8}{row}{means['seconds']:11.3f}")
    if report["mean"]:
        count = sum(len(sequence["objects"]) for sequence in report["sequences"].values())
        row = "".join(f"{100 * report['mean'][each]:10.2f}" for each in names)
        print(f"{'mean over objects':24}{count:8}{row}{report['mean']['seconds']:11.3f}")
    for note in report["notes"]:
        print(f"note: {note}")


def write_mask(path: Path, mask: UInt8[Tensor, "h w"]) -> None:
    """A palette png in DAVIS's colours, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask.numpy())  # grey; a palette makes it mode P
    image.putpalette(PALETTE.tobytes())
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def overlay(frame: UInt8[Tensor, "3 h w"], mask: UInt8[Tensor, "h w"]) -> UInt8[Tensor, "3 h w"]:
    """The objects of a mask over the frame, half transparent, in DAVIS's colours."""
    numbers = [number for number in mask.unique().tolist() if number not in (0, VOID)]
    if not numbers:
        return frame
    masks = torch.stack([mask == number for number in numbers])
    return draw_segmentation_masks(frame, masks, alpha=0.5, colors=[tuple(PALETTE[n].tolist()) for n in numbers])


def objects_figure(video: ObjectVideo, predictions: list[UInt8[Tensor, "h w"]]) -> UInt8[Tensor, "3 H W"]:
    """As Figure 4 of the paper: frames 1, 10, 25 and 50 (or the last) with our masks; above, with the true ones."""
    shown = sorted({min(number, video.length) - 1 for number in (1, 10, 25, 50)})
    panels = []
    for title, masks in (("truth", video.masks), ("ours", predictions.__getitem__)):
        for index in shown:
            frame, mask = video.frames(index), masks(index)
            panels.append((f"t = {index + 1}, {title}", frame if mask is None else overlay(frame, mask)))
    return _grid(panels, columns=len(shown))


# ----------------------------------------------------------------------------------------------------------- Table 1


TABLE_COLUMNS = (
    ("Sintel clean", "EPE"),
    ("Sintel final", "EPE"),
    ("KITTI 2015", "EPE"),
    ("VOC", "frozen"),
    ("VOC", "tuned"),
    ("Cityscapes", "frozen"),
    ("Cityscapes", "tuned"),
    ("ADE20K", "frozen"),
    ("ADE20K", "tuned"),
    ("DAVIS 2017", "J&F"),
)
# Of arXiv 2307.12698v1, written down from memory: check them there before you cite them. nan: not in that table.
PAPER_ROWS = {
    "paper: M-JEPA": (2.98, 3.82, 3.01, *[math.nan] * 7),
    "paper: VICReg": (*[math.nan] * 3, 60.1, 77.8, 59.8, 76.3, 28.6, 41.1, 58.1),
    "paper: VICRegL": (*[math.nan] * 3, 66.8, 79.7, 64.9, 78.3, 30.6, 44.1, 66.7),
    "paper: MC-JEPA": (2.81, 3.51, 2.67, 67.1, 79.9, 65.5, 78.4, 30.8, 44.2, 70.5),
}
"""Rows of the paper to stand beside ours."""


@dataclass
class Table1Config:
    """Flow, segmentation and video of one model, as a row of the paper's Table 1."""

    model: str
    """A checkpoint of train.py, a file with torchvision's convnext_tiny or resnet50 (state dict), or random."""
    data_root: Path | None = None
    """A folder that holds the benchmarks; what is not there stays blank. Without it: MovingShapes."""
    output_dir: Path = Path("runs/table1")
    """Each benchmark gets a folder in it. Trainings that were stopped go on; the rest is measured again."""
    encoder: Literal["convnext_tiny", "resnet50", "pwc"] = "convnext_tiny"
    """The network of --model random."""
    finetune: bool = True
    """Segmentation with a fine-tuned encoder too, not only with a frozen one."""
    steps: int | None = None
    """Of each training of segmentation, for a quick look; by default those of `segmentation`."""
    workers: int = 0
    """Processes that load data for the training of segmentation."""


Numbers = dict[tuple[str, str], float]
"""By column, as in TABLE_COLUMNS."""
Job = Callable[[], tuple[Numbers, list[str]]]
"""Measures a part of the row; gives its numbers, and the notes that belong to them."""


def table1_flow(config: Table1Config, benchmark: Literal["sintel", "kitti2015"] | None) -> tuple[Numbers, list[str]]:
    """End-point errors, each image counted alike; of MovingShapes zero flow's too."""
    folder = config.output_dir / f"flow_{benchmark or 'shapes'}"
    report = run_flow(FlowConfig(config.model, config.data_root, benchmark, output_dir=folder, encoder=config.encoder))
    errors = {
        group: {name: row["per_image"]["epe"]["all"] for name, row in rows.items()}
        for group, rows in report["groups"].items()
    }
    label = report["label"]
    if benchmark == "sintel":
        numbers = {(f"Sintel {group}", "EPE"): each[label] for group, each in errors.items()}
    elif benchmark == "kitti2015":
        numbers = {("KITTI 2015", "EPE"): errors["all"][label]}
    else:
        numbers = {("MovingShapes", "EPE"): errors["all"][label], ("MovingShapes", "zero EPE"): errors["all"]["zero"]}
    return numbers, report["notes"]


def table1_segmentation(
    config: Table1Config, column: str, benchmark: str | None, finetune: bool
) -> tuple[Numbers, list[str]]:
    """mIoU in percent; a training that was stopped goes on."""
    kind = "tuned" if finetune else "frozen"
    folder = config.output_dir / f"segmentation_{benchmark or 'shapes'}_{kind}"
    report = run_segmentation(
        SegmentationConfig(
            config.model,
            config.data_root,
            benchmark,
            folder,
            finetune,
            resume=(folder / "checkpoint.pt").exists(),
            encoder=config.encoder,
            steps=config.steps,
            workers=config.workers,
        )
    )
    return {(column, kind): 100 * report["miou"]}, report["notes"]


def table1_video(
    config: Table1Config, column: str, benchmark: Literal["davis2017"] | None
) -> tuple[Numbers, list[str]]:
    """J&F in percent."""
    folder = config.output_dir / f"video_{benchmark or 'shapes'}"
    report = run_video(
        VideoConfig(config.model, config.data_root, benchmark, output_dir=folder, encoder=config.encoder)
    )
    return {(column, "J&F"): 100 * report["mean"]["J&F"]}, report["notes"]


def print_table1(measured: Numbers) -> None:
    """Ours below the paper's rows; what is no column of theirs below the table."""
    rows = PAPER_ROWS | {"ours": [measured.get(column, math.nan) for column in TABLE_COLUMNS]}
    print("\n" + " " * 16 + "".join(f"{title:>13}" for title, _ in TABLE_COLUMNS))
    print(f"{'[px], [%]':16}" + "".join(f"{unit:>13}" for _, unit in TABLE_COLUMNS))
    for name, numbers in rows.items():
        print(f"{name:16}" + "".join(f"{'-' if math.isnan(n) else format(n, '.2f'):>13}" for n in numbers))
    others = {column: number for column, number in measured.items() if column not in TABLE_COLUMNS}
    if others:
        print("MovingShapes: " + ", ".join(f"{unit} {number:.2f}" for (_, unit), number in others.items()))


def run_table1(config: tyro.conf.OmitArgPrefixes[Table1Config]) -> None:
    """One row of the paper's Table 1 for a model: optical flow, segmentation and video, beside the paper's rows."""
    if config.data_root is not None and not config.data_root.is_dir():
        raise FileNotFoundError(f"{config.data_root}: no such folder; check the path")
    if config.steps is not None and config.steps < 1:
        raise ValueError("--steps must be positive")
    has_flow = feature_model(config.model, config.encoder).estimator is not None
    row = {"model": config.model, "encoder": config.encoder, "steps": config.steps} | fingerprint(config.model)
    if "weights" in row:
        del row["model"], row["encoder"]  # its content tells all
    path = config.output_dir / "row.json"
    if path.exists() and path.read_text() != json.dumps(row, indent=2) + "\n":
        raise ValueError(f"{config.output_dir} holds the row of another model or --steps: give another --output-dir")
    write_report(path, row)

    jobs: list[tuple[str, Job]] = []
    embedded = config.data_root is None
    if has_flow:
        for benchmark in (None,) if embedded else ("sintel", "kitti2015"):
            jobs.append((f"flow of {benchmark or 'MovingShapes'}", partial(table1_flow, config, benchmark)))
    sets = {"MovingShapes": None} if embedded else {"VOC": "voc", "Cityscapes": "cityscapes", "ADE20K": "ade20k"}
    for column, benchmark in sets.items():
        for finetune in (False, True) if config.finetune else (False,):
            run = partial(table1_segmentation, config, column, benchmark, finetune)
            jobs.append((f"segmentation of {column}", run))
    video = ("MovingShapes", None) if embedded else ("DAVIS 2017", "davis2017")
    jobs.append((f"video of {video[0]}", partial(table1_video, config, *video)))

    measured: Numbers = {}
    notes = ["the paper's rows are written down from memory of arXiv 2307.12698v1"]
    notes += [] if has_flow else ["no flow: this model has no estimator"]
    failures = []
    for name, job in jobs:  # what is not there, or broken, is told; the others are measured all the same
        try:
            numbers, told = job()
            measured |= numbers
            notes += [f"{name}: {note}" for note in told]
        except MissingSet as error:
            notes.append(f"{name}: {error}")
        except (ValueError, OSError, RuntimeError) as error:  # the last: out of memory
            failures.append(f"{name}: {one_line(error)}")
    print_table1(measured)
    notes = list(dict.fromkeys(notes))  # frozen and fine-tuned miss the same data set
    for note in notes:
        print(f"note: {note}")
    numbers = {" ".join(column): number for column, number in measured.items()}
    report = {"measured": numbers, "notes": notes, "failures": failures, "settings": as_json(config)}
    write_report(config.output_dir / "table1.json", report | {"versions": versions()})
    print(f"numbers: {config.output_dir}")
    if failures or not measured:
        raise ValueError("; ".join(failures) or f"{config.data_root}: holds none of the benchmarks, see the notes")


def main() -> None:
    """The command line: a subcommand for each evaluation. A user's mistake ends in one line and exit code 1."""
    # Broken files are told in our words, not in OpenCV's.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    commands = {"flow": run_flow, "segmentation": run_segmentation, "video": run_video, "table1": run_table1}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__.splitlines()[0])
    except KeyboardInterrupt:
        sys.exit("stopped; what was written is whole")
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
