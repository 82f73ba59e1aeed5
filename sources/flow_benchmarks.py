"""The flow benchmarks: pairs of frames with their true flow, its file formats, and the files of a submission.

The paper's Table 1 measures the end-point error on Sintel and KITTI 2015; Middlebury, KITTI 2012, FlyingChairs,
FlyingThings3D and HD1K have true flow too. Each set lies one folder below the data root, as its archive unpacks.

    name, files, notes = find_benchmark(Path("DATA"), "sintel")
    pair = read_pair(files[0])  # two frames, the true flow, the regions that are measured apart
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data import is_image, load_image, open_image, size_text
from sources import find_set, read_lines, split_number, visible_glob

# ------------------------------------------------------------------------------------------------ files of true flow


def known_flow(flow: Float[Tensor, "b 2 h w"]) -> Bool[Tensor, "b 1 h w"]:
    """Where both components are finite and at most 1e9: beyond that, Middlebury's files mark unknown flow."""
    return (flow.abs() <= 1e9).all(dim=1, keepdim=True)


def read_flow(path: Path) -> tuple[Float[Tensor, "1 2 h w"], Bool[Tensor, "1 1 h w"]]:
    """True flow in pixels and where it is known: Middlebury's .flo, FlyingThings3D's .pfm, or KITTI's 16-bit .png.

    ValueError for another format, or a file cut short.
    """
    read = {".png": _read_kitti_png, ".pfm": _read_pfm}.get(path.suffix, _read_flo)
    flow = torch.from_numpy(read(path)).permute(2, 0, 1)[None]
    return flow, known_flow(flow)


def _read_flo(path: Path) -> np.ndarray:
    """Not by cv2.readOpticalFlow, which crashes the interpreter on a damaged header."""
    head = re.match(rb"PIEH(.{4})(.{4})", path.read_bytes(), re.DOTALL)
    if head is None:
        raise ValueError(f"{path}: not a .flo file (it must begin with 'PIEH', width, height)")
    width, height = (int.from_bytes(size, "little", signed=True) for size in head.groups())
    return _floats(path, head, (height, width, 2), "<")


def _read_pfm(path: Path) -> np.ndarray:
    """Three channels, x, y, and one without a meaning, in rows from the bottom to the top."""
    head = re.match(rb"PF\s+(\d{1,6})\s+(\d{1,6})\s+(-?)[\d.eE+-]+[ \t]*\r?\n", path.read_bytes())
    if head is None:
        raise ValueError(f"{path}: not a .pfm file of three channels (it must begin with 'PF', width, height, scale)")
    order = "<" if head[3] else ">"  # a negative scale: little endian
    return _floats(path, head, (int(head[2]), int(head[1]), 3), order)[::-1, :, :2].copy()


def _floats(path: Path, head: re.Match[bytes], shape: tuple[int, int, int], order: str) -> np.ndarray:
    count = math.prod(shape)
    if min(shape) < 1 or len(head.string) < head.end() + 4 * count:
        raise ValueError(f"{path}: cut short or damaged ({len(head.string)} bytes for {shape[1]}x{shape[0]} px)")
    return np.frombuffer(head.string, f"{order}f4", count, head.end()).reshape(shape).astype(np.float32)


def _read_kitti_png(path: Path) -> np.ndarray:
    """(value - 2^15) / 64 px; unknown pixels, where the third channel is 0, become NaN."""
    with open_image(path) as image:  # for its errors: OpenCV reports a damaged file on stderr, in its own words
        image.verify()
    stored = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16 or stored.shape[2:] != (3,):
        raise ValueError(f"{path}: not a flow of KITTI's format (a png of three 16-bit channels)")
    valid, y, x = cv2.split(stored)  # OpenCV gives blue, green, red; the file holds x, y, valid as red, green, blue
    flow = (np.stack([x, y], axis=-1).astype(np.float32) - 2**15) / 64
    return np.where(valid[..., None] > 0, flow, np.float32("nan"))


def write_flow(path: Path, flow: Float[Tensor, "1 2 h w"]) -> None:
    """Writes a flow as .flo, or as KITTI's .png, which holds 64ths of a pixel up to 512 px."""
    values = flow[0].permute(1, 2, 0).numpy()
    if path.suffix == ".flo":
        path.write_bytes(b"PIEH" + np.array(values.shape[1::-1], "<i4").tobytes() + values.astype("<f4").tobytes())
    else:
        x, y = cv2.split(np.clip(np.round(values * 64 + 2**15), 0, 2**16 - 1).astype(np.uint16))
        path.write_bytes(cv2.imencode(".png", cv2.merge((np.ones_like(x), y, x)))[1])


# --------------------------------------------------------------------------------------------- where their files lie

MASKS = ("occlusions", "invalid", "flow_noc", "obj_map")  # of Sintel, and of KITTI; they lie beside the flow


class FlowFiles(NamedTuple):
    """The files of one pair of a benchmark."""

    name: str  # as in a submission, without the ending: "alley_1/frame_0001", "000000_10"
    group: str  # the part that is averaged by itself: "clean", "final"; else empty
    image_1: Path
    image_2: Path
    flow: Path | None  # None in a split whose true flow is secret
    masks: dict[str, Path] = {}  # those of MASKS that are there


def _pair(root: Path, name: str, image: Path, flow: Path | None, group: str = "", step: int = 1) -> FlowFiles:
    """A pair by its first frame: the second has the next number, or with a `step` of -1 the one before."""
    before, digits = split_number(image)
    following = image.with_stem(f"{before}{int(digits) + step:0{len(digits)}d}")
    masks = {mask: path for mask in MASKS if flow and (path := root / "training" / mask / f"{name}.png").is_file()}
    return FlowFiles(name, group, image, following, flow, masks)


def _sintel(root: Path) -> Iterator[FlowFiles]:
    for group, flow in product(("clean", "final"), visible_glob(root, "training/flow/*/frame_*.flo")):
        name = f"{flow.parent.name}/{flow.stem}"
        yield _pair(root, name, root / "training" / group / f"{name}.png", flow, group)


def _sintel_testing(root: Path) -> Iterator[FlowFiles]:
    for group in ("clean", "final"):
        for image, following in pairwise(visible_glob(root, f"test/{group}/*/frame_*.png")):
            if following.parent == image.parent:  # the last frame of a scene has no next one
                yield _pair(root, f"{image.parent.name}/{image.stem}", image, None, group)


def _kitti(root: Path, folders: tuple[str, ...], split: str = "training") -> Iterator[FlowFiles]:
    """`folders`: where the images are, the first that is there. ValueError if those of the other year lie there too."""
    there = [name for name in ("image_2", "colored_0", "image_0") if (root / split / name).is_dir()]
    if "image_2" in there and len(there) > 1:
        raise ValueError(f"{root / split}: KITTI 2012 and 2015 have files of one name; unpack each to its own folder")
    images = next((root / split / name for name in folders if name in there), None)
    listed = root / split / "flow_occ" if split == "training" else images
    for path in visible_glob(listed, "*_10.png") if images else ():
        yield _pair(root, path.stem, images / path.name, path if split == "training" else None)


def _middlebury(root: Path) -> Iterator[FlowFiles]:
    for flow in visible_glob(root, "other-gt-flow/*/flow10.flo"):
        yield _pair(root, flow.parent.name, root / "other-data" / flow.parent.name / "frame10.png", flow)


def _chairs(root: Path) -> Iterator[FlowFiles]:
    """The validation pairs, which have a 2 in FlyingChairs_train_val.txt, if that list is in or beside the folder."""
    lists = [folder / "FlyingChairs_train_val.txt" for folder in (root, root.parent)]
    marks = next((read_lines(path) for path in lists if path.is_file()), None)
    for folder in (root / "data", root):
        flows = [flow for ending in ("flo", "png") for flow in visible_glob(folder, f"*_flow.{ending}")]
        images = {path.stem: path for path in filter(is_image, visible_glob(folder, "*_img1.*"))} if flows else {}
        for flow in flows:
            name = flow.stem.removesuffix("_flow")
            if marks is None or (name.isdecimal() and marks[int(name) - 1 : int(name)] == ["2"]):
                yield _pair(root, name, images.get(f"{name}_img1", folder / f"{name}_img1.ppm"), flow)


def _things(root: Path) -> Iterator[FlowFiles]:
    """The test split: both passes, cameras and directions. At an end of a clip, flow leads to no frame: left out."""
    for group, folder in product(("clean", "final"), visible_glob(root, "optical_flow/TEST/*/*/into_*/*")):
        part, clip, direction, camera = folder.parts[-4:]
        flows, step = visible_glob(folder, "OpticalFlowInto*_*_?.pfm"), 1 if direction == "into_future" else -1
        for flow in flows[:-1] if step == 1 else flows[1:]:
            number = flow.stem.split("_")[-2]
            image = root / f"frames_{group}pass/TEST" / part / clip / camera / f"{number}.png"
            yield _pair(root, f"{part}_{clip}_{camera}_{direction}_{number}", image, flow, group, step)


def _hd1k(root: Path) -> Iterator[FlowFiles]:
    """At the end of a sequence, flow leads to no frame: left out."""
    for flow, following in pairwise(visible_glob(root, "hd1k_flow_gt/flow_occ/*_*.png")):
        if following.name.split("_")[0] == flow.name.split("_")[0]:
            yield _pair(root, flow.stem, root / "hd1k_input/image_2" / flow.name, flow)


_GREY = partial(_kitti, folders=("colored_0", "image_0"))
_COLOUR = partial(_kitti, folders=("image_2",))

FLOW_BENCHMARKS = {
    "sintel": ("training/flow/SCENE/frame_0001.flo, training/clean/SCENE/frame_0001.png", _sintel),
    "kitti2012": ("training/flow_occ/000000_10.png, training/colored_0/000000_10.png (or image_0)", _GREY),
    "kitti2015": ("training/flow_occ/000000_10.png, training/image_2/000000_10.png", _COLOUR),
    "middlebury": ("other-gt-flow/SCENE/flow10.flo, other-data/SCENE/frame10.png", _middlebury),
    "chairs": ("data/NAME_flow.flo (or .png), data/NAME_img1.ppm, data/NAME_img2.ppm", _chairs),
    "things": ("optical_flow/TEST/A/0000/into_future/left/*.pfm, frames_cleanpass/TEST/A/0000/left/0006.png", _things),
    "hd1k": ("hd1k_flow_gt/flow_occ/000000_0010.png, hd1k_input/image_2/000000_0010.png", _hd1k),
}
"""The layout of each benchmark, for messages, and the function that lists its pairs in its own folder."""

TESTING_SPLITS = {  # whose true flow is secret
    "sintel": ("test/clean/SCENE/frame_0001.png", _sintel_testing),
    "kitti2012": ("testing/colored_0/000000_10.png (or image_0)", partial(_GREY, split="testing")),
    "kitti2015": ("testing/image_2/000000_10.png", partial(_COLOUR, split="testing")),
}


def find_benchmark(
    root: Path, name: str | None = None, split: str = "training"
) -> tuple[str, list[FlowFiles], list[str]]:
    """A benchmark in `root` or a folder in it: its name, its pairs, and a note on those without frames, left out.

    MissingSet if it, or any where no name is given, is not there; FileNotFoundError if one frame of a pair is missing;
    ValueError if several benchmarks are there. `split` is "training" or "testing".
    """
    known = FLOW_BENCHMARKS if split == "training" else TESTING_SPLITS
    if name and name not in known:
        raise ValueError(f"there is no {split} part of {name}; {', '.join(known)} have one")
    name, pairs = find_set(root, known, name, "true flow" if split == "training" else "testing part")
    whole, lost = [], []
    for pair in pairs:
        missing = [path for path in (pair.image_1, pair.image_2) if not path.is_file()]
        if len(missing) == 1:
            raise FileNotFoundError(f"{missing[0]}: missing, the other frame of this pair is there; unpack it again")
        (lost if missing else whole).append(pair)
    if not whole:
        raise FileNotFoundError(f"{lost[0].image_1}: missing, as all frames of {name}; unpack them beside the flow")
    notes = [f"{len(lost)} of {len(pairs)} pairs left out: no frames for them, such as {pair.image_1}" for pair in lost]
    return name, whole, notes[:1]


def submission_name(benchmark: str, pair: "FlowPair") -> str:
    """Where a pair's flow lies in a submission, as the server wants it; of benchmarks without one, a .flo file."""
    if benchmark.startswith("kitti"):
        return f"{'flow/' if benchmark == 'kitti2015' else ''}{pair.name}.png"
    return "/".join(filter(None, (pair.group, f"{pair.name}.flo")))


# ------------------------------------------------------------------------------------------------------ reading pairs

REGIONS = ("all", "matched", "unmatched", "0-10", "10-40", "40+", "noc", "bg", "fg")  # in the order of the tables


class FlowPair(NamedTuple):
    """Two images in [0, 1], the true flow from 1 to 2, and the regions that are measured apart ("all": it is known)."""

    name: str
    group: str
    image_1: Float[Tensor, "1 3 h w"]
    image_2: Float[Tensor, "1 3 h w"]
    flow: Float[Tensor, "1 2 h w"] | None  # None in a split whose true flow is secret
    regions: dict[str, Bool[Tensor, "1 1 h w"]]


def read_pair(files: FlowFiles) -> FlowPair:
    """Reads one pair, its true flow and its masks; ValueError where they differ in size.

    The regions of Sintel: matched, unmatched (occluded), and by the length of the true flow in pixels; pixels that it
    calls invalid (up to 1.4% of a pair) are unknown. Of KITTI: noc (not occluded), and with an obj_map bg and fg.
    """
    paths, upright = (files.image_1, files.image_2), files.flow is None  # true flow lies on the pixels as stored
    image_1, image_2 = (load_image(path, upright, beside=paths)[None].float() / 255 for path in paths)
    if image_1.shape != image_2.shape:
        sizes = f"{size_text(image_2)}, but {files.image_1} is {size_text(image_1)}"
        raise ValueError(f"{files.image_2}: {sizes}; flow needs one size")
    if files.flow is None:  # a split whose true flow is secret
        return FlowPair(files.name, files.group, image_1, image_2, None, {})
    truth, known = read_flow(files.flow)
    if truth.shape[-2:] != image_1.shape[-2:]:
        raise ValueError(f"{files.flow}: flow of {size_text(truth)}, but its frames are {size_text(image_1)}")
    masks = {name: _read_mask(path, truth) for name, path in files.masks.items()}
    if "invalid" in masks:
        known = known & ~masks["invalid"]
        truth = torch.where(known, truth, torch.nan)
    if not known.any():
        raise ValueError(f"{files.flow}: no pixel of this flow is known")
    regions = {"all": known}
    if "occlusions" in masks:
        length = truth.norm(dim=1, keepdim=True)
        regions |= {"matched": known & ~masks["occlusions"], "unmatched": known & masks["occlusions"]}
        ranges = {"0-10": (0, 10), "10-40": (10, 40), "40+": (40, math.inf)}
        regions |= {name: known & (length >= low) & (length < high) for name, (low, high) in ranges.items()}
    if "flow_noc" in masks:
        regions["noc"] = known & masks["flow_noc"]
    if "obj_map" in masks:
        regions |= {"bg": known & ~masks["obj_map"], "fg": known & masks["obj_map"]}
    return FlowPair(files.name, files.group, image_1, image_2, truth, regions)


def _read_mask(path: Path, flow: Float[Tensor, "1 2 h w"]) -> Bool[Tensor, "1 1 h w"]:
    """Where an image is not black; of a flow file (flow_noc), where it is known."""
    is_flow = path.parent.name == "flow_noc"
    mask = read_flow(path)[1] if is_flow else (load_image(path)[None] > 0).any(dim=1, keepdim=True)
    if mask.shape[-2:] != flow.shape[-2:]:
        raise ValueError(f"{path}: a mask of {size_text(mask)}, but the flow is {size_text(flow)}")
    return mask
