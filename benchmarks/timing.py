"""How the benchmarks measure: ways that take turns, peaks of memory, counts of work, and the limits of the machine."""

import ctypes
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Way = Callable[[], Sequence[Tensor] | None]
"""One way to compute something; returns the results, gradients included."""


def synchronise(device: torch.device) -> None:
    """Waits until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    ways: dict[str, Way],
    repeats: int,
    device: torch.device,
    warmup: int = 2,
    before: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` times. The ways take turns, so that a disturbance of the machine hits them alike.

    `before` is called before each, and is not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-warmup, repeats):
        for name, way in ways.items():
            before()
            synchronise(device)
            start = time.perf_counter()
            way()
            synchronise(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(way: Way, device: torch.device) -> float:
    """The peak of memory of a way beyond what is held before it, in GB. On a CPU call it in a new process."""
    way()  # allocates workspaces of libraries, and the optimizer's state
    if device.type == "cuda":
        synchronise(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        way()
        synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 1e9
    with suppress(AttributeError):  # with glibc, free memory goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return math.nan  # not Linux: the peak of the first call would hide that of the second
    held = peak_of_process()
    way()
    return max(peak_of_process() - held, 0.0)


def peak_of_process() -> float:
    """The most memory that this process has held, in GB (Linux only)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative difference between the results of two ways, each by its norm."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack([(a - b).norm() / b.norm().clamp(min=1e-12) for a, b in pairs]).max().item()  # NaN stays NaN


class Quartiles(NamedTuple):
    median: float
    low: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """The median of several measurements, and their quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [*values]
    return Quartiles(median, low, high)


class CountBytes(TorchDispatchMode):
    """Counts the bytes that all operations read and write, as if nothing stayed in a cache. Views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        schema = function._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        name = schema.name.removeprefix("aten::")
        if is_view or name == "_unsafe_view" or name.startswith(("empty", "new_empty")):
            return result
        read, written = tensors_in((arguments, keywords)), tensors_in(result)
        if name in ("copy_", "fill_", "zero_") or name.endswith("_like") or name.startswith("new_"):
            read = read[1:]  # the first argument is overwritten, or only its shape counts
        if not schema.returns:  # such as the fused AdamW, which writes into its arguments
            changed = [(a, x) for a, x in zip(schema.arguments, arguments, strict=False) if a.alias_info is not None]
            # It writes gradients only to scale them.
            written = tensors_in([x for a, x in changed if a.alias_info.is_write and a.name != "grads"])
        self.total += sum(bytes_of(x) for x in read + written)
        return result


def bytes_of(x: Tensor) -> int:
    """The bytes of a tensor, without the repeats along an expanded axis."""
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


def tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def convolution_backward(gradient_shape, x_shape, w_shape, *arguments, out_shape=None, **_) -> int:
    """FLOPs. torch's own count takes the weight gradient of a depthwise convolution for that of a dense one."""
    forward = 2 * math.prod(gradient_shape) * math.prod(w_shape[1:])
    return forward * sum(arguments[-1][:2])  # which gradients are wanted: of the input, of the weight


def count_work(way: Way) -> tuple[float, float]:
    """FLOPs (of matrix products and convolutions; a multiplication and an addition are two) and bytes of a way."""
    corrected = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=corrected) as flops:
        way()
    with CountBytes() as traffic:
        way()
    return float(flops.get_total_flops()), float(traffic.total)


def measure_ceilings(device: torch.device, repeats: int = 10) -> dict[str, float]:
    """The most that the machine does: FLOP/s of a large matrix product and of a large convolution, which come from
    different libraries, and bytes/s (read and written) of a large copy or sum."""
    gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if gpu else (3072, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    image = torch.randn(128 if gpu else 8, 256, 64, 64, device=device, dtype=dtype)
    image = image.to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    source = torch.randn(2**28 if gpu else 2**26, device=device)
    target = torch.empty_like(source)
    ways = {
        "matrices": lambda: a @ b,
        "convolution": lambda: F.conv2d(image, weight, padding=1),
        "copy": lambda: target.copy_(source),
        "sum": lambda: target.add_(source),  # faster per byte than a copy, which on a CPU reads what it overwrites
    }
    best = {name: min(seconds) for name, seconds in take_turns(ways, repeats, device).items()}
    return {
        "matrices": 2 * n**3 / best["matrices"],
        "convolution": 2 * image.numel() * weight[0].numel() / best["convolution"],
        "bytes": source.numel() * source.element_size() * max(2 / best["copy"], 3 / best["sum"]),
    }


def run_python(command: list[str]) -> Any:
    """Runs a script of ours; returns its last line, read as JSON. A ValueError has the last line of a script that
    failed."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}; was there enough memory?"]
        raise ValueError(f"{' '.join(command)}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The power by which costs grow with size: the slope of a straight line through their logarithms."""
    x, y = [math.log(v) for v in sizes], [math.log(max(v, 1e-12)) for v in costs]
    return statistics.linear_regression(x, y).slope
