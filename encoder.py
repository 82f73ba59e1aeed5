"""Encoders that turn images into feature pyramids, and the expander of VICReg.

A pyramid is a list of feature maps, coarsest first: index 0 is the paper's level l = 1. An encoder tells the
`channels` and `strides` of its levels in the same order. The level of stride s of an h x w image measures
ceil(h / s) x ceil(w / s), whatever the size.

    encoder = build_encoder("convnext_tiny")
    pyramid = encoder(torch.rand(1, 3, 224, 224))   # 6 levels: (1, 768, 4, 4) ... (1, 48, 112, 112)
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.models
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d


def _pad_to_even(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """One more row or column, a copy of the last, where a 2 x 2 convolution of stride 2 would drop it."""
    bottom, right = x.shape[2] % 2, x.shape[3] % 2
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


class PointwiseLinear(nn.Linear):
    """A linear layer along the last axis, on a CPU computed as a 1 x 1 convolution.

    The same numbers to rounding. torch multiplies matrices by MKL, which leaves half of an AMD processor unused, and
    convolutions by oneDNN, which does not: a training step of ConvNeXt-T takes 7.0 s instead of 9.3 (2 cores, Zen 5).
    """

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w d"]:
        if x.device.type != "cpu":
            return super().forward(x)
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)


class ConvNeXtPyramid(nn.Module):
    """ConvNeXt-T (Liu et al., 2022) with 6 levels: strides 64 ... 2, channels 768, 384, 192, 96, 48, 48.

    torchvision's network, but for its stem: the 4 x 4 convolution of stride 4 becomes two of 2 x 2 and stride 2, each
    a level of the pyramid, and a third one leads into stage 1, so that the four stages run at strides 8 to 64.
    Stochastic depth is off: it would change the features of one frame and not those of the other.
    """

    channels = (768, 384, 192, 96, 48, 48)
    strides = (64, 32, 16, 8, 4, 2)

    def __init__(self) -> None:
        super().__init__()
        # torchvision: [stem, stage, downsample, stage, downsample, stage, downsample, stage], so that its keys fit.
        self.features = torchvision.models.convnext_tiny(weights=None, stochastic_depth_prob=0.0).features
        for layer in self.features.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = PointwiseLinear  # keeps its weights, and their names
        self.features[0] = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n_in, n_out, 2, 2), LayerNorm2d(n_out, eps=1e-6))
            for n_in, n_out in ((3, 48), (48, 48), (48, 96))
        )
        for stem in self.features[0]:  # as torchvision starts its own convolutions
            nn.init.trunc_normal_(stem[0].weight, std=0.02)
            nn.init.zeros_(stem[0].bias)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Normalised images of any size to 6 feature maps, coarsest first."""
        x, levels = images, []
        for index, stem in enumerate(self.features[0]):
            x = stem(_pad_to_even(x))
            if index < 2:
                levels.append(x)
        for index in range(1, 8, 2):
            x = self.features[index](x)
            levels.append(x)
            if index < 7:
                x = self.features[index + 1](_pad_to_even(x))
        return levels[::-1]

    def load_torchvision(self, state: dict[str, Tensor]) -> None:
        """Take the four stages from a state dict of torchvision's convnext_tiny; its stem and head have no place."""
        kept = {k: v for k, v in state.items() if not k.startswith(("features.0.", "classifier."))}
        own = {k: v for k, v in self.state_dict().items() if k.startswith("features.0.")}
        self.load_state_dict(kept | own)


class ResNetPyramid(nn.Module):
    """torchvision's ResNet-50 with 5 levels: strides 32 ... 2, channels 2048, 1024, 512, 256, 64."""

    channels = (2048, 1024, 512, 256, 64)
    strides = (32, 16, 8, 4, 2)

    def __init__(self) -> None:
        super().__init__()
        self.body = torchvision.models.resnet50(weights=None)
        self.body.fc = nn.Identity()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Normalised images of any size to 5 feature maps, coarsest first."""
        body = self.body
        levels = [body.relu(body.bn1(body.conv1(images)))]
        x = body.maxpool(levels[0])
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            levels.append(x)
        return levels[::-1]

    def load_torchvision(self, state: dict[str, Tensor]) -> None:
        """Take everything but the head from a state dict of torchvision's resnet50."""
        self.body.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})


class PWCPyramid(nn.Module):
    """The feature extractor of PWC-Net (Sun et al., 2018), 6 levels: strides 64 ... 2, channels 196 ... 16.

    Per level three 3 x 3 convolutions, the first of stride 2, each with LeakyReLU 0.1, as in the published network.
    """

    channels = (196, 128, 96, 64, 32, 16)
    strides = (64, 32, 16, 8, 4, 2)

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        widths = (3, *self.channels[::-1])
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            layers: list[nn.Module] = []
            for index in range(3):
                convolution = nn.Conv2d(n_in if index == 0 else n_out, n_out, 3, 2 if index == 0 else 1, 1)
                nn.init.kaiming_normal_(convolution.weight, a=0.1)
                nn.init.zeros_(convolution.bias)
                layers += [convolution, nn.LeakyReLU(0.1)]
            self.levels.append(nn.Sequential(*layers))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Normalised images of any size to 6 feature maps, coarsest first."""
        x, levels = images, []
        for level in self.levels:
            x = level(x)
            levels.append(x)
        return levels[::-1]


ENCODERS = {"convnext_tiny": ConvNeXtPyramid, "resnet50": ResNetPyramid, "pwc": PWCPyramid}


def build_encoder(name: str, weights: str | Path | None = None) -> nn.Module:
    """An encoder by name, with random weights or with the backbone of a torchvision state dict.

    Args:
        name: "convnext_tiny" (the paper's default), "resnet50" or "pwc".
        weights: a file with a state dict of torchvision's network of that name (`torch.save(net.state_dict(), f)`).

    Returns:
        A module from images (b, 3, h, w), normalised by ImageNet's mean and deviation, to a pyramid; with the
        attributes `channels` and `strides`, coarsest first.

    Raises:
        ValueError: for an unknown name, or a file that does not hold that network.
        FileNotFoundError: if there is no such file.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}: choose one of {', '.join(ENCODERS)}")
    encoder = ENCODERS[name]()
    if weights is None:
        return encoder
    if not hasattr(encoder, "load_torchvision"):
        raise ValueError(f"{weights}: torchvision has no backbone for the encoder {name!r}; leave the weights out")
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such file of backbone weights")
    try:
        encoder.load_torchvision(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises half a dozen kinds for a file that is not one of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{weights}: not a torchvision state dict of {name} ({reason})") from error
    return encoder


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; so is its gradient, as every process computes a loss from the sum.

    `torch.distributed.nn.functional` has it too, but deprecated, and its successor has no gradient in all versions.
    """

    @staticmethod
    def forward(ctx, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return _AllReduce.forward(ctx, gradient)


def sum_over_processes(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The sum over all processes, with gradients to each; x itself in a single one.

    Where every process computes the same loss from the sum, the gradients that come back to one are world_size times
    its share; DDP's mean over the processes takes that factor away.
    """
    return _AllReduce.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d whose statistics in training are those of the batches of all processes together.

    `nn.SyncBatchNorm` does the same but refuses CPU tensors, and then the equality of one process and several could
    not be tested. Every process must hold equally many samples. One process: plain BatchNorm1d.
    """

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """(n, d) to (n, d), each column with mean 0 and deviation 1 over all processes, then scaled and shifted."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        world = dist.get_world_size()
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = sum_over_processes(x.mean(dim=0)) / world
        centred = x - mean
        variance = sum_over_processes(centred.square().mean(dim=0)) / world
        with torch.no_grad():
            n = x.shape[0] * world
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class Expander(nn.Sequential):
    """VICReg's expander: linear, batch norm, ReLU, twice, then a linear layer without bias.

    Args:
        channels: of the pooled features that go in.
        widths: of the three layers; the paper's 8192-8192-8192.
    """

    def __init__(self, channels: int, widths: Sequence[int] = (8192, 8192, 8192)) -> None:
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Linear(channels, width), SyncBatchNorm1d(width), nn.ReLU()]
            channels = width
        super().__init__(*layers, nn.Linear(channels, widths[-1], bias=False))

    def forward(self, x: Float[Tensor, "n c"], views: int = 1) -> Float[Tensor, "n d"]:
        """Pooled features to embeddings.

        Args:
            x: of one view, or of several, stacked.
            views: how many. As in the official code each has batch statistics of its own; but the large matrices are
                read once for all.
        """
        for layer in self:
            per_view = isinstance(layer, nn.modules.batchnorm._BatchNorm)
            x = torch.cat([layer(view) for view in x.chunk(views)]) if per_view else layer(x)
        return x
