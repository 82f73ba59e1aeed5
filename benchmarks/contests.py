"""The contests of run.py: each thing that we do beside the same thing done by others, or as it is usually written."""

import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import plain
import torch
import torch.nn.functional as F
import torchvision
from timing import Way
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from data import TwoViews, make_loader
from encoder import ENCODERS
from evaluate import propagate_labels
from flow import correlation, estimate_flow_pyramid, warp
from losses import smoothness_loss, ssim_distance, vicreg_loss
from mcjepa import MCJEPA, ModelConfig, swap_frames
from sources.moving_shapes import ShapeImages, ShapePairs
from train import IMAGENET_SIZE, PRESETS, as_floats, build, over_processes

CROP = (384, 832)
"""The video crop of the recipe (`train.py`, preset "paper")."""
IMAGES = 48
"""Its images per process and step: 384 over 8."""


class Contest(NamedTuple):
    """One thing, done in several ways."""

    what: str
    build: Callable[[torch.device], dict[str, Way]]
    """The ways by name, ours first, on inputs that they share."""
    goal: str
    """How much faster, and in how much less memory, ours shall be."""
    needs: str | None = None
    """The package that the other side comes from."""
    same: float | None = 1e-4
    """The relative difference that the results may have; None: they are different things."""
    same_on_gpu: float | None = None
    """The same where TF32 or bf16 is at work."""


def installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def with_gradients(function: Callable, *inputs: Tensor) -> Way:
    """Forward and backward of a function: a way that returns its value, and the gradient of each input."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def way() -> list[Tensor]:
        values = function(*leaves)
        values = [values] if isinstance(values, Tensor) else values
        # Any gradient that is not the same everywhere; means, so that it is of the same size for maps and for losses.
        slope = [torch.linspace(0.5, 1.5, v.shape[-1] if v.ndim else 1, device=v.device) for v in values]
        total = sum((v * s).mean() for v, s in zip(values, slope, strict=True))
        return [*values, *torch.autograd.grad(total, leaves)]

    return way


def vicreg(n: int) -> Callable[[torch.device], dict[str, Way]]:
    def build(device: torch.device) -> dict[str, Way]:
        from lightly.loss import VICRegLoss

        x, y = (torch.randn(n, 8192, device=device) for _ in "xy")
        theirs = VICRegLoss()

        def ours(x: Tensor, y: Tensor) -> Tensor:
            invariance, variance, covariance = vicreg_loss(x, y)
            return 25 * invariance + 25 * variance + covariance

        return {"vicreg_loss": with_gradients(ours, x, y), "lightly VICRegLoss": with_gradients(theirs, x, y)}

    return build


def feature_pyramid(name: str, device: torch.device, batch: int = 2) -> list[Tensor]:
    """Random features of the sizes that an encoder gives for the paper's crop, down to stride 4, coarsest first."""
    encoder = ENCODERS[name]
    levels = zip(encoder.channels, encoder.strides, strict=True)
    return [torch.randn(batch, c, CROP[0] // s, CROP[1] // s, device=device) for c, s in levels if s >= 4]


def correlations(device: torch.device) -> dict[str, Way]:
    features = feature_pyramid("convnext_tiny", device)
    features += [torch.randn_like(x) for x in features]

    def all_levels(function: Callable) -> Way:
        half = len(features) // 2
        return with_gradients(
            lambda *xs: [function(x, y) for x, y in zip(xs[:half], xs[half:], strict=True)], *features
        )

    ways = {
        "correlation": all_levels(correlation),
        "81 shifts": all_levels(plain.correlation_by_shifts),
        "unfold + einsum": all_levels(plain.correlation_by_unfolding),
    }
    if device.type == "cuda":
        ways["81 shifts, compiled"] = all_levels(torch.compile(plain.correlation_by_shifts, dynamic=False))
    return ways


def both_flows(encoder: str) -> Callable[[torch.device], dict[str, Way]]:
    def build(device: torch.device) -> dict[str, Way]:
        torch.manual_seed(0)
        model = MCJEPA(ModelConfig(encoder=encoder), task="mjepa").to(device)
        parameters = [*model.encoder.parameters()][:1]  # a gradient to compare
        images = torch.rand(2, 3, *CROP, device=device)

        def learn(flows: list[Tensor]) -> list[Tensor]:
            model.zero_grad()
            sum((f * f).mean() for f in flows).backward()
            return [flows[-1], *(p.grad for p in parameters)]

        def one_pass() -> list[Tensor]:
            pyramid = model.encode(images)
            return learn(estimate_flow_pyramid(model.estimator, pyramid, [swap_frames(x) for x in pyramid]))

        def two_estimates() -> list[Tensor]:
            pyramid = model.encode(images)
            estimate = plain.two_passes(estimate_flow_pyramid)
            return learn(estimate(model.estimator, pyramid, [swap_frames(x) for x in pyramid]))

        def two_calls() -> list[Tensor]:
            halves = []
            for order in ([0, 1], [1, 0]):
                source, target = plain.split(model.encode(images[order]))
                halves.append(estimate_flow_pyramid(model.estimator, [*source], [*target]))
            return learn([torch.cat(level) for level in zip(*halves, strict=True)])

        return {
            "both at once": one_pass,
            "encoded once, estimated twice": two_estimates,
            "two passes": two_calls,
        }

    return build


def image_losses(device: torch.device) -> dict[str, Way]:
    import kornia

    def theirs(image_1: Tensor, image_2: Tensor, flow: Tensor) -> list[Tensor]:
        h, w = flow.shape[2:]
        rows = torch.arange(h, device=device).view(h, 1)
        columns = torch.arange(w, device=device).view(1, w)
        warped = kornia.geometry.transform.remap(
            image_2, flow[:, 0] + columns, flow[:, 1] + rows, padding_mode="border", align_corners=True
        )
        ssim = kornia.losses.ssim_loss(image_1, warped, 3, padding="valid")
        smoothness = kornia.losses.inverse_depth_smoothness_loss(flow, 10 * image_1)  # 10: lambda of Eq. 4
        return [warped, smoothness, ssim]

    def ours(image_1: Tensor, image_2: Tensor, flow: Tensor) -> list[Tensor]:
        warped = warp(image_2, flow)
        return [warped, smoothness_loss(flow, image_1), ssim_distance(image_1, warped).mean()]

    coarse = torch.rand(4, 3, CROP[0] // 16, CROP[1] // 16, device=device)
    image_1, image_2 = F.interpolate(coarse, size=CROP, mode="bilinear").chunk(2)
    flow = 4 * torch.randn(2, 2, *CROP, device=device)
    return {
        "losses.py": with_gradients(ours, image_1, image_2, flow),
        "kornia": with_gradients(theirs, image_1, image_2, flow),
    }


def inference(device: torch.device) -> dict[str, Way]:
    """Several networks on one pair of Sintel's size; all with random weights: the time does not depend on them."""
    images = torch.rand(2, 1, 3, 436, 1024, device=device)

    def ours(encoder: str, factor: float = 2.0) -> Way:
        model = MCJEPA(ModelConfig(encoder=encoder, estimator_factor=factor), task="mjepa").to(device).eval()
        return lambda: [model.estimate_flow(*images)]

    raft = torchvision.models.optical_flow.raft_small(weights=None).to(device).eval()

    @torch.no_grad()
    def run_raft() -> list[Tensor]:
        return raft(*F.pad(2 * images - 1, (0, 0, 0, 4)), num_flow_updates=12)[-1:]

    ways = {
        "ours, PWC encoder": ours("pwc"),
        "ours, estimator of 2M instead of 8M": ours("pwc", 1.0),
        "ours, ConvNeXt-T": ours("convnext_tiny"),
        "torchvision raft_small": run_raft,
    }
    if installed("ptlflow"):
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it prints what it finds uncompiled
            warnings.simplefilter("ignore")
            logging.disable()
            try:
                import ptlflow

                network = ptlflow.get_model("pwcnet").to(device).eval()
            finally:
                logging.disable(logging.NOTSET)

        @torch.no_grad()
        def run_pwc_net() -> list[Tensor]:
            return [network({"images": images.transpose(0, 1)})["flows"]]

        ways["ptlflow PWC-Net (correlation in PyTorch)"] = run_pwc_net
    return ways


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, bfloat16: bool) -> list[Tensor]:
    """A training step; returns the loss, the norm of each part's gradient, and the gradient of its first parameter."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        losses = model(**batch)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    norms = [clip_grad_norm_(group["params"], 1.0) for group in optimizer.param_groups]
    optimizer.step()
    return [losses.total.detach(), *norms, *(group["params"][0].grad for group in optimizer.param_groups)]


def paper_batch(device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """What each of 8 processes learns from in one step of the recipe."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"video": (1, 3, *CROP), "views": (IMAGES, 3, 224, 224)}
    return {
        name: tuple(torch.rand(size, generator=generator).to(device) for _ in range(2)) for name, size in sizes.items()
    }


def without_learning(model: nn.Module, **keywords) -> torch.optim.Optimizer:
    """AdamW at a rate of 0: it costs the same, and all repeats compute the same."""
    return torch.optim.AdamW([{"params": [*part.parameters()]} for part in model.children()], lr=0.0, **keywords)


def step(device: torch.device) -> dict[str, Way]:
    """The whole step as train.py takes it, on a GPU in bf16, channels_last and compiled, beside a plain float32 one."""
    config, batch, gpu = PRESETS["paper"], paper_batch(device), device.type == "cuda"
    fast, _ = build(config, device)
    run, optimizer = over_processes(replace(config, compile=gpu), fast, device), without_learning(fast, fused=True)
    torch.manual_seed(config.seed)
    slow = plain.PlainMCJEPA().to(device)
    other = without_learning(slow)
    return {
        "train.py --compile" if gpu else "train.py": lambda: one_step(run, optimizer, batch, gpu),
        "plain": lambda: one_step(slow, other, batch, False),
    }


def compiled(device: torch.device) -> dict[str, Way]:
    """The pocket's step in float32, as train.py takes it with --compile and without."""
    config = PRESETS["pocket"]
    torch.manual_seed(0)
    coarse = torch.rand(2, config.video_batch, 3, config.crop[0] // 8, config.crop[1] // 8)
    video = tuple(F.interpolate(x, size=config.crop, mode="bilinear").to(device) for x in coarse)
    size = (config.image_batch, 3, config.image_size, config.image_size)
    batch = {"video": video, "views": tuple(torch.rand(size).to(device) for _ in range(2))}
    ways = {}
    for name, wanted in (("compiled", True), ("eager", False)):
        model, _ = build(config, device)
        optimizer = without_learning(model, fused=True)
        run = over_processes(replace(config, compile=wanted), model, device)
        ways[name] = lambda run=run, optimizer=optimizer: one_step(run, optimizer, batch, False)
    return ways


def shapes(device: torch.device) -> dict[str, Way]:
    """The embedded data of a step of the paper's recipe, and the step; on a GPU of many steps."""
    workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    loaders = [
        iter(make_loader(ShapePairs(IMAGENET_SIZE, CROP), as_floats, 1, workers=workers)),
        iter(make_loader(ShapeImages(IMAGENET_SIZE, (224, 224)), TwoViews(224), IMAGES, workers=workers)),
    ]
    ahead = 2 * workers  # each worker has loaded two while the step ran: these come for nothing
    several = 8 * workers or 1

    def load() -> None:
        for _ in islice(zip(*loaders, strict=True), ahead + several):
            pass

    learn = next(iter(step(device).values()))

    def learn_several() -> None:
        for _ in range(several):
            learn()

    return {
        f"MovingShapes, {workers} workers, {several} steps" if workers else "MovingShapes, one process": load,
        "training step": learn_several,
    }


def propagation(device: torch.device) -> dict[str, Way]:
    """480p at stride 8 (60 x 107 cells), 384 channels, 8 context frames, 2 objects and background."""
    generator = torch.Generator().manual_seed(0)
    h, w, channels, frames = 60, 107, 384, 8
    target = torch.randn(channels, h, w, generator=generator).to(device)
    context = torch.randn(frames, channels, h, w, generator=generator).to(device)
    classes = torch.randint(0, 3, (frames, h, w), generator=generator)
    labels = F.one_hot(classes, 3).movedim(-1, 1).float().to(device)
    return {
        "propagate_labels": lambda: [propagate_labels(target, context, labels, 12, 5, 0.1)],
        "dense, masked": lambda: [plain.propagate(target, context, labels)],
    }


CONTESTS = {
    "vicreg-384": Contest("VICReg loss, 384 x 8192", vicreg(384), "10 x, half the memory", "lightly"),
    "vicreg-2048": Contest("VICReg loss, 2048 x 8192", vicreg(2048), "faster, half the memory", "lightly"),
    "correlation": Contest(
        "correlation, radius 4, five levels of 384 x 832", correlations, "CPU 2 x, GPU 3 x the best"
    ),
    "both-flows": Contest(
        "both flows of a pair, ConvNeXt-T", both_flows("convnext_tiny"), "1.5 x", same=0.02, same_on_gpu=0.2
    ),
    "both-flows-pwc": Contest(
        "both flows of a pair, PWC encoder", both_flows("pwc"), "1.5 x", same=0.02, same_on_gpu=0.2
    ),
    "image-losses": Contest("warp, SSIM, smoothness of 2 pairs", image_losses, "1.5 x", "kornia", 0.1),
    "inference": Contest("flow of one pair of 436 x 1024", inference, "faster with the PWC encoder", same=None),
    "step": Contest("training step, paper's size", step, "GPU 3 x", same=0.02, same_on_gpu=0.1),
    "compile": Contest("training step, pocket's size", compiled, "GPU: faster", same=0.02),
    "shapes": Contest("embedded data of a step", shapes, "never the slower", same=None),
    "propagation": Contest("label propagation, 480p", propagation, "5 x, a fifth of the memory"),
}
