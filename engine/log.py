"""The record of a run: metrics, pictures, TensorBoard, progress bar, environment."""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine.checkpoint import cannot_write, replacing, write_report


def _to_numpy(image: UInt8[Tensor, "3 h w"]) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def write_picture(path: Path, image: UInt8[Tensor, "3 h w"]) -> None:
    """Writes a picture whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(_to_numpy(image)).save(temporary)


def environment(device: torch.device, world: int = 1) -> dict:
    """What the numbers of a run may depend on besides its configuration."""
    commit = None
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": commit or None,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": world,
        "job": torchrun_job(),
    } | versions()


def torchrun_job() -> str | None:
    """What all starts of one job by torchrun have in common, those after a failure too; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{platform.node()} {os.getppid()}" if name == "none" else name  # "none": one machine, no name was given


def versions() -> dict[str, str]:
    """Of what the numbers may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


class Log:
    """Where the numbers and pictures of a run go; silent on every process but the first."""

    def __init__(self, folder: Path, start: int, total: int, main: bool = True) -> None:
        self.main, self.folder = main, folder
        if not main:
            return
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        self.metrics = self.folder / "metrics.jsonl"
        if self.metrics.exists():  # steps that were taken after the checkpoint are taken again
            lines = self.metrics.read_text().splitlines(True)
            if lines and not lines[-1].endswith("\n"):  # the machine stopped while it was written
                lines.pop()
            try:
                kept = [line for line in lines if json.loads(line)["step"] <= start]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.metrics}: a line of it is damaged; mend or remove it") from error
            with replacing(self.metrics) as temporary:
                temporary.write_text("".join(kept))
        # TensorBoard's own thread keeps an error and raises it in ours, with the next number; it need not print it too.
        self.told, threading.excepthook = threading.excepthook, self._tell
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def record(self, name: str, content: dict) -> None:
        """A JSON file of the run's folder."""
        if self.main:
            write_report(self.folder / f"{name}.json", content)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard."""
        if self.main:
            self.event(step, numbers)
            for name, value in numbers.items():
                self._show(self.writer.add_scalar, name, value, step)

    def _show(self, add: Callable, *what: object) -> None:
        try:
            add(*what)
        except OSError as error:
            raise cannot_write(self.folder / "tensorboard" / "events", error.strerror) from error

    def _tell(self, failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard"):
            self.told(failure)

    def event(self, step: int, content: dict) -> None:
        """One line of metrics.jsonl."""
        if self.main:
            try:
                with open(self.metrics, "a") as file:
                    file.write(json.dumps({"step": step} | content) + "\n")
            except OSError as error:
                raise cannot_write(self.metrics, error.strerror) from error

    def values(self, name: str) -> dict[int, float]:
        """What metrics.jsonl has by that name, by step."""
        lines = map(json.loads, self.metrics.read_text().splitlines()) if self.metrics.exists() else ()
        return {line["step"]: line[name] for line in lines if name in line}

    def picture_path(self, epoch: int) -> Path:
        """Where the picture of an epoch lies, the last thing that the epoch leaves."""
        return self.folder / "pictures" / f"epoch_{epoch:03d}.png"

    def picture(self, epoch: int, step: int, image: UInt8[Tensor, "3 h w"]) -> None:
        """A PNG in pictures/, and the same to TensorBoard."""
        if self.main:
            write_picture(self.picture_path(epoch), image)
            self._show(self.writer.add_image, "flow", image, step)

    def advance(self, steps: int = 1, text: str | None = None) -> None:
        """Moves the progress bar, and sets what stands behind it."""
        if self.main:
            self.bar.update(steps)
            if text:
                self.bar.set_postfix_str(text)

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if self.main:
            self.bar.write(line)

    def close(self) -> None:
        if self.main:
            self.bar.close()
            with suppress(OSError):  # of a disk that is full: told already, and metrics.jsonl has the same numbers
                self.writer.close()
            threading.excepthook = self.told
