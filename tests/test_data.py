"""Tests of data.py. Each is named after the claim that it checks."""

import io
import pickle
import random
import struct
from fractions import Fraction
from itertools import islice, pairwise
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch
from helpers import cut_short, raises_one_line, seeds, write_frames, write_image, write_video
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

import data
from data import ColorJitter, FlowAugmentation, ImageFiles, ShardedStream, Stream, TwoViews, VideoPairs
from sources.flow_benchmarks import FlowFiles, read_pair
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
    "empty.tif": (lambda path: path.touch(), "b'' is no format"),
    "text.tif": (lambda path: path.write_text("I am a text."), "b'I am a text.'"),
    "cut.jpg": (lambda path: cut_short(write_image(path, (40, 50))), "truncated"),
    "dangling link.tif": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "phone.jpg": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40)), "HEIC"),
    "large.png": (lambda path: Image.new("1", (20_000, 10_000)).save(path), "200000000 pixels"),
    # Their range is not known: never read as black.
    "i.tif": (lambda path: Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)).save(path), "32 bits"),
    "f.tif": (lambda path: Image.fromarray(np.arange(256, dtype=np.float32).reshape(16, 16)).save(path), "32 bits"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_is_reported_by_its_path_and_the_reason(name, tmp_path):
    write, reason = UNREADABLE[name]
    write(tmp_path / name)
    with raises_one_line(data.BadFile, tmp_path / name, "not a readable image", reason):
        data.load_image(tmp_path / name)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_values_of_up_to_16_bits_are_stretched_alike_for_all_frames_of_a_clip(bits, channels, tmp_path):
    bright = np.random.default_rng(0).integers(0, 2**bits, (20, 30, channels)).astype(np.uint16)
    bright[0, 0] = 2**bits - 1
    frames = {"9": bright // 100, "10": bright, "left": bright // 7}  # the last one is beside "10"
    for name, frame in frames.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), frame[..., ::-1])
    cut_short(write_image(tmp_path / "8.png", (30, 40)))
    for name, frame in frames.items():
        beside = [tmp_path / "10.png"] if name == "left" else []
        image = data.load_image(tmp_path / f"{name}.png", beside=beside).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(image, np.broadcast_to(frame >> (bits - 8), image.shape))


def test_both_images_of_a_pair_have_one_shift_also_if_their_names_differ_in_letters(tmp_path):
    for name, value in (("a", 1000), ("b", 1100)):  # by 2 bits and by 4, each by itself
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((16, 16), value, np.uint16))
    files = FlowFiles("a", "", tmp_path / "a.png", tmp_path / "b.png", None)
    pairs = [VideoPairs(tmp_path)[0], [image[0] * 255 for image in read_pair(files)[2:4]]]
    for first, second in pairs:
        assert (first.round() == 1000 >> 4).all() and (second.round() == 1100 >> 4).all()


def test_the_images_of_a_tree_are_sorted_and_rgb_and_hidden_ones_are_left_out(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/x.jpeg", "top.PNG", ".thumbnails/0.png", "__MACOSX/0.png", "b/._2.png"):
        write_image(tmp_path / name)
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(tmp_path / "a" / "transparent.png")
    images = ImageFiles(tmp_path)
    names = [str(path.relative_to(tmp_path)) for path in images.paths]
    assert names == ["a/transparent.png", "a/x.jpeg", "b/2.png", "b/10.png", "top.PNG"]
    assert all(image.shape[0] == 3 and image.dtype == torch.uint8 for image in images)
    assert images[0][:, 0, 0].tolist() == [1, 2, 3] and images.file_count == 5
    (tmp_path / "b" / "list.txt").touch(), (tmp_path / "b" / "photo.HEIC").touch()
    assert ImageFiles(tmp_path).note == f"{tmp_path}: 5 images; left out: .heic 1, .txt 1"


def test_links_are_followed_and_folders_that_link_to_each_other_are_walked_once(tmp_path):
    write_image(tmp_path / "a/0.png"), write_image(tmp_path / "b/0.png")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "itself").symlink_to(".")
    found = [str(path.relative_to(tmp_path)) for path in data.find_files(tmp_path)]
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
    assert pairs[0][0].shape == (3, 24, 32) and pairs.file_count == 5
    assert VideoPairs(tmp_path, transform=lambda a, b: int(a[0, 0, 0]) + int(b[0, 0, 0]))[0] == 3


def test_videos_are_read_alike_by_workers(tmp_path):
    # Too much for the decoder's read-ahead: a shared file position would show.
    frames = np.random.default_rng(0).integers(0, 256, (40, 120, 160, 3), dtype=np.uint8)
    pairs = VideoPairs(write_video(tmp_path / "noise.avi", frames))
    batches = [[pair for pair, _ in islice(data.make_loader(pairs, None, 4, workers=n), 6)] for n in (0, 2)]
    assert all(torch.equal(a, b) for x, y in zip(*batches, strict=True) for a, b in zip(x, y, strict=True))


STEADY = [3000 * number for number in range(40)]
"""Times of frames, in 90,000ths of a second: 30 in a second."""
DROPPED = [time + 3000 * sum(time > 3000 * gap for gap in (7, 18, 33)) for time in STEADY]
PAUSED = [time + 180_000 * (time > 45_000) for time in STEADY]
X264, OPEN_GOP = {"bf": "3", "g": "12"}, {"bf": "3", "x264-params": "open-gop=1:keyint=12:min-keyint=12"}
VIDEOS = {
    "a phone that drops frames.mp4": ("libx264", DROPPED, X264),
    "a screen recorder with a pause.mkv": ("libx264", PAUSED, X264),
    "a name: with a colon.mov": ("libx264", STEADY, OPEN_GOP),
    "f\udcfcr Elise.ts": ("libx264", STEADY, X264),
    "one key frame.mp4": ("libx264", STEADY, {"bf": "3", "g": "500"}),
    "refreshed without key frames.mp4": ("libx264", STEADY, {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "hevc.mp4": ("libx265", DROPPED, {"x265-params": "log-level=none:keyint=12:bframes=4"}),
    "of a browser.webm": ("libvpx", STEADY, {"g": "12"}),
    "av1.mkv": ("libsvtav1", STEADY, {"g": "12", "preset": "12", "svtav1-params": "lp=1"}),
    "stamps of coding.avi": ("libx264", STEADY, X264),
    "no stamps.h264": ("libx264", STEADY, X264),
    "stamps that begin again.mts": ("libx264", STEADY, X264),
    "cut at the front.m2ts": ("libx264", STEADY, X264),
    "guessed stamps.m2v": ("mpeg2video", STEADY, {"bf": "2", "g": "12", "b": "2M"}),
    "program stream.vob": ("mpeg2video", STEADY, {"bf": "2", "g": "12", "b": "2M"}),
}
FORMATS = {".mp4": "mp4", ".mov": "mov", ".avi": "avi", ".h264": "h264", ".m2v": "mpeg2video", ".vob": "vob"}
PIPED = {".mkv": "matroska", ".webm": "webm", ".ts": "mpegts", ".mts": "mpegts", ".m2ts": "mpegts"}
"""Written as through a pipe: nothing at the front tells how long they are, or where their frames lie."""


def write_numbered_video(path, codec="libx264", times=STEADY, options=X264):
    """A video whose frame i shows the bits of i as black and white columns."""
    buffer, place = io.BytesIO(), np.arange(8).repeat(16)
    file = SimpleNamespace(write=buffer.write) if path.suffix in PIPED else buffer
    with av.open(file, "w", format=(FORMATS | PIPED)[path.suffix]) as out:
        stream = out.add_stream(codec, rate=30, options=options, width=128, height=64, pix_fmt="yuv420p")
        stream.codec_context.time_base = Fraction(1, 30 if codec == "mpeg2video" else 90_000)
        for number, time in enumerate(times):
            columns = (255 * (number >> place & 1)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.tile(columns[None, :, None], (64, 1, 3)))
            frame.pts, frame.time_base = time, Fraction(1, 90_000)
            out.mux(stream.encode(frame.reformat(format="yuv420p")))
        out.mux(stream.encode())
    path.write_bytes(buffer.getvalue())
    return path


def number_shown(image):
    return sum(int(image[:, :, 16 * bit + 4 : 16 * bit + 12].float().mean() > 127) << bit for bit in range(8))


@pytest.mark.parametrize("name", VIDEOS)
def test_pair_i_of_a_video_shows_frames_i_and_i_plus_1_in_any_order(name, tmp_path):
    path, numbers = write_numbered_video(tmp_path / name, *VIDEOS[name]), [*range(40)]
    if "begin again" in name:
        path.write_bytes(2 * path.read_bytes())
        numbers *= 2
    if "cut" in name:  # before the second key frame but one, of 12
        path.write_bytes(path.read_bytes()[188 * 40 :])
        numbers = numbers[24:]
    pairs = VideoPairs(path)
    assert [tuple(map(number_shown, pair)) for pair in pairs] == [*pairwise(numbers)]
    pairs, order = VideoPairs(path), [*range(len(pairs))]
    random.Random(0).shuffle(order)
    for index in order:
        assert tuple(map(number_shown, pairs[index])) == tuple(numbers[index : index + 2])


@pytest.mark.parametrize("a, b, c, d", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0)])
def test_a_video_is_turned_and_mirrored_as_its_camera_was_held(a, b, c, d, tmp_path):
    path = write_numbered_video(tmp_path / "a.mp4")
    stored, content = VideoPairs(path)[5][0].numpy(), bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    content[start : start + 20] = struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)
    path.write_bytes(content)
    (y, x), image = np.mgrid[:64, :128], VideoPairs(path)[5][0].numpy()
    x, y = a * x + c * y, b * x + d * y
    np.testing.assert_array_equal(image[:, y - y.min(), x - x.min()], stored)


def test_colours_are_those_of_ffmpeg_and_the_cover_of_an_album_is_no_video(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    path = write_video(tmp_path / "colours.avi", frames)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(VideoPairs(path)[1][1].permute(1, 2, 0), expected[2])
    cover = write_image(tmp_path / "cover.png").read_bytes()
    frame = b"APIC" + struct.pack(">IH", len(cover) + 13, 0) + b"\0image/png\0\3\0" + cover
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    (tmp_path / "song.mp4").write_bytes(b"ID3\3\0\0" + size + frame + bytes.fromhex("fffb9064") + bytes(2000))
    with raises_one_line(ValueError, tmp_path / "song.mp4", "video"):
        VideoPairs(tmp_path / "song.mp4")


def test_a_bad_video_or_short_clip_among_good_ones_is_a_bad_file_and_alone_an_error(tmp_path):
    write_numbered_video(tmp_path / "good.mp4")
    clip = write_numbered_video(tmp_path / "short.mkv", times=STEADY[:3])
    clip.write_bytes(clip.read_bytes().replace(b"Lavf", b"L\xe4vf"))  # the name of its encoder, not in UTF-8
    write_image(tmp_path / "0.png")  # beside a video: the image is to go, not the folder
    (tmp_path / "text.mp4").write_text("hello")
    pairs = VideoPairs(tmp_path, strides=(3, 5))
    assert len(pairs) == 3 + 37 + 35 and pairs.file_count == 1 + 1 + 40 + 3
    reasons = {clip: "a clip of 3 frame(s), too short for a stride of 3", tmp_path / "0.png": "a clip of 1 frame(s)"}
    reasons[tmp_path / "text.mp4"] = "not a readable video (Invalid data found when processing input)"
    for path, index in ((clip, 73), (tmp_path / "0.png", 0), (tmp_path / "text.mp4", 74)):
        with raises_one_line(data.BadFile, f"{path}: {reasons[path]}"):
            pairs[index]
    for path in (clip, tmp_path / "text.mp4"):
        with raises_one_line(ValueError, f"{path}: {reasons[path]}"):
            VideoPairs(path, strides=(3, 5))


def test_a_note_counts_clips_pairs_and_what_is_left_out_and_masks_are_no_clips(tmp_path):
    for folder in ("JPEGImages/480p/bear", "Annotations/480p/bear", "annotations_unsupervised/bear"):
        write_frames(tmp_path / folder, 4, (16, 16))
    write_numbered_video(tmp_path / "a.mp4").with_name("b.MTS").write_bytes((tmp_path / "a.mp4").read_bytes())
    for name in ("song.mp3", "list.txt", "README", "._a.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "c.mov").touch()
    expected = "4 clips (.mov 1, .mp4 1, .mts 1, folder 1), 81 pairs; left out: .mp3 1, .txt 1, masks 8, no ending 1"
    assert VideoPairs(tmp_path).note == f"{tmp_path}: {expected}; cannot be used: c.mov"
    assert len(VideoPairs(tmp_path / "Annotations")) == 3  # whoever names them wants them
    unknown = (tmp_path / "a.mp4").rename(tmp_path / "a.recording")
    assert len(VideoPairs(unknown)) == 39  # by its name, whatever the ending


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


def test_two_views_keep_the_probabilities_and_parameters_of_the_official_code_and_small_ones_are_not_blurred():
    views = TwoViews(224)
    for view, blur, solarize in ((views.view_1, 1.0, 0.0), (views.view_2, 0.1, 0.2)):
        crop, flip, jitter, grey, blurring, solarizing = view.transforms
        assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
        assert crop.interpolation == v2.InterpolationMode.BICUBIC
        assert (flip.p, jitter.p, grey.p, blurring.p, solarizing.p) == (0.5, 0.8, 0.2, blur, solarize)
        colour, gaussian = jitter.transforms[0], blurring.transforms[0]
        assert (colour.brightness, colour.contrast) == ((0.6, 1.4), (0.6, 1.4))
        assert (colour.saturation, colour.hue) == ((0.8, 1.2), (-0.1, 0.1))
        assert (list(gaussian.kernel_size), list(gaussian.sigma), solarizing.threshold) == ([23, 23], [0.1, 2.0], 128)
    for size, smallest in ((95, 0.25), (96, 0.5)):
        crop, *_, blur, _ = TwoViews(size, smallest).view_1.transforms
        assert crop.scale == (smallest, 1.0)
        assert isinstance(blur.transforms[0], torch.nn.Identity) == (size < 96)


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
    assert torch.equal(ColorJitter(0, 0, 0, 0)(pair), pair)


@given(seed=seeds, kernel=st.sampled_from((3, 9, 23)))
def test_blurring_is_that_of_torchvision_to_one_grey_level_with_its_parameters(seed, kernel):
    results = []
    for kind in (data._GaussianBlur, v2.GaussianBlur):
        torch.manual_seed(seed)
        results.append(kind(kernel, (0.1, 2.0))(photo(seed)))
    assert difference(*results).max() <= 1


def test_every_crop_occurs_and_the_order_is_swapped_and_left_is_right_in_half_of_the_pairs():
    torch.manual_seed(0)
    dark = (torch.arange(6) + 10 * torch.arange(6).view(6, 1)).byte().expand(3, 6, 6).contiguous()
    augment, corners, drawn = FlowAugmentation((4, 4), colour=0.0), set(), []
    for _ in range(400):
        image, other = (view[0].int() for view in augment(dark, dark + 100))
        corners.add(int(min(image.min(), other.min())))
        drawn.append([bool(image[0, 0] > value) for value in (other[0, 0], image[0, 1])])
        assert image[0, 0] < image[1, 0]
    assert corners == {x + 10 * y for x in range(3) for y in range(3)}
    assert all(0.42 < share < 0.58 for share in np.mean(drawn, axis=0))


def test_about_half_of_the_pairs_change_their_colours_and_both_frames_alike():
    torch.manual_seed(0)
    frame, augment = photo(0, (16, 16)), FlowAugmentation((16, 16))
    pairs = [augment(frame, frame) for _ in range(200)]
    assert all(torch.equal(*pair) for pair in pairs)
    values = [image.flatten(1).sort().values for image in (frame, *(pair[0] for pair in pairs))]
    kept = np.mean([torch.equal(values[0], each) for each in values[1:]])
    assert 0.35 < kept < 0.57  # half, less the 5 of 6 permutations in a tenth of them


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("size, window", [((24, 100), (24, 48)), ((60, 40), (20, 40)), ((16, 32), (16, 32))])
def test_enlarge_takes_the_largest_window_of_the_crops_shape_from_a_small_frame(size, window, axis):
    values = torch.arange(size[axis - 1]).view(-1, 1) if axis == 1 else torch.arange(size[1])
    ramp = values.expand(3, *size).to(torch.uint8).contiguous()
    augment, length = FlowAugmentation((32, 64), enlarge=True, colour=0.0), window[axis - 1]
    for _ in range(5):
        image, other = augment(ramp, ramp)
        assert torch.equal(image, other) and image.shape == (3, 32, 64)
        line = (image[0, :, 32] if axis == 1 else image[0, 16]).float()
        step = (line[-4] - line[3]).abs() / (len(line) - 7)  # away from the rims
        assert step == pytest.approx(length / augment.crop[axis - 1], abs=0.06)
        assert length - 2 <= line.max() - line.min() <= length - 1


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


def test_random_numbers_depend_on_seed_and_position_alone_and_the_callers_generator_stays_untouched():
    dataset, draw = TensorDataset(torch.arange(10.0)), lambda item: torch.stack((item, torch.rand(())))
    items = data.SkipBadFiles(dataset, draw, seed=1)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, _ = items[4, 2]
    next(iter(data.make_loader(dataset, draw, 2)))
    assert torch.equal(torch.rand(3), expected) and torch.equal(items[4, 2][0], first)
    assert len({items[position, 2][0][1].item() for position in range(20)}) == 20
    assert not torch.equal(data.SkipBadFiles(dataset, draw, seed=2)[4, 2][0], first)


@pytest.mark.parametrize("shapes, transform", [(ShapePairs, FlowAugmentation((32, 32))), (ShapeImages, TwoViews(32))])
def test_batches_depend_neither_on_the_workers_nor_on_the_processes_nor_on_the_first_step(shapes, transform):
    def batches(count, batch, *stream, workers=0):
        loader = data.make_loader(shapes(20, (48, 48)), transform, batch, Stream(*stream), workers)
        return torch.stack([torch.stack(pair) for pair, _ in islice(loader, count)])

    whole = batches(7, 4, 3)
    assert whole.shape == (7, 2, 4, 3, 32, 32) and whole.dtype == torch.uint8
    assert torch.equal(batches(7, 4, 3, workers=2), whole)
    assert torch.equal(batches(2, 4, 3, 0, 1, 5, workers=1), whole[5:])
    assert torch.equal(torch.cat([batches(2, 2, 3, rank, 2, 5) for rank in range(2)], dim=2), whole[5:])


def test_sources_and_augmentations_can_be_pickled_for_spawned_workers(tmp_path):
    videos = VideoPairs(write_numbered_video(tmp_path / "clip.mp4"))
    for source, transform in ((ShapePairs(size=(32, 32)), FlowAugmentation((32, 32))), (videos, TwoViews(32))):
        first = source[0]  # opens the file
        again = pickle.loads(pickle.dumps(data.SkipBadFiles(source, transform, 0)))
        assert torch.equal(again.dataset[0][0], first[0])


def test_too_many_bad_files_in_a_row_are_counted_each_once(tmp_path):
    """A frame that is damaged spoils two pairs."""
    write_frames(tmp_path / "clip", 6)
    for name in ("001.png", "003.png"):
        (tmp_path / "clip" / name).write_bytes(b"")
    readable = data.SkipBadFiles(VideoPairs(tmp_path), None, 0, allowed=1)
    with raises_one_line(ValueError, "2 of 6 files cannot be used, and --bad-files allows 1"):
        readable[(0, 0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_item_takes_the_place_of_a_bad_one_with_any_workers(workers, tmp_path):
    write_frames(tmp_path, 6)
    (tmp_path / "002.png").write_bytes(b"")
    (tmp_path / "003.png").write_text("text")
    images = ImageFiles(tmp_path)
    loader = data.make_loader(images, None, 3, workers=workers, allowed_bad_files=2)
    keys = iter(loader.sampler)
    for batch, faults in islice(loader, 4):
        indices = [index for _, index in islice(keys, 3)]
        assert torch.equal(batch, torch.stack([images[{2: 4, 3: 4}.get(index, index)] for index in indices]))
        expected = {2: ["002.png", "003.png"], 3: ["003.png"]}
        assert [line.split(":")[0][-7:] for line in faults] == [name for i in indices for name in expected.get(i, [])]
