"""The losses of MC-JEPA (Bardes, Ponce, LeCun, 2023), Eqs. 2 to 6 and VICReg: one pure function each.

Every function stands alone. Copy one, with the import lines below, into your own project and it works there (also
without jaxtyping, in a file that begins with `from __future__ import annotations`). That is why a few lines (the
covariance through the Gram matrix, the masked mean, SSIM) are repeated inside functions instead of being shared.

Conventions: images are RGB in [0, 1]; a flow has channel 0 = x to the right, channel 1 = y down; sums over pixels
and channels are means, so that no coefficient but Eq. 4's depends on the resolution. Statistics need float32 or
float64: call these functions outside of autocast.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


def regression_loss(
    features: Float[Tensor, "b c h w"],
    warped: Float[Tensor, "b c h w"],
    mask: Shaped[Tensor, "b 1 h w"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 2 at one level of the pyramid: the features of a frame against those of the other frame, warped onto it.

    There is no stop-gradient: both arguments get a gradient, and so does the flow, through `warped`. Constant features
    would make the loss 0; `variance_covariance_loss` on the same features prevents that.

    Args:
        features: those of the frame on whose grid the flow lives.
        warped: features of the other frame, warped by that flow.
        mask: bool, or weights >= 0 of the pixels; without it every pixel counts. Where it is 0, values must be finite.

    Returns:
        The mean of the squared difference over the valid pixels of the whole batch and all channels; 0 if no pixel is
        valid. (For the mean over pairs of the mean of each, divide the mask of each pair by its mean, if not 0.)
    """
    squared = (features - warped).square()
    if mask is None:
        return squared.mean()
    weight = mask.to(squared.dtype)
    return (weight * squared).mean() / weight.mean().clamp(min=torch.finfo(squared.dtype).tiny)


def ssim_distance(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h-2 w-2"]:
    """(1 - SSIM) / 2 over windows of 3 x 3 pixels with equal weights, clamped to [0, 1]; 0 where the images agree.

    This form is common in unsupervised flow and depth (C1 = 0.01^2, C2 = 0.03^2, images in [0, 1], no padding). Wang et
    al. (2004) weight an 11 x 11 window by a Gaussian instead.

    Args:
        x, y: in [0, 1], float32 or float64: a variance is the difference of two nearly equal numbers.

    Raises:
        ValueError: an image is smaller than the window, or holds integers.
    """
    if min(*x.shape[2:], *y.shape[2:]) < 3 or not (x.is_floating_point() and y.is_floating_point()):
        seen = f"{x.dtype} {(*x.shape,)}, {y.dtype} {(*y.shape,)}"
        raise ValueError(f"ssim_distance needs floats and at least 3 x 3 pixels, got {seen}")

    # Several times faster on a CPU than avg_pool2d.
    def window_mean(z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h-2 w-2"]:
        z = z[..., :-2] + z[..., 1:-1] + z[..., 2:]
        return (z[..., :-2, :] + z[..., 1:-1, :] + z[..., 2:, :]) / 9

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = window_mean(x), window_mean(y)
    products, squares = 2 * mean_x * mean_y, mean_x.square() + mean_y.square()
    covariance_twice = 2 * window_mean(x * y) - products
    variance_sum = window_mean(x * x + y * y) - squares
    similarity = (products + c1) * (covariance_twice + c2) / ((squares + c1) * (variance_sum + c2))
    return ((1 - similarity) / 2).clamp(0, 1)


def reconstruction_loss(
    image: Float[Tensor, "b c h w"],
    warped: Float[Tensor, "b c h w"],
    mask: Shaped[Tensor, "b 1 h w"] | None = None,
    l1: float = 1.0,
    l2: float = 1.0,
    ssim: float = 1.0,
) -> Float[Tensor, ""]:
    """Eq. 3: a frame against the other frame, warped onto it: l1 |.| + l2 (.)^2 + ssim (1 - SSIM) / 2.

    Args:
        image: the frame on whose grid the flow lives, in [0, 1], float32 or float64 (see `ssim_distance`).
        warped: the other frame, warped by that flow.
        mask: bool, or weights >= 0 of the pixels; without it every pixel counts. Where it is 0, values must be finite.
            SSIM has no value on the outermost ring of pixels, so it uses the mask without that ring.
        l1, l2, ssim: the weights of the three parts; a part of weight 0 is not computed.

    Returns:
        The weighted sum of the three masked means (over the valid pixels of the whole batch and the channels); 0 if no
        pixel is valid.

    Raises:
        ValueError: an image is smaller than SSIM's window, or holds integers (unless `ssim` is 0).
    """
    floats = image.is_floating_point() and warped.is_floating_point()
    if ssim and (min(*image.shape[2:], *warped.shape[2:]) < 3 or not floats):
        seen = f"{image.dtype} {(*image.shape,)}, {warped.dtype} {(*warped.shape,)}"
        raise ValueError(f"reconstruction_loss: its SSIM needs floats and at least 3 x 3 pixels, got {seen}")

    def masked_mean(value: Float[Tensor, "b c h w"], mask: Shaped[Tensor, "b 1 h w"] | None) -> Float[Tensor, ""]:
        if mask is None:
            return value.mean()
        weight = mask.to(value.dtype)
        return (weight * value).mean() / weight.mean().clamp(min=torch.finfo(value.dtype).tiny)

    difference = image - warped
    loss = difference.new_zeros(())
    if l1:
        loss = loss + l1 * masked_mean(difference.abs(), mask)
    if l2:
        loss = loss + l2 * masked_mean(difference.square(), mask)
    if ssim:
        # Several times faster on a CPU than avg_pool2d.
        def window_mean(z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h-2 w-2"]:
            z = z[..., :-2] + z[..., 1:-1] + z[..., 2:]
            return (z[..., :-2, :] + z[..., 1:-1, :] + z[..., 2:, :]) / 9

        c1, c2 = 0.01**2, 0.03**2
        mean_x, mean_y = window_mean(image), window_mean(warped)
        products, squares = 2 * mean_x * mean_y, mean_x.square() + mean_y.square()
        covariance_twice = 2 * window_mean(image * warped) - products
        variance_sum = window_mean(image * image + warped * warped) - squares
        similarity = (products + c1) * (covariance_twice + c2) / ((squares + c1) * (variance_sum + c2))
        inside = None if mask is None else mask[..., 1:-1, 1:-1]
        loss = loss + ssim * masked_mean(((1 - similarity) / 2).clamp(0, 1), inside)
    return loss


def smoothness_loss(
    flow: Float[Tensor, "b 2 h w"],
    image: Float[Tensor, "b c h w"],
    edge_weight: float = 10.0,
    order: int = 1,
    charbonnier: float = 0.0,
) -> Float[Tensor, ""]:
    """Eq. 4: differences of the flow between neighbouring pixels, tolerated where the image has an edge.

    mean(exp(-edge_weight |dI/dx|) |d^n f/dx^n|) + the same over y, with n = `order`, and |dI/dx| the mean over the
    image's channels. The paper's formula drops the bars around the image gradient; without them an edge from dark
    to bright would be penalised and one from bright to dark would explode. A second difference takes the image's edge
    between its middle and its far pixel, as ARFlow does.

    Published coefficients, brought to this sum: ARFlow's function takes a quarter of it at order 1 and half of it at
    order 2, of the flow divided by min(h, w) (75 at order 2 for KITTI becomes 37.5, 50 at order 1 for Sintel 12.5).
    UFlow's takes half of it at order 1, of the flow at stride 4 in pixels of that size, with `charbonnier` 0.001.

    Args:
        flow: the caller scales it; divided by min(h, w) for the coefficients of this project and of ARFlow.
        image: the frame on whose grid the flow lives, in [0, 1].
        edge_weight: lambda of Eq. 4.
        order: 1 (a constant flow costs nothing) or 2 (an affine flow costs nothing).
        charbonnier: if not 0, sqrt(x^2 + charbonnier^2) stands in place of |x|.

    Raises:
        ValueError: order is neither 1 nor 2, or no less than a side of the flow.
    """
    if order not in (1, 2) or min(flow.shape[2:]) <= order:
        raise ValueError(f"smoothness_loss: order must be 1 or 2, below each side, got {order}, {(*flow.shape,)}")
    loss = flow.new_zeros(())
    for axis in (3, 2):
        difference = flow.diff(n=order, dim=axis)
        weight = torch.exp(-edge_weight * image.diff(dim=axis).abs().mean(dim=1, keepdim=True))
        weight = weight.narrow(axis, order - 1, difference.shape[axis])
        size = (difference.square() + charbonnier**2).sqrt() if charbonnier else difference.abs()
        loss = loss + (weight * size).mean()
    return loss


def cycle_consistency_loss(
    features: Float[Tensor, "b c h w"],
    cycled: Float[Tensor, "b c h w"],
    mask: Shaped[Tensor, "b 1 h w"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 5 at one level of the pyramid: features against themselves after a warp there and back.

    As in Eq. 2 there is no stop-gradient, and constant features would make it 0.

    Args:
        features: those of one frame.
        cycled: the same features, warped by the flow of one direction and then by the flow of the other.
        mask: bool, or weights >= 0 of the pixels; without it every pixel counts. Where it is 0, values must be finite.

    Returns:
        The mean of the squared difference over the valid pixels of the whole batch and all channels; 0 if no pixel is
        valid. (For the mean over pairs of the mean of each, divide the mask of each pair by its mean, if not 0.)
    """
    squared = (features - cycled).square()
    if mask is None:
        return squared.mean()
    weight = mask.to(squared.dtype)
    return (weight * squared).mean() / weight.mean().clamp(min=torch.finfo(squared.dtype).tiny)


def variance_loss(x: Float[Tensor, "n d"], gamma: float = 1.0, eps: float = 1e-4) -> Float[Tensor, ""]:
    """The variance term of VICReg: mean over the variables of max(0, gamma - sqrt(var + eps)), var unbiased.

    Args:
        x: n samples of d variables, in float32 or float64, outside of autocast.
        gamma: the standard deviation above which each variable is held.
        eps: keeps the root differentiable where a variable is constant.

    Raises:
        ValueError: there are fewer than two samples.
    """
    if x.shape[0] < 2:
        raise ValueError(f"variance_loss: needs at least 2 samples, got {x.shape[0]}")
    return F.relu(gamma - torch.sqrt(x.var(dim=0) + eps)).mean()


def covariance_loss(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The covariance term of VICReg: the sum of the squared off-diagonal entries of the covariance, divided by d.

    For n < d the d x d covariance C = X'X / (n - 1) is never formed: ||X'X|| = ||XX'|| (Frobenius), and its diagonal
    is the variance, so the sum is ||XX'||^2 / (n - 1)^2 - sum(var^2), at a cost of O(min(n, d) n d).

    Args:
        x: n samples of d variables, in float32 or float64, outside of autocast.

    Raises:
        ValueError: there are fewer than two samples.
    """
    n, d = x.shape
    if n < 2:
        raise ValueError(f"covariance_loss: needs at least 2 samples, got {n}")
    x = x - x.mean(dim=0)
    if n >= d:
        return (x.T @ x / (n - 1)).fill_diagonal_(0).square().sum() / d
    variance = x.square().sum(dim=0) / (n - 1)
    return ((x @ x.T / (n - 1)).square().sum() - variance.square().sum()) / d


def variance_covariance_loss(
    features: Float[Tensor, "b c h w"],
    variance_weight: float,
    covariance_weight: float,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 6 at one level of the pyramid: VICReg's variance and covariance terms, which keep the features from collapse.

    The b * h * w positions are the samples, the channels are the variables.

    Args:
        features: those of one level, both frames stacked along b, in float32 or float64, outside of autocast.
        variance_weight, covariance_weight: the level's coefficients; with a covariance_weight of 0 the covariance, the
            costly part, is not computed.
        sum_over_processes: sums a tensor over all processes, and so does its backward pass, which DDP's mean makes up
            for; then the statistics are those of all processes' positions. (Only moments are sent: 3 MB for
            ConvNeXt-T, in place of 45 MB of features.)

    Returns:
        variance_weight * variance term + covariance_weight * covariance term.

    Raises:
        ValueError: there are fewer than two positions in this process.
    """
    n, d = features.numel() // features.shape[1], features.shape[1]
    if n < 2:
        raise ValueError(f"variance_covariance_loss: needs at least 2 positions, got {n}")
    variance, mean = torch.var_mean(features, dim=(0, 2, 3))
    if sum_over_processes is not None:
        n_here, mean_here = n, mean
        n = sum_over_processes(mean.new_full((), n_here))
        mean = sum_over_processes(n_here * mean_here) / n
        squares = (n_here - 1) * variance + n_here * (mean_here - mean).square()  # summed, about the mean of all
        variance = sum_over_processes(squares) / (n - 1)
    # Each deviation is held at 1 or more; 1e-4 keeps the root differentiable (both as in VICReg's code).
    loss = variance_weight * F.relu(1 - torch.sqrt(variance + 1e-4)).mean()
    if covariance_weight:
        x = features.permute(0, 2, 3, 1).flatten(0, 2) - mean
        if sum_over_processes is None and n < d:  # the same sum of squares; see `covariance_loss`
            off_diagonal = (x @ x.T / (n - 1)).square().sum() - variance.square().sum()
        else:
            product = x.T @ x if sum_over_processes is None else sum_over_processes(x.T @ x)
            off_diagonal = (product / (n - 1)).fill_diagonal_(0).square().sum()
        loss = loss + covariance_weight * off_diagonal / d
    return loss


def vicreg_loss(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """VICReg (Bardes, Ponce, LeCun, 2022) on the embeddings of two views; the caller weighs the terms (25, 25, 1).

    As in the official code, the invariance is the mean squared difference, the variance term is averaged over the two
    views, and the covariance term is summed over them. With several processes, gather x and y with gradients first.

    Args:
        x, y: n embeddings of d dimensions, row i of both from the same image; float32 or float64, outside of autocast.

    Returns:
        The tuple (invariance, variance, covariance), unweighted.

    Raises:
        ValueError: x and y differ in shape, or there are fewer than two samples.
    """
    n, d = x.shape
    if n < 2 or x.shape != y.shape:
        raise ValueError(f"vicreg_loss: needs two views of at least 2 samples, got {(*x.shape,)} and {(*y.shape,)}")
    variance_term, covariance_term = x.new_zeros(()), x.new_zeros(())
    for z in (x, y):
        z = z - z.mean(dim=0)
        variance = z.square().sum(dim=0) / (n - 1)
        # Each deviation is held at 1 or more; 1e-4 keeps the root differentiable.
        variance_term = variance_term + F.relu(1 - torch.sqrt(variance + 1e-4)).mean() / 2
        if n < d:  # the same sum of squares; see `covariance_loss`
            off_diagonal = (z @ z.T / (n - 1)).square().sum() - variance.square().sum()
        else:
            off_diagonal = (z.T @ z / (n - 1)).fill_diagonal_(0).square().sum()
        covariance_term = covariance_term + off_diagonal / d
    return F.mse_loss(x, y), variance_term, covariance_term
