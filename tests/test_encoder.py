"""Encoders: pyramids of images of any size, and torchvision's weights. The expander is that of VICReg."""

import functools
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import assert_same_gradients, cut_short, normal, raises_one_line
from torch import nn

from encoder import Expander, PointwiseLinear, build_encoder
from mcjepa import load_model

EXPECTED = {  # channels and strides, coarsest first (DESIGN.md)
    "convnext_tiny": ((768, 384, 192, 96, 48, 48), (64, 32, 16, 8, 4, 2)),
    "resnet50": ((2048, 1024, 512, 256, 64), (32, 16, 8, 4, 2)),
    "pwc": ((196, 128, 96, 64, 32, 16), (64, 32, 16, 8, 4, 2)),
    "resnet10": ((512, 256, 128, 64, 32), (32, 16, 8, 4, 2)),
    "resnet18": ((512, 256, 128, 64, 32), (32, 16, 8, 4, 2)),
    "resnet10_half": ((256, 128, 64, 32, 16), (32, 16, 8, 4, 2)),
}
names = pytest.mark.parametrize("name", EXPECTED)


def new_encoder(name):
    """ConvNeXt starts with residual branches scaled by 1e-6; here their scale is 0.5, so that a fault in them shows."""
    torch.manual_seed(0)
    encoder = build_encoder(name)
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            if key.endswith("layer_scale"):
                parameter.fill_(0.5)
    return encoder


@functools.cache
def encoder_of(name):
    return new_encoder(name).eval()


def images(b, h, w, seed=0):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- pyramids


@names
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 31), (7, 5), (1, 1)])
def test_a_pyramid_is_coarsest_first_with_the_channels_and_strides_of_the_encoder_for_images_of_any_size(name, size):
    encoder = encoder_of(name)
    with torch.no_grad():
        levels = encoder(images(2, *size))
    assert (tuple(encoder.channels), tuple(encoder.strides)) == EXPECTED[name]
    shapes = [(2, c, math.ceil(size[0] / s), math.ceil(size[1] / s)) for c, s in zip(*EXPECTED[name], strict=True)]
    assert [tuple(level.shape) for level in levels] == shapes
    assert all(torch.isfinite(level).all() for level in levels)


@names
def test_the_features_of_an_image_do_not_depend_on_the_rest_of_the_batch_nor_on_its_order(name):
    encoder, batch = encoder_of(name), images(3, 64, 70)
    with torch.no_grad():
        levels = encoder(batch)
        for order in ([2, 0, 1], [1]):
            for level, other in zip(levels, encoder(batch[order]), strict=True):
                torch.testing.assert_close(other, level[order], rtol=1e-3, atol=1e-3)
                assert (level[0] - level[1]).abs().max() > 1e-4


def test_convnext_repeats_the_last_row_and_column_of_an_odd_size():
    encoder, x = encoder_of("convnext_tiny"), images(1, 65, 97)
    with torch.no_grad():
        for level, padded in zip(encoder(x), encoder(F.pad(x, (0, 1, 0, 1), mode="replicate")), strict=True):
            torch.testing.assert_close(level, padded)


@names
def test_gradients_reach_every_parameter_and_the_image(name):
    encoder, x = new_encoder(name), images(2, 65, 70).requires_grad_()
    levels = encoder(x)
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key
    assert torch.isfinite(x.grad).all() and (x.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("name", ["convnext_tiny", "pwc"])
def test_equal_frames_have_equal_features_in_training(name):
    """Stochastic depth or dropout would give two equal frames unequal features."""
    encoder, frame = new_encoder(name).train(), images(1, 64, 64)
    with torch.no_grad():
        for level in encoder(torch.cat([frame, frame])):
            torch.testing.assert_close(level[0], level[1], rtol=1e-4, atol=1e-4)


def test_a_small_resnet_is_a_stem_and_torchvisions_basic_blocks_in_stages_of_stride_2():
    """The oracle is torchvision's ResNet with one block a stage, whose parts are taken one by one."""
    for name, count in (("resnet10", 4_880_928), ("resnet18", 11_151_648)):
        assert sum(p.numel() for p in encoder_of(name).parameters()) == count
    encoder, x = new_encoder("resnet18").train(), images(4, 32, 32)
    levels = encoder(x)
    expected = F.relu(F.batch_norm(F.conv2d(x, encoder.stem[0].weight, stride=2, padding=1), None, None, training=True))
    torch.testing.assert_close(levels[-1], expected)
    for stage, level in zip(encoder.stages, levels[-2::-1], strict=True):
        for block in stage:
            inner = F.conv2d(expected, block.conv1.weight, stride=block.stride, padding=1)
            inner = F.conv2d(F.relu(F.batch_norm(inner, None, None, training=True)), block.conv2.weight, padding=1)
            if block.stride == 2:
                shortcut = F.conv2d(expected, block.downsample[0].weight, stride=2)
                expected = F.batch_norm(shortcut, None, None, training=True)
            expected = F.relu(F.batch_norm(inner, None, None, training=True) + expected)
        torch.testing.assert_close(level, expected)


def test_a_linear_layer_as_a_convolution_equals_the_linear_layer_with_its_gradients():
    def apply(kind):
        module = kind(5, 7).double()
        return lambda x, w, b: torch.func.functional_call(module, {"weight": w, "bias": b}, x)

    inputs = normal(0, 2, 3, 4, 5), normal(1, 7, 5), normal(2, 7)
    assert_same_gradients(apply(PointwiseLinear), apply(nn.Linear), *inputs)
    layers = [module for module in build_encoder("convnext_tiny").modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 2 * (3 + 3 + 9 + 3) and all(isinstance(module, PointwiseLinear) for module in layers)


# ------------------------------------------------------------------------------------------------ torchvision's weights


@functools.cache
def torchvision_state(name):
    """In torchvision's format; every entry, also those of batch norms, differs from that of a new network."""
    torch.manual_seed(1)
    state = getattr(torchvision.models, name)(weights=None).state_dict()
    for value in state.values():
        value += 0.01 * torch.randn_like(value).abs() if value.is_floating_point() else 7
    return state


def test_torchvisions_weights_are_recognised_and_those_of_another_depth_are_not(tmp_path):
    for name in ("resnet50", "convnext_tiny", "resnet18", "convnext_small"):
        torch.save(torchvision_state(name), tmp_path / name)
        other = raises_one_line(ValueError, f"{name}: neither a checkpoint of train.py nor torchvision's weights")
        with other if name in ("resnet18", "convnext_small") else nullcontext():
            assert load_model(tmp_path / name).config.encoder == name


def test_resnet50_with_torchvisions_weights_computes_torchvisions_features(tmp_path):
    torch.save(torchvision_state("resnet50"), tmp_path / "resnet50.pth")
    encoder = build_encoder("resnet50", weights=str(tmp_path / "resnet50.pth")).eval()
    network = torchvision.models.resnet50(weights=None).eval()
    network.load_state_dict(torchvision_state("resnet50"))
    names = {"relu": 4, "layer1": 3, "layer2": 2, "layer3": 1, "layer4": 0}
    theirs = torchvision.models._utils.IntermediateLayerGetter(network, {key: key for key in names})
    x = images(1, 64, 96)
    with torch.no_grad():
        levels, expected = encoder(x), theirs(x)
    for key, index in names.items():
        torch.testing.assert_close(levels[index], expected[key])


def test_convnexts_stages_with_torchvisions_weights_compute_torchvisions_features(tmp_path):
    """torchvision's stages, applied to the output of our stem, give our levels 3 to 0."""
    torch.save(torchvision_state("convnext_tiny"), tmp_path / "convnext.pth")
    encoder = build_encoder("convnext_tiny", weights=tmp_path / "convnext.pth").eval()
    network = torchvision.models.convnext_tiny(weights=None).eval()
    network.load_state_dict(torchvision_state("convnext_tiny"))
    with torch.no_grad():
        x = images(1, 128, 192)
        levels = encoder(x)
        for stem in encoder.features[0]:
            x = stem(x)
        for number, layer in enumerate(network.features[1:]):
            x = layer(x)
            if number % 2 == 0:  # a stage; between two of them lies a convolution of stride 2
                torch.testing.assert_close(levels[3 - number // 2], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "content", ["text", "empty", "truncated", "list", "other network", "missing entry", "wrong shape"]
)
def test_a_file_that_does_not_hold_the_network_gives_one_clear_line(content, tmp_path):
    file, state = tmp_path / "weights.pth", torchvision_state("resnet50")
    last = [key for key in state if key.endswith("weight") and not key.startswith("fc.")][-1]
    objects = {
        "truncated": state,
        "other network": torchvision.models.resnet18(weights=None).state_dict(),
        "list": [1, 2, 3],
        "missing entry": {key: value for key, value in state.items() if key != last},
        "wrong shape": state | {last: torch.zeros(3, 5)},
    }
    file.write_text("not weights\n" if content == "text" else "")
    if content in objects:
        torch.save(objects[content], file)
    if content == "truncated":
        cut_short(file)
    with raises_one_line(ValueError, f"{file}: not a torchvision state dict of resnet50"):
        build_encoder("resnet50", weights=file)


def test_a_missing_file_of_weights_an_encoder_without_weights_and_an_unknown_encoder_are_reported(tmp_path):
    with pytest.raises(ValueError, match="vgg.*convnext_tiny, resnet50, pwc, resnet10, resnet18, resnet10_half$"):
        build_encoder("vgg")
    with pytest.raises(ValueError, match="nowhere.pth: not a torchvision state dict of convnext_tiny .*No such file"):
        build_encoder("convnext_tiny", weights=tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="torchvision has no backbone for the encoder 'pwc'"):
        build_encoder("pwc", weights=tmp_path / "nowhere.pth")


# --------------------------------------------------------------------------------------------------------- the expander


def test_the_default_expander_has_the_papers_size_and_no_bias_in_its_last_layer():
    with torch.device("meta"):
        expander = Expander(768)
    linear = [module for module in expander.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(768, 8192), (8192, 8192), (8192, 8192)]
    assert linear[-1].bias is None and linear[-1] is list(expander.modules())[-1]
    weights, biases, batch_norms = 768 * 8192 + 2 * 8192 * 8192, 2 * 8192, 2 * 2 * 8192
    assert sum(p.numel() for p in expander.parameters()) == weights + biases + batch_norms


def test_the_expander_is_linear_batch_norm_and_relu_twice_and_then_linear_with_statistics_per_view():
    torch.manual_seed(0)
    expander = Expander(6, (10, 9, 7)).double().train()
    layers = [module for module in expander.modules() if isinstance(module, nn.Linear)]
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = x
    for layer in layers[:-1]:
        expected = expected @ layer.weight.T
        expected = expected - expected.mean(dim=0)
        expected = (expected / (expected.square().mean(dim=0) + 1e-5).sqrt()).clamp(min=0)
    expected = expected @ layers[-1].weight.T
    torch.testing.assert_close(expander(x), expected)
    other = 3 + torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(expander(torch.cat((x, other)), views=2), torch.cat((expected, expander(other))))
