"""Segmentation and video: schedules, sizes and options that one part hands to the next. Each test bears its claim.

Each of these fails on a fault that was planted, and that no other test saw.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from test_segmentation import moving_video, small, texture, write_camvid

import engine.checkpoint
import evaluate
from evaluate import (
    UNSEEN_SEED,
    SegmentationConfig,
    Segmenter,
    Table1Config,
    VideoConfig,
    feature_method,
    feature_model,
    follow_objects,
    read_recipe,
    run_segmentation,
    run_table1,
    statistics,
)
from mcjepa import pad_to_multiple
from sources.label_sets import LABEL_SETS, LabelAugmentation
from sources.moving_shapes import ShapeLabels


@pytest.fixture(scope="module")
def pwc():
    return feature_model("random", "pwc")


def test_rates_and_weight_decay_are_those_of_the_recipe_at_every_step(tmp_path, monkeypatch):
    seen = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    rates = {"learning_rate": 3e-3, "encoder_learning_rate": 1e-4}
    run_segmentation(small(tmp_path, finetune=True, weight_decay=0.02, **rates))  # 6 steps, 2 of them warmup
    factors = np.array([1 / 2, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    expected = np.stack([factors[:, None] * list(rates.values()), np.full((6, 2), 0.02)], axis=-1)
    np.testing.assert_allclose(seen, expected)


def test_the_recipes_are_those_of_the_protocols():
    config = SegmentationConfig("random")
    for name, steps, size in (("voc", 40_000, 512), ("cityscapes", 40_000, 1024), ("ade20k", 160_000, 512)):
        assert read_recipe(config, name) == (steps, 1_500, 16, 512, size, 1e-4, 1e-4)
    assert config.weight_decay == 0.05
    assert read_recipe(replace(config, warmup=0), "voc").warmup == 0  # a flag of 0 counts


@pytest.mark.parametrize("h, w", [(40, 90), (64, 65)])
def test_scores_of_an_image_of_odd_size_lie_where_they_do_in_the_padded_image(pwc, h, w):
    segmenter, image = Segmenter(pwc, 5).eval(), torch.rand(1, 3, h, w)
    whole = segmenter(pad_to_multiple(image, max(pwc.encoder.strides)))
    torch.testing.assert_close(segmenter(image), whole[..., :h, :w])


def test_the_head_begins_alike_whatever_was_drawn_before(pwc):
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(Segmenter(pwc, 5).head.classifiers[0].weight)
    assert torch.equal(*weights)


def test_the_normalisation_of_a_fine_tuned_encoder_follows_its_images(tmp_path):
    run_segmentation(small(tmp_path, encoder="resnet50", finetune=True, steps=2))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    steps = {key.split(".")[0]: int(value) for key, value in state.items() if key.endswith("num_batches_tracked")}
    assert steps == {"head": 2, "encoder": 2}


def test_the_seed_chooses_the_images_and_their_augmentation(tmp_path, monkeypatch):
    root, seen, forward = write_camvid(tmp_path / "CamVid"), [], Segmenter.forward
    monkeypatch.setattr(Segmenter, "forward", lambda self, images: seen.append(images) or forward(self, images))
    firsts = []
    for number, seed in enumerate((0, 0, 1)):
        seen.clear()
        run_segmentation(small(tmp_path, data_root=root, steps=1, seed=seed, output_dir=tmp_path / str(number)))
        firsts.append(seen[0])
    assert torch.equal(firsts[0], firsts[1]) and not torch.equal(firsts[0], firsts[2])


@pytest.mark.parametrize(
    "change",
    [{"size": 50}, {"batch": 3}, {"crop": 50}, {"seed": 1}, {"weight_decay": 0.1}, {"steps": 3}, {"warmup": 1},
     {"encoder_learning_rate": 1.0}, {"finetune": True}],
)  # fmt: skip
def test_what_changes_the_training_is_refused_on_resuming(tmp_path, change):
    config = small(tmp_path, steps=2)
    settings = engine.checkpoint.as_json(config) | read_recipe(config, "shapes")._asdict()
    settings |= {"data": "shapes", "training_images": 1_000_000}
    (tmp_path / "run").mkdir()
    engine.checkpoint.save_checkpoint(
        tmp_path / "run" / "checkpoint.pt", {"model": {}, "optimizer": {}, "step": 2, "config": settings}
    )
    with pytest.raises(ValueError, match=f"another configuration .*{next(iter(change))}: "):
        run_segmentation(replace(config, resume=True, **change))


def test_the_loss_is_the_mean_over_the_pixels_that_count(tmp_path):
    root = write_camvid(tmp_path / "CamVid", void=False)
    for path in (root / "trainannot").iterdir():
        labels = np.array(Image.open(path))
        labels[:, ::2] = labels[::2] = 11
        Image.fromarray(labels).save(path)
    run_segmentation(small(tmp_path, data_root=root, steps=1))
    loss = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["loss"]
    assert loss == pytest.approx(math.log(11), abs=0.15)  # a head that knows nothing yet, of 11 classes


@pytest.mark.parametrize("given, stride", [(None, 32), (20, 20)])
def test_images_are_measured_with_the_recipes_shorter_side_and_windows(tmp_path, monkeypatch, given, stride):
    root, seen, slide = write_camvid(tmp_path / "CamVid", count=2), [], evaluate.sliding_scores

    def record(segment, image, *numbers):
        seen.append((*image.shape[2:], *numbers))
        return slide(segment, image, *numbers)

    monkeypatch.setattr(evaluate, "sliding_scores", record)
    run_segmentation(small(tmp_path, data_root=root, size=32, steps=1, window_stride=given))
    assert seen == [(32, 40, 48, stride)] * 2  # of images of 64x80


def test_the_iou_of_each_class_and_the_shapes_that_are_measured(tmp_path):
    report = run_segmentation(small(tmp_path, steps=1))
    confusion = np.array(report["confusion"])
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    for iou, hits, total in zip(report["iou"].values(), np.diag(confusion), union, strict=True):
        assert iou == (pytest.approx(hits / total) if total else None)
    unseen = torch.cat([ShapeLabels(3, (48, 48), seed=UNSEEN_SEED)[index][1].flatten() for index in range(3)])
    assert confusion.sum(1).tolist() == unseen.bincount(minlength=len(confusion)).tolist()


def test_later_frames_are_standardised_by_the_numbers_of_the_first(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "propagate_labels", lambda now, known, labels, *_: seen.append(now) or labels[0])
    video = moving_video([0])._replace(frames=lambda t: texture(64, 96, seed=t) // (1 + t))
    features = feature_method("colour", 8)
    first, later = (features(video.frames(t)[None].float() / 255) for t in (0, 1))
    list(follow_objects(video, features, VideoConfig("colour", standardise=True)))
    mean, deviation = first.mean(dim=(1, 2), keepdim=True), first.std(dim=(1, 2), keepdim=True, correction=0)
    torch.testing.assert_close(seen[0], (later - mean) / deviation, atol=1e-4, rtol=1e-4)


def test_a_cell_has_the_label_of_its_middle(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "propagate_labels", lambda now, known, labels, *_: seen.append(labels) or labels[0])
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[18:38, 19:44] = 1
    video = moving_video([0])._replace(objects=[1], masks=lambda t: mask)
    list(follow_objects(video, feature_method("colour", 8), VideoConfig("colour")))
    assert torch.equal(seen[0][0, 1], mask[4::8, 4::8].float())


def test_features_see_the_frames_smoothed_and_in_whole_cells_of_the_nearest_number(monkeypatch):
    seen, frame = [], torch.randint(0, 256, (3, 60, 107), dtype=torch.uint8)
    mask = (torch.arange(60 * 107).view(60, 107) > 3000).to(torch.uint8)
    video = moving_video([0])._replace(objects=[1], frames=lambda t: frame, masks=lambda t: mask)
    features = lambda image: seen.append(image) or image[0, :, ::8, ::8]  # noqa: E731
    list(follow_objects(video, features, VideoConfig("colour", size=30)))
    expected = F.interpolate(frame[None].float() / 255, (32, 56), mode="bilinear", antialias=True)
    for image in seen:  # 30 x 53.5 px are 3.75 x 6.7 cells
        torch.testing.assert_close(image, expected)


def test_soft_labels_are_carried_on_and_the_options_of_propagation_arrive(monkeypatch):
    seen, soft = [], torch.rand(3, 8, 12).softmax(dim=0)
    monkeypatch.setattr(evaluate, "propagate_labels", lambda now, known, *others: seen.append(others) or soft)
    config = VideoConfig("colour", radius=3, topk=2, temperature=0.5)
    list(follow_objects(moving_video([0, 0]), feature_method("colour", 8), config))
    assert [options for _, *options in seen] == [[3, 2, 0.5]] * 2
    torch.testing.assert_close(seen[1][0][1], soft)


def test_half_is_no_recall():
    assert statistics([0.5, 0.25, 0.75, 1.0])["recall"] == 0.5


def test_each_number_of_the_summary_is_the_mean_of_its_own_kind():
    kinds = ("mean", "recall", "decay")
    numbers = (
        {"J": (0.1, 0.2, 0.3), "F": (0.4, 0.5, 0.6)},
        {"J": (0.3, 0.8, 0.1), "F": (0.6, 0.9, 0.0)},
    )
    objects = [{name: dict(zip(kinds, row, strict=True)) for name, row in each.items()} for each in numbers]
    mean = evaluate.summarise_objects({"a": {"objects": dict(enumerate(objects)), "seconds": 1.0}})["mean"]
    expected = {"J_mean": 0.2, "J_recall": 0.5, "J_decay": 0.2, "F_mean": 0.5, "F_recall": 0.7, "F_decay": 0.3}
    assert mean == pytest.approx(expected | {"J&F": 0.35, "seconds": 1.0})


def test_the_figure_of_a_video_has_the_true_masks_above_and_frames_1_10_25_and_the_last(monkeypatch):
    seen, grid = [], evaluate._grid
    monkeypatch.setattr(
        evaluate, "_grid", lambda panels, columns: seen.append((panels, columns)) or grid(panels, columns)
    )
    video = moving_video([1] * 29)  # 30 frames
    evaluate.objects_figure(video, [torch.zeros(64, 96, dtype=torch.uint8)] * 30)
    ((panels, columns),) = seen
    titles = [f"t = {t}, {who}" for who in ("truth", "ours") for t in (1, 10, 25, 30)]
    assert [title for title, _ in panels] == titles and columns == 4
    for (title, panel), t in zip(panels, (0, 9, 24, 29) * 2, strict=True):
        shown = evaluate.overlay(video.frames(t), video.masks(t)) if "truth" in title else video.frames(t)
        assert torch.equal(panel, shown)


def test_the_colour_baseline_is_the_mean_colour_of_each_cell_less_imagenets():
    image = torch.rand(1, 3, 16, 24)
    normalised = torchvision.transforms.functional.normalize(image, evaluate.IMAGENET_MEAN, evaluate.IMAGENET_DEVIATION)
    cells = normalised[0].unflatten(1, (2, 8)).unflatten(3, (3, 8)).mean(dim=(2, 4))
    torch.testing.assert_close(feature_method("colour", 8)(image), cells)


def test_table_1_hands_its_settings_on_and_goes_on_with_a_stopped_training(tmp_path, monkeypatch):
    seen = {"flow": [], "segmentation": [], "video": []}
    epe = {name: {"per_image": {"epe": {"all": 1.0}}} for name in ("random", "zero")}
    report = {"label": "random", "groups": {"all": epe}, "miou": 0.5, "mean": {"J&F": 0.5}, "notes": []}
    for name, configs in seen.items():
        run = lambda config, configs=configs: configs.append(config) or report  # noqa: E731
        monkeypatch.setattr(evaluate, f"run_{name}", run)
    (tmp_path / "segmentation_shapes_tuned").mkdir()
    (tmp_path / "segmentation_shapes_tuned" / "checkpoint.pt").touch()
    run_table1(Table1Config("random", output_dir=tmp_path, encoder="pwc", steps=20, workers=2))
    assert all(config.encoder == "pwc" and config.model == "random" for configs in seen.values() for config in configs)
    options = [(c.finetune, c.resume, c.steps, c.warmup, c.workers) for c in seen["segmentation"]]
    assert options == [(False, False, 20, None, 2), (True, True, 20, None, 2)]


def test_the_stem_that_a_file_lacks_is_the_same_each_time(tmp_path):
    network = torchvision.models.convnext_tiny(weights=None)
    torch.save(network.state_dict(), tmp_path / "convnext.pth")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(feature_model(str(tmp_path / "convnext.pth")).encoder.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_random_model_is_that_of_its_seed():
    one, again, other = (
        torch.cat([p.flatten() for p in feature_model("random", "pwc", s).encoder.parameters()]) for s in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_classes_and_colours_in_the_middle_of_each_set_lie_where_their_authors_have_them():
    assert LABEL_SETS["voc"].classes[1:] == sorted(LABEL_SETS["voc"].classes[1:])  # in alphabetical order
    camvid = dict(zip(LABEL_SETS["camvid"].classes, LABEL_SETS["camvid"].colours.tolist(), strict=True))
    assert camvid["tree"] == [128, 128, 0] and camvid["sign"] == [192, 128, 128]
    assert LABEL_SETS["camvid"].classes.index("tree") == 5 and LABEL_SETS["camvid"].classes.index("fence") == 7
    ade20k = LABEL_SETS["ade20k"]
    places = {
        "sky": 2,
        "tree": 4,
        "car": 20,
        "sea": 26,
        "river": 60,
        "bus": 80,
        "airplane": 90,
        "ship": 103,
        "lake": 128,
        "clock": 148,
    }
    assert {name: ade20k.classes.index(name) for name in places} == places
    assert ade20k.colours[[2, 20, 49, 50, 80, 148]].tolist() == [
        [6, 230, 230], [0, 102, 200], [250, 10, 15], [20, 255, 0], [255, 0, 245], [102, 255, 0]
    ]  # fmt: skip


def test_images_are_smoothed_before_they_are_made_smaller():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, ::4] = 255  # a quarter of the columns, between those that a bilinear look at every fourth place meets
    augment = LabelAugmentation(16, 16, scale=(1.0, 1.0))
    augment.change = lambda view: view.float() / 255  # no colours
    picture, _ = augment(image, torch.zeros(64, 64, dtype=torch.int64))
    assert picture[:, :, 2:-2].mean().item() == pytest.approx(0.25, abs=0.03)


def test_shape_labels_have_up_to_8_shapes_with_the_looks_of_their_class():
    shapes = ShapeLabels(1, (32, 32), seed=0)
    assert shapes.max_shapes == 8 and shapes.looks_by_class
