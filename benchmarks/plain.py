"""The usual formulations, with which our fast ones are compared."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import flow
import mcjepa
from mcjepa import MCJEPA


def correlation_by_shifts(x: Tensor, y: Tensor, radius: int = 4) -> Tensor:
    """The cost volume, one shift of y after the other."""
    h, w = x.shape[2:]
    y = F.pad(y, (radius, radius, radius, radius))
    side = range(2 * radius + 1)
    return torch.stack([(x * y[:, :, i : i + h, j : j + w]).mean(dim=1) for i in side for j in side], dim=1)


def correlation_by_unfolding(x: Tensor, y: Tensor, radius: int = 4) -> Tensor:
    """The cost volume from all windows of y, side by side in memory."""
    b, c, h, w = x.shape
    windows = F.unfold(y, 2 * radius + 1, padding=radius).view(b, c, -1, h, w)
    return torch.einsum("bchw,bckhw->bkhw", x, windows) / c


def vicreg(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of VICReg with d x d covariances, as published."""
    variance, covariance = x.new_zeros(()), x.new_zeros(())
    for z in (x, y):
        variance = variance + F.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean() / 2
        z = z - z.mean(dim=0)
        matrix = (z.T @ z) / (z.shape[0] - 1)
        off_diagonal = matrix - torch.diag(matrix.diagonal())
        covariance = covariance + off_diagonal.square().sum() / z.shape[1]
    return F.mse_loss(x, y), variance, covariance


def propagate(
    target: Tensor, context: Tensor, labels: Tensor, radius: int = 12, topk: int = 5, temperature: float = 0.1
) -> Tensor:
    """Label propagation as in DINO: a masked affinity of all cells with all cells."""
    h, w = target.shape[1:]
    target, context = F.normalize(target, dim=0), F.normalize(context, dim=1)
    affinity = torch.exp(torch.einsum("dp,ndq->nqp", target.flatten(1), context.flatten(2)) / temperature)
    rows, columns = torch.arange(h, device=target.device), torch.arange(w, device=target.device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    near = [(v.flatten()[:, None] - v.flatten()[None]).abs() <= radius for v in (y, x)]
    affinity = (affinity * (near[0] & near[1])).flatten(0, 1)
    least = affinity.topk(topk, dim=0).values[-1]
    affinity[affinity < least] = 0
    affinity = affinity / affinity.sum(dim=0)
    return (labels.transpose(0, 1).flatten(1) @ affinity).view(-1, h, w)


def split(pyramid: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """A pyramid of the frames [1; 2] as that of frame 1 and that of frame 2."""
    return list(zip(*(level.chunk(2) for level in pyramid), strict=True))


def join(pyramids: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The inverse of `split`."""
    return [torch.cat(levels) for levels in zip(*pyramids, strict=True)]


def in_two_passes(estimate: Callable) -> Callable:
    """An estimator of both directions at once, as two calls of it."""

    def estimate_twice(estimator, source: Sequence[Tensor], target: Sequence[Tensor]) -> list[Tensor]:
        return join([estimate(estimator, [*s], [*t]) for s, t in zip(split(source), split(target), strict=True)])

    return estimate_twice


class PlainMCJEPA(MCJEPA):
    """The same model, written plainly: a pass of the encoder for each frame and view, one of the estimator for each
    direction, 81 shifts, d x d covariances in VICReg. (The expander and Eq. 6 are the same.)"""

    def _encode(self, images: Tensor) -> list[Tensor]:
        return join([super(PlainMCJEPA, self)._encode(half) for half in images.chunk(2)])

    def forward(self, *arguments, **keywords) -> mcjepa.Losses:
        with ExitStack() as stack:
            for module, name, other in (
                (mcjepa, "estimate_flow_pyramid", in_two_passes(flow.estimate_flow_pyramid)),
                (mcjepa.losses, "vicreg_loss", vicreg),
                (flow, "correlation", correlation_by_shifts),
            ):
                stack.enter_context(patch.object(module, name, other))
            return super().forward(*arguments, **keywords)
