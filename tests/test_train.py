"""train.py: a stopped run continues exactly, each step learns what the plan says, and a mistake costs one line."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import raises_one_line, torchrun, write_frames, write_image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import train
from encoder import PWCPyramid
from engine import checkpoint, processes
from engine.faults import run_command
from mcjepa import MCJEPA, ModelConfig, load_model

TINY = [
    "pocket", "--workers", "0", "--crop", "64", "64", "--image-size", "32", "--video-batch", "2", "--image-batch", "4",
    "--model.estimator-factor", "0.125", "--model.expander", "16", "16", "16", "--validation-pairs", "1",
    "--steps-per-epoch", "4", "--epochs", "2", "--flow-start-epoch", "0.5", "--mask-warmup-epochs", "0.5",
    "--regularisation-warmup-epochs", "0.75", "--warmup-epochs", "1.5", "--log-every", "1", "--checkpoint-every", "3",
]  # fmt: skip
"""Eight steps. Flow starts at step 2, masks at 4; Eq. 6 has its full weight from step 4, the learning rates from 5."""
train.environment = cache(train.environment)  # the versions of all packages take as long as three steps


def config_of(*flags):
    return train.parse([*TINY, *map(str, flags)])


def run(folder, *flags):
    """A run in this process. Returns its folder."""
    train.train(config_of("--output-dir", folder, *flags))
    return folder


def fails(capsys, *arguments):
    """The only line that a command which has to fail prints on stderr, beside its progress; the exit code is 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: train.train(train.parse([*map(str, arguments)])))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    lines = [line for line in lines if not re.search("step/s|s/step", line)]
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def state_of(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


def weights(folder, name="checkpoint.pt"):
    return state_of(folder, name)["model"]


def changed(before, after):
    """The parts of the model in which a number differs, averages of batch norms included."""
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


def records(folder, name="total"):
    """The lines of metrics.jsonl that have this entry."""
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if name in line]


def learned(folder):
    """What each step has learned: C content, F flow, B both."""
    kinds = {(True, False): "F", (False, True): "C", (True, True): "B"}
    return "".join(kinds["loss/cycle" in line, "loss/vicreg_variance" in line] for line in records(folder))


def assert_same_run(folder, other):
    """Weights, moments of the optimizer and logged losses of two runs are equal bit for bit."""
    ours, theirs = state_of(folder), state_of(other)
    assert ours["step"] == theirs["step"] and not changed(ours["model"], theirs["model"])
    for a, b in zip(*(state["optimizer"]["state"].values() for state in (ours, theirs)), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[(line["step"], line["total"]) for line in records(place)] for place in (folder, other)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The eight steps without a stop, by the number of processes."""
    folders = {count: tmp_path_factory.mktemp(f"whole_{count}") for count in (1, 2)}
    run(folders[1])  # first in this process: what it imports and remembers, all that are forked from it have
    torchrun(2, run, folders[2])
    return folders


# ------------------------------------------------------------------------------------------ the same command continues


def kill_at(monkeypatch, moment):
    """The process kills itself before a step (a number), when half of a file is written (.partial-NAME), or before a
    file gets its NAME."""

    def deadly(function, place):
        def call(*arguments):
            here = arguments[place]
            if (here if isinstance(here, int) else Path(here).name) == moment:
                if function is save:
                    here.write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    save = torch.save
    monkeypatch.setattr(train, "take_step", deadly(train.take_step, 2))
    monkeypatch.setattr(torch, "save", deadly(save, 1))
    monkeypatch.setattr(os, "replace", deadly(os.replace, 1))


HALF = ".partial-checkpoint.pt"
MOMENTS = (HALF, "best.pt", 4, HALF, "checkpoint.1.pt", "checkpoint.pt", "metrics.jsonl")


@pytest.mark.parametrize(("count", "moments"), [(1, MOMENTS), (2, (HALF, 4, "checkpoint.pt"))])
def test_a_run_killed_again_and_again_ends_with_the_same_weights(count, moments, whole, monkeypatch, tmp_path):
    for moment in moments:
        with monkeypatch.context() as patch, pytest.raises(ChildFailedError):
            kill_at(patch, moment)
            torchrun(count, run, tmp_path)
    torchrun(count, run, tmp_path)
    assert_same_run(tmp_path, whole[count])
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_run_that_stops_again_and_again_equals_one_that_does_not(whole, tmp_path):
    """Across all borders of the plan: the flow start, the warm-ups, the epochs. The number of workers varies."""
    for steps in (1, 2, 3, 4, 5, 8):
        run(tmp_path, "--max-steps", steps, "--workers", 2 * (steps in (3, 8)))
    assert_same_run(tmp_path, whole[1])


@pytest.mark.parametrize(
    ("strategy", "stop", "steps", "parts"),
    [("alternate_batches", 3, "CCFCFC", {"encoder", "estimator", "expander"}), ("frozen", 2, "CCFFFF", {"estimator"})],
)
def test_the_other_strategies_take_their_steps_in_two_processes_and_continue(strategy, stop, steps, parts, tmp_path):
    flags = ("--strategy", strategy, "--steps-per-epoch", 2, "--epochs", 3, "--flow-start-epoch", 1)
    torchrun(2, run, tmp_path / "whole", *flags)
    torchrun(2, run, tmp_path / "parts", *flags, "--max-steps", stop)
    before = weights(tmp_path / "parts")
    torchrun(2, run, tmp_path / "parts", *flags)
    assert learned(tmp_path / "parts") == learned(tmp_path / "whole") == steps
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert changed(before, weights(tmp_path / "parts")) == parts


def test_a_finished_run_prints_one_line_and_does_nothing(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole[1].rglob("*")}
    run(whole[1])
    assert capsys.readouterr().out == f"{whole[1]}: this run is done, at step 8 of 8\n"
    assert {path: path.stat().st_mtime_ns for path in whole[1].rglob("*")} == before


def test_another_configuration_or_other_data_are_refused_in_a_line_that_names_them(tmp_path, capsys):
    images, folder = write_frames(tmp_path / "images", 12), tmp_path / "run"
    run(folder, "--task", "vicreg", "--image-dir", images, "--max-steps", 2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (images / "003.png").unlink()
    flags = ("--image-dir", images, "--seed", 3, "--loss.cycle", 0.5, "--repeats.chairs", 7, "--log-every", 2)
    line = fails(capsys, *TINY, *flags, "--output-dir", folder)
    fields = ("loss.cycle: 0.02 there, 0.5 here", "number of images: 12 there, 11 here", "repeats.chairs: 5 there, 7")
    fields += ("number of frames: None there", "seed: 0 there, 3", "task: vicreg there", "another --output-dir")
    assert all(field in line for field in fields) and "log_every" not in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_moments_of_another_memory_layout_are_the_same_numbers_when_a_run_continues(tmp_path, whole):
    """A GPU keeps them channels_last, and the fused AdamW does not look at strides."""
    state = state_of(run(tmp_path, "--max-steps", 5))
    for moments in state["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].ndim == 4:
                moments[name] = moments[name].to(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "checkpoint.pt")
    assert_same_run(run(tmp_path), whole[1])


def test_with_the_layout_of_a_gpu_gradients_lie_like_their_weights():
    model = MCJEPA(ModelConfig("convnext_tiny", 0.25, expander=(8,)))
    train.put_channels_last(model)
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim == 4}
    images = torch.rand(2, 2, 3, 64, 64).unbind()
    gradients = torch.autograd.grad(model(images, images).total, [*weights.values()])
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        assert gradient.stride() == weight.stride(), name


COMPILED = """
import functools, sys, torch, encoder, train
encoder.PWCPyramid.channels, encoder.PWCPyramid.strides = (32, 24, 16), (8, 4, 2)
torch.compile = functools.partial(torch.compile, backend="eager")  # takes seconds instead of minutes
train.train(train.parse(sys.argv[1:]))
print("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_a_compiled_run_that_continues_between_two_ratios_can_take_the_next_one():
    def compile_and_take():
        config, device = config_of("--compile"), torch.device("cpu")
        train.over_processes(config, train.build(config, device)[0], device)
        compiled, x = torch.compile(lambda x: x.exp().sin().sum(), backend="aot_eager"), torch.ones(2).requires_grad_()
        compiled(x).backward()  # a step without a ratio
        (gradient,) = torch.autograd.grad(compiled(x), x, retain_graph=True)
        torch.testing.assert_close(gradient, x.grad)

    torchrun(1, compile_and_take)  # in a process of its own: after a compiled backward pass no other can be forked


def test_a_compiled_run_of_two_processes_learns_the_same_and_continues_without_the_compiler(monkeypatch, tmp_path):
    (tmp_path / "compiled.py").write_text(COMPILED)
    monkeypatch.setattr(PWCPyramid, "channels", (32, 24, 16))  # half of the levels, which have to be traced
    monkeypatch.setattr(PWCPyramid, "strides", (8, 4, 2))
    flags = ("--model.encoder", "pwc", "--flow-start-epoch", 0, "--learning-rate", 1e-6)
    flags += ("--estimator-learning-rate", 1e-6, "--max-steps")
    # As a user types it, in new processes: without the checks of the annotations, which no compiler can follow.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [tmp_path / "compiled.py", *TINY, *flags, 1, "--output-dir", tmp_path / "run", "--compile"]
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert len(re.findall(r"graphs [1-9]", done.stdout)) == 2, done.stderr[-3000:]
    for name in ("run", "plain"):
        torchrun(2, run, tmp_path / name, *flags, 2)
    for ours, theirs in zip(records(tmp_path / "run"), records(tmp_path / "plain"), strict=True):
        for name in ("total", *(name for name in theirs if name.startswith("gradient_norm"))):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name


@pytest.mark.parametrize(("name", "count"), [("SIGTERM", 1), ("SIGINT", 2)])
def test_a_signal_leaves_a_checkpoint_within_a_step(name, count, whole, monkeypatch, tmp_path, capfd):
    """It comes to the last process and to its loaders, which ignore it; every process stops after the same step."""
    take_step = train.take_step

    def signalled(*arguments):
        if arguments[2] == 3 and processes.rank() == count - 1:
            loaders = [str(process.pid) for process in multiprocessing.active_children()]
            for each in ("TERM", "USR1", "INT"):
                subprocess.run(["kill", f"-{each}", *loaders], check=True)
            os.kill(os.getpid(), getattr(signal, name))
        return take_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", signalled)
        torchrun(count, run, tmp_path, "--workers", 1)
    assert f"stopped by {name} after step 5 of 8: the same command continues" in capfd.readouterr().out
    assert state_of(tmp_path)["step"] == 5  # --checkpoint-every has none of it
    torchrun(count, run, tmp_path)
    assert_same_run(tmp_path, whole[count])


def test_after_a_damaged_checkpoint_a_run_continues_from_the_one_before(whole, tmp_path, capfd):
    torchrun(2, run, tmp_path, "--max-steps", 5)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"")
    torchrun(2, run, tmp_path)
    (warning,) = re.findall("(?m)^warning: .*", capfd.readouterr().out)
    assert str(path) in warning and warning.endswith("continuing from checkpoint.1.pt")
    assert_same_run(tmp_path, whole[2])
    assert (tmp_path / "damaged-checkpoint.pt").exists() and state_of(tmp_path, "checkpoint.1.pt")["step"] == 6


def test_the_best_checkpoint_has_the_lowest_validation_error_also_across_stops(monkeypatch, tmp_path):
    errors, best = iter([3.0, 2.0, 5.0, 1.0, 4.0]), []
    monkeypatch.setattr(train, "flow_errors_on_shapes", lambda *_: {"epe": next(errors), "epe_zero": 4.0, "f1": 0.5})
    for epoch in (2, 3, 5):
        run(tmp_path, "--epochs", 5, "--steps-per-epoch", 1, "--flow-start-epoch", 0, "--max-steps", epoch)
        best.append(state_of(tmp_path, "best.pt")["step"])
    assert best == [2, 2, 4]


@pytest.mark.parametrize("flag", ["--init", "--backbone", "--output-dir"])
@pytest.mark.parametrize("kind", ["text", "code", "head"])
def test_a_file_of_another_kind_is_one_line_and_code_in_it_is_never_executed(flag, kind, tmp_path, capsys):
    code = type("Code", (), {"__reduce__": lambda _: (Path.touch, (tmp_path / "executed",))})()
    head = {"model": {"weight": torch.zeros(3)}, "config": {}, "step": 1}
    torch.save({"text": "none", "code": head | {"step": code}, "head": head}[kind], path := tmp_path / "checkpoint.pt")
    flags = ["--output-dir", tmp_path] if flag == "--output-dir" else [flag, path, "--model.encoder", "resnet50"]
    assert str(path) in fails(capsys, *TINY, "--output-dir", tmp_path / "run", *flags)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


def test_when_torchrun_restarts_the_processes_the_run_ends_with_the_same_weights(whole, tmp_path):
    def killed_once():
        with pytest.MonkeyPatch.context() as patch:
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and processes.rank() == 1:
                kill_at(patch, 5)
            run(tmp_path)

    torchrun(2, killed_once, restarts=1)
    assert_same_run(tmp_path, whole[2])


def test_in_several_processes_a_mistake_is_reported_once_and_nothing_is_written(tmp_path, capfd):
    with pytest.raises(ChildFailedError):
        torchrun(2, run_command, lambda: run(tmp_path / "run", "--video-batch", 1))
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr().err.count("error: --video-batch 1 must be a multiple of the 2 processes") == 1


# -------------------------------------------------------------------------------------------- bad numbers and bad files


def spoil_total(monkeypatch, calls, spoil):
    """Changes the total loss in these calls of the model."""
    made, forward = [], MCJEPA.forward

    def spoiled(*arguments, **options):
        made.append(losses := forward(*arguments, **options))
        return losses._replace(total=spoil(losses.total)) if len(made) - 1 in calls else losses

    monkeypatch.setattr(MCJEPA, "forward", spoiled)


def test_a_step_with_numbers_that_are_not_finite_changes_neither_weights_nor_averages():
    opened = train.open_run(config_of("--task", "vicreg", "--output-dir", "none"))
    views, model = tuple(torch.rand(2, 4, 3, 32, 32)), opened.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hook = model.expander[0].weight.register_hook(lambda gradient: gradient * math.nan)
    numbers, reports = train.take_step(opened, model, 0, 0, (None, views), [])
    assert not numbers and reports == [("not finite", "gradient_norm/expander")]
    assert not changed(before, model.state_dict()) and not opened.optimizer.state
    hook.remove()
    numbers, reports = train.take_step(opened, model, 0, 0, (None, views), [])
    assert numbers and not reports and changed(before, model.state_dict()) == {"encoder", "expander"}


def test_a_step_of_both_tasks_waits_for_the_gpu_once():
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            called.append(function._schema.name)
            return function(*arguments, **(keywords or {}))

    opened = train.open_run(config_of("--flow-start-epoch", 0, "--output-dir", "none"))
    batch = tuple(tuple(torch.rand(2, n, 3, side, side)) for n, side in ((2, 64), (4, 32)))
    for step in range(2):  # the optimizer makes its state in the first
        called = []
        with Calls():
            assert train.take_step(opened, opened.model, step, step, batch, [])[0]
    waits = {"aten::_local_scalar_dense", "aten::lift_fresh"}  # a value is read, a tensor is made of Python's numbers
    assert [name for name in called if name in waits] == ["aten::_local_scalar_dense"]


def test_where_the_tasks_alternate_each_takes_its_own_batches_one_after_the_other(monkeypatch, tmp_path):
    drawn, make_loader = {}, train.make_loader

    def spy(dataset, *arguments):
        for batch in make_loader(dataset, *arguments):
            drawn.setdefault((strategy, type(dataset).__name__), []).append(batch[0][0].double().mean().item())
            yield batch

    monkeypatch.setattr(train, "make_loader", spy)
    for strategy in ("combined", "alternate_batches"):
        run(tmp_path / strategy, "--strategy", strategy, "--flow-start-epoch", 0, "--max-steps", 6)
    for data in ("ShapePairs", "ShapeImages"):
        assert len(set(drawn["combined", data])) == 6
        assert drawn["alternate_batches", data] == drawn["combined", data][:3]


def test_a_step_that_one_process_alone_finds_bad_is_skipped_in_both(tmp_path):
    def run_and_keep_weights():
        models, over_processes = [], train.over_processes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "over_processes", lambda *args: models.append(args[1]) or over_processes(*args))
            if processes.rank() == 1:  # an infinite loss with a finite gradient: the other process cannot see it
                spoil_total(patch, (3,), lambda total: total + math.inf)
            run(tmp_path)
        torch.save({"model": dict(models[0].named_parameters())}, tmp_path / f"process_{processes.rank()}.pt")

    torchrun(2, run_and_keep_weights)
    assert [line["step"] for line in records(tmp_path, "skipped")] == [4]
    assert not changed(*(weights(tmp_path, f"process_{rank}.pt") for rank in (0, 1)))


def test_bad_steps_are_skipped_and_ten_in_a_row_end_the_run_across_a_stop(monkeypatch, tmp_path, capsys):
    spoil_total(monkeypatch, (2, *range(6, 99)), lambda total: total * math.nan)
    run(tmp_path, "--epochs", 9, "--max-steps", 10)  # the first, and four in a row
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 4, 5, 6]  # a skipped step has no loss
    assert records(tmp_path)[-1]["skipped_steps"] == 1
    assert len(re.findall("step .* is skipped, not finite: .*gradient_norm/encoder", capsys.readouterr().out)) == 5
    line = fails(capsys, *TINY, "--epochs", 9, "--output-dir", tmp_path)
    assert "10 steps in a row were not finite" in line and "lower the learning rates" in line
    assert [line["step"] for line in records(tmp_path, "skipped")] == [3, *range(7, 17)]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_bad_files_are_reported_once_and_passed_over_and_too_many_end_the_run(tmp_path, capfd):
    clips, images = write_frames(tmp_path / "clips/one", 10).parent, write_frames(tmp_path / "images", 15)
    (clips / "one/003.png").write_bytes(b"")
    write_image(clips / "one/007.png", (40, 40))
    for name in ("003", "008", "013"):
        (images / f"{name}.png").write_text("text")
    flags = ("--video-dir", clips, "--image-dir", images, "--bad-files", 0.4)
    flags += ("--flow-start-epoch", 0, "--steps-per-epoch", 5)
    torchrun(2, run, tmp_path / "run", *flags, "--max-steps", 5)
    lines = re.findall("(?m)^bad file . of at most (?:4 frames|6 images), .*", capfd.readouterr().out)
    assert all(sum(f"{name}.png: not a readable image" in x for x in lines) == 1 for name in ("images/003", "one/003"))
    assert any("one, frames 006.png and 007.png" in line and "40x40 px" in line for line in lines)
    assert len(records(tmp_path / "run", "bad_file")) == records(tmp_path / "run")[-1]["bad_files"] == len(lines)
    torchrun(2, run, tmp_path / "run", *flags)
    assert "003.png" not in capfd.readouterr().out  # reported before the stop
    with pytest.raises(ChildFailedError):
        torchrun(2, run, tmp_path / "fewer", *flags, "--task", "vicreg", "--bad-files", 0.14)
    assert "3 images cannot be used, and --bad-files allows 2" in capfd.readouterr().err  # the same in both


def test_a_batch_is_in_floats_from_0_to_1_whether_its_data_are_bytes_or_such_floats():
    pixels = torch.randint(256, (2, 1, 3, 8, 8), dtype=torch.uint8)
    for pair in (pixels, pixels / 255):
        source = train.Source("frames", TensorDataset(*pair), None, 1)
        images, _ = next(train.batches(config_of("--workers", 0), source, 0, torch.device("cpu")))
        torch.testing.assert_close(torch.stack(images), pixels / 255)


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("task", "strategy", "flow_start", "steps"),
    [("mcjepa", "combined", 4, "CCCC BBBB BBBB BBBB"), ("mcjepa", "alternate_batches", 4, "CCCC FCFC FCFC FCFC"),
     ("mcjepa", "alternate_epochs", 4, "CCCC FFFF CCCC FFFF"), ("mcjepa", "frozen", 4, "CCCC FFFF FFFF FFFF"),
     ("mcjepa", "finetune", 0, "FFFF FFFF FFFF FFFF"), ("vicreg", "combined", 0, "CCCC CCCC CCCC CCCC"),
     ("mjepa", "combined", 0, "FFFF FFFF FFFF FFFF")],
)  # fmt: skip
def test_the_plan_says_what_each_step_learns_and_how_many_have_learned_it(task, strategy, flow_start, steps):
    plan = train.Plan(task, strategy, 4, 16, flow_start, 1, 1)
    steps, tasks = steps.replace(" ", ""), {"F": (True, False), "C": (False, True), "B": (True, True)}
    assert [plan.tasks(step) for step in range(16)] == [tasks[kind] for kind in steps]
    for step in (0, 4, 7, 13):
        assert plan.taken(step) == (step - steps[:step].count("C"), step - steps[:step].count("F"))


@pytest.mark.parametrize(
    ("flags", "at_once"),
    [("", False), ("--init a.pt", False), ("--task mjepa", True), ("--strategy frozen", False),
     ("--strategy frozen --init a.pt", True), ("--strategy finetune --init a.pt", True)],
)  # fmt: skip
def test_flow_starts_at_once_where_nothing_else_is_to_be_learned(flags, at_once):
    config = config_of(*flags.split())
    videos, images = train.open_sources(config)
    assert train.make_plan(config, videos, images).flow_start == (0 if at_once else 2)
    assert (images is None) == at_once  # images need not be there


@pytest.mark.parametrize(("task", "per_epoch"), [("mcjepa", 20), ("vicreg", 20), ("mjepa", 5)])
def test_an_epoch_is_one_pass_over_the_images_and_without_them_over_the_pairs(task, per_epoch):
    config = train.Config(task=task, epochs=3)
    images = None if task == "mjepa" else train.Source("images", range(205), None, 10)
    sources = (train.Source("frames", range(23), None, 4), images)
    plan = train.make_plan(config, *sources)
    assert (plan.per_epoch, plan.end, plan.regularisation_warmup) == (per_epoch, 3 * per_epoch, per_epoch)
    at_once = replace(config, regularisation_warmup_epochs=0.0, mask_warmup_epochs=0.0)
    assert train.make_plan(at_once, *sources)[-2:] == (1, 0)
    assert train.make_plan(replace(config, max_steps=7, steps_per_epoch=9), *sources)[2:4] == (9, 7)
    many = train.Source("frames", range(10**8), None, 4)  # no longer than a pass over ImageNet, 384 at a time
    assert train.make_plan(replace(config, image_batch=8), many, None).per_epoch == 1_281_167 // 384


def test_the_learning_rate_warms_up_and_falls_to_zero():
    factors = [train.learning_rate_factor(train.Config(), epoch) for epoch in (0, 5, 10, 55, 100)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-9)


def test_every_step_gets_its_learning_rates_its_masks_and_its_share_of_eq_6(monkeypatch, tmp_path):
    seen, forward = [], MCJEPA.forward

    def spy(model, video=None, views=None, masks=True, regularisation=1.0):
        seen.append((video is not None, masks, regularisation))
        return forward(model, video, views, masks, regularisation)

    monkeypatch.setattr(MCJEPA, "forward", spy)
    warmups = ("--regularisation-warmup-epochs", 1, "--mask-warmup-epochs", 0.75, "--warmup-epochs", 1)
    run(tmp_path, *warmups, "--learning-rate", 0.01, "--estimator-learning-rate", 0.002, "--max-steps", 7)
    flow, masks, shares = zip(*seen, strict=True)
    assert flow == (False,) * 2 + (True,) * 5
    assert masks == (False,) * 5 + (True,) * 2  # three steps after the flow start
    assert shares[2:] == (0.25, 0.5, 0.75, 1.0, 1.0)
    for name, full in (("encoder", 0.01), ("expander", 0.01), ("estimator", 0.002)):
        used = [line[f"learning_rate/{name}"] for line in records(tmp_path)]
        assert used[:4] == pytest.approx([full / 4, full / 2, full * 3 / 4, full])
        assert used[4:] == sorted(used[4:], reverse=True) and used[4] < full


def test_the_balance_moves_to_the_wanted_ratio_of_the_gradients_on_the_encoder():
    opened = train.open_run(config_of("--flow-start-epoch", 0, "--output-dir", "none", "--loss.gradient-ratio", 0.5))
    batch = tuple(tuple(torch.rand(2, n, 3, side, side)) for n, side in ((2, 64), (4, 32)))
    model, norms, balances = opened.model, [], []
    for flow_steps in (0, 5, 10):
        for task in (0, 1):  # each task alone, as the step will see it
            model.zero_grad()
            weights = {name: x.clone() for name, x in model.state_dict().items()}
            alone = model(video=batch[0], masks=False, regularisation=1.0) if task == 0 else model(views=batch[1])
            alone.total.backward()
            norms.append(float(get_total_norm([p.grad for p in model.encoder.parameters() if p.grad is not None])))
            model.load_state_dict(weights)
        numbers, _ = train.take_step(opened, model, 6, flow_steps, batch, [])
        balances.append(float(model.flow_balance))
        assert ("gradient_ratio" in numbers) == (flow_steps != 5)
        if flow_steps != 5:
            assert float(numbers["gradient_ratio"]) == pytest.approx(norms[-2] / norms[-1], rel=1e-3)
    assert balances[0] == balances[1] == pytest.approx(0.5 / (norms[0] / norms[1]), rel=1e-3)
    assert balances[2] == pytest.approx(balances[0] * (0.8 + 0.2 * 0.5 / (norms[4] / norms[5])), rel=1e-3)


def test_the_ratio_of_the_gradients_is_that_of_the_whole_batch_however_many_processes_share_it(whole):
    one, two = (records(whole[count], "gradient_ratio") for count in (1, 2))  # after two steps
    assert len(one) == 1 and one[0]["gradient_ratio"] == pytest.approx(two[0]["gradient_ratio"], rel=1e-2)


@pytest.mark.parametrize("ratio", [0.0, math.inf, math.nan])  # one of the tasks, or both, have no gradient
def test_a_task_without_a_gradient_leaves_a_balance_to_learn_with(ratio, monkeypatch):
    opened = train.open_run(config_of("--flow-start-epoch", 0, "--output-dir", "none"))
    batch = tuple(tuple(torch.rand(2, n, 3, side, side)) for n, side in ((2, 64), (4, 32)))
    monkeypatch.setattr(train, "gradient_ratio", lambda *_: torch.tensor(ratio))
    train.take_step(opened, opened.model, 6, 0, batch, [])
    assert 0 < float(opened.model.flow_balance) < 100


def test_each_part_has_its_learning_rate_and_its_gradient_is_clipped_apart(monkeypatch, tmp_path):
    norms, step = {}, torch.optim.AdamW.step

    def spy(optimizer, *arguments):
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norms[group["name"], group["initial_lr"]] = get_total_norm(gradients).item()
            assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 1e-4)
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = ("--flow-start-epoch", 0, "--max-steps", 1, "--learning-rate", 0.3, "--estimator-learning-rate", 0.2)
    run(tmp_path / "any", *flags, "--clip-gradient", 0)
    assert min(norms.values()) > 0.02
    run(tmp_path, *flags, "--clip-gradient", 0.01)
    assert norms == pytest.approx({("encoder", 0.3): 0.01, ("estimator", 0.2): 0.01, ("expander", 0.3): 0.01}, rel=1e-3)


def test_from_a_checkpoint_a_frozen_encoder_stays_as_it_was_bit_for_bit_and_a_finetuned_one_learns(tmp_path):
    content = run(tmp_path / "content", "--task", "vicreg", "--max-steps", 1)
    assert any("running_mean" in name for name in weights(content))  # averages, which must stay too
    for strategy, parts in (("frozen", set()), ("finetune", {"encoder"})):
        flags = ("--init", content / "checkpoint.pt", "--strategy", strategy, "--max-steps", 2)
        folder = run(tmp_path / strategy, *flags)
        assert learned(folder) == "FF" and changed(weights(content), weights(folder)) == parts


# ------------------------------------------------------------------- what a run leaves, and what it says of a mistake


@pytest.mark.parametrize("task", ["mcjepa", "mjepa", "vicreg"])
def test_each_task_runs_with_one_flag_and_leaves_its_record(task, tmp_path):
    flags = ("--task", task, "--flow-start-epoch", 0, "--max-steps", 2)
    run(tmp_path, *flags)
    line, _ = records(tmp_path)
    assert ("loss/regression" in line) == ("gradient_norm/estimator" in line) == (task != "vicreg")
    assert ("loss/vicreg_variance" in line) == ("deviation/embedding" in line) == (task != "mjepa")
    assert bool(list((tmp_path / "pictures").glob("*.png"))) == (task != "vicreg") == (tmp_path / "best.pt").exists()
    assert any(path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir())
    again = train.parse([str(tmp_path / "config.json"), "--output-dir", "again"])
    assert again == config_of(*flags, "--output-dir", "again")
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == torch.__version__
    model = load_model(tmp_path / "checkpoint.pt")
    assert (model.estimator is None) == (task == "vicreg") and (model.expander is None) == (task == "mjepa")
    assert model.loss_config == again.loss
    handed_on = load_model(tmp_path / "model.safetensors").state_dict()
    assert handed_on.keys() == {name for name in model.state_dict() if not name.startswith("expander.")}
    assert not changed(handed_on, {name: model.state_dict()[name] for name in handed_on})


def test_before_the_flow_an_epoch_says_when_it_starts_and_the_end_names_the_clip_to_measure(tmp_path, capsys):
    clip = write_frames(tmp_path / "my clip", 3)
    run(tmp_path / "run", "--flow-start-epoch", 1, "--max-steps", 5, "--video-dir", clip)
    output = capsys.readouterr().out
    assert "epoch 1: flow starts in epoch 2" in output
    found = r"[\d.]+% of 10 unseen images find their other view \(random weights [\d.]+%\)"
    assert re.search(rf"epoch 2: end-point error [\d.]+ px .*; {found}", output)
    assert f"{tmp_path / 'run' / 'checkpoint.pt'} --video '{clip}'" in output


def test_real_frames_and_images_train_from_an_initial_checkpoint_and_continue_without_it(tmp_path, capsys):
    first = run(tmp_path / "first", "--task", "mjepa", "--max-steps", 1) / "checkpoint.pt"
    clips, images = write_frames(tmp_path / "clips/one", 3).parent, write_frames(tmp_path / "images", 5)
    flags = ("--video-dir", clips, "--image-dir", images, "--init", first, "--flow-start-epoch", 0)
    opened = train.open_run(config_of(*flags, "--output-dir", tmp_path / "none"))
    assert not changed(weights(first.parent), opened.model.state_dict())
    run(tmp_path / "second", *flags, "--max-steps", 1)
    assert f"{first} has no expander: it starts from random weights" in capsys.readouterr().out
    first.unlink()
    run(tmp_path / "second", *flags, "--max-steps", 2)
    assert learned(tmp_path / "second") == "BB" and "has no expander" not in capsys.readouterr().out


def test_the_flags_of_the_data_arrive(tmp_path):
    clip, seed = write_frames(tmp_path / "clips/one", 4), ("--seed", 5)
    videos, images = train.open_sources(config_of("--shapes-motion", 0.3, 1, "--smallest-crop", 0.4, *seed))
    assert (videos.data.motion, videos.data.size, videos.data.seed) == ((0.3, 1.0), (64, 64), 5)
    crop = images.transform.view_1.transforms[0]
    assert (tuple(crop.size), crop.scale) == ((32, 32), (0.4, 1.0))
    own = ("--data-root", tmp_path / "none", "--video-dir", clip.parent, "--image-dir", clip, "--frame-strides", 1, 3)
    videos, images = train.open_sources(config_of(*own))
    assert len(videos.data) == 3 + 1 and len(images.data) == 4 and videos.data.transform.crop == (64, 64)
    models = [train.build(config_of("--seed", seed), torch.device("cpu"))[0].state_dict() for seed in (0, 1)]
    assert changed(*models) == {"encoder", "estimator", "expander"}


def test_the_paper_s_data_sets_train_together_whatever_their_size(tmp_path, capsys):
    data = tmp_path / "data"
    write_frames(data / "Sintel/training/clean/alley_1", 3, name="frame_{:04d}.png", first=1)
    write_frames(data / "FlyingChairs/data", 2, size=(48, 60), name="00001_img{}.png", first=1)
    write_frames(data / "ImageNet/train/n01440764", 4)
    flags = ("--data-root", data, "--flow-start-epoch", 0, "--repeats.chairs", 300)
    run(tmp_path / "run", *flags, "--max-steps", 2)
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert ["sintel_clean", "1", "2", "100"] in rows and ["chairs", "1", "1", "300"] in rows
    shutil.rmtree(data / "ImageNet")
    assert "no ImageNet in it" in fails(capsys, *TINY, *flags, "--output-dir", tmp_path / "none")
    run(tmp_path / "mjepa", *flags, "--task", "mjepa", "--sets", "sintel", "--max-steps", 1)  # needs none
    assert "chairs" not in capsys.readouterr().out


def test_presets_come_back_from_their_config_files_the_paper_s_is_the_default_and_others_are_unknown(tmp_path, capsys):
    for name, preset in train.PRESETS.items():
        every_kind = replace(preset, init=Path("a\udcfc ü.pt"), sets=("kitti", "hd1k"), max_steps=3, compile=True)
        for config in (every_kind, preset):
            checkpoint.write_json(tmp_path / "config.json", checkpoint.as_json(config))
            assert train.parse([str(tmp_path / "config.json")]) == config
        assert train.parse([name]) == preset
    for content in ("", "[1]", "3", '{"gravity": 1}', '{"loss": 3}', "\x00"):
        (tmp_path / "config.json").write_text(content)
        with raises_one_line(ValueError, "config.json: not the config.json of a run of this version"):
            train.parse([str(tmp_path / "config.json")])
    older = checkpoint.as_json(train.Config())
    del older["loss"]["level_flow"]  # today's default might not be what that run had
    checkpoint.write_json(tmp_path / "config.json", older)
    with pytest.raises(ValueError, match="config.json: not the config.json of a run of this version .*level_flow"):
        train.parse([str(tmp_path / "config.json")])
    assert train.parse(["--flow-start-epoch", "10"]) == train.Config() == train.PRESETS["paper"]
    assert (train.Config().epochs, train.Config().model.encoder) == (100, "convnext_tiny")
    assert "unknown preset 'packet': choose paper, pocket" in fails(capsys, "packet")
    assert "none.json" in fails(capsys, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--video-dir nowhere", "nowhere: no such folder"),
        ("--sets kitti", "--sets needs --data-root"),
        ("--video-dir sizes --workers 1", "sizes, frames 000.png and 001.png: 96x80 px and 90x90 px"),
        ("--video-dir small", "height 40 and width 200, smaller than --crop 64 64"),
        ("--image-dir sizes", "2 images, fewer than --image-batch 4"),
        ("--image-dir text --bad-files 1 --image-batch 2", "none of 2 files can be used"),
        ("--strategy frozen --flow-start-epoch 0", "needs a trained encoder: give --init"),
        ("--strategy alternate_epochs --task mjepa", "--strategy alternate_epochs is for two tasks"),
        ("--flow-start-epoch 2", "--flow-start-epoch 2 must be before the end, --epochs 2"),
        ("--image-batch 1", "--image-batch must be at least 2"),
        ("--smallest-crop 0", "--smallest-crop is a share"),
        ("--shapes-motion 2 1", "--shapes-motion is a share of the side"),
        ("--crop -4 64", "--crop must be at least 1, not [-4, 64]"),
        ("--repeats.kitti-raw 0", "--repeats.kitti-raw must be at least 1, not 0"),
        ("--frame-strides --video-dir small", "--frame-strides must be at least 1"),
        ("--learning-rate nan", "--learning-rate must be at least 0, not nan"),
        ("--video-dir .", "--output-dir lies in --video-dir or --image-dir"),
        ("--loss.gradient-ratio -1", "--loss.gradient-ratio must be at least 0, not -1"),
        ("--model.estimator-factor 0", "factor 0 leaves no channels"),
        ("--output-dir text/000.png", "text/000.png"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(flags, words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    write_frames(Path("small"), 2, size=(40, 200))
    write_image(write_frames(Path("sizes"), 2) / "001.png", (90, 90))
    for path in write_frames(Path("text"), 2).iterdir():
        path.write_text("no picture")
    assert words in fails(capsys, *TINY, "--output-dir", "run", *flags.split())
    assert not list(tmp_path.rglob("checkpoint.pt"))
