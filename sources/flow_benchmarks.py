"""The flow benchmarks: pairs of frames with their true flow, its file formats, and the files of a submission."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data import MissingSet, load_image, open_image, set_folders, visible_glob

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
        for flow in visible_glob(root, "training/flow/*/frame_*.flo"):
            name = f"{flow.parent.name}/{flow.stem}"
            image = root / "training" / group / f"{name}.png"
            masks = _masks(root / "training", f"{name}.png", "occlusions", "invalid")
            yield FlowFiles(name, group, image, _following(image), flow, masks)


def _sintel_testing(root: Path) -> Iterator[FlowFiles]:
    for group in ("clean", "final"):
        for image, later in pairwise(visible_glob(root, f"test/{group}/*/frame_*.png")):
            if later.parent == image.parent:  # the last frame of a scene has none to go to
                yield FlowFiles(f"{image.parent.name}/{image.stem}", group, image, _following(image), None)


def _kitti(root: Path, folders: tuple[str, ...]) -> Iterator[FlowFiles]:
    """`folders`: where the images are, the first of them that is there. `root` holds training/, or is that itself."""
    base = root if root.resolve().name == "training" else root / "training"
    folder = next((base / name for name in folders if (base / name).is_dir()), None)
    for flow in visible_glob(base, "flow_occ/*_10.png") if folder else ():
        image = folder / flow.name
        yield FlowFiles(flow.stem, "", image, _following(image), flow, _masks(base, flow.name, "flow_noc", "obj_map"))


def _kitti_testing(root: Path, folders: tuple[str, ...]) -> Iterator[FlowFiles]:
    """As `_kitti`, of testing/."""
    base = root if root.resolve().name == "testing" else root / "testing"
    folder = next((base / name for name in folders if (base / name).is_dir()), None)
    for image in visible_glob(folder, "*_10.png") if folder else ():
        yield FlowFiles(image.stem, "", image, _following(image), None)


def _middlebury(root: Path) -> Iterator[FlowFiles]:
    for flow in visible_glob(root, "other-gt-flow/*/flow10.flo"):
        image = root / "other-data" / flow.parent.name / "frame10.png"
        yield FlowFiles(flow.parent.name, "", image, _following(image), flow)


def _chairs(root: Path) -> Iterator[FlowFiles]:
    """Its validation pairs, those with a 2 in FlyingChairs_train_val.txt, where that list lies there; else all."""
    lists = [folder / "FlyingChairs_train_val.txt" for folder in (root, root.parent)]
    marks = next((path.read_text().split() for path in lists if path.is_file()), None)
    for folder in (root / "data", root):
        flows = [flow for ending in ("flo", "png") for flow in visible_glob(folder, f"*_flow.{ending}")]
        endings = {path.stem: path.suffix for path in visible_glob(folder, "*_img?.*")} if flows else {}
        for flow in flows:
            name = flow.stem.removesuffix("_flow")
            if marks is None or (name.isdecimal() and 0 < int(name) <= len(marks) and marks[int(name) - 1] == "2"):
                ending = endings.get(f"{name}_img1") or endings.get(f"{name}_img2", ".ppm")
                image = flow.with_name(f"{name}_img1{ending}")
                yield FlowFiles(name, "", image, _following(image), flow)


def _things(root: Path) -> Iterator[FlowFiles]:
    """The test split: both passes, cameras and directions. At an end of a clip, flow leads to no frame: left out."""
    flows = visible_glob(root, "optical_flow/TEST/*/*/into_*/*/OpticalFlowInto*_*_?.pfm")
    for group in ("clean", "final"):
        for flow in flows:
            camera, direction, clip = flow.parent.name, flow.parents[1].name, flow.parents[2]
            folder = root / f"frames_{group}pass" / clip.relative_to(root / "optical_flow") / camera
            number = flow.stem.split("_")[-2]
            image_1 = folder / f"{number}.png"
            image_2 = _following(image_1, 1 if direction == "into_future" else -1)
            beyond = [
                p
                for p in visible_glob(folder, "*.png")
                if (p.stem > number) == (direction == "into_future") and p != image_1
            ]
            if beyond or not folder.is_dir():
                name = f"{clip.parent.name}_{clip.name}_{camera}_{direction}_{number}"
                yield FlowFiles(name, group, image_1, image_2, flow)


def _hd1k(root: Path) -> Iterator[FlowFiles]:
    """At the end of a sequence, flow leads to no frame: left out."""
    flows = visible_glob(root, "hd1k_flow_gt/flow_occ/*_*.png")
    for flow, following in pairwise(flows):
        if following.name.split("_")[0] == flow.name.split("_")[0]:
            image = root / "hd1k_input" / "image_2" / flow.name
            yield FlowFiles(flow.stem, "", image, _following(image), flow)


Finder = Callable[[Path], Iterator[FlowFiles]]
"""Lists the pairs of a benchmark below its own folder."""


FLOW_BENCHMARKS: dict[str, tuple[str, Finder]] = {
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
    known = FLOW_BENCHMARKS if split == "training" else TESTING
    if name and name not in known:
        raise ValueError(f"there is no {split} part of {name}; {', '.join(known)} have one")
    wanted = {name: known[name]} if name else known
    found: dict[str, list[FlowFiles]] = {}
    for place in set_folders(root):
        for each, (_, finder) in wanted.items():
            pairs = [] if each in found else list(finder(place))
            if pairs:
                found[each] = pairs
    if not found:
        what = ("true flow" if split == "training" else "testing part") + (f" of {name}" if name else "")
        expected = "; or ".join(layout for layout, _ in wanted.values())
        raise MissingSet(f"{root}: no {what} in it; expected {expected}")
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


REGIONS = ("all", "matched", "unmatched", "0-10", "10-40", "40+", "noc", "bg", "fg")
"""The parts of an image that are measured apart, in the order of the tables; see `read_pair`."""


class FlowPair(NamedTuple):
    """Two images `(1, 3, h, w)` in [0, 1], the true flow `(1, 2, h, w)` from 1 to 2, and the parts of the image that
    are measured apart, each `(1, 1, h, w)`; the first, "all", is where the flow is known."""

    name: str
    group: str
    image_1: Tensor
    image_2: Tensor
    flow: Tensor
    regions: dict[str, Tensor]


def read_pair(files: FlowFiles) -> FlowPair:
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
    return FlowPair(files.name, files.group, *frames, truth, regions)


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


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]} px"


def write_flow(path: Path, flow: Float[Tensor, "1 2 h w"]) -> None:
    """Writes a flow as .flo, or as KITTI's .png, which holds 64ths of a pixel up to 512 px."""
    values = np.ascontiguousarray(flow[0].permute(1, 2, 0).numpy())
    if path.suffix == ".flo":
        written = cv2.writeOpticalFlow(str(path), values)
    else:
        stored = np.clip(np.round(values * 64 + 2**15), 0, 2**16 - 1).astype(np.uint16)
        known = np.ones_like(stored[..., 0])
        written = cv2.imwrite(str(path), np.dstack((known, stored[..., 1], stored[..., 0])))
    if not written:
        raise OSError(f"{path}: cannot be written; is the disk full?")


def picture_name(pair: FlowPair | FlowFiles) -> str:
    """The name of a pair's figure, with its group, without folders."""
    return "_".join(filter(None, (pair.group, pair.name))).replace("/", "_")


def submission_name(benchmark: str, pair: FlowPair | FlowFiles) -> str:
    """Where a pair's flow lies in a submission: clean/SCENE/frame_0001.flo (Sintel), flow/000000_10.png (KITTI 2015),
    000000_10.png (KITTI 2012); of benchmarks without a server: a .flo file."""
    if benchmark.startswith("kitti"):
        return f"{'flow/' if benchmark == 'kitti2015' else ''}{pair.name}.png"
    return "/".join(filter(None, (pair.group, f"{pair.name}.flo")))
