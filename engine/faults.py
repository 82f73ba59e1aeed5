"""What goes wrong in a run. What it survives is counted and reported once; what ends it is one line with the remedy."""

import os
import re
import sys
import time
from collections.abc import Callable, Collection

from engine.checkpoint import as_json, flatten
from engine.log import Log

BAD_STEPS_IN_A_ROW = 10  # this many steps in a row with a loss or a gradient that is not finite end a run
MACHINE_FAULTS = {
    "shared memory": "/dev/shm is full: use --workers 0, or give the container more (docker run --shm-size 8g)",
    "(?i)out of memory|MemoryError|insufficient memory|allocate memory|ALLOC_FAILED": "out of memory: make the batches "
    "smaller (--image-batch, --video-batch), or the images",
    "No space left": "a disk or /dev/shm is full: make room",
    "Too many open files|ancdata|new thread": "too many open files or threads: use fewer --workers, or ulimit -n 4096",
    r"working (C\+\+ compiler|triton)|Failed to find C compiler": "--compile finds no compiler: install g++ (on a GPU "
    "triton too), or leave it out",
    r"DataLoader worker \(pid": "a loader process was killed, perhaps for lack of memory: use fewer --workers",
    "(?i)gloo|nccl|connection (closed|reset)": "another process of the run has ended (its error stands above, or on "
    "another machine), or the machines do not find one another: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
    r"OpenCV\(": "OpenCV cannot work on these images: use others, or another size",
}
"""What an error says if the machine, or a library below, is to blame, and the remedy; the first that fits counts."""
Report = tuple[str, str]  # to all processes: ("frames" or "images", a bad file), ("signal", name), ("not finite", term)


class Faults:
    """Counts faults, the same in every process; the first process reports each one once.

    `allowed` says how many bad files each kind of data may have: {"frames": 10}. `state` comes from the checkpoint.
    """

    def __init__(self, log: Log, allowed: dict[str, int], state: dict) -> None:
        self.log, self.allowed = log, allowed
        self.bad_files: dict[str, list[str]] = state.get("bad_files", {})
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)

    def state(self) -> dict:
        """For the checkpoint, so that a run that continues reports nothing twice."""
        return {name: getattr(self, name) for name in ("bad_files", "skipped", "in_a_row")}

    def step(self, done: int, reports: list[Report]) -> None:
        """Takes the reports of all processes in a step; ValueError if bad files or bad steps become too many."""
        for kind, allowed in self.allowed.items():
            known = self.bad_files.setdefault(kind, [])
            for fault in (text for what, text in reports if what == kind and text not in known):
                known.append(fault)
                self.log.event(done, {"bad_file": fault})
                self.log.say(f"bad file {len(known)} of at most {allowed} {kind}, the next takes its place: {fault}")
            if len(known) > allowed:
                counts = f"{len(known)} {kind} cannot be used, and --bad-files allows {allowed}"
                raise ValueError(f"{counts}; repair or remove them, or allow more. The first: {known[0]}")
        terms = [text for what, text in reports if what == "not finite"]
        self.in_a_row = self.in_a_row + 1 if terms else 0
        if terms:
            self.skipped += 1
            self.log.event(done, {"skipped": terms})
            self.log.say(f"step {done} is skipped, not finite: {', '.join(terms)}")
        if self.in_a_row >= BAD_STEPS_IN_A_ROW:
            bad = f"{self.in_a_row} steps in a row were not finite ({', '.join(terms)})"
            raise ValueError(f"{bad}: lower the learning rates. The last checkpoint is good")


def check_numbers(config: object, at_least_1: Collection[str]) -> None:
    """ValueError, with the flag, for a number of a configuration that is negative, NaN, or in these fields 0."""
    for name, value in flatten(as_json(config)).items():
        least, numbers = int(name in at_least_1), value if isinstance(value, list) else [value]
        if any(isinstance(x, int | float) and not x >= least for x in numbers or [0]):
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def one_line(error: BaseException) -> str:
    """The message of an error in one line; that of a loader's process without its traceback."""
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    return " ".join(text.split())


def run_command(command: Callable[[], object]) -> None:
    """Runs a command line. A user's mistake or a fault of the machine ends it in one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the run
        stream.reconfigure(errors="backslashreplace")
    try:
        command()
    except KeyboardInterrupt:
        sys.exit("stopped; every file that was written is whole")
    except Exception as error:
        line, reason, foreseen = one_line(error), f"{type(error).__name__}: {error}", (ValueError, OSError, ImportError)
        if isinstance(error, foreseen):  # look at what the system says: the name of a file may hold any word
            reason = getattr(error, "strerror", None) or ""
        remedy = next((remedy for sign, remedy in MACHINE_FAULTS.items() if re.search(sign, reason)), None)
        if remedy:
            line = f"{remedy} ({line[:500]})"
        elif not isinstance(error, foreseen):
            raise
        elif int(os.environ.get("LOCAL_RANK", 0)) > 0:
            # Most likely all processes fail alike: the first reports it, and torchrun ends the others meanwhile.
            time.sleep(5)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
