"""The five strategies of Table 5 on MovingShapes, after equal numbers of steps: end-point error and embeddings.

    python experiments/strategies.py [--steps 400] [--seed 0]      # 9 minutes on two CPU cores

`frozen` and `finetune` continue from a VICReg checkpoint that takes the first half of their steps. It is trained at
3e-4, the learning rate of the paper's recipe: the expander's batch norm leaves the scale of the features free, and the
pocket's encoder has no norm to hold it. At the pocket's own rate, 2e-3, the features reach a standard deviation of
38,000 in 200 steps, and Eqs. 2 and 5, which compare features, drown the other losses of the flow.
"""

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import TwoViews, make_loader  # noqa: E402
from evaluate import UNSEEN_SEED, flow_errors_on_shapes  # noqa: E402
from mcjepa import load_model  # noqa: E402
from sources.moving_shapes import ShapeImages  # noqa: E402

STRATEGIES = ("combined", "alternate_batches", "alternate_epochs", "frozen", "finetune")


@torch.no_grad()
def measure_embeddings(path: Path) -> dict[str, float]:
    """Standard deviation over 512 unseen images (0: collapsed), and correlation of their two views."""
    model = load_model(path)
    loader = make_loader(ShapeImages(512, (64, 64), seed=UNSEEN_SEED), TwoViews(64), batch_size=64)
    pooled = [[model.encode(view)[0].mean(dim=(2, 3)) for view in views] for views in islice(loader, 8)]
    x, y = (torch.cat([model.expander(z) for z in view]) for view in zip(*pooled, strict=True))
    x_unit, y_unit = ((z - z.mean(dim=0)) / (z.std(dim=0) + 1e-8) for z in (x, y))
    return {"standard deviation": x.std(dim=0).mean().item(), "correlation": (x_unit * y_unit).mean().item()}


def train(folder: Path, *flags: str) -> None:
    """A run of the pocket preset; a run that was stopped continues, a finished one is left as it is."""
    command = [sys.executable, "train.py", "pocket", "--output-dir", folder.resolve(), *flags]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"error: the run in {folder} failed, see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of each strategy, a multiple of 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "strategies")
    arguments = parser.parse_args()
    steps_per_epoch, rest = divmod(arguments.steps, 8)
    if steps_per_epoch < 1 or rest:
        parser.error("--steps must be a multiple of 8")
    output = arguments.output_dir / f"{arguments.steps}_steps_seed_{arguments.seed}"
    common = ["--seed", str(arguments.seed), "--steps-per-epoch", str(steps_per_epoch), "--mask-warmup-epochs", "2"]
    checkpoint = output / "content" / "checkpoint.pt"
    train(checkpoint.parent, *common, "--epochs", "4", "--task", "vicreg", "--learning-rate", "3e-4")
    rows = {}
    for strategy in STRATEGIES:
        after_content = strategy in ("frozen", "finetune")
        epochs = ["--epochs", "4", "--init", str(checkpoint.resolve())] if after_content else ["--epochs", "8"]
        train(output / strategy, *common, *epochs, "--strategy", strategy)
        path = output / strategy / "checkpoint.pt"
        rows[strategy] = flow_errors_on_shapes(load_model(path), 100, (192, 192)) | measure_embeddings(path)
    rows["content only"] = measure_embeddings(checkpoint)
    (output / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    columns = ("epe", "epe_zero", "standard deviation", "correlation")
    print(" " * 20 + "".join(f"{column:>20}" for column in columns))
    for name, row in rows.items():
        cells = [f"{row[column]:20.3f}" if column in row else " " * 20 for column in columns]
        print(f"{name:20}" + "".join(cells))


if __name__ == "__main__":
    main()
