"""Tests of the paper's data sets in data.py: found, mixed, their true flow read. Each is named after its claim.

No data set is needed: each is written small, in the folders and under the names of its archives.
"""

import json
import re
import struct
import tracemalloc
import zlib
from collections import Counter
from contextlib import contextmanager
from itertools import islice, pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets import _optical_flow, utils
from torchvision.transforms import v2

from data import FlowAugmentation, FramePairs, ShardedStream, ColorJitter, _GaussianBlur, _Solarize, make_loader
from sources.flow_benchmarks import FLOW_BENCHMARKS, find_benchmark, read_flow
from sources.training_sets import VIDEO_SETS, ImageNet, Mix, find_video_set

seeds = st.integers(0, 2**31)


def run(pattern, numbers):
    return [pattern.format(i) for i in numbers]


def expand(pattern):
    """As a shell does: a{b,c}d is abd and acd."""
    parts = re.split(r"\{(.*?)\}", pattern)
    return ["".join(each) for each in product(*(part.split(",") if i % 2 else [part] for i, part in enumerate(parts)))]


def write(root, names, size=(8, 12), color=(10, 20, 30)):
    """An image under each name; an empty file where the name is not an image's."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".ppm", ".jpg", ".jpeg"):
            Image.new("RGB", size[::-1], color).save(path)
        else:
            path.touch()
    return path


@contextmanager
def told(kind, *words):
    """An error of one line that holds all of the words."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message


# ------------------------------------------------------------------------------------------------ data sets of video

DRIVE = "2011_09_26/2011_09_26_drive_0001_sync"
CLIPS = {
    "kitti_raw": [
        run(f"{DRIVE}/image_02/data/{{:010d}}.png", range(4)),
        run("2011_09_26/2011_09_26_drive_0002_sync/image_02/data/{:010d}.png", range(2)),
        run("2011_10_03/2011_10_03_drive_0027_sync/image_02/data/{:010d}.png", range(3)),
    ],
    "kitti2012": [
        run(scene + "{:02d}.png", numbers)
        for scene in expand("{training,testing}/colored_0/00000{0,1}_")
        for numbers in (range(9), range(13, 21))
    ],
    "kitti2015": [
        run(scene + "{:02d}.png", numbers)
        for scene in expand("{training,testing}/image_2/00000{0,1}_")
        for numbers in (range(9), range(13, 21))
    ],
    "sintel_clean": [
        expand("training/clean/alley_1/frame_000{1,2,3}.png"),
        expand("training/clean/bamboo_2/frame_000{1,2}.png"),
        expand("test/clean/market_1/frame_000{1,2,3}.png"),
    ],
    "sintel_final": [
        expand("training/final/alley_1/frame_000{1,2,3}.png"),
        expand("test/final/market_1/frame_000{1,2,3}.png"),
    ],
    "sintel_raw": [expand("scene_1/frame_000{1,2,3,4}.png"), expand("scene_2/frame_000{5,6,7}.png")],
    "chairs": [expand(f"data/0000{pair}_img{{1,2}}.ppm") for pair in range(1, 4)],
    "things_clean": [
        expand(clip + "/000{6,7,8}.png") for clip in expand("frames_cleanpass/TRAIN/{A/0000,C/0001}/{left,right}")
    ],
    "things_final": [
        expand(clip + "/000{6,7,8}.png") for clip in expand("frames_finalpass/TRAIN/{A/0000,C/0001}/{left,right}")
    ],
    "hd1k": [
        expand("hd1k_input/image_2/000000_00{10,11,12}.png"),
        expand("hd1k_input/image_2/000001_00{10,11}.png"),
    ],
}
"""The clips that each set must give, as they lie in its archives."""

BESIDE = {
    "kitti_raw": expand(f"{DRIVE}/{{image_03/data/0000000000.png,image_02/timestamps.txt}}"),
    "kitti2012": expand("{training,testing}/colored_0/00000{0,1}_{09,10,11,12}.png")
    + expand("training/{colored_1,flow_occ}/000000_10.png"),
    "kitti2015": expand("{training,testing}/image_2/00000{0,1}_{09,10,11,12}.png")
    + expand("training/{image_3,flow_occ}/000000_10.png"),
    "sintel_clean": expand("training/{final/alley_1/frame_0001.png,flow/alley_1/frame_0001.flo}"),
    "sintel_final": expand("training/{clean,occlusions}/alley_1/frame_0001.png"),
    "sintel_raw": ["scene_1/notes.txt"],
    "chairs": expand("{data/00001_flow.flo,data/00002_flow.png,FlyingChairs_train_val.txt}"),
    "things_clean": expand("frames_cleanpass/{TEST/A/0000/left/0006.png,TRAIN/A/0000/left/Thumbs.db}"),
    "things_final": ["frames_finalpass/TEST/A/0000/left/0006.png"],
    "hd1k": expand("{hd1k_flow_gt/flow_occ/000000,hd1k_challenge/image_2/000036}_0010.png"),
}
"""Files of the same archives that belong to no clip: frames of other cameras and splits, truth, lists."""


def write_set(name, folder, beside=False):
    write(folder, [frame for clip in CLIPS[name] for frame in clip])
    if beside:
        write(folder, BESIDE[name])
    return folder


def clips_of(found):
    return sorted([str(frame.relative_to(found.path)) for frame in clip.frames] for clip in found.clips)


def write_drive(root, names, **options):
    """Frames of one drive of KITTI raw; returns their folder."""
    return write(root / DRIVE / "image_02" / "data", names, **options).parent


def test_every_set_has_a_layout_here():
    assert VIDEO_SETS.keys() == CLIPS.keys() == BESIDE.keys()


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize("name", CLIPS)
def test_each_set_is_found_in_its_native_layout_and_up_to_two_folders_deeper(name, depth, tmp_path):
    own = write_set(name, tmp_path / "root" / "disk" / name, beside=True)
    found = find_video_set(name, (own, *own.parents)[depth])
    assert found.path == own and found.notes == []
    assert clips_of(found) == sorted(CLIPS[name])
    pairs = FramePairs(found.clips)
    assert len(pairs) == sum(len(clip) - 1 for clip in CLIPS[name])
    assert pairs[len(pairs) - 1][1].shape == (3, 8, 12)


@pytest.mark.parametrize("name", CLIPS)
def test_a_set_three_folders_deeper_is_not_found(name, tmp_path):
    write_set(name, tmp_path / "root" / "a" / "b" / name)
    assert find_video_set(name, tmp_path / "root") is None


@pytest.mark.parametrize("name", CLIPS)
def test_no_set_is_taken_for_another(name, tmp_path):
    write_set(name, tmp_path / "root" / name)
    assert [other for other in VIDEO_SETS if find_video_set(other, tmp_path / "root")] == [name]


def test_all_sets_side_by_side_are_each_found_in_their_own_folder(tmp_path):
    own = {name: tmp_path / "root" / name.removesuffix("_clean").removesuffix("_final") for name in CLIPS}
    for name, folder in own.items():
        write_set(name, folder)
    for name, folder in own.items():
        found = find_video_set(name, tmp_path / "root")
        assert found.path == folder
        assert clips_of(found) == sorted(CLIPS[name])


@pytest.mark.parametrize("name", ["kitti2012", "kitti2015"])
def test_kitti_multiview_trains_neither_on_frames_9_to_12_nor_on_a_pair_across_them(name, tmp_path):
    write_set(name, tmp_path, beside=True)
    clips = find_video_set(name, tmp_path).clips
    pairs = Counter((int(a.stem[-2:]), int(b.stem[-2:])) for clip in clips for a, b in pairwise(clip.frames))
    assert pairs == dict.fromkeys([(i, i + 1) for i in range(20) if i < 8 or i > 12], 4)  # two scenes, two parts
    assert {clip.frames[0].parts[-3] for clip in clips} == {"training", "testing"}


@pytest.mark.parametrize("name, folder", [("kitti2012", "colored_0"), ("kitti2015", "image_2")])
def test_kitti_with_frames_10_and_11_alone_is_not_its_multiview_extension(name, folder, tmp_path):
    write(tmp_path / "a_plain", expand(f"{{training,testing}}/{folder}/000000_{{10,11}}.png"))
    assert find_video_set(name, tmp_path) is None
    write_set(name, tmp_path / "multiview")
    assert find_video_set(name, tmp_path).path == tmp_path / "multiview"


def spoil_as_a_mac_does(folder):
    """Files ._NAME beside the others, and in a folder __MACOSX."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        apart = folder / "__MACOSX" / path.parent.relative_to(folder)
        apart.mkdir(parents=True, exist_ok=True)
        for place in (path.parent, apart):
            (place / f"._{path.name}").write_bytes(b"Mac OS X")


@pytest.mark.parametrize("name", CLIPS)
def test_what_a_mac_leaves_in_an_archive_is_no_frame(name, tmp_path):
    own = write_set(name, tmp_path / "root" / name)
    spoil_as_a_mac_does(tmp_path / "root")
    found = find_video_set(name, tmp_path / "root")
    assert found.path == own
    assert clips_of(found) == sorted(CLIPS[name])


# ------------------------------------------------------------------------------------------------ the film, cut by cut

SHOTS = (24, 30, 21)


def write_film(path, lengths=SHOTS, codec="MJPG", rate=24.0):
    """Shots of that many frames: blue, green, and red ones, with a texture that moves by a pixel per frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, (128, 96))
    for shot, length in enumerate(lengths):
        noise = np.random.default_rng(shot).standard_normal((96, 256)).astype(np.float32)
        light = np.clip(0.7 + 1.5 * cv2.GaussianBlur(noise, (0, 0), 3), 0.4, 1)
        color = np.roll([220, 80, 80], shot)
        for i in range(length):
            writer.write((light[:, i : i + 128, None] * color).astype(np.uint8))
    writer.release()
    return path


def shot_of(image):
    """The number of the shot that a frame (RGB) is of, by its colour."""
    return 2 - int(image.float().mean(dim=(1, 2)).argmax())


def ranges(*lengths):
    ends = np.cumsum((0, *lengths)).tolist()
    return [range(start, end) for start, end in pairwise(ends)]


def frames_of(film):
    return [clip.frames for clip in find_video_set("sintel_raw", film.parent).clips]


@pytest.mark.parametrize("codec, name", [("MJPG", "Sintel.avi"), ("mp4v", "sintel-1280-surround.mp4")])
@pytest.mark.parametrize("rate", [24.0, 24000 / 1001])
def test_the_shots_of_a_film_are_its_clips_and_no_pair_lies_across_a_cut(codec, name, rate, tmp_path):
    film = write_film(tmp_path / "disk" / name, codec=codec, rate=rate)
    found = find_video_set("sintel_raw", tmp_path)
    assert found.path == film and found.notes == []
    assert [clip.frames for clip in found.clips] == ranges(*SHOTS)
    pairs = FramePairs(found.clips)
    shots = [tuple(shot_of(image) for image in pair) for pair in pairs]
    assert shots == [(shot, shot) for shot, length in enumerate(SHOTS) for _ in range(length - 1)]


def test_a_film_without_a_cut_is_one_clip(tmp_path):
    assert frames_of(write_film(tmp_path / "sintel.avi", (20,))) == [range(20)]


def test_the_cuts_are_kept_beside_the_film_and_used_the_second_time(tmp_path):
    film = write_film(tmp_path / "sintel.avi")
    frames_of(film)
    kept = tmp_path / "sintel.avi.shots.json"
    assert sorted(tmp_path.iterdir()) == [film, kept]
    known = json.loads(kept.read_text())
    assert known == {"size": film.stat().st_size, "shots": [[0, 24], [24, 54], [54, 75]]}
    kept.write_text(json.dumps(known | {"shots": [[0, 10], [10, 11], [11, 75]]}))
    assert frames_of(film) == [range(10), range(11, 75)]  # a shot of one frame makes no pair


def test_the_cuts_are_found_anew_when_the_size_of_the_film_has_changed(tmp_path):
    film = write_film(tmp_path / "sintel.avi")
    assert frames_of(film) == ranges(*SHOTS)
    write_film(film, (20, 25))
    assert frames_of(film) == ranges(20, 25)
    assert json.loads((tmp_path / "sintel.avi.shots.json").read_text())["size"] == film.stat().st_size


def test_a_broken_list_of_cuts_is_made_anew(tmp_path):
    film = write_film(tmp_path / "sintel.avi")
    kept, size = tmp_path / "sintel.avi.shots.json", film.stat().st_size
    for content in (
        b"",
        b"\xff\xfe",
        b"hello",
        b"[]",
        b'{"size": %d}' % size,
        b'{"shots": [[0, 75]]}',
        b'{"size": %d, "shots": 5}' % size,
        b'{"size": %d, "shots": [[0, "a"]]}' % size,
        b'{"size": %d, "shots": [[0, 20], [20, 4' % size,
    ):
        kept.write_bytes(content)
        assert frames_of(film) == ranges(*SHOTS), content
        assert json.loads(kept.read_text())["size"] == size, content


@pytest.mark.parametrize("damage", ["text", "empty", "header only"])
def test_a_film_that_cannot_be_decoded_is_told_by_its_path(damage, tmp_path):
    film = write_film(tmp_path / "sintel.avi")
    film.write_bytes({"text": b"hello", "empty": b"", "header only": film.read_bytes()[:300]}[damage])
    with told(ValueError, film, "cannot be decoded"):
        find_video_set("sintel_raw", tmp_path)


def test_cuts_are_found_by_counting_frames_whatever_their_times(tmp_path):
    """As if frames had been dropped on encoding: each cluster of a Matroska file but the first comes 83 ms later."""
    film = write_film(tmp_path / "sintel.mkv", codec="mp4v")
    first, *others = film.read_bytes().split(bytes.fromhex("1F43B675"))  # a cluster's mark
    shifted = []
    for number, cluster in enumerate(others):
        start = cluster.index(b"\xe7") + 1  # its time in ms: E7, the count of its bytes, its bytes
        stop = start + 1 + (cluster[start] & 15)
        later = int.from_bytes(cluster[start + 1 : stop], "big") + 83 * (number > 0)
        shifted.append(cluster[: start + 1] + later.to_bytes(stop - start - 1, "big") + cluster[stop:])
    assert len(shifted) > 1
    film.write_bytes(bytes.fromhex("1F43B675").join([first, *shifted]))
    assert frames_of(film) == ranges(*SHOTS)


@pytest.mark.parametrize("name", ["sintel_raw", "Sintel-movie", "SintelFilm"])
def test_folders_of_the_film_s_frames_are_taken_before_a_video_file_beside_them(name, tmp_path):
    write_set("sintel_raw", tmp_path / name)
    (tmp_path / "MPI-Sintel-complete").mkdir()
    assert find_video_set("sintel_raw", tmp_path).path == tmp_path / name


# ------------------------------------------------------------------------------------------------ numbers of frames


@settings(max_examples=30, deadline=None)
@given(numbers=st.sets(st.integers(0, 25), min_size=2), digits=st.sampled_from((1, 4)))
def test_clips_are_the_runs_of_numbers_without_a_gap_and_a_note_names_the_files_around_each_gap(numbers, digits):
    names = {number: f"{number:0{digits}d}.png" for number in numbers}
    runs = [[min(numbers)]]
    for number in sorted(numbers)[1:]:
        if number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    assume(any(len(numbers) > 1 for numbers in runs))
    with TemporaryDirectory() as root:
        folder = write_drive(Path(root), names.values())
        found = find_video_set("kitti_raw", Path(root))
    clips = [[frame.name for frame in clip.frames] for clip in found.clips]
    assert clips == [[names[n] for n in numbers] for numbers in runs if len(numbers) > 1]
    assert len(found.notes) == len(runs) - 1
    for note, (before, after) in zip(found.notes, pairwise(runs), strict=True):
        assert note.startswith(f"{folder / names[before[-1]]}: {after[0] - before[-1] - 1} ")
        assert f" {names[after[0]]}," in note and "\n" not in note


@pytest.mark.parametrize("name", CLIPS)
def test_a_set_without_two_frames_that_follow_each_other_is_told_by_its_path(name, tmp_path):
    (tmp_path / name).mkdir()
    for clip in CLIPS[name]:
        frame = write(tmp_path / name, clip[:1])
        number = re.search(r"\d+$", frame.stem)[0]
        frame.with_stem(frame.stem.removesuffix(number) + f"{int(number) + 5:0{len(number)}d}").touch()
    with told(ValueError, tmp_path / name, "follow"):
        find_video_set(name, tmp_path)


def test_numbers_without_zeros_before_them_are_read_as_numbers(tmp_path):
    write_drive(tmp_path, run("{}.png", range(1, 12)))
    found = find_video_set("kitti_raw", tmp_path)
    assert [[frame.stem for frame in clip.frames] for clip in found.clips] == [[str(i) for i in range(1, 12)]]
    assert found.notes == []


@pytest.mark.parametrize(
    "names, named, words",
    [
        (["0001.png", "0002.png", "1.png"], "1.png", ("twice", "0001.png")),
        (["0001.png", "0002.jpg", "0002.png"], "0002.png", ("twice", "0002.jpg")),
        (["0001.png", "0002.png", "mean.png"], "mean.png", ("does not end in the number",)),
        (["0001.png"], "0001.png", ("the only frame",)),
        (["a_1.png", "a_2.png", "b_3.png"], "b_3.png", ("the only frame",)),
    ],
)
def test_a_frame_twice_without_a_number_or_alone_is_told_by_its_path(names, named, words, tmp_path):
    folder = write_drive(tmp_path, names)
    with told(ValueError, folder / named, *words):
        find_video_set("kitti_raw", tmp_path)


def test_frames_of_two_sizes_are_told_by_their_path(tmp_path):
    write_drive(tmp_path, ["0.png"], size=(8, 12))
    folder = write_drive(tmp_path, ["1.png"], size=(8, 16))
    pairs = FramePairs(find_video_set("kitti_raw", tmp_path).clips)
    with told(ValueError, folder / "1.png", "16x8", "0.png", "12x8"):
        pairs[0]


@pytest.mark.parametrize("find", [lambda root: find_video_set("chairs", root), find_benchmark, ImageNet])
def test_a_missing_root_is_told_by_its_path(find, tmp_path):
    write(tmp_path, ["file.png"])
    for root in (tmp_path / "nowhere", tmp_path / "file.png"):
        with told(FileNotFoundError, f"{root}: no such folder"):
            find(root)


# ------------------------------------------------------------------------------------------------ the mix


class Items(Dataset):
    """Each item is (number of the set, its own index)."""

    def __init__(self, number, length):
        self.number, self.length = number, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([self.number, range(self.length)[index]])


def mix_of(*lengths_and_repeats):
    parts = {str(k): Items(k, length) for k, (length, _) in enumerate(lengths_and_repeats)}
    return Mix(parts, {str(k): repeats for k, (_, repeats) in enumerate(lengths_and_repeats)})


def drawn(mix, count, **options):
    """The first draws of a single process, as (number of the set, index in it)."""
    stream = ShardedStream(len(mix), 1, order=mix.order, **options)
    return [tuple(mix[index].tolist()) for _, index in islice(stream, count)]


contents = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(contents)
def test_the_indices_of_a_mix_go_through_each_set_as_often_as_it_is_repeated(content):
    mix = mix_of(*content)
    assert len(mix) == sum(length * repeats for length, repeats in content)
    items = [tuple(mix[index].tolist()) for index in range(len(mix))]
    assert items == [
        (k, i) for k, (length, repeats) in enumerate(content) for _ in range(repeats) for i in range(length)
    ]
    with pytest.raises(IndexError):
        mix[len(mix)]


@settings(max_examples=30, deadline=None)
@given(content=contents, seed=seeds)
def test_each_item_comes_repeats_times_in_a_pass_and_a_set_comes_wholly_before_any_of_it_comes_again(content, seed):
    mix = mix_of(*content)
    items = drawn(mix, 3 * len(mix), seed=seed)
    for start in range(0, len(items), len(mix)):
        times = Counter(items[start : start + len(mix)])
        assert times == {(k, i): repeats for k, (length, repeats) in enumerate(content) for i in range(length)}
    for k, (length, _) in enumerate(content):
        own = [index for number, index in items if number == k]
        for start in range(0, len(own), length):
            assert sorted(own[start : start + length]) == list(range(length))


@settings(max_examples=30, deadline=None)
@given(content=contents, seed=seeds)
def test_at_any_point_of_a_pass_each_set_has_come_in_its_share_to_a_few_items(content, seed):
    mix = mix_of(*content)
    numbers = np.array([number for number, _ in drawn(mix, len(mix), seed=seed)])
    for k, length in enumerate(mix.lengths.values()):
        come = np.cumsum(numbers == k)
        due = np.arange(1, len(mix) + 1) * length / len(mix)
        assert np.abs(come - due).max() <= len(content) + 1  # each set is within one item of an even rate


MANY = ((700, 1), (40, 50), (1500, 2), (9, 100))


def test_shares_are_those_of_the_lengths_within_a_percent_over_10000_draws_and_over_any_1000():
    mix = mix_of(*MANY)
    numbers = np.array([number for number, _ in drawn(mix, 10_000)])
    for k, (length, repeats) in enumerate(MANY):
        share = length * repeats / sum(length * repeats for length, repeats in MANY)
        counts = np.cumsum(np.concatenate(([0], numbers == k)))
        assert abs(counts[-1] / 10_000 - share) < 0.01
        assert np.abs((counts[1000:] - counts[:-1000]) / 1000 - share).max() < 0.01


def test_passes_and_seeds_of_a_mix_have_orders_of_their_own():
    mix = mix_of((30, 1), (10, 3))
    first, second = drawn(mix, 60), drawn(mix, 60, seed=1)
    assert drawn(mix, 60) == first
    assert first != second
    items = drawn(mix, 120)
    assert items[:60] != items[60:]
    own = [index for number, index in first if number == 1]
    assert own[:10] != own[10:20] and own[:10] != sorted(own[:10])


@pytest.mark.parametrize("world", [2, 3])
def test_the_processes_share_a_mix_without_an_overlap(world):
    mix = mix_of(*MANY)
    steps, batch = 400, 4
    options = dict(order=mix.order, seed=7)
    alone = list(islice(ShardedStream(len(mix), batch, **options), world * steps * batch))
    parts = [
        list(islice(ShardedStream(len(mix), batch, rank=rank, world_size=world, **options), steps * batch))
        for rank in range(world)
    ]
    joined = [key for part in parts for key in part]
    assert len(set(joined)) == len(joined)
    assert sorted(joined) == sorted(alone)


def batches(count, **options):
    return torch.stack(list(islice(make_loader(mix_of((30, 1), (7, 4), (5, 9)), None, 6, **options), count)))


def test_a_loader_walks_a_mix_in_the_mix_s_own_order():
    mix = mix_of((30, 1), (7, 4), (5, 9))
    assert [tuple(item.tolist()) for item in batches(40, seed=3).flatten(0, 1)] == drawn(mix, 240, seed=3)


def test_batches_of_a_mix_depend_on_the_seed_and_not_on_the_number_of_workers():
    plain = batches(40, seed=3)
    assert torch.equal(batches(40, seed=3, workers=2), plain)
    assert not torch.equal(batches(40, seed=4), plain)


def test_a_loader_of_a_mix_goes_on_at_any_step_as_if_it_had_not_stopped():
    assert torch.equal(batches(20, start_step=20, workers=1), batches(40)[20:])


def test_processes_together_load_the_batches_of_a_mix_that_one_would():
    parts = [batches(20, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), batches(40))


# ------------------------------------------------------------------------------------------------ ImageNet

PHOTOS = ["n01440764/n01440764_18.JPEG", "n01440764/n01440764_36.JPEG", "n02119789/n02119789_1.JPEG"]


@pytest.mark.parametrize(
    "layout",
    expand("{ImageNet,imagenet-1k,disk/ImageNet}/train") + ["ILSVRC/Data/CLS-LOC/train", "ILSVRC2012", "", "train"],
)
def test_imagenet_is_found_in_the_layouts_of_its_archives(layout, tmp_path):
    root = tmp_path / "root"
    write(root / layout, PHOTOS, size=(20, 30))
    if "train" in layout:
        write(root / layout.replace("train", "val"), ["n01440764/ILSVRC2012_val_00000293.JPEG"])
    images = ImageNet(root)
    assert [str(Path(path).relative_to(root / layout)) for path, _ in images.samples] == PHOTOS
    for image in images:
        assert image.dtype == torch.uint8 and image.shape == (3, 20, 30)


def test_folders_beside_the_classes_of_imagenet_are_none(tmp_path):
    write(tmp_path, [*PHOTOS, "Sintel/training/clean/alley_1/frame_0001.png"])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    images = ImageNet(tmp_path)
    assert images.classes == ["n01440764", "n02119789"] and len(images) == 3


def test_what_a_mac_leaves_in_an_archive_is_no_image(tmp_path):
    write(tmp_path / "ImageNet" / "train", PHOTOS)
    spoil_as_a_mac_does(tmp_path)
    assert len(list(ImageNet(tmp_path))) == 3


def test_grey_and_cmyk_images_of_imagenet_become_rgb(tmp_path):
    folder = tmp_path / "ImageNet" / "train" / "n01440764"
    folder.mkdir(parents=True)
    for mode in ("L", "CMYK", "RGB"):
        Image.new(mode, (30, 20)).save(folder / f"{mode}.JPEG")
    assert [image.shape for image in ImageNet(tmp_path)] == 3 * [(3, 20, 30)]


@pytest.mark.parametrize("tiny", ["TinyImageNet", "A-tiny-imagenet-200"])
def test_tiny_imagenet_is_not_taken_for_imagenet(tiny, tmp_path):
    write(tmp_path / "root" / tiny / "train", ["n01443537/images/n01443537_0.JPEG"])
    with told(FileNotFoundError, tmp_path / "root", "no ImageNet in it"):
        ImageNet(tmp_path / "root")
    write(tmp_path / "root" / "ImageNet" / "train", PHOTOS)
    assert len(ImageNet(tmp_path / "root")) == 3


def test_folders_without_classes_are_no_imagenet(tmp_path):
    write(tmp_path / "ImageNet" / "train", ["fish/1.JPEG", "n0144/1.JPEG"])
    with told(FileNotFoundError, tmp_path, "ImageNet/train/n01440764/*.JPEG"):
        ImageNet(tmp_path)


def test_an_empty_class_of_imagenet_is_named(tmp_path):
    write(tmp_path / "ImageNet" / "train", PHOTOS)
    (tmp_path / "ImageNet" / "train" / "n09999999").mkdir()
    with told(FileNotFoundError, tmp_path / "ImageNet" / "train", "n09999999"):
        ImageNet(tmp_path)


def test_a_broken_image_of_imagenet_is_named(tmp_path):
    broken = write(tmp_path / "ImageNet" / "train", PHOTOS)
    broken.write_bytes(broken.read_bytes()[:100])
    images = ImageNet(tmp_path)
    with told(ValueError, broken, "not a readable image"):
        images[2]


# ------------------------------------------------------------------------------------------------ files of true flow


def random_flow(seed, size=(5, 7)):
    """(h, w, 2) as float32."""
    return np.random.default_rng(seed).normal(0, 50, (*size, 2)).astype(np.float32)


def write_flo(path, flow):
    h, w = flow.shape[:2]
    path.write_bytes(b"PIEH" + struct.pack("<ii", w, h) + flow.astype("<f4").tobytes())
    return path


def write_pfm(path, flow, order="<"):
    h, w = flow.shape[:2]
    rows = np.concatenate((flow, np.zeros((h, w, 1))), axis=2)[::-1].astype(f"{order}f4")  # from the bottom up
    path.write_bytes(f"PF\n{w} {h}\n{-1.0 if order == '<' else 1.0}\n".encode() + rows.tobytes())
    return path


def write_png(path, flow, known=None):
    """KITTI's: 16 bits; red, green, and blue are x, y, and whether they are known."""
    known = np.ones(flow.shape[:2]) if known is None else known
    stored = np.concatenate((flow * 64 + 2**15, known[..., None]), axis=2)
    cv2.imwrite(str(path), np.ascontiguousarray(np.round(stored).astype(np.uint16)[..., ::-1]))
    return path


WRITE = {".flo": write_flo, ".pfm": write_pfm, ".png": write_png}
arrays = st.tuples(seeds, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def read(path):
    """What read_flow gives, as (2, h, w) and (h, w) in NumPy."""
    flow, valid = read_flow(path)
    assert flow.dtype == torch.float32 and valid.dtype == torch.bool
    return flow[0].numpy(), valid[0, 0].numpy()


@settings(max_examples=30, deadline=None)
@given(arrays)
def test_flo_files_are_read_as_by_torchvision_and_opencv(array):
    flow = random_flow(*array)
    special = (3.0, 1.67e9, np.nan, np.inf)[array[0] % 4]
    flow[0, 0, 0] = special
    known = np.ones(flow.shape[:2], bool)
    known[0, 0] = special == 3
    assume(known.any())
    with TemporaryDirectory() as folder:
        path = write_flo(Path(folder, "a.flo"), flow)
        ours, valid = read(path)
        np.testing.assert_array_equal(ours, flow.transpose(2, 0, 1))
        np.testing.assert_array_equal(ours, _optical_flow._read_flo(str(path)))
        np.testing.assert_array_equal(ours, cv2.readOpticalFlow(str(path)).transpose(2, 0, 1))
    np.testing.assert_array_equal(valid, known)


@settings(max_examples=30, deadline=None)
@given(array=arrays, order=st.sampled_from("<>"))
def test_pfm_files_of_both_byte_orders_are_read_as_by_torchvision_and_opencv(array, order):
    flow = random_flow(*array)
    with TemporaryDirectory() as folder:
        path = write_pfm(Path(folder, "a.pfm"), flow, order)
        ours, valid = read(path)
        np.testing.assert_array_equal(ours, flow.transpose(2, 0, 1))
        np.testing.assert_array_equal(ours, utils._read_pfm(str(path), slice_channels=2))
        blue_green_red = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(ours, blue_green_red[..., :0:-1].transpose(2, 0, 1))
    assert valid.all()


@settings(max_examples=30, deadline=None)
@given(arrays)
def test_kitti_s_png_files_are_read_as_by_torchvision_and_opencv(array):
    flow = random_flow(*array)
    known = np.random.default_rng(array[0]).random(flow.shape[:2]) < 0.6
    known[0, 0] = True
    with TemporaryDirectory() as folder:
        path = write_png(Path(folder, "a.png"), flow, known)
        ours, valid = read(path)
        theirs, theirs_valid = _optical_flow._read_16bits_png_with_flow_and_valid_mask(str(path))
        blue_green_red = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(valid, known)
    np.testing.assert_array_equal(valid, theirs_valid)
    np.testing.assert_array_equal(ours[:, valid], theirs[:, valid])
    by_opencv = (blue_green_red[..., :0:-1].astype(np.float64) - 2**15) / 64
    np.testing.assert_array_equal(ours[:, valid], by_opencv.transpose(2, 0, 1)[:, valid])
    assert np.abs(ours - flow.transpose(2, 0, 1))[:, valid].max() <= 0.5 / 64 + 1e-4


DAMAGE = {
    "wrong magic number.flo": lambda good: b"HEIP" + good[4:],
    "cut short.flo": lambda good: good[:-1],
    "header only.flo": lambda good: good[:9],
    "empty.flo": lambda good: b"",
    "negative size.flo": lambda good: good[:4] + struct.pack("<ii", -7, -5) + good[12:],
    "absurd size.flo": lambda good: good[:4] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + good[12:],
    "cut short.pfm": lambda good: good[:-1],
    "text.pfm": lambda good: b"hello, this is text",
    "text behind the header.pfm": lambda good: b"PF\n7 5\n-1.0\nhello, this is text",
    "one channel.pfm": lambda good: b"Pf\n7 5\n-1.0\n" + good[-4 * 35 :],
    "one channel of three times the size.pfm": lambda good: b"Pf" + good[2:],
    "no size.pfm": lambda good: good.replace(b"7 5", b"0 5", 1),
    "absurd size.pfm": lambda good: good.replace(b"7 5", b"999999 999999", 1),
    "endless size.pfm": lambda good: good.replace(b"7 5", b"9" * 5000 + b" 5", 1),
    "cut short.png": lambda good: good[: len(good) // 2],
    "text.png": lambda good: b"hello, this is text",
    "wrong check sum.png": lambda good: good[:-16] + bytes(4) + good[-12:],
    "eight bits.png": lambda good: cv2.imencode(".png", np.ones((5, 7, 3), np.uint8))[1].tobytes(),
    "one channel.png": lambda good: cv2.imencode(".png", np.ones((5, 7), np.uint16))[1].tobytes(),
    "four channels.png": lambda good: cv2.imencode(".png", np.ones((5, 7, 4), np.uint16))[1].tobytes(),
    "nothing known.png": lambda good: cv2.imencode(".png", np.zeros((5, 7, 3), np.uint16))[1].tobytes(),
    "absurd size.png": lambda good: mended(good[:16] + struct.pack(">II", 2**30, 2**30) + good[24:]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_of_flow_is_named_without_a_large_allocation(name, tmp_path):
    path = WRITE[name[-4:]](tmp_path / name, random_flow(0))
    read_flow(path)  # good until here
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    tracemalloc.start()
    try:
        with told(ValueError, path):
            read_flow(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_missing_file_of_flow_is_named(tmp_path):
    with told(FileNotFoundError, tmp_path / "a.flo"):
        read_flow(tmp_path / "a.flo")


def mended(png):
    """A damaged png with right check sums: so the damage gets past them."""
    png, place = bytearray(png), 8
    while place + 12 <= len(png):
        end = place + 8 + int.from_bytes(png[place : place + 4], "big")
        if end + 4 > len(png):
            break
        png[end : end + 4] = zlib.crc32(png[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(png)


def damaged(content, edits):
    content = bytearray(content)
    for kind, place, value in edits:
        place %= len(content) + 1
        if kind == "set":
            content[place : place + 1] = bytes([value])
        elif kind == "insert":
            content[place:place] = 3 * bytes([value])
        elif kind == "delete":
            del content[place : place + 3]
        else:
            del content[place:]
    return bytes(content)


edits = st.lists(
    st.tuples(
        st.sampled_from(("set", "set", "set", "insert", "delete", "cut")),
        st.one_of(st.integers(0, 40), st.integers(0, 10_000)),  # half of them in the header
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("ending", WRITE)
@settings(max_examples=30, deadline=None)
@given(edits=edits, mend=st.booleans())
def test_random_damage_to_a_file_of_flow_gives_an_array_or_an_error_that_names_it(ending, edits, mend):
    with TemporaryDirectory() as folder:
        path = WRITE[ending](Path(folder, f"a{ending}"), random_flow(0))
        content = damaged(path.read_bytes(), edits)
        path.write_bytes(mended(content) if mend and ending == ".png" else content)
        try:
            flow, valid = read_flow(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert flow.shape[:2] == (1, 2) and valid.shape == (1, 1, *flow.shape[2:]) and valid.any()


# ------------------------------------------------------------------------------------------------ benchmarks of flow

FILES = {
    "sintel": [
        *expand("Sintel/training/{clean,final}/{alley_1,bamboo_2}/frame_000{1,2,3}.png"),
        *expand("Sintel/training/flow/{alley_1,bamboo_2}/frame_000{1,2}.flo"),
        *expand("Sintel/training/{occlusions,invalid}/{alley_1,bamboo_2}/frame_000{1,2}.png"),
        *expand("Sintel/test/{clean,final}/market_1/frame_000{1,2,3}.png"),
    ],
    "kitti2012": [
        *expand("KITTI2012/{training,testing}/colored_0/00000{0,1,2}_{10,11}.png"),
        *expand("KITTI2012/training/{flow_occ,flow_noc}/00000{0,1,2}_10.png"),
    ],
    "kitti2015": [
        *expand("KittiFlow/{training,testing}/image_2/00000{0,1,2}_{10,11}.png"),
        *expand("KittiFlow/training/{flow_occ,flow_noc,obj_map}/00000{0,1,2}_10.png"),
    ],
    "middlebury": [
        *expand("Middlebury/other-data/{RubberWhale,Venus}/frame{10,11}.png"),
        *expand("Middlebury/other-gt-flow/{RubberWhale,Venus}/flow10.flo"),
    ],
    "chairs": [
        *expand("FlyingChairs/data/0000{1,2,3,4,5}_{img1.ppm,img2.ppm,flow.flo}"),
        "FlyingChairs/FlyingChairs_train_val.txt",
    ],
    "things": [
        *expand("FlyingThings3D/frames_{clean,final}pass/{TEST,TRAIN}/{A/0000,B/0003}/{left,right}/000{6,7,8}.png"),
        *(
            f"{clip}/into_{to.lower()}/{camera}/OpticalFlowInto{to}_000{i}_{camera[0].upper()}.pfm"
            for clip in expand("FlyingThings3D/optical_flow/{TEST,TRAIN}/{A/0000,B/0003}")
            for to, camera, i in product(("Future", "Past"), ("left", "right"), (6, 7, 8))
        ),
    ],
    "hd1k": [
        *expand("hd1k/{hd1k_input/image_2,hd1k_flow_gt/flow_occ}/00000{0,1}_00{10,11,12}.png"),
        *expand("hd1k/hd1k_challenge/image_2/000036_00{10,11}.png"),
    ],
}
"""What each benchmark consists of; the folders are named as torchvision's classes want them."""


def write_benchmark(name, root):
    """Every file of true flow is another."""
    for number, file in enumerate(FILES[name]):
        path = root / file
        if path.suffix in (".flo", ".pfm") or path.parent.name in ("flow_occ", "flow_noc"):
            path.parent.mkdir(parents=True, exist_ok=True)
            WRITE[path.suffix](path, random_flow(number))
        elif path.suffix == ".txt":
            path.write_text("1\n2\n1\n2\n2\n")  # which of the pairs are for validation: those with a 2
        else:
            write(root, [file])
    return root


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """All benchmarks side by side; only to be read."""
    root = tmp_path_factory.mktemp("disk")
    for name in FILES:
        write_benchmark(name, root)
    return root


THEIRS = {
    "sintel": lambda root: datasets.Sintel(root, "train", pass_name="both"),
    "kitti2015": lambda root: datasets.KittiFlow(root, "train"),
    "chairs": lambda root: datasets.FlyingChairs(root, "val"),
    "things": lambda root: datasets.FlyingThings3D(root, "test", pass_name="both", camera="both"),
    "hd1k": lambda root: datasets.HD1K(root, "train"),
}


@pytest.mark.parametrize("name, count", [("sintel", 8), ("kitti2015", 3), ("chairs", 3), ("things", 32), ("hd1k", 4)])
def test_the_pairs_of_a_benchmark_and_their_flow_are_those_of_torchvision(name, count, disk):
    found, pairs, notes = find_benchmark(disk, name)
    theirs = THEIRS[name](disk)
    expected = {tuple(images): flow for images, flow in zip(theirs._image_list, theirs._flow_list, strict=True)}
    ours = {(str(pair.image_1), str(pair.image_2)): str(pair.flow) for pair in pairs}
    assert found == name and notes == []
    assert len(pairs) == len(ours) == len(expected) == count
    assert ours == expected
    for pair in pairs:
        flow, valid = read(pair.flow)
        expected_flow = theirs._read_flow(str(pair.flow))
        if isinstance(expected_flow, tuple):
            expected_flow, expected_valid = expected_flow
            np.testing.assert_array_equal(valid, expected_valid)
        np.testing.assert_array_equal(flow[:, valid], expected_flow[:, valid])


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("sintel", lambda root: datasets.Sintel(root, "test", pass_name="both")),
        ("kitti2015", lambda root: datasets.KittiFlow(root, "test")),
    ],
)
def test_the_pairs_of_a_split_with_secret_flow_are_those_of_torchvision(name, theirs, disk):
    _, pairs, _ = find_benchmark(disk, name, "testing")
    assert sorted([str(pair.image_1), str(pair.image_2)] for pair in pairs) == sorted(theirs(disk)._image_list)
    assert all(pair.flow is None for pair in pairs)


def test_the_pairs_of_kitti_2012_and_middlebury_are_all_of_their_scenes(disk):
    _, pairs, _ = find_benchmark(disk, "kitti2012")
    folder = disk / "KITTI2012" / "training"
    assert [pair.name for pair in pairs] == run("00000{}_10", range(3))
    assert [pair.image_2 for pair in pairs] == [folder / "colored_0" / f"00000{i}_11.png" for i in range(3)]
    assert [pair.flow for pair in pairs] == [folder / "flow_occ" / f"00000{i}_10.png" for i in range(3)]
    assert len(find_benchmark(disk, "kitti2012", "testing")[1]) == 3
    _, pairs, _ = find_benchmark(disk, "middlebury")
    folder = disk / "Middlebury"
    for pair, scene in zip(pairs, ("RubberWhale", "Venus"), strict=True):
        frames = tuple(folder / "other-data" / scene / f"frame{i}.png" for i in (10, 11))
        assert (pair.name, pair.image_1, pair.image_2) == (scene, *frames)
        assert pair.flow == folder / "other-gt-flow" / scene / "flow10.flo"


def test_masks_are_named_as_far_as_they_are_there(disk):
    for name, masks in (
        ("sintel", {"occlusions", "invalid"}),
        ("kitti2012", {"flow_noc"}),
        ("kitti2015", {"flow_noc", "obj_map"}),
        ("things", set()),
    ):
        for pair in find_benchmark(disk, name)[1]:
            assert pair.masks.keys() == masks
            assert all(path.is_file() and path.stem == pair.name.split("/")[-1] for path in pair.masks.values())


def test_passes_are_groups_and_names_are_those_of_a_submission(disk):
    pairs = find_benchmark(disk, "sintel")[1]
    names = expand("{alley_1,bamboo_2}/frame_000{1,2}")
    assert [(pair.group, pair.name) for pair in pairs] == list(product(("clean", "final"), names))
    things = find_benchmark(disk, "things")[1]
    assert Counter(pair.group for pair in things) == {"clean": 16, "final": 16}
    assert len({(pair.group, pair.name) for pair in things}) == 32


def test_flow_that_leads_beyond_the_end_of_a_clip_is_left_out_and_flow_into_the_past_goes_back(disk):
    for pair in find_benchmark(disk, "things")[1]:
        one, other = int(pair.image_1.stem), int(pair.image_2.stem)
        assert f"_{one:04d}_" in pair.flow.name
        assert (one, other) in (((6, 7), (7, 8)) if "IntoFuture" in pair.flow.name else ((7, 6), (8, 7)))
    pairs = [(pair.image_1.stem, pair.image_2.stem) for pair in find_benchmark(disk, "hd1k")[1]]
    assert pairs == [(f"{s:06d}_{i:04d}", f"{s:06d}_{i + 1:04d}") for s in range(2) for i in (10, 11)]


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize("name", FILES)
def test_a_benchmark_that_lies_alone_needs_no_name_and_is_no_other(name, depth, tmp_path):
    write_benchmark(name, tmp_path / "root")
    own = tmp_path / "root" / FILES[name][0].split("/")[0]
    found, pairs, notes = find_benchmark((own, *own.parents)[depth])
    assert found == name and pairs and notes == []
    for other in FLOW_BENCHMARKS.keys() - {name}:
        with told(FileNotFoundError, own, f"no true flow of {other}"):
            find_benchmark(own, other)


def test_kitti_is_found_from_its_training_folder_too(disk):
    for name, folder in (("kitti2012", "KITTI2012"), ("kitti2015", "KittiFlow")):
        assert find_benchmark(disk / folder / "training") == find_benchmark(disk, name)


def test_a_frame_of_a_benchmark_without_a_number_is_told_by_its_path(tmp_path):
    write_benchmark("sintel", tmp_path)
    scene = tmp_path / "Sintel" / "training" / "flow" / "alley_1"
    (scene / "frame_0001.flo").rename(scene / "frame_mean.flo")
    with told(ValueError, tmp_path / "Sintel", "frame_mean", "does not end in the number"):
        find_benchmark(tmp_path)


def test_several_benchmarks_without_a_name_are_listed(disk):
    with told(ValueError, disk, "--benchmark", *FILES):
        find_benchmark(disk)


def test_a_folder_without_a_benchmark_is_told_what_was_expected(tmp_path):
    write(tmp_path, ["data/1.png"])
    with told(FileNotFoundError, tmp_path, "no true flow", "flow_occ", "frames_cleanpass"):
        find_benchmark(tmp_path)
    with told(FileNotFoundError, tmp_path, "no testing part of sintel"):
        find_benchmark(tmp_path, "sintel", "testing")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_frame_of_a_pair_is_named(name, tmp_path):
    write_benchmark(name, tmp_path)
    missing = find_benchmark(tmp_path, name)[1][0].image_2
    missing.unlink()
    with told(FileNotFoundError, missing):
        find_benchmark(tmp_path, name)


@pytest.mark.parametrize("name", ["kitti2012", "kitti2015", "middlebury", "chairs"])
def test_a_pair_without_both_frames_is_left_out_with_a_note(name, tmp_path):
    write_benchmark(name, tmp_path)
    first, *others = find_benchmark(tmp_path, name)[1]
    first.image_1.unlink(), first.image_2.unlink()
    _, pairs, (note,) = find_benchmark(tmp_path, name)
    assert pairs == others
    assert note.startswith(f"1 of {1 + len(others)} pairs") and "\n" not in note
    if name != "chairs":  # whose ending is not known any more
        assert str(first.image_1) in note


def test_a_pass_that_is_not_unpacked_is_left_out_with_a_note(tmp_path):
    for name in ("sintel", "things"):
        write_benchmark(name, tmp_path)
        for pair in find_benchmark(tmp_path, name)[1]:
            if pair.group == "final":
                pair.image_1.unlink(missing_ok=True), pair.image_2.unlink(missing_ok=True)
    for folder in (tmp_path / "FlyingThings3D" / "frames_finalpass" / "TEST").glob("*/*/*"):
        folder.rmdir()
    for name, total in (("sintel", 8), ("things", 40)):  # of things without folders, ends of clips are not known
        _, pairs, (note,) = find_benchmark(tmp_path, name)
        assert {pair.group for pair in pairs} == {"clean"}
        assert note.startswith(f"{total - len(pairs)} of {total} pairs") and "final" in note


@pytest.mark.parametrize("name", FILES)
def test_a_benchmark_without_any_frame_is_told(name, tmp_path):
    write_benchmark(name, tmp_path)
    pairs = find_benchmark(tmp_path, name)[1]
    for path in {path for pair in pairs for path in (pair.image_1, pair.image_2)}:
        path.unlink()
    for folder in (tmp_path / "FlyingThings3D").glob("frames_*/TEST/*/*/*"):
        folder.rmdir()
    with told(FileNotFoundError, name, tmp_path, "missing"):
        find_benchmark(tmp_path, name)


def test_chairs_are_the_validation_pairs_of_the_list_and_all_pairs_without_one(tmp_path):
    write_benchmark("chairs", tmp_path)
    assert [pair.name for pair in find_benchmark(tmp_path, "chairs")[1]] == ["00002", "00004", "00005"]
    chosen = tmp_path / "FlyingChairs" / "FlyingChairs_train_val.txt"
    chosen.rename(tmp_path / chosen.name)  # beside the folder, as the download leaves it
    assert len(find_benchmark(tmp_path, "chairs")[1]) == 3
    (tmp_path / chosen.name).unlink()
    assert [pair.name for pair in find_benchmark(tmp_path, "chairs")[1]] == run("{:05d}", range(1, 6))


# ------------------------------------------------------------------------------------------------ windows and crops


def ramp(h, w, axis):
    """An image whose values tell the column (axis 2) or the row (axis 1)."""
    values = torch.arange(w).expand(h, w) if axis == 2 else torch.arange(h)[:, None].expand(h, w)
    return values.expand(3, h, w).to(torch.uint8).contiguous()


def seen(augment, h, w, axis):
    """First and last column (or row) that a result shows, to a pixel or so, and its step from pixel to pixel."""
    image, other = augment(*2 * [ramp(h, w, axis)])
    assert torch.equal(image, other) and image.shape == (3, *augment.crop)
    values = (image[0] * 255).double().round(decimals=3)
    line = values[image.shape[1] // 2] if axis == 2 else values[:, image.shape[2] // 2]
    step = float((line[-4] - line[3]).abs() / (len(line) - 7))  # away from the rims
    return float(line.min()), float(line.max()), step


@pytest.mark.parametrize(
    "axis, length, cut, crop", [(2, 200, 96, 48), (1, 100, 40, 20), (2, 200, 24, 48), (1, 100, 10, 20)]
)
def test_a_window_is_cut_from_the_frame_and_brought_to_the_size_of_the_crop(axis, length, cut, crop):
    torch.manual_seed(0)
    window = (40, 96) if cut > crop else (10, 24)
    augment = FlowAugmentation((20, 48), color=0.0, window=window)
    firsts = set()
    for _ in range(60):
        first, last, step = seen(augment, 100, 200, axis)
        assert step == pytest.approx(cut / crop, abs=0.06)
        assert cut - 3 <= last - first <= cut - 1  # `cut` columns, blurred at the rims
        assert first >= 0 and last <= length - 1
        firsts.add(first)
    assert min(firsts) < 0.2 * (length - cut) and max(firsts) > 0.8 * (length - cut)


def test_every_window_of_a_frame_occurs():
    torch.manual_seed(0)
    augment = FlowAugmentation((8, 8), color=0.0, window=(16, 16))
    for axis in (1, 2):
        middles = {round(sum(seen(augment, 18, 18, axis)[:2])) for _ in range(60)}  # twice the middle, that is
        assert middles == {15, 17, 19}


@pytest.mark.parametrize("window", [None, (64, 128)])
@pytest.mark.parametrize("size, cut", [((24, 100), (24, 48)), ((60, 40), (20, 40)), ((16, 32), (16, 32))])
def test_enlarge_takes_the_largest_window_of_the_crop_s_shape_from_a_small_frame(size, cut, window):
    augment = FlowAugmentation((32, 64), color=0.0, window=window, enlarge=True)
    for axis in (1, 2):
        for _ in range(5):
            first, last, step = seen(augment, *size, axis)
            assert step == pytest.approx(cut[axis - 1] / augment.crop[axis - 1], abs=0.06)
            assert cut[axis - 1] - 2 <= last - first <= cut[axis - 1] - 1
    with told(ValueError, f"{size[1]}x{size[0]}", "smaller than the crop", "--mix" if window else "--crop"):
        FlowAugmentation((32, 64), window=window)(*2 * [ramp(*size, 2)])


def test_enlarge_changes_nothing_for_a_frame_that_is_large_enough():
    image = ramp(50, 100, 2)
    for options in ({}, {"window": (40, 70)}, {"scale": (0.8, 1.0)}):
        results = []
        for enlarge in (False, True):
            torch.manual_seed(5)
            results.append(FlowAugmentation((32, 64), enlarge=enlarge, **options)(image, image)[0])
        assert torch.equal(*results)


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(2, 90), st.integers(2, 90)), seed=seeds, scale=st.sampled_from(((1.0, 1.0), (0.5, 2.0)))
)
def test_with_enlarge_a_frame_of_any_size_gives_the_crop(size, seed, scale):
    torch.manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    for result in FlowAugmentation((32, 64), scale=scale, enlarge=True)(image, image):
        assert result.shape == (3, 32, 64) and result.dtype == torch.float32
        assert result.min() >= 0 and result.max() <= 1


# ------------------------------------------------------------------------------------------------ changes of colour


def photo(seed, size=(48, 64)):
    """Noise with the spectrum and the correlated colours of photographs."""
    rng = np.random.default_rng(seed)
    layers = [cv2.GaussianBlur(rng.standard_normal((*size, 4)), (0, 0), sigma) * sigma for sigma in (0.5, 1, 2, 4, 8)]
    noise = sum(layers)
    noise = noise[..., :3] + 1.5 * noise[..., 3:]
    image = np.clip(128 + 55 * (noise - noise.mean()) / noise.std(), 0, 255)
    return torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1).contiguous()


def apart(ours, theirs):
    return (ours.int() - theirs.int()).abs().float()


@pytest.mark.parametrize(
    "name, low, high, levels, mean",
    [
        ("brightness", 0.3, 1.8, 1, 1.0),
        ("contrast", 0.3, 1.8, 1, 1.0),
        ("saturation", 0.3, 1.8, 2, 1.0),
        ("hue", -0.5, 0.5, 12, 0.7),  # torchvision is as far from Pillow: hues are bytes there
    ],
)
@settings(max_examples=30, deadline=None)
@given(seed=seeds, share=st.floats(0, 1))
def test_each_change_of_colour_is_torchvision_s_to_a_few_levels(name, low, high, levels, mean, seed, share):
    factor = low + share * (high - low)
    options = {name: (factor, factor)}
    difference = apart(*(kind(**options)(photo(seed)) for kind in (ColorJitter, v2.ColorJitter)))
    assert difference.max() <= levels and difference.mean() <= mean


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_changes_of_colour_have_torchvision_s_parameters_and_come_in_the_order_drawn(seed):
    image, drawn, results = photo(seed), [], []
    for kind in (ColorJitter, v2.ColorJitter):
        jitter = kind(0.4, 0.4, 0.2, 0.1)
        torch.manual_seed(seed)
        drawn.append({name: torch.as_tensor(value).tolist() for name, value in jitter.make_params([]).items()})
        torch.manual_seed(seed)
        results.append(jitter(image))
    assert drawn[0] == drawn[1]
    assert apart(*results).mean() < 4  # each of the four changes is about half a level brighter than torchvision's
    for number in drawn[0]["fn_idx"]:
        name = ("brightness", "contrast", "saturation", "hue")[number]
        image = ColorJitter(**{name: 2 * (drawn[0][f"{name}_factor"],)})(image)
    assert torch.equal(image, results[0])


def test_changes_that_are_not_asked_for_change_nothing():
    assert torch.equal(ColorJitter(0, 0, 0, 0)(photo(0)), photo(0))


@pytest.mark.parametrize("threshold", [0, 1, 100, 128, 255])
def test_solarizing_is_exactly_torchvision_s(threshold):
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    for image in (levels, photo(0)):
        ours, theirs = (kind(threshold, p=1.0)(image) for kind in (_Solarize, v2.RandomSolarize))
        assert torch.equal(ours, theirs)


def test_solarizing_happens_as_often_and_with_the_same_draws_as_torchvision_s():
    image = photo(0)
    for seed in range(30):
        results = []
        for kind in (_Solarize, v2.RandomSolarize):
            torch.manual_seed(seed)
            results.append(kind(128, p=0.4)(image))
        assert torch.equal(*results)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, kernel=st.sampled_from((3, 9, 23)))
def test_blurring_is_torchvision_s_to_a_level_with_its_parameters(seed, kernel):
    results = []
    for kind in (_GaussianBlur, v2.GaussianBlur):
        torch.manual_seed(seed)
        results.append(kind(kernel, (0.1, 2.0))(photo(seed)))
    assert apart(*results).max() <= 1


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_the_two_frames_of_a_pair_get_the_same_change_of_colour_each_with_its_own_contrast(seed):
    pair = torch.stack((photo(seed), photo(seed + 1) // 2))
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    results = []
    for images in (pair, pair[0], pair[1]):
        torch.manual_seed(seed)
        results.append(jitter(images))
    assert torch.equal(results[0], torch.stack(results[1:]))
    torch.manual_seed(seed)
    theirs = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)(pair)
    assert apart(results[0], theirs).mean() < 4
