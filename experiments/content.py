"""Content features on MovingShapes: random weights, M-JEPA, VICReg and MC-JEPA after equal numbers of pocket steps.

    python experiments/content.py [--seeds 0 1 2]      # 80 minutes on two CPU cores, most of them training

Of each checkpoint: mIoU of a linear head over frozen features, and J&F of masks propagated through videos, both on data
that was never trained on. Prints the mean over the seeds and its spread. What is done already is not done again.

VICReg alone is trained at 3e-4 (see strategies.py); M-JEPA and MC-JEPA at the pocket's own rates.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from strategies import train  # noqa: E402

from evaluate import SegmentationConfig, VideoConfig, run_segmentation, run_video  # noqa: E402

TRAINING = {
    "random": None,
    "mjepa": ["--task", "mjepa"],
    "vicreg": ["--task", "vicreg", "--learning-rate", "3e-4"],
    "mcjepa": [],
}


def measure(folder: Path, model: str, seed: int) -> dict[str, float]:
    """The three numbers of a checkpoint, or of random weights."""
    common = {"model": model, "encoder": "pwc", "seed": seed}
    resume = (folder / "segmentation" / "checkpoint.pt").exists()
    reports = {}
    for name, run in (
        ("segmentation", lambda out: run_segmentation(SegmentationConfig(output_dir=out, resume=resume, **common))),
        ("video", lambda out: run_video(VideoConfig(output_dir=out, **common))),
        ("video_standardised", lambda out: run_video(VideoConfig(output_dir=out, standardise=True, **common))),
    ):
        path = folder / name / f"{name.split('_')[0]}.json"
        reports[name] = json.loads(path.read_text()) if path.exists() else run(folder / name)
    return {
        "mIoU": 100 * reports["segmentation"]["miou"],
        "J&F": 100 * reports["video"]["mean"]["J&F"],
        "J&F, standardised": 100 * reports["video_standardised"]["mean"]["J&F"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "content")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINING}
    for seed in arguments.seeds:
        for name, flags in TRAINING.items():
            folder = arguments.output_dir / f"{name}_{seed}"
            if flags is not None:
                train(folder / "model", "--seed", str(seed), *flags)
            model = "random" if flags is None else str(folder / "model" / "checkpoint.pt")
            results[name].append(measure(folder, model, seed))
    (arguments.output_dir / "content.json").write_text(json.dumps(results, indent=2) + "\n")
    columns = list(results["random"][0])
    print(f"\n[%], mean and deviation over {len(arguments.seeds)} seeds")
    print(" " * 10 + "".join(f"{column:>20}" for column in columns))
    for name, rows in results.items():
        values = {column: [row[column] for row in rows] for column in columns}
        cells = [f"{np.mean(v):.2f} +- {np.std(v, ddof=1) if len(v) > 1 else 0:.2f}" for v in values.values()]
        print(f"{name:10}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
