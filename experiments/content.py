"""Content features on MovingShapes: random weights, M-JEPA, VICReg and MC-JEPA after equal numbers of pocket steps.

    python experiments/content.py [--seeds 0 1 2]      # 80 minutes on two CPU cores, most of them training

Each is measured on unseen data: mIoU of a linear head on frozen features, and J&F of masks propagated through videos.
Prints the mean and the standard deviation over the seeds. Parts that are finished are not repeated.

VICReg alone is trained at 3e-4 (see strategies.py), M-JEPA and MC-JEPA at the pocket's own learning rates.
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

FLAGS = {
    "random": None,
    "mjepa": ["--task", "mjepa"],
    "vicreg": ["--task", "vicreg", "--learning-rate", "3e-4"],
    "mcjepa": [],
}
MEASURES = ("mIoU", "J&F", "J&F, standardised")


def measure(folder: Path, model: str, seed: int) -> dict[str, float]:
    """The measures of a checkpoint, or of random weights, in percent; kept in `measures.json`."""
    path = folder / "measures.json"
    if not path.exists():
        common = {"model": model, "encoder": "pwc", "seed": seed}
        segmentation = run_segmentation(SegmentationConfig(output_dir=folder / "segmentation", **common))
        videos = [
            run_video(VideoConfig(output_dir=folder / name, centre=centre, **common))
            for name, centre in (("video", "none"), ("video_standardised", "standardise"))
        ]
        values = (segmentation["miou"], *(video["mean"]["J&F"] for video in videos))
        path.write_text(json.dumps({name: 100 * value for name, value in zip(MEASURES, values, strict=True)}))
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "content")
    arguments = parser.parse_args()
    results = {}
    for name, flags in FLAGS.items():
        results[name] = []
        for seed in arguments.seeds:
            folder, model = arguments.output_dir / f"{name}_{seed}", "random"
            if flags is not None:
                train(folder / "model", "--seed", str(seed), *flags)
                model = str(folder / "model" / "checkpoint.pt")
            results[name].append(measure(folder, model, seed))
    (arguments.output_dir / "content.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n[%], mean and standard deviation over {len(arguments.seeds)} seeds")
    print(" " * 10 + "".join(f"{name:>20}" for name in MEASURES))
    for name, rows in results.items():
        columns = [[row[measure] for row in rows] for measure in MEASURES]
        cells = [f"{np.mean(values):.2f} +- {np.std(values, ddof=min(1, len(rows) - 1)):.2f}" for values in columns]
        print(f"{name:10}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
