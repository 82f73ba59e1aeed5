"""Encoders tell the truth about their pyramids at any size and take torchvision's weights; the expander is VICReg's.

How to run: `pytest tests/test_encoder.py`.
"""

import functools
import math

import jaxtyping
import pytest
import torch
import torchvision
from torch import nn

from encoder import Expander, build_encoder

EXPECTED = {  # channels and strides, coarsest first (DESIGN.md)
    "convnext_tiny": ((768, 384, 192, 96, 48, 48), (64, 32, 16, 8, 4, 2)),
    "resnet50": ((2048, 1024, 512, 256, 64), (32, 16, 8, 4, 2)),
    "pwc": ((196, 128, 96, 64, 32, 16), (64, 32, 16, 8, 4, 2)),
}
names = pytest.mark.parametrize("name", EXPECTED)
backbones = pytest.mark.parametrize("name", ["convnext_tiny", "resnet50"])


def fresh_encoder(name):
    """ConvNeXt starts with residual branches scaled by 1e-6: here they count, so that a fault in them is seen."""
    torch.manual_seed(0)
    encoder = build_encoder(name)
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            if key.endswith("layer_scale"):
                parameter.fill_(0.5)
    return encoder


@functools.cache
def encoder_of(name):
    return fresh_encoder(name).eval()


def images(b, h, w, seed=0):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


# --- pyramids --------------------------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 31), (128, 96), (63, 129), (7, 5), (2, 3), (1, 1)])
def test_a_pyramid_is_coarsest_first_with_the_channels_and_strides_that_the_encoder_tells(name, size):
    encoder = encoder_of(name)
    with torch.no_grad():
        levels = encoder(images(2, *size))
    assert (tuple(encoder.channels), tuple(encoder.strides)) == EXPECTED[name]
    shapes = [(2, c, math.ceil(size[0] / s), math.ceil(size[1] / s)) for c, s in zip(*EXPECTED[name], strict=True)]
    assert [tuple(level.shape) for level in levels] == shapes
    assert all(torch.isfinite(level).all() for level in levels)


@names
def test_features_of_an_image_depend_on_nothing_else_in_the_batch(name):
    encoder, batch = encoder_of(name), images(3, 64, 70)
    with torch.no_grad():
        levels, alone = encoder(batch), encoder(batch[1:2])
        mixed = encoder(batch[torch.tensor([2, 0, 1])])
    for level, single, other in zip(levels, alone, mixed, strict=True):
        torch.testing.assert_close(single, level[1:2], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other, level[torch.tensor([2, 0, 1])], rtol=1e-3, atol=1e-3)
        assert (level[0] - level[1]).abs().max() > 1e-4


@names
def test_gradients_reach_every_parameter_and_the_image(name):
    encoder, x = fresh_encoder(name), images(2, 65, 70).requires_grad_()
    levels = encoder(x)
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key
    assert torch.isfinite(x.grad).all() and (x.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("name", ["convnext_tiny", "pwc"])
def test_both_frames_of_a_pair_pass_the_same_network_while_it_trains(name):
    """Stochastic depth or dropout would give two equal frames unequal features."""
    encoder, frame = fresh_encoder(name).train(), images(1, 64, 64)
    with torch.no_grad():
        for level in encoder(torch.cat([frame, frame])):
            torch.testing.assert_close(level[0], level[1], rtol=1e-4, atol=1e-4)


@names
def test_every_level_sees_the_place_that_it_stands_for(name):
    """A change in the lower right corner of the image is strongest, at the finer levels, in the lower right corner."""
    encoder, x = encoder_of(name), images(1, 128, 192)
    changed = x.clone()
    changed[..., -16:, -16:] += 1
    with torch.no_grad():
        pairs = list(zip(encoder(x), encoder(changed), strict=True))
    for (level, other), stride in zip(pairs, encoder.strides, strict=True):
        if stride <= 16:
            difference = (level - other).abs().sum(dim=1)[0]
            row, column = divmod(int(difference.argmax()), difference.shape[1])
            assert row * stride >= 96 and column * stride >= 160


def test_an_unknown_encoder_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="vgg.*convnext_tiny") as error:
        build_encoder("vgg")
    assert "\n" not in str(error.value)


@names
def test_a_wrong_shape_is_told_by_the_arguments_name(name):
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'images'"):
        encoder_of(name)(torch.zeros(1, 1, 64, 64))


# --- torchvision's weights -------------------------------------------------------------------------------------------


@functools.cache
def torchvision_state(name):
    """As torchvision would hand it out, with every entry (batch norm's too) unlike what a fresh network holds."""
    torch.manual_seed(1)
    state = getattr(torchvision.models, name)(weights=None).state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.add_(0.01 * torch.randn_like(value).abs())
        else:
            value.fill_(7)
    return state


def is_replaced(name, key):
    """The parts that the pyramid has no place for: the head, and ConvNeXt's 4x4 stem."""
    return key.startswith(("classifier.", "features.0.") if name == "convnext_tiny" else "fc.")


@backbones
def test_a_torchvision_state_dict_loads_and_is_what_the_body_then_holds(name, tmp_path):
    file = tmp_path / f"{name}.pth"
    torch.save(torchvision_state(name), file)
    loaded = build_encoder(name, weights=file).state_dict()
    body = {key: value for key, value in torchvision_state(name).items() if not is_replaced(name, key)}
    assert len(body) > 150
    prefixes = [{k.removesuffix(key) for k in loaded if k == key or k.endswith(f".{key}")} for key in body]
    (prefix,) = set.intersection(*prefixes)
    for key, value in body.items():
        assert torch.equal(loaded[prefix + key], value), key
    assert sum(v.numel() for v in body.values()) > 0.9 * sum(v.numel() for v in loaded.values())


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
    """What torchvision's stages make of our finest stage's input is what ours make of it: levels 0 to 3."""
    torch.save(torchvision_state("convnext_tiny"), tmp_path / "convnext.pth")
    encoder = build_encoder("convnext_tiny", weights=tmp_path / "convnext.pth").eval()
    network = torchvision.models.convnext_tiny(weights=None).eval()
    network.load_state_dict(torchvision_state("convnext_tiny"))
    with torch.no_grad():
        levels = encoder(images(1, 128, 192))
        x = levels[3]
        for index, (downsample, stage) in zip((2, 1, 0), ((2, 3), (4, 5), (6, 7)), strict=True):
            x = network.features[stage](network.features[downsample](x))
            torch.testing.assert_close(levels[index], x, rtol=1e-4, atol=1e-4)


@backbones
@pytest.mark.parametrize(
    "content", ["text", "empty", "truncated", "other network", "list", "missing entry", "wrong shape"]
)
def test_a_file_that_does_not_hold_the_network_is_one_clear_line(name, content, tmp_path):
    file = tmp_path / "weights.pth"
    state = torchvision_state(name)
    last = [key for key in state if not is_replaced(name, key) and key.endswith("weight")][-1]
    if content in ("text", "empty"):
        file.write_text("not weights\n" if content == "text" else "")
    elif content == "truncated":
        torch.save(state, file)
        file.write_bytes(file.read_bytes()[:10_000])
    elif content == "other network":
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), file)
    elif content == "list":
        torch.save([1, 2, 3], file)
    elif content == "missing entry":
        torch.save({key: value for key, value in state.items() if key != last}, file)
    elif content == "wrong shape":
        torch.save(state | {last: torch.zeros(3, 5)}, file)
    with pytest.raises(ValueError, match="weights.pth") as error:
        build_encoder(name, weights=file)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_missing_file_of_weights_is_told_by_its_path(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere.pth") as error:
        build_encoder("convnext_tiny", weights=tmp_path / "nowhere.pth")
    assert "\n" not in str(error.value)


# --- the expander ----------------------------------------------------------------------------------------------------


def test_the_default_expander_has_the_papers_size_and_no_bias_in_its_last_layer():
    with torch.device("meta"):
        expander = Expander(768)
    linear = [module for module in expander.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(768, 8192), (8192, 8192), (8192, 8192)]
    assert linear[-1].bias is None and linear[-1] is list(expander.modules())[-1]
    norms = [module for module in expander.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert [norm.num_features for norm in norms] == [8192, 8192]
    weights = 768 * 8192 + 2 * 8192 * 8192
    # Batch norm takes off the bias before it: with or without it, the network is the same.
    biases = sum(layer.bias.numel() for layer in linear if layer.bias is not None)
    assert sum(p.numel() for p in expander.parameters()) == weights + biases + 2 * 2 * 8192


def test_the_expander_is_linear_batch_norm_and_relu_twice_and_then_linear():
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
    embeddings = expander(x)
    assert embeddings.shape == (5, 7)
    torch.testing.assert_close(embeddings, expected)


def test_the_expander_in_evaluation_takes_its_running_statistics():
    torch.manual_seed(0)
    expander = Expander(6, (10, 9, 7))
    x = 3 + 2 * torch.randn(64, 6)
    with torch.no_grad():
        for _ in range(100):
            trained = expander(x)
        torch.testing.assert_close(expander.eval()(x), trained, rtol=0.05, atol=0.05)
        torch.testing.assert_close(expander(x)[:1], expander(x[:1]), rtol=1e-4, atol=1e-4)


def test_every_parameter_of_the_expander_gets_a_gradient():
    torch.manual_seed(0)
    expander = Expander(6, (10, 9, 7))
    expander(torch.randn(8, 6)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in expander.parameters())


def test_a_wrong_shape_for_the_expander_is_told_by_the_arguments_name():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'x'"):
        Expander(6, (4, 4, 4))(torch.randn(8, 6, 1))
