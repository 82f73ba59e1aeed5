"""MC-JEPA: one encoder, two tasks. Optical flow of video pairs (M-JEPA) and VICReg on two views of images.

model = MCJEPA()                                        # ConvNeXt-T, estimator of 8M, expander 8192-8192-8192
losses = model(video=(image_1, image_2), views=(view_1, view_2))
losses.total.backward()                                 # Eq. 7
flow = model.estimate_flow(image_1, image_2)            # (b, 2, h, w), pixels, any size

model = load_model("runs/pocket/checkpoint.pt")         # a model that train.py has trained
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from encoder import Expander, build_encoder, sum_over_processes
from flow import FlowEstimator, estimate_flow_pyramid, forward_backward_mask, range_map, resize_flow, warp
from losses import (
    cycle_consistency_loss,
    reconstruction_loss,
    regression_loss,
    smoothness_loss,
    variance_covariance_loss,
    vicreg_loss,
)

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelConfig:
    """What the network is made of."""

    encoder: Literal["convnext_tiny", "resnet50", "pwc"] = "convnext_tiny"
    """The backbone (paper: ConvNeXt-T; Table 4 also has ResNet-50 and PWC-Net)."""
    estimator_factor: float = 2.0
    """Scales the widths of the flow estimator (paper, Table 3: 2 is the default, 8M parameters)."""
    estimator_norm: Literal["none", "layer", "l2", "layer+l2"] = "layer"
    """Normalisation inside the estimator (paper, Table 3: LayerNorm)."""
    estimator_unit: float = 16.0
    """What an output of 1 of the estimator means at every level, pixels of the image (ours; PWC-Net has 20)."""
    flow_clip: float = 128.0
    """The largest flow in x and y, pixels of the image (second-hand)."""
    expander: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of the expander's layers (field: VICReg's official code)."""


@dataclass(frozen=True)
class LossConfig:
    """The coefficients of Eq. 7, and what belongs to its terms."""

    reconstruction: float = 1.0
    """Eq. 3 (second-hand)."""
    l1: float = 1.0
    """Inside Eq. 3 (paper: the three are summed)."""
    l2: float = 1.0
    """Inside Eq. 3."""
    ssim: float = 1.0
    """Inside Eq. 3."""
    regression: float = 1.0
    """Eq. 2 (second-hand)."""
    smoothness: float = 75.0
    """Eq. 4 on the flow divided by min(h, w) (second-hand; the scale is ARFlow's)."""
    smoothness_order: Literal[1, 2] = 1
    """Which differences of the flow Eq. 4 takes (field)."""
    edge_weight: float = 10.0
    """lambda of Eq. 4 (field: ARFlow)."""
    cycle: float = 0.2
    """Eq. 5 (second-hand)."""
    coarse_levels: float = 0.0
    """Eqs. 3 and 4, with their coefficients, at the coarser levels too, on images shrunk to their size. At 1 the finest
    of them counts as much as the full size, each coarser one half as much (field: ARFlow has them at several levels;
    off, as the paper has them at full size only)."""
    variance: tuple[float, ...] = (0.01, 0.01, 0.01, 0.01, 0.001, 0.0001)
    """Eq. 6 per level, coarsest first (second-hand; from which end it counts is not known)."""
    covariance: tuple[float, ...] = (0.04, 0.04, 0.001, 0.0, 0.0, 0.0)
    """Eq. 6 per level, coarsest first (second-hand; likewise)."""
    flow_balance: float = 0.1
    """Multiplies all flow losses, Eqs. 2 to 6, in the sum with the content loss (paper, Fig. 5 (3))."""
    vicreg_invariance: float = 25.0
    """(field: VICReg's official code)"""
    vicreg_variance: float = 25.0
    """(field: VICReg's official code)"""
    vicreg_covariance: float = 1.0
    """(field: VICReg's official code)"""
    occlusion: Literal["forward_backward", "range_map"] = "forward_backward"
    """How occluded pixels are found (paper: the first; field: UFlow has both)."""
    least_visible: float = 0.2
    """A frame of which less than this share is visible counts unmasked: a mask must not switch the loss off (ours)."""


class Losses(NamedTuple):
    """What `MCJEPA.forward` returns; every value is a scalar tensor."""

    total: Float[Tensor, ""]
    """Eq. 7: the sum of `weighted`; backpropagate this."""
    unweighted: dict[str, Float[Tensor, ""]]
    """Each term by name, without the factor that `weighted` has, detached. Weights inside a term are in it: l1, l2 and
    ssim in "reconstruction", those per level in "variance_covariance", those of Eqs. 3 and 4 in "coarse_levels"."""
    weighted: dict[str, Float[Tensor, ""]]
    """Each term times its coefficient (and the balance of the tasks), detached."""
    monitor: dict[str, Float[Tensor, ""]]
    """Health, not loss: deviation of the features per level and of the embeddings, visible share, mean flow."""


class _AllGather(torch.autograd.Function):
    """The rows of all processes; the gradient of a process's rows is the sum of what all processes' losses send."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "n ..."]) -> Float[Tensor, "m ..."]:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "m ..."]) -> Float[Tensor, "n ..."]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Float[Tensor, "n ..."]) -> Float[Tensor, "m ..."]:
    """The rows of all processes, with gradients to each; x itself in a single process.

    Every process computes the same loss of the same rows, so that the gradients that come back to a process add up
    to world_size times its share; DDP's mean over the processes takes that factor away.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _AllGather.apply(x.contiguous())


@torch.no_grad()
def deviations(pyramid: list[Float[Tensor, "b _ _ _"]]) -> list[Float[Tensor, ""]]:
    """Of each level: the deviation over the positions of all processes, averaged over the channels."""
    moments = [torch.stack(torch.var_mean(features, dim=(0, 2, 3), correction=0)) for features in pyramid]
    everywhere = gather(torch.cat(moments, dim=1)[None])  # all levels beside each other: (processes, 2, channels)
    variances, means = everywhere.unbind(dim=1)
    variance = variances.mean(dim=0) + means.var(dim=0, correction=0)
    levels = variance.split([features.shape[1] for features in pyramid])
    counts = [variances.shape[0] * features.numel() / features.shape[1] for features in pyramid]
    return [(level * n / (n - 1)).sqrt().mean() for level, n in zip(levels, counts, strict=True)]


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """bf16 and fp16 to float32: warps, statistics and losses need its digits (300.3 px would become 300)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def swap_frames(x: Float[Tensor, "two_b ..."]) -> Float[Tensor, "two_b ..."]:
    """[1; 2] along the batch to [2; 1]."""
    return torch.cat(x.chunk(2)[::-1])


def pad_to_multiple(x: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Rows and columns added below and to the right, copies of the last, until both sizes are multiples."""
    h, w = x.shape[2:]
    return F.pad(x, (0, -w % multiple, 0, -h % multiple), mode="replicate")


def _per_pair(mask: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Weights of mean 1 in each pair, so that a masked mean over the batch is the mean of the pairs' masked means.

    Otherwise the loss would depend on how pairs are spread over processes.
    """
    return mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)


class MCJEPA(nn.Module):
    """Encoder, flow estimator and expander; `forward` is Eq. 7.

    Args:
        config: the network; `loss`: the coefficients.
        task: "mcjepa" (both), "mjepa" (flow only; no expander is built), "vicreg" (content only; no estimator).
        backbone_weights: a torchvision state dict to start the encoder from; see `encoder.build_encoder`.
    """

    def __init__(
        self,
        config: ModelConfig = ModelConfig(),  # noqa: B008 (frozen)
        loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
        task: Literal["mcjepa", "mjepa", "vicreg"] = "mcjepa",
        backbone_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.encoder_is_frozen = loss, False
        self.encoder = build_encoder(config.encoder, backbone_weights)
        channels, strides = self.encoder.channels, self.encoder.strides
        for name, weights in (("variance", loss.variance), ("covariance", loss.covariance)):
            if task != "vicreg" and len(weights) < len(channels):
                raise ValueError(f"loss.{name}: {len(channels)} levels need a coefficient each, got {len(weights)}")
        self.estimator = None
        if task != "vicreg":
            self.estimator = FlowEstimator(
                channels,
                strides,
                config.estimator_factor,
                config.estimator_norm,
                clip=config.flow_clip,
                unit=config.estimator_unit,
            )
        self.expander = Expander(channels[0], config.expander) if task != "mjepa" else None
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(IMAGENET_DEVIATION).view(1, 3, 1, 1), persistent=False)

    def freeze_encoder(self, frozen: bool = True) -> None:
        """No gradient reaches the encoder, and its normalisation layers keep their statistics also in train mode."""
        self.encoder.requires_grad_(not frozen)
        self.encoder_is_frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> "MCJEPA":
        """As of any module, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.encoder_is_frozen:
            self.encoder.eval()
        return self

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Images in [0, 1] to the feature pyramid, coarsest first, in float32."""
        return [at_least_float32(features) for features in self.encoder((images - self.mean) / self.deviation)]

    @torch.no_grad()
    def estimate_flow(
        self, image_1: Float[Tensor, "b 3 h w"], image_2: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 2 h w"]:
        """The flow from image_1 to image_2, in pixels, at the images' size, which may be any.

        Args:
            image_1, image_2: RGB in [0, 1].

        Raises:
            ValueError: if the two differ in size, or the model was trained for content only.
        """
        if self.estimator is None:
            raise ValueError("this model was trained with --task vicreg: it has no flow estimator")
        if image_1.shape != image_2.shape:
            raise ValueError(f"two images of one size are needed, got {tuple(image_1.shape)}, {tuple(image_2.shape)}")
        h, w = image_1.shape[2:]
        pyramid = self.encode(pad_to_multiple(torch.cat((image_1, image_2)), max(self.encoder.strides)))
        source, target = zip(*(features.chunk(2) for features in pyramid), strict=True)
        flow = estimate_flow_pyramid(self.estimator, list(source), list(target))[-1]
        stride = self.estimator.strides[-1]
        return resize_flow(flow, (flow.shape[2] * stride, flow.shape[3] * stride))[..., :h, :w]

    def forward(
        self,
        video: tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"]] | None = None,
        views: tuple[Float[Tensor, "n 3 s s"], Float[Tensor, "n 3 s s"]] | None = None,
        masks: bool = True,
        regularisation: float = 1.0,
    ) -> Losses:
        """Eq. 7 over a batch of video pairs and a batch of two views of images; either may be absent.

        Args:
            video: two frames, RGB in [0, 1].
            views: two augmented views of each image, RGB in [0, 1].
            masks: leave occluded pixels out; off while the flow is too young to tell them (mask warm-up).
            regularisation: multiplies Eq. 6 (its warm-up).

        Returns:
            The total, every term by name, and what to watch; see `Losses`.
        """
        # name -> (term, coefficient)
        terms: dict[str, tuple[Tensor, float]] = {}
        monitor: dict[str, Tensor] = {}
        if video is not None:
            self._flow_terms(*video, masks, regularisation, terms, monitor)
        if views is not None:
            self._content_terms(*views, terms, monitor)
        if not terms:
            raise ValueError("nothing to learn from: give a video batch, an image batch, or both")
        weighted = {name: coefficient * term for name, (term, coefficient) in terms.items()}
        return Losses(
            total=sum(weighted.values()),
            unweighted={name: term.detach() for name, (term, _) in terms.items()},
            weighted={name: term.detach() for name, term in weighted.items()},
            monitor={name: value.detach() for name, value in monitor.items()},
        )

    def _flow_terms(self, image_1, image_2, masks, regularisation, terms, monitor) -> None:
        """Eqs. 2 to 6, both directions in one batch: `images` is [1; 2], and everything follows that order."""
        loss, balance = self.loss, self.loss.flow_balance
        images = pad_to_multiple(torch.cat((image_1, image_2)), max(self.encoder.strides))
        pyramid = self.encode(images)
        flows = estimate_flow_pyramid(self.estimator, pyramid, [swap_frames(x) for x in pyramid])

        with torch.autocast(images.device.type, enabled=False):
            images, size = at_least_float32(images), images.shape[2:]
            flow = resize_flow(flows[-1], size)
            visible, visible_share = self._visible(flow, masks)
            regression, cycle, spread = [], [], images.new_zeros(())
            across = sum_over_processes if dist.is_initialized() and dist.get_world_size() > 1 else None
            for level, features in enumerate(pyramid):
                # A level finer than the estimator's last (stride 2) takes the final flow at its own size.
                flow_l = flows[level] if level < len(flows) else resize_flow(flow, features.shape[2:])
                visible_l = _per_pair(F.adaptive_avg_pool2d(visible, features.shape[2:]))
                warped = warp(swap_frames(features), flow_l)
                regression.append(regression_loss(features, warped, visible_l))
                cycled = warp(warp(features, swap_frames(flow_l)), flow_l)
                cycle.append(cycle_consistency_loss(features, cycled, visible_l))
                weights = loss.variance[level], loss.covariance[level]
                spread = spread + variance_covariance_loss(features, *weights, sum_over_processes=across)

            reconstruction, smoothness = self._image_terms(images, flow, visible)
            if loss.coarse_levels:
                coarse = self._coarse_levels(images, flows[:-1], visible)
                terms["coarse_levels"] = (coarse, balance * loss.coarse_levels)

        terms["reconstruction"] = (reconstruction, balance * loss.reconstruction)
        terms["regression"] = (sum(regression), balance * loss.regression)
        terms["smoothness"] = (smoothness, balance * loss.smoothness)
        terms["cycle"] = (sum(cycle), balance * loss.cycle)
        terms["variance_covariance"] = (spread, balance * regularisation)
        for stride, deviation in zip(self.encoder.strides, deviations(pyramid), strict=True):
            monitor[f"deviation/stride_{stride}"] = deviation
        monitor["visible"] = visible_share
        monitor["flow_length"] = torch.hypot(*flow.detach().unbind(dim=1)).mean()

    def _image_terms(
        self,
        images: Float[Tensor, "two_b 3 h w"],
        flow: Float[Tensor, "two_b 2 h w"],
        visible: Float[Tensor, "two_b 1 h w"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Eqs. 3 and 4, before their coefficients."""
        loss = self.loss
        warped = warp(swap_frames(images), flow)
        # SSIM has no value on the outermost ring: its weights need their mean of 1 per pair without that ring.
        inside = F.pad(_per_pair(visible[..., 1:-1, 1:-1]), (1, 1, 1, 1))
        reconstruction = reconstruction_loss(images, warped, _per_pair(visible), loss.l1, loss.l2, ssim=0.0)
        reconstruction = reconstruction + reconstruction_loss(images, warped, inside, 0.0, 0.0, loss.ssim)
        size = flow.shape[2:]
        return reconstruction, smoothness_loss(flow / min(size), images, loss.edge_weight, loss.smoothness_order)

    def _coarse_levels(
        self,
        images: Float[Tensor, "two_b 3 h w"],
        flows: list[Float[Tensor, "two_b 2 _ _"]],
        visible: Float[Tensor, "two_b 1 h w"],
    ) -> Float[Tensor, ""]:
        """Eqs. 3 and 4 with their coefficients, on images shrunk to the size of each flow; each counts twice as much as
        the one before.

        Flows of less than 4 x 4 are left out: SSIM has no value on the ring, which is nearly all of them.
        """
        total = images.new_zeros(())
        for flow in flows:
            if min(flow.shape[2:]) >= 4:
                shrunk, visible_l = (F.adaptive_avg_pool2d(x, flow.shape[2:]) for x in (images, visible))
                reconstruction, smoothness = self._image_terms(shrunk, flow, visible_l)
                total = total / 2 + self.loss.reconstruction * reconstruction + self.loss.smoothness * smoothness
        return total

    def _visible(
        self, flow: Float[Tensor, "two_b 2 h w"], masks: bool
    ) -> tuple[Float[Tensor, "two_b 1 h w"], Float[Tensor, ""]]:
        """The mask of the losses, and the share of pixels that the flows call visible (also while masks are off)."""
        flow = flow.detach()
        reverse = swap_frames(flow)
        if self.loss.occlusion == "forward_backward":
            visible = forward_backward_mask(flow, reverse).to(flow.dtype)
        else:
            visible = (range_map(reverse) >= 0.2).to(flow.dtype)
        share = visible.mean(dim=(1, 2, 3), keepdim=True)
        if not masks:
            return torch.ones_like(visible), share.mean()
        return torch.where(share < self.loss.least_visible, torch.ones_like(visible), visible), share.mean()

    def _content_terms(self, view_1, view_2, terms, monitor) -> None:
        """VICReg on the pooled features of the coarsest level."""
        pooled = self.encode(torch.cat((view_1, view_2)))[0].mean(dim=(2, 3))
        x, y = at_least_float32(self.expander(pooled, views=2)).chunk(2)
        with torch.autocast(pooled.device.type, enabled=False):
            x, y = gather(x), gather(y)
            invariance, variance, covariance = vicreg_loss(x, y)
        terms["vicreg_invariance"] = (invariance, self.loss.vicreg_invariance)
        terms["vicreg_variance"] = (variance, self.loss.vicreg_variance)
        terms["vicreg_covariance"] = (covariance, self.loss.vicreg_covariance)
        monitor["deviation/embedding"] = x.detach().std(dim=0).mean()
        monitor["deviation/pooled"] = pooled.detach().std(dim=0).mean()


def load_weights(path: str | Path) -> dict:
    """A dictionary that torch has saved, on the CPU; nothing in the file is executed (`weights_only=True`).

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a folder.
        ValueError: if it holds something else, or is damaged.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: a folder; name the checkpoint in it, such as {Path(path) / 'checkpoint.pt'}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch itself skips the checksums
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                    raise ValueError("it unpacks to more than it is")
                if archive.testzip():
                    raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises half a dozen kinds for a file that is not one of its own
        raise ValueError(f"{path}: not a checkpoint, or a damaged one; take another or train anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint; it holds a {type(content).__name__}")
    return content


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint that train.py has written; raises as `load_weights`, and ValueError where parts are missing."""
    checkpoint = load_weights(path)
    kinds = {"model": dict, "config": dict, "step": int}
    if not all(isinstance(checkpoint.get(name), kind) for name, kind in kinds.items()) or checkpoint["step"] < 0:
        raise ValueError(f"{path}: not a checkpoint of train.py; it must hold model, config and step")
    try:  # a tensor of stride 0 claims a size that it does not have
        size = sum(value.numel() * value.element_size() for value in checkpoint["model"].values())
    except AttributeError as error:
        raise ValueError(f"{path}: not a checkpoint of train.py; its model holds other things than tensors") from error
    if size > os.path.getsize(path):
        raise ValueError(f"{path}: not a checkpoint of train.py; its tensors are larger than the file")
    return checkpoint


def load_model(path: str | Path, device: str | torch.device = "cpu") -> MCJEPA:
    """The model of a checkpoint, in eval mode.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`; also if weights and configuration do not fit.
    """
    checkpoint = load_checkpoint(path)
    try:
        settings = checkpoint["config"]
        if not isinstance(settings["model"], dict):
            raise ValueError(f"{path}: a checkpoint of evaluate.py segmentation; take the one of train.py")
        parts = [
            kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings[name].items()})
            for kind, name in ((ModelConfig, "model"), (LossConfig, "loss"))
        ]
        with torch.device("meta"):  # costs no memory, whatever the file says
            expected = MCJEPA(*parts, task=settings["task"]).state_dict()
        if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in checkpoint["model"].items()}:
            raise ValueError(f"{path}: its weights are not those of its configuration; take another, or train anew")
        model = MCJEPA(*parts, task=settings["task"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError, ArithmeticError, IndexError) as error:
        raise ValueError(f"{path}: weights and configuration do not fit this version ({error})") from error
    return model.eval().to(device)
