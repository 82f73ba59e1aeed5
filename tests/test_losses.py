"""Eqs. 2 to 6 and VICReg against float64 loops, NumPy's statistics, the original authors' numbers, and properties.

The loops are written from the equations, one pixel at a time, and share nothing with losses.py. The golden numbers
(tests/golden) were computed by the published code of VICReg and ARFlow.
"""

import ast
import inspect
import math

import jaxtyping
import numpy as np
import pytest
import torch
from helpers import close, golden, normal, seeds, uniform
from hypothesis import given
from hypothesis import strategies as st

import losses

sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(3, 7), st.integers(3, 7))
squared_losses = pytest.mark.parametrize("loss", [losses.regression_loss, losses.cycle_consistency_loss])


def random_mask(seed, b, h, w):
    """A Boolean mask with at least one visible and one hidden pixel, neither of them only on the outermost ring."""
    mask = uniform(seed, b, 1, h, w) > 0.4
    mask[0, 0, 1, 1] = True
    mask[-1, 0, h - 2, w - 1] = False
    return mask


masks = pytest.mark.parametrize("mask", [None, random_mask(2, 2, 5, 6), uniform(3, 2, 1, 5, 6)])


# ------------------------------------------------------------------------------------------------------- the oracles


def loop_masked_mean(values, mask):
    """sum(mask * values) / (sum(mask) * channels), one element at a time; 0 without a valid pixel."""
    b, c, h, w = values.shape
    mask = torch.ones(b, 1, h, w) if mask is None else mask
    total, weight = 0.0, 0.0
    for n, i, j in np.ndindex(b, h, w):
        weight += float(mask[n, 0, i, j])
        total += float(mask[n, 0, i, j]) * sum(float(values[n, k, i, j]) for k in range(c))
    return total / (weight * c) if weight else 0.0


def loop_ssim_distance(x, y):
    b, c, h, w = x.shape
    c1, c2 = 0.01**2, 0.03**2
    distance = torch.zeros(b, c, h - 2, w - 2, dtype=torch.float64)
    for n, k, i, j in np.ndindex(distance.shape):
        p, q = (image[n, k, i : i + 3, j : j + 3].flatten().tolist() for image in (x, y))
        mean_p, mean_q = sum(p) / 9, sum(q) / 9
        variance_p, variance_q = sum((a - mean_p) ** 2 for a in p) / 9, sum((a - mean_q) ** 2 for a in q) / 9
        covariance = sum((a - mean_p) * (d - mean_q) for a, d in zip(p, q, strict=True)) / 9
        luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
        structure = (2 * covariance + c2) / (variance_p + variance_q + c2)
        distance[n, k, i, j] = min(max((1 - luminance * structure) / 2, 0.0), 1.0)
    return distance


def loop_smoothness(flow, image, edge_weight, order, charbonnier):
    """Eq. 4: each difference of the flow, weighted by the step of the image at the far end of the difference."""
    b, _, h, w = flow.shape
    result = 0.0
    for dy, dx in ((0, 1), (1, 0)):
        terms = []
        for n, i, j in np.ndindex(b, h - order * dy, w - order * dx):
            before, after = (i + (order - 1) * dy, j + (order - 1) * dx), (i + order * dy, j + order * dx)
            step = sum(abs(float(image[n, k][after] - image[n, k][before])) for k in range(3)) / 3
            for k in range(2):
                points = [float(flow[n, k, i + m * dy, j + m * dx]) for m in range(order + 1)]
                difference = points[1] - points[0] if order == 1 else points[2] - 2 * points[1] + points[0]
                terms.append(math.hypot(difference, charbonnier) * math.exp(-edge_weight * step))
        result += sum(terms) / len(terms)
    return result


# -------------------------------------------------------------------------- Eqs. 2 and 5: masked squared differences


@squared_losses
@masks
def test_squared_difference_losses_equal_the_loops(loss, mask):
    x, y = normal(0, 2, 3, 5, 6), normal(1, 2, 3, 5, 6)
    close(loss(x, y, mask), loop_masked_mean((x - y) ** 2, mask))


@squared_losses
def test_squared_difference_losses_send_gradients_to_both_maps_through_visible_pixels_only(loss):
    x, y, mask = normal(0, 2, 3, 4, 5).requires_grad_(), normal(1, 2, 3, 4, 5).requires_grad_(), random_mask(2, 2, 4, 5)
    loss(x, y, mask).backward()
    expected = 2 * (x - y).detach() * mask / (mask.sum() * 3)
    close(x.grad, expected)
    close(y.grad, -expected)


@pytest.mark.parametrize("name", ["regression_loss", "cycle_consistency_loss", "reconstruction_loss"])
def test_a_mask_of_zeros_gives_zero_and_zero_gradients_and_one_of_ones_in_any_fitting_shape_changes_nothing(name):
    x, y = uniform(0, 2, 3, 5, 6).requires_grad_(), uniform(1, 2, 3, 5, 6).requires_grad_()
    loss = inspect.unwrap(getattr(losses, name))  # without the checks of the annotations, as for users
    value = loss(x, y, torch.zeros(2, 1, 5, 6, dtype=torch.bool))
    value.backward()
    assert value == 0 and (x.grad == 0).all() and (y.grad == 0).all()
    for shape in ((1, 1, 5, 6), (5, 6)) if name != "reconstruction_loss" else ():  # a mean inside it checks its own
        close(loss(x, y, torch.ones(shape)), loss(x, y))
    x, y = uniform(0, 1, 3, 256, 256).half(), uniform(1, 1, 3, 256, 256).half()  # their sum is beyond the type's range
    close(loss(x, y, torch.ones(1, 1, 256, 256)), loss(x, y), 1e-3)


# ------------------------------------------------------------------------------------------- Eq. 3: reconstruction


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_ssim_distance_and_reconstruction_loss_equal_the_published_code(dtype, tolerance):
    numbers = golden("photometric")
    distance = losses.ssim_distance(numbers["image"].to(dtype), numbers["other"].to(dtype))
    assert distance.dtype == dtype
    close(distance, numbers["ssim_distance_3x3_valid"], tolerance)
    difference = numbers["image"] - numbers["other"]
    expected = difference.abs().mean() + difference.square().mean() + numbers["ssim_distance_3x3_valid"].mean()
    close(losses.reconstruction_loss(numbers["image"], numbers["other"]), expected)


@pytest.mark.parametrize("name", ["ssim_distance", "reconstruction_loss"])
def test_ssim_refuses_images_smaller_than_its_window_and_integers_whose_sums_would_wrap_around(name):
    for size in ((2, 5), (5, 2)):
        x = uniform(0, 1, 3, *size)
        with pytest.raises(ValueError, match=f"{name}.*at least 3 x 3 pixels, got torch.float64 .*{size[1]}"):
            getattr(losses, name)(x, x)
        assert losses.reconstruction_loss(x, x, ssim=0.0) == 0
    x = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    for pair in ((x, x), (x / 255, x)):
        with pytest.raises(ValueError, match=f"{name}.* needs floats.*uint8"):
            inspect.unwrap(getattr(losses, name))(*pair)  # without the checks of the annotations, as for users


@given(seed=seeds, size=sizes, contrast=st.sampled_from([0.0, 1e-3, 1.0]))
def test_ssim_distance_lies_between_zero_and_one_and_is_symmetric_and_zero_for_equal_images(seed, size, contrast):
    x, y = (1 - contrast * uniform(seed + k, *size) for k in range(2))
    distance = losses.ssim_distance(x, y)
    # In float32 the variance of bright images of low contrast is the difference of two nearly equal numbers.
    for values in (distance, losses.ssim_distance(x.float(), y.float()), losses.ssim_distance(x.float(), x.float())):
        assert (values >= 0).all() and (values <= 1).all()
    close(losses.ssim_distance(y, x), distance, 1e-9)
    close(losses.ssim_distance(x, x), torch.zeros_like(distance), 1e-9)


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 3.0, 0.7)])
@masks
def test_reconstruction_loss_equals_the_loops(weights, mask):
    x, y = uniform(0, 2, 3, 5, 6), uniform(1, 2, 3, 5, 6)
    l1, l2, ssim = map(float, weights)
    expected = l1 * loop_masked_mean((x - y).abs(), mask) + l2 * loop_masked_mean((x - y) ** 2, mask)
    inner_mask = None if mask is None else mask[:, :, 1:-1, 1:-1]
    expected += ssim * loop_masked_mean(loop_ssim_distance(x, y), inner_mask)
    close(losses.reconstruction_loss(x, y, mask, l1=l1, l2=l2, ssim=ssim), expected)
    if weights == (1, 1, 1):
        close(losses.reconstruction_loss(x, y, mask), expected)


def test_gradients_of_the_losses_on_images_are_finite_without_texture_and_for_a_constant_flow():
    black, white = torch.zeros(1, 3, 6, 6), torch.ones(1, 3, 6, 6)
    for image, other in ((black, black), (white, white), (black, white), (black, torch.rand(1, 3, 6, 6))):
        leaves = image.clone().requires_grad_(), other.clone().requires_grad_()
        losses.reconstruction_loss(*leaves).backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
    flow = torch.zeros(1, 2, 6, 6, requires_grad=True)
    sum(losses.smoothness_loss(flow, torch.rand(1, 3, 6, 6), order=order) for order in (1, 2)).backward()
    assert torch.isfinite(flow.grad).all()


# ----------------------------------------------------------------------------------------------- Eq. 4: smoothness


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("edge_weight", "charbonnier"), [(0.0, 0.0), (2.0, 0.5), (10.0, 0.0)])
@given(seed=seeds, h=st.integers(3, 7), w=st.integers(3, 7), scale=st.floats(0.1, 50))
def test_smoothness_loss_equals_the_loops(order, edge_weight, charbonnier, seed, h, w, scale):
    flow, image = scale * normal(seed, 2, 2, h, w), uniform(seed + 1, 2, 3, h, w)
    expected = loop_smoothness(flow, image, edge_weight, order, charbonnier)
    close(losses.smoothness_loss(flow, image, edge_weight, order, charbonnier), expected)
    if (order, edge_weight) == (1, 10.0):
        close(losses.smoothness_loss(flow, image), expected)


def test_smoothness_loss_equals_the_published_code():
    """ARFlow halves the sum of the means over x and over y; in its first order it halves every difference once more."""
    numbers = golden("smoothness")
    flow, image, edge_weight = numbers["flow"], numbers["image"], float(numbers["lambda_edge"])
    close(losses.smoothness_loss(flow, image, edge_weight), 4 * numbers["first_order_halved"])
    close(losses.smoothness_loss(flow, image, edge_weight, order=2), 2 * numbers["second_order"])


def test_smoothness_loss_needs_an_order_that_it_knows_and_sides_that_are_longer():
    for order, h, w in ((3, 8, 8), (1, 8, 1), (2, 2, 8)):
        with pytest.raises(ValueError, match="smoothness_loss: order must be 1 or 2, below each side"):
            losses.smoothness_loss(torch.rand(1, 2, h, w), torch.rand(1, 3, h, w), order=order)


# ---------------------------------------------------------------------- Eq. 6: variance and covariance, and VICReg


def variance_by_numpy(x, gamma=1.0, eps=1e-4):
    return np.maximum(0, gamma - np.sqrt(x.numpy().var(axis=0, ddof=1) + eps)).mean()


def covariance_by_numpy(x):
    """The sum over the whole d x d covariance matrix, however many samples there are."""
    matrix = np.cov(x.numpy(), rowvar=False).reshape(x.shape[1], x.shape[1])
    return ((matrix**2).sum() - (np.diag(matrix) ** 2).sum()) / x.shape[1]


@given(seed=seeds, n=st.integers(2, 20), d=st.integers(1, 20))
def test_variance_and_covariance_equal_those_of_numpy_however_many_samples_there_are(seed, n, d):
    x = normal(seed, n, d) @ normal(seed + 1, d, d) / d + normal(seed + 2, 1, d)
    close(losses.variance_loss(x), variance_by_numpy(x), 1e-9)
    close(losses.variance_loss(x, gamma=2.5, eps=1e-2), variance_by_numpy(x, 2.5, 1e-2), 1e-9)
    close(losses.covariance_loss(x), covariance_by_numpy(x), 1e-9)


def test_covariance_is_exact_in_float32_with_few_samples_and_beside_a_variable_that_outweighs_all_others():
    """Where n < d the diagonal is subtracted from a sum over all entries; elsewhere that would leave only noise."""
    for x in (normal(0, 24, 1024), normal(0, 512, 8) * torch.tensor([1000, *[1] * 7])):
        expected, x = covariance_by_numpy(x), x.float()
        terms = [losses.covariance_loss(x), losses.vicreg_loss(x, x)[2] / 2]
        terms += [losses.variance_covariance_loss(x.T[None, :, :, None], 0.0, 1.0, add) for add in (None, torch.clone)]
        for term in terms:
            assert term.dtype == torch.float32
            close(term, expected, 1e-4)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.01, 0.04)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 9, 2, 2), (3, 4, 1, 1)])
def test_variance_covariance_loss_takes_every_position_of_every_map_as_a_sample(weights, shape):
    features = 0.6 * normal(0, *shape)
    samples = torch.stack([features[n, :, i, j] for n, i, j in np.ndindex(shape[0], *shape[2:])])
    expected = weights[0] * variance_by_numpy(samples) + weights[1] * covariance_by_numpy(samples)
    close(losses.variance_covariance_loss(features, variance_weight=weights[0], covariance_weight=weights[1]), expected)


def test_vicreg_loss_equals_the_published_code_with_its_gradients():
    numbers = golden("vicreg_loss")
    x, y = numbers["x"].requires_grad_(), numbers["y"].requires_grad_()
    terms = losses.vicreg_loss(x, y)
    for name, term in zip(("invariance", "variance", "covariance"), terms, strict=True):
        close(term, numbers[name])
    (25 * terms[0] + 25 * terms[1] + terms[2]).backward()
    close(x.grad, numbers["grad_x_of_total"])
    close(y.grad, numbers["grad_y_of_total"])


def test_collapsed_features_cost_the_whole_hinge_and_have_finite_gradients():
    x = torch.full((6, 3), 2.0, requires_grad=True)
    close(losses.variance_loss(x), 1 - math.sqrt(1e-4), 1e-6)
    all_losses = [*losses.vicreg_loss(x, 2 * x), losses.variance_covariance_loss(x[..., None, None], 1.0, 1.0)]
    sum(all_losses, losses.variance_loss(x) + losses.covariance_loss(x)).backward()
    assert torch.isfinite(x.grad).all()


def test_statistics_of_a_single_sample_are_refused_and_views_that_would_only_fit_by_broadcasting():
    x = torch.ones(1, 4)
    calls = {"variance_loss": (x,), "covariance_loss": (x,), "vicreg_loss": (x, x)}
    for name, arguments in (calls | {"variance_covariance_loss": (x.view(1, 4, 1, 1), 1.0, 1.0)}).items():
        with pytest.raises(ValueError, match=f"{name}.* needs .*at least 2 (samples|positions), got .?1"):
            getattr(losses, name)(*arguments)
    for shape in ((1, 8), (4, 1)):
        with pytest.raises(ValueError, match=r"vicreg_loss: needs two views .*\(4, 8\) and"):
            inspect.unwrap(losses.vicreg_loss)(torch.ones(4, 8), torch.ones(shape))  # without checks, as for users


def test_each_function_gives_the_same_numbers_when_it_is_copied_alone_under_the_import_lines():
    maps, mask = [uniform(0, 2, 3, 6, 7), uniform(1, 2, 3, 6, 7)], uniform(2, 2, 1, 6, 7) > 0.3
    flow, few_samples, many_samples = normal(5, 2, 2, 6, 7), 0.5 * normal(3, 4, 9), 0.5 * normal(4, 9, 4)
    calls = {
        "regression_loss": [maps, [*maps, mask]],
        "ssim_distance": [maps],
        "reconstruction_loss": [maps, [*maps, mask]],
        "smoothness_loss": [[flow, maps[0]], [flow, maps[0], 3.0, 2]],
        "cycle_consistency_loss": [maps, [*maps, mask]],
        "variance_loss": [[few_samples], [many_samples]],
        "covariance_loss": [[few_samples], [many_samples]],
        "variance_covariance_loss": [[0.5 * maps[0], 0.3, 0.7]],
        "vicreg_loss": [[few_samples, 0.9 * few_samples], [many_samples, 0.9 * many_samples]],
    }
    public = {name for name, value in inspect.getmembers(losses, inspect.isfunction) if value.__module__ == "losses"}
    assert public == calls.keys()
    imports = [x for x in ast.parse(inspect.getsource(losses)).body if isinstance(x, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(line).split()[1].split(".")[0] for line in imports} == {"collections", "jaxtyping", "torch"}
    for name, each in calls.items():
        alone, ours = {}, getattr(losses, name)
        exec("\n".join([*map(ast.unparse, imports), inspect.getsource(ours)]), alone)
        for arguments in each:
            torch.testing.assert_close(alone[name](*arguments), ours(*arguments), rtol=0, atol=0, msg=name)


def test_named_shapes_are_checked_while_the_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'mask'"):
        losses.regression_loss(torch.rand(2, 3, 6, 7), torch.rand(2, 3, 6, 7), torch.ones(2, 3, 6, 7))
