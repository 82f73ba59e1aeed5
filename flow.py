"""Optical flow: warping, correlation, occlusion masks, and the coarse-to-fine estimator of MC-JEPA (Eq. 1).

A flow is (b, 2, h, w), float32, channel 0 = x to the right, channel 1 = y down, in pixels of its own resolution. The
flow from frame t to t+1 lives on the grid of frame t: the point p of frame t is found in frame t+1 at p + flow(p).

    flows = estimate_flow_pyramid(estimator, pyramid_1, pyramid_2)   # from frame 1 to frame 2, coarsest first
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

NORMS = ("none", "layer", "l2", "layer+l2")


def warp(
    x: Float[Tensor, "b c h w"], flow: Float[Tensor, "b 2 h w"], padding: str = "border"
) -> Float[Tensor, "b c h w"]:
    """Backward warp: the value at p is x at p + flow(p), bilinear. `warp(x_t1, flow_t_to_t1)` looks like x_t.

    Args:
        x: an image or features of frame t+1.
        flow: from frame t to frame t+1, in pixels, on the grid of frame t.
        padding: what lies outside of x: "border" (its nearest pixel) or "zeros".

    Raises:
        ValueError: another padding (from torch).
    """
    h, w = x.shape[2:]
    u, v = flow.unbind(dim=1)
    # align_corners=True: -1 and 1 are the centres of the outermost pixels, and a pixel measures 2 / (size - 1).
    columns = torch.linspace(-1, 1, w, device=flow.device, dtype=flow.dtype)
    rows = torch.linspace(-1, 1, h, device=flow.device, dtype=flow.dtype).unsqueeze(1)
    grid = torch.stack(
        (torch.add(columns, u, alpha=2 / max(w - 1, 1)), torch.add(rows, v, alpha=2 / max(h - 1, 1))), dim=3
    )
    if x.device.type != "cuda":  # on a CPU torch's kernel writes outside of its memory where a coordinate is NaN
        grid = grid.nan_to_num(0.0)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=True)


def resize_flow(flow: Float[Tensor, "b 2 h w"], size: Sequence[int]) -> Float[Tensor, "b 2 h2 w2"]:
    """Resizes a flow bilinearly and rescales its values to the new pixels, x and y separately.

    Args:
        flow: in pixels of h x w.
        size: the new (height, width).
    """
    h, w = flow.shape[2:]
    if (h, w) == tuple(size):
        return flow
    u, v = F.interpolate(flow, size=tuple(size), mode="bilinear", align_corners=False).unbind(dim=1)
    return torch.stack((u * (size[1] / w), v * (size[0] / h)), dim=1)


def correlation(
    x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"], radius: int = 4
) -> Float[Tensor, "b (2*{radius}+1)**2 h w"]:
    """The cost volume of PWC-Net: each pixel of x times the pixels of y around it, averaged over the channels.

    Returns:
        Channel (dy + radius) (2 radius + 1) + dx + radius compares x at p with y at p + (dx, dy); 0 outside of y.
    """
    b, c, h, w = x.shape
    side, tile = 2 * radius + 1, max(2 * radius, 1)
    rows, columns = -(-h // tile), -(-w // tile)
    below, right = rows * tile - h, columns * tile - w
    # Works on tiles of 2r x 2r pixels. All that a tile of x meets within r pixels lies in 2 x 2 tiles of y, shifted by
    # r. One small matrix product per tile holds all pairs, and each pixel keeps the window around itself from its row.
    # This computes three times more products than needed, and is still several times faster than shifting y 81 times.
    x = F.pad(x / c, (0, right, 0, below)).view(b, c, rows, tile, columns, tile)
    x = x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)  # b rows columns tile^2 c
    y = F.pad(y, (radius, tile - radius + right, radius, tile - radius + below))
    y = y.view(b, c, rows + 1, tile, columns + 1, tile)
    y = torch.cat((y[:, :, :-1], y[:, :, 1:]), dim=3)
    y = torch.cat((y[:, :, :, :, :-1], y[:, :, :, :, 1:]), dim=5)
    y = y.permute(0, 2, 4, 1, 3, 5).flatten(4)  # b rows columns c (2 tile)^2
    products = torch.matmul(x, y).contiguous()
    # Pixel (i, j) of a tile, at (k, l) of its window from 0, is in row i tile + j and column (i + k) 2 tile + j + l.
    wide = 2 * tile
    pixel = wide**2
    of_tile = tile**2 * pixel
    volume = products.as_strided(
        (b, side, side, rows, tile, columns, tile),
        (rows * columns * of_tile, wide, 1, columns * of_tile, tile * pixel + wide, of_tile, pixel + 1),
    )
    return volume.reshape(b, side**2, rows * tile, columns * tile)[:, :, :h, :w]


def standardise(
    x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"], eps: float = 1e-6
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Brings each channel of a pair's features to mean 0 and standard deviation 1 over the pixels of both frames.

    UFlow (Jonschkowski et al., 2020) does this before its cost volume, with moments over the channels too. Without it,
    the correlation mostly reflects the channels' means, and nothing is learned.
    """
    both = torch.stack((x, y))
    both = both.to(torch.promote_types(both.dtype, torch.float32))  # a variance of bf16 numbers has too few digits
    variance, mean = torch.var_mean(both, dim=(0, 3, 4), keepdim=True, correction=0)
    x, y = (both - mean) * torch.rsqrt(variance + eps)
    return x, y


def forward_backward_mask(
    flow: Float[Tensor, "b 2 h w"],
    flow_reverse: Float[Tensor, "b 2 h w"],
    alpha1: float = 0.01,
    alpha2: float = 0.5,
) -> Bool[Tensor, "b 1 h w"]:
    """True where a pixel is seen in both frames: there the flow and the reverse flow at its end cancel out.

    |f + b(f)|^2 < alpha1 (|f|^2 + |b(f)|^2) + alpha2 (Sundaram et al., 2010; the numbers are those of UnFlow and
    ARFlow). Outside of the other frame b fades to 0 within a pixel, so a pixel that leaves it is occluded, unless its
    flow is shorter than about sqrt(alpha2) or it leaves by a small part of a pixel (0.15 px at a flow of 10 px). The
    mask carries no gradient.

    Args:
        flow: from this frame to the other, in pixels.
        flow_reverse: from the other frame to this one, on the other frame's grid.
    """
    with torch.no_grad():
        back = warp(flow_reverse, flow, padding="zeros")
        bound = alpha1 * (flow.square() + back.square()).sum(dim=1, keepdim=True) + alpha2
        return (flow + back).square().sum(dim=1, keepdim=True) < bound


def range_map(flow: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 1 h w"]:
    """How often each pixel of the target frame is hit when every pixel moves along the flow (Wang et al., 2018).

    Each pixel spreads a weight of 1 bilinearly over the four pixels around its end; what falls outside is lost. A
    pixel of frame t that the flow from t+1 to t does not hit (ARFlow: below 0.2) is not visible in frame t+1. The map
    carries no gradient.
    """
    with torch.no_grad():
        b, _, h, w = flow.shape
        x = torch.arange(w, device=flow.device, dtype=flow.dtype).view(1, 1, w) + flow[:, 0]
        y = torch.arange(h, device=flow.device, dtype=flow.dtype).view(1, h, 1) + flow[:, 1]
        hits = flow.new_zeros(b, h * w)
        for row in (y.floor(), y.floor() + 1):
            for column in (x.floor(), x.floor() + 1):
                weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
                inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
                index = torch.where(inside, row.long() * w + column.long(), 0)  # float32 has no odd number above 2^24
                hits.scatter_add_(1, index.flatten(1), torch.where(inside, weight, 0).flatten(1))
        return hits.view(b, 1, h, w)


class LevelEstimator(nn.Module):
    """The estimator of one level: 3 x 3 convolutions 128-128-96-64-32 times `factor`, then 2 channels of flow.

    LeakyReLU 0.1 after each but the last, and the normalisation of the paper's Table 3: "layer" = LayerNorm over the
    channels before each LeakyReLU, "l2" = unit length before the last convolution, "layer+l2", "none".
    """

    def __init__(self, channels: int, factor: float, norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (128, 128, 96, 64, 32):
            width = round(width * factor)
            convolution = nn.Conv2d(channels, width, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, a=0.1)
            nn.init.zeros_(convolution.bias)
            layers.append(convolution)
            if "layer" in norm:
                layers.append(LayerNorm2d(width, eps=1e-6))
            layers.append(nn.LeakyReLU(0.1))
            channels = width
        self.body = nn.Sequential(*layers)
        self.unit_length = "l2" in norm
        self.last = nn.Conv2d(channels, 2, 3, padding=1)
        # The first outputs are about a quarter unit, whatever the width and norm. With ten times smaller ones the flow
        # learns more slowly: after 300 steps on MovingShapes its error is 0.54 of zero flow's, instead of 0.33.
        length = 3.0 if self.unit_length else 0.7 * math.sqrt(9 * channels)  # usual norm of the 3 x 3 pixels seen
        nn.init.normal_(self.last.weight, std=0.25 / length)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 h w"]:
        """The update of the flow, in the estimator's unit, from the stack of correlation, both features and flow."""
        x = self.body(x)
        return self.last(F.normalize(x, dim=1) if self.unit_length else x)


class FlowEstimator(nn.Module):
    """g of Eq. 1: one `LevelEstimator` for each level of a pyramid down to stride 4.

    It has no forward of its own: `estimate_flow_pyramid` runs it.

    Args:
        channels, strides: those of the pyramid's levels, coarsest first; levels finer than stride 4 are left out.
        factor: scales the widths (paper, Table 3: 1 gives 2M parameters; 2, the default, gives 8M).
        norm: "none", "layer" (paper), "l2" or "layer+l2".
        radius: that of the correlation, in pixels of the level.
        reduced: to how many channels a 1 x 1 convolution brings each frame's standardised features, as inputs beside
            the correlation (which uses all of them).
        clip: the flow's largest value in x and y, in pixels of the image.
        unit: what an output of 1 means, at every level, in pixels of the image. (In pixels of its level, 0.25 at
            stride 64 would already be 16 pixels of the image: noise that the finer levels must undo. PWC-Net, too, has
            one unit for all levels, 20 pixels.)

    Raises:
        ValueError: the norm is unknown, or the factor is so small that no channels are left.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        factor: float = 2.0,
        norm: str = "layer",
        radius: int = 4,
        reduced: int = 16,
        clip: float = 128.0,
        unit: float = 16.0,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"unknown estimator norm {norm!r}: choose one of {', '.join(NORMS)}")
        if round(32 * factor) < 1:
            raise ValueError(f"estimator factor {factor:g} leaves no channels: take a larger one")
        self.strides = [stride for stride in strides if stride >= 4]
        self.radius, self.clip, self.unit = radius, clip, unit
        levels = len(self.strides)
        self.projections = nn.ModuleList(nn.Conv2d(c, reduced, 1) for c in channels[:levels])
        inputs = (2 * radius + 1) ** 2 + 2 * reduced + 2
        self.levels = nn.ModuleList(LevelEstimator(inputs, factor, norm) for _ in self.strides)


def estimate_flow_pyramid(
    estimator: FlowEstimator,
    source: list[Float[Tensor, "b _ _ _"]],
    target: list[Float[Tensor, "b _ _ _"]],
) -> list[Float[Tensor, "b 2 _ _"]]:
    """Eq. 1, coarse to fine: the flow from source to target at each level of the estimator.

    Both directions of a pair take a single pass: stack the frames, [1; 2] as the source and [2; 1] as the target. (The
    paper moves the source's features forward; we sample the target's backward. The set of terms is the same, since all
    losses are taken in both directions.)

    Args:
        source, target: feature pyramids, coarsest first, of the frames in which the flow starts and ends.

    Returns:
        Flows on the source's grid, in pixels of their level, coarsest first, the last at stride 4.
    """
    flows: list[Tensor] = []
    for level, stride in enumerate(estimator.strides):
        x, y = standardise(source[level], target[level])
        size = x.shape[2:]
        flow = resize_flow(flows[-1], size) if flows else x.new_zeros(x.shape[0], 2, *size)
        y = warp(y, flow)
        # The mean of c products of standardised, unrelated features has a standard deviation of 1 / sqrt(c). Scaled to
        # 1, the correlation weighs as much as the estimator's other inputs, and learning is much faster.
        volume = F.leaky_relu(correlation(x, y, estimator.radius) * math.sqrt(x.shape[1]), 0.1)
        project = estimator.projections[level]
        # Under autocast all four are bf16 here, as the first convolution wants them: one tensor instead of two.
        inputs = (volume, project(x), project(y), flow.to(volume.dtype))
        update = estimator.levels[level](torch.cat(inputs, dim=1))
        update = update.to(flow.dtype) * (estimator.unit / stride)  # a bf16 update, added in float32
        bound = estimator.clip / stride
        flows.append((flow + update).clamp(-bound, bound))
    return flows
