"""The comparisons of run.py: what we do beside the same done by others, or written in the usual way."""

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
from train import IMAGENET_SIZE, PRESETS, build, over_processes

CROP = (384, 832)
"""The video crop of train.py's preset "paper"."""
IMAGES = 48
"""The images per process and step of that preset: 384 over 8."""


class Comparison(NamedTuple):
    """One computation, in several ways."""

    what: str
    build: Callable[[torch.device], dict[str, Way]]
    """The ways by name, ours first, on the same inputs."""
    goal: str
    """How much faster ours should be, and in how much less memory."""
    package: str | None = None
    """Where the other side comes from."""
    tolerance: float | None = 1e-4
    """The relative difference that the results may have; None: the ways compute different things."""
    tolerance_on_gpu: float | None = None
    """The same where TF32 or bf16 is at work."""


def is_installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def with_gradients(function: Callable, *inputs: Tensor) -> Way:
    """The forward and backward pass of a function: a way that returns its values and the gradient of each input."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def way() -> list[Tensor]:
        values = function(*leaves)
        values = [values] if isinstance(values, Tensor) else values
        # Uneven weights, so that gradients differ from place to place; means, so that maps and losses weigh the same.
        weights = [torch.linspace(0.5, 1.5, v.shape[-1] if v.ndim else 1, device=v.device) for v in values]
        total = sum((v * w).mean() for v, w in zip(values, weights, strict=True))
        return [*values, *torch.autograd.grad(total, leaves)]

    return way


def vicreg(device: torch.device, n: int) -> dict[str, Way]:
    from lightly.loss import VICRegLoss

    def ours(x: Tensor, y: Tensor) -> Tensor:
        invariance, variance, covariance = vicreg_loss(x, y)
        return 25 * invariance + 25 * variance + covariance

    x, y = (torch.randn(n, 8192, device=device) for _ in "xy")
    return {"vicreg_loss": with_gradients(ours, x, y), "lightly VICRegLoss": with_gradients(VICRegLoss(), x, y)}


def correlations(device: torch.device) -> dict[str, Way]:
    """Features of the sizes of ConvNeXt-T's levels for the paper's crop, down to stride 4."""
    encoder = ENCODERS["convnext_tiny"]
    levels = [(c, s) for c, s in zip(encoder.channels, encoder.strides, strict=True) if s >= 4]
    features = [torch.randn(2, c, CROP[0] // s, CROP[1] // s, device=device) for _ in "xy" for c, s in levels]

    def at_all_levels(function: Callable) -> Way:
        return with_gradients(lambda *f: list(map(function, f[: len(levels)], f[len(levels) :])), *features)

    ways = {
        "correlation": at_all_levels(correlation),
        "81 shifts": at_all_levels(plain.correlation_by_shifts),
        "unfold + einsum": at_all_levels(plain.correlation_by_unfolding),
    }
    if device.type == "cuda":
        ways["81 shifts, compiled"] = at_all_levels(torch.compile(plain.correlation_by_shifts, dynamic=False))
    return ways


def both_flows(device: torch.device, encoder: str) -> dict[str, Way]:
    torch.manual_seed(0)
    model = MCJEPA(ModelConfig(encoder=encoder), task="mjepa").to(device)
    images = torch.rand(2, 3, *CROP, device=device)

    def learn(flows: list[Tensor]) -> list[Tensor]:
        model.zero_grad()
        sum((f * f).mean() for f in flows).backward()
        return [flows[-1], next(model.encoder.parameters()).grad]

    def encode_once(estimate: Callable) -> list[Tensor]:
        pyramid = model.encode(images)
        return learn(estimate(model.estimator, pyramid, [swap_frames(x) for x in pyramid]))

    def encode_twice() -> list[Tensor]:
        pyramids = [plain.split(model.encode(images[order])) for order in ([0, 1], [1, 0])]
        return learn(plain.join([estimate_flow_pyramid(model.estimator, [*x], [*y]) for x, y in pyramids]))

    return {
        "both at once": lambda: encode_once(estimate_flow_pyramid),
        "encoded once, estimated twice": lambda: encode_once(plain.in_two_passes(estimate_flow_pyramid)),
        "two passes": encode_twice,
    }


def image_losses(device: torch.device) -> dict[str, Way]:
    import kornia

    def theirs(image_1: Tensor, image_2: Tensor, flow: Tensor) -> list[Tensor]:
        rows, columns = (torch.arange(n, device=device) for n in flow.shape[2:])
        x, y = flow[:, 0] + columns, flow[:, 1] + rows[:, None]
        warped = kornia.geometry.transform.remap(image_2, x, y, padding_mode="border", align_corners=True)
        ssim = kornia.losses.ssim_loss(image_1, warped, 3, padding="valid")
        smoothness = kornia.losses.inverse_depth_smoothness_loss(flow, 10 * image_1)  # 10: lambda of Eq. 4
        return [warped, smoothness, ssim]

    def ours(image_1: Tensor, image_2: Tensor, flow: Tensor) -> list[Tensor]:
        warped = warp(image_2, flow)
        return [warped, smoothness_loss(flow, image_1), ssim_distance(image_1, warped).mean()]

    coarse = torch.rand(4, 3, CROP[0] // 16, CROP[1] // 16, device=device)
    inputs = *F.interpolate(coarse, size=CROP, mode="bilinear").chunk(2), 4 * torch.randn(2, 2, *CROP, device=device)
    return {"losses.py": with_gradients(ours, *inputs), "kornia": with_gradients(theirs, *inputs)}


def inference(device: torch.device) -> dict[str, Way]:
    """One pair of Sintel's size. All weights are random: the time does not depend on them."""
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
    if is_installed("ptlflow"):
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it prints what is not compiled
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
    """A training step; returns the loss, the gradient norm of each part, and the gradient of its first parameter."""
    device = next(model.parameters()).device
    warmups = {"masks": torch.full((), True), "regularisation": torch.full((), 1.0)}
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        losses = model(**batch, **warmups)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    norms = [clip_grad_norm_(group["params"], 1.0) for group in optimizer.param_groups]
    optimizer.step()
    return [losses.total.detach(), *norms, *(group["params"][0].grad for group in optimizer.param_groups)]


def paper_batch(device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """What each of 8 processes learns from in one step of the paper's recipe."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"video": (1, 3, *CROP), "views": (IMAGES, 3, 224, 224)}
    return {
        name: tuple(torch.rand(size, generator=generator).to(device) for _ in range(2)) for name, size in sizes.items()
    }


def without_learning(model: nn.Module, fused: bool | None = None) -> torch.optim.Optimizer:
    """AdamW with a learning rate of 0: it costs as much, and all repeats compute the same."""
    return torch.optim.AdamW([{"params": [*part.parameters()]} for part in model.children()], lr=0.0, fused=fused)


def training_step(device: torch.device) -> dict[str, Way]:
    """The whole step as in train.py, on a GPU in bf16, channels_last and compiled, beside a plain one in float32."""
    config, batch, gpu = PRESETS["paper"], paper_batch(device), device.type == "cuda"
    fast, _ = build(config, device)
    run, optimizer = over_processes(replace(config, compile=gpu), fast, device), without_learning(fast, fused=True)
    torch.manual_seed(config.seed)
    slow = plain.PlainMCJEPA().to(device)
    plain_optimizer = without_learning(slow)
    return {
        "train.py --compile" if gpu else "train.py": lambda: one_step(run, optimizer, batch, gpu),
        "plain": lambda: one_step(slow, plain_optimizer, batch, False),
    }


def compiled_step(device: torch.device) -> dict[str, Way]:
    """The step of the preset "pocket" in float32, with --compile and without."""
    config = PRESETS["pocket"]
    torch.manual_seed(0)
    coarse = torch.rand(2, config.video_batch, 3, config.crop[0] // 8, config.crop[1] // 8)
    views = torch.rand(2, config.image_batch, 3, config.image_size, config.image_size)
    video = [F.interpolate(x, size=config.crop, mode="bilinear").to(device) for x in coarse]
    batch = {"video": tuple(video), "views": tuple(views.to(device))}

    def step(compile: bool) -> Way:
        model, _ = build(config, device)
        optimizer = without_learning(model, fused=True)
        run = over_processes(replace(config, compile=compile), model, device)
        return lambda: one_step(run, optimizer, batch, False)

    return {"compiled": step(True), "eager": step(False)}


def embedded_data(device: torch.device) -> dict[str, Way]:
    """The embedded data of a step of the paper's recipe, and the step itself; on a GPU of many steps."""
    workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    steps = 8 * workers or 1
    loaders = [
        iter(make_loader(ShapePairs(IMAGENET_SIZE, CROP), None, 1, workers=workers)),
        iter(make_loader(ShapeImages(IMAGENET_SIZE, (224, 224)), TwoViews(224), IMAGES, workers=workers)),
    ]

    def load() -> None:
        # Each worker has loaded two batches while the step ran: these are not counted as steps.
        for _ in islice(zip(*loaders, strict=True), 2 * workers + steps):
            pass

    step = next(iter(training_step(device).values()))

    def learn() -> None:
        for _ in range(steps):
            step()

    name = f"MovingShapes, {workers} workers, {steps} steps" if workers else "MovingShapes, one process"
    return {name: load, "training step": learn}


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


COMPARISONS = {
    "vicreg-384": Comparison(
        "VICReg loss, 384 x 8192", lambda device: vicreg(device, 384), "10 x, half the memory", "lightly"
    ),
    "vicreg-2048": Comparison(
        "VICReg loss, 2048 x 8192", lambda device: vicreg(device, 2048), "faster, half the memory", "lightly"
    ),
    "correlation": Comparison(
        "correlation, radius 4, five levels of 384 x 832", correlations, "CPU 2 x, GPU 3 x the best"
    ),
    "both-flows": Comparison(
        "both flows of a pair, ConvNeXt-T", lambda device: both_flows(device, "convnext_tiny"), "1.5 x", None, 0.02, 0.2
    ),
    "both-flows-pwc": Comparison(
        "both flows of a pair, PWC encoder", lambda device: both_flows(device, "pwc"), "1.5 x", None, 0.02, 0.2
    ),
    "image-losses": Comparison("warp, SSIM, smoothness of 2 pairs", image_losses, "1.5 x", "kornia", 0.1),
    "inference": Comparison("flow of one pair of 436 x 1024", inference, "faster with the PWC encoder", None, None),
    "step": Comparison("training step, paper's size", training_step, "GPU 3 x", None, 0.02, 0.1),
    "compile": Comparison("training step, pocket's size", compiled_step, "GPU: faster", None, 0.02),
    "shapes": Comparison("embedded data of a step", embedded_data, "never the slower", None, None),
    "propagation": Comparison("label propagation, 480p", propagation, "5 x, a fifth of the memory"),
}
