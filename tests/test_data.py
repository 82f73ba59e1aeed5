"""Tests of data.py. Each is named after the claim that it checks."""

import pickle
import random
import struct
import zlib
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import helpers
import numpy as np
import pytest
import torch
from helpers import cut_short, raises_one_line, random_ids, seeds, write_frames, write_ids, write_image, write_video
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

import data
from data import ColorJitter, FlowAugmentation, ImageFiles, LabelledImages, ShardedStream, Stream, TwoViews, VideoPairs
from sources.moving_shapes import ShapeImages, ShapePairs

# ------------------------------------------------------------------------------------------------------- image files


def test_odd_images_are_read_as_they_look_also_with_damaged_exif(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)
    grey, upright = picture[..., 0], Image.Exif()
    upright[0x0112] = 6  # the camera was held upright: turned by 90 degrees to the right
    palette, cmyk = Image.fromarray(picture).quantize(32), Image.fromarray(picture).convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif")
    for name, image, shows, options in (
        ("grey.png", Image.fromarray(grey), np.dstack(3 * [grey]), {}),
        ("16 bit.png", Image.fromarray(grey.astype(np.uint16) * 257), np.dstack(3 * [grey]), {}),
        ("alpha.png", Image.fromarray(np.dstack((picture, grey)), "RGBA"), picture, {}),
        ("palette.png", palette, np.asarray(palette.convert("RGB")), {}),
        ("bläuliche Größe 木.png", Image.fromarray(picture), picture, {}),
        ("1x1.png", Image.fromarray(picture[:1, :1]), picture[:1, :1], {}),
        ("exif.png", Image.fromarray(picture), np.rot90(picture, -1), {"exif": upright}),
        ("cmyk again.tif", cmyk, np.asarray(Image.open(tmp_path / "cmyk.tif").convert("RGB")), {}),
    ):
        image.save(tmp_path / name, **options)
        np.testing.assert_array_equal(data.load_image(tmp_path / name).permute(1, 2, 0), shows, err_msg=name)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: struct.pack("i", "damaged"))
    np.testing.assert_array_equal(data.load_image(tmp_path / "exif.png").permute(1, 2, 0), np.rot90(picture, -1))


UNREADABLE = {
    "empty.tif": lambda path: path.touch(),
    "text.tif": lambda path: path.write_text("I am a text."),
    "cut.jpg": lambda path: cut_short(write_image(path, (40, 50))),
    "dangling link.tif": lambda path: path.symlink_to("nowhere"),
    # Their range is not known: never read as black.
    "32 bits.tif": lambda path: Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)).save(path),
    "float.tif": lambda path: Image.fromarray(np.arange(256, dtype=np.float32).reshape(16, 16)).save(path),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_is_reported_by_its_path(name, tmp_path):
    UNREADABLE[name](tmp_path / name)
    with raises_one_line(data.BadFile, tmp_path / name, "not a readable image"):
        data.load_image(tmp_path / name)


def test_a_header_that_claims_more_than_the_file_can_hold_is_refused_before_memory_is_taken(tmp_path):
    content = bytearray(write_image(tmp_path / "a.png", (8, 8)).read_bytes())
    content[16:24] = (10_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(data.BadFile, match="a.png: not a readable image") as caught:
        data.load_image(tmp_path / "a.png")
    assert "10000x10000 pixels cannot lie in it" in str(caught.value.__cause__)
    cv2.imwrite(str(tmp_path / "flat.png"), np.zeros((4000, 4000), np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert data.load_image(tmp_path / "flat.png").shape == (3, 4000, 4000)  # an honest one packs nearly as well


def test_the_images_of_a_tree_are_sorted_and_rgb_and_hidden_ones_are_left_out(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/x.jpeg", "top.PNG", ".thumbnails/0.png", "__MACOSX/0.png", "b/._2.png"):
        write_image(tmp_path / name)
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(tmp_path / "a" / "transparent.png")
    images = ImageFiles(tmp_path)
    names = [str(path.relative_to(tmp_path)) for path in images.paths]
    assert names == ["a/transparent.png", "a/x.jpeg", "b/2.png", "b/10.png", "top.PNG"]
    assert all(image.shape[0] == 3 and image.dtype == torch.uint8 for image in images)
    assert images[0][:, 0, 0].tolist() == [1, 2, 3] and images.file_count == 5


def test_links_are_followed_and_folders_that_link_to_each_other_are_walked_once(tmp_path):
    write_image(tmp_path / "a/0.png"), write_image(tmp_path / "b/0.png")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "itself").symlink_to(".")
    found = [str(path.relative_to(tmp_path)) for path in data.find_files(tmp_path, (".png",))]
    assert found == ["a/0.png", "a/other/0.png", "b/0.png", "b/other/0.png"]


@pytest.mark.parametrize("source, what", [(ImageFiles, "no images found"), (VideoPairs, "no frames found")])
def test_a_folder_that_is_missing_or_without_images_is_reported_with_what_was_expected(source, what, tmp_path):
    with raises_one_line(FileNotFoundError, f"{tmp_path / 'nowhere'}: no such folder"):
        source(tmp_path / "nowhere")
    with raises_one_line(FileNotFoundError, f"{tmp_path}: {what}; expected", ".png"):
        source(tmp_path)


# ----------------------------------------------------------------------------------------------------- pairs of frames


def test_folders_are_clips_in_natural_order_with_any_stride(tmp_path):
    for i in (1, 2, 3, 10, 11):
        write_image(tmp_path / "a" / f"frame{i}.png", (24, 32), (i, 0, 0))
    for i in range(3):
        write_image(tmp_path / "b" / "deep" / f"{i}.jpg", (16, 16), (100, 0, 0))
    values = [tuple(int(image[0, 0, 0]) for image in pair) for pair in VideoPairs(tmp_path)]
    assert values[:4] == [(1, 2), (2, 3), (3, 10), (10, 11)] and len(values) == 6
    pairs = VideoPairs(tmp_path / "a", strides=(1, 3))
    values = [tuple(int(image[0, 0, 0]) for image in pair) for pair in pairs]
    assert values == [(1, 2), (2, 3), (3, 10), (10, 11), (1, 10), (2, 11)]
    assert pairs[0][0].dtype == torch.uint8 and pairs[0][0].shape == (3, 24, 32)
    assert pairs.file_count == 5
    assert VideoPairs(tmp_path, transform=lambda a, b: int(a[0, 0, 0]) + int(b[0, 0, 0]))[0] == 3


def grey_frames(count, size=(64, 96)):
    """Frame i is grey of value 10 + 12 i."""
    return [np.full((*size, 3), 10 + 12 * i, np.uint8) for i in range(count)]


def test_what_a_transform_refuses_is_reported_with_the_clip_and_its_two_frames(tmp_path):
    write_frames(tmp_path / "a", 2, (32, 40))
    with raises_one_line(data.BadFile, tmp_path / "a", "frames ", " and ", "smaller than the crop of 64x64"):
        VideoPairs(tmp_path, transform=FlowAugmentation((64, 64)))[0]


@pytest.mark.parametrize("name, codec", [("clip.avi", "MJPG"), ("clip.MP4", "mp4v")])
def test_video_files_give_the_same_pairs_in_any_order_as_rgb(tmp_path, name, codec):
    path = write_video(tmp_path / name, grey_frames(20), codec)
    pairs = VideoPairs(path, strides=(1, 4))
    assert len(pairs) == 19 + 16
    for index in (0, 18, 3, 4, 34, 19, 5):
        _, first, second = pairs.pairs[index]
        for image, number in zip(pairs[index], (first, second), strict=True):
            assert image.shape == (3, 64, 96) and image.dtype == torch.uint8
            assert abs(image.float().mean() - (10 + 12 * number)) < 6  # a codec keeps greys roughly
    path = write_video(tmp_path / f"red {name}", 2 * [np.full((32, 32, 3), (0, 0, 200), np.uint8)], codec)
    red, green, blue = VideoPairs(path)[0][0].float().mean(dim=(1, 2))
    assert red > 150 and green < 50 and blue < 50


def test_videos_are_read_alike_by_workers(tmp_path):
    # Too much for the decoder's read-ahead: a shared file position would show.
    frames = np.random.default_rng(0).integers(0, 256, (40, 120, 160, 3), dtype=np.uint8)
    pairs = VideoPairs(write_video(tmp_path / "noise.avi", frames))
    batches = [list(islice(data.make_loader(pairs, None, 4, workers=workers), 6)) for workers in (0, 2)]
    assert all(torch.equal(a, b) for x, y in zip(*batches, strict=True) for a, b in zip(x, y, strict=True))


def test_a_video_that_is_damaged_and_a_clip_that_is_too_short_are_reported_by_their_path(tmp_path):
    clip = write_video(tmp_path / "clip.avi", grey_frames(3))
    with raises_one_line(ValueError, f"{clip}: a clip of 3 frame(s), too short for a stride of 3"):
        VideoPairs(tmp_path, strides=(1, 3))
    write_image(tmp_path / "0.png")  # beside a video: the image is to go, not the folder
    with raises_one_line(ValueError, f"{tmp_path / '0.png'}: a clip of 1 frame(s)"):
        VideoPairs(tmp_path)
    (tmp_path / "damaged.mp4").write_text("hello")
    with raises_one_line(ValueError, f"{tmp_path / 'damaged.mp4'}: no frame can be decoded; convert the video"):
        VideoPairs(tmp_path)


def test_frames_of_different_sizes_are_reported_by_path_and_sizes(tmp_path):
    write_image(tmp_path / "0.png", (24, 32))
    second = write_image(tmp_path / "1.png", (24, 40))
    with raises_one_line(data.BadFile, f"{second}: 40x24 px, but 0.png of the same clip is 32x24 px", "one size"):
        VideoPairs(tmp_path)[0]


# --------------------------------------------------------------------------------------------------- images of labels


def test_the_palette_is_that_of_pascal_voc_bit_by_bit():
    np.testing.assert_array_equal(data.PALETTE, helpers.voc_palette())
    assert data.PALETTE.dtype == np.uint8 and data.PALETTE[[1, 15]].tolist() == [[128, 0, 0], [192, 128, 128]]


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "RGBA", "I;16"])
@given(seed=seeds, h=st.integers(1, 20), w=st.integers(1, 20))
def test_numbers_are_read_as_they_were_written_in_every_kind_of_image(mode, seed, h, w):
    ids = random_ids(seed, range(256), h, w)
    with TemporaryDirectory() as folder:
        read = data.read_ids(write_ids(Path(folder) / "ids.png", ids, mode))
    assert read.dtype == torch.uint8
    np.testing.assert_array_equal(read, ids)


def test_a_palette_counts_as_numbers_whatever_its_colours_and_one_bit_as_0_and_1(tmp_path):
    ids = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    image = Image.fromarray(ids)
    image.putpalette([9, 9, 9, 8, 8, 8])
    image.save(tmp_path / "ids.png")
    for path, mode in ((tmp_path / "ids.png", "P"), (write_ids(tmp_path / "bits.png", ids, "1"), "1")):
        assert Image.open(path).mode == mode and data.read_ids(path).tolist() == ids.tolist()


@pytest.mark.parametrize("mode, suffix", [("I;16", "png"), ("I;16", "tif"), ("I", "tif")])
def test_wide_numbers_are_read_up_to_255_and_are_an_error_beyond(tmp_path, mode, suffix):
    ids = np.array([[0, 17], [254, 255]])
    path = write_ids(tmp_path / f"fit.{suffix}", ids, mode)
    assert Image.open(path).mode == mode and data.read_ids(path).tolist() == ids.tolist()
    wide = write_ids(tmp_path / f"wide.{suffix}", ids + 1, mode)
    with raises_one_line(ValueError, wide, f"mode {mode}", "255"):
        data.read_ids(wide)


@given(colour=st.tuples(*[st.integers(0, 255)] * 3), place=st.integers(0, 11), mode=st.sampled_from(["RGB", "RGBA"]))
@example(colour=(255, 255, 254), place=5, mode="RGB")  # beyond all colours of the palette
def test_one_pixel_of_another_colour_is_an_error(colour, place, mode):
    assume(list(colour) not in helpers.voc_palette().tolist() and len(set(colour)) > 1)
    with TemporaryDirectory() as folder:
        path = write_ids(Path(folder) / "colours.png", np.arange(12).reshape(3, 4), mode)
        image = Image.open(path)
        image.putpixel((place % 4, place // 4), colour)
        image.save(path)
        with raises_one_line(ValueError, path, "colours where numbers belong"):
            data.read_ids(path)


def test_white_masks_may_be_rgb_and_colours_can_be_refused(tmp_path):
    white = tmp_path / "white.png"
    Image.fromarray(np.kron(np.eye(2, dtype=np.uint8)[..., None], np.full((4, 4, 3), 255, np.uint8))).save(white)
    assert data.read_ids(white).unique().tolist() == [0, 255]
    with raises_one_line(ValueError, white, "colours where numbers belong"):
        data.read_ids(white, coloured=False)


@given(seed=seeds)
def test_a_damaged_png_is_read_or_reported_and_nothing_else_is_raised(seed):
    with TemporaryDirectory() as folder:
        path = write_ids(Path(folder) / "ids.png", random_ids(seed, range(30), 20, 30))
        helpers.damage(path, seed)
        try:
            assert data.read_ids(path).ndim == 2
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def one_labelled(folder, ids, table, size=None, mode="P", colours=data.PALETTE):
    image, labels = write_image(folder / "image.png", size or ids.shape), write_ids(folder / "labels.png", ids, mode)
    return LabelledImages([(image, labels)], {"": table}, ("a", "b"), colours[:2])


def test_labels_that_do_not_fit_or_are_damaged_are_reported_by_their_path(tmp_path):
    labels, ids, table = tmp_path / "labels.png", random_ids(0, [0, 1, 9]), {0: 0, 1: 1, 9: data.VOID}
    assert torch.equal(one_labelled(tmp_path, ids, table, mode="RGB")[0][1], one_labelled(tmp_path, ids, table)[0][1])
    with raises_one_line(ValueError, f"{labels}: colours where numbers belong"):
        one_labelled(tmp_path, ids, table, mode="RGB", colours=data.PALETTE[1:])[0]  # those of another set
    with raises_one_line(ValueError, f"{labels}: labels of 16x12 px, but {tmp_path / 'image.png'} is 15x12 px"):
        one_labelled(tmp_path, ids, table, (12, 15))[0]
    with raises_one_line(ValueError, f"{labels}: holds 9, which is no class"):
        one_labelled(tmp_path, ids, {0: 0, 1: 1})[0]
    for damaged in ("image.png", "labels.png"):
        labelled = one_labelled(tmp_path, random_ids(0, [0, 1], 40, 50), table)
        cut_short(tmp_path / damaged)
        with raises_one_line(ValueError, tmp_path / damaged):
            labelled[0]


# -------------------------------------------------------------------------------------------------------- augmentation


def photo(seed, size=(48, 64)):
    """Noise with the spectrum and the correlated colours of photographs."""
    rng = np.random.default_rng(seed)
    noise = sum(cv2.GaussianBlur(rng.standard_normal((*size, 4)), (0, 0), sigma) * sigma for sigma in (0.5, 1, 2, 4, 8))
    noise = noise[..., :3] + 1.5 * noise[..., 3:]
    image = np.clip(128 + 55 * (noise - noise.mean()) / noise.std(), 0, 255)
    return torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1).contiguous()


def difference(ours, theirs):
    return (ours.int() - theirs.int()).abs().float()


@given(height=st.integers(8, 300), width=st.integers(8, 300), size=st.sampled_from((32, 64, 225)))
def test_two_views_differ_and_are_float_in_zero_one_of_the_size_whatever_the_image(height, width, size):
    views = TwoViews(size)(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
    for view in views:
        assert view.shape == (3, size, size) and view.dtype == torch.float32 and view.min() >= 0 and view.max() <= 1
    assert not torch.equal(*views)


def test_two_views_keep_the_probabilities_and_parameters_of_the_official_code():
    views = TwoViews(224)
    for view, blur, solarize in ((views.view_1, 1.0, 0.0), (views.view_2, 0.1, 0.2)):
        crop, flip, jitter, grey, blurring, solarizing, _ = view.transforms
        assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
        assert crop.interpolation == v2.InterpolationMode.BICUBIC
        assert (flip.p, jitter.p, grey.p, blurring.p, solarizing.p) == (0.5, 0.8, 0.2, blur, solarize)
        colour, gaussian = jitter.transforms[0], blurring.transforms[0]
        assert (colour.brightness, colour.contrast) == ((0.6, 1.4), (0.6, 1.4))
        assert (colour.saturation, colour.hue) == ((0.8, 1.2), (-0.1, 0.1))
        assert (list(gaussian.kernel_size), list(gaussian.sigma), solarizing.threshold) == ([23, 23], [0.1, 2.0], 128)


@pytest.mark.parametrize(
    "name, low, high, levels, mean",
    [
        ("brightness", 0.3, 1.8, 1, 1.0),
        ("contrast", 0.3, 1.8, 1, 1.0),
        ("saturation", 0.3, 1.8, 2, 1.0),
        ("hue", -0.5, 0.5, 12, 0.7),  # torchvision is as far from Pillow: hues are bytes there
    ],
)
@given(seed=seeds, share=st.floats(0, 1))
def test_each_change_of_colour_is_that_of_torchvision_to_a_few_grey_levels(name, low, high, levels, mean, seed, share):
    factor = low + share * (high - low)
    options = {name: (factor, factor)}
    apart = difference(*(kind(**options)(photo(seed)) for kind in (ColorJitter, v2.ColorJitter)))
    assert apart.max() <= levels and apart.mean() <= mean


@given(seed=seeds)
def test_changes_of_colour_are_those_of_torchvision_in_the_order_drawn_and_the_same_for_both_frames(seed):
    pair, drawn = torch.stack((photo(seed), photo(seed + 1) // 2)), []

    def change(kind, images):
        torch.manual_seed(seed)
        return kind(0.4, 0.4, 0.2, 0.1)(images)

    for kind in (ColorJitter, v2.ColorJitter):
        torch.manual_seed(seed)
        parameters = kind(0.4, 0.4, 0.2, 0.1).make_params([])
        drawn.append({name: torch.as_tensor(value).tolist() for name, value in parameters.items()})
    assert drawn[0] == drawn[1]
    changed = change(ColorJitter, pair)
    assert torch.equal(changed, torch.stack([change(ColorJitter, image) for image in pair]))
    # Each of the four changes is about half a level brighter than torchvision's.
    assert difference(changed, change(v2.ColorJitter, pair)).mean() < 4
    image = pair[0]
    for number in drawn[0]["fn_idx"]:
        name = ("brightness", "contrast", "saturation", "hue")[number]
        image = ColorJitter(**{name: 2 * (drawn[0][f"{name}_factor"],)})(image)
    assert torch.equal(image, changed[0])
    assert torch.equal(ColorJitter(0, 0, 0, 0)(pair), pair)


@given(seed=seeds, kernel=st.sampled_from((3, 9, 23)))
def test_blurring_is_that_of_torchvision_to_one_grey_level_with_its_parameters(seed, kernel):
    results = []
    for kind in (data._GaussianBlur, v2.GaussianBlur):
        torch.manual_seed(seed)
        results.append(kind(kernel, (0.1, 2.0))(photo(seed)))
    assert difference(*results).max() <= 1


def test_every_crop_occurs_and_the_order_is_swapped_and_each_axis_flipped_in_half_of_the_pairs():
    torch.manual_seed(0)
    dark = (torch.arange(6) + 10 * torch.arange(6).view(6, 1)).byte().expand(3, 6, 6).contiguous()
    augment, corners, drawn = FlowAugmentation((4, 4), colour=0.0), set(), []
    for _ in range(400):
        image, other = ((255 * view[0]).round() for view in augment(dark, dark + 100))
        corners.add(int(min(image.min(), other.min())))
        drawn.append([bool(image[0, 0] > value) for value in (other[0, 0], image[0, 1], image[1, 0])])
    assert corners == {x + 10 * y for x in range(3) for y in range(3)}
    assert all(0.42 < share < 0.58 for share in np.mean(drawn, axis=0))


def test_a_frame_smaller_than_the_crop_is_an_error_with_both_sizes_and_the_remedy():
    with raises_one_line(ValueError, "40x30 px, smaller than the crop of 32x31; use a smaller --crop"):
        FlowAugmentation((31, 32))(*torch.zeros(2, 3, 30, 40, dtype=torch.uint8))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("size, window", [((24, 100), (24, 48)), ((60, 40), (20, 40)), ((16, 32), (16, 32))])
def test_enlarge_takes_the_largest_window_of_the_crops_shape_from_a_small_frame(size, window, axis):
    values = torch.arange(size[axis - 1]).view(-1, 1) if axis == 1 else torch.arange(size[1])
    ramp = values.expand(3, *size).to(torch.uint8).contiguous()
    augment, length = FlowAugmentation((32, 64), enlarge=True, colour=0.0), window[axis - 1]
    for _ in range(5):
        image, other = augment(ramp, ramp)
        assert torch.equal(image, other) and image.shape == (3, 32, 64)
        line = (image[0, :, 32] if axis == 1 else image[0, 16]).mul(255).round(decimals=3)
        step = (line[-4] - line[3]).abs() / (len(line) - 7)  # away from the rims
        assert step == pytest.approx(length / augment.crop[axis - 1], abs=0.06)
        assert length - 2 <= line.max() - line.min() <= length - 1


@given(size=st.tuples(st.integers(2, 90), st.integers(2, 90)), seed=seeds)
def test_both_images_of_a_pair_are_augmented_alike_to_the_crop_with_enlarge_from_any_size(size, seed):
    torch.manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    augment = FlowAugmentation((32, 64), enlarge=size[0] < 32 or size[1] < 64)
    image_1, image_2 = augment(image, image)
    assert torch.equal(image_1, image_2) and image_1.shape == (3, 32, 64) and image_1.dtype == torch.float32
    assert image_1.min() >= 0 and image_1.max() <= 1


# -------------------------------------------------------------------------------------------------------------- loader


def drawn(length, batch, steps, *stream):
    return list(islice(ShardedStream(length, batch, Stream(*stream)), steps * batch))


@given(length=st.integers(1, 40), batch=st.integers(1, 5), world=st.integers(1, 4), start=st.integers(0, 30))
def test_the_joined_batches_of_any_number_of_processes_and_first_step_are_those_of_one(length, batch, world, start):
    parts = [drawn(length, batch, 4, 5, rank, world, start) for rank in range(world)]
    joined = [key for step in range(4) for part in parts for key in part[step * batch : (step + 1) * batch]]
    assert joined == drawn(length, batch * world, start + 4, 5)[start * batch * world :]


@given(length=st.integers(1, 40), seed=seeds)
def test_every_item_comes_once_per_pass_and_passes_and_seeds_have_orders_of_their_own(length, seed):
    positions, indices = zip(*drawn(length, 1, 3 * length, seed), strict=True)
    orders = [indices[k * length :][:length] for k in range(3)]
    assert positions == (*range(3 * length),) and all(sorted(order) == [*range(length)] for order in orders)
    orders += [(*range(length),), tuple(index for _, index in drawn(length, 1, length, seed + 1))]
    assert length < 15 or len(set(orders)) == 5


def draw(item):
    """Draws from all three global generators."""
    return torch.tensor([item, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def test_random_numbers_depend_on_seed_and_position_alone_and_the_callers_generators_stay_untouched():
    dataset = TensorDataset(torch.arange(10))
    items = data.Seeded(dataset, draw, seed=1)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = draw(0)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    first = items[4, 2]
    next(iter(data.make_loader(dataset, draw, 2)))
    assert torch.equal(draw(0), expected) and torch.equal(items[4, 2], first)
    assert len({items[position, 2][k].item() for position in range(20) for k in (1, 2, 3)}) == 60
    assert not torch.equal(data.Seeded(dataset, draw, seed=2)[4, 2], first)


@pytest.mark.parametrize("shapes, transform", [(ShapePairs, FlowAugmentation((32, 32))), (ShapeImages, TwoViews(32))])
def test_batches_depend_neither_on_the_workers_nor_on_the_processes_nor_on_the_first_step(shapes, transform):
    def batches(count, batch, *stream, workers=0):
        loader = data.make_loader(shapes(20, (48, 48)), transform, batch, Stream(*stream), workers)
        return torch.stack([torch.stack(pair) for pair in islice(loader, count)])

    whole = batches(7, 4, 3)
    assert whole.shape == (7, 2, 4, 3, 32, 32) and whole.dtype == torch.float32
    assert torch.equal(batches(7, 4, 3, workers=2), whole)
    assert torch.equal(batches(2, 4, 3, 0, 1, 5, workers=1), whole[5:])
    assert torch.equal(torch.cat([batches(2, 2, 3, rank, 2, 5) for rank in range(2)], dim=2), whole[5:])


def test_sources_and_augmentations_can_be_pickled_for_spawned_workers(tmp_path):
    videos = VideoPairs(write_video(tmp_path / "clip.avi", grey_frames(3)))
    for source, transform in ((ShapePairs(size=(32, 32)), FlowAugmentation((32, 32))), (videos, TwoViews(32))):
        first = source[0]  # opens the file
        again = pickle.loads(pickle.dumps(data.Seeded(source, transform)))
        assert torch.equal(again.dataset[0][0], first[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_item_takes_the_place_of_a_bad_one_with_any_workers_and_bad_ones_alone_are_an_error(workers, tmp_path):
    write_frames(tmp_path, 6)
    (tmp_path / "002.png").write_bytes(b"")
    (tmp_path / "003.png").write_text("text")
    images = ImageFiles(tmp_path)
    loader = data.make_loader(images, None, 3, workers=workers, allowed_bad_files=2)
    for step, (batch, faults) in zip(range(4), loader, strict=False):
        indices = [index for _, index in loader.sampler.step(step)]
        assert torch.equal(batch, torch.stack([images[{2: 4, 3: 4}.get(index, index)] for index in indices]))
        expected = {2: ["002.png", "003.png"], 3: ["003.png"]}
        assert [line.split(":")[0][-7:] for line in faults] == [name for i in indices for name in expected.get(i, [])]
    with pytest.raises(ValueError, match="2 of 6 files cannot be used, and --bad-files allows 1"):
        list(islice(data.make_loader(images, None, 3, workers=workers, allowed_bad_files=1), 4))
    for path in images.paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="6 of 6 files cannot be used"):
        next(iter(data.make_loader(images, None, 1, workers=workers, allowed_bad_files=6)))
