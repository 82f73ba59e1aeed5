"""Where the time of a training step goes: its parts, at the paper's size per process, and how near the ceilings."""

from unittest.mock import patch

import torch
from contests import one_step, paper_batch
from timing import Way, in_turns, spread, work
from torch import Tensor

import mcjepa
from flow import correlation, standardise, warp
from losses import vicreg_loss
from train import PRESETS, build

REPEATS = 5
"""At most; more would take long and say little."""


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def backward(values: list[Tensor]) -> None:
    torch.autograd.backward(values, [torch.ones_like(x) for x in values])


def parts(device: torch.device) -> dict[str, Way]:
    """Each part alone, forward and backward, on inputs as the step has them; the whole step last.

    The estimator's 1 x 1 projections, and resizing and stacking between the parts, are in none of them.
    """
    model, optimizer = build(PRESETS["paper"], device)
    batch = paper_batch(device)
    frames, views = (torch.cat(batch[name]) for name in ("video", "views"))
    bfloat16 = device.type == "cuda"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        pyramid = model.encode(frames)
        pooled = model.encode(views)[0].mean(dim=(2, 3))
        x, y = model.expander(pooled, views=2).float().chunk(2)
        flows = mcjepa.estimate_flow_pyramid(model.estimator, pyramid, [mcjepa.swap_frames(f) for f in pyramid])
    features, given_flows, pooled, x, y = leaves(pyramid), leaves(flows), *leaves([pooled, x, y])
    estimator = model.estimator
    sizes = [(2, e.body[0].in_channels, *f.shape[2:]) for f, e in zip(flows, estimator.levels, strict=True)]
    inputs = leaves([torch.randn(size, device=device) for size in sizes])
    given = [*model.parameters(), *features, *given_flows, pooled, x, y, *inputs]

    def in_float32() -> list[Tensor]:
        with torch.autocast(device.type, enabled=False):  # as in the step
            return list(vicreg_loss(x, y))

    def forget() -> None:
        """As zero_grad in a step: each part pays for its own gradients, and adds them to none that are there."""
        for leaf in given:
            leaf.grad = None

    def part(function) -> Way:
        def way() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                values = function()
            backward(values)
            forget()

        return way

    def correlate() -> list[Tensor]:
        volumes = []
        for f, flow in zip(features[: len(flows)], given_flows, strict=True):
            a, b = standardise(f, mcjepa.swap_frames(f))
            volumes.append(correlation(a, warp(b, flow), estimator.radius))
        return volumes

    def flow_losses() -> list[Tensor]:
        with (
            patch.object(model, "encode", lambda _: features),
            patch.object(mcjepa, "estimate_flow_pyramid", lambda *_: given_flows),
        ):
            return [model(video=batch["video"]).total]

    one_step(model, optimizer, batch, bfloat16)
    gradients = [parameter.grad for parameter in model.parameters()]
    forget()

    def optimise() -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        forget()

    def whole() -> None:
        one_step(model, optimizer, batch, bfloat16)
        forget()

    return {
        "encoder, 2 frames of 384 x 832": part(lambda: model.encode(frames)),
        "standardise, warp, correlation": part(correlate),
        "estimator's convolutions": part(lambda: [f(i) for f, i in zip(estimator.levels, inputs, strict=True)]),
        "losses of the flow": part(flow_losses),
        "encoder, 96 views of 224": part(lambda: [model.encode(views)[0]]),
        "expander": part(lambda: [model.expander(pooled, views=2)]),
        "VICReg loss": part(in_float32),
        "clipping and AdamW": optimise,
        "whole step": whole,
    }


def measure(device: torch.device, repeats: int, limits: dict[str, float]) -> dict:
    ways = parts(device)
    for way in ways.values():
        way()
    counted = {name: work(way) for name, way in ways.items()}
    seconds = in_turns(ways, min(repeats, REPEATS), device, warmup=1)
    result = {}
    for name, measured in seconds.items():
        flops, traffic = counted[name]
        median = spread(measured).median
        result[name] = {
            "seconds": spread(measured),
            "flops": flops,
            "bytes": traffic,
            "share_of_flops": flops / median / max(limits["matrices"], limits["convolution"]),
            "share_of_bytes": traffic / median / limits["bytes"],
        }
    return result


def show(result: dict) -> str:
    whole = result["whole step"]["seconds"][0]
    lines = [
        "| part, forward and backward | ms | of the step | GFLOP | GB | of the ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        share, ceiling = max((row["share_of_flops"], "products"), (row["share_of_bytes"], "copies"))
        seconds, counted = row["seconds"][0], f"{row['flops'] / 1e9:,.1f} | {row['bytes'] / 1e9:,.2f}"
        lines.append(
            f"| {name} | {1e3 * seconds:,.1f} | {seconds / whole:.1%} | {counted} | {share:.0%} of {ceiling} |"
        )
    return "\n".join(lines)
