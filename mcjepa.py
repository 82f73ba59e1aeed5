"""MC-JEPA: one encoder, two tasks. Optical flow of video pairs (M-JEPA) and VICReg on two views of images.

model = MCJEPA()                                        # ConvNeXt-T, estimator of 8M, expander 8192-8192-8192
losses = model(video=(image_1, image_2), views=(view_1, view_2))
losses.total.backward()                                 # Eq. 7
flow = model.estimate_flow(image_1, image_2)            # (b, 2, h, w) in pixels, for images of any size

model = load_model("small")                             # trained weights that come with the code
model = load_model("runs/pocket/checkpoint.pt")         # a model that train.py has trained
"""

import json
import zipfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import load, save
from torch import Tensor, nn

import encoder
import losses
from encoder import EncoderName, Images, as_batch, pad_to_multiple
from flow import FlowEstimator, estimate_flow_pyramid, forward_backward_mask, range_map, resize_flow, warp

SHIPPED = {"small": Path(__file__).parent / "assets" / "mcjepa-small.safetensors"}
"""Trained weights that come with the code, by name (assets/README.md has their card)."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANGE_MAP_THRESHOLD = 0.2  # a pixel that the range map hits less is occluded (field: ARFlow)


@dataclass(frozen=True)
class ModelConfig:
    """What the network is made of."""

    encoder: EncoderName = "convnext_tiny"  # The backbone (paper: convnext_tiny; in Table 4 also pwc and resnet50).
    estimator_factor: float = 2.0  # Scales the widths of the flow estimator (paper, Table 3: 2, with 8M parameters).
    estimator_norm: Literal["none", "layer", "l2", "layer+l2"] = "layer"
    """Inside the estimator (paper, Table 3: layer)."""
    correlation_radius: int = 4  # How far the correlation looks, in pixels of a level (field: 4; paper: all).
    estimator_unit: float = 16.0
    """What an output of 1 of the estimator means at every level, in pixels of the image (ours: 16; PWC-Net: 20)."""
    flow_clip: float = 128.0  # The largest flow in x and y, in pixels of the image (ours: 128).
    expander: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of the expander (field, VICReg's official code: 8192 8192 8192)."""


@dataclass(frozen=True)
class LossConfig:
    """The coefficients of Eq. 7, and what belongs to its terms."""

    reconstruction: float = 1.0  # Eq. 3 (second-hand: 1).
    l1: float = 1.0  # Inside Eq. 3 (ours: 1; the paper names the three parts, and no weights).
    l2: float = 1.0  # Inside Eq. 3 (ours: 1).
    ssim: float = 1.0  # Inside Eq. 3 (ours: 1).
    regression: float = 1.0  # Eq. 2 (second-hand: 1).
    smoothness: float = 37.5
    """Eq. 4, on the flow divided by min(h, w) (second-hand: 75, ARFlow's for KITTI; its function halves the sum at
    order 2 and quarters it at order 1, so that its 75 is our 37.5 or 18.75; see `losses.smoothness_loss`)."""
    smoothness_order: Literal[1, 2] = 2  # Which differences of the flow Eq. 4 takes (paper: 1; field, ARFlow: 2).
    charbonnier: float = 0.0
    """If not 0, Eq. 4 has sqrt(x^2 + this^2) in place of |x| (paper: 0; field, UFlow, in pixels: 0.001)."""
    edge_weight: float = 10.0  # lambda of Eq. 4 (field, ARFlow: 10).
    cycle: float = 0.2  # Eq. 5 (second-hand: 0.2).
    level_flow: Literal["entering", "leaving"] = "entering"
    """Which flow warps a level in Eqs. 2 and 5: the one that enters it, 0 at the coarsest, or the refined one that
    leaves it (paper, Eq. 1 and Figure 2: entering)."""
    feature_strides: tuple[int, int] = (2, 64)
    """The finest and the coarsest level of Eqs. 2 and 5, by their strides (paper: all); VICReg takes the coarsest."""
    masked: tuple[Literal["regression", "cycle", "reconstruction"], ...] = ("regression",)
    """The losses that leave occluded pixels out (paper: regression; field: the reconstruction too)."""
    coarse_levels: float = 0.0
    """Weight of Eqs. 3 and 4 at the coarser levels, on images shrunk to their size (paper: 0, full size only). At 1 the
    finest of them counts as much as the full size, and each coarser one half as much as the one before."""
    variance: tuple[float, ...] = (0.01, 0.01, 0.01, 0.01, 0.001, 0.0001)
    """Variance weights of Eq. 6 per level, coarsest first (second-hand: 0.01 0.01 0.01 0.01 0.001 0.0001; from which
    end they count is not known)."""
    covariance: tuple[float, ...] = (0.04, 0.04, 0.001, 0.0, 0.0, 0.0)
    """Covariance weights of Eq. 6 per level, coarsest first (second-hand: 0.04 0.04 0.001 0 0 0; as above)."""
    each_frame: bool = False  # Takes Eq. 6 over first frames and over second ones, not over both together (ours: no).
    pooled: tuple[float, float] = (0.0, 0.0)
    """Variance and covariance weights of Eq. 6 on the pooled features of images (second-hand: 0.01 0.04; ours: 0)."""
    flow_balance: float = 0.1  # Multiplies all flow losses, Eqs. 2 to 6 (paper, Figure 5 (3): 0.1).
    gradient_ratio: float = 0.0
    """If not 0, train.py moves the balance, in every tenth step of both tasks, until the gradient of the flow losses on
    the encoder is this share of that of the content losses (ours: 0, a fixed balance)."""
    vicreg_invariance: float = 25.0  # (field, VICReg's official code: 25)
    vicreg_variance: float = 25.0  # (field, VICReg's official code: 25)
    vicreg_covariance: float = 1.0  # (field, VICReg's official code: 1)
    occlusion: Literal["forward_backward", "range_map"] = "forward_backward"
    """How occluded pixels are found (paper: forward_backward; field: UFlow has both)."""
    least_visible: float = 0.2
    """A mask that leaves less than this share of its frame visible is dropped: it would end the loss (ours: 0.2)."""


class Losses(NamedTuple):
    """What `MCJEPA.forward` returns; every value is a scalar tensor."""

    total: Float[Tensor, ""]
    """Eq. 7: the sum of `weighted`; backpropagate this."""
    tasks: dict[str, Float[Tensor, ""]]
    """The parts of `total` by task, "flow" and "content"."""
    unweighted: dict[str, Float[Tensor, ""]]
    """Each term by name before its coefficient, detached. Weights inside a term are applied: l1, l2 and ssim in
    "reconstruction", those per level in "variance_covariance", those of Eqs. 3 and 4 in "coarse_levels"."""
    weighted: dict[str, Float[Tensor, ""]]
    """Each term times its coefficient (and the balance of the tasks), detached."""
    monitor: dict[str, Float[Tensor, ""]]
    """The standard deviations of this process's features, per level and pooled, and of all processes' embeddings; the
    visible share, the mean flow."""


Terms = dict[str, tuple[Float[Tensor, ""], float | Float[Tensor, ""]]]  # of a loss by name, with their coefficients
Monitor = dict[str, Float[Tensor, ""]]  # what is worth watching but is not part of the loss, by name


def eq_6(features: Float[Tensor, "b c h w"], variance_weight: float, covariance_weight: float) -> Float[Tensor, ""]:
    """Eq. 6 of one level, with the statistics of all processes' positions."""
    add = encoder.sum_over_processes if encoder.several_processes() else None
    return losses.variance_covariance_loss(features, variance_weight, covariance_weight, sum_over_processes=add)


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """bf16 and fp16 to float32: warps, statistics and losses need its digits (300.3 px would become 300)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def swap_frames(x: Float[Tensor, "two_b ..."]) -> Float[Tensor, "two_b ..."]:
    """Swaps the halves of a batch that stacks all first frames and all second frames."""
    return torch.cat(x.chunk(2)[::-1])


def weights_per_frame(mask: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Scales a mask to a mean of 1 in each frame, so that a masked mean over the batch is the mean over frames.

    Otherwise the loss would depend on how the pairs are spread over processes.
    """
    return mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)


class MCJEPA(nn.Module):
    """Encoder, flow estimator and expander; `forward` computes Eq. 7.

    `task`: "mcjepa" (both), "mjepa" (flow only, without an expander), "vicreg" (content only, without an estimator).
    `backbone_weights`: a torchvision state dict to start the encoder from; see `encoder.build_encoder`.
    """

    def __init__(
        self,
        config: ModelConfig = ModelConfig(),  # noqa: B008 (frozen)
        loss_config: LossConfig = LossConfig(),  # noqa: B008 (frozen)
        task: Literal["mcjepa", "mjepa", "vicreg"] = "mcjepa",
        backbone_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.config, self.loss_config, self.encoder_is_frozen = config, loss_config, False
        self.encoder = encoder.build_encoder(config.encoder, backbone_weights)
        channels, strides = self.encoder.channels, self.encoder.strides
        for name, weights in (("variance", loss_config.variance), ("covariance", loss_config.covariance)):
            if task != "vicreg" and len(weights) < len(channels):
                raise ValueError(f"loss.{name}: {len(channels)} levels need a coefficient each, got {len(weights)}")
        finest, coarsest = loss_config.feature_strides
        if not any(finest <= stride <= coarsest for stride in strides):
            raise ValueError(f"loss.feature_strides: no level from stride {finest} to {coarsest}, only {strides}")
        self.estimator = None
        if task != "vicreg":
            shape = channels, strides, config.estimator_factor, config.estimator_norm, config.correlation_radius
            self.estimator = FlowEstimator(*shape, clip=config.flow_clip, unit=config.estimator_unit)
        self.expander = encoder.Expander(channels[0], config.expander) if task != "mjepa" else None
        self.register_buffer("flow_balance", torch.tensor(loss_config.flow_balance))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def freeze_encoder(self, frozen: bool = True) -> None:
        """Stops or restores the encoder's gradients. Frozen, it uses its running averages in train mode too."""
        self.encoder.requires_grad_(not frozen)
        self.encoder_is_frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> "MCJEPA":
        """As for any module, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.encoder_is_frozen:
            self.encoder.eval()
        return self

    def encode(self, images: Images) -> list[Float[Tensor, "b _ _ _"]]:
        """The feature pyramid of images, coarsest first, in float32; see `as_batch` for what may be given."""
        return self._encode(as_batch(images, self.mean))

    def _encode(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        return [at_least_float32(features) for features in self.encoder((images - self.mean) / self.std)]

    @torch.no_grad()
    def estimate_flow(self, image_1: Images, image_2: Images) -> Float[Tensor, "b 2 h w"]:
        """The flow from image_1 to image_2 (whatever `as_batch` takes), in pixels, at their size, which may be any.

        Raises:
            ValueError: the two differ in size, or are no images, or the model was trained for content only.
        """
        if self.estimator is None:
            raise ValueError("this model has no flow estimator: it was trained with --task vicreg, or by others")
        image_1, image_2 = (as_batch(image, self.mean) for image in (image_1, image_2))
        if image_1.shape != image_2.shape:
            raise ValueError(f"the two images must have one size, got {tuple(image_1.shape)}, {tuple(image_2.shape)}")
        h, w = image_1.shape[2:]
        pyramid = self._encode(pad_to_multiple(torch.cat((image_1, image_2)), max(self.encoder.strides)))
        source, target = zip(*(features.chunk(2) for features in pyramid), strict=True)
        flow = estimate_flow_pyramid(self.estimator, list(source), list(target))[-1]
        stride = self.estimator.strides[-1]
        return resize_flow(flow, (flow.shape[2] * stride, flow.shape[3] * stride))[..., :h, :w]

    def forward(
        self,
        video: tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"]] | None = None,
        views: tuple[Float[Tensor, "n 3 s s"], Float[Tensor, "n 3 s s"]] | None = None,
        masks: bool | Bool[Tensor, ""] = True,
        regularisation: float | Float[Tensor, ""] = 1.0,
    ) -> Losses:
        """Eq. 7 over a batch of video pairs and a batch of two views of images; either may be absent.

        Args:
            video: two frames, RGB in [0, 1].
            views: two augmented views of each image, RGB in [0, 1].
            masks: leave occluded pixels out; False while the flow is too young to find them (mask warm-up).
            regularisation: multiplies Eq. 6 (its warm-up).

        Given as tensors on the CPU, both warm-ups cost neither a wait for the GPU nor, compiled, a recompilation.
        """
        parts: dict[str, tuple[Terms, Monitor]] = {}
        if views is not None:
            parts["content"] = self._content_terms(torch.cat(views))
        # Flow comes last, so that its backward pass runs first: otherwise the small sums of Eq. 6 over processes would
        # wait for the gradients of the expander, hundreds of megabytes.
        if video is not None:
            parts["flow"] = self._flow_terms(torch.cat(video), masks, regularisation)
        if not parts:
            raise ValueError("nothing to learn from: give a video batch, an image batch, or both")
        tasks, unweighted, weighted, monitor = {}, {}, {}, {}
        for task, (terms, values) in parts.items():
            products = {name: coefficient * term for name, (term, coefficient) in terms.items()}
            tasks[task] = sum(products.values())
            unweighted |= {name: term for name, (term, _) in terms.items()}
            weighted |= products
            monitor |= values
        detached = [{name: x.detach() for name, x in values.items()} for values in (unweighted, weighted, monitor)]
        return Losses(sum(tasks.values()), tasks, *detached)

    def _flow_terms(
        self,
        images: Float[Tensor, "two_b 3 h w"],
        masks: bool | Bool[Tensor, ""],
        regularisation: float | Float[Tensor, ""],
    ) -> tuple[Terms, Monitor]:
        """Eqs. 2 to 6, both directions in one batch: `images` is [1; 2], and everything follows that order."""
        config, balance = self.loss_config, self.flow_balance
        images = pad_to_multiple(images, max(self.encoder.strides))
        pyramid = self._encode(images)
        flows = estimate_flow_pyramid(self.estimator, pyramid, [swap_frames(x) for x in pyramid])
        terms: Terms = {}
        with torch.autocast(images.device.type, enabled=False):
            images = at_least_float32(images)
            flow = resize_flow(flows[-1], images.shape[2:])
            visible, visible_share = self._visible(flow, masks)
            regression, cycle, variance_covariance = [], [], []
            warping = [torch.zeros_like(flows[0]), *flows] if config.level_flow == "entering" else flows
            for level, features in enumerate(pyramid):
                weights = config.variance[level], config.covariance[level]
                samples = features.chunk(2) if config.each_frame else [features]
                variance_covariance += [eq_6(frames, *weights) / len(samples) for frames in samples]
                finest, coarsest = config.feature_strides
                if not finest <= self.encoder.strides[level] <= coarsest:
                    continue
                flow_l = resize_flow(warping[min(level, len(warping) - 1)], features.shape[2:])  # stride 2: that of 4
                visible_l = weights_per_frame(F.adaptive_avg_pool2d(visible, features.shape[2:]))
                mask = {loss: visible_l for loss in config.masked}  # the others have none: every pixel counts
                warped = warp(swap_frames(features), flow_l)  # W(X_t+1, f) of the README
                regression.append(losses.regression_loss(features, warped, mask.get("regression")))
                cycled = warp(swap_frames(warped), flow_l)  # W(W(X_t, b), f): swapped, these are W(X_t, b)
                cycle.append(losses.cycle_consistency_loss(features, cycled, mask.get("cycle")))
            if "reconstruction" not in config.masked:
                visible = torch.ones_like(visible)
            reconstruction, smoothness = self._image_losses(images, flow, visible)
            if config.coarse_levels:
                coarse = self._coarse_image_losses(images, flows[:-1], visible)
                terms["coarse_levels"] = (coarse, balance * config.coarse_levels)

        terms["reconstruction"] = (reconstruction, balance * config.reconstruction)  # Eq. 3
        terms["regression"] = (sum(regression), balance * config.regression)  # Eq. 2
        terms["smoothness"] = (smoothness, balance * config.smoothness)  # Eq. 4
        terms["cycle"] = (sum(cycle), balance * config.cycle)  # Eq. 5
        terms["variance_covariance"] = (sum(variance_covariance), balance * regularisation)  # Eq. 6
        monitor = {
            f"deviation/stride_{stride}": features.detach().std(dim=(0, 2, 3), correction=0).mean()
            for stride, features in zip(self.encoder.strides, pyramid, strict=True)
        }
        monitor |= {"visible": visible_share, "flow_length": torch.hypot(*flow.detach().unbind(dim=1)).mean()}
        return terms, monitor

    def _image_losses(
        self,
        images: Float[Tensor, "two_b 3 h w"],
        flow: Float[Tensor, "two_b 2 h w"],
        visible: Float[Tensor, "two_b 1 h w"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Eqs. 3 and 4, before their coefficients."""
        config = self.loss_config
        warped = warp(swap_frames(images), flow)
        # SSIM has no value on the outermost ring: its weights need their mean of 1 per pair without that ring.
        inside = F.pad(weights_per_frame(visible[..., 1:-1, 1:-1]), (1, 1, 1, 1))
        reconstruction = losses.reconstruction_loss(
            images, warped, weights_per_frame(visible), config.l1, config.l2, ssim=0.0
        ) + losses.reconstruction_loss(images, warped, inside, l1=0.0, l2=0.0, ssim=config.ssim)
        options = config.edge_weight, config.smoothness_order, config.charbonnier
        smoothness = losses.smoothness_loss(flow / min(flow.shape[2:]), images, *options)
        return reconstruction, smoothness

    def _coarse_image_losses(
        self,
        images: Float[Tensor, "two_b 3 h w"],
        flows: list[Float[Tensor, "two_b 2 _ _"]],
        visible: Float[Tensor, "two_b 1 h w"],
    ) -> Float[Tensor, ""]:
        """Eqs. 3 and 4 with their coefficients, on images shrunk to the size of each flow; each level counts twice as
        much as the next coarser one.

        Flows of less than 4 x 4 are left out: SSIM has no value on the ring, which is nearly all of them.
        """
        config, total = self.loss_config, images.new_zeros(())
        for flow in flows:
            if min(flow.shape[2:]) >= 4:
                shrunk, visible_l = (F.adaptive_avg_pool2d(x, flow.shape[2:]) for x in (images, visible))
                reconstruction, smoothness = self._image_losses(shrunk, flow, visible_l)
                total = total / 2 + config.reconstruction * reconstruction + config.smoothness * smoothness
        return total

    def _visible(
        self, flow: Float[Tensor, "two_b 2 h w"], masks: bool | Bool[Tensor, ""]
    ) -> tuple[Float[Tensor, "two_b 1 h w"], Float[Tensor, ""]]:
        """The mask of the losses, and the share of pixels that the flows call visible (also while masks are off)."""
        flow = flow.detach()
        reverse = swap_frames(flow)
        both_ways = self.loss_config.occlusion == "forward_backward"
        visible = forward_backward_mask(flow, reverse) if both_ways else range_map(reverse) >= RANGE_MAP_THRESHOLD
        visible = visible.to(flow.dtype)
        share = visible.mean(dim=(1, 2, 3), keepdim=True)
        usable = (share >= self.loss_config.least_visible) & masks
        return torch.where(usable, visible, 1.0), share.mean()

    def _content_terms(self, views: Float[Tensor, "two_n 3 s s"]) -> tuple[Terms, Monitor]:
        """VICReg on the pooled features of the coarsest level; `views` stacks both views of all images, [1; 2]."""
        config, pooled = self.loss_config, self._encode(views)[0].mean(dim=(2, 3))
        x, y = at_least_float32(self.expander(pooled, views=2)).chunk(2)
        with torch.autocast(pooled.device.type, enabled=False):
            x, y = encoder.gather(x), encoder.gather(y)
            invariance, variance, covariance = losses.vicreg_loss(x, y)
            terms = {
                "vicreg_invariance": (invariance, config.vicreg_invariance),
                "vicreg_variance": (variance, config.vicreg_variance),
                "vicreg_covariance": (covariance, config.vicreg_covariance),
            }
            if any(config.pooled):
                terms["pooled"] = (eq_6(pooled[..., None, None], *config.pooled), 1.0)
        watched = {"embedding": x, "pooled": pooled}
        return terms, {f"deviation/{name}": z.detach().std(dim=0).mean() for name, z in watched.items()}


def save_weights(model: MCJEPA, path: str | Path, config: dict, step: int) -> None:
    """Writes the encoder and the estimator as safetensors, with the configuration of their run, for `load_model`."""
    weights = {name: x.contiguous() for name, x in model.state_dict().items() if not name.startswith("expander.")}
    Path(path).write_bytes(save(weights, {"config": json.dumps(config), "step": str(step)}))


def load_checkpoint(path: str | Path, parts: Collection[str] = ("model", "config", "step")) -> dict:
    """What torch or `save_weights` has saved, on the CPU; `path` may be a name in SHIPPED. Nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or lacks one of `parts`, which train.py and heads of evaluate.py save.
    """
    path = SHIPPED.get(str(path), path)
    if not Path(path).is_file():
        hint = f" (a folder; name the file in it, such as {Path(path, 'checkpoint.pt')})" if Path(path).is_dir() else ""
        raise FileNotFoundError(f"{path}: no such checkpoint{hint}")
    try:
        if Path(path).suffix == ".safetensors":
            content = Path(path).read_bytes()
            notes = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            return {"model": load(content), "config": json.loads(notes["config"]), "step": int(notes["step"])}
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
            raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises half a dozen kinds for a file that is not one of its own
        # torch's advice would run the file's code.
        reason = "no file of tensors" if "weights_only" in str(error) else encoder.first_line(error)
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({reason}); use another") from error
    if not isinstance(content, dict) or not {*parts} <= content.keys():
        raise ValueError(f"{path}: not a checkpoint of train.py, which holds model, config and step")
    return content


def load_parts(model: MCJEPA, path: str | Path) -> list[str]:
    """Loads the weights of each part (encoder, estimator, expander) that a checkpoint has; returns those that it lacks.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`; also if a part has another configuration.
    """
    state, missing = load_checkpoint(path)["model"], []
    for name, part in model.named_children():
        weights = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if not weights:
            missing.append(name)
            continue
        try:
            part.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{path}: its {name} has another configuration ({reason})") from error
    if len(missing) == len([*model.children()]):
        raise ValueError(f"{path}: not a checkpoint of train.py; it has no {', no '.join(missing)}")
    return missing


def load_model(path: str | Path, device: str | torch.device = "cpu") -> MCJEPA:
    """The model of a checkpoint, a file of `save_weights` (which has no expander), a state dict of torchvision (only
    its encoder is trained), or a name in SHIPPED; in eval mode.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`; also if weights and configuration do not fit.
    """
    checkpoint = load_checkpoint(path, parts=())
    if not {"model", "config"} <= checkpoint.keys():
        for name in encoder.ENCODERS:
            with suppress(ValueError), torch.random.fork_rng(devices=[]):  # of an encoder that the file does not fit
                torch.default_generator.manual_seed(0)  # the file has no weights for our ConvNeXt's stem
                return MCJEPA(ModelConfig(name, expander=(1,)), task="vicreg", backbone_weights=path).eval().to(device)
        raise ValueError(f"{path}: neither a checkpoint of train.py nor torchvision's weights of an encoder")
    try:
        settings, weights = checkpoint["config"], checkpoint["model"]
        model_config, loss_config = (
            kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings[name].items()})
            for kind, name in ((ModelConfig, "model"), (LossConfig, "loss"))
        )
        has_expander = any(name.startswith("expander.") for name in weights)
        model_config = model_config if has_expander else replace(model_config, expander=(1,))  # it is dropped below
        model = MCJEPA(model_config, loss_config, settings["task"])
        model.expander = model.expander if has_expander else None
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        instead = "not a model of this version of train.py, or a head of evaluate.py segmentation"
        raise ValueError(f"{path}: {instead} ({encoder.first_line(error)})") from error
    return model.eval().to(device)
