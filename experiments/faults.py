"""Faults that a run of days meets, tried on a tiny run: what survives, and what is lost.

    python experiments/faults.py                    # all of them, 13 minutes on two CPU cores
    python experiments/faults.py --only kill fuzz   # those whose names begin so

Prints a table: how often each fault was tried, survived (the run went on to the same weights, bit for bit, or ended in
the one clear line that it should) and lost. Exits with 1 if anything was lost. tests/test_faults.py holds a short form.
"""

import argparse
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from sources.flow_benchmarks import read_flow  # noqa: E402

TINY = [
    "pocket", "--workers", "0", "--crop", "64", "64", "--image-size", "32", "--video-batch", "2", "--image-batch", "4",
    "--model.estimator-factor", "0.125", "--model.expander", "16", "16", "16", "--validation-pairs", "2",
    "--steps-per-epoch", "8", "--log-every", "1", "--flow-start-epoch", "0.5", "--regularisation-warmup-epochs", "1",
    "--mask-warmup-epochs", "1.5", "--checkpoint-every", "2",
]  # fmt: skip
"""A step takes about a tenth of a second."""


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    tried: int
    survived: int
    note: str = ""


# ------------------------------------------------------------------------------------------------------------- running


def launch(*arguments: object, processes: int = 1, torchrun: tuple[object, ...] = (), script: str = "train.py"):
    """Starts train.py as a user does; under torchrun if there are several processes, or options for it."""
    line: list[object] = [sys.executable]
    if processes > 1 or torchrun:
        options = torchrun or ("--standalone",)
        line += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *options]
    line += [script, *arguments]
    return subprocess.Popen(
        list(map(str, line)),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """Exit code and output of a process that ends by itself."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, f"no end within {seconds} s"
    return process.returncode, output


def processes_of(folder: Path) -> dict[int, list[str]]:
    """The command lines of the training processes that write into a folder, by number; torchrun's own are left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_text().split("\0") if entry.name.isdecimal() else []
        except OSError:  # it has ended meanwhile
            continue
        if str(folder) in words and "torch.distributed.run" not in words:
            found[int(entry.name)] = words
    return found


def kill_all(process: subprocess.Popen, folder: Path) -> None:
    """SIGKILL for a command and all that it has started."""
    for number in (process.pid, *processes_of(folder)):
        with suppress(OSError):  # it has ended by itself
            os.kill(number, signal.SIGKILL)
    process.communicate()


def steps_done(folder: Path) -> int:
    """Of a run that may be under way."""
    path = folder / "metrics.jsonl"
    return sum('"total"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition: Callable[[], object], process: subprocess.Popen, pause: float = 0.002) -> bool:
    """Whether it came to hold before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(pause)
    return False


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def same_weights(folder: Path, other: Path) -> bool:
    """Bit for bit, with batch norms' averages."""
    ours, theirs = weights(folder), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def undisturbed(folder: Path, flags: list[object], processes: int = 1) -> Path:
    """The run that the others must equal."""
    if not (folder / "checkpoint.pt").exists():
        code, output = finish(launch(*flags, "--output-dir", folder, processes=processes))
        assert code == 0, output
    return folder


# --------------------------------------------------------------------------------------------------------------- kills


def kills(base: Path, count: int, processes: int) -> Row:
    """`kill -9` of all processes of a run, again and again: every second time while a checkpoint is being written."""
    steps = 8 * count + 8  # enough that it is not done before the last kill
    flags = [*TINY, "--epochs", -(-steps // 8)]
    reference = undisturbed(base / f"reference_{processes}_{steps}", flags, processes)
    folder, rng, halves, done = base / f"killed_{processes}", random.Random(0), 0, 0
    partial = folder / ".partial-checkpoint.pt"
    for number in range(count):
        more = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        start = time.time()
        process = launch(*flags, "--output-dir", folder, *more, processes=processes)
        before = steps_done(folder)
        wait_for(lambda before=before: steps_done(folder) > before, process)
        if number % 2:
            time.sleep(rng.uniform(0, 0.4))
        else:
            wait_for(partial.exists, process, pause=0)
            time.sleep(rng.uniform(0, 0.003))
        done += process.poll() is None
        kill_all(process, folder)
        halves += partial.exists() and partial.stat().st_mtime > start
    more = ["--resume"] if (folder / "checkpoint.pt").exists() else []
    code, output = finish(launch(*flags, "--output-dir", folder, *more, processes=processes))
    equal = code == 0 and same_weights(folder, reference)
    note = f"{halves} while a checkpoint was written" if equal else output[-300:]
    return Row(f"kill -9, {processes} process{'es' * (processes > 1)}", done, done if equal else 0, note)


def signals(base: Path, names: tuple[str, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")) -> Iterator[Row]:
    """What schedulers and users send: a checkpoint of the step in flight, exit code 0, and a sentence how to go on."""
    flags = [*TINY, "--epochs", 4, "--checkpoint-every", 1000]
    reference = undisturbed(base / "reference_signals", flags)
    for name in names:
        folder = base / name
        process = launch(*flags, "--output-dir", folder)
        wait_for(lambda folder=folder: steps_done(folder) >= 10, process)
        seen = steps_done(folder)
        process.send_signal(getattr(signal, name))
        code, output = finish(process)
        done = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
        clean = code == 0 and f"stopped by {name} after step {done}" in output and "--resume" in output
        clean = clean and "Traceback" not in output and seen <= done <= seen + 2
        code, _ = finish(launch(*flags, "--output-dir", folder, "--resume"))
        survived = clean and code == 0 and same_weights(folder, reference)
        yield Row(name, 1, int(survived), f"checkpoint of step {done}" if survived else output[-300:])


def signal_to_all(base: Path) -> Row:
    """SIGTERM to every process of a job, torchrun and those that load data included, as Slurm sends it."""
    flags = [*TINY, "--epochs", 500, "--workers", 1]
    folder = base / "all"
    process = launch(*flags, "--output-dir", folder, processes=2)
    wait_for(lambda: steps_done(folder) >= 5, process)
    seen = steps_done(folder)
    for number in (*processes_of(folder), process.pid):
        os.kill(number, signal.SIGTERM)
    _, output = finish(process)  # torchrun itself ends with an error of its own: it was told to end
    done = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    survived = f"stopped by SIGTERM after step {done}" in output and seen <= done <= seen + 3
    return Row("SIGTERM to torchrun, 2 processes, their loaders", 1, int(survived), "" if survived else output[-500:])


def broken_checkpoint(base: Path) -> Row:
    """The newest checkpoint cut, emptied, or with a byte changed: the run goes on from the one before, and says so."""
    flags = [*TINY, "--epochs", 2]
    reference = undisturbed(base / "reference_broken", flags)
    survived, note = 0, ""
    for kind in ("cut", "empty", "changed", "gone"):
        folder = base / f"broken_{kind}"
        finish(launch(*flags, "--output-dir", folder, "--max-steps", 9))
        path = folder / "checkpoint.pt"
        spoil(path, kind)
        code, output = finish(launch(*flags, "--output-dir", folder, "--resume"))
        if code == 0 and "Going on from checkpoint.1.pt" in output and same_weights(folder, reference):
            survived += 1
        else:
            note = f"{kind}: {output[-300:]}"
    return Row("newest checkpoint broken", 4, survived, note or "cut, empty, a byte changed, gone")


def spoil(path: Path, kind: str) -> None:
    """Breaks a file."""
    content = bytearray(path.read_bytes())
    if kind == "gone":
        return path.unlink()
    if kind == "changed":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(kind)])


# ----------------------------------------------------------------------------------------------------- many processes


def workers_of_run(folder: Path) -> list[int]:
    """The training processes, without those that load data."""
    return sorted(number for number, words in processes_of(folder).items() if any("train.py" in w for w in words))


def restart(base: Path, count: int = 6) -> Row:
    """torchrun --max-restarts: one process of two is killed; the job ends by itself, with the same result."""
    flags = [*TINY, "--epochs", 3]
    reference = undisturbed(base / "reference_restart", flags, processes=2)
    survived, note = 0, ""
    for number in range(count):
        folder = base / f"restart_{number}"
        process = launch(*flags, "--output-dir", folder, processes=2, torchrun=("--standalone", "--max-restarts=3"))
        wait_for(lambda folder=folder, steps=5 + 2 * number: steps_done(folder) >= steps, process)
        os.kill(workers_of_run(folder)[number % 2], signal.SIGKILL)
        code, output = finish(process, 120)
        if code == 0 and same_weights(folder, reference):
            survived += 1
        else:
            note = output[-300:]
    return Row("torchrun --max-restarts=3, one of 2 killed", count, survived, note)


def one_fails(base: Path) -> Row:
    """Without restarts the others end too, soon, and none hangs."""
    folder = base / "one_fails"
    process = launch(*TINY, "--epochs", 500, "--output-dir", folder, processes=2)
    wait_for(lambda: steps_done(folder) >= 3, process)
    start = time.perf_counter()
    os.kill(workers_of_run(folder)[-1], signal.SIGKILL)
    code, output = finish(process, 90)
    seconds = time.perf_counter() - start
    survived = code > 0 and seconds < 60 and not processes_of(folder) and "Signal 9" in output
    return Row("one of 2 killed, no restarts: all end", 1, int(survived), f"{seconds:.0f} s")


def two_machines(base: Path) -> Row:
    """Two torchrun agents that meet on a port of this machine: the weights are those of one agent with 2 processes."""
    flags = [*TINY, "--epochs", 2]
    reference = undisturbed(base / "reference_machines", flags, processes=2)
    folder, port = base / "machines", free_port()
    meeting = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=faults")
    agents = [launch(*flags, "--output-dir", folder, torchrun=meeting) for _ in range(2)]
    ended = [finish(agent) for agent in agents]
    survived = all(code == 0 for code, _ in ended) and same_weights(folder, reference)
    return Row("two torchrun agents, --nnodes=2", 1, int(survived), "" if survived else ended[0][1][-500:])


def restart_of_machines(base: Path) -> Row:
    """The same, and a process of one of them is killed: both begin anew, and the result is the same."""
    flags = [*TINY, "--epochs", 3]
    reference = undisturbed(base / "reference_restart", flags, processes=2)
    folder, port = base / "machines_restart", free_port()
    meeting = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=again")
    with environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"):
        agents = [launch(*flags, "--output-dir", folder, torchrun=(*meeting, "--max-restarts=3")) for _ in range(2)]
    wait_for(lambda: steps_done(folder) >= 7, agents[0])
    os.kill(workers_of_run(folder)[-1], signal.SIGKILL)
    ended = [finish(agent) for agent in agents]
    survived = all(code == 0 for code, _ in ended) and same_weights(folder, reference)
    return Row(
        "two agents, --max-restarts=3, one process killed", 1, int(survived), "" if survived else ended[0][1][-500:]
    )


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """For what is launched inside."""
    before = os.environ.copy()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fewer_processes(base: Path) -> Row:
    """Two processes, continued by one in the middle of an epoch: it goes where two would have gone.

    Not bit for bit: sums over processes are added in another order, and where a gradient is nearly 0 young Adam makes a
    whole step of its rounding. Compared with the way that the weights make after the stop.
    """
    flags = [*TINY, "--epochs", 2]
    reference = undisturbed(base / "reference_fewer", flags, processes=2)
    folder = base / "fewer"
    finish(launch(*flags, "--output-dir", folder, "--max-steps", 5, processes=2))
    before = weights(folder)
    code, _ = finish(launch(*flags, "--output-dir", folder, "--resume"))
    start, ours, theirs = (
        torch.cat([value.double().flatten() for value in state.values()])
        for state in (before, weights(folder), weights(reference))
    )
    apart = float((ours - theirs).norm() / (theirs - start).norm())
    return Row("2 processes continued by 1", 1, int(code == 0 and apart < 0.1), f"{apart:.1%} of the way apart")


# -------------------------------------------------------------------------------------------------------------- files


def write_odd_images(folder: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Odd image files: those that must be told, by name and kind, and those that must be read, with what they show."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)
    grey = picture[..., 0]
    good, bad = {}, {}

    def write(name: str, image: Image.Image, shows: np.ndarray, **options: object) -> None:
        image.save(folder / name, **options)
        good[name] = shows

    as_rgb = lambda x: np.repeat(x[..., None], 3, axis=2)  # noqa: E731
    write("grey.png", Image.fromarray(grey), as_rgb(grey))
    write("16 bit.png", Image.fromarray(grey.astype(np.uint16) * 257), as_rgb(grey))
    write("alpha.png", Image.fromarray(np.dstack((picture, grey)), "RGBA"), picture)
    palette = Image.fromarray(picture).quantize(32)
    write("palette.png", palette, np.asarray(palette.convert("RGB")))
    write("bläuliche Größe 木.png", Image.fromarray(picture), picture)
    write("1x1.png", Image.fromarray(picture[:1, :1]), picture[:1, :1])
    long = np.tile(picture[:20], (1, 250, 1))
    write("20000x20.png", Image.fromarray(long), long)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: to be turned by 90 degrees to the right
    write("exif.png", Image.fromarray(picture), np.rot90(picture, -1), exif=turned)
    cmyk = Image.fromarray(picture).convert("CMYK")
    cmyk.save(folder / "cmyk.jpg", quality=95)
    good["cmyk.jpg"] = np.asarray(Image.open(folder / "cmyk.jpg").convert("RGB"))
    os.symlink("grey.png", folder / "link.png")
    good["link.png"] = as_rgb(grey)

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG")
    for name, content in (
        ("empty.png", b""),
        ("cut.jpg", buffer.getvalue()[: len(buffer.getvalue()) // 2]),
        ("text.png", b"this is no image\n"),
    ):
        (folder / name).write_bytes(content)
        bad[name] = "damaged"
    os.symlink("nowhere.png", folder / "dangling.png")
    os.symlink("itself.png", folder / "itself.png")
    os.symlink(".", folder / "loop")
    bad |= {"dangling.png": "link", "itself.png": "link"}
    if os.getuid():  # root may read all
        write("locked.png", Image.fromarray(picture), picture)
        (folder / "locked.png").chmod(0)
        bad["locked.png"] = "permission"
        del good["locked.png"]
    return bad, good


def bad_files(base: Path, fillers: int = 600) -> Iterator[Row]:
    """Bad files among good ones: each is told once and counted, in a run of two processes and two workers."""
    folder = base / "images"
    bad, good = write_odd_images(folder)
    right = 0
    for name, shows in good.items():
        right += np.array_equal(load_image(folder / name).permute(1, 2, 0).numpy(), shows)
    yield Row("odd images read rightly", len(good), right, ", ".join(good))
    filler = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for number in range(fillers):
        cv2.imwrite(str(folder / f"filler_{number:04d}.png"), filler)
    everything = fillers + len(good) + len(bad)
    flags = [*TINY, "--task", "vicreg", "--image-dir", folder, "--image-batch", 64, "--workers", 2]
    flags += ["--epochs", 2, "--steps-per-epoch", -(-everything // 64)]
    code, output = finish(launch(*flags, "--output-dir", base / "bad_files", processes=2))
    told = sum(output.count(f"{folder / name}: not a readable image") == 1 for name in bad)
    fine = code == 0 and f"of {everything} images" in output and output.count("bad file ") == len(bad)
    yield Row("bad files told once, 2 processes", len(bad), told if fine else 0, "" if fine else output[-500:])
    code, output = finish(launch(*flags, "--bad-files", 0.002, "--output-dir", base / "too_many", processes=2))
    fine = code != 0 and "--bad-files allows 1" in output and output.count("error: ") == 1
    yield Row("more bad files than --bad-files", 1, int(fine), "" if fine else output[-500:])


# ------------------------------------------------------------------------------------------------------------ numbers

POISON = """
import sys
sys.path.insert(0, {root!r})
import os, torch, mcjepa, train
forward, calls = mcjepa.MCJEPA.forward, [0]
def poisoned(model, video=None, views=None, **options):
    number, calls[0] = calls[0], calls[0] + 1
    if number in {steps} and views is not None and int(os.environ.get("RANK", 0)) == {rank}:
        views = tuple(view * float({value!r}) for view in views)
    return forward(model, video, views, **options)
mcjepa.MCJEPA.forward = poisoned
if __name__ == "__main__":
    train.main()
"""
"""train.py with NaN or infinity in one process's images at some steps."""


def bad_numbers(base: Path, processes: int = 2) -> Iterator[Row]:
    """Steps that are not finite in one of the processes are skipped in all, told, and end the run if they go on."""
    base.mkdir(parents=True, exist_ok=True)
    for value in ("nan", "inf"):
        script, folder = base / f"poison_{value}.py", base / f"poison_{value}"
        script.write_text(POISON.format(root=str(ROOT), steps={3, 6, 7}, rank=processes - 1, value=value))
        flags = [*TINY, "--epochs", 2, "--output-dir", folder]
        code, output = finish(launch(*flags, processes=processes, script=script))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        skipped = {line["step"]: line for line in lines if "skipped" in line}
        fine = code == 0 and sorted(skipped) == [4, 7, 8] and output.count("is skipped, not finite") == 3
        fine = fine and all(any("vicreg" in term for term in line["skipped"]) for line in skipped.values())
        fine = fine and all(any("MovingShapes" in name for name in line["batch"]) for line in skipped.values())
        fine = fine and all(bool(torch.isfinite(x).all()) for x in weights(folder).values())
        note = "" if fine else output[-500:]
        yield Row(f"{value} at 3 steps, in one of {processes} processes", 3, 3 if fine else 0, note)
    script, folder = base / "poison_on.py", base / "poison_on"
    script.write_text(POISON.format(root=str(ROOT), steps=set(range(5, 99)), rank=processes - 1, value="nan"))
    flags = [*TINY, "--epochs", 9, "--checkpoint-every", 5, "--max-bad-steps", 4, "--output-dir", folder]
    code, output = finish(launch(*flags, processes=processes, script=script))
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    fine = code != 0 and "4 steps in a row were not finite" in output and output.count("error: ") == 1
    fine = fine and all(bool(torch.isfinite(x).all()) for x in weights(folder).values())
    yield Row("nan from step 6 on: stops after --max-bad-steps", 1, int(fine), f"last checkpoint: step {step}")


# --------------------------------------------------------------------------------------------------------------- disk


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of its own, for root only."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        while subprocess.run(["umount", "-l", folder], stderr=subprocess.DEVNULL).returncode == 0:
            pass  # read-only, it may be mounted twice


def disk(base: Path) -> Iterator[Row]:
    """A full disk, a disk that turns read-only, a folder that vanishes: a clear line; the last checkpoint is whole."""
    for kind, told in (
        ("full", "is the disk full? Make room"),
        ("read-only", "read-only"),
        ("vanished", "its folder has vanished: bring it back"),
    ):
        with small_disk(base / f"disk_{kind}", 64) as place:
            folder = place / "run"
            process = launch(*TINY, "--epochs", 500, "--output-dir", folder)
            wait_for(lambda folder=folder: steps_done(folder) >= 5 and (folder / "checkpoint.pt").exists(), process)
            if kind == "full":
                with open(place / "ballast", "wb") as ballast, suppress(OSError):
                    while True:
                        ballast.write(bytes(1 << 16))
                        ballast.flush()
            elif kind == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", place])
                if process.poll() is None and os.access(place, os.W_OK):  # a file was open: it cannot be remounted
                    subprocess.run(["mount", "--bind", place, place])
                    subprocess.run(["mount", "-o", "remount,ro,bind", place])
            else:
                os.rename(folder, place / "elsewhere")
                folder = place / "elsewhere"
            code, output = finish(process, 120)
            lines = [line for line in output.replace("\r", "\n").splitlines() if "error: " in line]
            try:
                whole = load_checkpoint(folder / "checkpoint.pt")["step"] > 0
            except (ValueError, FileNotFoundError) as error:
                whole, lines = False, [str(error)]
            fine = code == 1 and whole and len(lines) == 1 and told in lines[0] and "Traceback" not in output
            yield Row(f"disk {kind}", 1, int(fine), lines[0][:160] if fine else output[-500:])


# -------------------------------------------------------------------------------------------------------------- fuzzing


def seeds_of_fuzz(folder: Path) -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """A whole file of each kind, and its reader, by the end of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    flow = rng.normal(0, 3, (12, 16, 2)).astype(np.float32)
    cv2.writeOpticalFlow(str(folder / "a.flo"), flow)
    (folder / "a.pfm").write_bytes(b"PF\n16 12\n-1.0\n" + np.dstack((flow, flow[..., :1])).astype("<f4").tobytes())
    stored = rng.integers(0, 2**16, (12, 16, 3)).astype(np.uint16)
    stored[..., 0] = 1
    cv2.imwrite(str(folder / "a_kitti.png"), stored)
    ids = Image.fromarray(rng.integers(0, 4, (12, 16), dtype=np.uint8))
    ids.putpalette(bytes(range(12)))
    ids.save(folder / "a_palette.png")
    finish(launch(*TINY, "--epochs", 1, "--max-steps", 1, "--output-dir", folder / "run"))
    shutil.copy(folder / "run" / "checkpoint.pt", folder / "a.pt")
    readers = {
        "a.flo": read_flow,
        "a.pfm": read_flow,
        "a_kitti.png": read_flow,
        "a_palette.png": read_ids,
        "a.pt": load_model,
    }
    return {name: ((folder / name).read_bytes(), reader) for name, reader in readers.items()}


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, most of them near the beginning or the end, where headers lie; or a piece cut or doubled."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        kind = rng.random()
        near = rng.choice((64, 64, 1024, len(changed)))
        place = rng.randrange(min(near, len(changed)))
        place = place if rng.random() < 0.6 else len(changed) - 1 - place
        if kind < 0.6:
            changed[place] = rng.randrange(256)
        elif kind < 0.75:  # a number of 4 bytes: sizes that lie
            changed[place : place + 4] = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 10**6, 65535)).to_bytes(
                4, rng.choice(("little", "big"))
            )
        elif kind < 0.85:
            del changed[place : place + rng.randrange(1, 64)]
        else:
            changed[place:place] = changed[place : place + rng.randrange(1, 64)]
        if not changed:
            break
    return bytes(changed)


def fuzz_one_kind(folder: Path, name: str, count: int) -> Row:
    """Reads mutated files of a kind in this process, whose memory is limited: only FileNotFoundError and ValueError."""
    content, reader = seeds_of_fuzz(folder)[name]
    rng, path, survived, refused, note = random.Random(name), folder / f"mutated_{name}", 0, 0, ""
    torch.set_num_threads(1)
    path.write_bytes(content)
    reader(path)  # whatever is imported or cached by then is there
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
    for _ in range(count):
        path.write_bytes(mutate(content, rng))
        try:
            reader(path)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            if "\n" in str(error).strip() or str(path) not in str(error):
                note = f"an unclear line: {str(error)[:200]!r}"
                continue
        except BaseException as error:
            note = f"{type(error).__name__}: {str(error)[:200]}"
            shutil.copy(path, folder / f"crash_{name}")
            continue
        survived += 1
    return Row(f"mutated {name[1:].lstrip('_')} files", count, survived, note or f"{refused} refused, the others read")


def fuzz(base: Path, count: int) -> Iterator[Row]:
    """Mutated files of every kind, each kind in a process of its own: a crash would end only that."""
    for name in seeds_of_fuzz(base / "fuzz"):
        line = [sys.executable, __file__, "--fuzz", str(base / "fuzz"), name, str(count)]
        ended = subprocess.run(line, capture_output=True, text=True)
        printed = ended.stdout.strip().splitlines()
        try:
            yield Row(*json.loads(printed[-1]))
        except (IndexError, ValueError):
            yield Row(f"mutated {name}", count, 0, f"exit {ended.returncode}: {ended.stderr[-300:]}")


class _Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def hostile_pickle(base: Path) -> Row:
    """A checkpoint that would run code is refused by every command that reads one, and runs nothing."""
    base.mkdir(parents=True, exist_ok=True)
    evil, trace = base / "evil.pt", base / "was_here"
    torch.save({"model": {}, "config": {}, "step": _Evil(trace)}, evil)
    lines = [
        ["train.py", "pocket", "--resume", evil, "--output-dir", base / "a"],
        ["train.py", "pocket", "--init", evil, "--output-dir", base / "b"],
        ["evaluate.py", "flow", "--model", evil, "--output-dir", base / "c"],
        ["evaluate.py", "segmentation", "--model", evil, "--output-dir", base / "d"],
    ]
    survived = 0
    for script, *arguments in lines:
        code, output = finish(launch(*arguments, script=script))
        clear = code == 1 and "not a checkpoint" in output and "Traceback" not in output
        survived += clear and not trace.exists()
    return Row("pickle that would run code", len(lines), survived)


# --------------------------------------------------------------------------------------------------------- the same run


def same_run(base: Path) -> Row:
    """0, 1 and 3 workers, and a run begun from nothing but the first one's config.json: the same weights."""
    first = undisturbed(base / "same_0", [*TINY, "--epochs", 2])
    others = [undisturbed(base / f"same_{workers}", [*TINY, "--epochs", 2, "--workers", workers]) for workers in (1, 3)]
    alone = base / "alone.json"
    shutil.copy(first / "config.json", alone)
    others.append(undisturbed(base / "same_again", [alone]))
    return Row("same seed: 1 and 3 workers, config.json alone", 3, sum(same_weights(first, other) for other in others))


# -------------------------------------------------------------------------------------------------------------- command


def faults(base: Path) -> Iterator[tuple[str, Callable[[], Row | Iterator[Row]]]]:
    """All of them, by name."""
    yield "kill_1", lambda: kills(base / "kill", 20, 1)
    yield "kill_2", lambda: kills(base / "kill", 20, 2)
    yield "signals", lambda: signals(base / "signals")
    yield "signal_to_all", lambda: signal_to_all(base / "signals")
    yield "broken", lambda: broken_checkpoint(base / "broken")
    yield "restart", lambda: restart(base / "many")
    yield "one_fails", lambda: one_fails(base / "many")
    yield "machines", lambda: two_machines(base / "many")
    yield "machines_restart", lambda: restart_of_machines(base / "many")
    yield "fewer", lambda: fewer_processes(base / "many")
    yield "files", lambda: bad_files(base / "files")
    yield "numbers", lambda: bad_numbers(base / "numbers")
    if os.getuid() == 0:
        yield "disk", lambda: disk(base / "disk")
    yield "fuzz", lambda: fuzz(base, 2000)
    yield "pickle", lambda: hostile_pickle(base / "pickle")
    yield "same", lambda: same_run(base / "same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="names, or what names begin with")
    parser.add_argument("--output", type=Path, help="a JSON file for the table")
    parser.add_argument("--fuzz", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fuzz:
        folder, name, count = arguments.fuzz
        print(json.dumps(fuzz_one_kind(Path(folder), name, int(count))))
        return
    rows = []
    print(f"{'fault':50}{'tried':>7}{'survived':>10}{'lost':>6}  ")
    with tempfile.TemporaryDirectory() as base:
        for name, try_it in faults(Path(base)):
            if name.startswith(tuple(arguments.only)):
                result = try_it()
                for row in [result] if isinstance(result, Row) else result:
                    rows.append(row)
                    note = re.sub(r"\s+", " ", row.note)
                    print(
                        f"{row.fault:50}{row.tried:7}{row.survived:10}{row.tried - row.survived:6}  {note}", flush=True
                    )
    tried, survived = sum(row.tried for row in rows), sum(row.survived for row in rows)
    print(f"{'all':50}{tried:7}{survived:10}{tried - survived:6}")
    if arguments.output:
        arguments.output.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    sys.exit(int(survived < tried))


if __name__ == "__main__":
    main()
