"""Warping, correlation, occlusion masks and the coarse-to-fine pass (Eq. 1), each against an oracle.

The oracles are float64 loops over pixels, golden numbers computed by the published code of others (tests/golden), and
flows that are known by construction.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_gradients, close, golden, normal, seeds, uniform
from hypothesis import given
from hypothesis import strategies as st
from plain import correlation_by_shifts, correlation_by_unfolding

import flow as flow_module
from flow import FlowEstimator, correlation, estimate_flow_pyramid, forward_backward_mask, range_map, resize_flow, warp

# The pyramid of the default encoder (DESIGN.md), coarsest first.
CHANNELS, STRIDES = (768, 384, 192, 96, 48, 48), (64, 32, 16, 8, 4, 2)

sides = st.integers(1, 9)
paddings = pytest.mark.parametrize("padding", ["border", "zeros"])


def constant_flow(u, v, b, h, w, dtype=torch.float64):
    return torch.tensor([u, v], dtype=dtype).view(1, 2, 1, 1).expand(b, 2, h, w).contiguous()


def coordinates(h, w):
    return torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")


# ------------------------------------------------------------------------------------------------------------- warp


def loop_warp(x, flow, padding):
    """x at p + flow(p): the four neighbours, each weighted by its closeness, one pixel at a time."""
    b, c, h, w = x.shape
    warped = torch.zeros(b, c, h, w, dtype=torch.float64)
    for n, i, j in np.ndindex(b, h, w):
        column, row = j + float(flow[n, 0, i, j]), i + float(flow[n, 1, i, j])
        if padding == "border":
            column, row = min(max(column, 0), w - 1), min(max(row, 0), h - 1)
        left, top = math.floor(column), math.floor(row)
        for y, z in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            if 0 <= y < h and 0 <= z < w:
                warped[n, :, i, j] += (1 - abs(row - y)) * (1 - abs(column - z)) * x[n, :, y, z]
    return warped


@paddings
@given(seed=seeds, h=sides, w=sides, reach=st.sampled_from([0.0, 0.5, 3.0, 20.0]))
def test_warp_equals_the_loops(padding, seed, h, w, reach):
    if padding == "zeros":  # with align_corners=True an axis of a single pixel has no outside
        h, w = h + 1, w + 1
    x, flow = normal(seed, 2, 3, h, w), reach * normal(seed + 1, 2, 2, h, w)
    close(warp(x, flow, padding=padding), loop_warp(x, flow, padding))


def test_warp_equals_the_published_code_and_pads_with_the_border_by_default():
    numbers = golden("flow_warp")
    close(warp(numbers["image"], numbers["flow"]), numbers["warped_border"])
    close(warp(numbers["image"], numbers["flow"], padding="zeros"), numbers["warped_zeros"])


def test_warping_a_translated_image_by_its_translation_restores_it():
    """The scene moves 5 px to the right and 3 px up: the point p of frame t is found in frame t+1 at p + (5, -3)."""
    scene = uniform(0, 1, 3, 40, 50)
    frame_t, frame_t1 = scene[..., 10:30, 10:35], scene[..., 13:33, 5:30]
    flow_t_to_t1 = constant_flow(5.0, -3.0, 1, 20, 25)
    close(warp(frame_t1, flow_t_to_t1)[..., 3:, :20], frame_t[..., 3:, :20])


@paddings
def test_gradients_of_warp_are_finite_outside_and_on_pixels(padding):
    x = normal(0, 1, 2, 4, 5).requires_grad_()
    for length in (0.0, 1.0, 1e4):
        flow = constant_flow(length, -length, 1, 4, 5).requires_grad_()
        gradients = torch.autograd.grad(warp(x, flow, padding=padding).sum(), [x, flow])
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@paddings
def test_a_flow_that_is_no_number_does_not_crash_the_process(padding):  # torch's kernel would
    x, flow = normal(0, 1, 2, 8, 8).float(), normal(1, 1, 2, 8, 8).float()
    flow[0, 0, :4], flow[0, 1, 2:6] = math.nan, math.inf
    x.requires_grad_(), flow.requires_grad_()
    warp(x, flow, padding=padding)[..., 6:, :].sum().backward()
    assert x.grad.isfinite().all() and flow.grad[:, :, 6:].isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_warp_hits_the_pixel_in_wide_float32_frames_also_under_autocast(autocast):
    """Coordinates in bfloat16 would turn 300.3 into 300, or 1000.3 into 1000."""
    ramp, flow = torch.arange(1400.0).expand(1, 1, 3, 1400), constant_flow(300.3, 0.0, 1, 3, 1400, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        warped = warp(ramp, flow)
    torch.testing.assert_close(warped[..., :1099], (ramp + 300.3)[..., :1099], rtol=0, atol=2e-3)


# ------------------------------------------------------------------------------------- correlation and resized flows


@given(seeds, st.integers(0, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 23), st.integers(1, 23))
def test_correlation_in_tiles_equals_shifts_and_unfolded_windows_with_its_gradients(seed, radius, b, c, h, w):
    x, y = normal(seed, b, c, h, w).to(memory_format=torch.channels_last), normal(seed + 1, b, c, h, w)
    for other in (correlation_by_shifts, correlation_by_unfolding):
        assert_same_gradients(lambda x, y: correlation(x, y, radius), lambda x, y, f=other: f(x, y, radius), x, y)


def test_correlation_equals_the_published_code_and_has_radius_four_by_default():
    numbers = golden("correlation_radius4")
    close(correlation(numbers["features_1"], numbers["features_2"]), numbers["volume"])


@given(h=sides, w=sides, h2=sides, w2=sides, u=st.floats(-20, 20), v=st.floats(-20, 20))
def test_resizing_a_constant_flow_rescales_x_by_the_width_and_y_by_the_height(h, w, h2, w2, u, v):
    resized = resize_flow(constant_flow(u, v, 2, h, w), (h2, w2))
    close(resized, constant_flow(u * w2 / w, v * h2 / h, 2, h2, w2))


@given(seed=seeds, h=st.integers(5, 8), w=st.integers(5, 8))
def test_doubling_an_affine_flow_and_halving_it_restores_it_inside(seed, h, w):
    coefficients = normal(seed, 6).view(2, 3, 1, 1)
    y, x = coordinates(h, w)
    flow = (coefficients[:, 0] * x + coefficients[:, 1] * y + coefficients[:, 2])[None]
    restored = resize_flow(resize_flow(flow, (2 * h, 2 * w)), (h, w))
    close(restored[..., 1:-1, 1:-1], flow[..., 1:-1, 1:-1])
    close(resize_flow(flow, (h, w)), flow)


# ---------------------------------------------------------------------------------------------------------- occlusion


def test_forward_backward_mask_equals_the_published_code_and_is_stricter_where_a_pixel_leaves_the_frame():
    """The published array holds the occluded pixels, ours is True for the visible ones."""
    numbers = golden("occlusion_masks")
    flow, visible = numbers["flow_forward"], ~numbers["occluded_forward_backward"].bool()
    h, w = flow.shape[2:]
    y, x = coordinates(h, w)
    x, y = x + flow[:, 0], y + flow[:, 1]
    inside = ((x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1))[:, None]  # the pixel stays in the frame
    assert inside.float().mean() > 0.5 and visible[inside].any() and not visible[inside].all()
    mask = forward_backward_mask(flow.requires_grad_(), numbers["flow_backward"])
    assert torch.equal(mask[inside], visible[inside]) and not mask.requires_grad
    assert not (mask & ~visible).any()


@given(seed=seeds, alpha1=st.floats(0, 0.5), alpha2=st.floats(0.01, 3))
def test_forward_backward_mask_equals_the_loops(seed, alpha1, alpha2):
    flow = 2 * normal(seed, 2, 2, 7, 8)
    reverse = -flow + 0.7 * normal(seed + 1, 2, 2, 7, 8)
    mask = forward_backward_mask(flow, reverse, alpha1=alpha1, alpha2=alpha2)
    back = loop_warp(reverse, flow, "zeros")
    for n, i, j in np.ndindex(2, 7, 8):
        f, b = flow[n, :, i, j].tolist(), back[n, :, i, j].tolist()
        gap = (f[0] + b[0]) ** 2 + (f[1] + b[1]) ** 2
        bound = alpha1 * (f[0] ** 2 + f[1] ** 2 + b[0] ** 2 + b[1] ** 2) + alpha2
        assert bool(mask[n, 0, i, j]) == (gap < bound)


def test_range_map_equals_the_published_code():
    """The flow from t+1 to t says which pixels of frame t are hit: the golden map is that of the backward flow."""
    numbers = golden("occlusion_masks")
    hits = range_map(numbers["flow_backward"])
    close(hits, numbers["range_map"])
    assert torch.equal(hits < 0.2, numbers["occluded_range_map_below_0_2"].bool())
    assert (range_map(torch.zeros(1, 2, 60, 60).half()) == 1).all()  # more pixels than the type has whole numbers


@given(seed=seeds, h=st.integers(2, 9), w=st.integers(2, 9), reach=st.sampled_from([0.0, 0.5, 3.0, 20.0]))
def test_range_map_is_the_transpose_of_the_warp(seed, h, w, reach):
    """Splatting ones along a flow is the gradient of the sum of what the warp (padding zeros) gathers by it."""
    flow = (reach * normal(seed, 2, 2, h, w)).requires_grad_()
    x = torch.zeros(2, 1, h, w, dtype=torch.float64, requires_grad=True)
    warp(x, flow, padding="zeros").sum().backward()
    hits = range_map(flow)
    close(hits, x.grad)
    assert not hits.requires_grad


# -------------------------------------------------------------------------- the estimator and the coarse-to-fine pass

SMALL_CHANNELS = (16, 12, 10, 8, 6, 6)
norms = pytest.mark.parametrize("norm", ["none", "layer", "l2", "layer+l2"])


def pyramid(seed, b, h, w, levels=slice(None), dtype=torch.float32):
    return [
        normal(seed + level, b, c, math.ceil(h / stride), math.ceil(w / stride)).to(dtype)
        for level, (c, stride) in enumerate(zip(SMALL_CHANNELS[levels], STRIDES[levels], strict=True))
    ]


def small_estimator(loudness=1.0, levels=slice(None), **options):
    """The weights that give the flow are scaled by `loudness`: flows of many pixels, so that a wrong one shows."""
    torch.manual_seed(0)
    estimator = FlowEstimator(SMALL_CHANNELS[levels], STRIDES[levels], **({"factor": 0.25} | options))
    with torch.no_grad():
        for level in estimator.levels:
            level.last.weight.mul_(loudness)
    return estimator


def test_the_sizes_of_the_estimator_are_those_of_the_papers_table_3():
    def count(**options):
        with torch.device("meta"):
            return sum(p.numel() for p in FlowEstimator(CHANNELS, STRIDES, **options).parameters())

    assert 2.0e6 < count(factor=1.0) < 2.5e6 and 7.5e6 < count(factor=2.0) < 8.5e6
    assert count() == count(factor=2.0, norm="layer")
    # LayerNorm: a gain and an offset per channel, for the five hidden layers of five levels.
    plain, layer, l2, both = (count(factor=1.0, norm=norm) for norm in ("none", "layer", "l2", "layer+l2"))
    assert plain == l2 and layer == both == plain + 5 * 2 * (128 + 128 + 96 + 64 + 32)


@pytest.mark.parametrize("levels", [slice(None), slice(1, None)], ids=["six levels", "five levels"])
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 31), (7, 5), (1, 1)])
def test_flows_have_the_sizes_of_the_levels_down_to_stride_4_for_images_of_any_size(size, levels):
    source, target = pyramid(0, 2, *size, levels), pyramid(10, 2, *size, levels)
    flows = estimate_flow_pyramid(small_estimator(levels=levels), source, target)
    assert [tuple(flow.shape) for flow in flows] == [(2, 2, *level.shape[2:]) for level in source[:-1]]
    assert all(torch.isfinite(flow).all() and flow.dtype == torch.float32 for flow in flows)


@norms
def test_the_flow_of_a_pair_does_not_depend_on_the_rest_of_the_batch_nor_on_its_order(norm):
    """So both directions of a pair may be estimated in one batch."""
    estimator = small_estimator(30.0, norm=norm).double()
    source, target = (pyramid(seed, 3, 65, 97, dtype=torch.float64) for seed in (0, 10))
    source[0][2] *= 100  # one pair unlike the others: shared statistics would show
    flows = estimate_flow_pyramid(estimator, source, target)
    assert flows[-1].abs().mean() > 0.1
    for order in ([2, 0, 1], [1]):
        others = estimate_flow_pyramid(estimator, [x[order] for x in source], [y[order] for y in target])
        for flow, other in zip(flows, others, strict=True):
            torch.testing.assert_close(other, flow[order], rtol=1e-6, atol=1e-6)


def test_the_flow_sees_features_standardised_over_both_frames_of_a_pair():
    """An offset and a scale per channel, the same in both frames, change nothing; in one frame alone they do."""
    estimator = small_estimator(7.0)
    source, target = pyramid(0, 1, 64, 96), pyramid(10, 1, 64, 96)

    def changed(pyramid):
        scales, offsets = ([f(20, 1, x.shape[1], 1, 1).float() for x in pyramid] for f in (uniform, normal))
        return [(0.2 + 5 * scale) * x + 5 * offset for x, scale, offset in zip(pyramid, scales, offsets, strict=True)]

    flow = estimate_flow_pyramid(estimator, source, target)[-1]
    both_changed = estimate_flow_pyramid(estimator, changed(source), changed(target))[-1]
    one_changed = estimate_flow_pyramid(estimator, source, changed(target))[-1]
    torch.testing.assert_close(both_changed, flow, rtol=1e-2, atol=1e-2)
    assert (one_changed - flow).abs().mean() > 0.1


@norms
@pytest.mark.parametrize("kind", ["random", "constant"])
def test_gradients_are_finite_and_reach_every_parameter_and_both_frames(norm, kind):
    estimator = small_estimator(norm=norm)
    source, target = pyramid(0, 2, 65, 97), pyramid(10, 2, 65, 97)
    if kind == "constant":
        source, target = [torch.ones_like(x) for x in source], [torch.ones_like(x) for x in target]
    named = dict(estimator.named_parameters())
    for level in range(5):  # the sixth, of stride 2, is not for the estimator
        named |= {f"source {level}": source[level].requires_grad_(), f"target {level}": target[level].requires_grad_()}
    flows = estimate_flow_pyramid(estimator, source, target)
    sum((flow - 1).abs().sum() for flow in flows).backward()
    for name, leaf in named.items():
        assert torch.isfinite(leaf.grad).all(), name
        assert kind == "constant" or leaf.shape[2:] == (1, 1) or leaf.grad.abs().max() > 0, name


def test_each_level_adds_to_the_flow_of_the_coarser_level():
    """With the updates of the finer levels set to 0, the finest flow is the coarsest, resized level by level."""
    estimator, source, target = small_estimator(30.0), pyramid(0, 1, 100, 140), pyramid(10, 1, 100, 140)
    for level in list(estimator.levels)[1:]:
        torch.nn.init.zeros_(level.last.weight)
    flows = estimate_flow_pyramid(estimator, source, target)
    assert flows[0].abs().mean() > 0.05
    for level in range(1, 5):
        torch.testing.assert_close(flows[level], resize_flow(flows[level - 1], tuple(flows[level].shape[2:])))


def test_a_level_sees_the_correlation_with_what_is_warped_both_features_and_the_flow():
    estimator, seen = small_estimator(30.0), []
    source, target = pyramid(0, 1, 100, 140), pyramid(10, 1, 100, 140)
    for level in estimator.levels:
        level.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    flows = estimate_flow_pyramid(estimator, source, target)
    for k in range(1, 5):
        x, y = flow_module.standardise(source[k], target[k])
        flow, project = resize_flow(flows[k - 1], tuple(x.shape[2:])), estimator.projections[k]
        y = warp(y, flow)
        volume = F.leaky_relu(correlation(x, y) * x.shape[1] ** 0.5, 0.1)
        expected = torch.cat((volume, project(x), project(y), flow), dim=1)
        torch.testing.assert_close(seen[k], expected)


@pytest.mark.parametrize(("unit", "options"), [(16.0, {}), (3.0, {"unit": 3.0})])
def test_an_output_of_one_means_sixteen_pixels_of_the_image_at_every_level(unit, options):
    for index, stride in enumerate(STRIDES[:5]):
        estimator = small_estimator(0.0, **options)
        with torch.no_grad():
            estimator.levels[index].last.bias.copy_(torch.tensor((1.0, -0.5)))
        flow = estimate_flow_pyramid(estimator, pyramid(0, 1, 128, 128), pyramid(10, 1, 128, 128))[index]
        close(flow * stride, constant_flow(unit, -0.5 * unit, 1, *flow.shape[2:]), 1e-5)


@pytest.mark.parametrize(("clip", "options"), [(128.0, {}), (16.0, {"clip": 16.0})])
def test_flows_are_clipped_to_128_pixels_of_the_image(clip, options):
    flows = estimate_flow_pyramid(small_estimator(3e6, **options), pyramid(0, 1, 128, 128), pyramid(10, 1, 128, 128))
    for flow, stride in zip(flows, STRIDES[:5], strict=True):
        assert flow.abs().max().item() * stride == pytest.approx(clip)


@norms
def test_layer_norm_removes_the_scale_of_the_convolutions_and_l2_every_scale_before_the_last_layer(norm):
    # In float64: a loud network magnifies the rounding of float32, which depends on the number of threads.
    source, target = (pyramid(seed, 1, 64, 96, dtype=torch.float64) for seed in (0, 10))

    def finest_flow(scale_of_convolutions, scale_of_gains):
        estimator = small_estimator(30.0, norm=norm).double()
        with torch.no_grad():
            for level in estimator.levels:
                for parameter in level.body.parameters():
                    parameter.mul_(scale_of_convolutions if parameter.ndim == 4 else scale_of_gains)
        return estimate_flow_pyramid(estimator, source, target)[-1]

    flow = finest_flow(1, 1)
    assert torch.allclose(finest_flow(2, 1), flow, rtol=1e-2, atol=1e-2) == (norm != "none")
    assert torch.allclose(finest_flow(1, 2), flow, rtol=1e-2, atol=1e-2) == (norm != "layer")


def test_flow_stays_in_float32_under_autocast():
    features = pyramid(0, 1, 64, 96, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        flows = estimate_flow_pyramid(small_estimator(), features, pyramid(1, 1, 64, 96))
    assert all(flow.dtype == torch.float32 for flow in flows)
