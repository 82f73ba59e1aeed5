"""evaluate.py flow --benchmark: each set as it is unpacked, in tiny, against a few lines of OpenCV and NumPy."""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import test_evaluate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import Constant, in_subprocess, scene, write_checkpoint, write_kitti, write_pfm
from torchvision.datasets._optical_flow import _read_16bits_png_with_flow_and_valid_mask, _read_flo

import evaluate
from evaluate import at_size
from mcjepa import MCJEPA, ModelConfig

typed = test_evaluate.typed
NAMES = ("sintel", "kitti2012", "kitti2015", "middlebury", "chairs", "things", "hd1k")
FAST = ((3, 1), (6, 8), (12, -9), (24, 32), (45, 4))
"""Motions of the bands of an image: less than 10 px, 10, between, 40, and more."""
SLOW = ((2, 5), (-4, 0), (-1, 2))


# --------------------------------------------------------------------------------------- sets as they are unpacked


class Sample(NamedTuple):
    """What a set holds, as its test wrote it: a pair's name, part, frames, true flow and regions (h, w)."""

    name: str
    group: str
    frame_1: np.ndarray
    frame_2: np.ndarray
    truth: np.ndarray
    regions: dict[str, np.ndarray]


def write(path: Path, content: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".flo":
        cv2.writeOpticalFlow(str(path), content)
    elif path.suffix == ".pfm":
        write_pfm(path, content)
    else:
        assert cv2.imwrite(str(path), content)


def write_known(path: Path, flow: np.ndarray, known: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_kitti(path, np.where(known[..., None], flow, -512), known)  # zeros where nothing is known, as in KITTI


def bands(motions: tuple[tuple[int, int], ...], h: int = 60, w: int = 80) -> np.ndarray:
    """A flow (h, w, 2) of horizontal bands, each with its motion."""
    flow = np.empty((h, w, 2), np.float32)
    for rows, motion in zip(np.array_split(np.arange(h), len(motions)), motions, strict=True):
        flow[rows] = motion
    return flow


def moved(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The next frame: each pixel lands at the end of its flow; where none lands it is grey."""
    h, w = flow.shape[:2]
    y, x = np.mgrid[:h, :w]
    x_end, y_end = x + flow[..., 0].astype(int), y + flow[..., 1].astype(int)
    inside = (x_end >= 0) & (x_end < w) & (y_end >= 0) & (y_end < h)
    following = np.full_like(frame, 128)
    following[y_end[inside], x_end[inside]] = frame[inside]
    return following


def clip(seed: int, *flows: np.ndarray) -> list[np.ndarray]:
    """A textured frame, and those that follow along the flows."""
    h, w = flows[0].shape[:2]
    noise = np.random.default_rng(seed).integers(0, 256, (h // 3, w // 3, 3), dtype=np.uint8)
    frames = [cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)]
    for flow in flows:
        frames.append(moved(frames[-1], flow))
    return frames


def part(y: slice, x: slice, h: int = 60, w: int = 80) -> np.ndarray:
    mask = np.zeros((h, w), bool)
    mask[y, x] = True
    return mask


def write_sintel(root: Path, masks: tuple[str, ...] = ("occlusions", "invalid")) -> list[Sample]:
    """Two scenes; nothing in the second is faster than 10 px. Invalid pixels have a wrong flow, some are unknown."""
    samples = {"clean": [], "final": []}
    for seed, (place, motions) in enumerate({"alley_1": (FAST, FAST[::-1]), "market_2": (SLOW,)}.items()):
        flows = [bands(motion) for motion in motions]
        frames = clip(seed, *flows)
        for group in samples:
            for number, frame in enumerate(frames, start=1):
                shown = frame if group == "clean" else cv2.GaussianBlur(frame, (5, 5), 0)
                write(root / f"training/{group}/{place}/frame_{number:04d}.png", shown)
        for number, flow in enumerate(flows, start=1):
            name = f"{place}/frame_{number:04d}"
            occluded, invalid = part(slice(10, 50), slice(0, 20 + seed)), part(slice(15, 25), slice(10, 50))
            unknown = part(slice(30, 33), slice(7, 60))
            stored = flow.copy()
            stored[unknown] = 1e10
            if "invalid" in masks:
                stored[invalid] = (300, -200) if seed else (1, 1)
                write(root / f"training/invalid/{name}.png", 255 * invalid.astype(np.uint8))
            write(root / f"training/flow/{name}.flo", stored)
            known = ~unknown & ~invalid if "invalid" in masks else ~unknown
            regions = {"all": known}
            if "occlusions" in masks:
                write(root / f"training/occlusions/{name}.png", 255 * occluded.astype(np.uint8))
                speed = np.hypot(flow[..., 0], flow[..., 1])
                regions |= {"matched": known & ~occluded, "unmatched": known & occluded, "0-10": known & (speed < 10)}
                regions |= {"10-40": known & (speed >= 10) & (speed < 40), "40+": known & (speed >= 40)}
            for group in samples:
                pair = [
                    cv2.imread(str(root / f"training/{group}/{place}/frame_{n:04d}.png")) for n in (number, number + 1)
                ]
                samples[group].append(Sample(name, group, *pair, flow, regions))
    return samples["clean"] + samples["final"]


def write_kitti_set(root: Path, images: str, objects: bool) -> list[Sample]:
    """Two pairs of two sizes; the flow is known at some pixels, and at fewer in flow_noc."""
    samples = []
    for seed, (motions, (h, w)) in enumerate(((FAST, (60, 80)), (SLOW, (52, 90)))):
        name, flow = f"{seed:06d}_10", bands(motions, h, w)
        frame_1, frame_2 = clip(seed, flow)
        write(root / f"training/{images}/{name}.png", frame_1)
        write(root / f"training/{images}/{seed:06d}_11.png", frame_2)
        occ = np.random.default_rng(seed).random((h, w)) < 0.7
        noc = occ & ~part(slice(5, 45), slice(50, w), h, w)
        write_known(root / f"training/flow_occ/{name}.png", flow, occ)
        write_known(root / f"training/flow_noc/{name}.png", flow, noc)
        regions = {"all": occ, "noc": noc}
        if objects:
            numbers = part(slice(12, 35), slice(20, 40), h, w) + 2 * part(slice(40, 50), slice(5, 25), h, w).astype(
                np.uint8
            )
            write(root / f"training/obj_map/{name}.png", numbers)
            regions |= {"bg": occ & (numbers == 0), "fg": occ & (numbers > 0)}
        samples.append(Sample(name, "", frame_1, frame_2, flow, regions))
    return samples


def write_middlebury(root: Path) -> list[Sample]:
    samples = []
    for name, motions in {"Grove9": SLOW, "Urban9": FAST}.items():
        flow = bands(motions)
        frame_1, frame_2 = clip(len(samples), flow)
        write(root / f"other-data/{name}/frame10.png", frame_1)
        write(root / f"other-data/{name}/frame11.png", frame_2)
        unknown = part(slice(0, 22), slice(0, 9 + 10 * len(samples)))
        write(root / f"other-gt-flow/{name}/flow10.flo", np.where(unknown[..., None], np.float32(1.67e9), flow))
        samples.append(Sample(name, "", frame_1, frame_2, flow, {"all": ~unknown}))
    return samples


def write_chairs(root: Path) -> list[Sample]:
    """Three pairs, of which the list calls the second and the third "validation"."""
    samples = []
    for number, motions in enumerate((((20, 20),), FAST, SLOW), start=1):
        flow = bands(motions)
        frame_1, frame_2 = clip(number, flow)
        write(root / f"data/{number:05d}_img1.ppm", frame_1)
        write(root / f"data/{number:05d}_img2.ppm", frame_2)
        write(root / f"data/{number:05d}_flow.flo", flow)
        samples.append(Sample(f"{number:05d}", "", frame_1, frame_2, flow, {"all": np.ones((60, 80), bool)}))
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n2\n")
    return samples[1:]


def write_things(root: Path) -> list[Sample]:
    """A clip with two cameras, and one to train on. The flow of its ends, out of the clip, is there too."""
    samples = []
    for camera in ("left", "right"):
        flow = bands(FAST if camera == "left" else SLOW)
        frames = clip(len(camera), flow)
        for group in ("clean", "final"):
            for number, frame in zip((6, 7), frames, strict=True):
                for split in ("TEST", "TRAIN"):
                    place = f"frames_{group}pass/{split}/A/0000/{camera}/{number:04d}.png"
                    write(root / place, frame // (1 + (group == "final")))
        for direction, sign in (("future", 1), ("past", -1)):
            for number in (6, 7):
                leads_out = number == (7 if direction == "future" else 6)
                name = f"OpticalFlowInto{direction.title()}_{number:04d}_{camera[0].upper()}.pfm"
                file = f"into_{direction}/{camera}/{name}"
                # Past flow on the second frame's grid: what the test writes is what has to be measured, true or not.
                write(root / "optical_flow/TEST/A/0000" / file, 99 * flow if leads_out else sign * flow)
                write(root / "optical_flow/TRAIN/A/0000" / file, 99 * flow)
                if leads_out:
                    continue
                for group in ("clean", "final"):
                    pair = [frame // (1 + (group == "final")) for frame in frames[::sign]]
                    name = f"A_0000_{camera}_into_{direction}_{number:04d}"
                    samples.append(Sample(name, group, *pair, sign * flow, {"all": np.ones((60, 80), bool)}))
    return samples


def write_hd1k(root: Path) -> list[Sample]:
    """Two sequences; the flow of their last frames lies there too, and is no pair."""
    samples = []
    for sequence, motions in enumerate(((SLOW, SLOW[::-1]), (FAST,))):
        flows = [bands(each) for each in motions]
        frames = clip(sequence, *flows)
        for number, frame in enumerate(frames, start=10):
            write(root / f"hd1k_input/image_2/{sequence:06d}_{number:04d}.png", frame)
        for number, flow in enumerate((*flows, 5 * flows[0]), start=10):
            known = np.random.default_rng(number).random((60, 80)) < 0.3 + 0.1 * (number - 9)
            write_known(root / f"hd1k_flow_gt/flow_occ/{sequence:06d}_{number:04d}.png", flow, known)
            if number - 10 < len(flows):
                pair = frames[number - 10 : number - 8]
                samples.append(Sample(f"{sequence:06d}_{number:04d}", "", *pair, flow, {"all": known}))
    return samples


def write_set(root: Path, name: str) -> list[Sample]:
    """A tiny benchmark in its native layout, in `root`."""
    if name == "kitti2012":
        return write_kitti_set(root, "colored_0", objects=False)
    if name == "kitti2015":
        return write_kitti_set(root, "image_2", objects=True)
    writers = {"sintel": write_sintel, "middlebury": write_middlebury, "chairs": write_chairs}
    return (writers | {"things": write_things, "hd1k": write_hd1k})[name](root)


# ------------------------------------------------------------------------------------------------------ oracles


def zero(frame_1: np.ndarray, frame_2: np.ndarray) -> np.ndarray:
    return np.zeros((*frame_1.shape[:2], 2))


def dis(frame_1: np.ndarray, frame_2: np.ndarray) -> np.ndarray:
    grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (frame_1, frame_2)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)


def farneback(frame_1: np.ndarray, frame_2: np.ndarray) -> np.ndarray:
    grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (frame_1, frame_2)]
    return cv2.calcOpticalFlowFarneback(*grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)


def errors(estimate: np.ndarray, truth: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At each pixel of the region, in float64: the error in px, and whether it is an outlier (1 or 0)."""
    difference = estimate.astype(np.float64)[region] - truth.astype(np.float64)[region]
    error = np.hypot(difference[:, 0], difference[:, 1])
    length = np.hypot(*truth.astype(np.float64)[region].T)
    return error, ((error > 3) & (error > 0.05 * length)).astype(float)


def by_hand(samples: list[Sample], method) -> dict:
    """What flow.json has to hold for a method, but for the seconds."""
    collected: dict[str, list] = {}
    for sample in samples:
        estimate = method(sample.frame_1, sample.frame_2)
        for name, region in sample.regions.items():
            if region.any():
                collected.setdefault(name, []).append(errors(estimate, sample.truth, region))
    means = {"per_image": {"epe": {}, "f1": {}}, "per_pixel": {"epe": {}, "f1": {}}}
    for name, images in collected.items():
        for which, metric in enumerate(("epe", "f1")):
            means["per_image"][metric][name] = np.mean([image[which].mean() for image in images])
            means["per_pixel"][metric][name] = np.concatenate([image[which] for image in images]).mean()
    return means


def assert_equal(measured: dict, expected: dict) -> None:
    assert measured.keys() == expected.keys() | {"seconds"}
    for mean, metrics in expected.items():
        for metric, regions in metrics.items():
            assert measured[mean][metric] == pytest.approx(regions, rel=1e-4, abs=1e-6), (mean, metric)


def on_screen(screen: str) -> dict[str, dict]:
    """The tables as numbers: part of the set, "mean over pixels", method, column."""
    tables, group, mean = {}, None, None
    for line in screen.splitlines():
        cells = [line[i : i + 10].strip() for i in range(18, len(line), 10)]
        if begin := re.match(r"Flow on .*?(?:, (clean|final))?: \d+ pairs?$", line):
            group, mean = begin[1] or "all", None
        elif line.startswith("mean over"):
            mean, columns = line[:18].strip(), cells
        elif not line:
            mean = None
        elif mean:
            row = dict(zip(columns, map(float, cells), strict=True))
            tables.setdefault(group, {}).setdefault(mean, {})[line[:18].strip()] = row
    return tables


def report_of(folder: Path) -> dict:
    return json.loads((folder / "flow.json").read_text())


# ------------------------------------------------------------------------------------------------ the measurement


def check_report(samples: list[Sample], folder: Path, screen: str, methods: dict) -> None:
    """Numbers in flow.json, and those of the screen, against the oracle's."""
    report, shown = report_of(folder), on_screen(screen)
    measured = {(each["group"], each["name"]): each for each in report["scenes"]}
    assert len(measured) == len(report["scenes"]) and measured.keys() == {(s.group, s.name) for s in samples}
    for sample in samples:
        numbers = measured[sample.group, sample.name]
        assert numbers["pixels"] == {name: region.sum() for name, region in sample.regions.items() if region.any()}
        line = next(line for line in screen.splitlines() if line.startswith(f"{sample.group} {sample.name} ".lstrip()))
        for (name, method), cell in zip(methods.items(), line.split()[-len(methods) :], strict=True):
            error, outlier = errors(method(sample.frame_1, sample.frame_2), sample.truth, sample.regions["all"])
            assert numbers[name]["epe"]["all"] == pytest.approx(error.mean(), rel=1e-4)
            assert numbers[name]["f1"]["all"] == pytest.approx(outlier.mean(), abs=1e-6)
            assert float(cell) == pytest.approx(error.mean(), abs=0.0051)
    groups = {sample.group for sample in samples}
    assert report["groups"].keys() == shown.keys() == {group or "all" for group in groups}
    for group in groups:
        rows = report["groups"][group or "all"]
        assert list(rows) == list(methods)
        for name, method in methods.items():
            expected = by_hand([sample for sample in samples if sample.group == group], method)
            assert_equal(rows[name], expected)
            for mean, title in (("per_pixel", "mean over pixels"), ("per_image", "mean over images")):
                shares = expected[mean]["f1"] if "noc" in samples[0].regions else {"all": expected[mean]["f1"]["all"]}
                numbers = expected[mean]["epe"] | {f"F1-{region}": 100 * share for region, share in shares.items()}
                numbers |= {"s a pair": rows[name]["seconds"]}
                assert shown[group or "all"][title][name] == pytest.approx(numbers, abs=0.0051)


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_is_measured_as_by_hand(tmp_path, typed, name):
    samples = write_set(tmp_path / "unpacked" / "here", name)
    code, screen, err = typed(
        "flow", "--model", "dis", "--data-root", tmp_path, "--benchmark", name, "--output-dir", tmp_path / "out"
    )
    assert code == 0 and err == ""
    check_report(samples, tmp_path / "out", screen, {"zero": zero, "dis": dis})
    assert report_of(tmp_path / "out")["notes"] == []
    pictures = {"_".join(filter(None, (s.group, s.name))).replace("/", "_") + ".png" for s in samples}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"flow.json", *pictures}


def test_kitti_as_a_user_types_it(tmp_path):
    samples = write_set(tmp_path / "kitti", "kitti2015")
    arguments = ("--benchmark", "kitti2015", "--export", tmp_path / "to_submit", "--output-dir", tmp_path / "out")
    run = in_subprocess("flow", "--model", "farneback", "--data-root", tmp_path, *arguments)
    assert run.returncode == 0 and run.stderr == ""
    methods = {"zero": zero, "dis": dis, "farneback": farneback}
    check_report(samples, tmp_path / "out", run.stdout, methods)
    assert sorted(path.name for path in (tmp_path / "to_submit" / "flow").iterdir()) == [
        "000000_10.png",
        "000001_10.png",
    ]


def test_without_masks_there_is_one_region(tmp_path, typed):
    samples = write_sintel(tmp_path, masks=())
    code, screen, err = typed("flow", "--model", "zero", "--data-root", tmp_path, "--output-dir", tmp_path / "out")
    assert code == 0, err
    assert [list(sample.regions) for sample in samples] == 6 * [["all"]]
    check_report(samples, tmp_path / "out", screen, {"zero": zero, "dis": dis})


def test_invalid_flow_is_black_in_the_picture_and_does_not_set_its_scale(tmp_path, typed):
    write_sintel(tmp_path / "data")
    code, _, err = typed("flow", "--model", "zero", "--data-root", tmp_path / "data", "--output-dir", tmp_path / "out")
    assert code == 0, err
    figure = cv2.imread(str(tmp_path / "out/clean_market_2_frame_0001.png"))
    truth = figure[16:76, 166:246]  # first row, third column
    invalid, unknown = part(slice(15, 25), slice(10, 50)), part(slice(30, 33), slice(7, 60))
    np.testing.assert_array_equal((truth == 0).all(axis=2), invalid | unknown)
    assert truth[:20, :10].min(axis=2).max() < 100  # the longest flow that counts has full colour


def test_one_benchmark_of_several_has_to_be_chosen(tmp_path, typed):
    write_set(tmp_path / "a", "kitti2012")
    samples = write_set(tmp_path / "b", "middlebury")
    command = ("flow", "--model", "zero", "--data-root", tmp_path, "--output-dir", tmp_path / "out")
    assert_one_line(typed(*command), "holds kitti2012, middlebury", "--benchmark")
    code, screen, err = typed(*command, "--benchmark", "middlebury")
    assert code == 0, err
    check_report(samples, tmp_path / "out", screen, {"zero": zero, "dis": dis})


@pytest.mark.parametrize("name", NAMES)
def test_what_a_mac_leaves_in_an_archive_is_left_out(tmp_path, typed, name):
    """Files ._NAME beside the files or in a folder __MACOSX."""
    samples = write_set(tmp_path / "data" / "set", name)
    for path in [path for path in (tmp_path / "data").rglob("*") if path.is_file()]:
        beside, apart = path.parent, tmp_path / "data" / "__MACOSX" / path.parent.relative_to(tmp_path / "data" / "set")
        apart.mkdir(parents=True, exist_ok=True)
        for folder in (beside, apart):
            (folder / f"._{path.name}").write_bytes(b"Mac OS X")
    options = ("--data-root", tmp_path / "data", "--benchmark", name, "--output-dir", tmp_path / "out")
    code, screen, err = typed("flow", "--model", "zero", *options)
    assert code == 0, err
    check_report(samples, tmp_path / "out", screen, {"zero": zero, "dis": dis})


def test_pairs_without_frames_are_left_out_and_the_report_says_so(tmp_path, typed):
    samples = write_set(tmp_path / "kitti", "kitti2015")
    for number in (10, 11):
        (tmp_path / f"kitti/training/image_2/000000_{number}.png").unlink()
    code, screen, err = typed("flow", "--model", "zero", "--data-root", tmp_path, "--output-dir", tmp_path / "out")
    assert code == 0, err
    check_report(samples[1:], tmp_path / "out", screen, {"zero": zero, "dis": dis})
    (note,) = report_of(tmp_path / "out")["notes"]
    assert note.startswith("1 of 2 pairs left out") and "000000_10.png" in note and f"note: {note}\n" in screen


# ----------------------------------------------------------------------------------------------------- the methods


def test_a_checkpoint_is_measured_in_every_region(tmp_path, typed):
    model = write_checkpoint(tmp_path / "a.pt", "mjepa")

    def ours(*frames: np.ndarray) -> np.ndarray:
        images = [torch.from_numpy(frame[..., ::-1].copy()).permute(2, 0, 1)[None] / 255 for frame in frames]
        return model.estimate_flow(*images)[0].permute(1, 2, 0).numpy()

    samples = write_set(tmp_path / "kitti", "kitti2015")
    options = ("--data-root", tmp_path / "kitti", "--output-dir", tmp_path / "out")
    code, screen, err = typed("flow", "--model", tmp_path / "a.pt", *options)
    assert code == 0, err
    check_report(samples, tmp_path / "out", screen, {"zero": zero, "dis": dis, "ours": ours})


def test_the_untrained_network_of_the_default_size_gets_a_row(tmp_path, typed):
    options = ("--shapes-count", 1, "--shapes-size", 64, "--pictures", 0, "--output-dir", tmp_path)
    code, screen, err = typed("flow", "--model", "random", *options)
    assert code == 0, err
    rows = report_of(tmp_path)["groups"]["all"]
    assert list(rows) == ["zero", "dis", "random"]
    error = rows["random"]["per_pixel"]["epe"]["all"]
    assert math.isfinite(error) and error != rows["zero"]["per_pixel"]["epe"]["all"]
    assert on_screen(screen)["all"]["mean over pixels"]["random"]["all"] == pytest.approx(error, abs=0.0051)


def test_the_untrained_network_is_always_the_same(tmp_path, typed, monkeypatch):
    small = ModelConfig(encoder="pwc", estimator_factor=0.1, expander=(4,))
    asked = []
    monkeypatch.setattr(
        evaluate, "MCJEPA", lambda *given, **options: asked.append((*given, options)) or MCJEPA(small, **options)
    )
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        options = ("--shapes-count", 1, "--shapes-size", 64, "--pictures", 0, "--output-dir", tmp_path)
        code, _, err = typed("flow", "--model", "random", *options)
        assert code == 0, err
        found.append(report_of(tmp_path)["scenes"][0]["random"]["epe"]["all"])
    assert found[0] == found[1]
    assert asked == 2 * [(ModelConfig(), {"task": "mjepa"})]  # the default architecture


# -------------------------------------------------------------------------------------------- what the method sees


class Watching(Constant):
    """Always the same flow, in pixels of what it sees, and the sizes that it saw."""

    def __init__(self, dx: float, dy: float):
        super().__init__(dx, dy)
        self.seen = []

    def estimate_flow(self, image_1, image_2):
        assert image_1.shape == image_2.shape
        self.seen.append(tuple(image_1.shape[-2:]))
        return super().estimate_flow(image_1, image_2)


@pytest.mark.parametrize(
    "resize, seen",
    [
        ("pad", [(60, 80), (52, 90)]),
        ("multiple", [(64, 64), (64, 64)]),
        ("40x200", [(40, 200), (40, 200)]),
        ("0.5", [(30, 40), (26, 45)]),
        ("2", [(120, 160), (104, 180)]),
    ],
)
def test_errors_are_in_pixels_of_the_originals_whatever_the_model_saw(tmp_path, typed, monkeypatch, resize, seen):
    samples = write_set(tmp_path / "kitti", "kitti2012")
    model = Watching(6.0, -4.0)
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: model)
    options = ("--data-root", tmp_path / "kitti", "--resize", resize, "--output-dir", tmp_path / "out")
    code, screen, err = typed("flow", "--model", "a.pt", *options)
    assert code == 0, err
    assert model.seen == seen

    def constant(frame_1: np.ndarray, frame_2: np.ndarray) -> np.ndarray:
        h, w = frame_1.shape[:2]
        inner_h, inner_w = seen[0] if (h, w) == (60, 80) else seen[1]
        return np.full((h, w, 2), (6.0 * w / inner_w, -4.0 * h / inner_h))

    label = "ours" if resize == "pad" else f"ours {resize}"
    check_report(samples, tmp_path / "out", screen, {"zero": zero, "dis": dis, label: constant})


def test_a_baseline_at_another_size_stands_beside_itself(tmp_path, typed):
    write_set(tmp_path / "data", "middlebury")
    options = ("--data-root", tmp_path / "data", "--resize", "32x32", "--output-dir", tmp_path / "out")
    code, screen, err = typed("flow", "--model", "dis", *options)
    assert code == 0, err
    rows = report_of(tmp_path / "out")["groups"]["all"]
    assert list(rows) == ["zero", "dis", "dis 32x32"] and rows["dis"] != rows["dis 32x32"]
    assert list(on_screen(screen)["all"]["mean over images"]) == list(rows)


@given(
    size=st.tuples(st.integers(5, 70), st.integers(5, 70)),
    resize=st.sampled_from(["pad", "multiple", "17x9", "0.3", "1.7"]),
)
@settings(max_examples=30, deadline=None)
def test_a_flow_comes_back_in_the_size_of_its_images(size, resize):
    seen = []

    def constant(image_1, image_2):
        seen.append(image_1.shape[-2:])
        return torch.tensor([2.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, *image_1.shape[-2:])

    flow = at_size(constant, resize)(torch.rand(1, 3, *size), torch.rand(1, 3, *size))
    (inner,) = seen
    assert flow.shape == (1, 2, *size)
    expected = np.array([2.0 * size[1] / inner[1], -3.0 * size[0] / inner[0]])
    np.testing.assert_allclose(flow[0].permute(1, 2, 0).numpy(), np.broadcast_to(expected, (*size, 2)), rtol=1e-5)
    for axis in (0, 1):
        if resize in ("0.3", "1.7"):
            assert abs(inner[axis] - float(resize) * size[axis]) <= 0.5
        if resize == "multiple":
            assert inner[axis] % 64 == 0 and (abs(inner[axis] - size[axis]) <= 32 or inner[axis] == 64)


@pytest.mark.parametrize("resize", ["multiple", "40x200", "0.5", "1.5"])
def test_a_flow_comes_back_to_the_place_where_it_was_seen(resize):
    """The method gives each point its distance from the left and the upper edge, in its own pixels."""

    def place(image_1, image_2):
        h, w = image_1.shape[-2:]
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        return torch.stack((x, y))[None]

    flow = at_size(place, resize)(torch.rand(1, 3, 61, 83), torch.rand(1, 3, 61, 83))[0].numpy()
    y, x = np.mgrid[:61, :83] + 0.5
    inside = (slice(3, -3), slice(3, -3))  # bilinear interpolation is flat within half a pixel of an edge
    np.testing.assert_allclose(flow[0][inside], x[inside], atol=1e-3)
    np.testing.assert_allclose(flow[1][inside], y[inside], atol=1e-3)


@pytest.mark.parametrize("resize", ["multiple", "120x120", "1.5"])
def test_images_keep_their_order_and_their_content_at_another_size(resize):
    frame_1, frame_2, _ = scene((3, -2))
    images = [torch.from_numpy(frame.copy()).permute(2, 0, 1)[None] / 255 for frame in (frame_1, frame_2)]
    flow = at_size(evaluate.dis_flow, resize)(*images)[0].numpy()
    assert np.abs(np.median(flow, axis=(1, 2)) - (3, -2)).max() < 0.3


@pytest.mark.parametrize("resize", ["big", "0", "0.0", "-1", "0x64", "64x0", "64x", "1.5x2", "64X64", "nan", "inf", ""])
def test_a_size_that_is_none_is_told_in_one_line(tmp_path, typed, resize):
    told = typed("flow", "--model", "zero", f"--resize={resize}", "--output-dir", tmp_path / "out")
    assert_one_line(told, "--resize", "0.5", "384x832")
    assert not (tmp_path / "out").exists()


def test_images_that_become_too_small_for_a_baseline_are_told_in_one_line(tmp_path, typed):
    options = ("--shapes-count", 1, "--shapes-size", 64, "--resize", "0.01", "--output-dir", tmp_path / "out")
    assert_one_line(typed("flow", "--model", "dis", *options), "1x1 px", "too small")
    code, _, err = typed("flow", "--model", "farneback", *options)
    assert code == 0, err


# ------------------------------------------------------------------------------------------------------ submission


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read_kitti(path: Path) -> np.ndarray:
    """By OpenCV and by torchvision, which have to agree; every pixel has to be there."""
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert stored.dtype == np.uint16 and stored.shape[2] == 3 and (stored[..., 0] == 1).all()
    flow, valid = _read_16bits_png_with_flow_and_valid_mask(str(path))
    assert valid.all()
    np.testing.assert_array_equal(flow.transpose(1, 2, 0), (stored[..., :0:-1].astype(np.float64) - 2**15) / 64)
    return flow.transpose(1, 2, 0)


def read_flo(path: Path) -> np.ndarray:
    flow = _read_flo(str(path)).transpose(1, 2, 0)
    np.testing.assert_array_equal(flow, cv2.readOpticalFlow(str(path)))
    return flow


@pytest.mark.parametrize(
    "name, path, resolution",
    [
        ("sintel", "{group}/{name}.flo", 0),
        ("kitti2012", "{name}.png", 1 / 128),
        ("kitti2015", "flow/{name}.png", 1 / 128),
        ("middlebury", "{name}.flo", 0),
        ("things", "{group}/{name}.flo", 0),
    ],
)
def test_what_is_to_be_submitted_is_what_was_measured(tmp_path, typed, name, path, resolution):
    samples, export = write_set(tmp_path / "data", name), tmp_path / "deep" / "to_submit"
    options = ("--export", export, "--pictures", 1, "--output-dir", tmp_path / "out")
    code, _, err = typed("flow", "--model", "dis", "--data-root", tmp_path / "data", "--benchmark", name, *options)
    assert code == 0, err
    paths = {path.format(group=sample.group, name=sample.name): sample for sample in samples}
    assert files_below(export) == sorted(paths)
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    measured = {(each["group"], each["name"]): each["dis"]["epe"] for each in report_of(tmp_path / "out")["scenes"]}
    for place, sample in paths.items():
        flow = (read_kitti if path.endswith("png") else read_flo)(export / place)
        expected = dis(sample.frame_1, sample.frame_2)
        assert np.abs(flow - expected).max() <= resolution + (1e-4 if resolution else 0)
        for region, pixels in sample.regions.items():
            if pixels.any():
                error = errors(flow, sample.truth, pixels)[0].mean()
                found = measured[sample.group, sample.name][region]
                assert error == pytest.approx(found, rel=1e-5, abs=1.5 * resolution)


def test_what_is_to_be_submitted_has_native_size_and_pixels_after_a_resize(tmp_path, typed, monkeypatch):
    write_set(tmp_path / "data", "sintel")
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: Constant(6.0, -4.0))
    options = ("--resize", "40x200", "--export", tmp_path / "to_submit", "--output-dir", tmp_path / "out")
    code, _, err = typed("flow", "--model", "a.pt", "--data-root", tmp_path / "data", *options)
    assert code == 0, err
    flow = read_flo(tmp_path / "to_submit/clean/market_2/frame_0001.flo")
    np.testing.assert_allclose(flow, np.full((60, 80, 2), (6.0 * 80 / 200, -4.0 * 60 / 40)), rtol=1e-5)


def test_flow_beyond_the_range_of_kittis_format_is_clipped_not_wrapped(tmp_path):
    flow = torch.tensor([[600.0, -600.0, 511.99, -512.0, 0.0, 1 / 64], [-1e6, 1e6, 0.3, -0.3, 511.0, -511.5]])
    evaluate.write_flow(tmp_path / "a" / "b.png", flow.view(1, 2, 2, 3))
    read = read_kitti(tmp_path / "a" / "b.png").reshape(6, 2).T
    assert np.abs(read - flow.numpy().clip(-512, 511 + 63 / 64)).max() <= 1 / 128
    assert files_below(tmp_path) == ["a/b.png"]


def test_a_submission_beyond_the_range_keeps_its_signs(tmp_path, typed, monkeypatch):
    write_set(tmp_path / "data", "kitti2012")
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: Constant(700.0, -700.0))
    options = ("--export", tmp_path / "to_submit", "--output-dir", tmp_path / "out")
    code, _, err = typed("flow", "--model", "a.pt", "--data-root", tmp_path / "data", *options)
    assert code == 0, err
    flow = read_kitti(tmp_path / "to_submit" / "000000_10.png")
    assert (flow[..., 0] == 511 + 63 / 64).all() and (flow[..., 1] == -512).all()


def write_testing(root: Path, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The part without truth: where each flow belongs in a submission, and its two frames."""
    if name == "sintel":
        pairs = {}
        for seed, (group, place) in enumerate((g, p) for g in ("clean", "final") for p in ("PERTURBED_x", "wall")):
            frames = clip(seed, bands(SLOW), bands(FAST))
            for number, frame in enumerate(frames, start=1):
                write(root / f"test/{group}/{place}/frame_{number:04d}.png", frame)
            for number in (1, 2):
                pairs[f"{group}/{place}/frame_{number:04d}.flo"] = (frames[number - 1], frames[number])
        return pairs
    pairs = {}
    for number in (0, 1):
        frames = clip(number, bands(SLOW, 60, 80 + 4 * number))
        for frame, ending in zip(frames, (10, 11), strict=True):
            folder = "image_2" if name == "kitti2015" else "image_0"
            write(root / f"testing/{folder}/{number:06d}_{ending}.png", frame)
        pairs[f"{'flow/' if name == 'kitti2015' else ''}{number:06d}_10.png"] = tuple(frames)
    return pairs


@pytest.mark.parametrize("name", ["sintel", "kitti2012", "kitti2015"])
@pytest.mark.parametrize("named", [True, False])
def test_the_flow_of_the_testing_split_is_written_for_every_pair(tmp_path, typed, name, named):
    pairs = write_testing(tmp_path / "data", name)
    write_set(tmp_path / "data", name)  # the training split beside it is left alone
    export = tmp_path / "to_submit"
    command = ("flow", "--model", "dis", "--data-root", tmp_path / "data", "--split", "testing")
    command += ("--benchmark", name) if named else ()
    code, screen, err = typed(*command, "--export", export, "--pictures", 1, "--output-dir", tmp_path / "out")
    assert code == 0 and err == ""
    assert f"flow of {len(pairs)} pairs" in screen and str(export) in screen
    assert files_below(export) == sorted(pairs)
    for place, frames in pairs.items():
        flow = (read_kitti if place.endswith("png") else read_flo)(export / place)
        assert np.abs(flow - dis(*frames)).max() <= (1 / 128 + 1e-4 if place.endswith("png") else 0)
    (picture,) = files_below(tmp_path / "out")  # and no flow.json: there is nothing to measure against
    panels = cv2.imread(str(tmp_path / "out" / picture))
    assert panels.shape == (2 * (60 + 16) + 2, 3 * (80 + 2) + 2, 3)


def test_the_testing_split_without_export_is_told_in_one_line(tmp_path, typed):
    write_testing(tmp_path / "data", "sintel")
    command = ("flow", "--model", "zero", "--data-root", tmp_path / "data", "--split", "testing")
    assert_one_line(typed(*command, "--output-dir", tmp_path / "out"), "--split testing", "--export")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sintel", "kitti2012", "kitti2015", "middlebury"])
def test_the_training_split_is_never_submitted_as_the_testing_split(tmp_path, typed, name):
    write_set(tmp_path / "data" / "unpacked", name)
    command = ("flow", "--model", "zero", "--data-root", tmp_path / "data", "--benchmark", name, "--split", "testing")
    told = typed(*command, "--export", tmp_path / "to_submit", "--output-dir", tmp_path / "out")
    assert_one_line(told, f"no testing part of {name}")
    assert files_below(tmp_path / "out") == [] and not (tmp_path / "to_submit").exists()


# -------------------------------------------------------------------------------------------------------- mistakes


def assert_one_line(told: tuple[int, str, str], *words: str) -> None:
    """Of a command that failed: exit code, stdout, stderr."""
    code, out, err = told
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert word in err


FRAMES = {
    "sintel": ("training/clean/alley_1/frame_0001.png", "training/final/alley_1/frame_0003.png"),
    "kitti2012": ("training/colored_0/000001_10.png", "training/colored_0/000000_11.png"),
    "kitti2015": ("training/image_2/000001_10.png", "training/image_2/000000_11.png"),
    "middlebury": ("other-data/Urban9/frame10.png", "other-data/Grove9/frame11.png"),
    "chairs": ("data/00002_img1.ppm", "data/00003_img2.ppm"),
    "things": (
        "frames_cleanpass/TEST/A/0000/left/0006.png",
        "frames_finalpass/TEST/A/0000/right/0007.png",
    ),
    "hd1k": ("hd1k_input/image_2/000000_0010.png", "hd1k_input/image_2/000000_0012.png"),
}
"""A first and a last frame of each set."""
FLOW_FOLDERS = {
    "sintel": "training/flow",
    "kitti2012": "training/flow_occ",
    "kitti2015": "training/flow_occ",
    "middlebury": "other-gt-flow",
    "things": "optical_flow",
    "hd1k": "hd1k_flow_gt",
}


@pytest.fixture
def refused(tmp_path, typed):
    """Runs the command on tmp_path/data, where it has to fail in one line, and to leave nothing."""

    def run(name: str, *words: str) -> None:
        arguments = ("--data-root", tmp_path / "data", "--benchmark", name, "--output-dir", tmp_path / "out")
        told = typed("flow", "--model", "zero", *arguments, "--export", tmp_path / "to_submit", "--pictures", 0)
        assert_one_line(told, *words)
        left = files_below(tmp_path / "out") + files_below(tmp_path / "to_submit")
        assert not [place for place in left if "flow.json" in place or ".partial" in place], left

    return run


@pytest.mark.parametrize("which", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pair_with_one_frame_is_a_mistake(tmp_path, refused, name, which):
    write_set(tmp_path / "data", name)
    (tmp_path / "data" / FRAMES[name][which]).unlink()
    refused(name, Path(FRAMES[name][which]).stem, "missing", "the other frame")


@pytest.mark.parametrize("half", ["frames", "flow"])
@pytest.mark.parametrize("name", NAMES)
def test_half_an_archive_is_a_mistake(tmp_path, refused, name, half):
    write_set(tmp_path / "data", name)
    for path in sorted((tmp_path / "data").rglob("*"), reverse=True):  # a folder comes after what is in it
        place = path.relative_to(tmp_path / "data").as_posix()
        is_flow = "_flow." in place if name == "chairs" else place.startswith(FLOW_FOLDERS[name])
        is_frame = path.suffix in (".png", ".ppm") and not is_flow and not re.search("flow_noc|occl|invalid|obj", place)
        if path.is_dir() and not list(path.iterdir()):
            path.rmdir()
        elif is_flow if half == "flow" else is_frame:
            path.is_dir() or path.unlink()
    refused(name, str(tmp_path / "data"), name, *(["no true flow of"] if half == "flow" else []))


def spoil(path: Path, how: str) -> None:
    """A file of flow, a mask or a frame becomes one that does not fit or cannot be read."""
    if how == "size":
        if path.parent.name in ("flow_occ", "flow_noc"):
            write_known(path, bands(SLOW, 40, 80), np.ones((40, 80), bool))
        else:
            write(path, bands(SLOW, 40, 80) if path.suffix != ".png" else np.full((40, 80), 255, np.uint8))
    elif how == "8 bits":
        write(path, np.full((60, 80, 3), 128, np.uint8))
    elif how == "magic":
        path.write_bytes(b"HEIP" + path.read_bytes()[4:])
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "empty":
        path.write_bytes(b"")


THINGS_FLOW = "optical_flow/TEST/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm"
SPOILT = [
    ("sintel", "training/flow/alley_1/frame_0001.flo", "size", "but its frames are 80x60"),
    ("kitti2012", "training/flow_occ/000000_10.png", "size", "but its frames are 80x60"),
    ("things", THINGS_FLOW, "size", "but its frames are 80x60"),
    ("middlebury", "other-data/Grove9/frame11.png", "size", "flow needs one size"),
    ("sintel", "training/occlusions/alley_1/frame_0001.png", "size", "a mask of 80x40"),
    ("sintel", "training/invalid/alley_1/frame_0002.png", "size", "a mask of 80x40"),
    ("kitti2015", "training/flow_noc/000000_10.png", "size", "a mask of 80x40"),
    ("kitti2015", "training/obj_map/000000_10.png", "size", "a mask of 80x40"),
    ("sintel", "training/occlusions/alley_1/frame_0001.png", "empty", "not a readable image"),
    ("kitti2012", "training/flow_occ/000000_10.png", "8 bits", "16-bit"),
    ("kitti2015", "training/flow_noc/000001_10.png", "8 bits", "16-bit"),
    ("hd1k", "hd1k_flow_gt/flow_occ/000001_0010.png", "8 bits", "16-bit"),
    ("sintel", "training/flow/market_2/frame_0001.flo", "magic", "not a .flo file"),
    ("middlebury", "other-gt-flow/Grove9/flow10.flo", "cut", "cut short"),
    ("chairs", "data/00003_flow.flo", "cut", "cut short"),
    ("chairs", "data/00003_img1.ppm", "cut", "not a readable image"),
    ("things", THINGS_FLOW, "cut", "cut short"),
    ("things", THINGS_FLOW, "magic", "not a .pfm file"),
    ("things", THINGS_FLOW, "empty", "not a .pfm file"),
]


@pytest.mark.parametrize("name, place, how, told", SPOILT, ids=[f"{n}-{p}-{how}" for n, p, how, _ in SPOILT])
def test_a_file_that_does_not_fit_is_named(tmp_path, refused, name, place, how, told):
    write_set(tmp_path / "data", name)
    spoil(tmp_path / "data" / place, how)
    refused(name, str(tmp_path / "data" / place), told)


def test_a_pair_of_which_nothing_is_valid_is_a_mistake(tmp_path, refused):
    write_sintel(tmp_path / "data")
    write(tmp_path / "data/training/invalid/alley_1/frame_0001.png", np.full((60, 80), 255, np.uint8))
    refused("sintel", "alley_1/frame_0001", "known")


def test_a_benchmark_that_is_not_there_is_a_mistake(tmp_path, refused):
    write_set(tmp_path / "data", "kitti2012")
    for name in NAMES:
        if name != "kitti2012":
            refused(name, f"no true flow of {name}", str(tmp_path / "data"))


@pytest.mark.parametrize("flags", [("--benchmark", "sintel"), ("--export", "x"), ("--split", "testing")])
def test_a_flag_about_data_needs_data(tmp_path, typed, flags):
    told = typed("flow", "--model", "zero", *flags, "--output-dir", tmp_path / "out")
    assert_one_line(told, flags[0], "--data-root")
    assert not (tmp_path / "out").exists()


def test_an_unknown_benchmark_is_refused_with_the_known_ones(tmp_path, typed):
    code, out, err = typed("flow", "--model", "zero", "--data-root", tmp_path, "--benchmark", "kitti")
    assert code != 0 and out == "" and all(name in err for name in NAMES)
