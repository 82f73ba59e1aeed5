"""The record of a run: metrics.jsonl, TensorBoard, pictures, the progress bar, and the environment."""

import json
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from jaxtyping import UInt8
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from engine.checkpoint import cannot_write, replacing
from engine.processes import world_size


def versions() -> dict[str, str]:
    """The versions of the packages that numbers may depend on."""
    packages = {package.__name__: package.__version__ for package in (torch, torchvision, np, cv2)}
    return {"python": platform.python_version()} | packages


def environment(device: torch.device) -> dict:
    """What the numbers of a run may depend on besides its configuration."""
    describe, git = ["git", "describe", "--always", "--dirty"], ""
    with suppress(OSError):  # a machine without git
        git = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git or None,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "packages": {package.name: package.version for package in reversed([*distributions()])},  # the first one counts
    } | versions()


def write_picture(path: Path, image: UInt8[Tensor, "3 h w"]) -> None:
    """Writes a picture, whole or not at all."""
    with replacing(path) as temporary:
        to_pil_image(image).save(temporary)


class Log:
    """Writes what a run of `total` steps reports, in its `main` process. Lines after step `start` are removed."""

    def __init__(self, folder: Path, start: int, total: int, main: bool = True) -> None:
        self.folder, self.main, self.metrics = folder, main, folder / "metrics.jsonl"
        if not main:
            return
        self.events = folder / "tensorboard" / f"events.out.tfevents.{time.time():.6f}"
        self.events.parent.mkdir(parents=True, exist_ok=True)
        if self.metrics.exists():
            lines = self.metrics.read_text().splitlines(keepends=True)
            try:  # a line without an end was cut off when its process was killed
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.metrics}: a line is damaged; repair or remove it") from error
            with replacing(self.metrics) as temporary:
                temporary.write_text("".join(kept))
        # Not torch's SummaryWriter: it refuses a folder whose name is not UTF-8, and writes in a thread of its own.
        self.tensorboard = RecordWriter(open(self.events, "wb"))  # noqa: SIM115 (`close` closes it)
        again = SessionLog(status=SessionLog.START)  # lets TensorBoard forget what an earlier file has after `start`
        self._to_tensorboard(Event(file_version="brain.Event:2"), Event(step=start + 1, session_log=again))
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def event(self, step: int, content: dict) -> None:
        """Adds a line to metrics.jsonl."""
        if self.main:
            try:
                with open(self.metrics, "a") as file:
                    file.write(json.dumps({"step": step} | content) + "\n")
            except OSError as error:
                raise cannot_write(self.metrics, error.strerror) from error

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Adds a line to metrics.jsonl, and its numbers to TensorBoard."""
        if self.main:
            self.event(step, numbers)
            self._to_tensorboard(*(Event(step=step, summary=summary.scalar(*number)) for number in numbers.items()))

    def picture(self, name: str, step: int, image: UInt8[Tensor, "3 h w"]) -> None:
        """Writes pictures/NAME.png, and the same to TensorBoard; for the main process alone."""
        write_picture(self.folder / "pictures" / f"{name}.png", image)
        self._to_tensorboard(Event(step=step, summary=summary.image("pictures", image, dataformats="CHW")))

    def _to_tensorboard(self, *events: Event) -> None:
        try:
            for event in events:
                event.wall_time = time.time()
                self.tensorboard.write(event.SerializeToString())
            self.tensorboard.flush()
        except OSError as error:
            raise cannot_write(self.events, error.strerror) from error

    def advance(self, steps: int = 1, text: str | None = None) -> None:
        """Moves the progress bar, and sets the text behind it."""
        if self.main:
            self.bar.update(steps)
            if text:
                self.bar.set_postfix_str(text)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self.main:
            self.bar.write(line)

    def close(self) -> None:
        """Ends the progress bar and TensorBoard's file."""
        if self.main:
            self.bar.close()
            with suppress(OSError):  # a full disk: reported already, and metrics.jsonl has the same numbers
                self.tensorboard.close()
