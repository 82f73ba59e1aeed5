"""What several processes send each other in a training step, its cost for two, and an estimate for many GPUs."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from comparisons import one_step, paper_batch
from timing import count_work, quartiles, take_turns
from torch import Tensor

from train import IMAGENET_SIZE, PRESETS, build, over_processes

WORLD_SIZE = 2
FEWER_IMAGES = 2
"""How many times fewer images than in the recipe: two processes must fit into 24 GB."""
MOST_REPEATS = 3

GPU_FLOPS, GPU_BYTES = 790e12, 3.0e12
"""Per second: an H100 in a large bf16 product and in a large copy."""
SHARE_OF_CEILING = 0.35
"""The share of these that a step reaches: assumed."""
NVLINK, NETWORK = 300e9, 40e9
"""Bytes per second and GPU within a node, and between nodes (400 Gbit/s for each GPU): assumed."""
GPUS_PER_NODE = 8
"""As many rings go around all nodes, each with an eighth of the bytes, and leave a node at different GPUs."""


def all_reduce_alone(x: Tensor, *_, **__) -> None:
    """In place of dist.all_reduce: as if the others had sent zeros, at once."""


def all_gather_alone(parts: list[Tensor], x: Tensor, *_, **__) -> None:
    """In place of dist.all_gather: as if the others had sent the same, at once."""
    for part in parts:
        part.copy_(x)


def collectives(all_reduce: Callable, all_gather: Callable):
    """Replaces the two collectives that our code calls. (DDP calls its own.)"""
    return patch.multiple("torch.distributed", all_reduce=all_reduce, all_gather=all_gather)


def counting(sent: Counter, name: str, position: int) -> Callable:
    """A collective that counts the bytes of what a process gives to it, its argument number `position`."""
    function = getattr(dist, name)

    def call(*arguments, **keywords):
        sent[name] += arguments[position].numel() * arguments[position].element_size()
        sent[f"calls of {name}"] += 1
        return function(*arguments, **keywords)

    return call


def run_process(rank: int, folder: str, repeats: int, threads: int) -> None:
    """One of two: counts what a step sends, and measures steps with and without sending."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD_SIZE)
    device, sent = torch.device("cpu"), Counter()
    model, optimizer = build(PRESETS["paper"], device)
    parallel = over_processes(PRESETS["paper"], model, device)
    batch = paper_batch(device)
    batch["views"] = tuple(view[: len(view) // FEWER_IMAGES] for view in batch["views"])
    with collectives(counting(sent, "all_reduce", 0), counting(sent, "all_gather", 1)):
        one_step(parallel, optimizer, batch, False)

    def without_sending() -> None:
        with collectives(all_reduce_alone, all_gather_alone):
            one_step(model, optimizer, batch, False)

    ways = {"with": lambda: one_step(parallel, optimizer, batch, False), "without": without_sending}
    seconds = take_turns(ways, min(repeats, MOST_REPEATS), device, warmup=1, before=dist.barrier)
    if rank == 0:
        sent["gradients"] = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        torch.save({"sent": dict(sent), "seconds": seconds}, f"{folder}/result.pt")
    dist.destroy_process_group()


def measure(device: torch.device, repeats: int, ceilings: dict[str, float]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        threads = max(1, torch.get_num_threads() // WORLD_SIZE)
        mp.spawn(run_process, (folder, repeats, threads), nprocs=WORLD_SIZE)
        measured = torch.load(Path(folder) / "result.pt", weights_only=True)
    cpu = torch.device("cpu")
    model, optimizer = build(PRESETS["paper"], cpu)
    flops, traffic = count_work(lambda: one_step(model, optimizer, paper_batch(cpu), False))
    sent, seconds = measured["sent"], measured["seconds"]
    return {
        "sent": sent,
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "share": quartiles([1 - b / a for a, b in zip(seconds["with"], seconds["without"], strict=True)]),
        "expected": expect(flops, traffic, sent),
    }


def expect(flops: float, traffic: float, sent: dict) -> dict:
    """An estimate of the seconds of a step and the hours of the paper's 100 epochs, on 8 GPUs and on 8 nodes of 8.

    Each process keeps the batch that it has in the paper's recipe for 8, so 8 nodes take an eighth of the steps. All
    epochs cost as much as those with flow. bf16 halves all bytes. In a ring each process sends (n - 1) / n of a tensor,
    twice for a sum. No sending is hidden behind the computation, and no message waits.
    """
    computing = max(flops / GPU_FLOPS, traffic / 2 / GPU_BYTES) / SHARE_OF_CEILING
    # Embeddings of all images are gathered. The backward pass of a gather is a sum of all that was gathered.
    gathered = FEWER_IMAGES * sent["all_gather"]
    moments = sent["all_reduce"] - WORLD_SIZE * sent["all_gather"]
    result = {}
    for name, world, speed in (
        ("8 GPUs", GPUS_PER_NODE, NVLINK),
        ("8 nodes of 8 GPUs", 8 * GPUS_PER_NODE, min(NVLINK, GPUS_PER_NODE * NETWORK)),
    ):
        summed = sent["gradients"] + moments + world * gathered
        sending = (2 * (world - 1) / world * summed + (world - 1) * gathered) / speed
        steps = 100 * IMAGENET_SIZE / (PRESETS["paper"].image_batch * world / 8)
        hours = steps * (computing + sending) / 3600
        result[name] = {"computing": computing, "sending": sending, "hours": hours}
    return result


def table(result: dict) -> str:
    sent, seconds, share = result["sent"], result["seconds"], result["share"]
    lines = [
        f"Two processes on the CPU (gloo), half of the paper's images and a pair in each: {seconds['with'][0]:.2f} s, "
        f"without sending {seconds['without'][0]:.2f} s: {share[0]:.1%} of the time "
        f"({share[1]:.1%} to {share[2]:.1%}).",
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
