"""Injects the faults that a run of days meets into a tiny run, and checks that nothing is lost.

    python experiments/faults.py                    # all of them
    python experiments/faults.py --quick            # a few of each
    python experiments/faults.py --only kill fuzz   # those whose names begin with these words

Prints a table: how often each fault was tried, and how often it was survived. Survived means that the run ended with
the weights of an undisturbed run, bit for bit, or with the one clear line that it should print. The exit code is 1 if
anything was lost. Full and read-only disks are tried only as root.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import load_image, read_ids  # noqa: E402
from mcjepa import load_checkpoint, load_model  # noqa: E402
from sources.flow_benchmarks import read_flow, write_flow  # noqa: E402

TINY = [
    "pocket", "--workers", "0", "--crop", "64", "64", "--image-size", "32", "--video-batch", "2", "--image-batch", "4",
    "--model.estimator-factor", "0.125", "--model.expander", "16", "16", "16", "--validation-pairs", "2",
    "--steps-per-epoch", "8", "--log-every", "1", "--flow-start-epoch", "0.5", "--regularisation-warmup-epochs", "1",
    "--mask-warmup-epochs", "1.5", "--checkpoint-every", "2",
]  # fmt: skip
"""A run whose steps take about a tenth of a second, 8 of them in an epoch."""


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    tried: int
    survived: int
    note: str = ""


def tried_once(fault: str, survived: bool, output: str, note: str = "") -> Row:
    """The line of a fault that is tried once; the end of the output says what went wrong."""
    return Row(fault, 1, int(survived), note if survived else output[-500:])


# ------------------------------------------------------------------------------------------------------ runs to disturb


def tiny(folder: Path, epochs: int) -> list[object]:
    """The arguments of train.py for a tiny run."""
    return [*TINY, "--epochs", epochs, "--output-dir", folder]


def launch(
    *arguments: object,
    processes: int = 1,
    torchrun: tuple[str, ...] = (),
    script: str | Path = "train.py",
    **variables: str,
) -> subprocess.Popen:
    """Starts a script as a user does, with environment variables; with torchrun for several processes or options."""
    line: list[object] = [sys.executable]
    if processes > 1 or torchrun:
        options = torchrun or ("--standalone",)
        line += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *options]
    return subprocess.Popen(
        [str(word) for word in (*line, script, *arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """The exit code and the output of a process that should end by itself."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, f"did not end within {seconds:.0f} s"
    return process.returncode, output


def processes_of(folder: Path) -> list[int]:
    """The processes that train into a folder or below it, and those that load their data, but not torchrun."""
    numbers = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            words = (entry / "cmdline").read_text().split("\0")
            if "torch.distributed.run" not in words and any(Path(word).is_relative_to(folder) for word in words):
                numbers.append(int(entry.name))
    return sorted(numbers)


def kill_all(folder: Path) -> None:
    """Sends SIGKILL to every process of a run."""
    for number in processes_of(folder):
        with suppress(OSError):  # it has ended meanwhile
            os.kill(number, signal.SIGKILL)


def steps_done(folder: Path) -> int:
    """How many steps a run has logged."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"total"') if path.exists() else 0


def wait_until(condition: Callable[[], object], process: subprocess.Popen, pause: float = 0.002) -> None:
    """Returns once the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(pause)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights and buffers in the newest checkpoint."""
    return load_checkpoint(folder / "checkpoint.pt")["model"]


def same_weights(folder: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    ours, theirs = weights(folder), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def undisturbed(base: Path, epochs: int, processes: int = 1) -> Path:
    """The folder of a run without faults, which the others must equal."""
    folder = base / f"undisturbed_{epochs}_{processes}"
    if not (folder / "checkpoint.pt").exists():
        code, output = finish(launch(*tiny(folder, epochs), processes=processes))
        assert code == 0, output
    return folder


# ---------------------------------------------------------------------------------------------------- kills and signals


def kills(base: Path, count: int, processes: int) -> Row:
    """`kill -9` of all processes of a run, again and again: every second time while a checkpoint is being written."""
    epochs = count + 1  # enough that it is not done before the last kill
    reference, folder = undisturbed(base, epochs, processes), base / f"killed_{processes}"
    command = [*tiny(folder, epochs), "--workers", processes - 1]
    partial, rng, killed, while_writing, damaged = folder / ".partial-checkpoint.pt", random.Random(0), 0, 0, ""
    for number in range(count):
        start, before = time.time(), steps_done(folder)
        process = launch(*command, processes=processes)
        wait_until(lambda before=before: steps_done(folder) > before, process)
        if number % 2:
            time.sleep(rng.uniform(0, 0.4))
        else:
            wait_until(partial.exists, process, pause=0)
            time.sleep(rng.uniform(0, 0.003))
        killed += process.poll() is None
        process.kill()
        kill_all(folder)
        process.communicate()
        while_writing += partial.exists() and partial.stat().st_mtime > start
        try:
            for path in folder.glob("[!.]*.pt"):
                load_checkpoint(path)
        except ValueError as error:
            damaged = str(error)
    code, output = finish(launch(*command, processes=processes))
    equal = code == 0 and not damaged and same_weights(folder, reference)
    note = f"{while_writing} of them while a checkpoint was written" if equal else damaged or output[-500:]
    return Row(f"kill -9, {processes} process{'es' * (processes > 1)}", killed, killed if equal else 0, note)


def signals(base: Path) -> Iterator[Row]:
    """The signals of schedulers and users leave a checkpoint of the step in flight, and the same command continues."""
    reference = undisturbed(base, 4)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        folder = base / name
        command = [*tiny(folder, 4), "--checkpoint-every", 1000]
        process = launch(*command)
        wait_until(lambda folder=folder: steps_done(folder) >= 10, process)
        seen = steps_done(folder)
        process.send_signal(getattr(signal, name))
        code, output = finish(process)
        done = load_checkpoint(folder / "checkpoint.pt")["step"]
        stopped = code == 0 and f"stopped by {name} after step {done} of 32: the same command continues" in output
        stopped = stopped and "Traceback" not in output and seen <= done <= seen + 2
        code, more = finish(launch(*command))
        survived = stopped and code == 0 and same_weights(folder, reference)
        yield tried_once(name, survived, output + more, f"checkpoint of step {done}, the last one seen was {seen}")


def signal_to_all(base: Path) -> Row:
    """SIGTERM to every process of a job, as Slurm sends it: torchrun, the training processes and their loaders."""
    folder = base / "signal_to_all"
    process = launch(*tiny(folder, 500), "--workers", 1, processes=2)
    wait_until(lambda: steps_done(folder) >= 5, process)
    seen = steps_done(folder)
    for number in (*processes_of(folder), process.pid):
        os.kill(number, signal.SIGTERM)
    _, output = finish(process)  # torchrun itself reports the signal as its error
    done = load_checkpoint(folder / "checkpoint.pt")["step"]
    survived = f"stopped by SIGTERM after step {done}" in output and seen <= done <= seen + 3
    return tried_once("SIGTERM to torchrun, 2 processes, their loaders", survived, output)


def damaged_checkpoint(base: Path) -> Row:
    """The newest checkpoint cut, emptied or changed in a byte: the run continues from the one before, and says so."""
    reference, survived, note = undisturbed(base, 4), 0, ""
    for kind in ("cut", "empty", "changed"):
        folder = base / f"damaged_{kind}"
        finish(launch(*tiny(folder, 4), "--max-steps", 9))
        spoil(folder / "checkpoint.pt", kind)
        code, output = finish(launch(*tiny(folder, 4)))
        reported = output.count("continuing from checkpoint.1.pt") == 1
        if code == 0 and reported and (folder / "damaged-checkpoint.pt").exists() and same_weights(folder, reference):
            survived += 1
        else:
            note = f"{kind}: {output[-500:]}"
    return Row("newest checkpoint damaged", 3, survived, note or "cut, empty, a byte changed")


def spoil(path: Path, kind: str) -> None:
    """Damages a file: "cut" in the middle, "empty", or "changed" in one bit."""
    content = bytearray(path.read_bytes())
    if kind == "changed":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(kind)])


# ------------------------------------------------------------------------------------------------------ many processes


def restart(base: Path, count: int) -> Row:
    """torchrun --max-restarts: one process of two is killed; the job ends by itself, with the same result."""
    reference, survived, note = undisturbed(base, 4, 2), 0, ""
    for number in range(count):
        folder = base / f"restart_{number}"
        process = launch(*tiny(folder, 4), processes=2, torchrun=("--standalone", "--max-restarts=3"))
        wait_until(lambda folder=folder, steps=5 + 2 * number: steps_done(folder) >= steps, process)
        os.kill(processes_of(folder)[number % 2], signal.SIGKILL)
        code, output = finish(process)
        if code == 0 and same_weights(folder, reference):
            survived += 1
        else:
            note = output[-500:]
    return Row("one of 2 processes killed, --max-restarts=3", count, survived, note)


def one_dies(base: Path) -> Row:
    """One process of two is killed, without restarts: the other ends too, soon."""
    folder = base / "one_dies"
    process = launch(*tiny(folder, 500), processes=2)
    wait_until(lambda: steps_done(folder) >= 3, process)
    start = time.perf_counter()
    os.kill(processes_of(folder)[-1], signal.SIGKILL)
    code, output = finish(process, 90)
    survived = code > 0 and not processes_of(folder) and "Signal 9" in output
    return tried_once(
        "one of 2 processes killed, no restarts: all end", survived, output, f"{time.perf_counter() - start:.0f} s"
    )


def two_machines(base: Path, restarts: bool) -> Row:
    """Two torchrun agents with a process each equal one agent with two, also if a process is killed and restarted."""
    reference, folder = undisturbed(base, 4, 2), base / f"machines_{restarts}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=3")
    # Without this, torch may hang at a restart of several machines (pytorch issue 135712).
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if restarts else {}
    agents = [launch(*tiny(folder, 4), torchrun=meeting, **own_store) for _ in range(2)]
    if restarts:
        wait_until(lambda: steps_done(folder) >= 7, agents[0])
        os.kill(processes_of(folder)[-1], signal.SIGKILL)
    ended = [finish(agent) for agent in agents]
    survived = all(code == 0 for code, _ in ended) and same_weights(folder, reference)
    fault = "two torchrun agents" + ", one process killed, --max-restarts=3" * restarts
    return tried_once(fault, survived, ended[0][1])


def fewer_processes(base: Path) -> Row:
    """A run of two processes is continued by one, in the middle of an epoch.

    The weights are not the same bit for bit: sums over processes are added in another order, and where a gradient is
    nearly 0, young Adam makes a whole step of its rounding. Their distance is compared with that which the weights
    moved after the change.
    """
    reference, folder = undisturbed(base, 4, 2), base / "fewer"
    finish(launch(*tiny(folder, 4), "--max-steps", 21, processes=2))
    before = weights(folder)
    code, output = finish(launch(*tiny(folder, 4)))
    start, ours, theirs = (
        torch.cat([value.double().flatten() for value in state.values()])
        for state in (before, weights(folder), weights(reference))
    )
    distance = float((ours - theirs).norm() / (theirs - start).norm())
    note = f"{distance:.1%} of the way apart, by rounding"
    return tried_once("2 processes continued by 1", code == 0 and distance < 0.1, note + output, note)


# --------------------------------------------------------------------------------------------------------------- files


def write_odd_images(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Writes unusual image files: the names of those that cannot be read, and what those show that can."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = cv2.resize(noise, (80, 60), interpolation=cv2.INTER_CUBIC)
    grey, long = picture[..., 0], np.tile(picture[:20], (1, 250, 1))
    image, grey_as_rgb = Image.fromarray(picture), np.repeat(grey[..., None], 3, axis=2)
    upright = Image.Exif()
    upright[0x0112] = 6  # the camera was held upright: turn the picture by 90 degrees to the right
    palette = image.quantize(32)
    shown = {}
    for name, content, shows, options in (
        ("grey.png", Image.fromarray(grey), grey_as_rgb, {}),
        ("16 bit.png", Image.fromarray(grey.astype(np.uint16) * 257), grey_as_rgb, {}),
        ("alpha.png", Image.fromarray(np.dstack((picture, grey))), picture, {}),
        ("palette.png", palette, np.asarray(palette.convert("RGB")), {}),
        ("bläuliche Größe 木.png", image, picture, {}),
        ("1x1.png", Image.fromarray(picture[:1, :1]), picture[:1, :1], {}),
        ("20000x20.png", Image.fromarray(long), long, {}),
        ("exif.png", image, np.rot90(picture, -1), {"exif": upright}),
    ):
        content.save(folder / name, **options)
        shown[name] = shows
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    shown["cmyk.jpg"] = np.asarray(Image.open(folder / "cmyk.jpg").convert("RGB"))
    os.symlink("grey.png", folder / "link.png")
    shown["link.png"] = grey_as_rgb

    os.symlink(".", folder / "loop")
    os.symlink("nowhere.png", folder / "dangling.png")
    os.symlink("itself.png", folder / "itself.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("this is no image\n")
    image.save(folder / "cut.jpg")
    spoil(folder / "cut.jpg", "cut")
    bad = ["dangling.png", "itself.png", "empty.png", "text.png", "cut.jpg"]
    if os.getuid():  # root may read everything
        image.save(folder / "locked.png")
        (folder / "locked.png").chmod(0)
        bad.append("locked.png")
    return bad, shown


def bad_files(base: Path) -> Iterator[Row]:
    """Unusual images are read; bad ones are reported once each by a run of two processes; too many end it."""
    folder = base / "images"
    bad, shown = write_odd_images(folder)
    right = [np.array_equal(load_image(folder / name).permute(1, 2, 0).numpy(), shown[name]) for name in shown]
    yield Row("unusual images are read as they look", len(shown), sum(right), ", ".join(shown))
    for number in range(600):
        shutil.copy(folder / "16 bit.png", folder / f"filler {number}.png")
    files = 600 + len(shown) + len(bad)
    command = [*tiny(base / "bad_files", 2), "--task", "vicreg", "--image-dir", folder, "--image-batch", 64]
    command += ["--workers", 2, "--steps-per-epoch", -(-files // 64)]
    code, output = finish(launch(*command, processes=2))
    reported = sum(
        output.count(f"the next takes its place: {folder / name}: not a readable image") == 1 for name in bad
    )
    fine = code == 0 and f"bad file {len(bad)} of at most {files // 100} images, " in output
    fine = fine and output.count("bad file ") == len(bad)
    yield Row("bad images are reported once, 2 processes", len(bad), reported * fine, "" if fine else output[-500:])
    command += ["--output-dir", base / "too_many", "--bad-files", 0.002]
    code, output = finish(launch(*command, processes=2))
    survived = code != 0 and "--bad-files allows 1" in output and output.count("error: ") == 1
    yield tried_once("more bad images than --bad-files", survived, output)


# ------------------------------------------------------------------------------------------------------------- numbers

NOT_FINITE = """
import os, sys
sys.path.insert(0, {root!r})
import mcjepa, train
forward, calls = mcjepa.MCJEPA.forward, iter(range(1000))
def poisoned(model, video, views, **options):
    if next(calls) in {steps} and int(os.environ["RANK"]) == 1:
        views = tuple(view * float({value!r}) for view in views)
    return forward(model, video, views, **options)
mcjepa.MCJEPA.forward = poisoned
train.run_command(lambda: train.train(train.parse(sys.argv[1:])))
"""
"""train.py with NaN or infinity in the images of the second process at some steps."""


def not_finite(base: Path) -> Iterator[Row]:
    """Steps that are not finite in one of two processes are skipped in both; ten in a row end the run."""

    def run(value: str, steps: list[int], epochs: int) -> tuple[Path, int, str]:
        folder, script = base / f"{value}_{len(steps)}", base / f"{value}_{len(steps)}.py"
        script.write_text(NOT_FINITE.format(root=str(ROOT), steps=steps, value=value))
        code, output = finish(launch(*tiny(folder, epochs), processes=2, script=script))
        finite = all(bool(value.isfinite().all()) for value in weights(folder).values())
        return folder, code if finite else -1, output

    for value in ("nan", "inf"):
        folder, code, output = run(value, [3, 6, 7], 2)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        skipped = [line["step"] for line in lines if any("vicreg" in term for term in line.get("skipped", []))]
        fine = code == 0 and skipped == [4, 7, 8] and output.count("is skipped, not finite: ") == 3
        yield Row(f"{value} at 3 steps, in one of 2 processes", 3, 3 * fine, "" if fine else output[-500:])
    folder, code, output = run("nan", [*range(5, 99)], 4)
    survived = code > 0 and "10 steps in a row were not finite" in output and output.count("error: ") == 1
    yield tried_once("nan from step 6 on: ends after ten steps", survived, output)


# --------------------------------------------------------------------------------------------------------------- disks


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk in memory (only root can mount it)."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        while subprocess.run(["umount", "-l", folder], stderr=subprocess.DEVNULL).returncode == 0:
            pass  # read-only, it is mounted twice


def disk(base: Path) -> Iterator[Row]:
    """A disk that fills, or turns read-only, ends the run in one line; the last checkpoint is whole."""
    for kind in ("full", "read-only"):
        with small_disk(base / f"disk_{kind}", 64) as place:
            folder = place / "run"
            process = launch(*tiny(folder, 500))
            wait_until(lambda folder=folder: steps_done(folder) >= 5, process)
            if kind == "full":
                with open(place / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
                    while True:
                        ballast.write(bytes(1 << 16))
            else:
                subprocess.run(["mount", "--bind", place, place], check=True)
                subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
            code, output = finish(process)
            error = output[output.find("error: ") :].strip()
            whole = load_checkpoint(folder / "checkpoint.pt")["step"] >= 4
            survived = code == 1 and whole and output.count("error: ") == 1 and "Traceback" not in output
            survived = survived and "cannot be written" in error
            yield tried_once(f"disk {kind}", survived, output, error)


# ------------------------------------------------------------------------------------------------------- damaged files


def whole_files(base: Path) -> dict[str, Callable[[Path], object]]:
    """Writes a file of each kind into base / "fuzz"; its name and its reader."""
    folder, rng = base / "fuzz", np.random.default_rng(0)
    folder.mkdir()
    picture = cv2.resize(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8), (16, 12))
    flow = rng.normal(0, 3, (12, 16, 2)).astype(np.float32)
    ids = Image.fromarray(rng.integers(0, 4, (12, 16), dtype=np.uint8))
    ids.putpalette(bytes(range(12)))
    cv2.imwrite(str(folder / "image.jpg"), picture)
    cv2.imwrite(str(folder / "image.png"), picture)
    write_flow(folder / "flow.flo", torch.from_numpy(flow).permute(2, 0, 1)[None])
    write_flow(folder / "flow_kitti.png", torch.from_numpy(flow).permute(2, 0, 1)[None])
    three = np.dstack((flow, flow[..., :1])).astype("<f4")
    (folder / "flow.pfm").write_bytes(b"PF\n16 12\n-1.0\n" + three.tobytes())
    ids.save(folder / "labels.png")
    shutil.copy(undisturbed(base, 4) / "checkpoint.pt", folder)
    images, flows = dict.fromkeys(("image.jpg", "image.png"), load_image), ("flow.flo", "flow_kitti.png", "flow.pfm")
    return images | dict.fromkeys(flows, read_flow) | {"labels.png": read_ids, "checkpoint.pt": load_model}


def damage(content: bytes, rng: random.Random) -> bytes:
    """Changes bytes, most of them near the beginning or the end, where headers lie; or cuts or doubles a piece."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(min(rng.choice((64, 64, 1024, len(changed))), len(changed)))
        place = place if rng.random() < 0.6 else len(changed) - 1 - place
        kind, length = rng.random(), rng.randrange(1, 64)
        if kind < 0.6:
            changed[place] = rng.randrange(256)
        elif kind < 0.75:  # sizes that lie
            number = rng.choice((0, 1, 65535, 10**6, 2**31 - 1, 2**32 - 1))
            changed[place : place + 4] = number.to_bytes(4, rng.choice(("little", "big")))
        elif kind < 0.85 and len(changed) > length:
            del changed[place : place + length]
        else:
            changed[place:place] = changed[place : place + length]
    return bytes(changed)


def read_damaged_files(path: Path, reader: Callable[[Path], object], count: int) -> Row:
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
    return Row(f"damaged {path.name}", count, survived, note or f"{refused} refused, the others read")


def fuzz(base: Path, count: int) -> Iterator[Row]:
    """Random damage to files of every kind. Each kind has a process of its own, which a crash would end."""
    for name, reader in whole_files(base).items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                yield pool.submit(read_damaged_files, base / "fuzz" / name, reader, count).result()
            except BrokenProcessPool as error:
                yield Row(f"damaged {name}", count, 0, str(error))


class RunsCode:
    """Would create a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def unpickled_code(base: Path) -> Row:
    """A checkpoint that would run code when it is unpickled is refused by every command, and runs nothing."""
    trace, folder = base / "it_ran", base / "code"
    folder.mkdir()
    evil = folder / "checkpoint.pt"
    torch.save({"model": {}, "config": {}, "step": RunsCode(trace)}, evil)
    commands = [
        ("train.py", "pocket", "--output-dir", folder),
        ("train.py", "pocket", "--init", evil, "--output-dir", base / "code_init"),
        ("evaluate.py", "flow", "--model", evil, "--output-dir", base / "code_flow"),
        ("evaluate.py", "segmentation", "--model", evil, "--output-dir", base / "code_segmentation"),
    ]
    survived, note = 0, ""
    for script, *arguments in commands:
        code, output = finish(launch(*arguments, script=script))
        if code == 1 and f"{evil}: not a checkpoint" in output and "Traceback" not in output and not trace.exists():
            survived += 1
        else:
            note = output[-500:]
    return Row("checkpoint that would run code", len(commands), survived, note)


# --------------------------------------------------------------------------------------------------------------- table


def faults(base: Path, quick: bool) -> Iterator[tuple[str, Callable[[], Row | Iterator[Row]]]]:
    """All faults, by name."""
    yield "kill_1", lambda: kills(base, 3 if quick else 20, 1)
    yield "kill_2", lambda: kills(base, 3 if quick else 20, 2)
    yield "signals", lambda: signals(base)
    yield "signal_to_all", lambda: signal_to_all(base)
    yield "damaged", lambda: damaged_checkpoint(base)
    yield "restart", lambda: restart(base, 1 if quick else 6)
    yield "one_dies", lambda: one_dies(base)
    yield "machines", lambda: two_machines(base, restarts=False)
    yield "machines_restart", lambda: two_machines(base, restarts=True)
    yield "fewer", lambda: fewer_processes(base)
    yield "files", lambda: bad_files(base)
    yield "not_finite", lambda: not_finite(base)
    if os.getuid() == 0:
        yield "disk", lambda: disk(base)
    yield "fuzz", lambda: fuzz(base, 100 if quick else 2000)
    yield "code", lambda: unpickled_code(base)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="names, or what names begin with")
    parser.add_argument("--quick", action="store_true", help="fewer kills and fewer damaged files")
    arguments = parser.parse_args()
    rows = []
    print(f"{'fault':58}{'tried':>7}{'survived':>10}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        try:
            for name, inject in faults(Path(base), arguments.quick):
                result = inject() if name.startswith(tuple(arguments.only)) else []
                for row in [result] if isinstance(result, Row) else result:
                    rows.append(row)
                    note = re.sub(r"\s+", " ", row.note)
                    print(f"{row.fault:58}{row.tried:7}{row.survived:10}  {note}", flush=True)
        finally:
            kill_all(Path(base))
    tried, survived = sum(row.tried for row in rows), sum(row.survived for row in rows)
    print(f"{'all':58}{tried:7}{survived:10}")
    sys.exit(survived < tried)


if __name__ == "__main__":
    main()
