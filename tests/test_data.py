"""Tests of data.py: each is named after the claim that it holds."""

import pickle
import random
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

import data
import sources.moving_shapes
from data import FlowAugmentation, ImageFiles, Seeded, ShardedStream, TwoViews, VideoPairs, make_loader
from sources.moving_shapes import SHAPE_CLASSES, MovingShapes, ShapeImages, ShapePairs

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(33, 100), st.integers(33, 100))


def sample(image, x, y):
    """Bilinear values of a float (c, h, w) array at the points x, y inside of it, by plain NumPy."""
    h, w = image.shape[-2:]
    x0, y0 = np.clip(np.floor(x).astype(int), 0, w - 2), np.clip(np.floor(y).astype(int), 0, h - 2)
    fx, fy = x - x0, y - y0
    top = image[:, y0, x0] * (1 - fx) + image[:, y0, x0 + 1] * fx
    bottom = image[:, y0 + 1, x0] * (1 - fx) + image[:, y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def directions(item, t=0):
    """Both directions of one step as (source frame, target frame, flow, visible) in NumPy float64."""
    flows = (item["flow_forward"][t], item["flow_backward"][t])
    visible = (item["visible_forward"][t, 0], item["visible_backward"][t, 0])
    for (s, e), flow, seen in zip(((t, t + 1), (t + 1, t)), flows, visible, strict=True):
        yield s, e, flow.double().numpy(), seen.numpy()


def ends(flow):
    """Where each pixel goes: x and y, (h, w) each."""
    y, x = np.mgrid[: flow.shape[1], : flow.shape[2]]
    return x + flow[0], y + flow[1]


def write_image(path, color=(10, 20, 30), size=(24, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), color, np.uint8)).save(path)
    return path


def write_video(path, codec, count, size=(64, 96)):
    """Frame i is grey of value 10 + 12 i."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10, size[::-1])
    for i in range(count):
        writer.write(np.full((*size, 3), 10 + 12 * i, np.uint8))
    writer.release()
    return path


# ------------------------------------------------------------------------------------------------------ moving shapes


@settings(max_examples=20, deadline=None)
@given(seed=seeds, size=sizes, frames=st.integers(1, 4))
def test_an_item_has_the_documented_shapes_types_and_ranges(seed, size, frames):
    item = MovingShapes(length=1, size=size, frames=frames, seed=seed)[0]
    shapes = {
        "images": (frames, 3, *size),
        "flow_forward": (frames - 1, 2, *size),
        "flow_backward": (frames - 1, 2, *size),
        "visible_forward": (frames - 1, 1, *size),
        "visible_backward": (frames - 1, 1, *size),
        "instances": (frames, *size),
        "classes": (frames, *size),
    }
    types = dict.fromkeys(shapes, torch.float32) | {"instances": torch.int64, "classes": torch.int64}
    types |= {"visible_forward": torch.bool, "visible_backward": torch.bool}
    assert {name: tuple(value.shape) for name, value in item.items()} == shapes
    assert {name: value.dtype for name, value in item.items()} == types
    assert item["images"].min() >= 0 and item["images"].max() <= 1
    assert item["flow_forward"].isfinite().all() and item["flow_backward"].isfinite().all()
    assert item["instances"].max() <= 5 and item["classes"].max() < len(SHAPE_CLASSES)
    assert torch.equal(item["instances"] == 0, item["classes"] == 0)


def test_with_looks_by_class_all_shapes_of_a_class_have_one_look_and_nothing_else_changes():
    """The mean colour over many pixels of a class is the same in other scenes, and differs from class to class."""
    means = {}
    for index in range(40):
        alike = MovingShapes(brightness=0.0, looks_by_class=True, max_shapes=8)[index]
        plain = MovingShapes(brightness=0.0, max_shapes=8)[index]
        assert torch.equal(alike["classes"], plain["classes"]) and torch.equal(
            alike["flow_forward"], plain["flow_forward"]
        )
        assert not torch.equal(alike["images"], plain["images"])
        for label in alike["classes"][0].unique().tolist():
            mask = alike["classes"][0] == label
            if mask.sum() > 1500:
                means.setdefault(label, []).append(alike["images"][0][:, mask].mean(dim=1))
    spread = torch.stack([torch.stack(each).std(dim=0).max() for each in means.values() if len(each) > 1])
    centres = torch.stack([torch.stack(each).mean(dim=0) for each in means.values()])
    assert len(means) == 9 and spread.mean() < 0.06
    assert torch.pdist(centres).min() > spread.mean()


def test_warping_the_other_frame_by_the_flow_gives_the_frame_back_where_visible():
    shapes = MovingShapes(frames=3, brightness=0.0)
    still, warped = [], []
    for index in range(30):
        item = shapes[index]
        images = item["images"].double().numpy()
        for t in range(2):
            for source, target, flow, visible in directions(item, t):
                back = sample(images[target], *ends(flow))
                warped.append(np.abs(images[source] - back)[:, visible].mean())
                still.append(np.abs(images[source] - images[target])[:, visible].mean())
    assert np.mean(warped) < 0.015  # two bilinear samplings of fine texture, and soft edges
    assert np.mean(warped) < 0.25 * np.mean(still)


def test_flow_is_exact_to_a_fiftieth_of_a_pixel(monkeypatch):
    """On smooth waves, the shift that would explain what is left after warping by the flow."""
    y, x = np.mgrid[:256, :256] * 2 * np.pi / 64
    waves = np.stack((np.sin(x), np.sin(y), np.sin(x + y)), axis=2) * 60 + 128
    monkeypatch.setattr(sources.moving_shapes, "_textures", lambda: [waves.astype(np.uint8)])
    errors = []
    for index in range(30):
        item = MovingShapes(brightness=0.0)[index]
        image, other = item["images"].double().numpy()
        flow, visible = item["flow_forward"][0].double().numpy(), item["visible_forward"][0, 0].numpy()
        rims = (
            cv2.dilate(i, np.ones((3, 3))) > cv2.erode(i, np.ones((3, 3))) for i in item["instances"].byte().numpy()
        )
        rim, rim_there = (r[None].astype(float) for r in rims)
        inner = visible & (rim[0] == 0) & (sample(rim_there, *ends(flow))[0] == 0)
        residual = (image - sample(other, *ends(flow)))[:, inner].ravel()
        slopes = np.stack([np.gradient(image, axis=a)[:, inner].ravel() for a in (2, 1)], axis=1)
        errors.append(np.linalg.lstsq(slopes, residual, rcond=None)[0])
    assert np.abs(errors).max() < 0.02


def test_forward_then_backward_flow_returns_to_the_start_on_visible_interior_pixels():
    for index in range(30):
        item = MovingShapes()[index]
        (_, _, flow, visible), (_, _, reverse, _) = directions(item)
        instances, target = (i.numpy() for i in item["instances"])
        x, y = ends(flow)
        x0, y0 = np.clip(np.floor(x).astype(int), 0, 126), np.clip(np.floor(y).astype(int), 0, 126)
        interior = visible.copy()
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):  # all four pixels that the sampling reads
            interior &= target[y0 + dy, x0 + dx] == instances
        assert interior.mean() > 0.4
        assert np.abs(flow + sample(reverse, x, y))[:, interior].max() < 1e-3


def test_visible_pixels_meet_their_own_instance_and_hidden_ones_another():
    agree, differ = [], []
    for index in range(100):
        item = MovingShapes()[index]
        for source, target, flow, visible in directions(item):
            x, y = (np.round(v).astype(int) for v in ends(flow))
            inside = (x >= 0) & (y >= 0) & (x < 128) & (y < 128)
            found = item["instances"][target].numpy()[y.clip(0, 127), x.clip(0, 127)]
            same = found == item["instances"][source].numpy()
            agree.append(same[visible])
            # the rims of layers round to either side, and the last pixel's outer half is outside
            strictly = inside & (x > 0) & (y > 0) & (x < 127) & (y < 127) & ~visible
            differ.append(~same[strictly])
    assert np.concatenate(agree).mean() > 0.99
    assert np.concatenate(differ).mean() > 0.95


def test_pixels_that_leave_the_frame_are_not_visible():
    left = 0
    for index in range(30):
        for _, _, flow, visible in directions(MovingShapes()[index]):
            x, y = ends(flow)
            rounding = 1e-4  # the data set adds in float32
            outside = (x < -rounding) | (y < -rounding) | (x > 127 + rounding) | (y > 127 + rounding)
            left += outside.sum()
            assert not visible[outside].any()
    assert left > 1000


@settings(max_examples=20, deadline=None)
@given(seed=seeds, index=st.integers(0, 9_999), size=sizes)
def test_an_item_depends_on_seed_and_index_alone(seed, index, size):
    first = MovingShapes(seed=seed, size=size)[index]
    np.random.rand(3), torch.rand(3)
    again = MovingShapes(seed=seed, size=size)[index]
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_other_seeds_and_other_indices_give_other_scenes():
    items = [MovingShapes(seed=s)[i]["images"] for s in range(3) for i in range(3)]
    assert all((a - b).abs().mean() > 0.01 for i, a in enumerate(items) for b in items[:i])


def test_motions_range_from_below_a_pixel_to_the_bound_with_a_mean_of_three_to_five_pixels():
    shapes = MovingShapes()
    lengths = torch.stack([shapes[i]["flow_forward"][0].norm(dim=0) for i in range(250)])
    assert 3 < lengths.mean() < 5
    assert (lengths < 1).float().mean() > 0.05
    assert (lengths > 10).float().mean() > 0.01
    assert lengths.max() < 1.5 * 0.08 * 128  # shift, and at most 0.2 of the bound each from turning and growing


def test_motion_scales_with_max_motion_and_stops_at_zero():
    assert MovingShapes(max_motion=0.0)[3]["flow_forward"].abs().max() < 1e-3
    small = torch.stack([MovingShapes(max_motion=0.01)[i]["flow_forward"] for i in range(20)])
    assert small.norm(dim=2).max() < 1.5 * 1.28


def test_motion_is_smooth_over_frames():
    for index in range(20):
        item = MovingShapes(frames=5)[index]
        background = (item["instances"] == 0).all(dim=0)
        flow = item["flow_forward"][:, :, background]
        change = (flow[1:] - flow[:-1]).norm(dim=1)
        assert (change <= 0.15 * flow[:-1].norm(dim=1) + 0.15).all()


def test_brightness_changes_in_about_a_third_of_the_scenes_and_by_ten_percent_at_most():
    plain, changing = MovingShapes(max_motion=0.0, brightness=0.0), MovingShapes(max_motion=0.0)
    ratios = [(changing[i]["images"][0].mean() / plain[i]["images"][0].mean()).item() for i in range(150)]
    assert 0.22 < np.mean([abs(r - 1) > 1e-6 for r in ratios]) < 0.45
    assert min(ratios) > 0.8 and max(ratios) < 1.2
    first, second = plain[0]["images"]
    assert (first - second).abs().max() < 1.01 / 255


def test_a_pixel_belongs_to_the_shape_that_covers_half_of_it(monkeypatch):
    black_and_white = np.zeros((2, 3, 4))
    black_and_white[1, :, 3] = 255
    monkeypatch.setattr(sources.moving_shapes, "_random_colors", lambda rng, count: black_and_white)
    for index in range(20):
        item = MovingShapes(max_shapes=1, brightness=0.0)[index]
        white = item["images"].mean(dim=1)
        owned = item["instances"] == 1
        assert owned[white > 0.51].all() and not owned[white < 0.49].any()
        assert ((white > 0.01) & (white < 0.99)).float().mean() < 0.1  # edges are soft, and narrow


def test_every_class_occurs_and_shapes_cover_a_fair_share():
    classes = torch.stack([MovingShapes()[i]["classes"][0] for i in range(100)])
    assert classes.unique().tolist() == list(range(len(SHAPE_CLASSES)))
    assert 0.15 < (classes > 0).float().mean() < 0.5


def test_scenes_have_the_spectrum_of_natural_images():
    """The same fit gives -2.1 for Middlebury's frames, -3.0 at half their size, and -2.4 for DAVIS at 240 lines."""
    power = 0
    for i in range(50):
        grey = ShapeImages()[i].double().mean(dim=0).numpy()
        grey = (grey - grey.mean()) * np.outer(np.hanning(128), np.hanning(128))
        power = power + np.abs(np.fft.fft2(grey)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    band = (frequency > 2 / 128) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert -3.2 < slope < -2.2


def test_the_views_for_training_show_the_frames_of_the_items():
    frames = MovingShapes(seed=3)[7]["images"]
    pair = ShapePairs(seed=3)[7]
    assert all(image.dtype == torch.uint8 for image in pair)
    assert torch.equal(torch.stack(pair).float() / 255, frames)
    assert torch.equal(ShapeImages(seed=3)[7], pair[0])


def test_iteration_ends_at_the_length():
    assert len(MovingShapes(length=2)) == len(list(MovingShapes(length=2, size=(32, 32)))) == 2
    with pytest.raises(IndexError, match="2 scenes"):
        MovingShapes(length=2)[2]


# --------------------------------------------------------------------------------------------------- files on the disk


def test_folders_are_clips_in_natural_order_with_any_stride(tmp_path):
    for i in (1, 2, 3, 10, 11):
        write_image(tmp_path / "a" / f"frame{i}.png", color=(i, 0, 0))
    for i in range(3):
        write_image(tmp_path / "b" / "deep" / f"{i}.jpg", color=(100, 0, 0), size=(16, 16))
    values = [tuple(int(image[0, 0, 0]) for image in pair) for pair in VideoPairs(tmp_path)]
    assert values[:4] == [(1, 2), (2, 3), (3, 10), (10, 11)] and len(values) == 6
    values = [tuple(int(image[0, 0, 0]) for image in pair) for pair in VideoPairs(tmp_path / "a", strides=(1, 3))]
    assert values == [(1, 2), (2, 3), (3, 10), (10, 11), (1, 10), (2, 11)]
    image, _ = VideoPairs(tmp_path)[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 24, 32)
    assert VideoPairs(tmp_path, transform=lambda a, b: int(a[0, 0, 0]) + int(b[0, 0, 0]))[0] == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, unique=True))
def test_natural_order_is_the_order_of_the_numbers(numbers):
    names = [f"clip/frame{n}.png" for n in numbers]
    assert sorted(names, key=data.natural_key) == [f"clip/frame{n}.png" for n in sorted(numbers)]


@pytest.mark.parametrize("name, codec", [("clip.avi", "MJPG"), ("clip.MP4", "mp4v")])
def test_video_files_give_the_same_pairs_in_any_order(tmp_path, name, codec):
    path = write_video(tmp_path / name, codec, count=20)
    pairs = VideoPairs(path, strides=(1, 4))
    assert len(pairs) == 19 + 16
    for index in (0, 18, 3, 4, 34, 19, 5):
        _, first, second = pairs.pairs[index]
        for image, number in zip(pairs[index], (first, second), strict=True):
            assert image.shape == (3, 64, 96) and image.dtype == torch.uint8
            assert abs(image.float().mean() - (10 + 12 * number)) < 6  # a codec keeps greys roughly
    assert len(VideoPairs(tmp_path)) == 19


def test_frames_of_a_video_are_rgb(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 32))
    for _ in range(2):
        writer.write(np.full((32, 32, 3), (0, 0, 200), np.uint8))
    writer.release()
    red, green, blue = VideoPairs(tmp_path)[0][0].float().mean(dim=(1, 2))
    assert red > 150 and green < 50 and blue < 50


def test_videos_are_read_alike_by_workers(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "noise.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (160, 120))
    for _ in range(40):  # too much for the decoder's read-ahead: a shared file position would show
        writer.write(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    writer.release()
    pairs = VideoPairs(tmp_path)
    batches = [list(islice(make_loader(pairs, None, 4, workers=workers), 6)) for workers in (0, 2)]
    assert all(torch.equal(a, b) for x, y in zip(*batches, strict=True) for a, b in zip(x, y, strict=True))


def test_images_of_a_tree_come_sorted_as_rgb(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/x.jpeg", "top.PNG"):
        write_image(tmp_path / name)
    Image.new("L", (8, 8), 7).save(tmp_path / "a" / "grey.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(tmp_path / "a" / "transparent.png")
    images = ImageFiles(tmp_path)
    names = [str(path.relative_to(tmp_path)) for path in images.paths]
    assert names == ["a/grey.png", "a/transparent.png", "a/x.jpeg", "b/2.png", "b/10.png", "top.PNG"]
    assert [image.shape[0] for image in images] == [3] * 6 and images[3].dtype == torch.uint8
    assert images[1][:, 0, 0].tolist() == [1, 2, 3]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("0.png", "1.png"):
        write_image(tmp_path / name)
        (tmp_path / f"._{name}").write_bytes(b"resource fork")
        write_image(tmp_path / ".thumbnails" / name)
        write_image(tmp_path / "__MACOSX" / name)
    assert len(ImageFiles(tmp_path)) == 2 and len(VideoPairs(tmp_path)) == 1


@pytest.mark.parametrize("source", [ImageFiles, VideoPairs])
def test_a_missing_folder_is_told_by_its_path(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        source(tmp_path / "nowhere")


@pytest.mark.parametrize("source, what", [(ImageFiles, "no images found"), (VideoPairs, "no frames found")])
def test_a_folder_without_images_is_told_by_its_path_and_what_was_expected(source, what, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}: {what}; expected .*png"):
        source(tmp_path)


@pytest.mark.parametrize("good", [0, 3])
def test_a_clip_of_one_frame_is_told_by_its_path(good, tmp_path):
    write_image(tmp_path / "short" / "0.png")
    for i in range(good):
        write_image(tmp_path / "good" / f"{i}.png")
    with pytest.raises(ValueError, match="short/0.png: a clip of one frame, too short for a stride of 1; remove it"):
        VideoPairs(tmp_path)


def test_a_clip_shorter_than_the_stride_is_told_by_its_path(tmp_path):
    write_video(tmp_path / "clip.avi", "MJPG", count=3)
    with pytest.raises(ValueError, match="clip.avi: a clip of 3 frames, too short for a stride of 3"):
        VideoPairs(tmp_path, strides=(1, 3))
    with pytest.raises(ValueError, match="strides are 1 or more"):
        VideoPairs(tmp_path, strides=(0,))


def test_a_video_that_cannot_be_decoded_is_told_by_its_path(tmp_path):
    (tmp_path / "broken.mp4").write_text("hello")
    with pytest.raises(ValueError, match="broken.mp4: no frame can be decoded; convert the video or remove it"):
        VideoPairs(tmp_path)


def test_frames_of_different_sizes_are_told_by_path_and_sizes(tmp_path):
    write_image(tmp_path / "0.png", size=(24, 32))
    write_image(tmp_path / "1.png", size=(24, 40))
    with pytest.raises(ValueError, match="1.png: 40x24 pixels, but 0.png of the same clip has 32x24; .* one size"):
        VideoPairs(tmp_path)[0]


@pytest.mark.parametrize("source", [ImageFiles, VideoPairs])
@pytest.mark.parametrize("damage", [b"I am a text.", None])
def test_an_unreadable_image_is_told_by_its_path(source, damage, tmp_path):
    for i in range(2):
        path = write_image(tmp_path / f"{i}.png")
    path.write_bytes(damage or path.read_bytes()[:60])  # a text, or a file cut short
    with pytest.raises(ValueError, match="1.png: not a readable image; replace or remove it"):
        list(source(tmp_path))


# ------------------------------------------------------------------------------------------------------ augmentations


@settings(max_examples=15, deadline=None)
@given(height=st.integers(8, 300), width=st.integers(8, 300), size=st.sampled_from((32, 64, 225)))
def test_two_views_are_float_in_zero_one_of_the_size_whatever_the_image(height, width, size):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    for view in TwoViews(size)(image):
        assert view.shape == (3, size, size) and view.dtype == torch.float32
        assert view.min() >= 0 and view.max() <= 1


def test_two_views_keep_the_probabilities_and_parameters_of_the_official_code():
    views = TwoViews(224)
    for view, blur, solarize in ((views.view_1, 1.0, 0.0), (views.view_2, 0.1, 0.2)):
        crop, flip, jitter, grey, blurring, solarizing, _ = view.transforms
        assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
        assert crop.interpolation == v2.InterpolationMode.BICUBIC
        assert (flip.p, jitter.p, grey.p, blurring.p, solarizing.p) == (0.5, 0.8, 0.2, blur, solarize)
        color, gaussian = jitter.transforms[0], blurring.transforms[0]
        assert (color.brightness, color.contrast) == ((0.6, 1.4), (0.6, 1.4))
        assert (color.saturation, color.hue) == ((0.8, 1.2), (-0.1, 0.1))
        assert (list(gaussian.kernel_size), list(gaussian.sigma)) == ([23, 23], [0.1, 2.0])
        assert solarizing.threshold == 128


def test_a_fifth_of_the_views_is_grey_and_the_two_views_are_drawn_apart():
    torch.manual_seed(0)
    image, views = ShapeImages()[1], TwoViews(32)
    drawn = [views(image) for _ in range(300)]
    for which in range(2):
        grey = np.mean([(pair[which].amax(0) - pair[which].amin(0)).max().item() < 0.01 for pair in drawn])
        assert 0.14 < grey < 0.27
    assert not any(torch.equal(*pair) for pair in drawn)


def test_the_first_view_is_always_blurred_and_the_second_seldom():
    torch.manual_seed(0)
    image, views = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), TwoViews(64)
    blurred = [[], []]
    for view, counts in zip((views.view_1, views.view_2), blurred, strict=True):
        blur = view.transforms[4]
        counts += [not torch.equal(blur(image), image) for _ in range(300)]
    assert np.mean(blurred[0]) > 0.85  # the smallest deviations change no byte
    assert 0.05 < np.mean(blurred[1]) < 0.16


@settings(max_examples=20, deadline=None)
@given(sigma=st.floats(0.3, 2.0), size=st.tuples(st.integers(24, 60), st.integers(24, 60)))
def test_blurring_by_opencv_equals_torchvision_to_two_grey_levels(sigma, size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    ours, theirs = data._GaussianBlur(23, (sigma, sigma))(image), v2.GaussianBlur(23, (sigma, sigma))(image)
    assert (ours.int() - theirs.int()).abs().max() <= 2


@settings(max_examples=30, deadline=None)
@given(seed=seeds, scale=st.sampled_from(((1.0, 1.0), (0.5, 1.0), (0.1, 2.0))))
def test_both_images_of_a_pair_are_augmented_alike(seed, scale):
    torch.manual_seed(seed)
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    image_1, image_2 = FlowAugmentation((40, 48), scale=scale)(image, image)
    assert torch.equal(image_1, image_2)
    assert image_1.shape == (3, 40, 48) and image_1.dtype == torch.float32
    assert image_1.min() >= 0 and image_1.max() <= 1


def test_the_order_is_swapped_and_each_axis_flipped_in_half_of_the_pairs():
    torch.manual_seed(0)
    dark = torch.arange(16, dtype=torch.uint8).view(4, 4).expand(3, 4, 4).contiguous()
    augment = FlowAugmentation((4, 4), color=0.0)
    swapped, flipped_x, flipped_y = [], [], []
    for _ in range(400):
        image, other = augment(dark, dark + 100)
        swapped.append((image > other).all().item())
        flipped_x.append((image[0, 0, 0] > image[0, 0, 1]).item())
        flipped_y.append((image[0, 0, 0] > image[0, 1, 0]).item())
    assert all(0.42 < np.mean(share) < 0.58 for share in (swapped, flipped_x, flipped_y))


def test_every_position_of_the_crop_occurs():
    torch.manual_seed(0)
    x = torch.arange(6, dtype=torch.uint8).expand(3, 6, 6).contiguous()
    image = torch.cat((x[:1], x[:1].mT, x[:1]))
    corners = set()
    for _ in range(300):
        crop = (FlowAugmentation((4, 4), color=0.0)(image, image)[0] * 255).round()
        corners.add((int(crop[:2].amin((1, 2))[0]), int(crop[:2].amin((1, 2))[1])))
    assert corners == {(x, y) for x in range(3) for y in range(3)}


def test_scaling_before_the_crop_shows_more_of_the_image():
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 100, 200).contiguous()
    image, _ = FlowAugmentation((50, 50), scale=(0.5, 0.5), color=0.0)(ramp, ramp)
    step = (image[:, :, 1:] - image[:, :, :-1])[:, :, 5:-5].abs() * 255
    assert step.mean() == pytest.approx(2, abs=0.05)


def test_an_image_smaller_than_the_crop_is_told_with_both_sizes_and_the_remedy():
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    with pytest.raises(ValueError, match="40x30 pixels is smaller than the crop of 32x31; use a smaller --crop"):
        FlowAugmentation((31, 32))(image, image)


# ------------------------------------------------------------------------------------------------------------ loading


def stream(length, batch, steps, **options):
    return list(islice(ShardedStream(length, batch, **options), steps * batch))


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 5), world=st.integers(1, 4), seed=seeds)
def test_every_item_comes_once_per_pass_over_all_processes(length, batch, world, seed):
    steps = -(-3 * length // (batch * world))
    parts = [stream(length, batch, steps, seed=seed, rank=rank, world_size=world) for rank in range(world)]
    joined = sorted(key for part in parts for key in part)
    assert [position for position, _ in joined] == list(range(steps * batch * world))
    for start in range(0, 3 * length, length):
        assert sorted(index for _, index in joined[start : start + length]) == list(range(length))


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 5), world=st.integers(1, 3), start=st.integers(0, 30))
def test_a_resumed_stream_goes_on_where_it_stopped(length, batch, world, start):
    options = dict(rank=world - 1, world_size=world, seed=5)
    whole = stream(length, batch, start + 4, **options)
    assert stream(length, batch, 4, start_step=start, **options) == whole[start * batch :]


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 4), world=st.integers(1, 4))
def test_the_joined_batches_do_not_depend_on_the_number_of_processes(length, batch, world):
    alone = stream(length, batch * world, 5)
    parts = [stream(length, batch, 5, rank=rank, world_size=world) for rank in range(world)]
    joined = [key for step in range(5) for part in parts for key in part[step * batch : (step + 1) * batch]]
    assert joined == alone


def test_passes_and_seeds_have_orders_of_their_own():
    order = [index for _, index in stream(50, 10, 10)]
    assert order[:50] != order[50:] and order[:50] != list(range(50))
    assert order[:50] != [index for _, index in stream(50, 10, 5, seed=1)]


class Draws(torch.utils.data.Dataset):
    """Items that draw from all three global generators."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def test_random_numbers_depend_on_seed_and_position_alone():
    items = Seeded(Draws(), None, seed=1)
    first = items[4, 2]
    torch.rand(5), np.random.rand(5), random.random()
    assert torch.equal(items[4, 2], first)
    assert len({items[position, 2][k].item() for position in range(20) for k in (1, 2, 3)}) == 60
    assert not torch.equal(Seeded(Draws(), None, seed=2)[4, 2], first)


def test_the_callers_generators_stay_untouched():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = Draws()[0]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    next(iter(make_loader(ShapePairs(size=(48, 48)), FlowAugmentation((32, 32)), batch_size=2)))
    assert torch.equal(Draws()[0], expected)


@pytest.mark.parametrize(
    "dataset, transform",
    [
        (ShapePairs(length=20, size=(48, 48)), FlowAugmentation((32, 32), scale=(0.7, 1.0))),
        (ShapeImages(length=20, size=(48, 48)), TwoViews(32)),
    ],
    ids=["flow", "content"],
)
def test_batches_do_not_depend_on_the_number_of_workers(dataset, transform):
    plain, parallel = (
        list(islice(make_loader(dataset, transform, 4, seed=3, workers=workers), 7)) for workers in (0, 2)
    )
    for (a, b), (c, d) in zip(plain, parallel, strict=True):
        assert a.shape == (4, 3, 32, 32) and a.dtype == torch.float32
        assert torch.equal(a, c) and torch.equal(b, d)


def test_a_resumed_loader_gives_the_batches_that_would_have_come():
    shapes, augment = ShapePairs(length=20, size=(40, 40)), FlowAugmentation((32, 32))
    whole = list(islice(make_loader(shapes, augment, 4), 8))
    rest = list(islice(make_loader(shapes, augment, 4, start_step=5, workers=1), 3))
    assert all(torch.equal(a, b) for x, y in zip(whole[5:], rest, strict=True) for a, b in zip(x, y, strict=True))


def test_two_processes_together_load_the_batch_of_one():
    shapes, augment = ShapePairs(length=20, size=(40, 40)), FlowAugmentation((32, 32))
    (alone,) = islice(make_loader(shapes, augment, 4, start_step=2), 1)
    parts = [next(iter(make_loader(shapes, augment, 2, rank=r, world_size=2, start_step=2))) for r in range(2)]
    assert all(
        torch.equal(whole, torch.cat(halves)) for whole, halves in zip(alone, zip(*parts, strict=True), strict=True)
    )


@pytest.mark.parametrize("transform", [FlowAugmentation((32, 32)), TwoViews(32)])
def test_sources_and_augmentations_can_be_pickled_for_spawned_workers(transform, tmp_path):
    write_video(tmp_path / "clip.avi", "MJPG", count=3)
    for source in (ShapePairs(size=(32, 32)), VideoPairs(tmp_path)):
        source[0]
        again = pickle.loads(pickle.dumps(Seeded(source, transform)))
        assert torch.equal(again.dataset[0][0], source[0][0])


def test_an_error_in_a_worker_keeps_its_type_and_names_the_file(tmp_path: Path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_text("text")
    with pytest.raises(ValueError, match="png: not a readable image"):
        next(iter(make_loader(VideoPairs(tmp_path), FlowAugmentation((8, 8)), 1, workers=1)))
