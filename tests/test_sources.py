"""Tests of sources/. Each is named after the claim that it checks.

No data set is needed: each is written small, in the folders and under the names of its archives.
"""

import random
import re
import struct
import tracemalloc
import zlib
from itertools import islice, pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import helpers
import numpy as np
import pytest
import torch
from helpers import expand, raises_one_line, random_ids, seeds, write_benchmark, write_ids, write_image, write_images
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.nn.functional import grid_sample
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.datasets import _optical_flow, utils

import sources.moving_shapes
import sources.training_sets
from data import BadFile, FlowAugmentation, FramePairs, ShardedStream, Stream, load_image, make_loader
from sources import MissingSet, label_sets
from sources.flow_benchmarks import FLOW_BENCHMARKS, find_benchmark, read_flow, read_pair, write_flow
from sources.label_sets import LABEL_SETS, PALETTE, VOID, find_labels, find_masked_videos, read_ids
from sources.moving_shapes import TEXTURES, MovingShapes, ShapeImages, ShapeLabels, ShapePairs
from sources.training_sets import VIDEO_SETS, ImageNet, Mix, RepeatsConfig, find_video_set, open_mix

# -------------------------------------------------------------------------------------------------------- moving_shapes


def sample(image, x, y):
    """Bilinear values of a float (c, h, w) array at the points x, y inside of it."""
    h, w = image.shape[-2:]
    grid = torch.from_numpy(np.stack((2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1), axis=-1))
    values = grid_sample(torch.from_numpy(image)[None], grid[None], padding_mode="border", align_corners=True)
    return values[0].numpy()


@given(seed=seeds, size=st.tuples(st.integers(33, 100), st.integers(33, 100)), frames=st.integers(1, 4))
def test_an_item_has_the_documented_shapes_types_and_ranges(seed, size, frames):
    item = MovingShapes(length=1, size=size, frames=frames, seed=seed)[0]
    kinds = {"images": ((frames, 3), torch.float32), "instances": ((frames,), torch.int64)}
    kinds |= {f"flow_{way}": ((frames - 1, 2), torch.float32) for way in ("forward", "backward")}
    assert {name: (value.shape[:-2], value.dtype) for name, value in item.items()} == kinds
    assert all(value.shape[-2:] == size for value in item.values())
    assert item["images"].min() >= 0 and item["images"].max() <= 1
    assert item["flow_forward"].isfinite().all() and item["flow_backward"].isfinite().all()


def test_colours_are_a_layers_own_or_anew_in_each_frame_or_alike_in_all_layers():
    """By how much mean colours differ from frame to frame, and from layer to layer, in [0, 1]."""
    differ, shown = {}, {"brightness": 0.0, "min_shapes": 2, "max_shapes": 4, "motion": (0.01, 0.35)}
    for colouring in ("own", "anew", "alike"):
        clips = []  # in each, of each layer that is seen well: its mean colour in the first frame and in the second
        for item in MovingShapes(40, **shown, colouring=colouring):
            masks = [[item["instances"][t] == layer for t in (0, 1)] for layer in range(5)]
            seen = [mask for mask in masks if min(each.sum() for each in mask) > 1000]
            colours = [torch.stack([item["images"][t][:, mask[t]].mean(dim=1) for t in (0, 1)]) for mask in seen]
            clips.append(torch.stack(colours))
        frames = torch.cat([(clip[:, 0] - clip[:, 1]).abs().mean(dim=1) for clip in clips])
        layers = torch.stack([clip.std(dim=0).mean() for clip in clips if len(clip) > 1])
        differ[colouring] = frames.mean().item(), layers.mean().item()
    assert differ["own"][0] < 0.01 and differ["own"][1] > 0.1
    assert differ["anew"][0] > 0.1 and differ["anew"][1] > 0.1
    assert 0.005 < differ["alike"][0] < 0.05 and differ["alike"][1] < 0.06


def test_the_flow_of_both_directions_is_exact_to_a_fiftieth_of_a_pixel(monkeypatch):
    """On smooth waves, the shift that would explain what is left after warping by the flow."""
    y, x = np.mgrid[:256, :256] * 2 * np.pi / 64
    waves = np.stack((np.sin(x), np.sin(y), np.sin(x + y)), axis=2) * 60 + 128
    monkeypatch.setattr(sources.moving_shapes, "_textures", lambda: [waves.astype(np.uint8)])
    errors, seen, square = [], [], np.ones((3, 3))
    for index in range(20):
        item = MovingShapes(brightness=0.0)[index]
        images = item["images"].double().numpy()
        rims = [cv2.dilate(i, square) > cv2.erode(i, square) for i in item["instances"].byte().numpy()]
        layers = item["instances"].double().numpy()
        for source, target, way in ((0, 1, "forward"), (1, 0, "backward")):
            y, x = np.mgrid[:128, :128] + item[f"flow_{way}"][0].double().numpy()[::-1]  # where each pixel goes
            inner = (x >= 0) & (x <= 127) & (y >= 0) & (y <= 127) & ~rims[source]
            # What is hidden in the other frame ends on another layer there.
            for there, here in ((rims[target].astype(float), 0), (layers[target], layers[source])):
                inner &= sample(there[None], x, y)[0] == here
            seen.append(inner.mean())
            residual = (images[source] - sample(images[target], x, y))[:, inner].ravel()
            slopes = np.stack([np.gradient(images[source], axis=a)[:, inner].ravel() for a in (2, 1)], axis=1)
            errors.append(np.linalg.lstsq(slopes, residual, rcond=None)[0])
    assert np.abs(errors).max() < 0.02 and np.mean(seen) > 0.7


def test_motions_range_from_below_a_pixel_to_the_bound_with_a_mean_of_three_to_five_pixels():
    lengths = torch.stack([MovingShapes()[i]["flow_forward"][0].norm(dim=0) for i in range(250)])
    assert 3 < lengths.mean() < 5 and (lengths < 1).float().mean() > 0.05 and (lengths > 10).float().mean() > 0.01
    assert lengths.max() < 1.5 * 0.08 * 128  # shift, and at most 0.2 of the bound each from turning and growing
    assert MovingShapes(motion=(0.0, 0.35))[3]["flow_forward"].abs().max() < 1e-3
    small = torch.stack([MovingShapes(motion=(0.01, 0.35))[i]["flow_forward"] for i in range(20)])
    assert small.norm(dim=2).max() < 1.5 * 1.28
    centres = [ShapePairs(motion=(0.3, 1.0))._scene(index).to_pixel[-1, :, :2, 2] for index in range(300)]
    lengths = np.linalg.norm(np.diff(centres, axis=1), axis=2)  # as many from 0.3 to 3.4 px as from there to 38.4 px
    assert 2 < np.median(lengths) < 4 and 20 < np.quantile(lengths, 0.95) < lengths.max() < 38.4


def test_brightness_changes_in_about_a_third_of_the_scenes_and_by_ten_percent_at_most():
    plain, changing = MovingShapes(motion=(0.0, 1.0), brightness=0.0), MovingShapes(motion=(0.0, 1.0))
    ratios = [(changing[i]["images"][0].mean() / plain[i]["images"][0].mean()).item() for i in range(150)]
    assert 0.22 < np.mean([abs(ratio - 1) > 1e-6 for ratio in ratios]) < 0.45
    assert min(ratios) > 0.8 and max(ratios) < 1.2


def test_a_pixel_belongs_to_the_shape_that_covers_half_of_it(monkeypatch):
    black_and_white = np.zeros((2, 3, 4))
    black_and_white[1, :, 3] = 255
    monkeypatch.setattr(sources.moving_shapes, "_random_colours", lambda rng, count: black_and_white)
    for index in range(20):
        item = MovingShapes(max_shapes=1, brightness=0.0)[index]
        white, owned = item["images"].mean(dim=1), item["instances"] == 1
        assert owned[white > 0.51].all() and not owned[white < 0.49].any()
        assert ((white > 0.01) & (white < 0.99)).float().mean() < 0.1  # edges are soft, and narrow


def test_pairs_images_and_labels_show_the_frames_of_the_items():
    frames, pair = MovingShapes(seed=3)[7]["images"], ShapePairs(seed=3)[7]
    assert pair[0].dtype == torch.uint8 and torch.equal(torch.stack(pair).float() / 255, frames)
    assert torch.equal(ShapeImages(seed=3)[7], pair[0])
    labelled, shapes = ShapeLabels(4, (40, 56), 3), MovingShapes(4, (40, 56), 1, 3, max_shapes=8, colouring="anew")
    for index, ((image, labels), item) in enumerate(zip(labelled, shapes, strict=True)):
        assert torch.equal(image.float() / 255, item["images"][0]) and image.dtype == torch.uint8
        numbers = torch.from_numpy(shapes._scene(index).numbers)  # of the textures
        assert torch.equal(labels, numbers[item["instances"][0]]) and labels.dtype == torch.int64
    assert len(labelled.classes) == len(labelled.colours) == TEXTURES


# -------------------------------------------------------------------------------------------------------- training_sets

DRIVE = "2011_09_26/2011_09_26_drive_0001_sync"
RUNS = ("{00,01,02,03,04,05,06,07,08}", "{13,14,15,16,17,18,19,20}")  # without the frames that KITTI measures
KITTI = [f"{part}/{{}}/00000{scene}_{run}.png" for part in ("training", "testing") for scene in (0, 1) for run in RUNS]
THINGS = [f"frames_{{}}pass/TRAIN/{clip}/000{{{{6,7,8}}}}.png" for clip in expand("{A/0000,C/0001}/{left,right}")]
CLIPS = {
    "kitti_raw": [
        f"{DRIVE}/image_02/data/000000000{{0,1,2,3}}.png",
        "2011_10_03/2011_10_03_drive_0027_sync/image_02/data/000000000{0,1,2}.png",
    ],
    "kitti2012": [pattern.replace("{}", "colored_0") for pattern in KITTI],
    "kitti2015": [pattern.replace("{}", "image_2") for pattern in KITTI],
    "sintel_clean": [f"{scene}/frame_000{{1,2,3}}.png" for scene in ("training/clean/alley_1", "test/clean/market_1")],
    "sintel_final": [f"{scene}/frame_000{{1,2,3}}.png" for scene in ("training/final/alley_1", "test/final/market_1")],
    "sintel_raw": ["sintel_raw/scene_1/frame_000{1,2,3,4}.png", "sintel_raw/scene_2/frame_000{5,6,7}.png"],
    "chairs": [f"data/0000{pair}_img{{1,2}}.ppm" for pair in range(1, 4)],
    "things_clean": [pattern.format("clean") for pattern in THINGS],
    "things_final": [pattern.format("final") for pattern in THINGS],
    "hd1k": [f"hd1k_input/image_2/00000{sequence}_00{{10,11,12}}.png" for sequence in (0, 1)],
}
"""The frames of each clip that a set must give, as they lie in its archives."""

BESIDE = {
    "kitti_raw": DRIVE + "/{image_03/data/0000000000.png,image_02/timestamps.txt}",
    "kitti2012": "{training,testing}/colored_{0,1}/00000{0,1}_{09,10,11,12}.png",
    "kitti2015": "{training,testing}/image_{2,3}/00000{0,1}_{09,10,11,12}.png",
    "sintel_clean": "training/{final/alley_1/frame_0001.png,flow/alley_1/frame_0001.flo}",
    "sintel_final": "training/{clean,occlusions}/alley_1/frame_0001.png",
    "sintel_raw": "sintel_raw/scene_1/notes.txt",
    "chairs": "{data/00001_flow.flo,data/00002_flow.png,FlyingChairs_train_val.txt}",
    "things_clean": "frames_cleanpass/{TEST/A/0000/left/0006.png,TRAIN/A/0000/left/Thumbs.db}",
    "things_final": "frames_finalpass/TEST/A/0000/left/0006.png",
    "hd1k": "{hd1k_flow_gt/flow_occ/000000,hd1k_challenge/image_2/000036}_0010.png",
}
"""Files of the same archives that belong to no clip: frames of other cameras and splits, truth, lists."""


def write_video_set(name, folder):
    write_images(folder, [frame for clip in CLIPS[name] for frame in expand(clip)])
    return folder


@pytest.mark.parametrize("name", RepeatsConfig.__annotations__)
def test_each_video_set_is_found_in_its_native_layout_one_folder_deep_and_is_no_other(name, tmp_path):
    own = write_video_set(name, tmp_path / "root" / name)
    assert [other for other in VIDEO_SETS if find_video_set(other, own.parent)[0]] == [name]
    write_images(own, expand(BESIDE[name]))
    helpers.write_mac_leftovers(tmp_path / "root")
    for root in (own, own.parent):
        found, notes = find_video_set(name, root)
        clips = [[str(frame.relative_to(own)) for frame in clip.frames] for clip in found]
        assert notes == [] and sorted(clips) == sorted(map(expand, CLIPS[name]))
    pairs = FramePairs(found)
    assert len(pairs) == sum(len(clip) - 1 for clip in clips) and pairs[len(pairs) - 1][1].shape == (3, 8, 12)
    assert find_video_set(name, tmp_path) == ([], [])  # two folders deep


@pytest.mark.parametrize("name, images", [("kitti2012", "colored_0"), ("kitti2015", "image_2")])
def test_kitti_with_frames_10_and_11_alone_is_no_multiview_extension_and_two_are_an_error(name, images, tmp_path):
    write_images(tmp_path / "plain", expand(f"{{training,testing}}/{images}/000000_{{10,11}}.png"))
    assert find_video_set(name, tmp_path) == ([], [])
    multiview = write_video_set(name, tmp_path / "multiview")
    clips, _ = find_video_set(name, tmp_path)
    assert clips and all(clip.path.is_relative_to(multiview) for clip in clips)
    with raises_one_line(ValueError, multiview, write_video_set(name, tmp_path / "copy"), name):
        find_video_set(name, tmp_path)


@given(numbers=st.sets(st.integers(0, 25), min_size=2), digits=st.sampled_from((1, 4)))
def test_clips_are_runs_of_numbers_without_a_gap_and_a_note_names_the_files_around_each_gap(numbers, digits):
    names = {number: f"{number:0{digits}d}.png" for number in numbers}
    numbers = np.array(sorted(numbers))
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    assume(any(len(run) > 1 for run in runs))
    with TemporaryDirectory() as root:
        folder = write_images(Path(root, DRIVE, "image_02/data"), names.values()).parent
        found, notes = find_video_set("kitti_raw", Path(root))
    clips = [[frame.name for frame in clip.frames] for clip in found]
    assert clips == [[names[n] for n in run] for run in runs if len(run) > 1]
    for note, (before, after) in zip(notes, pairwise(runs), strict=True):
        assert note.startswith(f"{folder / names[before[-1]]}: ") and f" {names[after[0]]};" in note


@pytest.mark.parametrize(
    "names, named, words",
    [
        (["0001.png", "0002.png", "mean.png"], "mean.png", "does not end in the number"),
        (["a_1.png", "a_2.png", "b_3.png"], "b_3.png", "the only frame"),
        (["0001.png", "0003.png"], "", "no two frames of KITTI raw are consecutive"),
    ],
)
def test_frames_without_a_number_alone_or_without_a_neighbour_are_reported_by_their_path(names, named, words, tmp_path):
    folder = write_images(tmp_path / DRIVE / "image_02/data", names).parent
    with raises_one_line(ValueError, folder / named if named else tmp_path, words):
        find_video_set("kitti_raw", tmp_path)


def mix_of(*lengths_and_repeats):
    """A mix of sets whose items are (number of the set, their own index)."""
    sets, repeats = {}, {}
    for k, (length, repeats[str(k)]) in enumerate(lengths_and_repeats):
        sets[str(k)] = TensorDataset(torch.tensor([[k, i] for i in range(length)]))
        sets[str(k)].file_count = length
    return Mix(sets, repeats)


def drawn(mix, count, seed=0):
    """The first draws of a single process, as (number of the set, index in it)."""
    stream = ShardedStream(len(mix), 1, Stream(seed), mix.order)
    return [tuple(mix[index][0].tolist()) for _, index in islice(stream, count)]


@given(content=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=4), seed=seeds)
def test_a_pass_repeats_each_set_at_an_even_rate_and_wholly_before_any_of_it_comes_again(content, seed):
    mix = mix_of(*content)
    whole = [(k, i) for k, (length, repeats) in enumerate(content) for _ in range(repeats) for i in range(length)]
    assert [tuple(mix[index][0].tolist()) for index in range(len(mix))] == whole
    items = drawn(mix, 3 * len(mix), seed)
    for start in range(0, len(items), len(mix)):
        assert sorted(items[start : start + len(mix)]) == sorted(whole)
    numbers = np.array([number for number, _ in items[: len(mix)]])
    for k, (length, repeats) in enumerate(content):
        own = [index for number, index in items if number == k]
        for start in range(0, len(own), length):
            assert sorted(own[start : start + length]) == list(range(length))
        due = np.arange(1, len(mix) + 1) * length * repeats / len(mix)
        assert np.abs(np.cumsum(numbers == k) - due).max() <= len(content) + 1  # each is within one item of its rate


def test_a_loader_walks_a_mix_in_its_own_order():
    mix = mix_of((30, 1), (7, 4), (5, 9))
    batches = islice(make_loader(mix, None, 6, Stream(3)), 40)
    assert [tuple(item.tolist()) for (items,), _ in batches for item in items] == drawn(mix, 240, seed=3)
    assert drawn(mix, 240, seed=3) != drawn(mix, 240, seed=4)


@pytest.fixture
def data_root(tmp_path):
    """Sintel (clean: 5 frames in two scenes, final: 3), FlyingChairs, smaller than the crop, 2 classes of ImageNet."""
    root = tmp_path / "data"
    for scene, count in (("clean/alley_1", 3), ("clean/market_5", 2), ("final/alley_1", 3)):
        helpers.write_frames(root / "Sintel/training" / scene, count, name="frame_{:04d}.png", first=1)
    helpers.write_frames(root / "FlyingChairs_release/data", 2, (48, 60), name="00001_img{}.png", first=1)
    for name in ("n01440764", "n01443537"):
        helpers.write_frames(root / "ImageNet/train" / name, 3)
    return root


def opened(root, *sets, **repeats):
    return open_mix(root, sets, RepeatsConfig(**repeats), FlowAugmentation((64, 64), enlarge=True))


def test_the_sets_in_a_folder_are_mixed_whatever_their_size_and_the_table_says_how(data_root):
    mix = opened(data_root, chairs=40)
    rows = {line.split()[0]: line.split()[1:] for line in mix.note.splitlines()}
    assert rows["sintel_clean"] == ["2", "3", "100", f"{300 / 540:.2%}", str(data_root / "Sintel/training/clean")]
    assert rows["sintel_final"][:4] == ["1", "2", "100", f"{200 / 540:.2%}"]
    assert rows["chairs"] == ["1", "1", "40", f"{40 / 540:.2%}", str(data_root / "FlyingChairs_release/data")]
    assert all(image.shape == (3, 64, 64) for index in (0, 301, len(mix) - 1) for image in mix[index])
    assert mix.file_count == 10
    clip = data_root / "Sintel/training/clean/alley_1"
    (clip / "frame_0003.png").rename(clip / "frame_0007.png")
    assert re.search("note: .*frame_0007.png", opened(data_root).note)


def test_sets_are_chosen_by_name_or_prefix_and_a_missing_one_is_reported_with_where_to_download_it(data_root):
    assert list(opened(data_root, "sintel").parts) == ["sintel_clean", "sintel_final"]
    assert list(opened(data_root, "sintel_final", "chairs").parts) == ["sintel_final", "chairs"]
    with raises_one_line(MissingSet, data_root, "does not hold hd1k", "hci-benchmark", "hd1k_input/image_2"):
        opened(data_root, "hd1k")
    with raises_one_line(MissingSet, data_root, "none of kitti_raw, kitti2012, kitti2015", "sources.training_sets"):
        opened(data_root, "kitti")
    with raises_one_line(ValueError, "--sets kiti: no such data set", *VIDEO_SETS):
        opened(data_root, "kiti")
    with raises_one_line(FileNotFoundError, f"{data_root / 'nowhere'}: no such folder"):
        opened(data_root / "nowhere")


def test_the_command_lists_the_mix_the_images_and_where_to_download_the_rest(data_root, capsys, tmp_path):
    sources.training_sets.main(data_root)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["set", "sintel_clean", "sintel_final", "chairs"]
    assert lines[4] == f"{data_root / 'ImageNet/train'}: 6 images in 2 classes"
    assert len(lines) == 5 + len(VIDEO_SETS) - 3
    assert all(line.startswith("missing: ") and "http" in line for line in lines[5:])
    (tmp_path / "empty").mkdir()
    sources.training_sets.main(tmp_path / "empty")
    assert capsys.readouterr().out.count("missing: ") == len(VIDEO_SETS) + 1


PHOTOS = ["n01440764/n01440764_18.JPEG", "n01440764/n01440764_36.JPEG", "n02119789/n02119789_1.JPEG"]
HOMES = ["", "ILSVRC2012", *expand("{,ImageNet/,imagenet-1k/}train"), *expand("{,ImageNet/}ILSVRC/Data/CLS-LOC/train")]


@pytest.mark.parametrize("layout", HOMES)
def test_imagenet_is_found_in_the_layouts_of_its_archives(layout, tmp_path):
    root = tmp_path / "root"
    write_images(root / layout, ["Sintel/training/clean/alley_1/frame_0001.png", *PHOTOS])
    if "train" in layout:
        write_images(root / layout.replace("train", "val"), ["n01440764/ILSVRC2012_val_00000293.JPEG"])
    helpers.write_mac_leftovers(root)
    images = ImageNet(root)
    assert [str(Path(path).relative_to(root / layout)) for path, _ in images.samples] == PHOTOS
    assert images.file_count == 3 and all(image.shape == (3, 8, 12) for image in images)


def test_imagenet_is_neither_tiny_nor_without_classes_and_an_empty_class_and_a_damaged_image_are_named(tmp_path):
    write_images(tmp_path / "other", expand("{TinyImageNet,A-tiny-imagenet-200}/train/n01443537/n01443537_0.JPEG"))
    write_images(tmp_path / "other/ImageNet/train", ["fish/1.JPEG", "n0144/1.JPEG"])
    with raises_one_line(MissingSet, tmp_path, "no ImageNet in it", "ImageNet/train/n01440764/*.JPEG"):
        ImageNet(tmp_path / "other")
    helpers.cut_short(write_images(tmp_path / "ImageNet/train", PHOTOS))
    with raises_one_line(ValueError, tmp_path / "ImageNet/train" / PHOTOS[2], "not a readable image"):
        ImageNet(tmp_path)[2]
    (tmp_path / "ImageNet/train/n09999999").mkdir()
    with raises_one_line(FileNotFoundError, tmp_path / "ImageNet/train", "n09999999"):
        ImageNet(tmp_path)


# ------------------------------------------------------------------------------------------------------ flow_benchmarks

READ_BY_TORCHVISION = {
    ".flo": _optical_flow._read_flo,
    ".pfm": lambda path: utils._read_pfm(path, slice_channels=2),
    ".png": lambda path: _optical_flow._read_16bits_png_with_flow_and_valid_mask(path)[0],
}


@pytest.mark.parametrize("ending", READ_BY_TORCHVISION)
@given(seed=seeds, order=st.sampled_from("<>"), special=st.sampled_from((3.0, 1.67e9, np.nan, np.inf)))
def test_flow_files_are_read_as_by_torchvision_and_unknown_flow_is_not_valid(ending, seed, order, special):
    size = 1 + seed % 9, 1 + seed // 9 % 9
    flow, known = helpers.random_flow(seed, size), np.random.default_rng(seed).random(size) < 0.6
    flow[0, 0, 0], known[0, 0] = special if ending == ".flo" else 3.0, True
    expected = known if ending == ".png" else (np.abs(flow) <= 1e9).all(axis=2)
    assume(expected.any())
    with TemporaryDirectory() as folder:
        path = helpers.write_flow_file(Path(folder, f"a{ending}"), flow, known, order)
        ours, valid = (x.squeeze(0).numpy() for x in read_flow(path))
        theirs = READ_BY_TORCHVISION[ending](str(path))
    np.testing.assert_array_equal(valid[0], expected)
    np.testing.assert_array_equal(ours[:, expected], theirs[:, expected])
    error = np.abs(ours[:, expected] - flow[expected].T).max()
    assert ours.dtype == np.float32 and error <= (0.5 / 64 + 1e-4 if ending == ".png" else 0)


def test_a_written_flow_is_read_back_exactly_or_to_a_128th_of_a_pixel_and_is_clipped_at_512(tmp_path):
    flow = torch.from_numpy(helpers.random_flow(0).transpose(2, 0, 1))[None]
    for name, error in (("a\udcdf.flo", 0), ("a\udcdf.png", 1 / 128)):
        write_flow(tmp_path / name, flow)
        assert (read_flow(tmp_path / name)[0] - flow).abs().max() <= error
    write_flow(tmp_path / "far.png", torch.tensor([900.0, -900.0]).view(1, 2, 1, 1))
    assert read_flow(tmp_path / "far.png")[0].flatten().tolist() == [511 + 63 / 64, -512]
    with raises_one_line(OSError, tmp_path / "nowhere/a.flo", "No such file"):
        write_flow(tmp_path / "nowhere/a.flo", flow)


ABSURD_SIZE = struct.pack(">IIBBBBB", 2**30, 2**30, 16, 2, 0, 0, 0)
ABSURD_SIZE += struct.pack(">I", zlib.crc32(b"IHDR" + ABSURD_SIZE))
DAMAGE = {
    "wrong magic number.flo": lambda good: b"HEIP" + good[4:],
    "cut short.flo": lambda good: good[:-1],
    "negative size.flo": lambda good: good[:4] + struct.pack("<ii", -7, -5) + good[12:],
    "absurd size.flo": lambda good: good[:4] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + good[12:],
    "cut short.pfm": lambda good: good[:-1],
    "one channel.pfm": lambda good: b"Pf" + good[2:],
    "absurd size.pfm": lambda good: good.replace(b"7 5", b"999999 999999", 1),
    "endless size.pfm": lambda good: good.replace(b"7 5", b"9" * 5000 + b" 5", 1),
    "cut short.png": lambda good: good[: len(good) // 2],
    "eight bits.png": lambda good: cv2.imencode(".png", np.ones((5, 7, 3), np.uint8))[1].tobytes(),
    "one channel.png": lambda good: cv2.imencode(".png", np.ones((5, 7), np.uint16))[1].tobytes(),
    "absurd size.png": lambda good: good[:16] + ABSURD_SIZE + good[33:],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_flow_file_is_named_without_a_large_allocation(name, tmp_path):
    path = helpers.write_flow_file(tmp_path / name, helpers.random_flow(0))
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    tracemalloc.start()
    with raises_one_line(ValueError, path):
        read_flow(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


FOLDERS = dict(zip(helpers.FLOW_SETS, helpers.FLOW_SETS, strict=True)) | {"sintel": "Sintel", "kitti2015": "KittiFlow"}
FOLDERS |= {"chairs": "FlyingChairs", "things": "FlyingThings3D"}  # named as torchvision's classes want them


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """All benchmarks side by side, only to be read: the folder, and what was written."""
    root = tmp_path_factory.mktemp("disk")
    return root, {name: write_benchmark(root / FOLDERS[name], name) for name in helpers.FLOW_SETS}


THEIRS = {
    "sintel": lambda root: datasets.Sintel(root, "train", pass_name="both"),
    "kitti2015": lambda root: datasets.KittiFlow(root, "train"),
    "chairs": lambda root: datasets.FlyingChairs(root, "val"),
    "things": lambda root: datasets.FlyingThings3D(root, "test", pass_name="both", camera="both"),
    "hd1k": lambda root: datasets.HD1K(root, "train"),
}


@pytest.mark.parametrize("name", helpers.FLOW_SETS)
def test_the_pairs_of_a_benchmark_are_those_written_and_their_files_those_of_torchvision(name, disk, tmp_path):
    root, written = disk
    found, files, notes = find_benchmark(root, name)
    assert found == name and notes == []
    assert sorted(pair[:2] for pair in files) == sorted(sample[:2] for sample in written[name])  # name and group
    if name in THEIRS:
        theirs = THEIRS[name](root)
        expected = {(*images, flow) for images, flow in zip(theirs._image_list, theirs._flow_list, strict=True)}
        assert {tuple(map(str, pair[2:5])) for pair in files} == expected
    alone = write_benchmark(tmp_path / "alone" / name, name)
    helpers.write_mac_leftovers(tmp_path)
    for place in (tmp_path / "alone", tmp_path / "alone" / name):  # which needs no name, and is no other
        assert find_benchmark(place)[0] == name and len(find_benchmark(place)[1]) == len(alone)
    for other in FLOW_BENCHMARKS.keys() - {name}:
        with raises_one_line(MissingSet, tmp_path, f"no true flow of {other}"):
            find_benchmark(tmp_path / "alone", other)


@pytest.mark.parametrize("name", ["sintel", "kitti2015"])
def test_the_pairs_of_a_split_with_secret_flow_are_those_of_torchvision(name, tmp_path):
    root = tmp_path / FOLDERS[name]
    helpers.write_testing_split(root, name)
    with raises_one_line(MissingSet, "no true flow"):
        find_benchmark(root)
    write_benchmark(root, name)
    _, pairs, _ = find_benchmark(tmp_path, None, "testing")
    kind, options = {"sintel": (datasets.Sintel, {"pass_name": "both"}), "kitti2015": (datasets.KittiFlow, {})}[name]
    theirs = kind(tmp_path, "test", **options)._image_list
    assert sorted([str(pair.image_1), str(pair.image_2)] for pair in pairs) == sorted(theirs)
    with raises_one_line(ValueError, "no testing part of chairs", "sintel, kitti2012, kitti2015"):
        find_benchmark(tmp_path, "chairs", "testing")


def test_two_years_of_kitti_in_one_folder_are_refused_since_the_flow_of_one_has_replaced_the_others(tmp_path):
    write_benchmark(tmp_path, "kitti2012"), write_benchmark(tmp_path, "kitti2015")
    with raises_one_line(ValueError, tmp_path / "training", "unpack each to its own folder"):
        find_benchmark(tmp_path, "kitti2012")


def test_a_missing_frame_is_named_and_pairs_without_both_are_left_out_with_a_note(tmp_path):
    write_benchmark(tmp_path, "middlebury")
    first, second = find_benchmark(tmp_path)[1]
    first.image_1.unlink(), first.image_2.unlink()
    _, pairs, (note,) = find_benchmark(tmp_path)
    assert pairs == [second] and note.startswith("1 of 2 pairs left out") and "\n" not in note
    second.image_2.unlink()
    with raises_one_line(FileNotFoundError, second.image_2, "missing, the other frame of this pair is there"):
        find_benchmark(tmp_path)
    second.image_1.unlink()
    with raises_one_line(FileNotFoundError, tmp_path, "middlebury", "missing, as all frames"):
        find_benchmark(tmp_path)


def test_chairs_are_the_validation_pairs_of_the_list_and_pairs_of_ones_own_need_three_names_only(tmp_path):
    write_benchmark(tmp_path / "FlyingChairs", "chairs")
    listed = tmp_path / "FlyingChairs_train_val.txt"  # beside the folder, as the download leaves it
    (tmp_path / "FlyingChairs" / listed.name).rename(listed)
    assert [pair.name for pair in find_benchmark(tmp_path, "chairs")[1]] == ["00002", "00003"]
    listed.unlink()
    assert [pair.name for pair in find_benchmark(tmp_path)[1]] == ["00001", "00002", "00003"]
    own = tmp_path / "own"
    write_images(own, expand("{a,b}_img{1,2}.jpg"))
    for name in ("a_flow.png", "b_flow.flo"):
        helpers.write_flow_file(own / name, helpers.random_flow(0))
    pairs = [(pair.name, pair.image_2.name) for pair in find_benchmark(own)[1]]
    assert pairs == [("b", "b_img2.jpg"), ("a", "a_img2.jpg")]


@pytest.mark.parametrize(
    "name, place, words",
    [
        ("sintel", "training/flow/alley_1/frame_0001.flo", "but its frames are 80x60"),
        ("middlebury", "other-data/Grove9/frame11.png", "flow needs one size"),
        ("sintel", "training/occlusions/alley_1/frame_0001.png", "a mask of 80x40"),
        ("kitti2015", "training/flow_noc/000000_10.png", "a mask of 80x40"),
    ],
)
def test_a_file_of_another_size_is_named_with_both_sizes(name, place, words, tmp_path):
    write_benchmark(tmp_path, name)
    if "flow" in place:
        helpers.write_flow_file(tmp_path / place, helpers.bands(((1, 2),), 40, 80))
    else:
        write_image(tmp_path / place, (40, 80))
    with raises_one_line(ValueError, tmp_path / place, words):
        read_pair(find_benchmark(tmp_path, name)[1][0])


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_true_flow_lies_on_the_pixels_as_they_are_stored(orientation, tmp_path):
    exif, picture = Image.Exif(), random_ids(0, range(256), 40, 60)
    exif[0x0112] = orientation
    for number in (1, 2):
        Image.fromarray(picture).save(tmp_path / f"a_img{number}.png", exif=exif)
    helpers.write_flow_file(tmp_path / "a_flow.flo", helpers.bands(((1, 2),), 40, 60))
    pair = read_pair(find_benchmark(tmp_path)[1][0])
    np.testing.assert_allclose(pair.image_1[0, 0] * 255, picture, atol=1e-3)


def test_a_pair_whose_flow_is_all_invalid_is_reported_and_one_that_is_all_occluded_is_measured(tmp_path):
    write_benchmark(tmp_path / "sintel", "sintel"), write_benchmark(tmp_path / "kitti", "kitti2015")
    invalid = tmp_path / "sintel/training/invalid/alley_1/frame_0001.png"
    helpers.write_picture(invalid, np.full_like(cv2.imread(str(invalid)), 255))
    with raises_one_line(ValueError, "alley_1/frame_0001.flo: no pixel of this flow is known"):
        read_pair(find_benchmark(tmp_path / "sintel")[1][0])
    occluded = tmp_path / "kitti/training/flow_noc/000000_10.png"
    (h, w), flow = read_flow(occluded)[0].shape[2:], helpers.random_flow(0)
    helpers.write_flow_file(occluded, np.resize(flow, (h, w, 2)), known=np.zeros((h, w), bool))
    regions = read_pair(find_benchmark(tmp_path / "kitti")[1][0]).regions
    assert regions["all"].any() and not regions["noc"].any()


# ----------------------------------------------------------------------------------------------------------- label_sets


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "RGBA", "I;16"])
@given(seed=seeds, h=st.integers(1, 20), w=st.integers(1, 20))
def test_numbers_are_read_as_they_were_written_in_every_kind_of_image(mode, seed, h, w):
    ids = random_ids(seed, range(256), h, w)
    with TemporaryDirectory() as folder:
        np.testing.assert_array_equal(read_ids(write_ids(Path(folder) / "ids.png", ids, mode)), ids)


@given(seed=seeds, count=st.integers(2, 22), mode=st.sampled_from(["shuffled", "quantized"]))
def test_a_palette_in_any_order_gives_the_numbers_of_its_colours(seed, count, mode):
    numbers = np.random.default_rng(seed).choice([*range(22), 255], count, replace=False)
    ids, colours = random_ids(seed, numbers), helpers.voc_palette()
    order = np.random.default_rng(seed + 1).permutation(np.sort(numbers))
    shuffled = Image.fromarray(np.argsort(order)[np.searchsorted(np.sort(numbers), ids)].astype(np.uint8))
    shuffled.putpalette(colours[order].tobytes())
    with TemporaryDirectory() as folder:
        (shuffled if mode == "shuffled" else shuffled.convert("RGB").quantize(count)).save(f"{folder}/ids.png")
        np.testing.assert_array_equal(read_ids(Path(folder, "ids.png")), ids)


def test_the_palettes_of_davis_of_greys_and_of_few_colours_and_black_and_white_in_any_order(tmp_path):
    ids, path = np.array([[0, 1, 21], [22, 254, 255]], np.uint8), tmp_path / "ids.png"
    greys = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    davis = np.concatenate((helpers.voc_palette()[:22], greys[22:]))

    def read(image, palette):
        image = Image.fromarray(np.array(image, np.uint8))
        image.putpalette(palette.tobytes())
        image.save(path)
        return read_ids(path).tolist()

    assert read([[0, 1, 21], [255, 1, 0]], davis) == [[0, 1, 21], [255, 1, 0]]
    assert read(ids[:, ::-1], greys[::-1]) == (255 - ids[:, ::-1]).tolist()
    for padding in (0, 235):  # 255 has no colour, or that of the padding
        colours = np.concatenate((helpers.voc_palette()[:21], np.zeros((padding, 3), np.uint8)))
        assert read([[1, 20, 1], [255, 1, 20]], colours) == [[1, 20, 1], [255, 1, 20]]
    assert read([[64, 128, 0]], greys) == [[64, 128, 0]]  # numbers of the palette of VOC too, but in the order of greys
    assert read([[0, 1, 1]], greys[[255, 0]]) == [[255, 0, 0]] and read([[0, 1, 1]], greys[[0, 255]]) == [[0, 255, 255]]
    with raises_one_line(ValueError, path, "colours where numbers belong"):
        read([[0, 1, 2]], np.array([[0, 0, 0], [236, 95, 103], [249, 145, 87]], np.uint8))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_holds_numbers_as_they_are_stored(bits, tmp_path):
    ids = random_ids(0, range(2**bits), 6, 16)
    rows = np.packbits(np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :].reshape(6, -1), axis=1)
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 16, 6, bits, 0, 0, 0, 0)}
    chunks |= {b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)), b"IEND": b""}
    parts = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks.items())
    (tmp_path / "ids.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    np.testing.assert_array_equal(read_ids(tmp_path / "ids.png"), ids)


@pytest.mark.parametrize("mode, suffix", [("I;16", "png"), ("I;16", "tif"), ("I", "tif")])
def test_wide_numbers_are_read_up_to_255_and_are_an_error_beyond(tmp_path, mode, suffix):
    ids = np.array([[0, 17], [254, 255]])
    path = write_ids(tmp_path / f"fit.{suffix}", ids, mode)
    assert Image.open(path).mode == mode and read_ids(path).tolist() == ids.tolist()
    wide = write_ids(tmp_path / f"wide.{suffix}", ids + 1, mode)
    with raises_one_line(ValueError, wide, f"mode {mode}", "255"):
        read_ids(wide)


def one_labelled(folder, ids, table, size=None, mode="P", colours=PALETTE):
    image, labels = write_image(folder / "image.png", size or ids.shape), write_ids(folder / "labels.png", ids, mode)
    return label_sets.LabelledImages([(image, labels)], {"": table}, ("a", "b"), colours[:2])


def test_labels_that_do_not_fit_or_are_damaged_are_reported_by_their_path(tmp_path):
    labels, ids, table = tmp_path / "labels.png", random_ids(0, [0, 1, 255]), {0: 0, 1: 1, 255: VOID}
    assert torch.equal(one_labelled(tmp_path, ids, table, mode="RGB")[0][1], one_labelled(tmp_path, ids, table)[0][1])
    with raises_one_line(ValueError, f"{labels}: colours where numbers belong"):
        one_labelled(tmp_path, ids, table, mode="RGB", colours=PALETTE[2:])[0]  # those of another set
    with raises_one_line(ValueError, f"{labels}: colours where numbers belong"):
        two_alike = PALETTE[[1, 1]]  # as two classes of ADE20K
        one_labelled(tmp_path, random_ids(0, [1]), table, mode="RGB", colours=two_alike)[0]
    with raises_one_line(BadFile, f"{tmp_path / 'image.png'}: 15x12 px, but its labels are 16x12 px"):
        one_labelled(tmp_path, ids, table, (12, 15))[0]
    with raises_one_line(BadFile, f"{labels}: holds 255, which is no class"):
        one_labelled(tmp_path, ids, {0: 0, 1: 1})[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn", ["on the stored image", "on the upright one"])
def test_labels_lie_on_the_pixels_they_were_drawn_on_whatever_the_orientation(orientation, drawn, tmp_path):
    exif, stored = Image.Exif(), np.kron(random_ids(0, range(2), 3, 5), np.ones((8, 8), np.uint8))
    exif[0x0112] = orientation
    picture = Image.fromarray(255 * stored)
    picture.save(tmp_path / "image.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "image.png"))) // 255
    if drawn == "on the upright one" and orientation >= 5:  # otherwise the size does not tell
        stored = upright
    write_ids(tmp_path / "labels.png", stored, "L")
    files = [(tmp_path / "image.png", tmp_path / "labels.png")]
    image, labels = label_sets.LabelledImages(files, {"": {0: 0, 1: 1}}, "ab", PALETTE)[0]
    assert torch.equal(image[0] // 255, labels)


COUNTS = {"voc": 21, "cityscapes": 19, "ade20k": 150, "camvid": 11}
IDS_OF_CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
"""Of its labels.py: the ids that count, by class."""


@pytest.mark.parametrize("name", LABEL_SETS)
def test_each_label_set_is_found_in_its_native_layout_one_folder_deep_and_is_no_other(tmp_path, name):
    own = helpers.write_label_set(tmp_path / "root" / name, name)
    ids = IDS_OF_CITYSCAPES if name == "cityscapes" else [c + (name == "ade20k") for c in range(COUNTS[name])]
    helpers.write_mac_leftovers(tmp_path / "root")
    for split, images in helpers.LABEL_IMAGES[name].items():
        places = [tuple(own / place for place in helpers.label_places(name, split, image)) for image in images]
        for asked, root in product((None, name), (own, own.parent)):
            found, labelled = find_labels(root, asked, split)
            assert found == name and labelled.files == places
        for (image, labels), (image_path, labels_path) in zip(labelled, labelled.files, strict=True):
            assert torch.equal(image, load_image(image_path)) and labels.dtype == torch.int64
            expected = np.vectorize(lambda n: ids.index(n) if n in ids else 255)(np.array(Image.open(labels_path)))
            np.testing.assert_array_equal(labels, expected)
    shown = ", ".join(helpers.label_places(name, "train", helpers.LABEL_IMAGES[name]["train"][0]))
    assert LABEL_SETS[name].replace("VOCdevkit/VOC2012/", "").startswith(shown)  # what messages expect
    for other in LABEL_SETS.keys() - {name}:
        with raises_one_line(MissingSet, tmp_path, f"of {other} in it", LABEL_SETS[other]):
            find_labels(tmp_path / "root", other, "train")
    with raises_one_line(MissingSet, tmp_path, f"no train part of {name}"):
        find_labels(tmp_path, name, "train")  # two folders deep


def test_classes_have_the_names_numbers_and_colours_of_their_authors(tmp_path):
    known = {
        "voc": {0: ("background", "000000"), 15: ("person", "c08080"), 20: ("tvmonitor", "004080")},
        "cityscapes": {0: ("road", "804080"), 11: ("person", "dc143c"), 18: ("bicycle", "770b20")},
        "ade20k": {2: ("sky", "06e6e6"), 20: ("car", "0066c8"), 80: ("bus", "ff00f5"), 148: ("clock", "66ff00")},
        "camvid": {0: ("sky", "808080"), 5: ("tree", "808000"), 6: ("sign", "c08080"), 10: ("bicyclist", "0080c0")},
    }
    for name, classes in known.items():
        _, labelled = find_labels(helpers.write_label_set(tmp_path / name, name), name, "train")
        assert len(labelled.classes) == len(set(labelled.classes)) == COUNTS[name]
        assert labelled.colours.shape == (COUNTS[name], 3) and labelled.colours.dtype == np.uint8
        for number, expected in classes.items():
            assert (labelled.classes[number], bytes(labelled.colours[number]).hex()) == expected
        for ending, table in labelled.tables.items():  # a number that is not in it is an error
            assert {*table.values()} == {*range(COUNTS[name]), VOID} and table[255] == VOID
            assert {*table} == {255, *(range(19) if "TrainIds" in ending else helpers.LABEL_NUMBERS[name])}
        assert name != "voc" or labelled.classes[1:] == sorted(labelled.classes[1:])


def test_several_label_sets_without_a_name_none_and_a_missing_part_are_reported(tmp_path):
    with raises_one_line(MissingSet, "no val part of a data set", *LABEL_SETS.values()):
        find_labels(tmp_path, None, "val")
    write_image(tmp_path / "camvid/train/a.png")  # images alone
    with raises_one_line(MissingSet, tmp_path, "no train part"):
        find_labels(tmp_path, None, "train")
    for name in LABEL_SETS:
        helpers.write_label_set(tmp_path / name, name)
    with raises_one_line(ValueError, tmp_path, *LABEL_SETS, "choose one with --benchmark"):
        find_labels(tmp_path, None, "train")


@pytest.mark.parametrize("name, which", [("voc", 0), *((name, 1) for name in LABEL_SETS), ("voc", None)])
def test_a_listed_image_or_labels_or_the_list_that_are_missing_are_named_at_once(tmp_path, name, which):
    helpers.write_label_set(tmp_path, name)
    places = helpers.label_places(name, "train", helpers.LABEL_IMAGES[name]["train"][1])
    path = tmp_path / ("ImageSets/Segmentation/train.txt" if which is None else places[which])
    path.unlink()
    with raises_one_line(FileNotFoundError, path, "missing"):
        find_labels(tmp_path, name, "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_voc_and_cityscapes_are_read_as_by_torchvision(tmp_path, split):
    for year in ("VOC2012", "VOC2007"):  # another year is left alone
        helpers.write_label_set(tmp_path / "VOCdevkit" / year, "voc")
    helpers.write_label_set(tmp_path, "cityscapes")
    voc, cityscapes = (find_labels(tmp_path, name, split)[1] for name in ("voc", "cityscapes"))
    theirs = datasets.VOCSegmentation(tmp_path, "2012", split)
    assert [tuple(map(str, pair)) for pair in voc.files] == [*zip(theirs.images, theirs.masks, strict=True)]
    theirs = datasets.Cityscapes(tmp_path, split, "fine", "semantic")
    files = sorted((image, labels[0]) for image, labels in zip(theirs.images, theirs.targets, strict=True))
    assert [tuple(map(str, pair)) for pair in cityscapes.files] == files
    assert [c.id for c in theirs.classes if 0 <= c.train_id < 255] == IDS_OF_CITYSCAPES


@given(seed=seeds)
def test_voc_trains_on_the_augmented_set_but_never_on_an_image_of_val(seed):
    dice = random.Random(seed)
    names = [f"2007_{i:06d}" for i in range(8)]
    train, val = (sorted(dice.sample(part, dice.randint(1, 4))) for part in (names[:4], names[4:]))
    with TemporaryDirectory() as folder:
        voc = helpers.write_label_set(Path(folder) / "VOC2012", "voc", {"train": train, "val": val})
        more = dice.sample(names, dice.randint(1, 8))
        for name in more:
            write_ids(voc / f"SegmentationClassAug/{name}.png", random_ids(1, range(21)), "L")
            write_image(voc / f"JPEGImages/{name}.jpg")
        training, validation = (find_labels(voc, None, split)[1] for split in ("train", "val"))
        (voc / "ImageSets/Segmentation/val.txt").unlink()
        with raises_one_line(FileNotFoundError, "val.txt: missing", "the val part"):  # it says what not to train on
            find_labels(voc, None, "train")
    assert [image.stem for image, _ in training.files] == sorted({*train, *more} - {*val})
    assert all((path.parent.name == "SegmentationClass") == (path.stem in train) for _, path in training.files)
    assert training.notes == [f"{len(training)} training images; with the augmented set there are 10,582"]
    assert [image.stem for image, _ in validation.files] == val and validation.notes == []


def test_cityscapes_takes_the_files_of_classes_where_they_are_there(tmp_path):
    helpers.write_label_set(tmp_path, "cityscapes")
    by_id = find_labels(tmp_path, None, "val")[1]
    image, ids = by_id.files[0]
    classes = ids.with_name(ids.name.replace("_labelIds", "_labelTrainIds"))
    write_ids(classes, by_id[0][1].numpy(), "L")
    for other in ("color", "instanceIds"):
        write_ids(ids.with_name(ids.name.replace("labelIds", other)), random_ids(6, [77]))
    validation = find_labels(tmp_path, None, "val")[1]
    assert validation.files == [(image, classes)] and torch.equal(validation[0][1], by_id[0][1])


@given(seed=seeds, h=st.integers(8, 60), w=st.integers(8, 60), crop=st.integers(16, 64), axis=st.sampled_from((0, 1)))
def test_labels_are_moved_with_the_image(seed, h, w, crop, axis):
    torch.manual_seed(seed)
    place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))[axis]
    augment = label_sets.LabelAugmentation(crop, min(h, w))
    augment.change = lambda view: view / 4.0  # no colours
    image, labels = augment((4 * place).byte().expand(3, h, w).contiguous(), place)
    assert (image - labels)[:, labels != VOID].abs().max() <= 1


def test_images_are_smoothed_before_they_are_made_smaller():
    columns = (torch.arange(64) % 4 == 0) * 255  # between those that a bilinear look at every fourth place meets
    augment = label_sets.LabelAugmentation(16, 16, scale=(1.0, 1.0))
    augment.change = lambda view: view.float() / 255  # no colours
    picture, _ = augment(columns.byte().expand(3, 64, 64).contiguous(), torch.zeros(64, 64, dtype=torch.int64))
    assert picture[:, :, 2:-2].mean().item() == pytest.approx(0.25, abs=0.03)


def test_crops_lie_anywhere_half_of_them_flipped_and_colours_change_but_no_label():
    labels, image = torch.arange(144).view(12, 12), torch.full((3, 12, 12), 120, dtype=torch.uint8)
    image[1] = 60
    corners, colours, flipped = set(), set(), 0
    for seed in range(150):
        torch.manual_seed(seed)
        picture, moved = label_sets.LabelAugmentation(10, 12, scale=(1.0, 1.0))(image, labels)
        top, left = divmod(moved.min().item(), 12)
        expected = labels[top : top + 10, left : left + 10]
        assert torch.equal(moved, expected) or torch.equal(moved, expected.flip(1))
        flipped += not torch.equal(moved, expected)
        corners.add((top, left)), colours.add(tuple(picture[:, 4, 4].tolist()))
    assert corners == set(product(range(3), repeat=2)) and 45 <= flipped <= 105 and len(colours) > 75


def test_the_shorter_side_becomes_the_size_times_a_factor_and_what_is_beyond_the_image_is_void():
    image, labels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8), torch.randint(0, 9, (20, 30))
    shapes, corners, mean_colours = set(), set(), 0
    for seed in range(200):
        torch.manual_seed(seed)
        picture, moved = label_sets.LabelAugmentation(64, 16)(image, labels)
        beyond = moved == VOID
        rows, columns = ((~beyond).any(dim=dim).sum().item() for dim in (1, 0))
        assert (~beyond).sum() == rows * columns  # the image is whole
        assert abs(columns - 1.5 * rows) <= 1 and 8 <= rows <= 32
        shapes.add(rows), corners.add(tuple((~beyond).nonzero()[0].tolist()))
        colour = picture[:, beyond].unique(dim=1)
        assert colour.shape == (3, 1)  # ImageNet's mean, before colours change
        mean_colours += torch.allclose(255 * colour[:, 0], torch.tensor([124.0, 116, 104]), atol=0.01)
    assert min(shapes) <= 10 and max(shapes) >= 30 and len(shapes) > 15
    assert len(corners) > 150 and 20 < mean_colours < 80


def davis_names(root, *options):
    return [video.name for video in find_masked_videos(root, *options)[0]]


@pytest.mark.parametrize("files, folder", [(False, "2017"), (True, "480p")])
def test_davis_2016_and_2017_give_the_sequences_of_their_list_in_its_order_one_folder_deep(tmp_path, files, folder):
    home = helpers.write_davis(tmp_path / "root/DAVIS", ["bear", "dogs-jump", "camel", "swing"])
    helpers.write_davis_lists(home, folder, files, train=["swing", "bear"], val=["dogs-jump", "camel"])
    write_image(tmp_path / "root/VOCdevkit/JPEGImages/1.jpg")  # has folders of these names too
    (tmp_path / "root/VOCdevkit/Annotations").mkdir()
    helpers.write_mac_leftovers(tmp_path / "root")
    for root in (home, home.parent):
        videos, notes = find_masked_videos(root)
        assert [video.name for video in videos] == ["dogs-jump", "camel"] and notes == []
        assert davis_names(root, "train") == ["swing", "bear"]
    assert videos[1].frame_names == ["00000", "00001", "00002"] and videos[1].length == 3
    assert torch.equal(videos[1].frames(2), load_image(home / "JPEGImages/480p/camel/00002.jpg"))
    with raises_one_line(MissingSet, tmp_path, "no DAVIS", "JPEGImages/480p/SEQUENCE/00000.jpg"):
        find_masked_videos(tmp_path)  # two folders deep


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_may_begin_with_a_byte_order_mark_and_name_any_file(encoding, tmp_path):
    names = ["polar bear", "ein Bär"] + ["b\udce4r in Latin-1"] * (encoding == "utf-8")
    helpers.write_davis(tmp_path, names)
    for name in names:
        write_image(tmp_path / f"voc/JPEGImages/{name}.jpg")
        write_ids(tmp_path / f"voc/SegmentationClass/{name}.png", helpers.block())
    for place in ("ImageSets/2017/val.txt", "voc/ImageSets/Segmentation/train.txt"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes("".join(f"{name}\r\n" for name in names).encode(encoding, "surrogateescape"))
    assert davis_names(tmp_path) == names
    assert sorted(image.stem for image, _ in find_labels(tmp_path, "voc", "train")[1].files) == sorted(names)


def test_the_year_chooses_the_list_and_of_several_folders_the_one_that_has_it(tmp_path):
    homes = [helpers.write_davis(tmp_path / "several" / name, [name]) for name in ("bear", "camel")]
    helpers.write_davis_lists(homes[0], "480p", True, val=["bear"])
    with raises_one_line(ValueError, *homes, "--data-root"):
        find_masked_videos(tmp_path / "several")
    helpers.write_davis_lists(homes[1], "2017", False, val=["camel", "camel"])
    assert [davis_names(tmp_path / "several", "val", year) for year in ("2016", "2017")] == [["bear"], ["camel"]]
    helpers.write_davis(tmp_path, ["bear", "camel", "dogs-jump", "swing"])
    helpers.write_davis_lists(tmp_path, "480p", True, val=["bear"])
    assert davis_names(tmp_path) == davis_names(tmp_path, "val", "2016") == ["bear"]
    with raises_one_line(MissingSet, tmp_path / "ImageSets", "no list val.txt of DAVIS 2017"):
        find_masked_videos(tmp_path, "val", "2017")
    helpers.write_davis_lists(tmp_path, "2016", False, val=["camel"])
    helpers.write_davis_lists(tmp_path, "2017", False, val=["dogs-jump", "camel"], **{"test-dev": ["swing"]})
    assert davis_names(tmp_path) == davis_names(tmp_path, "val", "2017") == ["dogs-jump", "camel"]
    assert davis_names(tmp_path, "val", "2016") == ["camel"] and davis_names(tmp_path, "test-dev") == ["swing"]


def test_without_a_list_all_sequences_are_taken_and_a_note_says_so(tmp_path):
    home = helpers.write_davis(tmp_path / "DAVIS", ["swing", "bear"], "240p")
    videos, (note,) = find_masked_videos(tmp_path)
    assert [video.name for video in videos] == ["bear", "swing"] and "all 2 sequences" in note
    helpers.write_davis(home, ["camel"], "480p")  # goes before another resolution
    assert davis_names(tmp_path) == ["camel"]
    helpers.write_davis_lists(home, "2017", False, val=[""])
    with raises_one_line(FileNotFoundError, home / "ImageSets/2017/val.txt", "no sequence"):
        find_masked_videos(tmp_path)


def test_frames_are_in_natural_order_and_masks_are_those_of_their_names(tmp_path):
    for index in (2, 10, 9, 1):
        write_image(tmp_path / f"JPEGImages/480p/bear/{index}.jpg")
        write_ids(tmp_path / f"Annotations/480p/bear/{index}.png", helpers.block(index))
    write_image(tmp_path / "JPEGImages/480p/bear/more/3.jpg")  # in a folder of its own
    ((video,), _) = find_masked_videos(tmp_path)
    assert video.frame_names == ["1", "2", "9", "10"]
    assert [video.masks(index).max().item() for index in range(4)] == [1, 2, 9, 10]


BROKEN_SEQUENCES = {
    "no frames in it": ("frames", lambda path: [frame.unlink() for frame in path.iterdir()]),
    "the mask of its first frame": ("masks/00000.png", Path.unlink),
    "frame missing, its mask is there": ("frames/00001.jpg", Path.unlink),
    "no object in the mask": ("masks/00000.png", lambda path: write_ids(path, 0 * helpers.block())),
    "must have hard edges": ("masks/00000.png", lambda path: write_ids(path, np.arange(64, 256).reshape(12, 16), "L")),
    "png: not a readable image": ("masks/00001.png", helpers.cut_short),
    "jpg: not a readable image": ("frames/00001.jpg", helpers.cut_short),
    "a mask of 20x20 px": ("masks/00001.png", lambda path: write_ids(path, helpers.block(1, 20, 20))),
    "20x20 px, but its labels are 16x12 px": ("frames/00001.jpg", lambda path: write_image(path, (20, 20))),
}
"""What the error says, and the file, which it must name, with its damage."""


@pytest.mark.parametrize("words", BROKEN_SEQUENCES)
def test_a_damaged_sequence_is_reported_by_the_path_of_its_file(words, tmp_path):
    helpers.write_davis(tmp_path, ["bear"])
    place, damage = BROKEN_SEQUENCES[words]
    path = tmp_path / place.replace("frames", "JPEGImages/480p/bear").replace("masks", "Annotations/480p/bear")
    damage(path)
    with raises_one_line((ValueError, FileNotFoundError), path.with_suffix(""), words):
        ((video,), _) = find_masked_videos(tmp_path)
        video.masks(1), video.frames(1)


def test_a_sequence_that_cannot_be_followed_or_measured_is_left_out_with_a_note(tmp_path):
    home = helpers.write_davis(tmp_path, ["bear", "camel", "cows", "swing"])
    write_ids(home / "Annotations/480p/bear/00000.png", 0 * helpers.block())
    for path in sorted((home / "JPEGImages/480p/camel").iterdir())[2:]:
        path.unlink(), (home / "Annotations/480p/camel" / f"{path.stem}.png").unlink(missing_ok=True)
    write_ids(home / "Annotations/480p/cows/00000.png", np.arange(64, 256).reshape(12, 16), "L")
    videos, notes = find_masked_videos(tmp_path)
    assert [video.name for video in videos] == ["swing"] and len(notes) == 4
    for note, words in zip(notes[1:], ("no object", "2 frame(s)", "hard edges"), strict=True):
        assert note.startswith("left out: ") and words in note


def two_blocks(first, second, void=0):
    mask = helpers.block(first)
    mask[9:11, 2:14], mask[:2, 5:] = second, void
    return mask


def video_of(home, masks, year=None, mode="P"):
    helpers.write_sequence(home, "bear", masks, mode=mode)
    return find_masked_videos(home, "val", year)[0][0]


def test_numbers_of_objects_stay_as_they_are_and_void_is_no_object(tmp_path):
    masks = [two_blocks(3, 1, VOID), two_blocks(1, 3), None, helpers.block(7), helpers.block(VOID)]
    video = video_of(tmp_path, masks)
    assert (video.name, video.objects, video.length, video.masks(2)) == ("bear", [1, 3], 5, None)
    for index in (0, 1, 3, 4):  # also where a later mask holds void alone
        np.testing.assert_array_equal(video.masks(index), masks[index])


@pytest.mark.parametrize("mode", ["L", "P"])
def test_white_masks_show_one_object_number_1_and_davis_2016_merges_all_objects_but_void(tmp_path, mode):
    white = [helpers.block(255), 0 * helpers.block(), two_blocks(255, 255)]
    several = [two_blocks(3, 1, VOID), two_blocks(1, 0), helpers.block(9), helpers.block(VOID), 0 * helpers.block()]
    for name, masks, year in (("a", white, None), ("b", white, "2016"), ("c", several, "2016")):
        video = video_of(tmp_path / name, masks, year, mode)
        assert video.objects == [1]
        for index, mask in enumerate(masks):
            void = (mask == VOID) & (masks is several)
            np.testing.assert_array_equal(video.masks(index), np.where(void, VOID, mask > 0))
    helpers.write_davis_lists(tmp_path / "a", "2017", False, val=["bear"])
    with pytest.raises(FileNotFoundError, match="a mask of DAVIS 2016"):  # its archive replaces files of 2017's
        find_masked_videos(tmp_path / "a")
