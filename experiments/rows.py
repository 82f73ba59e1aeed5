"""The rows of the paper's tables and figures, as runs of train.py's `small` or `pocket` with other flags."""

from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """A run: its flags, how many of --steps it takes, the share of them before flow starts, and what trains it."""

    flags: str = ""
    length: float = 1.0
    flow_start: float = 0.1
    script: str = "train.py"


ROWS = {
    "random": Row(length=0.0),
    "vicreg": Row("--task vicreg"),
    "vicreg_twice": Row("--task vicreg", length=2.0),  # is it only more computation?
    "vicreg_frames": Row("--task vicreg"),  # is it only more data? Half of its images are frames of the videos
    "vicreg_local": Row("--task vicreg", script="experiments/local_loss.py"),  # is it only locality?
    "mjepa": Row("--task mjepa", length=0.9, flow_start=0.0),  # as many steps of flow as MC-JEPA
    "mcjepa": Row(),
    "true_flow": Row(script="experiments/true_flow.py"),  # can motion help at all?
    "norm_none": Row("--model.estimator-norm none"),
    "norm_l2": Row("--model.estimator-norm l2"),
    "norm_layer+l2": Row("--model.estimator-norm layer+l2"),
    "factor_1": Row("--model.estimator-factor 1"),
    "pwc": Row("--model.encoder pwc"),
    "resnet18": Row("--model.encoder resnet18"),
    "resnet50": Row("--model.encoder resnet50"),
    "convnext_tiny": Row("--model.encoder convnext_tiny"),
    "frozen": Row("--strategy frozen", flow_start=0.5),
    "finetune": Row("--strategy finetune", flow_start=0.5),
    # No step has both tasks, whose gradients could be compared: a fixed balance, near that which `mcjepa` ends with.
    "alternate_epochs": Row("--strategy alternate_epochs --loss.gradient-ratio 0 --loss.flow-balance 8"),
    "alternate_batches": Row("--strategy alternate_batches --loss.gradient-ratio 0 --loss.flow-balance 8"),
    "without_eq6": Row("--loss.variance 0 0 0 0 0 0 --loss.covariance 0 0 0 0 0 0"),
    "eq6_strong": Row("--loss.variance 0.1 0.1 0.1 0.1 0.1 0.1"),
    "start_0": Row(flow_start=0.0),
    "start_30": Row(flow_start=0.3),
    "cycle_0": Row("--loss.cycle 0"),
    "cycle_0.2": Row("--loss.cycle 0.2"),
    "ratio_0.1": Row("--loss.gradient-ratio 0.1"),
    "ratio_1": Row("--loss.gradient-ratio 1"),
    "ratio_3": Row("--loss.gradient-ratio 3"),
}
TABLES = {
    "1": ("random", "vicreg", "vicreg_twice", "vicreg_frames", "vicreg_local", "mjepa", "mcjepa", "true_flow"),
    "3": ("norm_none", "mcjepa", "norm_l2", "norm_layer+l2", "factor_1"),
    "4": ("pwc", "mcjepa", "resnet18", "resnet50", "convnext_tiny"),
    "5": ("frozen", "finetune", "alternate_epochs", "alternate_batches", "mcjepa"),
    "11": ("without_eq6", "mcjepa", "eq6_strong"),
}
LARGE = ("resnet50", "convnext_tiny")  # only with --all
FIGURES = {  # what a panel shows from left to right, and the row of each of its values
    "5a": ("start of flow [% of the steps]", {"start_0": 0, "mcjepa": 10, "start_30": 30}),
    "5b": ("coefficient of Eq. 5", {"cycle_0": 0, "mcjepa": 0.02, "cycle_0.2": 0.2}),
    "5c": ("gradient of flow / of content", {"ratio_0.1": 0.1, "mcjepa": 0.3, "ratio_1": 1, "ratio_3": 3}),
}


def of_common_seeds(runs: list[dict], names: Iterable[str]) -> list[dict]:
    """The runs of these rows whose seeds all of the rows have, or all runs if they share none.

    A seed changes J&F by up to 5 points: only runs of the same seeds can be compared.
    """
    own = [run for run in runs if run["name"] in names]
    seeds = [{run["seed"] for run in own if run["name"] == name} for name in {run["name"] for run in own}]
    return [run for run in own if all(run["seed"] in each for each in seeds)] or own


def schedule(row: Row, steps: int) -> tuple[int, list[str]]:
    """The steps of a row, and its flags: schedules stretch with the steps, and masks come in the last half of flow."""
    steps = round(row.length * steps)
    per_epoch = max(min(steps, 100), 1)
    epochs, warmup = round(steps / per_epoch), min(max(steps / 10, 100), 500) / per_epoch
    start, turns = epochs * row.flow_start, 2 if "alternate" in row.flags else 1
    flags = f"--epochs {epochs} --steps-per-epoch {per_epoch} --warmup-epochs {warmup:g} --flow-start-epoch {start:g}"
    # The ratio is that of `small`, for `pocket` too: Figure 5 (3) counts from it.
    flags += f" --mask-warmup-epochs {(epochs - start) / turns / 2:g} --loss.gradient-ratio 0.3"
    return epochs * per_epoch, f"{flags} {row.flags}".split()
