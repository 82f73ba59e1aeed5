"""Segmentation of images and of video objects: measures, linear head, propagation. Each test bears its claim."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import engine.log
import evaluate
import sources.label_sets
from data import PALETTE, VOID, NotThere, read_ids
from evaluate import (
    LinearHead,
    SegmentationConfig,
    Segmenter,
    Table1Config,
    VideoConfig,
    contour_accuracy,
    count_confusion,
    feature_method,
    feature_model,
    follow_objects,
    mean_iou,
    propagate_labels,
    region_similarity,
    run_segmentation,
    run_table1,
    run_video,
    shapes_videos,
    sliding_scores,
    statistics,
    window_starts,
)
from sources.label_sets import LabelAugmentation, ObjectVideo, find_labels, find_masked_videos

GOLDEN = Path(__file__).parent / "golden"


def random_masks(seed: int, count: int, h: int, w: int) -> torch.Tensor:
    """Blobs, some of which touch the border or are empty."""
    noise = torch.rand(count, 1, h, w, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)[:, 0]
    return smooth > torch.linspace(0.4, 0.6, count)[:, None, None]


# ----------------------------------------------------------------------------------------------------- measures


def test_region_and_contour_equal_the_official_evaluation_of_davis():
    golden = np.load(GOLDEN / "davis_jaccard_boundary.npz")
    masks = zip(torch.from_numpy(golden["annotation"]), torch.from_numpy(golden["prediction"]), strict=True)
    ours = np.array([(region_similarity(a, p), contour_accuracy(a, p)) for a, p in masks])
    np.testing.assert_allclose(ours[:, 0], golden["region_similarity_J"], atol=1e-9)
    np.testing.assert_allclose(ours[:, 1], golden["contour_accuracy_F"], atol=1e-9)


def contour_by_loops(mask: np.ndarray) -> list[tuple[int, int]]:
    h, w = mask.shape
    others = ((0, 1), (1, 0), (1, 1))
    return [
        (y, x)
        for y in range(h)
        for x in range(w)
        if any(mask[y, x] != mask[min(y + dy, h - 1), min(x + dx, w - 1)] for dy, dx in others)
    ]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), h=st.integers(3, 24), w=st.integers(3, 24))
def test_both_measures_of_davis_equal_plain_loops_and_do_not_depend_on_the_order(seed, h, w):
    a, b = random_masks(seed, 2, h, w)
    pixels = [(bool(a[y, x]), bool(b[y, x])) for y in range(h) for x in range(w)]
    union = sum(p or q for p, q in pixels)
    assert region_similarity(a, b) == pytest.approx(sum(p and q for p, q in pixels) / union if union else 1)
    one, other = contour_by_loops(a.numpy()), contour_by_loops(b.numpy())
    reach = math.ceil(0.008 * math.hypot(h, w))
    near = [
        [any((y - v) ** 2 + (x - u) ** 2 <= reach**2 for v, u in points) for y, x in mine]
        for mine, points in ((other, one), (one, other))
    ]
    if one and other:
        precision, recall = (sum(each) / len(each) for each in near)
        expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    else:
        expected = float(not one and not other)
    assert contour_accuracy(a, b) == pytest.approx(expected)
    assert region_similarity(a, b) == region_similarity(b, a)
    assert contour_accuracy(a, b) == pytest.approx(contour_accuracy(b, a))


def test_mean_iou_leaves_out_a_class_that_neither_occurs_nor_is_predicted():
    truth, guess = np.random.default_rng(0).integers(0, 4, (2, 500))
    truth[truth == 3], guess[guess == 2] = 0, 1  # class 2 is never predicted, class 3 never occurs
    confusion = torch.zeros(6, 6, dtype=torch.int64)  # classes 4 and 5: neither
    for t, g in zip(truth, guess, strict=True):
        confusion[t, g] += 1
    by_class = [((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum() for c in range(4)]
    assert mean_iou(confusion) == pytest.approx(np.mean(by_class)) and by_class[2] == by_class[3] == 0
    assert mean_iou(torch.eye(3, dtype=torch.int64)) == 1
    with pytest.raises(ValueError, match="no pixel"):
        mean_iou(torch.zeros(3, 3, dtype=torch.int64))


# ------------------------------------------------------------------------------------------ propagation of labels


def dense(target, context, labels, radius, topk, temperature):
    """All pairs of pixels, in float64; then those too far apart are struck out."""
    (h, w), n = target.shape[1:], len(context)
    target, context = (x.double() / x.double().norm(dim=-3, keepdim=True).clamp(min=1e-12) for x in (target, context))
    weights = torch.exp(torch.einsum("dp,ndq->pnq", target.flatten(1), context.flatten(2)) / temperature)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    far = [(v.flatten()[:, None] - v.flatten()[None]).abs() > radius for v in (y, x)]
    weights = weights.masked_fill((far[0] | far[1])[:, None], 0).flatten(1)
    smallest = weights.topk(min(topk, n * h * w)).values[:, -1:]
    weights = weights * (weights >= smallest)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (labels.double().transpose(0, 1).flatten(1) @ weights.T).view(-1, h, w)


def test_labels_are_propagated_as_by_the_code_of_dino():
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "label_propagation.npz").items()}
    ours = propagate_labels(
        golden["target_features"],
        golden["context_features"],
        golden["context_labels"],
        radius=int(golden["radius"]),
        topk=int(golden["topk"]),
        temperature=float(golden["temperature"]),
    )
    torch.testing.assert_close(ours, golden["propagated"], atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    h=st.integers(1, 17),
    w=st.integers(1, 17),
    n=st.integers(1, 3),
    radius=st.integers(0, 9),
    topk=st.integers(1, 6),
)
def test_tiles_give_what_all_pairs_give(seed, h, w, n, radius, topk):
    generator = torch.Generator().manual_seed(seed)
    target, context = (torch.randn(*size, generator=generator) for size in ((5, h, w), (n, 5, h, w)))
    labels = torch.rand(n, 3, h, w, generator=generator)
    ours = propagate_labels(target, context, labels, radius, topk)
    torch.testing.assert_close(ours.double(), dense(target, context, labels, radius, topk, 0.1), atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), radius=st.integers(1, 6))
def test_labels_stay_in_their_range_sum_to_one_and_do_not_depend_on_the_order_of_the_frames(seed, radius):
    generator = torch.Generator().manual_seed(seed)
    target, context = (torch.randn(*size, generator=generator) for size in ((6, 11, 9), (3, 6, 11, 9)))
    labels = torch.nn.functional.one_hot(torch.randint(0, 4, (3, 11, 9), generator=generator), 4).movedim(-1, 1).float()
    result = propagate_labels(target, context, labels, radius)
    assert result.min() >= 0 and torch.allclose(result.sum(dim=0), torch.ones(11, 9), atol=1e-5)
    turned = propagate_labels(target, context.flip(0), labels.flip(0), radius)
    torch.testing.assert_close(result, turned, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result, propagate_labels(7 * target, context, labels, radius), atol=1e-5, rtol=1e-4)


def test_an_object_that_moves_within_the_radius_takes_its_label_along_and_beyond_it_does_not():
    features = torch.randn(1, 16, 20, 40, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, 2, 20, 40)
    labels[0, 1, 5:12, 8:15], labels[0, 0] = 1, 1 - labels[0, 1]
    moved = features[0].roll(6, dims=2)
    expected = labels[0].roll(6, dims=2)
    near = propagate_labels(moved, features, labels, radius=6, topk=1)[:, :, 6:]
    assert torch.equal(near, expected[:, :, 6:])
    far = propagate_labels(moved, features, labels, radius=5, topk=1)
    assert (far[:, :, 6:] - expected[:, :, 6:]).abs().mean() > 0.05


# ------------------------------------------------------------------------------------------------- linear segmentation


@pytest.fixture(scope="module")
def pwc():
    return feature_model("random", "pwc")


def test_the_head_is_batch_norm_and_one_convolution_over_the_levels_side_by_side(pwc):
    torch.manual_seed(0)
    channels, strides = pwc.encoder.channels, pwc.encoder.strides
    head = LinearHead(channels, strides, 7).double().eval()
    for norm in head.norms:  # as after some training
        for values in (norm.weight, norm.bias, norm.running_mean):
            torch.nn.init.normal_(values)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    pyramid = [torch.randn(2, c, 128 // s, 192 // s).double() for c, s in zip(channels, strides, strict=True)]
    side_by_side = torch.cat(
        [
            F.interpolate(x, (32, 48), mode="bilinear")
            if s >= 4
            else x.unflatten(2, (32, 2)).unflatten(4, (48, 2)).mean((3, 5))
            for x, s in zip(pyramid, strides, strict=True)
        ],
        dim=1,
    )
    mean, variance, weight, bias = (
        torch.cat([getattr(norm, name) for norm in head.norms])[:, None, None]
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    normalised = (side_by_side - mean) / (variance + 1e-5).sqrt() * weight + bias
    matrix = torch.cat([classifier.weight[:, :, 0, 0] for classifier in head.classifiers], dim=1)
    expected = torch.einsum("kc,bchw->bkhw", matrix, normalised) + head.classifiers[0].bias[:, None, None]
    torch.testing.assert_close(head(pyramid), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(64, 64), (37, 81), (1, 5)])
def test_scores_have_the_size_of_the_image_whatever_it_is(pwc, size):
    scores = Segmenter(pwc, 5).eval()(torch.rand(1, 3, *size))
    assert scores.shape == (1, 5, *size) and scores.isfinite().all()


def test_frozen_features_stay_as_they_are_and_fine_tuned_ones_learn():
    images, labels = torch.rand(4, 3, 64, 64), torch.randint(0, 3, (4, 64, 64))
    for finetune in (False, True):
        segmenter = Segmenter(feature_model("random", "resnet50"), 3, finetune).train()
        before = {name: value.clone() for name, value in segmenter.model.encoder.state_dict().items()}
        optimizer = torch.optim.SGD(segmenter.parameters(), lr=0.1)
        F.cross_entropy(segmenter(images), labels).backward()
        optimizer.step()
        same = [torch.equal(value, before[name]) for name, value in segmenter.model.encoder.state_dict().items()]
        # Statistics of the normalisation layers too.
        assert all(same) != finetune and (not finetune or sum(same) < 10)
        assert all(p.grad is not None for p in segmenter.head.parameters())


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 300), window=st.integers(1, 100), stride=st.integers(1, 100))
def test_windows_cover_every_pixel_lie_inside_and_keep_their_distance(length, window, stride):
    stride = min(stride, window)
    starts = window_starts(length, window, stride)
    covered = np.zeros(length, bool)
    for start in starts:
        assert 0 <= start <= max(length - window, 0)
        covered[start : start + window] = True
    assert covered.all() and starts == sorted(set(starts))
    assert all(b - a <= stride for a, b in zip(starts, starts[1:], strict=False))
    assert len(starts) == (1 if length <= window else math.ceil((length - window) / stride) + 1)


def test_sliding_windows_give_the_mean_of_the_windows_that_see_a_pixel():
    image = torch.rand(1, 3, 41, 67)

    def segment(part):  # depends on the place in the window
        y = torch.arange(part.shape[2]).view(-1, 1)
        return torch.cat((part[:, :1] * y, part[:, 1:2]), dim=1)

    ours = sliding_scores(segment, image, window=20, stride=13)
    total, times = np.zeros((2, 41, 67)), np.zeros((41, 67))
    for top in (0, 13, 21):
        for left in (0, 13, 26, 39, 47):
            part = image[0, :, top : top + 20, left : left + 20].double().numpy()
            total[0, top : top + 20, left : left + 20] += part[0] * np.arange(20)[:, None]
            total[1, top : top + 20, left : left + 20] += part[1]
            times[top : top + 20, left : left + 20] += 1
    np.testing.assert_allclose(ours[0].numpy(), total / times, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 70), w=st.integers(1, 70), window=st.integers(1, 40))
def test_windows_of_a_network_without_context_give_what_the_whole_image_gives(h, w, window):
    image = torch.rand(1, 3, h, w)
    ours = sliding_scores(lambda part: part * 2 + 1, image, window, max(2 * window // 3, 1))
    torch.testing.assert_close(ours, image * 2 + 1)


def test_an_image_smaller_than_the_window_is_taken_whole():
    seen = []
    sliding_scores(lambda part: seen.append(part.shape) or part, torch.rand(1, 3, 30, 700), 512, 341)
    assert seen == [(1, 3, 30, 512)] * 2
    seen.clear()
    sliding_scores(lambda part: seen.append(part.shape) or part, torch.rand(1, 3, 511, 512), 512, 341)
    assert seen == [(1, 3, 511, 512)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_confusion_counts_pixels_one_by_one_and_void_never(seed):
    generator = torch.Generator().manual_seed(seed)
    truth, guess = torch.randint(0, 5, (2, 9, 13), generator=generator)
    truth[torch.rand(9, 13, generator=generator) < 0.3] = VOID
    expected = np.zeros((5, 5), int)
    for t, g in zip(truth.flatten().tolist(), guess.flatten().tolist(), strict=True):
        if t != VOID:
            expected[t, g] += 1
    confusion = count_confusion(truth, guess, 5)
    np.testing.assert_array_equal(confusion.numpy(), expected)
    changed = torch.where(truth == VOID, torch.randint(0, 5, (9, 13), generator=generator), guess)
    assert torch.equal(count_confusion(truth, changed, 5), confusion)
    known = truth != VOID
    by_class = [
        ((truth == c) & (guess == c)).sum() / ((truth == c) | (known & (guess == c))).sum()
        for c in range(5)
        if ((truth == c) | (known & (guess == c))).any()
    ]
    assert mean_iou(confusion) == pytest.approx(float(np.mean(by_class)))


def write_camvid(root: Path, count: int = 6, void: bool = True) -> Path:
    """Red, green and blue stripes whose class is their colour; some pixels are void, and of the wrong colour."""
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for number in range(count):
            labels = np.repeat(np.repeat(rng.integers(0, 3, (4, 5)), 16, axis=0), 16, axis=1).astype(np.uint8)
            image = colours[labels] + rng.integers(0, 20, (64, 80, 3)).astype(np.uint8)
            if void:
                labels[:16, :16], image[:16, :16] = 11, rng.integers(0, 255, (16, 16, 3))
            Image.fromarray(image).save(root / split / f"{number}.png")
            Image.fromarray(labels).save(root / f"{split}annot" / f"{number}.png")
    return root


def small(tmp_path: Path, **options) -> SegmentationConfig:
    """Segmentation in seconds."""
    settings = {"model": "random", "encoder": "pwc", "output_dir": tmp_path / "run", "steps": 6, "warmup": 2}
    settings |= {"batch": 2, "crop": 48, "size": 48, "shapes_count": 3, "pictures": 1}
    return SegmentationConfig(**(settings | options))


def test_a_linear_head_learns_classes_that_are_colours_and_the_numbers_are_those_of_its_predictions(tmp_path, capsys):
    root = write_camvid(tmp_path / "CamVid")
    config = small(tmp_path, data_root=root, steps=60, batch=4, size=64, pictures=6, learning_rate=0.02)
    report = run_segmentation(config)
    assert report["settings"]["training_images"] == 6
    assert report["miou"] > 0.6 and report["pixel_accuracy"] > 0.75
    assert report["iou"]["sky"] > 0.5 and report["iou"]["car"] in (None, 0)
    confusion = np.array(report["confusion"])
    assert confusion.sum() == 6 * (64 * 80 - 256)  # void does not count
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    assert report["miou"] == pytest.approx(np.mean((np.diag(confusion) / np.maximum(union, 1))[union > 0]))
    assert report == json.loads((config.output_dir / "segmentation.json").read_text())
    assert f"mIoU {100 * report['miou']:.2f}%" in capsys.readouterr().out
    # The figure's third panel is the prediction in CamVid's colours, and the second the truth, black where void.
    figure = np.array(Image.open(config.output_dir / "pictures" / "image_0000.png"))
    truth = figure[2 + 14 : 2 + 14 + 64, 2 + 82 : 2 + 82 + 80]
    labels = np.array(Image.open(root / "valannot" / "0.png"))
    own = np.array([[128, 128, 128], [128, 0, 0], [192, 192, 128]], np.uint8)
    np.testing.assert_array_equal(truth, np.where(labels[..., None] == 11, 0, own[labels.clip(max=2)]))


@pytest.mark.parametrize("finetune", [False, True])
def test_training_that_goes_on_gives_the_same_weights_bit_for_bit_whatever_the_number_of_workers(tmp_path, finetune):
    whole = small(tmp_path, finetune=finetune)
    run_segmentation(whole)
    parts = replace(whole, output_dir=tmp_path / "parts", checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patch:  # stopped at the third step
        patch.setattr(engine.log.Log, "advance", stop_after(3))
        with pytest.raises(KeyboardInterrupt):
            run_segmentation(parts)
    assert torch.load(parts.output_dir / "checkpoint.pt", weights_only=True)["step"] == 2
    run_segmentation(replace(parts, resume=True, workers=1))
    one, other = (
        torch.load(config.output_dir / "checkpoint.pt", weights_only=True)["model"] for config in (whole, parts)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    steps = [json.loads(line)["step"] for line in (parts.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 6


def stop_after(count: int):
    calls = []

    def advance(self, steps=1, text=None):
        calls.append(steps)
        if len(calls) == count:
            raise KeyboardInterrupt

    return advance


def test_a_finished_run_is_only_measured_again_and_a_foreign_one_is_refused(tmp_path):
    config = small(tmp_path)
    first = run_segmentation(config)
    before = (config.output_dir / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="already holds a run: go on with --resume"):
        run_segmentation(config)
    again = run_segmentation(replace(config, resume=True))
    assert again["confusion"] == first["confusion"]
    with pytest.raises(ValueError, match="another configuration .*learning_rate: 0.01 there, 0.1 here"):
        run_segmentation(replace(config, resume=True, learning_rate=0.1))
    with pytest.raises(ValueError, match="another configuration"):
        run_segmentation(replace(config, resume=True, data_root=write_camvid(tmp_path / "CamVid")))
    assert (config.output_dir / "checkpoint.pt").read_bytes() == before
    with pytest.raises(FileNotFoundError, match="no such checkpoint; leave --resume out"):
        run_segmentation(replace(config, resume=True, output_dir=tmp_path / "nothing"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"benchmark": "voc"}, "--benchmark is about --data-root"),
        ({"batch": 0}, "--batch must be positive"),
        ({"crop": -1}, "--crop must be positive"),
        ({"window_stride": 49}, "choose 1 to 48, or windows leave gaps"),
        ({"window_stride": 0}, "choose 1 to 48"),
        ({"batch": 1}, "--batch 1 with --crop 48: batch norm needs more than one cell"),
        ({"shapes_count": 0}, "--shapes-count"),
        ({"model": "nowhere.pt"}, "nowhere.pt: no such checkpoint, nor a baseline"),
    ],
)
def test_settings_that_cannot_work_are_told_before_anything_is_written(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        run_segmentation(small(tmp_path, **options))
    assert not (tmp_path / "run").exists()


def test_a_batch_without_a_counted_pixel_changes_no_weight_to_nan(tmp_path):
    root = write_camvid(tmp_path / "CamVid")
    for path in (root / "trainannot").iterdir():
        Image.fromarray(np.full((64, 80), 11, np.uint8)).save(path)
    run_segmentation(small(tmp_path, data_root=root))
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())


def test_a_torchvision_file_gives_torchvisions_features(tmp_path):
    torch.manual_seed(1)
    network = torchvision.models.resnet50(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "resnet50.pth")
    images = torch.rand(1, 3, 64, 64)
    features = feature_method(str(tmp_path / "resnet50.pth"), 32)(images)
    normalised = torchvision.transforms.functional.normalize(
        images, evaluate.IMAGENET_MEAN, evaluate.IMAGENET_DEVIATION
    )
    body = torch.nn.Sequential(*list(network.children())[:-2])
    torch.testing.assert_close(features, body(normalised)[0].detach(), rtol=1e-4, atol=1e-4)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: neither a checkpoint of train.py nor a state dict"):
        feature_model(str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="--stride 64: the features have strides 32, 16, 8, 4, 2"):
        feature_method(str(tmp_path / "resnet50.pth"), 64)


def test_what_lies_in_the_file_of_a_model_counts_and_not_where_it_lies(tmp_path):
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "a.pth")
    config = small(tmp_path, model=str(tmp_path / "a.pth"), steps=2)
    first = run_segmentation(config)
    moved = (tmp_path / "a.pth").rename(tmp_path / "b.pth")
    assert run_segmentation(replace(config, model=str(moved), resume=True))["confusion"] == first["confusion"]
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="another configuration .weights: "):
        run_segmentation(replace(config, resume=True))


def test_a_checkpoint_holds_what_learns_and_nothing_else(tmp_path):
    for finetune in (False, True):
        run_segmentation(small(tmp_path, finetune=finetune, output_dir=tmp_path / str(finetune), steps=2))
        state = torch.load(tmp_path / str(finetune) / "checkpoint.pt", weights_only=True)["model"]
        assert {name.split(".")[0] for name in state} == ({"head", "encoder"} if finetune else {"head"})


@pytest.mark.parametrize("content", [b"encoder: x", b"a: 1\n", b"set", b"RIFF1234WEBPVP8 ", b"", b"\x80\x04."])
def test_a_file_that_is_no_checkpoint_is_told_in_one_line(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="x.pt: not a checkpoint"):
        feature_model(str(tmp_path / "x.pt"))


def test_a_checkpoint_of_segmentation_is_no_model(tmp_path):
    run_segmentation(small(tmp_path, steps=2))
    with pytest.raises(ValueError, match="a checkpoint of evaluate.py segmentation; take the one of train.py"):
        feature_model(str(tmp_path / "run" / "checkpoint.pt"))


def test_the_channels_of_an_image_keep_their_order_and_its_labels_their_place():
    """A gradient in x, in red alone, whose labels are its columns: no draw of the augmentation may part the two."""
    image = torch.zeros(3, 60, 100, dtype=torch.uint8)
    image[0] = torch.arange(60, 160)
    labels = torch.arange(100).expand(60, 100).contiguous()
    torch.manual_seed(0)
    offsets = []
    for _ in range(60):
        view, moved = LabelAugmentation(crop=40, size=60)(image, labels)
        seen = moved != VOID
        assert view[0][seen].mean() > 1.5 * view[1:, seen].mean(dim=1).max()
    augmentation = LabelAugmentation(crop=40, size=60)
    augmentation.change = lambda view: view.float() / 255  # no colours: the column can be read from the red
    for _ in range(200):
        view, moved = augmentation(image, labels)
        seen = (moved != VOID) & (moved > 3) & (moved < 96)
        if seen.any():
            offsets.append((255 * view[0][seen] - 60 - moved[seen]).mean())
    assert abs(torch.stack(offsets).mean()) < 0.1  # torchvision's "nearest" has 0.5


def test_void_is_told_from_a_black_class_in_pictures():
    image, labels = torch.zeros(3, 20, 30, dtype=torch.uint8), torch.zeros(20, 30, dtype=torch.int64)
    labels[:, 15:] = VOID
    for colours, void in ((PALETTE[:3], PALETTE[VOID]), (PALETTE[1:4], np.zeros(3))):
        figure = evaluate.labels_figure(image, labels, torch.zeros_like(labels), ("a", "b", "c"), colours)
        np.testing.assert_array_equal(figure[:, 2 + 14 + 10, 2 + 32 + 20].numpy(), void)


# -------------------------------------------------------------------------------------------------- objects in a video


def texture(h: int, w: int, seed: int = 0) -> torch.Tensor:
    """Cells of 8 px, each of its own colour, uint8 (3, h, w)."""
    cells = torch.randint(0, 256, (3, h // 8, w // 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return cells.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)


def moving_video(steps: list[int], objects: int = 2) -> ObjectVideo:
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


@pytest.mark.parametrize("context", [0, 7])
def test_masks_follow_a_texture_that_moves_by_whole_cells(context):
    video = moving_video([8, 0, -8, 16])
    config = VideoConfig("colour", topk=1, context=context)
    for index, mask in enumerate(follow_objects(video, feature_method("colour", 8), config)):
        # Labels are those of cells, enlarged bilinearly: they differ at the rims only.
        assert (mask == video.masks(index)).float().mean() > 0.95
        inner = F.max_pool2d((video.masks(index) == 0).float()[None, None], 9, 1, 4)[0, 0] == 0
        assert torch.equal(mask[inner], video.masks(index)[inner])
        assert mask.dtype == torch.uint8 and set(mask.unique().tolist()) <= {0, 1, 2}


def test_the_first_frame_and_the_last_ones_give_the_labels_and_no_others(monkeypatch):
    seen = []

    def record(target, context, labels, *options):
        seen.append(context[:, 0, 0, 0].tolist())
        return labels[0]

    monkeypatch.setattr(evaluate, "propagate_labels", record)
    video = moving_video([0] * 6)._replace(frames=lambda t: torch.full((3, 64, 96), t, dtype=torch.uint8))
    for _ in follow_objects(video, lambda image: image[0, :, ::8, ::8] * 255, VideoConfig("colour", context=3)):
        pass
    assert [[round(x) for x in frames] for frames in seen] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5]
    ]  # fmt: skip


def test_ids_that_are_not_consecutive_come_back_as_they_were():
    masks = list(follow_objects(moving_video([8, 8], objects=7), feature_method("colour", 8), VideoConfig("colour")))
    assert all(set(mask.unique().tolist()) == {0, 1, 7} for mask in masks)


def test_standardised_channels_have_mean_0_and_deviation_1_in_the_first_frame(monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluate, "propagate_labels", lambda now, known, labels, *_: seen.append((now, known)) or labels[0]
    )
    features = feature_method("colour", 8)
    list(follow_objects(moving_video([8]), features, VideoConfig("colour", standardise=True)))
    (now, known), plain = seen[0], features(moving_video([8]).frames(0)[None].float() / 255)
    torch.testing.assert_close(known[0].mean(dim=(1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(known[0].std(dim=(1, 2), correction=0), torch.ones(3))
    # The next frame by the numbers of the first.
    mean, deviation = plain.mean(dim=(1, 2), keepdim=True), plain.std(dim=(1, 2), keepdim=True, correction=0)
    later = features(moving_video([8]).frames(1)[None].float() / 255)
    torch.testing.assert_close(now, (later - mean) / deviation, atol=1e-4, rtol=1e-4)


def test_a_channel_that_is_dead_in_the_first_frame_does_not_outshout_the_others(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "propagate_labels", lambda now, known, labels, *_: seen.append(now) or labels[0])
    wakes = iter([torch.zeros(1, 8, 12), torch.full((1, 8, 12), 0.1)])

    def features(image):
        return torch.cat((F.avg_pool2d(image, 8)[0], next(wakes)))

    list(follow_objects(moving_video([8]), features, VideoConfig("colour", standardise=True)))
    assert seen[0][3].abs().max() < 200  # 0.1 over a hundredth of the median deviation, not over a millionth


def test_an_object_that_fills_every_frame_keeps_it():
    everywhere = torch.ones(64, 96, dtype=torch.uint8)
    full = moving_video([8, 8])._replace(objects=[1], masks=lambda t: everywhere)
    assert all(torch.equal(m, everywhere) for m in follow_objects(full, feature_method("colour", 8), VideoConfig("x")))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_told_and_never_measured(bad):
    poisoned = lambda image: F.avg_pool2d(image, 8)[0] * bad  # noqa: E731
    with pytest.raises(ValueError, match="moving: the features are not finite"):
        list(follow_objects(moving_video([8]), poisoned, VideoConfig("colour")))


def test_scores_that_are_not_finite_are_told_and_never_measured(tmp_path):
    flags = {"encoder": "pwc", "steps": 1, "batch": 2, "crop": 64, "size": 64, "shapes_count": 1}
    config = SegmentationConfig("random", output_dir=tmp_path / "out", learning_rate=math.inf, **flags)
    with pytest.raises(ValueError, match="image 0: the scores are not finite"):
        run_segmentation(config)
    assert not (tmp_path / "out" / "segmentation.json").exists()


def test_a_shorter_training_has_a_shorter_warm_up():
    assert evaluate.read_recipe(SegmentationConfig("random"), "voc").warmup == 1500
    assert evaluate.read_recipe(SegmentationConfig("random", steps=300), "voc").warmup == 30
    assert evaluate.read_recipe(SegmentationConfig("random", steps=300, warmup=200), "voc").warmup == 200


@pytest.mark.parametrize("flag", ["crop", "size"])
def test_a_size_that_is_a_slip_of_the_hand_is_told(flag):
    with pytest.raises(ValueError, match="can be 8192 px at most"):
        evaluate.read_recipe(SegmentationConfig("random", **{flag: 100_000_000}), "voc")
    with pytest.raises(ValueError, match="can be 8192 px at most"):
        run_video(VideoConfig("colour", size=100_000_000))


def test_a_run_of_train_py_is_not_gone_on_with(tmp_path):
    state = {"model": {}, "optimizer": {}, "step": 1, "config": {"model": {"encoder": "pwc"}, "loss": {}}}
    (tmp_path / "out").mkdir()
    torch.save(state, tmp_path / "out" / "checkpoint.pt")
    config = SegmentationConfig("random", encoder="pwc", output_dir=tmp_path / "out", resume=True, size=64, crop=64)
    with pytest.raises(ValueError, match="checkpoint.pt: a checkpoint of train.py; give another --output-dir"):
        run_segmentation(config)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=120))
def test_statistics_over_frames_are_those_of_davis(values):
    n = len(values)
    # 1-based borders of four quarters, rounded to even as NumPy does; neighbours share their border.
    borders = [round(1 + k * (n - 1) / 4 + 1e-10) - 1 for k in range(5)]
    first, last = values[borders[0] : borders[1] + 1], values[borders[3] : borders[4] + 1]
    ours = statistics(values)
    assert ours["mean"] == pytest.approx(sum(values) / n, abs=1e-9)
    assert ours["recall"] == pytest.approx(sum(v > 0.5 for v in values) / n)
    assert ours["decay"] == pytest.approx(sum(first) / len(first) - sum(last) / len(last), abs=1e-9)


def test_moving_shapes_are_videos_with_objects_and_their_numbers_are_those_of_the_masks(tmp_path, capsys):
    videos = list(shapes_videos(3, 5, 64))
    assert len({video.name for video in videos}) == 3
    for video in videos:
        assert video.objects == sorted(set(video.masks(0).unique().tolist()) - {0}) and video.length == 5
        assert video.frames(4).shape == (3, 64, 64) and video.frames(4).dtype == torch.uint8
    config = VideoConfig("colour", shapes_count=3, shapes_frames=5, shapes_size=64, output_dir=tmp_path, pictures=2)
    report = run_video(replace(config, export=tmp_path / "masks"))
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.mp4"))) == 2
    values = []
    for video in videos:
        for number in video.objects:
            for t in (1, 2, 3):  # neither the first frame nor the last
                ours = np.array(Image.open(tmp_path / "masks" / video.name / f"{t:05d}.png")) == number
                truth = video.masks(t).numpy() == number
                union = (ours | truth).sum()
                values.append((ours & truth).sum() / union if union else 1.0)
    assert report["mean"]["J_mean"] == pytest.approx(np.mean(values))
    assert f"{100 * report['mean']['J&F']:.2f}" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- Table 1


def test_the_row_of_table_1_has_each_number_in_its_column_and_blanks_where_nothing_is(tmp_path, monkeypatch, capsys):
    epe = lambda value: {"per_image": {"epe": {"all": value}}}  # noqa: E731

    def flow(config):
        if config.benchmark == "kitti2015":
            raise NotThere("no kitti here")
        assert config.encoder == "convnext_tiny"
        groups = {"clean": {"random": epe(1.5)}, "final": {"random": epe(2.5)}}
        return {"label": "random", "groups": groups, "notes": ["2 of 5 pairs left out"]}

    def segmentation(config):
        if config.benchmark == "cityscapes":
            raise NotThere("no cityscapes here")
        miou = {"voc": 0.25, "ade20k": 0.125}[config.benchmark] + 0.5 * config.finetune
        return {"miou": miou, "notes": ["1464 training images"] * (config.benchmark == "voc")}

    monkeypatch.setattr(evaluate, "run_flow", flow)
    monkeypatch.setattr(evaluate, "run_segmentation", segmentation)
    monkeypatch.setattr(evaluate, "run_video", lambda config: {"mean": {"J&F": 0.625}, "notes": ["no list"]})
    run_table1(Table1Config("random", data_root=tmp_path, output_dir=tmp_path / "out"))
    lines = capsys.readouterr().out.splitlines()
    ours = next(line for line in lines if line.startswith("ours")).split()[1:]
    assert ours == ["1.50", "2.50", "-", "25.00", "75.00", "-", "-", "12.50", "62.50", "62.50"]
    paper = next(line for line in lines if line.startswith("paper: MC-JEPA")).split()[2:]
    assert paper == ["2.81", "3.51", "2.67", "67.10", "79.90", "65.50", "78.40", "30.80", "44.20", "70.50"]
    assert "note: flow of kitti2015: no kitti here" in lines
    # What a number was measured on stands beside it.
    for note in ("flow of sintel: 2 of 5 pairs left out", "segmentation of VOC: 1464 training images"):
        assert lines.count(f"note: {note}") == 1
    assert "note: video of DAVIS 2017: no list" in lines
    measured = json.loads((tmp_path / "out" / "table1.json").read_text())["measured"]
    assert measured["DAVIS 2017 J&F"] == 62.5 and "KITTI 2015 EPE" not in measured


def test_what_is_broken_is_told_at_the_end_of_table_1_and_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    def video(config):
        raise ValueError("00001.png: broken")

    monkeypatch.setattr(evaluate, "run_segmentation", lambda config: {"miou": 0.5, "notes": []})
    monkeypatch.setattr(evaluate, "run_video", video)
    config = Table1Config("random", data_root=tmp_path, output_dir=tmp_path / "out", encoder="pwc")
    with pytest.raises(ValueError, match="--steps must be positive"):  # before anything is written
        run_table1(replace(config, steps=0))
    assert not config.output_dir.exists()
    with pytest.raises(ValueError, match="video of DAVIS 2017: 00001.png: broken"):
        run_table1(config)
    lines = capsys.readouterr().out.splitlines()
    ours = next(line for line in lines if line.startswith("ours")).split()[1:]
    assert ours == ["-"] * 3 + ["50.00"] * 6 + ["-"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds none of the benchmarks"):
        run_table1(config)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        run_table1(replace(config, data_root=tmp_path / "nowhere"))


def test_a_folder_takes_the_row_of_one_model_only(tmp_path, monkeypatch):
    for name in ("flow", "segmentation", "video"):
        monkeypatch.setattr(evaluate, f"table1_{name}", lambda *_: ({("VOC", "frozen"): 1.0}, []))
    config = Table1Config("random", encoder="pwc", output_dir=tmp_path / "out")
    run_table1(config)
    run_table1(config)  # again
    before = (tmp_path / "out" / "table1.json").read_bytes()
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    for other in (replace(config, steps=3), replace(config, model=str(tmp_path / "resnet50.pth"))):
        with pytest.raises(ValueError, match="holds the row of another model or --steps: give another --output-dir"):
            run_table1(other)
    assert (tmp_path / "out" / "table1.json").read_bytes() == before


def test_a_backbone_without_an_estimator_has_no_flow_in_its_row(tmp_path, monkeypatch, capsys):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    asked = []
    for name in ("flow", "segmentation", "video"):
        monkeypatch.setattr(
            evaluate, f"table1_{name}", lambda *_, name=name: asked.append(name) or ({("x", "y"): 1.0}, [])
        )
    run_table1(Table1Config(str(tmp_path / "resnet50.pth"), output_dir=tmp_path / "out"))
    assert asked == ["segmentation", "segmentation", "video"]
    assert "note: no flow: this model has no estimator" in capsys.readouterr().out


# ------------------------------------------------------------------------------- data sets beside others of their kind


def write_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_another_year_of_voc_is_not_voc_2012(tmp_path):
    for year, count in (("VOC2007", 3), ("VOC2012", 2)):
        home = tmp_path / "VOCdevkit" / year
        for number in range(count):
            write_png(home / "SegmentationClass" / f"{number}.png", np.zeros((8, 8), np.uint8))
            write_png(home / "JPEGImages" / f"{number}.jpg", np.zeros((8, 8, 3), np.uint8))
        (home / "ImageSets" / "Segmentation").mkdir(parents=True)
        for split in ("train", "val"):
            (home / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(map(str, range(count))))
    assert len(find_labels(tmp_path, "voc", "val")[1]) == 2
    with pytest.raises(NotThere):
        find_labels(tmp_path / "VOCdevkit" / "VOC2007", "voc", "val")


def write_davis(home: Path, lists: dict[str, str]) -> None:
    write_png(home / "JPEGImages" / "480p" / "a" / "00000.jpg", np.zeros((8, 8, 3), np.uint8))
    write_png(home / "Annotations" / "480p" / "a" / "00000.png", np.ones((8, 8), np.uint8))
    for name, text in lists.items():
        (home / "ImageSets" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "ImageSets" / name).write_text(text)


def test_davis_is_found_beside_voc_and_beside_its_other_year(tmp_path):
    write_png(tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / "1.jpg", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "VOCdevkit" / "VOC2012" / "Annotations").mkdir()
    write_davis(tmp_path / "new", {"2017/val.txt": "a\n"})
    assert [video.name for video in find_masked_videos(tmp_path)[0]] == ["a"]
    write_davis(tmp_path / "old", {"480p/val.txt": "/JPEGImages/480p/a/00000.jpg /Annotations/480p/a/00000.png\n"})
    assert tmp_path / "new" in find_masked_videos(tmp_path, year="2017")[0][0].frames[0].parents
    with pytest.raises(ValueError, match="DAVIS lies in .*new, .*old"):
        find_masked_videos(tmp_path)
    with pytest.raises(NotThere, match="this is DAVIS 2016"):
        find_masked_videos(tmp_path / "old", year="2017")
    assert len(find_masked_videos(tmp_path / "old", year="2016")[0]) == 1


def test_masks_are_exported_by_the_names_of_their_frames(tmp_path):
    for number in (5, 10, 15, 20):
        write_png(tmp_path / "JPEGImages/480p/a" / f"{number:05d}.jpg", texture(64, 96).permute(1, 2, 0).numpy())
        write_png(tmp_path / "Annotations/480p/a" / f"{number:05d}.png", np.eye(64, 96, dtype=np.uint8))
    out = tmp_path / "out"
    run_video(VideoConfig("colour", data_root=tmp_path, size=64, output_dir=out, export=out / "masks", pictures=0))
    assert sorted(path.stem for path in (out / "masks" / "a").iterdir()) == ["00005", "00010", "00015", "00020"]


def test_a_lost_frame_whose_mask_is_there_is_told(tmp_path):
    write_davis(tmp_path, {})
    write_png(tmp_path / "Annotations/480p/a/00001.png", np.ones((8, 8), np.uint8))
    with pytest.raises(FileNotFoundError, match="00001: frame missing, its mask is there"):
        find_masked_videos(tmp_path)


def test_a_video_of_which_nothing_can_be_measured_is_an_error_unless_it_is_exported(tmp_path):
    write_davis(tmp_path, {})
    config = VideoConfig("colour", data_root=tmp_path, size=8, output_dir=tmp_path / "out", pictures=0)
    with pytest.raises(ValueError, match="nothing to measure"):
        run_video(config)
    assert run_video(replace(config, export=tmp_path / "masks"))["mean"] == {}
    assert (tmp_path / "masks" / "a" / "00000.png").is_file()


def test_white_masks_may_be_rgb_and_must_have_hard_edges(tmp_path):
    white = np.zeros((8, 8, 3), np.uint8)
    white[2:5, 3:6] = 255
    write_png(tmp_path / "white.png", white)
    assert read_ids(tmp_path / "white.png").unique().tolist() == [0, 255]
    with pytest.raises(ValueError, match="colours where numbers belong"):
        read_ids(tmp_path / "white.png", coloured=False)
    write_davis(tmp_path, {})
    write_png(tmp_path / "Annotations/480p/a/00000.png", np.arange(192, 256, dtype=np.uint8).reshape(8, 8))
    ((video,), _) = find_masked_videos(tmp_path)
    with pytest.raises(ValueError, match="64 shades of grey; a white mask must have hard edges"):
        sources.label_sets.open_video(video, False)
