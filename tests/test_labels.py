"""Labels and masks of real data sets: their files, their layouts, their augmentation, and what wrong ones are told.

Each test is named after its claim. No data set is needed: each is written small, as its archive unpacks.
"""

import json
import random
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pytest
import test_evaluate
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from test_benchmarks import assert_one_line
from test_evaluate import in_subprocess
from test_sets import spoil_as_a_mac_does, told
from torchvision.datasets import Cityscapes, SBDataset, VOCSegmentation

import evaluate
from data import PALETTE, VOID, LabelledImages, load_image, make_loader, read_ids
from evaluate import SegmentationConfig, VideoConfig, contour_accuracy, run_segmentation, run_video
from sources.label_sets import LABEL_SETS, LabelAugmentation, find_labels, find_masked_videos, open_video
from sources.moving_shapes import MovingShapes, ShapeLabels

typed = test_evaluate.typed
seeds = st.integers(0, 2**31)


def colours_bit_by_bit() -> np.ndarray:
    """The colour map of Pascal VOC's development kit, as its loops read."""
    colours = np.zeros((256, 3), np.uint8)
    for number in range(256):
        rest, (r, g, b) = number, (0, 0, 0)
        for place in range(7, -1, -1):
            r |= (rest & 1) << place
            g |= ((rest & 2) >> 1) << place
            b |= ((rest & 4) >> 2) << place
            rest >>= 3
        colours[number] = r, g, b
    return colours


def write_ids(path: Path, ids: np.ndarray, mode: str = "P") -> Path:
    """Numbers (h, w) as a palette png of VOC, its colours (RGB, RGBA), grey (L), one bit (1), I;16, or I."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8))
    if mode in ("P", "RGB", "RGBA"):
        image.putpalette(colours_bit_by_bit().tobytes())
    if mode in ("RGB", "RGBA"):
        image = image.convert(mode)
    elif mode in ("I;16", "I"):
        image = Image.fromarray(ids.astype({"I;16": np.uint16, "I": np.int32}[mode]))
    elif mode == "1":
        image = Image.fromarray(ids.astype(bool))
    image.save(path)
    return path


def write_image(path: Path, h: int, w: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)
    return path


def random_ids(seed: int, numbers: list[int], h: int = 12, w: int = 16) -> np.ndarray:
    """Each of the numbers occurs, if there is room."""
    return np.random.default_rng(seed).permutation(np.resize(numbers, h * w)).reshape(h, w).astype(np.uint8)


def cut_short(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


# -------------------------------------------------------------------------------------------- numbers in an image


def test_the_palette_is_that_of_pascal_voc_bit_by_bit():
    np.testing.assert_array_equal(PALETTE, colours_bit_by_bit())
    assert PALETTE.dtype == np.uint8 and len({tuple(colour) for colour in PALETTE.tolist()}) == 256
    assert PALETTE[[1, 2, 15, 255]].tolist() == [[128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]]


@settings(max_examples=40, deadline=None)
@given(seed=seeds, h=st.integers(1, 20), w=st.integers(1, 20), mode=st.sampled_from(["P", "L", "RGB", "RGBA", "I;16"]))
def test_numbers_are_read_as_they_were_written_in_every_kind_of_image(seed, h, w, mode):
    ids = np.random.default_rng(seed).integers(0, 256, (h, w), dtype=np.uint8)
    with TemporaryDirectory() as folder:
        read = read_ids(write_ids(Path(folder) / "ids.png", ids, mode))
    assert read.dtype == torch.uint8
    np.testing.assert_array_equal(read, ids)


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA", "L"])
def test_all_256_numbers_come_back_from_one_image(tmp_path, mode):
    ids = np.arange(256).reshape(8, 32)
    np.testing.assert_array_equal(read_ids(write_ids(tmp_path / "ids.png", ids, mode)), ids)


def test_a_palette_counts_as_numbers_whatever_its_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8))
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    image.save(tmp_path / "ids.png")
    assert Image.open(tmp_path / "ids.png").mode == "P"
    assert read_ids(tmp_path / "ids.png").tolist() == [[0, 1, 2], [2, 1, 0]]


def test_one_bit_is_read_as_0_and_1(tmp_path):
    ids = np.array([[0, 1, 1], [1, 0, 0]])
    path = write_ids(tmp_path / "ids.png", ids, "1")
    assert Image.open(path).mode == "1"
    assert read_ids(path).tolist() == ids.tolist()


@pytest.mark.parametrize("mode, suffix", [("I;16", "png"), ("I;16", "tif"), ("I", "tif")])
def test_wide_numbers_are_read_up_to_255_and_told_beyond(tmp_path, mode, suffix):
    ids = np.array([[0, 17], [254, 255]])
    path = write_ids(tmp_path / f"fit.{suffix}", ids, mode)
    assert Image.open(path).mode == mode
    assert read_ids(path).tolist() == ids.tolist()
    wide = write_ids(tmp_path / f"wide.{suffix}", ids + 1, mode)
    with told(ValueError, wide, f"mode {mode}", "255"):
        read_ids(wide)


def test_negative_numbers_are_told(tmp_path):
    path = write_ids(tmp_path / "ids.tif", np.array([[0, -1]]), "I")
    with told(ValueError, path, "mode I"):
        read_ids(path)


@settings(max_examples=25, deadline=None)
@given(colour=st.tuples(*[st.integers(0, 255)] * 3), place=st.integers(0, 11), mode=st.sampled_from(["RGB", "RGBA"]))
@example(colour=(255, 255, 254), place=5, mode="RGB")  # beyond all colours of the palette
def test_one_pixel_of_another_colour_is_told_in_one_line(colour, place, mode):
    assume(list(colour) not in colours_bit_by_bit().tolist() and len(set(colour)) > 1)
    with TemporaryDirectory() as folder:
        path = write_ids(Path(folder) / "colours.png", np.arange(12).reshape(3, 4), mode)
        image = Image.open(path)
        image.putpixel((place % 4, place // 4), colour)
        image.save(path)
        with told(ValueError, path, "colours where numbers belong"):
            read_ids(path)


def test_grey_with_transparency_is_told(tmp_path):
    Image.new("LA", (3, 2), (1, 255)).save(tmp_path / "ids.png")
    with told(ValueError, tmp_path / "ids.png", "mode LA"):
        read_ids(tmp_path / "ids.png")


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "I;16"])
def test_a_truncated_png_is_told(tmp_path, mode):
    path = cut_short(write_ids(tmp_path / "ids.png", random_ids(0, list(range(256)), 40, 50), mode))
    with told(ValueError, path, "not a readable image"):
        read_ids(path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_told(tmp_path, content):
    path = tmp_path / "ids.png"
    path.write_bytes(content)
    with told(ValueError, path, "not a readable image"):
        read_ids(path)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, length=st.floats(0, 1))
def test_a_damaged_png_is_read_or_told_and_nothing_else_is_raised(seed, length):
    dice = random.Random(seed)
    with TemporaryDirectory() as folder:
        path = write_ids(Path(folder) / "ids.png", random_ids(seed, list(range(30)), 20, 30))
        content = bytearray(path.read_bytes())
        for _ in range(dice.randrange(3)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content[: round(length * len(content))])
        try:
            assert read_ids(path).ndim == 2
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name in ("nothing.png", "folder.png"):
        with told(FileNotFoundError, tmp_path / name):
            read_ids(tmp_path / name)


# ----------------------------------------------------------------------------------------- images with their labels


def one_labelled(tmp_path: Path, ids: np.ndarray, tables: dict, size: tuple[int, int] | None = None) -> LabelledImages:
    image = write_image(tmp_path / "image.png", *(size or ids.shape))
    return LabelledImages([(image, write_ids(tmp_path / "labels.png", ids))], tables, ("a", "b"), PALETTE[:2])


def test_numbers_become_classes_by_the_table_and_the_image_stays_as_it_is(tmp_path):
    table = {7: 0, 11: 1, 0: VOID, 255: VOID}
    ids = random_ids(0, list(table))
    labelled = one_labelled(tmp_path, ids, {"": table})
    image, labels = labelled[0]
    assert (image.dtype, labels.dtype, len(labelled)) == (torch.uint8, torch.int64, 1)
    np.testing.assert_array_equal(image.permute(1, 2, 0), np.array(Image.open(tmp_path / "image.png")))
    np.testing.assert_array_equal(labels, np.vectorize(table.get)(ids))


def test_the_table_is_that_of_the_ending_of_the_labels_name(tmp_path):
    ids = random_ids(0, [3])
    image = write_image(tmp_path / "image.png", *ids.shape)
    files = [(image, write_ids(tmp_path / name, ids)) for name in ("1_classes.png", "1_ids.png")]
    labelled = LabelledImages(files, {"_ids.png": {3: 1}, "_classes.png": {3: 0}}, ("a", "b"), PALETTE[:2])
    assert [labels.unique().tolist() for _, labels in labelled] == [[0], [1]]


@pytest.mark.parametrize("size", [(12, 15), (11, 16), (16, 12)])
def test_labels_of_another_size_than_the_image_are_told_with_both(tmp_path, size):
    labelled = one_labelled(tmp_path, random_ids(0, [0, 1]), {"": {0: 0, 1: 1}}, size)
    (h, w), image = size, tmp_path / "image.png"
    with told(ValueError, tmp_path / "labels.png", "labels of 16x12", f"{image} has {w}x{h}"):
        labelled[0]


def test_a_number_that_is_no_class_is_told_with_its_file(tmp_path):
    ids = random_ids(0, [0, 1, 255])
    ids[5, 7] = 9
    with told(ValueError, tmp_path / "labels.png", "holds 9,", "0 to 1,", "255 for void"):
        one_labelled(tmp_path, ids, {"": {0: 0, 1: 1, 255: VOID}})[0]


@pytest.mark.parametrize("spoilt", ["image.png", "labels.png"])
def test_of_a_broken_pair_the_broken_file_is_told(tmp_path, spoilt):
    labelled = one_labelled(tmp_path, random_ids(0, [0, 1], 40, 50), {"": {0: 0, 1: 1}})
    cut_short(tmp_path / spoilt)
    with told(ValueError, tmp_path / spoilt):
        labelled[0]


def test_shape_labels_are_the_first_frame_of_moving_shapes_and_its_classes():
    labelled, shapes = ShapeLabels(4, (40, 56), seed=3), MovingShapes()
    vars(shapes).update(vars(labelled))  # the same settings
    assert len(labelled) == 4 and len(labelled.classes) == len(labelled.colours) and labelled.notes == ()
    seen = set()
    for index in range(4):
        (image, labels), item = labelled[index], shapes[index]
        assert torch.equal(image.float() / 255, item["images"][0]) and image.dtype == torch.uint8
        assert torch.equal(labels, item["classes"][0]) and labels.dtype == torch.int64
        seen |= set(labels.unique().tolist())
    assert len(seen) > 2 and max(seen) < len(labelled.classes)


# ------------------------------------------------------------------------------------- the data sets with labels

NUMBERS = {
    "voc": ([*range(21), 255], {255}, 0),
    "cityscapes": ([*range(34)], {*range(7), 9, 10, 14, 15, 16, 18, 29, 30}, None),
    "ade20k": ([*range(151)], {0}, 1),
    "camvid": ([*range(12)], {11}, 0),
}
"""What each set stores, which of it is void, and which number is the first class."""
COUNTS = {"voc": 21, "cityscapes": 19, "ade20k": 150, "camvid": 11}
TRAIN_IDS = dict(
    zip([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33], range(19), strict=True)
)
"""Of Cityscapes' labels.py: the class of each id that counts."""
IMAGES = {
    "voc": {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]},
    "cityscapes": {"train": ["aachen_000000_000019", "bochum_000003_000019"], "val": ["munster_000000_000019"]},
    "ade20k": {"train": ["ADE_train_00000001", "ADE_train_00000002"], "val": ["ADE_val_00000001"]},
    "camvid": {"train": ["0001TP_006690", "0001TP_006720"], "val": ["0016E5_07959"]},
}
PLACES = {
    "voc": ("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"),
    "cityscapes": (
        "leftImg8bit/{split}/{city}/{name}_leftImg8bit.png",
        "gtFine/{split}/{city}/{name}_gtFine_labelIds.png",
    ),
    "ade20k": ("images/{part}/{name}.jpg", "annotations/{part}/{name}.png"),
    "camvid": ("{split}/{name}.png", "{split}annot/{name}.png"),
}
SETS = list(PLACES)


def places(name: str, split: str, image: str) -> tuple[str, str]:
    part = {"train": "training", "val": "validation"}[split]
    return tuple(p.format(name=image, split=split, part=part, city=image.split("_")[0]) for p in PLACES[name])


def write_list(root: Path, split: str, names: list[str]) -> None:
    path = root / f"ImageSets/Segmentation/{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_labels(root: Path, name: str, images: dict[str, list[str]] | None = None) -> Path:
    """A data set in its native layout, in `root`; every number that it knows occurs in each of its labels."""
    for split, names in (images or IMAGES[name]).items():
        for image in names:
            image_path, labels_path = places(name, split, image)
            seed = sum(map(ord, image))
            write_image(root / image_path, 12, 16, seed)
            write_ids(root / labels_path, random_ids(seed, NUMBERS[name][0]), "P" if name == "voc" else "L")
        if name == "voc":
            write_list(root, split, names)
    return root


def classes_of(name: str, ids: np.ndarray) -> np.ndarray:
    """The classes of stored numbers, written out apart from the code."""
    _, void, first = NUMBERS[name]
    table = TRAIN_IDS if first is None else {first + c: c for c in range(COUNTS[name])}
    assert void.isdisjoint(table)
    return np.vectorize(lambda number: table.get(number, 255))(ids)


def names_of(labelled: LabelledImages) -> list[str]:
    return [image.stem.removesuffix("_leftImg8bit") for image, _ in labelled.files]


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize("name", SETS)
def test_each_set_is_found_in_its_native_layout_and_up_to_two_folders_deeper(tmp_path, name, depth):
    own = write_labels(tmp_path / "root" / "disk" / name, name)
    for split, images in IMAGES[name].items():
        for asked in (None, name):
            found, labelled = find_labels((own, *own.parents)[depth], asked, split)
            assert found == name and sorted(names_of(labelled)) == images
            assert [tuple(str(p.relative_to(own)) for p in pair) for pair in labelled.files] == [
                places(name, split, image) for image in names_of(labelled)
            ]
        for (image, labels), (image_path, labels_path) in zip(labelled, labelled.files, strict=True):
            assert torch.equal(image, load_image(image_path))
            np.testing.assert_array_equal(labels, classes_of(name, np.array(Image.open(labels_path))))
            assert set(labels.unique().tolist()) == {*range(COUNTS[name]), VOID}


@pytest.mark.parametrize("name", SETS)
def test_a_set_three_folders_deeper_is_not_found(tmp_path, name):
    write_labels(tmp_path / "root" / "a" / "b" / name, name)
    with told(FileNotFoundError, tmp_path / "root", "no train part", LABEL_SETS[name].layout):
        find_labels(tmp_path / "root", name, "train")


@pytest.mark.parametrize("name", SETS)
def test_the_layout_that_is_shown_where_a_set_is_missing_is_the_one_that_is_found(tmp_path, name):
    image, labels, *lists = (tmp_path / "data" / path for path in LABEL_SETS[name].layout.split(", "))
    write_image(image, 12, 16)
    write_ids(labels, random_ids(0, NUMBERS[name][0]), "L")
    for path in lists:
        path.parent.mkdir(parents=True)
        path.write_text(image.stem)
    assert find_labels(tmp_path, None, "train")[1].files == [(image, labels)]


@pytest.mark.parametrize("name", SETS)
def test_the_names_and_colours_of_the_classes_agree_with_what_the_labels_hold(name):
    label_set = LABEL_SETS[name]
    assert len(label_set.classes) == COUNTS[name] == len(set(label_set.classes))
    assert label_set.colours.shape == (COUNTS[name], 3) and label_set.colours.dtype == np.uint8
    for table in label_set.tables.values():
        assert {*table.values()} == {*range(COUNTS[name]), VOID} and table[255] == VOID


def test_first_and_last_classes_have_the_colours_of_their_authors():
    ends = {
        "voc": {"background": (0, 0, 0), "person": (192, 128, 128), "tvmonitor": (0, 64, 128)},
        "cityscapes": {"road": (128, 64, 128), "person": (220, 20, 60), "bicycle": (119, 11, 32)},
        "ade20k": {"wall": (120, 120, 120), "person": (150, 5, 61), "flag": (92, 0, 255)},
        "camvid": {"sky": (128, 128, 128), "car": (64, 0, 128), "bicyclist": (0, 128, 192)},
    }
    for name, colours in ends.items():
        ours = dict(zip(LABEL_SETS[name].classes, LABEL_SETS[name].colours.tolist(), strict=True))
        assert {each: tuple(ours[each]) for each in colours} == colours
        assert list(ours)[0] == list(colours)[0] and list(ours)[-1] == list(colours)[-1]


@pytest.mark.parametrize("name, beyond", [("voc", 21), ("cityscapes", 34), ("ade20k", 151), ("camvid", 12)])
def test_the_first_number_beyond_the_classes_is_told_and_255_is_void_in_every_set(tmp_path, name, beyond):
    write_labels(tmp_path, name)
    path = find_labels(tmp_path, name, "val")[1].files[0][1]
    ids = random_ids(1, NUMBERS[name][0])
    ids[0, 0] = 255
    write_ids(path, ids, "L")
    labels = find_labels(tmp_path, name, "val")[1][0][1]
    assert labels[0, 0] == VOID
    ids[3, 4] = beyond
    write_ids(path, ids, "L")
    with told(ValueError, path, f"holds {beyond},", f"to {beyond - 1},"):
        find_labels(tmp_path, name, "val")[1][0]


@pytest.mark.parametrize("name", SETS)
def test_labels_in_colours_are_read_where_these_are_the_colours_of_the_set_and_told_elsewhere(tmp_path, name):
    write_labels(tmp_path, name)
    validation = find_labels(tmp_path, name, "val")[1]
    path, expected = validation.files[0][1], validation[0][1]
    write_ids(path, np.array(Image.open(path)), "RGB")
    if name == "voc":
        assert torch.equal(validation[0][1], expected)
    else:
        with told(ValueError, path, "colours where numbers belong"):
            validation[0]


@pytest.mark.parametrize("name", SETS)
def test_no_set_is_taken_for_another(tmp_path, name):
    write_labels(tmp_path / "root" / name, name)
    for other in SETS:
        if other != name:
            with told(FileNotFoundError, tmp_path, f"of {other} in it"):
                find_labels(tmp_path / "root", other, "train")


def test_of_several_sets_in_one_root_one_has_to_be_named(tmp_path):
    for name in SETS:
        write_labels(tmp_path / name, name)
    with told(ValueError, tmp_path, *SETS, "choose one with --benchmark"):
        find_labels(tmp_path, None, "train")
    for name in SETS:
        found, labelled = find_labels(tmp_path, name, "val")
        assert found == name and names_of(labelled) == IMAGES[name]["val"]
        assert labelled.classes == tuple(LABEL_SETS[name].classes) and len(labelled.colours) == COUNTS[name]


def test_a_root_without_a_set_is_told_with_every_layout(tmp_path):
    with told(FileNotFoundError, tmp_path, "no val part of a data set", *(each.layout for each in LABEL_SETS.values())):
        find_labels(tmp_path, None, "val")
    with told(FileNotFoundError, tmp_path / "nowhere", "no such folder"):
        find_labels(tmp_path / "nowhere", None, "val")


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "camvid"])
def test_of_a_set_with_its_validation_part_alone_the_training_part_is_told_missing(tmp_path, name):
    write_labels(tmp_path, name, {"val": IMAGES[name]["val"]})
    assert names_of(find_labels(tmp_path, None, "val")[1]) == IMAGES[name]["val"]
    with told(FileNotFoundError, tmp_path, "no train part"):
        find_labels(tmp_path, None, "train")


@pytest.mark.parametrize("name, which", [("voc", 0), *((name, 1) for name in SETS)])
def test_a_listed_image_or_the_labels_of_an_image_that_are_missing_are_told_at_once(tmp_path, name, which):
    write_labels(tmp_path, name)
    path = tmp_path / places(name, "train", IMAGES[name]["train"][1])[which]
    path.unlink()
    with told(FileNotFoundError, path, "missing", LABEL_SETS[name].title):
        find_labels(tmp_path, name, "train")


@pytest.mark.parametrize("name", SETS)
def test_what_a_mac_leaves_in_an_archive_is_no_image(tmp_path, name):
    write_labels(tmp_path / "root" / name, name)
    if name == "voc":
        write_ids(tmp_path / "root/voc/SegmentationClassAug/2007_000032.png", random_ids(0, [0]))
        savemat_of(tmp_path / "root/benchmark_RELEASE/dataset/cls/2007_000039.mat", random_ids(0, [0]))
    spoil_as_a_mac_does(tmp_path / "root")
    for split, images in IMAGES[name].items():
        assert sorted(names_of(find_labels(tmp_path / "root", None, split)[1])) == images


# ------------------------------------------------------------------------------------------------------ Pascal VOC


def savemat_of(path: Path, ids: np.ndarray) -> None:
    """As the labels of the augmented set are stored, boundaries beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = np.unique(ids)[:, None]
    savemat(path, {"GTcls": {"Boundaries": np.zeros((20, 1)), "Segmentation": ids, "CategoriesPresent": categories}})


def write_augmented(voc: Path, kind: str, names: list[str]) -> dict[str, np.ndarray]:
    """Labels of the augmented set, as SegmentationClassAug or as SBD's files, and images for them."""
    written = {}
    for name in names:
        ids = random_ids(1000 + sum(map(ord, name)), [*range(21)])
        if kind == "png":
            write_ids(voc / f"SegmentationClassAug/{name}.png", ids, "L")
        else:
            above = {"beside VOC2012": voc.parent, "beside VOCdevkit": voc.parent.parent}[kind]
            savemat_of(above / f"benchmark_RELEASE/dataset/cls/{name}.mat", ids)
        write_image(voc / f"JPEGImages/{name}.jpg", *ids.shape)
        written[name] = ids
    return written


KINDS = ("png", "beside VOC2012", "beside VOCdevkit")
MORE = ["2007_000032", "2007_000033", "2008_000001", "2011_002041"]
"""Of the augmented set: one image of train, one of val, and two others."""


@pytest.mark.parametrize("split", ["train", "val"])
def test_voc_is_read_as_by_torchvision(tmp_path, split):
    write_labels(tmp_path / "VOCdevkit" / "VOC2012", "voc")
    theirs = VOCSegmentation(str(tmp_path), "2012", split)
    ours = find_labels(tmp_path, "voc", split)[1]
    assert len(ours) == len(theirs) == len(IMAGES["voc"][split])
    for (image, labels), (their_image, their_labels) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.array(their_image))
        np.testing.assert_array_equal(labels, np.array(their_labels))


def test_voc_without_the_augmented_set_has_the_images_of_its_list_and_says_what_could_be(tmp_path):
    write_labels(tmp_path, "voc")
    write_list(tmp_path, "train", IMAGES["voc"]["train"][:1])
    training = find_labels(tmp_path, None, "train")[1]
    assert names_of(training) == IMAGES["voc"]["train"][:1]
    (note,) = training.notes
    assert note.startswith("1 training images") and "10,582" in note
    assert find_labels(tmp_path, None, "val")[1].notes == ()


@pytest.mark.parametrize("kind", KINDS)
def test_voc_with_the_augmented_set_trains_on_it_but_never_on_an_image_of_val(tmp_path, kind):
    voc = write_labels(tmp_path / "VOCdevkit" / "VOC2012", "voc")
    more = write_augmented(voc, kind, MORE)
    training = find_labels(tmp_path, None, "train")[1]
    assert names_of(training) == sorted({*IMAGES["voc"]["train"], *MORE} - {*IMAGES["voc"]["val"]})
    for name, (_, labels) in zip(names_of(training), training, strict=True):
        own = voc / f"SegmentationClass/{name}.png"  # VOC's own labels go before those of the augmented set
        np.testing.assert_array_equal(
            labels, classes_of("voc", np.array(Image.open(own)) if own.is_file() else more[name])
        )
    validation = find_labels(tmp_path, None, "val")[1]
    assert [path.parent.name for _, path in validation.files] == ["SegmentationClass"]
    assert names_of(validation) == IMAGES["voc"]["val"]
    assert training.notes[0].startswith("4 training images")


def test_both_forms_of_the_augmented_set_together_give_each_image_once(tmp_path):
    voc = write_labels(tmp_path / "VOCdevkit" / "VOC2012", "voc")
    for kind in KINDS:
        write_augmented(voc, kind, MORE)
    assert names_of(find_labels(voc, None, "train")[1]) == ["2007_000032", "2007_000039", *MORE[2:]]


def test_the_labels_of_the_augmented_set_are_read_as_by_torchvision(tmp_path):
    voc = write_labels(tmp_path / "VOCdevkit" / "VOC2012", "voc")
    write_augmented(voc, "beside VOCdevkit", MORE[2:])
    dataset = tmp_path / "benchmark_RELEASE/dataset"
    (dataset / "train.txt").write_text("\n".join(MORE[2:]))
    (dataset / "img").symlink_to(voc / "JPEGImages")
    theirs = SBDataset(str(dataset), "train", "segmentation")
    ours = find_labels(tmp_path, "voc", "train")[1]
    labels = {name: labels for name, (_, labels) in zip(names_of(ours), ours, strict=True)}
    for name, (_, target) in zip(MORE[2:], theirs, strict=True):
        np.testing.assert_array_equal(labels[name], np.array(target))


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_no_image_of_val_is_trained_on_whatever_the_lists_and_the_augmented_set_hold(seed):
    dice = random.Random(seed)
    names = [f"2007_{i:06d}" for i in range(8)]
    train, val = (sorted(dice.sample(part, dice.randint(1, 4))) for part in (names[:4], names[4:]))
    with TemporaryDirectory() as folder:
        voc = write_labels(Path(folder) / "VOC2012", "voc", {"train": train, "val": val})
        more = dice.sample(names, dice.randint(1, 8))
        write_augmented(voc, dice.choice(KINDS[:2]), more)
        assert names_of(find_labels(voc, None, "train")[1]) == sorted({*train, *more} - {*val})
        assert names_of(find_labels(voc, None, "val")[1]) == val


@pytest.mark.parametrize("split, augmented, missing", [("train", 0, "train"), ("val", 0, "val"), ("train", 1, "val")])
def test_a_missing_list_of_voc_is_named(tmp_path, split, augmented, missing):
    voc = write_labels(tmp_path / "VOC2012", "voc")
    if augmented:  # the list of val tells what may not be trained on
        write_augmented(voc, "png", MORE)
    path = voc / f"ImageSets/Segmentation/{missing}.txt"
    path.unlink()
    with told(FileNotFoundError, path, f"the {missing} part"):
        find_labels(tmp_path, None, split)


def test_labels_of_the_augmented_set_without_an_image_are_told(tmp_path):
    voc = write_labels(tmp_path / "VOC2012", "voc")
    write_augmented(voc, "png", MORE)
    (voc / f"JPEGImages/{MORE[3]}.jpg").unlink()
    with told(FileNotFoundError, voc / f"JPEGImages/{MORE[3]}.jpg", "missing"):
        find_labels(tmp_path, None, "train")


@pytest.mark.parametrize("spoil", ["empty", "cut", "text", "another", "size", "number"])
def test_spoilt_labels_of_the_augmented_set_are_told_with_their_file(tmp_path, spoil):
    voc = write_labels(tmp_path / "VOC2012", "voc")
    write_augmented(voc, "beside VOC2012", MORE)
    path = tmp_path / f"benchmark_RELEASE/dataset/cls/{MORE[2]}.mat"
    if spoil == "cut":
        cut_short(path)
    elif spoil == "another":
        savemat(path, {"GTinst": {"Segmentation": np.zeros((12, 16), np.uint8)}})
    elif spoil == "size":
        savemat_of(path, random_ids(0, [0], 11, 16))
    elif spoil == "number":
        savemat_of(path, random_ids(0, [0, 21]))
    else:
        path.write_bytes(b"" if spoil == "empty" else b"no labels " * 50)
    training = find_labels(tmp_path, None, "train")[1]
    words = {"size": ("labels of 16x11", "16x12"), "number": ("holds 21",)}
    with told(ValueError, path, *words.get(spoil, ("augmented VOC set",))):
        training[names_of(training).index(MORE[2])]


# ------------------------------------------------------------------------------------------- Cityscapes and the rest


@pytest.mark.parametrize("split", ["train", "val"])
def test_cityscapes_is_read_as_by_torchvision(tmp_path, split):
    write_labels(tmp_path, "cityscapes")
    theirs = Cityscapes(str(tmp_path), split, "fine", "semantic")
    ours = find_labels(tmp_path, None, split)[1]
    for image_path, target_paths in zip(theirs.images, theirs.targets, strict=True):
        (place,) = (i for i, (path, _) in enumerate(ours.files) if path == Path(image_path))
        image, labels = ours[place]
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.array(Image.open(image_path)))
        ids = np.array(Image.open(target_paths[0]))
        classes = {each.id: each.train_id for each in Cityscapes.classes}
        expected = np.vectorize(lambda number, classes=classes: classes[number] % 256)(ids)
        np.testing.assert_array_equal(labels, expected)
    assert ours.classes == tuple(c.name for c in Cityscapes.classes if 0 <= c.train_id < 19)


def test_cityscapes_from_ids_equals_cityscapes_from_classes_for_all_ids(tmp_path):
    write_labels(tmp_path, "cityscapes")
    by_id = [labels for _, labels in find_labels(tmp_path, None, "train")[1]]
    for path in tmp_path.rglob("*_labelIds.png"):
        ids = np.array(Image.open(path))
        assert {*np.unique(ids)} == {*range(34)}
        beside = path.with_name(path.name.replace("_labelIds", "_labelTrainIds"))
        write_ids(beside, np.vectorize(lambda number: TRAIN_IDS.get(number, 255))(ids), "L")
        path.unlink()
    by_class = find_labels(tmp_path, None, "train")[1]
    assert all(path.name.endswith("_gtFine_labelTrainIds.png") for _, path in by_class.files)
    for theirs, (_, ours) in zip(by_id, by_class, strict=True):
        assert torch.equal(theirs, ours) and (ours == VOID).any()


def test_cityscapes_takes_the_classes_where_both_are_there_and_19_is_none(tmp_path):
    write_labels(tmp_path, "cityscapes")
    image, ids = find_labels(tmp_path, None, "val")[1].files[0]
    classes = write_ids(ids.with_name(ids.name.replace("_labelIds", "_labelTrainIds")), random_ids(5, [0, 18, 255]))
    for other in ("color", "instanceIds"):
        write_ids(ids.with_name(ids.name.replace("labelIds", other)), random_ids(6, [77]))
    validation = find_labels(tmp_path, None, "val")[1]
    assert validation.files == [(image, classes)]
    np.testing.assert_array_equal(validation[0][1], random_ids(5, [0, 18, 255]))
    write_ids(classes, random_ids(5, [0, 19]))
    with told(ValueError, classes, "holds 19,", "0 to 18,"):
        find_labels(tmp_path, None, "val")[1][0]


def test_a_folder_of_images_named_train_is_not_camvid(tmp_path):
    write_image(tmp_path / "train/a.png", 12, 16)
    with told(FileNotFoundError, tmp_path, "no train part"):
        find_labels(tmp_path, None, "train")


def test_camvid_may_hold_jpegs_and_other_files_between(tmp_path):
    write_image(tmp_path / "train/a.jpg", 12, 16)
    write_ids(tmp_path / "trainannot/a.png", random_ids(0, [0, 11]))
    (tmp_path / "train/Thumbs.db").touch()
    assert find_labels(tmp_path, None, "train")[1].files == [(tmp_path / "train/a.jpg", tmp_path / "trainannot/a.png")]


# ------------------------------------------------------------------------------------------------------ augmentation


def bright_and_dark(seed: int, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks of 8x8 px: class 18 is light grey, class 3 dark grey; the changes of colour keep this order."""
    blocks = np.random.default_rng(seed).integers(0, 2, (-(-h // 8), -(-w // 8)))
    blocks.flat[:2] = 0, 1
    light = np.kron(blocks, np.ones((8, 8), np.int64))[:h, :w]
    image = torch.from_numpy(np.where(light, 200, 60).astype(np.uint8)).expand(3, -1, -1).contiguous()
    return image, torch.from_numpy(np.where(light, 18, 3))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, h=st.integers(1, 50), w=st.integers(1, 50), crop=st.integers(1, 40), size=st.integers(4, 40))
def test_augmented_images_and_labels_have_the_size_and_the_kind_that_is_promised(seed, h, w, crop, size):
    torch.manual_seed(seed)
    image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    labels = torch.randint(0, 2, (h, w)) * 18 + 2
    copies = image.clone(), labels.clone()
    picture, moved = LabelAugmentation(crop, size)(image, labels)
    assert type(picture) is type(moved) is torch.Tensor
    assert (picture.dtype, moved.dtype) == (torch.float32, torch.int64)
    assert picture.shape == (3, crop, crop) and moved.shape == (crop, crop)
    assert picture.min() >= 0 and picture.max() <= 1
    assert set(moved.unique().tolist()) <= {2, 20, VOID}  # never a class in between
    assert torch.equal(image, copies[0]) and torch.equal(labels, copies[1])


@settings(max_examples=40, deadline=None)
@given(seed=seeds, h=st.sampled_from([24, 32, 56]), w=st.sampled_from([24, 40, 64]), crop=st.integers(16, 64))
def test_labels_are_moved_with_the_image(seed, h, w, crop):
    torch.manual_seed(seed)
    image, labels = LabelAugmentation(crop, min(h, w))(*bright_and_dark(seed, h, w))
    known = labels != VOID
    inside = known & (labels == 18)
    # Near a border of two classes, which may lie just outside of the crop, the colours mix.
    light, dark = (F.max_pool2d(1.0 - each[None].float(), 5, 1)[0] == 0 for each in (inside, known & ~inside))
    assume(light.any() and dark.any())
    grey = image.mean(dim=0)[2:-2, 2:-2]
    assert grey[light].min() > grey[dark].max()


def test_the_image_is_flipped_in_half_of_the_cases_and_its_labels_with_it():
    labels = torch.arange(16).repeat(16, 1)
    image = (15 * labels).to(torch.uint8).expand(3, -1, -1).contiguous()
    augment, flipped = LabelAugmentation(16, 16, scale=(1.0, 1.0)), 0
    for seed in range(60):
        torch.manual_seed(seed)
        picture, moved = augment(image, labels)
        turned = torch.equal(moved, labels.flip(1))
        assert turned or torch.equal(moved, labels)
        slope = picture[:, :, -1].mean() - picture[:, :, 0].mean()
        assert (slope < 0) == turned
        flipped += turned
    assert 15 <= flipped <= 45


def test_the_shorter_side_is_brought_to_the_size_times_a_factor_of_the_scale():
    image, labels = bright_and_dark(0, 20, 30)
    shapes = set()
    for seed in range(100):
        torch.manual_seed(seed)
        moved = LabelAugmentation(64, 16)(image, labels)[1]
        rows, columns = ((moved != VOID).any(dim=dim).sum().item() for dim in (1, 0))
        assert (moved != VOID).sum() == rows * columns  # the image is whole
        assert abs(columns - 1.5 * rows) <= 1 and 8 <= rows <= 32
        shapes.add(rows)
    assert min(shapes) <= 10 and max(shapes) >= 30 and len(shapes) > 15


def test_a_crop_may_lie_anywhere_in_a_larger_image():
    labels = torch.arange(144).view(12, 12)
    image = torch.zeros(3, 12, 12, dtype=torch.uint8)
    corners = set()
    for seed in range(100):
        torch.manual_seed(seed)
        moved = LabelAugmentation(10, 12, scale=(1.0, 1.0))(image, labels)[1]
        top, left = divmod(moved.min().item(), 12)
        expected = labels[top : top + 10, left : left + 10]
        assert torch.equal(moved, expected) or torch.equal(moved, expected.flip(1))
        corners.add((top, left))
    assert corners == {(top, left) for top in range(3) for left in range(3)}


def test_padding_is_void_lies_on_any_side_and_has_the_mean_colour_before_colours_change():
    image, labels = bright_and_dark(0, 16, 16)
    mean, grey = torch.tensor([124, 116, 104]) / 255, {60, 200}
    unchanged, corners = 0, set()
    for seed in range(200):
        torch.manual_seed(seed)
        picture, moved = LabelAugmentation(20, 16, scale=(1.0, 1.0))(image, labels)
        padding = moved == VOID
        assert padding.sum() == 20**2 - 16**2
        corners.add(tuple((~padding).nonzero()[0].tolist()))
        colours = picture[:, padding].unique(dim=1)
        assert colours.shape == (3, 1)
        if set((255 * picture[:, ~padding]).round().int().unique().tolist()) == grey:
            unchanged += (colours[:, 0] - mean).abs().max().item() < 1e-4
    assert unchanged > 3 and corners == {(top, left) for top in range(5) for left in range(5)}


def test_colours_change_from_draw_to_draw_and_labels_do_not():
    image = torch.tensor([90, 120, 160], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8).contiguous()
    labels = torch.full((8, 8), 4)
    colours = set()
    for seed in range(30):
        torch.manual_seed(seed)
        picture, moved = LabelAugmentation(8, 8, scale=(1.0, 1.0))(image, labels)
        assert torch.equal(moved, labels)
        colours.add(tuple((255 * picture[:, 4, 4]).round().int().tolist()))
    assert len(colours) > 15


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_all_that_is_random_in_the_augmentation_comes_from_torchs_seed(seed):
    image, labels = bright_and_dark(seed, 30, 40)
    results = []
    for number, other in ((seed, 1), (seed, 2), (seed + 1, 2)):
        torch.manual_seed(number)
        random.seed(other)
        np.random.seed(other)
        results.append(LabelAugmentation(24, 24)(image, labels))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))


def test_the_loader_gives_batches_of_labelled_images(tmp_path):
    write_labels(tmp_path, "voc")
    for dataset in (find_labels(tmp_path, None, "train")[1], ShapeLabels(100, (24, 32), seed=0)):
        batches = [next(iter(make_loader(dataset, LabelAugmentation(20, 24), 3, seed=5))) for _ in range(2)]
        (images, labels), again = batches
        assert images.shape == (3, 3, 20, 20) and images.dtype == torch.float32
        assert labels.shape == (3, 20, 20) and labels.dtype == torch.int64
        assert torch.equal(images, again[0]) and torch.equal(labels, again[1])


# ------------------------------------------------------------------------------------------------------------- DAVIS


def write_sequence(
    home: Path, name: str, masks: list[np.ndarray | None], resolution: str = "480p", mode: str = "P"
) -> None:
    """Frames of a sequence in the size of its masks, and those of its masks that are not None."""
    h, w = masks[0].shape
    for index, mask in enumerate(masks):
        write_image(home / "JPEGImages" / resolution / name / f"{index:05d}.jpg", h, w, index)
        if mask is not None:
            write_ids(home / "Annotations" / resolution / name / f"{index:05d}.png", mask, mode)


def block(number: int = 1, h: int = 12, w: int = 16) -> np.ndarray:
    mask = np.zeros((h, w), np.uint8)
    mask[3:8, 4:10] = number
    return mask


def write_davis(home: Path, names: list[str], resolution: str = "480p", white: bool = False) -> Path:
    for name in names:
        write_sequence(home, name, 3 * [block(255 if white else 1)], resolution)
    return home


def write_lists(home: Path, folder: str, files: bool, **lists: list[str]) -> None:
    """Of DAVIS 2016 (the files of each sequence) or 2017 (its name)."""
    (home / "ImageSets" / folder).mkdir(parents=True, exist_ok=True)
    for split, names in lists.items():
        lines = names
        if files:
            place = folder + "/{}/{:05d}"
            lines = [
                f"/JPEGImages/{place}.jpg /Annotations/{place}.png".format(name, i, name, i)
                for name in names
                for i in range(3)
            ]
        (home / "ImageSets" / folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def davis_names(root: Path, *options, **more) -> list[str]:
    return [video.name for video in find_masked_videos(root, *options, **more)[0]]


@pytest.mark.parametrize("files, folder", [(False, "2017"), (True, "480p")])
def test_davis_2016_and_2017_give_the_sequences_of_their_list_in_its_order(tmp_path, files, folder):
    write_davis(tmp_path, ["bear", "dogs-jump", "camel", "swing"])
    write_lists(tmp_path, folder, files, train=["swing", "bear"], val=["dogs-jump", "camel"])
    videos, notes = find_masked_videos(tmp_path)
    assert [video.name for video in videos] == ["dogs-jump", "camel"] and notes == []
    assert davis_names(tmp_path, "train") == ["swing", "bear"]
    for kind, suffix, paths in (("JPEGImages", "jpg", videos[1].frames), ("Annotations", "png", videos[1].masks)):
        assert paths == [tmp_path / kind / "480p" / "camel" / f"{i:05d}.{suffix}" for i in range(3)]


@pytest.mark.parametrize("depth", range(3))
def test_davis_is_found_up_to_two_folders_deeper(tmp_path, depth):
    home = write_davis(tmp_path / "root" / "disk" / "DAVIS", ["bear"])
    write_lists(home, "2017", False, val=["bear"])
    assert davis_names((home, *home.parents)[depth]) == ["bear"]


def test_davis_three_folders_deeper_is_not_found(tmp_path):
    write_davis(tmp_path / "root" / "a" / "b" / "DAVIS", ["bear"])
    with told(FileNotFoundError, tmp_path / "root", "no DAVIS", "JPEGImages/480p/SEQUENCE/00000.jpg"):
        find_masked_videos(tmp_path / "root")
    with told(FileNotFoundError, tmp_path / "nowhere", "no such folder"):
        find_masked_videos(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", ["JPEGImages", "Annotations"])
def test_frames_or_masks_alone_are_not_davis(tmp_path, missing):
    write_davis(tmp_path, ["bear"])
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with told(FileNotFoundError, tmp_path, "no DAVIS"):
        find_masked_videos(tmp_path)


def test_the_year_chooses_the_list_and_2017_is_taken_by_itself(tmp_path):
    write_davis(tmp_path, ["bear", "camel", "dogs-jump", "swing"])
    write_lists(tmp_path, "480p", True, val=["bear"])
    assert davis_names(tmp_path) == davis_names(tmp_path, "val", "2016") == ["bear"]
    write_lists(tmp_path, "2016", False, val=["camel"])
    write_lists(tmp_path, "2017", False, val=["dogs-jump", "camel"], **{"test-dev": ["swing"]})
    assert davis_names(tmp_path) == davis_names(tmp_path, "val", "2017") == ["dogs-jump", "camel"]
    assert davis_names(tmp_path, "val", "2016") == ["camel"]
    assert davis_names(tmp_path, "test-dev") == ["swing"]


def test_without_a_list_all_sequences_are_taken_and_a_note_says_so(tmp_path):
    home = write_davis(tmp_path / "DAVIS", ["swing", "bear"])
    videos, (note,) = find_masked_videos(tmp_path)
    assert [video.name for video in videos] == ["bear", "swing"]
    assert "ImageSets/2017/val.txt" in note and "all 2 sequences" in note
    write_lists(home, "2017", False, val=["swing"])
    assert find_masked_videos(tmp_path)[1] == []
    with told(FileNotFoundError, home / "ImageSets/2017/train.txt", "no such list; choose another --split"):
        find_masked_videos(tmp_path, "train")


def test_the_resolution_is_480p_or_the_only_one_or_the_one_that_is_named(tmp_path):
    write_davis(tmp_path, ["bear"], "240p")
    write_image(tmp_path / "JPEGImages/1080p/bear/00000.jpg", 12, 16)  # without masks: none to choose
    assert davis_names(tmp_path) == ["bear"]
    write_davis(tmp_path, ["camel"], "Full-Resolution")
    with told(FileNotFoundError, tmp_path / "JPEGImages/480p", "--resolution can be 240p, Full-Resolution"):
        find_masked_videos(tmp_path)
    assert davis_names(tmp_path, resolution="240p") == ["bear"]
    assert davis_names(tmp_path, resolution="Full-Resolution") == ["camel"]
    write_davis(tmp_path, ["swing"], "480p")
    assert davis_names(tmp_path) == ["swing"]
    with told(FileNotFoundError, tmp_path / "JPEGImages/1080p", "240p, 480p, Full-Resolution"):
        find_masked_videos(tmp_path, resolution="1080p")


def test_davis_without_any_resolution_is_told(tmp_path):
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / kind).mkdir()
    with told(FileNotFoundError, tmp_path, "no DAVIS in it"):
        find_masked_videos(tmp_path)
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / kind / "480p").mkdir()
    with told(FileNotFoundError, tmp_path / "JPEGImages/480p", "no sequence"):
        find_masked_videos(tmp_path)


def test_an_empty_list_is_told(tmp_path):
    write_davis(tmp_path, ["bear"])
    write_lists(tmp_path, "2017", False, val=["", " "])
    with told(FileNotFoundError, tmp_path / "ImageSets/2017/val.txt", "no sequence"):
        find_masked_videos(tmp_path)


def test_davis_in_several_folders_is_told_with_each(tmp_path):
    homes = [write_davis(tmp_path / name, ["bear"]) for name in ("DAVIS2016", "DAVIS2017")]
    with told(ValueError, *homes, "--data-root"):
        find_masked_videos(tmp_path)
    assert davis_names(homes[1]) == ["bear"]


def test_a_sequence_needs_the_mask_of_its_first_frame_and_no_other(tmp_path):
    write_sequence(tmp_path, "bear", [block(), None, block(), None])
    masks = find_masked_videos(tmp_path)[0][0].masks
    assert [mask and mask.name for mask in masks] == ["00000.png", None, "00002.png", None]
    first = tmp_path / "Annotations/480p/bear/00000.png"
    first.unlink()
    with told(FileNotFoundError, first, "the mask of its first frame"):
        find_masked_videos(tmp_path)


def test_a_listed_sequence_without_frames_is_told(tmp_path):
    write_davis(tmp_path, ["bear"])
    write_lists(tmp_path, "2017", False, val=["bear", "camel"])
    folder = tmp_path / "JPEGImages/480p/camel"
    with told(FileNotFoundError, folder):
        find_masked_videos(tmp_path)
    folder.mkdir()
    with told(FileNotFoundError, folder, "no frames"):
        find_masked_videos(tmp_path)


def test_frames_are_in_natural_order_and_masks_are_those_of_their_names(tmp_path):
    for index in (2, 10, 9, 1):
        write_image(tmp_path / f"JPEGImages/480p/bear/{index}.jpg", 12, 16)
        write_ids(tmp_path / f"Annotations/480p/bear/{index}.png", block())
    write_image(tmp_path / "JPEGImages/480p/bear/more/3.jpg", 12, 16)  # in a folder of its own
    (video,) = find_masked_videos(tmp_path)[0]
    assert [path.name for path in video.frames] == ["1.jpg", "2.jpg", "9.jpg", "10.jpg"]
    assert [path.name for path in video.masks] == ["1.png", "2.png", "9.png", "10.png"]


def test_what_a_mac_leaves_in_davis_is_no_frame_and_no_sequence(tmp_path):
    home = write_davis(tmp_path / "root" / "DAVIS", ["bear", "camel"])
    for folder in (".hidden", "__MACOSX"):
        write_sequence(home, folder, [block()])
    spoil_as_a_mac_does(tmp_path / "root")
    videos, _ = find_masked_videos(tmp_path / "root")
    assert [(video.name, len(video.frames), len(video.masks)) for video in videos] == [("bear", 3, 3), ("camel", 3, 3)]
    assert not any(path.name.startswith(".") for video in videos for path in (*video.frames, *video.masks))


# ----------------------------------------------------------------------------------------- the objects of a sequence


def opened(home: Path, masks: list[np.ndarray | None], one_object: bool = False, mode: str = "P"):
    write_sequence(home, "bear", masks, mode=mode)
    return open_video(find_masked_videos(home)[0][0], one_object)


def two_blocks(first: int, second: int, void: int | None = None) -> np.ndarray:
    mask = block(first)
    mask[9:11, 2:14] = second
    if void is not None:
        mask[:2, 5:] = void
    return mask


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "RGBA", "I;16"])
def test_numbers_of_objects_stay_as_they_are_and_need_not_be_consecutive(tmp_path, mode):
    masks = [two_blocks(3, 1), two_blocks(1, 3), None, block(7)]
    video = opened(tmp_path, masks, mode=mode)
    assert (video.name, video.objects, video.length) == ("bear", [1, 3], 4)
    assert video.masks(2) is None
    for index in (0, 1, 3):
        read = video.masks(index)
        assert read.dtype == torch.uint8
        np.testing.assert_array_equal(read, masks[index])
        assert torch.equal(video.frames(index), load_image(tmp_path / f"JPEGImages/480p/bear/{index:05d}.jpg"))


def test_void_is_no_object_and_stays_void_beside_other_numbers(tmp_path):
    masks = [two_blocks(1, 3, VOID), block(255), two_blocks(3, 1, VOID)]
    video = opened(tmp_path, masks)
    assert video.objects == [1, 3]
    for index, mask in enumerate(masks):  # also where a later mask holds void alone
        np.testing.assert_array_equal(video.masks(index), mask)


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("one_object", [False, True])
def test_a_white_mask_shows_one_object_number_1(tmp_path, one_object, mode):
    masks = [block(255), 0 * block(), two_blocks(255, 255)]
    video = opened(tmp_path, masks, one_object, mode)
    assert video.objects == [1]
    for index, mask in enumerate(masks):
        np.testing.assert_array_equal(video.masks(index), mask > 0)
        assert video.masks(index).dtype == torch.uint8


def test_a_mask_of_one_bit_shows_one_object_number_1(tmp_path):
    video = opened(tmp_path, [block(1), block(1)], mode="1")
    assert video.objects == [1]
    np.testing.assert_array_equal(video.masks(1), block(1))


def test_one_object_merges_all_numbers_but_void(tmp_path):
    masks = [two_blocks(3, 1, VOID), two_blocks(1, 0), block(9), block(VOID)]
    video = opened(tmp_path, masks, one_object=True)
    assert video.objects == [1]
    for index, mask in enumerate(masks):
        np.testing.assert_array_equal(video.masks(index), np.where(mask == VOID, VOID, mask > 0))
        assert video.masks(index).dtype == torch.uint8


@pytest.mark.parametrize("one_object", [False, True])
def test_an_empty_first_mask_is_told_and_a_later_one_is_not(tmp_path, one_object):
    video = opened(tmp_path / "later", [block(), 0 * block()], one_object)
    assert not video.masks(1).any()
    with told(ValueError, tmp_path / "first/Annotations/480p/bear/00000.png", "no object"):
        opened(tmp_path / "first", [0 * block(), block()], one_object)


@pytest.mark.parametrize("size", [(11, 16), (12, 15), (16, 12)])
def test_a_mask_or_a_frame_of_another_size_than_the_first_mask_is_told(tmp_path, size):
    video = opened(tmp_path, 3 * [block()])
    mask = write_ids(tmp_path / "Annotations/480p/bear/00001.png", block(1, *size))
    frame = write_image(tmp_path / "JPEGImages/480p/bear/00002.jpg", *size)
    shown = f"{size[1]}x{size[0]} px"
    with told(ValueError, mask, shown, "16x12 px"):
        video.masks(1)
    with told(ValueError, frame, shown, "16x12 px"):
        video.frames(2)
    assert video.frames(1).shape[1:] == video.masks(2).shape == (12, 16)


def test_a_broken_mask_or_frame_is_told_when_it_is_read(tmp_path):
    video = opened(tmp_path, 3 * [block()])
    mask, frame = (
        cut_short(tmp_path / p) for p in ("Annotations/480p/bear/00001.png", "JPEGImages/480p/bear/00002.jpg")
    )
    with told(ValueError, mask):
        video.masks(1)
    with told(ValueError, frame):
        video.frames(2)
    cut_short(tmp_path / "Annotations/480p/bear/00000.png")
    with told(ValueError, tmp_path / "Annotations/480p/bear/00000.png"):
        open_video(find_masked_videos(tmp_path)[0][0], False)


# -------------------------------------------------------------------------------------------- the video benchmark

H, W = 48, 64
COLOURS = {1: (200, 60, 60), 2: (60, 180, 70), 3: (70, 80, 210), 7: (220, 210, 60)}


def paint(masks: list[np.ndarray], noise: float) -> list[np.ndarray]:
    """Frames: a colour for each number, on grey; the same grain runs over all."""
    frames = []
    for index, mask in enumerate(masks):
        frame = np.full((*mask.shape, 3), 120.0)
        for number, colour in COLOURS.items():
            frame[mask == number] = colour
        frame += noise * np.random.default_rng(index).standard_normal(frame.shape)
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return frames


def write_painted(home: Path, name: str, masks: list[np.ndarray], stored: list[np.ndarray | None], noise: float):
    """A sequence of frames that show `masks`, of which `stored` lie there."""
    write_sequence(home, name, [np.zeros((H, W), np.uint8)] + [None] * (len(masks) - 1))
    for index, (frame, mask) in enumerate(zip(paint(masks, noise), stored, strict=True)):
        path = home / f"JPEGImages/480p/{name}/{index:05d}.jpg"
        Image.fromarray(frame).save(path, quality=100, subsampling=0)
        if mask is not None:
            write_ids(home / f"Annotations/480p/{name}/{index:05d}.png", mask)


def scene_of(boxes: dict[int, tuple[int, int, int, int]]) -> np.ndarray:
    """A mask with a box (top, left, height, width) for each number."""
    mask = np.zeros((H, W), np.uint8)
    for number, (top, left, height, width) in boxes.items():
        mask[top : top + height, left : left + width] = number
    return mask


def write_three_sequences(home: Path) -> None:
    """Two objects; numbers 1 and 3, a stranger and a missing mask; one object and void pixels. The ends mislead."""
    runs = [scene_of({1: (5 + t, 6 + 3 * t, 14, 13), 2: (23, 41 - 2 * t, 17, 15)}) for t in range(6)]
    wrong_end = scene_of({1: (0, 0, H, W // 2), 2: (0, W // 2, H, W // 2)})
    write_painted(home, "apples", runs, [*runs[:5], wrong_end], 30)
    runs = [
        scene_of({3: (9, 8 + 2 * t, 18, 12), 1: (30 - t, 37, 11, 19)} | ({7: (2, 45, 9, 9)} if t > 2 else {}))
        for t in range(5)
    ]
    write_painted(home, "bikes", runs, [runs[0], runs[1], None, runs[3], runs[4]], 30)
    runs = [scene_of({1: (12, 5 + 4 * t, 20, 17)}) for t in range(6)]
    stored = [mask.copy() for mask in runs]
    for t, mask in enumerate(stored):
        mask[14:22, 10 + 4 * t : 30 + 4 * t] = 255
        mask[40:, :20] = 255
    write_painted(home, "cars", runs, stored, 30)
    write_painted(home, "dogs", runs, runs, 30)
    write_lists(home, "2017", False, train=["dogs"], val=["cars", "apples", "bikes"])


def measured_by_hand(home: Path, export: Path, name: str, ends: int = 1, void: bool = True) -> dict:
    """J and F of each object in each frame but so many ends, from the files alone."""
    count = len(list((home / f"JPEGImages/480p/{name}").iterdir()))
    first = np.array(Image.open(home / f"Annotations/480p/{name}/00000.png"))
    numbers = {n: {"J": [], "F": []} for n in np.unique(first).tolist() if n not in (0, 255)}
    for index in range(ends, count - ends):
        path = home / f"Annotations/480p/{name}/{index:05d}.png"
        if not path.is_file():
            continue
        truth, guess = (np.array(Image.open(p)) for p in (path, export / name / path.name))
        seen = truth != 255 if void else truth == truth
        for number, values in numbers.items():
            a, b = (truth == number) & seen, (guess == number) & seen
            values["J"].append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
            values["F"].append(contour_accuracy(torch.from_numpy(a), torch.from_numpy(b)))
    return numbers


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Three sequences, measured by colour: folder, masks, numbers in video.json, what was given back, the screen."""
    root = tmp_path_factory.mktemp("video")
    home = root / "data" / "DAVIS"
    write_three_sequences(home)
    config = VideoConfig(
        "colour", root / "data", output_dir=root / "out", export=root / "masks", stride=4, size=48, pictures=1, radius=4
    )
    with redirect_stdout(StringIO()) as screen:
        report = run_video(config)
    return home, root / "masks", json.loads((root / "out/video.json").read_text()), report, screen.getvalue()


def test_every_frame_gets_a_palette_png_in_daviss_colours_with_the_numbers_of_the_first_mask(benchmark):
    home, export, _, _, _ = benchmark
    assert {path.name for path in export.iterdir()} == {"apples", "bikes", "cars"}
    for folder in export.iterdir():
        frames = sorted((home / "JPEGImages/480p" / folder.name).iterdir())
        masks = sorted(folder.iterdir())
        assert [mask.name for mask in masks] == [f"{frame.stem}.png" for frame in frames]
        first = np.array(Image.open(home / f"Annotations/480p/{folder.name}/00000.png"))
        first[first == 255] = 0  # void is no object
        for index, path in enumerate(masks):
            image = Image.open(path)
            assert image.mode == "P" and image.size == (W, H)
            np.testing.assert_array_equal(np.resize(image.getpalette(), (256, 3)), colours_bit_by_bit())
            assert set(np.unique(image)) <= set(np.unique(first)), path
            if index == 0:
                np.testing.assert_array_equal(np.array(image), first)
        assert set(np.unique(np.array(Image.open(masks[-1])))) == set(np.unique(first))  # none is lost here


def test_j_and_f_in_the_report_are_those_of_the_exported_masks_without_the_first_and_the_last_frame(benchmark):
    home, export, stored, _, _ = benchmark
    values = []
    for name, sequence in stored["sequences"].items():
        expected = measured_by_hand(home, export, name)
        assert sequence["objects"].keys() == {str(number) for number in expected}
        assert sequence["frames"] == len(list((export / name).iterdir()))
        for number, each in expected.items():
            ours = sequence["objects"][str(number)]
            for metric in ("J", "F"):
                assert ours[metric]["frames"] == pytest.approx(each[metric])
                assert ours[metric]["mean"] == pytest.approx(np.mean(each[metric]))
                assert ours[metric]["recall"] == pytest.approx(np.mean([value > 0.5 for value in each[metric]]))
            values.append((np.mean(each["J"]), np.mean(each["F"])))
    assert len(values) == 5 and all(0.3 < j < 0.999 for j, _ in values)  # neither lost nor perfect: the numbers tell
    assert len(stored["sequences"]["bikes"]["objects"]["1"]["J"]["frames"]) == 2


def test_the_total_is_the_mean_over_objects_each_counted_alike(benchmark):
    home, export, stored, report, screen = benchmark
    objects = [each for name in ("apples", "bikes", "cars") for each in measured_by_hand(home, export, name).values()]
    j, f = (np.mean([np.mean(each[metric]) for each in objects]) for metric in ("J", "F"))
    mean = stored["mean"]
    assert (mean["J_mean"], mean["F_mean"]) == pytest.approx((j, f))
    assert mean["J&F"] == pytest.approx((j + f) / 2)
    by_sequence = np.mean(
        [np.mean([np.mean(o["J"]) for o in measured_by_hand(home, export, n).values()]) for n in stored["sequences"]]
    )
    assert abs(by_sequence - j) > 1e-4  # another mean, which would be seen
    assert report["mean"] == mean
    (line,) = (line for line in screen.splitlines() if line.startswith("mean over objects"))
    assert line.split()[3] == "5" and [float(n) for n in line.split()[4:6]] == pytest.approx(
        [50 * (j + f), 100 * j], abs=0.0051
    )


def test_the_decay_is_that_of_the_first_to_the_last_quarter(benchmark):
    home, export, stored, _, _ = benchmark
    for number, each in measured_by_hand(home, export, "apples").items():
        for metric, values in each.items():  # four frames: the quarters share frames, those at the ends have two each
            decay = stored["sequences"]["apples"]["objects"][str(number)][metric]["decay"]
            assert decay == pytest.approx(np.mean(values[:2]) - np.mean(values[2:]))


def test_void_pixels_never_count(benchmark):
    home, export, stored, _, _ = benchmark
    ours = stored["sequences"]["cars"]["objects"]["1"]["J"]["frames"]
    without, with_void = (measured_by_hand(home, export, "cars", void=void)[1]["J"] for void in (True, False))
    assert ours == pytest.approx(without)
    assert all(abs(a - b) > 0.01 for a, b in zip(without, with_void, strict=True))
    assert "255" not in stored["sequences"]["cars"]["objects"] and not stored["sequences"]["cars"]["note"]


def test_frames_without_a_mask_and_objects_that_the_first_mask_does_not_have_are_noted(benchmark):
    _, _, stored, _, screen = benchmark
    (note,) = stored["notes"]
    assert (
        note.startswith("bikes: ") and "frames without a mask: 1" in note and "objects 7 not in the first mask" in note
    )
    assert f"note: {note}\n" in screen
    assert [each["note"] for name, each in stored["sequences"].items() if name != "bikes"] == ["", ""]


def test_the_report_and_as_many_pictures_and_videos_as_are_wanted_are_written(benchmark):
    home, export, stored, _, screen = benchmark
    out = export.parent / "out"
    assert list(stored["sequences"]) == ["cars", "apples", "bikes"]  # as the list has them
    assert {path.name for path in out.iterdir()} == {"video.json", "cars.png", "cars.mp4"}
    video = cv2.VideoCapture(str(out / "cars.mp4"))
    frames = 0
    while video.read()[0]:
        frames += 1
    assert frames == 6
    assert stored["settings"]["size"] == 48 and stored["settings"]["model"] == "colour"
    assert f"masks of 3 sequences: {export}\n" in screen and f"numbers, pictures and videos: {out}\n" in screen


def run_quietly(**options) -> dict:
    with redirect_stdout(StringIO()):
        return run_video(VideoConfig(**{"model": "colour", "stride": 4, "size": 48, "pictures": 0} | options))


def test_a_sequence_that_is_not_wanted_need_not_be_there(tmp_path):
    write_three_sequences(tmp_path)
    shutil.rmtree(tmp_path / "JPEGImages/480p/apples")
    with pytest.raises(FileNotFoundError, match="apples"):
        run_quietly(data_root=tmp_path, output_dir=tmp_path / "out")
    report = run_quietly(data_root=tmp_path, output_dir=tmp_path / "out", sequences=("cars",))
    assert list(report["sequences"]) == ["cars"]
    with pytest.raises(ValueError, match="--sequences: there is no pears in .* \\(--split val\\)"):
        run_quietly(data_root=tmp_path, output_dir=tmp_path / "out", sequences=("cars", "pears"))


def test_what_was_measured_before_a_broken_file_is_written(tmp_path):
    write_three_sequences(tmp_path)
    cut_short(tmp_path / "Annotations/480p/bikes/00003.png")
    with pytest.raises(ValueError, match="bikes/00003.png: not a readable image"), redirect_stdout(StringIO()):
        run_video(VideoConfig("colour", tmp_path, output_dir=tmp_path / "out", stride=4, size=48, pictures=0))
    report = json.loads((tmp_path / "out/video.json").read_text())
    assert list(report["sequences"]) == ["cars", "apples"] and "stopped before the end" in report["notes"][-1]


def test_a_frame_that_is_there_twice_is_told(tmp_path):
    write_three_sequences(tmp_path)
    shutil.copy(tmp_path / "JPEGImages/480p/cars/00001.jpg", tmp_path / "JPEGImages/480p/cars/00001.png")
    with pytest.raises(ValueError, match="cars/00001.png: this frame is there twice"):
        find_masked_videos(tmp_path)


def test_white_masks_need_not_be_pure_and_do_not_mix_with_numbers(tmp_path):
    boxes = [scene_of({1: (8, 8 + 2 * t, 16, 16)}) for t in range(4)]
    grey = [255 * boxes[0], np.where(boxes[1], 250, 9).astype(np.uint8), boxes[2], 255 * boxes[3]]
    write_painted(tmp_path / "a", "box", boxes, grey, noise=0)
    (video,), _ = find_masked_videos(tmp_path / "a")
    opened = open_video(video, one_object=False)
    assert all(np.array_equal(opened.masks(t).numpy(), boxes[t]) for t in range(4))
    write_painted(tmp_path / "b", "box", boxes, [boxes[0], 255 * boxes[1], *boxes[2:]], noise=0)
    with pytest.raises(ValueError, match="box/00001.png: a white mask, but the first has numbers"):
        run_quietly(data_root=tmp_path / "b", output_dir=tmp_path / "out")


def test_a_frame_that_is_void_everywhere_does_not_count(tmp_path):
    boxes = [scene_of({1: (8, 8 + 2 * t, 16, 16)}) for t in range(5)]
    everywhere = np.full((H, W), 255, np.uint8)
    write_painted(tmp_path, "box", boxes, [boxes[0], np.where(boxes[1], 1, 255), everywhere, *boxes[3:]], noise=0)
    with pytest.raises(ValueError, match="a white mask, but the first has numbers"):
        run_quietly(data_root=tmp_path, output_dir=tmp_path / "out")
    (video,), _ = find_masked_videos(tmp_path)
    opened = open_video(video, one_object=False)
    masks = lambda t: torch.from_numpy(everywhere) if t == 2 else opened.masks(t)  # noqa: E731
    measured = evaluate.measure_objects(opened._replace(masks=masks), [opened.masks(0)] * 5)
    assert len(measured["objects"][1]["J"]["frames"]) == 2
    assert measured["note"] == "frames that are void everywhere: 1"


def test_a_second_copy_of_a_set_is_told(tmp_path):
    for place in ("A", "B"):
        for split in ("train", "val"):
            write_image(tmp_path / place / split / "0.png", 12, 16)
            write_ids(tmp_path / place / f"{split}annot" / "0.png", random_ids(0, [0, 1]))
    _, labelled = find_labels(tmp_path, "camvid", "train")
    assert labelled.notes == (f"{tmp_path / 'B'}: another copy, not used",) and len(labelled) == 1


def test_an_object_that_leaves_counts_1_where_it_is_absent_and_is_found_when_it_returns(tmp_path):
    stays, guest = {1: (8, 8, 16, 16)}, {2: (24, 40, 16, 16)}
    runs = [scene_of(stays | (guest if there else {})) for there in (1, 1, 0, 0, 1, 1)]
    write_painted(tmp_path, "guest", runs, runs, noise=0)
    report = run_quietly(data_root=tmp_path, output_dir=tmp_path / "out", export=tmp_path / "masks")
    objects = report["sequences"]["guest"]["objects"]
    assert objects[2]["J"]["frames"][1:3] == objects[2]["F"]["frames"][1:3] == [1.0, 1.0]
    for index in (2, 3):
        assert 2 not in np.array(Image.open(tmp_path / f"masks/guest/{index:05d}.png"))
    assert min(objects[2]["J"]["frames"]) > 0.9 and min(objects[1]["J"]["frames"]) > 0.9
    assert report["notes"] == ["no ImageSets/2017/val.txt: all 1 sequences"]


def test_an_object_that_is_absent_in_truth_and_still_predicted_counts_0(tmp_path):
    shown = 5 * [scene_of({1: (8, 8, 16, 16), 2: (24, 40, 16, 16)})]
    stored = [shown[0], *4 * [scene_of({1: (8, 8, 16, 16)})]]
    write_painted(tmp_path, "ghost", shown, stored, noise=0)
    objects = run_quietly(data_root=tmp_path, output_dir=tmp_path / "out")["sequences"]["ghost"]["objects"]
    assert objects[2]["J"]["frames"] == objects[2]["F"]["frames"] == [0.0, 0.0, 0.0]


def test_davis_2016_takes_all_objects_as_one_and_the_sequences_of_its_list(tmp_path):
    runs = [scene_of({1: (8, 8 + t, 16, 16), 2: (24, 40, 16, 16)}) for t in range(4)]
    for name in ("bear", "camel"):
        write_painted(tmp_path, name, runs, runs, noise=20)
    write_lists(tmp_path, "2016", False, val=["camel"])
    write_lists(tmp_path, "2017", False, val=["bear"])
    options = {"data_root": tmp_path, "output_dir": tmp_path / "out", "export": tmp_path / "masks"}
    merged = run_quietly(benchmark="davis2016", **options)
    assert list(merged["sequences"]) == ["camel"] and list(merged["sequences"]["camel"]["objects"]) == [1]
    masks = [np.array(Image.open(path)) for path in sorted((tmp_path / "masks/camel").iterdir())]
    np.testing.assert_array_equal(masks[0], runs[0] > 0)
    for t, value in zip((1, 2), merged["sequences"]["camel"]["objects"][1]["J"]["frames"], strict=True):
        truth = runs[t] > 0
        assert value == pytest.approx((truth & (masks[t] == 1)).sum() / (truth | (masks[t] == 1)).sum())
    apart = run_quietly(benchmark="davis2017", **options | {"size": None, "stride": 16})
    assert apart["settings"]["size"] == 480  # unless it is given
    assert list(apart["sequences"]) == ["bear"] and list(apart["sequences"]["bear"]["objects"]) == [1, 2]


def test_a_sequence_with_its_first_mask_alone_is_exported_and_not_measured(tmp_path):
    runs = 4 * [scene_of({2: (8, 8, 16, 16)})]
    write_painted(tmp_path, "held-out", runs, [runs[0], None, None, None], noise=5)
    report = run_quietly(data_root=tmp_path, output_dir=tmp_path / "out", export=tmp_path / "masks")
    assert report["mean"] == {} and report["sequences"]["held-out"]["objects"] == {}
    assert "frames without a mask: 2" in report["notes"][1] and "nothing to measure" in report["notes"][1]
    assert len(list((tmp_path / "masks/held-out").iterdir())) == 4


def test_sequences_can_be_chosen_by_name_and_by_list(tmp_path):
    runs = 3 * [scene_of({1: (8, 8, 16, 16)})]
    for name in ("bear", "camel", "swing"):
        write_painted(tmp_path, name, runs, runs, noise=5)
    report = run_quietly(data_root=tmp_path, output_dir=tmp_path / "out", sequences=("swing", "bear"))
    assert list(report["sequences"]) == ["bear", "swing"]
    write_lists(tmp_path, "2017", False, train=["camel"], val=["swing"])
    report = run_quietly(data_root=tmp_path, output_dir=tmp_path / "out", split="train")
    assert list(report["sequences"]) == ["camel"] and report["notes"] == []
    with told(ValueError, "--sequences", "there is no bear, dog, zebra in"):
        run_quietly(data_root=tmp_path, output_dir=tmp_path / "out", sequences=("zebra", "bear", "dog"))


# ------------------------------------------------------------------------------------------------ bad input, as typed


def break_masks(home: Path) -> str:
    return str(cut_short(write_ids(home / "Annotations/480p/bear/00001.png", random_ids(0, [0, 1], 40, 50))))


def break_frame(home: Path) -> str:
    return str(cut_short(home / "JPEGImages/480p/bear/00002.jpg"))


def lose_first_mask(home: Path) -> str:
    (home / "Annotations/480p/bear/00000.png").unlink()
    return "00000.png: missing"


def empty_first_mask(home: Path) -> str:
    return f"{write_ids(home / 'Annotations/480p/bear/00000.png', 0 * block())}: no object"


def enlarge_mask(home: Path) -> str:
    return f"{write_ids(home / 'Annotations/480p/bear/00001.png', block(1, 13, 17))}: a mask of 17x13 px"


def colour_mask(home: Path) -> str:
    path = home / "Annotations/480p/bear/00000.png"
    Image.new("RGB", (16, 12), (1, 2, 3)).save(path)
    return f"{path}: colours"


def copy_davis(home: Path) -> str:
    write_davis(home.parent / "second", ["bear"])
    return "name one of them with --data-root"


def take_davis_away(home: Path) -> str:
    (home / "Annotations").rename(home / "Masks")
    return "no DAVIS in it"


@pytest.mark.parametrize(
    "spoil",
    [
        break_masks,
        break_frame,
        lose_first_mask,
        empty_first_mask,
        enlarge_mask,
        colour_mask,
        copy_davis,
        take_davis_away,
    ],
)
def test_files_that_cannot_be_followed_are_told_in_one_line(tmp_path, typed, spoil):
    home = write_davis(tmp_path / "data" / "DAVIS", ["bear"])
    options = ("--data-root", tmp_path / "data", "--stride", 4, "--size", 12, "--output-dir", tmp_path / "out")
    words = spoil(home)
    assert_one_line(typed("video", "--model", "colour", *options), words)
    assert not (tmp_path / "out/video.json").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (("--data-root", "{root}/nowhere"), ("nowhere", "no such folder")),
        (("--data-root", "{root}", "--resolution", "1080p"), ("1080p", "--resolution can be 480p")),
        (("--data-root", "{root}", "--sequences", "camel"), ("--sequences", "no camel")),
        (("--data-root", "{root}", "--size", "7"), ("--size at least --stride",)),
        (("--data-root", "{root}", "--size", "0"), ("--size at least --stride",)),
        (("--data-root", "{root}", "--stride", "0"), ("--stride",)),
        (("--data-root", "{root}", "--topk", "0"), ("--topk",)),
        (("--data-root", "{root}", "--temperature", "0"), ("--temperature",)),
        (("--data-root", "{root}", "--context", "-1"), ("--context",)),
        (("--data-root", "{root}", "--radius", "-1"), ("--radius",)),
        (("--benchmark", "davis2017"), ("--benchmark", "--data-root")),
        (("--sequences", "bear"), ("--sequences", "--data-root")),
        (("--resolution", "480p"), ("--resolution", "--data-root")),
        (("--shapes-frames", "2"), ("--shapes-frames",)),
        (("--shapes-count", "0"), ("--shapes-count",)),
        (("--shapes-size", "0"), ("--shapes-size",)),
        (("--pictures", "-1"), ("--pictures",)),
        (("--data-root", "{root}", "--model", "nothing.pt"), ("nothing.pt", "colour")),
        (("--data-root", "{root}", "--model", "{root}/JPEGImages/480p/bear/00000.jpg"), ("00000.jpg",)),
        (
            ("--data-root", "{root}", "--model", "random", "--encoder", "pwc", "--stride", "5", "--size", "10"),
            ("--stride 5", "8, 4, 2"),
        ),
    ],
)
def test_video_tells_what_was_typed_wrong_before_anything_is_written(tmp_path, typed, options, words):
    write_davis(tmp_path / "data", ["bear"])
    filled = [each.format(root=tmp_path / "data") for each in options]
    result = typed("video", "--model", "colour", *filled, "--output-dir", tmp_path / "out")
    assert_one_line(result, *words)
    assert not (tmp_path / "out").exists()


def test_a_broken_mask_as_a_user_meets_it(tmp_path):
    home = write_davis(tmp_path / "DAVIS", ["bear"])
    words = break_masks(home)
    options = ("--data-root", tmp_path, "--stride", 4, "--size", 12, "--output-dir", tmp_path / "out")
    run = in_subprocess("video", "--model", "colour", *options)
    assert_one_line((run.returncode, run.stdout, run.stderr), words)


SMALL = {"encoder": "pwc", "steps": 1, "crop": 16, "size": 16, "batch": 2}


@pytest.fixture
def untrained(typed, monkeypatch):
    """The command for segmentation, of which no training may begin."""
    monkeypatch.setattr(evaluate, "train_segmenter", lambda *arguments: pytest.fail("this trains"))
    return lambda *arguments: typed("segmentation", "--model", "random", *arguments)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--data-root", "{root}/nowhere"), ("nowhere", "no such folder")),
        (("--data-root", "{root}/voc/JPEGImages"), ("no train part of a data set", "leftImg8bit")),
        (("--data-root", "{root}"), ("holds", "voc", "camvid", "--benchmark")),
        (("--data-root", "{root}", "--benchmark", "ade20k"), ("no train part of ade20k", "annotations/training")),
        (("--data-root", "{root}/listless"), ("ImageSets/Segmentation/train.txt", "missing")),
        (("--data-root", "{root}/valless", "--benchmark", "camvid"), ("no val part of camvid",)),
        (("--benchmark", "voc"), ("--benchmark", "--data-root")),
        (("--data-root", "{root}/voc", "--crop", "0"), ("--crop",)),
        (("--data-root", "{root}/voc", "--size", "0"), ("--size",)),
        (("--data-root", "{root}/voc", "--batch", "-1"), ("--batch",)),
        (("--data-root", "{root}/voc", "--steps", "0"), ("--steps",)),
        (("--data-root", "{root}/voc", "--learning-rate", "0"), ("--learning-rate",)),
        (("--data-root", "{root}/voc", "--crop", "32", "--window-stride", "33"), ("--window-stride 33", "32")),
        (("--data-root", "{root}/voc", "--window-stride", "-1"), ("--window-stride",)),
        (("--data-root", "{root}/voc", "--workers", "-1"), ("--workers",)),
        (("--data-root", "{root}/voc", "--checkpoint-every", "0"), ("--checkpoint-every",)),
        (("--data-root", "{root}/voc", "--resume"), ("checkpoint.pt", "leave --resume out")),
        (("--data-root", "{root}/voc", "--model", "nothing.pt"), ("nothing.pt", "random")),
        (("--data-root", "{root}/voc", "--model", "{root}/voc/JPEGImages/2007_000032.jpg"), ("2007_000032.jpg",)),
        (("--shapes-count", "0"), ("--shapes-count",)),
    ],
)
def test_segmentation_tells_what_was_typed_wrong_before_anything_is_written(tmp_path, untrained, options, words):
    root = tmp_path / "data"
    write_labels(root / "voc", "voc")
    write_labels(root / "valless", "camvid", {"train": IMAGES["camvid"]["train"]})
    if "{root}/listless" in options:
        (write_labels(root / "listless", "voc") / "ImageSets/Segmentation/train.txt").unlink()
    filled = [each.format(root=root) for each in options]
    result = untrained("--encoder", "pwc", *filled, "--output-dir", tmp_path / "out")
    assert_one_line(result, *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_run_is_refused(tmp_path, untrained):
    write_labels(tmp_path / "voc", "voc")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint.pt").write_bytes(b"of another run")
    options = ("--data-root", tmp_path / "voc", "--encoder", "pwc", "--output-dir", tmp_path / "out")
    assert_one_line(untrained(*options), str(tmp_path / "out"), "--resume")
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == b"of another run"


def test_a_checkpoint_that_is_none_is_told(tmp_path, typed):
    write_labels(tmp_path / "voc", "voc")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint.pt").write_bytes(b"of another run")
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    options = ("--data-root", tmp_path / "voc", *flags, "--resume", "--output-dir", tmp_path / "out")
    assert_one_line(typed("segmentation", "--model", "random", *options), str(tmp_path / "out/checkpoint.pt"))


def test_labels_that_are_no_class_stop_the_training_with_their_file_and_number(tmp_path):
    write_labels(tmp_path, "camvid")
    paths = [write_ids(path, random_ids(0, [0, 12])) for path in sorted((tmp_path / "trainannot").iterdir())]
    with told(ValueError, paths[0].parent, "holds 12,", "0 to 11,"):
        run_segmentation(SegmentationConfig("random", tmp_path, output_dir=tmp_path / "out", **SMALL))
    assert not (tmp_path / "out/checkpoint.pt").exists()


def test_labels_of_another_size_than_their_image_as_a_user_meets_them_who_loads_in_other_processes(tmp_path):
    write_labels(tmp_path / "data", "camvid")
    for path in (tmp_path / "data/trainannot").iterdir():
        write_ids(path, random_ids(0, [0], 12, 15))
    flags = [f"--{name}={value}" for name, value in (SMALL | {"workers": 1}).items()]
    run = in_subprocess(
        "segmentation", "--model", "random", "--data-root", tmp_path, *flags, "--output-dir", tmp_path / "out"
    )
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert last.startswith(f"error: {tmp_path / 'data/trainannot'}") and "labels of 15x12 pixels" in last


def test_wrong_labels_of_val_are_told_when_they_are_measured(tmp_path, monkeypatch):
    write_labels(tmp_path, "ade20k")
    path = write_ids(tmp_path / "annotations/validation/ADE_val_00000001.png", random_ids(0, [0, 151]), "L")
    monkeypatch.setattr(evaluate, "train_segmenter", lambda *arguments: None)
    with told(ValueError, path, "holds 151,"):
        run_segmentation(SegmentationConfig("random", tmp_path, output_dir=tmp_path / "out", **SMALL))
