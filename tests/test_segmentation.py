"""The measures of segmentation, and the propagation of labels through a video: each test bears the claim it holds."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate import contour_accuracy, mean_iou, propagate_labels, region_similarity

GOLDEN = Path(__file__).parent / "golden"


def random_masks(seed: int, count: int, h: int, w: int) -> torch.Tensor:
    """Blobs, some of which touch the border or are empty."""
    noise = torch.rand(count, 1, h, w, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)[:, 0]
    return smooth > torch.linspace(0.4, 0.6, count)[:, None, None]


# ----------------------------------------------------------------------------------------------------- measures


def test_region_and_contour_equal_the_official_evaluation_of_davis():
    golden = np.load(GOLDEN / "davis_jaccard_boundary.npz")
    masks = zip(torch.from_numpy(golden["annotation"]), torch.from_numpy(golden["prediction"]), strict=True)
    ours = np.array([(region_similarity(a, p), contour_accuracy(a, p)) for a, p in masks])
    np.testing.assert_allclose(ours[:, 0], golden["region_similarity_J"], atol=1e-9)
    np.testing.assert_allclose(ours[:, 1], golden["contour_accuracy_F"], atol=1e-9)


def contour_by_loops(mask: np.ndarray) -> list[tuple[int, int]]:
    h, w = mask.shape
    others = ((0, 1), (1, 0), (1, 1))
    return [
        (y, x)
        for y in range(h)
        for x in range(w)
        if any(mask[y, x] != mask[min(y + dy, h - 1), min(x + dx, w - 1)] for dy, dx in others)
    ]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), h=st.integers(3, 24), w=st.integers(3, 24))
def test_both_measures_of_davis_equal_plain_loops_and_do_not_depend_on_the_order(seed, h, w):
    a, b = random_masks(seed, 2, h, w)
    pixels = [(bool(a[y, x]), bool(b[y, x])) for y in range(h) for x in range(w)]
    union = sum(p or q for p, q in pixels)
    assert region_similarity(a, b) == pytest.approx(sum(p and q for p, q in pixels) / union if union else 1)
    one, other = contour_by_loops(a.numpy()), contour_by_loops(b.numpy())
    reach = math.ceil(0.008 * math.hypot(h, w))
    near = [
        [any((y - v) ** 2 + (x - u) ** 2 <= reach**2 for v, u in points) for y, x in mine]
        for mine, points in ((other, one), (one, other))
    ]
    if one and other:
        precision, recall = (sum(each) / len(each) for each in near)
        expected = 2 * precision * recall / (precision + recall) if precision + recall else 0
    else:
        expected = float(not one and not other)
    assert contour_accuracy(a, b) == pytest.approx(expected)
    assert region_similarity(a, b) == region_similarity(b, a)
    assert contour_accuracy(a, b) == pytest.approx(contour_accuracy(b, a))


def test_mean_iou_leaves_out_a_class_that_neither_occurs_nor_is_predicted():
    truth, guess = np.random.default_rng(0).integers(0, 4, (2, 500))
    truth[truth == 3], guess[guess == 2] = 0, 1  # class 2 is never predicted, class 3 never occurs
    confusion = torch.zeros(6, 6, dtype=torch.int64)  # classes 4 and 5: neither
    for t, g in zip(truth, guess, strict=True):
        confusion[t, g] += 1
    by_class = [((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum() for c in range(4)]
    assert mean_iou(confusion) == pytest.approx(np.mean(by_class)) and by_class[2] == by_class[3] == 0
    assert mean_iou(torch.eye(3, dtype=torch.int64)) == 1
    with pytest.raises(ValueError, match="no pixel"):
        mean_iou(torch.zeros(3, 3, dtype=torch.int64))


# ------------------------------------------------------------------------------------------ propagation of labels


def dense(target, context, labels, radius, topk, temperature):
    """All pairs of pixels, in float64; then those too far apart are struck out."""
    (h, w), n = target.shape[1:], len(context)
    target, context = (x.double() / x.double().norm(dim=-3, keepdim=True).clamp(min=1e-12) for x in (target, context))
    weights = torch.exp(torch.einsum("dp,ndq->pnq", target.flatten(1), context.flatten(2)) / temperature)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    far = [(v.flatten()[:, None] - v.flatten()[None]).abs() > radius for v in (y, x)]
    weights = weights.masked_fill((far[0] | far[1])[:, None], 0).flatten(1)
    smallest = weights.topk(min(topk, n * h * w)).values[:, -1:]
    weights = weights * (weights >= smallest)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (labels.double().transpose(0, 1).flatten(1) @ weights.T).view(-1, h, w)


def test_labels_are_propagated_as_by_the_code_of_dino():
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "label_propagation.npz").items()}
    ours = propagate_labels(
        golden["target_features"],
        golden["context_features"],
        golden["context_labels"],
        radius=int(golden["radius"]),
        topk=int(golden["topk"]),
        temperature=float(golden["temperature"]),
    )
    torch.testing.assert_close(ours, golden["propagated"], atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    h=st.integers(1, 17),
    w=st.integers(1, 17),
    n=st.integers(1, 3),
    radius=st.integers(0, 9),
    topk=st.integers(1, 6),
)
def test_tiles_give_what_all_pairs_give(seed, h, w, n, radius, topk):
    generator = torch.Generator().manual_seed(seed)
    target, context = (torch.randn(*size, generator=generator) for size in ((5, h, w), (n, 5, h, w)))
    labels = torch.rand(n, 3, h, w, generator=generator)
    ours = propagate_labels(target, context, labels, radius, topk)
    torch.testing.assert_close(ours.double(), dense(target, context, labels, radius, topk, 0.1), atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), radius=st.integers(1, 6))
def test_labels_stay_in_their_range_sum_to_one_and_do_not_depend_on_the_order_of_the_frames(seed, radius):
    generator = torch.Generator().manual_seed(seed)
    target, context = (torch.randn(*size, generator=generator) for size in ((6, 11, 9), (3, 6, 11, 9)))
    labels = torch.nn.functional.one_hot(torch.randint(0, 4, (3, 11, 9), generator=generator), 4).movedim(-1, 1).float()
    result = propagate_labels(target, context, labels, radius)
    assert result.min() >= 0 and torch.allclose(result.sum(dim=0), torch.ones(11, 9), atol=1e-5)
    turned = propagate_labels(target, context.flip(0), labels.flip(0), radius)
    torch.testing.assert_close(result, turned, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result, propagate_labels(7 * target, context, labels, radius), atol=1e-5, rtol=1e-4)


def test_an_object_that_moves_within_the_radius_takes_its_label_along_and_beyond_it_does_not():
    features = torch.randn(1, 16, 20, 40, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, 2, 20, 40)
    labels[0, 1, 5:12, 8:15], labels[0, 0] = 1, 1 - labels[0, 1]
    moved = features[0].roll(6, dims=2)
    expected = labels[0].roll(6, dims=2)
    near = propagate_labels(moved, features, labels, radius=6, topk=1)[:, :, 6:]
    assert torch.equal(near, expected[:, :, 6:])
    far = propagate_labels(moved, features, labels, radius=5, topk=1)
    assert (far[:, :, 6:] - expected[:, :, 6:]).abs().mean() > 0.05
