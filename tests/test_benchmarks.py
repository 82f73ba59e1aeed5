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
FAST = ((3, 1), (12, -9), (45, 4))
"""Motions of three bands of an image: shorter than 10 px, from 10 to 40 px, and longer."""
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
                stored[invalid] = (300, -200)
                write(root / f"training/invalid/{name}.png", 255 * invalid.astype(np.uint8))
            write(root / f"training/flow/{name}.flo", stored)
            known = ~unknown & ~(invalid if "invalid" in masks else False)
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
    """A clip of two frames and two cameras. The flow of its ends, out of the clip, lies there too, and is no pair."""
    samples = []
    for camera in ("left", "right"):
        flow = bands(FAST if camera == "left" else SLOW)
        frames = clip(len(camera), flow)
        for group in ("clean", "final"):
            for number, frame in zip((6, 7), frames, strict=True):
                write(
                    root / f"frames_{group}pass/TEST/A/0000/{camera}/{number:04d}.png",
                    frame // (1 + (group == "final")),
                )
        for direction, sign in (("future", 1), ("past", -1)):
            for number in (6, 7):
                leads_out = number == (7 if direction == "future" else 6)
                file = (
                    f"into_{direction}/{camera}/OpticalFlowInto{direction.title()}_{number:04d}_{camera[0].upper()}.pfm"
                )
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
        if begin := re.match(r"Flow on .*?(?:, (clean|final))?: \d+ pairs$", line):
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


def check_report(samples: list[Sample], folder: Path, screen: str, methods: dict, by_object: bool) -> None:
    """Numbers in flow.json, and those of the screen, against the oracle's."""
    report, shown = report_of(folder), on_screen(screen)
    assert [(s["group"], s["name"]) for s in report["scenes"]] == [(s.group, s.name) for s in samples]
    for scene, sample in zip(report["scenes"], samples, strict=True):
        assert scene["pixels"] == {name: region.sum() for name, region in sample.regions.items() if region.any()}
        for name, method in methods.items():
            error, outlier = errors(method(sample.frame_1, sample.frame_2), sample.truth, sample.regions["all"])
            assert scene[name]["epe"]["all"] == pytest.approx(error.mean(), rel=1e-4)
            assert scene[name]["f1"]["all"] == pytest.approx(outlier.mean(), abs=1e-6)
    groups = {sample.group for sample in samples}
    assert report["groups"].keys() == shown.keys() == {group or "all" for group in groups}
    for group in groups:
        rows = report["groups"][group or "all"]
        assert list(rows) == list(methods)
        for name, method in methods.items():
            expected = by_hand([sample for sample in samples if sample.group == group], method)
            assert_equal(rows[name], expected)
            for mean, title in (("per_pixel", "mean over pixels"), ("per_image", "mean over images")):
                row = shown[group or "all"][title][name]
                numbers = dict(expected[mean]["epe"])
                outliers = expected[mean]["f1"]
                numbers |= {f"F1-{r}": 100 * outliers[r] for r in (outliers if by_object else ["all"])}
                numbers |= {"s a pair": rows[name]["seconds"]}
                assert row == pytest.approx(numbers, abs=0.0051)
    for sample, scene in zip(samples, report["scenes"], strict=True):
        line = next(line for line in screen.splitlines() if line.startswith(f"{sample.group} {sample.name} ".lstrip()))
        assert list(map(float, line[24:].split())) == pytest.approx(
            [scene[m]["epe"]["all"] for m in methods], abs=0.0051
        )


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_is_measured_as_by_hand(tmp_path, typed, name):
    samples = write_set(tmp_path / "unpacked" / "here", name)
    samples.sort(key=lambda sample: sample.group)
    if name == "things":  # in the order of its files, not of the writer
        samples.sort(key=lambda sample: (sample.group, sample.name.split("_")[3:], sample.name))
        order = {"into_future_left": 0, "into_future_right": 1, "into_past_left": 2, "into_past_right": 3}
        samples.sort(key=lambda s: (s.group, order["into_{4}_{2}".format(*s.name.split("_"))]))
    code, screen, err = typed(
        "flow", "--model", "dis", "--data-root", tmp_path, "--benchmark", name, "--output-dir", tmp_path / "out"
    )
    assert code == 0 and err == ""
    check_report(samples, tmp_path / "out", screen, {"zero": zero, "dis": dis}, by_object=name.startswith("kitti"))
    pictures = {"_".join(filter(None, (s.group, s.name))).replace("/", "_") + ".png" for s in samples}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"flow.json", *pictures}


def test_kitti_as_a_user_types_it(tmp_path):
    samples = write_set(tmp_path / "kitti", "kitti2015")
    arguments = ("--benchmark", "kitti2015", "--export", tmp_path / "to_submit", "--output-dir", tmp_path / "out")
    run = in_subprocess("flow", "--model", "farneback", "--data-root", tmp_path, *arguments)
    assert run.returncode == 0 and run.stderr == ""
    methods = {"zero": zero, "dis": dis, "farneback": farneback}
    check_report(samples, tmp_path / "out", run.stdout, methods, by_object=True)
    assert sorted(path.name for path in (tmp_path / "to_submit" / "flow").iterdir()) == [
        "000000_10.png",
        "000001_10.png",
    ]
