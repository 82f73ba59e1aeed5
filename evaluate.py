"""Measures a trained model: optical flow, segmentation, video object segmentation (Section 4 of MC-JEPA, Table 1).

    python evaluate.py flow --model runs/pocket/checkpoint.pt                          # unseen MovingShapes
    python evaluate.py flow --model runs/pocket/checkpoint.pt --data-root DATA --benchmark sintel
    python evaluate.py flow --model runs/pocket/checkpoint.pt --images a.png b.png     # pictures of the flow a to b
    python evaluate.py flow --model runs/pocket/checkpoint.pt --video clip.mp4         # a video of its flow
    python evaluate.py flow --model CHECKPOINT --data-root DATA --benchmark kitti2015 --split testing --export SUBMIT
    python evaluate.py segmentation --model CHECKPOINT --data-root DATA --benchmark voc [--finetune]
    python evaluate.py video --model CHECKPOINT --data-root DATA --benchmark davis2017 --export SUBMIT
    python evaluate.py table1 --model CHECKPOINT --data-root DATA                      # all of it in one row

`--model` is a checkpoint of train.py or a baseline: zero, dis, random for flow; random for segmentation; random, colour
for video. Segmentation and video also take a torchvision state dict of convnext_tiny or resnet50. Without `--data-root`
each command measures on MovingShapes. Numbers go to the screen and, with pictures, to `--output-dir`.

`--data-root` is the folder of a data set as its archive unpacks, or the folder above it; `--benchmark` may be left out
where it holds only one. sources/flow_benchmarks.py and sources/label_sets.py show the layouts.
"""

import hashlib
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
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
from engine.checkpoint import as_json, check_same_run, newest_checkpoint, replacing, save_checkpoint, write_json
from engine.faults import one_line, run_command
from engine.log import Log, environment, versions, write_picture
from engine.processes import own_device
from flow import resize_flow, warp
from mcjepa import (
    IMAGENET_MEAN,
    IMAGENET_STD,
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
    find_benchmark,
    known_flow,
    picture_name,
    read_frames,
    read_pair,
    submission_name,
    write_flow,
)
from sources.label_sets import LabelAugmentation, ObjectVideo, find_labels, find_masked_videos
from sources.moving_shapes import MovingShapes, ShapeLabels

UNSEEN_SEED = 1_618_033_988
"""Seed of the MovingShapes that are measured on. Training draws from its own `--seed`: never give it this one."""
SHAPES_SIZE = 192
"""Height and width in pixels of the MovingShapes that are measured on (the crop of the pocket preset)."""
SHAPES_PAIRS, SHAPES_IMAGES, SHAPES_VIDEOS, SHAPES_FRAMES = 200, 200, 20, 20
"""How many of them: pairs for flow, images for segmentation, videos and the frames of each."""
PICTURED_VIDEOS = 8
"""How many sequences get a picture and a video at most."""
Mask = Bool[Tensor, "b 1 h w"] | Bool[Tensor, "b h w"]
FlowMethod = Callable[[Tensor, Tensor], Tensor]
"""Two images (1, 3, h, w) in [0, 1] to the flow (1, 2, h, w) from the first to the second, in pixels."""
FeatureMethod = Callable[[Tensor], Tensor]
"""An image (1, 3, h, w) in [0, 1] to features (d, h / stride, w / stride) at a fixed stride."""


# ------------------------------------------------------------------------------------------------------------ metrics


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
    """Mean distance in pixels between the ends of the estimated and the true flow vectors (EPE).

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

    Arguments and errors are those of `end_point_error`. Tables print it in percent.
    """
    error, length = _errors_and_lengths(flow, truth, valid)
    return (~((error <= 3.0) | (error <= 0.05 * length))).float().mean()


def count_confusion(
    truth: Int64[Tensor, "h w"], prediction: Int64[Tensor, "h w"], classes: int
) -> Int64[Tensor, "c c"]:
    """Pixels by true class (rows) and predicted class (columns); pixels whose truth is VOID do not count."""
    counts = truth != VOID
    pairs = truth[counts] * classes + prediction[counts]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_iou(confusion: Int64[Tensor, "c c"]) -> Float[Tensor, " c"]:
    """Intersection over union of each class, in [0, 1]; NaN for a class that neither occurs nor is predicted."""
    return confusion.diag() / (confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diag())


def mean_iou(confusion: Int64[Tensor, "c c"]) -> float:
    """The mean over classes of intersection over union, in [0, 1].

    Args:
        confusion: pixels by true class (rows) and predicted class (columns), without void pixels. A class that neither
            occurs nor is predicted is left out of the mean.

    Raises:
        ValueError: no pixel at all.
    """
    iou = class_iou(confusion)
    if iou.isnan().all():
        raise ValueError("no pixel in the confusion matrix: the mean IoU is not defined")
    return iou[~iou.isnan()].mean().item()


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


def davis_statistics(values: Sequence[float]) -> dict[str, float]:
    """J or F over the frames of an object, as DAVIS counts: the mean, the recall (share above 0.5) and the decay (mean
    of the first quarter less that of the last; neighbouring quarters share a frame)."""
    borders = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    quarters = [values[start : stop + 1] for start, stop in pairwise(borders)]
    return {
        "mean": float(np.mean(values)),
        "recall": float(np.mean([value > 0.5 for value in values])),
        "decay": float(np.mean(quarters[0]) - np.mean(quarters[-1])),
    }


def propagate_labels(
    target: Float[Tensor, "d h w"],
    context: Float[Tensor, "n d h w"],
    labels: Float[Tensor, "n c h w"],
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Float[Tensor, "c h w"]:
    """Predicts the labels of a frame from those of others by feature similarity (Jabri et al. 2020; DINO's numbers).

    Each pixel of the target takes the labels of its `topk` most similar pixels among those of all context frames that
    are at most `radius` rows and columns away, weighted by exp(cosine / temperature). On DAVIS these are frames of 480p
    at stride 8, the first frame and the last 7.

    The target is split into tiles, each compared only with what its radius reaches: time and memory grow with the
    number of pixels times the window, not with the number of pixels squared.

    Args:
        target: features of the frame; normalised here.
        context: features of the frames whose labels are known; normalised here.
        labels: labels of those frames, soft or hard, at the size of the features.

    Returns:
        Soft labels: weighted means of those given.
    """
    (h, w), tile = target.shape[1:], max(radius, 4)
    target, context = F.normalize(target, dim=0), F.normalize(context, dim=1)
    result = labels.new_empty(labels.shape[1], h, w)
    for top in range(0, h, tile):
        rows, near_rows = range(top, min(top + tile, h)), range(max(top - radius, 0), min(top + tile + radius, h))
        for left in range(0, w, tile):
            columns = range(left, min(left + tile, w))
            near_columns = range(max(left - radius, 0), min(left + tile + radius, w))
            here = (..., slice(rows.start, rows.stop), slice(columns.start, columns.stop))
            near = (..., slice(near_rows.start, near_rows.stop), slice(near_columns.start, near_columns.stop))
            cosine = target[here].flatten(1).T @ context[near].transpose(0, 1).flatten(1)
            far_rows, far_columns = (
                (torch.tensor(own)[:, None] - torch.tensor(other)[None]).abs() > radius
                for own, other in ((rows, near_rows), (columns, near_columns))
            )
            far = (far_rows[:, None, :, None] | far_columns[None, :, None, :]).flatten(0, 1).flatten(1)
            cosine = cosine.view(len(far), len(context), -1)
            cosine = cosine.masked_fill(far[:, None].to(cosine.device), -torch.inf).flatten(1)
            best, places = cosine.topk(min(topk, cosine.shape[1]))
            weights = (best / temperature).softmax(dim=1)
            neighbours = labels[near].transpose(0, 1).flatten(1)[:, places]
            result[here] = (neighbours * weights).sum(dim=-1).view(-1, len(rows), len(columns))
    return result


@dataclass
class Config:
    """What all commands have in common."""

    model: str
    """A checkpoint of train.py, or a baseline. flow: zero, dis, random; segmentation: random; video: random, colour.
    Segmentation and video also take a state dict of torchvision's convnext_tiny or resnet50."""
    data_root: Path | None = None
    """The folder of a data set, or one that holds it. Without it: MovingShapes."""
    encoder: Literal["convnext_tiny", "resnet50", "pwc"] = "convnext_tiny"
    """The network of --model random."""


# ------------------------------------------------------------------------------------------------- models, baselines


def feature_model(name: str, encoder: str = "convnext_tiny", seed: int = 0) -> MCJEPA:
    """A model for its features, in eval mode.

    Args:
        name: a checkpoint of train.py, a state dict of torchvision's convnext_tiny or resnet50, or "random".
        encoder, seed: of "random", a network before training.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    if name == "random":
        torch.manual_seed(seed)
        return MCJEPA(ModelConfig(encoder=encoder), task="mjepa").eval().to(own_device())
    try:
        weights = load_weights(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, and no baseline has this name (random; for video also colour)") from error
    if "model" in weights:
        return load_model(name, own_device())
    kinds = {"features.1.0.block.0.weight": "convnext_tiny", "layer1.0.conv1.weight": "resnet50"}
    kind = next((kind for key, kind in kinds.items() if key in weights), None)
    if kind is None:
        raise ValueError(f"{name}: neither a checkpoint of train.py nor a state dict of {' or '.join(kinds.values())}")
    torch.manual_seed(0)  # the file has no weights for our ConvNeXt's stem
    config = ModelConfig(encoder=kind, expander=(1,))  # task vicreg: the file has no estimator either
    return MCJEPA(config, task="vicreg", backbone_weights=name).eval().to(own_device())


def feature_method(name: str, stride: int, encoder: str = "convnext_tiny", seed: int = 0) -> FeatureMethod:
    """The features of a model (see `feature_model`) at one stride, or "colour": the mean colour of each cell.

    Raises:
        ValueError: the model has no level of that stride.
    """
    if name == "colour":
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        return lambda image: F.avg_pool2d((image - mean) / std, stride)[0]
    model = feature_model(name, encoder, seed)
    strides = model.encoder.strides
    if stride not in strides:
        raise ValueError(f"--stride {stride}: the features have strides {', '.join(map(str, strides))}")
    return torch.no_grad()(lambda image: model.encode(image.to(own_device()))[strides.index(stride)][0])


def zero_flow(image_1: Float[Tensor, "1 3 h w"], image_2: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 2 h w"]:
    """The baseline "nothing moves": its end-point error is the mean length of the true flow."""
    return torch.zeros_like(image_1[:, :2])


def dis_flow(image_1: Float[Tensor, "1 3 h w"], image_2: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 2 h w"]:
    """OpenCV's DIS (Kroeger et al. 2016) on 8-bit grey images; it learns nothing.

    Preset "medium": on four Middlebury scenes it errs by 0.39 px, OpenCV's default "fast" by 0.60 px.
    """
    h, w = image_1.shape[-2:]
    if max(h, w) < 12:
        raise ValueError(f"images of {w}x{h} px are too small for DIS: one side needs 12 pixels")
    grey = [cv2.cvtColor(to_numpy(to_uint8(image[0])), cv2.COLOR_RGB2GRAY) for image in (image_1, image_2)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    return torch.from_numpy(flow).permute(2, 0, 1)[None]


BASELINES: dict[str, FlowMethod] = {"zero": zero_flow, "dis": dis_flow}
"""What every flow is compared with."""


def model_flow(model: MCJEPA) -> FlowMethod:
    """A model as a method: takes and returns tensors on the CPU, wherever its parameters are."""
    device = next(model.parameters()).device
    return lambda image_1, image_2: model.estimate_flow(image_1.to(device), image_2.to(device)).float().cpu()


def flow_method(name: str, encoder: str = "convnext_tiny") -> FlowMethod:
    """A baseline, "random" (a network with that encoder before training), or the model of a checkpoint."""
    if name in BASELINES:
        return BASELINES[name]
    if name == "random":
        return model_flow(feature_model(name, encoder))
    try:
        return model_flow(load_model(name, own_device()))
    except FileNotFoundError as error:
        names = ", ".join((*BASELINES, "random"))
        raise FileNotFoundError(f"{error}, and no baseline has this name ({names})") from error


def at_size(method: FlowMethod, resize: str) -> FlowMethod:
    """Estimates on images of another size, and brings the flow back to the size and the pixels of the originals.

    Args:
        resize: "pad": images as they are, which a model pads by itself; "multiple": stretched to the nearest multiples
            of 64; "384x832": to that height and width; "0.5": by that factor.

    Raises:
        ValueError: none of these.
    """
    if resize == "pad":
        return method
    exact = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", resize)
    factor = float(resize) if re.fullmatch(r"\d*\.?\d+", resize) else 0.0
    if resize != "multiple" and not factor and not exact:
        raise ValueError(f"--resize {resize}: choose pad, multiple, HEIGHTxWIDTH such as 384x832, or a factor like 0.5")

    def estimate(image_1: Float[Tensor, "1 3 h w"], image_2: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 2 h w"]:
        size = image_1.shape[-2:]
        if exact:
            inner = [int(exact[1]), int(exact[2])]
        elif factor:
            inner = [max(round(length * factor), 1) for length in size]
        else:
            inner = [max(round(length / 64), 1) * 64 for length in size]
        resized = [F.interpolate(image, inner, mode="bilinear", antialias=True) for image in (image_1, image_2)]
        return resize_flow(method(*resized), size)

    return estimate


# ----------------------------------------------------------------------------------------------------------- pictures


def to_numpy(image: UInt8[Tensor, "3 h w"]) -> np.ndarray:
    """An image as OpenCV takes it, (h, w, 3)."""
    return image.permute(1, 2, 0).contiguous().numpy()


def to_uint8(image: Float[Tensor, "*t 3 h w"]) -> UInt8[Tensor, "*t 3 h w"]:
    """An image in [0, 1] as bytes."""
    return (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def colour_scale(flow: Float[Tensor, "2 h w"]) -> float:
    """The length in pixels that gets the full colour: the 99th percentile, so that outliers leave the rest visible, and
    at least 1."""
    lengths = flow.norm(dim=0)[known_flow(flow[None])[0, 0]].detach().cpu().numpy()
    return max(1.0, float(np.quantile(lengths, 0.99))) if lengths.size else 1.0


def flow_colours(flow: Float[Tensor, "2 h w"], scale: float) -> UInt8[Tensor, "3 h w"]:
    """Flow in the usual colour key, full colour from `scale` pixels on; black where it is unknown."""
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


def titled_grid(panels: Sequence[tuple[str, UInt8[Tensor, "3 h w"]]], columns: int) -> UInt8[Tensor, "3 H W"]:
    """Panels in rows, each below its title, on white."""
    titled = []
    for title, panel in panels:
        strip = np.full((14, panel.shape[-1], 3), 255, np.uint8)
        cv2.putText(strip, title, (2, 11), cv2.FONT_HERSHEY_PLAIN, 0.75, (0, 0, 0), 1, cv2.LINE_AA)
        titled.append(torch.cat([torch.from_numpy(strip).permute(2, 0, 1), panel], dim=1))
    return make_grid(torch.stack(titled), nrow=columns, padding=2, pad_value=255)


def flow_figure(
    image_1: Float[Tensor, "3 h w"],
    image_2: Float[Tensor, "3 h w"],
    flow: Float[Tensor, "2 h w"],
    truth: Float[Tensor, "2 h w"] | None = None,
) -> UInt8[Tensor, "3 H W"]:
    """One picture to judge a flow by eye.

    It shows both frames, the flow, frame 2 warped to frame 1 by it, and the absolute difference between that and frame
    1, which is black for a perfect flow. With the truth it also shows the true flow on the same colour scale, and the
    end-point error. The last panel is the colour wheel: a point has the colour of the flow from the wheel's centre to
    it, and the titles say how long the flow at the rim is.

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
    return titled_grid(panels, columns=3 if truth is None else 4)


def labels_figure(
    image: UInt8[Tensor, "3 h w"],
    truth: Int64[Tensor, "h w"],
    prediction: Int64[Tensor, "h w"],
    classes: Sequence[str],
    colours: np.ndarray,
) -> UInt8[Tensor, "3 H W"]:
    """An image, its true and its predicted labels in the colours of the data set, and the names of the classes."""
    table = torch.zeros(256, 3, dtype=torch.uint8)
    table[: len(colours)] = torch.from_numpy(colours.copy())
    # Void is black, or VOC's colour for it where black is a class.
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
    return titled_grid(list(zip(("image", "truth", "prediction", "classes"), (image, *panels), strict=True)), columns=4)


def overlay(frame: UInt8[Tensor, "3 h w"], mask: UInt8[Tensor, "h w"]) -> UInt8[Tensor, "3 h w"]:
    """The objects of a mask over the frame, half transparent, in DAVIS's colours."""
    numbers = [number for number in mask.unique().tolist() if number not in (0, VOID)]
    if not numbers:
        return frame
    masks = torch.stack([mask == number for number in numbers])
    return draw_segmentation_masks(frame, masks, alpha=0.5, colors=[tuple(PALETTE[n].tolist()) for n in numbers])


def objects_figure(video: ObjectVideo, predictions: Sequence[UInt8[Tensor, "h w"]]) -> UInt8[Tensor, "3 H W"]:
    """Frames 1, 10, 25 and 50 (or the last) with our masks, below the same with the true masks (Figure 4)."""
    shown = sorted({min(number, video.length) - 1 for number in (1, 10, 25, 50)})
    panels = []
    for title, masks in (("truth", video.masks), ("ours", predictions.__getitem__)):
        for index in shown:
            frame, mask = video.frames(index), masks(index)
            panels.append((f"t = {index + 1}, {title}", frame if mask is None else overlay(frame, mask)))
    return titled_grid(panels, columns=len(shown))


@contextmanager
def writing_video(path: Path, rate: float) -> Iterator[Callable[[UInt8[Tensor, "3 h w"]], None]]:
    """Yields a function that adds a frame to an mp4 video, which appears at `path` once it is whole."""
    writer, count = cv2.VideoWriter(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:

        def write(frame: UInt8[Tensor, "3 h w"]) -> None:
            nonlocal count
            count += 1
            height, width = frame.shape[1] // 2 * 2, frame.shape[2] // 2 * 2  # the codec takes even sizes only
            code = cv2.VideoWriter_fourcc(*"mp4v")
            if not writer.isOpened() and not writer.open(str(temporary), code, rate, (width, height)):
                raise ValueError(f"{path.parent}: OpenCV cannot write an mp4 video here")
            writer.write(cv2.cvtColor(to_numpy(frame[:, :height, :width]), cv2.COLOR_RGB2BGR))

        yield write
        writer.release()
        # The encoder reports nothing where the disk is full.
        if int(cv2.VideoCapture(str(temporary)).get(cv2.CAP_PROP_FRAME_COUNT)) != count:
            raise OSError(f"{path}: the video cannot be written; is the disk full?")


def write_report(config: Config, name: str, report: dict) -> dict:
    """Prints the notes of a report, writes it as NAME.json with settings and versions, and returns that."""
    for note in report["notes"]:
        print(f"note: {note}")
    report = {"settings": as_json(config), "versions": versions()} | report
    write_json(config.output_dir / f"{name}.json", report)
    print(f"numbers and pictures: {config.output_dir}")
    return report


# ------------------------------------------------------------------------------------------------------- optical flow


@dataclass
class FlowConfig(Config):
    """Optical flow against ground truth, or pictures of it where there is none."""

    benchmark: Literal["sintel", "kitti2012", "kitti2015", "middlebury", "chairs", "things", "hd1k"] | None = None
    """Which of the benchmarks in --data-root; may be left out where there is only one."""
    output_dir: Path = Path("runs/flow")
    """Where flow.json, pictures and video go; files of the same name are replaced."""
    split: Literal["training", "testing"] = "training"
    """testing: the part of Sintel or KITTI whose truth is kept secret; only for --export."""
    export: Path | None = None
    """A folder for the flow of every pair, as the benchmark's server takes it."""
    images: tuple[Path, Path] | None = None
    """Two images instead: writes the flow from the first to the second, and pictures of it."""
    video: Path | None = None
    """A video file instead: writes a video of its frames beside their flow, and pictures."""
    max_frames: int | None = None
    """Only the first frames of the video."""
    resize: str = "pad"
    """What the method sees. pad: the images as they are, padded by the model as it needs; multiple: stretched to the
    nearest multiples of 64; HEIGHTxWIDTH; or a factor. Errors are in pixels of the originals in any case."""
    pictures: int = 8
    """How many pairs get a picture at most."""


def shapes_pairs(count: int, size: tuple[int, int]) -> Iterator[FlowPair]:
    """Unseen MovingShapes as pairs; their flow is known everywhere, also where the second frame hides the point."""
    shapes = MovingShapes(length=count, size=size, frames=2, seed=UNSEEN_SEED)
    for index in range(count):
        item = shapes[index]
        truth = item["flow_forward"]
        regions = {"all": known_flow(truth)}
        yield FlowPair(f"shapes_{index:04d}", "", item["images"][:1], item["images"][1:], truth, regions)


def measure_flow(pair: FlowPair, method: FlowMethod) -> tuple[Float[Tensor, "1 2 h w"], dict]:
    """Runs a method on a pair: its flow, and its `seconds`, its `epe` in pixels and `f1` in [0, 1] in each region."""
    start = time.perf_counter()
    flow = method(pair.image_1, pair.image_2)
    seconds = time.perf_counter() - start
    regions = {name: region for name, region in pair.regions.items() if region.any()}
    epe = {name: end_point_error(flow, pair.flow, region).item() for name, region in regions.items()}
    f1 = {name: f1_all(flow, pair.flow, region).item() for name, region in regions.items()}
    return flow, {"epe": epe, "f1": f1, "seconds": seconds}


def count_pixels(pair: FlowPair) -> dict[str, int]:
    """The pixels of each region that is not empty."""
    return {name: int(region.sum()) for name, region in pair.regions.items() if region.any()}


def mean_errors(scenes: list[dict], method: str) -> dict:
    """A method over many pairs: `epe` and `f1` of each region as the mean over images (`per_image`) and over pixels
    (`per_pixel`, as the development kits of KITTI and Sintel count), and the median of the seconds."""
    means = {"per_image": {"epe": {}, "f1": {}}, "per_pixel": {"epe": {}, "f1": {}}}
    for region in REGIONS:
        present = [scene for scene in scenes if region in scene["pixels"]]
        for metric in ("epe", "f1") if present else ():
            values = [scene[method][metric][region] for scene in present]
            pixels = [scene["pixels"][region] for scene in present]
            means["per_image"][metric][region] = float(np.mean(values))
            means["per_pixel"][metric][region] = float(np.average(values, weights=pixels))
    return means | {"seconds": float(np.median([scene[method]["seconds"] for scene in scenes]))}


def flow_errors_on_shapes(model: MCJEPA, count: int, size: tuple[int, int]) -> dict[str, float]:
    """A model's `epe` and `f1` (in [0, 1]) on unseen MovingShapes, and zero flow's `epe_zero`, for train.py.

    The model is in eval mode meanwhile, and returns to the mode it was in.
    """
    methods, training = {"ours": model_flow(model), "zero": zero_flow}, model.training
    model.eval()
    scenes = [
        {"pixels": count_pixels(pair)} | {name: measure_flow(pair, method)[1] for name, method in methods.items()}
        for pair in shapes_pairs(count, size)
    ]
    model.train(training)
    ours, zero = (mean_errors(scenes, name)["per_image"] for name in methods)
    return {"epe": ours["epe"]["all"], "epe_zero": zero["epe"]["all"], "f1": ours["f1"]["all"]}


evaluate_flow_on_shapes = flow_errors_on_shapes  # until train.py takes the new name


def run_flow(config: tyro.conf.OmitArgPrefixes[FlowConfig]) -> dict:
    """Optical flow: end-point error and F1-all on ground truth, or pictures of two images or a video."""
    if sum(source is not None for source in (config.data_root, config.images, config.video)) > 1:
        raise ValueError("--data-root, --images and --video exclude each other: give one of them")
    if config.max_frames is not None and config.max_frames < 2:
        raise ValueError("--max-frames must be at least 2: flow needs two frames")
    if config.data_root is None and (config.benchmark or config.export or config.split == "testing"):
        raise ValueError("--benchmark, --split and --export need --data-root: give that too")
    if config.split == "testing" and config.export is None:
        raise ValueError("--split testing has no truth to measure against: give --export FOLDER for a submission")
    method = at_size(flow_method(config.model, config.encoder), config.resize)
    if config.images:
        return flow_of_images(method, *config.images, config.output_dir)
    return flow_of_video(method, config) if config.video else flow_of_benchmark(method, config)


def flow_of_benchmark(method: FlowMethod, config: FlowConfig) -> dict:
    """Measures a method beside the baselines: tables on the screen, flow.json, pictures, and files to submit."""
    benchmark, source, notes = "shapes", f"MovingShapes, {SHAPES_SIZE} px, unseen seed", []
    pairs, count = shapes_pairs(SHAPES_PAIRS, (SHAPES_SIZE, SHAPES_SIZE)), SHAPES_PAIRS
    if config.data_root is not None:
        benchmark, files, notes = find_benchmark(config.data_root, config.benchmark, config.split)
        pairs = (
            read_pair(each)
            if each.flow
            else FlowPair(each.name, each.group, *read_frames(each.image_1, each.image_2), None, {})
            for each in files
        )
        count, source = len(files), f"{benchmark} in {config.data_root}"
    # A baseline at another size has a row of its own beside the usual one.
    label = config.model if config.model in (*BASELINES, "random") else "ours"
    label += "" if config.resize == "pad" else f" {config.resize}"
    methods = {label: method} if config.split == "testing" else BASELINES | {label: method}
    config.output_dir.mkdir(parents=True, exist_ok=True)
    scenes = []
    for pair in tqdm(pairs, total=count, desc="flow", unit="pair", disable=None):
        results = {name: measure_flow(pair, each) for name, each in methods.items()}
        flow = results[label][0]
        if len(scenes) < config.pictures:
            truth = None if pair.flow is None else pair.flow[0]
            figure = flow_figure(pair.image_1[0], pair.image_2[0], flow[0], truth)
            write_picture(config.output_dir / f"{picture_name(pair)}.png", figure)
        if config.export:
            export_flow(config.export / submission_name(benchmark, pair), flow)
        numbers = {name: numbers for name, (_, numbers) in results.items()}
        scenes.append({"name": pair.name, "group": pair.group, "pixels": count_pixels(pair)} | numbers)
    if config.export:
        print(f"flow of {len(scenes)} pairs: {config.export}")
    groups = {}
    for group in dict.fromkeys(scene["group"] for scene in scenes):
        members = [scene for scene in scenes if scene["group"] == group]
        groups[group or "all"] = {name: mean_errors(members, name) for name in methods}
    report = {"data": source, "label": label, "groups": groups, "notes": notes, "scenes": scenes}
    if config.split == "training":
        print_flow(report, benchmark)
        return write_report(config, "flow", report)
    print("\n".join(f"note: {note}" for note in notes))
    return report


def print_flow(report: dict, benchmark: str) -> None:
    """A table for each group of pairs, and for a small benchmark the error of each pair."""
    methods = list(next(iter(report["groups"].values())))
    for group, rows in report["groups"].items():
        count = sum(scene["group"] in (group, "") for scene in report["scenes"])
        title = report["data"] if group == "all" else f"{report['data']}, {group}"
        print(f"Flow on {title}: {count} {'pair' if count == 1 else 'pairs'}\n")
        regions = list(rows[methods[0]]["per_pixel"]["epe"])
        outliers = regions if benchmark.startswith("kitti") else ["all"]  # KITTI counts them in each region
        print(f"{'':18}{'EPE [px]':>10}{'':{10 * (len(regions) - 1)}}{'[%]':>10}")
        for mean, title in (("per_pixel", "mean over pixels"), ("per_image", "mean over images")):
            columns = (*regions, *(f"F1-{name}" for name in outliers), "s a pair")
            print(f"{title:18}" + "".join(f"{column:>10}" for column in columns))
            for name, row in rows.items():
                numbers = [row[mean]["epe"][region] for region in regions]
                numbers += [100 * row[mean]["f1"][region] for region in outliers]
                print(f"{name:18}" + "".join(f"{number:10.2f}" for number in numbers) + f"{row['seconds']:10.3f}")
        print()
    if benchmark != "shapes" and len(report["scenes"]) <= 20:
        print(f"{'EPE [px], all':24}" + "".join(f"{name:>12}" for name in methods))
        for scene in report["scenes"]:
            errors = "".join(f"{scene[method]['epe']['all']:12.2f}" for method in methods)
            print(f"{scene['group'] + ' ' + scene['name']:24}".lstrip() + errors)


def export_flow(path: Path, flow: Float[Tensor, "1 2 h w"]) -> None:
    """Writes a flow, whole or not at all: .flo, or KITTI's .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_flow(temporary, flow)


def flow_of_images(method: FlowMethod, path_1: Path, path_2: Path, folder: Path) -> dict:
    """Writes flow.flo, flow.png (colours), warped.png (the second image at the place of the first) and figure.png."""
    image_1, image_2 = read_frames(path_1, path_2)
    flow = method(image_1, image_2)
    export_flow(folder / "flow.flo", flow)
    write_picture(folder / "flow.png", flow_colours(flow[0], colour_scale(flow[0])))
    write_picture(folder / "warped.png", to_uint8(warp(image_2, flow)[0]))
    write_picture(folder / "figure.png", flow_figure(image_1[0], image_2[0], flow[0]))
    length = flow.norm(dim=1)
    print(f"flow of {length.mean():.2f} px on average, {length.max():.2f} px at most: {folder}/figure.png")
    return {}


def flow_of_video(method: FlowMethod, config: FlowConfig) -> dict:
    """Writes NAME_flow.mp4, each frame beside its flow to the next, and figures spread evenly over the video."""
    path, folder = config.video, config.output_dir
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder, not a video file' if path.is_dir() else 'no such video'}")
    pairs = VideoPairs(path, transform=lambda *frames: tuple(frame.float() / 255 for frame in frames))
    count = min(len(pairs), (config.max_frames or sys.maxsize) - 1)
    rate = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) or 25.0
    pictured = set(np.linspace(0, count - 1, min(config.pictures, count)).round().astype(int))
    scale = 1.0
    with writing_video(folder / f"{path.stem}_flow.mp4", rate) as write:
        for index in tqdm(range(count), desc="flow", unit="frame", disable=None):
            frame, following = pairs[index]
            flow = method(frame[None], following[None])[0]
            # The scale grows at once and fades slowly, so that the colours do not flicker.
            scale = max(colour_scale(flow), 0.95 * scale)
            write(torch.cat((to_uint8(frame), flow_colours(flow, scale)), dim=2))
            if index in pictured:
                write_picture(folder / f"{path.stem}_{index:05d}.png", flow_figure(frame, following, flow))
    print(f"flow of {count} frames: {folder / f'{path.stem}_flow.mp4'}")
    return {}


# ------------------------------------------------------------------------------------------------------- segmentation


class LinearHead(nn.Module):
    """A linear classifier of pixels: batch norm and a 1x1 convolution over all levels of a pyramid, at stride 4.

    Each level goes through its own part of the convolution before the sizes are brought together. Both steps are
    linear, so the sum equals the convolution over the levels side by side, for a fraction of the memory. (Only the
    statistics of the batch norm differ a little: they are those of a level before it is enlarged.)

    Args:
        channels, strides: of the pyramid's levels.
        classes: their number.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], classes: int) -> None:
        super().__init__()
        self.finest = strides.index(4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        # The sum needs one bias only.
        self.classifiers = nn.ModuleList(nn.Conv2d(c, classes, 1, bias=i == 0) for i, c in enumerate(channels))
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(self.classifiers[0].bias)

    def forward(self, pyramid: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b c h w"]:
        """Features, coarsest first, to a score for each class at stride 4."""
        size, total = pyramid[self.finest].shape[2:], 0.0
        for level, (features, norm, classifier) in enumerate(zip(pyramid, self.norms, self.classifiers, strict=True)):
            scores = classifier(norm(features))
            if level > self.finest:
                scores = F.adaptive_avg_pool2d(scores, size)
            elif level < self.finest:
                scores = F.interpolate(scores, size, mode="bilinear")
            total = total + scores
        return total


class Segmenter(nn.Module):
    """The encoder of a model with a linear head on its features.

    Args:
        finetune: the encoder learns too; otherwise it stays as it is, its normalisation layers in eval mode.
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
    """Where windows start that cover `length` pixels: every `stride`, the last at the border; 0 if one is enough."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


@torch.no_grad()
def sliding_scores(
    segment: Callable[[Tensor], Tensor], image: Float[Tensor, "1 3 h w"], window: int = 512, stride: int = 341
) -> Float[Tensor, "1 c h w"]:
    """The scores of an image from square windows that slide over it, averaged where they overlap.

    Args:
        segment: maps images to scores at their size.
        image: of any size; taken whole if it is smaller than the window.
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


class Recipe(NamedTuple):
    """How a linear head is trained on a data set, alone or with the encoder."""

    steps: int
    warmup: int
    batch: int
    crop: int
    size: int
    """The shorter side of the images in pixels."""
    learning_rate: float
    encoder_learning_rate: float


PROTOCOL = Recipe(40_000, 1_500, 16, 512, 512, 1e-4, 1e-4)
"""VICRegL and iBOT: AdamW, weight decay 0.05, poly schedule of power 1."""
RECIPES = {
    "voc": PROTOCOL,
    "ade20k": PROTOCOL._replace(steps=160_000),
    "cityscapes": PROTOCOL._replace(size=1024),
    # Small data, minutes on two CPU cores (ours).
    "camvid": Recipe(400, 40, 8, 352, 360, 5e-3, 2e-4),
    "shapes": Recipe(300, 30, 8, SHAPES_SIZE, SHAPES_SIZE, 1e-2, 2e-4),
}


@dataclass
class SegmentationConfig(Config):
    """Semantic segmentation by a linear head on the features: mean intersection over union (mIoU)."""

    benchmark: Literal["voc", "cityscapes", "ade20k", "camvid"] | None = None
    """Which of the data sets in --data-root; may be left out where there is only one."""
    output_dir: Path = Path("runs/segmentation")
    """Where checkpoint, numbers and pictures go. A training that was stopped continues from its checkpoint there."""
    finetune: bool = False
    """The encoder learns with the head; by default it is frozen."""
    steps: int | None = None
    """Of training, for a quick look; by default those of the recipe: voc, cityscapes 40,000; ade20k 160,000; camvid 400;
    MovingShapes 300."""
    seed: int = 0
    """Of the order of the images, of their augmentation, and of --model random."""
    workers: int = 0
    """Processes that load data; any number gives the same result."""
    pictures: int = 8
    """How many images get a picture at most."""


def run_segmentation(config: tyro.conf.OmitArgPrefixes[SegmentationConfig]) -> dict:
    """Semantic segmentation with frozen or fine-tuned features: trains a linear head, measures mIoU, draws pictures."""
    if config.data_root is None and config.benchmark:
        raise ValueError("--benchmark needs --data-root: give that too")
    if config.steps is not None and config.steps < 1:
        raise ValueError("--steps must be positive")
    if config.data_root is None:
        name, size = "shapes", (SHAPES_SIZE, SHAPES_SIZE)
        training = ShapeLabels(1_000_000, size, seed=config.seed)
        validation = ShapeLabels(SHAPES_IMAGES, size, seed=UNSEEN_SEED)
    else:
        name, training = find_labels(config.data_root, config.benchmark, "train")
        _, validation = find_labels(config.data_root, name, "val")
    recipe = RECIPES[name]
    if config.steps is not None:  # a quick look would end before the learning rate is full
        recipe = recipe._replace(steps=config.steps, warmup=min(recipe.warmup, config.steps // 10))
    model = feature_model(config.model, config.encoder, config.seed)
    segmenter = Segmenter(model, len(training.classes), config.finetune).to(own_device())
    settings = as_json(config) | recipe._asdict() | {"data": name, "training_images": len(training)}
    if Path(config.model).is_file():  # its content counts, wherever it lies
        settings["weights"] = hashlib.sha256(Path(config.model).read_bytes()).hexdigest()[:16]
    train_segmenter(segmenter, training, recipe, config, settings)
    confusion = measure_segmenter(segmenter.eval(), validation, recipe, config)
    iou = [None if math.isnan(value) else value for value in class_iou(confusion).tolist()]
    report = {"data": name, "images": len(validation), "miou": mean_iou(confusion)}
    report |= {"pixel_accuracy": (confusion.diag().sum() / confusion.sum()).item()}
    report |= {"iou": dict(zip(training.classes, iou, strict=True)), "confusion": confusion.tolist()}
    report |= {"notes": list(training.notes), "settings": settings}
    print_segmentation(report)
    return write_report(config, "segmentation", report)


def train_segmenter(
    segmenter: Segmenter,
    training: LabelledImages | ShapeLabels,
    recipe: Recipe,
    config: SegmentationConfig,
    settings: dict,
) -> None:
    """Trains the head, and the encoder with --finetune, from the checkpoint in --output-dir or from the beginning.

    Raises:
        ValueError: the checkpoint belongs to other settings, or the loss is not finite.
    """
    groups = [{"params": [*segmenter.head.parameters()], "initial_lr": recipe.learning_rate}]
    learns = nn.ModuleDict({"head": segmenter.head})  # what does not learn comes from --model
    if config.finetune:
        groups.append({"params": [*segmenter.model.encoder.parameters()], "initial_lr": recipe.encoder_learning_rate})
        learns["encoder"] = segmenter.model.encoder
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    path, start, device = config.output_dir / "checkpoint.pt", 0, own_device()
    checkpoint, warnings = newest_checkpoint(config.output_dir, load_checkpoint)
    for warning in warnings:
        print(warning)
    if checkpoint:
        # "data" and "weights" say what these flags mean.
        may_differ = ["output_dir", "workers", "pictures", "data_root", "benchmark", "model"]
        check_same_run(path, checkpoint["config"], settings, may_differ + ["encoder"] * ("weights" in settings))
        learns.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    if start >= recipe.steps:
        return
    stream = Stream(config.seed, start_step=start)
    loader = make_loader(training, LabelAugmentation(recipe.crop, recipe.size), recipe.batch, stream, config.workers)
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
                raise ValueError(f"step {step}: the loss is not finite; are the weights of --model?")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done = step + 1
            log.advance(text=f"loss {loss.item():.3f}")
            if done % 10 == 0 or done == recipe.steps:
                log.write(done, {"loss": loss.item(), "learning_rate": optimizer.param_groups[0]["lr"]})
            if done % 100 == 0 or done == recipe.steps:
                state = {"model": learns.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(path, state | {"step": done, "config": settings})


def measure_segmenter(
    segmenter: Segmenter, validation: LabelledImages | ShapeLabels, recipe: Recipe, config: SegmentationConfig
) -> Int64[Tensor, "c c"]:
    """Counts the pixels of all images at their own size by true and predicted class; draws the first few images."""
    device, classes = own_device(), validation.classes
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for index in tqdm(range(len(validation)), desc="segmentation", unit="image", disable=None):
        image, truth = validation[index]
        shown = image[None].to(device).float() / 255
        (h, w), factor = truth.shape, recipe.size / min(truth.shape)
        if factor != 1:
            size = [max(round(length * factor), 1) for length in (h, w)]
            shown = F.interpolate(shown, size, mode="bilinear", antialias=True)
        scores = sliding_scores(segmenter, shown, recipe.crop, recipe.crop * 2 // 3)
        if not scores.isfinite().all():
            raise ValueError(f"image {index}: the scores are not finite; are the weights of --model, or of the head?")
        prediction = F.interpolate(scores, (h, w), mode="bilinear").argmax(dim=1)[0].cpu()
        confusion += count_confusion(truth, prediction, len(classes))
        if index < config.pictures:
            figure = labels_figure(image, truth, prediction, classes, validation.colours)
            write_picture(config.output_dir / "pictures" / f"image_{index:04d}.png", figure)
    return confusion


def print_segmentation(report: dict) -> None:
    """IoU of each class beside its share of the pixels."""
    settings, pixels = report["settings"], [sum(row) for row in report["confusion"]]
    kind = "fine-tuned" if settings["finetune"] else "frozen"
    print(f"\nSegmentation of {report['data']}, {kind} features, {settings['steps']} steps: {report['images']} images")
    print(f"\n{'IoU and share of pixels':22}{'[%]':>5}{'[%]':>7}")
    for (name, iou), count in zip(report["iou"].items(), pixels, strict=True):
        print(f"{name:22}{'-' if iou is None else f'{100 * iou:.1f}':>6}{100 * count / sum(pixels):7.1f}")
    print(f"\nmIoU {100 * report['miou']:.2f}%, pixel accuracy {100 * report['pixel_accuracy']:.2f}%")


# ----------------------------------------------------------------------------------------- video object segmentation


@dataclass
class VideoConfig(Config):
    """Video object segmentation: the masks of the first frame, propagated by feature similarity (J and F)."""

    benchmark: Literal["davis2016", "davis2017"] | None = None
    """davis2016: all objects are one, and the sequences those of its list. By default as the files are."""
    output_dir: Path = Path("runs/video")
    """Where video.json, pictures and videos go; files of the same name are replaced."""
    split: str = "val"
    """Which list of sequences (train, val, test-dev)."""
    export: Path | None = None
    """A folder for the masks, SEQUENCE/00000.png, as the benchmark's server takes them."""
    seed: int = 0
    """Of --model random."""
    stride: int = 8
    """The level of the features."""
    size: int | None = None
    """Resizes the frames to this shorter side (480; MovingShapes: as they are)."""
    standardise: bool = False
    """Gives the channels mean 0 and standard deviation 1 over the first frame (DINO's come from a layer norm)."""
    context: int = 7
    """How many last frames give labels, besides the first (DINO)."""
    radius: int = 12
    """No label comes from farther than this many cells of the features (DINO)."""
    topk: int = 5
    """How many most similar cells give their label (DINO)."""
    temperature: float = 0.1
    """Their weight is exp(cosine / temperature) (DINO)."""


def shapes_videos(count: int, frames: int, size: int) -> Iterator[ObjectVideo]:
    """Unseen MovingShapes as videos; those without a shape in the first frame are left out."""
    shapes = MovingShapes(length=10 * count, size=(size, size), frames=frames, seed=UNSEEN_SEED)
    names = [f"{t:05d}" for t in range(frames)]

    def videos() -> Iterator[ObjectVideo]:
        for index in range(len(shapes)):
            item = shapes[index]
            images, masks = to_uint8(item["images"]), item["instances"].to(torch.uint8)
            objects = [number for number in masks[0].unique().tolist() if number]
            if objects:
                yield ObjectVideo(f"shapes_{index:04d}", objects, images.__getitem__, masks.__getitem__, names)

    return islice(videos(), count)


def follow_objects(video: ObjectVideo, features: FeatureMethod, config: VideoConfig) -> Iterator[UInt8[Tensor, "h w"]]:
    """The predicted mask of each frame, the first being the true one (DINO's protocol).

    Labels are propagated at the size of the features; the soft labels of the first frame and of the last few are kept.
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
            std, mean = torch.std_mean(now, dim=(1, 2), keepdim=True, correction=0)
            # A channel that is all but constant in the first frame would drown out the others once it changes.
            std = std.clamp(min=max(0.01 * std.median().item(), 1e-6))
        if config.standardise:
            now = (now - mean) / std
        if index == 0:
            one_hot = (first[None] == numbers[:, None, None]).float()
            one_hot[0] = 1 - one_hot[1:].sum(dim=0)  # void is background here
            labels = F.interpolate(one_hot[None], cells, mode="nearest-exact")[0].to(now.device)
            beginning = (now, labels)
            yield torch.where(one_hot[0] > 0, 0, first).to(torch.uint8)
            continue
        context, known = (torch.stack(x) for x in zip(beginning, *memory, strict=True))
        labels = propagate_labels(now, context, known, config.radius, config.topk, config.temperature)
        if not labels.isfinite().all():
            raise ValueError(f"{video.name}: the features are not finite (or --temperature is too small)")
        memory.append((now, labels))
        soft = F.interpolate(labels[None].cpu(), (h, w), mode="bilinear")[0]
        least, most = soft.amin(dim=(1, 2), keepdim=True), soft.amax(dim=(1, 2), keepdim=True)
        # An object that is everywhere, or nowhere, has nothing to stretch.
        soft = torch.where(most - least > 1e-6, (soft - least) / (most - least), soft)
        yield numbers[soft.argmax(dim=0)]


def run_video(config: tyro.conf.OmitArgPrefixes[VideoConfig]) -> dict:
    """Video object segmentation by label propagation on DAVIS or MovingShapes: J, F, masks, pictures and videos."""
    if config.data_root is None and config.benchmark:
        raise ValueError("--benchmark needs --data-root: give that too")
    if not min(config.stride, config.topk, config.temperature) > 0 or min(config.context, config.radius) < 0:
        raise ValueError("--stride, --topk and --temperature must be positive, --context and --radius at least 0")
    if config.size is not None and config.size < config.stride:
        raise ValueError("--size must be at least --stride")
    if config.data_root is None:
        source, notes = f"MovingShapes, {SHAPES_SIZE} px, unseen seed", []
        videos, count = shapes_videos(SHAPES_VIDEOS, SHAPES_FRAMES, SHAPES_SIZE), SHAPES_VIDEOS
    else:
        year = config.benchmark.removeprefix("davis") if config.benchmark else None
        videos, notes = find_masked_videos(config.data_root, config.split, year)
        source, count = f"{config.benchmark or 'DAVIS'} in {config.data_root}", len(videos)
        config = replace(config, size=config.size or 480)
    features = feature_method(config.model, config.stride, config.encoder, config.seed)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    sequences, failure = {}, None
    try:
        for video in tqdm(videos, total=count, desc="video", unit="sequence", disable=None):
            start = time.perf_counter()
            predictions = [mask.cpu() for mask in follow_objects(video, features, config)]
            seconds = (time.perf_counter() - start) / video.length
            write_masks(video, predictions, config, pictured=len(sequences) < PICTURED_VIDEOS)
            sequences[video.name] = measure_objects(video, predictions) | {"seconds": seconds}
    except (ValueError, OSError) as error:
        if not sequences:
            raise
        failure, notes = error, [*notes, f"stopped before the end: {one_line(error)}"]
    notes = notes + [f"{name}: {sequence['note']}" for name, sequence in sequences.items() if sequence["note"]]
    report = {"data": source, "mean": mean_over_objects(sequences), "notes": notes, "sequences": sequences}
    print_objects(report)
    if config.export:
        print(f"masks of {len(sequences)} sequences: {config.export}")
    report = write_report(config, "video", report)
    if failure:  # what was measured before it is not lost
        raise failure
    if not report["mean"] and not config.export:
        raise ValueError(f"{source}: nothing to measure, see the notes; --export writes masks nevertheless")
    return report


def write_masks(
    video: ObjectVideo, predictions: Sequence[UInt8[Tensor, "h w"]], config: VideoConfig, pictured: bool
) -> None:
    """With --export the masks as palette PNGs in DAVIS's colours; a figure and a video, if `pictured`."""
    for name, mask in zip(video.frame_names, predictions, strict=True) if config.export else ():
        path = config.export / video.name / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(mask.numpy())
        image.putpalette(PALETTE.tobytes())
        with replacing(path) as temporary:
            image.save(temporary, format="PNG")
    if pictured:
        write_picture(config.output_dir / f"{video.name}.png", objects_figure(video, predictions))
        with writing_video(config.output_dir / f"{video.name}.mp4", 24.0) as write:
            for index, mask in enumerate(predictions):
                write(overlay(video.frames(index), mask))


def measure_objects(video: ObjectVideo, predictions: Sequence[UInt8[Tensor, "h w"]]) -> dict:
    """J and F of each object in each frame but the first and the last, with their statistics.

    Frames without a mask are left out, and so are void pixels and objects that the first mask does not have.
    """
    values = {number: {"J": [], "F": []} for number in video.objects}
    missing, void, strangers = 0, 0, set()
    for index in range(1, video.length - 1):
        truth = video.masks(index)
        if truth is None:
            missing += 1
            continue
        counts = truth != VOID
        if not counts.any():
            void += 1
            continue
        strangers |= set(truth.unique().tolist()) - {0, VOID, *video.objects}
        for number, measured in values.items():
            annotation, prediction = ((mask == number) & counts for mask in (truth, predictions[index]))
            measured["J"].append(region_similarity(annotation, prediction))
            measured["F"].append(contour_accuracy(annotation, prediction))
    notes = [f"frames without a mask: {missing}"] * bool(missing)
    notes += [f"frames that are void everywhere: {void}"] * bool(void)
    notes += [f"objects {', '.join(map(str, sorted(strangers)))} not in the first mask"] * bool(strangers)
    objects = {
        number: {name: davis_statistics(frames) | {"frames": frames} for name, frames in measured.items()}
        for number, measured in values.items()
        if measured["J"]
    }
    notes += [] if objects else ["nothing to measure"]
    return {"objects": objects, "frames": video.length, "note": "; ".join(notes)}


def mean_over_objects(sequences: dict[str, dict]) -> dict[str, float]:
    """The mean over all objects, each counted alike, as DAVIS does; empty where nothing was measured."""
    objects = [each for sequence in sequences.values() for each in sequence["objects"].values()]
    if not objects:
        return {}
    means = {
        f"{name}_{kind}": float(np.mean([each[name][kind] for each in objects]))
        for name in ("J", "F")
        for kind in ("mean", "recall", "decay")
    }
    seconds = float(np.median([sequence["seconds"] for sequence in sequences.values()]))
    return {"J&F": (means["J_mean"] + means["F_mean"]) / 2} | means | {"seconds": seconds}


def print_objects(report: dict) -> None:
    """A row for each sequence, and the means over all objects."""
    names = ("J&F", "J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay")
    print(f"\nVideo object segmentation on {report['data']}\n")
    columns = "".join(f"{name.replace('_', '-'):>10}" for name in names)
    print(f"{'[%]':24}{'objects':>8}{columns}{'s a frame':>11}")
    rows = {name: {name: sequence} for name, sequence in report["sequences"].items()}
    for name, sequences in (rows | {"mean over objects": report["sequences"]}).items():
        means, count = mean_over_objects(sequences), sum(len(each["objects"]) for each in sequences.values())
        if means:
            row = "".join(f"{100 * means[column]:10.2f}" for column in names)
            print(f"{name:24}{count:8}{row}{means['seconds']:11.3f}")


# ----------------------------------------------------------------------------------------------------------- Table 1


TABLE_COLUMNS = (
    *("Sintel clean EPE", "Sintel final EPE", "KITTI 2015 EPE"),
    *("VOC frozen", "VOC tuned", "Cityscapes frozen", "Cityscapes tuned", "ADE20K frozen", "ADE20K tuned"),
    "DAVIS 2017 J&F",
)
NAN = math.nan
PAPER_ROWS = {
    "M-JEPA": (2.98, 3.82, 3.01, 9.4, NAN, NAN, NAN, NAN, NAN, NAN),
    "VICReg": (NAN, NAN, 13.5, 60.1, 77.8, 59.8, 76.3, 28.6, 41.1, 58.1),
    "VICRegL": (NAN, NAN, 11.4, 66.8, 79.7, 64.9, 78.3, 30.6, 44.1, 66.7),
    "MC-JEPA": (2.81, 3.51, 2.67, 67.1, 79.9, 65.5, 78.4, 30.8, 44.2, 70.5),
}
"""Rows of the paper's Table 1; NaN: not given there."""


@dataclass
class Table1Config(Config):
    """Flow, segmentation and video of one model, as a row of the paper's Table 1."""

    output_dir: Path = Path("runs/table1")
    """Each benchmark gets a folder in it. Trainings that were stopped continue; the rest is measured again."""
    finetune: bool = True
    """Segmentation with a fine-tuned encoder too, not only with a frozen one."""
    steps: int | None = None
    """Of each training of segmentation, for a quick look; by default those of `segmentation`."""
    workers: int = 0
    """Processes that load data for the training of segmentation."""


def table1_parts(config: Table1Config) -> Iterator[tuple[str, Config]]:
    """The parts of the row, as (data set, configuration of its command)."""
    flow, labels, video = {"MovingShapes": None}, {"MovingShapes": None}, {"MovingShapes": None}
    if config.data_root is not None:
        flow = {"Sintel": "sintel", "KITTI 2015": "kitti2015"}
        labels = {"VOC": "voc", "Cityscapes": "cityscapes", "ADE20K": "ade20k"}
        video = {"DAVIS 2017": "davis2017"}
    shared = {"model": config.model, "data_root": config.data_root, "encoder": config.encoder}
    for title, name in flow.items():
        yield title, FlowConfig(**shared, benchmark=name, output_dir=config.output_dir / f"flow_{name or 'shapes'}")
    for title, name in labels.items():
        for tuned in (False, True) if config.finetune else (False,):
            folder = config.output_dir / f"segmentation_{name or 'shapes'}_{'tuned' if tuned else 'frozen'}"
            training = {"finetune": tuned, "steps": config.steps, "workers": config.workers}
            yield title, SegmentationConfig(**shared, benchmark=name, output_dir=folder, **training)
    for title, name in video.items():
        yield title, VideoConfig(**shared, benchmark=name, output_dir=config.output_dir / f"video_{name or 'shapes'}")


def measure_part(title: str, part: Config) -> tuple[dict[str, float], list[str]]:
    """Runs one part of the row: its numbers by column, errors in pixels and shares in percent, and its notes."""
    if isinstance(part, SegmentationConfig):
        report = run_segmentation(part)
        return {f"{title} {'tuned' if part.finetune else 'frozen'}": 100 * report["miou"]}, report["notes"]
    if isinstance(part, VideoConfig):
        report = run_video(part)
        return {f"{title} J&F": 100 * report["mean"]["J&F"]}, report["notes"]
    report = run_flow(part)
    numbers = {}
    for group, rows in report["groups"].items():
        for column, row in {"EPE": report["label"], "zero EPE": "zero"}.items():
            name = f"{title} {column}" if group == "all" else f"{title} {group} {column}"
            numbers[name] = rows[row]["per_image"]["epe"]["all"]
    return numbers, report["notes"]


def print_table1(measured: dict[str, float]) -> None:
    """Our row below the paper's; MovingShapes, which the paper does not have, below the table."""
    titles, units = zip(*(column.rsplit(" ", 1) for column in TABLE_COLUMNS), strict=True)
    print("\n" + " " * 16 + "".join(f"{title:>13}" for title in titles))
    print(f"{'[px], [%]':16}" + "".join(f"{unit:>13}" for unit in units))
    rows = {f"paper: {name}": row for name, row in PAPER_ROWS.items()}
    for name, row in (rows | {"ours": [measured.get(column, NAN) for column in TABLE_COLUMNS]}).items():
        print(f"{name:16}" + "".join(f"{'-' if math.isnan(number) else f'{number:.2f}':>13}" for number in row))
    shapes = [f"{name.removeprefix('MovingShapes ')} {measured[name]:.2f}" for name in measured if "Shapes" in name]
    if shapes:
        print("MovingShapes: " + ", ".join(shapes))


def run_table1(config: tyro.conf.OmitArgPrefixes[Table1Config]) -> None:
    """One row of the paper's Table 1 for a model: optical flow, segmentation and video, beside the paper's rows."""
    if config.data_root is not None and not config.data_root.is_dir():
        raise FileNotFoundError(f"{config.data_root}: no such folder; check the path")
    has_flow = feature_model(config.model, config.encoder).estimator is not None
    measured: dict[str, float] = {}
    notes, failures = [] if has_flow else ["no flow: this model has no estimator"], []
    for title, part in table1_parts(config):
        if isinstance(part, FlowConfig) and not has_flow:
            continue
        try:
            numbers, new_notes = measure_part(title, part)
            measured |= numbers
            notes += [f"{title}: {note}" for note in new_notes]
        except MissingSet as error:
            notes.append(f"{title}: {error}")
        except (ValueError, OSError, RuntimeError) as error:  # the last: out of memory
            failures.append(f"{title}: {one_line(error)}")
    print_table1(measured)
    notes = list(dict.fromkeys(notes))  # frozen and fine-tuned miss the same data set
    write_report(config, "table1", {"measured": measured, "notes": notes, "failures": failures})
    if failures or not measured:
        raise ValueError("; ".join(failures) or f"{config.data_root}: holds none of the benchmarks, see the notes")


def main() -> None:
    """The command line: a subcommand for each evaluation."""
    # Broken files are reported in our words, not in OpenCV's.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    commands = {"flow": run_flow, "segmentation": run_segmentation, "video": run_video, "table1": run_table1}
    run_command(lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__.splitlines()[0]))


if __name__ == "__main__":
    main()
