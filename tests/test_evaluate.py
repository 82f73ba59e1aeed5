"""evaluate.py flow: metrics against plain loops, readers against files that OpenCV writes, the command as typed."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.datasets.utils import _read_pfm
from torchvision.utils import flow_to_image

import evaluate
import sources.flow_benchmarks
from evaluate import end_point_error, f1_all, flow_colours, flow_figure
from mcjepa import MCJEPA, LossConfig, ModelConfig
from sources.flow_benchmarks import find_benchmark, read_flow
from sources.moving_shapes import MovingShapes

ROOT = Path(__file__).parents[1]
SCENES = {"Alpha": (3, 1), "Beta": (-2, 4)}
"""Two scenes whose second frame is the first one moved by so many pixels in x and y."""


def random_flow(seed: int, b: int = 2, h: int = 5, w: int = 7, size: float = 10.0) -> torch.Tensor:
    return size * torch.randn(b, 2, h, w, generator=torch.Generator().manual_seed(seed))


def scene(motion: tuple[int, int], h: int = 60, w: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two frames (h, w, 3) uint8 and the flow (h, w, 2) between them; a few pixels are unknown as in Middlebury."""
    x, y = motion
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    canvas = cv2.resize(noise, (w + 40, h + 40), interpolation=cv2.INTER_CUBIC)
    frame_1, frame_2 = canvas[20 : 20 + h, 20 : 20 + w], canvas[20 - y : 20 - y + h, 20 - x : 20 - x + w]
    flow = np.empty((h, w, 2), np.float32)
    flow[...] = motion
    flow[:2, :3] = 1.67e9
    return frame_1, frame_2, flow


@pytest.fixture
def middlebury(tmp_path) -> Path:
    root = tmp_path / "Middlebury"
    for name, motion in SCENES.items():
        frames, truth = root / "other-data" / name, root / "other-gt-flow" / name
        frames.mkdir(parents=True)
        truth.mkdir(parents=True)
        frame_1, frame_2, flow = scene(motion)
        cv2.imwrite(str(frames / "frame10.png"), frame_1)
        cv2.imwrite(str(frames / "frame11.png"), frame_2)
        cv2.writeOpticalFlow(str(truth / "flow10.flo"), flow)
    return root


def write_kitti(path: Path, flow: np.ndarray, valid: np.ndarray) -> None:
    stored = np.dstack([valid.astype(np.uint16), *(np.round(flow[..., c] * 64 + 2**15) for c in (1, 0))])
    cv2.imwrite(str(path), stored.astype(np.uint16))


def write_pfm(path: Path, flow: np.ndarray, order: str = "<") -> None:
    """As in FlyingThings3D: three channels, rows from the bottom to the top, the order of the bytes in a sign."""
    stored = np.dstack((flow, np.zeros_like(flow[..., 0])))[::-1].astype(f"{order}f4")
    head = f"PF\n{flow.shape[1]} {flow.shape[0]}\n{'-' if order == '<' else ''}1.0\n"
    path.write_bytes(head.encode() + stored.tobytes())


def write_video(path: Path, frames: int, size: tuple[int, int] = (65, 47)) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, size)
    canvas = scene((0, 0), h=100, w=120)[0]
    for t in range(frames):
        writer.write(np.ascontiguousarray(canvas[t : t + size[1], 2 * t : 2 * t + size[0]]))
    writer.release()


@pytest.fixture
def typed(monkeypatch, capfd):
    """The command in this process, for speed: arguments to (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        try:
            evaluate.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def in_subprocess(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


# ---------------------------------------------------------------------------------------------------- metrics


def metrics_by_loops(flow: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> tuple[float, float]:
    errors, outliers = [], []
    for b in range(flow.shape[0]):
        for y in range(flow.shape[2]):
            for x in range(flow.shape[3]):
                (u, v), (tu, tv) = flow[b, :, y, x], truth[b, :, y, x]
                if valid[b, y, x] and math.isfinite(tu) and math.isfinite(tv) and abs(tu) <= 1e9 and abs(tv) <= 1e9:
                    error = math.hypot(u - tu, v - tv)
                    errors.append(error)
                    outliers.append(error > 3 and error > 0.05 * math.hypot(tu, tv))
    return sum(errors) / len(errors), sum(outliers) / len(outliers)


@given(seed=st.integers(0, 10_000), size=st.sampled_from([1.0, 5.0, 100.0]))
@settings(max_examples=25, deadline=None)
def test_both_metrics_equal_plain_loops(seed, size):
    flow, truth = random_flow(seed, size=size), random_flow(seed + 1, size=size)
    truth[0, 0, 0, 0], truth[0, 1, 1, 1], truth[1, :, 2, 2] = float("nan"), 1.67e9, float("inf")
    valid = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(seed)) < 0.7
    epe, f1 = metrics_by_loops(flow.double().numpy(), truth.double().numpy(), valid.numpy())
    for mask in (valid, valid[:, None]):
        assert end_point_error(flow, truth, mask).item() == pytest.approx(epe, rel=1e-5)
        assert f1_all(flow, truth, mask).item() == pytest.approx(f1, abs=1e-6)


@given(seed=st.integers(0, 10_000), dx=st.floats(-50, 50), dy=st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_the_error_is_a_distance(seed, dx, dy):
    truth, flow = random_flow(seed), random_flow(seed + 1)
    shift = torch.tensor([dx, dy]).view(1, 2, 1, 1)
    assert end_point_error(truth, truth) == 0 and f1_all(truth, truth) == 0
    assert end_point_error(flow, truth) == end_point_error(truth, flow)
    assert end_point_error(truth + shift, truth).item() == pytest.approx(math.hypot(dx, dy), abs=1e-4)
    assert end_point_error(torch.zeros_like(truth), truth).item() == pytest.approx(truth.norm(dim=1).mean().item())


@pytest.mark.parametrize(
    "error, length, outlier",
    [(2.9, 0.0, 0), (3.1, 0.0, 1), (3.1, 61.0, 1), (3.1, 63.0, 0), (4.0, 79.0, 1), (4.0, 81.0, 0), (2.9, 1.0, 0)],
)
def test_an_outlier_needs_more_than_3_px_and_more_than_5_percent(error, length, outlier):
    truth = torch.zeros(1, 2, 2, 2)
    truth[:, 0] = length
    flow = truth.clone()
    flow[:, 1] = error
    assert f1_all(flow, truth) == outlier


def test_a_flow_that_is_not_a_number_is_an_outlier_not_a_success():
    truth = torch.zeros(1, 2, 2, 2)
    assert f1_all(truth * float("nan"), truth) == 1
    assert end_point_error(truth * float("nan"), truth).isnan()


@pytest.mark.parametrize("metric", [end_point_error, f1_all])
def test_no_pixel_with_known_flow_is_an_error_not_a_nan(metric):
    flow = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="no pixel"):
        metric(flow, flow + 2e9)
    with pytest.raises(ValueError, match="no pixel"):
        metric(flow, flow, torch.zeros(1, 3, 3, dtype=torch.bool))


def test_a_summary_counts_images_alike_or_pixels_alike_and_a_region_only_where_it_is():
    scenes = [
        {"pixels": {"all": 300, "fg": 10}, "dis": {"epe": {"all": 1.0, "fg": 4.0}, "f1": {"all": 0.0, "fg": 1.0}}},
        {"pixels": {"all": 100}, "dis": {"epe": {"all": 3.0}, "f1": {"all": 1.0}}},
        {"pixels": {"all": 100, "fg": 30}, "dis": {"epe": {"all": 5.0, "fg": 8.0}, "f1": {"all": 0.5, "fg": 0.0}}},
    ]
    for each, seconds in zip(scenes, (9.0, 1.0, 2.0), strict=True):
        each["dis"]["seconds"] = seconds
    summary = evaluate.summarise(scenes, "dis")
    assert set(summary) == {"per_image", "per_pixel", "seconds"} and summary["seconds"] == 2.0
    assert summary["per_image"] == {"epe": {"all": 3.0, "fg": 6.0}, "f1": {"all": 0.5, "fg": 0.5}}
    assert summary["per_pixel"]["epe"] == pytest.approx({"all": 2.2, "fg": 7.0})
    assert summary["per_pixel"]["f1"] == pytest.approx({"all": 0.3, "fg": 0.25})


# ---------------------------------------------------------------------------------------------------- readers


def test_flo_files_of_opencv_are_read_back(tmp_path):
    flow = random_flow(0, b=1)[0].permute(1, 2, 0).contiguous().numpy()
    flow[1, 2] = 1.67e9
    cv2.writeOpticalFlow(str(tmp_path / "a.flo"), flow)
    read, valid = read_flow(tmp_path / "a.flo")
    np.testing.assert_array_equal(read[0].permute(1, 2, 0).numpy(), flow)
    assert valid.sum() == 5 * 7 - 1 and not valid[0, 0, 1, 2]


def test_kitti_files_are_read_to_a_64th_of_a_pixel(tmp_path):
    flow = random_flow(0, b=1, size=100)[0].permute(1, 2, 0).numpy()
    known = np.random.default_rng(0).random((5, 7)) < 0.6
    write_kitti(tmp_path / "a.png", flow, known)
    read, valid = read_flow(tmp_path / "a.png")
    np.testing.assert_array_equal(valid[0, 0].numpy(), known)
    assert np.abs(read[0].permute(1, 2, 0).numpy() - flow)[known].max() <= 0.5 / 64 + 1e-4


@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm_files_are_read_from_the_bottom_to_the_top_in_both_byte_orders(tmp_path, order):
    flow = random_flow(0, b=1)[0].permute(1, 2, 0).numpy()
    write_pfm(tmp_path / "a.pfm", flow, order)
    read, valid = read_flow(tmp_path / "a.pfm")
    np.testing.assert_array_equal(read[0].permute(1, 2, 0).numpy(), flow)
    np.testing.assert_array_equal(read[0].numpy(), _read_pfm(str(tmp_path / "a.pfm")))
    assert valid.all()


def damaged(path: Path, damage: str) -> None:
    """Writes a good file of true flow and spoils it."""
    flow = scene((1, 1))[2]
    if path.suffix == ".flo":
        cv2.writeOpticalFlow(str(path), flow)
    elif path.suffix == ".pfm":
        write_pfm(path, flow)
    else:
        write_kitti(path, flow.clip(-9, 9), np.ones(flow.shape[:2]))
    content = path.read_bytes()
    spoilt = {
        "cut": content[: len(content) // 2],
        "text": b"hello, this is text",
        "header only": content[:9],
        "negative size": content[:4] + b"\xff\xff\xff\xff" + content[8:],
        "one channel": content.replace(b"PF", b"Pf", 1),
        "no size": content.replace(b"80 60", b"0 0", 1),
    }
    path.write_bytes(spoilt[damage])


@pytest.mark.parametrize("damage", ["cut", "text", "header only", "negative size"])
def test_a_damaged_flo_file_is_named(tmp_path, damage):
    damaged(tmp_path / "a.flo", damage)
    with pytest.raises(ValueError, match=r"a\.flo: .*(not a \.flo file|cut short)"):
        read_flow(tmp_path / "a.flo")


@pytest.mark.parametrize("damage", ["cut", "text", "header only", "one channel", "no size"])
def test_a_damaged_pfm_file_is_named(tmp_path, damage):
    damaged(tmp_path / "a.pfm", damage)
    with pytest.raises(ValueError, match=r"a\.pfm: .*(not a \.pfm file|cut short)"):
        read_flow(tmp_path / "a.pfm")


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_kitti_file_is_named(tmp_path, damage):
    damaged(tmp_path / "a.png", damage)
    with pytest.raises(ValueError, match=r"a\.png: not"):
        read_flow(tmp_path / "a.png")


def test_an_ordinary_picture_is_no_kitti_flow(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), scene((0, 0))[0])
    with pytest.raises(ValueError, match="16-bit"):
        read_flow(tmp_path / "a.png")


def test_a_flow_without_a_known_pixel_is_refused(tmp_path):
    write_kitti(tmp_path / "a.png", np.zeros((4, 4, 2)), np.zeros((4, 4)))
    with pytest.raises(ValueError, match="known"):
        read_flow(tmp_path / "a.png")


# --------------------------------------------------------------------------------------------------- pictures


def test_colours_depend_on_the_given_scale_not_on_the_other_pixels():
    flow = random_flow(0, b=1)[0]
    alone, beside = flow[:, :, :3], flow.clone()
    beside[:, :, 5:] *= 100
    assert torch.equal(flow_colours(alone, 20.0), flow_colours(beside, 20.0)[:, :, :3])
    assert (flow_colours(torch.zeros(2, 4, 4), 5.0) == 255).all()
    slow = torch.ones(2, 4, 4)
    assert flow_colours(slow, 100.0).min() > 240 and flow_colours(slow, 1.0).min() < 50


def test_unknown_flow_is_black():
    flow = torch.ones(2, 4, 4)
    flow[:, 1, 1], flow[0, 2, 2] = 2e9, float("nan")
    black = (flow_colours(flow, 1.0) == 0).all(dim=0)
    assert black.nonzero().tolist() == [[1, 1], [2, 2]]


def test_the_figure_of_the_true_flow_has_a_black_difference_and_a_black_error():
    frame_1, frame_2, flow = (torch.from_numpy(x.copy()).permute(2, 0, 1) for x in scene((3, 1)))
    image_1, image_2 = frame_1 / 255, frame_2 / 255
    figure = flow_figure(image_1, image_2, flow.clip(-9, 9))
    assert figure.shape == (3, 2 * (60 + 14 + 2) + 2, 3 * (80 + 2) + 2) and figure.dtype == torch.uint8
    difference = figure[:, 92:152, 84:164]  # second row, second column
    assert difference[:, 4:-4, 4:-4].max() <= 1  # 1 for rounding; what left the picture is not found
    assert flow_figure(image_1, image_2, torch.zeros(2, 60, 80))[:, 92:152, 84:164].float().mean() > 10
    error = flow_figure(image_1, image_2, flow.clip(-9, 9), flow)[:, 92:152, 166:246]  # second row, third column
    assert error.max() == 0


def test_the_wheel_is_the_last_panel_and_shows_each_direction_in_the_colour_of_its_flow():
    image, flow = torch.rand(3, 60, 80), random_flow(0, b=1, h=60, w=80)[0]
    alone, beside = flow_figure(image, image, flow), flow_figure(image, image, flow, 2 * flow)
    wheel = alone[:, 92:152, 166:246]  # second row, third column
    assert torch.equal(wheel, beside[:, 92:152, 248:328])  # second row, fourth column
    for angle in range(0, 360, 20):
        x = round(39.5 + 25 * math.cos(math.radians(angle)))
        y = round(29.5 + 25 * math.sin(math.radians(angle)))
        # The last column, of length 1, is the largest, to which flow_to_image holds the other.
        field = torch.tensor([[[(x - 39.5) / 30, 1.0]], [[(y - 29.5) / 30, 0.0]]])
        assert (wheel[:, y, x].int() - flow_to_image(field)[:, 0, 0].int()).abs().max() <= 1, angle
    red, green, blue = wheel[:, 29, 67].tolist()  # a flow to the right
    assert red > 230 and max(green, blue) < 90
    assert wheel[:, 28:32, 38:42].min() > 230  # no flow
    assert wheel[:, 0, 0].min() == 255 and wheel[:, 30, 5].min() == 255  # beyond the rim


def test_truth_and_ours_are_coloured_on_one_scale():
    image, truth = torch.rand(3, 60, 80), torch.zeros(2, 60, 80)
    truth[0] = 6.0
    figure = flow_figure(image, image, truth / 2, truth).int()
    colours = flow_to_image(torch.tensor([[[6.0, 3.0]], [[0.0, 0.0]]])).int()[:, 0]
    for column, colour in ((2, colours[:, 0]), (3, colours[:, 1])):
        panel = figure[:, 16:76, 2 + 82 * column : 82 + 82 * column]
        assert (panel - colour.view(3, 1, 1)).abs().max() <= 1
    assert figure[:, 92:152, 166:246].min() == 255  # an error of one size has full brightness


# ------------------------------------------------------------------------------------------------ the command


def test_middlebury_as_a_user_types_it(middlebury, tmp_path):
    run = in_subprocess("flow", "--model", "dis", "--data-root", middlebury, "--output-dir", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out" / "flow.json").read_text())
    assert [s["name"] for s in report["scenes"]] == list(SCENES)
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    for measured, motion in zip(report["scenes"], SCENES.values(), strict=True):
        frame_1, frame_2, truth = scene(motion)
        grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (frame_1, frame_2)]
        known = np.abs(truth).max(axis=2) < 1e9
        error = np.linalg.norm(dis.calc(*grey, None) - truth, axis=2)[known].mean()
        assert measured["dis"]["epe"]["all"] == pytest.approx(error, rel=1e-4)
        assert measured["zero"]["epe"]["all"] == pytest.approx(math.hypot(*motion), rel=1e-5)
        assert measured["pixels"] == {"all": known.sum()}
        figure = cv2.imread(str(tmp_path / "out" / f"{measured['name']}.png"))
        assert figure.shape == (2 * (60 + 16) + 2, 4 * (80 + 2) + 2, 3)
    mean = np.mean([math.hypot(*motion) for motion in SCENES.values()])
    rows = report["groups"]["all"]
    for kind in ("per_image", "per_pixel"):  # the scenes are of one size
        assert rows["zero"][kind]["epe"] == {"all": pytest.approx(mean, rel=1e-5)}
        assert rows["zero"][kind]["f1"] == {"all": 1}  # both motions are longer than 3 px
        assert rows["dis"][kind]["epe"]["all"] < 0.5 * mean
    assert report["settings"]["model"] == "dis" and report["versions"]["torch"] == torch.__version__
    for text in ("zero", "dis", "EPE", "F1-all", *SCENES, f"{mean:.2f}", "100.00"):
        assert text in run.stdout


def test_moving_shapes_as_a_user_types_it(tmp_path):
    run = in_subprocess("flow", "--model", "zero", "--shapes-count", 2, "--pictures", 1, "--output-dir", tmp_path)
    assert run.returncode == 0, run.stderr
    shapes = MovingShapes(length=2, size=(192, 192), frames=2, seed=evaluate.UNSEEN_SEED)
    lengths = np.mean([shapes[i]["flow_forward"].norm(dim=1).mean() for i in range(2)])
    rows = json.loads((tmp_path / "flow.json").read_text())["groups"]["all"]
    assert rows["zero"]["per_image"]["epe"]["all"] == pytest.approx(lengths, rel=1e-5) and set(rows) == {"zero", "dis"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flow.json", "shapes_0000.png"]


def test_the_subcommand_has_to_be_named(typed):
    code, out, err = typed("--model", "zero")
    assert code == 2 and "flow" in err and not out


class Constant(MCJEPA):
    """Stands for a trained model: always the same flow."""

    def __init__(self, dx: float, dy: float):
        nn.Module.__init__(self)
        self.flow = nn.Parameter(torch.tensor([dx, dy]).view(1, 2, 1, 1))
        self.encoder_is_frozen = False

    @torch.no_grad()
    def estimate_flow(self, image_1, image_2):
        return self.flow.expand(len(image_1), -1, *image_1.shape[-2:]).clone()


def write_checkpoint(path: Path, task: str) -> MCJEPA:
    torch.manual_seed(0)
    config = ModelConfig(encoder="pwc", estimator_factor=0.1, expander=(4,))
    model = MCJEPA(config, task=task)
    settings = {"model": asdict(config), "loss": asdict(LossConfig()), "task": task}
    torch.save({"model": model.state_dict(), "config": settings, "step": 0}, path)
    return model.eval()


def test_a_checkpoint_is_measured_as_the_model_that_it_holds(middlebury, tmp_path, typed):
    model = write_checkpoint(tmp_path / "a.pt", "mjepa")
    options = ("--data-root", middlebury, "--output-dir", tmp_path / "out")
    code, screen, err = typed("flow", "--model", tmp_path / "a.pt", *options)
    assert code == 0, err
    assert "ours" in screen
    rows = json.loads((tmp_path / "out" / "flow.json").read_text())["groups"]["all"]
    assert list(rows) == ["zero", "dis", "ours"]
    expected = []
    for files in find_benchmark(middlebury)[1]:
        pair = sources.flow_benchmarks.read_pair(files)
        expected.append(end_point_error(model.estimate_flow(pair.image_1, pair.image_2), pair.flow).item())
    assert rows["ours"]["per_image"]["epe"]["all"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_checkpoint_without_a_flow_estimator_is_refused_in_one_line(middlebury, tmp_path, typed):
    write_checkpoint(tmp_path / "a.pt", "vicreg")
    options = ("--data-root", middlebury, "--output-dir", tmp_path / "out")
    code, _, err = typed("flow", "--model", tmp_path / "a.pt", *options)
    assert code == 1 and "vicreg" in err and err.count("\n") == 1


@pytest.mark.parametrize("resize, scale, label", [("pad", 1.0, "ours"), ("0.5", 0.5, "ours 0.5")])
def test_a_model_gets_its_own_row_at_any_scale(middlebury, tmp_path, typed, monkeypatch, resize, scale, label):
    motion = SCENES["Alpha"]
    model = Constant(*(scale * c for c in motion))
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: model)
    out = tmp_path / "out"
    code, screen, err = typed(
        "flow", "--model", "a.pt", "--data-root", middlebury, "--resize", resize, "--output-dir", out
    )
    assert code == 0, err
    report = json.loads((out / "flow.json").read_text())
    assert list(report["groups"]["all"]) == ["zero", "dis", label] and f"\n{label} " in screen
    assert report["scenes"][0][label]["epe"]["all"] == pytest.approx(0, abs=1e-4)
    assert report["scenes"][1][label]["epe"]["all"] == pytest.approx(math.dist(motion, SCENES["Beta"]), rel=1e-4)


def test_the_layouts_of_kitti_and_flying_chairs_are_found(tmp_path, typed):
    frame_1, frame_2, flow = scene((3, 1))
    kitti, chairs = tmp_path / "kitti", tmp_path / "chairs" / "data"
    for folder in (kitti / "training" / "image_2", kitti / "training" / "flow_occ", chairs):
        folder.mkdir(parents=True)
    cv2.imwrite(str(kitti / "training/image_2/000000_10.png"), frame_1)
    cv2.imwrite(str(kitti / "training/image_2/000000_11.png"), frame_2)
    cv2.imwrite(str(kitti / "training/image_2/000001_10.png"), frame_1)  # without flow: left out
    write_kitti(kitti / "training/flow_occ/000000_10.png", flow.clip(-9, 9), np.abs(flow[..., 0]) < 1e9)
    cv2.imwrite(str(chairs / "00001_img1.ppm"), frame_1)
    cv2.imwrite(str(chairs / "00001_img2.ppm"), frame_2)
    cv2.writeOpticalFlow(str(chairs / "00001_flow.flo"), flow)
    for root in (kitti, kitti / "training", tmp_path / "chairs", chairs):
        code, _, err = typed("flow", "--model", "zero", "--data-root", root, "--output-dir", tmp_path / "out")
        assert code == 0, err
        report = json.loads((tmp_path / "out" / "flow.json").read_text())
        zero = report["groups"]["all"]["zero"]["per_image"]["epe"]["all"]
        assert zero == pytest.approx(math.hypot(3, 1), rel=1e-5)
        assert [s["pixels"] for s in report["scenes"]] == [{"all": 60 * 80 - 6}]


def test_two_images_without_truth_become_pictures(middlebury, tmp_path, typed):
    frames = [middlebury / "other-data" / "Alpha" / f"frame{i}.png" for i in (10, 11)]
    code, out, err = typed("flow", "--model", "dis", "--images", *frames, "--output-dir", tmp_path / "out")
    assert code == 0, err
    assert "px" in out
    written = {p.name: p for p in (tmp_path / "out").iterdir()}
    assert set(written) == {"flow.flo", "flow.png", "warped.png", "figure.png"}
    flow, warped = cv2.readOpticalFlow(str(written["flow.flo"])), cv2.imread(str(written["warped.png"]))
    assert np.abs(np.median(flow, axis=(0, 1)) - SCENES["Alpha"]).max() < 0.2
    inside = (slice(8, -8), slice(8, -8))
    before = np.abs(cv2.imread(str(frames[1])).astype(int) - cv2.imread(str(frames[0])))[inside].mean()
    after = np.abs(warped.astype(int) - cv2.imread(str(frames[0])))[inside].mean()
    assert after < 0.2 * before


def test_a_video_becomes_a_video_of_its_flow(tmp_path, typed):
    write_video(tmp_path / "clip.avi", frames=6)
    out = tmp_path / "out"
    options = ("--max-frames", 5, "--pictures", 2, "--output-dir", out)
    code, _, err = typed("flow", "--model", "zero", "--video", tmp_path / "clip.avi", *options)
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == ["clip_00000.png", "clip_00003.png", "clip_flow.mp4"]
    video = cv2.VideoCapture(str(out / "clip_flow.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 10 and video.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    source = cv2.VideoCapture(str(tmp_path / "clip.avi"))
    for _ in range(4):
        frame, original = video.read()[1], source.read()[1]
        assert frame.shape == (46, 2 * 64, 3)
        assert frame[:, 70:].min() > 240  # no flow is white
        assert np.abs(frame[:, :60].astype(int) - original[:46, :60]).mean() < 10


def test_a_video_that_breaks_off_leaves_nothing_half_written(tmp_path, typed, monkeypatch):
    class Breaking(Constant):
        calls = 0

        def estimate_flow(self, image_1, image_2):
            self.calls += 1
            if self.calls == 3:
                raise ValueError("the third frame is broken")
            return super().estimate_flow(image_1, image_2)

    write_video(tmp_path / "clip.avi", frames=6)
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: Breaking(1.0, 1.0))
    options = ("--pictures", 0, "--output-dir", tmp_path / "out")
    code, _, err = typed("flow", "--model", "a.pt", "--video", tmp_path / "clip.avi", *options)
    assert code == 1 and err == "error: the third frame is broken\n"
    assert not list((tmp_path / "out").iterdir())


# ----------------------------------------------------------------------------------------------- user mistakes


def test_a_mistake_is_one_line_without_a_traceback(tmp_path):
    run = in_subprocess("flow", "--model", "zero", "--data-root", tmp_path / "nowhere", "--output-dir", tmp_path)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == f"error: {tmp_path / 'nowhere'}: no such folder; check the path\n"


def mistakes(folder: Path, data: Path) -> dict[str, tuple[list, str]]:
    """Arguments, and what the line has to say."""
    alpha = data / "other-data" / "Alpha"
    (folder / "text.png").write_text("hello")
    (folder / "text.mp4").write_text("hello")
    (folder / "empty").mkdir()
    cv2.imwrite(str(folder / "small.png"), np.zeros((20, 20, 3), np.uint8))
    write_video(folder / "one.avi", frames=1)
    return {
        "missing checkpoint": (["--model", folder / "no.pt"], "no.pt"),
        "no flow in the folder": (["--data-root", folder / "empty"], "no true flow"),
        "two sources": (["--data-root", data, "--video", "a.mp4"], "exclude each other"),
        "missing image": (["--images", alpha / "frame10.png", folder / "no.png"], "no.png"),
        "text as an image": (["--images", alpha / "frame10.png", folder / "text.png"], "text.png"),
        "images of two sizes": (["--images", alpha / "frame10.png", folder / "small.png"], "20x20"),
        "missing video": (["--video", folder / "no.mp4"], "no such video"),
        "folder as a video": (["--video", folder / "empty"], "empty: a folder, not a video file"),
        "folder as a checkpoint": (["--model", folder / "empty"], "such as"),
        "text as a video": (["--video", folder / "text.mp4"], "text.mp4: no frame can be decoded"),
        "video of one frame": (["--video", folder / "one.avi"], "one.avi: a clip of one frame"),
        "one frame asked for": (["--video", folder / "one.avi", "--max-frames", 1], "--max-frames"),
        "factor of zero": (["--resize", 0], "--resize"),
        "no shapes": (["--shapes-count", 0], "--shapes-count"),
        "output is a file": (["--output-dir", folder / "text.png"], "text.png: a file is in the way of this folder"),
    }


def test_each_mistake_is_told_in_one_line_and_leaves_no_file(middlebury, tmp_path, typed):
    for name, (arguments, told) in mistakes(tmp_path, middlebury).items():
        output = [] if "--output-dir" in arguments else ["--output-dir", tmp_path / "out"]
        model = [] if "--model" in arguments else ["--model", "zero"]
        code, out, err = typed("flow", *model, *output, *arguments)
        assert code == 1 and out == "", name
        assert err.startswith("error: ") and err.count("\n") == 1 and told in err, (name, err)
        assert not list((tmp_path / "out").glob("*")), name


@pytest.mark.parametrize("spoil, told", [("cut", "cut short"), ("size", "but its frames are"), ("frame", "missing")])
def test_a_spoilt_scene_leaves_an_earlier_report_as_it_was(middlebury, tmp_path, typed, spoil, told):
    truth = middlebury / "other-gt-flow" / "Beta" / "flow10.flo"
    if spoil == "cut":
        truth.write_bytes(truth.read_bytes()[:-1])
    elif spoil == "size":
        cv2.writeOpticalFlow(str(truth), scene((1, 1), h=50)[2])
    else:
        (middlebury / "other-data" / "Beta" / "frame11.png").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "flow.json").write_text("earlier")
    code, _, err = typed("flow", "--model", "zero", "--data-root", middlebury, "--output-dir", tmp_path / "out")
    assert code == 1 and err.count("\n") == 1 and told in err and "Beta" in err
    assert (tmp_path / "out" / "flow.json").read_text() == "earlier"
    assert not list((tmp_path / "out").glob(".partial*"))


# -------------------------------------------------------------------------------------------- as train.py uses it


def test_evaluation_during_training_tells_the_error_and_gives_the_mode_back():
    model = Constant(0.0, 0.0).train()
    numbers = evaluate.evaluate_flow_on_shapes(model, 3, (64, 48), 5)
    truth = torch.stack([MovingShapes(length=3, size=(64, 48), seed=5)[i]["flow_forward"][0] for i in range(3)])
    zero = pytest.approx(truth.norm(dim=1).mean().item(), rel=1e-5)
    assert numbers["epe"] == zero and numbers["epe_zero"] == zero
    assert numbers["f1"] == pytest.approx((truth.norm(dim=1) > 3).float().mean().item(), abs=1e-5)
    assert model.training
