"""The strategies of Table 5 and the data sets of the paper, in the training command."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import train
from data import FramePairs
from sources.training_sets import VIDEO_SETS
from tests.test_train import TINY, command, fails, run, write_frames

FOUR_EPOCHS = [*TINY, "--epochs", "4", "--flow-start-epoch", "1"]


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def learned(folder: Path) -> str:
    """What each step learned: C content, F flow, B both."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = {(True, False): "F", (False, True): "C", (True, True): "B"}
    return "".join(kinds["loss/cycle" in line, "loss/vicreg_variance" in line] for line in lines if "total" in line)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the model in which any number is another, statistics of batch norms included."""
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


@pytest.fixture
def content(monkeypatch, tmp_path) -> Path:
    """A VICReg checkpoint."""
    run(monkeypatch, *TINY, "--task", "vicreg", "--max-steps", 2, "--output-dir", tmp_path / "content")
    return tmp_path / "content"


# ------------------------------------------------------------------------------------------------------ strategies


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        ("combined", "CCCC" + "BBBB" * 3),
        ("alternate_batches", "CCCC" + "FCFC" * 3),
        ("alternate_epochs", "CCCC" + "FFFF" + "CCCC" + "FFFF"),
        ("frozen", "CCCC" + "FFFF" * 3),
        ("finetune", "CCCC" + "FFFF" * 3),
    ],
)
def test_each_strategy_takes_the_steps_that_it_says_also_across_a_resume(strategy, steps, monkeypatch, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(monkeypatch, *FOUR_EPOCHS, "--strategy", strategy, "--output-dir", whole)
    assert learned(whole) == steps
    for stop in (7, 16):  # within an epoch, after an odd number of steps, three of which came after the flow start
        resume = ["--resume"] if stop > 7 else []
        run(monkeypatch, *FOUR_EPOCHS, "--strategy", strategy, "--output-dir", halves, "--max-steps", stop, *resume)
    assert learned(halves) == steps
    assert not changed(model_of(whole), model_of(halves))


def test_steps_that_were_taken_are_counted_as_they_were_taken():
    plan = train.Plan("mcjepa", "alternate_epochs", 5, 100, 10, 1, 1)
    for step in (0, 3, 10, 12, 15, 18, 20, 22, 57):
        tasks = [plan.tasks(s) for s in range(step)]
        assert plan.taken(step) == (sum(f for f, _ in tasks), sum(c for _, c in tasks))
    assert plan.taken(22) == (7, 15)
    assert plan._replace(strategy="alternate_batches").taken(23) == (7, 16)
    assert plan._replace(task="mjepa", flow_start=0).taken(9) == (9, 0)
    assert plan._replace(task="vicreg").taken(99) == (0, 99)


def test_where_the_tasks_alternate_each_has_its_own_batches_one_after_the_other(monkeypatch, tmp_path):
    """Position k of a task's stream is its k-th step, whatever lies between them."""
    drawn, make_loader = {"video": [], "image": []}, train.make_loader

    def spy(dataset, transform, *arguments, **options):
        name = "video" if isinstance(dataset, train.ShapePairs) else "image"
        for batch in make_loader(dataset, transform, *arguments, **options):
            (first, _), _ = batch  # two images, and what was wrong with files
            drawn[name].append(float(first.mean()))
            yield batch

    monkeypatch.setattr(train, "make_loader", spy)
    by_strategy = {}
    for strategy in ("combined", "alternate_batches"):
        drawn["video"], drawn["image"] = [], []
        arguments = ["--strategy", strategy, "--flow-start-epoch", 0, "--output-dir", tmp_path / strategy]
        run(monkeypatch, *TINY, *arguments, "--max-steps", 6)
        by_strategy[strategy] = drawn["video"], drawn["image"]
    assert [len(batches) for batches in by_strategy["combined"]] == [6, 6]
    for one, other in zip(by_strategy["combined"], by_strategy["alternate_batches"], strict=True):
        assert other == one[:3] and len(set(one)) == 6


@pytest.mark.parametrize(
    "model", [["--model.encoder", "pwc"], ["--model.encoder", "resnet50"]], ids=["pwc", "resnet50"]
)
def test_a_frozen_encoder_stays_as_it_was_bit_for_bit(model, monkeypatch, tmp_path):
    arguments = [*TINY, *model, "--image-size", "64"]  # ResNet-50 has batch norms, whose statistics must stay too
    run(monkeypatch, *arguments, "--task", "vicreg", "--max-steps", 1, "--output-dir", tmp_path / "content")
    init = ["--init", tmp_path / "content/checkpoint.pt", "--max-steps", 3]
    run(monkeypatch, *arguments, *init, "--epochs", 1, "--strategy", "frozen", "--output-dir", tmp_path / "frozen")
    before, after = model_of(tmp_path / "content"), model_of(tmp_path / "frozen")
    assert changed(before, after) == set()  # neither encoder nor expander
    untrained = train.build(train.read_config([*map(str, arguments)]), torch.device("cpu"))[0].state_dict()
    assert changed({k: v for k, v in untrained.items() if k.startswith("estimator")}, after) == {"estimator"}
    assert learned(tmp_path / "frozen") == "FFF"  # from a checkpoint, flow starts at once


def test_fine_tuning_changes_the_encoder_but_not_the_expander(content, monkeypatch, tmp_path):
    init = ["--init", content / "checkpoint.pt", "--strategy", "finetune", "--max-steps", 2]
    run(monkeypatch, *TINY, *init, "--output-dir", tmp_path / "tuned")
    assert changed(model_of(content), model_of(tmp_path / "tuned")) == {"encoder"}


@pytest.mark.parametrize("strategy", ["frozen", "finetune"])
def test_from_a_checkpoint_flow_alone_starts_at_once_unless_the_command_says_otherwise(strategy):
    command_line = ["--strategy", strategy, "--init", "a.pt"]
    assert train.read_config(command_line).flow_start_epoch == 0
    assert train.read_config([*command_line, "--flow-start-epoch", "3"]).flow_start_epoch == 3
    assert train.read_config([*command_line, "--flow-start-epoch=3"]).flow_start_epoch == 3
    assert train.read_config(command_line[:2]).flow_start_epoch == 10
    assert train.read_config(["--init", "a.pt"]).flow_start_epoch == 10


def test_the_encoder_freezes_at_the_flow_start_and_not_before(monkeypatch, tmp_path):
    frozen = ["--strategy", "frozen", "--output-dir", tmp_path / "run"]
    kept = []
    for stop in (4, 6):
        run(monkeypatch, *FOUR_EPOCHS, *frozen, "--max-steps", stop, *(["--resume"] if kept else []))
        kept.append(model_of(tmp_path / "run"))
    assert changed(*kept) == {"estimator"}
    start = train.build(train.read_config([*FOUR_EPOCHS]), torch.device("cpu"))[0].state_dict()
    assert changed(start, kept[0]) == {"encoder", "expander"}


@pytest.mark.parametrize("every", [3, 4])
def test_a_line_of_metrics_holds_the_newest_step_of_each_task_where_they_alternate(every, monkeypatch, tmp_path):
    flags = ["--strategy", "alternate_batches", "--flow-start-epoch", 0, "--max-steps", 2 * every, "--log-every"]
    run(monkeypatch, *TINY, *flags, every, "--output-dir", tmp_path / "sparse")
    run(monkeypatch, *TINY, *flags, 1, "--output-dir", tmp_path / "dense")
    files = [tmp_path / name / "metrics.jsonl" for name in ("sparse", "dense")]
    lines = [map(json.loads, file.read_text().splitlines()) for file in files]
    sparse, dense = ({line["step"]: line for line in each if "total" in line} for each in lines)
    assert list(sparse) == [every, 2 * every]
    for step, line in sparse.items():
        last, other = dense[step], dense[step - 1]
        flow, content = (last, other) if step % 2 else (other, last)  # the first step, number 1, learns flow
        assert line["total"] == pytest.approx(last["total"] + other["total"])
        assert line["gradient_norm/encoder"] == last["gradient_norm/encoder"]
        assert line["gradient_norm/estimator"] == flow["gradient_norm/estimator"] > 0
        assert line["gradient_norm/expander"] == content["gradient_norm/expander"] > 0
        assert (
            line["loss/cycle"] == flow["loss/cycle"] and line["loss/vicreg_variance"] == content["loss/vicreg_variance"]
        )
        assert "gradient_norm/estimator" not in content and "gradient_norm/expander" not in flow


def test_a_checkpoint_from_before_a_field_was_there_goes_on_with_the_field_s_default(monkeypatch, capsys, tmp_path):
    run(monkeypatch, *TINY, "--max-steps", 1, "--output-dir", tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name in ("strategy", "sets", "mix", "data_root", "show_data"):
        del checkpoint["config"][name]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    run(monkeypatch, *TINY, "--max-steps", 2, "--output-dir", tmp_path, "--resume")
    other = ["--mix.chairs.repeats", 7, "--output-dir", tmp_path, "--resume"]
    line = fails(monkeypatch, capsys, *TINY, *other, "--max-steps", 3)
    assert "(mix.chairs.repeats: 5 there, 7 here)" in line


@pytest.mark.parametrize("strategy", ["alternate_batches", "alternate_epochs", "frozen", "finetune"])
def test_two_processes_take_every_strategy_across_the_flow_start(strategy, tmp_path):
    flags = ["--strategy", strategy, "--steps-per-epoch", 2, "--max-steps", 7]
    done = command(*FOUR_EPOCHS, *flags, "--output-dir", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path) == {"alternate_batches": "CCFCFCF", "alternate_epochs": "CCFFCCF"}.get(strategy, "CCFFFFF")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--strategy", "frozen", "--flow-start-epoch", "0"], "needs a trained encoder"),
        (["--strategy", "finetune", "--task", "mjepa"], "needs a trained encoder"),
        (["--strategy", "alternate_epochs", "--task", "mjepa"], "needs both tasks"),
        (["--strategy", "frozen", "--task", "vicreg"], "--task vicreg"),
        (["--sets", "kitti"], "--data-root"),
        (["--show-data"], "--data-root"),
        (["--mix.chairs.repeats", "0", "--data-root", "."], "--mix.chairs"),
        (["--data-root", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
    ],
)
def test_what_does_not_go_together_is_told_in_one_line(arguments, told, monkeypatch, capsys, tmp_path):
    assert told in fails(monkeypatch, capsys, *TINY, *arguments, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------- data sets


def number_frames(folder: Path, first: int, count: int, size=(80, 96), digits=4, prefix="") -> None:
    frames = write_frames(folder / "unnumbered", count, size=size)
    for index, frame in enumerate(sorted(frames.iterdir())):
        frame.rename(folder / f"{prefix}{first + index:0{digits}d}.png")
    frames.rmdir()


@pytest.fixture
def data_root(tmp_path) -> Path:
    """Sintel (clean: 5 frames in two scenes, final: 3), FlyingChairs, smaller than the crop, 2 classes of ImageNet."""
    root = tmp_path / "data"
    number_frames(root / "Sintel/training/clean/alley_1", 1, 3, prefix="frame_")
    number_frames(root / "Sintel/training/clean/market_5", 1, 2, prefix="frame_")
    number_frames(root / "Sintel/training/final/alley_1", 1, 3, prefix="frame_")
    number_frames(root / "FlyingChairs_release/data", 1, 2, size=(48, 60), digits=1, prefix="00001_img")
    for name in ("n01440764", "n01443537"):
        write_frames(root / "ImageNet/train" / name, 3)
    return root


def test_the_parts_of_the_mix_are_the_data_sets_that_can_be_found():
    assert set(train.asdict(train.MixConfig())) == set(VIDEO_SETS)


def test_show_data_prints_what_is_there_the_mix_and_where_to_get_the_rest(data_root, monkeypatch, capsys, tmp_path):
    flags = ["--data-root", data_root, "--mix.chairs.repeats", 40, "--output-dir", tmp_path / "run"]
    run(monkeypatch, "pocket", *flags, "--show-data")
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["sintel_clean"] == ["2", "3", "100", f"{300 / 540:.2%}", str(data_root / "Sintel")]
    assert rows["sintel_final"] == ["1", "2", "100", f"{200 / 540:.2%}", str(data_root / "Sintel")]
    assert rows["chairs"] == ["1", "1", "40", f"{40 / 540:.2%}", str(data_root / "FlyingChairs_release")]
    assert any("6 images in 2 classes" in line for line in lines)
    missing = [line for line in lines if line.startswith("missing: ")]
    assert len(missing) == len(VIDEO_SETS) - 3 and all("https://" in line or "http://" in line for line in missing)
    assert not (tmp_path / "run").exists()


def test_a_row_of_table_2_is_one_flag(data_root, monkeypatch, capsys):
    def shown(*sets) -> list[str]:
        run(monkeypatch, "pocket", "--data-root", data_root, "--show-data", "--sets", *sets)
        return [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()[0] in VIDEO_SETS]

    assert shown("sintel") == ["sintel_clean", "sintel_final"]
    assert shown("sintel_final", "chairs") == ["sintel_final", "chairs"]
    line = fails(monkeypatch, capsys, "pocket", "--data-root", data_root, "--sets", "hd1k")
    assert "it does not hold hd1k" in line and "hci-benchmark" in line and "hd1k_input/image_2" in line
    assert "no such data set" in fails(monkeypatch, capsys, "pocket", "--data-root", data_root, "--sets", "kiti")
    line = fails(monkeypatch, capsys, "pocket", "--data-root", data_root, "--sets", "kitti", "--output-dir", "nowhere")
    assert "none of kitti_raw, kitti2012, kitti2015" in line


def test_the_data_sets_train_together_whatever_their_size_and_go_on_exactly(data_root, monkeypatch, tmp_path, capsys):
    flags = ["--data-root", data_root, "--flow-start-epoch", 0, "--mix.sintel-final.crop", 40, 40]
    run(monkeypatch, *TINY, *flags, "--output-dir", tmp_path / "whole", "--max-steps", 4)
    assert "sintel_clean" in capsys.readouterr().out
    for stop in (2, 4):
        flags[1] = data_root / "Sintel" / ".." if stop == 4 else data_root  # another spelling of the same folder
        arguments = [*flags, "--output-dir", tmp_path / "halves", "--max-steps", stop]
        run(monkeypatch, *TINY, *arguments, *(["--resume"] if stop > 2 else []))
    assert not changed(model_of(tmp_path / "whole"), model_of(tmp_path / "halves"))
    recorded = json.loads((tmp_path / "whole/config.json").read_text())
    assert recorded["mix"]["sintel_final"] == {"repeats": 100, "crop": [40, 40]} and recorded["data_root"]


def test_each_data_set_is_cut_as_the_configuration_says(data_root):
    flags = ["--data-root", data_root, "--crop", 64, 64, "--mix.sintel-final.crop", 32, 48]
    mix, _ = train.open_mix(train.read_config(["pocket", *map(str, flags)]))
    windows = {name: (part.transform.window, part.transform.enlarge) for name, part in mix.parts.items()}
    assert all(isinstance(part, FramePairs) for part in mix.parts.values())
    assert windows == {"sintel_clean": ((64, 64), True), "sintel_final": ((32, 48), False), "chairs": ((64, 64), True)}
    assert all(image.shape == (3, 64, 64) for index in (0, 301, len(mix) - 1) for image in mix[index])


def test_content_needs_imagenet_and_flow_alone_does_not(data_root, monkeypatch, capsys, tmp_path):
    for path in sorted((data_root / "ImageNet").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    flags = ["--data-root", data_root, "--max-steps", 1, "--output-dir", tmp_path / "run"]
    line = fails(monkeypatch, capsys, *TINY, *flags)
    assert "no ImageNet in it" in line and "image-net.org" in line
    run(monkeypatch, *TINY, *flags, "--task", "mjepa")
    run(monkeypatch, *TINY, *flags[:4], "--image-dir", data_root / "Sintel", "--output-dir", tmp_path / "other")
    run(monkeypatch, *TINY, "--task", "vicreg", "--max-steps", 1, "--output-dir", tmp_path / "content")
    init = ["--strategy", "frozen", "--init", tmp_path / "content/checkpoint.pt", "--output-dir", tmp_path / "frozen"]
    run(monkeypatch, *TINY, *flags[:4], *init)
    assert learned(tmp_path / "frozen") == "F"


def test_a_gap_in_the_numbering_is_told_and_no_pair_made_across(data_root, monkeypatch, capsys):
    folder = data_root / "Sintel/training/clean/alley_1"
    cv2.imwrite(str(folder / "frame_0007.png"), np.zeros((80, 96, 3), np.uint8))
    cv2.imwrite(str(folder / "frame_0008.png"), np.zeros((80, 96, 3), np.uint8))
    run(monkeypatch, "pocket", "--data-root", data_root, "--show-data")
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("sintel_clean")).split()[1:3] == ["3", "4"]
    assert any("frame_0003.png: 3 frames are missing" in line and "frame_0007.png" in line for line in lines)
