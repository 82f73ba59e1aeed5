"""experiments/: the tables of the report, and the part that others run without the rest of it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from export import export
from helpers import write_davis, write_images, write_label_set, write_middlebury
from rows import FIGURES, ROWS, TABLES, schedule
from torch import nn
from torchvision.transforms import v2

import evaluate
import train
from data import ImageFiles, ShardedStream
from encoder import pad_to_multiple
from engine.faults import run_command
from experiments import film_pairs, local_loss, run
from flow import warp
from mcjepa import MCJEPA, ModelConfig, load_model
from sources.moving_shapes import MovingShapes

TINY = "--image-batch=4 --video-batch=1 --image-size=32 --crop 64 64 --validation-pairs=1 --model.expander 8"
TINY += " --model.encoder resnet10_half --model.estimator-factor 0.125"


def test_a_still_frame_seen_by_a_moving_camera_has_the_flow_of_that_motion():
    rng, (h, w) = np.random.default_rng(0), film_pairs.SIZE
    frame = cv2.GaussianBlur(rng.integers(0, 256, (432, 768, 3), dtype=np.uint8), (0, 0), 4)
    p = np.stack([*np.meshgrid(np.arange(w), np.arange(h)), np.ones((h, w))]).reshape(3, -1)
    for _ in range(20):
        crop, motion = film_pairs.draw_crop(rng, frame.shape[:2]), film_pairs.draw_motion(rng)
        flow = torch.from_numpy((np.linalg.inv(motion) @ p - p)[:2].reshape(1, 2, h, w)).float()
        assert flow.norm(dim=1).median() < 1.3 * 0.2 * h
        cuts = np.stack([film_pairs.cut(frame, matrix) for matrix in (crop, crop @ motion)])
        first, second = torch.from_numpy(cuts).permute(0, 3, 1, 2).float().split(1)
        inside = warp(torch.ones(1, 1, h, w), flow, padding="zeros") == 1
        assert ((warp(second, flow) - first).abs() * inside).max() < 2  # bytes are rounded; the other way 16 and more


def train_in_this_process(command, cwd):
    """Stands for subprocess.run, without the import of torch."""
    assert command[:2] == [sys.executable, "train.py"] and (cwd / "train.py").exists()
    try:
        run_command(lambda: train.train(train.parse(list(map(str, command[2:])))))
        return SimpleNamespace(returncode=0)
    except SystemExit as stop:
        return SimpleNamespace(returncode=stop.code)


def test_an_exported_program_estimates_the_flow_of_the_model_at_a_size_that_is_no_multiple_of_its_strides(tmp_path):
    torch.ones(1, requires_grad=True).backward()  # this process could not be forked if its first one followed an export
    torch.manual_seed(0)
    model = MCJEPA(ModelConfig(encoder="resnet10_half", estimator_factor=0.125), task="mjepa").eval()
    assert export(model, tmp_path, (40, 56))["flow.pt2"] < 1e-4
    images = torch.rand(2, 1, 3, 40, 56).unbind()
    flow = model.estimate_flow(*images)
    assert flow.abs().max() > 0.1
    torch.testing.assert_close(torch.export.load(tmp_path / "flow.pt2").module()(*images), flow)


def test_the_true_flow_of_the_shapes_takes_the_place_of_the_estimated_one(tmp_path):
    command = [sys.executable, "experiments/true_flow.py", "small", *TINY.replace("=", " ").split(), "--max-steps", "1"]
    command += ["--flow-start-epoch", "0", "--workers", "0", "--output-dir", str(tmp_path), "--crop", "72", "80"]
    subprocess.run(command, cwd=Path(run.ROOT), check=True, capture_output=True)
    item = MovingShapes(train.IMAGENET_SIZE, (72, 80))[next(iter(ShardedStream(train.IMAGENET_SIZE, 1)))[1]]
    lengths = pad_to_multiple(torch.cat((item["flow_forward"], item["flow_backward"])), 32).norm(dim=1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["flow_length"] == pytest.approx(lengths.mean().item(), rel=0.02)  # it went through stride 4


def test_the_views_of_the_local_loss_carry_the_places_of_their_pixels():
    x, y = torch.meshgrid(4 * torch.arange(60), 6 * torch.arange(40), indexing="xy")
    views = local_loss.PlacedViews(48, smallest_crop=0.3)
    for name in ("view_1", "view_2"):  # without changes of colour
        setattr(views, name, v2.Compose([*getattr(views, name).transforms[:2], nn.Identity()]))
    torch.manual_seed(0)
    seen = [view for _ in range(4) for view in views(torch.stack((x, y, x)).byte())]
    assert {bool(view[3, 0, 0] > view[3, 0, -1]) for view in seen} == {False, True}  # some are flipped
    for view in seen:
        torch.testing.assert_close(view[0] * 255 / 4, view[3], atol=0.5, rtol=0)
        torch.testing.assert_close(view[1] * 255 / 6, view[4], atol=0.5, rtol=0)


def test_the_local_loss_matches_the_positions_whose_places_are_nearest():
    torch.manual_seed(0)
    features, places = torch.rand(4, 5, 3, 4), 10 * torch.rand(4, 2, 3, 4)
    expected = []
    for pair in range(2):
        here, there = (zip(features[i].flatten(1).T, places[i].flatten(1).T, strict=True) for i in (pair, pair + 2))
        there, matches = list(there), []
        for feature, place in here:
            distances = [(place - other).norm().item() for _, other in there]
            matches.append((min(distances), feature, there[distances.index(min(distances))][0]))
        expected += [match[1:] for match in sorted(matches, key=lambda match: match[0])[:5]]
    for seen, known in zip(local_loss.match(features, places), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(seen, torch.stack(known))  # 20 of 49 are 5 of 12


def test_the_local_loss_trains_the_encoder_down_to_stride_8_in_float32():
    model = local_loss.LocalVICReg(ModelConfig("resnet10_half", expander=(8,)), task="vicreg")
    with torch.autocast("cpu", torch.bfloat16):
        terms, _ = model._content_terms(torch.rand(8, 5, 32, 32))
    local = [term for name, (term, _) in terms.items() if name.startswith("local_")]
    assert len(local) == 3 and all(term.dtype == torch.float32 for term in local)
    sum(local).backward()
    _, at_8, at_16, _ = (stage[0].conv1.weight.grad for stage in model.encoder.stages)
    assert at_8.any() and at_16 is None


def test_a_step_of_local_loss_py_weighs_both_losses_and_its_weights_are_those_of_any_model(tmp_path):
    words = ["experiments/local_loss.py", "small", "--task", "vicreg", *TINY.replace("=", " ").split()]
    words += ["--max-steps", "1", "--workers", "0", "--output-dir", str(tmp_path)]
    subprocess.run([sys.executable, *words], cwd=Path(run.ROOT), check=True, capture_output=True)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    for name, share in (("vicreg_variance", 0.75), ("local_vicreg_variance", 0.25)):
        assert line[f"weighted/{name}"] == pytest.approx(25 * share * line[f"loss/{name}"], rel=1e-4)
    load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", sorted({*ROWS} - {"random"}))
def test_every_row_is_a_run_of_train_py_whose_masks_come_in_the_last_half_of_its_flow(name):
    steps, flags = schedule(ROWS[name], 1000)
    config = train.parse(["pocket", *flags])  # whose own ratio is 1
    train.check(config)
    assert (run.ROOT / ROWS[name].script).is_file()
    assert "gradient-ratio" in ROWS[name].flags or config.loss.gradient_ratio == 0.3
    plan = train.make_plan(config, None, train.Source("images", range(1000), None, 128))
    assert plan.end == steps == config.epochs * config.steps_per_epoch
    flow, _ = plan.taken(plan.end)
    assert config.task == "vicreg" or plan.mask_warmup == pytest.approx(flow / 2, abs=config.steps_per_epoch / 2)


def test_every_name_in_a_table_or_figure_is_a_row():
    selections = [*TABLES.values(), *(rows for _, rows in FIGURES.values())]
    assert {name for names in selections for name in names} == set(ROWS)


def test_rows_are_trained_and_measured_once_and_added_to_the_results(tmp_path, few_shapes, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROWS", {name: ROWS[name] for name in ("random", "vicreg", "mcjepa")})
    monkeypatch.setattr(run, "TABLES", {"1": ("random", "mcjepa"), "11": ("mcjepa",)})
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=train_in_this_process))
    results, words = tmp_path / "results.jsonl", ["--steps", "2", "--seeds", "0", "--workers", "0", *TINY.split()]
    words += ["--preset", "pocket", "--results", str(results), "--output-dir", str(tmp_path / "runs"), "--table"]
    run.main([*words, "1"])
    before = results.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    assert [(line["name"], line["seed"], line["steps"]) for line in lines] == [("random", 0, 0), ("mcjepa", 0, 2)]
    assert [*(tmp_path / "runs").glob("pocket_mcjepa_2_0_*/model.safetensors")]
    for line in lines:
        assert line["series"].startswith("pocket, 2 steps, images of MovingShapes, ")
        measures = line["measures"]
        assert {"EPE", "object", "object, stride 8", "J&F, 8", "J&F, 8+16"} <= measures.keys()
        assert measures["texture"] == max(each for name, each in measures.items() if name.startswith("texture, "))
    curves = json.loads((tmp_path / "curves" / lines[1]["curves"]).read_text())
    assert curves["step"] == [2] and curves["validation/epe"][0] > 0 and curves["weighted/vicreg_variance"][0] > 0
    run.main([*words, "1", "11"])
    assert results.read_text() == before and "mcjepa, seed 0: its line is in" in capsys.readouterr().out


def test_half_of_the_images_are_frames_of_the_videos(tmp_path, monkeypatch):
    write_images(tmp_path / "images", [f"{part}/{number}.png" for part in "ab" for number in range(3)])
    mixed = run.add_frames(tmp_path / "images", tmp_path / "mixed", count=4)
    sides = [image.shape[1] for image in ImageFiles(mixed)]
    assert len(sides) == 12 and sides.count(192) == 6
    assert run.add_frames(None, mixed) == mixed  # is not made again
    other = tmp_path / "other"
    monkeypatch.setattr(run, "write_picture", lambda *_: (other / "of another run").mkdir(parents=True, exist_ok=True))
    assert [path.name for path in run.add_frames(tmp_path / "images", other, count=4).iterdir()] == ["of another run"]
    assert {path.name for path in tmp_path.iterdir()} == {"images", "mixed", "other"}


def test_with_data_the_real_measures_are_taken_too(tmp_path, few_shapes, monkeypatch):
    write_middlebury(tmp_path / "Middlebury")
    write_davis(tmp_path / "DAVIS2016-240p", ["bear"], resolution="240p")
    write_label_set(tmp_path / "CamVid", "camvid")
    monkeypatch.setitem(evaluate.RECIPES, "camvid", evaluate.Recipe(1, 1, 2, 32, 32))
    write_images(tmp_path / "cifar-10", [f"{part}/{kind}/a.png" for part in ("train", "test") for kind in "ab"])
    measures = run.measure("random", "resnet10_half", 0, tmp_path, tmp_path)
    assert measures["CIFAR-10 k-NN, stride 32"] == 50  # all images are alike
    real = {"Middlebury EPE", "DAVIS 2016 J&F, 8", "DAVIS 2016 J&F, 8+16", "CamVid mIoU"}
    assert {"EPE", "J&F, 8", *real} <= measures.keys()


def test_the_row_whose_estimator_learns_nothing_has_no_error_of_flow(monkeypatch):
    monkeypatch.setattr(run, "schedule", lambda *_: (0, []))
    monkeypatch.setattr(run, "measure", lambda *_: {"EPE": 9.0, "Middlebury EPE": 9.0, "object": 5.0})
    options = SimpleNamespace(preset="small", steps=0, data=None, output_dir=Path())
    measures = [run.train_and_measure(name, 0, options, [])["measures"] for name in ("mcjepa", "true_flow")]
    assert "EPE" in measures[0] and measures[1] == {"object": 5.0}


def test_a_run_that_diverges_has_a_line_without_measures_and_one_that_fails_otherwise_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TABLES", {"1": ("mcjepa",)})
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=train_in_this_process))
    words = ["--table", "1", "--steps", "20", "--seeds", "0", "--workers", "0", *TINY.split()]
    words += ["--results", str(tmp_path / "results.jsonl"), "--output-dir", str(tmp_path / "runs")]
    run.main([*words, "--learning-rate", "1e30"])
    (line,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert line["diverged"] and not line["measures"]
    (tmp_path / "results.jsonl").unlink()
    (metrics,) = (tmp_path / "runs").glob("small_mcjepa_20_0_*_rate_1e30/metrics.jsonl")  # a folder for these flags
    metrics.unlink()
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=1)))
    with pytest.raises(SystemExit, match="error: 1 runs failed, see above: mcjepa, seed 0"):
        run.main(words)
    assert not (tmp_path / "results.jsonl").exists()


def test_the_report_has_means_over_seeds_diverged_rows_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    import report

    rows = [("mcjepa", 0, 50.0), ("mcjepa", 1, 52.0), ("mcjepa", 2, 90.0), ("norm_none", 0, None), ("ratio_1", 0, 45.0)]
    rows += [(name, seed, value) for name, value in (("vicreg", 40.0), ("random", 30.0)) for seed in (0, 1)]
    for name, seed, value in rows:
        measures = {f"CIFAR-10 k-NN, stride {s}": value for s in (32, 16)} | {"Middlebury EPE": value} if value else {}
        run = {"series": report.PILOT, "name": name, "seed": seed, "measures": measures, "diverged": value is None}
        run |= {"curves": "a.json"} if name == "mcjepa" else {}
        with open(tmp_path / "results.jsonl", "a") as file:
            file.write(json.dumps(run) + "\n")
    (tmp_path / "curves").mkdir()
    curves = {"step": [1, 2], "gradient_ratio": [None, 0.3], "flow_balance": [None, 1.0], "weighted/cycle": [1.0, 2.0]}
    (tmp_path / "curves" / "a.json").write_text(json.dumps(curves))
    report.write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| MC-JEPA | 2 | 51.00 ± 1.41 | 51.0 ± 1.4 | 2.67 | 67.1 | 70.5 |" in text
    assert "| VICReg | 2 | 40.00 ± 0.00 | 40.0 ± 0.0 | 13.5 | 60.1 | 58.1 |" in text
    assert "| no norm | 1 | diverged | diverged | crashed |  |  |" in text
    assert "k-NN of MC-JEPA is 51.0 ± 1.4%, that of VICReg 40.0 ± 0.0%" in text
    assert "At stride 8 its J&F is (not measured)%" in text
    assert "`python experiments/run.py --table 5`" in text and "--table 3`" not in text
    pictures = [line.split("(")[-1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 3 and all((tmp_path / picture).stat().st_size > 10_000 for picture in pictures)


def test_the_report_is_that_of_the_results(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    import report

    monkeypatch.setattr(figure, "tight_layout", lambda *_: None)  # the pictures would take long
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: None)
    for name in ("results.jsonl", "curves"):
        (tmp_path / name).symlink_to(Path(report.__file__).parent / name)
    report.write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == (Path(report.__file__).parent / "report.md").read_text()
