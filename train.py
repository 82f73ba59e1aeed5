"""Train MC-JEPA: optical flow from video (M-JEPA) and content features from images (VICReg), both without labels.

    python train.py pocket                                             # 2 CPU cores, minutes, generated data
    python train.py small                                              # hours, or minutes on a GPU with --workers 8
    torchrun --nproc_per_node=8 train.py --flow-start-epoch 10         # the paper's recipe, where it is known
    torchrun --nproc_per_node=8 train.py --data-root DATA              # on the paper's data sets
    python train.py pocket --task mjepa --video-dir MY_CLIP --output-dir runs/my_clip  # flow only, on your own clip
    python train.py runs/pocket/config.json --output-dir runs/again    # the same run once more

The first word may name a preset (paper, small, pocket) or the config.json of a run; every flag overrides it. A run
writes to --output-dir: checkpoint.pt (checkpoint.1.pt is the one before), model.safetensors (at the end), config.json,
environment.json, metrics.jsonl, tensorboard/ and, for flow, best.pt and pictures/. SIGTERM, SIGUSR1 and Ctrl-C end it
after a step, with a checkpoint; the same command continues it from there, on a CPU exactly.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_dtype

from data import FlowAugmentation, ImageFiles, SkipBadFiles, Stream, TwoViews, VideoPairs, make_loader
from engine import checkpoint, processes
from engine.faults import Faults, Report, check_numbers, run_command
from engine.log import Log, environment
from evaluate import find_views, flow_errors_on_shapes, flow_figure, shapes_pair
from mcjepa import MCJEPA, LossConfig, Losses, ModelConfig, load_checkpoint, load_parts, save_weights
from sources.moving_shapes import ShapeImages, ShapePairs
from sources.training_sets import ImageNet, RepeatsConfig, open_mix

IMAGENET_SIZE = 1_281_167  # an epoch of MovingShapes is as long as the paper's: one pass over ImageNet
Frames = tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"]]  # video pairs
Views = tuple[Float[Tensor, "n 3 s s"], Float[Tensor, "n 3 s s"]]  # two views of images
Batch = tuple[Frames | None, Views | None]  # None for a task that does not learn in a step


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. The label in brackets says where a default comes from (see the README)."""

    task: Literal["mcjepa", "mjepa", "vicreg"] = "mcjepa"  # Both tasks, flow only (M-JEPA), or content only (VICReg).
    strategy: Literal["combined", "alternate_batches", "alternate_epochs", "frozen", "finetune"] = "combined"
    """How the tasks share the steps (paper, Table 5). combined: both in every step. alternate_...: in turns. frozen,
    finetune: content first (or --init), then flow alone, with the encoder frozen or learning."""
    data_root: Path | None = None  # The paper's data sets, as their archives unpack. Without data: MovingShapes.
    sets: tuple[str, ...] = ()  # Only these videos of --data-root (names or prefixes): kitti, sintel, chairs, hd1k...
    video_dir: Path | None = None
    """Your own videos instead of those of --data-root: a tree of folders of frames or of video files, or one video."""
    image_dir: Path | None = None  # Your own images, in place of ImageNet: any tree of image files.
    output_dir: Path = Path("runs/paper")  # Where the run writes everything, and continues from its checkpoint.
    init: Path | None = None  # Start a new run from the weights of this checkpoint.
    backbone: Path | None = None  # Start the encoder from a torchvision state dict.
    seed: int = 0  # Seed of the weights, of MovingShapes, of the order of the data, and of the augmentations.
    workers: int = 8
    """Loader processes of each training process for the images, and as many again, at most 2, for the pairs; 0 loads in
    the training process."""

    epochs: int = 100  # (paper: 100)
    steps_per_epoch: int | None = None  # Default: one pass over the images (paper); see `make_plan`.
    max_steps: int | None = None  # Stop after this many steps in all; the schedules stay those of --epochs.
    flow_start_epoch: float = 10.0
    """Content trains alone until then (paper: 10). M-JEPA starts at once, and so do frozen and finetune with --init."""
    image_batch: int = 384  # Images per step over all processes (second-hand: 384).
    video_batch: int = 8  # Video pairs per step over all processes (ours: 8; second-hand: 2, perhaps per process).
    image_size: int = 224  # Side of the two views (field, VICReg: 224).
    smallest_crop: float = 0.08  # Share of an image's area that a view shows at least (field, VICReg: 0.08).
    crop: tuple[int, int] = (384, 832)  # Height and width of the video crops (field: 384 832; second-hand: 256 512).
    shapes_motion: tuple[float, float] = (0.08, 0.35)
    """The largest shift of a MovingShapes pair as a share of its shorter side, and the power of the uniform number that
    draws it: a lower one draws more large shifts (ours: 0.08 0.35)."""
    frame_strides: tuple[int, ...] = (1,)  # Distances in frames between the two of a pair from --video-dir.

    learning_rate: float = 3e-4  # Of the encoder and the expander (second-hand: 3e-4).
    estimator_learning_rate: float = 1e-4  # Of the flow estimator (ours: 1e-4; second-hand: 3e-4).
    weight_decay: float = 1e-6  # Of AdamW (second-hand: 1e-6).
    warmup_epochs: float = 10.0  # Linear warm-up of the learning rates, then a cosine to 0 (field, VICReg: 10).
    adam_beta2: float = 0.999  # Memory of AdamW's second moment (field, torch: 0.999).
    clip_gradient: float = 1.0  # Largest gradient norm of each part: encoder, estimator, expander (ours: 1; 0: any).
    regularisation_warmup_epochs: float = 1.0  # Epochs of flow over which Eq. 6 grows to its full weight (ours: 1).
    mask_warmup_epochs: float = 1.0  # Epochs of flow before occlusion masks (ours: 1; untrained flow masks everything).
    precision: Literal["auto", "float32"] = "auto"  # auto: bfloat16 autocast on a GPU that has it, else float32.
    compile: bool = False  # torch.compile: minutes of compiling at the start and where flow starts, then faster steps.

    log_every: int = 20  # Steps between two lines of metrics.
    checkpoint_every: int = 5000  # Steps between two checkpoints; one more after each epoch.
    bad_files: float = 0.01  # Share of the files that may be unusable: each is reported, and the next takes its place.
    validation_pairs: int = 20
    """Unseen MovingShapes pairs that flow is measured on after each epoch, and content on ten times as many images."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    repeats: RepeatsConfig = field(default_factory=RepeatsConfig)


FLOW_ALONE = ("frozen", "finetune")  # strategies in which flow is learned without content
MAY_DIFFER = (  # fields that may change when a run continues
    *("output_dir", "data_root", "video_dir", "image_dir", "backbone", "init"),  # data may move: its size is compared
    *("max_steps", "workers", "compile", "log_every", "checkpoint_every", "bad_files", "validation_pairs"),
)

PRESETS = {
    "paper": Config(),
    # Minutes instead of days: all of it ours, found by trial (experiments/README.md has the trials).
    "pocket": Config(
        output_dir=Path("runs/pocket"),
        workers=0,
        epochs=13,
        steps_per_epoch=100,
        flow_start_epoch=0.0,
        image_batch=32,
        video_batch=2,
        image_size=48,
        smallest_crop=0.25,
        crop=(192, 192),  # 2 pairs cost as much as 4 of 128 px, and give a lower error on Middlebury
        learning_rate=1e-3,
        estimator_learning_rate=2e-3,
        weight_decay=1e-4,
        warmup_epochs=0.5,
        mask_warmup_epochs=7.0,
        adam_beta2=0.99,
        clip_gradient=5.0,
        model=ModelConfig(encoder="resnet10_half", estimator_factor=0.5, expander=(1024, 1024, 1024)),
        loss=LossConfig(
            flow_balance=1.0,
            gradient_ratio=1.0,  # both tasks move the encoder; at a balance of 0.1 its gradient is all VICReg's
            smoothness=2.5,  # the paper's is for crops of hundreds of pixels and a flow that is nearly right
            smoothness_order=1,
            regression=0.1,  # Eqs. 2, 5 and 6 keep young features from telling pixels apart
            cycle=0.02,
            masked=("regression", "cycle", "reconstruction"),
            coarse_levels=1.0,  # each level learns from the images
            variance=(0.002,) * 6,
            covariance=(0.0001,) * 6,
        ),
    ),
}
# Hours on two cores, minutes on a GPU (with more --workers): the features too have time to be learned.
PRESETS["small"] = replace(
    PRESETS["pocket"],
    output_dir=Path("runs/small"),
    workers=2,
    epochs=120,
    flow_start_epoch=12.0,
    image_batch=128,
    crop=(256, 256),
    estimator_learning_rate=1e-3,
    warmup_epochs=5.0,
    mask_warmup_epochs=54.0,
    model=replace(PRESETS["pocket"].model, encoder="resnet10"),
    loss=replace(PRESETS["pocket"].loss, gradient_ratio=0.3),  # at 1 flow is better, and content worse
)


def parse(arguments: list[str]) -> Config:
    """The command line: a preset's name or a config.json, if it begins with one, then flags (tyro prints the help)."""
    default = PRESETS["paper"]
    if arguments and not arguments[0].startswith("-"):
        first, *arguments = arguments
        if first not in PRESETS and not first.endswith(".json"):
            raise ValueError(f"unknown preset {first!r}: choose {', '.join(PRESETS)}, or name a run's config.json")
        default = PRESETS[first] if first in PRESETS else checkpoint.read_config(Path(first), Config)
    return tyro.cli(Config, default=default, args=arguments, description=__doc__)


def check(config: Config) -> None:
    """Raises ValueError for a configuration that cannot run, before anything is written."""
    world, flow_alone, start = processes.world_size(), config.strategy in FLOW_ALONE, first_flow_epoch(config)
    images = 0 if config.task == "mjepa" else config.image_batch
    pairs = 0 if config.task == "vicreg" else config.video_batch
    trained = config.init or config.backbone or (config.output_dir / "checkpoint.pt").exists()
    one_task = config.task == "vicreg" or (config.task == "mjepa" and not flow_alone)
    counts = ("epochs", "steps_per_epoch", "max_steps", "log_every", "checkpoint_every", "validation_pairs")
    repeats = [f"repeats.{name}" for name in RepeatsConfig.__annotations__]
    check_numbers(config, (*counts, *repeats, "image_size", "crop", "frame_strides", "model.expander"))
    mistakes = {
        "--video-batch must be at least 1": config.task != "vicreg" and pairs < 1,
        "--image-batch must be at least 2, for VICReg's statistics": config.task != "mjepa" and images < 2,
        "--bad-files is a share of the files, from 0 to 1": not 0 <= config.bad_files <= 1,
        "--smallest-crop is a share of an image's area, up to 1": not 0 < config.smallest_crop <= 1,
        "--shapes-motion is a share of the side, up to 1, and a power above 0": config.shapes_motion[0] > 1
        or config.shapes_motion[1] == 0,
        "--output-dir lies in --video-dir or --image-dir, whose images it would add to: name another": any(
            folder and config.output_dir.resolve().is_relative_to(folder.resolve())
            for folder in (config.video_dir, config.image_dir)
        ),
        "--frame-strides needs --video-dir": config.frame_strides != (1,) and not config.video_dir,
        "--sets needs --data-root, and no --video-dir": config.sets and (not config.data_root or config.video_dir),
        f"--image-batch {images} must be a multiple of the {world} processes": images % world,
        f"--video-batch {pairs} must be a multiple of the {world} processes": pairs % world,
        f"--strategy {config.strategy} is for two tasks: use --task mcjepa": one_task and config.strategy != "combined",
        f"--strategy {config.strategy} needs a trained encoder: give --init, or learn content first, until "
        "--flow-start-epoch": flow_alone and start == 0 and not trained,
        f"--flow-start-epoch {config.flow_start_epoch:g} must be before the end, --epochs {config.epochs}": (
            config.task == "mcjepa" and start >= config.epochs
        ),
    }
    for message, wrong in mistakes.items():
        if wrong:
            raise ValueError(message)


# ------------------------------------------------------------------------------------------------- what is learned when


class Plan(NamedTuple):
    """What is learned at which step, counted from the beginning of a run."""

    task: str
    strategy: str
    per_epoch: int
    end: int  # the run ends before this step
    flow_start: int  # the flow task joins at this step
    regularisation_warmup: int  # Eq. 6 has its full weight after this many steps of flow
    mask_warmup: int  # occlusion masks are on after this many steps of flow

    def tasks(self, step: int) -> tuple[bool, bool]:
        """Whether a step learns flow, and whether content: the strategies of Table 5."""
        if self.task == "vicreg" or step < self.flow_start:
            return False, True
        if self.task == "mjepa" or self.strategy in FLOW_ALONE:
            return True, False
        if self.strategy == "combined":
            return True, True
        turn = step - self.flow_start
        flow = (turn if self.strategy == "alternate_batches" else turn // self.per_epoch) % 2 == 0
        return flow, not flow

    def taken(self, step: int) -> tuple[int, int]:
        """How many steps before this one learn flow, and how many content."""
        tasks = [self.tasks(earlier) for earlier in range(step)]
        return sum(flow for flow, _ in tasks), sum(content for _, content in tasks)


def first_flow_epoch(config: Config) -> float:
    """Where flow starts: --flow-start-epoch, but at once where content is not learned or comes from --init."""
    at_once = config.task == "mjepa" or (config.strategy in FLOW_ALONE and config.init)
    return 0.0 if at_once else config.flow_start_epoch


class Source(NamedTuple):
    """What a task learns from."""

    kind: str  # of its files: "frames" or "images"
    data: Dataset  # its `note` is printed at the start
    transform: Callable | None
    batch: int  # items of a step, in all processes


def make_plan(config: Config, videos: Source | None, images: Source | None) -> Plan:
    """The epochs of a configuration in steps.

    An epoch is one pass over the images; without any, over the pairs, but no longer than the paper's: 100 passes over
    MovingShapes, or over the paper's mix with its repeats, would be millions of steps.
    """
    source = images or videos
    one_pass = max(len(source.data) // source.batch, 1)
    if not images:
        one_pass = min(one_pass, IMAGENET_SIZE // PRESETS["paper"].image_batch)
    per_epoch = config.steps_per_epoch or one_pass
    flow_start = round(first_flow_epoch(config) * per_epoch)
    regularisation_warmup = max(round(config.regularisation_warmup_epochs * per_epoch), 1)
    mask_warmup = round(config.mask_warmup_epochs * per_epoch)
    end = min(config.epochs * per_epoch, config.max_steps or sys.maxsize)
    return Plan(config.task, config.strategy, per_epoch, end, flow_start, regularisation_warmup, mask_warmup)


def learning_rate_factor(config: Config, epoch: int | float) -> float:
    """A linear warm-up, then a cosine to 0 at the last epoch."""
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * done))


# -------------------------------------------------------------------------------------------------------- the data


def allowed_bad_files(config: Config, source: Source) -> int:
    """How many files of a source may be unusable."""
    return int(config.bad_files * getattr(source.data, "file_count", 0))


def batches(
    config: Config, source: Source | None, first: int, device: torch.device
) -> Iterator[tuple[Frames | Views, list[Report]]]:
    """This process's share of the batches of a task from its `first` step on, and the bad files met on the way."""
    stream = Stream(config.seed, processes.rank(), processes.world_size(), first)
    share, allowed = source.batch // stream.world_size, allowed_bad_files(config, source)
    workers = config.workers if source.kind == "images" else min(config.workers, 2)
    for pair, faults in make_loader(source.data, source.transform, share, stream, workers, allowed):
        # Bytes until they are on the GPU: a quarter of what loaders share and copy. Floats stay as they are.
        images = tuple(to_dtype(x.to(device, non_blocking=True), torch.float32, scale=True) for x in pair)
        yield images, [(source.kind, fault) for fault in faults]


def open_sources(config: Config) -> tuple[Source | None, Source | None]:
    """The video pairs, and the images in two views; None for a task that no step learns."""
    videos = images = None
    if config.task != "vicreg":
        if config.video_dir:
            data = VideoPairs(config.video_dir, config.frame_strides, FlowAugmentation(config.crop))
        elif config.data_root:
            data = open_mix(config.data_root, config.sets, config.repeats, FlowAugmentation(config.crop, enlarge=True))
        else:
            data = ShapePairs(IMAGENET_SIZE, config.crop, seed=config.seed, motion=config.shapes_motion)
        # No transform: real pairs are augmented by their data set, which can name the files in an error.
        videos = Source("frames", data, None, config.video_batch)
    if config.task != "mjepa" and not (config.strategy in FLOW_ALONE and first_flow_epoch(config) == 0):
        if config.image_dir:
            data = ImageFiles(config.image_dir)
        elif config.data_root:
            data = ImageNet(config.data_root)
        else:
            side = max(config.image_size, 128)  # small views would have to enlarge their crops
            data = ShapeImages(IMAGENET_SIZE, (side, side), seed=config.seed + 1)
        images = Source("images", data, TwoViews(config.image_size, config.smallest_crop), config.image_batch)
    return videos, images


# ----------------------------------------------------------------------------------------- the model and its checkpoint


def build(config: Config, device: torch.device) -> tuple[MCJEPA, torch.optim.Optimizer]:
    """The model, and AdamW with a group for each of its parts; the estimator has its own learning rate."""
    torch.manual_seed(config.seed)
    model = MCJEPA(config.model, config.loss, config.task, config.backbone).to(device)
    if device.type == "cuda":  # for its tensor cores; on a CPU the step takes as long
        put_channels_last(model)
    rates = {"estimator": config.estimator_learning_rate}
    groups = [
        {"name": name, "params": [*part.parameters()], "initial_lr": rates.get(name, config.learning_rate)}
        for name, part in model.named_children()
    ]
    betas = (0.9, config.adam_beta2)
    return model, torch.optim.AdamW(groups, betas=betas, weight_decay=config.weight_decay, fused=True)


def put_channels_last(model: nn.Module) -> None:
    """Lays out the weights of convolutions like their gradients: otherwise DDP copies these in each step, and warns."""
    for weight in model.parameters():
        if weight.ndim == 4 and weight.shape[2:].numel() > 1:  # for torch, both layouts of a 1 x 1 weight are one
            # Not `contiguous`, which leaves weights of depthwise convolutions as they are.
            weight.data = torch.empty_like(weight.data, memory_format=torch.channels_last).copy_(weight.data)


class Run(NamedTuple):
    """A run, at the step from which it starts or continues."""

    config: Config
    settings: dict  # the configuration and the size of the data: with other data the same seed makes another run
    plan: Plan
    device: torch.device
    videos: Source | None
    images: Source | None
    model: MCJEPA
    optimizer: torch.optim.Optimizer
    start: int
    best: float  # the lowest validation error so far
    faults: dict  # see `Faults.state`
    notes: list[str]  # printed at the start


def restore(config: Config, settings: dict, model: MCJEPA, optimizer: torch.optim.Optimizer) -> tuple[dict, list[str]]:
    """Loads the checkpoint in --output-dir, or the weights of --init; returns that checkpoint, or {}, and warnings."""
    state, warnings = checkpoint.newest_checkpoint(config.output_dir, load_checkpoint)
    if state:
        checkpoint.check_same_run(config.output_dir / "checkpoint.pt", state["config"], settings, MAY_DIFFER)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in optimizer.state.items():
            # The fused AdamW needs moments with their parameter's strides, which differ between a CPU and a GPU.
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
    elif config.init:
        missing = load_parts(model, config.init)
        warnings = [f"{config.init} has no {part}: it starts from random weights" for part in missing]
    return state or {}, warnings


def open_run(config: Config) -> Run:
    """Opens the data, builds the model, restores a checkpoint, and connects the processes."""
    device, (videos, images) = processes.own_device(), open_sources(config)
    sources = [source for source in (videos, images) if source]
    if images and len(images.data) < images.batch:
        raise ValueError(f"{len(images.data)} images, fewer than --image-batch {images.batch}: give more, or lower it")
    settings = checkpoint.as_json(config) | {f"number of {source.kind}": len(source.data) for source in sources}
    model, optimizer = build(config, device)
    state, warnings = restore(config, settings, model, optimizer)
    start, best, faults = state.get("step", 0), state.get("best", math.inf), state.get("faults", {})
    processes.connect(device)
    plan = make_plan(config, videos, images)
    learned = {name: value for name, value in checkpoint.flatten(settings).items() if name not in MAY_DIFFER}
    together = {"first step": start, "last step": plan.end, "bad_files": config.bad_files, "compile": config.compile}
    processes.check_same_everywhere(learned | together)
    if state and warnings and processes.rank() == 0:
        # All processes have read it by now (the check above waits for them). The next save would move this damaged
        # file over the good checkpoint.1.pt.
        path = config.output_dir / "checkpoint.pt"
        path.replace(path.with_name("damaged-checkpoint.pt"))
    notes = [*(source.data.note for source in sources), *warnings]
    notes += [f"{config.output_dir}: continuing after step {start} of {plan.end}"] if start else []
    if device.type == "cpu" and sum(parameter.numel() for parameter in model.parameters()) > 80_000_000:
        notes.append("no GPU here: a step of the paper's size takes about a minute; try `python train.py pocket`")
    return Run(config, settings, plan, device, videos, images, model, optimizer, start, best, faults, notes)


# --------------------------------------------------------------------------------------------------------- one step


def choose_parts(config: Config, model: MCJEPA, flow_started: bool) -> None:
    """Sets which parts of the model learn, before the flow start and after it."""
    flow_alone = flow_started and config.strategy in FLOW_ALONE
    if model.estimator is not None:
        model.estimator.requires_grad_(flow_started)
    if model.expander is not None:
        model.expander.requires_grad_(not flow_alone)
    model.freeze_encoder(flow_alone and config.strategy == "frozen")


def over_processes(config: Config, model: MCJEPA, device: torch.device) -> nn.Module:
    """The model as it is trained: in DDP if there are several processes, compiled with --compile."""
    module: nn.Module = model
    if dist.is_initialized():
        alternates = config.strategy.startswith("alternate")
        # Gradients are views of the buckets: otherwise they are stored twice.
        module = DistributedDataParallel(model, find_unused_parameters=alternates, gradient_as_bucket_view=True)
        # Batch norm's averages are alike, as its statistics are those of all processes.
        module.broadcast_buffers = False
    if not config.compile:
        return module
    if config.loss.gradient_ratio:  # its backward passes keep the graph, which donated buffers forbid
        from torch._functorch import config as compiler

        compiler.donated_buffer = False
    return torch.compile(module)


def gradient_ratio(model: MCJEPA, losses: Losses) -> Float[Tensor, ""]:
    """The norm of the gradient of the flow losses on the encoder over that of the content losses, of all processes."""
    norms, parameters = [], [*model.encoder.parameters()]
    for task in ("flow", "content"):
        gradients = torch.autograd.grad(losses.tasks[task], parameters, retain_graph=True, allow_unused=True)
        gradient = torch.cat([part.flatten() for part in gradients if part is not None])
        if dist.is_initialized():  # DDP takes the mean, which has the same ratio as the sum
            dist.all_reduce(gradient)
        norms.append(gradient.norm())
    return norms[0] / norms[1]


def take_step(
    run: Run, module: nn.Module, step: int, flow_steps: int, batch: Batch, reports: list[Report]
) -> tuple[dict[str, Float[Tensor, ""]], list[Report]]:
    """Forward, backward, clipping and update, with the schedules of this step.

    `module` is the model as `over_processes` gives it, `flow_steps` how many steps before this one have learned flow,
    `reports` those of this process. Returns the numbers of the step by name, and the reports of all processes. If these
    say that something is not finite, the step is skipped in all of them: no numbers, and weights and buffers are as
    they were.
    """
    config, plan, optimizer = run.config, run.plan, run.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_factor(config, (step + 1) / plan.per_epoch) * group["initial_lr"]
    on_gpu = run.device.type == "cuda"
    bfloat16 = config.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    growth = min((flow_steps + 1) / plan.regularisation_warmup, 1.0)  # of Eq. 6
    warmups = {"masks": torch.full((), flow_steps >= plan.mask_warmup), "regularisation": torch.full((), growth)}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]  # a NaN would stay in a batch norm's averages
    with torch.autocast(run.device.type, torch.bfloat16, enabled=bfloat16):
        losses: Losses = module(video=batch[0], views=batch[1], **warmups)
    rebalance = config.loss.gradient_ratio and len(losses.tasks) == 2 and flow_steps % 10 == 0  # costs two backwards
    ratio = gradient_ratio(run.model, losses) if rebalance else None
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    norms = {
        f"gradient_norm/{group['name']}": clip_grad_norm_(group["params"], config.clip_gradient or math.inf)
        for group in optimizer.param_groups
        if any(parameter.grad is not None for parameter in group["params"])
    }
    numbers = {f"loss/{name}": value for name, value in losses.unweighted.items()} | norms
    if not torch.stack([losses.total.detach(), *norms.values()]).isfinite().all():  # waits for the GPU once
        names = [name for name, value in numbers.items() if not math.isfinite(value)]
        reports = [*reports, *(("not finite", name) for name in names or ["total"])]
    reports = processes.from_all(reports)
    if any(kind == "not finite" for kind, _ in reports):
        for buffer, before in buffers:
            buffer.copy_(before)
        return {}, reports
    optimizer.step()
    if rebalance:
        balance = run.model.flow_balance
        numbers |= {"gradient_ratio": ratio, "flow_balance": balance.clone()}
        # The first move goes all the way, later ones a fifth of it, so that no single batch upsets the balance (ours).
        largest, rate = (10, 0.2) if flow_steps else (1000, 1.0)
        # Frames without motion or texture may have no gradient: they must not end the run.
        factor = (config.loss.gradient_ratio / ratio).nan_to_num(1.0, posinf=1.0).clamp(0.01, largest)
        balance.lerp_(balance * factor, rate)
    numbers |= {f"weighted/{name}": value for name, value in losses.weighted.items()} | losses.monitor
    return numbers, reports


# ----------------------------------------------------------------------------------------------------------- the run


def pairs_to_draw(config: Config, videos: Source) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Three pairs, (image_1, image_2, true flow or None): unseen MovingShapes, or pairs of the run's own videos."""
    if config.video_dir is None and config.data_root is None:
        pairs = [shapes_pair(index, config.crop) for index in range(3)]
        return [(pair.image_1[0], pair.image_2[0], pair.flow[0]) for pair in pairs]
    readable = SkipBadFiles(videos.data, videos.transform, config.seed, allowed_bad_files(config, videos))
    # (position, index): the position is the seed of the crop, so that every epoch draws the same ones.
    return [(*(frame / 255 for frame in readable[(i, i * len(videos.data) // 3)][0]), None) for i in range(3)]


@lru_cache(maxsize=1)
def views_of_random_weights(device: torch.device, config: ModelConfig, *options: int | float) -> float:
    """What `find_views` finds with an encoder that has learned nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = MCJEPA(replace(config, expander=(1,)), task="vicreg")
    return find_views(model.to(device), *options)


def validate(run: Run, log: Log, step: int, flow_started: bool) -> float:
    """Measures content, and flow once it has started, on unseen MovingShapes, and draws the flow of three pairs.

    Returns the end-point error, infinite before the flow's start.
    """
    config, model, epoch = run.config, run.model.eval(), math.ceil(step / run.plan.per_epoch)
    numbers, said = {"epe": math.inf}, []
    if flow_started:
        numbers = flow_errors_on_shapes(model, config.validation_pairs, config.crop)
        measured = f"end-point error {numbers['epe']:.2f} px on {config.validation_pairs} unseen MovingShapes pairs"
        said.append(f"{measured} (zero flow {numbers['epe_zero']:.2f})")
        figures = []
        for image_1, image_2, truth in pairs_to_draw(config, run.videos):
            flow = model.estimate_flow(*(image[None].to(run.device) for image in (image_1, image_2)))
            figures.append(flow_figure(image_1, image_2, flow[0].cpu(), truth))
        log.picture(f"epoch_{epoch:03d}", step, torch.cat(figures, dim=1))
    elif run.videos:
        said.append(f"flow starts in epoch {run.plan.flow_start // run.plan.per_epoch + 1}")
    options = 10 * config.validation_pairs, config.image_size, config.smallest_crop
    found, untrained = find_views(model, *options), views_of_random_weights(run.device, config.model, *options)
    said.append(f"{found:.1%} of {options[0]} unseen images find their other view (random weights {untrained:.1%})")
    log.say(f"epoch {epoch}: {'; '.join(said)}")
    error, content = numbers["epe"], {"views": found, "views_random": untrained}
    log.write(step, {f"validation/{name}": x for name, x in (numbers | content).items() if math.isfinite(x)})
    model.train()
    return error


def save(run: Run, step: int, best: float, improved: bool, faults: Faults) -> None:
    """Writes checkpoint.pt, all that `open_run` and `mcjepa.load_model` need; at the end model.safetensors first."""
    if step == run.plan.end:
        with checkpoint.replacing(run.config.output_dir / "model.safetensors") as path:
            save_weights(run.model, path, run.settings, step)
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "step": step, "best": best}
    state |= {"config": run.settings, "faults": faults.state()}
    checkpoint.save_checkpoint(run.config.output_dir / "checkpoint.pt", state, improved)


def summary(run: Run, step: int, numbers: dict[str, Float[Tensor, ""]], faults: Faults) -> dict[str, float]:
    """A line of metrics.jsonl; waits for the GPU."""
    line = {"epoch": step / run.plan.per_epoch, "time": time.time()}
    line |= {f"learning_rate/{group['name']}": group["lr"] for group in run.optimizer.param_groups}
    line |= dict(zip(numbers, torch.stack([*numbers.values()]).tolist(), strict=True))
    line["total"] = sum(value for name, value in line.items() if name.startswith("weighted/"))
    return line | {"skipped_steps": faults.skipped, "bad_files": sum(map(len, faults.bad_files.values()))}


def train(config: Config) -> None:
    """One run, from the data to the last checkpoint; it continues from the checkpoint in --output-dir."""
    check(config)
    run = open_run(config)
    plan, start, best, main = run.plan, run.start, run.best, processes.rank() == 0
    if start >= plan.end:
        if main:
            print(f"{config.output_dir}: this run is done, at step {start} of {plan.end}")
        return
    if main and run.notes:
        print(*run.notes, sep="\n", flush=True)
    flow_steps, content_steps = plan.taken(start)
    # Generators: nothing is loaded before the first step of a task, nor for a task that no step learns.
    video_batches = batches(config, run.videos, flow_steps, run.device)
    image_batches = batches(config, run.images, content_steps, run.device)
    with closing(Log(config.output_dir, start, plan.end, main)) as log, processes.stop_signals() as signals:
        if main:
            checkpoint.write_json(config.output_dir / "config.json", checkpoint.as_json(config))
            checkpoint.write_json(config.output_dir / "environment.json", environment(run.device))
        allowed = {source.kind: allowed_bad_files(config, source) for source in (run.videos, run.images) if source}
        faults = Faults(log, allowed, run.faults)
        numbers = {}
        for step in range(start, plan.end):
            if step in (start, plan.flow_start):  # DDP reduces the parameters that learn when it is built
                choose_parts(config, run.model, flow_started=step >= plan.flow_start)
                module = over_processes(config, run.model, run.device)
            learn_flow, learn_content = plan.tasks(step)
            video, bad_frames = next(video_batches) if learn_flow else (None, [])
            views, bad_images = next(image_batches) if learn_content else (None, [])
            reports = [*bad_frames, *bad_images, *(("signal", name) for name in signals)]
            measured, reports = take_step(run, module, step, flow_steps, (video, views), reports)
            done = step + 1
            flow_steps += learn_flow
            faults.step(done, reports)

            numbers |= measured  # where the tasks alternate, a line has the newest step of each
            log.advance()
            if numbers and (done % config.log_every == 0 or done == plan.end):
                line, numbers = summary(run, done, numbers, faults), {}
                log.write(done, line)
                log.advance(0, f"loss {line['total']:.3f}")
            epoch_ends = done % plan.per_epoch == 0 or done == plan.end
            stop = [name for kind, name in reports if kind == "signal"]
            error = validate(run, log, done, flow_started=flow_steps > 0) if main and epoch_ends else math.inf
            improved, best = error < best, min(best, error)
            if main and (epoch_ends or stop or done % config.checkpoint_every == 0):
                save(run, done, best, improved, faults)
            if stop:
                log.say(f"stopped by {stop[0]} after step {done} of {plan.end}: the same command continues")
                break
    if dist.is_initialized():
        dist.destroy_process_group()
    if main and done == plan.end:
        command = ["python", "evaluate.py", "flow" if run.videos else "segmentation"]
        command += ["--model", str(config.output_dir / "checkpoint.pt")]
        if config.video_dir and run.videos:  # the first of its own clips
            command += ["--video", str(next(clip.path for clip in run.videos.data.clips if not clip.fault))]
        print(f"done. Measure it: {shlex.join(command)}")


if __name__ == "__main__":
    run_command(lambda: train(parse(sys.argv[1:])))
