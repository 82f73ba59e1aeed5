"""All benchmarks in one command: our formulations beside others', where a step's time goes, and how its cost grows.

    pip install -r benchmarks/requirements.txt
    python benchmarks/run.py                                  # everything: 30 minutes on two CPU cores, 24 GB
    python benchmarks/run.py --only vicreg-384 correlation    # some of it
    python benchmarks/run.py --device cuda --output gpu.json

Ways of computing the same thing take turns in one process; their results are compared, gradients included (of a whole
step the loss, the norms and some of the gradients). The table has medians, and quartiles in brackets. Memory is the
peak beyond what was held before; on a CPU each way runs in a process of its own for it.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import growth  # noqa: E402
import parts  # noqa: E402
import processes  # noqa: E402
from comparisons import COMPARISONS, is_installed  # noqa: E402
from timing import Way, difference, measure_ceilings, peak_memory, quartiles, run_python, take_turns  # noqa: E402

from engine.faults import one_line, run_command  # noqa: E402
from engine.log import environment  # noqa: E402

OTHERS = {"parts": parts, "growth": growth, "processes": processes}
"""What is measured besides the comparisons; each has `measure(device, repeats, ceilings)` and `table(result)`."""


def memory_of(name: str, way: str, run: Way, device: torch.device) -> float:
    """The peak of memory of one way in GB; on a CPU in a process of its own."""
    if device.type == "cuda":
        return peak_memory(run, device)
    return run_python([__file__, "--device", str(device), "--peak-of", name, way])


def check_results(name: str, ways: dict[str, Way], tolerance: float) -> dict[str, float]:
    """How much the result of each way differs from ours; a ValueError where it is too much."""
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits would differ by more than the differences of interest
    results = {way: run() for way, run in ways.items()}
    torch.backends.cudnn.allow_tf32 = True
    ours = next(iter(ways))
    differences = {way: difference(results[ours], result) for way, result in results.items()}
    for way, value in differences.items():
        if not value <= tolerance:
            raise ValueError(f"{name}: {ours} and {way} differ by {value:.1e}, more than {tolerance:g}")
    return differences


def compare(name: str, device: torch.device, repeats: int) -> dict:
    """Seconds and memory of each way, how many times ours it takes, and how much its result differs."""
    comparison = COMPARISONS[name]
    if not is_installed(comparison.package):
        return {"what": comparison.what, "missing": comparison.package}
    ways = comparison.build(device)
    differences, tolerance = {}, comparison.tolerance
    if tolerance is not None:
        on_gpu = comparison.tolerance_on_gpu if device.type == "cuda" else None
        differences = check_results(name, ways, on_gpu or tolerance)
    seconds = take_turns(ways, repeats, device)
    ours = next(iter(seconds.values()))
    rows = {}
    for way, measured in seconds.items():
        rows[way] = {
            "seconds": quartiles(measured),
            "times_ours": quartiles([theirs / own for theirs, own in zip(measured, ours, strict=True)]),
            "gigabytes": memory_of(name, way, ways[way], device),
            "difference": differences.get(way),
        }
    return {"what": comparison.what, "goal": comparison.goal, "repeats": repeats, "ways": rows}


def table(result: dict) -> str:
    """The lines of a comparison in Markdown."""
    if "missing" in result:
        return f"| {result['what']} | not measured: pip install {result['missing']} | | | | | |"

    def times(ratio: float) -> str:
        return f"{ratio:.{2 if ratio < 10 else 0}f}"

    lines, ours = [], next(iter(result["ways"].values()))
    for way, row in result["ways"].items():
        what, faster, fewer, same = f"{result['what']} [{result['goal']}]", "", "", ""
        if row is not ours:
            median, low, high = map(times, row["times_ours"])
            what, faster = "", f"**{median}** ({low} to {high})"
            fewer = times(row["gigabytes"] / ours["gigabytes"]) if ours["gigabytes"] > 1e-3 else ""
            same = "" if row["difference"] is None else f"{row['difference']:.0e}"
        seconds = row["seconds"][0]
        milliseconds = f"{1e3 * seconds:,.{0 if seconds >= 1 else 1 if seconds >= 0.01 else 2}f}"
        lines.append(f"| {what} | {way} | {milliseconds} | {faster} | {row['gigabytes']:.3f} | {fewer} | {same} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*COMPARISONS, *OTHERS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="of each comparison (10); parts and growth at most 5")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks.json"), help="all numbers as JSON")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU here")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device, output = arguments.device, arguments.output
    if arguments.peak_of:
        name, way = arguments.peak_of
        run = COMPARISONS[name].build(device)[way]
        print(json.dumps(peak_memory(run, device)))
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("{}\n")  # half an hour later would be late to find that it cannot be written
    ceilings = measure_ceilings(device)
    result, failures = {"environment": environment(device), "ceilings": ceilings, "comparisons": {}}, []
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; a large matrix product "
        f"{ceilings['matrices'] / 1e9:,.0f} GFLOP/s, a large convolution {ceilings['convolution'] / 1e9:,.0f} GFLOP/s, "
        f"a large copy or sum {ceilings['bytes'] / 1e9:,.1f} GB/s\n"
    )
    if COMPARISONS.keys() & {*arguments.only}:
        columns = "what [goal] | way | ms | time / ours | GB | memory / ours | difference"
        print(f"| {columns} |\n|---|---|---|---|---|---|---|")
    for name in sorted(arguments.only, key=[*COMPARISONS, *OTHERS].index):
        gc.collect()  # several of these need most of 24 GB
        try:
            if name in COMPARISONS:
                result["comparisons"][name] = compare(name, device, arguments.repeats)
                print(table(result["comparisons"][name]), flush=True)
            else:
                result[name] = OTHERS[name].measure(device, arguments.repeats, ceilings)
                print("\n" + OTHERS[name].table(result[name]), flush=True)
        except Exception as error:  # perhaps of another's package; the rest can still be measured
            failures.append(f"{name}: {one_line(error)[:300]}")
            print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nall numbers: {output}")
    if failures:
        raise ValueError("; ".join(failures))


if __name__ == "__main__":
    run_command(main)
