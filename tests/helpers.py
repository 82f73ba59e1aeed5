"""What several test files share."""

import re
import signal
import struct
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sources.label_sets import ObjectVideo

# ------------------------------------------------------------------------------- numbers, for the tests of the method


def golden(name):
    """Numbers computed by the published code of others."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as archive:
        return {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}


def uniform(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    """Equal up to rounding, whatever the two types of numbers."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def assert_same_gradients(ours, theirs, *inputs):
    """Two functions of the same inputs have the same values and the same gradients of a random projection of them."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        values = function(*leaves)
        values = [values] if isinstance(values, torch.Tensor) else list(values)
        projection = sum((value * normal(k, *value.shape)).sum() for k, value in enumerate(values))
        results.append(values + list(torch.autograd.grad(projection, leaves)))
    for a, b in zip(*results, strict=True):
        close(a, b.detach())


# --------------------------------------------------------------------------------------- small files, as sets have them


seeds = st.integers(0, 2**31)


@contextmanager
def raises_one_line(kind, *words):
    """An error of that kind whose message is one line that contains all of the words."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message


def expand(pattern):
    """Brace expansion as in a shell: "a{b,c}d" is ["abd", "acd"]."""
    parts = re.split(r"\{(.*?)\}", pattern)
    return ["".join(each) for each in product(*(part.split(",") if i % 2 else [part] for i, part in enumerate(parts)))]


def write_image(path, size=(12, 16), colour=None, seed=0):
    """An image of one colour, or of noise. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise if colour is None else np.full_like(noise, colour)).save(path)
    return path


def write_images(root, names, size=(8, 12)):
    """An image under each name, an empty file where the name is not that of an image. Returns the last path."""
    for path in (root / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.suffix.lower() in (".png", ".ppm", ".jpg", ".jpeg"):
            write_image(path, size, (10, 20, 30))
    return path


def write_frames(folder, count, size=(80, 96), seed=0, name="{:03d}.png", first=0):
    """A clip of noise that moves by one pixel per frame. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    for index in range(count):
        cv2.imwrite(str(folder / name.format(first + index)), np.roll(picture, index, axis=1))
    return folder


def write_video(path, frames, codec="MJPG", rate=10.0):
    """A video file of uint8 (h, w, 3) frames, in OpenCV's order of colours. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(np.ascontiguousarray(frame))
    writer.release()
    return path


def cut_short(path):
    """Removes the second half of a file. Returns its path."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def write_mac_leftovers(folder):
    """Files ._NAME beside the others, and in a folder __MACOSX, as archives from a Mac contain them."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        apart = folder / "__MACOSX" / path.parent.relative_to(folder)
        apart.mkdir(parents=True, exist_ok=True)
        for place in (path.parent, apart):
            (place / f"._{path.name}").write_bytes(b"Mac OS X")


# ------------------------------------------------------------------------------------------------ true flow, benchmarks


def random_flow(seed, size=(5, 7)):
    """(h, w, 2) float32."""
    return np.random.default_rng(seed).normal(0, 50, (*size, 2)).astype(np.float32)


def write_flow_file(path, flow, known=None, order="<"):
    """True flow (h, w, 2) in the format of the file's ending. Returns the path.

    .pfm, as in FlyingThings3D: three channels, rows from the bottom to the top; the scale's sign is the byte order.
    .png, as in KITTI: red, green and blue are x, y, and whether they are known. Unknown pixels are zeros.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    h, w = flow.shape[:2]
    if path.suffix == ".flo":
        path.write_bytes(b"PIEH" + struct.pack("<ii", w, h) + flow.astype("<f4").tobytes())
    elif path.suffix == ".pfm":
        rows = np.concatenate((flow, np.zeros((h, w, 1))), axis=2)[::-1].astype(f"{order}f4")
        path.write_bytes(f"PF\n{w} {h}\n{-1.0 if order == '<' else 1.0}\n".encode() + rows.tobytes())
    else:
        known = np.ones((h, w), bool) if known is None else known
        stored = np.dstack((np.where(known[..., None], flow * 64 + 2**15, 0), known))
        cv2.imwrite(str(path), np.ascontiguousarray(np.round(stored).astype(np.uint16)[..., ::-1]))
    return path


def write_picture(path, picture):
    """A uint8 image (h, w) or (h, w, 3), in OpenCV's order of colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


def read_submission(path):
    """A flow file by OpenCV; every pixel has to be known."""
    if path.suffix == ".flo":
        return cv2.readOpticalFlow(str(path))
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert stored.dtype == np.uint16 and stored.shape[2] == 3 and (stored[..., 0] == 1).all()
    return (stored[..., :0:-1].astype(np.float64) - 2**15) / 64


FAST = ((3, 1), (6, 8), (12, -9), (24, 32), (45, 4))
"""Motions of the bands of an image: less than 10 px, 10, between, 40, and more."""
SLOW = ((2, 5), (-4, 0), (-1, 2))


FlowSample = namedtuple("FlowSample", "name group frame_1 frame_2 truth regions")
"""A pair of a benchmark as it was written: name, part, frames, true flow (h, w, 2) and regions (h, w)."""


def bands(motions, h=60, w=80):
    """A flow (h, w, 2) of horizontal bands, each with its motion."""
    flow = np.empty((h, w, 2), np.float32)
    for rows, motion in zip(np.array_split(np.arange(h), len(motions)), motions, strict=True):
        flow[rows] = motion
    return flow


def textured_clip(seed, *flows):
    """A textured frame, and those that follow along the flows; where no pixel lands a frame is grey."""
    h, w = flows[0].shape[:2]
    noise = np.random.default_rng(seed).integers(0, 256, (h // 3, w // 3, 3), dtype=np.uint8)
    frames = [cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)]
    for flow in flows:
        y, x = np.mgrid[:h, :w]
        x_end, y_end = x + flow[..., 0].astype(int), y + flow[..., 1].astype(int)
        inside = (x_end >= 0) & (x_end < w) & (y_end >= 0) & (y_end < h)
        following = np.full_like(frames[-1], 128)
        following[y_end[inside], x_end[inside]] = frames[-1][inside]
        frames.append(following)
    return frames


def write_clip(root, pattern, seed, *flows, first=1):
    """A textured clip along the flows, under the names that the pattern gives for its numbers. Returns the frames."""
    frames = textured_clip(seed, *flows)
    for number, frame in enumerate(frames, first):
        write_picture(root / pattern.format(number), frame)
    return frames


def rectangle(y, x, h=60, w=80):
    """A boolean mask (h, w) that is True on the rows and columns of two slices."""
    mask = np.zeros((h, w), bool)
    mask[y, x] = True
    return mask


def write_sintel(root, occlusions=True):
    """Two scenes; nothing in the second is faster than 10 px. Invalid pixels have a wrong flow, some are unknown."""
    samples = {"clean": [], "final": []}
    for seed, (place, motions) in enumerate({"alley_1": (FAST, FAST[::-1]), "market_2": (SLOW,)}.items()):
        flows = [bands(motion) for motion in motions]
        shown = {"clean": textured_clip(seed, *flows)}
        shown["final"] = [cv2.GaussianBlur(frame, (5, 5), 0) for frame in shown["clean"]]
        for group, frames in shown.items():
            for number, frame in enumerate(frames, start=1):
                write_picture(root / f"training/{group}/{place}/frame_{number:04d}.png", frame)
        for number, flow in enumerate(flows, start=1):
            name = f"{place}/frame_{number:04d}"
            occluded, invalid = rectangle(slice(10, 50), slice(0, 20 + seed)), rectangle(slice(15, 25), slice(10, 50))
            unknown = rectangle(slice(30, 33), slice(7, 60))
            stored, known = flow.copy(), ~unknown & ~invalid
            stored[unknown], stored[invalid] = 1e10, (300, -200) if seed else (1, 1)
            write_picture(root / f"training/invalid/{name}.png", 255 * invalid.astype(np.uint8))
            write_flow_file(root / f"training/flow/{name}.flo", stored)
            regions = {"all": known}
            if occlusions:
                write_picture(root / f"training/occlusions/{name}.png", 255 * occluded.astype(np.uint8))
                speed = np.hypot(flow[..., 0], flow[..., 1])
                regions |= {"matched": known & ~occluded, "unmatched": known & occluded, "0-10": known & (speed < 10)}
                regions |= {"10-40": known & (speed >= 10) & (speed < 40), "40+": known & (speed >= 40)}
            for group, frames in shown.items():
                samples[group].append(FlowSample(name, group, *frames[number - 1 : number + 1], flow, regions))
    return samples["clean"] + samples["final"]


def write_kitti_set(root, images):
    """Two pairs of two sizes; the flow is known at some pixels, and at fewer in flow_noc."""
    samples = []
    for seed, (motions, (h, w)) in enumerate(((FAST, (60, 80)), (SLOW, (52, 90)))):
        name, flow = f"{seed:06d}_10", bands(motions, h, w)
        frames = write_clip(root, f"training/{images}/{seed:06d}_{{}}.png", seed, flow, first=10)
        occ = np.random.default_rng(seed).random((h, w)) < 0.7
        noc = occ & ~rectangle(slice(5, 45), slice(50, w), h, w)
        write_flow_file(root / f"training/flow_occ/{name}.png", flow, occ)
        write_flow_file(root / f"training/flow_noc/{name}.png", flow, noc)
        regions = {"all": occ, "noc": noc}
        if images == "image_2":  # KITTI 2015
            first, second = (slice(12, 35), slice(20, 40)), (slice(40, 50), slice(5, 25))
            numbers = rectangle(*first, h, w) + np.uint8(2) * rectangle(*second, h, w)
            write_picture(root / f"training/obj_map/{name}.png", numbers)
            regions |= {"bg": occ & (numbers == 0), "fg": occ & (numbers > 0)}
        samples.append(FlowSample(name, "", *frames, flow, regions))
    return samples


def write_middlebury(root):
    samples = []
    for name, motions in {"Grove9": SLOW, "Urban9": FAST}.items():
        flow = bands(motions)
        frames = write_clip(root, f"other-data/{name}/frame{{}}.png", len(samples), flow, first=10)
        unknown = rectangle(slice(0, 22), slice(0, 9 + 10 * len(samples)))
        stored = np.where(unknown[..., None], np.float32(1.67e9), flow)
        write_flow_file(root / f"other-gt-flow/{name}/flow10.flo", stored)
        samples.append(FlowSample(name, "", *frames, flow, {"all": ~unknown}))
    return samples


def write_chairs(root):
    """Three pairs, of which the list calls the second and the third "validation"."""
    samples = []
    for number, motions in enumerate((((20, 20),), FAST, SLOW), start=1):
        flow = bands(motions)
        frames = write_clip(root, f"data/{number:05d}_img{{}}.ppm", number, flow)
        write_flow_file(root / f"data/{number:05d}_flow.flo", flow)
        samples.append(FlowSample(f"{number:05d}", "", *frames, flow, {"all": np.ones((60, 80), bool)}))
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n2\n")
    return samples[1:]


def write_things(root):
    """A clip with two cameras, and one to train on. The flow of its ends, out of the clip, is there too."""
    samples = []
    for camera in ("left", "right"):
        flow = bands(FAST if camera == "left" else SLOW)
        shown = {"clean": textured_clip(len(camera), flow)}
        shown["final"] = [frame // 2 for frame in shown["clean"]]
        for group, split, (number, place) in product(shown, ("TEST", "TRAIN"), ((6, 0), (7, 1))):
            path = root / f"frames_{group}pass/{split}/A/0000/{camera}/{number:04d}.png"
            write_picture(path, shown[group][place])
        # Flow into the past, on the second frame's grid, is not the true one: it is what a benchmark has to measure.
        for (direction, sign), number in product((("future", 1), ("past", -1)), (6, 7)):
            leads_out = number == (7 if direction == "future" else 6)
            name = f"OpticalFlowInto{direction.title()}_{number:04d}_{camera[0].upper()}.pfm"
            for split, values in (("TEST", 99 * flow if leads_out else sign * flow), ("TRAIN", 99 * flow)):
                write_flow_file(root / f"optical_flow/{split}/A/0000/into_{direction}/{camera}/{name}", values)
            for group in () if leads_out else shown:
                name = f"A_0000_{camera}_into_{direction}_{number:04d}"
                everywhere = {"all": np.ones((60, 80), bool)}
                samples.append(FlowSample(name, group, *shown[group][::sign], sign * flow, everywhere))
    return samples


def write_hd1k(root):
    """Two sequences; the flow of their last frames is there too, and is no pair."""
    samples = []
    for sequence, motions in enumerate(((SLOW, SLOW[::-1]), (FAST,))):
        flows = [bands(each) for each in motions]
        frames = write_clip(root, f"hd1k_input/image_2/{sequence:06d}_{{:04d}}.png", sequence, *flows, first=10)
        for number, flow in enumerate((*flows, 5 * flows[0]), start=10):
            known = np.random.default_rng(number).random((60, 80)) < 0.3 + 0.1 * (number - 9)
            write_flow_file(root / f"hd1k_flow_gt/flow_occ/{sequence:06d}_{number:04d}.png", flow, known)
            if number - 10 < len(flows):
                pair = frames[number - 10 : number - 8]
                samples.append(FlowSample(f"{sequence:06d}_{number:04d}", "", *pair, flow, {"all": known}))
    return samples


FLOW_SETS = {"sintel": write_sintel, "middlebury": write_middlebury, "chairs": write_chairs, "things": write_things}
FLOW_SETS |= {"hd1k": write_hd1k, "kitti2012": partial(write_kitti_set, images="colored_0")}
FLOW_SETS |= {"kitti2015": partial(write_kitti_set, images="image_2")}


def write_benchmark(root, name):
    """A tiny flow benchmark in its native layout, in `root`. Returns its pairs, as FlowSamples."""
    return FLOW_SETS[name](root)


def write_testing_split(root, name):
    """The part of a benchmark without truth: for the file of each flow in a submission, its two frames."""
    pairs = {}
    if name == "sintel":
        for seed, (group, place) in enumerate(product(("clean", "final"), ("PERTURBED_x", "wall"))):
            frames = write_clip(root, f"test/{group}/{place}/frame_{{:04d}}.png", seed, bands(SLOW), bands(FAST))
            for number, pair in enumerate(pairwise(frames), start=1):
                pairs[f"{group}/{place}/frame_{number:04d}.flo"] = pair
        return pairs
    for scene in (0, 1):
        images, flows = ("image_2", "flow/") if name == "kitti2015" else ("image_0", "")
        pattern, flow = f"testing/{images}/{scene:06d}_{{}}.png", bands(SLOW, 60, 80 + 4 * scene)
        pairs[f"{flows}{scene:06d}_10.png"] = tuple(write_clip(root, pattern, scene, flow, first=10))
    return pairs


# ------------------------------------------------------------------------------------------ labels of pixels, and masks


def voc_palette():
    """The colour map of Pascal VOC, uint8 (256, 3): the bits of a number go to red, green and blue in turn, from the
    lowest bit to the highest place."""
    colours = np.zeros((256, 3), np.uint8)
    for number, bit in product(range(256), range(8)):
        colours[number, bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
    return colours


def write_ids(path, ids, mode="P"):
    """Numbers (h, w) as a palette png of VOC, its colours (RGB, RGBA), grey (L), one bit (1), I;16, or I."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"I;16": np.uint16, "I": np.int32, "1": bool}
    image = Image.fromarray(ids.astype(kinds.get(mode, np.uint8)))
    if mode in ("P", "RGB", "RGBA"):
        image.putpalette(voc_palette().tobytes())
    if mode in ("RGB", "RGBA"):
        image = image.convert(mode)
    image.save(path)
    return path


def random_ids(seed, numbers, h=12, w=16):
    """uint8 (h, w) in which each of the numbers occurs, if there is room."""
    return np.random.default_rng(seed).permutation(np.resize(numbers, h * w)).reshape(h, w).astype(np.uint8)


LABEL_NUMBERS = {"voc": [*range(21), 255], "cityscapes": [*range(34)], "ade20k": [*range(151)], "camvid": [*range(12)]}
"""The numbers that the labels of each set hold."""
LABEL_IMAGES = {
    "voc": {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]},
    "cityscapes": {"train": ["aachen_000000_000019", "bochum_000003_000019"], "val": ["munster_000000_000019"]},
    "ade20k": {"train": ["ADE_train_00000001", "ADE_train_00000002"], "val": ["ADE_val_00000001"]},
    "camvid": {"train": ["0001TP_006690", "0001TP_006720"], "val": ["0016E5_07959"]},
}
LABEL_PLACES = {
    "voc": "JPEGImages/{name}.jpg SegmentationClass/{name}.png",
    "cityscapes": "leftImg8bit/{split}/{city}/{name}_leftImg8bit.png gtFine/{split}/{city}/{name}_gtFine_labelIds.png",
    "ade20k": "images/{part}/{name}.jpg annotations/{part}/{name}.png",
    "camvid": "{split}/{name}.png {split}annot/{name}.png",
}


def label_places(set_name, split, name):
    """Where an image and its labels lie in the set's own folder."""
    parts = {"split": split, "part": {"train": "training", "val": "validation"}[split], "city": name.split("_")[0]}
    return tuple(LABEL_PLACES[set_name].format(name=name, **parts).split())


def write_label_set(root, set_name, images=None):
    """A set of labelled images in its native layout, in `root`: all of its numbers occur in each of its labels."""
    for split, names in (images or LABEL_IMAGES[set_name]).items():
        for name in names:
            image, labels = (root / place for place in label_places(set_name, split, name))
            seed = sum(map(ord, name))
            write_image(image, seed=seed)
            write_ids(labels, random_ids(seed, LABEL_NUMBERS[set_name]), "P" if set_name == "voc" else "L")
        if set_name == "voc":
            lists = root / "ImageSets/Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("\n".join(names))
    return root


def block(number=1, h=12, w=16):
    """A mask with one object."""
    mask = np.zeros((h, w), np.uint8)
    mask[3:8, 4:10] = number
    return mask


def write_sequence(home, name, masks, frames=None, resolution="480p", mode="P"):
    """A sequence of DAVIS: its frames (RGB arrays, or noise), and those of its masks that are not None."""
    for index, mask in enumerate(masks):
        path = home / "JPEGImages" / resolution / name / f"{index:05d}.jpg"
        write_image(path, masks[0].shape, seed=index)
        if frames is not None:
            Image.fromarray(frames[index]).save(path, quality=100, subsampling=0)
        if mask is not None:
            write_ids(home / "Annotations" / resolution / name / f"{index:05d}.png", mask, mode)


def write_davis(home, names, resolution="480p"):
    """DAVIS without lists: sequences of three frames with one object."""
    for name in names:
        write_sequence(home, name, 3 * [block()], resolution=resolution)
    return home


def write_davis_lists(home, folder, files, **lists):
    """ImageSets/FOLDER/SPLIT.txt of DAVIS 2016 (the files of each sequence) or 2017 (its name)."""
    (home / "ImageSets" / folder).mkdir(parents=True, exist_ok=True)
    row = f"/JPEGImages/{folder}/{{0}}/{{1:05d}}.jpg /Annotations/{folder}/{{0}}/{{1:05d}}.png"
    for split, names in lists.items():
        lines = [row.format(name, i) for name in names for i in range(3)] if files else names
        (home / "ImageSets" / folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def texture(h, w, seed=0):
    """Cells of 8 px, each of its own colour, uint8 (3, h, w)."""
    cells = torch.randint(0, 256, (3, h // 8, w // 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return cells.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)


def moving_video(steps, objects=2):
    """A texture that moves by the given number of pixels to the right from frame to frame, with its masks."""
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[16:32, 16:40], mask[40:56, 24:40] = 1, objects
    places = np.cumsum([0, *steps]).tolist()
    return ObjectVideo(
        "moving",
        sorted({1, objects}),
        lambda t: texture(64, 96).roll(places[t], dims=2),
        lambda t: mask.roll(places[t], dims=1),
        [str(t) for t in range(len(places))],
    )


# ---------------------------------------------------------------------------------------------------- several processes


def torchrun(processes, function, *arguments, restarts=0):
    """Runs a function in processes that torchrun's agent starts. They are forked from this one, which saves the import
    of torch. Raises ChildFailedError if one fails."""

    def on_one_thread():
        torch.set_num_threads(1)  # the threads of this process, and OpenCV's, do not exist in a fork
        cv2.setNumThreads(0)
        function(*arguments)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    config = LaunchConfig(
        1, 1, processes, max_restarts=restarts, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="tests",
        start_method="fork", monitor_interval=0.05,
    )  # fmt: skip
    try:
        elastic_launch(config, on_one_thread)()
    finally:
        for number, handler in handlers.items():  # the agent has set its own
            signal.signal(number, handler)
