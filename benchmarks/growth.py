"""How time and memory grow: with the images' size, the batch, the levels and the expander's width."""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from timing import in_turns, peak_memory, run_child, slope, spread  # noqa: E402

from flow import FlowEstimator, estimate_flow_pyramid  # noqa: E402
from mcjepa import MCJEPA, ModelConfig, swap_frames  # noqa: E402

POINT = {"crop": 256, "pairs": 1, "views": 0, "size": 128, "levels": 5, "losses": True, "width": 1024}
"""Where the lines cross: video pairs alone, or views alone."""
LINES = {
    "pixels of a pair": ("crop", (128, 192, 256, 384, 512), lambda crop: crop**2, {}),
    "pairs": ("pairs", (1, 2, 4, 8), float, {}),
    "pixels of a view": ("size", (64, 96, 128, 192, 256), lambda size: size**2, {"pairs": 0, "views": 16}),
    "views": ("views", (8, 16, 32, 64), float, {"pairs": 0}),
    "levels of the estimator": ("levels", (1, 2, 3, 4, 5), float, {"losses": False}),
    "width of the expander": ("width", (1024, 2048, 4096, 8192), float, {"pairs": 0, "views": 16}),
}
"""What grows: the field of a point, its values, what is counted of it, and the rest of the point."""


REPEATS = 5
"""At most; more would take long and say little."""


def point(
    device: torch.device,
    repeats: int,
    crop: int,
    pairs: int,
    views: int,
    size: int,
    levels: int,
    losses: bool,
    width: int,
) -> dict:
    """Seconds of a forward and a backward, and their peak of memory in GB.

    Without the losses it is that of encoder and estimator alone, which may then have fewer levels.
    """
    torch.manual_seed(0)
    model = MCJEPA(ModelConfig(expander=(width,) * 3)).to(device)
    channels, strides = model.encoder.channels[:levels], model.encoder.strides[:levels]
    estimator = FlowEstimator(channels, strides).to(device)
    video = tuple(torch.rand(pairs, 3, crop, crop, device=device) for _ in range(2))
    images = tuple(torch.rand(views, 3, size, size, device=device) for _ in range(2))

    def way() -> None:
        model.zero_grad(set_to_none=True)
        estimator.zero_grad(set_to_none=True)
        if not losses:
            pyramid = model.encode(torch.cat(video))
            flows = estimate_flow_pyramid(estimator, pyramid, [swap_frames(x) for x in pyramid])
            sum(f.square().mean() for f in flows).backward()
        else:
            model(video=video if pairs else None, views=images if views else None).total.backward()

    memory = peak_memory(way, device)
    return {"seconds": spread(in_turns({"": way}, min(repeats, REPEATS), device)[""]), "gigabytes": memory}


def measure(device: torch.device, repeats: int, limits: dict[str, float]) -> dict:
    result = {}
    for name, (field, values, count, rest) in LINES.items():
        rows = []
        for value in values:
            words = json.dumps(POINT | rest | {field: value})
            measured = run_child([__file__, words, "--device", str(device), "--repeats", str(repeats)])
            rows.append({"counted": count(value), field: value} | measured)
        sizes = [row["counted"] for row in rows]
        result[name] = {
            "rows": rows,
            "slope_seconds": slope(sizes, [row["seconds"][0] for row in rows]),
            "slope_gigabytes": slope(sizes, [row["gigabytes"] for row in rows]),
        }
    return result


def show(result: dict) -> str:
    lines = ["| what grows | from, to | ms | slope | GB | slope |", "|---|---|---|---|---|---|"]
    for name, line in result.items():
        rows = line["rows"]
        ends = f"{rows[0]['counted']:,.0f}, {rows[-1]['counted']:,.0f}"
        times = f"{1e3 * rows[0]['seconds'][0]:,.0f}, {1e3 * rows[-1]['seconds'][0]:,.0f}"
        memory = f"{rows[0]['gigabytes']:.2f}, {rows[-1]['gigabytes']:.2f}"
        lines.append(
            f"| {name} | {ends} | {times} | {line['slope_seconds']:.2f} | {memory} | {line['slope_gigabytes']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One point of a line; run.py calls this.")
    parser.add_argument("point", type=json.loads)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(point(arguments.device, arguments.repeats, **arguments.point)))
