"""What several processes send each other in a training step, what it costs on two, and what to expect of many GPUs."""

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contests import one_step, paper_batch
from timing import in_turns, spread, work
from torch import Tensor

from train import IMAGENET_SIZE, PRESETS, build, over_processes

WORLD = 2
FEWER = 2
"""So many times fewer images than in the recipe: two processes must fit into 24 GB."""
REPEATS = 3
"""At most; more would take long and say little."""


def local_reduce(x: Tensor, *_, **__) -> None:
    """In place of dist.all_reduce: as if the others had sent zeros, at once."""


def local_gather(parts: list[Tensor], x: Tensor, *_, **__) -> None:
    """In place of dist.all_gather: as if the others had sent the same, at once."""
    for part in parts:
        part.copy_(x)


def counting(sent: Counter, name: str, function: Callable, of: int) -> Callable:
    """A collective that counts the bytes that a process gives to it, in its argument number `of`."""

    def call(*arguments, **keywords):
        x = arguments[of]
        sent[name] += x.numel() * x.element_size()
        sent[f"calls of {name}"] += 1
        return function(*arguments, **keywords)

    return call


def process(rank: int, folder: str, repeats: int, threads: int) -> None:
    """One of two: counts what a step sends, and times steps with and without the sending."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    device = torch.device("cpu")
    model, optimizer = build(PRESETS["paper"], device)
    parallel = over_processes(PRESETS["paper"], model, device)
    batch = paper_batch(device)
    batch["views"] = tuple(view[: len(view) // FEWER] for view in batch["views"])
    sent: Counter = Counter()
    with (
        patch("torch.distributed.all_reduce", counting(sent, "all_reduce", dist.all_reduce, 0)),
        patch("torch.distributed.all_gather", counting(sent, "all_gather", dist.all_gather, 1)),
    ):
        one_step(parallel, optimizer, batch, False)

    def without() -> None:
        with ExitStack() as stack:
            stack.enter_context(patch("torch.distributed.all_reduce", local_reduce))
            stack.enter_context(patch("torch.distributed.all_gather", local_gather))
            one_step(model, optimizer, batch, False)

    ways = {"with": lambda: one_step(parallel, optimizer, batch, False), "without": without}
    seconds = in_turns(ways, min(repeats, REPEATS), device, warmup=1, before=dist.barrier)
    if rank == 0:
        sent["gradients"] = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        torch.save({"sent": dict(sent), "seconds": seconds}, f"{folder}/result.pt")
    dist.destroy_process_group()


def measure(device: torch.device, repeats: int, limits: dict[str, float]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (folder, repeats, max(1, torch.get_num_threads() // WORLD)), nprocs=WORLD)
        measured = torch.load(Path(folder) / "result.pt", weights_only=True)
    model, optimizer = build(PRESETS["paper"], torch.device("cpu"))
    flops, traffic = work(lambda: one_step(model, optimizer, paper_batch(torch.device("cpu")), False))
    times = {name: spread(values) for name, values in measured["seconds"].items()}
    shares = [1 - b / a for a, b in zip(*(measured["seconds"][name] for name in ("with", "without")), strict=True)]
    sent = measured["sent"]
    return {"sent": sent, "seconds": times, "share": spread(shares), "expected": expect(flops, traffic, sent)}


GPU_FLOPS, GPU_BYTES = 790e12, 3.0e12
"""What an H100 reaches in a large bf16 product and in a large copy."""
OF_THE_CEILING = 0.35
"""Which share of them a step reaches: assumed."""
NVLINK, NETWORK = 300e9, 40e9
"""Bytes per second and GPU within a node, and between nodes (400 Gbit/s for each GPU): assumed."""
GPUS = 8
"""In a node. As many rings go around all nodes, each with an eighth of the bytes, and leave a node at another GPU."""


def expect(flops: float, traffic: float, sent: dict) -> dict:
    """On paper: the seconds of a step and the hours of 100 epochs of the paper, on 8 GPUs and on 8 nodes of 8.

    The batch of each process stays that of the paper's 8, so that 8 nodes make an eighth of the steps; all epochs cost
    what those with flow do. bf16 halves the bytes (taken for all of them). In a ring each process sends (n - 1) / n of
    a tensor, twice for a sum; nothing of it is hidden behind the computation, and no message waits.
    """
    computing = max(flops / GPU_FLOPS, traffic / 2 / GPU_BYTES) / OF_THE_CEILING
    result = {}
    for name, world, speed in (("8 GPUs", GPUS, NVLINK), ("8 nodes of 8 GPUs", 8 * GPUS, min(NVLINK, GPUS * NETWORK))):
        # Embeddings are gathered, of all images. The backward of a gather is a sum of what all have gathered.
        gathered = FEWER * sent["all_gather"]
        moments = sent["all_reduce"] - WORLD * sent["all_gather"]
        summed = sent["gradients"] + moments + world * gathered
        sending = (2 * (world - 1) / world * summed + (world - 1) * gathered) / speed
        steps = 100 * IMAGENET_SIZE / (PRESETS["paper"].image_batch * world / 8)
        result[name] = {
            "computing": computing,
            "sending": sending,
            "hours": steps * (computing + sending) / 3600,
        }
    return result


def show(result: dict) -> str:
    sent = result["sent"]
    both, alone, share = result["seconds"]["with"], result["seconds"]["without"], result["share"]
    lines = [
        f"Two processes on the CPU (gloo), half of the paper's images and a pair in each: {both[0]:.2f} s, without "
        f"sending {alone[0]:.2f} s: {share[0]:.1%} of the time ({share[1]:.1%} to {share[2]:.1%}).",
        f"Each gives {sent['gradients'] / 1e6:,.0f} MB of gradients, {sent['all_gather'] / 1e6:,.1f} MB to "
        f"{sent['calls of all_gather']} gathers, {sent['all_reduce'] / 1e6:,.1f} MB to "
        f"{sent['calls of all_reduce']} sums.",
        "",
        "| expected | computing, ms | sending, ms | hours for 100 epochs |",
        "|---|---|---|---|",
    ]
    for name, row in result["expected"].items():
        lines.append(f"| {name} | {1e3 * row['computing']:.0f} | {1e3 * row['sending']:.0f} | {row['hours']:.1f} |")
    return "\n".join(lines)
