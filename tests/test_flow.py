"""Warping, correlation, occlusion masks and the coarse-to-fine pass (Eq. 1), each against an oracle.

The oracles are float64 loops over pixels, numbers computed by the code of others (tests/golden: ARFlow and the like),
flows known by construction, and the exact flows of MovingShapes. How to run: `pytest tests/test_flow.py`.
"""

import math
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flow as flow_module
from flow import (
    FlowEstimator,
    correlation,
    estimate_flow_pyramid,
    forward_backward_mask,
    range_map,
    resize_flow,
    warp,
)
from sources.moving_shapes import MovingShapes

GOLDEN = Path(__file__).parent / "golden"
# The pyramid of the default encoder (DESIGN.md), coarsest first.
CHANNELS, STRIDES = (768, 384, 192, 96, 48, 48), (64, 32, 16, 8, 4, 2)

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31 - 1)
sides = st.integers(1, 9)
paddings = pytest.mark.parametrize("padding", ["border", "zeros"])


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def constant_flow(u, v, b, h, w, dtype=torch.float64):
    return torch.tensor([u, v], dtype=dtype).view(1, 2, 1, 1).expand(b, 2, h, w).contiguous()


def end_points(flow):
    """Where each pixel ends, x and y apart, (b, h, w) each."""
    h, w = flow.shape[2:]
    return torch.arange(w) + flow[:, 0], torch.arange(h)[:, None] + flow[:, 1]


def ends_inside(flow):
    x, y = end_points(flow)
    h, w = flow.shape[2:]
    return ((x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1))[:, None]


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


# --- the oracles -----------------------------------------------------------------------------------------------------


def loop_warp(x, flow, padding):
    """x at p + flow(p): the four neighbours, each weighted by its closeness, one pixel at a time."""
    b, c, h, w = x.shape
    out = torch.zeros(b, c, h, w, dtype=torch.float64)
    for n, i, j in np.ndindex(b, h, w):
        column, row = j + float(flow[n, 0, i, j]), i + float(flow[n, 1, i, j])
        if padding == "border":
            column, row = min(max(column, 0), w - 1), min(max(row, 0), h - 1)
        left, top = math.floor(column), math.floor(row)
        for y, z in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            if 0 <= y < h and 0 <= z < w:
                out[n, :, i, j] += (1 - abs(row - y)) * (1 - abs(column - z)) * x[n, :, y, z]
    return out


def loop_correlation(x, y, radius):
    b, c, h, w = x.shape
    out = torch.zeros(b, (2 * radius + 1) ** 2, h, w, dtype=torch.float64)
    for n, i, j in np.ndindex(b, h, w):
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                if 0 <= i + dy < h and 0 <= j + dx < w:
                    channel = (dy + radius) * (2 * radius + 1) + dx + radius
                    out[n, channel, i, j] = sum(float(x[n, k, i, j] * y[n, k, i + dy, j + dx]) for k in range(c)) / c
    return out


def loop_range_map(flow):
    b, _, h, w = flow.shape
    out = torch.zeros(b, 1, h, w, dtype=torch.float64)
    for n, i, j in np.ndindex(b, h, w):
        column, row = j + float(flow[n, 0, i, j]), i + float(flow[n, 1, i, j])
        left, top = math.floor(column), math.floor(row)
        for y, z in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            if 0 <= y < h and 0 <= z < w:
                out[n, 0, y, z] += (1 - abs(row - y)) * (1 - abs(column - z))
    return out


# --- warp ------------------------------------------------------------------------------------------------------------


@paddings
@few
@given(seed=seeds, h=sides, w=sides, reach=st.sampled_from([0.5, 3.0, 20.0]))
def test_warp_equals_the_loops(padding, seed, h, w, reach):
    if padding == "zeros":  # with align_corners=True an axis of a single pixel has no outside
        h, w = h + 1, w + 1
    x, flow = normal(seed, 2, 3, h, w), reach * normal(seed + 1, 2, 2, h, w)
    close(warp(x, flow, padding=padding), loop_warp(x, flow, padding))


@paddings
def test_warp_equals_the_published_code(padding):
    numbers = golden("flow_warp")
    close(warp(numbers["image"], numbers["flow"], padding=padding), numbers[f"warped_{padding}"])


def test_warp_pads_with_the_border_unless_told_otherwise():
    x, flow = normal(0, 1, 2, 5, 6), 4 * normal(1, 1, 2, 5, 6)
    assert torch.equal(warp(x, flow), warp(x, flow, padding="border"))
    assert not torch.equal(warp(x, flow), warp(x, flow, padding="zeros"))


def test_warping_a_translated_image_by_its_translation_gives_it_back():
    """The scene moves 5 px to the right and 3 px up: a point at p in frame t is at p + (5, -3) in frame t+1."""
    scene = uniform(0, 1, 3, 40, 50)
    frame_t, frame_t1 = scene[..., 10:30, 10:35], scene[..., 13:33, 5:30]
    assert torch.equal(frame_t1[0, :, 7, 15], frame_t[0, :, 10, 10])
    flow_t_to_t1 = constant_flow(5.0, -3.0, 1, 20, 25)
    close(warp(frame_t1, flow_t_to_t1)[..., 3:, :20], frame_t[..., 3:, :20])


@paddings
@few
@given(seed=seeds, u=st.integers(-4, 4), v=st.integers(-4, 4))
def test_warp_by_whole_pixels_is_a_shift(padding, seed, u, v):
    x = normal(seed, 2, 3, 10, 11)
    flow = constant_flow(float(u), float(v), 2, 10, 11)
    inside = ends_inside(flow).expand_as(x)
    shifted = x.roll((-v, -u), dims=(2, 3))
    warped = warp(x, flow, padding=padding)
    close(warped[inside], shifted[inside])
    if padding == "zeros":
        close(warped[~inside], torch.zeros((~inside).sum()))
    else:
        rows, columns = (torch.arange(10) + v).clamp(0, 9), (torch.arange(11) + u).clamp(0, 10)
        close(warped, x[:, :, rows][..., columns])


@paddings
@few
@given(seed=seeds, u=st.floats(-3, 3), v=st.floats(-3, 3))
def test_warp_there_and_back_by_a_constant_flow_returns_an_affine_map(padding, seed, u, v):
    """Bilinear sampling is exact on an affine map: there and back must be the identity, away from the border."""
    a, b, c = normal(seed, 3).tolist()
    y, x = torch.meshgrid(torch.arange(14.0).double(), torch.arange(15.0).double(), indexing="ij")
    ramp = (a * x + b * y + c)[None, None]
    flow = constant_flow(u, v, 1, 14, 15)
    there = warp(ramp, flow, padding=padding)
    close(there[..., 4:-4, 4:-4], (ramp + a * u + b * v)[..., 4:-4, 4:-4])
    close(warp(there, -flow, padding=padding)[..., 7:-7, 7:-7], ramp[..., 7:-7, 7:-7])


@paddings
@few
@given(seed=seeds, b=st.integers(1, 3), h=sides, w=sides)
def test_warp_by_zero_flow_is_the_identity_and_warp_is_linear_in_the_image(padding, seed, b, h, w):
    x, other, flow = normal(seed, b, 2, h, w), normal(seed + 1, b, 2, h, w), 3 * normal(seed + 2, b, 2, h, w)
    close(warp(x, torch.zeros_like(flow), padding=padding), x)
    together = warp(2 * x - other, flow, padding=padding)
    close(together, 2 * warp(x, flow, padding=padding) - warp(other, flow, padding=padding))
    close(warp(x.flip(0), flow.flip(0), padding=padding), warp(x, flow, padding=padding).flip(0))
    bound = x.amin(), x.amax()
    warped = warp(x, flow, padding="border")
    assert (warped >= bound[0] - 1e-9).all() and (warped <= bound[1] + 1e-9).all()


@paddings
def test_warp_gradients_equal_finite_differences_between_the_pixels(padding):
    x = normal(0, 1, 2, 4, 5).requires_grad_()
    # Fractions in [0.2, 0.8]: bilinear sampling has a kink on every pixel.
    whole = torch.randint(-2, 3, (1, 2, 4, 5), generator=torch.Generator().manual_seed(1))
    flow = (whole + 0.2 + 0.6 * uniform(2, 1, 2, 4, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda image, field: warp(image, field, padding=padding), [x, flow])


@paddings
def test_warp_gradients_are_finite_far_outside_and_exactly_on_pixels(padding):
    for reach in (0.0, 1.0, 1e4):
        x, flow = normal(0, 1, 2, 4, 5).requires_grad_(), constant_flow(reach, -reach, 1, 4, 5).requires_grad_()
        warp(x, flow, padding=padding).sum().backward()
        assert torch.isfinite(x.grad).all() and torch.isfinite(flow.grad).all()


def test_warp_in_float32_hits_the_pixel_on_wide_frames_and_under_autocast():
    """Coordinates in bfloat16 would turn 300.3 into 300, or 1000.3 into 1000."""
    ramp = torch.arange(1400.0).expand(1, 1, 3, 1400)
    flow = constant_flow(300.3, 0.0, 1, 3, 1400, torch.float32)
    expected = (ramp + 300.3)[..., :1099]
    torch.testing.assert_close(warp(ramp, flow)[..., :1099], expected, rtol=0, atol=2e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(warp(ramp, flow)[..., :1099], expected, rtol=0, atol=2e-3)


def test_warp_refuses_an_unknown_padding():
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="padding"):
        warp(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4), padding="mirror")


# --- correlation -----------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, radius=st.integers(0, 2), c=st.integers(1, 4), h=st.integers(1, 5), w=st.integers(1, 5))
def test_correlation_equals_the_loops(seed, radius, c, h, w):
    x, y = normal(seed, 2, c, h, w), normal(seed + 1, 2, c, h, w)
    close(correlation(x, y, radius=radius), loop_correlation(x, y, radius))


def test_correlation_equals_the_published_code_and_has_radius_four_by_default():
    numbers = golden("correlation_radius4")
    close(correlation(numbers["features_1"], numbers["features_2"]), numbers["volume"])


@few
@given(seed=seeds, dx=st.integers(-3, 3), dy=st.integers(-3, 3))
def test_the_strongest_channel_of_the_correlation_is_the_translation(seed, dx, dy):
    scene = normal(seed, 1, 64, 16, 18)
    x, y = scene[..., 4:12, 4:14], scene[..., 4 - dy : 12 - dy, 4 - dx : 14 - dx]
    volume = correlation(x, y, radius=3)
    best = volume.argmax(dim=1)[0, 3:-3, 3:-3]
    assert (best == (dy + 3) * 7 + dx + 3).all()


@few
@given(seed=seeds, radius=st.integers(1, 3))
def test_correlation_of_swapped_frames_is_the_same_volume_seen_from_the_other_side(seed, radius):
    x, y = normal(seed, 2, 3, 7, 8), normal(seed + 1, 2, 3, 7, 8)
    volume, swapped = correlation(x, y, radius=radius), correlation(y, x, radius=radius)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            here = volume[:, (dy + radius) * (2 * radius + 1) + dx + radius]
            there = swapped[:, (radius - dy) * (2 * radius + 1) + radius - dx].roll((-dy, -dx), dims=(1, 2))
            inside = ends_inside(constant_flow(float(dx), float(dy), 2, 7, 8))[:, 0]
            close(here[inside], there[inside])
    close(correlation(3 * x, -y, radius=radius), -3 * volume)


def test_correlation_gradients_equal_finite_differences():
    x, y = normal(0, 1, 2, 3, 4).requires_grad_(), normal(1, 1, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: correlation(a, b, radius=1), [x, y])


# --- resize_flow -----------------------------------------------------------------------------------------------------


@few
@given(h=sides, w=sides, h2=sides, w2=sides, u=st.floats(-20, 20), v=st.floats(-20, 20))
def test_resizing_a_constant_flow_rescales_x_by_the_width_and_y_by_the_height(h, w, h2, w2, u, v):
    resized = resize_flow(constant_flow(u, v, 2, h, w), (h2, w2))
    close(resized, constant_flow(u * w2 / w, v * h2 / h, 2, h2, w2))


@few
@given(seed=seeds, h=st.integers(5, 8), w=st.integers(5, 8))
def test_doubling_a_smooth_flow_and_halving_it_gives_it_back_inside(seed, h, w):
    coefficients = normal(seed, 6).view(2, 3, 1, 1)
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    flow = (coefficients[:, 0] * x + coefficients[:, 1] * y + coefficients[:, 2])[None]
    doubled = resize_flow(flow, (2 * h, 2 * w))
    assert doubled.shape == (1, 2, 2 * h, 2 * w)
    close(doubled.mean(), 2 * flow.mean())
    close(resize_flow(doubled, (h, w))[..., 1:-1, 1:-1], flow[..., 1:-1, 1:-1])
    close(resize_flow(flow, (h, w)), flow)


@few
@given(seed=seeds, h=sides, w=sides, h2=sides, w2=sides)
def test_resizing_keeps_the_range_of_a_flow_its_mirror_image_and_its_sign(seed, h, w, h2, w2):
    flow = normal(seed, 1, 2, h, w)
    resized = resize_flow(flow, (h2, w2))
    for channel, scale in ((0, w2 / w), (1, h2 / h)):
        assert resized[:, channel].max() <= scale * flow[:, channel].max() + 1e-9
        assert resized[:, channel].min() >= scale * flow[:, channel].min() - 1e-9
    close(resize_flow(flow.flip(3), (h2, w2)), resized.flip(3))
    close(resize_flow(flow.flip(2), (h2, w2)), resized.flip(2))
    close(resize_flow(-2 * flow, (h2, w2)), -2 * resized)


def test_a_frame_at_half_size_is_warped_right_by_the_flow_at_half_size():
    """Shrinking the frames or shrinking the flow: the same scene, so the same warp, up to what the shrinking blurs."""
    y, x = torch.meshgrid(torch.arange(64.0).double(), torch.arange(96.0).double(), indexing="ij")

    def wave(x, y):
        return (torch.sin(x / 6) + torch.cos(y / 5))[None, None]

    u, v = 0.1 * (x - 40) + 3, -0.1 * (y - 30) - 2  # zooms in x, shrinks in y
    flow = torch.stack([u, v])[None]
    frame_t1, frame_t = wave(x, y), wave(x + u, y + v)
    small_t1, small_t = (torch.nn.functional.avg_pool2d(frame, (2, 4)) for frame in (frame_t1, frame_t))
    difference = warp(small_t1, resize_flow(flow, (32, 24))) - small_t
    error = difference[ends_inside(resize_flow(flow, (32, 24)))].abs().mean()
    moved = (small_t1 - small_t).abs().mean()
    assert error < 0.06 * moved


# --- occlusion -------------------------------------------------------------------------------------------------------


def test_forward_backward_mask_equals_the_published_code():
    """True where visible; the golden array holds the occluded pixels. Both samples give the reverse flow 0 outside."""
    numbers = golden("occlusion_masks")
    flow, reverse = numbers["flow_forward"], numbers["flow_backward"]
    visible = ~numbers["occluded_forward_backward"].bool()
    mask = forward_backward_mask(flow, reverse)
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 40, 56)
    inside = ends_inside(flow)
    assert inside.float().mean() > 0.5 and visible[inside].any() and not visible[inside].all()
    assert torch.equal(mask[inside], visible[inside])
    # A pixel that leaves the frame is not seen in both: there a mask may be stricter than the published one.
    assert not (mask & ~visible).any()
    assert torch.equal(mask, forward_backward_mask(flow, reverse, alpha1=0.01, alpha2=0.5))


@few
@given(seed=seeds, alpha1=st.floats(0, 0.5), alpha2=st.floats(0.01, 3))
def test_forward_backward_mask_equals_the_loops(seed, alpha1, alpha2):
    flow = 2 * normal(seed, 2, 2, 7, 8)
    reverse = -flow + 0.7 * normal(seed + 1, 2, 2, 7, 8)
    mask = forward_backward_mask(flow, reverse, alpha1=alpha1, alpha2=alpha2)
    back = loop_warp(reverse, flow, "zeros")
    for n, i, j in torch.nonzero(ends_inside(flow)[:, 0]).tolist():
        f, b = flow[n, :, i, j].tolist(), back[n, :, i, j].tolist()
        gap = (f[0] + b[0]) ** 2 + (f[1] + b[1]) ** 2
        bound = alpha1 * (f[0] ** 2 + f[1] ** 2 + b[0] ** 2 + b[1] ** 2) + alpha2
        assert bool(mask[n, 0, i, j]) == (gap < bound)


@few
@given(u=st.integers(-5, 5), v=st.integers(-5, 5))
def test_opposite_constant_flows_see_every_pixel_but_those_that_leave_the_frame(u, v):
    flow = constant_flow(float(u), float(v), 1, 12, 13)
    assert torch.equal(forward_backward_mask(flow, -flow), ends_inside(flow))


@few
@given(u=st.floats(-9, 9), v=st.floats(-9, 9))
def test_flows_that_agree_instead_of_cancelling_mark_every_moving_pixel_as_occluded(u, v):
    flow = constant_flow(u, v, 1, 12, 13)
    # |2f|^2 < 0.01 * 2 |f|^2 + 0.5  <=>  |f|^2 < 0.5 / 3.98; outside, |f|^2 < 0.5 / 0.99.
    visible = forward_backward_mask(flow, flow)
    length = u**2 + v**2
    assert not visible[ends_inside(flow)].any() or length < 0.5 / 3.98 + 1e-9
    assert visible.all() or length > 0.5 / 3.98 - 1e-9
    assert not visible.any() or length < 0.5 / 0.99 + 1e-9


def test_masks_carry_no_gradient():
    flow, reverse = normal(0, 1, 2, 5, 6).requires_grad_(), normal(1, 1, 2, 5, 6).requires_grad_()
    assert not forward_backward_mask(flow, reverse).requires_grad


def test_range_map_equals_the_published_code():
    """What is hit in frame t is told by the flow from t+1 to t: the golden map is that of the backward flow."""
    numbers = golden("occlusion_masks")
    hits = range_map(numbers["flow_backward"])
    close(hits, numbers["range_map"])
    assert torch.equal(hits < 0.2, numbers["occluded_range_map_below_0_2"].bool())


@few
@given(seed=seeds, h=sides, w=sides, reach=st.sampled_from([0.5, 3.0, 20.0]))
def test_range_map_equals_the_loops(seed, h, w, reach):
    flow = reach * normal(seed, 2, 2, h, w)
    close(range_map(flow), loop_range_map(flow))


@few
@given(seed=seeds, b=st.integers(1, 3), h=st.integers(2, 9), w=st.integers(2, 9))
def test_range_map_loses_no_pixel_that_ends_inside_and_is_one_for_zero_flow(seed, b, h, w):
    shape = (b, h, w)
    columns, rows = (w - 1) * uniform(seed, *shape), (h - 1) * uniform(seed + 1, *shape)
    flow = torch.stack([columns - torch.arange(w), rows - torch.arange(h)[:, None]], dim=1)
    hits = range_map(flow)
    assert hits.shape == (b, 1, h, w) and (hits >= 0).all()
    close(hits.sum(dim=(1, 2, 3)), torch.full((b,), float(h * w)))
    close(range_map(torch.zeros_like(flow)), torch.ones(b, 1, h, w))
    close(range_map(flow.flip(0)), hits.flip(0))


@few
@given(seed=seeds, reach=st.sampled_from([0.5, 3.0, 20.0]))
def test_range_map_is_the_transpose_of_the_warp(seed, reach):
    """Splatting ones along a flow is the gradient of the sum of what the warp (padding zeros) gathers by it."""
    flow = reach * normal(seed, 1, 2, 7, 8)
    x = torch.zeros(1, 1, 7, 8, dtype=torch.float64, requires_grad=True)
    warp(x, flow, padding="zeros").sum().backward()
    close(range_map(flow), x.grad)


# --- all of it on the exact flows of MovingShapes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    scenes = MovingShapes(length=8, size=(96, 128), frames=2, seed=3, brightness=0.0)
    items = [scenes[index] for index in range(8)]
    names = ("flow_forward", "flow_backward", "visible_forward", "images")
    forward, backward, visible, images = (torch.stack([item[name] for item in items]) for name in names)
    return {
        "forward": forward[:, 0],
        "backward": backward[:, 0],
        "visible": visible[:, 0],
        "frame_t": images[:, 0],
        "frame_t1": images[:, 1],
    }


def test_exact_flows_there_and_back_return_every_visible_pixel_to_its_place(shapes):
    gap = (shapes["forward"] + warp(shapes["backward"], shapes["forward"])).norm(dim=1, keepdim=True)
    seen = gap[shapes["visible"]]
    assert shapes["forward"].norm(dim=1).mean() > 0.5
    # Bilinear sampling mixes the flows of two layers within a pixel of their edge.
    assert seen.median() < 1e-3 and (seen < 0.1).float().mean() > 0.9


def test_a_frame_warped_by_the_exact_flow_is_the_other_frame_where_it_is_visible(shapes):
    def error(image):
        return (image - shapes["frame_t"]).abs().mean(dim=1, keepdim=True)[shapes["visible"]].mean()

    unmoved = error(shapes["frame_t1"])
    assert error(warp(shapes["frame_t1"], shapes["forward"])) < 0.2 * unmoved
    there_and_back = warp(warp(shapes["frame_t"], shapes["backward"]), shapes["forward"])
    assert error(there_and_back) < 0.25 * unmoved


def test_the_mask_of_exact_flows_is_the_exact_visibility_on_more_than_95_percent_of_the_pixels(shapes):
    mask, visible = forward_backward_mask(shapes["forward"], shapes["backward"]), shapes["visible"]
    assert (mask == visible).float().mean() > 0.95
    # Most pixels are visible, so the hidden ones have to be found as well.
    assert (~mask)[~visible].float().mean() > 0.8


def test_the_range_map_of_the_exact_backward_flow_is_low_where_a_pixel_is_hidden(shapes):
    hits, visible = range_map(shapes["backward"]), shapes["visible"]
    assert hits[visible].mean() > 0.9 and hits[~visible].mean() < 0.4


# --- the estimator and the coarse-to-fine pass -----------------------------------------------------------------------

SMALL_CHANNELS = (16, 12, 10, 8, 6, 6)


def pyramid(seed, b, h, w, channels=SMALL_CHANNELS, strides=STRIDES):
    return [
        normal(seed + level, b, c, math.ceil(h / stride), math.ceil(w / stride)).float()
        for level, (c, stride) in enumerate(zip(channels, strides, strict=True))
    ]


def estimator_of(seed=0, **options):
    torch.manual_seed(seed)
    options = {"factor": 0.25} | options
    return FlowEstimator(SMALL_CHANNELS, STRIDES, **options)


def loud(estimator, scale=30.0):
    """The same estimator with its weights blown up, so that its flows are of many pixels and a wrong one is seen."""
    with torch.no_grad():
        for name, parameter in estimator.named_parameters():
            if name.startswith("levels") and parameter.shape[0] == 2:
                parameter.mul_(scale)
    return estimator


@pytest.mark.parametrize(("factor", "least", "most"), [(1.0, 2.0e6, 2.5e6), (2.0, 7.5e6, 8.5e6)])
def test_the_estimators_size_is_that_of_the_papers_table_3(factor, least, most):
    with torch.device("meta"):
        estimator = FlowEstimator(CHANNELS, STRIDES, factor=factor)
        default = FlowEstimator(CHANNELS, STRIDES)
    assert least < sum(p.numel() for p in estimator.parameters()) < most
    assert 7.5e6 < sum(p.numel() for p in default.parameters()) < 8.5e6


@pytest.mark.parametrize("size", [(64, 64), (128, 192), (65, 97), (33, 31), (7, 5), (1, 1)])
def test_flows_of_any_size_of_image_have_the_sizes_of_the_levels_down_to_stride_four(size):
    source, target = pyramid(0, 2, *size), pyramid(10, 2, *size)
    flows = estimate_flow_pyramid(estimator_of(), source, target)
    assert [tuple(flow.shape) for flow in flows] == [(2, 2, *level.shape[2:]) for level in source[:5]]
    assert all(torch.isfinite(flow).all() and flow.dtype == torch.float32 for flow in flows)


def test_a_pyramid_of_five_levels_ends_at_stride_four_too():
    channels, strides = (20, 16, 12, 10, 8), (32, 16, 8, 4, 2)
    torch.manual_seed(0)
    estimator = FlowEstimator(channels, strides, factor=0.25)
    source, target = (pyramid(seed, 1, 65, 97, channels, strides) for seed in (0, 10))
    flows = estimate_flow_pyramid(estimator, source, target)
    assert [flow.shape[2:] for flow in flows] == [level.shape[2:] for level in source[:4]]


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
@pytest.mark.parametrize("norm", ["none", "layer", "l2", "layer+l2"])
def test_both_directions_in_one_batch_equal_two_passes(size, norm):
    estimator = loud(estimator_of(norm=norm))
    one, two = pyramid(0, 2, *size), pyramid(10, 2, *size)
    pairs = list(zip(one, two, strict=True))
    together = estimate_flow_pyramid(estimator, [torch.cat(p) for p in pairs], [torch.cat(p[::-1]) for p in pairs])
    forward, backward = estimate_flow_pyramid(estimator, one, two), estimate_flow_pyramid(estimator, two, one)
    assert forward[-1].abs().mean() > 0.1 and not torch.allclose(forward[-1], backward[-1], atol=0.01)
    for both, there, back in zip(together, forward, backward, strict=True):
        torch.testing.assert_close(both, torch.cat([there, back]), rtol=1e-3, atol=1e-3)


def test_a_pairs_flow_does_not_depend_on_the_rest_of_the_batch_nor_on_its_order():
    estimator = loud(estimator_of()).double()
    source, target = ([x.double() for x in pyramid(seed, 3, 64, 96)] for seed in (0, 10))
    source[0][2] *= 100  # one pair unlike the others: shared statistics would show
    flows = estimate_flow_pyramid(estimator, source, target)
    order = torch.tensor([2, 0, 1])
    mixed = estimate_flow_pyramid(estimator, [x[order] for x in source], [y[order] for y in target])
    alone = estimate_flow_pyramid(estimator, [x[1:2] for x in source], [y[1:2] for y in target])
    for flow, other, single in zip(flows, mixed, alone, strict=True):
        torch.testing.assert_close(other, flow[order], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(single, flow[1:2], rtol=1e-6, atol=1e-6)


def test_the_flow_sees_features_standardised_over_both_frames_of_a_pair():
    """An offset and a scale per channel, the same in both frames, change nothing; in one frame alone they do."""
    estimator = loud(estimator_of(), 7.0)
    source, target = pyramid(0, 1, 64, 96), pyramid(10, 1, 64, 96)
    offsets = [5 * normal(20, 1, c, 1, 1).float() for c in SMALL_CHANNELS]
    scales = [0.2 + 5 * uniform(21, 1, c, 1, 1).float() for c in SMALL_CHANNELS]

    def moved(pyramid):
        return [scale * x + offset for x, scale, offset in zip(pyramid, scales, offsets, strict=True)]

    flows = estimate_flow_pyramid(estimator, source, target)
    both_moved = estimate_flow_pyramid(estimator, moved(source), moved(target))
    one_moved = estimate_flow_pyramid(estimator, source, moved(target))
    torch.testing.assert_close(both_moved[-1], flows[-1], rtol=1e-2, atol=1e-2)
    assert (one_moved[-1] - flows[-1]).abs().mean() > 0.1


@pytest.mark.parametrize("norm", ["none", "layer", "l2", "layer+l2"])
@pytest.mark.parametrize("kind", ["random", "constant", "equal"])
def test_gradients_reach_every_parameter_and_both_frames_and_are_finite(norm, kind):
    estimator = estimator_of(norm=norm)
    source = pyramid(0, 2, 65, 97)
    target = pyramid(10, 2, 65, 97) if kind == "random" else [x.clone() for x in source]
    if kind == "constant":
        source, target = [torch.ones_like(x) for x in source], [torch.ones_like(x) for x in target]
    for x in [*source, *target]:
        x.requires_grad_()
    flows = estimate_flow_pyramid(estimator, source, target)
    sum((flow - 1).abs().sum() for flow in flows).backward()
    for name, parameter in estimator.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert kind == "constant" or parameter.grad.abs().max() > 0, name
    for x in [*source[:5], *target[:5]]:
        assert torch.isfinite(x.grad).all()
        assert kind == "constant" or x.shape[2:] == (1, 1) or x.grad.abs().max() > 0


def test_each_level_adds_to_the_flow_of_the_coarser_one():
    """With the finer levels' updates silenced, the finest flow is the coarsest one, resized level by level."""
    estimator = loud(estimator_of())
    with torch.no_grad():
        for level in list(estimator.levels)[1:]:
            list(level.parameters())[-2].zero_()
            list(level.parameters())[-1].zero_()
    flows = estimate_flow_pyramid(estimator, pyramid(0, 1, 100, 140), pyramid(10, 1, 100, 140))
    assert flows[0].abs().mean() > 0.05
    for coarse, fine in zip(flows[:-1], flows[1:], strict=True):
        torch.testing.assert_close(fine, resize_flow(coarse, tuple(fine.shape[2:])))


def test_an_output_of_one_means_sixteen_pixels_of_the_image_at_every_level():
    for unit, options in ((16.0, {}), (3.0, {"unit": 3.0})):
        for loud_level, stride in enumerate(STRIDES[:5]):
            estimator = estimator_of(**options)
            with torch.no_grad():
                for number, level in enumerate(estimator.levels):
                    level.last.weight.zero_()
                    level.last.bias.copy_(torch.tensor((1.0, -0.5)) * (number == loud_level))
            flow = estimate_flow_pyramid(estimator, pyramid(0, 1, 128, 128), pyramid(10, 1, 128, 128))[loud_level]
            for channel, expected in enumerate((unit, -0.5 * unit)):
                torch.testing.assert_close(flow[:, channel] * stride, torch.full_like(flow[:, channel], expected))


@pytest.mark.parametrize("norm", ["none", "layer", "l2", "layer+l2"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_first_outputs_of_every_level_are_about_a_quarter_whatever_the_width_and_norm(factor, norm):
    estimator = estimator_of(factor=factor, norm=norm)
    inputs = torch.randn(2, 81 + 32 + 2, 16, 16)
    for level in estimator.levels:
        assert 0.1 < level(inputs).square().mean().sqrt() < 0.6


def test_flows_are_clipped_to_128_pixels_of_the_image():
    estimator = loud(estimator_of(), 1e5)
    flows = estimate_flow_pyramid(estimator, pyramid(0, 1, 128, 128), pyramid(10, 1, 128, 128))
    for flow, stride in zip(flows, STRIDES[:5], strict=True):
        assert flow.abs().max() * stride <= 128 * (1 + 1e-5)
    assert flows[-1].abs().max().item() * 4 == pytest.approx(128)
    tight = loud(estimator_of(clip=16.0), 1e5)
    flows = estimate_flow_pyramid(tight, pyramid(0, 1, 128, 128), pyramid(10, 1, 128, 128))
    for flow, stride in zip(flows, STRIDES[:5], strict=True):
        assert flow.abs().max() * stride <= 16 * (1 + 1e-5)


@pytest.mark.parametrize("norm", ["none", "layer", "l2", "layer+l2"])
def test_each_norm_takes_off_the_scales_that_it_should(norm):
    """LayerNorm: the convolutions' scale is nothing. l2 before the last layer: nothing before it has a scale."""
    # In float64: a loud network enlarges what float32 rounds, which depends on the number of threads.
    source, target = ([features.double() for features in pyramid(seed, 1, 64, 96)] for seed in (0, 10))

    def finest_flow(scale_of_convolutions, scale_of_gains):
        estimator = loud(estimator_of(norm=norm)).double()
        with torch.no_grad():
            for level in estimator.levels:
                for parameter in list(level.parameters())[:-2]:
                    parameter.mul_(scale_of_convolutions if parameter.ndim == 4 else scale_of_gains)
        return estimate_flow_pyramid(estimator, source, target)[-1]

    flow = finest_flow(1, 1)
    louder, gained = finest_flow(2, 1), finest_flow(1, 2)
    assert torch.allclose(louder, flow, rtol=1e-2, atol=1e-2) == (norm != "none")
    assert torch.allclose(gained, flow, rtol=1e-2, atol=1e-2) == (norm != "layer")


def test_layer_norm_is_over_the_channels_of_every_hidden_layer():
    """A gain and an offset per channel, for the widths 128, 128, 96, 64 and 32 of five levels."""
    with torch.device("meta"):
        count = {
            norm: sum(p.numel() for p in FlowEstimator(CHANNELS, STRIDES, factor=1.0, norm=norm).parameters())
            for norm in ("none", "layer", "l2", "layer+l2")
        }
    assert count["l2"] == count["none"] and count["layer+l2"] == count["layer"]
    assert count["layer"] - count["none"] == 5 * 2 * (128 + 128 + 96 + 64 + 32)


def test_an_unknown_norm_is_refused_by_name():
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="batch"):
        FlowEstimator(SMALL_CHANNELS, STRIDES, norm="batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flow_stays_in_float32_under_autocast(dtype):
    source, target = ([x.to(dtype) for x in pyramid(seed, 1, 64, 96)] for seed in (0, 10))
    with torch.autocast("cpu", torch.bfloat16):
        flows = estimate_flow_pyramid(estimator_of(), source, target)
    assert all(flow.dtype == torch.float32 for flow in flows)


# --- a wrong shape is told by name -----------------------------------------------------------------------------------

MAP, FLOW = torch.rand(2, 3, 6, 7), torch.rand(2, 2, 6, 7)


@pytest.mark.parametrize(
    ("name", "arguments", "at_fault"),
    [
        ("warp", [MAP[0], FLOW], "x"),
        ("warp", [MAP, MAP], "flow"),
        ("warp", [MAP, FLOW[..., 1:]], "flow"),
        ("warp", [MAP, FLOW[:1]], "flow"),
        ("correlation", [MAP, FLOW], "y"),
        ("resize_flow", [MAP, (3, 3)], "flow"),
        ("forward_backward_mask", [FLOW, FLOW[:, :, 1:]], "flow_reverse"),
        ("range_map", [MAP], "flow"),
    ],
)
def test_a_wrong_shape_is_told_by_the_arguments_name(name, arguments, at_fault):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{at_fault}'"):
        getattr(flow_module, name)(*arguments)
