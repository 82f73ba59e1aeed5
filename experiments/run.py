"""Trains and measures the rows of the paper's tables and figures at a small scale, with several seeds.

    python experiments/run.py --table 1                            # on MovingShapes alone
    python experiments/run.py --preset pocket --table 3 5 --figure 5c --steps 1000 --seeds 0
    python experiments/run.py --table 1 --data DATA --workers 8    # images of CIFAR-10; measured on real data too
    python experiments/report.py                                   # makes report.md and its pictures from results.jsonl

A row is a run of train.py, local_loss.py or true_flow.py with the preset `small` or `pocket` and flags of its own.
Flags that this script does not know are added to those of every row. DATA holds cifar-10/ (train/CLASS/a.png,
test/CLASS/b.png), Middlebury/, DAVIS2016-240p/, and CamVid/ if its mIoU is to be measured. A stopped run continues; one
that is measured has its line in results.jsonl and is not repeated. If it diverged, the line has no measures.

Table 2, of sets of video, needs the paper's (train.py --data-root DATA --sets kitti sintel): no flag adds MovingShapes.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from rows import FIGURES, LARGE, ROWS, TABLES, schedule

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
from data import ImageFiles  # noqa: E402
from engine.log import environment, write_picture  # noqa: E402
from engine.processes import own_device  # noqa: E402
from sources.moving_shapes import ShapePairs, recoloured_objects  # noqa: E402
from train import parse  # noqa: E402

CURVES = ("weighted/", "deviation/", "validation/", "gradient_ratio", "flow_balance", "loss/vicreg_invariance")


def measure(model: str, encoder: str, seed: int, folder: Path, data: Path | None) -> dict[str, float]:
    """What evaluate.py measures of a model, or of an encoder's random weights; errors in px, all else in percent."""
    common = {"model": model, "encoder": encoder, "seed": seed, "output_dir": folder / "measures"}
    network, _ = evaluate.open_model(evaluate.Config(**common))
    measures, side = {}, evaluate.SHAPES_SIZE
    if network.estimator:
        errors = evaluate.flow_errors_on_shapes(network, evaluate.SHAPES_PAIRS, (side, side))
        measures |= {"EPE": errors["epe"], "EPE of zero flow": errors["epe_zero"]}
        if data:
            config = evaluate.FlowConfig(**common, data_root=data / "Middlebury", pictures=0)
            measures["Middlebury EPE"] = evaluate.run_flow(config)["table1"]["EPE"]
    objects = recoloured_objects(evaluate.SHAPES_OBJECTS, evaluate.UNSEEN_SEED)
    shares = {"object": 0.0, "texture": 0.0, "shape": 0.0}  # by the best level, before those of each
    for level, scores in evaluate.search_among_shapes(network, objects).items():
        shares |= {f"{kind}, {level}": share for kind, share in scores.items()}
        shares |= {kind: max(share, shares[kind]) for kind, share in scores.items()}
    if data:
        _, known, queries = evaluate.label_sets.find_classes(data / "cifar-10", most=10_000, size=48)
        for level, scores in evaluate.classify_images(network, known, queries).items():
            shares |= {f"CIFAR-10 {kind}, {level}": share for kind, share in scores.items()}
        if (data / "CamVid").is_dir():
            config = evaluate.SegmentationConfig(**common, data_root=data / "CamVid", pictures=0)
            shares["CamVid mIoU"] = evaluate.run_segmentation(config)["miou"]
    videos = {"": {}} | ({"DAVIS 2016 ": {"data_root": data / "DAVIS2016-240p", "size": 240}} if data else {})
    for title, options in videos.items():
        for strides in ((8,), (8, 16)):
            report = evaluate.run_video(evaluate.VideoConfig(**common, **options, stride=strides, pictures=0))
            shares[f"{title}J&F, {'+'.join(map(str, strides))}"] = report["mean"]["J&F"]
    return measures | {name: 100 * share for name, share in shares.items()}


def thin_curves(metrics: Path, most: int = 60) -> dict[str, list[float | None]]:
    """The columns of a metrics.jsonl that tell how a run went, at about so many steps, with four digits."""
    rows: dict[int, dict[str, float]] = {}
    for line in map(json.loads, metrics.read_text().splitlines()):
        numbers = {name: float(f"{value:.4g}") for name, value in line.items() if name.startswith(CURVES)}
        rows[line["step"]] = rows.get(line["step"], {}) | numbers
    every = -(-len(rows) // most)
    rows = {step: row for i, (step, row) in enumerate(rows.items()) if i % every == 0 or "validation/epe" in row}
    names = sorted({name for row in rows.values() for name in row})
    return {"step": [*rows]} | {name: [row.get(name) for row in rows.values()] for name in names}


def add_frames(images: Path, folder: Path, count: int = 10_000) -> Path:
    """A folder with these images and as many frames of MovingShapes' videos, of which `count` differ."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as temporary:  # another run may make the same folder beside this one
            partial, pairs = Path(temporary, "frames"), ShapePairs(count, (192, 192))
            partial.mkdir()
            (partial / "images").symlink_to(images)
            for i in range(len(ImageFiles(images))):
                if i < count:
                    write_picture(partial / f"{i}.png", pairs[i // 2][i % 2])
                else:
                    (partial / f"{i}.png").symlink_to(f"{i % count}.png")
            with suppress(OSError):  # it was sooner
                partial.rename(folder)
    return folder


def train_and_measure(name: str, seed: int, arguments: argparse.Namespace, flags: list[str]) -> dict | None:
    """A run's part of its line in results.jsonl; None if it failed other than by diverging."""
    start, (steps, own) = time.time(), schedule(ROWS[name], arguments.steps)
    preset, model = arguments.preset, "random"
    other = re.sub(r"[^\w.]+", "_", " ".join(flags))  # flags of all rows
    folder = arguments.output_dir / f"{preset}_{name}_{arguments.steps}_{seed}{'_cifar' * bool(arguments.data)}{other}"
    result = {"flags": " ".join([*own, *flags]), "steps": steps, "device": environment(own_device())["device"]}
    if steps:
        words = ["--output-dir", folder, "--seed", str(seed), "--workers", str(arguments.workers), *own, *flags]
        if arguments.data:
            images = arguments.data / "cifar-10" / "train"
            frames = name == "vicreg_frames"
            words += ["--image-dir", add_frames(images, arguments.output_dir / "frames") if frames else images]
        code = subprocess.run([sys.executable, ROWS[name].script, preset, *words], cwd=ROOT).returncode
        metrics, model = folder / "metrics.jsonl", str(folder / "model.safetensors")
        if code or not Path(model).exists():  # a signal ends train.py early, with code 0
            diverged = metrics.exists() and '"skipped"' in "".join(metrics.read_text().splitlines()[-1:])
            return result | {"measures": {}, "diverged": True} if diverged else None
        if seed == arguments.seeds[0]:
            curves = arguments.results.parent / "curves" / f"{folder.name}.json"
            curves.parent.mkdir(exist_ok=True)
            curves.write_text(json.dumps(thin_curves(metrics)) + "\n")
            result["curves"] = curves.name
    encoder = parse([preset, *own, *flags]).model.encoder
    measures = measure(model, encoder, seed, folder, arguments.data)
    flowless = name == "true_flow"  # its estimator has learned nothing
    result["measures"] = {each: x for each, x in measures.items() if not (flowless and "EPE" in each)}
    return result | {"seconds": round(time.time() - start)}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    absolute = lambda text: Path(text).resolve()  # noqa: E731 (train.py runs in another folder)
    parser.add_argument("--table", nargs="+", choices=TABLES, default=[], help="for 2 see the docstring")
    parser.add_argument("--figure", nargs="+", choices=FIGURES, default=[])
    parser.add_argument("--preset", choices=("small", "pocket"), default="small", help="of train.py")
    parser.add_argument("--steps", type=int, default=3000, help="of each row, a multiple of 100")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=absolute, help="with CIFAR-10, Middlebury, DAVIS, CamVid; default: MovingShapes")
    parser.add_argument("--all", action="store_true", help="the large encoders of Table 4 too")
    parser.add_argument("--workers", type=int, default=2, help="of train.py")
    parser.add_argument("--output-dir", type=absolute, default=ROOT / "runs" / "experiments")
    parser.add_argument("--results", type=absolute, default=ROOT / "experiments" / "results.jsonl")
    arguments, flags = parser.parse_known_args(words)
    if not arguments.table and not arguments.figure:
        parser.error("name a --table or a --figure")
    names = [name for table in arguments.table for name in TABLES[table] if arguments.all or name not in LARGE]
    names += [name for figure in arguments.figure for name in FIGURES[figure][1]]
    if not arguments.data:  # all images are MovingShapes
        names = [name for name in names if name != "vicreg_frames"]
    images, failed = "CIFAR-10" if arguments.data else "MovingShapes", []
    parts = [arguments.preset, f"{arguments.steps:,} steps", f"images of {images}", " ".join(flags)]
    series = ", ".join(filter(None, parts))
    for seed, name in product(arguments.seeds, dict.fromkeys(names)):
        lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
        run = {"series": series, "name": name, "seed": seed}
        if any(run.items() <= json.loads(line).items() for line in lines):
            print(f"{name}, seed {seed}: its line is in {arguments.results}")
        elif result := train_and_measure(name, seed, arguments, flags):
            with open(arguments.results, "a") as file:
                file.write(json.dumps(run | result) + "\n")
        else:
            failed.append(f"{name}, seed {seed}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed, see above: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
