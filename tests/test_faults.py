"""What a run survives: kills, signals, broken checkpoints, bad files, bad numbers, hostile files. The quick cases.

experiments/faults.py has the long ones, and the helpers that both use.
"""

import json
import os
import signal
import struct
import subprocess
import sys

import cv2
import faults
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_train import TINY, command, fails, run, write_frames

import train
from data import BadFile, ImageFiles, ShardedStream, VideoPairs, find_files, load_image, make_loader
from engine.checkpoint import generations, replacing
from mcjepa import MCJEPA, load_checkpoint, load_model


def checkpoint(folder, name="checkpoint.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def assert_same_weights(folder, other) -> None:
    ours, theirs = checkpoint(folder)["model"], checkpoint(other)["model"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def events(folder, name) -> list[dict]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if name in line]


# ------------------------------------------------------------------------------------------------- killed and signalled


@pytest.mark.parametrize("count, processes", [(4, 1), (2, 2)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_one_that_is_not(count, processes, tmp_path):
    row = faults.kills(tmp_path, count, processes)
    assert row.survived == row.tried == count, row.note


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint_and_a_sentence(name, monkeypatch, tmp_path, capsys):
    whole, folder, take_step = tmp_path / "whole", tmp_path / "run", train.take_step
    run(monkeypatch, *TINY, "--epochs", 2, "--output-dir", whole)

    def signalled(config, plan, step, *others):
        if step == 4:
            os.kill(os.getpid(), getattr(signal, name))
        return take_step(config, plan, step, *others)

    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", signalled)
        run(patch, *TINY, "--epochs", 2, "--output-dir", folder)
    assert f"stopped by {name} after step 5 of 8: the same command with --resume goes on" in capsys.readouterr().out
    assert checkpoint(folder)["step"] == 5  # --checkpoint-every is 3
    assert signal.getsignal(getattr(signal, name)) == before
    run(monkeypatch, *TINY, "--epochs", 2, "--output-dir", folder, "--resume")
    assert_same_weights(folder, whole)


def test_a_signal_to_every_process_of_a_job_with_loaders_is_survived(tmp_path):
    row = faults.signal_to_all(tmp_path)
    assert row.survived == row.tried, row.note


def test_a_later_signal_ends_the_run_at_once_and_an_echo_of_the_first_does_not(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt), train.stop_signals() as came:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert came == ["SIGTERM", "SIGTERM", "SIGINT"]
        clock[0] += 6
        signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------------- generations of checkpoints


def test_the_last_checkpoints_are_kept_the_newest_first(monkeypatch, tmp_path):
    run(monkeypatch, *TINY, "--epochs", 2, "--checkpoint-every", 1, "--output-dir", tmp_path / "run")
    names = [path.name for path in train.checkpoints(tmp_path / "run")]
    assert names == ["checkpoint.pt", "checkpoint.1.pt", "checkpoint.2.pt"]
    assert [checkpoint(tmp_path / "run", name)["step"] for name in names] == [8, 7, 6]
    flags = ["--epochs", 1, "--checkpoint-every", 1, "--keep-checkpoints", 1]
    run(monkeypatch, *TINY, *flags, "--output-dir", tmp_path / "one")
    assert [path.name for path in train.checkpoints(tmp_path / "one")] == ["checkpoint.pt"]


@pytest.mark.parametrize("kind", ["cut", "empty", "changed", "gone"])
def test_from_a_broken_checkpoint_the_run_goes_back_to_the_one_before_and_says_so(kind, monkeypatch, tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(monkeypatch, *TINY, "--epochs", 2, "--output-dir", whole)
    run(monkeypatch, *TINY, "--epochs", 2, "--output-dir", folder, "--max-steps", 5)
    faults.spoil(folder / "checkpoint.pt", kind)
    capsys.readouterr()
    if kind == "gone":  # also then it is a run that must not be written over
        assert "already holds a run" in fails(monkeypatch, capsys, *TINY, "--output-dir", folder)
    run(monkeypatch, *TINY, "--epochs", 2, "--output-dir", folder, "--resume")
    told = [line for line in capsys.readouterr().out.splitlines() if "Going on from checkpoint.1.pt" in line]
    assert len(told) == 1 and "checkpoint.pt: " in told[0]
    assert_same_weights(folder, whole)
    # The broken one is out of the row: it pushes no good one out.
    assert all(load_checkpoint(path) for path in train.checkpoints(folder)) and len(train.checkpoints(folder)) == 3
    assert (folder / "broken-checkpoint.pt").exists() == (kind != "gone")


def test_without_any_whole_checkpoint_the_resume_fails_in_one_line(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "run"
    run(monkeypatch, *TINY, "--output-dir", folder, "--max-steps", 4)
    for path in train.checkpoints(folder):
        faults.spoil(path, "cut")
    line = fails(monkeypatch, capsys, *TINY, "--output-dir", folder, "--resume")
    assert "checkpoint.pt: not a checkpoint" in line and "checkpoint.1.pt: not a checkpoint" in line


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_kill_between_two_names_leaves_the_newest_checkpoint_where_it_was(moment, monkeypatch, tmp_path):
    path = tmp_path / "a.pt"
    for content in ("oldest", "older", "newer"):
        with replacing(path, keep=3) as temporary:
            temporary.write_text(content)
    assert [each.read_text() for each in generations(path, 3)] == ["newer", "older", "oldest"]
    moves, replace = [], os.replace

    def stop(source, target):
        moves.append(target)
        if len(moves) == moment:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt), replacing(path, keep=3) as temporary:
        temporary.write_text("newest")
    assert path.read_text() == "newer" and moves[-1] == (*reversed(generations(path, 3)[1:]), path)[moment - 1]
    assert not list(tmp_path.glob(".partial-*"))


def test_the_best_checkpoint_is_that_of_the_epoch_with_the_lowest_error(monkeypatch, tmp_path):
    errors = iter([0.5, 9.0, 3.0, 2.0, 5.0])  # the first two are from before the masks are on
    measure = lambda *_: {"epe": next(errors), "epe_zero": 4.0, "f1": 0.5}  # noqa: E731
    monkeypatch.setattr(train, "evaluate_flow_on_shapes", measure)
    flags = [*TINY, "--regularisation-warmup-epochs", 1, "--epochs", 5, "--output-dir", tmp_path / "run"]
    best = []
    for epoch in range(1, 6):  # a stop after each: the record, not the memory, knows the best
        run(monkeypatch, *flags, "--max-steps", 4 * epoch, *(["--resume"] if epoch > 1 else []))
        best.append(checkpoint(tmp_path / "run", "best.pt")["step"])
    assert best == [4, 8, 12, 16, 16]
    assert [line["score"] for line in events(tmp_path / "run", "score")] == [0.5, 9.0, 3.0, 2.0, 5.0]


def test_without_validation_the_best_checkpoint_is_that_of_the_lowest_mean_loss(monkeypatch, tmp_path):
    run(monkeypatch, *TINY, "--task", "vicreg", "--epochs", 3, "--output-dir", tmp_path / "run")
    totals = [line["total"] for line in events(tmp_path / "run", "total")]
    means = [np.mean(totals[4 * epoch : 4 * epoch + 4]) for epoch in range(3)]
    assert [line["score"] for line in events(tmp_path / "run", "score")] == pytest.approx(means)
    assert checkpoint(tmp_path / "run", "best.pt")["step"] == 4 * (int(np.argmin(means)) + 1)


# ---------------------------------------------------------------------------------------------- resume at the borders


def test_a_resume_at_every_border_of_the_plan_equals_the_run_without_a_stop(monkeypatch, tmp_path):
    # Four steps an epoch; flow from 2, masks from 4, Eq. 6 whole at 5, learning rates full at 6.
    late = ["--flow-start-epoch", 0.5, "--mask-warmup-epochs", 0.5, "--regularisation-warmup-epochs", 0.75]
    late += ["--warmup-epochs", 1.5, "--epochs", 2]
    run(monkeypatch, *TINY, *late, "--output-dir", tmp_path / "whole")
    for stop in range(1, 8):
        folder = tmp_path / str(stop)
        run(monkeypatch, *TINY, *late, "--output-dir", folder, "--max-steps", stop)
        run(monkeypatch, *TINY, *late, "--output-dir", folder, "--resume")
        assert_same_weights(folder, tmp_path / "whole")


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 40),
    share=st.integers(1, 4),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    stop=st.integers(0, 12),
    seed=st.integers(0, 9),
)
def test_other_numbers_of_processes_take_what_is_left_of_an_epoch_no_item_twice(length, share, worlds, stop, seed):
    batch, steps = 4 * share, stop + -(-length // share)  # over all processes, at least a pass

    def taken(world: int, first: int, last: int) -> list[tuple[int, int]]:
        streams = [ShardedStream(length, batch // world, seed, rank, world) for rank in range(world)]
        return sorted(entry for step in range(first, last) for stream in streams for entry in stream.step(step))

    before, after = worlds
    walk = taken(before, 0, stop) + taken(after, stop, steps)
    assert walk == taken(1, 0, steps)
    assert [position for position, _ in walk] == list(range(batch * steps))
    for start in range(0, batch * steps - length + 1, length):
        assert sorted(index for _, index in walk[start : start + length]) == list(range(length))


def test_a_checkpoint_of_a_newer_version_names_the_field_that_this_one_does_not_know(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "run"
    run(monkeypatch, *TINY, "--output-dir", folder, "--max-steps", 1)
    state = checkpoint(folder)
    state["config"]["loss"]["gravity"] = 9.81
    torch.save(state, folder / "checkpoint.pt")
    line = fails(monkeypatch, capsys, *TINY, "--output-dir", folder, "--resume")
    assert "loss.gravity: 9.81 there, None here" in line


def test_a_run_begins_again_from_its_config_file_alone(monkeypatch, tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    run(monkeypatch, *TINY, "--frame-strides", 1, "--epochs", 1, "--output-dir", first)
    stored = (first / "config.json").read_bytes()
    (tmp_path / "alone.json").write_bytes(stored)
    run(monkeypatch, tmp_path / "alone.json", "--output-dir", again)
    assert_same_weights(first, again)
    recorded = json.loads(stored)
    assert json.loads((again / "config.json").read_text()) == recorded | {"output_dir": str(again)}
    assert "already holds a run" in fails(monkeypatch, capsys, tmp_path / "alone.json")
    assert {"git", "torch", "numpy", "python"} <= json.loads((first / "environment.json").read_text()).keys()
    assert recorded["seed"] == 0


def test_every_preset_comes_back_from_its_config_file(tmp_path):
    for name, preset in train.PRESETS.items():
        (tmp_path / "config.json").write_text(json.dumps(train.as_json(preset)))
        assert train.read_config([str(tmp_path / "config.json")]) == preset, name


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"resume": null, "gravity": 1}', "\x00"])
def test_a_file_that_is_no_configuration_is_told_in_one_line(content, monkeypatch, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    line = fails(monkeypatch, capsys, tmp_path / "config.json")
    assert "config.json: not the config.json of a run" in line
    assert "no such file" in fails(monkeypatch, capsys, tmp_path / "none.json")


@pytest.mark.parametrize("name", ["a-job", "none"])
def test_after_torchrun_has_restarted_the_same_command_goes_on(name, monkeypatch, tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(monkeypatch, *TINY, "--epochs", 1, "--output-dir", whole)  # killed before the first checkpoint: from the start
    run(monkeypatch, *TINY, "--epochs", 1, "--output-dir", folder, "--max-steps", 2)
    run(monkeypatch, *TINY, "--epochs", 1, "--output-dir", folder)
    assert_same_weights(folder, whole)
    # A folder that another job has left is refused also then.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another-job")
    assert "already holds a run" in fails(monkeypatch, capsys, *TINY, "--epochs", 1, "--output-dir", folder)


def test_a_resume_into_another_folder_at_the_end_of_an_epoch_has_a_best_checkpoint_there(monkeypatch, tmp_path):
    flags = [*TINY, "--epochs", 2]
    run(monkeypatch, *flags, "--output-dir", tmp_path / "whole")
    run(monkeypatch, *flags, "--output-dir", tmp_path / "a", "--max-steps", 4)
    run(monkeypatch, *flags, "--output-dir", tmp_path / "b", "--resume", tmp_path / "a/checkpoint.pt")
    assert_same_weights(tmp_path / "b", tmp_path / "whole")
    assert load_model(tmp_path / "b" / "best.pt")


def test_data_that_have_changed_are_told_on_resume(monkeypatch, tmp_path, capsys):
    images = write_frames(tmp_path / "images", 12)
    flags = [*TINY, "--task", "vicreg", "--image-dir", images, "--output-dir", tmp_path / "run"]
    run(monkeypatch, *flags, "--max-steps", 2)
    (images / "003.png").unlink()
    assert "the data were 12 images then, and are 11 now" in fails(monkeypatch, capsys, *flags, "--resume")


def test_a_config_file_keeps_the_flow_start_of_a_frozen_run(monkeypatch, tmp_path):
    flags = ["--strategy", "frozen", "--init", tmp_path / "a.pt", "--flow-start-epoch", 1]
    config = train.read_config([*map(str, [*TINY, *flags])])
    (tmp_path / "config.json").write_text(json.dumps(train.as_json(config)))
    assert train.read_config([str(tmp_path / "config.json")]) == config and config.flow_start_epoch == 1


def _differing(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    train.check_alike({"first step": 3, "number of images": None})
    with pytest.raises(train.Alike, match="the processes differ in first step: 0, 1; give all machines the same"):
        train.check_alike({"seed": 0, "first step": rank})
    dist.destroy_process_group()


def test_processes_that_would_learn_different_things_are_told(tmp_path):
    mp.spawn(_differing, args=(str(tmp_path / "meeting"),), nprocs=2)


# -------------------------------------------------------------------------------------------------------- bad files


def test_odd_images_are_read_as_they_look_and_bad_ones_told_with_their_reason(tmp_path):
    bad, good = faults.write_odd_images(tmp_path / "images")
    for name, shows in good.items():
        image = load_image(tmp_path / "images" / name)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), shows, err_msg=name)
    for name in bad:
        with pytest.raises(BadFile, match=f"{name}: not a readable image"):
            load_image(tmp_path / "images" / name)
    found = [path.name for path in find_files(tmp_path / "images", (".png", ".jpg"))]
    assert sorted(found) == sorted([*bad, *good])  # the folder that links to itself is walked once


def test_pixels_of_32_bits_are_told_and_never_black(tmp_path):
    for kind in (np.int32, np.float32):
        Image.fromarray(np.arange(256, dtype=kind).reshape(16, 16)).save(tmp_path / "a.tif")
        with pytest.raises(BadFile, match="a.tif: not a readable image"):
            load_image(tmp_path / "a.tif")


def test_a_picture_whose_exif_is_damaged_is_read_and_upright(tmp_path, monkeypatch):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)

    def damaged(*_):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(Image.Exif, "tobytes", damaged)
    assert np.array_equal(load_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), np.rot90(picture, -1))


def test_folders_that_link_to_each_other_are_walked_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    found = [str(path.relative_to(tmp_path)) for path in find_files(tmp_path, (".png",))]
    assert found == ["a/0.png", "a/other/0.png", "b/0.png", "b/other/0.png"]


def test_a_header_that_promises_more_than_the_file_can_hold_is_refused_before_memory_is_taken(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = (10_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadFile, match="a.png: not a readable image") as told:
        load_image(tmp_path / "a.png")
    assert "10000x10000 pixels cannot lie in it" in str(told.value.__cause__)
    flat = np.zeros((4000, 4000), np.uint8)  # an honest one packs nearly as well as deflate can
    cv2.imwrite(str(tmp_path / "flat.png"), flat, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert load_image(tmp_path / "flat.png").shape == (3, 4000, 4000)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_item_takes_the_place_of_a_bad_one_whatever_the_number_of_workers(workers, tmp_path):
    write_frames(tmp_path, 6)
    (tmp_path / "002.png").write_bytes(b"")
    (tmp_path / "003.png").write_text("text")
    data = ImageFiles(tmp_path)
    loader = make_loader(data, None, 3, workers=workers, allowed=2)
    order = [index for step in range(4) for _, index in loader.sampler.step(step)]
    for step, (batch, told) in zip(range(4), loader, strict=False):
        drawn = order[3 * step : 3 * step + 3]
        replaced = [{2: 4, 3: 4}.get(index, index) for index in drawn]
        assert torch.equal(batch, torch.stack([data[index] for index in replaced]))
        expected = {2: ["002.png", "003.png"], 3: ["003.png"]}
        assert [line.split(":")[0][-7:] for line in told] == [name for i in drawn for name in expected.get(i, [])]
    with pytest.raises(ValueError, match="2 of 6 files cannot be used, and --bad-files allows 1"):
        list(zip(range(4), make_loader(data, None, 3, workers=workers, allowed=1), strict=False))


def test_bad_images_and_frames_are_told_once_counted_and_passed_over(monkeypatch, tmp_path, capsys):
    clips, images = write_frames(tmp_path / "clips/one", 20).parent, write_frames(tmp_path / "images", 30)
    (clips / "one/007.png").write_bytes(b"")
    cv2.imwrite(str(clips / "one/011.png"), np.zeros((40, 40, 3), np.uint8))
    (images / "003.png").write_text("text")
    flags = ["--video-dir", clips, "--image-dir", images, "--bad-files", 0.2, "--epochs", 4]
    run(monkeypatch, *TINY, *flags, "--output-dir", tmp_path / "run", "--max-steps", 12)
    told = [line for line in capsys.readouterr().out.splitlines() if "bad file" in line]
    assert sum("003.png: not a readable image" in line for line in told) == 1
    assert sum("one/007.png: not a readable image" in line for line in told) == 1
    assert any("one/011.png: 40x40 pixels, but 010.png" in line for line in told)
    assert "of 30 images" in " ".join(told) and "of 20 frames" in " ".join(told)
    assert len(events(tmp_path / "run", "bad_file")) == len(told)
    assert events(tmp_path / "run", "total")[-1]["bad_files"] == len(told)
    run(monkeypatch, *TINY, *flags, "--output-dir", tmp_path / "run", "--resume")
    assert "003.png" not in capsys.readouterr().out  # told before the stop
    line = fails(monkeypatch, capsys, *TINY, *flags, "--bad-files", 0.01, "--output-dir", tmp_path / "strict")
    assert "of 20 files cannot be used, and --bad-files allows 0" in line or "of 30 files cannot be used" in line


def test_a_data_set_of_bad_files_alone_ends_at_once(monkeypatch, tmp_path, capsys):
    for path in write_frames(tmp_path / "images", 9).iterdir():
        path.write_bytes(b"")
    flags = ["--task", "vicreg", "--image-dir", tmp_path / "images", "--bad-files", 1]
    line = fails(monkeypatch, capsys, *TINY, *flags, "--output-dir", tmp_path / "run")
    assert "9 of 9 files cannot be used" in line


# ------------------------------------------------------------------------------------------------------ bad numbers


def test_a_gradient_that_is_not_finite_skips_the_step_and_leaves_weights_and_buffers():
    model, optimizer = train.build(config := train.read_config(TINY), torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hook = model.expander[0].weight.register_hook(lambda gradient: gradient * float("nan"))
    views = tuple(torch.rand(2, 4, 3, 32, 32))
    plan = train.make_plan(config, range(10), range(10))
    _, _, bad = train.take_step(config, plan, 0, 0, model, optimizer, None, views)
    assert bad == ["gradient of expander"]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and not optimizer.state
    hook.remove()
    assert train.take_step(config, plan, 0, 0, model, optimizer, None, views)[2] == []
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def poison(monkeypatch):
    """Multiplies the views by a number at the calls of the model in `at`."""
    at, calls, forward = {}, [0], MCJEPA.forward

    def poisoned(model, video=None, views=None, **options):
        number, calls[0] = calls[0], calls[0] + 1
        if number in at:
            views = tuple(view * at[number] for view in views)
        return forward(model, video, views, **options)

    monkeypatch.setattr(MCJEPA, "forward", poisoned)
    return at


def test_steps_that_are_not_finite_are_skipped_counted_and_logged_with_terms_and_batch(
    poison, monkeypatch, tmp_path, capsys
):
    poison |= {2: float("nan"), 5: float("inf")}
    run(monkeypatch, *TINY, "--epochs", 2, "--output-dir", tmp_path / "run")
    skipped = events(tmp_path / "run", "skipped")
    assert [line["step"] for line in skipped] == [3, 6]
    for line in skipped:
        assert any(term.startswith("vicreg") for term in line["skipped"])
        assert not any(term in ("reconstruction", "regression", "cycle") for term in line["skipped"])
        assert len(line["batch"]) == 6 and all(name.startswith("MovingShapes ") for name in line["batch"])
    assert events(tmp_path / "run", "total")[-1]["skipped_steps"] == 2
    assert [line["step"] for line in events(tmp_path / "run", "total")] == [1, 2, 4, 5, 7, 8]
    assert capsys.readouterr().out.count("is skipped, not finite: ") == 2
    assert all(value.isfinite().all() for value in checkpoint(tmp_path / "run")["model"].values())
    assert checkpoint(tmp_path / "run")["step"] == 8


def test_too_many_bad_steps_in_a_row_end_the_run_also_across_a_resume(poison, monkeypatch, tmp_path, capsys):
    poison |= dict.fromkeys([2, *range(6, 99)], float("nan"))
    flags = [*TINY, "--max-bad-steps", 3, "--output-dir", tmp_path / "run"]
    run(monkeypatch, *flags, "--max-steps", 7)  # ends after one of them
    line = fails(monkeypatch, capsys, *flags, "--resume")
    assert "3 steps in a row were not finite" in line and "metrics.jsonl" in line
    assert [line["step"] for line in events(tmp_path / "run", "skipped")] == [3, 7, 8, 9]
    assert all(value.isfinite().all() for value in checkpoint(tmp_path / "run")["model"].values())


def test_a_step_that_is_bad_in_one_process_is_skipped_in_both(tmp_path):
    row = next(faults.bad_numbers(tmp_path, processes=2))
    assert row.survived == row.tried, row.note


def test_features_that_collapse_are_told_once_until_they_recover(monkeypatch, tmp_path, capsys):
    run(monkeypatch, *TINY, "--epochs", 1, "--collapse-below", 1e3, "--output-dir", tmp_path / "run")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step")]
    places = [line.split("features of ")[1].split(" collapse")[0] for line in told]
    assert sorted(places) == sorted(["embedding", *(f"stride {2**k}" for k in range(1, 7))])
    said = []
    log = type("Log", (), {"say": said.append})
    watch = train.Watch(train.Config(), log, {})
    for done, value in enumerate((0.5, 0.001, 0.001, 0.5, 0.001)):
        watch.features(done, {"epoch": 1.0, "deviation/stride_4": value, "deviation/pooled": 0.0, "total": 0.0})
    assert [line.split(":")[1].strip() for line in said] == ["step 1", "step 4"]
    watch.features(5, {"epoch": 0.9, "deviation/stride_8": 0.0})  # it has just begun
    assert len(said) == 2


# ----------------------------------------------------------------------------------------------------- disk and hostile


def test_the_remedy_fits_what_is_wrong_with_the_folder(monkeypatch, tmp_path):
    from engine.checkpoint import cannot_write

    assert "is the disk full?" in str(cannot_write(tmp_path / "a.pt", "No space left on device"))
    assert "its folder has vanished" in str(cannot_write(tmp_path / "gone" / "a.pt"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "its folder is read-only" in str(cannot_write(tmp_path / "a.pt"))


def test_a_folder_that_vanishes_is_told_in_one_line(monkeypatch, tmp_path, capsys):
    folder, take_step = tmp_path / "run", train.take_step

    def vanish(config, plan, step, *others):
        if step == 4:
            folder.rename(tmp_path / "elsewhere")
        return take_step(config, plan, step, *others)

    monkeypatch.setattr(train, "take_step", vanish)
    line = fails(monkeypatch, capsys, *TINY, "--output-dir", folder)
    assert "its folder has vanished: bring it back" in line
    assert load_checkpoint(tmp_path / "elsewhere" / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("name", ["a.flo", "a.pfm", "a_kitti.png", "a_palette.png", "a.pt"])
def test_mutated_files_are_read_or_told_and_take_no_memory(name, tmp_path):
    folder = tmp_path / "fuzz"
    line = [sys.executable, faults.__file__, "--fuzz", str(folder), name, "200"]
    ended = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-500:]
    row = faults.Row(*json.loads(ended.stdout.splitlines()[-1]))
    assert row.survived == row.tried == 200, row.note


def test_a_checkpoint_whose_configuration_promises_a_giant_is_refused_before_memory_is_taken(monkeypatch, tmp_path):
    run(monkeypatch, *TINY, "--output-dir", tmp_path / "run", "--max-steps", 1)
    state = checkpoint(tmp_path / "run")
    state["config"]["model"]["expander"] = [10**6, 10**6, 10**6]
    torch.save(state, tmp_path / "giant.pt")
    with pytest.raises(ValueError, match="giant.pt: its weights are not those of its configuration"):
        load_model(tmp_path / "giant.pt")


def test_tensors_that_claim_more_than_the_file_holds_are_refused(monkeypatch, tmp_path):
    run(monkeypatch, *TINY, "--output-dir", tmp_path / "run", "--max-steps", 1)
    state = checkpoint(tmp_path / "run")
    del state["optimizer"]  # most of the file
    state["model"] = {name: torch.zeros(()).expand(4000, 4000) for name in state["model"]}
    torch.save(state, tmp_path / "stride_0.pt")
    assert (tmp_path / "stride_0.pt").stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="stride_0.pt: not a checkpoint of train.py; its tensors are larger"):
        load_model(tmp_path / "stride_0.pt")


@pytest.mark.parametrize(
    "part, content",
    [("config", [1]), ("model", [1]), ("model", {"a": 1}), ("step", float("inf")), ("step", -3), ("watch", [1])],
)
def test_a_checkpoint_whose_parts_are_of_other_kinds_is_told_in_one_line(part, content, monkeypatch, tmp_path, capsys):
    run(monkeypatch, *TINY, "--output-dir", tmp_path / "run", "--max-steps", 1)
    state = checkpoint(tmp_path / "run")
    torch.save(state | {part: content}, tmp_path / "odd.pt")
    line = fails(monkeypatch, capsys, *TINY, "--resume", tmp_path / "odd.pt", "--output-dir", tmp_path / "next")
    assert "odd.pt" in line
    if part == "model":
        line = fails(monkeypatch, capsys, *TINY, "--init", tmp_path / "odd.pt", "--output-dir", tmp_path / "next")
        assert "odd.pt" in line


def test_a_resume_from_weights_or_optimizer_of_other_sizes_is_told_in_one_line(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "run"
    run(monkeypatch, *TINY, "--output-dir", folder, "--max-steps", 1)
    for part in ("model", "optimizer", "random"):
        state = checkpoint(folder)
        if part == "model":
            state["model"] = {key: value.flatten()[:1] for key, value in state["model"].items()}
        elif part == "optimizer":
            for moments in state["optimizer"]["state"].values():
                moments["exp_avg"] = moments["exp_avg"].flatten()[:1]
        else:
            state["random"] = {"torch": torch.zeros(3)}
        for path in train.checkpoints(folder):
            if path.name != "checkpoint.pt":
                path.unlink()
        original = (folder / "checkpoint.pt").read_bytes()
        torch.save(state, folder / "checkpoint.pt")
        line = fails(monkeypatch, capsys, *TINY, "--output-dir", folder, "--resume")
        assert "what it holds does not fit its configuration" in line
        (folder / "checkpoint.pt").write_bytes(original)


def test_bad_files_with_two_processes_are_told_by_the_first_alone(tmp_path):
    write_frames(tmp_path / "images", 40)
    (tmp_path / "images" / "005.png").write_bytes(b"")
    flags = [*TINY, "--task", "vicreg", "--image-dir", tmp_path / "images", "--epochs", 3]
    done = command(*flags, "--bad-files", 0.03, "--output-dir", tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (done.stdout + done.stderr).count("bad file 1 of 40 images") == 1
    done = command(*flags, "--bad-files", 0, "--output-dir", tmp_path / "strict", processes=2)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and output.count("error: 1 of 40 files cannot be used") == 1
    assert "Traceback" not in output.split("error: 1 of 40")[0]


def test_pairs_and_mixes_know_how_many_files_they_have(tmp_path):
    write_frames(tmp_path / "clips/one", 4), write_frames(tmp_path / "clips/two", 3)
    pairs = VideoPairs(tmp_path / "clips")
    assert pairs.file_count == 7 and len(pairs) == 5
    assert pairs.name(3) == f"{tmp_path / 'clips/two'}, frames 000.png and 001.png"
