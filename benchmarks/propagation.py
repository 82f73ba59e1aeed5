"""Label propagation in tiles beside the plain formulation: all pairs of pixels, then those too far apart struck out.

    python benchmarks/propagation.py [--height 480 --width 854 --stride 8 --channels 384 --context 8] [--output OUT]

Each formulation runs in a process of its own, that its peak of memory can be told; the two take turns. The labels
that they give are compared. Default: 480p at stride 8 (60 x 107 cells), 8 context frames, 2 objects and background.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import propagate_labels  # noqa: E402

RADIUS, TOPK, TEMPERATURE = 12, 5, 0.1


def dense(target: torch.Tensor, context: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As it is usually written (DINO): an affinity of all cells with all cells of all frames, masked."""
    h, w = target.shape[1:]
    target, context = F.normalize(target, dim=0), F.normalize(context, dim=1)
    affinity = torch.exp(torch.einsum("dp,ndq->nqp", target.flatten(1), context.flatten(2)) / TEMPERATURE)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    near = [(v.flatten()[:, None] - v.flatten()[None]).abs() <= RADIUS for v in (y, x)]
    affinity = (affinity * (near[0] & near[1])).flatten(0, 1)
    least = affinity.topk(TOPK, dim=0).values[-1]
    affinity[affinity < least] = 0
    affinity = affinity / affinity.sum(dim=0)
    return (labels.transpose(0, 1).flatten(1) @ affinity).view(-1, h, w)


METHODS = {
    "tiles": lambda *inputs: propagate_labels(*inputs, RADIUS, TOPK, TEMPERATURE),
    "dense": dense,
}


def inputs(h: int, w: int, channels: int, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target, frames = (torch.randn(*s, generator=generator) for s in ((channels, h, w), (context, channels, h, w)))
    classes = torch.randint(0, 3, (context, h, w), generator=generator)
    return target, frames, F.one_hot(classes, 3).movedim(-1, 1).float()


def memory() -> float:
    """The peak of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run_once(method: str, sizes: list[int], path: str) -> None:
    """In a process of its own: seconds (after one run to warm up), memory beyond the inputs, and the labels."""
    given = inputs(*sizes)
    before = memory()
    METHODS[method](*given)
    start = time.perf_counter()
    result = METHODS[method](*given)
    seconds = time.perf_counter() - start
    np.save(path, result.numpy())
    print(json.dumps({"seconds": seconds, "gigabytes": memory() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (
        ("height", 480),
        ("width", 854),
        ("stride", 8),
        ("channels", 384),
        ("context", 8),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if min(a.height, a.width, a.stride, a.channels, a.context, a.repeats) < 1:
        parser.error("sizes and repeats must be at least 1")
    sizes = [-(-a.height // a.stride), -(-a.width // a.stride), a.channels, a.context]
    if a.method:
        return run_once(a.method, sizes, a.save)
    results = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(a.repeats):
            for name in METHODS:
                command = [sys.executable, *sys.argv, "--method", name, "--save", f"{folder}/{name}.npy"]
                results[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        ours, plain = (np.load(f"{folder}/{name}.npy") for name in METHODS)
    print(
        f"{a.height} x {a.width} at stride {a.stride}, {a.channels} channels, {a.context} context frames, "
        f"{torch.get_num_threads()} threads, {a.repeats} repeats"
    )
    print(f"{'':8}{'s a frame':>12}{'least':>8}{'most':>8}{'GB':>8}")
    for name, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        gigabytes = max(run["gigabytes"] for run in runs)
        print(f"{name:8}{statistics.median(seconds):12.3f}{min(seconds):8.3f}{max(seconds):8.3f}{gigabytes:8.2f}")
    ratio = {
        key: statistics.median(r[key] for r in results["dense"]) / statistics.median(r[key] for r in results["tiles"])
        for key in ("seconds", "gigabytes")
    }
    difference = float(np.abs(ours - plain).max())
    print(
        f"dense / tiles: {ratio['seconds']:.1f} times the time, {ratio['gigabytes']:.1f} times the memory; "
        f"largest difference of a label {difference:.1e}"
    )
    if a.output:
        a.output.write_text(json.dumps({"runs": results, "ratio": ratio, "difference": difference}, indent=2) + "\n")


if __name__ == "__main__":
    main()
