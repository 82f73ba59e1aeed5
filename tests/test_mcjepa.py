"""The model: Eq. 7 and its terms, any size, what a batch may look like, and checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flow import warp
from losses import reconstruction_loss, smoothness_loss, ssim_distance
from mcjepa import MCJEPA, LossConfig, ModelConfig, load_checkpoint, load_model

SMALL = ModelConfig(encoder="pwc", estimator_factor=0.125, expander=(32, 32, 32))
FLOW_TERMS = ["reconstruction", "regression", "smoothness", "cycle", "variance_covariance"]
CONTENT_TERMS = ["vicreg_invariance", "vicreg_variance", "vicreg_covariance"]


def small_model(task="mcjepa", **loss) -> MCJEPA:
    torch.manual_seed(0)
    return MCJEPA(SMALL, LossConfig(**loss), task).double()


def pairs(b=2, h=64, w=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, b, 3, h // 8 + 1, w // 8 + 1, generator=generator, dtype=torch.float64)
    return tuple(F.interpolate(x, size=(h, w), mode="bicubic").clamp(0, 1) for x in coarse)


def test_the_total_is_the_sum_of_the_weighted_terms_and_names_all_of_them():
    losses = small_model()(video=pairs(), views=pairs(4, seed=2))
    assert list(losses.weighted) == list(losses.unweighted) == FLOW_TERMS + CONTENT_TERMS
    torch.testing.assert_close(losses.total, sum(losses.weighted.values()))


def test_coefficients_multiply_terms_and_the_balance_multiplies_the_flow_terms_only():
    coefficients = {"reconstruction": 3.0, "regression": 0.5, "smoothness": 7.0, "cycle": 0.25}
    losses = small_model(**coefficients, flow_balance=0.1, vicreg_invariance=5.0)(pairs(), pairs(4))
    for name, coefficient in coefficients.items():
        torch.testing.assert_close(losses.weighted[name], 0.1 * coefficient * losses.unweighted[name])
    torch.testing.assert_close(losses.weighted["vicreg_invariance"], 5.0 * losses.unweighted["vicreg_invariance"])


def test_regularisation_multiplies_eq_6_alone():
    half, whole = (small_model()(pairs(), pairs(4), regularisation=share) for share in (0.5, 1.0))
    for name, value in whole.weighted.items():
        share = 0.5 if name == "variance_covariance" else 1.0
        torch.testing.assert_close(half.weighted[name], share * value)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("encoder", ["convnext_tiny", "resnet50"])
def test_the_large_encoders_take_a_step_of_both_tasks(encoder, bfloat16):
    torch.manual_seed(0)
    model = MCJEPA(ModelConfig(encoder=encoder, estimator_factor=0.25, expander=(32, 32, 32)))
    video, views = (tuple(x.float() for x in batch) for batch in (pairs(1, 64, 96), pairs(4)))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        losses = model(video=video, views=views)
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("absent", ["video", "views"])
def test_either_batch_may_be_absent(absent):
    batches = {"video": pairs(), "views": pairs(4)}
    del batches[absent]
    assert list(small_model()(**batches).unweighted) == (CONTENT_TERMS if absent == "video" else FLOW_TERMS)


def test_without_any_batch_there_is_one_clear_error():
    with pytest.raises(ValueError, match="nothing to learn from"):
        small_model()()


def test_coarse_levels_are_eqs_3_and_4_on_shrunk_images_the_finer_the_louder():
    model = small_model(smoothness=0.7, reconstruction=1.3)
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=generator)
    visible = (torch.rand(4, 1, 32, 32, dtype=torch.float64, generator=generator) > 0.4).double()
    flows = [torch.randn(4, 2, side, side, dtype=torch.float64, generator=generator) for side in (3, 4, 8)]
    expected = 0.0
    for weight, flow in ((0.5, flows[1]), (1.0, flows[2])):  # the map of 3 x 3 is left out
        side = flow.shape[3]
        cells = (4, -1, side, 32 // side, side, 32 // side)
        shrunk, seen = (x.reshape(cells).mean(dim=(3, 5)) for x in (images, visible))
        warped = warp(shrunk[[2, 3, 0, 1]], flow)
        reconstruction = 0.0
        for i in range(4):  # the mean over pairs of each pair's masked mean
            pair = shrunk[i : i + 1], warped[i : i + 1], seen[i : i + 1]
            reconstruction += reconstruction_loss(*pair).item() / 4
        expected += weight * (1.3 * reconstruction + 0.7 * smoothness_loss(flow / side, shrunk).item())
    assert model._coarse_levels(images, flows, visible).item() == pytest.approx(expected, rel=1e-12)


def test_coarse_levels_are_a_term_only_where_they_have_a_coefficient():
    losses = small_model(coarse_levels=2.0, flow_balance=0.25)(video=pairs())
    assert set(losses.unweighted) - set(FLOW_TERMS) == {"coarse_levels"}
    weighted, plain = (x["coarse_levels"] for x in (losses.weighted, losses.unweighted))
    torch.testing.assert_close(weighted, 0.5 * plain)


def test_at_zero_flow_every_flow_term_is_the_plain_difference_of_the_frames():
    model = small_model(variance=(0.0,) * 6, covariance=(0.0,) * 6)
    for level in model.estimator.levels:
        torch.nn.init.zeros_(level.last.weight)
    image_1, image_2 = pairs()
    terms = model(video=(image_1, image_2), masks=False).unweighted
    difference = image_1 - image_2
    expected = difference.abs().mean() + difference.square().mean() + ssim_distance(image_1, image_2).mean()
    torch.testing.assert_close(terms["reconstruction"], expected)
    pyramids = zip(model.encode(image_1), model.encode(image_2), strict=True)
    torch.testing.assert_close(terms["regression"], sum((x - y).square().mean() for x, y in pyramids))
    assert terms["cycle"] < 1e-24 and terms["smoothness"] == 0 and terms["variance_covariance"] == 0


@settings(max_examples=5, deadline=None)
@given(st.permutations(range(3)))
def test_the_order_of_the_pairs_and_of_the_two_frames_does_not_matter(order):
    model, (x, y) = small_model(), pairs(3)
    expected = model(video=(x, y))
    for shuffled in (model(video=(x[order], y[order])), model(video=(y, x))):
        for name in FLOW_TERMS:
            torch.testing.assert_close(shuffled.unweighted[name], expected.unweighted[name])


def test_the_flow_terms_of_a_batch_are_the_mean_of_its_pairs_however_much_of_each_is_visible():
    model, (x, y) = small_model(), pairs(3)
    visible = torch.ones(6, 1, 64, 64, dtype=torch.float64)
    for index in range(6):
        visible[index, :, : 8 * index] = 0  # another share in each frame: 1, 7/8 ... 3/8

    def terms(chosen):
        model._visible = lambda flow, masks: (visible[chosen + [i + 3 for i in chosen]], visible.mean())
        return model(video=(x[chosen], y[chosen])).unweighted

    together, apart = terms([0, 1, 2]), [terms([i]) for i in range(3)]
    for name in FLOW_TERMS[:4]:  # Eq. 6 is a statistic over the whole batch
        torch.testing.assert_close(together[name], sum(a[name] for a in apart) / 3)


def test_a_pair_of_which_little_is_visible_counts_unmasked():
    model = small_model()
    flow = torch.zeros(4, 2, 16, 16, dtype=torch.float64)
    flow[[0, 2]] = 5.0  # the first pair's two directions agree on the same large motion: nothing is consistent
    visible, share = model._visible(flow, masks=True)
    assert share < 0.9 and bool((visible == 1).all())
    lenient = small_model(least_visible=0.0)
    assert lenient._visible(flow, masks=True)[0][[0, 2]].mean() < 0.2


@pytest.mark.parametrize("occlusion", ["forward_backward", "range_map"])
def test_masks_leave_occluded_pixels_out_of_the_losses(occlusion):
    model = small_model(occlusion=occlusion)
    flow = torch.zeros(2, 2, 32, 32, dtype=torch.float64)
    flow[0, 0], flow[1, 0] = 8.0, -8.0  # a shift by 8: a quarter of each frame leaves the other
    visible, _ = model._visible(flow, masks=True)
    assert visible[0, 0, :, :24].all() and not visible[0, 0, :, 25:].any()
    assert visible[1, 0, :, 8:].all() and not visible[1, 0, :, :7].any()


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (31, 33), (5, 7)])
def test_estimate_flow_takes_any_size_and_gives_it_back(size):
    model = small_model().eval()
    x, y = torch.rand(2, 2, 3, *size, dtype=torch.float64)
    flow = model.estimate_flow(x, y)
    assert flow.shape == (2, 2, *size) and flow.isfinite().all() and not flow.requires_grad


def test_the_forward_direction_does_not_depend_on_the_backward_one():
    model = small_model().eval()
    x, y = pairs(2)
    alone = model.estimate_flow(x[:1], y[:1])
    torch.testing.assert_close(model.estimate_flow(x, y)[:1], alone)


def test_all_parameters_get_finite_gradients():
    model = small_model()
    model(video=pairs(), views=pairs(4)).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_identical_constant_frames_give_finite_losses_and_gradients():
    model = small_model()
    grey = torch.full((2, 3, 64, 64), 0.5, dtype=torch.float64)
    losses = model(video=(grey, grey), views=(grey, grey))
    losses.total.backward()
    assert losses.total.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_a_wrong_shape_is_told_by_the_name_of_the_argument():
    with pytest.raises(Exception, match="views"):
        small_model()(views=(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)))


def test_images_of_two_sizes_and_a_model_without_estimator_are_told_in_one_line():
    # With the checker on, the shapes' names tell; without it, as for users, the ValueError does.
    with pytest.raises(Exception, match="one size|image_2"):
        small_model().estimate_flow(torch.rand(1, 3, 8, 8).double(), torch.rand(1, 3, 8, 9).double())
    with pytest.raises(ValueError, match="no flow estimator"):
        small_model("vicreg").estimate_flow(*pairs())


def test_too_few_coefficients_for_the_levels_are_told():
    with pytest.raises(ValueError, match="loss.variance: 6 levels"):
        small_model(variance=(1.0, 1.0))


def test_a_missing_damaged_or_foreign_checkpoint_gives_one_line(tmp_path):
    with pytest.raises(IsADirectoryError, match="a folder; name the checkpoint in it, such as .*checkpoint.pt"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="text.pt: not a checkpoint"):
        load_checkpoint(tmp_path / "text.pt")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="foreign.pt: not a checkpoint of train.py"):
        load_checkpoint(tmp_path / "foreign.pt")
    torch.save(small_model().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.pt"):
        load_model(tmp_path / "cut.pt")


class _Evil:
    def __reduce__(self):
        return (open, ("/tmp/mcjepa_evil", "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": _Evil(), "config": {}, "step": 0}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: not a checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
