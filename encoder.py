"""Encoders that turn images into feature pyramids, the expander of VICReg, and sums over processes with gradients.

A pyramid is a list of feature maps, coarsest first: index 0 is the paper's level l = 1. An encoder has the `channels`
and `strides` of its levels in the same order. For an h x w image of any size, the level of stride s measures
ceil(h / s) x ceil(w / s).

    encoder = build_encoder("convnext_tiny")
    pyramid = encoder(torch.rand(1, 3, 224, 224))   # 6 levels: (1, 768, 4, 4) ... (1, 48, 112, 112)
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.models
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import BasicBlock

Images = Tensor | np.ndarray | PIL.Image.Image | str | Path  # what the calls for users take; see `as_batch`


def as_batch(images: Images, like: Float[Tensor, "..."]) -> Float[Tensor, "b 3 h w"]:
    """RGB images in [0, 1], on the device and in the precision of `like`, from what people have.

    Args:
        images: a tensor (b, 3, h, w) or (3, h, w), float in [0, 1] or uint8; a NumPy array (h, w, 3) with such values;
            a PIL image of 8 bits; or the path of an image file.

    Raises:
        ValueError: it is none of these.
        OSError: the file cannot be read.
    """
    is_path = isinstance(images, str | Path)
    if is_path:
        images = PIL.Image.open(images)
    if isinstance(images, PIL.Image.Image):
        if images.mode[0] in "IF" or ";16" in str(getattr(images, "tile", "")).replace("BGR;16", ""):
            raise ValueError(f"mode {images.mode}, 16 or 32 bits: scale the image to [0, 1] and give it as an array")
        images = np.array((PIL.ImageOps.exif_transpose(images) if is_path else images).convert("RGB"))
    if isinstance(images, np.ndarray) and images.ndim == 3:
        images = torch.from_numpy(np.array(images)).permute(2, 0, 1)  # a copy: PIL's are not writable
    if not isinstance(images, Tensor) or images.ndim not in (3, 4) or images.shape[-3] != 3:
        seen = f"{type(images).__name__} {tuple(getattr(images, 'shape', ()))}"
        raise ValueError(f"{seen}: images are tensors (b, 3, h, w) or (3, h, w), arrays (h, w, 3), PIL images or paths")
    x = images if images.ndim == 4 else images[None]
    if x.dtype == torch.uint8:
        return x.to(like.device).to(like.dtype) / 255
    if not x.is_floating_point():
        raise ValueError(f"images are uint8, or floats in [0, 1], not {x.dtype}")
    # A little more is allowed: some methods of resizing overshoot.
    if not (torch.compiler.is_exporting() or not x.numel() or (x.min() >= -0.5 and x.max() <= 1.5)):
        raise ValueError(f"images are uint8, or floats in [0, 1], not in [{x.min():g}, {x.max():g}]")
    return x.to(like.dtype).to(like.device)  # in this order: Apple's GPUs have no float64


def pad_to_multiple(x: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Repeats the last row and the last column until both sizes are multiples."""
    bottom, right = (-size % multiple for size in x.shape[2:])
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


class PointwiseLinear(nn.Linear):
    """A linear layer along the last axis, computed on a CPU as a 1 x 1 convolution. The numbers agree to rounding.

    torch multiplies matrices with MKL, which leaves half of an AMD processor unused, and convolves with oneDNN, which
    does not: a training step of ConvNeXt-T takes 7.0 s instead of 9.3 (2 cores, Zen 5).
    """

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w d"]:
        if x.device.type != "cpu":
            return super().forward(x)
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)


class ConvNeXtPyramid(nn.Module):
    """ConvNeXt-T (Liu et al., 2022) with 6 levels: strides 64 ... 2, channels 768, 384, 192, 96, 48, 48.

    This is torchvision's network except for the stem. Its 4 x 4 convolution of stride 4 becomes two of 2 x 2 and stride
    2, each a level of the pyramid, and a third one leads into stage 1, so that the four stages run at strides 8 to 64.
    Stochastic depth is off: it would change the features of one frame and not those of the other.
    """

    channels = (768, 384, 192, 96, 48, 48)
    strides = (64, 32, 16, 8, 4, 2)

    def __init__(self) -> None:
        super().__init__()
        # In torchvision's order, so that its keys fit: stem, stage, then downsample and stage three times.
        self.features = torchvision.models.convnext_tiny(weights=None, stochastic_depth_prob=0.0).features
        for layer in self.features.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = PointwiseLinear  # the same layer, computed in another way
        self.features[0] = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n_in, n_out, 2, 2), LayerNorm2d(n_out, eps=1e-6))
            for n_in, n_out in ((3, 48), (48, 48), (48, 96))
        )
        for stem in self.features[0]:  # as torchvision starts its own convolutions
            nn.init.trunc_normal_(stem[0].weight, std=0.02)
            nn.init.zeros_(stem[0].bias)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        levels, parts = [images], self.features
        halvings = (*parts[0], parts[2], parts[4], parts[6])
        stages = (None, None, parts[1], parts[3], parts[5], parts[7])  # each after its halving
        for halve, stage in zip(halvings, stages, strict=True):
            # Padded: a 2 x 2 convolution of stride 2 drops the last of an odd number.
            x = halve(pad_to_multiple(levels[-1], 2))
            levels.append(x if stage is None else stage(x))
        return levels[:0:-1]

    def load_torchvision(self, state: dict[str, Tensor]) -> None:
        """Loads the four stages from a state dict of torchvision's convnext_tiny; its stem and head do not fit."""
        kept = {k: v for k, v in state.items() if not k.startswith(("features.0.", "classifier."))}
        own = {k: v for k, v in self.state_dict().items() if k.startswith("features.0.")}
        self.load_state_dict(kept | own)


class ResNetPyramid(nn.Module):
    """torchvision's ResNet-50 with 5 levels: strides 32 ... 2, channels 2048, 1024, 512, 256, 64."""

    channels = (2048, 1024, 512, 256, 64)
    strides = (32, 16, 8, 4, 2)

    def __init__(self) -> None:
        super().__init__()
        self.body = torchvision.models.resnet50(weights=None, norm_layer=SyncBatchNorm)
        self.body.fc = nn.Identity()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        body = self.body
        levels = [body.relu(body.bn1(body.conv1(images)))]
        x = body.maxpool(levels[0])
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            levels.append(x)
        return levels[::-1]

    def load_torchvision(self, state: dict[str, Tensor]) -> None:
        """Loads everything but the head from a state dict of torchvision's resnet50."""
        self.body.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})


class SmallResNetPyramid(nn.Module):
    """A narrow ResNet with 5 levels, strides 32 ... 2, channels 16 ... 1 times `width`, for short trainings.

    Four stages of stride 2 have `blocks` of torchvision's basic blocks each (1: 4.9M parameters, 2: 11.2M; half as wide
    and 1: 1.2M). They follow a 3 x 3 convolution of stride 2: ResNet's 7 x 7 and max-pooling would leave little of an
    image of 48 px.
    """

    strides = (32, 16, 8, 4, 2)

    def __init__(self, blocks: int = 1, width: int = 32) -> None:
        super().__init__()
        self.channels = tuple(width * factor for factor in (16, 8, 4, 2, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), SyncBatchNorm(width), nn.ReLU())
        self.stages = nn.ModuleList()
        for n_in, n_out in pairwise(self.channels[::-1]):
            shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, 2, bias=False), SyncBatchNorm(n_out))
            first = BasicBlock(n_in, n_out, 2, shortcut, norm_layer=SyncBatchNorm)
            others = (BasicBlock(n_out, n_out, norm_layer=SyncBatchNorm) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(first, *others))
        for layer in self.modules():  # as torchvision starts its ResNets
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        levels = [self.stem(images)]
        for stage in self.stages:
            levels.append(stage(levels[-1]))
        return levels[::-1]


class PWCPyramid(nn.Module):
    """The feature extractor of PWC-Net (Sun et al., 2018), 6 levels: strides 64 ... 2, channels 196 ... 16.

    As in the published network, a level has three 3 x 3 convolutions, the first of stride 2, each with LeakyReLU 0.1.
    """

    channels = (196, 128, 96, 64, 32, 16)
    strides = (64, 32, 16, 8, 4, 2)

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for n_in, n_out in pairwise((3, *self.channels[::-1])):
            layers: list[nn.Module] = []
            for width, stride in ((n_in, 2), (n_out, 1), (n_out, 1)):
                convolution = nn.Conv2d(width, n_out, 3, stride, padding=1)
                nn.init.kaiming_normal_(convolution.weight, a=0.1)
                nn.init.zeros_(convolution.bias)
                layers += [convolution, nn.LeakyReLU(0.1)]
            self.levels.append(nn.Sequential(*layers))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        levels = [images]
        for level in self.levels:
            levels.append(level(levels[-1]))
        return levels[:0:-1]


ENCODERS = {
    "convnext_tiny": ConvNeXtPyramid,
    "resnet50": ResNetPyramid,
    "pwc": PWCPyramid,
    "resnet10": SmallResNetPyramid,
    "resnet18": partial(SmallResNetPyramid, blocks=2),
    "resnet10_half": partial(SmallResNetPyramid, width=16),
}
EncoderName = Literal[tuple(ENCODERS)]  # the type of a configuration's field


def build_encoder(name: str, weights: str | Path | None = None) -> nn.Module:
    """One of ENCODERS: from images (b, 3, h, w), normalised by ImageNet's mean and standard deviation, to a pyramid.

    `weights` is a file with a state dict of torchvision's network of that name (`torch.save(net.state_dict(), f)`),
    else they are random. ValueError for an unknown name, or a file that is missing or does not hold that network.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}: choose one of {', '.join(ENCODERS)}")
    encoder = ENCODERS[name]()
    if weights is None:
        return encoder
    if not hasattr(encoder, "load_torchvision"):
        raise ValueError(f"{weights}: torchvision has no backbone for the encoder {name!r}; leave the weights out")
    try:
        encoder.load_torchvision(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises half a dozen kinds for a file that is not one of its own
        raise ValueError(f"{weights}: not a torchvision state dict of {name} ({first_line(error)})") from error
    return encoder


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Expander(nn.Sequential):
    """VICReg's expander of pooled features: linear, batch norm, ReLU, twice, then a linear layer without bias.

    The `widths` of its three layers are VICReg's by default.
    """

    def __init__(self, channels: int, widths: Sequence[int] = (8192, 8192, 8192)) -> None:
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Linear(channels, width), SyncBatchNorm(width), nn.ReLU()]
            channels = width
        super().__init__(*layers, nn.Linear(channels, widths[-1], bias=False))

    def forward(self, x: Float[Tensor, "n c"], views: int = 1) -> Float[Tensor, "n d"]:
        """Pooled features to embeddings. `x` stacks the samples of this many `views`.

        As in the official code, each has its own batch statistics; the large matrices are still read only once.
        """
        for layer in self:
            per_view = isinstance(layer, SyncBatchNorm)
            x = torch.cat([layer(view) for view in x.chunk(views)]) if per_view else layer(x)
        return x


# ------------------------------------------------------------------------------------ what several processes share


def several_processes() -> bool:
    """Whether this is one of several connected processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


class _AllReduce(torch.autograd.Function):
    """The sum over all processes, whose gradient is summed too.

    torch's own, in `torch.distributed.nn.functional`, is deprecated; its successor lacks the gradient in some versions.
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
    """The sum over all processes, with gradients to each of them.

    Every process computes the same loss from the sum, so the gradient that arrives at one is world_size times its
    share. DDP averages gradients over the processes, which removes that factor.
    """
    return _AllReduce.apply(x)


class _AllGather(torch.autograd.Function):
    """The rows of all processes. The gradient of a process's rows is summed over the losses of all processes."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "n ..."]) -> Float[Tensor, "m ..."]:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "m ..."]) -> Float[Tensor, "n ..."]:
        return _AllReduce.forward(ctx, gradient).chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Float[Tensor, "n ..."]) -> Float[Tensor, "m ..."]:
    """The rows of all processes, with gradients to each of them (see `sum_over_processes`); in one process, x itself.

    Every process must hold equally many rows.
    """
    return _AllGather.apply(x.contiguous()) if several_processes() else x


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of (n, d) or (n, d, h, w) whose statistics in training are those of all processes' batches together.

    `nn.SyncBatchNorm` does the same, but refuses CPU tensors, so that no test could compare several processes with one.
    Every process must hold equally many samples. In a single process: plain batch norm.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim  # any number of axes from 2 on

    def forward(self, x: Float[Tensor, "n d *_"]) -> Float[Tensor, "n d *_"]:
        if not self.training or not several_processes():
            return super().forward(x)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        moments = torch.stack(torch.var_mean(precise, dim=(0, *range(2, x.ndim)), correction=0))
        variances, means = gather(moments[None]).unbind(dim=1)  # each (processes, d)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + means.var(dim=0, correction=0)  # the law of total variance
        with torch.no_grad():
            n = x.numel() / x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        mean, scale, shift = (z.view(-1, *[1] * (x.ndim - 2)) for z in (mean, scale, self.bias))
        return torch.addcmul(shift, precise - mean, scale).to(x.dtype)
