"""Train MC-JEPA: optical flow from video (M-JEPA) and content features from images (VICReg), both without labels.

    python train.py pocket                                             # 2 CPU cores, minutes, embedded data
    torchrun --nproc_per_node=8 train.py --flow-start-epoch 10         # the paper's recipe
    torchrun --nproc_per_node=8 train.py --video-dir VIDEOS --image-dir IMAGES
    torchrun --nproc_per_node=8 train.py --data-root DATA              # the paper's data sets, in one folder
    python train.py --data-root DATA --show-data                       # what of them is there, and their mix
    python train.py pocket --task mjepa --video-dir MY_CLIP            # flow only, on one's own clip
    python train.py pocket --resume                                    # go on where the run stopped
    python train.py runs/pocket/config.json --output-dir runs/again    # the same run once more

The first word may name a preset (paper, pocket) or the config.json of a run; every flag overrides it. A run writes into
--output-dir: checkpoint.pt (checkpoint.1.pt and so on are older), best.pt, config.json, environment.json,
metrics.jsonl, tensorboard/ and pictures/. SIGTERM, SIGUSR1 and Ctrl-C end it after a step, with a checkpoint.
"""

import json
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset

from data import (
    FlowAugmentation,
    FramePairs,
    ImageFiles,
    Stream,
    TwoViews,
    VideoPairs,
    make_loader,
    natural_key,
)
from data import (
    SkipBadFiles as Forgiving,
)
from data import (
    too_many_bad_files as too_many,
)
from engine.checkpoint import as_json, keep_copy, save_checkpoint
from engine.faults import one_line
from engine.log import Log, environment, torchrun_job
from evaluate import UNSEEN_SEED, evaluate_flow_on_shapes, flow_figure, shapes_pairs
from mcjepa import MCJEPA, LossConfig, Losses, ModelConfig, load_checkpoint
from sources.moving_shapes import ShapeImages, ShapePairs
from sources.training_sets import VIDEO_SETS, ImageNet, Mix, find_video_set
from sources.training_sets import VideoClips as Found

IMAGENET_SIZE = 1_281_167
"""An epoch of the embedded data is as long as the paper's: one pass over ImageNet."""
HARMLESS = (
    "output_dir", "resume", "init", "max_steps", "workers", "log_every", "checkpoint_every", "validation_pairs",
    "show_data", "compile", "keep_checkpoints", "bad_files", "max_bad_steps", "collapse_below",
)  # fmt: skip
"""Fields of `Config` that may differ when a run is resumed."""
PLACES = ("data_root", "video_dir", "image_dir", "backbone")
"""Fields of `Config` that name where data lie."""
FAULTS_OF_MACHINES = {
    "out of memory|can't allocate memory": "out of memory: make --image-batch or --video-batch smaller",
    r"working (C\+\+ compiler|triton)|Failed to find C compiler": "--compile finds no compiler: install g++, on a GPU "
    "triton too, or leave it out",
    r"DataLoader worker \(pid": "a process that loads data was ended, perhaps for want of memory: take fewer --workers",
    "(?i)gloo|nccl|connection (closed|reset)": "another process of the run has ended; what it said stands above, or on "
    "another machine",
}
"""What torch's RuntimeErrors say where no code is to blame, and what to do."""
Pair = tuple[Float[Tensor, "n 3 h w"], Float[Tensor, "n 3 h w"]]
"""A batch of video pairs, or of two views."""


@dataclass(frozen=True)
class SetConfig:
    """How a data set of video takes part in the mix."""

    repeats: int = 1
    """How often a pass over the mix goes through it."""
    crop: tuple[int, int] | None = None
    """Height and width of what is cut from its frames, and then brought to --crop. None: as much as --crop; of a
    smaller frame the largest window of that shape."""


@dataclass(frozen=True)
class MixConfig:
    """The data sets of --data-root. Repeats: 100 and 1 of KITTI second-hand; the others ours, to balance the sizes."""

    kitti_raw: SetConfig = SetConfig(1)
    kitti2012: SetConfig = SetConfig(100)
    """Multiview extension, without frames 9 to 12."""
    kitti2015: SetConfig = SetConfig(100)
    """Multiview extension, without frames 9 to 12."""
    sintel_clean: SetConfig = SetConfig(100)
    sintel_final: SetConfig = SetConfig(100)
    sintel_raw: SetConfig = SetConfig(10)
    """The film, as folders of frames or as a video file."""
    chairs: SetConfig = SetConfig(5)
    things_clean: SetConfig = SetConfig(2)
    things_final: SetConfig = SetConfig(2)
    hd1k: SetConfig = SetConfig(100)


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. The label in brackets tells where a default comes from."""

    task: Literal["mcjepa", "mjepa", "vicreg"] = "mcjepa"
    """Both tasks, flow only (M-JEPA), or content only (VICReg)."""
    strategy: Literal["combined", "alternate_batches", "alternate_epochs", "frozen", "finetune"] = "combined"
    """How the two tasks share the steps from the flow start on (paper, Table 5): both in each; by turns; or flow only,
    with the encoder frozen or not, from a checkpoint (--init) or from the epochs of content before."""
    data_root: Path | None = None
    """The folder in which the paper's data sets lie, in their native layouts: video (see --sets), and ImageNet."""
    sets: tuple[str, ...] = ()
    """Which of the data sets of video: names, or what names begin with: kitti, sintel, chairs, things, hd1k. None
    named: all that are there."""
    show_data: bool = False
    """Only print what --data-root holds, and the mix."""
    video_dir: Path | None = None
    """A folder tree of clips (folders of frames, video files), or one video file, in place of the data sets of video;
    without either MovingShapes."""
    image_dir: Path | None = None
    """A folder tree of images in place of ImageNet; without either single frames of MovingShapes."""
    output_dir: Path = Path("runs/paper")
    """Everything that the run writes."""
    resume: Path | None = None
    """Go on from this checkpoint, exactly; `--resume` alone: from that of --output-dir."""
    init: Path | None = None
    """Start a new run from the weights of this checkpoint."""
    backbone: Path | None = None
    """Start the encoder from a torchvision state dict."""
    seed: int = 0
    """Of the weights, the order of the data and the augmentations."""
    workers: int = 8
    """Loader processes per task and process; 0: load in the training process."""

    epochs: int = 100
    """(paper)"""
    steps_per_epoch: int | None = None
    """None: one pass over the images (paper); for flow only, over the video pairs."""
    max_steps: int | None = None
    """Stop after so many steps in all; the schedules stay those of --epochs."""
    flow_start_epoch: float = 10.0
    """The content task trains alone until then (paper). Flow only starts at once; so do the strategies frozen and
    finetune from --init, unless this is given."""
    image_batch: int = 384
    """Images per step over all processes (second-hand)."""
    video_batch: int = 8
    """Video pairs per step over all processes (second-hand)."""
    image_size: int = 224
    """Side of the two views (paper)."""
    crop: tuple[int, int] = (384, 832)
    """Height and width of the video crops (field)."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Range of a random resizing of the frames before the crop."""
    frame_strides: tuple[int, ...] = (1,)
    """Distances in frames between the two of a pair (of --video-dir)."""

    learning_rate: float = 3e-4
    """Of encoder and expander (second-hand)."""
    estimator_learning_rate: float = 1e-4
    """(second-hand)"""
    weight_decay: float = 1e-6
    """AdamW's (second-hand)."""
    warmup_epochs: float = 10.0
    """Linear warm-up of the learning rates, then a cosine to 0 (field: VICReg)."""
    adam_beta2: float = 0.999
    """Memory of AdamW's second moment (field: torch's default)."""
    clip_gradient: float = 1.0
    """Largest norm of the gradient of each part: encoder, estimator, expander (field). One norm over all of them would
    let the loudest part silence the others."""
    regularisation_warmup_epochs: float = 1.0
    """Eq. 6 grows linearly for so long from the flow start (second-hand)."""
    mask_warmup_epochs: float = 1.0
    """Occlusion masks are on from so long after the flow start (field: untrained flows mask everything)."""
    precision: Literal["auto", "float32"] = "auto"
    """auto: bfloat16 autocast on a GPU that has it, else float32. (On a CPU bfloat16 saved no time and gave NaN.)"""

    compile: bool = False
    """torch.compile: some minutes at the start and where the tasks change, then faster steps."""

    log_every: int = 20
    """Steps between two lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; one more after each epoch."""
    keep_checkpoints: int = 3
    """The newest so many stay: checkpoint.pt, checkpoint.1.pt, ... Beside them best.pt, by the lowest validation error,
    or, without validation, by the lowest mean loss of an epoch."""
    bad_files: float = 0.01
    """Up to this share of the files may be unusable: each is told once, and the next takes its place. 0: none may."""
    max_bad_steps: int = 10
    """Steps whose loss or gradient is not finite are skipped; so many in a row end the run."""
    collapse_below: float = 0.01
    """A deviation of a level's features, or of the embeddings, below this is told as a warning."""
    validation_pairs: int = 20
    """Unseen MovingShapes pairs that the flow is measured on after each epoch of training on MovingShapes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mix: MixConfig = field(default_factory=MixConfig)


PRESETS = {
    "paper": Config(),
    "pocket": Config(
        output_dir=Path("runs/pocket"),
        workers=0,
        epochs=11,
        steps_per_epoch=100,
        flow_start_epoch=0.0,
        image_batch=16,
        video_batch=2,
        image_size=64,
        crop=(192, 192),  # 2 pairs cost what 4 of 128 px do. Flow alone, 300 steps: 2.03 px on Middlebury, there 2.30
        learning_rate=2e-3,
        estimator_learning_rate=2e-3,
        warmup_epochs=0.3,
        mask_warmup_epochs=6.0,
        adam_beta2=0.99,  # flow alone, 250 steps: error 0.41 of zero flow's at 0.999, 0.38 at 0.99
        model=ModelConfig(encoder="pwc", estimator_factor=0.5, expander=(256, 256, 64)),
        # For minutes instead of days. All of it ours, found by trial on two cores.
        loss=LossConfig(
            # Both tasks move the encoder: at 0.1 VICReg's gradient is all of it, at 40 five times that of Eq. 3. Error
            # after 300 steps at 128 px: 1.44 px at 40, 1.36 at 200, flow alone 1.31 (zero flow 3.96).
            flow_balance=200.0,
            # 75 is for crops of hundreds of pixels and a flow that is nearly right.
            smoothness=2.5,
            # Eqs. 2, 5 and 6 keep so young features from telling pixels apart. Flow alone, 450 steps: error 0.274 of
            # zero flow's without them, 0.296 with ten times these.
            regression=0.005,
            cycle=0.0025,
            # Each level learns from the images. Error after 5 epochs: 1.75 px; with a quarter of their l1 only, 2.57.
            coarse_levels=1.0,
            variance=(0.002,) * 6,
            covariance=(0.0001,) * 6,
            # While the views agree little, the invariance presses the embeddings flat. So does the covariance: for 16
            # images in 64 dimensions it is mostly noise. At 10 and 1 they end at a deviation of 0.53.
            vicreg_invariance=5.0,
            vicreg_covariance=0.25,
        ),
    ),
}


def read_config(arguments: list[str]) -> Config:
    """The command line: a preset's name or a config.json, if it begins with one, then flags (tyro prints the help)."""
    default, from_file = PRESETS["paper"], bool(arguments) and arguments[0].endswith(".json")
    if arguments and not arguments[0].startswith("-"):
        first, *arguments = arguments
        if first not in PRESETS and not first.endswith(".json"):
            raise ValueError(
                f"unknown preset {first!r}: choose one of {', '.join(PRESETS)}, or a config.json, or begin with a flag"
            )
        default = PRESETS[first] if first in PRESETS else read_config_file(Path(first))
    # `--resume` without a value: tyro has no flag whose value may be left out.
    for place, word in enumerate(arguments):
        if word == "--resume" and (place + 1 == len(arguments) or arguments[place + 1].startswith("--")):
            arguments = [*arguments[: place + 1], "auto", *arguments[place + 1 :]]
    config = tyro.cli(Config, default=default, args=arguments, description=__doc__)
    if config.resume == Path("auto") or began_before(config.output_dir):
        config = replace(config, resume=config.output_dir / "checkpoint.pt")
    flow_start_given = from_file or any(re.match("--flow.start.epoch", word) for word in arguments)
    if config.strategy in ("frozen", "finetune") and config.init and not flow_start_given:
        config = replace(config, flow_start_epoch=0.0)
    return config


def read_config_file(path: Path) -> Config:
    """The configuration of a run, from the config.json beside its checkpoint. ValueError for what is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        leaves = flat(json.loads(path.read_text()))
        del leaves["resume"]  # it begins anew
        unknown = leaves.keys() - flat(as_json(Config())).keys()
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: this version does not know them")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not the config.json of a run ({one_line(error)})") from error
    words = []
    for name, value in leaves.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else re.sub(r"([^.-][^.]*)$", r"no-\1", flag))
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return tyro.cli(Config, default=PRESETS["paper"], args=words)


def began_before(folder: Path) -> bool:
    """Whether this is a further start of the job that has begun the run in a folder.

    After a process has died, torchrun gives the same command again (--max-restarts). It counts these starts, but on
    each machine apart, and tells those where no process has died of none.
    """
    job, record = torchrun_job(), folder / "environment.json"
    if job is None or not record.is_file() or not checkpoints(folder):
        return False
    try:
        return json.loads(record.read_text()).get("job") == job
    except (ValueError, AttributeError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    older = sorted(folder.glob("checkpoint.*.pt"), key=natural_key)
    return [path for path in (folder / "checkpoint.pt", *older) if path.exists()]


def check(config: Config, world: int) -> None:
    """Raises ValueError, in one line, for a configuration that cannot run, before anything is written."""
    batches = {"image": config.image_batch} if config.task != "mjepa" else {}
    batches |= {"video": config.video_batch} if config.task != "vicreg" else {}
    counts = ("epochs", "steps_per_epoch", "max_steps", "log_every", "checkpoint_every", "keep_checkpoints")
    for name in (*counts, "max_bad_steps", "image_size", "crop"):
        value = getattr(config, name)
        if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if min(batches.values()) < 1 or min(config.workers, config.validation_pairs) < 0:
        raise ValueError("batches must be at least 1, --workers and --validation-pairs at least 0")
    for name, batch in batches.items():
        if batch % world:
            raise ValueError(f"--{name}-batch {batch} cannot be spread over {world} processes: take a multiple")
    if batches.get("image", 2) < 2:
        raise ValueError("--image-batch must be at least 2: VICReg's terms are statistics over images")
    if not 0 <= config.bad_files <= 1:
        raise ValueError("--bad-files is a share of the files: 0 to 1")
    if not 0 < config.crop_scale[0] <= config.crop_scale[1]:
        raise ValueError("--crop-scale takes the smaller factor first, both above 0")
    if config.sets and (config.data_root is None or config.video_dir):
        raise ValueError("--sets chooses among the videos of --data-root: give that, and no --video-dir")
    if config.frame_strides != (1,) and config.video_dir is None:
        raise ValueError("--frame-strides is about the clips of --video-dir: give that too")
    if config.strategy != "combined" and config.task == "vicreg":
        raise ValueError(f"--strategy {config.strategy} is about flow: it cannot go with --task vicreg")
    if config.strategy.startswith("alternate") and config.task == "mjepa":
        raise ValueError(f"--strategy {config.strategy} needs both tasks: it cannot go with --task mjepa")
    begins_with = config.init or config.backbone or config.resume
    flow_at_once = config.task == "mjepa" or config.flow_start_epoch == 0
    if config.strategy in ("frozen", "finetune") and flow_at_once and not begins_with:
        raise ValueError(
            f"--strategy {config.strategy} needs a trained encoder: give a checkpoint with --init, or learn content "
            "first, until --flow-start-epoch"
        )
    if config.task == "mcjepa" and config.flow_start_epoch >= config.epochs:
        raise ValueError(
            f"--flow-start-epoch {config.flow_start_epoch:g} is not before the end at --epochs {config.epochs}: "
            "start earlier, or take --task vicreg"
        )
    here = [path.resolve() for path in checkpoints(config.output_dir)]
    if here and config.resume is None:
        raise ValueError(f"{config.output_dir} already holds a run: go on with --resume, or give another --output-dir")
    if here and config.resume.resolve() not in (config.output_dir.resolve() / "checkpoint.pt", *here):
        raise ValueError(f"{config.output_dir} already holds a run; from {config.resume} on, give another --output-dir")


def learns_content(config: Config) -> bool:
    """Whether any step does: not for flow only, nor with an encoder from a checkpoint that flow alone goes on with."""
    flow_alone = config.strategy in ("frozen", "finetune") and config.flow_start_epoch == 0
    return config.task != "mjepa" and not flow_alone


def chosen_sets(config: Config) -> list[str]:
    """The names that --sets stands for. ValueError for one that fits no data set."""
    for wanted in config.sets:
        if not any(name.startswith(wanted) for name in VIDEO_SETS):
            raise ValueError(f"--sets {wanted}: no such data set; choose of {', '.join(VIDEO_SETS)}")
    return [name for name in VIDEO_SETS if not config.sets or name.startswith(config.sets)]


def open_mix(config: Config) -> tuple[Mix, dict[str, Found | None]]:
    """The data sets of video that lie in --data-root as one, and what was found by name.

    Raises:
        FileNotFoundError: no such folder, or a data set that --sets names in full is not there.
        ValueError: a data set is damaged, or its repeats or crop make no sense.
    """
    for name, part in asdict(config.mix).items():
        if part["repeats"] < 1 or min(part["crop"] or (1, 1)) < 1:
            raise ValueError(f"--mix.{name.replace('_', '-')}: repeats and crop must be at least 1")
    found = {name: find_video_set(name, config.data_root) for name in chosen_sets(config)}
    for name, place in found.items():
        if place is None and name in config.sets:
            raise FileNotFoundError(f"{config.data_root}: it does not hold {how_to_get(name)}")
    parts, repeats = {}, {}
    for name, place in found.items():
        if place:
            settings = getattr(config.mix, name)
            augmentation = FlowAugmentation(config.crop, enlarge=True)
            parts[name] = FramePairs(place.clips, transform=augmentation)
            repeats[name] = settings.repeats
    return Mix(parts, repeats), found


def how_to_get(name: str) -> str:
    """Where a data set of video is to be had, and how it must lie."""
    wanted = VIDEO_SETS[name]
    return f"{name} ({wanted.title}): get it at {wanted.url}, unpack it to ANY_FOLDER/{wanted.example}"


def show_mix(mix: Mix, found: dict[str, Found | None]) -> str:
    """A table of the data sets in the mix, what is missing, and the gaps in their numbering."""
    lines = [f"{'set':13} {'clips':>7} {'pairs':>9} {'repeats':>8} {'share':>7}  path"]
    for name, part in mix.parts.items():
        share = mix.lengths[name] / len(mix)
        clips, path = len(found[name].clips), found[name].path
        lines.append(f"{name:13} {clips:7,} {len(part):9,} {mix.repeats[name]:8} {share:7.2%}  {path}")
    notes = [note for place in found.values() if place for note in place.notes]
    lines += [f"note: {note}" for note in notes[:5]]
    if len(notes) > 5:
        lines.append(f"note: {len(notes) - 5} more gaps like these")
    return "\n".join(lines)


def show_data(config: Config) -> None:
    """Prints what --data-root holds: a line for each set in the mix, for the images, and for what is missing."""
    mix, found = open_mix(config)
    print(show_mix(mix, found))
    try:
        images = ImageNet(config.data_root)
        print(f"imagenet: {len(images):,} images in {len(images.classes):,} classes  {images.root}")
    except FileNotFoundError as error:
        print(f"missing: {error}")
    for name, place in found.items():
        if place is None:
            print(f"missing: {how_to_get(name)}")


def open_videos(config: Config, main: bool) -> tuple[Dataset, object]:
    """The video pairs and their transform; `main` prints the mix, if they lie in --data-root."""
    if config.video_dir:
        augmentation = FlowAugmentation(config.crop)
        return VideoPairs(config.video_dir, config.frame_strides, augmentation), None
    if config.data_root:
        mix, found = open_mix(config)
        if not mix.parts:
            raise FileNotFoundError(
                f"{config.data_root}: none of {', '.join(found)} is in it; --show-data tells how they must lie"
            )
        if main:
            print(show_mix(mix, found))
        return mix, None
    return ShapePairs(IMAGENET_SIZE, config.crop, seed=config.seed), as_floats


def open_images(config: Config) -> tuple[Dataset, object]:
    """The images and their transform."""
    if config.image_dir:
        images = ImageFiles(config.image_dir)
    elif config.data_root:
        try:
            images = ImageNet(config.data_root)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; or name images with --image-dir, or learn --task mjepa") from error
    else:
        images = ShapeImages(IMAGENET_SIZE, (config.image_size, config.image_size), seed=config.seed + 1)
    return images, TwoViews(config.image_size)


def as_floats(*images: Tensor) -> tuple[Tensor, ...]:
    """uint8 images to [0, 1], for MovingShapes, whose pairs vary enough without augmentation."""
    return tuple(image.float() / 255 for image in images)


def schedule(config: Config, epoch: float) -> float:
    """The factor of the learning rates: a linear warm-up, then a cosine to 0 at the last epoch."""
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def random_states() -> dict:
    """The generators of torch, Python and NumPy, in types that `weights_only=True` can read."""
    kind, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}


def restore_random_states(states: dict) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))


def load_parts(model: MCJEPA, path: Path) -> str:
    """`--init`: the weights of every part that checkpoint and model have in common (a task may lack one).

    Returns a sentence that says so.
    """
    state = load_checkpoint(path)["model"]
    parts = {key.split(".")[0] for key in model.state_dict()}
    try:
        missing = model.load_state_dict({k: v for k, v in state.items() if k.split(".")[0] in parts}, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"--init {path}: another configuration of the model ({reason})") from error
    absent = {key.split(".")[0] for key in missing.missing_keys}
    if missing.unexpected_keys or absent & {key.split(".")[0] for key in state}:
        raise ValueError(f"--init {path}: another configuration of the model (encoder or sizes differ)")
    return f"weights from {path}" + (f"; it has no {' and no '.join(sorted(absent))}: starts anew" if absent else "")


def newest_checkpoint(path: Path) -> tuple[dict, dict[Path, str]]:
    """A checkpoint, or where it is broken or missing the one before; and what is to be told of each passed over.

    Raises:
        FileNotFoundError, ValueError: there is none that can be read.
    """
    passed: dict[Path, str] = {}
    for candidate in dict.fromkeys((path, *checkpoints(path.parent))) if path.name == "checkpoint.pt" else (path,):
        try:
            checkpoint = load_checkpoint(candidate)
        except (FileNotFoundError, ValueError) as error:
            passed[candidate] = str(error)
            continue
        return checkpoint, {each: f"{told}. Going on from {candidate.name}" for each, told in passed.items()}
    raise (ValueError if path.exists() else FileNotFoundError)(f"--resume: {'; '.join(passed.values())}")


def resume(config: Config, model: MCJEPA, optimizer: torch.optim.Optimizer) -> tuple[dict, dict[Path, str]]:
    """`--resume`: model, optimizer and random states as they were.

    Returns the checkpoint, and what is to be told about others that are broken.
    """
    checkpoint, passed = newest_checkpoint(config.resume)
    if not {"optimizer", "random"} <= checkpoint.keys():
        raise ValueError(f"--resume {config.resume}: holds weights only; start a new run from them with --init")
    # A field that the checkpoint does not know yet had its default.
    old, new = flat(as_json(Config())) | flat(checkpoint["config"]), flat(as_json(config))
    for settings in (old, new):  # another spelling of the same place is no difference
        settings |= {k: str(Path(settings[k]).resolve()) for k in PLACES if settings.get(k)}
    differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in HARMLESS]
    if differing:
        fields = "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} here" for k in differing)
        raise ValueError(f"--resume {config.resume}: another configuration ({fields}); for a new run from it, --init")
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, state in optimizer.state.items():  # torch does not compare their sizes
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != parameter.shape:
                    raise ValueError("the optimizer's state has other sizes")
                # Nor their strides, which the fused AdamW takes for the parameter's: channels_last on a GPU only.
                state[name] = torch.empty_like(parameter).copy_(state[name])
        restore_random_states(checkpoint["random"])
        checkpoint["watch"] = dict(checkpoint.get("watch", {}))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        reason = one_line(error)[:300]
        raise ValueError(
            f"--resume {config.resume}: what it holds does not fit its configuration ({reason})"
        ) from error
    return checkpoint, passed


def flat(tree: dict, prefix: str = "") -> dict:
    """A tree of dictionaries as one, whose keys are the paths: {"mix.chairs.repeats": 5}."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


class Plan(NamedTuple):
    """What is learned at which step, counted from the beginning of a run."""

    task: str
    strategy: str
    per_epoch: int
    last: int
    """The run ends before this step."""
    flow_start: int
    """The flow task joins at this step."""
    regularisation_warmup: int
    """Eq. 6 has its full weight after so many steps of flow."""
    mask_warmup: int
    """The occlusion masks are on after so many steps of flow."""

    def tasks(self, step: int) -> tuple[bool, bool]:
        """Whether a step learns flow, and whether content: the strategies of Table 5."""
        if self.task == "vicreg" or step < self.flow_start:
            return False, True
        if self.task == "mjepa" or self.strategy in ("frozen", "finetune"):
            return True, False
        turn = step - self.flow_start
        if self.strategy == "alternate_epochs":
            turn //= self.per_epoch
        alternates = self.strategy != "combined"
        return not alternates or turn % 2 == 0, not alternates or turn % 2 == 1

    def taken(self, step: int) -> tuple[int, int]:
        """How many steps before this one learn flow, and how many content."""
        flow, content = zip((0, 0), *(self.tasks(s) for s in range(step)), strict=True)
        return sum(flow), sum(content)

    def settled(self) -> int:
        """The step from which on the loss is the same sum: flow has begun, Eq. 6 and the masks have come in."""
        step, to_come = 0, 0 if self.task == "vicreg" else max(self.regularisation_warmup, self.mask_warmup)
        while to_come and step < self.last:
            to_come -= self.tasks(step)[0]
            step += 1
        return step

    def epoch(self, step: int) -> int:
        """The number of the epoch, from 1, that the last of `step` steps belongs to."""
        return math.ceil(step / self.per_epoch)

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` steps end an epoch, or the run."""
        return step % self.per_epoch == 0 or step == self.last


def make_plan(config: Config, videos: Dataset | None, images: Dataset | None) -> Plan:
    """The epochs of a configuration in steps. An epoch is one pass over the images; without any, over the pairs."""
    data, batch = (videos, config.video_batch) if images is None else (images, config.image_batch)
    per_epoch = config.steps_per_epoch or max(len(data) // batch, 1)
    total = config.epochs * per_epoch
    return Plan(
        task=config.task,
        strategy=config.strategy,
        per_epoch=per_epoch,
        last=min(total, config.max_steps or total),
        flow_start=0 if config.task == "mjepa" else round(config.flow_start_epoch * per_epoch),
        regularisation_warmup=max(round(config.regularisation_warmup_epochs * per_epoch), 1),
        mask_warmup=max(round(config.mask_warmup_epochs * per_epoch), 1),
    )


def build(config: Config, device: torch.device) -> tuple[MCJEPA, torch.optim.Optimizer]:
    """The model, and AdamW over its parts, each a group by name; the estimator has a learning rate apart."""
    torch.manual_seed(config.seed)
    model = MCJEPA(config.model, config.loss, config.task, config.backbone).to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # what its tensor cores want; on a CPU the step takes as long
    groups = [
        {
            "name": name,
            "params": [*part.parameters()],
            "initial_lr": config.estimator_learning_rate if name == "estimator" else config.learning_rate,
        }
        for name, part in model.named_children()
    ]
    betas = (0.9, config.adam_beta2)
    # fused: one pass over the parameters instead of a dozen
    return model, torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=True
    )


def save(
    config: Config, step: int, model: MCJEPA, optimizer: torch.optim.Optimizer, watch: "Watch", lengths: dict
) -> None:
    """checkpoint.pt: all that `resume` and `mcjepa.load_model` need."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "random": random_states(),
        "config": as_json(config),
        "watch": watch.state(),
        "lengths": lengths,
    }
    save_checkpoint(config.output_dir / "checkpoint.pt", state, config.keep_checkpoints)


def keep_best(config: Config, plan: Plan, log: Log, step: int) -> None:
    """After an epoch: checkpoint.pt is best.pt too, if its score is the lowest.

    The score is the validation error, or where there is none the mean of the epoch's losses. While flow, Eq. 6 or the
    masks are still to come the scores of two epochs are not of the same thing: the newer counts as better.
    """
    errors = log.values("validation/epe")
    totals = [total for at, total in log.values("total").items() if step - plan.per_epoch < at <= step]
    if step not in errors and not totals:  # an epoch shorter than --log-every
        return
    score, comparable = errors[step] if step in errors else sum(totals) / len(totals), plan.settled() + plan.per_epoch
    rivals = [
        other
        for at, other in log.values("score").items()
        if comparable <= at < step and plan.tasks(at - 1) == plan.tasks(step - 1)  # they may alternate by epochs
    ]
    log.event(step, {"score": score})
    if score <= min(rivals, default=score) or step < comparable:
        keep_copy(config.output_dir / "checkpoint.pt", config.output_dir / "best.pt")


def take_step(
    config: Config,
    plan: Plan,
    step: int,
    flow_steps: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    video: Pair | None,
    views: Pair | None,
) -> tuple[Losses, dict[str, Tensor], list[str]]:
    """Step number `step`: schedules, forward, backward, clipping, update.

    Args:
        flow_steps: how many steps before this one have learned flow.
        model: MCJEPA, or DDP around it, or either compiled.
        video, views: this process's batches; None for a task that does not learn in this step.

    Returns:
        The losses, the norm of each part's gradient before it was clipped, and what of these is not finite, in any
        process. If something is not, weights and buffers are left as they were, in all processes.
    """
    factor = schedule(config, (step + 1) / plan.per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]
    kind = optimizer.param_groups[0]["params"][0].device.type
    bfloat16 = config.precision == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # a NaN would stay in a batch norm's averages
    with torch.autocast(kind, torch.bfloat16, enabled=bfloat16):
        losses = model(
            video=video,
            views=views,
            masks=flow_steps >= plan.mask_warmup,
            regularisation=min((flow_steps + 1) / plan.regularisation_warmup, 1.0),
        )
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    norms = {
        group["name"]: clip_grad_norm_(group["params"], config.clip_gradient)
        for group in optimizer.param_groups
        if any(parameter.grad is not None for parameter in group["params"])
    }
    bad = []
    if not torch.stack([losses.total.detach(), *norms.values()]).isfinite().all():  # waits for the GPU once
        bad = [name for name, value in losses.unweighted.items() if not math.isfinite(value)]
        bad += [f"gradient of {name}" for name, norm in norms.items() if not math.isfinite(norm)]
        bad = bad or ["total"]
    bad = in_all_processes(bad)
    if bad:
        for buffer, before in buffers:
            buffer.copy_(before)
    else:
        optimizer.step()
    return losses, norms, bad


def measured(losses: Losses, norms: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The numbers of one step, by the names that they have in metrics.jsonl."""
    numbers = {f"learning_rate/{group['name']}": group["lr"] for group in optimizer.param_groups}
    numbers |= {f"loss/{name}": value.item() for name, value in losses.unweighted.items()}
    numbers |= {f"weighted/{name}": value.item() for name, value in losses.weighted.items()}
    numbers |= {name: value.item() for name, value in losses.monitor.items()}
    return numbers | {f"gradient_norm/{name}": value.item() for name, value in norms.items()}


def shown(numbers: dict[str, float]) -> str:
    """A few of the numbers, for the progress bar."""
    names = ("reconstruction", "regression", "vicreg_invariance", "vicreg_variance")
    terms = [
        f"{name.removeprefix('vicreg_')[:3]} {numbers[f'loss/{name}']:.3f}"
        for name in names
        if f"loss/{name}" in numbers
    ]
    return " ".join(terms) + f" {numbers['pairs_per_second']:.3g} pairs/s {numbers['images_per_second']:.3g} img/s"


def in_all_processes(own: list) -> list:
    """The lists of all processes as one, without repeats, the same in each. While all are empty it costs one number."""
    if not dist.is_initialized():
        return own
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    some = torch.tensor(len(own), device=device)
    dist.all_reduce(some)
    if not some.item():
        return []
    lists: list = [None] * dist.get_world_size()
    dist.all_gather_object(lists, own)
    return list(dict.fromkeys(entry for each in lists for entry in each))


class Alike(ValueError):
    """An error that every process raises at the same step: the first tells it."""


class Watch:
    """What goes wrong in a run and need not end it: files that cannot be used, steps that are skipped, collapse.

    Every process keeps the same counts. The first tells each thing once, and writes it into metrics.jsonl.
    """

    def __init__(self, config: Config, log: Log, state: dict) -> None:
        self.config, self.log = config, log
        self.bad_files: dict[str, list[str]] = state.get("bad_files", {})
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        self.collapsed: list[str] = state.get("collapsed", [])

    def state(self) -> dict:
        """For the checkpoint: a run that goes on tells nothing twice."""
        names = ("bad_files", "skipped", "in_a_row", "collapsed")
        return {name: getattr(self, name) for name in names}

    def files(self, done: int, kind: str, faults: list[str], data: Dataset) -> None:
        """Faults that the loaders of all processes met in a step. Alike if they are more than --bad-files allows."""
        known = self.bad_files.setdefault(kind, [])
        for fault in faults:
            if fault not in known:
                known.append(fault)
                self.log.event(done, {"bad_file": fault})
                self.log.say(f"bad file {len(known)} of {data.file_count} {kind}, the next takes its place: {fault}")
        if len(known) > allowed_files(self.config, data):
            raise Alike(too_many(known, allowed_files(self.config, data), data.file_count))

    def step(self, done: int, bad: list[str], batch: list[str]) -> None:
        """A step and what of it was not finite. Alike after --max-bad-steps in a row."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if not bad:
            return
        self.skipped += 1
        self.log.event(done, {"skipped": bad, "batch": batch})
        shown = "; ".join(batch[:2]) + (f" and {len(batch) - 2} more, see metrics.jsonl" if len(batch) > 2 else "")
        self.log.say(f"step {done} is skipped, not finite: {', '.join(bad)}; it had {shown}")
        if self.in_a_row >= self.config.max_bad_steps:
            raise Alike(
                f"{self.in_a_row} steps in a row were not finite ({', '.join(bad)}): lower the learning rates, or look "
                "at the data of these steps in metrics.jsonl. The last checkpoint is as it was"
            )

    def features(self, done: int, numbers: dict[str, float]) -> None:
        """The deviations that a step has measured. A network that has just begun may have small ones."""
        if numbers["epoch"] < 1:
            return
        for name, value in numbers.items():
            kind, _, place = name.partition("/")
            if kind == "deviation" and place != "pooled" and value < self.config.collapse_below:
                if name not in self.collapsed:
                    self.collapsed.append(name)
                    self.log.say(
                        f"warning: step {done}: the features of {place.replace('_', ' ')} collapse (deviation "
                        f"{value:.2g}); raise loss.variance or, of the embedding, loss.vicreg-variance"
                    )
            elif name in self.collapsed:
                self.collapsed.remove(name)


def allowed_files(config: Config, data: Dataset) -> int:
    """How many bad files a data set may have."""
    return int(config.bad_files * getattr(data, "file_count", 0))


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """The names of the signals that came to end the run. One more, after 5 seconds, ends it at once; sooner it is
    torchrun's, which passes on what the scheduler or the keyboard has sent to all processes already."""
    came: list[str] = []
    first = math.inf

    def note(number: int, _) -> None:
        nonlocal first
        if time.monotonic() - first > 5:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        first = min(first, time.monotonic())
        came.append(signal.Signals(number).name)

    # SIGTERM and SIGUSR1 are what schedulers send, SIGINT is Ctrl-C.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Feed:
    """The batches of one task in this process, from any step on, with the names of what is in them."""

    def __init__(self, config: Config, data: Dataset, transform, batch: int, rank: int, world: int) -> None:
        self.config, self.data, self.transform = config, data, transform
        self.share, self.rank, self.world = batch // world, rank, world
        self.loader = self.batches = None

    def take(self, step: int, device: torch.device) -> tuple[Pair, list[str]]:
        """The batch of this task's step number `step`, one after the other, and the faults of files met on the way."""
        if self.batches is None:
            self.loader = make_loader(
                self.data, self.transform, self.share, Stream(self.config.seed, self.rank, self.world, step),
                self.config.workers, allowed_files(self.config, self.data),
            )  # fmt: skip
            self.batches = iter(self.loader)
        batch, faults = next(self.batches)
        return tuple(x.to(device, non_blocking=True) for x in batch), faults

    def names(self, step: int) -> list[str]:
        """What `take` gave in that step."""
        return [self.data.name(index) for _, index in self.loader.sampler.step(step)]


def picture_pairs(config: Config, videos: Dataset, transform) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Three pairs whose flow is drawn after each epoch: (image_1, image_2, true flow or None)."""
    if config.task == "vicreg":
        return []
    if config.video_dir is None and config.data_root is None:
        return [(p.image_1[0], p.image_2[0], p.flow[0]) for p in shapes_pairs(3, config.crop, UNSEEN_SEED)]
    readable = Forgiving(videos, transform, config.seed, allowed_files(config, videos))
    return [(*readable[(i, i * len(videos) // 3)][0], None) for i in range(3)]


def end_of_epoch(config: Config, plan: Plan, model: MCJEPA, pairs: list, log: Log, step: int) -> None:
    """The flow on unseen MovingShapes, the best checkpoint, and pictures of the flow of a few pairs."""
    epoch = plan.epoch(step)
    if config.task == "vicreg":
        keep_best(config, plan, log, step)
        return
    model.eval()
    if config.video_dir is None and config.data_root is None and config.validation_pairs:
        result = evaluate_flow_on_shapes(model, config.validation_pairs, config.crop)
        log.write(step, {f"validation/{name}": value for name, value in result.items()})
        log.say(
            f"epoch {epoch}: end-point error {result['epe']:.2f} px on {config.validation_pairs} unseen MovingShapes "
            f"pairs (zero flow {result['epe_zero']:.2f})"
        )
    keep_best(config, plan, log, step)
    device = next(model.parameters()).device
    figures = []
    for image_1, image_2, truth in pairs:
        flow = model.estimate_flow(image_1[None].to(device), image_2[None].to(device))[0].cpu()
        figures.append(flow_figure(image_1, image_2, flow, truth))
    log.picture(epoch, step, torch.cat(figures, dim=1))
    model.train()


def choose_parts(config: Config, model: MCJEPA, flow_has_started: bool) -> None:
    """Which parts of the model learn before the flow start, and after it."""
    flow_alone = flow_has_started and config.strategy in ("frozen", "finetune")
    if model.estimator is not None:
        model.estimator.requires_grad_(flow_has_started)
    if model.expander is not None:
        model.expander.requires_grad_(not flow_alone)
    model.freeze_encoder(flow_alone and config.strategy == "frozen")


def own_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none. ValueError if there are more processes than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise ValueError(f"more processes than GPUs: set --nproc_per_node to {torch.cuda.device_count()} at most")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def meet(backend: str) -> None:
    """Starts the process group.

    Since torchrun's processes share its own store, those that it starts anew may read there the addresses of those that
    have died, and wait for them (pytorch issue 135712): each start gets names of its own. Several agents count their
    starts apart, so that they cannot; they need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (see the README).
    """
    store, rank, world = next(dist.rendezvous("env://"))
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
        store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def lengths_of(videos: Dataset | None, images: Dataset | None) -> dict[str, int | None]:
    """How much data there are, by name: of other data the same seed would make another run."""
    return {"pairs": videos and len(videos), "images": images and len(images)}


def check_alike(values: dict[str, object]) -> None:
    """Raises Alike, in one line, where the processes differ in one of these: they would learn different things."""
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, values)
    for name in values:
        different = list(dict.fromkeys(str(each[name]) for each in everywhere))
        if len(different) > 1:
            raise Alike(
                f"the processes differ in {name}: {', '.join(different)}; give all machines the same command and data, "
                "and an --output-dir that they share"
            )


def train(config: Config) -> None:
    """One run, from the sources of data to the last checkpoint."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    main = rank == 0
    if config.show_data:
        if config.data_root is None:
            raise ValueError("--show-data shows what lies in --data-root: give that too")
        show_data(config)
        return
    check(config, world)
    device = own_device()
    learn_flow, learn_content = config.task != "vicreg", learns_content(config)
    videos, video_transform = open_videos(config, main) if learn_flow else (None, None)
    images, image_transform = open_images(config) if learn_content else (None, None)
    sources = (("--video-dir", learn_flow, config.video_dir), ("--image-dir", learn_content, config.image_dir))
    embedded = [flag for flag, learns, folder in sources if learns and not (folder or config.data_root)]
    if main and embedded:
        print(f"no {' and no '.join(embedded)}: training on MovingShapes, the embedded data, in its place")

    model, optimizer = build(config, device)
    lengths = lengths_of(videos, images)
    start, state, passed = 0, {}, {}
    if config.resume:  # a run that goes on has the weights of --init behind it
        checkpoint, passed = resume(config, model, optimizer)
        start, state, init = checkpoint["step"], checkpoint["watch"], checkpoint["config"].get("init")
        config = replace(config, init=Path(init) if init else None)
        for name, length in checkpoint.get("lengths", {}).items():
            if length != lengths[name]:
                raise ValueError(
                    f"--resume {config.resume}: the data were {length} {name} then, and are {lengths[name]} now; bring "
                    "them back, or begin a new run from it with --init"
                )
    elif config.init:
        sentence = load_parts(model, config.init)
        if main:
            print(sentence, flush=True)
    plan = make_plan(config, videos, images)
    pairs = picture_pairs(config, videos, video_transform) if main else []
    if world > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        meet("nccl" if device.type == "cuda" else "gloo")
        settings = {name: value for name, value in flat(as_json(config)).items() if name not in (*HARMLESS, *PLACES)}
        settings |= {name: getattr(config, name) for name in ("bad_files", "max_bad_steps", "compile")}
        numbers = {f"number of {name}": length for name, length in lengths.items()}
        check_alike({"first step": start, "last step": plan.last} | numbers | settings)
    for path, sentence in passed.items() if main else ():  # none of the processes reads it any more
        print(sentence, flush=True)
        if path.exists() and path.parent == config.output_dir:  # out of the row: it shall push no good one out
            path.rename(path.with_name(f"broken-{path.name}"))
    video_feed = Feed(config, videos, video_transform, config.video_batch, rank, world) if learn_flow else None
    image_feed = Feed(config, images, image_transform, config.image_batch, rank, world) if learn_content else None
    with closing(Log(config.output_dir, start, plan.last, main)) as log, stop_signals() as came:
        if start < plan.last:  # else there is nothing to do, and the record stays that of the steps done
            log.record("config", as_json(config))
            log.record("environment", environment(device, world))
        watch = Watch(config, log, state)
        done = learn(config, plan, start, device, model, optimizer, video_feed, image_feed, log, watch, pairs, came)
        if main and done < plan.last:
            log.say(f"stopped by {came[0]} after step {done} of {plan.last}: the same command with --resume goes on")
    if main and done >= plan.last:
        if start >= plan.last:
            print(f"no steps left: {config.resume} is at step {start} of {plan.last}")
        print(f"done: checkpoint, metrics and pictures lie in {config.output_dir}")
        measure = "flow" if learn_flow else "segmentation"
        print(f"measure it: python evaluate.py {measure} --model {config.output_dir / 'checkpoint.pt'}")
    if world > 1:
        dist.destroy_process_group()


def over_processes(config: Config, model: MCJEPA, device: torch.device) -> nn.Module:
    """The model in DDP, which waits for every gradient that may come, compiled if wanted: anew where that changes.

    The state dict stays the model's own.
    """
    parallel: nn.Module = model
    if dist.is_initialized():
        parallel = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=config.strategy.startswith("alternate"),
            gradient_as_bucket_view=True,  # else the gradients are there twice
        )
    return torch.compile(parallel) if config.compile else parallel


def learn(
    config: Config,
    plan: Plan,
    start: int,
    device: torch.device,
    model: MCJEPA,
    optimizer: torch.optim.Optimizer,
    videos: Feed | None,
    images: Feed | None,
    log: Log,
    watch: Watch,
    pairs: list,
    came: list[str],
) -> int:
    """The steps of a run from `start` on, to the end or to a signal in `came`; returns how many are done then."""
    lengths = lengths_of(videos and videos.data, images and images.data)
    if log.main and start:
        if not (config.output_dir / "checkpoint.pt").exists():  # it came from elsewhere, or the newest was broken
            save(config, start, model, optimizer, watch, lengths)
        measured_before = start in log.values("score") and (not videos or log.picture_path(plan.epoch(start)).exists())
        if plan.ends_epoch(start) and not measured_before:  # the run was stopped just after `save`
            end_of_epoch(config, plan, model, pairs, log, start)
    flow_steps, content_steps = plan.taken(start)
    latest, done = {}, start
    since, seen = time.perf_counter(), (flow_steps, content_steps)
    for step in range(start, plan.last):
        flow, content = plan.tasks(step)
        if step in (start, plan.flow_start):
            latest.clear()
            choose_parts(config, model, flow_has_started=step >= plan.flow_start)
            parallel = over_processes(config, model, device)
        video, video_faults = videos.take(flow_steps, device) if flow else (None, [])
        views, image_faults = images.take(content_steps, device) if content else (None, [])
        losses, norms, bad = take_step(config, plan, step, flow_steps, parallel, optimizer, video, views)
        done = step + 1

        news = [("frames", fault) for fault in video_faults] + [("images", fault) for fault in image_faults]
        news = in_all_processes(news + [("signal", name) for name in came])
        for kind, feed in (("frames", videos), ("images", images)):
            faults = [text for of, text in news if of == kind]
            if faults:
                watch.files(done, kind, faults, feed.data)
        batch = []
        if bad:
            batch = in_all_processes(
                (videos.names(flow_steps) if flow else []) + (images.names(content_steps) if content else [])
            )
        watch.step(done, bad, batch)
        flow_steps, content_steps = flow_steps + flow, content_steps + content
        latest.pop((flow, content), None)  # the newest comes last
        if not bad:
            latest[flow, content] = losses, norms

        log.advance()
        if done % config.log_every == 0 or done == plan.last:
            seconds = time.perf_counter() - since
            numbers = {"epoch": done / plan.per_epoch}
            for losses, norms in latest.values():  # where the tasks alternate, the last step of each
                numbers |= measured(losses, norms, optimizer)
            if latest:
                numbers["total"] = sum(losses.total.item() for losses, _ in latest.values())
            numbers["pairs_per_second"] = config.video_batch * (flow_steps - seen[0]) / seconds
            numbers["images_per_second"] = config.image_batch * (content_steps - seen[1]) / seconds
            numbers |= {"skipped_steps": watch.skipped, "bad_files": sum(map(len, watch.bad_files.values()))}
            log.write(done, numbers)
            watch.features(done, numbers)
            log.advance(0, shown(numbers))
            since, seen = time.perf_counter(), (flow_steps, content_steps)
            latest.clear()
        stop = any(kind == "signal" for kind, _ in news)
        if log.main and (plan.ends_epoch(done) or done % config.checkpoint_every == 0 or stop):
            save(config, done, model, optimizer, watch, lengths)
        if plan.ends_epoch(done):
            if log.main:
                end_of_epoch(config, plan, model, pairs, log, done)
            since, seen = time.perf_counter(), (flow_steps, content_steps)
        if stop:
            came[:] = [text for kind, text in news if kind == "signal"]
            break
    return done


def main() -> None:
    """The command line. A user's mistake ends in one line and exit code 1."""
    try:
        train(read_config(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume goes on from the last checkpoint, if one was written yet")
    except (ValueError, OSError) as error:
        # What fails before the processes meet fails in all of a machine: its first tells, then torchrun ends them.
        told_by_another = int(os.environ.get("LOCAL_RANK", 0)) > 0 and not dist.is_initialized()
        if told_by_another or (isinstance(error, Alike) and int(os.environ.get("RANK", 0)) > 0):
            time.sleep(30)  # still there: it was alone
        sys.exit(f"error: {one_line(error)}")
    except RuntimeError as error:
        remedy = next((remedy for sign, remedy in FAULTS_OF_MACHINES.items() if re.search(sign, str(error))), None)
        if remedy is None:
            raise
        sys.exit(f"error: {remedy} ({one_line(error)[:200]})")


if __name__ == "__main__":
    main()
