"""The training command: exactness over processes and over a stop, what a run leaves, and what a mistake costs."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import train
from mcjepa import MCJEPA, LossConfig, ModelConfig, load_model

ROOT = Path(__file__).parent.parent
TINY = [
    "pocket", "--workers", "0", "--crop", "64", "64", "--image-size", "32", "--video-batch", "2", "--image-batch", "4",
    "--model.estimator-factor", "0.125", "--model.expander", "16", "16", "16", "--validation-pairs", "2",
    "--steps-per-epoch", "4", "--epochs", "5", "--log-every", "1", "--regularisation-warmup-epochs", "2",
    "--mask-warmup-epochs", "1", "--checkpoint-every", "3",
]  # fmt: skip


def run(monkeypatch, *arguments) -> None:
    """train.py's main in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


def fails(monkeypatch, capsys, *arguments) -> str:
    """The one line on stderr of a run that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    print(stop.value, file=sys.stderr)  # as the interpreter does, which ends with exit code 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    lines = [line for line in lines if "step/s" not in line and "s/step" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def command(*arguments, processes=1) -> subprocess.CompletedProcess:
    """A command as a user types it."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [*launcher, "train.py", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def write_frames(folder: Path, count: int, size=(80, 96), seed=0) -> Path:
    """A clip of noise that moves by a pixel per frame."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(seed).integers(0, 256, (size[0], size[1], 3), dtype=np.uint8)
    for index in range(count):
        cv2.imwrite(str(folder / f"{index:03d}.png"), np.roll(picture, index, axis=1))
    return folder


# ---------------------------------------------------------------------------------------------- several processes


def _model_and_batches(flow: bool) -> tuple[MCJEPA, dict]:
    torch.manual_seed(0)
    config = ModelConfig(encoder="pwc", estimator_factor=0.125, expander=(16, 16, 16))
    model = MCJEPA(
        config, LossConfig(variance=(1.0,) * 6, covariance=(0.5,) * 6, smoothness=5.0, coarse_levels=0.5)
    ).double()
    for level in model.estimator.levels:  # flows so short that masks leave out a part, in each pair another
        torch.nn.init.normal_(level.last.weight, std=0.0012)
    model.estimator.requires_grad_(flow)
    generator = torch.Generator().manual_seed(1)

    def batch(n, size):  # every sample with a contrast of its own: the processes' data differ much
        contrast = torch.linspace(0.1, 1.0, n, dtype=torch.float64).view(n, 1, 1, 1)
        return tuple(
            contrast * torch.rand(n, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(2)
        )

    batches = {"views": batch(8, 32)}
    if flow:
        batches["video"] = batch(4, 64)
    return model, batches


def _gradient_of_one_process(rank: int, world: int, file: str, flow: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    model, batches = _model_and_batches(flow)
    share = {k: tuple(x.chunk(world)[rank] for x in v) for k, v in batches.items()}
    parallel = DistributedDataParallel(model)  # must outlive the backward pass, whose gradients it averages
    losses = parallel(**share)
    losses.total.backward()
    if rank == 0:
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        torch.save((gradients, losses.monitor), file + ".pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("flow", [False, True], ids=["before the flow starts", "after the flow has started"])
def test_gradients_of_two_processes_equal_those_of_one_on_the_joined_batch(flow, tmp_path):
    file = str(tmp_path / "meeting")
    mp.spawn(_gradient_of_one_process, args=(2, file, flow), nprocs=2)
    gradients, monitor = torch.load(file + ".pt", weights_only=True)
    model, batches = _model_and_batches(flow)
    losses = model(**batches)
    losses.total.backward()
    for name, value in losses.monitor.items():
        if name.startswith("deviation/") and name != "deviation/pooled":  # that one is of the process alone
            torch.testing.assert_close(monitor[name], value, rtol=1e-9, atol=0, msg=name)
    expected = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == gradients.keys()
    assert any(k.startswith("estimator") for k in expected) == flow
    if flow:
        firsts, seconds = (frames.split(1) for frames in batches["video"])
        pairs = zip(firsts, seconds, strict=True)
        shares = [float(model(video=pair).monitor["visible"]) for pair in pairs]
        assert all(0.25 < share < 0.95 for share in shares) and max(shares) - min(shares) > 0.03
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-9 + 1e-5 * float(gradient.abs().max()))


def test_eight_processes_start_and_make_steps_across_the_flow_start(tmp_path):
    arguments = [*TINY, "--video-batch", 8, "--image-batch", 16, "--flow-start-epoch", 0.5, "--max-steps", 4]
    done = command(*arguments, "--output-dir", tmp_path / "run", processes=8)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "total" in line}
    assert sorted(steps) == [1, 2, 3, 4]
    assert "loss/regression" not in steps[2] and "loss/regression" in steps[3]


# ------------------------------------------------------------------------------------------------- stop and resume


def test_ten_steps_and_ten_more_after_a_resume_equal_twenty_bit_for_bit(monkeypatch, tmp_path, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    late = ["--flow-start-epoch", 2]  # the stop at 10 lies within an epoch, and the flow starts before it, at 8
    run(monkeypatch, *TINY, *late, "--output-dir", whole)
    run(monkeypatch, *TINY, *late, "--output-dir", halves, "--max-steps", 10)
    run(monkeypatch, *TINY, *late, "--output-dir", halves, "--resume")
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, halves))
    assert a["step"] == b["step"] == 20
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for one, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(one[k], other[k]) for k in one)

    def totals(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["total"] for line in lines if "total" in line}

    assert totals(whole) == totals(halves)


def test_a_resume_across_the_flow_start_takes_the_same_steps(monkeypatch, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    late = ["--flow-start-epoch", 1, "--epochs", 2]
    run(monkeypatch, *TINY, *late, "--output-dir", whole)
    run(monkeypatch, *TINY, *late, "--output-dir", halves, "--max-steps", 3)
    assert torch.load(halves / "checkpoint.pt", weights_only=True)["step"] == 3
    run(monkeypatch, *TINY, *late, "--output-dir", halves, "--resume", halves / "checkpoint.pt")
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (whole, halves))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_resume_from_another_configuration_names_the_fields_and_loses_nothing(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "run"
    run(monkeypatch, *TINY, "--output-dir", folder, "--max-steps", 2)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    line = fails(monkeypatch, capsys, *TINY, "--output-dir", folder, "--resume", "--learning-rate", 0.5, "--seed", 3)
    assert "learning_rate" in line and "seed" in line and "0.5 here" in line
    line = fails(monkeypatch, capsys, *TINY, "--output-dir", folder)
    assert "already holds a run" in line
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_resume_brings_back_every_generator_of_random_numbers(monkeypatch, tmp_path):
    run(monkeypatch, *TINY, "--output-dir", tmp_path / "run", "--max-steps", 1)
    config = train.read_config([*TINY, "--output-dir", str(tmp_path / "run"), "--resume"])
    drawn = []
    for seed in (1, 2):
        model, optimizer = train.build(config, torch.device("cpu"))
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        train.resume(config, model, optimizer)
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert drawn[0] == drawn[1]


def test_a_resume_takes_back_the_lines_after_the_checkpoint_and_one_that_was_cut(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    run(monkeypatch, *TINY, "--output-dir", folder, "--max-steps", 3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "total": 1.0}\n{"step": 6, "tot')
    run(monkeypatch, *TINY, "--output-dir", folder, "--max-steps", 4, "--resume")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "total" in line] == [1, 2, 3, 4]


def test_a_resume_from_elsewhere_does_not_overwrite_the_run_that_lies_here(monkeypatch, tmp_path, capsys):
    for name in ("a", "b"):
        run(monkeypatch, *TINY, "--output-dir", tmp_path / name, "--max-steps", 1)
    elsewhere = ["--resume", tmp_path / "a/checkpoint.pt", "--output-dir", tmp_path / "b"]
    assert "already holds a run" in fails(monkeypatch, capsys, *TINY, *elsewhere)
    assert "no such checkpoint" in fails(monkeypatch, capsys, *TINY, "--resume", tmp_path / "no.pt")
    run(monkeypatch, *TINY, *elsewhere[:2], "--output-dir", tmp_path / "c", "--max-steps", 2)
    assert torch.load(tmp_path / "c/checkpoint.pt", weights_only=True)["step"] == 2


def test_a_stop_between_an_epoch_s_checkpoint_and_its_measurement_loses_neither(monkeypatch, tmp_path, capsys):
    folder, end_of_epoch = tmp_path / "run", train.end_of_epoch

    def stop(*arguments):
        raise OSError("stopped")

    monkeypatch.setattr(train, "end_of_epoch", stop)
    with pytest.raises(SystemExit):
        run(monkeypatch, *TINY, "--output-dir", folder, "--epochs", 1)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4
    monkeypatch.setattr(train, "end_of_epoch", end_of_epoch)
    before = (folder / "environment.json").stat().st_mtime_ns
    for _ in range(2):  # the second time there is nothing left to do
        run(monkeypatch, *TINY, "--output-dir", folder, "--epochs", 1, "--resume")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation/epe" in line] == [4]
    assert (folder / "pictures/epoch_001.png").exists()
    assert "no steps left:" in capsys.readouterr().out
    assert (folder / "environment.json").stat().st_mtime_ns == before  # the record is that of the steps taken


def test_a_full_disk_is_told_and_the_last_checkpoint_kept(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    run(monkeypatch, *TINY, "--output-dir", folder, "--max-steps", 1)
    before = (folder / "checkpoint.pt").read_bytes()

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="checkpoint.pt: cannot be written; is the disk full"):
        run(monkeypatch, *TINY, "--output-dir", folder, "--resume")
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob(".partial-*"))


# ------------------------------------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("task", ["mcjepa", "mjepa", "vicreg"])
def test_each_task_runs_with_one_flag_and_leaves_checkpoint_metrics_and_pictures(task, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    run(monkeypatch, *TINY, "--task", task, "--output-dir", folder, "--max-steps", 2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "total" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert ("loss/regression" in steps[0]) == (task != "vicreg")
    assert ("loss/vicreg_invariance" in steps[0]) == (task != "mjepa")
    assert ("deviation/stride_2" in steps[0]) == (task != "vicreg")
    assert any(key.startswith("gradient_norm/") for key in steps[0])
    assert bool(list((folder / "pictures").glob("*.png"))) == (task != "vicreg")
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "config.json").read_text())["task"] == task
    assert "torch" in json.loads((folder / "environment.json").read_text())
    assert not list(folder.rglob(".partial-*"))
    model = load_model(folder / "checkpoint.pt")
    assert (model.estimator is None) == (task == "vicreg") and (model.expander is None) == (task == "mjepa")


def test_real_frames_and_images_train_from_an_initial_checkpoint(monkeypatch, tmp_path, capsys):
    run(monkeypatch, *TINY, "--task", "mjepa", "--output-dir", tmp_path / "first", "--max-steps", 2)
    clips, images = write_frames(tmp_path / "clips/one", 3).parent, write_frames(tmp_path / "images", 5)
    arguments = ["--video-dir", clips, "--image-dir", images, "--init", tmp_path / "first/checkpoint.pt"]
    run(monkeypatch, *TINY, *arguments, "--output-dir", tmp_path / "second", "--max-steps", 2)
    assert "it has no expander" in capsys.readouterr().out
    run(monkeypatch, *TINY, *arguments, "--output-dir", tmp_path / "second", "--max-steps", 3, "--resume")
    assert "weights from" not in capsys.readouterr().out  # the same command goes on; it does not begin again
    run(monkeypatch, *TINY, *arguments[:4], "--output-dir", tmp_path / "second", "--max-steps", 4, "--resume")
    recorded = json.loads((tmp_path / "second/config.json").read_text())
    assert recorded["init"] == str(tmp_path / "first/checkpoint.pt")
    assert load_model(tmp_path / "second/checkpoint.pt")


def test_workers_do_not_change_the_run(monkeypatch, tmp_path):
    for workers in (0, 2):
        run(monkeypatch, *TINY, "--workers", workers, "--output-dir", tmp_path / str(workers), "--max-steps", 2)
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("0", "2"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_paper_s_command_is_the_default_configuration():
    config = train.read_config(["--flow-start-epoch", "10"])
    assert config == train.Config() and config.epochs == 100 and config.model.encoder == "convnext_tiny"


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = train.Config(epochs=100, warmup_epochs=10)
    factors = [train.schedule(config, epoch) for epoch in (0, 5, 10, 55, 100)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-9)


def test_every_step_gets_its_learning_rates_its_masks_and_its_share_of_eq_6(monkeypatch, tmp_path):
    seen, forward = [], MCJEPA.forward

    def spy(model, video=None, views=None, masks=True, regularisation=1.0):
        seen.append((video is not None, masks, regularisation))
        return forward(model, video, views, masks, regularisation)

    monkeypatch.setattr(MCJEPA, "forward", spy)
    late = ["--flow-start-epoch", 0.5, "--regularisation-warmup-epochs", 1, "--mask-warmup-epochs", 0.75]
    rates = ["--learning-rate", 0.01, "--estimator-learning-rate", 0.002, "--warmup-epochs", 1]
    folder = tmp_path / "run"
    run(monkeypatch, *TINY, *late, *rates, "--output-dir", folder, "--max-steps", 7, "--validation-pairs", 0)
    # Four steps an epoch; the flow starts at step 2, its masks at step 5, and Eq. 6 is whole at step 5.
    flow, masks, shares = zip(*seen, strict=True)
    assert flow == (False,) * 2 + (True,) * 5
    assert masks == (False,) * 5 + (True,) * 2
    assert shares[2:] == (0.25, 0.5, 0.75, 1.0, 1.0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name, full in (("encoder", 0.01), ("expander", 0.01), ("estimator", 0.002)):
        used = [line[f"learning_rate/{name}"] for line in lines if "total" in line]
        assert used[:4] == pytest.approx([full / 4, full / 2, full * 3 / 4, full])
        assert used[4:] == sorted(used[4:], reverse=True) and used[4] < full


def test_each_part_is_a_group_of_its_own_and_the_estimator_has_its_own_learning_rate():
    config = train.read_config([*TINY, "--learning-rate", "0.3", "--estimator-learning-rate", "0.2"])
    model, optimizer = train.build(config, torch.device("cpu"))
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates == {"encoder": 0.3, "estimator": 0.2, "expander": 0.3}
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len({*map(id, grouped)})


def test_the_gradient_of_each_part_is_clipped_on_its_own(monkeypatch, tmp_path):
    seen, step = [], torch.optim.AdamW.step

    def spy(optimizer, *arguments):
        for group in optimizer.param_groups:
            seen.append(torch.nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None]).item())
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    arguments = ["--output-dir", tmp_path / "run", "--max-steps", 1, "--clip-gradient", 0.01]
    run(monkeypatch, *TINY, *arguments)
    assert seen == pytest.approx([0.01, 0.01, 0.01], rel=1e-3)  # none has less because another is louder


@pytest.mark.parametrize(("task", "per_epoch", "flow_start"), [("mcjepa", 20, 30), ("vicreg", 20, 30), ("mjepa", 5, 0)])
def test_an_epoch_is_one_pass_over_the_images_and_for_flow_only_over_the_pairs(task, per_epoch, flow_start):
    config = train.Config(task=task, image_batch=10, video_batch=4, epochs=3, flow_start_epoch=1.5)
    plan = train.make_plan(config, videos=range(23), images=None if task == "mjepa" else range(205))
    assert (plan.per_epoch, plan.last, plan.flow_start) == (per_epoch, 3 * per_epoch, flow_start)
    assert plan.regularisation_warmup == plan.mask_warmup == per_epoch


# ----------------------------------------------------------------------------------------------------- mistakes


def _mistake(kind: str, folder: Path) -> tuple[list, str]:
    """Arguments of train.py, and what the error must say."""
    if kind == "missing folder":
        return ["--video-dir", folder / "nowhere"], "nowhere"
    if kind == "folder without frames":
        (folder / "empty").mkdir()
        return ["--video-dir", folder / "empty"], "empty"
    if kind == "folder without images":
        (folder / "empty").mkdir()
        return ["--image-dir", folder / "empty"], "empty"
    if kind == "clip of one frame":
        return ["--video-dir", write_frames(folder / "clip", 1)], "clip"
    if kind == "frames of different sizes":
        write_frames(folder / "clip", 2)
        cv2.imwrite(str(folder / "clip/001.png"), np.zeros((90, 90, 3), np.uint8))
        return ["--video-dir", folder / "clip"], "clip"
    if kind == "text file named .png":
        (write_frames(folder / "clip", 2) / "001.png").write_text("no picture")
        return ["--video-dir", folder / "clip"], "001.png"
    if kind == "image smaller than the crop":
        clip = write_frames(folder / "clip", 2, size=(40, 200))
        return ["--video-dir", clip], "clip, frames 000.png and 001.png: an image of"
    if kind == "unknown preset":
        return ["packet"], "unknown preset 'packet'"
    if kind == "flow that never starts":
        return ["--flow-start-epoch", 5], "--flow-start-epoch 5 is not before the end"
    if kind == "log every 0 steps":
        return ["--log-every", 0], "--log-every must be at least 1"
    if kind == "no pairs":
        return ["--video-batch", 0], "batches must be at least 1"
    if kind == "fewer than no workers":
        return ["--workers", -1], "--workers"
    if kind == "estimator of no width":
        return ["--model.estimator-factor", 0], "factor 0 leaves no channels"
    if kind == "crop of no height":
        return ["--crop", 0, 64], "--crop must be at least 1"
    if kind == "crop scale upside down":
        return ["--crop-scale", 1.0, 0.5], "--crop-scale"
    if kind == "weights without an optimizer":
        torch.save({"model": {}, "config": {}, "step": 0}, folder / "weights.pt")
        return ["--resume", folder / "weights.pt"], "holds weights only"
    if kind == "missing checkpoint":
        return ["--init", folder / "none.pt"], "none.pt"
    return ["--image-batch", 1], "--image-batch"


@pytest.mark.parametrize(
    "kind",
    [
        "missing folder", "folder without frames", "folder without images", "clip of one frame",
        "frames of different sizes", "text file named .png", "image smaller than the crop", "unknown preset",
        "missing checkpoint", "image batch of one", "flow that never starts", "log every 0 steps", "crop of no height",
        "no pairs", "fewer than no workers", "estimator of no width", "crop scale upside down",
        "weights without an optimizer",
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_gives_one_line_that_names_the_thing(kind, workers, monkeypatch, tmp_path, capsys):
    if workers and kind not in ("frames of different sizes", "text file named .png", "image smaller than the crop"):
        pytest.skip("found before a worker starts")
    arguments, told = _mistake(kind, tmp_path)
    rest = [] if kind == "unknown preset" else [*TINY, "--workers", workers, "--output-dir", tmp_path / "run"]
    line = fails(monkeypatch, capsys, *rest, *arguments)
    assert told in line
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_more_processes_than_pairs_are_told_once_under_torchrun(tmp_path):
    done = command(*TINY, "--output-dir", tmp_path / "run", processes=4)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert done.stderr.count("error: --video-batch 2 cannot be spread over 4 processes: take a multiple") == 1


def test_more_processes_than_pairs_and_an_unknown_flag_stop_without_a_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    line = fails(monkeypatch, capsys, *TINY, "--output-dir", tmp_path / "run")
    assert "--video-batch 2 cannot be spread over 4 processes" in line
    train.check(train.read_config([*TINY, "--task", "vicreg"]), world=4)  # which takes no pairs
    monkeypatch.delenv("WORLD_SIZE")
    done = command("pocket", "--no-such-flag", "1")
    assert done.returncode != 0 and "Traceback" not in done.stderr and "no-such-flag" in done.stdout + done.stderr
