"""Measures a model: optical flow, segmentation, video objects (Section 4 of MC-JEPA, Table 1), nearest neighbours.

    python evaluate.py flow --model runs/pocket/checkpoint.pt                          # unseen MovingShapes
    python evaluate.py flow --model CHECKPOINT --data-root DATA --benchmark sintel
    python evaluate.py flow --model CHECKPOINT --images a.png b.png                    # pictures of the flow a to b
    python evaluate.py flow --model CHECKPOINT --video clip.mp4                        # a film of its flow
    python evaluate.py flow --model CHECKPOINT --data-root DATA --benchmark kitti2015 --split testing --export SUBMIT
    python evaluate.py segmentation --model CHECKPOINT --data-root DATA --benchmark voc [--finetune]
    python evaluate.py video --model CHECKPOINT --data-root DATA --benchmark davis2017 --export SUBMIT
    python evaluate.py knn --model CHECKPOINT --data-root DATA                         # images in folders by class
    python evaluate.py features --model CHECKPOINT --video clip.mp4                    # a film of its features
    python evaluate.py table1 --model CHECKPOINT --data-root DATA                      # flow, segmentation, video

`--data-root` is the folder of a data set as its archive unpacks, or (not for knn) the folder above it; without it all
but features measure on MovingShapes, where (but for flow) colour identifies nothing. Numbers go to the screen and, with
pictures, to `--output-dir`. The protocols read alike: open the data, run the method on each item, measure it, draw it,
print the table, write the report.

For `video` and `knn`, an encoder's batch norm first takes its statistics from the data set (the first frames of up to
20 videos, or 1,024 training images), for random and trained weights alike: no row gains from having seen such images.
"""

import copy
import hashlib
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate, pairwise, product
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Bool, Float, Int64, Integer, Shaped, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim.swa_utils import update_bn
from torchvision.transforms.v2.functional import resize
from torchvision.utils import flow_to_image, make_grid
from tqdm import tqdm

import mcjepa
from data import Stream, TwoViews, VideoPairs, load_image, make_loader
from engine.checkpoint import as_json, check_same_run, newest_checkpoint, replacing, save_checkpoint, write_json
from engine.faults import check_numbers, one_line, run_command
from engine.log import Log, versions, write_picture
from engine.processes import own_device
from flow import forward_backward_mask, warp
from mcjepa import MCJEPA, EncoderName, ModelConfig, as_batch, load_checkpoint, load_model, pad_to_multiple
from sources import MissingSet, flow_benchmarks, label_sets, read_table
from sources.flow_benchmarks import FlowFiles, FlowPair, known_flow
from sources.label_sets import PALETTE, VOID, ImageClasses, LabelledImages, ObjectVideo
from sources.moving_shapes import MovingShapes, Objects, ShapeImages, ShapeLabels, recoloured_objects

UNSEEN_SEED = 1_618_033_988
"""Seed of the MovingShapes that are measured on. Training draws from its own `--seed`: never give it this one."""
SHAPES_SIZE = 192
"""Height and width of these MovingShapes in pixels, the crop of the pocket preset."""
SHAPES_PAIRS, SHAPES_IMAGES, SHAPES_OBJECTS, SHAPES_VIDEOS, SHAPES_FRAMES = 200, 200, 200, 20, 20
FlowMethod = Callable[[Tensor, Tensor], Tensor]
"""Two images (1, 3, h, w) in [0, 1] to the flow (1, 2, h, w) from the first to the second, in pixels."""
FeatureMethod = Callable[[Tensor], list[Tensor]]
"""An image (1, 3, h, w) in [0, 1] to levels of features, each (d, h / stride, w / stride)."""


# ------------------------------------------------------------------------------------------------------------ metrics


def _errors_and_lengths(
    flow: Float[Tensor, "b 2 h w"], truth: Float[Tensor, "b 2 h w"], valid: Bool[Tensor, "b ..."] | None
) -> list[Float[Tensor, " n"]]:
    """End-point error and length of the true flow, in pixels, at the n pixels that count."""
    counts = known_flow(truth)[:, 0]
    if valid is not None:
        counts = counts & valid.reshape(counts.shape)
    if not counts.any():
        raise ValueError("no pixel with known flow: the error is not defined")
    return [vectors.norm(dim=1)[counts] for vectors in (flow.float() - truth.float(), truth.float())]


def end_point_error(
    flow: Float[Tensor, "b 2 h w"], truth: Float[Tensor, "b 2 h w"], valid: Bool[Tensor, "b ..."] | None = None
) -> Float[Tensor, ""]:
    """Mean distance in pixels between the ends of the estimated and the true flow vectors (EPE).

    Only True pixels of `valid`, `(b, 1, h, w)` or `(b, h, w)`, count, and those of unknown truth (NaN, or beyond 1e9)
    never do; ValueError if none does.
    """
    return _errors_and_lengths(flow, truth, valid)[0].mean()


def f1_all(
    flow: Float[Tensor, "b 2 h w"], truth: Float[Tensor, "b 2 h w"], valid: Bool[Tensor, "b ..."] | None = None
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
    """The mean over classes, but for those that neither occur nor are predicted; ValueError without any pixel."""
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
    masks = torch.stack((annotation, prediction)).cpu().numpy()
    padded = np.pad(masks, ((0, 0), (0, 1), (0, 1)), mode="edge")
    # Pixels that differ from their right, lower, or lower right neighbour, as DAVIS finds contours.
    right, lower, diagonal = padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    truth, guess = ((masks != right) | (masks != lower) | (masks != diagonal)).astype(np.uint8)
    if not truth.any() or not guess.any():
        return float(not truth.any() and not guess.any())
    radius = math.ceil(0.008 * math.hypot(*annotation.shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    near_truth, near_guess = (cv2.dilate(z, (x**2 + y**2 <= radius**2).astype(np.uint8)) for z in (truth, guess))
    precision, recall = (guess & near_truth).sum() / guess.sum(), (truth & near_guess).sum() / truth.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def davis_statistics(values: Sequence[float]) -> dict[str, float]:
    """J or F over the frames of an object, as DAVIS counts: the mean, the recall (share above 0.5) and the decay (mean
    of the first quarter less that of the last; neighbouring quarters share a frame)."""
    borders = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1  # halves are rounded up
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
        rows, columns = slice(top, top + tile), slice(left, left + tile)
        near_rows, near_columns = (slice(max(start - radius, 0), start + tile + radius) for start in (top, left))
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

    model: str = "small"
    """small (trained weights that come with the code), a checkpoint of train.py, or, except for flow, a state dict of
    torchvision's convnext_tiny or resnet50. Baselines: random; flow: zero, dis; video, knn, features: colour."""
    output_dir: Path = Path("runs/evaluation")  # Where numbers and pictures go; files of the same name are replaced.
    encoder: EncoderName = "convnext_tiny"  # The network of --model random.
    seed: int = 0  # Of --model random; in segmentation also of the order of the images and their augmentation.

    def check(self) -> None:
        """ValueError for flags that are out of range, or do not fit together."""
        check_numbers(self, ("steps", "size", "stride", "max_frames"))
        if getattr(self, "benchmark", None) and self.data_root is None:
            raise ValueError("--benchmark needs --data-root: give that too")


@dataclass
class ProtocolConfig(Config):
    """The flags that the protocols share."""

    data_root: Path | None = None  # The folder of a data set, or one that holds it. Without it: MovingShapes.
    pictures: int = 8  # How many pairs, images or videos get a picture at most; they are spread evenly.


def open_model(config: Config) -> tuple[MCJEPA, Config]:
    """The model of --model, in eval mode, and the configuration with its encoder in place of --encoder.

    FileNotFoundError, or ValueError for a file that holds something else.
    """
    if config.model == "random":
        torch.manual_seed(config.seed)
        model = MCJEPA(ModelConfig(encoder=config.encoder), task="mjepa")
    else:
        model = load_model(config.model)
    return model.eval().to(own_device()), replace(config, encoder=model.config.encoder)


def feature_method(config: Config, strides: Sequence[int]) -> tuple[FeatureMethod, MCJEPA | None, Config]:
    """The features of --model at these strides, or "colour", the mean colour of each cell; the rest as `open_model`."""
    if config.model == "colour":
        if not {1, 2, 4, 8, 16, 32, 64}.issuperset(strides):
            raise ValueError(f"--stride {' '.join(map(str, strides))}: choose 1, 2, 4, 8, 16, 32 or 64")
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (mcjepa.IMAGENET_MEAN, mcjepa.IMAGENET_STD))
        return lambda image: [F.avg_pool2d((image - mean) / std, stride)[0] for stride in strides], None, config
    model, config = open_model(config)
    known = model.encoder.strides
    if not set(strides) <= set(known):
        wrong = " ".join(map(str, strides))
        raise ValueError(f"--stride {wrong}: the features have strides {', '.join(map(str, known))}")

    @torch.no_grad()
    def features(image: Float[Tensor, "1 3 h w"]) -> list[Float[Tensor, "d _ _"]]:
        return [level[0] for stride, level in zip(known, model.encode(image), strict=True) if stride in strides]

    return features, model, config


def estimate_batch_norms(model: MCJEPA, batches: Iterable[Shaped[Tensor, "_ 3 _ _"]]) -> None:
    """The statistics of the encoder's batch norms, if it has any, become their means over these batches of images."""
    for norm in model.encoder.modules():
        if isinstance(norm, BatchNorm):
            norm.forward = partial(BatchNorm.forward, norm)  # of this process alone: the others may not measure
    update_bn(((as_batch(batch, model.mean) - model.mean) / model.std for batch in batches), model.encoder)


# ----------------------------------------------------------------------------------------- items, pictures and reports


def readable(read: Callable, items: Sequence, unit: str, pictures: int, notes: list[str]) -> Iterator[tuple[Any, bool]]:
    """What `read` gives for each item, with whether it gets a picture. One that cannot be read becomes a note, so that
    the others are measured; ValueError if none can be read."""
    faults, pictured = [], spread(len(items), pictures)
    for index, item in enumerate(tqdm(items, unit=unit, disable=None)):
        try:
            content = read(item)
        except (ValueError, FileNotFoundError) as error:
            faults.append(one_line(error))
        else:
            yield content, index in pictured
    if faults and len(faults) == len(items):
        raise ValueError(faults[0])
    notes += [f"left out: {fault}" for fault in faults]


def sample(measure: Callable[[int], Any], count: int, most: int = 10) -> Iterator[Any]:
    """What `measure` gives, one by one, for at most so many of the items that can be read, spread evenly."""
    return (content for content, _ in readable(measure, spread(count, most), "sample", 0, []))


def to_uint8(image: Float[Tensor, "*t 3 h w"]) -> UInt8[Tensor, "*t 3 h w"]:
    """An image in [0, 1] as bytes."""
    return (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def resized(image: UInt8[Tensor, "3 h w"], side: int | None, cell: int = 1) -> Float[Tensor, "1 3 _ _"]:
    """An image in [0, 1] with this shorter side, or as large as it is, in whole cells of so many pixels."""
    factor = 1.0 if side is None else side / min(image.shape[1:])
    size = [max(round(length * factor / cell), 1) * cell for length in image.shape[1:]]
    return F.interpolate(image[None].float() / 255, size, mode="bilinear", antialias=True)


def titled_grid(panels: dict[str, UInt8[Tensor, "3 h w"]], columns: int) -> UInt8[Tensor, "3 H W"]:
    """Panels in rows, each below its title, on white."""
    titled = []
    for title, panel in panels.items():
        strip = np.full((14, panel.shape[-1], 3), 255, np.uint8)
        cv2.putText(strip, title, (2, 11), cv2.FONT_HERSHEY_PLAIN, 0.75, (0, 0, 0), 1, cv2.LINE_AA)
        titled.append(torch.cat([torch.from_numpy(strip).permute(2, 0, 1), panel], dim=1))
    return make_grid(torch.stack(titled), nrow=columns, padding=2, pad_value=255)


def overlay(
    image: UInt8[Tensor, "3 h w"], labels: Integer[Tensor, "h w"], colours: UInt8[np.ndarray, "c 3"], hidden: list[int]
) -> UInt8[Tensor, "3 h w"]:
    """Labels over an image, half transparent, in their colours, but for the hidden ones."""
    painted = torch.from_numpy(colours[labels.clamp(max=len(colours) - 1)]).permute(2, 0, 1)
    return torch.where(torch.isin(labels, torch.tensor(hidden)), image, image // 2 + painted // 2)


@contextmanager
def writing_film(path: Path, rate: Fraction) -> Iterator[Callable[[UInt8[Tensor, "3 h w"]], None]]:
    """Yields a function that adds a picture to an H.264 film, which appears at `path` once it is whole.

    The codec takes even sizes: an odd one grows by a row or column. Pictures wider than 3,840 px, which not every
    browser plays, are shrunk.
    """
    import av  # here, so that all else runs without it

    # "file:", since FFmpeg would take a colon in the name for the end of a protocol.
    with replacing(path) as temporary, av.open(f"file:{temporary}", "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate, pix_fmt="yuv420p")

        def write(picture: UInt8[Tensor, "3 h w"]) -> None:
            h, w = picture.shape[1:]
            if w > 3840:
                picture = resize(picture, [round(h * 3840 / w), 3840])
            image = picture.permute(1, 2, 0).numpy()
            image = np.pad(image, [(0, length % 2) for length in image.shape[:2]] + [(0, 0)], mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = image.shape[:2]
            film.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))

        yield write
        film.mux(stream.encode())  # what the codec still holds


def open_clip(path: Path, max_frames: int | None) -> tuple[VideoPairs, int, Fraction]:
    """The pairs of frames of a video file or a folder of frames, how many frames to take, and the rate (folder: 25)."""
    pairs, rate = VideoPairs(path), Fraction(25)
    if len(pairs.clips) > 1:
        raise ValueError(f"{path}: holds {len(pairs.clips)} clips; name one of them")
    rate = getattr(pairs.clips[0].frames, "rate", None) or rate  # that of a video file
    return pairs, max(min(len(pairs) + 1, max_frames or math.inf), 2), rate


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers from 0 to count - 1, evenly spread."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def method_name(model: str) -> str:
    """What files of a method are named after, so that none replaces another's: the baseline, or FOLDER_CHECKPOINT."""
    path = Path(model).resolve()
    return f"{path.parent.name}_{path.stem}" if path.is_file() else model


def print_table(title: str, columns: Sequence[str], rows: dict[str, Sequence[float]]) -> None:
    """Prints numbers with two digits below their columns; NaN as "-"."""
    lines = [[title, *columns]]
    lines += [[name, *("-" if math.isnan(x) else f"{x:.2f}" for x in cells)] for name, cells in rows.items()]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    print()
    for name, *cells in lines:
        print(f"{name:{first}}" + "".join(f"{text:>{width + 2}}" for text, width in zip(cells, widths, strict=True)))


def write_report(config: Config, name: str, report: dict) -> dict:
    """Prints the notes of a report, writes it as NAME.json with settings and versions, and returns that."""
    print("".join(f"note: {note}\n" for note in report["notes"]) + f"numbers and pictures: {config.output_dir}")
    report = {"settings": as_json(config), "versions": versions()} | report
    write_json(config.output_dir / f"{name}.json", report)
    return report


# ------------------------------------------------------------------------------------------------------- optical flow


@dataclass
class FlowConfig(ProtocolConfig):
    """Optical flow against ground truth, or pictures of it where there is none."""

    benchmark: Literal["sintel", "kitti2012", "kitti2015", "middlebury", "chairs", "things", "hd1k"] | None = None
    """Which of the benchmarks in --data-root; may be left out where there is only one."""
    output_dir: Path = Path("runs/flow")  # Where numbers and pictures go.
    split: Literal["training", "testing"] = "training"  # testing: whose truth is secret (Sintel, KITTI); for --export.
    images: tuple[Path, Path] | None = None  # Two images instead: writes the flow from the first to the second.
    video: Path | None = None  # A video file or a folder of frames instead: writes a film of frames and flow.
    max_frames: int | None = None  # Only the first frames of the video.
    export: Path | None = None
    """A folder for the flow of every pair as the benchmark's server takes it, or of every frame of the video (.flo)."""
    occlusion: bool = False  # With --video, adds NAME_occlusion.png to --export, white where a pixel is hidden next.


def shapes_pair(index: int, size: tuple[int, int]) -> FlowPair:
    """A pair of unseen MovingShapes; its flow is known everywhere, also where the second frame hides the point."""
    item = MovingShapes(index + 1, size, frames=2, seed=UNSEEN_SEED)[index]
    first, second, truth = item["images"][:1], item["images"][1:], item["flow_forward"]
    return FlowPair(f"shapes_{index:04d}", "", first, second, truth, {"all": known_flow(truth)})


def model_flow(model: MCJEPA) -> FlowMethod:
    """A model as a method: its flow comes back to the CPU, wherever its parameters are."""
    return lambda image_1, image_2: model.estimate_flow(image_1, image_2).cpu()


def dis_flow(image_1: Float[Tensor, "1 3 h w"], image_2: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 2 h w"]:
    """OpenCV's DIS (Kroeger et al. 2016) on 8-bit grey images; it learns nothing.

    Preset "medium": on four Middlebury scenes it errs by 0.39 px, OpenCV's default "fast" by 0.60 px. OpenCV crashes on
    sides below 16 px, so those are padded with the nearest pixels.
    """
    h, w = image_1.shape[2:]
    images = F.pad(torch.cat((image_1, image_2)), (0, max(16 - w, 0), 0, max(16 - h, 0)), mode="replicate")
    grey = [cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY) for image in to_uint8(images)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    return torch.from_numpy(flow).permute(2, 0, 1)[None, :, :h, :w]


BASELINES: dict[str, FlowMethod] = {"zero": lambda image_1, image_2: torch.zeros_like(image_1[:, :2]), "dis": dis_flow}
"""What every flow is compared with: nothing moves, and a classical method."""


def run_flow(config: tyro.conf.OmitArgPrefixes[FlowConfig]) -> dict:
    """Optical flow: end-point error and F1-all on ground truth, or pictures of two images or a video."""
    config.check()
    testing = config.split == "testing"
    if sum(source is not None for source in (config.data_root, config.images, config.video)) > 1:
        raise ValueError("--data-root, --images and --video exclude each other: give one of them")
    if testing and not (config.data_root and config.export):
        raise ValueError("--split testing, whose truth is secret, needs --data-root and --export FOLDER")
    if config.export and not (config.data_root or config.video):
        raise ValueError("--export needs --data-root or --video; two --images write flow.flo anyway")
    if config.occlusion and not (config.video and config.export):
        raise ValueError("--occlusion writes its masks beside the flow of a video: give --video and --export FOLDER")
    label = config.model if config.model in (*BASELINES, "random") else "ours"
    method = BASELINES.get(config.model)
    if method is None:
        model, config = open_model(config)
        method = model_flow(model)
    if config.images:
        return flow_of_images(method, config)
    if config.video:
        return flow_of_video({label: method, "dis": dis_flow}, config)
    benchmark, pairs, notes = "shapes", range(SHAPES_PAIRS), []
    read = partial(shapes_pair, size=(SHAPES_SIZE, SHAPES_SIZE))
    if config.data_root is not None:
        benchmark, pairs, notes = flow_benchmarks.find_benchmark(config.data_root, config.benchmark, config.split)
        read = flow_benchmarks.read_pair
    methods, entries = {label: method} if testing else BASELINES | {label: method}, []
    for pair, pictured in readable(read, pairs, "pair", config.pictures, notes):
        flows, entry = measure_pair(pair, methods)
        entries.append(entry)
        if pictured:
            draw_pair(config.output_dir, pair, flows[label])
        if config.export:
            export_flow(config.export / flow_benchmarks.submission_name(benchmark, pair), flows[label])
    groups, table1 = {}, {}
    for group in dict.fromkeys(entry["group"] for entry in entries):
        own = [entry for entry in entries if entry["group"] == group]
        rows = groups[group or "all"] = {name: mean_errors(own, name) for name in methods}
        if not testing:
            table1[f"{group} EPE".strip()] = rows[label]["per_image"]["epe"]["all"]
            print_errors(group or "all", rows)
    report = {"data": benchmark, "label": label, "groups": groups, "notes": notes, "scenes": entries, "table1": table1}
    return write_report(config, "flow", report)


def measure_pair(
    pair: FlowPair, methods: dict[str, FlowMethod]
) -> tuple[dict[str, Float[Tensor, "1 2 h w"]], dict[str, Any]]:
    """The flow of each method, and the pair's entry in flow.json: `pixels` of each region, and for each method `epe` in
    pixels and `f1` in [0, 1] of each region, and its `seconds`."""
    regions = {name: region for name, region in pair.regions.items() if region.any()}
    pixels = {name: int(region.sum()) for name, region in regions.items()}
    flows, entry = {}, {"name": pair.name, "group": pair.group, "pixels": pixels}
    for name, method in methods.items():
        start = perf_counter()
        flows[name] = method(pair.image_1, pair.image_2)
        entry[name] = {"seconds": perf_counter() - start}
        for metric, function in (("epe", end_point_error), ("f1", f1_all)):
            entry[name][metric] = {key: function(flows[name], pair.flow, mask).item() for key, mask in regions.items()}
    return flows, entry


def mean_errors(entries: list[dict], method: str) -> dict:
    """A method over many pairs: `epe` and `f1` of each region as the mean over images (`per_image`) and over pixels
    (`per_pixel`, as the development kits of KITTI 2015 and Sintel count), and the median of the seconds."""
    means = {"per_pixel": {"epe": {}, "f1": {}}, "per_image": {"epe": {}, "f1": {}}}
    for region, metric in product(flow_benchmarks.REGIONS, ("epe", "f1")):
        present = [entry for entry in entries if region in entry["pixels"]]
        if present:
            values, pixels = [e[method][metric][region] for e in present], [e["pixels"][region] for e in present]
            means["per_pixel"][metric][region] = float(np.average(values, weights=pixels))
            means["per_image"][metric][region] = float(np.mean(values))
    return means | {"seconds": float(np.median([entry[method]["seconds"] for entry in entries]))}


def print_errors(group: str, rows: dict[str, dict]) -> None:
    """A table of a group of pairs for each mean: EPE in pixels, F1 in percent, time of a pair in milliseconds."""
    for mean in ("per_pixel", "per_image"):
        columns = [f"{metric} {region}" for metric, region in product(("EPE", "F1"), rows["zero"][mean]["epe"])]
        table = {
            name: [*row[mean]["epe"].values(), *(100 * f1 for f1 in row[mean]["f1"].values()), 1000 * row["seconds"]]
            for name, row in rows.items()
        }
        print_table(f"{group}, {mean.replace('_', ' ')} [px, %, ms]", [*columns, "time"], table)


def flow_errors_on_shapes(model: MCJEPA, count: int, size: tuple[int, int]) -> dict[str, float]:
    """The `epe` and `f1` (in [0, 1]) of a model in eval mode on unseen MovingShapes, and zero flow's `epe_zero`."""
    methods = {"ours": model_flow(model), "zero": BASELINES["zero"]}
    entries = [measure_pair(shapes_pair(index, size), methods)[1] for index in range(count)]
    ours, zero = (mean_errors(entries, name)["per_image"] for name in methods)
    return {"epe": ours["epe"]["all"], "epe_zero": zero["epe"]["all"], "f1": ours["f1"]["all"]}


def colour_scale(flow: Float[Tensor, "2 h w"]) -> float:
    """The length in pixels that gets the full colour: the 99th percentile, which ignores outliers, and at least 1."""
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


def flow_figure(
    image_1: Float[Tensor, "3 h w"],
    image_2: Float[Tensor, "3 h w"],
    flow: Float[Tensor, "2 h w"],
    truth: Float[Tensor, "2 h w"] | None = None,
) -> UInt8[Tensor, "3 H W"]:
    """One picture to judge a flow by eye: from image 1 to image 2, in pixels, images in [0, 1].

    It shows both frames, the flow, frame 2 warped to frame 1 by it, and the difference between that and frame 1, which
    is black for a perfect flow. With the truth it also shows the truth's colours on the same scale, black where it is
    unknown, and the end-point error. The last panel is the colour wheel: a point has the colour of the flow from the
    wheel's centre to it, and the titles say how long the flow at the rim is.
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


def draw_pair(folder: Path, pair: FlowPair, flow: Float[Tensor, "1 2 h w"]) -> None:
    """Writes the figure of a pair: FOLDER/pictures/NAME.png."""
    truth = None if pair.flow is None else pair.flow[0]
    name = "_".join(filter(None, (pair.group, pair.name))).replace("/", "_")
    figure = flow_figure(pair.image_1[0], pair.image_2[0], flow[0], truth)
    write_picture(folder / "pictures" / f"{name}.png", figure)


def export_flow(path: Path, flow: Float[Tensor, "1 2 h w"]) -> None:
    """Writes a flow as .flo, or as KITTI's .png, whole or not at all."""
    with replacing(path) as temporary:
        flow_benchmarks.write_flow(temporary, flow)


def flow_of_images(method: FlowMethod, config: FlowConfig) -> dict:
    """Writes flow.flo, its colours (flow.png), and a figure of them with the images."""
    pair = flow_benchmarks.read_pair(FlowFiles("figure", "", *config.images, None))
    flow, folder = method(pair.image_1, pair.image_2), config.output_dir
    export_flow(folder / "flow.flo", flow)
    write_picture(folder / "flow.png", flow_colours(flow[0], colour_scale(flow[0])))
    draw_pair(folder, pair, flow)
    print(f"flow of {flow.norm(dim=1).mean():.2f} px on average, {flow.norm(dim=1).max():.2f} px at most: {folder}")
    return {}


def flow_of_video(methods: dict[str, FlowMethod], config: FlowConfig) -> dict:
    """Writes a film, each frame beside its flow to the next by each method and their colour key; and some figures."""
    clip, frames, rate = open_clip(config.video, config.max_frames)
    name, label = f"{config.video.stem}_flow_{method_name(config.model)}", next(iter(methods))
    count, notes = frames - 1, []

    def measure(index: int) -> tuple[FlowPair, dict[str, Float[Tensor, "1 2 h w"]]]:
        pair = FlowPair(f"{index:05d}", name, *(image[None].float() / 255 for image in clip[index]), None, {})
        return pair, measure_pair(pair, methods)[0]

    scales = [colour_scale(flow[0]) for _, flows in sample(measure, count) for flow in flows.values()]
    scale = max(5.0, float(np.quantile(scales, 0.9)))
    with writing_film(config.output_dir / f"{name}.mp4", rate) as write:
        for (pair, flows), pictured in readable(measure, range(count), "frame", config.pictures, notes):
            panels = {"frame": to_uint8(pair.image_1[0])}
            panels |= {f"{method} ({scale:.1f} px)": flow_colours(flow[0], scale) for method, flow in flows.items()}
            panels["key"] = colour_wheel(*pair.image_1.shape[2:])
            write(titled_grid(panels, columns=len(panels)))
            if pictured:
                draw_pair(config.output_dir, pair, flows[label])
            if config.export:
                export_flow(config.export / f"{pair.name}.flo", flows[label])
            if config.occlusion:
                hidden = ~forward_backward_mask(flows[label], methods[label](pair.image_2, pair.image_1))[0]
                write_picture(config.export / f"{pair.name}_occlusion.png", 255 * hidden.byte().expand(3, -1, -1))
    return write_report(config, name, {"notes": notes, "frames": frames, "scale": scale})


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
            total += F.adaptive_avg_pool2d(scores, size) if stride < 4 else F.interpolate(scores, size, mode="bilinear")
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


class Recipe(NamedTuple):
    """How a linear head is trained, alone or with the encoder: by AdamW, with weight decay 0.05 and a poly schedule of
    power 1. The defaults are those of VICRegL and iBOT."""

    steps: int = 40_000
    warmup: int = 1_500
    batch: int = 16
    crop: int = 512
    size: int = 512  # the images' shorter side in pixels
    learning_rate: float = 1e-4
    encoder_learning_rate: float = 1e-4


SMALL = Recipe(steps=400, warmup=40, batch=8, crop=352, size=360, learning_rate=5e-3, encoder_learning_rate=2e-4)
"""For small data: minutes on two CPU cores (ours)."""
RECIPES = {
    "voc": Recipe(),
    "ade20k": Recipe(steps=160_000),
    "cityscapes": Recipe(size=1024),
    "camvid": SMALL,
    "shapes": SMALL._replace(steps=300, warmup=30, crop=SHAPES_SIZE, size=SHAPES_SIZE, learning_rate=1e-2),
}


@dataclass
class SegmentationConfig(ProtocolConfig):
    """Semantic segmentation by a linear head on the features: mean intersection over union (mIoU)."""

    benchmark: Literal["voc", "cityscapes", "ade20k", "camvid"] | None = None
    """Which of the data sets in --data-root; may be left out where there is only one."""
    output_dir: Path = Path("runs/segmentation")  # Where the head, numbers and pictures go.
    finetune: bool = False  # The encoder learns with the head; by default it is frozen.
    steps: int | None = None
    """Of training, for a quick look (voc, cityscapes 40,000; ade20k 160,000; camvid 400; MovingShapes 300)."""
    workers: int = 0  # Processes that load data; any number gives the same result.


def run_segmentation(config: tyro.conf.OmitArgPrefixes[SegmentationConfig]) -> dict:
    """Semantic segmentation with frozen or fine-tuned features: trains a linear head, measures mIoU, draws pictures.

    A training that was stopped continues from its checkpoint in --output-dir.
    """
    config.check()
    name, size = "shapes", (SHAPES_SIZE, SHAPES_SIZE)
    training, validation = ShapeLabels(1_000_000, size, config.seed), ShapeLabels(SHAPES_IMAGES, size, UNSEEN_SEED)
    if config.data_root is not None:
        name, training = label_sets.find_labels(config.data_root, config.benchmark, "train")
        _, validation = label_sets.find_labels(config.data_root, name, "val")
        config = replace(config, benchmark=name)
    recipe = RECIPES[name]
    if config.steps is not None:  # a quick look would end before the learning rate is full
        recipe = recipe._replace(steps=config.steps, warmup=min(recipe.warmup, config.steps // 10))
    model, config = open_model(config)
    segmenter = Segmenter(model, len(training.classes), config.finetune).to(own_device())
    settings, faults = train_segmenter(segmenter, training, recipe, config)
    notes, segmenter = [*training.notes, *faults], segmenter.eval()
    confusion = torch.zeros(len(training.classes), len(training.classes), dtype=torch.int64)
    images = readable(validation.__getitem__, range(len(validation)), "image", config.pictures, notes)
    for number, ((image, truth), pictured) in enumerate(images):
        prediction = predict_labels(segmenter, image, recipe)
        confusion += count_confusion(truth, prediction, len(confusion))
        if pictured:
            labels = {"truth": truth, "prediction": prediction}
            panels = {title: overlay(image, each, validation.colours, [VOID]) for title, each in labels.items()}
            figure = titled_grid({"image": image} | panels, columns=3)
            write_picture(config.output_dir / "pictures" / f"image_{number:04d}.png", figure)
    kind, pixels = ("tuned" if config.finetune else "frozen"), confusion.sum(dim=1)
    shares, accuracy = (pixels / pixels.sum()).tolist(), (confusion.diag().sum() / confusion.sum()).item()
    means = {"miou": mean_iou(confusion), "pixel_accuracy": accuracy}
    # Where one class is given to all pixels, its IoU is its share of them, and that of the others is 0.
    largest = {"miou": max(shares) / (pixels > 0).sum().item(), "pixel_accuracy": max(shares)}
    iou = dict(zip(training.classes, class_iou(confusion).tolist(), strict=True))
    rows = {label: (100 * iou[label], 100 * share) for label, share in zip(training.classes, shares, strict=True)}
    print_table(f"{name}, {kind} features", ("IoU [%]", "pixels [%]"), rows)
    for label, each in (("", means), ("the largest class everywhere: ", largest)):
        print(f"{label}mIoU {100 * each['miou']:.2f}%, pixel accuracy {100 * each['pixel_accuracy']:.2f}%")
    report = {"data": name, "images": number + 1} | means | {"largest_class": largest}
    report["iou"] = {label: None if math.isnan(value) else value for label, value in iou.items()}
    report |= {"confusion": confusion.tolist(), "notes": notes, "settings": settings}
    return write_report(config, "segmentation", report | {"table1": {kind: 100 * report["miou"]}})


def train_segmenter(
    segmenter: Segmenter, training: LabelledImages | ShapeLabels, recipe: Recipe, config: SegmentationConfig
) -> tuple[dict, list[str]]:
    """Trains the head, and the encoder with --finetune, from the checkpoint in --output-dir or from the beginning.

    Returns the settings of the run, and notes on unreadable files. ValueError if the checkpoint belongs to others, or
    the loss is not finite.
    """
    settings = as_json(config) | recipe._asdict() | {"training_images": len(training)}
    weights = Path(mcjepa.SHIPPED.get(config.model, config.model))
    if weights.is_file():
        settings["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
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
            path.replace(path.with_name("damaged-checkpoint.pt"))
        may_differ = ("output_dir", "workers", "pictures", "data_root", "model")  # the weights say which model it is
        check_same_run(path, checkpoint["config"], settings, may_differ)
        learns.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    transform, stream = label_sets.LabelAugmentation(recipe.crop, recipe.size), Stream(config.seed, start_step=start)
    # The next image takes the place of an unreadable one, as often as need be.
    loader = make_loader(training, transform, recipe.batch, stream, config.workers, allowed_bad_files=len(training))
    segmenter.train()
    notes: dict[str, None] = {}
    with closing(Log(config.output_dir, start, recipe.steps)) as log:
        for step, ((images, labels), faults) in zip(range(start, recipe.steps), loader, strict=False):
            notes |= dict.fromkeys(f"not trained on: {fault}" for fault in faults)
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
    return settings, list(notes)


@torch.no_grad()
def predict_labels(segmenter: Segmenter, image: UInt8[Tensor, "3 h w"], recipe: Recipe) -> Int64[Tensor, "h w"]:
    """The class of each pixel of an image, which the segmenter sees with the recipe's shorter side, in windows."""
    shown = resized(image.to(own_device()), recipe.size)
    scores = sliding_scores(segmenter, shown, recipe.crop, recipe.crop * 2 // 3)
    if not scores.isfinite().all():
        raise ValueError("the scores are not finite; check the weights of --model")
    return F.interpolate(scores, image.shape[1:], mode="bilinear").argmax(dim=1)[0].cpu()


# ----------------------------------------------------------------------------------------- video object segmentation


@dataclass
class VideoConfig(ProtocolConfig):
    """Video object segmentation: the masks of the first frame, propagated by feature similarity (J and F)."""

    benchmark: Literal["davis2016", "davis2017"] | None = None
    """davis2016 merges all objects into one and uses its own list of sequences. By default both are as in the files."""
    output_dir: Path = Path("runs/video")  # Where numbers and pictures go.
    split: str = "val"  # Which list of sequences (train, val, test-dev).
    export: Path | None = None  # A folder for the masks, SEQUENCE/00000.png, as the benchmark's server takes them.
    stride: tuple[int, ...] = (8,)  # The level of the features; several are put side by side, at the finest stride.
    size: int | None = None  # Resizes the frames to this shorter side (480; MovingShapes: as they are).
    centre: Literal["none", "mean"] = "none"  # mean: each channel less its mean over the first frame.
    propagation: tuple[int, int, int, float] = (7, 12, 5, 0.1)
    """How many last frames give labels besides the first, from how many cells around, the number of most similar cells,
    and the temperature: their weight is exp(cosine / temperature) (DINO)."""


def shapes_videos() -> Iterator[ObjectVideo]:
    """Unseen MovingShapes as videos of 4 to 6 shapes and a ground of one colour, which drifts from frame to frame."""
    size, names = (SHAPES_SIZE, SHAPES_SIZE), [f"{t:05d}" for t in range(SHAPES_FRAMES)]
    options = {"min_shapes": 4, "max_shapes": 6, "motion": (0.02, 0.35), "colouring": "alike"}
    shapes = MovingShapes(SHAPES_VIDEOS, size, SHAPES_FRAMES, UNSEEN_SEED, **options)
    for index, item in enumerate(shapes):
        images, masks, back = to_uint8(item["images"]), item["instances"].to(torch.uint8), item["flow_backward"]
        objects = [number for number in masks[0].unique().tolist() if number]
        flow = lambda t, back=back: back[t - 1][None]  # noqa: E731
        yield ObjectVideo(f"shapes_{index:04d}", objects, images.__getitem__, masks.__getitem__, names, flow)


def first_labels(video: ObjectVideo) -> tuple[UInt8[Tensor, " c"], Float[Tensor, "c h w"]]:
    """The numbers of the ground and of the objects, and the first mask as one-hot labels; void is ground here."""
    first, numbers = video.masks(0), torch.tensor([0, *video.objects], dtype=torch.uint8)
    one_hot = (first[None] == numbers[:, None, None]).float()
    one_hot[0] = 1 - one_hot[1:].sum(dim=0)
    return numbers, one_hot


def follow_objects(video: ObjectVideo, features: FeatureMethod, config: VideoConfig) -> Iterator[UInt8[Tensor, "h w"]]:
    """The predicted mask of each frame, the first being the true one (DINO's protocol).

    Labels are propagated at the size of the features; the soft labels of the first frame and of the last few are kept.
    For the mask they are enlarged, each object's are stretched to [0, 1], and the largest wins.
    """
    numbers, one_hot = first_labels(video)
    (frames, *options), coarsest = config.propagation, max(config.stride)
    memory: deque = deque(maxlen=frames)
    for index in range(video.length):
        levels = features(resized(video.frames(index), config.size, coarsest))
        if index == 0:
            means = [level.mean(dim=(1, 2), keepdim=True) if config.centre == "mean" else 0.0 for level in levels]
        levels = [level - mean for level, mean in zip(levels, means, strict=True)]
        if len(levels) > 1:  # as one at the size of the finest, in which each has length 1 at each position
            size = max(level.shape[1:] for level in levels)
            levels = [F.interpolate(F.normalize(level[None]), size, mode="bilinear")[0] for level in levels]
        now = torch.cat(levels)
        if index == 0:
            beginning = (now, F.interpolate(one_hot[None], now.shape[1:], mode="nearest-exact")[0].to(now.device))
            yield numbers[one_hot.argmax(dim=0)]
            continue
        context, labels = (torch.stack(x) for x in zip(beginning, *memory, strict=True))
        soft = propagate_labels(now, context, labels, *options)
        if not soft.isfinite().all():
            raise ValueError(f"{video.name}: the features are not finite (or the temperature is too small)")
        memory.append((now, soft))
        soft = F.interpolate(soft[None].cpu(), one_hot.shape[1:], mode="bilinear")[0]
        least, most = soft.amin(dim=(1, 2), keepdim=True), soft.amax(dim=(1, 2), keepdim=True)
        # An object that is everywhere, or nowhere, has nothing to stretch.
        yield numbers[torch.where(most - least > 1e-6, (soft - least) / (most - least), soft).argmax(dim=0)]


def trivial_masks(video: ObjectVideo, model: MCJEPA | None) -> dict[str, list[UInt8[Tensor, "h w"]]]:
    """Masks without features, by name: copies of the first; and the one before, as soft labels, warped by a flow."""
    numbers, one_hot = first_labels(video)
    methods, flows = {"dis": dis_flow}, {"the true flow": video.flow} if video.flow else {}
    if model and model.estimator is not None:
        methods["our flow"] = model_flow(model)
    for name, method in methods.items():  # from frame t to the one before, where the mask is sampled
        flows[name] = lambda t, method=method: method(*(video.frames(at)[None].float() / 255 for at in (t, t - 1)))
    masks = {"first mask copied": [video.masks(0)] * video.length}
    for name, flow in flows.items():
        warped = accumulate(range(1, video.length), lambda x, t, flow=flow: warp(x, flow(t)), initial=one_hot[None])
        masks[f"warp by {name}"] = [numbers[labels[0].argmax(dim=0)] for labels in warped]
    return masks


def run_video(config: tyro.conf.OmitArgPrefixes[VideoConfig]) -> dict:
    """Video object segmentation by label propagation on DAVIS or MovingShapes: J, F, masks and pictures."""
    config.check()
    if 0 in config.propagation[2:]:
        raise ValueError("--propagation: the number of similar cells and the temperature must be above 0")
    benchmark, found, notes = "shapes", None, []
    if config.data_root is not None:
        year = config.benchmark.removeprefix("davis") if config.benchmark else None
        found, notes = label_sets.find_masked_videos(config.data_root, config.split, year)
        benchmark, config = config.benchmark or "DAVIS", replace(config, size=config.size or 480)
    features, model, config = feature_method(config, config.stride)
    found, flow_model = found or list(shapes_videos()), copy.deepcopy(model)  # flow keeps the batch norms' averages
    if model:
        first = lambda number: resized(found[number].frames(0), config.size, max(config.stride))  # noqa: E731
        estimate_batch_norms(model, sample(first, len(found), 20))
    measure, sequences = lambda video: (video, *measure_video(video, features, flow_model, config)), {}
    for (video, masks, entry), pictured in readable(measure, found, "sequence", config.pictures, notes):
        sequences[video.name] = entry
        if entry["note"]:
            notes.append(f"{video.name}: {entry['note']}")
        if pictured:
            write_picture(config.output_dir / "pictures" / f"{video.name}.png", objects_figure(video, masks))
        if config.export:
            export_masks(video, masks, config.export / video.name)
    rows = {name: mean_over_objects([entry["objects"]]) for name, entry in sequences.items()}
    rows["mean over objects"] = mean = mean_over_objects([entry["objects"] for entry in sequences.values()])
    names = next(iter(sequences.values()))["baselines"]
    baselines = {n: mean_over_objects([entry["baselines"][n] for entry in sequences.values()]) for n in names}
    rows |= baselines
    columns = ("J&F", "J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay")
    print_table("[%]", columns, {name: [100 * row[key] for key in columns] for name, row in rows.items() if row})
    report = {"data": benchmark, "mean": mean, "baselines": baselines, "notes": notes, "sequences": sequences}
    report["table1"] = {"J&F": 100 * mean["J&F"]} if mean else {}
    return write_report(config, "video", report)


def measure_video(
    video: ObjectVideo, features: FeatureMethod, model: MCJEPA | None, config: VideoConfig
) -> tuple[list[UInt8[Tensor, "h w"]], dict[str, Any]]:
    """The predicted masks, and the video's entry in video.json: J and F of its `objects`, also by the `baselines`, the
    `seconds` of a frame, and a `note` on frames that are not measured."""
    start = perf_counter()
    masks = list(follow_objects(video, features, config))
    entry = {"frames": video.length, "seconds": (perf_counter() - start) / video.length}
    baselines = {name: measure_objects(video, each) for name, each in trivial_masks(video, model).items()}
    entry |= {"objects": measure_objects(video, masks), "baselines": baselines}
    without = video.length - 2 - max((len(each["J"]["frames"]) for each in entry["objects"].values()), default=0)
    return masks, entry | {"note": f"frames without a mask: {without}" if without else ""}


def measure_objects(video: ObjectVideo, predictions: Sequence[UInt8[Tensor, "h w"]]) -> dict[int, dict[str, dict]]:
    """J and F of each object in each frame but the first and the last, with their statistics.

    Frames without a mask are left out, and so are void pixels and objects that the first mask does not have.
    """
    objects = {number: {"J": [], "F": []} for number in video.objects}
    for index in range(1, video.length - 1):
        truth = video.masks(index)
        if truth is None or (truth == VOID).all():
            continue
        for number, values in objects.items():
            annotation, prediction = ((mask == number) & (truth != VOID) for mask in (truth, predictions[index]))
            values["J"].append(region_similarity(annotation, prediction))
            values["F"].append(contour_accuracy(annotation, prediction))
    return {
        number: {name: davis_statistics(frames) | {"frames": frames} for name, frames in values.items()}
        for number, values in objects.items()
        if values["J"]
    }


def mean_over_objects(sequences: Sequence[dict[int, dict[str, dict]]]) -> dict[str, float]:
    """The mean over the objects of all sequences, each counted alike, as DAVIS does; empty where there are none."""
    objects = [each for sequence in sequences for each in sequence.values()]
    if not objects:
        return {}
    kinds = product(("J", "F"), ("mean", "recall", "decay"))
    means = {f"{name}_{kind}": float(np.mean([each[name][kind] for each in objects])) for name, kind in kinds}
    return {"J&F": (means["J_mean"] + means["F_mean"]) / 2} | means


def objects_figure(video: ObjectVideo, predictions: Sequence[UInt8[Tensor, "h w"]]) -> UInt8[Tensor, "3 H W"]:
    """Frames 1, 10, 25 and 50 (or the last) with the true masks, and below with ours (as the paper's Figure 4)."""
    panels, shown = {}, sorted({min(number, video.length) - 1 for number in (1, 10, 25, 50)})
    for (title, masks), index in product({"truth": video.masks, "ours": predictions.__getitem__}.items(), shown):
        frame, mask = video.frames(index), masks(index)
        panels[f"t = {index + 1}, {title}"] = frame if mask is None else overlay(frame, mask, PALETTE, [0, VOID])
    return titled_grid(panels, columns=len(shown))


def export_masks(video: ObjectVideo, predictions: Sequence[UInt8[Tensor, "h w"]], folder: Path) -> None:
    """Palette PNGs in DAVIS's colours, each whole or not at all."""
    for name, mask in zip(video.frame_names, predictions, strict=True):
        image = Image.fromarray(mask.numpy())
        image.putpalette(PALETTE.tobytes())
        with replacing(folder / f"{name}.png") as temporary:
            image.save(temporary, format="PNG")


# --------------------------------------------------------------------------------------------------- nearest neighbours


@dataclass
class KnnConfig(Config):
    """Images by their nearest neighbours and by ridge regression; without --data-root, shapes that are recoloured."""

    data_root: Path | None = None  # A folder with train/CLASS/a.jpg and val/ or test/. Without it: MovingShapes.
    output_dir: Path = Path("runs/knn")  # Where the numbers go.
    size: int | None = None  # Resizes the images to this height and width (48 for CIFAR-10's); by default as they are.
    images: int = 10_000  # How many of train/ are taken at most, evenly spread; of val/ or test/ a fifth of it.


@torch.no_grad()
def pooled_levels(
    model: MCJEPA | None, images: UInt8[Tensor, "n 3 h w"], masks: Bool[Tensor, "n h w"]
) -> dict[str, Float[Tensor, "n _"]]:
    """The features of each level, averaged over a mask of each image; without a model those of one level, "colour": the
    mean and the deviation of each channel."""
    pooled = defaultdict(list)
    for batch, mask in zip(images.split(64), masks.split(64), strict=True):
        levels = {"colour": torch.cat((batch / 255, (batch / 255).square()), dim=1)}
        if model:
            levels = {f"stride {s}": x for s, x in zip(model.encoder.strides, model.encode(batch), strict=True)}
        for name, level in levels.items():
            weights = F.adaptive_avg_pool2d(mask[:, None].to(level), level.shape[2:])
            mean = ((level * weights).sum(dim=(2, 3)) / weights.sum(dim=(2, 3))).cpu()
            if not model:
                mean = torch.cat((mean[:, :3], (mean[:, 3:] - mean[:, :3].square()).clamp(min=0).sqrt()), dim=1)
            pooled[name].append(mean)
    return {name: torch.cat(each) for name, each in pooled.items()}


def compared_levels(
    model: MCJEPA | None, images: Sequence[UInt8[Tensor, "_ 3 _ _"]], masks: Sequence[Bool[Tensor, "_ _ _"]] = ()
) -> dict[str, list[Float[Tensor, "_ d"]]]:
    """The pooled features of known images and of queries, by level: less the mean of the known, over their deviation.

    Without masks they are averaged over the whole images.
    Batch norm takes its statistics from the known images, in a copy of the model.
    """
    if model:
        model = copy.deepcopy(model).eval()
        shown = images[0][spread(len(images[0]), 1024)]
        estimate_batch_norms(model, shown.tensor_split(-(-len(shown) // 64)))  # equal parts: none has a single image
    masks = masks or [torch.ones_like(each[:, 0], dtype=torch.bool) for each in images]
    known, queries = (pooled_levels(model, *each) for each in zip(images, masks, strict=True))
    moments = {name: torch.std_mean(each, dim=0) for name, each in known.items()}
    return {n: [(x[n] - mean) / std.clamp(min=1e-6) for x in (known, queries)] for n, (std, mean) in moments.items()}


def nearest_neighbours(
    known: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], queries: Float[Tensor, "m d"], k: int = 20
) -> Int64[Tensor, " m"]:
    """The class of each query by its k most similar known samples, which weigh exp(cosine / 0.1)."""
    cosines, places = (F.normalize(queries, dim=1) @ F.normalize(known, dim=1).T).topk(min(k, len(known)), dim=1)
    votes = torch.zeros(len(queries), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[places], (cosines / 0.1).exp()).argmax(dim=1)


def ridge(
    known: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], queries: Float[Tensor, "m d"], strength: float = 100.0
) -> Int64[Tensor, " m"]:
    """The class of each query by ridge regression on one-hot labels less their mean, in closed form."""
    known, targets = known.double(), F.one_hot(labels).double()
    gram, mean = known.T @ known + strength * torch.eye(known.shape[1]), targets.mean(dim=0)
    return (queries.double() @ torch.linalg.solve(gram, known.T @ (targets - mean)) + mean).argmax(dim=1)


def classify_images(model: MCJEPA | None, known: ImageClasses, queries: ImageClasses) -> dict[str, dict[str, float]]:
    """The share of queries, in [0, 1], that each level gives its class, by neighbours and by ridge regression."""
    scores = defaultdict(dict)
    for level, (a, b) in compared_levels(model, (known.images, queries.images)).items():
        for name, method in (("k-NN", nearest_neighbours), ("ridge", ridge)):
            scores[level][name] = (method(a, known.labels, b) == queries.labels).float().mean().item()
    return scores


def search_among_shapes(model: MCJEPA | None, objects: Objects) -> dict[str, dict[str, float]]:
    """How often, in [0, 1], the object of the first frame that is most similar to one of the last is the same, and how
    often the most similar other one has its texture or its shape; by each level."""
    scores = {}
    for level, (known, queries) in compared_levels(model, [*objects.images], [*objects.masks]).items():
        cosines = F.normalize(queries) @ F.normalize(known).T
        right = {"object": cosines.argmax(dim=1) == torch.arange(len(known))}
        other = cosines.fill_diagonal_(-torch.inf).argmax(dim=1)
        right |= {"texture": objects.textures[other] == objects.textures}
        right |= {"shape": objects.classes[other] == objects.classes}
        scores[level] = {kind: each.float().mean().item() for kind, each in right.items()}
    return scores


def find_views(model: MCJEPA, count: int, size: int, smallest_crop: float) -> float:
    """How often, in [0, 1], a view finds the other view of its image among `count` unseen MovingShapes, for train.py.

    By the pooled features of the coarsest level, from which VICReg learns.
    """
    images = ShapeImages(count, (max(size, 128), max(size, 128)), seed=UNSEEN_SEED)
    views, _ = next(iter(make_loader(images, TwoViews(size, smallest_crop), count)))
    known, queries = map(F.normalize, next(iter(compared_levels(model, views).values())))
    return ((queries @ known.T).argmax(dim=1) == torch.arange(count)).float().mean().item()


def run_knn(config: tyro.conf.OmitArgPrefixes[KnnConfig]) -> dict:
    """Nearest neighbours and ridge regression on labelled images, or the search for recoloured shapes, by level."""
    config.check()
    if config.images < 2:
        raise ValueError("--images must be at least 2")
    models = {}
    if config.model not in ("colour", "random"):
        models["ours"], config = open_model(config)
    if config.model != "colour":
        models["random"], _ = open_model(replace(config, model="random"))
    if config.data_root is None:
        objects = recoloured_objects(SHAPES_OBJECTS, UNSEEN_SEED)
        benchmark, measure = "shapes", partial(search_among_shapes, objects=objects)
        chance = {"object": 1 / SHAPES_OBJECTS}  # for texture and shape, the object itself is left out
        for kind, numbers in (("texture", objects.textures), ("shape", objects.classes)):
            alike = numbers[:, None] == numbers
            chance[kind] = (alike.sum().item() - len(alike)) / (len(alike) * (len(alike) - 1))
    else:
        benchmark, known, queries = label_sets.find_classes(config.data_root, config.images, config.size)
        measure = partial(classify_images, known=known, queries=queries)
        alike = known.labels[:, None] == queries.labels
        chance = dict.fromkeys(("k-NN", "ridge"), alike.float().mean().item())
    scores = {f"{title} {n}": row for title, model in models.items() for n, row in measure(model).items()}
    scores |= measure(None) | {"chance": chance}
    print_table(f"{benchmark} [%]", list(chance), {n: [100 * x for x in row.values()] for n, row in scores.items()})
    return write_report(config, "knn", {"data": benchmark, "scores": scores, "notes": [], "table1": {}})


# ----------------------------------------------------------------------------------------------------------- features


@dataclass
class FeaturesConfig(Config):
    """The features of images or of a video as colours: their first three principal components, on one basis."""

    images: tuple[Path, ...] = ()  # A picture is written for each.
    video: Path | None = None  # A video file or a folder of frames instead: writes a film.
    max_frames: int | None = None  # Only the first frames of the video.
    export: Path | None = None  # A folder for the features themselves, NAME.npy, float32 (channels, rows, columns).
    output_dir: Path = Path("runs/features")  # Where the pictures or the film go.
    stride: int = 8  # The level of the features.


def run_features(config: tyro.conf.OmitArgPrefixes[FeaturesConfig]) -> None:
    """Features as colours: a picture for each image, or a film of a video."""
    config.check()
    if bool(config.images) == (config.video is not None):
        raise ValueError("give either --images or --video")
    features, _, config = feature_method(config, [config.stride])
    stride, count, film, notes = config.stride, len(config.images), nullcontext(), []
    name = f"features_{stride}_{method_name(config.model)}"
    if config.video:
        clip, count, rate = open_clip(config.video, config.max_frames)
        film = writing_film(config.output_dir / f"{config.video.stem}_{name}.mp4", rate)

    def encode(index: int) -> tuple[str, UInt8[Tensor, "3 h w"], Float[Tensor, "d _ _"]]:
        stem = (config.video or config.images[index]).stem
        if config.images:
            image = load_image(config.images[index])
        else:  # the last frame begins no pair
            image = clip[index][0] if index < len(clip) else clip[-1][1]
        rows, columns = (-(-length // stride) for length in image.shape[1:])
        (cells,) = features(pad_to_multiple(image[None].float() / 255, 64))  # the coarsest stride
        return f"{stem}_{index:05d}", image, cells[:, :rows, :columns].cpu()

    paint = principal_colours([cells for *_, cells in sample(encode, count)])
    with film as write:
        for (stem, image, cells), _ in readable(encode, range(count), "image", 0, notes):
            colours = paint(cells).repeat_interleave(stride, dim=1).repeat_interleave(stride, dim=2)
            panels = {"image": image, f"stride {stride}": colours[:, : image.shape[1], : image.shape[2]]}
            picture = titled_grid(panels, columns=2)
            if write:
                write(picture)
            else:
                write_picture(config.output_dir / "pictures" / f"{stem}_{name}.png", picture)
            if config.export:
                with replacing(config.export / f"{stem}.npy") as temporary, open(temporary, "wb") as file:
                    np.save(file, cells.numpy())
    write_report(config, f"{config.video.stem}_{name}" if config.video else name, {"notes": notes})


def principal_colours(samples: list[Float[Tensor, "d _ _"]]) -> Callable[[Tensor], UInt8[Tensor, "3 h w"]]:
    """A function that paints features: their first three principal components over all samples as red, green, blue.

    Each component's 1st and 99th percentile are its darkest and its brightest value.
    """
    cells = torch.cat([sample.flatten(1) for sample in samples], dim=1)
    mean = cells.mean(dim=1, keepdim=True)
    basis = torch.linalg.eigh(torch.cov(cells, correction=0)).eigenvectors[:, -3:].flip(1).T
    basis = basis * basis.sum(dim=1, keepdim=True).sign()  # otherwise arbitrary
    low, high = torch.from_numpy(np.quantile((basis @ (cells - mean)).numpy(), (0.01, 0.99), axis=1)).float()

    def paint(features: Float[Tensor, "d h w"]) -> UInt8[Tensor, "3 h w"]:
        values = torch.einsum("cd,dhw->chw", basis, features - mean[..., None])
        return to_uint8((values - low.view(3, 1, 1)) / (high - low).clamp(min=1e-6).view(3, 1, 1))

    return paint


# ------------------------------------------------------------------------------------------------------------ Table 1

_, *METHODS = read_table("table1.csv")[0]
PAPER = {row["measure"]: [float(row[method] or "nan") for method in METHODS] for row in read_table("table1.csv")}
"""The paper's Table 1, by METHODS: errors in pixels, shares in percent. The rows of tests are measured by servers."""


@dataclass
class Table1Config(ProtocolConfig):
    """Flow, segmentation and video of one model, beside the paper's Table 1."""

    output_dir: Path = Path("runs/table1")  # A folder in it for each part.
    steps: int | None = None  # Of each training of segmentation, for a quick look.
    workers: int = 0  # Processes that load data for the training of segmentation.


def run_table1(config: tyro.conf.OmitArgPrefixes[Table1Config]) -> None:
    """Optical flow, segmentation and video of a model, beside the paper's Table 1.

    What is missing in --data-root is noted; what fails is reported at the end, and the rest is measured.
    """
    config.check()
    if config.data_root is not None and not config.data_root.is_dir():
        raise FileNotFoundError(f"{config.data_root}: no such folder; check the path")
    shared = {name: getattr(config, name) for name in ("model", "data_root", "encoder", "seed", "pictures")}
    heads, labels = {"steps": config.steps, "workers": config.workers}, ("VOC", "Cityscapes", "ADE20K")
    parts = {
        "flow": (run_flow, FlowConfig, {}, ("Sintel", "KITTI 2015")),
        "frozen": (run_segmentation, SegmentationConfig, heads, labels),
        "tuned": (run_segmentation, SegmentationConfig, heads | {"finetune": True}, labels),
        "video": (run_video, VideoConfig, {}, ("DAVIS 2017",)),
    }
    notes, measured, failures = [], {}, []
    model, config = open_model(config)
    if model.estimator is None:
        notes.append("no flow: this model has no estimator")
        del parts["flow"]
    for part, (run, kind, flags, titles) in parts.items():
        for title in titles if config.data_root else ("MovingShapes",):
            benchmark = title.lower().replace(" ", "") if config.data_root else None
            folder = config.output_dir / f"{part}_{benchmark or 'shapes'}"
            try:
                report = run(kind(**shared, **flags, benchmark=benchmark, output_dir=folder))
            except MissingSet as error:
                notes.append(f"{title}: {error}")
            except (ValueError, OSError, RuntimeError) as error:  # the last: out of memory
                failures.append(f"{title}, {part}: {one_line(error)}")
            else:
                measured |= {f"{title} {column}": number for column, number in report["table1"].items()}
                notes += [f"{title}: {note}" for note in report["notes"]]
    nothing = [math.nan] * len(METHODS)
    rows = {name: (*PAPER.get(name, nothing), measured.get(name, math.nan)) for name in PAPER | measured}
    print_table("Table 1, px or %", (*METHODS, "ours"), rows)
    notes = list(dict.fromkeys(notes))  # frozen and fine-tuned miss the same data set
    if not measured and not failures:
        raise ValueError(f"{config.data_root}: holds none of the benchmarks ({'; '.join(notes)})")
    write_report(config, "table1", {"measured": measured, "notes": notes, "failures": failures})
    if failures:
        raise ValueError("; ".join(failures))


def main() -> None:
    """The command line: a subcommand for each evaluation."""
    # Broken files are reported in our words, not in OpenCV's.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    commands = {"flow": run_flow, "segmentation": run_segmentation, "video": run_video, "knn": run_knn}
    commands |= {"features": run_features, "table1": run_table1}
    run_command(lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__.splitlines()[0]))


if __name__ == "__main__":
    main()
