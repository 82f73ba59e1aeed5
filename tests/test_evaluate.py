"""evaluate.py: metrics against loops and the code of others, protocols against a few lines of NumPy and OpenCV."""

import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import product

import av
import cv2
import helpers
import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize
from torchvision.utils import flow_to_image

import evaluate
from evaluate import Config, SegmentationConfig, VideoConfig, follow_objects, run_segmentation, run_video
from mcjepa import IMAGENET_MEAN, IMAGENET_STD, MCJEPA, LossConfig, ModelConfig, pad_to_multiple
from sources import MissingSet
from sources.label_sets import VOID
from sources.moving_shapes import MovingShapes


@pytest.fixture
def typed(monkeypatch, capfd):
    """The command line in this process: arguments to (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        try:
            evaluate.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def assert_done(result):
    """A command that ends well: exit code 0, and nothing on stderr. Returns what it printed."""
    code, screen, err = result
    assert (code, err) == (0, "")
    return screen


def assert_one_line(result, *words):
    """A command that failed as a user's mistake has to: exit code 1 and one line on stderr that contains the words."""
    code, out, err = result
    assert (code, out) == (1, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert str(word) in err, err


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------- metrics of flow


def errors_by_hand(estimate, truth, region):
    """At each pixel of the region, in float64: the error in px, and whether it is an outlier, above 3 px and 5%."""
    difference = estimate.astype(np.float64)[region] - truth.astype(np.float64)[region]
    error = np.hypot(difference[:, 0], difference[:, 1])
    return error, ((error > 3) & (error > 0.05 * np.hypot(*truth.astype(np.float64)[region].T))).astype(float)


@given(seed=st.integers(0, 10_000), size=st.sampled_from([1.0, 60.0, 100.0]))
def test_both_flow_metrics_are_means_over_the_valid_pixels_of_known_flow_of_which_there_must_be_one(seed, size):
    truth = size * helpers.normal(seed, 2, 2, 5, 7).float()
    flow = truth + 3 * helpers.normal(seed + 1, 2, 2, 5, 7).float()  # errors on both sides of both bounds of an outlier
    truth[0, 0, 0, 0], truth[0, 1, 1, 1], truth[1, :, 2, 2] = float("nan"), 1.67e9, float("inf")
    valid = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(seed)) < 0.7
    counts = valid.numpy().copy()
    counts[[0, 0, 1], [0, 1, 2], [0, 1, 2]] = False
    errors, outliers = errors_by_hand(*(x.permute(0, 2, 3, 1).numpy() for x in (flow, truth)), counts)
    for mask in (valid, valid[:, None]):
        assert evaluate.end_point_error(flow, truth, mask).item() == pytest.approx(errors.mean(), rel=1e-5)
        assert evaluate.f1_all(flow, truth, mask).item() == pytest.approx(outliers.mean(), abs=1e-6)
        assert evaluate.f1_all(math.nan * flow, truth, mask) == 1  # what is not a number is an outlier
        for metric in (evaluate.end_point_error, evaluate.f1_all):
            with pytest.raises(ValueError, match="no pixel"):
                metric(flow, flow + 2e9, mask)
            with pytest.raises(ValueError, match="no pixel"):
                metric(flow, flow, mask & False)


# --------------------------------------------------------------------------------------------- metrics of segmentation


@given(seed=st.integers(0, 10_000))
def test_the_confusion_counts_pixels_one_by_one_and_void_never(seed):
    generator = torch.Generator().manual_seed(seed)
    truth, guess = torch.randint(0, 4, (2, 9, 13), generator=generator)
    truth[torch.rand(9, 13, generator=generator) < 0.3] = VOID
    expected = np.zeros((5, 5), int)
    for t, g in zip(truth.flatten().tolist(), guess.flatten().tolist(), strict=True):
        if t != VOID:
            expected[t, g] += 1
    confusion = evaluate.count_confusion(truth, guess, 5)
    np.testing.assert_array_equal(confusion.numpy(), expected)
    masks = [((truth == c), (guess == c) & (truth != VOID)) for c in range(5)]  # as mmsegmentation
    by_class = [(a & b).sum() / (a | b).sum() for a, b in masks if (a | b).any()]  # without classes that never occur
    assert evaluate.mean_iou(confusion) == pytest.approx(float(np.mean(by_class)))
    with pytest.raises(ValueError, match="no pixel"):
        evaluate.mean_iou(0 * confusion)


def test_region_and_contour_equal_the_official_evaluation_of_davis():
    expected = helpers.golden("davis_jaccard_boundary")
    pairs = [*zip(expected["annotation"], expected["prediction"], strict=True)]
    metrics = {"region_similarity_J": evaluate.region_similarity, "contour_accuracy_F": evaluate.contour_accuracy}
    for name, metric in metrics.items():
        np.testing.assert_allclose([metric(*pair) for pair in pairs], expected[name], atol=1e-9)


@pytest.mark.parametrize("h, w, reach", [(20, 30, 1), (120, 214, 2), (480, 854, 8)])
def test_contours_agree_if_they_pass_within_0_8_percent_of_the_diagonal(h, w, reach):
    left, near, far = (torch.arange(w).expand(h, w) < w // 2 + shift for shift in (0, reach, reach + 1))
    assert evaluate.contour_accuracy(left, near) == 1 and evaluate.contour_accuracy(left, far) == 0


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=120))
def test_statistics_over_frames_are_those_of_davis(values):
    n = len(values)
    # 1-based borders of four quarters, rounded to even as NumPy does; neighbours share their border.
    borders = [round(1 + k * (n - 1) / 4 + 1e-10) - 1 for k in range(5)]
    first, last = values[borders[0] : borders[1] + 1], values[borders[3] : borders[4] + 1]
    ours = evaluate.davis_statistics(values)
    assert ours["mean"] == pytest.approx(sum(values) / n, abs=1e-9)
    assert ours["recall"] == pytest.approx(sum(v > 0.5 for v in values) / n)  # 0.5 itself is none
    assert ours["decay"] == pytest.approx(sum(first) / len(first) - sum(last) / len(last), abs=1e-9)


# ---------------------------------------------------------------------------------------------- propagation of labels


def test_labels_are_propagated_as_by_the_code_of_dino():
    expected = helpers.golden("label_propagation")
    tensors = (expected[name] for name in ("target_features", "context_features", "context_labels"))
    options = int(expected["radius"]), int(expected["topk"]), float(expected["temperature"])
    propagated = evaluate.propagate_labels(*tensors, *options)
    torch.testing.assert_close(propagated, expected["propagated"], atol=1e-5, rtol=1e-4)


@given(seeds, st.integers(1, 17), st.integers(1, 17), st.integers(1, 3), st.integers(0, 9), st.integers(1, 6))
def test_tiles_give_what_all_pairs_of_pixels_give(seed, h, w, n, radius, topk):
    generator = torch.Generator().manual_seed(seed)
    target, context = (torch.randn(*size, generator=generator) for size in ((5, h, w), (n, 5, h, w)))
    labels = torch.rand(n, 3, h, w, generator=generator)
    ours = evaluate.propagate_labels(target, context, labels, radius, topk)
    doubles = (x.double() for x in (target, context, labels))
    expected = plain.propagate(*doubles, radius, min(topk, n * h * w))
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ models and baselines


def write_checkpoint(path, task="mjepa"):
    """A checkpoint as train.py writes it, of an untrained network."""
    torch.manual_seed(0)
    config = ModelConfig(encoder="pwc", estimator_factor=0.1, expander=(4,))
    model = MCJEPA(config, task=task)
    settings = {"model": asdict(config), "loss": asdict(LossConfig()), "task": task}
    torch.save({"model": model.state_dict(), "config": settings, "step": 0}, path)
    return model.eval()


def test_random_weights_are_those_of_their_seed_and_what_a_torchvision_file_lacks_is_the_same_each_time(tmp_path):
    torch.save(torchvision.models.convnext_tiny(weights=None).state_dict(), tmp_path / "convnext.pth")
    models = []
    for before, name, seed in ((1, "random", 0), (2, "random", 0), (3, "random", 1), (1, "file", 0), (2, "file", 1)):
        torch.manual_seed(before)
        name = "random" if name == "random" else str(tmp_path / "convnext.pth")
        model, _ = evaluate.open_model(Config(name, encoder="pwc", seed=seed))
        models.append(torch.cat([parameter.flatten() for parameter in model.encoder.parameters()]))
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])
    assert torch.equal(models[3], models[4])


COLOUR = evaluate.feature_method(Config("colour"), [8])[0]


def test_the_colour_baseline_is_the_mean_colour_of_each_cell_less_imagenets():
    image = torch.rand(1, 3, 16, 24)
    cells = normalize(image, IMAGENET_MEAN, IMAGENET_STD)[0].unflatten(1, (2, 8)).unflatten(3, (3, 8)).mean(dim=(2, 4))
    torch.testing.assert_close(COLOUR(image), [cells])


# ------------------------------------------------------------------------------------------------------------ pictures


def panel(figure, row, column, h=60, w=80):
    """A panel of a figure, without its title."""
    top, left = 16 + row * (h + 16), 2 + column * (w + 2)
    return figure[..., top : top + h, left : left + w]


def test_the_figure_of_the_true_flow_has_a_black_residual_and_a_black_error():
    motion = helpers.bands([(3, 1)])
    image_1, image_2 = (torch.from_numpy(f.copy()).permute(2, 0, 1) / 255 for f in helpers.textured_clip(0, motion))
    flow = torch.from_numpy(motion).permute(2, 0, 1)
    alone, beside = evaluate.flow_figure(image_1, image_2, flow), evaluate.flow_figure(image_1, image_2, flow, flow)
    assert alone.shape == (3, 2 * 76 + 2, 3 * 82 + 2) and beside.shape == (3, 2 * 76 + 2, 4 * 82 + 2)
    assert panel(alone, 1, 1)[:, 4:-4, 4:-4].max() <= 1  # 1 for rounding; what left the picture is not found
    assert panel(evaluate.flow_figure(image_1, image_2, 0 * flow), 1, 1).float().mean() > 10
    assert panel(beside, 1, 2).max() == 0
    half = evaluate.flow_figure(image_1, image_2, flow / 2, flow)  # coloured on the scale of the truth
    slow = evaluate.flow_colours(flow / 2, math.hypot(3, 1))
    assert torch.equal(panel(half, 0, 2), panel(beside, 0, 2)) and torch.equal(panel(half, 0, 3), slow)


def test_the_colour_key_is_the_last_panel_and_shows_each_direction_in_the_colour_of_its_flow():
    image, flow = torch.rand(3, 60, 80), 10 * helpers.normal(0, 2, 60, 80).float()
    key = panel(evaluate.flow_figure(image, image, flow), 1, 2)
    assert torch.equal(key, panel(evaluate.flow_figure(image, image, flow, 2 * flow), 1, 3))
    for x, y in ((64, 30), (40, 54), (20, 14), (55, 10)):
        # The last column, of length 1, is the largest, to which flow_to_image holds the other.
        field = torch.tensor([[[(x - 39.5) / 30, 1.0]], [[(y - 29.5) / 30, 0.0]]])
        assert (key[:, y, x].int() - flow_to_image(field)[:, 0, 0].int()).abs().max() <= 1
    assert key[:, 28:32, 38:42].min() > 230  # no flow
    assert key[:, 0, 0].min() == 255 and key[:, 30, 5].min() == 255  # beyond the rim


# -------------------------------------------------------------------------------------------------------- evaluate flow


def dis(frame_1, frame_2):
    grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (frame_1, frame_2)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)


BASELINES = {"zero": lambda frame_1, frame_2: np.zeros((*frame_1.shape[:2], 2)), "dis": dis}


def table_rows(screen, title):
    """The tables of that title as numbers: one dictionary (method to columns) for each."""
    tables, columns = [], None
    for line in screen.splitlines():
        name, *cells = re.split(r"\s{2,}", line.strip())
        if name == title:
            columns = cells
            tables.append({})
        elif columns and len(cells) == len(columns):
            tables[-1][name] = dict(zip(columns, (math.nan if x == "-" else float(x) for x in cells), strict=True))
        else:
            columns = None
    return tables


MEANS = {
    "per_image": lambda images: np.mean([values.mean() for values in images]),
    "per_pixel": lambda images: np.concatenate(images).mean(),
}


def check_flow_report(samples, folder, screen, methods):
    """Numbers in flow.json and on the screen against those by hand. Returns what flow.json holds."""
    report = json.loads((folder / "flow.json").read_text())
    scenes, collected = {(scene["group"], scene["name"]): scene for scene in report["scenes"]}, {}
    assert len(scenes) == len(report["scenes"]) and scenes.keys() == {(s.group, s.name) for s in samples}
    for sample, (name, method) in product(samples, methods.items()):
        scene, estimate = scenes[sample.group, sample.name], method(sample.frame_1, sample.frame_2)
        regions = {region: mask for region, mask in sample.regions.items() if mask.any()}
        assert scene["pixels"] == {region: mask.sum() for region, mask in regions.items()}
        for region, mask in regions.items():
            for metric, values in zip(("epe", "f1"), errors_by_hand(estimate, sample.truth, mask), strict=True):
                assert scene[name][metric][region] == pytest.approx(values.mean(), rel=1e-4, abs=1e-6)
                group = collected.setdefault(sample.group or "all", {}).setdefault(name, {"epe": {}, "f1": {}})
                group[metric].setdefault(region, []).append(values)
    assert report["groups"].keys() == collected.keys()
    for group, mean in product(collected, MEANS):
        assert list(report["groups"][group]) == list(methods)
        (table,) = table_rows(screen, f"{group}, {mean.replace('_', ' ')} [px, %, ms]")
        for name, metrics in collected[group].items():
            shown = {key: value for key, value in table[name].items() if key != "time"}
            for metric, regions in metrics.items():
                expected = {region: MEANS[mean](images) for region, images in regions.items()}
                assert report["groups"][group][name][mean][metric] == pytest.approx(expected, rel=1e-4, abs=1e-6)
                for region, value in expected.items():
                    value = value if metric == "epe" else 100 * value
                    assert shown.pop(f"{metric.upper()} {region}") == pytest.approx(value, abs=0.0051)
            assert not shown
    return report


@pytest.mark.parametrize("name", helpers.FLOW_SETS)
def test_each_benchmark_is_measured_as_by_hand_and_what_is_to_be_submitted_is_what_was_measured(tmp_path, typed, name):
    samples, out, export = helpers.write_benchmark(tmp_path / "data", name), tmp_path / "out", tmp_path / "deep/flow"
    options = ("--data-root", tmp_path, "--benchmark", name, "--output-dir", out, "--export", export)
    screen = assert_done(typed("flow", "--model", "dis", *options))
    report = check_flow_report(samples, out, screen, BASELINES)
    assert report["settings"]["model"] == "dis" and report["versions"]["torch"] == torch.__version__
    pictures = ["_".join(filter(None, (s.group, s.name))).replace("/", "_") + ".png" for s in samples]
    assert files_below(out) == ["flow.json", *sorted(f"pictures/{name}" for name in pictures)]
    pattern = {"kitti2012": "{name}.png", "kitti2015": "flow/{name}.png"}.get(name, "{group}/{name}.flo")
    places = [pattern.format(group=sample.group, name=sample.name).lstrip("/") for sample in samples]
    assert files_below(export) == sorted(places)
    for place, sample in zip(places, samples, strict=True):
        difference = helpers.read_submission(export / place) - dis(sample.frame_1, sample.frame_2)
        assert np.abs(difference).max() <= (0 if place.endswith("flo") else 1 / 128 + 1e-4)


def test_invalid_and_unknown_flow_is_black_in_the_picture_and_does_not_count(tmp_path, typed):
    samples, out = helpers.write_sintel(tmp_path / "data", occlusions=False), tmp_path / "out"
    screen = assert_done(typed("flow", "--model", "zero", "--data-root", tmp_path / "data", "--output-dir", out))
    check_flow_report(samples, out, screen, BASELINES)
    truth = panel(np.moveaxis(cv2.imread(str(out / "pictures/clean_market_2_frame_0001.png")), 2, 0), 0, 2)
    black = helpers.rectangle(slice(15, 25), slice(10, 50)) | helpers.rectangle(slice(30, 33), slice(7, 60))
    np.testing.assert_array_equal((truth == 0).all(axis=0), black)
    assert truth[:, :20, :10].min(axis=0).max() < 100  # the longest flow that counts has full colour


def test_a_checkpoint_is_measured_as_the_model_that_it_holds(tmp_path, typed):
    model, samples = write_checkpoint(tmp_path / "a.pt"), helpers.write_benchmark(tmp_path / "kitti", "kitti2015")

    def ours(*frames):
        images = [torch.from_numpy(frame[..., ::-1].copy()).permute(2, 0, 1)[None] / 255 for frame in frames]
        return model.estimate_flow(*images)[0].permute(1, 2, 0).numpy()

    options = ("--data-root", tmp_path / "kitti", "--output-dir", tmp_path / "out")
    screen = assert_done(typed("flow", "--model", tmp_path / "a.pt", *options))
    check_flow_report(samples, tmp_path / "out", screen, BASELINES | {"ours": ours})
    assert json.loads((tmp_path / "out/flow.json").read_text())["settings"]["encoder"] == "pwc"


class ConstantFlow(MCJEPA):
    """Stands for a trained model: always the same flow."""

    def __init__(self, dx, dy):
        nn.Module.__init__(self)
        self.flow = nn.Parameter(torch.tensor([dx, dy]).view(1, 2, 1, 1))
        self.encoder_is_frozen = False

    @torch.no_grad()
    def estimate_flow(self, image_1, image_2):
        return self.flow.expand(len(image_1), -1, *image_1.shape[-2:]).clone()


@pytest.fixture
def constant_flow(monkeypatch):
    """Makes --model MODEL a constant flow, of 2.5 px to the right."""
    model = ConstantFlow(2.5, 0.0)
    monkeypatch.setattr(evaluate, "open_model", lambda config: (model, config))
    return model


def test_train_py_gets_the_error_on_unseen_shapes():
    numbers = evaluate.flow_errors_on_shapes(ConstantFlow(0.0, 0.0), 3, (64, 48))
    shapes = MovingShapes(length=3, size=(64, 48), seed=evaluate.UNSEEN_SEED)
    truth = torch.stack([shapes[i]["flow_forward"][0] for i in range(3)])
    zero = pytest.approx(truth.norm(dim=1).mean().item(), rel=1e-5)
    assert numbers["epe"] == zero and numbers["epe_zero"] == zero
    assert numbers["f1"] == pytest.approx((truth.norm(dim=1) > 3).float().mean().item(), abs=1e-5)


def test_the_weights_that_come_with_the_code_are_in_eval_mode_and_know_flow():
    model = evaluate.load_model("small")
    assert not model.training
    errors = evaluate.flow_errors_on_shapes(model, 4, (192, 192))
    assert errors["epe"] < 0.5 * errors["epe_zero"]


@pytest.mark.parametrize("name", ["sintel", "kitti2012", "kitti2015"])
def test_the_flow_of_the_testing_split_is_written_for_every_pair(tmp_path, typed, name):
    pairs, export = helpers.write_testing_split(tmp_path / "data", name), tmp_path / "to_submit"
    helpers.write_benchmark(tmp_path / "data", name)  # the training split beside it is left alone
    command = ("flow", "--model", "dis", "--data-root", tmp_path / "data", "--split", "testing", "--pictures", 1)
    screen = assert_done(typed(*command, "--export", export, "--output-dir", tmp_path / "out"))
    assert "EPE" not in screen
    assert files_below(export) == sorted(pairs)
    for place, frames in pairs.items():
        flow = helpers.read_submission(export / place)
        assert np.abs(flow - dis(*frames)).max() <= (1 / 128 + 1e-4 if place.endswith("png") else 0)
    (picture,) = (tmp_path / "out/pictures").iterdir()
    assert cv2.imread(str(picture)).shape == (2 * 76 + 2, 3 * 82 + 2, 3)


def test_two_images_become_a_flow_file_and_pictures(tmp_path, typed):
    frames, out = helpers.write_clip(tmp_path, "{}.png", 0, helpers.bands([(3, 1)]), first=0), tmp_path / "out"
    options = ("--images", tmp_path / "0.png", tmp_path / "1.png", "--output-dir", out)
    screen = assert_done(typed("flow", "--model", "dis", *options))
    assert "px" in screen and files_below(out) == ["flow.flo", "flow.png", "pictures/figure.png"]
    np.testing.assert_array_equal(cv2.readOpticalFlow(str(out / "flow.flo")), dis(*frames))


def read_film(path):
    """Its frames as int arrays (h, w, 3) in RGB, and its rate; it has to be one that browsers play."""
    with av.open(f"file:{path}") as film:
        stream = film.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        return [frame.to_ndarray(format="rgb24").astype(int) for frame in film.decode(stream)], stream.average_rate


@pytest.mark.parametrize("rate, h, w", [("30000/1001", 1, 1), ("1/2", 47, 66), ("240", 30, 5001)])
def test_a_film_has_any_rate_and_any_size_and_its_pictures_in_their_order(tmp_path, rate, h, w):
    with evaluate.writing_film(tmp_path / "f\udcfcr: a.mp4", Fraction(rate)) as write:  # a name in Latin-1
        for grey in (0, 100, 250):
            write(torch.full((3, h, w), grey, dtype=torch.uint8))
    frames, seen = read_film(tmp_path / "f\udcfcr: a.mp4")
    assert seen == Fraction(rate) and len(files_below(tmp_path)) == 1
    assert all(np.abs(frame - grey).max() < 4 for frame, grey in zip(frames, (0, 100, 250), strict=True))
    for side, wanted in zip(frames[0].shape[:2], (h * min(1, 3840 / w), min(w, 3840)), strict=True):
        assert side % 2 == 0 and -0.5 <= side - wanted < 2


def test_a_full_disk_is_an_error_of_the_film_too(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "replacing", lambda path: nullcontext("/dev/full"))
    film = evaluate.writing_film(tmp_path / "film.mp4", Fraction(25))
    with pytest.raises(OSError, match="No space left"), film as write:
        write(torch.zeros(3, 64, 64, dtype=torch.uint8))


@pytest.fixture
def clip(tmp_path):
    """A video file of 6 frames of 64x46 px, whose texture moves by (-2, -1) px, and these frames."""
    canvas = cv2.GaussianBlur(helpers.textured_clip(0, helpers.bands([(0, 0)], 100, 120))[0], (9, 9), 0)
    frames = [canvas[t : t + 46, 2 * t : 2 * t + 64] for t in range(6)]
    return helpers.write_video(tmp_path / "clip.avi", frames), frames


def test_a_film_shows_frame_flow_dis_and_key_and_every_flow_is_exported(tmp_path, typed, clip, constant_flow):
    path, frames = clip
    options = ("--max-frames", 5, "--pictures", 2, "--export", tmp_path / "flo")
    assert_done(typed("flow", "--model", "a.pt", "--video", path, *options, "--output-dir", tmp_path / "out"))
    pictures = [f"pictures/clip_flow_a.pt_{index:05d}.png" for index in (0, 3)]
    assert files_below(tmp_path / "out") == ["clip_flow_a.pt.json", "clip_flow_a.pt.mp4", *pictures]
    shown, rate = read_film(tmp_path / "out/clip_flow_a.pt.mp4")
    assert rate == 10 and len(shown) == 4
    half = flow_to_image(torch.tensor([[[5.0, 2.5]], [[0.0, 0.0]]]))[:, 0, 1]  # the scale is 5 px
    for frame, original in zip(shown, frames, strict=False):
        first, ours, other, key = (panel(frame.transpose(2, 0, 1), 0, column, 46, 64) for column in range(4))
        assert np.abs(first - original.transpose(2, 0, 1)[::-1]).mean() < 15
        assert np.abs(ours - half.view(3, 1, 1).numpy())[:, 4:-4, 4:-4].max() < 30 < np.abs(ours - other).mean()
        assert np.abs(key - evaluate.colour_wheel(46, 64).numpy()).mean() < 15
    assert files_below(tmp_path / "flo") == [f"{t:05d}.flo" for t in range(4)]
    assert (cv2.readOpticalFlow(str(tmp_path / "flo/00002.flo")) == (2.5, 0.0)).all()


def test_masks_beside_the_exported_flow_are_white_where_the_next_frame_hides_a_pixel(tmp_path, typed, constant_flow):
    frames = [np.full((46, 64, 3), grey, np.uint8) for grey in (50, 120, 190)]
    path, there = helpers.write_video(tmp_path / "clip.avi", frames), constant_flow.estimate_flow
    # And back by as much where the frames are exchanged.
    constant_flow.estimate_flow = lambda first, second: there(first, second) * (second.mean() - first.mean()).sign()
    command = ("flow", "--model", "a.pt", "--video", path, "--output-dir", tmp_path / "out", "--occlusion")
    assert typed(*command)[0] == 1
    assert_done(typed(*command, "--export", tmp_path / "flo"))
    assert files_below(tmp_path / "flo") == [f"0000{t}{end}" for t in range(2) for end in (".flo", "_occlusion.png")]
    mask = cv2.imread(str(tmp_path / "flo/00001_occlusion.png"))
    assert (mask[:, :61] == 0).all() and (mask[:, 61:] == 255).all()  # 2.5 px lead out of the frame


def test_films_of_two_methods_have_two_names_and_a_frame_that_cannot_be_read_is_left_out_with_a_note(tmp_path, typed):
    folder = helpers.write_frames(tmp_path / "clip", 6)
    helpers.cut_short(folder / "002.png")
    write_checkpoint(tmp_path / "model.pt")
    for model in ("zero", "dis", tmp_path / "model.pt"):
        screen = assert_done(typed("flow", "--model", model, "--video", folder, "--output-dir", tmp_path / "out"))
        assert screen.count(f"note: left out: {folder / '002.png'}") == 2  # it is in two pairs
    films = {path.name.removeprefix("clip_flow_") for path in (tmp_path / "out").glob("*.mp4")}
    assert films == {"zero.mp4", "dis.mp4", f"{tmp_path.name}_model.mp4"}
    frames, rate = read_film(tmp_path / "out/clip_flow_zero.mp4")
    assert rate == 25 and len(frames) == 3


def test_a_pair_that_cannot_be_measured_is_a_note_and_the_others_count(tmp_path, typed):
    root, out = tmp_path / "data/training", tmp_path / "out"
    samples = helpers.write_benchmark(tmp_path / "data", "kitti2015")
    for name in ("000007", "000008"):
        helpers.write_clip(root, f"image_2/{name}_{{}}.png", 0, samples[0].truth, first=10)
        known = np.full((60, 80), name == "000008")
        helpers.write_flow_file(root / f"flow_occ/{name}_10.png", samples[0].truth, known)
    helpers.cut_short(root / "image_2/000008_11.png")
    command = ("flow", "--model", "zero", "--data-root", tmp_path / "data", "--output-dir", out)
    screen = assert_done(typed(*command))
    check_flow_report(samples, out, screen, BASELINES)
    for name in ("flow_occ/000007_10.png: no pixel of this flow is known", "image_2/000008_11.png"):
        assert f"note: left out: {root / name}" in screen
    for path in (root / "flow_occ").glob("00000[01]*"):
        path.unlink()
    assert_one_line(typed(*command), "no pixel of this flow is known")  # nothing is left


def test_dis_ends_no_measurement_of_narrow_images():
    for h, w in ((12, 64), (3, 200), (7, 13), (1, 1)):  # OpenCV ends the process at the first, and fails at the others
        flow = evaluate.dis_flow(torch.rand(1, 3, h, w), torch.rand(1, 3, h, w))
        assert flow.shape == (1, 2, h, w) and flow.isfinite().all()


# ------------------------------------------------------------------------------------------------ evaluate segmentation


def test_the_head_is_batch_norm_and_one_convolution_over_the_levels_side_by_side():
    pwc, _ = evaluate.open_model(Config("random", encoder="pwc"))
    segmenter = evaluate.Segmenter(pwc, 7).eval()
    assert torch.equal(segmenter.classifiers[0].weight, evaluate.Segmenter(pwc, 7).classifiers[0].weight)
    for norm in segmenter.norms:  # as after some training
        for values in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    images = torch.rand(2, 3, 120, 185)  # the padding to multiples of 64 is cut off
    levels = zip(pwc.encode(pad_to_multiple(images, 64)), pwc.encoder.strides, strict=True)
    levels = [F.avg_pool2d(x, 2) if s == 2 else F.interpolate(x, (32, 48), mode="bilinear") for x, s in levels]
    mean, variance, weight, bias = (
        torch.cat([getattr(norm, name) for norm in segmenter.norms])[:, None, None]
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    normalised = (torch.cat(levels, dim=1) - mean) / (variance + 1e-5).sqrt() * weight + bias
    matrix = torch.cat([classifier.weight[:, :, 0, 0] for classifier in segmenter.classifiers], dim=1)
    expected = torch.einsum("kc,bchw->bkhw", matrix, normalised) + segmenter.classifiers[0].bias[:, None, None]
    expected = F.interpolate(expected, (128, 192), mode="bilinear")
    torch.testing.assert_close(segmenter(images), expected[..., :120, :185], rtol=1e-4, atol=1e-4)


def test_frozen_features_stay_as_they_are_and_fine_tuned_ones_learn():
    images, labels = torch.rand(4, 3, 64, 64), torch.randint(0, 3, (4, 64, 64))
    for finetune in (False, True):
        model, _ = evaluate.open_model(Config("random", encoder="resnet10"))
        segmenter = evaluate.Segmenter(model, 3, finetune).train()
        before = {name: value.clone() for name, value in segmenter.model.encoder.state_dict().items()}
        optimizer = torch.optim.SGD(segmenter.parameters(), lr=0.1)
        F.cross_entropy(segmenter(images), labels).backward()
        optimizer.step()
        # The statistics of the normalisation layers too.
        same = [torch.equal(value, before[name]) for name, value in segmenter.model.encoder.state_dict().items()]
        assert all(same) != finetune and (not finetune or sum(same) < 10)
        assert all(p.grad is not None for p in segmenter.classifiers.parameters())


def test_sliding_windows_give_the_mean_of_the_windows_that_see_a_pixel_and_a_small_image_is_taken_whole():
    image, total, times = torch.rand(1, 3, 41, 67), torch.zeros(1, 3, 41, 67), torch.zeros(41, 67)
    rows = torch.arange(20.0)[:, None]  # the scores depend on the place in the window
    for top, left in product((0, 13, 21), (0, 13, 26, 39, 47)):
        here = (..., slice(top, top + 20), slice(left, left + 20))
        total[here] += image[here] * rows
        times[here] += 1
    torch.testing.assert_close(evaluate.sliding_scores(lambda part: part * rows, image, 20, 13), total / times)
    torch.testing.assert_close(evaluate.sliding_scores(lambda part: part, image, 70, 40), image)


CAMVID = evaluate.Recipe(6, 2, 2, 48, 48, 1e-2, 2e-4)


@pytest.fixture
def camvid(tmp_path, few_shapes, monkeypatch):
    """A configuration for a CamVid of red, green and blue stripes whose class is their colour; some pixels are void, of
    random colours."""
    monkeypatch.setitem(evaluate.RECIPES, "camvid", CAMVID)
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
    rng, root = np.random.default_rng(0), tmp_path / "CamVid"
    for split, number in product(("train", "val"), range(6)):
        labels = np.repeat(np.repeat(rng.integers(0, 3, (4, 5)), 16, axis=0), 16, axis=1).astype(np.uint8)
        image = colours[labels] + rng.integers(0, 20, (64, 80, 3)).astype(np.uint8)
        labels[:16, :16], image[:16, :16] = 11, rng.integers(0, 255, (16, 16, 3))
        helpers.write_picture(root / split / f"{number}.png", image[..., ::-1])
        helpers.write_picture(root / f"{split}annot" / f"{number}.png", labels)
    return SegmentationConfig("random", tmp_path / "run", "pwc", data_root=root, pictures=1)


def trained(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_linear_head_learns_classes_that_are_colours_and_the_numbers_are_those_of_its_predictions(
    camvid, monkeypatch, capsys
):
    monkeypatch.setitem(evaluate.RECIPES, "camvid", evaluate.Recipe(60, 6, 4, 48, 64, 2e-2, 2e-4))
    report = run_segmentation(camvid)
    assert report["settings"]["training_images"] == 6
    assert report["miou"] > 0.6 and report["pixel_accuracy"] > 0.75
    confusion = np.array(report["confusion"])
    assert confusion.sum() == 6 * (64 * 80 - 256)  # void does not count
    hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    expected = [hit / total if total else None for hit, total in zip(hits, union, strict=True)]
    assert list(report["iou"].values()) == pytest.approx(expected)
    assert report["miou"] == pytest.approx(np.mean((hits / np.maximum(union, 1))[union > 0]))
    assert report == json.loads((camvid.output_dir / "segmentation.json").read_text())
    screen = capsys.readouterr().out
    (table,) = table_rows(screen, "camvid, frozen features")
    assert table["sky"]["IoU [%]"] == pytest.approx(100 * report["iou"]["sky"], abs=0.0051)
    share = confusion.sum(1).max() / confusion.sum()  # of the class that is everywhere in the baseline
    expected = {"miou": share / (confusion.sum(1) > 0).sum(), "pixel_accuracy": share}
    assert report["largest_class"] == pytest.approx(expected)
    for each in (report, expected):
        assert f"mIoU {100 * each['miou']:.2f}%, pixel accuracy {100 * each['pixel_accuracy']:.2f}%" in screen
    # The truth lies half transparent over the image, and void is not painted.
    figure = np.array(Image.open(camvid.output_dir / "pictures" / "image_0000.png")).transpose(2, 0, 1).astype(int)
    image, truth = panel(figure, 0, 0, 64, 80), panel(figure, 0, 1, 64, 80)
    labels = np.array(Image.open(camvid.data_root / "valannot" / "0.png"))
    own = np.array([[128, 128, 128], [128, 0, 0], [192, 192, 128]])[labels.clip(max=2)].transpose(2, 0, 1)
    assert np.abs(truth - np.where(labels == 11, image, (image + own) / 2)).max() <= 1


def test_the_same_command_continues_and_gives_the_same_weights_bit_for_bit(camvid, monkeypatch):
    monkeypatch.setitem(evaluate.RECIPES, "camvid", CAMVID._replace(steps=102, crop=16, size=16))
    monkeypatch.setattr(evaluate, "predict_labels", lambda _, image, recipe: torch.zeros(image.shape[1:]).long())
    whole = replace(camvid, encoder="resnet10_half", finetune=True)
    run_segmentation(whole)
    parts = replace(whole, output_dir=camvid.output_dir / "parts")
    parts.output_dir.mkdir()
    for name, kept in (("checkpoint.pt", "checkpoint.1.pt"), ("metrics.jsonl", "metrics.jsonl")):  # as it stops
        (parts.output_dir / name).write_bytes((whole.output_dir / kept).read_bytes())
    assert trained(parts.output_dir)["step"] == 100
    run_segmentation(replace(parts, workers=1))
    one, other = (trained(config.output_dir)["model"] for config in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert one["norms.0.num_batches_tracked"] == 102  # in train mode
    assert {name.split(".")[0] for name in one} == {"norms", "classifiers", "encoder"}
    steps = [json.loads(line)["step"] for line in (parts.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 102


def test_a_finished_run_is_only_measured_again_and_a_damaged_checkpoint_falls_back_to_the_one_before(camvid, capsys):
    first = run_segmentation(camvid)
    stored = {name.split(".")[0] for name in trained(camvid.output_dir)["model"]}
    assert stored == {"norms", "classifiers"}  # not the encoder, which does not learn
    before = (camvid.output_dir / "checkpoint.pt").read_bytes()
    (camvid.data_root.parent / "elsewhere").mkdir()
    moved = camvid.data_root.rename(camvid.data_root.parent / "elsewhere" / "CamVid")
    again = run_segmentation(replace(camvid, data_root=moved, benchmark="camvid", pictures=0))
    assert again["confusion"] == first["confusion"]
    assert (camvid.output_dir / "checkpoint.pt").read_bytes() == before
    (camvid.output_dir / "checkpoint.1.pt").write_bytes(before)
    helpers.cut_short(camvid.output_dir / "checkpoint.pt")
    assert run_segmentation(replace(camvid, data_root=moved))["confusion"] == first["confusion"]
    assert "checkpoint.pt" in capsys.readouterr().out


def test_another_run_in_the_folder_is_refused_by_the_name_of_what_differs(camvid):
    config = replace(camvid, steps=2)
    run_segmentation(config)
    changes = {"seed": 1, "steps": 3, "finetune": True, "encoder": "resnet50", "data_root": None}
    for field, value in changes.items():
        name = "benchmark" if field == "data_root" else field
        with helpers.raises_one_line(ValueError, f"{name}: ", "give another --output-dir"):
            run_segmentation(replace(config, **{field: value}))


def test_the_content_of_a_model_file_counts_and_not_its_name(tmp_path, camvid):
    write_checkpoint(tmp_path / "a.pt")
    config = replace(camvid, model=str(tmp_path / "a.pt"), encoder="convnext_tiny", steps=2)
    first = run_segmentation(config)
    moved = (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    again = run_segmentation(replace(config, model=str(moved), encoder="pwc"))  # the file says which encoder
    assert again["confusion"] == first["confusion"]
    write_checkpoint(tmp_path / "a.pt", "mcjepa")
    with helpers.raises_one_line(ValueError, "weights: "):
        run_segmentation(config)
    with helpers.raises_one_line(ValueError, "encoder: ", "weights: "):  # weights that come with the code have content
        run_segmentation(replace(config, model="small"))


def test_rates_and_weight_decay_are_those_of_the_recipe_at_every_step(camvid, monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def record(optimizer):
        seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    run_segmentation(replace(camvid, finetune=True))
    factors = np.array([1 / 2, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])  # 6 steps, 2 of them warm-up
    expected = np.stack([factors[:, None] * [1e-2, 2e-4], np.full((6, 2), 0.05)], axis=-1)
    np.testing.assert_allclose(seen, expected)


def test_the_recipes_are_those_of_the_protocols_and_a_quick_look_has_a_shorter_warm_up(camvid, monkeypatch):
    for name, steps, size in (("voc", 40_000, 512), ("cityscapes", 40_000, 1024), ("ade20k", 160_000, 512)):
        assert evaluate.RECIPES[name] == (steps, 1_500, 16, 512, size, 1e-4, 1e-4)
    monkeypatch.setitem(evaluate.RECIPES, "camvid", evaluate.RECIPES["voc"])
    monkeypatch.setattr(evaluate, "predict_labels", lambda _, image, recipe: torch.zeros(image.shape[1:]).long())
    seen = []
    monkeypatch.setattr(evaluate, "train_segmenter", lambda *args: (seen.append(args[2][:2]) or {}, []))
    for steps in (30, 20_000):
        run_segmentation(replace(camvid, steps=steps))
    assert seen == [(30, 3), (20_000, 1_500)]


def test_the_loss_is_the_mean_over_the_pixels_that_count_and_none_may_count(camvid):
    for void, expected in (("most", math.log(11)), ("all", 0.0)):
        for path in (camvid.data_root / "trainannot").iterdir():
            labels = np.array(Image.open(path))
            labels[:, ::2] = labels[::2] = 11
            Image.fromarray(labels if void == "most" else np.full_like(labels, 11)).save(path)
        config = replace(camvid, steps=1, output_dir=camvid.output_dir / void)
        run_segmentation(config)
        loss = json.loads((config.output_dir / "metrics.jsonl").read_text())["loss"]
        assert loss == pytest.approx(expected, abs=0.15)  # a head that knows nothing yet, of 11 classes
        assert all(value.isfinite().all() for value in trained(config.output_dir)["model"].values())


def test_images_are_measured_with_the_recipes_shorter_side_and_windows(camvid, monkeypatch):
    seen, slide = [], evaluate.sliding_scores
    monkeypatch.setitem(evaluate.RECIPES, "camvid", CAMVID._replace(size=32))

    def record(segmenter, x, *sizes):
        seen.append((*x.shape[2:], *sizes, segmenter.training))
        return slide(segmenter, x, *sizes)

    monkeypatch.setattr(evaluate, "sliding_scores", record)
    run_segmentation(replace(camvid, steps=1))
    assert seen == 6 * [(32, 40, 48, 32, False)]  # of images of 64x80


@pytest.mark.parametrize("rate, words", [(math.inf, "the scores are not finite"), (math.nan, "step")])
def test_numbers_that_are_not_finite_are_reported_and_never_measured(camvid, monkeypatch, rate, words):
    recipe = CAMVID._replace(steps=1 if rate == math.inf else 3, learning_rate=rate)
    monkeypatch.setitem(evaluate.RECIPES, "camvid", recipe)
    with helpers.raises_one_line(ValueError, words, "not finite"):
        run_segmentation(camvid)
    assert not (camvid.output_dir / "segmentation.json").exists()


def test_an_image_or_labels_that_cannot_be_read_are_a_note_and_the_others_count(camvid):
    whole = run_segmentation(replace(camvid, steps=1))
    names = ("train/2.png", "val/1.png", "valannot/4.png")
    trained, image, labels = (camvid.data_root / name for name in names)
    helpers.cut_short(trained)
    helpers.cut_short(image)
    helpers.write_ids(labels, np.full((64, 80), 77), "L")
    report = run_segmentation(replace(camvid, steps=6, output_dir=camvid.output_dir / "again"))
    for path, note in zip((trained, image, labels), report["notes"], strict=True):
        assert note.startswith(f"{'not trained on' if path == trained else 'left out'}: {path}")
    assert np.sum(report["confusion"]) == np.sum(whole["confusion"]) * 4 // 6
    assert (whole["images"], report["images"]) == (6, 4)


# ------------------------------------------------------------------------------------------------------- evaluate video


@pytest.fixture
def propagated(monkeypatch):
    """Records what `evaluate.propagate_labels` is called with, and gives back the labels of the first frame."""
    calls = []
    monkeypatch.setattr(evaluate, "propagate_labels", lambda *arguments: calls.append(arguments) or arguments[2][0])
    return calls


@pytest.mark.parametrize("context", [0, 7])
def test_masks_follow_a_texture_that_moves_by_whole_cells_and_keep_their_numbers(context):
    video = helpers.moving_video([8, 0, -8, 16], objects=7)
    config = VideoConfig("colour", propagation=(context, 12, 1, 0.1))
    for index, mask in enumerate(follow_objects(video, COLOUR, config)):
        # Labels are those of cells, enlarged bilinearly: they differ at the rims only.
        assert (mask == video.masks(index)).float().mean() > 0.95
        inner = F.max_pool2d((video.masks(index) == 0).float()[None, None], 9, 1, 4)[0, 0] == 0
        assert torch.equal(mask[inner], video.masks(index)[inner])
        assert mask.dtype == torch.uint8 and set(mask.unique().tolist()) == {0, 1, 7}


def test_the_first_frame_and_the_last_ones_give_the_labels_and_no_others(propagated):
    video = helpers.moving_video([0] * 6)._replace(frames=lambda t: torch.full((3, 64, 96), t, dtype=torch.uint8))
    config = VideoConfig("colour", propagation=(3, 12, 5, 0.1))
    list(follow_objects(video, lambda image: [image[0, :, ::8, ::8] * 255], config))
    frames = [[round(x) for x in context[:, 0, 0, 0].tolist()] for _, context, *_ in propagated]
    assert frames == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5]]


def test_soft_labels_are_carried_on_and_the_options_of_propagation_arrive(monkeypatch):
    seen, soft = [], torch.rand(3, 8, 12).softmax(dim=0)
    monkeypatch.setattr(evaluate, "propagate_labels", lambda now, known, *others: seen.append(others) or soft)
    config = VideoConfig("colour", propagation=(7, 3, 2, 0.5))
    list(follow_objects(helpers.moving_video([0, 0]), COLOUR, config))
    assert [options for _, *options in seen] == [[3, 2, 0.5]] * 2
    torch.testing.assert_close(seen[1][0][1], soft)


@pytest.mark.parametrize("centre", ["none", "mean"])
def test_all_frames_are_centred_by_the_numbers_of_the_first(propagated, centre):
    video = helpers.moving_video([0])._replace(frames=lambda t: helpers.texture(64, 96, seed=t) // (1 + t))
    list(follow_objects(video, COLOUR, VideoConfig("colour", centre=centre)))
    ((now, context, *_),) = propagated
    first, later = (COLOUR(video.frames(t)[None].float() / 255)[0] for t in (0, 1))
    mean = first.mean(dim=(1, 2), keepdim=True) if centre != "none" else 0
    torch.testing.assert_close(context[0], first - mean)
    torch.testing.assert_close(now, later - mean)


def test_levels_side_by_side_weigh_alike_at_the_size_of_the_finest(propagated):
    features, _, _ = evaluate.feature_method(Config("colour"), (8, 16))
    list(follow_objects(helpers.moving_video([8]), features, VideoConfig("colour", stride=(16, 8), centre="mean")))
    fine, coarse = features(helpers.texture(64, 96)[None].float() / 255)
    fine, coarse = (F.normalize(x - x.mean(dim=(1, 2), keepdim=True), dim=0) for x in (fine, coarse))
    coarse = F.interpolate(coarse[None], (8, 12), mode="bilinear")[0]
    torch.testing.assert_close(propagated[0][1][0], torch.cat((fine, coarse)), atol=1e-5, rtol=1e-5)


def test_features_see_smoothed_frames_of_whole_cells_and_a_cell_has_the_label_of_its_middle(propagated):
    frame, seen = torch.randint(0, 256, (3, 60, 107), dtype=torch.uint8), []
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[18:38, 19:44] = 1
    video = helpers.moving_video([0])._replace(objects=[1], masks=lambda t: mask)
    list(follow_objects(video, COLOUR, VideoConfig("colour")))
    assert torch.equal(propagated[0][2][0, 1], mask[4::8, 4::8].float())
    mask = (torch.arange(60 * 107).view(60, 107) > 3000).to(torch.uint8)
    video = video._replace(frames=lambda t: frame, masks=lambda t: mask)
    features = lambda image: seen.append(image) or [image[0, :, ::8, ::8]]  # noqa: E731
    list(follow_objects(video, features, VideoConfig("colour", size=30)))
    expected = F.interpolate(frame[None].float() / 255, (32, 56), mode="bilinear", antialias=True)
    for image in seen:  # 30 x 53.5 px are 3.75 x 6.7 cells
        torch.testing.assert_close(image, expected)


def test_features_that_are_not_finite_are_reported_and_never_measured():
    features = lambda image: [F.avg_pool2d(image, 8)[0] * math.inf]  # noqa: E731
    with helpers.raises_one_line(ValueError, "moving: the features are not finite"):
        list(follow_objects(helpers.moving_video([8]), features, VideoConfig("colour")))


OBJECT_COLOURS = {1: (200, 60, 60), 2: (60, 180, 70), 3: (70, 80, 210), 7: (220, 210, 60)}


def boxes(places):
    """A mask with a box (top, left, height, width) for each number."""
    mask = np.zeros((48, 64), np.uint8)
    for number, (top, left, height, width) in places.items():
        mask[top : top + height, left : left + width] = number
    return mask


def write_painted(home, name, masks, stored=None, noise=30.0):
    """A sequence of frames that show `masks` (a colour for each number, on grey), of which `stored` lie there."""
    frames = []
    for index, mask in enumerate(masks):
        frame = np.full((*mask.shape, 3), 120.0)
        for number, colour in OBJECT_COLOURS.items():
            frame[mask == number] = colour
        frame += noise * np.random.default_rng(index).standard_normal(frame.shape)
        frames.append(frame.clip(0, 255).astype(np.uint8))
    helpers.write_sequence(home, name, masks if stored is None else stored, frames)


def measured_by_hand(home, export, name):
    """J and F of each object in each frame but the first and the last, where the truth is not void, from the files
    alone; without exported masks, of a copy of the first mask."""
    count = len(list((home / f"JPEGImages/480p/{name}").iterdir()))
    first = np.array(Image.open(home / f"Annotations/480p/{name}/00000.png"))
    numbers = {n: {"J": [], "F": []} for n in np.unique(first).tolist() if n not in (0, 255)}
    paths = sorted((home / f"Annotations/480p/{name}").iterdir())
    for path in (path for path in paths if 0 < int(path.stem) < count - 1):
        truth = np.array(Image.open(path))
        guess = np.array(Image.open(export / name / path.name)) if export else first
        for number, values in numbers.items():
            a, b = truth == number, (guess == number) & (truth != 255)
            values["J"].append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
            values["F"].append(evaluate.contour_accuracy(torch.from_numpy(a), torch.from_numpy(b)))
    return numbers


SMALL = {"stride": (4,), "size": 48, "propagation": (7, 4, 5, 0.1)}


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    """Four sequences, measured by colour: their folder, the exported masks, video.json, and the screen.

    Two objects; numbers 1 and 3, a stranger and a missing mask; one object and void pixels; one that is damaged. The
    ends mislead.
    """
    root = tmp_path_factory.mktemp("video")
    home = root / "data" / "DAVIS"
    runs = [boxes({1: (5 + t, 6 + 3 * t, 14, 13), 2: (23, 41 - 2 * t, 17, 15)}) for t in range(6)]
    wrong_end = boxes({1: (0, 0, 48, 32), 2: (0, 32, 48, 32)})
    write_painted(home, "apples", runs, [*runs[:5], wrong_end])
    strangers = [{}, {}, {}, {7: (2, 45, 9, 9)}, {7: (2, 45, 9, 9)}]
    runs = [boxes({3: (9, 8 + 2 * t, 18, 12), 1: (30 - t, 37, 11, 19)} | strangers[t]) for t in range(5)]
    write_painted(home, "bikes", runs, [*runs[:2], None, *runs[3:]])
    runs = [boxes({1: (12, 5 + 4 * t, 20, 17)}) for t in range(6)]
    stored = [mask.copy() for mask in runs]
    for t, mask in enumerate(stored):
        mask[14:22, 10 + 4 * t : 30 + 4 * t] = 255
        mask[40:, :20] = 255
    write_painted(home, "cars", runs, stored)
    write_painted(home, "dogs", runs)
    helpers.cut_short(home / "Annotations/480p/dogs/00003.png")
    helpers.write_davis_lists(home, "2017", False, val=["cars", "dogs", "apples", "bikes"])
    options = ("--stride", 4, "--size", 48, "--propagation", 7, 4, 5, 0.1)
    options += ("--data-root", root / "data", "--export", root / "masks", "--output-dir", root / "out")
    command = [sys.executable, evaluate.__file__, "video", "--model", "colour", *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    return home, root / "masks", json.loads((root / "out/video.json").read_text()), done.stdout


def test_every_frame_gets_a_palette_png_in_daviss_colours_with_the_numbers_of_the_first_mask(davis):
    home, export, _, _ = davis
    assert {path.name for path in export.iterdir()} == {"apples", "bikes", "cars"}
    for folder in export.iterdir():
        frames, masks = (sorted(f.iterdir()) for f in (home / "JPEGImages/480p" / folder.name, folder))
        assert [mask.name for mask in masks] == [f"{frame.stem}.png" for frame in frames]
        first = np.array(Image.open(home / f"Annotations/480p/{folder.name}/00000.png")) % 255  # void is no object
        np.testing.assert_array_equal(np.array(Image.open(masks[0])), first)
        for image in map(Image.open, masks):
            assert image.mode == "P" and image.size == (64, 48)
            np.testing.assert_array_equal(np.resize(image.getpalette(), (256, 3)), helpers.voc_palette())
            assert set(np.unique(image)) == set(np.unique(first))  # no object is lost here
    pictures = [f"pictures/{name}.png" for name in ("apples", "bikes", "cars")]
    assert files_below(export.parent / "out") == [*pictures, "video.json"]


def test_j_and_f_are_those_of_the_exported_masks_and_of_copies_of_the_first_without_void_and_both_end_frames(davis):
    home, export, report, screen = davis
    assert list(report["sequences"]) == ["cars", "apples", "bikes"]  # as the list has them
    values = []
    for name, sequence in report["sequences"].items():
        expected = measured_by_hand(home, export, name)
        assert sequence["objects"].keys() == {str(number) for number in expected}  # 255 is no object
        for number, metric in product(expected, "JF"):
            frames, ours = expected[number][metric], dict(sequence["objects"][str(number)][metric])
            assert ours.pop("frames") == pytest.approx(frames)
            assert ours == pytest.approx(evaluate.davis_statistics(frames))
            values.append(ours)
    assert len(values) == 10 and all(0.3 < ours["mean"] < 0.999 for ours in values[::2])  # neither lost nor perfect
    for (which, metric), kind in product(enumerate("JF"), ("mean", "recall", "decay")):  # each object counts alike
        assert report["mean"][f"{metric}_{kind}"] == pytest.approx(np.mean([ours[kind] for ours in values[which::2]]))
    j, f = report["mean"]["J_mean"], report["mean"]["F_mean"]
    assert report["mean"]["J&F"] == pytest.approx((j + f) / 2)
    (table,) = table_rows(screen, "[%]")
    assert table["mean over objects"]["J&F"] == pytest.approx(50 * (j + f), abs=0.0051)
    assert table["cars"]["J_mean"] == pytest.approx(100 * values[0]["mean"], abs=0.0051)
    copies = [each["J"] for name in report["sequences"] for each in measured_by_hand(home, None, name).values()]
    copied = np.mean([np.mean(each) for each in copies])
    assert report["baselines"]["first mask copied"]["J_mean"] == pytest.approx(copied)
    assert table["first mask copied"]["J_mean"] == pytest.approx(100 * copied, abs=0.0051)


def test_a_damaged_first_frame_leaves_its_sequence_out_also_where_batch_norm_looks_at_it_first(davis, tmp_path):
    shutil.copytree(davis[0], tmp_path / "DAVIS")
    (tmp_path / "DAVIS/JPEGImages/480p/cars/00000.jpg").write_bytes(b"damaged")
    options = {"model": "random", "encoder": "resnet10_half", "size": 48, "pictures": 0}
    report = evaluate.run_video(evaluate.VideoConfig(**options, data_root=tmp_path, output_dir=tmp_path / "out"))
    assert list(report["sequences"]) == ["apples", "bikes"] and "cars/00000.jpg" in "".join(report["notes"])


def test_an_absent_object_counts_1_where_it_is_not_predicted_and_0_where_it_is(tmp_path):
    stays, guest = {1: (8, 8, 16, 16)}, {2: (24, 40, 16, 16)}
    runs = [boxes(stays | (guest if there else {})) for there in (1, 1, 0, 0, 1, 1)]
    write_painted(tmp_path, "guest", runs, noise=0)
    shown = 5 * [boxes(stays | guest)]
    write_painted(tmp_path, "phantom", shown, [shown[0], *4 * [boxes(stays)]], noise=0)
    report = run_video(VideoConfig("colour", tmp_path / "out", data_root=tmp_path, stride=(4,), size=48))
    guest, phantom = (report["sequences"][name]["objects"][2] for name in ("guest", "phantom"))
    assert guest["J"]["frames"][1:3] == guest["F"]["frames"][1:3] == [1.0, 1.0]
    assert min(guest["J"]["frames"]) > 0.9  # found when it returns
    assert phantom["J"]["frames"] == phantom["F"]["frames"] == [0.0, 0.0, 0.0]


def test_davis_2016_takes_all_objects_as_one_and_the_sequences_of_its_list(tmp_path):
    runs = [boxes({1: (8, 8 + t, 16, 16), 2: (24, 40, 16, 16)}) for t in range(4)]
    for name in ("bear", "camel"):
        write_painted(tmp_path, name, runs, noise=20)
    helpers.write_davis_lists(tmp_path, "2016", False, val=["camel"])
    helpers.write_davis_lists(tmp_path, "2017", False, train=["camel"])
    config = VideoConfig("colour", tmp_path / "out", data_root=tmp_path, benchmark="davis2017", **SMALL)
    merged = run_video(replace(config, benchmark="davis2016", export=tmp_path / "masks"))
    assert list(merged["sequences"]) == ["camel"] and list(merged["sequences"]["camel"]["objects"]) == [1]
    np.testing.assert_array_equal(Image.open(tmp_path / "masks/camel/00000.png"), runs[0] > 0)
    apart = run_video(replace(config, split="train", stride=(16,), size=None))
    assert apart["settings"]["size"] == 480  # unless it is given
    assert list(apart["sequences"]) == ["camel"] and list(apart["sequences"]["camel"]["objects"]) == [1, 2]


def test_a_sequence_with_its_first_mask_alone_is_exported_and_not_measured_and_a_void_frame_does_not_count(tmp_path):
    runs = 4 * [boxes({2: (8, 8, 16, 16)})]
    write_painted(tmp_path, "held-out", runs, [runs[0], None, None, None], noise=5)
    config = VideoConfig("colour", tmp_path / "out", data_root=tmp_path, export=tmp_path / "masks", **SMALL)
    report = run_video(config)
    assert report["mean"] == {} and report["sequences"]["held-out"]["objects"] == {}
    assert "held-out: frames without a mask: 2" in report["notes"]
    assert len(list((tmp_path / "masks/held-out").iterdir())) == 4
    video = helpers.moving_video([0] * 4)
    void = video._replace(masks=lambda t: torch.full((64, 96), VOID, dtype=torch.uint8) if t == 2 else video.masks(t))
    _, entry = evaluate.measure_video(void, COLOUR, None, VideoConfig("colour"))
    assert len(entry["objects"][1]["J"]["frames"]) == 2 and entry["note"] == "frames without a mask: 1"


def test_features_have_statistics_of_the_frames_and_the_flow_those_of_training(few_shapes, monkeypatch, tmp_path):
    measured, estimated, estimate = [], [], evaluate.estimate_batch_norms
    means = lambda model: model.encoder.stem[1].running_mean.clone()  # noqa: E731
    monkeypatch.setattr(evaluate, "estimate_batch_norms", lambda *x: estimated.append(x[0]) or estimate(*x))
    monkeypatch.setattr(evaluate, "trivial_masks", lambda _, model: measured.append(means(model)) or {})
    run_video(VideoConfig("random", tmp_path, "resnet10", pictures=0))
    assert means(estimated[0]).abs().min() > 0 and len(measured) == 3 and not torch.stack(measured).any()


def test_the_masks_are_warped_by_each_flow_from_a_frame_to_the_one_before(monkeypatch):
    video = helpers.moving_video([3, 5])
    monkeypatch.setattr(evaluate, "dis_flow", lambda *frames: torch.zeros(1, 2, 64, 96))
    true = lambda t: torch.tensor([-3.0 if t == 1 else -5.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 64, 96)  # noqa: E731
    model = ConstantFlow(-4.0, 0.0)
    model.estimator = nn.Identity()
    masks = evaluate.trivial_masks(video._replace(flow=true), model)
    for t in range(3):
        for name in ("first mask copied", "warp by dis"):
            assert torch.equal(masks[name][t], video.masks(0))
        assert torch.equal(masks["warp by the true flow"][t], video.masks(t))
        assert torch.equal(masks["warp by our flow"][t], video.masks(0).roll(4 * t, dims=1))


# --------------------------------------------------------------------------------------------------------- evaluate knn


class Levels(MCJEPA):
    """Stands for an encoder of two levels: batch norm of the mean colour of cells, and the colour itself, doubled."""

    def __init__(self):
        nn.Module.__init__(self)
        self.encoder = nn.BatchNorm2d(3, affine=False)
        self.encoder.strides, self.encoder_is_frozen = (4, 1), False
        self.register_buffer("mean", torch.full((1,), 0.5))
        self.register_buffer("std", torch.full((1,), 2.0))

    def _encode(self, images):
        return [self.encoder(F.avg_pool2d(images, 4)), 2 * images]


def test_batch_norm_takes_the_mean_statistics_of_the_batches_whatever_it_had_before():
    model, batches = Levels().eval(), [torch.rand(2, 3, 8, 12), torch.rand(2, 3, 8, 8)]
    model.encoder.running_mean.fill_(7)
    evaluate.estimate_batch_norms(model, iter(batches))
    moments = [torch.var_mean((batch - 0.5) / 2, dim=(0, 2, 3)) for batch in batches]
    variance, mean = (torch.stack(each).mean(dim=0) for each in zip(*moments, strict=True))
    torch.testing.assert_close(model.encoder.running_mean, mean)
    torch.testing.assert_close(model.encoder.running_var, variance)
    assert not model.encoder.training
    evaluate.estimate_batch_norms(MCJEPA(ModelConfig(encoder="pwc")), map(None, [0]))  # no batch norm: nothing is read


def test_levels_are_averaged_over_masks_and_standardised_by_the_known_images():
    images = torch.randint(0, 256, (2, 70, 3, 8, 8), dtype=torch.uint8)  # more than one batch
    masks = torch.rand(2, 70, 8, 8) < 0.5
    model = Levels().train()
    levels = evaluate.compared_levels(model, [*images], [*masks])
    values = images.double().numpy() / 255
    for name, size in (("stride 4", 4), ("stride 1", 1)):  # batch norm scales channels, which standardising undoes
        cells = values.reshape(2, 70, 3, 8 // size, size, 8 // size, size).mean(axis=(4, 6))
        weights = masks.double().numpy().reshape(2, 70, 1, 8 // size, size, 8 // size, size).mean(axis=(4, 6))
        pooled = (cells * weights).sum(axis=(3, 4)) / weights.sum(axis=(3, 4))
        expected = (pooled - pooled[0].mean(axis=0)) / pooled[0].std(axis=0, ddof=1)
        torch.testing.assert_close(torch.stack(levels[name]).double(), torch.from_numpy(expected), atol=1e-3, rtol=1e-3)
    assert model.training and model.encoder.num_batches_tracked == 0  # a copy was measured
    known, _ = evaluate.compared_levels(None, [*images], [*masks])["colour"]
    shown = [image[:, mask] for image, mask in zip(values[0], masks[0].numpy(), strict=True)]
    colour = np.array([[f(pixels, axis=1) for f in (np.mean, np.std)] for pixels in shown]).reshape(70, 6)
    colour = (colour - colour.mean(axis=0)) / colour.std(axis=0, ddof=1)
    torch.testing.assert_close(known.double(), torch.from_numpy(colour), atol=1e-3, rtol=1e-3)


@given(seed=st.integers(0, 10_000), n=st.integers(3, 30), k=st.integers(1, 40))
def test_neighbours_and_ridge_are_those_of_plain_loops(seed, n, k):
    generator = torch.Generator().manual_seed(seed)
    known, queries = (torch.randn(m, 4, generator=generator) for m in (n, 5))
    labels = torch.randint(0, 3, (n,), generator=generator)
    a, b = known.double().numpy(), queries.double().numpy()
    one_hot = np.eye(int(labels.max()) + 1)[labels.numpy()]
    wanted = np.vstack((one_hot - one_hot.mean(axis=0), np.zeros((4, one_hot.shape[1]))))
    weights, *_ = np.linalg.lstsq(np.vstack((a, 10 * np.eye(4))), wanted, rcond=None)  # a penalty of 100
    scores = b @ weights + one_hot.mean(axis=0)
    ours = evaluate.ridge(known, labels, queries).numpy()
    np.testing.assert_allclose(scores[range(5), ours], scores.max(axis=1), atol=1e-6)
    for query, guess in zip(b, evaluate.nearest_neighbours(known, labels, queries, k).tolist(), strict=True):
        cosines = a @ query / np.linalg.norm(a, axis=1) / np.linalg.norm(query)
        votes = np.zeros(3)
        for cosine, label in sorted(zip(cosines, labels.tolist(), strict=True), reverse=True)[:k]:
            votes[label] += np.exp(cosine / 0.1)
        assert votes[guess] == pytest.approx(votes.max(), rel=1e-4)


def test_images_in_folders_are_classified_and_colour_stands_beside(tmp_path, typed):
    for part, name, index in product(("train", "test"), ("green", "red"), range(10)):
        colour = {"green": (20, 200, 40), "red": (200, 30, 40)}[name]
        picture = np.tile(np.uint8(colour) + np.uint8(index), (12 + index, 16, 1))
        helpers.write_picture(tmp_path / f"data/{part}/{name}/{index}.png", picture[..., ::-1])
    options = ("--data-root", tmp_path / "data", "--output-dir", tmp_path / "out")
    assert_one_line(typed("knn", "--model", "colour", *options), "give all one --size")
    screen = assert_done(typed("knn", "--model", "random", "--encoder", "pwc", *options, "--size", 64, "--images", 15))
    (table,) = table_rows(screen, "data [%]")
    scores = json.loads((tmp_path / "out/knn.json").read_text())["scores"]
    assert list(table) == [*(f"random stride {s}" for s in (64, 32, 16, 8, 4, 2)), "colour", "chance"]
    assert scores["colour"] == {"k-NN": 1.0, "ridge": 1.0} and table["colour"] == {"k-NN": 100, "ridge": 100}
    assert scores["chance"]["ridge"] == pytest.approx((8 * 2 + 7) / 45)  # of 15 images and 15 // 5 queries
    assert_one_line(typed("knn", "--model", "colour", *options, "--size", 0), "--size must be at least 1")
    for part in ("train", "test"):  # of a class with a single image, which is place 8 of 19, and of 21
        helpers.write_picture(tmp_path / f"data/{part}/lime/0.png", picture)
    (tmp_path / "data/train/green/0.png").unlink(), (tmp_path / "data/train/green/1.png").unlink()
    assert typed("knn", "--model", "colour", *options, "--size", 64, "--images", 15)[0] == 0
    (tmp_path / "data/test/red").rename(tmp_path / "data/test/blue")
    assert_one_line(typed("knn", "--model", "colour", *options, "--size", 64), "blue is no class of")
    (tmp_path / "data/train/red/3.png").rename(tmp_path / "data/train/3.png")
    assert_one_line(typed("knn", "--model", "colour", *options), "train/3.png: has no class; expected train/CLASS")


def test_the_search_finds_what_keeps_its_features_and_never_itself_for_texture_and_shape(monkeypatch):
    textures, classes = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 1, 2])
    known = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 1.0]])
    queries = known[[0, 1, 3, 2]]  # the last two take each other's place
    monkeypatch.setattr(evaluate, "compared_levels", lambda model, *_: {type(model).__name__: [known, queries]})
    objects = evaluate.Objects(torch.zeros(2, 4, 3, 8, 8), torch.zeros(2, 4, 8, 8), textures, classes)
    assert evaluate.search_among_shapes(Levels(), objects) == {"Levels": {"object": 0.5, "texture": 1.0, "shape": 0.0}}


def test_trained_weights_find_more_textures_than_random_ones_and_colour_finds_no_recoloured_shape(typed, tmp_path):
    assert_done(typed("knn", "--output-dir", tmp_path))  # by default of "small"
    scores = json.loads((tmp_path / "knn.json").read_text())["scores"]
    names = [[f"{title} stride {s}" for s in (32, 16, 8, 4, 2)] for title in ("ours", "random")]
    assert list(scores) == [*names[0], *names[1], "colour", "chance"]
    ours, random = (max(scores[name]["texture"] for name in each) for each in names)
    assert ours > 2 * random  # 17.0% and 5.0% in assets/README.md
    assert scores["chance"]["object"] == pytest.approx(1 / evaluate.SHAPES_OBJECTS)
    assert scores["colour"]["object"] <= 2 / evaluate.SHAPES_OBJECTS  # the gate is 1.5 times chance
    assert scores["colour"]["texture"] <= 1.5 * scores["chance"]["texture"]


def test_views_find_each_other_by_the_mean_of_the_coarsest_level(monkeypatch):
    # A finer level that finds others.
    monkeypatch.setattr(Levels, "_encode", lambda self, x: [self.encoder(F.avg_pool2d(x, 4)), (40 * x).sin()])
    model, state = Levels().eval(), torch.get_rng_state()
    found = evaluate.find_views(model, 30, 32, 0.3)
    assert torch.equal(torch.get_rng_state(), state)
    images = evaluate.ShapeImages(30, (128, 128), seed=evaluate.UNSEEN_SEED)
    views, _ = next(iter(evaluate.make_loader(images, evaluate.TwoViews(32, 0.3), 30)))
    x, y = (model.encode(view)[0].mean(dim=(2, 3)) for view in views)
    x, y = ((z - x.mean(dim=0)) / x.std(dim=0) for z in (x, y))
    best = [max(range(30), key=lambda j, a=a: F.cosine_similarity(a, x[j], dim=0).item()) for a in y]
    assert 0 < found < 1 and found == pytest.approx(sum(i == j for i, j in enumerate(best)) / 30)
    monkeypatch.setattr(evaluate, "TwoViews", lambda *_: lambda image: (image[:, :32, :32],) * 2)
    assert evaluate.find_views(model, 30, 32, 0.3) == 1


# ------------------------------------------------------------------------------------------------------------- features


def test_features_are_exported_and_painted_by_their_principal_components_over_all_images(tmp_path, typed):
    paths, cells = [tmp_path / name / "a.png" for name in "xyz"], []
    for seed, (path, (h, w)) in enumerate(zip(paths, ((40, 48), (24, 80), (33, 41)), strict=True)):
        image = helpers.texture(48, 80, 1 + seed).permute(1, 2, 0).numpy()[:h, :w]
        cells.append((image[::8, ::8] / 255 - IMAGENET_MEAN) / IMAGENET_STD)
        helpers.write_picture(path, image[..., ::-1])
    bad = helpers.cut_short(helpers.write_image(tmp_path / "bad.png"))
    options = ("--export", tmp_path / "npy", "--output-dir", tmp_path / "out")
    screen = assert_done(typed("features", "--model", "colour", "--images", *paths, bad, *options))
    assert f"note: left out: {bad}" in screen
    assert files_below(tmp_path / "npy") == [f"a_{index:05d}.npy" for index in range(3)]
    values = np.concatenate([each.reshape(-1, 3) for each in cells])
    mean = values.mean(axis=0)
    _, _, basis = np.linalg.svd(values - mean, full_matrices=False)
    basis *= np.sign(basis.sum(axis=1, keepdims=True))
    low, high = np.quantile((values - mean) @ basis.T, (0.01, 0.99), axis=0)
    for index, each in enumerate(cells):
        np.testing.assert_allclose(np.load(tmp_path / f"npy/a_{index:05d}.npy"), each.transpose(2, 0, 1), atol=1e-5)
        painted = (((each - mean) @ basis.T - low) / (high - low)).clip(0, 1) * 255
        picture = cv2.imread(str(tmp_path / f"out/pictures/a_{index:05d}_features_8_colour.png"))[..., ::-1]
        h, w = picture.shape[0] - 18, (picture.shape[1] - 6) // 2
        expected = np.kron(painted, np.ones((8, 8, 1)))[:h, :w].transpose(2, 0, 1)
        assert np.abs(panel(picture.transpose(2, 0, 1), 0, 1, h, w) - expected).max() <= 1


def test_a_video_becomes_a_film_of_all_its_frames_beside_their_features(tmp_path, typed, clip):
    path, frames = clip
    write_checkpoint(tmp_path / "a.pt", "vicreg")
    options = ("--stride", 4, "--output-dir", tmp_path / "out", "--export", tmp_path / "npy")
    assert_done(typed("features", "--model", tmp_path / "a.pt", "--video", path, *options))
    name = f"clip_features_4_{tmp_path.name}_a"
    shown, rate = read_film(tmp_path / f"out/{name}.mp4")
    assert rate == 10 and len(shown) == 6 and files_below(tmp_path / "out") == [f"{name}.json", f"{name}.mp4"]
    first = panel(shown[5].transpose(2, 0, 1), 0, 0, 46, 64)
    assert np.abs(first - frames[5].transpose(2, 0, 1)[::-1]).mean() < 15
    assert np.load(tmp_path / "npy/clip_00005.npy").shape == (32, 12, 16)
    assert json.loads((tmp_path / f"out/{name}.json").read_text())["settings"]["encoder"] == "pwc"


# -------------------------------------------------------------------------------------------------------------- Table 1


@pytest.fixture
def commands(monkeypatch):
    """Replaces the three protocols by functions of their configuration, which give numbers and notes."""

    def replace_commands(**functions):
        calls = []
        for name in ("flow", "segmentation", "video"):

            def run(config, name=name):
                calls.append(config)
                numbers, notes = functions.get(name, lambda config: ({"x": 1.0}, []))(config)
                return {"table1": numbers, "notes": notes}

            monkeypatch.setattr(evaluate, f"run_{name}", run)
        return calls

    return replace_commands


def test_table_1_has_each_number_beside_the_papers_and_notes_what_is_missing(tmp_path, commands, capsys):
    def flow(config):
        if config.benchmark == "kitti2015":
            raise MissingSet("no kitti here")
        return {"clean EPE": 1.5, "final EPE": 2.5}, ["2 of 5 pairs left out"]

    def segmentation(config):
        if config.benchmark == "cityscapes":
            raise MissingSet("no cityscapes here")
        share = {"voc": 25.0, "ade20k": 12.5}[config.benchmark] + 50 * config.finetune
        return {"tuned" if config.finetune else "frozen": share}, ["1464 training images"] * (config.benchmark == "voc")

    calls = commands(flow=flow, segmentation=segmentation, video=lambda config: ({"J&F": 62.5}, ["no list"]))
    config = evaluate.Table1Config("random", tmp_path / "out", "pwc", data_root=tmp_path, steps=20, workers=2)
    evaluate.run_table1(config)
    screen = capsys.readouterr().out
    (table,) = table_rows(screen, "Table 1, px or %")
    ours = {name: row["ours"] for name, row in table.items() if not math.isnan(row["ours"])}
    assert ours == {
        "Sintel clean EPE": 1.5, "Sintel final EPE": 2.5, "VOC frozen": 25.0, "VOC tuned": 75.0,
        "ADE20K frozen": 12.5, "ADE20K tuned": 62.5, "DAVIS 2017 J&F": 62.5,
    }  # fmt: skip
    paper = np.array([[*row.values()][:-1] for row in table.values()])
    assert paper.shape == (13, 13) and table["KITTI 2015 EPE"]["VICReg"] == 13.5
    rows = [41.67, 28.51, 47.54, 34.73, 92.98, 62.14, 452.1, 392.8, 311.5, 385.1, 144.2, 212.7, 434]
    np.testing.assert_allclose(np.nansum(paper, axis=1), rows)  # of the published table
    for note in ("KITTI 2015: no kitti here", "Cityscapes: no cityscapes here", "Sintel: 2 of 5 pairs left out",
                 "VOC: 1464 training images", "DAVIS 2017: no list"):  # fmt: skip
        assert screen.count(f"note: {note}\n") == 1, note
    measured = json.loads((tmp_path / "out" / "table1.json").read_text())["measured"]
    assert measured == ours
    assert all((config.model, config.encoder, config.data_root) == ("random", "pwc", tmp_path) for config in calls)
    trainings = [config for config in calls if isinstance(config, SegmentationConfig)]
    assert all((config.steps, config.workers) == (20, 2) for config in trainings) and len(trainings) == 6
    assert len({config.output_dir for config in calls}) == len(calls) == 9


def test_what_fails_is_reported_at_the_end_of_table_1_and_the_rest_is_measured(tmp_path, commands, typed):
    def video(config):
        raise ValueError("00001.png: broken")

    command = ("table1", "--model", "random", "--encoder", "pwc", "--output-dir", tmp_path / "out", "--data-root")
    code, screen, err = typed(*command, tmp_path)
    assert code == 1 and "holds none of the benchmarks" in err and err.count("ADE20K") == 1
    assert not (tmp_path / "out/table1.json").exists()  # an earlier one would be lost
    commands(video=video, segmentation=lambda config: ({"frozen": 50.0}, []))
    code, screen, err = typed(*command, tmp_path)
    assert code == 1 and err == "error: DAVIS 2017, video: 00001.png: broken\n"
    (table,) = table_rows(screen, "Table 1, px or %")
    assert [table[name]["ours"] for name in ("VOC frozen", "ADE20K frozen")] == [50, 50]


def test_a_backbone_without_an_estimator_has_no_flow_in_table_1(tmp_path, commands, capsys):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    calls = commands()
    evaluate.run_table1(evaluate.Table1Config(str(tmp_path / "resnet50.pth"), output_dir=tmp_path / "out"))
    assert [type(config) for config in calls] == [SegmentationConfig, SegmentationConfig, VideoConfig]
    assert "note: no flow: this model has no estimator" in capsys.readouterr().out


def test_table_1_of_moving_shapes_as_a_user_types_it_continues_where_it_was_stopped(tmp_path, typed, few_shapes):
    command = ("table1", "--model", "random", "--encoder", "pwc", "--steps", 2, "--output-dir", tmp_path)
    results = []
    for _ in range(2):
        code, screen, err = typed(*command)
        assert code == 0, err
        results.append(json.loads((tmp_path / "table1.json").read_text())["measured"])
    assert results[0] == results[1]
    (table,) = table_rows(screen, "Table 1, px or %")
    ours = {f"MovingShapes {name}": table[f"MovingShapes {name}"]["ours"] for name in ("EPE", "frozen", "tuned", "J&F")}
    assert results[0] == pytest.approx(ours, abs=0.0051)
    parts = (("flow", "flow"), ("frozen", "segmentation"), ("tuned", "segmentation"), ("video", "video"))
    flow, *heads, video = (json.loads((tmp_path / f"{p}_shapes/{name}.json").read_text()) for p, name in parts)
    epe = flow["groups"]["all"]["random"]["per_image"]["epe"]["all"]
    expected = [epe, *(100 * head["miou"] for head in heads), 100 * video["mean"]["J&F"]]
    assert [*results[0].values()] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "flow --model {root}/no.pt": "no.pt: no such checkpoint",
    "flow --model {root}/vicreg.pt": "vicreg",
    "flow --model {root}/head.pt": "not a model of this version of train.py, or a head of evaluate.py segmentation",
    "flow --benchmark sintel": "--benchmark needs --data-root",
    "segmentation --benchmark voc": "--benchmark needs --data-root",
    "flow --split testing --data-root {root}/pairs": "--split testing, whose truth is secret",
    "flow --data-root {root}/pairs --video a.mp4": "exclude each other",
    "flow --video {root}/one.avi": "one.avi: a clip of 1 frame",
    "flow --output-dir {root}/text.png": "text.png",
    "segmentation --data-root {root}": "choose one with --benchmark",
    "segmentation --model {root}/other.pt": "other.pt: neither a checkpoint of train.py nor torchvision's weights",
    "video --propagation 7 12 0 0.1": "--propagation",
    "video --stride 5": "--stride 5: the features have strides 64, 32, 16, 8, 4, 2",
    "knn --data-root {root}": "no train in it; expected train/CLASS/a.jpg",
    "features": "give either --images or --video",
    "features --video {root}/pairs": "holds 2 clips; name one of them",
    "table1 --data-root {root}/nowhere": "nowhere: no such folder",
}
"""What a user may type, and what the one line has to say."""


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_reported_in_one_line_and_leaves_no_file(tmp_path, typed, few_shapes, command):
    root = tmp_path / "data"
    helpers.write_benchmark(root / "pairs", "middlebury")
    helpers.write_label_set(root / "voc", "voc")
    helpers.write_label_set(root / "camvid", "camvid")
    write_checkpoint(root / "vicreg.pt", "vicreg")
    helpers.write_image(root / "a.png", (30, 30))
    helpers.write_video(root / "one.avi", [np.zeros((40, 40, 3), np.uint8)])
    (root / "text.png").write_text("hello")
    torch.save({"a": torch.zeros(1)}, root / "other.pt")
    torch.save({"model": {}, "config": {"model": "random"}, "step": 1}, root / "head.pt")  # of segmentation
    name, *flags = command.format(root=root).split()
    defaults = {"--model": "zero" if name == "flow" else "random", "--output-dir": tmp_path / "out"}
    defaults = [x for flag, value in defaults.items() if flag not in flags for x in (flag, value)]
    assert_one_line(typed(name, *defaults, "--encoder", "pwc", *flags), MISTAKES[command])
    assert not list((tmp_path / "out").rglob("*.*"))
