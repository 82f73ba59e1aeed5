"""Eqs. 2-6 and the VICReg loss against float64 loops, the original authors' numbers, and what must always hold.

The loops below are written from the equations, pixel by pixel, and share nothing with losses.py. The golden numbers
come from the published code of VICReg and ARFlow (tests/golden). How to run: `pytest tests/test_losses.py`.
"""

import ast
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import losses

GOLDEN = Path(__file__).parent / "golden"
PUBLIC = [
    "regression_loss",
    "ssim_distance",
    "reconstruction_loss",
    "smoothness_loss",
    "cycle_consistency_loss",
    "variance_loss",
    "covariance_loss",
    "variance_covariance_loss",
    "vicreg_loss",
]

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31 - 1)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(3, 7), st.integers(3, 7))


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hard_mask(seed, b, h, w):
    """A Boolean mask with at least one pixel inside and one outside, both of them on the 3x3 windows' centres' grid."""
    mask = uniform(seed, b, 1, h, w) > 0.4
    mask[0, 0, 1, 1] = True
    mask[-1, 0, h - 2, w - 1] = False
    return mask


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


# --- the oracles: loops over every pixel, sample and feature ---------------------------------------------------------
def loop_masked_mean(values, mask):
    """sum(mask * values) / (sum(mask) * channels), one element at a time; 0 without a valid pixel."""
    values, (b, c, h, w) = values.tolist(), values.shape
    mask = mask.double().tolist()
    total, weight = 0.0, 0.0
    for n in range(b):
        for i in range(h):
            for j in range(w):
                weight += mask[n][0][i][j]
                total += sum(mask[n][0][i][j] * values[n][k][i][j] for k in range(c))
    return total / (weight * c) if weight else 0.0


def loop_ssim_distance(x, y):
    b, c, h, w = x.shape
    c1, c2 = 0.01**2, 0.03**2
    out = torch.zeros(b, c, h - 2, w - 2, dtype=torch.float64)
    for n, k, i, j in np.ndindex(b, c, h - 2, w - 2):
        p = [float(x[n, k, i + di, j + dj]) for di in range(3) for dj in range(3)]
        q = [float(y[n, k, i + di, j + dj]) for di in range(3) for dj in range(3)]
        mean_p, mean_q = sum(p) / 9, sum(q) / 9
        var_p = sum((a - mean_p) ** 2 for a in p) / 9
        var_q = sum((a - mean_q) ** 2 for a in q) / 9
        cov = sum((a - mean_p) * (d - mean_q) for a, d in zip(p, q, strict=True)) / 9
        ssim = (2 * mean_p * mean_q + c1) * (2 * cov + c2) / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
        out[n, k, i, j] = min(max((1 - ssim) / 2, 0.0), 1.0)
    return out


def loop_smoothness(flow, image, edge_weight, order):
    """Eq. 4: the differences of the flow, each weighted by the image's step at the difference's far end."""
    b, _, h, w = flow.shape
    result = 0.0
    for along_x in (True, False):
        terms = []
        dx, dy = (1, 0) if along_x else (0, 1)
        for n, i, j in np.ndindex(b, h - order * dy, w - order * dx):
            a, z = (i + (order - 1) * dy, j + (order - 1) * dx), (i + order * dy, j + order * dx)
            step = sum(abs(float(image[n, k, z[0], z[1]] - image[n, k, a[0], a[1]])) for k in range(3)) / 3
            for k in range(2):
                first = float(flow[n, k, i + dy, j + dx] - flow[n, k, i, j])
                if order == 1:
                    difference = first
                else:
                    difference = float(flow[n, k, i + 2 * dy, j + 2 * dx] - flow[n, k, i + dy, j + dx]) - first
                terms.append(abs(difference) * math.exp(-edge_weight * step))
        result += sum(terms) / len(terms)
    return result


def loop_variance(x, gamma=1.0, eps=1e-4):
    n, d = x.shape
    total = 0.0
    for k in range(d):
        column = x[:, k].tolist()
        mean = sum(column) / n
        variance = sum((value - mean) ** 2 for value in column) / (n - 1)
        total += max(0.0, gamma - math.sqrt(variance + eps))
    return total / d


def loop_covariance(x):
    n, d = x.shape
    columns = [x[:, k].tolist() for k in range(d)]
    means = [sum(column) / n for column in columns]
    total = 0.0
    for k in range(d):
        for m in range(d):
            if k != m:
                products = ((columns[k][s] - means[k]) * (columns[m][s] - means[m]) for s in range(n))
                total += (sum(products) / (n - 1)) ** 2
    return total / d


# --- Eq. 2 and Eq. 5: the masked mean of the squared difference ------------------------------------------------------
squared_losses = pytest.mark.parametrize("loss", [losses.regression_loss, losses.cycle_consistency_loss])


@squared_losses
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_squared_difference_losses_equal_the_loops(loss, kind):
    x, y = normal(0, 2, 3, 4, 5), normal(1, 2, 3, 4, 5)
    mask = {"none": None, "bool": hard_mask(2, 2, 4, 5), "float": uniform(3, 2, 1, 4, 5)}[kind]
    expected = loop_masked_mean((x - y) ** 2, torch.ones(2, 1, 4, 5) if mask is None else mask)
    close(loss(x, y, mask), expected)
    close(loss(x, y) if mask is None else loss(x, y, mask=mask), expected)


@squared_losses
def test_a_masked_mean_divides_by_the_masks_sum_and_not_by_the_number_of_pixels(loss):
    x, mask = torch.zeros(1, 2, 4, 4, dtype=torch.float64), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 0, 0] = True
    close(loss(x, x + 3, mask), 9.0)
    close(loss(x, x + 3, 0.25 * mask.double()), 9.0)


@squared_losses
@few
@given(seed=seeds, size=sizes)
def test_squared_difference_losses_are_zero_for_equal_symmetric_and_never_negative(loss, seed, size):
    x, y = normal(seed, *size), normal(seed + 1, *size)
    mask = hard_mask(seed, size[0], *size[2:])
    assert loss(x, x, mask) == 0
    assert loss(x, y, mask) > 0
    close(loss(x, y, mask), loss(y, x, mask))


@squared_losses
@few
@given(seed=seeds, size=sizes)
def test_squared_difference_losses_do_not_see_masked_pixels_nor_the_order_of_the_batch(loss, seed, size):
    x, y = normal(seed, *size), normal(seed + 1, *size)
    mask = hard_mask(seed, size[0], *size[2:])
    elsewhere = torch.where(mask, y, 1e3 * normal(seed + 2, *size))
    close(loss(x, elsewhere, mask), loss(x, y, mask))
    order = torch.randperm(size[0], generator=torch.Generator().manual_seed(seed))
    close(loss(x[order], y[order], mask[order]), loss(x, y, mask))
    close(loss(x, y, mask.double()), loss(x, y, mask))
    close(loss(x, y, torch.ones_like(mask)), loss(x, y))


@squared_losses
def test_squared_difference_losses_send_gradients_to_both_maps_and_only_through_seen_pixels(loss):
    x, y = normal(0, 2, 3, 4, 5).requires_grad_(), normal(1, 2, 3, 4, 5).requires_grad_()
    mask = hard_mask(2, 2, 4, 5)
    loss(x, y, mask).backward()
    expected = 2 * (x - y).detach() * mask / (mask.sum() * 3)
    close(x.grad, expected)
    close(y.grad, -expected)


@pytest.mark.parametrize("name", ["regression_loss", "cycle_consistency_loss", "reconstruction_loss"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_without_a_valid_pixel_gives_zero_and_zero_gradients(name, dtype):
    x, y = uniform(0, 2, 3, 5, 6).requires_grad_(), uniform(1, 2, 3, 5, 6).requires_grad_()
    value = getattr(losses, name)(x, y, torch.zeros(2, 1, 5, 6, dtype=dtype))
    assert value == 0
    value.backward()
    assert (x.grad == 0).all() and (y.grad == 0).all()


# --- Eq. 3 -----------------------------------------------------------------------------------------------------------
def test_ssim_distance_equals_the_loops():
    x, y = uniform(0, 2, 3, 5, 6), uniform(1, 2, 3, 5, 6)
    close(losses.ssim_distance(x, y), loop_ssim_distance(x, y), 1e-10)


def test_ssim_distance_equals_the_published_code():
    numbers = golden("photometric")
    close(losses.ssim_distance(numbers["image"], numbers["other"]), numbers["ssim_distance_3x3_valid"], 1e-10)


def test_ssim_distance_stays_right_in_float32():
    numbers = golden("photometric")
    distance = losses.ssim_distance(numbers["image"].float(), numbers["other"].float())
    assert distance.dtype == torch.float32
    close(distance, numbers["ssim_distance_3x3_valid"], 1e-4)


@pytest.mark.parametrize("size", [(2, 5), (5, 2), (1, 1)])
def test_ssim_of_an_image_smaller_than_its_window_is_refused(size):
    x = uniform(0, 1, 3, *size)
    for name in ("ssim_distance", "reconstruction_loss"):
        with pytest.raises(ValueError, match=f"{name}: .*at least 3 x 3 pixels, got torch.float64, .*{size[1]}"):
            getattr(losses, name)(x, x)
    assert losses.reconstruction_loss(x, x, ssim=0.0) == 0


@pytest.mark.parametrize("name", ["ssim_distance", "reconstruction_loss"])
def test_ssim_of_integers_is_refused_for_their_sums_would_wrap_around(name):
    """Without the checks of the annotations, as in a project that has copied the function."""
    x = (255 * uniform(0, 1, 3, 8, 8)).to(torch.uint8)
    with pytest.raises(ValueError, match=f"{name}: .*needs floats.*uint8"):
        inspect.unwrap(getattr(losses, name))(x, x)


@few
@given(seed=seeds, size=sizes, contrast=st.sampled_from([0.0, 1e-3, 1.0]))
def test_ssim_distance_lies_in_zero_to_one_is_symmetric_and_zero_for_equal_images(seed, size, contrast):
    x, y = 0.5 + contrast * (uniform(seed, *size) - 0.5), 0.5 + contrast * (uniform(seed + 1, *size) - 0.5)
    distance = losses.ssim_distance(x, y)
    assert distance.shape == (*size[:2], size[2] - 2, size[3] - 2)
    assert (distance >= 0).all() and (distance <= 1).all()
    close(losses.ssim_distance(y, x), distance, 1e-9)
    close(losses.ssim_distance(x, x), torch.zeros_like(distance), 1e-9)
    # A picture and its negative are as unlike as can be: the covariance is minus the variance.
    if contrast == 1.0:
        assert (losses.ssim_distance(x, 1 - x) > 0.2).any()


def test_ssim_distance_keeps_its_bounds_where_float32_rounds():
    """On bright images of little contrast the variance is the difference of two nearly equal numbers."""
    for seed in range(5):
        x, y = 1 - 1e-3 * uniform(seed, 2, 3, 20, 20).float(), 1 - 1e-3 * uniform(seed + 9, 2, 3, 20, 20).float()
        for distance in (losses.ssim_distance(x, y), losses.ssim_distance(x, x)):
            assert (distance >= 0).all() and (distance <= 1).all()
        assert losses.reconstruction_loss(x, x.clone()) >= 0


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.2, 3.0, 0.7)]
)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_reconstruction_loss_equals_the_loops(weights, kind):
    x, y = uniform(0, 2, 3, 5, 6), uniform(1, 2, 3, 5, 6)
    mask = {"none": None, "bool": hard_mask(2, 2, 5, 6), "float": uniform(3, 2, 1, 5, 6)}[kind]
    seen = torch.ones(2, 1, 5, 6) if mask is None else mask
    l1, l2, ssim = weights
    expected = l1 * loop_masked_mean((x - y).abs(), seen) + l2 * loop_masked_mean((x - y) ** 2, seen)
    expected += ssim * loop_masked_mean(loop_ssim_distance(x, y), seen[:, :, 1:-1, 1:-1])
    close(losses.reconstruction_loss(x, y, mask, l1=l1, l2=l2, ssim=ssim), expected, 1e-10)
    if weights == (1.0, 1.0, 1.0):
        close(losses.reconstruction_loss(x, y, mask), expected, 1e-10)


def test_reconstruction_loss_equals_the_published_ssim_plus_plain_differences():
    numbers = golden("photometric")
    difference = (numbers["image"] - numbers["other"]).numpy()
    expected = np.abs(difference).mean() + (difference**2).mean() + numbers["ssim_distance_3x3_valid"].mean().item()
    close(losses.reconstruction_loss(numbers["image"], numbers["other"]), expected, 1e-10)


@few
@given(seed=seeds, batch=st.integers(1, 3), h=st.integers(3, 8), w=st.integers(3, 8))
def test_reconstruction_loss_is_zero_for_equal_symmetric_and_blind_to_batch_order(seed, batch, h, w):
    x, y = uniform(seed, batch, 3, h, w), uniform(seed + 1, batch, 3, h, w)
    mask = hard_mask(seed, batch, h, w)
    close(losses.reconstruction_loss(x, x, mask), 0.0, 1e-9)
    assert losses.reconstruction_loss(x, y, mask) > 0
    close(losses.reconstruction_loss(x, y, mask), losses.reconstruction_loss(y, x, mask), 1e-9)
    flipped = losses.reconstruction_loss(x.flip(0), y.flip(0), mask.flip(0))
    close(flipped, losses.reconstruction_loss(x, y, mask), 1e-10)


@few
@given(seed=seeds)
def test_reconstruction_loss_does_not_see_a_masked_out_region(seed):
    """SSIM's windows reach one pixel into the hidden region, so what lies deeper inside must not matter."""
    x, y = uniform(seed, 2, 3, 9, 11), uniform(seed + 1, 2, 3, 9, 11)
    mask = torch.ones(2, 1, 9, 11, dtype=torch.bool)
    mask[:, :, 2:8, 3:9] = False
    deep = y.clone()
    deep[:, :, 3:7, 4:8] = uniform(seed + 2, 2, 3, 4, 4)
    close(losses.reconstruction_loss(x, deep, mask), losses.reconstruction_loss(x, y, mask))
    shallow = y.clone()
    shallow[:, :, 2:8, 3:9] = uniform(seed + 2, 2, 3, 6, 6)
    close(losses.reconstruction_loss(x, shallow, mask, ssim=0.0), losses.reconstruction_loss(x, y, mask, ssim=0.0))


@pytest.mark.parametrize("make", [torch.zeros, torch.ones], ids=["black", "white"])
def test_reconstruction_gradients_are_finite_on_textureless_and_on_equal_images(make):
    x = make(1, 3, 6, 6).requires_grad_()
    for other in (make(1, 3, 6, 6), 1 - make(1, 3, 6, 6), torch.rand(1, 3, 6, 6)):
        warped = other.clone().requires_grad_()
        x.grad = None
        losses.reconstruction_loss(x, warped).backward()
        assert torch.isfinite(x.grad).all() and torch.isfinite(warped.grad).all()


def test_reconstruction_gradient_equals_finite_differences():
    x, y = uniform(0, 1, 3, 4, 5), uniform(1, 1, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda other: losses.reconstruction_loss(x, other, hard_mask(0, 1, 4, 5)), [y])


# --- Eq. 4 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("edge_weight", [0.0, 2.0, 10.0])
def test_smoothness_loss_equals_the_loops(order, edge_weight):
    flow, image = normal(0, 2, 2, 5, 6), uniform(1, 2, 3, 5, 6)
    expected = loop_smoothness(flow, image, edge_weight, order)
    close(losses.smoothness_loss(flow, image, edge_weight=edge_weight, order=order), expected, 1e-10)


def test_smoothness_loss_equals_the_published_code():
    """ARFlow takes half of the mean over x and of that over y; its first order halves every difference once more."""
    numbers = golden("smoothness")
    flow, image, edge_weight = numbers["flow"], numbers["image"], float(numbers["lambda_edge"])
    close(losses.smoothness_loss(flow, image, edge_weight), 4 * numbers["first_order_halved"], 1e-10)
    close(losses.smoothness_loss(flow, image, edge_weight, order=2), 2 * numbers["second_order"], 1e-10)


def test_smoothness_defaults_are_edge_weight_ten_and_first_order():
    flow, image = normal(0, 1, 2, 5, 6), uniform(1, 1, 3, 5, 6)
    close(losses.smoothness_loss(flow, image), losses.smoothness_loss(flow, image, edge_weight=10.0, order=1))


@few
@given(seed=seeds, h=st.integers(3, 7), w=st.integers(3, 7), scale=st.floats(0.1, 50))
def test_smoothness_is_linear_in_the_flow_and_blind_to_offsets_and_to_where_the_image_is_brighter(seed, h, w, scale):
    flow, image = normal(seed, 2, 2, h, w), uniform(seed + 1, 2, 3, h, w)
    for order in (1, 2):
        value = losses.smoothness_loss(flow, image, order=order)
        assert value > 0
        close(losses.smoothness_loss(scale * flow, image, order=order), scale * value, 1e-9)
        close(losses.smoothness_loss(flow + 7, image, order=order), value, 1e-9)
        close(
            losses.smoothness_loss(-flow, 1 - image, order=order), value, 1e-9
        )  # |grad I|: the sign of a step is nothing
        close(losses.smoothness_loss(flow.flip(0), image.flip(0), order=order), value, 1e-10)


@few
@given(seed=seeds, h=st.integers(3, 7), w=st.integers(3, 7))
def test_smoothness_treats_x_and_y_alike(seed, h, w):
    flow, image = normal(seed, 1, 2, h, w), uniform(seed + 1, 1, 3, h, w)
    for order in (1, 2):
        turned = losses.smoothness_loss(flow.mT, image.mT, order=order)
        close(turned, losses.smoothness_loss(flow, image, order=order), 1e-10)


def test_first_order_smoothness_forgives_only_constant_flow_and_second_order_every_affine_one():
    image = uniform(0, 1, 3, 6, 7)
    y, x = torch.meshgrid(torch.arange(6.0).double(), torch.arange(7.0).double(), indexing="ij")
    affine = torch.stack([0.5 + 0.25 * x - y, 2 * y - 0.75 * x])[None]
    assert losses.smoothness_loss(torch.ones_like(affine), image) == 0
    assert losses.smoothness_loss(affine, image) > 0.01
    close(losses.smoothness_loss(affine, image, order=2), 0.0)


def test_a_motion_edge_costs_less_where_the_image_has_an_edge():
    flow, image = torch.zeros(1, 2, 6, 8), torch.zeros(1, 3, 6, 8)
    flow[..., 4:] = 1
    image[..., 4:] = 0.3
    on_the_edge = losses.smoothness_loss(flow, image)
    beside_it = losses.smoothness_loss(flow, image.roll(1, dims=-1))
    # One of seven columns of differences is 1, and exp(-10 * 0.3) of it is left on the edge.
    close(on_the_edge, math.exp(-3) / 7, 1e-5)
    close(beside_it, 1 / 7, 1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_smoothness_gradient_is_finite_for_constant_flow_and_equals_finite_differences(order):
    image = uniform(0, 1, 3, 4, 5)
    flow = torch.zeros(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    losses.smoothness_loss(flow, image, order=order).backward()
    assert torch.isfinite(flow.grad).all()
    flow = normal(1, 1, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda field: losses.smoothness_loss(field, image, order=order), [flow])


# --- Eq. 6 and VICReg ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (6, 6), (2, 5), (5, 1)])
def test_variance_and_covariance_equal_the_loops(shape):
    x = 0.7 * normal(0, *shape) + normal(1, 1, shape[1])
    close(losses.variance_loss(x), loop_variance(x))
    close(losses.variance_loss(x, gamma=2.5, eps=1e-2), loop_variance(x, 2.5, 1e-2))
    close(losses.covariance_loss(x), loop_covariance(x))


def direct_covariance(x):
    """Over the d x d covariance matrix, whatever the number of samples."""
    matrix = np.cov(x.numpy(), rowvar=False).reshape(x.shape[1], x.shape[1])
    return ((matrix**2).sum() - (np.diag(matrix) ** 2).sum()) / x.shape[1]


def gram_covariance(x):
    """Over the n x n Gram matrix: tr(C^2) = |X X'|^2 / (n-1)^2, less the squared variances."""
    centred = x.numpy() - x.numpy().mean(0)
    gram = centred @ centred.T
    return (
        (gram**2).sum() / (len(x) - 1) ** 2
        - (centred.var(0, ddof=0) * len(x) / (len(x) - 1)) @ (centred.var(0, ddof=0) * len(x) / (len(x) - 1))
    ) / x.shape[1]


@few
@given(seed=seeds, n=st.integers(2, 20), d=st.integers(1, 20))
def test_covariance_is_the_same_through_samples_as_through_dimensions(seed, n, d):
    x = normal(seed, n, d) @ normal(seed + 1, d, d)
    value = losses.covariance_loss(x)
    close(value, direct_covariance(x), 1e-9)
    close(value, gram_covariance(x), 1e-9)
    # Each sample three times changes nothing but n - 1, and takes the other way round where n < d <= 3n.
    close(losses.covariance_loss(x.repeat(3, 1)), value * ((n - 1) * 3 / (3 * n - 1)) ** 2, 1e-9)


@few
@given(seed=seeds, n=st.integers(2, 12), d=st.integers(1, 12), offset=st.floats(-10, 10))
def test_variance_and_covariance_are_blind_to_offsets_and_to_the_order_of_samples_and_variables(seed, n, d, offset):
    x = 0.5 * normal(seed, n, d)
    generator = torch.Generator().manual_seed(seed)
    mixed = x[torch.randperm(n, generator=generator)][:, torch.randperm(d, generator=generator)] + offset
    for loss in (losses.variance_loss, losses.covariance_loss):
        assert loss(x) > -1e-9  # the diagonal is taken off a sum: rounding may leave a hair below 0
        close(loss(mixed), loss(x), 1e-9)
    assert losses.variance_loss(x) <= 1
    close(losses.covariance_loss(3 * x), 81 * losses.covariance_loss(x), 1e-9)


def test_covariance_in_float32_is_exact_where_many_dimensions_meet_few_samples():
    """The diagonal of d x d is taken off a sum over all of it: the difference must not drown in float32."""
    x = normal(0, 24, 1024)
    value = losses.covariance_loss(x.float())
    assert value.dtype == torch.float32
    close(value, direct_covariance(x), 1e-4)


def test_covariance_of_uncorrelated_variables_is_zero_and_never_below():
    hadamard = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    for x in (hadamard, 0.3 * hadamard.repeat(5, 1)):
        close(losses.covariance_loss(x), 0.0, 1e-6)
    one = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    close(losses.covariance_loss(one), 0.0, 1e-6)


def test_variance_of_constant_features_is_the_whole_hinge_and_pulls_with_finite_gradients():
    x = torch.full((6, 3), 2.0, dtype=torch.float64, requires_grad=True)
    value = losses.variance_loss(x)
    close(value, 1 - math.sqrt(1e-4))
    (value + losses.covariance_loss(x)).backward()
    assert torch.isfinite(x.grad).all()
    spread = torch.tensor([[-2.0], [0.0], [2.0]])
    assert losses.variance_loss(spread) == 0


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_variance_and_covariance_gradients_equal_finite_differences(shape):
    x = (0.5 * normal(0, *shape)).requires_grad_()
    assert torch.autograd.gradcheck(losses.variance_loss, [x])
    assert torch.autograd.gradcheck(losses.covariance_loss, [x])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.01, 0.04)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 9, 2, 2), (3, 4, 1, 1)])
def test_variance_covariance_loss_takes_every_position_of_every_map_as_a_sample(weights, shape):
    features = 0.6 * normal(0, *shape)
    samples = torch.stack([features[n, :, i, j] for n, i, j in np.ndindex(shape[0], *shape[2:])])
    expected = weights[0] * loop_variance(samples) + weights[1] * loop_covariance(samples)
    close(losses.variance_covariance_loss(features, *weights), expected)
    named = losses.variance_covariance_loss(features, variance_weight=weights[0], covariance_weight=weights[1])
    close(named, expected)


@few
@given(seed=seeds, b=st.integers(1, 3), c=st.integers(1, 6), h=st.integers(2, 4), w=st.integers(1, 4))
def test_variance_covariance_loss_does_not_care_where_a_position_lies(seed, b, c, h, w):
    features = normal(seed, b, c, h, w)
    value = losses.variance_covariance_loss(features, 1.0, 1.0)
    assert value > -1e-9
    close(losses.variance_covariance_loss(features.flip(0).mT, 1.0, 1.0), value, 1e-9)
    one_row = features.permute(1, 0, 2, 3).reshape(1, c, 1, b * h * w)
    close(losses.variance_covariance_loss(one_row, 1.0, 1.0), value, 1e-9)


def test_variance_covariance_loss_of_dead_features_has_finite_gradients():
    features = torch.zeros(2, 4, 3, 3, requires_grad=True)
    losses.variance_covariance_loss(features, 1.0, 1.0).backward()
    assert torch.isfinite(features.grad).all()


def test_vicreg_loss_equals_the_loops():
    x, y = 0.6 * normal(0, 6, 4), 0.8 * normal(1, 6, 4)
    terms = losses.vicreg_loss(x, y)
    assert terms._fields == ("invariance", "variance", "covariance")
    close(terms.invariance, sum((float(x[i, j]) - float(y[i, j])) ** 2 for i, j in np.ndindex(6, 4)) / 24)
    close(terms.variance, (loop_variance(x) + loop_variance(y)) / 2)
    close(terms.covariance, loop_covariance(x) + loop_covariance(y))


def test_vicreg_loss_equals_the_published_code_with_its_gradients():
    numbers = golden("vicreg_loss")
    x, y = numbers["x"].requires_grad_(), numbers["y"].requires_grad_()
    terms = losses.vicreg_loss(x, y)
    for name in ("invariance", "variance", "covariance"):
        close(getattr(terms, name), numbers[name])
    total = 25 * terms.invariance + 25 * terms.variance + terms.covariance
    close(total, numbers["total"])
    total.backward()
    close(x.grad, numbers["grad_x_of_total"])
    close(y.grad, numbers["grad_y_of_total"])


@few
@given(seed=seeds, n=st.integers(2, 12), d=st.integers(1, 12))
def test_vicreg_loss_is_symmetric_in_the_views_and_blind_to_batch_order(seed, n, d):
    x, y = normal(seed, n, d), normal(seed + 1, n, d)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    terms, swapped, mixed = losses.vicreg_loss(x, y), losses.vicreg_loss(y, x), losses.vicreg_loss(x[order], y[order])
    for value, other, third in zip(terms, swapped, mixed, strict=True):
        assert value > -1e-9
        close(other, value, 1e-10)
        close(third, value, 1e-10)
    assert losses.vicreg_loss(x, x).invariance == 0


def test_vicreg_gradients_are_finite_when_the_embedding_has_collapsed():
    x, y = torch.zeros(8, 16, requires_grad=True), torch.zeros(8, 16, requires_grad=True)
    sum(losses.vicreg_loss(x, y)).backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(y.grad).all()


# --- each function by itself -----------------------------------------------------------------------------------------
def example_inputs():
    maps, mask = [uniform(0, 2, 3, 6, 7), uniform(1, 2, 3, 6, 7)], uniform(2, 2, 1, 6, 7) > 0.3
    few_samples, many_samples = 0.5 * normal(3, 4, 9), 0.5 * normal(4, 9, 4)
    return {
        "regression_loss": [[*maps], [*maps, mask]],
        "ssim_distance": [[*maps]],
        "reconstruction_loss": [[*maps], [*maps, mask]],
        "smoothness_loss": [[normal(5, 2, 2, 6, 7), maps[0]], [normal(5, 2, 2, 6, 7), maps[0], 3.0, 2]],
        "cycle_consistency_loss": [[*maps], [*maps, mask]],
        "variance_loss": [[few_samples], [many_samples]],
        "covariance_loss": [[few_samples], [many_samples]],
        "variance_covariance_loss": [[0.5 * maps[0], 0.3, 0.7]],
        "vicreg_loss": [[few_samples, 0.9 * few_samples], [many_samples, 0.9 * many_samples]],
    }


def as_numbers(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [number for part in parts for number in torch.as_tensor(part).flatten().tolist()]


@pytest.fixture(scope="module")
def results_of_copies(tmp_path_factory):
    """Each function's source under the file's import lines, in a file of its own; one process calls them all."""
    folder = tmp_path_factory.mktemp("copies")
    tree = ast.parse(inspect.getsource(losses))
    header = "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    for name in PUBLIC:
        (folder / f"only_{name}.py").write_text(f"{header}\n\n\n{inspect.getsource(getattr(losses, name))}")
    torch.save(example_inputs(), folder / "inputs.pt")
    (folder / "call_each.py").write_text(
        "import importlib, json, torch\n"
        "results = {}\n"
        "for name, calls in torch.load('inputs.pt').items():\n"
        "    try:\n"
        "        function = getattr(importlib.import_module(f'only_{name}'), name)\n"
        "        results[name] = []\n"
        "        for arguments in calls:\n"
        "            result = function(*arguments)\n"
        "            parts = result if isinstance(result, tuple) else (result,)\n"
        "            results[name].append([v for part in parts for v in part.flatten().tolist()])\n"
        "    except Exception as error:\n"
        "        results[name] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(results))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "call_each.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_function_pasted_alone_into_an_empty_file_gives_the_same_number(name, results_of_copies):
    here = [as_numbers(getattr(losses, name)(*arguments)) for arguments in example_inputs()[name]]
    assert not isinstance(results_of_copies[name], str), results_of_copies[name]
    assert results_of_copies[name] == here


def test_losses_imports_no_other_file_of_the_project():
    project = {path.stem for path in Path(losses.__file__).parent.glob("*.py")}
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(losses))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert not imported & project


def test_every_public_function_of_the_file_is_tested_here():
    own = {name for name, value in inspect.getmembers(losses, inspect.isfunction) if value.__module__ == "losses"}
    assert {name for name in own if not name.startswith("_")} == set(PUBLIC)


# --- a wrong shape is told by name -----------------------------------------------------------------------------------
MAP, FLOW, SAMPLES = torch.rand(2, 3, 6, 7), torch.rand(2, 2, 6, 7), torch.rand(5, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "at_fault"),
    [
        ("regression_loss", [MAP[0], MAP], "target"),
        ("regression_loss", [MAP, MAP[:, :2]], "warped"),
        ("regression_loss", [MAP, MAP, MAP > 0.5], "mask"),
        ("ssim_distance", [MAP, MAP[..., 1:]], "y"),
        ("reconstruction_loss", [MAP[:, 0], MAP], "image"),
        ("reconstruction_loss", [MAP, MAP[:1]], "warped"),
        ("reconstruction_loss", [MAP, MAP, MAP[:, 0] > 0.5], "mask"),
        ("smoothness_loss", [MAP, MAP], "flow"),
        ("smoothness_loss", [FLOW, MAP[..., 1:]], "image"),
        ("cycle_consistency_loss", [MAP, MAP[:1]], "cycled"),
        ("cycle_consistency_loss", [MAP, MAP, MAP[:, :1, 1:] > 0.5], "mask"),
        ("variance_loss", [MAP], "x"),
        ("covariance_loss", [MAP], "x"),
        ("variance_covariance_loss", [SAMPLES, 1.0, 1.0], "features"),
        ("vicreg_loss", [SAMPLES, SAMPLES[1:]], "y"),
        ("vicreg_loss", [MAP, MAP], "x"),
    ],
)
def test_a_wrong_shape_is_told_by_the_arguments_name(name, arguments, at_fault):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{at_fault}'"):
        getattr(losses, name)(*arguments)
