"""How time and memory grow: with the images' size, the batch, the levels and the expander's width."""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from timing import peak_memory, quartiles, run_python, slope, take_turns  # noqa: E402

from flow import FlowEstimator, estimate_flow_pyramid  # noqa: E402
from mcjepa import MCJEPA, ModelConfig, swap_frames  # noqa: E402

POINT = {"crop": 256, "pairs": 1, "views": 0, "size": 128, "levels": 5, "losses": True, "width": 1024}
"""The point that the lines start from. Without the losses only encoder and estimator run, the latter perhaps with fewer
levels."""
LINES = {
    "pixels of a pair": ("crop", (128, 192, 256, 384, 512), lambda crop: crop**2, {}),
    "pairs": ("pairs", (1, 2, 4, 8), float, {}),
    "pixels of a view": ("size", (64, 96, 128, 192, 256), lambda size: size**2, {"pairs": 0, "views": 16}),
    "views": ("views", (8, 16, 32, 64), float, {"pairs": 0}),
    "levels of the estimator": ("levels", (1, 2, 3, 4, 5), float, {"losses": False}),
    "width of the expander": ("width", (1024, 2048, 4096, 8192), float, {"pairs": 0, "views": 16}),
}
"""By what grows: the field of a point, its values, the size that they stand for, and other fields of the point."""
MOST_REPEATS = 5


def measure_point(point: dict, device: torch.device, repeats: int) -> dict:
    """Seconds of a forward and a backward pass, and their peak of memory in GB."""
    torch.manual_seed(0)
    model = MCJEPA(ModelConfig(expander=(point["width"],) * 3)).to(device)
    levels = slice(point["levels"])
    estimator = FlowEstimator(model.encoder.channels[levels], model.encoder.strides[levels]).to(device)
    pairs, crop, views, size = (point[name] for name in ("pairs", "crop", "views", "size"))
    video = tuple(torch.rand(pairs, 3, crop, crop, device=device) for _ in range(2))
    images = tuple(torch.rand(views, 3, size, size, device=device) for _ in range(2))

    def way() -> None:
        model.zero_grad(set_to_none=True)
        estimator.zero_grad(set_to_none=True)
        if point["losses"]:
            model(video=video if pairs else None, views=images if views else None).total.backward()
        else:
            pyramid = model.encode(torch.cat(video))
            flows = estimate_flow_pyramid(estimator, pyramid, [swap_frames(x) for x in pyramid])
            sum(f.square().mean() for f in flows).backward()

    memory = peak_memory(way, device)
    seconds = take_turns({"": way}, min(repeats, MOST_REPEATS), device)[""]
    return {"seconds": quartiles(seconds), "gigabytes": memory}


def measure(device: torch.device, repeats: int, ceilings: dict[str, float]) -> dict:
    """Every point in a process of its own."""
    result = {}
    for name, (field, values, size_of, others) in LINES.items():
        rows = []
        for value in values:
            point = json.dumps(POINT | others | {field: value})
            measured = run_python([__file__, point, "--device", str(device), "--repeats", str(repeats)])
            rows.append({"size": size_of(value), field: value} | measured)
        sizes = [row["size"] for row in rows]
        result[name] = {
            "rows": rows,
            "slope_seconds": slope(sizes, [row["seconds"][0] for row in rows]),
            "slope_gigabytes": slope(sizes, [row["gigabytes"] for row in rows]),
        }
    return result


def table(result: dict) -> str:
    lines = ["| what grows | from, to | ms | slope | GB | slope |", "|---|---|---|---|---|---|"]
    for name, line in result.items():
        ends = line["rows"][0], line["rows"][-1]
        sizes = ", ".join(f"{row['size']:,.0f}" for row in ends)
        times = ", ".join(f"{1e3 * row['seconds'][0]:,.0f}" for row in ends)
        memory = ", ".join(f"{row['gigabytes']:.2f}" for row in ends)
        slopes = line["slope_seconds"], line["slope_gigabytes"]
        lines.append(f"| {name} | {sizes} | {times} | {slopes[0]:.2f} | {memory} | {slopes[1]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One point of a line; run.py calls this.")
    parser.add_argument("point", type=json.loads)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(measure_point(arguments.point, arguments.device, arguments.repeats)))
