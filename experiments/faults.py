"""Injects the faults that a run of days meets into a tiny run, and checks that nothing is lost.

    python experiments/faults.py                    # all of them, 10 minutes on two idle cores
    python experiments/faults.py --quick            # a few of each, 3 minutes
    python experiments/faults.py --only kill fuzz   # those whose names begin with these words

Prints a table: how often each fault was tried and survived. Survived means that the run ended with the weights of an
undisturbed run, bit for bit, or with the one clear line that it should print. The exit code is 1 if anything was lost.
Only root can try full and read-only disks.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.utils import parameters_to_vector

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

from data import load_image  # noqa: E402
from mcjepa import load_checkpoint, load_model  # noqa: E402
from sources.flow_benchmarks import read_flow, write_flow  # noqa: E402
from sources.label_sets import PALETTE, read_ids  # noqa: E402


class Row(NamedTuple):
    """A line of the table: how often a fault was tried and survived, a note, and what the run printed."""

    fault: str
    survived: int
    output: str = ""
    note: str = ""
    tried: int = 1


# ------------------------------------------------------------------------------------------------------ runs to disturb


def tiny(folder: Path, epochs: int) -> list[object]:
    """The arguments of train.py for a run whose steps take about a tenth of a second, 8 of them in an epoch."""
    flags = (
        "pocket --workers 0 --crop 64 64 --image-size 32 --video-batch 2 --image-batch 4 --validation-pairs 2 "
        "--model.estimator-factor 0.125 --model.expander 16 16 16 --steps-per-epoch 8 --checkpoint-every 2 "
        "--log-every 1 --flow-start-epoch 0.5 --mask-warmup-epochs 1.5"
    )
    return [*flags.split(), "--epochs", epochs, "--output-dir", folder]


def start(*arguments: object, processes: int = 1, torchrun: Sequence[str] = (), script: str | Path = "train.py"):
    """Starts a script as a user does; with torchrun if there are several processes, or options for it."""
    line: list[object] = [sys.executable, script, *arguments]
    if processes > 1 or torchrun:
        options = torchrun or ("--standalone",)
        line[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *options]
    return subprocess.Popen(list(map(str, line)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """The exit code and the output of a process that should end by itself."""
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, "did not end within 5 minutes"
    return process.returncode, output


def run(*arguments: object, **options: object) -> tuple[int, str]:
    """The exit code and the output of a whole run; the options are those of `start`."""
    return finish(start(*arguments, **options))


def processes_of(folder: Path) -> list[int]:
    """The processes that train into a folder or below it, and those that load their data, but not torchrun."""
    numbers = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            words = (entry / "cmdline").read_text().split("\0")
            if "torch.distributed.run" not in words and any(Path(word).is_relative_to(folder) for word in words):
                numbers.append(int(entry.name))
    return sorted(numbers)


def kill(*numbers: int, by: int = signal.SIGKILL) -> None:
    """Sends a signal to processes; SIGKILL ends them at once."""
    for number in numbers:
        with suppress(OSError):  # it has ended meanwhile
            os.kill(number, by)


def steps_done(folder: Path) -> int:
    """How many steps a run has logged."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"total"') if path.exists() else 0


def wait_for_steps(count: int, folder: Path, process: subprocess.Popen) -> None:
    """Returns once a run has logged so many steps or has ended."""
    while process.poll() is None and steps_done(folder) < count:
        time.sleep(0.002)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights and buffers in the newest checkpoint."""
    return load_checkpoint(folder / "checkpoint.pt")["model"]


def same_weights(folder: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    ours, theirs = weights(folder), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def undisturbed(base: Path, epochs: int = 3, processes: int = 1) -> Path:
    """The folder of a run without faults, which the others must equal."""
    folder = base / f"undisturbed_{epochs}_{processes}"
    if not folder.exists():
        code, output = run(*tiny(folder, epochs), processes=processes)
        assert code == 0, output
    return folder


# -------------------------------------------------------------------------------------------------------------- faults


def kills(base: Path, count: int, processes: int) -> Iterator[Row]:
    """`kill -9` of all processes of a run, again and again: every second time while a checkpoint is being written."""
    epochs = count + 1  # enough that it is not done before the last kill
    reference, folder = undisturbed(base, epochs, processes), base / f"killed_{processes}"
    command = [*tiny(folder, epochs), "--workers", processes - 1]  # one loader process, where there are two
    partial, rng, killed, while_writing = folder / ".partial-checkpoint.pt", random.Random(0), 0, 0
    for number in range(count):
        before = steps_done(folder)
        process = start(*command, processes=processes)
        wait_for_steps(before + 3, folder, process)  # by now it has replaced what the last kill left half written
        if number % 2:
            time.sleep(rng.uniform(0, 0.4))
        else:
            while process.poll() is None and not partial.exists():
                pass
            time.sleep(rng.uniform(0, 0.003))
        killed += process.poll() is None
        kill(process.pid, *processes_of(folder))
        process.communicate()
        while_writing += partial.exists()
        for path in folder.glob("[!.]*.pt"):
            load_checkpoint(path)  # raises ValueError if it is not whole
    code, output = run(*command, processes=processes)
    fault, survived = f"kill -9, processes: {processes}", code == 0 and same_weights(folder, reference)
    yield Row(fault, killed * survived, output, f"{while_writing} of them while a checkpoint was written", killed)


def signals(base: Path, names: Sequence[str]) -> Iterator[Row]:
    """The signals of schedulers and users leave a checkpoint of the step in flight, and the same command continues."""
    for name in names:
        folder = base / name
        command = [*tiny(folder, 3), "--checkpoint-every", 1000]
        process = start(*command)
        wait_for_steps(10, folder, process)
        process.send_signal(getattr(signal, name))
        seen, (code, output) = steps_done(folder), finish(process)
        done = load_checkpoint(folder / "checkpoint.pt")["step"]
        stopped = code == 0 and f"stopped by {name} after step {done} of 24: the same command continues" in output
        stopped = stopped and "Traceback" not in output and seen <= done <= seen + 2
        code, more = run(*command)
        yield Row(name, stopped and code == 0 and same_weights(folder, undisturbed(base)), output + more)


def signal_to_all(base: Path) -> Iterator[Row]:
    """SIGTERM to every process of a job, as Slurm sends it: torchrun, the training processes and their loaders."""
    folder = base / "signal_to_all"
    process = start(*tiny(folder, 500), "--workers", 1, processes=2)
    wait_for_steps(5, folder, process)
    seen = steps_done(folder)
    kill(*processes_of(folder), process.pid, by=signal.SIGTERM)
    _, output = finish(process)  # torchrun itself reports the signal as its error
    done = load_checkpoint(folder / "checkpoint.pt")["step"]
    survived = f"stopped by SIGTERM after step {done}" in output and seen <= done <= seen + 3
    yield Row("SIGTERM to torchrun, 2 processes, their loaders", survived, output)


def damaged_checkpoint(base: Path, kinds: Sequence[str]) -> Iterator[Row]:
    """The newest checkpoint is damaged: the run continues from the one before, and says so."""
    stopped = base / "stopped"
    run(*tiny(stopped, 3), "--max-steps", 9)
    for kind in kinds:
        folder = base / f"damaged_{kind}"
        shutil.copytree(stopped, folder)
        spoil(folder / "checkpoint.pt", kind)
        code, output = run(*tiny(folder, 3))
        reported = output.count("continuing from checkpoint.1.pt") == 1 and (folder / "damaged-checkpoint.pt").exists()
        survived = code == 0 and reported and same_weights(folder, undisturbed(base))
        yield Row(f"newest checkpoint damaged: {kind}", survived, output)


def spoil(path: Path, kind: str) -> None:
    """Damages a file: "cut" in the middle, "empty", or "changed" in one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(kind)])


def one_dies(base: Path, number: int, step: int, restarts: int) -> Iterator[Row]:
    """One process of two is killed: all end, or torchrun restarts all and the result is the same."""
    folder = base / f"dies_{number}_{step}_{restarts}"
    process = start(*tiny(folder, 3), processes=2, torchrun=("--standalone", f"--max-restarts={restarts}"))
    wait_for_steps(step, folder, process)
    kill(processes_of(folder)[number])
    code, output = finish(process)
    if restarts:
        survived = code == 0 and same_weights(folder, undisturbed(base, processes=2))
    else:
        survived = code > 0 and not processes_of(folder) and "Signal 9" in output
    yield Row(f"process {number} of 2 killed at step {step}, {restarts} restarts allowed", survived, output)


def two_machines(base: Path, restarts: bool) -> Iterator[Row]:
    """Two torchrun agents with a process each equal one agent with two, also if a process is killed and restarted."""
    folder = base / f"machines_{restarts}"
    endpoint = f"--rdzv-endpoint=127.0.0.1:{20000 + os.getpid() % 10000}"
    meeting = ("--nnodes=2", "--rdzv-backend=c10d", endpoint, "--max-restarts=3")
    # Otherwise torch may hang at a restart of several machines (pytorch issue 135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int(restarts))
    agents = [start(*tiny(folder, 3), torchrun=meeting) for _ in range(2)]
    if restarts:
        wait_for_steps(7, folder, agents[0])
        kill(processes_of(folder)[-1])
    ended = [finish(agent) for agent in agents]
    survived = all(code == 0 for code, _ in ended) and same_weights(folder, undisturbed(base, processes=2))
    yield Row("two torchrun agents" + ", one process killed, restarted" * restarts, survived, ended[0][1])


def fewer_processes(base: Path) -> Iterator[Row]:
    """A run of two processes is continued by one: the weights are the same up to rounding.

    Adam enlarges it at first, so the distance is compared with the way that the weights went after the change.
    """
    folder = base / "fewer"
    run(*tiny(folder, 3), "--max-steps", 5, processes=2)
    before = weights(folder)
    code, output = run(*tiny(folder, 3))
    states = before, weights(folder), weights(undisturbed(base, processes=2))
    first, ours, theirs = (parameters_to_vector(state.values()).double() for state in states)
    distance = float((ours - theirs).norm() / (theirs - first).norm())
    note = f"{distance:.2%} of the way apart, by rounding"
    yield Row("2 processes continued by 1", code == 0 and distance < 0.1, note + output, note)


def write_odd_images(folder: Path) -> list[str]:
    """Writes unusual image files; the names of those that cannot be read."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    for mode in ("1", "L", "LA", "I;16", "P", "RGBA", "CMYK"):
        image.convert("L" if mode == "I;16" else "RGB").convert(mode).save(folder / f"{mode} größer 木.tif")
    image.resize((1, 1)).save(folder / "one pixel.png")
    os.symlink("one pixel.png", folder / "link.png")
    os.symlink(".", folder / "loop")
    os.symlink("nowhere.png", folder / "dangling.png")
    os.symlink("itself.png", folder / "itself.png")
    for kind in ("cut", "empty"):
        image.convert("RGB").save(folder / f"{kind}.jpg")
        spoil(folder / f"{kind}.jpg", kind)
    (folder / "text.png").write_text("this is no image\n")
    return ["dangling.png", "itself.png", "cut.jpg", "empty.jpg", "text.png"]


def bad_files(base: Path) -> Iterator[Row]:
    """A run of two processes reads unusual images and reports bad ones once each; too many end it."""
    folder = base / "images"
    bad = write_odd_images(folder)
    for number in range(86):  # 100 in all
        Image.fromarray(np.full((40, 40, 3), number, np.uint8)).save(folder / f"{number}.png")
    command = [*tiny(base / "bad_files", 2), "--task", "vicreg", "--image-dir", folder, "--image-batch", 20]
    command += ["--workers", 1, "--bad-files"]
    code, output = run(*command, 0.05, processes=2)
    once = [output.count(f"the next takes its place: {folder / name}: not a readable image") == 1 for name in bad]
    survived = code == 0 and all(once) and output.count("bad file ") == output.count("of at most 5 images") == 5
    yield Row("5 bad images among 95 good and unusual ones", survived, output)
    code, output = run(*command, 0.01, "--output-dir", base / "too_many", processes=2)
    survived = code > 0 and output.count("cannot be used, and --bad-files allows 1") == 1
    yield Row("more bad images than --bad-files", survived, output)


NOT_FINITE = """
import os, sys
sys.path.insert(0, {root!r})
import mcjepa, train
forward, calls, values = mcjepa.MCJEPA.forward, iter(range(1000)), {values}
def poisoned(model, video, views, **options):
    value = float(values.get(next(calls), 1)) if os.environ["RANK"] == "1" else 1
    return forward(model, video, tuple(view * value for view in views), **options)
mcjepa.MCJEPA.forward = poisoned
train.run_command(lambda: train.train(train.parse(sys.argv[1:])))
"""
"""train.py with NaN or infinity in the images of the second process at some steps."""


def not_finite(base: Path) -> Iterator[Row]:
    """Steps that are not finite in one of two processes are skipped in both; ten in a row end the run."""
    folder, script = base / "not_finite", base / "not_finite.py"
    values = {3: "nan", 6: "inf"} | dict.fromkeys(range(9, 99), "nan")
    script.write_text(NOT_FINITE.format(root=str(ROOT), values=values))
    code, output = run(*tiny(folder, 3), processes=2, script=script)
    skipped = [step for step in range(1, 25) if f"step {step} is skipped, not finite: " in output]
    survived = code > 0 and skipped == [4, 7, *range(10, 20)] and "10 steps in a row were not finite" in output
    survived = survived and output.count("error: ") == 1 and all(x.isfinite().all() for x in weights(folder).values())
    yield Row("nan, inf, then ten steps of nan in one of 2 processes", survived, output)


def disk(base: Path, kind: str) -> Iterator[Row]:
    """A disk that becomes "full" or "read-only" ends the run in one line; the last checkpoint is whole."""
    place = base / f"disk_{kind}"
    if os.getuid():
        return  # only root can mount
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    try:
        process = start(*tiny(place / "run", 500))
        wait_for_steps(5, place / "run", process)
        if kind == "full":
            with open(place / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
                while True:
                    ballast.write(bytes(1 << 16))
        else:
            subprocess.run(["mount", "--bind", place, place], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        code, output = finish(process)
        error = output[output.find("error: ") :].strip()
        survived = code == 1 and "cannot be written" in error and "\n" not in error and "Traceback" not in output
        survived = survived and load_checkpoint(place / "run" / "checkpoint.pt")["step"] >= 4
        yield Row(f"disk {kind}", survived, output, error)
    finally:
        while subprocess.run(["umount", "-l", place], stderr=subprocess.DEVNULL).returncode == 0:
            pass  # read-only, it is mounted twice


def damage(content: bytes, rng: random.Random) -> bytes:
    """Replaces, doubles or cuts out pieces, most of them near the beginning or the end, where headers lie."""
    changed, size = bytearray(content), len(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.choice((rng.randrange(64), rng.randrange(size), size - rng.randrange(64)))
        length = rng.choice((1, 4, 40))
        piece = changed[place : place + length]
        pieces = rng.randbytes(length), bytes(length), b"\xff" * length, b"\xff\xff\xff\x7f", 2 * piece, b""
        changed[place : place + length] = rng.choice(pieces)
    return bytes(changed)


def read_damaged(path: Path, reader: Callable[[Path], object], count: int) -> Row:
    """Damages a file again and again. It can be read, or the error is one line that names it; memory is limited."""
    content, rng, survived, refused, note = path.read_bytes(), random.Random(path.name), 0, 0, ""
    reader(path)  # imports and caches what it needs
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
    for _ in range(count):
        path.write_bytes(damage(content, rng))
        try:
            reader(path)
            survived += 1
        except Exception as error:
            clear = isinstance(error, ValueError) and str(path) in str(error) and "\n" not in str(error)
            refused, survived = refused + 1, survived + clear
            note = note if clear else f"{type(error).__name__}: {str(error)[:300]}"
    return Row(f"damaged {path.name}", survived, note, f"{refused} refused, the others read", count)


def fuzz(base: Path, count: int) -> Iterator[Row]:
    """Random damage to files of every kind, read in a process of its own, for its memory is limited."""
    folder, rng = base / "fuzz", np.random.default_rng(0)
    folder.mkdir()
    picture = cv2.resize(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8), (16, 12))
    flow = rng.normal(0, 3, (12, 16, 3)).astype("<f4")
    for name in ("image.jpg", "image.png"):
        cv2.imwrite(str(folder / name), picture)
    for name in ("flow.flo", "flow.png"):
        write_flow(folder / name, torch.from_numpy(flow[..., :2]).permute(2, 0, 1)[None])
    (folder / "flow.pfm").write_bytes(b"PF\n16 12\n-1.0\n" + flow.tobytes())
    labels = Image.fromarray(picture[..., 0] // 64)
    labels.putpalette(PALETTE.tobytes())
    labels.save(folder / "labels.png")
    shutil.copy(undisturbed(base) / "checkpoint.pt", folder)
    readers = {"image": load_image, "flow": read_flow, "labels": read_ids, "checkpoint": load_model}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for path in sorted(folder.iterdir()):
            yield pool.submit(read_damaged, path, readers[path.stem], count).result()


class RunsCode:
    """Would create a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def unpickled_code(base: Path) -> Iterator[Row]:
    """A checkpoint that would run code when it is unpickled is refused by every command, and runs nothing."""
    checkpoint, RunsCode.path = base / "code" / "checkpoint.pt", base / "it_ran"
    checkpoint.parent.mkdir()
    torch.save({"model": {}, "config": {}, "step": RunsCode()}, checkpoint)
    for script, *arguments in (
        ("train.py", "pocket", "--output-dir", checkpoint.parent),
        ("train.py", "pocket", "--output-dir", base / "code_init", "--init", checkpoint),
        ("evaluate.py", "flow", "--output-dir", base / "code_flow", "--model", checkpoint),
    ):
        code, output = run(*arguments, script=script)
        survived = code == 1 and f"{checkpoint}: not a checkpoint" in output and "Traceback" not in output
        survived = survived and not RunsCode.path.exists()
        yield Row(f"checkpoint that would run code: {script} {arguments[-2]}", survived, output)


def faults(base: Path, quick: bool) -> dict[str, Iterator[Row]]:
    """All faults by name; each is tried when its rows are read."""
    kill_count, few = (2, slice(1)) if quick else (20, slice(None))
    return {
        "kill_1": kills(base, kill_count, 1),
        "kill_2": kills(base, kill_count, 2),
        "signals": signals(base, ("SIGTERM", "SIGUSR1", "SIGINT")[few]),
        "signal_to_all": signal_to_all(base),
        "damaged": damaged_checkpoint(base, ("cut", "empty", "changed")[few]),
        "one_dies": one_dies(base, 1, 3, restarts=0),
        **{f"restart_{n}": one_dies(base, n % 2, 5 + 2 * n, restarts=3) for n in range(1 if quick else 6)},
        "machines_restart": two_machines(base, restarts=True),
        "machines": two_machines(base, restarts=False),
        "fewer": fewer_processes(base),
        "files": bad_files(base),
        "not_finite": not_finite(base),
        "disk_full": disk(base, "full"),
        "disk_read_only": disk(base, "read-only"),
        "fuzz": fuzz(base, 100 if quick else 2000),
        "code": unpickled_code(base),
    }


def survived_or_lost(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows of a fault, with one more if it raises an error: a checkpoint was lost, or a run ended too early."""
    try:
        yield from rows
    except Exception as error:
        yield Row(name, 0, f"{type(error).__name__}: {error}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="names, or what names begin with")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    arguments, tried, survived = parser.parse_args(), 0, 0
    print(f"{'fault':58}{'tried':>7}{'survived':>10}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        try:
            for name, rows in faults(Path(base), arguments.quick).items():
                for line in survived_or_lost(name, rows) if name.startswith(tuple(arguments.only)) else []:
                    tried, survived = tried + line.tried, survived + line.survived
                    note = line.note if line.survived == line.tried else " ".join(line.output[-500:].split())
                    print(f"{line.fault:58}{line.tried:7}{line.survived:10}  {note}", flush=True)
        finally:
            kill(*processes_of(Path(base)))
    print(f"{'all':58}{tried:7}{survived:10}")
    sys.exit(survived < tried)


if __name__ == "__main__":
    main()
