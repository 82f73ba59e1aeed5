"""Measure a trained model: optical flow against ground truth (Section 4 of MC-JEPA, the flow columns of its Table 1).

    python evaluate.py flow --model runs/pocket/checkpoint.pt                          # MovingShapes never trained on
    python evaluate.py flow --model runs/pocket/checkpoint.pt --data-root Middlebury   # a folder with ground truth
    python evaluate.py flow --model runs/pocket/checkpoint.pt --images a.png b.png     # pictures of the flow a to b
    python evaluate.py flow --model runs/pocket/checkpoint.pt --video clip.mp4         # a video of its flow

Zero flow and OpenCV's DIS stand beside the model in every table, and `--model zero` or `--model dis` runs them alone.
Numbers go to the screen and to flow.json in `--output-dir`, pictures beside it.

`--data-root` accepts the folder (or its parent, where the folder bears the name in brackets) of

    Middlebury   other-data/SCENE/frame10.png, frame11.png and other-gt-flow/SCENE/flow10.flo       [Middlebury]
    KITTI        image_2 (image_0, colored_0)/N_10.png, N_11.png and flow_occ/N_10.png               [training]
    any pairs    NAME_img1.EXT, NAME_img2.EXT and NAME_flow.flo or NAME_flow.png, as FlyingChairs    [data]
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import tyro
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.utils import flow_to_image, make_grid
from tqdm import tqdm

from data import MovingShapes, VideoPairs, load_image
from flow import resize_flow, warp
from mcjepa import MCJEPA, load_model

UNSEEN_SEED = 1_618_033_988
"""Seed of the MovingShapes that are measured on. Training draws from its own `--seed`: never give it this one."""
UNKNOWN_FLOW = 1e9
"""Middlebury's mark: true flow beyond it is unknown and counts nowhere."""

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


def known_flow(flow: Float[Tensor, "b 2 h w"]) -> Bool[Tensor, "b 1 h w"]:
    """Where both components are finite and not beyond 1e9, the mark of Middlebury's files for "unknown"."""
    return (flow.abs() <= UNKNOWN_FLOW).all(dim=1, keepdim=True)


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
    grey = [cv2.cvtColor(_to_numpy(to_uint8(image[0])), cv2.COLOR_RGB2GRAY) for image in (image_1, image_2)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    return torch.from_numpy(flow).permute(2, 0, 1)[None]


BASELINES: dict[str, FlowMethod] = {"zero": zero_flow, "dis": dis_flow}


def model_flow(model: MCJEPA) -> FlowMethod:
    """The model as a method: takes and gives tensors on the CPU, wherever its parameters live."""
    device = next(model.parameters()).device
    return lambda image_1, image_2: model.estimate_flow(image_1.to(device), image_2.to(device)).float().cpu()


def at_scale(method: FlowMethod, scale: float) -> FlowMethod:
    """Estimates on images resized by `scale` and brings the flow back to the size and the pixels of the originals."""

    def estimate(image_1: Float[Tensor, "1 3 h w"], image_2: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 2 h w"]:
        height, width = image_1.shape[-2:]
        size = (max(1, round(scale * height)), max(1, round(scale * width)))
        small = [F.interpolate(image, size, mode="bilinear", antialias=True) for image in (image_1, image_2)]
        return resize_flow(method(*small), (height, width))

    return method if scale == 1 else estimate


# ---------------------------------------------------------------------------------------------------- reading


class Pair(NamedTuple):
    """Two images `(1, 3, h, w)` in [0, 1], the true flow `(1, 2, h, w)` from 1 to 2 and where it is known."""

    name: str
    image_1: Tensor
    image_2: Tensor
    flow: Tensor
    valid: Tensor


def read_flow(path: Path) -> tuple[Float[Tensor, "1 2 h w"], Bool[Tensor, "1 1 h w"]]:
    """True flow in pixels and where it is known, from Middlebury's .flo or KITTI's 16-bit .png.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, a file cut short, or no known flow in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such flow file")
    flow = _read_kitti_png(path) if path.suffix == ".png" else _read_flo(path)
    flow = torch.from_numpy(flow).permute(2, 0, 1)[None]
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


def _read_kitti_png(path: Path) -> np.ndarray:
    """(value - 2^15) / 64 px; unknown pixels, where the third channel is 0, become NaN."""
    load_image(path)  # for its errors: OpenCV tells of a damaged file on stderr, in its own words
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16 or stored.shape[2:] != (3,):
        raise ValueError(f"{path}: not a flow of KITTI's format (a png of three 16-bit channels)")
    valid, y, x = cv2.split(stored)  # OpenCV gives blue, green, red; the file holds x, y, valid as red, green, blue
    flow = (np.stack([x, y], axis=-1).astype(np.float32) - 2**15) / 64
    return np.where(valid[..., None] > 0, flow, np.float32("nan"))


def _frames_middlebury(flow: Path) -> tuple[str, Path, Path]:
    folder = flow.parents[2] / "other-data" / flow.parent.name
    return flow.parent.name, folder / "frame10.png", folder / "frame11.png"


def _frames_kitti(flow: Path) -> tuple[str, Path, Path]:
    folders = [flow.parents[1] / name for name in ("image_2", "image_0", "colored_0")]
    folder = next((folder for folder in folders if (folder / flow.name).exists()), folders[0])
    return flow.stem, folder / flow.name, folder / flow.name.replace("_10.png", "_11.png")


def _frames_flat(flow: Path) -> tuple[str, Path, Path]:
    name = flow.stem.removesuffix("_flow")
    suffix = next((p.suffix for p in sorted(flow.parent.glob(f"{name}_img1.*"))), ".png")
    return name, flow.with_name(f"{name}_img1{suffix}"), flow.with_name(f"{name}_img2{suffix}")


LAYOUTS = {
    "Middlebury": ("other-gt-flow/*/flow10.flo", _frames_middlebury),
    "KITTI": ("flow_occ/*_10.png", _frames_kitti),
    "pairs with .flo": ("*_flow.flo", _frames_flat),
    "pairs with .png": ("*_flow.png", _frames_flat),
}
"""How the files of true flow are found below the root, and the name and the two frames that belong to one of them."""


def find_pairs(root: Path) -> tuple[str, list[tuple[str, Path, Path, Path]]]:
    """The layout of a folder with ground truth and its pairs: name, frame 1, frame 2, flow file. Sorted by name.

    Raises:
        FileNotFoundError: no such folder, no pair of a known layout in it, or a flow file without its frames.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    for folder in (root, root / "Middlebury", root / "training", root / "data"):
        for layout, (pattern, frames_of) in LAYOUTS.items():
            pairs = [(*frames_of(flow), flow) for flow in sorted(folder.glob(pattern))]
            for _, *frames, flow in pairs:
                for frame in frames:
                    if not frame.is_file():
                        raise FileNotFoundError(f"{frame}: missing, though its flow is there ({flow})")
            if pairs:
                return layout, pairs
    accepted = ", ".join(pattern for pattern, _ in LAYOUTS.values())
    raise FileNotFoundError(f"{root}: no true flow in it; looked for {accepted} (see the top of evaluate.py)")


def read_pair(name: str, image_1: Path, image_2: Path, flow: Path) -> Pair:
    """Reads one pair and its true flow; raises ValueError where the three differ in size."""
    frames = read_frames(image_1, image_2)
    truth, valid = read_flow(flow)
    if truth.shape[-2:] != frames[0].shape[-2:]:
        raise ValueError(f"{flow}: flow of {_size(truth)}, but its frames are {_size(frames[0])}")
    return Pair(name, *frames, truth, valid)


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
        yield Pair(f"shapes_{index:04d}", item["images"][:1], item["images"][1:], truth, known_flow(truth))


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


def flow_figure(
    image_1: Float[Tensor, "3 h w"],
    image_2: Float[Tensor, "3 h w"],
    flow: Float[Tensor, "2 h w"],
    truth: Float[Tensor, "2 h w"] | None = None,
) -> UInt8[Tensor, "3 H W"]:
    """One picture to judge a flow by eye: both frames, the flow, frame 2 warped to frame 1 by it, and the absolute
    difference between that and frame 1, which is black for a perfect flow. With the truth: its colours, on the same
    scale, and the end-point error. A title tells how many pixels the full colour stands for.

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


def measure(pair: Pair, method: FlowMethod) -> tuple[Float[Tensor, "1 2 h w"], dict[str, float]]:
    """Runs a method on a pair: its flow, and its `epe` in pixels, `f1_all` in [0, 1] and `seconds`."""
    start = time.perf_counter()
    flow = method(pair.image_1, pair.image_2)
    seconds = time.perf_counter() - start
    epe = end_point_error(flow, pair.flow, pair.valid).item()
    return flow, {"epe": epe, "f1_all": f1_all(flow, pair.flow, pair.valid).item(), "seconds": seconds}


def summarise(scenes: list[dict], method: str) -> dict[str, float]:
    """EPE as the mean over pairs, F1-all over all pixels (as KITTI's development kit), the median of the seconds."""
    numbers, pixels = [scene[method] for scene in scenes], [scene["pixels"] for scene in scenes]
    return {
        "epe": float(np.mean([n["epe"] for n in numbers])),
        "f1_all": float(np.average([n["f1_all"] for n in numbers], weights=pixels)),
        "seconds": float(np.median([n["seconds"] for n in numbers])),
    }


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
        {"pixels": int(pair.valid.sum())} | {name: measure(pair, method)[1] for name, method in methods.items()}
        for pair in shapes_pairs(count, size, seed)
    ]
    model.train(training)
    ours = summarise(scenes, "ours")
    return {"epe": ours["epe"], "epe_zero": summarise(scenes, "zero")["epe"], "f1": ours["f1_all"]}


# ---------------------------------------------------------------------------------------------------- command


@dataclass
class FlowConfig:
    """Optical flow against ground truth, or its pictures where there is none."""

    model: str
    """A checkpoint of train.py, or a baseline: zero, dis."""
    data_root: Path | None = None
    """A folder with ground truth: Middlebury, KITTI, or pairs with their .flo or .png. Without it: MovingShapes."""
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
    scale: float = 1.0
    """The model sees the images resized by this factor; errors are in pixels of the originals all the same."""
    pictures: int = 8
    """At most so many pairs get a picture."""
    max_frames: int | None = None
    """Only the first frames of the video."""


def run_flow(config: tyro.conf.OmitArgPrefixes[FlowConfig]) -> None:
    """Optical flow: end-point error and F1-all on ground truth, or pictures of two images or a video."""
    if sum(source is not None for source in (config.data_root, config.images, config.video)) > 1:
        raise ValueError("--data-root, --images and --video exclude each other: give one of them")
    if config.scale <= 0 or min(config.shapes_count, config.shapes_size) < 1:
        raise ValueError("--scale, --shapes-count and --shapes-size must be positive")
    if config.max_frames is not None and config.max_frames < 2:
        raise ValueError("--max-frames must be at least 2: flow needs two frames")
    method = BASELINES.get(config.model)
    if method is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        method = model_flow(load_model(config.model, device))
    method = at_scale(method, config.scale)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if config.images:
        flow_of_images(method, *config.images, config.output_dir)
    elif config.video:
        flow_of_video(method, config)
    else:
        flow_against_truth(method, config)


def flow_against_truth(method: FlowMethod, config: FlowConfig) -> None:
    """Measures the method beside zero flow and DIS: table on the screen, flow.json, pictures."""
    if config.data_root is None:
        source, count = f"MovingShapes, {config.shapes_size} px, unseen seed", config.shapes_count
        pairs = shapes_pairs(config.shapes_count, (config.shapes_size, config.shapes_size))
    else:
        layout, files = find_pairs(config.data_root)
        source, count = f"{config.data_root} ({layout})", len(files)
        pairs = (read_pair(*paths) for paths in files)
    # A baseline that is run at another scale gets a row of its own beside the usual one.
    label = "ours" if config.model not in BASELINES else config.model
    label += "" if config.scale == 1 else f" x{config.scale:g}"
    methods = BASELINES | {label: method}
    scenes = []
    for pair in tqdm(pairs, total=count, desc="flow", unit="pair", disable=None):
        flows_and_numbers = {name: measure(pair, each) for name, each in methods.items()}
        if len(scenes) < config.pictures:
            figure = flow_figure(pair.image_1[0], pair.image_2[0], flows_and_numbers[label][0][0], pair.flow[0])
            write_picture(config.output_dir / f"{pair.name}.png", figure)
        numbers = {name: numbers for name, (_, numbers) in flows_and_numbers.items()}
        scenes.append({"name": pair.name, "pixels": int(pair.valid.sum())} | numbers)

    rows = {name: summarise(scenes, name) for name in methods}
    print(f"Flow on {source}: {count} pairs\n\n{'':12}{'EPE [px]':>10}{'F1-all [%]':>12}{'s per pair':>12}")
    for name, row in rows.items():
        print(f"{name:12}{row['epe']:10.2f}{100 * row['f1_all']:12.2f}{row['seconds']:12.3f}")
    if config.data_root is not None:
        print("\n" + f"{'EPE [px]':20}" + "".join(f"{name:>12}" for name in methods))
        for scene in scenes:
            print(f"{scene['name']:20}" + "".join(f"{scene[name]['epe']:12.2f}" for name in methods))
    report = {
        "data": source,
        "rows": rows,
        "scenes": scenes,
        "settings": asdict(config) | {"unseen_seed": UNSEEN_SEED},
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"torchvision": torchvision.__version__, "opencv": cv2.__version__},
    }
    with replacing(config.output_dir / "flow.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"\nnumbers and pictures: {config.output_dir}")


def flow_of_images(method: FlowMethod, path_1: Path, path_2: Path, folder: Path) -> None:
    """Writes flow.flo, flow.png (colours), warped.png (the second image at the place of the first) and figure.png."""
    image_1, image_2 = read_frames(path_1, path_2)
    flow = method(image_1, image_2)
    with replacing(folder / "flow.flo") as temporary:
        cv2.writeOpticalFlow(str(temporary), np.ascontiguousarray(flow[0].permute(1, 2, 0).numpy()))
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
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
