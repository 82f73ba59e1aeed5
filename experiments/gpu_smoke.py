"""A smoke run on one GPU, in minutes: does the paper's recipe run there, how fast, and is it the same as on a CPU?

    python experiments/gpu_smoke.py OUT                        # every part
    python experiments/gpu_smoke.py OUT --only recipe compile --device cpu

Each part prints a line of JSON when it is done and adds it to OUT/smoke.jsonl, so that nothing is lost if a later one
fails. On a CPU the model is small: there the run only shows that the script itself works.
"""

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import encoder as encoder_module  # noqa: E402
from engine.faults import one_line  # noqa: E402
from engine.log import environment  # noqa: E402
from engine.processes import own_device  # noqa: E402
from mcjepa import ModelConfig  # noqa: E402
from train import (  # noqa: E402
    PRESETS,
    Config,
    Run,
    batches,
    build,
    choose_parts,
    make_plan,
    open_sources,
    over_processes,
    take_step,
    train,
)

ON_GPU = torch.cuda.is_available()
SMALL = {"image_batch": 8, "video_batch": 1, "image_size": 64, "crop": (128, 128)}
SMALL_MODEL = ModelConfig(encoder="resnet50", estimator_factor=0.25, expander=(64, 64, 64))


def recipe_config(device: torch.device, **changes: object) -> Config:
    """One process's share of the paper's recipe on 8 GPUs: 48 images and 1 pair. On a CPU a small model."""
    share = {"image_batch": 48, "video_batch": 1} if device.type == "cuda" else SMALL | {"model": SMALL_MODEL}
    return replace(PRESETS["paper"], **share | {"flow_start_epoch": 0.0, "steps_per_epoch": 100} | changes)


def fixed_batch(config: Config, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first batch of a configuration, on the device."""
    sources = open_sources(replace(config, workers=0))
    return tuple(next(batches(replace(config, workers=0), source, 0, device))[0] for source in sources)


def make_run(config: Config, device: torch.device) -> tuple[Run, nn.Module]:
    """A run without data, for `take_step`, and its module."""
    model, optimizer = build(config, device)
    plan = make_plan(config, *open_sources(config))
    choose_parts(config, model, flow_started=True)
    run = Run(config, {}, plan, device, None, None, model, optimizer, 0, math.inf, {}, [])
    return run, over_processes(config, model, device)


def timed_steps(run: Run, module: nn.Module, batch: tuple, count: int, first: int = 0) -> list[float]:
    """Milliseconds of each step, waiting for the GPU after each."""
    times = []
    for step in range(first, first + count):
        start = time.perf_counter()
        numbers, reports = take_step(run, module, step, step, batch, [])
        wait(run.device)
        times.append(1e3 * (time.perf_counter() - start))
        if reports or not all(math.isfinite(value) for value in numbers.values()):
            raise ValueError(f"step {step}: not finite {reports}")
    return times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gigabytes(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None


def metrics(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "total" in line]


# ------------------------------------------------------------------------------------------------------------- parts


def recipe(device: torch.device, out: Path) -> dict:
    """train.py itself, across the start of the flow, with its loader, validation, pictures and checkpoints."""
    workers = min(7, (os.cpu_count() or 2) // 2)
    config = recipe_config(device, steps_per_epoch=20, flow_start_epoch=1.0, max_steps=40, log_every=1)
    config = replace(config, output_dir=out / "recipe", workers=workers, validation_pairs=4, checkpoint_every=10**6)
    train(config)
    lines = metrics(config.output_dir)
    waits = [1e3 * (b["time"] - a["time"]) for a, b in zip(lines, lines[1:], strict=False)]
    return {
        "steps": len(lines),
        "finite": all(math.isfinite(value) for line in lines for value in line.values()),
        "ms of a step of content": round(statistics.median(waits[5:18]), 1),
        "ms of a step of both": round(statistics.median(waits[25:38]), 1),
        "first and last total": [round(lines[20]["total"], 3), round(lines[-1]["total"], 3)],
        "peak GB": peak_gigabytes(device),
    }


def step(device: torch.device, out: Path) -> dict:
    """A step of both tasks on a batch that lies on the GPU, as train.py takes it."""
    result = {}
    for name, changes in {"as train.py": {}, "float32": {"precision": "float32"}}.items():
        run, module = make_run(recipe_config(device, **changes), device)
        batch = fixed_batch(run.config, device)
        times = timed_steps(run, module, batch, 13)
        result[f"ms, {name}"] = round(statistics.median(times[3:]), 1)
        result[f"peak GB, {name}"] = peak_gigabytes(device)
        del run, module, batch
        clean(device)
    return result


def synchronisations(device: torch.device, out: Path) -> dict:
    """How often a step waits for the GPU, and where."""
    if device.type != "cuda":
        return {"count": "only a GPU tells"}
    run, module = make_run(recipe_config(device), device)
    batch = fixed_batch(run.config, device)
    timed_steps(run, module, batch, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        take_step(run, module, 2, 2, batch, [])
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "a synchronizing" in str(w.message))
    return {"count": sum(places.values()), "where": dict(places.most_common(12))}


def profiled(device: torch.device, out: Path) -> dict:
    """Five steps: kernels, the share of time without any, and the longest ones."""
    run, module = make_run(recipe_config(device), device)
    batch = fixed_batch(run.config, device)
    timed_steps(run, module, batch, 3)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as seen:
        start = time.perf_counter()
        for number in range(5):
            take_step(run, module, 3 + number, 3 + number, batch, [])
        wait(device)
        wall = time.perf_counter() - start
    rows = seen.key_averages()
    casts = sum(row.count for row in rows if row.key == "aten::_to_copy") / 5
    result = {"operations": sum(r.count for r in rows if r.key.startswith("aten::")) / 5, "casts": casts}
    kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if kernels:
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
        longest = Counter()
        for event in kernels:
            longest[event.name[:90]] += event.time_range.elapsed_us() / 5e3
        result |= {"kernels": len(kernels) / 5, "ms": round(200 * wall, 1), "idle": round(1 - busy / wall, 3)}
        result["longest, ms"] = {name: round(ms, 2) for name, ms in longest.most_common(25)}
    return result


def precisions(device: torch.device, out: Path) -> dict:
    """The losses and gradients of one batch in train.py's precision and layout, against float32."""
    config = recipe_config(device)
    config = replace(config, image_batch=min(config.image_batch, 24))
    batch = fixed_batch(config, device)

    def gradients(bfloat16: bool, tf32: bool, channels_last: bool) -> tuple[dict, dict[str, Tensor]]:
        torch.manual_seed(0)
        model, _ = build(config, device)
        model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            losses = model(video=batch[0], views=batch[1], masks=False)
        losses.total.backward()
        parts = {
            name: torch.cat([p.grad.flatten().double() for p in part.parameters()])
            for name, part in model.named_children()
        }
        return {name: value.item() for name, value in losses.unweighted.items()}, parts

    reference, expected = gradients(False, False, False)
    result = {"float32": reference}
    ways = {
        "channels_last": (False, False, True),
        "tf32": (False, True, False),
        "bf16": (True, True, False),
        "bf16, channels_last": (True, True, True),
    }
    for name, way in ways.items():
        losses, parts = gradients(*way)
        differences = {term: abs(value / reference[term] - 1) for term, value in losses.items() if reference[term]}
        cosines = {part: torch.cosine_similarity(g, expected[part], dim=0).item() for part, g in parts.items()}
        worst = max(differences, key=differences.get)
        result[name] = {"largest difference of a loss": [worst, f"{differences[worst]:.1e}"], "cosine": cosines}
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return result


@contextmanager
def process_group(backend: str, rank: int, world: int, folder: Path) -> Iterator[None]:
    """A process group; with one process, our collectives run all the same."""
    meeting = (folder / f"meeting_{world}").resolve()
    if world == 1:
        meeting.unlink(missing_ok=True)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        with patch.object(encoder_module, "several_processes", lambda: True):
            yield
    finally:
        dist.destroy_process_group()


def one_rank(device: torch.device, out: Path) -> dict:
    """A group of one NCCL process: DDP, a step of content, DDP again at the start of the flow, a step of both."""
    config = replace(recipe_config(device), image_batch=8, model=replace(SMALL_MODEL, expander=(256, 256, 256)))
    batch, result = fixed_batch(config, device), {}
    alone, module = make_run(config, device)
    result["total alone"] = take_step(alone, module, 0, 0, batch, [])[0]["weighted/reconstruction"].item()
    with process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", 0, 1, out):
        run, _ = make_run(config, device)
        for flow_started in (False, True):
            choose_parts(config, run.model, flow_started)
            module = over_processes(config, run.model, device)
            numbers, _ = take_step(run, module, 0, 0, (batch[0] if flow_started else None, batch[1]), [])
        result["total in a group"] = numbers["weighted/reconstruction"].item()
    return result


def gradients_of_rank(rank: int, world: int, folder: str, device: torch.device) -> None:
    """One of `world` processes on one GPU, over gloo: saves the gradients of its share of a batch."""
    config = replace(recipe_config(device), **SMALL | {"video_batch": 2}, model=SMALL_MODEL)
    video, views = fixed_batch(config, device)
    share = [tuple(x.double().chunk(world)[rank] for x in pair) for pair in (video, views)]

    def gradients() -> dict[str, Tensor]:
        model = build(config, device)[0].double()  # float32 would hide a mistake behind 53 batch norms' rounding
        module = over_processes(config, model, device)
        module(video=share[0], views=share[1], masks=False).total.backward()
        return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}

    if world == 1:
        found = gradients()
    else:
        with process_group("gloo", rank, world, Path(folder)):
            found = gradients()
    if rank == 0:
        torch.save(found, Path(folder) / f"gradients_{world}.pt")


def two_ranks(device: torch.device, out: Path) -> dict:
    """Two processes on one GPU over gloo: their gradients must be those of one process with the whole batch."""
    (out / "meeting_2").unlink(missing_ok=True)
    mp.spawn(gradients_of_rank, (2, str(out), device), nprocs=2)
    gradients_of_rank(0, 1, str(out), device)
    one, two = (torch.load(out / f"gradients_{world}.pt", weights_only=True) for world in (1, 2))
    errors = {name: ((one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-12)).item() for name in one}
    total = [torch.cat([g.flatten() for g in each.values()]) for each in (one, two)]
    worst = max(errors, key=errors.get)
    return {
        "relative difference of all gradients": f"{((total[0] - total[1]).norm() / total[0].norm()).item():.1e}",
        "worst parameter": [worst, f"{errors[worst]:.1e}"],
    }


def loader(device: torch.device, out: Path) -> dict:
    """Milliseconds that the loader takes for a batch, alone, with several numbers of workers."""
    result = {}
    for workers in (1, 4, 7):
        config = replace(recipe_config(device), workers=min(workers, os.cpu_count() or 1))
        for source in open_sources(config):
            stream = batches(config, source, 0, device)
            for _ in range(2 * config.workers + 1):
                next(stream)
            count, start = 4 * config.workers, time.perf_counter()
            for _ in range(count):
                next(stream)
            result[f"{workers} workers, {source.kind}"] = round(1e3 * (time.perf_counter() - start) / count, 1)
    return result


def continuation(device: torch.device, out: Path) -> dict:
    """Six steps at once against three and three; a checkpoint that goes from the CPU to the GPU and back."""
    # At low rates: a GPU adds in another order each time, and high rates let that grow.
    rates = {"learning_rate": 1e-4, "estimator_learning_rate": 1e-4, "precision": "float32"}
    small = replace(PRESETS["pocket"], max_steps=6, log_every=1, validation_pairs=1, **rates)
    whole, parts = out / "whole", out / "parts"
    train(replace(small, output_dir=whole))
    train(replace(small, output_dir=parts, max_steps=3))
    train(replace(small, output_dir=parts))
    totals = [[line["total"] for line in metrics(folder)] for folder in (whole, parts)]
    result = {"largest difference": max(abs(a / b - 1) for a, b in zip(*totals, strict=True))}
    moved = out / "moved"
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), str(whole / "config.json")]
    for steps, variables in ((2, on_cpu), (4, os.environ), (6, on_cpu)):
        flags = ["--max-steps", str(steps), "--output-dir", str(moved)]
        subprocess.run([*command, *flags], env=variables, check=True, capture_output=True)
    result["moved"] = [round(line["total"], 4) for line in metrics(moved)]
    result["not moved"] = [round(total, 4) for total in totals[0]]
    return result


def compiled(device: torch.device, out: Path) -> dict:
    """--compile against eager: graphs, and milliseconds before and after compiling, while Eq. 6 warms up."""
    run, module = make_run(recipe_config(device, compile=True), device)
    batch = fixed_batch(run.config, device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    start = time.perf_counter()
    times = timed_steps(run, module, batch, 14)
    return {
        "seconds of compiling": round(time.perf_counter() - start - 14e-3 * times[-1], 1),
        "steps that compiled": [i for i, ms in enumerate(times) if ms > 5 * times[-1]],
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "ms": round(statistics.median(times[6:]), 1),
        "peak GB": peak_gigabytes(device),
    }


def pocket(device: torch.device, out: Path) -> dict:
    """The whole preset `pocket`."""
    config = replace(PRESETS["pocket"], output_dir=out / "pocket", workers=min(4, os.cpu_count() or 1))
    start = time.perf_counter()
    train(config if device.type == "cuda" else replace(config, max_steps=4, validation_pairs=1))
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    errors = [round(line["validation/epe"], 3) for line in lines if "validation/epe" in line]
    return {"minutes": round((time.perf_counter() - start) / 60, 2), "end-point errors": errors}


PARTS: dict[str, Callable[[torch.device, Path], dict]] = {
    "recipe": recipe,
    "step": step,
    "synchronisations": synchronisations,
    "profile": profiled,
    "precisions": precisions,
    "one_rank": one_rank,
    "two_ranks": two_ranks,
    "loader": loader,
    "continuation": continuation,
    "compile": compiled,
    "pocket": pocket,
}


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--device", type=torch.device, default="cuda:0" if ON_GPU else "cpu")
    arguments = parser.parse_args()
    for name in ("recipe", "whole", "parts", "moved", "pocket"):  # runs of before would be continued
        shutil.rmtree(arguments.out / name, ignore_errors=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    own_device()  # float32 without TF32, as train.py has it
    results, failed = arguments.out / "smoke.jsonl", []
    parts = {"environment": lambda device, _: environment(device)} | {name: PARTS[name] for name in arguments.only}
    for name, part in parts.items():
        clean(arguments.device)
        start = time.perf_counter()
        try:
            result = part(arguments.device, arguments.out)
        except Exception as error:  # the other parts can still be measured
            traceback.print_exc()
            result = {"failed": one_line(error)[:300]}
            failed.append(name)
        line = json.dumps({"part": name, "seconds": round(time.perf_counter() - start, 1)} | result)
        print(line, flush=True)
        with open(results, "a") as file:
            file.write(line + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
