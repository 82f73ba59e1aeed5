"""All benchmarks in one command: our formulations beside others', where a step's time goes, how its cost grows.

    pip install -r benchmarks/requirements.txt
    python benchmarks/run.py                                  # everything, 30 minutes on two CPU cores, 24 GB
    python benchmarks/run.py --only vicreg-384 correlation    # some of it
    python benchmarks/run.py --device cuda --output gpu.json

Ways of the same thing take turns in one process: medians of the repeats, quartiles in brackets, and their results are
compared, gradients included (of a whole step the loss, the norms and some of the gradients). Memory is the peak beyond
what was held before it; on a CPU each way has its own process.
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
from contests import CONTESTS, installed  # noqa: E402
from timing import Way, ceilings, difference, in_turns, peak_memory, run_child, spread  # noqa: E402

from engine.faults import one_line  # noqa: E402
from engine.log import environment  # noqa: E402

OTHERS = {"parts": parts, "growth": growth, "processes": processes}
"""What is measured beside the contests; each has `measure(device, repeats, ceilings)` and `show(result)`."""


def memory_of(name: str, way: str, run: Way, device: torch.device) -> float:
    """The peak of one way in GB; on a CPU in a process of its own."""
    if device.type == "cuda":
        return peak_memory(run, device)
    return run_child([__file__, "--device", str(device), "--peak-of", name, way])


def hold(name: str, device: torch.device, repeats: int) -> dict:
    """One contest: for each way its seconds, its memory, how many times ours it takes, and how the results differ."""
    contest = CONTESTS[name]
    if not installed(contest.needs):
        return {"what": contest.what, "missing": contest.needs}
    ways = contest.build(device)
    ours = next(iter(ways))
    results = {}
    if contest.same is not None:
        torch.backends.cudnn.allow_tf32 = False  # its 10 bits would differ by more than what is looked for
        results = {way: run() for way, run in ways.items()}
        torch.backends.cudnn.allow_tf32 = True
    differences = {way: difference(results[ours], result) for way, result in results.items()}
    results.clear()
    allowed = contest.same_on_gpu or contest.same if device.type == "cuda" else contest.same
    for way, value in differences.items():
        if not value <= allowed:
            raise ValueError(f"{name}: {ours} and {way} differ by {value:.1e}, more than {allowed:g}")
    seconds = in_turns(ways, repeats, device)
    rows = {}
    for way, measured in seconds.items():
        ratios = [theirs / own for theirs, own in zip(measured, seconds[ours], strict=True)]
        rows[way] = {
            "seconds": spread(measured),
            "times_ours": spread(ratios),
            "gigabytes": memory_of(name, way, ways[way], device),
            "difference": differences.get(way),
        }
    return {"what": contest.what, "goal": contest.goal, "repeats": repeats, "ways": rows}


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{0 if seconds >= 1 else 1 if seconds >= 0.01 else 2}f}"


def times(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 10 else 0}f}"


def show(result: dict) -> str:
    """A contest's lines of the table, in Markdown."""
    if "missing" in result:
        return f"| {result['what']} | not measured: pip install {result['missing']} | | | | | |"
    lines = []
    ours = None
    for way, row in result["ways"].items():
        ours = ours or row
        time = milliseconds(row["seconds"][0])
        faster, fewer = "", ""
        if row is not ours:
            median, low, high = (times(value) for value in row["times_ours"])
            faster = f"**{median}** ({low} to {high})"
            fewer = times(row["gigabytes"] / ours["gigabytes"]) if ours["gigabytes"] > 1e-3 else ""
        same = "" if row is ours or row["difference"] is None else f"{row['difference']:.0e}"
        what = f"{result['what']} [{result['goal']}]" if row is ours else ""
        lines.append(f"| {what} | {way} | {time} | {faster} | {row['gigabytes']:.3f} | {fewer} | {same} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [*CONTESTS, *OTHERS]
    parser.add_argument("--only", nargs="+", choices=everything, metavar="NAME", help=", ".join(everything))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="of each contest (10); parts and growth at most 5")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks.json"), help="all numbers as JSON")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU here")
    if arguments.output.is_dir() or any(place.is_file() for place in arguments.output.parents):
        parser.error(f"--output {arguments.output}: not a place for a file")
    if arguments.peak_of:
        name, way = arguments.peak_of
        ways = CONTESTS[name].build(device)
        run = ways[way]
        ways.clear()
        print(json.dumps(peak_memory(run, device)))
        return
    names = arguments.only or everything
    limits = ceilings(device)
    result = {"environment": environment(device, 1), "ceilings": limits, "contests": {}}
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; a large matrix product "
        f"{limits['matrices'] / 1e9:,.0f} GFLOP/s, a large convolution {limits['convolution'] / 1e9:,.0f} GFLOP/s, "
        f"a large copy or sum {limits['bytes'] / 1e9:,.1f} GB/s\n"
    )
    if any(name in CONTESTS for name in names):
        print(
            "| what [goal] | way | ms | time / ours | GB | memory / ours | difference |\n|---|---|---|---|---|---|---|"
        )
    failed = []
    for name in sorted(names, key=everything.index):
        gc.collect()  # several of these take much of 24 GB
        try:
            if name in CONTESTS:
                result["contests"][name] = hold(name, device, arguments.repeats)
                print(show(result["contests"][name]), flush=True)
            else:
                result[name] = OTHERS[name].measure(device, arguments.repeats, limits)
                print("\n" + OTHERS[name].show(result[name]), flush=True)
        except Exception as error:  # also of others' packages; the rest may still be measured
            failed.append(f"{name}: {one_line(error)[:300]}")
            print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nall numbers: {arguments.output}")
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
