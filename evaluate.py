"""Measures a trained model: optical flow, segmentation, video object segmentation (Section 4 of MC-JEPA, Table 1).

    python evaluate.py flow --model runs/pocket/checkpoint.pt                          # unseen MovingShapes
    python evaluate.py flow --model CHECKPOINT --data-root DATA --benchmark sintel
    python evaluate.py flow --model CHECKPOINT --images a.png b.png                    # pictures of the flow a to b
    python evaluate.py flow --model CHECKPOINT --video clip.mp4                        # a video of its flow
    python evaluate.py flow --model CHECKPOINT --data-root DATA --benchmark kitti2015 --split testing --export SUBMIT
    python evaluate.py segmentation --model CHECKPOINT --data-root DATA --benchmark voc [--finetune]
    python evaluate.py video --model CHECKPOINT --data-root DATA --benchmark davis2017 --export SUBMIT
    python evaluate.py table1 --model CHECKPOINT --data-root DATA                      # all of it

`--data-root` is the folder of a data set as its archive unpacks, or the folder above it; without it each command
measures on MovingShapes. Numbers go to the screen and, with pictures, to `--output-dir`.
"""

import hashlib
import math
import re
import sys
import time
from collections import deque, namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Literal

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

import mcjepa
from data import PALETTE, VOID, LabelledImages, MissingSet, Stream, VideoPairs, make_loader
from engine.checkpoint import as_json, check_same_run, newest_checkpoint, replacing, save_checkpoint, write_json
from engine.faults import one_line, run_command
from engine.log import Log, versions, write_picture
from engine.processes import own_device
from flow import resize_flow, warp
from mcjepa import MCJEPA, ModelConfig, load_checkpoint, load_model, load_weights, pad_to_multiple
from sources import flow_benchmarks, label_sets
from sources.flow_benchmarks import FlowPair, known_flow
from sources.label_sets import ObjectVideo
from sources.moving_shapes import MovingShapes, ShapeLabels

UNSEEN_SEED = 1_618_033_988
"""Seed of the MovingShapes that are measured on. Training draws from its own `--seed`: never give it this one."""
SHAPES_SIZE, SHAPES_PAIRS, SHAPES_IMAGES, SHAPES_VIDEOS, SHAPES_FRAMES = 192, 200, 200, 20, 20
"""MovingShapes: height and width in pixels (the crop of the pocket preset), and how many of them are measured on."""
Flow, Frame = Float[Tensor, "b 2 h w"], Float[Tensor, "1 3 h w"]
Vectors, Rgb, Picture = Float[Tensor, "2 h w"], Float[Tensor, "3 h w"], UInt8[Tensor, "3 h w"]
Mask, Labels, ObjectMask = Bool[Tensor, "h w"], Int64[Tensor, "h w"], UInt8[Tensor, "h w"]
Confusion, LabelData = Int64[Tensor, "c c"], LabelledImages | ShapeLabels
FlowMethod = Callable[[Tensor, Tensor], Tensor]
"""Two images (1, 3, h, w) in [0, 1] to the flow (1, 2, h, w) from the first to the second, in pixels."""
FeatureMethod = Callable[[Tensor], Tensor]
"""An image (1, 3, h, w) in [0, 1] to features (d, h / stride, w / stride)."""


# ------------------------------------------------------------------------------------------------------------ metrics


def _errors_and_lengths(flow: Flow, truth: Flow, valid: Bool[Tensor, "b ..."] | None) -> list[Float[Tensor, " n"]]:
    """End-point error and length of the true flow, in pixels, at the n pixels that count."""
    counts = known_flow(truth)[:, 0]
    if valid is not None:
        counts = counts & valid.reshape(counts.shape)
    if not counts.any():
        raise ValueError("no pixel with known flow: the error is not defined")
    return [vectors.norm(dim=1)[counts] for vectors in (flow.float() - truth.float(), truth.float())]


def end_point_error(flow: Flow, truth: Flow, valid: Bool[Tensor, "b ..."] | None = None) -> Float[Tensor, ""]:
    """Mean distance in pixels between the ends of the estimated and the true flow vectors (EPE).

    Args:
        flow, truth: in pixels, channel 0 = x, channel 1 = y. Unknown truth (NaN, or beyond 1e9) never counts.
        valid: `(b, 1, h, w)` or `(b, h, w)`; only its True pixels count. All do by default.

    Raises:
        ValueError: no pixel counts.
    """
    return _errors_and_lengths(flow, truth, valid)[0].mean()


def f1_all(flow: Flow, truth: Flow, valid: Bool[Tensor, "b ..."] | None = None) -> Float[Tensor, ""]:
    """Share of outliers in [0, 1] (KITTI 2015): error above 3 px and above 5% of the true length. NaN flow is one.

    Arguments and errors are those of `end_point_error`. Tables print it in percent.
    """
    error, length = _errors_and_lengths(flow, truth, valid)
    return (~((error <= 3.0) | (error <= 0.05 * length))).float().mean()


def count_confusion(truth: Labels, prediction: Labels, classes: int) -> Confusion:
    """Pixels by true class (rows) and predicted class (columns); pixels whose truth is VOID do not count."""
    counts = truth != VOID
    pairs = truth[counts] * classes + prediction[counts]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_iou(confusion: Confusion) -> Float[Tensor, " c"]:
    """Intersection over union of each class, in [0, 1]; NaN for a class that neither occurs nor is predicted."""
    return confusion.diag() / (confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diag())


def mean_iou(confusion: Confusion) -> float:
    """The mean over classes of intersection over union, in [0, 1]; see `count_confusion` for its argument.

    A class that neither occurs nor is predicted is left out; without any pixel it raises ValueError.
    """
    iou = class_iou(confusion)
    if iou.isnan().all():
        raise ValueError("no pixel in the confusion matrix: the mean IoU is not defined")
    return iou[~iou.isnan()].mean().item()


def region_similarity(annotation: Mask, prediction: Mask) -> float:
    """J of DAVIS (Perazzi et al. 2016): the intersection of two masks over their union; 1 where both are empty."""
    union = (annotation | prediction).sum().item()
    return (annotation & prediction).sum().item() / union if union else 1.0


def contour_accuracy(annotation: Mask, prediction: Mask) -> float:
    """F of DAVIS: the harmonic mean of precision and recall of the masks' contours.

    A contour pixel is right if the other contour passes within 0.8% of the image's diagonal, rounded up. 1 where both
    masks have no contour, 0 where one has none.
    """
    truth, guess = (_contour(mask.cpu().numpy()) for mask in (annotation, prediction))
    if not truth.any() or not guess.any():
        return float(not truth.any() and not guess.any())
    radius = math.ceil(0.008 * math.hypot(*annotation.shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    near_truth, near_guess = (cv2.dilate(z, (x**2 + y**2 <= radius**2).astype(np.uint8)) for z in (truth, guess))
    precision, recall = (guess & near_truth).sum() / guess.sum(), (truth & near_guess).sum() / truth.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower, or lower right neighbour, as DAVIS finds contours; uint8 (h, w)."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return ((mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])).astype(np.uint8)


def davis_statistics(values: Sequence[float]) -> dict[str, float]:
    """J or F over the frames of an object, as DAVIS counts: the mean, the recall (share above 0.5) and the decay (mean
    of the first quarter less that of the last; neighbouring quarters share a frame)."""
    borders = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, *_, last = (np.mean(values[start : stop + 1]) for start, stop in pairwise(borders))
    recall = np.mean([value > 0.5 for value in values])
    return {"mean": float(np.mean(values)), "recall": float(recall), "decay": float(first - last)}


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
    are at most `radius` rows and columns away, weighted by exp(cosine / temperature). The target is split into tiles,
    each compared only with what its radius reaches: time and memory grow with the pixels times the window.

    Args:
        target, context: features of the frame, and of those whose labels are known; normalised here.
        labels: soft or hard, at the size of the features. Returns weighted means of them.
    """
    (h, w), tile = target.shape[1:], max(radius, 4)
    target, context = F.normalize(target, dim=0), F.normalize(context, dim=1)
    result = labels.new_empty(labels.shape[1], h, w)
    y, x = torch.arange(h, device=target.device), torch.arange(w, device=target.device)
    for top, left in product(range(0, h, tile), range(0, w, tile)):
        rows, columns = slice(top, min(top + tile, h)), slice(left, min(left + tile, w))
        near_rows = slice(max(top - radius, 0), top + tile + radius)
        near_columns = slice(max(left - radius, 0), left + tile + radius)
        here, near = (..., rows, columns), (..., near_rows, near_columns)
        cosine = target[here].flatten(1).T @ context[near].transpose(0, 1).flatten(1)  # (of the tile, of all frames)
        far_rows = (y[rows, None] - y[near_rows]).abs() > radius
        far_columns = (x[columns, None] - x[near_columns]).abs() > radius
        far = (far_rows[:, None, :, None] | far_columns[None, :, None, :]).flatten(0, 1).flatten(1)  # (tile, window)
        cosine = cosine.view(len(far), len(context), -1).masked_fill(far[:, None], -torch.inf).flatten(1)
        best, places = cosine.topk(min(topk, cosine.shape[1]))
        weights = (best / temperature).softmax(dim=1)
        neighbours = labels[near].transpose(0, 1).flatten(1)[:, places]
        result[here] = (neighbours * weights).sum(dim=-1).view(result[here].shape)
    return result


# -------------------------------------------------------------------------------------------------- models, baselines


@dataclass
class Config:
    """The flags that all commands share."""

    model: str
    """A checkpoint of train.py, or a baseline. flow: zero, dis, random; segmentation: random; video: random, colour.
    Segmentation and video also take a state dict of torchvision's convnext_tiny or resnet50."""
    data_root: Path | None = None  # The folder of a data set, or one that holds it. Without it: MovingShapes.
    output_dir: Path = Path("runs/evaluation")  # Where numbers and pictures go; files of the same name are replaced.
    encoder: Literal["convnext_tiny", "resnet50", "pwc"] = "convnext_tiny"  # The network of --model random.


def open_model(name: str, encoder: str = "convnext_tiny", seed: int = 0) -> MCJEPA:
    """The model of a checkpoint, of a torchvision state dict, or "random" (before training), in eval mode.

    Raises:
        FileNotFoundError, ValueError: no such file, or it holds something else.
    """
    if name == "random":
        torch.manual_seed(seed)
        return MCJEPA(ModelConfig(encoder=encoder), task="mjepa").eval().to(own_device())
    if not Path(name).exists():
        raise FileNotFoundError(f"{name}: no such checkpoint, nor a baseline (random; flow: zero, dis; video: colour)")
    weights = load_weights(name)
    if "model" in weights:
        return load_model(name, own_device())
    kinds = {"features.1.0.block.0.weight": "convnext_tiny", "layer1.0.conv1.weight": "resnet50"}
    kind = next((kind for key, kind in kinds.items() if key in weights), None)
    if kind is None:
        raise ValueError(f"{name}: neither a checkpoint of train.py nor a state dict of {' or '.join(kinds.values())}")
    torch.manual_seed(0)  # the file has no weights for our ConvNeXt's stem
    config = ModelConfig(encoder=kind, expander=(1,))  # the expander is not used, so as small as can be
    return MCJEPA(config, task="vicreg", backbone_weights=name).eval().to(own_device())


def feature_method(name: str, stride: int, encoder: str = "convnext_tiny", seed: int = 0) -> FeatureMethod:
    """The features of a model (see `open_model`) at one stride, or "colour": the mean colour of each cell."""
    if name == "colour":
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (mcjepa.IMAGENET_MEAN, mcjepa.IMAGENET_STD))
        return lambda image: F.avg_pool2d((image - mean) / std, stride)[0]
    model = open_model(name, encoder, seed)
    strides = model.encoder.strides
    if stride not in strides:
        raise ValueError(f"--stride {stride}: the features have strides {', '.join(map(str, strides))}")
    return torch.no_grad()(lambda image: model.encode(image.to(own_device()))[strides.index(stride)][0])


def model_flow(model: MCJEPA) -> FlowMethod:
    """A model as a method: takes and returns tensors on the CPU, wherever its parameters are."""
    device = next(model.parameters()).device
    return lambda image_1, image_2: model.estimate_flow(image_1.to(device), image_2.to(device)).float().cpu()


def dis_flow(image_1: Frame, image_2: Frame) -> Flow:
    """OpenCV's DIS (Kroeger et al. 2016) on 8-bit grey images; it learns nothing.

    Preset "medium": on four Middlebury scenes it errs by 0.39 px, OpenCV's default "fast" by 0.60 px.
    """
    h, w = image_1.shape[2:]
    if min(h, w) < 16:  # OpenCV crashes on some of these
        raise ValueError(f"images of {w}x{h} px are too small for DIS: both sides need 16 px")
    frames = (to_uint8(image[0]).permute(1, 2, 0).numpy() for image in (image_1, image_2))
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    return torch.from_numpy(flow).permute(2, 0, 1)[None]


BASELINES: dict[str, FlowMethod] = {"zero": lambda image_1, image_2: torch.zeros_like(image_1[:, :2]), "dis": dis_flow}
"""What every flow is compared with: nothing moves, and a classical method."""


def at_size(method: FlowMethod, resize: str) -> FlowMethod:
    """Estimates on images resized to "384x832" (height, width) or by a factor ("0.5"); the flow is of the originals."""
    exact = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", resize)
    if not exact and not (re.fullmatch(r"\d*\.?\d+", resize) and float(resize)):
        raise ValueError(f"--resize {resize}: choose HEIGHTxWIDTH such as 384x832, or a factor such as 0.5")

    def estimate(image_1: Frame, image_2: Frame) -> Flow:
        size = image_1.shape[2:]
        inner = [int(exact[1]), int(exact[2])] if exact else [max(round(n * float(resize)), 1) for n in size]
        resized = [F.interpolate(image, inner, mode="bilinear", antialias=True) for image in (image_1, image_2)]
        return resize_flow(method(*resized), size)

    return estimate


# ------------------------------------------------------------------------------------------------ pictures and tables


def to_uint8(image: Float[Tensor, "*t 3 h w"]) -> UInt8[Tensor, "*t 3 h w"]:
    """An image in [0, 1] as bytes."""
    return (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def colour_scale(flow: Vectors) -> float:
    """The length in pixels that gets the full colour: the 99th percentile, which ignores outliers, and at least 1."""
    lengths = flow.norm(dim=0)[known_flow(flow[None])[0, 0]].detach().cpu().numpy()
    return max(1.0, float(np.quantile(lengths, 0.99))) if lengths.size else 1.0


def flow_colours(flow: Vectors, scale: float) -> Picture:
    """Flow in the usual colour key, full colour from `scale` pixels on; black where it is unknown."""
    flow = flow.detach().float().cpu()
    known = known_flow(flow[None])[0]
    unit = torch.where(known, flow, 0.0) / scale
    unit = unit / unit.norm(dim=0).clamp(min=1)
    # flow_to_image divides by the largest length in the picture: one more column of length 1 holds the scale fixed.
    return flow_to_image(F.pad(unit, (0, 1), value=0.5**0.5))[..., :-1] * known


def colour_wheel(height: int, width: int) -> Picture:
    """The colours of all flows up to full colour, as a disc on white."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    disc = torch.stack((x, y)) / (min(height, width) / 2)
    return torch.where(disc.norm(dim=0) <= 1, flow_colours(disc, 1.0), 255).to(torch.uint8)


def titled_grid(panels: dict[str, Picture], columns: int) -> UInt8[Tensor, "3 H W"]:
    """Panels in rows, each below its title, on white."""
    titled = []
    for title, panel in panels.items():
        strip = np.full((14, panel.shape[-1], 3), 255, np.uint8)
        cv2.putText(strip, title, (2, 11), cv2.FONT_HERSHEY_PLAIN, 0.75, (0, 0, 0), 1, cv2.LINE_AA)
        titled.append(torch.cat([torch.from_numpy(strip).permute(2, 0, 1), panel], dim=1))
    return make_grid(torch.stack(titled), nrow=columns, padding=2, pad_value=255)


def flow_figure(image_1: Rgb, image_2: Rgb, flow: Vectors, truth: Vectors | None = None) -> UInt8[Tensor, "3 H W"]:
    """One picture to judge a flow by eye: from image 1 to image 2, in pixels, images in [0, 1].

    Both frames, the flow, frame 2 warped to frame 1 by it, and the difference between that and frame 1, which is black
    for a perfect flow. With the truth also its colours, on the same scale, and the end-point error; unknown truth is
    black. Last the colour wheel: a point has the colour of the flow from the wheel's centre to it, and the titles say
    how long the flow at the rim is.
    """
    scale = colour_scale(flow if truth is None else truth)
    warped = warp(image_2[None], flow[None])[0]
    panels = {"frame 1": to_uint8(image_1), "frame 2": to_uint8(image_2)}
    if truth is not None:
        panels[f"truth ({scale:.1f} px)"] = flow_colours(truth, scale)
    panels[f"flow ({scale:.1f} px)"] = flow_colours(flow, scale)
    panels |= {"2 warped to 1": to_uint8(warped), "residual": to_uint8((image_1 - warped).abs())}
    if truth is not None:
        error = torch.where(known_flow(truth[None])[0], flow - truth, 0.0)
        brightest = colour_scale(error)
        panels[f"error ({brightest:.1f} px)"] = to_uint8((error.norm(dim=0) / brightest).expand(3, -1, -1))
    panels[f"key ({scale:.1f} px)"] = colour_wheel(*image_1.shape[1:])
    return titled_grid(panels, columns=3 if truth is None else 4)


def overlay(image: Picture, labels: ObjectMask | Labels, colours: np.ndarray, hidden: Sequence[int]) -> Picture:
    """Labels over an image, half transparent, in their colours, but for the hidden ones."""
    numbers = [number for number in labels.unique().tolist() if number not in hidden]
    if not numbers:
        return image
    masks = torch.stack([labels == number for number in numbers])
    return draw_segmentation_masks(image, masks, alpha=0.5, colors=[tuple(colours[n].tolist()) for n in numbers])


@contextmanager
def writing_video(path: Path, rate: float) -> Iterator[Callable[[Picture], None]]:
    """Yields a function that adds a frame to an mp4 video, which appears at `path` once it is whole."""
    writer, count = cv2.VideoWriter(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:

        def write(frame: Picture) -> None:
            nonlocal count
            count += 1
            height, width = frame.shape[1] // 2 * 2, frame.shape[2] // 2 * 2  # the codec takes even sizes only
            if count == 1 and not writer.open(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height)):
                raise ValueError(f"{path.parent}: OpenCV cannot write an mp4 video here")
            writer.write(cv2.cvtColor(frame[:, :height, :width].permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR))

        yield write
        writer.release()
        # The encoder reports nothing where the disk is full.
        if int(cv2.VideoCapture(str(temporary)).get(cv2.CAP_PROP_FRAME_COUNT)) != count:
            raise OSError(f"{path}: the video cannot be written; is the disk full?")


def print_table(title: str, columns: Sequence[str], rows: dict[str, Sequence[float]]) -> None:
    """Prints numbers with two digits below their columns; NaN as "-"."""
    first, width = max(map(len, (title, *rows))), max(8, *map(len, columns)) + 2
    print()
    for name, cells in {title: columns, **rows}.items():
        texts = [x if isinstance(x, str) else "-" if math.isnan(x) else f"{x:.2f}" for x in cells]
        print(f"{name:{first}}" + "".join(f"{text:>{width}}" for text in texts))


def write_report(config: Config, name: str, report: dict) -> dict:
    """Prints the notes of a report, writes it as NAME.json with settings and versions, and returns that."""
    print("".join(f"note: {note}\n" for note in report["notes"]) + f"numbers and pictures: {config.output_dir}")
    report = {"settings": as_json(config), "versions": versions()} | report
    write_json(config.output_dir / f"{name}.json", report)
    return report


# ------------------------------------------------------------------------------------------------------- optical flow


@dataclass
class FlowConfig(Config):
    """Optical flow against ground truth, or pictures of it where there is none."""

    benchmark: Literal["sintel", "kitti2012", "kitti2015", "middlebury", "chairs", "things", "hd1k"] | None = None
    """Which of the benchmarks in --data-root; may be left out where there is only one."""
    output_dir: Path = Path("runs/flow")  # Where numbers and pictures go.
    split: Literal["training", "testing"] = "training"  # testing: whose truth is secret (Sintel, KITTI); for --export.
    export: Path | None = None  # A folder for the flow of every pair, as the benchmark's server takes it.
    images: tuple[Path, Path] | None = None  # Two images instead: writes the flow from the first to the second.
    video: Path | None = None  # A video file or a folder of frames instead: writes a video of frames and flow.
    max_frames: int | None = None  # Only the first frames of the video.
    resize: str | None = None  # What the method sees: HEIGHTxWIDTH, or a factor. Errors are in the originals' pixels.
    pictures: int = 8  # How many pairs get a picture at most.


def shapes_pairs(count: int, size: tuple[int, int]) -> Iterator[FlowPair]:
    """Unseen MovingShapes as pairs; their flow is known everywhere, also where the second frame hides the point."""
    shapes = MovingShapes(length=count, size=size, frames=2, seed=UNSEEN_SEED)
    for index in range(count):
        item = shapes[index]
        first, second, truth = item["images"][:1], item["images"][1:], item["flow_forward"]
        yield FlowPair(f"shapes_{index:04d}", "", first, second, truth, {"all": known_flow(truth)})


def measure_pair(pair: FlowPair, methods: dict[str, FlowMethod]) -> tuple[dict[str, Flow], dict]:
    """The flow of each method, and the pair's entry in flow.json: `pixels` of each region, and for each method `epe` in
    pixels and `f1` in [0, 1] of each region, and its `seconds`."""
    regions = {name: region for name, region in pair.regions.items() if region.any()}
    pixels = {name: int(region.sum()) for name, region in regions.items()}
    flows, entry = {}, {"name": pair.name, "group": pair.group, "pixels": pixels}
    for name, method in methods.items():
        start = time.perf_counter()
        flows[name] = method(pair.image_1, pair.image_2)
        entry[name] = {"seconds": time.perf_counter() - start}
        for metric, function in (("epe", end_point_error), ("f1", f1_all)):
            entry[name][metric] = {key: function(flows[name], pair.flow, mask).item() for key, mask in regions.items()}
    return flows, entry


def mean_errors(entries: list[dict], method: str) -> dict:
    """A method over many pairs: `epe` and `f1` of each region as the mean over images (`per_image`) and over pixels
    (`per_pixel`, as the development kits of KITTI and Sintel count), and the median of the seconds."""
    means = {"per_pixel": {"epe": {}, "f1": {}}, "per_image": {"epe": {}, "f1": {}}}
    for region, metric in product(flow_benchmarks.REGIONS, ("epe", "f1")):
        present = [entry for entry in entries if region in entry["pixels"]]
        if present:
            values, pixels = [e[method][metric][region] for e in present], [e["pixels"][region] for e in present]
            means["per_pixel"][metric][region] = float(np.average(values, weights=pixels))
            means["per_image"][metric][region] = float(np.mean(values))
    return means | {"seconds": float(np.median([entry[method]["seconds"] for entry in entries]))}


def flow_errors_on_shapes(model: MCJEPA, count: int, size: tuple[int, int]) -> dict[str, float]:
    """A model's `epe` and `f1` (in [0, 1]) on unseen MovingShapes, and zero flow's `epe_zero`, for train.py."""
    methods, training = {"ours": model_flow(model), "zero": BASELINES["zero"]}, model.training
    model.eval()
    entries = [measure_pair(pair, methods)[1] for pair in shapes_pairs(count, size)]
    model.train(training)
    ours, zero = (mean_errors(entries, name)["per_image"] for name in methods)
    return {"epe": ours["epe"]["all"], "epe_zero": zero["epe"]["all"], "f1": ours["f1"]["all"]}


def run_flow(config: tyro.conf.OmitArgPrefixes[FlowConfig]) -> dict:
    """Optical flow: end-point error and F1-all on ground truth, or pictures of two images or a video."""
    testing = config.split == "testing"
    if sum(source is not None for source in (config.data_root, config.images, config.video)) > 1:
        raise ValueError("--data-root, --images and --video exclude each other: give one of them")
    if config.data_root is None and (config.benchmark or config.export or testing):
        raise ValueError("--benchmark, --split and --export need --data-root: give that too")
    if testing and config.export is None:
        raise ValueError("--split testing has no truth to measure against: give --export FOLDER for a submission")
    method = BASELINES.get(config.model) or model_flow(open_model(config.model, config.encoder))
    method = at_size(method, config.resize) if config.resize else method
    if config.images:
        return flow_of_images(method, *config.images, config.output_dir)
    if config.video:
        return flow_of_video(method, config)
    benchmark, source, notes = "shapes", f"MovingShapes, {SHAPES_SIZE} px, unseen seed", []
    pairs, count = shapes_pairs(SHAPES_PAIRS, (SHAPES_SIZE, SHAPES_SIZE)), SHAPES_PAIRS
    if config.data_root is not None:
        benchmark, files, notes = flow_benchmarks.find_benchmark(config.data_root, config.benchmark, config.split)
        pairs, count = map(flow_benchmarks.read_pair, files), len(files)
        source = f"{benchmark} in {config.data_root}"
    label = config.model if config.model in (*BASELINES, "random") else "ours"
    label = f"{label} {config.resize}" if config.resize else label  # a baseline then has two rows
    methods = {label: method} if testing else BASELINES | {label: method}
    entries = []
    for pair in tqdm(pairs, total=count, desc="flow", unit="pair", disable=None):
        flows, entry = measure_pair(pair, methods)
        if len(entries) < config.pictures:
            truth = None if pair.flow is None else pair.flow[0]
            figure = flow_figure(pair.image_1[0], pair.image_2[0], flows[label][0], truth)
            write_picture(config.output_dir / f"{flow_benchmarks.picture_name(pair)}.png", figure)
        if config.export:
            export_flow(config.export / flow_benchmarks.submission_name(benchmark, pair), flows[label])
        entries.append(entry)
    report = {"data": source, "label": label, "groups": {}, "notes": notes, "scenes": entries, "table1": {}}
    for group in dict.fromkeys(entry["group"] for entry in entries):
        rows = {name: mean_errors([entry for entry in entries if entry["group"] == group], name) for name in methods}
        report["groups"][group or "all"] = rows
        if "all" in rows[label]["per_image"]["epe"]:  # not of a split without truth
            report["table1"][f"{group} EPE".strip()] = rows[label]["per_image"]["epe"]["all"]
    if not testing:
        print_flow(report)
    if config.export:
        print(f"flow of {len(entries)} pairs: {config.export}")
    return write_report(config, "flow", report)


def print_flow(report: dict) -> None:
    """The means of each group of pairs, and the error of each pair where there are few."""
    print(f"\nFlow on {report['data']}: EPE in px, F1 in %, times in ms")
    for (group, rows), mean in product(report["groups"].items(), ("per_pixel", "per_image")):
        regions = rows["zero"][mean]["epe"]
        table = {
            name: [*row[mean]["epe"].values(), *(100 * f1 for f1 in row[mean]["f1"].values()), 1000 * row["seconds"]]
            for name, row in rows.items()
        }
        columns = [f"{metric} {region}" for metric, region in product(("EPE", "F1"), regions)]
        print_table(f"{group}, {mean.replace('_', ' ')}", [*columns, "time"], table)
    if len(report["scenes"]) <= 20:
        names = [f"{scene['group']} {scene['name']}".strip() for scene in report["scenes"]]
        methods = list(next(iter(report["groups"].values())))
        errors = ([scene[method]["epe"].get("all", math.nan) for method in methods] for scene in report["scenes"])
        print_table("EPE all", methods, dict(zip(names, errors, strict=True)))


def export_flow(path: Path, flow: Flow) -> None:
    """Writes a flow, whole or not at all: .flo, or KITTI's .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        flow_benchmarks.write_flow(temporary, flow)


def flow_of_images(method: FlowMethod, path_1: Path, path_2: Path, folder: Path) -> dict:
    """Writes flow.flo, flow.png (colours), warped.png (the second image at the place of the first) and figure.png."""
    image_1, image_2 = flow_benchmarks.read_frames(path_1, path_2)
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
    path, film = config.video, config.output_dir / f"{config.video.stem}_flow.mp4"
    pairs = VideoPairs(path, transform=lambda *frames: tuple(frame.float() / 255 for frame in frames))
    if len(pairs.clips) > 1:
        raise ValueError(f"{path}: holds {len(pairs.clips)} clips; name one of them")
    scale = 1.0
    count = min(len(pairs), max((config.max_frames or sys.maxsize) - 1, 1))
    pictured = set(np.linspace(0, count - 1, min(config.pictures, count)).round().astype(int))
    rate = max(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS), 0.0) or 25.0  # a folder of frames has none
    with writing_video(film, rate) as write:
        for index in tqdm(range(count), desc="flow", unit="frame", disable=None):
            frame, following = pairs[index]
            flow = method(frame[None], following[None])[0]
            scale = max(colour_scale(flow), 0.95 * scale)  # grows at once and fades slowly: colours do not flicker
            write(torch.cat((to_uint8(frame), flow_colours(flow, scale)), dim=2))
            if index in pictured:
                write_picture(film.with_name(f"{path.stem}_{index:05d}.png"), flow_figure(frame, following, flow))
    print(f"flow of {count} frames: {film}")
    return {}


# ------------------------------------------------------------------------------------------------------- segmentation


class Segmenter(nn.Module):
    """The encoder of a model with a linear head: batch norm and a 1x1 convolution over all levels, at stride 4.

    Each level goes through its own part of the convolution before the sizes are brought together. Both steps are
    linear, so the sum equals the convolution over the levels side by side, for a fraction of the memory. (Only the
    statistics of the batch norm differ a little: they are those of a level before it is enlarged.) With `finetune` the
    encoder learns too; otherwise it stays as it is, its normalisation layers in eval mode.
    """

    def __init__(self, model: MCJEPA, classes: int, finetune: bool = False) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.freeze_encoder(not finetune)
        torch.manual_seed(0)  # the same head for every --seed
        levels = list(enumerate(model.encoder.channels))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for _, c in levels)
        self.classifiers = nn.ModuleList(nn.Conv2d(c, classes, 1, bias=i == 0) for i, c in levels)  # one bias is enough
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(self.classifiers[0].bias)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Images in [0, 1], of any size, to a score for each class of each pixel."""
        (h, w), strides, total = images.shape[2:], self.model.encoder.strides, 0.0
        pyramid = self.model.encode(pad_to_multiple(images, max(strides)))
        size = pyramid[strides.index(4)].shape[2:]
        for features, stride, norm, classifier in zip(pyramid, strides, self.norms, self.classifiers, strict=True):
            scores = classifier(norm(features))
            if stride < 4:
                scores = F.adaptive_avg_pool2d(scores, size)
            elif stride > 4:
                scores = F.interpolate(scores, size, mode="bilinear")
            total = total + scores
        return F.interpolate(total, (4 * size[0], 4 * size[1]), mode="bilinear")[..., :h, :w]


@torch.no_grad()
def sliding_scores(
    segment: Callable[[Tensor], Tensor], image: Float[Tensor, "1 3 h w"], window: int = 512, stride: int = 341
) -> Float[Tensor, "1 c h w"]:
    """The scores of an image from square windows that slide over it by `stride` pixels, averaged where they overlap.

    The last window ends at the border; an image that is smaller than the window is taken whole.
    """
    h, w = image.shape[2:]
    tops, lefts = ([*range(0, max(length - window, 0), stride), max(length - window, 0)] for length in (h, w))
    total, times = None, image.new_zeros(1, 1, h, w)
    for top, left in product(tops, lefts):
        here = (..., slice(top, top + window), slice(left, left + window))
        scores = segment(image[here])
        total = scores.new_zeros(1, scores.shape[1], h, w) if total is None else total
        total[here] += scores
        times[here] += 1
    return total / times


Recipe = namedtuple("Recipe", "steps warmup batch crop size learning_rate encoder_learning_rate")
"""How a linear head is trained, alone or with the encoder; `size`: the images' shorter side in pixels."""
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
    output_dir: Path = Path("runs/segmentation")  # Where the head, numbers and pictures go.
    finetune: bool = False  # The encoder learns with the head; by default it is frozen.
    steps: int | None = None
    """Of training, for a quick look (voc, cityscapes 40,000; ade20k 160,000; camvid 400; MovingShapes 300)."""
    seed: int = 0  # Of the order of the images, of their augmentation, and of --model random.
    workers: int = 0  # Processes that load data; any number gives the same result.
    pictures: int = 8  # How many images get a picture at most.


def run_segmentation(config: tyro.conf.OmitArgPrefixes[SegmentationConfig]) -> dict:
    """Semantic segmentation with frozen or fine-tuned features: trains a linear head, measures mIoU, draws pictures.

    A training that was stopped continues from its checkpoint in --output-dir.
    """
    if config.data_root is None and config.benchmark:
        raise ValueError("--benchmark needs --data-root: give that too")
    if config.steps is not None and config.steps < 1:
        raise ValueError("--steps must be positive")
    name, size = "shapes", (SHAPES_SIZE, SHAPES_SIZE)
    training, validation = ShapeLabels(1_000_000, size, config.seed), ShapeLabels(SHAPES_IMAGES, size, UNSEEN_SEED)
    if config.data_root is not None:
        name, training = label_sets.find_labels(config.data_root, config.benchmark, "train")
        _, validation = label_sets.find_labels(config.data_root, name, "val")
        config = replace(config, benchmark=name)
    recipe = RECIPES[name]
    if config.steps is not None:  # a quick look would end before the learning rate is full
        recipe = recipe._replace(steps=config.steps, warmup=min(recipe.warmup, config.steps // 10))
    model = open_model(config.model, config.encoder, config.seed)
    segmenter = Segmenter(model, len(training.classes), config.finetune).to(own_device())
    settings = train_segmenter(segmenter, training, recipe, config)
    confusion = measure_segmenter(segmenter.eval(), validation, recipe, config)
    iou = dict(zip(training.classes, class_iou(confusion).tolist(), strict=True))
    shares = (confusion.sum(dim=1) / confusion.sum()).tolist()
    rows = {label: (100 * iou[label], 100 * share) for label, share in zip(iou, shares, strict=True)}
    kind, accuracy = "tuned" if config.finetune else "frozen", (confusion.diag().sum() / confusion.sum()).item()
    print_table(f"{name}, {kind} features", ("IoU [%]", "pixels [%]"), rows)
    report = {"data": name, "images": len(validation), "miou": mean_iou(confusion), "pixel_accuracy": accuracy}
    report["iou"] = {label: None if math.isnan(value) else value for label, value in iou.items()}
    report |= {"confusion": confusion.tolist(), "notes": list(training.notes), "settings": settings}
    report["table1"] = {kind: 100 * report["miou"]}
    print(f"\nmIoU {100 * report['miou']:.2f}%, pixel accuracy {100 * accuracy:.2f}%, {len(validation)} images")
    return write_report(config, "segmentation", report)


def train_segmenter(segmenter: Segmenter, training: LabelData, recipe: Recipe, config: SegmentationConfig) -> dict:
    """Trains the head, and the encoder with --finetune, from the checkpoint in --output-dir or from the beginning.

    Returns the settings of the run. ValueError if the checkpoint belongs to others, or the loss is not finite.
    """
    settings = as_json(config) | recipe._asdict() | {"training_images": len(training)}
    if Path(config.model).is_file():
        settings["weights"] = hashlib.sha256(Path(config.model).read_bytes()).hexdigest()[:16]
    learns = nn.ModuleDict({"norms": segmenter.norms, "classifiers": segmenter.classifiers})
    groups = [{"params": [*learns.parameters()], "initial_lr": recipe.learning_rate}]
    if config.finetune:  # otherwise the encoder comes from --model, not from the checkpoint
        learns["encoder"] = segmenter.model.encoder
        groups.append({"params": [*learns["encoder"].parameters()], "initial_lr": recipe.encoder_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    path, start, device = config.output_dir / "checkpoint.pt", 0, own_device()
    checkpoint, warnings = newest_checkpoint(config.output_dir, load_checkpoint)
    print("".join(f"{warning}\n" for warning in warnings), end="")
    if checkpoint:
        if warnings:  # the next save would move the damaged file over the good checkpoint.1.pt
            path.rename(path.with_name("damaged-checkpoint.pt"))
        # The weights say which model it is, wherever it is stored.
        may_differ = ["output_dir", "workers", "pictures", "data_root", "model"]
        check_same_run(path, checkpoint["config"], settings, may_differ + ["encoder"] * ("weights" in settings))
        learns.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    if start >= recipe.steps:
        return settings
    transform, stream = label_sets.LabelAugmentation(recipe.crop, recipe.size), Stream(config.seed, start_step=start)
    loader = make_loader(training, transform, recipe.batch, stream, config.workers)
    segmenter.train()
    with closing(Log(config.output_dir, start, recipe.steps)) as log:
        for step, (images, labels) in zip(range(start, recipe.steps), loader, strict=False):
            factor, done = min((step + 1) / max(recipe.warmup, 1), 1.0) * (1 - step / recipe.steps), step + 1
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            images, labels = images.to(device), labels.to(device)
            # The mean over the pixels that count; 0 if there are none.
            loss = F.cross_entropy(segmenter(images), labels, ignore_index=VOID, reduction="sum")
            loss = loss / (labels != VOID).sum().clamp(min=1)
            if not loss.isfinite():
                raise ValueError(f"step {step}: the loss is not finite; check the weights of --model")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            log.advance(text=f"loss {loss.item():.3f}")
            if done % 10 == 0 or done == recipe.steps:
                log.write(done, {"loss": loss.item(), "learning_rate": optimizer.param_groups[0]["lr"]})
            if done % 100 == 0 or done == recipe.steps:
                state = {"model": learns.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(path, state | {"step": done, "config": settings})
    return settings


def measure_segmenter(segmenter: Segmenter, data: LabelData, recipe: Recipe, config: SegmentationConfig) -> Confusion:
    """Counts the pixels of all images at their own size by true and predicted class; draws the first few images."""
    confusion = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    for index in tqdm(range(len(data)), desc="segmentation", unit="image", disable=None):
        image, truth = data[index]
        (h, w), factor = truth.shape, recipe.size / min(truth.shape)
        shown = image[None].to(own_device()).float() / 255
        if factor != 1:
            size = [max(round(length * factor), 1) for length in (h, w)]
            shown = F.interpolate(shown, size, mode="bilinear", antialias=True)
        scores = sliding_scores(segmenter, shown, recipe.crop, recipe.crop * 2 // 3)
        if not scores.isfinite().all():
            raise ValueError(f"image {index}: the scores are not finite; check the weights of --model")
        prediction = F.interpolate(scores, (h, w), mode="bilinear").argmax(dim=1)[0].cpu()
        confusion += count_confusion(truth, prediction, len(confusion))
        if index < config.pictures:
            panels = {"truth": truth, "prediction": prediction}
            panels = {title: overlay(image, labels, data.colours, [VOID]) for title, labels in panels.items()}
            figure = titled_grid({"image": image} | panels, columns=3)
            write_picture(config.output_dir / "pictures" / f"image_{index:04d}.png", figure)
    return confusion


# ----------------------------------------------------------------------------------------- video object segmentation


@dataclass
class VideoConfig(Config):
    """Video object segmentation: the masks of the first frame, propagated by feature similarity (J and F)."""

    benchmark: Literal["davis2016", "davis2017"] | None = None
    """davis2016 merges all objects into one and uses its own list of sequences. By default both are as in the files."""
    output_dir: Path = Path("runs/video")  # Where numbers and pictures go.
    split: str = "val"  # Which list of sequences (train, val, test-dev).
    export: Path | None = None  # A folder for the masks, SEQUENCE/00000.png, as the benchmark's server takes them.
    seed: int = 0  # Of --model random.
    stride: int = 8  # The level of the features.
    size: int | None = None  # Resizes the frames to this shorter side (480; MovingShapes: as they are).
    standardise: bool = False  # Gives the channels mean 0 and standard deviation 1 over the first frame.
    propagation: tuple[int, int, int, float] = (7, 12, 5, 0.1)
    """How many last frames give labels besides the first, from how many cells around, the number of most similar cells,
    and the temperature: their weight is exp(cosine / temperature) (DINO)."""


def shapes_videos() -> Iterator[ObjectVideo]:
    """Unseen MovingShapes as videos, without those that have no shape in the first frame."""
    size, names = (SHAPES_SIZE, SHAPES_SIZE), [f"{t:05d}" for t in range(SHAPES_FRAMES)]
    shapes = MovingShapes(length=10 * SHAPES_VIDEOS, size=size, frames=SHAPES_FRAMES, seed=UNSEEN_SEED)
    for index in range(len(shapes)):
        item = shapes[index]
        images, masks = to_uint8(item["images"]), item["instances"].to(torch.uint8)
        objects = [number for number in masks[0].unique().tolist() if number]
        if objects:
            yield ObjectVideo(f"shapes_{index:04d}", objects, images.__getitem__, masks.__getitem__, names)


def follow_objects(video: ObjectVideo, features: FeatureMethod, config: VideoConfig) -> Iterator[ObjectMask]:
    """The predicted mask of each frame, the first being the true one (DINO's protocol).

    Labels are propagated at the size of the features; the soft labels of the first frame and of the last few are kept.
    For the mask they are enlarged, each object's are stretched to [0, 1], and the largest wins.
    """
    first = video.masks(0)
    (h, w), numbers = first.shape, torch.tensor([0, *video.objects], dtype=torch.uint8)
    factor = 1.0 if config.size is None else config.size / min(h, w)
    cells = [max(round(length * factor / config.stride), 1) for length in (h, w)]
    frames, *options = config.propagation
    memory: deque = deque(maxlen=frames)
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
            beginning = (now, F.interpolate(one_hot[None], cells, mode="nearest-exact")[0].to(now.device))
            yield torch.where(one_hot[0] > 0, 0, first).to(torch.uint8)
            continue
        context, labels = (torch.stack(x) for x in zip(beginning, *memory, strict=True))
        soft = propagate_labels(now, context, labels, *options)
        if not soft.isfinite().all():
            raise ValueError(f"{video.name}: the features are not finite (or the temperature is too small)")
        memory.append((now, soft))
        soft = F.interpolate(soft[None].cpu(), (h, w), mode="bilinear")[0]
        least, most = soft.amin(dim=(1, 2), keepdim=True), soft.amax(dim=(1, 2), keepdim=True)
        # An object that is everywhere, or nowhere, has nothing to stretch.
        yield numbers[torch.where(most - least > 1e-6, (soft - least) / (most - least), soft).argmax(dim=0)]


def run_video(config: tyro.conf.OmitArgPrefixes[VideoConfig]) -> dict:
    """Video object segmentation by label propagation on DAVIS or MovingShapes: J, F, masks and pictures."""
    if config.data_root is None and config.benchmark:
        raise ValueError("--benchmark needs --data-root: give that too")
    frames, radius, topk, temperature = config.propagation
    if min(config.stride, topk) < 1 or not temperature > 0 or min(frames, radius) < 0:
        raise ValueError("--stride and --propagation must be positive; frames and cells around may be 0")
    source, notes, count = f"MovingShapes, {SHAPES_SIZE} px, unseen seed", [], SHAPES_VIDEOS
    videos = islice(shapes_videos(), count)
    if config.data_root is not None:
        year = config.benchmark.removeprefix("davis") if config.benchmark else None
        videos, notes = label_sets.find_masked_videos(config.data_root, config.split, year)
        source, count = f"{config.benchmark or 'DAVIS'} in {config.data_root}", len(videos)
        config = replace(config, size=config.size or 480)
    features = feature_method(config.model, config.stride, config.encoder, config.seed)
    sequences, failure = {}, None
    try:
        for video in tqdm(videos, total=count, desc="video", unit="sequence", disable=None):
            start = time.perf_counter()
            predictions = [mask.cpu() for mask in follow_objects(video, features, config)]
            seconds = (time.perf_counter() - start) / video.length
            if config.export:
                export_masks(video, predictions, config.export / video.name)
            if len(sequences) < 8:
                write_picture(config.output_dir / f"{video.name}.png", objects_figure(video, predictions))
            sequences[video.name] = measure_objects(video, predictions) | {"seconds": seconds}
    except (ValueError, OSError) as error:
        if not sequences:
            raise
        failure, notes = error, [*notes, f"stopped before the end: {one_line(error)}"]
    notes = notes + [f"{name}: {sequence['note']}" for name, sequence in sequences.items() if sequence["note"]]
    report = {"data": source, "mean": mean_over_objects(sequences), "notes": notes, "sequences": sequences}
    report["table1"] = {"J&F": 100 * report["mean"]["J&F"]} if report["mean"] else {}
    rows = {name: mean_over_objects({name: sequence}) for name, sequence in sequences.items()}
    rows["mean over objects"] = report["mean"]
    columns = ("J&F", "J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay")
    print(f"\nVideo object segmentation on {source}")
    print_table("[%]", columns, {name: [100 * row[key] for key in columns] for name, row in rows.items() if row})
    if config.export:
        print(f"masks of {len(sequences)} sequences: {config.export}")
    report = write_report(config, "video", report)
    if failure:  # what was measured before it is not lost
        raise failure
    if not report["mean"] and not config.export:
        raise ValueError(f"{source}: nothing to measure, see the notes; --export writes masks nevertheless")
    return report


def export_masks(video: ObjectVideo, predictions: Sequence[ObjectMask], folder: Path) -> None:
    """Palette PNGs in DAVIS's colours, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in zip(video.frame_names, predictions, strict=True):
        image = Image.fromarray(mask.numpy())
        image.putpalette(PALETTE.tobytes())
        with replacing(folder / f"{name}.png") as temporary:
            image.save(temporary, format="PNG")


def objects_figure(video: ObjectVideo, predictions: Sequence[ObjectMask]) -> UInt8[Tensor, "3 H W"]:
    """Frames 1, 10, 25 and 50 (or the last) with the true masks, and below with ours (as the paper's Figure 4)."""
    panels, shown = {}, sorted({min(number, video.length) - 1 for number in (1, 10, 25, 50)})
    for (title, masks), index in product({"truth": video.masks, "ours": predictions.__getitem__}.items(), shown):
        frame, mask = video.frames(index), masks(index)
        panels[f"t = {index + 1}, {title}"] = frame if mask is None else overlay(frame, mask, PALETTE, [0, VOID])
    return titled_grid(panels, columns=len(shown))


def measure_objects(video: ObjectVideo, predictions: Sequence[ObjectMask]) -> dict:
    """J and F of each object in each frame but the first and the last, with their statistics.

    Frames without a mask are left out, and so are void pixels and objects that the first mask does not have.
    """
    values = {number: {"J": [], "F": []} for number in video.objects}
    left_out = 0
    for index in range(1, video.length - 1):
        truth = video.masks(index)
        if truth is None or (truth == VOID).all():
            left_out += 1
            continue
        for number, measured in values.items():
            annotation, prediction = ((mask == number) & (truth != VOID) for mask in (truth, predictions[index]))
            measured["J"].append(region_similarity(annotation, prediction))
            measured["F"].append(contour_accuracy(annotation, prediction))
    notes = [f"frames without a mask: {left_out}"] * bool(left_out)
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
    kinds = product(("J", "F"), ("mean", "recall", "decay"))
    means = {f"{name}_{kind}": float(np.mean([each[name][kind] for each in objects])) for name, kind in kinds}
    seconds = float(np.median([sequence["seconds"] for sequence in sequences.values()]))
    return {"J&F": (means["J_mean"] + means["F_mean"]) / 2} | means | {"seconds": seconds}


# ------------------------------------------------------------------------------------------------------------ Table 1

NAN = math.nan
PAPER = {
    "Sintel clean EPE": (2.98, NAN, NAN, 2.81),
    "Sintel final EPE": (3.82, NAN, NAN, 3.51),
    "KITTI 2015 EPE": (3.01, 13.5, 11.4, 2.67),
    "VOC frozen": (9.4, 60.1, 66.8, 67.1),
    "VOC tuned": (NAN, 77.8, 79.7, 79.9),
    "Cityscapes frozen": (NAN, 59.8, 64.9, 65.5),
    "Cityscapes tuned": (NAN, 76.3, 78.3, 78.4),
    "ADE20K frozen": (NAN, 28.6, 30.6, 30.8),
    "ADE20K tuned": (NAN, 41.1, 44.1, 44.2),
    "DAVIS 2017 J&F": (NAN, 58.1, 66.7, 70.5),
}
"""The paper's Table 1, errors in pixels and shares in percent: M-JEPA, VICReg, VICRegL, MC-JEPA."""


@dataclass
class Table1Config(Config):
    """Flow, segmentation and video of one model, beside the paper's Table 1."""

    output_dir: Path = Path("runs/table1")  # A folder in it for each part.
    steps: int | None = None  # Of each training of segmentation, for a quick look.
    workers: int = 0  # Processes that load data for the training of segmentation.


def run_table1(config: tyro.conf.OmitArgPrefixes[Table1Config]) -> None:
    """Optical flow, segmentation and video of a model, beside the paper's Table 1.

    What is missing in --data-root is noted; what fails is reported at the end, and the rest is measured.
    """
    if config.data_root is not None and not config.data_root.is_dir():
        raise FileNotFoundError(f"{config.data_root}: no such folder; check the path")
    has_flow = open_model(config.model, config.encoder).estimator is not None
    notes, measured, failures = [] if has_flow else ["no flow: this model has no estimator"], {}, []
    labels = {"VOC": "voc", "Cityscapes": "cityscapes", "ADE20K": "ade20k"}
    sets = {"flow": {"Sintel": "sintel", "KITTI 2015": "kitti2015"}} if has_flow else {}
    sets |= {"frozen": labels, "tuned": labels, "video": {"DAVIS 2017": "davis2017"}}
    if config.data_root is None:
        sets = dict.fromkeys(sets, {"MovingShapes": None})
    # "title column" is a key of PAPER, with the columns of the reports' "table1".
    for kind, title, name in [(kind, title, name) for kind, parts in sets.items() for title, name in parts.items()]:
        folder = config.output_dir / f"{kind}_{name or 'shapes'}"
        flags = {"model": config.model, "data_root": config.data_root, "encoder": config.encoder, "output_dir": folder}
        try:
            if kind == "flow":
                report = run_flow(FlowConfig(**flags, benchmark=name))
            elif kind == "video":
                report = run_video(VideoConfig(**flags, benchmark=name))
            else:
                flags |= {"finetune": kind == "tuned", "steps": config.steps, "workers": config.workers}
                report = run_segmentation(SegmentationConfig(**flags, benchmark=name))
            measured |= {f"{title} {column}": number for column, number in report["table1"].items()}
            notes += [f"{title}: {note}" for note in report["notes"]]
        except MissingSet as error:
            notes.append(f"{title}: {error}")
        except (ValueError, OSError, RuntimeError) as error:  # the last: out of memory
            failures.append(f"{title}, {kind}: {one_line(error)}")
    rows = {name: (*PAPER.get(name, (NAN,) * 4), measured.get(name, NAN)) for name in PAPER | measured}
    print_table("Table 1, px or %", ("M-JEPA", "VICReg", "VICRegL", "MC-JEPA", "ours"), rows)
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
