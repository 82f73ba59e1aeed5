"""The pictures of report.md, drawn with matplotlib. Each function returns the lines that show what it has drawn."""

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from rows import FIGURES, of_common_seeds  # noqa: E402

COLOURS = {"random": "0.6", "vicreg": "tab:blue", "mjepa": "tab:orange", "mcjepa": "tab:green"}
TITLES = {"random": "random", "vicreg": "VICReg", "mjepa": "M-JEPA", "mcjepa": "MC-JEPA"}


def save(figure: plt.Figure, folder: Path, kind: str, series: str) -> list[str]:
    name = f"{kind}_{re.sub(r'[^a-z0-9]+', '_', series.lower())}.png"
    figure.suptitle(series)
    figure.tight_layout()
    (folder / "report").mkdir(exist_ok=True)
    figure.savefig(folder / "report" / name, dpi=90)
    plt.close(figure)
    return [f"![{kind.replace('_', ' ')} of {series}](report/{name})", ""]


def legend_below(*axes: plt.Axes) -> None:
    lines, labels = (sum(each, []) for each in zip(*(axis.get_legend_handles_labels() for axis in axes), strict=True))
    axes[0].legend(lines, labels, fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=4)


def points(runs: list[dict], name: str, measure: str) -> list[float]:
    return [run["measures"][measure] for run in runs if run["name"] == name and measure in run["measures"]]


def draw_levels(results: dict[str, list[dict]], paper: list[dict[str, str]], folder: Path) -> list[str]:
    """Content and tracking by the level of the features, flow, and the paper's Table 1 beside; each dot is a seed."""
    lines = []
    for series, runs in results.items():
        if len({run["name"] for run in runs} & set(COLOURS)) < 3:
            continue
        measured = {measure: None for run in runs for measure in run["measures"]}
        real = any(measure.startswith("CIFAR-10") for measure in measured)
        kinds = ("CIFAR-10 k-NN, ", "DAVIS 2016 J&F, ") if real else ("object, ", "J&F, ")
        figure, axes = plt.subplots(2, 3, figsize=(13, 7.5))
        for axis, kind in zip(axes[0], kinds, strict=False):
            levels = [each for each in measured if each.startswith(kind) and "centred" not in each]
            for shift, (name, colour) in enumerate(COLOURS.items()):
                known = {x + 0.08 * (shift - 1.5): points(runs, name, level) for x, level in enumerate(levels)}
                known = {x: values for x, values in known.items() if values}
                for x, values in known.items():
                    axis.plot([x] * len(values), values, "o", color=colour, alpha=0.6)
                axis.plot([*known], [np.mean(values) for values in known.values()], color=colour, label=TITLES[name])
            axis.set_xticks(range(len(levels)), [level.removeprefix(kind) for level in levels])
            axis.set(title=f"ours: {kind.strip(', ')} [%]")
        axes[0, 0].legend()
        measure = "Middlebury EPE" if real else "EPE"
        known = [name for name in COLOURS if points(runs, name, measure)]
        for name in known:
            values = points(runs, name, measure)
            axes[0, 2].plot([TITLES[name]] * len(values), values, "o", color=COLOURS[name], alpha=0.6)
        most = max((max(points(runs, name, measure)) for name in known), default=1.0)
        axes[0, 2].set(title=f"ours: {measure} [px]", xlim=(-0.5, len(known) - 0.5), ylim=(0, 1.1 * most))
        rows = {row["row"]: row for row in paper if row["table"] == "1"}
        for axis, column in zip(axes[1], ("VOC mIoU", "DAVIS 2017 J&F", "KITTI 2015 EPE"), strict=True):
            known = [name for name in COLOURS if rows[name][column]]
            heights = [float(rows[name][column]) for name in known]
            bars = axis.bar([TITLES[name] for name in known], heights, color=[COLOURS[name] for name in known])
            axis.bar_label(bars)
            axis.margins(y=0.1)
            axis.set(title=f"paper: {column} [{'px' if 'EPE' in column else '%'}]")
        lines += save(figure, folder, "levels", series)
    return lines


def draw_figure_5(results: dict[str, list[dict]], folder: Path) -> list[str]:
    """Flow (left axis) and content (right axis) against what each panel changes, if two of its rows are there."""
    lines = []
    for series, runs in results.items():
        present = {run["name"] for run in runs}
        panels = {number: each for number, each in FIGURES.items() if len(present & set(each[1])) > 1}
        if not panels:
            continue
        figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
        for axis, (number, (label, rows)) in zip(axes[0], panels.items(), strict=True):
            content, compared = axis.twinx(), of_common_seeds(runs, rows)
            for place, colour, measure in (
                (axis, "tab:orange", "Middlebury EPE"),
                (axis, "tab:red", "EPE"),
                (content, "tab:blue", "CIFAR-10 k-NN, stride 32"),
                (content, "tab:cyan", "DAVIS 2016 J&F, 8"),
                (content, "tab:purple", "object"),
                (content, "tab:green", "J&F, 8"),
            ):
                known = {str(x): points(compared, name, measure) for name, x in rows.items()}
                known = {x: values for x, values in known.items() if values}
                if known:
                    means, spreads = ([f(values) for values in known.values()] for f in (np.mean, np.std))
                    place.errorbar([*known], means, spreads, color=colour, marker="o", label=measure)
            axis.set(title=f"Figure {number}", xlabel=label, ylabel="EPE [px]")
            content.set_ylabel("content [%]")
            legend_below(axis, content)
        lines += save(figure, folder, "figure_5", series)
    return lines


def draw_training(results: dict[str, list[dict]], folder: Path) -> list[str]:
    """Loss terms, the ratio of the gradients and the balance, deviations of the features, and both tasks."""
    lines = []
    for series, runs in results.items():
        curves = {
            run["name"]: json.loads((folder / "curves" / run["curves"]).read_text())
            for run in runs
            if run["name"] in COLOURS and "curves" in run
        }
        if "mcjepa" not in curves:
            continue
        figure, axes = plt.subplots(2, 2, figsize=(13, 8))
        ours = curves["mcjepa"]

        def plot(axis: plt.Axes, run: dict, name: str, label: str, **style: str) -> None:
            known = [(x, y) for x, y in zip(run["step"], run.get(name, []), strict=False) if y is not None]
            if known:
                axis.plot(*zip(*known, strict=True), label=label, **style)

        for name in (name for name in ours if name.startswith("weighted/")):
            term = name.removeprefix("weighted/")
            plot(axes[0, 0], ours, name, term, ls="--" if term.startswith("vicreg") else "-")
        axes[0, 0].set(title="MC-JEPA: terms of Eq. 7, weighted", yscale="log")
        plot(axes[0, 1], ours, "gradient_ratio", "gradient of flow / of content, on the encoder")
        plot(axes[0, 1], ours, "flow_balance", "balance")
        pairs = zip(ours.get("gradient_ratio", []), ours.get("flow_balance", []), strict=True)
        ours["fixed"] = [x / y if x and y else None for x, y in pairs]
        plot(axes[0, 1], ours, "fixed", "the same gradients at a balance of 1", ls=":")
        axes[0, 1].set(title="MC-JEPA: balance of the tasks", yscale="log")
        for name in sorted((name for name in ours if name.startswith("deviation/")), key=len):
            plot(axes[1, 0], ours, name, name.removeprefix("deviation/"))
        axes[1, 0].set(title="MC-JEPA: standard deviations of features", ylim=(0, None))
        content = axes[1, 1].twinx()
        for run, each in curves.items():
            plot(axes[1, 1], each, "validation/epe", f"{TITLES[run]}: EPE", color=COLOURS[run])
            label = f"{TITLES[run]}: invariance"
            plot(content, each, "loss/vicreg_invariance", label, color=COLOURS[run], ls=":")
        axes[1, 1].set(title="both tasks", ylabel="EPE [px]")
        content.set(ylabel="invariance of VICReg", yscale="log")
        for axis in axes.flat:
            legend_below(axis, *([content] if axis is axes[1, 1] else []))
            axis.set_xlabel("step")
        lines += save(figure, folder, "training", series)
    return lines
