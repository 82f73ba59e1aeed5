"""engine/: files that are whole or not there, checkpoints, the record of a run, its processes, and its faults."""

import errno
import io
import json
import os
import signal
import sys
from contextlib import closing
from functools import partial
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import cut_short, raises_one_line, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from engine import faults, processes
from engine.checkpoint import newest_checkpoint, replacing, save_checkpoint, write_json
from engine.faults import run_command
from engine.log import Log, environment

# --------------------------------------------------------------------------------------------------------- checkpoints


disk_full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))


def writer_of_torch(state, path):
    """What torch does on a full disk."""
    path.write_bytes(b"half of it")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


def load(path):
    """Like `load_checkpoint`: ValueError for a file that is not whole."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: damaged") from error


@pytest.mark.parametrize("error", [ValueError("a mistake"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_file_takes_the_place_of_the_old_one_when_it_is_whole_and_not_if_it_cannot_be_written(error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_is_full_is_one_line_with_the_remedy(function, monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(os, function, disk_full)
    words = (tmp_path / "a.json", "cannot be written (No space left on device)", "What was there is intact")
    with raises_one_line(OSError, *words):
        write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").read_text() == "old"


def test_the_newest_checkpoint_and_the_one_before_stay_and_the_best(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for step, best in ((1, True), (2, True), (3, False)):
        save_checkpoint(path, {"step": step, "weight": torch.full((3,), step)}, best)
    steps = {file.name: load(file)["step"] for file in tmp_path.iterdir()}
    assert steps == {"checkpoint.pt": 3, "checkpoint.1.pt": 2, "best.pt": 2}
    assert newest_checkpoint(tmp_path, load) == ({"step": 3, "weight": pytest.approx([3, 3, 3])}, [])


def test_a_checkpoint_that_cannot_be_written_loses_none_before(monkeypatch, tmp_path):
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step})
    monkeypatch.setattr(torch, "save", writer_of_torch)
    with raises_one_line(OSError, path, "is the disk full?"):
        save_checkpoint(path, {"step": 3}, best=True)
    assert {file.name: load(file)["step"] for file in tmp_path.iterdir()} == {"checkpoint.pt": 2, "checkpoint.1.pt": 1}


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path):
    assert newest_checkpoint(tmp_path / "empty", load) == (None, [])
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoint.pt", {"step": step})
    cut_short(tmp_path / "checkpoint.pt")
    state, warnings = newest_checkpoint(tmp_path, load)
    assert state == {"step": 1}
    assert warnings == [f"warning: {tmp_path / 'checkpoint.pt'}: damaged; continuing from checkpoint.1.pt"]
    cut_short(tmp_path / "checkpoint.1.pt")
    with raises_one_line(ValueError, tmp_path / "checkpoint.pt", tmp_path / "checkpoint.1.pt"):
        newest_checkpoint(tmp_path, load)


# ---------------------------------------------------------------------------------------------------------- the record


def lines(folder):
    return [*map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def test_a_run_that_continues_takes_back_the_lines_after_its_checkpoint_and_one_that_was_cut(tmp_path):
    with closing(Log(tmp_path, 0, 9)) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
        log.event(2, {"bad_file": "a.png"})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    with closing(Log(tmp_path, 2, 9)) as log:
        log.write(3, {"loss": 30.0})
    assert [[*line.values()] for line in lines(tmp_path)] == [[1, 1.0], [2, 2.0], [2, "a.png"], [3, 30.0]]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_full_disk_ends_the_record_in_one_line(monkeypatch, tmp_path):
    with closing(Log(tmp_path, 0, 2)) as log:
        monkeypatch.setattr(RecordWriter, "write", disk_full)
        with raises_one_line(OSError, tmp_path / "tensorboard/events", "cannot be written (No space left on device)"):
            log.write(1, {"loss": 1.0})
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").mkdir()
        with raises_one_line(OSError, tmp_path / "metrics.jsonl", "cannot be written"):
            log.event(1, {})


def test_names_that_are_not_utf_8_are_printed_in_ascii_and_written(monkeypatch, tmp_path):
    name, folder = os.fsdecode(b"stra\xdfe.png ") + "ü", tmp_path / os.fsdecode(b"lauf\xdf")
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "ascii", "strict", write_through=True))

    def command():
        print(name, flush=True)
        with closing(Log(folder, 0, 2)) as log:
            log.say(name)
            log.event(1, {"bad_file": name})
            log.write(1, {"loss": 1.0})
            log.advance(1, name)
            assert b"loss" in next((folder / "tensorboard").iterdir()).read_bytes()
        raise ValueError(name)

    with pytest.raises(SystemExit):
        run_command(command)
    shown, out, err = rb"stra\udcdfe.png \xfc", sys.stdout.buffer.getvalue(), sys.stderr.buffer.getvalue()
    assert out.count(shown + b"\n") == 2 and err.count(shown) >= 2 and err.endswith(b"error: " + shown + b"\n")
    assert lines(folder) == [{"step": 1, "bad_file": name}, {"step": 1, "loss": 1.0}]


def test_the_environment_names_what_numbers_depend_on(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    record = environment(torch.device("cpu"))
    assert record["processes"] == 4 and record["device"] == "cpu" and record["torch"] == torch.__version__
    assert json.loads(json.dumps(record)) == record and {"command", "git", "platform", "cv2"} <= record.keys()
    assert {"tyro", "pytest", "torch"} <= record["packages"].keys() and record["packages"]["numpy"] == np.__version__
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert environment(torch.device("cpu"))["git"] is None


# ----------------------------------------------------------------------------------------------------------- processes


def agree():
    processes.connect(torch.device("cpu"))
    rank = processes.rank()
    assert processes.from_all([]) == []
    assert processes.from_all([("frames", "a.png")] * rank) == [("frames", "a.png")]
    assert processes.from_all([rank, "both"]) == [0, "both", 1]
    processes.check_same_everywhere({"seed": 0, "crop": [64, 64], "init": None})
    with raises_one_line(ValueError, "the processes differ in first step, seed; give all machines the same command"):
        processes.check_same_everywhere({"seed": rank, "crop": 64, "first step": 3 * rank})
    dist.destroy_process_group()


def test_processes_share_their_reports_and_find_out_that_they_differ():
    torchrun(2, agree)


def test_each_process_has_its_gpu_and_more_processes_than_gpus_are_one_line(monkeypatch):
    assert processes.own_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for version, device in (("2.13.1", "cpu"), ("2.14.0", "mps")):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        assert processes.own_device() == torch.device(device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.own_device() == torch.device("cpu")
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.own_device() == torch.device("cuda:1") and chosen == [torch.device("cuda:1")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with raises_one_line(ValueError, "more processes than GPUs: set --nproc_per_node to 2"):
        processes.own_device()


@pytest.mark.parametrize("names", [["SIGTERM", "SIGUSR1", "SIGINT"], ["SIGTERM", "SIGINT"]])
def test_a_later_signal_ends_the_process_at_once_and_an_echo_of_the_first_does_not(names, monkeypatch):
    numbers = [getattr(signal, name) for name in names]
    if "SIGUSR1" not in names:
        monkeypatch.delattr(signal, "SIGUSR1")  # as on Windows
    clock = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(KeyboardInterrupt), processes.stop_signals() as received:
        for number in numbers:
            signal.raise_signal(number)
        assert received == names
        clock[0] += 6
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--crop must be\nsmaller"), "error: --crop must be smaller\n"),
        (ValueError("Worker 0.\nOriginal Traceback:\n File ...\ndata.BadFile: a.png: cut\n"), "error: a.png: cut\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "gloo"), "error: [Errno 2] No such file: 'gloo'"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: a disk or /dev/shm is full: make room ([Errno 28]"),
        (RuntimeError("unable to allocate shared memory: No space left"), "error: /dev/shm is full: use --workers 0"),
        (RuntimeError("DataLoader worker (pid 7): Bus error. Out of shared memory."), "error: /dev/shm is full"),
        (RuntimeError("received 0 items of ancdata"), "error: too many open files"),
        (partial(torch.empty, 1 << 55), "error: out of memory: make the batches smaller"),
        (partial(bytearray, 1 << 60), "error: out of memory"),
        (partial(cv2.resize, np.zeros((8, 8)), (1 << 23, 1 << 23)), "error: out of memory"),
        (partial(cv2.resize, np.zeros((0, 0)), (4, 4)), "error: OpenCV cannot work on these images"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: out of memory: make the batches smaller"),
        (RuntimeError("Failed to find C compiler"), "error: --compile finds no compiler"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), "error: a loader process was killed"),
        (RuntimeError("Gloo: Connection closed by peer"), "error: another process of the run has ended"),
    ],
)
def test_a_fault_of_the_user_or_the_machine_is_one_line_and_exit_code_1(error, line, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(Mock(side_effect=error))
    printed = capsys.readouterr().err
    assert stop.value.code == 1 and printed.startswith(line) and printed.count("\n") == 1


def test_errors_of_the_program_keep_their_traceback_ctrl_c_is_one_line_and_other_processes_wait(monkeypatch, capsys):
    for error in (RuntimeError("shapes do not match"), KeyError("a")):
        with pytest.raises(type(error)):
            run_command(Mock(side_effect=error))
    with pytest.raises(SystemExit, match="stopped; every file that was written is whole"):
        run_command(Mock(side_effect=KeyboardInterrupt))
    waited = []
    monkeypatch.setattr(faults.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        run_command(lambda: int("a"))
    assert waited == [5] and capsys.readouterr().err.startswith("error: ")
