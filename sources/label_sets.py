"""Data sets with a class for each pixel (semantic segmentation), and videos with masks of objects (DAVIS).

The paper's Table 1 measures frozen features by linear segmentation on Pascal VOC, Cityscapes and ADE20K, and by
following objects through the videos of DAVIS. Each set lies one folder below the data root, as its archive unpacks.

    name, training = find_labels(Path("DATA"), "voc", "train")  # images with labels
    videos, notes = find_masked_videos(Path("DATA"), "val", "2017")
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data import BadFile, ColorJitter, ImageFiles, find_files, is_image, load_image, open_image, size_text
from sources import MissingSet, find_set, read_lines, read_table, set_folders, visible_glob

# ---------------------------------------------------------------------------------------------- labels of every pixel

VOID = 255  # the class of pixels that do not count
PALETTE = np.array(
    [[sum((n >> (3 * k + channel) & 1) << (7 - k) for k in range(8)) for channel in range(3)] for n in range(256)],
    np.uint8,
)
"""The colour of each number in Pascal VOC and DAVIS, (256, 3): its bits, three at a time."""


def packed(colours: np.ndarray) -> np.ndarray:
    """Colours (..., 3) as single numbers, 0xRRGGBB."""
    return colours.astype(np.int64) @ (1 << 16, 1 << 8, 1)


NUMBERS = {0xFFFFFF: VOID} | {colour: number for number, colour in enumerate(packed(PALETTE).tolist())}
"""The number of each colour of PALETTE; white is VOID."""


def read_ids(path: Path, numbers: dict[int, int] = NUMBERS) -> UInt8[Tensor, "h w"]:
    """The numbers in an image of labels or masks: those of one channel, or `numbers` of its colours (0xRRGGBB).

    The order of a palette says nothing, since programs change it, unless two places have one colour. Greys that are not
    all in `numbers` are numbers themselves. ValueError for other colours, numbers beyond 255, or a damaged image.
    """
    with open_image(path) as image:
        mode, packing, palette = image.mode, str(image.tile), image.getpalette() or []
        values = np.array(image.convert("RGB") if mode == "RGBA" else image)
    if mode in ("P", "RGB", "RGBA"):
        if mode == "P":  # a place beyond the palette stands for itself
            colours = packed(np.array([*palette, *np.arange(len(palette) // 3, 256).repeat(3)]).reshape(256, 3))
        else:
            colours, values = np.unique(packed(values), return_inverse=True)
        colours, greys = colours.tolist(), {0x010101 * n: n for n in range(256)}
        used = {place: colours[place] for place in np.unique(values).tolist()}
        is_ramp = all(greys.get(colour) == place for place, colour in used.items())
        if mode != "P" or not (is_ramp or any(colours.index(colour) < place for place, colour in used.items())):
            table = next((known for known in (numbers, greys) if known.keys() >= {*used.values()}), None)
            if table is None:
                raise ValueError(f"{path}: colours where numbers belong; save the numbers as a grey png")
            values = np.array([table.get(colour, 0) for colour in colours])[values]
    elif "L;2" in packing or "L;4" in packing:  # Pillow spreads them over 0 to 255
        values //= 85 if "L;2" in packing else 17
    elif values.ndim != 2 or values.dtype.kind not in "biu" or values.min() < 0 or values.max() > 255:
        raise ValueError(f"{path}: an image of mode {mode}; labels are a png of one channel with numbers up to 255")
    return torch.from_numpy(values.astype(np.uint8))


def load_labelled(path: Path, labels: UInt8[Tensor, "h w"]) -> UInt8[Tensor, "3 h w"]:
    """The image of these labels: as it is stored, or upright by EXIF if it has their size only then; or BadFile."""
    for upright in (False, True):
        image = load_image(path, upright)
        if image.shape[1:] == labels.shape:
            return image
    raise BadFile(f"{path}: {size_text(image)}, but its labels are {size_text(labels)}")


@dataclass(eq=False)
class LabelledImages(Dataset):
    """Images with a class for each pixel: (uint8 (3, h, w) RGB, int64 (h, w)), VOID where a pixel does not count.

    `files` are images and their labels. `tables` give, by the ending of the labels' names, the class of each number
    that may be stored there. `colours`, uint8 (classes, 3), are those of pictures; `notes` are for the report.
    BadFile on reading a damaged file, labels of another size than the image, or a number that is no class.
    """

    files: Sequence[tuple[Path, Path]]
    tables: dict[str, dict[int, int]]
    classes: Sequence[str]
    colours: np.ndarray
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.files)

    file_count = property(__len__)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Int64[Tensor, "h w"]]:
        path, labels_path = self.files[index]
        classes = next(table for ending, table in self.tables.items() if labels_path.name.endswith(ending))
        colours = packed(self.colours).tolist()
        numbers = {colours[c]: number for number, c in classes.items() if c != VOID and colours.count(colours[c]) == 1}
        ids = read_ids(labels_path, {0: VOID, 0xE0E0C0: VOID} | numbers)  # void is black, or in VOC ivory
        labels = torch.tensor([classes.get(number, -1) for number in range(256)])[ids.long()]
        if (labels < 0).any():
            raise BadFile(f"{labels_path}: holds {int(ids[labels < 0][0])}, which is no class of this data set")
        return load_labelled(path, ids), labels


# -------------------------------------------------------------------------------------------------- images with labels


def _voc_files(folder: Path, split: str) -> Iterator[tuple[Path, Path]]:
    """Those that the archive lists; for training, the augmented set too, without the images of val."""
    home = folder / "VOC2012" if (folder / "VOC2012").is_dir() else folder  # the archive unpacks to VOCdevkit/VOC2012
    if not (home / "SegmentationClass").is_dir():
        return
    lists = home / "ImageSets" / "Segmentation"
    labels = {name: home / "SegmentationClass" / f"{name}.png" for name in read_lines(lists / f"{split}.txt")}
    more = visible_glob(home, "SegmentationClassAug/*.png") if split == "train" else []
    if more:
        validation = set(read_lines(lists / "val.txt"))
        labels = {path.stem: path for path in more if path.stem not in validation} | labels
    for name, path in sorted(labels.items()):
        yield home / "JPEGImages" / f"{name}.jpg", path


def _cityscapes_files(folder: Path, split: str) -> Iterator[tuple[Path, Path]]:
    for image in visible_glob(folder, f"leftImg8bit/{split}/*/*_leftImg8bit.png"):
        stem = folder / "gtFine" / split / image.parent.name / image.stem.removesuffix("_leftImg8bit")
        classes = Path(f"{stem}_gtFine_labelTrainIds.png")
        yield image, classes if classes.is_file() else Path(f"{stem}_gtFine_labelIds.png")


def _ade20k_files(folder: Path, split: str) -> Iterator[tuple[Path, Path]]:
    part = {"train": "training", "val": "validation"}[split]
    for image in visible_glob(folder, f"images/{part}/ADE_*.jpg"):
        yield image, folder / "annotations" / part / f"{image.stem}.png"


def _camvid_files(folder: Path, split: str) -> Iterator[tuple[Path, Path]]:
    if (folder / f"{split}annot").is_dir():
        for image in filter(is_image, visible_glob(folder, f"{split}/*")):
            yield image, folder / f"{split}annot" / f"{image.stem}.png"


def _numbers(numbers: Iterable[int], void: Iterable[int] = ()) -> dict[int, int]:
    """A table in which the first number is class 0, and so on; other numbers of `void`, and VOID, are void."""
    return dict.fromkeys((*void, VOID), VOID) | {number: c for c, number in enumerate(numbers)}


def _classes(name: str) -> tuple[list[str], np.ndarray]:
    """The names and colours of a set's classes, as its authors give them."""
    rows = [row for row in read_table("classes.csv") if row["set"] == name]
    return [row["class"] for row in rows], np.array([[*bytes.fromhex(row["colour"])] for row in rows], np.uint8)


_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # ids of the classes

LABEL_SETS = {
    "voc": "VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg, VOCdevkit/VOC2012/SegmentationClass/2007_000032.png, "
    "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt",
    "cityscapes": "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png, "
    "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
    "ade20k": "images/training/ADE_train_00000001.jpg, annotations/training/ADE_train_00000001.png",
    "camvid": "train/0001TP_006690.png, trainannot/0001TP_006690.png",
}
"""The data sets of semantic segmentation, and where an image and its labels lie, for messages."""
_FILES = {"voc": _voc_files, "cityscapes": _cityscapes_files, "ade20k": _ade20k_files, "camvid": _camvid_files}
_TABLES = {  # for each ending of the labels' names, the class of each number in them
    "voc": {"": _numbers(range(21))},
    "cityscapes": {"_labelTrainIds.png": _numbers(range(19)), "_labelIds.png": _numbers(_CITYSCAPES_IDS, range(34))},
    "ade20k": {"": _numbers(range(1, 151), [0])},
    "camvid": {"": _numbers(range(11), [11])},
}


def find_labels(root: Path, name: str | None, split: str) -> tuple[str, LabelledImages]:
    """A split ("train" or "val") of one of LABEL_SETS in `root` or a folder in it, and its name.

    MissingSet if it is not there; FileNotFoundError if an image or labels are missing; ValueError if several are there.
    """
    known = {each: (layout, partial(_FILES[each], split=split)) for each, layout in LABEL_SETS.items()}
    (name, files), notes = find_set(root, known, name, f"{split} part"), []
    for path in (path for pair in files for path in pair):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; unpack {name} again")
    if name == "voc" and split == "train" and len(files) < 10_582:
        notes.append(f"{len(files)} training images; with the augmented set there are 10,582")
    return name, LabelledImages(files, _TABLES[name], *_classes(name), notes)


class LabelAugmentation:
    """The usual augmentation for semantic segmentation: another size, a crop, a flip, a change of colours.

    Called with an image uint8 (3, h, w) and its labels int64 (h, w) it returns a float32 (3, crop, crop) image in
    [0, 1] and labels (crop, crop). Where the crop exceeds the image, labels are VOID and the image has ImageNet's mean
    colour, before colours change. The shorter side becomes `size` times a factor drawn from `scale`.
    """

    def __init__(self, crop: int, size: int, scale: tuple[float, float] = (0.5, 2.0)):
        self.size, self.scale = size, scale
        fill = {tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: VOID}
        self.cut = v2.Compose([v2.RandomCrop(crop, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip(0.5)])
        # As v2.RandomPhotometricDistort, which also swaps channels: colours may identify a class.
        colour = v2.RandomApply([ColorJitter((0.875, 1.125), 0.5, 0.5, 0.05)], p=0.75)
        self.change = v2.Compose([colour, v2.ToDtype(torch.float32, scale=True)])

    def __call__(
        self, image: UInt8[Tensor, "3 h w"], labels: Int64[Tensor, "h w"]
    ) -> tuple[Float[Tensor, "3 s s"], Int64[Tensor, "s s"]]:
        size = max(round(self.size * torch.empty(()).uniform_(*self.scale).item()), 1)
        image = F.resize(image, [size], antialias=True)
        # torchvision's own choice for masks, "nearest", would shift them by half a pixel.
        labels = F.resize(labels[None], list(image.shape[1:]), v2.InterpolationMode.NEAREST_EXACT)
        image, labels = self.cut(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return self.change(image.as_subclass(Tensor)), labels[0].as_subclass(Tensor)


# ------------------------------------------------------------------------------------------- images in folders by class


class ImageClasses(NamedTuple):
    """Images of one size, and the number of each one's class."""

    images: UInt8[Tensor, "n 3 h w"]
    labels: Int64[Tensor, " n"]


def find_classes(root: Path, most: int, size: int | None = None) -> tuple[str, ImageClasses, ImageClasses]:
    """At most so many images of train/ in `root`, a fifth of it of val/ or test/, evenly spread, and its name.

    An image's class is the folder that it lies in, train/CLASS/a.jpg. With `size`, each has that height and width.
    MissingSet if a folder is not there; ValueError if images differ in size, or a class is not in train/.
    """
    parts, classes = [], {}
    for names, count in ((("train",), most), (("val", "test"), most // 5)):
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is None:
            raise MissingSet(f"{root}: no {' or '.join(names)} in it; expected train/CLASS/a.jpg and val/CLASS/b.jpg")
        paths = ImageFiles(folder).paths
        if direct := [path for path in paths if path.parent == folder]:
            raise ValueError(f"{direct[0]}: has no class; expected {folder.name}/CLASS/{direct[0].name}")
        labels = [path.relative_to(folder).parts[0] for path in paths]
        classes = classes or {label: number for number, label in enumerate(dict.fromkeys(labels))}
        places = np.linspace(0, len(paths) - 1, min(max(count, 1), len(paths))).astype(int)
        paths, labels = [paths[place] for place in places], [labels[place] for place in places]
        if strangers := set(labels) - set(classes):
            raise ValueError(f"{folder}: the folder {min(strangers)} is no class of {root / 'train'}")
        images = []
        for path in paths:
            image = load_image(path)
            images.append(F.resize(image, [size, size], antialias=True) if size else image)
            if images[-1].shape != images[0].shape:
                raise ValueError(f"{path}: {size_text(image)}, unlike the first; give all one --size")
        parts.append(ImageClasses(torch.stack(images), torch.tensor([classes[label] for label in labels])))
    return root.resolve().name, *parts


# -------------------------------------------------------------------------------------------------- videos with masks


class ObjectVideo(NamedTuple):
    """A video whose objects are followed from the masks of its first frame.

    Where that mask skips a number, davis2017-evaluation counts the object that is not there as found perfectly; here
    it does not count.
    """

    name: str
    objects: list[int]  # their numbers in the masks; 0 is the background
    frames: Callable[[int], UInt8[Tensor, "3 h w"]]
    masks: Callable[[int], UInt8[Tensor, "h w"] | None]  # None where there is no mask; VOID pixels do not count
    frame_names: list[str]
    flow: Callable[[int], Float[Tensor, "1 2 h w"]] | None = None  # the true one, from a frame to the one before

    @property
    def length(self) -> int:
        return len(self.frame_names)


def find_masked_videos(root: Path, split: str = "val", year: str | None = None) -> tuple[list[ObjectVideo], list[str]]:
    """The videos of DAVIS in `root` or a folder in it, and notes for the report.

    The year chooses the list of sequences, by default that of 2017; 2016 makes all objects one. Without any list all
    sequences are taken. MissingSet: no DAVIS, or none of that year; FileNotFoundError: frames or a first mask are
    missing; ValueError: DAVIS is there in several folders, or no sequence can be followed (if some can, notes name the
    others).
    """
    homes = []
    for home in set_folders(Path(root)):
        sizes = [path.name for path in visible_glob(home, "JPEGImages/*")]
        sizes = [size for size in sizes if (home / "Annotations" / size).is_dir()]
        if sizes:
            size = "480p" if "480p" in sizes else sizes[0]
            # The lists of 2016 lie under its year, in the archive of 2017, or under the resolution, in its own.
            folders = {"2016": ("2016", size), "2017": ("2017",), None: ("2017", size)}[year]
            lists = [home / "ImageSets" / folder / f"{split}.txt" for folder in folders]
            homes.append((home, size, next((path for path in lists if path.is_file()), None)))
    if not homes:
        expected = "JPEGImages/480p/SEQUENCE/00000.jpg, Annotations/480p/SEQUENCE/00000.png"
        raise MissingSet(f"{root}: no DAVIS in it; expected {expected}")
    homes = [found for found in homes if year and found[2]] or homes
    if len(homes) > 1:
        names = ", ".join(str(home) for home, _, _ in homes)
        raise ValueError(f"{root}: DAVIS lies in {names}; name one of them with --data-root")
    ((home, size, listed),), notes = homes, []
    if listed:  # DAVIS 2016 lists files, DAVIS 2017 sequences
        names = list(dict.fromkeys(Path(line).parent.name or line for line in read_lines(listed)))
    elif any((home / "ImageSets").glob("*/*.txt")):
        raise MissingSet(f"{home / 'ImageSets'}: no list {split}.txt of DAVIS {year or '2017 or 2016'} in it")
    else:
        names = [folder.name for folder in visible_glob(home / "JPEGImages" / size, "*")]
        notes.append(f"no ImageSets/{year or '2017'}/{split}.txt: all {len(names)} sequences")
    if not names:
        raise FileNotFoundError(f"{listed or home / 'JPEGImages' / size}: no sequence in it")
    may_be_white = not listed or listed.parent.name != "2017"  # the archives of both years have files of one name
    videos = []
    for name in names:
        folders = [home / kind / size / name for kind in ("JPEGImages", "Annotations")]
        try:
            videos.append(_open_video(*folders, year == "2016", may_be_white))
        except ValueError as error:
            if name == names[-1] and not videos:
                raise
            notes.append(f"left out: {error}")
    return videos, notes


def _open_video(folder: Path, masks_folder: Path, one_object: bool, may_be_white: bool) -> ObjectVideo:
    """A sequence of DAVIS. White masks (of 2016) show one object, number 1; `one_object` merges all objects."""
    paths = [path for path in find_files(folder) if path.parent == folder and is_image(path)]
    mask_paths = [masks_folder / f"{path.stem}.png" for path in paths]
    if not paths:
        raise FileNotFoundError(f"{folder}: no frames in it; unpack DAVIS again")
    if lost := {mask.stem for mask in visible_glob(masks_folder, "*.png")} - {path.stem for path in paths}:
        raise FileNotFoundError(f"{folder / min(lost)}: frame missing, its mask is there; unpack DAVIS again")
    if not mask_paths[0].is_file():
        raise FileNotFoundError(f"{mask_paths[0]}: missing; a sequence needs the mask of its first frame")
    if len(paths) < 3:
        raise ValueError(f"{folder}: {len(paths)} frame(s); the first and the last are not measured")
    first = read_ids(mask_paths[0])
    numbers = set(first.unique().tolist()) - {0}
    if not numbers:
        raise ValueError(f"{mask_paths[0]}: no object in the mask of the first frame; nothing can be followed")
    if VOID in numbers and len(numbers) > 20:
        raise ValueError(f"{mask_paths[0]}: {len(numbers)} shades of grey; a white mask must have hard edges")
    white = numbers == {VOID}
    if white and not may_be_white:
        raise FileNotFoundError(f"{mask_paths[0]}: a mask of DAVIS 2016 in place of 2017's; unpack 2017 again")

    def read_mask(index: int) -> UInt8[Tensor, "h w"] | None:
        if not mask_paths[index].is_file():
            return None
        mask = read_ids(mask_paths[index])
        if mask.shape != first.shape:
            raise ValueError(f"{mask_paths[index]}: a mask of {size_text(mask)}, but its video is {size_text(first)}")
        if white:
            return mask if mask.max() <= 1 else (mask > 127).to(mask.dtype)
        return torch.where((mask > 0) & (mask != VOID), 1, mask) if one_object else mask

    objects, names = [1] if white or one_object else sorted(numbers - {VOID}), [path.stem for path in paths]
    return ObjectVideo(folder.name, objects, lambda index: load_labelled(paths[index], first), read_mask, names)
