"""Where the time of a training step goes, at the paper's size per process, and how near to the ceilings."""

from collections.abc import Callable
from unittest.mock import patch

import torch
from comparisons import one_step, paper_batch
from timing import Way, count_work, quartiles, take_turns
from torch import Tensor

import mcjepa
from flow import correlation, standardise, warp
from losses import vicreg_loss
from mcjepa import swap_frames
from train import PRESETS, build

MOST_REPEATS = 5


def as_leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def parts_of_a_step(device: torch.device) -> dict[str, Way]:
    """Each part alone, forward and backward, on inputs as in the step; the whole step last.

    The estimator's 1 x 1 projections, and resizing and stacking between the parts, are in none of them.
    """
    model, optimizer = build(PRESETS["paper"], device)
    estimator, batch, bfloat16 = model.estimator, paper_batch(device), device.type == "cuda"
    frames, views = (torch.cat(batch[name]) for name in ("video", "views"))
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        pyramid = model.encode(frames)
        pooled = model.encode(views)[0].mean(dim=(2, 3))
        x, y = model.expander(pooled, views=2).float().chunk(2)
        flows = mcjepa.estimate_flow_pyramid(estimator, pyramid, [swap_frames(f) for f in pyramid])
    sizes = [(2, e.body[0].in_channels, *f.shape[2:]) for f, e in zip(flows, estimator.levels, strict=True)]
    inputs = as_leaves([torch.randn(size, device=device) for size in sizes])
    pyramid, flows, (pooled, x, y) = as_leaves(pyramid), as_leaves(flows), as_leaves([pooled, x, y])
    leaves = [*model.parameters(), *pyramid, *flows, pooled, x, y, *inputs]

    def clear_gradients() -> None:
        """As zero_grad in a step: each part allocates its own gradients, and adds them to no others."""
        for leaf in leaves:
            leaf.grad = None

    def part(function: Callable[[], list[Tensor]]) -> Way:
        def way() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                values = function()
            torch.autograd.backward(values, [torch.ones_like(value) for value in values])
            clear_gradients()

        return way

    def correlate() -> list[Tensor]:
        standardised = [standardise(f, swap_frames(f)) for f in pyramid[: len(flows)]]
        return [correlation(a, warp(b, f), estimator.radius) for (a, b), f in zip(standardised, flows, strict=True)]

    def flow_losses() -> list[Tensor]:
        with (
            patch.object(model, "_encode", lambda _: pyramid),
            patch.object(mcjepa, "estimate_flow_pyramid", lambda *_: flows),
        ):
            return [model(video=batch["video"]).total]

    def vicreg() -> list[Tensor]:
        with torch.autocast(device.type, enabled=False):  # as in the step
            return [*vicreg_loss(x, y)]

    def whole_step() -> None:
        one_step(model, optimizer, batch, bfloat16)
        clear_gradients()

    one_step(model, optimizer, batch, bfloat16)
    gradients = [parameter.grad for parameter in model.parameters()]
    clear_gradients()

    def optimise() -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        clear_gradients()

    return {
        "encoder, 2 frames of 384 x 832": part(lambda: model.encode(frames)),
        "standardise, warp, correlation": part(correlate),
        "estimator's convolutions": part(lambda: [f(i) for f, i in zip(estimator.levels, inputs, strict=True)]),
        "losses of the flow": part(flow_losses),
        "encoder, 96 views of 224": part(lambda: [model.encode(views)[0]]),
        "expander": part(lambda: [model.expander(pooled, views=2)]),
        "VICReg loss": part(vicreg),
        "clipping and AdamW": optimise,
        "whole step": whole_step,
    }


def measure(device: torch.device, repeats: int, ceilings: dict[str, float]) -> dict:
    ways = parts_of_a_step(device)
    for way in ways.values():
        way()
    counts = {name: count_work(way) for name, way in ways.items()}
    result = {}
    for name, seconds in take_turns(ways, min(repeats, MOST_REPEATS), device, warmup=1).items():
        flops, traffic = counts[name]
        median = quartiles(seconds).median
        result[name] = {
            "seconds": quartiles(seconds),
            "flops": flops,
            "bytes": traffic,
            "share_of_flops": flops / median / max(ceilings["matrices"], ceilings["convolution"]),
            "share_of_bytes": traffic / median / ceilings["bytes"],
        }
    return result


def table(result: dict) -> str:
    whole = result["whole step"]["seconds"][0]
    lines = [
        "| part, forward and backward | ms | of the step | GFLOP | GB | of the ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        share, ceiling = max((row["share_of_flops"], "products"), (row["share_of_bytes"], "copies"))
        seconds, counts = row["seconds"][0], f"{row['flops'] / 1e9:,.1f} | {row['bytes'] / 1e9:,.2f}"
        lines.append(f"| {name} | {1e3 * seconds:,.1f} | {seconds / whole:.1%} | {counts} | {share:.0%} of {ceiling} |")
    return "\n".join(lines)
