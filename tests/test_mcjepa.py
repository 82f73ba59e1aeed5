"""The model: Eq. 7 and its terms, masks, several processes, compilation, and loading of checkpoints."""

import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import close, normal, raises_one_line, torchrun, uniform
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import normalize

import encoder
import mcjepa
from engine import processes
from flow import resize_flow, warp
from losses import reconstruction_loss, smoothness_loss, variance_covariance_loss, vicreg_loss
from mcjepa import IMAGENET_MEAN, IMAGENET_STD, MCJEPA, LossConfig, ModelConfig, load_checkpoint

FLOW_TERMS = ["reconstruction", "regression", "smoothness", "cycle", "variance_covariance"]
CONTENT_TERMS = ["vicreg_invariance", "vicreg_variance", "vicreg_covariance"]


def small_model(task="mcjepa", encoder="pwc", **loss) -> MCJEPA:
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, estimator_factor=0.125, expander=(32, 32, 32))
    return MCJEPA(config, LossConfig(**loss), task).double()


def pairs(b=2, h=64, w=64, seed=1):
    return tuple(F.interpolate(x, (h, w), mode="bicubic").clamp(0, 1) for x in uniform(seed, 2, b, 3, h // 8, w // 8))


# ------------------------------------------------------------------------------------------------ Eq. 7 and its terms


def test_the_total_is_the_sum_of_all_terms_each_with_its_coefficient_and_the_balance_for_those_of_the_flow():
    coefficients = {"reconstruction": 3.0, "regression": 0.5, "smoothness": 7.0, "cycle": 0.25, "coarse_levels": 2.0}
    content = {"vicreg_invariance": 5.0, "vicreg_variance": 3.0, "vicreg_covariance": 2.0}
    model = small_model(**coefficients, **content, flow_balance=0.1)
    losses = model(video=pairs(), views=pairs(4, seed=2), regularisation=0.5)
    flow = {name: 0.1 * coefficient for name, coefficient in (coefficients | {"variance_covariance": 0.5}).items()}
    assert losses.unweighted.keys() == (flow | content).keys()
    for name, coefficient in (flow | content).items():
        torch.testing.assert_close(losses.weighted[name], coefficient * losses.unweighted[name])
    torch.testing.assert_close(losses.total, sum(losses.weighted.values()))
    assert losses.tasks.keys() == {"flow", "content"}
    for task, names in (("flow", flow), ("content", content)):
        torch.testing.assert_close(losses.tasks[task], sum(losses.weighted[name] for name in names))


def test_flow_is_estimated_from_each_frame_to_the_other_and_for_users_from_first_to_second(monkeypatch):
    seen, estimate = [], mcjepa.estimate_flow_pyramid
    monkeypatch.setattr(mcjepa, "estimate_flow_pyramid", lambda *x: seen.append(x[1:]) or estimate(*x))
    model, (one, two) = small_model(), pairs(1)
    model(video=(one, two))
    model.estimate_flow(one, two)
    (source, target), (first, second) = seen
    for level, (x, y) in enumerate(zip(model.encode(one), model.encode(two), strict=True)):
        close(source[level], torch.cat((x, y)))
        close(target[level], torch.cat((y, x)))
        close(first[level], x)
        close(second[level], y)


def test_the_options_inside_eqs_3_and_4_arrive():
    model = small_model(l1=0.3, l2=0.7, ssim=0.2, edge_weight=3.0, smoothness_order=2, charbonnier=0.01)
    images, flow = uniform(0, 2, 3, 32, 32), normal(1, 2, 2, 32, 32)
    terms = model._image_losses(images, flow, torch.ones(2, 1, 32, 32, dtype=torch.float64))
    close(terms[0], reconstruction_loss(images, warp(images.flip(0), flow), None, 0.3, 0.7, 0.2))
    close(terms[1], smoothness_loss(flow / 32, images, 3.0, 2, 0.01))


def test_the_options_of_the_model_arrive():
    options = {"estimator_factor": 0.125, "estimator_norm": "l2", "correlation_radius": 3, "estimator_unit": 8.0}
    model = MCJEPA(ModelConfig("pwc", **options, flow_clip=64.0, expander=(8, 4)))
    estimator, level = model.estimator, model.estimator.levels[0]
    assert (estimator.radius, estimator.unit, estimator.clip) == (3, 8.0, 64.0)
    assert level.unit_length and not any(isinstance(layer, nn.LayerNorm) for layer in level.modules())
    assert level.last.in_channels == 4


def test_the_content_terms_are_vicregs_on_the_embeddings_of_each_view():
    model, views = small_model(), pairs(4)
    unweighted = model(views=views).unweighted
    x, y = (model.expander(model.encode(view)[0].mean(dim=(2, 3))) for view in views)
    for name, value in zip(CONTENT_TERMS, vicreg_loss(x, y), strict=True):
        close(unweighted[name], value)


def test_either_batch_may_be_absent_but_not_both():
    assert list(small_model()(video=pairs()).unweighted) == FLOW_TERMS
    assert list(small_model()(views=pairs(4)).unweighted) == CONTENT_TERMS
    with pytest.raises(ValueError, match="nothing to learn from"):
        small_model()()


@pytest.mark.parametrize("level_flow, strides", [("entering", (2, 64)), ("leaving", (2, 64)), ("entering", (4, 16))])
def test_the_flow_terms_are_eqs_2_to_5_in_both_directions_eqs_2_and_5_over_the_levels(level_flow, strides, monkeypatch):
    model = small_model(level_flow=level_flow, feature_strides=strides, smoothness_order=1)
    images = pairs(1, 128, 128)  # the coarsest level has 2 x 2 cells
    flows = [2 * normal(side, 2, 2, side, side) for side in (2, 4, 8, 16, 32)]  # from 1 to 2, and from 2 to 1
    monkeypatch.setattr(mcjepa, "estimate_flow_pyramid", lambda *_: flows)
    terms = model(video=images, masks=False).unweighted
    full, finest = resize_flow(flows[-1], (128, 128)), resize_flow(flows[-1], (64, 64))
    # The flow that enters a level is that of the coarser one, and there is none before the coarsest.
    entering = [torch.zeros(2, 2, 2, 2), *(resize_flow(flow, (2 * flow.shape[2],) * 2) for flow in flows)]
    level_flows = entering if level_flow == "entering" else [*flows, finest]
    pyramids = [model.encode(image) for image in images]
    expected = dict.fromkeys(FLOW_TERMS[:4], 0.0)
    for one, other in ((0, 1), (1, 0)):
        warped = warp(images[other], full[[one]])
        expected["reconstruction"] += reconstruction_loss(images[one], warped) / 2
        expected["smoothness"] += smoothness_loss(full[[one]] / 128, images[one]) / 2
        for x, y, flow in zip(pyramids[one], pyramids[other], level_flows, strict=True):
            if strides[0] <= 128 // x.shape[3] <= strides[1]:
                there, back = flow[[one]].double(), flow[[other]].double()
                expected["regression"] += F.mse_loss(x, warp(y, there)) / 2
                expected["cycle"] += F.mse_loss(x, warp(warp(x, back), there)) / 2
    for name, value in expected.items():
        close(terms[name], value)


def test_coarse_levels_are_eqs_3_and_4_on_shrunk_images_each_with_half_the_weight_of_the_finer_one():
    model = small_model(smoothness=0.7, reconstruction=1.3, smoothness_order=1)
    images, visible = uniform(3, 4, 3, 32, 32), (uniform(4, 4, 1, 32, 32) > 0.4).double()
    flows = [normal(side, 4, 2, side, side) for side in (3, 4, 8)]
    expected = 0.0
    for weight, flow in ((0.5, flows[1]), (1.0, flows[2])):  # the map of 3 x 3 is left out
        side = flow.shape[3]
        cells = (4, -1, side, 32 // side, side, 32 // side)
        shrunk, mask = (x.reshape(cells).mean(dim=(3, 5)) for x in (images, visible))
        warped = warp(shrunk[[2, 3, 0, 1]], flow)
        # The mean over the pairs of the masked mean of each.
        each = [reconstruction_loss(shrunk[i : i + 1], warped[i : i + 1], mask[i : i + 1]) for i in range(4)]
        expected += weight * (1.3 * sum(each) / 4 + 0.7 * smoothness_loss(flow / side, shrunk))
    close(model._coarse_image_losses(images, flows, visible), expected)


def test_the_flow_terms_of_a_batch_are_the_mean_over_its_pairs_however_much_of_each_is_visible():
    model, (x, y) = small_model(masked=("regression", "cycle", "reconstruction")), pairs(3)
    visible = torch.ones(6, 1, 64, 64, dtype=torch.float64)
    for index in range(6):
        visible[index, :, : 8 * index] = 0  # the visible share of each frame differs: 1, 7/8 ... 3/8

    def terms(chosen):
        model._visible = lambda flow, masks: (visible[chosen + [i + 3 for i in chosen]], visible.mean())
        return model(video=(x[chosen], y[chosen])).unweighted

    together, apart = terms([0, 1, 2]), [terms([i]) for i in range(3)]
    for name in FLOW_TERMS[:4]:  # Eq. 6 is a statistic of the whole batch
        torch.testing.assert_close(together[name], sum(a[name] for a in apart) / 3)


@pytest.mark.parametrize("masked", [(), ("regression",), ("cycle",), ("reconstruction",)])
def test_occluded_pixels_are_left_out_of_the_losses_that_are_named(masked):
    visible = torch.ones(2, 1, 64, 64, dtype=torch.float64)
    visible[..., :32] = 0
    results = []
    for mask in (torch.ones_like(visible), visible):
        model = small_model(masked=masked)
        model._visible = lambda flow, masks, mask=mask: (mask, mask.mean())
        results.append(model(video=pairs(1)).unweighted)
    assert {name for name in FLOW_TERMS if results[0][name] != results[1][name]} == set(masked)


def test_a_pair_of_which_little_is_visible_counts_unmasked():
    flow = torch.zeros(4, 2, 16, 16, dtype=torch.float64)
    flow[[0, 2]] = 5.0  # both directions of the first pair have the same large motion: nothing is consistent
    assert (small_model()._visible(flow, masks=True)[0] == 1).all()
    assert small_model(least_visible=0.0)._visible(flow, masks=True)[0][[0, 2]].mean() < 0.2


@pytest.mark.parametrize("occlusion", ["forward_backward", "range_map"])
def test_masks_leave_out_occluded_pixels_except_in_the_warm_up(occlusion):
    model, flow = small_model(occlusion=occlusion), torch.zeros(2, 2, 32, 32, dtype=torch.float64)
    flow[0, 0], flow[1, 0] = 8.0, -8.0  # a quarter of each frame leaves the other
    visible, share = model._visible(flow, masks=True)
    assert visible[0, 0, :, :24].all() and not visible[0, 0, :, 25:].any()
    assert visible[1, 0, :, 8:].all() and not visible[1, 0, :, :7].any()
    unmasked, same_share = model._visible(flow, masks=False)
    assert (unmasked == 1).all() and share == same_share == visible.mean()


def test_eq_6_takes_each_frame_alone_and_the_pooled_features_of_images_where_it_is_asked_to():
    together, apart = (small_model(each_frame=each)(video=pairs()).unweighted for each in (False, True))
    expected, config = 0.0, LossConfig()
    pyramid = small_model().encode(torch.cat(pairs()))
    for features, *weights in zip(pyramid, config.variance, config.covariance, strict=True):
        expected += sum(variance_covariance_loss(frames, *weights) / 2 for frames in features.chunk(2))
    close(apart["variance_covariance"], expected)
    assert {name for name in FLOW_TERMS if together[name] != apart[name]} == {"variance_covariance"}
    views, model = pairs(4), small_model(pooled=(0.5, 0.25))
    pooled = model.encode(torch.cat(views))[0].mean(dim=(2, 3))
    losses = model(views=views)
    close(losses.weighted["pooled"], variance_covariance_loss(pooled[..., None, None], 0.5, 0.25))
    assert list(losses.unweighted) == [*CONTENT_TERMS, "pooled"]


def test_deviations_are_over_the_positions_and_averaged_over_the_channels():
    model, video, views = small_model(), pairs(2), pairs(4)
    monitor = model(video=video, views=views).monitor
    for stride, level in zip(model.encoder.strides, model.encode(torch.cat(video)), strict=True):
        close(monitor[f"deviation/stride_{stride}"], level.std(dim=(0, 2, 3), correction=0).mean())
    pooled = model.encode(torch.cat(views))[0].mean(dim=(2, 3))
    close(monitor["deviation/pooled"], pooled.std(dim=0).mean())
    close(monitor["deviation/embedding"], model.expander(pooled, views=2)[:4].std(dim=0).mean())


# -------------------------------------------------------------------------------------------- numbers and gradients


@pytest.mark.parametrize("encoder", ["pwc", "convnext_tiny", "resnet10_half"])
def test_every_parameter_gets_a_finite_gradient_from_a_step_of_both_tasks_as_a_gpu_takes_it(encoder):
    model = small_model(encoder=encoder).float().to(memory_format=torch.channels_last)
    video, views = (tuple(x.float() for x in batch) for batch in (pairs(1, 32, 64), pairs(2, 32, 32)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(video=video, views=views)
    losses.total.backward()
    assert losses.total.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())


def model_and_batches(encoder):
    """Flows so short that masks leave out a part; every sample has its own contrast, so that the processes differ."""
    loss = {"variance": (1.0,) * 6, "covariance": (0.5,) * 6, "smoothness": 5.0, "coarse_levels": 0.5}
    model = small_model(encoder=encoder, **loss, masked=("regression", "cycle", "reconstruction"))
    for level in model.estimator.levels:
        torch.nn.init.normal_(level.last.weight, std=0.005 if encoder == "pwc" else 0.0025)
    batches = {}
    for name, n, side in (("views", 8, 32), ("video", 4, 64)):
        contrast = torch.linspace(0.1, 1.0, n, dtype=torch.float64).view(n, 1, 1, 1)
        batches[name] = tuple(contrast * uniform(seed, n, 3, side, side) for seed in (0, 1))
    return model, batches


def save_gradients_of_this_process(path, encoder):
    processes.connect(torch.device("cpu"))
    rank, (model, batches) = processes.rank(), model_and_batches(encoder)
    parallel = DistributedDataParallel(model)  # must outlive the backward pass, whose gradients it averages
    losses = parallel(**{name: tuple(x.chunk(2)[rank] for x in batch) for name, batch in batches.items()})
    order, all_reduce, channels = [], dist.all_reduce, model.encoder.channels
    dist.all_reduce = lambda x: (order.append(x.shape), all_reduce(x))
    model.expander[-1].weight.register_post_accumulate_grad_hook(lambda _: order.append("expander"))
    losses.total.backward()
    sums_of_eq_6 = [place for place, size in enumerate(order) if size in [(c, c) for c in channels]]
    assert sums_of_eq_6[len(channels) - 1] < order.index("expander")  # they do not wait for its gradients
    if rank == 0:
        gradients, buffers = {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())
        torch.save((gradients, losses.monitor, buffers), path)
    dist.destroy_process_group()


@pytest.mark.parametrize("encoder", ["pwc", "resnet10_half"])
def test_gradients_of_two_processes_equal_those_of_one_on_the_joined_batch(encoder, tmp_path):
    torchrun(2, save_gradients_of_this_process, tmp_path / "gradients.pt", encoder)
    gradients, monitor, buffers = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model, batches = model_and_batches(encoder)
    losses = model(**batches)
    losses.total.backward()
    assert 0.25 < losses.monitor["visible"] < 0.95
    for name, parameter in model.named_parameters():
        tolerance = 1e-9 + 1e-5 * float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=tolerance)
    name = "deviation/embedding"  # the others are of each process alone
    torch.testing.assert_close(monitor[name], losses.monitor[name], rtol=1e-9, atol=0)
    for name, value in model.named_buffers():  # batch norm's averages
        torch.testing.assert_close(buffers[name], value, rtol=1e-9, atol=1e-9, msg=name)


def compare_compiled_gradients():
    """While the weight of Eq. 6 grows, and where the masks come in, nothing is compiled again."""
    encoder.PWCPyramid.channels, encoder.PWCPyramid.strides = (32, 24, 16), (8, 4, 2)  # half of the levels, to trace
    model, video, views = small_model(), pairs(1, 32, 32), pairs(4, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for weight in (0.5, 1.0):
        gradients, warmups = [], {"masks": torch.full((), weight == 1), "regularisation": torch.full((), weight)}
        for run in (model, compiled):
            model.zero_grad()
            run(video, views, **warmups).total.backward()
            gradients.append([p.grad for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(a.abs().max()) + 1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name in ("convnext_tiny", "resnet50"):
        network = encoder.build_encoder(name)
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(views[0].float()), network(views[0].float()))


def test_the_forward_compiles_into_one_graph_with_the_same_gradients_and_so_does_each_encoder():
    # In a process of its own, without the checks of the annotations, which no compiler can follow.
    program = "import sys; sys.path.append('tests'); from test_mcjepa import *; compare_compiled_gradients()"
    command, root = [sys.executable, "-c", program], Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


# ------------------------------------------------------------------------------------- calls for users, checkpoints


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (31, 33), (5, 7)])
def test_estimate_flow_takes_images_of_any_size_and_each_pair_by_itself(size):
    model, (x, y) = small_model().eval(), (uniform(seed, 2, 3, *size) for seed in (0, 1))
    flow = model.estimate_flow(x, y)
    assert flow.shape == (2, 2, *size) and flow.isfinite().all() and not flow.requires_grad
    torch.testing.assert_close(model.estimate_flow(x[1:], y[1:]), flow[1:])


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_the_calls_for_users_take_paths_pictures_arrays_and_tensors(tmp_path):
    model, (bytes_1, bytes_2) = small_model().float().eval(), (uniform(2, 2, 3, 33, 40) * 255).byte()
    floats = [image[None].float() / 255 for image in (bytes_1, bytes_2)]
    expected, pyramid = model.estimate_flow(*floats), model.encode(floats[0])
    torch.testing.assert_close(pyramid, model.encoder(normalize(floats[0], IMAGENET_MEAN, IMAGENET_STD)))
    arrays = [image.permute(1, 2, 0).numpy() for image in (bytes_1, bytes_2)]
    from_opencv = [np.ascontiguousarray(array[..., ::-1])[..., ::-1] for array in arrays]  # its strides are negative
    pictures = [PIL.Image.fromarray(array) for array in arrays]
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    same = [[bytes_1, bytes_2], [bytes_1[None], bytes_2[None]], [bytes_1.double() / 255, bytes_2.double() / 255]]
    same += [[array / 255 for array in arrays], from_opencv, pictures, paths, [*map(str, paths)]]
    same += [arrays, [*map(np.asarray, pictures)]]
    for images in same:
        torch.testing.assert_close(model.estimate_flow(*images), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.encode(images[0]), pyramid, rtol=0, atol=1e-4)


def test_what_is_no_image_in_0_to_1_is_refused(tmp_path):
    x, grey_16 = uniform(0, 3, 8, 8), PIL.Image.fromarray(np.full((8, 8), 3000, np.uint16))
    grey_16.save(tmp_path / "16.png")
    as_batch = getattr(encoder.as_batch, "__wrapped__", encoder.as_batch)  # as for users, who run without checks
    cv2.imwrite(str(tmp_path / "rgb.png"), np.full((8, 8, 3), 3000, np.uint16))  # whose lower bits Pillow drops
    wrong = [255 * x, x.permute(1, 2, 0), x * math.nan, x.int(), x.to(torch.uint16), x[0], None, [x], grey_16]
    wrong += [tmp_path / "16.png", tmp_path / "rgb.png"]
    for images in (*wrong, np.ones((2, 8, 8, 3)), np.ones((8, 8))):
        with pytest.raises(ValueError, match=r"images are|16 or 32 bits"):
            as_batch(images, torch.ones(1))
    with pytest.raises(FileNotFoundError, match="none.png"):
        small_model().encode(tmp_path / "none.png")


def test_wrong_calls_are_reported_in_one_line():
    # With the checks of the annotations the error names the argument; without them, as for users, it is a ValueError.
    with pytest.raises(Exception, match="one size|image_2"):
        small_model().estimate_flow(uniform(0, 1, 3, 8, 8), uniform(0, 1, 3, 8, 9))
    with pytest.raises(ValueError, match="no flow estimator"):
        small_model("vicreg").estimate_flow(*pairs())
    with pytest.raises(ValueError, match="loss.variance: 6 levels"):
        small_model(variance=(1.0, 1.0))
    with pytest.raises(ValueError, match="feature_strides: no level from stride 64 to 2"):
        small_model(feature_strides=(64, 2))


def test_a_missing_damaged_or_foreign_checkpoint_gives_one_line(tmp_path):
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    torch.save({"model": small_model().state_dict(), "config": {}, "step": 0}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    middle = len(whole) // 2
    one_bit = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]  # only the checksums show it
    (tmp_path / "cut.pt").write_bytes(whole[:1000]), (tmp_path / "bit.pt").write_bytes(one_bit)
    mcjepa.save_weights(small_model(), tmp_path / "cut.safetensors", {}, 0)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-8])
    torch.save(torch.nn.ReLU(), tmp_path / "network.pt")  # torch advises to run its code
    for name in ("foreign.pt", "cut.pt", "bit.pt", "cut.safetensors", "network.pt"):
        reason = "no file of tensors" if name == "network.pt" else ""
        with raises_one_line(ValueError, f"{tmp_path / name}: not a checkpoint", reason):
            load_checkpoint(tmp_path / name)
    with raises_one_line(FileNotFoundError, "a folder; name the file in it, such as ", "checkpoint.pt"):
        load_checkpoint(tmp_path)
