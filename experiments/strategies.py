"""The five strategies of Table 5 on MovingShapes, after equal numbers of steps: the flow and the embeddings of each.

    python experiments/strategies.py [--steps 400] [--seed 0]      # 9 minutes on two CPU cores

Each strategy takes as many steps in all: the joint ones from the beginning, `frozen` and `finetune` half of them from a
VICReg checkpoint that took the other half. Both measures are of data that was never trained on.

The VICReg checkpoint is trained at 3e-4, the rate of the paper's recipe: batch norms in the expander leave the scale of
the features free, and the pocket's encoder has no normalisation of its own that would hold it. At the pocket's 2e-3
they grow to a deviation of 38,000 in 200 steps, where Eqs. 2 and 5, which compare features, drown the rest of the
flow's losses.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import TwoViews, make_loader  # noqa: E402
from evaluate import UNSEEN_SEED, evaluate_flow_on_shapes  # noqa: E402
from mcjepa import load_model  # noqa: E402
from sources.moving_shapes import ShapeImages  # noqa: E402

STRATEGIES = ("combined", "alternate_batches", "alternate_epochs", "frozen", "finetune")


@torch.no_grad()
def embeddings(path: Path) -> dict[str, float]:
    """Of 512 unseen images: the deviation over images, and the correlation of the two views, of the embeddings."""
    model = load_model(path)
    loader = make_loader(ShapeImages(512, (64, 64), seed=UNSEEN_SEED), TwoViews(64), batch_size=64)
    batches = [batch for batch, _ in zip(loader, range(8), strict=False)]
    x, y = (
        torch.cat([model.expander(model.encode(views[i])[0].mean(dim=(2, 3))) for views in batches]) for i in (0, 1)
    )
    x_std, y_std = ((z - z.mean(dim=0)) / (z.std(dim=0) + 1e-8) for z in (x, y))
    return {"deviation": x.std(dim=0).mean().item(), "correlation": (x_std * y_std).mean().item()}


def train(folder: Path, *flags: str) -> None:
    """A run of train.py; one that was stopped goes on, and one that is done stays as it is."""
    resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
    command = [sys.executable, ROOT / "train.py", "pocket", "--output-dir", folder, *flags, *resume]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"error: {folder}: this run failed, see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of each strategy, a multiple of 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "strategies")
    arguments = parser.parse_args()
    if arguments.steps < 8 or arguments.steps % 8:
        parser.error("--steps must be a multiple of 8")
    output = arguments.output_dir / f"{arguments.steps}_steps_seed_{arguments.seed}"
    common = [
        "--seed",
        str(arguments.seed),
        "--steps-per-epoch",
        str(arguments.steps // 8),
        "--mask-warmup-epochs",
        "2",
    ]
    whole, half = [*common, "--epochs", "8"], [*common, "--epochs", "4"]
    content = output / "content"
    train(content, *half, "--task", "vicreg", "--learning-rate", "3e-4")
    rows = {}
    for strategy in STRATEGIES:
        folder = output / strategy
        joint = strategy not in ("frozen", "finetune")
        start = [*whole, "--flow-start-epoch", "0"] if joint else [*half, "--init", str(content / "checkpoint.pt")]
        train(folder, *start, "--strategy", strategy)
        result = evaluate_flow_on_shapes(load_model(folder / "checkpoint.pt"), 100, (192, 192))
        rows[strategy] = {"epe": result["epe"], "epe_zero": result["epe_zero"]} | embeddings(folder / "checkpoint.pt")
    rows["content only"] = embeddings(content / "checkpoint.pt")
    (output / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"{'':20}{'EPE [px]':>10}{'of zero':>10}{'deviation':>12}{'correlation':>14}")
    for name, row in rows.items():
        flow = f"{row['epe']:10.2f}{row['epe'] / row['epe_zero']:10.1%}" if "epe" in row else " " * 20
        print(f"{name:20}{flow}{row['deviation']:12.3f}{row['correlation']:14.3f}")


if __name__ == "__main__":
    main()
